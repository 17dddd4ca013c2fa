//go:build !portable && !386

package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
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

// Both directions of a session have unsent bytes, and both sides become writable in
// one batch of events. Flushing one side allows the poller to read the other, which
// has bytes already. updateEpoll must then cause an event, because nothing else
// does.
func TestRelayWakesItself(t *testing.T) {
	r := quietRelay(t)
	for round := range 4 {
		pairs := newSessionConns(t, "unix", "unix")
		pairs.near[clientSide].(halfConn).SetWriteBuffer(4 << 10)
		c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
		p, other := c.poller, startedSession(t, r)
		for other.poller != p {
			other = startedSession(t, r)
		}
		stuff(c.backend)
		want := stuff(c.client)
		p.mu.Lock()
		mustWrite(t, other.client, "x")
		waitBlocked(t)
		if round%2 == 0 {
			readMost(c.client, 1<<20) // all that the kernel has
		}
		got := readMost(c.backend, want)
		if round%2 == 1 {
			readMost(c.client, 1<<20)
		}
		p.mu.Unlock()
		c.backend.SetReadDeadline(time.Now().Add(patience))
		n, err := io.CopyN(io.Discard, c.backend, want-got)
		if err != nil {
			t.Fatalf("round %d: the backend got %d bytes of %d: %v", round, got+n, want, err)
		}
		c.end(causeDrain)
	}
}

// If a backend sends its last bytes and is gone, the relay carries all that it has
// sent. It fails if an RST or a failed send to the backend ends a session with
// unsent bytes.
func TestRelayLastBytes(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, c relayed){
		"closes while its client goes on sending": func(t *testing.T, c relayed) {
			c.backend.Close()
			eventually(t, "a send to the backend has failed", true, func() bool {
				c.client.Write([]byte("ping")) // the backend's kernel answers with an RST
				c.lock()
				defer c.unlock()
				return c.writeFailed[backendSide]
			})
		},
		"resets": func(t *testing.T, c relayed) {
			waitAcked(t, c.backend) // a reset drops what is still to be sent
			reset(c.backend)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := startedOver(t, quietRelay(t), "unix", "tcp")
			const last = 256 << 10 // more than the client's socket takes, less than with the router's buffers
			mustWrite(t, c.backend, string(make([]byte, last)))
			c.waitStuck(backendSide)
			end(t, c)
			mustReadAll(t, c.client, last)
			c.client.Close()
			c.wantCause(t, causeBackendError)
		})
	}
}

// waitAcked returns when the peer's kernel has all that was written to an IPv4 connection.
func waitAcked(t *testing.T, conn net.Conn) {
	t.Helper()
	local := conn.LocalAddr().(*net.TCPAddr)
	ip := binary.NativeEndian.Uint32(local.IP.To4())
	address := fmt.Sprintf("%08X:%04X", ip, local.Port)
	eventually(t, "bytes that are not acknowledged", "00000000", func() string {
		sockets, _ := os.ReadFile("/proc/thread-self/net/tcp") // proc_net_tcp(5)
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			if len(fields) > 4 && fields[1] == address {
				queued, _, _ := strings.Cut(fields[4], ":")
				return queued
			}
		}
		return "no such socket"
	})
}

// If a frame ends at the end of the poller's buffer, there is room for the Close frame.
func TestCloseGracefullyFullBuffer(t *testing.T) {
	c := startedOver(t, quietRelay(t), "unix", "unix")
	frame := frameBytes(0x82, true, bufferSize, make([]byte, bufferSize))
	mustSend(t, c.client, frame[:len(frame)-bufferSize])
	mustRead(t, c.backend, string(frame[:len(frame)-bufferSize]))
	c.closeGracefully(causeMoved, nil)
	c.poller.mu.Lock()
	mustSend(t, c.client, frame[len(frame)-bufferSize:])
	c.poller.mu.Unlock()
	mustRead(t, c.backend, string(frame[len(frame)-bufferSize:]))
	mustFrames(t, c.backend, true, goesAway)
	c.end(causeMoved)
}

// A session whose descriptors cannot be duplicated ends at once, and is counted and
// logged like others. Here the client's connection is closed already, which has the
// same effect as no free descriptor.
func TestRelayRouterError(t *testing.T) {
	r, tail := quietRelay(t), newLogTail()
	r.log = slog.New(slog.NewJSONHandler(tail, nil))
	pairs := newSessionConns(t, "tcp", "tcp")
	pairs.near[clientSide].Close()
	begun := time.Now()
	c := pairs.start(r, newSession("ns-01", 0, "192.0.2.7"), [2][]byte{[]byte("lost"), nil})
	mustEOF(t, c.backend)
	c.wantCause(t, causeRouterError)
	c.wantAccount(t, tail, [2]int64{}, 0, time.Since(begun))
}

// waitBlocked waits until a poller has taken events and waits to lock its mu.
func waitBlocked(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	blocked := regexp.MustCompile(`\[sync\.Mutex\.Lock.*(\n.+)*\(\*poller\)\.poll`)
	eventually(t, "a poller waits to lock its mu", true, func() bool {
		return blocked.Match(buf[:runtime.Stack(buf, true)])
	})
}

// readMost reads up to limit bytes in 30 ms, and returns how many.
func readMost(conn net.Conn, limit int64) int64 {
	conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	n, _ := io.CopyN(io.Discard, conn, limit) // a timeout is expected
	return n
}

// If several times more sockets are ready at once than one call of poll handles, and no
// new event comes, the poller wakes itself to handle the rest.
func TestRelayManyReady(t *testing.T) {
	r := quietRelay(t)
	var sessions []relayed
	for range 4 * maxEpollEvents * len(r.engine.pollers) {
		sessions = append(sessions, startedSession(t, r))
	}
	for _, p := range r.engine.pollers {
		p.mu.Lock()
	}
	for _, s := range sessions {
		mustWrite(t, s.client, "x")
	}
	for _, p := range r.engine.pollers {
		p.mu.Unlock()
	}
	for _, s := range sessions {
		mustRead(t, s.backend, "x")
	}
}

// hugeFrame returns the header of a frame that never ends.
func hugeFrame(masked bool) []byte { return frameBytes(0x82, masked, 1<<40, nil) }

// Urgent data of TCP does not stop a session: recv(2) returns fewer bytes at the
// mark, which does not mean that the socket has no more.
func TestRelayUrgentData(t *testing.T) {
	r := quietRelay(t)
	pairs := newSessionConns(t, "tcp", "tcp")
	client := pairs.far[clientSide].(*net.TCPConn)
	mustWrite(t, client, "before")
	onDescriptor(t, client, func(fd int) { must(t, syscall.Sendto(fd, []byte("!"), syscall.MSG_OOB, nil)) })
	mustWrite(t, client, "after")
	<-time.After(50 * time.Millisecond) // so that all of it has come when the poller reads
	c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
	mustRead(t, c.backend, "beforeafter")
	c.end(causeDrain)
}

// If a reader does not take the payload of a large frame, and reads have filled the
// buffer before, the unsent bytes are in a pipe: no more than that holds. The session
// gives the pipe back when it ends.
func TestRelayKeepsLittleInPipes(t *testing.T) {
	r := quietRelay(t)
	for piped, tries := 0, 0; piped <= 2*maxPipes; tries++ {
		if tries == 40*maxPipes { // a slow sender does not fill the poller's buffer
			t.Fatalf("%d of %d sessions have kept a pipe, want most", piped, tries)
		}
		c := startedSession(t, r)
		mustSend(t, c.backend, hugeFrame(false))
		c.backend.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		io.Copy(c.backend, endless{})
		c.poller.mu.Lock()
		if u := c.unsent[backendSide]; u != nil && u.pipe != nil {
			piped++
			if n := len(u.data) + u.pipe.queued; n == 0 || n > pipeSize {
				t.Errorf("%d bytes are unsent, want 1 to %d", n, pipeSize)
			}
		}
		c.poller.mu.Unlock()
		c.end(causeDrain)
		c.poller.mu.Lock()
		wantEqual(t, "pipes in use after the session", c.poller.pipes.made-len(c.poller.pipes.empty), 0)
		c.poller.mu.Unlock()
	}
}

// If a side with unsent bytes resets, nothing more is sent to it. If its peer does
// not read either, the session ends as a half-closed one does.
func TestRelayResetWhileUnsent(t *testing.T) {
	r := quietRelay(t)
	r.halfCloseTimeout = 200 * time.Millisecond
	c := startedOver(t, r, "unix", "tcp")
	stuff(c.backend)
	c.poller.mu.Lock()
	if c.unsent[backendSide] == nil {
		t.Error("the backend has no unsent bytes")
	}
	c.poller.mu.Unlock()
	reset(c.backend)
	c.wantCause(t, causeHalfClose)
	mustBreak(t, c.client)
}

// If the backend's connection is lost while the backend has unsent bytes, it cannot be read: the
// poller takes the error from the socket. A step then waits for a flight, and not for the client.
func TestRelayLostWhileUnsent(t *testing.T) {
	talk := make(chan struct{})
	addr := deafBackend(t, switching, func(conn net.Conn) { <-talk; io.Copy(conn, endless{}) })
	p, next := lostProxy(t, addr, nil)
	conn := p.open(t, "ns-01")
	s := p.onlySession(t)
	close(talk)
	eventually(t, "the backend has unsent bytes", true, func() bool {
		s.lock()
		defer s.unlock()
		return s.unsent[backendSide] != nil
	})
	mustWrite(t, conn, string(lostFrame()))
	eventually(t, "the session blocks no step", true, s.isOverForSteps)
	wantEqual(t, "the session goes on", s.isOver.Load(), false)
	p.mustWaitForLost(t, next)
}

// A socket that takes a send in part is looked at again, also if epoll watches it for EPOLLOUT
// already and has no event: here the test has taken that away.
func TestRelayShortSendAsksAgain(t *testing.T) {
	c := startedSession(t, quietRelay(t))
	p := c.poller
	for stolen := false; !stolen; {
		p.mu.Lock()
		p.keepUnsent(c.session, clientSide, []byte("x"), nil)
		p.updateEpoll(c.session)
		if stolen = stealWritable(p, c.session); stolen { // else the poller has it, and waits for mu
			p.handleSent(c.session, clientSide, 1, 0, 2)
			p.updateEpoll(c.session)
		}
		p.mu.Unlock()
		mustRead(t, c.backend, "x")
	}
}

// stealWritable takes the events of p's epoll set, and reports whether one of them says that the
// backend's socket of s is writable.
func stealWritable(p *poller, s *session) (stolen bool) {
	var events [maxEpollEvents]syscall.EpollEvent
	n, _ := syscall.EpollWait(p.epollFD, events[:], 0)
	for _, e := range events[:max(n, 0)] {
		stolen = stolen || e.Fd == s.slot && side(e.Pad&1) == backendSide && e.Events&syscall.EPOLLOUT != 0
	}
	return stolen
}

// A reset within a large frame ends the session with an error as its cause. splice(2)
// takes the socket's error (sock_error in tcp_splice_read clears it), so that a recv(2)
// after it returns a plain end.
func TestRelayResetInLargeFrame(t *testing.T) {
	for i, want := range []cause{causeClientError, causeBackendError} {
		c := startedSession(t, quietRelay(t))
		from, to := c.ends()[i], c.ends()[1-i]
		const size = 4 << 20
		go from.Write(append(hugeFrame(side(i) == clientSide), make([]byte, size)...))
		to.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.CopyN(io.Discard, to, size); err != nil {
			t.Fatal(err)
		}
		<-time.After(50 * time.Millisecond) // until nothing is left to read
		reset(from)
		c.wantCause(t, want)
	}
}

// failedCalls has the errors that TestProcessFailedCalls injects, and the causes with
// which sessions may end then: none if the error must not harm a session. EAGAIN is not
// there, because the relay would wait for an event that does not come.
var failedCalls = map[string][]string{
	"ENOBUFS":    {"router_error"},
	"ENOMEM":     {"router_error"},
	"EIO":        {"router_error"},
	"EPIPE":      {"client_error", "backend_error"},
	"ECONNRESET": {"client_error", "backend_error"},
	"EINTR":      nil,
}

// failedAt has the system calls that carry bytes, and which of them fail in each
// thread, in the syntax of strace: the first one, and the step to the next.
var failedAt = map[string]string{"sendto": "20+50", "recvfrom": "40+50", "splice": "2+5"}

// If system calls of the relay fail now and then, no stream has a hole, and a
// session that ends early has the right cause. The streams have small and large
// frames, and readers pause, so that bytes become unsent. It fails if anything is
// sent to a side after a send to it has failed.
func TestProcessFailedCalls(t *testing.T) {
	for errno, why := range failedCalls {
		for call, when := range failedAt {
			t.Run(call+" "+errno, func(t *testing.T) {
				seed := randomSeed(t)
				f := &flows{t: t, noise: newNoise(seed), seed: seed, whole: why == nil}
				stub := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
					io.WriteString(conn, switching)
					if _, err := br.ReadByte(); err == nil { // otherwise the upgrade has failed
						f.play(conn.(*net.TCPConn), br, backendSide)
						f.ended.Add(1)
					}
				})
				p := newRouterProcess(t, "-listen", "unix:"+filepath.Join(t.TempDir(), "socket"),
					"-backends", stub.addr, "-overrides", t.TempDir())
				done := p.traced(t, fmt.Sprintf("%s:error=%s:when=%s", call, errno, when))
				p.serve(t)
				var running sync.WaitGroup
				var sessions atomic.Int64
				for range 20 {
					conn := p.ask(t, "ns-01")
					running.Go(func() {
						br := bufio.NewReader(conn)
						if resp, err := http.ReadResponse(br, nil); err == nil && resp.StatusCode == http.StatusSwitchingProtocols {
							sessions.Add(1)
							conn.Write([]byte{0})
							f.play(conn.(*net.UnixConn), br, clientSide)
						}
						conn.Close()
					})
				}
				running.Wait()
				p.log.wait(t, "session ended", int(sessions.Load()))
				if f.whole {
					eventually(t, "sessions that have ended at their backends", sessions.Load(), f.ended.Load)
				}
				p.wantFailures(t, done, why)
			})
		}
	}
}

// flows are sessions that all carry the same bytes, so that nobody has to know which is
// which.
type flows struct {
	t     *testing.T
	noise []byte
	seed  uint64
	whole bool         // no session may end early
	ended atomic.Int64 // sessions that have ended at their backends
}

// play is one end of a session. It checks that what comes is the beginning of the flow.
func (f *flows) play(conn halfConn, r io.Reader, from side) {
	conn.SetDeadline(time.Now().Add(3 * patience))
	flow := func(from side) *flow { return newFlow(f.noise, f.seed, 1<<20, from, true) }
	var sending sync.WaitGroup
	sending.Go(func() { flow(from).send(conn, rand.New(rand.NewPCG(f.seed, 1))) }) // fails when the session is over
	err := flow(from.other()).check(r, rand.New(rand.NewPCG(f.seed, 2)))
	if err != nil && (f.whole || errors.Unwrap(err) == nil) { // check wraps only errors of the connection
		f.t.Errorf("from side %d: %v", from.other(), err)
	}
	sending.Wait()
}

// wantFailures checks that strace, whose output is in file, made calls fail, and
// that the sessions ended with a cause in why, or by their own ends.
func (p *routerProcess) wantFailures(t *testing.T, file string, why []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	causes, harmed := map[string]int{}, 0
	for _, line := range p.log.all("session ended") {
		cause := line["cause"].(string)
		causes[cause]++
		if slices.Contains(why, cause) {
			harmed++
		} else if cause != "client" && cause != "backend" {
			t.Errorf("a session ended with cause %s, want %q, or its own end", cause, why)
		}
	}
	failed := bytes.Count(b, []byte("(INJECTED)"))
	t.Logf("%d calls have failed, sessions ended with %v", failed, causes)
	if failed == 0 || why != nil && harmed == 0 {
		t.Errorf("%d calls have failed and harmed %d sessions, want some", failed, harmed)
	}
}

// waitUnsent waits until unsent bytes take this much memory, in bytes.
func waitUnsent(t *testing.T, r *relay, want int64) {
	t.Helper()
	eventually(t, "bytes of memory for unsent bytes", want, r.engine.unsentBytes.Load)
}

// A session for whose backend there is no descriptor ends, and the hand-off waits for that
// backend all the same: it may serve the namespace.
func TestRelayWithoutDescriptor(t *testing.T) {
	r := quietRelay(t)
	abandoned := make(chan net.Conn, 2)
	r.onAbandoned = func(_ *session, backend net.Conn) { abandoned <- backend }
	pairs := newSessionConns(t, "tcp", "tcp")
	pairs.near[backendSide].Close() // so it cannot be duplicated
	pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{}).wantCause(t, causeRouterError)
	wantEqual(t, "abandoned backends", len(abandoned), 1)
	if conn := <-abandoned; conn != nil {
		t.Errorf("the abandoned backend has the connection %v, want none", conn)
	}

	var c fastConn
	if err := c.setBackendConn(pairs.near[backendSide]); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("a backend's connection that cannot be duplicated: %v, want %v", err, syscall.EMFILE)
	}
}

// A session with one unsent byte takes little more memory than one without.
func TestRelayHoldsInSizes(t *testing.T) {
	const sessions = 1000
	r := quietRelay(t)
	all := make([]relayed, sessions)
	inBatches(sessions, func(i int) {
		pairs := smallSockets(t)
		near := pairs.near[clientSide]
		stuff(near)
		near.SetDeadline(time.Time{})
		all[i] = pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
	})
	open := userMemory()
	for _, c := range all {
		mustWrite(t, c.backend, "x")
	}
	waitUnsent(t, r, sessions*minUnsentBuffer)
	full := userMemory()
	t.Logf("a session takes %d bytes more with an unsent byte", (full-open)/sessions)
	if full-open > sessions*512 {
		t.Errorf("%d sessions with an unsent byte take %d bytes more memory, want at most %d",
			sessions, full-open, sessions*512)
	}
	r.endAll(causeDrain)
	waitFor(t, r)
	waitUnsent(t, r, 0)
}

// unsentClass returns the smallest class with room for the size.
func TestUnsentClass(t *testing.T) {
	for size, want := range map[int]int{0: 64, 1: 64, 64: 64, 65: 128, 4096: 4096, 4097: 8192, bufferSize - 1: bufferSize, bufferSize: bufferSize} {
		wantEqual(t, fmt.Sprint("the buffer for ", size, " bytes"), minUnsentBuffer<<unsentClass(size), want)
	}
	wantEqual(t, "the largest class", unsentClass(bufferSize), unsentClasses-1)
}

// Stuck sessions keep as many unsent bytes as the budget allows and no more, other
// sessions keep their latency, and all bytes arrive when the readers continue.
func TestRelayKeepsWithinBudget(t *testing.T) {
	const sessions, budget = 300, 1 << 20
	calm, crowded := quietRelay(t), quietRelay(t)
	crowded.engine.unsentBudget = budget
	relays := [2][]relayed{echoing(t, calm, 20), echoing(t, crowded, 20)}
	stuck := newStuckSessions(t, crowded, sessions)
	stuck.fill()
	got, most := crowded.engine.unsentBytes.Load(), int64(budget+2*bufferSize*len(crowded.engine.pollers)+sessions*minUnsentBuffer)
	t.Logf("%d stuck sessions keep %d bytes", sessions, got)
	if got < budget || got > most {
		t.Errorf("%d stuck sessions keep %d bytes, want %d to %d", sessions, got, budget, most)
	}
	wantMedianEchoes(t, relays)
	wantRest(t)
	stuck.read(t)
	waitUnsent(t, crowded, 0)
}

// While the budget is used up, a stuck session in its closing handshake keeps at most as
// many bytes as one read may have then. It fails if it keeps a whole buffer.
func TestCloseGracefullyOverBudget(t *testing.T) {
	const sessions = 20
	r := quietRelay(t)
	r.engine.unsentBudget, r.closeTimeout = 0, time.Hour
	inBatches(sessions, func(int) {
		c := startedSmallSession(t, r)
		c.closeGracefully(causeMoved, nil)
		c.backend.Write(hugeFrame(false))
		stuff(c.backend)
	})
	got, most := r.engine.unsentBytes.Load(), int64(sessions*peekSize/4)
	if t.Logf("%d closing sessions keep %d bytes", sessions, got); got < sessions*minUnsentBuffer || got > most {
		t.Errorf("%d closing sessions keep %d bytes, want at most %d", sessions, got, most)
	}
}

// All bytes arrive unchanged while the budget is used up, always or now and then.
func TestRelayBytesOverBudget(t *testing.T) {
	for _, budget := range []int64{0, 100 << 10} {
		t.Run(fmt.Sprint(budget), func(t *testing.T) {
			const count = 40
			seed := randomSeed(t)
			noise := newNoise(seed)
			r := quietRelay(t)
			r.engine.unsentBudget = budget
			rng := rand.New(rand.NewPCG(seed, 5))
			var running sync.WaitGroup
			var total [2]int64
			for n := range count {
				sizes := [2]int{logUniform(rng, 4<<20), logUniform(rng, 4<<20)}
				ends := newFlowSession(noise, seed, n, sizes).ends
				pairs := newSessionConns(t, []string{"unix", "tls-unix", "unix", "tls"}[n%4], "tcp")
				socket(pairs.near[clientSide]).SetWriteBuffer(4 << 10 << (n % 8))
				pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{ends[clientSide].early, ends[backendSide].early})
				for i, conn := range pairs.far {
					running.Go(func() { ends[i].run(t, conn, conn) })
					total[i] += int64(sizes[i])
				}
			}
			running.Wait()
			waitFor(t, r)
			wantEqual(t, "bytes", r.bytes(), total)
			waitUnsent(t, r, 0)
		})
	}
}

// partsFlag may be up to 9000 with 20,000 descriptors.
var partsFlag = flag.Int("parts", 600, "how many sessions TestProcessClosesGracefully moves, and then drains")

// stuckFlag may be up to 9000 with 20,000 descriptors.
var stuckFlag = flag.Int("stuck", 600, "how many sessions TestProcessStuck has")

// Sessions whose clients do not read take as much memory as their unsent bytes,
// within the budget, and all other sessions go on.
func TestProcessStuck(t *testing.T) {
	t.Run("1 KiB", func(t *testing.T) { stickSessions(t, 1<<10, *stuckFlag*4) }) // 36 MiB for 9,000
	t.Run("64 KiB", func(t *testing.T) { stickSessions(t, 64<<10, min(*stuckFlag*64*5/4, 2*maxUnsent>>10)) })
}

// stickSessions sends pieces to clients that do not read until each session has unsent
// bytes, and checks that the router then has at most limit KiB more memory.
func stickSessions(t *testing.T, piece, limit int) {
	sessions, conns := *stuckFlag, make(chan net.Conn, *stuckFlag)
	done := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		conns <- conn
		<-done
	})
	t.Cleanup(func() { close(done) }) // runs before the backend's cleanup
	addrs := backend.addr + "," + startStub(t, "127.0.0.2:0", echo).addr
	overrides := pinned(10, 0)
	overrides["other"] = "backend-1"
	p := newRouterProcess(t, "-listen", "unix:"+filepath.Join(t.TempDir(), "socket"),
		"-backends", addrs, "-overrides", overridesDir(t, overrides), "-drain-duration", "0")
	p.build(t)
	p.serve(t)
	p.openClosing(t, sessions, 10)
	other := p.ask(t, "other")
	mustAnswer(t, other, http.StatusSwitchingProtocols)

	before := p.memory(t)["VmRSS"]
	stuck, data := make([]net.Conn, sessions), make([]byte, piece)
	for i := range stuck {
		stuck[i] = <-conns
	}
	for taken, grown := 0.0, 2.0; grown > 1; { // until only the other client's byte is taken
		was := taken
		for _, conn := range stuck {
			conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			conn.Write(data) // only in part if its buffers are full
		}
		mustWrite(t, other, "x")
		mustRead(t, other, "x")
		taken = scrape(t, &p.runningRouter).values[`router_bytes_total{direction="to_client"}`]
		grown = taken - was
	}
	grown := p.memory(t)["VmRSS"] - before
	t.Logf("%d sessions take %d KiB", sessions, grown)
	if grown > limit {
		t.Errorf("%d sessions take %d KiB, want %d at most", sessions, grown, limit)
	}
}

// TestProcessClosesGracefully moves all sessions of a router process, and drains as
// many. It checks the Close frames at both ends, the pace and the memory, and logs
// the CPU time.
func TestProcessClosesGracefully(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		closeManyGracefully(t, nil, "-listen", "unix:"+filepath.Join(t.TempDir(), "socket"))
	})
	t.Run("tls", func(t *testing.T) {
		ca := newTestCA(t, "CA")
		secret := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
		closeManyGracefully(t, newTLSClient(ca, tls.VersionTLS13).config, "-tls-cert", secret.path)
	})
}

func closeManyGracefully(t *testing.T, clients *tls.Config, args ...string) {
	const rate, namespaces = 2000, 10
	sessions := *partsFlag
	drainTime := time.Duration(sessions) * time.Second / rate
	addrs := startStub(t, "127.0.0.1:0", serveClosing(t)).addr + "," + startStub(t, "127.0.0.2:0", serveClosing(t)).addr
	dir := overridesDir(t, pinned(namespaces, 0))
	p := newRouterProcess(t, slices.Concat(args, []string{"-backends", addrs, "-overrides", dir,
		"-move-rate", strconv.Itoa(rate), "-drain-delay", "0", "-drain-duration", drainTime.String()})...)
	p.tls = clients
	p.serve(t)

	moving := leave(t, p.openClosing(t, sessions, namespaces), restarts)
	cpu, before := p.cpuTime(t), p.memory(t)
	for namespace, backend := range pinned(namespaces, 1) {
		must(t, os.WriteFile(filepath.Join(dir, namespace), []byte(backend), 0o644))
	}
	// A namespace is never split: the sessions of the last one move together.
	wantPace(t, "move", moving(), drainTime-drainTime/namespaces)
	line := p.log.wait(t, "move finished", 1)
	if line["moved"] != float64(sessions) || line["namespaces"] != float64(namespaces) || line["cut"] != 0.0 {
		t.Errorf("the log has %v, want %d sessions of %d namespaces and none cut", line, sessions, namespaces)
	}
	t.Logf("move: %s of CPU time; memory in KiB before %v, after %v", p.cpuTime(t)-cpu, before, p.memory(t))
	draining := leave(t, p.openClosing(t, sessions, namespaces), goesAway)
	cpu, second := p.cpuTime(t), p.memory(t)
	if grown := second["VmRSS"] - before["VmRSS"]; grown > 32<<10 && !raced() { // the race detector needs memory of its own
		t.Errorf("with as many sessions as before the move the router has %d KiB more", grown)
	}
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	wantPace(t, "drain", draining(), drainTime)
	state := p.wantSuccess(t)
	t.Logf("drain: %s of CPU time", state.UserTime()+state.SystemTime()-cpu)
}

// serveClosing is a backend that sends nothing until it gets the router's Close frame.
func serveClosing(t *testing.T) func(net.Conn, *bufio.Reader) {
	return func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		if got, err := readFrame(br, true); err != nil || got != goesAway {
			t.Errorf("a backend read %s, %v; want %s", got, err, goesAway)
			return
		}
		conn.Write(closeFrame(closeGoingAway, "", false))
	}
}

// openClosing opens sessions of the namespaces of pinned, one after the other.
func (p *routerProcess) openClosing(t *testing.T, sessions, namespaces int) (open []net.Conn) {
	t.Helper()
	names := slices.Sorted(maps.Keys(pinned(namespaces, 0)))
	for i := range sessions {
		conn := p.ask(t, names[i%namespaces])
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
		open = append(open, conn)
	}
	return open
}

// leave starts to wait for the Close frame of each client, and answers it. The function
// that it returns waits for all of them, and returns when they came, in order.
func leave(t *testing.T, open []net.Conn, want string) func() []time.Time {
	ends := make([]time.Time, len(open))
	var reading sync.WaitGroup
	for i, conn := range open {
		reading.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(6 * patience))
			got, err := readFrame(conn, false)
			ends[i] = time.Now()
			if err != nil || got != want {
				t.Errorf("client %d read %s, %v; want %s", i, got, err, want)
			}
			conn.Write(closeFrame(1000, "", true))
			_, err = io.Copy(io.Discard, conn)
			if _, secure := conn.(*tls.Conn); secure && err != nil {
				t.Errorf("client %d: %v; want close_notify", i, err)
			}
		})
	}
	return func() []time.Time {
		reading.Wait()
		slices.SortFunc(ends, time.Time.Compare)
		return ends
	}
}

// wantPace checks that the times span want, but for a twentieth and a little. How late a
// busy machine is, nobody knows: TestMovePace has the pace without it.
func wantPace(t *testing.T, what string, times []time.Time, want time.Duration) {
	t.Helper()
	took := times[len(times)-1].Sub(times[0])
	t.Logf("%s: %d sessions in %s, want %s (%+.1f %%)", what, len(times), took.Round(time.Millisecond), want, 100*(took.Seconds()/want.Seconds()-1))
	if early := want/20 + 50*time.Millisecond; took < want-early || took > want+patience {
		t.Errorf("%s: %d sessions in %s, want %s, at most %s less", what, len(times), took, want, early)
	}
}
