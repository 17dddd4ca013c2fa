package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

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
