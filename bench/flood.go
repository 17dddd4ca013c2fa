package main

import (
	"crypto/tls"
	"errors"
	"io"
	"slices"
	"time"
)

const (
	floodSessions = 5000 // of the scenarios flood, at most
	floodMessages = 2000 // per second on all these
	floodRate     = 1000 // connections per second that begin a handshake and do not go on
	helloRate     = 100  // the same of those that send all of their ClientHello
	floodOpen     = 1000 // of them at a time, at most: a new one takes the place of the oldest
)

// flood is sessions with few messages, in every other turn beside connections that begin a
// TLS handshake and do not go on.
type flood struct {
	*echo
	ports   []int
	rate    int
	hello   func(number int) []byte // what a connection sends
	stalled []*stalledConn          // the oldest first
	begun   int                     // such connections so far
	calm    bool                    // this turn has none
	quiet   []time.Duration         // latencies in the turns without them
	beside  []time.Duration         // and in those with them
}

// stalledConn has begun a handshake.
type stalledConn struct{ conn }

func (s *stalledConn) received(p []byte) int { return len(p) }
func (s *stalledConn) drained()              {}
func (s *stalledConn) lost(string)           {} // the proxy may end it

// openFloodOfBeginnings opens a flood of connections that send nothing, or half a
// ClientHello: the proxy has nothing to compute for them.
func openFloodOfBeginnings(t *target) (load, error) {
	return openStalled(t, floodRate, func(hello []byte, number int) []byte { return hello[:number%2*len(hello)/2] })
}

// openFloodOfHellos opens a flood of connections that send a whole ClientHello: the proxy
// exchanges keys and signs for each of them.
func openFloodOfHellos(t *target) (load, error) {
	return openStalled(t, helloRate, func(hello []byte, _ int) []byte { return hello })
}

func openStalled(t *target, rate int, part func(hello []byte, number int) []byte) (load, error) {
	hello, err := clientHello(t.tls)
	if err != nil {
		return nil, err
	}
	e, err := openEcho(t, t.beside, 64)
	if err != nil {
		return nil, err
	}
	e.run(3 * t.settle) // some proxies give back the memory of so many handshakes
	return &flood{echo: e, ports: t.ports, rate: rate, hello: func(number int) []byte { return part(hello, number) }}, nil
}

// clientHello is what a client sends first.
func clientHello(config *tls.Config) ([]byte, error) {
	s := &security{wait: func(struct{}) bool { return false }} // reads nothing
	err := tls.Client(transport{s}, config).Handshake()
	if len(s.written) == 0 {
		return nil, errors.Join(err, io.ErrUnexpectedEOF)
	}
	return slices.Clone(s.written), nil
}

// stall begins a handshake, in the place of the oldest if there are many.
func (f *flood) stall(time.Duration) error {
	if len(f.stalled) == floodOpen {
		f.stalled[0].close()
		f.stalled = f.stalled[1:]
	}
	fd, err := connect(f.ports[f.begun%len(f.ports)], f.begun)
	if err != nil {
		return err
	}
	s := new(stalledConn)
	if err := f.add(&s.conn, fd, s); err != nil {
		return err
	}
	s.send(f.hello(f.begun))
	f.begun++
	f.stalled = append(f.stalled, s)
	return f.failure
}

// send sends messages, with the flood if it was calm the last time.
func (f *flood) send(d time.Duration) error {
	f.calm = !f.calm
	var others []pacer
	if !f.calm {
		others = append(others, pacer{rate: f.rate, start: f.stall})
	}
	f.latencies = f.latencies[:0]
	err := f.pace(d, floodMessages, others...)
	if f.calm {
		f.quiet = append(f.quiet, f.latencies...)
	} else {
		f.beside = append(f.beside, f.latencies...)
	}
	return err
}

func (f *flood) count() { f.quiet, f.beside = nil, nil }

// values are of the turns with the flood, but for quiet_p99_ms, and flood_p99, which is what
// the one is of the other.
func (f *flood) values(used use) (values, error) {
	quiet, err := used.operations(f.quiet)
	if err != nil {
		return nil, err
	}
	v, err := used.operations(f.beside)
	if err != nil {
		return nil, err
	}
	delete(v, "cpu_us") // which is of both
	delete(v, "busy_us")
	delete(v, "per_s")
	v["quiet_p99_ms"], v["flood_p99"] = quiet["p99_ms"], v["p99_ms"]/quiet["p99_ms"]
	v["sessions"], v["stalled"] = float64(len(f.sessions)), float64(f.begun)
	return v, nil
}
