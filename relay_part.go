package main

import (
	"sync/atomic"
	"time"
)

// closeTime bounds how long a session goes on when it is to part: both its
// sockets are closed then. The backend has the first half of it to answer, and the
// client the first quarter to end a message of which the backend has a part.
const closeTime = 5 * time.Second

// mostClose is how many bytes a Close frame has at most.
const mostClose = 2 + maskKey + mostControl

// parting is the end of a session by Close frames, each put where a frame ends in
// what is written (RFC 6455 §5.5.1, §7.1.2):
//
//  1. The backend gets its Close frame, and nothing after it. It is put where a
//     message ends, or between two fragments if that takes too long.
//  2. What the backend still sends is carried until it answers: by its Close
//     frame, or by its end. In the place of that the client gets its own Close
//     frame, and nothing after it.
//  3. When the client has answered too, both sockets are closed.
//
// The backend is first since a client comes back as soon as it is told, to the
// new owner: by then the old one has let go of it, and all that the old one said
// has come. One that does not answer in its time is cut off by a reset, so that
// it does not read, later, what it did not read until then.
//
// What a side sends after its peer's Close frame was put is read and dropped: a
// socket that is closed with something to read in it sends a reset, which
// destroys what is on its way to the other side.
//
// A Close frame that passes by itself is carried, and none is put after it. A
// stream that cannot get to the end of a frame, because it is not one of frames
// or has ended within one, leaves nothing to wait for: both sockets are closed.
type parting struct {
	frame [2][]byte   // the Close frame that is to end what comes from the side, for its peer
	put   [2]bool     // it stands in the stream
	over  [2]bool     // nothing more that comes from the side is carried
	taken [2]bool     // and its peer's socket has all of it
	ended [2]bool     // the side has ended
	torn  bool        // the time is over for the client to end its message
	late  bool        // and the backend's time
	cut   atomic.Bool // not both sides answered in time
	timer *time.Timer // of these times, then of the session's
	done  func(cut bool)
}

// newParting has the Close frames for a cause, causeMoved or causeDrain. done, if
// not nil, is called once the session is over; it must not block.
func newParting(why cause, done func(cut bool)) *parting {
	p := &parting{done: done}
	p.frame[client] = closeFrame(closeGoingAway, "going away", true)
	p.frame[server] = closeFrame(closeGoingAway, "going away", false)
	if why == causeMoved {
		p.frame[server] = closeFrame(closeServiceRestart, "service restart", false)
	}
	return p
}

// sift advances the scanner over the first n bytes of buf, which came from the
// side, and returns how many bytes of buf are to be written to its peer. At the
// end of those the Close frame is, if this is its place: buf has room for
// mostClose more than n. With n of 0 the place may be where the stream is.
func (p *parting) sift(f *frameScanner, i side, buf []byte, n int) int {
	at := 0
	for !p.over[i] {
		if f.boundary() && p.due(f, i, buf[at:n]) {
			f.scan(buf[at:n], i == client)
			p.put[i], p.over[i] = true, true
			return at + copy(buf[at:], p.frame[i])
		}
		p.over[i] = f.closed()
		if at == n {
			return n
		}
		at += f.next(buf[at:n], i == client)
	}
	f.scan(buf[at:n], i == client)
	return at
}

// due reports whether the Close frame may stand here, at a boundary before rest.
func (p *parting) due(f *frameScanner, i side, rest []byte) bool {
	closes := len(rest) > 0 && rest[0]&0xf == opcodeClose
	if i == client {
		return !closes && (f.whole() || p.torn || p.ended[client])
	}
	return p.late || p.ended[server] || closes && p.put[client]
}

// begin starts the times of a parting that takes closing at most. overdue is called
// at the end of each.
func (p *parting) begin(closing time.Duration, overdue func()) {
	p.timer = time.AfterFunc(closing/4, overdue)
}

// expire is for the end of one of the times. It reports whether it was the last.
func (p *parting) expire(closing time.Duration) (last bool) {
	switch {
	case p.late:
		return true
	case p.torn:
		p.late = true
		p.timer.Reset(closing / 2)
	default:
		p.torn = true
		p.timer.Reset(closing / 4)
	}
	return false
}

// offends reports whether the backend, which the scanner follows, has to be cut off:
// the client is told now, and it gave no answer.
func (p *parting) offends(f *frameScanner) bool {
	return p.late && p.put[server] && !p.ended[server] && !f.closed()
}

// state reports whether both sides have answered and have what they should get,
// or whether a side never will.
func (p *parting) state(frames *[2]frameScanner) (answered, hopeless bool) {
	answered = true
	for i := range frames {
		f := &frames[i]
		answered = answered && p.taken[i] && (p.ended[i] || f.closed())
		hopeless = hopeless || !p.over[i] && (p.ended[i] || f.broken())
	}
	return answered, hopeless
}

// finish is for a session that is over: it says so to who asked for it.
func (p *parting) finish() (cut bool) {
	if p.timer != nil {
		p.timer.Stop()
	}
	cut = p.cut.Load()
	if p.done != nil {
		p.done(cut)
	}
	return cut
}
