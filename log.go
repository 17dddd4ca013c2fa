package main

import (
	"bytes"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// newLogger returns the log in the format "text" or "json".
func newLogger(w io.Writer, format string, level slog.Level) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("-log-format %q, want text or json", format)
}

const (
	maxLogQueue       = 4 << 20         // most bytes of lines that wait, some 15,000 lines
	maxSpareLogBuffer = 64 << 10        // bytes that are kept for the next lines
	logFlushTimeout   = 2 * time.Second // bounds how long the end waits for the last lines to be taken
)

// logQueue stands between the log and what takes its lines, so that nobody who
// logs waits for that: a pipe that is not read must not stop sessions. Lines for
// which there is no room are dropped, counted, and told of.
type logQueue struct {
	out io.Writer // static

	// Guarded by mu.
	mu              sync.Mutex
	lines           []byte
	droppedSinceRun int64 // lines since run last looked
	closed          bool

	wake    chan struct{} // capacity 1: there are lines, or closed
	done    chan struct{} // closed when run has returned
	dropped atomic.Int64  // lines since the start
}

func newLogQueue(out io.Writer) *logQueue {
	return &logQueue{out: out, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// Write takes a line, and has no error.
func (q *logQueue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.lines)+len(line) <= maxLogQueue {
		q.lines = append(q.lines, line...)
	} else {
		q.droppedSinceRun++
		q.dropped.Add(1)
	}
	q.notify()
	return len(line), nil
}

// notify makes run look. It does not block.
func (q *logQueue) notify() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// run writes the lines until stop, with a line to log, which is the queue's own,
// where some were dropped.
func (q *logQueue) run(log *slog.Logger) {
	defer close(q.done)
	var spare []byte
	for closed := false; !closed; {
		<-q.wake
		q.mu.Lock()
		lines, lost := q.lines, q.droppedSinceRun
		q.lines, q.droppedSinceRun, closed = spare[:0], 0, q.closed
		q.mu.Unlock()
		if lost > 0 {
			log.Warn("log lines dropped", "lines", lost)
			q.mu.Lock()
			closed = closed && len(q.lines) == 0 // that line has woken us up, if its level is written
			q.mu.Unlock()
		}
		if n, err := q.out.Write(lines); err != nil {
			q.dropped.Add(int64(bytes.Count(lines[n:], []byte("\n"))))
		}
		if spare = lines; cap(spare) > maxSpareLogBuffer {
			spare = nil
		}
	}
}

// stop returns when all lines were written, or logFlushTimeout is over. Nobody logs any
// more.
func (q *logQueue) stop() {
	q.mu.Lock()
	q.closed = true
	q.notify()
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-time.After(logFlushTimeout):
	}
}

// writeMetrics writes how many lines were dropped.
func (q *logQueue) writeMetrics(m metricsWriter) {
	m.single("router_log_lines_dropped_total", "counter", "Log lines that nobody took in time.", float64(q.dropped.Load()))
}

// serverLog returns a log for http.Server: what it tells are its own troubles,
// such as no descriptors left, and panics. Clients could provoke some lines, so
// there is at most one a second.
func serverLog(log *slog.Logger) *stdlog.Logger {
	return stdlog.New(&serverLogWriter{log: log}, "", 0)
}

// serverLogWriter writes the lines of an http.Server.
type serverLogWriter struct {
	log   *slog.Logger
	limit throttle
}

func (l *serverLogWriter) Write(line []byte) (int, error) {
	if omitted, ok := l.limit.allow(time.Second); ok {
		l.log.Warn("http", "error", string(bytes.TrimSpace(line)), "omitted", omitted)
	}
	return len(line), nil
}

// throttle lets a log line through now and then.
type throttle struct {
	last    atomic.Int64 // unix nanoseconds of the last line; 0 is never
	omitted atomic.Int64 // lines since
}

// allow reports whether a line may be written, if the last one was longer than
// every ago, and how many were omitted since.
func (t *throttle) allow(every time.Duration) (omitted int64, ok bool) {
	now, last := time.Now().UnixNano(), t.last.Load()
	if last != 0 && now-last < int64(every) || !t.last.CompareAndSwap(last, now) {
		t.omitted.Add(1)
		return 0, false
	}
	return t.omitted.Swap(0), true
}

// version is what the go command noted about this build.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
