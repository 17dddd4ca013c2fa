package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestNewLogger(t *testing.T) {
	for format, check := range map[string]func(line string) bool{
		"text": func(line string) bool { return strings.HasSuffix(line, "level=WARN msg=b key=\"a value\"\n") },
		"json": func(line string) bool {
			var v struct{ Level, Msg, Key string }
			return json.Unmarshal([]byte(line), &v) == nil && v.Level == "WARN" && v.Msg == "b" && v.Key == "a value"
		},
	} {
		var out bytes.Buffer
		log, err := newLogger(&out, format, slog.LevelWarn)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("a")
		log.Warn("b", "key", "a value")
		if !check(out.String()) {
			t.Errorf("%s: %s", format, out.String())
		}
	}
	if _, err := newLogger(&bytes.Buffer{}, "xml", slog.LevelInfo); err == nil || !strings.Contains(err.Error(), `"xml", want text or json`) {
		t.Errorf("format xml: error %v", err)
	}
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var th throttle
		want := func(name string, omitted int64, ok bool) {
			t.Helper()
			if gotOmitted, gotOK := th.allow(time.Minute); gotOmitted != omitted || gotOK != ok {
				t.Errorf("%s: %d %t, want %d %t", name, gotOmitted, gotOK, omitted, ok)
			}
		}
		want("first", 0, true)
		want("at once", 0, false)
		time.Sleep(59 * time.Second)
		want("after 59 s", 0, false)
		time.Sleep(time.Second)
		want("after a minute", 2, true)
		time.Sleep(time.Hour)
		want("after an hour", 0, true)
	})
}
