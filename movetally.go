package main

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"
)

const (
	maxReceipts   = 10 // finished moves that are kept for operators
	maxMovedNames = 50 // namespaces of a move that are kept with it
)

// moveTally counts the sessions that moved to one table, in one step or many. The mover's
// run owns it, except for the atomic fields.
type moveTally struct {
	ownersHash       uint64 // of the table; noTableHash if it is not known
	overridesVersion string // of the table
	planned          int    // sessions that had to move in all: the most that mover.prepare has counted
	prepared         time.Time
	began            time.Time           // when sessions were free to move; zero before
	namespaces       map[string]struct{} // namespaces of the closed sessions
	sessions         int                 // that were closed
	cancelled        int                 // sessions that stayed: a later change moved them back
	longestHold      time.Duration       // the longest time that a namespace was held

	unfinished atomic.Int64 // sessions whose closing handshake goes on
	cuts       atomic.Int64 // sessions whose closing handshake was cut
}

// moveResult is what one router's moves to one table came to, or have come to so far, for the
// log, the Events and operators. It is immutable.
type moveResult struct {
	overridesVersion string        // of the table
	ownersHash       uint64        // of the table
	planned          int           // sessions that had to move in all: see moveTally
	began            time.Time     // when sessions were free to move; when it was prepared, if none was
	namespaces       int           // of the sessions that the mover closed
	sessions         int           // that the mover closed
	cut              int           // of these, those where client and backend did not both answer in time
	cancelled        int           // sessions that stayed: a later change moved them back
	time             time.Duration // since sessions were free to move
	longestHold      time.Duration // the longest time that a namespace was held
	examples         []string      // the first maxMovedNames of the namespaces, by name
}

// moveReporter is an overrideSource that reports moves.
type moveReporter interface {
	// reportMove reports a move that ended. It must not block for long.
	reportMove(moveResult)
}

// newMoveTally returns a tally without sessions.
func newMoveTally(ownersHash uint64) *moveTally {
	return &moveTally{ownersHash: ownersHash, prepared: time.Now(), namespaces: map[string]struct{}{}}
}

// close starts the closing handshake of a session with closeSession, and counts the session.
// It returns false, and counts nothing, if the session ends already. It calls onLast each time
// that no handshake of the tally is left that goes on. onLast must not block.
func (t *moveTally) close(
	s *session, closeSession func(s *session, onEnd func(cut bool)) bool, onLast func(),
) bool {
	t.unfinished.Add(1)
	onEnd := func(cut bool) {
		if cut {
			t.cuts.Add(1)
		}
		if t.unfinished.Add(-1) == 0 {
			onLast()
		}
	}
	if !closeSession(s, onEnd) {
		t.unfinished.Add(-1)
		return false
	}
	t.sessions++
	t.namespaces[s.namespace] = struct{}{}
	return true
}

// result returns the result of a tally so far, without examples.
func (t *moveTally) result() moveResult {
	r := moveResult{
		overridesVersion: t.overridesVersion, ownersHash: t.ownersHash, planned: t.planned, began: t.prepared,
		namespaces: len(t.namespaces), sessions: t.sessions,
		cut: int(t.cuts.Load()), cancelled: t.cancelled, longestHold: t.longestHold,
	}
	if !t.began.IsZero() {
		r.began, r.time = t.began, time.Since(t.began)
	}
	return r
}

// examples returns the first maxMovedNames of the namespaces, by name.
func (t *moveTally) examples() []string {
	all := slices.Sorted(maps.Keys(t.namespaces))
	return slices.Clone(all[:min(len(all), maxMovedNames)])
}
