package main

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxSettleFactor = 10                     // × settleTime: the longest wait for a stable table
	stepInterval    = 100 * time.Millisecond // the shortest time between two steps that close sessions
	minTargetRetry  = 100 * time.Millisecond // after the first failed dial; then it doubles
	maxTargetRetry  = 600 * time.Millisecond // so that namespaces follow within 1 s
	requeueInterval = time.Second            // how old the queue may be: new sessions have to move too
	maxAwayTime     = 60 * time.Second       // how long namespaces wait for a new owner that is not there
)

// mover decides who owns a namespace now, and brings the router from one table to the
// next in steps. In each step some namespaces are handed over: the mover closes their
// sessions with their previous owner, and holds their clients until these sessions, and
// the upgrades that this owner may have got, are over. So a namespace never has two
// owners (invariant 2). The sessions of all other namespaces stay.
//
// A step takes as many sessions as the rate allows, and all namespaces before the next
// one that has sessions. Namespaces whose previous owner was scaled in go at once. Those
// whose new owner accepts no connection stay with their previous owner for maxAwayTime.
type mover struct {
	// Static after construction.
	router       *router
	relay        *relay
	off          bool          // -handoff=off: new clients get the owner of the newest table at once
	settleTime   time.Duration // time without a change of the table before sessions move
	probe        func(ctx context.Context, backend int) error
	closeSession func(s *session, onEnd func(cut bool)) bool // closeGracefully
	onStep       func()                                      // the view has changed; must not block
	flights      *flights
	releases     *stepReleases // nil without -release
	log          *slog.Logger

	current atomic.Pointer[view] // nil before the first table; then only run replaces it, but for off

	tableChanged    wakeup          // of run, by ownersChanged
	wake            wakeup          // of run, when something of a step is over
	releasing       atomic.Bool     // run waits for something of a step to be over
	dialResults     chan dialResult // dialTarget sends
	pendingSessions atomic.Int64    // sessions that have to move and have not moved yet
	steps           atomic.Int64    // steps that are done
	seenStep        atomic.Int64    // the highest that a backend has answered (noteStep)

	// Owned by run.
	pace        pace
	firstChange time.Time // of the changes that have not settled
	settlesAt   time.Time // when these will have settled
	steppedAt   time.Time // when the last step began that closed sessions
	batch       *moveBatch
	finishing   []*moveBatch    // whose last closing handshakes go on
	queue       []queuedSession // those that have to move, sorted by place
	closing     []*session      // of the step, that are not released yet
	targets     map[int]*moveTarget
	queuedAt    time.Time
	paceLimits  bool // there are sessions that only wait for the pace
	ctx         context.Context
	dials       sync.WaitGroup // all dialTarget
}

// moveTarget is a new owner of sessions that have to move.
type moveTarget struct {
	backend   int
	cancel    context.CancelFunc // ends its dialTarget
	dialled   bool               // the first dial has ended
	reachable bool               // it has accepted a connection
	awayUntil time.Time          // how long its namespaces wait for it, from the first failed dial
}

// dialResult is the result of one dial of a target. err is nil if it is reachable.
type dialResult struct {
	*moveTarget
	err error
}

// moveResult is the result of one move, for the log and the Events.
type moveResult struct {
	version    string // of the table
	namespaces int    // of these sessions
	sessions   int    // that the mover closed
	cut        int    // of these sessions: both sides did not answer in time
	cancelled  int    // sessions that stayed because a later change moved them back
	time       time.Duration
	held       time.Duration // the longest time that a namespace was held
}

// moveReporter is an overrideSource that reports moves.
type moveReporter interface {
	// reportMove reports a move that ended. It must not block for long.
	reportMove(moveResult)
}

// moveBatch is the sessions that moved to one table. run owns it, but for the atomic
// fields.
type moveBatch struct {
	moveResult
	content uint64 // of the table
	began   time.Time
	moved   map[string]struct{} // namespaces of the closed sessions

	unfinished atomic.Int64 // sessions whose closing handshake goes on
	cuts       atomic.Int64 // sessions whose closing handshake was cut
}

// queuedSession is a session that has to move.
type queuedSession struct {
	session *session
	place   uint64 // of its namespace
	target  int    // the new owner; s.backend if only its pod is another
}

// newMover returns a mover that moves rate sessions per second, or all at once if rate
// is 0. probe dials a backend and returns nil if it accepted the connection. onStep is
// called when the owners have changed. It must not block.
func newMover(
	router *router, relay *relay, rate int,
	probe func(ctx context.Context, backend int) error, onStep func(), log *slog.Logger,
) *mover {
	m := &mover{
		router:       router,
		relay:        relay,
		probe:        probe,
		log:          log,
		tableChanged: newWakeup(),
		wake:         newWakeup(),
		dialResults:  make(chan dialResult),
		onStep:       onStep,
		flights:      newFlights(relay.backendName, log),
		targets:      map[int]*moveTarget{},
		closeSession: func(s *session, onEnd func(cut bool)) bool {
			return s.closeGracefully(causeMoved, onEnd)
		},
	}
	if rate > 0 {
		m.pace.interval = time.Second / time.Duration(rate)
	}
	m.flights.onEnd, relay.onReleased = m.sessionReleased, m.sessionReleased
	return m
}

// ownersChanged makes run look for sessions to move: the router has a new table, or the
// pod of a backend was replaced. The first table is in force when it returns. It does not
// block.
func (m *mover) ownersChanged() {
	for {
		t, v := m.router.table(), m.current.Load()
		if t == nil || v != nil && (!m.off || v.tables[0] == t) {
			break
		}
		if m.current.CompareAndSwap(v, newView(t, v, time.Now())) {
			m.onStep()
		}
	}
	m.tableChanged.notify()
}

// assign returns who owns the namespace now. Its owner may get requests only between
// startFlight and the end of that flight. It takes no lock and allocates nothing.
func (m *mover) assign(namespace string) assignment {
	v := m.current.Load()
	if v == nil {
		return assignment{state: noTableYet, owner: unresolved}
	}
	owner, t, state := v.owner(namespace)
	return assignment{state, owner, t.stamp, v.step}
}

// findQueue is the queueFinder of the dial queues.
func (m *mover) findQueue(namespace string) int { return m.assign(namespace).queue() }

// startFlight notes that the owner gets the upgrade's request, which the caller sends
// next. Then it asks once more who the owner is, and returns nil if that has changed: so
// a step of a hand-off waits for the flight, or it began before and the request must not
// be sent. With -handoff=off nothing is noted, and the flight is nil. The caller ends or
// abandons the flight.
func (m *mover) startFlight(
	namespace string, owner int, podUID string,
) (f *flight, now assignment, ok bool) {
	if !m.off {
		f = m.flights.add(namespace, owner, podUID)
	}
	now = m.assign(namespace)
	if now.queue() == owner {
		return f, now, true
	}
	if f != nil {
		f.end()
	}
	return nil, now, false
}

// shouldMove reports whether the session's namespace has another owner now, or the same
// owner with another pod. A namespace without an owner stays with its backend.
func (m *mover) shouldMove(s *session) bool {
	owner := m.assign(s.namespace).owner
	return owner != unresolved && owner != s.backend || m.relay.podReplaced(s)
}

// sessionReleased wakes run if it waits for the end of sessions or upgrades. It does not
// block.
func (m *mover) sessionReleased() {
	if m.releasing.Load() {
		m.wake.notify()
	}
}

// run carries out all changes of owners until ctx ends.
func (m *mover) run(ctx context.Context) {
	defer m.dials.Wait()
	defer m.dropTargets(func(*moveTarget) bool { return true })
	m.ctx = ctx
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.tableChanged:
			m.prepare(time.Now())
		case d := <-m.dialResults:
			m.handleDialResult(d)
		case <-m.wake:
		case <-timer.C:
		}
		next := m.advance(time.Now())
		timer.Stop()
		if !next.IsZero() {
			timer.Reset(max(time.Until(next), paceTick))
		}
		m.reportFinished()
	}
}

// prepare begins with a new table, or with new pods: it queues all sessions that have to
// move, and dials their new owners, also those that were reachable before.
func (m *mover) prepare(now time.Time) {
	v := m.current.Load()
	if v == nil { // a pod was replaced before there was a table: no sessions yet
		return
	}
	t := m.targetTable(v)
	m.restartSettling(now)
	reachable := m.dropTargets(func(target *moveTarget) bool { return target.reachable })
	cancelled := m.requeue(v, t, now)
	for _, before := range reachable { // and so it counts until the dial has a result
		if target := m.targets[before.backend]; target != nil {
			target.dialled, target.reachable = true, true
		}
	}
	if m.batch != nil {
		m.batch.cancelled += cancelled
	}
	if m.batch == nil || m.batch.content != t.contentHash {
		m.endBatch()
		m.batch = &moveBatch{content: t.contentHash, moved: map[string]struct{}{}}
	}
	m.batch.version = t.version
}

// targetTable returns the table that the next step goes on to: the newest, or while v has
// maxRecords of which the last has begun, that one.
func (m *mover) targetTable(v *view) *table {
	t := m.router.table()
	newest := v.handoffPlan.newest()
	if len(v.records) >= maxRecords && newest.content != t.contentHash && !newest.now.isEmpty() {
		return v.tables[len(v.tables)-1]
	}
	return t
}

// dropTargets ends the dials of the targets for which match returns true, forgets these
// targets, and returns them.
func (m *mover) dropTargets(match func(*moveTarget) bool) (dropped []*moveTarget) {
	for backend, target := range m.targets {
		if match(target) {
			target.cancel()
			delete(m.targets, backend)
			dropped = append(dropped, target)
		}
	}
	return dropped
}

// restartSettling makes run wait for settleTime from now, but no longer than
// maxSettleFactor times settleTime from the first change.
func (m *mover) restartSettling(now time.Time) {
	if !now.Before(m.settlesAt) {
		m.firstChange = now
	}
	m.settlesAt = now.Add(m.settleTime)
	if last := m.firstChange.Add(maxSettleFactor * m.settleTime); m.settlesAt.After(last) {
		m.settlesAt = last
	}
}

// requeue queues all sessions that have to move to t's owners, and dials those owners that
// were not dialled yet. It returns how many sessions were queued and need not move any
// more.
func (m *mover) requeue(v *view, t *table, now time.Time) (cancelled int) {
	before := map[*session]bool{}
	for _, q := range m.queue {
		before[q.session] = true
	}
	var queue []queuedSession
	for _, s := range m.relay.filter(func(s *session) bool { return !s.isClosing() }) {
		key := hash64(s.namespace)
		target, pinned := t.lookup(s.namespace, key)
		if pinned {
			target = v.after(s.namespace)
		}
		if target == unresolved {
			target = s.backend // it stays
		}
		if target != s.backend || m.relay.podReplaced(s) {
			queue = append(queue, queuedSession{s, placeOf(key), target})
			delete(before, s)
		}
	}
	for s := range before {
		if !s.isClosing() {
			cancelled++
		}
	}
	slices.SortFunc(queue, func(a, b queuedSession) int { return cmp.Compare(a.place, b.place) })
	m.setQueue(queue)
	m.queuedAt = now
	needed := map[int]bool{}
	for _, q := range queue {
		needed[q.target] = true
		m.addTarget(q.target)
	}
	m.dropTargets(func(target *moveTarget) bool { return !needed[target.backend] })
	return cancelled
}

// setQueue replaces the queue.
func (m *mover) setQueue(queue []queuedSession) {
	m.queue = queue
	m.pendingSessions.Store(int64(len(queue)))
}

// addTarget starts to dial a new owner of sessions, unless it is dialled already.
func (m *mover) addTarget(backend int) {
	if m.targets[backend] == nil {
		ctx, cancel := context.WithCancel(m.ctx)
		target := &moveTarget{backend: backend, cancel: cancel}
		m.targets[backend] = target
		m.dials.Go(func() { m.dialTarget(ctx, target) })
	}
}

// dialTarget dials the target until it accepts a connection or ctx ends. It sends the
// result of each dial to run.
func (m *mover) dialTarget(ctx context.Context, target *moveTarget) {
	retry := backoff{minTargetRetry, maxTargetRetry}
	for failures := 1; ; failures++ {
		err := m.probe(ctx, target.backend)
		select {
		case <-ctx.Done():
			return
		case m.dialResults <- dialResult{target, err}:
		}
		if err == nil || sleep(ctx, retry.jittered(failures, rand.Float64())) != nil {
			return
		}
	}
}

// handleDialResult notes whether the target is reachable. It logs the first failed dial.
func (m *mover) handleDialResult(d dialResult) {
	target := d.moveTarget
	if m.targets[target.backend] != target { // of an earlier table
		return
	}
	if d.err != nil && target.awayUntil.IsZero() {
		target.awayUntil = time.Now().Add(maxAwayTime)
		waiting := 0
		for _, q := range m.queue {
			if q.target == target.backend {
				waiting++
			}
		}
		m.log.Warn("new owner unreachable; move delayed",
			"backend", m.relay.backendName(target.backend),
			"sessions", waiting, "error", d.err.Error())
	}
	target.dialled, target.reachable = true, d.err == nil
}

// advance takes all steps that can be taken now. It returns when it has to be called
// again, zero if only when something happens.
func (m *mover) advance(now time.Time) time.Time {
	for {
		v := m.current.Load()
		if v == nil || !v.done && !(m.release(v) &&
			m.releases.isDone(v.step, v.misplaces, m.wake.notify)) {
			return time.Time{}
		}
		if !v.done {
			v = m.finishStep(v)
		}
		t := m.targetTable(v)
		switch {
		case m.off && !v.isAtRest(t.contentHash): // ownersChanged comes first
			return time.Time{}
		case m.batch == nil && v.isAtRest(t.contentHash):
			m.raiseStep(v)
			return time.Time{}
		case m.batch == nil || m.batch.content != t.contentHash:
			m.prepare(now)
		}
		if len(m.queue) > 0 && now.Sub(m.queuedAt) >= requeueInterval {
			m.batch.cancelled += m.requeue(v, t, now)
		}
		next, again := m.nextMark(v, t, now)
		switch {
		case v.isAtRest(t.contentHash):
			m.keepVersion(v, t)
			m.raiseStep(m.current.Load())
			if len(m.queue) == 0 {
				m.dropTargets(func(*moveTarget) bool { return true })
				m.endBatch()
			}
			return again
		case !v.advances(t.contentHash, &next):
			return again
		}
		m.beginStep(v.next(t, next, now))
	}
}

// noteStep notes the step in the header of a backend that has refused an upgrade: it has
// released the namespace for a later step than the router's. The router's step rises above
// it when no change is under way. It reports whether text is a step: one of at most a day
// from now.
func (m *mover) noteStep(text string) bool {
	step, err := strconv.ParseInt(text, 10, 64)
	if err != nil || step < 0 || step > time.Now().Add(24*time.Hour).UnixMilli() {
		return false
	}
	for seen := m.seenStep.Load(); step > seen; seen = m.seenStep.Load() {
		m.seenStep.CompareAndSwap(seen, step)
	}
	m.wake.notify()
	return true
}

// raiseStep gives v, which is at rest, a step above all that backends have seen: another
// router was ahead, or the clock was before this one started.
func (m *mover) raiseStep(v *view) {
	if seen := m.seenStep.Load(); seen >= v.step {
		next, plan := *v, *v.handoffPlan
		plan.step = seen + 1
		next.handoffPlan = &plan
		m.current.CompareAndSwap(v, &next)
	}
}

// beginStep puts a view with a new step in force.
func (m *mover) beginStep(v *view) {
	v.step = max(v.step, m.seenStep.Load()+1)
	if !v.done {
		m.releases.begin()
	}
	m.current.Store(v)
	m.onStep()
}

// nextMark returns the mark of the next step, and when a later one may go further, zero
// if that is when something happens. It takes the sessions of the step from the queue.
// No step closes those whose owner stays and has another pod, and with -handoff=off there
// are no steps: nextMark closes them itself.
func (m *mover) nextMark(v *view, t *table, now time.Time) (next mark, again time.Time) {
	next = mark{upto: allPlaces, gone: v.goneOwners(t)}
	next.away, again = m.awayTargets(now)
	settled, resume := m.mayMove(now)
	if settled && m.batch.began.IsZero() {
		m.batch.began = now
	}
	if !settled || !m.paceLimits {
		m.pace.start(now)
	}
	ready := settled
	if step := m.steppedAt.Add(stepInterval); ready && now.Before(step) {
		ready, resume = false, step
	}
	due := m.takeDue(&next, ready, now)
	if len(due) > 0 {
		m.steppedAt = now
	}
	for _, q := range due {
		if v.isAtRest(t.contentHash) || q.target == q.session.backend {
			m.startMove(q.session)
		}
	}
	m.paceLimits = settled && next.upto < allPlaces
	if ready {
		resume = m.pace.next()
	}
	if next.upto < allPlaces {
		again = earliest(again, resume)
	}
	return next, again
}

// takeDue takes from the queue the sessions that may move in the next step, and sets
// next.upto to the place of the first one that may not. All sessions of a namespace move
// in one step. If ready is false, only sessions whose owner is gone may move.
func (m *mover) takeDue(next *mark, ready bool, now time.Time) (due []queuedSession) {
	var left []queuedSession
	last := uint64(allPlaces) // the place of the last session that paid by the pace
	for i, q := range m.queue {
		s, changes := q.session, q.target != q.session.backend
		switch {
		case s.isClosing():
		case changes && slices.Contains(next.away, q.target):
			left = append(left, q)
		case changes && slices.Contains(next.gone, s.backend):
			due = append(due, q)
		case q.place != last && (!ready || m.pace.next().After(now)):
			next.upto = q.place
			m.setQueue(append(left, m.queue[i:]...))
			return due
		default:
			last, due = q.place, append(due, q)
			m.pace.advance(now)
		}
	}
	m.setQueue(left)
	return due
}

// mayMove reports whether sessions may move now: the table has settled, and each of their
// new owners was dialled. If not, again is when they may; zero if that is after a dial.
func (m *mover) mayMove(now time.Time) (ready bool, again time.Time) {
	if now.Before(m.settlesAt) {
		return false, m.settlesAt
	}
	for _, target := range m.targets {
		if !target.dialled {
			return false, time.Time{}
		}
	}
	return true, time.Time{}
}

// awayTargets returns the sorted new owners to which namespaces do not move yet, as they
// accept no connection, and when the first of them is waited for no longer.
func (m *mover) awayTargets(now time.Time) (away []int, until time.Time) {
	for backend, target := range m.targets {
		if target.dialled && !target.reachable && now.Before(target.awayUntil) {
			away = append(away, backend)
			until = earliest(until, target.awayUntil)
		}
	}
	slices.Sort(away)
	return away, until
}

// earliest returns the earlier one of two times. A zero time is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// release closes the sessions of v's step, and reports whether all of them, and the
// upgrades that their backends may have got, are over. An upgrade becomes a session
// before it leaves the flights: so release looks at the flights first. It looks at them
// again at last, as a session whose client has left becomes a flight.
func (m *mover) release(v *view) bool {
	m.releasing.Store(true)
	blocks := func(f *flight) bool { return m.blocks(v, f) }
	for {
		m.closing = slices.DeleteFunc(m.closing, (*session).isReleased)
		if len(m.closing) > 0 {
			return false
		}
		inFlight := m.flights.any(blocks)
		m.closing = m.relay.filter(func(s *session) bool {
			return v.misplaces(s.namespace, s.backend) && !s.isReleased()
		})
		if len(m.closing) == 0 {
			inFlight = inFlight || m.flights.any(blocks)
			m.releasing.Store(inFlight)
			return !inFlight
		}
		for _, s := range m.closing {
			m.startMove(s)
		}
	}
}

// blocks reports whether v's step waits for the flight. It does not if the pod that may
// have the request is gone.
func (m *mover) blocks(v *view, f *flight) bool {
	return v.misplaces(f.namespace, f.backend) && !m.relay.isOldPod(f.backend, f.podUID)
}

// finishStep puts the same view in force with the step done: clients that were held get
// the new owners.
func (m *mover) finishStep(v *view) *view {
	next := *v
	next.done = true
	m.current.Store(&next)
	m.onStep()
	m.steps.Add(1)
	if m.batch != nil {
		m.batch.held = max(m.batch.held, time.Since(v.began))
	}
	return &next
}

// keepVersion has v, which is at rest, show the versions of t, which has the same content,
// and t the previous owners that v knows.
func (m *mover) keepVersion(v *view, t *table) {
	if v.tables[0] == t {
		return
	}
	pinned := t.pinTo(v.after)
	if m.router.current.CompareAndSwap(t, pinned) { // else there is a newer one
		next := *v
		next.tables = []*table{pinned}
		m.current.CompareAndSwap(v, &next)
	}
}

// handoffStatus says how far a change of owners has come.
type handoffStatus struct {
	Mode       string     `json:"mode"`        // of -handoff
	Step       int64      `json:"step"`        // the last one, in Unix milliseconds or above
	InProgress bool       `json:"in_progress"` // not all namespaces have the owner of the newest table
	Done       float64    `json:"done"`        // share of the namespaces that have it, about
	ToMove     int64      `json:"sessions_to_move"`
	Unproven   int64      `json:"unproven"` // upgrades whose end was not seen
	WaitingFor []stepWait `json:"waiting_for"`
}

// stepWait is what a step waits for at one backend.
type stepWait struct {
	Backend  string  `json:"backend"`
	Sessions int     `json:"sessions"`        // that have not ended yet
	Upgrades int     `json:"upgrades"`        // that it has got and neither answered nor ended
	Releases int     `json:"releases"`        // namespaces whose state it has not stored yet (-release)
	Error    string  `json:"error,omitempty"` // why not
	Seconds  float64 `json:"seconds"`         // since the step began
}

// status returns how far a change of owners has come.
func (m *mover) status() handoffStatus {
	s := handoffStatus{
		Mode: "single", Done: 1, ToMove: m.pendingSessions.Load(),
		Unproven: m.flights.unproven.Load() + m.relay.unproven.Load(), WaitingFor: []stepWait{},
	}
	if m.off {
		s.Mode = "off"
	}
	v, t := m.current.Load(), m.router.table()
	if v == nil {
		return s
	}
	s.Step = v.step
	if s.InProgress = !v.isAtRest(t.contentHash); !s.InProgress {
		return s
	}
	s.Done = 0
	if newest := v.handoffPlan.newest(); newest.content == t.contentHash {
		s.Done = float64(newest.was.upto) / allPlaces
	}
	s.WaitingFor = m.waitingFor(v)
	return s
}

// waitingFor returns what v's step waits for, in the order of the backends.
func (m *mover) waitingFor(v *view) []stepWait {
	waits := []stepWait{}
	if v.done {
		return waits
	}
	count := map[int]stepWait{}
	m.flights.any(func(f *flight) bool {
		if m.blocks(v, f) {
			w := count[f.backend]
			w.Upgrades++
			count[f.backend] = w
		}
		return false
	})
	for _, s := range m.relay.filter(func(s *session) bool {
		return v.misplaces(s.namespace, s.backend) && !s.isReleased()
	}) {
		w := count[s.backend]
		w.Sessions++
		count[s.backend] = w
	}
	for backend, wait := range m.releases.waits() {
		w := count[backend]
		w.Releases = wait.namespaces
		if wait.err != nil {
			w.Error = wait.err.Error()
		}
		count[backend] = w
	}
	for _, backend := range slices.Sorted(maps.Keys(count)) {
		w := count[backend]
		w.Backend = m.relay.backendName(backend)
		w.Seconds = time.Since(v.began).Seconds()
		waits = append(waits, w)
	}
	return waits
}

// startMove starts the closing handshake of a session, unless it is closing already.
func (m *mover) startMove(s *session) {
	batch := m.batch
	batch.unfinished.Add(1)
	onEnd := func(cut bool) {
		if cut {
			batch.cuts.Add(1)
		}
		if batch.unfinished.Add(-1) == 0 {
			m.wake.notify()
		}
	}
	if !m.closeSession(s, onEnd) { // it is about to end
		batch.unfinished.Add(-1)
		return
	}
	batch.sessions++
	batch.moved[s.namespace] = struct{}{}
}

// endBatch notes that no session is left that has to move to the batch's table.
func (m *mover) endBatch() {
	if m.batch != nil && m.batch.sessions+m.batch.cancelled > 0 {
		m.finishing = append(m.finishing, m.batch)
	}
	m.batch = nil
}

// reportFinished logs the results of the batches whose last session is over, and passes
// them to the sources of overrides that report moves.
func (m *mover) reportFinished() {
	m.finishing = slices.DeleteFunc(m.finishing, func(batch *moveBatch) bool {
		if batch.unfinished.Load() > 0 {
			return false
		}
		batch.namespaces, batch.cut = len(batch.moved), int(batch.cuts.Load())
		if !batch.began.IsZero() {
			batch.time = time.Since(batch.began)
		}
		m.log.Info("move finished", "version", batch.version,
			"namespaces", batch.namespaces, "sessions", batch.sessions,
			"seconds", batch.time.Seconds(), "held_seconds", batch.held.Seconds(),
			"cut", batch.cut, "cancelled", batch.cancelled)
		for _, s := range m.router.sources {
			if reporter, ok := s.overrideSource.(moveReporter); ok {
				reporter.reportMove(batch.moveResult)
			}
		}
		return true
	})
}

// maxDrainInterval is the longest time between two sessions in a drain, so that a
// router with few sessions does not use all of its time.
const maxDrainInterval = 100 * time.Millisecond

// drain closes all sessions gracefully, in random order and spread over the given time,
// and waits until they are over. When ctx ends, it ends all that are left at once. It
// returns how many sessions have ended because of the drain.
func drain(ctx context.Context, r *relay, over time.Duration) int64 {
	before := r.ended[causeDrain].Load()
	stop := context.AfterFunc(ctx, func() { r.endAll(causeDrain) })
	defer stop()
	all := r.filter(func(s *session) bool { return !s.isClosing() })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	p := pace{interval: min(maxDrainInterval, over/time.Duration(max(1, len(all))))}
	p.start(time.Now())
	for _, s := range all {
		if s.isClosing() {
			continue
		}
		if wait := time.Until(p.next()); wait >= paceTick {
			sleep(ctx, wait)
		}
		s.closeGracefully(causeDrain, nil)
		p.advance(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}

// writeMetrics writes how many sessions are still to be moved.
func (m *mover) writeMetrics(w metricsWriter) {
	w.single("router_sessions_to_move", "gauge", "Open sessions whose owner changed and which have not been closed yet.",
		float64(m.pendingSessions.Load()))
	s := m.status()
	info := w.family("router_handoff_info", "gauge",
		"Always 1. The label has the mode of -handoff.")
	info(1, "mode", s.Mode)
	w.single("router_handoff_in_progress", "gauge",
		"1 while not all namespaces have the owner of the newest table.", boolToFloat(s.InProgress))
	w.single("router_handoff_steps_total", "counter",
		"Steps of hand-offs that are done.", float64(m.steps.Load()))
	seconds := map[string]float64{}
	if t := m.router.table(); t != nil {
		for i := range t.backends.count {
			seconds[t.name(t.backends.first+i)] = 0
		}
	}
	for _, wait := range s.WaitingFor {
		seconds[wait.Backend] = wait.Seconds
	}
	if len(seconds) > 0 {
		waiting := w.family("router_handoff_waiting_seconds", "gauge",
			"How long the step of a hand-off has waited for this backend to end its sessions.")
		for _, backend := range slices.Sorted(maps.Keys(seconds)) {
			waiting(seconds[backend], "for", backend)
		}
	}
	w.single("router_handoff_unproven_total", "counter",
		"Upgrades and sessions that a backend may have served after they were given up.",
		float64(s.Unproven))
}
