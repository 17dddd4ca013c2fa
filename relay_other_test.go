//go:build !linux || portable || 386

package main

import (
	"io"
	"net"
	"syscall"
	"testing"
)

// goneConn is a peer that was given up while it was written to: the write has the
// error, and a read sees an end.
type goneConn struct {
	net.Conn
	failure error // of each write
}

func (c *goneConn) Read([]byte) (int, error)  { return 0, io.EOF }
func (c *goneConn) Write([]byte) (int, error) { return 0, c.failure }
func (c *goneConn) CloseWrite() error         { return nil }

// A backend that is silent is broken, even if its end is seen before the error;
// one that ends, and then takes nothing more, has ended.
func TestRelayTimedOutOrEnded(t *testing.T) {
	for failure, want := range map[error]cause{syscall.ETIMEDOUT: causeBackendError, syscall.EPIPE: causeBackend} {
		r := quietRelay(t)
		client, clientFar := tcpPair(t)
		server, _ := tcpPair(t)
		s := newSession("ns-01", 0, "")
		r.carry(s, [2]net.Conn{clientFar, &goneConn{server, failure}}, [2][]byte{})
		mustEOF(t, client)
		mustWrite(t, client, "hello")
		client.CloseWrite()
		relayed{session: s, relay: r}.wantCause(t, want)
	}
}
