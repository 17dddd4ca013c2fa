package main

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

// mover ends the sessions whose namespace has another owner now, at a pace that
// the backends can bear (invariant 2). All other sessions stay.
type mover struct {
	// Static after construction.
	router *router
	relay  *relay
	rate   int // sessions per second; 0 is no limit
	log    *slog.Logger

	wake chan struct{} // capacity 1; sent to by check, never closed
}

func newMover(router *router, relay *relay, rate int, log *slog.Logger) *mover {
	return &mover{router: router, relay: relay, rate: rate, log: log, wake: make(chan struct{}, 1)}
}

// check makes run look for sessions to move. It does not block.
func (m *mover) check() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// run moves sessions after each check, until ctx ends.
func (m *mover) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
			m.move(ctx)
		}
	}
}

// move ends the sessions that are not with their owner. What a later table
// takes back before its turn stays; what a later table moves too has its turn
// among the rest.
func (m *mover) move(ctx context.Context) {
	for again := true; again; {
		begun, moved := time.Now(), 0
		found := m.relay.where(m.misplaced)
		moved, again = pace(ctx, m.wake, found, m.interval(), func(s *session) bool {
			if !m.misplaced(s) {
				return false
			}
			s.end(causeMoved)
			return true
		})
		if len(found) > 0 {
			m.log.Info("sessions moved", "version", m.router.table().version, "sessions", moved,
				"stayed", len(found)-moved, "seconds", time.Since(begun).Seconds())
		}
	}
}

// misplaced reports whether the session's namespace has another owner. A
// namespace that is refused has no owner, and its sessions stay.
func (m *mover) misplaced(s *session) bool {
	owner, ok := m.router.table().owner(s.namespace)
	return ok && owner != s.backend
}

func (m *mover) interval() time.Duration {
	if m.rate == 0 {
		return 0
	}
	return time.Second / time.Duration(m.rate)
}

// drainSlowest is the longest time from one session to the next in a drain: a
// router with few sessions need not use all of its time.
const drainSlowest = 100 * time.Millisecond

// drain ends all sessions, spread over the given time, and returns how many
// once they have ended. When ctx ends the rest is ended at once.
func drain(ctx context.Context, r *relay, over time.Duration) int {
	open := func(s *session) bool { return !s.ending() }
	end := func(s *session) bool { s.end(causeDrain); return true }
	all := r.where(open)
	ended, _ := pace(ctx, nil, all, min(drainSlowest, over/time.Duration(max(1, len(all)))), end)
	for _, s := range r.where(open) {
		end(s)
		ended++
	}
	r.wait()
	return ended
}

// pace calls end for each session that is not over by its turn, in random
// order, one each interval (jittered by half of it), and returns how often end
// was true. It stops when ctx ends or wake can be received from, which is woken.
func pace(ctx context.Context, wake <-chan struct{}, sessions []*session, interval time.Duration,
	end func(*session) bool) (done int, woken bool) {
	rand.Shuffle(len(sessions), func(i, j int) { sessions[i], sessions[j] = sessions[j], sessions[i] })
	start := time.Now()
	for i, s := range sessions {
		if s.gone.Load() {
			continue
		}
		at := start.Add(time.Duration(i) * interval)
		if interval > 0 {
			at = at.Add(rand.N(interval) / 2)
		}
		select {
		case <-ctx.Done():
			return done, false
		case <-wake:
			return done, true
		case <-time.After(time.Until(at)):
		}
		if end(s) {
			done++
		}
	}
	return done, false
}
