package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// What the two sides read of a session that moves.
const (
	restarts = `close 1012 "service restart"`
	goesAway = `close 1001 "going away"`
)

// nextWireFrame reads one frame, with a parser of its own: its first byte and its
// payload, of which that of control frames is unmasked. buf is used for it if it
// is large enough.
func nextWireFrame(r io.Reader, masked bool, buf []byte) (first byte, payload []byte, err error) {
	head := make([]byte, 14)
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return 0, nil, err
	}
	if masked != (head[1]&0x80 != 0) {
		return 0, nil, fmt.Errorf("header % x, want masked %v", head[:2], masked)
	}
	size, more := uint64(head[1]&0x7f), 0
	switch size {
	case 126:
		more = 2
	case 127:
		more = 8
	}
	if _, err := io.ReadFull(r, head[6:6+more]); err != nil {
		return 0, nil, fmt.Errorf("within a header: %w", err)
	}
	switch more {
	case 2:
		size = uint64(binary.BigEndian.Uint16(head[6:]))
	case 8:
		size = binary.BigEndian.Uint64(head[6:])
	}
	var key [4]byte
	if masked {
		if _, err := io.ReadFull(r, key[:]); err != nil {
			return 0, nil, fmt.Errorf("within a key: %w", err)
		}
	}
	if uint64(cap(buf)) < size {
		buf = make([]byte, size)
	}
	payload = buf[:size]
	if n, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("at byte %d of %d of a payload: %w", n, size, err)
	}
	for i := 0; i < len(payload) && head[0]&8 != 0; i++ {
		payload[i] ^= key[i%4]
	}
	return head[0], payload, nil
}

// describeFrame is a frame in words.
func describeFrame(first byte, payload []byte) string {
	switch {
	case first&0xf == 8 && len(payload) >= 2:
		return fmt.Sprintf("close %d %q", binary.BigEndian.Uint16(payload), payload[2:])
	case first&0xf == 8:
		return "close"
	}
	return fmt.Sprintf("%x %q", first, payload)
}

// mustFrames reads frames and compares them with want.
func mustFrames(t testing.TB, conn net.Conn, masked bool, want ...string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	for _, want := range want {
		first, payload, err := nextWireFrame(conn, masked, nil)
		if got := describeFrame(first, payload); err != nil || got != want {
			t.Fatalf("read %.200s, %v; want %s", got, err, want)
		}
	}
}

func mustSend(t testing.TB, w io.Writer, frame []byte) {
	t.Helper()
	mustWrite(t, w, string(frame))
}

// The whole parting, step by step: the backend is told, what it says before it
// answers comes to the client, then the client is told, with its own code.
func TestPart(t *testing.T) {
	for name, c := range map[string]struct {
		why    cause
		answer []byte // of the backend; nil for its end
		client string
	}{
		"moved":                      {causeMoved, frameBytes(0x88, false, 2, []byte("\x03\xe9")), restarts},
		"moved, and it ends":         {causeMoved, nil, restarts},
		"drained":                    {causeDrain, frameBytes(0x88, false, 0, nil), goesAway},
		"answered with much to say":  {causeMoved, closeFrame(1000, "bye", false), restarts},
		"answered, and then a frame": {causeMoved, append(closeFrame(1000, "bye", false), frameBytes(0x81, false, 2, []byte("no"))...), restarts},
	} {
		t.Run(name, func(t *testing.T) {
			s := carried(t, quietRelay(t), 0, nil, nil)
			done := make(chan bool, 1)
			if !s.part(c.why, func(cut bool) { done <- cut }) {
				t.Fatal("it does not part")
			}
			mustFrames(t, s.backend, true, goesAway)
			mustSend(t, s.client, frameBytes(0x81, true, 4, []byte("lost")))
			for i := range 3 {
				mustSend(t, s.backend, frameBytes(0x81, false, 1, []byte{'0' + byte(i)}))
				mustFrames(t, s.client, false, fmt.Sprintf("81 \"%d\"", i))
			}
			mustSend(t, s.backend, append(frameBytes(0x81, false, 4, []byte("last")), c.answer...))
			if c.answer == nil {
				s.backend.CloseWrite()
			}
			mustFrames(t, s.client, false, `81 "last"`, c.client)
			mustSend(t, s.client, closeFrame(1000, "", true))
			mustEOF(t, s.client)
			mustEOF(t, s.backend)
			s.wantCause(t, c.why)
			if <-done || s.relay.cut[c.why].Load() != 0 {
				t.Error("it was cut, want it to part")
			}
			if s.part(causeDrain, nil) {
				t.Error("it parts again")
			}
		})
	}
}

// The sides' own Close frames are carried, and none is put after one.
func TestPartAlreadyClosing(t *testing.T) {
	for name, by := range map[string]side{"by the client": client, "by the backend": server} {
		t.Run(name, func(t *testing.T) {
			s := carried(t, quietRelay(t), 0, nil, nil)
			ends := [2]net.Conn{s.client, s.backend}
			first, second := ends[by], ends[by.peer()]
			mustSend(t, first, closeFrame(1000, "bye", by == client))
			mustFrames(t, second, by == client, `close 1000 "bye"`)
			s.part(causeMoved, nil)
			if by == server {
				mustFrames(t, s.backend, true, goesAway)
			}
			mustSend(t, second, closeFrame(1000, "yes", by == server))
			if by == client {
				mustFrames(t, first, false, `close 1000 "yes"`)
			}
			mustEOF(t, s.client)
			mustEOF(t, s.backend)
			s.wantCause(t, causeMoved)
			if s.relay.cut[causeMoved].Load() != 0 {
				t.Error("it was cut, want it to part")
			}
		})
	}
	t.Run("by the client, with the end of a frame", func(t *testing.T) {
		s := carried(t, quietRelay(t), 0, nil, nil)
		frame := frameBytes(0x81, true, 2, []byte("hi"))
		mustSend(t, s.client, frame[:5])
		mustRead(t, s.backend, string(frame[:5]))
		s.part(causeMoved, nil)
		mustSend(t, s.client, append(bytes.Clone(frame[5:]), closeFrame(1000, "bye", true)...))
		mustRead(t, s.backend, string(frame[5:]))
		mustFrames(t, s.backend, true, `close 1000 "bye"`)
		mustSend(t, s.backend, closeFrame(1000, "yes", false))
		mustFrames(t, s.client, false, `close 1000 "yes"`)
		s.wantCause(t, causeMoved)
	})
}

// What a side has not taken yet goes before its Close frame, however much of it
// that is: of some of the sizes here all that is held ends with a frame.
func TestPartAfterWhatIsHeld(t *testing.T) {
	for i, want := range []string{goesAway, restarts} {
		r := quietRelay(t)
		r.closing = 4 * time.Second
		var all sync.WaitGroup
		for frames := 60; frames < 460; frames += 20 {
			client, near := unixPair(t)
			far, backend := unixPair(t)
			s := &session{namespace: "ns-01"}
			r.carry(s, [2]net.Conn{near, far}, [2][]byte{})
			from, to := client, backend
			if i == 1 {
				from, to = backend, client
			}
			frame := frameBytes(0x82, i == 0, 1000, make([]byte, 1000))
			from.SetWriteDeadline(time.Now().Add(patience))
			all.Go(func() { io.WriteString(from, strings.Repeat(string(frame), frames)) }) // the last may not be taken
			all.Go(func() {
				held := -1
				for n := int64(-1); n != s.bytes()[i]; <-time.After(50 * time.Millisecond) {
					n = s.bytes()[i] // until no more is taken
					held = int(n)
				}
				s.part(causeMoved, nil)
				if i == 1 { // it is due when the backend's time is over
					<-time.After(r.closing * 5 / 8)
				}
				to.SetReadDeadline(time.Now().Add(patience))
				for n := 0; ; n++ {
					first, payload, err := nextWireFrame(to, i == 0, nil)
					if first == 0x82 && len(payload) == 1000 && n < frames && err == nil {
						continue
					}
					if got := describeFrame(first, payload); err != nil || got != want || (n+1)*len(frame) < held {
						t.Errorf("from side %d: %.100s, %v after %d frames of %d, with %d bytes held; want %s", i, got, err, n, frames, held, want)
					}
					break
				}
				client.Close()
				backend.Close()
			})
		}
		all.Wait()
		waitFor(t, r)
	}
}

// A client that has ended its half and reads late gets all there is, to the Close
// frame of the backend, which was not asked for it.
func TestPartLateReader(t *testing.T) {
	r := quietRelay(t)
	var all sync.WaitGroup
	for frames := 60; frames < 460; frames += 20 {
		client, near := unixPair(t)
		far, backend := unixPair(t)
		s := &session{namespace: "ns-01"}
		r.carry(s, [2]net.Conn{near, far}, [2][]byte{})
		client.CloseWrite()
		mustEOF(t, backend)
		frame := frameBytes(0x82, false, 1000, make([]byte, 1000))
		stream := strings.Repeat(string(frame), frames) + string(closeFrame(1000, "", false))
		all.Go(func() { io.WriteString(backend, stream) })
		all.Go(func() {
			for n := int64(-1); n != s.bytes()[server]; <-time.After(50 * time.Millisecond) {
				n = s.bytes()[server] // until no more is taken
			}
			s.part(causeMoved, nil)
			client.SetReadDeadline(time.Now().Add(patience))
			if got, err := io.ReadAll(client); err != nil || string(got) != stream {
				t.Errorf("%d frames: %d bytes, %v; want %d", frames, len(got), err, len(stream))
			}
		})
	}
	all.Wait()
	waitFor(t, r)
}

// A Close frame waits for the end of a frame that is on its way, however that
// comes: cut anywhere, with the next one behind it.
func TestPartWithinAFrame(t *testing.T) {
	next := func(masked bool) []byte { return frameBytes(0x82, masked, 300, make([]byte, 300)) }
	for _, size := range []int{0, 5, 200, 70_000} {
		payload := bytes.Repeat([]byte("x"), size)
		up, down := frameBytes(0x81, true, uint64(size), payload), frameBytes(0x81, false, uint64(size), payload)
		for _, cut := range []int{1, 2, 3, 4, 7, len(down) - 1} {
			if cut >= len(down) {
				continue
			}
			s := carried(t, quietRelay(t), 0, nil, nil)
			mustSend(t, s.client, up[:cut])
			mustSend(t, s.backend, down[:cut])
			mustRead(t, s.backend, string(up[:cut]))
			mustRead(t, s.client, string(down[:cut]))
			s.part(causeMoved, nil)
			mustSend(t, s.client, append(bytes.Clone(up[cut:]), next(true)...))
			mustRead(t, s.backend, string(up[cut:]))
			mustFrames(t, s.backend, true, goesAway)
			mustSend(t, s.backend, append(bytes.Clone(down[cut:]), closeFrame(1001, "", false)...))
			mustRead(t, s.client, string(down[cut:]))
			mustFrames(t, s.client, false, restarts)
			s.client.Close()
			mustEOF(t, s.backend)
			s.wantCause(t, causeMoved)
		}
	}
}

// A Close frame waits for the end of a message from the client, whose fragments may
// have control frames between them (RFC 6455 §5.4).
func TestPartWithinAMessage(t *testing.T) {
	s := carried(t, quietRelay(t), 0, nil, nil)
	for _, first := range []byte{0x01, 0x00} {
		mustSend(t, s.client, frameBytes(first, true, 2, []byte("ab")))
		mustFrames(t, s.backend, true, fmt.Sprintf("%x \"ab\"", first))
		s.part(causeMoved, nil) // the second time nothing
		mustSend(t, s.client, frameBytes(0x89, true, 0, nil))
		mustFrames(t, s.backend, true, `89 ""`)
	}
	mustSend(t, s.client, append(frameBytes(0x80, true, 2, []byte("ef")), frameBytes(0x81, true, 2, []byte("no"))...))
	mustFrames(t, s.backend, true, `80 "ef"`, goesAway)
	mustSend(t, s.backend, closeFrame(1001, "", false))
	mustFrames(t, s.client, false, restarts)
	s.client.Close()
	mustEOF(t, s.backend)
	s.wantCause(t, causeMoved)
}

// talker is one end of a session that sends frames until it is told to stop.
type talker struct {
	conn   net.Conn
	masked bool // what it sends
	size   int
	firsts []byte // the first bytes of its frames, in turn
	noise  []byte
	rng    *rand.Rand
}

// frame is the k-th frame of who has these firsts.
func (a *talker) frame(k int, masked bool) (first byte, payload []byte) {
	first = a.firsts[k%len(a.firsts)]
	size := a.size
	if first&8 != 0 {
		size = min(size, 125)
	}
	return first, a.noise[k%1000:][:size]
}

// talk writes whole frames, in pieces of any size, until stop is closed, and then
// a Close frame.
func (a *talker) talk(stop <-chan struct{}) error {
	for k := 0; ; k++ {
		select {
		case <-stop:
			_, err := a.conn.Write(closeFrame(1000, "", a.masked))
			return err
		default:
		}
		first, payload := a.frame(k, a.masked)
		for rest := frameBytes(first, a.masked, uint64(len(payload)), payload); len(rest) > 0; {
			n := 1 + logUniform(a.rng, len(rest)-1)
			if _, err := a.conn.Write(rest[:n]); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			rest = rest[n:]
		}
	}
}

// hear reads frames and compares each, until a Close frame, after which nothing
// may come. It calls told then, and returns that frame and how many came before.
func (a *talker) hear(told func()) (closed string, frames int, err error) {
	r, buf := bufio.NewReaderSize(a.conn, 64<<10), make([]byte, a.size)
	for k := 0; ; k++ {
		first, got, err := nextWireFrame(r, !a.masked, buf)
		if err != nil {
			told()
			return "", k, fmt.Errorf("frame %d: %w", k, err)
		}
		if first&0xf == 8 {
			told()
			more, err := io.Copy(io.Discard, r)
			if more > 0 {
				err = fmt.Errorf("%d bytes after the Close frame", more)
			}
			return describeFrame(first, got), k, err
		}
		wantFirst, want := a.frame(k, !a.masked)
		if first&8 != 0 && !a.masked { // frameBytes takes it as masked
			for i := range got {
				got[i] ^= "mask"[i%4]
			}
		}
		if first != wantFirst || !bytes.Equal(got, want) {
			told()
			return "", k, fmt.Errorf("frame %d is %x with %d bytes, want %x with %d and the same ones", k, first, len(got), wantFirst, len(want))
		}
	}
}

// Close frames put into full streams, both at once: all that comes before is what
// was sent, in whole frames, and nothing comes after.
//
// It fails if a Close frame is put where a frame has not ended, or after what a
// side did not take was forgotten; if the rest of a chunk is sent after it; if
// the backend's own Close frame is carried.
func TestPartInFullFlow(t *testing.T) {
	single, fragments := []byte{0x82}, []byte{0x02, 0x00, 0x89, 0x00, 0x80, 0x8a}
	for name, c := range map[string]struct {
		size   int
		firsts []byte
		rounds int
	}{
		"64 B":              {64, single, 20},
		"64 B, fragments":   {64, fragments, 10},
		"64 KiB":            {64 << 10, single, 10},
		"64 KiB, fragments": {64 << 10, fragments, 10},
		"16 MiB":            {16 << 20, single, 2},
		"16 MiB, fragments": {16 << 20, fragments, 1},
	} {
		t.Run(name, func(t *testing.T) {
			seed := randomSeed(t)
			rng := rand.New(rand.NewPCG(seed, 0))
			noise := make([]byte, c.size+1000)
			copy(noise, bytes.Repeat(newNoise(seed), 1+len(noise)/noiseSize))
			for range c.rounds {
				r := quietRelay(t)
				r.closing = 2 * patience
				s := carried(t, r, 0, nil, nil)
				var ends [2]*talker
				for i, conn := range []net.Conn{s.client, s.backend} {
					conn.SetDeadline(time.Now().Add(2 * patience))
					ends[i] = &talker{conn: conn, masked: i == 0, size: c.size, firsts: c.firsts, noise: noise,
						rng: rand.New(rand.NewPCG(rng.Uint64(), 0))}
				}
				var both sync.WaitGroup
				for i, want := range []string{restarts, goesAway} {
					stop := make(chan struct{})
					told := sync.OnceFunc(func() { close(stop) })
					var writer sync.WaitGroup
					both.Go(func() {
						closed, frames, err := ends[i].hear(told)
						if err != nil || closed != want {
							t.Errorf("side %d: %s, %v after %d frames; want %s and EOF", i, closed, err, frames, want)
						}
						writer.Wait()
					})
					writer.Go(func() {
						if err := ends[i].talk(stop); err != nil {
							t.Errorf("side %d: %v", i, err)
						}
					})
				}
				at := int64(rng.IntN(2 * c.size)) // let that much pass at first
				for end := time.Now().Add(patience); s.bytes()[server] <= at && time.Now().Before(end); {
					time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
				}
				s.part(causeMoved, nil)
				both.Wait()
				waitFor(t, r)
				if got := r.cut[causeMoved].Load(); got != 0 {
					t.Errorf("%d were cut, want none", got)
				}
			}
		})
	}
}

// Another implementation at both ends, through the proxy.
func TestPartLibrary(t *testing.T) {
	heard := make(chan string, 1)
	addr := websocketBackend(t, func(ws *websocket.Conn) {
		websocket.Message.Send(ws, "hello")
		heard <- readClose(ws)
		websocket.Message.Send(ws, "last")
		ws.WriteClose(1001)
	})
	p := startProxy(t, []string{addr}, map[string]string{}, nil)
	ws, err := websocket.Dial("ws://"+p.addr+"/ws/ns-01", "", "http://origin.example/")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	ws.SetDeadline(time.Now().Add(patience))
	var message string
	if err := websocket.Message.Receive(ws, &message); err != nil || message != "hello" {
		t.Fatalf("%q, %v", message, err)
	}
	for _, s := range p.relay.where(func(*session) bool { return true }) {
		s.part(causeMoved, nil)
	}
	if got, want := <-heard, `type 8, code 1001, reason "going away"`; got != want {
		t.Errorf("the backend read %s, want %s", got, want)
	}
	if err := websocket.Message.Receive(ws, &message); err != nil || message != "last" {
		t.Errorf("the client got %q, %v; want what the backend said after it was told", message, err)
	}
	if got, want := readClose(ws), `type 8, code 1012, reason "service restart"`; got != want {
		t.Errorf("the client read %s, want %s", got, want)
	}
	ws.Close()
	waitFor(t, p.relay)
}

// Who does not go along is waited for within bounds: the client is told in half
// of the time whatever the backend does, if it can be told at all.
func TestPartBounds(t *testing.T) {
	const bound = 1200 * time.Millisecond
	quarter, half, whole, none := bound/4, bound/2, bound, time.Duration(0)
	part := frameBytes(0x01, true, 2, []byte("ab")) // of a message

	up, down := frameBytes(0x81, true, 9, []byte("ab")), frameBytes(0x81, false, 9, []byte("ab")) // 7 bytes are missing
	for name, c := range map[string]struct {
		before func(t *testing.T, s relayed) // that it is to part
		after  func(t *testing.T, s relayed)
		took   time.Duration
		cut    bool
	}{
		"the client does not answer": {nil, func(t *testing.T, s relayed) {
			s.backend.Close()
			mustFrames(t, s.client, false, restarts)
			mustEOF(t, s.client)
		}, whole, true},
		"the client answers late": {nil, func(t *testing.T, s relayed) {
			mustFrames(t, s.backend, true, goesAway)
			mustSend(t, s.backend, closeFrame(1001, "", false))
			mustFrames(t, s.client, false, restarts)
			<-time.After(bound * 2 / 3)
			mustSend(t, s.client, closeFrame(1000, "", true))
			mustEOF(t, s.client)
			mustEOF(t, s.backend)
		}, bound * 2 / 3, false},
		"the backend does not answer": {nil, func(t *testing.T, s relayed) {
			mustFrames(t, s.backend, true, goesAway)
			mustFrames(t, s.client, false, restarts)
			mustReset(t, s.backend)
			mustSend(t, s.client, closeFrame(1000, "", true))
			mustEOF(t, s.client)
		}, half, true},
		"the backend breaks": {nil, func(t *testing.T, s relayed) {
			reset(s.backend)
			mustFrames(t, s.client, false, restarts)
			s.client.Close()
		}, none, false},
		"the client breaks": {nil, func(t *testing.T, s relayed) {
			reset(s.client)
			mustFrames(t, s.backend, true, goesAway)
			s.backend.Close()
		}, none, false},
		"the client is within a frame": {func(t *testing.T, s relayed) {
			mustSend(t, s.client, up)
			mustRead(t, s.backend, string(up))
		}, func(t *testing.T, s relayed) {
			mustFrames(t, s.client, false, restarts)
			mustReset(t, s.backend)
			s.client.Close()
		}, half, true},
		"the client is within a message": {func(t *testing.T, s relayed) {
			mustSend(t, s.client, part)
			mustFrames(t, s.backend, true, `1 "ab"`)
		}, func(t *testing.T, s relayed) {
			mustFrames(t, s.backend, true, goesAway)
			s.backend.Close()
			mustFrames(t, s.client, false, restarts)
			s.client.Close()
		}, quarter, false},
		"the client ends within a message": {func(t *testing.T, s relayed) {
			mustSend(t, s.client, part)
			mustFrames(t, s.backend, true, `1 "ab"`)
		}, func(t *testing.T, s relayed) {
			closeWrite(t, s.client)
			mustFrames(t, s.backend, true, goesAway)
			s.backend.Close()
			mustFrames(t, s.client, false, restarts)
		}, none, false},
		"the backend is within a frame": {func(t *testing.T, s relayed) {
			mustSend(t, s.backend, down)
			mustRead(t, s.client, string(down))
		}, func(t *testing.T, s relayed) {
			mustFrames(t, s.backend, true, goesAway)
			mustEOF(t, s.client)
		}, whole, true},
		"the backend gets to the end of its frame late": {func(t *testing.T, s relayed) {
			mustSend(t, s.backend, down)
			mustRead(t, s.client, string(down))
		}, func(t *testing.T, s relayed) {
			<-time.After(bound * 2 / 3)
			mustSend(t, s.backend, append([]byte("cdefghi"), frameBytes(0x81, false, 2, []byte("no"))...))
			mustRead(t, s.client, "cdefghi")
			mustFrames(t, s.client, false, restarts)
			mustReset(t, s.backend)
			s.client.Close()
		}, bound * 2 / 3, true},
		"the backend ends within a frame": {func(t *testing.T, s relayed) {
			mustSend(t, s.backend, down)
			mustRead(t, s.client, string(down))
		}, func(t *testing.T, s relayed) {
			s.backend.Close()
			mustEOF(t, s.client)
		}, none, true},
		"no frames from the client": {func(t *testing.T, s relayed) {
			mustWrite(t, s.client, "GET / HTTP/1.1\r\n")
			mustRead(t, s.backend, "GET / HTTP/1.1\r\n")
		}, func(t *testing.T, s relayed) {
			mustEOF(t, s.client)
			mustEOF(t, s.backend)
		}, none, true},
		"no frames from the backend": {func(t *testing.T, s relayed) {
			mustWrite(t, s.backend, "HTTP/1.1 200 OK\r\n")
			mustRead(t, s.client, "HTTP/1.1 200 OK\r\n")
		}, func(t *testing.T, s relayed) {
			mustEOF(t, s.client)
			mustBreak(t, s.backend)
		}, none, true},
		"the client reads nothing": {func(t *testing.T, s relayed) {
			for stuff := stuffFrames(s.backend, false); stuff; stuff = stuffFrames(s.backend, false) {
			}
		}, func(t *testing.T, s relayed) {
			mustBreak(t, s.backend)
		}, whole, true},
		"the backend reads nothing": {func(t *testing.T, s relayed) {
			for stuff := stuffFrames(s.client, true); stuff; stuff = stuffFrames(s.client, true) {
			}
		}, func(t *testing.T, s relayed) {
			mustFrames(t, s.client, false, restarts)
			s.client.Close()
		}, half, true},
		"the client has ended": {func(t *testing.T, s relayed) {
			closeWrite(t, s.client)
			mustEOF(t, s.backend)
		}, func(t *testing.T, s relayed) {
			mustSend(t, s.backend, frameBytes(0x81, false, 4, []byte("last")))
			s.backend.Close()
			mustFrames(t, s.client, false, `81 "last"`, restarts)
			mustEOF(t, s.client)
		}, none, false},
		"the backend has ended": {func(t *testing.T, s relayed) {
			closeWrite(t, s.backend)
			mustEOF(t, s.client)
		}, func(t *testing.T, s relayed) {
			mustFrames(t, s.backend, true, goesAway)
			s.client.Close()
		}, none, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := quietRelay(t)
			r.closing = bound
			s := carried(t, r, 0, nil, nil)
			if c.before != nil {
				c.before(t, s)
			}
			begun := time.Now()
			s.part(causeMoved, nil)
			c.after(t, s)
			s.wantCause(t, causeMoved)
			if took := time.Since(begun); took < c.took || took > c.took+half {
				t.Errorf("it was over after %s, want %s and at most %s more", took, c.took, half)
			}
			if got := r.cut[causeMoved].Load() == 1; got != c.cut {
				t.Errorf("cut is %v, want %v", got, c.cut)
			}
		})
	}
}

// What bounds a session that is half closed does not count for one that parts: the
// client is told all the same.
func TestPartAfterHalfClose(t *testing.T) {
	r := quietRelay(t)
	r.linger, r.closing = 100*time.Millisecond, 800*time.Millisecond
	s := carried(t, r, 0, nil, nil)
	closeWrite(t, s.client)
	mustEOF(t, s.backend)
	s.part(causeMoved, nil)
	mustFrames(t, s.client, false, restarts)
	mustEOF(t, s.client)
	s.wantCause(t, causeMoved)
}

// mustReset reads until an error, which is to be a reset and not an end.
func mustReset(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read ends with %v, want a reset", err)
	}
}

// stuffFrames writes a frame, and reports whether it was taken.
func stuffFrames(conn net.Conn, masked bool) bool {
	conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	_, err := conn.Write(frameBytes(0x82, masked, 32<<10, make([]byte, 32<<10)))
	return err == nil
}

// A session that is to part before its hand-over is done has its Close frames
// all the same, after what came with the handshake.
func TestPartAtHandOver(t *testing.T) {
	r := quietRelay(t)
	client, clientFar := tcpPair(t)
	server, serverFar := tcpPair(t)
	s := newSession("ns-01", 0, "")
	ends := [2]net.Conn{clientFar, server}
	r.carrier.attach(s, ends)
	if !s.part(causeMoved, nil) {
		t.Fatal("it does not part")
	}
	r.open.Add(1)
	r.add(s)
	r.carrier.begin(s, ends, [2][]byte{nil, frameBytes(0x81, false, 5, []byte("early"))})
	mustFrames(t, serverFar, true, goesAway)
	serverFar.Close()
	mustFrames(t, client, false, `81 "early"`, restarts)
	client.Close()
	relayed{session: s, relay: r}.wantCause(t, causeMoved)
}

// A session that is ended while it is handed over, between its registration and its
// start, ends when it starts.
func TestRelayEndsAtHandOver(t *testing.T) {
	r := quietRelay(t)
	client, clientFar := tcpPair(t)
	server, serverFar := tcpPair(t)
	s := newSession("ns-01", 0, "")
	ends := [2]net.Conn{clientFar, server}
	r.carrier.attach(s, ends)
	r.take(s, func() {
		s.end(causeDrain)
		r.carrier.begin(s, ends, [2][]byte{})
	})
	relayed{session: s, relay: r}.wantCause(t, causeDrain)
	mustBreak(t, client)
	mustBreak(t, serverFar)
}

// However many ends come at once, done is called once.
func TestPartEndsOnce(t *testing.T) {
	r := quietRelay(t)
	for range 100 {
		c := carried(t, r, 0, nil, nil)
		var all sync.WaitGroup
		var parted, done atomic.Int64
		part := func() {
			if c.part(causeMoved, func(bool) { done.Add(1) }) {
				parted.Add(1)
			}
		}
		for _, end := range []func(){part, part, func() { c.end(causeDrain) }, func() { reset(c.client) }, func() { c.backend.Close() }} {
			all.Go(end)
		}
		all.Wait()
		waitFor(t, r)
		if parted.Load() != done.Load() {
			t.Fatalf("it parted %d times and was done %d times", parted.Load(), done.Load())
		}
	}
}
