//go:build !portable && !386

package main

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"testing"
	"time"
)

// Both sides of a session that is held in both directions become writable in
// one batch of events. One then becomes readable by the other's flush, with data
// there already: that must wake the poller, since nothing else will.
func TestRelayWakesItself(t *testing.T) {
	r := quietRelay(t, 1)
	for round := range 4 {
		client, near := unixPair(t)
		server, backend := unixPair(t)
		near.SetWriteBuffer(4 << 10)
		s := &session{namespace: "ns-01"}
		r.carry(s, [2]net.Conn{near, server}, [2][]byte{})
		p := s.poller
		other := carried(t, r, 0, nil, nil)
		for other.session.poller != p {
			other = carried(t, r, 0, nil, nil)
		}
		stuff(backend)
		want := stuff(client)
		p.mu.Lock()
		mustWrite(t, other.client, "x")
		waitBlocked(t)
		if round%2 == 0 {
			readMost(client, 1<<20) // what the kernel has, and then no more
		}
		got := readMost(backend, want)
		if round%2 == 1 {
			readMost(client, 1<<20)
		}
		p.mu.Unlock()
		backend.SetReadDeadline(time.Now().Add(patience))
		n, err := io.CopyN(io.Discard, backend, want-got)
		if err != nil {
			t.Fatalf("round %d: the backend got %d bytes of %d: %v", round, got+n, want, err)
		}
		s.end(causeDrain)
	}
}

// A backend that sends its last bytes and closes is heard out, though its client
// goes on talking to it, which its kernel answers with an RST.
func TestRelayLastWords(t *testing.T) {
	r := quietRelay(t, 1)
	client, near := unixPair(t)
	server, backend := tcpPair(t)
	s := &session{namespace: "ns-01"}
	r.carry(s, [2]net.Conn{near, server}, [2][]byte{})
	const last = 256 << 10 // more than the client's socket holds, less than the relay's and the router's kernel with it
	if _, err := backend.Write(make([]byte, last)); err != nil {
		t.Fatal(err)
	}
	for n := int64(-1); n != s.bytes()[1]; <-time.After(20 * time.Millisecond) {
		n = s.bytes()[1] // until the client's socket is full
	}
	backend.Close()
	for range 10 {
		client.Write([]byte("ping"))       // it may fail once all was sent to the client
		<-time.After(5 * time.Millisecond) // the RST to one makes the next fail
	}
	client.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.Copy(io.Discard, client); n != last {
		t.Errorf("the client got %d bytes, %v; want %d", n, err, last)
	}
	client.Close()
	waitFor(t, r)
}

// waitBlocked waits until a poller has taken events and waits for its lock.
func waitBlocked(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		for stack := range bytes.SplitSeq(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
			if bytes.Contains(stack, []byte("[sync.Mutex.Lock")) && bytes.Contains(stack, []byte("(*poller).poll")) {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatal("no poller waits for its lock")
		}
	}
}

// readMost reads most bytes, or what comes until nothing did for a while, and
// returns how much came.
func readMost(conn net.Conn, most int64) int64 {
	conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	n, _ := io.CopyN(io.Discard, conn, most) // a timeout is expected
	return n
}

// More sockets can be ready at once than epoll tells of, several times over:
// the poller is called again for the rest, though nothing new happens.
func TestRelayManyReady(t *testing.T) {
	r := quietRelay(t, 1)
	var sessions []relayed
	for range 4 * eventsSize * len(r.carrier.pollers) {
		sessions = append(sessions, carried(t, r, 0, nil, nil))
	}
	for _, p := range r.carrier.pollers {
		p.mu.Lock()
	}
	for _, s := range sessions {
		mustWrite(t, s.client, "x")
	}
	for _, p := range r.carrier.pollers {
		p.mu.Unlock()
	}
	for _, s := range sessions {
		mustRead(t, s.backend, "x")
	}
}
