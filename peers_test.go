package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// namedAdmin is a router's admin port that is served, of a router with 5 backends, of
// which vip is pinned to the last, and with these sessions: namespace@ordinal.
type namedAdmin struct {
	*admin
	addr   string
	update func(...sourceContent)
}

func servedAdmin(t *testing.T, name string, sessions ...string) *namedAdmin {
	t.Helper()
	a, update := adminOf(t, slices.Repeat([]string{refusingAddr(t)}, 5)...)
	a.proxy.podName, a.proxy.mover.moveInterval = name, time.Second/2
	update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: "7",
		overrides: newOverrideSet(map[string]string{"vip": "backend-4", "idle": "backend-4", "a": "backend-0"})})
	for _, s := range sessions {
		namespace, ordinal, _ := strings.Cut(s, "@")
		a.proxy.relay.add(&session{namespace: namespace, backend: int(ordinal[0] - '0')})
	}
	a.peers = newPeers(fixedPeers(nil))
	a.peers.timeout, a.peers.allTimeout = 5*time.Second, 10*time.Second // the machine may be slow
	server := httptest.NewServer(a.handler())
	t.Cleanup(server.Close)
	return &namedAdmin{a, server.Listener.Addr().String(), update}
}

// asks makes a the router that asks the others.
func (a *namedAdmin) asks(addrs ...string) { a.peers.find = fixedPeers(addrs) }

// ask sends a request to the admin port, and decodes its answer into v.
func (a *namedAdmin) ask(t *testing.T, method, path, body string, v any) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+a.addr+path, strings.NewReader(body))
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode != 200 {
		t.Fatalf("%s %s is %s: %s", method, path, resp.Status, answer)
	}
	must(t, json.Unmarshal(answer, v))
}

// A preview for all routers adds up what each has, and names the namespaces that the change
// leaves without an owner.
func TestPreviewOfAll(t *testing.T) {
	moves, stays := hashedTo(t, "moves", 4, 5), hashedTo(t, "stays", 0, 5)
	if bucket(stays, 4) != 0 {
		t.Fatal("backend-0 keeps its namespaces")
	}
	a := servedAdmin(t, "router-a", "vip@4", "vip@4", moves+"@4", stays+"@0")
	b := servedAdmin(t, "router-b", "vip@4", "vip@4", "vip@4", "vip@4", moves+"@4", moves+"@4")
	c := servedAdmin(t, "router-c")
	a.asks(c.addr, b.addr)
	to := backendName("backend", bucket(moves, 4))
	lost := []previewMove{{"idle", "backend-4", "", 0}, {moves, "backend-4", to, 3}, {"vip", "backend-4", "", 6}}
	var p preview
	a.ask(t, "POST", "/plan?all=1", `{"replicas":4}`, &p)
	if !slices.Equal(p.Moves, lost) || p.Sessions != 3 || p.Namespaces != 1 || p.Unresolved != 2 || p.UnresolvedSessions != 6 || p.Rejected != 2 {
		t.Errorf("%+v, want the moves %v", p, lost)
	}
	if p.Seconds != 0 {
		t.Errorf("%v s, want 0: what is scaled in moves at once", p.Seconds)
	}
	if !*p.Agree || fmt.Sprint(p.Routers) != "[router-a router-b router-c]" || len(p.Silent) != 0 {
		t.Errorf("%+v", p.Silent)
	}
	p = preview{}
	a.ask(t, "POST", "/plan", `{"replicas":4}`, &p)
	if p.Router != "router-a" || p.Agree != nil || p.UnresolvedSessions != 2 || p.Sessions != 1 {
		t.Errorf("without all: %+v, want what router-a has", p)
	}
	const edit = `{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{"vip":"backend-1","a":"backend-0","idle":"backend-4"}}`
	for shared, seconds := range map[bool]float64{true: 3, false: 2} {
		a.proxy.mover.shared = map[bool]*sharedHandoff{true: {}}[shared]
		p = preview{}
		a.ask(t, "POST", "/plan?all=1", edit, &p)
		if p.Sessions != 6 || p.Namespaces != 1 || p.Seconds != seconds || p.Unresolved != 0 || len(p.Moves) != 1 {
			t.Errorf("%+v, want 6 sessions in %v s", p, seconds)
		}
	}
	b.update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: "8"})
	p = preview{}
	a.ask(t, "POST", "/plan?all=1", `{"replicas":5}`, &p)
	if *p.Agree || len(p.Silent) != 0 {
		t.Errorf("%+v, want no agreement", p.Silent)
	}
}

// If the router that is asked does not know the owner, the answer has that of one that does.
func TestOwnerOfAllFromOthers(t *testing.T) {
	a, b := servedAdmin(t, "router-a", "vip@4"), servedAdmin(t, "router-b", "vip@4", "vip@4")
	a.asks(b.addr)
	outside(a.proxy)
	var o ownership
	a.ask(t, "GET", "/owner?namespace=vip&all=1", "", &o)
	if o.Owner != "backend-4" || o.Sessions != 3 || !*o.Agree || o.Error != "not dialled, as this router does not know the owner" ||
		len(o.Routers) != 2 || o.Routers[0].Owner != "" || o.Routers[0].Next != "backend-4" || o.Routers[1].Owner != "backend-4" {
		t.Errorf("%+v %+v", o, o.Routers)
	}
}

// /owner, /status and /backends of all routers add up sessions, and say what each knows.
func TestAnswersOfAll(t *testing.T) {
	a := servedAdmin(t, "router-a", "vip@4", "a@0")
	b := servedAdmin(t, "router-b", "vip@4", "vip@4", "x@2")
	a.asks(b.addr, a.addr) // a list that all routers have
	var o ownership
	a.ask(t, "GET", "/owner?namespace=vip&all=1", "", &o)
	if o.Owner != "backend-4" || o.Source != "ConfigMap edge/overwriting" || o.Sessions != 3 || !*o.Agree || len(o.Silent) != 0 ||
		len(o.Routers) != 2 || o.Routers[0].Name != "router-a" || o.Routers[0].Sessions != 1 || o.Routers[1].Sessions != 2 {
		t.Errorf("%+v %+v", o, o.Routers)
	}
	var s status
	a.ask(t, "GET", "/status?all=1", "", &s)
	if len(s.Routers) != 2 || s.Routers[1].Name != "router-b" || s.Routers[1].Sessions != 3 || !s.Agree || len(s.Silent) != 0 ||
		s.Backends[4].Sessions != 3 || s.Backends[4].Overrides != 2 || s.Backends[2].Sessions != 1 || len(s.Limits) != 6 {
		t.Errorf("%+v", s)
	}
	var all backendsAnswer
	a.ask(t, "GET", "/backends?all=1", "", &all)
	if n := all.Backends; len(n) != 5 || n[4].Sessions != 3 || n[2].Sessions != 1 || n[4].Error == "" || !*all.Agree || len(all.Silent) != 0 {
		t.Errorf("%+v %+v", all, all.Silent)
	}
	b.update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: "8", overrides: newOverrideSet(map[string]string{"vip": "backend-1"})})
	a.ask(t, "GET", "/owner?namespace=vip&all=1", "", &o)
	a.ask(t, "GET", "/status?all=1", "", &s)
	if *o.Agree || o.Routers[1].Owner != "backend-1" || s.Agree {
		t.Errorf("%+v, want no agreement", o.Routers)
	}
}

// A router without a table answers for those that have one.
func TestAnswersOfAllWithoutTable(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	a.proxy.podName = "router-a"
	b := servedAdmin(t, "router-b", "vip@4")
	a.peers = newPeers(fixedPeers([]string{b.addr}))
	server := httptest.NewServer(a.handler())
	defer server.Close()
	named := &namedAdmin{a, server.Listener.Addr().String(), nil}
	var o ownership
	named.ask(t, "GET", "/owner?namespace=vip&all=1", "", &o)
	var p preview
	named.ask(t, "POST", "/plan?all=1", `{"replicas":4}`, &p)
	var all backendsAnswer
	named.ask(t, "GET", "/backends?all=1", "", &all)
	if o.Owner != "backend-4" || p.UnresolvedSessions != 1 || all.Backends[4].Sessions != 1 {
		t.Errorf("%+v %+v %+v", o, p, all)
	}
	wantEqual(t, "routers that /backends adds up", len(all.Routers), 1)
	if !strings.HasPrefix(o.Error, "not dialled") {
		t.Errorf("ready is %v with the error %q; nobody has dialled the owner", o.Ready, o.Error)
	}
	for _, silent := range [][]silentRouter{o.Silent, p.Silent, all.Silent} {
		if len(silent) != 1 || silent[0].Name != "router-a" || !strings.Contains(silent[0].Error, "they are late") {
			t.Errorf("silent %v, want router-a", silent)
		}
	}
}

// brokenPeers are routers that do not answer as routers do, by what is said of them.
func brokenPeers(t *testing.T) map[string]string {
	huge := func(conn net.Conn, _ *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
		io.Copy(conn, io.LimitReader(endless{}, 100<<20))
	}
	html := func(conn net.Conn, _ *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>")
	}
	answer := func(text string) func(net.Conn, *bufio.Reader) {
		return func(conn net.Conn, _ *bufio.Reader) {
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%s", text)
		}
	}
	moved := func(conn net.Conn, _ *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
	}
	return map[string]string{
		startStub(t, "127.0.0.1:0", silent).addr:         "no answer within 5s",
		refusingAddr(t):                                  "connection refused",
		startStub(t, "127.0.0.1:0", huge).addr:           "more than 16777216 bytes",
		startStub(t, "127.0.0.1:0", html).addr:           "invalid character '<'",
		startStub(t, "127.0.0.1:0", answer(`{}`)).addr:   "not the answer of a router",
		startStub(t, "127.0.0.1:0", answer(`null`)).addr: "not the answer of a router",
		startStub(t, "127.0.0.1:0", answer(`[3]`)).addr:  "cannot unmarshal",
		startStub(t, "127.0.0.1:0", moved).addr:          "302 Found",
		fullListener(t).Addr().String():                  "no answer within 5s",
	}
}

// Whatever the other routers do, the answer is whole for the rest, and names them.
func TestBrokenPeersAreNamed(t *testing.T) {
	broken := brokenPeers(t)
	a, b := servedAdmin(t, "router-a", "vip@4"), servedAdmin(t, "router-b", "vip@4", "vip@4")
	addrs := []string{b.addr}
	for addr := range broken {
		addrs = append(addrs, addr)
	}
	check := func(path string, silent []silentRouter, sessions int) {
		t.Helper()
		if sessions != 3 || len(silent) != len(addrs)-1 {
			t.Errorf("%s: %d sessions, %d silent: %v", path, sessions, len(silent), silent)
		}
		for _, s := range silent {
			if want := broken[s.Name]; want == "" || !strings.Contains(s.Error, want) {
				t.Errorf("%s: %s is silent with %q, want %q", path, s.Name, s.Error, want)
			}
		}
	}
	a.asks(addrs...)
	var s status
	a.ask(t, "GET", "/status?all=1", "", &s)
	check("/status", s.Silent, s.Backends[4].Sessions)
	addrs = slices.DeleteFunc(addrs, func(addr string) bool { // those for which one has to wait
		return strings.HasPrefix(broken[addr], "no answer")
	})
	a.asks(addrs...)
	var o ownership
	a.ask(t, "GET", "/owner?all=1&namespace=vip", "", &o)
	check("/owner", o.Silent, o.Sessions)
	var all backendsAnswer
	a.ask(t, "GET", "/backends?all=1", "", &all)
	check("/backends", all.Silent, all.Backends[4].Sessions)
	var p preview
	a.ask(t, "POST", "/plan?all=1", `{"replicas":4}`, &p)
	check("/plan", p.Silent, p.UnresolvedSessions)
}

// A question from a router does not make another one ask, and a request that is wrong gets
// the answer of one router.
func TestQuestionsDoNotFanOut(t *testing.T) {
	a, b := servedAdmin(t, "router-a"), servedAdmin(t, "router-b")
	a.asks(b.addr)
	b.peers.find = func(context.Context) ([]peer, error) {
		t.Error("router-b was made to ask others")
		return nil, nil
	}
	var s status
	a.ask(t, "GET", "/status?all=1", "", &s)
	for path, want := range map[string]int{"/owner?all=1&namespace=a/b": 400, "/status?all=2": 400, "/plan?all=1": 405} {
		if resp := answered(a.admin, path); resp.StatusCode != want {
			t.Errorf("%s is %s, want %d", path, resp.Status, want)
		}
	}
	for body, want := range map[string]int{`{"replicas":0}`: 400, "": 400, `"` + strings.Repeat("x", maxPreviewBody) + `"`: 413} {
		w := httptest.NewRecorder()
		a.handler().ServeHTTP(w, httptest.NewRequest("POST", "/plan?all=1", strings.NewReader(body)))
		if w.Code != want || !strings.Contains(w.Body.String(), `"error"`) {
			t.Errorf("a preview of %.20q is %d %s, want %d", body, w.Code, w.Body, want)
		}
	}
}

// Routers that ask each other at the same time do not wait for each other.
func TestRoutersAskEachOther(t *testing.T) {
	a, b := servedAdmin(t, "router-a", "vip@4"), servedAdmin(t, "router-b", "vip@4")
	a.asks(b.addr)
	b.asks(a.addr)
	var asking sync.WaitGroup
	for range 3 {
		for _, from := range []*namedAdmin{a, b} {
			asking.Go(func() {
				var p preview
				from.ask(t, "POST", "/plan?all=1", `{"replicas":4}`, &p)
				if p.UnresolvedSessions != 2 {
					t.Errorf("%+v %+v, want the sessions of both", p, p.Silent)
				}
			})
		}
	}
	asking.Wait()
}

// The other routers are the pods with the label that run, but for the own one. What is
// known is used for a while, and also if the API server answers no more.
func TestPeerPods(t *testing.T) {
	k := newFakeKube()
	client := proxyClient(t, k.url(t))
	for _, pod := range []fakePod{
		{name: "own", ip: "10.0.0.1"}, {name: "other", ip: "10.0.0.2"}, {name: "late", unplaced: true}, {name: "six", ip: "fd00::1"},
		{name: "crashes", ip: "10.0.0.3", ended: true}, {name: "drains", ip: "10.0.0.4", deleting: true},
		{name: "gone", ip: "10.0.0.5", deleting: true, ended: true}, {name: "failed", ip: "10.0.0.6", phase: "Failed"},
	} {
		pod.uid = pod.name
		k.setPod(pod)
	}
	pods := func(admin string) *peerPods {
		return newPeerPods(*client, "edge", "app.kubernetes.io/name=router,router-handoff=all", "own", admin)
	}
	p := pods(":8001")
	find := func(want string) {
		t.Helper()
		found, err := p.find(t.Context())
		slices.SortFunc(found, func(a, b peer) int { return strings.Compare(a.name, b.name) })
		if got := fmt.Sprint(found, err); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	const all = "[{crashes 10.0.0.3:8001} {drains 10.0.0.4:8001} {other 10.0.0.2:8001} {six [fd00::1]:8001}]"
	find(all + " <nil>")
	for range 50 { // who asks is gone, mostly while it asks
		p.foundAt = time.Time{}
		p.find(cancelled())
		find(all + " <nil>")
	}
	k.forbid("LIST", "pods")
	find(all + " <nil>")
	p.foundAt = time.Now().Add(-peerListAge)
	find(all + " 403 Forbidden: cannot list resource pods")
	replies := newPeers(p.find).ask(t.Context(), question{method: "GET", path: "/status"})
	if last := replies[len(replies)-1]; len(replies) != 5 || last.name != "other routers" || last.err == nil {
		t.Errorf("%v, want that some are not known", replies)
	}
	if _, err := pods("unix:/s").find(t.Context()); err == nil || err.Error() != "-admin has no port" {
		t.Errorf("error %v without a port", err)
	}
	p.turn <- struct{}{}
	if _, err := p.find(cancelled()); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}

// cancelled returns a context that has ended.
func cancelled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// Routers that share a hand-off find each other by their pods.
func TestRoutersFindEachOther(t *testing.T) {
	w := newGoldenWorld(t)
	w.applyMap(handoffName, nil)
	port := freePort(t)
	var routers []*runningRouter
	for i, name := range []string{"router-a", "router-b"} {
		ip := fmt.Sprint("127.0.0.", 2+i)
		w.setPod(fakePod{name: name, uid: name, ip: ip})
		routers = append(routers, startRouter(t, "-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port, "-configmap", "one,two",
			"-handoff", "all", "-pod-name", name, "-pod-uid", name, "-admin", ip+":"+port))
	}
	for _, r := range routers {
		r.until(t, "/readyz", "^ready\n$")
	}
	routers[1].open(t, "stays")
	routers[0].until(t, "/status?all=1", `"name":"router-a","ready":true.*"name":"router-b","ready":true.*"silent":\[\],"agree":true`)
	routers[0].until(t, "/owner?all=1&namespace=stays", `"sessions":1,"agree":true,"routers":\[\{"name":"router-a".*"sessions":0.*"name":"router-b".*"sessions":1`)
	routers[1].stop()
	routers[0].until(t, "/status?all=1", `"silent":\[\{"name":"router-b","error":"dial tcp 127.0.0.3:`+port+`: connect: connection refused"\}\]`)
}

// A router whose host is gone takes no connection for minutes. Who asks it again and again
// must not have a dial for each question meanwhile.
func TestAskEndsItsDials(t *testing.T) {
	p := newPeers(fixedPeers([]string{fullListener(t).Addr().String()}))
	before := runtime.NumGoroutine()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if replies := p.ask(ctx, question{method: "GET", path: "/status"}); replies[0].err == nil {
			t.Fatalf("%v, want no answer", replies)
		}
		cancel()
	}
	eventually(t, "goroutines above those before", 0, func() int { return max(0, runtime.NumGoroutine()-before) })
}
