package main

import (
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

func TestMessage(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	tests := map[string]struct {
		path   string
		header []string
		want   string
	}{
		"direct": {"/ws/ns-01", nil, `{"server":"backend-0","counter":1,"ns":"ns-01"}`},
		"deeper": {"/ws/ns-01/a/b", nil, `{"server":"backend-0","counter":1,"ns":"ns-01"}`},
		"routed": {"/ws/ns-01", []string{"X-Router-Pod: router-abc"},
			`{"server":"backend-0","counter":1,"ns":"ns-01","router":"router-abc"}`},
		"Origin is not looked at": {"/ws/ns-02", []string{"Origin: null"},
			`{"server":"backend-0","counter":1,"ns":"ns-02"}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := rawOpen(t, s.addr, tt.path, tt.header...)
			if got := c.mustNext(websocket.TextFrame); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestLogSaysWhoServedWhat: also from when to when. A session opens before the client can
// have its 101, and ends before the client can have the answer to its Close frame.
func TestLogSaysWhoServedWhat(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	begin := time.Now()
	c := rawOpen(t, s.addr, "/ws/ns-07", "X-Router-Pod: router-abc", "X-Router-Table: 4711",
		"X-Forwarded-For: 192.0.2.1")
	c.mustCounter(1)
	open := time.Now()
	c.write(closeOf(closeNormal, "done"))
	c.mustClose(closeNormal)
	end := time.Now()
	line := s.mustLog(t, "session open", "session=1 ", "namespace=ns-07", "router=router-abc", "table=4711",
		"remote="+c.conn.LocalAddr().String(), "for=192.0.2.1")
	mustTime(t, line, "opened", begin, open)
	line = s.mustLog(t, "session end", "session=1 ", "namespace=ns-07", "messages=1", `Close 1000 \"done\"`)
	mustTime(t, line, "ended", open, end)
}

// mustTime fails the test unless a field of a line of the log is a time between the two.
func mustTime(t *testing.T, line, key string, from, to time.Time) {
	t.Helper()
	_, value, _ := strings.Cut(line, " "+key+"=")
	value, _, _ = strings.Cut(strings.TrimSpace(value), " ")
	at, err := time.Parse(time.RFC3339Nano, value)
	// What was parsed has no monotonic clock: compare by the wall clock.
	if err != nil || at.Before(from.Round(0)) || at.After(to.Round(0)) {
		t.Errorf("%s is %s (error %v), want it from %s to %s", key, value, err, from, to)
	}
}

// TestCounterHasNoGaps mixes ticks, answers and pongs.
func TestCounterHasNoGaps(t *testing.T) {
	cfg := quietConfig()
	cfg.interval = time.Millisecond
	s := startServer(t, cfg, "tcp")
	c := rawOpen(t, s.addr, "/ws/ns-01")
	const sent = 200
	written := make(chan error, 1)
	go func() {
		_, err := c.conn.Write([]byte(strings.Repeat(frameOf(websocket.TextFrame, "hi"), sent)))
		written <- err
	}()
	for want := 1; want <= sent+50; want++ { // the 50 can only be ticks
		c.mustCounter(want)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

func TestEveryKindOfMessageIsAnswered(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	c := rawOpen(t, s.addr, "/ws/ns-01")
	c.mustCounter(1)
	for i, frame := range []string{
		frameOf(websocket.TextFrame, "text"), frameOf(websocket.BinaryFrame, "\x00\xff"),
		frameOf(websocket.TextFrame, ""), frameOf(websocket.TextFrame, strings.Repeat("x", 60000)),
	} {
		c.write(frame)
		c.mustCounter(i + 2)
	}
	c.write(frameOf(websocket.PongFrame, "unasked") + frameOf(websocket.PingFrame, "ping"))
	if got := c.mustNext(websocket.PongFrame); got != "ping" {
		t.Errorf("pong %q, want ping", got)
	}
}

func TestFramesThatCameWithTheRequest(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	c := rawDial(t, s.addr)
	c.mustUpgrade(head("/ws/ns-01") + frameOf(websocket.TextFrame, strings.Repeat("x", 2000)) +
		frameOf(websocket.PingFrame, "early"))
	c.mustCounter(1)
	c.mustCounter(2)
	if got := c.mustNext(websocket.PongFrame); got != "early" {
		t.Errorf("pong %q, want early", got)
	}
}

// TestEnds is what a client may do to end a connection, the Close that answers
// (0: none can be asked for), and the reason in the log.
func TestEnds(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	huge := "\x82\xff\x40\x00\x00\x00\x00\x00\x00\x00\x01\x02\x03\x04" // 2^62 bytes to come
	tests := map[string]struct {
		send   string
		code   uint16
		reason string
	}{
		"close":              {closeOf(1000, ""), 1000, "Close 1000"},
		"close, application": {closeOf(4001, "bye"), 4001, "Close 4001"},
		"close without code": {frameOf(websocket.CloseFrame, ""), 1000, "Close 1005"},
		"close, bad code":    {closeOf(1006, ""), 1002, "Close 1006"},
		"too long":           {frameOf(websocket.TextFrame, strings.Repeat("x", 65535)) + closeOf(1009, ""), 1009, "message of 65543 bytes"},
		"far too long":       {huge, 1009, "message of 4611686018427387918 bytes"},
		"unknown opcode":     {frameOf(3, "x"), 1002, "unexpected opcode 3"},
		"not masked":         {"\x81\x01x", 1002, "without a Close"},
		"gone":               {"", 0, "without a Close"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := rawOpen(t, s.addr, "/ws/"+strings.ReplaceAll(name, " ", "-"))
			c.mustCounter(1)
			c.write(tt.send)
			if tt.code != 0 {
				c.mustClose(tt.code)
			}
			c.conn.(*net.TCPConn).CloseWrite()
			c.mustEOF()
			s.mustLog(t, "session end", strings.ReplaceAll(name, " ", "-"), tt.reason)
		})
	}
}

// smallBuffers makes the kernel keep little for a client that does not read.
type smallBuffers struct{ net.Listener }

func (l smallBuffers) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		err = conn.(*net.TCPConn).SetWriteBuffer(1)
	}
	return conn, err
}

func TestClientThatDoesNotRead(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := quietConfig()
	cfg.writeTime = 200 * time.Millisecond
	s := startServerOn(t, cfg, smallBuffers{ln})
	other := rawOpen(t, s.addr, "/ws/other")
	other.mustCounter(1)
	stuck := rawOpen(t, s.addr, "/ws/stuck")
	if err := stuck.conn.(*net.TCPConn).SetReadBuffer(1); err != nil {
		t.Fatal(err)
	}
	asks := strings.Repeat(frameOf(websocket.TextFrame, ""), 50_000)
	go stuck.conn.Write([]byte(asks)) // ends when the server cuts the connection
	for counter := 2; counter < 200; counter++ {
		other.write(frameOf(websocket.TextFrame, ""))
		other.mustCounter(counter)
	}
	s.mustLog(t, "session end", "namespace=stuck", "client does not read")
	other.write(frameOf(websocket.TextFrame, ""))
	other.mustCounter(200)
}

// TestBoundIsPerWrite would fail with a deadline that stays on the connection.
func TestBoundIsPerWrite(t *testing.T) {
	cfg := quietConfig()
	cfg.writeTime = 100 * time.Millisecond
	cfg.interval = 250 * time.Millisecond
	s := startServer(t, cfg, "tcp")
	c := rawOpen(t, s.addr, "/ws/ns-01")
	c.mustCounter(1)
	c.mustCounter(2)
	c.write(frameOf(websocket.PingFrame, "late"))
	if got := c.mustNext(websocket.PongFrame); got != "late" {
		t.Errorf("pong %q, want late", got)
	}
}
