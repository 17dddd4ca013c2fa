package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRetryDelay(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	for name, c := range map[string]struct {
		fails    int
		asked    time.Duration
		min, max time.Duration
	}{
		"healthy":                      {0, 0, 0, 500 * ms},
		"first failure":                {1, 0, 250 * ms, 750 * ms},
		"second":                       {2, 0, 500 * ms, 1500 * ms},
		"third":                        {3, 0, s, 3 * s},
		"fifth":                        {5, 0, 4 * s, 12 * s},
		"sixth is at the cap":          {6, 0, 7500 * ms, 22500 * ms},
		"thousandth":                   {1000, 0, 7500 * ms, 22500 * ms},
		"asked for more":               {1, 5 * s, 5 * s, 6 * s},
		"asked for more, healthy":      {0, 5 * s, 5 * s, 6 * s},
		"asked for less":               {6, s, 7500 * ms, 22500 * ms},
		"asked for what is in between": {6, 10 * s, 10 * s, 22500 * ms},
		"asked for something negative": {1, -5 * s, 250 * ms, 750 * ms},
		"asked for the most there is":  {3, 60 * s, 60 * s, 72 * s},
	} {
		t.Run(name, func(t *testing.T) {
			low, high := time.Hour, time.Duration(0)
			for i := range 1000 {
				wait := retryDelay(c.fails, c.asked, float64(i)/1000)
				low, high = min(low, wait), max(high, wait)
			}
			if low < c.min || high > c.max {
				t.Errorf("from %s to %s, want %s to %s", low, high, c.min, c.max)
			}
			if spread := high - low; spread < (c.max-c.min)*9/10 && c.asked != 10*s {
				t.Errorf("spread over %s of %s only", spread, c.max-c.min)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	for asked, want := range map[int]time.Duration{0: 0, 7: 7 * time.Second, 61: time.Minute, math.MaxInt: time.Minute} {
		s := &statusError{}
		s.Details.RetryAfterSeconds = asked
		if got := retryAfter(fmt.Errorf("list: %w", s)); got != want {
			t.Errorf("%d: %s, want %s", asked, got, want)
		}
	}
}

func TestErrorClass(t *testing.T) {
	unmarshal := func(text string) error { return json.Unmarshal([]byte(text), &apiObject{}) }
	tests := []struct {
		err  error
		want string
	}{
		{nil, "none"},
		{&statusError{Code: 401}, "unauthorized"}, {&statusError{Code: 403}, "forbidden"}, {&statusError{Code: 404}, "not_found"},
		{&statusError{Code: 410}, "gone"}, {&statusError{Code: 429}, "too_many_requests"}, {&statusError{Code: 500}, "internal_server_error"},
		{&statusError{Code: 503}, "service_unavailable"}, {&statusError{Code: 504}, "gateway_timeout"},
		{&statusError{}, "refused"}, {&statusError{Code: 777}, "refused"},
		{errTooBig, "too_big"}, {errBadResponse, "bad_answer"}, {unmarshal("<html>"), "bad_answer"}, {unmarshal(`{"kind":1}`), "bad_answer"},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, "dial"}, {&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, "timeout"},
		{context.DeadlineExceeded, "timeout"}, {&net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}, "tls"},
		{io.ErrUnexpectedEOF, "cut"}, {&net.OpError{Op: "read", Err: errors.New("connection reset by peer")}, "cut"},
	}
	for _, tt := range tests {
		if got := errorClass(tt.err); got != tt.want {
			t.Errorf("%v is %s, want %s", tt.err, got, tt.want)
		}
		if tt.err != nil && errorClass(fmt.Errorf("list: %w", tt.err)) != tt.want {
			t.Errorf("%v within another is not %s", tt.err, tt.want)
		}
	}
}

func TestWatchRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		server := newFakeKube(t, network, fakeKubeLists(3), fakeKubeScript{fakeKubeOpen()})
		c := fakeKubeFollow(t, network.kube(t))
		timeouts := map[string]bool{}
		for cycle := range 10 {
			list := server.request(t)
			const path = "/api/v1/namespaces/edge/configmaps"
			if want := path + "?fieldSelector=metadata.name%3Droutes"; list.RequestURI != want {
				t.Fatalf("LIST %s, want %s", list.RequestURI, want)
			}
			if accept := list.Header.Get("Accept"); accept != "application/json" {
				t.Errorf("Accept: %s", accept)
			}
			watch := server.request(t)
			query := watch.URL.Query()
			timeout, err := strconv.Atoi(query.Get("timeoutSeconds"))
			if err != nil || timeout < 150 || timeout > 210 {
				t.Errorf("timeoutSeconds %q, want 150 to 210", query.Get("timeoutSeconds"))
			}
			timeouts[query.Get("timeoutSeconds")] = true
			query.Del("timeoutSeconds")
			want := fmt.Sprintf("allowWatchBookmarks=true&fieldSelector=metadata.name%%3Droutes&resourceVersion=%d&watch=1", 101+min(cycle, 2))
			if watch.URL.Path != path || query.Encode() != want {
				t.Errorf("WATCH %s?%s, want %s?%s", watch.URL.Path, query.Encode(), path, want)
			}
		}
		if len(timeouts) < 3 {
			t.Errorf("ten cycles had the timeouts %v only", timeouts)
		}
		c.want(t, fakeKube1, fakeKube2, fakeKube3)
		c.wantNothing(t) // eight LISTs told nothing new
		if log := c.logged.String(); log != "" {
			t.Errorf("clean ends were logged:\n%s", log)
		}
	})
}

// After a restored etcd resourceVersions come again, with other content: a router that
// runs has what one has that starts. The same content is not applied again.
func TestWatchSameVersionOtherContent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		list := func(backend string) http.HandlerFunc { return fakeKubeList("12", fakeKubeObject("u1", "12", backend)) }
		newFakeKube(t, network, fakeKubeScript{list("backend-1"), list("backend-2"), list("backend-2")},
			fakeKubeScript{fakeKubeStream(), fakeKubeStream(), fakeKubeOpen()})
		c, r, _ := fakeMaps(t, "routes")
		c.watchers[0].kube = network.kube(t)
		stop := fakeKubeRun(c.watchers[0].run)
		time.Sleep(10 * time.Minute)
		stop()
		wantTable(t, r, "ns-01=2")
		if news := c.watchers[0].changes; news != 2 {
			t.Errorf("%d sets were applied, want 2", news)
		}
	})
}

// So it is with what is read of a StatefulSet and of an EndpointSlice.
func TestWatchComparesAllThatIsRead(t *testing.T) {
	sets, slices := 0, 0
	set := watcher[statefulSet]{meta: func(s *statefulSet) *apiObject { return &s.apiObject }, apply: func(map[string]*statefulSet) { sets++ }}
	slice := watcher[endpointSlice]{meta: func(s *endpointSlice) *apiObject { return &s.apiObject }, apply: func(map[string]*endpointSlice) { slices++ }}
	const meta = `"metadata":{"name":"n","uid":"u","resourceVersion":"1"`
	for _, text := range []string{`},"spec":{"replicas":4}`, `},"spec":{"replicas":3}`, `,"annotations":{"router/backends":"3"}},"spec":{"replicas":3}`} {
		for range 2 {
			var s statefulSet
			if err := json.Unmarshal([]byte("{"+meta+text+"}"), &s); err != nil {
				t.Fatal(err)
			}
			set.setObjects(map[string]*statefulSet{"n": &s})
		}
	}
	for _, addr := range []string{"10.0.0.1", "10.0.0.2"} {
		for range 2 {
			var s endpointSlice
			if err := json.Unmarshal([]byte("{"+meta+`},"endpoints":[{"addresses":["`+addr+`"],"conditions":{"ready":true}}]}`), &s); err != nil {
				t.Fatal(err)
			}
			slice.setObjects(map[string]*endpointSlice{"n": &s})
		}
	}
	if sets != 3 || slices != 2 {
		t.Errorf("%d StatefulSets and %d EndpointSlices were applied, want 3 and 2", sets, slices)
	}
}

func TestWatchFault01NormalEnd(t *testing.T) {
	for name, stream := range map[string]http.HandlerFunc{
		"after a long life":   fakeKubeLast(20*time.Second, false),
		"after a new version": fakeKubeStream(fakeKubeEvent("MODIFIED", fakeKubeV(2))),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				ended := make(chan time.Time, 1)
				server := newFakeKube(t, network, fakeKubeLists(1), fakeKubeScript{
					func(w http.ResponseWriter, r *http.Request) { stream(w, r); ended <- time.Now() }, fakeKubeOpen()})
				c := fakeKubeFollow(t, network.kube(t))
				server.request(t)
				server.request(t)
				again := server.request(t)
				if gap := again.at.Sub(<-ended); again.verb() != "LIST" || gap > 500*time.Millisecond {
					t.Errorf("%s after %s, want a LIST within 500ms", again.verb(), gap)
				}
				if s := c.snapshot(); s.failures != 0 {
					t.Errorf("%d fails, want 0", s.failures)
				}
			})
		})
	}
}

// A load balancer that cuts every stream after 3 s must not make a hot loop, and
// updates must arrive all the same.
func TestWatchFault36CutEveryThreeSeconds(t *testing.T) {
	for name, cut := range map[string]bool{"cleanly": false, "by a reset": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeLists(30), fakeKubeScript{fakeKubeLast(3*time.Second, cut)})
				c := fakeKubeFollow(t, network.kube(t))
				time.Sleep(10 * time.Second)
				first := strings.Count(server.verbs(), "LIST")
				time.Sleep(10 * time.Minute)
				then := strings.Count(server.verbs(), "LIST")
				if first > 5 || then < 20 || then > 60 {
					t.Errorf("%d LISTs in 10 s, then %d in 10 min, want at most 5, then 20 to 60", first, then)
				}
				c.want(t, fakeKube1, fakeKube2, fakeKube3)
				if fails := c.snapshot().failures; fails < 10 {
					t.Errorf("%d fails in a row", fails)
				}
				if n := c.logged.count("works again"); n != 0 {
					t.Errorf("it was said %d times to work again", n)
				}
				if n := c.logged.count("watch failed"); cut && (n < 8 || n > 11) || !cut && n != 0 {
					t.Errorf("%d failures logged, want one a minute if they are any:\n%s", n, c.logged)
				}
			})
		})
	}
}

// Each source of a failure loop backs off alike.
func TestWatchBackOff(t *testing.T) {
	good := fakeKubeList("101", fakeKubeV(1))
	for name, c := range map[string]struct{ list, watch http.HandlerFunc }{
		"LIST refused":              {fakeKubeSay(403, "no"), fakeKubeOpen()},
		"LIST is HTML":              {fakeKubeSay(200, "<html>", "Content-Type", "text/html"), fakeKubeOpen()},
		"WATCH refused":             {good, fakeKubeSay(403, "no")},
		"WATCH ends at once":        {good, fakeKubeStream()},
		"WATCH cut at once":         {good, fakeKubeCut()},
		"WATCH of garbage":          {good, fakeKubeStream("garbage")},
		"WATCH of an ERROR":         {good, fakeKubeStream(fakeKubeEvent("ERROR", `{"code":410}`))},
		"WATCH of what is known":    {good, fakeKubeStream(fakeKubeEvent("ADDED", fakeKubeV(1)))},
		"WATCH of a BOOKMARK":       {good, fakeKubeStream(fakeKubeEvent("BOOKMARK", `{}`))},
		"WATCH of a deleted object": {fakeKubeList("101"), fakeKubeStream(fakeKubeEvent("DELETED", fakeKubeV(1)))},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeScript{c.list}, fakeKubeScript{c.watch})
				client := fakeKubeFollow(t, network.kube(t))
				time.Sleep(10 * time.Second)
				if n := strings.Count(server.verbs(), "LIST"); n > 10 {
					t.Errorf("%d LISTs in the first 10 s, want at most 1/s", n)
				}
				time.Sleep(time.Minute)
				server.verbs()
				time.Sleep(time.Hour)
				if n := strings.Count(server.verbs(), "LIST"); n < 3600/23 || n > 3600/7 {
					t.Errorf("%d LISTs in an hour, want one in 7.5 to 22.5 s", n)
				}
				if n := client.logged.count("level=WARN"); n > 80 {
					t.Errorf("%d warnings in an hour", n)
				}
				if n := client.logged.count("works again"); n > 0 {
					t.Errorf("it was said %d times to work again", n)
				}
			})
		})
	}
}

func TestWatchFailsResetByHealthOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		no := fakeKubeSay(503, "busy", "Content-Type", "text/plain")
		newFakeKube(t, network, append(fakeKubeScript{no, no, no, no}, fakeKubeLists(2)...),
			fakeKubeScript{fakeKubeLast(time.Minute, true), fakeKubeOpen()})
		c := fakeKubeFollow(t, network.kube(t))
		c.want(t, fakeKube1)
		synctest.Wait()
		if s := c.snapshot(); s.failures != 4 || s.failure == nil || s.state != stateWatching {
			t.Errorf("after four failures and a LIST: %+v", s)
		}
		if n := c.logged.count("watch failed"); n != 1 {
			t.Errorf("%d failures logged, want the first only:\n%s", n, c.logged)
		}
		time.Sleep(healthyWatch + time.Millisecond)
		if s := c.snapshot(); s.failures != 0 || s.failure != nil {
			t.Errorf("after %s of a stream: %+v", healthyWatch, s)
		}
		if n := c.logged.count("works again"); n != 1 {
			t.Errorf("it was said %d times to work again, want once:\n%s", n, c.logged)
		}
		begun := time.Now()
		c.want(t, fakeKube2)
		if took := time.Since(begun); took > 51*time.Second {
			t.Errorf("the LIST after a long life came %s late", took-50*time.Second)
		}
		if s := c.snapshot(); s.failures != 0 {
			t.Errorf("a cut after a long life counts as %d failures", s.failures)
		}
	})
}

func TestWatchLogsEachClassOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		var lists fakeKubeScript
		for i := range 4 {
			lists = append(lists, fakeKubeSay(403, "no "+strconv.Itoa(i)))
		}
		for i := range 3 {
			lists = append(lists, fakeKubeSay(410, fmt.Sprintf(`{"message":"too old: %d","reason":"Expired"}`, i)))
		}
		newFakeKube(t, network, append(lists, fakeKubeLists(1)...), fakeKubeScript{fakeKubeOpen()})
		c := fakeKubeFollow(t, network.kube(t))
		for range 4 {
			time.Sleep(time.Minute)
		}
		forbidden, expired := c.logged.count("403 Forbidden"), c.logged.count("410 Expired")
		if forbidden != 1 || expired < 1 || expired > 2 || c.logged.count("works again") != 1 {
			t.Errorf("want each failure once, or after a minute, and the recovery once:\n%s", c.logged)
		}
		if !strings.Contains(c.logged.String(), "omitted=3") {
			t.Errorf("the second failure does not say that three were omitted:\n%s", c.logged)
		}
	})
}

func TestWatchFault34ListMustBeWhole(t *testing.T) {
	good := fakeKubeV(9)
	list := func(meta, items string) http.HandlerFunc {
		return fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+meta+`},"items":[`+items+`]}`)
	}
	const rv = `"resourceVersion":"109"`
	for name, bad := range map[string]http.HandlerFunc{
		"HTML":                 fakeKubeSay(200, "<html>log in</html>", "Content-Type", "text/html; charset=utf-8"),
		"HTML said to be JSON": fakeKubeSay(200, "<html>log in</html>"),
		"text/plain":           fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]}`, "Content-Type", "text/plain"),
		"nothing":              fakeKubeSay(200, ""),
		"204":                  fakeKubeSay(204, ""),
		"null":                 fakeKubeSay(200, "null"),
		"{}":                   fakeKubeSay(200, "{}"),
		"[]":                   fakeKubeSay(200, "[]"),
		"a Status":             fakeKubeSay(200, `{"kind":"Status","metadata":{},"status":"Success"}`),
		"a ConfigMap":          fakeKubeSay(200, good),
		"another kind":         fakeKubeSay(200, `{"kind":"SecretList","metadata":{`+rv+`},"items":[]}`),
		"no resourceVersion":   list("", good),
		"continue":             list(rv+`,"continue":"more"`, good),
		"two items":            list(rv, good+","+good),
		"another name":         list(rv, strings.Replace(good, "routes", "other", 1)),
		"another namespace":    list(rv, strings.Replace(good, "edge", "core", 1)),
		"no uid":               list(rv, strings.Replace(good, `"u1"`, `""`, 1)),
		"no version in item":   list(rv, strings.Replace(good, `"9"`, `""`, 1)),
		"data of numbers":      list(rv, strings.Replace(good, `"backend-9"`, `9`, 1)),
		"followed by junk":     fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]} x`),
		"cut":                  fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good+`]}`, "Content-Length", "1000"),
		"half":                 fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good),
		"over the cap":         list(rv, strings.Replace(good, "backend-9", strings.Repeat("x", maxObject), 1)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeScript{fakeKubeLists(1)[0], bad, fakeKubeLists(2)[1]},
					fakeKubeScript{fakeKubeStream(), fakeKubeOpen()})
				c := fakeKubeFollow(t, network.kube(t))
				c.want(t, fakeKube1, fakeKube2)
				time.Sleep(time.Minute)
				if verbs := server.verbs(); verbs != "LIST WATCH LIST LIST WATCH" {
					t.Errorf("asked %s; want no WATCH after the bad LIST", verbs)
				}
				if n := c.logged.count("watch failed"); n != 1 || c.logged.count("works again") != 1 {
					t.Errorf("log, want a failure and a recovery:\n%s", c.logged)
				}
				if s := c.snapshot(); s.failure != nil || len(c.logged.String()) > 2000 {
					t.Errorf("%+v, log:\n%.2000s", s, c.logged)
				}
			})
		})
	}
}

// Whatever ends a stream, nothing but whole events about the object counts, and
// the next thing asked is a LIST.
func TestStreamEnds(t *testing.T) {
	good, next := fakeKubeEvent("MODIFIED", fakeKubeV(2)), fakeKubeEvent("MODIFIED", fakeKubeV(3))
	change := func(old, new string) string { return strings.Replace(next, old, new, 1) }
	status := func(s string) string { return fakeKubeEvent("ERROR", `{"kind":"Status","metadata":{},`+s+`}`) }
	for name, bad := range map[string]string{
		"garbage":             "garbage",
		"HTML":                "<html>",
		"NUL":                 "\x00",
		"an array":            "[]",
		"a number":            "1",
		"null":                "null",
		"no type":             "{}",
		"an unknown type":     change("MODIFIED", "CHANGED"),
		"type in lower case":  change("MODIFIED", "modified"),
		"type is a number":    change(`"MODIFIED"`, "1"),
		"no object":           `{"type":"MODIFIED"}`,
		"object is null":      `{"type":"MODIFIED","object":null}`,
		"object is a string":  `{"type":"MODIFIED","object":"routes"}`,
		"another name":        change("routes", "other"),
		"another namespace":   change("edge", "core"),
		"another kind":        change("ConfigMap", "Secret"),
		"no kind":             change(`"kind":"ConfigMap",`, ""),
		"no uid":              change(`"u1"`, `""`),
		"no version":          change(`"3"`, `""`),
		"data of numbers":     change(`"backend-3"`, "3"),
		"another one deleted": strings.Replace(change("routes", "other"), "MODIFIED", "DELETED", 1),
		"unknown deleted":     `{"type":"DELETED","object":{}}`,
		"410":                 status(`"message":"too old resource version: 226 (349)","reason":"Expired","code":410`),
		"410 without reason":  status(`"message":"too old","code":410`),
		"429":                 status(`"code":429,"details":{"retryAfterSeconds":3}`),
		"500":                 status(`"message":"RequestWatchProgress is disabled","reason":"InternalError","code":500`),
		"504":                 status(`"code":504,"reason":"Timeout"`),
		"an odd code":         status(`"code":777`),
		"no code":             status(`"message":""`),
		"code is a string":    status(`"code":"410"`),
		"ERROR of a string":   `{"type":"ERROR","object":"no"}`,
		"ERROR of nothing":    `{"type":"ERROR"}`,
		"ERROR of ConfigMap":  fakeKubeEvent("ERROR", fakeKubeV(3)),
		"half an event":       next[:len(next)/2],
		"all but a brace":     strings.TrimSuffix(next, "}\n"),
		"over the cap":        change("backend-3", strings.Repeat("x", maxObject)),
	} {
		for how, stream := range map[string]http.HandlerFunc{
			"then open": fakeKubeOpen(good, bad), "then end": fakeKubeStream(good, bad), "then cut": fakeKubeCut(good, bad),
		} {
			if len(bad) > maxObject && how != "then end" {
				continue // one of them takes long enough
			}
			if how == "then open" && strings.HasPrefix(next, strings.TrimSpace(bad)) && bad != "" {
				continue // nothing is wrong yet
			}
			t.Run(name+" "+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					lists := fakeKubeScript{fakeKubeLists(1)[0], fakeKubeList("104", fakeKubeV(4))}
					server := newFakeKube(t, network, lists, fakeKubeScript{stream, fakeKubeOpen()})
					c := fakeKubeFollow(t, network.kube(t))
					c.want(t, fakeKube1, fakeKube2, "4 map[ns-01:backend-4]")
					time.Sleep(time.Minute)
					if verbs := server.verbs(); verbs != "LIST WATCH LIST WATCH" {
						t.Errorf("asked %s", verbs)
					}
					if s := c.snapshot(); s.failures != 0 {
						t.Errorf("%+v", s)
					}
					if n := c.logged.count("watch failed"); n != 1 {
						t.Errorf("%d failures logged, want 1:\n%.2000s", n, c.logged)
					}
				})
			})
		}
	}
}

// An event is what its bytes are, however they come.
func TestWatchFault29Pieces(t *testing.T) {
	two, three := fakeKubeEvent("ADDED", fakeKubeV(2)), fakeKubeEvent("MODIFIED", fakeKubeV(3))
	wide := strings.Replace(two, "backend-2", "größer-𝄞", 1)
	middle := strings.Index(wide, "𝄞") + 2
	for name, c := range map[string]struct {
		parts []string
		want  []string
	}{
		"byte by byte":            {strings.Split(two+three, ""), []string{fakeKube2, fakeKube3}},
		"both in one write":       {[]string{two + three}, []string{fakeKube2, fakeKube3}},
		"one and a half":          {[]string{two + three[:40], three[40:]}, []string{fakeKube2, fakeKube3}},
		"cut in a UTF-8 sequence": {[]string{wide[:middle], wide[middle:]}, []string{"2 map[ns-01:größer-𝄞]"}},
		"no line ends":            {[]string{strings.TrimSpace(two), strings.TrimSpace(three)}, []string{fakeKube2, fakeKube3}},
		"blank lines":             {[]string{"\n\n" + two + "\r\n\n", three}, []string{fakeKube2, fakeKube3}},
		"repeated":                {[]string{two, two, three, three}, []string{fakeKube2, fakeKube3}},
		"after a bookmark":        {[]string{fakeKubeEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"2"}}`), two}, []string{fakeKube2}},
		"after an odd bookmark":   {[]string{fakeKubeEvent("BOOKMARK", `[1]`), two}, []string{fakeKube2}},
		"many bookmarks":          {[]string{strings.Repeat(fakeKubeEvent("BOOKMARK", `{}`), 1000), two}, []string{fakeKube2}},
		"a smaller version":       {[]string{three, two}, []string{fakeKube3, fakeKube2}},
		"another uid":             {[]string{two, strings.Replace(two, `"u1"`, `"u2"`, 1)}, []string{fakeKube2, fakeKube2}},
		"no data":                 {[]string{strings.Replace(two, `,"data":{"ns-01":"backend-2"}`, "", 1)}, []string{"2 map[]"}},
		"three of 6 MB": {
			[]string{strings.Repeat(strings.Replace(two, "backend-2", strings.Repeat(`\u003c`, 1<<20), 1), 3), three},
			[]string{"2 map[ns-01:" + strings.Repeat("<", 1<<20) + "]", fakeKube3}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeLists(1), fakeKubeScript{fakeKubeOpen(c.parts...)})
				client := fakeKubeFollow(t, network.kube(t))
				client.want(t, fakeKube1)
				client.want(t, c.want...)
				time.Sleep(time.Minute)
				client.wantNothing(t)
				if verbs := server.verbs(); verbs != "LIST WATCH" || client.logged.String() != "" {
					t.Errorf("asked %s, log:\n%s", verbs, client.logged)
				}
			})
		})
	}
}

func TestBookmarkIsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		newFakeKube(t, network, fakeKubeLists(1), fakeKubeScript{func(w http.ResponseWriter, r *http.Request) {
			fakeKubeStream()(w, r)
			time.Sleep(time.Minute)
			fakeKubeOpen(fakeKubeEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"500"}}`))(w, r)
		}})
		c := fakeKubeFollow(t, network.kube(t))
		c.want(t, fakeKube1)
		time.Sleep(59 * time.Second)
		before := time.Since(c.snapshot().confirmed)
		time.Sleep(2 * time.Second)
		if after := time.Since(c.snapshot().confirmed); before < 58*time.Second || after > time.Second+time.Millisecond {
			t.Errorf("last heard %s ago before the bookmark, %s ago after", before, after)
		}
		c.wantNothing(t)
	})
}

// The set is what the server says is there: what comes is in it whatever its
// version, and what goes is not.
func TestWatchFault25DeletedAndRecreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		recreated := fakeKubeObject("u2", "1", "backend-7")
		newFakeKube(t, network, fakeKubeScript{fakeKubeList("99"), fakeKubeList("102", fakeKubeV(3)), fakeKubeList("103"), fakeKubeList("2", recreated)},
			fakeKubeScript{
				fakeKubeLast(20*time.Second, false),
				fakeKubeLast(20*time.Second, false, fakeKubeEvent("DELETED", fakeKubeV(4))),
				fakeKubeLast(20*time.Second, false, fakeKubeEvent("ADDED", fakeKubeObject("u3", "1", "backend-5"))),
				fakeKubeOpen(fakeKubeEvent("DELETED", recreated), fakeKubeEvent("DELETED", recreated), fakeKubeEvent("ADDED", fakeKubeObject("u4", "0", "backend-8"))),
			})
		c := fakeKubeFollow(t, network.kube(t))
		c.want(t, "none", fakeKube3, "none", "1 map[ns-01:backend-5]", "1 map[ns-01:backend-7]", "none", "0 map[ns-01:backend-8]")
		time.Sleep(time.Minute)
		c.wantNothing(t)
	})
}

// A selection is replaced by each LIST, and changed by events one by one.
func TestWatchFault28LeavesTheSelection(t *testing.T) {
	named := func(name, version, backend string) string {
		return strings.Replace(fakeKubeObject("u-"+name, version, backend), "routes", name, 1)
	}
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		server := newFakeKube(t, network, fakeKubeScript{
			fakeKubeList("10", named("b", "2", "backend-2"), named("a", "1", "backend-1")),
			fakeKubeList("20", named("a", "1", "backend-1"), named("c", "3", "backend-3")),
			fakeKubeList("5", named("c", "3", "backend-3"), named("a", "1", "backend-1")),
		}, fakeKubeScript{
			fakeKubeLast(time.Minute, false, fakeKubeEvent("ADDED", named("c", "11", "backend-9")),
				fakeKubeEvent("DELETED", named("a", "12", "backend-1")), fakeKubeEvent("DELETED", named("z", "13", "backend-1"))),
			fakeKubeLast(time.Minute, false),
			fakeKubeOpen(),
		})
		c := fakeKubeSelect(t, network.kube(t), "app=router-overrides")
		const a1, b2, c3, c11 = "1 map[ns-01:backend-1]", "2 map[ns-01:backend-2]", "3 map[ns-01:backend-3]", "11 map[ns-01:backend-9]"
		c.want(t, a1+", "+b2, a1+", "+b2+", "+c11, b2+", "+c11, a1+", "+c3)
		time.Sleep(5 * time.Minute)
		c.wantNothing(t) // the third LIST is of the same
		for _, verb := range []string{"LIST", "WATCH"} {
			r := server.request(t)
			if query := r.URL.Query(); r.verb() != verb || query.Get("labelSelector") != "app=router-overrides" || query.Has("fieldSelector") {
				t.Errorf("%s %s, want a %s by label", r.verb(), r.RequestURI, verb)
			}
		}
	})
}

// The reader of a stream takes no more than the cap of one object, even from a
// server that never stops.
func TestStreamMemory(t *testing.T) {
	for name, start := range map[string]string{
		"an object": `{"type":"MODIFIED","object":{"data":{"a":"`, "spaces after an event": fakeKubeEvent("BOOKMARK", `{}`),
	} {
		t.Run(name, func(t *testing.T) {
			endless := &fakeKubeEndless{}
			w := fakeKubeWatcher(&kubeClient{}, "", slog.New(slog.DiscardHandler), func(map[string]*fakeConfigMap) { t.Error("applied") })
			err := w.readEvents(io.MultiReader(strings.NewReader(start), endless))
			if !errors.Is(err, errTooBig) || endless.n > maxObject {
				t.Errorf("%d bytes read, error %v, want at most %d and %v", endless.n, err, maxObject, errTooBig)
			}
		})
	}
}

// A LIST without end is given up too.
func TestListMemory(t *testing.T) {
	const most = 1 << 20
	item := fakeKubeV(1) + ","
	list := strings.NewReader(`{"items":[` + strings.Repeat(item, 2*most/len(item)))
	_, items, err := decodeList[fakeConfigMap](list, most)
	if want := most / len(item); !errors.Is(err, errTooBig) || len(items) < want-1 || len(items) > want+1 {
		t.Errorf("%d items, error %v, want %d and %v", len(items), err, want, errTooBig)
	}
}

// fakeKubeEndless is spaces without end, or what a test can bear of them.
type fakeKubeEndless struct{ n int }

func (e *fakeKubeEndless) Read(b []byte) (int, error) {
	if e.n > 2*maxObject {
		return 0, io.ErrNoProgress
	}
	for i := range b {
		b[i] = ' '
	}
	e.n += len(b)
	return len(b), nil
}

// What a control plane, or the way to it, can do is numbered. The tests of this
// repository that show one have its number: TestWatchFault<number>..., and the
// table below. 10 is also 11, 35 and 41, 13 is 14, 18 is 21, 22 is 21 too, 7 is
// 39, 36 is 35, 44 is 45; 31 is TestTablePinsToPrevious, 32 BenchmarkSwap and
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
	const once = minKubeRetry * 3 / 2 // the longest first pause
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
		"07 killed":             {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(down, 20*s), least: 20 * s, most: 20*s + maxKubeRetry*3/2, class: "cut", lines: 2},
		"07 gone for an hour": {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(down, time.Hour), least: time.Hour,
			most: time.Hour + maxKubeRetry*3/2, class: "cut", lines: 62},
		"09 graceful stop with Retry-After": {watches: ends, lists: fakeKubeScript{text(429, "no", "5"), text(429, "no", "5")}, least: 10 * s, most: 13 * s, class: "too_many_requests"},
		"12 blackhole":                      {watches: fakeKubeScript{fakeKubeLast(s, true)}, during: downFor(hole, time.Minute), least: time.Minute, most: time.Minute + 5*s + maxKubeRetry*3/2, class: "cut", lines: 3},
		"15 etcd is dead":                   {watches: ends, lists: fakeKubeScript{fakeKubeHang, fakeKubeHang, fakeKubeHang}, least: 3 * listTimeout, most: 3*listTimeout + 12*s, class: "timeout"},
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
	if s := c.snapshot(); s.failures != 0 || s.failure != nil || s.state != stateWatching {
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

// A host that is stopped, or a link that swallows everything, is noticed by
// HTTP/2 pings within 20 s. Through kubectl proxy there are none: there the
// deadline of the WATCH is what is left. Either way the old connection is not
// tried again.
func TestWatchFault10Frozen(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	for name, c := range map[string]struct {
		certificates []tls.Certificate
		proto        string
		within       time.Duration
	}{
		"HTTP/2":   {[]tls.Certificate{certificate}, "HTTP/2.0", 20 * time.Second},
		"HTTP/1.1": {nil, "HTTP/1.1", maxWatchTime + watchGrace},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeLists(2), fakeKubeScript{fakeKubeOpen()}, c.certificates...)
				k := network.kube(t)
				if c.certificates != nil {
					k = fakeKubePod(t, "127.0.0.1", "6443", ca)
					k.dial = network.dial
				}
				client := fakeKubeFollow(t, k)
				client.want(t, fakeKube1)
				time.Sleep(40 * time.Second) // a quiet connection that works is kept
				if verbs := server.verbs(); verbs != "LIST WATCH" {
					t.Errorf("asked %s", verbs)
				}
				network.freeze()
				begun := time.Now()
				client.want(t, fakeKube2)
				if took := time.Since(begun); took > c.within+minKubeRetry+time.Millisecond {
					t.Errorf("noticed after %s, want %s", took, c.within)
				}
				if r := server.request(t); r.Proto != c.proto {
					t.Errorf("%s, want %s", r.Proto, c.proto)
				}
			})
		})
	}
}

// What hangs is given up on after a bound, and asked again on a new connection.
func TestWatchFault13Hangs(t *testing.T) {
	mute := func(n *fakeKubeNet) { n.frozen.Store(1) } // the first connection
	for name, c := range map[string]struct {
		fault       func(*fakeKubeNet)
		tls         bool
		list, watch http.HandlerFunc // the first
		within      time.Duration    // from the start to version 2
	}{
		"LIST without a head": {list: fakeKubeHang, within: listTimeout},
		"LIST without an end": {list: fakeKubeOpen(`{"kind":`), within: listTimeout},
		"no TLS handshake":    {fault: mute, tls: true, within: 5 * time.Second},
		"WATCH without a head": {watch: func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}, within: maxWatchTime + watchGrace},
		"half an event": {watch: func(w http.ResponseWriter, r *http.Request) {
			fakeKubeStream(`{"type":"MODIF`)(w, r)
			<-r.Context().Done()
		}, within: maxWatchTime + watchGrace},
	} {
		t.Run(name, func(t *testing.T) {
			ca, certificate := fakeKubeCA(t)
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				if c.fault != nil {
					c.fault(network)
				}
				lists, watches := fakeKubeScript{fakeKubeLists(2)[1]}, fakeKubeScript{fakeKubeOpen()}
				if c.list != nil {
					lists = append(fakeKubeScript{c.list}, lists...)
				}
				if c.watch != nil {
					lists, watches = append(fakeKubeLists(1), lists...), append(fakeKubeScript{c.watch}, watches...)
				}
				k, certificates := network.kube(t), []tls.Certificate(nil)
				if c.tls {
					k, certificates = fakeKubePod(t, "127.0.0.1", "6443", ca), []tls.Certificate{certificate}
					k.dial = network.dial
				}
				newFakeKube(t, network, lists, watches, certificates...)
				client := fakeKubeFollow(t, k)
				begun := time.Now()
				if c.watch != nil {
					client.want(t, fakeKube1)
				}
				client.want(t, fakeKube2)
				if took := time.Since(begun); took > c.within+750*time.Millisecond {
					t.Errorf("took %s, want at most %s and a first pause", took, c.within)
				}
			})
		})
	}
}

// No connection is used for a second request, however the first ended, and none
// is left.
func TestConnectionServesOneRequest(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	ok := fakeKubeLists(1)[0]
	for name, c := range map[string]struct{ list, watch http.HandlerFunc }{
		"LIST 401":        {fakeKubeSay(401, `{"message":"Unauthorized"}`), nil},
		"LIST 500":        {fakeKubeSay(500, "dial tcp 127.0.0.1:6443: refused"), nil},
		"LIST 302":        {fakeKubeSay(302, "", "Location", "http://elsewhere/"), nil},
		"LIST cut":        {fakeKubeCut("{"), nil},
		"LIST of garbage": {fakeKubeSay(200, "<html>"), nil},
		"WATCH 410":       {ok, fakeKubeSay(410, `{"reason":"Expired"}`)},
		"WATCH ends":      {ok, fakeKubeStream()},
		"WATCH cut":       {ok, fakeKubeCut()},
		"WATCH ERROR":     {ok, fakeKubeOpen(fakeKubeEvent("ERROR", `{"code":410}`))},
	} {
		for proto, certificates := range map[string][]tls.Certificate{"HTTP/2": {certificate}, "HTTP/1.1": nil} {
			t.Run(name+" "+proto, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					watches := fakeKubeScript{fakeKubeOpen()}
					if c.watch != nil {
						watches = fakeKubeScript{c.watch, fakeKubeOpen()}
					}
					server := newFakeKube(t, network, fakeKubeScript{c.list, fakeKubeLists(2)[1]}, watches, certificates...)
					k := network.kube(t)
					if certificates != nil {
						k = fakeKubePod(t, "127.0.0.1", "6443", ca)
						k.dial = network.dial
					}
					client := fakeKubeFollow(t, k)
					if c.watch != nil {
						client.want(t, fakeKube1)
					}
					client.want(t, fakeKube2)
					time.Sleep(time.Second)
					requests := len(strings.Fields(server.verbs()))
					if n, open := network.dials.Load(), network.open.Load(); int(n) != requests || open != 1 {
						t.Errorf("%d connections for %d requests, %d open; want as many, and that of the WATCH open", n, requests, open)
					}
				})
			})
		}
	}
}

// run ends with its context in every state, at once, and leaves neither a
// goroutine (the bubble would not end) nor a connection.
func TestStopInEveryState(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	ok := fakeKubeLists(1)[0]
	for name, c := range map[string]struct {
		list, watch http.HandlerFunc
		state       string
		frozen      bool
	}{
		"listing":           {fakeKubeHang, nil, stateListing, false},
		"within a list":     {fakeKubeOpen(`{"kind"`), nil, stateListing, false},
		"connecting":        {ok, fakeKubeHang, stateConnecting, false},
		"watching":          {ok, fakeKubeOpen(), stateWatching, false},
		"watching, frozen":  {ok, fakeKubeOpen(), stateWatching, true},
		"within an event":   {ok, fakeKubeOpen(`{"type"`), stateWatching, false},
		"waiting":           {fakeKubeSay(500, "no", "Retry-After", "60"), nil, stateWaiting, false},
		"waiting after one": {ok, fakeKubeSay(500, "no", "Retry-After", "60"), stateWaiting, false},
	} {
		for proto, certificates := range map[string][]tls.Certificate{"HTTP/2": {certificate}, "HTTP/1.1": nil} {
			t.Run(name+" "+proto, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					newFakeKube(t, network, fakeKubeScript{c.list}, fakeKubeScript{c.watch}, certificates...)
					k := network.kube(t)
					if certificates != nil {
						k = fakeKubePod(t, "127.0.0.1", "6443", ca)
						k.dial = network.dial
					}
					client := fakeKubeFollow(t, k)
					time.Sleep(3 * time.Second)
					if s, open := client.snapshot(), network.open.Load(); s.state != c.state || (open == 1) == (c.state == stateWaiting) {
						t.Fatalf("%d connections, %+v, want %s, and one unless it is that", open, s, c.state)
					}
					if c.frozen {
						network.freeze()
					}
					begun := time.Now()
					client.stop()
					synctest.Wait()
					if took := time.Since(begun); took > time.Second || network.open.Load() != 0 {
						t.Errorf("stopped after %s with %d connections", took, network.open.Load())
					}
				})
			})
		}
	}
}

func TestStopWhileConnecting(t *testing.T) {
	for name, conn := range map[string]bool{"dial": false, "TLS handshake": true} {
		t.Run(name, func(t *testing.T) {
			ca, _ := fakeKubeCA(t)
			synctest.Test(t, func(t *testing.T) {
				k := fakeKubePod(t, "127.0.0.1", "6443", ca)
				k.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
					if conn {
						client, _ := net.Pipe()
						return client, nil
					}
					<-ctx.Done()
					return nil, ctx.Err()
				}
				c := fakeKubeFollow(t, k)
				time.Sleep(time.Second)
				begun := time.Now()
				c.stop()
				synctest.Wait()
				if took := time.Since(begun); took > time.Second {
					t.Errorf("stopped after %s", took)
				}
			})
		})
	}
}

// FuzzWatchStream holds what is applied of a stream against a decode of its own:
// of whole values only, in order, up to the first that is not an event.
func FuzzWatchStream(f *testing.F) {
	for _, seed := range []string{
		fakeKubeEvent("ADDED", fakeKubeV(1)) + fakeKubeEvent("MODIFIED", fakeKubeV(2)),
		fakeKubeEvent("DELETED", fakeKubeV(1)) + fakeKubeEvent("ADDED", fakeKubeV(1)),
		fakeKubeEvent("BOOKMARK", `{}`) + fakeKubeEvent("ERROR", `{"code":410}`) + fakeKubeEvent("ADDED", fakeKubeV(1)),
		fakeKubeEvent("ADDED", fakeKubeV(1))[:100], `{"type":"ADDED","object":{"kind":"ConfigMap","data":null}}`, "\xff", "[[[[",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		var got []string
		w := fakeKubeWatcher(&kubeClient{}, "", slog.New(slog.DiscardHandler), func(set map[string]*fakeConfigMap) {
			if c := set["routes"]; c != nil {
				got = append(got, fmt.Sprintf("%q %q %q", c.Metadata.UID, c.Metadata.ResourceVersion, c.Data))
			}
		})
		w.objects = map[string]*fakeConfigMap{} // as after a LIST
		err := w.readEvents(bytes.NewReader(stream))
		if want, certain := fakeKubeOracle(stream); certain && fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("applied %s, want %s; error %v", got, want, err)
		}
	})
}

// fakeKubeOracle says what of a stream is to be applied. It is not certain about
// keys that encoding/json takes for one another, or that come twice.
func fakeKubeOracle(stream []byte) (want []string, certain bool) {
	last, begin := "", int64(0)
	for decoder := json.NewDecoder(bytes.NewReader(stream)); ; begin = decoder.InputOffset() {
		var event any
		if decoder.Decode(&event) != nil {
			return want, true
		}
		if fakeKubeOddKeys(stream[begin:decoder.InputOffset()]) {
			return nil, false
		}
		kind, _ := fakeKubeText(event, "type")
		if kind == "BOOKMARK" {
			continue
		}
		this, data, ok := fakeKubeAbout(fakeKubeField(event, "object"))
		if !ok || kind != "ADDED" && kind != "MODIFIED" && kind != "DELETED" {
			return want, true
		}
		switch {
		case kind == "DELETED":
			last = ""
		case this != last:
			want, last = append(want, this+" "+data), this
		}
	}
}

// fakeKubeAbout returns an object's identity and data, if it is the one watched.
func fakeKubeAbout(object any) (this, data string, ok bool) {
	m := fakeKubeField(object, "metadata")
	kind, _ := fakeKubeText(object, "kind")
	name, _ := fakeKubeText(m, "name")
	namespace, _ := fakeKubeText(m, "namespace")
	uid, _ := fakeKubeText(m, "uid")
	version, _ := fakeKubeText(m, "resourceVersion")
	_, ok = fakeKubeText(m, "continue")
	if !ok || kind != "ConfigMap" || name != "routes" || namespace != "edge" || uid == "" || version == "" {
		return "", "", false
	}
	found, ok := fakeKubeField(object, "data").(map[string]any)
	if !ok && fakeKubeField(object, "data") != nil {
		return "", "", false
	}
	texts := map[string]string{}
	for key := range found {
		if texts[key], ok = fakeKubeText(found, key); !ok {
			return "", "", false
		}
	}
	return fmt.Sprintf("%q %q", uid, version), fmt.Sprintf("%q", texts), true
}

// fakeKubeOddKeys reports whether a key of an event comes twice or in another
// spelling.
func fakeKubeOddKeys(event []byte) bool {
	lower := bytes.ToLower(event)
	for _, key := range []string{"type", "object", "kind", "metadata", "name", "namespace", "uid", "resourceVersion", "continue", "data"} {
		n := bytes.Count(lower, []byte(`"`+strings.ToLower(key)+`"`))
		if n > 1 || n != bytes.Count(event, []byte(`"`+key+`"`)) {
			return true
		}
	}
	return bytes.ContainsAny(event, `\ſ`) || bytes.Contains(event, []byte(`"continue"`))
}

func fakeKubeField(v any, key string) any {
	m, _ := v.(map[string]any)
	return m[key]
}

// fakeKubeText returns a field that is text; ok is false if it is anything else
// but null.
func fakeKubeText(v any, key string) (text string, ok bool) {
	field := fakeKubeField(v, key)
	text, ok = field.(string)
	return text, ok || field == nil
}
