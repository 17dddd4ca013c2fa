package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// TestRunDrainsOnFailure: a listener that fails ends the program with its
// error, after the same orderly stop.
func TestRunDrainsOnFailure(t *testing.T) {
	log := newLogTail()
	args := []string{"-backends", echoBackends(t, 1), "-kube", "none", "-overrides", t.TempDir(), "-drain-duration", "0", "-log-format", "json"}
	c, err := parseConfig(args, noEnvironment, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	logger := newLogger(log, c.logFormat, c.logLevel)
	p, err := newProgram(c, noEnvironment, newLogQueue(io.Discard), logger)
	if err != nil {
		t.Fatal(err)
	}
	front, side := listenLocal(t), listenLocal(t)
	front.Close()
	err = p.serve(t.Context(), front, side)
	if !errors.Is(err, net.ErrClosed) || exitCode(err) != 1 {
		t.Errorf("error %v with exit code %d, want that of the closed listener and 1", err, exitCode(err))
	}
	if len(log.all("stopped")) != 1 {
		t.Error("no line with msg=stopped in the log, want an orderly stop")
	}
}

// TestRunWithoutOverrides: -kube none alone means that there are none, so the hash gives
// each namespace its owner.
func TestRunWithoutOverrides(t *testing.T) {
	r := startRouter(t, "-backends", echoBackends(t, 3), "-kube", "none")
	if line := r.log.wait(t, "routing table updated", 1); line["overrides"] != 0.0 || line["backends"] != 3.0 {
		t.Errorf("%v, want 3 backends and no overrides", line)
	}
	for _, namespace := range []string{hashedTo(t, "a", 0, 3), hashedTo(t, "b", 2, 3)} {
		ws, err := websocket.Dial("ws://"+r.clientAddr+"/ws/"+namespace, "", "http://origin.example/")
		must(t, err)
		defer ws.Close()
		sayAndHear(t, ws, "hello")
		if _, body := r.get(t, "/owner?namespace="+namespace); !strings.Contains(body, `"why":"hash"`) {
			t.Errorf("/owner is %s", body)
		}
	}
	waitMetrics(t, r, map[string]float64{`router_sessions{backend="backend-0"}`: 1, `router_sessions{backend="backend-2"}`: 1})
}

// TestRunAnyRoom: two spellings of a room are with one owner, and an override of it, whose
// key is escaped, moves both. So in all forms of a path and a query.
func TestRunAnyRoom(t *testing.T) {
	for name, tt := range map[string]struct{ flags, first, second string }{
		"path":  {"-route /d/{namespace}/ws", "/d/my%20caf%C3%A9/ws", "/d/m%79%20caf%c3%a9/ws/deep"},
		"query": {"-namespace-from query:doc", "/any?doc=my%20caf%C3%A9", "/other?x&doc=m%79+caf%c3%a9"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := overridesDir(t, map[string]string{"my_x20caf_xC3_xA9": "backend-1"})
			args := append([]string{"-backends", echoBackends(t, 3), "-overrides", dir, "-move-settle", "0"}, strings.Fields(tt.flags)...)
			r := startRouter(t, args...)
			r.log.wait(t, "routing table updated", 1)
			for _, path := range []string{tt.first, tt.second} {
				ws, err := websocket.Dial("ws://"+r.clientAddr+path, "", "http://origin.example/")
				must(t, err)
				defer ws.Close()
				sayAndHear(t, ws, "hello")
			}
			waitMetrics(t, r, map[string]float64{`router_sessions{backend="backend-1"}`: 2})
			must(t, os.WriteFile(filepath.Join(dir, "my_x20caf_xC3_xA9"), []byte("backend-2"), 0o644))
			if line := r.log.wait(t, "session ended", 2); line["namespace"] != "my café" || line["backend"] != "backend-1" || line["cause"] != "moved" {
				t.Errorf("%v, want a session of my café that was moved", line)
			}
			_, body := r.get(t, "/owner?namespace=my+caf%C3%A9")
			if !strings.HasPrefix(body, `{"namespace":"my café","key":"my_x20caf_xC3_xA9","owner":"backend-2","why":"override"`) {
				t.Errorf("/owner is %s", body)
			}
		})
	}
}

// With -namespace-from=host, a key that no host name can have is rejected, and /owner
// says of each name what its clients find.
func TestRunNamespaceFromHost(t *testing.T) {
	tenant, dotted := hashedTo(t, "tenant", 0, 2), hashedTo(t, "dotted", 0, 2)
	upper := strings.ToUpper(tenant)
	dir := overridesDir(t, map[string]string{"ns-01": "backend-1", "under_score": "backend-1", upper: "backend-1", dotted + ".name": "backend-1",
		strings.Repeat("a", 64): "backend-1"})
	r := startRouter(t, "-backends", echoBackends(t, 2), "-overrides", dir, "-namespace-from", "host")
	line := r.log.wait(t, "routing table updated", 1)
	if line["invalid"] != 3.0 || line["overrides"] != 2.0 {
		t.Errorf("%v, want 3 invalid overrides", line)
	}
	bad := r.log.wait(t, "override rejected", 3)
	if bad["expected"] != expectedHostNamespace("") || bad["in_force"] != "none" {
		t.Errorf("%v", bad)
	}
	waitMetrics(t, r, map[string]float64{`router_table_invalid_overrides{source="directory ` + dir + `"}`: 3})
	for i, one := range []struct{ host, asked, namespace, owner, why string }{
		{"NS-01.mydomain.com", "NS-01", "ns-01", "backend-1", "override"},
		{upper + ".mydomain.com", upper, tenant, "backend-0", "hash"},
		{dotted + ".name.mydomain.com", dotted, dotted, "backend-0", "hash"},
		{"under_score.mydomain.com", "under_score", "under_score", "backend-1", "override"},
	} {
		r.sayToHost(t, one.host)
		if ended := r.log.wait(t, "session ended", i+1); ended["namespace"] != one.namespace || ended["backend"] != one.owner {
			t.Errorf("%s: %v, want it of %s with %s", one.host, ended, one.namespace, one.owner)
		}
		status, body := r.get(t, "/owner?namespace="+one.asked)
		var o ownership
		if err := json.Unmarshal([]byte(body), &o); err != nil || status != 200 || o.Namespace != one.namespace || o.Owner != one.owner || o.Why != one.why {
			t.Errorf("/owner of %s is %d %s, want %s with %s", one.asked, status, body, one.namespace, one.owner)
		}
		if one.asked == upper && (len(o.Rejected) != 1 || o.Rejected[0].Key != upper || o.Rejected[0].Expected != expectedHostNamespace("")) {
			t.Errorf("/owner of %s is %s, want the key that is rejected", one.asked, body)
		}
	}
	for _, namespace := range []string{dotted + ".name", strings.Repeat("a", 64), ".."} {
		status, body := r.get(t, "/owner?namespace="+namespace)
		var no struct{ Error string }
		if err := json.Unmarshal([]byte(body), &no); err != nil || status != 400 || !strings.Contains(no.Error, " must be "+expectedHostNamespace(namespace)+" (got ") {
			t.Errorf("/owner of %s is %d %s, want 400 with %s", namespace, status, body, expectedHostNamespace(namespace))
		}
	}
}

// sayToHost opens a session by the host's name, and ends it.
func (r *runningRouter) sayToHost(t *testing.T, host string) {
	t.Helper()
	config, err := websocket.NewConfig("ws://"+host+"/any/path", "http://origin.example/")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", r.clientAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		t.Fatal(err)
	}
	sayAndHear(t, ws, "hello")
	ws.Close()
}

func TestRunTimeFailures(t *testing.T) {
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	addr := taken.Listener.Addr().String()
	tests := map[string]struct{ args, want string }{
		"front port taken": {"-listen " + addr, "-listen: listen tcp " + addr + ": bind: address already in use"},
		"admin port taken": {"-listen 127.0.0.1:0 -admin " + addr, "-admin: listen tcp " + addr + ": bind: address already in use"},
		"no address":       {"-listen 8000", "-listen: listen tcp: address 8000: missing port in address"},
		"no folder":        {"-listen unix:/nowhere/s", "-listen: listen unix /nowhere/s: bind: no such file or directory"},
		"no cluster":       {"-kube in-cluster", "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the router does not run in a pod"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := run(t.Context(), append([]string{"-replicas", "1"}, strings.Fields(tt.args)...), noEnvironment, io.Discard)
			if err == nil || err.Error() != tt.want || exitCode(err) != 1 {
				t.Errorf("error:\n%v\nwith exit code %d, want 1 and:\n%s", err, exitCode(err), tt.want)
			}
		})
	}
}

func TestRunIdleTimeout(t *testing.T) {
	r := startRouter(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir(), "-idle-timeout", "1s")
	r.log.wait(t, "routing table updated", 1)
	r.open(t, "ns-01")
	if line := r.log.wait(t, "session ended", 1); line["cause"] != "idle" || line["seconds"].(float64) < 1 {
		t.Errorf("ended with cause %v after %v s, want idle after 1 s", line["cause"], line["seconds"])
	}
	waitMetrics(t, r, map[string]float64{`router_sessions_ended_total{cause="idle"}`: 1})
}

// TestFollowing: a whole router without flags for its backends finds
// them by the API server, and says what it found.
func TestFollowing(t *testing.T) {
	port := freePort(t)
	first, third := listenAt(t, "127.0.0.1:"+port), listenAt(t, "127.0.0.3:"+port)
	for _, l := range []net.Listener{first, third} {
		s := httptest.NewUnstartedServer(websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(ws, ws) }})
		s.Listener.Close()
		s.Listener = l
		s.Start()
		t.Cleanup(s.Close)
	}
	endpoints := `"addressType":"IPv4","endpoints":[{"hostname":"backend-2","addresses":["127.0.0.1"]},
		{"hostname":"backend-3","addresses":["127.0.0.2"],"conditions":{"ready":false}},{"hostname":"backend-4","addresses":["127.0.0.3"]}]`
	edited := make(chan struct{})
	r := startRouter(t, "-backend-port", port, "-kube", kindAnswers(t, map[string]http.HandlerFunc{
		"WATCH configmaps": func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			select {
			case <-edited:
			case <-r.Context().Done():
			}
			openStream(watchEvent("MODIFIED", `{"kind":"ConfigMap","metadata":{"name":"overwriting","namespace":"default","uid":"u",`+
				`"resourceVersion":"8"},"data":{"a":"backend-2","b":"backend-4","c":"backend-4","d":"backend-4"}}`))(w, r)
		},
		"configmaps": listOf("ConfigMap", map[string]string{"overwriting": `"data":{"a":"backend-2","b":"backend-3","c":"backend-4","d":"backend-4","e":"backend-5"}`}),
		"statefulsets": listOf("StatefulSet", map[string]string{
			"backend": `"spec":{"replicas":3,"ordinals":{"start":2}}`}),
		"endpointslices": listOf("EndpointSlice", map[string]string{"headless-x": endpoints}),
	}))
	waitBody(t, r, "/readyz", 200, "ready\n")
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		if _, body := r.get(t, "/metrics"); strings.Contains(body, `router_backend_ready{backend="backend-3"} 0`) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the EndpointSlices are not heard")
		}
	}
	r.open(t, "a")
	r.open(t, "c")
	r.open(t, "d")
	waitMetrics(t, r, map[string]float64{`router_sessions{backend="backend-2"}`: 1, `router_sessions{backend="backend-3"}`: 0,
		`router_sessions{backend="backend-4"}`: 2, `router_table_backends`: 3, `router_statefulset_replicas`: 3,
		`router_backend_ready{backend="backend-2"}`: 1, `router_backend_ready{backend="backend-3"}`: 0,
		`router_watch_info{object="EndpointSlice default/kubernetes.io/service-name=headless",protocol="HTTP/1.1"}`: 1,
		`router_watch_info{object="StatefulSet default/backend",protocol="HTTP/1.1"}`:                               1})
	_, body := r.get(t, "/backends")
	stamp := r.log.wait(t, "routing table updated", 1)["stamp"].(string)
	want := `{"router":"router-x","overrides_version":"5","stamp":"` + stamp + `","backends":[{"name":"backend-2","ordinal":2,"address":"127.0.0.1:PORT","ready":true,"in_table":true,"overrides":1,"sessions":1,"safe_to_remove":false},` +
		`{"name":"backend-3","ordinal":3,"ready":false,"error":"backend-3 is not ready","in_table":true,"overrides":1,"sessions":0,"safe_to_remove":false},` +
		`{"name":"backend-4","ordinal":4,"address":"127.0.0.3:PORT","ready":true,"in_table":true,"overrides":2,"sessions":2,"safe_to_remove":false}]}` + "\n"
	if want := strings.ReplaceAll(want, "PORT", port); body != want {
		t.Errorf("/backends is\n%s, want\n%s", body, want)
	}
	files, err := openFileLimit()
	if err != nil {
		t.Fatal(err)
	}
	waitMetrics(t, r, map[string]float64{`router_client_descriptors_limit`: float64(files - internalDescriptors(3))})

	// A client of a backend that is not ready is held, until an edit gives its
	// namespace to another.
	opened := make(chan error)
	go func() {
		ws, err := websocket.Dial(r.ws+"b", "", "http://origin.example/")
		if err == nil {
			defer ws.Close()
			err = websocket.Message.Send(ws, "hello")
		}
		opened <- err
	}()
	waitMetrics(t, r, map[string]float64{`router_pending_upgrades`: 1, `router_sessions{backend="backend-4"}`: 2})
	begun := time.Now()
	close(edited)
	if err := <-opened; err != nil || time.Since(begun) > 5*time.Second {
		t.Errorf("%v after %v, want a session at once after the edit", err, time.Since(begun))
	}
	waitMetrics(t, r, map[string]float64{`router_sessions_opened_total{backend="backend-4"}`: 3})
}
