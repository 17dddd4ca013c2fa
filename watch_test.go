package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fakeKubeScript is what a fakeKube answers, in order.
type fakeKubeScript = []http.HandlerFunc

func fakeKubeV(n int) string {
	return fakeKubeObject("u1", strconv.Itoa(n), "backend-"+strconv.Itoa(n))
}

// fakeKubeLists answers with version 1, then 2...
func fakeKubeLists(n int) (lists fakeKubeScript) {
	for i := 1; i <= n; i++ {
		lists = append(lists, fakeKubeList(strconv.Itoa(100+i), fakeKubeV(i)))
	}
	return lists
}

const (
	fakeKube1 = "1 map[ns-01:backend-1]"
	fakeKube2 = "2 map[ns-01:backend-2]"
	fakeKube3 = "3 map[ns-01:backend-3]"
)

func TestPause(t *testing.T) {
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
				wait := pause(c.fails, c.asked, float64(i)/1000)
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
		s := &status{}
		s.Details.RetryAfterSeconds = asked
		if got := retryAfter(fmt.Errorf("list: %w", s)); got != want {
			t.Errorf("%d: %s, want %s", asked, got, want)
		}
	}
}

func TestErrorClass(t *testing.T) {
	unmarshal := func(text string) error { return json.Unmarshal([]byte(text), &object{}) }
	tests := []struct {
		err  error
		want string
	}{
		{nil, "none"},
		{&status{Code: 401}, "unauthorized"}, {&status{Code: 403}, "forbidden"}, {&status{Code: 404}, "not_found"},
		{&status{Code: 410}, "gone"}, {&status{Code: 429}, "too_many_requests"}, {&status{Code: 500}, "internal_server_error"},
		{&status{Code: 503}, "service_unavailable"}, {&status{Code: 504}, "gateway_timeout"},
		{&status{}, "refused"}, {&status{Code: 777}, "refused"},
		{errTooBig, "too_big"}, {errAnswer, "bad_answer"}, {unmarshal("<html>"), "bad_answer"}, {unmarshal(`{"kind":1}`), "bad_answer"},
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
		if news := c.watchers[0].news; news != 2 {
			t.Errorf("%d sets were applied, want 2", news)
		}
	})
}

// So it is with what is read of a StatefulSet and of an EndpointSlice.
func TestWatchComparesAllThatIsRead(t *testing.T) {
	sets, slices := 0, 0
	set := watcher[statefulSet]{header: func(s *statefulSet) *object { return &s.object }, apply: func(map[string]*statefulSet) { sets++ }}
	slice := watcher[endpointSlice]{header: func(s *endpointSlice) *object { return &s.object }, apply: func(map[string]*endpointSlice) { slices++ }}
	const meta = `"metadata":{"name":"n","uid":"u","resourceVersion":"1"`
	for _, text := range []string{`},"spec":{"replicas":4}`, `},"spec":{"replicas":3}`, `,"annotations":{"router/backends":"3"}},"spec":{"replicas":3}`} {
		for range 2 {
			var s statefulSet
			if err := json.Unmarshal([]byte("{"+meta+text+"}"), &s); err != nil {
				t.Fatal(err)
			}
			set.replace(map[string]*statefulSet{"n": &s})
		}
	}
	for _, addr := range []string{"10.0.0.1", "10.0.0.2"} {
		for range 2 {
			var s endpointSlice
			if err := json.Unmarshal([]byte("{"+meta+`},"endpoints":[{"addresses":["`+addr+`"],"conditions":{"ready":true}}]}`), &s); err != nil {
				t.Fatal(err)
			}
			slice.replace(map[string]*endpointSlice{"n": &s})
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
				if s := c.now(); s.fails != 0 {
					t.Errorf("%d fails, want 0", s.fails)
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
				if fails := c.now().fails; fails < 10 {
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
		if s := c.now(); s.fails != 4 || s.failure == nil || s.state != stateWatching {
			t.Errorf("after four failures and a LIST: %+v", s)
		}
		if n := c.logged.count("watch failed"); n != 1 {
			t.Errorf("%d failures logged, want the first only:\n%s", n, c.logged)
		}
		time.Sleep(healthyWatch + time.Millisecond)
		if s := c.now(); s.fails != 0 || s.failure != nil {
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
		if s := c.now(); s.fails != 0 {
			t.Errorf("a cut after a long life counts as %d failures", s.fails)
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
