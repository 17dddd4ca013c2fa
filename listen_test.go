package main

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	l, err := listen("unix:"+path, 0)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := fs.ModeSocket | 0o660; info.Mode() != want {
		t.Errorf("mode %v, want %v", info.Mode(), want)
	}
	wantTakesConnections(t, l, path)
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the socket's error is %v, want %v", err, fs.ErrNotExist)
	}
}

// wantTakesConnections dials path and accepts from l.
func wantTakesConnections(t *testing.T, l net.Listener, path string) {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if conn, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestListenUnixReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	killed, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	killed.SetUnlinkOnClose(false) // as a process that is killed leaves it
	killed.Close()
	l, err := listen("unix:"+path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wantTakesConnections(t, l, path)
}

func TestListenUnixRefusesLiveSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	live, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	_, err = listen("unix:"+path, 0)
	if want := "listen unix:" + path + ": another process listens there"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if conn, err := live.Accept(); err == nil { // the question whether it is live
		conn.Close()
	}
	wantTakesConnections(t, live, path)
}

// A listener that is too busy to accept is not stale.
func TestListenUnixRefusesFullSocket(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("where a full backlog refuses connections, nothing tells it from a stale socket")
	}
	path := filepath.Join(t.TempDir(), "router.sock")
	live, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(live)
	if err := errors.Join(syscall.Bind(live, &syscall.SockaddrUnix{Name: path}), syscall.Listen(live, 1)); err != nil {
		t.Fatal(err)
	}
	for err == nil { // fill the backlog
		var conn net.Conn
		if conn, err = net.Dial("unix", path); err == nil {
			defer conn.Close()
		}
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Fatalf("the backlog is full with %v, want EAGAIN", err)
	}
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = listen("unix:"+path, 0)
	want := "listen unix:" + path + ": another process may listen there: dial unix " + path + ": connect: resource temporarily unavailable"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket is %v with error %v, want the one that was there", after, err)
	}
}

func TestListenUnixKeepsOtherFiles(t *testing.T) {
	tests := map[string]func(path string) error{
		"plain file":       func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) },
		"empty file":       func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"directory":        func(path string) error { return os.Mkdir(path, 0o700) },
		"link to a file":   func(path string) error { return os.Symlink("/etc/hostname", path) },
		"link to nothing":  func(path string) error { return os.Symlink("/nowhere", path) },
		"link to a socket": linkToSocket,
	}
	for name, make := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "router.sock")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = listen("unix:"+path, 0)
			if want := "listen unix:" + path + ": the file is there and is no socket"; err == nil || err.Error() != want {
				t.Errorf("error %v, want %s", err, want)
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || before.Size() != after.Size() {
				t.Errorf("the file is %v with error %v, want what was there", after, err)
			}
		})
	}
}

func linkToSocket(path string) error {
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".other", Net: "unix"})
	if err != nil {
		return err
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	return os.Symlink(path+".other", path)
}

// wideGate is a gate that nobody waits at.
func wideGate(t testing.TB) *gate {
	t.Helper()
	g, err := newGate(1<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// countingFront is a server of clients of which a test sees when it is done
// with a connection.
type countingFront struct {
	addr     string
	badHeads *atomic.Int64
	closed   chan struct{} // one for each connection that net/http has closed
}

// startCountingFront serves on TCP, or on a Unix socket, a handler that answers
// as the proxy does when a path is unknown.
func startCountingFront(t *testing.T, network string) *countingFront {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	p := &proxy{namespace: pathNamespace, log: quiet,
		limits: limits{headerTime: 200 * time.Millisecond, headerBytes: 2048, headerLines: 100}}
	l := listenLocal(t)
	if network == "unix" {
		var err error
		if l, err = listen("unix:"+filepath.Join(t.TempDir(), "s"), 0); err != nil {
			t.Fatal(err)
		}
	}
	f := &countingFront{addr: l.Addr().String(), badHeads: &p.results[resultBadHead], closed: make(chan struct{}, 10)}
	server := newFront(t.Context(), p, quiet)
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			f.closed <- struct{}{}
		}
	}
	gate := wideGate(t)
	served := make(chan error, 1)
	go func() { served <- server.Serve(frontListener{l, gate, f.badHeads}) }()
	t.Cleanup(func() { server.Close(); <-served })
	return f
}

func TestBadHeads(t *testing.T) {
	request := "GET /other HTTP/1.1\r\nHost: h\r\n\r\n"
	long := "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nX-Long: " + strings.Repeat("x", 16<<10) + "\r\n\r\n"
	tests := map[string]struct {
		send    string
		status  int  // of the first answer, 0 if there is none
		leave   bool // the client closes, else it waits for the router to
		counted int64
	}{
		"oversized":             {send: long, status: 431, counted: 1},
		"garbage":               {send: "\x16\x03\x01 this is no HTTP\r\n\r\n", status: 400, counted: 1},
		"no host":               {send: "GET / HTTP/1.1\r\n\r\n", status: 400, counted: 1},
		"two hosts":             {send: "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", status: 400, counted: 1},
		"bad header":            {send: "GET / HTTP/1.1\r\nHost: h\r\nX y: z\r\n\r\n", status: 400, counted: 1},
		"HTTP/2":                {send: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", status: 404, counted: 0},
		"slow":                  {send: "GET /other HTTP/1.1\r\nHost: h\r\n", counted: 1},
		"slow from the start":   {send: "G", counted: 1},
		"left within the head":  {send: "GET /other HTTP", leave: true, counted: 1},
		"left without a byte":   {send: "", leave: true, counted: 0},
		"silent":                {send: "", counted: 0},
		"answered by the proxy": {send: request, status: 404, counted: 0},
		"answered, then left":   {send: request, status: 404, leave: true, counted: 0},
		"answered, then slow":   {send: request + "GET /oth", status: 404, counted: 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, network := range []string{"tcp", "unix"} {
				f := startCountingFront(t, network)
				begun := time.Now()
				conn, err := net.Dial(network, f.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(patience))
				if _, err := io.WriteString(conn, tt.send); err != nil {
					t.Fatal(err)
				}
				wantAnswer(t, conn, tt.status, tt.leave)
				if tt.leave {
					conn.Close()
				}
				<-f.closed
				if got := f.badHeads.Load(); got != tt.counted {
					t.Errorf("%s: %d bad heads counted, want %d", network, got, tt.counted)
				}
				if took := time.Since(begun); !tt.leave && tt.status == 0 && took < 150*time.Millisecond { // its clock does not begin with ours
					t.Errorf("%s: closed after %s, want -header-timeout 200ms", network, took)
				}
			}
		})
	}
}

// wantAnswer reads the first answer's status, 0 for none, and unless the client
// is to leave first, on to the end: a clean one, even if the router has not read
// all that was sent.
func wantAnswer(t *testing.T, conn net.Conn, status int, leave bool) {
	t.Helper()
	br := bufio.NewReader(conn)
	if status != 0 {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != status {
			t.Errorf("status %s, want %d", resp.Status, status)
		}
	}
	if leave {
		return
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		t.Errorf("the end is %v, want a clean one", err)
	}
}

// An accept that fails since its listener is closed is no fault: it is not tried again,
// and nothing is logged, whatever the error. That of a closed file, from which the fast
// path accepts, is none that a package exports.
func TestAcceptAfterClose(t *testing.T) {
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	closedFile := raw.Read(func(uintptr) bool { return true })
	for _, err := range []error{net.ErrClosed, closedFile, syscall.EINVAL} {
		log := newLogTail()
		retry := newAcceptRetry("-listen", slog.New(slog.NewJSONHandler(log, nil)))
		retry.close()
		if err == nil || retry.again(err) {
			t.Errorf("%v: accept is tried again, want an end", err)
		}
		if lines := log.all("cannot accept connections"); len(lines) > 0 {
			t.Errorf("%v: %v is logged, want nothing", err, lines)
		}
	}
}
