package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// sliceSet is a set of EndpointSlices, from the address type and the endpoints in
// JSON of each.
func sliceSet(t *testing.T, all map[string]string) map[string]*endpointSlice {
	t.Helper()
	set := map[string]*endpointSlice{}
	for name, endpoints := range all {
		family, list, _ := strings.Cut(endpoints, " ")
		s := &endpointSlice{AddressType: family}
		s.Metadata.Name = name
		if err := json.Unmarshal([]byte(list), &s.Endpoints); err != nil {
			t.Fatal(err)
		}
		set[name] = s
	}
	return set
}

func TestPlaces(t *testing.T) {
	pod := func(address, hostname, conditions string) string {
		return fmt.Sprintf(`{"addresses":[%q],"hostname":%q,"conditions":{%s}}`, address, hostname, conditions)
	}
	const ready, not = `"ready":true,"serving":true,"terminating":false`, `"ready":false,"serving":false,"terminating":false`
	tests := map[string]struct {
		slices map[string]string
		want   string // "ordinal ready addresses", joined
	}{
		"several slices": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "," + pod("10.0.0.2", "backend-10", ready) + "]",
			"b": "IPv4 [" + pod("10.0.0.3", "backend-2", ready) + "]"},
			"0 true [10.0.0.1:9000], 2 true [10.0.0.3:9000], 10 true [10.0.0.2:9000]"},
		"no endpoints":     {map[string]string{"a": "IPv4 null", "b": "IPv4 []"}, ""},
		"no conditions":    {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", "") + "]"}, "0 true [10.0.0.1:9000]"},
		"not ready":        {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]"}, "0 false [10.0.0.1:9000]"},
		"not serving":      {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":true,"serving":false`) + "]"}, "0 false [10.0.0.1:9000]"},
		"terminating":      {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":false,"serving":true,"terminating":true`) + "]"}, "0 false [10.0.0.1:9000]"},
		"published anyway": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":true,"serving":true,"terminating":true`) + "]"}, "0 false [10.0.0.1:9000]"},
		"IPv6":             {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]"}, "0 true [[fd00::1]:9000]"},
		"both families":    {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]"}, "0 true [10.0.0.1:9000 [fd00::1]:9000]"},
		"one family ready": {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]"}, "0 true [[fd00::1]:9000]"},
		"in two slices":    {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]"}, "0 true [10.0.0.1:9000]"},
		"last life first":  {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]", "b": "IPv4 [" + pod("10.0.0.2", "backend-0", ready) + "]"}, "0 true [10.0.0.2:9000]"},
		"last life last":   {map[string]string{"a": "IPv4 [" + pod("10.0.0.2", "backend-0", ready) + "," + pod("10.0.0.1", "backend-0", not) + "]"}, "0 true [10.0.0.2:9000]"},
		"address moved on": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "," + pod("10.0.0.1", "backend-1", ready) + "]"}, "0 false [10.0.0.1:9000], 1 true [10.0.0.1:9000]"},
		"no hostname":      {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"targetRef":{"kind":"Pod","name":"backend-3"}}]`}, "3 true [10.0.0.1:9000]"},
		"a copy of a pod": {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.9"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"dbg"}},
			{"addresses":["10.0.0.1"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"backend-3"},"conditions":{"ready":false}}]`}, "3 false [10.0.0.1:9000]"},
		"only a copy":       {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.9"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"dbg"}}]`}, ""},
		"other hostname":    {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"hostname":"backend-2","targetRef":{"kind":"Pod","name":"backend-3"}}]`}, "3 true [10.0.0.1:9000]"},
		"written by hand":   {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"hostname":"backend-3","targetRef":{"kind":"Pod"}}]`}, "3 true [10.0.0.1:9000]"},
		"no name":           {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"]}]`}, ""},
		"other target":      {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"targetRef":{"kind":"Node","name":"backend-3"}}]`}, ""},
		"other pods":        {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "front-0", ready) + "," + pod("10.0.0.2", "backend-x", ready) + "," + pod("10.0.0.3", "backend-01", ready) + "]"}, ""},
		"no address":        {map[string]string{"a": `IPv4 [{"hostname":"backend-0","addresses":[]}]`}, ""},
		"names for address": {map[string]string{"a": "FQDN [" + pod("backend-0.example", "backend-0", ready) + "]"}, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			places := placesOf(sliceSet(t, tt.slices), "backend", "9000")
			var got []string
			for _, ordinal := range slices.Sorted(maps.Keys(places)) {
				got = append(got, fmt.Sprintln(ordinal, places[ordinal].ready, places[ordinal].addrs))
			}
			if got := strings.TrimSuffix(strings.ReplaceAll(strings.Join(got, ""), "\n", ", "), ", "); got != tt.want {
				t.Errorf("places %s, want %s", got, tt.want)
			}
		})
	}
}

// TestPodsWatchFails: while the EndpointSlices cannot be followed, DNS is asked for
// what is not ready by them or was no good, and for nothing else.
func TestPodsWatchFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeScale(fakeStateful{replicas: 4, ready: 4, note: "4"})
		f.slices["one"] = fakeEndpoints(0, 1, 2)
		n := serveScale(t, f)
		p := startScale(t, n).pods
		var asked atomic.Int64
		byDNS := error(nil)
		p.dns.locate = func(ctx context.Context, ordinal int) (string, error) {
			asked.Add(1)
			return fmt.Sprintf("10.9.9.%d:9000", ordinal), byDNS
		}
		want := func(ordinal int, addr, err string) {
			t.Helper()
			got, gotErr := p.locate(t.Context(), ordinal)
			if got != addr || fmt.Sprint(gotErr) != err {
				t.Errorf("backend-%d is at %q, %v; want %q, %s", ordinal, got, gotErr, addr, err)
			}
		}
		p.forget(1)
		want(1, "10.0.0.1:9000", "<nil>")
		want(3, "", "backend-3 is not ready")
		waited := make(chan error, 1)
		go func() { waited <- p.holds.wait(t.Context(), p.holds.enter(), 3, 0) }()
		synctest.Wait()
		if n := asked.Load(); n != 0 {
			t.Fatalf("DNS was asked %d times while the watch works", n)
		}

		f.change("endpointslices", func() { f.forbidden["LIST endpointslices"] = true })
		time.Sleep(10 * time.Minute)     // the stream that there is goes on for some
		if err := <-waited; err != nil { // it need not be ready any more to be dialled
			t.Error(err)
		}
		p.holds.done(3, nil, false)
		want(3, "10.9.9.3:9000", "<nil>")
		want(0, "10.0.0.0:9000", "<nil>")
		p.forget(0)
		want(0, "10.9.9.0:9000", "<nil>")
		byDNS = errors.New("no such host")
		want(0, "10.0.0.0:9000", "<nil>")
		want(3, "10.9.9.3:9000", "no such host")

		before := asked.Load()
		f.change("endpointslices", func() { delete(f.forbidden, "LIST endpointslices") })
		time.Sleep(90 * time.Second)
		want(0, "10.0.0.0:9000", "<nil>")
		want(3, "", "backend-3 is not ready")
		if n := asked.Load(); n != before {
			t.Errorf("DNS was asked %d times since the watch works again", n-before)
		}
	})
}

// TestPodsReplaced: which pods the backends are is told before they are dialled, of
// those that are usable.
func TestPodsReplaced(t *testing.T) {
	p := followPods(kube{}, "edge", "backend", "headless", 9000, slog.New(slog.DiscardHandler))
	told := ""
	p.replaced = func(uids map[int]string) { told = fmt.Sprint(uids, " after ", p.pod(0)) }
	pod := func(addr, uid string, ready bool) string {
		return fmt.Sprintf(`[{"addresses":[%q],"targetRef":{"kind":"Pod","name":"backend-0","uid":%q},"conditions":{"ready":%v}}]`, addr, uid, ready)
	}
	for _, step := range []struct {
		slices map[string]string
		want   string
	}{
		{map[string]string{"x": "IPv4 " + pod("10.0.0.1", "a", true)}, "map[0:a] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.1", "a", false)}, "map[] after a"},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.2", "b", false)}, "map[] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.2", "b", true)}, "map[0:b] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.3", "c", true), "y": "IPv6 " + pod("fd00::2", "b", true)}, "map[0:c] after b"},
		{map[string]string{"x": "IPv4 " + fakeEndpoints(0)}, "map[] after c"},
	} {
		p.apply(sliceSet(t, step.slices))
		if told != step.want {
			t.Errorf("after %v it was told %s, want %s", step.slices, told, step.want)
		}
		if n := len(p.places[0].addrs); n != 1 {
			t.Errorf("after %v it has %d addresses, want one pod's", step.slices, n)
		}
	}
}

// TestPodsLocate: where a backend is, from what is known of the EndpointSlices.
func TestPodsLocate(t *testing.T) {
	p := followPods(kube{}, "edge", "backend", "headless", 9000, slog.New(slog.DiscardHandler))
	asked := 0
	p.dns.locate = func(context.Context, int) (string, error) { asked++; return "by DNS", nil }
	want := func(ordinal int, addr, err string) {
		t.Helper()
		got, gotErr := p.locate(t.Context(), ordinal)
		if got != addr || fmt.Sprint(gotErr) != err {
			t.Errorf("backend-%d is at %q, %v; want %q, %s", ordinal, got, gotErr, addr, err)
		}
	}
	apply := func(all map[string]string) { p.apply(sliceSet(t, all)) }
	want(0, "by DNS", "<nil>")
	apply(nil)
	want(0, "by DNS", "<nil>")
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(0, 1), "b": `IPv6 [{"addresses":["fd00::1"],"hostname":"backend-0"}]`})
	want(0, "10.0.0.0:9000", "<nil>")
	want(2, "", "backend-2 is not ready")
	p.forget(0)
	want(0, "[fd00::1]:9000", "<nil>")
	p.forget(0)
	p.forget(1)
	want(0, "10.0.0.0:9000", "<nil>")
	want(1, "10.0.0.1:9000", "<nil>")
	apply(nil) // the Service is gone: that says nothing about the pods
	want(0, "10.0.0.0:9000", "<nil>")
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(1)})
	want(0, "", "backend-0 is not ready")
	waited := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { waited <- p.holds.wait(ctx, p.holds.enter(), 0, 0) }()
	for len(p.holds.waiting(0)) == 0 {
		<-time.After(time.Millisecond)
	}
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(0)})
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if asked != 2 {
		t.Errorf("DNS was asked %d times, want 2", asked)
	}
}
