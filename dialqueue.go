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
	maxDialsPerBackend = 64 // dials of one backend at once
	minRedialDelay     = 50 * time.Millisecond
	maxRedialDelay     = time.Second
)

// errRecheckOwner says that a request has to ask again who its owner is: that has
// changed while it waited, or its dial failed.
var errRecheckOwner = errors.New("the owner may have changed")

// queueHeld is, in place of an ordinal, the queue of the requests whose namespace is held or whose
// owner is not known. It is never ready. route.go has the other numbers that are no ordinals.
const queueHeld = -4

// errHeld says why nobody in queueHeld may dial.
var errHeld = errors.New("the owner of the namespace is not known, or is about to change")

// queueFinder returns the ordinal of the queue in which a request of the namespace has
// to wait: its owner's, queueHeld, or another negative number if it has no owner. It
// takes no lock.
type queueFinder = func(namespace string) (ordinal int)

// dialQueues makes requests wait until their backend is ready: upgrades, and plain ones for
// which no connection is kept. Then they dial it in the order in which they came, at most
// maxDialsPerBackend at once. No request polls: each is woken. While the dials of a backend
// fail, one request at a time dials for all of them.
type dialQueues struct {
	// backendReady returns why a backend cannot be dialled now, or nil. It is called with mu
	// held, and must not block. Static after construction.
	backendReady func(ordinal int) error

	misdirectedQueues atomic.Int64 // queues with misdirected

	// Guarded by mu.
	mu           sync.Mutex
	lastSequence int64              // of a waiter
	queues       map[int]*dialQueue // by ordinal
}

// dialQueue has the requests that wait for one backend. dialQueues.mu guards it.
type dialQueue struct {
	waiters     []*waiter // in the order of their sequence
	dialing     int       // dials under way
	failures    int       // failed dials in a row
	lastErr     error     // of the last failed dial, nil after a successful one
	retryAt     time.Time // until then no waiter dials; zero after a successful dial
	wasDown     bool      // it was not ready when that was last checked
	misdirected bool      // another backend answered at its address, and it has not since
}

// waiter is a request in a dial queue.
type waiter struct {
	namespace string
	sequence  int64  // its position among all waiters; it keeps that until it is connected
	woken     wakeup // what wait waits for; unused if onWake is another function
	onWake    func() // called when it may dial or has to recheck its owner; mu is held
	mayDial   bool   // guarded by dialQueues.mu
	failure   error  // of its last dial that was not cut short, or nil; not guarded
}

func newDialQueues(ready func(ordinal int) error) *dialQueues {
	return &dialQueues{backendReady: ready, queues: map[int]*dialQueue{}}
}

// checkReady returns why the requests in the queue cannot dial now, or nil.
func (d *dialQueues) checkReady(ordinal int) error {
	if ordinal == queueHeld {
		return errHeld
	}
	return d.backendReady(ordinal)
}

// newWaiter returns a waiter for wait, of a request of the namespace.
func (d *dialQueues) newWaiter(namespace string) *waiter {
	w := &waiter{namespace: namespace, woken: newWakeup()}
	w.onWake = w.woken.notify
	d.setSequence(w)
	return w
}

// setSequence gives w its position: behind all others.
func (d *dialQueues) setSequence(w *waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastSequence++
	w.sequence = d.lastSequence
}

// wait returns nil when w may dial the backend. The caller then calls dialDone. wait
// returns errRecheckOwner if w has to wait in another queue, and what w waited for if ctx
// ends.
func (d *dialQueues) wait(
	ctx context.Context, w *waiter, ordinal int, find queueFinder,
) error {
	if !d.enqueue(context.Background(), w, ordinal, find) {
		return errRecheckOwner
	}
	select {
	case <-w.woken:
	case <-ctx.Done():
	}
	return d.dequeue(ctx, w, ordinal)
}

// enqueue puts w, which is in no queue, into the queue. w may then dial at once. It
// returns false if w now belongs in another queue. It also returns false if ctx has
// ended: dequeue may have run before.
func (d *dialQueues) enqueue(
	ctx context.Context, w *waiter, ordinal int, find queueFinder,
) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	// After these checks, recheckOwners and dequeue find w in the queue.
	if find(w.namespace) != ordinal || ctx.Err() != nil {
		return false
	}
	q := d.queue(ordinal)
	at, _ := q.position(w)
	q.waiters = slices.Insert(q.waiters, at, w)
	d.startDials(ordinal, q)
	return true
}

// dequeue takes w, which was woken or whose ctx has ended, out of the backend's queue. It
// returns what wait returns.
func (d *dialQueues) dequeue(ctx context.Context, w *waiter, ordinal int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.mayDial {
		w.mayDial = false
		return nil
	}
	q := d.queue(ordinal)
	if at, ok := q.position(w); ok {
		q.waiters = slices.Delete(q.waiters, at, at+1)
	}
	if ctx.Err() == nil {
		return errRecheckOwner
	}
	return d.reasonLocked(w, ordinal, ctx.Err())
}

// reason returns why w, whose ctx has ended, is not connected to the backend, or err if
// no reason is known.
func (d *dialQueues) reason(w *waiter, ordinal int, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.reasonLocked(w, ordinal, err)
}

// reasonLocked returns why the backend cannot be dialled, or why the last dial of it
// failed, or why the last dial of w failed, or err. The caller holds mu.
func (d *dialQueues) reasonLocked(w *waiter, ordinal int, err error) error {
	return cmp.Or(d.checkReady(ordinal), d.queue(ordinal).lastErr, w.failure, err)
}

// mayPass reports whether a request may be sent to the backend now, on a connection that
// there is already: the backend is ready, no request waits for it, and its last dial did
// not fail.
func (d *dialQueues) mayPass(ordinal int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mayPassLocked(d.queue(ordinal), ordinal)
}

// mayPassLocked is mayPass. The caller holds mu.
func (d *dialQueues) mayPassLocked(q *dialQueue, ordinal int) bool {
	return len(q.waiters) == 0 && q.failures == 0 && d.checkReady(ordinal) == nil
}

// seemsReady reports whether the backend is ready and its last dial did not fail, as far as
// is known without a dial.
func (d *dialQueues) seemsReady(ordinal int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.queues[ordinal]
	return (q == nil || q.failures == 0) && d.checkReady(ordinal) == nil
}

// tryDial reports whether the caller may dial the backend now: the backend is ready, no
// request waits for it, and its last dial did not fail. The caller then calls dialDone.
func (d *dialQueues) tryDial(ordinal int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.queue(ordinal)
	if q.dialing >= maxDialsPerBackend || !d.mayPassLocked(q, ordinal) {
		return false
	}
	q.dialing++
	return true
}

// dialDone notes the result of a dial that wait or tryDial has allowed, and lets the next
// waiters dial. err is nil if the backend is connected. ctxEnded says that the context of
// the request ended before the dial could succeed or fail: such an err says nothing of the
// backend.
func (d *dialQueues) dialDone(ordinal int, err error, ctxEnded bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.queue(ordinal)
	q.dialing--
	switch {
	case err == nil && q.misdirected: // the next request waits for the answer, or for retryAt
		d.dialFailed(ordinal, q, q.lastErr)
	case err == nil:
		q.failures, q.lastErr, q.retryAt = 0, nil, time.Time{}
	case !ctxEnded:
		d.dialFailed(ordinal, q, err)
	}
	d.startDials(ordinal, q)
}

// dialFailed lets no request dial the backend until retryAt. Of dials that fail together
// only the first counts. The caller holds mu.
func (d *dialQueues) dialFailed(ordinal int, q *dialQueue, err error) {
	if time.Now().Before(q.retryAt) {
		return
	}
	q.failures++
	wait := backoff{minRedialDelay, maxRedialDelay}.jittered(q.failures, rand.Float64())
	q.lastErr, q.retryAt = err, time.Now().Add(wait)
	time.AfterFunc(wait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.startDials(ordinal, q)
	})
}

// setMisdirected notes that another backend has answered at the backend's address. As
// after a failed dial, one request at a time then dials, until clearMisdirected.
func (d *dialQueues) setMisdirected(ordinal int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.queue(ordinal)
	if !q.misdirected {
		q.misdirected = true
		d.misdirectedQueues.Add(1)
	}
	d.dialFailed(ordinal, q, err)
}

// clearMisdirected notes that the backend has answered.
func (d *dialQueues) clearMisdirected(ordinal int) {
	if d.misdirectedQueues.Load() == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.queue(ordinal)
	if !q.misdirected {
		return
	}
	d.misdirectedQueues.Add(-1)
	q.misdirected, q.failures, q.lastErr, q.retryAt = false, 0, nil, time.Time{}
	d.startDials(ordinal, q)
}

// readinessChanged is called when the result of checkReady or the address of any backend
// may have changed. Requests may then dial at once. The failed dials of a backend that
// has become ready are forgotten.
func (d *dialQueues) readinessChanged() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ordinal, q := range d.queues {
		down := d.checkReady(ordinal) != nil
		if q.wasDown && !down {
			q.failures = 0
		}
		q.wasDown, q.retryAt = down, time.Time{}
		d.startDials(ordinal, q)
	}
}

// recheckOwners wakes the waiters that have to wait in another queue. It is called after
// what find returns has changed.
func (d *dialQueues) recheckOwners(find queueFinder) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ordinal, q := range d.queues {
		for _, w := range q.waiters {
			if find(w.namespace) != ordinal {
				w.onWake()
			}
		}
	}
}

// startDials lets the waiters dial that may do so now. The caller holds mu.
func (d *dialQueues) startDials(ordinal int, q *dialQueue) {
	if len(q.waiters) == 0 || d.checkReady(ordinal) != nil || time.Now().Before(q.retryAt) {
		return
	}
	limit := maxDialsPerBackend
	if q.failures > 0 {
		limit = 1
	}
	n := max(0, min(len(q.waiters), limit-q.dialing))
	for _, w := range q.waiters[:n] {
		w.mayDial = true
		w.onWake()
	}
	q.dialing += n
	q.waiters = slices.Delete(q.waiters, 0, n)
}

// queue returns the backend's queue. The caller holds mu.
func (d *dialQueues) queue(ordinal int) *dialQueue {
	q := d.queues[ordinal]
	if q == nil {
		q = &dialQueue{wasDown: d.checkReady(ordinal) != nil}
		d.queues[ordinal] = q
	}
	return q
}

// position returns the index of w in the queue, or else where it belongs.
func (q *dialQueue) position(w *waiter) (int, bool) {
	return slices.BinarySearchFunc(q.waiters, w.sequence, func(other *waiter, sequence int64) int {
		return cmp.Compare(other.sequence, sequence)
	})
}
