//go:build !portable

package main

import (
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
// Each poller has one epoll set (epoll(7), level-triggered) with the sockets of
// its sessions. The set's own descriptor is in Go's poller, so a poller with
// nothing to do is a parked goroutine. What comes from one side is read into
// the poller's buffer and written to the other. What the other does not take is
// held: the session keeps it in a pooled buffer, stops reading that side, and
// waits until the other can be written.
//
//	one direction:  reading ──write came short──> holding ──flushed──> reading
//	                   │ FIN                         (FIN is read after that)
//	                   v
//	                ended: the other side got our FIN
//
// When both directions have ended, or a socket fails, the session is over.

const (
	pollerBuffer = 64 << 10 // bytes, of each poller and of each held remainder
	pollerEvents = 256      // taken from epoll at once
)

// wire is the part of a session that its poller owns.
type wire struct {
	poller *poller // static after begin

	// Guarded by poller.mu.
	open bool        // it has a slot and its sockets
	slot int32       // in poller.slots
	fd   [2]int32    // the sockets
	mask [2]uint32   // what epoll watches; 0: the socket is not in the set
	fin  [2]bool     // the side has ended
	half cause       // the side that ended first, or causeNone
	held [2]*held    // from the side, not taken by its peer; nil if nothing
	wait *time.Timer // bounds the silence of a half-closed session
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
		if err := syscall.SetNonblock(fd, true); err != nil { // else os.NewFile keeps it from Go's poller
			return os.NewSyscallError("fcntl", err)
		}
		p := &poller{relay: r, set: os.NewFile(uintptr(fd), "epoll"), epoll: fd}
		c.pollers = append(c.pollers, p)
		c.running.Go(p.run)
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
	fds, err := takeDescriptors(ends)
	p.mu.Lock()
	defer p.unlock()
	p.enter(s, fds)
	switch {
	case err != nil:
		p.end(s, causeRouterError)
	case s.ending():
		p.end(s, causeNone)
	case p.pass(s, client, first[client]) && p.pass(s, server, first[server]):
		p.watch(s)
	}
}

// takeDescriptors returns duplicates of the connections' descriptors, which
// are not in Go's poller, and closes the connections. A descriptor is -1 if it
// could not be had.
func takeDescriptors(ends [2]net.Conn) (fds [2]int32, err error) {
	for i, conn := range ends {
		fds[i] = -1
		raw, rerr := conn.(syscall.Conn).SyscallConn()
		if rerr == nil {
			rerr = raw.Control(func(fd uintptr) {
				n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
				if errno != 0 {
					err = errno
					return
				}
				fds[i] = int32(n)
			})
		}
		if rerr != nil {
			err = rerr
		}
		conn.Close()
	}
	return fds, err
}

// run carries until the epoll set is closed. poll is called when something has
// come since its last call began, and again whenever it left something.
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

// poll handles what epoll has now. It reports whether there may be more that
// Go's poller will not tell of, which it does only for what is new to the set.
func (p *poller) poll() (more bool) {
	n, err := syscall.EpollWait(p.epoll, p.events[:], 0)
	if err != nil {
		return err == syscall.EINTR
	}
	p.mu.Lock()
	defer p.unlock()
	more = n == len(p.events)
	for _, event := range p.events[:n] {
		if p.handle(event) {
			more = true
		}
	}
	return more
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

// handle serves one event: its slot is in Fd, the round and side in Pad. It
// reports whether the side may have more to read.
func (p *poller) handle(event syscall.EpollEvent) (more bool) {
	at, i := p.slots[event.Fd], side(event.Pad&1)
	s := at.session
	if s == nil || at.round != event.Pad>>1 {
		return false // it ended earlier in this batch
	}
	if event.Events&syscall.EPOLLOUT != 0 && !p.flush(s, i.peer()) {
		return false
	}
	const ended = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR
	switch {
	case s.reads(i) && event.Events&(syscall.EPOLLIN|ended) != 0:
		more = p.fill(s, i) || event.Events&ended != 0
	case event.Events&syscall.EPOLLERR != 0:
		p.end(s, i.broken())
	}
	p.watch(s)
	return more && s.reads(i)
}

// reads reports whether the side is to be read.
func (s *session) reads(i side) bool { return s.open && !s.fin[i] && s.held[i] == nil }

// fill reads the side once, and passes on what came. It reports whether there
// may be more.
func (p *poller) fill(s *session, i side) (more bool) {
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
	return p.pass(s, i, p.buf[:n]) && n == len(p.buf)
}

// pass writes data, which came from the side, to its peer, and holds what that
// does not take. data is at most pollerBuffer bytes, and nothing is held yet.
// It is false if the session is over.
func (p *poller) pass(s *session, i side, data []byte) bool {
	if len(data) == 0 {
		return true
	}
	n, ok := p.write(s, i, data)
	if ok && n < len(data) {
		h := p.relay.carrier.spare.Get().(*held)
		h.start, h.end = 0, copy(h.buf[:], data[n:])
		s.held[i] = h
	}
	return ok
}

// flush writes what is held of the side. It is false if the session is over.
func (p *poller) flush(s *session, i side) bool {
	h := s.held[i]
	if h == nil {
		return true
	}
	n, ok := p.write(s, i, h.buf[h.start:h.end])
	if h.start += n; !ok || h.start < h.end {
		return ok
	}
	s.held[i] = nil
	p.relay.carrier.spare.Put(h)
	if s.fin[i] {
		p.passEnd(s, i)
	}
	return s.open
}

// write writes data from the side to its peer, as much as that takes. ok is
// false if the session is over.
func (p *poller) write(s *session, i side, data []byte) (n int, ok bool) {
	n, err := syscall.Write(int(s.fd[i.peer()]), data)
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
		return 0, true
	case err != nil:
		p.end(s, i.peer().broken())
		return 0, false
	}
	s.count[i].Add(int64(n))
	if s.wait != nil {
		s.wait.Reset(p.relay.linger)
	}
	return n, true
}

// finish notes that the side has ended. Of a session that is half closed, the
// rest must not be silent for longer than relay.linger.
func (p *poller) finish(s *session, i side) {
	s.fin[i] = true
	if s.half == causeNone {
		s.half = i.ended()
		s.wait = time.AfterFunc(p.relay.linger, func() { s.end(causeHalfClose) })
	}
	if s.held[i] == nil {
		p.passEnd(s, i)
	}
}

// passEnd half-closes the peer of a side that has ended and of which nothing is
// held. If the peer has ended too, and nothing is held of it, that is all.
func (p *poller) passEnd(s *session, i side) {
	if s.fin[i.peer()] && s.held[i.peer()] == nil {
		p.end(s, s.half)
		return
	}
	syscall.Shutdown(int(s.fd[i.peer()]), syscall.SHUT_WR) // a failure shows when the peer is read
}

// watch makes epoll watch what s waits for. A socket of which nothing is wanted
// leaves the set: its errors, which cannot be masked, would be told for ever.
func (p *poller) watch(s *session) {
	for i := client; s.open && i <= server; i++ {
		var mask uint32
		if s.reads(i) {
			mask = syscall.EPOLLIN | syscall.EPOLLRDHUP
		}
		if s.held[i.peer()] != nil {
			mask |= syscall.EPOLLOUT
		}
		if mask == s.mask[i] {
			continue
		}
		op := syscall.EPOLL_CTL_MOD
		switch {
		case mask == 0:
			op = syscall.EPOLL_CTL_DEL
		case s.mask[i] == 0:
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
