//go:build !portable && !386

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"time"
)

// pendingTransport is the transport of a client on the fast path: its goroutine waits in
// Read and Write, as the context of the pendingConn allows.
type pendingTransport struct {
	net.Conn // nil: crypto/tls calls only what is below

	client   *pendingConn
	unread   []byte // came before the handshake, after a header of the PROXY protocol
	inTLS    bool   // the handshake is under way
	received int    // bytes of the handshake
}

// errLongHandshake is returned to crypto/tls for a handshake that does not end.
var errLongHandshake = errors.New("the handshake has too many bytes")

func (t *pendingTransport) Read(b []byte) (n int, err error) {
	if n = copy(b, t.unread); n > 0 {
		t.unread = t.unread[n:]
	} else if t.inTLS {
		t.client.tlsServer().pause(t.client.replace, func() { n, err = t.receive(b) })
	} else {
		n, err = t.receive(b)
	}
	t.received += n
	if t.inTLS && t.received > maxTLSHandshakeBytes {
		return 0, errLongHandshake
	}
	return n, err
}

// receive reads from the client. When the context has ended, who has the tlsConn next may
// read on.
func (t *pendingTransport) receive(b []byte) (n int, err error) {
	err = t.client.receive(clientSide, len(b), func(data []byte) { n = copy(b, data) })
	if err != nil && t.client.ctx.Err() != nil {
		err = errNoBytesYet
	}
	return n, err
}

func (t *pendingTransport) Write(b []byte) (int, error) {
	if err := t.client.write(clientSide, b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// tlsServer is the router's, or nil if clients come without TLS.
func (c *pendingConn) tlsServer() *tlsServer { return c.fastPath.proxy.tls }

// errHandshake is returned for a client whose handshake has failed. It can be sent nothing
// more.
var errHandshake = errors.New("the TLS handshake has failed")

// startTLS does the client's handshake, which begins with data, and returns what came
// after it: at least a part of the request.
func (c *pendingConn) startTLS(data []byte) ([]byte, error) {
	s, transport := c.tlsServer(), &pendingTransport{client: c, unread: data, inTLS: true}
	c.tls.setTransport(transport, false)
	if !c.setHandshaking(true) {
		return nil, c.ctx.Err()
	}
	err := s.handshake(c.tls)
	c.setHandshaking(false)
	if err != nil {
		s.results[c.handshakeResult(err)].Add(1)
		if answer := isNotTLS(err); answer != nil {
			c.write(clientSide, answer) // it fails only if the client is gone
		}
		return nil, errHandshake
	}
	transport.inTLS = false
	c.setDeadline(time.Now().Add(fastPathTimeout), false)
	return c.readTLS()
}

// readTLS waits until the client has sent something, and returns it.
func (c *pendingConn) readTLS() ([]byte, error) {
	buf := make([]byte, min(c.fastPath.proxy.limits.headerBytes, maxTLSHead))
	n, err := c.tls.Read(buf)
	if n > 0 {
		return slices.Clone(buf[:n]), nil
	}
	return nil, err
}

// maxTLSHead is the most bytes of a client with TLS that may wait for its session: with
// what net/http has read, and a record, they have room in a poller's buffer.
const maxTLSHead = 32 << 10

// readHello waits for the beginning of the client's handshake, and returns it.
func (c *pendingConn) readHello() (data []byte, err error) {
	s := c.tlsServer()
	s.silent.during(c.replace, func() { data, err = c.read(clientSide) })
	if err != nil && c.handshakeResult(err) == tlsReplaced {
		s.results[tlsReplaced].Add(1)
		err = errHandshake
	}
	return data, err
}

// replace ends the handshake, as a newer client takes its place.
func (c *pendingConn) replace() {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.replaced = true
	c.ctx.end(context.Canceled)
}

// setHandshaking says that the handshake begins or is over. Meanwhile a stop of the
// router leaves it answerTime. It reports whether the context has not ended.
func (c *pendingConn) setHandshaking(handshaking bool) bool {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.handshaking = handshaking && c.ctx.err == nil
	return c.ctx.err == nil
}

// overTLS returns the client's connection over conn, which has its socket. If its
// handshake has not begun, net/http does that.
func (c *pendingConn) overTLS(conn net.Conn) net.Conn {
	if c.tls == nil {
		return conn
	}
	if begun, ok := c.tls.transport.Conn.(*pendingTransport); ok && len(begun.unread) > 0 {
		conn = &prefixedConn{conn, begun.unread}
	}
	c.tls.setTransport(conn, false)
	return c.tls
}

// handshakeResult says why the handshake has failed with err.
func (c *pendingConn) handshakeResult(err error) tlsResult {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	switch {
	case c.replaced:
		return tlsReplaced
	case c.gone, errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return tlsGone
	case errors.Is(c.ctx.err, context.DeadlineExceeded):
		return tlsTimeout
	}
	return tlsFailed
}

// sealedHead returns the head as the client gets it, with TLS if it has that.
func (c *pendingConn) sealedHead(head []byte) []byte {
	if c.tls == nil {
		return head
	}
	var sealed sealedBytes
	c.tls.setTransport(&sealed, false)
	c.tls.Write(head) // it does not fail
	return sealed.bytes
}

// sealedBytes is a transport that keeps what is written.
type sealedBytes struct {
	net.Conn // nil
	bytes    []byte
}

func (s *sealedBytes) Write(b []byte) (int, error) {
	s.bytes = append(s.bytes, b...)
	return len(b), nil
}
