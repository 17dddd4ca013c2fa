package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// frameBytes is a frame with its length in the fewest bytes. length is what the
// header says, whatever there is of payload, which is as on the wire.
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

// Every form of a header, cut at every place.
func TestFrameForms(t *testing.T) {
	text := func(n int) []byte { return bytes.Repeat([]byte{0x81}, n) }
	for name, c := range map[string]struct {
		frame  []byte
		masked bool
		header int // bytes before the masking key
	}{
		"empty":                     {frameBytes(0x81, false, 0, nil), false, 2},
		"empty, masked":             {frameBytes(0x81, true, 0, nil), true, 2},
		"a byte":                    {frameBytes(0x81, false, 1, text(1)), false, 2},
		"125 bytes":                 {frameBytes(0x81, false, 125, text(125)), false, 2},
		"125 bytes, masked":         {frameBytes(0x82, true, 125, text(125)), true, 2},
		"126 bytes":                 {frameBytes(0x81, false, 126, text(126)), false, 4},
		"127 bytes, masked":         {frameBytes(0x81, true, 127, text(127)), true, 4},
		"65535 bytes":               {frameBytes(0x81, false, 65535, text(65535)), false, 4},
		"65535 bytes, masked":       {frameBytes(0x81, true, 65535, text(65535)), true, 4},
		"65536 bytes":               {frameBytes(0x82, false, 65536, text(65536)), false, 10},
		"65536 bytes, masked":       {frameBytes(0x82, true, 65536, text(65536)), true, 10},
		"first fragment":            {frameBytes(0x01, false, 3, text(3)), false, 2},
		"fragment":                  {frameBytes(0x00, true, 3, text(3)), true, 2},
		"last fragment":             {frameBytes(0x80, true, 300, text(300)), true, 4},
		"ping":                      {frameBytes(0x89, true, 0, nil), true, 2},
		"pong":                      {frameBytes(0x8a, false, 125, text(125)), false, 2},
		"compressed":                {frameBytes(0xc1, true, 9, text(9)), true, 2},
		"all reserved bits":         {frameBytes(0xf2, false, 9, text(9)), false, 2},
		"3 bytes as 16 bits":        {[]byte{0x81, 126, 0, 3, 'a', 'b', 'c'}, false, 4},
		"0 bytes as 64 bits":        {[]byte{0x81, 127, 0, 0, 0, 0, 0, 0, 0, 0}, false, 10},
		"1 byte as 64 bits, masked": {[]byte{0x81, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 'm', 'a', 's', 'k', 'x'}, true, 10},
	} {
		t.Run(name, func(t *testing.T) {
			for cut := range len(c.frame) + 1 {
				var f frameScanner
				want := frameView{boundary: cut == 0 || cut == len(c.frame)}
				want.whole = cut == 0 || cut == len(c.frame) && c.frame[0]&0x80 != 0
				if cut >= c.header {
					want.rest = uint64(len(c.frame) - cut)
				}
				f.scan(c.frame[:cut], c.masked)
				if got := viewOf(&f); got != want {
					t.Fatalf("after %d of %d bytes: %+v, want %+v", cut, len(c.frame), got, want)
				}
				f.scan(c.frame[cut:], c.masked)
				f.scan(c.frame, c.masked)
				if !f.boundary() {
					t.Fatalf("cut after %d bytes, then a second one: %+v, want a boundary", cut, viewOf(&f))
				}
			}
		})
	}
}

// frameViolations end with the byte that shows what is wrong.
var frameViolations = map[string]struct {
	stream []byte
	masked bool
}{
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

func TestFrameViolations(t *testing.T) {
	for name, c := range frameViolations {
		t.Run(name, func(t *testing.T) {
			var f frameScanner
			for more := range 200 {
				f = frameScanner{}
				if f.scan(append(bytes.Clone(c.stream), make([]byte, more)...), c.masked); !f.broken() {
					t.Fatalf("%+v after a chunk with %d bytes more, want broken", viewOf(&f), more)
				}
			}
			f = frameScanner{}
			if f.scan(c.stream[:len(c.stream)-1], c.masked); f.broken() {
				t.Error("broken before the byte that shows it")
			}
			f.scan(c.stream[len(c.stream)-1:], c.masked)
			for _, more := range [][]byte{nil, frameBytes(0x81, c.masked, 1, []byte("x")), make([]byte, 1000)} {
				if n := f.next(more, c.masked); n != len(more) {
					t.Errorf("next is at %d of %d bytes, want all", n, len(more))
				}
				f.scan(more, c.masked)
				f.skip(f.rest())
				if got, want := viewOf(&f), (frameView{broken: true}); got != want {
					t.Errorf("%+v, want %+v", got, want)
				}
			}
		})
	}
}

// A frame of the greatest length is carried to its end.
func TestFrameLongest(t *testing.T) {
	for masked, want := range map[bool]uint64{false: math.MaxInt64, true: math.MaxInt64 + 4} {
		var f frameScanner
		f.scan(frameBytes(0x82, masked, math.MaxInt64, nil)[:10], masked)
		if f.rest() != want {
			t.Errorf("masked %v: rest is %d, want %d", masked, f.rest(), want)
		}
		f.skip(want - 2)
		f.scan([]byte{0x83}, masked)
		if got, want := viewOf(&f), (frameView{rest: 1}); got != want {
			t.Errorf("masked %v: %+v, want %+v", masked, got, want)
		}
		f.scan(append([]byte{0x83}, frameBytes(0x8a, masked, 0, nil)...), masked)
		if !f.boundary() {
			t.Errorf("masked %v: %+v, want a boundary", masked, viewOf(&f))
		}
	}
}

// A Close frame may come between two fragments. Up to its last byte it is a
// frame as any; then nothing counts any more.
func TestFrameClose(t *testing.T) {
	for _, masked := range []bool{false, true} {
		for _, body := range []string{"", "\x03\xe8", "\x03\xf4service restart"} {
			end := frameBytes(0x88, masked, uint64(len(body)), []byte(body))
			var f frameScanner
			f.scan(append(frameBytes(0x01, masked, 1, []byte("x")), end[:len(end)-1]...), masked)
			if f.closed() || f.boundary() {
				t.Errorf("before the last byte of %q: %+v, want neither closed nor a boundary", end, viewOf(&f))
			}
			for _, more := range [][]byte{end[len(end)-1:], nil, frameBytes(0x80, masked, 1, []byte("x")), {0x83, 0xff}} {
				if n := f.next(more, masked); n != len(more) {
					t.Errorf("next is at %d of %d bytes, want all", n, len(more))
				}
				f.skip(f.rest())
				if got, want := viewOf(&f), (frameView{closed: true}); got != want {
					t.Errorf("after %q and %q: %+v, want %+v", end, more, got, want)
				}
			}
		}
	}
}

// next stops after each frame, of whatever kind, and goes on from there.
func TestFrameNext(t *testing.T) {
	var stream []byte
	var want []int
	for _, size := range []int{0, 1, 125, 126, 300, 65536, 5} {
		for _, first := range []byte{0x01, 0x89, 0x80} {
			if first == 0x89 {
				size %= 126
			}
			frame := frameBytes(first, true, uint64(size), make([]byte, size))
			stream, want = append(stream, frame...), append(want, len(frame))
		}
	}
	var f frameScanner
	rest := stream
	for i, want := range want {
		if n := f.next(rest, true); n != want || !f.boundary() {
			t.Fatalf("frame %d: %d bytes and %+v, want %d and a boundary", i, n, viewOf(&f), want)
		}
		rest = rest[want:]
	}
	if n := f.next(stream[:1], true); n != 1 || f.boundary() {
		t.Errorf("a first byte: %d bytes and %+v, want 1 and no boundary", n, viewOf(&f))
	}
	if n := f.next(nil, true); n != 0 {
		t.Errorf("next of nothing is %d, want 0", n)
	}
}

// Hundreds of thousands of sessions have two scanners each.
func TestFrameScannerIsSmall(t *testing.T) {
	if size := reflect.TypeFor[frameScanner]().Size(); size > 16 {
		t.Errorf("a scanner has %d bytes, want at most 16", size)
	}
	var f frameScanner
	chunk := manyFrames(rand.New(rand.NewPCG(1, 1)), true, 100)
	if n := testing.AllocsPerRun(100, func() { f.scan(chunk, true) }); n != 0 {
		t.Errorf("%v allocations in a scan, want 0", n)
	}
}

// tapped is a connection whose traffic is kept, and whose reads are from
// another source once there is one.
type tapped struct {
	net.Conn
	read, written []byte
	source        io.Reader
}

func (c *tapped) Read(b []byte) (n int, err error) {
	if c.source != nil {
		return c.source.Read(b)
	}
	n, err = c.Conn.Read(b)
	c.read = append(c.read, b[:n]...)
	return n, err
}

func (c *tapped) Write(b []byte) (n int, err error) {
	c.written = append(c.written, b...)
	return c.Conn.Write(b)
}

// tappedClient is a client of golang.org/x/net/websocket with a server, which
// serves it.
func tappedClient(t *testing.T, serve func(*websocket.Conn)) (*websocket.Conn, *tapped) {
	t.Helper()
	s := httptest.NewServer(websocket.Server{Handler: serve})
	t.Cleanup(s.Close)
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(s.URL, "http"), "http://origin.example/")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	tap := &tapped{Conn: conn}
	ws, err := websocket.NewClient(config, tap)
	if err != nil {
		t.Fatal(err)
	}
	return ws, tap
}

// What another implementation sends, in both directions.
func TestFramesOfLibrary(t *testing.T) {
	ws, tap := tappedClient(t, func(ws *websocket.Conn) {
		var message []byte
		for websocket.Message.Receive(ws, &message) == nil {
			websocket.Message.Send(ws, message)
		}
		ws.WriteClose(1000)
	})
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
	}{
		"from the client":  {tap.written, true, len(sizes) + 2},
		"from the backend": {tap.read, false, len(sizes) + 2},
	} {
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

// What another implementation reads of a Close frame: the client of an unmasked
// one, the server of a masked one.
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
		t.Run(name, func(t *testing.T) {
			read := make(chan string, 1)
			ws, tap := tappedClient(t, func(ws *websocket.Conn) { read <- readClose(ws) })
			want := fmt.Sprintf("type 8, code %d, reason %q", c.code, c.want)
			masked, unmasked := closeFrame(c.code, c.reason, true), closeFrame(c.code, c.reason, false)
			tap.Conn.Write(masked)
			if got := <-read; got != want {
				t.Errorf("the server read %s, want %s", got, want)
			}
			tap.source = bytes.NewReader(unmasked)
			if got := readClose(ws); got != want {
				t.Errorf("the client read %s, want %s", got, want)
			}
			wantClosed(t, masked, true)
			wantClosed(t, unmasked, false)
		})
	}
}

// wantClosed fails if the frame is not one Close frame to its last byte.
func wantClosed(t *testing.T, frame []byte, masked bool) {
	t.Helper()
	var f frameScanner
	f.scan(frame[:len(frame)-1], masked)
	if f.closed() {
		t.Errorf("closed before the end of %q", frame)
	}
	if f.scan(frame[len(frame)-1:], masked); !f.closed() {
		t.Errorf("not closed after %q", frame)
	}
}

// readClose reads one frame as code and reason.
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

// A key that comes twice in a row is one in 2^32.
func TestCloseFrameKeys(t *testing.T) {
	keys := map[string]bool{}
	for range 10 {
		keys[string(closeFrame(closeGoingAway, "", true)[2:6])] = true
	}
	if len(keys) < 9 {
		t.Errorf("%d keys in 10 frames, want a new one in each", len(keys))
	}
}
