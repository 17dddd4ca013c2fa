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
	hold        time.Duration // how long an upgrade waits for its owner
	handshake   time.Duration // how long the backend has to answer, and the client to take the answer
	headerTime  time.Duration // how long a client has to send its request's head
	headerBytes int           // of a request's or an answer's head
	headerLines int           // fields of a request's head
	sessions    int           // open at once
	waiting     int           // upgrades under way at once
}

// proxy is the HTTP half of a connection: it answers a request, or makes it a
// session and hands that to the relay.
type proxy struct {
	// Static after construction.
	router    *router
	backends  *backends
	relay     *relay
	moves     *mover
	limits    limits
	pod       string
	namespace func(*http.Request) (string, *refusal) // pathNamespace or hostNamespace
	log       *slog.Logger

	readers sync.Pool // of *bufio.Reader

	waiting  places         // of the upgrades under way
	begun    atomic.Int64   // upgrades so far, with those that were refused
	held     atomic.Int64   // bytes of the heads of those that are held, or net/http has
	upgrades sync.WaitGroup // requests that net/http has, and clients that are held
	results  [results]atomic.Int64
	logged   [results]throttle
	astray   throttle // of what misdirected logs
}

// ServeHTTP is the one place that answers a request that does not become a
// session, except for what net/http refuses by itself.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	headRead(r.Context())
	p.upgrades.Add(1)
	defer p.upgrades.Done()
	result, err := p.upgrade(w, r)
	p.results[result].Add(1)
	p.report(r, result, err)
	var no *refusal
	switch {
	case errors.Is(err, http.ErrAbortHandler):
		panic(http.ErrAbortHandler)
	case errors.As(err, &no):
		no.answer(w, p.limits.headerTime)
	}
}

// report logs what an operator would look into: not what clients do wrong, and
// no more than a line a second for each result. What a client or a backend has sent
// is cut: a head of 16 KiB is four times that in quotes.
func (p *proxy) report(r *http.Request, result result, err error) {
	if err == nil || result.status() < http.StatusInternalServerError || result == resultClientGone || result == resultAnswered {
		return
	}
	if omitted, ok := p.logged[result].allow(time.Second); ok {
		p.log.Warn("upgrade refused", "path", fmt.Sprintf("%.200s", r.URL.Path), "client", lastAddresses(forwardedFor(r)),
			"result", result.String(), "reason", fmt.Sprintf("%.300s", err.Error()), "omitted", omitted)
	}
}

// upgrade makes the request a session. A *refusal means that nothing was
// answered yet.
func (p *proxy) upgrade(w http.ResponseWriter, r *http.Request) (result result, err error) {
	before := takePending(r.Context())
	server, pod := before.backend, before.pod
	namespace, backend, table, no := p.admit(r)
	if no != nil {
		return decline(server, no)
	}
	result = resultBadGateway
	defer func() { // also for a panic, which net/http logs
		if result != resultOK { // else handOver has done it
			p.waiting.leave(backend)
		}
	}()
	goTo := func(another int) { p.waiting.move(backend, another); backend = another }
	switch {
	case server != nil:
		goTo(before.owner)
	case before.failure != nil:
		return p.unreachable(r.Context(), backend, before.failure, nil)
	}
	client, hold, cancel := p.attend(r, before.until)
	defer cancel()
	peer := forwardedFor(r)
	head := slices.Clip(beginHead(r, peer, p.pod)) // it is ended for each owner that is asked
	if !p.holdHead(len(head)) {
		return decline(server, refuse(resultMaxWaiting, "the heads of the upgrades under way have %d bytes each, the limit", headShare))
	}
	defer p.held.Add(-int64(len(head)))
	r = keepLittle(r, client)
	owner := func() (int, error) {
		owner, stamp, no := p.owner(namespace)
		if no != nil {
			return backend, no
		}
		table = stamp
		goTo(owner)
		return owner, p.awaitOld(hold, namespace, owner)
	}
	for astray := error(nil); ; {
		var request []byte
		if server == nil {
			if server, pod, err = p.reach(hold, namespace, owner); err != nil {
				return p.unreachable(hold, backend, err, astray)
			}
			request = endHead(head, table, p.backends.name(backend))
		}
		s := newSession(namespace, backend, peer)
		s.pod = pod
		result, err = p.connect(w, r, s, server, request)
		switch {
		case errors.Is(err, errMisdirected):
			astray = err
		case !errors.Is(err, errMoved):
			return result, err
		}
		server = nil
	}
}

// decline closes the owner's connection, if there is one, for an upgrade that is
// refused.
func decline(owner net.Conn, no *refusal) (result, error) {
	if owner != nil {
		owner.Close()
	}
	return no.result, no
}

// keepLittle drops the fields of a request that is to be held, but for those that
// report and net/http still ask for, and returns it with the context.
func keepLittle(r *http.Request, ctx context.Context) *http.Request {
	r.Header = http.Header{"X-Forwarded-For": r.Header["X-Forwarded-For"], "Expect": r.Header["Expect"]}
	return r.WithContext(ctx)
}

// headShare is how many bytes each of the upgrades that may be under way may have for
// its head: together they may have that often as many. One may have more, if others
// have less.
const headShare = 2 << 10

// holdHead counts n bytes more of heads that are kept, and reports whether there may be
// so many. If so, the caller counts them back.
func (p *proxy) holdHead(n int) bool {
	if p.held.Add(int64(n)) <= int64(p.limits.waiting)*headShare {
		return true
	}
	p.held.Add(-int64(n))
	return false
}

// reach is backends.hold for the owner of the namespace, and looks once more whether
// that may get sessions of it.
func (p *proxy) reach(hold context.Context, namespace string, owner func() (int, error)) (net.Conn, string, error) {
	for {
		conn, pod, err := p.backends.hold(hold, owner)
		if err != nil || p.relay.leftBehind(namespace) == nil {
			return conn, pod, err
		}
		conn.Close() // the pod was replaced since owner was asked
	}
}

// awaitOld returns when no session of the namespace is with a pod that is its
// backend no more, or ctx has ended.
func (p *proxy) awaitOld(ctx context.Context, namespace string, backend int) error {
	over := p.relay.leftBehind(namespace)
	if over == nil {
		return nil
	}
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%q has a session with the pod that %s was", namespace, p.backends.name(backend))
	}
}

// halfClosedHold bounds how long a client waits for its owner that has ended its side of
// the connection.
const halfClosedHold = time.Second

// attend returns the contexts of an upgrade. client ends when the client is gone or the
// router stops, hold also when the owner was waited for long enough: at until, if the
// upgrade has waited before. The caller calls cancel.
//
// A client that has sent its request and a FIN may still listen (a half-close, RFC 9293
// §3.6), and then gets its answer; most have left, and that looks the same until
// something is sent to them. So the answer of an owner that was asked is waited for: it
// is about to come, or -handshake-timeout is. But a place among those that are held is
// theirs for halfClosedHold only; then they get 503. net/http ends the request's context
// at a FIN as at a RST, which the connection knows from each other.
func (p *proxy) attend(r *http.Request, until time.Time) (client, hold context.Context, cancel func()) {
	request := r.Context()
	front := request.Value(frontKey{}).(*frontConn)
	client, leave := context.WithCancelCause(context.WithoutCancel(request))
	if until.IsZero() {
		until = time.Now().Add(p.limits.hold)
	}
	hold, release := context.WithDeadline(client, until)
	stopping := context.AfterFunc(front.serves, func() { leave(context.Cause(front.serves)) })
	ended := context.AfterFunc(request, func() {
		if front.ended.Load() {
			time.AfterFunc(halfClosedHold, release)
			return
		}
		leave(context.Cause(request))
	})
	return client, hold, func() {
		stopping()
		ended()
		release()
		leave(nil)
	}
}

// errMoved says that the namespace got another owner during the handshake: the
// client, which knows of nothing yet, is to be connected to that.
var errMoved = errors.New("the namespace got another owner")

// errMisdirected says that what was dialled for a backend is another one (421).
var errMisdirected = errors.New("what answers at its address is another backend")

// admit checks an upgrade request, and returns its namespace, and what owner does. It
// takes a place of the owner's, which the caller gives back, or handOver.
func (p *proxy) admit(r *http.Request) (namespace string, owner int, table string, no *refusal) {
	p.begun.Add(1)
	if n := countFields(r.Header); n > p.limits.headerLines {
		return "", 0, "", refuse(resultBadHead, "%d header fields, want at most %d", n, p.limits.headerLines)
	}
	if namespace, no = p.namespace(r); no == nil {
		no = checkUpgrade(r)
	}
	if no == nil {
		owner, table, no = p.owner(namespace)
	}
	if no != nil {
		return "", 0, "", no
	}
	limit := p.limits.waiting
	switch all, own, placed := p.waiting.take(owner, p.router.table().backends.count, limit); {
	case !placed:
		no = refuse(resultMaxWaiting, "%d upgrades to %s are under way, its share of %d, and %d in all", own, p.backends.name(owner), limit, all)
	case p.relay.size()+all > p.limits.sessions:
		p.waiting.leave(owner)
		no = refuse(resultMaxSessions, "%d sessions are open, the limit", p.limits.sessions)
	}
	return namespace, owner, table, no
}

// tidy is tidy for the memory of upgrades.
func (p *proxy) tidy(ctx context.Context) {
	tidy(ctx, func() int { return int(p.begun.Load()) })
}

const (
	tidyAfter = 1000        // handshakes
	tidyCalm  = 10          // most that begin in tidyTime while it is calm
	tidyTime  = time.Second // between two looks
)

// tidy gives the memory back that many handshakes took, as soon as it is calm
// again, until ctx ends. By itself the runtime would keep it for minutes, as it
// collects garbage when the heap has grown to twice its size: a router of idle
// sessions would have more garbage than sessions. begun is how many there were.
func tidy(ctx context.Context, begun func() int) {
	ticker := time.NewTicker(tidyTime)
	defer ticker.Stop()
	var tidied, before int
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := begun()
		if now-before <= tidyCalm && now-tidied >= tidyAfter {
			debug.FreeOSMemory()
			tidied = now
		}
		before = now
	}
}

// owner returns the backend that owns the namespace, and the stamp of the
// table that says so.
func (p *proxy) owner(namespace string) (int, string, *refusal) {
	t := p.router.table()
	if t == nil {
		return 0, "", refuse(resultNoTable, "no overrides were read yet")
	}
	owner, ok := t.owner(namespace)
	if !ok {
		return 0, "", refuse(resultRefused, "the override of %q cannot be read, or others disagree: /owner of the router says more", namespace)
	}
	return owner, t.stamp, nil
}

// unreachable says why there is no connection to the owner: err, and before that
// astray, if another backend answered in its place.
func (p *proxy) unreachable(hold context.Context, backend int, err, astray error) (result, error) {
	var no *refusal
	switch {
	case errors.As(err, &no):
		return no.result, no
	case errors.Is(hold.Err(), context.Canceled):
		no = gone(hold)
	case astray != nil || errors.Is(err, errMisdirected):
		no = refuse(resultMisdirected, "%s could not be reached within %s: %v; at last: %v",
			p.backends.name(backend), p.limits.hold, cmp.Or(astray, err), err)
	default:
		no = refuse(resultHoldTimeout, "%s could not be reached within %s: %v", p.backends.name(backend), p.limits.hold, err)
	}
	return no.result, no
}

// connect sends the backend the request for an upgrade on its connection, of
// which it takes care, and hands s to the relay or passes the backend's other
// answer on. An empty request was sent before.
func (p *proxy) connect(w http.ResponseWriter, r *http.Request, s *session, backend net.Conn, request []byte) (result, error) {
	handed := false
	defer func() {
		if !handed {
			backend.Close()
		}
	}()
	// The request's context bounds the handshake only: a client that leaves
	// need not wait for the backend's answer.
	stop := context.AfterFunc(r.Context(), func() { backend.Close() })
	defer stop()
	backend.SetDeadline(time.Now().Add(p.limits.handshake))
	br := p.reader(nil)
	resp, fromBackend, err := handshake(backend, br, request, p.limits.headerBytes)
	if err != nil {
		return p.broken(r.Context(), s.backend, err)
	}
	if resp.StatusCode == http.StatusMisdirectedRequest {
		return p.misdirected(s.backend, backend.RemoteAddr())
	}
	p.backends.holds.meant(s.backend)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return p.pass(w, resp, backend)
	}
	if !stop() {
		return p.broken(r.Context(), s.backend, r.Context().Err())
	}
	if p.moves.misplaced(s) {
		return resultBadGateway, errMoved
	}
	head := switchingHead(resp)
	if expectsContinue(r) {
		head = append([]byte("HTTP/1.1 100 Continue\r\n\r\n"), head...)
	}
	client, fromClient, err := p.hijack(w, head)
	if err != nil {
		return resultClientGone, err
	}
	backend.SetDeadline(time.Time{})
	handed = true
	backend, rest := whole(backend)
	first := [2][]byte{fromClient, slices.Concat(fromBackend, rest)}
	p.readers.Put(br)
	p.handOver(s, func() { p.relay.carry(s, [2]net.Conn{client, backend}, first) })
	return resultOK, nil
}

// misdirected takes note that what was dialled at addr for a backend has answered
// 421: it is another one, and the backend is to be looked for again.
func (p *proxy) misdirected(backend int, addr net.Addr) (result, error) {
	err := fmt.Errorf("%s at %s: %w (421)", p.backends.name(backend), addr, errMisdirected)
	p.backends.misdirected(backend, err)
	if omitted, ok := p.astray.allow(time.Second); ok {
		p.log.Warn("another backend answered", "backend", p.backends.name(backend), "address", addr.String(), "omitted", omitted)
	}
	return resultMisdirected, err
}

// broken says why there is no answer of the backend.
func (p *proxy) broken(client context.Context, backend int, err error) (result, error) {
	var timeout net.Error
	var no *refusal
	switch {
	case client.Err() != nil:
		no = gone(client)
	case errors.As(err, &timeout) && timeout.Timeout():
		no = refuse(resultGatewayTimeout, "%s gave no answer within %s", p.backends.name(backend), p.limits.handshake)
	default:
		no = refuse(resultBadGateway, "%s: %v", p.backends.name(backend), err)
	}
	return no.result, no
}

// pass gives the client the backend's answer as it is: status, headers, body.
// The body has as long as the head had. One that is cut off is passed on as far as it
// came, after its status.
func (p *proxy) pass(w http.ResponseWriter, resp *http.Response, server net.Conn) (result, error) {
	deadline := time.Now().Add(p.limits.handshake)
	server.SetDeadline(deadline)
	http.NewResponseController(w).SetWriteDeadline(deadline)
	upgrade := resp.Header["Upgrade"] // what a 426 is about (RFC 9110 §15.5.22)
	dropHopByHop(resp.Header)
	w.Header()["Content-Type"] = nil // keeps net/http from guessing one
	for name, values := range resp.Header {
		w.Header()[spelled(name)] = values
	}
	if resp.StatusCode == http.StatusUpgradeRequired && len(upgrade) > 0 {
		w.Header()["Upgrade"] = upgrade
		w.Header()["Connection"] = []string{"Upgrade"} // which names it (RFC 9110 §7.8)
	}
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(w, resp.Body); err != nil {
		http.NewResponseController(w).Flush()       // the status and what there is: all else is dropped
		return resultAnswered, http.ErrAbortHandler // the client must not take half a body for a whole one
	}
	return resultAnswered, nil
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
	client, rest := whole(conn.(*frontConn).Conn)
	early = slices.Concat(early, rest)
	client.SetDeadline(time.Now().Add(p.limits.handshake))
	if _, err := client.Write(head); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("write the 101: %w", err)
	}
	client.SetDeadline(time.Time{})
	return client, early, nil
}

// handOver has carry give s to the relay, which from here on is the only one to
// touch its sockets. A table that was swapped since s's owner was asked may have
// given it another one. The relay knows s before the table is read again here, and
// the mover takes its snapshot of the sessions after the swap. The relay's lock puts
// these two in order: when s comes first, the snapshot has s; when the snapshot
// comes first, this check sees the new table.
func (p *proxy) handOver(s *session, carry func()) {
	p.waiting.leave(s.backend) // before, or the limit of sessions would count it twice
	carry()
	if p.moves.misplaced(s) {
		s.part(causeMoved, nil)
	}
}

// reader returns a pooled reader of r. The caller puts it back into readers.
func (p *proxy) reader(r io.Reader) *bufio.Reader {
	br, _ := p.readers.Get().(*bufio.Reader)
	if br == nil {
		return bufio.NewReader(r)
	}
	br.Reset(r)
	return br
}
