//go:build !portable && !386

package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"math/big"
	"net"
	"sync"
	"testing"
)

// replacementsFlag may be 100, with 2,000 sessions.
var replacementsFlag = flag.Int("replacements", 3, "how often TestProcessCertificateReplaced replaces the certificate; it has 20 sessions for each")

// TestProcessCertificateReplaced: while the certificate is replaced again and again, and by
// pairs that do not fit too, no session is lost and no handshake fails. A new certificate is
// served in time, and a bad pair never.
func TestProcessCertificateReplaced(t *testing.T) {
	ca := newTestCA(t, "CA")
	secret := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	p := newRouterProcess(t, "-tls-cert", secret.path, "-backends", startStub(t, "127.0.0.1:0", echo).addr,
		"-overrides", overridesDir(t, pinned(10, 0)), "-drain-duration", "0")
	p.tls = newTLSClient(ca, tls.VersionTLS13).config
	p.serve(t)
	open := p.openClosing(t, 20*(*replacementsFlag), 10)

	handshakes := p.shakeHands(t, p.tls)
	refused := 0
	for i := range *replacementsFlag {
		pair := ca.sign(t, nil, nil, "a.test")
		if i%5 == 1 {
			pair.key = ca.sign(t, nil, nil, "a.test").key
			secret.writePair(t, pair)
			refused++
			p.log.wait(t, "TLS file rejected; keeping what is in force", refused)
			continue
		}
		secret.writePair(t, pair)
		serial := pair.tls(t).Leaf.SerialNumber
		eventually(t, "the certificate of new handshakes", serial.String(), handshakes.serial)
	}
	t.Logf("%d handshakes, %d sessions", handshakes.stop(), len(open))
	for i, conn := range open {
		message := fmt.Sprint("session ", i)
		mustWrite(t, conn, message)
		mustRead(t, conn, message)
	}
	waitMetrics(t, &p.runningRouter, map[string]float64{
		`router_sessions{backend="backend-0"}`:          float64(len(open)),
		`router_tls_handshakes_total{result="failed"}`:  0,
		`router_tls_handshakes_total{result="timeout"}`: 0,
		`router_tls_handshakes_total{result="evicted"}`: 0,
	})
}

// handshakes are those of one client, one after the other.
type handshakes struct {
	end  chan struct{}
	done sync.WaitGroup
	n    int // owned by the client until done

	mu   sync.Mutex
	last *big.Int // the serial number of the certificate that was served. Guarded by mu.
}

// shakeHands starts a client that does full handshakes until stop is called. None may fail.
func (p *routerProcess) shakeHands(t *testing.T, config *tls.Config) *handshakes {
	config = config.Clone()
	config.ClientSessionCache = nil
	h := &handshakes{end: make(chan struct{})}
	dialer := &net.Dialer{Timeout: patience}
	h.done.Go(func() {
		for ; ; h.n++ {
			select {
			case <-h.end:
				return
			default:
			}
			conn, err := tls.DialWithDialer(dialer, "tcp", p.clientAddr, config)
			if err != nil {
				t.Errorf("handshake %d: %v", h.n, err)
				return
			}
			h.mu.Lock()
			h.last = conn.ConnectionState().PeerCertificates[0].SerialNumber
			h.mu.Unlock()
			conn.Close()
		}
	})
	t.Cleanup(func() { h.stop() })
	return h
}

// serial returns the serial number of the certificate that was served last.
func (h *handshakes) serial() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return fmt.Sprint(h.last)
}

// stop ends the client, and returns how many handshakes it has done. Only the first call
// does something.
func (h *handshakes) stop() int {
	select {
	case <-h.end:
	default:
		close(h.end)
	}
	h.done.Wait()
	return h.n
}
