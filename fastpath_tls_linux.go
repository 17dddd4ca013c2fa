//go:build !portable && !386

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"net"
	"slices"
	"time"
)

// fastConnTransport is the transport of a client on the fast path: its goroutine waits in
// Read and Write, as the context of the fastConn allows.
type fastConnTransport struct {
	net.Conn // nil: crypto/tls calls only what is below

	client      *fastConn
	early       []byte // of the handshake: came before it began
	handshaking bool   // the handshake is under way
}

func (t *fastConnTransport) Read(b []byte) (n int, err error) {
	if n = copy(b, t.early); n > 0 {
		t.early = t.early[n:]
		return n, nil
	}
	late := t.pause(func() { n, err = t.receive(b) })
	return n, cmp.Or(late, err)
}

// pause calls wait, which waits for the client: in the handshake as tlsServer.pause does.
func (t *fastConnTransport) pause(wait func()) error {
	if !t.handshaking {
		wait()
		return nil
	}
	return t.client.tlsServer().pause(t.client.tls, t.client.evict, wait)
}

// receive reads from the client. If the context ends meanwhile, the error is a temporary one
// (errNoBytesYet): net/http, which gets the tlsConn then, may read on.
func (t *fastConnTransport) receive(b []byte) (n int, err error) {
	err = t.client.receive(clientSide, len(b), func(data []byte) { n = copy(b, data) })
	if err != nil && t.client.ctx.Err() != nil {
		err = errNoBytesYet
	}
	return n, err
}

// Write waits for a client that does not read as Read does for one that sends nothing.
func (t *fastConnTransport) Write(b []byte) (int, error) {
	rest, err := b[t.client.sendNow(clientSide, b):], error(nil)
	if len(rest) > 0 {
		late := t.pause(func() { err = t.client.write(clientSide, rest) })
		err = cmp.Or(late, err)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// tlsServer is the router's, or nil if clients come without TLS.
func (c *fastConn) tlsServer() *tlsServer { return c.fastPath.proxy.tls }

// readTLSHead reads what the client sends first within TLS: it does the handshake. If the
// router stops before that has begun, it returns what the client has sent so far, for
// net/http to do it.
func (c *fastConn) readTLSHead() ([]byte, error) {
	s := c.tlsServer()
	s.running.Add(1)
	c.setDeadline(time.Now().Add(c.fastPath.proxy.limits.headerTimeout), false)
	data, err := c.readHello()
	if c.expectsProxyHeader && err == nil {
		data, err = c.readProxyHeader(data, c.readHello)
	}
	switch {
	case err == nil && c.setTLSHandshaking(true):
		return c.startTLS(data)
	case c.hasToFallBack():
		s.running.Add(-1)
		return data, context.Canceled
	case errors.Is(err, errNoProxyHeader):
		c.fastPath.proxy.proxyProtocol.logInvalid(string(c.remoteAddr))
	}
	s.count(c.handshakeResult(cmp.Or(err, c.ctx.Err())))
	return nil, errTLSHandshake
}

// startTLS does the client's handshake, which begins with data, and returns what came
// after it: at least a part of the request. If the router stops meanwhile, the client has
// stopGrace left for the handshake.
func (c *fastConn) startTLS(data []byte) ([]byte, error) {
	defer c.setTLSHandshaking(false)
	transport := &fastConnTransport{client: c, early: data, handshaking: true}
	c.tls.setTransport(transport, false)
	if err := c.tlsServer().handshake(c.tls, c.ctx.Done(), c.handshakeResult); err != nil {
		if answer := cleartextAnswer(err); answer != nil {
			c.write(clientSide, answer) // it fails only if the client is gone
		}
		return nil, errTLSHandshake
	}
	transport.handshaking = false
	c.setDeadline(time.Now().Add(fastPathTimeout), false)
	return c.readTLS()
}

// readTLS waits until the client has sent the head of a request, and returns it, or what has
// come of it. A client may send the head in several records.
func (c *fastConn) readTLS() ([]byte, error) {
	buf := make([]byte, min(c.fastPath.proxy.limits.headerBytes, maxTLSHead))
	n, got, err := 0, 0, error(nil)
	for whole := false; err == nil && n < len(buf) && !whole; {
		got, err = c.tls.Read(buf[n:])
		n += got
		whole = bytes.Contains(buf[max(n-got-3, 0):n], []byte("\r\n\r\n"))
	}
	if n > 0 {
		return slices.Clone(buf[:n]), nil
	}
	return nil, err
}

// maxTLSHead is the most bytes of a client with TLS that may wait for its session: with
// what net/http has read, and a record, they have room in a poller's buffer.
const maxTLSHead = 32 << 10

// readHello waits for what the client sends before the handshake, or at its beginning, and
// returns it.
func (c *fastConn) readHello() (data []byte, err error) {
	c.tlsServer().waiting.during(c.evict, func() { data, err = c.read(clientSide) })
	return data, err
}

// evict ends the handshake to make room: too many wait for their clients.
func (c *fastConn) evict() {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.evicted = true
	c.ctx.end(context.Canceled)
}

// setTLSHandshaking notes that the handshake begins, or is over. While it is under way, a stop
// of the router ends the context after stopGrace, and not at once. setTLSHandshaking reports
// whether the client may go on: its context has not ended.
func (c *fastConn) setTLSHandshaking(handshaking bool) bool {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.tlsHandshaking = handshaking && c.ctx.err == nil
	c.cancelIfGone()
	return c.ctx.err == nil
}

// hasToFallBack reports whether the context has ended because the router stops.
func (c *fastConn) hasToFallBack() bool {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	return errors.Is(c.ctx.err, context.Canceled) && !c.gone && !c.evicted
}

// overTLS returns the client's connection over conn, which has its socket, for net/http:
// after what was received. If the handshake has not begun, net/http does that.
func (c *fastConn) overTLS(conn net.Conn) net.Conn {
	switch {
	case c.tls == nil:
		return &prefixedConn{conn, c.received}
	case !c.tls.ConnectionState().HandshakeComplete:
		c.tls.setLazyTransport(&prefixedConn{conn, c.received}, c.tlsServer())
		return c.tls
	}
	c.tls.setTransport(conn, false)
	return &prefixedConn{c.tls, c.received}
}

// handshakeResult says what has become of the handshake.
func (c *fastConn) handshakeResult(err error) tlsResult {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	switch result := tlsHandshakeResult(err); {
	case err == nil:
		return tlsOK
	case c.evicted:
		return tlsEvicted
	case c.gone:
		return tlsGone
	case result == tlsFailed && errors.Is(c.ctx.err, context.DeadlineExceeded):
		return tlsTimeout
	default:
		return result
	}
}

// sealedHead returns the head as the client gets it, with TLS if it has that. It returns
// nothing for a client whose handshake is not over, or has sent what TLS refuses.
func (c *fastConn) sealedHead(head []byte) []byte {
	switch {
	case c.tls == nil:
		return head
	case !c.tls.ConnectionState().HandshakeComplete:
		return nil
	}
	var sealed sealedBytes
	c.tls.setTransport(&sealed, false)
	if _, err := c.tls.Write(head); err != nil {
		return nil
	}
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
