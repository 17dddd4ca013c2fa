package main

import (
	"slices"
	"sync/atomic"
	"time"
)

// moved is the receipt of a change.
type moved struct {
	version    string // of the table
	namespaces int    // that left their old owner, with sessions
	sessions   int    // of these
	cut        int    // of these, which did not part in time
	cancelled  int    // sessions that stay, since a later change took this one back
	time       time.Duration
}

// wave is the sessions that one settled change of the table moves.
type wave struct {
	moved
	begun time.Time
	left  int                 // sessions whose turn is to come
	names map[string]struct{} // of the namespaces

	parting atomic.Int64 // sessions that are not over
	cuts    atomic.Int64
}

// turn is a session that is to move. Its place is the hash of its namespace, so
// that all sessions of one move in a row, and at about the same time in all
// routers: they are apart, some with the old owner and some with the new one, for
// as short as can be. To the old owners and the new ones the order is a random one.
type turn struct {
	session *session
	wave    *wave
	place   uint64
}

// send makes the session of t part.
func (m *mover) send(t turn) {
	c := t.wave
	c.left--
	m.waiting.Add(-1)
	c.parting.Add(1)
	over := func(cut bool) {
		if cut {
			c.cuts.Add(1)
		}
		if c.parting.Add(-1) == 0 {
			nudge(m.over)
		}
	}
	if !m.part(t.session, over) { // it has just ended
		c.parting.Add(-1)
		return
	}
	c.sessions++
	c.names[t.session.namespace] = struct{}{}
}

// drop takes note that the session of t need not move any more.
func (m *mover) drop(t turn) {
	t.wave.left--
	m.waiting.Add(-1)
	if !t.session.ending() {
		t.wave.cancelled++
	}
}

// receipts writes the receipts of the waves whose sessions are over.
func (m *mover) receipts() {
	m.waves = slices.DeleteFunc(m.waves, func(c *wave) bool {
		if c.left > 0 || c.parting.Load() > 0 {
			return false
		}
		c.namespaces, c.cut, c.time = len(c.names), int(c.cuts.Load()), time.Since(c.begun)
		m.log.Info("moved", "version", c.version, "namespaces", c.namespaces, "sessions", c.sessions,
			"seconds", c.time.Seconds(), "cut", c.cut, "cancelled", c.cancelled)
		if m.told != nil {
			m.told(c.moved)
		}
		return true
	})
}
