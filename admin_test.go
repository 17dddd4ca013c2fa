package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestHealthz(t *testing.T) {
	r := startRouter(t, "-backends", "127.0.0.1:1", "-kube", kubeAnswers(t, hang))
	if status, body := r.get(t, "/healthz"); status != 200 || body != "ok\n" {
		t.Errorf("healthz is %d %q, want 200 ok, ready or not", status, body)
	}
	for path, want := range map[string]int{"/": 200, "/other": 404, "/healthz/": 404} {
		if status, _ := r.get(t, path); status != want {
			t.Errorf("%s is %d, want %d", path, status, want)
		}
	}
}

func TestReadyz(t *testing.T) {
	gone := refusingAddr(t)
	tests := map[string]struct {
		args   []string
		status int
		want   string
	}{
		"directory":                {[]string{"-overrides", t.TempDir()}, 200, "ready"},
		"no overrides at all":      {[]string{"-kube", "none"}, 200, "ready"},
		"no directory":             {[]string{"-overrides", "/nowhere"}, 503, "no overrides have been read yet: read the overrides: open /nowhere: no such file or directory"},
		"ConfigMap":                {[]string{"-kube", kubeAnswers(t, oneMap())}, 200, "ready"},
		"no ConfigMap":             {[]string{"-kube", kubeAnswers(t, listOf("ConfigMap", nil))}, 503, "no overrides have been read yet: ConfigMap default/overwriting does not exist: kubectl -n default create configmap overwriting"},
		"other ConfigMap":          {[]string{"-kube", kubeAnswers(t, listOf("ConfigMap", nil)), "-configmap", "o", "-kube-namespace", "n"}, 503, "no overrides have been read yet: ConfigMap n/o does not exist: kubectl -n n create configmap o"},
		"forbidden":                {[]string{"-kube", kubeAnswers(t, forbidden())}, 503, "no overrides have been read yet: ConfigMap default/overwriting: 403 Forbidden: configmaps is forbidden"},
		"no API server":            {[]string{"-kube", "http://" + gone}, 503, "no overrides have been read yet: ConfigMap default/overwriting: dial tcp " + gone + ": connect: connection refused"},
		"no answer":                {[]string{"-kube", kubeAnswers(t, hang)}, 503, "no overrides have been read yet: ConfigMap default/overwriting: no answer from the API server yet"},
		"no ConfigMap, but a copy": {[]string{"-kube", kubeAnswers(t, listOf("ConfigMap", nil)), "-overrides", t.TempDir()}, 200, "ready"},
		"nothing, and no copy":     {[]string{"-kube", kubeAnswers(t, hang), "-overrides", "/nowhere"}, 503, "no overrides have been read yet: ConfigMap default/overwriting: no answer from the API server yet"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRouter(t, append(tt.args, "-backends", "127.0.0.1:1")...)
			waitBody(t, r, "/readyz", tt.status, tt.want+"\n")
		})
	}
}

// However many connections others keep open, a new one gets an answer; there are
// never more than maxAdminConns.
func TestAdminMakesRoom(t *testing.T) {
	r := startRouter(t, "-backends", "127.0.0.1:1", "-overrides", t.TempDir())
	said := map[string]string{"silent": "", "within a head": "GET /healthz HTTP/1.1\r\nHost:", "idle": "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"}
	open := make(chan net.Conn, 3*100)
	for name, text := range said {
		for range 100 {
			conn, err := net.Dial("tcp", r.adminAddr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, text)
			if name == "idle" {
				mustAnswer(t, conn, http.StatusOK)
			}
			open <- conn
		}
		waitBody(t, r, "/healthz", 200, "ok\n")
	}
	close(open)
	var closed atomic.Int64
	var reading sync.WaitGroup
	for conn := range open {
		reading.Go(func() {
			conn.SetReadDeadline(time.Now().Add(2 * time.Second)) // less than the server's own bounds
			if _, err := io.Copy(io.Discard, conn); !errors.Is(err, os.ErrDeadlineExceeded) {
				closed.Add(1)
			}
		})
	}
	reading.Wait()
	if left := 300 - closed.Load(); left > maxAdminConns {
		t.Errorf("%d connections are open, want %d at most", left, maxAdminConns)
	}
}

// A connection makes no room while its answer is being sent.
func TestAdminSendsAnswersBeforeItMakesRoom(t *testing.T) {
	sending, send := make(chan struct{}, 1), make(chan struct{})
	log := slog.New(slog.DiscardHandler)
	l := newAdminListener(slowListener{listenLocal(t), sending, send}, log)
	server := new(admin).server(log)
	go server.Serve(l)
	defer server.Close()
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	first, asks := dial(), dial()
	mustWrite(t, asks, "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
	<-sending
	for range maxAdminConns - 1 {
		dial()
	}
	if _, err := first.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the oldest silent connection ends with %v, want %v", err, io.EOF)
	}
	close(send)
	mustAnswer(t, asks, http.StatusOK)
}

// slowListener accepts connections that send when the channel send is closed, and say so.
type slowListener struct {
	net.Listener
	sending chan<- struct{}
	send    <-chan struct{}
}

func (l slowListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return slowConn{conn, l}, err
}

// slowConn is a connection of a slowListener.
type slowConn struct {
	net.Conn
	listener slowListener
}

func (c slowConn) Write(b []byte) (int, error) {
	c.listener.sending <- struct{}{}
	<-c.listener.send
	return c.Conn.Write(b)
}

// A body that nobody asked for is not read.
func TestAdminTakesNoBodies(t *testing.T) {
	r := startRouter(t, "-backends", "127.0.0.1:1", "-overrides", t.TempDir())
	r.log.wait(t, "routing table updated", 1)
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/owner?namespace=ns-01", "/backends", "/plan", "/"} {
		for _, length := range []string{"Content-Length: 1073741824", "Transfer-Encoding: chunked"} {
			conn, err := net.Dial("tcp", r.adminAddr)
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, conn, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"+length+"\r\n\r\n")
			conn.SetDeadline(time.Now().Add(patience))
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || resp.StatusCode != http.StatusBadRequest || !resp.Close {
				t.Errorf("%s with %s: %+v, error %v; want 400 and Connection: close", path, length, resp, err)
			}
			conn.Close()
		}
	}
	resp, err := http.Post(r.admin+"/owner?namespace=ns-01", "application/x-www-form-urlencoded", strings.NewReader("namespace=ns-02"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST /owner is %s, want 405", resp.Status)
	}
}

// unread is a body that must not be read.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the body of a request that waits was read")
	return 0, io.EOF
}

// One preview is made at a time, a few more wait with their bodies unread, for a bounded
// time; the rest hears at once to come again. All else is answered meanwhile.
func TestPreviewsTakeTurns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a := previewAdmin(t)
		h := a.handler()
		ask := func(method, path string, body io.Reader) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, body))
			return w
		}
		wantBusy := func(w *httptest.ResponseRecorder, after, want time.Duration) {
			if w.Code != 503 || w.Header().Get("Retry-After") != "1" || w.Body.String() != `{"error":"too many requests for /plan at once"}`+"\n" || after != want {
				t.Errorf("%d %v %s after %s, want 503 after %s", w.Code, w.Header(), w.Body, after, want)
			}
		}
		begun := time.Now()
		reading, sending := io.Pipe()
		var previews sync.WaitGroup
		previews.Go(func() {
			if w := ask("POST", "/plan", reading); w.Code != 200 {
				t.Errorf("the first preview is %d %s, want 200", w.Code, w.Body)
			}
		})
		synctest.Wait()
		for range maxWaitingPreviews {
			previews.Go(func() { wantBusy(ask("POST", "/plan", unread{t}), time.Since(begun), maxQueueTime) })
		}
		synctest.Wait()
		wantBusy(ask("POST", "/plan", unread{t}), time.Since(begun), 0)
		for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 200, "/owner?namespace=a/b": 400} {
			if w := ask("GET", path, nil); w.Code != want {
				t.Errorf("%s is %d while a preview is made, want %d", path, w.Code, want)
			}
		}
		time.Sleep(maxQueueTime + 1)
		previews.Go(func() {
			if w := ask("POST", "/plan", strings.NewReader(`{"replicas":3}`)); w.Code != 200 {
				t.Errorf("the preview that waited is %d %s, want 200", w.Code, w.Body)
			}
		})
		synctest.Wait()
		io.WriteString(sending, `{"replicas":2}`)
		sending.Close()
		previews.Wait()
	})
}

// All that the port can have at once may ask who owns a namespace: none is sent away.
func TestOwnersAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, update := adminOf(t, "127.0.0.1:1")
		update(sourceContent{id: sourceID{name: "x"}, version: "1", overrides: newOverrideSet(nil)})
		found := make(chan struct{})
		a.proxy.backends.resolve = func(context.Context, int) (string, error) {
			<-found
			return "", errors.New("not there")
		}
		h := a.handler()
		var asked sync.WaitGroup
		for range maxAdminConns {
			asked.Go(func() {
				w := httptest.NewRecorder()
				if h.ServeHTTP(w, httptest.NewRequest("GET", "/owner?namespace=ns-01", nil)); w.Code != 200 {
					t.Errorf("%d %s, want 200", w.Code, w.Body)
				}
			})
		}
		synctest.Wait()
		close(found)
		asked.Wait()
	})
}

// adminOf is the admin of a proxy to the backends at addrs, which serves no
// clients. update puts entries in force.
func adminOf(t testing.TB, addrs ...string) (a *admin, update func(...sourceContent)) {
	t.Helper()
	fdLimit := wideDescriptorLimit(t)
	p := newProxy(&config{statefulSet: "backend", handoff: "off", podName: "router-x", namespaceMatcher: &namespaceMatcher{}}, newStaticBackends("backend", addrs), fdLimit, slog.New(slog.DiscardHandler))
	p.tables.addSource(false, func(func(...sourceContent)) overrideSource { return &fakeSource{notReady: "they are late"} })
	return &admin{proxy: p, fdLimit: fdLimit, logQueue: newLogQueue(io.Discard), started: time.Now()}, p.tables.update
}

// answered is the admin's answer to GET path.
func answered(a *admin, path string) *http.Response {
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w.Result()
}

// Where there is no table, and no source says what is missing, the answers have a reason too.
func TestNoTableHasAReason(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	a.proxy.tables.sources = nil
	for _, path := range []string{"/owner?namespace=ns-01", "/backends"} {
		resp := answered(a, path)
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		wantEqual(t, path, string(body), `{"error":"there is no routing table yet"}`+"\n")
	}
}

// A namespace whose owner nobody knows stays so until its turn to move: /owner says that, and
// not only who is next.
func TestOwnerNotKnownBeforeItsTurn(t *testing.T) {
	open, namespace := "ns-01", "ns-02"
	if placeOf(hash64(open)) > placeOf(hash64(namespace)) {
		open, namespace = namespace, open
	}
	var there atomic.Bool
	echoes := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{echoes.addr, refusingAddr(t)}, map[string]string{open: "backend-0", namespace: "junk"}, func(p *proxy) {
		p.mover.targets.probe = func(context.Context, int) error {
			if there.Load() {
				return nil
			}
			return errors.New("nobody there")
		}
	})
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard), started: time.Now()}
	type answer struct{ Owner, Next, Why, Error string }
	waitAnswer := func(want answer) {
		t.Helper()
		eventually(t, "the answer", want, func() (got answer) {
			must(t, json.NewDecoder(answered(a, "/owner?dial=0&namespace="+namespace).Body).Decode(&got))
			return got
		})
	}
	waitAnswer(answer{Why: whyUnresolved})
	client := p.open(t, open) // it has to move first, and its next owner is not there
	p.waitSessions(t, 1)
	p.override("2", map[string]string{open: "backend-1", namespace: "backend-1"})
	waitAnswer(answer{Next: "backend-1", Why: whyOverride,
		Error: "its owner is not known until it has moved: clients get 503"})
	client.Close()
	there.Store(true)
	waitAnswer(answer{Owner: "backend-1", Why: whyOverride})
}

// While a step waits for a backend, all answers say so, and none afterwards.
func TestStatusOfAStep(t *testing.T) {
	var there atomic.Bool
	silent := startStub(t, "127.0.0.1:0", answer(switching)) // it answers no Close frame
	p := startProxy(t, []string{silent.addr, refusingAddr(t)}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.relay.closeTimeout = time.Hour
		p.mover.targets.probe = func(context.Context, int) error {
			if there.Load() {
				return nil
			}
			return errors.New("nobody there")
		}
	})
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard), started: time.Now()}
	ask := func(path string) string {
		t.Helper()
		body, err := io.ReadAll(answered(a, path).Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	contains := func(path, want string) {
		t.Helper()
		eventually(t, path+" contains "+want, true, func() bool { return strings.Contains(ask(path), want) })
	}
	contains("/status", `"in_progress":false,"progress":1,`)
	client := p.open(t, "ns-01")
	p.waitSessions(t, 1)
	p.override("42", map[string]string{"ns-01": "backend-1"})
	contains("/owner?namespace=ns-01", `"owner":"backend-0","next":"backend-1"`) // backend-1 is not there
	contains("/status", `"in_progress":true,`)
	p.override("43", map[string]string{"ns-01": "backend-0"})
	contains("/status", `"in_progress":false,`)
	there.Store(true)
	p.override("44", map[string]string{"ns-01": "backend-1"})
	contains("/owner?namespace=ns-01", `"owner":"backend-1","held_by_step":1`)
	contains("/owner?namespace=ns-01", `"previous":"backend-0"`)
	contains("/status", `"sessions_to_move":0,"unproven":0,"waiting_for":[{"backend":"backend-0","sessions":1,"upgrades":0,`)
	if text := ask("/metrics"); strings.Contains(text, `router_handoff_waiting_seconds{for="backend-0"} 0`+"\n") {
		t.Error("router_handoff_waiting_seconds of backend-0 is 0")
	}
	p.relay.endAll(causeDrain)
	client.Close()
	contains("/status", `"in_progress":false,"progress":1,`)
	contains("/metrics", `router_handoff_waiting_seconds{for="backend-0"} 0`+"\n")
}

// A router that is not a member of the hand-off knows its table, and not who the owner is.
func TestOwnerOutside(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, outside)
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard), started: time.Now()}
	eventually(t, "/owner", true, func() bool {
		body, err := io.ReadAll(answered(a, "/owner?namespace=ns-01").Body)
		must(t, err)
		return strings.HasPrefix(string(body), `{"namespace":"ns-01","next":"backend-0","why":"hash","ready":false,`+
			`"error":"the hand-off: ConfigMap edge/hand-off has not been read yet",`)
	})
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
	wantReadyz(503, "no overrides have been read yet: they are late\n")
	a.proxy.draining.Store(true)
	wantReadyz(503, "the router is stopping\nno overrides have been read yet: they are late\n")
	update(sourceContent{})
	wantReadyz(503, "the router is stopping\n")
	a.proxy.draining.Store(false)
	wantReadyz(200, "ready\n")
}

func TestOwnerAnswers(t *testing.T) {
	up := listenLocal(t)
	gone := refusingAddr(t)
	a, update := adminOf(t, up.Addr().String(), gone)
	update(sourceContent{version: "40", overrides: newOverrideSet(map[string]string{"kept": "backend-0"})})
	update(sourceContent{version: "41", overrides: newOverrideSet(map[string]string{
		"first": "backend-0", "down": "backend-1", "kept": "bakend-0",
	})})
	// Only a first table refuses: it does not know where the namespace was.
	b, updateFirst := adminOf(t, up.Addr().String(), gone)
	updateFirst(sourceContent{version: "1", overrides: newOverrideSet(map[string]string{"refused": "backend-9"})})
	hashed, dots := hashedTo(t, "free", 0, 2), hashedTo(t, "..free", 0, 2)
	address, stamp := up.Addr().String(), a.proxy.tables.table().stamp
	tests := map[string]struct {
		admin     *admin
		namespace string
		status    int
		want      string
	}{
		"override": {a, "first", 200, `{"namespace":"first","owner":"backend-0","why":"override","address":"` + address + `","ready":true,"overrides_version":"41","stamp":"` + stamp + `","overrides_in":[""],"router":"router-x","sessions":0}`},
		"hash":     {a, hashed, 200, `{"namespace":"` + hashed + `","owner":"backend-0","why":"hash","address":"` + address + `","ready":true,"overrides_version":"41","stamp":"` + stamp + `","router":"router-x","sessions":0}`},
		"down": {a, "down", 200, `{"namespace":"down","owner":"backend-1","why":"override","address":"` + gone +
			`","ready":false,"error":"dial tcp ` + gone + `: connect: connection refused","overrides_version":"41","stamp":"` + stamp + `","overrides_in":[""],"router":"router-x","sessions":0}`},
		"kept": {a, "kept", 200, `{"namespace":"kept","owner":"backend-0","why":"previous","address":"` + address +
			`","ready":true,"overrides_version":"41","stamp":"` + stamp + `","rejected":[{"source":"","value":"bakend-0","expected":"backend-0 to backend-1","in_force":"backend-0"}],"overrides_in":[""],"router":"router-x","sessions":0}`},
		"refused": {b, "refused", 200, `{"namespace":"refused","why":"unresolved","ready":false,"overrides_version":"1","stamp":"` + b.proxy.tables.table().stamp + `","rejected":[{"source":"","value":"backend-9","expected":"backend-0 to backend-1","in_force":"unresolved"}],"overrides_in":[""],"router":"router-x","sessions":0}`},
		"two dots": {a, dots, 200, `{"namespace":"` + dots + `","key":"_x2E` + dots[1:] + `","owner":"backend-0","why":"hash","address":"` + address +
			`","ready":true,"overrides_version":"41","stamp":"` + stamp + `","router":"router-x","sessions":0}`},
		"bad namespace": {a, "a/b", 400, `{"error":"/owner?namespace= must be ` + jsonText(t, expectedPathNamespace("a/b")) + ` (got \"a/b\")"}`},
		"no namespace":  {a, "", 400, `{"error":"/owner?namespace= must be ` + jsonText(t, expectedPathNamespace("")) + ` (got \"\")"}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			wantOwner(t, tt.admin, tt.namespace, tt.status, tt.want)
		})
	}
	conflict, update := adminOf(t, address, refusingAddr(t))
	update(sourceContent{id: sourceID{name: "a"}, version: "1", overrides: newOverrideSet(map[string]string{"both": "backend-0"})})
	update(sourceContent{id: sourceID{name: "a"}, version: "1", overrides: newOverrideSet(map[string]string{"both": "backend-0"})},
		sourceContent{id: sourceID{name: "b"}, version: "2", overrides: newOverrideSet(map[string]string{"both": "backend-1"})})
	const want = `"expected":"the same backend in all sources","in_force":"backend-0"}`
	wantOwner(t, conflict, "both", 200, `{"namespace":"both","owner":"backend-0","why":"conflict","address":"`+address+
		`","ready":true,"overrides_version":"`+conflict.proxy.tables.table().overridesVersion+`","stamp":"`+conflict.proxy.tables.table().stamp+`","rejected":[{"source":"a","value":"backend-0",`+want+
		`,{"source":"b","value":"backend-1",`+want+`],"overrides_in":["a","b"],"router":"router-x","sessions":0}`)
	c, _ := adminOf(t, up.Addr().String())
	wantOwner(t, c, "ns-01", 503, `{"error":"no overrides have been read yet: they are late"}`)
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

func TestOwnerShowsWhatIsRejected(t *testing.T) {
	up := listenLocal(t)
	a, update := adminOf(t, up.Addr().String())
	update(sourceContent{version: "1"})
	update(sourceContent{version: "2", overrides: newOverrideSet(map[string]string{"ns-01": "\"<\xff>\"" + strings.Repeat("é", 1<<19)})})
	resp := answered(a, "/owner?namespace=ns-01")
	var got ownership
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Why != whyPrevious || got.Owner != "backend-0" || len(got.Rejected) != 1 || got.Rejected[0].InForce != whyHash {
		t.Fatalf("%+v, want kept where the hash has it", got)
	}
	if shown := got.Rejected[0].Value; !strings.HasPrefix(shown, "\"<�>\"éé") || !strings.HasSuffix(shown, "…") || len(shown) > 100 {
		t.Errorf("the value is shown as %q", shown)
	}
}

func TestReadyzFollowing(t *testing.T) {
	maps := listOf("ConfigMap", map[string]string{"overwriting": `"data":{}`})
	set := func(replicas int) http.HandlerFunc {
		return listOf("StatefulSet", map[string]string{"backend": fmt.Sprintf(`"spec":{"replicas":%d}`, replicas)})
	}
	tests := map[string]struct {
		lists  map[string]http.HandlerFunc
		status int
		want   string
	}{
		"all":              {map[string]http.HandlerFunc{"configmaps": maps, "statefulsets": set(4), "endpointslices": listOf("EndpointSlice", nil)}, 200, "ready"},
		"no slices":        {map[string]http.HandlerFunc{"configmaps": maps, "statefulsets": set(4)}, 200, "ready"},
		"no StatefulSet":   {map[string]http.HandlerFunc{"configmaps": maps, "statefulsets": listOf("StatefulSet", nil)}, 503, "the number of backends is not known yet: StatefulSet default/backend does not exist"},
		"no replicas":      {map[string]http.HandlerFunc{"configmaps": maps, "statefulsets": set(0)}, 503, "the number of backends is not known yet: StatefulSet default/backend has no replicas"},
		"no permission":    {map[string]http.HandlerFunc{"configmaps": maps}, 503, "the number of backends is not known yet: StatefulSet default/backend: 403 Forbidden: not this; the Role needs list and watch of statefulsets with resourceNames [backend]"},
		"nothing, but one": {map[string]http.HandlerFunc{"statefulsets": set(4)}, 503, "no overrides have been read yet: ConfigMap default/overwriting: 403 Forbidden: not this"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRouter(t, "-kube", kindAnswers(t, tt.lists))
			waitBody(t, r, "/readyz", tt.status, tt.want+"\n")
		})
	}
}

// A backend beyond the last is listed for as long as it has sessions.
func TestBackendsShowsWhatIsLeft(t *testing.T) {
	a, update := adminOf(t, listenLocal(t).Addr().String(), listenLocal(t).Addr().String())
	resp := answered(a, "/backends")
	if resp.StatusCode != 503 {
		t.Errorf("status %s without a table, want 503", resp.Status)
	}
	update(sourceContent{version: "1"})
	a.proxy.relay.byBackend[1] = sessionCounts{open: 3, total: 5}
	a.proxy.relay.byBackend[7] = sessionCounts{open: 0, total: 5}
	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 1}})
	var got struct{ Backends []probedBackend }
	if err := json.NewDecoder(answered(a, "/backends").Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if all := got.Backends; len(all) != 2 || !all[0].InTable || all[1].Name != "backend-1" || all[1].InTable || all[1].Sessions != 3 {
		t.Errorf("backends %+v, want backend-0, and backend-1 with 3 sessions only", got.Backends)
	}
}

// previewAdmin is an admin of 4 backends with sessions of namespaces "a" (3, on its
// override backend-0), "b" (1, hashed) and one that is not where it belongs.
func previewAdmin(t *testing.T) *admin {
	t.Helper()
	a, update := adminOf(t, "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1")
	a.proxy.mover.moveInterval = time.Second / 2
	a.proxy.mover.pace.interval = time.Minute // of this router, which has a small share
	update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: "7", overrides: newOverrideSet(map[string]string{"a": "backend-0", "late": "backend-1"})})
	for namespace, backends := range map[string][]int{"a": {0, 0, 0}, "b": {bucket("b", 4)}, "late": {0, 1}} {
		for _, backend := range backends {
			a.proxy.relay.add(&session{namespace: namespace, backend: backend})
		}
	}
	return a
}

func TestPreview(t *testing.T) {
	b := backendName("backend", bucket("b", 4))
	other := (bucket("b", 4) + 1) % 4
	configMap := func(name, namespace, data string) string {
		return fmt.Sprintf(`{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":%q,"namespace":%q,"creationTimestamp":null},"data":%s}`, name, namespace, data)
	}
	const late = `{"namespace":"late","from":"backend-0","to":"backend-1","sessions":1}`
	tests := map[string]struct {
		body   string
		status int
		want   string
	}{
		"as it is": {configMap("overwriting", "edge", `{"a":"backend-0","late":"backend-1"}`), 200,
			`{"router":"router-x","overrides_version":"7","stamp":"STAMP","backends":4,"sessions":1,"namespaces":1,"seconds":0.5,"moves":[` + late + `],"unresolved":0,"unresolved_sessions":0,"rejected":0}`},
		"an override moves": {configMap("overwriting", "", `{"a":"backend-2","late":"backend-1","b":"`+backendName("backend", other)+`"}`), 200,
			`{"router":"router-x","overrides_version":"7","stamp":"STAMP","backends":4,"sessions":5,"namespaces":3,"seconds":2.5,"moves":[{"namespace":"a","from":"backend-0","to":"backend-2","sessions":3},` +
				`{"namespace":"b","from":"` + b + `","to":"` + backendName("backend", other) + `","sessions":1},` + late + `],"unresolved":0,"unresolved_sessions":0,"rejected":0}`},
		"a bad entry stays": {configMap("overwriting", "edge", `{"a":"bakend-2","late":"backend-1"}`), 200,
			`{"router":"router-x","overrides_version":"7","stamp":"STAMP","backends":4,"sessions":1,"namespaces":1,"seconds":0.5,"moves":[` + late + `],"unresolved":0,"unresolved_sessions":0,"rejected":1,` +
				`"rejections":["a: \"bakend-2\", expected backend-0 to backend-3, in force: backend-0"]}`},
		"fewer backends": {`{"replicas":1}`, 200, previewFewer(t)},
		"no replicas":    {`{"replicas":0}`, 400, `{"error":"replicas must be 1 to 10000 (got 0)"}`},
		"too many":       {`{"replicas":10001}`, 400, `{"error":"replicas must be 1 to 10000 (got 10001)"}`},
		"both":           {`{"replicas":3,"kind":"ConfigMap"}`, 400, `{"error":"the body must not have both a ConfigMap and replicas"}`},
		"another kind":   {`{"kind":"Secret"}`, 400, `{"error":"the body must be a ConfigMap (got kind \"Secret\"), or have replicas or cordon"}`},
		"another name":   {configMap("other", "edge", `{}`), 400, `{"error":"ConfigMap edge/other is not a source of overrides; the sources are: ConfigMap edge/overwriting"}`},
		"another place":  {configMap("overwriting", "other", `{}`), 400, `{"error":"ConfigMap other/overwriting is not a source of overrides; the sources are: ConfigMap edge/overwriting"}`},
		"YAML":           {"kind: ConfigMap", 400, `{"error":"the body must be a ConfigMap in JSON, or have replicas or cordon: invalid character 'k' looking for beginning of value"}`},
		"nothing":        {"", 400, `{"error":"the body must be a ConfigMap in JSON, or have replicas or cordon: unexpected end of JSON input"}`},
		"numbers":        {configMap("overwriting", "edge", `{"a":2}`), 400, `{"error":"the body must be a ConfigMap in JSON, or have replicas or cordon: data: expected a string (got a number)"}`},
		"too big":        {`"` + strings.Repeat("x", maxPreviewBody) + `"`, 413, `{"error":"the body has more than 8388608 bytes"}`},
		"two objects":    {`{"replicas":3}{"replicas":4}`, 400, `{"error":"the body must be a ConfigMap in JSON, or have replicas or cordon: invalid character '{' after top-level value"}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a := previewAdmin(t)
			before := a.proxy.tables.table()
			w := httptest.NewRecorder()
			a.handler().ServeHTTP(w, httptest.NewRequest("POST", "/plan", strings.NewReader(tt.body)))
			tt.want = strings.Replace(tt.want, "STAMP", before.stamp, 1)
			if got := strings.TrimSpace(w.Body.String()); w.Code != tt.status || got != tt.want {
				t.Errorf("%d %s\nwant %d %s", w.Code, got, tt.status, tt.want)
			}
			if a.proxy.tables.table() != before {
				t.Error("the preview was put in force")
			}
		})
	}
	a, _ := adminOf(t, "127.0.0.1:1")
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest("POST", "/plan", strings.NewReader(`{"replicas":1}`)))
	if w.Code != http.StatusServiceUnavailable {
		t.Errorf("status %d without a table, want 503", w.Code)
	}
}

// previewFewer is the preview for one backend: all go to backend-0, but for "late",
// whose override leads to a backend that is gone: it has no owner.
func previewFewer(t *testing.T) string {
	t.Helper()
	p := preview{Router: "router-x", OverridesVersion: "7", Stamp: "STAMP", Backends: 1, Unresolved: 1, UnresolvedSessions: 2, Rejected: 1,
		Rejections: []string{`late: "backend-1", expected backend-0 to backend-0, in force: unresolved`}}
	if from := bucket("b", 4); from != 0 {
		p.Sessions, p.Namespaces = 1, 1 // at once: the backend is scaled in
		p.Moves = append(p.Moves, previewMove{"b", backendName("backend", from), "backend-0", 1})
	}
	p.Moves = append(p.Moves, previewMove{"late", "backend-0", "", 1}, previewMove{"late", "backend-1", "", 1})
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A namespace whose override is invalid keeps the owner that the hash gave it, whatever the hash
// gives it later, until that owner is gone. The plan of a change says so.
func TestPlanOfKeptNamespace(t *testing.T) {
	namespace := "ns-0"
	for i := 1; bucket(namespace, 4) != 3 || bucket(namespace, 5) != 4; i++ {
		namespace = fmt.Sprint("ns-", i)
	}
	tests := map[string]struct {
		body  string
		set   backendSet
		owner string
	}{
		"more":     {`{"replicas":5}`, backendSet{ordinalRange: ordinalRange{count: 5}}, "backend-3"},
		"cordoned": {`{"cordon":[3]}`, backendSet{ordinalRange: ordinalRange{count: 4}, listedCordon: cordon{3}}, "backend-3"},
		"fewer":    {`{"replicas":3}`, backendSet{ordinalRange: ordinalRange{count: 3}}, ""},
	}
	for name, tt := range tests {
		for _, off := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, off is %t", name, off), func(t *testing.T) {
				p := startProxy(t, slices.Repeat([]string{startStub(t, "127.0.0.1:0", echo).addr}, 5), map[string]string{}, func(p *proxy) {
					p.mover.handoffOff = off
					p.tables.setBackends(backendSet{ordinalRange: ordinalRange{count: 4}})
				})
				atRest := func() bool { s := p.mover.status(); return !s.InProgress && s.ToMove == 0 }
				eventually(t, "at rest", true, atRest)
				p.override("2", map[string]string{namespace: "junk"})
				eventually(t, "at rest", true, atRest)
				p.open(t, namespace)
				p.waitSessions(t, 1)
				a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard), started: time.Now()}
				w := httptest.NewRecorder()
				a.handler().ServeHTTP(w, httptest.NewRequest("POST", "/plan", strings.NewReader(tt.body)))
				var plan preview
				must(t, json.Unmarshal(w.Body.Bytes(), &plan))
				if plan.Sessions != 0 || plan.Unresolved > 0 != (tt.owner == "") {
					t.Errorf("the plan is %s", w.Body)
				}
				p.tables.setBackends(tt.set)
				eventually(t, "at rest", true, atRest)
				var got ownership
				must(t, json.NewDecoder(answered(a, "/owner?dial=0&namespace="+namespace).Body).Decode(&got))
				wantEqual(t, "the owner", got.Owner, tt.owner)
			})
		}
	}
}

// A namespace that waits for its turn to move stays when its override becomes invalid: it has not got
// the owner that the newest table gave it. The plan says so, and /owner afterwards.
func TestPlanOfKeptNamespaceBeforeItsTurn(t *testing.T) {
	p := startProxy(t, []string{startStub(t, "127.0.0.1:0", echo).addr, refusingAddr(t)}, nil, nil)
	apply := func(version, first, second string) {
		p.tables.update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: version, overrides: newOverrideSet(map[string]string{"ns-01": first, "ns-02": second})})
	}
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard), started: time.Now()}
	type answer struct{ Owner, Next, Why string }
	wantAnswer := func(want answer) {
		t.Helper()
		var got answer
		must(t, json.NewDecoder(answered(a, "/owner?dial=0&namespace=ns-01").Body).Decode(&got))
		wantEqual(t, "the answer", got, want)
	}
	apply("1", "backend-0", "backend-0")
	p.open(t, "ns-01")
	p.open(t, "ns-02")
	p.waitSessions(t, 2)
	apply("2", "backend-1", "backend-1") // where nobody is
	p.tail.wait(t, "new owner unreachable; move delayed", 1)
	wantAnswer(answer{"backend-0", "backend-1", whyOverride})
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest("POST", "/plan", strings.NewReader(`{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{"ns-01":"junk","ns-02":"backend-1"}}`)))
	var plan preview
	must(t, json.Unmarshal(w.Body.Bytes(), &plan))
	wantEqual(t, "the moves of the plan", fmt.Sprint(plan.Moves), "[{ns-02 backend-0 backend-1 1}]")
	wantEqual(t, "the rejections of the plan", fmt.Sprint(plan.Rejections), `[ns-01: "junk", expected backend-0 to backend-1, in force: hash]`) // which gives backend-0
	apply("3", "junk", "backend-1")
	wantAnswer(answer{"backend-0", "", whyPrevious})
	eventually(t, "sessions to move", 1, func() int64 { return p.mover.status().ToMove })
	wantAnswer(answer{"backend-0", "", whyPrevious})
	wantEqual(t, "sessions that have moved", p.relay.ended[causeMoved].Load(), 0)
}

// /owner?all=1 says that the owner was not dialled only where this router does not know it.
func TestOwnerOfAllWithoutDial(t *testing.T) {
	var got ownership
	servedAdmin(t, "router-a").ask(t, "GET", "/owner?all=1&dial=0&namespace=vip", "", &got)
	wantEqual(t, "owner", got.Owner, "backend-4")
	wantEqual(t, "error", got.Error, "")
}
