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
	"net/http"
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

// descriptorsPerUpgrade is how many a client may need until it is a session: its
// own, the backend's, and a duplicate of either while the relay takes them over.
const descriptorsPerUpgrade = 3

// descriptorLimit keeps clients waiting, in the backlog of the kernel, while the process
// has no descriptors for them.
type descriptorLimit struct {
	maxFiles int // that the process may open; static

	// Guarded by mu.
	mu      sync.Mutex
	limit   int // of used
	used    int // descriptors of clients
	closed  bool
	changed sync.Cond // used fell, or closed
}

// newDescriptorLimit returns the limit of a process that may open this many files, with
// this many backends.
func newDescriptorLimit(files, backends int) (*descriptorLimit, error) {
	if least := internalDescriptors(backends) + descriptorsPerUpgrade; files < least {
		return nil, fmt.Errorf("the limit of open files must be at least %d (got %d; ulimit -n)", least, files)
	}
	g := &descriptorLimit{maxFiles: files}
	g.changed.L = &g.mu
	g.setBackends(backends)
	return g, nil
}

// setBackends sets how many descriptors clients may have with this many backends: at
// least those of one.
func (l *descriptorLimit) setBackends(backends int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = max(descriptorsPerUpgrade, l.maxFiles-internalDescriptors(backends))
	l.changed.Signal()
}

// maxSessions is how many there can be.
func (l *descriptorLimit) maxSessions() int {
	_, limit, _ := l.usage()
	return (limit-descriptorsPerUpgrade)/descriptorsPerSession + 1
}

// wait returns when there is room for one more client, or net.ErrClosed.
func (l *descriptorLimit) wait() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.used+descriptorsPerUpgrade > l.limit && !l.closed {
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
	return l.used, l.limit, l.used+descriptorsPerUpgrade > l.limit
}

// writeMetrics writes how many descriptors clients use, whether some wait for one, and
// those of the whole process.
func (l *descriptorLimit) writeMetrics(m metricsWriter) {
	used, limit, full := l.usage()
	m.single("router_client_descriptors", "gauge", "File descriptors that clients and their sessions have or may need.", float64(used))
	m.single("router_client_descriptors_limit", "gauge", "File descriptors that clients and their sessions may have.", float64(limit))
	m.single("router_accept_paused", "gauge", "1 while clients wait in the listen backlog for file descriptors.", boolToFloat(full))
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

// How long accept waits after it has failed: the first time, and at most. It waits twice
// as long each time.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = time.Second
)

// acceptRetry decides what follows a failed accept of a listener: another one,
// after a pause, for as long as the listener is ours. What accept(2) and the
// system under it can fail with is no closed list, and none of it is a reason to
// stop: memory, descriptors and interfaces come back.
type acceptRetry struct {
	// Static after construction.
	flag string // of the listener, for the log
	log  *slog.Logger

	closed      chan struct{} // closed by close
	once        sync.Once     // for closed
	logThrottle throttle

	failures int // in a row; owned by the goroutine that accepts
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

// shouldRetry is called with the result of each accept. It reports whether to accept
// once more: nothing came, and the listener was not closed by us. After an error
// it waits and logs, no more than a line a second.
func (a *acceptRetry) shouldRetry(err error) bool {
	switch {
	case err == nil:
		a.failures = 0
		return false
	case a.isClosed() || errors.Is(err, net.ErrClosed): // whatever the error: that of a file is not exported
		return false
	case errors.Is(err, syscall.ECONNABORTED): // the client is gone (accept(2)); package net goes on too
		return true
	}
	if omitted, ok := a.logThrottle.allow(time.Second); ok {
		a.log.Warn("cannot accept connections", "listener", a.flag, "reason", err.Error(), "omitted", omitted)
	}
	a.failures++
	select {
	case <-a.closed:
		return false
	case <-time.After(backoff{minAcceptBackoff, maxAcceptBackoff}.delay(a.failures)):
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
		if !l.retry.shouldRetry(err) {
			return conn, err
		}
	}
}

func (l retryListener) Close() error {
	l.retry.close()
	return l.Listener.Close()
}

// limitListener has at most maxConns connections open. One more closes another, which had
// its turn: of those without a request the one whose last ended first, else the oldest
// that has sent none for silentTime, else the oldest. So a new connection always gets in,
// whatever others keep open, and however fast they ask.
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
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn
}

// clientListener accepts clients that the descriptor limit has room for. It counts the
// connections that end before net/http could make a request of what they sent:
// too long, too slow or malformed. net/http answers these by itself and reports them
// nowhere. One goroutine may accept.
type clientListener struct {
	net.Listener
	fdLimit       *descriptorLimit
	badHeads      *atomic.Int64
	proxyProtocol *proxyProtocol // nil: off
	tls           *tlsServer     // nil: clients come without TLS
}

// Accept returns the next client, whose connection net/http closes.
func (l clientListener) Accept() (net.Conn, error) {
	if err := l.fdLimit.wait(); err != nil {
		return nil, err
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.fdLimit.add(descriptorsPerUpgrade)
	c := &clientConn{Conn: conn, fdLimit: l.fdLimit, badHeads: l.badHeads}
	if l.proxyProtocol.expects(conn.RemoteAddr().String()) {
		c.Conn, c.proxyProtocol = &prefixedConn{Conn: conn}, l.proxyProtocol
	}
	if l.tls != nil {
		t := newTLSConn(nil, l.tls.config())
		t.setLazyTransport(c.Conn, l.tls)
		c.Conn = t
	}
	return c, nil
}

func (l clientListener) Close() error {
	l.fdLimit.close()
	return l.Listener.Close()
}

// halfClosedHold is how long a half-closed client waits for its owner, and for the answer to
// a plain request.
const halfClosedHold = time.Second

// clientConn is a client's connection while net/http has it.
type clientConn struct {
	net.Conn
	fdLimit     *descriptorLimit
	badHeads    *atomic.Int64
	receiving   atomic.Bool // a byte came
	requestRead atomic.Bool // a request reached the handler, or the count was made
	closed      atomic.Bool
	readEOF     atomic.Bool // the client has ended its side of the connection, and may still listen

	// Set before net/http has it.
	remoteAddr net.Addr                       // where the client came from: its socket no longer says so once it was reset. nil: as Conn says
	upgrade    atomic.Pointer[pendingUpgrade] // of its first upgrade; nil if nothing, or when it was taken
	serverCtx  context.Context                // ends when the router stops

	// Not nil until the header was read with which the connection has to begin, before any
	// TLS. Read then sets it, and remoteAddr.
	proxyProtocol *proxyProtocol

	unhandled atomic.Pointer[sync.WaitGroup] // counts it until the handler has its request; nil: it is not counted
}

// count has unhandled count the connection, if the head of its first request was read
// already, until the handler has that request or the connection is closed.
func (c *clientConn) count(unhandled *sync.WaitGroup) {
	_, prefix := unwrap(c.Conn)
	if c.proxyProtocol == nil && bytes.Contains(prefix, []byte("\r\n\r\n")) {
		unhandled.Add(1)
		c.unhandled.Store(unhandled)
	}
}

// uncount ends what count began.
func (c *clientConn) uncount() {
	if unhandled := c.unhandled.Swap(nil); unhandled != nil {
		unhandled.Done()
	}
}

// RemoteAddr is the client's address.
func (c *clientConn) RemoteAddr() net.Addr {
	if c.remoteAddr != nil {
		return c.remoteAddr
	}
	return c.Conn.RemoteAddr()
}

// Read leaves out the header of the PROXY protocol, if one has to come, and the empty
// lines before the first request.
func (c *clientConn) Read(b []byte) (int, error) {
	if c.proxyProtocol != nil {
		if err := c.readProxyHeader(); err != nil {
			return 0, err
		}
	}
	for {
		n, err := c.Conn.Read(b)
		if errors.Is(err, io.EOF) {
			conn, _ := unwrap(c.Conn)
			conn, _ = takeTLS(conn)
			_, tcp := conn.(*net.TCPConn)
			c.readEOF.Store(tcp) // who is before us on a Unix socket closes it when its client has left
		}
		if n == 0 || c.receiving.Load() {
			return n, err
		}
		if rest := trimEmptyLines(b[:n]); len(rest) > 0 {
			c.receiving.Store(true)
			return copy(b, rest), err
		}
		if err != nil {
			return 0, err
		}
	}
}

// readProxyHeader reads the header of the PROXY protocol, and takes the client's address
// from it. net/http answers 400 to an invalid one.
func (c *clientConn) readProxyHeader() error {
	conn, lazy := c.beforeTLS()
	more := func() (_ []byte, err error) {
		n, buf := 0, make([]byte, 1024)
		read := func() { n, err = conn.Conn.Read(buf) }
		if lazy != nil {
			lazy.wait(read)
		} else {
			read()
		}
		if n > 0 {
			err = nil // it comes again
		}
		return buf[:n], err
	}
	client, rest, err := c.proxyProtocol.read(conn.prefix, more)
	if conn.prefix = rest; err != nil {
		if lazy != nil {
			lazy.fail(err)
		} else {
			c.receiving.Store(len(rest) > 0)
		}
		if errors.Is(err, errNoProxyHeader) {
			c.proxyProtocol.logInvalid(c.RemoteAddr().String())
		}
		return err
	}
	if client != nil {
		c.remoteAddr = client
	}
	c.proxyProtocol = nil
	return nil
}

// beforeTLS returns the connection that the header of the PROXY protocol comes from, and
// that between it and TLS, if the client has that.
func (c *clientConn) beforeTLS() (*prefixedConn, *lazyTransport) {
	conn, _ := unwrap(c.Conn)
	if t, ok := conn.(*tlsConn); ok {
		lazy := t.transport.Conn.(*lazyTransport)
		return lazy.Conn.(*prefixedConn), lazy
	}
	return c.Conn.(*prefixedConn), nil
}

// trimEmptyLines returns data without the empty lines that it begins with: a server
// should not mind at least one before a request (RFC 9112 §2.2).
func trimEmptyLines(data []byte) []byte { return bytes.TrimLeft(data, "\r\n") }

func (c *clientConn) Close() error {
	if c.receiving.Load() && !c.requestRead.Swap(true) {
		c.badHeads.Add(1)
	}
	c.uncount()
	err := c.Conn.Close()
	if upgrade := c.upgrade.Swap(nil); upgrade != nil {
		upgrade.close()
	}
	if !c.closed.Swap(true) {
		c.fdLimit.add(-descriptorsPerUpgrade)
	}
	return err
}

// CloseWrite is what net/http looks for to let the client read a 431 before the
// connection is gone (golang/go#3595).
func (c *clientConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn, *net.UnixConn, *tlsConn or *prefixedConn
}

// clientConnKey is the key of a request context's *clientConn.
type clientConnKey struct{}

// markRequestRead notes that the connection's request reached the handler. It gives the
// request the client's address, for net/http has asked for that before the header of the
// PROXY protocol was read, and the state of its TLS.
func markRequestRead(r *http.Request) {
	if c, ok := r.Context().Value(clientConnKey{}).(*clientConn); ok {
		c.requestRead.Store(true)
		c.uncount()
		conn := c.Conn
		if prefixed, ok := conn.(*prefixedConn); ok {
			conn = prefixed.Conn // not by unwrap: net/http reads the prefix meanwhile
		}
		_, t := takeTLS(conn)
		r.TLS = t.state()
		if c.remoteAddr != nil {
			r.RemoteAddr = c.remoteAddr.String()
		}
	}
}

// takePendingUpgrade returns the upgrade that the fast path has admitted for the request,
// or nil. The caller closes it.
func takePendingUpgrade(ctx context.Context) *pendingUpgrade {
	if c, ok := ctx.Value(clientConnKey{}).(*clientConn); ok {
		return c.upgrade.Swap(nil)
	}
	return nil
}

// prefixedConn is a connection of which something was read before: prefix.
type prefixedConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixedConn) Read(b []byte) (int, error) {
	if len(c.prefix) == 0 {
		return c.Conn.Read(b)
	}
	n := copy(b, c.prefix)
	if c.prefix = c.prefix[n:]; len(c.prefix) == 0 {
		c.prefix = nil // it is not kept for as long as the connection
	}
	return n, nil
}

// NetConn returns the connection under it.
func (c *prefixedConn) NetConn() net.Conn { return c.Conn }

// CloseWrite ends this side of the connection.
func (c *prefixedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn, *net.UnixConn or *tlsConn
}

// unwrap returns the connection without what was read of it before, and that, as
// far as it was not read since.
func unwrap(conn net.Conn) (net.Conn, []byte) {
	if c, ok := conn.(*prefixedConn); ok {
		return c.Conn, c.prefix
	}
	return conn, nil
}
