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
		pairs := newSessionConns(t, "tcp", "tcp")
		pairs.near[backendSide] = &goneConn{pairs.near[backendSide], failure}
		c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
		mustEOF(t, c.client)
		mustWrite(t, c.client, "hello")
		c.client.CloseWrite()
		c.wantCause(t, want)
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
				pairs := newSessionConns(t, "tcp", "tcp")
				pairs.near[i] = &failingConn{pairs.near[i].(*net.TCPConn), failure, 3}
				c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
				end, other := c.ends()[i], c.ends()[i.other()]
				var got []byte
				var reading sync.WaitGroup
				reading.Go(func() { got, _ = io.ReadAll(end) }) // until the session is over
				const stream = "abcdefghijklmnopqrstuvwxyz"
				for k := range len(stream) / 2 {
					io.WriteString(other, stream[2*k:2*k+2])
					<-time.After(time.Millisecond) // so that the relay reads each piece alone
				}
				want := i.causeOf(failure)
				if want == i.errorCause() {
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
