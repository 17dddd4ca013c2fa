package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// rawClient speaks frames by hand, to see what a library would hide.
type rawClient struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

// head is a request head; more header lines may follow path.
func head(path string, lines ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: backend\r\nConnection: Upgrade\r\n" +
		"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
		strings.Join(append(lines, "", ""), "\r\n")
}

func rawDial(t *testing.T, addr string) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return &rawClient{t, conn, bufio.NewReader(conn)}
}

// rawOpen upgrades, without an Origin.
func rawOpen(t *testing.T, addr, path string, lines ...string) *rawClient {
	t.Helper()
	c := rawDial(t, addr)
	c.mustUpgrade(head(path, lines...))
	return c
}

func (c *rawClient) write(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.conn, s); err != nil {
		c.t.Fatal(err)
	}
}

// ask sends a request and returns the answer with its body.
func (c *rawClient) ask(request string) (*http.Response, string) {
	c.t.Helper()
	c.write(request)
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, ""
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(body)
}

func (c *rawClient) mustUpgrade(request string) *http.Response {
	c.t.Helper()
	resp, _ := c.ask(request)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		c.t.Fatalf("status %s, want 101", resp.Status)
	}
	return resp
}

// frameOf is a final, masked frame with a payload of up to 64 KiB.
func frameOf(opcode byte, payload string) string {
	b := []byte{0x80 | opcode, 0x80 | 126}
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	if len(payload) < 126 {
		b = []byte{0x80 | opcode, 0x80 | byte(len(payload))}
	}
	mask := [4]byte{1, 2, 3, 4}
	b = append(b, mask[:]...)
	for i := range len(payload) {
		b = append(b, payload[i]^mask[i%4])
	}
	return string(b)
}

func closeOf(code uint16, reason string) string {
	return frameOf(websocket.CloseFrame, string(binary.BigEndian.AppendUint16(nil, code))+reason)
}

// next reads a frame of up to 125 bytes.
func (c *rawClient) next() (opcode byte, payload string, err error) {
	var h [2]byte
	if _, err := io.ReadFull(c.r, h[:]); err != nil {
		return 0, "", err
	}
	b := make([]byte, h[1])
	_, err = io.ReadFull(c.r, b)
	return h[0] & 0x0f, string(b), err
}

// mustNext skips text frames until one of the wanted type comes.
func (c *rawClient) mustNext(opcode byte) string {
	c.t.Helper()
	for {
		op, payload, err := c.next()
		if err != nil {
			c.t.Fatalf("waiting for opcode %d: %v", opcode, err)
		}
		if op == opcode {
			return payload
		}
		if op != websocket.TextFrame {
			c.t.Fatalf("opcode %d %q, want %d", op, payload, opcode)
		}
	}
}

func (c *rawClient) mustClose(code uint16) {
	c.t.Helper()
	payload := c.mustNext(websocket.CloseFrame)
	if len(payload) < 2 || binary.BigEndian.Uint16([]byte(payload)) != code {
		c.t.Errorf("Close %q, want code %d", payload, code)
	}
}

func (c *rawClient) mustEOF() {
	c.t.Helper()
	if op, payload, err := c.next(); err != io.EOF {
		c.t.Errorf("frame %d %q, error %v; want EOF", op, payload, err)
	}
}

func (c *rawClient) mustCounter(want int) message {
	c.t.Helper()
	text := c.mustNext(websocket.TextFrame)
	var m message
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		c.t.Fatalf("%v in %q", err, text)
	}
	if m.Counter != want {
		c.t.Fatalf("counter %d, want %d", m.Counter, want)
	}
	return m
}

// mustLog waits for a line of the log that has all of the words, and returns it.
func (s *testServer) mustLog(t *testing.T, words ...string) string {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for line := range strings.Lines(s.log.String()) {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
				return line
			}
		}
	}
	t.Errorf("no line with %q in the log:\n%s", words, s.log)
	return ""
}
