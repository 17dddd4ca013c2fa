package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/net/websocket"
)

// Bounds of the client.
const (
	dialTime      = 10 * time.Second
	handshakeTime = 30 * time.Second // longer than the router holds an upgrade
	maxReceived   = 16 << 20         // bytes of a message
	maxLine       = 1 << 20          // bytes of a line typed
	maxRefusal    = 64 << 10         // bytes kept of an answer that is not 101
)

// client is one connection of -connect.
type client struct {
	cfg  config
	ws   *websocket.Conn
	conn net.Conn // below ws; closed by connect
	std  stdio
}

// connect prints what cfg.connect sends until one side ends it. It owns the
// connection. It does not wait for the goroutine that reads standard input,
// because nothing can end a read of a terminal; that one holds nothing else.
func connect(ctx context.Context, cfg config, std stdio) error {
	ws, conn, err := dial(ctx, cfg)
	if err != nil {
		return fmt.Errorf("connect %q: %w", cfg.connect, err)
	}
	c := &client{cfg, ws, conn, std}
	said := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(said)
		c.goodbye()
	})
	defer func() {
		conn.Close()
		if !unwatch() {
			<-said
		}
	}()
	go c.sendLines()

	err = c.printAll()
	if ctx.Err() != nil {
		return nil
	}
	return c.explain(err)
}

// printAll prints cfg.count messages, closes and returns nil, or returns the
// error that ended the connection before.
func (c *client) printAll() error {
	for n := 1; ; n++ {
		f, err := nextFrame(c.ws)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(io.LimitReader(f, maxReceived+1))
		switch {
		case err != nil:
			return err
		case len(text) > maxReceived:
			return fmt.Errorf("message longer than %d bytes", maxReceived)
		}
		if _, err := fmt.Fprintf(c.std.out, "%s\n", text); err != nil {
			return err
		}
		if n == c.cfg.count {
			c.goodbye()
			c.awaitClose()
			return nil
		}
	}
}

// explain is the verdict over the end of a connection: nil when the server
// closed it in order, after a line on stderr that says so.
func (c *client) explain(err error) error {
	var closed closeError
	switch {
	case errors.As(err, &closed):
		c.ws.WriteClose(echoCode(closed.code))
	case errors.Is(err, io.EOF):
		return errors.New("connection ended without a Close")
	default:
		return err
	}
	switch closed.code {
	case closeNormal, closeGoingAway, closeNoStatus, closeRestart:
		fmt.Fprintf(c.std.err, "closed by the server: %v\n", closed)
		return nil
	}
	return fmt.Errorf("closed by the server: %w", closed)
}

// goodbye sends Close 1000; the server has the close time to answer.
func (c *client) goodbye() {
	c.conn.SetReadDeadline(time.Now().Add(c.cfg.closeTime))
	c.ws.WriteClose(closeNormal)
}

// awaitClose reads on to the server's Close or the deadline of goodbye.
func (c *client) awaitClose() {
	for {
		f, err := nextFrame(c.ws)
		if err != nil {
			return
		}
		io.Copy(io.Discard, f)
	}
}

// sendLines sends each line of standard input. At its end the connection goes
// on, so that </dev/null is no reason to stop printing.
func (c *client) sendLines() {
	lines := bufio.NewScanner(c.std.in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if websocket.Message.Send(c.ws, lines.Text()) != nil {
			return // printAll sees and reports it
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintf(c.std.err, "standard input: %v\n", err)
	}
}

// dial connects and does the handshake. The caller owns the connection.
func dial(ctx context.Context, cfg config) (*websocket.Conn, net.Conn, error) {
	wscfg, err := websocket.NewConfig(cfg.connect, origin(cfg.connect))
	if err != nil {
		return nil, nil, err
	}
	conn, err := dialConn(ctx, cfg, wscfg.Location)
	if err != nil {
		return nil, nil, err
	}
	ws, err := shakeHands(ctx, wscfg, boundedConn{conn, cfg.writeTime})
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return ws, conn, nil
}

// origin is that of a page on the server itself.
func origin(server string) string {
	u, err := url.Parse(server)
	if err != nil {
		return ""
	}
	scheme := map[string]string{"ws": "http", "wss": "https"}[u.Scheme]
	return scheme + "://" + u.Host
}

// dialConn opens the TCP or TLS connection for u, to cfg.addr if that is set.
// The name in SNI, and that of the certificate, is always the URL's.
func dialConn(ctx context.Context, cfg config, u *url.URL) (net.Conn, error) {
	port := cmp.Or(u.Port(), map[string]string{"ws": "80", "wss": "443"}[u.Scheme])
	network, addr := "tcp", net.JoinHostPort(u.Hostname(), port)
	if path, isUnix := strings.CutPrefix(cfg.addr, "unix:"); isUnix {
		network, addr = "unix", path
	} else if cfg.addr != "" {
		addr = cfg.addr
	}
	dialer := &net.Dialer{Timeout: dialTime}
	if u.Scheme == "ws" {
		return dialer.DialContext(ctx, network, addr)
	}
	roots, err := rootCAs(cfg.ca)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	secure := &tls.Dialer{NetDialer: dialer, Config: &tls.Config{
		ServerName: u.Hostname(), RootCAs: roots, NextProtos: []string{"http/1.1"},
	}}
	return secure.DialContext(ctx, network, addr)
}

// rootCAs is nil, the system's, without a file, else these and the file's.
func rootCAs(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-ca: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("-ca %q: no certificate in it", file)
	}
	return pool, nil
}

// shakeHands upgrades conn within handshakeTime; it leaves conn open on error.
// When the answer is not a 101, the error is what the server said.
func shakeHands(ctx context.Context, cfg *websocket.Config, conn net.Conn) (*websocket.Conn, error) {
	conn.SetReadDeadline(time.Now().Add(handshakeTime))
	unwatch := context.AfterFunc(ctx, func() { conn.Close() })
	rec := &recorder{Conn: conn, room: maxRefusal}
	ws, err := websocket.NewClient(cfg, rec)
	switch {
	case !unwatch():
		return nil, ctx.Err()
	case errors.Is(err, websocket.ErrBadStatus):
		return nil, refusal(&rec.seen)
	case err != nil:
		return nil, err
	}
	rec.stop()
	return ws, conn.SetReadDeadline(time.Time{})
}

// refusal reads an HTTP answer, of which x/net tells nothing, once more.
func refusal(answer io.Reader) error {
	resp, err := http.ReadResponse(bufio.NewReader(answer), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	line, _ := bufio.NewReader(io.LimitReader(resp.Body, 200)).ReadString('\n')
	if line = strings.TrimSpace(line); line == "" {
		return fmt.Errorf("server answered %s", resp.Status)
	}
	return fmt.Errorf("server answered %s: %q", resp.Status, line)
}

// recorder keeps the first bytes that are read from a connection.
type recorder struct {
	net.Conn
	seen bytes.Buffer
	room int // bytes still to be kept
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	keep := min(n, r.room)
	r.seen.Write(b[:keep])
	r.room -= keep
	return n, err
}

// stop forgets what was read; only the goroutine that reads may call it.
func (r *recorder) stop() { r.room, r.seen = 0, bytes.Buffer{} }
