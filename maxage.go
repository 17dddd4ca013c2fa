package main

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// How often ageSweep looks at all sessions: a hundredth of -max-age, within these.
const (
	minSweepInterval = time.Second
	maxSweepInterval = time.Minute
)

// ageSweep closes the sessions that are as old as -max-age, so that clients come to
// routers and backends that are new, and read credentials anew. It needs no timer for each
// session. The mover's run owns it.
type ageSweep struct {
	// Static after construction.
	limit    time.Duration // 0: none
	draining func() bool   // the router drains, which closes all sessions
	// close is closeGracefully for causeMaxAge.
	close func(s *session) bool

	pace     pace       // of this router by itself
	nextLook time.Time  // when it looks at all sessions again
	due      []*session // that are too old and wait for the pace, the oldest first
}

// maxAge returns how old the session may become: a time from 0.9 of the limit to all of
// it. It is another one for each session, so that those that came at once do not leave at
// once.
func (a *ageSweep) maxAge(s *session) time.Duration {
	jitter := float64(fmix64(uint64(s.started))) / math.MaxUint64
	return a.limit - time.Duration(jitter*float64(a.limit)/10)
}

// closeOld closes the sessions of r that are too old, at the pace. It returns when to call
// it again, zero for never. Moves go first: closeOld closes none while sessions wait for
// their turn to move, as movesWait says.
func (a *ageSweep) closeOld(r *relay, now time.Time, movesWait bool) time.Time {
	if a.limit == 0 || a.draining() {
		return time.Time{}
	}
	if !now.Before(a.nextLook) {
		if len(a.due) == 0 {
			a.pace.start(now)
		}
		a.due = a.oldSessions(r, now)
		a.nextLook = now.Add(min(max(a.limit/100, minSweepInterval), maxSweepInterval))
	}
	if movesWait {
		a.pace.start(now) // no session makes up for this time
		return a.nextLook
	}
	for ; len(a.due) > 0; a.due = a.due[1:] {
		if next := a.pace.next(); next.After(now) {
			return earliest(next, a.nextLook)
		}
		if a.close(a.due[0]) {
			a.pace.advance(now)
		}
	}
	a.due = nil // the sessions' memory
	return a.nextLook
}

// oldSessions returns the sessions of r that are too old, the oldest first.
func (a *ageSweep) oldSessions(r *relay, now time.Time) []*session {
	age := now.Sub(r.began)
	old := r.filter(func(s *session) bool {
		return age-s.started >= a.maxAge(s) && !s.isEnding()
	})
	slices.SortFunc(old, func(a, b *session) int { return cmp.Compare(a.started, b.started) })
	return old
}
