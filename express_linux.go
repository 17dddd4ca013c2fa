//go:build !portable && !386

package main

import (
	"bytes"
	"log/slog"
	"net"
	"net/http"
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
