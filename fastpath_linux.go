//go:build !portable && !386

package main

import (
	"bufio"
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// fastPath takes clients to their backends without net/http, and so for less CPU. Each client
// has a goroutine, which reads its request, dials the owner, sends the request and the response
// on, and gives both sockets to the relay: see fastConn.serve. From the start the client has a
// slot of the poller that is to carry its session. A socket comes into the epoll set of that
// poller when something waits for it. Sockets of the fast path are not in Go's poller, except
// for a backend's while package net dials it by its host name.
//
// The fast path takes simple upgrades (isSimpleRequest), and responses of 101. All other
// clients fall back to net/http: it has fastPath as its listener, and ServeHTTP goes on
// where the fast path stopped.
type fastPath struct {
	// Static after construction.
	proxy       *proxy
	listener    net.Listener
	file        *os.File // a duplicate of the listener's socket; nil if there is none
	fdLimit     *descriptorLimit
	log         *slog.Logger
	retry       *acceptRetry
	logThrottle throttle

	stopping   atomic.Bool     // all clients have to fall back
	lifetime   context.Context // ends when Accept has to fail, with its error
	failAccept context.CancelCauseFunc
	fallbacks  chan net.Conn // to Accept

	done    chan struct{}  // closed when run has ended
	running sync.WaitGroup // the fastConns
}

// fastPathTimeout is how long a client may be on the fast path before it falls back. It
// begins anew after a TLS handshake, and when a client that was parked is connected to its
// owner: before, -header-timeout and -hold bound these.
const fastPathTimeout = 500 * time.Millisecond

// newFastPath returns the fast path of a *net.TCPListener or *net.UnixListener. run
// accepts its clients. Close closes the listener too.
func newFastPath(p *proxy, l net.Listener, fdLimit *descriptorLimit) *fastPath {
	f := &fastPath{
		proxy: p, listener: l, fdLimit: fdLimit, log: p.log,
		retry:     newAcceptRetry("-listen", p.log),
		fallbacks: make(chan net.Conn), done: make(chan struct{}),
	}
	f.lifetime, f.failAccept = context.WithCancelCause(context.Background())
	file, err := l.(interface{ File() (*os.File, error) }).File()
	if f.file = file; err != nil {
		f.failAccept(err)
	}
	return f
}

func (f *fastPath) Addr() net.Addr { return f.listener.Addr() }

// Accept returns the next client that falls back to net/http.
func (f *fastPath) Accept() (net.Conn, error) {
	for {
		select {
		case conn := <-f.fallbacks:
			if conn != nil { // nil is from stop: net/http has come back for the next client
				return conn, nil
			}
		case <-f.lifetime.Done():
			return nil, context.Cause(f.lifetime)
		}
	}
}

// stop ends run, which must have begun, and makes all pending clients fall back. net/http
// must call Accept meanwhile. stop returns when net/http has taken all of them, and has
// called Accept once more. The listener stays open.
func (f *fastPath) stop() {
	f.stopAccepting()
	<-f.done
	f.running.Wait()
	f.handToHTTP(nil)
}

// handToHTTP waits until Accept takes the client. It closes the client if Accept fails.
func (f *fastPath) handToHTTP(conn net.Conn) {
	select {
	case f.fallbacks <- conn:
	case <-f.lifetime.Done():
		if conn != nil {
			conn.Close()
		}
	}
}

// stopAccepting ends run, and makes the pending clients fall back.
func (f *fastPath) stopAccepting() {
	f.stopping.Store(true)
	for _, p := range f.proxy.relay.engine.pollers {
		p.stopSocketUsers()
	}
	f.retry.close()
	f.fdLimit.close()
	f.file.Close()
}

// Close closes the listener, and ends Accept and run, for which it does not wait. Clients that
// fall back after it are closed.
func (f *fastPath) Close() error {
	f.stopAccepting()
	f.failAccept(net.ErrClosed)
	return f.listener.Close()
}

// run accepts clients until stop or Close. If it cannot, Accept returns the error.
func (f *fastPath) run() {
	defer close(f.done)
	if err := f.acceptClients(); !f.stopping.Load() {
		f.failAccept(err)
	}
}

// acceptClients accepts clients when the descriptor limit has room for them, until
// stopAccepting.
func (f *fastPath) acceptClients() error {
	raw, err := f.file.SyscallConn()
	if err != nil {
		return err
	}
	for {
		if err := f.fdLimit.wait(); err != nil {
			return err
		}
		fd, peer, err := acceptSocket(raw)
		switch {
		case err == nil:
			f.retry.succeeded()
			f.fdLimit.add(descriptorsPerClient)
			f.startClient(int32(fd), peer)
		case !f.retry.shouldRetry(err):
			return os.NewSyscallError("accept4", err)
		}
	}
}

// startClient starts the goroutine of a client.
func (f *fastPath) startClient(fd int32, peer syscall.Sockaddr) {
	poller := f.proxy.relay.engine.nextPoller()
	addr := addrString(peer)
	c := &fastConn{
		fastPath: f, poller: poller, remoteAddr: clientAddr(addr),
		expectsProxyHeader: f.proxy.proxyProtocol.expects(addr),
	}
	c.fd = [2]int32{fd, -1}
	if s := f.proxy.tls; s != nil {
		c.tls = newTLSConn(nil, s.config())
	}
	c.changed.L = &poller.mu
	c.slot = poller.addSocketUser(c)
	f.running.Add(1)
	go c.serve()
}

// refusedHead answers a client of refuseClient.
const refusedHead = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n" +
	"Connection: close\r\nContent-Length: 0\r\n\r\n"

// refuseClient sends head to a client that cannot fall back, because no descriptor is left
// for its duplicate, and closes its socket.
func (f *fastPath) refuseClient(client *os.File, head []byte, reason error) {
	defer client.Close()
	client.Write(head) // the socket's buffer is empty
	f.fdLimit.add(-descriptorsPerClient)
	f.proxy.results[resultMaxSessions].Add(1)
	if omitted, ok := f.logThrottle.allow(time.Second); ok {
		f.log.Warn("cannot accept clients: out of file descriptors", "error", reason.Error(), "omitted", omitted)
	}
}

// parseHead reads a head with read from the beginning of data. It returns what follows
// the head, a part of data, and the error of read.
func (p *proxy) parseHead(
	data []byte, read func(*bufio.Reader) error,
) (rest []byte, err error) {
	source := bytes.NewReader(data)
	br := p.newReader(source)
	defer p.readers.Put(br)
	err = read(br)
	return data[len(data)-source.Len()-br.Buffered():], err
}

// parseUpgrade returns the request at the beginning of data and the length of its head.
// It returns nil if the head is not whole or the request is not simple.
func (f *fastPath) parseUpgrade(data []byte) (r *http.Request, size int) {
	rest, err := f.proxy.parseHead(data, func(br *bufio.Reader) (err error) {
		r, err = http.ReadRequest(br)
		return err
	})
	size = len(data) - len(rest)
	if err != nil || size > f.proxy.limits.headerBytes || !isSimpleRequest(r) {
		return nil, 0
	}
	return r, size
}

// maxFastResponse is how many bytes the head of a 101 may have on the fast path, which
// sends it at once: the empty buffer of any socket takes as many.
const maxFastResponse = 4 << 10

// parseSwitching returns the 101 at the beginning of data, and what follows it. It
// returns nil for another response, for a head that is not whole, and for one that is
// longer than maxFastResponse.
func (f *fastPath) parseSwitching(data []byte) (resp *http.Response, rest []byte) {
	rest, err := f.proxy.parseHead(data, func(br *bufio.Reader) (err error) {
		resp, err = readResponse(br)
		return err
	})
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols ||
		len(data)-len(rest) > maxFastResponse {
		return nil, nil
	}
	return resp, rest
}

// isSimpleRequest reports whether net/http's server, which checks more than
// http.ReadRequest, would give the request to its handler as it is.
func isSimpleRequest(r *http.Request) bool {
	for name := range r.Header {
		if isInvalidFieldName(name) || name == "Expect" {
			return false
		}
	}
	return r.Proto == "HTTP/1.1" && strings.HasPrefix(r.RequestURI, "/") &&
		r.Host != "" && strings.Trim(r.Host, hostBytes) == ""
}

// hostBytes are the bytes of a simple Host.
const hostBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]"
