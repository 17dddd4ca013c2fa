package main

import (
	"bufio"
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
