package main

import (
	"crypto/rand"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// frameScanner follows the WebSocket frames of one direction of a session (RFC 6455
// §5.2). It finds where the router may insert a frame of its own. The zero value is
// at the start of the stream, the first byte after the handshake.
//
// It checks only what it needs to find the end of a frame, and what shows that the
// stream does not consist of frames: a mask bit that is wrong for the direction, a
// reserved opcode, a control frame that is fragmented or too long, a length of more
// than 63 bits. After such a violation the scanner is broken for good: it finds no
// boundary any more, and the relay carries the stream as it is.
//
// It ignores all else, which is between the endpoints: reserved bits belong to
// extensions (permessage-deflate, RFC 7692, uses RSV1). The order of fragments does
// not matter here. A length in more bytes than it needs, which §5.2 forbids, still
// shows where the frame ends.
type frameScanner struct {
	frameLeft   uint64 // bytes after the length; in frameExtendedLength: the length so far
	state       frameState
	lengthBytes uint8 // in frameExtendedLength: bytes of the length still to come
	opcode      uint8 // of the frame; means nothing in frameBoundary
	fragmented  bool  // the last data frame did not end its message
}

// frameState is the part of a frame in which a stream is.
type frameState uint8

const (
	frameBoundary       frameState = iota // between two frames or fragments
	frameSecondByte                       // before the second byte
	frameExtendedLength                   // before or within the length of 16 or 64 bits
	framePayload                          // before or within the masking key and the payload
	frameClosed                           // after a Close frame
	frameBroken                           // after a violation
)

const (
	frameFin          = 0x80 // in the first byte
	frameMasked       = 0x80 // in the second byte
	maskKey           = 4    // bytes
	maxDataOpcode     = 2    // the largest opcode of data frames (RFC 6455 §11.8)
	opcodeClose       = 8    // the smallest opcode of control frames
	maxControlOpcode  = 10   // the largest opcode of control frames
	maxFrameHeader    = 14   // bytes before the payload
	maxControlPayload = 125  // bytes of payload of a control frame (RFC 6455 §5.5)
)

// Status codes of Close frames.
const (
	closeGoingAway      = 1001 // the endpoint goes away (RFC 6455 §7.4.1)
	closeServiceRestart = 1012 // connect again (IANA WebSocket Close Code Number Registry)
)

// scan advances over chunk, the next bytes of the stream. A chunk may begin and end
// anywhere. masked reports whether the frames of this direction must be masked:
// frames from the client must be, frames from the backend must not be (RFC 6455
// §5.1). It reads headers only: its time grows with the number of frames.
func (f *frameScanner) scan(chunk []byte, masked bool) {
	for len(chunk) > 0 {
		chunk = chunk[f.next(chunk, masked):]
	}
}

// next is like scan, but stops at the next boundary. It returns how many bytes of
// chunk it advanced over: all, if chunk has no boundary. If the scanner is at a
// boundary already, the next one is the end of the frame that begins with chunk.
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

// shortFrame is the fast path for most frames: it returns the size in bytes of the
// frame at the start of chunk if chunk has all of it, and it is a data frame with at
// most 125 bytes of payload that ends its message. It returns 0 for all others. The
// other methods handle every frame, but take twice the time.
func shortFrame(chunk []byte, masked bool) int {
	if len(chunk) < 2 || chunk[0]&0xf > maxDataOpcode || chunk[0]&frameFin == 0 {
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

// firstByte reads the first byte of a frame: FIN, reserved bits, opcode.
func (f *frameScanner) firstByte(b byte) {
	f.opcode, f.state = b&0xf, frameSecondByte
	if f.opcode <= maxDataOpcode {
		f.fragmented = b&frameFin == 0
	}
	control := f.opcode >= opcodeClose && f.opcode <= maxControlOpcode && b&frameFin != 0
	if f.opcode > maxDataOpcode && !control {
		f.state = frameBroken
	}
}

// secondByte reads the second byte of a frame: the mask bit and the length, or the
// number of bytes in which the length follows.
func (f *frameScanner) secondByte(b byte, masked bool) {
	switch size := b &^ frameMasked; {
	case b >= frameMasked != masked, f.opcode >= opcodeClose && size > maxControlPayload:
		f.state = frameBroken
	case size > 125:
		f.state, f.lengthBytes = frameExtendedLength, 2+6*(size&1) // 126: 2 bytes, 127: 8
	default:
		f.startPayload(uint64(size), masked)
	}
}

// extendedLength reads one byte of a length of 16 or 64 bits.
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

// startPayload begins the part after the length: the masking key, if there is one,
// and size bytes of payload. The part may be empty: the caller has to call skip.
func (f *frameScanner) startPayload(size uint64, masked bool) {
	if masked {
		size += maskKey
	}
	f.frameLeft, f.state = size, framePayload
}

// remaining returns how many bytes of masking key and payload the present frame still
// has to come, up to 2^63+3. It is 0 at a boundary, while the length is not known,
// and after a Close frame or a violation.
func (f *frameScanner) remaining() uint64 {
	if f.state != framePayload {
		return 0
	}
	return f.frameLeft
}

// skip advances over n bytes without reading them. n is at most remaining().
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

// atBoundary reports whether a frame may be inserted here: the stream is between two
// frames, and no Close frame has passed. A control frame may stand between two
// fragments of a message too (RFC 6455 §5.4).
func (f *frameScanner) atBoundary() bool { return f.state == frameBoundary }

// messageComplete reports whether every message that began has ended. A Close frame
// is allowed between two fragments too, but the message then never ends.
func (f *frameScanner) messageComplete() bool { return !f.fragmented }

// closed reports whether all of a Close frame has passed. Nothing may follow it (RFC
// 6455 §5.5.1), and the scanner ignores all further bytes.
func (f *frameScanner) closed() bool { return f.state == frameClosed }

// broken reports whether the stream does not consist of frames. There will never be a
// boundary again, so nobody should wait for one.
func (f *frameScanner) broken() bool { return f.state == frameBroken }

// closeFrame returns a Close frame (RFC 6455 §5.5.1). reason is UTF-8 text for
// people; at most 123 bytes of whole characters are used. A frame to the backend is
// masked. Its masking key is from crypto/rand, because §5.3 demands a strong source
// of entropy; one frame in a session's life may take that time.
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

// side is one of the two ends of a session.
type side int

// other returns the peer of i, which gets the bytes that come from i.
func (i side) other() side { return 1 - i }

const (
	clientSide side = iota
	backendSide
)

// closeTimeout is the longest time of a closing handshake: after it the relay ends the
// session. In its first quarter the client may end a message of which the
// backend has a part. In its first half the backend may answer.
const closeTimeout = 5 * time.Second

// maxCloseFrame is the size of the largest Close frame, in bytes.
const maxCloseFrame = 2 + maskKey + maxControlPayload

// closingHandshake ends a session by Close frames. The router inserts each of them at
// the end of a frame of the stream (RFC 6455 §5.5.1, §7.1.2):
//
//  1. The backend gets its Close frame, and nothing after it. The router inserts it
//     at the end of a message, or between two fragments if the message takes too
//     long.
//  2. The relay carries what the backend still sends until the backend answers, by
//     its Close frame or by the end of its stream. The client then gets the router's
//     Close frame instead of the backend's, and nothing after it.
//  3. When the client has answered too, the relay closes both sockets.
//
// The backend is first because a client that gets a Close frame connects again at
// once, to the new owner. By then the old owner has let go of it, and all that the
// old owner sent has arrived. A backend that does not answer in its time is given up: it is
// reset, or it gets a FIN and steps of a hand-off wait for its end (relay.shouldAbandon).
//
// What a side sends after its peer got the Close frame is read and dropped. A socket
// that is closed with unread bytes sends a reset, which destroys the bytes on their
// way to the other side.
//
// If a side sends a Close frame by itself, the relay carries it and inserts none after
// it. If a stream cannot reach the end of a frame, because it does not consist of
// frames or has ended within one, there is nothing to wait for: the relay ends the
// session.
//
// The lock that guards the session's sockets guards all fields but complete. Arrays are
// indexed by the side from which the bytes come.
type closingHandshake struct {
	closeFrames   [2][]byte // the Close frame that ends the stream to the side's peer
	closeInserted [2]bool   // closeFrames[side] is in there; static after the session's end
	stopped       [2]bool   // nothing more that comes from the side is carried
	flushed       [2]bool   // stopped, and the peer's socket has taken all before
	// noMoreFrom says that nothing more comes from the side: it has ended its stream, a read of
	// it has failed, or the router has given it up. It begins as a copy of sessionIO.fin, which
	// every session has: without a handshake a failed read ends the session instead. From then
	// on relay_linux.go sets both, and relay_portable.go only noMoreFrom.
	noMoreFrom     [2]bool
	messageOverdue bool        // the client's time to end its message is over
	answerOverdue  bool        // the backend's time to answer is over
	complete       atomic.Bool // both sides have answered, or ended, and got all they should get
	gaveUp         bool        // the backend did not answer and was given up, or no side takes anything
	timer          *time.Timer // of the present part of the session's closeTimeout
	onEnd          func(cut bool)
}

// insertClose advances the scanner over the first n bytes of buf, which came from
// side i, and returns how many bytes of buf the caller has to write to the peer. They
// end with the Close frame, if it may stand there: buf must have room for n +
// maxCloseFrame bytes. With n = 0 the Close frame may stand where the stream is now.
func (h *closingHandshake) insertClose(f *frameScanner, i side, buf []byte, n int) int {
	at := 0
	for !h.stopped[i] {
		if f.atBoundary() && h.mayClose(f, i, buf[at:n]) {
			f.scan(buf[at:n], i == clientSide)
			h.closeInserted[i], h.stopped[i] = true, true
			return at + copy(buf[at:], h.closeFrames[i])
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

// mayClose reports whether the Close frame may stand here, at a boundary: rest are the
// next bytes that came from side i.
func (h *closingHandshake) mayClose(f *frameScanner, i side, rest []byte) bool {
	closes := len(rest) > 0 && rest[0]&0xf == opcodeClose
	if i == clientSide {
		return !closes && (f.messageComplete() || h.messageOverdue || h.noMoreFrom[clientSide])
	}
	return h.answerOverdue || h.noMoreFrom[backendSide] || closes && h.closeInserted[clientSide]
}

// start starts the handshake of a session of which the sides in ended have ended
// already. It may take timeout. overdue is called at the end of each of its three
// parts, and calls expire.
func (h *closingHandshake) start(ended [2]bool, timeout time.Duration, overdue func()) {
	h.stopped, h.flushed, h.noMoreFrom = ended, ended, ended
	h.timer = time.AfterFunc(timeout/4, overdue)
}

// expire is called at the end of one part of timeout. It reports whether that was
// the last one: the caller ends the session then.
func (h *closingHandshake) expire(timeout time.Duration) (last bool) {
	switch {
	case h.answerOverdue:
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

// mustDropBackend reports whether the caller has to give up the backend (its method of the same
// name), because the backend did not answer in its time and the client has its Close frame.
// The handshake goes on as if the backend had ended, and the session counts as cut.
// f is the scanner of what the backend sends.
func (h *closingHandshake) mustDropBackend(f *frameScanner) bool {
	if !h.answerOverdue || !h.closeInserted[backendSide] || h.noMoreFrom[backendSide] || f.closed() {
		return false
	}
	h.gaveUp = true
	h.noMoreFrom[backendSide], h.stopped[clientSide], h.flushed[clientSide] = true, true, true
	return true
}

// progress reports whether the caller has to end the session: both sides have
// answered and got all they should get, or one of them never will. Only in the former
// case, and with a backend that was not given up, is the handshake complete.
func (h *closingHandshake) progress(scanners *[2]frameScanner) (over bool) {
	answered, hopeless := true, false
	for i := range scanners {
		f := &scanners[i]
		answered = answered && h.flushed[i] && (h.noMoreFrom[i] || f.closed())
		hopeless = hopeless || !h.stopped[i] && (h.noMoreFrom[i] || f.broken())
	}
	if answered && !h.gaveUp {
		h.complete.Store(true)
	}
	return answered || hopeless
}

// end stops the timer, calls onEnd and returns whether the session was cut: it ended, for
// any reason, before the handshake was complete. It is called once, when the session is
// over.
func (h *closingHandshake) end() (cut bool) {
	if h.timer != nil {
		h.timer.Stop()
	}
	cut = !h.complete.Load()
	if h.onEnd != nil {
		h.onEnd(cut)
	}
	return cut
}
