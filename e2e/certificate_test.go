package e2e

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const tlsSecret = "nginx-tls"

// TestCertificate replaces the certificate in the Secret: new connections get
// it from every router's nginx when the kubelet has brought it, and sessions
// that were open before go on.
func TestCertificate(t *testing.T) {
	s := newSystem(t)
	cert, key := s.newCertificate()
	serial := serialOf(t, cert)
	var held []*follower
	for i := range 10 {
		held = append(held, s.mustFollow(fmt.Sprintf("%scertificate-%d", prefix, i)))
	}
	for _, f := range held {
		if f.session.serial == serial {
			t.Fatalf("the serial number %s is served already", serial)
		}
	}
	s.replaceSecret(map[string][]byte{"tls.crt": cert, "tls.key": key})

	replaced := time.Now()
	seen := map[string]time.Duration{} // the new certificate, by router
	routers := s.routers(t.Context())
	eventually(t, 3*time.Minute, "the new certificate from every router", func() error {
		for _, f := range held {
			if err := f.alive(); err != nil {
				t.Fatalf("a session that was open before: %v", err)
			}
		}
		pod, got, err := s.servedSerial()
		if err != nil {
			t.Fatal(err)
		}
		_, had := seen[pod]
		switch {
		case got == serial && !had:
			seen[pod] = time.Since(replaced)
			t.Logf("certificate: %s serves the new one %.0f s after the Secret was replaced", pod, seen[pod].Seconds())
		case got != serial && had:
			t.Fatalf("%s went back to the certificate with serial number %s", pod, got)
		}
		if len(seen) < len(routers) && s.front.forward == nil || len(seen) == 0 {
			return fmt.Errorf("it came from %v", seen)
		}
		return nil
	})
	s.goOn(held, 3)
}

// servedSerial opens a session and returns which router it went through and
// which certificate nginx showed.
func (s *system) servedSerial() (pod, serial string, err error) {
	session, err := s.dialer.open(s.t.Context(), prefix+"certificate")
	if err != nil {
		return "", "", err
	}
	defer session.conn.CloseNow()
	return session.first.Router, session.serial, nil
}

// newCertificate makes a certificate of the same CA, and its key.
func (s *system) newCertificate() (cert, key []byte) {
	s.t.Helper()
	dir := s.t.TempDir()
	for _, name := range []string{"ca.crt", "ca.key"} {
		data, err := os.ReadFile(filepath.Join(s.root, "certs", name))
		if err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	renew := exec.CommandContext(s.t.Context(), filepath.Join(s.root, "certs", "make.sh"), "-d", dir, "renew")
	if out, err := renew.CombinedOutput(); err != nil {
		s.t.Fatalf("certs/make.sh renew: %v\n%s", err, out)
	}
	for name, data := range map[string]*[]byte{"tls.crt": &cert, "tls.key": &key} {
		var err error
		if *data, err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			s.t.Fatal(err)
		}
	}
	return cert, key
}

// replaceSecret changes the Secret until the test ends.
func (s *system) replaceSecret(data map[string][]byte) {
	s.t.Helper()
	secrets := s.client.CoreV1().Secrets(s.namespace)
	secret, err := secrets.Get(s.t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	before := secret.DeepCopy()
	before.ResourceVersion = ""
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := secrets.Update(ctx, before, metav1.UpdateOptions{}); err != nil {
			s.t.Errorf("the Secret could not be put back: %v", err)
		}
	})
	secret.Data = data
	if _, err := secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// serialOf returns the serial number of a PEM certificate, in hexadecimal
// digits.
func serialOf(t *testing.T, cert []byte) string {
	t.Helper()
	block, _ := pem.Decode(cert)
	if block == nil {
		t.Fatalf("no PEM: %q", cert)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c.SerialNumber.Text(16)
}
