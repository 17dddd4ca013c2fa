//go:build controlplane

package e2e

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestFaultConnectionLost loses all packets of the connection that the
// watch has, and no others. HTTP/2's pings notice, and a new one must be made.
func TestFaultConnectionLost(t *testing.T) {
	r := newRig(t)
	pod := r.pod()
	trial := r.try(pod)
	r.loseConnections(pod, r.address)
	noticed := pod.logs(t, 21*time.Second, `"msg":"watch failed`)
	t.Logf("noticed in %.1f s", noticed.Seconds())
	trial.recovered(2 * time.Second)
}

// TestFaultAllPacketsLost loses all packets between routers and API server.
func TestFaultAllPacketsLost(t *testing.T) {
	r := newRig(t)
	pod := r.pod()
	trial := r.try(pod)
	heal := r.loseAll()
	noticed := pod.logs(t, 21*time.Second, `"msg":"watch failed`)
	pod.logs(t, 10*time.Second, failedWith("dial"))
	t.Logf("noticed in %.1f s", noticed.Seconds())
	trial.stands()
	heal()
	trial.recovered(22500 * time.Millisecond)
}

// TestFaultOverridesRecreatedUnseen deletes the overrides and makes them again
// while the router cannot hear of it.
func TestFaultOverridesRecreatedUnseen(t *testing.T) {
	r := newRig(t)
	g := newGate(t, r.address)
	pod := r.inPod(r.newFiles(), g.addr)
	pod.awaitReady(t)
	trial := r.try(pod)
	g.cut(true)
	pod.logs(t, 5*time.Second, `"msg":"watch failed`)
	trial.stands()
	if err := r.client.CoreV1().ConfigMaps(r.namespace).Delete(t.Context(), configMap, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.restoreOverrides(t.Context(), startOverrides()); err != nil {
		t.Fatal(err)
	}
	g.cut(false)
	trial.recovered(10 * time.Second)
}

// TestFaultCutEvery3Seconds has a load balancer that ends each stream after
// three seconds. Writes still arrive, at the latest with the next LIST, and the
// router does not ask more often than that.
func TestFaultCutEvery3Seconds(t *testing.T) {
	const during = 12 * time.Second
	r := newRig(t)
	g := newGate(t, r.address)
	pod := r.inPod(r.newFiles(), g.addr)
	pod.awaitReady(t)
	trial := r.try(pod)
	before := g.live(3 * time.Second)
	g.cut(false)
	began, writes := time.Now(), 0
	for ; time.Since(began) < during; writes++ {
		took := trial.followed(trial.write(), 22500*time.Millisecond)
		t.Logf("a write between the cuts arrived in %.2f s", took[0].Seconds())
		until(t.Context(), 4*time.Second)
	}
	accepted, took := g.live(0)-before, time.Since(began)
	// Two for each stream, with its LIST, and one for the Event about each write.
	if most := 2*int(1+took/(3*time.Second)) + writes; accepted > most {
		t.Errorf("%d connections in %s, want at most %d", accepted, took, most)
	}
	trial.recovered(22500 * time.Millisecond)
	t.Logf("%d connections in %.0f s", accepted, took.Seconds())
}

// detour is a proxy in front of kubectl proxy that changes what the router asks
// for, so that the API server itself answers what it answers to such requests.
type detour struct {
	*httptest.Server
	change atomic.Pointer[func(*http.Request)]
}

// newDetour starts a detour that changes nothing yet.
func newDetour(t *testing.T, proxy string) *detour {
	t.Helper()
	d := &detour{}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: proxy})
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if change := d.change.Load(); change != nil {
			(*change)(req)
		}
		to.ServeHTTP(w, req)
	}))
	t.Cleanup(func() {
		d.CloseClientConnections()
		d.Close()
	})
	return d
}

// use changes requests from now on, and cuts the stream.
func (d *detour) use(change func(*http.Request)) {
	d.change.Store(&change)
	d.CloseClientConnections()
}

// asks returns a change of the WATCH, or else the LIST, to other parameters.
func asks(watch bool, with url.Values) func(*http.Request) {
	return func(req *http.Request) {
		query := req.URL.Query()
		if query.Has("watch") != watch {
			return
		}
		for name, values := range with {
			query[name] = values
		}
		req.URL.RawQuery = query.Encode()
	}
}

// TestFaultUnexpectedAnswers has the API server answer 410 as an event in a 200, 410 as a
// status, an ERROR of another code in a 200, a 500 to a resourceVersion that is
// none, and 404 to a path that it does not know. If it is only the WATCH that
// gets the answer, writes arrive with the LISTs.
func TestFaultUnexpectedAnswers(t *testing.T) {
	r := newRig(t)
	proxy := freeAddress(t)
	r.kubectlProxy(proxy)
	for name, fault := range map[string]struct {
		class  string
		watch  bool
		change func(*http.Request)
	}{
		"410 in a stream": {"gone", true, asks(true, url.Values{"resourceVersion": {"1"}})},
		"410": {"gone", false, asks(false, url.Values{
			"resourceVersionMatch": {"Exact"}, "resourceVersion": {r.compact()}})},
		"500 in a stream": {"internal_server_error", true, asks(true, url.Values{
			"sendInitialEvents": {"true"}, "resourceVersionMatch": {"NotOlderThan"}})},
		"500": {"internal_server_error", true, asks(true, url.Values{"resourceVersion": {"abc"}})},
		"404": {"not_found", false, func(req *http.Request) { req.URL.Path = "/apis/nope/v1/x" }},
	} {
		t.Run(name, func(t *testing.T) {
			r := r.within(t)
			d := newDetour(t, proxy)
			s := r.laptop(d.Listener.Addr().String())
			trial := r.try(s)
			d.use(fault.change)
			s.logs(t, 5*time.Second, failedWith(fault.class))
			if fault.watch {
				took := trial.followed(trial.write(), 22500*time.Millisecond)
				t.Logf("a write arrived with a LIST in %.2f s", took[0].Seconds())
			} else {
				trial.stands()
			}
			d.use(func(*http.Request) {})
			trial.recovered(22500 * time.Millisecond)
		})
	}
}

// compact makes etcd forget the past, and returns a version that it has
// forgotten.
func (p *plane) compact() string {
	p.t.Helper()
	old, err := p.overrides(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.restoreOverrides(p.t.Context(), map[string]string{kept: "backend-2"}); err != nil {
		p.t.Fatal(err)
	}
	if err := p.restoreOverrides(p.t.Context(), startOverrides()); err != nil {
		p.t.Fatal(err)
	}
	now, err := p.overrides(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	p.etcd("kv/compaction", map[string]string{"revision": now.ResourceVersion})
	return old.ResourceVersion
}
