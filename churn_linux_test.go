package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// churnFlag is for "make churn".
var churnFlag = flag.Duration("churn", 5*time.Second, "how long TestProxyChurn opens and closes sessions")

// churnWay is how a session of the churn ends. Its number is the first byte of
// the client's message.
type churnWay byte

const (
	clientCloses churnWay = iota
	clientResets
	backendCloses
	backendResets
	bothClose
	bothReset
	clientResetsStuck // while the backend sends it a big frame; rare, since it takes long
	clientGivesUp     // without waiting for the 101: there may be no session
	churnWays
)

// churn opens and closes sessions through a router in a process of its own.
type churn struct {
	front string   // the router's address
	log   churnLog // the router's

	// Sessions: those that had their echo, and upgrades that were given up.
	echoed, givenUp atomic.Int64
}

// churnLog counts the sessions that have ended and leaves the rest to tail,
// which keeps its lines.
type churnLog struct {
	tail  *logTail
	ended atomic.Int64
	rest  []byte // of a line that has not ended
}

func (l *churnLog) Write(b []byte) (int, error) {
	l.rest = append(l.rest, b...)
	for {
		end := bytes.IndexByte(l.rest, '\n') + 1
		if end == 0 {
			return len(b), nil
		}
		if line := l.rest[:end]; bytes.Contains(line, []byte(`"msg":"session ended"`)) {
			l.ended.Add(1)
		} else {
			l.tail.Write(line)
		}
		l.rest = l.rest[end:]
	}
}

// churnBackend serves until the test ends, and keeps nothing of what was, as
// startStub does. It sends back what a message has behind its way, and ends its
// part of the session as that says.
func churnBackend(t *testing.T, host string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { serveChurn(conn.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close(); running.Wait() })
	return l.Addr().String()
}

func serveChurn(conn *net.TCPConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	br := bufio.NewReader(conn)
	if _, err := readHead(br); err != nil {
		return // the client gave up
	}
	io.WriteString(conn, switching)
	var head [3]byte
	if _, err := io.ReadFull(br, head[:]); err != nil {
		return
	}
	io.CopyN(conn, br, int64(binary.BigEndian.Uint16(head[1:])))
	switch way := churnWay(head[0]); way {
	case backendCloses: // its last bytes are the echo
	case backendResets, bothClose, bothReset, clientResetsStuck:
		br.ReadByte() // the client has the echo
		switch way {
		case backendResets, bothReset:
			reset(conn)
		case clientResetsStuck:
			conn.Write(churnFrame(make([]byte, 4<<20))) // until the end
		}
	default:
		io.Copy(io.Discard, br)
	}
}

// churnFrame returns a WebSocket frame with this payload, as a backend sends it.
func churnFrame(payload []byte) []byte {
	return slices.Concat(binary.BigEndian.AppendUint64([]byte{0x82, 127}, uint64(len(payload))), payload)
}

// session opens a session, has its echo and ends it. local is an address that
// has ports left: a side that ends first keeps its port for a minute.
func (c *churn) session(rng *rand.Rand, local net.Addr) error {
	way := churnWay(rng.IntN(int(churnWays)))
	if way == clientResetsStuck && rng.IntN(10) > 0 {
		way = clientResets
	}
	conn, err := (&net.Dialer{LocalAddr: local, Timeout: patience}).Dial("tcp", c.front)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	text := make([]byte, logUniform(rng, 20_000))
	rand.NewChaCha8([32]byte{byte(rng.Uint32())}).Read(text)
	text = churnFrame(text)
	message := slices.Concat(binary.BigEndian.AppendUint16([]byte{byte(way)}, uint16(len(text))), text)
	request := upgradeRequest("/ws/ns-" + strconv.Itoa(rng.IntN(1000)))
	if rng.IntN(2) == 0 {
		request, message = request+string(message), nil
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	if way == clientGivesUp {
		c.givenUp.Add(1)
		if rng.IntN(2) == 0 {
			reset(conn.(*net.TCPConn))
		}
		return nil
	}
	if err := echoed(conn, message, text); err != nil {
		return fmt.Errorf("way %d: %w", way, err)
	}
	c.echoed.Add(1)
	return endChurn(conn.(*net.TCPConn), way, rng)
}

// echoed reads the 101, sends the message and reads the text.
func echoed(conn net.Conn, message, text []byte) error {
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("status %d %q, want 101", resp.StatusCode, body)
	}
	if _, err := conn.Write(message); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if n, err := io.ReadFull(br, got); err != nil || !bytes.Equal(got, text) {
		return fmt.Errorf("%d bytes of an echo, %v; want the %d that were sent", n, err, len(text))
	}
	return nil
}

// endChurn ends the client's part of a session.
func endChurn(conn *net.TCPConn, way churnWay, rng *rand.Rand) error {
	if way >= backendResets {
		conn.Write([]byte{0}) // an error shows below, or is an end as good as another
	}
	switch way {
	case clientResets, bothReset:
		reset(conn)
	case clientResetsStuck:
		time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond) // in which it fills up, or not
		reset(conn)
	case backendCloses, backendResets:
		_, err := io.Copy(io.Discard, conn)
		if err != nil && (way == backendCloses || errors.Is(err, os.ErrDeadlineExceeded)) {
			return fmt.Errorf("way %d: %w, want the end", way, err)
		}
	}
	return nil
}

// run keeps some sessions open at once for that long, and calls tell each minute.
func (c *churn) run(t *testing.T, d time.Duration, tell func()) {
	t.Helper()
	const atOnce = 32
	end, seed := time.Now().Add(d), randomSeed(t)
	var stop atomic.Bool
	var running sync.WaitGroup
	for i := range atOnce {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		running.Go(func() {
			for time.Now().Before(end) && !stop.Load() {
				local := &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+rng.IntN(200)))}
				if err := c.session(rng, local); err != nil {
					t.Error(err)
					stop.Store(true)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { running.Wait(); close(done) }()
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	for {
		select {
		case <-done:
			return
		case <-minute.C:
			tell()
		}
	}
}

// usage is what a router has of what a session may leave behind.
type usage struct {
	descriptors, goroutines int
	heap, resident          int // bytes; the heap with the stacks
}

func (u usage) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, %d KiB heap, %d KiB resident",
		u.descriptors, u.goroutines, u.heap>>10, u.resident>>10)
}

// within reports whether u is as other but for what comes and goes by itself.
func (u usage) within(other usage) bool {
	resident, pipes := 16<<20, 32*runtime.NumCPU() // descriptors that a relay may keep for big frames
	if raced() {
		resident = 64 << 20 // the detector's own memory
	}
	return u.descriptors <= other.descriptors+pipes && u.goroutines <= other.goroutines+2 &&
		u.heap <= other.heap+512<<10 && u.resident <= other.resident+resident
}

// usage asks the process, after a collection, which is the n-th.
func (p *routerProcess) usage(t *testing.T, n int) (u usage) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGHUP)
	u.heap = int(p.log.wait(t, "memory", n)["used"].(float64))
	u.goroutines = int(scrape(t, &p.runningRouter).values["go_goroutines"])
	dir := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
	open, err := os.ReadDir(dir + "fd")
	if err != nil {
		t.Fatal(err)
	}
	u.descriptors = len(open)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		t.Fatal(err)
	}
	_, rss, _ := strings.Cut(string(status), "VmRSS:")
	if _, err := fmt.Sscan(rss, &u.resident); err != nil { // in kB
		t.Fatal(err)
	}
	u.resident <<= 10
	return u
}

// settled waits until no session and no upgrade is left.
func (p *routerProcess) settled(t *testing.T) {
	t.Helper()
	waitMetrics(t, &p.runningRouter, map[string]float64{"router_upgrades_waiting": 0,
		`router_sessions{backend="backend-0"}`: 0, `router_sessions{backend="backend-1"}`: 0})
}

// Sessions that come and go at full speed, ended by the client, the backend or
// both, by FIN or RST, leave nothing behind in the router: no descriptor, no
// goroutine, no memory; and each is counted and logged once. A router that has
// served some is what the end is compared with.
//
// It fails if a socket or a goroutine is left, if a session stays in the relay's
// set, and if an end is not counted or logged; after some 10,000 sessions also if
// a timer outlives each, and after 100,000 if a few bytes of each stay.
func TestProxyChurn(t *testing.T) {
	const warmSessions = 1000 // at least: what a router keeps for good, it has by then, however slow the machine
	addrs := churnBackend(t, "127.0.0.1") + "," + churnBackend(t, "127.0.0.2")
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", addrs, "-overrides", t.TempDir()})...)
	c := &churn{log: churnLog{tail: p.log}}
	p.cmd.Stdout = &c.log
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	c.front = p.front

	warmUp := func() { c.run(t, max(time.Second, *churnFlag/60), func() {}) }
	for warmUp(); c.echoed.Load() < warmSessions && !t.Failed(); warmUp() {
	}
	p.settled(t)
	asked := 1
	before := p.usage(t, asked)
	warm, begun := c.echoed.Load(), time.Now()
	c.run(t, *churnFlag, func() {
		asked++
		t.Logf("%s: %d sessions; %s", time.Since(begun).Round(time.Second), c.echoed.Load()-warm, p.usage(t, asked))
	})
	count, took := c.echoed.Load()-warm, time.Since(begun)
	p.settled(t)
	var after usage
	for end := time.Now().Add(patience); ; <-time.After(100 * time.Millisecond) {
		asked++
		if after = p.usage(t, asked); after.within(before) {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%d sessions left something behind", count)
			break
		}
	}
	t.Logf("%d sessions in %s, %.0f a second\nbefore: %s\nafter:  %s", count, took.Round(time.Millisecond), float64(count)/took.Seconds(), before, after)
	c.wantAccounts(t, p)
}

// wantAccounts checks what the router counted and logged.
func (c *churn) wantAccounts(t *testing.T, p *routerProcess) {
	t.Helper()
	var total, ended float64
	for series, value := range scrape(t, &p.runningRouter).values {
		switch {
		case strings.HasPrefix(series, "router_sessions_total{"):
			total += value
		case strings.HasPrefix(series, "router_sessions_ended_total{"):
			ended += value
		}
	}
	least, most := float64(c.echoed.Load()), float64(c.echoed.Load()+c.givenUp.Load())
	if logged := float64(c.log.ended.Load()); total < least || total > most || ended != total || logged != total {
		t.Errorf("%v sessions, %v ended, %v in the log; want %v to %v of each", total, ended, logged, least, most)
	}
}
