package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// shape is what the messages of a stream are like. Its name is a namespace.
type shape struct {
	name     string
	size     int  // bytes of a message
	fragment int  // bytes of a frame; 0: a message is one frame
	deflate  bool // permessage-deflate, with a context that goes on from message to message
}

// shapes are those whose streams are closed.
var shapes = []shape{
	{name: "64B", size: 64},
	{name: "64KiB", size: 64 << 10},
	{name: "16MiB", size: largest},
	{name: "fragments-64B", size: 16 << 10, fragment: 64},
	{name: "fragments-64KiB", size: 1 << 20, fragment: 64 << 10},
	{name: "deflate-64B", size: 64, deflate: true},
	{name: "deflate-64KiB", size: 64 << 10, deflate: true},
	{name: "deflate-256KiB", size: 256 << 10, deflate: true},
	{name: "deflate-fragments", size: 1 << 20, fragment: 64 << 10, deflate: true},
}

const (
	largest     = 16 << 20 // bytes of a message
	noisePeriod = 1021     // words of 4 bytes: messages begin at so many places of the noise
	noiseSeed   = 0x2545f491
	noiseStep   = 97 // words between the first messages of two streams
)

// compression is the mode to ask for, and to agree to.
func (s shape) compression() websocket.CompressionMode {
	if s.deflate {
		return websocket.CompressionContextTakeover
	}
	return websocket.CompressionDisabled
}

// noise is what messages are cut from: Marsaglia's xorshift, of which each byte
// has 4 bits, so that deflate halves it.
var noise = sync.OnceValue(func() []byte {
	all := make([]byte, 0, largest+4*noisePeriod)
	for x := uint32(noiseSeed); len(all) < cap(all); {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		all = binary.LittleEndian.AppendUint32(all, 0x61616161+x&0x0f0f0f0f)
	}
	return all
})

// stream is one direction of a session. Its number says which messages it has.
type stream struct {
	shape
	number int
}

// back is the stream in the other direction.
func (s stream) back() stream { return stream{s.shape, s.number + noisePeriod/2} }

// message is the i-th of the stream.
func (s stream) message(i int) []byte {
	return noise()[4*((noiseStep*s.number+i)%noisePeriod):][:s.size]
}

// talk writes messages until one cannot be written. No more than ahead is on the
// way to its hearer, if that is known: what the kernel takes is of no interest.
func (s stream) talk(ctx context.Context, conn *websocket.Conn, hearer *hearing) {
	window := int64(8)
	if hearer != nil {
		window = max(window, int64(hearer.ahead/s.size))
	}
	for i := int64(0); ; i++ {
		for hearer != nil && i-hearer.whole.Load() >= window {
			select {
			case <-ctx.Done():
				return
			case <-hearer.done:
				return
			case <-time.After(time.Millisecond):
			}
		}
		if s.say(ctx, conn, s.message(int(i))) != nil {
			return
		}
	}
}

// say writes one message.
func (s stream) say(ctx context.Context, conn *websocket.Conn, data []byte) error {
	if s.fragment == 0 {
		return conn.Write(ctx, websocket.MessageBinary, data)
	}
	w, err := conn.Writer(ctx, websocket.MessageBinary)
	if err != nil {
		return err
	}
	for piece := range slices.Chunk(data, s.fragment) {
		if _, err := w.Write(piece); err != nil {
			return err
		}
	}
	return w.Close()
}

// hearing is what one side hears of a stream.
type hearing struct {
	stream
	whole atomic.Int64  // messages
	done  chan struct{} // closed when it has ended
	ahead int           // bytes that may be on the way, or 8 messages, if that is more

	// Set before done is closed.
	within bool  // it ended within a message
	err    error // why it ended
}

func newHearing(s stream) *hearing {
	return &hearing{stream: s, done: make(chan struct{}), ahead: 64 << 10}
}

// listen reads messages until there is no more, or one that must not be there.
func (h *hearing) listen(ctx context.Context, conn *websocket.Conn) {
	defer close(h.done)
	conn.SetReadLimit(-1)
	for buf := make([]byte, h.size+1); h.err == nil; {
		h.err = h.next(ctx, conn, buf)
	}
}

// next reads one message, for which there is room for a byte too many.
func (h *hearing) next(ctx context.Context, conn *websocket.Conn, buf []byte) error {
	kind, r, err := conn.Reader(ctx)
	if err != nil {
		return err
	}
	i := h.whole.Load()
	n, err := io.ReadFull(r, buf)
	whole := err == io.ErrUnexpectedEOF // ReadFull's own: the message has ended; one of the connection is wrapped
	switch want := h.message(int(i)); {
	case kind != websocket.MessageBinary || n > len(want) || !bytes.Equal(buf[:n], want[:n]):
		return fmt.Errorf("message %d is not the one that was sent: %s of %d bytes %.40q..., want %d bytes %.40q...", i, kind, n, buf[:n], len(want), want)
	case whole && n < len(want):
		return fmt.Errorf("message %d ends after %d bytes, want %d", i, n, len(want))
	case !whole:
		h.within = true
		return err
	}
	h.whole.Add(1)
	return nil
}

// closedBy is nil if the stream ended with this Close, after so many messages at
// least, and not within a message that is one frame.
func (h *hearing) closedBy(want websocket.CloseError, least int64) error {
	var closed websocket.CloseError
	switch {
	case !errors.As(h.err, &closed) || closed != want:
		return fmt.Errorf("%s, stream %d: it ended with %v after %d messages, want Close %v", h.name, h.number, h.err, h.whole.Load(), want)
	case h.within && h.fragment == 0:
		return fmt.Errorf("%s, stream %d: a Close within message %d, which is one frame", h.name, h.number, h.whole.Load())
	case h.whole.Load() < least:
		return fmt.Errorf("%s, stream %d: %d messages, want at least %d", h.name, h.number, h.whole.Load(), least)
	}
	return nil
}

// streamer is a backend that sends a stream to each client, and listens to what
// the client sends, if anything. The path says the shape; the query has the
// number, and "deaf" if the backend is not to read anything, and "sliced" if it is the client's
// business where frames end.
type streamer struct {
	ctx     context.Context
	server  *httptest.Server
	serving sync.WaitGroup

	// Guarded by mu.
	mu       sync.Mutex
	clients  map[int]*hearing // by number, those of the test's own
	hearings []*hearing       // of those that are not deaf, since the last forget
}

// newStreamer starts a backend that ends with the test.
func newStreamer(t *testing.T) *streamer {
	ctx, stop := context.WithCancel(context.Background())
	b := &streamer{ctx: ctx, clients: map[int]*hearing{}}
	b.server = httptest.NewServer(b)
	t.Cleanup(func() {
		b.server.Close()
		stop()
		b.serving.Wait()
	})
	return b
}

func (b *streamer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.serving.Add(1)
	defer b.serving.Done()
	query := r.URL.Query()
	number, err := strconv.Atoi(query.Get("stream"))
	i := slices.IndexFunc(shapes, func(s shape) bool { return s.name == path.Base(r.URL.Path) })
	if err != nil || i < 0 {
		http.Error(w, fmt.Sprintf("%s: want /ws/<shape>?stream=<number>", r.RequestURI), http.StatusNotFound)
		return
	}
	s := stream{shapes[i], number}
	h := newHearing(s.back())
	if query.Has("sliced") {
		h.fragment = 1
	}
	b.mu.Lock()
	client := b.clients[number]
	if !query.Has("deaf") {
		b.hearings = append(b.hearings, h) // a client may ask as soon as it has the answer
	}
	b.mu.Unlock()
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, CompressionMode: s.compression(), CompressionThreshold: 1})
	if err != nil {
		h.err = err
		close(h.done)
		return
	}
	defer conn.CloseNow()
	if !query.Has("deaf") {
		go h.listen(b.ctx, conn)
		defer func() { <-h.done }()
	}
	s.talk(b.ctx, conn, client)
}

// expect makes known who hears the stream of this number.
func (b *streamer) expect(h *hearing) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clients[h.number] = h
}

// hearer returns who hears the stream, nil if nobody does.
func (b *streamer) hearer(s stream) *hearing {
	for _, h := range b.heard() {
		if h.stream == s {
			return h
		}
	}
	return nil
}

// heard returns the hearings since the last forget.
func (b *streamer) heard() []*hearing {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.hearings)
}

// forget is for the next round.
func (b *streamer) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hearings = nil
}
