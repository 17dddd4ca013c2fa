package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

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
		w := fakeKubeWatcher(&kube{}, "", slog.New(slog.DiscardHandler), func(set map[string]*fakeConfigMap) {
			if c := set["routes"]; c != nil {
				got = append(got, fmt.Sprintf("%q %q %q", c.Metadata.UID, c.Metadata.ResourceVersion, c.Data))
			}
		})
		w.set = map[string]*fakeConfigMap{} // as after a LIST
		err := w.follow(bytes.NewReader(stream))
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
