//go:build !linux || portable || 386

package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// This is the engine for all systems: each session has two goroutines with a buffer
// each. After an RST Go's poller refuses to read the bytes that came before it: so a
// side's last bytes may be lost here.

// relayBuffer is the size of the buffer for each direction of a session, in bytes.
const relayBuffer = 4 << 10

// descriptorsPerPoller is how many file descriptors the engine needs for each CPU.
const descriptorsPerPoller = 0

// sessionIO is the part of a session that its two goroutines own. Arrays are indexed
// by side.
type sessionIO struct {
	// Static after engine.assign.
	conn  [2]net.Conn
	relay *relay

	halfCloseCause atomic.Int32 // why the first direction ended; causeNone if none has
	running        atomic.Int32 // directions that have not ended

	// Guarded by mu.
	mu           sync.Mutex
	scanners     [2]frameScanner   // of what came from the side
	fin          [2]bool           // the side ended its stream before any closing handshake
	writeFailed  [2]bool           // a write to the side failed: nothing more is sent to it
	deadDeadline time.Time         // when the dead session is over; zero if it is not dead
	writing      bool              // a write to the backend is under way
	backendEnded bool              // nothing more is read from the backend
	closing      *closingHandshake // nil if there is none; set once
	over         bool              // end was called
}

// engine has no goroutines but those of its sessions, which the relay waits for.
type engine struct{ relay *relay }

func (e *engine) start(r *relay) error {
	e.relay = r
	return nil
}

func (e *engine) stop() {}

// assign gives s its connections. From then on s.end and s.closeGracefully may be
// called.
func (e *engine) assign(s *session, conns [2]net.Conn) {
	s.conn, s.relay = conns, e.relay
	if socket, t := unwrapTLS(conns[clientSide]); t != nil {
		t.setTransport(socket, true)
	}
}

// carry starts the goroutines of s. They send early first, and then carry what
// comes.
func (e *engine) carry(s *session, _ [2]net.Conn, early [2][]byte) {
	s.running.Store(2)
	go e.copy(s, clientSide, early[clientSide])
	go e.copy(s, backendSide, early[backendSide])
}

// copy carries one direction. The second direction to end ends the session.
func (e *engine) copy(s *session, from side, early []byte) {
	e.copyFrom(s, from, early)
	if from == backendSide {
		s.backendEnds()
	}
	if s.running.Add(-1) == 0 {
		s.end(cause(s.halfCloseCause.Load())) // has no effect if there is a cause already
		e.relay.sessionEnded(s)
	}
}

// copyFrom sends early and then what comes from the side to its peer, until the side
// ends, which half-closes the peer's connection, or a read fails, which ends the
// session. If the peer does not read, at most relayBuffer bytes wait here, and then
// the kernel stops the sender (invariant 9).
func (e *engine) copyFrom(s *session, from side, early []byte) {
	source := io.MultiReader(bytes.NewReader(early), s.conn[from])
	buf := make([]byte, relayBuffer+maxCloseFrame)
	for {
		e.setHalfCloseDeadlines(s, from)
		n, err := source.Read(buf[:relayBuffer])
		if from == backendSide && isLost(err) {
			s.lose(err)
		}
		n, closing := s.scan(from, buf, n, err)
		if n > 0 {
			s.send(from, buf[:n])
		}
		switch {
		case closing:
			if s.continueClose(from, err) {
				return
			}
			continue
		case err == nil:
			continue
		case errors.Is(err, io.EOF), errors.Is(err, errTruncated) && !s.isTruncated():
			e.halfClose(s, from)
		default:
			s.end(s.readCause(from, err))
		}
		return
	}
}

// lose notes that a read of the backend's connection has returned err, which proves nothing.
func (s *session) lose(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.relay.backendFailed(s, err)
}

// backendEnds notes that nothing more is read from the backend. That may be a plain end because
// a write, which is still under way, has taken the error of a connection that was lost: then
// the end of that write says whether the backend is done.
func (s *session) backendEnds() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backendEnded = true; !s.writing {
		s.relay.setBackendDone(s)
	}
}

// wroteToBackend notes that a write to the backend has returned.
func (s *session) wroteToBackend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing = false; s.backendEnded {
		s.relay.setBackendDone(s)
	}
}

// send writes data from the side to its peer. If the write fails because the peer is
// gone, nothing more is sent to the peer, but the bytes that it sent before are still
// carried. Any other failure ends the session.
func (s *session) send(from side, data []byte) {
	to := from.other()
	s.mu.Lock()
	failed, ended := s.writeFailed[to], s.fin[to]
	s.writing = s.writing || to == backendSide && !failed
	s.mu.Unlock()
	if failed {
		return
	}
	if to == backendSide {
		defer s.wroteToBackend()
	}
	n, err := s.conn[to].Write(data)
	s.bytesFrom[from].Add(int64(n))
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.end(causeHalfClose)
	case to.causeOf(err) == causeRouterError:
		s.end(causeRouterError)
	default:
		s.writeFails(to, err, ended)
	}
}

// writeFails is called when a write to the side failed with err because the side is
// gone. ended reports whether the side had ended before the write.
func (s *session) writeFails(to side, err error, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writeFailed[to] = true
	if to == backendSide && isLost(err) {
		s.relay.backendFailed(s, err)
	}
	s.halfCloseCause.CompareAndSwap(int32(causeNone), int32(to.errorCause()))
	// The kernel returns the error of a connection from one call only: a read may have
	// returned an end instead, while this write had begun, and have set the cause.
	if !ended && (errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ETIMEDOUT)) {
		s.halfCloseCause.CompareAndSwap(int32(to.endCause()), int32(to.errorCause()))
		if to == clientSide {
			s.cause.CompareAndSwap(int32(causeTruncated), int32(causeClientError))
		}
	}
}

// readCause returns the cause if reading the side fails with err.
func (s *session) readCause(from side, err error) cause {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && !s.deadDeadline.IsZero():
		return cause(s.halfCloseCause.Load())
	case errors.Is(err, os.ErrDeadlineExceeded):
		return causeHalfClose
	}
	return from.causeOf(err)
}

// isTruncated is called when the client's stream ended without close_notify. It reports
// whether bytes may be missing, and then it sets the cause of the session, with mu held:
// so either it sees that a write has failed, or writeFails sees the cause.
func (s *session) isTruncated() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.needsNoCloseNotify() {
		return false
	}
	s.setCause(causeTruncated)
	return true
}

// halfClose half-closes the connection of the side's peer after the side has ended, and
// sets the deadlines of the other direction.
func (e *engine) halfClose(s *session, from side) {
	s.halfCloseCause.CompareAndSwap(int32(causeNone), int32(from.endCause()))
	e.setHalfCloseDeadlines(s, from.other())
	// It is a *net.TCPConn, *net.UnixConn or *tlsConn. An error shows at its next read.
	s.conn[from.other()].(interface{ CloseWrite() error }).CloseWrite()
}

// setHalfCloseDeadlines sets the deadlines of a half-closed session: how long the side
// may send nothing, and how long its peer may take nothing. In a dead session both are
// the time at which it is over. A closing handshake has its own timeout.
func (e *engine) setHalfCloseDeadlines(s *session, from side) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cause(s.halfCloseCause.Load()) == causeNone || s.closing != nil {
		return
	}
	limit := time.Now().Add(e.relay.halfCloseTimeout)
	if s.isDead() {
		if s.deadDeadline.IsZero() {
			s.deadDeadline = time.Now().Add(e.relay.deadTimeout)
		}
		limit = s.deadDeadline
	}
	s.conn[from].SetReadDeadline(limit)
	if !s.fin[from] { // else nothing is written but close_notify, which crypto/tls bounds by 5 s
		s.conn[from.other()].SetWriteDeadline(limit)
	}
}

// end ends the session: it closes both connections. The first cause counts. It may be
// called from any goroutine, any number of times, after engine.assign.
func (s *session) end(cause cause) {
	s.mu.Lock() // so that s.closing does not change after the cause is set
	s.setCause(cause)
	abandons := !s.over && s.relay.waitsForEnd(s)
	s.over = true
	s.mu.Unlock()
	if abandons {
		s.abandonBackend()
	}
	s.conn[clientSide].Close()
	s.conn[backendSide].Close()
}

// abandonBackend gives a duplicate of the backend's socket to the relay's abandonBackend.
func (s *session) abandonBackend() {
	if conn, ok := s.conn[backendSide].(interface{ File() (*os.File, error) }); ok {
		socket, _ := conn.File() // nil if there is no descriptor for it
		s.relay.abandonBackend(s, socket)
	}
}

// lock locks what guards the session's closing handshake.
func (s *session) lock() { s.mu.Lock() }

// unlock unlocks what lock has locked.
func (s *session) unlock() { s.mu.Unlock() }

// startClose starts the closing handshake. The caller holds mu.
func (s *session) startClose() {
	s.closing.start(s.fin, s.relay.closeTimeout, s.closeExpired)
	s.conn[clientSide].SetWriteDeadline(time.Time{}) // of setHalfCloseDeadlines
	s.conn[backendSide].SetWriteDeadline(time.Time{})
	s.interruptReads()
}

// closeExpired is called at the end of each part of the closing handshake's time.
func (s *session) closeExpired() {
	s.mu.Lock()
	last := s.closing.expire(s.relay.closeTimeout)
	if !last {
		s.interruptReads()
	}
	s.mu.Unlock()
	if last {
		s.end(causeNone)
	}
}

// interruptReads ends the reads of both sides, so that their goroutines continue the
// closing handshake. The caller holds mu.
func (s *session) interruptReads() {
	s.conn[clientSide].SetReadDeadline(pastDeadline())
	s.conn[backendSide].SetReadDeadline(pastDeadline())
}

// scan scans the first n bytes of buf, which a read of the side returned with err, and
// returns how many bytes of buf are to be written to the peer. closing reports whether
// the session has a closing handshake: then those bytes may end with its Close frame.
func (s *session) scan(from side, buf []byte, n int, err error) (
	toSend int, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, interrupted := s.closing, errors.Is(err, os.ErrDeadlineExceeded)
	switch {
	case h == nil:
		s.scanners[from].scan(buf[:n], from == clientSide)
		s.fin[from] = err != nil
		return n, false
	case interrupted:
		s.conn[from].SetReadDeadline(time.Time{})
	case err != nil:
		h.noMoreFrom[from] = true
	}
	n = h.insertClose(&s.scanners[from], from, buf, n)
	if h.mustDropBackend(&s.scanners[backendSide]) {
		s.dropBackend()
	}
	return n, true
}

// continueClose is called after the bytes of a read of the side, which returned err,
// were sent. It ends the session if the closing handshake is over. It reports whether
// there is nothing more to read from the side.
func (s *session) continueClose(from side, err error) bool {
	s.mu.Lock()
	h := s.closing
	h.flushed[from] = h.stopped[from]
	h.gaveUp = h.gaveUp || s.writeFailed == [2]bool{true, true}
	over := !s.over && h.progress(&s.scanners) // after the end both reads fail
	s.mu.Unlock()
	if over {
		s.end(causeNone)
	}
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// dropBackend resets the backend's connection, or abandons it. The caller holds mu.
func (s *session) dropBackend() {
	s.writeFailed[backendSide] = true
	if s.relay.shouldAbandon(s) {
		s.abandonBackend()
	} else if conn, ok := s.conn[backendSide].(interface{ SetLinger(int) error }); ok {
		conn.SetLinger(0) // if it fails, the backend gets a FIN instead of an RST
	}
	s.conn[backendSide].Close()
	s.relay.setBackendDone(s)
}
