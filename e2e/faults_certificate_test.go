//go:build controlplane

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestFaultCARotated has the API server serve a certificate of another CA.
// What is open goes on, new connections fail until the routers' file has the
// new CA beside the old one.
func TestFaultCARotated(t *testing.T) {
	r := newRig(t)
	files := r.newFiles()
	pod, g := r.behind(files)
	trial := r.try(pod)
	ca := newAuthority(t)
	serveAgain := r.serve(ca.issue(t, r.servingCertificate(), time.Now().Add(-time.Hour)))
	took := trial.followed(trial.write(), 2*time.Second)
	t.Logf("the stream that was open brought a write in %.2f s", took[0].Seconds())
	g.cut(false)
	pod.logs(t, 5*time.Second, failedWith("tls"))
	trial.stands()
	files.put("ca.crt", r.ca()+ca.pem())
	trial.recovered(22500 * time.Millisecond)

	trial = r.try(pod)
	serveAgain()
	g.cut(false)
	files.put("ca.crt", "no certificate") // the last good one counts
	trial.recovered(5 * time.Second)
}

// TestFaultClockSkew has the API server serve a certificate that is not yet
// valid. The log names both clocks.
func TestFaultClockSkew(t *testing.T) {
	r := newRig(t)
	pod, g := r.behind(r.newFiles())
	trial := r.try(pod)
	pair, err := tls.X509KeyPair([]byte(r.ca()), []byte(r.read("pki/ca.key")))
	if err != nil {
		t.Fatal(err)
	}
	ca := &authority{pair}
	notBefore := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	serveAgain := r.serve(ca.issue(t, r.servingCertificate(), notBefore))
	g.cut(false)
	pod.logs(t, 5*time.Second, failedWith("tls"))
	if pod.count("is before "+notBefore.Format(time.RFC3339)) == 0 {
		t.Error("the log does not name the clocks")
	}
	trial.stands()
	serveAgain()
	trial.recovered(22500 * time.Millisecond)
}

// authority is a CA.
type authority struct{ tls.Certificate }

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Certificate[0]}))
}

// newAuthority makes a CA.
func newAuthority(t *testing.T) *authority {
	t.Helper()
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "another CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	return &authority{certify(t, template, nil)}
}

// issue makes a certificate for the names of another.
func (a *authority) issue(t *testing.T, like *x509.Certificate, notBefore time.Time) tls.Certificate {
	t.Helper()
	return certify(t, &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: like.Subject,
		DNSNames: like.DNSNames, IPAddresses: like.IPAddresses, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   notBefore, NotAfter: notBefore.Add(24 * time.Hour)}, &a.Certificate)
}

// certify makes a key, and a certificate of it that ca signs, or the key itself
// if that is nil.
func certify(t *testing.T, template *x509.Certificate, ca *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := template, any(key)
	if ca != nil {
		signer = ca.PrivateKey
		if parent, err = x509.ParseCertificate(ca.Certificate[0]); err != nil {
			t.Fatal(err)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// servingCertificate is what the API server serves.
func (p *plane) servingCertificate() *x509.Certificate {
	p.t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", p.address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}

// serve makes the API server serve another certificate, and returns what brings
// the first one back; the end of the test does too.
func (p *plane) serve(next tls.Certificate) (again func()) {
	p.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(next.PrivateKey)
	if err != nil {
		p.t.Fatal(err)
	}
	before := p.servingCertificate()
	certificate, privateKey := p.read("pki/apiserver.crt"), p.read("pki/apiserver.key")
	again = func() { p.install(certificate, privateKey, before.Raw) }
	p.t.Cleanup(again)
	p.install(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: next.Certificate[0]})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})), next.Certificate[0])
	return again
}

// install replaces the API server's certificate and key, and waits until it
// serves them.
func (p *plane) install(certificate, privateKey string, raw []byte) {
	p.t.Helper()
	for name, content := range map[string]string{"apiserver.crt": certificate, "apiserver.key": privateKey} {
		if err := os.WriteFile(filepath.Join(p.state, "pki", name), []byte(content), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	eventually(p.t, 90*time.Second, "the API server to serve the certificate", func() error {
		if !bytes.Equal(p.servingCertificate().Raw, raw) {
			return errors.New("it serves another")
		}
		return nil
	})
}
