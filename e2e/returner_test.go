package e2e

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// visit is one session of a returner.
type visit struct {
	began  time.Time
	router string
	server string
	gap    time.Duration // since the session before ended; 0 for the first
	tries  int           // attempts until it was open
	ended  error         // nil while it is open
	over   time.Time     // when it ended
	had    int           // messages that had come by then
}

// returner is a client that comes back when its session ends, as the page
// does: after 50 ms, then twice as long each time, up to a second.
type returner struct {
	// Static after construction.
	dialer    *dialer
	namespace string
	talks     time.Duration // it sends a message so often; 0: never
	stop      context.CancelFunc
	running   sync.WaitGroup

	// Guarded by mu.
	mu       sync.Mutex
	visits   []visit
	refusals []error // attempts that failed, of all visits
	current  *follower
}

// goAndReturn starts a returner that ends with the test.
func (s *system) goAndReturn(namespace string) *returner { return s.talkAndReturn(namespace, 0) }

// talkAndReturn starts a returner that sends a message so often, which backends
// answer, and ends with the test.
func (s *system) talkAndReturn(namespace string, talks time.Duration) *returner {
	ctx, stop := context.WithCancel(context.Background())
	r := &returner{dialer: s.dialer, namespace: namespace, talks: talks, stop: stop}
	r.running.Go(func() { r.run(ctx) })
	s.t.Cleanup(func() {
		stop()
		r.running.Wait()
	})
	return r
}

// run goes from one session to the next until ctx ends.
func (r *returner) run(ctx context.Context) {
	left := time.Time{}
	for ctx.Err() == nil {
		session, tries := r.enter(ctx)
		if session == nil {
			return
		}
		f := r.visit(session, tries, left)
		r.talk(ctx, f)
		f.close()
		left = time.Now()
		r.leave(f)
	}
}

// talk sends messages until the session or ctx has ended. What cannot be written
// was not: that the session has ended, its reader sees.
func (r *returner) talk(ctx context.Context, f *follower) {
	var tick <-chan time.Time
	if r.talks > 0 {
		ticker := time.NewTicker(r.talks)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-f.done:
			return
		case <-ctx.Done():
			return
		case <-tick:
			f.session.conn.Write(ctx, websocket.MessageText, []byte("hello"))
		}
	}
}

// enter tries until a session is open; it returns nil when ctx has ended.
func (r *returner) enter(ctx context.Context) (*session, int) {
	wait := 50 * time.Millisecond
	for tries := 1; ; tries++ {
		session, err := r.dialer.open(ctx, r.namespace)
		if err == nil {
			return session, tries
		}
		if ctx.Err() != nil {
			return nil, tries
		}
		r.mu.Lock()
		r.refusals = append(r.refusals, err)
		r.mu.Unlock()
		until(ctx, wait)
		wait = min(2*wait, time.Second)
	}
}

func (r *returner) visit(session *session, tries int, left time.Time) *follower {
	v := visit{began: time.Now(), router: session.first.Router, server: session.first.Server, tries: tries}
	if !left.IsZero() {
		v.gap = time.Since(left)
	}
	f := follow(session)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.visits = append(r.visits, v)
	r.current = f
	return f
}

func (r *returner) leave(f *follower) {
	over, err := f.end()
	had, _ := f.state()
	if err == nil {
		err = errors.New("the test ended it")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	last := &r.visits[len(r.visits)-1]
	last.ended, last.over, last.had = err, over, had
	r.current = nil
}

// history returns a copy of all visits, and the attempts that failed.
func (r *returner) history() ([]visit, []error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]visit(nil), r.visits...), append([]error(nil), r.refusals...)
}

// open reports whether a session is open, and the router it goes through.
func (r *returner) open() (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil || r.current.alive() != nil {
		return "", false
	}
	return r.visits[len(r.visits)-1].router, true
}
