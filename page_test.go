package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// The page is there, and nothing else is at "/": neither another path nor a change.
func TestPage(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	resp := answered(a, "/?x=1")
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("GET / is %s, %v", resp.Status, resp.Header)
	}
	policy := resp.Header.Get("Content-Security-Policy")
	for _, want := range []string{
		"default-src 'none'", "connect-src 'self'", "form-action 'none'", "frame-ancestors 'none'",
		"base-uri 'none'", "require-trusted-types-for 'script'",
	} {
		if !strings.Contains(policy, want) {
			t.Errorf("the policy %q does not have %q", policy, want)
		}
	}
	if strings.Contains(policy, "unsafe") {
		t.Errorf("the policy is %q", policy)
	}
	for _, name := range []string{"Access-Control-Allow-Origin", "Set-Cookie"} {
		if resp.Header.Get(name) != "" {
			t.Errorf("%s is %q", name, resp.Header.Get(name))
		}
	}
	if resp := answered(a, "/page"); resp.StatusCode != http.StatusNotFound {
		t.Errorf("GET /page is %s", resp.Status)
	}
}

// The policy's hashes allow one script and one style. The page has no attribute that a
// browser would run or load, and makes no HTML of text.
func TestPageIsOneFile(t *testing.T) {
	for _, name := range []string{"script", "style"} {
		if n := strings.Count(pageHTML, "<"+name); n != 1 {
			t.Errorf("%d elements %s, want 1", n, name)
		}
		if _, text, _ := strings.Cut(pageHTML, "<"+name+">"); len(text) < 1000 {
			t.Errorf("no element %s without attributes", name)
		}
	}
	for _, bad := range []string{
		`(?i)\s(style|on[a-z]+)\s*=\s*["']`, `(src|action|srcset)=`, `href="(?:https?:|/)`, `innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function`,
		`url\(`, `@import`,
	} {
		if found := regexp.MustCompile(bad).FindString(pageHTML); found != "" {
			t.Errorf("the page has %q", found)
		}
	}
	if hash := elementHash("<style>a</style>", "style"); hash != "'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" {
		t.Errorf("the hash of a is %s", hash) // printf a | openssl dgst -sha256 -binary | base64
	}
}

// A name of another site must not lead to a port that a browser reaches at a loopback
// address. All other ways to it stay open.
func TestPageIsNotRebound(t *testing.T) {
	for _, c := range []struct {
		local, host string
		want        bool
	}{
		{"127.0.0.1", "evil.example:8001", true},
		{"127.0.0.1", "evil.example", true},
		{"::1", "evil.example:8001", true},
		{"127.0.0.1", "localhost.evil.example:8001", true},
		{"127.0.0.1", "127.0.0.1.evil.example:8001", true},
		{"127.0.0.1", "evil:1:2", true},
		{"127.0.0.1", "127.0.0.1:8001", false},
		{"127.0.0.1", "localhost:8001", false},
		{"127.0.0.1", "LOCALHOST", false},
		{"127.0.0.1", "10.0.0.7:8001", false},
		{"::1", "[::1]:8001", false},
		{"::1", "[::1]", false},
		{"127.0.0.1", "", false},
		{"10.0.0.7", "router.example", false},
	} {
		r := httptest.NewRequest("GET", "/status", nil)
		r.Host = c.host
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.ParseIP(c.local)}))
		if got := isRebound(r); got != c.want {
			t.Errorf("host %q at %s: rebound is %v, want %v", c.host, c.local, got, c.want)
		}
	}
	a, _ := adminOf(t, "127.0.0.1:1")
	server := httptest.NewServer(a.handler())
	t.Cleanup(server.Close)
	for host, want := range map[string]int{"evil.example": http.StatusForbidden, "localhost": http.StatusOK} {
		for _, path := range []string{"/", "/status", "/metrics", "/healthz"} {
			if path == "/healthz" { // that of a probe may be any
				want = http.StatusOK
			}
			r, err := http.NewRequest("GET", server.URL+path, nil)
			must(t, err)
			r.Host = host
			resp, err := server.Client().Do(r)
			must(t, err)
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("GET %s of %s is %s, want %d", path, host, resp.Status, want)
			}
		}
	}
}
