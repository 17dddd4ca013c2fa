package main

import (
	"maps"
	"slices"
	"time"
)

// allPlaces is above the place of every namespace.
const allPlaces = 1 << 63

// placeOf returns the place, of a namespace whose hash64 is hash, in the order in which
// namespaces move: the upper 63 bits of hash, at least 1. So the order is the same on all
// routers, and does not depend on the backends. Place 0 is for namespaces that move first: see
// planRecord.place.
func placeOf(hash uint64) uint64 { return max(1, hash>>1) }

// mark says which namespaces have moved to the table of its record. {upto: allPlaces / 2,
// behind: {3: 0}} says: the first half of all namespaces has moved, but none of those that
// backend 3 gets.
type mark struct {
	upto   uint64         // those with a place below it: 0 to allPlaces
	behind map[int]uint64 // by new owner, if others are ahead of it: its own bound, below upto
}

// isComplete reports whether no namespace is left to move.
func (m *mark) isComplete() bool { return m.upto == allPlaces && len(m.behind) == 0 }

// isEmpty reports whether no namespace has moved.
func (m *mark) isEmpty() bool { return m.upto == 0 }

// equal reports whether both marks cover the same namespaces.
func (m *mark) equal(other *mark) bool {
	return m.upto == other.upto && maps.Equal(m.behind, other.behind)
}

// bound returns the place below which the namespaces have moved whose new owner this is.
func (m *mark) bound(owner int) uint64 {
	if bound, ok := m.behind[owner]; ok {
		return bound
	}
	return m.upto
}

// catchesUp reports whether an owner is behind that is not away.
func (m *mark) catchesUp(away []int) bool {
	for owner := range m.behind {
		if !slices.Contains(away, owner) {
			return true
		}
	}
	return false
}

// advanced returns the mark after m: once all namespaces that limit allows have advanced. No bound
// falls: what has advanced never goes back, also if its new owner is away now.
func (m *mark) advanced(limit stepLimit) mark {
	next := mark{upto: max(m.upto, limit.upto)}
	for _, owner := range slices.Concat(slices.Collect(maps.Keys(m.behind)), limit.away) {
		bound := m.bound(owner)
		if !slices.Contains(limit.away, owner) {
			bound = max(bound, limit.upto)
		}
		if bound < next.upto {
			if next.behind == nil {
				next.behind = map[int]uint64{}
			}
			next.behind[owner] = bound
		}
	}
	return next
}

// stepLimit says how far a step may go.
type stepLimit struct {
	upto uint64 // namespaces with a place below it may move: 0 to allPlaces
	away []int  // but none to the owners with these ordinals: they accept no connection
}

// planRecord is a table of a plan, and which namespaces have their owners from it.
type planRecord struct {
	ownersHash uint64       // table.ownersHash
	backends   ordinalRange // table.backends
	before     mark         // of the namespaces that have moved to the table, until the step is done
	after      mark         // of the namespaces that have moved to it, once the step is done
}

// newRecord returns the record of a table to which nothing has moved yet.
func newRecord(t *table) planRecord {
	return planRecord{ownersHash: t.ownersHash, backends: t.backends}
}

// place returns the place in this record of a namespace whose hash64 is hash. If its previous
// owner was scaled in, since the table does not have it, the namespace moves first: its place
// is 0. The previous owner may be unresolved or ownerNotKnown.
func (r *planRecord) place(hash uint64, previous int) uint64 {
	if isScaledIn := previous >= 0 && !r.backends.has(previous); isScaledIn {
		return 0
	}
	return placeOf(hash)
}

// isValidStep reports whether a step can lead from before to after: only in the newest record of a
// plan, and no bound falls.
func (r *planRecord) isValidStep(newest bool) bool {
	if !newest {
		return r.before.equal(&r.after)
	}
	for owner := range r.after.behind {
		if r.after.bound(owner) < r.before.bound(owner) {
			return false
		}
	}
	return r.before.upto <= r.after.upto
}

// handoffPlan says how far a change of owners has come. The first record is in force for
// all namespaces that no later one covers; there is more than one only while a change is
// under way. A plan is immutable: each step makes a new one.
type handoffPlan struct {
	step    int64 // above that of the plan before, and mostly Unix milliseconds
	allHeld bool  // the owners before this step are not known: all namespaces are held until it is done
	records []planRecord
}

// newestRecord returns the record of the table to which namespaces move.
func (p *handoffPlan) newestRecord() *planRecord { return &p.records[len(p.records)-1] }

// hasOnlyTable reports whether the only table is the one with this ownersHash. The step that
// made it so may still be under way: view.done says whether it is over.
func (p *handoffPlan) hasOnlyTable(ownersHash uint64) bool {
	return len(p.records) == 1 && p.records[0].ownersHash == ownersHash
}

// maxRecords is how many records a plan has at most. A further table has to wait until all
// namespaces have moved to the newest one of the plan: see view.nextTable.
const maxRecords = 3

// startedRecords returns the records of p without the newest one, if no namespace has moved to
// that.
func (p *handoffPlan) startedRecords() []planRecord {
	if last := len(p.records) - 1; last > 0 && p.newestRecord().after.isEmpty() {
		return p.records[:last]
	}
	return p.records
}

// isFull reports whether the plan can take no further table.
func (p *handoffPlan) isFull() bool { return len(p.startedRecords()) >= maxRecords }

// stepAbove returns the number of a step that begins now: the time in Unix milliseconds, or
// last+1 if that is more.
func stepAbove(last int64, now time.Time) int64 { return max(last+1, now.UnixMilli()) }

// doneRecords returns the records of p once its step is done.
func (p *handoffPlan) doneRecords() []planRecord {
	records := slices.Clone(p.records)
	for i := range records {
		records[i].before = records[i].after
	}
	return records
}

// next returns the plan after p. Its step hands over namespaces, as far as limit allows, to
// their owners in the table of target. The view of the new plan holds these namespaces: their
// old owners must have ended all sessions and requests before the new owners get clients. target
// is the newRecord of view.nextTable.
//
// If nothing has moved to the newest table yet, that table is dropped. Once the newest table
// covers everything, before the step and after it, it becomes the only one.
func (p *handoffPlan) next(target planRecord, limit stepLimit, now time.Time) *handoffPlan {
	started := &handoffPlan{records: p.startedRecords()}
	next := &handoffPlan{step: stepAbove(p.step, now), records: started.doneRecords()}
	if next.hasOnlyTable(target.ownersHash) {
		return next
	}
	if len(next.records) == 1 || next.newestRecord().ownersHash != target.ownersHash {
		next.records = append(next.records, target)
	}
	newest := next.newestRecord()
	newest.after = newest.before.advanced(limit)
	if newest.before.isComplete() && newest.after.isComplete() {
		next.records = []planRecord{{ownersHash: newest.ownersHash, backends: newest.backends}}
	}
	return next
}

// placeRange has the places from from to below to. The zero value has none.
type placeRange struct{ from, to uint64 }

// changingPlaces returns a range with the places of all namespaces whose owner changes in p's
// step, if the owners before it are known.
func (p *handoffPlan) changingPlaces() placeRange {
	r := p.newestRecord()
	if len(p.records) == 1 || r.before.equal(&r.after) {
		return placeRange{}
	}
	from := r.before.upto
	for owner, bound := range r.before.behind {
		if bound < r.after.bound(owner) {
			from = min(from, bound)
		}
	}
	if from == 0 && p.hasScaledIn() { // such a namespace has place 0 in the record, whatever its placeOf is
		return placeRange{0, allPlaces}
	}
	return placeRange{from, r.after.upto}
}

// hasScaledIn reports whether an earlier table has backends that the newest one has not.
func (p *handoffPlan) hasScaledIn() bool {
	newest := p.newestRecord().backends
	return slices.ContainsFunc(p.records, func(r planRecord) bool {
		return !newest.has(r.backends.first) || !newest.has(r.backends.first+r.backends.count-1)
	})
}

// isUnchangedIn reports whether next moves no namespace, and has the tables of p.
func (p *handoffPlan) isUnchangedIn(next *handoffPlan) bool {
	return slices.EqualFunc(p.records, next.records, func(a, b planRecord) bool {
		return a.ownersHash == b.ownersHash && a.after.equal(&b.after)
	})
}

// ownerState is what a view knows of a namespace.
type ownerState int

const (
	stateOwned      ownerState = iota // it has an owner
	stateHeld                         // it moves to another owner: clients wait
	stateUnresolved                   // it is kept, and its previous owner is not known or was scaled in
	stateNoView                       // there is no view yet: nothing is known of any namespace
	stateNotKnown                     // only other routers may know the owner: nobody is admitted
)

// assignment is what a view says of a namespace to those who ask for its owner.
type assignment struct {
	state   ownerState
	backend int    // ordinal of the owner; of the next one if the namespace is held
	stamp   string // of the table that has it
	step    int64  // of the view's plan
}

// queueOrdinal returns the ordinal of the dial queue in which a request of the namespace has to
// wait: unresolved if it has none, since it has no owner or there is no view.
func (a assignment) queueOrdinal() int {
	switch a.state {
	case stateOwned:
		return a.backend
	case stateHeld, stateNotKnown:
		return queueHeld
	}
	return unresolved
}

// view says who owns each namespace now: it is a plan, with the tables of its records, and
// whether the step is done. It is immutable, and the methods that requests call take no lock
// and allocate nothing.
type view struct {
	*handoffPlan
	tables     []*table   // of the records; nil for one that this router does not have
	done       bool       // nothing of the step is left, with -handoff=all on all routers
	servesNone bool       // this process may serve nobody: requests wait, until -hold
	began      time.Time  // when this router put the step in force
	changing   placeRange // handoffPlan.changingPlaces
}

// newView returns the view of a plan that has the table alone, and a step above that of
// old, which may be nil.
func newView(t *table, old *view, now time.Time) *view {
	last := int64(0)
	if old != nil {
		last = old.step
	}
	return &view{
		handoffPlan: &handoffPlan{step: stepAbove(last, now), records: []planRecord{newRecord(t)}},
		tables:      []*table{t},
		done:        true,
		began:       now,
	}
}

// knowsAll reports whether this router has the tables of all records.
func (v *view) knowsAll() bool { return !slices.Contains(v.tables, nil) }

// nextTable returns the table to which the next step moves namespaces, when t is the newest
// table of the routers: t, or if the plan is full, the plan's newest one. It is nil if this
// router does not have that.
func (v *view) nextTable(t *table) *table {
	if v.isFull() {
		return v.tables[len(v.tables)-1]
	}
	return t
}

// nextPlan returns the plan after v's: its step moves namespaces to t, as far as limit allows.
// v must know all its tables, and t be its nextTable.
func (v *view) nextPlan(t *table, limit stepLimit, now time.Time) *handoffPlan {
	return v.handoffPlan.next(newRecord(t), limit, now)
}

// wouldChange reports whether nextPlan would return another plan than v's.
func (v *view) wouldChange(t *table, limit stepLimit) bool {
	return !v.isUnchangedIn(v.nextPlan(t, limit, time.Time{}))
}

// next returns the view of nextPlan. v must be done.
func (v *view) next(t *table, limit stepLimit, now time.Time) *view {
	next := &view{handoffPlan: v.nextPlan(t, limit, now), began: now}
	next.changing = next.handoffPlan.changingPlaces()
	switch last := len(next.records); {
	case last > len(v.records):
		next.tables = append(slices.Clip(v.tables), t)
	case last == len(v.records):
		next.tables = append(slices.Clone(v.tables[:last-1]), t)
	case last > 1:
		next.tables = v.tables[:last] // t is back, and nothing has moved to the newest one
	default:
		next.tables = []*table{t}
	}
	if len(next.records) == 1 {
		next.tables = []*table{next.tables[0].withKept(v.after)}
		next.done = true
	}
	return next
}

// mustLeave reports whether all that the backend has of the namespace has to be over before the
// step is done: the namespace has another owner after it. If this router does not know that
// owner, nothing has to be over, unless this backend was scaled in: other routers may know that
// it had the namespace, and give that to another.
func (v *view) mustLeave(namespace string, backend int) bool {
	if !v.mayChange(hash64(namespace)) {
		return false
	}
	owner := v.after(namespace)
	if owner == unresolved {
		return slices.ContainsFunc(v.records, func(r planRecord) bool {
			return !r.after.isEmpty() && !r.backends.has(backend)
		})
	}
	return owner != backend
}

// mayChange reports whether the owner of a namespace with this hash64 may change in the
// step, or is not known. It costs less than to ask for both owners.
func (v *view) mayChange(hash uint64) bool {
	switch {
	case v.allHeld || !v.knowsAll():
		return true
	case len(v.records) == 1:
		return false
	}
	place := placeOf(hash)
	return v.changing.from <= place && place < v.changing.to
}

// owner returns what v knows of the namespace. ordinal is the owner if it has one, and
// the next one if it is held. t is the table that has it, nil if there is none. A router
// that is not a member of the hand-off, or that lacks the table, does not know whether
// others have the namespace open: it admits nobody.
func (v *view) owner(namespace string) (ordinal int, t *table, state ownerState) {
	switch {
	case v.servesNone:
		return unresolved, nil, stateNotKnown
	case len(v.tables) == 1 && !v.allHeld && v.tables[0] != nil:
		ordinal, ok := v.tables[0].ownerOf(namespace)
		if !ok {
			return ordinal, v.tables[0], stateUnresolved
		}
		return ordinal, v.tables[0], stateOwned
	}
	ordinal, t = v.find(namespace, func(r *planRecord) *mark { return &r.after })
	switch {
	case ordinal == ownerNotKnown:
		state = stateNotKnown
	case ordinal == unresolved:
		state = stateUnresolved
	case !v.done && (v.allHeld || v.before(namespace) != ordinal):
		state = stateHeld
	}
	return ordinal, t, state
}

// before returns the owner of the namespace until the step is done, unresolved, or
// ownerNotKnown.
func (v *view) before(namespace string) int {
	if v.allHeld {
		return ownerNotKnown
	}
	ordinal, _ := v.find(namespace, func(r *planRecord) *mark { return &r.before })
	return ordinal
}

// after returns the owner of the namespace once the step is done, unresolved, or
// ownerNotKnown.
func (v *view) after(namespace string) int {
	ordinal, _ := v.find(namespace, func(r *planRecord) *mark { return &r.after })
	return ordinal
}

// find returns the owner of the namespace by the marks of one kind, unresolved, or
// ownerNotKnown, and the table that has it: the newest one whose mark covers the
// namespace. A table in which the namespace is kept is skipped, since it does not say who
// the owner is. If a table is not known here, the owner is ownerNotKnown where its mark
// could cover the namespace.
func (v *view) find(
	namespace string, markOf func(*planRecord) *mark,
) (ordinal int, t *table) {
	hash := hash64(namespace)
	if ordinal, t = ownerNotKnown, v.tables[0]; t != nil {
		ordinal, _ = t.lookup(namespace, hash)
	}
	for i, newer := range v.tables[1:] {
		r := &v.records[i+1]
		m := markOf(r)
		if newer == nil {
			if r.place(hash, ordinal) < m.upto {
				ordinal, t = ownerNotKnown, nil
			}
			continue
		}
		next, kept := newer.lookup(namespace, hash)
		if !kept && r.place(hash, ordinal) < m.bound(next) {
			ordinal, t = next, newer
		}
	}
	return ordinal, t
}
