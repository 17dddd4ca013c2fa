//go:build !portable && !386

package main

import (
	"crypto/tls"
	"io"
	"syscall"
	"testing"
)

// A client that asks for new keys, and reads no answers, ends its session when they take more
// memory than a session may have: a few KiB while the budget is used up.
func TestTLSUnreadAnswersEnd(t *testing.T) {
	for name, budget := range map[string]int64{"": maxUnsent, "over budget": 0} {
		t.Run(name, func(t *testing.T) {
			r := quietRelay(t)
			r.engine.unsentBudget = budget
			s := askForKeys(t, r)
			s.wantCause(t, causeClientError)
			waitUnsent(t, r, 0)
		})
	}
}

// While the budget is used up, answers to a client that does not read take little memory.
func TestTLSUnreadAnswersOverBudget(t *testing.T) {
	r := quietRelay(t)
	r.engine.unsentBudget = 0
	s := startedRecords(t, r, tls.VersionTLS13, func(pairs sessionConns) {
		socket(pairs.near[clientSide]).SetWriteBuffer(4 << 10)
	})
	go io.Copy(io.Discard, s.backend) // until the test ends
	most := int64(0)                  // that were seen: the session may be over before there is a look
	for !s.isOver.Load() {
		s.client.Write(append(s.client.keyUpdate(t, true), s.client.data("x")...)) // it fails when the session is over
		most = max(most, r.engine.unsentBytes.Load())
	}
	if t.Logf("at most %d bytes were unsent", most); most > peekSize/2 {
		t.Errorf("at most %d bytes were unsent, want %d", most, peekSize/2)
	}
	s.wantCause(t, causeClientError)
}

// If close_notify cannot be sent, and that ends the session, nothing more is done with the
// numbers of its sockets: they may be another session's.
func TestTLSEndsAtCloseNotify(t *testing.T) {
	r := quietRelay(t)
	s := startedOver(t, r, "tls", "tcp")
	p := s.poller
	p.mu.Lock()
	reset(s.client)
	client := int(s.fd[clientSide])
	eventually(t, "the client's connection is reset", true, func() bool {
		n, _ := p.buf.peek(int32(client), 1) // it takes the error
		return n < 0 || syscall.Shutdown(client, syscall.SHUT_WR) == syscall.ENOTCONN
	})
	s.writeFailed[backendSide] = true // as after an RST of the backend
	p.sideEnded(s.session, backendSide)
	open, fds := s.open, s.fd
	p.unlockAndReport()
	wantEqual(t, "the session is open", open, false)
	wantEqual(t, "its sockets", fds, [2]int32{-1, -1})
	waitFor(t, r)
}
