//go:build !portable && !386

package main

import (
	"math/bits"
	"syscall"
	"time"
)

// This is the carrier for Linux. A session at rest is two descriptors and this
// file's wire: no goroutine, no buffer.
//
// Each poller has one epoll set (epoll(7)) with the sockets of its sessions. It
// is edge-triggered: a socket is told of once, when something has come, or when
// it is added or modified and something is there. The set's own descriptor is in
// Go's poller, which tells of it in the same way, so a poller with nothing to do
// is a parked goroutine.
//
// What comes from one side is read into the poller's buffer and written to the
// other. What the other does not take is held: the session keeps it in a buffer of
// about its size, stops reading that side, and waits until the other can be written.
// All sessions together hold up to maxUnsent. Beyond that a side is not read before
// its peer has taken what it sent: the kernel keeps it until then, and stops the
// sender.
//
// A side that fills the buffer has much to send. If it is in large frames, only
// their headers are read, for the frame scanner, and their payload goes through
// a pipe of the poller's from socket to socket, uncopied. What the other side
// does not take is held in the pipe.
//
//	one direction:  reading ──write came short──> holding ──flushed──> reading
//	                   │ FIN                         (FIN is read after that)
//	                   v
//	                ended: the other side got our FIN
//
// When both directions have ended, or a socket cannot be read, the session is
// over. A side of which a send failed since it is gone takes nothing any more: what
// comes for it is dropped, from the byte on that it did not take. It may still have
// sent something: that is carried. When that has ended too, the session is over
// after deadTimeout. A send that fails for another reason ends the session at once.

const (
	maxReadsPerEvent = 4        // reads of one side before it is the others' turn
	bulkPause        = 16       // full buffers that are not followed by a look at the next header, when one was in vain
	minSplice        = 16 << 10 // bytes of a frame to come that are worth a pipe
)

// sessionIO is the part of a session that its poller owns.
type sessionIO struct {
	poller *poller // static after attach

	// Guarded by poller.mu.
	fd             [2]int32        // the sockets
	epollMask      [2]uint32       // what epoll watches; 0: the socket is not in the set yet
	slot           int32           // in poller.slots
	halfCloseCause cause           // why one direction is over, or causeNone
	open           bool            // it has a slot and its sockets
	fin            [2]bool         // the side has ended
	writeFailed    [2]bool         // the side takes nothing any more: nothing is sent to it
	bulk           [2]int8         // above 0: the side has much to send; below: full buffers until it may
	unsent         [2]*unsentData  // from the side, not taken by its peer; nil if nothing
	frames         [2]frameScanner // of what came from the side
	halfCloseTimer *time.Timer     // bounds the silence of the other direction

	closing *closingHandshake // nil unless it is to part; after the end it stays as it is
}

// unsentData is what a side did not take: first data, then what is in pipe. It may be
// nothing, of a side that waits for its peer all the same.
type unsentData struct {
	data []byte // its capacity is of a class
	pipe *pipe  // or nil
	cost int64  // what it has of the budget, in bytes
}

const (
	maxUnsent       = 64 << 20 // bytes that all sessions hold: an eighth of the container's memory in k8s/router.yaml
	minUnsentBuffer = 64       // bytes of the smallest buffer that holds something
	unsentClasses   = 11       // of buffers, each with twice the size of the one before: the last has bufferSize
	peekSize        = 16 << 10 // bytes that are looked at, while the budget is used up
)

// unsentClass returns the class of the smallest buffer for so many bytes.
func unsentClass(size int) int { return bits.Len(uint(max(size, 1)-1) / minUnsentBuffer) }

// keepUnsent keeps what the side's peer did not take, and makes the side wait for it.
func (p *poller) keepUnsent(s *session, i side, data []byte, pipe *pipe) {
	c := &p.relay.engine
	class := unsentClass(len(data))
	h, _ := c.pools[class].Get().(*unsentData)
	if h == nil {
		h = &unsentData{data: make([]byte, 0, minUnsentBuffer<<class)}
	}
	h.data, h.pipe, h.cost = append(h.data[:0], data...), pipe, minUnsentBuffer<<class
	if pipe != nil {
		h.cost += int64(pipe.queued)
	}
	c.unsentBytes.Add(h.cost)
	s.unsent[i] = h
}

// handle does what an event of the side asks for.
func (p *poller) handle(s *session, i side, events uint32) {
	if events&syscall.EPOLLOUT != 0 {
		p.flushUnsent(s, i.other())
	}
	const ended = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR | syscall.EPOLLPRI // urgent data cuts a read short too
	switch {
	case s.wantsRead(i) && events&(syscall.EPOLLIN|ended) != 0:
		p.readReady(s, i, events&ended != 0)
	case events&syscall.EPOLLERR != 0: // what is held of it goes first
		p.setWriteFailed(s, i)
	}
	p.continueClose(s)
	p.updateEpoll(s)
}

// readReady reads the side until it has nothing more for now, or for maxReadsPerEvent. Of
// a side that has ended, the end is read too: it will not be told again.
func (p *poller) readReady(s *session, i side, ended bool) {
	for range maxReadsPerEvent {
		if !p.readOnce(s, i, ended) || !s.wantsRead(i) {
			return
		}
	}
	s.epollMask[i] |= rearm
}

// wantsRead reports whether the side is to be read.
func (s *session) wantsRead(i side) bool { return s.open && !s.fin[i] && s.unsent[i] == nil }

// readOnce reads the side once, and passes on what came. It reports whether there
// may be more.
func (p *poller) readOnce(s *session, i side, ended bool) (more bool) {
	overBudget := p.relay.engine.unsentBytes.Load() >= p.relay.engine.unsentBudget
	if overBudget && s.closing == nil {
		return p.forwardPeeked(s, i, ended)
	}
	n, limit := 0, bufferSize
	pipe, errno := p.spliceIn(s, i, bufferSize)
	if pipe == nil && errno == 0 {
		switch {
		case s.closing != nil && overBudget:
			limit = peekSize / 4
		case s.closing != nil:
			limit -= maxCloseFrame
		case s.bulk[i] > 0:
			limit = int(min(bufferSize, s.frames[i].remaining()+maxFrameHeader))
		}
		n, errno = p.buf.receive(s.fd[i], limit)
		switch {
		case errno == syscall.EAGAIN || errno == syscall.EINTR:
			return errno == syscall.EINTR
		case errno == 0 && n == 0:
			p.sideEnded(s, i)
			return false
		case errno == 0:
			more = n == limit
			n = p.scan(s, i, n)
			s.detectBulk(i, more, limit)
			pipe, errno = p.spliceIn(s, i, bufferSize-n)
		default:
			n = 0
		}
	}
	p.sendOrKeep(s, i, n, pipe)
	if errno != 0 {
		p.readFailed(s, i, errno)
		return false
	}
	return more || ended || pipe != nil
}

// forwardPeeked is fill while the budget is used up: it looks at what has come, sends it,
// and reads what was taken. A session that is to part is not carried so, as what is
// sent of it is not what came.
func (p *poller) forwardPeeked(s *session, i side, ended bool) (more bool) {
	n, errno := p.buf.peek(s.fd[i], peekSize)
	switch {
	case errno == syscall.EAGAIN || errno == syscall.EINTR:
		return errno == syscall.EINTR
	case errno != 0:
		p.readFailed(s, i, errno)
		return false
	case n == 0:
		p.sideEnded(s, i)
		return false
	}
	sent := n
	if s.canSend(i) {
		took, errno := p.buf.send(s.fd[i.other()], n, 0)
		sent = p.handleSent(s, i, took, errno, n)
	}
	s.bulk[i] = 0
	p.discardPeeked(s, i, sent)
	if sent < n && s.open {
		p.keepUnsent(s, i, nil, nil)
	}
	return n == peekSize || ended
}

// discardPeeked reads what was looked at and is done with.
func (p *poller) discardPeeked(s *session, i side, n int) {
	for n > 0 && s.open {
		got, errno := p.buf.receive(s.fd[i], n)
		switch {
		case errno == 0 && got > 0:
			s.frames[i].scan(p.buf.data[:got], i == clientSide)
			n -= got
		case errno != syscall.EINTR: // it was there
			p.end(s, causeRouterError)
		}
	}
}

// detectBulk judges whether the side has much to send, by a read that filled what it
// was limited to, or did not. That frames are large shows when the next header
// alone is read.
func (s *session) detectBulk(i side, full bool, limit int) {
	switch {
	case !full:
		s.bulk[i] = 0
	case s.bulk[i] < 0:
		s.bulk[i]++
	case limit < bufferSize && s.frames[i].remaining() < minSplice:
		s.bulk[i] = -bulkPause
	default:
		s.bulk[i] = 1
	}
}

// spliceIn moves payload of the side's present frame, up to limit bytes, into a
// pipe. It returns nil if that is not worth it or nothing came, and the error if
// the side is broken: splice(2) has taken it from the socket.
func (p *poller) spliceIn(s *session, i side, limit int) (*pipe, syscall.Errno) {
	rest := s.frames[i].remaining()
	if s.bulk[i] <= 0 || s.closing != nil || min(rest, uint64(limit)) < minSplice {
		return nil, 0
	}
	target := p.pipes.get()
	if target == nil {
		return nil, 0
	}
	n, errno := target.receive(s.fd[i], int(min(rest, uint64(limit))))
	switch {
	case errno == 0 && n > 0:
		s.frames[i].skip(uint64(n))
		return target, 0
	case errno == syscall.EAGAIN || errno == syscall.EINTR || errno == syscall.EINVAL: // EINVAL: not from such a socket
		errno = 0
	}
	p.pipes.put(target)
	return nil, errno
}

// sendOrKeep sends the first n bytes of the buffer, which came from the side, and then
// what was piped, to its peer, and holds what that does not take. Nothing is
// held yet.
func (p *poller) sendOrKeep(s *session, i side, n int, pipe *pipe) {
	sent, flags := n, 0
	if pipe != nil {
		flags = syscall.MSG_MORE
	}
	if n > 0 && s.canSend(i) {
		took, errno := p.buf.send(s.fd[i.other()], n, flags)
		sent = p.handleSent(s, i, took, errno, n)
	}
	if sent == n {
		pipe = p.spliceOut(s, i, pipe)
	}
	if sent < n || pipe != nil {
		p.keepUnsent(s, i, p.buf.data[sent:n], pipe)
	}
}

// spliceOut sends what was piped, if anything was, and returns the pipe if something
// is left in it.
func (p *poller) spliceOut(s *session, i side, pipe *pipe) *pipe {
	if pipe == nil {
		return nil
	}
	if s.canSend(i) {
		size := pipe.queued
		n, errno := pipe.send(s.fd[i.other()])
		if p.handleSent(s, i, n, errno, size) < size {
			return pipe
		}
	}
	p.pipes.put(pipe)
	return nil
}

// canSend reports whether what comes from the side is sent to its peer. All else is
// dropped.
func (s *session) canSend(i side) bool { return s.open && !s.writeFailed[i.other()] }

// flushUnsent sends what is held of the side, by way of the buffer.
func (p *poller) flushUnsent(s *session, i side) {
	h := s.unsent[i]
	if h == nil {
		return
	}
	n, pipe := copy(p.buf.data[:], h.data), h.pipe
	h.pipe = nil
	p.dropUnsent(s, i)
	p.sendOrKeep(s, i, n, pipe)
}

// dropUnsent forgets what is held of the side.
func (p *poller) dropUnsent(s *session, i side) {
	h := s.unsent[i]
	if h == nil {
		return
	}
	if h.pipe != nil {
		p.pipes.put(h.pipe)
	}
	s.unsent[i] = nil
	p.relay.engine.unsentBytes.Add(-h.cost)
	p.relay.engine.pools[unsentClass(cap(h.data))].Put(h)
}

// handleSent takes note of what the side's peer did with size bytes, and returns how
// many are done with: those that it took, or all, once it takes nothing any more.
func (p *poller) handleSent(s *session, i side, n int, errno syscall.Errno, size int) int {
	to := i.other()
	switch {
	case errno == 0:
		s.bytesFrom[i].Add(int64(n))
		if s.halfCloseTimer != nil {
			s.halfCloseTimer.Reset(p.relay.halfCloseTimeout)
		}
		return n
	case errno == syscall.EAGAIN:
		return 0
	case errno == syscall.EINTR:
		if s.epollMask[to] != 0 {
			s.epollMask[to] |= rearm // it may be writable all the time
		}
		return 0
	case to.causeOf(errno) == causeRouterError:
		p.end(s, causeRouterError)
	default:
		p.setWriteFailed(s, to)
	}
	return size
}

// setWriteFailed notes that the side takes nothing any more, and drops what is held for it.
func (p *poller) setWriteFailed(s *session, i side) {
	if !s.open || s.writeFailed[i] {
		return
	}
	s.writeFailed[i] = true
	p.dropUnsent(s, i.other())
	if i == backendSide {
		p.relay.setPodDone(s)
	}
	p.halfClose(s, i.errorCause())
	p.endIfDead(s)
}

// endIfDead ends the session if nothing can be carried any more, in either direction,
// or after deadTimeout if one side is still there. One that is to part has bounds of
// its own.
func (p *poller) endIfDead(s *session) {
	switch {
	case s.closing != nil || !s.isDead():
	case s.fin == [2]bool{true, true} || s.writeFailed == [2]bool{true, true}:
		p.end(s, s.halfCloseCause)
	default:
		s.halfCloseTimer.Reset(p.relay.deadTimeout)
	}
}

// sideEnded notes that the side has ended, of which nothing is held, and passes
// that on. If the peer has ended before, the session is over. One that is to part
// goes on with that.
func (p *poller) sideEnded(s *session, i side) {
	s.fin[i] = true
	if i == backendSide {
		p.relay.setPodDone(s)
	}
	if s.closing != nil {
		s.closing.ended[i] = true
		return
	}
	p.halfClose(s, i.endCause())
	if !s.fin[i.other()] {
		syscall.Shutdown(int(s.fd[i.other()]), syscall.SHUT_WR) // a failure shows when the peer is read
	}
	p.endIfDead(s)
}

// readFailed ends the session, as the side cannot be read. One that is to part goes on
// with that.
func (p *poller) readFailed(s *session, i side, errno syscall.Errno) {
	if s.closing != nil {
		p.sideEnded(s, i)
		return
	}
	p.end(s, i.causeOf(errno))
}

// halfClose notes that one direction is over, and starts the clock for the other.
func (p *poller) halfClose(s *session, cause cause) {
	if s.halfCloseCause == causeNone {
		s.halfCloseCause = cause
		s.halfCloseTimer = time.AfterFunc(p.relay.halfCloseTimeout, s.halfCloseExpired)
	}
}

// halfCloseExpired ends the session, of which one direction is over and nothing comes in the
// other, or can. One that is to part has bounds of its own.
func (s *session) halfCloseExpired() {
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	switch {
	case s.closing != nil:
	case s.isDead():
		p.end(s, s.halfCloseCause)
	default:
		p.end(s, causeHalfClose)
	}
}

// end closes both sockets, if the session is not over yet.
func (p *poller) end(s *session, cause cause) {
	if !s.open {
		return
	}
	s.setCause(cause)
	s.open = false
	for i, fd := range s.fd {
		if fd >= 0 {
			syscall.Close(int(fd))
		}
		p.dropUnsent(s, side(i))
	}
	if s.halfCloseTimer != nil {
		s.halfCloseTimer.Stop()
	}
	p.freeSlot(s.slot)
	p.finished = append(p.finished, s)
}

// end ends the session. The first cause counts. It may be called from anywhere,
// any number of times, once s was attached.
func (s *session) end(cause cause) {
	s.setCause(cause)
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	p.end(s, cause)
}

// lock locks what guards the session's sockets and its closing handshake.
func (s *session) lock() { s.poller.mu.Lock() }

// unlock unlocks what lock has locked. Sessions that have ended meanwhile are
// reported to the relay.
func (s *session) unlock() { s.poller.unlock() }

// startClose starts the closing handshake, if the session is to have one and has its
// sockets. If it has no sockets yet, poller.start does this. The caller holds
// poller.mu.
func (s *session) startClose() {
	if s.closing == nil || !s.open {
		return
	}
	p := s.poller
	s.closing.start(s.fin, p.relay.closeTimeout, s.closeExpired)
	p.continueClose(s)
	p.updateEpoll(s)
}

// closeExpired is called at the end of each part of the closing handshake's time.
func (s *session) closeExpired() {
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	switch {
	case !s.open:
	case s.closing.expire(p.relay.closeTimeout):
		p.end(s, causeNone)
	default:
		p.continueClose(s)
		p.updateEpoll(s)
	}
}

// continueClose goes on with the parting of s, if it is to part, as far as that is
// possible now.
func (p *poller) continueClose(s *session) {
	h := s.closing
	if h == nil || !s.open {
		return
	}
	for i := clientSide; i <= backendSide; i++ {
		if s.unsent[i] == nil {
			p.sendOrKeep(s, i, p.scan(s, i, 0), nil)
		}
	}
	for i := range h.flushed {
		h.flushed[i] = h.stopped[i] && s.unsent[i] == nil
	}
	unreachable := s.writeFailed == [2]bool{true, true}
	if unreachable {
		h.cut.Store(true)
	}
	if h.progress(&s.frames) || unreachable {
		p.end(s, causeNone)
	}
}

// scan follows the first n bytes of the buffer, which came from the side, and
// returns how many are to be passed on.
func (p *poller) scan(s *session, i side, n int) int {
	if s.closing == nil {
		s.frames[i].scan(p.buf.data[:n], i == clientSide)
		return n
	}
	n = s.closing.insertClose(&s.frames[i], i, p.buf.data[:], n)
	if s.closing.giveUpBackend(&s.frames[backendSide]) {
		p.resetBackend(s)
	}
	return n
}

// resetBackend breaks the connection of the backend.
func (p *poller) resetBackend(s *session) {
	fd := int(s.fd[backendSide])
	s.fin[backendSide] = true
	p.setWriteFailed(s, backendSide)
	syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1}) // a failure leaves a FIN in place of the RST
	syscall.Close(fd)
	s.fd[backendSide] = -1
}
