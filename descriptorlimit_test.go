package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
)

func TestDescriptorLimit(t *testing.T) {
	for more := range 10 {
		bubble(t, func(t *testing.T) {
			files := reservedDescriptors + 20 + descriptorsPerPoller*runtime.GOMAXPROCS(0) + more
			l, err := newDescriptorLimit(files, 2, 1<<20, 1)
			must(t, err)
			if want := 20 - 2*descriptorsPerBackend + more; l.limit != want {
				t.Fatalf("%d files: %d for clients, want %d", files, l.limit, want)
			}
			sessions, most := 0, l.moreSessions()
			for _, _, full := l.usage(); !full; _, _, full = l.usage() {
				must(t, l.wait())
				l.add(descriptorsPerClient)
				l.add(-1) // it is a session now
				sessions++
			}
			if used, _, _ := l.usage(); sessions != most || used != 2*sessions || used > l.limit {
				t.Errorf("%d files: %d sessions use %d descriptors of %d, want %d sessions", files, sessions, used, l.limit, most)
			}
			wantLimited(t, l)
		})
	}
	least := reservedDescriptors + 5*descriptorsPerBackend +
		descriptorsPerPoller*runtime.GOMAXPROCS(0) + descriptorsPerClient
	_, err := newDescriptorLimit(least-1, 5, 1<<20, 1)
	if err == nil || err.Error() != fmt.Sprintf("the limit of open files must be at least %d (got %d; ulimit -n)", least, least-1) {
		t.Errorf("error %v, want one that says %d", err, least)
	}
	if _, err := newDescriptorLimit(least, 5, 1<<20, 1); err != nil {
		t.Error(err)
	}
}

// However many files may be open, clients have no more descriptors than all sessions and
// pending requests need, and some more.
func TestDescriptorLimitFollowsSessions(t *testing.T) {
	l, err := newDescriptorLimit(1<<20, 2, 100, 10)
	must(t, err)
	wantEqual(t, "descriptors for clients", l.limit, 2*100+3*10+descriptorsForOthers)
	if sessions := l.moreSessions(); sessions < 100 {
		t.Errorf("at most %d sessions, want room for 100", sessions)
	}
	l.add(96) // as -redirect does, before there are clients
	wantEqual(t, "sessions with -redirect", l.moreSessions(), (l.limit-96-descriptorsPerClient)/descriptorsPerSession+1)
	if l, err = newDescriptorLimit(1<<20, 0, math.MaxInt, math.MaxInt); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "descriptors for clients with flags of any size", l.limit, 1<<20-internalDescriptors(0))
}

// TestDescriptorLimitFollowsBackends: more backends leave fewer descriptors to clients, and fewer
// backends let one in that waits.
func TestDescriptorLimitFollowsBackends(t *testing.T) {
	bubble(t, func(t *testing.T) {
		l, err := newDescriptorLimit(reservedDescriptors+100+descriptorsPerPoller*runtime.GOMAXPROCS(0), 0, 1<<20, 1)
		must(t, err)
		for backends, want := range map[int]int{0: 100, 10: 60, 1000: descriptorsPerClient} {
			if l.setBackends(backends); l.limit != want {
				t.Errorf("%d descriptors for clients with %d backends, want %d", l.limit, backends, want)
			}
		}
		l.setBackends(10)
		l.add(60)
		waited := make(chan error, 1)
		go func() { waited <- l.wait() }()
		synctest.Wait()
		if len(waited) > 0 {
			t.Error("a full limit did not wait")
		}
		l.setBackends(8)
		if err := <-waited; err != nil {
			t.Error(err)
		}
	})
}

// wantLimited checks that the limit, which is full, keeps a client waiting until a
// session is over, and no longer than until it is closed.
func wantLimited(t *testing.T, l *descriptorLimit) {
	t.Helper()
	waited := make(chan error, 1)
	for _, step := range []struct {
		end  func()
		want error
	}{{func() { l.add(-descriptorsPerSession - 1) }, nil}, {l.close, net.ErrClosed}} {
		used, _, _ := l.usage()
		l.add(max(0, l.limit-used))
		go func() { waited <- l.wait() }()
		synctest.Wait()
		select {
		case err := <-waited:
			t.Errorf("a full limit did not wait: %v", err)
		default:
		}
		step.end()
		if err := <-waited; !errors.Is(err, step.want) {
			t.Errorf("error %v, want %v", err, step.want)
		}
	}
}
