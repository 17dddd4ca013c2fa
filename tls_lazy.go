package main

import (
	"net"
	"sync/atomic"
	"time"
)

// lazyTransport is the transport of a client that net/http has from before its handshake:
// net/http does that as it reads the request, within the time for that. Who reads owns it.
type lazyTransport struct {
	net.Conn
	conn   *tlsConn // over it
	server *tlsServer
	begun  bool // server.running has counted it

	state atomic.Int32 // see lazyHandshaking
}

// The states of a lazyTransport.
const (
	lazyHandshaking = iota // or not begun
	lazyEvicted            // the same, but ended to make room: see tlsEvicted
	lazyFailed
	lazyDone
)

// setLazyTransport makes net/http do the handshake over conn.
func (t *tlsConn) setLazyTransport(conn net.Conn, s *tlsServer) {
	t.setTransport(&lazyTransport{Conn: conn, conn: t, server: s}, false)
}

// NetConn returns the connection under it.
func (l *lazyTransport) NetConn() net.Conn { return l.Conn }

func (l *lazyTransport) Read(b []byte) (n int, err error) {
	if l.state.Load() == lazyDone {
		return l.Conn.Read(b)
	}
	// pause returns no error: expired is nil.
	l.server.pause(l.conn, l.evict, func() { n, err = l.Conn.Read(b) })
	return n, err
}

func (l *lazyTransport) Write(b []byte) (n int, err error) {
	if l.state.Load() == lazyDone {
		return l.Conn.Write(b)
	}
	l.server.pause(l.conn, l.evict, func() { n, err = l.Conn.Write(b) })
	return n, err
}

// evict ends the handshake to make room: too many wait for their clients.
func (l *lazyTransport) evict() {
	if l.state.CompareAndSwap(lazyHandshaking, lazyEvicted) {
		l.Conn.SetDeadline(pastDeadline())
	}
}

// wait calls read, which waits for what comes before the handshake.
func (l *lazyTransport) wait(read func()) {
	l.begin()
	l.server.waiting.during(l.evict, read)
}

// begin counts the handshake as one that runs, the first time that it is called.
func (l *lazyTransport) begin() {
	if !l.begun {
		l.begun = true
		l.server.running.Add(1)
	}
}

// fail counts a handshake that cannot begin: what has to come before it did not, as err says.
func (l *lazyTransport) fail(err error) {
	if l.state.Load() < lazyFailed {
		l.begin()
		l.server.count(l.resultOf(err))
	}
}

// handshake does the handshake over it, unless it was done.
func (l *lazyTransport) handshake() error {
	switch l.state.Load() {
	case lazyDone:
		return nil
	case lazyFailed:
		return errTLSHandshake
	}
	l.begin()
	l.Conn.SetWriteDeadline(time.Now().Add(l.server.writeTimeout))
	err := l.server.handshake(l.conn, nil, l.resultOf)
	switch answer := cleartextAnswer(err); {
	case err == nil:
		l.Conn.SetWriteDeadline(time.Time{})
	case answer != nil:
		l.Conn.Write(answer) // it fails only if the client is gone
	}
	return err
}

// resultOf says what has become of the handshake, which is over.
func (l *lazyTransport) resultOf(err error) tlsResult {
	if err == nil && l.state.CompareAndSwap(lazyHandshaking, lazyDone) {
		return tlsOK
	}
	if l.state.Swap(lazyFailed) == lazyEvicted {
		return tlsEvicted
	}
	return tlsHandshakeResult(err)
}
