package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"
)

// largeMap is the JSON of the n-th ConfigMap of overrides, in edge. Its version
// gives all namespaces another backend of 16 than the version before.
func largeMap(n, overrides, version int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":"ConfigMap","metadata":{"name":"routes-%02d","namespace":"edge","uid":"u%d","resourceVersion":"%d"},"data":{`, n, n, version)
	for i := range overrides {
		fmt.Fprintf(&b, `"tenant-%07d":"backend-%d",`, n*overrides+i, (i+version)%16)
	}
	b.Truncate(b.Len() - 1)
	b.WriteString("}}")
	return b.Bytes()
}

// largeList is a LIST of them.
func largeList(objects, overrides int) []byte {
	var items [][]byte
	for n := range objects {
		items = append(items, largeMap(n, overrides, 1))
	}
	return fmt.Appendf(nil, `{"kind":"ConfigMapList","metadata":{"resourceVersion":"1"},"items":[%s]}`, bytes.Join(items, []byte(",")))
}

// largeMaps is a router with the overrides of that many ConfigMaps. It has 16
// backends.
func largeMaps(t testing.TB, objects, overrides int) (*configMaps, *router) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r := &router{statefulSet: "backend", backends: ordinals{count: 16}, log: log, swapped: func() {}}
	c := &configMaps{update: r.update, events: newRecorder(kube{}, "", log), log: log}
	c.follow(kube{}, "edge", "", "a=b")
	_, items, err := decodeList[configMap](bytes.NewReader(largeList(objects, overrides)), maxList)
	if err != nil {
		t.Fatal(err)
	}
	c.watchers[0].replace(fakeSet(items...))
	if got := r.table().overrides; got != objects*overrides {
		t.Fatalf("%d overrides, want %d", got, objects*overrides)
	}
	return c, r
}

// BenchmarkSwap is what an event takes that changes the backends of all
// overrides of one ConfigMap, from its bytes to the table in force, with what
// the log and the Events say.
func BenchmarkSwap(b *testing.B) {
	for _, size := range []struct{ objects, overrides int }{{1, 10}, {1, 10_000}, {1, 40_000}, {30, 33_334}} {
		b.Run(fmt.Sprintf("objects=%d/overrides=%d", size.objects, size.objects*size.overrides), func(b *testing.B) {
			c, r := largeMaps(b, size.objects, size.overrides)
			var events [2][]byte
			for i := range events {
				events[i] = fmt.Appendf(nil, `{"type":"MODIFIED","object":%s}`, largeMap(0, size.overrides, i+2))
			}
			b.ReportAllocs()
			swaps := r.swaps.Load()
			n := 0
			for b.Loop() {
				if err := c.watchers[0].next(json.NewDecoder(bytes.NewReader(events[n%2]))); err != nil {
					b.Fatal(err)
				}
				n++
			}
			if got := r.swaps.Load() - swaps; got != int64(n) {
				b.Fatalf("%d swaps of %d events", got, n)
			}
		})
	}
}

// BenchmarkOwnerOfAMillion is a lookup among a million overrides.
func BenchmarkOwnerOfAMillion(b *testing.B) {
	_, r := largeMaps(b, 30, 33_334)
	names := make([]string, 1_000_000)
	for i := range names {
		names[i] = fmt.Sprintf("tenant-%07d", i)
	}
	b.Run("hit", func(b *testing.B) { lookUp(b, r, names) })
	for i := range names {
		names[i] = fmt.Sprintf("nobody-%07d", i)
	}
	b.Run("miss", func(b *testing.B) { lookUp(b, r, names) })
}
