//go:build controlplane

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// findings are what clients found wrong.
type findings struct {
	mu   sync.Mutex
	errs []error // guarded by mu
}

func (f *findings) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs = append(f.errs, fmt.Errorf(time.Now().Format(time.TimeOnly)+" "+format, args...))
}

func (f *findings) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return some(f.errs)
}

// client opens sessions of a router, and holds each against the ledger.
type client struct {
	*findings
	subject *subject
	ledger  *ledger

	// Guarded by mu.
	mu      sync.Mutex
	opened  int
	slowest time.Duration // until the first message
}

// open opens a session, which has to get to a backend that owned the namespace
// at some time of the attempt. It is nil if it was none: wrong, or cut because
// the owner changed during the attempt.
func (c *client) open(ctx context.Context, namespace string) *session {
	began := time.Now()
	session, err := c.subject.dialer.open(ctx, namespace)
	owners := c.ledger.mayOwn(c.subject, namespace, began, time.Now())
	switch {
	case ctx.Err() != nil:
		if err == nil {
			session.conn.CloseNow()
		}
		return nil
	case errors.As(err, new(cut)) && len(owners) > 1:
		return nil
	case err != nil:
		c.add("%s: %s: a session that began %s ago was refused: %w", c.subject.pod, namespace, time.Since(began), err)
		return nil
	case !slices.Contains(owners, session.first.Server):
		c.add("%s: %s landed on %s, want %v", c.subject.pod, namespace, session.first.Server, owners)
		session.conn.CloseNow()
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened++
	c.slowest = max(c.slowest, time.Since(began))
	return session
}

// probe opens sessions of random namespaces, one after the other, until ctx ends.
func (c *client) probe(ctx context.Context, random *rand.Rand, namespaces []string) {
	for ctx.Err() == nil {
		if session := c.open(ctx, namespaces[random.IntN(len(namespaces))]); session != nil {
			session.conn.CloseNow()
		}
		until(ctx, visitPause)
	}
}

// guest holds a session of one namespace, and opens the next when it is closed
// because the owner changed.
type guest struct {
	*client
	namespace string

	now *follower // guarded by mu
}

// stay holds sessions until ctx ends.
func (g *guest) stay(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		session := g.open(ctx, g.namespace)
		if session == nil {
			until(ctx, time.Second)
			continue
		}
		f := follow(session)
		g.mu.Lock()
		g.now = f
		g.mu.Unlock()
		select {
		case <-f.done:
			g.judge(f, began)
		case <-ctx.Done():
		}
		f.close()
	}
}

// judge says whether the session had to end.
func (g *guest) judge(f *follower, began time.Time) {
	over, err := f.end()
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.StatusServiceRestart {
		g.add("%s: a session of %s was lost: %w", g.subject.pod, g.namespace, err)
	}
	here := f.session.first.Server
	if owners := g.ledger.mayOwn(g.subject, g.namespace, began, over); !slices.ContainsFunc(owners, func(o string) bool { return o != here }) {
		g.add("%s: a session of %s was moved from %s, which was the owner all the time", g.subject.pod, g.namespace, here)
	}
}

// placed is nil if there is a session, with this backend.
func (g *guest) placed(owner string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.now == nil {
		return fmt.Errorf("%s: %s has no session", g.subject.pod, g.namespace)
	}
	if here := g.now.session.first.Server; here != owner {
		return fmt.Errorf("%s: %s is with %s, want %s", g.subject.pod, g.namespace, here, owner)
	}
	return g.now.alive()
}

// messages is how many messages the present session has had.
func (g *guest) messages() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.now == nil {
		return 0
	}
	n, _ := g.now.state()
	return n
}
