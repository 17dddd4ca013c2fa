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
// All sessions together hold up to heldBudget. Beyond that a side is not read before
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
// after goneTime. A send that fails for another reason ends the session at once.

const (
	pollerTurn  = 4        // reads of one side before it is the others' turn
	bulkPause   = 16       // full buffers that are not followed by a look at the next header, when one was in vain
	spliceLeast = 16 << 10 // bytes of a frame to come that are worth a pipe
)

// wire is the part of a session that its poller owns.
type wire struct {
	poller *poller // static after attach

	// Guarded by poller.mu.
	fd     [2]int32        // the sockets
	mask   [2]uint32       // what epoll watches; 0: the socket is not in the set yet
	slot   int32           // in poller.slots
	half   cause           // why one direction is over, or causeNone
	open   bool            // it has a slot and its sockets
	fin    [2]bool         // the side has ended
	lost   [2]bool         // the side takes nothing any more: nothing is sent to it
	bulk   [2]int8         // above 0: the side has much to send; below: full buffers until it may
	held   [2]*held        // from the side, not taken by its peer; nil if nothing
	frames [2]frameScanner // of what came from the side
	wait   *time.Timer     // bounds the silence of the other direction

	parting *parting // nil unless it is to part; after the end it stays as it is
}

// held is what a side did not take: first data, then what is in pipe. It may be
// nothing, of a side that waits for its peer all the same.
type held struct {
	data []byte // its capacity is of a class
	pipe *pipe  // or nil
	cost int64  // what it has of the budget, in bytes
}

const (
	heldBudget  = 64 << 20 // bytes that all sessions hold: an eighth of the container's memory in k8s/router.yaml
	heldLeast   = 64       // bytes of the smallest buffer that holds something
	heldClasses = 11       // of buffers, each with twice the size of the one before: the last has bufferSize
	forwardSize = 16 << 10 // bytes that are looked at, while the budget is used up
)

// heldClass returns the class of the smallest buffer for so many bytes.
func heldClass(size int) int { return bits.Len(uint(max(size, 1)-1) / heldLeast) }

// hold keeps what the side's peer did not take, and makes the side wait for it.
func (p *poller) hold(s *session, i side, data []byte, piped *pipe) {
	c := &p.relay.carrier
	class := heldClass(len(data))
	h, _ := c.spare[class].Get().(*held)
	if h == nil {
		h = &held{data: make([]byte, 0, heldLeast<<class)}
	}
	h.data, h.pipe, h.cost = append(h.data[:0], data...), piped, heldLeast<<class
	if piped != nil {
		h.cost += int64(piped.full)
	}
	c.held.Add(h.cost)
	s.held[i] = h
}

// handle does what an event of the side asks for.
func (p *poller) handle(s *session, i side, events uint32) {
	if events&syscall.EPOLLOUT != 0 {
		p.flush(s, i.peer())
	}
	const ended = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR | syscall.EPOLLPRI // urgent data cuts a read short too
	switch {
	case s.reads(i) && events&(syscall.EPOLLIN|ended) != 0:
		p.drain(s, i, events&ended != 0)
	case events&syscall.EPOLLERR != 0: // what is held of it goes first
		p.lose(s, i)
	}
	p.step(s)
	p.watch(s)
}

// drain reads the side until it has nothing more for now, or for pollerTurn. Of
// a side that has ended, the end is read too: it will not be told again.
func (p *poller) drain(s *session, i side, ended bool) {
	for range pollerTurn {
		if !p.fill(s, i, ended) || !s.reads(i) {
			return
		}
	}
	s.mask[i] |= again
}

// reads reports whether the side is to be read.
func (s *session) reads(i side) bool { return s.open && !s.fin[i] && s.held[i] == nil }

// fill reads the side once, and passes on what came. It reports whether there
// may be more.
func (p *poller) fill(s *session, i side, ended bool) (more bool) {
	full := p.relay.carrier.held.Load() >= p.relay.carrier.budget
	if full && s.parting == nil {
		return p.forward(s, i, ended)
	}
	n, limit := 0, bufferSize
	piped, errno := p.siphon(s, i, bufferSize)
	if piped == nil && errno == 0 {
		switch {
		case s.parting != nil && full:
			limit = forwardSize / 4
		case s.parting != nil:
			limit -= mostClose
		case s.bulk[i] > 0:
			limit = int(min(bufferSize, s.frames[i].rest()+mostHeader))
		}
		n, errno = p.buf.receive(s.fd[i], limit)
		switch {
		case errno == syscall.EAGAIN || errno == syscall.EINTR:
			return errno == syscall.EINTR
		case errno == 0 && n == 0:
			p.finish(s, i)
			return false
		case errno == 0:
			more = n == limit
			n = p.scan(s, i, n)
			s.weigh(i, more, limit)
			piped, errno = p.siphon(s, i, bufferSize-n)
		default:
			n = 0
		}
	}
	p.pass(s, i, n, piped)
	if errno != 0 {
		p.broke(s, i, errno)
		return false
	}
	return more || ended || piped != nil
}

// forward is fill while the budget is used up: it looks at what has come, sends it,
// and reads what was taken. A session that is to part is not carried so, as what is
// sent of it is not what came.
func (p *poller) forward(s *session, i side, ended bool) (more bool) {
	n, errno := p.buf.peek(s.fd[i], forwardSize)
	switch {
	case errno == syscall.EAGAIN || errno == syscall.EINTR:
		return errno == syscall.EINTR
	case errno != 0:
		p.broke(s, i, errno)
		return false
	case n == 0:
		p.finish(s, i)
		return false
	}
	sent := n
	if s.sends(i) {
		took, errno := p.buf.send(s.fd[i.peer()], n, 0)
		sent = p.took(s, i, took, errno, n)
	}
	s.bulk[i] = 0
	p.skip(s, i, sent)
	if sent < n && s.open {
		p.hold(s, i, nil, nil)
	}
	return n == forwardSize || ended
}

// skip reads what was looked at and is done with.
func (p *poller) skip(s *session, i side, n int) {
	for n > 0 && s.open {
		got, errno := p.buf.receive(s.fd[i], n)
		switch {
		case errno == 0 && got > 0:
			s.frames[i].scan(p.buf.data[:got], i == client)
			n -= got
		case errno != syscall.EINTR: // it was there
			p.end(s, causeRouterError)
		}
	}
}

// weigh judges whether the side has much to send, by a read that filled what it
// was limited to, or did not. That frames are large shows when the next header
// alone is read.
func (s *session) weigh(i side, full bool, limit int) {
	switch {
	case !full:
		s.bulk[i] = 0
	case s.bulk[i] < 0:
		s.bulk[i]++
	case limit < bufferSize && s.frames[i].rest() < spliceLeast:
		s.bulk[i] = -bulkPause
	default:
		s.bulk[i] = 1
	}
}

// siphon moves payload of the side's present frame, up to limit bytes, into a
// pipe. It returns nil if that is not worth it or nothing came, and the error if
// the side is broken: splice(2) has taken it from the socket.
func (p *poller) siphon(s *session, i side, limit int) (*pipe, syscall.Errno) {
	rest := s.frames[i].rest()
	if s.bulk[i] <= 0 || s.parting != nil || min(rest, uint64(limit)) < spliceLeast {
		return nil, 0
	}
	to := p.pipes.get()
	if to == nil {
		return nil, 0
	}
	n, errno := to.receive(s.fd[i], int(min(rest, uint64(limit))))
	switch {
	case errno == 0 && n > 0:
		s.frames[i].skip(uint64(n))
		return to, 0
	case errno == syscall.EAGAIN || errno == syscall.EINTR || errno == syscall.EINVAL: // EINVAL: not from such a socket
		errno = 0
	}
	p.pipes.put(to)
	return nil, errno
}

// pass sends the first n bytes of the buffer, which came from the side, and then
// what was piped, to its peer, and holds what that does not take. Nothing is
// held yet.
func (p *poller) pass(s *session, i side, n int, piped *pipe) {
	sent, flags := n, 0
	if piped != nil {
		flags = syscall.MSG_MORE
	}
	if n > 0 && s.sends(i) {
		took, errno := p.buf.send(s.fd[i.peer()], n, flags)
		sent = p.took(s, i, took, errno, n)
	}
	if sent == n {
		piped = p.pour(s, i, piped)
	}
	if sent < n || piped != nil {
		p.hold(s, i, p.buf.data[sent:n], piped)
	}
}

// pour sends what was piped, if anything was, and returns the pipe if something
// is left in it.
func (p *poller) pour(s *session, i side, piped *pipe) *pipe {
	if piped == nil {
		return nil
	}
	if s.sends(i) {
		size := piped.full
		n, errno := piped.send(s.fd[i.peer()])
		if p.took(s, i, n, errno, size) < size {
			return piped
		}
	}
	p.pipes.put(piped)
	return nil
}

// sends reports whether what comes from the side is sent to its peer. All else is
// dropped.
func (s *session) sends(i side) bool { return s.open && !s.lost[i.peer()] }

// flush sends what is held of the side, by way of the buffer.
func (p *poller) flush(s *session, i side) {
	h := s.held[i]
	if h == nil {
		return
	}
	n, piped := copy(p.buf.data[:], h.data), h.pipe
	h.pipe = nil
	p.release(s, i)
	p.pass(s, i, n, piped)
}

// release forgets what is held of the side.
func (p *poller) release(s *session, i side) {
	h := s.held[i]
	if h == nil {
		return
	}
	if h.pipe != nil {
		p.pipes.put(h.pipe)
	}
	s.held[i] = nil
	p.relay.carrier.held.Add(-h.cost)
	p.relay.carrier.spare[heldClass(cap(h.data))].Put(h)
}

// took takes note of what the side's peer did with size bytes, and returns how
// many are done with: those that it took, or all, once it takes nothing any more.
func (p *poller) took(s *session, i side, n int, errno syscall.Errno, size int) int {
	to := i.peer()
	switch {
	case errno == 0:
		s.count[i].Add(int64(n))
		if s.wait != nil {
			s.wait.Reset(p.relay.linger)
		}
		return n
	case errno == syscall.EAGAIN:
		return 0
	case errno == syscall.EINTR:
		if s.mask[to] != 0 {
			s.mask[to] |= again // it may be writable all the time
		}
		return 0
	case to.failed(errno) == causeRouterError:
		p.end(s, causeRouterError)
	default:
		p.lose(s, to)
	}
	return size
}

// lose notes that the side takes nothing any more, and drops what is held for it.
func (p *poller) lose(s *session, i side) {
	if !s.open || s.lost[i] {
		return
	}
	s.lost[i] = true
	p.release(s, i.peer())
	if i == server {
		p.relay.release(s)
	}
	p.halve(s, i.broken())
	p.settle(s)
}

// settle ends the session if nothing can be carried any more, in either direction,
// or after goneTime if one side is still there. One that is to part has bounds of
// its own.
func (p *poller) settle(s *session) {
	switch {
	case s.parting != nil || !s.dead():
	case s.fin == [2]bool{true, true} || s.lost == [2]bool{true, true}:
		p.end(s, s.half)
	default:
		s.wait.Reset(p.relay.gone)
	}
}

// finish notes that the side has ended, of which nothing is held, and passes
// that on. If the peer has ended before, the session is over. One that is to part
// goes on with that.
func (p *poller) finish(s *session, i side) {
	s.fin[i] = true
	if i == server {
		p.relay.release(s)
	}
	if s.parting != nil {
		s.parting.ended[i] = true
		return
	}
	p.halve(s, i.ended())
	if !s.fin[i.peer()] {
		syscall.Shutdown(int(s.fd[i.peer()]), syscall.SHUT_WR) // a failure shows when the peer is read
	}
	p.settle(s)
}

// broke ends the session, as the side cannot be read. One that is to part goes on
// with that.
func (p *poller) broke(s *session, i side, errno syscall.Errno) {
	if s.parting != nil {
		p.finish(s, i)
		return
	}
	p.end(s, i.failed(errno))
}

// halve notes that one direction is over, and starts the clock for the other.
func (p *poller) halve(s *session, why cause) {
	if s.half == causeNone {
		s.half = why
		s.wait = time.AfterFunc(p.relay.linger, s.silent)
	}
}

// silent ends the session, of which one direction is over and nothing comes in the
// other, or can. One that is to part has bounds of its own.
func (s *session) silent() {
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	switch {
	case s.parting != nil:
	case s.dead():
		p.end(s, s.half)
	default:
		p.end(s, causeHalfClose)
	}
}

// end closes both sockets, if the session is not over yet.
func (p *poller) end(s *session, why cause) {
	if !s.open {
		return
	}
	s.blame(why)
	s.open = false
	for i, fd := range s.fd {
		if fd >= 0 {
			syscall.Close(int(fd))
		}
		p.release(s, side(i))
	}
	if s.wait != nil {
		s.wait.Stop()
	}
	p.vacate(s.slot)
	p.done = append(p.done, s)
}

// end ends the session. The first cause counts. It may be called from anywhere,
// any number of times, once s was attached.
func (s *session) end(why cause) {
	s.blame(why)
	p := s.poller
	p.mu.Lock()
	defer p.unlock()
	p.end(s, why)
}

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
