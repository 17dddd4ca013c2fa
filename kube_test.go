package main

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeKubeListen returns a listener on a real socket and its host and port.
func fakeKubeListen(t *testing.T) (l net.Listener, host, port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ = net.SplitHostPort(l.Addr().String())
	return l, host, port
}

// fakeKubeGet asks for the ConfigMaps and returns the error.
func fakeKubeGet(t *testing.T, k *kube) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context()) // which ends the connection
	defer cancel()
	body, err := k.ask(ctx, "/api/v1/namespaces/edge/configmaps", url.Values{"fieldSelector": {"metadata.name=routes"}}, nil)
	if err == nil {
		body.Close()
	}
	return err
}

func TestInCluster(t *testing.T) {
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
			k, err := inCluster(func(name string) string {
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

func TestThroughProxy(t *testing.T) {
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
		k, err := throughProxy(base)
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
		fakeKubeFile(t, k.dir, "token", step.file)
		if step.file == "-" {
			os.Remove(filepath.Join(k.dir, "token"))
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
				fakeKubeFile(t, k.dir, "token", c.meanwhile)
				fakeKubeSay(401, `{"kind":"Status","message":"Unauthorized","reason":"Unauthorized","code":401}`)(w, r)
			}}, nil, certificate)
			err := fakeKubeGet(t, k)
			if no, _ := err.(*status); (err == nil) != c.ok || err != nil && no.Code != 401 {
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
			k, err := throughProxy("http://" + net.JoinHostPort(host, port))
			if err != nil {
				t.Fatal(err)
			}
			err = fakeKubeGet(t, k)
			no, ok := err.(*status)
			if !ok || no.Error() != c.want || retryAfter(err) != c.after {
				t.Errorf("%T %v, want %s and a wait of %s", err, err, c.want, c.after)
			}
			r := server.request(t)
			if len(server.arrived) > 0 || r.Header["Authorization"] != nil {
				t.Errorf("%d more requests, Authorization %q, want none", len(server.arrived), r.Header["Authorization"])
			}
		})
	}
}
