package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	minStepTime    = 100 * time.Millisecond // between steps that close sessions: see stepTime
	turnInterval   = 150 * time.Millisecond // between two turns: see member.turn
	answerWait     = 150 * time.Millisecond // how long an answer may wait: see member.answerWithStep
	objectShowTime = time.Second            // from a write until the object has to show it
	maxPodListAge  = 2 * time.Second        // how old a list of pods may be
	offerTime      = 2 * time.Minute        // see member.offered
)

// member decides what this router does next in the hand-off, by what it knows of the plan. It is
// there also before the router has joined the members, and after it was removed from them:
// memberView says which is the case. It does no I/O and reads no clock.
//
// The caller calls setNewest, noteBackendStep and expireOffers with what is new, and then
// decide, again and again. Before the caller carries out what decide returns, it calls commit.
// The caller sends one write at a time. Only the view of the last actAdopt says whom to admit.
type member struct {
	// Static after construction.
	name, uid string // of the pod
	instance  string // of the process: random

	view        *memberView // that is in force in this router; nil before the first plan
	highestStep int64       // the highest step that was in force, or that a backend has sent in a 409
	newest      *table      // its own; nil before the first
	newestAt    time.Time   // when its ownersHash was set

	// offered has the tables that this router has named in an answer, by ownersHash. While
	// the answer is in the object, or a write of it may still arrive, all routers may
	// move to the table. It is forgotten offerTime after the object had an answer with
	// another one.
	offered map[uint64]*offeredTable

	lastAnswer    stepAnswer    // the last one that was sent
	answerWrite   *handoffWrite // the write of that; nil if there was none
	answeredAt    time.Time     // when it was sent
	stepAdoptedAt time.Time     // when the view got its step
	rejectedEpoch string        // epoch of the last plan that did not follow; "" if there was none

	// A conditional write has a version as its precondition: the API server refuses it when
	// the object has another one.
	conditionalWrite  *handoffWrite // the last one that was sent; nil if there was none
	conditionalWrites int           // how many were sent
	conditionalAt     time.Time     // when the last one was sent
}

// offeredTable is a table that all routers may move to.
type offeredTable struct {
	*table
	// withdrawn is when the object had an answer with another table; zero if it had not.
	withdrawn time.Time
}

// memberView is the view of a plan in the object.
type memberView struct {
	*view
	plan         *sharedPlan
	uid, version string // of the object
	mustAnswer   bool   // the plan needs the answers of this router
}

// newMember returns the member of the pod with this name and UID, and of the process with
// this instance. It has no view and no table.
func newMember(name, uid, instance string) *member {
	return &member{
		name: name, uid: uid, instance: instance, offered: map[uint64]*offeredTable{},
	}
}

// stepProgress is how far this router has come with its view's step, and what it proposes
// for the step after.
type stepProgress struct {
	hasWork  bool      // it has sessions, or requests that a backend may have got
	doneHere bool      // nothing of the step is left here: see mover.workOnStep
	limit    stepLimit // of the step after, towards view.nextTable
	toMove   int       // sessions that have to move and that the rate counts, also those within limit
}

// podList is a LIST of all router pods, which was begun after a LIST of the object had
// returned the version that it names.
type podList struct {
	uid, version string // of the object
	at           time.Time
	pods         map[string]routerPod // by name
}

// decisionInput is all that a decision depends on, except for what the member knows.
type decisionInput struct {
	stepProgress
	now         time.Time
	object      *handoffObject  // never older than before; nil if there is none, or none was read
	seenAt      time.Time       // when this version was seen first
	list        *podList        // the last one; nil if there was none
	leaving     bool            // the router admits nobody any more, and ends
	wantedRange *versionedRange // the range of backends that the plan should have; nil if not known
	// gone reports whether GET said that the pod with this UID has ended for ever: see
	// memberID.isGone.
	gone func(uid string) bool
}

// action is what a router has to do next.
type action int

const (
	actWait   action = iota // wait until something changes or it is decision.again
	actAdopt                // put decision.view in force
	actList                 // LIST the object, and after that the router pods
	actEndAll               // end all sessions: the others go on without this router
	actWrite                // send decision.write
)

// decision is what a router has to do next. After each action but actWait it decides
// again; if a write or a list fails, after a back-off of its own.
type decision struct {
	action action
	view   *memberView   // of actAdopt
	write  *handoffWrite // of actWrite
	answer *stepAnswer   // that is part of write; nil if none is
	doing  string        // for people: what the router does, or waits for
	again  time.Time     // of actWait; zero if only when something changes
}

// waiting returns the decision to wait until something changes.
func waiting(format string, args ...any) decision {
	return decision{doing: fmt.Sprintf(format, args...)}
}

// setNewest sets this router's own table. A nil table is none.
func (m *member) setNewest(t *table, now time.Time) {
	isSame := t != nil && m.newest != nil && t.ownersHash == m.newest.ownersHash
	if m.newest = t; !isSame {
		m.newestAt = now
	}
}

// noteBackendStep notes a step that a backend has sent in a 409: the next step is above it.
func (m *member) noteBackendStep(step int64) { m.highestStep = max(m.highestStep, step) }

// expireOffers notes which offered tables a version of the object shows to be no longer needed.
func (m *member) expireOffers(o *handoffObject, now time.Time) {
	a := o.answers[m.name]
	isOwn := a.instance == m.instance
	for ownersHash, offer := range m.offered {
		switch {
		case m.newest != nil && m.newest.ownersHash == ownersHash,
			m.view.recordOf(ownersHash) >= 0, isOwn && a.ownersHash == ownersHash:
			offer.withdrawn = time.Time{}
		case offer.withdrawn.IsZero() && isOwn && a.ownersHash != noTableHash:
			offer.withdrawn = now
		case !offer.withdrawn.IsZero() && now.Sub(offer.withdrawn) >= offerTime:
			delete(m.offered, ownersHash)
		}
	}
}

// recordOf returns the index of the view's record of the table with this ownersHash, -1 if
// there is none. v may be nil.
func (v *memberView) recordOf(ownersHash uint64) int {
	if v == nil {
		return -1
	}
	return slices.IndexFunc(v.records, func(r planRecord) bool {
		return r.ownersHash == ownersHash
	})
}

// commit notes that the caller is about to carry out d. It counts a write as sent before it
// is: a write may arrive although it seems to fail.
func (m *member) commit(d decision, now time.Time) {
	if d.view != nil {
		if m.view == nil || m.view.step != d.view.step {
			m.stepAdoptedAt = now
		}
		m.view = d.view
		m.highestStep = max(m.highestStep, d.view.step)
	}
	if d.answer != nil {
		m.lastAnswer, m.answerWrite, m.answeredAt = *d.answer, d.write, now
	}
	if d.write != nil && d.write.version != "" {
		m.conditionalWrite, m.conditionalAt = d.write, now
		m.conditionalWrites++
	}
	if d.answer != nil && m.newest != nil && d.answer.ownersHash == m.newest.ownersHash {
		m.offered[d.answer.ownersHash] = &offeredTable{table: m.newest}
	}
}

// decide returns what to do now.
func (m *member) decide(in *decisionInput) decision {
	o := in.object
	switch {
	case m.view != nil && !m.view.mustAnswer && in.hasWork:
		return decision{action: actEndAll, doing: "this router was removed from the members, and ends its sessions"}
	case o == nil:
		return waiting("the object of the hand-off does not exist, or has not been read yet")
	case o.planVersionErr != nil:
		return waiting("the plan is of routers of another version, and is left as it is: %v",
			o.planVersionErr)
	case o.plan != nil && m.follows(o):
		if m.hasChanged(o) {
			v := m.viewOf(o)
			return decision{action: actAdopt, view: v, doing: "this router is adopting the plan"}
		}
	case m.view == nil:
		return m.bootstrap(in)
	default:
		if o.plan != nil {
			m.rejectedEpoch = o.plan.epoch
		}
		return m.reset(in)
	}
	if in.leaving && !in.hasWork && in.doneHere {
		return m.leave(in)
	}
	wait := decision{}
	for _, try := range []func(*decisionInput) decision{
		m.join, m.sendAnswer, m.remove, m.storeRange, m.writeStep,
	} {
		d := try(in)
		if d.action != actWait {
			return d
		}
		wait.again = earliest(wait.again, d.again)
		if d.doing != "" {
			wait.doing = d.doing
		}
	}
	return wait
}

// follows reports whether the plan of o comes after the plan of the view, or there is no
// view. Any other plan is not to be trusted: the object was deleted, emptied or restored.
func (m *member) follows(o *handoffObject) bool {
	v := m.view
	if v == nil {
		return true
	}
	switch {
	case o.plan.epoch == m.rejectedEpoch:
		return false // whoever wrote it since has continued what did not follow
	case o.uid != v.uid || o.plan.epoch != v.plan.epoch:
		return o.plan.step > m.highestStep
	case o.plan.writes == v.plan.writes && o.version != v.version:
		return o.plan.String() == v.plan.String() // else somebody has continued an old copy
	}
	return o.plan.writes >= v.plan.writes && o.plan.step >= v.step
}

// hasChanged reports whether the view of o's plan is another than the present one: it is of
// another version of the object, or more of its tables are known.
func (m *member) hasChanged(o *handoffObject) bool {
	v := m.view
	if v == nil || v.uid != o.uid || v.version != o.version {
		return true
	}
	for i, t := range v.tables {
		if t == nil && m.table(v.records[i].ownersHash) != nil {
			return true
		}
	}
	return false
}

// viewOf returns the view of o's plan. A step that is done stays so: a late patch may
// replace an answer by an older one, but the answer was given.
func (m *member) viewOf(o *handoffObject) *memberView {
	p, prev := o.plan, m.view
	id, isNamed := p.members[m.name]
	next := &memberView{
		view: &view{handoffPlan: &p.handoffPlan, changing: p.changingPlaces()},
		plan: p, uid: o.uid, version: o.version,
	}
	if isNamed && id.UID == m.uid {
		next.mustAnswer = id.Instance == m.instance || id.Instance == unknownInstance
	}
	next.servesNone = !next.mustAnswer || id.Instance != m.instance
	for _, r := range p.records {
		next.tables = append(next.tables, m.table(r.ownersHash))
	}
	next.tables[0] = m.oldestTable(next)
	wasDone := prev != nil && prev.done &&
		prev.uid == o.uid && prev.plan.epoch == p.epoch && prev.step == p.step
	next.done = wasDone || len(o.missing()) == 0
	return next
}

// table returns the table with this ownersHash, nil if it is not known.
func (m *member) table(ownersHash uint64) *table {
	if m.newest != nil && m.newest.ownersHash == ownersHash {
		return m.newest
	}
	if offer := m.offered[ownersHash]; offer != nil {
		return offer.table
	}
	if i := m.view.recordOf(ownersHash); i >= 0 {
		return m.view.tables[i]
	}
	return nil
}

// oldestTable returns the table of next's oldest record, nil if it is not known. The owner of a
// kept namespace in that table comes from earlier tables. Only routers that were members when
// the record became the oldest one know it: those whose last view has the same oldest record,
// or is of the step just before, in the same epoch. For all other routers the namespace is
// unresolved: for one that was no member then, and after a reset also for a member that had
// come further than the router that has reset the plan. So members never take different owners.
func (m *member) oldestTable(next *memberView) *table {
	t, prev := next.tables[0], m.view
	if t == nil {
		return nil
	}
	since := next.plan.oldestSince
	if prev != nil && prev.mustAnswer && next.mustAnswer {
		switch was := prev.plan.oldestSince; {
		case since == was && prev.tables[0] != nil:
			return prev.tables[0]
		case since.Epoch == prev.plan.epoch && since.Step > prev.step:
			return t.withKept(prev.after)
		}
	}
	return t.withKept(func(string) int { return unresolved })
}

// answer returns what this router says of the view's step once nothing of it is left.
func (m *member) answer(in *decisionInput) stepAnswer {
	v := m.view
	a := stepAnswer{instance: m.instance, epoch: v.plan.epoch, step: v.step}
	if m.newest != nil {
		a.ownersHash = m.newest.ownersHash
	}
	switch {
	case m.newest == nil || !v.knowsAll():
		a.lacksTables = true
	case v.hasOnlyTable(a.ownersHash):
		a.limit = stepLimit{upto: allPlaces}
	default:
		a.limit, a.toMove = in.limit, in.toMove
	}
	return a
}

// sendAnswer sends the answer of a member, if the object does not have it. It is
// a patch of this router's key without a version: nobody else writes the key. It may
// arrive late, and says then what was true of an earlier step. It may be part of the write
// of the next step instead: see answerWithStep.
func (m *member) sendAnswer(in *decisionInput) decision {
	if !m.view.mustAnswer {
		return decision{}
	}
	if !in.doneHere {
		return m.waitForStep()
	}
	a := m.answer(in)
	if has, ok := in.object.answers[m.name]; ok && has.equal(&a) {
		return decision{}
	}
	if again := m.answeredAt.Add(objectShowTime); m.isUnderWay(in.object, &a) && in.now.Before(again) {
		return decision{doing: "this router's answer is under way", again: again}
	}
	if d, ok := m.answerWithStep(in, &a); ok {
		return d
	}
	data := map[string]string{m.key(): a.String()}
	return decision{
		action: actWrite, answer: &a, doing: fmt.Sprintf("this router is answering step %d", a.step),
		write: &handoffWrite{uid: in.object.uid, data: data},
	}
}

// isUnderWay reports whether a write of the answer may still arrive. One with a version
// does not once the object has another one.
func (m *member) isUnderWay(o *handoffObject, a *stepAnswer) bool {
	w := m.answerWrite
	return w != nil && w.uid == o.uid && (w.version == "" || w.version == o.version) &&
		a.equal(&m.lastAnswer)
}

// answerWithStep decides whether the answer goes with the next step: one write in place of two,
// with no other write in between. It does so only until the present step and the newest table are
// answerWait old: at once if all other members have answered and the next step can begin now. If
// only answers of others are missing, the first router by name waits for them. In all other cases
// ok is false, and the answer goes alone.
func (m *member) answerWithStep(in *decisionInput, a *stepAnswer) (d decision, ok bool) {
	until := latest(m.newestAt, m.stepAdoptedAt).Add(answerWait)
	if !in.now.Before(until) {
		return decision{}, false
	}
	if d = m.writeStepWith(in.withAnswers(a, m.name), a); d.action == actWrite {
		return d, true
	}
	members := slices.Sorted(maps.Keys(m.view.plan.members))
	if m.name != members[0] || slices.Equal(in.object.missing(), []string{m.name}) {
		return decision{}, false
	}
	d = m.writeStepWith(in.withAnswers(a, members...), a)
	return decision{again: until}, d.action == actWrite
}

// withAnswers returns a copy of the input in which the object has the answer for each of these
// members, as if it were theirs.
func (in *decisionInput) withAnswers(a *stepAnswer, members ...string) *decisionInput {
	with, object := *in, *in.object
	with.object, object.answers = &object, maps.Clone(in.object.answers)
	for _, pod := range members {
		answer := *a
		answer.instance = object.plan.members[pod].Instance
		object.answers[pod] = answer
	}
	return &with
}

// key returns the key of this router's answer.
func (m *member) key() string { return answerKeyPrefix + m.name }

// turn returns when this router may write what each of the named routers may write. Their
// turns follow each other in the order of their names, turnInterval apart. So mostly the
// first one writes, and nobody has a conflict. A router that is not named comes last.
func (m *member) turn(in *decisionInput, names []string) time.Time {
	rank := slices.Index(slices.Sorted(slices.Values(names)), m.name)
	if rank < 0 {
		rank = len(names)
	}
	return in.seenAt.Add(time.Duration(rank) * turnInterval)
}

// writePlan returns the decision to write p, if the object has not changed meanwhile,
// once it is the given time. a is this router's answer if it is part of the write. The
// keys of routers that are not members go.
func (m *member) writePlan(
	in *decisionInput, p *sharedPlan, a *stepAnswer, at time.Time, doing string,
) decision {
	next := *p
	next.writes++
	data := map[string]string{planKey: next.String()}
	if a != nil {
		data[m.key()] = a.String()
	}
	var remove []string
	for _, pod := range in.object.pods {
		if _, isMember := p.members[pod]; !isMember {
			remove = append(remove, answerKeyPrefix+pod)
		}
	}
	return m.writeIf(in, &handoffWrite{data: data, remove: remove}, a, at, doing)
}

// writeIf returns the decision to do a write, if the object has not changed meanwhile,
// once it is the given time. After one write it waits for the next version, or
// objectShowTime.
func (m *member) writeIf(
	in *decisionInput, w *handoffWrite, a *stepAnswer, at time.Time, doing string,
) decision {
	w.uid, w.version = in.object.uid, in.object.version
	last := m.conditionalWrite
	if last != nil && last.uid == w.uid && last.version == w.version {
		at = latest(at, m.conditionalAt.Add(objectShowTime))
	}
	if in.now.Before(at) {
		return decision{doing: doing, again: at}
	}
	return decision{action: actWrite, write: w, answer: a, doing: doing}
}

// leave removes this router from the members: it has no session, and admits none.
func (m *member) leave(in *decisionInput) decision {
	p := m.view.plan
	if id, ok := p.members[m.name]; !ok || id.UID != m.uid {
		return waiting("this router has left")
	}
	return m.writePlan(in, p.withMember(m.name, nil), nil, in.now, "this router is leaving")
}

// join makes this router a member, once it has a table, in place of a container or a pod of the
// same name before it: these have ended, or this one would not run. Until it has a table, it
// removes them. A router that was removed, and lives on, joins once it has done what the step
// asks of it, which is nothing once the step is done: its answer is part of the write. It has
// proposed nothing yet, so its answer lets the next step hand over nothing.
func (m *member) join(in *decisionInput) decision {
	p := m.view.plan
	id, isNamed := p.members[m.name]
	isUnknown := isNamed && id.UID == m.uid && id.Instance == unknownInstance
	switch {
	case !m.view.servesNone || in.leaving:
		return decision{}
	case m.newest == nil && isNamed && !isUnknown:
		next := p.withMember(m.name, nil)
		return m.writePlan(in, next, nil, in.now, "this router is removing the container before it")
	case m.newest == nil:
		return waiting("this router has no table")
	case !in.doneHere:
		return m.waitForStep()
	}
	if d, ok := m.needsOwnPod(in); !ok {
		return d
	}
	a := m.answer(in)
	next := p.withMember(m.name, &memberID{m.uid, m.instance})
	return m.writePlan(in, next, &a, in.now, "this router is joining")
}

// waitForStep returns the decision to wait until the view's step is done in this router.
func (m *member) waitForStep() decision {
	return waiting("what this router had in step %d is not over, or not released", m.view.step)
}

// remove removes a member whose pod has ended for ever.
func (m *member) remove(in *decisionInput) decision {
	p := m.view.plan
	if m.view.servesNone {
		return decision{}
	}
	var alive []string
	dead := ""
	for _, pod := range slices.Sorted(maps.Keys(p.members)) {
		switch {
		case pod != m.name && in.gone(p.members[pod].UID):
			dead = pod
		case p.members[pod].Instance != unknownInstance:
			alive = append(alive, pod)
		}
	}
	if dead == "" {
		return decision{}
	}
	return m.writePlan(in, p.withMember(dead, nil), nil, m.turn(in, alive), "this router is removing "+dead)
}

// isGone reports whether the pod that has the member's name now proves that the member's
// processes have ended. A phase alone proves nothing: the garbage collector of pods
// writes it, too.
func (id memberID) isGone(pod routerPod) bool { return pod.uid != id.UID || pod.provenEnded }

// storeRange writes into the plan which backends own namespaces, if this router has a newer
// range. It changes nothing else: all that see it make new tables.
func (m *member) storeRange(in *decisionInput) decision {
	p := m.view.plan
	if m.view.servesNone || in.wantedRange == nil || !in.wantedRange.replaces(p.backendRange) {
		return decision{}
	}
	next := *p
	next.backendRange = in.wantedRange
	at := m.turn(in, slices.Collect(maps.Keys(p.members)))
	return m.writePlan(in, &next, nil, at, "this router is storing the number of backends")
}

// writeStep writes the next step, after the answer of this router.
func (m *member) writeStep(in *decisionInput) decision { return m.writeStepWith(in, nil) }

// writeStepWith writes the next step, once all members have answered the one before and have
// the same table. A router that does not have all tables of the plan lets others write.
// If no router has them all, the newest table becomes the only one, and all namespaces
// are held until all have answered. a is this router's answer, nil if it is not part of the
// write.
func (m *member) writeStepWith(in *decisionInput, a *stepAnswer) decision {
	o, v := in.object, m.view
	if v.servesNone || m.newest == nil {
		return decision{}
	}
	if missing := o.missing(); len(missing) > 0 {
		return waiting("%s has not answered step %d", strings.Join(missing, ", "), v.step)
	}
	agreed, writers, allLackTables, err := o.agreedLimit(m.newest.ownersHash)
	if err != nil {
		return waiting("%v", err)
	}
	next := &handoffPlan{allHeld: true, records: []planRecord{newRecord(m.newest)}}
	at := in.seenAt
	switch {
	case allLackTables:
		writers = v.plan.knownMembers()
	case !v.knowsAll():
		return waiting("this router does not know all tables of step %d", v.step)
	default:
		next = v.nextPlan(v.nextTable(m.newest), agreed, in.now)
		backendIsAhead := m.highestStep > v.step // a backend has answered a later step
		if v.plan.isUnchangedIn(next) && !backendIsAhead {
			return waiting("")
		}
		if len(next.records) > 1 {
			at = m.nextStepTime()
		}
	}
	at = latest(at, m.turn(in, writers))
	p := *v.plan
	p.handoffPlan = *next
	p.step = stepAbove(m.highestStep, in.now)
	if allLackTables || len(next.records) == 1 && len(v.records) > 1 {
		p.oldestSince = planStep{p.epoch, p.step}
	}
	return m.writePlan(in, &p, a, at, fmt.Sprintf("this router is writing step %d", p.step))
}

// nextStepTime returns when the step after the view's can begin, if that moves namespaces.
func (m *member) nextStepTime() time.Time {
	return m.stepAdoptedAt.Add(stepTime(len(m.view.plan.members)))
}

// stepTime returns how long a step that moves namespaces lasts at least, with this many
// routers: minStepTime for up to three, and a third of that more for each further one.
func stepTime(routers int) time.Duration {
	return minStepTime * time.Duration(max(3, routers)) / 3
}

// agreedLimit returns how far the next step may go: as far as all members allow that know
// the tables of the plan. writers are the members among them whose process is known, sorted;
// allLackTables is true if no member knows the tables. agreedLimit returns an error if a member
// does not have the table with this ownersHash. A pod of unknownInstance that has no table, and
// so cannot join, is not asked.
func (o *handoffObject) agreedLimit(
	ownersHash uint64,
) (agreed stepLimit, writers []string, allLackTables bool, err error) {
	agreed, allLackTables = stepLimit{upto: allPlaces}, true
	for _, pod := range slices.Sorted(maps.Keys(o.plan.members)) {
		a := o.answers[pod]
		isUnknown := o.plan.members[pod].Instance == unknownInstance
		switch {
		case isUnknown && a.ownersHash == noTableHash:
			continue
		case a.ownersHash != ownersHash:
			return agreed, nil, false, fmt.Errorf("%s has another table", pod)
		case a.lacksTables:
			continue
		}
		allLackTables = false
		agreed.upto = min(agreed.upto, a.limit.upto)
		agreed.away = append(agreed.away, a.limit.away...)
		if !isUnknown {
			writers = append(writers, pod)
		}
	}
	return agreed, writers, allLackTables, nil
}

// bootstrap is what a router without a view does where there is no plan. The router says so in
// its own key. When all router pods have said so, the first one by name that has a table makes
// the plan. Both are written only if the object is as seen: a late write would speak for a
// container that has a view by now. An answer in an old copy of the object, which somebody has
// restored, may speak for such a container, too. So all pods are members of the plan, and all
// namespaces are held until each member has answered.
func (m *member) bootstrap(in *decisionInput) decision {
	o := in.object
	a := stepAnswer{instance: m.instance, lacksTables: true}
	if m.newest != nil {
		a.ownersHash = m.newest.ownersHash
	}
	has := o.answers[m.name]
	if has.instance != m.instance || !has.isWithoutView() ||
		(has.ownersHash == noTableHash) != (a.ownersHash == noTableHash) {
		w := &handoffWrite{data: map[string]string{m.key(): a.String()}}
		return m.writeIf(in, w, &a, in.now, "this router is saying that it knows no plan")
	}
	if in.leaving {
		return waiting("there is no plan, and this router is leaving")
	}
	if m.newest == nil {
		return waiting("there is no plan, and this router has no table")
	}
	if d, ok := m.needsList(in); !ok {
		return d
	}
	p := &sharedPlan{backendRange: in.wantedRange, members: map[string]memberID{}}
	p.allHeld = true
	var writers []string
	for _, name := range slices.Sorted(maps.Keys(in.list.pods)) {
		pod := in.list.pods[name]
		switch said, ok := o.answers[name]; {
		case pod.provenEnded || !pod.scheduled:
		case !ok || !said.isWithoutView():
			return decision{again: in.list.at.Add(maxPodListAge),
				doing: fmt.Sprintf("there is no plan; waiting for %s to confirm that it has none", name)}
		case said.ownersHash == noTableHash:
			p.members[name] = memberID{pod.uid, unknownInstance}
		default:
			p.members[name] = memberID{pod.uid, said.instance}
			writers = append(writers, name)
		}
	}
	p.records = []planRecord{newRecord(m.newest)}
	m.startEpoch(p, in)
	p.oldestSince = planStep{p.epoch, p.step}
	first := stepAnswer{
		instance: m.instance, epoch: p.epoch, step: p.step,
		ownersHash: a.ownersHash, limit: stepLimit{upto: allPlaces},
	}
	return m.writePlan(in, p, &first, m.turn(in, writers), "this router is making the first plan")
}

// startEpoch gives p an epoch of its own, and a step above all that this router has seen. If the
// clock of this router is behind, an epoch that it has begun and not seen may have the same step.
func (m *member) startEpoch(p *sharedPlan, in *decisionInput) {
	last := m.highestStep
	if in.object.plan != nil {
		last = max(last, in.object.plan.step)
	}
	for _, a := range in.object.answers {
		last = max(last, a.step)
	}
	p.step = stepAbove(last, in.now)
	p.epoch = fmt.Sprintf("%s.%d.%d", m.instance, p.step, m.conditionalWrites)
}

// needsList reports whether there is a list of pods to decide by. If not, d is what to
// do. The list must be newer than the version that the write replaces. A router that
// becomes a member later then changes the version, and the write fails.
func (m *member) needsList(in *decisionInput) (d decision, ok bool) {
	l := in.list
	fresh := l != nil && l.uid == in.object.uid && l.version == in.object.version
	if !fresh || !in.now.Before(l.at.Add(maxPodListAge)) {
		return decision{action: actList, doing: "this router is listing the router pods"}, false
	}
	return m.needsOwnPod(in)
}

// needsOwnPod reports whether this router's pod was in the last list of router pods. If not, d is
// what to do. Others ask for the pod by its name, and a reset finds it in the list: they would go
// on without a member that has another name, or not the labels.
func (m *member) needsOwnPod(in *decisionInput) (d decision, ok bool) {
	l := in.list
	switch {
	case l != nil && l.pods[m.name].uid == m.uid:
		return decision{}, true
	case l == nil || !in.now.Before(l.at.Add(maxPodListAge)):
		return decision{action: actList, doing: "this router is listing the router pods"}, false
	}
	return decision{
		doing: fmt.Sprintf("no pod with the labels of -router-pods has this router's name %q (-pod-name) "+
			"and its -pod-uid", m.name),
		again: l.at.Add(maxPodListAge),
	}, false
}

// reset writes a new plan when the one in the object does not follow from ours: a new
// epoch with the owners of the view. All routers that may have a session are its members.
// All namespaces are held until all members have answered. The view of a router that is no
// member may be old, so it does not say who has the kept namespaces.
func (m *member) reset(in *decisionInput) decision {
	v := m.view
	if at := m.turn(in, slices.Collect(maps.Keys(v.plan.members))); in.now.Before(at) {
		return decision{doing: "this router is about to reset the plan", again: at}
	}
	if d, ok := m.needsList(in); !ok {
		return d
	}
	p := &sharedPlan{members: m.mergeMembers(in), backendRange: v.plan.backendRange}
	p.allHeld, p.records, p.oldestSince = true, v.doneRecords(), v.plan.oldestSince
	if m.startEpoch(p, in); !v.mustAnswer {
		p.oldestSince = planStep{p.epoch, p.step}
	}
	return m.writePlan(in, p, nil, in.now, "this router is resetting the plan")
}

// mergeMembers returns the members of a reset: those of the object, those of the view,
// and all router pods. If only the pod is known, or if the object and the view name
// different processes of it, the instance is unknownInstance: the answer of any process of
// the pod counts.
func (m *member) mergeMembers(in *decisionInput) map[string]memberID {
	merged := map[string]memberID{}
	add := func(members map[string]memberID) {
		for name, id := range members {
			before, ok := merged[name]
			pod := in.list.pods[name]
			switch {
			case !ok || before.UID != id.UID && id.UID == pod.uid:
				merged[name] = id
			case before.UID == id.UID && before.Instance != id.Instance,
				before.UID != id.UID && before.UID != pod.uid: // neither is the pod's: remove asks for it
				merged[name] = memberID{before.UID, unknownInstance}
			}
		}
	}
	add(m.view.plan.members)
	if in.object.plan != nil {
		add(in.object.plan.members)
	}
	for name, pod := range in.list.pods {
		id, ok := merged[name]
		if mayRun := pod.scheduled && !pod.provenEnded; mayRun && (!ok || id.UID != pod.uid) {
			merged[name] = memberID{pod.uid, unknownInstance}
		}
	}
	if id := merged[m.name]; !m.view.servesNone {
		merged[m.name] = memberID{m.uid, m.instance}
	} else if id.Instance != m.instance {
		merged[m.name] = memberID{m.uid, unknownInstance}
	}
	return merged
}

// rateShare returns this router's part of the rate, from 0 to 1: its part of the sessions
// that have to move, by the last answers. There must be a plan.
func (m *member) rateShare(o *handoffObject) float64 {
	all, own := 0, 0
	for pod := range o.plan.members {
		all += o.answers[pod].toMove
		if pod == m.name {
			own = o.answers[pod].toMove
		}
	}
	if all == 0 {
		return 1 / float64(max(1, len(o.plan.members)))
	}
	return float64(own) / float64(all)
}

// whyNotServing says why this router admits nobody, or not to all namespaces yet. "" means
// that it does. A namespace whose override is invalid counts for nothing.
func (m *member) whyNotServing() string {
	switch {
	case m.view == nil:
		return "there is no plan of the hand-off yet"
	case m.view.servesNone:
		return "this router is not a member of the hand-off yet"
	case !m.view.knowsAll():
		return "a change is under way, and this router does not know all its tables"
	}
	return ""
}
