package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
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
		log := newLogger(&out, format, slog.LevelWarn)
		log.Info("a")
		log.Warn("b", "key", "a value")
		if !check(out.String()) {
			t.Errorf("%s: %s", format, out.String())
		}
	}
}

func TestThrottle(t *testing.T) {
	bubble(t, func(t *testing.T) {
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

// queuedLog is a log through a queue to out.
func queuedLog(t *testing.T, out io.Writer) (*logQueue, *slog.Logger) {
	t.Helper()
	q := newLogQueue(out)
	log := newLogger(q, "json", slog.LevelInfo)
	go q.run(log)
	return q, log
}

// A log that nobody reads makes nobody wait. What was dropped is counted, and
// reported once somebody reads.
func TestLogQueueDrops(t *testing.T) {
	out, in, err := os.Pipe()
	must(t, err)
	defer out.Close()
	q, log := queuedLog(t, in)
	sent := 0
	for filler := strings.Repeat("x", 1000); q.dropped.Load() < 100; sent++ {
		log.Info("line", "number", sent, "filler", filler)
	}
	read := newLogTail()
	var reading sync.WaitGroup
	reading.Go(func() { io.Copy(read, out) })
	read.wait(t, "log lines dropped", 1)
	log.Info("line", "number", sent)
	q.stop()
	in.Close()
	reading.Wait()

	var drops, last float64
	for _, line := range read.all("log lines dropped") {
		drops += line["lines"].(float64)
	}
	lines := read.all("line")
	for _, line := range lines[1:] {
		number := line["number"].(float64)
		if number <= last {
			t.Fatalf("line %v comes after line %v", number, last)
		}
		last = number
	}
	if dropped := sent + 1 - len(lines); drops != 100 || q.dropped.Load() != 100 || dropped != 100 || last != float64(sent) {
		t.Errorf("%d lines were dropped, %v by the log, %d by the count, and %v is the last; want 100, and %d the last",
			dropped, drops, q.dropped.Load(), last, sent)
	}
}

// Lines of several goroutines are whole, and none is lost at the end.
func TestLogQueueKeepsLines(t *testing.T) {
	var out strings.Builder
	q, log := queuedLog(t, &out)
	var writing sync.WaitGroup
	for range 8 {
		writing.Go(func() {
			for range 500 {
				log.Info("line", "filler", "some text that is not very short")
			}
		})
	}
	writing.Wait()
	q.stop()
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	for _, line := range lines {
		if !json.Valid([]byte(line)) {
			t.Fatalf("a torn line: %s", line)
		}
	}
	if len(lines) != 8*500 || q.dropped.Load() != 0 {
		t.Errorf("%d lines and %d dropped, want %d and none", len(lines), q.dropped.Load(), 8*500)
	}
}

// The end waits for a reader, but not for ever. What could not be written counts
// as dropped.
func TestLogQueueStops(t *testing.T) {
	bubble(t, func(t *testing.T) {
		out, in := io.Pipe()
		q, log := queuedLog(t, in)
		log.Info("nobody reads this")
		begun := time.Now()
		q.stop()
		wantEqual(t, "the time to stop", time.Since(begun), logFlushTimeout)
		out.CloseWithError(errors.New("the reader is gone"))
		<-q.done
		wantEqual(t, "dropped lines", q.dropped.Load(), 1)
	})
}

// The end does not wait for a reader that took everything: the level of the log
// may be above the line about dropped ones, which then wakes nobody.
func TestLogQueueStopsAtErrorLevel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		q := newLogQueue(io.Discard)
		log := newLogger(q, "json", slog.LevelError)
		for q.dropped.Load() == 0 {
			log.Error("line", "filler", strings.Repeat("x", 100_000))
		}
		go q.run(log)
		begun := time.Now()
		q.stop()
		if took := time.Since(begun); took > 0 {
			t.Errorf("stop took %s with a reader that takes all, want no time", took)
			q.wake.notify() // lets run end
		}
	})
}
