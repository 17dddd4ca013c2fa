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
