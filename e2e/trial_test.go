//go:build controlplane

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	mostGoroutines = 5        // more than before a fault
	mostMemory     = 32 << 20 // bytes more
	mostLines      = 10       // of the log, but those of sessions and tables
)

// trial is a fault, the routers that must bear it, and what their clients see:
// a session that is held, and visitors. It begins before the fault and ends
// with recovered.
type trial struct {
	*rig
	subjects []*subject
	before   []figures
	held     []*follower
	visitors []*visitor
	memory   int    // bytes that a router may have more than before
	owner    string // of moved, since the last write
	version  string // of the overrides, since then
}

// try sees that the routers follow, and sends visitors.
func (r *rig) try(subjects ...*subject) *trial {
	r.t.Helper()
	now, err := r.overrides(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	t := &trial{rig: r, subjects: subjects, memory: mostMemory, owner: now.Data[moved]}
	t.followed(t.write(), 10*time.Second)
	for _, s := range subjects {
		session, err := s.dialer.open(r.t.Context(), kept)
		if err != nil {
			r.t.Fatal(err)
		}
		t.held = append(t.held, follow(session))
		r.t.Cleanup(t.held[len(t.held)-1].close)
		t.before = append(t.before, s.figures(r.t))
	}
	for _, s := range subjects {
		t.visitors = append(t.visitors, sendVisitor(r.t, s))
	}
	return t
}

// write moves the override of moved to the next backend. It tries until the API
// server takes it: one that timed out may have been taken, and is asked for
// again.
func (t *trial) write() change {
	t.t.Helper()
	t.next()
	var c change
	eventually(t.t, 90*time.Second, "the API server to take a write", func() (err error) {
		ctx, cancel := context.WithTimeout(t.t.Context(), 3*time.Second)
		defer cancel()
		c, err = t.patch(ctx, map[string]any{moved: t.owner})
		return err
	})
	t.version = c.version
	return c
}

// next is the backend that moved gets with the next write.
func (t *trial) next() string {
	t.owner = after(t.owner, 1)
	return t.owner
}

// after returns the backend that is so many after another, in a circle.
func after(backend string, by int) string {
	ordinal, _ := strconv.Atoi(strings.TrimPrefix(backend, "backend-"))
	return fmt.Sprintf("backend-%d", (ordinal+by)%backendCount)
}

// followed waits until new sessions of all routers follow the change, and
// returns how long that took after the API server's answer, for each router.
func (t *trial) followed(c change, within time.Duration) []time.Duration {
	t.t.Helper()
	took := make([]time.Duration, len(t.subjects))
	eventually(t.t, within-time.Since(c.at), "routers to follow a change", func() error {
		var errs []error
		for i, s := range t.subjects {
			if took[i] > 0 {
				continue
			}
			err := s.dialer.lands(t.t.Context(), moved, t.owner)
			landed := time.Since(c.at)
			if err == nil { // a backend has its turn every few writes
				err = s.hasTable(t.t.Context(), c.version)
			}
			if err == nil {
				took[i] = landed
			} else {
				errs = append(errs, fmt.Errorf("%s: %w", s.pod, err))
			}
		}
		return errors.Join(errs...)
	})
	return took
}

// stands sees that the routers are ready and have the table of before.
func (t *trial) stands() {
	t.t.Helper()
	for _, s := range t.subjects {
		_, unready := s.get(t.t.Context(), "/readyz")
		err := errors.Join(unready, s.hasTable(t.t.Context(), t.version), s.dialer.lands(t.t.Context(), moved, t.owner))
		if err != nil {
			t.t.Error(err)
		}
	}
}

// recovered is called when the fault has ended: the routers must follow the
// next write within the bound, and have neither lost nor refused a client.
func (t *trial) recovered(within time.Duration) {
	t.t.Helper()
	ended := time.Now()
	c := t.write()
	took := t.followed(c, within)
	t.t.Logf("recovered in %.1f s after the write (%s), which was taken %.1f s after the end; %s",
		slices.Max(took).Seconds(), t.each(took), c.at.Sub(ended).Seconds(), t.check())
}

// each says how long each router took.
func (t *trial) each(took []time.Duration) string {
	var all []string
	for i, s := range t.subjects {
		all = append(all, fmt.Sprintf("%s %.2f s", s.pod, took[i].Seconds()))
	}
	return strings.Join(all, ", ")
}

// check ends the visitors, holds what the clients saw and what the routers
// have grown by, and says it.
func (t *trial) check() string {
	t.t.Helper()
	visits, slowest, lines := 0, time.Duration(0), 0
	for i, s := range t.subjects {
		v := t.visitors[i]
		if err := v.finish(); err != nil {
			t.t.Errorf("%s: new sessions: %v", s.pod, err)
		}
		if err := t.held[i].alive(); err != nil {
			t.t.Errorf("%s: %v", s.pod, err)
		}
		visits, slowest = visits+v.visits, max(slowest, v.slowest)
		lines = max(lines, t.grown(s, t.before[i]))
	}
	return fmt.Sprintf("%d new sessions, the slowest in %d ms; at most %d lines", visits, slowest.Milliseconds(), lines)
}

// grown holds what a router has grown by, and returns the lines it logged.
func (t *trial) grown(s *subject, before figures) (lines int) {
	t.t.Helper()
	var now figures
	eventually(t.t, 10*time.Second, s.pod+" to be as small as before", func() error {
		now = s.figures(t.t)
		if now.goroutines > before.goroutines+mostGoroutines || now.memory > before.memory+t.memory {
			return fmt.Errorf("%+v, before the fault %+v", now, before)
		}
		return nil
	})
	if lines = now.lines - before.lines; lines > mostLines {
		t.t.Errorf("%s logged %d lines, want at most %d", s.pod, lines, mostLines)
	}
	return lines
}

// visitor opens sessions of namespaces whose owner must not change, one after
// the other.
type visitor struct {
	// Static after construction.
	dialer  *dialer
	owners  map[string]string
	stop    context.CancelFunc
	running sync.WaitGroup

	// Owned by run, then by who called finish.
	visits  int
	slowest time.Duration
	errs    []error
}

const visitPause = 50 * time.Millisecond // from one session to the next

// sendVisitor sends a visitor to a router, until finish or the end of the test.
func sendVisitor(t *testing.T, s *subject) *visitor {
	t.Helper()
	v := &visitor{dialer: s.dialer, owners: map[string]string{}}
	for _, namespace := range []string{kept, hashed} {
		o, err := s.owner(t.Context(), namespace)
		if err != nil {
			t.Fatal(err)
		}
		v.owners[namespace] = o.Owner
	}
	ctx, stop := context.WithCancel(context.Background())
	v.stop = stop
	v.running.Go(func() { v.run(ctx) })
	t.Cleanup(func() { v.finish() })
	return v
}

func (v *visitor) run(ctx context.Context) {
	for ctx.Err() == nil {
		for namespace, owner := range v.owners {
			began := time.Now()
			if err := v.dialer.lands(context.WithoutCancel(ctx), namespace, owner); err != nil {
				v.errs = append(v.errs, fmt.Errorf("%s: %w", began.Format(time.TimeOnly), err))
			}
			v.visits++
			v.slowest = max(v.slowest, time.Since(began))
			until(ctx, visitPause)
		}
	}
}

// finish ends the visitor and returns what went wrong.
func (v *visitor) finish() error {
	v.stop()
	v.running.Wait()
	return some(v.errs)
}
