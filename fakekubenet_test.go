package main

import (
	"context"
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
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeKubeNet is a network of pipes with one server: for synctest, where real
// sockets would hold time up.
type fakeKubeNet struct {
	conns  chan net.Conn
	closed chan struct{}
	dials  atomic.Int32
	open   atomic.Int32
	down   atomic.Bool  // connections are refused
	hole   atomic.Bool  // and not even that
	frozen atomic.Int32 // connections up to this dial take bytes and bring none, as those to a stopped host do
}

func newFakeKubeNet() *fakeKubeNet {
	return &fakeKubeNet{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (n *fakeKubeNet) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *fakeKubeNet) Close() error   { close(n.closed); return nil }
func (n *fakeKubeNet) Addr() net.Addr { return &net.TCPAddr{} }

func (n *fakeKubeNet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	born := n.dials.Add(1)
	if n.down.Load() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	}
	if n.hole.Load() {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second): // as long as dialTCP
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	client, server := net.Pipe()
	select {
	case n.conns <- server:
		n.open.Add(1)
		return &fakeKubeConn{Conn: client, net: n, born: born}, nil
	case <-n.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// freeze stops what goes over the connections that are open.
func (n *fakeKubeNet) freeze() { n.frozen.Store(n.dials.Load()) }

// kube returns a client over HTTP/1.1.
func (n *fakeKubeNet) kube(t *testing.T) *kube {
	k, err := throughProxy("http://127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	k.dial = n.dial
	return k
}

// fakeKubeConn is the client's end of a connection.
type fakeKubeConn struct {
	net.Conn
	net  *fakeKubeNet
	born int32
	once sync.Once // for Close
}

func (c *fakeKubeConn) Close() error {
	c.once.Do(func() { c.net.open.Add(-1) })
	return c.Conn.Close()
}

func (c *fakeKubeConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || c.born > c.net.frozen.Load() {
			return n, err
		}
	}
}

func (c *fakeKubeConn) Write(b []byte) (int, error) {
	if c.born <= c.net.frozen.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// fakeKubeCA makes a CA and a server certificate for the hosts, which are
// valid in synctest's year 2000 too.
func fakeKubeCA(t *testing.T, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	return fakeKubeCASince(t, 1990, hosts...)
}

// fakeKubeCASince is not valid before the year.
func fakeKubeCASince(t *testing.T, year int, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: t.Name()},
		NotBefore: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true,
	}
	for _, host := range append(hosts, "127.0.0.1") {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// fakeKubeFile writes a file of a service account as the kubelet does: it is
// there as a whole or not at all.
func fakeKubeFile(t *testing.T, dir, name, content string) {
	t.Helper()
	next := filepath.Join(dir, "."+name)
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// fakeKubePod returns a client as in a pod, with the token "first".
func fakeKubePod(t *testing.T, host, port string, ca []byte) *kube {
	t.Helper()
	dir := t.TempDir()
	fakeKubeFile(t, dir, "ca.crt", string(ca))
	fakeKubeFile(t, dir, "token", " first\n")
	k, err := inCluster(func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}[name]
	}, dir)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
