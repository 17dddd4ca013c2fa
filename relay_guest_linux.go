//go:build !portable && !386

package main

import (
	"slices"
	"syscall"
)

// This file is what a poller does for its guests: what has a slot of it, and
// sockets that it watches, and may become a session.

// guest is told of its sockets by its poller, which holds no lock then. Its
// events are edge-triggered.
type guest interface {
	ready(i side, events uint32)
	leave() // the poller is to have no guests any more
}

// seat gives g a slot.
func (p *poller) seat(g guest) int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.take()
	p.slots[at].guest = g
	return at
}

// unseat takes the slot of a guest that does not become a session.
func (p *poller) unseat(at int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vacate(at)
}

// watchGuest is control for a guest.
func (p *poller) watchGuest(op int, at int32, i side, fd int32, mask uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.control(op, at, i, fd, mask)
}

// guests returns all.
func (p *poller) guests() (all []guest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.slots {
		if at.guest != nil {
			all = append(all, at.guest)
		}
	}
	return all
}

// receive reads a guest's socket once, up to limit bytes, at most bufferSize.
func (p *poller) receive(fd int32, limit int) ([]byte, syscall.Errno) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, errno := p.buf.receive(fd, limit)
	for errno == syscall.EINTR { // what is there was told of, and will not be again
		n, errno = p.buf.receive(fd, limit)
	}
	if errno != 0 {
		return nil, errno
	}
	return slices.Clone(p.buf.data[:n]), 0
}

// send writes to a guest's socket once, up to bufferSize bytes.
func (p *poller) send(fd int32, data []byte) (int, syscall.Errno) {
	p.mu.Lock()
	defer p.mu.Unlock()
	size := copy(p.buf.data[:], data)
	for {
		if n, errno := p.buf.send(fd, size, 0); errno != syscall.EINTR {
			return n, errno
		}
	}
}

// adopt is carry for a session that was a guest: mask is what epoll watches of its
// sockets.
func (p *poller) adopt(s *session, at int32, fds [2]int32, mask [2]uint32, first [2][]byte) {
	s.poller, s.mask = p, mask
	p.relay.take(s, func() {
		p.mu.Lock()
		defer p.unlock()
		p.launch(s, at, fds, first)
	})
}
