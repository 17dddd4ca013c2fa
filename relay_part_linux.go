//go:build !portable && !386

package main

import "syscall"

// part makes the session end by Close frames, within the relay's time for that.
// It reports whether it did: a session that ends already does not part. why is
// causeMoved or causeDrain. done, if not nil, is called once the session is over,
// from anywhere; it must not block. part may be called from anywhere, once s was
// attached.
func (s *session) part(why cause, done func(cut bool)) bool {
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	if !s.blame(why) {
		return false
	}
	s.parting = newParting(why, done)
	p.depart(s)
	p.watch(s)
	return true
}

// depart begins the parting of s if it is to part and has its sockets: else begin
// does.
func (p *poller) depart(s *session) {
	if s.parting == nil || !s.open {
		return
	}
	s.parting.over, s.parting.ended = s.fin, s.fin
	s.parting.begin(p.relay.closing, s.overdue)
	p.step(s)
}

// overdue is called when one of the times of the parting is over.
func (s *session) overdue() {
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	if !s.open {
		return
	}
	if s.parting.expire(p.relay.closing) {
		p.cut(s)
		return
	}
	p.step(s)
	p.watch(s)
}

// step goes on with the parting of s, if it is to part, as far as that is
// possible now.
func (p *poller) step(s *session) {
	t := s.parting
	if t == nil || !s.open {
		return
	}
	for i := client; i <= server; i++ {
		if s.held[i] == nil {
			p.pass(s, i, p.scan(s, i, 0), nil)
		}
	}
	for i := range t.taken {
		t.taken[i] = t.over[i] && s.held[i] == nil
	}
	switch answered, hopeless := t.state(&s.frames); {
	case hopeless, s.lost == [2]bool{true, true}:
		p.cut(s)
	case answered:
		p.end(s, causeNone)
	}
}

// scan follows the first n bytes of the buffer, which came from the side, and
// returns how many are to be passed on.
func (p *poller) scan(s *session, i side, n int) int {
	if s.parting == nil {
		s.frames[i].scan(p.buf.data[:n], i == client)
		return n
	}
	n = s.parting.sift(&s.frames[i], i, p.buf.data[:], n)
	if s.parting.offends(&s.frames[server]) {
		p.cutOff(s)
	}
	return n
}

// cutOff breaks the connection of the backend.
func (p *poller) cutOff(s *session) {
	t, fd := s.parting, int(s.fd[server])
	t.cut.Store(true)
	s.fin[server], t.ended[server], t.over[client] = true, true, true
	p.lose(s, server)
	syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1}) // a failure leaves a FIN in place of the RST
	syscall.Close(fd)
	s.fd[server] = -1
}

// cut ends the session before both sides have answered.
func (p *poller) cut(s *session) {
	s.parting.cut.Store(true)
	p.end(s, causeNone)
}
