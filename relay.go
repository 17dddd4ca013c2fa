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
	causeHalfClose          // one side ended, the other neither ended nor sent anything for halfCloseTimeout
	causeIdle               // no byte was carried for -idle-timeout
	causeMoved              // its namespace has another owner now
	causeDrain              // the router stops
	numCauses               // how many there are
)

// String is the value of the log's "cause" and of the metric's label.
func (c cause) String() string {
	return [numCauses]string{"none", "client", "backend", "client_error", "backend_error",
		"router_error", "half_close", "idle", "moved", "drain"}[c]
}

// endCause is the cause when the side ended first, broken when it failed.
func (i side) endCause() cause   { return [2]cause{causeClient, causeBackend}[i] }
func (i side) errorCause() cause { return [2]cause{causeClientError, causeBackendError}[i] }

// causeOf is the cause when a call on the side's socket failed: broken if the error
// says that the peer is gone. Any other, such as ENOBUFS and ENOMEM, which unix(7)
// has when memory is short, is the router's.
func (i side) causeOf(err error) cause {
	for _, gone := range []error{
		syscall.EPIPE, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.ENOTCONN, syscall.ETIMEDOUT, // tcp(7), unix(7)
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN, // ICMP said so before it timed out
		syscall.ECONNREFUSED, syscall.ENOPROTOOPT, syscall.EPROTO, syscall.EACCES, // ICMP too
		net.ErrClosed, // the router has cut it off
	} {
		if errors.Is(err, gone) {
			return i.errorCause()
		}
	}
	return causeRouterError
}

// halfCloseTimeout is how long a half-closed session may be silent.
const halfCloseTimeout = 30 * time.Second

// deadTimeout is how long a session goes on of which one side has ended and takes
// nothing any more. The other may still read what the kernel has for it, and would
// lose that if its socket were closed while it sends: such a close is a reset (RFC
// 1122 §4.2.2.13).
const deadTimeout = 500 * time.Millisecond

// descriptorsPerSession is how many a session has: its sockets. While it is handed
// over there may be one more.
const descriptorsPerSession = 2

// session is one proxied connection, from hand-over to the end.
type session struct {
	// Static after hand-over.
	namespace   string
	clientAddrs string        // the client's addresses as X-Forwarded-For has them
	podUID      string        // uid of the backend's pod when it was dialled, "" if not known
	backend     int           // ordinal
	started     time.Duration // since relay.began

	// Guarded by relay.mu.
	index    int32 // in relay.sessions
	onOldPod bool  // counted in relay.oldPods

	podDone   atomic.Bool     // its pod has ended it, or was cut off
	cause     atomic.Int32    // a cause
	finished  atomic.Bool     // it has ended, and was counted
	bytesFrom [2]atomic.Int64 // bytes from each side that the other has taken, a Close frame of the router too

	// Owned by endIdle.
	lastBytes int64 // bytes at its last look
	idleCount int32 // looks since they changed

	sessionIO // its sockets, and who carries their bytes
}

// newSession returns a session for the relay to carry. The texts are copied, into
// one piece of memory: it outlives its request, whose memory they may be part of.
func newSession(namespace string, backend int, clientAddrs string) *session {
	clientAddrs = lastClientAddrs(clientAddrs)
	var both strings.Builder
	both.Grow(len(namespace) + len(clientAddrs))
	both.WriteString(namespace)
	both.WriteString(clientAddrs)
	return &session{namespace: both.String()[:len(namespace)], backend: backend, clientAddrs: both.String()[len(namespace):]}
}

// maxClientAddrs is how much of X-Forwarded-For, its end, is for the log, in bytes.
const maxClientAddrs = 64

// lastClientAddrs is the end of X-Forwarded-For, which those have written who are
// nearest to the router.
func lastClientAddrs(clientAddrs string) string {
	return clientAddrs[max(0, len(clientAddrs)-maxClientAddrs):]
}

// bytes returns count.
func (s *session) bytes() [2]int64 {
	return [2]int64{s.bytesFrom[clientSide].Load(), s.bytesFrom[backendSide].Load()}
}

// relay carries the bytes of all sessions. How it does that is the carrier's
// business: relay_linux.go has one, relay_portable.go one for all systems.
type relay struct {
	// Static after construction.
	backendName      func(backend int) string
	began            time.Time
	halfCloseTimeout time.Duration         // how long a half-closed session may be silent
	deadTimeout      time.Duration         // how long a session goes on that is dead
	closeTimeout     time.Duration         // how long a session may take to part
	freeDescriptors  func(descriptors int) // that a session no longer needs
	log              *slog.Logger
	engine           engine

	// Guarded by mu.
	mu         sync.Mutex
	sessions   []*session           // in no order: where goes through all of them
	endedBytes [2]int64             // that came from each side of the sessions that have ended
	byBackend  map[int]backendCount // by ordinal

	openSessions sync.WaitGroup // sessions
	ended        [numCauses]atomic.Int64
	cut          [numCauses]atomic.Int64 // of these, those that were to part and did not in time

	podUIDs atomic.Pointer[map[int]string] // uid of the pod that each backend is, by ordinal, of those that were ever known; stored with mu held
	oldPods map[string]*oldPodSessions     // by namespace; guarded by mu
}

// backendCount counts the sessions of one backend; behind are those with a pod that
// is the backend no more.
type backendCount struct{ open, total, onOldPod int }

// oldPodSessions is the sessions of a namespace with pods that are replaced.
type oldPodSessions struct {
	sessions int
	done     chan struct{} // closed when there are none any more
}

// newRelay returns a relay, which carries between start and stop. The backends'
// names are for the log.
func newRelay(name func(backend int) string, log *slog.Logger) *relay {
	return &relay{
		backendName: name, began: time.Now(), halfCloseTimeout: halfCloseTimeout, deadTimeout: deadTimeout, closeTimeout: closeTimeout, freeDescriptors: func(int) {}, log: log, byBackend: map[int]backendCount{}, oldPods: map[string]*oldPodSessions{},
	}
}

func (r *relay) start() error { return r.engine.start(r) }

// stop waits until all sessions have ended.
func (r *relay) stop() {
	r.wait()
	r.engine.stop()
}

// startSession takes over both sockets of s and returns at once. After it nobody but
// the relay closes them or touches them (invariant 8). fromClient and
// fromBackend are bytes that were read before the hand-over and go first
// (invariant 6).
func (r *relay) startSession(s *session, conns [2]net.Conn, early [2][]byte) {
	r.engine.assign(s, conns)
	r.register(s, func() { r.engine.startSession(s, conns, early) })
}

// register puts s, which its carrier knows of, into the set, and then begins to carry.
func (r *relay) register(s *session, begin func()) {
	s.started = time.Since(r.began)
	r.openSessions.Add(1)
	r.add(s)
	begin()
	r.freeDescriptors(1)
}

// sessionEnded counts and logs the end of a session. The carrier calls it once for
// each, when it has closed both sockets.
func (r *relay) sessionEnded(s *session) {
	cause, n, cut := cause(s.cause.Load()), s.bytes(), false
	if s.closing != nil {
		cut = s.closing.finish()
	}
	r.remove(s, n)
	r.ended[cause].Add(1)
	if cut {
		r.cut[cause].Add(1)
	}
	r.log.Info("session ended", "namespace", s.namespace, "backend", r.backendName(s.backend), "cause", cause.String(), "cut", cut,
		"client", s.clientAddrs, "seconds", (time.Since(r.began) - s.started).Seconds(),
		"to_backend", n[clientSide], "to_client", n[backendSide])
	s.finished.Store(true)
	r.freeDescriptors(descriptorsPerSession)
	r.openSessions.Done()
}

// add puts s into the set.
func (r *relay) add(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.index = int32(len(r.sessions))
	r.sessions = append(r.sessions, s)
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open + 1, count.total + 1, count.onOldPod}
	r.countOnOldPod(s, r.podReplaced(s))
}

// remove takes s, whose bytes are n, out of the set. The last takes its place.
func (r *relay) remove(s *session, n [2]int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.countOnOldPod(s, false)
	last := len(r.sessions) - 1
	r.sessions[s.index], r.sessions[last].index = r.sessions[last], s.index
	r.sessions[last] = nil
	r.sessions = r.sessions[:last]
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open - 1, count.total, count.onOldPod}
	r.endedBytes[clientSide] += n[clientSide]
	r.endedBytes[backendSide] += n[backendSide]
}

// setPods takes the uids of the pods that the backends are now, and reports whether
// one of them was another pod before. The sessions with that are behind then, until
// they are over or the pod has let go of them: a namespace that has one must not
// get a session with the new pod.
func (r *relay) setPods(pods map[int]string) (changed bool) {
	r.mu.Lock()
	now := map[int]string{}
	if old := r.podUIDs.Load(); old != nil {
		maps.Copy(now, *old)
	}
	for ordinal, uid := range pods {
		changed = changed || now[ordinal] != "" && now[ordinal] != uid
		now[ordinal] = uid
	}
	r.podUIDs.Store(&now) // add knows: of the others there is a list
	r.mu.Unlock()
	if !changed {
		return false
	}
	for _, s := range r.filter(func(s *session) bool { return s.podUID != "" }) {
		r.recountOnOldPod(s)
	}
	return true
}

// podReplaced reports whether the session is with a pod that is its backend no more.
// It takes no lock.
func (r *relay) podReplaced(s *session) bool {
	pods := r.podUIDs.Load()
	if s.podUID == "" || pods == nil {
		return false
	}
	now := (*pods)[s.backend]
	return now != "" && now != s.podUID && !s.podDone.Load()
}

// recountOnOldPod counts s as what it is now, unless it is over.
func (r *relay) recountOnOldPod(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(s.index) < len(r.sessions) && r.sessions[s.index] == s {
		r.countOnOldPod(s, r.podReplaced(s))
	}
}

// countOnOldPod counts s as behind, or not. mu is held.
func (r *relay) countOnOldPod(s *session, onOldPod bool) {
	if s.onOldPod == onOldPod {
		return
	}
	s.onOldPod = onOldPod
	b, step := r.oldPods[s.namespace], 1
	if b == nil {
		b = &oldPodSessions{done: make(chan struct{})}
		r.oldPods[s.namespace] = b
	}
	if !onOldPod {
		step = -1
	}
	count := r.byBackend[s.backend]
	r.byBackend[s.backend] = backendCount{count.open, count.total, count.onOldPod + step}
	if b.sessions += step; b.sessions == 0 {
		delete(r.oldPods, s.namespace)
		close(b.done)
	}
}

// setPodDone takes note that the pod of s has ended it, or was cut off: it serves its
// namespace no more. The carrier calls it, with its locks held or not.
func (r *relay) setPodDone(s *session) {
	if s.podUID != "" && !s.podDone.Swap(true) {
		r.recountOnOldPod(s)
	}
}

// oldPodSessionsDone returns nil if the namespace may get a session, or what is closed when
// its last session with a pod that is replaced is over.
func (r *relay) oldPodSessionsDone(namespace string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.oldPods[namespace]; b != nil {
		return b.done
	}
	return nil
}

// isDead reports whether nothing more can reach either side: each direction has ended
// or is lost.
func (w *sessionIO) isDead() bool {
	return (w.fin[clientSide] || w.writeFailed[backendSide]) && (w.fin[backendSide] || w.writeFailed[clientSide])
}

// setCause notes why the session ends, unless it was noted before.
func (s *session) setCause(cause cause) bool {
	return s.cause.CompareAndSwap(int32(causeNone), int32(cause))
}

// isClosing reports whether the session ends or has ended.
func (s *session) isClosing() bool { return cause(s.cause.Load()) != causeNone }

// filter returns the sessions, of those that are open at one moment of the call, for
// which match is true. match is called without the relay's lock, so that sessions
// start and end meanwhile: the caller may get some that have ended.
func (r *relay) filter(match func(*session) bool) []*session {
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
			open, ended = append(open, r.sessions...), r.endedBytes
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
		sum[clientSide] += n[clientSide]
		sum[backendSide] += n[backendSide]
	}
	return sum
}

// writeSessionMetrics writes how many sessions there are with each of these backends,
// and how they ended. The numbers are read one after the other: a session that ends
// meanwhile may be in one and not yet in the other.
func (r *relay) writeSessionMetrics(m metricsWriter, counts map[int]backendCount, backends []int) {
	if len(backends) > 0 {
		m.family("router_sessions", "gauge", "Open sessions.")
		for _, ordinal := range backends {
			m.sample("router_sessions", float64(counts[ordinal].open), "backend", r.backendName(ordinal))
		}
		m.family("router_sessions_total", "counter", "Sessions since the start.")
		for _, ordinal := range backends {
			m.sample("router_sessions_total", float64(counts[ordinal].total), "backend", r.backendName(ordinal))
		}
	}
	m.family("router_sessions_ended_total", "counter", "Sessions that ended, by cause.")
	for c := causeNone + 1; c < numCauses; c++ {
		m.sample("router_sessions_ended_total", float64(r.ended[c].Load()), "cause", c.String())
	}
	m.family("router_sessions_cut_total", "counter",
		"Sessions of which not both sides answered their Close frames in time, by cause.")
	for _, c := range []cause{causeMoved, causeDrain} {
		m.sample("router_sessions_cut_total", float64(r.cut[c].Load()), "cause", c.String())
	}
}

// writeByteMetrics writes how many bytes were carried.
func (r *relay) writeByteMetrics(m metricsWriter) {
	bytes := r.bytes()
	m.family("router_bytes_total", "counter", "Bytes carried after the handshakes.")
	m.sample("router_bytes_total", float64(bytes[clientSide]), "direction", "to_backend")
	m.sample("router_bytes_total", float64(bytes[backendSide]), "direction", "to_client")
}

// endAll ends all sessions at once.
func (r *relay) endAll(cause cause) {
	for _, s := range r.filter(func(*session) bool { return true }) {
		s.end(cause)
	}
}

// wait returns when all sessions have ended.
func (r *relay) wait() { r.openSessions.Wait() }

// closeGracefully starts a closing handshake, which ends the session within the
// relay's closeTimeout. It returns false, and does nothing, if the session ends or
// has ended already. cause is causeMoved or causeDrain. done, if not nil, is called
// once when the session is over, from any goroutine; it must not block.
//
// closeGracefully may be called from any goroutine, once the engine knows s.
func (s *session) closeGracefully(cause cause, done func(cut bool)) bool {
	s.lock()
	defer s.unlock()
	if !s.setCause(cause) {
		return false
	}
	s.closing = newClosingHandshake(cause, done)
	s.startClose()
	return true
}

// newClosingHandshake returns a closing handshake with the Close frames for cause,
// causeMoved or causeDrain. done, if not nil, is called once when the session is
// over; it must not block.
func newClosingHandshake(cause cause, done func(cut bool)) *closingHandshake {
	h := &closingHandshake{onDone: done}
	h.frames[clientSide] = closeFrame(closeGoingAway, "going away", true)
	h.frames[backendSide] = closeFrame(closeGoingAway, "going away", false)
	if cause == causeMoved {
		h.frames[backendSide] = closeFrame(closeServiceRestart, "service restart", false)
	}
	return h
}

// idleChecks is how often endIdle looks at a session in the time that it may be
// idle.
const idleChecks = 8

// endIdle ends sessions of which no byte was carried for timeout, until ctx ends.
// It is late by up to a quarter of that: a look, and one more for looks that come
// too close to each other. Sessions need no timer, and no time for each byte.
func (r *relay) endIdle(ctx context.Context, timeout time.Duration) {
	look := time.NewTicker(timeout / idleChecks)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			for _, s := range r.filter((*session).checkIdle) {
				s.end(causeIdle)
			}
		}
	}
}

// checkIdle takes a look, and reports whether there were enough without a change.
func (s *session) checkIdle() bool {
	n := s.bytes()
	if sum := n[clientSide] + n[backendSide]; sum != s.lastBytes {
		s.lastBytes, s.idleCount = sum, 0
		return false
	}
	s.idleCount++
	return s.idleCount > idleChecks
}
