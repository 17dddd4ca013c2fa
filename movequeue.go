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
	paced    atomic.Int64 // how many of these the rate counts: all with a place above 0, and oldPod
}

// queuedSession is a session that has to move to another owner.
type queuedSession struct {
	session *session
	place   uint64 // of its namespace; 0 if its owner was scaled in
	target  int    // the new owner
	oldPod  bool   // it is in moveQueue.oldPod too
}

// fill replaces the queue. It returns how many sessions of the queue before stay, since a later
// change moved them back. One whose backend has ended its side neither moves nor stays.
func (q *moveQueue) fill(
	sessions []queuedSession, oldPod []*session, now time.Time,
) (cancelled int) {
	isQueued := map[*session]bool{}
	for _, item := range sessions {
		isQueued[item.session] = true
	}
	for _, s := range oldPod {
		isQueued[s] = true
	}
	for s := range q.all() {
		if !isQueued[s] && !s.isEnding() && !s.backendDone.Load() {
			cancelled++
		}
	}
	slices.SortFunc(sessions, func(a, b queuedSession) int {
		return cmp.Compare(a.place, b.place)
	})
	q.set(sessions, oldPod)
	q.filledAt = now
	return cancelled
}

// set makes sessions, which are sorted by place, and oldPod the queue.
func (q *moveQueue) set(sessions []queuedSession, oldPod []*session) {
	q.sessions, q.oldPod = sessions, oldPod
	size, paced := int64(len(oldPod)), int64(len(oldPod))
	for _, item := range sessions {
		if item.oldPod {
			continue
		}
		size++
		if item.place > 0 {
			paced++
		}
	}
	q.size.Store(size)
	q.paced.Store(paced)
}

// all returns all sessions of the queue, each once.
func (q *moveQueue) all() iter.Seq[*session] {
	return func(yield func(*session) bool) {
		for _, item := range q.sessions {
			if !item.oldPod && !yield(item.session) {
				return
			}
		}
		slices.Values(q.oldPod)(yield)
	}
}

// isEmpty reports whether no session is left.
func (q *moveQueue) isEmpty() bool { return len(q.sessions)+len(q.oldPod) == 0 }

// isOutdated reports whether the queue has to be filled anew. An empty one has not.
func (q *moveQueue) isOutdated(now time.Time) bool {
	return !q.isEmpty() && now.Sub(q.filledAt) >= requeueInterval
}

// countBelow returns how many sessions that the rate counts have a place below upto, and a new
// owner that is not away.
func (q *moveQueue) countBelow(upto uint64, away []int) (n int) {
	for _, item := range q.sessions {
		if 0 < item.place && item.place < upto && !slices.Contains(away, item.target) {
			n++
		}
	}
	return n
}

// targets returns the owners that the sessions get, and the backends whose pod was replaced.
func (q *moveQueue) targets() map[int]bool {
	targets := map[int]bool{}
	for _, item := range q.sessions {
		targets[item.target] = true
	}
	for _, s := range q.oldPod {
		targets[s.backend] = true
	}
	return targets
}

// count returns how many sessions move to this target.
func (q *moveQueue) count(target int) (n int) {
	for _, item := range q.sessions {
		if item.target == target {
			n++
		}
	}
	for _, s := range q.oldPod {
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
func (q *moveQueue) split(
	limit *stepLimit, ready bool, p *pace, at time.Time,
) (due, rest []queuedSession) {
	last := uint64(allPlaces) // the place of the last session that the pace has counted
	for i, item := range q.sessions {
		switch {
		case item.session.isEnding():
		case slices.Contains(limit.away, item.target):
			rest = append(rest, item)
		case item.place == 0:
			due = append(due, item)
		case item.place != last && (!ready || p.next().After(at)):
			limit.upto = item.place
			if len(rest) == 0 {
				return due, q.sessions[i:] // mostly; the queue may be long
			}
			return due, append(rest, q.sessions[i:]...)
		default:
			last, due = item.place, append(due, item)
			p.advance(at)
		}
	}
	return due, rest
}
