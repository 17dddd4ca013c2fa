package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// listen opens the address of -listen, -admin or -redirect: host:port, or unix:/path for
// a socket with mode 0660. A socket that a router left behind when it was killed
// is replaced, one that is listened on is not. A client that is silent to TCP for
// userTimeout is given up. The caller closes the listener, which removes the
// socket.
func listen(addr string, userTimeout time.Duration) (net.Listener, error) {
	path, unix := strings.CutPrefix(addr, "unix:")
	if !unix {
		control, keepAlive := tcpTimeoutOptions(userTimeout)
		tcp := net.ListenConfig{Control: control, KeepAlive: -1, KeepAliveConfig: keepAlive}
		tcp.SetMultipathTCP(false) // Go's default, which has no TCP_USER_TIMEOUT
		return tcp.Listen(context.Background(), "tcp", addr)
	}
	if err := removeStaleSocket(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// removeStaleSocket removes the socket at path if nobody listens on it, which only
// ECONNREFUSED says (unix(7)): a listener whose backlog is full answers EAGAIN, one
// that this process may not connect to EACCES. Anything else there is an error.
func removeStaleSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen unix:%s: the file exists and is not a socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return fmt.Errorf("listen unix:%s: another process listens there", path)
	case errors.Is(err, fs.ErrNotExist): // removed meanwhile
		return nil
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	}
	return fmt.Errorf("listen unix:%s: another process may listen there: %w", path, err)
}

// newDialer returns a dialer of TCP, whose connections give up a peer that is
// silent for userTimeout.
func newDialer(userTimeout time.Duration) net.Dialer {
	control, keepAlive := tcpTimeoutOptions(userTimeout)
	return net.Dialer{Control: control, KeepAlive: -1, KeepAliveConfig: keepAlive}
}

// keepAliveTimes returns when TCP asks a silent peer whether it is there, in whole
// seconds as TCP has it: after idle, half of timeout, then every interval, a
// quarter. One of these times is timeout, which is when TCP gives up.
func keepAliveTimes(timeout time.Duration) (idle, interval time.Duration) {
	interval = max(timeout/4, time.Second).Truncate(time.Second)
	return max(timeout-2*interval, time.Second), interval
}

// How long accept waits after it has failed: the first time, and at most. It waits twice
// as long each time.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = time.Second
)

// acceptRetry decides what follows a failed accept of a listener: another one, after a
// pause, until the router closes the listener. accept(2) has no complete list of its
// errors, and none of them is a reason to stop: memory, descriptors and interfaces come
// back.
type acceptRetry struct {
	// Static after construction.
	flag     string // of the listener, for the log
	log      *slog.Logger
	lifetime context.Context // ends with close
	close    func()          // called before the listener is closed

	logThrottle throttle

	failures int // in a row; owned by the goroutine that accepts
}

// newAcceptRetry returns the rule for the listener of the flag.
func newAcceptRetry(flag string, log *slog.Logger) *acceptRetry {
	a := &acceptRetry{flag: flag, log: log}
	a.lifetime, a.close = context.WithCancel(context.Background())
	return a
}

// succeeded is called after an accept without an error.
func (a *acceptRetry) succeeded() { a.failures = 0 }

// shouldRetry is called with the error of an accept. It reports whether to accept once more:
// the router has not closed the listener. Before that it waits and logs, no more than a line a
// second.
func (a *acceptRetry) shouldRetry(err error) bool {
	switch {
	case a.lifetime.Err() != nil || errors.Is(err, net.ErrClosed): // whatever the error: that of a file is not exported
		return false
	case errors.Is(err, syscall.ECONNABORTED): // the client is gone (accept(2)); package net goes on too
		return true
	}
	if omitted, ok := a.logThrottle.allow(time.Second); ok {
		a.log.Warn("cannot accept connections", "listener", a.flag, "error", err.Error(), "omitted", omitted)
	}
	a.failures++
	return sleep(a.lifetime, backoff{minAcceptBackoff, maxAcceptBackoff}.delay(a.failures)) == nil
}

// retryListener is a listener whose Accept fails only once it is closed. One
// goroutine may accept.
type retryListener struct {
	net.Listener
	retry *acceptRetry
}

func (l retryListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err == nil {
			l.retry.succeeded()
			return conn, nil
		}
		if !l.retry.shouldRetry(err) {
			return nil, err
		}
	}
}

func (l retryListener) Close() error {
	l.retry.close()
	return l.Listener.Close()
}

// limitListener keeps at most maxConns connections open. When one more comes, it closes another
// one, the first of these that there is:
//
//   - of those that have had an answer and have no request now, the one that has had it for
//     longest;
//   - of those that have sent no request for silentTime, the oldest;
//   - of all, the one that was accepted, or whose request began, first.
//
// So a new connection always gets in, whatever others keep open, and however fast they ask.
type limitListener struct {
	net.Listener
	maxConns int

	mu    sync.Mutex
	conns []*limitConn // by since. Guarded by mu.
}

// limitConn is a connection of a limitListener.
type limitConn struct {
	net.Conn
	listener *limitListener

	// Guarded by listener.mu.
	busy   bool      // a request is being answered
	served bool      // it had a request
	since  time.Time // when it was accepted, or its last request began or ended
}

// evictionGrace is for how long a connection without an answer need not make room: long
// enough to have its request read and answered, also while somebody opens connections
// without end. One that had an answer has none: requests one after the other would
// keep everybody out.
const evictionGrace = 5 * time.Millisecond

// silentTime is how long a new connection may send no request before it makes room for
// others that are older and busy: a client on a busy machine needs its time.
const silentTime = 200 * time.Millisecond

// Accept returns the next connection. One goroutine may call it: then there is
// never more than one connection above the bound, which waits for room.
func (l *limitListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &limitConn{Conn: conn, listener: l}
	evicted, wait := l.add(c)
	for wait > 0 {
		time.Sleep(wait)
		evicted, wait = l.add(c)
	}
	if evicted != nil {
		evicted.Conn.Close()
	}
	return c, nil
}

// add takes note of c, and returns the connection that has to make room for it, nil
// for none. If there is a time to wait, c is to be added again after it.
func (l *limitListener) add(c *limitConn) (evicted *limitConn, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.conns) >= l.maxConns {
		at := l.evictionIndex()
		evicted = l.conns[at]
		if wait = evictionGrace - time.Since(evicted.since); wait > 0 && (evicted.busy || !evicted.served) {
			return nil, wait
		}
		l.conns = slices.Delete(l.conns, at, at+1)
	}
	c.since = time.Now()
	l.conns = append(l.conns, c)
	return evicted, 0
}

// evictionIndex returns which connection has to make room next. mu is held.
func (l *limitListener) evictionIndex() int {
	idle := func(c *limitConn) bool { return !c.busy && c.served }
	if at := slices.IndexFunc(l.conns, idle); at >= 0 {
		return at
	}
	silent := func(c *limitConn) bool { return !c.busy && time.Since(c.since) > silentTime }
	return max(0, slices.IndexFunc(l.conns, silent))
}

// noteConnState is the http.Server.ConnState of a limitListener's server. A connection
// is busy from the end of a request's head until its answer is sent.
func noteConnState(conn net.Conn, state http.ConnState) {
	if c, ok := conn.(*limitConn); ok && (state == http.StateActive || state == http.StateIdle) {
		c.setBusy(state == http.StateActive)
	}
}

// setBusy says that a request of c begins or ends.
func (c *limitConn) setBusy(busy bool) {
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy, c.served, c.since = busy, true, time.Now()
	if at := slices.Index(l.conns, c); at >= 0 { // else it has made room
		l.conns = append(slices.Delete(l.conns, at, at+1), c)
	}
}

func (c *limitConn) Close() error {
	l := c.listener
	l.mu.Lock()
	l.conns = slices.DeleteFunc(l.conns, func(other *limitConn) bool { return other == c })
	l.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite is what net/http looks for to let the client read an answer to a
// request that was not read to its end (golang/go#3595).
func (c *limitConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn, *net.UnixConn or, with -redirect, *clientConn
}
