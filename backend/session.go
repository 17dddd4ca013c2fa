package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

// maxMessage is the longest frame, in bytes, that a client may send.
const maxMessage = 64 << 10

// countMessage raises the count of the namespace; the answer has it.
const countMessage = "count"

// message is what a client receives; the order of the fields is part of it.
type message struct {
	Server  string `json:"server"`
	Counter int    `json:"counter"`
	NS      string `json:"ns"`
	Router  string `json:"router,omitempty"` // pod of the router, if one came before
	Total   int64  `json:"total,omitempty"`  // count of the namespace, in the answer to "count"
}

// session is one connection. It costs one goroutine (run), which reads, and
// one timer; the timer's function and run write, one at a time.
type session struct {
	// Static after construction.
	ws        *websocket.Conn
	conn      net.Conn // below ws; closed by end, earlier by whoever must cut it
	member    *member  // counts the session in its room
	log       *slog.Logger
	interval  time.Duration // 0: no timer
	closeTime time.Duration
	opened    time.Time // before the request was looked at

	// Guarded by mu, which is held during a write: counters leave in order.
	mu     sync.Mutex
	next   message     // Counter is that of the last message sent
	timer  *time.Timer // nil without an interval
	reason string      // why it ends; nothing but the Close is sent once it is set
	ended  time.Time   // when reason was set: before the router can know of the end
}

// run serves the session to its end, and closes the connection.
func (s *session) run() {
	s.begin()
	err := s.read()
	s.end(err)
}

func (s *session) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sendLocked()
	if s.interval > 0 {
		s.timer = time.AfterFunc(s.interval, s.tick)
	}
}

// tick is the timer's function. It sets the timer again only after the write,
// so that there is never more than one waiting for a slow client.
func (s *session) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sendLocked() {
		s.timer.Reset(s.interval)
	}
}

// answer answers a message. A total that the client has read is in the state with which
// the next owner of the namespace begins: see rooms.
func (s *session) answer(message []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if string(message) == countMessage {
		s.next.Total, _ = s.member.add()
		defer func() { s.next.Total = 0 }()
	}
	s.sendLocked()
}

// sendLocked sends the next message and reports whether there may be another.
// A client that took nothing for the write time is cut: there is no way to put
// a Close behind half a message.
func (s *session) sendLocked() bool {
	if s.reason != "" {
		return false
	}
	s.next.Counter++
	text, err := json.Marshal(s.next)
	if err == nil {
		err = websocket.Message.Send(s.ws, string(text))
	}
	if err == nil {
		return true
	}
	s.next.Counter--
	switch {
	case errors.Is(err, net.ErrClosed): // whoever closed it knows the reason
		return false
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.endLocked("client does not read")
	default:
		s.endLocked("write: " + err.Error())
	}
	s.conn.Close()
	return false
}

// endLocked notes that the session ends, and why.
func (s *session) endLocked(reason string) { s.reason, s.ended = reason, time.Now() }

// read answers each message until the connection ends, which is the error. A
// frame that is not accepted is answered by a Close; then it goes on reading,
// for the peer's Close, until the deadline that goodbye sets.
func (s *session) read() error {
	var start [len(countMessage) + 1]byte // of a message: one byte more shows a longer one
	for {
		f, err := nextFrame(s.ws)
		if err != nil {
			return err
		}
		if n := f.Len(); n < 0 || n > maxMessage {
			s.goodbye(closeTooBig, fmt.Sprintf("message of %d bytes", n))
		}
		n, _ := io.ReadFull(f, start[:]) // fails if the message is short
		if _, err := io.Copy(io.Discard, f); err != nil {
			return err
		}
		s.answer(start[:n])
	}
}

// goodbye sends a Close, unless the session ends already, and gives the peer
// the close time to send its own: run ends then.
func (s *session) goodbye(code int, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reason != "" {
		return
	}
	s.endLocked(reason)
	s.conn.SetReadDeadline(time.Now().Add(s.closeTime))
	if err := s.ws.WriteClose(code); err != nil {
		s.conn.Close()
	}
}

// end answers the peer's Close, closes the connection and logs the one line
// of the session's end. It takes mu last, and so waits for a tick that writes.
func (s *session) end(err error) {
	now := time.Now()
	var closed closeError
	switch {
	case errors.As(err, &closed):
		s.goodbye(echoCode(closed.code), "client: "+closed.Error())
	case errors.As(err, new(protocolError)):
		s.goodbye(closeProtocol, err.Error())
	case errors.Is(err, io.EOF): // also an unmasked frame: x/net has sent the Close
		err = errors.New("client gone without a Close")
	}
	s.conn.Close()

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.reason == "" {
		s.reason, s.ended = err.Error(), now
	}
	s.log.Info("session end", "reason", s.reason, "messages", s.next.Counter,
		"seconds", s.ended.Sub(s.opened).Round(time.Millisecond).Seconds(),
		"ended", s.ended.Format(time.RFC3339Nano))
}
