package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

// dialTimeout bounds one dial: a pod that is gone perhaps never answers.
const dialTimeout = 2 * time.Second

// Headers that tell the backend who routed the request, by which table, by which step of a
// hand-off, and to which backend. On one router, and with -handoff=all on all routers, a step
// only rises: of two requests for a namespace with different owners, the newer owner has the
// higher one. They are never taken from a client. A backend answers 421 Misdirected Request
// (RFC 9110 §15.5.20) if headerBackend does not name it: the router had an old address.
const (
	headerPod     = "X-Router-Pod"
	headerTable   = "X-Router-Table"
	headerStep    = "X-Router-Step"
	headerBackend = "X-Router-Backend"
)

// maxReplicas is how many backends a table may have, unless -backends lists more. Each takes some bytes
// of every table: a number of replicas with some digits too many would take the router's memory.
const maxReplicas = 10_000

// ordinalRange has the ordinals of the backends that may own namespaces: first, first+1 and
// so on, count in all. Cordoned ones are among them: these own what overrides give them.
type ordinalRange struct{ first, count int }

func (o ordinalRange) has(ordinal int) bool { return ordinal >= o.first && ordinal < o.first+o.count }

// String returns "4" for 0 to 3, and "2+4" for 2 to 5.
func (o ordinalRange) String() string {
	if o.first == 0 {
		return strconv.Itoa(o.count)
	}
	return strconv.Itoa(o.first) + "+" + strconv.Itoa(o.count)
}

// backends knows the address of each backend, and dials it. The addresses are from
// -backends, from DNS or from EndpointSlices.
type backends struct {
	// Static after construction.
	statefulSet string       // the part of a backend's name before its ordinal
	fromFlags   ordinalRange // from the flags; none if the router follows the StatefulSet
	dialer      net.Dialer
	queues      *dialQueues
	// resolve returns where to dial the backend, as host:port, or why that is not known. ctx
	// bounds it. Any goroutine may call it.
	resolve    func(ctx context.Context, ordinal int) (addr string, err error)
	invalidate func(ordinal int)                                    // called if a dial of the address failed
	podUID     func(ordinal int) string                             // uid of the pod at the address, "" if not known
	podIsGone  func(ctx context.Context, ordinal int) (bool, error) // see endpointWatcher.podIsGone
	close      func()                                               // waits until no goroutine of resolve runs
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
	n, isNumber := parseDecimal(digits, 31)
	if !ok || !isNumber || len(digits) > 9 {
		return 0, false
	}
	return int(n), true
}

// newFlagBackends returns the backends that flags name, count of them: neither their readiness
// nor their pods are known. The caller sets resolve.
func newFlagBackends(statefulSet string, count int) *backends {
	return &backends{
		statefulSet: statefulSet,
		fromFlags:   ordinalRange{count: count},
		queues:      newDialQueues(func(int) error { return nil }),
		invalidate:  func(int) {},
		podUID:      func(int) string { return "" },
		podIsGone:   func(context.Context, int) (bool, error) { return false, nil },
		close:       func() {},
	}
}

// newStaticBackends returns backends at the given addresses, in the order of their
// ordinals.
func newStaticBackends(statefulSet string, addrs []string) *backends {
	b := newFlagBackends(statefulSet, len(addrs))
	b.resolve = func(_ context.Context, ordinal int) (string, error) { return addrs[ordinal], nil }
	return b
}

// parseBackends parses -backends, a list of host:port.
func parseBackends(list string) ([]string, error) {
	addrs := splitList(list)
	for i, addr := range addrs {
		host, port, err := net.SplitHostPort(addr)
		if n, perr := strconv.Atoi(port); err != nil || host == "" || perr != nil || n < 1 || n > 65535 {
			return nil, fmt.Errorf("backend %d must be host:port (got %q)", i, addr)
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
// dial fails it returns errRecheckOwner. If ctx ended during the dial, it returns why the
// client was waiting (dialQueues.reason), not the dial's error.
func (b *backends) dialInTurn(ctx context.Context, w *waiter, ordinal int, connect connector) (podUID string, err error) {
	// Before resolve: so a new pod may count as the old one, but never the other way.
	podUID = b.podUID(ordinal)
	err = b.dialWith(ctx, ordinal, connect)
	ctxEnded := isOver(ctx)
	b.queues.dialDone(ordinal, err, ctxEnded)
	switch {
	case err == nil:
		return podUID, nil
	case ctxEnded:
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

// dialWhenReady waits until the owner of the namespace is ready, and dials it. It returns a
// connection to the backend whose queue recheck returned last, and the uid of that
// backend's pod, or "" if that is not known. It calls recheck at first, and when the
// owner has changed or a dial has failed. It returns an error of recheck, and an error if
// ctx ends: what it waited for, or why the last dial failed. The caller closes the
// connection.
func (b *backends) dialWhenReady(
	ctx context.Context, namespace string, recheck func() (ordinal int, err error), find queueFinder,
) (conn net.Conn, podUID string, err error) {
	w := b.queues.newWaiter(namespace)
	for {
		ordinal, err := recheck()
		if err != nil {
			return nil, "", err
		}
		if err = b.queues.wait(ctx, w, ordinal, find); err == nil {
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
		all:    map[int]*dnsLookup{},
	}
	b := newFlagBackends(statefulSet, count)
	b.resolve, b.invalidate, b.close = cache.get, cache.invalidate, cache.lookups.Wait
	return b
}

// addressCache keeps addresses from DNS for addressTTL. It keeps errors, and addresses
// that could not be dialled, for minLookupInterval. One lookup serves all requests that
// wait for its name.
type addressCache struct {
	// Static after construction.
	host   func(ordinal int) string
	port   string
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	all     map[int]*dnsLookup // the last one of each backend, by ordinal; guarded by mu
	lookups sync.WaitGroup     // those under way
}

// dnsLookup is one lookup, under way or done.
type dnsLookup struct {
	done chan struct{} // closed by resolve when it has set the fields below

	addr       string
	err        error
	retryAt    time.Time // until then the name is not looked up again
	validUntil time.Time // until then addr is used; guarded by addressCache.mu
}

// get returns the backend's address with the port: from the cache, from the lookup under
// way, or from a new one. ctx bounds the wait.
func (c *addressCache) get(ctx context.Context, ordinal int) (string, error) {
	host := c.host(ordinal)
	c.mu.Lock()
	a := c.all[ordinal]
	if a == nil || a.expired() {
		a = &dnsLookup{done: make(chan struct{})}
		c.all[ordinal] = a
		c.lookups.Go(func() { c.resolve(a, host) })
	}
	c.mu.Unlock()
	if isClosed(a.done) {
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
// context of the request that came first, because others wait for it too.
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

// invalidate makes get look the backend up again after retryAt.
func (c *addressCache) invalidate(ordinal int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.all[ordinal]; a != nil && isClosed(a.done) {
		a.validUntil = a.retryAt
	}
}

// expired reports whether the name has to be looked up again. The caller holds
// addressCache.mu.
func (a *dnsLookup) expired() bool {
	return isClosed(a.done) && time.Now().After(a.validUntil) && time.Now().After(a.retryAt)
}
