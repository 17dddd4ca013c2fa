package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"testing"
)

// A changed CA file counts at the next request, a bad one does not, and a server
// that the CA did not sign is never spoken to.
func TestWatchFault23CARotated(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	other, _ := fakeKubeCA(t)
	l, host, port := fakeKubeListen(t)
	server := newFakeKube(t, l, fakeKubeScript{fakeKubeList("1")}, nil, certificate)
	k := fakeKubePod(t, host, port, other)
	for _, step := range []struct {
		name, file string
		ok         bool
	}{
		{"another CA", string(other), false},
		{"the right CA", string(ca), true},
		{"unchanged", string(ca), true},
		{"garbage", "x", true},
		{"empty", "", true},
		{"old and new", string(other) + string(ca), true},
		{"another CA again", string(other), false},
	} {
		fakeKubeFile(t, k.dir, "ca.crt", step.file)
		err := fakeKubeGet(t, k)
		if (err == nil) != step.ok || err != nil && !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("%s: error %v, want none: %t", step.name, err, step.ok)
		}
		if n := len(server.verbs()) / len("LIST"); (n == 1) != step.ok {
			t.Errorf("%s: the server saw %d requests", step.name, n)
		}
	}
}

// The certificate must be for the host, and TLS 1.2 at least.
func TestWatchFault24Certificate(t *testing.T) {
	now, certificate := fakeKubeCA(t)
	later, young := fakeKubeCASince(t, 2090)
	ca := append(now, later...)
	for name, c := range map[string]struct {
		host   string
		config *tls.Config
		want   string
	}{
		"not yet valid":       {"127.0.0.1", &tls.Config{Certificates: []tls.Certificate{young}}, "is before 2090-01-01"},
		"another host":        {"10.9.8.7", &tls.Config{}, "not 10.9.8.7"},
		"TLS 1.1":             {"127.0.0.1", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, "protocol version"},
		"no TLS":              {"127.0.0.1", nil, "does not look like a TLS handshake"},
		"HTTP/1.1 is allowed": {"127.0.0.1", &tls.Config{NextProtos: []string{"http/1.1"}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			l, _, port := fakeKubeListen(t)
			if c.config != nil {
				if c.config.Certificates == nil {
					c.config.Certificates = []tls.Certificate{certificate}
				}
				l = tls.NewListener(l, c.config)
			}
			newFakeKube(t, l, fakeKubeScript{fakeKubeList("1")}, nil)
			k := fakeKubePod(t, c.host, port, ca)
			k.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dialTCP(ctx, network, l.Addr().String())
			}
			err := fakeKubeGet(t, k)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if class := errorClass(err); class != map[bool]string{true: "none", false: "tls"}[err == nil] {
				t.Errorf("class %s of %v", class, err)
			}
		})
	}
}

// What is dialled and asked for is the API server, also with an IPv6 address,
// and with a proxy in the environment.
func TestWatchFault44HostAndProxy(t *testing.T) {
	ca, certificate := fakeKubeCA(t, "fd00::1", "kubernetes.example")
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:9")
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:9")
	l, _, _ := fakeKubeListen(t)
	server := newFakeKube(t, l, fakeKubeScript{fakeKubeList("1")}, nil, certificate)
	for host, want := range map[string]string{"fd00::1": "[fd00::1]:6443", "kubernetes.example": "kubernetes.example:6443"} {
		k := fakeKubePod(t, host, "6443", ca)
		dialled := ""
		k.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled = addr
			return dialTCP(ctx, network, l.Addr().String())
		}
		if err := fakeKubeGet(t, k); err != nil {
			t.Fatal(err)
		}
		if r := server.request(t); dialled != want || r.Host != want || k.connect().Proxy != nil {
			t.Errorf("dialled %s for %s, want %s", dialled, r.Host, want)
		}
	}
}

// The whole over a real socket: a reset in the middle of an event, the token
// refused and replaced, and nothing secret in the log.
func TestWatchOverTLS(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	l, host, port := fakeKubeListen(t)
	big := strings.Replace(fakeKubeEvent("MODIFIED", fakeKubeV(2)), "backend-2", strings.Repeat("x", 1<<20), 1)
	half := func(w http.ResponseWriter, r *http.Request) {
		fakeKubeStream(big[:1<<19])(w, r)
		panic(http.ErrAbortHandler)
	}
	lists := append(fakeKubeLists(1), fakeKubeSay(401, `{"message":"Unauthorized"}`), fakeKubeLists(2)[1])
	server := newFakeKube(t, l, lists, fakeKubeScript{half, fakeKubeOpen(fakeKubeEvent("MODIFIED", fakeKubeV(3)))}, certificate)
	c := fakeKubeFollow(t, fakeKubePod(t, host, port, ca))
	c.want(t, fakeKube1, fakeKube2, fakeKube3)
	if verbs := server.verbs(); verbs != "LIST WATCH LIST LIST WATCH" {
		t.Errorf("asked %s", verbs)
	}
	if log := c.logged.String(); strings.Contains(log, "first") || strings.Contains(log, "Bearer") || strings.Count(log, "\n") != 2 {
		t.Errorf("log, want two failures and no token:\n%s", log)
	}
}

func TestWatchFault33ResetWithinAnEvent(t *testing.T) {
	l, host, port := fakeKubeListen(t)
	reset := func(w http.ResponseWriter, r *http.Request) {
		event := fakeKubeEvent("MODIFIED", fakeKubeV(2))
		fakeKubeStream(event[:len(event)-5])(w, r)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	server := newFakeKube(t, l, append(fakeKubeLists(1), fakeKubeList("103", fakeKubeV(3))), fakeKubeScript{reset, fakeKubeOpen()})
	k, err := throughProxy("http://" + net.JoinHostPort(host, port))
	if err != nil {
		t.Fatal(err)
	}
	c := fakeKubeFollow(t, k)
	c.want(t, fakeKube1, fakeKube3)
	if verbs := server.verbs(); !strings.HasPrefix(verbs, "LIST WATCH LIST") {
		t.Errorf("asked %s", verbs)
	}
}
