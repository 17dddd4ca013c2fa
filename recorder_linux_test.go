package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// record is what a backend notes of one upgrade: it is open from the moment that the
// backend has read the request until it refuses it, answers a Close frame, or finds the
// end of the connection. What the backend sends at the end, it sends after that.
type record struct {
	namespace string
	backend   int
	router    string // X-Router-Pod
	step      int64  // X-Router-Step; 0 without
	start     time.Duration
	end       time.Duration // 0 while it is open
	switched  bool          // the backend has sent its 101
	conn      *net.TCPConn
}

// recorder has the records of all backends, in the order of their starts. All times are
// since it began, by one monotonic clock.
type recorder struct {
	began time.Time

	// A session that the router has reset counts as over from then on, though its backend
	// does not know yet: only for backends that never answer a Close frame, since a reset
	// proves nothing.
	resetEnds bool

	// Guarded by mu.
	mu      sync.Mutex
	records []*record
	opened  map[string][]*record // those that are open, by namespace
	events  []string             // what else happened, for the trace
}

func newRecorder() *recorder {
	return &recorder{began: time.Now(), opened: map[string][]*record{}}
}

func (r *recorder) now() time.Duration { return time.Since(r.began) }

// note adds an event to the trace.
func (r *recorder) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	event := fmt.Sprintf(format, args...)
	r.events = append(r.events, fmt.Sprintf("%9.3f %s", r.now().Seconds(), event))
}

// begin opens a record of the backend for a request with this head.
func (r *recorder) begin(backend int, head string, conn *net.TCPConn) *record {
	request, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head)))
	if err != nil {
		return nil
	}
	s := &record{backend: backend, conn: conn, router: request.Header.Get("X-Router-Pod")}
	s.namespace = strings.TrimPrefix(request.URL.Path, "/ws/")
	s.step, _ = strconv.ParseInt(request.Header.Get("X-Router-Step"), 10, 64)
	r.mu.Lock()
	defer r.mu.Unlock()
	s.start = r.now()
	for _, other := range slices.Clone(r.opened[s.namespace]) {
		if r.resetEnds && other.switched && wasReset(other.conn) {
			r.close(other, s.start)
		}
	}
	r.records = append(r.records, s)
	r.opened[s.namespace] = append(r.opened[s.namespace], s)
	return s
}

// switching notes that the backend is about to send its 101.
func (r *recorder) switching(s *record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.switched = true
}

// finish closes the record, if it is still open.
func (r *recorder) finish(s *record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.close(s, r.now())
}

// close is finish at a time. The caller holds mu.
func (r *recorder) close(s *record, at time.Duration) {
	if s.end != 0 {
		return
	}
	s.end = at
	all := r.opened[s.namespace]
	r.opened[s.namespace] = slices.DeleteFunc(all, func(o *record) bool { return o == s })
}

// wasReset reports whether the connection is in the state CLOSED (RFC 9293 §3.3.2): the
// peer has reset it, whatever is still to be read.
func wasReset(conn *net.TCPConn) bool {
	const closed = 7 // TCP_CLOSE, in the first byte of struct tcp_info (tcp(7))
	state := 0
	raw, err := conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			state, _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		})
	}
	return err != nil || state&0xff == closed
}

// owners returns the backends that each namespace is open on.
func (r *recorder) owners() map[string][]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	owners := map[string][]int{}
	for namespace, all := range r.opened {
		for _, s := range all {
			owners[namespace] = append(owners[namespace], s.backend)
		}
		slices.Sort(owners[namespace])
		owners[namespace] = slices.Compact(owners[namespace])
	}
	return owners
}

// isOpen reports whether the namespace has a record on the backend that is open.
func (r *recorder) isOpen(namespace string, backend int) bool {
	return slices.Contains(r.owners()[namespace], backend)
}

// byNamespace returns copies of all records. Those that are open end now.
func (r *recorder) byNamespace() map[string][]record {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string][]record{}
	for _, s := range r.records {
		s := *s
		s.end = cmp.Or(s.end, r.now())
		all[s.namespace] = append(all[s.namespace], s)
	}
	return all
}

// twoOwners is two(ns) of all namespaces: for how long each was open on two or more
// backends at once. Namespaces that never were are not in it.
func (r *recorder) twoOwners() map[string]time.Duration {
	two := map[string]time.Duration{}
	for namespace, records := range r.byNamespace() {
		if d := overlap(records); d > 0 {
			two[namespace] = d
		}
	}
	return two
}

// overlap returns for how long records of two or more backends were open at once.
func overlap(records []record) (sum time.Duration) {
	type change struct {
		at      time.Duration
		backend int
		by      int
	}
	var changes []change
	for _, s := range records {
		changes = append(changes, change{s.start, s.backend, 1}, change{s.end, s.backend, -1})
	}
	slices.SortFunc(changes, func(a, b change) int { // ends first
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.by, b.by))
	})
	open, owners, last := map[int]int{}, 0, time.Duration(0)
	for _, c := range changes {
		if owners > 1 {
			sum += c.at - last
		}
		before := open[c.backend]
		open[c.backend] += c.by
		owners += min(1, open[c.backend]) - min(1, before)
		last = c.at
	}
	return sum
}

// trace returns all records of the namespace, and what else happened.
func (r *recorder) trace(namespace string) string {
	var lines []string
	for _, s := range r.byNamespace()[namespace] {
		lines = append(lines, fmt.Sprintf("%9.3f to %9.3f backend-%d %s step=%d switched=%t",
			s.start.Seconds(), s.end.Seconds(), s.backend, s.router, s.step, s.switched))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	lines = append(lines, r.events...)
	slices.Sort(lines)
	return namespace + ":\n" + strings.Join(lines, "\n")
}

// wantOneOwner fails the test if a namespace ever was open on two backends at once, or if
// a backend got a step that is not above that of the owner before it.
func (r *recorder) wantOneOwner(t *testing.T) {
	t.Helper()
	two := r.twoOwners()
	for i, namespace := range byLength(two) {
		if i < 2 {
			t.Errorf("%s has two owners for %v; %s", namespace, two[namespace], r.trace(namespace))
		}
	}
	if len(two) > 0 {
		t.Errorf("%d namespaces have two owners", len(two))
	}
	for namespace, records := range r.byNamespace() {
		if !stepsRise(records) {
			t.Errorf("another owner without a higher step; %s", r.trace(namespace))
			return
		}
	}
}

// stepsRise reports whether each record with another backend than that before it has a
// higher step, where routers send steps.
func stepsRise(records []record) bool {
	for i, s := range records[min(1, len(records)):] {
		before := records[i]
		if s.backend != before.backend && s.step != 0 && s.step <= before.step {
			return false
		}
	}
	return true
}

// byLength returns the keys, that of the greatest value first.
func byLength(of map[string]time.Duration) []string {
	keys := []string{}
	for key := range of {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Compare(of[b], of[a]) })
	return keys
}

// spread describes durations: how many, the median, the 99th percentile, the longest.
func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	all = slices.Sorted(slices.Values(all))
	at := func(share float64) time.Duration {
		return all[int(share*float64(len(all)-1))].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("%d: p50 %v, p99 %v, longest %v", len(all), at(.5), at(.99), at(1))
}

// recordingBackend is a WebSocket server that echoes, and records all upgrades.
type recordingBackend struct {
	*recorder
	ordinal int
	addr    string

	closeDelay   func() time.Duration        // how long it takes to answer a Close frame
	ignoresClose bool                        // it never does
	answer       func(namespace string) bool // waits until it may send its 101; false: it ends
	stall        func()                      // waits before it reads the first frame

	// Guarded by mu.
	mu        sync.Mutex
	listens   int                      // how many pods it has had
	listener  net.Listener             // nil if it does not listen
	accepting chan struct{}            // closed if it accepts what is in its backlog
	conns     map[*net.TCPConn]*record // the record may be nil

	running sync.WaitGroup
}

// newRecordingBackend returns the backend with the ordinal, at 127.0.0.ordinal+1. It does
// not listen yet.
func newRecordingBackend(r *recorder, ordinal int, port string) *recordingBackend {
	b := &recordingBackend{recorder: r, ordinal: ordinal, conns: map[*net.TCPConn]*record{}}
	b.addr = fmt.Sprintf("127.0.0.%d:%s", ordinal+1, port)
	b.closeDelay = func() time.Duration { return rand.N(20 * time.Millisecond) }
	b.accepting = make(chan struct{})
	close(b.accepting)
	return b
}

// listen begins to serve.
func (b *recordingBackend) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.listener = l
	b.listens++
	b.running.Go(func() {
		for {
			<-b.mayAccept()
			conn, err := l.Accept()
			if err != nil {
				return
			}
			<-b.mayAccept()
			b.running.Go(func() { b.serve(conn.(*net.TCPConn)) })
		}
	})
}

// hold leaves new connections and what they bring in the kernel, until resume.
func (b *recordingBackend) hold() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.accepting = make(chan struct{})
}

// resume ends hold.
func (b *recordingBackend) resume() {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.accepting:
	default:
		close(b.accepting)
	}
}

// mayAccept returns what is closed if the backend accepts.
func (b *recordingBackend) mayAccept() chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.accepting
}

// die ends the backend at once, as SIGKILL does: nobody gets an answer.
func (b *recordingBackend) die() {
	b.resume()
	b.mu.Lock()
	l, conns := b.listener, b.conns
	b.listener, b.conns = nil, map[*net.TCPConn]*record{}
	b.mu.Unlock()
	if l != nil {
		l.Close()
	}
	for conn, s := range conns {
		if s != nil {
			b.finish(s)
		}
		conn.Close()
	}
	b.running.Wait()
}

// serve serves a connection until its end.
func (b *recordingBackend) serve(conn *net.TCPConn) {
	defer conn.Close()
	if !b.keep(conn, nil) {
		return
	}
	defer b.forget(conn)
	br := bufio.NewReaderSize(conn, 1<<10)
	for again := true; again; {
		head, err := readHead(br)
		if err != nil {
			return // a probe, or a client that gave up
		}
		s := b.begin(b.ordinal, head, conn)
		switch {
		case s == nil:
			return
		case strings.Contains(head, "\r\nUpgrade: "):
			b.serveSession(conn, br, s)
			return
		}
		again = b.servePlain(conn, br, s, strings.Contains(head, "?stream "))
	}
}

// servePlain answers a plain request, which it works on until just before the end of its
// answer. With stream, the answer has no end: it works until the connection has one. It
// reports whether another request may follow.
func (b *recordingBackend) servePlain(
	conn *net.TCPConn, br *bufio.Reader, s *record, stream bool,
) bool {
	defer b.finish(s)
	if !b.keep(conn, s) {
		return false
	}
	if !stream {
		time.Sleep(b.closeDelay())
		b.finish(s)
		_, err := io.WriteString(conn, kept)
		return err == nil
	}
	gone := make(chan struct{})
	b.running.Go(func() {
		io.Copy(io.Discard, br)
		close(gone)
	})
	text := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	for {
		io.WriteString(conn, text)
		select {
		case <-gone:
			time.Sleep(b.closeDelay())
			return false
		case <-time.After(10 * time.Millisecond):
			text = "2\r\nhi\r\n"
		}
	}
}

// serveSession answers an upgrade and serves its session until its end.
func (b *recordingBackend) serveSession(conn *net.TCPConn, br *bufio.Reader, s *record) {
	defer b.finish(s) // before the connection is closed
	if !b.keep(conn, s) || b.answer != nil && !b.answer(s.namespace) {
		return
	}
	b.switching(s)
	io.WriteString(conn, switching)
	if b.stall != nil {
		b.stall()
	}
	buf := make([]byte, maxControlPayload)
	for {
		first, payload, err := nextFrame(br, true, buf)
		switch {
		case err != nil:
			return
		case first&0xf != opcodeClose:
			conn.Write(frameBytes(first, false, uint64(len(payload)), payload))
		case !b.ignoresClose:
			time.Sleep(b.closeDelay())
			b.finish(s)
			conn.Write(frameBytes(first, false, uint64(len(payload)), payload))
			conn.CloseWrite() // the server is the first (RFC 6455 §7.1.1)
			io.Copy(io.Discard, br)
			return
		}
	}
}

// keep notes the record of a connection, so that die closes both. It reports false if the
// backend has died.
func (b *recordingBackend) keep(conn *net.TCPConn, s *record) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, found := b.conns[conn]; b.listener == nil || s != nil && !found {
		return false
	}
	b.conns[conn] = s
	return true
}

func (b *recordingBackend) forget(conn *net.TCPConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, conn)
}

// crowdPatience bounds the waits of a client: above the -hold of the routers.
const crowdPatience = 90 * time.Second

// crowd are clients of routers, until stop.
type crowd struct {
	*recorder
	routers func() []string // addresses; each connection takes any of them
	every   time.Duration   // between two messages of a client that stays
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	connected atomic.Int64 // of the clients that stay, those that have a session
	answers   atomic.Int64 // of plain requests: see ask

	// Guarded by mu.
	mu       sync.Mutex
	holds    []time.Duration // of clients that stay: from a Close frame to the next 101
	lost     []time.Duration // the same from the end of a session without a Close frame
	arrivals []time.Duration // of clients that come: from the dial to the 101
	closes   map[string]int  // Close frames to clients that stay, by namespace
	echoes   map[string]int  // to clients that stay, by namespace
	failures []string        // upgrades without a 101, and echoes that were wrong
	turned   int             // upgrades without a 101, by a router that clients no longer take
}

func newCrowd(r *recorder, routers func() []string) *crowd {
	c := &crowd{recorder: r, routers: routers, every: time.Second,
		closes: map[string]int{}, echoes: map[string]int{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// stop ends all clients and waits for them.
func (c *crowd) stop() {
	c.cancel()
	c.running.Wait()
}

// fail notes a failure, unless the clients are to stop.
func (c *crowd) fail(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() == nil {
		failure := fmt.Sprintf(format, args...)
		c.failures = append(c.failures, fmt.Sprintf("%9.3f %s", c.now().Seconds(), failure))
	}
}

// routerError is an error of a router at this address.
type routerError struct {
	router string
	error
}

// failToOpen notes that an upgrade got no 101. A router that stops answers those that it
// holds with 503, and takes no new ones: this is no failure if the client took the router
// when others did, and they do not any more.
func (c *crowd) failToOpen(what string, err error) {
	var at routerError
	if !errors.As(err, &at) || slices.Contains(c.routers(), at.router) {
		c.fail("%s: %v", what, err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turned++
}

// crowdConn is a client's connection.
type crowdConn struct {
	*net.TCPConn
	br        *bufio.Reader
	namespace string
	router    string      // its address
	forget    func() bool // of the crowd's context
}

func (k *crowdConn) Close() error {
	k.forget()
	return k.TCPConn.Close()
}

// errNoRouter is why a client gets no session while no router is ready.
var errNoRouter = errors.New("no router is ready")

// request sends an upgrade, by the fast path or in a way that needs net/http (bothWays).
// The connection is closed when the crowd stops. Errors are routerErrors, and errNoRouter.
func (c *crowd) request(namespace, way string) (*crowdConn, error) {
	addrs := c.routers()
	if len(addrs) == 0 {
		return nil, errNoRouter
	}
	addr := addrs[rand.IntN(len(addrs))]
	conn, err := (&net.Dialer{Timeout: patience}).Dial("tcp", addr)
	if err != nil {
		return nil, routerError{addr, err}
	}
	k := &crowdConn{TCPConn: conn.(*net.TCPConn), namespace: namespace, router: addr}
	k.br = bufio.NewReaderSize(conn, 512)
	k.forget = context.AfterFunc(c.ctx, func() { conn.Close() })
	if _, err = io.WriteString(conn, bothWays("/ws/" + namespace)[way]); err != nil {
		err = routerError{addr, err}
	}
	return k, err
}

// anyWay returns a way of bothWays: one of eight clients needs net/http.
func anyWay() string {
	if rand.IntN(8) == 0 {
		return "net/http"
	}
	return "simple"
}

// open opens a session. The caller closes the connection.
func (c *crowd) open(namespace string) (*crowdConn, error) {
	k, err := c.request(namespace, anyWay())
	if err == nil {
		err = k.switched()
	}
	if err != nil && k != nil {
		k.Close()
	}
	return k, err
}

// switched reads the 101. Its errors are routerErrors.
func (k *crowdConn) switched() error {
	k.SetReadDeadline(time.Now().Add(crowdPatience))
	resp, err := http.ReadResponse(k.br, nil)
	if err != nil {
		return routerError{k.router, err}
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(resp.Body)
		return routerError{k.router, fmt.Errorf("%s %q", resp.Status, body)}
	}
	return nil
}

// stay has a client of the namespace that connects again whenever its session ends, at
// once.
func (c *crowd) stay(namespace string) {
	c.running.Go(func() {
		var ended time.Duration
		var waits *[]time.Duration // where to add the wait for the next 101
		for c.ctx.Err() == nil {
			k, err := c.open(namespace)
			if err != nil {
				c.failToOpen(namespace, err)
				c.pause(50 * time.Millisecond)
				continue
			}
			c.connected.Add(1)
			if waits != nil {
				c.mu.Lock()
				*waits = append(*waits, c.now()-ended)
				c.mu.Unlock()
			}
			waits = &c.lost
			if c.talk(k) {
				waits = &c.holds
			}
			ended = c.now()
			c.connected.Add(-1)
			k.Close()
		}
	})
}

// ask has a client that sends plain requests of the namespace, one after the other, until
// the crowd stops. It counts the answers that came to their end, and of streams, whose
// query is ?stream, those that began.
func (c *crowd) ask(namespace, query string) {
	c.running.Go(func() {
		for c.ctx.Err() == nil {
			if err := c.askOnce(namespace, query); err != nil {
				c.fail("%s%s: %v", namespace, query, err)
			}
			c.pause(rand.N(5 * time.Millisecond))
		}
	})
}

// requestMoveTime is -http-move-timeout where a crowd asks.
const requestMoveTime = 100 * time.Millisecond

// askOnce sends a plain request. Its answer may be cut if a move had time to do so.
func (c *crowd) askOnce(namespace, query string) error {
	began := time.Now()
	addrs := c.routers()
	conn, err := net.Dial("tcp", addrs[rand.IntN(len(addrs))])
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { conn.Close() })()
	io.WriteString(conn, plainRequest("/ws/"+namespace+query))
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
	mayBeCut := time.Since(began) >= requestMoveTime
	if errors.Is(err, io.ErrUnexpectedEOF) && mayBeCut {
		return nil
	}
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusServiceUnavailable {
		return nil // it was cut before its answer
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if err == nil || query != "" || time.Since(began) >= requestMoveTime {
		c.answers.Add(1)
		return nil
	}
	return err
}

// pause waits, unless the crowd stops.
func (c *crowd) pause(d time.Duration) { sleep(c.ctx, d) }

// talk sends messages, of which it must get the echo, until the session ends. It answers a
// Close frame, and reports whether there was one.
func (c *crowd) talk(k *crowdConn) (closed bool) {
	for n := uint64(1); ; n++ {
		next := time.Now().Add(c.every)
		message := binary.BigEndian.AppendUint64(nil, n)
		k.Write(frameBytes(0x82, true, 8, message)) // an error shows when it reads
		first, payload, err := k.frame(crowdPatience)
		if err == nil && first&0xf != opcodeClose && slices.Equal(payload, message) {
			c.count(c.echoes, k.namespace)
			first, payload, err = k.frame(time.Until(next))
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
		}
		if err == nil && first&0xf == opcodeClose {
			c.count(c.closes, k.namespace)
			k.Write(frameBytes(first, true, 0, nil))
			return true
		}
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			c.fail("%s: no echo of message %d: % x, %v", k.namespace, n, payload, err)
		}
		return false
	}
}

// frame reads a frame, which has to begin within that time.
func (k *crowdConn) frame(within time.Duration) (first byte, payload []byte, err error) {
	k.SetReadDeadline(time.Now().Add(within))
	if _, err := k.br.Peek(1); err != nil {
		return 0, nil, err
	}
	k.SetReadDeadline(time.Now().Add(patience))
	return nextFrame(k.br, false, nil)
}

func (c *crowd) count(in map[string]int, namespace string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	in[namespace]++
}

// closed returns how many Close frames clients of the namespace that stay have got.
func (c *crowd) closed(namespace string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closes[namespace]
}

// waitEchoes waits until the clients of each namespace that stay have got so many more
// echoes.
func (c *crowd) waitEchoes(t *testing.T, namespaces []string, more int) {
	t.Helper()
	echoes := func() map[string]int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return maps.Clone(c.echoes)
	}
	before := echoes()
	eventually(t, "echoes", true, func() bool {
		now := echoes()
		return !slices.ContainsFunc(namespaces, func(namespace string) bool {
			return now[namespace] < before[namespace]+more
		})
	})
}

// come has new clients of any of the namespaces all the time, so many a second. Each
// leaves within a second: by a Close frame, a FIN or an RST, some before their 101.
func (c *crowd) come(rate float64, namespaces []string) {
	c.running.Go(func() {
		for next := time.Now(); ; {
			next = next.Add(time.Duration(rand.ExpFloat64() / rate * float64(time.Second)))
			if c.pause(time.Until(next)); c.ctx.Err() != nil {
				return
			}
			namespace := namespaces[rand.IntN(len(namespaces))]
			c.running.Go(func() { c.visit(namespace) })
		}
	})
}

// visit has a client that stays for less than a second.
func (c *crowd) visit(namespace string) {
	begun := c.now()
	k, err := c.request(namespace, anyWay())
	if k != nil {
		defer k.Close()
	}
	if err == nil && rand.IntN(8) == 0 { // it does not wait for its 101
		c.pause(rand.N(5 * time.Millisecond))
		if rand.IntN(2) == 0 {
			reset(k.TCPConn)
		}
		return
	}
	if err == nil {
		err = k.switched()
	}
	if err != nil {
		c.failToOpen(namespace+": a new client", err)
		return
	}
	c.mu.Lock()
	c.arrivals = append(c.arrivals, c.now()-begun)
	c.mu.Unlock()
	_, _, err = k.frame(rand.N(time.Second))
	switch {
	case err == nil || rand.IntN(3) == 0: // a Close frame, of either side
		k.Write(frameBytes(0x88, true, 0, nil))
		k.SetReadDeadline(time.Now().Add(patience))
		io.Copy(io.Discard, k.br)
	case rand.IntN(2) == 0:
		reset(k.TCPConn)
	}
}

// wantNoFailures fails the test if a client got no 101, or a wrong echo, or if a session
// of one that stays ended without a Close frame.
func (c *crowd) wantNoFailures(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.failures) > 0 {
		first := c.failures[:min(5, len(c.failures))]
		t.Errorf("%d failures:\n%s", len(c.failures), strings.Join(first, "\n"))
	}
	if len(c.lost) > 0 {
		t.Errorf("%d sessions ended without a Close frame", len(c.lost))
	}
}

// figures describes what the clients had to wait for.
func (c *crowd) figures() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprintf("\n  from a Close frame to the next 101 %s\n"+
		"  from an end without one to the next 101 %s\n  new clients %s\n"+
		"  %d turned away by a router that stops",
		spread(c.holds), spread(c.lost), spread(c.arrivals), c.turned)
}
