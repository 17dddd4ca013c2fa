//go:build !portable && !386

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// fastPath takes a client to its backend without net/http. The relay's pollers
// read the upgrade, send it to the owner, and send the answer back, on the
// sockets that become the session: no goroutine waits, and nothing is handed from
// Go's poller to epoll. That is what a storm of reconnects costs the least by.
//
// It takes what is plainly right and can go on at once. All else it leaves to
// net/http and ServeHTTP, where it stands: what has to wait, to be refused, or to
// be answered by anything but a 101. To net/http, it is the listener of these.
type fastPath struct {
	// Static after construction.
	proxy    *proxy
	listener net.Listener
	fdLimit  *descriptorLimit
	log      *slog.Logger

	retry       *acceptRetry
	logThrottle throttle
	stopping    atomic.Bool
	done        chan struct{} // closed when run has

	// Guarded by mu.
	mu        sync.Mutex
	changed   sync.Cond
	file      *os.File   // the listener's socket, while run accepts
	fallbacks []net.Conn // to net/http, which has not accepted them yet
	idle      bool       // net/http waits for more: it knows of all that it has accepted
	acceptErr error      // why no more come
}

// fastPathTimeout is how long a client may be on the fast path.
const fastPathTimeout = 500 * time.Millisecond

// newFastPath returns the front of a listener, whose clients it accepts while run
// runs. Close closes the listener too.
func newFastPath(p *proxy, l net.Listener, g *descriptorLimit) *fastPath {
	x := &fastPath{proxy: p, listener: l, fdLimit: g, log: p.log, retry: newAcceptRetry("-listen", p.log), done: make(chan struct{})}
	x.changed.L = &x.mu
	return x
}

func (x *fastPath) Addr() net.Addr { return x.listener.Addr() }

// Accept returns the next client that is left to net/http.
func (x *fastPath) Accept() (net.Conn, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.idle = true; len(x.fallbacks) == 0 && x.acceptErr == nil; x.changed.Wait() {
		x.changed.Broadcast() // to stop
	}
	if len(x.fallbacks) == 0 {
		return nil, x.acceptErr
	}
	x.idle = false
	conn := x.fallbacks[0]
	x.fallbacks = slices.Delete(x.fallbacks, 0, 1)
	return conn, nil
}

// handToHTTP has net/http accept the client.
func (x *fastPath) handToHTTP(conn net.Conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.acceptErr != nil {
		conn.Close()
		return
	}
	x.fallbacks = append(x.fallbacks, conn)
	x.changed.Broadcast()
}

// fail ends Accept once it has returned what was left.
func (x *fastPath) fail(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.acceptErr == nil {
		x.acceptErr = err
	}
	x.changed.Broadcast()
}

// stop ends run, which must have begun, and leaves all clients that are not
// sessions to net/http, which has accepted them when it returns.
func (x *fastPath) stop() {
	x.stopAccepting()
	<-x.done
	for _, p := range x.proxy.relay.engine.pollers {
		for _, g := range p.pendingConns() {
			g.fallBackNow()
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for (len(x.fallbacks) > 0 || !x.idle) && x.acceptErr == nil {
		x.changed.Wait()
	}
}

// stopAccepting ends run.
func (x *fastPath) stopAccepting() {
	x.stopping.Store(true)
	x.retry.close()
	x.fdLimit.close()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.file != nil {
		x.file.Close()
	}
}

// Close closes the listener, and ends Accept and run.
func (x *fastPath) Close() error {
	x.stopAccepting()
	x.fail(net.ErrClosed)
	return x.listener.Close()
}

// run accepts clients until stop or Close. If it cannot begin, Accept returns the
// error.
func (x *fastPath) run() {
	defer close(x.done)
	if err := x.acceptClients(); !x.stopping.Load() {
		x.fail(err)
	}
}

// acceptClients gives clients to the pollers, when the gate has room for them.
func (x *fastPath) acceptClients() error {
	file, err := x.listener.(interface{ File() (*os.File, error) }).File() // *net.TCPListener or *net.UnixListener
	if err != nil {
		return err
	}
	defer file.Close()
	x.mu.Lock()
	x.file = file
	x.mu.Unlock()
	if x.stopping.Load() {
		return net.ErrClosed
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	for {
		if err := x.fdLimit.wait(); err != nil {
			return err
		}
		fd, peer, err := acceptSocket(raw)
		switch {
		case err == nil:
			x.retry.shouldRetry(nil)
			x.fdLimit.add(descriptorsPerUpgrade)
			x.addClient(int32(fd), peer)
		case !x.retry.shouldRetry(err):
			return os.NewSyscallError("accept4", err)
		}
	}
}

// refuseClient answers a client of which net/http cannot have a connection, and closes
// its socket.
func (x *fastPath) refuseClient(client *os.File, reason error) {
	defer client.Close()
	client.WriteString( // its buffer is empty: that does not wait
		"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	x.fdLimit.add(-descriptorsPerUpgrade)
	x.proxy.results[resultMaxSessions].Add(1)
	x.logNoDescriptor(reason)
}

// logNoDescriptor logs that a client was not answered, as others have taken the descriptors
// that the gate counts on, no more than once a second.
func (x *fastPath) logNoDescriptor(reason error) {
	if omitted, ok := x.logThrottle.allow(time.Second); ok {
		x.log.Warn("cannot accept clients: out of file descriptors", "reason", reason.Error(), "omitted", omitted)
	}
}

// addClient gives the client to a poller.
func (x *fastPath) addClient(fd int32, peer syscall.Sockaddr) {
	a := &pendingConn{fastPath: x, poller: x.proxy.relay.engine.nextPoller(), fd: [2]int32{fd, -1}, remoteAddr: clientAddr(addressOf(peer))}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.timer = time.AfterFunc(fastPathTimeout, a.fallBackNow)
	a.slot = a.poller.addPending(a)
	if err := a.watch(clientSide, epollReadEvents); err != nil {
		a.fallBack(nil)
	}
}

// upgrade returns the request at the beginning of data and how long it is, or nil
// if it is not plain: what net/http's server would do with it is net/http's.
func (x *fastPath) upgrade(data []byte) (*http.Request, int) {
	if smallHeadLen(data) == 0 {
		return nil, 0
	}
	rest := bytes.NewReader(data)
	br := x.proxy.newReader(rest)
	defer x.proxy.readers.Put(br)
	r, err := http.ReadRequest(br)
	size := len(data) - rest.Len() - br.Buffered()
	if err != nil || size > x.proxy.limits.headerBytes || !isPlainRequest(r) {
		return nil, 0
	}
	return r, size
}

// A head on the fast path has at most so many bytes, and so many lines and commas:
// it is read on the goroutine that carries sessions, which wait meanwhile.
const (
	maxSmallHead      = 4 << 10
	maxSmallHeadParts = 64
)

// smallHeadLen returns how long the head at the beginning of data is; 0 if it is not
// whole or not small.
func smallHeadLen(data []byte) int {
	data = data[:min(len(data), maxSmallHead)]
	end := bytes.Index(data, []byte("\r\n\r\n"))
	if end < 0 {
		return 0
	}
	head := data[:end+len("\r\n\r\n")]
	if bytes.Count(head, []byte("\n"))+bytes.Count(head, []byte(",")) > maxSmallHeadParts {
		return 0
	}
	return len(head)
}

// isSmallResponse reports whether the heads of a backend's answer, interim ones and the
// last, are small.
func isSmallResponse(data []byte) bool {
	for range maxInterimResponses {
		size := smallHeadLen(data)
		if size == 0 {
			return false
		}
		if !bytes.HasPrefix(data, []byte("HTTP/1.1 1")) || bytes.HasPrefix(data, []byte("HTTP/1.1 101")) {
			return true
		}
		data = data[size:]
	}
	return false
}

// isPlainRequest reports whether there is nothing in the request that net/http's server
// checks and http.ReadRequest does not.
func isPlainRequest(r *http.Request) bool {
	for name := range r.Header {
		if isInvalidFieldName(name) || name == "Expect" {
			return false
		}
	}
	return r.Proto == "HTTP/1.1" && strings.HasPrefix(r.RequestURI, "/") && r.Host != "" && strings.Trim(r.Host, hostBytes) == ""
}

// hostBytes are those of the hosts and ports that are plain.
const hostBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]"

// pendingConn is a client on the fast path:
//
//	head ──read, checked, sent to the owner──> asked ──101──> session
//	  │ └──the owner cannot be dialled──> held    │
//	  │                                    │      │
//	  └────────────── anything else ───────┴──────┴──> net/http, or closed
type pendingConn struct {
	// Static after admit.
	fastPath   *fastPath
	poller     *poller
	slot       int32
	remoteAddr clientAddr
	timer      *time.Timer

	// Guarded by mu.
	mu        sync.Mutex
	fellBack  bool         // it has left the fast path
	fd        [2]int32     // the sockets, -1: none
	epollMask [2]uint32    // what epoll watches
	rearmed   [2]bool      // epoll reported something that is left to the session
	head      []byte       // what the client has sent
	early     int          // where in that begins what came after its upgrade
	session   *session     // that it is to be; nil until the upgrade was read
	request   []byte       // of the upgrade for the backend, what is not sent yet
	dialled   bool         // the backend has taken a part of it
	dialErr   error        // of the dial; nil if that was given up, which says nothing about the backend
	holding   *heldUpgrade // nil if it is not held
}

// heldUpgrade is what a connection has while it is held, in place of a session and a
// request: with its head, that is all of it, without a goroutine. A client that is
// held costs little, so that there may be many.
type heldUpgrade struct {
	// Static after construction.
	namespace string
	ctx       context.Context // ends at -hold, or when the connection has left
	cancel    context.CancelFunc
	waiter    *waiter
	state     atomic.Int32 // holdParked, and so on

	// Guarded by pendingConn.mu.
	stamp   string         // of the table that says who the owner is
	upgrade pendingUpgrade // what net/http gets; its owner changes with the table
}

// What a held connection does about its place in the dial queue.
const (
	holdParked  int32 = iota // nothing: it waits for wake
	holdRunning              // a goroutine goes on with it
	holdRerun                // and wake was called meanwhile
)

// handleEvent handles what epoll reports of a socket.
func (a *pendingConn) handleEvent(i side, events uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	gone := events&(syscall.EPOLLHUP|syscall.EPOLLERR) != 0 // or half-closed, and to be answered
	ended := gone || events&syscall.EPOLLRDHUP != 0
	a.rearmed[i] = a.rearmed[i] || ended || events&syscall.EPOLLPRI != 0
	switch {
	case a.fellBack:
	case a.holding != nil && i == backendSide: // of a dial that has failed
	case a.holding != nil && gone:
		a.clientGone()
	case a.holding != nil && ended:
		a.fallBack(nil)
	case a.holding != nil: // it is read by net/http
	case a.session == nil && ended:
		a.fallBack(nil)
	case a.session == nil:
		a.readRequest()
	case i == backendSide:
		a.handleBackend()
	case gone:
		a.clientGone()
	default:
		a.rearmed[clientSide] = true
	}
}

// readRequest reads the client's upgrade, and sends it to the owner.
func (a *pendingConn) readRequest() {
	data, errno := a.receive(clientSide)
	switch {
	case errno == syscall.EAGAIN:
		return
	case errno != 0 || len(data) == 0:
		a.closeBoth()
		return
	}
	a.head = trimEmptyLines(data)
	switch {
	case !a.admit():
		a.fallBack(nil)
	case !a.dial():
		a.hold()
	}
}

// admit judges the upgrade, and makes the session and the request for the owner.
func (a *pendingConn) admit() bool {
	p := a.fastPath.proxy
	r, size := a.fastPath.upgrade(a.head)
	if r == nil {
		return false
	}
	r.RemoteAddr, a.early = a.remoteAddr.String(), size
	namespace, owner, table, refused := p.admit(r)
	if refused != nil {
		return false
	}
	peer := forwardedFor(r)
	a.request = requestHead(r, peer, p.podName, table, p.backends.name(owner))
	a.session = newSession(namespace, owner, peer)
	return true
}

// hold waits for the owner, which cannot be dialled now, and then leaves the client to
// net/http, which knows what to answer, with the connection to the owner or with the
// failure. Until then it is not net/http's, whose buffers and goroutines would be
// many times of what is needed.
func (a *pendingConn) hold() {
	p := a.fastPath.proxy
	if a.fd[backendSide] >= 0 && a.dialled || a.rearmed[clientSide] || !p.reserveHead(len(a.head)) {
		a.fallBack(nil)
		return
	}
	a.closeBackend()
	a.timer.Stop()
	h := &heldUpgrade{namespace: a.session.namespace, waiter: p.backends.queues.newWaiter()}
	h.upgrade = pendingUpgrade{owner: a.session.backend, holdDeadline: time.Now().Add(p.limits.holdTimeout)}
	h.ctx, h.cancel = context.WithDeadline(context.Background(), h.upgrade.holdDeadline)
	h.waiter.onWake, h.waiter.woken = a.wake, nil
	h.state.Store(holdRerun) // it has to ask for its owner, as the table may be another by now
	a.holding, a.session, a.request, a.dialErr = h, nil, nil, nil
	p.inFlight.Add(1) // until runHold is over
	context.AfterFunc(h.ctx, a.wake)
	go a.runHold()
}

// wake makes runHold be called, if it does not run.
func (a *pendingConn) wake() {
	state := &a.holding.state
	if state.CompareAndSwap(holdParked, holdRunning) {
		go a.runHold()
		return
	}
	state.CompareAndSwap(holdRunning, holdRerun) // if runHold was about to end, it looks once more
}

// runHold takes a held connection as far as possible now: when it may dial, it dials, as
// backends.dialOwner does.
func (a *pendingConn) runHold() {
	for {
		a.holding.state.Store(holdRunning)
		if a.tryOwner() {
			a.fastPath.proxy.inFlight.Done()
			return
		}
		if a.holding.state.CompareAndSwap(holdRunning, holdParked) {
			return
		}
	}
}

// tryOwner leaves the dial queue, and joins the owner's queue again if there is no
// connection. It reports whether the client is no longer held.
func (a *pendingConn) tryOwner() (over bool) {
	h, b := a.holding, a.fastPath.proxy.backends
	owner := h.upgrade.owner // only ask changes it
	var conn net.Conn
	var pod string
	err := b.queues.dequeue(h.ctx, h.waiter, owner)
	if err == nil {
		conn, pod, err = b.dialInTurn(h.ctx, h.waiter, owner)
	}
	switch {
	case errors.Is(err, errRecheckOwner):
	case err == nil && a.fastPath.proxy.relay.oldPodSessionsDone(h.namespace) != nil: // the pod was replaced since ask
		conn.Close()
	default:
		return a.finishHold(conn, pod, err)
	}
	swaps := b.queues.swaps.Load()
	if err := a.recheckOwner(); err != nil {
		return a.finishHold(nil, "", err)
	}
	if !b.queues.enqueue(h.waiter, h.upgrade.owner, swaps) {
		a.wake() // to ask again
	}
	return false
}

// recheckOwner asks again who the owner is, and waits until that may get sessions of the
// namespace.
func (a *pendingConn) recheckOwner() error {
	p, h := a.fastPath.proxy, a.holding
	owner, stamp, refused := p.owner(h.namespace)
	if refused != nil {
		return refused
	}
	a.mu.Lock()
	if !a.fellBack { // else its place was given back
		p.pendingUpgrades.transfer(h.upgrade.owner, owner)
		h.upgrade.owner, h.stamp = owner, stamp
	}
	a.mu.Unlock()
	return p.waitForOldPod(h.ctx, h.namespace, owner)
}

// finishHold sends the upgrade to the owner, if there is a connection now, or notes why
// not, and leaves the client to net/http. If that was done before, it closes conn.
func (a *pendingConn) finishHold(conn net.Conn, pod string, failure error) (over bool) {
	p := a.fastPath.proxy
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fellBack {
		if conn != nil {
			conn.Close()
		}
		return true
	}
	h := a.holding
	h.upgrade.dialErr = failure
	if conn != nil {
		h.upgrade.backendConn, h.upgrade.podUID = conn, pod
		r, _ := a.fastPath.upgrade(a.head) // as it was taken before
		r.RemoteAddr = a.remoteAddr.String()
		conn.SetWriteDeadline(time.Now().Add(p.limits.handshakeTimeout))
		conn.Write(requestHead(r, forwardedFor(r), p.podName, h.stamp, p.backends.name(h.upgrade.owner))) // an error shows when the answer is read
	}
	a.fallBack(nil)
	return true
}

// dial connects to the owner, if that may be done now, and sends the request. A
// connection that is not there yet takes that later.
func (a *pendingConn) dial() bool {
	b := a.fastPath.proxy.backends
	a.session.podUID = b.podUID(a.session.backend) // before the address, as in hold
	addr, ok := b.tryResolve(a.session.backend)
	if !ok {
		return false
	}
	if a.fastPath.proxy.relay.oldPodSessionsDone(a.session.namespace) != nil {
		b.dialDone(a.session.backend, context.Canceled, true)
		return false
	}
	fd, err := connectTo(addr, b.dialer.Control)
	if err != nil {
		b.dialDone(a.session.backend, err, false)
		return false
	}
	a.fd[backendSide] = fd
	if !a.send() {
		return false
	}
	mask := uint32(epollReadEvents)
	if len(a.request) > 0 {
		mask |= syscall.EPOLLOUT
	}
	return a.watch(backendSide, mask) == nil
}

// send sends of the request what the backend takes, and reports whether that is
// well.
func (a *pendingConn) send() bool {
	n, errno := a.poller.send(a.fd[backendSide], a.request)
	if errno == syscall.EAGAIN {
		return true
	}
	if errno != 0 {
		a.dialErr = os.NewSyscallError("connect", errno)
		return false
	}
	a.request = a.request[n:]
	if !a.dialled {
		a.dialled = true
		a.fastPath.proxy.backends.dialDone(a.session.backend, nil, false)
	}
	return true
}

// handleBackend goes on with the backend: it takes the request, or has answered.
func (a *pendingConn) handleBackend() {
	if len(a.request) > 0 {
		if !a.send() {
			a.hold()
			return
		}
		if len(a.request) > 0 {
			return
		}
	}
	data, errno := a.receive(backendSide)
	switch {
	case errno == syscall.EAGAIN:
	case errno != 0 || !a.handleResponse(data):
		a.fallBack(data)
	}
}

// handleResponse makes the session, if data begins with a 101 that can be passed on.
func (a *pendingConn) handleResponse(data []byte) bool {
	p := a.fastPath.proxy
	if !isSmallResponse(data) {
		return false
	}
	rest := bytes.NewReader(data)
	br := p.newReader(rest)
	defer p.readers.Put(br)
	resp, err := readResponse(br)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		return false
	}
	p.backends.queues.clearMisdirected(a.session.backend)
	if p.mover.shouldMove(a.session) {
		a.closeBackend()
		return false
	}
	head := switchingProtocolsHead(resp)
	if n, errno := a.poller.send(a.fd[clientSide], head); errno != 0 || n < len(head) { // nothing else is in its buffer
		a.clientGone()
		return true
	}
	early := data[len(data)-rest.Len()-br.Buffered():]
	a.fellBack = true
	a.timer.Stop()
	p.results[resultOK].Add(1)
	p.handOver(a.session, func() { a.startSession(early) })
	return true
}

// startSession makes the relay carry the session.
func (a *pendingConn) startSession(fromBackend []byte) {
	for i, left := range a.rearmed {
		if left {
			a.epollMask[i] |= maskStale
		}
	}
	a.poller.promote(a.session, a.slot, a.fd, a.epollMask, [2][]byte{a.head[a.early:], fromBackend})
}

// receive returns what has come from the side, up to the most that a head may
// have: a longer one is never whole here, and is net/http's.
func (a *pendingConn) receive(i side) ([]byte, syscall.Errno) {
	limit := min(bufferSize, a.fastPath.proxy.limits.headerBytes)
	data, errno := a.poller.receive(a.fd[i], limit)
	a.rearmed[i] = a.rearmed[i] || len(data) == limit
	return data, errno
}

// watch makes the poller tell of the side.
func (a *pendingConn) watch(i side, mask uint32) error {
	a.epollMask[i] = mask | edgeTriggered
	return a.poller.watchPending(syscall.EPOLL_CTL_ADD, a.slot, i, a.fd[i], a.epollMask[i])
}

// fallBackNow leaves the client to net/http, unless it is over.
func (a *pendingConn) fallBackNow() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.fellBack {
		a.fallBack(nil)
	}
}

// fallBack leaves the client to net/http with all it has sent, and if the owner has
// its upgrade, the owner too, with what came of the answer.
func (a *pendingConn) fallBack(answer []byte) {
	if !a.dialled || len(a.request) > 0 {
		a.closeBackend()
	}
	a.finish()
	x := a.fastPath
	var done pendingUpgrade
	if a.holding != nil {
		done = a.holding.upgrade
	}
	socket := a.detach(clientSide)
	conn, err := connFromSocket(socket, x.proxy.backends.dialer.Control)
	if err != nil {
		a.closeBackend()
		if done.backendConn != nil {
			done.backendConn.Close()
		}
		x.refuseClient(socket, err)
		return
	}
	socket.Close() // before the owner is duplicated: there may be descriptorsPerUpgrade at once
	front := &clientConn{Conn: &prefixedConn{conn, a.head}, remoteAddr: a.remoteAddr, fdLimit: x.fdLimit, badHeads: &x.proxy.results[resultBadHead]}
	if a.fd[backendSide] >= 0 {
		socket := a.detach(backendSide)
		defer socket.Close()
		if conn, err := connFromSocket(socket, x.proxy.backends.dialer.Control); err == nil { // else it is asked again
			done = pendingUpgrade{backendConn: &prefixedConn{conn, answer}, owner: a.session.backend, podUID: a.session.podUID}
		}
	}
	front.upgrade.Store(&done)
	x.handToHTTP(front)
}

// detach takes the side's socket from the poller.
func (a *pendingConn) detach(i side) *os.File {
	syscall.EpollCtl(a.poller.epollFD, syscall.EPOLL_CTL_DEL, int(a.fd[i]), nil) // or it is watched while a duplicate is open
	return os.NewFile(uintptr(a.fd[i]), "socket")
}

// closeBackend closes the connection to the backend, if there is one.
func (a *pendingConn) closeBackend() {
	if a.fd[backendSide] < 0 {
		return
	}
	if !a.dialled {
		a.fastPath.proxy.backends.dialDone(a.session.backend, cmp.Or(a.dialErr, context.Canceled), a.dialErr == nil)
	}
	syscall.Close(int(a.fd[backendSide]))
	a.fd[backendSide] = -1
}

// clientGone ends it since the client has left during its upgrade.
func (a *pendingConn) clientGone() {
	a.fastPath.proxy.results[resultClientGone].Add(1)
	a.closeBoth()
}

// closeBoth ends it, and closes the sockets.
func (a *pendingConn) closeBoth() {
	a.closeBackend()
	a.finish()
	syscall.Close(int(a.fd[clientSide]))
	a.fastPath.fdLimit.add(-descriptorsPerUpgrade)
}

// finish ends the fast path without a session.
func (a *pendingConn) finish() {
	a.fellBack = true
	a.timer.Stop()
	a.poller.removePending(a.slot)
	p := a.fastPath.proxy
	switch {
	case a.holding != nil:
		a.holding.cancel()
		p.headBytes.Add(-int64(len(a.head)))
		p.pendingUpgrades.release(a.holding.upgrade.owner)
	case a.session != nil:
		p.pendingUpgrades.release(a.session.backend)
	}
}

// acceptSocket waits for the next client (accept4(2)).
func acceptSocket(listener syscall.RawConn) (fd int, peer syscall.Sockaddr, err error) {
	closed := listener.Read(func(listener uintptr) bool {
		fd, peer, err = syscall.Accept4(int(listener), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		return err != syscall.EAGAIN
	})
	return fd, peer, cmp.Or(closed, err)
}

// addressOf is the address as net.Addr has it: of a Unix socket, none.
func addressOf(peer syscall.Sockaddr) string {
	switch peer := peer.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(peer.Addr), uint16(peer.Port)).String()
	case *syscall.SockaddrInet6:
		addr := netip.AddrFrom16(peer.Addr).Unmap()
		if peer.ZoneId != 0 {
			if link, err := net.InterfaceByIndex(int(peer.ZoneId)); err == nil {
				addr = addr.WithZone(link.Name)
			}
		}
		return netip.AddrPortFrom(addr, uint16(peer.Port)).String()
	}
	return ""
}

// clientAddr is what addressOf returned, as a net.Addr.
type clientAddr string

func (clientAddr) Network() string  { return "tcp" }
func (a clientAddr) String() string { return string(a) }

// connectTo begins to connect to a TCP address, and does not wait for that
// (connect(2): EINPROGRESS). control sets the socket's options, as it does for
// a net.Dialer. The caller closes the socket.
func connectTo(addr netip.AddrPort, control socketControl) (int32, error) {
	family, to := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family, to = syscall.AF_INET, &syscall.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = control("tcp", addr.String(), descriptor(fd)); err == nil {
		err = os.NewSyscallError("connect", syscall.Connect(fd, to))
	}
	if (err == nil || errors.Is(err, syscall.EINPROGRESS)) && isSelfConnect(fd, addr) {
		err = fmt.Errorf("dial tcp %s: %w", addr, errSelfConnect)
	}
	if err == nil || errors.Is(err, syscall.EINPROGRESS) {
		return int32(fd), nil
	}
	syscall.Close(fd)
	return -1, err
}

// isSelfConnect reports whether the socket, which connects to the address, has it too. It
// has its own as soon as it connects.
func isSelfConnect(fd int, to netip.AddrPort) bool {
	local, err := syscall.Getsockname(fd)
	if err != nil {
		return false
	}
	var own netip.AddrPort
	switch local := local.(type) {
	case *syscall.SockaddrInet4:
		own = netip.AddrPortFrom(netip.AddrFrom4(local.Addr), uint16(local.Port))
	case *syscall.SockaddrInet6:
		own = netip.AddrPortFrom(netip.AddrFrom16(local.Addr).Unmap(), uint16(local.Port))
	}
	return own.Port() == to.Port() && (own.Addr() == to.Addr().Unmap() || to.Addr().IsUnspecified())
}

// connFromSocket makes a connection of a duplicate of the socket, and gives it its options
// again: package net sets those of keepalive as it likes. The caller closes both.
func connFromSocket(socket *os.File, control socketControl) (net.Conn, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		raw, _ := tcp.SyscallConn() // its error is a nil conn
		err = errors.Join(tcp.SetKeepAlive(false), control("tcp", "", raw))
	}
	if err != nil {
		conn.Close()
	}
	return conn, err
}

// descriptor is the syscall.RawConn of a socket that is not in Go's poller.
type descriptor int

func (d descriptor) Control(f func(fd uintptr)) error { f(uintptr(d)); return nil }
func (d descriptor) Read(func(uintptr) bool) error    { return errors.ErrUnsupported }
func (d descriptor) Write(func(uintptr) bool) error   { return errors.ErrUnsupported }
