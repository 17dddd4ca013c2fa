package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// hostName is in the certificate, in SNI, and in Host.
const hostName = "bench.example.com"

// tlsUse is how the sessions of a scenario use TLS.
type tlsUse struct {
	version uint16 // the only one that clients offer
	key     string // of the certificate: keyRSA or keyECDSA
	resume  bool   // all handshakes but the first have a ticket
}

// Keys of certificates.
const (
	keyRSA   = "rsa"   // RSA with 2048 bits
	keyECDSA = "ecdsa" // P-256
)

// certificate is one that a proxy has, and the clients want.
type certificate struct {
	der  []byte
	cert []byte // PEM
	key  []byte // PEM, PKCS #8
}

// newCertificate makes a self-signed certificate, for a day.
func newCertificate(kind string) (*certificate, error) {
	var key crypto.Signer
	var err error
	switch kind {
	case keyRSA:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case keyECDSA:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		err = fmt.Errorf("there is no certificate with a key of the kind %q", kind)
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{hostName},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &certificate{der: der, cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})}, nil
}

// write writes the files tls.crt and tls.key to dir, as a Secret of Kubernetes has them, and
// tls.pem, which is both, for HAProxy. All are for everybody to read: nginx's worker is
// another user, and the key is of no worth.
func (c *certificate) write(dir string) error {
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "tls.crt"), c.cert, 0o644),
		os.WriteFile(filepath.Join(dir, "tls.key"), c.key, 0o644),
		os.WriteFile(filepath.Join(dir, "tls.pem"), slices.Concat(c.cert, c.key), 0o644))
}

// config is how clients use TLS with a proxy that has c. What they offer is what browsers do,
// but for the hybrid key exchange with ML-KEM, which OpenSSL before 3.5 does not know: all
// proxies have to do the same work. With other parameters than these a handshake fails.
func (c *certificate) config(use *tlsUse) *tls.Config {
	config := &tls.Config{
		ServerName: hostName, NextProtos: []string{"http/1.1"}, MinVersion: use.version, MaxVersion: use.version,
		CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256},                                                         // in TLS 1.2 the second is for the certificate (RFC 8422 §5.1)
		CipherSuites:     []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}, // of TLS 1.2
		// A message of 16 KiB is one record, as browsers send it.
		DynamicRecordSizingDisabled: true,
		InsecureSkipVerify:          true, // VerifyConnection does it, and takes less of the load's CPU
		VerifyConnection:            c.verify,
	}
	if use.resume {
		config.ClientSessionCache = new(lastTicket)
	}
	return config
}

// verify refuses a connection that cannot be compared with those of other proxies.
func (c *certificate) verify(state tls.ConnectionState) error {
	if !bytes.Equal(state.PeerCertificates[0].Raw, c.der) {
		return errors.New("another certificate than that of the measurement")
	}
	switch state.CipherSuite {
	case tls.TLS_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:
		return nil
	}
	return fmt.Errorf("cipher suite %s, want AES-128-GCM", tls.CipherSuiteName(state.CipherSuite))
}

// verifyExchange refuses another key exchange than that of all proxies. It is not known before
// the handshake is over, and a session of TLS 1.2 that is resumed has none.
func verifyExchange(state tls.ConnectionState) error {
	if state.CurveID == tls.X25519 || state.Version == tls.VersionTLS12 && state.DidResume {
		return nil
	}
	return fmt.Errorf("key exchange with %s, want X25519", state.CurveID)
}

// lastTicket is a tls.ClientSessionCache of one ticket, the last of whatever connection.
type lastTicket struct{ state *tls.ClientSessionState }

func (t *lastTicket) Get(string) (*tls.ClientSessionState, bool)  { return t.state, t.state != nil }
func (t *lastTicket) Put(_ string, state *tls.ClientSessionState) { t.state = state }

// security is TLS between a connection's socket and its end. crypto/tls does the handshake in
// one call, which waits for the server: so it is in a coroutine, which waits while the loop
// goes on. After the handshake tls.Conn reads the records that are there, and asks its transport
// again when more have come.
type security struct {
	tls      *tls.Conn
	records  []byte                      // came from the socket, and tls has not read them yet; valid while it reads
	written  []byte                      // by tls, to be sent
	early    []byte                      // the end has sent it before the handshake was over
	advance  func() (struct{}, bool)     // goes on with the handshake; false when it is over
	abort    func()                      // ends the coroutine
	wait     func(struct{}) (again bool) // of the coroutine; nil when the handshake is over
	failure  error                       // of the handshake
	finished bool                        // the handshake, without failure
}

// secure begins TLS as the client on c, whose socket connects or has connected.
func (c *conn) secure(config *tls.Config) {
	s := new(security)
	s.tls = tls.Client(transport{s}, config)
	s.advance, s.abort = iter.Pull(func(yield func(struct{}) bool) {
		s.wait = yield
		if s.failure = s.tls.Handshake(); s.failure == nil {
			s.failure = verifyExchange(s.tls.ConnectionState())
		}
		s.wait = nil
	})
	c.security = s
	c.handshake()
}

// handshake goes on with what came, and sends what follows. It reports whether the
// connection is usable now.
func (c *conn) handshake() bool {
	s := c.security
	_, pending := s.advance()
	c.sendRecords()
	switch {
	case !c.open() || pending:
		return false
	case s.failure != nil:
		c.fail("TLS handshake: " + s.failure.Error())
		return false
	}
	s.finished = true
	early := s.early
	s.early = nil
	c.send(early)
	return c.open()
}

// sendRecords sends what tls has written.
func (c *conn) sendRecords() {
	s := c.security
	c.transmit(s.written)
	if s.written = s.written[:0]; cap(s.written) > maxRecord {
		s.written = nil
	}
}

// encrypt sends p in records, after the handshake.
func (c *conn) encrypt(p []byte) {
	s := c.security
	if !s.finished {
		s.early = append(s.early, p...)
		return
	}
	if _, err := s.tls.Write(p); err != nil {
		c.fail("write: " + err.Error())
		return
	}
	c.sendRecords()
}

// maxRecord is more than the bytes of a record with its head (RFC 8446 §5.2).
const maxRecord = 17 << 10

// decrypt reads once from the socket, and gives the end what the records had.
func (c *conn) decrypt() {
	l, s := c.loop, c.security
	if l.records == nil {
		l.records = make([]byte, 4*readSize)
	}
	n, errno := rawRead(c.fd, l.records)
	if !c.came(n, errno) {
		return
	}
	if n == len(l.records) {
		c.modify() // epoll has to look again
	}
	s.records = l.records[:n]
	if !s.finished && !c.handshake() {
		return
	}
	held := copy(l.room(len(c.in)), c.in)
	for {
		n, err := s.tls.Read(l.room(held + maxRecord)[held:])
		held += n
		if err == nil {
			continue
		}
		c.deliver(l.buf[:held])
		switch {
		case err == errDry || !c.open():
		case err == io.EOF:
			c.fail("closed by the peer")
		default:
			c.fail("read: " + err.Error())
		}
		return
	}
}

// goodbye sends close_notify (RFC 8446 §6.1), unless the socket takes no more.
func (s *security) goodbye(fd int) {
	s.abort()
	if s.finished && s.tls.CloseWrite() == nil {
		rawWrite(fd, s.written)
	}
}

// resumed reports whether the handshake was one with a ticket.
func (s *security) resumed() bool { return s.tls.ConnectionState().DidResume }

// transport is what tls has in a connection's place.
type transport struct{ *security }

// errDry is what tls.Conn gets when there is nothing to read. It goes on after an error that
// is a temporary one of a net.Error.
var errDry net.Error = dry{}

type dry struct{}

func (dry) Error() string   { return "nothing to read" }
func (dry) Timeout() bool   { return true }
func (dry) Temporary() bool { return true }

func (t transport) Read(p []byte) (int, error) {
	for len(t.records) == 0 {
		if t.wait == nil {
			return 0, errDry
		}
		if !t.wait(struct{}{}) {
			return 0, net.ErrClosed
		}
	}
	n := copy(p, t.records)
	t.security.records = t.records[n:]
	return n, nil
}

func (t transport) Write(p []byte) (int, error) {
	t.security.written = append(t.written, p...)
	return len(p), nil
}

func (transport) Close() error                     { return nil }
func (transport) LocalAddr() net.Addr              { return nil }
func (transport) RemoteAddr() net.Addr             { return nil }
func (transport) SetDeadline(time.Time) error      { return nil }
func (transport) SetReadDeadline(time.Time) error  { return nil }
func (transport) SetWriteDeadline(time.Time) error { return nil }
