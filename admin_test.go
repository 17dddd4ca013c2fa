package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

// kubeAnswers is an API server that gives the same answer to each request;
// status 0 is no answer for as long as the client waits.
func kubeAnswers(t *testing.T, status int, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status == 0 || r.URL.Query().Get("watch") != "" {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestHealthz(t *testing.T) {
	r := startRouter(t, "-backends", "127.0.0.1:1", "-kube", kubeAnswers(t, 0, ""))
	if status, body := r.get(t, "/healthz"); status != 200 || body != "ok\n" {
		t.Errorf("healthz is %d %q, want 200 ok, ready or not", status, body)
	}
	for path, want := range map[string]int{"/": 404, "/other": 404, "/healthz/": 404} {
		if status, _ := r.get(t, path); status != want {
			t.Errorf("%s is %d, want %d", path, status, want)
		}
	}
}

const (
	oneConfigMap = `{"kind":"ConfigMapList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"overwriting",` +
		`"namespace":"default","uid":"u","resourceVersion":"5"},"data":{"ns-01":"backend-0"}}]}`
	noConfigMap = `{"kind":"ConfigMapList","metadata":{"resourceVersion":"7"},"items":[]}`
	forbidden   = `{"kind":"Status","message":"configmaps is forbidden","reason":"Forbidden","code":403,"details":{"retryAfterSeconds":60}}`
)

func TestReadyz(t *testing.T) {
	gone := refusingAddr(t)
	tests := map[string]struct {
		args   []string
		status int
		want   string
	}{
		"directory":                {[]string{"-overrides", t.TempDir()}, 200, "ready"},
		"no directory":             {[]string{"-overrides", "/nowhere"}, 503, "no overrides were read yet: read the overrides: open /nowhere: no such file or directory"},
		"ConfigMap":                {[]string{"-kube", kubeAnswers(t, 200, oneConfigMap)}, 200, "ready"},
		"no ConfigMap":             {[]string{"-kube", kubeAnswers(t, 200, noConfigMap)}, 503, "no overrides were read yet: ConfigMap default/overwriting does not exist: kubectl -n default create configmap overwriting"},
		"other ConfigMap":          {[]string{"-kube", kubeAnswers(t, 200, noConfigMap), "-configmap", "o", "-kube-namespace", "n"}, 503, "no overrides were read yet: ConfigMap n/o does not exist: kubectl -n n create configmap o"},
		"forbidden":                {[]string{"-kube", kubeAnswers(t, 403, forbidden)}, 503, "no overrides were read yet: ConfigMap default/overwriting: 403 Forbidden: configmaps is forbidden"},
		"no API server":            {[]string{"-kube", "http://" + gone}, 503, "no overrides were read yet: ConfigMap default/overwriting: dial tcp " + gone + ": connect: connection refused"},
		"no answer":                {[]string{"-kube", kubeAnswers(t, 0, "")}, 503, "no overrides were read yet: ConfigMap default/overwriting was asked for"},
		"no ConfigMap, but a copy": {[]string{"-kube", kubeAnswers(t, 200, noConfigMap), "-overrides", t.TempDir()}, 200, "ready"},
		"nothing, and no copy":     {[]string{"-kube", kubeAnswers(t, 0, ""), "-overrides", "/nowhere"}, 503, "no overrides were read yet: ConfigMap default/overwriting was asked for"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRouter(t, append(tt.args, "-backends", "127.0.0.1:1")...)
			waitBody(t, r, "/readyz", tt.status, tt.want+"\n")
		})
	}
}

// waitBody asks until the answer is the one that is wanted.
func waitBody(t *testing.T, r *runningRouter, path string, wantStatus int, want string) {
	t.Helper()
	for end := time.Now().Add(patience); ; <-time.After(10 * time.Millisecond) {
		status, body := r.get(t, path)
		if status == wantStatus && body == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is %d %q, want %d %q", path, status, body, wantStatus, want)
		}
	}
}

// adminOf is the admin of a proxy to the backends at addrs, which serves no
// clients. update puts entries in force.
func adminOf(t *testing.T, addrs ...string) (a *admin, update func(...entries)) {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	b := fixedBackends("backend", addrs)
	router := &router{statefulSet: "backend", backends: b.given, log: quiet, swapped: func() {}}
	p := &proxy{router: router, backends: b, relay: newRelay(b.name, quiet), moves: &mover{}, log: quiet}
	return &admin{proxy: p, gate: wideGate(t), missing: func() string { return "they are late" },
		dropped: func() int64 { return 0 }, started: time.Now()}, router.update
}

// answered is the admin's answer to GET path.
func answered(a *admin, path string) *http.Response {
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w.Result()
}

func TestReadyzWhileDraining(t *testing.T) {
	a, update := adminOf(t, "127.0.0.1:1")
	wantReadyz := func(status int, want string) {
		t.Helper()
		resp := answered(a, "/readyz")
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != status || string(body) != want {
			t.Errorf("readyz is %s %q, want %d %q", resp.Status, body, status, want)
		}
	}
	wantReadyz(503, "no overrides were read yet: they are late\n")
	a.draining.Store(true)
	wantReadyz(503, "the router stops\nno overrides were read yet: they are late\n")
	update(entries{})
	wantReadyz(503, "the router stops\n")
	a.draining.Store(false)
	wantReadyz(200, "ready\n")
}

func TestOwnerAnswers(t *testing.T) {
	up := listenLocal(t)
	gone := refusingAddr(t)
	a, update := adminOf(t, up.Addr().String(), gone)
	update(entries{version: "40", data: pack(map[string]string{"kept": "backend-0"})})
	update(entries{version: "41", data: pack(map[string]string{
		"first": "backend-0", "down": "backend-1", "kept": "bakend-0",
	})})
	// Only a first table refuses: it does not know where the namespace was.
	b, updateFirst := adminOf(t, up.Addr().String(), gone)
	updateFirst(entries{version: "1", data: pack(map[string]string{"refused": "backend-9"})})
	hashed, dots := hashedTo(t, "free", 0, 2), hashedTo(t, "..free", 0, 2)
	address, stamp := up.Addr().String(), a.proxy.router.table().stamp
	tests := map[string]struct {
		admin     *admin
		namespace string
		status    int
		want      string
	}{
		"override": {a, "first", 200, `{"namespace":"first","owner":"backend-0","why":"override","address":"` + address + `","ready":true,"table":"41","stamp":"` + stamp + `"}`},
		"hash":     {a, hashed, 200, `{"namespace":"` + hashed + `","owner":"backend-0","why":"hash","address":"` + address + `","ready":true,"table":"41","stamp":"` + stamp + `"}`},
		"down": {a, "down", 200, `{"namespace":"down","owner":"backend-1","why":"override","address":"` + gone +
			`","ready":false,"error":"dial tcp ` + gone + `: connect: connection refused","table":"41","stamp":"` + stamp + `"}`},
		"kept": {a, "kept", 200, `{"namespace":"kept","owner":"backend-0","why":"kept","address":"` + address +
			`","ready":true,"table":"41","stamp":"` + stamp + `","rejected":[{"source":"","value":"bakend-0","want":"backend-0 to backend-1","kept":"backend-0"}]}`},
		"refused": {b, "refused", 200, `{"namespace":"refused","why":"refused","ready":false,"table":"1","stamp":"` + b.proxy.router.table().stamp + `","rejected":[{"source":"","value":"backend-9","want":"backend-0 to backend-1","kept":"refused"}]}`},
		"two dots": {a, dots, 200, `{"namespace":"` + dots + `","owner":"backend-0","why":"hash","address":"` + address +
			`","ready":true,"note":"it can have no override: no key of a ConfigMap begins with two dots","table":"41","stamp":"` + stamp + `"}`},
		"bad namespace": {a, "a/b", 400, `{"error":"/owner?namespace= is \"a/b\", want ` + jsonText(t, namespaceFault("a/b")) + `"}`},
		"no namespace":  {a, "", 400, `{"error":"/owner?namespace= is \"\", want ` + jsonText(t, namespaceFault("")) + `"}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			wantOwner(t, tt.admin, tt.namespace, tt.status, tt.want)
		})
	}
	conflict, update := adminOf(t, address, refusingAddr(t))
	update(entries{source: "a", version: "1", data: pack(map[string]string{"both": "backend-0"})})
	update(entries{source: "a", version: "1", data: pack(map[string]string{"both": "backend-0"})},
		entries{source: "b", version: "2", data: pack(map[string]string{"both": "backend-1"})})
	const want = `"want":"the same backend in all objects","kept":"backend-0"}`
	wantOwner(t, conflict, "both", 200, `{"namespace":"both","owner":"backend-0","why":"conflict","address":"`+address+
		`","ready":true,"table":"`+conflict.proxy.router.table().version+`","stamp":"`+conflict.proxy.router.table().stamp+`","rejected":[{"source":"a","value":"backend-0",`+want+
		`,{"source":"b","value":"backend-1",`+want+`]}`)
	c, _ := adminOf(t, up.Addr().String())
	wantOwner(t, c, "ns-01", 503, `{"error":"no overrides were read yet: they are late"}`)
}

// wantOwner checks the answer of /owner.
func wantOwner(t *testing.T, a *admin, namespace string, status int, want string) {
	t.Helper()
	resp := answered(a, "/owner?"+url.Values{"namespace": {namespace}}.Encode())
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(body)); resp.StatusCode != status || got != want {
		t.Errorf("owner of %q: %s\n%s\nwant %d\n%s", namespace, resp.Status, got, status, want)
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type %q, want application/json", got)
	}
}

// jsonText is s as it stands within a JSON string.
func jsonText(t *testing.T, s string) string {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[1 : len(b)-1])
}

// hashedTo returns a namespace, the prefix and a number, that hashes to the
// backend.
func hashedTo(t *testing.T, prefix string, backend, backends int) string {
	t.Helper()
	for i := range 1000 {
		if namespace := fmt.Sprint(prefix, "-", i); bucket(namespace, backends) == backend {
			return namespace
		}
	}
	t.Fatalf("no namespace hashes to %d", backend)
	return ""
}

func TestOwnerShowsWhatIsRejected(t *testing.T) {
	up := listenLocal(t)
	a, update := adminOf(t, up.Addr().String())
	update(entries{version: "1"})
	update(entries{version: "2", data: pack(map[string]string{"ns-01": "\"<\xff>\"" + strings.Repeat("é", 1<<19)})})
	resp := answered(a, "/owner?namespace=ns-01")
	var got ownership
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Why != whyKept || got.Owner != "backend-0" || len(got.Rejected) != 1 || got.Rejected[0].Kept != whyHash {
		t.Fatalf("%+v, want kept where the hash has it", got)
	}
	if shown := got.Rejected[0].Value; !strings.HasPrefix(shown, "\"<�>\"éé") || !strings.HasSuffix(shown, "…") || len(shown) > 100 {
		t.Errorf("the value is shown as %q", shown)
	}
}
