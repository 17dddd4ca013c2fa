//go:build unix

// Package certs_test runs make.sh and looks at what it made.
package certs_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// files is what make.sh leaves in its folder, by name.
type files map[string][]byte

// run returns nil, after a word in the log, on a machine without openssl.
func run(t *testing.T, dir string, args ...string) files {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Log("nothing tested: openssl is not installed")
		return nil
	}
	out, err := exec.Command("sh", append([]string{"make.sh", "-d", dir}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("make.sh: %v\n%s", err, out)
	}
	made := files{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if made[entry.Name()], err = os.ReadFile(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return made
}

func TestFilesAndModes(t *testing.T) {
	dir := t.TempDir()
	made := run(t, dir)
	if made == nil {
		return
	}
	want := map[string]os.FileMode{"ca.crt": 0o644, "ca.key": 0o600, "tls.crt": 0o644, "tls.key": 0o600}
	for name, mode := range want {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if info.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), mode)
		}
	}
	if len(made) != len(want) {
		t.Errorf("%d files, want %d", len(made), len(want))
	}
}

// The CA is for ever; the certificate stays until it is renewed, is lost, or
// no longer belongs to its key.
func TestSecondRun(t *testing.T) {
	tests := map[string]struct {
		args   []string
		remove string
		newKey bool
	}{
		"nothing to do": {},
		"renew":         {args: []string{"renew"}, newKey: true},
		"key lost":      {remove: "tls.key", newKey: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			first := run(t, dir)
			if first == nil {
				return
			}
			if test.remove != "" {
				os.Remove(filepath.Join(dir, test.remove))
			}
			second := run(t, dir, test.args...)
			for _, name := range []string{"ca.crt", "ca.key"} {
				if !bytes.Equal(first[name], second[name]) {
					t.Errorf("%s was replaced", name)
				}
			}
			if changed := !bytes.Equal(first["tls.key"], second["tls.key"]); changed != test.newKey {
				t.Errorf("tls.key replaced: %v, want %v", changed, test.newKey)
			}
			if _, err := tls.X509KeyPair(second["tls.crt"], second["tls.key"]); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestVerifies(t *testing.T) {
	made := run(t, t.TempDir())
	if made == nil {
		return
	}
	pair, err := tls.X509KeyPair(made["tls.crt"], made["tls.key"])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(made["ca.crt"])
	for name, good := range map[string]bool{
		"mydomain.com": true, "www.mydomain.com": true, "ns-01.mydomain.com": true, "localhost": true, "127.0.0.1": true, "::1": true,
		"a.b.mydomain.com": false, "example.com": false, "127.0.0.2": false,
	} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
		if (err == nil) != good {
			t.Errorf("%s: %v, good should be %v", name, err, good)
		}
	}
	// Browsers refuse more than 398 days.
	if life := pair.Leaf.NotAfter.Sub(pair.Leaf.NotBefore); life > 398*24*time.Hour {
		t.Errorf("valid for %v", life)
	}
	if !pair.Leaf.BasicConstraintsValid || pair.Leaf.IsCA || len(pair.Leaf.SubjectKeyId) == 0 || len(pair.Leaf.AuthorityKeyId) == 0 {
		t.Error("basic constraints or key ids are missing")
	}
}
