package main

import (
	"crypto/rand"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// frameScanner follows one direction of a session through its WebSocket frames
// (RFC 6455 §5.2), to know where a frame of the router's own may stand. The zero
// value is at the start of the stream, the first byte after the handshake.
//
// It judges only what finding the end of a frame rests on, and what shows that
// this is no stream of frames: a mask bit that is wrong for the direction, a
// reserved opcode, a control frame that is fragmented or too long, a length
// over 63 bits. Then it is broken for good: it has no boundary any more, and
// the stream is carried as it is. All else is between the endpoints: reserved
// bits are their extensions' (permessage-deflate, RFC 7692, has RSV1), the
// order of fragments does not matter here, and a length in more bytes than it
// needs, which §5.2 forbids, says where the frame ends just the same.
type frameScanner struct {
	frameLeft   uint64 // bytes of the frame after its length; the length as far as it is known at frameExtendedLength
	state       frameState
	lengthBytes uint8 // bytes of the length that are still to come, at frameExtendedLength
	opcode      uint8 // of the frame, unless at frameBoundary
	fragmented  bool  // the last data frame was not the end of its message
}

// frameState is where in its frames a stream is.
type frameState uint8

const (
	frameBoundary       frameState = iota // between two frames or fragments
	frameSecondByte                       // before the second byte, with the mask bit and the length's 7 bits
	frameExtendedLength                   // before or in the length of 16 or 64 bits
	framePayload                          // in the masking key or the payload
	frameClosed                           // after a Close frame
	frameBroken                           // after a violation
)

const (
	frameFin          = 0x80 // in the first byte
	frameMasked       = 0x80 // in the second byte
	maskKey           = 4    // bytes
	opcodeData        = 2    // the last opcode of data frames, which begin at 0 (RFC 6455 §11.8)
	opcodeClose       = 8    // the first of control frames
	opcodeControl     = 10   // the last of control frames
	maxFrameHeader    = 14   // bytes before the payload
	maxControlPayload = 125  // bytes of payload of a control frame (§5.5)
)

// Codes of Close frames.
const (
	closeGoingAway      = 1001 // the endpoint goes away (RFC 6455 §7.4.1)
	closeServiceRestart = 1012 // connect again (IANA's WebSocket Close Code Number Registry)
)

// scan advances over chunk, which is what comes next in the stream, cut
// anywhere. masked is whether this direction's frames have to be: those from the
// client have, those from the backend must not be (RFC 6455 §5.1). It looks at
// headers only, so its time is in the number of frames.
func (f *frameScanner) scan(chunk []byte, masked bool) {
	for len(chunk) > 0 {
		chunk = chunk[f.next(chunk, masked):]
	}
}

// next is scan up to the next boundary: it returns how much of chunk it advanced
// over, which is all if there is no boundary in it. At a boundary, the next one
// is the end of the frame that begins with chunk.
func (f *frameScanner) next(chunk []byte, masked bool) (n int) {
	if f.state == frameBoundary && len(chunk) > 0 {
		if n = shortFrame(chunk, masked); n > 0 {
			f.fragmented = false
			return n
		}
		f.firstByte(chunk[0])
		n = 1
	}
	if f.state == frameSecondByte && n < len(chunk) {
		f.secondByte(chunk[n], masked)
		n++
	}
	for f.state == frameExtendedLength && n < len(chunk) {
		f.extendedLength(chunk[n], masked)
		n++
	}
	if f.state == framePayload {
		here := min(f.frameLeft, uint64(len(chunk)-n))
		f.skip(here)
		n += int(here)
	}
	if f.state == frameClosed || f.state == frameBroken {
		return len(chunk)
	}
	return n
}

// shortFrame returns how long the frame is that chunk begins with, if all of it
// is there and it is a data frame with at most 125 bytes of payload that ends its
// message, as most are. It returns 0 for any other: the steps below are for all
// frames, but take twice the time.
func shortFrame(chunk []byte, masked bool) int {
	if len(chunk) < 2 || chunk[0]&0xf > opcodeData || chunk[0]&frameFin == 0 {
		return 0
	}
	n := int(chunk[1])
	if masked {
		n ^= frameMasked
	}
	if n > 125 { // more than 127: the mask bit is wrong
		return 0
	}
	if n += 2; masked {
		n += maskKey
	}
	if n > len(chunk) {
		return 0
	}
	return n
}

// firstByte takes the first byte of a frame: FIN, reserved bits, opcode.
func (f *frameScanner) firstByte(b byte) {
	f.opcode, f.state = b&0xf, frameSecondByte
	if f.opcode <= opcodeData {
		f.fragmented = b&frameFin == 0
	}
	control := f.opcode >= opcodeClose && f.opcode <= opcodeControl && b&frameFin != 0
	if f.opcode > opcodeData && !control {
		f.state = frameBroken
	}
}

// size takes the second byte of a frame: the mask bit and the length, or how
// many bytes have the length.
func (f *frameScanner) secondByte(b byte, masked bool) {
	switch size := b &^ frameMasked; {
	case b >= frameMasked != masked, f.opcode >= opcodeClose && size > maxControlPayload:
		f.state = frameBroken
	case size > 125:
		f.state, f.lengthBytes = frameExtendedLength, 2+size&1*6 // 126 means 16 bits, 127 64
	default:
		f.startPayload(uint64(size), masked)
	}
}

// extendedLength takes one byte of a length of 16 or 64 bits.
func (f *frameScanner) extendedLength(b byte, masked bool) {
	f.frameLeft = f.frameLeft<<8 | uint64(b)
	f.lengthBytes--
	switch {
	case f.lengthBytes > 0:
	case f.frameLeft>>63 != 0:
		f.state = frameBroken
	default:
		f.startPayload(f.frameLeft, masked)
	}
}

// startPayload begins what is after the length: the key if there is one, and the
// payload. It may be empty: skip has to follow.
func (f *frameScanner) startPayload(left uint64, masked bool) {
	if masked {
		left += maskKey
	}
	f.frameLeft, f.state = left, framePayload
}

// remaining returns how many bytes of the present frame are to come after its length,
// masking key and payload, up to 2^63+3. It is 0 at a boundary, while the length
// is not known, and when there are no frames any more.
func (f *frameScanner) remaining() uint64 {
	if f.state != framePayload {
		return 0
	}
	return f.frameLeft
}

// skip advances over n bytes that nobody looked at, at most rest.
func (f *frameScanner) skip(n uint64) {
	f.frameLeft -= n
	switch {
	case f.frameLeft > 0 || f.state != framePayload:
	case f.opcode == opcodeClose:
		f.state = frameClosed
	default:
		f.state = frameBoundary
	}
}

// atBoundary reports whether a frame may be put here: the stream is between two
// frames, or two fragments if it is a control frame (RFC 6455 §5.4), and no
// Close frame has passed.
func (f *frameScanner) atBoundary() bool { return f.state == frameBoundary }

// messageComplete reports whether every message that began has ended. Between the fragments
// of one a control frame may stand, but a Close frame there leaves it without its
// end.
func (f *frameScanner) messageComplete() bool { return !f.fragmented }

// closed reports whether a Close frame has passed, to its last byte. Nothing may
// be put after it (RFC 6455 §5.5.1), and what comes is no longer looked at.
func (f *frameScanner) closed() bool { return f.state == frameClosed }

// broken reports whether the stream is not one of frames. There will never be a
// boundary, so it is of no use to wait for one.
func (f *frameScanner) broken() bool { return f.state == frameBroken }

// closeFrame returns a Close frame (RFC 6455 §5.5.1). reason is UTF-8 for
// people, and is cut to whole characters in 123 bytes. masked is for a frame to
// the backend. The key is from crypto/rand: §5.3 wants a strong source of
// entropy, and one frame in a session's life may take the time.
func closeFrame(code uint16, reason string, masked bool) []byte {
	size := min(len(reason), maxControlPayload-2)
	for size < len(reason) && size > 0 && !utf8.RuneStart(reason[size]) {
		size--
	}
	head := []byte{frameFin | opcodeClose, byte(2 + size)}
	body := append(binary.BigEndian.AppendUint16(nil, code), reason[:size]...)
	if !masked {
		return append(head, body...)
	}
	head[1] |= frameMasked
	var key [maskKey]byte
	rand.Read(key[:]) // it never fails
	for i := range body {
		body[i] ^= key[i%maskKey]
	}
	return slices.Concat(head, key[:], body)
}

// side is one of a session's two ends.
type side int

// other is the side that gets what comes from i.
func (i side) other() side { return 1 - i }

const (
	clientSide side = iota
	backendSide
)

// closeTimeout bounds how long a session goes on when it is to part: both its
// sockets are closed then. The backend has the first half of it to answer, and the
// client the first quarter to end a message of which the backend has a part.
const closeTimeout = 5 * time.Second

// maxCloseFrame is how many bytes a Close frame has at most.
const maxCloseFrame = 2 + maskKey + maxControlPayload

// closingHandshake is the end of a session by Close frames, each put where a frame ends in
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
type closingHandshake struct {
	frames         [2][]byte   // the Close frame that is to end what comes from the side, for its peer
	sent           [2]bool     // it stands in the stream
	stopped        [2]bool     // nothing more that comes from the side is carried
	flushed        [2]bool     // and its peer's socket has all of it
	ended          [2]bool     // the side has ended
	messageOverdue bool        // the time is over for the client to end its message
	answerOverdue  bool        // and the backend's time
	cut            atomic.Bool // not both sides answered in time
	timer          *time.Timer // of these times, then of the session's
	onDone         func(cut bool)
}

// insertClose advances the scanner over the first n bytes of buf, which came from the
// side, and returns how many bytes of buf are to be written to its peer. At the
// end of those the Close frame is, if this is its place: buf has room for
// maxCloseFrame more than n. With n of 0 the place may be where the stream is.
func (h *closingHandshake) insertClose(f *frameScanner, i side, buf []byte, n int) int {
	at := 0
	for !h.stopped[i] {
		if f.atBoundary() && h.mayClose(f, i, buf[at:n]) {
			f.scan(buf[at:n], i == clientSide)
			h.sent[i], h.stopped[i] = true, true
			return at + copy(buf[at:], h.frames[i])
		}
		h.stopped[i] = f.closed()
		if at == n {
			return n
		}
		at += f.next(buf[at:n], i == clientSide)
	}
	f.scan(buf[at:n], i == clientSide)
	return at
}

// mayClose reports whether the Close frame may stand here, at a boundary before rest.
func (h *closingHandshake) mayClose(f *frameScanner, i side, rest []byte) bool {
	closes := len(rest) > 0 && rest[0]&0xf == opcodeClose
	if i == clientSide {
		return !closes && (f.messageComplete() || h.messageOverdue || h.ended[clientSide])
	}
	return h.answerOverdue || h.ended[backendSide] || closes && h.sent[clientSide]
}

// start starts the handshake of a session of which the sides in ended have ended
// already. It may take timeout. overdue is called at the end of each of its three
// parts, and calls expire.
func (h *closingHandshake) start(ended [2]bool, timeout time.Duration, overdue func()) {
	h.stopped, h.flushed, h.ended = ended, ended, ended
	h.timer = time.AfterFunc(timeout/4, overdue)
}

// expire is called at the end of one part of timeout. It reports whether that was
// the last one: the caller ends the session then, which counts as cut.
func (h *closingHandshake) expire(timeout time.Duration) (last bool) {
	switch {
	case h.answerOverdue:
		h.cut.Store(true)
		return true
	case h.messageOverdue:
		h.answerOverdue = true
		h.timer.Reset(timeout / 2)
	default:
		h.messageOverdue = true
		h.timer.Reset(timeout / 4)
	}
	return false
}

// giveUpBackend reports whether the caller has to reset the backend's connection,
// because the backend did not answer in its time and the client has its Close frame.
// The handshake goes on as if the backend had ended, and the session counts as cut.
// f is the scanner of what the backend sends.
func (h *closingHandshake) giveUpBackend(f *frameScanner) bool {
	if !h.answerOverdue || !h.sent[backendSide] || h.ended[backendSide] || f.closed() {
		return false
	}
	h.cut.Store(true)
	h.ended[backendSide], h.stopped[clientSide], h.flushed[clientSide] = true, true, true
	return true
}

// progress reports whether the caller has to end the session: both sides have
// answered and got all they should get, or one of them never will. In the latter
// case the session counts as cut.
func (h *closingHandshake) progress(frames *[2]frameScanner) (over bool) {
	answered, hopeless := true, false
	for i := range frames {
		f := &frames[i]
		answered = answered && h.flushed[i] && (h.ended[i] || f.closed())
		hopeless = hopeless || !h.stopped[i] && (h.ended[i] || f.broken())
	}
	if hopeless {
		h.cut.Store(true)
	}
	return answered || hopeless
}

// finish stops the timer, calls onDone and returns whether the session was cut. It
// is called once, when the session is over.
func (h *closingHandshake) finish() (cut bool) {
	if h.timer != nil {
		h.timer.Stop()
	}
	cut = h.cut.Load()
	if h.onDone != nil {
		h.onDone(cut)
	}
	return cut
}
