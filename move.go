package main

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// maxSettleFactor times settleTime is the longest wait for a table that stays.
const maxSettleFactor = 10

// mover decides who owns a namespace now, and brings the router from one table to the
// next in steps. In each step some namespaces are handed over: the mover closes their
// sessions with their previous owner, and holds their clients until these sessions, and
// the requests that this owner may have got, are over. So a namespace never has two
// owners (invariant 2). The sessions of all other namespaces stay.
//
// Namespaces move in the order of their places (placeOf). A step takes as many sessions as
// the rate allows, and all namespaces before the first session that has to wait. Namespaces
// whose previous owner was scaled in go at once. Those whose new owner accepts no connection
// stay with their previous owner, for maxAwayTime at most.
//
// With -handoff=all, shared decides when there is a step, and which. With -handoff=off
// there are no steps: new clients get the owner of the newest table at once.
type mover struct {
	// Static after construction.
	tables     *tableStore
	relay      *relay
	handoffOff bool          // -handoff=off
	settleTime time.Duration // time without a change of the table before sessions move
	// moveInterval is the time between two moves, of all routers with -handoff=all; 0: no
	// pause.
	moveInterval time.Duration
	// closeSession is session.closeGracefully.
	closeSession  func(s *session, onEnd func(cut bool)) bool
	onViewChanged func() // the view has changed; must not block
	// reportMove gets each move that is over. It must not block for long. nil: nobody is told.
	reportMove func(moveReceipt)
	flights    *flights
	releases   *stepReleases // nil without -release
	// httpMoveTimeout is how old a plain request may become when a step waits for it, or with
	// -handoff=off when its owner changed; 0: it is cut at once.
	httpMoveTimeout time.Duration
	shared          *sharedHandoff // nil without -handoff=all
	ages            ageSweep
	stepDurations   *histogram // of the steps that are done
	log             *slog.Logger

	// current is nil before the first view. Only run replaces it, except the first view, and
	// with -handoff=off.
	current atomic.Pointer[view]

	tableChanged wakeup       // of run, by tableOrPodChanged
	wake         wakeup       // of run, when there may be something to do
	awaitsEnd    atomic.Bool  // run waits for something of a step to be over
	stepsDone    atomic.Int64 // steps that are done
	moved        atomic.Int64 // sessions that moveSession has closed
	cancelled    atomic.Int64 // sessions that stayed: a later change moved them back
	backendStep  atomic.Int64 // the highest step that a backend has sent in a 409: see noteStep
	leaving      atomic.Bool  // see leave

	moving   atomic.Pointer[moveReceipt]   // the move under way, so far; nil for none
	receipts atomic.Pointer[[]moveReceipt] // the last maxReceipts that are over, newest first

	// Owned by run.
	pace         pace
	firstChange  time.Time    // of the changes that have not settled
	settlesAt    time.Time    // when these will have settled
	lastClosedAt time.Time    // when sessions were last closed: by the begin of a step, or by closeWithoutStep
	tally        *moveTally   // of the move under way; nil for none
	finishing    []*moveTally // whose last closing handshakes go on
	queue        moveQueue
	targets      *moveTargets
	stepSessions []*session      // sessions that the step still waits for
	mustPrepare  bool            // prepareNewest was called while the next table was not known here
	waitsForPace bool            // there are sessions of the next step that only wait for the pace
	oldPodsWait  bool            // there are sessions of moveQueue.oldPod that only wait for the pace
	lastDoneHere int64           // the last step of which nothing is left in this router; a reset has a higher one
	lastProposal *stepProposal   // the last, which may be in this router's answer; nil for none
	ctx          context.Context // of run
}

// newMover returns a mover that moves rate sessions per second, or all at once if rate is
// 0. probe dials a backend and returns nil if it accepted the connection. onViewChanged
// is called when the view has changed, and must not block. The caller runs the mover.
func newMover(
	tables *tableStore, relay *relay, rate int,
	probe func(ctx context.Context, backend int) error, onViewChanged func(), log *slog.Logger,
) *mover {
	m := &mover{
		tables:        tables,
		relay:         relay,
		log:           log,
		tableChanged:  newWakeup(),
		wake:          newWakeup(),
		onViewChanged: onViewChanged,
		flights:       newFlights(relay.backendName, log),
		targets:       newMoveTargets(probe),
		stepDurations: newHistogram(.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60),
		closeSession: func(s *session, onEnd func(cut bool)) bool {
			return s.closeGracefully(causeMoved, onEnd)
		},
	}
	m.ages.close = func(s *session) bool { return s.closeGracefully(causeMaxAge, nil) }
	if rate > 0 {
		m.moveInterval = time.Second / time.Duration(rate)
	}
	m.pace.interval, m.ages.pace.interval = m.moveInterval, m.moveInterval
	m.flights.onEnd, relay.onBackendDone = m.somethingEnded, m.somethingEnded
	return m
}

// tableOrPodChanged makes run look for sessions to move: the router has a new table, or the
// pod of a backend was replaced. When it returns, the first table is in force, and with
// -handoff=off each table; with -handoff=all none need be. It does not block.
func (m *mover) tableOrPodChanged() {
	for m.shared == nil {
		t, v := m.tables.table(), m.current.Load()
		if t == nil || v != nil && (!m.handoffOff || v.tables[0] == t) {
			break
		}
		if m.current.CompareAndSwap(v, newView(t, v, time.Now())) {
			m.onViewChanged()
		}
	}
	m.tableChanged.notify()
}

// assignmentOf returns where requests of the namespace go now. That backend may get them only
// between startFlight and the end of that flight. It takes no lock and allocates nothing.
func (m *mover) assignmentOf(namespace string) assignment {
	v := m.current.Load()
	if v == nil {
		return assignment{state: stateNoView, backend: unresolved}
	}
	owner, t, state := v.owner(namespace)
	a := assignment{state: state, backend: owner, step: v.step}
	if t != nil {
		a.stamp = t.stamp
	}
	return a
}

// previousOwners returns a function that returns the owner that a namespace keeps if its
// override becomes invalid now: its owner once the step is done, which need not be that of the
// newest table. previousOwners returns nil if this router does not know all owners.
func (m *mover) previousOwners() func(namespace string) int {
	if v := m.current.Load(); v != nil && v.knowsAll() {
		return v.after
	}
	return nil
}

// findQueueOrdinal is the queueFinder of the dial queues.
func (m *mover) findQueueOrdinal(namespace string) int {
	return m.assignmentOf(namespace).queueOrdinal()
}

// startFlight notes that the owner gets the request, which the caller sends next. cut is
// nil for an upgrade: see flight.cut. Then it asks once more who the owner is, and
// returns that as now. If it is another one, or the namespace is held, ok is false, and the
// caller must not send the request. So for each step one of two things is true: the step
// waits for this flight, or this function sees the step and returns false. The caller ends
// or abandons the flight, which is nil if ok is false, and for an upgrade with -handoff=off.
func (m *mover) startFlight(
	namespace string, owner int, podUID string, cut func(),
) (f *flight, now assignment, ok bool) {
	if !m.handoffOff || cut != nil {
		f = m.flights.add(namespace, owner, podUID, cut)
	}
	now = m.assignmentOf(namespace)
	if now.queueOrdinal() == owner {
		return f, now, true
	}
	if f != nil {
		f.end()
	}
	return nil, now, false
}

// shouldMove reports whether the session's namespace has another owner now, or the same owner
// with another pod. A namespace that is unresolved stays with its backend. One whose owner this
// router does not know (ownerNotKnown) counts as one with another owner. If the router does not
// know who owns what (view.servesNone), all count as unresolved: actEndAll ends the sessions
// once the router is no member any more.
func (m *mover) shouldMove(s *session) bool {
	owner := m.assignmentOf(s.namespace).backend
	return owner != unresolved && owner != s.backend || m.relay.isOnOldPod(s)
}

// somethingEnded wakes run if it waits for the end of sessions or requests. It does not
// block.
func (m *mover) somethingEnded() {
	if m.awaitsEnd.Load() {
		m.wake.notify()
	}
}

// run carries out all changes of owners until ctx ends.
func (m *mover) run(ctx context.Context) {
	defer m.targets.close()
	if m.shared != nil {
		defer m.shared.close()
	}
	m.ctx = ctx
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.tableChanged:
			m.prepareNewest(time.Now())
		case d := <-m.targets.results:
			m.handleDialResult(d)
		case <-m.wake:
		case <-timer.C:
		}
		again := m.leaveOldPods(time.Now())
		again = earliest(again, m.advance(time.Now()))
		again = earliest(again, m.cutRequests(time.Now()))
		movesWait := (m.waitsForPace || m.oldPodsWait) && !m.queue.isEmpty()
		again = earliest(again, m.ages.closeOld(m.relay, time.Now(), movesWait))
		timer.Stop()
		if !again.IsZero() {
			timer.Reset(max(time.Until(again), paceTick))
		}
		m.reportFinished()
		m.publishMove()
	}
}

// publishMove notes how far the move under way is, for operators.
func (m *mover) publishMove() {
	tally := m.tally
	if tally == nil && len(m.finishing) > 0 {
		tally = m.finishing[len(m.finishing)-1]
	}
	if tally == nil {
		m.moving.Store(nil)
		return
	}
	now := tally.receipt()
	m.moving.Store(&now)
}

// finishedMoves returns the last moves that are over, newest first. The caller must not
// change them.
func (m *mover) finishedMoves() []moveReceipt {
	if all := m.receipts.Load(); all != nil {
		return *all
	}
	return nil
}

// prepareNewest calls prepare: the router has a new table, or a pod was replaced.
func (m *mover) prepareNewest(now time.Time) {
	v, t := m.current.Load(), m.tables.table()
	if v == nil || t == nil { // a pod was replaced before: no sessions yet
		return
	}
	t = v.nextTable(t)
	if m.mustPrepare = t == nil; t != nil { // else it is not known which sessions move
		m.prepare(v, t, now)
	}
}

// prepare begins to move sessions to t, the nextTable of v. It queues all sessions that have to
// move, and dials their new owners, also those that were reachable before.
func (m *mover) prepare(v *view, t *table, now time.Time) {
	m.restartSettling(now)
	m.requeue(v, t, now)
	if m.tally == nil || m.tally.ownersHash != t.ownersHash {
		m.endTally()
		m.targets.forgetOthers(m.queue.targets())
		m.tally = newMoveTally(t.ownersHash)
	}
	m.targets.redial(m.ctx)
	m.tally.overridesVersion = t.overridesVersion
	toMove := m.tally.sessions + m.tally.cancelled + int(m.queue.size.Load())
	m.tally.planned = max(m.tally.planned, toMove)
}

// restartSettling makes run wait for settleTime from now, but no longer than
// maxSettleFactor times settleTime from the first change.
func (m *mover) restartSettling(now time.Time) {
	if !now.Before(m.settlesAt) {
		m.firstChange = now
	}
	m.settlesAt = now.Add(m.settleTime)
	m.settlesAt = earliest(m.settlesAt, m.firstChange.Add(maxSettleFactor*m.settleTime))
	if m.shared == nil {
		m.lastProposal = nil // it was made before, and no other router relies on it
	}
}

// requeue fills the queue with all sessions that have to move to t's owners, and dials
// those owners that are not dialled yet. It counts the sessions that were queued before and
// need not move any more.
func (m *mover) requeue(v *view, t *table, now time.Time) {
	var queue []queuedSession
	var oldPod []*session
	record := newRecord(t)
	for _, s := range m.movableSessions() {
		hash := hash64(s.namespace)
		target, kept := t.lookup(s.namespace, hash)
		if kept {
			target = v.after(s.namespace)
		}
		if target == unresolved || target == ownerNotKnown {
			target = s.backend // it stays
		}
		isReplaced := m.relay.isOnOldPod(s)
		if isReplaced {
			oldPod = append(oldPod, s)
		}
		if target != s.backend {
			queue = append(queue, queuedSession{s, record.place(hash, s.backend), target, isReplaced})
		}
	}
	cancelled := m.queue.fill(queue, oldPod, now)
	m.cancelled.Add(int64(cancelled))
	if m.tally != nil {
		m.tally.cancelled += cancelled
	}
	m.targets.addMissing(m.ctx, m.queue.targets())
}

// movableSessions returns the sessions that neither end nor have ended.
func (m *mover) movableSessions() []*session {
	return m.relay.filter(func(s *session) bool { return !s.isEnding() })
}

// refreshQueue fills the queue anew if it is outdated.
func (m *mover) refreshQueue(v *view, t *table, now time.Time) {
	if m.queue.isOutdated(now) {
		m.requeue(v, t, now)
	}
}

// handleDialResult notes the result of a dial. It logs a new owner's first failed dial.
func (m *mover) handleDialResult(d dialResult) {
	now := time.Now()
	isFirstFailure := m.targets.note(d, now)
	m.targets.startWaits(m.withAwayForOthers(nil), now) // also where propose is not called
	if isFirstFailure {
		m.log.Warn("new owner unreachable; move delayed",
			"backend", m.relay.backendName(d.backend),
			"sessions", m.queue.count(d.backend), "error", d.err.Error())
	}
}

// advance does what can be done now: it works on the step, and begins the next ones. With
// -handoff=all it ends all sessions of a router that is no member any more. Each turn of its loop
// adopts a step or the end of one, until decide waits: for what the step has to close, for the
// pace, or for other routers. It returns when it has to be called again, zero if only when
// something happens.
func (m *mover) advance(now time.Time) time.Time {
	for {
		t := m.tables.table()
		p, again := m.work(m.current.Load(), t, now)
		// workWithoutStep may have put a version with the same owners in the place of t, and in the view.
		v, newest := m.current.Load(), m.tables.table()
		if newest != t && (t == nil || newest.ownersHash != t.ownersHash) {
			continue // p is for t
		}
		switch d := m.decide(v, newest, p, now); d.action {
		case actAdopt:
			m.adopt(v, d.view.view, now)
		case actEndAll:
			m.awaitsEnd.Store(true)
			for _, s := range m.movableSessions() {
				m.moveSession(s)
			}
			return now.Add(minStepTime)
		default:
			return earliest(again, d.again)
		}
	}
}

// decide says what to do next: what the routers have agreed on, or without -handoff=all what
// this router alone decides. p is how far it has come with v, its view, and what it proposes
// towards newest, its table.
func (m *mover) decide(v *view, newest *table, p stepProgress, now time.Time) decision {
	if m.shared == nil {
		return m.decideAlone(v, newest, p, now)
	}
	m.shared.leaving = m.leaving.Load()
	return m.shared.decideAndStart(m.ctx, p, newest, m.backendStep.Load(), now)
}

// decideAlone ends v's step when it is done, and then begins the next one: as far as p allows,
// and above all steps that backends have sent in a 409. Such a step is higher than this
// router's if another router was ahead of it, or if its clock was ahead before it started.
func (m *mover) decideAlone(v *view, newest *table, p stepProgress, now time.Time) decision {
	switch {
	case v == nil || !p.doneHere:
		return waiting("")
	case !v.done:
		next := *v
		next.done = true
		return adopting(&next)
	}
	t := v.nextTable(newest)
	highest := m.backendStep.Load()
	switch {
	case m.handoffOff && !v.hasOnlyTable(t.ownersHash), // tableOrPodChanged replaces v first
		!v.wouldChange(t, p.limit) && highest < v.step:
		return waiting("")
	}
	next := v.next(t, p.limit, now)
	next.step = max(next.step, highest+1)
	if at := m.nextStepTime(now); len(next.records) > 1 && now.Before(at) {
		return decision{again: at}
	}
	return adopting(next)
}

// adopting returns the decision to put v in force.
func adopting(v *view) decision { return decision{action: actAdopt, view: &memberView{view: v}} }

// work closes the sessions of v's step, and returns how far this router has come
// with it. again is when to call it again; if it is zero, at the next event. t is its
// table. v and t may be nil.
func (m *mover) work(v *view, t *table, now time.Time) (p stepProgress, again time.Time) {
	inFlight := func() bool { return m.flights.any(func(*flight) bool { return true }) }
	p.hasWork = inFlight() || m.relay.size() > 0 || inFlight() // one may become the other
	if v == nil {
		p.doneHere = !p.hasWork
		return p, time.Time{}
	}
	lacksTally := m.tally == nil && t != nil && !v.hasOnlyTable(t.ownersHash) // during a change
	if lacksTally || m.mustPrepare {
		m.prepareNewest(now)
	}
	if m.lastDoneHere < v.step && (v.done || m.workOnStep(v)) {
		m.lastDoneHere = v.step
	}
	p.doneHere = m.lastDoneHere >= v.step
	switch {
	case t == nil || !p.doneHere || !v.knowsAll() || v.servesNone,
		m.shared == nil && !v.done: // first decideAlone opens its namespaces
		return p, time.Time{}
	case v.hasOnlyTable(t.ownersHash):
		p.limit.upto = allPlaces
		return p, m.workWithoutStep(v, t, now)
	case m.handoffOff: // tableOrPodChanged replaces v first
		return p, time.Time{}
	}
	proposal, again := m.propose(v, v.nextTable(t), now)
	p.limit, p.toMove = proposal.limit, proposal.toMove
	return p, again
}

// workWithoutStep does what is left to do when v has the newest table alone: the tally ends,
// and the table gets what v knows of previous owners.
func (m *mover) workWithoutStep(v *view, t *table, now time.Time) (again time.Time) {
	m.lastProposal = nil
	if !v.done {
		return time.Time{}
	}
	if m.tally != nil {
		if m.tally.ownersHash != t.ownersHash {
			m.prepare(v, t, now) // run has not got tableChanged yet
		}
		m.refreshQueue(v, t, now)
		again = m.closeWithoutStep(now)
		m.endMoves()
	}
	if nextView := m.takeNewVersion(v, t); nextView != v && m.shared != nil {
		m.shared.member.view.view = nextView
	}
	return again
}

// stepProposal is how far the step after the view's may go, as far as this router is concerned.
// With -handoff=all each change of it is a write. So it stays until there is a new step or
// another table, or a new owner becomes reachable or unreachable for any router.
type stepProposal struct {
	step       int64  // of the view
	ownersHash uint64 // of the table to which the next step moves namespaces
	limit      stepLimit
	allAway    []int // the owners that are away for any router, sorted
	toMove     int   // sessions that have to move and that the rate counts, also those within limit
}

// propose returns how far the step after v's may go towards t, and when that may change,
// zero if only when something happens. It counts how many sessions the pace allows until
// the next step can begin. This router's share of the rate is its share of the sessions.
// closeStepSessions closes the sessions of the step, when the step has come.
func (m *mover) propose(v *view, t *table, now time.Time) (*stepProposal, time.Time) {
	if m.tally == nil || m.tally.ownersHash != t.ownersHash {
		m.prepare(v, t, now)
	}
	m.refreshQueue(v, t, now)
	away, again := m.targets.away(now)
	allAway := m.withAwayForOthers(away)
	m.targets.startWaits(allAway, now)
	p := m.lastProposal
	if p != nil && p.step == v.step && p.ownersHash == t.ownersHash &&
		slices.Equal(p.limit.away, away) && slices.Equal(p.allAway, allAway) {
		return p, again
	}
	p = &stepProposal{step: v.step, ownersHash: t.ownersHash, allAway: allAway}
	p.limit = stepLimit{upto: allPlaces, away: allAway} // a session for one of these takes no turn
	mayMove, resume := m.updatePace(now)
	schedule := m.pace // of what this router proposes; dequeueForStep advances the pace itself
	m.queue.split(&p.limit, mayMove, &schedule, m.nextStepTime(now))
	p.limit.away = away
	p.toMove = int(m.queue.paced.Load())
	if newest := v.newestRecord(); newest.ownersHash == t.ownersHash && newest.after.catchesUp(allAway) {
		p.toMove = m.queue.countBelow(newest.after.upto, allAway) // all others have to wait
	}
	m.waitsForPace = mayMove && p.limit.upto < allPlaces
	if p.limit.upto == allPlaces || v.wouldChange(t, stepLimit{p.limit.upto, allAway}) {
		m.lastProposal = p
		return p, again
	}
	if mayMove {
		resume = m.pace.next()
	}
	return p, earliest(again, resume)
}

// adopt puts v in force in place of old, unless there is a new view since the decision.
func (m *mover) adopt(old, v *view, now time.Time) {
	newStep := old == nil || old.step != v.step
	v.began = now
	if !newStep {
		v.began = old.began
	}
	if newStep && !v.done {
		m.releases.startStep()
	}
	if !m.current.CompareAndSwap(old, v) {
		return // with -handoff=off, by tableOrPodChanged
	}
	if newStep {
		m.dequeueForStep(v, now)
	}
	if newStep && old != nil && !old.done && !v.allHeld {
		m.countStep(old, now) // its last answer came with the step of v
	}
	if v.done && (newStep || !old.done) {
		m.releases.endStep()
		m.countStep(v, now)
	}
	if newStep || v.done != old.done || v.servesNone != old.servesNone ||
		!slices.Equal(v.tables, old.tables) {
		m.onViewChanged()
	}
}

// dequeueForStep takes the sessions that v's step moves from the queue, and those that end
// anyway. It advances the pace by those that the pace counts: all but those whose previous owner
// was scaled in.
func (m *mover) dequeueForStep(v *view, now time.Time) {
	rest := slices.DeleteFunc(m.queue.sessions, func(q queuedSession) bool {
		switch s := q.session; {
		case s.isEnding():
		case !v.mustLeave(s.namespace, s.backend):
			return false
		default:
			m.lastClosedAt = now
			if q.place > 0 {
				m.pace.advance(now)
			}
		}
		return true
	})
	m.queue.set(rest, m.queue.oldPod)
}

// nextStepTime returns when the next step can begin: now or later.
func (m *mover) nextStepTime(now time.Time) time.Time {
	if m.shared == nil {
		return latest(now, m.lastClosedAt.Add(minStepTime))
	}
	return latest(now, m.shared.member.nextStepTime())
}

// noteStep notes the step in the header of a backend that has refused a request: it has
// seen a later step than the router's. The next step of the router is
// above it; if no step is due, it makes one that moves nothing. noteStep reports whether text
// is a step: one of at most ten years from now.
func (m *mover) noteStep(text string) bool {
	step, err := strconv.ParseInt(text, 10, 64)
	if err != nil || step < 0 || step > time.Now().AddDate(10, 0, 0).UnixMilli() {
		return false
	}
	for highest := m.backendStep.Load(); step > highest; highest = m.backendStep.Load() {
		m.backendStep.CompareAndSwap(highest, step)
	}
	m.wake.notify()
	return true
}

// closeWithoutStep closes sessions of the queue, as many as the pace allows. The view has the
// newest table alone, so none of them waits for a step: with -handoff=off these are all
// sessions that move. It returns when it has to be called again; if that is zero, at the next
// event.
func (m *mover) closeWithoutStep(now time.Time) (again time.Time) {
	limit := stepLimit{upto: allPlaces}
	limit.away, again = m.targets.away(now)
	mayMove, resume := m.updatePace(now)
	mayClose := mayMove
	if next := m.lastClosedAt.Add(minStepTime); mayMove && now.Before(next) {
		mayClose, resume = false, next // each time costs as much as the queue is long
	}
	due, rest := m.queue.split(&limit, mayClose, &m.pace, now)
	m.queue.set(rest, m.queue.oldPod)
	if len(due) > 0 {
		m.lastClosedAt = now
	}
	for _, q := range due {
		m.moveSession(q.session)
	}
	m.waitsForPace = mayMove && limit.upto < allPlaces
	if m.waitsForPace && mayClose {
		resume = m.pace.next()
	}
	return earliest(again, resume)
}

// leaveOldPods closes the sessions whose pod was replaced, at the pace. It waits for no step,
// because no client of their namespaces is admitted until these sessions are over. It returns when
// it has to be called again, zero if only when something happens.
func (m *mover) leaveOldPods(now time.Time) (again time.Time) {
	left := m.queue.oldPod
	if len(left) == 0 {
		m.oldPodsWait = false
		return time.Time{}
	}
	mayMove, again := m.updatePace(now) // it reads oldPodsWait: sessions that wait keep their turns
	m.oldPodsWait = false
	for ; mayMove && len(left) > 0; left = left[1:] {
		if left[0].isEnding() {
			continue
		}
		if m.oldPodsWait = m.pace.next().After(now); m.oldPodsWait {
			again = m.pace.next()
			break
		}
		m.pace.advance(now)
		m.moveSession(left[0])
	}
	m.queue.set(m.queue.sessions, left)
	return again
}

// mayMove reports whether sessions may move now: the table has settled, and each of their
// new owners was dialled. If not, again is when to ask again; zero if that is after a
// dial.
func (m *mover) mayMove(now time.Time) (ok bool, again time.Time) {
	if now.Before(m.settlesAt) {
		return false, m.settlesAt
	}
	return m.targets.allDialled(), time.Time{}
}

// ownInterval returns the time between two moves of this router: with -handoff=all it has a
// share of the rate.
func (m *mover) ownInterval() time.Duration {
	if m.shared == nil {
		return m.moveInterval
	}
	return time.Duration(float64(m.moveInterval) / m.positiveRateShare())
}

// minMoveTime returns how long this number of moves takes at least. With -handoff=all the routers
// share the rate: there the times of all of them add up. Any goroutine may call it.
func (m *mover) minMoveTime(sessions int64) time.Duration {
	return time.Duration(sessions) * m.moveInterval
}

// updatePace begins the tally if sessions may move, sets the interval of the pace, and returns
// what mayMove returns. It starts the pace, unless sessions may move and wait for it
// already. The caller has prepared the moves to the table, so that there is a tally.
func (m *mover) updatePace(now time.Time) (mayMove bool, again time.Time) {
	mayMove, again = m.mayMove(now)
	if mayMove {
		m.tally.begin(now)
	}
	m.pace.interval = m.ownInterval()
	if !mayMove || !m.waitsForPace && !m.oldPodsWait {
		m.pace.start(now)
	}
	return mayMove, again
}

// workOnStep closes the sessions of v's step, and reports whether the step is over in
// this router: nothing of it is left, and with -release the backends have stored the
// state.
func (m *mover) workOnStep(v *view) bool {
	return m.closeStepSessions(v) && m.releases.releaseAll(v.step, v.mustLeave, m.wake.notify)
}

// closeStepSessions closes the sessions of v's step, and reports whether all of them, and
// the requests that their backends may have got, are over. An upgrade becomes a session
// before it leaves the flights: so this looks at the flights first. A session whose
// client has left may become a flight: so it looks at the flights again at the end.
func (m *mover) closeStepSessions(v *view) bool {
	m.awaitsEnd.Store(true)
	blocks := func(f *flight) bool { return m.blocks(v, f) }
	for {
		m.stepSessions = slices.DeleteFunc(m.stepSessions, (*session).isOverForSteps)
		if len(m.stepSessions) > 0 {
			return false
		}
		inFlight := m.flights.any(blocks)
		m.stepSessions = m.misplacedSessions(v)
		if len(m.stepSessions) == 0 {
			inFlight = inFlight || m.flights.any(blocks)
			m.awaitsEnd.Store(inFlight)
			return !inFlight
		}
		for _, s := range m.stepSessions {
			m.moveSession(s)
		}
	}
}

// cutRequests cuts the plain requests that must not stay with their backends: those that a step
// waits for, or with -handoff=off those whose owner changed, once they are httpMoveTimeout old,
// and all requests of a pod that was replaced. A router that is no member of the hand-off cuts
// all at once. Of a pod that was replaced it also ends the wait for abandoned requests and
// sessions: that pod serves them no more. It returns when the next one has to be cut, zero if
// only when something happens.
func (m *mover) cutRequests(now time.Time) time.Time {
	v := m.current.Load()
	if v == nil {
		return time.Time{}
	}
	m.flights.endWaits(func(f *flight) bool { return m.relay.isOldPod(f.backend, f.podUID) })
	return m.flights.cutOverdue(now, func(f *flight) time.Time {
		owner := m.assignmentOf(f.namespace).backend
		switch {
		case v.servesNone || m.relay.isOldPod(f.backend, f.podUID):
			return now
		case m.handoffOff && owner != unresolved && owner != f.backend,
			!v.done && v.mustLeave(f.namespace, f.backend):
			return f.began.Add(m.httpMoveTimeout)
		}
		return time.Time{}
	})
}

// misplacedSessions returns the sessions that v's step waits for.
func (m *mover) misplacedSessions(v *view) []*session {
	return m.relay.filter(func(s *session) bool {
		return v.mustLeave(s.namespace, s.backend) && !s.isOverForSteps()
	})
}

// blocks reports whether v's step waits for the flight. It does not if the pod that may
// have the request is gone.
func (m *mover) blocks(v *view, f *flight) bool {
	return v.mustLeave(f.namespace, f.backend) && !m.relay.isOldPod(f.backend, f.podUID)
}

// countStep counts v's step, which is done, if it has handed over namespaces.
func (m *mover) countStep(v *view, now time.Time) {
	if v.changing == (placeRange{}) && !v.allHeld {
		return
	}
	held := now.Sub(v.began)
	m.stepsDone.Add(1)
	m.stepDurations.observe(held)
	if m.tally != nil {
		m.tally.longestHold = max(m.tally.longestHold, held)
	}
}

// takeNewVersion puts t in the place of v's table: v is at rest and has an older version of a
// table with the same ownersHash. t gets the previous owners that v knows. This copy of t becomes
// the newest table and the view's. takeNewVersion returns the view that is in force then.
func (m *mover) takeNewVersion(v *view, t *table) *view {
	if v.tables[0] == t {
		return v
	}
	withOwners := t.withKept(v.after)
	if m.tables.newest.CompareAndSwap(t, withOwners) { // else there is a newer one
		nextView := *v
		nextView.tables = []*table{withOwners}
		if m.current.CompareAndSwap(v, &nextView) {
			return &nextView
		}
	}
	return v
}

// moveSession starts the closing handshake of a session, unless it is closing already.
func (m *mover) moveSession(s *session) {
	if m.tally == nil { // this router does not know the plan's tables, or was removed from the members
		m.tally = newMoveTally(noTableHash)
	}
	if m.tally.close(s, m.closeSession, m.wake.notify) {
		m.moved.Add(1)
	}
}

// endMoves ends the tally and all dials if no session is left that has to move.
func (m *mover) endMoves() {
	if m.queue.isEmpty() {
		m.targets.dropAll()
		m.endTally()
	}
}

// endTally ends the tally, if there is one: no session is left that has to move to its
// table, or another table has come. reportFinished reports it when its last session is over,
// unless no session has moved or stayed.
func (m *mover) endTally() {
	if m.tally != nil && m.tally.sessions+m.tally.cancelled > 0 {
		m.finishing = append(m.finishing, m.tally)
	}
	m.tally = nil
}

// reportFinished logs the results of the tallies whose last session is over, and passes
// them to reportMove.
func (m *mover) reportFinished() {
	m.finishing = slices.DeleteFunc(m.finishing, func(tally *moveTally) bool {
		if tally.unfinished.Load() > 0 {
			return false
		}
		receipt := tally.receipt()
		receipt.Examples = tally.examples()
		m.keepReceipt(receipt)
		m.log.Info("move finished", "overrides_version", receipt.OverridesVersion,
			"namespaces", receipt.Namespaces, "moved", receipt.Moved,
			"seconds", receipt.Seconds, "held_seconds", receipt.HeldSeconds,
			"cut", receipt.Cut, "cancelled", receipt.Cancelled)
		if m.reportMove != nil {
			m.reportMove(receipt)
		}
		return true
	})
}

// keepReceipt keeps the receipt of a move that is over, in place of the oldest one.
func (m *mover) keepReceipt(receipt moveReceipt) {
	all := append([]moveReceipt{receipt}, m.finishedMoves()...)
	all = all[:min(len(all), maxReceipts)]
	m.receipts.Store(&all)
}

// shareHandoff makes the mover share its steps, and the rate of moves, with other
// routers.
func (m *mover) shareHandoff(h *sharedHandoff) {
	m.shared = h
	h.wake = m.wake.notify
}

// leave makes this router leave the hand-off once its last session is over, and waits for
// that until ctx ends. If it does not leave, the others wait until its pod is gone. The
// router must admit nobody any more. run has to go on meanwhile.
func (m *mover) leave(ctx context.Context) {
	if m.shared == nil {
		return
	}
	m.leaving.Store(true)
	m.wake.notify()
	select {
	case <-m.shared.hasLeft:
	case <-ctx.Done():
	}
}

// positiveRateShare returns this router's part of the rate, above 0 and at most 1. A router
// that had no session to move when it answered last has a tenth of an equal part, for those
// that have come since. It takes sharedHandoff.mu.
func (m *mover) positiveRateShare() float64 {
	o := m.shared.lastObject()
	if o == nil || o.plan == nil {
		return 1
	}
	return max(m.shared.member.rateShare(o), 0.1/float64(max(1, len(o.plan.members))))
}

// withAwayForOthers returns the sorted ordinals in away, and those of the owners that are away
// for other routers, by their last answers. It takes sharedHandoff.mu.
func (m *mover) withAwayForOthers(away []int) []int {
	if m.shared == nil {
		return away
	}
	all := slices.Clone(away)
	if o := m.shared.lastObject(); o != nil && o.plan != nil {
		for pod := range o.plan.members {
			if pod != m.shared.member.name {
				all = append(all, o.answers[pod].limit.away...)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// whyNotReady says why this router should get no new clients yet, or "".
func (m *mover) whyNotReady() string {
	if m.shared == nil {
		return ""
	}
	return m.shared.whyNotReady()
}
