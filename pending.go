package main

import (
	"maps"
	"net"
	"sync"
	"time"
)

// pendingLimit bounds the pending requests: upgrades that wait, dial, or are in the handshake,
// plain requests that their owner has not got, and what abandon keeps. Half of the limit is
// divided evenly among the backends: requests for one backend cannot use the slots that another
// backend has there, whatever they wait for. The other half is a pool, of which a backend may
// take at most half of what the others leave. So there is room for the clients of the last
// backend that works, and for the many clients that wait for one that restarts. The zero value
// counts none.
type pendingLimit struct {
	mu        sync.Mutex // guards all fields
	total     int
	byBackend map[int]int // slots taken, by ordinal
	share     int         // slots of each backend
	pooled    int         // slots taken beyond the shares
	headBytes int         // of the heads that are kept
}

// acquire takes a slot for a request to the backend with this ordinal. There are count
// backends, and limit slots for all of them; each backend has at least one slot, whatever
// the limit. acquire returns how many slots are taken then, in all and by this backend. If
// ok is true, the caller calls giveBack; else it took none.
func (l *pendingLimit) acquire(ordinal, count, limit int) (all, own int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if share := max(1, limit/2/count); share != l.share {
		l.share, l.pooled = share, 0
		for backend, taken := range l.byBackend {
			l.pooled += l.beyondShare(backend, taken)
		}
	}
	ordinal = max(ordinal, unresolved)
	free, taken := limit-l.share*count-l.pooled, l.byBackend[ordinal]
	if l.beyondShare(ordinal, taken+1) > max(0, free) {
		return l.total, taken, false
	}
	l.add(ordinal, 1)
	return l.total, l.byBackend[ordinal], true
}

// take takes a slot, even if the backend has its share.
func (l *pendingLimit) take(ordinal int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(ordinal, 1)
}

// giveBack gives a slot back.
func (l *pendingLimit) giveBack(ordinal int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(ordinal, -1)
}

// transfer gives a slot to another backend, which may then have more than its share: so
// clients that wait for a dead backend can go to a new owner.
func (l *pendingLimit) transfer(from, to int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(from, -1)
	l.add(to, 1)
}

// add counts n more slots as taken. The caller holds mu.
func (l *pendingLimit) add(ordinal, n int) {
	if l.byBackend == nil {
		l.byBackend = map[int]int{}
	}
	ordinal = max(ordinal, unresolved)
	before := l.byBackend[ordinal]
	l.pooled += l.beyondShare(ordinal, before+n) - l.beyondShare(ordinal, before)
	l.total += n
	if l.byBackend[ordinal] = before + n; before+n == 0 {
		delete(l.byBackend, ordinal)
	}
}

// beyondShare returns how many of the taken slots are beyond the share of the backend with
// this ordinal. A request of a held namespace counts for its next owner. All that have no
// owner, or one that is not known here, have one slot together. The caller holds mu.
func (l *pendingLimit) beyondShare(ordinal, taken int) int {
	if ordinal < 0 {
		return max(0, taken-1)
	}
	return max(0, taken-l.share)
}

// inUse returns how many slots are taken.
func (l *pendingLimit) inUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

// backends returns how many slots are taken of each backend that has some, by ordinal.
func (l *pendingLimit) backends() map[int]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.byBackend)
}

// reserveHead counts n more bytes of heads that are kept, and reports whether this limit of
// pending requests allows that. If not, it counts none.
func (l *pendingLimit) reserveHead(n, limit int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > 0 && (l.headBytes+n-1)/headBytesPerRequest >= limit { // limit may be any number
		return false
	}
	l.headBytes += n
	return true
}

// headBytesPerRequest is how many bytes the heads of the pending requests, with the short
// bodies of plain ones, may have on average. One may have more if others have fewer.
const headBytesPerRequest = 2 << 10

// pendingRequest is a request from its admission on: an upgrade until it is a session or is
// answered, a plain request until its exchange is over. The limits count it until uncount, a
// plain request until its owner gets it. An upgrade goes with its client from the fast path
// to net/http. One goroutine at a time owns it.
type pendingRequest struct {
	limit     *pendingLimit    // counts it until uncount
	permit    *namespacePermit // given back by uncount, or by its session; nil if no limit of the namespace counts it
	uncounted bool
	began     time.Time  // when its head was read
	waitBegan time.Time  // when it began to wait for its owner; zero while it does not
	waits     *histogram // of these waits
	namespace string
	assignment
	headBytes int // of its head and a short body, as limit counts them

	// Set after its admission.
	podUID       string    // of the owner's pod, "" if not known
	holdDeadline time.Time // until then it waits; zero if it was not parked
	dialErr      error     // why it has waited in vain; nil if it has not
	backendConn  net.Conn  // to the owner, which may have the request already; or nil
	flight       *flight   // nil if it was not sent or is over, and for an upgrade with -handoff=off
	cut          func()    // of a plain request: see flight.cut; nil for an upgrade
}

// assign makes the request one to the owner that a says.
func (p *pendingRequest) assign(a assignment) {
	p.limit.transfer(p.backend, a.backend)
	p.assignment = a
}

// beginWait notes that the request waits for its owner, if it does not wait already.
func (p *pendingRequest) beginWait() {
	if p.waitBegan.IsZero() {
		p.waitBegan = time.Now()
	}
}

// endWait counts the time for which the request has waited, if it has.
func (p *pendingRequest) endWait() {
	if !p.waitBegan.IsZero() {
		p.waits.observe(time.Since(p.waitBegan))
		p.waitBegan = time.Time{}
	}
}

// endFlight notes that the request is over: its owner has refused it or answered it to the end,
// or the relay has the session.
func (p *pendingRequest) endFlight() {
	if p.flight != nil {
		p.flight.end()
		p.flight = nil
	}
}

// abandon takes over conn, a connection to the owner that became no session, and closes
// it. If there is a flight, the owner may have the request: then abandon takes one more slot
// of the owner, and keeps both until the flight is over. conn is nil as for flight.abandon.
func (p *pendingRequest) abandon(conn net.Conn) {
	if p.flight == nil {
		if conn != nil {
			conn.Close()
		}
		return
	}
	limit, backend := p.limit, p.flight.backend
	limit.take(backend)
	p.flight.abandon(conn, func() { limit.giveBack(backend) })
	p.flight = nil
}

// abandonAfter is abandon after a call on conn has returned err.
func (p *pendingRequest) abandonAfter(err error, conn net.Conn) {
	if isLost(err) {
		conn.Close()
		conn = nil // its next read would return a plain end
	}
	p.abandon(conn)
}

// reserveHead counts n bytes of its head, in place of the bytes that it counted before, if
// this limit of pending requests allows that.
func (p *pendingRequest) reserveHead(n, limit int) *refusal {
	if !p.limit.reserveHead(n-p.headBytes, limit) {
		return refuse(resultMaxPending,
			"the heads and short bodies of pending requests have %d bytes on average, the limit",
			headBytesPerRequest)
	}
	p.headBytes = n
	return nil
}

// uncount ends the count of the request in its limits. More calls do nothing. A nil request
// was not admitted: it has no count.
func (p *pendingRequest) uncount() {
	if p == nil || p.uncounted {
		return
	}
	p.endWait()
	p.reserveHead(0, 0)
	p.limit.giveBack(p.backend)
	p.permit.giveBack()
	p.permit = nil
	p.uncounted = true
}

// countAgain takes a slot again, after uncount, even if the owner has its share.
func (p *pendingRequest) countAgain() {
	p.limit.take(p.backend)
	p.uncounted = false
}

// close ends the count of the request, and abandons the connection to its owner if it has one.
func (p *pendingRequest) close() {
	p.abandon(p.backendConn)
	p.uncount()
}
