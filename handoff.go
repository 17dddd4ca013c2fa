package main

import (
	"slices"
	"time"
)

// allPlaces is above the place of every namespace.
const allPlaces = 1 << 63

// placeOf returns the place of a namespace in the order in which namespaces move: the
// upper 63 bits of its hash64. So the order is the same on all routers, and random over
// the backends.
func placeOf(key uint64) uint64 { return key >> 1 }

// mark says which namespaces have moved to the table of its record.
type mark struct {
	upto uint64 // those with a place below it
	away []int  // but none of those whose new owner is one of these: it is not there yet
	gone []int  // and all of those whose previous owner is one of these: it will not return
}

// isComplete reports whether no namespace is left to move.
func (m *mark) isComplete() bool { return m.upto == allPlaces && len(m.away) == 0 }

// isEmpty reports whether no namespace has moved.
func (m *mark) isEmpty() bool { return m.upto == 0 && len(m.gone) == 0 }

// equal reports whether both marks cover the same namespaces.
func (m *mark) equal(other *mark) bool {
	return m.upto == other.upto &&
		slices.Equal(m.away, other.away) && slices.Equal(m.gone, other.gone)
}

// covers reports whether a namespace with this place has moved from its previous owner to
// its new one. The previous owner may be unresolved.
func (m *mark) covers(place uint64, previous, next int) bool {
	if slices.Contains(m.away, next) {
		return false
	}
	return place < m.upto || slices.Contains(m.gone, previous)
}

// planRecord is a table of a plan: the namespaces that was covered have their owners from
// it since before the plan's step, those that now covers once the step is done.
type planRecord struct {
	content  uint64 // table.contentHash
	was, now mark
}

// handoffPlan says how far a change of owners has come. The first record is in force for all
// namespaces that no later one covers; there is more than one only while a change is
// under way. A plan is immutable: each step makes a new one.
type handoffPlan struct {
	step    int64 // of this plan: above that of the plan before, and mostly Unix milliseconds
	records []planRecord
}

// newest returns the record of the table to which namespaces move.
func (p *handoffPlan) newest() *planRecord { return &p.records[len(p.records)-1] }

// isAtRest reports whether the only table is the one with this content.
func (p *handoffPlan) isAtRest(content uint64) bool {
	return len(p.records) == 1 && p.records[0].content == content
}

// maxRecords is how many tables a plan has at most. One more waits until the newest of
// these has come to its end (mover.targetTable).
const maxRecords = 3

// next returns the plan after p, in which the namespaces that m covers have moved to the
// table with this content. Each namespace that changes its owner by that has to be
// released by the owner that it has by p first: the view of the new plan holds it.
//
// A table of which nothing has moved makes room for the new one. When an owner is no longer
// away, the newest table follows itself if there is room: so the namespaces that waited for
// that owner move at the pace too. The newest table becomes the only one as soon as it
// covers everything, before the step and after it.
func (p *handoffPlan) next(content uint64, m mark, now time.Time) *handoffPlan {
	next := &handoffPlan{step: max(p.step+1, now.UnixMilli()), records: slices.Clone(p.records)}
	for i := range next.records {
		next.records[i].was = next.records[i].now
	}
	if len(next.records) > 1 && next.newest().now.isEmpty() {
		next.records = next.records[:len(next.records)-1]
	}
	if next.isAtRest(content) {
		return next
	}
	newest := next.newest()
	if len(next.records) == 1 || newest.content != content ||
		len(next.records) < maxRecords && returns(newest.now.away, m.away) {
		next.records = append(next.records, planRecord{content: content})
		newest = next.newest()
	}
	m.upto = max(m.upto, newest.was.upto)
	newest.now = m
	if newest.was.isComplete() && newest.now.isComplete() {
		next.records = []planRecord{{content: content}}
	}
	return next
}

// returns reports whether an owner of before is not in now.
func returns(before, now []int) bool {
	return slices.ContainsFunc(before, func(ordinal int) bool {
		return !slices.Contains(now, ordinal)
	})
}

// ownerState is what a view knows of a namespace.
type ownerState int

const (
	isOwned    ownerState = iota // it has an owner
	isHeld                       // it is being handed over to another owner: clients wait
	isUnknown                    // its override is invalid, and its previous owner is not known
	noTableYet                   // nothing is known of any namespace
)

// assignment is what a view says of a namespace to those who ask for its owner.
type assignment struct {
	state ownerState
	owner int    // ordinal of the owner; of the next one if the namespace is held
	stamp string // of the table that has it
	step  int64  // of the view's plan
}

// queue returns the queue in which an upgrade of the namespace has to wait.
func (a assignment) queue() int {
	switch a.state {
	case isOwned:
		return a.owner
	case isHeld:
		return queueHeld
	}
	return unresolved
}

// view is what decides about each namespace: a plan, the tables of its records, and
// whether the step is done. It is immutable, and its methods take no lock and allocate
// nothing.
type view struct {
	*handoffPlan
	tables []*table  // of the records
	done   bool      // all sessions and upgrades of the step are over
	began  time.Time // of the step
}

// newView returns the view of a plan that has the table alone, and a step above that of
// old, which may be nil.
func newView(t *table, old *view, now time.Time) *view {
	step := now.UnixMilli()
	if old != nil {
		step = max(step, old.step+1)
	}
	return &view{
		handoffPlan: &handoffPlan{step: step, records: []planRecord{{content: t.contentHash}}},
		tables:      []*table{t},
		done:        true,
		began:       now,
	}
}

// next returns the view of the plan after v's, in which the namespaces that m covers have
// moved to t. v must be done.
func (v *view) next(t *table, m mark, now time.Time) *view {
	next := &view{handoffPlan: v.handoffPlan.next(t.contentHash, m, now), began: now}
	switch last := len(next.records); {
	case last > len(v.records):
		next.tables = append(slices.Clip(v.tables), t)
	case last == len(v.records):
		next.tables = append(slices.Clone(v.tables[:last-1]), t)
	case last > 1:
		next.tables = v.tables[:last] // what began to move is taken back
	default:
		next.tables = []*table{t}
	}
	if len(next.records) == 1 {
		next.tables = []*table{next.tables[0].pinTo(v.after)}
		next.done = true
	}
	return next
}

// advances reports whether next would make another plan than v's.
func (v *view) advances(content uint64, m *mark) bool {
	newest := v.handoffPlan.newest()
	switch {
	case newest.content != content:
		return true
	case newest.now.isComplete():
		return true // it becomes the only table
	}
	raised := mark{upto: max(m.upto, newest.now.upto), away: m.away, gone: m.gone}
	return !newest.now.equal(&raised)
}

// goneOwners returns the ordinals, sorted, of the backends that own namespaces in v and
// not in t: they were scaled in.
func (v *view) goneOwners(t *table) (gone []int) {
	for _, old := range v.tables {
		for i := range old.backends.count {
			if ordinal := old.backends.first + i; !t.backends.has(ordinal) {
				gone = append(gone, ordinal)
			}
		}
	}
	slices.Sort(gone)
	return slices.Compact(gone)
}

// misplaces reports whether all that the backend has of the namespace has to be over
// before the step is done: the namespace has another owner after it.
func (v *view) misplaces(namespace string, backend int) bool {
	if len(v.records) == 1 || !v.mayChange(hash64(namespace)) {
		return false
	}
	owner := v.after(namespace)
	return owner != backend && owner != unresolved
}

// mayChange reports whether the owner of a namespace with this hash64 may change in the
// step. It costs less than to ask for both owners.
func (v *view) mayChange(key uint64) bool {
	r := v.handoffPlan.newest()
	if !slices.Equal(r.was.away, r.now.away) || !slices.Equal(r.was.gone, r.now.gone) {
		return true
	}
	return r.was.upto <= placeOf(key) && placeOf(key) < r.now.upto
}

// owner returns what v knows of the namespace. ordinal is the owner if it has one; the
// next one if it is held. t is the table that has it.
func (v *view) owner(namespace string) (ordinal int, t *table, state ownerState) {
	if len(v.tables) == 1 {
		ordinal, ok := v.tables[0].owner(namespace)
		if !ok {
			return ordinal, v.tables[0], isUnknown
		}
		return ordinal, v.tables[0], isOwned
	}
	ordinal, t = v.find(namespace, func(r *planRecord) *mark { return &r.now })
	switch {
	case ordinal == unresolved:
		state = isUnknown
	case !v.done && v.before(namespace) != ordinal:
		state = isHeld
	}
	return ordinal, t, state
}

// before returns the owner of the namespace until the step is done, or unresolved.
func (v *view) before(namespace string) int {
	ordinal, _ := v.find(namespace, func(r *planRecord) *mark { return &r.was })
	return ordinal
}

// after returns the owner of the namespace once the step is done, or unresolved.
func (v *view) after(namespace string) int {
	ordinal, _ := v.find(namespace, func(r *planRecord) *mark { return &r.now })
	return ordinal
}

// find returns the owner of the namespace by the marks of one kind, or unresolved, and
// the table that has it: the newest one that covers the namespace. A table in which the
// namespace is pinned covers nothing, since it does not say who the owner is.
func (v *view) find(
	namespace string, markOf func(*planRecord) *mark,
) (ordinal int, t *table) {
	key := hash64(namespace)
	t = v.tables[0]
	ordinal, _ = t.lookup(namespace, key)
	for i, newer := range v.tables[1:] {
		next, pinned := newer.lookup(namespace, key)
		if !pinned && markOf(&v.records[i+1]).covers(placeOf(key), ordinal, next) {
			ordinal, t = next, newer
		}
	}
	return ordinal, t
}
