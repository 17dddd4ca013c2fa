package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// kindAnswers is an API server that lists each kind as is told, by the last part
// of the path; watches bring what is told for "watch <part>", or nothing.
func kindAnswers(t *testing.T, lists map[string]http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		answer := lists[kind]
		if r.FormValue("watch") != "" {
			answer = lists["watch "+kind]
		}
		switch {
		case r.FormValue("watch") != "" && answer == nil:
			w.Header().Set("Content-Type", "application/json")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case answer == nil:
			fakeKubeSay(403, `{"kind":"Status","message":"not this","reason":"Forbidden","code":403}`, "Content-Type", "application/json")(w, r)
		default:
			w.Header().Set("Content-Type", "application/json")
			answer(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// listOf answers with a list of objects of the kind in the Kubernetes namespace
// "default", each named, with the rest of its JSON.
func listOf(kind string, objects map[string]string) http.HandlerFunc {
	items := []string{}
	for name, rest := range objects {
		items = append(items, fmt.Sprintf(`{"metadata":{"name":%q,"namespace":"default","uid":"u","resourceVersion":"5"},%s}`, name, rest))
	}
	return fakeKubeSay(200, fmt.Sprintf(`{"kind":"%sList","metadata":{"resourceVersion":"7"},"items":[%s]}`, kind, strings.Join(items, ",")))
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
		"nothing, but one": {map[string]http.HandlerFunc{"statefulsets": set(4)}, 503, "no overrides were read yet: ConfigMap default/overwriting: 403 Forbidden: not this"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRouter(t, "-kube", kindAnswers(t, tt.lists))
			waitBody(t, r, "/readyz", tt.status, tt.want+"\n")
		})
	}
}

// TestFollowing: a whole router that is told nothing about its backends finds
// them by the API server, and says what it found.
func TestFollowing(t *testing.T) {
	first := listenLocal(t)
	_, port, err := net.SplitHostPort(first.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	third := listenAt(t, "127.0.0.3:"+port)
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
		"watch configmaps": func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			select {
			case <-edited:
			case <-r.Context().Done():
			}
			fakeKubeOpen(fakeKubeEvent("MODIFIED", `{"kind":"ConfigMap","metadata":{"name":"overwriting","namespace":"default","uid":"u",`+
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
	stamp := r.log.wait(t, "table", 1)["stamp"].(string)
	want := `{"backends":[{"name":"backend-2","ordinal":2,"address":"127.0.0.1:PORT","ready":true,"namespaces":true,"overrides":1,"sessions":1},` +
		`{"name":"backend-3","ordinal":3,"ready":false,"error":"backend-3 is not ready","namespaces":true,"overrides":1,"sessions":0},` +
		`{"name":"backend-4","ordinal":4,"address":"127.0.0.3:PORT","ready":true,"namespaces":true,"overrides":2,"sessions":2}],"stamp":"` + stamp + `","table":"5"}` + "\n"
	if want := strings.ReplaceAll(want, "PORT", port); body != want {
		t.Errorf("/backends is\n%s, want\n%s", body, want)
	}
	files, err := openFiles()
	if err != nil {
		t.Fatal(err)
	}
	waitMetrics(t, r, map[string]float64{`router_descriptors{kind="limit"}`: float64(files - notForClients(3))})

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
	waitMetrics(t, r, map[string]float64{`router_upgrades_waiting`: 1, `router_sessions{backend="backend-4"}`: 2})
	begun := time.Now()
	close(edited)
	if err := <-opened; err != nil || time.Since(begun) > 5*time.Second {
		t.Errorf("%v after %v, want a session at once after the edit", err, time.Since(begun))
	}
	waitMetrics(t, r, map[string]float64{`router_sessions_total{backend="backend-4"}`: 3})
}

// listenAt listens until the test ends.
func listenAt(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// A backend beyond the last is listed for as long as it has sessions.
func TestBackendsShowsWhatIsLeft(t *testing.T) {
	a, update := adminOf(t, listenLocal(t).Addr().String(), listenLocal(t).Addr().String())
	resp := answered(a, "/backends")
	if resp.StatusCode != 503 {
		t.Errorf("status %s without a table, want 503", resp.Status)
	}
	update(entries{version: "1"})
	a.proxy.relay.byBackend[1] = backendCount{open: 3, total: 5}
	a.proxy.relay.byBackend[7] = backendCount{open: 0, total: 5}
	a.proxy.router.resize(ordinals{0, 1}, "")
	var got struct{ Backends []backendState }
	if err := json.NewDecoder(answered(a, "/backends").Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if all := got.Backends; len(all) != 2 || !all[0].Namespaces || all[1].Name != "backend-1" || all[1].Namespaces || all[1].Sessions != 3 {
		t.Errorf("backends %+v, want backend-0, and backend-1 with 3 sessions only", got.Backends)
	}
}
