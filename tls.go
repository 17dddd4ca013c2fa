package main

import (
	"bytes"
	"cmp"
	"container/list"
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// tlsServer ends the TLS of clients (RFC 8446, RFC 5246). All of TLS is crypto/tls's: the
// router gives it what came and sends what it returns. A client in its handshake has a
// goroutine. On Linux a session has none: its poller lends crypto/tls memory for one read.
// Any goroutine may call the methods, with a tlsConn that it owns.
type tlsServer struct {
	config    func() *tls.Config // for the next handshake; static
	computing chan struct{}      // has an element for each handshake that computes
	results   [numTLSResults]atomic.Int64
	resumed   atomic.Int64     // of those that are tlsOK
	times     *histogram       // of those that are tlsOK
	running   atomic.Int64     // handshakes under way: from the accept of the client
	waiting   tlsHandshakeList // those that wait for their clients
	closing   sync.WaitGroup   // goroutines that close net/http's clients

	// writeTimeout bounds all writes of a handshake that net/http does: net/http itself
	// bounds the reads. Static.
	writeTimeout time.Duration
}

// tlsResult is how a handshake ended.
type tlsResult int

const (
	tlsOK      tlsResult = iota
	tlsFailed            // what the client sent is refused
	tlsTimeout           // it took longer than -header-timeout, or the router has stopped
	tlsEvicted           // ended to make room: too many waited for their clients, it for longest
	tlsGone              // the client left
	numTLSResults
)

// String returns the result as the metrics' label has it.
func (r tlsResult) String() string {
	return [numTLSResults]string{"ok", "failed", "timeout", "evicted", "client_gone"}[r]
}

const (
	// maxWaitingHandshakes is how many handshakes may wait for their clients. One more
	// ends the one that has waited for longest: whoever opens connections and sends
	// nothing keeps nobody out.
	maxWaitingHandshakes = 2048
	// What a client may send in its handshake. crypto/tls keeps up to 64 KiB of a
	// ClientHello, and 256 KiB of certificates, also if it has asked for none.
	maxTLSHandshakeBytes             = 72 << 10
	maxTLSHandshakeBytesWithClientCA = 320 << 10
	// maxTLSBytesWithoutData is what crypto/tls may take of a session's client until there
	// are data: a record of 16 KiB, what is read with it, and some messages. It would keep
	// 64 KiB of one message.
	maxTLSBytesWithoutData = 32 << 10
	maxTLSReadAhead        = 8 << 10 // bytes of one read of a session's client
)

var (
	// errTLSHandshake is returned for a client whose handshake has failed. It can be sent
	// nothing more.
	errTLSHandshake = errors.New("the TLS handshake has failed")
	// errTooMuchOverhead is returned to crypto/tls for a client that sends much without data:
	// a handshake that does not end, for example.
	errTooMuchOverhead = errors.New("the client sends too many bytes that are no data")
	// errHandshakeOver is returned for a handshake whose client is gone, or whose time is
	// over, before it could compute.
	errHandshakeOver = errors.New("the TLS handshake came too late to compute")
)

// newTLSServer returns a server whose handshakes take their settings from config.
func newTLSServer(config func() *tls.Config) *tlsServer {
	return &tlsServer{
		config: config,
		// A handshake computes for a millisecond. More of them at once than there are
		// CPUs would only keep the sessions waiting.
		computing: make(chan struct{}, runtime.GOMAXPROCS(0)),
		times:     newHistogram(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10),
		waiting:   tlsHandshakeList{limit: maxWaitingHandshakes},

		writeTimeout: 10 * time.Second,
	}
}

// handshake does the handshake of t. The transport of t calls pause when it waits for the
// client. expired is closed when the client is gone or its time is over; nil: it never is.
//
// resultOf gets the error of crypto/tls, and returns how the handshake has ended. handshake
// counts that result, and takes the handshake out of running, to which the caller has added
// it. It returns nil for tlsOK. After any other result nothing can be sent within TLS.
func (s *tlsServer) handshake(
	t *tlsConn, expired <-chan struct{}, resultOf func(error) tlsResult,
) error {
	began := time.Now()
	t.expired = expired
	err := s.compute(t)
	t.limit, t.expired = math.MaxInt, nil // until it is a session's
	result := resultOf(err)
	s.count(result)
	if result != tlsOK {
		return cmp.Or(err, errTLSHandshake)
	}
	s.times.observe(time.Since(began))
	if t.ConnectionState().DidResume {
		s.resumed.Add(1)
	}
	return nil
}

// count counts how a handshake has ended, and takes it out of running.
func (s *tlsServer) count(result tlsResult) {
	s.results[result].Add(1)
	s.running.Add(-1)
}

// tlsHandshakeResult says what has become of a handshake, from its error alone.
func tlsHandshakeResult(err error) tlsResult {
	switch {
	case err == nil:
		return tlsOK
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return tlsGone
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return tlsTimeout
	}
	return tlsFailed
}

// compute calls crypto/tls when it is the turn of t.
func (s *tlsServer) compute(t *tlsConn) error {
	defer s.endTurn(t)
	if err := s.takeTurn(t); err != nil {
		return err
	}
	return t.Conn.Handshake()
}

// takeTurn waits for the turn of t to compute. It returns an error if t.expired is closed before:
// a handshake that is late for its client only keeps others waiting.
func (s *tlsServer) takeTurn(t *tlsConn) error {
	if isClosed(t.expired) {
		return errHandshakeOver
	}
	select {
	case <-t.expired:
		return errHandshakeOver
	case s.computing <- struct{}{}:
		t.computes = true
		return nil
	}
}

// endTurn ends the turn of t, if it has that.
func (s *tlsServer) endTurn(t *tlsConn) {
	if t.computes {
		t.computes = false
		<-s.computing
	}
}

// pause calls wait, which reads from the client of a handshake, or writes to it. Meanwhile
// the handshake does not compute, so another one may. end stops wait; any goroutine may call
// it: see tlsHandshakeList.during. pause returns when it is the turn of t again, or the error of
// takeTurn.
func (s *tlsServer) pause(t *tlsConn, end, wait func()) error {
	s.endTurn(t)
	s.waiting.during(end, wait)
	return s.takeTurn(t)
}

// writeMetrics writes how many handshakes there were, and how long they took.
func (s *tlsServer) writeMetrics(m metricsWriter) {
	m.single("router_tls_handshakes_in_progress", "gauge", "TLS handshakes under way.", float64(s.running.Load()))
	sample := m.family("router_tls_handshakes_total", "counter", "TLS handshakes that ended, by result.")
	for r := range numTLSResults {
		sample(float64(s.results[r].Load()), "result", r.String())
	}
	m.single("router_tls_handshakes_resumed_total", "counter",
		"TLS handshakes that went on with an earlier session of the client.", float64(s.resumed.Load()))
	s.times.write(m, "router_tls_handshake_duration_seconds", "How long the TLS handshakes that are ok took, with the waits for the client.")
}

// tlsHandshakeList has the handshakes that wait for their clients, by when that began.
type tlsHandshakeList struct {
	limit int

	mu  sync.Mutex
	all list.List // of func(), which end them. Guarded by mu.
}

// during calls wait, which waits for the client of a handshake. Meanwhile the handshake is in
// the list. If the list is full, during first ends the handshake that has waited for longest,
// to make room: it calls the end of that handshake. end must not block. It may be called after
// wait has returned.
func (l *tlsHandshakeList) during(end, wait func()) {
	l.mu.Lock()
	place := l.all.PushBack(end)
	var first *list.Element
	if l.all.Len() > l.limit {
		first = l.all.Front()
		l.all.Remove(first)
	}
	l.mu.Unlock()
	if first != nil {
		first.Value.(func())() // without mu: it takes other locks
	}
	wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all.Remove(place) // nothing, if it was ended
}

// tlsConn is a client's connection whose TLS the router ends. At first the goroutine of a
// fastConn owns it, or net/http; then the session: its poller, with mu held, or the two
// goroutines of relay_portable.go. Close, which net/http and relay_portable.go call, ends
// the TLS and closes the connection under it. A fastConn and a poller close the socket
// alone.
type tlsConn struct {
	*tls.Conn
	transport tlsTransport
	ended     error // why a session's stream has ended; nil if it has not

	// Owned by who reads.
	computes bool            // its handshake has a turn to compute
	expired  <-chan struct{} // see tlsServer.handshake
	taken    int             // bytes of the client since its last data
	limit    int             // of taken
}

// tlsTransport is what is under a tlsConn: a client's connection, or what reads and
// writes its socket on the fast path or in a poller. Who owns the tlsConn may change it
// between two calls of it.
type tlsTransport struct {
	net.Conn
	conn    *tlsConn // over it
	relayed bool     // the tlsConn is a session's
}

// Read returns errTruncated at the end of a session's stream. crypto/tls takes an end
// between two records for a regular one otherwise. It returns errTooMuchOverhead above the
// limit.
func (t *tlsTransport) Read(b []byte) (int, error) {
	if t.relayed {
		b = b[:min(len(b), maxTLSReadAhead)]
	}
	n, err := t.Conn.Read(b)
	t.conn.taken += n
	switch {
	case t.conn.taken > t.conn.limit:
		return 0, errTooMuchOverhead
	case t.relayed && errors.Is(err, io.EOF):
		err = errTruncated
	}
	return n, err
}

// errTruncated is returned when a client ends its connection without the alert
// close_notify: what came may not be all that it has sent (RFC 8446 §6.1).
var errTruncated = errors.New("the TLS stream ended without close_notify")

// errNoBytesYet is returned by a transport that must not wait for bytes. For crypto/tls
// it is temporary: the next read goes on where this one has stopped.
const errNoBytesYet noBytesYet = "no bytes yet"

// noBytesYet is a temporary error.
type noBytesYet string

func (e noBytesYet) Error() string { return string(e) }
func (noBytesYet) Timeout() bool   { return true }
func (noBytesYet) Temporary() bool { return true }

// newTLSConn returns a connection over the transport, which may be nil for now. Its handshake
// has not been done.
func newTLSConn(transport net.Conn, config *tls.Config) *tlsConn {
	t := &tlsConn{limit: maxTLSHandshakeBytes}
	if config.ClientAuth != tls.NoClientCert {
		t.limit = maxTLSHandshakeBytesWithClientCA
	}
	t.setTransport(transport, false)
	t.Conn = tls.Server(&t.transport, config)
	return t
}

// Read does the handshake first, if the transport is a lazyTransport.
func (t *tlsConn) Read(b []byte) (int, error) {
	if lazy, ok := t.transport.Conn.(*lazyTransport); ok {
		if err := lazy.handshake(); err != nil {
			return 0, err
		}
	}
	n, err := t.Conn.Read(b)
	if n > 0 {
		t.taken = 0
	}
	return n, err
}

// Write returns an error before Read has done the handshake: net/http may answer what it
// could not read.
func (t *tlsConn) Write(b []byte) (int, error) {
	if lazy, ok := t.transport.Conn.(*lazyTransport); ok && lazy.state.Load() != lazyDone {
		return 0, errTLSHandshake
	}
	return t.Conn.Write(b)
}

// socket returns the connection that is under all others, which package net has made.
func (t *tlsConn) socket() net.Conn {
	conn := t.transport.Conn
	for {
		over, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return conn
		}
		conn = over.NetConn()
	}
}

// setTransport replaces the transport. relayed says that t is a session's from now on.
func (t *tlsConn) setTransport(transport net.Conn, relayed bool) {
	t.transport = tlsTransport{transport, t, relayed}
	if relayed {
		t.taken, t.limit = 0, maxTLSBytesWithoutData
	}
}

// closeNotifyTime is how long Close waits for a client that does not take close_notify, or
// an answer that crypto/tls has for it.
const closeNotifyTime = time.Second

// Close ends the TLS, if the client takes that, and closes the connection. crypto/tls alone
// waits for 5 s, or for ever if the client asks for new keys and reads nothing.
func (t *tlsConn) Close() error {
	conn := t.transport.Conn
	if lazy, ok := conn.(*lazyTransport); ok && lazy.state.Load() != lazyDone {
		return conn.Close()
	}
	late := time.AfterFunc(closeNotifyTime, func() { conn.Close() })
	defer late.Stop()
	return t.Conn.Close()
}

// CloseWrite ends this side: first its TLS, then its TCP. Nothing can be written after it.
// crypto/tls waits up to 5 s for a client that does not take close_notify.
func (t *tlsConn) CloseWrite() error {
	err := t.Conn.CloseWrite()
	return errors.Join(err, t.socket().(interface{ CloseWrite() error }).CloseWrite())
}

// takeBuffered returns the bytes that the client has sent and that crypto/tls has received
// already, decrypted. It does not read the socket, and leaves t without such bytes.
func (t *tlsConn) takeBuffered() []byte {
	before := t.transport
	defer func() { t.transport = before }()
	t.setTransport(writeOnly{before.Conn}, false)
	var b bytes.Buffer
	b.ReadFrom(t.Conn) // the next read returns the error again
	return b.Bytes()
}

// writeOnly is a transport that has no bytes to read.
type writeOnly struct{ net.Conn }

func (writeOnly) Read([]byte) (int, error) { return 0, errNoBytesYet }

// state returns what the handshake has agreed on, or nil for no TLS.
func (t *tlsConn) state() *tls.ConnectionState {
	if t == nil {
		return nil
	}
	state := t.ConnectionState()
	return &state
}

// unwrapTLS returns the socket's connection under conn, and conn itself, if that is a tlsConn;
// else conn and nil.
func unwrapTLS(conn net.Conn) (net.Conn, *tlsConn) {
	if t, ok := conn.(*tlsConn); ok {
		return t.socket(), t
	}
	return conn, nil
}

// cleartextAnswer returns what to send to a client whose handshake has failed with err because it
// has sent an HTTP request: an answer without TLS. It returns nil if err says anything else.
func cleartextAnswer(err error) []byte {
	var header tls.RecordHeaderError
	if !errors.As(err, &header) || header.Conn == nil || !looksLikeHTTP(header.RecordHeader) {
		return nil
	}
	return []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n" +
		"Content-Length: 24\r\n\r\nthis port expects TLS.\r\n")
}

// looksLikeHTTP reports whether the bytes may begin an HTTP/1 request.
func looksLikeHTTP(begin [5]byte) bool {
	methods := []string{"GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "PATCH", "DELET", "CONNE"}
	return slices.Contains(methods, string(begin[:]))
}
