package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

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
	for _, gone := range []side{client, server} {
		for _, speak := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, sent to %t", gone.ended(), speak), func(t *testing.T) {
				l := newLink(t)
				if l == nil {
					return
				}
				accepted, hold := make(chan net.Conn, 1), make(chan struct{})
				defer close(hold)
				serve := func(conn net.Conn, _ *bufio.Reader) {
					io.WriteString(conn, switching)
					accepted <- conn
					<-hold
				}
				var stub *stubBackend
				if gone == server {
					l.far(func() { stub = startStub(t, farEnd+":0", serve) })
				} else {
					stub = startStub(t, nearEnd+":0", serve)
				}
				r := startRouter(t, "-listen", nearEnd+":0", "-backends", stub.addr, "-overrides", t.TempDir(), "-peer-timeout", timeout.String())
				r.log.wait(t, "table", 1)
				var ends [2]net.Conn
				open := func() { ends[client] = (&testProxy{addr: r.front}).open(t, "ns-01") }
				if gone == client {
					l.far(open)
				} else {
					open()
				}
				ends[server] = <-accepted
				l.cut()
				begun := time.Now()
				var other sync.WaitGroup
				other.Go(func() { // ends when it is told to
					io.Copy(io.Discard, ends[gone.peer()])
					ends[gone.peer()].Close()
				})
				if speak {
					other.Go(func() { io.Copy(ends[gone.peer()], endless{}) })
				}
				line := r.log.wait(t, "session ended", 1)
				took := time.Since(begun)
				other.Wait()
				if line["cause"] != gone.broken().String() || took < timeout/2 || took > 3*timeout {
					t.Errorf("ended with cause %v after %s, want %v after %s", line["cause"], took, gone.broken(), timeout)
				}
			})
		}
	}
}
