package e2e

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const tlsSecret = "nginx-tls"

// TestCertificate replaces the certificate in the Secret: new connections get
// it from every router's pod when the kubelet has brought it, and sessions
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
	before := held[0].session.serial
	putBack := s.replaceSecret(map[string][]byte{"tls.crt": cert, "tls.key": key})
	s.awaitCertificate(serial, held)
	s.goOn(held, 3)
	// Not later, below other tests: nginx reads the certificate and then the key,
	// and a handshake fails that gets them from two versions of the Secret.
	putBack()
	s.awaitCertificate(before, held)
}

// TestWrongPair puts a key into the Secret that is not the certificate's, nor of its
// kind, and sessions go on. With nginx no router is ready any more, and nginx says why in its
// log. A router that ends TLS itself says so too, and keeps the pair of before. All is well
// again with the right one.
func TestWrongPair(t *testing.T) {
	s := newSystem(t)
	held := []*follower{s.mustFollow(prefix + "certificate")}
	cert, _ := s.newCertificate()
	key, err := exec.CommandContext(t.Context(), "openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048").Output()
	if err != nil {
		t.Fatal(err)
	}
	since := metav1.Now()
	putBack := s.replaceSecret(map[string][]byte{"tls.crt": cert, "tls.key": key})
	if !s.hasNginx() {
		s.awaitRefused(1)
		s.wantRejection(&since)
		s.goOn(held, 3)
		s.mustFollow(prefix + "certificate-meanwhile")
		putBack()
		s.awaitRefused(0)
		s.mustFollow(prefix + "certificate-again")
		return
	}
	s.awaitNginx(false)
	for _, pod := range s.pods(t.Context(), "router") {
		log, err := s.client.CoreV1().Pods(s.namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: "nginx", SinceTime: &since}).DoRaw(t.Context())
		if err != nil || !strings.Contains(string(log), "SSL_do_handshake() failed") {
			t.Errorf("%s: nginx's log (error %v) does not tell:\n%.2000s", pod.Name, err, log)
		}
		for _, status := range pod.Status.InitContainerStatuses {
			if status.State.Running == nil {
				t.Errorf("%s, container %q does not run: %+v", pod.Name, status.Name, status.State)
			}
		}
	}
	s.goOn(held, 3)
	putBack()
	s.awaitNginx(true)
	s.mustFollow(prefix + "certificate-again")
}

// awaitRefused waits until every router refuses this many of its certificates' files.
func (s *system) awaitRefused(want float64) {
	s.t.Helper()
	for _, r := range s.routers(s.t.Context()) {
		eventually(s.t, 3*time.Minute, r.pod+" to see the pair", func() error {
			m, err := r.metrics(s.t.Context())
			if err == nil && m.sum("router_tls_file_rejected") != want {
				err = fmt.Errorf("it refuses %v files, want %v", m.sum("router_tls_file_rejected"), want)
			}
			return err
		})
	}
}

// wantRejection checks that every router is ready, and has said since then, in its log and as
// an Event on its pod, why it refuses the pair.
func (s *system) wantRejection(since *metav1.Time) {
	s.t.Helper()
	for _, r := range s.routers(s.t.Context()) {
		if _, err := r.get(s.t.Context(), "/readyz"); err != nil {
			s.t.Error(err)
		}
		log, err := s.client.CoreV1().Pods(s.namespace).GetLogs(r.pod, &corev1.PodLogOptions{Container: "router", SinceTime: since}).DoRaw(s.t.Context())
		const says = "TLS file rejected; keeping what is in force"
		if err != nil || !strings.Contains(string(log), says) {
			s.t.Errorf("%s: the log (error %v) has no %q:\n%.2000s", r.pod, err, says, log)
		}
		eventually(s.t, 20*time.Second, "the Event on "+r.pod, func() error {
			events, err := s.client.CoreV1().Events(s.namespace).List(s.t.Context(), metav1.ListOptions{
				FieldSelector: "involvedObject.kind=Pod,involvedObject.name=" + r.pod + ",reason=CertificateRejected",
			})
			if err == nil && len(events.Items) == 0 {
				err = errors.New("there is none")
			}
			if err == nil && !strings.Contains(events.Items[0].Message, "-tls-cert /tls was rejected") {
				err = fmt.Errorf("it says %q", events.Items[0].Message)
			}
			return err
		})
	}
}

// awaitNginx waits until nginx is ready in all routers' pods, or in none.
func (s *system) awaitNginx(ready bool) {
	s.t.Helper()
	eventually(s.t, 3*time.Minute, fmt.Sprintf("nginx to be ready: %t", ready), func() error {
		for _, pod := range s.pods(s.t.Context(), "router") {
			for _, status := range pod.Status.InitContainerStatuses {
				if status.Ready != ready {
					return fmt.Errorf("%s, container %q: ready is %t", pod.Name, status.Name, status.Ready)
				}
			}
		}
		return nil
	})
}

// awaitCertificate waits until every router's pod shows the certificate.
func (s *system) awaitCertificate(serial string, held []*follower) {
	s.t.Helper()
	replaced := time.Now()
	seen := map[string]time.Duration{} // by router
	routers := s.routers(s.t.Context())
	eventually(s.t, 3*time.Minute, "the certificate "+serial+" from every router", func() error {
		for _, f := range held {
			if err := f.alive(); err != nil {
				s.t.Fatalf("a session that was open before: %v", err)
			}
		}
		pod, got, err := s.servedSerial()
		if err != nil {
			return err // it was read from two versions, or the next attempt tells
		}
		_, had := seen[pod]
		switch {
		case got == serial && !had:
			seen[pod] = time.Since(replaced)
			s.t.Logf("certificate: %s serves the one that is in the Secret %.0f s after the Secret was replaced", pod, seen[pod].Seconds())
		case got != serial && had:
			s.t.Fatalf("%s went back to the certificate with serial number %s", pod, got)
		}
		if len(seen) < len(routers) && s.front.forward == nil || len(seen) == 0 {
			return fmt.Errorf("it came from %v", seen)
		}
		return nil
	})
}

// servedSerial opens a session and returns which router it went through and
// which certificate its pod showed.
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

// replaceSecret changes the Secret until putBack is called or the test ends.
func (s *system) replaceSecret(data map[string][]byte) (putBack func()) {
	s.t.Helper()
	secrets := s.client.CoreV1().Secrets(s.namespace)
	secret, err := secrets.Get(s.t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	before := secret.DeepCopy()
	before.ResourceVersion = ""
	putBack = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := secrets.Update(ctx, before, metav1.UpdateOptions{}); err != nil {
			s.t.Errorf("the Secret could not be put back: %v", err)
		}
	})
	s.t.Cleanup(putBack)
	secret.Data = data
	if _, err := secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	return putBack
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
