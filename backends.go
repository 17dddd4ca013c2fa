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

// dialTimeout bounds one dial. A pod that is gone may not answer at all.
const dialTimeout = 2 * time.Second

// ordinals are the ordinals of the backends that own namespaces: first, first+1 and so
// on, count in all.
type ordinals struct{ first, count int }

func (o ordinals) has(ordinal int) bool { return ordinal >= o.first && ordinal < o.first+o.count }

// String returns "4" for 0 to 3, and "2+4" for 2 to 5.
func (o ordinals) String() string {
	if o.first == 0 {
		return strconv.Itoa(o.count)
	}
	return strconv.Itoa(o.first) + "+" + strconv.Itoa(o.count)
}

// backends knows the address of each backend, and dials it. The addresses are from
// -backends, from DNS or from EndpointSlices.
type backends struct {
	// Static after construction.
	statefulSet string   // the part of a backend's name before its ordinal
	static      ordinals // from the flags; none if the router follows the StatefulSet
	dialer      net.Dialer
	queues      *dialQueues
	resolve     func(ctx context.Context, ordinal int) (addr string, err error)
	invalidate  func(ordinal int)        // called if a dial of the address failed
	podUID      func(ordinal int) string // uid of the pod at the address, "" if not known
	close       func()                   // waits until no goroutine of resolve runs
}

// name returns the name of the backend with this ordinal.
func (b *backends) name(ordinal int) string { return backendName(b.statefulSet, ordinal) }

func backendName(statefulSet string, ordinal int) string {
	return statefulSet + "-" + strconv.Itoa(ordinal)
}

// backendOrdinal returns the ordinal in the name of a backend. It takes only the one
// spelling that backendName makes: no sign, no leading zero.
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

// alwaysReady is the checkReady of backends whose readiness is not known.
func alwaysReady(int) error { return nil }

// unknownPodUID is the podUID of backends whose pods are not known.
func unknownPodUID(int) string { return "" }

// newStaticBackends returns backends at the given addresses, in the order of their
// ordinals.
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

// parseBackends parses -backends, a list of host:port.
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
func (b *backends) dial(ctx context.Context, ordinal int) (conn net.Conn, err error) {
	err = b.dialWith(ctx, ordinal, func(ctx context.Context, addr string) (err error) {
		conn, err = dialAddr(ctx, &b.dialer, addr)
		return err
	})
	return conn, err
}

// connector connects to an address, host:port, and keeps the connection. ctx bounds it.
type connector = func(ctx context.Context, addr string) error

// dialWith connects to the backend once, with connect. ctx and dialTimeout bound it.
func (b *backends) dialWith(ctx context.Context, ordinal int, connect connector) error {
	bound := ctx
	if end, ok := ctx.Deadline(); !ok || time.Until(end) > dialTimeout {
		var cancel context.CancelFunc
		bound, cancel = context.WithTimeout(ctx, dialTimeout)
		defer cancel()
	}
	addr, err := b.resolve(bound, ordinal)
	if err != nil {
		return err
	}
	if err = connect(bound, addr); err != nil && !isOver(ctx) { // a dial that ctx cut short proves nothing
		b.invalidate(ordinal)
	}
	return err
}

// dialInTurn is dialWith for w, which may dial (dialQueues.wait or tryDial). Then the
// next waiter may dial. It returns the uid of the pod, or "" if that is not known. If the
// dial fails it returns errRecheckOwner. If ctx ended before, it returns
// dialQueues.reason, not the error of the dial that ctx has cut short.
func (b *backends) dialInTurn(ctx context.Context, w *waiter, ordinal int, connect connector) (podUID string, err error) {
	// Before resolve: so a new pod may count as the old one, but never the other way.
	podUID = b.podUID(ordinal)
	err = b.dialWith(ctx, ordinal, connect)
	cut := isOver(ctx)
	b.queues.dialDone(ordinal, err, cut)
	switch {
	case err == nil:
		return podUID, nil
	case cut:
		return "", b.queues.reason(w, ordinal, err)
	}
	w.failure = err
	return "", errRecheckOwner
}

// isOver reports whether ctx has ended or its deadline has passed. A dial may see that
// the deadline has passed before ctx ends.
func isOver(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

// dialAddr connects to the address. The caller closes the connection.
func dialAddr(ctx context.Context, dialer *net.Dialer, addr string) (net.Conn, error) {
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if conn.LocalAddr().String() == conn.RemoteAddr().String() { // package net tries again twice, then returns it
		conn.Close()
		return nil, fmt.Errorf("dial tcp %s: %w", addr, errSelfConnect)
	}
	return conn, nil
}

// errSelfConnect says that the two ends of a connection are one socket: nobody listens
// at the address, and the kernel has chosen its port for the socket that dials (RFC 9293
// §3.5, simultaneous open). It would answer a client with its own request.
var errSelfConnect = errors.New("connected to itself: nothing listens there")

// setMisdirected notes that another backend has answered at the backend's address.
func (b *backends) setMisdirected(ordinal int, err error) {
	b.invalidate(ordinal)
	b.queues.setMisdirected(ordinal, err)
}

// probe returns the backend's address, and dials it once. err is nil if it accepted the
// connection.
func (b *backends) probe(ctx context.Context, ordinal int) (addr string, err error) {
	conn, err := b.dial(ctx, ordinal)
	if err == nil {
		conn.Close()
	}
	addr, _ = b.resolve(ctx, ordinal) // if it fails, so has dial
	return addr, err
}

// dialOwner waits until the owner is ready, and dials it. It returns a connection to the
// backend that owner returned last, and the uid of that backend's pod, or "" if that is
// not known. It asks owner again if the table was swapped or a dial failed. It returns an
// error of owner, and an error if ctx ends: what it waited for, or why the last dial
// failed. The caller closes the connection.
func (b *backends) dialOwner(ctx context.Context, owner func() (int, error)) (conn net.Conn, podUID string, err error) {
	w := b.queues.newWaiter()
	for {
		swaps := b.queues.swaps.Load()
		ordinal, err := owner()
		if err != nil {
			return nil, "", err
		}
		if err = b.queues.wait(ctx, w, ordinal, swaps); err == nil {
			podUID, err = b.dialInTurn(ctx, w, ordinal, func(ctx context.Context, addr string) (err error) {
				conn, err = dialAddr(ctx, &b.dialer, addr)
				return err
			})
		}
		if !errors.Is(err, errRecheckOwner) {
			return conn, podUID, err
		}
	}
}

const (
	maxDialsPerBackend = 64 // dials of one backend at once
	minRedialDelay     = 50 * time.Millisecond
	maxRedialDelay     = time.Second
)

// errRecheckOwner says that an upgrade has to ask again who its owner is: the table was
// swapped while it waited, or its dial failed.
var errRecheckOwner = errors.New("the owner may have changed")

// dialQueues makes upgrades wait until their backend is ready. Then they dial it in the
// order in which they came, at most maxDialsPerBackend at once. No upgrade polls: each is
// woken. While the dials of a backend fail, one upgrade at a time dials for all of them.
type dialQueues struct {
	// Static after construction.
	checkReady func(ordinal int) error // why a backend cannot be dialled now, or nil

	swaps             atomic.Int64 // how often the table was swapped
	misdirectedQueues atomic.Int64 // queues with misdirected

	// Guarded by mu.
	mu           sync.Mutex
	lastSequence int64              // of a waiter
	queues       map[int]*dialQueue // by ordinal
}

// dialQueue has the upgrades that wait for one backend. dialQueues.mu guards it.
type dialQueue struct {
	waiters     []*waiter // in the order of their sequence
	dialing     int       // dials under way
	failures    int       // failed dials in a row
	lastErr     error     // of the last failed dial, nil after a successful one
	retryAt     time.Time // until then no upgrade dials
	wasDown     bool      // it was not ready when that was last checked
	misdirected bool      // another backend answered at its address, and it has not since
}

// upgradeLimit bounds the pending upgrades: those that wait, dial, or are in the
// handshake. A backend's upgrades cannot take the places of the other backends' ones,
// whatever they wait for: half of the limit is divided evenly among the backends. The
// other half is a pool, of which a backend may take as many places as it leaves free. So
// there is room for the clients of the last backend that works, and for the many clients
// that wait for one that restarts. The zero value counts none.
type upgradeLimit struct {
	mu        sync.Mutex // guards all fields
	total     int
	byBackend map[int]int // places taken, by ordinal
	share     int         // places of each backend
	pooled    int         // places taken beyond the shares
	headBytes int         // of the heads that are kept
}

// acquire takes a place for an upgrade to a backend, one of so many. Each backend has at
// least one place, whatever the limit. It returns how many places are taken then, in all
// and by this backend. If ok is false, it took none. The caller calls release.
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

// transfer gives a place to another backend, which may then have more than its share: so
// clients that wait for a dead backend can go to a new owner.
func (p *upgradeLimit) transfer(from, to int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(from, -1)
	p.add(to, 1)
}

// add counts n more places as taken. The caller holds mu.
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

// inUse returns how many places are taken, in all and by the backend.
func (p *upgradeLimit) inUse(ordinal int) (all, own int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total, p.byBackend[ordinal]
}

// reserveHead counts n bytes more of heads that are kept, and reports whether so many are
// allowed with this limit of upgrades. If not, it counts none.
func (p *upgradeLimit) reserveHead(n, limit int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > 0 && p.headBytes+n > limit*headBytesPerUpgrade {
		return false
	}
	p.headBytes += n
	return true
}

// headBytesPerUpgrade is how many bytes the heads of the pending upgrades may have on
// average. One may have more if others have fewer.
const headBytesPerUpgrade = 2 << 10

// pendingUpgrade is an upgrade from its admission until it is a session or is answered.
// It goes with its client from the fast path to net/http. One goroutine at a time owns
// it.
type pendingUpgrade struct {
	limit     *upgradeLimit // counts it; nil after release
	namespace string
	owner     int    // the ordinal of the backend that owns the namespace
	table     string // the stamp of the table that says so
	headBytes int    // of its head, as limit counts them

	// Set when the owner was dialled.
	podUID       string    // of the owner's pod, "" if not known
	holdDeadline time.Time // until then it waits for its owner; zero if it has not waited
	dialErr      error     // why it has waited in vain; nil while that is open
	backendConn  net.Conn  // to the owner, which may have the request already; or nil
}

// setOwner makes the upgrade one to the owner that the table with this stamp names.
func (u *pendingUpgrade) setOwner(owner int, table string) {
	u.limit.transfer(u.owner, owner)
	u.owner, u.table = owner, table
}

// reserveHead counts n bytes of its head, in place of those that it counted before. It
// reports whether so many are allowed with this limit of upgrades.
func (u *pendingUpgrade) reserveHead(n, limit int) bool {
	ok := u.limit.reserveHead(n-u.headBytes, limit)
	if ok {
		u.headBytes = n
	}
	return ok
}

// release ends the count of the upgrade in its limit. More calls do nothing.
func (u *pendingUpgrade) release() {
	if u.limit == nil {
		return
	}
	u.reserveHead(0, 0)
	u.limit.release(u.owner)
	u.limit = nil
}

// close releases the upgrade, and closes the connection to its owner if it has one.
func (u *pendingUpgrade) close() {
	u.release()
	if u.backendConn != nil {
		u.backendConn.Close()
	}
}

// waiter is an upgrade in a dial queue.
type waiter struct {
	sequence int64  // its position among all waiters; it keeps that until it is connected
	woken    wakeup // what wait waits for; unused if onWake is another function
	onWake   func() // called when it may dial or has to recheck its owner; mu is held
	mayDial  bool   // guarded by dialQueues.mu
	failure  error  // of its last dial that was not cut short, or nil; not guarded
}

func newDialQueues(ready func(ordinal int) error) *dialQueues {
	return &dialQueues{checkReady: ready, queues: map[int]*dialQueue{}}
}

// newWaiter returns a waiter for wait.
func (h *dialQueues) newWaiter() *waiter {
	w := &waiter{woken: newWakeup()}
	w.onWake = w.woken.notify
	h.setSequence(w)
	return w
}

// setSequence gives w its position: behind all others.
func (h *dialQueues) setSequence(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastSequence++
	w.sequence = h.lastSequence
}

// wait returns nil when w may dial the backend. The caller then calls dialDone. wait
// returns errRecheckOwner if swaps is not the number of swaps any more, and what w waited
// for if ctx ends.
func (h *dialQueues) wait(ctx context.Context, w *waiter, ordinal int, swaps int64) error {
	if !h.enqueue(context.Background(), w, ordinal, swaps) {
		return errRecheckOwner
	}
	select {
	case <-w.woken:
	case <-ctx.Done():
	}
	return h.dequeue(ctx, w, ordinal)
}

// enqueue puts w, which is in no queue, into the backend's queue. w may then dial at
// once. It reports whether it did so: not if swaps is not the number of swaps any more,
// because the backend may not be the owner any more, and not if ctx has ended, because
// dequeue may have been called already.
func (h *dialQueues) enqueue(
	ctx context.Context, w *waiter, ordinal int, swaps int64,
) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	// After these checks, recheckOwners and dequeue find w in the queue.
	if h.swaps.Load() != swaps || ctx.Err() != nil {
		return false
	}
	q := h.queue(ordinal)
	at, _ := q.position(w)
	q.waiters = slices.Insert(q.waiters, at, w)
	h.startDials(ordinal, q)
	return true
}

// dequeue takes w, which was woken or whose ctx has ended, out of the backend's queue. It
// returns what wait returns.
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

// reason returns why w, whose ctx has ended, is not connected to the backend, or err if
// no reason is known.
func (h *dialQueues) reason(w *waiter, ordinal int, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why(w, ordinal, err)
}

// why returns why the backend cannot be dialled, or why the last dial of it failed, or
// why the last dial of w failed, or err. The caller holds mu.
func (h *dialQueues) why(w *waiter, ordinal int, err error) error {
	return cmp.Or(h.checkReady(ordinal), h.queue(ordinal).lastErr, w.failure, err)
}

// tryDial reports whether the caller may dial the backend now: the backend is ready, no
// upgrade waits for it, and its last dial did not fail. The caller then calls dialDone.
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

// dialDone notes the result of a dial. cut says that the context of the upgrade ended
// before the dial could succeed or fail.
func (h *dialQueues) dialDone(ordinal int, err error, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(ordinal)
	q.dialing--
	switch {
	case err == nil && q.misdirected: // the next upgrade waits for the answer, or for retryAt
		h.dialFailed(ordinal, q, q.lastErr)
	case err == nil:
		q.failures, q.lastErr = 0, nil
	case !cut:
		h.dialFailed(ordinal, q, err)
	}
	h.startDials(ordinal, q)
}

// dialFailed lets no upgrade dial the backend until retryAt. Of dials that fail together
// only the first counts. The caller holds mu.
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

// setMisdirected notes that another backend has answered at the backend's address. As
// after a failed dial, one upgrade at a time then dials, until clearMisdirected.
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

// clearMisdirected notes that the backend has answered.
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

// readinessChanged is called when the result of checkReady or the address of any backend
// may have changed. Upgrades may then dial at once. The failed dials of a backend that
// has become ready are forgotten.
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

// recheckOwners makes all waiters ask for their owner again. It is called after the table
// was swapped.
func (h *dialQueues) recheckOwners() {
	h.swaps.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, q := range h.queues {
		for _, w := range q.waiters {
			w.onWake()
		}
	}
}

// startDials lets the waiters dial that may do so now. The caller holds mu.
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
		w.onWake()
	}
	q.dialing += n
	q.waiters = slices.Delete(q.waiters, 0, n)
}

// queue returns the backend's queue. The caller holds mu.
func (h *dialQueues) queue(ordinal int) *dialQueue {
	q := h.queues[ordinal]
	if q == nil {
		q = &dialQueue{wasDown: h.checkReady(ordinal) != nil}
		h.queues[ordinal] = q
	}
	return q
}

// position returns the index of w in the queue, or else where it belongs.
func (q *dialQueue) position(w *waiter) (int, bool) {
	return slices.BinarySearchFunc(q.waiters, w.sequence, func(other *waiter, sequence int64) int {
		return cmp.Compare(other.sequence, sequence)
	})
}

const (
	addressTTL        = time.Second            // how long an address from DNS is used
	minLookupInterval = 200 * time.Millisecond // between two lookups of a name
	lookupTimeout     = 3 * time.Second        // of one lookup
)

// newDNSBackends returns backends that are the pods of a StatefulSet with a headless
// Service, which gives each pod the name <statefulSet>-<ordinal>.<service>
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

// addressCache keeps addresses from DNS for addressTTL. It keeps errors, and addresses
// that could not be dialled, for minLookupInterval. One lookup serves all upgrades that
// wait for its name.
type addressCache struct {
	// Static after construction.
	host   func(ordinal int) string
	port   string
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	byHost  map[string]*dnsLookup // guarded by mu
	lookups sync.WaitGroup        // those under way
}

// dnsLookup is one lookup, under way or done.
type dnsLookup struct {
	done chan struct{} // closed by resolve when it has set the fields below

	addr       string
	err        error
	retryAt    time.Time // until then the name is not looked up again
	validUntil time.Time // until then addr is used; guarded by addressCache.mu
}

// get returns the host's address with the port: from the cache, from the lookup under
// way, or from a new one. ctx bounds the wait.
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
		return a.addr, a.err // even if ctx has ended
	}
	select {
	case <-a.done:
		return a.addr, a.err
	case <-ctx.Done():
		return "", fmt.Errorf("look up %s: %w", host, ctx.Err())
	}
}

// resolve looks the host up and sets a's fields. lookupTimeout bounds it, and not the
// context of the upgrade that came first, because others wait for it too.
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

// invalidate makes get look the host up again after retryAt.
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

// expired reports whether the name has to be looked up again. The caller holds
// addressCache.mu.
func (a *dnsLookup) expired() bool {
	return a.isDone() && time.Now().After(a.validUntil) && time.Now().After(a.retryAt)
}
