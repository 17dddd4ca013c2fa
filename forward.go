package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// forwarder forwards plain requests, those that are no upgrades, to owners of namespaces.
// httputil.ReverseProxy passes each answer on. Its transport is not http.Transport, but
// proxy.roundTrip, which exchange.serve gives to it: http.Transport sends a request again
// when an idle connection was closed, and does not say which connection an owner may still
// read a request from.
type forwarder struct {
	// Static after construction.
	lifetime context.Context // all exchanges end with it: see stop
	end      context.CancelCauseFunc
	errorLog *stdlog.Logger // of httputil.ReverseProxy; proxy.logFailure logs instead
	idle     *idleConns
	buffers  sync.Pool // of *[forwardBuffer]byte

	running   waitCount    // exchanges: stop waits for them
	atOwners  atomic.Int64 // of these, those that an owner has got
	cuts      atomic.Int64 // exchanges that ended by errMoved or errDraining
	results   [numResults]atomic.Int64
	durations *histogram // of plain requests
}

const (
	// forwardBuffer is how many bytes of a body are carried at once.
	forwardBuffer = 32 << 10
	// maxShortBody is the longest body, in bytes, that is read before its request is sent.
	// Such a request can be sent to another owner too, if the first has not taken it.
	maxShortBody = 8 << 10
	// bodyGrace is how long the end of a body is waited for after the end of its answer.
	bodyGrace = 50 * time.Millisecond
	// lingerTime is how long a client that has its answer may go on to send its body:
	// a close would be a reset, which may take the answer from it (RFC 9112 §9.6).
	lingerTime = time.Second
)

// errClientGone is the cause that ends an exchange whose client has left.
var errClientGone = errors.New("the client left")

// errBadBody is the cause that ends an exchange whose body is not what HTTP allows.
var errBadBody = errors.New("the body must be valid chunks (RFC 9112 §7.1)")

// errMoved is the cause that ends an exchange whose namespace has another owner now, or the
// same owner with another pod, or whose router was removed from the members.
var errMoved = errors.New("its namespace moved to another owner, its backend was replaced, or this router is no member of the hand-off any more")

// newForwarder returns a forwarder. addDescriptors is called for the descriptors of
// connections that it keeps. The caller calls stop.
func newForwarder(addDescriptors func(count int)) *forwarder {
	f := &forwarder{
		errorLog:  stdlog.New(io.Discard, "", 0),
		durations: newHistogram(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60),
		idle: &idleConns{
			addDescriptors: addDescriptors, byPod: map[backendPod][]*ownerConn{},
		},
	}
	f.buffers.New = func() any { return new([forwardBuffer]byte) }
	f.lifetime, f.end = context.WithCancelCause(context.Background())
	return f
}

// size returns how many requests owners have got whose answers have not ended.
func (f *forwarder) size() int {
	if f == nil {
		return 0
	}
	return int(f.atOwners.Load())
}

// stop waits until all exchanges have ended, at most until ctx ends. Then it cuts them,
// and closes all idle connections. There must be no new exchanges.
func (f *forwarder) stop(ctx context.Context) {
	if f == nil {
		return
	}
	cut := context.AfterFunc(ctx, func() { f.end(errDraining) })
	f.running.wait()
	cut()
	f.idle.close()
}

// Get returns a buffer for httputil.ReverseProxy.
func (f *forwarder) Get() []byte { return f.buffers.Get().(*[forwardBuffer]byte)[:] }

// Put takes a buffer that Get has returned.
func (f *forwarder) Put(b []byte) { f.buffers.Put((*[forwardBuffer]byte)(b)) }

// writeMetrics writes how many plain requests there were and are, and how long they took.
func (f *forwarder) writeMetrics(m metricsWriter) {
	sample := m.family("router_http_requests_total", "counter",
		"Plain requests, by result.")
	for r := range numResults {
		if !r.info().upgradeOnly {
			sample(float64(f.results[r].Load()), "result", r.String())
		}
	}
	m.single("router_http_requests_in_progress", "gauge", "Plain requests in progress.",
		float64(f.running.size()))
	m.single("router_http_requests_cut_total", "counter",
		"Plain requests that the router cut, as their namespaces moved or it stopped.",
		float64(f.cuts.Load()))
	f.durations.write(m, "router_http_request_duration_seconds",
		"Time from the head of a plain request to the end of its answer.")
}

// exchange is one plain request and its answer. Its handler's goroutine owns it, except
// what mu guards and what sendBody writes.
type exchange struct {
	*pendingRequest // its slot in the limits, its owner and its flight; nil at first

	// Static after construction.
	forwarder *forwarder
	w         http.ResponseWriter
	r         *http.Request // as net/http has read it
	client    *clientConn
	streams   bool // the body is sent as it comes
	arrived   time.Time
	ctx       context.Context // ends with the exchange; its cause says why
	cancel    context.CancelCauseFunc

	unwatch, unwatchClient func() bool // end the calls of interrupt and clientLeft

	holdCtx    context.Context // bounds all waits for owners; nil before the first
	cancelHold func()

	head         []byte                 // what startPlainHead has returned, without room
	shortBody    []byte                 // the body, if it was read before; its length is at most maxShortBody
	atOwner      bool                   // in forwarder.atOwners
	upgradeField []string               // the field of the answer: a 426 needs it (RFC 9110 §15.5.22)
	trace        *httptrace.ClientTrace // of ReverseProxy: it passes interim answers on, see pass1xx
	reverse      httputil.ReverseProxy
	body         *bodyState // nil for a body that does not stream, or has not begun

	// What came of it, for the metrics and the log.
	result result
	err    error

	// Guarded by mu.
	mu       sync.Mutex
	conn     *ownerConn // to the owner, while it may have the request
	answered bool       // the head of the answer was passed on
	complete bool       // the answer was read to its end
	over     bool       // the handler is done with client
}

// begin begins the exchange of a request. The caller calls finish.
func (f *forwarder) begin(w http.ResponseWriter, r *http.Request) *exchange {
	f.running.add(1)
	x := &exchange{forwarder: f, w: w, r: r, arrived: time.Now(), result: resultClientGone}
	x.streams = r.ContentLength < 0 || r.ContentLength > maxShortBody
	x.client = clientOf(r.Context())
	x.ctx, x.cancel = context.WithCancelCause(f.lifetime)
	x.unwatch = context.AfterFunc(x.ctx, x.interrupt)
	x.unwatchClient = context.AfterFunc(r.Context(), x.clientLeft)
	return x
}

// finish ends the exchange and counts it.
func (x *exchange) finish() {
	x.mu.Lock()
	x.over = true
	x.mu.Unlock()
	x.unwatch()
	x.unwatchClient()
	cause := context.Cause(x.ctx)
	if (!x.complete && cause == errMoved) || cause == errDraining {
		x.forwarder.cuts.Add(1)
	}
	x.cancel(nil)
	if x.cancelHold != nil {
		x.cancelHold()
	}
	if x.pendingRequest != nil {
		x.abandonOwner() // after a panic
		x.pendingRequest.close()
	}
	f := x.forwarder
	if x.atOwner {
		f.atOwners.Add(-1)
	}
	f.results[x.result].Add(1)
	f.durations.observe(time.Since(x.arrived))
	f.running.add(-1)
}

// clientLeft is called when net/http has seen the end of the client's stream. A client
// that has only ended its side of the connection may still listen, and gets what comes
// within halfClosedHold: see proxy.requestContexts.
func (x *exchange) clientLeft() {
	if x.client.readEOF.Load() {
		time.AfterFunc(halfClosedHold, func() { x.cancel(errClientGone) })
		return
	}
	x.cancel(errClientGone)
}

// interrupt ends all reads and writes of the exchange, whose context has ended. A client
// that has got nothing of an answer yet can still get one.
func (x *exchange) interrupt() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.over {
		return
	}
	if x.conn != nil {
		x.conn.SetDeadline(pastDeadline())
	}
	if x.streams {
		x.client.SetReadDeadline(pastDeadline())
	}
	switch {
	case x.complete && context.Cause(x.ctx) == errMoved: // the owner is done with it
	case x.answered:
		x.client.SetWriteDeadline(pastDeadline())
	default:
		x.client.SetWriteDeadline(time.Now().Add(lingerTime)) // of an interim answer
	}
}

// readShortBody reads the body if it is short, within this time.
func (x *exchange) readShortBody(bound time.Duration) *refusal {
	r := x.r
	if x.streams || r.ContentLength == 0 {
		return nil
	}
	x.client.SetReadDeadline(time.Now().Add(bound))
	defer x.client.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(x.ctx, func() { x.client.SetReadDeadline(pastDeadline()) })
	defer stop()
	x.shortBody = make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, x.shortBody); err != nil {
		x.w.Header().Set("Connection", "close")
		var timeout net.Error
		switch {
		case context.Cause(x.ctx) == errDraining:
			return contextRefusal(x.ctx)
		case errors.As(err, &timeout) && timeout.Timeout():
			return refuse(resultBadRequest, "the body did not come within %s", bound)
		}
		return refuse(resultClientGone, "the client left")
	}
	return nil
}

// serve sends the client the answer that trip returns. trip returns a *refusal if there is none.
func (x *exchange) serve(trip func() (*http.Response, error)) {
	x.reverse = httputil.ReverseProxy{
		Rewrite: func(*httputil.ProxyRequest) {},
		Transport: transport(func(r *http.Request) (*http.Response, error) {
			x.trace = httptrace.ContextClientTrace(r.Context())
			return trip()
		}),
		FlushInterval:  -1,
		ErrorLog:       x.forwarder.errorLog,
		BufferPool:     x.forwarder,
		ModifyResponse: x.modifyResponse,
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) {
			if refused, ok := errors.AsType[*refusal](err); ok {
				x.result, x.err = refused.outcome()
			}
		},
	}
	// ReverseProxy needs nothing of the request: ask sends what startPlainHead has made.
	stub := &http.Request{Method: x.r.Method, URL: &url.URL{}, Header: http.Header{}}
	x.reverse.ServeHTTP(x.w, stub.WithContext(x.r.Context()))
}

// transport is an http.RoundTripper that is a function.
type transport func(r *http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// isLast reports whether the client's connection has to end with the answer, because what
// follows on it may be the rest of a body: with a body that streams and was not read to its
// end yet, or that has no length, and with HTTP/1.0, for which net/http ignores
// Transfer-Encoding.
func (x *exchange) isLast() bool {
	mayFollow := x.streams && (x.r.ContentLength < 0 || !x.body.isSent())
	return mayFollow || !x.r.ProtoAtLeast(1, 1)
}

// modifyResponse prepares the head of the answer for the client.
func (x *exchange) modifyResponse(resp *http.Response) error {
	if x.isLast() {
		resp.Header.Set("Connection", "close")
	}
	if resp.StatusCode == http.StatusUpgradeRequired && len(x.upgradeField) > 0 {
		resp.Header["Upgrade"] = x.upgradeField
		resp.Header.Add("Connection", "Upgrade") // it names Upgrade (RFC 9110 §7.8)
	}
	if len(resp.Header["Content-Type"]) == 0 {
		x.w.Header()["Content-Type"] = nil // keeps net/http from guessing one
	}
	if n := resp.ContentLength; n >= 0 && n <= int64(x.conn.br.Buffered()) {
		x.reverse.FlushInterval = 0 // all of it is there: nothing has to be sent before its end
	}
	x.mu.Lock()
	x.answered = true
	x.mu.Unlock()
	return nil
}

// ask sends the owner the request and returns its answer. The caller has begun the flight,
// and calls takeBack or abandonOwner if it does not return the answer to ReverseProxy.
func (x *exchange) ask(conn *ownerConn, head []byte, maxHead int) (*http.Response, error) {
	x.attach(conn)
	if !x.atOwner {
		x.atOwner = true
		x.forwarder.atOwners.Add(1)
	}
	x.pendingRequest.uncount()
	if x.streams {
		http.NewResponseController(x.w).EnableFullDuplex()
		if x.r.ProtoAtLeast(1, 1) && expectsContinue(x.r) {
			x.w.WriteHeader(http.StatusContinue) // else sendBody would, while pass1xx writes
		}
		x.body = &bodyState{done: make(chan struct{})}
		go x.sendBody(x.body, conn, head)
	} else if _, err := conn.Write(append(head, x.shortBody...)); err != nil {
		return nil, err
	}
	resp, err := conn.readAnswer(x.r.Method, maxHead, x.pass1xx)
	if err != nil {
		return nil, err
	}
	x.upgradeField = resp.Header["Upgrade"]
	resp.Body = &answerBody{ReadCloser: resp.Body, exchange: x, resp: resp}
	return resp, nil
}

// attach makes interrupt end the reads and writes of conn.
func (x *exchange) attach(conn *ownerConn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.conn = conn
	if x.ctx.Err() != nil {
		conn.SetDeadline(pastDeadline())
	}
}

// takeConn ends what attach began, and stops sendBody. It returns the connection, and
// whether that and the exchange are whole: all of the request was sent, and nothing was
// interrupted.
func (x *exchange) takeConn(grace time.Duration) (conn *ownerConn, whole bool) {
	whole = x.stopBody(grace)
	x.mu.Lock()
	defer x.mu.Unlock()
	conn, x.conn = x.conn, nil
	return conn, whole && x.ctx.Err() == nil
}

// stopBody waits for the end of sendBody for the time of grace, and then ends it. It
// reports whether the whole body was sent within that time: else the connection cannot be
// used again, as its deadline is over.
func (x *exchange) stopBody(grace time.Duration) bool {
	body := x.body
	if x.body = nil; body == nil {
		return true
	}
	select {
	case <-body.done:
		return body.err == nil
	case <-time.After(grace):
		body.stopped.Store(true)
		x.unwatchClient() // net/http takes any error of a read for a client that has left
		x.client.SetReadDeadline(pastDeadline())
		x.conn.SetWriteDeadline(pastDeadline())
		<-body.done
		x.client.SetReadDeadline(time.Now().Add(lingerTime)) // of net/http
		return false
	}
}

// pass1xx passes an interim answer on, except 100: the router answers Expect. HTTP/1.0
// has none (RFC 9110 §15.2). Nor does a Unix socket get one: nginx before 1.29 takes it for
// the answer, and gives the answer to the next request on the connection.
func (x *exchange) pass1xx(code int, header http.Header) error {
	_, unix := x.client.socket.(*net.UnixConn)
	if unix || code == http.StatusContinue || !x.r.ProtoAtLeast(1, 1) {
		return nil
	}
	removeHopByHopHeaders(header)
	return x.trace.Got1xxResponse(code, textproto.MIMEHeader(header))
}

// answerOver is called when the last byte of the answer was read. It keeps the connection
// for another request if it may; else the flight ends when the owner ends its side.
func (x *exchange) answerOver(resp *http.Response) {
	conn, whole := x.takeConn(bodyGrace)
	x.result = resultOK
	x.setComplete()
	if !whole || resp.Close || conn.br.Buffered() > 0 {
		x.pendingRequest.abandon(conn.unlessLost())
		return
	}
	x.endFlight()
	x.forwarder.idle.put(conn)
}

// setComplete notes that the answer was read to its end: a move does not keep it from the
// client.
func (x *exchange) setComplete() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.complete = true
	if context.Cause(x.ctx) == errMoved {
		x.client.SetWriteDeadline(time.Time{})
	}
}

// breakOff gives the request up: its answer will not be read to its end.
func (x *exchange) breakOff(err error) {
	x.abandonOwner()
	switch cause := context.Cause(x.ctx); {
	case cause == errClientGone || cause == nil && err == nil:
		x.result = resultClientGone
	case cause != nil:
		x.result, x.err = resultBrokenOff, cause
	default:
		x.result, x.err = resultBrokenOff, fmt.Errorf("the answer broke off: %w", err)
	}
	if tcp, ok := x.client.socket.(*net.TCPConn); ok && !x.r.ProtoAtLeast(1, 1) {
		// To HTTP/1.0 a FIN, or close_notify of TLS, would be the end of a whole answer.
		tcp.SetLinger(0)
		tcp.Close()
	}
}

// abandonOwner closes the connection when the owner has ended its side of it: see
// flight.abandon.
func (x *exchange) abandonOwner() {
	if conn, _ := x.takeConn(0); conn != nil {
		x.pendingRequest.abandon(conn.unlessLost())
	}
}

// takeBack closes the connection, whose owner has refused the request without working on
// it. It reports whether another owner can get the request. That takes a slot again.
func (x *exchange) takeBack() (again bool) {
	x.endFlight()
	x.abandonOwner()
	if x.streams {
		return false
	}
	x.pendingRequest.countAgain()
	x.forwarder.atOwners.Add(-1)
	x.atOwner = false
	return true
}

// failure says why the owner has given no answer.
func (x *exchange) failure(owner string, err error) *refusal {
	switch cause := context.Cause(x.ctx); cause {
	case nil:
		return refuse(resultBadGateway, "%s: %v", owner, err)
	case errClientGone:
		return refuse(resultClientGone, "%v", cause)
	case errBadBody:
		return refuse(resultBadRequest, "%v", cause)
	case errDraining:
		return refuse(resultDraining, "%v", cause)
	default:
		return refuse(resultBrokenOff, "%s worked on the request when %v", owner, cause)
	}
}

// answerBody is the body of an answer, which ends its exchange. It does not close what it
// reads from: that would read to the end of the answer.
type answerBody struct {
	io.ReadCloser
	exchange *exchange
	resp     *http.Response
	over     bool
}

// Read ends the exchange at the end of the body, or with the first error.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && !b.over {
		b.over = true
		if err == io.EOF {
			b.exchange.answerOver(b.resp)
		} else {
			b.exchange.breakOff(err)
		}
	}
	return n, err
}

// Close gives the answer up if it was not read to its end.
func (b *answerBody) Close() error {
	if !b.over {
		b.over = true
		b.exchange.breakOff(nil)
	}
	return nil
}

// bodyState says whether sendBody has ended, and how.
type bodyState struct {
	stopped atomic.Bool   // stopBody ends it
	done    chan struct{} // closed at its end
	err     error         // nil if the whole body was sent; set before done is closed
}

// isSent reports whether the whole body was read and sent. b may be nil.
func (b *bodyState) isSent() bool { return b != nil && isClosed(b.done) && b.err == nil }

// sendBody sends the head and the body as it comes. If the client does not send all of the
// body, that ends the exchange, and the owner sees that the body is not whole. If the owner
// does not take all of the body, only sendBody ends: the owner may have answered already.
func (x *exchange) sendBody(b *bodyState, conn *ownerConn, head []byte) {
	defer close(b.done)
	if _, b.err = conn.Write(head); b.err != nil {
		return
	}
	buffer := x.forwarder.buffers.Get().(*[forwardBuffer]byte)
	defer x.forwarder.buffers.Put(buffer)
	chunked := x.r.ContentLength < 0
	for {
		n, err := x.r.Body.Read(buffer[chunkRoom : forwardBuffer-len("\r\n")])
		if n > 0 {
			if _, b.err = conn.Write(frameChunk(buffer, n, chunked)); b.err != nil {
				return
			}
		}
		if err == io.EOF {
			break
		}
		if b.err = err; err != nil {
			if !b.stopped.Load() {
				x.cancel(bodyFault(err))
			}
			return
		}
	}
	if chunked {
		_, b.err = conn.Write(appendTrailers([]byte("0\r\n"), x.r.Trailer))
	}
}

// bodyFault returns the cause that ends an exchange when its body could not be read:
// errClientGone if the client's connection has ended, else errBadBody.
func bodyFault(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, new(net.Error)) {
		return errClientGone
	}
	return errBadBody
}

// chunkRoom is the room for the size of a chunk: "7ff8\r\n" is the longest.
const chunkRoom = 6

// frameChunk returns the n bytes that buffer has at chunkRoom, as a chunk (RFC 9112 §7.1)
// if chunked is true.
func frameChunk(buffer *[forwardBuffer]byte, n int, chunked bool) []byte {
	if !chunked {
		return buffer[chunkRoom : chunkRoom+n]
	}
	var room [chunkRoom]byte
	size := append(strconv.AppendInt(room[:0], int64(n), 16), "\r\n"...)
	begin := chunkRoom - len(size)
	copy(buffer[begin:], size)
	end := chunkRoom + n + copy(buffer[chunkRoom+n:], "\r\n")
	return buffer[begin:end]
}

// ownerConn is a connection to an owner for plain requests, one after the other.
type ownerConn struct {
	net.Conn
	pod       backendPod
	limit     io.LimitedReader // of the ownerConn
	br        *bufio.Reader    // of limit
	keptUntil time.Time
	lost      atomic.Bool // see isLost: either a read or a write, which go on at once, has returned that
}

// backendPod is a pod of a backend. The uid is "" if it is not known.
type backendPod struct {
	backend int
	uid     string
}

// newOwnerConn returns conn, a new connection to the pod, as one that can be kept. The caller
// owns it instead of conn.
func newOwnerConn(conn net.Conn, pod backendPod) *ownerConn {
	c := &ownerConn{Conn: conn, pod: pod}
	c.limit.R = c
	c.br = bufio.NewReader(&c.limit)
	return c
}

func (c *ownerConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.noteLoss(err)
	return n, err
}

func (c *ownerConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.noteLoss(err)
	return n, err
}

// noteLoss notes that a call has returned err, maybe nil.
func (c *ownerConn) noteLoss(err error) {
	if isLost(err) {
		c.lost.Store(true)
	}
}

// unlessLost returns the connection as flight.abandon takes it over: nil if it was lost.
func (c *ownerConn) unlessLost() net.Conn {
	if c.lost.Load() {
		c.Close()
		return nil
	}
	return c.Conn
}

// readAnswer reads the head of the final answer, of at most maxHead bytes. It calls
// pass1xx for each interim one.
func (c *ownerConn) readAnswer(
	method string, maxHead int, pass1xx func(code int, header http.Header) error,
) (*http.Response, error) {
	for {
		c.limit.N = int64(maxHead)
		resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
		switch {
		case err != nil:
			return nil, fmt.Errorf("read the answer: %w", err)
		case resp.StatusCode < 100 || resp.StatusCode > 599:
			return nil, fmt.Errorf("the status must be 100 to 599 (got %03d; RFC 9110 §15)",
				resp.StatusCode)
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, errors.New("the backend switched protocols, which nobody asked for")
		case resp.StatusCode > 199:
			c.limit.N = math.MaxInt64
			return resp, nil
		}
		if err := pass1xx(resp.StatusCode, resp.Header); err != nil {
			return nil, err
		}
	}
}

// isSilent reports whether the owner has sent nothing since its last answer: neither data
// nor the end of its stream.
func (c *ownerConn) isSilent() bool {
	socket, ok := c.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	var b [1]byte
	silent := false
	err = raw.Read(func(fd uintptr) bool {
		_, err := syscall.Read(int(fd), b[:])
		silent = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && silent
}

const (
	// keepTime is how long a connection is kept for another request. It is less than what
	// servers wait for one (gunicorn 2 s, Node.js and uvicorn 5 s): a request that a server
	// meets while it closes the connection fails.
	keepTime = 1500 * time.Millisecond
	// maxIdleConns is how many idle connections each pod has at most.
	maxIdleConns = 128
)

// idleConns keeps connections between two requests. A connection to a pod is not used for
// another pod of the same backend. None has a flight.
type idleConns struct {
	addDescriptors func(count int) // static

	// Guarded by mu.
	mu     sync.Mutex
	byPod  map[backendPod][]*ownerConn // the last is the newest
	timer  *time.Timer                 // calls expire; nil if none is to be called
	closed bool
}

// put keeps c, which has no request and no flight, for keepTime. It closes c if there are
// maxIdleConns of its pod, or after close.
func (i *idleConns) put(c *ownerConn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed || len(i.byPod[c.pod]) >= maxIdleConns {
		c.Close()
		return
	}
	i.addDescriptors(1)
	c.keptUntil = time.Now().Add(keepTime)
	i.byPod[c.pod] = append(i.byPod[c.pod], c)
	if i.timer == nil {
		i.timer = time.AfterFunc(keepTime, i.expire)
	}
}

// take returns a connection to the pod on which the next request can be sent, or nil. The
// caller owns it, and closes it or calls put. take closes those that the pod has ended.
func (i *idleConns) take(pod backendPod) *ownerConn {
	for {
		c := i.pop(pod)
		if c == nil || c.isSilent() {
			return c
		}
		c.Close()
	}
}

// pop returns the newest connection to the pod, or nil.
func (i *idleConns) pop(pod backendPod) *ownerConn {
	i.mu.Lock()
	defer i.mu.Unlock()
	conns := i.byPod[pod]
	if len(conns) == 0 {
		return nil
	}
	last := len(conns) - 1
	c := conns[last]
	conns[last] = nil
	i.byPod[pod] = conns[:last]
	i.addDescriptors(-1)
	return c
}

// expire closes the connections that were kept for keepTime.
func (i *idleConns) expire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	now, next := time.Now(), time.Time{}
	i.closeWhere(func(c *ownerConn) bool {
		if c.keptUntil.After(now) {
			next = earliest(next, c.keptUntil)
			return false
		}
		return true
	})
	i.timer = nil
	if !next.IsZero() {
		i.timer = time.AfterFunc(next.Sub(now), i.expire)
	}
}

// closeBackend closes the connections to all pods of the backend.
func (i *idleConns) closeBackend(backend int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closeWhere(func(c *ownerConn) bool { return c.pod.backend == backend })
}

// close closes all connections, and from then on those that put gets.
func (i *idleConns) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closed = true
	i.closeWhere(func(*ownerConn) bool { return true })
	if i.timer != nil {
		i.timer.Stop()
	}
}

// closeWhere closes the connections for which match returns true. The caller holds mu.
func (i *idleConns) closeWhere(match func(*ownerConn) bool) {
	for pod, conns := range i.byPod {
		left := slices.DeleteFunc(conns, func(c *ownerConn) bool {
			if !match(c) {
				return false
			}
			i.addDescriptors(-1)
			c.Close()
			return true
		})
		if i.byPod[pod] = left; len(left) == 0 {
			delete(i.byPod, pod)
		}
	}
}
