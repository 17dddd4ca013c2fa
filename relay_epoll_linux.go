//go:build !portable && !386

package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	toRead = syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLPRI

	edge  = 1 << 31 // EPOLLET, which package syscall has as a negative number
	again = 1 << 27 // in wire.mask: epoll has to look at the socket once more
)

// pollerDescriptors is the most that the poller of a CPU has for itself: its epoll
// set, its bell and its pipes.
const pollerDescriptors = 2 + 2*pipesMost

// carrier is the pollers.
type carrier struct {
	pollers []*poller
	next    atomic.Uint32 // the poller of the next session, modulo their number
	running sync.WaitGroup
	budget  int64 // bytes that may be held; static after start
	held    atomic.Int64
	spare   [heldClasses]sync.Pool // of *held, by class
}

// poller carries the sessions of one epoll set.
type poller struct {
	// Static after construction.
	relay *relay
	set   *os.File // the epoll set
	epoll int      // its descriptor
	bell  int      // an eventfd in the set

	// Guarded by mu.
	mu    sync.Mutex
	buf   *buffer // but its events are run's
	pipes pipes
	slots []slot
	free  []int32    // slots without a session
	done  []*session // that are over and not yet told to the relay
}

// slot is where an event finds its session, or its guest.
type slot struct {
	session *session // nil if free, or a guest's
	guest   guest
	round   int32 // of use: an event of an earlier round is stale
}

// start makes one poller for each CPU.
func (c *carrier) start(r *relay) error {
	c.budget = heldBudget
	for range runtime.GOMAXPROCS(0) {
		fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
		if err != nil {
			c.stop()
			return os.NewSyscallError("epoll_create1", err)
		}
		syscall.SetNonblock(fd, true) // for os.NewFile: that it is for Go's poller
		p := &poller{relay: r, set: os.NewFile(uintptr(fd), "epoll"), epoll: fd, buf: newBuffer()}
		c.pollers = append(c.pollers, p)
		if p.bell, err = newBell(fd); err == nil {
			err = p.set.SetDeadline(time.Time{}) // os.ErrNoDeadline: Go's poller did not take it
		}
		if err != nil {
			c.stop()
			return fmt.Errorf("poll an epoll set: %w", err)
		}
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
	for _, p := range c.pollers {
		syscall.Close(p.bell)
		p.pipes.close()
		p.buf.free()
	}
}

// choose returns the poller of the next session.
func (c *carrier) choose() *poller { return c.pollers[c.next.Add(1)%uint32(len(c.pollers))] }

// attach chooses the poller of s. From here on s.end may be called.
func (c *carrier) attach(s *session, _ [2]net.Conn) { s.poller = c.choose() }

// begin takes the sockets of s out of Go's hands and carries what came first.
func (c *carrier) begin(s *session, ends [2]net.Conn, first [2][]byte) {
	p := s.poller
	fds := takeDescriptors(ends)
	p.mu.Lock()
	defer p.unlock()
	p.launch(s, p.take(), fds, first)
}

// launch gives s its slot and sockets, and carries what came first.
func (p *poller) launch(s *session, at int32, fds [2]int32, first [2][]byte) {
	p.slots[at].session, p.slots[at].guest = s, nil
	s.slot, s.fd, s.open = at, fds, true
	switch {
	case min(fds[client], fds[server]) < 0:
		p.end(s, causeRouterError)
	case s.ending() && s.parting == nil:
		p.end(s, causeNone)
	default:
		for i, data := range first {
			s.frames[i].scan(data, side(i) == client)
			p.pass(s, side(i), copy(p.buf.data[:], data), nil)
		}
		p.depart(s)
		p.watch(s)
	}
}

// run carries until the epoll set is closed. poll is called when something is
// new to the set since its last call began.
func (p *poller) run() {
	raw, err := p.set.SyscallConn()
	if err != nil {
		panic(err) // only for a file that is nil
	}
	raw.Read(func(uintptr) bool { // its error is that the set was closed
		p.poll()
		return false
	})
}

// poll handles what epoll has, up to eventsSize. It looks itself whether more has
// come meanwhile, which takes less than to be told of it by Go's poller. Where
// there may be more still it rings: a poller that just went on would keep its CPU
// for itself, since the runtime looks for what else is ready only when it has
// nothing to run.
//
// While a poller is busy its set could be out of Go's poller, for which each event
// costs its sender 0.1 µs; but EPOLL_CTL_ADD of a set looks at all that is in it.
func (p *poller) poll() {
	for left := eventsSize; left > 0; {
		events, errno := p.buf.wait(p.epoll, left)
		if len(events) == 0 && errno == 0 {
			return
		}
		for _, event := range events {
			p.serve(event)
		}
		left -= max(len(events), 1) // 1: EINTR
	}
	p.ring()
}

// serve handles one event: its slot is in Fd, the round and side in Pad.
func (p *poller) serve(event syscall.EpollEvent) {
	if event.Fd == bellSlot {
		return
	}
	i := side(event.Pad & 1)
	p.mu.Lock() // for each event: begin and end need not wait for all
	at := p.slots[event.Fd]
	if at.round != event.Pad>>1 {
		at = slot{} // it ended earlier in this batch
	}
	if at.session != nil {
		p.handle(at.session, i, event.Events)
	}
	p.unlock()
	if at.guest != nil {
		at.guest.ready(i, event.Events)
	}
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

// take returns a free slot.
func (p *poller) take() int32 {
	if n := len(p.free); n > 0 {
		at := p.free[n-1]
		p.free = p.free[:n-1]
		return at
	}
	p.slots = append(p.slots, slot{})
	return int32(len(p.slots) - 1)
}

// vacate makes a slot free.
func (p *poller) vacate(at int32) {
	p.slots[at] = slot{round: (p.slots[at].round + 1) & (1<<30 - 1)}
	p.free = append(p.free, at)
}

// watch makes epoll watch what s waits for. A change makes epoll look at the
// socket again, so nothing that came before is missed. A side that has ended stays
// watched as it was: that costs a call less, and its edges are over.
func (p *poller) watch(s *session) {
	for i := client; s.open && i <= server; i++ {
		if s.fd[i] < 0 {
			continue // cut off
		}
		mask, op := uint32(edge), syscall.EPOLL_CTL_MOD
		if s.reads(i) || s.fin[i] {
			mask |= toRead
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
		if err := p.control(op, s.slot, i, s.fd[i], mask); err != nil {
			p.end(s, causeRouterError) // out of memory, or of epoll's user watches
		}
		s.mask[i] = mask
	}
}

// control is epoll_ctl(2) for a side of what has the slot.
func (p *poller) control(op int, at int32, i side, fd int32, mask uint32) error {
	event := syscall.EpollEvent{Events: mask, Fd: at, Pad: p.slots[at].round<<1 | int32(i)}
	return syscall.EpollCtl(p.epoll, op, int(fd), &event)
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

// bellSlot is the slot in the events of a poller's bell, an eventfd(2). Each
// write makes the edge-triggered set tell of itself, also if the last event of
// the bell was not taken yet: EPOLL_CTL_MOD would not.
const bellSlot = -1

// newBell makes a bell in the epoll set. The caller closes it.
func newBell(epoll int) (int, error) {
	fd, _, errno := syscall.RawSyscall(syscall.SYS_EVENTFD2, 0, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if errno != 0 {
		return -1, os.NewSyscallError("eventfd2", errno)
	}
	event := syscall.EpollEvent{Events: syscall.EPOLLIN | edge, Fd: bellSlot}
	return int(fd), os.NewSyscallError("epoll_ctl", syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, int(fd), &event))
}

// ring makes poll be called again when others had their turn.
func (p *poller) ring() {
	syscall.Write(p.bell, binary.NativeEndian.AppendUint64(nil, 1)) // full after 2^64 of them
}
