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
	for files := 110 + runtime.GOMAXPROCS(0); files < 120+runtime.GOMAXPROCS(0); files++ {
		synctest.Test(t, func(t *testing.T) {
			g, err := newGate(files, 2)
			if err != nil {
				t.Fatal(err)
			}
			sessions := 0
			for _, full := g.state(); !full; _, full = g.state() {
				if err := g.wait(); err != nil {
					t.Fatal(err)
				}
				g.use(upgradeDescriptors)
				g.use(-1) // it is a session now
				sessions++
			}
			if used, _ := g.state(); sessions != g.sessions() || used != 2*sessions || used > g.limit {
				t.Errorf("%d files: %d sessions use %d descriptors of %d, want %d sessions", files, sessions, used, g.limit, g.sessions())
			}
			wantWaits(t, g)
		})
	}
	least := 100 + 2*5 + runtime.GOMAXPROCS(0) + upgradeDescriptors
	_, err := newGate(least-1, 5)
	if err == nil || !strings.HasSuffix(err.Error(), " open files are allowed, want at least "+strconv.Itoa(least)+" (ulimit -n)") {
		t.Errorf("error %v, want one that says %d", err, least)
	}
	if _, err := newGate(least, 5); err != nil {
		t.Error(err)
	}
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
		used, _ := g.state()
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
