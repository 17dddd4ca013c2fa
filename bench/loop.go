package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"
)

const (
	// stall is how long nothing may come while something is awaited.
	stall = 30 * time.Second
	// readSize is the least room for one read, in bytes.
	readSize = 64 << 10

	// batch is how many events a loop takes at once, before the other end of the
	// load has its turn.
	batch = 64

	edge = 1 << 31 // EPOLLET, which package syscall has as a negative number
	// maskIn is edge-triggered: else epoll looks at each connection once more to
	// find that all was read.
	maskIn  = uint32(syscall.EPOLLIN | syscall.EPOLLRDHUP | edge)
	maskOut = uint32(syscall.EPOLLOUT)
	// maskEnd is told once: then a connection is read to its end.
	maskEnd = uint32(syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR)
)

// loop is an epoll(7) loop, without a goroutine per connection. Clients and
// backends have one each and share a thread, which steps the clients' loop and with
// it the backends': two programs that take turns cost more, and it is the proxy that
// should be at its limit.
//
// It does not sleep while something is awaited. A receiver that sleeps would have
// to be woken by the proxy's send, an interrupt to another CPU that costs the
// proxy time which packets for other machines do not cost, and which is great and
// unsteady in virtual machines.
type loop struct {
	epoll     int
	events    []syscall.EpollEvent
	conns     []*conn // by descriptor; nil: none
	buf       []byte  // what was read last
	records   []byte  // of TLS that were read last; nil if there were none yet
	holdReads bool    // a connection that does not take its output is not read
	failure   error   // of a listener
	began     time.Time
	heard     time.Duration // when the last event was, on the loop's clock
	waited    time.Duration // for events, by the loop that steps with this one
	other     *loop         // of the other end, which steps with this one; or nil
}

func newLoop(other *loop) (*loop, error) {
	epoll, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &loop{epoll: epoll, events: make([]syscall.EpollEvent, batch), buf: make([]byte, 4*readSize), began: time.Now(), other: other}, nil
}

// now is the loop's monotonic clock.
func (l *loop) now() time.Duration { return time.Since(l.began) }

// close closes the loop and all its connections, of which no end is told.
func (l *loop) close() {
	for _, c := range l.conns {
		if c != nil {
			c.close()
		}
	}
	syscall.Close(l.epoll)
}

// step handles the events of both ends that are there; if there are none it waits
// for the first, limit at most.
func (l *loop) step(limit time.Duration) {
	begun := l.now()
	for now, last := begun, begun; ; last = now {
		events := l.handle()
		if l.other != nil {
			events += l.other.handle()
		}
		now = l.now()
		if events > 0 {
			l.heard = now
			return
		}
		if l.other != nil {
			l.other.waited += now - last
		}
		if now-begun >= limit {
			return
		}
		syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) // the proxy may have the same CPU
	}
}

// handle handles a batch of the events that are there, and returns how many.
func (l *loop) handle() int {
	events := rawPoll(l.epoll, l.events)
	for _, event := range events {
		c := l.conns[event.Fd]
		if c == nil { // closed by an event before this one
			continue
		}
		if c.accept != nil {
			if err := c.accept(); err != nil {
				l.failure = err
			}
			continue
		}
		if event.Events&maskOut != 0 {
			c.flush()
		}
		for more := event.Events&^maskOut != 0; more && l.conns[event.Fd] == c; more = event.Events&maskEnd != 0 {
			c.read()
		}
	}
	return len(events)
}

// run steps for the time d.
func (l *loop) run(d time.Duration) {
	for end := l.now() + d; l.now() < end; {
		l.step(end - l.now())
	}
}

// pacer is a kind of operation that starts at a rate.
type pacer struct {
	rate   int                           // per second
	jitter *rand.Rand                    // nil: at even intervals; else anywhere in each
	start  func(due time.Duration) error // starts one; errBusy if no connection is free
}

var errBusy = errors.New("all connections are busy")

// maxLate is how late an operation may start. It is an error if the rate is not reached so.
const maxLate = 10 * time.Second

// pace starts operations of all kinds when they are due, for the time d. One for which
// no connection is free starts as soon as there is one.
func (l *loop) pace(d time.Duration, kinds ...pacer) error {
	begun := l.now()
	sent, due := make([]int, len(kinds)), make([]time.Duration, len(kinds))
	for {
		next, kind := d, -1
		for i, at := range due {
			if at < next {
				next, kind = at, i
			}
		}
		if wait := begun + next - l.now(); wait > 0 {
			l.step(wait)
			continue
		}
		if kind < 0 {
			return nil
		}
		k := &kinds[kind]
		switch err := k.start(begun + next); {
		case err == errBusy && l.now()-begun-next < maxLate:
			l.step(time.Millisecond)
			continue
		case err != nil:
			return fmt.Errorf("%d per second not reached: %w", k.rate, err)
		}
		sent[kind]++
		due[kind] = k.due(sent[kind])
	}
}

// due is when the operation i is due, from the start.
func (k *pacer) due(i int) time.Duration {
	due := time.Duration(i) * time.Second / time.Duration(k.rate)
	if k.jitter != nil {
		due += time.Duration(k.jitter.Int64N(int64(time.Second) / int64(k.rate)))
	}
	return due
}

// until steps until done; nothing may come for the time stall at most.
func (l *loop) until(done func() bool) error {
	for l.heard = l.now(); !done(); l.step(100 * time.Millisecond) {
		if l.other != nil && l.other.failure != nil {
			err := l.other.failure
			l.other.failure = nil // the next measurement begins afresh
			return err
		}
		if l.now()-l.heard > stall {
			return fmt.Errorf("nothing came for %s", stall)
		}
	}
	return nil
}

// end is who uses a connection of a loop.
type end interface {
	// received gets all that came and was not used yet, valid until it
	// returns, and says how many bytes of it are used now.
	received(p []byte) (used int)
	// drained is called when the output was taken.
	drained()
	// lost is called once when the connection has failed or was closed by the
	// peer, after which it is closed; not after close.
	lost(why string)
}

// conn is one end of a connection, owned by the loop that it was added to.
type conn struct {
	loop     *loop
	end      end
	accept   func() error // of a listener, when there are connections to accept
	security *security    // TLS; nil: none
	fd       int          // -1 when closed
	mask     uint32       // what epoll watches
	in       []byte       // received and not used yet
	out      []byte       // sent and not taken yet
	more     bool         // drained will send more as soon as it is taken
}

// add makes c the connection of descriptor fd, which is the loop's from now on.
func (l *loop) add(c *conn, fd int, e end) error {
	c.loop, c.end, c.fd, c.mask = l, e, fd, maskIn
	for fd >= len(l.conns) {
		l.conns = append(l.conns, make([]*conn, 1024)...)
	}
	l.conns[fd] = c
	err := syscall.EpollCtl(l.epoll, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: c.mask, Fd: int32(fd)})
	if err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

func (c *conn) open() bool { return c.fd >= 0 }

func (c *conn) close() {
	if c.open() {
		c.loop.conns[c.fd] = nil
		if c.security != nil {
			c.security.goodbye(c.fd)
		}
		syscall.Close(c.fd)
		c.fd, c.in, c.out = -1, nil, nil
	}
}

func (c *conn) fail(why string) {
	c.close()
	c.end.lost(why)
}

// read reads once, behind what was not used yet.
func (c *conn) read() {
	if c.security != nil {
		c.decrypt()
		return
	}
	l, held := c.loop, len(c.in)
	copy(l.room(held+readSize), c.in)
	n, errno := rawRead(c.fd, l.buf[held:])
	if !c.came(n, errno) {
		return
	}
	if held+n == len(l.buf) {
		c.modify() // epoll has to look again
	}
	c.deliver(l.buf[:held+n])
}

// room returns buf with n bytes at least, and what it has already.
func (l *loop) room(n int) []byte {
	if n > len(l.buf) {
		buf := make([]byte, 2*n)
		copy(buf, l.buf)
		l.buf = buf
	}
	return l.buf
}

// came reports whether a read of n bytes has brought some. c fails if none will come.
func (c *conn) came(n int, errno syscall.Errno) bool {
	switch {
	case errno == syscall.EAGAIN:
		return false
	case errno != 0:
		c.fail("read: " + errno.Error())
		return false
	case n == 0:
		c.fail("closed by the peer")
		return false
	}
	return true
}

// deliver gives the end p, and keeps what it does not use.
func (c *conn) deliver(p []byte) {
	rest := p[c.end.received(p):]
	if !c.open() {
		return
	}
	if c.in = append(c.in[:0], rest...); len(rest) == 0 {
		c.in = nil
	}
}

// write returns how many bytes of p were taken, or -1 when c has failed.
func (c *conn) write(p []byte) int {
	if len(p) == 0 {
		return 0
	}
	n, errno := rawWrite(c.fd, p)
	switch errno {
	case 0:
		return n
	case syscall.EAGAIN, syscall.EINTR:
		return 0
	}
	c.fail("write: " + errno.Error())
	return -1
}

// send writes p, and keeps a copy of what is not taken.
func (c *conn) send(p []byte) {
	if c.security != nil {
		c.encrypt(p)
		return
	}
	c.transmit(p)
}

// transmit writes p as it is.
func (c *conn) transmit(p []byte) {
	if len(c.out) == 0 {
		n := c.write(p)
		if n < 0 {
			return
		}
		p = p[n:]
	}
	c.out = append(c.out, p...)
	c.watch()
}

// flush writes what send kept.
func (c *conn) flush() {
	n := c.write(c.out)
	if n < 0 {
		return
	}
	if c.out = c.out[n:]; len(c.out) > 0 {
		return
	}
	c.out = nil
	if c.end.drained(); c.open() {
		c.watch()
	}
}

// watch tells epoll what c waits for now.
func (c *conn) watch() {
	mask := maskIn
	if len(c.out) > 0 || c.more {
		mask = mask&^edge | maskOut
		if c.loop.holdReads {
			mask = maskOut
		}
	}
	if mask != c.mask {
		c.mask = mask
		c.modify()
	}
}

// modify makes epoll look at c with its mask, also if that is no other one.
func (c *conn) modify() {
	syscall.EpollCtl(c.loop.epoll, syscall.EPOLL_CTL_MOD, c.fd, &syscall.EpollEvent{Events: c.mask, Fd: int32(c.fd)})
}
