package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	busySessions = 500  // of the echo scenarios
	pacedRate    = 4000 // messages per second of all sessions
	warmUp       = time.Second
)

// echo sends messages and compares what comes back byte by byte. Each message
// begins with the numbers of its session and of itself there.
type echo struct {
	*client
	sessions []*session
	mask     [4]byte
	plain    []byte                        // the payload of the message that was sent or compared last
	frame    []byte                        // the frame that was sent last
	after    func(*session, time.Duration) // what follows a message that came back, and when it did
	waiting  int                           // messages under way

	latencies []time.Duration // of those that came back
}

// openEcho opens n sessions for messages of size bytes.
func openEcho(t *target, n, size int) (*echo, error) {
	c, err := newClient(t, names("ns-", 256))
	if err != nil {
		return nil, err
	}
	return c.openEcho(n, size)
}

// openEcho opens n sessions for messages of size bytes. If it fails, it closes the client.
func (c *client) openEcho(n, size int) (*echo, error) {
	e := &echo{client: c, mask: [4]byte{0x37, 0xfa, 0x21, 0x3d}, plain: pattern(size)}
	if err := c.openAll(n, e); err != nil {
		c.close()
		return nil, err
	}
	return e, nil
}

func (e *echo) opened(s *session) { e.sessions = append(e.sessions, s) }

// label makes a payload the last one, of those sent, of the session or connection with the number.
func label(payload []byte, sent int64, number int) {
	var label [8]byte
	binary.LittleEndian.PutUint64(label[:], uint64(sent)<<20|uint64(number))
	copy(payload, label[:])
}

// ping sends the next message of s, whose latency counts from the time at.
func (e *echo) ping(s *session, at time.Duration) {
	s.sent++
	s.busy, s.begun = true, at
	e.waiting++
	label(e.plain, s.sent, s.number)
	e.frame = appendFrame(e.frame[:0], frameBinary, e.plain, &e.mask)
	s.send(e.frame)
}

func (e *echo) message(s *session, f *frame) {
	label(e.plain, s.sent, s.number)
	if f.first != frameBinary || !s.busy || !bytes.Equal(f.payload, e.plain) {
		s.fail(fmt.Sprintf("wrong echo of message %d, of %d bytes", s.sent, len(e.plain)))
		return
	}
	s.busy = false
	e.waiting--
	now := e.now()
	e.latencies = append(e.latencies, now-s.begun)
	e.after(s, now)
}

// verify sends one message on each session, some at a time, and waits for them.
func (e *echo) verify() error {
	next := 0
	e.after = func(*session, time.Duration) {}
	err := e.until(func() bool {
		for next < len(e.sessions) && e.waiting < width && e.failure == nil {
			e.ping(e.sessions[next], e.now())
			next++
		}
		return e.waiting == 0 || e.failure != nil
	})
	return errors.Join(err, e.failure)
}

// settle waits for what is under way.
func (e *echo) settle() error {
	e.after = func(*session, time.Duration) {}
	err := e.until(func() bool { return e.waiting == 0 || e.failure != nil })
	return errors.Join(err, e.failure)
}

// flood lets each session send when its message is back, for the time d.
func (e *echo) flood(d time.Duration) error {
	e.after = e.ping
	for _, s := range e.sessions {
		if s.open() {
			e.ping(s, e.now())
		}
	}
	e.run(d)
	return e.settle()
}

// pace sends messages at even intervals for the time d, on whatever sessions have none
// under way, and meanwhile the operations of others. Latency counts from when a message
// was due.
func (e *echo) pace(d time.Duration, rate int, others ...pacer) error {
	free := slices.Clone(e.sessions)
	e.after = func(s *session, _ time.Duration) { free = append(free, s) }
	messages := pacer{rate: rate, start: func(due time.Duration) error {
		if len(free) == 0 {
			return cmp.Or(e.failure, errBusy)
		}
		e.ping(free[0], due)
		free = free[1:]
		return e.failure
	}}
	if err := e.loop.pace(d, append(others, messages)...); err != nil {
		return err
	}
	return e.settle()
}

func (e *echo) count() { e.latencies = make([]time.Duration, 0, 1<<20) }

// flooding and pacing are the loads.
type (
	flooding struct{ *echo }
	pacing   struct{ *echo }
)

func openFlood(t *target, size int) (load, error) {
	e, err := openEcho(t, busySessions, size)
	return flooding{e}, err
}

func openPace(t *target, size int) (load, error) {
	e, err := openEcho(t, busySessions, size)
	return pacing{e}, err
}

func (f flooding) send(d time.Duration) error      { return f.flood(d) }
func (f flooding) values(used use) (values, error) { return used.operations(f.latencies) }

func (p pacing) send(d time.Duration) error { return p.pace(d, pacedRate) }

func (p pacing) values(used use) (values, error) {
	v, err := used.operations(p.latencies)
	delete(v, "busy_us") // a CPU that is mostly idle escapes the kernel's sampling by ticks
	return v, err
}
