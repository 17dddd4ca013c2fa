package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// flight is a request, from just before it is sent until it is over: its backend has
// refused it, has answered it to the end, or has ended its side of the connection, the
// relay has the session, or the request was not sent. A flight may also be a session that
// the router no longer carries to its backend, until the backend has ended its side. Until it
// is over the backend may serve the namespace.
type flight struct {
	flights   *flights
	namespace string
	backend   int    // ordinal
	podUID    string // of the backend's pod, "" if not known

	// Of a plain request only.
	began time.Time
	cut   func() // makes it end soon; must not block; nil for an upgrade or an ended session
	isCut bool   // cut was called; guarded by flights.mu

	// Of an abandoned flight. Guarded by flights.mu.
	cancelWait func() // ends the wait for its end; must not block; nil before
	podGone    bool   // cancelWait was called, as its pod is gone
}

// flights are all that are not over. A step of a hand-off is not done while one of its
// namespaces has a flight with another backend than the next owner, unless that backend's pod was
// replaced.
type flights struct {
	// Static after construction.
	proofTimeout   time.Duration     // how long the router waits for the end of an abandoned flight; 0: for ever
	onEnd          func()            // called when a flight is over; must not block
	remember       rememberNamespace // called just before a flight is over
	addDescriptors func(count int)   // called for descriptors of abandoned flights
	backendName    func(backend int) string
	log            *slog.Logger
	lifetime       context.Context // ends when nobody waits for the end of flights any more
	cancel         context.CancelFunc

	unproven atomic.Int64 // abandoned flights whose end was not seen

	mu        sync.Mutex
	all       map[*flight]struct{} // guarded by mu
	abandoned sync.WaitGroup       // the goroutines of abandoned flights
}

// newFlights returns flights without an entry. The caller calls stop.
func newFlights(name func(backend int) string, log *slog.Logger) *flights {
	f := &flights{
		onEnd: func() {}, remember: func(string, int) {}, addDescriptors: func(int) {}, backendName: name, log: log,
		all: map[*flight]struct{}{},
	}
	f.lifetime, f.cancel = context.WithCancel(context.Background())
	return f
}

// stop ends the wait for all abandoned flights.
func (fs *flights) stop() {
	fs.cancel()
	fs.abandoned.Wait()
}

// add adds a flight: of a plain request if cut is not nil. The caller ends or abandons it.
func (fs *flights) add(namespace string, backend int, podUID string, cut func()) *flight {
	f := &flight{flights: fs, namespace: namespace, backend: backend, podUID: podUID, cut: cut}
	if cut != nil {
		f.began = time.Now()
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.all[f] = struct{}{}
	return f
}

// any reports whether match returns true for one of the flights. match runs with mu held.
func (fs *flights) any(match func(*flight) bool) bool {
	for f := range fs.each {
		if match(f) {
			return true
		}
	}
	return false
}

// cutOverdue cuts the plain requests that are due, each once. due returns when a request has
// to be cut, zero for never. It runs with mu held, as does flight.cut. cutOverdue returns when
// the next one has to be cut, zero if there is none.
func (fs *flights) cutOverdue(now time.Time, due func(*flight) time.Time) (next time.Time) {
	for f := range fs.each {
		if f.cut == nil || f.isCut {
			continue
		}
		switch at := due(f); {
		case at.IsZero():
		case at.After(now):
			next = earliest(next, at)
		default:
			f.isCut = true
			f.cut()
		}
	}
	return next
}

// endWaits ends the wait for the abandoned flights whose pod is gone. isGone runs with mu held.
func (fs *flights) endWaits(isGone func(*flight) bool) {
	for f := range fs.each {
		if f.cancelWait != nil && !f.podGone && isGone(f) {
			f.podGone = true
			f.cancelWait()
		}
	}
}

// each is an iter.Seq of the flights. The loop over it runs with mu held, and must not block.
func (fs *flights) each(yield func(*flight) bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range fs.all {
		if !yield(f) {
			return
		}
	}
}

// end ends the flight: it is over. It is called once, from any goroutine without flights.mu.
// The mover then looks at its step again.
func (f *flight) end() {
	all := f.flights
	all.remember(f.namespace, f.backend)
	all.mu.Lock()
	delete(all.all, f)
	all.mu.Unlock()
	all.onEnd()
}

// abandon abandons the flight: nobody needs the answer any more. But the backend may have the
// request, or read it later, even after a reset, so the flight stays. abandon sends a FIN, waits
// until the backend has ended its side too, at most for proofTimeout, and then ends the
// flight and calls onEnd. It does so in a goroutine of its own: it does not block. It takes
// over conn and closes it. conn is nil if it was lost (isLost), or if there was no descriptor
// for it: then the flight lasts for all of proofTimeout, or until the pod is gone: see
// mover.cutRequests.
func (f *flight) abandon(conn net.Conn, onEnd func()) {
	all, began := f.flights, time.Now()
	ctx, cancel := all.waitContext()
	all.mu.Lock()
	f.cancelWait = cancel
	all.mu.Unlock()
	if conn == nil { // without a goroutine: with a node all its connections may be lost
		all.abandoned.Add(1)
		context.AfterFunc(ctx, func() {
			defer all.abandoned.Done()
			defer onEnd()
			defer f.end()
			cancel()
			f.countUnproven(began)
		})
		return
	}
	all.addDescriptors(1)
	all.abandoned.Go(func() {
		defer all.addDescriptors(-1)
		defer onEnd()
		defer f.end()
		defer cancel()
		if !awaitEnd(ctx, conn) {
			f.countUnproven(began)
		}
	})
}

// waitContext returns the context of the wait for the end of one flight. The caller calls
// cancel.
func (fs *flights) waitContext() (ctx context.Context, cancel context.CancelFunc) {
	if fs.proofTimeout > 0 {
		return context.WithTimeout(fs.lifetime, fs.proofTimeout)
	}
	return context.WithCancel(fs.lifetime)
}

// countUnproven counts and logs that the end of the flight was not seen, unless its pod is gone.
// The wait has begun at began.
func (f *flight) countUnproven(began time.Time) {
	all := f.flights
	all.mu.Lock()
	isGone := f.podGone
	all.mu.Unlock()
	if isGone {
		return
	}
	all.unproven.Add(1)
	if all.lifetime.Err() != nil { // the router stops
		return
	}
	all.log.Warn("gave up waiting for a backend to end",
		"namespace", f.namespace, "backend", all.backendName(f.backend),
		"seconds", time.Since(began).Seconds())
}

// awaitEnd closes conn after its peer has ended its side, or when ctx ends. It reports whether
// the peer has ended its side.
func awaitEnd(ctx context.Context, conn net.Conn) bool {
	defer conn.Close()
	if conn, ok := conn.(interface{ CloseWrite() error }); ok {
		conn.CloseWrite()
	}
	for ctx.Err() == nil {
		conn.SetDeadline(time.Time{})
		stop := context.AfterFunc(ctx, func() { conn.SetDeadline(pastDeadline()) })
		err := discard(conn)
		stop()
		switch {
		case errors.Is(err, io.EOF) || isReset(err):
			return true
		case errors.Is(err, os.ErrDeadlineExceeded): // the deadline of ctx, or one that the caller has set
		default: // the connection has failed, and the backend may go on
			<-ctx.Done()
		}
	}
	return false
}

// discard reads until the end of conn, or an error. It takes little memory, as many
// clients may leave at once.
func discard(conn net.Conn) error {
	for b := make([]byte, 512); ; {
		if _, err := conn.Read(b); err != nil {
			return err
		}
	}
}
