package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	causeRouterError        // the router could not carry it: no descriptors or memory left
	causeHalfClose          // one side ended, the other neither ended nor sent anything for lingerTime
	causeIdle               // no byte was carried for -idle-timeout
	causeMoved              // its namespace has another owner now
	causeDrain              // the router stops
	causes                  // how many there are
)

// String is the value of the log's "cause" and of the metric's label.
func (c cause) String() string {
	return [causes]string{"none", "client", "backend", "client_error", "backend_error",
		"router_error", "half_close", "idle", "moved", "drain"}[c]
}

// ended is the cause when the side ended first, broken when it failed.
func (i side) ended() cause  { return [2]cause{causeClient, causeBackend}[i] }
func (i side) broken() cause { return [2]cause{causeClientError, causeBackendError}[i] }

// failed is the cause when a call on the side's socket failed: broken if the error
// says that the peer is gone. Any other, such as ENOBUFS and ENOMEM, which unix(7)
// has when memory is short, is the router's.
func (i side) failed(err error) cause {
	for _, gone := range []error{
		syscall.EPIPE, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.ENOTCONN, syscall.ETIMEDOUT, // tcp(7), unix(7)
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN, // ICMP said so before it timed out
		syscall.ECONNREFUSED, syscall.ENOPROTOOPT, syscall.EPROTO, syscall.EACCES, // ICMP too
		net.ErrClosed, // the router has cut it off
	} {
		if errors.Is(err, gone) {
			return i.broken()
		}
	}
	return causeRouterError
}

// lingerTime is how long a half-closed session may be silent.
const lingerTime = 30 * time.Second

// goneTime is how long a session goes on of which one side has ended and takes
// nothing any more. The other may still read what the kernel has for it, and would
// lose that if its socket were closed while it sends: such a close is a reset (RFC
// 1122 §4.2.2.13).
const goneTime = 500 * time.Millisecond

// sessionDescriptors is how many a session has: its sockets. While it is handed
// over there may be one more.
const sessionDescriptors = 2

// session is one proxied connection, from hand-over to the end.
type session struct {
	// Static after hand-over.
	namespace string
	peer      string        // the client's addresses as X-Forwarded-For has them
	pod       string        // uid of the backend's pod when it was dialled, "" if not known
	backend   int           // ordinal
	started   time.Duration // since relay.began

	// Guarded by relay.mu.
	at     int32 // in relay.sessions
	behind bool  // counted in relay.behind

	letGo atomic.Bool     // its pod has ended it, or was cut off
	why   atomic.Int32    // a cause
	gone  atomic.Bool     // it has ended, and was counted
	count [2]atomic.Int64 // bytes from each side that the other has taken, a Close frame of the router too

	// Owned by endIdle.
	carried int64 // bytes at its last look
	quiet   int32 // looks since they changed

	wire // its sockets, and who carries their bytes
}

// newSession returns a session for the relay to carry. The texts are copied, into
// one piece of memory: it outlives its request, whose memory they may be part of.
func newSession(namespace string, backend int, peer string) *session {
	peer = lastAddresses(peer)
	var both strings.Builder
	both.Grow(len(namespace) + len(peer))
	both.WriteString(namespace)
	both.WriteString(peer)
	return &session{namespace: both.String()[:len(namespace)], backend: backend, peer: both.String()[len(namespace):]}
}

// maxPeer is how much of X-Forwarded-For, its end, is for the log, in bytes.
const maxPeer = 64

// lastAddresses is the end of X-Forwarded-For, which those have written who are
// nearest to the router.
func lastAddresses(peer string) string { return peer[max(0, len(peer)-maxPeer):] }

// bytes returns count.
func (s *session) bytes() [2]int64 { return [2]int64{s.count[client].Load(), s.count[server].Load()} }

// relay carries the bytes of all sessions. How it does that is the carrier's
// business: relay_linux.go has one, relay_portable.go one for all systems.
type relay struct {
	// Static after construction.
	name    func(backend int) string
	began   time.Time
	linger  time.Duration         // how long a half-closed session may be silent
	gone    time.Duration         // how long a session goes on that is dead
	closing time.Duration         // how long a session may take to part
	freed   func(descriptors int) // that a session no longer needs
	log     *slog.Logger
	carrier carrier

	// Guarded by mu.
	mu        sync.Mutex
	sessions  []*session           // in no order: where goes through all of them
	bytesOf   [2]int64             // that came from each side of the sessions that have ended
	byBackend map[int]backendCount // by ordinal

	open  sync.WaitGroup // sessions
	ended [causes]atomic.Int64
	cut   [causes]atomic.Int64 // of these, those that were to part and did not in time

	pods   atomic.Pointer[map[int]string] // uid of the pod that each backend is, by ordinal, of those that were ever known; stored with mu held
	behind map[string]*behind             // by namespace; guarded by mu
}

// backendCount counts the sessions of one backend; behind are those with a pod that
// is the backend no more.
type backendCount struct{ open, total, behind int }

// behind is the sessions of a namespace with pods that are replaced.
type behind struct {
	sessions int
	over     chan struct{} // closed when there are none any more
}

// newRelay returns a relay, which carries between start and stop. The backends'
// names are for the log.
func newRelay(name func(backend int) string, log *slog.Logger) *relay {
	return &relay{
		name: name, began: time.Now(), linger: lingerTime, gone: goneTime, closing: closeTime, freed: func(int) {}, log: log, byBackend: map[int]backendCount{}, behind: map[string]*behind{},
	}
}

func (r *relay) start() error { return r.carrier.start(r) }

// stop waits until all sessions have ended.
func (r *relay) stop() {
	r.wait()
	r.carrier.stop()
}

// carry takes over both sockets of s and returns at once. After it nobody but
// the relay closes them or touches them (invariant 8). fromClient and
// fromBackend are bytes that were read before the hand-over and go first
// (invariant 6).
func (r *relay) carry(s *session, ends [2]net.Conn, first [2][]byte) {
	r.carrier.attach(s, ends)
	r.take(s, func() { r.carrier.begin(s, ends, first) })
}

// take puts s, which its carrier knows of, into the set, and then begins to carry.
func (r *relay) take(s *session, begin func()) {
	s.started = time.Since(r.began)
	r.open.Add(1)
	r.add(s)
	begin()
	r.freed(1)
}

// over counts and logs the end of a session. The carrier calls it once for
// each, when it has closed both sockets.
func (r *relay) over(s *session) {
	why, n, cut := cause(s.why.Load()), s.bytes(), false
	if s.parting != nil {
		cut = s.parting.finish()
	}
	r.remove(s, n)
	r.ended[why].Add(1)
	if cut {
		r.cut[why].Add(1)
	}
	r.log.Info("session ended", "namespace", s.namespace, "backend", r.name(s.backend), "cause", why.String(), "cut", cut,
		"client", s.peer, "seconds", (time.Since(r.began) - s.started).Seconds(),
		"to_backend", n[client], "to_client", n[server])
	s.gone.Store(true)
	r.freed(sessionDescriptors)
	r.open.Done()
}

// add puts s into the set.
func (r *relay) add(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.at = int32(len(r.sessions))
	r.sessions = append(r.sessions, s)
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open + 1, count.total + 1, count.behind}
	r.mark(s, r.replaced(s))
}

// remove takes s, whose bytes are n, out of the set. The last takes its place.
func (r *relay) remove(s *session, n [2]int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mark(s, false)
	last := len(r.sessions) - 1
	r.sessions[s.at], r.sessions[last].at = r.sessions[last], s.at
	r.sessions[last] = nil
	r.sessions = r.sessions[:last]
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open - 1, count.total, count.behind}
	r.bytesOf[client] += n[client]
	r.bytesOf[server] += n[server]
}

// replace takes the uids of the pods that the backends are now, and reports whether
// one of them was another pod before. The sessions with that are behind then, until
// they are over or the pod has let go of them: a namespace that has one must not
// get a session with the new pod.
func (r *relay) replace(pods map[int]string) (changed bool) {
	r.mu.Lock()
	now := map[int]string{}
	if old := r.pods.Load(); old != nil {
		maps.Copy(now, *old)
	}
	for ordinal, uid := range pods {
		changed = changed || now[ordinal] != "" && now[ordinal] != uid
		now[ordinal] = uid
	}
	r.pods.Store(&now) // add knows: of the others there is a list
	r.mu.Unlock()
	if !changed {
		return false
	}
	for _, s := range r.where(func(s *session) bool { return s.pod != "" }) {
		r.remark(s)
	}
	return true
}

// replaced reports whether the session is with a pod that is its backend no more.
// It takes no lock.
func (r *relay) replaced(s *session) bool {
	pods := r.pods.Load()
	if s.pod == "" || pods == nil {
		return false
	}
	now := (*pods)[s.backend]
	return now != "" && now != s.pod && !s.letGo.Load()
}

// remark counts s as what it is now, unless it is over.
func (r *relay) remark(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(s.at) < len(r.sessions) && r.sessions[s.at] == s {
		r.mark(s, r.replaced(s))
	}
}

// mark counts s as behind, or not. mu is held.
func (r *relay) mark(s *session, is bool) {
	if s.behind == is {
		return
	}
	s.behind = is
	b, step := r.behind[s.namespace], 1
	if b == nil {
		b = &behind{over: make(chan struct{})}
		r.behind[s.namespace] = b
	}
	if !is {
		step = -1
	}
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open, count.total, count.behind + step}
	if b.sessions += step; b.sessions == 0 {
		delete(r.behind, s.namespace)
		close(b.over)
	}
}

// release takes note that the pod of s has ended it, or was cut off: it serves its
// namespace no more. The carrier calls it, with its locks held or not.
func (r *relay) release(s *session) {
	if s.pod != "" && !s.letGo.Swap(true) {
		r.remark(s)
	}
}

// leftBehind returns nil if the namespace may get a session, or what is closed when
// its last session with a pod that is replaced is over.
func (r *relay) leftBehind(namespace string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.behind[namespace]; b != nil {
		return b.over
	}
	return nil
}

// dead reports whether nothing more can reach either side: each direction has ended
// or is lost.
func (w *wire) dead() bool {
	return (w.fin[client] || w.lost[server]) && (w.fin[server] || w.lost[client])
}

// blame notes why the session ends, unless it was noted before.
func (s *session) blame(why cause) bool { return s.why.CompareAndSwap(int32(causeNone), int32(why)) }

// ending reports whether the session ends or has ended.
func (s *session) ending() bool { return cause(s.why.Load()) != causeNone }

// where returns the sessions, of those that are open at one moment of the call, for
// which match is true. match is called without the relay's lock, so that sessions
// start and end meanwhile: the caller may get some that have ended.
func (r *relay) where(match func(*session) bool) []*session {
	all, _ := r.snapshot()
	found := all[:0]
	for _, s := range all {
		if match(s) {
			found = append(found, s)
		}
	}
	clear(all[len(found):])
	return found
}

// snapshot returns the open sessions, and how many bytes those carried that have
// ended, at one moment. It holds the lock for a copy of 8 bytes a session: no more
// than that may be done under it, as sessions start and end on the goroutines that
// carry all the others. The caller owns the slice.
func (r *relay) snapshot() (open []*session, ended [2]int64) {
	for {
		room := r.size() + snapshotRoom // the memory is made, and cleared, without the lock
		open = make([]*session, 0, room)
		r.mu.Lock()
		n := len(r.sessions)
		if n <= room {
			open, ended = append(open, r.sessions...), r.bytesOf
		}
		r.mu.Unlock()
		if n <= room {
			return open, ended
		}
	}
}

// snapshotRoom is how many sessions may start while a snapshot makes its memory.
const snapshotRoom = 256

// size returns how many sessions there are.
func (r *relay) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// counts returns the counts of all backends that ever had a session.
func (r *relay) counts() map[int]backendCount {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.byBackend)
}

// bytes returns how many bytes were carried in all, of open sessions too, by
// the side they came from. A session that ends meanwhile counts once, as one that
// was open.
func (r *relay) bytes() [2]int64 {
	open, sum := r.snapshot()
	for _, s := range open {
		n := s.bytes()
		sum[client] += n[client]
		sum[server] += n[server]
	}
	return sum
}

// endAll ends all sessions at once.
func (r *relay) endAll(why cause) {
	for _, s := range r.where(func(*session) bool { return true }) {
		s.end(why)
	}
}

// wait returns when all sessions have ended.
func (r *relay) wait() { r.open.Wait() }

// newParting has the Close frames for a cause, causeMoved or causeDrain. done, if
// not nil, is called once the session is over; it must not block.
func newParting(why cause, done func(cut bool)) *parting {
	p := &parting{done: done}
	p.frame[client] = closeFrame(closeGoingAway, "going away", true)
	p.frame[server] = closeFrame(closeGoingAway, "going away", false)
	if why == causeMoved {
		p.frame[server] = closeFrame(closeServiceRestart, "service restart", false)
	}
	return p
}

// idleLooks is how often endIdle looks at a session in the time that it may be
// idle.
const idleLooks = 8

// endIdle ends sessions of which no byte was carried for timeout, until ctx ends.
// It is late by up to a quarter of that: a look, and one more for looks that come
// too close to each other. Sessions need no timer, and no time for each byte.
func (r *relay) endIdle(ctx context.Context, timeout time.Duration) {
	look := time.NewTicker(timeout / idleLooks)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			for _, s := range r.where((*session).idle) {
				s.end(causeIdle)
			}
		}
	}
}

// idle takes a look, and reports whether there were enough without a change.
func (s *session) idle() bool {
	n := s.bytes()
	if sum := n[client] + n[server]; sum != s.carried {
		s.carried, s.quiet = sum, 0
		return false
	}
	s.quiet++
	return s.quiet > idleLooks
}
