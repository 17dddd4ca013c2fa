package main

import (
	"bytes"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"runtime/debug"
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

// serverLog returns a log for http.Server: what it tells are its own troubles,
// such as no descriptors left, and panics. Clients could provoke some lines, so
// there is at most one a second.
func serverLog(log *slog.Logger) *stdlog.Logger {
	return stdlog.New(&serverLines{log: log}, "", 0)
}

// serverLines writes the lines of an http.Server.
type serverLines struct {
	log   *slog.Logger
	limit throttle
}

func (l *serverLines) Write(line []byte) (int, error) {
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
