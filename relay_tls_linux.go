//go:build !portable && !386

package main

import (
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"time"
)

// Sizes for a session whose client has TLS. What is read of the client at once, with the
// record that it ends, fits decrypted into a poller's buffer, with a Close frame. What is
// read of the backend at once fits encrypted.
const (
	maxTLSRead  = bufferSize - 20<<10
	maxTLSWrite = 48 << 10
)

// recordBuffers is the memory that a poller lends to the tlsConns of its sessions, and
// their transport: crypto/tls reads what is left of received, and writes to sealed. mu is
// held from a call of crypto/tls until its result was sent.
type recordBuffers struct {
	net.Conn // nil: crypto/tls calls only what is below

	in, out  *buffer
	received []byte // of in
	ended    bool   // the client ends its connection after received
	sealed   int    // bytes of out
}

func newRecordBuffers() *recordBuffers {
	return &recordBuffers{in: newBuffer(), out: newBuffer()}
}

// free frees the buffers. There may be none.
func (b *recordBuffers) free() {
	if b != nil {
		b.in.free()
		b.out.free()
	}
}

func (b *recordBuffers) Read(to []byte) (int, error) {
	switch {
	case len(b.received) > 0:
		n := copy(to, b.received)
		b.received = b.received[n:]
		return n, nil
	case b.ended:
		return 0, io.EOF
	}
	return 0, errNoBytesYet
}

func (b *recordBuffers) Write(data []byte) (int, error) {
	if len(data) > bufferSize-b.sealed {
		return 0, io.ErrShortBuffer
	}
	b.sealed += copy(b.out.data[b.sealed:], data)
	return len(data), nil
}

func (b *recordBuffers) SetWriteDeadline(time.Time) error { return nil }

// readTLS is readOnce for a client with TLS.
func (p *poller) readTLS(s *session, ended bool) (more bool) {
	limit, b := maxTLSRead, p.tlsBuffers
	if p.overBudget() {
		limit = maxReadOverBudget
	}
	n, errno := b.in.receive(s.fd[clientSide], limit)
	if errno != 0 {
		return p.nothingRead(s, clientSide, errno)
	}
	b.received, b.ended = b.in.data[:n], n == 0
	p.decryptRecords(s)
	return s.open && (n == limit || ended)
}

// decryptRecords decrypts what was received of the client, sends it to the backend, and keeps
// what that does not take. It sends the client what crypto/tls answers. It notes the end of
// the client's stream, or why TLS refuses what came, in s.tls.ended. The caller holds mu.
func (p *poller) decryptRecords(s *session) {
	n, err := 0, error(nil)
	for err == nil {
		var got int
		got, err = s.tls.Read(p.buf.data[n : bufferSize-maxCloseFrame])
		n += got
	}
	p.tlsBuffers.received, p.tlsBuffers.ended = nil, false
	if n > 0 {
		n = p.scan(s, clientSide, n)
		p.sendOrKeep(s, clientSide, n)
	}
	if s.open {
		p.sendSealed(s)
	}
	if !errors.Is(err, errNoBytesYet) {
		s.tls.ended = err
		p.handleTLSEnd(s)
	}
	p.tlsBuffers.sealed = 0
}

// handleTLSEnd handles the end of the client's stream, if there is one, as soon as the
// backend has taken all that came before: it may come in one read with its last bytes.
//
// It has come with close_notify if it is io.EOF.
func (p *poller) handleTLSEnd(s *session) {
	if s.tls == nil || s.tls.ended == nil || !s.wantsRead(clientSide) {
		return
	}
	switch err := s.tls.ended; {
	case errors.Is(err, io.EOF), s.closing != nil, errors.Is(err, errTruncated) && s.needsNoCloseNotify():
		p.sideEnded(s, clientSide)
	default:
		p.end(s, clientSide.causeOf(err))
	}
}

// sendTLS encrypts the first n bytes of the buffer, which came from the backend, and sends
// them to the client. It keeps what the client does not take; all n count as carried. If
// crypto/tls fails, nothing more is sent to the client. The caller holds mu.
func (p *poller) sendTLS(s *session, n int) {
	if n == 0 || !s.canSendFrom(backendSide) {
		return
	}
	if _, err := s.tls.Write(p.buf.data[:n]); err != nil { // what the client has sent was refused before
		p.tlsBuffers.sealed = 0
		p.setWriteFailed(s, clientSide)
		return
	}
	s.bytesFrom[backendSide].Add(int64(n))
	p.sendSealed(s)
}

// sendSealed sends the client what is sealed, after what was kept for it before. It keeps
// what the client does not take.
func (p *poller) sendSealed(s *session) {
	b := p.tlsBuffers
	size := b.sealed
	b.sealed = 0
	switch {
	case size == 0 || !s.canSendFrom(backendSide):
	case s.unsent[backendSide] == nil:
		p.sendRecords(s, size)
	case len(s.unsent[backendSide].data)+size > p.maxUnread(): // a client that asks and does not read
		p.end(s, causeClientError)
	default:
		all := slices.Concat(s.unsent[backendSide].data, b.out.data[:size])
		p.dropUnsent(s, backendSide)
		p.keepUnsent(s, backendSide, all, nil)
	}
}

// maxUnread is how many bytes may wait for a client that does not read, with the answers of
// crypto/tls: the router goes on to read such a client. With more the session ends.
func (p *poller) maxUnread() int {
	if p.overBudget() {
		return peekSize / 2
	}
	return bufferSize
}

// sendRecords sends the first size bytes of tlsBuffers.out to the client, and keeps what it
// does not take.
func (p *poller) sendRecords(s *session, size int) {
	took, errno := p.tlsBuffers.out.send(s.fd[clientSide], size)
	sent := p.handleSent(s, backendSide, took, errno, size)
	if sent < size && s.open {
		p.keepUnsent(s, backendSide, p.tlsBuffers.out.data[sent:size], nil)
	}
}

// flushRecords sends the client the records that were kept for it. When they are sent and
// the backend has ended its stream, close_notify was the last, and the router ends its
// stream too.
func (p *poller) flushRecords(s *session) {
	size := copy(p.tlsBuffers.out.data[:], s.unsent[backendSide].data)
	p.dropUnsent(s, backendSide)
	p.sendRecords(s, size)
	if s.open && s.unsent[backendSide] == nil && s.fin[backendSide] && s.closing == nil {
		syscall.Shutdown(int(s.fd[clientSide]), syscall.SHUT_WR) // a failure shows when the client is read
		p.endIfDead(s)
	}
}

// shutdownWrite ends the stream to the side: for a client with TLS with close_notify, and
// not before it has taken all that was kept for it. A failure shows when the side is read.
func (p *poller) shutdownWrite(s *session, i side) {
	if s.tls != nil && i == clientSide {
		p.sendCloseNotify(s)
		if !s.open || s.unsent[backendSide] != nil {
			return
		}
	}
	syscall.Shutdown(int(s.fd[i]), syscall.SHUT_WR)
}

// endComplete ends a session of which both streams are whole. If a client with TLS does not
// take close_notify at once, it does nothing: it is called again when that is sent.
func (p *poller) endComplete(s *session, cause cause) {
	if p.sendCloseNotify(s); s.unsent[backendSide] == nil {
		p.end(s, cause)
	}
}

// sendCloseNotify sends the alert close_notify to a client with TLS, once.
func (p *poller) sendCloseNotify(s *session) {
	if s.tls != nil && s.canSendFrom(backendSide) && s.tls.Conn.CloseWrite() == nil {
		p.sendSealed(s)
	}
}

// setTLS makes t, the tlsConn of a client, the tlsConn of the session.
func (p *poller) setTLS(s *session, t *tlsConn) {
	if s.tls = t; t != nil {
		t.setTransport(p.tlsBuffers, true)
	}
}
