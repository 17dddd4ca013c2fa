//go:build !portable && !386

package main

import (
	"math/bits"
	"os"
	"syscall"
	"time"
)

// This is the engine for Linux; epoll_linux.go declares engine and poller. A session that
// carries nothing consists of two descriptors and the fields below: it has no goroutine and no
// buffer.
//
// Each poller has one epoll set (epoll(7)) with the sockets of its sessions. The set
// is edge-triggered: it reports a socket once, when bytes arrive, or when the socket
// is added or modified and has bytes. The set's own descriptor is in Go's poller,
// which reports it in the same way. So a poller that has nothing to do is a parked
// goroutine.
//
// The poller reads what comes from one side into its buffer and writes it to the
// other side. Bytes that the other side's socket does not take are unsent: the session
// keeps them in a buffer of about their size, stops reading the sender, and waits
// until the other socket is writable. All sessions together keep up to maxUnsent
// bytes. Above that the poller removes from a socket only what the peer's socket has
// taken: the kernel keeps the rest, and stops the sender.
//
// A side that fills the poller's buffer has much to send (bulk). If its frames are
// large, the poller peeks at their headers, for the frame scanner. They go from socket to
// socket through a pipe of the poller, without a copy. What the other side does not take
// stays in the pipe.
//
//	one direction:  reading ──short write──> unsent ──all sent──> reading
//	                   │ FIN                    (a FIN is read after that)
//	                   v
//	                ended: the other side got the router's FIN
//
// The session is over when both directions have ended, or when reading a socket fails.
// If a send fails because a side is gone, the poller sends nothing more to that side:
// it drops all bytes for it, from the first that it did not take. That side may have
// sent bytes before: the poller carries them. When they have ended too, the session
// is over after deadTimeout. If a send fails for another reason, the session is over
// at once.

const (
	maxReadsPerEvent = 4        // reads of one side before other sessions get their turn
	bulkPause        = 16       // full reads that do not start bulk, after small frames
	minSplice        = 16 << 10 // bytes left of a frame that are worth a pipe
)

// sessionIO is the part of a session that its poller owns. Arrays are indexed by
// side.
type sessionIO struct {
	poller *poller // static after engine.assign or poller.promote

	// Guarded by poller.mu.
	fd             [2]int32        // the sockets; -1: no descriptor was left, reset, given to a flight, or the session has ended
	epollMask      [2]uint32       // what epoll watches; 0: the socket is not in the set yet
	slot           int32           // in poller.slots
	halfCloseCause cause           // why the first direction ended; causeNone if none has
	open           bool            // it has its slot and its sockets
	fin            [2]bool         // the side has ended its stream
	writeFailed    [2]bool         // a send to the side failed: nothing more is sent to it
	bulk           [2]bulkState    // of what the side sends
	unsent         [2]*unsentData  // from the side, not taken by its peer; nil if nothing
	scanners       [2]frameScanner // of what came from the side
	halfCloseTimer *time.Timer     // nil until one direction has ended

	// Guarded by poller.mu too, but sessionEnded reads closing without it, after the end.
	closing *closingHandshake // nil if there is none; set once
	tls     *tlsConn          // of the client; nil if it came without TLS, or TLS ended before the router
}

// bulkState says whether a side has much to send. From -bulkPause to -1 it counts the
// full reads that are still to come before one may make it inBulk.
type bulkState int8

const (
	notBulk bulkState = 0
	inBulk  bulkState = 1
)

// unsentData is what the peer of a side did not take: data, or the bytes in pipe. Both may
// be empty: the side is not read all the same, until its peer's socket is writable.
type unsentData struct {
	data []byte // its capacity is that of an unsentClass
	pipe *pipe  // or nil
	cost int64  // its part of engine.unsentBytes
}

const (
	maxUnsent       = 64 << 20 // bytes in all sessions: 1/8 of the memory in k8s/base/router.yaml
	minUnsentBuffer = 64       // bytes of the smallest buffer
	unsentClasses   = 11       // sizes of buffers, each twice the last: up to bufferSize
	peekSize        = 16 << 10 // bytes that are peeked at above the budget
	// maxReadOverBudget is how many bytes are read at once above the budget, if they are
	// not peeked at. Encrypted, they have at most peekSize/4.
	maxReadOverBudget = peekSize/4 - 256
)

// unsentClass returns the class of the smallest buffer for size bytes. Its capacity is
// minUnsentBuffer<<class.
func unsentClass(size int) int { return bits.Len(uint(max(size, 1)-1) / minUnsentBuffer) }

// keepUnsent keeps what the peer of side i did not take: a copy of data, or pipe, which it
// takes over. The side has no unsent bytes before. It is not read until dropUnsent.
func (p *poller) keepUnsent(s *session, i side, data []byte, pipe *pipe) {
	e := &p.relay.engine
	class := unsentClass(len(data))
	u, _ := e.pools[class].Get().(*unsentData)
	if u == nil {
		u = &unsentData{data: make([]byte, 0, minUnsentBuffer<<class)}
	}
	u.data, u.pipe, u.cost = append(u.data[:0], data...), pipe, minUnsentBuffer<<class
	if pipe != nil {
		u.cost += int64(pipe.queued)
	}
	e.unsentBytes.Add(u.cost)
	s.unsent[i] = u
}

// handle handles an epoll event of side i. The caller holds mu, as for all methods of
// poller in this file.
func (p *poller) handle(s *session, i side, events uint32) {
	if events&syscall.EPOLLOUT != 0 {
		p.flushUnsent(s, i.other())
	}
	// EPOLLPRI because urgent data makes a read come short, as an end does.
	const ended = syscall.EPOLLRDHUP | syscall.EPOLLHUP |
		syscall.EPOLLERR | syscall.EPOLLPRI
	switch {
	case s.wantsRead(i) && events&(syscall.EPOLLIN|ended) != 0:
		p.readReady(s, i, events&ended != 0)
	case events&syscall.EPOLLERR != 0: // its unsent bytes are sent before it is read
		p.failedUnread(s, i)
	}
	p.handleTLSEnd(s)
	p.continueClose(s)
	p.updateEpoll(s)
}

// failedUnread notes that the connection of the side has failed, which cannot be read now. It
// takes the error of a backend's socket, as a send would, because a step that waits for the
// backend must not wait for a slow client.
func (p *poller) failedUnread(s *session, i side) {
	if i == backendSide && s.open && !s.writeFailed[i] {
		errno, err := syscall.GetsockoptInt(int(s.fd[i]), syscall.SOL_SOCKET, syscall.SO_ERROR)
		if err == nil {
			err = syscall.Errno(errno)
		}
		p.relay.backendFailed(s, err)
	}
	p.setWriteFailed(s, i)
}

// readReady reads the side until its socket is empty, at most maxReadsPerEvent times.
// If ended, the event reported an end or an error, which epoll will not report again:
// it reads on until it has seen that.
func (p *poller) readReady(s *session, i side, ended bool) {
	for range maxReadsPerEvent {
		if !p.readOnce(s, i, ended) || !s.wantsRead(i) {
			return
		}
	}
	s.epollMask[i] |= maskStale
}

// wantsRead reports whether the poller may read the side now.
func (s *session) wantsRead(i side) bool {
	return s.open && !s.fin[i] && s.unsent[i] == nil
}

// readOnce reads the side once and sends what came to its peer. It reports whether the
// socket may have more.
func (p *poller) readOnce(s *session, i side, ended bool) (more bool) {
	overBudget := p.overBudget()
	switch {
	case s.tls != nil && i == clientSide:
		return p.readTLS(s, ended)
	case overBudget && s.closing == nil && s.tls == nil:
		return p.forwardPeeked(s, i, ended)
	}
	pipe, errno := p.spliceIn(s, i)
	switch {
	case errno != 0:
		return p.nothingRead(s, i, errno)
	case pipe != nil:
		p.spliceOrKeep(s, i, pipe)
		return true
	}
	limit := bufferSize
	switch {
	case overBudget:
		limit = maxReadOverBudget
	case s.tls != nil:
		limit = maxTLSWrite - maxCloseFrame
	case s.closing != nil:
		limit -= maxCloseFrame
	}
	n, errno := p.buf.receive(s.fd[i], limit)
	switch {
	case errno != 0:
		return p.nothingRead(s, i, errno)
	case n == 0:
		p.sideEnded(s, i)
		return false
	}
	more = n == limit
	n = p.scan(s, i, n)
	s.detectBulk(i, more)
	p.sendOrKeep(s, i, n)
	return more || ended
}

// overBudget reports whether the budget for unsent bytes is used up.
func (p *poller) overBudget() bool {
	return p.relay.engine.unsentBytes.Load() >= p.relay.engine.unsentBudget
}

// nothingRead handles a read of the side that returned errno. It reports whether the side is
// to be read again.
func (p *poller) nothingRead(s *session, i side, errno syscall.Errno) (again bool) {
	if errno != syscall.EAGAIN && errno != syscall.EINTR {
		p.readFailed(s, i, errno)
	}
	return errno == syscall.EINTR
}

// forwardPeeked is readOnce while the budget for unsent bytes is used up: it peeks at
// what has come, sends that, and then reads as many bytes as the peer took. It is not
// used with TLS or during a closing handshake, because then the bytes to send differ
// from those that came.
func (p *poller) forwardPeeked(s *session, i side, ended bool) (more bool) {
	n, errno := p.buf.peek(s.fd[i], peekSize)
	switch {
	case errno != 0:
		return p.nothingRead(s, i, errno)
	case n == 0:
		p.sideEnded(s, i)
		return false
	}
	sent := n
	if s.canSendFrom(i) {
		took, errno := p.buf.send(s.fd[i.other()], n)
		sent = p.handleSent(s, i, took, errno, n)
	}
	s.bulk[i] = notBulk
	p.discardPeeked(s, i, sent)
	if sent < n && s.open {
		p.keepUnsent(s, i, nil, nil)
	}
	return n == peekSize || ended
}

// discardPeeked reads n bytes that were peeked at, and scans and drops them.
func (p *poller) discardPeeked(s *session, i side, n int) {
	for n > 0 && s.open {
		got, errno := p.buf.receive(s.fd[i], n)
		switch {
		case errno == 0 && got > 0:
			s.scanners[i].scan(p.buf.data[:got], i == clientSide)
			n -= got
		case errno != syscall.EINTR: // cannot happen: the bytes were there
			p.end(s, causeRouterError)
		}
	}
}

// detectBulk sets bulk after a read of the side into the buffer. full reports whether the
// read returned as much as it could. A full read starts bulk.
func (s *session) detectBulk(i side, full bool) {
	switch {
	case !full:
		s.bulk[i] = notBulk
	case s.bulk[i] < notBulk:
		s.bulk[i]++
	case s.tls == nil && s.closing == nil:
		s.bulk[i] = inBulk
	}
}

// spliceIn moves what is left of the side's present frame into a pipe, as much as fits. If
// that is little, it looks for the next frame's header, and moves that frame too.
// It returns nil if that is not worth it, or if nothing is to be read but the stream's
// end. It returns EAGAIN if nothing has come, and an error if the connection failed:
// splice(2) has taken that error from the socket, so no later read returns it.
func (p *poller) spliceIn(s *session, i side) (*pipe, syscall.Errno) {
	if s.bulk[i] != inBulk || s.closing != nil {
		return nil, 0
	}
	scanner, head := s.scanners[i], 0
	if scanner.remaining() < minSplice {
		limit := int(scanner.remaining()) + maxFrameHeader
		n, errno := p.buf.peek(s.fd[i], limit)
		if errno != 0 || n == 0 {
			return nil, errno
		}
		scanner.scan(p.buf.data[:n], i == clientSide)
		if head = n; scanner.remaining() < minSplice {
			s.bulk[i] = notBulk
			if n == limit { // the frames are small
				s.bulk[i] = -bulkPause
			}
			return nil, 0
		}
	}
	target := p.pipes.get()
	if target == nil {
		return nil, 0
	}
	n, errno := target.receive(s.fd[i], int(min(uint64(head)+scanner.remaining(), uint64(target.size))))
	switch {
	case errno == 0 && n > head:
		scanner.skip(uint64(n - head))
		s.scanners[i] = scanner
		return target, 0
	case errno == 0 && n > 0:
		s.scanners[i].scan(p.buf.data[:n], i == clientSide)
		return target, 0
	case errno == syscall.EINVAL: // the socket's kind has no splice
		errno = 0
	}
	p.pipes.put(target)
	return nil, errno
}

// sendOrKeep sends the first n bytes of the buffer, which came from side i, to the peer. It
// keeps what the peer does not take. The side has no unsent bytes before.
func (p *poller) sendOrKeep(s *session, i side, n int) {
	if s.tls != nil && i == backendSide {
		p.sendTLS(s, n)
		return
	}
	sent := n
	if n > 0 && s.canSendFrom(i) {
		took, errno := p.buf.send(s.fd[i.other()], n)
		sent = p.handleSent(s, i, took, errno, n)
	}
	if sent < n {
		p.keepUnsent(s, i, p.buf.data[sent:n], nil)
	}
}

// spliceOrKeep does what sendOrKeep does with the bytes in pipe, which it takes over.
func (p *poller) spliceOrKeep(s *session, i side, pipe *pipe) {
	if s.canSendFrom(i) {
		size := pipe.queued
		n, errno := pipe.send(s.fd[i.other()])
		if p.handleSent(s, i, n, errno, size) < size {
			p.keepUnsent(s, i, nil, pipe)
			return
		}
	}
	p.pipes.put(pipe)
}

// canSendFrom reports whether bytes from side i are sent to its peer. If not, they are
// dropped.
func (s *session) canSendFrom(i side) bool { return s.open && !s.writeFailed[i.other()] }

// flushUnsent sends the unsent bytes of side i, if there are any, through the poller's
// buffer: its peer's socket is writable. It keeps what the peer still does not take.
func (p *poller) flushUnsent(s *session, i side) {
	u := s.unsent[i]
	switch {
	case u == nil:
		return
	case s.tls != nil && i == backendSide:
		p.flushRecords(s)
		return
	}
	n, pipe := copy(p.buf.data[:], u.data), u.pipe
	u.pipe = nil
	p.dropUnsent(s, i)
	if pipe != nil {
		p.spliceOrKeep(s, i, pipe)
		return
	}
	p.sendOrKeep(s, i, n)
}

// dropUnsent gives the memory and the pipe of the side's unsent bytes back.
func (p *poller) dropUnsent(s *session, i side) {
	u := s.unsent[i]
	if u == nil {
		return
	}
	if u.pipe != nil {
		p.pipes.put(u.pipe)
	}
	s.unsent[i] = nil
	p.relay.engine.unsentBytes.Add(-u.cost)
	p.relay.engine.pools[unsentClass(cap(u.data))].Put(u)
}

// handleSent handles the result of a send of size bytes from side i: its peer's socket
// took n of them, or the send failed with errno. It returns how many bytes need not be
// sent any more: n, or all of them if nothing more is sent to the peer.
func (p *poller) handleSent(s *session, i side, n int, errno syscall.Errno,
	size int) int {
	to := i.other()
	switch {
	case errno == 0:
		if s.tls == nil || i == clientSide { // else sendTLS has counted them
			s.bytesFrom[i].Add(int64(n))
		}
		if s.halfCloseTimer != nil {
			s.halfCloseTimer.Reset(p.relay.halfCloseTimeout)
		}
		if n < size {
			s.checkWritable(to)
		}
		return n
	case errno == syscall.EAGAIN:
		return 0
	case errno == syscall.EINTR:
		s.checkWritable(to)
		return 0
	case to.causeOf(errno) == causeRouterError:
		p.end(s, causeRouterError)
	default:
		if to == backendSide {
			p.relay.backendFailed(s, errno)
		}
		p.setWriteFailed(s, to)
	}
	return size
}

// checkWritable makes updateEpoll ask whether the side's socket is writable, after a send that
// the socket took in part, or that a signal has interrupted. It may be writable already, which is
// no new event. Sessions were seen to stand still after a short splice(2) on Linux 6.18: with
// an empty socket, for which epoll had no event.
func (s *session) checkWritable(i side) {
	if s.epollMask[i] != 0 {
		s.epollMask[i] |= maskStale
	}
}

// setWriteFailed notes that a send to the side failed, and drops the unsent bytes for
// it. If it is the backend, the caller has noted whether anybody waits for it.
func (p *poller) setWriteFailed(s *session, i side) {
	if !s.open || s.writeFailed[i] {
		return
	}
	s.writeFailed[i] = true
	p.dropUnsent(s, i.other())
	p.halfClose(s, i.errorCause())
	p.endIfDead(s)
}

// endIfDead ends the session if it is dead: at once if both sides have ended or both
// have failed, otherwise after deadTimeout. A closing handshake has its own timeout.
func (p *poller) endIfDead(s *session) {
	switch {
	case s.closing != nil || !s.isDead():
	case s.fin == [2]bool{true, true} || s.writeFailed == [2]bool{true, true}:
		p.endComplete(s, s.halfCloseCause)
	default:
		s.halfCloseTimer.Reset(p.relay.deadTimeout)
	}
}

// sideEnded notes that the side, which has no unsent bytes, has ended its stream, and
// half-closes the peer's socket. If the peer has ended before, the session is over. In
// a closing handshake it only notes the end: continueClose does the rest.
func (p *poller) sideEnded(s *session, i side) {
	s.fin[i] = true
	if i == backendSide {
		p.relay.setBackendDone(s)
	}
	if s.closing != nil {
		s.closing.noMoreFrom[i] = true
		return
	}
	p.halfClose(s, i.endCause())
	if !s.fin[i.other()] {
		p.shutdownWrite(s, i.other())
	}
	p.endIfDead(s)
}

// readFailed ends the session because reading the side failed. In a closing handshake
// the side counts as ended instead.
func (p *poller) readFailed(s *session, i side, errno syscall.Errno) {
	cause := i.causeOf(errno)
	if i == backendSide && (s.closing != nil || cause == causeBackendError) {
		p.relay.backendFailed(s, errno)
	}
	if s.closing != nil {
		p.sideEnded(s, i)
		return
	}
	p.end(s, cause)
}

// halfClose notes cause as the reason why the first direction ended, and starts the
// timer for the other direction.
func (p *poller) halfClose(s *session, cause cause) {
	if s.halfCloseCause == causeNone {
		s.halfCloseCause = cause
		s.halfCloseTimer = time.AfterFunc(p.relay.halfCloseTimeout, s.halfCloseExpired)
	}
}

// halfCloseExpired ends a half-closed session that carried nothing for
// halfCloseTimeout, or a dead one after deadTimeout. A closing handshake has its
// own timeout.
func (s *session) halfCloseExpired() {
	s.lock()
	defer s.unlock()
	switch {
	case s.closing != nil:
	case s.isDead():
		s.poller.end(s, s.halfCloseCause)
	default:
		s.poller.end(s, causeHalfClose)
	}
}

// end ends the session, unless it has ended: it closes the sockets, or gives the backend's
// to abandonBackend. unlockAndReport then calls sessionEnded.
func (p *poller) end(s *session, cause cause) {
	if !s.open {
		return
	}
	s.setCause(cause)
	if p.sendCloseNotify(s); !s.open {
		return // it has failed, and that ended the session
	}
	s.open = false
	for i, fd := range s.fd {
		switch {
		case side(i) == backendSide && p.relay.waitsForEnd(s): // also without a socket
			p.abandonBackend(s)
		case fd < 0:
		default:
			syscall.Close(int(fd))
		}
		p.dropUnsent(s, side(i))
	}
	s.fd = [2]int32{-1, -1} // others may get these numbers
	if s.halfCloseTimer != nil {
		s.halfCloseTimer.Stop()
	}
	p.freeSlot(s.slot)
	p.ended = append(p.ended, s)
}

// end ends the session. The first cause counts. It may be called from any
// goroutine, any number of times, after engine.assign or poller.promote.
func (s *session) end(cause cause) {
	s.setCause(cause)
	s.lock()
	defer s.unlock()
	s.poller.end(s, cause)
}

// lock locks what guards the session's sockets and its closing handshake.
func (s *session) lock() { s.poller.mu.Lock() }

// unlock unlocks what lock has locked. Sessions that have ended meanwhile are
// reported to the relay.
func (s *session) unlock() { s.poller.unlockAndReport() }

// startClose starts the closing handshake, if the session is to have one and has its
// sockets. If it has no sockets yet, poller.carry does this. The caller holds
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
	s.lock()
	defer s.unlock()
	p := s.poller
	switch {
	case !s.open:
	case s.closing.expire(p.relay.closeTimeout):
		p.end(s, causeNone)
	default:
		p.continueClose(s)
		p.updateEpoll(s)
	}
}

// continueClose does the next steps of the closing handshake that are possible now,
// if s has one.
func (p *poller) continueClose(s *session) {
	h := s.closing
	if h == nil || !s.open {
		return
	}
	for i := clientSide; i <= backendSide; i++ {
		if s.unsent[i] == nil {
			p.sendOrKeep(s, i, p.scan(s, i, 0))
		}
	}
	for i := range h.flushed {
		h.flushed[i] = h.stopped[i] && s.unsent[i] == nil
	}
	unreachable := s.writeFailed == [2]bool{true, true}
	h.gaveUp = h.gaveUp || unreachable
	switch over := h.progress(&s.scanners); {
	case h.complete.Load():
		p.endComplete(s, causeNone)
	case over, unreachable:
		p.end(s, causeNone)
	}
}

// scan scans the first n bytes of the buffer, which came from side i, and returns how
// many bytes of the buffer are to be sent to the peer. In a closing handshake they may
// end with the Close frame.
func (p *poller) scan(s *session, i side, n int) int {
	if s.closing == nil {
		s.scanners[i].scan(p.buf.data[:n], i == clientSide)
		return n
	}
	n = s.closing.insertClose(&s.scanners[i], i, p.buf.data[:], n)
	if s.closing.mustDropBackend(&s.scanners[backendSide]) {
		p.dropBackend(s)
	}
	return n
}

// dropBackend resets the backend's connection, or abandons it.
func (p *poller) dropBackend(s *session) {
	if p.relay.shouldAbandon(s) {
		p.abandonBackend(s)
	} else {
		fd := int(s.fd[backendSide])
		abort := &syscall.Linger{Onoff: 1}
		// If it fails, the backend gets a FIN instead of an RST.
		syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, abort)
		syscall.Close(fd)
	}
	s.fd[backendSide] = -1 // others may get this number
	s.fin[backendSide] = true
	p.relay.setBackendDone(s)
	p.setWriteFailed(s, backendSide)
}

// abandonBackend gives the backend's socket, if there is one, to the relay's abandonBackend.
func (p *poller) abandonBackend(s *session) {
	fd := int(s.fd[backendSide])
	syscall.EpollCtl(p.epollFD, syscall.EPOLL_CTL_DEL, fd, nil) // a duplicate stays
	p.relay.abandonBackend(s, os.NewFile(uintptr(fd), "socket"))
}
