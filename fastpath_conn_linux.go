//go:build !portable && !386

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// fastConn is a client on the fast path, until it is a session, falls back or is closed.
// It has one goroutine. While it is parked in its owner's dial queue it has none, and takes
// little memory, so there may be many.
type fastConn struct {
	// Static after construction.
	fastPath *fastPath
	poller   *poller
	slot     int32 // index in poller.slots

	// Guarded by poller.mu.
	sockets
	changed             sync.Cond // events changed, or ctx has ended
	halfClosed          bool      // the client has ended its side of the connection, or the connection is dead
	gone                bool      // the client's connection is dead: not after a FIN alone
	fallBackOnHalfClose bool      // a client that half-closes its connection has to fall back
	backendLost         bool      // a call on the backend's socket has returned what isLost says
	// With TLS: the handshake is under way; it was ended to make room.
	tlsHandshaking, evicted bool

	// Owned by its goroutine. Before it parks, it leaves these to the next one.
	ctx                *fastConnContext // see cancelIfGone; also ends at its deadline, and by evict
	remoteAddr         clientAddr       // of the client
	expectsProxyHeader bool             // received has to begin with a header of the PROXY protocol
	tls                *tlsConn         // nil if clients come without TLS
	received           []byte           // what the client has sent
	earlyAt            int              // index in received of what follows the request
	request            *http.Request    // nil before it was read, and while it is parked
	pending            *pendingRequest  // nil before its admission
	waiter             waiter           // its sequence is 0 if the owner could be dialled at once

	parked atomic.Bool
}

// fastConnContext is the context of a fastConn: one of package context would take a
// thirtieth of the CPU time of a handshake.
type fastConnContext struct {
	// Static after construction.
	mu       *sync.Mutex // poller.mu
	deadline time.Time
	timer    *time.Timer // calls expire

	// Guarded by mu.
	onEnd func()        // called at the end, with mu locked; may be nil
	err   error         // not nil from the end on
	done  chan struct{} // closed at the end; nil until Done was called
}

// end ends the context with the error, unless it has ended. The caller holds mu.
func (x *fastConnContext) end(err error) {
	if x.err != nil {
		return
	}
	x.err = err
	if x.done != nil {
		close(x.done)
	}
	if x.onEnd != nil {
		x.onEnd()
	}
}

// expire ends the context at its deadline.
func (x *fastConnContext) expire() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.end(context.DeadlineExceeded)
}

func (x *fastConnContext) Deadline() (time.Time, bool) { return x.deadline, true }
func (x *fastConnContext) Value(any) any               { return nil }

func (x *fastConnContext) Err() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

func (x *fastConnContext) Done() <-chan struct{} {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.done == nil {
		x.done = make(chan struct{})
		if x.err != nil {
			close(x.done)
		}
	}
	return x.done
}

// serve takes a client from accept to its session.
func (c *fastConn) serve() {
	growStack(0)
	p := c.fastPath.proxy
	head, err := c.readHead()
	c.received = head
	if !c.expectsProxyHeader {
		c.received = trimEmptyLines(head)
	}
	switch {
	case errors.Is(err, errTLSHandshake):
		c.close()
	case c.ctx.Err() != nil, c.expectsProxyHeader && len(head) > 0: // it is invalid, or was cut
		c.fallBack(nil, nil)
	case err != nil:
		c.close()
	case !c.admit():
		c.fallBack(nil, nil)
	case p.relay.oldPodSessionsDone(c.pending.namespace) != nil ||
		!p.backends.queues.tryDial(c.pending.queueOrdinal()):
		go c.park()
	default:
		c.dialOwner()
	}
}

// readHead reads what the client sends first: after the header of the PROXY protocol, if
// that has to come, and within TLS.
func (c *fastConn) readHead() ([]byte, error) {
	if c.tls != nil {
		return c.readTLSHead()
	}
	c.setDeadline(time.Now().Add(fastPathTimeout), false)
	more := func() ([]byte, error) { return c.read(clientSide) }
	data, err := more()
	if c.expectsProxyHeader && err == nil {
		data, err = c.readProxyHeader(data, more)
	}
	return data, err
}

// readProxyHeader reads the header of the PROXY protocol, of which it gets the beginning,
// and takes the client's address from it. more reads what comes next. It returns what
// follows the header, or all that the client has sent if there is an error.
func (c *fastConn) readProxyHeader(
	data []byte, more func() ([]byte, error),
) ([]byte, error) {
	client, rest, err := c.fastPath.proxy.proxyProtocol.read(data, more)
	if err != nil {
		return rest, err
	}
	c.expectsProxyHeader = false
	if client != nil {
		c.remoteAddr = clientAddr(client.String())
	}
	if len(rest) == 0 {
		return more()
	}
	return rest, nil
}

// growStack makes the stack of its goroutine as large as serve needs it. Without it the
// stack would grow twice in serve, and each time copy what is on it by then.
//
//go:noinline
func growStack(i int) byte {
	var room [6 << 10]byte
	return room[i]
}

// admit parses and admits the upgrade. From then on the poller watches the client. It
// reports whether the client stays on the fast path.
func (c *fastConn) admit() bool {
	if c.request = c.parseUpgrade(); c.request == nil {
		return false
	}
	upgrade, refused := c.fastPath.proxy.admit(c.request)
	if refused != nil {
		return false
	}
	c.pending = upgrade
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	return c.watch(clientSide, epollReadEvents) == nil
}

// watch makes epoll watch the side for the events in mask. The caller holds poller.mu.
func (c *fastConn) watch(i side, mask uint32) error {
	return c.poller.watch(c.slot, i, c.fd[i], &c.epollMask[i], mask)
}

// parseUpgrade returns the client's request, or nil if it is not simple.
func (c *fastConn) parseUpgrade() *http.Request {
	r, size := c.fastPath.parseUpgrade(c.received)
	if r != nil {
		r.RemoteAddr, c.earlyAt = c.remoteAddr.String(), size
		r.TLS = c.tls.state()
		c.fastPath.proxy.removeForwarded(r)
	}
	return r
}

// dialOwner dials the owner, when it is the client's turn, and goes on with askOwner or park.
func (c *fastConn) dialOwner() {
	p, u := c.fastPath.proxy, c.pending
	podUID, err := p.backends.dialInTurn(c.ctx, &c.waiter, u.backend, c.connect)
	switch {
	case err == nil && p.relay.oldPodSessionsDone(u.namespace) == nil:
		u.podUID = podUID
		c.askOwner()
	case err == nil: // the pod was replaced meanwhile
		c.closeBackend()
		go c.park()
	case errors.Is(err, errRecheckOwner):
		go c.park()
	default:
		c.fallBack(nil, err)
	}
}

// askOwner sends the owner the request, and makes the session of its 101. Any other answer, or
// none within fastPathTimeout, goes to fallBack with what has come.
func (c *fastConn) askOwner() {
	p, u := c.fastPath.proxy, c.pending
	if !p.startFlight(u) {
		c.closeBackend()
		go c.park() // one that was parked keeps its holdDeadline
		return
	}
	if c.wasParked() {
		c.setDeadline(time.Now().Add(fastPathTimeout), false)
		c.request = c.parseUpgrade()
	}
	clientAddrs, owner := forwardedFor(c.request), p.backends.name(u.backend)
	head := finishRequestHead(startRequestHead(c.request, clientAddrs, p.podName), u.stamp, u.step, owner)
	if c.write(backendSide, head) != nil {
		c.abandonBackend()
		c.fallBack(nil, nil)
		return
	}
	answer, _ := c.read(backendSide) // the next read, for net/http, returns an end again
	resp, fromBackend := c.fastPath.parseSwitching(answer)
	if resp == nil {
		c.fallBack(answer, nil)
		return
	}
	p.backends.queues.clearMisdirected(u.backend)
	s, err := p.newSession(u, clientAddrs)
	if err != nil {
		c.abandonBackend()
		c.fallBack(nil, nil)
		return
	}
	early := [2][]byte{c.received[c.earlyAt:], fromBackend}
	if c.tls != nil {
		early[clientSide] = slices.Concat(early[clientSide], c.tls.takeBuffered())
	}
	if !c.respond(switchingProtocolsHead(resp)) {
		c.closeGone()
		return
	}
	c.endContext()
	p.openSession(u, s, func() { c.poller.promote(s, c.slot, &c.sockets, c.tls, early) })
	c.fastPath.running.Done()
}

// park parks the client in the dial queue of its owner, which cannot be dialled now. The caller
// gives it a goroutine of its own: while it waits for sessions with an old pod, its stack is
// small. If it may dial, has to ask for its owner again, or its time is over, resume goes on.
func (c *fastConn) park() {
	p, u := c.fastPath.proxy, c.pending
	if !c.wasParked() {
		if u.reserveHead(len(c.received), p.limits.pendingRequests) != nil {
			c.fallBack(nil, nil)
			return
		}
		u.beginWait()
		u.holdDeadline, c.request = u.waitBegan.Add(p.limits.holdTimeout), nil
		c.waiter.namespace, c.waiter.onWake = u.namespace, c.unpark
		p.backends.queues.setSequence(&c.waiter)
		c.setDeadline(u.holdDeadline, true)
	}
	if err := p.recheckOwner(c.ctx, u); err != nil {
		c.fallBack(nil, err)
		return
	}
	ctx, queue := c.ctx, u.queueOrdinal()
	c.parked.Store(true) // from now on another goroutine may own c
	if !p.backends.queues.enqueue(ctx, &c.waiter, queue, p.mover.findQueueOrdinal) {
		c.unpark() // resume asks again; its dequeue allows a waiter in no queue
	}
}

// unpark starts a goroutine for c if it is parked. It does not block.
func (c *fastConn) unpark() {
	if c.parked.CompareAndSwap(true, false) {
		go c.resume()
	}
}

// resume goes on with c, which was parked.
func (c *fastConn) resume() {
	queues := c.fastPath.proxy.backends.queues
	switch err := queues.dequeue(c.ctx, &c.waiter, c.pending.queueOrdinal()); {
	case err == nil:
		c.dialOwner()
	case errors.Is(err, errRecheckOwner):
		c.park()
	default:
		c.fallBack(nil, err)
	}
}

// wasParked reports whether the client has waited for its owner.
func (c *fastConn) wasParked() bool { return c.waiter.sequence != 0 }

// fallBack leaves the client to net/http, with what it has sent and its upgrade. If the
// owner has got the request, its connection goes too, with what it has answered. failure
// is why the owner could not be reached. An admitted client that is gone is closed. c must not
// be used after it.
func (c *fastConn) fallBack(answer []byte, failure error) {
	if c.pending != nil && c.isGone() {
		c.closeGone()
		return
	}
	if c.wasParked() && !errors.Is(c.ctx.Err(), context.Canceled) { // else net/http finds out anew
		c.pending.dialErr = failure
	}
	f, control := c.fastPath, c.fastPath.proxy.backends.dialer.Control
	defer f.running.Done()
	c.detach()
	socket := os.NewFile(uintptr(c.fd[clientSide]), "socket")
	conn, err := connFromSocket(socket, control)
	if err != nil {
		c.abandonBackend()
		c.pending.uncount()
		f.refuseClient(socket, c.sealedHead([]byte(refusedHead)), err)
		return
	}
	socket.Close() // before the owner's has a duplicate: descriptorsPerClient
	client := &clientConn{
		Conn: c.overTLS(conn), socket: conn, remoteAddr: c.remoteAddr,
		fdLimit: f.fdLimit, badHeads: &f.proxy.results[resultBadHead],
		tlsServer: f.proxy.tls, tls: c.tls,
	}
	if c.expectsProxyHeader {
		client.proxyProtocol = f.proxy.proxyProtocol
	}
	if c.fd[backendSide] >= 0 {
		if conn := c.takeBackend(); conn != nil {
			c.pending.backendConn = &prefixedConn{conn, answer}
		} else { // it is asked again
			c.pending.abandon(nil)
		}
	}
	client.pending.Store(c.pending)
	f.handToHTTP(client)
}

// closeGone closes and counts a client that has left during its upgrade. c must not be used
// after it.
func (c *fastConn) closeGone() {
	c.fastPath.proxy.results[resultClientGone].Add(1)
	c.close()
}

// close ends the upgrade, closes the client's socket, and abandons the backend's. c must not
// be used after it.
func (c *fastConn) close() {
	c.detach()
	c.abandonBackend()
	syscall.Close(int(c.fd[clientSide]))
	c.pending.uncount()
	c.fastPath.fdLimit.add(-descriptorsPerClient)
	c.fastPath.running.Done()
}

// detach takes the sockets from the poller, and ends the context.
func (c *fastConn) detach() {
	c.endContext()
	c.poller.removeSocketUser(c.slot, &c.sockets)
}

// endContext ends the context without a call of interrupt.
func (c *fastConn) endContext() {
	c.ctx.timer.Stop()
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.ctx.onEnd = nil
	c.ctx.end(context.Canceled)
}

// setDeadline gives c a context that ends at the deadline, in place of the one before.
// fallBackOnHalfClose is for the field of that name.
func (c *fastConn) setDeadline(deadline time.Time, fallBackOnHalfClose bool) {
	if c.ctx != nil {
		c.endContext()
	}
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	ctx := &fastConnContext{mu: &c.poller.mu, deadline: deadline, onEnd: c.interrupt}
	ctx.timer = time.AfterFunc(time.Until(deadline), ctx.expire)
	c.ctx, c.fallBackOnHalfClose = ctx, fallBackOnHalfClose
	c.cancelIfGone()
}

// interrupt wakes the goroutine of c, or starts one if c is parked. The caller holds
// poller.mu.
func (c *fastConn) interrupt() {
	c.changed.Signal()
	c.unpark()
}

// handleStop makes the client fall back, or ends its handshake in time. The caller holds
// poller.mu.
func (c *fastConn) handleStop() {
	if c.tlsHandshaking {
		c.ctx.timer.Reset(min(stopGrace, time.Until(c.ctx.deadline)))
	}
	c.cancelIfGone()
}

// handleEvent notes what epoll reports of a side. The caller holds poller.mu.
func (c *fastConn) handleEvent(i side, events uint32) {
	const gone = syscall.EPOLLHUP | syscall.EPOLLERR // a half-closed client is not gone
	const end = gone | syscall.EPOLLRDHUP | syscall.EPOLLPRI
	c.events[i] |= events
	c.mayHaveMore[i] = c.mayHaveMore[i] || events&end != 0
	c.halfClosed = c.halfClosed || i == clientSide && events&(gone|syscall.EPOLLRDHUP) != 0
	c.gone = c.gone || i == clientSide && events&gone != 0
	c.cancelIfGone()
	c.changed.Signal()
}

// cancelIfGone ends the context if the client is gone, has half-closed its connection
// while it is parked, or has to fall back because the router stops. The caller holds
// poller.mu.
func (c *fastConn) cancelIfGone() {
	gone := c.gone || c.fallBackOnHalfClose && c.halfClosed
	if c.ctx != nil && (gone || c.fastPath.stopping.Load() && !c.tlsHandshaking) {
		c.ctx.end(context.Canceled)
	}
}

// isGone reports whether the client is gone.
func (c *fastConn) isGone() bool {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	return c.gone
}

// wait makes epoll watch the side for the events in mask, and returns when there are
// events that came after c.events was cleared. ctx and c.ctx bound it. The caller holds
// poller.mu, which wait releases while it waits.
func (c *fastConn) wait(ctx context.Context, i side, mask uint32) error {
	if err := c.watch(i, mask); err != nil {
		return err
	}
	for c.events[i] == 0 {
		err := c.ctx.err
		if ctx != context.Context(c.ctx) {
			err = cmp.Or(err, ctx.Err())
		}
		if err != nil {
			return err
		}
		c.changed.Wait()
	}
	return nil
}

// read waits until the side has sent something, and returns it, up to the longest head that is
// allowed, and for a client with TLS no more than its session can send at once. The rest stays in
// the socket.
func (c *fastConn) read(i side) (data []byte, err error) {
	limit := min(bufferSize, c.fastPath.proxy.limits.headerBytes)
	if c.tls != nil && i == backendSide {
		limit = min(limit, maxTLSWrite)
	}
	err = c.receive(i, limit, func(received []byte) { data = bytes.Clone(received) })
	return data, err
}

// receive waits until the side has sent something, and calls use with it: up to limit
// bytes of the poller's buffer. The rest stays in the socket. use runs with poller.mu held,
// and must not keep the slice.
func (c *fastConn) receive(i side, limit int, use func(received []byte)) error {
	p := c.poller
	limit = min(limit, bufferSize)
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		c.events[i] = 0
		n, errno := p.buf.receive(c.fd[i], limit)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			if err := c.wait(c.ctx, i, epollReadEvents); err != nil {
				return err
			}
		case errno != 0:
			c.noteLoss(i, errno)
			return os.NewSyscallError("recv", errno)
		case n == 0:
			return io.EOF
		default:
			c.mayHaveMore[i] = c.mayHaveMore[i] || n == limit && (c.tls == nil || i == backendSide) // see promote
			use(p.buf.data[:n])
			return nil
		}
	}
}

// sendNow sends the side what its socket takes at once of data, and returns how much that
// is. If the send fails it returns 0: the next call on the socket returns the error again.
func (c *fastConn) sendNow(i side, data []byte) int {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	n, errno := c.poller.send(c.fd[i], data)
	if errno != 0 {
		return 0
	}
	return n
}

// write writes data to the side, and waits until the socket takes all of it.
func (c *fastConn) write(i side, data []byte) error {
	p := c.poller
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(data) > 0 {
		c.events[i] = 0
		n, errno := p.send(c.fd[i], data)
		switch errno {
		case 0:
			data = data[n:]
		case syscall.EAGAIN:
			err := c.wait(c.ctx, i, epollReadEvents|syscall.EPOLLOUT)
			if err != nil {
				return err
			}
		default:
			c.noteLoss(i, errno)
			return os.NewSyscallError("send", errno)
		}
	}
	return nil
}

// noteLoss notes that a call on the side's socket has returned errno. The caller holds poller.mu.
func (c *fastConn) noteLoss(i side, errno syscall.Errno) {
	c.backendLost = c.backendLost || i == backendSide && isLost(errno)
}

// respond sends the client the head of a response. The socket's buffer is empty: it
// takes all of the head, unless the client is gone.
func (c *fastConn) respond(head []byte) bool {
	head = c.sealedHead(head)
	return len(head) > 0 && c.sendNow(clientSide, head) == len(head)
}

// connect is a connector: it connects to a backend's address, host:port.
func (c *fastConn) connect(ctx context.Context, addr string) error {
	dialer := &c.fastPath.proxy.backends.dialer
	to, err := netip.ParseAddrPort(addr)
	if err != nil || to.Addr().Zone() != "" { // package net looks up the host or the zone
		conn, err := dialAddr(ctx, dialer, addr)
		if err == nil {
			err = c.setBackendConn(conn)
		}
		return err
	}
	fd, err := connectTo(to, dialer.Control)
	if c.setBackend(fd); err == nil {
		err = c.waitConnected(ctx)
	}
	if err == nil {
		return nil
	}
	c.closeBackend()
	if errors.Is(err, context.DeadlineExceeded) {
		err = os.ErrDeadlineExceeded // as package net returns it
	}
	return &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
}

// waitConnected returns nil when the backend's socket is connected, or else why it
// cannot be.
func (c *fastConn) waitConnected(ctx context.Context) error {
	fd := int(c.fd[backendSide])
	if isConnected(fd) {
		return nil
	}
	if ctx != context.Context(c.ctx) { // the end of c.ctx interrupts by itself
		defer context.AfterFunc(ctx, func() {
			c.poller.mu.Lock()
			defer c.poller.mu.Unlock()
			c.changed.Signal() // it may come late, when c is parked: this does not unpark c
		})()
	}
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	for !isConnected(fd) {
		errno, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ERROR)
		if err == nil && errno != 0 {
			err = syscall.Errno(errno)
		}
		if err != nil {
			return os.NewSyscallError("connect", err)
		}
		c.events[backendSide] = 0
		err = c.wait(ctx, backendSide, epollReadEvents|syscall.EPOLLOUT)
		if err != nil {
			return err
		}
	}
	return nil
}

// setBackend sets the backend's socket, which epoll does not watch yet.
func (c *fastConn) setBackend(fd int32) {
	const i = backendSide
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.fd[i], c.epollMask[i], c.events[i], c.mayHaveMore[i], c.backendLost = fd, 0, 0, false, false
}

// setBackendConn sets the socket of conn, which it closes, as the backend's. It returns an
// error if there is no descriptor for it.
func (c *fastConn) setBackendConn(conn net.Conn) error {
	fd := takeDescriptor(conn)
	if fd < 0 {
		err := os.NewSyscallError("fcntl", syscall.EMFILE)
		return &net.OpError{Op: "dial", Net: "tcp", Addr: conn.RemoteAddr(), Err: err}
	}
	c.setBackend(fd)
	return nil
}

// closeBackend closes the connection to the backend if there is one.
func (c *fastConn) closeBackend() {
	if c.fd[backendSide] >= 0 {
		syscall.Close(int(c.fd[backendSide]))
		c.setBackend(-1)
	}
}

// abandonBackend abandons the connection to the backend, if there is one, with the flight if
// the backend may have the request.
func (c *fastConn) abandonBackend() {
	switch {
	case c.fd[backendSide] < 0:
	case c.pending.flight == nil:
		c.closeBackend()
	default:
		c.pending.abandon(c.takeBackend())
	}
}

// takeBackend takes the connection to the backend from the poller. It returns nil, and
// has closed the socket, if it was lost or if there is no descriptor for its duplicate.
func (c *fastConn) takeBackend() net.Conn {
	c.poller.unwatchSocket(&c.sockets, backendSide)
	socket := os.NewFile(uintptr(c.fd[backendSide]), "socket")
	defer socket.Close()
	lost := c.backendLost
	if c.setBackend(-1); lost {
		return nil
	}
	conn, err := connFromSocket(socket, c.fastPath.proxy.backends.dialer.Control)
	if err != nil {
		return nil
	}
	return conn
}
