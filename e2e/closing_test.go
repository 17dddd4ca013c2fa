package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// These tests need no cluster. A router, run as a process, has two backends that
// send without a pause; it closes the sessions as they move, or as it stops.

// What the router says in its Close frames.
var (
	restarts = websocket.CloseError{Code: websocket.StatusServiceRestart, Reason: "service restart"}
	goesAway = websocket.CloseError{Code: websocket.StatusGoingAway, Reason: "going away"}
)

const (
	flowing   = 3                // messages of each stream before its session is closed
	closeMost = 90 * time.Second // for streams to flow, and a Close to be heard: Chromium with all shapes takes half of it on two cores
)

// flow is what the sessions of a round have in common.
type flow struct {
	both bool // the client sends too
	deaf bool // the backend does not read
}

// query asks a streamer for a stream.
func (f flow) query(number int) string {
	if f.deaf {
		return fmt.Sprintf("?deaf&stream=%d", number)
	}
	return fmt.Sprintf("?stream=%d", number)
}

// closing is a router with streaming backends and a directory of overrides.
type closing struct {
	outside
	backends  [2]*streamer
	overrides string
	owner     int // of all namespaces
	streams   int // so far
}

// newClosing runs the program, and waits until it is ready.
func newClosing(t *testing.T, program string) *closing {
	t.Helper()
	c := &closing{backends: [2]*streamer{newStreamer(t), newStreamer(t)}, overrides: t.TempDir()}
	c.own(t)
	c.outside = runRouter(t, program, "-overrides="+c.overrides, "-move-settle=10ms", "-move-rate=0", "-drain-duration=200ms",
		"-backends="+c.backends[0].server.Listener.Addr().String()+","+c.backends[1].server.Listener.Addr().String())
	c.awaitReady(t)
	return c
}

// own writes the overrides that make the owner.
func (c *closing) own(t *testing.T) {
	t.Helper()
	for _, s := range shapes {
		if err := os.WriteFile(filepath.Join(c.overrides, s.name), fmt.Appendf(nil, "backend-%d\n", c.owner), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// move gives all namespaces to the other backend.
func (c *closing) move(t *testing.T) {
	t.Helper()
	c.owner = 1 - c.owner
	c.own(t)
}

// dial opens a session, whose stream flows until the test ends.
func (c *closing) dial(t *testing.T, s shape, f flow) *hearing {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	c.streams++
	h := newHearing(stream{s, c.streams})
	c.backends[c.owner].expect(h)
	conn, resp, err := websocket.Dial(ctx, c.address(t)+"/ws/"+s.name+f.query(h.number),
		&websocket.DialOptions{CompressionMode: s.compression(), CompressionThreshold: 1})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("Sec-WebSocket-Extensions"); strings.HasPrefix(got, "permessage-deflate") != s.deflate || strings.Contains(got, "no_context") {
		t.Errorf("%s: the extensions are %q, want permessage-deflate with contexts: %v", s.name, got, s.deflate)
	}
	go h.listen(ctx, conn)
	owner, said := c.owner, make(chan struct{})
	go func() {
		defer close(said)
		if f.both {
			h.back().talk(ctx, conn, c.backends[owner].hearer(h.back()))
		}
	}()
	t.Cleanup(func() {
		conn.CloseNow()
		stop()
		<-h.done
		<-said
	})
	return h
}

// dialAll opens so many sessions of each shape, and waits until their streams flow.
func (c *closing) dialAll(t *testing.T, of []shape, each int, f flow) []*hearing {
	t.Helper()
	var clients []*hearing
	for _, s := range of {
		for range each {
			clients = append(clients, c.dial(t, s, f))
		}
	}
	c.awaitFlow(t, clients, len(clients), f)
	return clients
}

// awaitFlow waits until all streams flow: those to clients, and those of so many
// sessions to the backend.
func (c *closing) awaitFlow(t *testing.T, clients []*hearing, sessions int, f flow) {
	t.Helper()
	eventually(t, closeMost, "the streams to flow", func() error {
		all := clients
		if heard := c.backends[c.owner].heard(); f.both && !f.deaf {
			if len(heard) != sessions {
				return fmt.Errorf("the backend has %d sessions, want %d", len(heard), sessions)
			}
			all = append(heard, all...)
		}
		for _, h := range all {
			if n := h.whole.Load(); n < flowing {
				return fmt.Errorf("%s, stream %d: %d messages, want %d", h.name, h.number, n, flowing)
			}
		}
		return nil
	})
}

// closed waits for the ends of streams, and fails the test if one is not by this
// Close. It returns how many were within a message.
func closed(t *testing.T, hearings []*hearing, want websocket.CloseError, least int64) (within int) {
	t.Helper()
	bound := time.After(closeMost)
	for _, h := range hearings {
		select {
		case <-h.done:
		case <-bound:
			t.Fatalf("%s, stream %d: not closed within %s", h.name, h.number, closeMost)
		}
		if err := h.closedBy(want, least); err != nil {
			t.Error(err)
		}
		if h.within {
			within++
		}
	}
	return within
}

// backendClosed sees that a backend was told so in each of its sessions.
func (c *closing) backendClosed(t *testing.T, backend, sessions int, f flow) {
	t.Helper()
	heard := c.backends[backend].heard()
	c.backends[backend].forget()
	if f.deaf {
		sessions = 0
	}
	if len(heard) != sessions {
		t.Errorf("backend-%d had %d sessions that it listens to, want %d", backend, len(heard), sessions)
	}
	least := int64(0)
	if f.both {
		least = flowing
	}
	closed(t, heard, goesAway, least)
}

// logged waits until the router has said of so many sessions that they are over,
// and fails the test unless all had this cause and were cut, or were not.
func (c *closing) logged(t *testing.T, sessions int, why string, cut bool) {
	t.Helper()
	type ended struct {
		Msg, Namespace, Cause string
		Cut                   bool
		Seconds               float64
	}
	var all []ended
	eventually(t, closeMost, "the log of the sessions", func() error {
		all = nil
		for _, line := range c.output() {
			var e ended
			if json.Unmarshal([]byte(line), &e) == nil && e.Msg == "session ended" {
				all = append(all, e)
			}
		}
		if len(all) != sessions {
			return fmt.Errorf("%d sessions ended, want %d", len(all), sessions)
		}
		return nil
	})
	for _, e := range all {
		if e.Cause != why || e.Cut != cut {
			t.Errorf("a session of %s ended by %q, cut %v after %.1f s; want %q, cut %v",
				e.Namespace, e.Cause, e.Cut, e.Seconds, why, cut)
		}
	}
}

// sessions is how many of a shape are closed at once. All frames of 16 MiB that
// are on their way have to end within the 2.5 s that the backend has to answer.
func (s shape) sessions() int {
	if s.size == largest {
		return 3
	}
	return 8
}

// forLibrary are the shapes that coder/websocket can hear the end of: version 1.8.15
// panics when a Close comes between two fragments of a compressed message, as it
// gives its window away and then writes to it (msgReader.Read).
func forLibrary() []shape {
	return slices.DeleteFunc(slices.Clone(shapes), func(s shape) bool { return s.deflate && s.fragment > 0 })
}

// directions are the flows of sessions whose backends answer.
var directions = []flow{{}, {both: true}}

// TestClosingMoved moves sessions whose streams flow: the client hears all that
// its old backend said, then 1012; the backend hears 1001.
func TestClosingMoved(t *testing.T) {
	c, sessions, within := newClosing(t, build(t, ".")), 0, 0
	for _, s := range forLibrary() {
		t.Run(s.name, func(t *testing.T) {
			for _, f := range directions {
				old := c.owner
				clients := c.dialAll(t, []shape{s}, s.sessions(), f)
				sessions += len(clients)
				c.move(t)
				within += closed(t, clients, restarts, flowing)
				c.backendClosed(t, old, len(clients), f)
			}
		})
	}
	c.logged(t, sessions, "moved", false)
	if within == 0 {
		t.Error("no Close came between two fragments of a message: this saw less than it is for")
	}
}

// TestClosingDrained stops the router while streams flow: both sides hear 1001.
func TestClosingDrained(t *testing.T) {
	program := build(t, ".")
	for _, s := range forLibrary() {
		t.Run(s.name, func(t *testing.T) {
			for _, f := range directions {
				c := newClosing(t, program)
				clients := c.dialAll(t, []shape{s}, s.sessions(), f)
				c.stop(t)
				closed(t, clients, goesAway, flowing)
				c.backendClosed(t, c.owner, len(clients), f)
				c.logged(t, len(clients), "drain", false)
			}
		})
	}
}

// stop ends the router.
func (c *closing) stop(t *testing.T) {
	t.Helper()
	if err := c.terminate(t); err != nil {
		t.Errorf("on SIGTERM the router ended with %v, want exit code 0", err)
	}
}

// TestClosingDeaf closes sessions whose backends do not read, and so go on as if
// nothing were: it is the router that chooses where in a stream the client's Close
// stands. What the client sends is stuck meanwhile.
func TestClosingDeaf(t *testing.T) {
	const each = 2
	c := newClosing(t, build(t, "."))
	within, sessions := 0, 0
	for _, f := range []flow{{deaf: true}, {deaf: true, both: true}} {
		clients := c.dialAll(t, forLibrary(), each, f)
		sessions += len(clients)
		c.move(t)
		within += closed(t, clients, restarts, flowing)
		c.backendClosed(t, 1-c.owner, len(clients), f)
	}
	c.logged(t, sessions, "moved", true)
	if within == 0 {
		t.Error("no Close came between two fragments of a message: this saw less than it is for")
	}

	c = newClosing(t, c.cmd.Path)
	f := flow{deaf: true, both: true}
	clients := c.dialAll(t, forLibrary(), each, f)
	c.stop(t)
	closed(t, clients, goesAway, flowing)
	c.backendClosed(t, c.owner, len(clients), f)
	c.logged(t, len(clients), "drain", true)
}
