package main

import (
	"bufio"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// seedFlag repeats a random test.
var seedFlag = flag.Uint64("seed", 0, "seed of the random tests of the relay; 0 for another each time")

// randomSeed returns the seed of a test, which is in its log.
func randomSeed(t testing.TB) uint64 {
	t.Helper()
	seed := *seedFlag
	for seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", seed)
	return seed
}

// logUniform returns 0 to most, as often below 100 as from 100 to 10,000.
func logUniform(rng *rand.Rand, most int) int {
	return int(math.Exp2(rng.Float64()*math.Log2(float64(most)+1))) - 1
}

// noiseSize is prime: what is lost, repeated or in another's place, a multiple of
// some power of two as a rule, does not look like what should be there.
const noiseSize = 1<<20 - 3

// newNoise returns what the flows of a test are cut from.
func newNoise(seed uint64) []byte {
	noise := make([]byte, noiseSize)
	rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed))).Read(noise)
	return noise
}

// flow is the bytes of one direction, the same ones for the same seed: arbitrary
// bytes, or what looks like WebSocket frames (RFC 6455 §5.2) to who looks.
type flow struct {
	rng    *rand.Rand
	noise  []byte
	at     int    // in noise, of the next byte
	left   int    // bytes until the end
	mask   byte   // 0x80 if the frames are masked
	whole  bool   // it ends where a frame ends
	header []byte // of the frame, what is left of it
	frame  int    // bytes left of the frame's payload
}

func newFlow(noise []byte, seed uint64, size int, from side, framed bool) *flow {
	rng := rand.New(rand.NewPCG(seed, uint64(from)))
	f := &flow{rng: rng, noise: noise, at: rng.IntN(len(noise)), left: size, frame: math.MaxInt}
	if framed {
		f.mask, f.whole, f.frame = []byte{0x80, 0}[from], rng.IntN(2) == 0, 0
	}
	return f
}

// Read fills b, unless the flow ends.
func (f *flow) Read(b []byte) (n int, err error) {
	for n < len(b) && f.left > 0 {
		if len(f.header) == 0 && f.frame == 0 {
			f.begin()
		}
		part := b[n:min(len(b), n+f.left)]
		took := copy(part, f.header)
		f.header = f.header[took:]
		if took == 0 {
			took = copy(part[:min(len(part), f.frame)], f.noise[f.at:])
			f.at = (f.at + took) % len(f.noise)
			f.frame -= took
		}
		n, f.left = n+took, f.left-took
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// begin makes the next frame: most are tiny, some are of a size that a relay may
// treat in one way or another, some have 16 MiB.
func (f *flow) begin() {
	switch n := f.rng.IntN(60); {
	case n == 0:
		f.frame = 16 << 20
	case n < 15:
		f.frame = logUniform(f.rng, 16<<20)
	case n < 30:
		f.frame = f.rng.IntN(200_000)
	default:
		f.frame = f.rng.IntN(126)
	}
	small := 2 + int(f.mask)/0x80*4 // the header of the last frame
	switch last := f.left - small; {
	case f.whole && last < 126:
		f.frame = max(0, last)
	case f.whole:
		f.frame = min(f.frame, last-14) // the longest header
	}
	f.header = []byte{0x81 + byte(f.rng.IntN(2)), f.mask}
	switch {
	case f.frame < 126:
		f.header[1] |= byte(f.frame)
	case f.frame < 1<<16:
		f.header[1] |= 126
		f.header = binary.BigEndian.AppendUint16(f.header, uint16(f.frame))
	default:
		f.header[1] |= 127
		f.header = binary.BigEndian.AppendUint64(f.header, uint64(f.frame))
	}
	if f.mask != 0 {
		f.header = binary.BigEndian.AppendUint32(f.header, f.rng.Uint32())
	}
}

// first returns the flow's first bytes, up to most.
func (f *flow) first(most int) []byte {
	b := make([]byte, most)
	n, _ := f.Read(b) // or all there is
	return b[:n]
}

// flowPiece is the most that is written or read at once, in bytes.
const flowPiece = 128 << 10

// halfConn is what TCP and Unix sockets have in common.
type halfConn interface {
	net.Conn
	CloseWrite() error
}

// send writes the flow in pieces of random sizes, and ends its half at once.
func (f *flow) send(conn halfConn, rng *rand.Rand) error {
	for buf := make([]byte, flowPiece); f.left > 0; dawdle(rng) {
		n, _ := f.Read(buf[:1+logUniform(rng, len(buf)-1)])
		if _, err := conn.Write(buf[:n]); err != nil {
			return fmt.Errorf("write with %d bytes to come: %w", f.left, err)
		}
	}
	return conn.CloseWrite()
}

// check reads in pieces of random sizes until EOF, and names the first byte that
// is not the flow's.
func (f *flow) check(r io.Reader, rng *rand.Rand) error {
	got, want := make([]byte, flowPiece), make([]byte, flowPiece)
	for at := 0; ; dawdle(rng) {
		n, err := r.Read(got[:1+logUniform(rng, len(got)-1)])
		m, _ := f.Read(want[:n])
		if same := equalBytes(got[:n], want[:m]); same < n {
			return fmt.Errorf("byte %d and on: % x, want % x and %d more", at+same,
				got[same:min(n, same+16)], want[same:min(m, same+16)], f.left)
		}
		at += n
		switch {
		case err == io.EOF && f.left == 0:
			return nil
		case err != nil:
			return fmt.Errorf("%w at byte %d of %d", err, at, at+f.left)
		}
	}
}

// equalBytes returns how many bytes at the start of a and b are the same.
func equalBytes(a, b []byte) int {
	if string(a) == string(b) {
		return len(a)
	}
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// dawdle pauses now and then.
func dawdle(rng *rand.Rand) {
	if rng.IntN(50) == 0 {
		time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
	}
}

// flowEnd is one end of a session.
type flowEnd struct {
	name    string
	seed    uint64
	out, in *flow
	early   []byte // the first of out, which is sent otherwise
}

// run sends and checks at the same time. r reads from conn, and may have read
// ahead.
func (e flowEnd) run(t *testing.T, conn halfConn, r io.Reader) {
	conn.SetDeadline(time.Now().Add(6 * patience))
	var both sync.WaitGroup
	both.Go(func() {
		if err := e.out.send(conn, rand.New(rand.NewPCG(e.seed, 2))); err != nil {
			t.Errorf("from %s: %v", e.name, err)
		}
	})
	both.Go(func() {
		if err := e.in.check(r, rand.New(rand.NewPCG(e.seed, 3))); err != nil {
			t.Errorf("to %s: %v", e.name, err)
			conn.Close() // ends the rest of the session
		}
	})
	both.Wait()
}

// flowSession is a session's flows, of which there are two of each direction:
// one is sent, the other is what should come.
type flowSession struct {
	ends  [2]flowEnd // by side
	total [2]int     // bytes, by the side they come from
}

func newFlowSession(noise []byte, seed uint64, number int, sizes [2]int) *flowSession {
	s := &flowSession{total: sizes}
	var flows [2][2]*flow
	for i := client; i <= server; i++ {
		for j := range 2 {
			flows[i][j] = newFlow(noise, seed+uint64(number), sizes[i], i, number>>(1+i)&1 == 0)
		}
	}
	for i := client; i <= server; i++ {
		e := flowEnd{name: fmt.Sprintf("%s %d", [2]string{"client", "backend"}[i], number), seed: seed + uint64(number)<<32 + uint64(i)}
		e.out, e.in = flows[i][0], flows[i.peer()][1]
		e.early = e.out.first(logUniform(rand.New(rand.NewPCG(e.seed, 4)), 4<<10))
		s.ends[i] = e
	}
	return s
}

// flowSizes returns the sizes of the flows of count sessions, 64 MiB at most and
// all together no more than budget.
func flowSizes(rng *rand.Rand, count, budget int) [][2]int {
	sizes := make([][2]int, count)
	sizes[0] = [2]int{64 << 20, 0}
	budget -= 64 << 20
	for n := range sizes[1:] {
		for i := range sizes[1+n] {
			size := logUniform(rng, min(64<<20, budget/4))
			sizes[1+n][i] = size
			budget -= size
		}
	}
	return sizes
}

// Byte by byte the same in both directions at once, from what came with the
// handshake to what came before the FIN: 200 sessions of up to 64 MiB with every
// write, read and pause at random, half of them through the proxy and half from a
// Unix socket as nginx has it, half of the flows WebSocket frames.
//
// It fails if what came first is left out or goes second; if what a side did not
// take is written again from its start, or not at all before the FIN; if a turn
// ends and nothing wakes the poller up; if the sides' counters are swapped.
func TestRelayBytes(t *testing.T) {
	const count = 200
	seed := randomSeed(t)
	noise := newNoise(seed)
	next := make(chan flowEnd, 1) // for the connection that comes to the backend
	start := make(chan struct{})
	begin := sync.OnceFunc(func() { close(start) })
	var served sync.WaitGroup // what comes to the backend
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		e := <-next
		defer served.Done()
		io.WriteString(conn, switching+string(e.early))
		<-start
		e.run(t, conn.(*net.TCPConn), br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	defer begin() // or a failure below would wait for the backend
	var running sync.WaitGroup
	var total [2]int64
	for n, sizes := range flowSizes(rand.New(rand.NewPCG(seed, 5)), count, 512<<20) {
		s := newFlowSession(noise, seed, n, sizes)
		total[client] += int64(sizes[client])
		total[server] += int64(sizes[server])
		ends := s.ends
		if n%2 == 0 {
			served.Add(1)
			next <- ends[server]
			conn, br, _ := p.ask(t, upgradeRequest("/ws/ns-01")+string(ends[client].early))
			running.Go(func() { <-start; ends[client].run(t, conn, br) })
			continue
		}
		near, nearFar := unixPair(t)
		far, farFar := tcpPair(t)
		nearFar.SetWriteBuffer(4 << 10 << (n / 8 % 8)) // little is taken in many parts
		far.SetWriteBuffer(4 << 10 << (n / 8 % 8))
		p.relay.carry(&session{namespace: "ns-01"}, [2]net.Conn{nearFar, far}, [2][]byte{ends[client].early, ends[server].early})
		running.Go(func() { <-start; ends[client].run(t, near, near) })
		running.Go(func() { <-start; ends[server].run(t, farFar, farFar) })
	}
	begin()
	running.Wait()
	served.Wait() // its last bytes are in its socket when the session is over
	waitFor(t, p.relay)
	if got := p.relay.bytes(); got != total {
		t.Errorf("%d bytes were counted, want %d", got, total)
	}
	if got := p.relay.ended[causeClient].Load() + p.relay.ended[causeBackend].Load(); got != count {
		t.Errorf("%d clean ends, want %d", got, count)
	}
}
