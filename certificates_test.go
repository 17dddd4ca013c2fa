package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// testCA signs certificates for a test.
type testCA struct {
	certificate *x509.Certificate
	key         crypto.Signer
	pem         string
}

func newTestCA(t testing.TB, name string) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	ca := &testCA{key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().AddDate(-1, 0, 0), NotAfter: time.Now().AddDate(50, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	ca.certificate, err = x509.ParseCertificate(der)
	must(t, err)
	ca.pem = pemText("CERTIFICATE", der)
	return ca
}

func pemText(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// testPair is a certificate and its key, in PEM.
type testPair struct{ cert, key string }

// tls returns the pair as crypto/tls has it.
func (p testPair) tls(t testing.TB) tls.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair([]byte(p.cert), []byte(p.key))
	must(t, err)
	return pair
}

// sign returns a certificate for the key, a P-256 one if it is nil, that change may change
// before.
func (ca *testCA) sign(t testing.TB, key crypto.Signer, change func(*x509.Certificate), names ...string) testPair {
	t.Helper()
	if key == nil {
		made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		key = made
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: cmp.Or(strings.Join(names, " "), "none")}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), ca.key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return testPair{pemText("CERTIFICATE", der), pemText("PRIVATE KEY", keyDER)}
}

// rsaKey returns a key that is made quickly enough for tests.
func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	return key
}

// mountedSecret is a directory with a Secret as the kubelet mounts it.
type mountedSecret struct {
	path    string
	version int
}

// write replaces the files by others, all at once.
func (m *mountedSecret) write(t testing.TB, files map[string]string) {
	t.Helper()
	m.version++
	version := fmt.Sprintf("..%d", m.version)
	must(t, os.Mkdir(filepath.Join(m.path, version), 0o755))
	for name, content := range files {
		must(t, os.WriteFile(filepath.Join(m.path, version, name), []byte(content), 0o600))
		link := filepath.Join(m.path, name)
		if _, err := os.Lstat(link); err != nil {
			must(t, os.Symlink(filepath.Join("..data", name), link))
		}
	}
	must(t, errors.Join(os.Symlink(version, filepath.Join(m.path, "..next")),
		os.Rename(filepath.Join(m.path, "..next"), filepath.Join(m.path, "..data"))))
	if m.version > 1 {
		must(t, os.RemoveAll(filepath.Join(m.path, fmt.Sprintf("..%d", m.version-1))))
	}
}

func (m *mountedSecret) writePair(t testing.TB, p testPair) {
	t.Helper()
	m.write(t, map[string]string{"tls.crt": p.cert, "tls.key": p.key})
}

// newMountedSecret returns a Secret with this pair.
func newMountedSecret(t testing.TB, p testPair) *mountedSecret {
	t.Helper()
	m := &mountedSecret{path: t.TempDir()}
	m.writePair(t, p)
	return m
}

// writeFile replaces a file, all at once.
func writeFile(t testing.TB, path, content string) string {
	t.Helper()
	must(t, errors.Join(os.WriteFile(path+".next", []byte(content), 0o600), os.Rename(path+".next", path)))
	return path
}

// certificateStore is a store of certificates whose clock and looks a test decides.
type certificateStore struct {
	*certificates
	clock    atomic.Int64 // nanoseconds that its clock is ahead
	log      *logTail
	messages []string // that would be Events
}

// newStore reads the certificates that the flags name.
func newStore(t testing.TB, flags certificateFlags) *certificateStore {
	t.Helper()
	s := &certificateStore{log: newLogTail()}
	c, err := newCertificates(flags, slog.New(slog.NewJSONHandler(s.log, nil)))
	must(t, err)
	c.now = func() time.Time { return time.Now().Add(time.Duration(s.clock.Load())) }
	c.onRejected = func(message string) { s.messages = append(s.messages, message) }
	s.certificates = c
	s.publish(ticketKeys(c.secrets, c.now())) // with this clock
	return s
}

// pass sets the clock forward, and looks.
func (s *certificateStore) pass(d time.Duration) {
	s.clock.Add(int64(d))
	s.look()
}

// lookTwice looks as often as a change of files needs.
func (s *certificateStore) lookTwice() {
	s.look()
	s.look()
}

// inForceNames returns the names of each certificate in force.
func (s *certificateStore) inForceNames() (names []string) {
	for _, certificate := range s.config().Certificates {
		names = append(names, strings.Join(certificate.Leaf.DNSNames, " "))
	}
	return names
}

// metrics returns the samples that the store writes.
func (s *certificateStore) metrics(t testing.TB) *exposition {
	t.Helper()
	var b bytes.Buffer
	s.writeMetrics(metricsWriter{w: &b})
	e, err := parseExposition(b.String())
	must(t, err)
	return e
}

// wantRejected checks what is said of a file: a reason, "" for none.
func (s *certificateStore) wantRejected(t testing.TB, file, reason string) {
	t.Helper()
	value := boolToFloat(reason != "")
	if lacks := s.metrics(t).lacks(map[string]float64{fmt.Sprintf("router_tls_file_rejected{file=%q}", file): value}); lacks != "" {
		t.Error(lacks)
	}
}

// serveTLS serves the handshakes of clients with the configuration of that moment, and
// answers each with the number of its certificate in DER and, if it had a session before,
// "resumed".
func serveTLS(t testing.TB, config func() *tls.Config) (addr string) {
	t.Helper()
	l := listenLocal(t)
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	t.Cleanup(func() { l.Close() })
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { answerTLS(tls.Server(conn, config())) })
		}
	})
	return l.Addr().String()
}

// answerTLS answers one client.
func answerTLS(conn *tls.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * patience))
	if conn.Handshake() != nil {
		return
	}
	state := conn.ConnectionState()
	fmt.Fprintf(conn, "resumed %v, subject %q\n", state.DidResume, clientSubject(&state))
	conn.CloseWrite()
	io.Copy(io.Discard, conn)
}

// tlsClient is a client that keeps its sessions' tickets.
type tlsClient struct{ config *tls.Config }

// newTLSClient returns a client that trusts the CA, and takes sessions up again.
func newTLSClient(ca *testCA, version uint16, certificates ...tls.Certificate) *tlsClient {
	roots := x509.NewCertPool()
	roots.AddCert(ca.certificate)
	return &tlsClient{config: &tls.Config{
		RootCAs: roots, ServerName: "a.test", Certificates: certificates,
		MinVersion: version, MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}}
}

// dial does a handshake, and returns what it has agreed on and what the server says.
func (c *tlsClient) dial(addr string) (state tls.ConnectionState, says string, err error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 2 * patience}, "tcp", addr, c.config)
	if err != nil {
		return state, "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * patience))
	said, err := io.ReadAll(conn) // with TLS 1.3 the ticket, and a refusal of the client, come after the handshake
	return conn.ConnectionState(), string(said), err
}

// want checks whether a handshake goes on with an earlier session.
func (c *tlsClient) want(t testing.TB, addr string, resumed bool) {
	t.Helper()
	state, says, err := c.dial(addr)
	must(t, err)
	if state.DidResume != resumed || !strings.HasPrefix(says, fmt.Sprintf("resumed %v,", resumed)) {
		t.Errorf("resumed is %v, and the server says %q, want %v", state.DidResume, says, resumed)
	}
}

// versions are the versions of TLS that clients may speak.
var versions = map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13}

// untilNoon returns how long it is until noon, UTC, of tomorrow: a test then sees no other day
// begin.
func untilNoon() time.Duration {
	return time.Until(time.Now().UTC().Truncate(ticketTime).Add(ticketTime * 3 / 2))
}

// eachVersion runs a test with each version of TLS.
func eachVersion(t *testing.T, test func(t *testing.T, version uint16)) {
	for name, version := range versions {
		t.Run(name, func(t *testing.T) { test(t, version) })
	}
}

// badPairs has every way in which a pair can be bad, and what is said of it. good is the
// pair that is in force.
func badPairs(t testing.TB, ca *testCA, good testPair) map[string]struct {
	pair   testPair
	reason string
} {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	must(t, err)
	other := ca.sign(t, nil, nil, "b.test")
	cut := good.cert[:len(good.cert)/2]
	expired := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2002, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	early := func(c *x509.Certificate) {
		c.NotBefore = time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC)
		c.NotAfter = c.NotBefore.AddDate(1, 0, 0)
	}
	return map[string]struct {
		pair   testPair
		reason string
	}{
		"key of another":        {testPair{good.cert, other.key}, "tls.key: private key does not match public key"},
		"empty certificate":     {testPair{"", good.key}, "tls.crt is empty"},
		"empty key":             {testPair{good.cert, ""}, "tls.key is empty"},
		"certificate no PEM":    {testPair{"hello\n", good.key}, "tls.crt: it has no PEM block CERTIFICATE"},
		"key no PEM":            {testPair{good.cert, "hello\n"}, "tls.key: failed to find any PEM data in key input"},
		"both in one's place":   {testPair{good.key, good.cert}, "tls.crt: it has no PEM block CERTIFICATE"},
		"certificate as key":    {testPair{good.cert, good.cert}, "tls.key: found a certificate rather than a key"},
		"cut":                   {testPair{cut, good.key}, "tls.crt: it has a broken PEM block"},
		"chain cut":             {testPair{good.cert + cut, good.key}, "tls.crt: it has a broken PEM block"},
		"broken in the middle":  {testPair{good.cert + "-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n" + ca.pem, good.key}, "tls.crt: it has a broken PEM block"},
		"chain no certificate":  {testPair{good.cert + pemText("CERTIFICATE", []byte("hello")), good.key}, "tls.crt: certificate 2 of it: "},
		"key no key":            {testPair{good.cert, pemText("PRIVATE KEY", []byte("hello"))}, "tls.key: failed to parse private key"},
		"encrypted key":         {testPair{good.cert, pemText("ENCRYPTED PRIVATE KEY", []byte("hello"))}, "tls.key: "},
		"too large":             {testPair{strings.Repeat(" ", maxCertificateFile+1), good.key}, "tls.crt has more than 1048576 bytes"},
		"key for no handshake":  {ca.sign(t, p224, nil, "a.test"), "tls.crt: no handshake is possible with it: "},
		"too long a chain":      {testPair{good.cert + strings.Repeat(ca.pem, 270<<10/len(ca.certificate.Raw)), good.key}, "tls.crt: its certificates have "},
		"expired":               {ca.sign(t, nil, expired, "a.test"), "tls.crt: the certificate expired at 2002-01-01T00:00:00Z"},
		"not valid yet":         {ca.sign(t, nil, early, "a.test"), "tls.crt: the certificate is not valid before 2090-01-01T00:00:00Z"},
		"chain before the leaf": {testPair{ca.pem + good.cert, good.key}, "tls.key: private key does not match public key"},
	}
}

// TestCertificateRejected: what is bad changes nothing, is said once, and mends.
func TestCertificateRejected(t *testing.T) {
	ca := newTestCA(t, "ca")
	good, beside := ca.sign(t, nil, nil, "a.test"), ca.sign(t, nil, nil, "beside.test")
	for name, bad := range badPairs(t, ca, good) {
		t.Run(name, func(t *testing.T) {
			secret, other := newMountedSecret(t, good), newMountedSecret(t, beside)
			s := newStore(t, certificateFlags{certs: []string{other.path, secret.path}})
			before := s.config()
			secret.writePair(t, bad.pair)
			s.look()
			s.wantRejected(t, secret.path, "")
			for range 3 {
				s.look()
			}
			s.wantRejected(t, secret.path, bad.reason)
			s.wantRejected(t, other.path, "")
			if s.config() != before {
				t.Error("the configuration is another")
			}
			lines := s.log.all("TLS file rejected; keeping what is in force")
			wantLine(t, lines, 1, map[string]any{"flag": "-tls-cert", "file": secret.path})
			reason := fmt.Sprint(lines[0]["error"])
			if !strings.HasPrefix(reason, filepath.Join(secret.path, bad.reason)) {
				t.Errorf("reason %q, want %q", reason, bad.reason)
			}
			if len(s.messages) != 1 || !strings.Contains(s.messages[0], reason) {
				t.Errorf("Events %q, want one with %q", s.messages, reason)
			}

			other.writePair(t, ca.sign(t, nil, nil, "new.test")) // it does not wait for the bad one
			s.lookTwice()
			wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[new.test a.test]")
			secret.writePair(t, ca.sign(t, nil, nil, "a.test", "c.test"))
			s.lookTwice()
			wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[new.test a.test c.test]")
			s.wantRejected(t, secret.path, "")
			line := s.log.all("certificate in force")
			if last := line[len(line)-1]; last["names"] != "a.test,c.test" || last["file"] != secret.path || last["not_after"] == nil {
				t.Errorf("the log says %v", last)
			}
		})
	}
}

// TestCertificateRestored: the pair in force, written once more, is no rejection.
func TestCertificateRestored(t *testing.T) {
	ca := newTestCA(t, "ca")
	good := ca.sign(t, nil, nil, "a.test")
	secret := newMountedSecret(t, good)
	s := newStore(t, certificateFlags{certs: []string{secret.path}})
	before := s.config()
	must(t, os.Remove(filepath.Join(secret.path, "..data")))
	s.lookTwice()
	s.wantRejected(t, secret.path, "missing")
	wantLine(t, s.log.all("TLS file rejected; keeping what is in force"), 1,
		map[string]any{"error": filepath.Join(secret.path, "tls.crt") + ": no such file or directory"})
	secret.writePair(t, good)
	s.lookTwice()
	s.wantRejected(t, secret.path, "")
	wantEqual(t, "the lines on what is in force", len(s.log.all("certificate in force")), 2)
	if s.config() != before {
		t.Error("the configuration is another")
	}
}

// TestCertificateHalfWritten: a key that comes after its certificate is no rejection.
func TestCertificateHalfWritten(t *testing.T) {
	ca := newTestCA(t, "ca")
	first, second := ca.sign(t, nil, nil, "a.test"), ca.sign(t, nil, nil, "b.test")
	dir := t.TempDir()
	cert, key := writeFile(t, filepath.Join(dir, "cert"), first.cert), writeFile(t, filepath.Join(dir, "key"), first.key)
	s := newStore(t, certificateFlags{certs: []string{cert}, keys: []string{key}})
	writeFile(t, cert, second.cert)
	s.look()
	writeFile(t, key, second.key)
	s.lookTwice()
	wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[b.test]")
	wantEqual(t, "the rejections", len(s.log.all("TLS file rejected; keeping what is in force")), 0)
}

// TestCertificateExpires: an expired certificate is better than none, and worse than a valid
// one. What is not valid yet is taken when its time has come.
func TestCertificateExpires(t *testing.T) {
	ca := newTestCA(t, "ca")
	until := func(d time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(d) }
	}
	secret := newMountedSecret(t, ca.sign(t, nil, until(-time.Minute), "expired.test"))
	s := newStore(t, certificateFlags{certs: []string{secret.path}})
	wantEqual(t, "the warnings", len(s.log.all("certificate is not valid now")), 1)
	secret.writePair(t, ca.sign(t, nil, until(-time.Second), "later.test"))
	s.lookTwice()
	wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[later.test]")
	wantEqual(t, "the warnings", len(s.log.all("certificate is not valid now")), 2)
	secret.writePair(t, ca.sign(t, nil, until(time.Hour), "valid.test"))
	s.lookTwice()
	early := func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }
	secret.writePair(t, ca.sign(t, nil, early, "early.test"))
	s.lookTwice()
	wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[valid.test]")
	s.wantRejected(t, secret.path, "early")
	s.pass(31 * time.Minute)
	wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[early.test]")
	s.wantRejected(t, secret.path, "")
}

// TestCertificatesAtStart: what cannot be read when the router starts ends it with an error
// that names the flag and the file.
func TestCertificatesAtStart(t *testing.T) {
	ca := newTestCA(t, "ca")
	good := ca.sign(t, nil, nil, "a.test")
	dir := t.TempDir()
	file := func(name, content string) string { return writeFile(t, filepath.Join(dir, name), content) }
	cert, key := file("cert", good.cert), file("key", good.key)
	bad, short, empty := file("bad", "hello"), file("short", strings.Repeat("s", 31)), file("empty", "")
	pipe := filepath.Join(dir, "pipe")
	must(t, syscall.Mkfifo(pipe, 0o600))
	pair := certificateFlags{certs: []string{cert}, keys: []string{key}}
	withCA, withSecret := pair, pair
	withCA.clientCA, withSecret.ticketSecret = bad, short
	for name, tt := range map[string]struct {
		flags certificateFlags
		want  string
	}{
		"no key":         {certificateFlags{certs: []string{cert}}, "-tls-cert " + cert + " requires a -tls-key: only a directory has its key in it"},
		"one key more":   {certificateFlags{certs: []string{cert}, keys: []string{key, key}}, "-tls-key " + key + " belongs to no -tls-cert: each file has one key, and a directory has its own"},
		"no certificate": {certificateFlags{certs: []string{"/none"}, keys: []string{key}}, "-tls-cert /none: /none: no such file or directory"},
		"no key file":    {certificateFlags{certs: []string{cert}, keys: []string{"/none"}}, "-tls-cert " + cert + ": /none: no such file or directory"},
		"empty":          {certificateFlags{certs: []string{empty}, keys: []string{key}}, "-tls-cert " + empty + ": " + empty + " is empty"},
		"no Secret":      {certificateFlags{certs: []string{dir}}, "-tls-cert " + dir + ": " + dir + "/tls.crt: no such file or directory"},
		"a pipe":         {certificateFlags{certs: []string{pipe}, keys: []string{key}}, "-tls-cert " + pipe + ": " + pipe + " is not a regular file"},
		"bad":            {certificateFlags{certs: []string{bad}, keys: []string{key}}, "-tls-cert " + bad + ": " + bad + ": it has no PEM block CERTIFICATE"},
		"bad CA":         {withCA, "-tls-client-ca " + bad + ": it has no PEM block CERTIFICATE"},
		"short secret":   {withSecret, "-tls-ticket-secret " + short + ": it must have at least 32 bytes (got 31)"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := newCertificates(tt.flags, slog.New(slog.DiscardHandler)); err == nil || err.Error() != tt.want {
				t.Errorf("error:\n%v\nwant:\n%s", err, tt.want)
			}
		})
	}
}

// TestCertificateReplaced: no handshake fails while certificates are replaced, and each
// client gets the old or the new one.
func TestCertificateReplaced(t *testing.T) {
	const replacements = 100
	ca := newTestCA(t, "ca")
	secret := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	s := newStore(t, certificateFlags{certs: []string{secret.path}})
	addr := serveTLS(t, s.config)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	var handshakes atomic.Int64
	for _, version := range versions {
		clients.Go(func() {
			client := newTLSClient(ca, version)
			for ctx.Err() == nil {
				if _, _, err := client.dial(addr); err != nil {
					t.Errorf("a handshake failed: %v", err)
				}
				client.config.ClientSessionCache = nil // the next one sees a certificate
				handshakes.Add(1)
			}
		})
	}
	seen := map[string]bool{}
	for range replacements {
		secret.writePair(t, ca.sign(t, nil, nil, "a.test"))
		done := handshakes.Load()
		s.lookTwice()
		seen[s.config().Certificates[0].Leaf.SerialNumber.String()] = true
		eventually(t, "a handshake after a replacement", true, func() bool { return handshakes.Load() > done })
	}
	stop()
	clients.Wait()
	wantEqual(t, "the certificates", len(seen), replacements)
}

// TestCertificateChoice: a client gets the certificate of the name that it asks for, and of
// two for one name that which it can verify; a name that none has gets the first.
func TestCertificateChoice(t *testing.T) {
	ca := newTestCA(t, "ca")
	rsaPair, ecdsaPair := ca.sign(t, rsaKey(t), nil, "a.test"), ca.sign(t, nil, nil, "a.test")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	dir := t.TempDir()
	cert, key := writeFile(t, filepath.Join(dir, "cert"), rsaPair.cert), writeFile(t, filepath.Join(dir, "key"), rsaPair.key)
	s := newStore(t, certificateFlags{keys: []string{key}, certs: []string{
		newMountedSecret(t, ecdsaPair).path, cert,
		newMountedSecret(t, ca.sign(t, nil, nil, "*.b.test")).path, newMountedSecret(t, ca.sign(t, ed, nil, "c.test")).path,
	}})
	addr := serveTLS(t, s.config)
	onlyRSA := []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	for name, tt := range map[string]struct {
		name   string
		suites []uint16 // of TLS 1.2
		want   x509.PublicKeyAlgorithm
		names  string
	}{
		"ECDSA first":     {"a.test", nil, x509.ECDSA, "a.test"},
		"RSA for another": {"a.test", onlyRSA, x509.RSA, "a.test"},
		"a wildcard":      {"x.b.test", nil, x509.ECDSA, "*.b.test"},
		"Ed25519":         {"c.test", nil, x509.Ed25519, "c.test"},
		"a name of none":  {"d.test", nil, x509.ECDSA, "a.test"},
		"no name":         {"", nil, x509.ECDSA, "a.test"},
	} {
		t.Run(name, func(t *testing.T) {
			client := newTLSClient(ca, tls.VersionTLS12)
			client.config.ServerName, client.config.CipherSuites = tt.name, tt.suites
			client.config.InsecureSkipVerify = tt.names != tt.name // checked below
			state, _, err := client.dial(addr)
			must(t, err)
			leaf := state.PeerCertificates[0]
			if leaf.PublicKeyAlgorithm != tt.want || strings.Join(leaf.DNSNames, " ") != tt.names {
				t.Errorf("the certificate is of %v for %v, want %v for %s", leaf.PublicKeyAlgorithm, leaf.DNSNames, tt.want, tt.names)
			}
		})
	}
}

// TestTLSVersions: clients speak at least -tls-min-version.
func TestTLSVersions(t *testing.T) {
	ca := newTestCA(t, "ca")
	secret := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	for least, oks := range map[string]map[uint16]bool{
		"1.2": {tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true},
		"1.3": {tls.VersionTLS11: false, tls.VersionTLS12: false, tls.VersionTLS13: true},
	} {
		s := newStore(t, certificateFlags{certs: []string{secret.path}, minVersion: least})
		addr := serveTLS(t, s.config)
		for version, ok := range oks {
			state, _, err := newTLSClient(ca, version).dial(addr)
			switch {
			case ok && (err != nil || state.Version != version):
				t.Errorf("a client with %s gets %v, version %x, with -tls-min-version %s", tls.VersionName(version), err, state.Version, least)
			case !ok && (err == nil || !strings.Contains(err.Error(), "protocol version not supported")):
				t.Errorf("a client with %s gets %v with -tls-min-version %s", tls.VersionName(version), err, least)
			}
		}
	}
}

// TestTLSProtocols: a client that names protocols (RFC 7301) has to name HTTP/1.1.
func TestTLSProtocols(t *testing.T) {
	ca := newTestCA(t, "ca")
	s := newStore(t, certificateFlags{certs: []string{newMountedSecret(t, ca.sign(t, nil, nil, "a.test")).path}})
	addr := serveTLS(t, s.config)
	eachVersion(t, func(t *testing.T, version uint16) {
		for _, tt := range []struct {
			offers []string
			want   string
			err    string
		}{
			{nil, "", ""},
			{[]string{"http/1.1"}, "http/1.1", ""},
			{[]string{"h2", "http/1.1"}, "http/1.1", ""},
			{[]string{"h2"}, "", "no application protocol"},
			{[]string{"imap"}, "", "no application protocol"},
		} {
			client := newTLSClient(ca, version)
			client.config.NextProtos = tt.offers
			state, _, err := client.dial(addr)
			if tt.err == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.err) || state.NegotiatedProtocol != tt.want {
				t.Errorf("a client that offers %q gets %q and %v, want %q and %q", tt.offers, state.NegotiatedProtocol, err, tt.want, tt.err)
			}
		}
	})
}

// writeSecret writes a secret of tickets that begins with the text.
func writeSecret(t testing.TB, path, begin string) string {
	t.Helper()
	return writeFile(t, path, begin+strings.Repeat(".", minTicketSecret))
}

// TestTickets: a client resumes at each router that has the same secret, whatever its
// certificate, also after the files have changed, and nowhere else.
func TestTickets(t *testing.T) {
	ca := newTestCA(t, "ca")
	secret := writeSecret(t, filepath.Join(t.TempDir(), "secret"), "first")
	other := writeSecret(t, filepath.Join(t.TempDir(), "secret"), "other")
	certs := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	store := func(secret string) (*certificateStore, string) {
		s := newStore(t, certificateFlags{certs: []string{certs.path}, ticketSecret: secret})
		return s, serveTLS(t, s.config)
	}
	one, first := store(secret)
	_, second := store(secret)
	_, stranger := store(other)
	_, random := store("")
	_, alsoRandom := store("")
	eachVersion(t, func(t *testing.T, version uint16) {
		client := func() *tlsClient { return newTLSClient(ca, version) }
		moves := client()
		moves.want(t, first, false)
		moves.want(t, second, true)
		moves.want(t, first, true)
		moves.want(t, stranger, false)
		alone := client()
		alone.want(t, random, false)
		alone.want(t, random, true)
		alone.want(t, alsoRandom, false)

		stays := client()
		stays.want(t, first, false)
		certs.writePair(t, ca.sign(t, nil, nil, "a.test"))
		before := one.config()
		one.lookTwice()
		if one.config() == before {
			t.Error("the certificate was not replaced")
		}
		stays.want(t, first, true)
	})
}

// TestTicketDays: a ticket opens on its day and on the next one, and also with a router
// whose clock is a day behind, but not later.
func TestTicketDays(t *testing.T) {
	const day = 24 * time.Hour
	ca := newTestCA(t, "ca")
	secret := writeSecret(t, filepath.Join(t.TempDir(), "secret"), "first")
	certs := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	flags := certificateFlags{certs: []string{certs.path}, ticketSecret: secret}
	noon := untilNoon()
	issues := newStore(t, flags)
	issues.pass(noon)
	addr := serveTLS(t, issues.config)
	eachVersion(t, func(t *testing.T, version uint16) {
		for _, tt := range []struct {
			passed  time.Duration
			resumed bool
		}{{0, true}, {day, true}, {-day, true}, {2 * day, false}, {-2 * day, false}} {
			client := newTLSClient(ca, version)
			client.want(t, addr, false)
			s := newStore(t, flags)
			later := serveTLS(t, s.config)
			s.pass(noon + tt.passed)
			client.want(t, later, tt.resumed)
		}
	})
	keys := issues.ticketKeys
	issues.pass(0)
	if !slices.Equal(issues.ticketKeys, keys) {
		t.Error("the keys have changed within a day")
	}
	issues.pass(day)
	wantEqual(t, "the key of today that was that of tomorrow", issues.ticketKeys[0], keys[2])
}

// TestTicketSecretChanges: tickets of the secret before open for one more day. A bad secret
// changes nothing.
func TestTicketSecretChanges(t *testing.T) {
	ca := newTestCA(t, "ca")
	secret := writeSecret(t, filepath.Join(t.TempDir(), "secret"), "first")
	certs := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	for name, version := range versions {
		t.Run(name, func(t *testing.T) {
			writeSecret(t, secret, "first")
			s := newStore(t, certificateFlags{certs: []string{certs.path}, ticketSecret: secret})
			s.pass(untilNoon())
			addr := serveTLS(t, s.config)
			client, late := newTLSClient(ca, version), newTLSClient(ca, version)
			client.want(t, addr, false)
			late.want(t, addr, false)

			writeFile(t, secret, "short")
			s.lookTwice()
			s.wantRejected(t, secret, "short")
			client.want(t, addr, true)

			writeSecret(t, secret, "second")
			s.lookTwice()
			s.wantRejected(t, secret, "")
			wantEqual(t, "the keys", len(s.ticketKeys), 6)
			client.want(t, addr, true) // and has a ticket of the new one now
			s.pass(ticketTime)
			wantEqual(t, "the keys", len(s.ticketKeys), 3)
			client.want(t, addr, true)
			late.want(t, addr, false)
		})
	}
	s := newStore(t, certificateFlags{certs: []string{certs.path}, ticketSecret: secret})
	for i := range 2 * maxPreviousSecrets {
		writeSecret(t, secret, fmt.Sprint(i))
		s.lookTwice()
	}
	wantEqual(t, "the secrets", len(s.secrets), 1+maxPreviousSecrets)
}

// TestTicketDirectory: a directory without a secret, as that of an optional Secret, has one of
// this router alone, until it has a secret, and again when that goes.
func TestTicketDirectory(t *testing.T) {
	ca := newTestCA(t, "ca")
	certs := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	eachVersion(t, func(t *testing.T, version uint16) {
		directory := t.TempDir()
		path := filepath.Join(directory, "secret")
		store := func() (*certificateStore, string) {
			s := newStore(t, certificateFlags{certs: []string{certs.path}, ticketSecret: directory})
			return s, serveTLS(t, s.config)
		}
		one, first := store()
		two, second := store()
		want := func(client *tlsClient, shared bool) {
			t.Helper()
			client.want(t, first, true)
			client.want(t, second, shared)
		}
		client := newTLSClient(ca, version)
		client.want(t, first, false)
		want(client, false)

		writeSecret(t, path, "shared")
		one.lookTwice()
		two.lookTwice()
		client = newTLSClient(ca, version)
		client.want(t, first, false)
		want(client, true)

		writeFile(t, path, "short")
		one.lookTwice()
		one.wantRejected(t, path, "short")

		must(t, os.Remove(path))
		one.lookTwice()
		two.lookTwice()
		one.wantRejected(t, path, "")
		client = newTLSClient(ca, version)
		client.want(t, first, false)
		want(client, false)
	})
}

// TestClientCertificates: a client needs a certificate of the CA, and a ticket is worth no
// more than the certificate that its first handshake had.
func TestClientCertificates(t *testing.T) {
	server, ca, next := newTestCA(t, "server"), newTestCA(t, "clients"), newTestCA(t, "next")
	path := filepath.Join(t.TempDir(), "ca")
	certs := newMountedSecret(t, server.sign(t, nil, nil, "a.test"))
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	onlyServer := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	eachVersion(t, func(t *testing.T, version uint16) {
		writeFile(t, path, "Clients of all kinds\n"+ca.pem)
		s := newStore(t, certificateFlags{certs: []string{certs.path}, clientCA: path})
		addr := serveTLS(t, s.config)
		known := newTLSClient(server, version, ca.sign(t, nil, nil, "known").tls(t))
		_, says, err := known.dial(addr)
		must(t, err)
		wantEqual(t, "the answer", says, "resumed false, subject \"CN=known\"\n")
		_, says, err = known.dial(addr)
		must(t, err)
		wantEqual(t, "the answer", says, "resumed true, subject \"CN=known\"\n")
		for name, certificates := range map[string][]tls.Certificate{
			"none":           nil,
			"of another CA":  {next.sign(t, nil, nil, "stranger").tls(t)},
			"expired":        {ca.sign(t, nil, expired, "expired").tls(t)},
			"not for client": {ca.sign(t, nil, onlyServer, "server").tls(t)},
		} {
			if _, says, err := newTLSClient(server, version, certificates...).dial(addr); err == nil || says != "" {
				t.Errorf("a client with a certificate %s gets %q", name, says)
			}
		}

		writeFile(t, path, "no CA")
		s.lookTwice()
		s.wantRejected(t, path, "no CA")
		known.want(t, addr, true)
		writeFile(t, path, ca.pem+next.pem)
		s.lookTwice()
		s.wantRejected(t, path, "")
		known.want(t, addr, true)
		writeFile(t, path, next.pem)
		s.lookTwice()
		if _, says, err := known.dial(addr); err == nil || says != "" {
			t.Errorf("a client whose CA was removed gets %q", says)
		}
	})
}

// TestTicketsOfAnotherCA: a ticket of a client is worth nothing at a router with the same
// secret and another CA, or where the client's certificate has expired meanwhile.
func TestTicketsOfAnotherCA(t *testing.T) {
	server, ca, next := newTestCA(t, "server"), newTestCA(t, "clients"), newTestCA(t, "next")
	secret := writeSecret(t, filepath.Join(t.TempDir(), "secret"), "first")
	certs := newMountedSecret(t, server.sign(t, nil, nil, "a.test"))
	store := func(clientCA string) (*certificateStore, string) {
		flags := certificateFlags{certs: []string{certs.path}, ticketSecret: secret}
		if clientCA != "" {
			flags.clientCA = writeFile(t, filepath.Join(t.TempDir(), "ca"), clientCA)
		}
		s := newStore(t, flags)
		return s, serveTLS(t, s.config)
	}
	expiring, first := store(ca.pem)
	_, other := store(next.pem)
	_, open := store("")
	eachVersion(t, func(t *testing.T, version uint16) {
		expires := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) }
		client := newTLSClient(server, version, ca.sign(t, nil, expires, "known").tls(t))
		client.want(t, first, false)
		client.want(t, first, true)
		if _, says, err := client.dial(other); err == nil || says != "" {
			t.Errorf("a ticket of another CA's client gets %q", says)
		}
		anonymous := newTLSClient(server, version)
		anonymous.want(t, open, false)
		if _, says, err := anonymous.dial(first); err == nil || says != "" {
			t.Errorf("a ticket without a certificate gets %q", says)
		}
		expiring.pass(2 * time.Hour)
		if _, says, err := client.dial(first); err == nil || says != "" {
			t.Errorf("a ticket of an expired certificate gets %q", says)
		}
		expiring.pass(-2 * time.Hour)
	})
}

// subjectDER returns a subject of these attributes, each one an RDN of its own.
func subjectDER(t testing.TB, attributes ...pkix.AttributeTypeAndValue) []byte {
	t.Helper()
	var subject pkix.RDNSequence
	for _, a := range attributes {
		subject = append(subject, pkix.RelativeDistinguishedNameSET{a})
	}
	der, err := asn1.Marshal(subject)
	must(t, err)
	return der
}

func TestClientSubject(t *testing.T) {
	cn := asn1.ObjectIdentifier{2, 5, 4, 3}
	name := func(text string) pkix.AttributeTypeAndValue {
		return pkix.AttributeTypeAndValue{Type: cn, Value: text}
	}
	email := pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, Value: "a@b"}
	raw := func(tag int, bytes string) pkix.AttributeTypeAndValue {
		return pkix.AttributeTypeAndValue{Type: cn, Value: asn1.RawValue{Tag: tag, Bytes: []byte(bytes)}}
	}
	both, err := asn1.Marshal(pkix.RDNSequence{{name("a"), {Type: asn1.ObjectIdentifier{2, 5, 4, 11}, Value: "b"}}})
	must(t, err)
	for what, tt := range map[string]struct {
		der  []byte
		want string
	}{
		"two names":          {subjectDER(t, name("first"), name("second")), "CN=second,CN=first"},
		"one of two":         {both, "CN=a+OU=b"},
		"special characters": {subjectDER(t, name(`a,b+c"d\e<f>g;h=i`)), `CN=a\,b\+c\"d\\e\<f\>g\;h=i`},
		"spaces":             {subjectDER(t, name(" a b ")), `CN=\ a b\ `},
		"a hash":             {subjectDER(t, name("#a#")), `CN=\#a#`},
		"a line of a head":   {subjectDER(t, name("a\r\nX-Other: b\x00\t")), `CN=a\0D\0AX-Other: b\00\09`},
		"UTF-8":              {subjectDER(t, name("Zürich")), `CN=Z\C3\BCrich`},
		"an unknown type":    {subjectDER(t, email), "1.2.840.113549.1.9.1=#0c03614062"},
		"Teletex":            {subjectDER(t, raw(asn1.TagT61String, "caf")), "CN=caf"},
		"Teletex, Latin-1":   {subjectDER(t, raw(asn1.TagT61String, "caf\xe9")), `CN=caf\C3\A9`},
		"no character":       {subjectDER(t, raw(asn1.TagBMPString, "\xd8\x00\x00a")), ""},
		"a number":           {subjectDER(t, pkix.AttributeTypeAndValue{Type: cn, Value: 1}), ""},
		"empty":              {subjectDER(t), ""},
		"long":               {subjectDER(t, name(strings.Repeat("a", maxClientSubject-3))), "CN=" + strings.Repeat("a", maxClientSubject-3)},
		"too long":           {subjectDER(t, name(strings.Repeat("a", maxClientSubject-2))), ""},
		"more behind it":     {append(subjectDER(t, name("a")), 0), ""},
		"no DER":             {[]byte("hello"), ""},
	} {
		if got := subjectText(tt.der); got != tt.want {
			t.Errorf("%s: the subject is %q, want %q", what, got, tt.want)
		}
	}
	wantEqual(t, "the subject without TLS", clientSubject(nil), "")
	wantEqual(t, "the subject without a certificate", clientSubject(&tls.ConnectionState{}), "")
}

// FuzzClientSubject: whatever the subject is, its text may be the value of a field.
func FuzzClientSubject(f *testing.F) {
	f.Add(subjectDER(f, pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "a\n"}))
	f.Add(newTestCA(f, "ca").certificate.RawSubject)
	f.Fuzz(func(t *testing.T, der []byte) {
		text := subjectText(der)
		if len(text) > maxClientSubject || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("the subject is %q", text)
		}
	})
}

// FuzzParseCertificates: what is taken has no certificate beside those that were parsed.
func FuzzParseCertificates(f *testing.F) {
	ca := newTestCA(f, "ca")
	f.Add(ca.pem)
	f.Add("a\n" + ca.pem + pemText("OTHER", nil) + ca.pem)
	f.Add(ca.pem[:100] + ca.pem)
	f.Fuzz(func(t *testing.T, content string) {
		all, err := parseCertificates(content)
		if err == nil && (len(all) == 0 || len(all) != strings.Count(content, "-----BEGIN CERTIFICATE-----")) {
			t.Errorf("%d certificates of %q", len(all), content)
		}
	})
}

// TestCertificateRun: run looks by itself.
func TestCertificateRun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		since2000 := func(c *x509.Certificate) { c.NotBefore = time.Now().AddDate(-1, 0, 0) }
		ca := newTestCA(t, "ca")
		secret := newMountedSecret(t, ca.sign(t, nil, since2000, "a.test"))
		s := newStore(t, certificateFlags{certs: []string{secret.path}})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.run(ctx) })
		secret.writePair(t, ca.sign(t, nil, since2000, "b.test"))
		time.Sleep(2*certificateInterval + certificateInterval/2)
		wantEqual(t, "the names", fmt.Sprint(s.inForceNames()), "[b.test]")
		today := s.config()
		s.clock.Add(int64(ticketTime))
		time.Sleep(2 * certificateInterval)
		if s.config() == today {
			t.Error("the keys of tickets are those of yesterday")
		}
		cancel()
		running.Wait()
	})
}

// TestCertificateMetrics: when each certificate expires is said, in the order of the flags.
func TestCertificateMetrics(t *testing.T) {
	ca := newTestCA(t, "ca")
	at := func(year int) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotAfter = time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) }
	}
	one, two := newMountedSecret(t, ca.sign(t, nil, at(2091), "a.test")), newMountedSecret(t, ca.sign(t, nil, at(2092), "b.test"))
	path := writeFile(t, filepath.Join(t.TempDir(), "ca"), ca.pem)
	s := newStore(t, certificateFlags{certs: []string{one.path, two.path}, clientCA: path})
	const expiry, rejected = "router_tls_certificate_expiry_timestamp_seconds", "router_tls_file_rejected"
	if lacks := s.metrics(t).lacks(map[string]float64{
		fmt.Sprintf("%s{certificate=%q}", expiry, one.path): float64(time.Date(2091, 1, 1, 0, 0, 0, 0, time.UTC).Unix()),
		fmt.Sprintf("%s{certificate=%q}", expiry, two.path): float64(time.Date(2092, 1, 1, 0, 0, 0, 0, time.UTC).Unix()),
		fmt.Sprintf("%s{file=%q}", rejected, one.path):      0,
		fmt.Sprintf("%s{file=%q}", rejected, path):          0,
	}); lacks != "" {
		t.Error(lacks)
	}
	var b bytes.Buffer
	s.writeMetrics(metricsWriter{w: &b})
	text := strings.NewReplacer(one.path, "/tls/one", two.path, "/tls/two", path, "/tls/ca.crt").Replace(b.String())
	golden(t, "metrics/certificates.txt", []byte(text))
	b.Reset()
	var without *certificates
	if without.writeMetrics(metricsWriter{w: &b}); b.Len() > 0 {
		t.Errorf("metrics without TLS: %s", b.String())
	}
}

// TestCertificateMetricsOfOneFile: a file that two flags have is there once, since Prometheus
// refuses all metrics if a series is there twice. It is rejected if one of them rejects it.
func TestCertificateMetricsOfOneFile(t *testing.T) {
	pair := newTestCA(t, "ca").sign(t, nil, nil, "a.test")
	dir := t.TempDir()
	cert, key := writeFile(t, filepath.Join(dir, "cert"), pair.cert), writeFile(t, filepath.Join(dir, "key"), pair.key)
	s := newStore(t, certificateFlags{certs: []string{cert}, keys: []string{key}, clientCA: cert})
	for _, rejecting := range s.files {
		for _, f := range s.files {
			f.rejected.Store(f == rejecting)
		}
		var b bytes.Buffer
		s.writeMetrics(metricsWriter{w: &b})
		if sample := fmt.Sprintf("router_tls_file_rejected{file=%q} ", cert); strings.Count(b.String(), sample) != 1 || !strings.Contains(b.String(), sample+"1\n") {
			t.Errorf("%s rejects the file, and the metrics are\n%s", rejecting.flag, b.String())
		}
	}
}
