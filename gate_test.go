package main

import (
	"errors"
	"net"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
)

func TestGate(t *testing.T) {
	relays := pollerDescriptors * runtime.GOMAXPROCS(0)
	for files := 110 + relays; files < 120+relays; files++ {
		synctest.Test(t, func(t *testing.T) {
			g, err := newGate(files, 2)
			if err != nil {
				t.Fatal(err)
			}
			if want := files - 100 - 2*2 - relays; g.limit != want {
				t.Fatalf("%d files: %d for clients, want %d", files, g.limit, want)
			}
			sessions := 0
			for _, _, full := g.state(); !full; _, _, full = g.state() {
				if err := g.wait(); err != nil {
					t.Fatal(err)
				}
				g.use(upgradeDescriptors)
				g.use(-1) // it is a session now
				sessions++
			}
			if used, _, _ := g.state(); sessions != g.sessions() || used != 2*sessions || used > g.limit {
				t.Errorf("%d files: %d sessions use %d descriptors of %d, want %d sessions", files, sessions, used, g.limit, g.sessions())
			}
			wantWaits(t, g)
		})
	}
	least := 100 + 2*5 + relays + upgradeDescriptors
	_, err := newGate(least-1, 5)
	if err == nil || !strings.HasSuffix(err.Error(), " open files are allowed, want at least "+strconv.Itoa(least)+" (ulimit -n)") {
		t.Errorf("error %v, want one that says %d", err, least)
	}
	if _, err := newGate(least, 5); err != nil {
		t.Error(err)
	}
}

// TestGateResizes: more backends leave fewer descriptors to clients, and fewer
// backends let one in that waits.
func TestGateResizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, err := newGate(200+pollerDescriptors*runtime.GOMAXPROCS(0), 0)
		if err != nil {
			t.Fatal(err)
		}
		for backends, want := range map[int]int{0: 100, 10: 80, 1000: upgradeDescriptors} {
			if g.resize(backends); g.limit != want {
				t.Errorf("%d descriptors for clients with %d backends, want %d", g.limit, backends, want)
			}
		}
		g.resize(10)
		g.use(80)
		waited := make(chan error, 1)
		go func() { waited <- g.wait() }()
		synctest.Wait()
		if len(waited) > 0 {
			t.Error("a full gate did not wait")
		}
		g.resize(8)
		if err := <-waited; err != nil {
			t.Error(err)
		}
	})
}

// wantWaits checks that the gate, which is full, keeps a client waiting until a
// session is over, and no longer than until it is closed.
func wantWaits(t *testing.T, g *gate) {
	t.Helper()
	waited := make(chan error, 1)
	for _, step := range []struct {
		end  func()
		want error
	}{{func() { g.use(-sessionDescriptors - 1) }, nil}, {g.close, net.ErrClosed}} {
		used, _, _ := g.state()
		g.use(max(0, g.limit-used))
		go func() { waited <- g.wait() }()
		synctest.Wait()
		select {
		case err := <-waited:
			t.Errorf("a full gate did not wait: %v", err)
		default:
		}
		step.end()
		if err := <-waited; !errors.Is(err, step.want) {
			t.Errorf("error %v, want %v", err, step.want)
		}
	}
}
