package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

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
	l.fdLimit.add(descriptorsPerClient)
	c := &clientConn{Conn: conn, socket: conn, fdLimit: l.fdLimit, badHeads: l.badHeads, tlsServer: l.tls}
	if l.proxyProtocol.expects(conn.RemoteAddr().String()) {
		c.Conn, c.proxyProtocol = &prefixedConn{Conn: conn}, l.proxyProtocol
	}
	if l.tls != nil {
		c.tls = newTLSConn(nil, l.tls.config())
		c.tls.setLazyTransport(c.Conn, l.tls)
		c.Conn = c.tls
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
	socket      net.Conn // under all others, made by package net
	fdLimit     *descriptorLimit
	badHeads    *atomic.Int64
	tlsServer   *tlsServer  // nil: the client comes without TLS
	tls         *tlsConn    // nil if tlsServer is
	hasReceived atomic.Bool // a byte came
	headSettled atomic.Bool // a request has reached the handler, or badHeads has counted the connection
	closed      atomic.Bool
	readEOF     atomic.Bool // the client has ended its side of the connection, and may still listen

	// Set before net/http reads. After that, Read may set remoteAddr (see proxyProtocol), and
	// who takes pending sets it to nil. remoteAddr is the client's address; nil: that of Conn,
	// which forgets it when the connection is reset.
	remoteAddr net.Addr
	pending    atomic.Pointer[pendingRequest] // of its first upgrade, from the fast path; or nil
	serverCtx  context.Context                // ends when the router stops; set in ConnContext

	// Not nil until the header was read with which the connection has to begin, before any
	// TLS. Read then sets it, and remoteAddr.
	proxyProtocol *proxyProtocol

	handedToHTTP atomic.Pointer[sync.WaitGroup] // counts this connection: see countHandover; nil: it is not counted
}

// countHandover adds the connection to handedToHTTP, if the head of its first request was read
// already. It stays there until the handler has that request, or the connection is closed.
func (c *clientConn) countHandover(handedToHTTP *sync.WaitGroup) {
	_, prefix := unwrap(c.Conn)
	if c.proxyProtocol == nil && bytes.Contains(prefix, []byte("\r\n\r\n")) {
		handedToHTTP.Add(1)
		c.handedToHTTP.Store(handedToHTTP)
	}
}

// endHandover ends what countHandover began.
func (c *clientConn) endHandover() {
	if handedToHTTP := c.handedToHTTP.Swap(nil); handedToHTTP != nil {
		handedToHTTP.Done()
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
			_, tcp := c.socket.(*net.TCPConn)
			c.readEOF.Store(tcp) // the proxy at the other end of a Unix socket closes it when its client has left
		}
		if n == 0 || c.hasReceived.Load() {
			return n, err
		}
		if rest := trimEmptyLines(b[:n]); len(rest) > 0 {
			c.hasReceived.Store(true)
			return copy(b, rest), err
		}
		if err != nil {
			return 0, err
		}
	}
}

// readProxyHeader reads the header of the PROXY protocol, and takes the client's address
// from it. net/http answers 400 to an invalid one, but with TLS nothing: there is no
// handshake yet.
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
			err = nil // the next call returns the error again
		}
		return buf[:n], err
	}
	client, rest, err := c.proxyProtocol.read(conn.prefix, more)
	if conn.prefix = rest; err != nil {
		if lazy != nil {
			lazy.fail(err)
		} else {
			c.hasReceived.Store(len(rest) > 0)
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
	if c.tls != nil {
		lazy := c.tls.transport.Conn.(*lazyTransport)
		return lazy.Conn.(*prefixedConn), lazy
	}
	return c.Conn.(*prefixedConn), nil
}

// trimEmptyLines returns data without the empty lines that it begins with: a server
// should not mind at least one before a request (RFC 9112 §2.2).
func trimEmptyLines(data []byte) []byte { return bytes.TrimLeft(data, "\r\n") }

// Close does not wait for a client with TLS to take close_notify: net/http's Shutdown closes
// one client after the other. tlsServer.closing waits for it, for at most closeNotifyTime.
func (c *clientConn) Close() error {
	if c.hasReceived.Load() && !c.headSettled.Swap(true) {
		c.badHeads.Add(1)
	}
	c.endHandover()
	if upgrade := c.takePendingRequest(); upgrade != nil {
		upgrade.close()
	}
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	if c.tlsServer != nil {
		c.tlsServer.closing.Go(func() { c.end() })
		return nil
	}
	return c.end()
}

// end closes the connection, and then ends the count of its descriptors.
func (c *clientConn) end() error {
	err := c.Conn.Close()
	c.fdLimit.add(-descriptorsPerClient)
	return err
}

// CloseWrite is what net/http looks for to let the client read a 431 before the
// connection is gone (golang/go#3595).
func (c *clientConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn, *net.UnixConn, *tlsConn or *prefixedConn
}

// clientConnKey is the key of a request context's *clientConn.
type clientConnKey struct{}

// clientOf returns the connection of the request with the context.
func clientOf(ctx context.Context) *clientConn { return ctx.Value(clientConnKey{}).(*clientConn) }

// markRequestRead notes that the connection's request reached the handler. It gives the
// request the client's address, for net/http has asked for that before the header of the
// PROXY protocol was read, and the state of its TLS.
func markRequestRead(r *http.Request) {
	c := clientOf(r.Context())
	c.headSettled.Store(true)
	c.endHandover()
	r.TLS = c.tls.state()
	if c.remoteAddr != nil {
		r.RemoteAddr = c.remoteAddr.String()
	}
}

// takePendingRequest returns the upgrade that the fast path has admitted for the client,
// or nil. The caller closes it.
func (c *clientConn) takePendingRequest() *pendingRequest { return c.pending.Swap(nil) }

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
