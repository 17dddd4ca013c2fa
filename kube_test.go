package main

import (
	"context"
	"crypto/tls"
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

func TestInClusterClient(t *testing.T) {
	ca, _ := makeCA(t)
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
				writeAccountFile(t, dir, "ca.crt", c.ca)
			}
			k, err := newInClusterClient(environment(map[string]string{"KUBERNETES_SERVICE_HOST": c.host, "KUBERNETES_SERVICE_PORT": c.port}), dir)
			if !hasError(err, c.want) || err == nil && k.base.String() != c.base {
				t.Errorf("%+v, error %v; want %s, error %q", k, err, c.base, c.want)
			}
		})
	}
}

// hasError reports whether the text is in err, or err is nil and the text is empty.
func hasError(err error, text string) bool {
	return (err == nil) == (text == "") && (err == nil || strings.Contains(err.Error(), text))
}

// getMaps requests the ConfigMaps and returns the error.
func getMaps(t *testing.T, k *kubeClient) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context()) // which ends the connection
	defer cancel()
	body, err := k.do(ctx, "/api/v1/namespaces/edge/configmaps", url.Values{"fieldSelector": {"metadata.name=routes"}}, nil)
	if err == nil {
		body.Close()
	}
	return err
}

// tlsKube serves f with TLS on a real socket, and returns a client of it as in a pod.
func tlsKube(t *testing.T, f *fakeKube) *kubeClient {
	t.Helper()
	ca, certificate := makeCA(t)
	l, host, port := listenHostPort(t)
	f.serve(t, l, certificate)
	return podClient(t, host, port, ca)
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
	if ns, err := podKubeNamespace(dir); err == nil {
		t.Errorf("%q without a file, want an error", ns)
	}
	writeAccountFile(t, dir, "namespace", "edge\n")
	if ns, err := podKubeNamespace(dir); ns != "edge" || err != nil {
		t.Errorf("%q, error %v", ns, err)
	}
}

// The token is read before every request. The last token stays if the file has none.
func TestKubeTokenRotated(t *testing.T) {
	server := scriptedKube(script{mapList("1")}, nil)
	k := tlsKube(t, server)
	for _, step := range []struct{ name, file, want string }{
		{"trimmed", " first \r\n", "first"},
		{"replaced", "second", "second"},
		{"emptied", "", "second"},
		{"blank", " \n", "second"},
		{"missing", "-", "second"},
		{"back", "third\n", "third"},
	} {
		writeAccountFile(t, k.accountDir, "token", step.file)
		if step.file == "-" {
			os.Remove(filepath.Join(k.accountDir, "token"))
		}
		must(t, getMaps(t, k))
		r := server.request(t)
		if got := r.Header["Authorization"]; !slices.Equal(got, []string{"Bearer " + step.want}) {
			t.Errorf("%s: Authorization: %q, want Bearer %s", step.name, got, step.want)
		}
		if r.Proto != "HTTP/2.0" || !strings.HasPrefix(r.UserAgent(), "router/") {
			t.Errorf("%s from %s, want HTTP/2.0 from router/", r.Proto, r.UserAgent())
		}
	}
}

// A request that is answered 401 is sent again if there is another token since.
func TestKubeUnauthorizedTriesANewToken(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile string // the token that is written while the request is under way
		sent      string // tokens; "second" is accepted
		ok        bool
	}{
		"token as before":         {"first\n", "first", false},
		"token changed":           {"second", "first second", true},
		"token changed, no good":  {"third", "first third", false},
		"token emptied meanwhile": {"", "first", false},
	} {
		t.Run(name, func(t *testing.T) {
			var k *kubeClient
			server := scriptedKube(script{func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") == "Bearer second" {
					mapList("1")(w, r)
					return
				}
				writeAccountFile(t, k.accountDir, "token", c.meanwhile)
				statusAnswer(401, "Unauthorized", "Unauthorized")(w, r)
			}}, nil)
			k = tlsKube(t, server)
			if err := getMaps(t, k); (err == nil) != c.ok || err != nil && !hasStatus(err, 401) {
				t.Errorf("error %v, want none: %t", err, c.ok)
			}
			var sent []string
			for len(server.arrived) > 0 {
				sent = append(sent, strings.TrimPrefix(server.request(t).Header.Get("Authorization"), "Bearer "))
			}
			wantEqual(t, "tokens sent", strings.Join(sent, " "), c.sent)
		})
	}
}

func TestKubeStatusErrors(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
		after  time.Duration
	}{
		"403":               {respond(403, `{"message":"configmaps \"routes\" is forbidden","reason":"Forbidden","code":403}`), `403 Forbidden: configmaps "routes" is forbidden`, 0},
		"404 in text":       {respond(404, "404 page not found\n", "Content-Type", "text/plain"), "404 Not Found: 404 page not found", 0},
		"410":               {respond(410, `{"message":"too old","reason":"Expired"}`), "410 Expired: too old", 0},
		"410 alone":         {respond(410, ""), "410 Gone: ", 0},
		"429 in text":       {respond(429, "Too many requests", "Content-Type", "text/plain", "Retry-After", "4"), "429 Too Many Requests: Too many requests", 4 * time.Second},
		"503":               {respond(503, "", "Retry-After", "1"), "503 Service Unavailable: ", time.Second},
		"504 with details":  {respond(504, `{"message":"Timeout","reason":"Timeout","details":{"retryAfterSeconds":7}}`, "Retry-After", "1"), "504 Timeout: Timeout", 7 * time.Second},
		"an hour":           {respond(503, "", "Retry-After", "3600"), "503 Service Unavailable: ", time.Minute},
		"odd Retry-After":   {respond(503, "", "Retry-After", "soon"), "503 Service Unavailable: ", 0},
		"long text":         {respond(500, strings.Repeat("x", 1<<20)), "500 Internal Server Error: " + strings.Repeat("x", 200), 0},
		"a wrong code":      {respond(500, `{"message":"no","code":200}`), "500 Internal Server Error: no", 0},
		"JSON of something": {respond(500, `[1]`), "500 Internal Server Error: [1]", 0},
		"a redirect":        {respond(302, "", "Location", "/elsewhere"), "302 Found: ", 0},
		"created":           {respond(201, "{}"), "201 Created: {}", 0},
		"no content":        {respond(204, ""), "204 No Content: ", 0},
	} {
		t.Run(name, func(t *testing.T) {
			server := scriptedKube(script{c.answer}, nil)
			err := getMaps(t, proxyClient(t, server.url(t)))
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

// A changed CA file counts at the next request, a bad one does not, and a server that
// the CA did not sign gets no request.
func TestKubeCARotated(t *testing.T) {
	server := scriptedKube(script{mapList("1")}, nil)
	k := tlsKube(t, server)
	right, err := os.ReadFile(filepath.Join(k.accountDir, "ca.crt"))
	must(t, err)
	other, _ := makeCA(t)
	for _, step := range []struct {
		name, file string
		ok         bool
	}{
		{"another CA", string(other), false},
		{"the right CA", string(right), true},
		{"unchanged", string(right), true},
		{"garbage", "x", true},
		{"empty", "", true},
		{"old and new", string(other) + string(right), true},
		{"another CA again", string(other), false},
	} {
		writeAccountFile(t, k.accountDir, "ca.crt", step.file)
		err := getMaps(t, k)
		if (err == nil) != step.ok || err != nil && !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("%s: error %v, want none: %t", step.name, err, step.ok)
		}
		if verbs := server.verbs(); (verbs == "LIST") != step.ok {
			t.Errorf("%s: the server saw %q", step.name, verbs)
		}
	}
}

// The certificate must be for the host, and TLS 1.2 at least.
func TestKubeChecksTheCertificate(t *testing.T) {
	now, certificate := makeCA(t)
	later, young := makeCASince(t, 2090)
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
			l, _, port := listenHostPort(t)
			if c.config != nil {
				if c.config.Certificates == nil {
					c.config.Certificates = []tls.Certificate{certificate}
				}
				l = tls.NewListener(l, c.config)
			}
			scriptedKube(script{mapList("1")}, nil).serve(t, l)
			k := podClient(t, c.host, port, append(now, later...))
			k.dial = dialInstead(l)
			err := getMaps(t, k)
			if class := errorClass(err); !hasError(err, c.want) || class != map[bool]string{true: "none", false: "tls"}[err == nil] {
				t.Errorf("error %v of class %s, want %q", err, class, c.want)
			}
		})
	}
}

// dialInstead returns a dial function that connects to l, whatever the address.
func dialInstead(l net.Listener) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialAPIServer(ctx, network, l.Addr().String())
	}
}

// The client connects to the API server and asks for it, also with an IPv6 address, and
// with a proxy in the environment.
func TestKubeIgnoresTheProxy(t *testing.T) {
	ca, certificate := makeCA(t, "fd00::1", "kubernetes.example")
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:9")
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:9")
	l := listenLocal(t)
	server := scriptedKube(script{mapList("1")}, nil).serve(t, l, certificate)
	for host, want := range map[string]string{"fd00::1": "[fd00::1]:6443", "kubernetes.example": "kubernetes.example:6443"} {
		k := podClient(t, host, "6443", ca)
		dialled := ""
		k.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled = addr
			return dialInstead(l)(ctx, network, addr)
		}
		must(t, getMaps(t, k))
		if r := server.request(t); dialled != want || r.Host != want || k.newTransport().Proxy != nil {
			t.Errorf("dialled %s for %s, want %s", dialled, r.Host, want)
		}
	}
}

// The whole over a real socket: a cut in the middle of an event, a token that is refused
// and replaced, and nothing secret in the log.
func TestWatchOverTLS(t *testing.T) {
	half := strings.Replace(watchEvent("MODIFIED", routesV(2)), "backend-2", strings.Repeat("x", 1<<20), 1)[:1<<19]
	lists := append(listsTo(1), statusAnswer(401, "Unauthorized", "Unauthorized"), listsTo(2)[1])
	server := scriptedKube(lists, script{cutStream(half), openStream(watchEvent("MODIFIED", routesV(3)))})
	c := watchWith(t, tlsKube(t, server), "")
	c.want(t, applied1, applied2, applied3)
	c.server = server
	c.wantVerbs(t, "LIST WATCH LIST LIST WATCH")
	if log := c.logged.String(); strings.Contains(log, "first") || strings.Contains(log, "Bearer") || strings.Count(log, "\n") != 2 {
		t.Errorf("log, want two failures and no token:\n%s", log)
	}
}
