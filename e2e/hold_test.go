package e2e

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	changePause   = 100 * time.Millisecond // from one change of an override to the next
	changedOthers = 20                     // how many namespaces change, in turn
)

// TestHold5000 holds connections through nginx and the router while overrides
// of other namespaces change ten times a second. None may end, and none may
// miss a message.
func TestHold5000(t *testing.T) {
	connections, during := number(t, "E2E_CONNECTIONS", 5000), span(t, "E2E_HOLD", 2*time.Minute)
	s := newSystem(t)
	s.needDirect()
	s.needFiles(connections + 500)
	s.keepOverrides()
	routers := s.routers(t.Context())
	swaps := s.mustSum(routers, "router_table_updates_total")

	began := time.Now()
	held := s.hold(connections, func(i int) string { return fmt.Sprintf("%shold-%05d", prefix, i) })
	t.Logf("hold: %d connections opened in %.1f s", connections, time.Since(began).Seconds())
	if sum := s.mustSum(routers, "router_sessions"); int(sum) < connections {
		t.Errorf("the routers count %v sessions, want %d", sum, connections)
	}

	ctx, stop := context.WithTimeout(t.Context(), during)
	defer stop()
	began = time.Now()
	before := messages(held)
	changes := s.keepChanging(ctx)
	took := time.Since(began)
	after := messages(held)

	lost := 0
	for _, f := range held {
		if err := f.alive(); err != nil {
			if lost++; lost <= 10 {
				t.Error(err)
			}
		}
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("hold: %d connections for %.1f s: %d lost, no counter with a gap; %d messages (%.2f per connection and second), "+
		"%d changes of other overrides (%.1f per second), %v table swaps in %d routers; the test itself used %d MiB",
		connections, took.Seconds(), lost, after-before, float64(after-before)/float64(connections)/took.Seconds(),
		changes, float64(changes)/took.Seconds(),
		s.mustSum(routers, "router_table_updates_total")-swaps, len(routers), memory.Sys>>20)
	if lost > 0 {
		t.Errorf("%d of %d connections were lost", lost, connections)
	}
	if want := int(took/changePause) * 9 / 10; changes < want {
		t.Errorf("%d changes, want at least %d: the API server is too slow for ten a second", changes, want)
	}
	if got := s.mustSum(routers, "router_table_updates_total") - swaps; got < float64(changes*len(routers))/2 {
		t.Errorf("%v table swaps in %d routers after %d changes", got, len(routers), changes)
	}
	// Backends send once a second; a little less is the time one message takes.
	if want := float64(connections) * took.Seconds() * 0.9; float64(after-before) < want {
		t.Errorf("%d messages, want at least %.0f", after-before, want)
	}
}

// needFiles raises the limit of open files as far as it goes.
func (s *system) needFiles(n int) {
	s.t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		s.t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		s.t.Fatal(err)
	}
	if limit.Cur < uint64(n) {
		s.t.Fatalf("%d open files are allowed, %d are needed: raise the limit (ulimit -n) or lower E2E_CONNECTIONS", limit.Cur, n)
	}
}

// hold opens connections, the i-th of namespace(i), and follows them until the
// test ends.
func (s *system) hold(connections int, namespace func(i int) string) []*follower {
	s.t.Helper()
	held := make([]*follower, connections)
	err := forEach(connections, 32, func(i int) error {
		session, err := s.dialer.open(s.t.Context(), namespace(i))
		if err != nil {
			return err
		}
		held[i] = follow(session)
		return nil
	})
	s.t.Cleanup(func() {
		for _, f := range held {
			if f != nil {
				f.close()
			}
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return held
}

// messages counts what all sessions have received.
func messages(all []*follower) int {
	sum := 0
	for _, f := range all {
		n, _ := f.state()
		sum += n
	}
	return sum
}

// keepChanging changes an override each changePause until ctx ends, and
// returns how often it did.
func (s *system) keepChanging(ctx context.Context) int {
	s.t.Helper()
	var (
		mu       sync.Mutex
		done     int
		failed   error
		patching sync.WaitGroup
	)
	slots := make(chan struct{}, 4) // requests under way
	tick := time.NewTicker(changePause)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			patching.Wait()
			if failed != nil {
				s.t.Errorf("changes: %v", failed)
			}
			return done
		case <-tick.C:
		}
		slots <- struct{}{}
		patching.Go(func() {
			defer func() { <-slots }()
			namespace := fmt.Sprintf("%schanging-%d", prefix, i%changedOthers)
			backend := fmt.Sprintf("backend-%d", i/changedOthers%2)
			_, err := s.patch(context.WithoutCancel(ctx), map[string]any{namespace: backend})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			done++
		})
	}
}
