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

// pollerDescriptors is how many the relay has for itself, for each CPU.
const pollerDescriptors = 0

// wire is the part of a session that its goroutines own.
type wire struct {
	// Static after attach.
	conn    [2]net.Conn
	closing time.Duration // the relay's

	half    atomic.Int32 // why one direction is over, a cause
	running atomic.Int32 // directions that have not ended

	// Guarded by mu.
	mu      sync.Mutex
	frames  [2]frameScanner // of what came from the side
	fin     [2]bool         // the side has ended, and was not to part by then
	lost    [2]bool         // the side takes nothing any more: nothing is sent to it
	last    time.Time       // when the session, which is dead, is over; zero: it is not dead
	parting *parting        // nil unless it is to part; after the end it stays as it is
}

// carrier has nothing of its own: a session's goroutines are waited for with
// the session.
type carrier struct{ relay *relay }

func (c *carrier) start(r *relay) error {
	c.relay = r
	return nil
}

func (c *carrier) stop() {}

// attach gives s its sockets. From here on s.end and s.part may be called.
func (c *carrier) attach(s *session, ends [2]net.Conn) { s.conn, s.closing = ends, c.relay.closing }

// begin starts the goroutines of s, which carry what came first and then the
// rest.
func (c *carrier) begin(s *session, _ [2]net.Conn, first [2][]byte) {
	s.running.Store(2)
	go c.copyToBackend(s, first[client])
	go c.copyToClient(s, first[server])
}

func (c *carrier) copyToBackend(s *session, first []byte) { c.copy(s, client, first) }
func (c *carrier) copyToClient(s *session, first []byte)  { c.copy(s, server, first) }

// copy carries one direction; the second to end ends the session.
func (c *carrier) copy(s *session, from side, first []byte) {
	c.relayFrom(s, from, first)
	if from == server {
		c.relay.release(s)
	}
	if s.running.Add(-1) == 0 {
		s.end(cause(s.half.Load())) // both ended by themselves, unless there was another cause
		c.relay.over(s)
	}
}

// relayFrom carries first and then what the side sends, until it ends, which is
// passed on as a half-close, or cannot be read, which ends both directions. A
// peer that takes nothing stops the side: no more than relayBuffer is held
// (invariant 9).
func (c *carrier) relayFrom(s *session, from side, first []byte) {
	source := io.MultiReader(bytes.NewReader(first), s.conn[from])
	buf := make([]byte, relayBuffer+mostClose)
	for {
		c.limitSilence(s, from)
		n, err := source.Read(buf[:relayBuffer])
		n, parts := s.scan(from, buf, n, err)
		if n > 0 {
			s.send(from, buf[:n])
		}
		switch {
		case parts:
			if s.stepped(from, err) {
				return
			}
			continue
		case err == nil:
			continue
		case errors.Is(err, io.EOF):
			c.halfClose(s, from)
		default:
			s.end(s.failure(from, err))
		}
		return
	}
}

// send writes data from the side to its peer. If that fails since the peer is gone,
// it takes nothing any more; what it has sent before is still carried. Any other
// failure ends the session.
func (s *session) send(from side, data []byte) {
	to := from.peer()
	s.mu.Lock()
	lost := s.lost[to]
	s.mu.Unlock()
	if lost {
		return
	}
	n, err := s.conn[to].Write(data)
	s.count[from].Add(int64(n))
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.end(causeHalfClose)
	case to.failed(err) == causeRouterError:
		s.end(causeRouterError)
	default:
		s.half.CompareAndSwap(int32(causeNone), int32(to.broken()))
		if errors.Is(err, syscall.ETIMEDOUT) { // told to one call only: a read sees an end, and may have said so first
			s.half.CompareAndSwap(int32(to.ended()), int32(to.broken()))
		}
		s.mu.Lock()
		s.lost[to] = true
		s.mu.Unlock()
	}
}

// failure is why the session ends if reading the side fails with err.
func (s *session) failure(from side, err error) cause {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && !s.last.IsZero():
		return cause(s.half.Load())
	case errors.Is(err, os.ErrDeadlineExceeded):
		return causeHalfClose
	}
	return from.failed(err)
}

// halfClose passes the end of the side on, and starts the clock for the other
// direction.
func (c *carrier) halfClose(s *session, from side) {
	s.half.CompareAndSwap(int32(causeNone), int32(from.ended()))
	c.limitSilence(s, from.peer())
	s.conn[from.peer()].(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn; an error shows on its next read
}

// limitSilence bounds, in a half-closed session, how long the side may be
// silent, and how long its peer may take nothing; in one that is dead, how long it
// lives. One that is to part has bounds of its own.
func (c *carrier) limitSilence(s *session, from side) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cause(s.half.Load()) == causeNone || s.parting != nil {
		return
	}
	limit := time.Now().Add(c.relay.linger)
	if s.dead() {
		if s.last.IsZero() {
			s.last = time.Now().Add(c.relay.gone)
		}
		limit = s.last
	}
	s.conn[from].SetReadDeadline(limit)
	s.conn[from.peer()].SetWriteDeadline(limit)
}

// end ends the session: both sockets are closed. The first cause counts. It may
// be called from anywhere, any number of times, once s was attached.
func (s *session) end(why cause) {
	s.mu.Lock() // after it, s.parting changes no more
	s.blame(why)
	s.mu.Unlock()
	s.conn[client].Close()
	s.conn[server].Close()
}

// past, as a deadline, wakes who reads.
func past() time.Time { return time.Unix(1, 0) }

// part makes the session end by Close frames, within the relay's time for that.
// It reports whether it did: a session that ends already does not part. why is
// causeMoved or causeDrain. done, if not nil, is called once the session is over,
// from anywhere; it must not block. part may be called from anywhere, once s was
// attached.
func (s *session) part(why cause, done func(cut bool)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.blame(why) {
		return false
	}
	t := newParting(why, done)
	t.over, t.taken, t.ended = s.fin, s.fin, s.fin
	t.begin(s.closing, s.overdue)
	s.parting = t
	s.conn[client].SetWriteDeadline(time.Time{}) // of limitSilence
	s.conn[server].SetWriteDeadline(time.Time{})
	s.wake()
	return true
}

// overdue is called when one of the times of the parting is over.
func (s *session) overdue() {
	s.mu.Lock()
	last := s.parting.expire(s.closing)
	if !last {
		s.wake()
	}
	s.mu.Unlock()
	if last {
		s.cut()
	}
}

// wake ends the reads of both sides, for the parting to go on. mu is held.
func (s *session) wake() {
	s.conn[client].SetReadDeadline(past())
	s.conn[server].SetReadDeadline(past())
}

// scan follows the first n bytes of buf, which came from the side with err, and
// returns how many are to be written to its peer. parts is whether the session is
// to part.
func (s *session) scan(from side, buf []byte, n int, err error) (keep int, parts bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, woken := s.parting, errors.Is(err, os.ErrDeadlineExceeded)
	switch {
	case t == nil:
		s.frames[from].scan(buf[:n], from == client)
		s.fin[from] = err != nil
		return n, false
	case woken:
		s.conn[from].SetReadDeadline(time.Time{})
	case err != nil:
		t.ended[from] = true
	}
	n = t.sift(&s.frames[from], from, buf, n)
	if t.offends(&s.frames[server]) {
		s.cutOff()
	}
	return n, true
}

// stepped takes note of what was carried of the side, which was read with err,
// and ends the session if its parting is over. It reports whether there is
// nothing more to read.
func (s *session) stepped(from side, err error) bool {
	s.mu.Lock()
	t := s.parting
	t.taken[from] = t.over[from]
	answered, hopeless := t.state(&s.frames)
	s.mu.Unlock()
	switch {
	case hopeless:
		s.cut()
	case answered:
		s.end(causeNone)
	}
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// cutOff breaks the connection of the backend. mu is held.
func (s *session) cutOff() {
	t := s.parting
	t.cut.Store(true)
	t.ended[server], t.over[client], t.taken[client], s.lost[server] = true, true, true, true
	if conn, ok := s.conn[server].(interface{ SetLinger(int) error }); ok {
		conn.SetLinger(0) // a failure leaves a FIN in place of the RST
	}
	s.conn[server].Close()
}

// cut ends the session before both sides have answered.
func (s *session) cut() {
	s.parting.cut.Store(true)
	s.end(causeNone)
}
