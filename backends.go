package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	addressTTL  = time.Second            // how long an address from DNS is believed
	lookupRest  = 200 * time.Millisecond // least time between two lookups of a name, whatever came of the first
	lookupTime  = 3 * time.Second        // bounds one lookup
	dialTime    = 2 * time.Second        // bounds one dial: a pod that is gone may answer nothing at all
	redialFirst = 50 * time.Millisecond
	redialMost  = time.Second
)

// backends knows how many backends there are and where each is. It is given at
// start; following the StatefulSet and its EndpointSlices would be another
// implementation of locate and a count that changes.
type backends struct {
	// Static after construction.
	statefulSet string // the part of a backend's name before its ordinal
	count       int
	dialer      net.Dialer
	locate      func(ctx context.Context, ordinal int) (addr string, err error)
	forget      func(ordinal int) // the address was no good
	close       func()            // returns when nothing that locate started runs any more
}

// name returns the name of the backend with this ordinal.
func (b *backends) name(ordinal int) string { return backendName(b.statefulSet, ordinal) }

func backendName(statefulSet string, ordinal int) string {
	return statefulSet + "-" + strconv.Itoa(ordinal)
}

// fixedBackends are at the given addresses, in the order of their ordinals.
func fixedBackends(statefulSet string, addrs []string) *backends {
	return &backends{
		statefulSet: statefulSet,
		count:       len(addrs),
		locate:      func(_ context.Context, ordinal int) (string, error) { return addrs[ordinal], nil },
		forget:      func(int) {},
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
		count:       count,
		locate:      func(ctx context.Context, ordinal int) (string, error) { return cache.get(ctx, cache.host(ordinal)) },
		forget:      func(ordinal int) { cache.forget(cache.host(ordinal)) },
		close:       cache.lookups.Wait,
	}
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
	return conn, nil
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

// hold dials the owner until it answers or ctx ends, and returns the connection
// with the ordinal that it leads to. It asks owner before each dial, since the
// table may change while a client waits. An error of owner ends it; else the
// error is the last one of dial.
func (b *backends) hold(ctx context.Context, owner func() (int, error)) (net.Conn, int, error) {
	var last error
	for wait := redialFirst; ; wait = min(2*wait, redialMost) {
		ordinal, err := owner()
		if err != nil {
			return nil, ordinal, err
		}
		conn, err := b.dial(ctx, ordinal)
		if err == nil {
			return conn, ordinal, nil
		}
		if last == nil || ctx.Err() == nil {
			last = err // not that of a dial cut short
		}
		select {
		case <-ctx.Done():
			return nil, ordinal, last
		case <-time.After(wait/2 + rand.N(wait)):
		}
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
