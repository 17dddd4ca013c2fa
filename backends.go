package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// dialTimeout bounds one dial: a pod that is gone may answer nothing at all.
const dialTimeout = 2 * time.Second

// ordinals are those of the backends that have namespaces: count of them, from
// first on.
type ordinals struct{ first, count int }

func (o ordinals) has(ordinal int) bool { return ordinal >= o.first && ordinal < o.first+o.count }

// String is "4" for 0 to 3, "2+4" for 2 to 5.
func (o ordinals) String() string {
	if o.first == 0 {
		return strconv.Itoa(o.count)
	}
	return strconv.Itoa(o.first) + "+" + strconv.Itoa(o.count)
}

// backends knows where each backend is, and dials it: at addresses that are
// given, by DNS, or where the EndpointSlices say.
type backends struct {
	// Static after construction.
	statefulSet string   // the part of a backend's name before its ordinal
	static      ordinals // what the flags say; none if the StatefulSet is followed
	dialer      net.Dialer
	queues      *dialQueues
	resolve     func(ctx context.Context, ordinal int) (addr string, err error)
	invalidate  func(ordinal int)        // the address was no good
	podUID      func(ordinal int) string // uid of the pod that locate finds, "" if not known
	close       func()                   // returns when nothing that locate started runs any more
}

// name returns the name of the backend with this ordinal.
func (b *backends) name(ordinal int) string { return backendName(b.statefulSet, ordinal) }

func backendName(statefulSet string, ordinal int) string {
	return statefulSet + "-" + strconv.Itoa(ordinal)
}

// backendOrdinal reads the name of a backend. Only the one spelling that
// backendName makes is taken: no sign, no leading zero.
func backendOrdinal(statefulSet, name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, statefulSet+"-")
	if !ok || len(digits) > 9 {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 0 || strconv.Itoa(n) != digits {
		return 0, false
	}
	return n, true
}

// alwaysReady lets every backend be dialled: there is nothing that says more than the
// dial.
func alwaysReady(int) error { return nil }

// unknownPodUID is for backends of which no pods are known.
func unknownPodUID(int) string { return "" }

// newStaticBackends are at the given addresses, in the order of their ordinals.
func newStaticBackends(statefulSet string, addrs []string) *backends {
	return &backends{
		statefulSet: statefulSet,
		static:      ordinals{count: len(addrs)},
		queues:      newDialQueues(alwaysReady),
		resolve:     func(_ context.Context, ordinal int) (string, error) { return addrs[ordinal], nil },
		invalidate:  func(int) {},
		podUID:      unknownPodUID,
		close:       func() {},
	}
}

// parseBackends reads the list of host:port of -backends.
func parseBackends(list string) ([]string, error) {
	addrs := strings.Split(list, ",")
	for i, addr := range addrs {
		addrs[i] = strings.TrimSpace(addr)
		host, port, err := net.SplitHostPort(addrs[i])
		if n, perr := strconv.Atoi(port); err != nil || host == "" || perr != nil || n < 1 || n > 65535 {
			return nil, fmt.Errorf("backend %d must be host:port (got %q)", i, addrs[i])
		}
	}
	return addrs, nil
}

// dial connects to the backend once. The caller closes the connection.
func (b *backends) dial(ctx context.Context, ordinal int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	addr, err := b.resolve(ctx, ordinal)
	if err != nil {
		return nil, err
	}
	conn, err := b.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		b.invalidate(ordinal)
		return nil, err
	}
	if conn.LocalAddr().String() == conn.RemoteAddr().String() { // package net tries twice more, and then returns it
		conn.Close()
		b.invalidate(ordinal)
		return nil, fmt.Errorf("dial tcp %s: %w", addr, errSelfConnect)
	}
	return conn, nil
}

// errSelfConnect says that a connection's two ends are one socket: nobody listens at
// the address, and the system has chosen its port for the end that dials (RFC 9293
// §3.5, simultaneous open). It would answer a client with its own request.
var errSelfConnect = errors.New("connected to itself: nothing listens there")

// tryResolve returns the address of a backend that may be dialled now, if nobody has
// to wait for that. The caller calls dialled.
func (b *backends) tryResolve(ordinal int) (addr netip.AddrPort, ok bool) {
	if !b.queues.tryDial(ordinal) {
		return addr, false
	}
	now, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	text, err := b.resolve(now, ordinal)
	if err == nil {
		addr, err = netip.ParseAddrPort(text) // not of a host's name, which has to be looked up
	}
	if err != nil || addr.Addr().Zone() != "" { // nor of a link's, which has
		b.queues.dialDone(ordinal, err, true)
		return addr, false
	}
	return addr, true
}

// dialDone takes note of how the dial of an address from tryResolve went; cut says that
// its upgrade ended before it could.
func (b *backends) dialDone(ordinal int, err error, cut bool) {
	if err != nil && !cut {
		b.invalidate(ordinal)
	}
	b.queues.dialDone(ordinal, err, cut)
}

// setMisdirected takes note that what answered at the backend's address is another.
func (b *backends) setMisdirected(ordinal int, err error) {
	b.invalidate(ordinal)
	b.queues.setMisdirected(ordinal, err)
}

// probe returns the backend's address, and whether it takes a connection now.
func (b *backends) probe(ctx context.Context, ordinal int) (addr string, err error) {
	conn, err := b.dial(ctx, ordinal)
	if err == nil {
		conn.Close()
	}
	addr, _ = b.resolve(ctx, ordinal) // "" where dial has said why
	return addr, err
}

// dialOwner waits until the owner is ready, dials it, and returns the connection to the one
// that owner named last, and the uid of its pod, if that is known. It dials again for as long as the owner is called
// ready, and asks owner again when the table was swapped. An error of owner ends
// it, as does ctx: then the error says what there was to wait for, or how the last
// dial failed.
func (b *backends) dialOwner(ctx context.Context, owner func() (int, error)) (net.Conn, string, error) {
	w := b.queues.newWaiter()
	for {
		swaps := b.queues.swaps.Load()
		ordinal, err := owner()
		if err != nil {
			return nil, "", err
		}
		var conn net.Conn
		var podUID string
		if err = b.queues.wait(ctx, w, ordinal, swaps); err == nil {
			conn, podUID, err = b.dialInTurn(ctx, w, ordinal)
		}
		if !errors.Is(err, errRecheckOwner) {
			return conn, podUID, err
		}
	}
}

// dialInTurn dials the backend for w, which has its turn, and returns the connection and
// the uid of the pod, if that is known. If the dial fails it returns errRecheckOwner, or,
// when ctx has ended, what queues.reason says: not the error of a dial that ctx cut short.
func (b *backends) dialInTurn(ctx context.Context, w *waiter, ordinal int) (net.Conn, string, error) {
	pod := b.podUID(ordinal) // before the address: a pod that is new by then is taken for the old one, never the other way
	conn, err := b.dial(ctx, ordinal)
	cut := isOver(ctx)
	b.queues.dialDone(ordinal, err, cut)
	switch {
	case err == nil:
		return conn, pod, nil
	case cut:
		return nil, "", b.queues.reason(w, ordinal, err)
	}
	w.failure = err
	return nil, "", errRecheckOwner
}

// isOver reports whether ctx has ended, or its deadline has passed: a dial may see that
// before ctx does.
func isOver(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

const (
	maxDialsPerBackend = 64 // dials of one backend at once
	minRedialDelay     = 50 * time.Millisecond
	maxRedialDelay     = time.Second
)

// errRecheckOwner says that the table was swapped while an upgrade waited.
var errRecheckOwner = errors.New("the owner may have changed")

// dialQueues makes upgrades wait until their backend is ready, and then lets them
// dial in the order in which they came, at most maxDialsPerBackend at once. None of them
// polls: what they wait for wakes them. While dials fail, one upgrade at a time
// dials for all of its backend's.
type dialQueues struct {
	// Static after construction.
	checkReady func(ordinal int) error // why a backend must not be dialled, or nil

	swaps             atomic.Int64 // of the table
	misdirectedQueues atomic.Int64 // lines whose astray is set

	// Guarded by mu.
	mu           sync.Mutex
	lastSequence int64
	queues       map[int]*dialQueue // by ordinal
}

// dialQueue is the upgrades of one backend. It is guarded by the holds' mu.
type dialQueue struct {
	waiters     []*waiter // by ticket
	dialing     int
	failures    int       // dials in a row
	lastErr     error     // of the last dial that failed, nil since a good one
	retryAt     time.Time // until then nobody dials
	wasDown     bool      // it was not ready at the last look
	misdirected bool      // another backend answered at its address, and it has not since
}

// upgradeLimit are those of the upgrades under way: held, dialled or in the handshake. One
// backend cannot take those of the others, whatever it is that its upgrades wait for:
// half of the limit is divided evenly among the backends, and of the other half, the
// pool, a backend may have as much as it leaves free. So there is room for the clients
// of the last one that works, and for a crowd that waits for one that restarts. The
// zero value has none taken.
type upgradeLimit struct {
	mu        sync.Mutex // guards the rest
	total     int
	byBackend map[int]int // those taken, by ordinal
	share     int         // of each backend
	pooled    int         // those taken beyond own
}

// acquire takes a place of the limit's for an upgrade to one of so many backends, and
// returns what taken does then. The caller calls leave. Each backend has at least one
// place, whatever the limit.
func (p *upgradeLimit) acquire(ordinal, backends, limit int) (all, own int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if share := max(1, limit/2/backends); share != p.share {
		p.share, p.pooled = share, 0
		for _, taken := range p.byBackend {
			p.pooled += max(0, taken-share)
		}
	}
	free := limit - p.share*backends - p.pooled
	if taken := p.byBackend[ordinal]; taken >= p.share && taken-p.share >= free {
		return p.total, taken, false
	}
	p.add(ordinal, 1)
	return p.total, p.byBackend[ordinal], true
}

// release gives a place back.
func (p *upgradeLimit) release(ordinal int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(ordinal, -1)
}

// transfer makes a place that of an upgrade to another backend, which may then have more
// than its share: that is how those who wait get away from a backend that is dead.
func (p *upgradeLimit) transfer(from, to int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(from, -1)
	p.add(to, 1)
}

// add counts n places more. mu is held.
func (p *upgradeLimit) add(ordinal, n int) {
	if p.byBackend == nil {
		p.byBackend = map[int]int{}
	}
	before := p.byBackend[ordinal]
	p.pooled += max(0, before+n-p.share) - max(0, before-p.share)
	p.total += n
	if p.byBackend[ordinal] = before + n; before+n == 0 {
		delete(p.byBackend, ordinal)
	}
}

// inUse is how many places are, and how many of these are the backend's.
func (p *upgradeLimit) inUse(ordinal int) (all, own int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total, p.byBackend[ordinal]
}

// waiter is one upgrade that waits for its turn.
type waiter struct {
	sequence int64  // its place among all: it keeps that until it has a connection; one that turns out to be of no use is asked for anew
	woken    wakeup // it may dial, or has to ask for its owner again
	onWake   func() // if not nil it is called in place of wake; mu is held: it must not block
	mayDial  bool   // guarded by the holds' mu

	failure error // of its last dial that was not cut short, or nil; owned by who waits
}

func newDialQueues(ready func(ordinal int) error) *dialQueues {
	return &dialQueues{checkReady: ready, queues: map[int]*dialQueue{}}
}

// newWaiter gives the next ticket.
func (h *dialQueues) newWaiter() *waiter {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastSequence++
	return &waiter{sequence: h.lastSequence, woken: newWakeup()}
}

// wait returns nil when w may dial the backend: the caller then calls done. Else
// it returns errRecheckOwner if the table is not that of swaps any more, or, when ctx
// has ended, what w waited for.
func (h *dialQueues) wait(ctx context.Context, w *waiter, ordinal int, swaps int64) error {
	if !h.enqueue(w, ordinal, swaps) {
		return errRecheckOwner
	}
	select {
	case <-w.woken:
	case <-ctx.Done():
	}
	return h.dequeue(ctx, w, ordinal)
}

// enqueue puts w, which is in no line, into the backend's, which may give it its turn at
// once. It reports whether it did: not if the table is not that of swaps any more, as
// the backend may own the namespace no more.
func (h *dialQueues) enqueue(w *waiter, ordinal int, swaps int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.swaps.Load() != swaps { // after this look, recheckOwners finds w in the line
		return false
	}
	q := h.queue(ordinal)
	at, _ := q.position(w)
	q.waiters = slices.Insert(q.waiters, at, w)
	h.startDials(ordinal, q)
	return true
}

// dequeue takes w, which was roused or has waited enough, out of the backend's line, and
// returns what wait does.
func (h *dialQueues) dequeue(ctx context.Context, w *waiter, ordinal int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.mayDial {
		w.mayDial = false
		return nil
	}
	q := h.queue(ordinal)
	if at, ok := q.position(w); ok {
		q.waiters = slices.Delete(q.waiters, at, at+1)
	}
	if ctx.Err() == nil {
		return errRecheckOwner
	}
	return h.why(w, ordinal, ctx.Err())
}

// reason says why w, whose time is over, has no connection to the backend; err if
// nothing else is known.
func (h *dialQueues) reason(w *waiter, ordinal int, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why(w, ordinal, err)
}

// why is what keeps the backend from being dialled, or else how the last dial of it
// failed, or else the last of w's own; err if there is none of these. mu is held.
func (h *dialQueues) why(w *waiter, ordinal int, err error) error {
	return cmp.Or(h.checkReady(ordinal), h.queue(ordinal).lastErr, w.failure, err)
}

// tryDial reports whether the caller may dial the backend now, as nobody waits for it
// and no dial has failed: the caller then calls done.
func (h *dialQueues) tryDial(ordinal int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(ordinal)
	if len(q.waiters) > 0 || q.failures > 0 || q.dialing >= maxDialsPerBackend || h.checkReady(ordinal) != nil {
		return false
	}
	q.dialing++
	return true
}

// dialDone takes note of how a dial went; cut says that its upgrade ended before it
// could.
func (h *dialQueues) dialDone(ordinal int, err error, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(ordinal)
	q.dialing--
	switch {
	case err == nil && q.misdirected: // the next waits for the answer, or long enough
		h.dialFailed(ordinal, q, q.lastErr)
	case err == nil:
		q.failures, q.lastErr = 0, nil
	case !cut:
		h.dialFailed(ordinal, q, err)
	}
	h.startDials(ordinal, q)
}

// dialFailed makes the line rest, longer each time. Of those that fail together, the
// first counts. mu is held.
func (h *dialQueues) dialFailed(ordinal int, q *dialQueue, err error) {
	if time.Now().Before(q.retryAt) {
		return
	}
	q.failures++
	wait := backoff{minRedialDelay, maxRedialDelay}.jittered(q.failures, rand.Float64())
	q.lastErr, q.retryAt = err, time.Now().Add(wait)
	time.AfterFunc(wait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.startDials(ordinal, q)
	})
}

// setMisdirected takes note that the backend's address is another backend's. As with
// dials that fail, one upgrade at a time then asks for all, until meant.
func (h *dialQueues) setMisdirected(ordinal int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(ordinal)
	if !q.misdirected {
		q.misdirected = true
		h.misdirectedQueues.Add(1)
	}
	h.dialFailed(ordinal, q, err)
}

// clearMisdirected takes note that the backend has answered.
func (h *dialQueues) clearMisdirected(ordinal int) {
	if h.misdirectedQueues.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(ordinal)
	if !q.misdirected {
		return
	}
	h.misdirectedQueues.Add(-1)
	q.misdirected, q.failures, q.lastErr, q.retryAt = false, 0, nil, time.Time{}
	h.startDials(ordinal, q)
}

// readinessChanged is called after ready has changed its mind about any backend, or addresses
// may have changed: all are tried at once, and one that is back as if nothing had
// been before.
func (h *dialQueues) readinessChanged() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ordinal, q := range h.queues {
		down := h.checkReady(ordinal) != nil
		if q.wasDown && !down {
			q.failures = 0
		}
		q.wasDown, q.retryAt = down, time.Time{}
		h.startDials(ordinal, q)
	}
}

// recheckOwners makes all that wait ask for their owner again. It is called after the
// table was swapped.
func (h *dialQueues) recheckOwners() {
	h.swaps.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, q := range h.queues {
		for _, w := range q.waiters {
			w.wake()
		}
	}
}

// startDials gives their turn to those that may dial now. mu is held.
func (h *dialQueues) startDials(ordinal int, q *dialQueue) {
	if len(q.waiters) == 0 || h.checkReady(ordinal) != nil || time.Now().Before(q.retryAt) {
		return
	}
	limit := maxDialsPerBackend
	if q.failures > 0 {
		limit = 1
	}
	n := max(0, min(len(q.waiters), limit-q.dialing))
	for _, w := range q.waiters[:n] {
		w.mayDial = true
		w.wake()
	}
	q.dialing += n
	q.waiters = slices.Delete(q.waiters, 0, n)
}

// queue returns the backend's. mu is held.
func (h *dialQueues) queue(ordinal int) *dialQueue {
	q := h.queues[ordinal]
	if q == nil {
		q = &dialQueue{wasDown: h.checkReady(ordinal) != nil}
		h.queues[ordinal] = q
	}
	return q
}

// position returns where w is in the line, or belongs.
func (q *dialQueue) position(w *waiter) (int, bool) {
	return slices.BinarySearchFunc(q.waiters, w.sequence, func(other *waiter, ticket int64) int {
		return cmp.Compare(other.sequence, ticket)
	})
}

func (w *waiter) wake() {
	if w.onWake != nil {
		w.onWake()
		return
	}
	w.woken.notify()
}

const (
	addressTTL        = time.Second            // how long an address from DNS is believed
	minLookupInterval = 200 * time.Millisecond // least time between two lookups of a name, whatever came of the first
	lookupTimeout     = 3 * time.Second        // bounds one lookup
)

// newDNSBackends are the pods of a StatefulSet with a headless Service, which
// gives each the name <statefulSet>-<ordinal>.<service>
// (https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#stable-network-id).
func newDNSBackends(count int, statefulSet, service string, port int) *backends {
	cache := &addressCache{
		host:   func(ordinal int) string { return backendName(statefulSet, ordinal) + "." + service },
		port:   strconv.Itoa(port),
		lookup: net.DefaultResolver.LookupNetIP,
		byHost: map[string]*dnsLookup{},
	}
	return &backends{
		statefulSet: statefulSet,
		static:      ordinals{count: count},
		queues:      newDialQueues(alwaysReady),
		resolve:     func(ctx context.Context, ordinal int) (string, error) { return cache.get(ctx, cache.host(ordinal)) },
		invalidate:  func(ordinal int) { cache.invalidate(cache.host(ordinal)) },
		podUID:      unknownPodUID,
		close:       cache.lookups.Wait,
	}
}

// addressCache keeps addresses from DNS for addressTTL, failures and addresses
// that were no good for minLookupInterval. However many wait for a name, it is looked
// up once.
type addressCache struct {
	// Static after construction.
	host   func(ordinal int) string
	port   string
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	byHost  map[string]*dnsLookup // guarded by mu
	lookups sync.WaitGroup        // under way
}

// dnsLookup is one lookup, under way or done.
type dnsLookup struct {
	done       chan struct{} // closed by resolve when the fields below are set
	addr       string
	err        error
	retryAt    time.Time // until then it is not looked up again
	validUntil time.Time // until then it is believed
}

// get returns host's address with the port, from the cache, from the lookup
// under way, or from a new one.
func (c *addressCache) get(ctx context.Context, host string) (string, error) {
	c.mu.Lock()
	a := c.byHost[host]
	if a == nil || a.expired() {
		a = &dnsLookup{done: make(chan struct{})}
		c.byHost[host] = a
		c.lookups.Go(func() { c.resolve(a, host) })
	}
	c.mu.Unlock()
	if a.isDone() {
		return a.addr, a.err // also when ctx has ended
	}
	select {
	case <-a.done:
		return a.addr, a.err
	case <-ctx.Done():
		return "", fmt.Errorf("look up %s: %w", host, ctx.Err())
	}
}

// resolve fills a. It is bound by lookupTimeout and not by the one who asked
// first: others wait for it too.
func (c *addressCache) resolve(a *dnsLookup, host string) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	defer close(a.done)
	ips, err := c.lookup(ctx, "ip", host)
	a.retryAt = time.Now().Add(minLookupInterval)
	if err == nil && len(ips) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		a.err = fmt.Errorf("look up %s: %w", host, err)
		return
	}
	a.addr = net.JoinHostPort(ips[0].Unmap().String(), c.port)
	a.validUntil = time.Now().Add(addressTTL)
}

// invalidate makes host's address be looked up again, after its rest.
func (c *addressCache) invalidate(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.byHost[host]; a != nil && a.isDone() {
		a.validUntil = a.retryAt
	}
}

func (a *dnsLookup) isDone() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

// expired is called with the cache's lock held, which guards good once the
// lookup is done.
func (a *dnsLookup) expired() bool {
	return a.isDone() && time.Now().After(a.validUntil) && time.Now().After(a.retryAt)
}
