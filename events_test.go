package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fakeRecorder is a recorder that writes to a fakeKube, whose POSTs are answered
// by the script.
func fakeRecorder(t *testing.T, posts script) (*eventRecorder, *fakeKube, *textLog) {
	network, logged, server := newPipeNetwork(), &textLog{}, newFakeKube()
	server.scripts["POST"] = posts
	server.serve(t, network)
	r := newEventRecorder(*network.kube(t), "router-x", slog.New(slog.NewTextHandler(logged, nil)))
	inBackground(t, r.run)
	return r, server, logged
}

// fakeChange is what version n of edge/routes did.
func fakeChange(n int) (apiObject, sourceChange) {
	m := fakeMap("routes", fmt.Sprint(n), "")
	return m.apiObject, sourceChange{sourceContent: sourceContent{id: m.id(), version: fmt.Sprint(n)}, added: 3, changed: 2, removed: 1}
}

var fakeCreated = respond(201, `{"kind":"Event"}`)

func TestEventsAsTheAPIHasThem(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, server, logged := fakeRecorder(t, script{fakeCreated})
		o, c := fakeChange(7)
		c.rejected, c.examples = 2, []rejection{{"ns-01", "ConfigMap edge/routes", "bakend-2", "backend-0 to backend-3", "backend-1", ""}}
		r.reportChange(o, c)
		names := map[string]bool{}
		for _, want := range []struct{ kind, reason, message string }{
			{"Warning", "OverridesRejected", `rejected overrides: 2; ns-01: "bakend-2", expected backend-0 to backend-3, in force: backend-1; and 1 more`},
			{"Normal", "OverridesAccepted", "accepted resourceVersion 7: 3 overrides added, 2 changed, 1 removed"},
		} {
			request := server.request(t)
			if got := request.Method + " " + request.RequestURI + " " + request.Header.Get("Content-Type"); got != "POST /api/v1/namespaces/edge/events application/json" {
				t.Error(got)
			}
			var e map[string]any
			must(t, json.Unmarshal(request.body, &e))
			meta := e["metadata"].(map[string]any)
			names[meta["name"].(string)] = true
			about := map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "namespace": "edge", "name": "routes", "uid": "u-routes", "resourceVersion": "7"}
			if fmt.Sprint(e["involvedObject"]) != fmt.Sprint(about) || meta["namespace"] != "edge" || !strings.HasPrefix(meta["name"].(string), "routes.") {
				t.Errorf("about %v in %v", e["involvedObject"], meta)
			}
			if e["kind"] != "Event" || e["apiVersion"] != "v1" || e["type"] != want.kind || e["reason"] != want.reason || e["message"] != want.message {
				t.Errorf("%v %v %v %v: %v, want %v", e["apiVersion"], e["kind"], e["type"], e["reason"], e["message"], want)
			}
			if _, err := time.Parse(time.RFC3339, e["lastTimestamp"].(string)); err != nil || e["count"] != 1.0 || e["reportingInstance"] != "router-x" {
				t.Errorf("%s, error %v", request.body, err)
			}
		}
		if len(names) != 2 || logged.String() != "" {
			t.Errorf("names %v, log:\n%s", names, logged)
		}
	})
}

// The name is the same on all routers, and another for another version, object
// or reason.
func TestEventNames(t *testing.T) {
	name := func(o apiObject, reason string) string {
		r := newEventRecorder(kubeClient{}, "router-"+reason, slog.New(slog.DiscardHandler))
		r.enqueue(o, "Normal", reason, "", "")
		return (<-r.queue).Metadata.Name
	}
	a, _ := fakeChange(1)
	b, _ := fakeChange(2)
	other := a
	other.Metadata.UID = "u2"
	first, again := name(a, "x"), name(a, "x")
	others := []string{name(b, "x"), name(a, "y"), name(other, "x")}
	if first != again || slices.Contains(others, first) {
		t.Errorf("%s, again %s, of others %s", first, again, others)
	}
	// https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#dns-subdomain-names
	subdomain := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	for _, n := range []string{"n", "n-1.m", strings.Repeat("n", 253), strings.Repeat("n", 199) + ".m", strings.Repeat("n", 198) + "--m"} {
		a.Metadata.Name = n
		if n := name(a, "x"); len(n) > 253 || !subdomain.MatchString(n) {
			t.Errorf("%q of %d bytes, want a DNS subdomain of at most 253", n, len(n))
		}
	}
}

// What a version does with another number of backends has Events of its own: as
// another name, or the API server would not take them. Routers that saw the same have
// the same names; labels alone have none.
func TestEventsOfAVersionThatDoesMore(t *testing.T) {
	type eventText struct{ reason, message string }
	history := func() map[string]eventText {
		c, r, _ := fakeMaps(t, "routes")
		all := map[string]eventText{}
		take := func(want ...eventText) {
			t.Helper()
			var got []eventText
			for len(c.events.queue) > 0 {
				e := <-c.events.queue
				one := eventText{e.Reason, e.Message}
				if before, ok := all[e.Metadata.Name]; ok {
					t.Errorf("%v has the name of %v", one, before)
				}
				all[e.Metadata.Name] = one
				got = append(got, one)
			}
			if !slices.Equal(got, want) {
				t.Errorf("Events %q, want %q", got, want)
			}
		}
		const data = "a=backend-1 b=backend-3 c=backend-3 d=backend-3 e=junk"
		const junk = `; e: "junk", expected backend-0 to backend-`
		c.apply(0, fakeSet(fakeMap("routes", "1", data)))
		take(eventText{"OverridesRejected", "rejected overrides: 1" + junk + "3, in force: unresolved"},
			eventText{"OverridesAccepted", "accepted resourceVersion 1 in a router that started: 5 overrides"})
		r.setBackends(backendSet{ordinalRange: ordinalRange{count: 3}, specID: "u/2"})
		beyond := ""
		for _, namespace := range []string{"b", "c", "d"} {
			beyond += "; " + namespace + `: "backend-3", expected backend-0 to backend-2, in force: unresolved`
		}
		take(eventText{"OverridesRejected", "rejected overrides: 4" + beyond + junk + "2, in force: unresolved"},
			eventText{"OverridesAccepted", "accepted resourceVersion 1: 0 overrides added, 3 changed, 0 removed"})
		r.setBackends(backendSet{ordinalRange: ordinalRange{count: 4}, specID: "u/3"})
		take(eventText{"OverridesRejected", "rejected overrides: 1" + junk + "3, in force: unresolved"},
			eventText{"OverridesAccepted", "accepted resourceVersion 1: 0 overrides added, 3 changed, 0 removed"})
		c.apply(0, fakeSet(fakeMap("routes", "2", data))) // its labels
		take()
		wantEqual(t, "the version of the table", r.table().overridesVersion, "2")
		return all
	}
	if one, other := history(), history(); !maps.Equal(one, other) {
		t.Errorf("two routers that saw the same tell %q and %q", one, other)
	}
}

// A number of backends that there was before, within the life of an Event, is another
// change of the table and has Events of its own. Two routers give them the same names.
func TestEventsOfTheSameNumberAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, network := kubeOfFour(), newPipeNetwork()
		f.serve(t, network)
		var routers [2]*configMaps
		for i := range routers {
			c, r, _ := fakeMaps(t, "routes")
			c.apply(0, fakeSet(fakeMap("routes", "1", "a=backend-1 b=backend-3")))
			<-c.events.queue // of a router that starts
			followReplicas(t, network, nil, r.setBackends)
			routers[i] = c
		}
		seen := map[string]string{}
		for n, replicas := range []int{3, 4, 3, 4} {
			f.scale(replicas)
			synctest.Wait()
			var names [2][]string
			for i, c := range routers {
				for len(c.events.queue) > 0 {
					e := <-c.events.queue
					names[i] = append(names[i], e.Metadata.Name)
					one := fmt.Sprintf("change %d, %s: %s", n, e.Reason, e.Message)
					if before, ok := seen[e.Metadata.Name]; ok && before != one {
						t.Errorf("%q has the name of %q", one, before)
					}
					seen[e.Metadata.Name] = one
				}
			}
			if want := 5 - replicas; len(names[0]) != want || !slices.Equal(names[0], names[1]) {
				t.Errorf("scaled to %d, two routers have Events %v, want the same %d", replicas, names, want)
			}
		}
	})
}

func TestEventMessageIsBounded(t *testing.T) {
	for count, size := range map[int]int{1: 10, 5: 64, 8: 64, 1000: 253} {
		_, c := fakeChange(1)
		for i := range count {
			bad := rejection{fmt.Sprintf("%0*d", size, i), "s", strings.Repeat("\x00", 64), "backend-0 to backend-3", "unresolved", ""}
			if c.rejected++; c.rejected <= maxExamples {
				c.examples = append(c.examples, bad)
			}
		}
		message := rejectedMessage(c)
		named := strings.Count(message, "unresolved")
		if len(message) > maxEventMessage || named == 0 || named < count && !strings.HasSuffix(message, fmt.Sprintf("; and %d more", count-named)) {
			t.Errorf("%d entries: %d bytes name %d: …%s", count, len(message), named, message[max(0, len(message)-60):])
		}
	}
}

// An Event is tried twice, and what cannot be written is eventText with restraint.
func TestEventFailures(t *testing.T) {
	for name, tt := range map[string]struct {
		posts script
		asked int // requests for 50 Events
		lines int
	}{
		"created":            {script{fakeCreated}, 50, 0},
		"another router's":   {script{respond(409, `{"message":"exists","reason":"AlreadyExists"}`)}, 50, 0},
		"no permission":      {script{respond(403, `{"message":"events is forbidden","reason":"Forbidden"}`)}, 50, 1},
		"busy once":          {script{respond(429, "no", "Retry-After", "7"), fakeCreated}, 51, 0},
		"always broken":      {script{respond(500, "no")}, 100, 1},
		"cut":                {script{func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }}, 100, 1},
		"permission is lost": {script{fakeCreated, respond(403, "no"), respond(403, "no"), fakeCreated, respond(403, "no")}, 50, 2},
	} {
		inBubble(t, name, func(t *testing.T) {
			r, server, logged := fakeRecorder(t, tt.posts)
			for i := range 50 {
				r.reportChange(fakeChange(i))
			}
			time.Sleep(50*(eventInterval+2*time.Second) + time.Minute)
			wantEqual(t, "requests", len(strings.Fields(server.verbs())), tt.asked)
			if lines := logged.count("\n"); lines < tt.lines || lines > 2*tt.lines {
				t.Errorf("%d lines, want %d:\n%s", lines, tt.lines, logged)
			}
		})
	}
	inBubble(t, "the first 403 leaves no line out", func(t *testing.T) {
		busy := respond(500, "no")
		r, _, logged := fakeRecorder(t, script{busy, busy, respond(403, "no"), fakeCreated, busy})
		for i := range 4 { // of which the last one fails more than a minute after the first one
			r.reportChange(fakeChange(i))
			time.Sleep(30 * time.Second)
		}
		if logged.count("\n") != 3 || logged.count("omitted=0") != 3 {
			t.Errorf("the log has\n%s\nwant three lines with omitted=0", logged)
		}
	})
}

// Nothing waits for Events: with a server that does not answer, the queue fills
// and the rest is dropped.
func TestEventsDoNotBlock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, server, logged := fakeRecorder(t, script{hang, hang, fakeCreated})
		begun := time.Now()
		for i := range 10 * maxQueuedEvents {
			r.reportChange(fakeChange(i))
		}
		if took := time.Since(begun); took != 0 || logged.count("event queue full") != 1 {
			t.Errorf("took %s, log:\n%s", took, logged)
		}
		time.Sleep(10 * time.Minute)
		if n := len(strings.Fields(server.verbs())); n != maxQueuedEvents+2 && n != maxQueuedEvents+1 {
			t.Errorf("%d requests, want %d and two that hung", n, maxQueuedEvents)
		}
	})
}

// Each router tells of what it has moved, on the ConfigMap that there is.
func TestEventOfAMove(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, server, _ := fakeRecorder(t, script{fakeCreated})
		c := &configMaps{events: r, current: []map[string]configMapState{nil, {"routes": {fakeMap("routes", "7", ""), false}}}}
		receipt := moveReceipt{OverridesVersion: "7", Namespaces: 14, Moved: 3201, Cut: 12, Cancelled: 1, Seconds: 16.1, HeldSeconds: .06}
		names := map[string]bool{}
		for range 2 {
			time.Sleep(time.Second)
			c.reportMove(receipt)
			var e kubeEvent
			must(t, json.Unmarshal(server.request(t).body, &e))
			const want = "router-x moved 14 namespaces, 3201 sessions in 16.1 s, each namespace held for 0.1 s at most, 12 cut, 1 cancelled, for overrides 7"
			if e.Type != "Normal" || e.Reason != "SessionsMoved" || e.Message != want || e.InvolvedObject.Name != "routes" {
				t.Errorf("%+v, want %q about routes", e, want)
			}
			names[e.Metadata.Name] = true
		}
		wantEqual(t, "names, one for each Event", len(names), 2)
		(&configMaps{current: []map[string]configMapState{nil}}).reportMove(receipt) // there is none: nothing to tell on
	})
}
