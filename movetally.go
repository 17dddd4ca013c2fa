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

// moveReceipt is what one router's moves to one table came to, or have come to so far, for
// the log, the Events and operators. It is immutable. The status of all routers has their
// receipts of the same table added up: see add.
type moveReceipt struct {
	OverridesVersion string    `json:"overrides_version"` // of the table
	OwnersHash       string    `json:"owners_hash"`       // of the table: the first half of its stamp
	Began            time.Time `json:"began"`             // when sessions were free to move; before that, when the move was prepared
	Seconds          float64   `json:"seconds"`           // since sessions were free to move
	Planned          int       `json:"planned"`           // sessions that had to move in all: see moveTally
	Moved            int       `json:"moved"`             // sessions that the mover closed
	Namespaces       int       `json:"namespaces"`        // of these
	// Examples has the first maxMovedNames of the namespaces, by name.
	Examples    []string `json:"examples,omitempty"`
	Cut         int      `json:"cut"`          // of the moved: client and backend did not both answer in time
	Cancelled   int      `json:"cancelled"`    // sessions that stayed: a later change moved them back
	HeldSeconds float64  `json:"held_seconds"` // the longest time that a namespace was held
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

// begin notes that sessions are free to move.
func (t *moveTally) begin(now time.Time) {
	if t.began.IsZero() {
		t.began = now
	}
}

// receipt returns the receipt of a tally so far, without Examples.
func (t *moveTally) receipt() moveReceipt {
	r := moveReceipt{
		OverridesVersion: t.overridesVersion, OwnersHash: hex64(t.ownersHash).String(), Began: t.prepared,
		Planned: t.planned, Moved: t.sessions, Namespaces: len(t.namespaces),
		Cut: int(t.cuts.Load()), Cancelled: t.cancelled, HeldSeconds: t.longestHold.Seconds(),
	}
	if !t.began.IsZero() {
		r.Began, r.Seconds = t.began, time.Since(t.began).Seconds()
	}
	return r
}

// examples returns the first maxMovedNames of the namespaces, by name.
func (t *moveTally) examples() []string {
	all := slices.Sorted(maps.Keys(t.namespaces))
	return slices.Clone(all[:min(len(all), maxMovedNames)])
}
