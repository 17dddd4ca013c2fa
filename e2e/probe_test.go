package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// attempt is one new connection.
type attempt struct {
	began    time.Time // before the connection was opened
	answered time.Time // when the first message came
	backend  string    // "" if the session was cut before a message came
}

// prober opens connections of one namespace, one after the other, from several
// goroutines, until it is stopped.
type prober struct {
	dialer    *dialer
	namespace string
	stop      context.CancelFunc
	running   sync.WaitGroup

	// Guarded by mu.
	mu       sync.Mutex
	attempts []attempt
	err      error // of an attempt that got neither a backend nor a cut
}

const (
	probers    = 4
	probePause = 10 * time.Millisecond // from the start of one attempt to the next
)

// probe starts a prober. The caller calls finish.
func probe(ctx context.Context, d *dialer, namespace string) *prober {
	ctx, stop := context.WithCancel(ctx)
	p := &prober{dialer: d, namespace: namespace, stop: stop}
	for range probers {
		p.running.Go(func() { p.run(ctx) })
	}
	return p
}

// run makes attempts. One that was begun is finished, so that none is missing
// from the result.
func (p *prober) run(ctx context.Context) {
	tick := time.NewTicker(probePause)
	defer tick.Stop()
	for {
		p.try(context.WithoutCancel(ctx))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// try makes one attempt. A cut counts as one: the 101 had come.
func (p *prober) try(ctx context.Context) {
	a := attempt{began: time.Now()}
	session, err := p.dialer.open(ctx, p.namespace)
	a.answered = time.Now()
	if err == nil {
		a.backend = session.first.Server
		session.conn.CloseNow()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil && !errors.As(err, new(cut)) {
		p.err = err
		return
	}
	p.attempts = append(p.attempts, a)
}

// lastOld returns when the last attempt so far began that did not get to the
// given backend, and how many attempts there were.
func (p *prober) lastOld(backend string) (last time.Time, attempts int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.attempts {
		if a.backend != backend && a.began.After(last) {
			last = a.began
		}
	}
	return last, len(p.attempts), p.err
}

// finish stops the prober, waits for the attempts under way, and returns all.
func (p *prober) finish() ([]attempt, error) {
	p.stop()
	p.running.Wait()
	return p.attempts, p.err
}

// lateness says how long after at the last attempt began that still got to the
// old backend, and how long after it the last answer of the old one came; 0 if
// there was none. An attempt that was cut had got to the old one. A third
// backend is an error.
func lateness(attempts []attempt, at time.Time, from, to string) (began, answered time.Duration, err error) {
	for _, a := range attempts {
		switch a.backend {
		case to:
			if a.answered.Before(at.Add(-time.Second)) {
				return 0, 0, fmt.Errorf("%s answered %s before the change", to, at.Sub(a.answered))
			}
		case from, "":
			began = max(began, a.began.Sub(at))
			answered = max(answered, a.answered.Sub(at))
		default:
			return 0, 0, fmt.Errorf("%s answered, want %s or %s", a.backend, from, to)
		}
	}
	return began, answered, nil
}

// TestLateness has times in milliseconds after the change; "a" is the old
// owner and "b" the new one.
func TestLateness(t *testing.T) {
	at := time.Now()
	try := func(began, answered int, backend string) attempt {
		ms := func(n int) time.Time { return at.Add(time.Duration(n) * time.Millisecond) }
		return attempt{ms(began), ms(answered), backend}
	}
	for name, tt := range map[string]struct {
		attempts        []attempt
		began, answered time.Duration
		fails           bool
	}{
		"none":               {},
		"at once":            {attempts: []attempt{try(-5, -1, "a"), try(-3, 2, "b"), try(1, 4, "b")}},
		"under way":          {attempts: []attempt{try(-5, 3, "a"), try(4, 8, "b")}, answered: 3e6},
		"late":               {attempts: []attempt{try(7, 11, "a"), try(2, 5, "b"), try(9, 12, "b")}, began: 7e6, answered: 11e6},
		"cut":                {attempts: []attempt{try(7, 11, "")}, began: 7e6, answered: 11e6},
		"a third backend":    {attempts: []attempt{try(7, 11, "c")}, fails: true},
		"before it was told": {attempts: []attempt{try(-1500, -1400, "b")}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			began, answered, err := lateness(tt.attempts, at, "a", "b")
			if began != tt.began || answered != tt.answered || (err != nil) != tt.fails {
				t.Errorf("lateness is %s, %s, %v", began, answered, err)
			}
		})
	}
}
