//go:build !portable && !386

package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	epollReadEvents = syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLPRI

	edgeTriggered = 1 << 31 // EPOLLET, which package syscall has as a negative number
	maskStale     = 1 << 27 // in sessionIO.epollMask: makes updateEpoll set the mask again
)

// descriptorsPerPoller is the largest number of file descriptors that the poller of a
// CPU has for itself: its epoll set, its wake descriptor and its pipes.
const descriptorsPerPoller = 2 + 2*maxPipes

// engine carries the sessions by pollers, one for each CPU.
type engine struct {
	pollers      []*poller
	next         atomic.Uint32 // the poller of the next client or session, modulo their number
	running      sync.WaitGroup
	unsentBudget int64                    // maxUnsent; static after start
	unsentBytes  atomic.Int64             // bytes of all buffers and pipes in unsentData
	pools        [unsentClasses]sync.Pool // of *unsentData, by class
}

// poller carries the sessions of one epoll set.
type poller struct {
	// Static after construction.
	relay     *relay
	epollFile *os.File // the epoll set
	epollFD   int      // its descriptor
	wakeFD    int      // an eventfd in the set

	// Guarded by mu.
	mu         sync.Mutex
	buf        *buffer        // run owns buf.events
	tlsBuffers *recordBuffers // nil if clients come without TLS
	pipes      pipes
	slots      []slot
	freeSlots  []int32    // indexes of free slots
	ended      []*session // that are over; unlockAndReport reports them to the relay
}

// slot has what an event is for: a session, or a client that has none yet.
type slot struct {
	session    *session // nil if the slot is free, or a socketUser's
	user       socketUser
	generation int32 // how often the slot was freed: an event with another one is stale
}

// socketUser has two sockets that the poller watches, and that may become a session's.
type socketUser interface {
	// handleEvent is called with the events of a side. The poller's mu is held.
	handleEvent(i side, events uint32)
	// handleStop is called when the router stops. The poller's mu is held.
	handleStop()
}

// sockets are those of a socketUser. They are guarded by the poller's mu.
type sockets struct {
	fd          [2]int32  // -1: none
	epollMask   [2]uint32 // what epoll watches; 0: the socket is not in the set yet
	events      [2]uint32 // that came since the side was read
	mayHaveMore [2]bool   // the socket may have more bytes or an end, which the session has to read
}

// start makes and runs one poller for each CPU. If it fails, it has stopped them again.
func (e *engine) start(r *relay) error {
	e.unsentBudget = maxUnsent
	for range runtime.GOMAXPROCS(0) {
		fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
		if err != nil {
			e.stop()
			return os.NewSyscallError("epoll_create1", err)
		}
		syscall.SetNonblock(fd, true) // so that os.NewFile adds it to Go's poller
		file := os.NewFile(uintptr(fd), "epoll")
		p := &poller{relay: r, epollFile: file, epollFD: fd, buf: newBuffer()}
		if r.clientTLS {
			p.tlsBuffers = newRecordBuffers()
		}
		e.pollers = append(e.pollers, p)
		if p.wakeFD, err = newWakeDescriptor(fd); err == nil {
			err = file.SetDeadline(time.Time{}) // fails if it is not in Go's poller
		}
		if err != nil {
			e.stop()
			return fmt.Errorf("poll an epoll set: %w", err)
		}
		e.running.Go(p.run)
	}
	return nil
}

// stop stops the pollers and closes their descriptors. All sessions have ended before.
func (e *engine) stop() {
	for _, p := range e.pollers {
		p.epollFile.Close()
	}
	e.running.Wait()
	for _, p := range e.pollers {
		syscall.Close(p.wakeFD)
		p.pipes.close()
		p.buf.free()
		p.tlsBuffers.free()
	}
}

// nextPoller returns the poller of the next client or session.
func (e *engine) nextPoller() *poller {
	return e.pollers[e.next.Add(1)%uint32(len(e.pollers))]
}

// assign chooses the poller of s. From then on s.end and s.closeGracefully may be
// called.
func (e *engine) assign(s *session, _ [2]net.Conn) { s.poller = e.nextPoller() }

// carry detaches the sockets of s from package net, and gives them and early to
// its poller.
func (e *engine) carry(s *session, conns [2]net.Conn, early [2][]byte) {
	p := s.poller
	client, tls := unwrapTLS(conns[clientSide])
	fds := [2]int32{takeDescriptor(client), takeDescriptor(conns[backendSide])}
	p.mu.Lock()
	defer p.unlockAndReport()
	p.setTLS(s, tls)
	p.carry(s, p.allocateSlot(), fds, early)
}

// carry gives s its slot and sockets, and sends early, which came from each side
// before. It ends s if a socket is missing or s was ended before. The caller holds
// mu.
func (p *poller) carry(s *session, slotIndex int32, fds [2]int32, early [2][]byte) {
	p.slots[slotIndex].session, p.slots[slotIndex].user = s, nil
	s.slot, s.fd, s.open = slotIndex, fds, true
	switch {
	case min(fds[clientSide], fds[backendSide]) < 0:
		p.end(s, causeRouterError)
	case s.isEnding() && s.closing == nil:
		p.end(s, causeNone)
	default:
		for i, data := range early {
			s.scanners[i].scan(data, side(i) == clientSide)
			p.sendOrKeep(s, side(i), copy(p.buf.data[:], data))
		}
		if s.tls != nil && s.open {
			p.decryptRecords(s) // an end that has come; takeBuffered has taken the bytes
		}
		s.startClose()
		p.updateEpoll(s)
	}
}

// run handles events until the epoll set is closed. Go's poller makes it call poll when
// an event came to the set after the last call of poll began.
func (p *poller) run() {
	raw, err := p.epollFile.SyscallConn()
	if err != nil {
		panic(err) // only for a file that is nil
	}
	raw.Read(func(uintptr) bool { // it returns an error when the set is closed
		p.poll()
		return false
	})
}

// poll handles the events of the epoll set, up to maxEpollEvents. After a batch of
// several it asks epoll for more, which costs less than a wake-up by Go's poller. After
// a single event there is mostly nothing more. If it has reached its limit, it calls
// wake and returns. If it just went on, it would keep its CPU: the runtime looks for
// other ready goroutines only when it has nothing to run.
//
// Each event in a set that is in Go's poller costs its sender 0.1 µs. A busy poller
// could take its set out of there, but EPOLL_CTL_ADD of a set checks all its sockets.
func (p *poller) poll() {
	for left := maxEpollEvents; left > 0; {
		events, errno := p.buf.wait(p.epollFD, left)
		if len(events) == 0 && errno == 0 {
			return
		}
		for _, event := range events {
			p.handleEvent(event)
		}
		if len(events) == 1 && left > 1 {
			return // what comes later makes Go's poller call poll again
		}
		left -= max(len(events), 1) // 1: EINTR
	}
	p.wake()
}

// handleEvent handles one event: Fd has its slot, Pad the slot's generation and the
// side.
func (p *poller) handleEvent(event syscall.EpollEvent) {
	if event.Fd == wakeSlot {
		return
	}
	i := side(event.Pad & 1)
	p.mu.Lock() // for each event, so that carry and end do not wait for a whole batch
	defer p.unlockAndReport()
	switch target := p.slots[event.Fd]; {
	case target.generation != event.Pad>>1: // the event is stale: the slot was freed since
	case target.session != nil:
		p.handle(target.session, i, event.Events)
	case target.user != nil:
		target.user.handleEvent(i, event.Events)
	}
}

// unlockAndReport unlocks mu, and calls sessionEnded for the sessions that are over.
func (p *poller) unlockAndReport() {
	ended := p.ended
	p.ended = nil
	p.mu.Unlock()
	for _, s := range ended {
		p.relay.sessionEnded(s)
	}
}

// allocateSlot returns the index of a free slot. The caller holds mu.
func (p *poller) allocateSlot() int32 {
	if n := len(p.freeSlots); n > 0 {
		slotIndex := p.freeSlots[n-1]
		p.freeSlots = p.freeSlots[:n-1]
		return slotIndex
	}
	p.slots = append(p.slots, slot{})
	return int32(len(p.slots) - 1)
}

// freeSlot frees a slot. The caller holds mu.
func (p *poller) freeSlot(slotIndex int32) {
	p.slots[slotIndex] = slot{generation: (p.slots[slotIndex].generation + 1) & (1<<30 - 1)}
	p.freeSlots = append(p.freeSlots, slotIndex)
}

// addSocketUser gives u a slot.
func (p *poller) addSocketUser(u socketUser) int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	slotIndex := p.allocateSlot()
	p.slots[slotIndex].user = u
	return slotIndex
}

// stopSocketUsers calls handleStop of all socketUsers.
func (p *poller) stopSocketUsers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.slots {
		if at.user != nil {
			at.user.handleStop()
		}
	}
}

// removeSocketUser takes the sockets of a socketUser that does not become a session out of the
// set, and frees its slot. It leaves the sockets open.
func (p *poller) removeSocketUser(slotIndex int32, from *sockets) {
	p.unwatchSocket(from, clientSide)
	p.unwatchSocket(from, backendSide)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.freeSlot(slotIndex)
}

// unwatchSocket takes the socket of a side out of the set: else it is watched while a
// duplicate is open.
func (p *poller) unwatchSocket(from *sockets, i side) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if from.epollMask[i] != 0 {
		syscall.EpollCtl(p.epollFD, syscall.EPOLL_CTL_DEL, int(from.fd[i]), nil)
		from.epollMask[i] = 0
	}
}

// promote registers s and carries it on the sockets of a socketUser, whose slot it gets. tls
// is its client's, or nil.
func (p *poller) promote(
	s *session, slotIndex int32, from *sockets, tls *tlsConn, early [2][]byte,
) {
	s.poller = p
	p.relay.register(s)
	p.relay.freeDescriptors(1) // it needs no duplicate any more
	p.mu.Lock()
	defer p.unlockAndReport()
	s.epollMask = from.epollMask
	for i, events := range from.events {
		// Reads of a client with TLS are as short as crypto/tls wants.
		mayHaveMore := from.mayHaveMore[i] || tls != nil && side(i) == clientSide
		if s.epollMask[i] != 0 && (events != 0 || mayHaveMore) {
			s.epollMask[i] |= maskStale
		}
	}
	p.setTLS(s, tls)
	p.carry(s, slotIndex, from.fd, early)
}

// send writes to the socket once, up to bufferSize bytes of data, through the poller's buffer.
// It returns how many the socket has taken, or the error, which is never EINTR. mu is held.
func (p *poller) send(fd int32, data []byte) (int, syscall.Errno) {
	size := copy(p.buf.data[:], data)
	for {
		if n, errno := p.buf.send(fd, size); errno != syscall.EINTR {
			return n, errno
		}
	}
}

// updateEpoll makes epoll watch for the events that s waits for. If the mask of a
// socket changes, epoll checks the socket again, so no earlier event is missed. The
// mask of a side that has ended does not change: no more events come, and it saves
// a system call. The caller holds mu.
func (p *poller) updateEpoll(s *session) {
	for i := clientSide; s.open && i <= backendSide; i++ {
		if s.fd[i] < 0 {
			continue // reset
		}
		mask := uint32(0)
		if s.wantsRead(i) || s.fin[i] {
			mask |= epollReadEvents
		}
		if s.unsent[i.other()] != nil {
			mask |= syscall.EPOLLOUT
		}
		if err := p.watch(s.slot, i, s.fd[i], &s.epollMask[i], mask); err != nil {
			p.end(s, causeRouterError) // no memory, or max_user_watches (epoll(7))
		}
	}
}

// watch makes epoll watch the socket fd for the events in mask. It is side i of the
// session or the socketUser in the slot, whose epollMask for it is watched. The caller holds
// mu.
func (p *poller) watch(slotIndex int32, i side, fd int32, watched *uint32, mask uint32) error {
	op := syscall.EPOLL_CTL_MOD
	if *watched == 0 {
		op = syscall.EPOLL_CTL_ADD
	}
	if mask |= edgeTriggered; mask == *watched {
		return nil
	}
	pad := p.slots[slotIndex].generation<<1 | int32(i)
	event := syscall.EpollEvent{Events: mask, Fd: slotIndex, Pad: pad}
	err := syscall.EpollCtl(p.epollFD, op, int(fd), &event)
	if err == nil {
		*watched = mask
	}
	return err
}

// takeDescriptor returns a duplicate of the connection's descriptor, which is not in
// Go's poller, and closes the connection. The caller closes the descriptor. It is -1 if
// fcntl(2) failed.
func takeDescriptor(conn net.Conn) int32 {
	taken := int32(-1)
	raw, _ := conn.(syscall.Conn).SyscallConn() // fails only for a nil conn
	raw.Control(func(fd uintptr) {              // fails only for a closed conn
		n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
		if errno == 0 {
			taken = int32(n)
		}
	})
	conn.Close()
	return taken
}

// wakeSlot is the slot in the events of a poller's wake descriptor, an eventfd(2). Each
// write to it makes the edge-triggered set report itself to Go's poller, even if nobody
// has taken the descriptor's last event yet. EPOLL_CTL_MOD would not do that.
const wakeSlot = -1

// newWakeDescriptor makes a wake descriptor and adds it to the epoll set. The caller
// closes it.
func newWakeDescriptor(epoll int) (int, error) {
	const flags = syscall.O_CLOEXEC | syscall.O_NONBLOCK
	fd, _, errno := syscall.RawSyscall(syscall.SYS_EVENTFD2, 0, flags, 0)
	if errno != 0 {
		return -1, os.NewSyscallError("eventfd2", errno)
	}
	event := syscall.EpollEvent{Events: syscall.EPOLLIN | edgeTriggered, Fd: wakeSlot}
	err := syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, int(fd), &event)
	return int(fd), os.NewSyscallError("epoll_ctl", err)
}

// wake makes run call poll again after other goroutines had their turn.
func (p *poller) wake() {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	syscall.Write(p.wakeFD, one) // an eventfd is full after 2^64-2
}

// These are the system calls of the event loop. Its sockets are non-blocking, so no
// call waits, and the Go scheduler need not know about them. They do the same as
// syscall.Read and the like, but without the runtime's work around a call. That work
// is small, but it wakes the runtime's monitor (sysmon), which then runs every 20 µs
// and takes the CPU from goroutines that are within a system call. With few messages
// on many sessions, that was half of all CPU time.
//
// Such calls need addresses. Those here are of pinned memory, which the garbage
// collector neither moves nor frees (runtime.Pinner). Linux on 386 has one system call
// for all socket operations, so it uses relay_portable.go.

const (
	bufferSize     = 64 << 10  // bytes of a buffer
	pipeSize       = 128 << 10 // bytes of a pipe: a frame with 64 KiB of payload fits in
	maxEpollEvents = 256       // handled in one call of poll
	maxPipes       = 16        // of one poller
)

// buffer is the memory that one poller's system calls read and write.
type buffer struct {
	data   [bufferSize]byte
	events [maxEpollEvents]syscall.EpollEvent

	// Static after construction.
	pin              runtime.Pinner
	dataAt, eventsAt uintptr // the addresses of data and events
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

// wait takes up to limit events, at most maxEpollEvents, from the epoll set. It
// does not wait for new ones (epoll_pwait(2) with a timeout of 0).
func (b *buffer) wait(epoll, limit int) ([]syscall.EpollEvent, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT,
		uintptr(epoll), b.eventsAt, uintptr(limit), 0, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	return b.events[:n], 0
}

// receive reads up to limit bytes from the socket into data (recv(2)).
func (b *buffer) receive(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM,
		uintptr(fd), b.dataAt, uintptr(limit), 0, 0, 0)
	return int(n), errno
}

// peek is like receive, but leaves the bytes in the socket.
func (b *buffer) peek(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM,
		uintptr(fd), b.dataAt, uintptr(limit), syscall.MSG_PEEK, 0, 0)
	return int(n), errno
}

// send writes the first size bytes of data to the socket (send(2)).
func (b *buffer) send(fd int32, size int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO,
		uintptr(fd), b.dataAt, uintptr(size), syscall.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

// pipe carries bytes from socket to socket within the kernel (splice(2)).
type pipe struct {
	ends   [2]int // to read from, to write to
	size   int    // bytes that it holds, at most
	queued int    // bytes in it
}

// newPipe returns a pipe, which the caller closes, or nil if no descriptors are left.
func newPipe() *pipe {
	p := &pipe{size: bufferSize} // the kernel's default
	if syscall.Pipe2(p.ends[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		return nil
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(p.ends[0]), setPipeSize, pipeSize); errno == 0 {
		p.size = pipeSize
	}
	return p
}

func (p *pipe) close() {
	syscall.Close(p.ends[0])
	syscall.Close(p.ends[1])
}

const (
	setPipeSize    = 1031 // F_SETPIPE_SZ
	spliceMove     = 1    // SPLICE_F_MOVE
	spliceNonblock = 2    // SPLICE_F_NONBLOCK
)

// receive moves up to limit bytes from the socket into the pipe, which is empty.
func (p *pipe) receive(fd int32, limit int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE,
		uintptr(fd), 0, uintptr(p.ends[1]), 0, uintptr(limit), spliceMove|spliceNonblock)
	if errno == 0 {
		p.queued = int(n)
	}
	return int(n), errno
}

// send moves the pipe's bytes to the socket, as many as it takes.
func (p *pipe) send(fd int32) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE,
		uintptr(p.ends[0]), 0, uintptr(fd), 0, uintptr(p.queued), spliceMove|spliceNonblock)
	if errno == 0 {
		p.queued -= int(n)
	}
	return int(n), errno
}

// pipes holds the empty pipes of a poller.
type pipes struct {
	empty []*pipe
	made  int // pipes that are not closed: empty or in use
}

// get returns an empty pipe, or nil if maxPipes are in use or none can be made.
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

// put takes a pipe back. It closes the pipe if it still has bytes: those are dropped.
func (p *pipes) put(used *pipe) {
	if used.queued == 0 {
		p.empty = append(p.empty, used)
		return
	}
	used.close()
	p.made--
}

// close closes the empty pipes.
func (p *pipes) close() {
	for _, empty := range p.empty {
		empty.close()
	}
}
