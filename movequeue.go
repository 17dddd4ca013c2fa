package main

import (
	"cmp"
	"iter"
	"slices"
	"sync/atomic"
	"time"
)

// requeueInterval is how old a queue may be: sessions that are new have to move too.
const requeueInterval = time.Second

// moveQueue has the sessions that have to move. The mover's run owns it.
type moveQueue struct {
	sessions []queuedSession // that get another owner, sorted by place
	oldPod   []*session      // whose pod was replaced: they wait for no step; some get another owner too
	filledAt time.Time
	size     atomic.Int64 // how many sessions there are, for all goroutines
}

// queuedSession is a session that has to move to another owner.
type queuedSession struct {
	session *session
	place   uint64 // of its namespace; 0 if its owner was scaled in
	target  int    // the new owner
	oldPod  bool   // it is in moveQueue.oldPod too
}

// fill replaces the queue. It returns how many sessions of the queue before are open and
// need not move any more.
func (m *moveQueue) fill(
	sessions []queuedSession, oldPod []*session, now time.Time,
) (cancelled int) {
	queued := map[*session]bool{}
	for _, q := range sessions {
		queued[q.session] = true
	}
	for _, s := range oldPod {
		queued[s] = true
	}
	for s := range m.all() {
		if !queued[s] && !s.isEnding() {
			cancelled++
		}
	}
	slices.SortFunc(sessions, func(a, b queuedSession) int {
		return cmp.Compare(a.place, b.place)
	})
	m.set(sessions, oldPod)
	m.filledAt = now
	return cancelled
}

// set makes sessions, which are sorted by place, and oldPod the queue.
func (m *moveQueue) set(sessions []queuedSession, oldPod []*session) {
	m.sessions, m.oldPod = sessions, oldPod
	size := int64(0)
	for range m.all() {
		size++
	}
	m.size.Store(size)
}

// all returns all sessions of the queue, each once.
func (m *moveQueue) all() iter.Seq[*session] {
	return func(yield func(*session) bool) {
		for _, q := range m.sessions {
			if !q.oldPod && !yield(q.session) {
				return
			}
		}
		slices.Values(m.oldPod)(yield)
	}
}

// isEmpty reports whether no session is left.
func (m *moveQueue) isEmpty() bool { return len(m.sessions)+len(m.oldPod) == 0 }

// isOutdated reports whether the queue has to be filled anew. An empty one has not.
func (m *moveQueue) isOutdated(now time.Time) bool {
	return !m.isEmpty() && now.Sub(m.filledAt) >= requeueInterval
}

// countBelow returns how many sessions have a place below upto and a new owner that is not away.
func (m *moveQueue) countBelow(upto uint64, away []int) (n int) {
	for _, q := range m.sessions {
		if q.place < upto && !slices.Contains(away, q.target) {
			n++
		}
	}
	return n
}

// targets returns the owners that the sessions get, and those whose pod is another.
func (m *moveQueue) targets() map[int]bool {
	targets := map[int]bool{}
	for _, q := range m.sessions {
		targets[q.target] = true
	}
	for _, s := range m.oldPod {
		targets[s.backend] = true
	}
	return targets
}

// count returns how many sessions move to this target.
func (m *moveQueue) count(target int) (n int) {
	for _, q := range m.sessions {
		if q.target == target {
			n++
		}
	}
	for _, s := range m.oldPod {
		if s.backend == target {
			n++
		}
	}
	return n
}

// split returns two lists: the sessions that may move in the step at the given time, and the
// rest. It sets limit.upto to the place of the first session that the pace holds back, and calls
// p.advance for each session that the pace counts. All sessions of a namespace move in one step.
// If ready is false, only sessions whose owner was scaled in may move. split does not change the
// queue.
func (m *moveQueue) split(
	limit *stepLimit, ready bool, p *pace, at time.Time,
) (due, rest []queuedSession) {
	last := uint64(allPlaces) // the place of the last session that the pace has counted
	for i, q := range m.sessions {
		switch {
		case q.session.isEnding():
		case slices.Contains(limit.away, q.target):
			rest = append(rest, q)
		case q.place == 0:
			due = append(due, q)
		case q.place != last && (!ready || p.next().After(at)):
			limit.upto = q.place
			return due, append(rest, m.sessions[i:]...)
		default:
			last, due = q.place, append(due, q)
			p.advance(at)
		}
	}
	return due, rest
}
