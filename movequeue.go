package main

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"
)

// requeueInterval is how old a queue may be: sessions that are new have to move too.
const requeueInterval = time.Second

// moveQueue has the sessions that have to move, sorted by place. The mover's run owns it.
type moveQueue struct {
	sessions []queuedSession
	filledAt time.Time
	size     atomic.Int64 // len(sessions), for all goroutines
}

// queuedSession is a session that has to move.
type queuedSession struct {
	session *session
	place   uint64 // of its namespace
	target  int    // the new owner; session.backend if only its pod is another
}

// changesOwner reports whether the session moves to another owner, and not only to
// another pod of its owner.
func (q *queuedSession) changesOwner() bool { return q.target != q.session.backend }

// fill replaces the queue. It returns how many sessions of the queue before are open and
// need not move any more.
func (m *moveQueue) fill(sessions []queuedSession, now time.Time) (cancelled int) {
	queued := map[*session]bool{}
	for _, q := range sessions {
		queued[q.session] = true
	}
	for _, q := range m.sessions {
		if !queued[q.session] && !q.session.isEnding() {
			cancelled++
		}
	}
	slices.SortFunc(sessions, func(a, b queuedSession) int {
		return cmp.Compare(a.place, b.place)
	})
	m.set(sessions)
	m.filledAt = now
	return cancelled
}

// set makes sessions, which are sorted by place, the queue.
func (m *moveQueue) set(sessions []queuedSession) {
	m.sessions = sessions
	m.size.Store(int64(len(sessions)))
}

// isOutdated reports whether the queue has to be filled anew. An empty one has not.
func (m *moveQueue) isOutdated(now time.Time) bool {
	return len(m.sessions) > 0 && now.Sub(m.filledAt) >= requeueInterval
}

// targets returns the new owners of the sessions.
func (m *moveQueue) targets() map[int]bool {
	targets := map[int]bool{}
	for _, q := range m.sessions {
		targets[q.target] = true
	}
	return targets
}

// count returns how many sessions have this new owner.
func (m *moveQueue) count(target int) (n int) {
	for _, q := range m.sessions {
		if q.target == target {
			n++
		}
	}
	return n
}

// split returns two lists: the sessions that may move in the step at the given time, and
// the rest. It sets next.upto to the place of the first session that the pace holds back,
// and calls p.advance for each session that the pace counts. All sessions of a namespace
// move in one step. If ready is false, only sessions whose owner was scaled in may move; those
// of them behind the first session that the pace holds back are in the rest too, though the
// mark covers them and the step closes them. split does not change the queue.
func (m *moveQueue) split(
	next *mark, ready bool, p *pace, at time.Time,
) (due, rest []queuedSession) {
	last := uint64(allPlaces) // the place of the last session that the pace has counted
	for i, q := range m.sessions {
		switch {
		case q.session.isEnding():
		case q.changesOwner() && slices.Contains(next.away, q.target):
			rest = append(rest, q)
		case q.changesOwner() && slices.Contains(next.scaledIn, q.session.backend):
			due = append(due, q)
		case q.place != last && (!ready || p.next().After(at)):
			next.upto = q.place
			return due, append(rest, m.sessions[i:]...)
		default:
			last, due = q.place, append(due, q)
			p.advance(at)
		}
	}
	return due, rest
}
