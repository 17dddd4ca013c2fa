package main

import "encoding/binary"

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
