package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeMaps follows ConfigMaps of these names in edge, or, with none, those that
// a=b selects. Nothing runs: the tests give sets to apply.
func fakeMaps(t *testing.T, names ...string) (*configMaps, *tableStore, *logTail) {
	t.Helper()
	r, log := loggedRouter(t)
	selector := ""
	if len(names) == 0 {
		selector = "a=b"
	}
	var c *configMaps
	r.addSource(false, func(update func(...sourceContent)) overrideSource {
		c = newConfigMaps(kubeClient{}, "edge", names, selector, "handoff", "router-x", update, r.log)
		r.reportChange = c.reportChange
		return c
	})
	return c, r, log
}

// fakeMap is a ConfigMap of entries like "ns-01=backend-1 ns-02=backend-2".
func fakeMap(name, version, data string) *configMap {
	m := &configMap{Data: *newOverrideSet(pairs(data))}
	m.Kind, m.Metadata.Namespace, m.Metadata.Name = "ConfigMap", "edge", name
	m.Metadata.UID, m.Metadata.ResourceVersion = "u-"+name, version
	return m
}

func pairs(text string) map[string]string {
	data := map[string]string{}
	for _, pair := range strings.Fields(text) {
		namespace, value, _ := strings.Cut(pair, "=")
		data[namespace] = value
	}
	return data
}

// fakeSet is what a watcher has.
func fakeSet(all ...*configMap) map[string]*configMap {
	set := map[string]*configMap{}
	for _, m := range all {
		set[m.Metadata.Name] = m
	}
	return set
}

// wantTable checks all overrides, like "ns-01=1 ns-02=refused".
func wantTable(t *testing.T, r *tableStore, want string) {
	t.Helper()
	if r.table() == nil {
		if want != "" {
			t.Fatalf("no table, want %s", want)
		}
		return
	}
	var got []string
	all := overridesOf(r.table())
	for _, namespace := range slices.Sorted(maps.Keys(all)) {
		got = append(got, strings.Replace(fmt.Sprint(namespace, "=", all[namespace]), "=-2", "=refused", 1))
	}
	if got := strings.Join(got, " "); got != want || r.table().overrides != len(all) {
		t.Errorf("%d overrides %s, want %s", r.table().overrides, got, want)
	}
}

// With several names there is no table before each was there: what the missing
// one holds would be hashed.
func TestConfigMapsMustAllBeThere(t *testing.T) {
	c, r, log := fakeMaps(t, "a", "b", "c")
	c.apply(1, fakeSet(fakeMap("b", "2", "ns-b=backend-2")))
	c.apply(0, fakeSet())
	wantTable(t, r, "")
	wantEqual(t, "why it is not ready", c.whyNotReady(),
		"ConfigMap edge/a does not exist: kubectl -n edge create configmap a; ConfigMap edge/c: no answer from the API server yet")
	wantEqual(t, "lines about the absence", len(log.all("ConfigMap not found")), 1)
	c.apply(2, fakeSet(fakeMap("c", "3", "")))
	wantTable(t, r, "")
	c.apply(0, fakeSet(fakeMap("a", "1", "ns-a=backend-1")))
	wantTable(t, r, "ns-a=1 ns-b=2")
	if r.swaps.Load() != 1 || c.whyNotReady() != "" {
		t.Errorf("%d swaps, missing: %s", r.swaps.Load(), c.whyNotReady())
	}
	c.apply(1, fakeSet(fakeMap("b", "4", "ns-b=backend-3 ns-b2=backend-0")))
	wantTable(t, r, "ns-a=1 ns-b=3 ns-b2=0")
	wantLine(t, log.all("routing table updated"), 2, map[string]any{"source": "ConfigMap edge/b", "added": 1.0, "changed": 1.0, "removed": 0.0})
	wantEqual(t, "swaps after one event more", r.swaps.Load(), 2)
}

// A deleted ConfigMap stays in force until there is one of its name again
// (invariant 4); emptied first, it leaves nothing.
func TestConfigMapsStayWhenDeleted(t *testing.T) {
	for _, names := range [][]string{{"a"}, nil} {
		t.Run(fmt.Sprint(names), func(t *testing.T) {
			c, r, log := fakeMaps(t, names...)
			want := func(table string, objects ...watchedObject) {
				t.Helper()
				wantTable(t, r, table)
				if got := c.watchedObjects(); !slices.Equal(got, objects) {
					t.Errorf("objects %v, want %v", got, objects)
				}
			}
			followed := "ConfigMap edge/a"
			if names == nil {
				followed = "ConfigMap edge/a=b"
			}
			want("", watchedObject{object: followed})
			c.apply(0, fakeSet())
			want("", watchedObject{object: followed, absent: true})
			if why := c.whyNotReady(); !strings.Contains(why, "kubectl -n edge ") {
				t.Errorf("missing: %s", why)
			}
			c.apply(0, fakeSet(fakeMap("a", "1", "ns-01=backend-1")))
			want("ns-01=1", watchedObject{"ConfigMap edge/a", false})
			c.apply(0, fakeSet())
			c.apply(0, fakeSet())
			want("ns-01=1", watchedObject{"ConfigMap edge/a", true})
			if n := r.swaps.Load(); n != 1 || len(log.all("ConfigMap deleted or no longer selected; keeping its last overrides")) != 1 {
				t.Errorf("%d swaps, want 1, and one line about the absence", n)
			}
			c.apply(0, fakeSet(fakeMap("a", "1", "ns-01=backend-2"))) // the same version of another object
			want("ns-01=2", watchedObject{"ConfigMap edge/a", false})
			c.apply(0, fakeSet(fakeMap("a", "3", "")))
			c.apply(0, fakeSet())
			want("", watchedObject{"ConfigMap edge/a", true})
			wantLine(t, log.all("ConfigMap found again"), 1, map[string]any{"object": "ConfigMap edge/a"})
		})
	}
}

// A selection is one set: a LIST that brings several changes is one swap, and what
// it no longer has is out of force, as for a router that starts then. Only when
// nothing is selected any more all stays as it was.
func TestConfigMapsOfASelection(t *testing.T) {
	c, r, log := fakeMaps(t)
	a, b := fakeMap("a", "1", "x=backend-1 ns-a=backend-1"), fakeMap("b", "2", "x=backend-2 ns-b=backend-2")
	want := func(table string, swaps int64, set map[string]*configMap, objects ...watchedObject) {
		t.Helper()
		wantTable(t, r, table)
		if got := c.watchedObjects(); r.swaps.Load() != swaps || !slices.Equal(got, objects) {
			t.Errorf("%d swaps, objects %v, want %d, %v", r.swaps.Load(), got, swaps, objects)
		}
		starts, started, _ := fakeMaps(t)
		starts.apply(0, set)
		switch {
		case len(set) == 0 && started.table() != nil:
			t.Error("a router that starts with nothing selected has a table")
		case len(set) == 0 && starts.whyNotReady() != "no ConfigMap has the label: kubectl -n edge label configmap NAME a=b":
			t.Errorf("a router that starts: %s", starts.whyNotReady())
		case len(set) > 0 && started.table().ownersHash != r.table().ownersHash:
			t.Errorf("a router that starts has other overrides %v", overridesOf(started.table()))
		}
	}
	seesA, seesB := watchedObject{"ConfigMap edge/a", false}, watchedObject{"ConfigMap edge/b", false}
	set := fakeSet(b, a)
	c.apply(0, set)
	want("ns-a=1 ns-b=2 x=refused", 1, set, seesA, seesB)
	set = fakeSet(a)
	c.apply(0, set)
	want("ns-a=1 x=1", 2, set, seesA)
	wantLine(t, log.all("ConfigMap no longer selected; its overrides are removed"), 1,
		map[string]any{"level": "INFO", "object": "ConfigMap edge/b", "resource_version": "2"})
	wantLine(t, log.all("routing table updated"), 2, map[string]any{"source": "ConfigMap edge/b", "removed": 1.0, "overrides": 2.0})

	set = fakeSet(b, fakeMap("c", "4", "ns-c=backend-3")) // one leaves and two come, in one LIST
	c.apply(0, set)
	seesC := watchedObject{"ConfigMap edge/c", false}
	want("ns-b=2 ns-c=3 x=2", 3, set, seesB, seesC)
	if v := r.table().overridesVersion; !strings.HasPrefix(v, "2-") {
		t.Errorf("version %s, want that of 2", v)
	}
	stamp := r.table().stamp
	c.apply(0, fakeSet()) // the label was taken from all
	c.apply(0, fakeSet())
	seesB.absent, seesC.absent = true, true
	want("ns-b=2 ns-c=3 x=2", 3, nil, seesB, seesC)
	if n := len(log.all("ConfigMap deleted or no longer selected; keeping its last overrides")); n != 2 || r.table().stamp != stamp {
		t.Errorf("%d lines about what is absent, want 2; stamp %s after %s", n, r.table().stamp, stamp)
	}
	set = fakeSet(b) // and given back to one
	c.apply(0, set)
	seesB.absent = false
	want("ns-b=2 x=2", 4, set, seesB)
}

// What two objects disagree on stays where it was, whoever comes first, until
// they agree.
func TestConfigMapsDisagree(t *testing.T) {
	steps := []struct{ a, b, table string }{
		{"x=backend-1 y=backend-1", "z=backend-3", "x=1 y=1 z=3"},
		{"x=backend-1 y=backend-1", "x=backend-2 z=backend-3", "x=1 y=1 z=3"},         // b is later
		{"x=backend-1 y=backend-1", "x=backend-1 z=backend-3", "x=1 y=1 z=3"},         // they agree
		{"x=backend-3 y=backend-1", "x=backend-1 z=backend-3", "x=1 y=1 z=3"},         // a is earlier, and changed
		{"x=backend-3 y=backend-1", "x=backend-3 z=backend-3", "x=3 y=1 z=3"},         // they agree again
		{"x=backend-3 y=backend-1 h=backend-0", "x=backend-3 h=backend-1", "x=3 y=1"}, // both at once, and h was hashed
		{"y=backend-1 h=backend-0", "x=backend-2 h=junk", "x=2 y=1"},
		{"y=backend-1 h=backend-0", "x=backend-2", "h=0 x=2 y=1"},
		{"y=backend-1 x=junk", "x=backend-3", "x=2 y=1"}, // one that cannot be read holds the other back
		{"y=backend-1", "x=backend-3", "x=3 y=1"},
	}
	c, r, _ := fakeMaps(t)
	for i, step := range steps {
		version := fmt.Sprint(10 + i)
		c.apply(0, fakeSet(fakeMap("a", version, step.a), fakeMap("b", version, step.b)))
		wantTable(t, r, step.table)
	}
}

// A selector that selects the object of the hand-off too leaves that out, also if it is the only
// one, and the log says so once. A ConfigMap that has a name is taken whatever that is.
func TestConfigMapsWithoutHandoffObject(t *testing.T) {
	c, r, log := fakeMaps(t)
	object := func(version string) *configMap { return fakeMap("handoff", version, "plan=4 answer-router-a=5") }
	c.watchers[0].apply(fakeSet(object("1")))
	wantTable(t, r, "")
	wantEqual(t, "why it is not ready", c.whyNotReady(), "no ConfigMap has the label: kubectl -n edge label configmap NAME a=b")
	set := fakeSet(object("2"), fakeMap("a", "3", "x=backend-1"))
	c.watchers[0].apply(set)
	wantEqual(t, "ConfigMaps that the watcher has", len(set), 2)
	c.watchers[0].apply(fakeSet(object("4"), fakeMap("a", "3", "x=backend-1")))
	wantTable(t, r, "x=1")
	if got := c.watchedObjects(); !slices.Equal(got, []watchedObject{{object: "ConfigMap edge/a"}}) {
		t.Errorf("objects %v, want a alone", got)
	}
	wantEqual(t, "swaps", r.swaps.Load(), 1)
	said := log.all("selector of overrides selects the object of the hand-off, which is left out")
	wantLine(t, said, 1, map[string]any{"object": "ConfigMap edge/handoff"})
	c, r, _ = fakeMaps(t, "handoff")
	c.watchers[0].apply(fakeSet(fakeMap("handoff", "1", "x=backend-1")))
	wantTable(t, r, "x=1")
}

// A conflict is reported for each object, and a router that starts with one
// refuses the namespace rather than guess.
func TestConflictIsReported(t *testing.T) {
	c, r, log := fakeMaps(t)
	a := fakeMap("a", "1", "x=backend-1 y=backend-1")
	c.apply(0, fakeSet(a))
	c.apply(0, fakeSet(a, fakeMap("b", "2", "x=backend-2 y=backend-1")))
	want := []rejection{
		{"x", "ConfigMap edge/a", "backend-1", "the same backend in all sources", "backend-1", ""},
		{"x", "ConfigMap edge/b", "backend-2", "the same backend in all sources", "backend-1", ""},
	}
	if got := r.table().rejectionsOf("x"); !slices.Equal(got, want) || r.table().explain("x") != whyConflict || r.table().conflicts != 1 {
		t.Errorf("%d conflicts, %s, %v, want %v", r.table().conflicts, r.table().explain("x"), got, want)
	}
	if got := r.table().rejectionsOf("y"); got != nil || r.table().explain("y") != whyOverride {
		t.Errorf("y: %s, %v", r.table().explain("y"), got)
	}
	wantLine(t, log.all("override rejected"), 1, map[string]any{"source": "ConfigMap edge/b", "source_version": "2", "namespace": "x",
		"value": "backend-2", "expected": "the same backend in all sources", "in_force": "backend-1"})
	wantLine(t, log.all("routing table updated"), 2, map[string]any{"source": "ConfigMap edge/b", "conflicts": 1.0, "invalid": 0.0, "overrides": 2.0})

	c, r, _ = fakeMaps(t)
	c.apply(0, fakeSet(a, fakeMap("b", "2", "x=backend-2 y=backend-1")))
	wantTable(t, r, "x=refused y=1")
	wantEqual(t, "why", r.table().explain("x"), whyUnresolved)
}

// The order in which objects come, and how they are followed, is not seen in the
// table: two routers with the same objects have the same.
func TestConfigMapsMergeInOrder(t *testing.T) {
	all := []*configMap{fakeMap("a", "1", "x=backend-1"), fakeMap("b", "2", "x=backend-1 y=junk"), fakeMap("c", "3", "z=backend-9 y=backend-0")}
	var versions []string
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}} {
		c, r, _ := fakeMaps(t, "a", "b", "c")
		for _, i := range order {
			c.apply(i, fakeSet(all[i]))
		}
		wantTable(t, r, "x=1 y=refused z=refused")
		versions = append(versions, r.table().overridesVersion)
	}
	c, r, _ := fakeMaps(t)
	c.apply(0, fakeSet(all...))
	wantTable(t, r, "x=1 y=refused z=refused")
	if versions = append(versions, r.table().overridesVersion); len(slices.Compact(versions)) != 1 {
		t.Errorf("versions %v, want one", versions)
	}
	c.apply(0, fakeSet(all[0], all[1], fakeMap("c", "4", "")))
	if r.table().overridesVersion == versions[0] {
		t.Error("the version is the same after a change")
	}
}

func TestConfigMapFields(t *testing.T) {
	for text, want := range map[string]struct {
		data   string
		binary present
	}{
		`{}`:                                           {"map[]", false},
		`{"data":null,"binaryData":null}`:              {"map[]", false},
		`{"data":{},"binaryData":{}}`:                  {"map[]", false},
		`{"data":{"b":" 1\n","a":"2"}}`:                {"map[a:2 b:1]", false},
		`{"data":{"a":"2"},"binaryData":{"b":"eA=="}}`: {"map[a:2]", true},
	} {
		var m configMap
		must(t, json.Unmarshal([]byte(text), &m))
		if got := fmt.Sprint(unpack(&m.Data)); got != want.data || m.Binary != want.binary {
			t.Errorf("%s: %s, binaryData %t; want %s, %t", text, got, m.Binary, want.data, want.binary)
		}
	}
	var m configMap
	if err := json.Unmarshal([]byte(`{"data":{"a":1}}`), &m); err == nil {
		t.Error("a number is taken for a text")
	}
	c, _, log := fakeMaps(t, "a")
	for i, data := range []string{"", "", "x=backend-1"} { // the second has other labels
		m := fakeMap("a", fmt.Sprint(1+i), data)
		m.Binary = true
		c.apply(0, fakeSet(m))
		c.apply(0, fakeSet(m))
	}
	wantLine(t, log.all("ConfigMap has binaryData, which is ignored"), 2, map[string]any{"object": "ConfigMap edge/a", "resource_version": "3"})
}

// The whole with a server: a selection is listed, changed and merged.
func TestConfigMapsSelectedFromServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		named := func(name, version, backend string) string {
			return strings.NewReplacer("routes", name, "ns-01", "ns-"+name).Replace(routesMap("u-"+name, version, backend))
		}
		network := newPipeNetwork()
		scriptedKube(script{mapList("9", named("b", "2", "backend-2"), named("a", "1", "backend-1"))}, script{func(w http.ResponseWriter, r *http.Request) {
			streamFor(time.Minute, false)(w, r)
			openStream(watchEvent("MODIFIED", named("b", "12", "backend-3")), watchEvent("DELETED", named("a", "13", "backend-1")))(w, r)
		}}).serve(t, network)
		c, r, _ := fakeMaps(t)
		c.watchers[0].kube = network.kube(t)
		inBackground(t, c.watchers[0].run)
		time.Sleep(30 * time.Second)
		wantTable(t, r, "ns-a=1 ns-b=2")
		time.Sleep(time.Minute)
		wantTable(t, r, "ns-b=3") // a was deleted, or has lost its label
		wantEqual(t, "swaps", r.swaps.Load(), 3)
	})
}

// What a version changed is reported when it is in force, which the number of backends
// may have delayed.
func TestConfigMapsReportedOnceInForce(t *testing.T) {
	c, r, _ := fakeMaps(t, "routes")
	known := r.backends.ordinalRange
	r.backends = backendSet{}
	c.apply(0, fakeSet(fakeMap("routes", "1", "ns-01=backend-1 ns-02=bakend-2")))
	wantEqual(t, "Events before there is a table", len(c.events.queue), 0)
	r.setBackends(backendSet{ordinalRange: known})
	for _, want := range []string{"OverridesRejected", "OverridesAccepted"} {
		select {
		case e := <-c.events.queue:
			if e.Reason != want || e.InvolvedObject.Name != "routes" || e.InvolvedObject.ResourceVersion != "1" {
				t.Errorf("%+v, want %s of routes 1", e, want)
			}
		default:
			t.Fatalf("no Event, want %s", want)
		}
	}
}
