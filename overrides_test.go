package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// unpack is the reverse of pack.
func unpack(p *overrideSet) map[string]string {
	data := map[string]string{}
	for r := range p.all() {
		data[string(r.namespace)] = p.value(r)
	}
	return data
}

func TestOverrideSet(t *testing.T) {
	long := strings.Repeat("x", 1000)
	tests := map[string]struct{ data, want map[string]string }{
		"nothing":         {nil, map[string]string{}},
		"spaces":          {map[string]string{"a": " backend-1\r\n", "b": " \t"}, map[string]string{"a": "backend-1", "b": ""}},
		"long":            {map[string]string{"a": long, long: "b"}, map[string]string{"a": long[:maxValueBytes], long[:maxStoredBytes]: "b"}},
		"odd names":       {map[string]string{"": "a", "..": "b", "\xff": "c"}, map[string]string{"": "a", "..": "b", "\xff": "c"}},
		"253 and 254":     {map[string]string{long[:253]: "a", long[:254]: "b"}, map[string]string{long[:253]: "a", long[:254]: "b"}},
		"escapes":         {map[string]string{"a_x20b": "1", "caf_xC3_xA9": "2", "_x2E.": "3", "_x2E.a": "4"}, map[string]string{"a b": "1", "café": "2", "_x2E.": "3", "..a": "4"}},
		"not the keys":    {map[string]string{"_x41": "1", "a b": "2", "_xC3": "3", "a_x2Fb": "4"}, map[string]string{"_x41": "1", "a b": "2", "_xC3": "3", "a_x2Fb": "4"}},
		"the same hash":   {map[string]string{"c184": "1", "caeb8": "2"}, map[string]string{"c184": "1", "caeb8": "2"}},
		"a few of a kind": {map[string]string{"a": "x", "b": "y", "c": "x"}, map[string]string{"a": "x", "b": "y", "c": "x"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := newOverrideSet(tt.data)
			if got := unpack(p); !maps.Equal(got, tt.want) || p.count != len(tt.data) {
				t.Errorf("%d entries %v, want %v", p.count, got, tt.want)
			}
			if !slices.IsSortedFunc(slices.Collect(p.all()), override.compare) {
				t.Error("not in order")
			}
			for r := range p.all() {
				want := uint32(0)
				if expectedKey(r.key(), false) != "" {
					want = invalidForPath
				} else if expectedKey(r.key(), true) != "" {
					want = invalidForHost
				}
				if r.invalidFor != want {
					t.Errorf("%q is marked with %d, want %d", r.namespace, r.invalidFor, want)
				}
			}
		})
	}
}

// An invalid key may be the text of a namespace that has another key: both are there, in
// the same order whatever the order in which they came.
func TestOverrideSetKeyLikeANamespace(t *testing.T) {
	for _, keys := range [][]string{{"_x41", "_x5Fx41"}, {"_x5Fx41", "_x41"}} {
		b := newSetBuilder()
		for _, key := range keys {
			b.add([]byte(key), []byte(key))
		}
		var got []string
		set := b.build()
		for r := range set.all() {
			got = append(got, fmt.Sprintf("%s %d %s", r.namespace, r.invalidFor, set.value(r)))
		}
		want := []string{"_x41 0 _x5Fx41", "_x41 2 _x41"}
		if !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// What packing takes depends on the entries, not on what their values look like.
func TestOverrideSetMemory(t *testing.T) {
	values := map[string]string{
		"commas": strings.Repeat(",", 1<<20),
		"colons": strings.Repeat(`:`, 1<<20),
		"spaces": strings.Repeat(" ", 1<<20),
	}
	for name, value := range values {
		b := []byte(`{"a":"` + value + `"}`)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var p overrideSet
		err := p.UnmarshalJSON(b)
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; err != nil || p.count != 1 || took > 1<<19 {
			t.Errorf("%s: %d entries, error %v, and %d bytes of memory; want 1 entry, and 512 KiB at most", name, p.count, err, took)
		}
	}
}

func TestOverrideSetBoundsData(t *testing.T) {
	const entries = maxConfigMapData / (entryOverhead + 6 + 4)
	for _, more := range []int{0, 1} {
		b := []byte("{")
		for i := range entries + more {
			b = fmt.Appendf(b, `"%06x":"\u0001abc",`, i)
		}
		b[len(b)-1] = '}'
		var p overrideSet
		err := json.Unmarshal(b, &p)
		if more == 0 && (err != nil || p.count != entries) {
			t.Errorf("%d entries, error %v; want %d", p.count, err, entries)
		}
		if more > 0 && (err == nil || err.Error() != "more than 2097152 bytes in names and values") {
			t.Errorf("error %v, want more than 2097152 bytes", err)
		}
	}
}

// FuzzOverrideSet holds the reading of JSON against encoding/json's own.
func FuzzOverrideSet(f *testing.F) {
	for _, seed := range []string{
		`null`, `{}`, `{"a":"1"}`, ` { "a" : "1" , "b" : "2" } `, `{"a":"\"\\","\u0062":"\ud834\udd1e\ud834"}`, "{\"a\":\"\xff\"}",
		`{"a":1}`, `{"a":null}`, `{"a":{}}`, `[]`, `"x"`, `1`, `true`, `{"caeb8":"1","c184":"2"}`, `{"a":"1","a":"2"}`, `{"":""}`, "{\"a\":\"\u2028\x7f\"}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var want map[string]*string
		var got overrideSet
		err, wantErr := json.Unmarshal(b, &got), json.Unmarshal(b, &want)
		data := map[string]string{}
		for name, value := range want {
			if value == nil { // a map takes null for "", a ConfigMap has none
				return
			}
			data[name] = *value
		}
		if got.count > len(data) && wantErr == nil { // a name comes twice
			return
		}
		if !slices.IsSortedFunc(slices.Collect(got.all()), override.compare) {
			t.Errorf("%s: not in order", b)
		}
		if (err == nil) != (wantErr == nil) || err == nil && !reflect.DeepEqual(unpack(&got), unpack(newOverrideSet(data))) {
			t.Errorf("%s: %v, error %v; want %v, error %v", b, unpack(&got), err, data, wantErr)
		}
	})
}

// TestDifferences compares with what maps say.
func TestDifferences(t *testing.T) {
	for _, tt := range [][2]string{
		{"", ""}, {"a=1", ""}, {"", "a=1"}, {"a=1 b=2", "a=1 b=2"}, {"a=1 b=2 c=3", "b=2 c=4 d=5"}, {"a=1 c=1 e=1", "b=1 d=1 f=1"},
		{"c184=1 caeb8=2", "caeb8=2"}, {"c184=1", "c184=1 caeb8=2"},
	} {
		a, b := pairs(tt[0]), pairs(tt[1])
		all, want := maps.Clone(a), map[string]bool{}
		maps.Copy(all, b)
		for name := range all {
			valueA, inA := a[name]
			valueB, inB := b[name]
			if inA != inB || valueA != valueB {
				want[name] = true
			}
		}
		for _, everything := range []bool{false, true} {
			got := map[string]bool{}
			for r := range newOverrideSet(a).differences(newOverrideSet(b), everything) {
				if got[string(r.namespace)] {
					t.Errorf("%q: %s comes twice", tt, r.namespace)
				}
				got[string(r.namespace)] = true
			}
			if everything && len(got) != len(all) || !everything && !maps.Equal(got, want) {
				t.Errorf("%q, everything %t: %v, want %v", tt, everything, got, want)
			}
		}
	}
}

// TestIndexFinds: each namespace of many is found in the right part, and none
// that is not there, at every size.
func TestIndexFinds(t *testing.T) {
	for _, size := range []int{0, 1, 2, 3, 10, 1000, 20_000} {
		var parts []*overrideSet
		names := manyNamespaces(size)
		for i := range 4 {
			data := map[string]string{}
			for j := i; j < size; j += 4 {
				data[names[j]] = fmt.Sprintf("backend-%d", i)
			}
			parts = append(parts, newOverrideSet(data))
		}
		x := newOverrideIndex(parts, size)
		for i, part := range parts {
			for r := range part.all() {
				s := findSlot(&x, r.namespace, r.hash)
				if s.set != 0 {
					t.Fatalf("%s is there already", r.namespace)
				}
				*s = indexSlot{r.offset, uint16(i + 1), uint16(r.hash)}
			}
		}
		for j, name := range names {
			s := findSlot(&x, name, upper32(hash64(name)))
			if int(s.set) != j%4+1 || string(x.overrideAt(s).namespace) != name {
				t.Fatalf("%d: %s is in part %d", size, name, s.set)
			}
		}
		for _, name := range missing(names) {
			if s := findSlot(&x, name, upper32(hash64(name))); s.set != 0 {
				t.Fatalf("%d: %s is in part %d, want none", size, name, s.set)
			}
		}
	}
}
