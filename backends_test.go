package main

import (
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseBackends(t *testing.T) {
	tests := map[string]struct {
		list string
		want string // joined by |, or the error
	}{
		"two":       {"127.0.0.1:9000, backend-1.headless:9000", "127.0.0.1:9000|backend-1.headless:9000"},
		"IPv6":      {"[::1]:9000", "[::1]:9000"},
		"no port":   {"127.0.0.1", `backend 0 must be host:port (got "127.0.0.1")`},
		"no host":   {"127.0.0.1:1,:9000", `backend 1 must be host:port (got ":9000")`},
		"bad port":  {"a:http", `backend 0 must be host:port (got "a:http")`},
		"high port": {"a:65536", `backend 0 must be host:port (got "a:65536")`},
		"empty":     {"a:1,", `backend 1 must be host:port (got "")`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			addrs, err := parseBackends(tt.list)
			got := strings.Join(addrs, "|")
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("parseBackends(%q) = %s, want %s", tt.list, got, tt.want)
			}
		})
	}
}

// resolver is a lookup that a test holds back and counts.
type resolver struct {
	asked atomic.Int64
	delay time.Duration
	err   error
}

func (r *resolver) lookup(ctx context.Context, _, host string) ([]netip.Addr, error) {
	n := r.asked.Add(1)
	select {
	case <-time.After(r.delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if r.err != nil {
		return nil, r.err
	}
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})}, nil
}

func TestAddressCache(t *testing.T) {
	newCache := func(r *resolver) *addressCache {
		host := func(ordinal int) string { return backendName("backend", ordinal) + ".headless" }
		return &addressCache{host: host, port: "9000", lookup: r.lookup, all: map[int]*dnsLookup{}}
	}
	get := func(t *testing.T, c *addressCache, want string) {
		t.Helper()
		if got, err := c.get(t.Context(), 2); got != want || err != nil {
			t.Errorf("get = %q, %v; want %q", got, err, want)
		}
	}
	tests := map[string]func(t *testing.T){
		"one lookup for many waiters": func(t *testing.T) {
			r := &resolver{delay: 100 * time.Millisecond}
			c := newCache(r)
			var all sync.WaitGroup
			for range 1000 {
				all.Go(func() { get(t, c, "10.0.0.1:9000") })
			}
			all.Wait()
			if n := r.asked.Load(); n != 1 {
				t.Errorf("%d lookups, want 1", n)
			}
		},
		"kept for a second": func(t *testing.T) {
			r := &resolver{}
			c := newCache(r)
			get(t, c, "10.0.0.1:9000")
			time.Sleep(addressTTL - time.Millisecond)
			get(t, c, "10.0.0.1:9000")
			time.Sleep(2 * time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"dropped when it was no good": func(t *testing.T) {
			c := newCache(&resolver{})
			get(t, c, "10.0.0.1:9000")
			c.invalidate(2)
			get(t, c, "10.0.0.1:9000")
			time.Sleep(minLookupInterval + time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"a failure is kept for a moment": func(t *testing.T) {
			r := &resolver{err: errors.New("no such host")}
			c := newCache(r)
			if _, err := c.get(t.Context(), 2); err == nil || err.Error() != "look up backend-2.headless: no such host" {
				t.Errorf("error %v", err)
			}
			r.err = nil
			time.Sleep(minLookupInterval - time.Millisecond)
			if _, err := c.get(t.Context(), 2); err == nil {
				t.Error("looked up again too soon")
			}
			time.Sleep(2 * time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"who leaves does not end the lookup": func(t *testing.T) {
			r := &resolver{delay: time.Second}
			c := newCache(r)
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if _, err := c.get(ctx, 2); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want deadline exceeded", err)
			}
			get(t, c, "10.0.0.1:9000")
		},
		"a lookup is bounded": func(t *testing.T) {
			c := newCache(&resolver{delay: time.Hour})
			begun := time.Now()
			if _, err := c.get(t.Context(), 2); err == nil || time.Since(begun) != lookupTimeout {
				t.Errorf("error %v after %s, want one after %s", err, time.Since(begun), lookupTimeout)
			}
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { bubble(t, test) })
	}
}

// queueTest is one backend whose readiness and dials a test decides on.
type queueTest struct {
	*dialQueues
	down  atomic.Bool  // not ready
	asked atomic.Int64 // whether it is ready
	fails atomic.Bool  // dials fail
	stray atomic.Bool  // another backend answers
	take  atomic.Int64 // how long a dial takes

	mu    sync.Mutex
	began []int // which upgrades dialled, in order
	now   int   // dials under way
	most  int   // of now
}

var errNotYet = errors.New("it is not ready")

func newQueueTest() *queueTest {
	b := &queueTest{}
	b.dialQueues = newDialQueues(func(int) error {
		b.asked.Add(1)
		if b.down.Load() {
			return errNotYet
		}
		return nil
	})
	return b
}

func (b *queueTest) set(down bool) {
	b.down.Store(down)
	b.readinessChanged()
}

// upgrade waits and dials until it is through, as backends.dialWhenReady does.
func (b *queueTest) upgrade(ctx context.Context, i int) error {
	w := b.newWaiter("ns")
	for {
		if err := b.wait(ctx, w, 0, always0); errors.Is(err, errRecheckOwner) {
			continue
		} else if err != nil {
			return err
		}
		b.mu.Lock()
		b.began = append(b.began, i)
		b.now++
		b.most = max(b.most, b.now)
		b.mu.Unlock()
		select {
		case <-time.After(time.Duration(b.take.Load())):
		case <-ctx.Done():
		}
		err := ctx.Err()
		if err == nil && b.fails.Load() {
			err = errors.New("connection refused")
		}
		b.mu.Lock()
		b.now--
		b.mu.Unlock()
		b.dialDone(0, err, ctx.Err() != nil)
		switch {
		case err == nil && b.stray.Load():
			b.setMisdirected(0, errors.New("421"))
			w = b.newWaiter("ns")
		case err == nil:
			b.clearMisdirected(0)
			return nil
		case ctx.Err() != nil:
			return err
		}
	}
}

// always0 is a queueFinder that knows one queue.
func always0(string) int { return 0 }

// waitersOf returns who waits for a backend.
func (d *dialQueues) waitersOf(ordinal int) []*waiter {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.queue(ordinal).waiters)
}

// dials returns which upgrades dialled, in order, and how many at once.
func (b *queueTest) dials() (began []int, limit int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.began), b.most
}

// wantInOrder checks that upgrades dialled as they came, but for those that dial
// at once.
func (b *queueTest) wantInOrder(t *testing.T) {
	t.Helper()
	began, limit := b.dials()
	for i, upgrade := range began {
		if upgrade/maxDialsPerBackend != i/maxDialsPerBackend || limit != maxDialsPerBackend {
			t.Fatalf("upgrade %d was the %d-th to dial, %d did at once", upgrade, i, limit)
		}
	}
}

// queue starts upgrades one after the other, and returns what waits for them.
func (b *queueTest) queue(t *testing.T, count int) *sync.WaitGroup {
	all := &sync.WaitGroup{}
	for i := range count {
		all.Go(func() {
			if err := b.upgrade(context.Background(), i); err != nil {
				t.Errorf("upgrade %d: %v", i, err)
			}
		})
		synctest.Wait()
	}
	return all
}

func TestDialQueues(t *testing.T) {
	tests := map[string]func(t *testing.T, b *queueTest){
		"first come, first served": func(t *testing.T, b *queueTest) {
			b.take.Store(int64(10 * time.Millisecond))
			b.set(true)
			all := b.queue(t, 200)
			asked := b.asked.Load()
			time.Sleep(time.Hour)
			began, _ := b.dials()
			if n := b.asked.Load(); n != asked || len(began) > 0 {
				t.Errorf("%d looks and %d dials in an hour, want none", n-asked, len(began))
			}
			begun := time.Now()
			b.set(false)
			all.Wait()
			if took := time.Since(begun); took != 40*time.Millisecond {
				t.Errorf("all were through in %v, want four times 10ms", took)
			}
			b.wantInOrder(t)
		},
		"at once after a dial that was connected later than one failed": func(t *testing.T, b *queueTest) {
			for range maxDialsPerBackend {
				if !b.tryDial(0) {
					t.Fatal("a backend without waiters cannot be dialled")
				}
			}
			all := b.queue(t, 1)
			began := time.Now()
			b.dialDone(0, errors.New("connection refused"), false)
			for range maxDialsPerBackend - 1 {
				b.dialDone(0, nil, false)
			}
			all.Wait()
			wantEqual(t, "how long the waiter waited", time.Since(began), 0)
		},
		"strictly one after the other": func(t *testing.T, b *queueTest) {
			b.fails.Store(true)
			all := b.queue(t, 20)
			time.Sleep(10 * time.Second)
			began, limit := b.dials()
			if slices.Max(began) != 0 || limit != 1 {
				t.Errorf("%v dialled, %d at once, while dials failed: want the first alone", began, limit)
			}
			if n := len(began); n < 8 || n > 24 {
				t.Errorf("%d dials in 10 s, want one each second or so", n)
			}
			b.fails.Store(false)
			all.Wait()
		},
		"another backend answers": func(t *testing.T, b *queueTest) {
			b.stray.Store(true)
			all := b.queue(t, 20)
			time.Sleep(10 * time.Second)
			began, _ := b.dials()
			if n := len(began); n < 8 || n > 20+24 {
				t.Errorf("%d dials in 10 s, want one of each upgrade and then one each second or so", n)
			}
			if b.tryDial(0) {
				t.Error("another upgrade may dial at once")
			}
			b.stray.Store(false)
			all.Wait()
			if b.misdirectedQueues.Load() != 0 || !b.tryDial(0) {
				t.Error("the backend has answered, and is still looked for")
			}
		},
		"another address": func(t *testing.T, b *queueTest) {
			b.stray.Store(true)
			all := b.queue(t, 20)
			time.Sleep(time.Minute)
			b.stray.Store(false)
			begun := time.Now()
			b.readinessChanged()
			all.Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("the backend was dialled %v after it had another address, want at once", took)
			}
		},
		"back at once": func(t *testing.T, b *queueTest) {
			b.fails.Store(true)
			all := b.queue(t, 20)
			time.Sleep(time.Minute)
			b.set(true)
			b.fails.Store(false)
			begun := time.Now()
			b.set(false)
			all.Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("the backend was dialled %v after it was ready again, want at once", took)
			}
		},
		"who leaves makes room": func(t *testing.T, b *queueTest) {
			b.set(true)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			left := make(chan error, 1)
			go func() { left <- b.upgrade(ctx, 0) }()
			synctest.Wait()
			all := b.queue(t, 1)
			begun := time.Now()
			if err := <-left; !errors.Is(err, errNotYet) || time.Since(begun) != time.Second {
				t.Errorf("error %v after %v, want %v after 1s", err, time.Since(begun), errNotYet)
			}
			b.set(false)
			all.Wait()
			if n := len(b.waitersOf(0)); n > 0 {
				t.Errorf("%d are still in the line", n)
			}
		},
		"a dial that is cut is no failure": func(t *testing.T, b *queueTest) {
			b.take.Store(int64(time.Hour))
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			b.upgrade(ctx, 0)
			b.take.Store(int64(0))
			begun := time.Now()
			if err := b.upgrade(t.Context(), 1); err != nil || time.Since(begun) != 0 {
				t.Errorf("the next dial: %v after %v, want at once", err, time.Since(begun))
			}
		},
		"who asks again keeps its place": func(t *testing.T, b *queueTest) {
			b.set(true)
			all := b.queue(t, 2*maxDialsPerBackend)
			b.recheckOwners(func(string) int { return 1 })
			synctest.Wait()
			b.take.Store(int64(time.Millisecond))
			b.set(false)
			all.Wait()
			b.wantInOrder(t)
		},
		"who gives up with its turn gives it on": func(t *testing.T, b *queueTest) {
			b.set(true)
			ctx, cancel := context.WithCancel(t.Context())
			var left sync.WaitGroup
			for i := range maxDialsPerBackend {
				left.Go(func() { b.upgrade(ctx, i) })
			}
			synctest.Wait()
			b.down.Store(false)
			b.dialQueues.mu.Lock() // they leave, and have their turns before they know
			cancel()
			b.dialQueues.startDials(0, b.dialQueues.queue(0))
			b.dialQueues.mu.Unlock()
			left.Wait()
			begun := time.Now()
			b.queue(t, maxDialsPerBackend).Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("the next upgrades were through after %v, want at once", took)
			}
		},
		"the owner changes before it waits": func(t *testing.T, b *queueTest) {
			b.set(true)
			other := func(string) int { return 1 }
			if err := b.wait(t.Context(), b.newWaiter("ns"), 0, other); !errors.Is(err, errRecheckOwner) {
				t.Errorf("error %v, want %v", err, errRecheckOwner)
			}
		},
		"only those whose owner changes ask again": func(t *testing.T, b *queueTest) {
			b.set(true)
			var asked [2]error
			var waiting sync.WaitGroup
			for i, namespace := range []string{"moves", "stays"} {
				waiting.Go(func() { asked[i] = b.wait(t.Context(), b.newWaiter(namespace), 0, always0) })
			}
			synctest.Wait()
			b.recheckOwners(func(namespace string) int { return len(namespace) - len("moves") }) // both stay
			b.recheckOwners(func(namespace string) int { return map[string]int{"moves": queueHeld}[namespace] })
			synctest.Wait()
			if left := b.waitersOf(0); len(left) != 1 || left[0].namespace != "stays" {
				t.Errorf("%d wait, want only the one that stays", len(left))
			}
			b.set(false)
			waiting.Wait()
			if !errors.Is(asked[0], errRecheckOwner) || asked[1] != nil {
				t.Errorf("results %v, want %v and nil", asked, errRecheckOwner)
			}
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) { test(t, newQueueTest()) })
		})
	}
}

// TestHoldWaitsForReadiness: an upgrade whose backend is not ready dials nothing,
// and gets its session when the EndpointSlices call it ready.
func TestHoldWaitsForReadiness(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	var ready atomic.Bool
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.backends.queues.backendReady = func(int) error {
			if ready.Load() {
				return nil
			}
			return errNotYet
		}
	})
	conn := p.send(t, "ns-01")
	p.waitPending(t, 1)
	p.backends.queues.readinessChanged()
	if len(backend.heads()) > 0 {
		t.Error("the backend was asked before it was ready")
	}
	ready.Store(true)
	p.backends.queues.readinessChanged()
	mustAnswer(t, conn, 101)

}

func TestHoldTimeout(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		p.backends.queues.backendReady = func(int) error { return errNotYet }
		p.limits.holdTimeout = 50 * time.Millisecond
	})
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-02"))
	body, _ := io.ReadAll(resp.Body)
	p.mustRefuse(t, resp.StatusCode, string(body), "backend-0 could not be reached within 50ms: it is not ready")
}

// What is said of slots holds after all that can happen to them.
func TestUpgradeLimit(t *testing.T) {
	for _, shape := range []struct{ backends, limit int }{{1, 10}, {2, 10}, {7, 100}, {100, 10_000}, {100, 10}} {
		var p pendingLimit
		rng := rand.New(rand.NewPCG(1, 2))
		taken, all := map[int]int{}, 0
		for range 50_000 {
			backend := rng.IntN(rng.IntN(shape.backends) + 1) // those that come first have more
			if n := taken[backend]; n > 0 && rng.IntN(3) == 0 {
				p.giveBack(backend)
				taken[backend]--
				all--
				continue
			}
			own := max(1, shape.limit/2/shape.backends)
			tookAll, tookOwn, ok := p.acquire(backend, shape.backends, shape.limit)
			if !ok && taken[backend] < own {
				t.Fatalf("%+v: refused with %d slots taken of its own %d", shape, taken[backend], own)
			}
			if ok {
				taken[backend]++
				all++
			}
			if pool := shape.limit - own*shape.backends; ok && taken[backend]-own > (max(0, pool)+1)/2 {
				t.Fatalf("%+v: %d slots of one backend, want at most half of the %d of the pool", shape, taken[backend]-own, pool)
			}
			gotAll, gotOwn := p.inUse(), p.byBackend[backend]
			if tookAll != all || tookOwn != taken[backend] || gotAll != all || gotOwn != taken[backend] || all > max(shape.limit, shape.backends) {
				t.Fatalf("%+v: %d slots and %d of one backend, want %d and %d", shape, gotAll, gotOwn, all, taken[backend])
			}
		}
		for backend, n := range taken {
			for range n {
				p.transfer(backend, backend+1)
				p.giveBack(backend + 1)
			}
		}
		if all := p.inUse(); all != 0 || len(p.byBackend) != 0 || p.pooled != 0 {
			t.Errorf("%+v: %d slots after all have left, %d backends, %d of the pool", shape, all, len(p.byBackend), p.pooled)
		}
	}
}

// All requests whose owner is not known have one slot together, and what the pool has.
func TestUpgradeLimitOfUnknownOwners(t *testing.T) {
	var p pendingLimit
	for i := range 51 {
		if _, _, ok := p.acquire([]int{unresolved, ownerNotKnown}[i%2], 2, 100); !ok {
			break
		}
	}
	if _, _, ok := p.acquire(ownerNotKnown, 2, 100); ok {
		t.Error("requests whose owners are not known take the shares of backends")
	}
	for backend := range 2 {
		for i := range 25 {
			if _, _, ok := p.acquire(backend, 2, 100); !ok {
				t.Fatalf("backend-%d is refused slot %d of its share", backend, i)
			}
		}
	}
	if all := p.inUse(); all > 101 {
		t.Errorf("%d slots are taken, want at most the limit and one more", all)
	}
}

// Any limit of the flag bounds the heads, also the largest.
func TestHeadLimit(t *testing.T) {
	for _, limit := range []int{1, 5000, math.MaxInt / headBytesPerRequest, math.MaxInt} {
		var p pendingLimit
		if !p.reserveHead(headBytesPerRequest, limit) {
			t.Errorf("limit %d: a head of average size is refused", limit)
		}
		if ok := p.reserveHead(1, limit); ok == (limit == 1) {
			t.Errorf("limit %d: one byte more is allowed: %t", limit, ok)
		}
	}
}

// A limit that means something else for another number of backends counts anew.
func TestUpgradeLimitAfterScaling(t *testing.T) {
	var p pendingLimit
	count := func(backend, backends int) (n int) {
		for {
			if _, _, ok := p.acquire(backend, backends, 100); !ok {
				return n
			}
			n++
		}
	}
	for i, want := range []struct{ backend, backends, taken int }{
		{0, 2, 50}, // 25, and half of 50
		{1, 2, 38}, // 25, and half of the other 25
		{2, 5, 10}, // its own alone: the first two have 40 and 28 of the 50 of the pool
	} {
		if n := count(want.backend, want.backends); n != want.taken {
			t.Errorf("step %d: %d slots, want %d", i, n, want.taken)
		}
	}
}
