package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
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
		wantEqual(t, fmt.Sprint("asked for ", asked), retryAfter(fmt.Errorf("list: %w", s)), want)
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
		{&statusError{}, "unknown_status"}, {&statusError{Code: 777}, "unknown_status"},
		{errTooBig, "too_big"}, {errBadResponse, "bad_response"}, {unmarshal("<html>"), "bad_response"}, {unmarshal(`{"kind":1}`), "bad_response"},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, "dial"}, {&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, "timeout"},
		{context.DeadlineExceeded, "timeout"}, {&net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}, "tls"},
		{io.ErrUnexpectedEOF, "connection_lost"}, {&net.OpError{Op: "read", Err: errors.New("connection reset by peer")}, "connection_lost"},
	}
	for _, tt := range tests {
		wantEqual(t, fmt.Sprint("the class of ", tt.err), errorClass(tt.err), tt.want)
		if tt.err != nil && errorClass(fmt.Errorf("list: %w", tt.err)) != tt.want {
			t.Errorf("%v within another is not %s", tt.err, tt.want)
		}
	}
}

func TestWatchRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := startWatch(t, listsTo(3), script{openStream()})
		timeouts := map[string]bool{}
		const path = "/api/v1/namespaces/edge/configmaps?"
		for cycle := range 10 {
			list := c.server.request(t)
			if want := path + "fieldSelector=metadata.name%3Droutes"; list.RequestURI != want || list.Header.Get("Accept") != "application/json" {
				t.Fatalf("LIST %s, Accept %s, want %s, application/json", list.RequestURI, list.Header.Get("Accept"), want)
			}
			watch := c.server.request(t)
			timeout := watch.URL.Query().Get("timeoutSeconds")
			timeouts[timeout] = true
			if n, err := strconv.Atoi(timeout); err != nil || n < 150 || n > 210 {
				t.Errorf("timeoutSeconds %q, want 150 to 210", timeout)
			}
			want := fmt.Sprintf(path+"allowWatchBookmarks=true&fieldSelector=metadata.name%%3Droutes&resourceVersion=%d&timeoutSeconds=%s&watch=1",
				101+min(cycle, 2), timeout)
			if watch.RequestURI != want {
				t.Errorf("WATCH %s, want %s", watch.RequestURI, want)
			}
		}
		if len(timeouts) < 3 {
			t.Errorf("ten cycles had the timeouts %v only", timeouts)
		}
		c.want(t, applied1, applied2, applied3)
		c.wantNothing(t) // eight LISTs brought nothing new
		wantEqual(t, "the log of clean ends", c.logged.String(), "")
	})
}

// After a restored etcd resourceVersions come again, with other content. A router that
// runs then has what a router has that starts then. The same content is not applied
// again.
func TestWatchSameVersionOtherContent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		list := func(backend string) http.HandlerFunc { return mapList("12", routesMap("u1", "12", backend)) }
		c := startWatch(t, script{list("backend-1"), list("backend-2"), list("backend-2")}, script{stream(), stream(), openStream()})
		c.want(t, "12 map[ns-01:backend-1]", "12 map[ns-01:backend-2]")
		time.Sleep(10 * time.Minute)
		c.wantNothing(t)
	})
}

// A StatefulSet, an EndpointSlice and a ConfigMap of the same version are compared whole.
func TestWatchComparesAllThatIsRead(t *testing.T) {
	const meta = `{"metadata":{"name":"n","uid":"u","resourceVersion":"1"`
	wantApplied(t, func(o *statefulSet) *apiObject { return &o.apiObject },
		meta+`},"spec":{"replicas":4}}`, meta+`},"spec":{"replicas":3}}`, meta+`,"generation":2},"spec":{"replicas":3}}`)
	wantApplied(t, func(o *endpointSlice) *apiObject { return &o.apiObject },
		meta+`},"endpoints":`+readyEndpoints(1)+"}", meta+`},"endpoints":`+readyEndpoints(2)+"}")
	wantApplied(t, func(o *configMap) *apiObject { return &o.apiObject }, meta+`},"data":{"a":"1"}}`, meta+`},"data":{"a":"2"}}`)
}

// wantApplied checks that each of the objects is applied once, though each comes twice.
func wantApplied[T any](t *testing.T, meta func(*T) *apiObject, objects ...string) {
	t.Helper()
	applied := 0
	w := watcher[T]{meta: meta, apply: func(map[string]*T) { applied++ }}
	for i := range 2 * len(objects) {
		o := new(T)
		must(t, json.Unmarshal([]byte(objects[i/2]), o))
		w.setObjects(map[string]*T{"n": o})
	}
	wantEqual(t, fmt.Sprintf("%T that were applied", *new(T)), applied, len(objects))
}

func TestWatchNormalEndListsAtOnce(t *testing.T) {
	for name, stream := range map[string]http.HandlerFunc{
		"after a long life":   streamFor(20*time.Second, false),
		"after a new version": stream(watchEvent("MODIFIED", routesV(2))),
	} {
		inBubble(t, name, func(t *testing.T) {
			ended := make(chan time.Time, 1)
			c := startWatch(t, listsTo(1), script{func(w http.ResponseWriter, r *http.Request) { stream(w, r); ended <- time.Now() }, openStream()})
			c.server.request(t)
			c.server.request(t)
			again := c.server.request(t)
			if gap := again.at.Sub(<-ended); again.verb() != "LIST" || gap > 500*time.Millisecond {
				t.Errorf("%s after %s, want a LIST within 500ms", again.verb(), gap)
			}
			wantEqual(t, "failures", c.snapshot().failures, 0)
		})
	}
}

// relist ends a stream at once, and is done when a LIST that began after it was applied. It
// is no failure. While the API server is away, all calls wait for the same LIST. A LIST that
// fails counts as a failure, also if the stream before was healthy.
func TestWatchListsAgain(t *testing.T) {
	inBubble(t, "one server", func(t *testing.T) {
		c := startWatch(t, append(listsTo(2), statusAnswer(500, "InternalError", "away"), listsTo(3)[2]), script{openStream()})
		c.want(t, applied1)
		wantListed := func(done <-chan struct{}) {
			t.Helper()
			select {
			case <-done:
			case <-time.After(time.Minute):
				t.Fatal("no LIST was applied")
			}
		}
		wantListed(c.relist())
		c.want(t, applied2)
		wantEqual(t, "failures", c.snapshot().failures, 0)
		time.Sleep(2 * healthyWatch)
		first := c.relist() // it gets 500
		synctest.Wait()
		wantEqual(t, "failures", c.snapshot().failures, 1)
		second := c.relist()
		if third := c.relist(); third != second {
			t.Error("each call waits for a LIST of its own")
		}
		wantListed(first)
		wantListed(second)
		c.want(t, applied3)
	})
}

// A load balancer that cuts every stream after 3 s makes no hot loop, and updates arrive
// all the same.
func TestWatchCutEveryThreeSecondsPolls(t *testing.T) {
	for name, cut := range map[string]bool{"cleanly": false, "by a reset": true} {
		inBubble(t, name, func(t *testing.T) {
			c := startWatch(t, listsTo(30), script{streamFor(3*time.Second, cut)})
			time.Sleep(10 * time.Second)
			first := strings.Count(c.server.verbs(), "LIST")
			time.Sleep(10 * time.Minute)
			then := strings.Count(c.server.verbs(), "LIST")
			if first > 5 || then < 20 || then > 60 {
				t.Errorf("%d LISTs in 10 s, then %d in 10 min, want at most 5, then 20 to 60", first, then)
			}
			c.want(t, applied1, applied2, applied3)
			if failures := c.snapshot().failures; failures < 10 {
				t.Errorf("%d failures in a row", failures)
			}
			failed, recovered := c.logged.count("watch failed"), c.logged.count("watch recovered")
			if recovered != 0 || cut && (failed < 8 || failed > 11) || !cut && failed != 0 {
				t.Errorf("%d recoveries and %d failures logged, want one failure a minute if there are any:\n%s", recovered, failed, c.logged)
			}
		})
	}
}

// Each source of a failure loop backs off alike.
func TestWatchBacksOff(t *testing.T) {
	good := mapList("101", routesV(1))
	for name, c := range map[string]struct{ list, watch http.HandlerFunc }{
		"LIST refused":              {respond(403, "no"), openStream()},
		"LIST is HTML":              {respond(200, "<html>", "Content-Type", "text/html"), openStream()},
		"WATCH refused":             {good, respond(403, "no")},
		"WATCH ends at once":        {good, stream()},
		"WATCH cut at once":         {good, cutStream()},
		"WATCH of garbage":          {good, stream("garbage")},
		"WATCH of an ERROR":         {good, stream(watchEvent("ERROR", `{"code":410}`))},
		"WATCH of what is known":    {good, stream(watchEvent("ADDED", routesV(1)))},
		"WATCH of a BOOKMARK":       {good, stream(watchEvent("BOOKMARK", `{}`))},
		"WATCH of a deleted object": {mapList("101"), stream(watchEvent("DELETED", routesV(1)))},
	} {
		inBubble(t, name, func(t *testing.T) {
			client := startWatch(t, script{c.list}, script{c.watch})
			time.Sleep(10 * time.Second)
			if n := strings.Count(client.server.verbs(), "LIST"); n > 10 {
				t.Errorf("%d LISTs in the first 10 s, want at most 1/s", n)
			}
			time.Sleep(time.Minute)
			client.server.verbs()
			time.Sleep(time.Hour)
			if n := strings.Count(client.server.verbs(), "LIST"); n < 3600/23 || n > 3600/7 {
				t.Errorf("%d LISTs in an hour, want one in 7.5 to 22.5 s", n)
			}
			if warned, recovered := client.logged.count("level=WARN"), client.logged.count("watch recovered"); warned > 80 || recovered > 0 {
				t.Errorf("%d warnings and %d recoveries logged in an hour", warned, recovered)
			}
		})
	}
}

// An API server that starts answers 403 to those who may. It is asked again, also with
// nothing ever applied.
func TestWatchRecoversByAHealthyStreamOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		no := statusAnswer(403, "Forbidden", "configmaps is forbidden")
		c := startWatch(t, append(script{no, no, no, no}, listsTo(2)...), script{streamFor(time.Minute, true), openStream()})
		c.want(t, applied1)
		synctest.Wait()
		if s := c.snapshot(); s.failures != 4 || s.failure == nil || s.state != watchWatching {
			t.Errorf("after four failures and a LIST: %+v", s)
		}
		if n := c.logged.count("watch failed"); n != 1 {
			t.Errorf("%d failures logged, want the first only:\n%s", n, c.logged)
		}
		time.Sleep(healthyWatch + time.Millisecond)
		if s := c.snapshot(); s.failures != 0 || s.failure != nil {
			t.Errorf("after %s of a stream: %+v", healthyWatch, s)
		}
		if n := c.logged.count("watch recovered"); n != 1 {
			t.Errorf("%d recoveries logged, want one:\n%s", n, c.logged)
		}
		begun := time.Now()
		c.want(t, applied2)
		if took := time.Since(begun); took > 51*time.Second {
			t.Errorf("the LIST after a long life came %s late", took-50*time.Second)
		}
		wantEqual(t, "failures by a cut after a long life", c.snapshot().failures, 0)
	})
}

func TestWatchLogsEachClassOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		forbidden, expired := respond(403, "no"), respond(410, `{"message":"too old","reason":"Expired"}`)
		lists := append(script{forbidden, forbidden, forbidden, forbidden, expired, expired, expired}, listsTo(1)...)
		c := startWatch(t, lists, script{openStream()})
		time.Sleep(4 * time.Minute)
		first, second := c.logged.count("403 Forbidden"), c.logged.count("410 Expired")
		if first != 1 || second < 1 || second > 2 || c.logged.count("watch recovered") != 1 {
			t.Errorf("want each failure once, or after a minute, and the recovery once:\n%s", c.logged)
		}
		if !strings.Contains(c.logged.String(), "omitted=3") {
			t.Errorf("the second failure does not say that three were omitted:\n%s", c.logged)
		}
	})
}

func TestWatchRejectsListsThatAreNotWhole(t *testing.T) {
	good := routesV(9)
	list := func(meta, items string) http.HandlerFunc {
		return respond(200, `{"kind":"ConfigMapList","metadata":{`+meta+`},"items":[`+items+`]}`)
	}
	const rv = `"resourceVersion":"109"`
	for name, bad := range map[string]http.HandlerFunc{
		"HTML":                 respond(200, "<html>log in</html>", "Content-Type", "text/html; charset=utf-8"),
		"HTML said to be JSON": respond(200, "<html>log in</html>"),
		"text/plain":           respond(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]}`, "Content-Type", "text/plain"),
		"nothing":              respond(200, ""),
		"204":                  respond(204, ""),
		"null":                 respond(200, "null"),
		"{}":                   respond(200, "{}"),
		"[]":                   respond(200, "[]"),
		"a Status":             respond(200, `{"kind":"Status","metadata":{},"status":"Success"}`),
		"a ConfigMap":          respond(200, good),
		"another kind":         respond(200, `{"kind":"SecretList","metadata":{`+rv+`},"items":[]}`),
		"no resourceVersion":   list("", good),
		"continue":             list(rv+`,"continue":"more"`, good),
		"two items":            list(rv, good+","+good),
		"another name":         list(rv, strings.Replace(good, "routes", "other", 1)),
		"another namespace":    list(rv, strings.Replace(good, "edge", "core", 1)),
		"no uid":               list(rv, strings.Replace(good, `"u1"`, `""`, 1)),
		"no version in item":   list(rv, strings.Replace(good, `"9"`, `""`, 1)),
		"data of numbers":      list(rv, strings.Replace(good, `"backend-9"`, `9`, 1)),
		"followed by junk":     respond(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]} x`),
		"cut":                  respond(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good+`]}`, "Content-Length", "1000"),
		"half":                 respond(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good),
		"over the cap":         list(rv, strings.Replace(good, "backend-9", strings.Repeat("x", maxObject), 1)),
	} {
		inBubble(t, name, func(t *testing.T) {
			c := startWatch(t, script{listsTo(1)[0], bad, listsTo(2)[1]}, script{stream(), openStream()})
			c.want(t, applied1, applied2)
			time.Sleep(time.Minute)
			c.wantVerbs(t, "LIST WATCH LIST LIST WATCH") // no WATCH after the bad LIST
			failed, recovered := c.logged.count("watch failed"), c.logged.count("watch recovered")
			if s := c.snapshot(); s.failure != nil || failed != 1 || recovered != 1 || len(c.logged.String()) > 2000 {
				t.Errorf("%+v; log, want a failure and a recovery:\n%.2000s", s, c.logged)
			}
		})
	}
}

// Whatever ends a stream, only whole events about the object count, and a LIST comes next.
func TestWatchListsAfterABadEvent(t *testing.T) {
	good, next := watchEvent("MODIFIED", routesV(2)), watchEvent("MODIFIED", routesV(3))
	change := func(old, new string) string { return strings.Replace(next, old, new, 1) }
	status := func(s string) string { return watchEvent("ERROR", `{"kind":"Status","metadata":{},`+s+`}`) }
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
		"ERROR of ConfigMap":  watchEvent("ERROR", routesV(3)),
		"half an event":       next[:len(next)/2],
		"all but a brace":     strings.TrimSuffix(next, "}\n"),
		"over the cap":        change("backend-3", strings.Repeat("x", maxObject)),
	} {
		for how, stream := range map[string]http.HandlerFunc{
			"then open": openStream(good, bad), "then end": stream(good, bad), "then cut": cutStream(good, bad),
		} {
			if len(bad) > maxObject && how != "then end" {
				continue // one of them takes long enough
			}
			if how == "then open" && strings.HasPrefix(next, strings.TrimSpace(bad)) && bad != "" {
				continue // nothing is wrong yet
			}
			inBubble(t, name+" "+how, func(t *testing.T) {
				c := startWatch(t, script{listsTo(1)[0], mapList("104", routesV(4))}, script{stream, openStream()})
				c.want(t, applied1, applied2, "4 map[ns-01:backend-4]")
				time.Sleep(time.Minute)
				c.wantVerbs(t, "LIST WATCH LIST WATCH")
				if n := c.logged.count("watch failed"); n != 1 || c.snapshot().failures != 0 {
					t.Errorf("%d failures logged, want 1, and a recovery from %+v:\n%.2000s", n, c.snapshot(), c.logged)
				}
			})
		}
	}
}

// An event is what its bytes are, however they come.
func TestWatchReadsEventsInPieces(t *testing.T) {
	two, three := watchEvent("ADDED", routesV(2)), watchEvent("MODIFIED", routesV(3))
	wide := strings.Replace(two, "backend-2", "größer-𝄞", 1)
	middle := strings.Index(wide, "𝄞") + 2
	for name, c := range map[string]struct {
		parts []string
		want  []string
	}{
		"byte by byte":            {strings.Split(two+three, ""), []string{applied2, applied3}},
		"both in one write":       {[]string{two + three}, []string{applied2, applied3}},
		"one and a half":          {[]string{two + three[:40], three[40:]}, []string{applied2, applied3}},
		"cut in a UTF-8 sequence": {[]string{wide[:middle], wide[middle:]}, []string{"2 map[ns-01:größer-𝄞]"}},
		"no line ends":            {[]string{strings.TrimSpace(two), strings.TrimSpace(three)}, []string{applied2, applied3}},
		"blank lines":             {[]string{"\n\n" + two + "\r\n\n", three}, []string{applied2, applied3}},
		"repeated":                {[]string{two, two, three, three}, []string{applied2, applied3}},
		"after a bookmark":        {[]string{watchEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"2"}}`), two}, []string{applied2}},
		"after an odd bookmark":   {[]string{watchEvent("BOOKMARK", `[1]`), two}, []string{applied2}},
		"many bookmarks":          {[]string{strings.Repeat(watchEvent("BOOKMARK", `{}`), 1000), two}, []string{applied2}},
		"a smaller version":       {[]string{three, two}, []string{applied3, applied2}},
		"another uid":             {[]string{two, strings.Replace(two, `"u1"`, `"u2"`, 1)}, []string{applied2, applied2}},
		"no data":                 {[]string{strings.Replace(two, `,"data":{"ns-01":"backend-2"}`, "", 1)}, []string{"2 map[]"}},
		"three of 6 MB": {
			[]string{strings.Repeat(strings.Replace(two, "backend-2", strings.Repeat(`\u003c`, 1<<20), 1), 3), three},
			[]string{"2 map[ns-01:" + strings.Repeat("<", 1<<20) + "]", applied3}},
	} {
		inBubble(t, name, func(t *testing.T) {
			client := startWatch(t, listsTo(1), script{openStream(c.parts...)})
			client.want(t, applied1)
			client.want(t, c.want...)
			time.Sleep(time.Minute)
			client.wantNothing(t)
			client.wantVerbs(t, "LIST WATCH")
			wantEqual(t, "the log", client.logged.String(), "")
		})
	}
}

func TestWatchBookmarkConfirms(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := startWatch(t, listsTo(1), script{func(w http.ResponseWriter, r *http.Request) {
			streamFor(time.Minute, false)(w, r)
			openStream(watchEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"500"}}`))(w, r)
		}})
		c.want(t, applied1)
		time.Sleep(59 * time.Second)
		before := time.Since(c.snapshot().confirmed)
		time.Sleep(2 * time.Second)
		if after := time.Since(c.snapshot().confirmed); before < 58*time.Second || after > time.Second+time.Millisecond {
			t.Errorf("confirmed %s ago before the bookmark, %s ago after", before, after)
		}
		c.wantNothing(t)
	})
}

// The objects are those that the server has: what comes is among them whatever its
// version, and what goes is not.
func TestWatchDeletedAndRecreated(t *testing.T) {
	bubble(t, func(t *testing.T) {
		recreated := routesMap("u2", "1", "backend-7")
		c := startWatch(t, script{mapList("99"), mapList("102", routesV(3)), mapList("103"), mapList("2", recreated)}, script{
			streamFor(20*time.Second, false),
			streamFor(20*time.Second, false, watchEvent("DELETED", routesV(4))),
			streamFor(20*time.Second, false, watchEvent("ADDED", routesMap("u3", "1", "backend-5"))),
			openStream(watchEvent("DELETED", recreated), watchEvent("DELETED", recreated), watchEvent("ADDED", routesMap("u4", "0", "backend-8"))),
		})
		c.want(t, "none", applied3, "none", "1 map[ns-01:backend-5]", "1 map[ns-01:backend-7]", "none", "0 map[ns-01:backend-8]")
		time.Sleep(time.Minute)
		c.wantNothing(t)
	})
}

// Each LIST replaces a selection; each event changes one object of it.
func TestWatchOfASelection(t *testing.T) {
	named := func(name, version, backend string) string {
		return strings.Replace(routesMap("u-"+name, version, backend), "routes", name, 1)
	}
	bubble(t, func(t *testing.T) {
		network := newPipeNetwork()
		server := scriptedKube(script{
			mapList("10", named("b", "2", "backend-2"), named("a", "1", "backend-1")),
			mapList("20", named("a", "1", "backend-1"), named("c", "3", "backend-3")),
			mapList("5", named("c", "3", "backend-3"), named("a", "1", "backend-1")),
		}, script{
			streamFor(time.Minute, false, watchEvent("ADDED", named("c", "11", "backend-9")),
				watchEvent("DELETED", named("a", "12", "backend-1")), watchEvent("DELETED", named("z", "13", "backend-1"))),
			streamFor(time.Minute, false),
			openStream(),
		}).serve(t, network)
		c := watchWith(t, network.kube(t), "app=router-overrides")
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

// A stream is read up to the largest object, even from a server that never stops.
func TestWatchGivesUpAnEndlessEvent(t *testing.T) {
	for name, start := range map[string]string{
		"an object": `{"type":"MODIFIED","object":{"data":{"a":"`, "spaces after an event": watchEvent("BOOKMARK", `{}`),
	} {
		t.Run(name, func(t *testing.T) {
			endless := &endlessSpaces{}
			w := routesWatcher(&kubeClient{}, "", slog.New(slog.DiscardHandler), func(map[string]*fakeConfigMap) { t.Error("applied") })
			err := w.readEvents(io.MultiReader(strings.NewReader(start), endless))
			if !errors.Is(err, errTooBig) || endless.n > maxObject {
				t.Errorf("%d bytes read, error %v, want at most %d and %v", endless.n, err, maxObject, errTooBig)
			}
		})
	}
}

func TestWatchGivesUpAnEndlessList(t *testing.T) {
	const most = 1 << 20
	item := routesV(1) + ","
	list := strings.NewReader(`{"items":[` + strings.Repeat(item, 2*most/len(item)))
	_, items, err := decodeList[fakeConfigMap](list, most)
	if want := most / len(item); !errors.Is(err, errTooBig) || len(items) < want-1 || len(items) > want+1 {
		t.Errorf("%d items, error %v, want %d and %v", len(items), err, want, errTooBig)
	}
}

// endlessSpaces is spaces without end, or what a test can bear of them.
type endlessSpaces struct{ n int }

func (e *endlessSpaces) Read(b []byte) (int, error) {
	if e.n > 2*maxObject {
		return 0, io.ErrNoProgress
	}
	for i := range b {
		b[i] = ' '
	}
	e.n += len(b)
	return len(b), nil
}

// fault is what goes wrong after version 1 was applied, unless said otherwise, and how
// version 2 comes to be applied.
type fault struct {
	lists, watches script             // the first LIST and the last WATCH are added
	during         func(*pipeNetwork) // is called when version 1 is applied
	want           []string           // what is applied then; version 2 if nil
	least, most    time.Duration      // when; from version 1
	class          string             // of the failure in the log, "" if there must be none
	lines          int                // of failures in the log, at most; 1 if 0
}

// answerFor answers like f until the time is over, then like then.
func answerFor(d time.Duration, f, then http.HandlerFunc) script {
	end := sync.OnceValue(func() time.Time { return time.Now().Add(d) }) // from the first request
	return slices.Repeat(script{func(w http.ResponseWriter, r *http.Request) {
		if time.Now().After(end()) {
			f = then
		}
		f(w, r)
	}}, 1000)
}

// watchFaults are what a control plane, or the way to it, can do to a watch.
func watchFaults() map[string]fault {
	const s, ms = time.Second, time.Millisecond
	const once = minKubeRetry * 3 / 2 // the longest first pause
	two := listsTo(2)[1]
	said := func(status string) script {
		return script{openStream(watchEvent("ERROR", `{"kind":"Status","metadata":{},`+status+`}`))}
	}
	text := func(code int, body, after string) http.HandlerFunc {
		return respond(code, body, "Content-Type", "text/plain", "Retry-After", after)
	}
	ends := script{stream()}
	big := strings.Replace(watchEvent("MODIFIED", routesV(9)), "backend-9", strings.Repeat("x", maxObject), 1)
	recreated := watchEvent("ADDED", routesMap("u2", "0", "backend-2"))
	downFor := func(flag func(*pipeNetwork, bool), d time.Duration) func(*pipeNetwork) {
		return func(n *pipeNetwork) {
			flag(n, true)
			time.AfterFunc(d, func() { flag(n, false) })
		}
	}
	down := func(n *pipeNetwork, on bool) { n.down.Store(on) }
	hole := func(n *pipeNetwork, on bool) { n.hole.Store(on) }
	return map[string]fault{
		"410 as an event": {watches: said(`"message":"too old resource version: 226 (349)","reason":"Expired","code":410`), most: once, class: "gone"},
		"410 as a status": {watches: script{respond(410, `{"reason":"Expired"}`)}, most: once, class: "gone"},
		"410 of a LIST":   {watches: ends, lists: script{respond(410, `{"reason":"Expired"}`)}, most: 2500 * ms, class: "gone"},
		"500 as an event": {watches: said(`"message":"RequestWatchProgress is disabled","reason":"InternalError","code":500`), most: once, class: "internal_server_error"},
		"429 as an event": {watches: said(`"code":429,"details":{"retryAfterSeconds":5}`), least: 5 * s, most: 6 * s, class: "too_many_requests"},
		"version from the future": {watches: script{streamFor(20*s, false)}, lists: script{mapList("3", routesV(0))},
			want: []string{"0 map[ns-01:backend-0]"}, most: 20*s + once},
		"garbage as version": {watches: script{respond(500, `{"message":"strconv.ParseUint: parsing \"abc\""}`)}, most: once, class: "internal_server_error"},
		"killed":             {watches: script{streamFor(s, true)}, during: downFor(down, 20*s), least: 20 * s, most: 20*s + maxKubeRetry*3/2, class: "connection_lost", lines: 2},
		"gone for an hour": {watches: script{streamFor(s, true)}, during: downFor(down, time.Hour), least: time.Hour,
			most: time.Hour + maxKubeRetry*3/2, class: "connection_lost", lines: 62},
		"graceful stop with Retry-After": {watches: ends, lists: script{text(429, "no", "5"), text(429, "no", "5")}, least: 10 * s, most: 13 * s, class: "too_many_requests"},
		"blackhole":                      {watches: script{streamFor(s, true)}, during: downFor(hole, time.Minute), least: time.Minute, most: time.Minute + 5*s + maxKubeRetry*3/2, class: "connection_lost", lines: 3},
		"etcd is dead":                   {watches: ends, lists: script{hang, hang, hang}, least: 3 * listTimeout, most: 3*listTimeout + 12*s, class: "timeout"},
		"flow control":                   {watches: ends, lists: script{text(429, "Too many requests, please try again later.", "8")}, least: 8 * s, most: 10500 * ms, class: "too_many_requests"},
		"503":                            {watches: ends, lists: script{respond(503, "", "Retry-After", "1")}, least: s, most: 2500 * ms, class: "service_unavailable"},
		"401 for a minute":               {watches: ends, lists: answerFor(time.Minute, respond(401, `{"message":"Unauthorized"}`), two), least: time.Minute, most: time.Minute + 24*s, class: "unauthorized", lines: 2},
		"403 for an hour":                {watches: ends, lists: answerFor(time.Hour, respond(403, `{"reason":"Forbidden"}`), two), least: time.Hour, most: time.Hour + 24*s, class: "forbidden", lines: 61},
		"recreated with a smaller version": {watches: script{openStream(watchEvent("DELETED", routesV(7)), recreated)},
			want: []string{"none", "0 map[ns-01:backend-2]"}},
		"recreated while away": {watches: script{cutStream()}, lists: script{mapList("1", routesMap("u2", "1", "backend-2"))},
			want: []string{"1 map[ns-01:backend-2]"}, most: once, class: "connection_lost"},
		"over the cap":         {watches: script{openStream(big)}, most: once, class: "too_big"},
		"half an event":        {watches: script{cutStream(big[:1000])}, most: once, class: "connection_lost"},
		"HTML":                 {watches: ends, lists: script{respond(200, "<html>", "Content-Type", "text/html")}, most: 2500 * ms, class: "bad_response"},
		"GOAWAY":               {watches: script{goAway}, least: 30 * s, most: 30 * s},
		"proxy without server": {watches: ends, lists: script{text(500, "dial tcp 127.0.0.1:6443: connect: connection refused", "")}, most: 2500 * ms, class: "internal_server_error"},
		"no namespace":         {watches: append(ends, ends...), lists: script{mapList("102")}, want: []string{"none", applied2}, most: 3 * s},
		"404":                  {watches: ends, lists: script{text(404, "404 page not found\n", "")}, most: 2500 * ms, class: "not_found"},
	}
}

// goAway says with the head that the connection ends, and brings version 2 after
// that.
func goAway(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close") // HTTP/2: GOAWAY
	stream()(w, r)
	time.Sleep(30 * time.Second)
	openStream(watchEvent("MODIFIED", routesV(2)))(w, r)
}

func TestWatchSurvivesFaults(t *testing.T) {
	for name := range watchFaults() {
		for _, proto := range []string{"HTTP/2.0", "HTTP/1.1"} {
			inBubble(t, name+" "+proto, func(t *testing.T) {
				f := watchFaults()[name] // of its own: it has state
				lists := append(append(listsTo(1), f.lists...), listsTo(2)[1])
				c := startWatchOver(t, proto, newPipeNetwork(), lists, append(f.watches, openStream()))
				c.want(t, applied1)
				if f.during != nil {
					f.during(c.network)
				}
				f.check(t, c)
				wantNoResume(t, c.server)
			})
		}
	}
}

// check waits for what is to be applied, and checks when it is, and what the log says.
func (f fault) check(t *testing.T, c *watchTest) {
	t.Helper()
	begun := time.Now()
	time.Sleep(max(0, f.least-time.Millisecond))
	c.wantNothing(t)
	if f.want == nil {
		f.want = []string{applied2}
	}
	c.want(t, f.want...)
	if took := time.Since(begun); took > f.most+time.Millisecond {
		t.Errorf("took %s, want at most %s", took, f.most)
	}
	time.Sleep(time.Minute)
	c.wantNothing(t)
	if s := c.snapshot(); s.failures != 0 || s.failure != nil || s.state != watchWatching {
		t.Errorf("a minute later: %+v", s)
	}
	n := c.logged.count("watch failed")
	if f.class == "" && n > 0 || f.class != "" && (n == 0 || n > cmp.Or(f.lines, 1) || !strings.Contains(c.logged.String(), "class="+f.class+" ")) {
		t.Errorf("%d failures logged, want some of class %q, at most %d:\n%.3000s", n, f.class, cmp.Or(f.lines, 1), c.logged)
	}
	if again := c.logged.count("watch recovered"); (again == 1) != (n > 0) {
		t.Errorf("it was said %d times to work again:\n%.3000s", again, c.logged)
	}
}

// wantNoResume checks that no LIST had a resourceVersion, and that each WATCH came after a
// LIST.
func wantNoResume(t *testing.T, server *fakeKube) {
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

// HTTP/2 pings notice within 20 s that a host is stopped, or that a link swallows
// everything. HTTP/1.1, as through kubectl proxy, has none: the deadline of the WATCH is
// what is left. The old connection is not used again.
func TestWatchNoticesAFrozenServer(t *testing.T) {
	for proto, within := range map[string]time.Duration{"HTTP/2.0": 20 * time.Second, "HTTP/1.1": maxWatchTime + watchGrace} {
		inBubble(t, proto, func(t *testing.T) {
			c := startWatchOver(t, proto, newPipeNetwork(), listsTo(2), script{openStream()})
			c.want(t, applied1)
			time.Sleep(40 * time.Second) // a quiet connection that works is kept
			c.wantVerbs(t, "LIST WATCH")
			c.network.freeze()
			begun := time.Now()
			c.want(t, applied2)
			if took := time.Since(begun); took > within+minKubeRetry+time.Millisecond {
				t.Errorf("noticed after %s, want %s", took, within)
			}
			wantEqual(t, "the protocol", c.server.request(t).Proto, proto)
		})
	}
}

// A request that hangs is given up after a bound, and sent again on a new connection.
func TestWatchGivesUpWhatHangs(t *testing.T) {
	halfAnEvent := func(w http.ResponseWriter, r *http.Request) {
		stream(`{"type":"MODIF`)(w, r)
		hang(w, r)
	}
	for name, c := range map[string]struct {
		list, watch http.HandlerFunc // the first
		proto       string
		frozen      bool          // the first connection
		within      time.Duration // from the start to version 2
	}{
		"LIST without a head":  {list: hang, within: listTimeout},
		"LIST without an end":  {list: openStream(`{"kind":`), within: listTimeout},
		"no TLS handshake":     {proto: "HTTP/2.0", frozen: true, within: 5 * time.Second},
		"WATCH without a head": {watch: hang, within: maxWatchTime + watchGrace},
		"half an event":        {watch: halfAnEvent, within: maxWatchTime + watchGrace},
	} {
		inBubble(t, name, func(t *testing.T) {
			network, lists, watches := newPipeNetwork(), script{listsTo(2)[1]}, script{openStream()}
			if c.frozen {
				network.frozen.Store(1)
			}
			if c.list != nil {
				lists = append(script{c.list}, lists...)
			}
			if c.watch != nil {
				lists, watches = listsTo(2), append(script{c.watch}, watches...)
			}
			begun := time.Now()
			client := startWatchOver(t, cmp.Or(c.proto, "HTTP/1.1"), network, lists, watches)
			if c.watch != nil {
				client.want(t, applied1)
			}
			client.want(t, applied2)
			if took := time.Since(begun); took > c.within+750*time.Millisecond {
				t.Errorf("took %s, want at most %s and a first pause", took, c.within)
			}
		})
	}
}

// No connection is used for a second request, however the first ended, and none
// is left.
func TestWatchUsesAConnectionOnce(t *testing.T) {
	ok := listsTo(1)[0]
	for name, c := range map[string]struct{ list, watch http.HandlerFunc }{
		"LIST 401":        {respond(401, `{"message":"Unauthorized"}`), nil},
		"LIST 500":        {respond(500, "dial tcp 127.0.0.1:6443: refused"), nil},
		"LIST 302":        {respond(302, "", "Location", "http://elsewhere/"), nil},
		"LIST cut":        {cutStream("{"), nil},
		"LIST of garbage": {respond(200, "<html>"), nil},
		"WATCH 410":       {ok, respond(410, `{"reason":"Expired"}`)},
		"WATCH ends":      {ok, stream()},
		"WATCH cut":       {ok, cutStream()},
		"WATCH ERROR":     {ok, openStream(watchEvent("ERROR", `{"code":410}`))},
	} {
		for _, proto := range []string{"HTTP/2.0", "HTTP/1.1"} {
			inBubble(t, name+" "+proto, func(t *testing.T) {
				watches := script{openStream()}
				if c.watch != nil {
					watches = script{c.watch, openStream()}
				}
				client := startWatchOver(t, proto, newPipeNetwork(), script{c.list, listsTo(2)[1]}, watches)
				if c.watch != nil {
					client.want(t, applied1)
				}
				client.want(t, applied2)
				time.Sleep(time.Second)
				requests := len(strings.Fields(client.server.verbs()))
				if n, open := client.network.dials.Load(), client.network.open.Load(); int(n) != requests || open != 1 {
					t.Errorf("%d connections for %d requests, %d open; want as many, and that of the WATCH open", n, requests, open)
				}
			})
		}
	}
}

// run ends with its context in every state, at once, and leaves neither a
// goroutine (the bubble would not end) nor a connection.
func TestWatchStopsInEveryState(t *testing.T) {
	ok := listsTo(1)[0]
	for name, c := range map[string]struct {
		list, watch http.HandlerFunc
		state       string
		frozen      bool
	}{
		"listing":           {hang, nil, watchListing, false},
		"within a list":     {openStream(`{"kind"`), nil, watchListing, false},
		"connecting":        {ok, hang, watchConnecting, false},
		"watching":          {ok, openStream(), watchWatching, false},
		"watching, frozen":  {ok, openStream(), watchWatching, true},
		"within an event":   {ok, openStream(`{"type"`), watchWatching, false},
		"waiting":           {respond(500, "no", "Retry-After", "60"), nil, watchBackoff, false},
		"waiting after one": {ok, respond(500, "no", "Retry-After", "60"), watchBackoff, false},
	} {
		for _, proto := range []string{"HTTP/2.0", "HTTP/1.1"} {
			inBubble(t, name+" "+proto, func(t *testing.T) {
				client := startWatchOver(t, proto, newPipeNetwork(), script{c.list}, script{c.watch})
				time.Sleep(3 * time.Second)
				if s, open := client.snapshot(), client.network.open.Load(); s.state != c.state || (open == 1) == (c.state == watchBackoff) {
					t.Fatalf("%d connections, %+v, want %s, and one unless it is that", open, s, c.state)
				}
				if c.frozen {
					client.network.freeze()
				}
				client.wantStops(t)
				wantEqual(t, "open connections", client.network.open.Load(), 0)
			})
		}
	}
}

// wantStops checks that run ends with its context, at once.
func (c *watchTest) wantStops(t *testing.T) {
	t.Helper()
	begun := time.Now()
	c.stop()
	synctest.Wait()
	if took := time.Since(begun); took > time.Second {
		t.Errorf("stopped after %s", took)
	}
}

func TestWatchStopsWhileConnecting(t *testing.T) {
	for name, conn := range map[string]bool{"dial": false, "TLS handshake": true} {
		inBubble(t, name, func(t *testing.T) {
			ca, _ := makeCA(t)
			k := podClient(t, "127.0.0.1", "6443", ca)
			k.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
				if conn {
					client, _ := net.Pipe()
					return client, nil
				}
				<-ctx.Done()
				return nil, ctx.Err()
			}
			c := watchWith(t, k, "")
			time.Sleep(time.Second)
			c.wantStops(t)
		})
	}
}

// FuzzWatchStream compares what is applied of a stream with what encoding/json finds in
// it: the whole events, in order, up to the first that is none.
func FuzzWatchStream(f *testing.F) {
	for _, seed := range []string{
		watchEvent("ADDED", routesV(1)) + watchEvent("MODIFIED", routesV(2)),
		watchEvent("DELETED", routesV(1)) + watchEvent("ADDED", routesV(1)),
		watchEvent("BOOKMARK", `{}`) + watchEvent("ERROR", `{"code":410}`) + watchEvent("ADDED", routesV(1)),
		watchEvent("ADDED", routesV(1))[:100], `{"type":"ADDED","object":{"kind":"ConfigMap","data":null}}`, "\xff", "[[[[",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		var got []string
		w := routesWatcher(&kubeClient{}, "", slog.New(slog.DiscardHandler), func(set map[string]*fakeConfigMap) {
			if c := set["routes"]; c != nil {
				got = append(got, fmt.Sprintf("%q %q %q", c.Metadata.UID, c.Metadata.ResourceVersion, c.Data))
			}
		})
		w.objects = map[string]*fakeConfigMap{} // as after a LIST
		err := w.readEvents(bytes.NewReader(stream))
		if want, certain := wantOfStream(stream); certain && fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("applied %s, want %s; error %v", got, want, err)
		}
	})
}

// wantOfStream returns what of a stream is to be applied. It is not certain about keys
// that encoding/json takes for one another, that come twice, or in another order.
func wantOfStream(stream []byte) (want []string, certain bool) {
	var last *fakeConfigMap
	for d := json.NewDecoder(bytes.NewReader(stream)); ; {
		var text json.RawMessage
		if d.Decode(&text) != nil {
			return want, true
		}
		if hasOddKeys(text) {
			return nil, false
		}
		var event struct {
			Type   string
			Object json.RawMessage
		}
		err, o := json.Unmarshal(text, &event), &fakeConfigMap{}
		if err == nil && event.Type == "BOOKMARK" {
			continue
		}
		err = cmp.Or(err, json.Unmarshal(event.Object, o))
		m, isChange := o.Metadata, event.Type == "ADDED" || event.Type == "MODIFIED" || event.Type == "DELETED"
		switch {
		case err != nil || !isChange || o.Kind != "ConfigMap" || m.Name != "routes" || m.Namespace != "edge" || m.UID == "" || m.ResourceVersion == "":
			return want, true
		case event.Type == "DELETED":
			last = nil
		case !reflect.DeepEqual(o, last):
			want, last = append(want, fmt.Sprintf("%q %q %q", m.UID, m.ResourceVersion, o.Data)), o
		}
	}
}

// hasOddKeys reports whether a key of an event comes twice, in another spelling, or the
// object before its type.
func hasOddKeys(event []byte) bool {
	lower := bytes.ToLower(event)
	for _, key := range []string{"type", "object", "kind", "metadata", "name", "namespace", "uid", "resourceVersion", "continue", "generation", "data"} {
		n := bytes.Count(lower, []byte(`"`+strings.ToLower(key)+`"`))
		if n > 1 || n != bytes.Count(event, []byte(`"`+key+`"`)) {
			return true
		}
	}
	return bytes.ContainsAny(event, `\ſK`) || bytes.Index(event, []byte(`"object"`)) < bytes.Index(event, []byte(`"type"`))
}
