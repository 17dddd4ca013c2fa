package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/websocket"
)

// Status codes of a Close frame, RFC 6455 §7.4.1 and the IANA registry.
const (
	closeNormal    = 1000
	closeGoingAway = 1001
	closeProtocol  = 1002
	closeNoStatus  = 1005 // never on the wire: a Close without a code
	closeTooBig    = 1009
	closeRestart   = 1012
)

// Buffers of one connection, in bytes. A message is shorter than the write
// buffer, so that it leaves in one write; longer ones are only slower.
const (
	readBuffer  = 512
	writeBuffer = 256
)

// frame is a data frame whose payload has to be read to its end before the
// next one. Len is of header and payload, and negative beyond 63 bits.
type frame interface {
	io.Reader
	Len() int
}

// closeError is a Close frame of the peer.
type closeError struct {
	code   int
	reason string
}

func (e closeError) Error() string {
	if e.reason == "" {
		return fmt.Sprintf("Close %d", e.code)
	}
	return fmt.Sprintf("Close %d %q", e.code, e.reason)
}

// protocolError is a frame that RFC 6455 forbids.
type protocolError struct{ opcode byte }

func (e protocolError) Error() string { return fmt.Sprintf("unexpected opcode %d", e.opcode) }

// nextFrame answers pings until a data frame comes; the error is a closeError,
// a protocolError, or that of the connection. It stands where Codec.Receive
// could: that one hides the code of a Close, and cannot tell it from a cut
// connection. A fragment counts as a message, as everywhere in x/net/websocket.
// Only one goroutine may read.
func nextFrame(ws *websocket.Conn) (frame, error) {
	for {
		f, err := ws.NewFrameReader()
		if err != nil {
			return nil, err
		}
		if f.PayloadType() == websocket.CloseFrame {
			return nil, readClose(f)
		}
		f, err = ws.HandleFrame(f)
		switch {
		case err != nil:
			return nil, err
		case f == nil: // a ping, answered, or a pong
			continue
		case f.PayloadType() != websocket.TextFrame && f.PayloadType() != websocket.BinaryFrame:
			return nil, protocolError{f.PayloadType()}
		}
		return f, nil
	}
}

// readClose reads the payload of a Close frame: nothing, or a code in network
// order and a reason (RFC 6455 §5.5.1).
func readClose(f io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(f, 125))
	if err != nil {
		return err
	}
	if len(b) < 2 {
		return closeError{code: closeNoStatus}
	}
	return closeError{int(binary.BigEndian.Uint16(b)), string(b[2:])}
}

// echoCode is the code to answer a peer's Close with: its own when it may
// stand in a frame (RFC 6455 §7.4), else that of a protocol error.
func echoCode(code int) int {
	switch {
	case code == closeNoStatus:
		return closeNormal
	case code < 1000 || code == 1004 || code == 1006 || code > 1014 && code < 3000 || code > 4999:
		return closeProtocol
	}
	return code
}

// boundedConn gives each write its own deadline, also those that
// x/net/websocket makes by itself (the 101, a Pong, a Close).
type boundedConn struct {
	net.Conn
	writeTime time.Duration
}

func (c boundedConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.writeTime)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// lentConn cannot be closed by its borrower.
type lentConn struct{ boundedConn }

func (lentConn) Close() error { return nil }

// takeover is the ResponseWriter given to websocket.Server, which would close
// the connection when its handler returns, and so keep the goroutine and the
// 14 KiB of buffers that net/http has for a request as long as the session.
// Hijack hands out a connection that stays open and small buffers; whoever
// made the takeover owns conn from then on.
type takeover struct {
	http.ResponseWriter
	writeTime time.Duration
	conn      net.Conn // nil before Hijack
}

func (t *takeover) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(t.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	t.conn = conn
	lent := lentConn{boundedConn{conn, t.writeTime}}
	var r io.Reader = conn
	if n := rw.Reader.Buffered(); n > 0 { // frames that came with the request
		head, _ := rw.Reader.Peek(n)
		r = io.MultiReader(bytes.NewReader(bytes.Clone(head)), conn)
	}
	return lent, bufio.NewReadWriter(bufio.NewReaderSize(r, readBuffer),
		bufio.NewWriterSize(lent, writeBuffer)), nil
}
