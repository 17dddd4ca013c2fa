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
	maxSettleFactor = 10                     // times the settle time is how long changes in a row are waited for
	minTargetRetry  = 100 * time.Millisecond // from the first dial that failed to the next, then twice as long
	maxTargetRetry  = 5 * time.Second
)

// mover makes the sessions part whose namespace has another owner now, at a pace
// that the backends can bear (invariant 2). All other sessions stay. An owner has
// to take a connection before it gets the first of a change's sessions: until
// then they stay too.
type mover struct {
	// Static after construction.
	router       *router
	relay        *relay
	settleTime   time.Duration // how long the table has to stay as it is before sessions move
	pace         pace          // owned by run
	probe        func(ctx context.Context, backend int) error
	closeSession func(s *session, done func(cut bool)) bool
	onFinished   func(moveResult) // gets each receipt; nil for nobody; must not block for long
	log          *slog.Logger

	wake            chan struct{}   // capacity 1; sent to by check, never closed
	batchDone       chan struct{}   // capacity 1; sent to when all sessions of a wave that have left are over
	dialResults     chan dialResult // sent to by dial
	pendingSessions atomic.Int64    // sessions that are to move and have not yet

	// Owned by run.
	firstChange, settledAt time.Time       // of the changes that have not settled: when the first came, when they will; zero if none
	batches                []*moveBatch    // whose receipts are not written
	queue                  []queuedSession // by place
	deferred               []queuedSession // whose owner has changed again: the next plan is for them
	targets                map[int]*moveTarget
	cancelDials            context.CancelFunc // ends all dial
	dials                  sync.WaitGroup     // all dial
}

// moveTarget is a backend that gets sessions.
type moveTarget struct {
	backend   int
	reachable bool            // it has taken a connection
	queued    []queuedSession // until then
	logged    bool            // the log says that they wait
}

// dialResult is what came of dialling an owner: nil if it is there.
type dialResult struct {
	*moveTarget
	err error
}

// moveResult is the receipt of a change.
type moveResult struct {
	version    string // of the table
	namespaces int    // that left their old owner, with sessions
	sessions   int    // of these
	cut        int    // of these, which did not part in time
	cancelled  int    // sessions that stay, since a later change took this one back
	time       time.Duration
}

// moveBatch is the sessions that one settled change of the table moves.
type moveBatch struct {
	moveResult
	begun        time.Time
	remaining    int                 // sessions whose turn is to come
	namespaceSet map[string]struct{} // of the namespaces

	unfinished atomic.Int64 // sessions that are not over
	cuts       atomic.Int64
}

// queuedSession is a session that is to move. Its place is the hash of its namespace, so
// that all sessions of one move in a row, and at about the same time in all
// routers: they are apart, some with the old owner and some with the new one, for
// as short as can be. To the old owners and the new ones the order is a random one.
type queuedSession struct {
	session *session
	batch   *moveBatch
	order   uint64
}

// newMover returns a mover of so many sessions per second, 0 for all at once.
// probe returns nil once the backend takes a connection.
func newMover(router *router, relay *relay, rate int, probe func(context.Context, int) error, log *slog.Logger) *mover {
	m := &mover{router: router, relay: relay, probe: probe, log: log,
		wake: make(chan struct{}, 1), batchDone: make(chan struct{}, 1), dialResults: make(chan dialResult), cancelDials: func() {},
		closeSession: func(s *session, done func(bool)) bool { return s.closeGracefully(causeMoved, done) }}
	if rate > 0 {
		m.pace.interval = time.Second / time.Duration(rate)
	}
	return m
}

// ownersChanged makes run look for sessions to move. It does not block.
func (m *mover) ownersChanged() { notify(m.wake) }

func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// shouldMove reports whether the session's namespace has another owner, or the same
// which is another pod now.
func (m *mover) shouldMove(s *session) bool {
	return m.owner(s) != s.backend || m.relay.podReplaced(s)
}

// owner returns the backend that the session's namespace belongs to. One that is
// refused has no owner, and its sessions stay where they are.
func (m *mover) owner(s *session) int {
	if owner, ok := m.router.table().owner(s.namespace); ok {
		return owner
	}
	return s.backend
}

// run moves sessions after each check, until ctx ends.
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

// setTimer sets the clock to the next thing that is to be done by the time.
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

// restartSettling waits for the table to settle: for as long again after each change, but
// for a bounded time after the first.
func (m *mover) restartSettling(now time.Time) {
	if m.settledAt.IsZero() {
		m.firstChange = now
	}
	m.settledAt = now.Add(m.settleTime)
	if last := m.firstChange.Add(maxSettleFactor * m.settleTime); m.settledAt.After(last) {
		m.settledAt = last
	}
}

// startBatch finds the sessions that are not with their owner. Those that were to move
// before and still are remain with their wave; the rest of those
// is cancelled. Each new owner has to show again that it is there.
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
	if table == nil { // a pod was replaced before the overrides were read: there is no session yet
		return
	}
	newBatch := &moveBatch{begun: now, namespaceSet: map[string]struct{}{}}
	newBatch.version = table.version
	for _, s := range m.relay.filter(func(s *session) bool { return !s.isClosing() && m.shouldMove(s) }) {
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

// enqueue puts t with its new owner, which is dialled until it is there or ctx ends.
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

// dialTarget dials the owner until it takes a connection or ctx ends, and tells run of
// each time.
func (m *mover) dialTarget(ctx context.Context, target *moveTarget) {
	for wait := minTargetRetry; ; wait = min(2*wait, maxTargetRetry) {
		err := m.probe(ctx, target.backend)
		select {
		case <-ctx.Done():
			return
		case m.dialResults <- dialResult{target, err}:
		}
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

// handleDialResult makes those ready that waited for the owner, or says once that they
// wait.
func (m *mover) handleDialResult(d dialResult) {
	target := d.moveTarget
	switch {
	case m.targets[target.backend] != target: // of an earlier plan
	case d.err == nil:
		m.queue, target.queued, target.reachable = append(m.queue, target.queued...), nil, true
		slices.SortFunc(m.queue, func(a, b queuedSession) int { return cmp.Compare(a.order, b.order) })
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
			m.log.Warn("sessions wait for their new owner", "backend", m.relay.backendName(target.backend),
				"sessions", len(target.queued), "error", d.err.Error())
		}
		target.logged = true
	}
}

// moveDue makes the sessions part whose turn it is, from the last of those that are
// ready.
func (m *mover) moveDue() {
	now := time.Now()
	for len(m.queue) > 0 && !m.pace.next().After(now) {
		last := len(m.queue) - 1
		q := m.queue[last]
		m.queue = m.queue[:last]
		switch target := m.targets[m.owner(q.session)]; {
		case q.session.isClosing() || !m.shouldMove(q.session):
			m.cancel(q)
		case target == nil || !target.reachable: // the table has changed since the plan
			m.deferred = append(m.deferred, q)
		default:
			m.startMove(q)
			m.pace.advance(now)
		}
	}
}

// startMove makes the session of t part.
func (m *mover) startMove(q queuedSession) {
	batch := q.batch
	batch.remaining--
	m.pendingSessions.Add(-1)
	batch.unfinished.Add(1)
	over := func(cut bool) {
		if cut {
			batch.cuts.Add(1)
		}
		if batch.unfinished.Add(-1) == 0 {
			notify(m.batchDone)
		}
	}
	if !m.closeSession(q.session, over) { // it has just ended
		batch.unfinished.Add(-1)
		return
	}
	batch.sessions++
	batch.namespaceSet[q.session.namespace] = struct{}{}
}

// cancel takes note that the session of t need not move any more.
func (m *mover) cancel(q queuedSession) {
	q.batch.remaining--
	m.pendingSessions.Add(-1)
	if !q.session.isClosing() {
		q.batch.cancelled++
	}
}

// finishBatches writes the receipts of the waves whose sessions are over.
func (m *mover) finishBatches() {
	m.batches = slices.DeleteFunc(m.batches, func(batch *moveBatch) bool {
		if batch.remaining > 0 || batch.unfinished.Load() > 0 {
			return false
		}
		batch.namespaces, batch.cut, batch.time = len(batch.namespaceSet), int(batch.cuts.Load()), time.Since(batch.begun)
		m.log.Info("moved", "version", batch.version, "namespaces", batch.namespaces, "sessions", batch.sessions,
			"seconds", batch.time.Seconds(), "cut", batch.cut, "cancelled", batch.cancelled)
		if m.onFinished != nil {
			m.onFinished(batch.moveResult)
		}
		return true
	})
}

const (
	paceTick    = 2 * time.Millisecond // the least wait: what is due by then is done together
	paceCatchUp = time.Second          // how far behind its schedule a pace makes up for
)

// pace is one each interval, jittered by up to half of it. The schedule is an
// absolute one: what was late does not make the rest late.
type pace struct {
	interval  time.Duration // 0: all at once
	scheduled time.Time     // of the next
	jitter    time.Duration // of the next
}

// start starts the schedule, or goes on with it after a time without anything to
// do.
func (p *pace) start(now time.Time) {
	if p.scheduled.Before(now) {
		p.scheduled = now
	}
}

// next returns when the next is due.
func (p *pace) next() time.Time { return p.scheduled.Add(p.jitter) }

// advance takes note that the next was done.
func (p *pace) advance(now time.Time) {
	p.scheduled = p.scheduled.Add(p.interval)
	p.start(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
}

// maxDrainInterval is the longest time from one session to the next in a drain: a
// router with few sessions need not use all of its time.
const maxDrainInterval = 100 * time.Millisecond

// drain makes all sessions part, in random order and spread over the given time,
// and returns how many once they are over. When ctx ends the rest ends at once.
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
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
		s.closeGracefully(causeDrain, nil)
		p.advance(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}

// writeMetrics writes how many sessions are still to be moved.
func (m *mover) writeMetrics(w metricsWriter) {
	w.single("router_sessions_to_move", "gauge", "Open sessions whose owner has changed and whose turn is to come.",
		float64(m.pendingSessions.Load()))
}
