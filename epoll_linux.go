//go:build !portable && !386

package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	epollReadEvents = syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLPRI

	edgeTriggered = 1 << 31 // EPOLLET, which package syscall has as a negative number
	rearm         = 1 << 27 // in sessionIO.epollMask: epoll has to look at the socket once more
)

// descriptorsPerPoller is the most that the poller of a CPU has for itself: its epoll
// set, its bell and its pipes.
const descriptorsPerPoller = 2 + 2*maxPipes

// engine is the pollers.
type engine struct {
	pollers      []*poller
	next         atomic.Uint32 // the poller of the next session, modulo their number
	running      sync.WaitGroup
	unsentBudget int64 // bytes that may be held; static after start
	unsentBytes  atomic.Int64
	pools        [unsentClasses]sync.Pool // of *held, by class
}

// poller carries the sessions of one epoll set.
type poller struct {
	// Static after construction.
	relay     *relay
	epollFile *os.File // the epoll set
	epollFD   int      // its descriptor
	wakeFD    int      // an eventfd in the set

	// Guarded by mu.
	mu        sync.Mutex
	buf       *buffer // but its events are run's
	pipes     pipes
	slots     []slot
	freeSlots []int32    // slots without a session
	finished  []*session // that are over and not yet told to the relay
}

// slot is where an event finds its session, or its guest.
type slot struct {
	session    *session // nil if free, or a guest's
	pending    pollClient
	generation int32 // of use: an event of an earlier round is stale
}

// A poller serves guests too, which are not sessions yet: they have a slot and
// sockets that it watches, and may become sessions.

// pollClient is told of its sockets by its poller, which holds no lock then. Its
// events are edge-triggered.
type pollClient interface {
	handleEvent(i side, events uint32)
	fallBackNow() // the poller is to have no guests any more
}

// start makes one poller for each CPU.
func (c *engine) start(r *relay) error {
	c.unsentBudget = maxUnsent
	for range runtime.GOMAXPROCS(0) {
		fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
		if err != nil {
			c.stop()
			return os.NewSyscallError("epoll_create1", err)
		}
		syscall.SetNonblock(fd, true) // for os.NewFile: that it is for Go's poller
		p := &poller{relay: r, epollFile: os.NewFile(uintptr(fd), "epoll"), epollFD: fd, buf: newBuffer()}
		c.pollers = append(c.pollers, p)
		if p.wakeFD, err = newWakeDescriptor(fd); err == nil {
			err = p.epollFile.SetDeadline(time.Time{}) // os.ErrNoDeadline: Go's poller did not take it
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
func (c *engine) stop() {
	for _, p := range c.pollers {
		p.epollFile.Close()
	}
	c.running.Wait()
	for _, p := range c.pollers {
		syscall.Close(p.wakeFD)
		p.pipes.close()
		p.buf.free()
	}
}

// nextPoller returns the poller of the next session.
func (c *engine) nextPoller() *poller { return c.pollers[c.next.Add(1)%uint32(len(c.pollers))] }

// assign chooses the poller of s. From here on s.end may be called.
func (c *engine) assign(s *session, _ [2]net.Conn) { s.poller = c.nextPoller() }

// startSession takes the sockets of s out of Go's hands and carries what came first.
func (c *engine) startSession(s *session, conns [2]net.Conn, early [2][]byte) {
	p := s.poller
	fds := detachDescriptors(conns)
	p.mu.Lock()
	defer p.unlock()
	p.start(s, p.allocateSlot(), fds, early)
}

// start gives s its slot and sockets, and carries what came first.
func (p *poller) start(s *session, slotIndex int32, fds [2]int32, early [2][]byte) {
	p.slots[slotIndex].session, p.slots[slotIndex].pending = s, nil
	s.slot, s.fd, s.open = slotIndex, fds, true
	switch {
	case min(fds[clientSide], fds[backendSide]) < 0:
		p.end(s, causeRouterError)
	case s.isClosing() && s.closing == nil:
		p.end(s, causeNone)
	default:
		for i, data := range early {
			s.frames[i].scan(data, side(i) == clientSide)
			p.sendOrKeep(s, side(i), copy(p.buf.data[:], data), nil)
		}
		s.startClose()
		p.updateEpoll(s)
	}
}

// run carries until the epoll set is closed. poll is called when something is
// new to the set since its last call began.
func (p *poller) run() {
	raw, err := p.epollFile.SyscallConn()
	if err != nil {
		panic(err) // only for a file that is nil
	}
	raw.Read(func(uintptr) bool { // its error is that the set was closed
		p.poll()
		return false
	})
}

// poll handles what epoll has, up to maxEpollEvents. It looks itself whether more has
// come meanwhile, which takes less than to be told of it by Go's poller. Where
// there may be more still it rings: a poller that just went on would keep its CPU
// for itself, since the runtime looks for what else is ready only when it has
// nothing to run.
//
// While a poller is busy its set could be out of Go's poller, for which each event
// costs its sender 0.1 µs; but EPOLL_CTL_ADD of a set looks at all that is in it.
func (p *poller) poll() {
	for left := maxEpollEvents; left > 0; {
		events, errno := p.buf.wait(p.epollFD, left)
		if len(events) == 0 && errno == 0 {
			return
		}
		for _, event := range events {
			p.handleEvent(event)
		}
		left -= max(len(events), 1) // 1: EINTR
	}
	p.wake()
}

// handleEvent handles one event: its slot is in Fd, the round and side in Pad.
func (p *poller) handleEvent(event syscall.EpollEvent) {
	if event.Fd == wakeSlot {
		return
	}
	i := side(event.Pad & 1)
	p.mu.Lock() // for each event: begin and end need not wait for all
	target := p.slots[event.Fd]
	if target.generation != event.Pad>>1 {
		target = slot{} // it ended earlier in this batch
	}
	if target.session != nil {
		p.handle(target.session, i, event.Events)
	}
	p.unlock()
	if target.pending != nil {
		target.pending.handleEvent(i, event.Events)
	}
}

// unlock releases mu, and tells the relay of the sessions that are over.
func (p *poller) unlock() {
	done := p.finished
	p.finished = nil
	p.mu.Unlock()
	for _, s := range done {
		p.relay.sessionEnded(s)
	}
}

// allocateSlot returns a free slot.
func (p *poller) allocateSlot() int32 {
	if n := len(p.freeSlots); n > 0 {
		slotIndex := p.freeSlots[n-1]
		p.freeSlots = p.freeSlots[:n-1]
		return slotIndex
	}
	p.slots = append(p.slots, slot{})
	return int32(len(p.slots) - 1)
}

// freeSlot makes a slot free.
func (p *poller) freeSlot(slotIndex int32) {
	p.slots[slotIndex] = slot{generation: (p.slots[slotIndex].generation + 1) & (1<<30 - 1)}
	p.freeSlots = append(p.freeSlots, slotIndex)
}

// updateEpoll makes epoll watch what s waits for. A change makes epoll look at the
// socket again, so nothing that came before is missed. A side that has ended stays
// watched as it was: that costs a call less, and its edges are over.
func (p *poller) updateEpoll(s *session) {
	for i := clientSide; s.open && i <= backendSide; i++ {
		if s.fd[i] < 0 {
			continue // cut off
		}
		mask, op := uint32(edgeTriggered), syscall.EPOLL_CTL_MOD
		if s.wantsRead(i) || s.fin[i] {
			mask |= epollReadEvents
		}
		if s.unsent[i.other()] != nil {
			mask |= syscall.EPOLLOUT
		}
		if mask == s.epollMask[i] {
			continue
		}
		if s.epollMask[i] == 0 {
			op = syscall.EPOLL_CTL_ADD
		}
		if err := p.epollControl(op, s.slot, i, s.fd[i], mask); err != nil {
			p.end(s, causeRouterError) // out of memory, or of epoll's user watches
		}
		s.epollMask[i] = mask
	}
}

// epollControl is epoll_ctl(2) for a side of what has the slot.
func (p *poller) epollControl(op int, slotIndex int32, i side, fd int32, mask uint32) error {
	event := syscall.EpollEvent{Events: mask, Fd: slotIndex, Pad: p.slots[slotIndex].generation<<1 | int32(i)}
	return syscall.EpollCtl(p.epollFD, op, int(fd), &event)
}

// detachDescriptors returns duplicates of the connections' descriptors, which
// are not in Go's poller, and closes the connections. A descriptor is -1 if it
// could not be had.
func detachDescriptors(conns [2]net.Conn) (fds [2]int32) {
	for i, conn := range conns {
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

// wakeSlot is the slot in the events of a poller's bell, an eventfd(2). Each
// write makes the edge-triggered set tell of itself, also if the last event of
// the bell was not taken yet: EPOLL_CTL_MOD would not.
const wakeSlot = -1

// newWakeDescriptor makes a bell in the epoll set. The caller closes it.
func newWakeDescriptor(epoll int) (int, error) {
	fd, _, errno := syscall.RawSyscall(syscall.SYS_EVENTFD2, 0, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if errno != 0 {
		return -1, os.NewSyscallError("eventfd2", errno)
	}
	event := syscall.EpollEvent{Events: syscall.EPOLLIN | edgeTriggered, Fd: wakeSlot}
	return int(fd), os.NewSyscallError("epoll_ctl", syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, int(fd), &event))
}

// wake makes poll be called again when others had their turn.
func (p *poller) wake() {
	syscall.Write(p.wakeFD, binary.NativeEndian.AppendUint64(nil, 1)) // full after 2^64 of them
}

// addPending gives g a slot.
func (p *poller) addPending(g pollClient) int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	slotIndex := p.allocateSlot()
	p.slots[slotIndex].pending = g
	return slotIndex
}

// removePending takes the slot of a guest that does not become a session.
func (p *poller) removePending(slotIndex int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.freeSlot(slotIndex)
}

// watchPending is control for a guest.
func (p *poller) watchPending(op int, slotIndex int32, i side, fd int32, mask uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.epollControl(op, slotIndex, i, fd, mask)
}

// pendingConns returns all.
func (p *poller) pendingConns() (all []pollClient) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.slots {
		if at.pending != nil {
			all = append(all, at.pending)
		}
	}
	return all
}

// receive reads a guest's socket once, up to limit bytes, at most bufferSize.
func (p *poller) receive(fd int32, limit int) ([]byte, syscall.Errno) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, errno := p.buf.receive(fd, limit)
	for errno == syscall.EINTR { // what is there was told of, and will not be again
		n, errno = p.buf.receive(fd, limit)
	}
	if errno != 0 {
		return nil, errno
	}
	return slices.Clone(p.buf.data[:n]), 0
}

// send writes to a guest's socket once, up to bufferSize bytes.
func (p *poller) send(fd int32, data []byte) (int, syscall.Errno) {
	p.mu.Lock()
	defer p.mu.Unlock()
	size := copy(p.buf.data[:], data)
	for {
		if n, errno := p.buf.send(fd, size, 0); errno != syscall.EINTR {
			return n, errno
		}
	}
}

// startSession is carry for a session that was a guest: mask is what epoll watches of its
// sockets.
func (p *poller) startSession(s *session, slotIndex int32, fds [2]int32, mask [2]uint32, early [2][]byte) {
	s.poller, s.epollMask = p, mask
	p.relay.register(s, func() {
		p.mu.Lock()
		defer p.unlock()
		p.start(s, slotIndex, fds, early)
	})
}

// These are the system calls of the event loop. Sockets are non-blocking here, so
// no call waits, and the scheduler need not know of it: they are syscall.Read and
// its like without what the runtime does around them. That is little by itself,
// but it wakes the runtime's monitor (sysmon), which then looks every 20 µs and
// takes the CPU from whoever is within a call. With few messages on many
// sessions, that was half of all CPU time.
//
// Such calls take addresses. Those here are of pinned memory, which the garbage
// collector neither moves nor frees (runtime.Pinner). Linux on 386, which has one
// call for all of sockets, gets relay_portable.go.

const (
	bufferSize     = 64 << 10 // bytes, of a buffer, and of what a pipe is given at most
	maxEpollEvents = 256      // taken from epoll at once
	maxPipes       = 16       // of one poller
)

// buffer is the memory that one poller's system calls read and write.
type buffer struct {
	data   [bufferSize]byte
	events [maxEpollEvents]syscall.EpollEvent

	// Static after construction.
	pin              runtime.Pinner
	dataAt, eventsAt uintptr // the addresses
}

// newBuffer returns a buffer. The caller frees it.
func newBuffer() *buffer {
	b := new(buffer)
	b.pin.Pin(b)
	b.dataAt = reflect.ValueOf(b.data[:]).Pointer()
	b.eventsAt = reflect.ValueOf(b.events[:]).Pointer()
	return b
}

func (b *buffer) free() { b.pin.Unpin() }

// wait takes up to limit events from the epoll set, at most maxEpollEvents, of those
// that are there (epoll_pwait(2)).
func (b *buffer) wait(epoll, limit int) ([]syscall.EpollEvent, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(epoll), b.eventsAt, uintptr(limit), 0, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	return b.events[:n], 0
}

// receive reads up to limit bytes from the socket into data (recv(2)).
func (b *buffer) receive(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), b.dataAt, uintptr(limit), 0, 0, 0)
	return int(n), errno
}

// peek is receive, but what it reads stays with the socket.
func (b *buffer) peek(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), b.dataAt, uintptr(limit), syscall.MSG_PEEK, 0, 0)
	return int(n), errno
}

// send writes the first size bytes of data to the socket (send(2)). flags are
// MSG_MORE or none.
func (b *buffer) send(fd int32, size, flags int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), b.dataAt, uintptr(size), uintptr(flags|syscall.MSG_NOSIGNAL), 0, 0)
	return int(n), errno
}

// pipe carries bytes from socket to socket within the kernel (splice(2)).
type pipe struct {
	ends   [2]int // to read from, to write to
	queued int    // bytes in it
}

// newPipe returns nil if there are no descriptors left. The caller closes it.
func newPipe() *pipe {
	p := new(pipe)
	if syscall.Pipe2(p.ends[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		return nil
	}
	return p
}

func (p *pipe) close() {
	syscall.Close(p.ends[0])
	syscall.Close(p.ends[1])
}

const (
	spliceMove     = 1 // SPLICE_F_MOVE
	spliceNonblock = 2 // SPLICE_F_NONBLOCK
)

// receive moves up to limit bytes from the socket into the pipe, which is empty.
func (p *pipe) receive(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, uintptr(fd), 0, uintptr(p.ends[1]), 0, uintptr(limit), spliceMove|spliceNonblock)
	if errno == 0 {
		p.queued = int(n)
	}
	return int(n), errno
}

// send moves what is in the pipe to the socket.
func (p *pipe) send(fd int32) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, uintptr(p.ends[0]), 0, uintptr(fd), 0, uintptr(p.queued), spliceMove|spliceNonblock)
	if errno == 0 {
		p.queued -= int(n)
	}
	return int(n), errno
}

// pipes are the empty pipes of a poller, and how many it has made.
type pipes struct {
	empty []*pipe
	made  int
}

// get returns a pipe, or nil if the most are in use or no more can be made.
func (p *pipes) get() *pipe {
	if last := len(p.empty) - 1; last >= 0 {
		found := p.empty[last]
		p.empty = p.empty[:last]
		return found
	}
	if p.made == maxPipes {
		return nil
	}
	made := newPipe()
	if made != nil {
		p.made++
	}
	return made
}

// put takes a pipe back. One that is not empty is of no use any more.
func (p *pipes) put(used *pipe) {
	if used.queued == 0 {
		p.empty = append(p.empty, used)
		return
	}
	used.close()
	p.made--
}

// close closes the pipes that are not in use.
func (p *pipes) close() {
	for _, empty := range p.empty {
		empty.close()
	}
}
