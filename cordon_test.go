package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseCordon(t *testing.T) {
	for list, want := range map[string]string{"": "", " ": "", "2": "2", "5, 2\n": "2,5", "2,2,0": "0,2", "2147483647": "2147483647"} {
		c, err := parseCordon(list)
		must(t, err)
		wantEqual(t, fmt.Sprintf("%q", list), c.String(), want)
		if want == "" && c != nil {
			t.Errorf("%q is an empty list, want none", list)
		}
	}
	for _, list := range []string{",", "2,", "2,,5", "2;5", "2 5", "02", "+2", "-1", "2-5", "backend-2", "2.0", "0x2", "２", "2147483648", strings.Repeat("9", 300)} {
		if c, err := parseCordon(list); err == nil || len(err.Error()) > 120 {
			t.Errorf("%.20q: %v, error %v, want a short error", list, c, err)
		}
	}
}

func TestCordonAmong(t *testing.T) {
	tests := []struct {
		list     string
		backends ordinalRange
		want     string
		all      bool
	}{
		{"", ordinalRange{0, 4}, "", false},
		{"2", ordinalRange{0, 4}, "2", false},
		{"2,5", ordinalRange{0, 4}, "2", false},
		{"2,5", ordinalRange{0, 6}, "2,5", false},
		{"7", ordinalRange{0, 4}, "", false},
		{"0,1,2,3", ordinalRange{0, 4}, "", true},
		{"0,1,2,3", ordinalRange{0, 5}, "0,1,2,3", false},
		{"0", ordinalRange{0, 1}, "", true},
		{"1,3", ordinalRange{2, 2}, "3", false},
		{"2,3,9", ordinalRange{2, 2}, "", true},
		{"0", ordinalRange{}, "", false},
	}
	for _, tt := range tests {
		list, err := parseCordon(tt.list)
		must(t, err)
		part, all := list.among(tt.backends)
		if part.String() != tt.want || all != tt.all {
			t.Errorf("%q among %s: %q, all: %v; want %q, %v", tt.list, tt.backends, part, all, tt.want, tt.all)
		}
	}
}

// cordonedTable returns a table of four backends, or of another range, of which those in list
// are cordoned.
func cordonedTable(t *testing.T, list string, active ordinalRange, data map[string]string, old *table) *table {
	t.Helper()
	c, err := parseCordon(list)
	must(t, err)
	return newTable("backend", false, active, c, []sourceContent{contentOf("test", "1", data)}, old)
}

// A cordon moves the namespaces that are hashed to the backend. Overrides stay, and so does
// all else. All ways to ask for an owner agree.
func TestTableCordon(t *testing.T) {
	for _, first := range []int{0, 3} {
		active, list := ordinalRange{first, 4}, fmt.Sprint(first+2)
		data := map[string]string{"pinned": fmt.Sprint("backend-", first+2)}
		before := cordonedTable(t, "", active, data, nil)
		after := cordonedTable(t, list, active, data, before)
		moved, cordoned := 0, 0
		for _, namespace := range append(manyNamespaces(2000), "pinned") {
			from, _ := before.ownerOf(namespace)
			to, ok := after.ownerOf(namespace)
			same, _ := after.lookup(namespace, hash64(namespace))
			if !ok || same != to {
				t.Fatalf("%s: owner %d, lookup %d", namespace, to, same)
			}
			switch why := after.explain(namespace); {
			case namespace == "pinned":
				if to != first+2 || why != whyOverride {
					t.Errorf("the override is with %d, %s", to, why)
				}
			case from != first+2:
				if to != from || why != whyHash {
					t.Fatalf("%s moves from %d to %d, %s", namespace, from, to, why)
				}
			default:
				cordoned++
				if hashed, ok := after.uncordonedOwner(namespace); to != from && why == whyCordoned && hashed == from && ok {
					moved++
				}
			}
		}
		if moved != cordoned || moved < 300 {
			t.Errorf("%d of %d namespaces of the cordoned backend moved", moved, cordoned)
		}
	}
}

// A lookup allocates nothing, be the backend cordoned or not (invariant 1).
func TestCordonedOwnerAllocatesNothing(t *testing.T) {
	table, next := cordonedTable(t, "0,2,5", ordinalRange{0, 8}, nil, nil), 0
	namespaces := manyNamespaces(1001)
	if n := testing.AllocsPerRun(1000, func() { table.ownerOf(namespaces[next]); next++ }); n != 0 {
		t.Errorf("%v allocations for a lookup, want none", n)
	}
}

// Only what is in force of a list counts in a stamp. Without that, the stamp is the one of
// a version without cordons.
func TestCordonStamp(t *testing.T) {
	stamp := func(list string, backends int) string {
		return cordonedTable(t, list, ordinalRange{0, backends}, nil, nil).stamp
	}
	wantEqual(t, "stamp without a cordon", stamp("", 4), "74cc2dd6e99cd538.0000000000000000")
	for _, list := range []string{"4", "0,1,2,3"} {
		wantEqual(t, "stamp with "+list, stamp(list, 4), stamp("", 4))
	}
	all := []string{stamp("", 4), stamp("", 3), stamp("3", 4), stamp("2", 4), stamp("2,3", 4), stamp("2", 5)}
	slices.Sort(all)
	if len(slices.Compact(all)) != 6 {
		t.Errorf("two cordons have one stamp: %q", all)
	}
	wantEqual(t, "stamp of another order", stamp("3,2,9", 4), stamp("2,3", 4))
}

// A kept namespace has the owner that it had, also where the hash gives that to nobody any more. It
// counts as one that the hash gives its owner only where that is the same.
func TestCordonOfKeptNamespaces(t *testing.T) {
	for _, namespace := range manyNamespaces(100) {
		junk := map[string]string{namespace: "junk"}
		plain := cordonedTable(t, "", ordinalRange{0, 4}, nil, nil)
		kept := cordonedTable(t, "2", ordinalRange{0, 4}, junk, plain)
		was, _ := plain.ownerOf(namespace)
		hashed, _ := cordonedTable(t, "2", ordinalRange{0, 4}, nil, nil).ownerOf(namespace)
		if owner, _ := kept.ownerOf(namespace); owner != was || kept.overrides == 0 != (was == hashed) {
			t.Errorf("%s is with %d, want %d; of %d namespaces the hash does not give the owner", namespace, owner, was, kept.overrides)
		}
		wantEqual(t, "stamp of the same owner", kept.withKept(func(string) int { return was }).stamp, kept.stamp)
		again := cordonedTable(t, "", ordinalRange{0, 4}, junk, kept)
		wantEqual(t, "namespaces whose owner the hash does not give, without a cordon", again.overrides, 0)
		next := kept.withKept(func(string) int { return hashed })
		wantEqual(t, "and with the hash's owner", next.overrides, 0)
		if owner, _ := next.ownerOf(namespace); owner != hashed {
			t.Errorf("%s is with %d, want %d", namespace, owner, hashed)
		}
		stays := kept.withKept(func(string) int { return 2 })
		wantEqual(t, "and with another owner", stays.overrides, 1)
		wantEqual(t, "and with the hash's owner again", stays.withKept(func(string) int { return hashed }).overrides, 0)
		wantEqual(t, "and with none", kept.withKept(func(string) int { return unresolved }).overrides, 1)
		if owner, _ := stays.ownerOf(namespace); owner != 2 {
			t.Errorf("%s is with %d, want 2: it was there when it was kept", namespace, owner)
		}
	}
}

// The router swaps its table for another cordon, once.
func TestRouterCordons(t *testing.T) {
	r, tail := loggedRouter(t)
	r.update(contentOf("test", "1", pairs("a=backend-1")))
	for _, list := range []cordon{{2}, {2}, {2, 3}, nil} {
		r.setBackends(backendSet{ordinalRange: ordinalRange{0, 4}, listedCordon: list})
		wantEqual(t, "cordon in force", r.table().cordon.String(), list.String())
	}
	wantLine(t, tail.all("routing table updated"), 4, map[string]any{"cordon": "", "backends": 4.0})
	wantEqual(t, "tables with a cordon", strings.Count(fmt.Sprint(tail.all("routing table updated")), "cordon:2"), 2)
}

// From state to state of the annotation: a router that is alone, and one that shares the
// stored range. A list that is not valid changes nothing.
func TestCordonFollowed(t *testing.T) {
	annotate := func(list string) func(*fakeKube) { return func(f *fakeKube) { f.annotate(list) } }
	scale := func(replicas int) func(*fakeKube) {
		return func(f *fakeKube) {
			f.scale(replicas)
			f.setReady([]int{0, 1, 2, 3, 4, 5}[:replicas]...)
		}
	}
	const invalid, all = "not a list of ordinals", "has all backends"
	steps := []struct {
		what        string
		change      func(*fakeKube)
		want        string // as it is listed
		part        string // of it, what is in force
		count       int
		whyRejected string // a part of the text
	}{
		{"set", annotate("2"), "2", "2", 4, ""},
		{"changed", annotate("3,2"), "2,3", "2,3", 4, ""},
		{"invalid", annotate("3;2"), "2,3", "2,3", 4, invalid + ` like 2,5 (got "3;2"); in force: 2,3`},
		{"invalid, and scaled out", scale(5), "2,3", "2,3", 5, invalid},
		{"invalid, and scaled in", scale(3), "2,3", "2", 3, invalid + ` like 2,5 (got "3;2"); in force: 2`},
		{"valid again", annotate("1"), "1", "1", 3, ""},
		{"invalid, made anew", func(f *fakeKube) {
			f.deleteStatefulSet()
			f.setStatefulSet(func(s *fakeStatefulSet) { s.uid, s.generation, s.cordon = "new", 1, "x" })
		}, "1", "1", 3, invalid},
		{"removed", annotate(""), "", "", 3, ""},
		{"not active", annotate("5"), "5", "", 3, ""},
		{"becomes active", scale(6), "5", "5", 6, ""},
		{"deleted", func(f *fakeKube) { f.deleteStatefulSet() }, "5", "5", 6, ""},
		{"made anew without", func(f *fakeKube) {
			f.setStatefulSet(func(s *fakeStatefulSet) { s.uid, s.generation, s.cordon = "newer", 1, "" })
		}, "", "", 6, ""},
		{"all", annotate("0,1,2,3,4,5"), "0,1,2,3,4,5", "", 6, all},
		{"all but one", annotate("0,1,2,3,4"), "0,1,2,3,4", "0,1,2,3,4", 6, ""},
		{"all, by scaling in", scale(4), "0,1,2,3,4", "", 4, all},
		{"invalid after all", annotate("-"), "0,1,2,3,4", "", 4, invalid + ` like 2,5 (got "-"); no backend is cordoned`},
	}
	for name, shared := range map[string]*sharedRange{"alone": nil, "shared": {}} {
		inBubble(t, name, func(t *testing.T) {
			f, n := kubeOfFour(), newPipeNetwork()
			f.serve(t, n)
			var last backendSet
			r := followReplicas(t, n, shared, func(s backendSet) { last = s })
			for _, step := range steps {
				step.change(f)
				synctest.Wait()
				time.Sleep(time.Minute)
				synctest.Wait()
				part, _ := last.listedCordon.among(last.ordinalRange)
				wantEqual(t, step.what+": listed", last.listedCordon.String(), step.want)
				wantEqual(t, step.what+": in force", part.String(), step.part)
				wantEqual(t, step.what+": backends", last.count, step.count)
				why := r.whyCordonRejected()
				if (why == "") != (step.whyRejected == "") || !strings.Contains(why, step.whyRejected) {
					t.Errorf("%s: rejected: %q, want %q", step.what, why, step.whyRejected)
				}
				if text := r.whyNotReady(); text != "" {
					t.Errorf("%s: not ready: %s", step.what, text)
				}
			}
			wantEqual(t, "lines of rejections", r.logged.count("cordon rejected"), 6)
		})
	}
}

// A router that starts with an invalid list does not know which one other routers have. One
// that shares a hand-off, which waits until routers agree, begins without; another one
// knows no backends until the list is valid, and says so.
func TestCordonInvalidAtStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.annotate("2,x")
		f.serve(t, n)
		alone := followReplicas(t, n, nil, nil)
		shares := followReplicas(t, n, &sharedRange{}, nil)
		time.Sleep(time.Minute)
		wantEqual(t, "backends", alone.last.Load().(ordinalRange), ordinalRange{})
		wantEqual(t, "why not ready", alone.whyNotReady(),
			`StatefulSet edge/backend: the annotation router-cordon is not a list of ordinals like 2,5 (got "2,x")`)
		wantEqual(t, "backends that are shared", shares.last.Load().(ordinalRange), ordinalRange{0, 4})
		wantEqual(t, "cordon that is shared", shares.cordon.Load().(string), "")
		f.annotate("2")
		synctest.Wait()
		for _, r := range []*followingRouter{alone, shares} {
			wantEqual(t, "backends of a valid list", r.last.Load().(ordinalRange), ordinalRange{0, 4})
			wantEqual(t, "cordon", r.cordon.Load().(string), "2")
			wantEqual(t, "why not ready", r.whyNotReady(), "")
		}
	})
}

// Each rejection has one Event on the StatefulSet, of all routers together.
func TestCordonEvents(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.serve(t, n)
		recorder := newEventRecorder(kubeClient{}, "router-1", slog.New(slog.DiscardHandler))
		for range 2 {
			r := followReplicas(t, n, nil, nil)
			r.onCordonRejected = recorder.reportCordon
		}
		names := map[string]int{}
		for _, list := range []string{"2", "2;3", "3", "0,1,2,3", "3"} {
			f.annotate(list)
			synctest.Wait()
			f.setReady(0, 1, 2) // another version of the StatefulSet
			synctest.Wait()
		}
		for len(recorder.queue) > 0 {
			e := <-recorder.queue
			names[e.Metadata.Name]++
			o := e.InvolvedObject
			if e.Reason != "CordonRejected" || e.Type != "Warning" || o.APIVersion != "apps/v1" || o.Kind != "StatefulSet" || o.Name != "backend" || o.UID != "u-backend" {
				t.Errorf("Event %+v", e)
			}
		}
		if len(names) != 2 {
			t.Errorf("Events by name: %v, want two", names)
		}
		for name, count := range names {
			wantEqual(t, "Events named "+name, count, 2)
		}
	})
}

// askAdmin returns the admin port's answer.
func askAdmin(a *admin, method, path, body string) string {
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return strings.TrimSpace(w.Body.String())
}

// What the admin port says of a cordon: /owner, /backends and a preview.
func TestAdminCordon(t *testing.T) {
	a := previewAdmin(t)
	b := bucket("b", 4)
	list := cordon{b}
	past := backendName("backend", bucketPast(hash64("b"), cordonOf(4, b)))
	moves := fmt.Sprintf(`{"namespace":"b","from":"backend-%d","to":%q,"sessions":1}`, b, past)
	plan := func(body, want string) {
		t.Helper()
		got := askAdmin(a, "POST", "/plan", body)
		if !strings.Contains(got, want) {
			t.Errorf("plan %s: %s, want %s", body, got, want)
		}
	}
	plan(fmt.Sprintf(`{"cordon":[%d]}`, b), moves)
	plan(fmt.Sprintf(`{"replicas":4,"cordon":[9,%d,%d]}`, b, b), moves)
	plan(`{"cordon":[]}`, `"namespaces":1,`) // of late, which moves in any case
	plan(`{"cordon":[0,1,2,3]}`, `{"error":"cordon must leave a backend that is not cordoned"}`)
	plan(`{"cordon":[0,1],"replicas":2}`, `{"error":"cordon must leave a backend that is not cordoned"}`)
	plan(`{"cordon":[-1]}`, `cordon must have ordinals (got -1)"}`)
	plan(`{"cordon":["2"]}`, `expected an integer (got a string)`)
	plan(`{"cordon":[`+strings.Repeat("1,", maxCordonBytes/2)+`1]}`, `cordon must have at most 262144 bytes`)
	plan(`{"cordon":null}`, `the body must be a ConfigMap`)
	plan(`{"cordon":[2],"kind":"ConfigMap"}`, `{"error":"the body must not have both a ConfigMap and cordon"}`)

	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 4}, listedCordon: list})
	owner := askAdmin(a, "GET", "/owner?namespace=b", "")
	if !strings.Contains(owner, fmt.Sprintf(`"why":"cordoned","hash_owner":"backend-%d"`, b)) {
		t.Errorf("owner of a cordoned namespace: %s", owner)
	}
	if owner = askAdmin(a, "GET", "/owner?namespace=a", ""); strings.Contains(owner, "hash_owner") {
		t.Errorf("owner of another namespace: %s", owner)
	}
	all := askAdmin(a, "GET", "/backends", "")
	if strings.Count(all, `"cordoned":true`) != 1 {
		t.Errorf("backends: %s, want one cordoned", all)
	}
	status := askAdmin(a, "GET", "/status", "")
	if strings.Count(status, `"in_table":true,"cordoned":true`) != 1 {
		t.Errorf("status: %s, want one cordoned", status)
	}
	plan(`{"replicas":4}`, moves) // the list in force stays
	plan(`{"cordon":[]}`, `"namespaces":1,`)
}

// A backend is safe to remove when it is cordoned, has no override, and no session.
func TestSafeToRemove(t *testing.T) {
	a, update := adminOf(t, "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1")
	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 4}, listedCordon: cordon{2, 3}})
	update(contentOf("test", "1", pairs("a=backend-3")))
	want := func(names ...string) {
		t.Helper()
		var got struct{ Backends []probedBackend }
		must(t, json.Unmarshal([]byte(askAdmin(a, "GET", "/backends", "")), &got))
		var safe []string
		for _, b := range got.Backends {
			if b.SafeToRemove {
				safe = append(safe, b.Name)
			}
		}
		wantEqual(t, "safe to remove", fmt.Sprint(safe), fmt.Sprint(names))
	}
	want("backend-2")
	f := a.proxy.mover.flights.add("b", 2, "", nil)
	want()
	f.end()
	want("backend-2")
	a.proxy.pending.take(2) // an upgrade, which with -handoff=off has no flight
	want()
	a.proxy.pending.giveBack(2)
	want("backend-2")
	a.proxy.relay.add(&session{namespace: "b", backend: 2})
	want()
}

// The metrics say that a backend has no namespaces when it is cordoned and has no override. It
// may be away then without an alert.
func TestBackendsWithoutNamespaces(t *testing.T) {
	a, update := adminOf(t, "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1")
	log := slog.New(slog.DiscardHandler)
	pods := newEndpointWatcher(kubeClient{}, "edge", "backend", "headless", 9000, func(map[int]string) {}, log)
	a.replicaWatcher = newReplicaWatcher(kubeClient{}, "edge", pods, nil, nil, log)
	want := func(values ...int) {
		t.Helper()
		var text strings.Builder
		a.writeMetrics(metricsWriter{w: &text})
		for i, value := range values {
			line := fmt.Sprintf("router_backend_without_namespaces{backend=\"backend-%d\"} %d\n", i, value)
			if !strings.Contains(text.String(), line) {
				t.Errorf("no %s", line)
			}
		}
	}
	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 4}, listedCordon: cordon{2, 3}})
	update(contentOf("test", "1", pairs("a=backend-3")))
	want(0, 0, 1, 0)
	update(contentOf("test", "2", pairs("a=backend-0")))
	want(0, 0, 1, 1)
	update(contentOf("test", "3", pairs("a=nobody"))) // it keeps its previous owner
	want(0, 0, 1, 1)
	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 4}})
	want(0, 0, 0, 0)
	a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 2}, listedCordon: cordon{0, 1}})
	want(0, 0) // all are listed, and none is in force
}
