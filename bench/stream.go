package main

import (
	"bytes"
	"errors"
	"fmt"
	"time"
)

// stream downloads frames of streamFrame bytes on sessions, whose ends it
// becomes when they are open.
type stream struct {
	*client
	whole  bool   // compare every byte, else the beginning of each frame
	want   []byte // one frame
	frames int64  // asked for on each session
	total  int64  // bytes so far
	left   int    // sessions with something to come
}

// openStream begins downloads of frames on each of n sessions.
func openStream(t *target, n int, frames int64, whole bool) (*stream, error) {
	c, err := newClient(t, names("ns-", 64))
	if err != nil {
		return nil, err
	}
	d := &stream{client: c, whole: whole, want: appendFrame(nil, frameBinary, pattern(streamFrame), nil), frames: frames}
	if err := c.openAll(n, d); err != nil {
		c.close()
		return nil, err
	}
	return d, nil
}

func (d *stream) opened(s *session) {
	d.left++
	s.end = &download{stream: d, session: s}
	s.send(appendFrame(nil, frameText, fmt.Appendf(nil, "stream %d", d.frames), &[4]byte{1, 2, 3, 4}))
}

func (d *stream) message(s *session, _ *frame) { s.fail("a message before the stream") }

// download is the client's end of one session.
type download struct {
	*session
	stream *stream
	got    int64 // bytes
}

// received compares p with what has to come next; it uses all of it.
func (d *download) received(p []byte) (used int) {
	s, used := d.stream, len(p)
	size := int64(len(s.want))
	at := int(d.got % size)
	if d.got += int64(used); d.got > s.frames*size {
		d.fail("more than was asked for")
		return used
	}
	for len(p) > 0 {
		n := min(len(p), len(s.want)-at)
		compare := n
		if !s.whole {
			compare = min(n, max(32-at, 0))
		}
		if !bytes.Equal(p[:compare], s.want[at:at+compare]) {
			d.fail("corrupt stream")
			return used
		}
		p, at = p[n:], 0
	}
	s.total += int64(used)
	if d.got == s.frames*size {
		s.left--
	}
	return used
}

// filling is how long the proxy may go on filling buffers when nobody reads.
const filling = 20 * time.Millisecond

func (d *stream) send(length time.Duration) error {
	d.run(length)
	d.other.run(filling)
	return d.failure
}

func (d *stream) count() { d.total = 0 }

func (d *stream) values(used use) (values, error) { return used.download(d.total) }

// checkStream downloads 3000 frames, and compares every byte.
func checkStream(t *target) error {
	d, err := openStream(t, 4, 750, true)
	if err != nil {
		return err
	}
	defer d.close()
	err = d.until(func() bool { return d.left == 0 || d.failure != nil })
	return errors.Join(err, d.failure)
}
