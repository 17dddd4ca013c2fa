package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// listen opens the address of -listen or -admin: host:port, or unix:/path for a
// socket with mode 0660. A socket that a router left behind when it was killed
// is replaced, one that is listened on is not. A client that is silent to TCP for
// peerTimeout is given up. The caller closes the listener, which removes the
// socket.
func listen(addr string, peerTimeout time.Duration) (net.Listener, error) {
	path, unix := strings.CutPrefix(addr, "unix:")
	if !unix {
		control, keepAlive := boundPeer(peerTimeout)
		tcp := net.ListenConfig{Control: control, KeepAlive: -1, KeepAliveConfig: keepAlive}
		tcp.SetMultipathTCP(false) // Go's default, which has no TCP_USER_TIMEOUT
		return tcp.Listen(context.Background(), "tcp", addr)
	}
	if err := removeStale(path); err != nil {
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

// removeStale removes the socket at path if nobody listens on it, which only
// ECONNREFUSED says (unix(7)): a listener whose backlog is full answers EAGAIN, one
// that this process may not connect to EACCES. Anything else there is an error.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen unix:%s: the file is there and is no socket", path)
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

// boundDialer returns a dialer of TCP, whose connections give up a peer that is
// silent for peerTimeout.
func boundDialer(peerTimeout time.Duration) net.Dialer {
	control, keepAlive := boundPeer(peerTimeout)
	return net.Dialer{Control: control, KeepAlive: -1, KeepAliveConfig: keepAlive}
}

// probes returns when TCP asks a silent peer whether it is there, in whole
// seconds as TCP has it: after idle, half of timeout, then every interval, a
// quarter. One of these times is timeout, which is when TCP gives up.
func probes(timeout time.Duration) (idle, interval time.Duration) {
	interval = max(timeout/4, time.Second).Truncate(time.Second)
	return max(timeout-2*interval, time.Second), interval
}

// Descriptors that are not for clients, whatever their number.
const (
	ownDescriptors = 44 // the log, the listeners, Go's poller, the API server
	adminConns     = 32 // connections to the admin port
	adminDials     = 24 // connections to backends that answers of the admin port make
	reserved       = ownDescriptors + adminConns + adminDials
)

// notForClients is how many descriptors are not for clients: those reserved, two
// for each backend, for its lookup, and what the relay has for itself.
func notForClients(backends int) int {
	return reserved + 2*backends + pollerDescriptors*runtime.GOMAXPROCS(0)
}

// upgradeDescriptors is how many a client may need until it is a session: its
// own, the backend's, and a duplicate of either while they are handed over.
const upgradeDescriptors = 3

// gate keeps clients waiting, in the backlog of the kernel, while the process
// has no descriptors for them.
type gate struct {
	files int // that the process may open; static

	// Guarded by mu.
	mu     sync.Mutex
	limit  int // of used
	used   int // descriptors of clients
	closed bool
	change sync.Cond // used fell, or closed
}

// newGate returns the gate of a process that may open this many files, with this
// many backends.
func newGate(files, backends int) (*gate, error) {
	if least := notForClients(backends) + upgradeDescriptors; files < least {
		return nil, fmt.Errorf("%d open files are allowed, want at least %d (ulimit -n)", files, least)
	}
	g := &gate{files: files}
	g.change.L = &g.mu
	g.resize(backends)
	return g, nil
}

// resize sets how many descriptors clients may have with this many backends: at
// least those of one.
func (g *gate) resize(backends int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit = max(upgradeDescriptors, g.files-notForClients(backends))
	g.change.Signal()
}

// sessions is how many there can be.
func (g *gate) sessions() int {
	_, limit, _ := g.state()
	return (limit-upgradeDescriptors)/sessionDescriptors + 1
}

// wait returns when there is room for one more client, or net.ErrClosed.
func (g *gate) wait() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.used+upgradeDescriptors > g.limit && !g.closed {
		g.change.Wait()
	}
	if g.closed {
		return net.ErrClosed
	}
	return nil
}

// use counts n descriptors more, or -n fewer, as used.
func (g *gate) use(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.used += n
	g.change.Signal()
}

// state returns how many descriptors are used, how many may be, and whether
// clients wait for room.
func (g *gate) state() (used, limit int, full bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.used, g.limit, g.used+upgradeDescriptors > g.limit
}

// close ends wait.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.change.Signal()
}

// How long accept rests when it failed: at first, and then twice as long each
// time, up to the most.
const (
	acceptFirst = 5 * time.Millisecond
	acceptMost  = time.Second
)

// acceptRetry decides what follows a failed accept of a listener: another one,
// after a pause, for as long as the listener is ours. What accept(2) and the
// system under it can fail with is no closed list, and none of it is a reason to
// stop: memory, descriptors and interfaces come back.
type acceptRetry struct {
	// Static after construction.
	flag string // of the listener, for the log
	log  *slog.Logger

	closed   chan struct{} // closed by close
	once     sync.Once     // for closed
	throttle throttle

	pause time.Duration // the last one; owned by who accepts
}

// newAcceptRetry returns the rule for the listener of the flag.
func newAcceptRetry(flag string, log *slog.Logger) *acceptRetry {
	return &acceptRetry{flag: flag, log: log, closed: make(chan struct{})}
}

// close is called before the listener is closed.
func (a *acceptRetry) close() { a.once.Do(func() { close(a.closed) }) }

func (a *acceptRetry) isClosed() bool {
	select {
	case <-a.closed:
		return true
	default:
		return false
	}
}

// again is called with the result of each accept. It reports whether to accept
// once more: nothing came, and the listener was not closed by us. After an error
// it waits and logs, no more than a line a second.
func (a *acceptRetry) again(err error) bool {
	switch {
	case err == nil:
		a.pause = 0
		return false
	case a.isClosed() || errors.Is(err, net.ErrClosed): // whatever the error: that of a file is not exported
		return false
	case errors.Is(err, syscall.ECONNABORTED): // the client is gone (accept(2)); package net goes on too
		return true
	}
	if omitted, ok := a.throttle.allow(time.Second); ok {
		a.log.Warn("cannot accept connections", "listener", a.flag, "reason", err.Error(), "omitted", omitted)
	}
	a.pause = min(max(2*a.pause, acceptFirst), acceptMost)
	select {
	case <-a.closed:
		return false
	case <-time.After(a.pause):
		return true
	}
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
		if !l.retry.again(err) {
			return conn, err
		}
	}
}

func (l retryListener) Close() error {
	l.retry.close()
	return l.Listener.Close()
}

// boundedListener has at most max connections open. One more closes another, which had
// its turn: of those without a request the one whose last ended first, else the oldest
// that never had one, else the one with the oldest request. So a new connection always
// gets in, whatever others keep open, and however fast they ask.
type boundedListener struct {
	net.Listener
	max int

	mu   sync.Mutex
	open []*boundedConn // by since. Guarded by mu.
}

// boundedConn is a connection of a boundedListener.
type boundedConn struct {
	net.Conn
	listener *boundedListener

	// Guarded by listener.mu.
	busy   bool      // a request is being answered
	served bool      // it had a request
	since  time.Time // when it was accepted, or its last request began or ended
}

// roomGrace is for how long a connection without an answer need not make room: long
// enough to have its request read and answered, also while somebody opens connections
// without end. One that had an answer has none: requests one after the other would
// keep everybody out.
const roomGrace = 5 * time.Millisecond

// Accept returns the next connection. One goroutine may call it: then there is
// never more than one connection above the bound, which waits for room.
func (l *boundedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &boundedConn{Conn: conn, listener: l}
	over, wait := l.add(c)
	for wait > 0 {
		time.Sleep(wait)
		over, wait = l.add(c)
	}
	if over != nil {
		over.Conn.Close()
	}
	return c, nil
}

// add takes note of c, and returns the connection that has to make room for it, nil
// for none. If there is a time to wait, c is to be added again after it.
func (l *boundedListener) add(c *boundedConn) (over *boundedConn, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) >= l.max {
		at := l.next()
		over = l.open[at]
		if wait = roomGrace - time.Since(over.since); wait > 0 && (over.busy || !over.served) {
			return nil, wait
		}
		l.open = slices.Delete(l.open, at, at+1)
	}
	c.since = time.Now()
	l.open = append(l.open, c)
	return over, 0
}

// next returns which connection has to make room next. mu is held.
func (l *boundedListener) next() int {
	idle := func(served bool) int {
		return slices.IndexFunc(l.open, func(c *boundedConn) bool { return !c.busy && c.served == served })
	}
	if at := idle(true); at >= 0 {
		return at
	}
	return max(0, idle(false))
}

// setBusy says that a request of c begins or ends.
func (c *boundedConn) setBusy(busy bool) {
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy, c.served, c.since = busy, true, time.Now()
	if at := slices.Index(l.open, c); at >= 0 { // else it has made room
		l.open = append(slices.Delete(l.open, at, at+1), c)
	}
}

func (c *boundedConn) Close() error {
	l := c.listener
	l.mu.Lock()
	l.open = slices.DeleteFunc(l.open, func(other *boundedConn) bool { return other == c })
	l.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite is what net/http looks for to let the client read an answer to a
// request that was not read to its end (golang/go#3595).
func (c *boundedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn
}

// boundedKey is the key of a request context's *boundedConn.
type boundedKey struct{}

// frontListener accepts clients that the gate has room for. It counts the
// connections that end before net/http could make a request of what they sent:
// too long, too slow or malformed. net/http answers these by itself and tells
// nobody. One goroutine may accept.
type frontListener struct {
	net.Listener
	gate     *gate
	badHeads *atomic.Int64
}

func (l frontListener) Accept() (net.Conn, error) {
	if err := l.gate.wait(); err != nil {
		return nil, err
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.gate.use(upgradeDescriptors)
	return &frontConn{Conn: conn, gate: l.gate, badHeads: l.badHeads}, nil
}

func (l frontListener) Close() error {
	l.gate.close()
	return l.Listener.Close()
}

// frontConn is a client's connection while net/http has it.
type frontConn struct {
	net.Conn
	gate     *gate
	badHeads *atomic.Int64
	began    atomic.Bool // a byte came
	read     atomic.Bool // a request reached the handler, or the count was made
	closed   atomic.Bool
	ended    atomic.Bool // the client has ended its side of the connection, and may still listen

	// Set before net/http has it.
	peer    net.Addr                // where the client came from: its socket no longer says so once it was reset. nil: as Conn says
	pending atomic.Pointer[pending] // of its first upgrade; nil if nothing, or when it was taken
	serves  context.Context         // ends when the router stops
}

// pending is what was done already about an upgrade that net/http gets.
type pending struct {
	backend net.Conn  // the owner, which has got the upgrade, and is to answer; nil if none
	owner   int       // its ordinal
	pod     string    // its pod's uid, "" if not known
	until   time.Time // the upgrade is held, up to then; zero if it is not
	failure error     // why the owner could not be had; nil if that is still open
}

// RemoteAddr is the client's address.
func (c *frontConn) RemoteAddr() net.Addr {
	if c.peer != nil {
		return c.peer
	}
	return c.Conn.RemoteAddr()
}

// Read leaves out the empty lines before the first request.
func (c *frontConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if errors.Is(err, io.EOF) {
			conn, _ := whole(c.Conn)
			_, tcp := conn.(*net.TCPConn)
			c.ended.Store(tcp) // who is before us on a Unix socket closes it when its client has left
		}
		if n == 0 || c.began.Load() {
			return n, err
		}
		if rest := afterEmptyLines(b[:n]); len(rest) > 0 {
			c.began.Store(true)
			return copy(b, rest), err
		}
		if err != nil {
			return 0, err
		}
	}
}

// afterEmptyLines returns data without the empty lines that it begins with: a server
// should not mind at least one before a request (RFC 9112 §2.2).
func afterEmptyLines(data []byte) []byte { return bytes.TrimLeft(data, "\r\n") }

func (c *frontConn) Close() error {
	if c.began.Load() && !c.read.Swap(true) {
		c.badHeads.Add(1)
	}
	err := c.Conn.Close()
	if pending := c.pending.Swap(nil); pending != nil && pending.backend != nil {
		pending.backend.Close()
	}
	if !c.closed.Swap(true) {
		c.gate.use(-upgradeDescriptors)
	}
	return err
}

// CloseWrite is what net/http looks for to let the client read a 431 before the
// connection is gone (golang/go#3595).
func (c *frontConn) CloseWrite() error {
	conn, _ := whole(c.Conn)
	return conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn
}

// frontKey is the key of a request context's *frontConn.
type frontKey struct{}

// headRead notes that the connection's request reached the handler.
func headRead(ctx context.Context) {
	if c, ok := ctx.Value(frontKey{}).(*frontConn); ok {
		c.read.Store(true)
	}
}

// takePending returns what was done already about the request, which is nothing if it is
// not the connection's first. The caller closes the backend's connection.
func takePending(ctx context.Context) pending {
	c, ok := ctx.Value(frontKey{}).(*frontConn)
	if !ok {
		return pending{}
	}
	if pending := c.pending.Swap(nil); pending != nil {
		return *pending
	}
	return pending{}
}

// resumed is a connection of which something was read before: first.
type resumed struct {
	net.Conn
	first []byte
}

func (c *resumed) Read(b []byte) (int, error) {
	if len(c.first) == 0 {
		return c.Conn.Read(b)
	}
	n := copy(b, c.first)
	if c.first = c.first[n:]; len(c.first) == 0 {
		c.first = nil // it is not kept for as long as the connection
	}
	return n, nil
}

// whole returns the connection without what was read of it before, and that, as
// far as it was not read since.
func whole(conn net.Conn) (net.Conn, []byte) {
	if c, ok := conn.(*resumed); ok {
		return c.Conn, c.first
	}
	return conn, nil
}
