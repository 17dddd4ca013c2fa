package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	l, err := listen("unix:"+path, 0)
	must(t, err)
	info, err := os.Lstat(path)
	must(t, err)
	wantEqual(t, "the mode", info.Mode(), fs.ModeSocket|0o660)
	wantTakesConnections(t, l, path)
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the socket's error is %v, want %v", err, fs.ErrNotExist)
	}
}

// wantTakesConnections dials path and accepts from l.
func wantTakesConnections(t *testing.T, l net.Listener, path string) {
	t.Helper()
	dial(t, path).Close()
	conn, err := l.Accept()
	must(t, err)
	conn.Close()
}

func TestListenUnixReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	must(t, leaveSocket(path))
	l, err := listen("unix:"+path, 0)
	must(t, err)
	defer l.Close()
	wantTakesConnections(t, l, path)
}

// leaveSocket leaves a socket at path, as a process that is killed does.
func leaveSocket(path string) error {
	killed, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err == nil {
		killed.SetUnlinkOnClose(false)
		err = killed.Close()
	}
	return err
}

// wantNoListener checks why nobody can listen on path.
func wantNoListener(t *testing.T, path, why string) {
	t.Helper()
	want := "listen unix:" + path + ": " + why
	if _, err := listen("unix:"+path, 0); err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestListenUnixRefusesLiveSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.sock")
	live, err := net.Listen("unix", path)
	must(t, err)
	defer live.Close()
	wantNoListener(t, path, "another process listens there")
	if conn, err := live.Accept(); err == nil { // the question whether it is live
		conn.Close()
	}
	wantTakesConnections(t, live, path)
}

// A listener that is too busy to accept is not stale.
func TestListenUnixRefusesFullSocket(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("where a full backlog refuses connections, a busy listener looks like a stale socket")
	}
	path := filepath.Join(t.TempDir(), "router.sock")
	live, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	must(t, err)
	defer syscall.Close(live)
	must(t, errors.Join(syscall.Bind(live, &syscall.SockaddrUnix{Name: path}), syscall.Listen(live, 1)))
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
	must(t, err)
	wantNoListener(t, path, "another process may listen there: dial unix "+path+": connect: resource temporarily unavailable")
	if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket is %v with error %v, want the one that was there", after, err)
	}
}

func TestListenUnixKeepsOtherFiles(t *testing.T) {
	tests := map[string]func(path string) error{
		"plain file":      func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) },
		"empty file":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"directory":       func(path string) error { return os.Mkdir(path, 0o700) },
		"link to a file":  func(path string) error { return os.Symlink("/etc/hostname", path) },
		"link to nothing": func(path string) error { return os.Symlink("/nowhere", path) },
		"link to a socket": func(path string) error {
			return errors.Join(leaveSocket(path+".other"), os.Symlink(path+".other", path))
		},
	}
	for name, make := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "router.sock")
			must(t, make(path))
			before, err := os.Lstat(path)
			must(t, err)
			wantNoListener(t, path, "the file exists and is not a socket")
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || before.Size() != after.Size() {
				t.Errorf("the file is %v with error %v, want what was there", after, err)
			}
		})
	}
}

// An accept that fails since its listener is closed is no fault: it is not tried again,
// and nothing is logged, whatever the error. That of a closed file, from which the fast
// path accepts, is none that a package exports.
func TestAcceptAfterClose(t *testing.T) {
	file, err := os.Open(os.DevNull)
	must(t, err)
	raw, err := file.SyscallConn()
	must(t, err)
	file.Close()
	closedFile := raw.Read(func(uintptr) bool { return true })
	for _, err := range []error{net.ErrClosed, closedFile, syscall.EINVAL} {
		log := newLogTail()
		retry := newAcceptRetry("-listen", slog.New(slog.NewJSONHandler(log, nil)))
		retry.close()
		if err == nil || retry.shouldRetry(err) {
			t.Errorf("%v: accept is tried again, want an end", err)
		}
		if lines := log.all("cannot accept connections"); len(lines) > 0 {
			t.Errorf("%v: %v is logged, want nothing", err, lines)
		}
	}
}

// A connection makes room that had its turn, if there is one.
func TestBoundedListener(t *testing.T) {
	l := &limitListener{Listener: listenLocal(t), maxConns: 3}
	var all []*limitConn
	accept := func() {
		t.Helper()
		dial(t, l.Addr().String())
		c, err := l.Accept()
		must(t, err)
		t.Cleanup(func() { c.Close() })
		all = append(all, c.(*limitConn))
	}
	wantOpen := func(when string, want ...int) {
		t.Helper()
		var got []int
		for i, c := range all {
			if c.SetDeadline(time.Time{}) == nil { // else it is closed
				got = append(got, i)
			}
		}
		if !slices.Equal(got, want) || len(l.conns) != len(want) {
			t.Errorf("%s: open are %v, and %d are counted; want %v", when, got, len(l.conns), want)
		}
	}
	for range 3 {
		accept()
	}
	wantOpen("at the bound", 0, 1, 2)
	all[0].setBusy(true)
	accept()
	wantOpen("the first has a request", 0, 2, 3)
	all[2].setBusy(true)
	all[2].setBusy(false)
	accept()
	wantOpen("the third had its turn, the fourth waits for it", 0, 3, 4)
	all[3].setBusy(true)
	all[4].setBusy(true)
	accept()
	wantOpen("all have one", 3, 4, 5)
	all[0].setBusy(false)
	all[4].Close()
	accept()
	wantOpen("one has left", 3, 5, 6)
	all[5].setBusy(true)
	all[5].setBusy(false)
	accept()
	wantOpen("the second had its turn", 3, 6, 7)
}

// A new connection that has said nothing yet makes no room before one that is older and
// busy, for silentTime: what others ask for keeps no probe out.
func TestBoundedListenerLetsNewOnesSpeak(t *testing.T) {
	bubble(t, func(t *testing.T) {
		l := &limitListener{Listener: alwaysOne{}, maxConns: 3}
		var all []*limitConn
		for _, after := range []time.Duration{0, 0, 0, evictionGrace, silentTime + 1} {
			time.Sleep(after)
			conn, err := l.Accept()
			must(t, err)
			t.Cleanup(func() { conn.Close() })
			all = append(all, conn.(*limitConn))
			if len(all) <= 2 {
				conn.(*limitConn).setBusy(true)
			}
		}
		if want := []*limitConn{all[1], all[3], all[4]}; !slices.Equal(l.conns, want) { // 0 made room for 3, and 2 for 4
			t.Errorf("open are %v of %v, want %v", l.conns, all, want)
		}
	})
}

// A new connection has the time to say what it wants: others that come meanwhile wait.
// Those that ask without a pause keep nobody out: they have had their turn.
func TestRoomGrace(t *testing.T) {
	const most, more = 3, 6
	bubble(t, func(t *testing.T) {
		l := &limitListener{Listener: alwaysOne{}, maxConns: most}
		accept := func() (c *limitConn, took time.Duration) {
			t.Helper()
			begun := time.Now()
			conn, err := l.Accept()
			must(t, err)
			t.Cleanup(func() { conn.Close() })
			return conn.(*limitConn), time.Since(begun)
		}
		begun := time.Now()
		for range most + more {
			accept()
		}
		if took := time.Since(begun); took < more/most*evictionGrace {
			t.Errorf("%d connections more than there is room for took %s, want %s for each %d", more, took, evictionGrace, most)
		}
		for _, c := range slices.Clone(l.conns) {
			c.setBusy(true)
			c.setBusy(false)
		}
		for range most {
			if _, took := accept(); took != 0 {
				t.Errorf("a connection waited %s for one that had its answer", took)
			}
		}
	})
}

// alwaysOne is a listener to which somebody always connects.
type alwaysOne struct{ net.Listener }

func (alwaysOne) Accept() (net.Conn, error) {
	conn, _ := net.Pipe()
	return conn, nil
}

// TestIPv6: clients, backends and operators may all be on IPv6. A listener without a host
// takes both families, and IPv4 addresses as such.
func TestIPv6(t *testing.T) {
	if l, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Logf("nothing tested: %v", err)
		return
	} else {
		l.Close()
	}
	backend := startStub(t, "[::1]:0", echo)
	for listen, hosts := range map[string][]string{"[::1]:0": {"::1"}, ":0": {"::1", "127.0.0.1"}} {
		r := startRouter(t, "-listen", listen, "-admin", listen, "-backends", backend.addr, "-overrides", t.TempDir())
		r.log.wait(t, "routing table updated", 1)
		for _, host := range hosts {
			_, port, _ := net.SplitHostPort(r.clientAddr)
			addr := net.JoinHostPort(host, port)
			for way, request := range bothWays("/ws/ns-01") {
				before := len(backend.heads())
				conn := dial(t, addr)
				mustWrite(t, conn, strings.ReplaceAll(request, "www.mydomain.com", addr))
				mustAnswer(t, conn, http.StatusSwitchingProtocols)
				heads := strings.Join(backend.heads()[before:], "")
				for _, want := range []string{"X-Forwarded-For: " + host + "\r\n", "X-Forwarded-Host: " + addr + "\r\n"} {
					if !strings.Contains(heads, want) {
						t.Errorf("%s, %s: the backend got %q, want %q", addr, way, heads, want)
					}
				}
			}
		}
		_, port, _ := net.SplitHostPort(r.adminAddr)
		resp, err := http.Get("http://" + net.JoinHostPort("::1", port) + "/readyz")
		must(t, err)
		resp.Body.Close()
		wantEqual(t, "the status of /readyz", resp.StatusCode, http.StatusOK)
	}
}
