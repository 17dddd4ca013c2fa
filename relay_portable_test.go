//go:build !linux || portable || 386

package main

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// goneConn is a connection that the kernel gave up during a write: the write
// returns the error, and a read returns EOF.
type goneConn struct {
	net.Conn
	failure error // of each write
}

func (c *goneConn) Read([]byte) (int, error)  { return 0, io.EOF }
func (c *goneConn) Write([]byte) (int, error) { return 0, c.failure }
func (c *goneConn) CloseWrite() error         { return nil }

// If a write to the backend times out, the cause is an error, even if a read has
// returned EOF before. If the backend ends and then takes nothing more, the cause
// is its end.
func TestRelayTimedOutOrEnded(t *testing.T) {
	for failure, want := range map[error]cause{syscall.ETIMEDOUT: causeBackendError, syscall.EPIPE: causeBackend} {
		r := quietRelay(t)
		client, clientFar := tcpPair(t)
		server, _ := tcpPair(t)
		s := newSession("ns-01", 0, "")
		r.startSession(s, [2]net.Conn{clientFar, &goneConn{server, failure}}, [2][]byte{})
		mustEOF(t, client)
		mustWrite(t, client, "hello")
		client.CloseWrite()
		relayed{session: s, relay: r}.wantCause(t, want)
	}
}

// failingConn is a connection of which one write fails, after half of its bytes.
type failingConn struct {
	*net.TCPConn
	failure error
	left    int // writes before that
}

func (c *failingConn) Write(b []byte) (int, error) {
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
				var near [2]net.Conn
				var far [2]*net.TCPConn
				near[clientSide], far[clientSide] = tcpPair(t)
				near[backendSide], far[backendSide] = tcpPair(t)
				near[i] = &failingConn{near[i].(*net.TCPConn), failure, 3}
				s := newSession("ns-01", 0, "")
				r.startSession(s, near, [2][]byte{})
				var got []byte
				var reading sync.WaitGroup
				reading.Go(func() { got, _ = io.ReadAll(far[i]) }) // until the session is over
				const stream = "abcdefghijklmnopqrstuvwxyz"
				for k := range len(stream) / 2 {
					io.WriteString(far[i.other()], stream[2*k:2*k+2])
					<-time.After(time.Millisecond) // so that the relay reads each piece alone
				}
				want := i.causeOf(failure)
				if want == i.errorCause() {
					mustWrite(t, far[i], "still carried")
					mustRead(t, far[i.other()], "still carried")
					far[i].CloseWrite()
					mustEOF(t, far[i.other()])
					far[i.other()].Close()
				}
				relayed{session: s, relay: r}.wantCause(t, want)
				reading.Wait()
				if !strings.HasPrefix(stream, string(got)) || len(got) == 0 || len(got) == len(stream) {
					t.Errorf("the peer got %q, want the beginning of %q", got, stream)
				}
			})
		}
	}
}

// watchedConn is a peer of whose writes each is told before.
type watchedConn struct {
	*net.TCPConn
	onWrite func()
}

func (c *watchedConn) Write(b []byte) (int, error) { c.onWrite(); return c.TCPConn.Write(b) }

// A namespace is free before the client of an old pod that was cut off is told, also if
// that takes nothing any more.
func TestRelayFreesTheNamespaceFirst(t *testing.T) {
	r := quietRelay(t)
	r.closeTimeout = time.Hour
	client, clientFar := tcpPair(t)
	backend, backendFar := tcpPair(t)
	free := make(chan bool, 1)
	s := newSession("ns-01", 0, "")
	s.podUID = "a"
	r.setPods(map[int]string{0: "a"})
	r.startSession(s, [2]net.Conn{&watchedConn{clientFar, func() { free <- r.oldPodSessionsDone("ns-01") == nil }}, backend}, [2][]byte{})
	r.setPods(map[int]string{0: "b"})
	s.closeGracefully(causeMoved, nil)
	s.closeExpired() // the time for the client's message
	mustFrames(t, backendFar, true, goesAway)
	s.closeExpired() // the time for the pod's answer
	mustFrames(t, client, false, restarts)
	if !<-free {
		t.Error("the client is told before the namespace is free")
	}
	client.Close()
	relayed{session: s, relay: r}.wantCause(t, causeMoved)
}
