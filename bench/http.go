package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

const (
	plainConns   = 64       // kept-alive connections of the load
	postSize     = 16 << 10 // bytes of the bodies of http16k
	plainHeaders = " HTTP/1.1\r\nHost: " + hostName + "\r\nConnection: keep-alive\r\nAccept: */*\r\n" + browser

	mixedSockets  = 5000 // sessions of the scenario mixed, at most
	mixedMessages = 2000 // per second on all these
	mixedRequests = 2000 // per second beside them
)

// plain sends requests that are no upgrades over kept-alive connections, and compares
// each answer byte by byte with that of the backend which has the sessions of its
// namespace. The requests of a connection have several namespaces in turn.
type plain struct {
	*loop
	ports      []int
	namespaces []string
	backend    []int // of each namespace
	conns      []*plainConn
	body       []byte                          // of the request that was sent or compared last; empty: GET
	request    []byte                          // the last
	want       []byte                          // the body of the last answer
	after      func(*plainConn, time.Duration) // what follows an answer, and when it came
	waiting    int                             // requests under way
	reopened   int                             // connections, after the proxy has closed them
	failure    error                           // of the first connection that failed

	latencies []time.Duration // of the answers
}

// plainConn is the client's end of a kept-alive connection.
type plainConn struct {
	conn
	plain  *plain
	number int           // from 0
	sent   int64         // requests so far
	busy   bool          // a request is under way
	begun  time.Duration // when it was sent or due
}

// openPlain opens n connections in loop, for requests in namespaces with bodies of size
// bytes; before, sessions that show which backend has which namespace. The i-th namespace
// has to be opened at the i-th port of t, modulo their number: so the number of ports
// divides n, and n the number of namespaces.
func openPlain(t *target, l *loop, namespaces []string, n, size int) (*plain, error) {
	backend, err := checkRouting(t, namespaces)
	if err != nil {
		return nil, err
	}
	h := &plain{loop: l, ports: t.ports, namespaces: namespaces, backend: backend, body: pattern(size)}
	for number := range n {
		c, err := h.open(&plainConn{plain: h, number: number})
		if err != nil {
			return nil, err
		}
		h.conns = append(h.conns, c)
	}
	return h, nil
}

// open connects c.
func (h *plain) open(c *plainConn) (*plainConn, error) {
	fd, err := connect(h.ports[c.number%len(h.ports)], c.number)
	if err == nil {
		err = h.add(&c.conn, fd, c)
	}
	return c, err
}

// reopen connects again in the place of c, which the proxy closes after an answer, or has
// closed since. No event of the connection before can be taken for one of the new.
func (c *plainConn) reopen() *plainConn {
	h := c.plain
	c.close()
	next, err := h.open(&plainConn{plain: h, number: c.number, sent: c.sent})
	if err != nil {
		h.failure = cmp.Or(h.failure, err)
	}
	h.reopened++
	h.conns[c.number] = next
	return next
}

// namespace is the number of the last request's.
func (c *plainConn) namespace() int {
	h := c.plain
	return (c.number + int(c.sent)*len(h.conns)) % len(h.namespaces)
}

// query is what only the last request of c has.
func (c *plainConn) query(buf []byte) []byte {
	buf = strconv.AppendInt(append(buf, "n="...), int64(c.number), 10)
	return strconv.AppendInt(append(buf, '.'), c.sent, 10)
}

// ask sends the next request of c, whose latency counts from the time at.
func (h *plain) ask(c *plainConn, at time.Duration) {
	if !c.open() {
		c = c.reopen()
	}
	c.sent++
	c.busy, c.begun = true, at
	h.waiting++
	label(h.body, c.sent, c.number)
	method := "GET /ws/"
	if len(h.body) > 0 {
		method = "POST /ws/"
	}
	b := append(append(h.request[:0], method...), h.namespaces[c.namespace()]...)
	b = append(c.query(append(b, '?')), plainHeaders...)
	if len(h.body) > 0 {
		b = append(b, "Content-Type: application/octet-stream\r\nContent-Length: "...)
		b = append(strconv.AppendInt(b, int64(len(h.body)), 10), "\r\n"...)
	}
	h.request = append(append(b, "\r\n"...), h.body...)
	c.send(h.request)
}

// received reads the answer, which has the length of its body in its head.
func (c *plainConn) received(p []byte) (used int) {
	head, rest, whole := bytes.Cut(p, []byte("\r\n\r\n"))
	if !whole && len(p) <= maxHead {
		return 0
	}
	line, headers, _ := bytes.Cut(head, []byte("\r\n"))
	if !c.busy || !whole || !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
		c.wrong(fmt.Sprintf("answer %q", line[:min(len(line), 40)]))
		return 0
	}
	size, err := bodySize(headers)
	switch {
	case err != nil || size == 0:
		c.wrong("an answer without the length of its body")
		return 0
	case len(rest) < size:
		return 0
	case len(rest) > size:
		c.wrong("more than an answer")
		return 0
	}
	if !c.plain.check(c, rest) {
		return 0
	}
	h, now := c.plain, c.plain.now()
	c.busy = false
	h.waiting--
	h.latencies = append(h.latencies, now-c.begun)
	if bytes.EqualFold(header(headers, "Connection"), []byte("close")) {
		c = c.reopen()
	}
	h.after(c, now)
	return len(p)
}

// check compares the body of an answer with the one that must come.
func (h *plain) check(c *plainConn, body []byte) bool {
	ns := c.namespace()
	label(h.body, c.sent, c.number)
	backend := -1
	if len(body) > len(greetingServer) {
		backend = int(body[len(greetingServer)]) - '0'
	}
	var query [32]byte
	h.want = appendAnswerBody(h.want[:0], backend, []byte(h.namespaces[ns]), c.query(query[:0]), h.body)
	if !bytes.Equal(body, h.want) {
		c.wrong(fmt.Sprintf("wrong answer to request %d: %q", c.sent, body[:min(len(body), 100)]))
		return false
	}
	if backend != h.backend[ns] {
		c.wrong(fmt.Sprintf("answer of backend-%d, sessions of %s with backend-%d", backend, h.namespaces[ns], h.backend[ns]))
		return false
	}
	return true
}

func (c *plainConn) drained() {}

// lost fails the load, but for a connection that nobody has used for some time.
func (c *plainConn) lost(why string) {
	if c.busy {
		c.wrong(why)
	}
}

// wrong closes c and fails the load.
func (c *plainConn) wrong(why string) {
	c.close()
	if c.plain.failure == nil {
		c.plain.failure = fmt.Errorf("plain request %d of connection %d: %s", c.sent, c.number, why)
	}
}

// exchange sends so many requests on each connection, one after the other, and waits for
// their answers.
func (h *plain) exchange(times int64) error {
	more := func(c *plainConn, now time.Duration) {
		if c.sent%times != 0 {
			h.ask(c, now)
		}
	}
	h.after = more
	for _, c := range slices.Clone(h.conns) {
		h.ask(c, h.now())
	}
	return h.settle(more)
}

// settle waits for what is under way, and does after with each answer.
func (h *plain) settle(after func(*plainConn, time.Duration)) error {
	h.after = after
	err := h.until(func() bool { return h.waiting == 0 || h.failure != nil })
	return errors.Join(err, h.failure)
}

func (h *plain) count() { h.latencies, h.reopened = make([]time.Duration, 0, 1<<20), 0 }

// asking is the load of http and http16k: each connection asks when its answer is there.
type asking struct{ *plain }

func openHTTP(t *target, size int) (load, error) {
	l, err := newLoop(t.backends.loop)
	if err != nil {
		return nil, err
	}
	h, err := openPlain(t, l, names("ns-", 256), plainConns, size)
	if err != nil {
		l.close()
	}
	return asking{h}, err
}

func (a asking) send(d time.Duration) error {
	a.after = a.ask
	for _, c := range slices.Clone(a.conns) {
		a.ask(c, a.now())
	}
	a.run(d)
	return a.settle(func(*plainConn, time.Duration) {})
}

func (a asking) values(used use) (values, error) {
	v, err := used.operations(a.latencies)
	if err == nil && a.reopened > 0 {
		v["reopened"] = float64(a.reopened) / float64(len(a.latencies))
	}
	return v, err
}

// mixed is the load of that name: sessions with few messages beside plain requests.
type mixed struct {
	*echo
	plain  *plain
	jitter *rand.Rand
}

// openMixed opens the connections, and then the sessions in the same loop: the sessions
// that openPlain opens would need more files than are left after them.
func openMixed(t *target) (load, error) {
	c, err := newClient(t, names("ns-", 256))
	if err != nil {
		return nil, err
	}
	h, err := openPlain(t, c.loop, c.namespaces, plainConns, 0)
	if err == nil {
		err = h.exchange(1) // connections without a request would be closed meanwhile
	}
	if err != nil {
		c.close()
		return nil, err
	}
	e, err := c.openEcho(t.beside, 64)
	if err != nil {
		return nil, err
	}
	return &mixed{echo: e, plain: h, jitter: rand.New(rand.NewPCG(0, 0))}, nil
}

// send sends both when they are due: the messages at even intervals, and the requests
// not, since each would always meet a message then, or never.
func (m *mixed) send(d time.Duration) error {
	h, free := m.plain, slices.Clone(m.plain.conns)
	done := func(c *plainConn, _ time.Duration) { free = append(free, c) }
	h.after = done
	requests := pacer{rate: mixedRequests, jitter: m.jitter, start: func(due time.Duration) error {
		if len(free) == 0 {
			return cmp.Or(h.failure, errBusy)
		}
		h.ask(free[0], due)
		free = free[1:]
		return h.failure
	}}
	err := m.pace(d, mixedMessages, requests)
	return errors.Join(err, h.settle(done))
}

func (m *mixed) count() {
	m.echo.count()
	m.plain.count()
}

// values are of the messages; those of the requests are named so.
func (m *mixed) values(used use) (values, error) {
	v, err := used.operations(m.plain.latencies)
	if err != nil {
		return nil, err
	}
	requests := v
	if v, err = used.operations(m.latencies); err != nil {
		return nil, err
	}
	for _, name := range []string{"per_s", "p50_ms", "p99_ms"} {
		v["http_"+name] = requests[name]
	}
	delete(v, "cpu_us") // which is of both
	delete(v, "busy_us")
	v["sessions"] = float64(len(m.sessions))
	return v, nil
}
