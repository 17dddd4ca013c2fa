//go:build !portable && !386

package main

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
)

// acceptSocket waits for the next client (accept4(2)).
func acceptSocket(
	listener syscall.RawConn,
) (fd int, peer syscall.Sockaddr, err error) {
	const flags = syscall.SOCK_NONBLOCK | syscall.SOCK_CLOEXEC
	closed := listener.Read(func(listener uintptr) bool {
		fd, peer, err = syscall.Accept4(int(listener), flags)
		return err != syscall.EAGAIN
	})
	return fd, peer, cmp.Or(closed, err)
}

// addrString returns the address as net.Addr has it, or "" for a Unix socket.
func addrString(peer syscall.Sockaddr) string {
	if addr := addrPort(peer); addr.IsValid() {
		return addr.String()
	}
	return ""
}

// addrPort returns the address of a TCP socket. It is not valid for another socket.
func addrPort(socket syscall.Sockaddr) netip.AddrPort {
	switch socket := socket.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(socket.Addr), uint16(socket.Port))
	case *syscall.SockaddrInet6:
		addr := netip.AddrFrom16(socket.Addr).Unmap()
		if socket.ZoneId != 0 {
			if link, err := net.InterfaceByIndex(int(socket.ZoneId)); err == nil {
				addr = addr.WithZone(link.Name)
			}
		}
		return netip.AddrPortFrom(addr, uint16(socket.Port))
	}
	return netip.AddrPort{}
}

// clientAddr is what addrString returned, as a net.Addr.
type clientAddr string

func (clientAddr) Network() string  { return "tcp" }
func (a clientAddr) String() string { return string(a) }

// connectTo returns a TCP socket that connects to the address. It does not wait until it
// is connected (connect(2): EINPROGRESS). control sets the socket's options, as it does
// for a net.Dialer. The caller closes the socket.
func connectTo(addr netip.AddrPort, control socketControl) (int32, error) {
	family, to := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{
		Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family = syscall.AF_INET
		to = &syscall.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	const kind = syscall.SOCK_STREAM | syscall.SOCK_NONBLOCK | syscall.SOCK_CLOEXEC
	fd, err := syscall.Socket(family, kind, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = control("tcp", addr.String(), descriptor(fd)); err == nil {
		err = os.NewSyscallError("connect", syscall.Connect(fd, to))
		if errors.Is(err, syscall.EINPROGRESS) {
			err = nil
		}
	}
	if err == nil && isSelfConnect(fd, addr) {
		err = errSelfConnect
	}
	if err != nil {
		syscall.Close(fd)
		return -1, err
	}
	return int32(fd), nil
}

// isConnected reports whether a socket of connectTo is connected.
func isConnected(fd int) bool {
	_, err := syscall.Getpeername(fd)
	return err == nil
}

// isSelfConnect reports whether the socket, which connects to the address, has that
// address itself. A socket has its address as soon as it connects.
func isSelfConnect(fd int, to netip.AddrPort) bool {
	local, err := syscall.Getsockname(fd)
	own := addrPort(local)
	return err == nil && own.Port() == to.Port() &&
		(own.Addr() == to.Addr().Unmap() || to.Addr().IsUnspecified())
}

// connFromSocket returns a connection with a duplicate of the socket. control sets the
// options that package net has set to its own of keepalive. The caller closes both.
func connFromSocket(socket *os.File, control socketControl) (net.Conn, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		raw, _ := tcp.SyscallConn() // fails only for a nil conn
		err = errors.Join(tcp.SetKeepAlive(false), control("tcp", "", raw))
	}
	if err != nil {
		conn.Close()
	}
	return conn, err
}

// descriptor is a socket that is not in Go's poller, as a syscall.RawConn.
type descriptor int

func (d descriptor) Control(f func(fd uintptr)) error { f(uintptr(d)); return nil }
func (d descriptor) Read(func(uintptr) bool) error    { return errors.ErrUnsupported }
func (d descriptor) Write(func(uintptr) bool) error   { return errors.ErrUnsupported }
