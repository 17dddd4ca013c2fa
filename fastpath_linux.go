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

// express is the short way from a client to its backend. The relay's pollers
// read the upgrade, send it to the owner, and send the answer back, on the
// sockets that become the session: no goroutine waits, and nothing is handed from
// Go's poller to epoll. That is what a storm of reconnects costs the least by.
//
// It takes what is plainly right and can go on at once. All else it leaves to
// net/http and ServeHTTP, where it stands: what has to wait, to be refused, or to
// be answered by anything but a 101. To net/http, it is the listener of these.
type express struct {
	// Static after construction.
	proxy    *proxy
	listener net.Listener
	gate     *gate
	log      *slog.Logger

	retry    *acceptRetry
	logged   throttle
	stopping atomic.Bool
	ended    chan struct{} // closed when run has

	// Guarded by mu.
	mu     sync.Mutex
	change sync.Cond
	file   *os.File   // the listener's socket, while run accepts
	left   []net.Conn // to net/http, which has not accepted them yet
	idle   bool       // net/http waits for more: it knows of all that it has accepted
	failed error      // why no more come
}

// expressTime is how long a client may be on the short way.
const expressTime = 500 * time.Millisecond

// newExpress returns the front of a listener, whose clients it accepts while run
// runs. Close closes the listener too.
func newExpress(p *proxy, l net.Listener, g *gate) *express {
	x := &express{proxy: p, listener: l, gate: g, log: p.log, retry: newAcceptRetry("-listen", p.log), ended: make(chan struct{})}
	x.change.L = &x.mu
	return x
}

func (x *express) Addr() net.Addr { return x.listener.Addr() }

// Accept returns the next client that is left to net/http.
func (x *express) Accept() (net.Conn, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.idle = true; len(x.left) == 0 && x.failed == nil; x.change.Wait() {
		x.change.Broadcast() // to stop
	}
	if len(x.left) == 0 {
		return nil, x.failed
	}
	x.idle = false
	conn := x.left[0]
	x.left = slices.Delete(x.left, 0, 1)
	return conn, nil
}

// leave has net/http accept the client.
func (x *express) leave(conn net.Conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.failed != nil {
		conn.Close()
		return
	}
	x.left = append(x.left, conn)
	x.change.Broadcast()
}

// fail ends Accept once it has returned what was left.
func (x *express) fail(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.failed == nil {
		x.failed = err
	}
	x.change.Broadcast()
}

// stop ends run, which must have begun, and leaves all clients that are not
// sessions to net/http, which has accepted them when it returns.
func (x *express) stop() {
	x.shut()
	<-x.ended
	for _, p := range x.proxy.relay.carrier.pollers {
		for _, g := range p.guests() {
			g.leave()
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for (len(x.left) > 0 || !x.idle) && x.failed == nil {
		x.change.Wait()
	}
}

// shut ends run.
func (x *express) shut() {
	x.stopping.Store(true)
	x.retry.close()
	x.gate.close()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.file != nil {
		x.file.Close()
	}
}

// Close closes the listener, and ends Accept and run.
func (x *express) Close() error {
	x.shut()
	x.fail(net.ErrClosed)
	return x.listener.Close()
}

// run accepts clients until stop or Close. That it can not even begin, Accept
// tells.
func (x *express) run() {
	defer close(x.ended)
	if err := x.accept(); !x.stopping.Load() {
		x.fail(err)
	}
}

// accept gives clients to the pollers, when the gate has room for them.
func (x *express) accept() error {
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
		if err := x.gate.wait(); err != nil {
			return err
		}
		fd, peer, err := acceptOne(raw)
		switch {
		case err == nil:
			x.retry.again(nil)
			x.gate.use(upgradeDescriptors)
			x.admit(int32(fd), peer)
		case !x.retry.again(err):
			return os.NewSyscallError("accept4", err)
		}
	}
}

// refuse answers a client of which net/http cannot have a connection, and closes
// its socket.
func (x *express) refuse(client *os.File, reason error) {
	defer client.Close()
	client.WriteString( // its buffer is empty: that does not wait
		"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	x.gate.use(-upgradeDescriptors)
	x.proxy.results[resultMaxSessions].Add(1)
	x.report(reason)
}

// report logs that a client was not answered, as others have taken the descriptors
// that the gate counts on, no more than once a second.
func (x *express) report(reason error) {
	if omitted, ok := x.logged.allow(time.Second); ok {
		x.log.Warn("no descriptor for a client", "reason", reason.Error(), "omitted", omitted)
	}
}

// admit gives the client to a poller.
func (x *express) admit(fd int32, peer syscall.Sockaddr) {
	a := &arrival{express: x, poller: x.proxy.relay.carrier.choose(), fd: [2]int32{fd, -1}, peer: clientAddr(addressOf(peer))}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.timer = time.AfterFunc(expressTime, a.leave)
	a.slot = a.poller.seat(a)
	if err := a.watch(client, toRead); err != nil {
		a.toHTTP(nil)
	}
}

// upgrade returns the request at the beginning of data and how long it is, or nil
// if it is not plain: what net/http's server would do with it is net/http's.
func (x *express) upgrade(data []byte) (*http.Request, int) {
	if smallHead(data) == 0 {
		return nil, 0
	}
	rest := bytes.NewReader(data)
	br := x.proxy.reader(rest)
	defer x.proxy.readers.Put(br)
	r, err := http.ReadRequest(br)
	size := len(data) - rest.Len() - br.Buffered()
	if err != nil || size > x.proxy.limits.headerBytes || !isPlain(r) {
		return nil, 0
	}
	return r, size
}

// A head on the short way has at most so many bytes, and so many lines and commas:
// it is read on the goroutine that carries sessions, which wait meanwhile.
const (
	smallBytes = 4 << 10
	smallParts = 64
)

// smallHead returns how long the head at the beginning of data is; 0 if it is not
// whole or not small.
func smallHead(data []byte) int {
	data = data[:min(len(data), smallBytes)]
	end := bytes.Index(data, []byte("\r\n\r\n"))
	if end < 0 {
		return 0
	}
	head := data[:end+len("\r\n\r\n")]
	if bytes.Count(head, []byte("\n"))+bytes.Count(head, []byte(",")) > smallParts {
		return 0
	}
	return len(head)
}

// smallAnswer reports whether the heads of a backend's answer, interim ones and the
// last, are small.
func smallAnswer(data []byte) bool {
	for range maxInterim {
		size := smallHead(data)
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

// isPlain reports whether there is nothing in the request that net/http's server
// checks and http.ReadRequest does not.
func isPlain(r *http.Request) bool {
	for name := range r.Header {
		if isOdd(name) || name == "Expect" {
			return false
		}
	}
	return r.Proto == "HTTP/1.1" && strings.HasPrefix(r.RequestURI, "/") && r.Host != "" && strings.Trim(r.Host, hostBytes) == ""
}

// hostBytes are those of the hosts and ports that are plain.
const hostBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]"

// arrival is a client on the short way:
//
//	head ──read, checked, sent to the owner──> asked ──101──> session
//	  │ └──the owner cannot be dialled──> held    │
//	  │                                    │      │
//	  └────────────── anything else ───────┴──────┴──> net/http, or closed
type arrival struct {
	// Static after admit.
	express *express
	poller  *poller
	slot    int32
	peer    clientAddr
	timer   *time.Timer

	// Guarded by mu.
	mu      sync.Mutex
	over    bool       // it has left the short way
	fd      [2]int32   // the sockets, -1: none
	mask    [2]uint32  // what epoll watches
	unheard [2]bool    // epoll has told of something that is left to the session
	head    []byte     // what the client has sent
	early   int        // where in that begins what came after its upgrade
	session *session   // that it is to be; nil until the upgrade was read
	request []byte     // of the upgrade for the backend, what is not sent yet
	dialled bool       // the backend has taken a part of it
	failure error      // of the dial; nil if that was given up, which says nothing about the backend
	held    *heldOwner // nil if it is not held
}

// heldOwner is what an arrival has while it is held, in place of a session and a
// request: with its head, that is all of it, without a goroutine. A client that is
// held costs little, so that there may be many.
type heldOwner struct {
	// Static after construction.
	namespace string
	ctx       context.Context // ends with the time of hold, or when the arrival is over
	cancel    context.CancelFunc
	waiter    *waiter
	state     atomic.Int32 // heldParked, and so on

	// Guarded by the arrival's mu.
	stamp   string  // of the table that says who the owner is
	pending pending // what net/http gets; its owner changes with the table
}

// What an arrival that is held does about its place in the line.
const (
	heldParked int32 = iota // nothing: it waits to be roused
	heldRuns                // a goroutine goes on with it
	heldAgain               // and it was roused meanwhile
)

// ready goes on with what the poller tells of a socket.
func (a *arrival) ready(i side, events uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	gone := events&(syscall.EPOLLHUP|syscall.EPOLLERR) != 0 // or half-closed, and to be answered
	ended := gone || events&syscall.EPOLLRDHUP != 0
	a.unheard[i] = a.unheard[i] || ended || events&syscall.EPOLLPRI != 0
	switch {
	case a.over:
	case a.held != nil && i == server: // of a dial that has failed
	case a.held != nil && gone:
		a.clientGone()
	case a.held != nil && ended:
		a.toHTTP(nil)
	case a.held != nil: // it is read by net/http
	case a.session == nil && ended:
		a.toHTTP(nil)
	case a.session == nil:
		a.arrive()
	case i == server:
		a.hear()
	case gone:
		a.clientGone()
	default:
		a.unheard[client] = true
	}
}

// arrive reads the client's upgrade, and sends it to the owner.
func (a *arrival) arrive() {
	data, errno := a.receive(client)
	switch {
	case errno == syscall.EAGAIN:
		return
	case errno != 0 || len(data) == 0:
		a.closeBoth()
		return
	}
	a.head = afterEmptyLines(data)
	switch {
	case !a.check():
		a.toHTTP(nil)
	case !a.dial():
		a.hold()
	}
}

// check judges the upgrade, and makes the session and the request for the owner.
func (a *arrival) check() bool {
	p := a.express.proxy
	r, size := a.express.upgrade(a.head)
	if r == nil {
		return false
	}
	r.RemoteAddr, a.early = a.peer.String(), size
	namespace, owner, table, no := p.admit(r)
	if no != nil {
		return false
	}
	peer := forwardedFor(r)
	a.request = requestHead(r, peer, p.pod, table, p.backends.name(owner))
	a.session = newSession(namespace, owner, peer)
	return true
}

// hold waits for the owner, which cannot be dialled now, and then leaves the client to
// net/http, which knows what to answer, with the connection to the owner or with the
// failure. Until then it is not net/http's, whose buffers and goroutines would be
// many times of what is needed.
func (a *arrival) hold() {
	p := a.express.proxy
	if a.fd[server] >= 0 && a.dialled || a.unheard[client] || !p.holdHead(len(a.head)) {
		a.toHTTP(nil)
		return
	}
	a.closeBackend()
	a.timer.Stop()
	h := &heldOwner{namespace: a.session.namespace, waiter: p.backends.holds.enter()}
	h.pending = pending{owner: a.session.backend, until: time.Now().Add(p.limits.hold)}
	h.ctx, h.cancel = context.WithDeadline(context.Background(), h.pending.until)
	h.waiter.call, h.waiter.wake = a.rouse, nil
	h.state.Store(heldAgain) // it has to ask for its owner, as the table may be another by now
	a.held, a.session, a.request, a.failure = h, nil, nil, nil
	p.upgrades.Add(1) // until goOn is over
	context.AfterFunc(h.ctx, a.rouse)
	go a.goOn()
}

// rouse makes goOn be called, if it does not run.
func (a *arrival) rouse() {
	state := &a.held.state
	if state.CompareAndSwap(heldParked, heldRuns) {
		go a.goOn()
		return
	}
	state.CompareAndSwap(heldRuns, heldAgain) // if goOn was about to end, it looks once more
}

// goOn goes on with an arrival that is held as far as that is possible now: when it has
// its turn it dials, as backends.hold does.
func (a *arrival) goOn() {
	for {
		a.held.state.Store(heldRuns)
		if a.step() {
			a.express.proxy.upgrades.Done()
			return
		}
		if a.held.state.CompareAndSwap(heldRuns, heldParked) {
			return
		}
	}
}

// step leaves the line, with its turn or without, and joins the owner's line again if
// there is no connection. It reports whether the arrival is held no more.
func (a *arrival) step() (over bool) {
	h, b := a.held, a.express.proxy.backends
	owner := h.pending.owner // only ask changes it
	var conn net.Conn
	var pod string
	err := b.holds.leave(h.ctx, h.waiter, owner)
	if err == nil {
		conn, pod, err = b.dialInTurn(h.ctx, h.waiter, owner)
	}
	switch {
	case errors.Is(err, errAskAgain):
	case err == nil && a.express.proxy.relay.leftBehind(h.namespace) != nil: // the pod was replaced since ask
		conn.Close()
	default:
		return a.resume(conn, pod, err)
	}
	swaps := b.holds.swaps.Load()
	if err := a.ask(); err != nil {
		return a.resume(nil, "", err)
	}
	if !b.holds.join(h.waiter, h.pending.owner, swaps) {
		a.rouse() // to ask again
	}
	return false
}

// ask asks again who the owner is, and waits until that may get sessions of the
// namespace.
func (a *arrival) ask() error {
	p, h := a.express.proxy, a.held
	owner, stamp, no := p.owner(h.namespace)
	if no != nil {
		return no
	}
	a.mu.Lock()
	if !a.over { // else its place was given back
		p.waiting.move(h.pending.owner, owner)
		h.pending.owner, h.stamp = owner, stamp
	}
	a.mu.Unlock()
	return p.awaitOld(h.ctx, h.namespace, owner)
}

// resume sends the upgrade to the owner, if there is a connection now, or notes why
// not, and leaves the client to net/http. If that was done before, it closes conn.
func (a *arrival) resume(conn net.Conn, pod string, failure error) (over bool) {
	p := a.express.proxy
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		if conn != nil {
			conn.Close()
		}
		return true
	}
	h := a.held
	h.pending.failure = failure
	if conn != nil {
		h.pending.backend, h.pending.pod = conn, pod
		r, _ := a.express.upgrade(a.head) // as it was taken before
		r.RemoteAddr = a.peer.String()
		conn.SetWriteDeadline(time.Now().Add(p.limits.handshake))
		conn.Write(requestHead(r, forwardedFor(r), p.pod, h.stamp, p.backends.name(h.pending.owner))) // an error shows when the answer is read
	}
	a.toHTTP(nil)
	return true
}

// dial connects to the owner, if that may be done now, and sends the request. A
// connection that is not there yet takes that later.
func (a *arrival) dial() bool {
	b := a.express.proxy.backends
	a.session.pod = b.pod(a.session.backend) // before the address, as in hold
	addr, ok := b.atOnce(a.session.backend)
	if !ok {
		return false
	}
	if a.express.proxy.relay.leftBehind(a.session.namespace) != nil {
		b.dialled(a.session.backend, context.Canceled, true)
		return false
	}
	fd, err := connectTo(addr, b.dialer.Control)
	if err != nil {
		b.dialled(a.session.backend, err, false)
		return false
	}
	a.fd[server] = fd
	if !a.send() {
		return false
	}
	mask := uint32(toRead)
	if len(a.request) > 0 {
		mask |= syscall.EPOLLOUT
	}
	return a.watch(server, mask) == nil
}

// send sends of the request what the backend takes, and reports whether that is
// well.
func (a *arrival) send() bool {
	n, errno := a.poller.send(a.fd[server], a.request)
	if errno == syscall.EAGAIN {
		return true
	}
	if errno != 0 {
		a.failure = os.NewSyscallError("connect", errno)
		return false
	}
	a.request = a.request[n:]
	if !a.dialled {
		a.dialled = true
		a.express.proxy.backends.dialled(a.session.backend, nil, false)
	}
	return true
}

// hear goes on with the backend: it takes the request, or has answered.
func (a *arrival) hear() {
	if len(a.request) > 0 {
		if !a.send() {
			a.hold()
			return
		}
		if len(a.request) > 0 {
			return
		}
	}
	data, errno := a.receive(server)
	switch {
	case errno == syscall.EAGAIN:
	case errno != 0 || !a.answer(data):
		a.toHTTP(data)
	}
}

// answer makes the session, if data begins with a 101 that can be passed on.
func (a *arrival) answer(data []byte) bool {
	p := a.express.proxy
	if !smallAnswer(data) {
		return false
	}
	rest := bytes.NewReader(data)
	br := p.reader(rest)
	defer p.readers.Put(br)
	resp, err := readAnswer(br)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		return false
	}
	p.backends.holds.meant(a.session.backend)
	if p.moves.misplaced(a.session) {
		a.closeBackend()
		return false
	}
	head := switchingHead(resp)
	if n, errno := a.poller.send(a.fd[client], head); errno != 0 || n < len(head) { // nothing else is in its buffer
		a.clientGone()
		return true
	}
	early := data[len(data)-rest.Len()-br.Buffered():]
	a.over = true
	a.timer.Stop()
	p.results[resultOK].Add(1)
	p.handOver(a.session, func() { a.become(early) })
	return true
}

// become makes the relay carry the session.
func (a *arrival) become(fromBackend []byte) {
	for i, left := range a.unheard {
		if left {
			a.mask[i] |= again
		}
	}
	a.poller.adopt(a.session, a.slot, a.fd, a.mask, [2][]byte{a.head[a.early:], fromBackend})
}

// receive returns what has come from the side, up to the most that a head may
// have: a longer one is never whole here, and is net/http's.
func (a *arrival) receive(i side) ([]byte, syscall.Errno) {
	most := min(bufferSize, a.express.proxy.limits.headerBytes)
	data, errno := a.poller.receive(a.fd[i], most)
	a.unheard[i] = a.unheard[i] || len(data) == most
	return data, errno
}

// watch makes the poller tell of the side.
func (a *arrival) watch(i side, mask uint32) error {
	a.mask[i] = mask | edge
	return a.poller.watchGuest(syscall.EPOLL_CTL_ADD, a.slot, i, a.fd[i], a.mask[i])
}

// leave leaves the client to net/http, unless it is over.
func (a *arrival) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.over {
		a.toHTTP(nil)
	}
}

// toHTTP leaves the client to net/http with all it has sent, and if the owner has
// its upgrade, the owner too, with what came of the answer.
func (a *arrival) toHTTP(answer []byte) {
	if !a.dialled || len(a.request) > 0 {
		a.closeBackend()
	}
	a.retire()
	x := a.express
	var done pending
	if a.held != nil {
		done = a.held.pending
	}
	socket := a.remove(client)
	conn, err := connOf(socket, x.proxy.backends.dialer.Control)
	if err != nil {
		a.closeBackend()
		if done.backend != nil {
			done.backend.Close()
		}
		x.refuse(socket, err)
		return
	}
	socket.Close() // before the owner is duplicated: there may be upgradeDescriptors at once
	front := &frontConn{Conn: &resumed{conn, a.head}, peer: a.peer, gate: x.gate, badHeads: &x.proxy.results[resultBadHead]}
	if a.fd[server] >= 0 {
		socket := a.remove(server)
		defer socket.Close()
		if conn, err := connOf(socket, x.proxy.backends.dialer.Control); err == nil { // else it is asked again
			done = pending{backend: &resumed{conn, answer}, owner: a.session.backend, pod: a.session.pod}
		}
	}
	front.pending.Store(&done)
	x.leave(front)
}

// remove takes the side's socket from the poller.
func (a *arrival) remove(i side) *os.File {
	syscall.EpollCtl(a.poller.epoll, syscall.EPOLL_CTL_DEL, int(a.fd[i]), nil) // or it is watched while a duplicate is open
	return os.NewFile(uintptr(a.fd[i]), "socket")
}

// closeBackend closes the connection to the backend, if there is one.
func (a *arrival) closeBackend() {
	if a.fd[server] < 0 {
		return
	}
	if !a.dialled {
		a.express.proxy.backends.dialled(a.session.backend, cmp.Or(a.failure, context.Canceled), a.failure == nil)
	}
	syscall.Close(int(a.fd[server]))
	a.fd[server] = -1
}

// clientGone ends it since the client has left during its upgrade.
func (a *arrival) clientGone() {
	a.express.proxy.results[resultClientGone].Add(1)
	a.closeBoth()
}

// closeBoth ends it, and closes the sockets.
func (a *arrival) closeBoth() {
	a.closeBackend()
	a.retire()
	syscall.Close(int(a.fd[client]))
	a.express.gate.use(-upgradeDescriptors)
}

// retire ends the short way without a session.
func (a *arrival) retire() {
	a.over = true
	a.timer.Stop()
	a.poller.unseat(a.slot)
	p := a.express.proxy
	switch {
	case a.held != nil:
		a.held.cancel()
		p.held.Add(-int64(len(a.head)))
		p.waiting.leave(a.held.pending.owner)
	case a.session != nil:
		p.waiting.leave(a.session.backend)
	}
}

// acceptOne waits for the next client (accept4(2)).
func acceptOne(listener syscall.RawConn) (fd int, peer syscall.Sockaddr, err error) {
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
	if (err == nil || errors.Is(err, syscall.EINPROGRESS)) && isItself(fd, addr) {
		err = fmt.Errorf("dial tcp %s: %w", addr, errToItself)
	}
	if err == nil || errors.Is(err, syscall.EINPROGRESS) {
		return int32(fd), nil
	}
	syscall.Close(fd)
	return -1, err
}

// isItself reports whether the socket, which connects to the address, has it too. It
// has its own as soon as it connects.
func isItself(fd int, to netip.AddrPort) bool {
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

// connOf makes a connection of a duplicate of the socket, and gives it its options
// again: package net sets those of keepalive as it likes. The caller closes both.
func connOf(socket *os.File, control socketControl) (net.Conn, error) {
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
