//go:build !linux || portable || 386

package main

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// goneConn is a backend's connection that the kernel gave up: a read returns EOF, a
// write the failure.
type goneConn struct {
	net.Conn
	failure error
	writing chan struct{} // closed when a write begins; nil if the read does not wait for that
	fail    chan struct{} // the write waits until it is closed
}

func (c *goneConn) CloseWrite() error { return nil }

func (c *goneConn) Read([]byte) (int, error) {
	if c.writing != nil {
		<-c.writing
	}
	return 0, io.EOF
}

func (c *goneConn) Write([]byte) (int, error) {
	if c.writing != nil {
		close(c.writing)
	}
	<-c.fail
	return 0, c.failure
}

// The kernel returns the error of a connection from one call only. If that is a write,
// and a read has returned EOF meanwhile, the cause is the error. If the backend has
// ended before the write, or the write says only that nothing more can be sent, the
// cause is the backend's end.
func TestRelayFailedOrEnded(t *testing.T) {
	for _, tt := range []struct {
		failure error
		begun   bool // the write begins before the end is read
		want    cause
	}{
		{syscall.ETIMEDOUT, true, causeBackendError},
		{syscall.ECONNRESET, true, causeBackendError},
		{syscall.EPIPE, true, causeBackend},
		{syscall.ETIMEDOUT, false, causeBackend},
		{syscall.ECONNRESET, false, causeBackend},
		{syscall.EPIPE, false, causeBackend},
	} {
		t.Run(fmt.Sprintf("%v %t", tt.failure, tt.begun), func(t *testing.T) {
			r := quietRelay(t)
			pairs := newSessionConns(t, "tcp", "tcp")
			gone := &goneConn{Conn: pairs.near[backendSide], failure: tt.failure, fail: make(chan struct{})}
			if tt.begun {
				gone.writing = make(chan struct{})
			}
			pairs.near[backendSide] = gone
			c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
			if tt.begun {
				mustWrite(t, c.client, "hello")
			}
			mustEOF(t, c.client)
			if !tt.begun {
				mustWrite(t, c.client, "hello")
			}
			close(gone.fail)
			closeWrite(t, c.client)
			c.wantCause(t, tt.want)
		})
	}
}

// While a write to the backend is under way, an end that was read proves nothing: the write may
// have taken the error of a connection that was lost. Then a flight comes before the end.
func TestRelayLostWhileWriting(t *testing.T) {
	for failure, lost := range map[error]int{syscall.ETIMEDOUT: 1, syscall.EHOSTUNREACH: 1, syscall.ECONNRESET: 0, syscall.EPIPE: 0} {
		t.Run(failure.Error(), func(t *testing.T) {
			r := quietRelay(t)
			abandoned := make(chan net.Conn, 2)
			r.onAbandoned = func(_ *session, backend net.Conn) { abandoned <- backend }
			pairs := newSessionConns(t, "tcp", "tcp")
			gone := &goneConn{Conn: pairs.near[backendSide], failure: failure, writing: make(chan struct{}), fail: make(chan struct{})}
			pairs.near[backendSide] = gone
			c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
			mustWrite(t, c.client, "hello")
			eventually(t, "the end was read", true, func() bool {
				c.session.lock()
				defer c.session.unlock()
				return c.backendEnded
			})
			wantEqual(t, "the session blocks no step before the write has returned", c.isOverForSteps(), false)
			close(gone.fail)
			eventually(t, "the session blocks no step", true, c.isOverForSteps)
			wantEqual(t, "flights", len(abandoned), lost)
			closeWrite(t, c.client)
			waitFor(t, r)
			wantEqual(t, "flights at the end", len(abandoned), lost)
		})
	}
}

// lateEndConn is a client's connection whose CloseWrite, which with TLS writes
// close_notify, waits until takesEnd is closed.
type lateEndConn struct {
	*net.TCPConn
	ending, takesEnd chan struct{}
	bounded          atomic.Bool // a write has a deadline
}

func (c *lateEndConn) CloseWrite() error {
	close(c.ending)
	<-c.takesEnd
	return c.TCPConn.CloseWrite()
}

func (c *lateEndConn) SetWriteDeadline(t time.Time) error {
	if !t.IsZero() {
		c.bounded.Store(true)
	}
	return c.TCPConn.SetWriteDeadline(t)
}

// A client that takes close_notify late gets it: the time of a dead session does not
// bound it.
func TestRelayDeadSessionSendsTheEnd(t *testing.T) {
	pairs := newSessionConns(t, "tcp", "tcp")
	conn := &lateEndConn{TCPConn: pairs.near[clientSide].(*net.TCPConn), ending: make(chan struct{}), takesEnd: make(chan struct{})}
	pairs.near[clientSide] = conn
	c := pairs.start(quietRelay(t), newSession("ns-01", 0, ""), [2][]byte{})
	closeWrite(t, c.backend)
	<-conn.ending
	closeWrite(t, c.client)
	mustEOF(t, c.backend) // the session is dead
	wantEqual(t, "the end has a deadline", conn.bounded.Load(), false)
	close(conn.takesEnd)
	mustEOF(t, c.client)
	c.wantCause(t, causeBackend)
}

// failingConn is a connection of which one write fails, after half of its bytes.
type failingConn struct {
	*net.TCPConn
	failure error
	left    int           // writes before that
	written chan struct{} // gets one for each write, and has room for all
}

func (c *failingConn) Write(b []byte) (int, error) {
	defer func() { c.written <- struct{}{} }()
	if c.left--; c.left == -1 {
		n, _ := c.TCPConn.Write(b[:len(b)/2])
		return n, c.failure
	}
	return c.TCPConn.Write(b)
}

// After a failed write nothing more is sent to that side, so that no stream has a
// hole. If the error says that the peer is gone, the relay still carries what that
// has sent. Any other error ends the session.
func TestRelayFailedWrites(t *testing.T) {
	for i := clientSide; i <= backendSide; i++ {
		for _, failure := range []syscall.Errno{syscall.ENOBUFS, syscall.ENOMEM, syscall.EIO, syscall.EPIPE, syscall.ECONNRESET} {
			t.Run(fmt.Sprintf("%s, %s", i.errorCause(), failure), func(t *testing.T) {
				r := quietRelay(t)
				pairs := newSessionConns(t, "tcp", "tcp")
				const goodWrites = 3
				failing := &failingConn{pairs.near[i].(*net.TCPConn), failure, goodWrites, make(chan struct{}, 100)}
				pairs.near[i] = failing
				session := newSession("ns-01", 0, "")
				c := pairs.start(r, session, [2][]byte{})
				end, other := c.ends()[i], c.ends()[i.other()]
				var got []byte
				var reading sync.WaitGroup
				reading.Go(func() { got, _ = io.ReadAll(end) }) // until the session is over
				const stream = "abcdefghijklmnopqrstuvwxyz"
				for k := range len(stream) / 2 {
					io.WriteString(other, stream[2*k:2*k+2])
					if k <= goodWrites {
						<-failing.written // so that the relay reads each piece alone
					}
				}
				want := i.causeOf(failure)
				if want == i.errorCause() {
					eventually(t, "the failed write is noted", true, func() bool {
						session.mu.Lock()
						defer session.mu.Unlock()
						return session.writeFailed[i]
					})
					mustWrite(t, end, "still carried")
					mustRead(t, other, "still carried")
					end.CloseWrite()
					mustEOF(t, other)
					other.Close()
				}
				c.wantCause(t, want)
				reading.Wait()
				if !strings.HasPrefix(stream, string(got)) || len(got) == 0 || len(got) == len(stream) {
					t.Errorf("the peer got %q, want the beginning of %q", got, stream)
				}
			})
		}
	}
}

// watchedConn is a client's connection that calls onWrite before each write.
type watchedConn struct {
	*net.TCPConn
	onWrite func()
}

func (c *watchedConn) Write(b []byte) (int, error) { c.onWrite(); return c.TCPConn.Write(b) }

// A namespace is free before the client of an old pod that was cut off gets its Close
// frame, also if that client takes nothing any more.
func TestRelayFreesTheNamespaceFirst(t *testing.T) {
	r := quietRelay(t)
	r.closeTimeout = time.Hour
	free := make(chan bool, 1)
	s := newSession("ns-01", 0, "")
	s.podUID = "a"
	r.setPods(map[int]string{0: "a"})
	pairs := newSessionConns(t, "tcp", "tcp")
	onWrite := func() { free <- r.oldPodSessionsDone("ns-01") == nil }
	pairs.near[clientSide] = &watchedConn{pairs.near[clientSide].(*net.TCPConn), onWrite}
	c := pairs.start(r, s, [2][]byte{})
	r.setPods(map[int]string{0: "b"})
	s.closeGracefully(causeMoved, nil)
	s.closeExpired() // the time for the client's message
	mustFrames(t, c.backend, true, goesAway)
	s.closeExpired() // the time for the pod's answer
	mustFrames(t, c.client, false, restarts)
	if !<-free {
		t.Error("the client gets its Close frame before the namespace is free")
	}
	c.client.Close()
	c.wantCause(t, causeMoved)
}
