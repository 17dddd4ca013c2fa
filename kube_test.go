package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestInClusterClient(t *testing.T) {
	ca, _ := fakeKubeCA(t)
	for name, c := range map[string]struct{ host, port, ca, base, want string }{
		"IPv4":    {"10.0.0.1", "443", string(ca), "https://10.0.0.1:443", ""},
		"IPv6":    {"fd00::1", "6443", string(ca), "https://[fd00::1]:6443", ""},
		"no host": {"", "443", string(ca), "", "KUBERNETES_SERVICE_HOST"},
		"no port": {"10.0.0.1", "", string(ca), "", "KUBERNETES_SERVICE_PORT"},
		"no CA":   {"10.0.0.1", "443", "", "", "ca.crt"},
		"bad CA":  {"10.0.0.1", "443", "-----BEGIN CERTIFICATE-----\nx", "", "ca.crt has no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if c.ca != "" {
				fakeKubeFile(t, dir, "ca.crt", c.ca)
			}
			k, err := newInClusterClient(func(name string) string {
				return map[string]string{"KUBERNETES_SERVICE_HOST": c.host, "KUBERNETES_SERVICE_PORT": c.port}[name]
			}, dir)
			switch {
			case err == nil && (c.want != "" || k.base.String() != c.base):
				t.Errorf("%s, want %s %s", k.base, c.base, c.want)
			case err != nil && (c.want == "" || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestKubectlProxyClient(t *testing.T) {
	for base, want := range map[string]string{
		"http://127.0.0.1:8080":      "http://127.0.0.1:8080",
		"http://localhost:8080/":     "http://localhost:8080",
		"https://127.0.0.1:8080":     "",
		"127.0.0.1:8080":             "",
		"http://":                    "",
		"http://127.0.0.1:8080/api/": "",
		"http://[::1":                "",
		"":                           "",
	} {
		k, err := newKubectlProxyClient(base)
		if (err == nil) != (want != "") || err == nil && k.base.String() != want {
			t.Errorf("%q: %+v, error %v, want %q", base, k, err, want)
		}
	}
}

func TestPodNamespace(t *testing.T) {
	dir := t.TempDir()
	if ns, err := podNamespace(dir); err == nil {
		t.Errorf("%q without a file, want an error", ns)
	}
	fakeKubeFile(t, dir, "namespace", "edge\n")
	if ns, err := podNamespace(dir); ns != "edge" || err != nil {
		t.Errorf("%q, error %v", ns, err)
	}
}

// The token is read before every request; what cannot be a token keeps the last.
func TestWatchFault22TokenRotated(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	l, host, port := fakeKubeListen(t)
	server := newFakeKube(t, l, fakeKubeScript{fakeKubeList("1")}, nil, certificate)
	k := fakeKubePod(t, host, port, ca)
	for _, step := range []struct{ name, file, want string }{
		{"trimmed", " first \r\n", "first"},
		{"replaced", "second", "second"},
		{"emptied", "", "second"},
		{"blank", " \n", "second"},
		{"missing", "-", "second"},
		{"back", "third\n", "third"},
	} {
		fakeKubeFile(t, k.accountDir, "token", step.file)
		if step.file == "-" {
			os.Remove(filepath.Join(k.accountDir, "token"))
		}
		if err := fakeKubeGet(t, k); err != nil {
			t.Fatal(err)
		}
		r := server.request(t)
		if got := r.Header["Authorization"]; !slices.Equal(got, []string{"Bearer " + step.want}) {
			t.Errorf("%s: Authorization: %q, want Bearer %s", step.name, got, step.want)
		}
		if r.Proto != "HTTP/2.0" || !strings.HasPrefix(r.UserAgent(), "wsrouter/") {
			t.Errorf("%s from %s, want HTTP/2.0 from wsrouter/", r.Proto, r.UserAgent())
		}
	}
}

func TestWatchFault18Unauthorized(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	for name, c := range map[string]struct {
		meanwhile string // the token that is written while the request is under way
		accepted  string
		sent      []string
		ok        bool
	}{
		"token as before":         {"first\n", "second", []string{"Bearer first"}, false},
		"token changed":           {"second", "second", []string{"Bearer first", "Bearer second"}, true},
		"token changed, no good":  {"third", "second", []string{"Bearer first", "Bearer third"}, false},
		"token emptied meanwhile": {"", "second", []string{"Bearer first"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			l, host, port := fakeKubeListen(t)
			k := fakeKubePod(t, host, port, ca)
			server := newFakeKube(t, l, fakeKubeScript{func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") == "Bearer "+c.accepted {
					fakeKubeList("1")(w, r)
					return
				}
				fakeKubeFile(t, k.accountDir, "token", c.meanwhile)
				fakeKubeSay(401, `{"kind":"Status","message":"Unauthorized","reason":"Unauthorized","code":401}`)(w, r)
			}}, nil, certificate)
			err := fakeKubeGet(t, k)
			if statusErr, _ := err.(*statusError); (err == nil) != c.ok || err != nil && statusErr.Code != 401 {
				t.Errorf("error %v, want none: %t", err, c.ok)
			}
			var sent []string
			for range c.sent {
				sent = append(sent, server.request(t).Header.Get("Authorization"))
			}
			if len(server.arrived) > 0 || !slices.Equal(sent, c.sent) {
				t.Errorf("sent %q and %d more, want %q", sent, len(server.arrived), c.sent)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
		after  time.Duration
	}{
		"403":               {fakeKubeSay(403, `{"message":"configmaps \"routes\" is forbidden","reason":"Forbidden","code":403}`), `403 Forbidden: configmaps "routes" is forbidden`, 0},
		"404 in text":       {fakeKubeSay(404, "404 page not found\n", "Content-Type", "text/plain"), "404 Not Found: 404 page not found", 0},
		"410":               {fakeKubeSay(410, `{"message":"too old","reason":"Expired"}`), "410 Expired: too old", 0},
		"410 alone":         {fakeKubeSay(410, ""), "410 Gone: ", 0},
		"429 in text":       {fakeKubeSay(429, "Too many requests", "Content-Type", "text/plain", "Retry-After", "4"), "429 Too Many Requests: Too many requests", 4 * time.Second},
		"503":               {fakeKubeSay(503, "", "Retry-After", "1"), "503 Service Unavailable: ", time.Second},
		"504 with details":  {fakeKubeSay(504, `{"message":"Timeout","reason":"Timeout","details":{"retryAfterSeconds":7}}`, "Retry-After", "1"), "504 Timeout: Timeout", 7 * time.Second},
		"an hour":           {fakeKubeSay(503, "", "Retry-After", "3600"), "503 Service Unavailable: ", time.Minute},
		"odd Retry-After":   {fakeKubeSay(503, "", "Retry-After", "soon"), "503 Service Unavailable: ", 0},
		"long text":         {fakeKubeSay(500, strings.Repeat("x", 1<<20)), "500 Internal Server Error: " + strings.Repeat("x", 200), 0},
		"a wrong code":      {fakeKubeSay(500, `{"message":"no","code":200}`), "500 Internal Server Error: no", 0},
		"JSON of something": {fakeKubeSay(500, `[1]`), "500 Internal Server Error: [1]", 0},
		"a redirect":        {fakeKubeSay(302, "", "Location", "/elsewhere"), "302 Found: ", 0},
		"created":           {fakeKubeSay(201, "{}"), "201 Created: {}", 0},
		"no content":        {fakeKubeSay(204, ""), "204 No Content: ", 0},
	} {
		t.Run(name, func(t *testing.T) {
			l, host, port := fakeKubeListen(t)
			server := newFakeKube(t, l, fakeKubeScript{c.answer}, nil)
			k, err := newKubectlProxyClient("http://" + net.JoinHostPort(host, port))
			if err != nil {
				t.Fatal(err)
			}
			err = fakeKubeGet(t, k)
			statusErr, ok := err.(*statusError)
			if !ok || statusErr.Error() != c.want || retryAfter(err) != c.after {
				t.Errorf("%T %v, want %s and a wait of %s", err, err, c.want, c.after)
			}
			r := server.request(t)
			if len(server.arrived) > 0 || r.Header["Authorization"] != nil {
				t.Errorf("%d more requests, Authorization %q, want none", len(server.arrived), r.Header["Authorization"])
			}
		})
	}
}

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
		fakeKubeFile(t, k.accountDir, "ca.crt", step.file)
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
				return dialAPIServer(ctx, network, l.Addr().String())
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
			return dialAPIServer(ctx, network, l.Addr().String())
		}
		if err := fakeKubeGet(t, k); err != nil {
			t.Fatal(err)
		}
		if r := server.request(t); dialled != want || r.Host != want || k.newTransport().Proxy != nil {
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
	k, err := newKubectlProxyClient("http://" + net.JoinHostPort(host, port))
	if err != nil {
		t.Fatal(err)
	}
	c := fakeKubeFollow(t, k)
	c.want(t, fakeKube1, fakeKube3)
	if verbs := server.verbs(); !strings.HasPrefix(verbs, "LIST WATCH LIST") {
		t.Errorf("asked %s", verbs)
	}
}
