package main

import (
	"bytes"
	"io"
	stdlog "log"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// newLogger returns a log that writes to w, in the format "text" or "json".
func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

const (
	maxLogQueue       = 4 << 20         // bytes of queued lines, some 15,000 lines
	maxSpareLogBuffer = 64 << 10        // bytes of a written buffer that is used again
	logFlushTimeout   = 2 * time.Second // how long stop waits for run
)

// logQueue queues lines of the log until run has written them to out, so that no
// goroutine that logs waits for out: a pipe that nobody reads must not stop sessions. If
// the queue is full, it drops and counts lines, and later logs how many it dropped.
type logQueue struct {
	// Static after construction.
	out  io.Writer
	wake wakeup        // of run
	done chan struct{} // closed when run has returned

	dropped atomic.Int64 // lines since the start

	// Guarded by mu.
	mu              sync.Mutex
	lines           []byte // queued
	droppedSinceRun int64  // lines since run last took the queue
	closed          bool
}

func newLogQueue(out io.Writer) *logQueue {
	return &logQueue{out: out, wake: newWakeup(), done: make(chan struct{})}
}

// Write queues a line, or drops it. It never fails, and it does not block.
func (q *logQueue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.lines)+len(line) <= maxLogQueue {
		q.lines = append(q.lines, line...)
	} else {
		q.droppedSinceRun++
		q.dropped.Add(1)
	}
	q.wake.notify()
	return len(line), nil
}

// run writes the queued lines until stop. log writes to this queue: where lines were
// dropped, run logs how many.
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
			closed = closed && len(q.lines) == 0 // the warning may have woken run
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

// stop returns when all lines are written, or after logFlushTimeout. The caller must not
// log after it.
func (q *logQueue) stop() {
	q.mu.Lock()
	q.closed = true
	q.wake.notify()
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-time.After(logFlushTimeout):
	}
}

// writeMetrics writes how many lines were dropped.
func (q *logQueue) writeMetrics(m metricsWriter) {
	m.single("router_log_lines_dropped_total", "counter",
		"Log lines that were dropped because nobody read the log in time.", float64(q.dropped.Load()))
}

// httpLog returns a log for http.Server, which logs errors of its own: no descriptors left,
// panics of handlers. Clients can cause some of these lines, so it writes at most one a second.
func httpLog(log *slog.Logger) *stdlog.Logger {
	return stdlog.New(&httpLogWriter{log: log, interval: time.Second}, "", 0)
}

// takeStandardLog has the standard logger write to log. An http.Transport uses it, and none
// can be given to that: for answers that nobody asked for, at most one for each connection, and
// with GODEBUG=http2debug=1 for all that somebody who looks for a fault wants to see.
func takeStandardLog(log *slog.Logger) {
	stdlog.SetFlags(0)
	stdlog.SetOutput(&httpLogWriter{log: log})
}

// httpLogWriter writes the lines of net/http to log.
type httpLogWriter struct {
	log      *slog.Logger
	interval time.Duration // between two lines; 0: no limit
	throttle throttle
}

func (l *httpLogWriter) Write(line []byte) (int, error) {
	if omitted, ok := l.throttle.allow(l.interval); ok {
		l.log.Warn("HTTP error", "error", string(bytes.TrimSpace(line)), "omitted", omitted)
	}
	return len(line), nil
}

// throttle limits how often a line is logged. The zero value has logged none.
type throttle struct {
	last    atomic.Int64 // Unix nanoseconds of the last line; 0 before the first
	omitted atomic.Int64 // lines since then that were not logged
}

// allow reports whether the caller may log a line: the last one was at least interval
// ago. If so, omitted is how many lines were not logged since that one, and the caller has to
// log this one. It takes no lock, and any goroutine may call it.
func (t *throttle) allow(interval time.Duration) (omitted int64, ok bool) {
	now, last := time.Now().UnixNano(), t.last.Load()
	if last != 0 && now-last < int64(interval) || !t.last.CompareAndSwap(last, now) {
		t.omitted.Add(1)
		return 0, false
	}
	return t.omitted.Swap(0), true
}
