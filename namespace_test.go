package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestPathNamespace(t *testing.T) {
	long := strings.Repeat("a", 254)
	for _, valid := range []string{
		"a", "a-Z_0.9", "...", ".a", "..a", long[:253], "a b", " ", "a:b", "a@b", "ä", "{", "[", "`", "a+b", "%", "100%", "a%41", "%zz",
		"a;b", "a;", "a?b", "a#b", "\"", "'", "\u00a0", "\u202e", "日本", "😀", strings.Repeat("é", 126), "..a;", "...;a", "_x20",
	} {
		if fault := expectedPathNamespace(valid); fault != "" {
			t.Errorf("%q: %s", valid, fault)
		}
	}
	for _, namespace := range []string{
		"", long, ".", "..", "a/b", "/", "a\\b", "a\x00", "a\n", "\t", "a\x1f", "\x7f", "\u0080", "a\u009f", "a\xff", "\xc3", "\xed\xa0\x80", "\xc0\xaf",
		"a%2Fb", "a%2fb", "a%5Cb", "%2e", "%2E.", "%252e%252e", "a%25252Fb", "a%00", "a%0a", ".;", "..;a", ";", ";a", "%3B", "%3Ba", "%253Ba", "%2e%2e;a", "%2E%3Ba", strings.Repeat("é", 127),
		"%" + strings.Repeat("25", 125) + "2F",
	} {
		if expectedPathNamespace(namespace) == "" {
			t.Errorf("%q is valid", namespace)
		}
	}
}

// TestNestedEscapes: a name takes no more work if it has escapes of escapes.
func TestNestedEscapes(t *testing.T) {
	name := "%" + strings.Repeat("25", 125) + "41"
	wantEqual(t, name, isPathNamespace(name), true)
	if n := testing.AllocsPerRun(10, func() { isPathNamespace(name) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
	for text, want := range map[string]string{
		"": "", "a": "a", "%": "%", "%4": "%4", "%41": "A", "%zz": "%zz", "%2541": "A", "%4%31": "A", "%%341": "A", "%25252E": ".", "a%2": "a%2", "%25%32%35": "%",
	} {
		wantEqual(t, text, string(decodeAll(text)), want)
	}
}

// The keys are those that the documentation names, and stay so for ever.
func TestNamespaceKey(t *testing.T) {
	for namespace, key := range map[string]string{
		"ns-01": "ns-01", "a-Z_0.9": "a-Z_0.9", "my room": "my_x20room", "café": "caf_xC3_xA9", "doc:42": "doc_x3A42", "user@x": "user_x40x",
		"..": "_x2E.", "..data": "_x2E.data", "...": "_x2E..", ".a": ".a", "a..": "a..", ".": ".", " ..": "_x20..",
		"_": "_", "__": "__", "_x": "_x", "_x2": "_x2", "_x20": "_x5Fx20", "__x20": "__x5Fx20", "_x2_x20": "_x2_x5Fx20", "_xc3": "_xc3", "_xC3": "_x5FxC3",
		"_xCé": "_xC_xC3_xA9", "_é": "__xC3_xA9", "_x5F": "_x5Fx5F", "_X20": "_X20", "a\xff": "a_xFF", "": "",
	} {
		if got := namespaceKey(namespace); got != key {
			t.Errorf("the key of %q is %s, want %s", namespace, got, key)
		}
		if got, ok := keyNamespace([]byte(key)); string(got) != namespace || !ok {
			t.Errorf("%s is the key of %q, %t; want %q", key, got, ok, namespace)
		}
	}
	for _, key := range []string{
		"_x41", "_x61", "a_x2D", "_x5F", "a_x5Fb", "_x5Fx2", "_x2E", "_x2Ea", "a_x2E.", "._x2E", "_x2E_x2E", "..", "..a", "a b", "é", "\xff", "/",
		strings.Repeat("a", 254), strings.Repeat("_x20", 64),
	} {
		if got, ok := keyNamespace([]byte(key)); ok || expectedKey(key, false) == "" {
			t.Errorf("%q is the key of %q, want that it is none", key, got)
		}
	}
}

func TestExpectedKey(t *testing.T) {
	for key, want := range map[string]string{
		"a_x20b": "", "_x41": "the key A", "a b": "the key a_x20b", "..a": "the key _x2E.a", "a_x5Fb": "the key a_b", "a_x2Fb": expectedPathNamespace(""), "": expectedPathNamespace(""),
		strings.Repeat(" ", 64): "a key of 1 to 253 characters", strings.Repeat("_x20", 64): "a key of 1 to 253 characters",
	} {
		if got := expectedKey(key, false); got != want {
			t.Errorf("%s: expected %q, want %q", key, got, want)
		}
	}
	if got := expectedKey("a_x20b", true); got != expectedHostNamespace("") {
		t.Errorf("of a host: expected %q", got)
	}
}

// TestKeysOfNamespaces: each namespace has one key, which the API server accepts, and which
// means that namespace only.
func TestKeysOfNamespaces(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := map[string]string{}
	for range 20_000 {
		name := randomName(random)
		key := namespaceKey(name)
		if other, ok := seen[key]; ok && other != name {
			t.Fatalf("%s is the key of %q and %q", key, name, other)
		}
		seen[key] = name
		wantKey(t, name)
	}
}

// wantKey checks that the name has a key that means it.
func wantKey(t *testing.T, name string) {
	t.Helper()
	key := namespaceKey(name)
	got, ok := keyNamespace([]byte(key))
	if ok != (len(key) <= maxNameBytes) || ok && string(got) != name {
		t.Errorf("%q has key %s, which is that of %q, %t", name, key, got, ok)
	}
	for i := range len(key) {
		if !isKeyByte(key[i]) || strings.HasPrefix(key, "..") {
			t.Errorf("%q has key %q", name, key)
		}
	}
	if isPathNamespace(name) && ok != (expectedKey(key, false) == "") {
		t.Errorf("the key %s of %q: %t, expected %q", key, name, ok, expectedKey(key, false))
	}
}

// randomName returns a namespace of a path, of pieces that look like escapes.
func randomName(random *rand.Rand) string {
	pieces := []string{"a", "Z", "0", "-", ".", "_", "x", "20", "C3", "41", "5F", "_x", " ", "é", ":", "%", "+", ";", "日", "\u00a0", "..", "&", "=", "#", "?", "~"}
	for {
		var name strings.Builder
		for range 1 + random.IntN(8) {
			name.WriteString(pieces[random.IntN(len(pieces))])
		}
		if isPathNamespace(name.String()) {
			return name.String()
		}
	}
}

// FuzzKey: a key means one namespace at most, and that namespace has this key only.
func FuzzKey(f *testing.F) {
	for _, key := range []string{"", "ns-01", "a_x20b", "_x5Fx20", "_x2E.a", "_x41", "..", "é", "_xC", "__x5F", "_xc3_xa9"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if name, ok := keyNamespace([]byte(text)); ok {
			if key := namespaceKey(string(name)); key != text {
				t.Fatalf("%q means %q, which has the key %q", text, name, key)
			}
		}
		if valid := expectedKey(text, false) == ""; valid {
			if name, ok := keyNamespace([]byte(text)); !ok || !isPathNamespace(name) {
				t.Fatalf("%q is valid, and means %q, %t", text, name, ok)
			}
		}
		wantKey(t, text)
	})
}

// FuzzNamespace holds the names of paths against what they must be, as slowly as can be.
func FuzzNamespace(f *testing.F) {
	for _, name := range []string{"", "a", "..", "a/b", "%2e%2e", "a%252Fb", "é", "\xff", "\u0085", "..;a", "%"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		valid := isPathNamespace(name)
		if valid != isPathNamespace([]byte(name)) {
			t.Fatalf("%q is valid as a string: %t", name, valid)
		}
		if valid && hasDotSegment("/ws/"+name) {
			t.Fatalf("%q is valid, and a dot segment", name)
		}
		if isHostNamespace(name) && !valid {
			t.Fatalf("%q is valid in a host only", name)
		}
		got, refused := segmentNamespace(strings.ReplaceAll(fmt.Sprintf("% X", name), " ", "%"))
		if name != "" {
			got, refused = segmentNamespace("%" + strings.ReplaceAll(fmt.Sprintf("% X", name), " ", "%"))
		}
		if (refused == nil) != valid || valid && got != name {
			t.Fatalf("%q, valid: %t, is %q in a path, %v", name, valid, got, refused)
		}
	})
}

func TestShowNamespace(t *testing.T) {
	for name, want := range map[string]string{
		"ns-01": "ns-01", "café": "café", "doc:42": "doc:42", "my room": `"my room"`, `a"b`: `"a\"b"`, "a\u202eb": `"a\u202eb"`, "\xff": `"\xff"`, "": "",
	} {
		wantEqual(t, name, showNamespace(name), want)
	}
}
