//go:build !portable

package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
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
// other. What the other does not take is held: the session keeps it in a pooled
// buffer, stops reading that side, and waits until the other can be written.
//
//	one direction:  reading ──write came short──> holding ──flushed──> reading
//	                   │ FIN                         (FIN is read after that)
//	                   v
//	                ended: the other side got our FIN
//
// When both directions have ended, or a socket cannot be read, the session is
// over. A side that takes nothing any more may still have sent something: that
// is carried, and what comes for the side is dropped.

const (
	pollerBuffer = 64 << 10 // bytes, of each poller and of each held remainder
	pollerEvents = 256      // taken from epoll at once
	pollerTurn   = 16       // reads of one side before it is the others' turn

	edge  = 1 << 31 // EPOLLET, which package syscall has as a negative number
	again = 1 << 27 // in wire.mask: epoll has to look at the socket once more
)

// wire is the part of a session that its poller owns.
type wire struct {
	poller *poller // static after attach

	// Guarded by poller.mu.
	open bool        // it has a slot and its sockets
	slot int32       // in poller.slots
	fd   [2]int32    // the sockets
	mask [2]uint32   // what epoll watches; 0: the socket is not in the set yet
	fin  [2]bool     // the side has ended
	lost [2]bool     // the side takes nothing any more
	half cause       // why one direction is over, or causeNone
	held [2]*held    // from the side, not taken by its peer; nil if nothing
	wait *time.Timer // bounds the silence of the other direction
}

// held is what a side did not take.
type held struct {
	buf        [pollerBuffer]byte
	start, end int
}

// carrier is the pollers.
type carrier struct {
	pollers []*poller
	next    atomic.Uint32 // the poller of the next session, modulo their number
	running sync.WaitGroup
	spare   sync.Pool // of *held
}

// poller carries the sessions of one epoll set.
type poller struct {
	// Static after construction.
	relay *relay
	set   *os.File // the epoll set
	epoll int      // its descriptor

	// Owned by run.
	events [pollerEvents]syscall.EpollEvent
	buf    [pollerBuffer]byte

	// Guarded by mu.
	mu    sync.Mutex
	slots []slot
	free  []int32    // slots without a session
	done  []*session // that are over and not yet told to the relay
}

// slot is where an event finds its session.
type slot struct {
	session *session // nil if free
	round   int32    // of use: an event of an earlier round is stale
}

// start makes one poller for each CPU.
func (c *carrier) start(r *relay) error {
	c.spare.New = func() any { return new(held) }
	for range runtime.GOMAXPROCS(0) {
		fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
		if err != nil {
			c.stop()
			return os.NewSyscallError("epoll_create1", err)
		}
		syscall.SetNonblock(fd, true) // for os.NewFile: that it is for Go's poller
		p := &poller{relay: r, set: os.NewFile(uintptr(fd), "epoll"), epoll: fd}
		c.pollers = append(c.pollers, p)
		c.running.Go(p.run)
		if err := p.set.SetDeadline(time.Time{}); err != nil { // os.ErrNoDeadline: Go's poller did not take it
			c.stop()
			return fmt.Errorf("poll an epoll set: %w", err)
		}
	}
	return nil
}

// stop ends the pollers.
func (c *carrier) stop() {
	for _, p := range c.pollers {
		p.set.Close()
	}
	c.running.Wait()
}

// attach chooses the poller of s. From here on s.end may be called.
func (c *carrier) attach(s *session, _ [2]net.Conn) {
	s.poller = c.pollers[c.next.Add(1)%uint32(len(c.pollers))]
}

// begin takes the sockets of s out of Go's hands and carries what came first.
func (c *carrier) begin(s *session, ends [2]net.Conn, first [2][]byte) {
	p := s.poller
	fds := takeDescriptors(ends)
	p.mu.Lock()
	defer p.unlock()
	p.enter(s, fds)
	switch {
	case min(fds[client], fds[server]) < 0:
		p.end(s, causeRouterError)
	case s.ending():
		p.end(s, causeNone)
	default:
		p.pass(s, client, first[client])
		p.pass(s, server, first[server])
		p.watch(s)
	}
}

// takeDescriptors returns duplicates of the connections' descriptors, which
// are not in Go's poller, and closes the connections. A descriptor is -1 if it
// could not be had.
func takeDescriptors(ends [2]net.Conn) (fds [2]int32) {
	for i, conn := range ends {
		fds[i] = -1
		raw, _ := conn.(syscall.Conn).SyscallConn() // its error is a nil conn
		raw.Control(func(fd uintptr) {              // its error is a closed conn
			n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
			if errno == 0 {
				fds[i] = int32(n)
			}
		})
		conn.Close()
	}
	return fds
}

// run carries until the epoll set is closed. poll is called when something is
// new to the set since its last call began, and again when it left something.
func (p *poller) run() {
	raw, err := p.set.SyscallConn()
	if err != nil {
		panic(err) // only for a file that is nil
	}
	raw.Read(func(uintptr) bool { // its error is that the set was closed
		for p.poll() {
		}
		return false
	})
}

// poll handles what epoll has now, up to pollerEvents. It reports whether there
// may be more.
func (p *poller) poll() (more bool) {
	n, err := syscall.EpollWait(p.epoll, p.events[:], 0)
	if err != nil {
		return err == syscall.EINTR
	}
	p.mu.Lock()
	defer p.unlock()
	for _, event := range p.events[:n] {
		p.handle(event)
	}
	return n == len(p.events)
}

// unlock releases mu, and tells the relay of the sessions that are over.
func (p *poller) unlock() {
	done := p.done
	p.done = nil
	p.mu.Unlock()
	for _, s := range done {
		p.relay.over(s)
	}
}

// enter gives s a slot.
func (p *poller) enter(s *session, fds [2]int32) {
	if n := len(p.free); n > 0 {
		s.slot, p.free = p.free[n-1], p.free[:n-1]
	} else {
		s.slot = int32(len(p.slots))
		p.slots = append(p.slots, slot{})
	}
	p.slots[s.slot].session = s
	s.fd, s.open = fds, true
}

// handle serves one event: its slot is in Fd, the round and side in Pad.
func (p *poller) handle(event syscall.EpollEvent) {
	at, i := p.slots[event.Fd], side(event.Pad&1)
	s := at.session
	if s == nil || at.round != event.Pad>>1 {
		return // it ended earlier in this batch
	}
	if event.Events&syscall.EPOLLOUT != 0 {
		p.flush(s, i.peer())
	}
	const ended = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR
	switch {
	case s.reads(i) && event.Events&(syscall.EPOLLIN|ended) != 0:
		p.drain(s, i, event.Events&ended != 0)
	case event.Events&syscall.EPOLLERR != 0: // what is held of it goes first
		p.halve(s, i.broken())
	}
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
	n, err := syscall.Read(int(s.fd[i]), p.buf[:])
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
		return err == syscall.EINTR
	case err != nil:
		p.end(s, i.broken())
		return false
	case n == 0:
		p.finish(s, i)
		return false
	}
	p.pass(s, i, p.buf[:n])
	return n == len(p.buf) || ended
}

// pass writes data, which came from the side, to its peer, and holds what that
// does not take. data is at most pollerBuffer bytes, and nothing is held yet.
func (p *poller) pass(s *session, i side, data []byte) {
	if len(data) == 0 {
		return
	}
	if n := p.write(s, i, data); n < len(data) {
		h := p.relay.carrier.spare.Get().(*held)
		h.start, h.end = 0, copy(h.buf[:], data[n:])
		s.held[i] = h
	}
}

// flush writes what is held of the side.
func (p *poller) flush(s *session, i side) {
	h := s.held[i]
	if h == nil {
		return
	}
	if h.start += p.write(s, i, h.buf[h.start:h.end]); h.start == h.end {
		s.held[i] = nil
		p.relay.carrier.spare.Put(h)
	}
}

// write returns how much of data, from the side, its peer took: all, once it
// takes nothing any more.
func (p *poller) write(s *session, i side, data []byte) int {
	if s.lost[i.peer()] {
		return len(data)
	}
	n, err := syscall.Write(int(s.fd[i.peer()]), data)
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
		return 0
	case err != nil:
		s.lost[i.peer()] = true
		p.halve(s, i.peer().broken())
		return len(data)
	}
	s.count[i].Add(int64(n))
	if s.wait != nil {
		s.wait.Reset(p.relay.linger)
	}
	return n
}

// finish notes that the side has ended, of which nothing is held, and passes
// that on. If the peer has ended before, the session is over.
func (p *poller) finish(s *session, i side) {
	s.fin[i] = true
	if s.fin[i.peer()] {
		p.end(s, s.half)
		return
	}
	p.halve(s, i.ended())
	syscall.Shutdown(int(s.fd[i.peer()]), syscall.SHUT_WR) // a failure shows when the peer is read
}

// halve notes that one direction is over, and starts the clock for the other.
func (p *poller) halve(s *session, why cause) {
	if s.half == causeNone {
		s.half = why
		s.wait = time.AfterFunc(p.relay.linger, func() { s.end(causeHalfClose) })
	}
}

// watch makes epoll watch what s waits for. A change makes epoll look at the
// socket again, so nothing that came before is missed.
func (p *poller) watch(s *session) {
	for i := client; s.open && i <= server; i++ {
		mask, op := uint32(edge), syscall.EPOLL_CTL_MOD
		if s.reads(i) {
			mask |= syscall.EPOLLIN | syscall.EPOLLRDHUP
		}
		if s.held[i.peer()] != nil {
			mask |= syscall.EPOLLOUT
		}
		if mask == s.mask[i] {
			continue
		}
		if s.mask[i] == 0 {
			op = syscall.EPOLL_CTL_ADD
		}
		event := syscall.EpollEvent{Events: mask, Fd: s.slot, Pad: p.slots[s.slot].round<<1 | int32(i)}
		if err := syscall.EpollCtl(p.epoll, op, int(s.fd[i]), &event); err != nil {
			p.end(s, causeRouterError) // out of memory, or of epoll's user watches
		}
		s.mask[i] = mask
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
		if s.held[i] != nil {
			p.relay.carrier.spare.Put(s.held[i])
			s.held[i] = nil
		}
	}
	if s.wait != nil {
		s.wait.Stop()
	}
	at := &p.slots[s.slot]
	at.session, at.round = nil, (at.round+1)&(1<<30-1)
	p.free = append(p.free, s.slot)
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
