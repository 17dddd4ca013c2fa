package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// limits bound what clients can take.
type limits struct {
	holdTimeout      time.Duration // how long an upgrade waits for its owner
	handshakeTimeout time.Duration // how long the backend has to answer, and the client to take the answer
	headerTimeout    time.Duration // how long a client has to send its request's head
	headerBytes      int           // of a request's or an answer's head
	headerFields     int           // fields of a request's head
	sessions         int           // open at once
	pendingUpgrades  int           // upgrades under way at once
}

// proxy is the HTTP half of a connection: it answers a request, or makes it a
// session and hands that to the relay.
type proxy struct {
	// Static after construction.
	router    *router
	backends  *backends
	relay     *relay
	mover     *mover
	limits    limits
	podName   string
	namespace func(*http.Request) (string, *refusal) // pathNamespace or hostNamespace
	log       *slog.Logger

	readers sync.Pool // of *bufio.Reader

	pendingUpgrades     upgradeLimit   // of the upgrades under way
	handshakes          atomic.Int64   // upgrades so far, with those that were refused
	headBytes           atomic.Int64   // bytes of the heads of those that are held, or net/http has
	inFlight            sync.WaitGroup // requests that net/http has, and clients that are held
	unhandled           sync.WaitGroup // requests that the event loop has read and left to net/http, and ServeHTTP has not yet
	results             [numResults]atomic.Int64
	logThrottles        [numResults]throttle
	misdirectedThrottle throttle // of what misdirected logs
}

// ServeHTTP is the one place that answers a request that does not become a
// session, except for what net/http refuses by itself.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	markRequestRead(r.Context())
	p.inFlight.Add(1)
	defer p.inFlight.Done()
	result, err := p.upgrade(w, r)
	p.results[result].Add(1)
	p.logFailure(r, result, err)
	var refused *refusal
	switch {
	case errors.Is(err, http.ErrAbortHandler):
		panic(http.ErrAbortHandler)
	case errors.As(err, &refused):
		refused.writeResponse(w, p.limits.headerTimeout)
	}
}

// logFailure logs what an operator would look into: not what clients do wrong, and
// no more than a line a second for each result. What a client or a backend has sent
// is cut: a head of 16 KiB is four times that in quotes.
func (p *proxy) logFailure(r *http.Request, result result, err error) {
	if err == nil || result.status() < http.StatusInternalServerError || result == resultClientGone || result == resultOtherResponse {
		return
	}
	if omitted, ok := p.logThrottles[result].allow(time.Second); ok {
		p.log.Warn("upgrade failed", "path", fmt.Sprintf("%.200s", r.URL.Path), "client", lastClientAddrs(forwardedFor(r)),
			"result", result.String(), "reason", fmt.Sprintf("%.300s", err.Error()), "omitted", omitted)
	}
}

// upgrade makes the request a session. A *refusal means that nothing was
// answered yet.
func (p *proxy) upgrade(w http.ResponseWriter, r *http.Request) (result result, err error) {
	pending := takePendingUpgrade(r.Context())
	backendConn, podUID := pending.backendConn, pending.podUID
	namespace, backend, table, refused := p.admit(r)
	if refused != nil {
		return refuseAndClose(backendConn, refused)
	}
	result = resultBadGateway
	defer func() { // also for a panic, which net/http logs
		if result != resultOK { // else handOver has done it
			p.pendingUpgrades.release(backend)
		}
	}()
	setBackend := func(another int) { p.pendingUpgrades.transfer(backend, another); backend = another }
	switch {
	case backendConn != nil:
		setBackend(pending.owner)
	case pending.dialErr != nil:
		return p.unreachableError(r.Context(), backend, pending.dialErr, nil)
	}
	clientCtx, holdCtx, cancel := p.upgradeContexts(r, pending.holdDeadline)
	defer cancel()
	clientAddrs := forwardedFor(r)
	head := slices.Clip(startRequestHead(r, clientAddrs, p.podName)) // it is ended for each owner that is asked
	if !p.reserveHead(len(head)) {
		return refuseAndClose(backendConn, refuse(resultMaxPending, "the heads of the pending upgrades have %d bytes each, the limit", headBytesPerUpgrade))
	}
	defer p.headBytes.Add(-int64(len(head)))
	r = trimRequest(r, clientCtx)
	owner := func() (int, error) {
		owner, stamp, refused := p.owner(namespace)
		if refused != nil {
			return backend, refused
		}
		table = stamp
		setBackend(owner)
		return owner, p.waitForOldPod(holdCtx, namespace, owner)
	}
	for misdirected := error(nil); ; {
		var request []byte
		if backendConn == nil {
			if backendConn, podUID, err = p.dialOwner(holdCtx, namespace, owner); err != nil {
				return p.unreachableError(holdCtx, backend, err, misdirected)
			}
			request = finishRequestHead(head, table, p.backends.name(backend))
		}
		s := newSession(namespace, backend, clientAddrs)
		s.podUID = podUID
		result, err = p.completeUpgrade(w, r, s, backendConn, request)
		switch {
		case errors.Is(err, errMisdirected):
			misdirected = err
		case !errors.Is(err, errOwnerChanged):
			return result, err
		}
		backendConn = nil
	}
}

// refuseAndClose closes the owner's connection, if there is one, for an upgrade that is
// refused.
func refuseAndClose(backendConn net.Conn, refused *refusal) (result, error) {
	if backendConn != nil {
		backendConn.Close()
	}
	return refused.result, refused
}

// trimRequest drops the fields of a request that is to be held, but for those that
// report and net/http still ask for, and returns it with the context.
func trimRequest(r *http.Request, ctx context.Context) *http.Request {
	r.Header = http.Header{"X-Forwarded-For": r.Header["X-Forwarded-For"], "Expect": r.Header["Expect"]}
	return r.WithContext(ctx)
}

// headBytesPerUpgrade is how many bytes each of the upgrades that may be under way may have for
// its head: together they may have that often as many. One may have more, if others
// have less.
const headBytesPerUpgrade = 2 << 10

// reserveHead counts n bytes more of heads that are kept, and reports whether there may be
// so many. If so, the caller counts them back.
func (p *proxy) reserveHead(n int) bool {
	if p.headBytes.Add(int64(n)) <= int64(p.limits.pendingUpgrades)*headBytesPerUpgrade {
		return true
	}
	p.headBytes.Add(-int64(n))
	return false
}

// dialOwner is backends.dialOwner for the owner of the namespace, and looks once more whether
// that may get sessions of it.
func (p *proxy) dialOwner(holdCtx context.Context, namespace string, owner func() (int, error)) (net.Conn, string, error) {
	for {
		conn, podUID, err := p.backends.dialOwner(holdCtx, owner)
		if err != nil || p.relay.oldPodSessionsDone(namespace) == nil {
			return conn, podUID, err
		}
		conn.Close() // the pod was replaced since owner was asked
	}
}

// waitForOldPod returns when no session of the namespace is with a pod that is its
// backend no more, or ctx has ended.
func (p *proxy) waitForOldPod(ctx context.Context, namespace string, backend int) error {
	over := p.relay.oldPodSessionsDone(namespace)
	if over == nil {
		return nil
	}
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%q still has a session with the previous pod of %s", namespace, p.backends.name(backend))
	}
}

// halfClosedHold bounds how long a client waits for its owner that has ended its side of
// the connection.
const halfClosedHold = time.Second

// upgradeContexts returns the contexts of an upgrade. clientCtx ends when the client is gone or the
// router stops, hold also when the owner was waited for long enough: at until, if the
// upgrade has waited before. The caller calls cancel.
//
// A client that has sent its request and a FIN may still listen (a half-close, RFC 9293
// §3.6), and then gets its answer; most have left, and that looks the same until
// something is sent to them. So the answer of an owner that was asked is waited for: it
// is about to come, or -handshake-timeout is. But a place among those that are held is
// theirs for halfClosedHold only; then they get 503. net/http ends the request's context
// at a FIN as at a RST, which the connection knows from each other.
func (p *proxy) upgradeContexts(r *http.Request, until time.Time) (clientCtx, holdCtx context.Context, cancel func()) {
	request := r.Context()
	conn := request.Value(clientConnKey{}).(*clientConn)
	clientCtx, cancelClient := context.WithCancelCause(context.WithoutCancel(request))
	if until.IsZero() {
		until = time.Now().Add(p.limits.holdTimeout)
	}
	holdCtx, cancelHold := context.WithDeadline(clientCtx, until)
	stopServerWatch := context.AfterFunc(conn.serverCtx, func() { cancelClient(context.Cause(conn.serverCtx)) })
	stopRequestWatch := context.AfterFunc(request, func() {
		if conn.readEOF.Load() {
			time.AfterFunc(halfClosedHold, cancelHold)
			return
		}
		cancelClient(context.Cause(request))
	})
	return clientCtx, holdCtx, func() {
		stopServerWatch()
		stopRequestWatch()
		cancelHold()
		cancelClient(nil)
	}
}

// errOwnerChanged says that the namespace got another owner during the handshake: the
// client, which knows of nothing yet, is to be connected to that.
var errOwnerChanged = errors.New("the namespace got another owner")

// errMisdirected says that what was dialled for a backend is another one (421).
var errMisdirected = errors.New("another backend answers at its address")

// admit checks an upgrade request, and returns its namespace, and what owner does. It
// takes a place of the owner's, which the caller gives back, or handOver.
func (p *proxy) admit(r *http.Request) (namespace string, owner int, table string, refused *refusal) {
	p.handshakes.Add(1)
	if n := countFields(r.Header); n > p.limits.headerFields {
		return "", 0, "", refuse(resultBadHead, "too many header fields: at most %d are allowed (got %d)", p.limits.headerFields, n)
	}
	if namespace, refused = p.namespace(r); refused == nil {
		refused = checkUpgrade(r)
	}
	if refused == nil {
		owner, table, refused = p.owner(namespace)
	}
	if refused != nil {
		return "", 0, "", refused
	}
	limit := p.limits.pendingUpgrades
	switch all, own, acquired := p.pendingUpgrades.acquire(owner, p.router.table().backends.count, limit); {
	case !acquired:
		refused = refuse(resultMaxPending, "%d upgrades to %s are pending, its share of %d; %d in all", own, p.backends.name(owner), limit, all)
	case p.relay.size()+all > p.limits.sessions:
		p.pendingUpgrades.release(owner)
		refused = refuse(resultMaxSessions, "%d sessions are open, the limit", p.limits.sessions)
	}
	return namespace, owner, table, refused
}

// freeMemory is tidy for the memory of upgrades.
func (p *proxy) freeMemory(ctx context.Context) {
	freeMemory(ctx, func() int { return int(p.handshakes.Load()) })
}

const (
	minHandshakesToFree = 1000        // handshakes
	maxCalmHandshakes   = 10          // most that begin in freeMemoryInterval while it is calm
	freeMemoryInterval  = time.Second // between two looks
)

// freeMemory gives the memory back that many handshakes took, as soon as it is calm
// again, until ctx ends. By itself the runtime would keep it for minutes, as it
// collects garbage when the heap has grown to twice its size: a router of idle
// sessions would have more garbage than sessions. begun is how many there were.
func freeMemory(ctx context.Context, begun func() int) {
	ticker := time.NewTicker(freeMemoryInterval)
	defer ticker.Stop()
	var freed, before int
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := begun()
		if now-before <= maxCalmHandshakes && now-freed >= minHandshakesToFree {
			debug.FreeOSMemory()
			freed = now
		}
		before = now
	}
}

// owner returns the backend that owns the namespace, and the stamp of the
// table that says so.
func (p *proxy) owner(namespace string) (int, string, *refusal) {
	t := p.router.table()
	if t == nil {
		return 0, "", refuse(resultNoTable, "no overrides have been read yet")
	}
	owner, ok := t.owner(namespace)
	if !ok {
		return 0, "", refuse(resultUnresolved, "the override of %q is invalid or conflicts with another, and its previous owner is not known: see /owner", namespace)
	}
	return owner, t.stamp, nil
}

// unreachableError says why there is no connection to the owner: err, and before that
// astray, if another backend answered in its place.
func (p *proxy) unreachableError(holdCtx context.Context, backend int, err, misdirected error) (result, error) {
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return refused.result, refused
	case errors.Is(holdCtx.Err(), context.Canceled):
		refused = contextRefusal(holdCtx)
	case misdirected != nil || errors.Is(err, errMisdirected):
		refused = refuse(resultMisdirected, "%s could not be reached within %s: %v; last error: %v",
			p.backends.name(backend), p.limits.holdTimeout, cmp.Or(misdirected, err), err)
	default:
		refused = refuse(resultHoldTimeout, "%s could not be reached within %s: %v", p.backends.name(backend), p.limits.holdTimeout, err)
	}
	return refused.result, refused
}

// completeUpgrade sends the backend the request for an upgrade on its connection, of
// which it takes care, and hands s to the relay or passes the backend's other
// answer on. An empty request was sent before.
func (p *proxy) completeUpgrade(w http.ResponseWriter, r *http.Request, s *session, backendConn net.Conn, request []byte) (result, error) {
	handedOver := false
	defer func() {
		if !handedOver {
			backendConn.Close()
		}
	}()
	// The request's context bounds the handshake only: a client that leaves
	// need not wait for the backend's answer.
	stop := context.AfterFunc(r.Context(), func() { backendConn.Close() })
	defer stop()
	backendConn.SetDeadline(time.Now().Add(p.limits.handshakeTimeout))
	br := p.newReader(nil)
	resp, fromBackend, err := handshake(backendConn, br, request, p.limits.headerBytes)
	if err != nil {
		return p.handshakeError(r.Context(), s.backend, err)
	}
	if resp.StatusCode == http.StatusMisdirectedRequest {
		return p.handleMisdirected(s.backend, backendConn.RemoteAddr())
	}
	p.backends.queues.clearMisdirected(s.backend)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return p.passResponse(w, resp, backendConn)
	}
	if !stop() {
		return p.handshakeError(r.Context(), s.backend, r.Context().Err())
	}
	if p.mover.shouldMove(s) {
		return resultBadGateway, errOwnerChanged
	}
	head := switchingProtocolsHead(resp)
	if expectsContinue(r) {
		head = append([]byte("HTTP/1.1 100 Continue\r\n\r\n"), head...)
	}
	clientConn, fromClient, err := p.hijack(w, head)
	if err != nil {
		return resultClientGone, err
	}
	backendConn.SetDeadline(time.Time{})
	handedOver = true
	backendConn, rest := unwrap(backendConn)
	early := [2][]byte{fromClient, slices.Concat(fromBackend, rest)}
	p.readers.Put(br)
	p.handOver(s, func() { p.relay.startSession(s, [2]net.Conn{clientConn, backendConn}, early) })
	return resultOK, nil
}

// handleMisdirected takes note that what was dialled at addr for a backend has answered
// 421: it is another one, and the backend is to be looked for again.
func (p *proxy) handleMisdirected(backend int, addr net.Addr) (result, error) {
	err := fmt.Errorf("%s at %s: %w (421)", p.backends.name(backend), addr, errMisdirected)
	p.backends.setMisdirected(backend, err)
	if omitted, ok := p.misdirectedThrottle.allow(time.Second); ok {
		p.log.Warn("another backend answered", "backend", p.backends.name(backend), "address", addr.String(), "omitted", omitted)
	}
	return resultMisdirected, err
}

// handshakeError says why there is no answer of the backend.
func (p *proxy) handshakeError(clientCtx context.Context, backend int, err error) (result, error) {
	var timeout net.Error
	var refused *refusal
	switch {
	case clientCtx.Err() != nil:
		refused = contextRefusal(clientCtx)
	case errors.As(err, &timeout) && timeout.Timeout():
		refused = refuse(resultGatewayTimeout, "%s gave no answer within %s", p.backends.name(backend), p.limits.handshakeTimeout)
	default:
		refused = refuse(resultBadGateway, "%s: %v", p.backends.name(backend), err)
	}
	return refused.result, refused
}

// passResponse gives the client the backend's answer as it is: status, headers, body.
// The body has as long as the head had. One that is cut off is passed on as far as it
// came, after its status.
func (p *proxy) passResponse(w http.ResponseWriter, resp *http.Response, backendConn net.Conn) (result, error) {
	deadline := time.Now().Add(p.limits.handshakeTimeout)
	backendConn.SetDeadline(deadline)
	http.NewResponseController(w).SetWriteDeadline(deadline)
	upgrade := resp.Header["Upgrade"] // what a 426 is about (RFC 9110 §15.5.22)
	removeHopByHopHeaders(resp.Header)
	w.Header()["Content-Type"] = nil // keeps net/http from guessing one
	for name, values := range resp.Header {
		w.Header()[wireName(name)] = values
	}
	if resp.StatusCode == http.StatusUpgradeRequired && len(upgrade) > 0 {
		w.Header()["Upgrade"] = upgrade
		w.Header()["Connection"] = []string{"Upgrade"} // which names it (RFC 9110 §7.8)
	}
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(w, resp.Body); err != nil {
		http.NewResponseController(w).Flush()            // the status and what there is: all else is dropped
		return resultOtherResponse, http.ErrAbortHandler // the client must not take half a body for a whole one
	}
	return resultOtherResponse, nil
}

// hijack takes the client's connection from net/http and sends the 101 on it. It
// returns the connection with what the client has sent after its request. On an
// error the connection is closed, and nothing can be answered any more
// (http.Hijacker: the caller owns the connection and what its reader holds).
func (p *proxy) hijack(w http.ResponseWriter, head []byte) (net.Conn, []byte, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("hijack: %w", err)
	}
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // what is buffered: no error
	client, rest := unwrap(conn.(*clientConn).Conn)
	early = slices.Concat(early, rest)
	client.SetDeadline(time.Now().Add(p.limits.handshakeTimeout))
	if _, err := client.Write(head); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("write the 101: %w", err)
	}
	client.SetDeadline(time.Time{})
	return client, early, nil
}

// handOver has start give s to the relay, which from here on is the only one to
// touch its sockets. A table that was swapped since s's owner was asked may have
// given it another one. The relay knows s before the table is read again here, and
// the mover takes its snapshot of the sessions after the swap. The relay's lock puts
// these two in order: when s comes first, the snapshot has s; when the snapshot
// comes first, this check sees the new table.
func (p *proxy) handOver(s *session, start func()) {
	p.pendingUpgrades.release(s.backend) // before, or the limit of sessions would count it twice
	start()
	if p.mover.shouldMove(s) {
		s.closeGracefully(causeMoved, nil)
	}
}

// newReader returns a pooled reader of r. The caller puts it back into readers.
func (p *proxy) newReader(r io.Reader) *bufio.Reader {
	br, _ := p.readers.Get().(*bufio.Reader)
	if br == nil {
		return bufio.NewReader(r)
	}
	br.Reset(r)
	return br
}

// writeMetrics writes what became of the upgrades, and how many are under way.
func (p *proxy) writeMetrics(m metricsWriter) {
	m.family("router_upgrades_total", "counter", "Upgrade requests, by result.")
	for r := range numResults {
		m.sample("router_upgrades_total", float64(p.results[r].Load()), "result", r.String())
	}
	pending, _ := p.pendingUpgrades.inUse(0)
	m.single("router_pending_upgrades", "gauge", "Upgrades that wait for their owner, dial it, or wait for its answer.", float64(pending))
}
