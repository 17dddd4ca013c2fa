package main

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// FuzzFrames holds the scanner against a parse of the whole stream, however the
// stream is cut.
func FuzzFrames(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, masked := range []bool{true, false} {
		f.Add(manyFrames(rng, masked, 3), masked, rng.Uint64())
		f.Add(append(frameBytes(0x82, masked, 1<<63-1, nil), "abc"...), masked, rng.Uint64())
		f.Add(append(frameBytes(0x88, masked, 2, []byte("\x03\xe8")), 0xff), masked, rng.Uint64())
		for _, violation := range frameViolations {
			f.Add(violation.stream, masked, rng.Uint64())
		}
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

// manyFrames are valid frames of all kinds but Close.
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

// wantOracle carries a stream in random chunks, in all the ways there are, and
// compares after each.
func wantOracle(t *testing.T, stream []byte, masked bool, rng *rand.Rand) {
	t.Helper()
	views := frameOracle(stream, masked)
	most := []int{1, 3, 20, 1000, 1 << 17}[rng.IntN(5)]
	var f frameScanner
	for at := 0; ; {
		if got := viewOf(&f); got != views[at] {
			t.Fatalf("after %d of %d bytes, masked %v: %+v, want %+v", at, len(stream), masked, got, views[at])
		}
		if at == len(stream) {
			return
		}
		chunk := stream[at:min(len(stream), at+rng.IntN(most+1))]
		switch rest := f.rest(); {
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

// frameView is what there is to know of a scanner.
type frameView struct {
	boundary, whole, closed, broken bool // whole: at a boundary only
	rest                            uint64
}

func viewOf(f *frameScanner) frameView {
	return frameView{f.boundary(), f.boundary() && f.whole(), f.closed(), f.broken(), f.rest()}
}

// frameOracle returns what is to be known after each number of bytes of a
// stream, from none to all.
func frameOracle(stream []byte, masked bool) (views []frameView) {
	views = make([]frameView, len(stream)+1)
	whole := true
	for at := 0; at <= len(stream); {
		views[at].boundary, views[at].whole = true, whole
		header, rest, wrong := frameOracleHeader(stream[at:], masked)
		switch {
		case wrong > 0:
			return append(views[:at+wrong], slices.Repeat([]frameView{{broken: true}}, len(stream)+1-at-wrong)...)
		case header == 0:
			return views
		}
		first := stream[at]
		if first&8 == 0 {
			whole = first&0x80 != 0
		}
		for at += header; rest > 0 && at <= len(stream); at++ {
			views[at].rest = rest
			rest--
		}
		if first&0xf == 8 && at <= len(stream) {
			return append(views[:at], slices.Repeat([]frameView{{closed: true}}, len(stream)+1-at)...)
		}
	}
	return views
}

// frameOracleHeader returns how long the header is up to the masking key, or 0
// if it is not all there, and how much follows it. wrong is after how many bytes
// it is seen to be a violation, if it is.
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
