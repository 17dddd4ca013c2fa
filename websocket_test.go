package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// frameBytes returns a frame with its length in the fewest bytes. The header says
// length, even if payload is shorter. payload goes into the frame unchanged: it is
// not masked.
func frameBytes(first byte, masked bool, length uint64, payload []byte) []byte {
	mask := byte(0)
	if masked {
		mask = 0x80
	}
	frame := []byte{first}
	switch {
	case length < 126:
		frame = append(frame, mask|byte(length))
	case length < 1<<16:
		frame = binary.BigEndian.AppendUint16(append(frame, mask|126), uint16(length))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, mask|127), length)
	}
	if masked {
		frame = append(frame, "mask"...)
	}
	return append(frame, payload...)
}

// frameStream is what one side sends.
type frameStream struct {
	stream []byte
	masked bool
}

// frameViolations are streams whose last byte shows the violation.
var frameViolations = map[string]frameStream{
	"client without mask":         {[]byte{0x81, 0x05}, true},
	"client without mask, long":   {[]byte{0x81, 0x7e}, true},
	"backend with mask":           {[]byte{0x81, 0x85}, false},
	"opcode 3":                    {[]byte{0x83}, true},
	"opcode 7":                    {[]byte{0x87}, false},
	"opcode 11":                   {[]byte{0x8b}, false},
	"opcode 15":                   {[]byte{0x8f}, true},
	"fragment of a close":         {[]byte{0x08}, false},
	"fragment of a ping":          {[]byte{0x09}, true},
	"ping of 126 bytes":           {[]byte{0x89, 0xfe}, true},
	"close of 64 bits":            {[]byte{0x88, 0x7f}, false},
	"length of 2^63":              {[]byte{0x82, 0x7f, 0x80, 0, 0, 0, 0, 0, 0, 0}, false},
	"length of 2^64-1, masked":    {[]byte{0x82, 0xff, 255, 255, 255, 255, 255, 255, 255, 255}, true},
	"HTTP":                        {[]byte("G"), true},
	"after a frame":               {[]byte{0x81, 0x01, 'x', 0x83}, false},
	"after a fragment and a pong": {[]byte{0x01, 0x80, 'm', 'a', 's', 'k', 0x8a, 0x80, 'm', 'a', 's', 'k', 0x80, 0x00}, true},
}

// frameStreams returns streams with every form of a header, every violation and every
// end, each with more bytes behind it.
func frameStreams() (all []frameStream) {
	for _, masked := range []bool{true, false} {
		next := frameBytes(0x81, masked, 3, []byte("abc"))
		for _, first := range []byte{0x81, 0x82, 0x01, 0x00, 0x80, 0xc1, 0xf2, 0x89, 0x8a} {
			for _, size := range []int{0, 1, 125, 126, 127, 65535, 65536} {
				if first&8 == 0 || size <= maxControlPayload {
					frame := frameBytes(first, masked, uint64(size), bytes.Repeat([]byte{0x83}, size))
					all = append(all, frameStream{append(frame, next...), masked})
				}
			}
		}
		for _, body := range []string{"", "\x03\xe8", "\x03\xf4service restart"} {
			part := frameBytes(0x01, masked, 1, []byte("x"))
			end := frameBytes(0x88, masked, uint64(len(body)), []byte(body))
			all = append(all, frameStream{slices.Concat(part, end, next, []byte{0x83, 0xff}), masked})
		}
		longest := frameBytes(0x82, masked, math.MaxInt64, []byte("abc"))
		all = append(all, frameStream{longest, masked})
	}
	for _, c := range frameViolations {
		next := frameBytes(0x81, c.masked, 1, []byte("x"))
		all = append(all, frameStream{slices.Concat(c.stream, next, make([]byte, 200)), c.masked})
	}
	return append(all, // lengths in more bytes than they need
		frameStream{[]byte{0x81, 126, 0, 3, 'a', 'b', 'c'}, false},
		frameStream{[]byte{0x81, 127, 0, 0, 0, 0, 0, 0, 0, 0}, false},
		frameStream{[]byte{0x81, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 'm', 'a', 's', 'k', 'x'}, true})
}

// The scanner follows every stream, in two chunks, cut at every byte.
func TestFramesCutAnywhere(t *testing.T) {
	for _, c := range frameStreams() {
		views := frameOracle(c.stream, c.masked)
		for cut, want := range views {
			var f frameScanner
			if f.scan(c.stream[:cut], c.masked); viewOf(&f) != want {
				t.Fatalf("%.20q, after %d of %d bytes: %+v, want %+v", c.stream, cut, len(c.stream), viewOf(&f), want)
			}
			if f.scan(c.stream[cut:], c.masked); viewOf(&f) != views[len(c.stream)] {
				t.Fatalf("%.20q, cut after %d bytes: %+v, want %+v", c.stream, cut, viewOf(&f), views[len(c.stream)])
			}
		}
	}
	for name, c := range frameViolations {
		views, last := frameOracle(c.stream, c.masked), len(c.stream)
		if views[last-1].broken || !views[last].broken {
			t.Errorf("%s: %+v and then %+v, want the last byte to break it", name, views[last-1], views[last])
		}
	}
}

// Hundreds of thousands of sessions have two scanners each.
func TestFrameScannerIsSmall(t *testing.T) {
	if size := reflect.TypeFor[frameScanner]().Size(); size > 16 {
		t.Errorf("a scanner has %d bytes, want at most 16", size)
	}
	var f frameScanner
	chunk := manyFrames(rand.New(rand.NewPCG(1, 1)), true, 100)
	wantEqual(t, "allocations in a scan", testing.AllocsPerRun(100, func() { f.scan(chunk, true) }), 0)
}

// tapped is a connection that records its traffic.
type tapped struct {
	net.Conn
	read, written []byte
}

func (c *tapped) Read(b []byte) (n int, err error) {
	n, err = c.Conn.Read(b)
	c.read = append(c.read, b[:n]...)
	return n, err
}

func (c *tapped) Write(b []byte) (n int, err error) {
	c.written = append(c.written, b...)
	return c.Conn.Write(b)
}

// The scanner follows the frames of another implementation, in both directions.
func TestFramesOfLibrary(t *testing.T) {
	addr := websocketBackend(t, func(ws *websocket.Conn) {
		var message []byte
		for websocket.Message.Receive(ws, &message) == nil {
			websocket.Message.Send(ws, message)
		}
		ws.WriteClose(1000)
	})
	config, err := websocket.NewConfig("ws://"+addr, "http://origin.example/")
	must(t, err)
	tap := &tapped{Conn: dial(t, addr)}
	tap.SetDeadline(time.Now().Add(patience))
	ws, err := websocket.NewClient(config, tap)
	must(t, err)
	sizes := []int{0, 1, 125, 126, 127, 65535, 65536, 200_000}
	for _, size := range sizes {
		sayAndHear(t, ws, strings.Repeat("x", size))
	}
	ws.PayloadType = websocket.PingFrame
	ws.Write([]byte("ping"))
	ws.WriteClose(1000)
	io.Copy(io.Discard, ws) // the pong, and the server's Close
	for name, c := range map[string]struct {
		stream []byte
		masked bool
		frames int
	}{"from the client": {tap.written, true, len(sizes) + 2}, "from the backend": {tap.read, false, len(sizes) + 2}} {
		_, stream, _ := bytes.Cut(c.stream, []byte("\r\n\r\n"))
		var f frameScanner
		frames := 0
		for ; !f.closed() && len(stream) > 0; frames++ {
			stream = stream[f.next(stream, c.masked):]
		}
		if !f.closed() || frames != c.frames || len(stream) > 0 {
			t.Errorf("%s: %d frames, %d bytes left, %+v, want %d frames with a Close at the end",
				name, frames, len(stream), viewOf(&f), c.frames)
		}
	}
}

// A Close frame has the code, and as many whole characters of the reason as it may have.
func TestCloseFrame(t *testing.T) {
	for name, c := range map[string]struct {
		code         uint16
		reason, want string
	}{
		"no reason":           {closeGoingAway, "", ""},
		"move":                {closeServiceRestart, "service restart", "service restart"},
		"longest":             {closeServiceRestart, strings.Repeat("x", 123), strings.Repeat("x", 123)},
		"too long":            {closeGoingAway, strings.Repeat("x", 124), strings.Repeat("x", 123)},
		"fits to the byte":    {closeGoingAway, "x" + strings.Repeat("é", 61), "x" + strings.Repeat("é", 61)},
		"cut before 2 bytes":  {closeGoingAway, strings.Repeat("é", 62), strings.Repeat("é", 61)},
		"cut before 4 bytes":  {closeGoingAway, strings.Repeat("🚪", 1000), strings.Repeat("🚪", 30)},
		"not UTF-8, too long": {closeGoingAway, strings.Repeat("\x80", 200), ""},
	} {
		for _, masked := range []bool{false, true} {
			frame := bytes.NewReader(closeFrame(c.code, c.reason, masked))
			got, err := readFrame(frame, masked)
			if want := fmt.Sprintf("close %d %q", c.code, c.want); got != want || err != nil || frame.Len() > 0 {
				t.Errorf("%s, masked %v: %s, %v and %d bytes more; want %s", name, masked, got, err, frame.Len(), want)
			}
		}
	}
}

// Each Close frame has a new masking key. The same key twice in a row has a chance of
// 1 in 2^32.
func TestCloseFrameKeys(t *testing.T) {
	keys := map[string]bool{}
	for range 10 {
		keys[string(closeFrame(closeGoingAway, "", true)[2:6])] = true
	}
	if len(keys) < 9 {
		t.Errorf("%d keys in 10 frames, want a new one in each", len(keys))
	}
}

// FuzzFrames compares the scanner with a parser of the whole stream, however the stream
// is cut into chunks.
func FuzzFrames(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, c := range append(frameStreams(), frameStream{manyFrames(rng, true, 3), true}, frameStream{manyFrames(rng, false, 3), false}) {
		f.Add(c.stream, c.masked, rng.Uint64())
	}
	f.Fuzz(func(t *testing.T, stream []byte, masked bool, seed uint64) {
		wantOracle(t, stream, masked, rand.New(rand.NewPCG(seed, seed)))
	})
}

// TestFramesInRandomChunks is the fuzz test with streams that go far: thousands
// of valid frames, and one byte that is wrong somewhere.
func TestFramesInRandomChunks(t *testing.T) {
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 0))
		masked := seed%2 == 0
		stream := manyFrames(rng, masked, 40)
		if views := frameOracle(stream, masked); !views[len(stream)].boundary {
			t.Fatalf("seed %d: the stream ends at %+v, want a boundary", seed, views[len(stream)])
		}
		wantOracle(t, stream, masked, rng)
		stream[rng.IntN(len(stream))] ^= 1 << rng.IntN(8)
		wantOracle(t, stream, masked, rng)
	}
}

// manyFrames returns count valid frames of all kinds but Close.
func manyFrames(rng *rand.Rand, masked bool, count int) (stream []byte) {
	for range count {
		first := []byte{0x00, 0x80, 0x01, 0x82, 0xc1, 0x41, 0x89, 0x8a, 0xba}[rng.IntN(9)]
		length := rng.IntN(126)
		if first&8 == 0 && rng.IntN(20) == 0 {
			length = []int{126, 127, 65535, 65536, 70000}[rng.IntN(5)]
		}
		stream = append(stream, frameBytes(first, masked, uint64(length), bytes.Repeat([]byte{byte(rng.Uint32())}, length))...)
	}
	return stream
}

// wantOracle advances a scanner over the stream in random chunks, by all its
// methods, and compares it with frameOracle after each.
func wantOracle(t *testing.T, stream []byte, masked bool, rng *rand.Rand) {
	t.Helper()
	views := frameOracle(stream, masked)
	limit := []int{1, 3, 20, 1000, 1 << 17}[rng.IntN(5)]
	var f frameScanner
	for at := 0; ; {
		if got := viewOf(&f); got != views[at] {
			t.Fatalf("after %d of %d bytes, masked %v: %+v, want %+v", at, len(stream), masked, got, views[at])
		}
		if at == len(stream) {
			return
		}
		chunk := stream[at:min(len(stream), at+rng.IntN(limit+1))]
		switch rest := f.remaining(); {
		case rest > 0 && rng.IntN(2) == 0:
			n := min(rest, uint64(len(chunk)))
			f.skip(n)
			at += int(n)
		case rng.IntN(2) == 0:
			n, want := f.next(chunk, masked), len(chunk)
			if i := slices.IndexFunc(views[at+1:at+1+want], func(v frameView) bool { return v.boundary }); i >= 0 {
				want = i + 1
			}
			if n != want {
				t.Fatalf("next after %d of %d bytes, masked %v: %d of %d bytes, want %d", at, len(stream), masked, n, len(chunk), want)
			}
			at += n
		default:
			f.scan(chunk, masked)
			at += len(chunk)
		}
	}
}

// frameView has the results of all methods of a scanner.
type frameView struct {
	boundary, complete, closed, broken bool // complete: only at a boundary
	remaining                          uint64
}

func viewOf(f *frameScanner) frameView {
	return frameView{f.atBoundary(), f.atBoundary() && f.messageComplete(), f.closed(), f.broken(), f.remaining()}
}

// frameOracle returns the expected view after each number of bytes of the stream, from
// none to all.
func frameOracle(stream []byte, masked bool) (views []frameView) {
	views = make([]frameView, len(stream)+1)
	complete := true
	for at := 0; at <= len(stream); {
		views[at].boundary, views[at].complete = true, complete
		header, rest, wrong := frameOracleHeader(stream[at:], masked)
		switch {
		case wrong > 0:
			return append(views[:at+wrong], slices.Repeat([]frameView{{broken: true}}, len(stream)+1-at-wrong)...)
		case header == 0:
			return views
		}
		first := stream[at]
		if first&8 == 0 {
			complete = first&0x80 != 0
		}
		for at += header; rest > 0 && at <= len(stream); at++ {
			views[at].remaining = rest
			rest--
		}
		if first&0xf == 8 && at <= len(stream) {
			return append(views[:at], slices.Repeat([]frameView{{closed: true}}, len(stream)+1-at)...)
		}
	}
	return views
}

// frameOracleHeader returns the length of the header up to the masking key, or 0 if
// b does not have all of it, and how many bytes follow. If the header is a
// violation, wrong is the number of bytes that show it; otherwise it is 0.
func frameOracleHeader(b []byte, masked bool) (header int, rest uint64, wrong int) {
	if len(b) == 0 {
		return 0, 0, 0
	}
	control := bytes.IndexByte([]byte{0x88, 0x89, 0x8a}, b[0]&0x8f) >= 0
	if !control && b[0]&0xf > 2 {
		return 0, 0, 1
	}
	if len(b) == 1 {
		return 0, 0, 0
	}
	size := b[1] & 0x7f
	if masked != (b[1] > 0x7f) || control && size >= 126 {
		return 0, 0, 2
	}
	header = map[byte]int{126: 4, 127: 10}[size]
	switch {
	case len(b) < header:
		return 0, 0, 0
	case header == 4:
		rest = uint64(binary.BigEndian.Uint16(b[2:]))
	case header == 10:
		rest = binary.BigEndian.Uint64(b[2:])
	default:
		header, rest = 2, uint64(size)
	}
	if rest >= 1<<63 {
		return 0, 0, 10
	}
	if masked {
		rest += 4
	}
	return header, rest, 0
}

// BenchmarkFrameScan scans chunks of whole frames, as from a client.
func BenchmarkFrameScan(b *testing.B) {
	for _, c := range []struct{ payload, frames int }{{64, 1}, {64, (64 << 10) / (64 + 6)}, {4096, 1}, {64<<10 - 14, 1}} {
		frame := frameBytes(frameFin|2, true, uint64(c.payload), make([]byte, c.payload))
		chunk := bytes.Repeat(frame, c.frames)
		b.Run(fmt.Sprintf("payload=%d/frames=%d", c.payload, c.frames), func(b *testing.B) {
			var f frameScanner
			b.ReportAllocs()
			for b.Loop() {
				f.scan(chunk, true)
			}
			if !f.atBoundary() {
				b.Fatal("not at a boundary after whole frames")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.frames), "ns/frame")
		})
	}
}

// The Close frames of a session that moves, as describeFrame returns them: the client
// reads restarts, the backend goesAway.
const (
	restarts = `close 1012 "service restart"`
	goesAway = `close 1001 "going away"`
)

// nextFrame reads one frame with the parser of frameOracle. It returns its first byte and
// its payload, and unmasks the payload of control frames only. The payload is in buf if
// that is large enough.
func nextFrame(r io.Reader, masked bool, buf []byte) (first byte, payload []byte, err error) {
	head := make([]byte, 2, maxFrameHeader)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, nil, err
	}
	more := map[byte]int{126: 2, 127: 8}[head[1]&0x7f]
	if masked {
		more += maskKey
	}
	head = head[:2+more]
	if _, err := io.ReadFull(r, head[2:]); err != nil {
		return 0, nil, fmt.Errorf("within a header: %w", err)
	}
	_, size, wrong := frameOracleHeader(head, masked)
	if wrong > 0 {
		return 0, nil, fmt.Errorf("header % x, want masked %v", head, masked)
	}
	var key []byte
	if masked {
		size, key = size-maskKey, head[len(head)-maskKey:]
	}
	if uint64(cap(buf)) < size {
		buf = make([]byte, size)
	}
	payload = buf[:size]
	if n, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("at byte %d of %d of a payload: %w", n, size, err)
	}
	for i := 0; masked && head[0]&8 != 0 && i < len(payload); i++ {
		payload[i] ^= key[i%maskKey]
	}
	return head[0], payload, nil
}

// readFrame reads one frame and returns it as text.
func readFrame(r io.Reader, masked bool) (string, error) {
	first, payload, err := nextFrame(r, masked, nil)
	return describeFrame(first, payload), err
}

// describeFrame returns a frame as text.
func describeFrame(first byte, payload []byte) string {
	if first&0xf == 8 && len(payload) >= 2 {
		return fmt.Sprintf("close %d %q", binary.BigEndian.Uint16(payload), payload[2:])
	}
	return fmt.Sprintf("%x %q", first, payload)
}

// mustFrames reads frames and compares them with want.
func mustFrames(t testing.TB, conn net.Conn, masked bool, want ...string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	for _, want := range want {
		if got, err := readFrame(conn, masked); err != nil || got != want {
			t.Fatalf("read %.200s, %v; want %s", got, err, want)
		}
	}
}

func mustSend(t testing.TB, w io.Writer, frame []byte) {
	t.Helper()
	mustWrite(t, w, string(frame))
}

// A closing handshake, step by step: the backend gets its Close frame, what it
// sends before it answers arrives at the client, and then the client gets its own
// Close frame.
func TestCloseGracefully(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		for name, c := range map[string]struct {
			cause  cause
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
				s := startedOver(t, quietRelay(t), network, "tcp")
				done := make(chan bool, 1)
				if !s.closeGracefully(c.cause, func(cut bool) { done <- cut }) {
					t.Fatal("closeGracefully returned false")
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
				s.wantCause(t, c.cause)
				if <-done || s.relay.cut[c.cause].Load() != 0 {
					t.Error("the session was cut, want a closing handshake")
				}
				if s.closeGracefully(causeDrain, nil) {
					t.Error("closeGracefully returned true a second time")
				}
			})
		}
	}, "tcp", "tls", "tls12")
}

// The relay carries Close frames that the sides send by themselves, and inserts
// none after them.
func TestCloseGracefullyWhenAlreadyClosing(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		for name, by := range map[string]side{"by the client": clientSide, "by the backend": backendSide} {
			t.Run(name, func(t *testing.T) {
				s := startedOver(t, quietRelay(t), network, "tcp")
				conns := [2]net.Conn{s.client, s.backend}
				first, second := conns[by], conns[by.other()]
				mustSend(t, first, closeFrame(1000, "bye", by == clientSide))
				mustFrames(t, second, by == clientSide, `close 1000 "bye"`)
				s.closeGracefully(causeMoved, nil)
				if by == backendSide {
					mustFrames(t, s.backend, true, goesAway)
				}
				mustSend(t, second, closeFrame(1000, "yes", by == backendSide))
				if by == clientSide {
					mustFrames(t, first, false, `close 1000 "yes"`)
				}
				mustEOF(t, s.client)
				mustEOF(t, s.backend)
				s.wantCause(t, causeMoved)
				if s.relay.cut[causeMoved].Load() != 0 {
					t.Error("the session was cut, want a closing handshake")
				}
			})
		}
		t.Run("by the client, with the end of a frame", func(t *testing.T) {
			s := startedOver(t, quietRelay(t), network, "tcp")
			frame := frameBytes(0x81, true, 2, []byte("hi"))
			mustSend(t, s.client, frame[:5])
			mustRead(t, s.backend, string(frame[:5]))
			s.closeGracefully(causeMoved, nil)
			mustSend(t, s.client, append(bytes.Clone(frame[5:]), closeFrame(1000, "bye", true)...))
			mustRead(t, s.backend, string(frame[5:]))
			mustFrames(t, s.backend, true, `close 1000 "bye"`)
			mustSend(t, s.backend, closeFrame(1000, "yes", false))
			mustFrames(t, s.client, false, `close 1000 "yes"`)
			s.wantCause(t, causeMoved)
		})
	}, "tcp", "tls", "tls12")
}

// A side gets all unsent bytes before its Close frame, however many they are. With some
// of the sizes here the unsent bytes end at the end of a frame.
func TestCloseGracefullyAfterUnsentData(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		for i, want := range []string{goesAway, restarts} {
			r := quietRelay(t)
			r.closeTimeout = 4 * time.Second
			var all sync.WaitGroup
			for frames := 60; frames < 460; frames += 20 {
				s := startedOver(t, r, network, "unix")
				from, to := s.ends()[i], s.ends()[1-i]
				frame := frameBytes(0x82, i == 0, 1000, make([]byte, 1000))
				from.SetWriteDeadline(time.Now().Add(patience))
				all.Go(func() { io.WriteString(from, strings.Repeat(string(frame), frames)) }) // it may fail
				all.Go(func() {
					carried := int(s.waitStuck(side(i)))
					s.closeGracefully(causeMoved, nil)
					if i == 1 { // the Close frame is due when the backend's time is over
						<-time.After(r.closeTimeout * 5 / 8)
					}
					to.SetReadDeadline(time.Now().Add(patience))
					for n := 0; ; n++ {
						first, payload, err := nextFrame(to, i == 0, nil)
						if first == 0x82 && len(payload) == 1000 && n < frames && err == nil {
							continue
						}
						if got := describeFrame(first, payload); err != nil || got != want || (n+1)*len(frame) < carried {
							t.Errorf("from side %d: %.100s, %v after %d of %d frames, with %d bytes carried before; want %s",
								i, got, err, n, frames, carried, want)
						}
						break
					}
					s.client.Close()
					s.backend.Close()
				})
			}
			all.Wait()
			waitFor(t, r)
		}
	}, "unix", "tls-unix")
}

// A client that has ended its half and reads late gets all bytes, with the Close frame
// that the backend sends by itself.
func TestCloseGracefullyLateReader(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		r := quietRelay(t)
		var all sync.WaitGroup
		for frames := 60; frames < 460; frames += 20 {
			s := startedOver(t, r, network, "unix")
			closeWrite(t, s.client)
			mustEOF(t, s.backend)
			frame := frameBytes(0x82, false, 1000, make([]byte, 1000))
			stream := strings.Repeat(string(frame), frames) + string(closeFrame(1000, "", false))
			all.Go(func() { io.WriteString(s.backend, stream) })
			all.Go(func() {
				s.waitStuck(backendSide)
				s.closeGracefully(causeMoved, nil)
				s.client.SetReadDeadline(time.Now().Add(patience))
				if got, err := io.ReadAll(s.client); err != nil || string(got) != stream {
					t.Errorf("%d frames: %d bytes, %v; want %d", frames, len(got), err, len(stream))
				}
			})
		}
		all.Wait()
		waitFor(t, r)
	}, "unix", "tls-unix")
}

// A Close frame waits for the end of a frame that has begun, wherever that frame is
// cut, and also if the next one comes right behind it.
func TestCloseGracefullyWithinAFrame(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		next := func(masked bool) []byte { return frameBytes(0x82, masked, 300, make([]byte, 300)) }
		for _, size := range []int{0, 5, 200, 70_000} {
			payload := bytes.Repeat([]byte("x"), size)
			up, down := frameBytes(0x81, true, uint64(size), payload), frameBytes(0x81, false, uint64(size), payload)
			for _, cut := range []int{1, 2, 3, 4, 7, len(down) - 1} {
				cut = min(cut, len(down)-1)
				s := startedOver(t, quietRelay(t), network, "tcp")
				mustSend(t, s.client, up[:cut])
				mustSend(t, s.backend, down[:cut])
				mustRead(t, s.backend, string(up[:cut]))
				mustRead(t, s.client, string(down[:cut]))
				s.closeGracefully(causeMoved, nil)
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
	}, "tcp", "tls")
}

// A Close frame waits for the end of a message from the client, whose fragments may
// have control frames between them (RFC 6455 §5.4).
func TestCloseGracefullyWithinAMessage(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		s := startedOver(t, quietRelay(t), network, "tcp")
		for _, first := range []byte{0x01, 0x00} {
			mustSend(t, s.client, frameBytes(first, true, 2, []byte("ab")))
			mustFrames(t, s.backend, true, fmt.Sprintf("%x \"ab\"", first))
			s.closeGracefully(causeMoved, nil) // the second call does nothing
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
	}, "tcp", "tls")
}

// talker is one end of a session that sends frames until stop is closed. Both ends send
// the same frames.
type talker struct {
	conn   net.Conn
	masked bool // of the frames that it sends
	size   int
	firsts []byte // the first bytes of its frames, in turn
	noise  []byte
	rng    *rand.Rand
	stop   chan struct{}
}

// frame returns the k-th frame, as it is sent or unmasked.
func (a *talker) frame(k int, masked bool) []byte {
	first, size := a.firsts[k%len(a.firsts)], a.size
	if first&8 != 0 {
		size = min(size, maxControlPayload)
	}
	return frameBytes(first, masked, uint64(size), a.noise[k%1000:][:size])
}

// talk writes whole frames, in pieces of any size, until stop is closed, and then a
// Close frame.
func (a *talker) talk() error {
	for k := 0; ; k++ {
		select {
		case <-a.stop:
			_, err := a.conn.Write(closeFrame(1000, "", a.masked))
			return err
		default:
		}
		for rest := a.frame(k, a.masked); len(rest) > 0; {
			n := 1 + logUniform(a.rng, len(rest)-1)
			if _, err := a.conn.Write(rest[:n]); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			rest = rest[n:]
		}
	}
}

// hear compares the frames that come, until a Close frame, after which nothing may come.
// It closes stop then, and returns an error if the Close frame is not want.
func (a *talker) hear(want string) error {
	var raw bytes.Buffer
	r, buf := io.TeeReader(bufio.NewReaderSize(a.conn, 64<<10), &raw), make([]byte, a.size)
	for k := 0; ; k++ {
		raw.Reset()
		first, payload, err := nextFrame(r, !a.masked, buf)
		switch {
		case err != nil:
			return fmt.Errorf("frame %d: %w", k, err)
		case first&0xf != 8 && !bytes.Equal(raw.Bytes(), a.frame(k, !a.masked)):
			return fmt.Errorf("frame %d, %x with %d bytes, is not what was sent", k, first, len(payload))
		case first&0xf != 8:
			continue
		}
		close(a.stop)
		if got := describeFrame(first, payload); got != want {
			return fmt.Errorf("%s after %d frames, want %s", got, k, want)
		}
		more, err := io.Copy(io.Discard, r)
		if more > 0 {
			err = fmt.Errorf("%d bytes after the Close frame", more)
		}
		return err
	}
}

// The relay inserts Close frames into two streams that never stop: before them come the
// frames that were sent, whole and unchanged, and after them nothing.
//
// It fails if a Close frame is inserted within a frame, or if unsent bytes before
// it are lost; if the rest of a chunk is sent after it; if the backend's own Close
// frame is carried too.
func TestCloseGracefullyInFullFlow(t *testing.T) {
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
			for round := range c.rounds {
				r := quietRelay(t)
				r.closeTimeout = 2 * patience
				network := "tcp"
				if round%2 == 1 && c.size < 1<<20 {
					network = "tls"
				}
				s := startedOver(t, r, network, "tcp")
				var both sync.WaitGroup
				for i, want := range []string{restarts, goesAway} {
					a := &talker{conn: s.ends()[i], masked: i == 0, size: c.size, firsts: c.firsts, noise: noise,
						rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), stop: make(chan struct{})}
					a.conn.SetDeadline(time.Now().Add(2 * patience))
					both.Go(func() {
						if err := a.hear(want); err != nil {
							t.Errorf("side %d: %v", i, err)
							a.conn.Close() // ends the writer
						}
					})
					both.Go(func() {
						if err := a.talk(); err != nil {
							t.Errorf("side %d: %v", i, err)
						}
					})
				}
				at := int64(rng.IntN(2 * c.size)) // bytes that pass before
				for end := time.Now().Add(patience); s.bytes()[backendSide] <= at && time.Now().Before(end); {
					time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
				}
				s.closeGracefully(causeMoved, nil)
				both.Wait()
				waitFor(t, r)
				wantEqual(t, "sessions that were cut", r.cut[causeMoved].Load(), 0)
			}
		})
	}
}

// readClose reads one frame by another implementation, and returns its type, code and
// reason as text.
func readClose(ws *websocket.Conn) string {
	frame, err := ws.NewFrameReader()
	if err != nil {
		return err.Error()
	}
	payload, err := io.ReadAll(frame)
	if err != nil || len(payload) < 2 {
		return fmt.Sprintf("payload %q, error %v", payload, err)
	}
	return fmt.Sprintf("type %d, code %d, reason %q", frame.PayloadType(), binary.BigEndian.Uint16(payload), payload[2:])
}

// A closing handshake works with another implementation at both ends, through the
// proxy.
func TestCloseGracefullyLibrary(t *testing.T) {
	heard := make(chan string, 1)
	addr := websocketBackend(t, func(ws *websocket.Conn) {
		websocket.Message.Send(ws, "hello")
		heard <- readClose(ws)
		websocket.Message.Send(ws, "last")
		ws.WriteClose(1001)
	})
	p := startProxy(t, []string{addr}, map[string]string{}, nil)
	ws, err := websocket.Dial("ws://"+p.addr+"/ws/ns-01", "", "http://origin.example/")
	must(t, err)
	defer ws.Close()
	ws.SetDeadline(time.Now().Add(patience))
	var message string
	if err := websocket.Message.Receive(ws, &message); err != nil || message != "hello" {
		t.Fatalf("%q, %v", message, err)
	}
	for _, s := range p.relay.filter(func(*session) bool { return true }) {
		s.closeGracefully(causeMoved, nil)
	}
	wantEqual(t, "what the backend read", <-heard, `type 8, code 1001, reason "going away"`)
	if err := websocket.Message.Receive(ws, &message); err != nil || message != "last" {
		t.Errorf("the client got %q, %v; want the backend's last message", message, err)
	}
	wantEqual(t, "what the client read", readClose(ws), `type 8, code 1012, reason "service restart"`)
	ws.Close()
	waitFor(t, p.relay)
}

// The relay waits for a side that does not answer for a bounded time. The client
// gets its Close frame within half of that time, whatever the backend does, if it
// reads at all.
func TestCloseGracefullyBounds(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		type steps []step
		const client, backend = clientSide, backendSide
		const bound = 1200 * time.Millisecond
		quarter, half, whole, none, late := bound/4, bound/2, bound, time.Duration(0), bound*2/3
		clientIsClosed := func(t *testing.T, s relayed) { mustFrames(t, s.client, false, restarts) }
		backendIsClosed := func(t *testing.T, s relayed) { mustFrames(t, s.backend, true, goesAway) }
		clientAnswers := func(t *testing.T, s relayed) { mustSend(t, s.client, closeFrame(1000, "", true)) }
		backendAnswers := func(t *testing.T, s relayed) { mustSend(t, s.backend, closeFrame(1001, "", false)) }
		backendIsReset := func(t *testing.T, s relayed) { mustReset(t, s.backend) }
		waits := func(*testing.T, relayed) { <-time.After(late) }
		part := says(client, string(frameBytes(0x01, true, 2, []byte("ab")))) // the first fragment of a message
		up := says(client, string(frameBytes(0x81, true, 9, []byte("ab"))))   // 7 bytes are missing
		down := says(backend, string(frameBytes(0x81, false, 9, []byte("ab"))))
		for name, c := range map[string]struct {
			before, after steps // closeGracefully
			took          time.Duration
			cut           bool
		}{
			"the client does not answer": {nil, steps{closesConn(backend), clientIsClosed, hasEnd(client)}, whole, true},
			"the client answers late": {nil,
				steps{backendIsClosed, backendAnswers, clientIsClosed, waits, clientAnswers, hasEnd(client), hasEnd(backend)}, late, false},
			"the backend does not answer": {nil,
				steps{backendIsClosed, clientIsClosed, backendIsReset, clientAnswers, hasEnd(client)}, half, true},
			"the backend resets":           {nil, steps{resets(backend), clientIsClosed, closesConn(client)}, none, false},
			"the client resets":            {nil, steps{resets(client), backendIsClosed, closesConn(backend)}, none, false},
			"the client is within a frame": {steps{up}, steps{clientIsClosed, backendIsReset, closesConn(client)}, half, true},
			"the client is within a message": {steps{part},
				steps{backendIsClosed, closesConn(backend), clientIsClosed, closesConn(client)}, quarter, false},
			"the client ends within a message": {steps{part},
				steps{halfCloses(client), backendIsClosed, closesConn(backend), clientIsClosed}, none, false},
			"the backend is within a frame": {steps{down}, steps{backendIsClosed, hasEnd(client)}, whole, true},
			"the backend gets to the end of its frame late": {steps{down}, steps{waits, func(t *testing.T, s relayed) {
				mustSend(t, s.backend, append([]byte("cdefghi"), frameBytes(0x81, false, 2, []byte("no"))...))
				mustRead(t, s.client, "cdefghi")
			}, clientIsClosed, backendIsReset, closesConn(client)}, late, true},
			"the backend ends within a frame": {steps{down}, steps{closesConn(backend), hasEnd(client)}, none, true},
			"no frames from the client": {steps{says(client, "GET / HTTP/1.1\r\n")},
				steps{hasEnd(client), hasEnd(backend)}, none, true},
			"no frames from the backend": {steps{says(backend, "HTTP/1.1 200 OK\r\n")},
				steps{isCut(client), isCut(backend)}, none, true}, // with TLS maybe without close_notify
			"the client reads nothing": {steps{func(_ *testing.T, s relayed) { stuffFrames(s.backend, false) }},
				steps{isCut(backend)}, whole, true},
			"the backend reads nothing": {steps{func(_ *testing.T, s relayed) { stuffFrames(s.client, true) }},
				steps{clientIsClosed, closesConn(client)}, half, true},
			"the client has ended": {steps{halfCloses(client), hasEnd(backend)}, steps{func(t *testing.T, s relayed) {
				mustSend(t, s.backend, frameBytes(0x81, false, 4, []byte("last")))
				s.backend.Close()
				mustFrames(t, s.client, false, `81 "last"`, restarts)
			}, hasEnd(client)}, none, false},
			"the client has ended, and the backend is silent": { // longer than halfCloseTimeout
				steps{halfCloses(client), hasEnd(backend)}, steps{clientIsClosed, hasEnd(client)}, half, true},
			"the backend has ended": {steps{halfCloses(backend), hasEnd(client)},
				steps{backendIsClosed, closesConn(client)}, none, false},
			"the router fails": {nil, steps{backendIsClosed, func(_ *testing.T, s relayed) { s.end(causeRouterError) },
				isCut(client), isCut(backend)}, none, true},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				took := bound + patience
				for try := 0; try < 5 && took > c.took+half; try++ { // the best time counts: the machine may be busy
					r := quietRelay(t)
					r.closeTimeout, r.halfCloseTimeout = bound, quarter
					s := startedOver(t, r, network, "tcp")
					for _, step := range c.before {
						step(t, s)
					}
					begun := time.Now()
					s.closeGracefully(causeMoved, nil)
					for _, step := range c.after {
						step(t, s)
					}
					s.wantCause(t, causeMoved)
					took = time.Since(begun)
					wantEqual(t, "cut", r.cut[causeMoved].Load() == 1, c.cut)
				}
				if took < c.took || took > c.took+half {
					t.Errorf("it was over after %s, want %s and at most %s more", took, c.took, half)
				}
			})
		}
	}, "tcp", "tls")
}

// mustReset reads until an error, and fails if that is not a reset.
func mustReset(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read ends with %v, want a reset", err)
	}
}

// stuffFrames writes frames until conn takes no more.
func stuffFrames(conn net.Conn, masked bool) {
	frame := frameBytes(0x82, masked, 32<<10, make([]byte, 32<<10))
	for err := error(nil); err == nil; _, err = conn.Write(frame) {
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	}
}

// If closeGracefully is called before the hand-over is done, both sides get their Close
// frames all the same, after the early bytes.
func TestCloseGracefullyAtSessionStart(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		r, pairs, s := quietRelay(t), newSessionConns(t, network, "tcp"), newSession("ns-01", 0, "")
		r.engine.assign(s, pairs.near)
		if !s.closeGracefully(causeMoved, nil) {
			t.Fatal("closeGracefully returned false")
		}
		early := [2][]byte{nil, frameBytes(0x81, false, 5, []byte("early"))}
		r.register(s)
		r.engine.carry(s, pairs.near, early)
		client, backend := pairs.far[clientSide], pairs.far[backendSide]
		mustFrames(t, backend, true, goesAway)
		backend.Close()
		mustFrames(t, client, false, `81 "early"`, restarts)
		client.Close()
		relayed{session: s, relay: r}.wantCause(t, causeMoved)
	}, "tcp", "tls")
}

// A session that is ended during its hand-over, between register and engine.carry,
// ends when it starts.
func TestRelayEndsAtSessionStart(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		r, pairs, s := quietRelay(t), newSessionConns(t, network, "tcp"), newSession("ns-01", 0, "")
		r.engine.assign(s, pairs.near)
		r.register(s)
		s.end(causeDrain)
		r.engine.carry(s, pairs.near, [2][]byte{})
		relayed{session: s, relay: r}.wantCause(t, causeDrain)
		mustBreak(t, pairs.far[clientSide])
		mustBreak(t, pairs.far[backendSide])
	}, "tcp", "tls")
}

// A session that several goroutines end at once ends once, with one cause, and done is
// called once.
func TestRelayEndsOnce(t *testing.T) {
	const sessions = 100
	r := quietRelay(t)
	var started, done atomic.Int64
	for n := range sessions {
		c := startedOver(t, r, []string{"tcp", "tls"}[n%2], "tcp")
		var all sync.WaitGroup
		closeGracefully := func() {
			if c.closeGracefully(causeMoved, func(bool) { done.Add(1) }) {
				started.Add(1)
			}
		}
		for _, end := range []func(){
			closeGracefully, closeGracefully, func() { c.end(causeDrain) },
			func() { reset(c.client) }, func() { c.backend.Close() },
		} {
			all.Go(end)
		}
		all.Wait()
		waitFor(t, r)
		if started.Load() != done.Load() {
			t.Fatalf("closeGracefully returned true %d times, done was called %d times", started.Load(), done.Load())
		}
	}
	var total int64
	for i := range r.ended {
		total += r.ended[i].Load()
	}
	if total != sessions || r.ended[causeNone].Load() != 0 {
		t.Errorf("%d ends, %d without a cause; want %d and 0", total, r.ended[causeNone].Load(), sessions)
	}
}
