package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// golden compares got with testdata/golden/NAME, or writes that file with -update. It
// names the first line that differs. Golden files are all that a user sees: one that
// changes is a change of the interface, and needs a line in the CHANGELOG.
func golden(t testing.TB, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test -run Golden -update . writes it)", err)
	}
	if difference := firstDifference(string(want), string(got)); difference != "" {
		t.Errorf("%s:%s\n(go test -run Golden -update . writes it anew)", path, difference)
	}
}

// firstDifference returns the number of the first line in which two texts differ, with
// that line of both and how many lines each has; "" if they are equal.
func firstDifference(want, got string) string {
	wants, gots := strings.SplitAfter(want, "\n"), strings.SplitAfter(got, "\n")
	line := func(lines []string, i int) string {
		if i < len(lines) && lines[i] != "" {
			return fmt.Sprintf("%q", lines[i])
		}
		return "the end"
	}
	for i := range max(len(wants), len(gots)) {
		if w, g := line(wants, i), line(gots, i); w != g {
			return fmt.Sprintf("%d:\n got %s\nwant %s\n%d lines are wanted, %d came", i+1, g, w, len(wants)-1, len(gots)-1)
		}
	}
	return ""
}

// volatile is a value that is another in each run, and what stands for it in a golden
// file.
type volatile struct{ pattern, stands string }

// steady replaces the volatile values in text, in their order.
func steady(text string, values ...volatile) string {
	for _, v := range values {
		text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.stands)
	}
	return text
}

// The helper itself: what differs is found, and the line is right.
func TestGoldenDifference(t *testing.T) {
	for _, tt := range []struct{ want, got, difference string }{
		{"a\nb\n", "a\nb\n", ""},
		{"", "", ""},
		{"a\nb\n", "a\nc\n", "2:\n got \"c\\n\"\nwant \"b\\n\"\n2 lines are wanted, 2 came"},
		{"a\nb\n", "a\n", "2:\n got the end\nwant \"b\\n\"\n2 lines are wanted, 1 came"},
		{"a\n", "a\nb\n", "2:\n got \"b\\n\"\nwant the end\n1 lines are wanted, 2 came"},
		{"a\n", "a", "1:\n got \"a\"\nwant \"a\\n\"\n1 lines are wanted, 0 came"},
	} {
		if got := firstDifference(tt.want, tt.got); got != tt.difference {
			t.Errorf("%q and %q differ in\n%s\nwant\n%s", tt.want, tt.got, got, tt.difference)
		}
	}
	if got := steady("port 4711 at 12:30", volatile{`port \d+`, "port PORT"}, volatile{`\d+:\d+`, "TIME"}); got != "port PORT at TIME" {
		t.Errorf("%q", got)
	}
}
