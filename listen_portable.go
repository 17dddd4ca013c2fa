//go:build !linux

package main

import (
	"net"
	"syscall"
	"time"
)

// tcpTimeoutOptions returns what makes a TCP socket give up a silent peer after timeout,
// 0 for never. Data that is not acknowledged has the system's own bound.
func tcpTimeoutOptions(timeout time.Duration) (control func(network, address string, c syscall.RawConn) error, keepAlive net.KeepAliveConfig) {
	idle, interval := keepAliveTimes(timeout)
	return nil, net.KeepAliveConfig{Enable: timeout > 0, Idle: idle, Interval: interval, Count: int((timeout - idle) / interval)}
}
