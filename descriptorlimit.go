package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
)

// Descriptors that are not for clients, whatever their number.
const (
	processDescriptors  = 44 // the log, the listeners, Go's poller, the API server
	maxAdminConns       = 96 // connections to the admin port
	maxAdminDials       = 24 // connections to backends that answers of the admin port make
	maxPeerConns        = 16 // connections to the admin ports of other routers
	reservedDescriptors = processDescriptors + maxAdminConns + maxAdminDials + maxPeerConns
)

// descriptorsPerBackend is how many descriptors each backend needs beside its sessions:
// two for its lookup, and two for the connections of a releaser.
const descriptorsPerBackend = 4

// internalDescriptors is how many descriptors are not for clients: those reserved, those
// for each backend, and what the relay has for itself.
func internalDescriptors(backends int) int {
	return reservedDescriptors + descriptorsPerBackend*backends + descriptorsPerPoller*runtime.GOMAXPROCS(0)
}

// descriptorsPerClient is how many a client may need until it is a session: its
// own, the backend's, and a duplicate of either while the relay takes them over.
const descriptorsPerClient = 3

// descriptorsForOthers is how many descriptors clients may have beside those of all
// sessions and pending requests: those of -redirect, and connections to owners for plain
// requests.
const descriptorsForOthers = 1024

// descriptorLimit keeps clients waiting, in the backlog of the kernel, while the process
// has no descriptors for them, or while there are so many connections without a session
// that more could take the memory that -max-sessions sessions may need.
type descriptorLimit struct {
	maxFiles int // that the process may open; static
	maxLimit int // of limit, whatever maxFiles is; static after construction

	// Guarded by mu.
	mu      sync.Mutex
	limit   int // of used
	used    int // descriptors of clients
	closed  bool
	changed sync.Cond // used, limit or closed has changed
}

// newDescriptorLimit returns the limit of a process that may open this many files, with
// this many backends, and at most this many sessions and pending requests. The numbers of
// backends and sessions are not checked.
func newDescriptorLimit(files, backends, sessions, pending int) (*descriptorLimit, error) {
	if least := internalDescriptors(backends) + descriptorsPerClient; files < least {
		return nil, fmt.Errorf("the limit of open files must be at least %d (got %d; ulimit -n)", least, files)
	}
	// No more than files of each, so that a flag of any size does not overflow.
	needed := descriptorsPerSession*min(sessions, files) + descriptorsPerClient*min(pending, files)
	l := &descriptorLimit{maxFiles: files, maxLimit: needed + descriptorsForOthers}
	l.changed.L = &l.mu
	l.setBackends(backends)
	return l, nil
}

// setBackends sets how many descriptors clients may have with this many backends: at
// least the descriptors of one client.
func (l *descriptorLimit) setBackends(backends int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = max(descriptorsPerClient, min(l.maxLimit, l.maxFiles-internalDescriptors(backends)))
	l.changed.Signal()
}

// moreSessions is how many sessions there can be beside what is used now.
func (l *descriptorLimit) moreSessions() int {
	used, limit, _ := l.usage()
	left := limit - used - descriptorsPerClient
	if left < 0 {
		return 0
	}
	return left/descriptorsPerSession + 1
}

// wait returns when there is room for one more client, or net.ErrClosed.
func (l *descriptorLimit) wait() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.used+descriptorsPerClient > l.limit && !l.closed {
		l.changed.Wait()
	}
	if l.closed {
		return net.ErrClosed
	}
	return nil
}

// add counts n descriptors more, or -n fewer, as used.
func (l *descriptorLimit) add(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.used += n
	l.changed.Signal()
}

// usage returns how many descriptors are used, how many may be, and whether
// clients wait for room.
func (l *descriptorLimit) usage() (used, limit int, full bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.used, l.limit, l.used+descriptorsPerClient > l.limit
}

// writeMetrics writes how many descriptors clients use, whether some wait for one, and
// those of the whole process.
func (l *descriptorLimit) writeMetrics(m metricsWriter) {
	used, limit, full := l.usage()
	m.single("router_client_descriptors", "gauge", "File descriptors that clients and their sessions have or may need.", float64(used))
	m.single("router_client_descriptors_limit", "gauge", "File descriptors that clients and their sessions may have.", float64(limit))
	m.single("router_accept_paused", "gauge", "1 while the router accepts no clients: too few descriptors are left, or too many clients have no session.", boolToFloat(full))
	if open, ok := openDescriptors(); ok {
		m.single("process_open_fds", "gauge", "Open file descriptors.", float64(open))
	}
	m.single("process_max_fds", "gauge", "File descriptors that the process may open.", float64(l.maxFiles))
}

// openDescriptors returns how many file descriptors the process has open. ok is false on
// systems without proc(5), and while the process cannot open one more.
func openDescriptors() (n int, ok bool) {
	folder, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, false
	}
	defer folder.Close()
	names, err := folder.Readdirnames(-1)
	return len(names) - 1, err == nil // without that of folder
}

// close ends wait.
func (l *descriptorLimit) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.changed.Signal()
}
