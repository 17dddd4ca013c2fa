package main

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// heldBackend is one backend whose readiness and dials a test decides on.
type heldBackend struct {
	*holds
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

func newHeldBackend() *heldBackend {
	b := &heldBackend{}
	b.holds = newHolds(func(int) error {
		b.asked.Add(1)
		if b.down.Load() {
			return errNotYet
		}
		return nil
	})
	return b
}

func (b *heldBackend) set(down bool) {
	b.down.Store(down)
	b.look()
}

// upgrade waits and dials until it is through, as backends.hold does.
func (b *heldBackend) upgrade(ctx context.Context, i int) error {
	w := b.enter()
	for {
		if err := b.wait(ctx, w, 0, b.swaps.Load()); errors.Is(err, errAskAgain) {
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
		b.done(0, err, ctx.Err() != nil)
		switch {
		case err == nil && b.stray.Load():
			b.misdirected(0, errors.New("421"))
			w = b.enter()
		case err == nil:
			b.meant(0)
			return nil
		case ctx.Err() != nil:
			return err
		}
	}
}

// waiting returns who waits for a backend.
func (h *holds) waiting(ordinal int) []*waiter {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.line(ordinal).waiting)
}

// dials returns which upgrades dialled, in order, and how many at once.
func (b *heldBackend) dials() (began []int, most int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.began), b.most
}

// wantInOrder checks that upgrades dialled as they came, but for those that dial
// at once.
func (b *heldBackend) wantInOrder(t *testing.T) {
	t.Helper()
	began, most := b.dials()
	for i, upgrade := range began {
		if upgrade/dialsMost != i/dialsMost || most != dialsMost {
			t.Fatalf("upgrade %d was the %d-th to dial, %d did at once", upgrade, i, most)
		}
	}
}

// queue starts upgrades one after the other, and returns what waits for them.
func (b *heldBackend) queue(t *testing.T, count int) *sync.WaitGroup {
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

func TestHolds(t *testing.T) {
	tests := map[string]func(t *testing.T, b *heldBackend){
		"first come, first served": func(t *testing.T, b *heldBackend) {
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
		"strictly one after the other": func(t *testing.T, b *heldBackend) {
			b.fails.Store(true)
			all := b.queue(t, 20)
			time.Sleep(10 * time.Second)
			began, most := b.dials()
			if slices.Max(began) != 0 || most != 1 {
				t.Errorf("%v dialled, %d at once, while dials failed: want the first alone", began, most)
			}
			if n := len(began); n < 8 || n > 24 {
				t.Errorf("%d dials in 10 s, want one each second or so", n)
			}
			b.fails.Store(false)
			all.Wait()
		},
		"another backend answers": func(t *testing.T, b *heldBackend) {
			b.stray.Store(true)
			all := b.queue(t, 20)
			time.Sleep(10 * time.Second)
			began, _ := b.dials()
			if n := len(began); n < 8 || n > 20+24 {
				t.Errorf("%d dials in 10 s, want one of each upgrade and then one each second or so", n)
			}
			if b.try(0) {
				t.Error("another upgrade may dial at once")
			}
			b.stray.Store(false)
			all.Wait()
			if b.astray.Load() != 0 || !b.try(0) {
				t.Error("the backend has answered, and is still looked for")
			}
		},
		"another address": func(t *testing.T, b *heldBackend) {
			b.stray.Store(true)
			all := b.queue(t, 20)
			time.Sleep(time.Minute)
			b.stray.Store(false)
			begun := time.Now()
			b.look()
			all.Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("the backend was dialled %v after it had another address, want at once", took)
			}
		},
		"back at once": func(t *testing.T, b *heldBackend) {
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
		"who leaves makes room": func(t *testing.T, b *heldBackend) {
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
			if n := len(b.waiting(0)); n > 0 {
				t.Errorf("%d are still in the line", n)
			}
		},
		"a dial that is cut is no failure": func(t *testing.T, b *heldBackend) {
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
		"who asks again keeps its place": func(t *testing.T, b *heldBackend) {
			b.set(true)
			all := b.queue(t, 2*dialsMost)
			b.askAgain()
			synctest.Wait()
			b.take.Store(int64(time.Millisecond))
			b.set(false)
			all.Wait()
			b.wantInOrder(t)
		},
		"who gives up with its turn gives it on": func(t *testing.T, b *heldBackend) {
			b.set(true)
			ctx, cancel := context.WithCancel(t.Context())
			var left sync.WaitGroup
			for i := range dialsMost {
				left.Go(func() { b.upgrade(ctx, i) })
			}
			synctest.Wait()
			b.down.Store(false)
			b.holds.mu.Lock() // they leave, and have their turns before they know
			cancel()
			b.holds.release(0, b.holds.line(0))
			b.holds.mu.Unlock()
			left.Wait()
			begun := time.Now()
			b.queue(t, dialsMost).Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("the next upgrades were through after %v, want at once", took)
			}
		},
		"swapped before it waits": func(t *testing.T, b *heldBackend) {
			b.set(true)
			swaps := b.swaps.Load()
			b.askAgain()
			if err := b.wait(t.Context(), b.enter(), 0, swaps); !errors.Is(err, errAskAgain) {
				t.Errorf("error %v, want %v", err, errAskAgain)
			}
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, newHeldBackend()) })
		})
	}
}

// TestHoldWaitsForReadiness: an upgrade whose backend is not ready dials nothing,
// and gets its session when the EndpointSlices call it ready.
func TestHoldWaitsForReadiness(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	var ready atomic.Bool
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.backends.holds.ready = func(int) error {
			if ready.Load() {
				return nil
			}
			return errNotYet
		}
	})
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	p.backends.holds.look()
	if len(backend.heads()) > 0 {
		t.Error("the backend was asked before it was ready")
	}
	ready.Store(true)
	p.backends.holds.look()
	mustAnswer(t, conn, 101)

}

func TestHoldTimeout(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		p.backends.holds.ready = func(int) error { return errNotYet }
		p.limits.hold = 50 * time.Millisecond
	})
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-02"))
	body, _ := io.ReadAll(resp.Body)
	p.mustTell(t, resp.StatusCode, string(body), "backend-0 could not be reached within 50ms: it is not ready")
}
