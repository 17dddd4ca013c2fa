package main

import (
	"syscall"
	"unsafe"
)

// Read, write and epoll_wait of descriptors that do not block, without telling
// Go's scheduler, which package syscall does. The load has one thread: were it
// told, the scheduler would take what was interrupted in a call for blocked there,
// and start another.

func rawRead(fd int, p []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		0, 0, 0)
	return int(n), errno
}

// rawWrite gives no SIGPIPE.
func rawWrite(fd int, p []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		syscall.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

// rawPoll returns the events that are there.
func rawPoll(epoll int, events []syscall.EpollEvent) []syscall.EpollEvent {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))),
		uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return nil
	}
	return events[:n]
}

// rawClock reads a CPU clock (clock_gettime(2)), which package syscall cannot.
func rawClock(clock uintptr) (now syscall.Timespec, errno syscall.Errno) {
	_, _, errno = syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&now)), 0)
	return now, errno
}
