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

// moveResult is what one router's moves to one table came to, or have come to so far, for the
// log, the Events and operators.
type moveResult struct {
	overridesVersion string        // of the table
	ownersHash       uint64        // of the table; noTableHash if it is not known
	planned          int           // sessions that had to move in all: the most that mover.prepare has counted
	began            time.Time     // when sessions were free to move; when it was prepared, if none was
	namespaces       int           // of the sessions that the mover closed
	sessions         int           // that the mover closed
	cut              int           // of these, those where client and backend did not both answer in time
	cancelled        int           // sessions that stayed: a later change moved them back
	time             time.Duration // since sessions were free to move
	longestHold      time.Duration // the longest time that a namespace was held
	examples         []string      // the first maxMovedNames of the namespaces, by name
}

// moveTally counts the sessions that moved to one table, in one step or many. The mover's
// run owns it, except for the atomic fields.
type moveTally struct {
	moveResult                     // so far, without what result adds
	isFree     bool                // sessions were free to move
	closed     map[string]struct{} // namespaces of the closed sessions

	unfinished atomic.Int64 // sessions whose closing handshake goes on
	cuts       atomic.Int64 // sessions whose closing handshake was cut
}

// moveReporter is an overrideSource that reports moves.
type moveReporter interface {
	// reportMove reports a move that ended. It must not block for long.
	reportMove(moveResult)
}

// newMoveTally returns a tally without sessions.
func newMoveTally(ownersHash uint64) *moveTally {
	return &moveTally{
		moveResult: moveResult{ownersHash: ownersHash, began: time.Now()},
		closed:     map[string]struct{}{},
	}
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
	t.closed[s.namespace] = struct{}{}
	return true
}

// begin notes that sessions are free to move.
func (t *moveTally) begin(now time.Time) {
	if !t.isFree {
		t.isFree, t.began = true, now
	}
}

// result returns the result of a tally so far, without examples.
func (t *moveTally) result() moveResult {
	r := t.moveResult
	r.namespaces, r.cut = len(t.closed), int(t.cuts.Load())
	if t.isFree {
		r.time = time.Since(t.began)
	}
	return r
}

// movedNames returns the first maxMovedNames of the namespaces, by name.
func (t *moveTally) movedNames() []string {
	all := slices.Sorted(maps.Keys(t.closed))
	return slices.Clone(all[:min(len(all), maxMovedNames)])
}
