package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkHandshake is one session: dial, upgrade, first message, close. The
// client and the backend are in the figure too.
func BenchmarkHandshake(b *testing.B) {
	greeting := switching + "hello"
	backend := startStub(b, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, greeting)
		br.ReadByte()
	})
	p := startProxy(b, []string{backend.addr}, map[string]string{}, nil)
	request := []byte(upgradeRequest("/ws/ns-01"))
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := conn.Write(request); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < len(greeting); {
			n, err := conn.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			got += n
		}
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
}

// BenchmarkFrameScan is per chunk of whole frames, which are as from a client.
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
			if !f.boundary() {
				b.Fatal("not at a boundary after whole frames")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.frames), "ns/frame")
		})
	}
}
