package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newTestCertificate makes a certificate, and what a server needs of it.
func newTestCertificate(t *testing.T, kind string) (*certificate, *tls.Config) {
	t.Helper()
	c, err := newCertificate(kind)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(c.cert, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return c, &tls.Config{Certificates: []tls.Certificate{pair}}
}

// startTLS starts relays that end TLS, with a server's config that may be changed.
func startTLS(t *testing.T, to *target, use *tlsUse, change func(*tls.Config)) *target {
	t.Helper()
	c, server := newTestCertificate(t, use.key)
	change(server)
	secure := startRelaysOn(t, to, 0, func([]byte) {}, func(l net.Listener) net.Listener { return tls.NewListener(l, server) })
	secure.tls = c.config(use)
	return secure
}

// TestTLSFailures: what is not as it has to be is found out.
func TestTLSFailures(t *testing.T) {
	direct := startTestBackends(t)
	_, other := newTestCertificate(t, keyRSA)
	use13, use12 := &tlsUse{version: tls.VersionTLS13, key: keyRSA}, &tlsUse{version: tls.VersionTLS12, key: keyRSA}
	asIs := func(*tls.Config) {}
	for name, test := range map[string]struct {
		target *target
		want   string
	}{
		"another certificate":      {startTLS(t, direct, use13, func(c *tls.Config) { c.Certificates = other.Certificates }), "another certificate than that of the measurement"},
		"another key exchange":     {startTLS(t, direct, use13, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }), "key exchange with CurveP256, want X25519"},
		"only TLS 1.2":             {startTLS(t, direct, use13, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), "protocol version not supported"},
		"only TLS 1.3":             {startTLS(t, direct, use12, func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }), "protocol version not supported"},
		"a changed record":         {startRelays(t, startTLS(t, direct, use13, asIs), 0, flip(1000)), "TLS handshake: "},
		"nobody there":             {&target{ports: []int{1}, backends: direct.backends, tls: startTLS(t, direct, use13, asIs).tls}, "connection refused"},
		"a namespace at any place": {startRelays(t, startTLS(t, direct, use13, asIs), 1, func([]byte) {}), "before with backend-"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := runCheckTLS(test.target)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// pieces are connections that write a few bytes at a time.
type pieces struct{ net.Listener }

type pieceConn struct{ net.Conn }

func (l pieces) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return pieceConn{c}, err
}

func (c pieceConn) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var wrote int
		wrote, err = c.Conn.Write(p[n:min(n+7, len(p))])
		n += wrote
	}
	return n, err
}

// TestPieces: records, and messages of the handshake, may come in pieces.
func TestPieces(t *testing.T) {
	direct := startTestBackends(t)
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			c, server := newTestCertificate(t, keyECDSA)
			to := startRelaysOn(t, direct, 0, func([]byte) {}, func(l net.Listener) net.Listener { return tls.NewListener(pieces{l}, server) })
			to.tls = c.config(&tlsUse{version: version, key: keyECDSA, resume: true})
			for _, size := range []int{0, 1, 5000, 40_000} {
				if err := checkEcho(to, size); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
		})
	}
}

// TestTickets: a server without tickets is not said to have resumed.
func TestTickets(t *testing.T) {
	direct := startTestBackends(t)
	use := &tlsUse{version: tls.VersionTLS12, key: keyRSA, resume: true}
	to := startTLS(t, direct, use, func(c *tls.Config) { c.SessionTicketsDisabled = true })
	c := &contender{run: new(run), target: to}
	scenario{open: openConnect}.measure([]*contender{c}, 50*time.Millisecond)
	if resumed, ok := c.run.Values["resumed"]; c.run.Error != "" || !ok || resumed != 0 {
		t.Errorf("got %v, %s, want no handshake with a ticket", c.run.Values, c.run.Error)
	}
}

// TestGoodbye: a client that closes says so, and one that is reset does not.
func TestGoodbye(t *testing.T) {
	certificate, server := newTestCertificate(t, keyECDSA)
	for name, test := range map[string]struct {
		close func(*client)
		want  error
	}{
		"close":   {(*client).close, io.EOF}, // and not io.ErrUnexpectedEOF
		"reset":   {func(c *client) { resetAll(c.loop) }, syscall.ECONNRESET},
		"failure": {func(c *client) { c.conns[c.last(t)].fail("") }, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			l, port := listenTest(t)
			defer l.Close()
			ended := make(chan error, 1)
			answered := make(chan struct{})
			go func() {
				conn, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				defer conn.Close()
				s := tls.Server(conn, server)
				buf := make([]byte, 4096)
				_, err = s.Read(buf) // the request
				close(answered)
				for err == nil {
					_, err = s.Read(buf)
				}
				ended <- err
			}()
			backends := startTestBackends(t).backends
			c, err := newClient(&target{ports: []int{port}, backends: backends,
				tls: certificate.config(&tlsUse{version: tls.VersionTLS13, key: keyECDSA})}, []string{"a"})
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			c.dial()
			for open := true; open; {
				select {
				case <-answered:
					open = false
				default:
					c.step(10 * time.Millisecond)
				}
			}
			test.close(c)
			if err := <-ended; !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}

// last is the descriptor of the only connection.
func (c *client) last(t *testing.T) int {
	for fd, conn := range c.conns {
		if conn != nil {
			return fd
		}
	}
	t.Fatal("no connection")
	return -1
}

func TestCertificateFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	c, _ := newTestCertificate(t, keyRSA)
	if err := c.write(dir); err != nil {
		t.Fatal(err)
	}
	for _, files := range [][2]string{{"tls.crt", "tls.key"}, {"tls.pem", "tls.pem"}} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, files[0]), filepath.Join(dir, files[1]))
		if err != nil || !bytes.Equal(pair.Certificate[0], c.der) {
			t.Errorf("%v: %v", files, err)
		}
	}
	if _, err := newCertificate("dsa"); err == nil {
		t.Error("a certificate with a key of DSA")
	}
}

func TestKernelMemory(t *testing.T) {
	const info = "MemTotal: 9 kB\nSlab:     100 kB\nKernelStack:  20 kB\nPageTables:    3 kB\nSecPageTables: 50 kB\n"
	const sockets = "sockets: used 3\nTCP: inuse 1 orphan 0 tw 0 alloc 1 mem 2\nUDP: inuse 0 mem 7\n"
	if got, err := parseKernelMemory(info, sockets, 4096); err != nil || got != 131 {
		t.Errorf("got %v, %v, want 131", got, err)
	}
	if _, err := parseKernelMemory("Slab: 1 kB\n", sockets, 4096); err == nil {
		t.Error("no error without KernelStack")
	}
	if _, err := parseKernelMemory(info, "sockets: used 3\n", 4096); err == nil {
		t.Error("no error without TCP")
	}
	if got, err := kernelMemory(); err != nil || got < 1000 {
		t.Errorf("this machine: got %v KiB, %v", got, err)
	}
}

// TestLoadMemory: it leaves no connection.
func TestLoadMemory(t *testing.T) {
	to := startTestBackends(t)
	to.settle, to.idle = 10*time.Millisecond, 50
	got, err := loadMemory(to)
	if err != nil || math.IsNaN(got) {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, c := range to.backends.conns {
		if c != nil && c.accept == nil {
			t.Fatal("a backend has a connection left")
		}
	}
}

// TestLoadShare: a load that has nothing to do waits.
func TestLoadShare(t *testing.T) {
	to := startTestBackends(t)
	to.group = group{os.Getpid()}
	c, err := newClient(to, []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	const length = 20 * time.Millisecond
	const waits = length * 9 / 10 // the rest may go by before the first look at events
	used, err := to.during(func() error {
		c.run(length)
		return nil
	})
	if err != nil || to.backends.waited < waits || used.load < 0 || used.load > used.wall-waits {
		t.Errorf("got %v of %v, %v, want to have waited for %v", used.load, used.wall, err, waits)
	}
	if v := (use{wall: 4 * time.Second, load: time.Second}).values(); v["load_share"] != .25 {
		t.Errorf("got %v, want a load_share of a quarter", v)
	}
}

func TestPod(t *testing.T) {
	dir := t.TempDir()
	if err := copyPod("../nginx", dir, 8140); err != nil {
		t.Fatal(err)
	}
	for file, wants := range map[string][]string{
		"nginx.conf": {dir + "/tls/tls.crt;", "server unix:" + dir + "/router.sock;", "include " + dir + "/tmp/nginx-known.conf;"},
		"start.sh":   {"{ listen 8140 ssl", "{ listen 8142 ", "listen 8143 >" + dir + "/tmp/", "listen $loopback:8144 ssl"},
	} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s: no %q", file, want)
			}
		}
	}
	empty := t.TempDir()
	for _, name := range []string{"nginx.conf", "start.sh"} {
		if err := os.WriteFile(filepath.Join(empty, name), []byte("# other\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyPod(empty, dir, 8140); err == nil || !strings.Contains(err.Error(), "does not contain") {
		t.Errorf("got %v, want an error: nothing to replace", err)
	}
}
