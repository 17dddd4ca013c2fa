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

// This is the carrier for all systems: two goroutines for each session, with a
// buffer each. After an RST Go's poller refuses to read what came before it, so
// that part of a side's last bytes may be lost here.

// relayBuffer is how many bytes are held for each direction of a session.
const relayBuffer = 4 << 10

// descriptorsPerPoller is how many the relay has for itself, for each CPU.
const descriptorsPerPoller = 0

// sessionIO is the part of a session that its goroutines own.
type sessionIO struct {
	// Static after attach.
	conn  [2]net.Conn
	relay *relay

	halfCloseCause atomic.Int32 // why one direction is over, a cause
	running        atomic.Int32 // directions that have not ended

	// Guarded by mu.
	mu           sync.Mutex
	frames       [2]frameScanner   // of what came from the side
	fin          [2]bool           // the side has ended, and was not to part by then
	writeFailed  [2]bool           // the side takes nothing any more: nothing is sent to it
	deadDeadline time.Time         // when the session, which is dead, is over; zero: it is not dead
	closing      *closingHandshake // nil unless it is to part; after the end it stays as it is
}

// engine has nothing of its own: a session's goroutines are waited for with
// the session.
type engine struct{ relay *relay }

func (c *engine) start(r *relay) error {
	c.relay = r
	return nil
}

func (c *engine) stop() {}

// assign gives s its sockets. From here on s.end and s.closeGracefully may be called.
func (c *engine) assign(s *session, conns [2]net.Conn) {
	s.conn, s.relay = conns, c.relay
}

// startSession starts the goroutines of s, which carry what came first and then the
// rest.
func (c *engine) startSession(s *session, _ [2]net.Conn, early [2][]byte) {
	s.running.Store(2)
	go c.copyToBackend(s, early[clientSide])
	go c.copyToClient(s, early[backendSide])
}

func (c *engine) copyToBackend(s *session, first []byte) { c.copy(s, clientSide, first) }
func (c *engine) copyToClient(s *session, first []byte)  { c.copy(s, backendSide, first) }

// copy carries one direction; the second to end ends the session.
func (c *engine) copy(s *session, from side, first []byte) {
	c.copyFrom(s, from, first)
	if from == backendSide {
		c.relay.setPodDone(s)
	}
	if s.running.Add(-1) == 0 {
		s.end(cause(s.halfCloseCause.Load())) // both ended by themselves, unless there was another cause
		c.relay.sessionEnded(s)
	}
}

// copyFrom carries first and then what the side sends, until it ends, which is
// passed on as a half-close, or cannot be read, which ends both directions. A
// peer that takes nothing stops the side: no more than relayBuffer is held
// (invariant 9).
func (c *engine) copyFrom(s *session, from side, first []byte) {
	source := io.MultiReader(bytes.NewReader(first), s.conn[from])
	buf := make([]byte, relayBuffer+maxCloseFrame)
	for {
		c.setHalfCloseDeadlines(s, from)
		n, err := source.Read(buf[:relayBuffer])
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
		case errors.Is(err, io.EOF):
			c.halfClose(s, from)
		default:
			s.end(s.readCause(from, err))
		}
		return
	}
}

// send writes data from the side to its peer. If that fails since the peer is gone,
// it takes nothing any more; what it has sent before is still carried. Any other
// failure ends the session.
func (s *session) send(from side, data []byte) {
	to := from.other()
	s.mu.Lock()
	lost := s.writeFailed[to]
	s.mu.Unlock()
	if lost {
		return
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
		s.halfCloseCause.CompareAndSwap(int32(causeNone), int32(to.errorCause()))
		if errors.Is(err, syscall.ETIMEDOUT) { // told to one call only: a read sees an end, and may have said so first
			s.halfCloseCause.CompareAndSwap(int32(to.endCause()), int32(to.errorCause()))
		}
		s.mu.Lock()
		s.writeFailed[to] = true
		s.mu.Unlock()
	}
}

// readCause is why the session ends if reading the side fails with err.
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

// halfClose passes the end of the side on, and starts the clock for the other
// direction.
func (c *engine) halfClose(s *session, from side) {
	s.halfCloseCause.CompareAndSwap(int32(causeNone), int32(from.endCause()))
	c.setHalfCloseDeadlines(s, from.other())
	s.conn[from.other()].(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn; an error shows on its next read
}

// setHalfCloseDeadlines bounds, in a half-closed session, how long the side may be
// silent, and how long its peer may take nothing; in one that is dead, how long it
// lives. One that is to part has bounds of its own.
func (c *engine) setHalfCloseDeadlines(s *session, from side) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cause(s.halfCloseCause.Load()) == causeNone || s.closing != nil {
		return
	}
	limit := time.Now().Add(c.relay.halfCloseTimeout)
	if s.isDead() {
		if s.deadDeadline.IsZero() {
			s.deadDeadline = time.Now().Add(c.relay.deadTimeout)
		}
		limit = s.deadDeadline
	}
	s.conn[from].SetReadDeadline(limit)
	s.conn[from.other()].SetWriteDeadline(limit)
}

// end ends the session: both sockets are closed. The first cause counts. It may
// be called from anywhere, any number of times, once s was attached.
func (s *session) end(cause cause) {
	s.mu.Lock() // after it, s.closing changes no more
	s.setCause(cause)
	s.mu.Unlock()
	s.conn[clientSide].Close()
	s.conn[backendSide].Close()
}

// pastDeadline, as a deadline, wakes who reads.
func pastDeadline() time.Time { return time.Unix(1, 0) }

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

// interruptReads ends the reads of both sides, for the parting to go on. mu is held.
func (s *session) interruptReads() {
	s.conn[clientSide].SetReadDeadline(pastDeadline())
	s.conn[backendSide].SetReadDeadline(pastDeadline())
}

// scan follows the first n bytes of buf, which came from the side with err, and
// returns how many are to be written to its peer. closing is whether the session is
// to part.
func (s *session) scan(from side, buf []byte, n int, err error) (keep int, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, woken := s.closing, errors.Is(err, os.ErrDeadlineExceeded)
	switch {
	case h == nil:
		s.frames[from].scan(buf[:n], from == clientSide)
		s.fin[from] = err != nil
		return n, false
	case woken:
		s.conn[from].SetReadDeadline(time.Time{})
	case err != nil:
		h.ended[from] = true
	}
	n = h.insertClose(&s.frames[from], from, buf, n)
	if h.giveUpBackend(&s.frames[backendSide]) {
		s.resetBackend()
	}
	return n, true
}

// continueClose takes note of what was carried of the side, which was read with err,
// and ends the session if its parting is over. It reports whether there is
// nothing more to read.
func (s *session) continueClose(from side, err error) bool {
	s.mu.Lock()
	h := s.closing
	h.flushed[from] = h.stopped[from]
	over := h.progress(&s.frames)
	s.mu.Unlock()
	if over {
		s.end(causeNone)
	}
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// resetBackend breaks the connection of the backend. mu is held.
func (s *session) resetBackend() {
	s.writeFailed[backendSide] = true
	if conn, ok := s.conn[backendSide].(interface{ SetLinger(int) error }); ok {
		conn.SetLinger(0) // a failure leaves a FIN in place of the RST
	}
	s.conn[backendSide].Close()
	s.relay.setPodDone(s)
}
