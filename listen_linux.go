package main

import (
	"cmp"
	"net"
	"os"
	"syscall"
	"time"
)

// optTCPUserTimeout is TCP_USER_TIMEOUT of linux/tcp.h, which package syscall does
// not have: how long, in milliseconds, sent data may stay without an
// acknowledgement. With keepalive it counts in place of TCP_KEEPCNT (tcp(7)).
const optTCPUserTimeout = 18

// socketControl is net.Dialer's Control, and net.ListenConfig's.
type socketControl = func(network, address string, c syscall.RawConn) error

// tcpTimeoutOptions returns what makes a TCP socket give up a peer that has been silent
// for timeout, 0 for never. A listener's sockets have the options from it.
func tcpTimeoutOptions(timeout time.Duration) (control socketControl, keepAlive net.KeepAliveConfig) {
	idle, interval := keepAliveTimes(timeout)
	options := []struct{ level, name, value int }{
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, int(idle.Seconds())},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, int(interval.Seconds())},
		{syscall.IPPROTO_TCP, optTCPUserTimeout, int(timeout.Milliseconds())},
		{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
		{syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1}, // which package net sets by itself, and the fast path does not
	}
	if timeout == 0 {
		options = options[len(options)-1:]
	}
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			for _, o := range options {
				if err == nil {
					err = os.NewSyscallError("setsockopt", syscall.SetsockoptInt(int(fd), o.level, o.name, o.value))
				}
			}
		})
		return cmp.Or(cerr, err)
	}, net.KeepAliveConfig{}
}
