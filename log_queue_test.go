package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// queuedLog is a log through a queue to out.
func queuedLog(t *testing.T, out io.Writer) (*logQueue, *slog.Logger) {
	t.Helper()
	q := newLogQueue(out)
	log, err := newLogger(q, "json", slog.LevelInfo)
	if err != nil {
		t.Fatal(err)
	}
	go q.run(log)
	return q, log
}

// A log that nobody reads makes nobody wait. What was dropped is counted, and
// told of once somebody reads.
func TestLogQueueDrops(t *testing.T) {
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
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
	synctest.Test(t, func(t *testing.T) {
		out, in := io.Pipe()
		q, log := queuedLog(t, in)
		log.Info("nobody reads this")
		begun := time.Now()
		q.stop()
		if took := time.Since(begun); took != logFlush {
			t.Errorf("stopped after %s, want %s", took, logFlush)
		}
		out.CloseWithError(errors.New("the reader is gone"))
		<-q.done
		if got := q.dropped.Load(); got != 1 {
			t.Errorf("%d lines dropped, want 1", got)
		}
	})
}

// stalling is a log whose reader can be kept from reading.
type stalling struct {
	*logTail
	held sync.Mutex
}

func (s *stalling) Write(b []byte) (int, error) {
	s.held.Lock()
	defer s.held.Unlock()
	return s.logTail.Write(b)
}

// startStalling runs a router in a process and, once it serves, stops reading
// its log until resume. There were this many sessions since.
func startStalling(t *testing.T, sessions int) (p *routerProcess, resume func()) {
	t.Helper()
	p = newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 1), "-overrides", t.TempDir()})...)
	reader := &stalling{logTail: p.log}
	p.cmd.Stdout = reader
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	reader.held.Lock()
	resume = sync.OnceFunc(reader.held.Unlock)
	t.Cleanup(resume)
	long := strings.Repeat("n", 240) // for a long line
	for i := range sessions {
		p.open(t, fmt.Sprint(long, i)).Close()
	}
	waitMetrics(t, &p.runningRouter, map[string]float64{`router_sessions_total{backend="backend-0"}`: float64(sessions),
		`router_sessions{backend="backend-0"}`: 0, `router_log_lines_dropped_total`: 0})
	return p, resume
}

// Sessions start, echo and end while nobody reads the log, which is whole when
// somebody does.
func TestProcessLogStalls(t *testing.T) {
	t.Parallel()
	const sessions = 400 // whose lines a pipe and its reader do not hold
	p, resume := startStalling(t, sessions)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	resume()
	if state := p.wait(t); state.ExitCode() != 0 {
		t.Errorf("the process ended with %v, want exit code 0", state)
	}
	wantLine(t, p.log.all("session ended"), sessions, nil)
	wantLine(t, p.log.all("stopped"), 1, nil)
}

// A log that nobody reads does not keep the process from ending.
func TestProcessEndsWithoutLog(t *testing.T) {
	t.Parallel()
	p, _ := startStalling(t, 400)
	begun := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	state, err := p.cmd.Process.Wait()
	if took := time.Since(begun); err != nil || state.ExitCode() != 0 || took < logFlush || took > 2*logFlush {
		t.Errorf("the process ended with %v and error %v after %s, want exit code 0 after %s", state, err, took, logFlush)
	}
}

// The end does not wait for a reader that took everything: the level of the log
// may be above the line about dropped ones, which then wakes nobody.
func TestLogQueueStopsAtErrorLevel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newLogQueue(io.Discard)
		log, err := newLogger(q, "json", slog.LevelError)
		if err != nil {
			t.Fatal(err)
		}
		for q.dropped.Load() == 0 {
			log.Error("line", "filler", strings.Repeat("x", 100_000))
		}
		go q.run(log)
		begun := time.Now()
		q.stop()
		if took := time.Since(begun); took > 0 {
			t.Errorf("stop took %s with a reader that takes all, want no time", took)
			q.signal() // lets run end
		}
	})
}
