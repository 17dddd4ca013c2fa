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

// dialTime bounds one dial: a pod that is gone may answer nothing at all.
const dialTime = 2 * time.Second

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
	given       ordinals // what the flags say; none if the StatefulSet is followed
	dialer      net.Dialer
	holds       *holds
	locate      func(ctx context.Context, ordinal int) (addr string, err error)
	forget      func(ordinal int)        // the address was no good
	pod         func(ordinal int) string // uid of the pod that locate finds, "" if not known
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

// always lets every backend be dialled: there is nothing that says more than the
// dial.
func always(int) error { return nil }

// unknownPod is for backends of which no pods are known.
func unknownPod(int) string { return "" }

// fixedBackends are at the given addresses, in the order of their ordinals.
func fixedBackends(statefulSet string, addrs []string) *backends {
	return &backends{
		statefulSet: statefulSet,
		given:       ordinals{count: len(addrs)},
		holds:       newHolds(always),
		locate:      func(_ context.Context, ordinal int) (string, error) { return addrs[ordinal], nil },
		forget:      func(int) {},
		pod:         unknownPod,
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
			return nil, fmt.Errorf("backend %d is %q, want host:port", i, addrs[i])
		}
	}
	return addrs, nil
}

// dial connects to the backend once. The caller closes the connection.
func (b *backends) dial(ctx context.Context, ordinal int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	addr, err := b.locate(ctx, ordinal)
	if err != nil {
		return nil, err
	}
	conn, err := b.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		b.forget(ordinal)
		return nil, err
	}
	if conn.LocalAddr().String() == conn.RemoteAddr().String() { // package net tries twice more, and then returns it
		conn.Close()
		b.forget(ordinal)
		return nil, fmt.Errorf("dial tcp %s: %w", addr, errToItself)
	}
	return conn, nil
}

// errToItself says that a connection's two ends are one socket: nobody listens at
// the address, and the system has chosen its port for the end that dials (RFC 9293
// §3.5, simultaneous open). It would answer a client with its own request.
var errToItself = errors.New("connected to itself, as nobody listens there")

// atOnce returns the address of a backend that may be dialled now, if nobody has
// to wait for that. The caller calls dialled.
func (b *backends) atOnce(ordinal int) (addr netip.AddrPort, ok bool) {
	if !b.holds.try(ordinal) {
		return addr, false
	}
	now, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	text, err := b.locate(now, ordinal)
	if err == nil {
		addr, err = netip.ParseAddrPort(text) // not of a host's name, which has to be looked up
	}
	if err != nil || addr.Addr().Zone() != "" { // nor of a link's, which has
		b.holds.done(ordinal, err, true)
		return addr, false
	}
	return addr, true
}

// dialled takes note of how the dial of an address from atOnce went; cut says that
// its upgrade ended before it could.
func (b *backends) dialled(ordinal int, err error, cut bool) {
	if err != nil && !cut {
		b.forget(ordinal)
	}
	b.holds.done(ordinal, err, cut)
}

// misdirected takes note that what answered at the backend's address is another.
func (b *backends) misdirected(ordinal int, err error) {
	b.forget(ordinal)
	b.holds.misdirected(ordinal, err)
}

// probe returns the backend's address, and whether it takes a connection now.
func (b *backends) probe(ctx context.Context, ordinal int) (addr string, err error) {
	conn, err := b.dial(ctx, ordinal)
	if err == nil {
		conn.Close()
	}
	addr, _ = b.locate(ctx, ordinal) // "" where dial has said why
	return addr, err
}

// hold waits until the owner is ready, dials it, and returns the connection to the one
// that owner named last, and the uid of its pod, if that is known. It dials again for as long as the owner is called
// ready, and asks owner again when the table was swapped. An error of owner ends
// it, as does ctx: then the error says what there was to wait for, or how the last
// dial failed.
func (b *backends) hold(ctx context.Context, owner func() (int, error)) (net.Conn, string, error) {
	w := b.holds.enter()
	for {
		swaps := b.holds.swaps.Load()
		ordinal, err := owner()
		if err != nil {
			return nil, "", err
		}
		var conn net.Conn
		var pod string
		if err = b.holds.wait(ctx, w, ordinal, swaps); err == nil {
			conn, pod, err = b.dialInTurn(ctx, w, ordinal)
		}
		if !errors.Is(err, errAskAgain) {
			return conn, pod, err
		}
	}
}

// dialInTurn dials the backend for w, which has its turn, and returns the connection and
// the uid of the pod, if that is known. If the dial fails it returns errAskAgain, or,
// when ctx has ended, what holds.reason says: not the error of a dial that ctx cut short.
func (b *backends) dialInTurn(ctx context.Context, w *waiter, ordinal int) (net.Conn, string, error) {
	pod := b.pod(ordinal) // before the address: a pod that is new by then is taken for the old one, never the other way
	conn, err := b.dial(ctx, ordinal)
	cut := isOver(ctx)
	b.holds.done(ordinal, err, cut)
	switch {
	case err == nil:
		return conn, pod, nil
	case cut:
		return nil, "", b.holds.reason(w, ordinal, err)
	}
	w.failure = err
	return nil, "", errAskAgain
}

// isOver reports whether ctx has ended, or its deadline has passed: a dial may see that
// before ctx does.
func isOver(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

const (
	dialsMost   = 64 // dials of one backend at once
	redialFirst = 50 * time.Millisecond
	redialMost  = time.Second
)

// errAskAgain says that the table was swapped while an upgrade waited.
var errAskAgain = errors.New("the owner may be another")

// holds makes upgrades wait until their backend is ready, and then lets them
// dial in the order in which they came, at most dialsMost at once. None of them
// polls: what they wait for wakes them. While dials fail, one upgrade at a time
// dials for all of its backend's.
type holds struct {
	// Static after construction.
	ready func(ordinal int) error // why a backend must not be dialled, or nil

	swaps  atomic.Int64 // of the table
	astray atomic.Int64 // lines whose astray is set

	// Guarded by mu.
	mu      sync.Mutex
	tickets int64
	lines   map[int]*line // by ordinal
}

// line is the upgrades of one backend. It is guarded by the holds' mu.
type line struct {
	waiting []*waiter // by ticket
	dialing int
	fails   int       // dials in a row
	failure error     // of the last dial that failed, nil since a good one
	rest    time.Time // until then nobody dials
	away    bool      // it was not ready at the last look
	astray  bool      // another backend answered at its address, and it has not since
}

// places are those of the upgrades under way: held, dialled or in the handshake. One
// backend cannot take those of the others, whatever it is that its upgrades wait for:
// half of the limit is divided evenly among the backends, and of the other half, the
// pool, a backend may have as much as it leaves free. So there is room for the clients
// of the last one that works, and for a crowd that waits for one that restarts. The
// zero value has none taken.
type places struct {
	mu     sync.Mutex // guards the rest
	all    int
	of     map[int]int // those taken, by ordinal
	own    int         // of each backend
	pooled int         // those taken beyond own
}

// take takes a place of the limit's for an upgrade to one of so many backends, and
// returns what taken does then. The caller calls leave. Each backend has at least one
// place, whatever the limit.
func (p *places) take(ordinal, backends, limit int) (all, own int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if share := max(1, limit/2/backends); share != p.own {
		p.own, p.pooled = share, 0
		for _, taken := range p.of {
			p.pooled += max(0, taken-share)
		}
	}
	free := limit - p.own*backends - p.pooled
	if taken := p.of[ordinal]; taken >= p.own && taken-p.own >= free {
		return p.all, taken, false
	}
	p.add(ordinal, 1)
	return p.all, p.of[ordinal], true
}

// leave gives a place back.
func (p *places) leave(ordinal int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(ordinal, -1)
}

// move makes a place that of an upgrade to another backend, which may then have more
// than its share: that is how those who wait get away from a backend that is dead.
func (p *places) move(from, to int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(from, -1)
	p.add(to, 1)
}

// add counts n places more. mu is held.
func (p *places) add(ordinal, n int) {
	if p.of == nil {
		p.of = map[int]int{}
	}
	before := p.of[ordinal]
	p.pooled += max(0, before+n-p.own) - max(0, before-p.own)
	p.all += n
	if p.of[ordinal] = before + n; before+n == 0 {
		delete(p.of, ordinal)
	}
}

// taken is how many places are, and how many of these are the backend's.
func (p *places) taken(ordinal int) (all, own int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all, p.of[ordinal]
}

// waiter is one upgrade that waits for its turn.
type waiter struct {
	ticket int64         // its place among all: it keeps that until it has a connection; one that turns out to be of no use is asked for anew
	wake   chan struct{} // capacity 1, never closed: it has its turn, or must ask for its owner again
	call   func()        // if not nil it is called in place of wake; mu is held: it must not block
	turn   bool          // guarded by the holds' mu

	failure error // of its last dial that was not cut short, or nil; owned by who waits
}

func newHolds(ready func(ordinal int) error) *holds {
	return &holds{ready: ready, lines: map[int]*line{}}
}

// enter gives the next ticket.
func (h *holds) enter() *waiter {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tickets++
	return &waiter{ticket: h.tickets, wake: make(chan struct{}, 1)}
}

// wait returns nil when w may dial the backend: the caller then calls done. Else
// it returns errAskAgain if the table is not that of swaps any more, or, when ctx
// has ended, what w waited for.
func (h *holds) wait(ctx context.Context, w *waiter, ordinal int, swaps int64) error {
	if !h.join(w, ordinal, swaps) {
		return errAskAgain
	}
	select {
	case <-w.wake:
	case <-ctx.Done():
	}
	return h.leave(ctx, w, ordinal)
}

// join puts w, which is in no line, into the backend's, which may give it its turn at
// once. It reports whether it did: not if the table is not that of swaps any more, as
// the backend may own the namespace no more.
func (h *holds) join(w *waiter, ordinal int, swaps int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.swaps.Load() != swaps { // after this look, askAgain finds w in the line
		return false
	}
	l := h.line(ordinal)
	at, _ := l.place(w)
	l.waiting = slices.Insert(l.waiting, at, w)
	h.release(ordinal, l)
	return true
}

// leave takes w, which was roused or has waited enough, out of the backend's line, and
// returns what wait does.
func (h *holds) leave(ctx context.Context, w *waiter, ordinal int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.turn {
		w.turn = false
		return nil
	}
	l := h.line(ordinal)
	if at, ok := l.place(w); ok {
		l.waiting = slices.Delete(l.waiting, at, at+1)
	}
	if ctx.Err() == nil {
		return errAskAgain
	}
	return h.why(w, ordinal, ctx.Err())
}

// reason says why w, whose time is over, has no connection to the backend; err if
// nothing else is known.
func (h *holds) reason(w *waiter, ordinal int, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why(w, ordinal, err)
}

// why is what keeps the backend from being dialled, or else how the last dial of it
// failed, or else the last of w's own; err if there is none of these. mu is held.
func (h *holds) why(w *waiter, ordinal int, err error) error {
	return cmp.Or(h.ready(ordinal), h.line(ordinal).failure, w.failure, err)
}

// try reports whether the caller may dial the backend now, as nobody waits for it
// and no dial has failed: the caller then calls done.
func (h *holds) try(ordinal int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if len(l.waiting) > 0 || l.fails > 0 || l.dialing >= dialsMost || h.ready(ordinal) != nil {
		return false
	}
	l.dialing++
	return true
}

// done takes note of how a dial went; cut says that its upgrade ended before it
// could.
func (h *holds) done(ordinal int, err error, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	l.dialing--
	switch {
	case err == nil && l.astray: // the next waits for the answer, or long enough
		h.failed(ordinal, l, l.failure)
	case err == nil:
		l.fails, l.failure = 0, nil
	case !cut:
		h.failed(ordinal, l, err)
	}
	h.release(ordinal, l)
}

// failed makes the line rest, longer each time. Of those that fail together, the
// first counts. mu is held.
func (h *holds) failed(ordinal int, l *line, err error) {
	if time.Now().Before(l.rest) {
		return
	}
	wait := min(redialMost, redialFirst<<min(l.fails, 10))
	wait = wait/2 + rand.N(wait)
	l.fails, l.failure, l.rest = l.fails+1, err, time.Now().Add(wait)
	time.AfterFunc(wait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.release(ordinal, l)
	})
}

// misdirected takes note that the backend's address is another backend's. As with
// dials that fail, one upgrade at a time then asks for all, until meant.
func (h *holds) misdirected(ordinal int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if !l.astray {
		l.astray = true
		h.astray.Add(1)
	}
	h.failed(ordinal, l, err)
}

// meant takes note that the backend has answered.
func (h *holds) meant(ordinal int) {
	if h.astray.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if !l.astray {
		return
	}
	h.astray.Add(-1)
	l.astray, l.fails, l.failure, l.rest = false, 0, nil, time.Time{}
	h.release(ordinal, l)
}

// look is called after ready has changed its mind about any backend, or addresses
// may have changed: all are tried at once, and one that is back as if nothing had
// been before.
func (h *holds) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ordinal, l := range h.lines {
		away := h.ready(ordinal) != nil
		if l.away && !away {
			l.fails = 0
		}
		l.away, l.rest = away, time.Time{}
		h.release(ordinal, l)
	}
}

// askAgain makes all that wait ask for their owner again. It is called after the
// table was swapped.
func (h *holds) askAgain() {
	h.swaps.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lines {
		for _, w := range l.waiting {
			w.rouse()
		}
	}
}

// release gives their turn to those that may dial now. mu is held.
func (h *holds) release(ordinal int, l *line) {
	if len(l.waiting) == 0 || h.ready(ordinal) != nil || time.Now().Before(l.rest) {
		return
	}
	most := dialsMost
	if l.fails > 0 {
		most = 1
	}
	n := max(0, min(len(l.waiting), most-l.dialing))
	for _, w := range l.waiting[:n] {
		w.turn = true
		w.rouse()
	}
	l.dialing += n
	l.waiting = slices.Delete(l.waiting, 0, n)
}

// line returns the backend's. mu is held.
func (h *holds) line(ordinal int) *line {
	l := h.lines[ordinal]
	if l == nil {
		l = &line{away: h.ready(ordinal) != nil}
		h.lines[ordinal] = l
	}
	return l
}

// place returns where w is in the line, or belongs.
func (l *line) place(w *waiter) (int, bool) {
	return slices.BinarySearchFunc(l.waiting, w.ticket, func(other *waiter, ticket int64) int {
		return cmp.Compare(other.ticket, ticket)
	})
}

func (w *waiter) rouse() {
	if w.call != nil {
		w.call()
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

const (
	addressTTL = time.Second            // how long an address from DNS is believed
	lookupRest = 200 * time.Millisecond // least time between two lookups of a name, whatever came of the first
	lookupTime = 3 * time.Second        // bounds one lookup
)

// dnsBackends are the pods of a StatefulSet with a headless Service, which
// gives each the name <statefulSet>-<ordinal>.<service>
// (https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#stable-network-id).
func dnsBackends(count int, statefulSet, service string, port int) *backends {
	cache := &addressCache{
		host:   func(ordinal int) string { return backendName(statefulSet, ordinal) + "." + service },
		port:   strconv.Itoa(port),
		lookup: net.DefaultResolver.LookupNetIP,
		byHost: map[string]*address{},
	}
	return &backends{
		statefulSet: statefulSet,
		given:       ordinals{count: count},
		holds:       newHolds(always),
		locate:      func(ctx context.Context, ordinal int) (string, error) { return cache.get(ctx, cache.host(ordinal)) },
		forget:      func(ordinal int) { cache.forget(cache.host(ordinal)) },
		pod:         unknownPod,
		close:       cache.lookups.Wait,
	}
}

// addressCache keeps addresses from DNS for addressTTL, failures and addresses
// that were no good for lookupRest. However many wait for a name, it is looked
// up once.
type addressCache struct {
	// Static after construction.
	host   func(ordinal int) string
	port   string
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	byHost  map[string]*address // guarded by mu
	lookups sync.WaitGroup      // under way
}

// address is one lookup, under way or done.
type address struct {
	done chan struct{} // closed by resolve when the fields below are set
	addr string
	err  error
	rest time.Time // until then it is not looked up again
	good time.Time // until then it is believed
}

// get returns host's address with the port, from the cache, from the lookup
// under way, or from a new one.
func (c *addressCache) get(ctx context.Context, host string) (string, error) {
	c.mu.Lock()
	a := c.byHost[host]
	if a == nil || a.expired() {
		a = &address{done: make(chan struct{})}
		c.byHost[host] = a
		c.lookups.Go(func() { c.resolve(a, host) })
	}
	c.mu.Unlock()
	if a.finished() {
		return a.addr, a.err // also when ctx has ended
	}
	select {
	case <-a.done:
		return a.addr, a.err
	case <-ctx.Done():
		return "", fmt.Errorf("look up %s: %w", host, ctx.Err())
	}
}

// resolve fills a. It is bound by lookupTime and not by the one who asked
// first: others wait for it too.
func (c *addressCache) resolve(a *address, host string) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTime)
	defer cancel()
	defer close(a.done)
	ips, err := c.lookup(ctx, "ip", host)
	a.rest = time.Now().Add(lookupRest)
	if err == nil && len(ips) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		a.err = fmt.Errorf("look up %s: %w", host, err)
		return
	}
	a.addr = net.JoinHostPort(ips[0].Unmap().String(), c.port)
	a.good = time.Now().Add(addressTTL)
}

// forget makes host's address be looked up again, after its rest.
func (c *addressCache) forget(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.byHost[host]; a != nil && a.finished() {
		a.good = a.rest
	}
}

func (a *address) finished() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

// expired is called with the cache's lock held, which guards good once the
// lookup is done.
func (a *address) expired() bool {
	return a.finished() && time.Now().After(a.good) && time.Now().After(a.rest)
}
