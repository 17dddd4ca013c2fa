package main

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	dialsMost   = 64 // dials of one backend at once
	redialFirst = 50 * time.Millisecond
	redialMost  = time.Second
)

// errAskAgain says that the table was swapped while an upgrade waited.
var errAskAgain = errors.New("the owner may be another")

// holds makes upgrades wait until their backend is ready, and then lets them
// dial in the order in which they came, at most dialsMost at once. None of them
// polls: what they wait for wakes them. While dials fail, one upgrade at a time
// dials for all of its backend's.
type holds struct {
	// Static after construction.
	ready func(ordinal int) error // why a backend must not be dialled, or nil

	swaps  atomic.Int64 // of the table
	astray atomic.Int64 // lines whose astray is set

	// Guarded by mu.
	mu      sync.Mutex
	tickets int64
	lines   map[int]*line // by ordinal
}

// line is the upgrades of one backend. It is guarded by the holds' mu.
type line struct {
	waiting []*waiter // by ticket
	dialing int
	fails   int       // dials in a row
	failure error     // of the last dial that failed, nil since a good one
	rest    time.Time // until then nobody dials
	away    bool      // it was not ready at the last look
	astray  bool      // another backend answered at its address, and it has not since
}

// places are those of the upgrades under way: held, dialled or in the handshake. One
// backend cannot take those of the others, whatever it is that its upgrades wait for:
// half of the limit is divided evenly among the backends, and of the other half, the
// pool, a backend may have as much as it leaves free. So there is room for the clients
// of the last one that works, and for a crowd that waits for one that restarts. The
// zero value has none taken.
type places struct {
	mu     sync.Mutex // guards the rest
	all    int
	of     map[int]int // those taken, by ordinal
	own    int         // of each backend
	pooled int         // those taken beyond own
}

// take takes a place of the limit's for an upgrade to one of so many backends, and
// returns what taken does then. The caller calls leave. Each backend has at least one
// place, whatever the limit.
func (p *places) take(ordinal, backends, limit int) (all, own int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if share := max(1, limit/2/backends); share != p.own {
		p.own, p.pooled = share, 0
		for _, taken := range p.of {
			p.pooled += max(0, taken-share)
		}
	}
	free := limit - p.own*backends - p.pooled
	if taken := p.of[ordinal]; taken >= p.own && taken-p.own >= free {
		return p.all, taken, false
	}
	p.add(ordinal, 1)
	return p.all, p.of[ordinal], true
}

// leave gives a place back.
func (p *places) leave(ordinal int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(ordinal, -1)
}

// move makes a place that of an upgrade to another backend, which may then have more
// than its share: that is how those who wait get away from a backend that is dead.
func (p *places) move(from, to int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.add(from, -1)
	p.add(to, 1)
}

// add counts n places more. mu is held.
func (p *places) add(ordinal, n int) {
	if p.of == nil {
		p.of = map[int]int{}
	}
	before := p.of[ordinal]
	p.pooled += max(0, before+n-p.own) - max(0, before-p.own)
	p.all += n
	if p.of[ordinal] = before + n; before+n == 0 {
		delete(p.of, ordinal)
	}
}

// taken is how many places are, and how many of these are the backend's.
func (p *places) taken(ordinal int) (all, own int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all, p.of[ordinal]
}

// waiter is one upgrade that waits for its turn.
type waiter struct {
	ticket int64         // its place among all: it keeps that until it has a connection; one that turns out to be of no use is asked for anew
	wake   chan struct{} // capacity 1, never closed: it has its turn, or must ask for its owner again
	call   func()        // if not nil it is called in place of wake; mu is held: it must not block
	turn   bool          // guarded by the holds' mu

	failure error // of its last dial that was not cut short, or nil; owned by who waits
}

func newHolds(ready func(ordinal int) error) *holds {
	return &holds{ready: ready, lines: map[int]*line{}}
}

// enter gives the next ticket.
func (h *holds) enter() *waiter {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tickets++
	return &waiter{ticket: h.tickets, wake: make(chan struct{}, 1)}
}

// wait returns nil when w may dial the backend: the caller then calls done. Else
// it returns errAskAgain if the table is not that of swaps any more, or, when ctx
// has ended, what w waited for.
func (h *holds) wait(ctx context.Context, w *waiter, ordinal int, swaps int64) error {
	if !h.join(w, ordinal, swaps) {
		return errAskAgain
	}
	select {
	case <-w.wake:
	case <-ctx.Done():
	}
	return h.leave(ctx, w, ordinal)
}

// join puts w, which is in no line, into the backend's, which may give it its turn at
// once. It reports whether it did: not if the table is not that of swaps any more, as
// the backend may own the namespace no more.
func (h *holds) join(w *waiter, ordinal int, swaps int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.swaps.Load() != swaps { // after this look, askAgain finds w in the line
		return false
	}
	l := h.line(ordinal)
	at, _ := l.place(w)
	l.waiting = slices.Insert(l.waiting, at, w)
	h.release(ordinal, l)
	return true
}

// leave takes w, which was roused or has waited enough, out of the backend's line, and
// returns what wait does.
func (h *holds) leave(ctx context.Context, w *waiter, ordinal int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.turn {
		w.turn = false
		return nil
	}
	l := h.line(ordinal)
	if at, ok := l.place(w); ok {
		l.waiting = slices.Delete(l.waiting, at, at+1)
	}
	if ctx.Err() == nil {
		return errAskAgain
	}
	return h.why(w, ordinal, ctx.Err())
}

// reason says why w, whose time is over, has no connection to the backend; err if
// nothing else is known.
func (h *holds) reason(w *waiter, ordinal int, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why(w, ordinal, err)
}

// why is what keeps the backend from being dialled, or else how the last dial of it
// failed, or else the last of w's own; err if there is none of these. mu is held.
func (h *holds) why(w *waiter, ordinal int, err error) error {
	return cmp.Or(h.ready(ordinal), h.line(ordinal).failure, w.failure, err)
}

// try reports whether the caller may dial the backend now, as nobody waits for it
// and no dial has failed: the caller then calls done.
func (h *holds) try(ordinal int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if len(l.waiting) > 0 || l.fails > 0 || l.dialing >= dialsMost || h.ready(ordinal) != nil {
		return false
	}
	l.dialing++
	return true
}

// done takes note of how a dial went; cut says that its upgrade ended before it
// could.
func (h *holds) done(ordinal int, err error, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	l.dialing--
	switch {
	case err == nil && l.astray: // the next waits for the answer, or long enough
		h.failed(ordinal, l, l.failure)
	case err == nil:
		l.fails, l.failure = 0, nil
	case !cut:
		h.failed(ordinal, l, err)
	}
	h.release(ordinal, l)
}

// failed makes the line rest, longer each time. Of those that fail together, the
// first counts. mu is held.
func (h *holds) failed(ordinal int, l *line, err error) {
	if time.Now().Before(l.rest) {
		return
	}
	wait := min(redialMost, redialFirst<<min(l.fails, 10))
	wait = wait/2 + rand.N(wait)
	l.fails, l.failure, l.rest = l.fails+1, err, time.Now().Add(wait)
	time.AfterFunc(wait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.release(ordinal, l)
	})
}

// misdirected takes note that the backend's address is another backend's. As with
// dials that fail, one upgrade at a time then asks for all, until meant.
func (h *holds) misdirected(ordinal int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if !l.astray {
		l.astray = true
		h.astray.Add(1)
	}
	h.failed(ordinal, l, err)
}

// meant takes note that the backend has answered.
func (h *holds) meant(ordinal int) {
	if h.astray.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.line(ordinal)
	if !l.astray {
		return
	}
	h.astray.Add(-1)
	l.astray, l.fails, l.failure, l.rest = false, 0, nil, time.Time{}
	h.release(ordinal, l)
}

// look is called after ready has changed its mind about any backend, or addresses
// may have changed: all are tried at once, and one that is back as if nothing had
// been before.
func (h *holds) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ordinal, l := range h.lines {
		away := h.ready(ordinal) != nil
		if l.away && !away {
			l.fails = 0
		}
		l.away, l.rest = away, time.Time{}
		h.release(ordinal, l)
	}
}

// askAgain makes all that wait ask for their owner again. It is called after the
// table was swapped.
func (h *holds) askAgain() {
	h.swaps.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lines {
		for _, w := range l.waiting {
			w.rouse()
		}
	}
}

// release gives their turn to those that may dial now. mu is held.
func (h *holds) release(ordinal int, l *line) {
	if len(l.waiting) == 0 || h.ready(ordinal) != nil || time.Now().Before(l.rest) {
		return
	}
	most := dialsMost
	if l.fails > 0 {
		most = 1
	}
	n := max(0, min(len(l.waiting), most-l.dialing))
	for _, w := range l.waiting[:n] {
		w.turn = true
		w.rouse()
	}
	l.dialing += n
	l.waiting = slices.Delete(l.waiting, 0, n)
}

// line returns the backend's. mu is held.
func (h *holds) line(ordinal int) *line {
	l := h.lines[ordinal]
	if l == nil {
		l = &line{away: h.ready(ordinal) != nil}
		h.lines[ordinal] = l
	}
	return l
}

// place returns where w is in the line, or belongs.
func (l *line) place(w *waiter) (int, bool) {
	return slices.BinarySearchFunc(l.waiting, w.ticket, func(other *waiter, ticket int64) int {
		return cmp.Compare(other.ticket, ticket)
	})
}

func (w *waiter) rouse() {
	if w.call != nil {
		w.call()
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
