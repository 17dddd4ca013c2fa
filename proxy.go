package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// limits bounds what clients can take.
type limits struct {
	holdTimeout time.Duration // how long an upgrade or a plain request waits for its owner
	// upgradeTimeout bounds the backend's answer to an upgrade, and then the write to the
	// client. It does not bound TLS handshakes.
	upgradeTimeout time.Duration
	// headerTimeout is how long a client has for its TLS handshake, then for its request's
	// head, and then for a short body. If net/http does the handshake, that and the head have
	// one such time together.
	headerTimeout   time.Duration
	headerBytes     int // of the head of a request or an answer
	headerFields    int // of a request
	sessions        int // open at once, with plain requests and pending upgrades
	pendingRequests int // at once, with plain requests that their owners have not got
	namespace       namespaceLimits
}

// proxy answers a request, or forwards it, or makes it a session and gives that to the
// relay.
type proxy struct {
	// Static after construction.
	tables      *tableStore
	backends    *backends
	relay       *relay
	mover       *mover
	forwarder   *forwarder // of plain requests; nil with -http=off
	limits      limits
	podName     string
	namespaceOf func(*http.Request) (string, *refusal) // namespaceMatcher.namespace
	releasePath string                                 // of -release; "" for none
	log         *slog.Logger

	proxyProtocol *proxyProtocol  // of the client listener; nil: off
	forwardedFrom *trustedProxies // see removeForwarded; nil: all peers
	tls           *tlsServer      // of the client listener; nil: clients come without TLS

	draining atomic.Bool // set when the drain begins

	readers sync.Pool // of *bufio.Reader

	pending             pendingLimit
	namespaceLimiter    *namespaceLimiter // nil: no limits
	requestsChecked     atomic.Int64      // calls of check
	upgradesInHTTP      waitCount         // requests that net/http has, except those of forwarder
	handedToHTTP        sync.WaitGroup    // requests on their way from the fast path to ServeHTTP
	upgradeDurations    *histogram        // from the head of an upgrade to its session
	ownerWaits          *histogram        // of each wait for an owner
	results             [numResults]atomic.Int64
	logThrottles        [numResults]throttle
	misdirectedThrottle throttle // of the log in checkAnswer
}

// ServeHTTP forwards plain requests, and answers each other one that does not become a
// session, except those that net/http refuses by itself.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	markRequestRead(r)
	if p.answerHealth(w, r) {
		return
	}
	p.removeForwarded(r)
	if p.forwarder != nil && !asksForUpgrade(r) {
		p.forward(w, r)
		return
	}
	p.upgradesInHTTP.add(1)
	defer p.upgradesInHTTP.add(-1)
	result, err := p.upgrade(w, r)
	if result != resultOK { // else openSession has counted it
		p.results[result].Add(1)
	}
	p.logFailure(r, result, err, false)
	var refused *refusal
	switch {
	case errors.Is(err, http.ErrAbortHandler):
		panic(http.ErrAbortHandler)
	case errors.As(err, &refused):
		refused.writeResponse(w, p.limits.headerTimeout)
	}
}

// removeForwarded removes the fields in which a proxy says who its client is, if r's peer is
// none of the proxies of -forwarded-from: such a peer may have invented them.
func (p *proxy) removeForwarded(r *http.Request) {
	if p.forwardedFrom == nil || p.forwardedFrom.contains(r.RemoteAddr) {
		return
	}
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"} {
		r.Header.Del(name)
	}
}

// healthPath is where the client listener answers load balancers.
const healthPath = "/healthz"

// answerHealth answers a load balancer that checks the client listener, and reports
// whether it did: a request for healthPath without a namespace, whatever its Host. It
// answers 503 when /readyz of the admin port does so because the router drains, or does not
// admit clients to all namespaces yet: then the load balancer has -drain-delay to send clients
// elsewhere.
func (p *proxy) answerHealth(w http.ResponseWriter, r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead || requestPath(r) != healthPath {
		return false
	}
	if _, refused := p.namespaceOf(r); refused == nil {
		return false
	}
	w.Header().Set("Cache-Control", "no-store")
	if !p.isReady() {
		http.Error(w, "not ready", http.StatusServiceUnavailable)
		return true
	}
	io.WriteString(w, "ok\n")
	return true
}

// isReady reports whether clients should come.
func (p *proxy) isReady() bool {
	return !p.draining.Load() && p.tables.table() != nil && p.mover.whyNotReady() == ""
}

// logFailure logs the failures that an operator would look into: not the mistakes of
// one client, and at most one line a second for each result. It cuts what the client or the
// backend has sent: in quotes, a head of 16 KiB takes four times that.
func (p *proxy) logFailure(r *http.Request, result result, err error, plain bool) {
	if err == nil || result.refusalStatus() < http.StatusTooManyRequests ||
		result == resultBadHead || result == resultClientGone || result == resultBackendRefused {
		return
	}
	omitted, ok := p.logThrottles[result].allow(time.Second)
	if !ok {
		return
	}
	path, client := fmt.Sprintf("%.200s", r.URL.Path), lastClientAddrs(forwardedFor(r))
	text := fmt.Sprintf("%.300s", err.Error())
	if plain {
		p.log.Warn("request failed", "path", path, "client", client,
			"result", result.String(), "error", text, "omitted", omitted)
		return
	}
	p.log.Warn("upgrade failed", "path", path, "client", client,
		"result", result.String(), "error", text, "omitted", omitted)
}

// upgrade makes the request a session, or passes the owner's other answer on. If it
// returns a *refusal, nothing was answered yet.
func (p *proxy) upgrade(w http.ResponseWriter, r *http.Request) (result, error) {
	client := clientOf(r.Context())
	u := client.takePendingRequest()
	if u == nil {
		admitted, refused := p.admit(r)
		if refused != nil {
			return refused.outcome()
		}
		u = admitted
	}
	defer u.close() // also after a panic, which net/http logs
	if u.dialErr != nil {
		ctx := r.Context()
		if client.serverCtx.Err() != nil {
			ctx = client.serverCtx
		}
		return p.notTaken(ctx, u, u.dialErr, nil).outcome()
	}
	clientCtx, holdCtx, cancel := p.requestContexts(r, u.holdDeadline)
	defer cancel()
	clientAddrs := forwardedFor(r)
	// Each owner that is asked gets a copy of head with an end of its own.
	head := slices.Clip(startRequestHead(r, clientAddrs, p.podName))
	if refused := u.reserveHead(len(head), p.limits.pendingRequests); refused != nil {
		return refused.outcome()
	}
	return p.askOwners(holdCtx, w, trimRequest(r, clientCtx), u, clientAddrs, head)
}

// askOwners sends the request to the owner of the namespace, and again when another one
// has to get it, until there is an answer for the client. holdCtx bounds all waits. head
// is what startRequestHead has returned, without room.
func (p *proxy) askOwners(
	holdCtx context.Context, w http.ResponseWriter, r *http.Request,
	u *pendingRequest, clientAddrs string, head []byte,
) (result, error) {
	var refusals ownerRefusals
	for {
		var request []byte
		if u.backendConn == nil {
			if err := p.dialOwner(holdCtx, u); err != nil {
				return p.notTaken(holdCtx, u, err, refusals.misdirected).outcome()
			}
			if !p.startFlight(u) {
				u.backendConn.Close()
				u.backendConn = nil
				continue
			}
			request = finishRequestHead(head, u.stamp, u.step, p.backends.name(u.backend))
		}
		result, err := p.completeUpgrade(w, r, u, clientAddrs, request)
		switch {
		case errors.Is(err, errOwnerChanged):
		case !errors.Is(err, errStepTooLow) && !errors.Is(err, errMisdirected):
			return result, err
		case refusals.wait(holdCtx, err) != nil:
			return p.notTaken(holdCtx, u, err, refusals.misdirected).outcome()
		}
	}
}

// ownerRefusals says how often owners have not taken a request.
type ownerRefusals struct {
	stepsTooLow int   // answers with errStepTooLow
	misdirected error // the last errMisdirected, or nil
}

// wait gets an error of checkAnswer. It returns when the request may be sent again, or an
// error if ctx ends before.
func (o *ownerRefusals) wait(ctx context.Context, err error) error {
	if errors.Is(err, errMisdirected) {
		o.misdirected = err // dialOwner waits
		return nil
	}
	o.stepsTooLow++
	return sleep(ctx, backoff{minRedialDelay, maxRedialDelay}.jittered(o.stepsTooLow, rand.Float64()))
}

// trimRequest returns the request with the context, and without the header fields that
// only its head needs: an upgrade that waits should take little memory.
func trimRequest(r *http.Request, ctx context.Context) *http.Request {
	r.Header = http.Header{
		"X-Forwarded-For": r.Header["X-Forwarded-For"], // for logFailure
		"Expect":          r.Header["Expect"],          // for expectsContinue and net/http
	}
	return r.WithContext(ctx)
}

// dialOwner waits until the owner of the namespace may get requests of it, and dials that
// owner. ctx bounds both. u then has the connection.
func (p *proxy) dialOwner(ctx context.Context, u *pendingRequest) error {
	if !p.backends.queues.mayPass(u.queueOrdinal()) {
		u.beginWait()
	}
	rechecks := 0
	recheck := func() (int, error) {
		if rechecks++; rechecks > 1 {
			u.beginWait()
		}
		err := p.recheckOwner(ctx, u)
		return u.queueOrdinal(), err
	}
	for {
		conn, podUID, err := p.backends.dialWhenReady(ctx, u.namespace, recheck, p.mover.findQueueOrdinal)
		if err != nil {
			return err
		}
		if p.relay.oldPodSessionsDone(u.namespace) == nil {
			u.backendConn, u.podUID = conn, podUID
			return nil
		}
		conn.Close() // the pod was replaced since recheckOwner
	}
}

// startFlight notes that the owner gets the request now, which the caller sends next. It
// returns false if the namespace has another owner by now, or none, or is held.
func (p *proxy) startFlight(u *pendingRequest) bool {
	f, now, ok := p.mover.startFlight(u.namespace, u.backend, u.podUID, u.cut)
	if ok {
		u.flight, u.assignment = f, now
		u.endWait()
	}
	return ok
}

// forward sends a plain request to the owner of its namespace, and the client the answer.
// It panics with http.ErrAbortHandler if that breaks off, so that the client cannot take
// half of it for the whole.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request) {
	x := p.forwarder.begin(w, r)
	defer func() {
		x.finish()
		p.logFailure(r, x.result, x.err, true)
	}()
	if refused := p.admitPlain(x); refused != nil {
		x.result, x.err = refused.outcome()
	} else {
		x.serve(func() (*http.Response, error) { return p.roundTrip(x) })
	}
	var refused *refusal
	if !errors.As(x.err, &refused) {
		return
	}
	if x.isLast() {
		w.Header().Set("Connection", "close")
	}
	refused.writeResponse(w, p.limits.headerTimeout)
}

// admitPlain is admit for a plain request. It reads the body of the request if that is
// short.
func (p *proxy) admitPlain(x *exchange) *refusal {
	if x.client.serverCtx.Err() != nil {
		return contextRefusal(x.client.serverCtx)
	}
	namespace, refused := p.check(x.r, checkPlain)
	if refused == nil {
		refused = x.readShortBody(p.limits.headerTimeout)
	}
	if refused == nil {
		x.pendingRequest, refused = p.reserve(namespace)
	}
	if refused != nil {
		return refused
	}
	cancel := x.cancel // not x, which an abandoned flight would keep
	x.cut = func() { cancel(errMoved) }
	x.head = slices.Clip(startPlainHead(x.r, forwardedFor(x.r), p.podName))
	return x.reserveHead(len(x.head)+len(x.shortBody), p.limits.pendingRequests)
}

// roundTrip sends the request to the owner of its namespace, and returns the answer. The
// error is a *refusal. It asks another owner, or again, only if the one that was asked says
// that it has not taken the request, and nothing of its body is lost.
func (p *proxy) roundTrip(x *exchange) (*http.Response, error) {
	var refusals ownerRefusals
	for conn := p.takeIdle(x.pendingRequest); ; conn = nil {
		if conn == nil {
			if err := p.dialOwner(p.holdContext(x), x.pendingRequest); err != nil {
				return nil, p.notTaken(x.holdCtx, x.pendingRequest, err, refusals.misdirected)
			}
			conn = newOwnerConn(x.backendConn, backendPod{x.backend, x.podUID})
			x.backendConn = nil
		}
		if !p.startFlight(x.pendingRequest) {
			p.forwarder.idle.put(conn)
			continue
		}
		owner := p.backends.name(x.backend)
		head := finishRequestHead(x.head, x.stamp, x.step, owner)
		resp, err := x.ask(conn, head, p.limits.headerBytes)
		if err != nil {
			x.abandonOwner()
			return nil, x.failure(owner, err)
		}
		switch err = p.checkAnswer(x.backend, conn.RemoteAddr(), resp); {
		case err == nil:
			return resp, nil
		case errors.Is(err, errMisdirected):
			p.forwarder.idle.closeBackend(x.backend)
		}
		if !x.takeBack() {
			return nil, refusedBody(owner, err)
		}
		if refusals.wait(p.holdContext(x), err) != nil {
			return nil, p.notTaken(x.holdCtx, x.pendingRequest, err, refusals.misdirected)
		}
	}
}

// takeIdle returns an idle connection to the owner if the request can be sent at once, or
// nil.
func (p *proxy) takeIdle(u *pendingRequest) *ownerConn {
	u.podUID = p.backends.podUID(u.backend) // before it is asked for sessions with older pods
	if u.queueOrdinal() != u.backend || p.relay.oldPodSessionsDone(u.namespace) != nil ||
		!p.backends.queues.mayPass(u.backend) {
		return nil
	}
	return p.forwarder.idle.take(backendPod{u.backend, u.podUID})
}

// checkAnswer returns errMisdirected or errStepTooLow if the owner has not taken the request:
// what answered at addr is not the owner (421), whose address then has to be looked up
// again, or it has seen a later step (409). addr is nil for a socket that came from the
// fast path after a reset.
func (p *proxy) checkAnswer(owner int, addr net.Addr, resp *http.Response) error {
	if resp.StatusCode == http.StatusMisdirectedRequest {
		name, address := p.backends.name(owner), "an unknown address"
		if addr != nil {
			address = addr.String()
		}
		err := fmt.Errorf("%s at %s: %w (421)", name, address, errMisdirected)
		p.backends.setMisdirected(owner, err)
		if omitted, ok := p.misdirectedThrottle.allow(time.Second); ok {
			p.log.Warn("another backend answered", "backend", name,
				"address", address, "omitted", omitted)
		}
		return err
	}
	p.backends.queues.clearMisdirected(owner)
	if resp.StatusCode == http.StatusConflict && p.mover.noteStep(resp.Header.Get(headerStep)) {
		return errStepTooLow
	}
	return nil
}

// holdContext returns the context that bounds all waits for an owner. finish ends it.
func (p *proxy) holdContext(x *exchange) context.Context {
	if x.holdCtx == nil {
		_, x.holdCtx, x.cancelHold = p.requestContexts(x.r, time.Time{})
	}
	return x.holdCtx
}

// requestContexts returns the contexts of a request. clientCtx ends when the client is gone or
// the router stops. holdCtx also ends at the deadline until which the request waits for its
// owner: after -hold if it is zero. The caller calls cancel. If the router stops already, both
// have ended when requestContexts returns: such a request may come after the router has counted
// the upgrades under way and listed the sessions that it drains, and must become none.
//
// A client that has sent its request and a FIN may still listen (a half-close, RFC 9293
// §3.6), and then gets its answer. Most of them have left, which looks the same until the
// router sends something. So such a client waits for the answer of an owner that has its
// request, at most -upgrade-timeout. But it waits for an owner for halfClosedHold only,
// and then gets 503. net/http ends the context of the request after a FIN as after a RST.
// The clientConn knows which of the two it was.
func (p *proxy) requestContexts(
	r *http.Request, deadline time.Time,
) (clientCtx, holdCtx context.Context, cancel func()) {
	request := r.Context()
	conn := clientOf(request)
	clientCtx, cancelClient := context.WithCancelCause(context.WithoutCancel(request))
	if deadline.IsZero() {
		deadline = time.Now().Add(p.limits.holdTimeout)
	}
	holdCtx, cancelHold := context.WithDeadline(clientCtx, deadline)
	cancelByServer := func() { cancelClient(context.Cause(conn.serverCtx)) }
	if conn.serverCtx.Err() != nil {
		cancelByServer() // AfterFunc would do so a moment later
	}
	stopServerWatch := context.AfterFunc(conn.serverCtx, cancelByServer)
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

// errOwnerChanged says that the namespace got another owner during the handshake, or its
// owner another pod. The client has read nothing yet, so it can go to the new owner or pod.
var errOwnerChanged = errors.New("the namespace got another owner or pod during the handshake")

// errMisdirected says that another backend answered at the owner's address (421).
var errMisdirected = errors.New("another backend answers at its address")

// errStepTooLow says that the owner knows a later step of a hand-off than the router's: it has stored
// that with the namespace, or has released the namespace for it (-release). The request can be sent
// again when the namespace has another owner, or the router has a later step.
var errStepTooLow = errors.New("it has seen a later step (409)")

// admit checks an upgrade request, finds its owner, and counts it in the limits. Both
// ways of an upgrade begin with it. The caller calls close or openSession.
func (p *proxy) admit(r *http.Request) (*pendingRequest, *refusal) {
	namespace, refused := p.check(r, checkUpgrade)
	if refused != nil {
		return nil, refused
	}
	u, refused := p.reserve(namespace)
	if refused != nil {
		return nil, refused
	}
	if u.permit, refused = p.namespaceLimiter.admit(namespace); refused != nil {
		u.uncount()
		return nil, refused
	}
	return u, nil
}

// check returns the namespace of a request in whose head nothing is wrong. checkKind checks
// what depends on the kind of the request. Clients must not reach the path of -release: as the
// router adds X-Router-Step, the backend would take their request for a router's, and end the
// sessions of all namespaces in it.
func (p *proxy) check(
	r *http.Request, checkKind func(*http.Request) *refusal,
) (namespace string, refused *refusal) {
	p.requestsChecked.Add(1)
	if n := countFields(r.Header); n > p.limits.headerFields {
		return "", refuse(resultBadHead, "too many header fields: at most %d are allowed (got %d)",
			p.limits.headerFields, n)
	}
	if namespace, refused = p.namespaceOf(r); refused != nil {
		return "", refused
	}
	if path := requestPath(r); p.releasePath != "" && isSamePath(path, p.releasePath) {
		return "", refuse(resultNotFound, "the path %.200q is for routers only", path)
	}
	return namespace, checkKind(r)
}

// reserve finds the owner of a request's namespace, and counts the request in the limits.
func (p *proxy) reserve(namespace string) (*pendingRequest, *refusal) {
	assigned, refused := p.owner(namespace)
	if refused != nil {
		return nil, refused
	}
	t, limit := p.tables.table(), p.limits.pendingRequests
	if t == nil { // the router has seen the plan of the others before its own table
		return nil, refuseNoTable()
	}
	all, own, acquired := p.pending.acquire(assigned.backend, t.backends.count, limit)
	if !acquired {
		return nil, refuse(resultMaxPending,
			"%d requests to %s are pending, and it may have no more of the limit of %d; %d in all",
			own, p.ownerName(assigned.backend), limit, all)
	}
	u := &pendingRequest{limit: &p.pending, waits: p.ownerWaits,
		began: time.Now(), namespace: namespace, assignment: assigned}
	if p.relay.size()+p.forwarder.size()+all > p.limits.sessions {
		u.uncount()
		return nil, refuse(resultMaxSessions,
			"%d sessions, plain requests and pending upgrades, the limit", p.limits.sessions)
	}
	return u, nil
}

// recheckOwner asks again which backend owns the namespace, and waits until that may have
// a session of it: until no session of the namespace is with a pod that was replaced. ctx
// bounds that. It returns a *refusal if there is no owner.
func (p *proxy) recheckOwner(ctx context.Context, u *pendingRequest) error {
	assigned, refused := p.owner(u.namespace)
	if refused != nil {
		return refused
	}
	u.assign(assigned)
	return p.waitForOldPod(ctx, u)
}

// waitForOldPod returns when no session of the namespace is with a pod that was replaced.
// If ctx ends before, it returns an error.
func (p *proxy) waitForOldPod(ctx context.Context, u *pendingRequest) error {
	done := p.relay.oldPodSessionsDone(u.namespace)
	if done == nil {
		return nil
	}
	u.beginWait()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%q still has a session with the previous pod of %s",
			u.namespace, p.ownerName(u.backend))
	}
}

// refuseNoTable refuses a request that nobody can find an owner for yet.
func refuseNoTable() *refusal {
	return refuse(resultNoTable,
		"the router has no routing table yet, or no plan of the hand-off: /readyz says why")
}

// ownerName returns the name of the owner with this ordinal, for people. A negative one is
// not known: see byHash and the constants after it.
func (p *proxy) ownerName(ordinal int) string {
	if ordinal < 0 {
		return "an owner that is not known here"
	}
	return p.backends.name(ordinal)
}

// owner returns the backend that owns the namespace, or the next one if it is held.
func (p *proxy) owner(namespace string) (assignment, *refusal) {
	a := p.mover.assignmentOf(namespace)
	switch a.state {
	case stateNoView:
		return a, refuseNoTable()
	case stateUnresolved:
		return a, refuse(resultUnresolved,
			"the override of %q is invalid or conflicts with another, and its previous owner is not known or was scaled in: see /owner",
			namespace)
	}
	return a, nil
}

// notTaken returns why no owner has taken the request in time: err, and misdirected if
// another backend has answered in its place.
func (p *proxy) notTaken(
	holdCtx context.Context, u *pendingRequest, err, misdirected error,
) *refusal {
	if refused, ok := errors.AsType[*refusal](err); ok {
		return refused
	}
	switch backend := u.backend; {
	case errors.Is(holdCtx.Err(), context.Canceled):
		return contextRefusal(holdCtx)
	case backend < 0:
		return refuse(resultHoldTimeout, "the owner was not known within %s: %s",
			p.limits.holdTimeout, cmp.Or(p.mover.whyNotReady(), err.Error()))
	case errors.Is(err, errHeld):
		return refuse(resultHoldTimeout,
			"%q was not handed over to %s within %s: /status says what the step waits for",
			u.namespace, p.backends.name(backend), p.limits.holdTimeout)
	case errors.Is(err, errStepTooLow):
		return refuse(resultHoldTimeout, "%s did not take the request within %s: %v",
			p.backends.name(backend), p.limits.holdTimeout, err)
	case misdirected != nil || errors.Is(err, errMisdirected):
		return refuse(resultMisdirected,
			"%s could not be reached within %s: %v; last error: %v", p.backends.name(backend),
			p.limits.holdTimeout, cmp.Or(misdirected, err), err)
	default:
		return refuse(resultHoldTimeout, "%s could not be reached within %s: %v",
			p.backends.name(backend), p.limits.holdTimeout, err)
	}
}

// refusedBody returns the refusal of a request that the owner has refused with err, and that no
// other owner can get: its body was long, and is gone.
func refusedBody(owner string, err error) *refusal {
	result := resultBrokenOff
	if errors.Is(err, errMisdirected) {
		result = resultMisdirected
	}
	return refuse(result, "%s has refused the request, and its body cannot be sent again: %v", owner, err)
}

// completeUpgrade sends the owner the request, on the connection that u has, and makes
// the session of its 101, or passes its other answer on. An empty request was sent
// before. It closes the connection if that does not become the session's. The flight is over
// when the owner has refused the request or answered to the end; else when the owner's end of
// the connection is seen (abandonAfter).
func (p *proxy) completeUpgrade(
	w http.ResponseWriter, r *http.Request,
	u *pendingRequest, clientAddrs string, request []byte,
) (result, error) {
	backendConn, taken := u.backendConn, false
	var failure error // of backendConn
	u.backendConn = nil
	defer func() {
		if !taken {
			u.abandonAfter(failure, backendConn)
		}
	}()
	backendConn.SetDeadline(time.Now().Add(p.limits.upgradeTimeout))
	// A client that leaves need not wait for the backend's answer.
	stop := context.AfterFunc(r.Context(), func() { backendConn.SetDeadline(pastDeadline()) })
	defer stop()
	br := p.newReader(nil)
	resp, fromBackend, err := handshake(backendConn, br, request, p.limits.headerBytes)
	if err != nil {
		failure = err
		return p.noAnswer(r.Context(), u.backend, err).outcome()
	}
	if err := p.checkAnswer(u.backend, backendConn.RemoteAddr(), resp); err != nil {
		u.endFlight()        // it has not taken the request
		return resultOK, err // the owner is asked anew: the caller ignores the result
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		if failure, err = p.passResponse(r.Context(), w, resp, backendConn); err != nil {
			// The client must not take half a body for a whole one.
			return resultBackendRefused, http.ErrAbortHandler
		}
		u.endFlight() // the owner has answered to the end
		return resultBackendRefused, nil
	}
	if !stop() {
		return p.noAnswer(r.Context(), u.backend, r.Context().Err()).outcome()
	}
	s, err := p.newSession(u, clientAddrs)
	if err != nil {
		return resultOK, err // as above
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
	taken = true
	backendConn, rest := unwrap(backendConn)
	early := [2][]byte{fromClient, slices.Concat(fromBackend, rest)}
	p.readers.Put(br)
	conns := [2]net.Conn{clientConn, backendConn}
	p.openSession(u, s, func() { p.relay.startSession(s, conns, early) })
	return resultOK, nil
}

// noAnswer returns why the backend has given no answer.
func (p *proxy) noAnswer(clientCtx context.Context, backend int, err error) *refusal {
	var timeout net.Error
	switch {
	case clientCtx.Err() != nil:
		return contextRefusal(clientCtx)
	case errors.As(err, &timeout) && timeout.Timeout():
		return refuse(resultGatewayTimeout, "%s gave no answer within %s",
			p.backends.name(backend), p.limits.upgradeTimeout)
	default:
		return refuse(resultBadGateway, "%s: %v", p.backends.name(backend), err)
	}
}

// stopGrace bounds how long the end of the router waits for clients: until the handler has
// their requests, and until they have taken their answers.
const stopGrace = 2 * time.Second

// passResponse sends the client the backend's answer: status, header and body. A 302 is not
// followed. No answer is logged, whether it is whole or breaks off. The body has as much time
// as the head had. If it breaks off, the client gets what came of it, and passResponse returns
// an error; failure is that of backendConn, nil if it was the client's. When ctx ends, because
// the client has left or the router stops, the backend sends no more, and the client has
// stopGrace to take what has come.
func (p *proxy) passResponse(
	ctx context.Context, w http.ResponseWriter, resp *http.Response, backendConn net.Conn,
) (failure, err error) {
	deadline := time.Now().Add(p.limits.upgradeTimeout)
	backendConn.SetDeadline(deadline)
	client := http.NewResponseController(w)
	client.SetWriteDeadline(deadline)
	stop := context.AfterFunc(ctx, func() {
		backendConn.SetDeadline(pastDeadline())
		client.SetWriteDeadline(time.Now().Add(stopGrace))
	})
	defer stop()
	upgrade := resp.Header["Upgrade"] // a 426 needs it (RFC 9110 §15.5.22)
	removeHopByHopHeaders(resp.Header)
	w.Header()["Content-Type"] = nil // keeps net/http from guessing one
	for name, values := range resp.Header {
		w.Header()[wireName(name)] = values
	}
	if resp.StatusCode == http.StatusUpgradeRequired && len(upgrade) > 0 {
		w.Header()["Upgrade"] = upgrade
		w.Header()["Connection"] = []string{"Upgrade"} // it names Upgrade (RFC 9110 §7.8)
	}
	w.WriteHeader(resp.StatusCode)
	body := failureReader{Reader: resp.Body}
	if _, err = io.Copy(w, &body); err != nil {
		client.Flush() // the status and what came of the body
	}
	return body.failure, err
}

// failureReader keeps the error of a read that is not io.EOF.
type failureReader struct {
	io.Reader
	failure error // nil for none
}

func (f *failureReader) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && err != io.EOF {
		f.failure = err
	}
	return n, err
}

// hijack takes the client's connection from net/http and sends head, the 101, on it. It
// returns the connection and what the client has sent after its request. If it fails, it
// has closed the connection, and nothing can be answered any more.
func (p *proxy) hijack(w http.ResponseWriter, head []byte) (net.Conn, []byte, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("hijack: %w", err)
	}
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // no error: it is buffered
	from := conn.(*clientConn)
	client, rest := unwrap(from.Conn)
	early = slices.Concat(early, rest)
	if from.tls != nil {
		early = append(early, from.tls.takeBuffered()...)
	}
	client.SetDeadline(time.Now().Add(p.limits.upgradeTimeout))
	if _, err := client.Write(head); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("write the 101: %w", err)
	}
	client.SetDeadline(time.Time{})
	return client, early, nil
}

// newSession returns the session of an upgrade whose owner has answered 101, or
// errOwnerChanged.
func (p *proxy) newSession(u *pendingRequest, clientAddrs string) (*session, error) {
	s := newSession(u.namespace, u.backend, clientAddrs)
	s.podUID = u.podUID
	if p.mover.shouldMove(s) {
		return nil, errOwnerChanged
	}
	return s, nil
}

// openSession makes s of the upgrade: start gives the relay s and its sockets, which from
// then on only the relay touches. Both ways of an upgrade end with it.
//
// The flight ends after the relay has s. A step of a hand-off looks for flights first and
// for sessions after that: so it finds the one or the other.
//
// With -handoff=off there is no flight, and no step looks for one where only the pod was
// replaced. So openSession asks again whether s has to move, when the relay has it: a change
// before that is seen here, and after a later one the mover finds s in the relay.
func (p *proxy) openSession(u *pendingRequest, s *session, start func()) {
	p.results[resultOK].Add(1)
	p.upgradeDurations.observe(time.Since(u.began))
	s.permit, u.permit = u.permit.forSession(), nil
	u.uncount() // before start, or the limit of sessions would count it twice
	start()
	u.endFlight()
	if p.mover.shouldMove(s) {
		s.closeGracefully(causeMoved, nil)
	}
}

// newReader returns a reader of r. The caller puts it back into readers.
func (p *proxy) newReader(r io.Reader) *bufio.Reader {
	br, _ := p.readers.Get().(*bufio.Reader)
	if br == nil {
		return bufio.NewReader(r)
	}
	br.Reset(r)
	return br
}

// writeMetrics writes the results of the upgrades, how long they took, how many are
// pending, the limits, and what the forwarder and the TLS server write.
func (p *proxy) writeMetrics(m metricsWriter) {
	m.family("router_upgrades_total", "counter", "Upgrade requests, by result.")
	for r := range numUpgradeResults {
		m.sample("router_upgrades_total", float64(p.results[r].Load()), "result", r.String())
	}
	p.upgradeDurations.write(m, "router_upgrade_duration_seconds",
		"Time from the head of an upgrade request to its session.")
	p.ownerWaits.write(m, "router_hold_duration_seconds",
		"How long requests that could not be sent at once waited for their owner.")
	m.single("router_pending_upgrades", "gauge",
		"Upgrades until they are sessions or answered, plain requests until their owner gets them, "+
			"and both, once abandoned, until their owner has ended the connection.",
		float64(p.pending.inUse()))
	m.single("router_max_pending_upgrades", "gauge", "Limit of the pending upgrades.",
		float64(p.limits.pendingRequests))
	m.single("router_max_sessions", "gauge",
		"Limit of the open sessions, plain requests and pending upgrades together.",
		float64(p.limits.sessions))
	if p.forwarder != nil {
		p.forwarder.writeMetrics(m)
	}
	if p.tls != nil {
		p.tls.writeMetrics(m)
	}
}
