package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"syscall"
)

const (
	backendCount = 4
	firstBackend = 9000 // port of backend-0; peers/ has them too

	maxHead     = 64 << 10 // bytes of a request's or an answer's head
	streamFrame = 64 << 10 // bytes of payload of the frames of a stream

	// A backend greets with these, its number and the namespace between them.
	greetingServer    = `{"server":"backend-`
	greetingNamespace = `","namespace":"`
	greetingQuery     = `","query":"` // of a plain request
	greetingEnd       = `"}`
)

// backends are WebSocket and HTTP servers in one loop.
//
// They greet each session, in the segment of the 101, and then echo. The text
// message "stream N" makes them send N frames of streamFrame bytes instead.
//
// A GET or POST that is no upgrade gets, in its answer's body, who answers, the
// namespace and the query, and after that the body of the request: appendAnswer.
type backends struct {
	*loop
	reply   []byte // to what was received last
	stretch []byte // of a stream: as many frames as are written at once
}

// backendPorts returns the ports of the backends.
func backendPorts() (ports []int) {
	for i := range backendCount {
		ports = append(ports, firstBackend+i)
	}
	return ports
}

// newBackends listens on the ports, the i-th of which is backend-i's.
func newBackends(ports []int) (*backends, error) {
	l, err := newLoop(nil)
	if err != nil {
		return nil, err
	}
	l.holdReads = true
	b := &backends{loop: l, stretch: bytes.Repeat(appendFrame(nil, frameBinary, pattern(streamFrame), nil), 4)}
	for number, port := range ports {
		fd, err := listen(port)
		if err != nil {
			return nil, err
		}
		listener := &conn{accept: func() error { return b.accept(fd, number) }}
		if err := l.add(listener, fd, nil); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// listen returns a listening socket on 127.0.0.1. What it accepts has its
// TCP_NODELAY.
func listen(port int) (int, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	err = errors.Join(
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1),
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1),
		syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}),
		syscall.Listen(fd, 65535))
	if err != nil {
		syscall.Close(fd)
		return -1, fmt.Errorf("listen on 127.0.0.1:%d: %w", port, err)
	}
	return fd, nil
}

// accept takes the connections that wait at the listener of a backend.
func (b *backends) accept(listener, number int) error {
	for {
		fd, _, err := syscall.Accept4(listener, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		if err == syscall.EAGAIN {
			return nil
		}
		if err == syscall.ECONNABORTED {
			continue
		}
		if err == nil {
			s := &served{backends: b, number: number}
			err = b.add(&s.conn, fd, s)
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
	}
}

// served is the backend's end of a session.
type served struct {
	conn
	backends *backends
	number   int   // of the backend
	upgraded bool  // the 101 is sent
	left     int64 // bytes of the stream still to be sent
}

// received answers what is whole of p. A request or a frame that may not be (RFC 6455
// §5.1) ends the connection, after the answers to those before it.
func (s *served) received(p []byte) (used int) {
	b := s.backends
	b.reply = b.reply[:0]
	bad := false
	for !s.upgraded && used < len(p) {
		size, ok := s.request(p[used:])
		bad = !ok
		if bad || size == 0 {
			break
		}
		used += size
	}
	for s.upgraded {
		f, size, err := parseFrame(p[used:])
		bad = err != nil || size > 0 && !f.masked
		if bad || size == 0 {
			break
		}
		used += size
		s.handle(&f)
	}
	if s.open() {
		s.send(b.reply)
	}
	if bad {
		s.close()
	}
	return used
}

// handle appends the echo of a frame to the reply, or begins a stream.
func (s *served) handle(f *frame) {
	xor(f.payload, f.mask)
	if number, ok := bytes.CutPrefix(f.payload, []byte("stream ")); ok && f.first == frameText {
		frames, _ := strconv.ParseInt(string(number), 10, 64)
		s.left, s.more = frames*int64(len(s.backends.stretch)/4), true
		return
	}
	s.backends.reply = appendFrame(s.backends.reply, f.first, f.payload, nil)
}

func (s *served) drained() {
	for turn := 0; turn < 4 && s.left > 0 && len(s.out) == 0; turn++ {
		p := s.backends.stretch
		p = p[:min(int64(len(p)), s.left)]
		n := s.write(p)
		if n < 0 {
			return
		}
		s.left -= int64(len(p))
		s.out = p[n:len(p):len(p)] // it never changes; what is appended is a copy
	}
	s.more = s.left > 0
}

func (s *served) lost(string) {}

// request appends the answer to the request at the beginning of p to the reply, and says
// how long it is; 0 when more bytes are needed. A request that is not ok has got 400.
func (s *served) request(p []byte) (used int, ok bool) {
	head, rest, whole := bytes.Cut(p, []byte("\r\n\r\n"))
	if !whole && len(p) <= maxHead {
		return 0, true
	}
	line, headers, _ := bytes.Cut(head, []byte("\r\n"))
	method, target, _ := bytes.Cut(line, []byte(" /ws/"))
	target, found := bytes.CutSuffix(target, []byte(" HTTP/1.1"))
	protocol := header(headers, "Upgrade")
	size, err := bodySize(headers)
	get := string(method) == "GET"
	switch ok = whole && found && err == nil; {
	case ok && protocol != nil:
		ok = get && size == 0 && s.upgrade(target, headers, protocol)
	case ok && !get && string(method) != "POST":
		ok = false
	case ok && len(rest) < size:
		return 0, true
	case ok:
		namespace, query, _ := bytes.Cut(target, []byte("?"))
		s.backends.reply = appendAnswer(s.backends.reply, s.number, namespace, query, rest[:size])
	}
	if !ok {
		s.backends.reply = append(s.backends.reply, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"...)
	}
	return len(head) + 4 + size, ok
}

// bodySize is the Content-Length of a head, 0 without one. Other bodies are an error:
// no proxy has to make one of those that it gets.
func bodySize(headers []byte) (int, error) {
	if header(headers, "Transfer-Encoding") != nil {
		return 0, errors.New("a body in chunks")
	}
	length := header(headers, "Content-Length")
	if length == nil {
		return 0, nil
	}
	size, err := strconv.ParseUint(string(length), 10, 31)
	return int(size), err
}

// upgrade appends the 101 and the greeting to the reply (RFC 6455 §4.2), and returns
// whether the request may have them.
func (s *served) upgrade(namespace, headers, protocol []byte) bool {
	key := header(headers, "Sec-WebSocket-Key")
	if len(key) != 24 || !bytes.EqualFold(protocol, []byte("websocket")) ||
		string(header(headers, "Sec-WebSocket-Version")) != "13" {
		return false
	}
	s.upgraded = true
	reply := append(s.backends.reply, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: "...)
	reply = append(acceptKey(reply, key), "\r\n\r\n"...)
	var buf [256]byte
	greeting := strconv.AppendInt(append(buf[:0], greetingServer...), int64(s.number), 10)
	greeting = append(append(greeting, greetingNamespace...), namespace...)
	s.backends.reply = appendFrame(reply, frameText, append(greeting, greetingEnd...), nil)
	return true
}

// appendAnswer appends the answer of a backend to a plain request.
func appendAnswer(b []byte, backend int, namespace, query, body []byte) []byte {
	size := len(greetingServer) + 1 + len(greetingNamespace) + len(namespace) + len(greetingQuery) + len(query) + len(greetingEnd) + len(body)
	b = append(b, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nCache-Control: no-cache\r\nContent-Length: "...)
	b = append(strconv.AppendInt(b, int64(size), 10), "\r\n\r\n"...)
	return appendAnswerBody(b, backend, namespace, query, body)
}

// appendAnswerBody appends the body of that answer. backend has one digit.
func appendAnswerBody(b []byte, backend int, namespace, query, body []byte) []byte {
	b = append(append(b, greetingServer...), '0'+byte(backend))
	b = append(append(b, greetingNamespace...), namespace...)
	b = append(append(b, greetingQuery...), query...)
	return append(append(b, greetingEnd...), body...)
}
