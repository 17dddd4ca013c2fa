package main

import (
	"cmp"
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxSettleFactor = 10                     // × settleTime: the longest wait for a stable table
	minTargetRetry  = 100 * time.Millisecond // after the first failed dial; then it doubles
	maxTargetRetry  = 5 * time.Second
)

// mover closes the sessions whose namespace has another owner now (invariant 2), at a pace
// that the backends can bear. Their clients connect again, to the new owner. All
// other sessions stay. A new owner must accept a connection before the mover closes
// the first session for it.
type mover struct {
	// Static after construction.
	router       *router
	relay        *relay
	settleTime   time.Duration // time without a change of the table before sessions move
	probe        func(ctx context.Context, backend int) error
	closeSession func(s *session, onEnd func(cut bool)) bool // closeGracefully
	log          *slog.Logger

	wake            wakeup          // of run, by ownersChanged
	batchDone       wakeup          // of run, when a batch's closes are all done
	dialResults     chan dialResult // dialTarget sends
	pendingSessions atomic.Int64    // sessions that have to move and have not moved yet

	// Owned by run.
	pace        pace
	firstChange time.Time       // of the changes that have not settled
	settledAt   time.Time       // when these will have settled; zero if there are none
	batches     []*moveBatch    // that are not finished
	queue       []queuedSession // with reachable targets, sorted by order
	deferred    []queuedSession // whose owner changed again: the next batch queues them anew
	targets     map[int]*moveTarget
	cancelDials context.CancelFunc // ends all dialTarget
	dials       sync.WaitGroup     // all dialTarget
}

// moveTarget is a new owner of sessions in this move.
type moveTarget struct {
	backend   int
	reachable bool            // it has accepted a connection
	queued    []queuedSession // until it is reachable
	logged    bool            // the log says that its sessions wait
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
}

// moveReporter is an overrideSource that reports moves.
type moveReporter interface {
	// reportMove reports a move that ended. It must not block for long.
	reportMove(moveResult)
}

// moveBatch is the sessions that have to move because of one settled change of the
// table. run owns it, but for the atomic fields.
type moveBatch struct {
	moveResult
	begun        time.Time
	remaining    int                 // sessions that are queued or deferred
	namespaceSet map[string]struct{} // namespaces of the closed sessions

	unfinished atomic.Int64 // sessions whose closing handshake goes on
	cuts       atomic.Int64 // sessions whose closing handshake was cut
}

// queuedSession is a session that has to move. order is the hash of its namespace:
// all sessions of a namespace move in a row, and at about the same time in all
// routers. So the time is short in which some of them are with the old owner and some
// with the new one. Across backends the order is random.
type queuedSession struct {
	session *session
	batch   *moveBatch
	order   uint64
}

// newMover returns a mover that moves rate sessions per second, or all at once if rate
// is 0. probe dials a backend and returns nil if it accepted the connection.
func newMover(router *router, relay *relay, rate int,
	probe func(ctx context.Context, backend int) error, log *slog.Logger) *mover {
	m := &mover{
		router:      router,
		relay:       relay,
		probe:       probe,
		log:         log,
		wake:        newWakeup(),
		batchDone:   newWakeup(),
		dialResults: make(chan dialResult),
		cancelDials: func() {},
		closeSession: func(s *session, onEnd func(cut bool)) bool {
			return s.closeGracefully(causeMoved, onEnd)
		},
	}
	if rate > 0 {
		m.pace.interval = time.Second / time.Duration(rate)
	}
	return m
}

// ownersChanged makes run look for sessions to move. It does not block.
func (m *mover) ownersChanged() { m.wake.notify() }

// shouldMove reports whether the session's namespace has another owner now, or the same
// owner with another pod.
func (m *mover) shouldMove(s *session) bool {
	return m.owner(s) != s.backend || m.relay.podReplaced(s)
}

// owner returns the owner of the session's namespace. If its override is unresolved, it
// has no owner: its sessions stay with their backend, which owner then returns.
func (m *mover) owner(s *session) int {
	if owner, ok := m.router.table().owner(s.namespace); ok {
		return owner
	}
	return s.backend
}

// run moves sessions after each ownersChanged, until ctx ends.
func (m *mover) run(ctx context.Context) {
	defer m.dials.Wait()
	defer func() { m.cancelDials() }()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
			m.restartSettling(time.Now())
		case d := <-m.dialResults:
			m.handleDialResult(d)
		case <-m.batchDone:
		case <-timer.C:
		}
		if now := time.Now(); !m.settledAt.IsZero() && !now.Before(m.settledAt) {
			m.settledAt = time.Time{}
			m.startBatch(ctx, now)
		}
		m.moveDue()
		m.finishBatches()
		m.setTimer(timer)
	}
}

// setTimer sets the timer to the next time at which run has something to do.
func (m *mover) setTimer(timer *time.Timer) {
	timer.Stop()
	next := m.settledAt
	if len(m.queue) > 0 {
		if due := m.pace.next(); next.IsZero() || due.Before(next) {
			next = due
		}
	}
	if !next.IsZero() {
		timer.Reset(max(time.Until(next), paceTick))
	}
}

// restartSettling makes run wait for settleTime from now, but no longer than
// maxSettleFactor times settleTime from the first change.
func (m *mover) restartSettling(now time.Time) {
	if m.settledAt.IsZero() {
		m.firstChange = now
	}
	m.settledAt = now.Add(m.settleTime)
	if last := m.firstChange.Add(maxSettleFactor * m.settleTime); m.settledAt.After(last) {
		m.settledAt = last
	}
}

// startBatch queues all sessions that are not with their owner. Sessions that were
// queued before stay in their batch. Those of them that need not move any more are
// cancelled. Each target is dialled again, even if it was reachable before.
func (m *mover) startBatch(ctx context.Context, now time.Time) {
	all := slices.Concat(m.queue, m.deferred)
	for _, target := range m.targets {
		all = append(all, target.queued...)
	}
	before := map[*session]*moveBatch{}
	for _, q := range all {
		before[q.session] = q.batch
	}
	m.cancelDials()
	ctx, m.cancelDials = context.WithCancel(ctx)
	m.queue, m.deferred, m.targets = nil, nil, map[int]*moveTarget{}
	table := m.router.table()
	if table == nil { // a pod was replaced before there was a table: no sessions yet
		return
	}
	newBatch := &moveBatch{begun: now, namespaceSet: map[string]struct{}{}}
	newBatch.version = table.version
	moves := func(s *session) bool { return !s.isClosing() && m.shouldMove(s) }
	for _, s := range m.relay.filter(moves) {
		q := queuedSession{s, before[s], hash64(s.namespace)}
		if delete(before, s); q.batch == nil {
			q.batch = newBatch
			newBatch.remaining++
			m.pendingSessions.Add(1)
		}
		m.enqueue(ctx, q)
	}
	for s, batch := range before {
		m.cancel(queuedSession{session: s, batch: batch})
	}
	if newBatch.remaining > 0 {
		m.batches = append(m.batches, newBatch)
	}
}

// enqueue queues q for its new owner. It starts dialTarget if q is the first one there.
func (m *mover) enqueue(ctx context.Context, q queuedSession) {
	backend := m.owner(q.session)
	target := m.targets[backend]
	if target == nil {
		target = &moveTarget{backend: backend}
		m.targets[backend] = target
		m.dials.Go(func() { m.dialTarget(ctx, target) })
	}
	target.queued = append(target.queued, q)
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

// handleDialResult moves the target's sessions to the queue if it is reachable. If not,
// it cancels those that have ended, and logs, once, that the others wait.
func (m *mover) handleDialResult(d dialResult) {
	target := d.moveTarget
	switch {
	case m.targets[target.backend] != target: // of an earlier batch
	case d.err == nil:
		m.queue, target.queued, target.reachable = append(m.queue, target.queued...), nil, true
		slices.SortFunc(m.queue, func(a, b queuedSession) int {
			return cmp.Compare(a.order, b.order)
		})
		m.pace.start(time.Now())
	default:
		target.queued = slices.DeleteFunc(target.queued, func(q queuedSession) bool {
			over := q.session.isClosing()
			if over {
				m.cancel(q)
			}
			return over
		})
		if !target.logged {
			m.log.Warn("new owner unreachable; move delayed",
				"backend", m.relay.backendName(target.backend),
				"sessions", len(target.queued), "error", d.err.Error())
		}
		target.logged = true
	}
}

// moveDue moves the queued sessions that are due by the pace, from the end of the
// queue.
func (m *mover) moveDue() {
	now := time.Now()
	for len(m.queue) > 0 && !m.pace.next().After(now) {
		last := len(m.queue) - 1
		q := m.queue[last]
		m.queue = m.queue[:last]
		switch target := m.targets[m.owner(q.session)]; {
		case q.session.isClosing() || !m.shouldMove(q.session):
			m.cancel(q)
		case target == nil || !target.reachable: // the table has changed since startBatch
			m.deferred = append(m.deferred, q)
		default:
			m.startMove(q)
			m.pace.advance(now)
		}
	}
}

// startMove starts the closing handshake of q's session.
func (m *mover) startMove(q queuedSession) {
	batch := q.batch
	batch.remaining--
	m.pendingSessions.Add(-1)
	batch.unfinished.Add(1)
	onEnd := func(cut bool) {
		if cut {
			batch.cuts.Add(1)
		}
		if batch.unfinished.Add(-1) == 0 {
			m.batchDone.notify()
		}
	}
	if !m.closeSession(q.session, onEnd) { // it has just ended
		batch.unfinished.Add(-1)
		return
	}
	batch.sessions++
	batch.namespaceSet[q.session.namespace] = struct{}{}
}

// cancel notes that q's session need not move any more. If the session has not ended,
// it counts as cancelled.
func (m *mover) cancel(q queuedSession) {
	q.batch.remaining--
	m.pendingSessions.Add(-1)
	if !q.session.isClosing() {
		q.batch.cancelled++
	}
}

// finishBatches logs the batches whose sessions have all moved or were cancelled, and
// passes their results to the sources of overrides that report moves.
func (m *mover) finishBatches() {
	m.batches = slices.DeleteFunc(m.batches, func(batch *moveBatch) bool {
		if batch.remaining > 0 || batch.unfinished.Load() > 0 {
			return false
		}
		batch.namespaces, batch.cut = len(batch.namespaceSet), int(batch.cuts.Load())
		batch.time = time.Since(batch.begun)
		m.log.Info("move finished", "version", batch.version,
			"namespaces", batch.namespaces, "sessions", batch.sessions,
			"seconds", batch.time.Seconds(), "cut", batch.cut, "cancelled", batch.cancelled)
		for _, s := range m.router.sources {
			if reporter, ok := s.overrideSource.(moveReporter); ok {
				reporter.reportMove(batch.moveResult)
			}
		}
		return true
	})
}

const (
	paceTick    = 2 * time.Millisecond // the shortest wait: steps due by then are done at once
	paceCatchUp = time.Second          // how much delay a pace makes up for
)

// pace spreads steps over time: one each interval, with a jitter of up to half of it.
// The schedule is absolute: a step that is late does not delay the steps after it.
type pace struct {
	interval  time.Duration // 0: all at once
	scheduled time.Time     // of the next step, without its jitter
	jitter    time.Duration // of the next step
}

// start starts the schedule, or continues it after a time without steps: the next step
// is not due before now.
func (p *pace) start(now time.Time) {
	if p.scheduled.Before(now) {
		p.scheduled = now
	}
}

// next returns when the next step is due.
func (p *pace) next() time.Time { return p.scheduled.Add(p.jitter) }

// advance schedules the step after the one that was just done.
func (p *pace) advance(now time.Time) {
	p.scheduled = p.scheduled.Add(p.interval)
	p.start(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
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
}
