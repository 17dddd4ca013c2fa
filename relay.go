package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// cause is the reason why a session ended. The first one counts.
type cause int32

const (
	causeNone         cause = iota
	causeClient             // the client ended its stream first
	causeBackend            // the backend ended its stream first
	causeClientError        // the client's connection failed
	causeBackendError       // the backend's connection failed
	causeRouterError        // the router had no descriptors or memory left
	causeHalfClose          // one side ended, the other sent nothing for halfCloseTimeout
	causeIdle               // no byte was carried for -idle-timeout
	causeMoved              // another owner, or another pod of it; or this router was removed from the members
	causeMaxAge             // it was as old as -max-age
	causeDrain              // the router stops
	causeTruncated          // the client's TLS stream ended without close_notify
	numCauses               // the number of causes
)

// String returns the cause as the log's "cause" and the metrics' label have it.
func (c cause) String() string {
	return [numCauses]string{"none", "client", "backend", "client_error", "backend_error",
		"router_error", "half_close", "idle", "moved", "max_age", "drain", "truncated"}[c]
}

// endCause is the cause if the side ends its stream first.
func (i side) endCause() cause { return [2]cause{causeClient, causeBackend}[i] }

// errorCause is the cause if the side's connection fails.
func (i side) errorCause() cause {
	return [2]cause{causeClientError, causeBackendError}[i]
}

// causeOf returns the cause if a call on the side's socket fails with err: errorCause if err
// says that the connection is gone, or that the client has broken TLS, and causeTruncated if
// TLS has no end. All other errors are causeRouterError, such as ENOBUFS and ENOMEM, which
// unix(7) returns if memory is short.
func (i side) causeOf(err error) cause {
	gone := []error{
		// tcp(7), unix(7)
		syscall.EPIPE, syscall.ECONNRESET, syscall.ECONNABORTED,
		syscall.ENOTCONN, syscall.ETIMEDOUT,
		// from an ICMP message that came before the timeout
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN,
		syscall.ECONNREFUSED, syscall.ENOPROTOOPT, syscall.EPROTO, syscall.EACCES,
		// the router has closed it
		net.ErrClosed,
	}
	var errno syscall.Errno
	switch {
	case errors.Is(err, errTruncated):
		return causeTruncated
	case i == clientSide && !errors.As(err, &errno): // what TLS refuses, or net.ErrClosed
		return causeClientError
	}
	if slices.ContainsFunc(gone, func(e error) bool { return errors.Is(err, e) }) {
		return i.errorCause()
	}
	return causeRouterError
}

// isReset reports whether err says that the peer has reset the connection, or, with EPIPE, that
// it did so after its FIN. EPIPE also comes after another error, which a call has returned before.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// isLost reports whether err says that the connection has failed and its peer may not know: the
// kernel gave it up (ETIMEDOUT, EHOSTUNREACH), and the peer goes on. The socket returns such an
// error once, and then a plain end.
func isLost(err error) bool {
	if err == nil {
		return false // before errno, which is allocated
	}
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != 0 && !isReset(errno)
}

// halfCloseTimeout is the longest time that a half-closed session may carry nothing.
const halfCloseTimeout = 30 * time.Second

// deadTimeout is how long a dead session (isDead) goes on if one side has not ended
// its stream yet. That side may still read what the kernel has for it. It would lose
// that if the relay closed its socket while it sends: such a close is a reset (RFC
// 1122 §4.2.2.13).
const deadTimeout = 500 * time.Millisecond

// descriptorsPerSession is the number of file descriptors of a session: its two
// sockets. While it begins it may have one more.
const descriptorsPerSession = 2

// session is one proxied connection, from when the relay takes it over to its end.
type session struct {
	// Static after register.
	namespace   string
	clientAddrs string           // the client's addresses, from X-Forwarded-For
	podUID      string           // uid of the backend's pod at the dial, "" if not known
	backend     int              // ordinal
	started     time.Duration    // since relay.began
	permit      *namespacePermit // given back once; nil without a limit of sessions

	// Guarded by relay.mu.
	index    int32 // in relay.sessions
	onOldPod bool  // counted in relay.oldPods

	backendDone atomic.Bool  // no step waits for this session's backend; one may for its flight: see setBackendDone
	cause       atomic.Int32 // a cause; causeNone until the session ends
	isOver      atomic.Bool  // it has ended and was counted

	// Owned by endIdle.
	idleCount int32 // checks since the sum of bytesFrom changed
	lastBytes int64 // sum of bytesFrom at the last check

	topBytes  int64           // sum of bytesFrom at the last look of topNamespaces, which owns it
	bytesFrom [2]atomic.Int64 // by sender, taken by its peer's socket; with Close frames

	sessionIO // the engine's part: the sockets and their state
}

// newSession returns a session for startSession or poller.promote. It copies namespace and
// clientAddrs into one piece of memory, because they may be part of the request's memory,
// and a session outlives its request.
func newSession(namespace string, backend int, clientAddrs string) *session {
	both, n := strings.Join([]string{namespace, lastClientAddrs(clientAddrs)}, ""), len(namespace)
	return &session{namespace: both[:n], backend: backend, clientAddrs: both[n:]}
}

// maxClientAddrs is how many bytes of X-Forwarded-For, from its end, the log has.
const maxClientAddrs = 64

// lastClientAddrs returns the end of X-Forwarded-For. The proxies nearest to the
// router have written it.
func lastClientAddrs(clientAddrs string) string {
	return clientAddrs[max(0, len(clientAddrs)-maxClientAddrs):]
}

// bytes returns bytesFrom, by the side from which the bytes came.
func (s *session) bytes() [2]int64 {
	return [2]int64{s.bytesFrom[clientSide].Load(), s.bytesFrom[backendSide].Load()}
}

// relay holds all sessions. Its engine carries their bytes: relay_linux.go is the one
// for Linux, relay_portable.go the one for all systems.
type relay struct {
	// Static after construction.
	backendName      func(backend int) string
	began            time.Time
	clientTLS        bool          // clients may come with TLS that the router ends
	halfCloseTimeout time.Duration // see the constants of the same names
	deadTimeout      time.Duration
	closeTimeout     time.Duration
	freeDescriptors  func(count int)                    // called for descriptors that a session no longer has
	onBackendDone    func()                             // see setBackendDone; must not block
	onAbandoned      func(s *session, backend net.Conn) // see abandonBackend and backendFailed; nil: nobody waits
	remember         rememberNamespace                  // called just before onBackendDone
	log              *slog.Logger
	engine           engine

	// Guarded by mu.
	mu         sync.Mutex
	sessions   []*session                 // in no order: snapshot copies all of them
	endedBytes [2]int64                   // bytesFrom of the ended sessions
	byBackend  map[int]sessionCounts      // by ordinal
	oldPods    map[string]*oldPodSessions // by namespace

	openSessions sync.WaitGroup          // wait waits for it
	ended        [numCauses]atomic.Int64 // sessions
	cut          [numCauses]atomic.Int64 // of these, those whose closing handshake was cut
	unproven     atomic.Int64            // moved sessions whose backend's connection was reset: shouldAbandon
	durations    [numCauses]*histogram   // of the ended sessions

	// podUIDs is the uid of each backend's present pod, by ordinal, for all backends
	// whose pod was ever known. It is stored with mu locked and read without.
	podUIDs atomic.Pointer[map[int]string]
}

// sessionCounts counts the sessions of one backend.
type sessionCounts struct {
	open     int
	total    int // open and ended
	onOldPod int // open, with a pod that was replaced
}

// oldPodSessions counts the sessions of one namespace with pods that were replaced.
type oldPodSessions struct {
	sessions int
	done     chan struct{} // closed when sessions becomes 0
}

// newRelay returns a relay, which carries sessions between start and stop. name
// returns a backend's name for the log.
func newRelay(name func(backend int) string, log *slog.Logger) *relay {
	r := &relay{
		backendName:      name,
		began:            time.Now(),
		halfCloseTimeout: halfCloseTimeout,
		deadTimeout:      deadTimeout,
		closeTimeout:     closeTimeout,
		freeDescriptors:  func(int) {},
		onBackendDone:    func() {},
		remember:         func(string, int) {},
		log:              log,
		byBackend:        map[int]sessionCounts{},
		oldPods:          map[string]*oldPodSessions{},
	}
	for c := range r.durations { // 1 s to a day
		r.durations[c] = newHistogram(1, 5, 15, 60, 300, 900, 3600, 14400, 43200, 86400)
	}
	return r
}

// start starts the engine. If it fails, nothing has to be stopped.
func (r *relay) start() error { return r.engine.start(r) }

// stop waits until all sessions have ended, and stops the engine.
func (r *relay) stop() {
	r.wait()
	r.engine.stop()
}

// startSession takes over both connections of s and returns at once. From then on
// only the relay uses and closes them (invariant 8). early are the bytes that the
// caller has already read from each side: the relay sends them first (invariant 6).
func (r *relay) startSession(s *session, conns [2]net.Conn, early [2][]byte) {
	r.engine.assign(s, conns)
	r.register(s)
	r.engine.carry(s, conns, early)
	r.freeDescriptors(1) // a session needs one less than its upgrade did
}

// register adds s, to which the engine has assigned its poller or sockets. The caller then
// makes the engine carry its bytes, and gives back one descriptor.
func (r *relay) register(s *session) {
	s.started = time.Since(r.began)
	r.openSessions.Add(1)
	r.add(s)
}

// rememberNamespace notes that a namespace was with a backend. It must not block.
type rememberNamespace = func(namespace string, backend int)

// sessionEnded counts and logs the end of a session. The engine calls it once for each
// session, after it has closed both sockets, or given the backend's to abandonBackend.
func (r *relay) sessionEnded(s *session) {
	cause, n, cut := cause(s.cause.Load()), s.bytes(), false
	lasted := time.Since(r.began) - s.started
	if s.closing != nil {
		cut = s.closing.end()
	} else {
		s.permit.giveBack()
	}
	r.remember(s.namespace, s.backend)
	r.remove(s, n)
	r.ended[cause].Add(1)
	r.durations[cause].observe(lasted)
	if cut {
		r.cut[cause].Add(1)
	}
	r.log.Info("session ended", "namespace", s.namespace,
		"backend", r.backendName(s.backend), "cause", cause.String(), "cut", cut,
		"client", s.clientAddrs, "seconds", lasted.Seconds(),
		"bytes_to_backend", n[clientSide], "bytes_to_client", n[backendSide])
	s.isOver.Store(true)
	r.onBackendDone()
	r.freeDescriptors(descriptorsPerSession)
	r.openSessions.Done()
}

// add adds s to the open sessions.
func (r *relay) add(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.index = int32(len(r.sessions))
	r.sessions = append(r.sessions, s)
	count := r.byBackend[s.backend]
	count.open++
	count.total++
	r.byBackend[s.backend] = count
	r.countOnOldPod(s, r.isOnOldPod(s))
}

// remove removes s, which has carried n bytes from each side, from the open sessions.
// The last one in the slice takes its index.
func (r *relay) remove(s *session, n [2]int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.countOnOldPod(s, false)
	last := len(r.sessions) - 1
	r.sessions[s.index], r.sessions[last].index = r.sessions[last], s.index
	r.sessions[last] = nil
	r.sessions = r.sessions[:last]
	count := r.byBackend[s.backend]
	count.open--
	r.byBackend[s.backend] = count
	r.endedBytes[clientSide] += n[clientSide]
	r.endedBytes[backendSide] += n[backendSide]
}

// setPods stores the uids of the backends' present pods, by ordinal, and reports
// whether one of these backends had another pod before. A backend that is not in pods
// keeps its uid. Sessions with a replaced pod count as onOldPod until they are over or that
// pod has ended them: meanwhile their namespaces must not get a session with the new pod.
// If setPods returns true, the caller wakes the mover, which closes these sessions.
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
	r.podUIDs.Store(&now) // from now on add uses it
	r.mu.Unlock()
	if !changed {
		return false
	}
	for _, s := range r.filter(func(s *session) bool { return s.podUID != "" }) {
		r.recountOnOldPod(s)
	}
	return true
}

// isOnOldPod reports whether another pod has replaced the session's pod, and the old
// one still has the session. It takes no lock.
func (r *relay) isOnOldPod(s *session) bool {
	return r.isOldPod(s.backend, s.podUID) && !s.backendDone.Load()
}

// isOldPod reports whether another pod has replaced the backend's pod with this uid. It
// takes no lock.
func (r *relay) isOldPod(backend int, podUID string) bool {
	pods := r.podUIDs.Load()
	if podUID == "" || pods == nil {
		return false
	}
	now := (*pods)[backend]
	return now != "" && now != podUID
}

// recountOnOldPod counts s again as onOldPod or not, unless it is over.
func (r *relay) recountOnOldPod(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(s.index) < len(r.sessions) && r.sessions[s.index] == s {
		r.countOnOldPod(s, r.isOnOldPod(s))
	}
}

// countOnOldPod counts s as onOldPod or not. The caller holds mu.
func (r *relay) countOnOldPod(s *session, onOldPod bool) {
	if s.onOldPod == onOldPod {
		return
	}
	s.onOldPod = onOldPod
	old, delta := r.oldPods[s.namespace], 1
	if old == nil {
		old = &oldPodSessions{done: make(chan struct{})}
		r.oldPods[s.namespace] = old
	}
	if !onOldPod {
		delta = -1
	}
	count := r.byBackend[s.backend]
	count.onOldPod += delta
	r.byBackend[s.backend] = count
	if old.sessions += delta; old.sessions == 0 {
		delete(r.oldPods, s.namespace)
		close(old.done)
	}
}

// backendFailed notes that a call on the backend's socket of s has returned err: nothing more
// can be seen of the backend. If it was lost, it may go on to serve the namespace: then
// onAbandoned comes before setBackendDone, so that steps wait for the one or the other. The
// engine calls it with the lock that guards the sockets.
func (r *relay) backendFailed(s *session, err error) {
	if isLost(err) && r.waitsForEnd(s) {
		r.onAbandoned(s, nil)
	}
	r.setBackendDone(s)
}

// setBackendDone notes that s itself is no reason any more to wait for its backend: the
// backend's stream has ended, its connection has failed, or the relay has reset it or given it to
// onAbandoned. The engine calls it, with or without its own locks.
func (r *relay) setBackendDone(s *session) {
	r.remember(s.namespace, s.backend)
	if s.backendDone.Swap(true) {
		return
	}
	if s.podUID != "" {
		r.recountOnOldPod(s)
	}
	r.onBackendDone()
}

// shouldAbandon is called when the backend has not answered the Close frame of s in its time,
// and may go on to serve the namespace. It reports whether the caller has to call
// abandonBackend. Otherwise the caller resets the connection. A session that moves is counted
// then: the clients of its namespace are held, and wait no longer. After any other session
// nobody is held yet, and a step that comes later has to wait for the backend.
func (r *relay) shouldAbandon(s *session) bool {
	switch {
	case s.backendDone.Load(): // it has failed, and backendFailed has seen to the rest
		return false
	case cause(s.cause.Load()) == causeMoved:
		r.unproven.Add(1)
		return false
	}
	return r.waitsForEnd(s)
}

// waitsForEnd reports whether the router waits, after the end of s, until the backend ends
// its stream too: it may not have read yet all that the client has sent. The router does
// not wait for a backend that has sent a Close frame in the closing handshake.
func (r *relay) waitsForEnd(s *session) bool {
	answered := s.closing != nil && s.scanners[backendSide].closed()
	return r.onAbandoned != nil && !answered && !s.backendDone.Load()
}

// abandonBackend gives the backend's socket, of a session for which waitsForEnd is true,
// to onAbandoned, which closes it. abandonBackend closes the file, which may be nil.
func (r *relay) abandonBackend(s *session, socket *os.File) {
	var conn net.Conn // nil if there is no descriptor for it
	if socket != nil {
		conn, _ = net.FileConn(socket)
		socket.Close()
	}
	r.onAbandoned(s, conn)
}

// oldPodSessionsDone returns nil if the namespace has no session with a replaced pod.
// Otherwise it returns a channel that is closed when the last of them is over.
func (r *relay) oldPodSessionsDone(namespace string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.oldPods[namespace]; old != nil {
		return old.done
	}
	return nil
}

// isDead reports whether nothing more can reach either side: in each direction the
// sender has ended its stream, or a write to the receiver has failed. The caller
// holds the session's lock.
func (w *sessionIO) isDead() bool {
	return (w.fin[clientSide] || w.writeFailed[backendSide]) &&
		(w.fin[backendSide] || w.writeFailed[clientSide])
}

// needsNoCloseNotify reports whether the client's TLS stream is whole if it ends without
// close_notify: it has sent a Close frame, or the backend has ended its stream, so nobody reads
// what may be missing. Or a send has failed: then the client is gone, and that send has taken
// the error of its socket. The caller holds the session's lock.
func (w *sessionIO) needsNoCloseNotify() bool {
	return w.scanners[clientSide].closed() || w.fin[backendSide] || w.writeFailed[clientSide]
}

// setCause sets the cause, unless it was set before. It reports whether it did.
func (s *session) setCause(cause cause) bool {
	return s.cause.CompareAndSwap(int32(causeNone), int32(cause))
}

// isEnding reports whether the session has a cause: it ends or has ended.
func (s *session) isEnding() bool { return cause(s.cause.Load()) != causeNone }

// isOverForSteps reports whether no step waits for this session: backendDone is set, or the
// session is over. If its backend may still serve the namespace after that, there is a flight,
// and steps wait for the flight.
func (s *session) isOverForSteps() bool { return s.backendDone.Load() || s.isOver.Load() }

// filter returns the sessions for which match returns true, of those that are open at
// one moment of the call. It calls match without the relay's lock, so sessions may
// start and end meanwhile: the result may contain sessions that have ended.
func (r *relay) filter(match func(*session) bool) []*session {
	all, _ := r.snapshot()
	return slices.DeleteFunc(all, func(s *session) bool { return !match(s) })
}

// snapshot returns the open sessions, and the bytes of those that have ended, at one
// moment. It holds the lock while it copies 8 bytes for each session. Nobody may hold
// it longer, because sessions start and end on the goroutines that carry all others.
// The caller owns the slice.
func (r *relay) snapshot() (open []*session, ended [2]int64) {
	for {
		room := r.size() + snapshotRoom // memory is allocated and cleared without the lock
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

// snapshotRoom is how many sessions may start while snapshot allocates memory. If more
// do, it begins again.
const snapshotRoom = 256

// size returns the number of open sessions.
func (r *relay) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions)
}

// countOf returns the number of open sessions of the namespace.
func (r *relay) countOf(namespace string) int {
	return len(r.filter(func(s *session) bool { return s.namespace == namespace }))
}

// counts returns the counts of all backends that ever had a session, by ordinal.
func (r *relay) counts() map[int]sessionCounts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.byBackend)
}

// bytes returns how many bytes all sessions have carried, open or ended, by the side
// from which the bytes came. A session that ends meanwhile counts once, as open.
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
func (r *relay) writeSessionMetrics(m metricsWriter, counts map[int]sessionCounts, backends []int) {
	if len(backends) > 0 {
		open := m.family("router_sessions", "gauge", "Open sessions.")
		for _, ordinal := range backends {
			open(float64(counts[ordinal].open), "backend", r.backendName(ordinal))
		}
		opened := m.family("router_sessions_opened_total", "counter", "Sessions that were opened.")
		for _, ordinal := range backends {
			opened(float64(counts[ordinal].total), "backend", r.backendName(ordinal))
		}
	}
	ended := m.family("router_sessions_ended_total", "counter", "Sessions that ended, by cause.")
	for c := causeNone + 1; c < numCauses; c++ {
		ended(float64(r.ended[c].Load()), "cause", c.String())
	}
	cut := m.family("router_sessions_cut_total", "counter",
		"Sessions in which client and backend did not both answer their Close frames in time, by cause.")
	for _, c := range []cause{causeMoved, causeMaxAge, causeDrain} {
		cut(float64(r.cut[c].Load()), "cause", c.String())
	}
	const name = "router_session_duration_seconds"
	m.family(name, "histogram", "How long the sessions that have ended lasted, by cause.")
	for c := causeNone + 1; c < numCauses; c++ {
		r.durations[c].writeSamples(m, name, "cause", c.String())
	}
}

// writeByteMetrics writes how many bytes were carried.
func (r *relay) writeByteMetrics(m metricsWriter) {
	bytes := r.bytes()
	sample := m.family("router_bytes_total", "counter",
		"Bytes passed on after the handshakes, by direction.")
	sample(float64(bytes[clientSide]), "direction", "to_backend")
	sample(float64(bytes[backendSide]), "direction", "to_client")
}

// wait returns when all sessions have ended.
func (r *relay) wait() { r.openSessions.Wait() }

// closeGracefully starts a closing handshake, which ends the session within the
// relay's closeTimeout. It returns false, and does nothing, if the session ends or
// has ended already. cause is causeMoved, causeMaxAge or causeDrain. onEnd, if not nil, is
// called once when the session is over, from any goroutine; it must not block.
//
// closeGracefully may be called from any goroutine, once the engine knows s.
func (s *session) closeGracefully(cause cause, onEnd func(cut bool)) bool {
	s.lock()
	defer s.unlock()
	if !s.setCause(cause) {
		return false
	}
	s.closing = newClosingHandshake(cause, onEnd)
	s.permit.giveBack() // its client may be back at once
	s.startClose()
	return true
}

// newClosingHandshake returns a closing handshake with the Close frames for cause,
// causeMoved, causeMaxAge or causeDrain. onEnd, if not nil, is called once when the session
// is over; it must not block.
func newClosingHandshake(cause cause, onEnd func(cut bool)) *closingHandshake {
	toBackend := closeFrame(closeGoingAway, "going away", true)
	toClient := closeFrame(closeGoingAway, "going away", false)
	if cause != causeDrain {
		toClient = closeFrame(closeServiceRestart, "service restart", false)
	}
	return &closingHandshake{closeFrames: [2][]byte{toBackend, toClient}, onEnd: onEnd}
}

// idleChecks is how many times endIdle checks a session in the time that it may be
// idle.
const idleChecks = 8

// endIdle ends the sessions that carried no byte for timeout, until ctx ends. It is
// late by up to a quarter of timeout: by one check, and by one more because two
// checks may come too close to each other. So sessions need no timer of their own,
// and the relay does nothing for each byte.
func (r *relay) endIdle(ctx context.Context, timeout time.Duration) {
	ticker := time.NewTicker(timeout / idleChecks)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, s := range r.filter((*session).checkIdle) {
				s.end(causeIdle)
			}
		}
	}
}

// checkIdle checks the session once. It reports whether the last checks, enough for
// the timeout, have found no change.
func (s *session) checkIdle() bool {
	n := s.bytes()
	if sum := n[clientSide] + n[backendSide]; sum != s.lastBytes {
		s.lastBytes, s.idleCount = sum, 0
		return false
	}
	s.idleCount++
	return s.idleCount > idleChecks && !s.isEnding() // a closing handshake has its own time
}
