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
	settleMost    = 10                     // times the settle time is how long changes in a row are waited for
	newOwnerFirst = 100 * time.Millisecond // from the first dial that failed to the next, then twice as long
	newOwnerMost  = 5 * time.Second
)

// mover makes the sessions part whose namespace has another owner now, at a pace
// that the backends can bear (invariant 2). All other sessions stay. An owner has
// to take a connection before it gets the first of a change's sessions: until
// then they stay too.
type mover struct {
	// Static after construction.
	router *router
	relay  *relay
	settle time.Duration // how long the table has to stay as it is before sessions move
	pace   pace          // owned by run
	probe  func(ctx context.Context, backend int) error
	part   func(s *session, done func(cut bool)) bool
	told   func(moved) // gets each receipt; nil for nobody; must not block for long
	log    *slog.Logger

	wake    chan struct{} // capacity 1; sent to by check, never closed
	over    chan struct{} // capacity 1; sent to when all sessions of a wave that have left are over
	dialled chan dialled  // sent to by dial
	waiting atomic.Int64  // sessions that are to move and have not yet

	// Owned by run.
	first, due time.Time // of the changes that have not settled: when the first came, when they will; zero if none
	waves      []*wave   // whose receipts are not written
	ready      []turn    // by place
	later      []turn    // whose owner has changed again: the next plan is for them
	owners     map[int]*newOwner
	forget     context.CancelFunc // ends all dial
	dials      sync.WaitGroup     // all dial
}

// newOwner is a backend that gets sessions.
type newOwner struct {
	backend int
	there   bool   // it has taken a connection
	waiting []turn // until then
	told    bool   // the log says that they wait
}

// dialled is what came of dialling an owner: nil if it is there.
type dialled struct {
	*newOwner
	err error
}

// moved is the receipt of a change.
type moved struct {
	version    string // of the table
	namespaces int    // that left their old owner, with sessions
	sessions   int    // of these
	cut        int    // of these, which did not part in time
	cancelled  int    // sessions that stay, since a later change took this one back
	time       time.Duration
}

// wave is the sessions that one settled change of the table moves.
type wave struct {
	moved
	begun time.Time
	left  int                 // sessions whose turn is to come
	names map[string]struct{} // of the namespaces

	parting atomic.Int64 // sessions that are not over
	cuts    atomic.Int64
}

// turn is a session that is to move. Its place is the hash of its namespace, so
// that all sessions of one move in a row, and at about the same time in all
// routers: they are apart, some with the old owner and some with the new one, for
// as short as can be. To the old owners and the new ones the order is a random one.
type turn struct {
	session *session
	wave    *wave
	place   uint64
}

// newMover returns a mover of so many sessions per second, 0 for all at once.
// probe returns nil once the backend takes a connection.
func newMover(router *router, relay *relay, rate int, probe func(context.Context, int) error, log *slog.Logger) *mover {
	m := &mover{router: router, relay: relay, probe: probe, log: log,
		wake: make(chan struct{}, 1), over: make(chan struct{}, 1), dialled: make(chan dialled), forget: func() {},
		part: func(s *session, done func(bool)) bool { return s.part(causeMoved, done) }}
	if rate > 0 {
		m.pace.interval = time.Second / time.Duration(rate)
	}
	return m
}

// check makes run look for sessions to move. It does not block.
func (m *mover) check() { nudge(m.wake) }

func nudge(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// misplaced reports whether the session's namespace has another owner, or the same
// which is another pod now.
func (m *mover) misplaced(s *session) bool {
	return m.owner(s) != s.backend || m.relay.replaced(s)
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
	defer func() { m.forget() }()
	clock := time.NewTimer(0)
	defer clock.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
			m.changed(time.Now())
		case d := <-m.dialled:
			m.answered(d)
		case <-m.over:
		case <-clock.C:
		}
		if now := time.Now(); !m.due.IsZero() && !now.Before(m.due) {
			m.due = time.Time{}
			m.plan(ctx, now)
		}
		m.move()
		m.receipts()
		m.rest(clock)
	}
}

// rest sets the clock to the next thing that is to be done by the time.
func (m *mover) rest(clock *time.Timer) {
	clock.Stop()
	next := m.due
	if len(m.ready) > 0 {
		if turn := m.pace.next(); next.IsZero() || turn.Before(next) {
			next = turn
		}
	}
	if !next.IsZero() {
		clock.Reset(max(time.Until(next), paceTick))
	}
}

// changed waits for the table to settle: for as long again after each change, but
// for a bounded time after the first.
func (m *mover) changed(now time.Time) {
	if m.due.IsZero() {
		m.first = now
	}
	m.due = now.Add(m.settle)
	if last := m.first.Add(settleMost * m.settle); m.due.After(last) {
		m.due = last
	}
}

// plan finds the sessions that are not with their owner. Those that were to move
// before and still are remain with their wave; the rest of those
// is cancelled. Each new owner has to show again that it is there.
func (m *mover) plan(ctx context.Context, now time.Time) {
	all := slices.Concat(m.ready, m.later)
	for _, owner := range m.owners {
		all = append(all, owner.waiting...)
	}
	before := map[*session]*wave{}
	for _, t := range all {
		before[t.session] = t.wave
	}
	m.forget()
	ctx, m.forget = context.WithCancel(ctx)
	m.ready, m.later, m.owners = nil, nil, map[int]*newOwner{}
	table := m.router.table()
	if table == nil { // a pod was replaced before the overrides were read: there is no session yet
		return
	}
	fresh := &wave{begun: now, names: map[string]struct{}{}}
	fresh.version = table.version
	for _, s := range m.relay.where(func(s *session) bool { return !s.ending() && m.misplaced(s) }) {
		t := turn{s, before[s], spread(s.namespace)}
		if delete(before, s); t.wave == nil {
			t.wave = fresh
			fresh.left++
			m.waiting.Add(1)
		}
		m.await(ctx, t)
	}
	for s, c := range before {
		m.drop(turn{session: s, wave: c})
	}
	if fresh.left > 0 {
		m.waves = append(m.waves, fresh)
	}
}

// await puts t with its new owner, which is dialled until it is there or ctx ends.
func (m *mover) await(ctx context.Context, t turn) {
	backend := m.owner(t.session)
	owner := m.owners[backend]
	if owner == nil {
		owner = &newOwner{backend: backend}
		m.owners[backend] = owner
		m.dials.Go(func() { m.dial(ctx, owner) })
	}
	owner.waiting = append(owner.waiting, t)
}

// dial dials the owner until it takes a connection or ctx ends, and tells run of
// each time.
func (m *mover) dial(ctx context.Context, owner *newOwner) {
	for wait := newOwnerFirst; ; wait = min(2*wait, newOwnerMost) {
		err := m.probe(ctx, owner.backend)
		select {
		case <-ctx.Done():
			return
		case m.dialled <- dialled{owner, err}:
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

// answered makes those ready that waited for the owner, or says once that they
// wait.
func (m *mover) answered(d dialled) {
	owner := d.newOwner
	switch {
	case m.owners[owner.backend] != owner: // of an earlier plan
	case d.err == nil:
		m.ready, owner.waiting, owner.there = append(m.ready, owner.waiting...), nil, true
		slices.SortFunc(m.ready, func(a, b turn) int { return cmp.Compare(a.place, b.place) })
		m.pace.begin(time.Now())
	default:
		owner.waiting = slices.DeleteFunc(owner.waiting, func(t turn) bool {
			over := t.session.ending()
			if over {
				m.drop(t)
			}
			return over
		})
		if !owner.told {
			m.log.Warn("sessions wait for their new owner", "backend", m.relay.name(owner.backend),
				"sessions", len(owner.waiting), "error", d.err.Error())
		}
		owner.told = true
	}
}

// move makes the sessions part whose turn it is, from the last of those that are
// ready.
func (m *mover) move() {
	now := time.Now()
	for len(m.ready) > 0 && !m.pace.next().After(now) {
		last := len(m.ready) - 1
		t := m.ready[last]
		m.ready = m.ready[:last]
		switch next := m.owners[m.owner(t.session)]; {
		case t.session.ending() || !m.misplaced(t.session):
			m.drop(t)
		case next == nil || !next.there: // the table has changed since the plan
			m.later = append(m.later, t)
		default:
			m.send(t)
			m.pace.took(now)
		}
	}
}

// send makes the session of t part.
func (m *mover) send(t turn) {
	c := t.wave
	c.left--
	m.waiting.Add(-1)
	c.parting.Add(1)
	over := func(cut bool) {
		if cut {
			c.cuts.Add(1)
		}
		if c.parting.Add(-1) == 0 {
			nudge(m.over)
		}
	}
	if !m.part(t.session, over) { // it has just ended
		c.parting.Add(-1)
		return
	}
	c.sessions++
	c.names[t.session.namespace] = struct{}{}
}

// drop takes note that the session of t need not move any more.
func (m *mover) drop(t turn) {
	t.wave.left--
	m.waiting.Add(-1)
	if !t.session.ending() {
		t.wave.cancelled++
	}
}

// receipts writes the receipts of the waves whose sessions are over.
func (m *mover) receipts() {
	m.waves = slices.DeleteFunc(m.waves, func(c *wave) bool {
		if c.left > 0 || c.parting.Load() > 0 {
			return false
		}
		c.namespaces, c.cut, c.time = len(c.names), int(c.cuts.Load()), time.Since(c.begun)
		m.log.Info("moved", "version", c.version, "namespaces", c.namespaces, "sessions", c.sessions,
			"seconds", c.time.Seconds(), "cut", c.cut, "cancelled", c.cancelled)
		if m.told != nil {
			m.told(c.moved)
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
	interval time.Duration // 0: all at once
	slot     time.Time     // of the next
	jitter   time.Duration // of the next
}

// begin starts the schedule, or goes on with it after a time without anything to
// do.
func (p *pace) begin(now time.Time) {
	if p.slot.Before(now) {
		p.slot = now
	}
}

// next returns when the next is due.
func (p *pace) next() time.Time { return p.slot.Add(p.jitter) }

// took takes note that the next was done.
func (p *pace) took(now time.Time) {
	p.slot = p.slot.Add(p.interval)
	p.begin(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
}

// drainSlowest is the longest time from one session to the next in a drain: a
// router with few sessions need not use all of its time.
const drainSlowest = 100 * time.Millisecond

// drain makes all sessions part, in random order and spread over the given time,
// and returns how many once they are over. When ctx ends the rest ends at once.
func drain(ctx context.Context, r *relay, over time.Duration) int64 {
	before := r.ended[causeDrain].Load()
	stop := context.AfterFunc(ctx, func() { r.endAll(causeDrain) })
	defer stop()
	all := r.where(func(s *session) bool { return !s.ending() })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	p := pace{interval: min(drainSlowest, over/time.Duration(max(1, len(all))))}
	p.begin(time.Now())
	for _, s := range all {
		if s.ending() {
			continue
		}
		if wait := time.Until(p.next()); wait >= paceTick {
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
		s.part(causeDrain, nil)
		p.took(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}
