//go:build unix

package nginx_test

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// authService is the service of the component auth: it knows one token, of alice.
type authService struct {
	mu   sync.Mutex
	last http.Header // of the last question; guarded by mu
}

func (a *authService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.last = r.Header.Clone()
	a.mu.Unlock()
	if cookie, err := r.Cookie("token"); err != nil || cookie.Value != "good" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	w.Header().Set("X-User", "alice")
}

// TestAuthComponent: what k8s/components/auth adds to nginx.conf holds for every path, and no
// client can say who it is, nor what it asks for.
func TestAuthComponent(t *testing.T) {
	auth := &authService{}
	server := httptest.NewServer(auth)
	defer server.Close()
	const dir = "../k8s/components/auth"
	httpConf := string(readFile(t, filepath.Join(dir, "http.conf")))
	if !strings.Contains(httpConf, "server auth:80;") {
		t.Fatal("http.conf does not name the service auth:80")
	}
	s := start(t, func(s *sidecar) {
		s.add = map[string]string{
			"http.conf":   strings.Replace(httpConf, "server auth:80;", "server "+server.Listener.Addr().String()+";", 1),
			"server.conf": string(readFile(t, filepath.Join(dir, "server.conf"))),
		}
	})
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	ask := func(path string, fields ...string) int {
		t.Helper()
		req, err := http.NewRequest(http.MethodDelete, "https://"+host+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(fields); i += 2 {
			req.Header[fields[i]] = []string{fields[i+1]} // also names that are not canonical
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for _, path := range []string{"/", "/index.html", "/healthz", "/ws/ns-01", "/plain/a", "/_auth/a"} {
		if status := ask(path); status != http.StatusUnauthorized {
			t.Errorf("%s without a token: status %d", path, status)
		}
	}
	if status := ask("/_auth", "Cookie", "token=good"); status != http.StatusNotFound {
		t.Errorf("/_auth: status %d", status)
	}
	if status := ask("/ws/ns-01", "Cookie", "token=good", "Origin", "https://evil.example"); status != http.StatusForbidden {
		t.Errorf("a page of others: status %d", status)
	}
	status := ask("/ws/ns-01?a=b", "Cookie", "token=good", "X-User", "bob", "X_User", "bob", "x_user", "bob",
		"X-Forwarded-Uri", "/public", "X-Forwarded-Method", "GET", "X-Forwarded-Host", "evil.example",
		"X-Original-URI", "/public", "X-Original-Method", "GET", "X-Forwarded-For", "192.0.2.7")
	if status != http.StatusUpgradeRequired {
		t.Errorf("with a token: status %d", status)
	}
	s.router.mu.Lock()
	got := s.router.last.Header
	s.router.mu.Unlock()
	for name, values := range got {
		if strings.EqualFold(strings.ReplaceAll(name, "_", "-"), "X-User") && (name != "X-User" || strings.Join(values, ",") != "alice") {
			t.Errorf("the router got %s: %q", name, values)
		}
	}
	auth.mu.Lock()
	asked := auth.last
	auth.mu.Unlock()
	for name, want := range map[string]string{
		"X-Original-Uri": "/ws/ns-01?a=b", "X-Forwarded-Uri": "/ws/ns-01?a=b", "X-Original-Method": http.MethodDelete,
		"X-Forwarded-Method": http.MethodDelete, "X-Forwarded-Host": host, "X-Forwarded-Proto": "https",
		"X-Forwarded-For": s.loopback, "X-User": "", "X_user": "", "X_User": "",
	} {
		if got := strings.Join(asked[name], ","); got != want {
			t.Errorf("the service got %s: %q, want %q", name, got, want)
		}
	}
	if got.Get("X-User") != "alice" {
		t.Errorf("the router got X-User: %q", got["X-User"])
	}
}
