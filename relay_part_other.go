//go:build !linux || portable || 386

package main

import (
	"errors"
	"os"
	"time"
)

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
