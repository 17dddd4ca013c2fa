package main

import (
	"slices"
	"time"
)

// allPlaces is above the place of every namespace.
const allPlaces = 1 << 63

// placeOf returns the place, of a namespace whose hash64 is hash, in the order in which
// namespaces move: the upper 63 bits of hash. So the order is the same on all routers, and
// does not depend on the backends.
func placeOf(hash uint64) uint64 { return hash >> 1 }

// mark says which namespaces have moved to the table of its record. Its sets are sorted
// ordinals. {upto: allPlaces / 2, away: [3], scaledIn: [5]} says: the first half of all
// namespaces has moved, and all namespaces of backend 5, but none of those that backend 3
// gets.
type mark struct {
	upto     uint64 // those with a place below it: 0 to allPlaces
	away     []int  // but none of those whose new owner is one of these: it is not there yet
	scaledIn []int  // and all of those whose previous owner is one of these: it was scaled in
}

// isComplete reports whether no namespace is left to move.
func (m *mark) isComplete() bool { return m.upto == allPlaces && len(m.away) == 0 }

// isEmpty reports whether no namespace has moved.
func (m *mark) isEmpty() bool { return m.upto == 0 && len(m.scaledIn) == 0 }

// equal reports whether both marks cover the same namespaces.
func (m *mark) equal(other *mark) bool {
	return m.upto == other.upto &&
		slices.Equal(m.away, other.away) && slices.Equal(m.scaledIn, other.scaledIn)
}

// covers reports whether a namespace with this place has moved from its previous owner to
// its new one. The previous owner may be unresolved.
func (m *mark) covers(place uint64, previous, next int) bool {
	if slices.Contains(m.away, next) {
		return false
	}
	return place < m.upto || slices.Contains(m.scaledIn, previous)
}

// planRecord is a table of a plan, and which namespaces have their owners from it.
type planRecord struct {
	ownersHash uint64 // table.ownersHash
	before     mark   // of the namespaces that have moved to the table, until the step is done
	after      mark   // of the namespaces that have moved to it, once the step is done
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

// isAtRest reports whether the only table is the one with this ownersHash. The step that made
// it so may still be under way.
func (p *handoffPlan) isAtRest(ownersHash uint64) bool {
	return len(p.records) == 1 && p.records[0].ownersHash == ownersHash
}

// What a plan has at most. A further table has to wait until all namespaces have moved to the
// newest one of the plan: see handoffPlan.nextOwnersHash.
const (
	maxPlanTables = 3 // one that comes again after another counts again
	maxRecords    = 6 // so three tables have room for three additional records
)

// tableCount returns how many tables follow each other in p. A table may have several records.
func (p *handoffPlan) tableCount() (count int) {
	for i, r := range p.records {
		if i == 0 || r.ownersHash != p.records[i-1].ownersHash {
			count++
		}
	}
	return count
}

// withoutEmpty returns p without its newest record, if no namespace has moved to that: next
// drops it.
func (p *handoffPlan) withoutEmpty() *handoffPlan {
	if last := len(p.records) - 1; last > 0 && p.newestRecord().after.isEmpty() {
		return &handoffPlan{records: p.records[:last]}
	}
	return p
}

// isFull reports whether the plan can take no further table: namespaces have moved to the
// last one that it can have.
func (p *handoffPlan) isFull() bool { return p.withoutEmpty().tableCount() >= maxPlanTables }

// needsRecord reports whether the newest table needs an additional record before the owners in
// away can be away, and no others. hasRoom reports whether p has room for it. The tables that
// may still come have their room in any case, so that no edit waits for an owner that is away.
func (p *handoffPlan) needsRecord(away []int) (needs, hasRoom bool) {
	newest := p.newestRecord()
	needs = !newest.after.isComplete() && !slices.Equal(newest.after.away, away)
	return needs, len(p.records)+maxPlanTables-p.tableCount() < maxRecords
}

// hasToWait reports whether the next step towards the table with this ownersHash, while these
// owners are away, moves no further place: another owner is away than before, and the plan has
// no room for a record that says so.
func (p *handoffPlan) hasToWait(ownersHash uint64, away []int) bool {
	p = p.withoutEmpty()
	newest := p.newestRecord()
	if len(p.records) == 1 || newest.ownersHash != ownersHash {
		return false
	}
	needs, hasRoom := p.needsRecord(away)
	return needs && !hasRoom && len(intersection(away, newest.after.away)) < len(away)
}

// nextOwnersHash returns the ownersHash of the table to which the next step moves namespaces,
// when the newest table of the routers has this ownersHash: that of the newest table, or
// if the plan is full, of the plan's newest record.
func (p *handoffPlan) nextOwnersHash(ownersHash uint64) uint64 {
	if p.isFull() {
		return p.newestRecord().ownersHash
	}
	return ownersHash
}

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

// next returns the plan after p. Its step hands over the namespaces that m covers, to their
// owners in the table with this ownersHash. The view of the new plan holds these namespaces: their
// old owners must have ended all sessions and requests before the new owners get clients.
//
// If nothing has moved to the newest table yet, that table is dropped. If other owners are away
// than in the step before, next adds a record of the newest table, if there is room. Its mark is
// empty at first. So the namespaces that waited for an owner that is back move at the pace too,
// and those that have moved to an owner that is away now stay with it. Without room, an owner
// that is back gets all its namespaces in one step. While another one is away, no further place
// moves then. Once the newest table covers everything, before the step and after it, it becomes
// the only one.
func (p *handoffPlan) next(ownersHash uint64, m mark, now time.Time) *handoffPlan {
	done := &handoffPlan{records: p.doneRecords()}
	next := &handoffPlan{step: stepAbove(p.step, now), records: done.withoutEmpty().records}
	if next.isAtRest(ownersHash) {
		return next
	}
	newest := next.newestRecord()
	switch needs, hasRoom := next.needsRecord(m.away); {
	case len(next.records) == 1, newest.ownersHash != ownersHash, needs && hasRoom:
		next.records = append(next.records, planRecord{ownersHash: ownersHash})
	case next.hasToWait(ownersHash, m.away):
		m.upto = newest.after.upto
	}
	next.setMark(m)
	return next
}

// setMark sets the mark of the newest record, which covers no less than before: once it covers
// anything, no owner becomes away. If the record covers everything before the step and after
// it, it becomes the only one.
func (p *handoffPlan) setMark(m mark) {
	newest := p.newestRecord()
	if !newest.before.isEmpty() {
		m.away = intersection(newest.before.away, m.away)
	}
	m.upto = max(m.upto, newest.before.upto)
	newest.after = m
	if newest.before.isComplete() && newest.after.isComplete() {
		p.records = []planRecord{{ownersHash: newest.ownersHash}}
	}
}

// intersection returns the elements of a that b has too.
func intersection(a, b []int) []int {
	return slices.DeleteFunc(slices.Clone(a), func(ordinal int) bool { return !slices.Contains(b, ordinal) })
}

// union returns the sorted elements of both sets.
func union(a, b []int) []int {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// nextBounded returns the plan after p, as next does, for a router whose newest table has this
// ownersHash. If p is full, no table is added until the newest one covers everything. Once an
// ordinal is in scaledIn, it is never removed. The caller sets the step.
func (p *handoffPlan) nextBounded(ownersHash uint64, m mark, now time.Time) *handoffPlan {
	ownersHash = p.nextOwnersHash(ownersHash)
	if newest := p.newestRecord(); newest.ownersHash == ownersHash {
		m.scaledIn = union(m.scaledIn, newest.after.scaledIn)
	}
	return p.next(ownersHash, m, now)
}

// isSame reports whether next moves no namespace, and has the tables of p.
func (p *handoffPlan) isSame(next *handoffPlan) bool {
	return slices.EqualFunc(p.records, next.records, func(a, b planRecord) bool {
		return a.ownersHash == b.ownersHash && a.after.equal(&b.after)
	})
}

// ownerState is what a view knows of a namespace.
type ownerState int

const (
	stateOwned      ownerState = iota // it has an owner
	stateHeld                         // it moves to another owner: clients wait
	stateUnresolved                   // it is kept, and its previous owner is not known
	stateNoView                       // there is no view yet: nothing is known of any namespace
	stateNotKnown                     // only other routers may know the owner: nobody is admitted
)

// assignment is what a view says of a namespace to those who ask for its owner.
type assignment struct {
	state ownerState
	owner int    // ordinal of the owner; of the next one if the namespace is held
	stamp string // of the table that has it
	step  int64  // of the view's plan
}

// queueOrdinal returns the ordinal of the dial queue in which a request of the namespace has to
// wait: unresolved if it has none, since it has no owner or there is no view.
func (a assignment) queueOrdinal() int {
	switch a.state {
	case stateOwned:
		return a.owner
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
	tables     []*table  // of the records; nil for one that this router does not have
	done       bool      // nothing of the step is left, with -handoff=all on all routers
	admitsNone bool      // this process may serve nobody: requests wait, until -hold
	began      time.Time // when this router put the step in force
}

// newView returns the view of a plan that has the table alone, and a step above that of
// old, which may be nil.
func newView(t *table, old *view, now time.Time) *view {
	last := int64(0)
	if old != nil {
		last = old.step
	}
	return &view{
		handoffPlan: &handoffPlan{
			step: stepAbove(last, now), records: []planRecord{{ownersHash: t.ownersHash}},
		},
		tables: []*table{t},
		done:   true,
		began:  now,
	}
}

// knowsAll reports whether this router has the tables of all records.
func (v *view) knowsAll() bool { return !slices.Contains(v.tables, nil) }

// next returns the view of the plan after v's, in which the namespaces that m covers have
// moved to t. v must be done.
func (v *view) next(t *table, m mark, now time.Time) *view {
	next := &view{handoffPlan: v.handoffPlan.next(t.ownersHash, m, now), began: now}
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
		next.tables = []*table{next.tables[0].withKept(v.after)}
		next.done = true
	}
	return next
}

// wouldChange reports whether next would make another plan than v's.
func (v *view) wouldChange(ownersHash uint64, m *mark) bool {
	return !v.isSame(v.handoffPlan.next(ownersHash, *m, time.Time{}))
}

// scaledInOwners returns the ordinals, sorted, of the backends that a table of v has, and t
// has not: they were scaled in.
func (v *view) scaledInOwners(t *table) (ordinals []int) {
	for _, old := range v.tables {
		for i := range old.backends.count {
			if ordinal := old.backends.first + i; !t.backends.has(ordinal) {
				ordinals = append(ordinals, ordinal)
			}
		}
	}
	slices.Sort(ordinals)
	return slices.Compact(ordinals)
}

// mustLeave reports whether all that the backend has of the namespace has to be over
// before the step is done: the namespace has another owner after it. If its owner is
// unresolved here, it stays, unless this backend was scaled in: other routers may know that
// the namespace was with it, and give it to another.
func (v *view) mustLeave(namespace string, backend int) bool {
	if !v.mayChange(hash64(namespace)) {
		return false
	}
	owner := v.after(namespace)
	if owner == unresolved {
		return slices.ContainsFunc(v.records, func(r planRecord) bool {
			return slices.Contains(r.after.scaledIn, backend)
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
	r := v.newestRecord()
	if !slices.Equal(r.before.away, r.after.away) || !slices.Equal(r.before.scaledIn, r.after.scaledIn) {
		return true
	}
	return r.before.upto <= placeOf(hash) && placeOf(hash) < r.after.upto
}

// owner returns what v knows of the namespace. ordinal is the owner if it has one, and
// the next one if it is held. t is the table that has it, nil if there is none. A router
// that is not a member of the hand-off, or that lacks the table, does not know whether
// others have the namespace open: it admits nobody.
func (v *view) owner(namespace string) (ordinal int, t *table, state ownerState) {
	switch {
	case v.admitsNone:
		return unresolved, nil, stateNotKnown
	case len(v.tables) == 1 && !v.allHeld && v.tables[0] != nil:
		ordinal, ok := v.tables[0].wantedOwner(namespace)
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
		m := markOf(&v.records[i+1])
		if newer == nil {
			if placeOf(hash) < m.upto || len(m.scaledIn) > 0 {
				ordinal, t = ownerNotKnown, nil
			}
			continue
		}
		next, kept := newer.lookup(namespace, hash)
		if !kept && m.covers(placeOf(hash), ordinal, next) {
			ordinal, t = next, newer
		}
	}
	return ordinal, t
}
