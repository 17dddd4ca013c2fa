package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// message is what a backend sends.
type message struct {
	Server  string
	Counter int
	NS      string
	Router  string
	Total   int64 // count of the namespace, in the answer to "count"
}

// dialer opens WebSockets.
type dialer struct {
	base string // wss://www.mydomain.com
	http *http.Client
}

// refusal is an answer other than 101, as an error.
type refusal struct {
	status     int
	retryAfter string
	body       string
}

func (r refusal) Error() string {
	return fmt.Sprintf("answer %d, Retry-After %q: %s", r.status, r.retryAfter, r.body)
}

// cut is the error of a session that ended after the 101 and before the first
// message: its namespace moved, or its backend stopped, at this moment.
type cut struct{ error }

// session is a WebSocket whose first message has come.
type session struct {
	conn   *websocket.Conn
	first  message
	serial string // of nginx's certificate, in hexadecimal digits
}

// open connects, and waits for the first message. The caller closes the
// session.
func (d *dialer) open(ctx context.Context, namespace string) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, d.base+"/ws/"+namespace, &websocket.DialOptions{HTTPClient: d.http})
	if err != nil {
		return nil, refused(resp, err)
	}
	conn.SetReadLimit(1 << 10)
	s := &session{conn: conn}
	if resp.TLS != nil {
		s.serial = resp.TLS.PeerCertificates[0].SerialNumber.Text(16)
	}
	if s.first, err = s.read(ctx); err != nil {
		conn.CloseNow()
		return nil, cut{fmt.Errorf("%s: first message: %w", namespace, err)}
	}
	if s.first.NS != namespace || s.first.Counter != 1 {
		conn.CloseNow()
		return nil, fmt.Errorf("%s: first message is %+v", namespace, s.first)
	}
	return s, nil
}

// refused makes a refusal of an error that came with an answer.
func refused(resp *http.Response, err error) error {
	if resp == nil || resp.StatusCode == http.StatusSwitchingProtocols {
		return err
	}
	body, _ := io.ReadAll(resp.Body) // the library keeps the first KiB of it
	return refusal{resp.StatusCode, resp.Header.Get("Retry-After"), strings.TrimSpace(string(body))}
}

func (s *session) read(ctx context.Context) (message, error) {
	_, data, err := s.conn.Read(ctx)
	if err != nil {
		return message{}, err
	}
	var m message
	if err := json.Unmarshal(data, &m); err != nil {
		return message{}, fmt.Errorf("message %.100q: %w", data, err)
	}
	return m, nil
}

// follower reads a session to its end and sees to it that no message is
// missing and all come from the same backend.
type follower struct {
	// Static after construction.
	session *session
	stop    context.CancelFunc
	done    chan struct{} // closed when run has returned

	// Guarded by mu.
	mu    sync.Mutex
	last  message
	seen  time.Time // when last came
	err   error     // why it ended; nil if it was stopped
	ended time.Time // when it did
}

// follow takes the session over: it ends with close, or by itself.
func follow(s *session) *follower {
	ctx, stop := context.WithCancel(context.Background())
	f := &follower{session: s, stop: stop, done: make(chan struct{}), last: s.first, seen: time.Now()}
	go f.run(ctx)
	return f
}

// run reads until the session ends or stop is called, which closes it.
func (f *follower) run(ctx context.Context) {
	defer close(f.done)
	defer f.session.conn.CloseNow()
	for {
		m, err := f.session.read(ctx)
		if ctx.Err() != nil {
			return
		}
		f.mu.Lock()
		if want := f.next(); err == nil && m != want {
			err = fmt.Errorf("message %+v, want %+v", m, want)
		}
		if err == nil {
			f.last, f.seen = m, time.Now()
		}
		f.err, f.ended = err, time.Now()
		f.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// next is the message that must come now. mu is held.
func (f *follower) next() message {
	m := f.last
	m.Counter++
	return m
}

// state returns the counter of the last message, and an error if the session
// has ended or has been silent for five seconds: backends send every second.
func (f *follower) state() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.last.Counter, fmt.Errorf("session of %s with %s: %w", f.last.NS, f.last.Server, f.err)
	}
	if silent := time.Since(f.seen); silent > 5*time.Second {
		return f.last.Counter, fmt.Errorf("session of %s with %s: silent for %s", f.last.NS, f.last.Server, silent)
	}
	return f.last.Counter, nil
}

// end returns when and why the session ended, nil if it did not or was stopped.
func (f *follower) end() (time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ended, f.err
}

// alive is state's error.
func (f *follower) alive() error {
	_, err := f.state()
	return err
}

// close ends the session and waits for run.
func (f *follower) close() {
	f.stop()
	<-f.done
}

// mustFollow opens a session and follows it until the test ends.
func (s *system) mustFollow(namespace string) *follower {
	s.t.Helper()
	session, err := s.dialer.open(s.t.Context(), namespace)
	if err != nil {
		s.t.Fatal(err)
	}
	f := follow(session)
	s.t.Cleanup(f.close)
	return f
}

// mustLand opens a session and fails the test unless this backend answers.
func (s *system) mustLand(namespace, backend string) {
	s.t.Helper()
	if err := s.dialer.lands(s.t.Context(), namespace, backend); err != nil {
		s.t.Fatal(err)
	}
}

// lands is nil if a new session of the namespace gets to this backend.
func (d *dialer) lands(ctx context.Context, namespace, backend string) error {
	session, err := d.open(ctx, namespace)
	if err != nil {
		return err
	}
	defer session.conn.CloseNow()
	if session.first.Server != backend {
		return fmt.Errorf("%s landed on %s, want %s", namespace, session.first.Server, backend)
	}
	return nil
}
