package main

import (
	"cmp"
	"crypto/tls"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What a control plane, or the way to it, can do is numbered. The tests of this
// repository that show one have its number: TestWatchFault<number>..., and the
// table below. 10 is also 11, 35 and 41, 13 is 14, 18 is 21, 22 is 21 too, 7 is
// 39, 36 is 35, 44 is 45; 31 is TestTableKeeps, 32 BenchmarkSwap and
// TestMemoryOfAMillion. A real control plane is needed to see 8 (it stops
// gracefully), 38 (it drops a slow reader), 42 (the router is stopped) and 43
// (kubectl proxy refuses a Host), and that it does what the others say it does.

// fault is what goes wrong after version 1 was applied, if not stated otherwise,
// and how version 2 comes to be applied.
type fault struct {
	lists, watches fakeKubeScript     // the first LIST and the last WATCH are added
	during         func(*fakeKubeNet) // is called when version 1 is applied
	want           []string           // what is applied then; version 2 if nil
	least, most    time.Duration      // when; from version 1
	class          string             // of the failure in the log, "" if there must be none
	lines          int                // of failures in the log, at most; 1 if 0
}

// fakeKubeFor answers like f until the time is over, then like then.
func fakeKubeFor(d time.Duration, f, then http.HandlerFunc) fakeKubeScript {
	var begun time.Time
	return slices.Repeat(fakeKubeScript{func(w http.ResponseWriter, r *http.Request) {
		if begun.IsZero() {
			begun = time.Now()
		}
		if time.Since(begun) > d {
			f = then
		}
		f(w, r)
	}}, 1000)
}

func watchFaults() map[string]fault {
	const s, ms = time.Second, time.Millisecond
	const once = backoffFirst * 3 / 2 // the longest first pause
	two := fakeKubeLists(2)[1]
	said := func(status string) fakeKubeScript {
		return fakeKubeScript{fakeKubeOpen(fakeKubeEvent("ERROR", `{"kind":"Status","metadata":{},`+status+`}`))}
	}
	text := func(code int, body, after string) http.HandlerFunc {
		return fakeKubeSay(code, body, "Content-Type", "text/plain", "Retry-After", after)
	}
	ends := fakeKubeScript{fakeKubeStream()}
	big := strings.Replace(fakeKubeEvent("MODIFIED", fakeKubeV(9)), "backend-9", strings.Repeat("x", maxObject), 1)
	recreated := fakeKubeEvent("ADDED", fakeKubeObject("u2", "0", "backend-2"))
	downFor := func(flag func(*fakeKubeNet, bool), d time.Duration) func(*fakeKubeNet) {
		return func(n *fakeKubeNet) {
			flag(n, true)
			time.AfterFunc(d, func() { flag(n, false) })
		}
	}
	down := func(n *fakeKubeNet, on bool) { n.down.Store(on) }
	hole := func(n *fakeKubeNet, on bool) { n.hole.Store(on) }
	return map[string]fault{
		"02 410 as an event": {watches: said(`"message":"too old resource version: 226 (349)","reason":"Expired","code":410`), most: once, class: "gone"},
		"03 410 as a status": {watches: fakeKubeScript{fakeKubeSay(410, `{"reason":"Expired"}`)}, most: once, class: "gone"},
		"03 410 of a LIST":   {watches: ends, lists: fakeKubeScript{fakeKubeSay(410, `{"reason":"Expired"}`)}, most: 2500 * ms, class: "gone"},
		"04 500 as an event": {watches: said(`"message":"RequestWatchProgress is disabled","reason":"InternalError","code":500`), most: once, class: "internal_server_error"},
		"04 429 as an event": {watches: said(`"code":429,"details":{"retryAfterSeconds":5}`), least: 5 * s, most: 6 * s, class: "too_many_requests"},
		"05 version from the future": {watches: fakeKubeScript{fakeKubeLast(20*s, false)}, lists: fakeKubeScript{fakeKubeList("3", fakeKubeV(0))},
			want: []string{"0 map[ns-01:backend-0]"}, most: 20*s + once},
		"06 garbage as version": {watches: fakeKubeScript{fakeKubeSay(500, `{"message":"strconv.ParseUint: parsing \"abc\""}`)}, most: once, class: "internal_server_error"},
		"07 killed":             {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(down, 20*s), least: 20 * s, most: 20*s + backoffMost*3/2, class: "cut", lines: 2},
		"07 gone for an hour": {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(down, time.Hour), least: time.Hour,
			most: time.Hour + backoffMost*3/2, class: "cut", lines: 62},
		"09 graceful stop with Retry-After": {watches: ends, lists: fakeKubeScript{text(429, "no", "5"), text(429, "no", "5")}, least: 10 * s, most: 13 * s, class: "too_many_requests"},
		"12 blackhole":                      {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(hole, time.Minute), least: time.Minute, most: time.Minute + 5*s + backoffMost*3/2, class: "cut", lines: 3},
		"15 etcd is dead":                   {watches: ends, lists: fakeKubeScript{fakeKubeHang, fakeKubeHang, fakeKubeHang}, least: 3 * listTime, most: 3*listTime + 12*s, class: "timeout"},
		"16 flow control":                   {watches: ends, lists: fakeKubeScript{text(429, "Too many requests, please try again later.", "8")}, least: 8 * s, most: 10500 * ms, class: "too_many_requests"},
		"17 503":                            {watches: ends, lists: fakeKubeScript{fakeKubeSay(503, "", "Retry-After", "1")}, least: s, most: 2500 * ms, class: "service_unavailable"},
		"18 401 for a minute":               {watches: ends, lists: fakeKubeFor(time.Minute, fakeKubeSay(401, `{"message":"Unauthorized"}`), two), least: time.Minute, most: time.Minute + 24*s, class: "unauthorized", lines: 2},
		"19 403 for an hour":                {watches: ends, lists: fakeKubeFor(time.Hour, fakeKubeSay(403, `{"reason":"Forbidden"}`), two), least: time.Hour, most: time.Hour + 24*s, class: "forbidden", lines: 61},
		"26 recreated with a smaller version": {watches: fakeKubeScript{fakeKubeOpen(fakeKubeEvent("DELETED", fakeKubeV(7)), recreated)},
			want: []string{"none", "0 map[ns-01:backend-2]"}},
		"27 recreated while away": {watches: fakeKubeScript{fakeKubeCut()}, lists: fakeKubeScript{fakeKubeList("1", fakeKubeObject("u2", "1", "backend-2"))},
			want: []string{"1 map[ns-01:backend-2]"}, most: once, class: "cut"},
		"30 over the cap":         {watches: fakeKubeScript{fakeKubeOpen(big)}, most: once, class: "too_big"},
		"33 half an event":        {watches: fakeKubeScript{fakeKubeCut(big[:1000])}, most: once, class: "cut"},
		"34 HTML":                 {watches: ends, lists: fakeKubeScript{fakeKubeSay(200, "<html>", "Content-Type", "text/html")}, most: 2500 * ms, class: "bad_answer"},
		"37 GOAWAY":               {watches: fakeKubeScript{goAway}, least: 30 * s, most: 30 * s},
		"40 proxy without server": {watches: ends, lists: fakeKubeScript{text(500, "dial tcp 127.0.0.1:6443: connect: connection refused", "")}, most: 2500 * ms, class: "internal_server_error"},
		"46 no namespace":         {watches: append(ends, ends...), lists: fakeKubeScript{fakeKubeList("102")}, want: []string{"none", fakeKube2}, most: 3 * s},
		"47 404":                  {watches: ends, lists: fakeKubeScript{text(404, "404 page not found\n", "")}, most: 2500 * ms, class: "not_found"},
	}
}

// goAway says with the head that the connection ends, and brings version 2 after
// that.
func goAway(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close") // HTTP/2: GOAWAY
	fakeKubeStream()(w, r)
	time.Sleep(30 * time.Second)
	fakeKubeOpen(fakeKubeEvent("MODIFIED", fakeKubeV(2)))(w, r)
}

func TestWatchFault(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	for name := range watchFaults() {
		for proto, certificates := range map[string][]tls.Certificate{"HTTP/2": {certificate}, "HTTP/1.1": nil} {
			t.Run(name+" "+proto, func(t *testing.T) {
				f := watchFaults()[name] // of its own: it has state
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					lists := append(append(fakeKubeLists(1), f.lists...), fakeKubeLists(2)[1])
					server := newFakeKube(t, network, lists, append(f.watches, fakeKubeOpen()), certificates...)
					k := network.kube(t)
					if certificates != nil {
						k = fakeKubePod(t, "127.0.0.1", "6443", ca)
						k.dial = network.dial
					}
					c := fakeKubeFollow(t, k)
					c.want(t, fakeKube1)
					if f.during != nil {
						f.during(network)
					}
					f.check(t, c)
					wantFreshVersions(t, server)
				})
			})
		}
	}
}

// check waits for what is to be applied, and holds when, and what the log says.
func (f fault) check(t *testing.T, c *fakeKubeClient) {
	t.Helper()
	begun := time.Now()
	time.Sleep(max(0, f.least-time.Millisecond))
	c.wantNothing(t)
	if f.want == nil {
		f.want = []string{fakeKube2}
	}
	c.want(t, f.want...)
	if took := time.Since(begun); took > f.most+time.Millisecond {
		t.Errorf("took %s, want at most %s", took, f.most)
	}
	time.Sleep(time.Minute)
	c.wantNothing(t)
	if s := c.now(); s.fails != 0 || s.failure != nil || s.state != stateWatching {
		t.Errorf("a minute later: %+v", s)
	}
	n := c.logged.count("watch failed")
	if f.class == "" && n > 0 || f.class != "" && (n == 0 || n > cmp.Or(f.lines, 1) || !strings.Contains(c.logged.String(), "class="+f.class+" ")) {
		t.Errorf("%d failures logged, want some of class %q, at most %d:\n%.3000s", n, f.class, cmp.Or(f.lines, 1), c.logged)
	}
	if again := c.logged.count("works again"); (again == 1) != (n > 0) {
		t.Errorf("it was said %d times to work again:\n%.3000s", again, c.logged)
	}
}

// wantFreshVersions checks that no LIST had a resourceVersion, and that each
// WATCH came after a LIST and not after a WATCH.
func wantFreshVersions(t *testing.T, server *fakeKube) {
	t.Helper()
	for last := ""; len(server.arrived) > 0; {
		r := server.request(t)
		version := r.URL.Query().Get("resourceVersion")
		if r.verb() == "LIST" && version != "" || r.verb() == "WATCH" && (version == "" || last != "LIST") {
			t.Errorf("%s with the resourceVersion %q after %q", r.verb(), version, last)
		}
		last = r.verb()
	}
}

// An API server that starts answers 403 to those who may (fault 20): with
// nothing ever applied too, it is asked again.
func TestWatchFault20ForbiddenAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		no := fakeKubeSay(403, `{"message":"configmaps is forbidden","reason":"Forbidden","code":403}`)
		newFakeKube(t, network, append(fakeKubeScript{no, no, no}, fakeKubeLists(1)...), fakeKubeScript{fakeKubeOpen()})
		c := fakeKubeFollow(t, network.kube(t))
		begun := time.Now()
		c.want(t, fakeKube1)
		if took := time.Since(begun); took > 6*time.Second {
			t.Errorf("took %s", took)
		}
	})
}
