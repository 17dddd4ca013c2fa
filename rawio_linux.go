//go:build !portable && !386

package main

import (
	"reflect"
	"runtime"
	"syscall"
)

// This file has the system calls of the relay. Sockets are non-blocking here, so
// no call waits, and the scheduler need not know of it: they are syscall.Read and
// its like without what the runtime does around them. That is little by itself,
// but it wakes the runtime's monitor (sysmon), which then looks every 20 µs and
// takes the CPU from whoever is within a call. With few messages on many
// sessions, that was half of all CPU time.
//
// Such calls take addresses. Those here are of pinned memory, which the garbage
// collector neither moves nor frees (runtime.Pinner). Linux on 386, which has one
// call for all of sockets, gets relay_other.go.

const (
	bufferSize = 64 << 10 // bytes, of a buffer, and of what a pipe is given at most
	eventsSize = 256      // taken from epoll at once
	pipesMost  = 16       // of one poller
)

// buffer is the memory that one poller's system calls read and write.
type buffer struct {
	data   [bufferSize]byte
	events [eventsSize]syscall.EpollEvent

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

// wait takes up to limit events from the epoll set, at most eventsSize, of those
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
	ends [2]int // to read from, to write to
	full int    // bytes in it
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
		p.full = int(n)
	}
	return int(n), errno
}

// send moves what is in the pipe to the socket.
func (p *pipe) send(fd int32) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, uintptr(p.ends[0]), 0, uintptr(fd), 0, uintptr(p.full), spliceMove|spliceNonblock)
	if errno == 0 {
		p.full -= int(n)
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
	if p.made == pipesMost {
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
	if used.full == 0 {
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
