package main

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// cause says why a session ended. The first one counts.
type cause int32

const (
	causeNone         cause = iota
	causeClient             // the client ended first
	causeBackend            // the backend ended first
	causeClientError        // the client's connection broke
	causeBackendError       // the backend's connection broke
	causeHalfClose          // one side ended, the other neither ended nor sent anything for lingerTime
	causeMoved              // its namespace has another owner now
	causeDrain              // the router stops
	causes                  // how many there are
)

// String is the value of the log's "cause" and of the metric's label.
func (c cause) String() string {
	return [causes]string{"none", "client", "backend", "client_error", "backend_error",
		"half_close", "moved", "drain"}[c]
}

const (
	relayBuffer = 4 << 10          // bytes held for each direction of a session
	lingerTime  = 30 * time.Second // how long a half-closed session may be silent
)

// session is one proxied connection, from hand-over to the end.
type session struct {
	// Static after hand-over.
	namespace string
	backend   int    // ordinal
	peer      string // the client's addresses as X-Forwarded-For has them
	client    net.Conn
	server    net.Conn // to the backend
	started   time.Time

	toBackend atomic.Int64 // bytes
	toClient  atomic.Int64 // bytes
	why       atomic.Int32 // a cause
	half      atomic.Bool  // one direction has ended
	running   atomic.Int32 // directions that have not ended
}

// relay carries the bytes of all sessions. Here each session has two goroutines
// with a buffer; what the rest of the program sees is carry, end, where, size
// and wait.
type relay struct {
	// Static after construction.
	name func(backend int) string
	log  *slog.Logger

	// Guarded by mu.
	mu                  sync.Mutex
	sessions            map[*session]struct{}
	toBackend, toClient int64 // bytes of the sessions that have ended

	copiers   sync.WaitGroup // one for each session
	ended     [causes]atomic.Int64
	byBackend []backendCount // by ordinal
}

// backendCount counts the sessions of one backend.
type backendCount struct{ open, total atomic.Int64 }

// newRelay returns a relay to the given number of backends, whose names are for
// the log.
func newRelay(backends int, name func(backend int) string, log *slog.Logger) *relay {
	return &relay{name: name, log: log, sessions: map[*session]struct{}{}, byBackend: make([]backendCount, backends)}
}

// carry takes over both sockets of s and returns at once. After it nobody but
// the relay closes them or touches them (invariant 8). fromClient and
// fromBackend are bytes that were read before the hand-over and go first
// (invariant 6).
func (r *relay) carry(s *session, fromClient, fromBackend []byte) {
	s.started = time.Now()
	s.running.Store(2)
	r.copiers.Add(1)
	r.mu.Lock()
	r.sessions[s] = struct{}{}
	r.mu.Unlock()
	r.byBackend[s.backend].open.Add(1)
	r.byBackend[s.backend].total.Add(1)
	go r.copyToBackend(s, fromClient)
	go r.copyToClient(s, fromBackend)
}

func (r *relay) copyToBackend(s *session, first []byte) {
	s.copy(s.server, s.client, first, &s.toBackend, causeBackendError, causeClientError, causeClient)
	r.finish(s)
}

func (r *relay) copyToClient(s *session, first []byte) {
	s.copy(s.client, s.server, first, &s.toClient, causeClientError, causeBackendError, causeBackend)
	r.finish(s)
}

// copy carries one direction until its source ends, which it passes on as a
// half-close, or until either socket fails, which ends both directions. A
// destination that takes nothing stops the source: no more than relayBuffer is
// held (invariant 10).
func (s *session) copy(dst, src net.Conn, first []byte, count *atomic.Int64, dstFailed, srcFailed, srcEnded cause) {
	data, err := first, error(nil)
	buf := make([]byte, relayBuffer)
	for {
		if len(data) > 0 {
			n, werr := dst.Write(data)
			count.Add(int64(n))
			if werr != nil {
				s.end(dstFailed)
				return
			}
		}
		if err != nil {
			break
		}
		s.limitSilence(src)
		var n int
		n, err = src.Read(buf)
		data = buf[:n]
	}
	switch {
	case errors.Is(err, io.EOF):
		s.halfClose(dst, srcEnded)
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.end(causeHalfClose)
	default:
		s.end(srcFailed)
	}
}

// halfClose passes the end of one direction on, and starts the clock for the
// other one, which reads from dst.
func (s *session) halfClose(dst net.Conn, why cause) {
	s.why.CompareAndSwap(int32(causeNone), int32(why))
	s.half.Store(true)
	s.limitSilence(dst)
	dst.(interface{ CloseWrite() error }).CloseWrite() // *net.TCPConn or *net.UnixConn; its error shows on dst's next read
}

// limitSilence bounds, in a half-closed session, how long src may be silent,
// and how long its peer may take nothing.
func (s *session) limitSilence(src net.Conn) {
	if !s.half.Load() {
		return
	}
	limit := time.Now().Add(lingerTime)
	src.SetReadDeadline(limit)
	s.other(src).SetWriteDeadline(limit)
}

func (s *session) other(conn net.Conn) net.Conn {
	if conn == s.client {
		return s.server
	}
	return s.client
}

// end ends the session: both sockets are closed. The first cause counts. It may
// be called from anywhere, any number of times, once s was handed over.
func (s *session) end(why cause) {
	s.why.CompareAndSwap(int32(causeNone), int32(why))
	s.client.Close()
	s.server.Close()
}

// finish is called when a direction has ended; the second time the session is
// over, and is counted and logged once.
func (r *relay) finish(s *session) {
	if s.running.Add(-1) > 0 {
		return
	}
	s.end(causeNone)
	why := cause(s.why.Load())
	r.mu.Lock()
	delete(r.sessions, s)
	r.toBackend += s.toBackend.Load()
	r.toClient += s.toClient.Load()
	r.mu.Unlock()
	r.byBackend[s.backend].open.Add(-1)
	r.ended[why].Add(1)
	r.log.Info("session ended", "namespace", s.namespace, "backend", r.name(s.backend), "cause", why.String(),
		"client", s.peer, "seconds", time.Since(s.started).Seconds(),
		"to_backend", s.toBackend.Load(), "to_client", s.toClient.Load())
	r.copiers.Done()
}

// where returns the sessions for which match is true. match must be quick: no
// session starts or ends meanwhile.
func (r *relay) where(match func(*session) bool) []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*session
	for s := range r.sessions {
		if match(s) {
			found = append(found, s)
		}
	}
	return found
}

// size returns how many sessions there are.
func (r *relay) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// bytes returns how many bytes were carried in all, of open sessions too.
func (r *relay) bytes() (toBackend, toClient int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	toBackend, toClient = r.toBackend, r.toClient
	for s := range r.sessions {
		toBackend += s.toBackend.Load()
		toClient += s.toClient.Load()
	}
	return toBackend, toClient
}

// over reports whether the session has ended by itself.
func (s *session) over() bool { return s.running.Load() == 0 }

// wait returns when all sessions have ended.
func (r *relay) wait() { r.copiers.Wait() }
