package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestKeepAliveTimes: TCP asks at times that it can have, once at least, and gives up
// at the timeout.
func TestKeepAliveTimes(t *testing.T) {
	for seconds := 2; seconds <= 18*60*60; seconds++ {
		timeout := time.Duration(seconds) * time.Second
		idle, interval := keepAliveTimes(timeout)
		if idle%time.Second != 0 || interval%time.Second != 0 || idle < time.Second || interval < time.Second ||
			idle > 32767*time.Second || timeout <= idle || (timeout-idle)%interval != 0 || interval > timeout/2 {
			t.Errorf("with a timeout of %s TCP asks after %s, then every %s", timeout, idle, interval)
		}
	}
}

// onDescriptor calls f with the descriptor of conn.
func onDescriptor(t testing.TB, conn net.Conn, f func(fd int)) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { f(int(fd)) }))
}

// A connection of a client has its options from the listener, one to a backend
// from the dialer.
func TestPeerOptions(t *testing.T) {
	on := map[string]int{"keepalive": 1, "idle": 30, "interval": 15, "user timeout": 60_000, "no delay": 1}
	off := map[string]int{"keepalive": 0, "user timeout": 0, "no delay": 1}
	for timeout, want := range map[time.Duration]map[string]int{time.Minute: on, 0: off} {
		l, err := listen("127.0.0.1:0", timeout)
		must(t, err)
		defer l.Close()
		b := newStaticBackends("backend", []string{l.Addr().String()})
		b.dialer = newDialer(timeout)
		dialled, err := b.dial(t.Context(), 0)
		must(t, err)
		defer dialled.Close()
		accepted, err := l.Accept()
		must(t, err)
		defer accepted.Close()
		wantOptions(t, dialled, want)
		wantOptions(t, accepted, want)
	}
}

func wantOptions(t *testing.T, conn net.Conn, want map[string]int) {
	t.Helper()
	options := map[string][2]int{
		"keepalive":    {syscall.SOL_SOCKET, syscall.SO_KEEPALIVE},
		"idle":         {syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE},
		"interval":     {syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL},
		"user timeout": {syscall.IPPROTO_TCP, optTCPUserTimeout},
		"no delay":     {syscall.IPPROTO_TCP, syscall.TCP_NODELAY},
	}
	onDescriptor(t, conn, func(fd int) {
		for name, value := range want {
			got, err := syscall.GetsockoptInt(fd, options[name][0], options[name][1])
			if err != nil || got != value {
				t.Errorf("%s of %s is %d with error %v, want %d", name, conn.LocalAddr(), got, err, value)
			}
		}
	})
}

// vanish makes conn's end hear nothing any more, and so say nothing, as if its
// machine or the way to it were gone: it drops segments with a TTL below 255
// (ip(7), RFC 5082), and all that come from this machine have less.
func vanish(t testing.TB, conn net.Conn) {
	t.Helper()
	onDescriptor(t, conn, func(fd int) {
		must(t, syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, syscall.IP_MINTTL, 255))
	})
}

// A peer that is gone without a word ends its session: one that sends nothing,
// and one that is sent to. So does one that takes nothing for as long.
func TestProxyPeerVanishes(t *testing.T) {
	const timeout = 2 * time.Second // the least
	tests := map[string]struct {
		gone  side
		there bool // but reads nothing
		speak bool // the other side sends for as long as it can
	}{
		"client, silent":         {clientSide, false, false},
		"client, sent to":        {clientSide, false, true},
		"client, reads nothing":  {clientSide, true, true},
		"backend, silent":        {backendSide, false, false},
		"backend, sent to":       {backendSide, false, true},
		"backend, reads nothing": {backendSide, true, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			serve, accepted, release := holdingBackend()
			defer release()
			stub := startStub(t, "127.0.0.1:0", serve)
			r := startRouter(t, "-backends", stub.addr, "-overrides", t.TempDir(), "-tcp-user-timeout", timeout.String())
			r.log.wait(t, "routing table updated", 1)
			conns := [2]net.Conn{(&testProxy{addr: r.clientAddr}).open(t, "ns-01"), <-accepted}
			if !tt.there {
				vanish(t, conns[tt.gone])
			}
			wantGoneAfter(t, r, conns, tt.gone, tt.speak, timeout)
		})
	}
}

// holdingBackend returns a backend that accepts an upgrade, gives the connection to
// accepted, and reads nothing until release is called, which must be before its stub ends.
func holdingBackend() (serve func(net.Conn, *bufio.Reader), accepted chan net.Conn, release func()) {
	accepted, hold := make(chan net.Conn, 1), make(chan struct{})
	return func(conn net.Conn, _ *bufio.Reader) {
		io.WriteString(conn, switching)
		accepted <- conn
		<-hold
	}, accepted, func() { close(hold) }
}

// wantGoneAfter checks that the router ends its session, of which a side is gone from now
// on, because of that side, and after timeout: at most three times that. The other side
// reads, and if speak is true it sends as much as it can.
func wantGoneAfter(t *testing.T, r *runningRouter, conns [2]net.Conn, gone side, speak bool, timeout time.Duration) {
	t.Helper()
	begun, other := time.Now(), conns[gone.other()]
	var using sync.WaitGroup
	using.Go(func() { // ends with the stream
		io.Copy(io.Discard, other)
		other.Close()
	})
	if speak {
		using.Go(func() { io.Copy(other, endless{}) })
	}
	line := r.log.wait(t, "session ended", 1)
	took := time.Since(begun)
	using.Wait()
	if line["cause"] != gone.errorCause().String() || took < timeout/2 || took > 3*timeout {
		t.Errorf("ended with cause %v after %s, want %v after %s", line["cause"], took, gone.errorCause(), timeout)
	}
}

// A connection to the backend whose two ends are one socket is a dial that failed:
// the client is not answered with its own request, and the backend is waited for.
func TestDialRefusesItself(t *testing.T) {
	for name, pieces := range map[string][]string{
		"at once": {upgradeRequest("/ws/ns-01")},
		"held":    {upgradeRequest("/ws/ns-01")[:9], upgradeRequest("/ws/ns-01")[9:]},
	} {
		for _, host := range []string{"127.0.0.1", "0.0.0.0", "[::1]"} {
			t.Run(name+" "+host, func(t *testing.T) {
				t.Parallel()
				own := reserve(t, strings.Replace(host, "0.0.0.0", "127.0.0.1", 1)+":0")
				p := startProxy(t, []string{fmt.Sprintf("%s:%d", host, own.Port)}, map[string]string{}, func(p *proxy) {
					p.limits.holdTimeout = 2 * time.Second
					p.backends.dialer.Control = func(_, address string, c syscall.RawConn) error {
						if address == "" {
							return nil // it connects nowhere
						}
						return c.Control(func(fd uintptr) { bindTo(t, int(fd), own) }) // as the system does now and then by itself
					}
				})
				conn := dial(t, p.addr)
				for _, piece := range pieces {
					mustWrite(t, conn, piece)
				}
				mustAnswer(t, conn, http.StatusServiceUnavailable)
				if reason := p.tail.wait(t, "upgrade failed", 1)["error"].(string); !strings.Contains(reason, "connected to itself") {
					t.Errorf("the log gives %q as the reason", reason)
				}
			})
		}
	}
}

// reserve returns an address of the host where nobody listens, and which is given to
// no other socket until the test ends: a socket of its own has it, that does nothing.
func reserve(t *testing.T, host string) *net.TCPAddr {
	t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", host)
	must(t, err)
	family := syscall.AF_INET6
	if addr.IP.To4() != nil {
		family = syscall.AF_INET
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { syscall.Close(fd) })
	bindTo(t, fd, addr)
	name, err := syscall.Getsockname(fd)
	must(t, err)
	switch name := name.(type) {
	case *syscall.SockaddrInet4:
		addr.Port = name.Port
	case *syscall.SockaddrInet6:
		addr.Port = name.Port
	}
	return addr
}

// bindTo gives the socket the address.
func bindTo(t *testing.T, fd int, addr *net.TCPAddr) {
	var to syscall.Sockaddr = &syscall.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP.To16())}
	if ip := addr.IP.To4(); ip != nil {
		to = &syscall.SockaddrInet4{Port: addr.Port, Addr: [4]byte(ip)}
	}
	syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	if err := syscall.Bind(fd, to); err != nil {
		t.Error(err)
	}
}

// link leads to another network, and can be cut: it is a pair of veth(4), whose far
// end is in a network namespace (network_namespaces(7)) of a thread of its own.
type link struct {
	t  *testing.T
	do chan func() // for the thread
}

// Addresses of the two ends, of those for documentation (RFC 5737).
const (
	nearEnd = "198.51.100.1"
	farEnd  = "198.51.100.2"
)

// newLink returns a link, or nil, after a word in the log, where that is not
// allowed. There is one at a time.
func newLink(t *testing.T) *link {
	t.Helper()
	l := &link{t: t, do: make(chan func())}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and no unlock: the thread ends with the goroutine, and the network with the thread
		made <- syscall.Unshare(syscall.CLONE_NEWNET)
		for f := range l.do {
			f()
		}
	}()
	err := <-made
	if _, missing := exec.LookPath("ip"); err != nil || missing != nil {
		t.Logf("nothing tested: a network namespace needs root and iproute2 (%v, %v)", err, missing)
		close(l.do)
		return nil
	}
	near, far := fmt.Sprintf("near%d", os.Getpid()), fmt.Sprintf("far%d", os.Getpid())
	thread := 0
	l.far(func() { thread = syscall.Gettid() })
	l.ip("link add", near, "type veth peer name", far, "netns", fmt.Sprint(thread))
	l.ip("addr add", nearEnd+"/30 dev", near)
	l.ip("link set", near, "up")
	l.far(func() {
		l.ip("addr add", farEnd+"/30 dev", far)
		l.ip("link set", far, "up")
	})
	t.Cleanup(func() {
		l.ip("link del", near)
		close(l.do)
	})
	return l
}

// far calls f at the far end, where the sockets that it makes are.
func (l *link) far(f func()) {
	done := make(chan struct{})
	l.do <- func() { defer close(done); f() }
	<-done
}

// cut makes the far end hear and say nothing any more.
func (l *link) cut() {
	l.far(func() { l.ip("link set", fmt.Sprintf("far%d", os.Getpid()), "down") })
}

// ip is ip(8).
func (l *link) ip(words ...string) {
	l.t.Helper()
	if out, err := exec.Command("ip", strings.Fields(strings.Join(words, " "))...).CombinedOutput(); err != nil {
		l.t.Errorf("ip %v: %v %s", words, err, out)
	}
}

// A session whose client's or backend's network is cut off ends in a bounded time,
// whether anything is sent to it or not.
func TestProxyLinkCut(t *testing.T) {
	const timeout = 2 * time.Second
	for _, gone := range []side{clientSide, backendSide} {
		for _, speak := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, sent to %t", gone.endCause(), speak), func(t *testing.T) {
				l := newLink(t)
				if l == nil {
					return
				}
				serve, accepted, release := holdingBackend()
				defer release()
				var stub *stubBackend
				if gone == backendSide {
					l.far(func() { stub = startStub(t, farEnd+":0", serve) })
				} else {
					stub = startStub(t, nearEnd+":0", serve)
				}
				r := startRouter(t, "-listen", nearEnd+":0", "-backends", stub.addr, "-overrides", t.TempDir(), "-tcp-user-timeout", timeout.String())
				r.log.wait(t, "routing table updated", 1)
				var conns [2]net.Conn
				open := func() { conns[clientSide] = (&testProxy{addr: r.clientAddr}).open(t, "ns-01") }
				if gone == clientSide {
					l.far(open)
				} else {
					open()
				}
				conns[backendSide] = <-accepted
				l.cut()
				wantGoneAfter(t, r, conns, gone, speak, timeout)
			})
		}
	}
}
