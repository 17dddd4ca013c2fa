package main

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
)

// First bytes of frames that are whole messages (RFC 6455 §5.2).
const (
	frameText   = 0x81
	frameBinary = 0x82
)

const maxFrame = 64 << 20 // bytes of payload

var errTooLarge = errors.New("a frame of more than 64 MiB")

// frame is one frame of RFC 6455 §5.2; the payload is still masked.
type frame struct {
	first   byte // FIN, RSV and opcode
	masked  bool
	mask    [4]byte
	payload []byte
}

// parseFrame reads the frame at the beginning of b, of size bytes; size is 0
// when more bytes are needed.
func parseFrame(b []byte) (f frame, size int, err error) {
	if len(b) < 2 {
		return f, 0, nil
	}
	f.first, f.masked = b[0], b[1]&0x80 != 0
	length, at := uint64(b[1]&0x7f), 2
	switch {
	case length == 126 && len(b) >= 4:
		length, at = uint64(binary.BigEndian.Uint16(b[2:])), 4
	case length == 127 && len(b) >= 10:
		length, at = binary.BigEndian.Uint64(b[2:]), 10
	case length >= 126:
		return f, 0, nil
	}
	if length > maxFrame {
		return f, 0, errTooLarge
	}
	if f.masked {
		if len(b) < at+4 {
			return f, 0, nil
		}
		at += copy(f.mask[:], b[at:at+4])
	}
	if len(b)-at < int(length) {
		return f, 0, nil
	}
	f.payload = b[at : at+int(length)]
	return f, at + int(length), nil
}

// appendFrame appends a frame; with mask nil it is not masked.
func appendFrame(b []byte, first byte, payload []byte, mask *[4]byte) []byte {
	var masked byte
	if mask != nil {
		masked = 0x80
	}
	switch n := len(payload); {
	case n < 126:
		b = append(b, first, masked|byte(n))
	case n < 1<<16:
		b = append(b, first, masked|126)
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	default:
		b = append(b, first, masked|127)
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	if mask == nil {
		return append(b, payload...)
	}
	b = append(b, mask[:]...)
	b = append(b, payload...)
	xor(b[len(b)-len(payload):], *mask)
	return b
}

// xor masks p in place, or unmasks it.
func xor(p []byte, mask [4]byte) {
	wide := uint64(binary.LittleEndian.Uint32(mask[:]))
	wide |= wide << 32
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)^wide)
		p = p[8:]
	}
	for i := range p {
		p[i] ^= mask[i&3]
	}
}

// acceptKey appends the Sec-WebSocket-Accept of a key (RFC 6455 §4.2.2).
func acceptKey(b, key []byte) []byte {
	var buf [64]byte
	sum := sha1.Sum(append(append(buf[:0], key...), "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"...))
	return base64.StdEncoding.AppendEncode(b, sum[:])
}

// header returns the value of a header in the lines of a head, nil if it is not
// there.
func header(head []byte, name string) []byte {
	for line := range bytes.Lines(head) {
		key, value, ok := bytes.Cut(line, []byte(":"))
		if ok && len(key) == len(name) && bytes.EqualFold(key, []byte(name)) {
			return bytes.TrimSpace(value)
		}
	}
	return nil
}

// pattern is a payload that both ends know.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i) ^ byte(i>>8)*31
	}
	return p
}
