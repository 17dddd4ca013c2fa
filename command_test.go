package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// commandOutput runs the program with args and returns its output, or its error, and its
// exit code.
func commandOutput(t *testing.T, args ...string) (string, int) {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), args, noEnvironment, &out); err != nil {
		fmt.Fprintln(&out, err)
		return out.String(), exitCode(err)
	}
	return out.String(), 0
}

func TestCommands(t *testing.T) {
	a := planAdmin(t)
	s := httptest.NewServer(a.handler())
	defer s.Close()
	admin := "-admin=" + s.URL
	folder := overridesDir(t, map[string]string{"a": "backend-2\n", "bad": "bakend-2"})
	hosts := overridesDir(t, map[string]string{"NS": "backend-2"})
	file := filepath.Join(t.TempDir(), "map.json")
	object := `{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{"a":"backend-2","late":"backend-1","x":"no"}}`
	must(t, os.WriteFile(file, []byte(object), 0o600))
	hashed := backendName("backend", bucket("free", 4))
	tests := map[string]struct {
		args []string
		code int
		want string // parts, in order
	}{
		"plan a file": {[]string{"plan", admin, file}, 0, "a     backend-0  to backend-2  3 sessions\nlate  backend-0  to backend-1  1 sessions\n" +
			"rejected: x: \"no\", expected backend-0 to backend-3, in force: hash\n4 sessions of 2 namespaces would move, in 2.0 s; 4 backends, 1 overrides rejected\n"},
		"plan a number":    {[]string{"plan", admin, "4"}, 0, "late  backend-0  to backend-1  1 sessions\n1 sessions of 1 namespaces would move, in 0.5 s; 4 backends, 0 overrides rejected\n"},
		"plan no number":   {[]string{"plan", admin, "0"}, 1, s.URL + "/plan: 400 Bad Request: replicas must be 1 to 10000 (got 0)\n"},
		"plan no file":     {[]string{"plan", admin, "/nowhere"}, 1, "open /nowhere: no such file or directory\n"},
		"plan nothing":     {[]string{"plan", admin}, 2, "one argument is required: a file, -, or a number of backends (got 0)\n"},
		"plan, bad flag":   {[]string{"plan", "-replicas", "3"}, 2, "flag provided but not defined: -replicas\n"},
		"owner":            {[]string{"owner", admin, "late"}, 0, "late  backend-1  override  127.0.0.1:1  dial tcp 127.0.0.1:1: connect: connection refused\n"},
		"owner of nothing": {[]string{"owner", admin}, 2, "at least one namespace is required\n"},
		"owner, bad name":  {[]string{"owner", admin, "a/b"}, 1, s.URL + "/owner?namespace=a%2Fb: 400 Bad Request: /owner?namespace= must be " + expectedPathNamespace("a/b") + " (got \"a/b\")\n"},
		"owner offline": {[]string{"owner", "-replicas", "4", "-overrides", folder, "a", "free", "bad"}, 0, "a     backend-2  override\nfree  " + hashed + "  hash\nbad              unresolved\n" +
			"      rejected: \"bakend-2\" in directory " + folder + ", expected backend-0 to backend-3\n"},
		"owner offline, bad name": {[]string{"owner", "-replicas", "4", ""}, 2, "the argument must be " + expectedPathNamespace("") + " (got \"\")\n"},
		"owner offline, of hosts": {[]string{"owner", "-replicas", "4", "-overrides", hosts, "-namespace-from", "host", "Ns", "free"}, 0,
			"Ns    " + backendName("backend", bucket("ns", 4)) + "  hash\n      rejected: \"backend-2\" in directory " + hosts + " NS, expected " + expectedHostNamespace("") +
				"\nfree  " + hashed + "  hash\n"},
		"owner offline, no host":    {[]string{"owner", "-replicas", "4", "-namespace-from", "host", "a.b"}, 2, "the argument must be " + expectedHostNamespace("a.b") + " (got \"a.b\")\n"},
		"owner offline, from where": {[]string{"owner", "-replicas", "4", "-namespace-from", "header", "a"}, 2, "-namespace-from must be path, host or query:NAME (got \"header\")\n"},
		"owner of two dots": {[]string{"owner", "-replicas", "1", "..foo"}, 0,
			"..foo  backend-0  hash\n       its key in a ConfigMap is _x2E.foo\n"},
		"owner of long names": {[]string{"owner", "-replicas", "1", "my room", strings.Repeat(":", 64)}, 0,
			"\"my room\"                                                         backend-0  hash\n" +
				"                                                                  its key in a ConfigMap is my_x20room\n" +
				strings.Repeat(":", 64) + "  backend-0  hash\n" +
				"                                                                  it cannot have an override: its key would have 256 characters, and at most 253 are allowed\n"},
		"owner of no backends": {[]string{"owner", "-overrides", folder, "a"}, 2, "-replicas must be 1 to 10000 (got 0)\n"},
		"owner, no folder":     {[]string{"owner", "-replicas", "1", "-overrides", "/nowhere", "a"}, 1, "-overrides: open /nowhere: no such file or directory\n"},
		"no URL":               {[]string{"owner", "-admin", ":", "a"}, 2, "-admin: parse \":/owner?namespace=a\": missing protocol scheme\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got, code := commandOutput(t, tt.args...); got != tt.want || code != tt.code {
				t.Errorf("exit code %d:\n%s\nwant %d:\n%s", code, got, tt.code, tt.want)
			}
		})
	}
	for _, name := range []string{"plan", "owner"} {
		if got, code := commandOutput(t, name, "-h"); code != 0 || !strings.HasPrefix(got, "Usage: router "+name+" [flags] ") || !strings.Contains(got, "-admin URL") {
			t.Errorf("%s -h is %d:\n%s", name, code, got)
		}
	}
}

// A proxy before the router, or something else at its port, answers with no JSON.
func TestCommandAnswersOfOthers(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		io.WriteString(w, "<html>")
	}))
	defer s.Close()
	want := s.URL + "/plan: 502 Bad Gateway: <html>\n"
	if got, code := commandOutput(t, "plan", "-admin", s.URL, "3"); got != want || code != 1 {
		t.Errorf("%d %s, want 1 %s", code, got, want)
	}
}
