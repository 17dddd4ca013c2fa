//go:build !portable && !386

package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
)

// acceptOne waits for the next client (accept4(2)).
func acceptOne(listener syscall.RawConn) (fd int, peer syscall.Sockaddr, err error) {
	closed := listener.Read(func(listener uintptr) bool {
		fd, peer, err = syscall.Accept4(int(listener), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		return err != syscall.EAGAIN
	})
	return fd, peer, cmp.Or(closed, err)
}

// addressOf is the address as net.Addr has it: of a Unix socket, none.
func addressOf(peer syscall.Sockaddr) string {
	switch peer := peer.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(peer.Addr), uint16(peer.Port)).String()
	case *syscall.SockaddrInet6:
		addr := netip.AddrFrom16(peer.Addr).Unmap()
		if peer.ZoneId != 0 {
			if link, err := net.InterfaceByIndex(int(peer.ZoneId)); err == nil {
				addr = addr.WithZone(link.Name)
			}
		}
		return netip.AddrPortFrom(addr, uint16(peer.Port)).String()
	}
	return ""
}

// clientAddr is what addressOf returned, as a net.Addr.
type clientAddr string

func (clientAddr) Network() string  { return "tcp" }
func (a clientAddr) String() string { return string(a) }

// connectTo begins to connect to a TCP address, and does not wait for that
// (connect(2): EINPROGRESS). control sets the socket's options, as it does for
// a net.Dialer. The caller closes the socket.
func connectTo(addr netip.AddrPort, control socketControl) (int32, error) {
	family, to := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family, to = syscall.AF_INET, &syscall.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = control("tcp", addr.String(), descriptor(fd)); err == nil {
		err = os.NewSyscallError("connect", syscall.Connect(fd, to))
	}
	if (err == nil || errors.Is(err, syscall.EINPROGRESS)) && isItself(fd, addr) {
		err = fmt.Errorf("dial tcp %s: %w", addr, errToItself)
	}
	if err == nil || errors.Is(err, syscall.EINPROGRESS) {
		return int32(fd), nil
	}
	syscall.Close(fd)
	return -1, err
}

// isItself reports whether the socket, which connects to the address, has it too. It
// has its own as soon as it connects.
func isItself(fd int, to netip.AddrPort) bool {
	local, err := syscall.Getsockname(fd)
	if err != nil {
		return false
	}
	var own netip.AddrPort
	switch local := local.(type) {
	case *syscall.SockaddrInet4:
		own = netip.AddrPortFrom(netip.AddrFrom4(local.Addr), uint16(local.Port))
	case *syscall.SockaddrInet6:
		own = netip.AddrPortFrom(netip.AddrFrom16(local.Addr).Unmap(), uint16(local.Port))
	}
	return own.Port() == to.Port() && (own.Addr() == to.Addr().Unmap() || to.Addr().IsUnspecified())
}

// connOf makes a connection of a duplicate of the socket, and gives it its options
// again: package net sets those of keepalive as it likes. The caller closes both.
func connOf(socket *os.File, control socketControl) (net.Conn, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		raw, _ := tcp.SyscallConn() // its error is a nil conn
		err = errors.Join(tcp.SetKeepAlive(false), control("tcp", "", raw))
	}
	if err != nil {
		conn.Close()
	}
	return conn, err
}

// descriptor is the syscall.RawConn of a socket that is not in Go's poller.
type descriptor int

func (d descriptor) Control(f func(fd uintptr)) error { f(uintptr(d)); return nil }
func (d descriptor) Read(func(uintptr) bool) error    { return errors.ErrUnsupported }
func (d descriptor) Write(func(uintptr) bool) error   { return errors.ErrUnsupported }
