package main

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"
)

const (
	// bindNoPort is IP_BIND_ADDRESS_NO_PORT (ip(7)), which package syscall
	// does not name: the port is chosen by connect, for each destination.
	bindNoPort = 24
	// sources is how many 127.0.0.0/8 addresses sessions come from in turn: one
	// has ports for 28,000 sessions, those of the last minute among them.
	sources = 64
	// width is how many handshakes or checks are under way at a time.
	width = 128
	// browser is what Chrome sends beside the headers of the upgrade.
	browser = "Pragma: no-cache\r\nCache-Control: no-cache\r\n" +
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36\r\n" +
		"Origin: http://app.example.com\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9,de;q=0.8\r\n" +
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n"
)

// user is a scenario: what happens to the sessions of its client.
type user interface {
	opened(*session)          // the greeting has come
	message(*session, *frame) // a frame after it has come
}

// client opens sessions through a proxy, or with backends.
type client struct {
	*loop
	user       user
	config     *tls.Config // of TLS; nil: none
	ports      []int       // namespace i is opened at the i-th, modulo their number
	namespaces []string    // session i has the i-th, modulo their number
	dialed     int         // sessions so far
	opening    int         // of these, with the greeting still to come
	request    []byte      // the last
	failure    error       // of the first session that failed
}

func newClient(t *target, namespaces []string) (*client, error) {
	l, err := newLoop(t.backends.loop)
	if err != nil {
		return nil, err
	}
	return &client{loop: l, config: t.tls, ports: t.ports, namespaces: namespaces}, nil
}

// names returns n namespaces that begin with prefix.
func names(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("%s%04d", prefix, i)
	}
	return list
}

// openAll opens n sessions for user, some at a time.
func (c *client) openAll(n int, user user) error {
	c.user = user
	err := c.until(func() bool {
		for c.dialed < n && c.opening < width && c.failure == nil {
			c.dial()
		}
		return c.opening == 0 || c.failure != nil
	})
	if err = errors.Join(err, c.failure); err != nil {
		return fmt.Errorf("opening %d sessions, %d open: %w", n, c.dialed-c.opening, err)
	}
	return nil
}

// session is the client's end of a session.
type session struct {
	conn
	client    *client
	number    int // from 0
	namespace int
	backend   int // that has greeted; -1 before
	upgraded  bool
	accept    [28]byte      // the Sec-WebSocket-Accept to come
	begun     time.Duration // when its handshake began, or the message under way was sent
	sent      int64         // messages so far
	busy      bool          // a message is under way
}

// dial begins the next session. On loopback it is connected at once, or the
// request is sent when it is.
func (c *client) dial() {
	s := &session{client: c, number: c.dialed, namespace: c.dialed % len(c.namespaces), backend: -1, begun: c.now()}
	c.dialed++
	c.opening++
	fd, err := connect(c.ports[s.namespace%len(c.ports)], s.number)
	if err == nil {
		err = c.add(&s.conn, fd, s)
	}
	if err != nil {
		s.lost(err.Error())
		return
	}
	if c.config != nil {
		s.secure(c.config)
	}
	var raw [16]byte
	var key [24]byte
	binary.LittleEndian.PutUint64(raw[:], uint64(s.number)*0x9e3779b97f4a7c15)
	base64.StdEncoding.Encode(key[:], raw[:])
	acceptKey(s.accept[:0], key[:])
	c.request = append(append(c.request[:0], "GET /ws/"...), c.namespaces[s.namespace]...)
	c.request = append(c.request, " HTTP/1.1\r\nHost: "+hostName+"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		browser+"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "...)
	c.request = append(append(c.request, key[:]...), "\r\n\r\n"...)
	s.send(c.request)
}

// connect returns a socket that connects, or has connected, to a port. The number of
// the connection says from which address.
func connect(port, number int) (fd int, err error) {
	fd, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	err = errors.Join(
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1),
		syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, bindNoPort, 1),
		syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 1, 0, byte(1 + number%sources)}}))
	if err == nil {
		err = syscall.Connect(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	}
	if err != nil && err != syscall.EINPROGRESS {
		syscall.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// received reads the answer, the greeting, and then messages for the user.
func (s *session) received(p []byte) (used int) {
	if !s.upgraded {
		used = s.answered(p)
	}
	for s.open() && s.upgraded {
		f, size, err := parseFrame(p[used:])
		if err != nil {
			s.fail(err.Error())
		}
		if size == 0 {
			return used
		}
		used += size
		switch {
		case f.masked: // RFC 6455 §5.1
			s.fail("a masked frame")
		case s.backend < 0:
			s.greeted(&f)
		default:
			s.client.user.message(s, &f)
		}
	}
	return used
}

// answered reads the answer to the upgrade at the beginning of p, and says how
// long it is; 0 when more bytes are needed.
func (s *session) answered(p []byte) (used int) {
	head, _, whole := bytes.Cut(p, []byte("\r\n\r\n"))
	if !whole && len(p) <= maxHead {
		return 0
	}
	line, headers, _ := bytes.Cut(head, []byte("\r\n"))
	switch {
	case !bytes.HasPrefix(line, []byte("HTTP/1.1 101 ")):
		s.fail(fmt.Sprintf("answer %q", line[:min(len(line), 40)]))
	case !bytes.EqualFold(header(headers, "Upgrade"), []byte("websocket")):
		s.fail("answer without Upgrade: websocket")
	case !bytes.Equal(header(headers, "Sec-WebSocket-Accept"), s.accept[:]):
		s.fail("answer with the Sec-WebSocket-Accept of another request")
	default:
		s.upgraded = true
		used = len(head) + 4
	}
	return used
}

// greeted reads the greeting, which has the backend's number in one digit.
func (s *session) greeted(f *frame) {
	rest, ok := bytes.CutPrefix(f.payload, []byte(greetingServer))
	if !ok || len(rest) == 0 || string(rest[1:]) != greetingNamespace+s.client.namespaces[s.namespace]+greetingEnd {
		s.fail(fmt.Sprintf("greeting %q in namespace %s", f.payload[:min(len(f.payload), 60)], s.client.namespaces[s.namespace]))
		return
	}
	s.backend = int(rest[0] - '0')
	s.client.opening--
	s.client.user.opened(s)
}

func (s *session) drained() {}

func (s *session) lost(why string) {
	if s.backend < 0 {
		s.client.opening--
	}
	if s.client.failure == nil {
		s.client.failure = fmt.Errorf("session %d: %s", s.number, why)
	}
}
