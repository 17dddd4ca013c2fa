// Backend is the demo server behind the router, and its command-line client.
//
// As a server it is what a pod of the StatefulSet runs: a WebSocket on
// /ws/<namespace> says which backend serves the namespace and counts up. Each
// namespace has a count that goes on where it was when another backend becomes
// the owner: room.go is the model for backends that keep state. With -store-listen
// it is the store of these counts, and with -connect a client that prints what
// a server sends.
//
// Reading order: main.go (flags), serve.go (HTTP and the life of the server),
// session.go (one connection), room.go (the state of a namespace, and its
// hand-over to another backend), store.go (where the state is kept), wire.go (what
// x/net/websocket leaves open), connect.go (the client).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// config is what the command line asks for; immutable once parsed.
type config struct {
	// The server.
	listen    string
	name      string        // never empty after parsing
	named     bool          // it is that of a backend: given, or that of a StatefulSet's pod
	interval  time.Duration // 0: only answers
	page      string        // "" for none
	writeTime time.Duration // one write, after which the connection is ended
	closeTime time.Duration // from our Close to the end of the connection
	logLevel  slog.Level
	store     string        // URL of a store; "": in memory
	saveDelay time.Duration // from a change to its save

	// The store.
	storeListen string // "" for the server
	storeDir    string // "": in memory

	// The client.
	connect string // "" for the server
	ca      string
	addr    string
	count   int // 0: until the connection ends
}

// stdio is the world outside of run, replaced by tests.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// usageError is a command line that makes no sense: exit code 2.
type usageError struct{ error }

const synopsis = `Backend is a demo server for the router, and a WebSocket client.

  backend [-listen :9000] [-name backend-0]          serve /ws/<namespace>
  backend -store-listen :9100                        keep state for backends
  backend -connect ws://127.0.0.1:8000/ws/ns-01      print what a server sends

The answer to the message "count" has a total, which is that of the namespace. With
-store, it goes on where it was on another backend. POST /release saves it for the
next owner: docs/applications.md.

The client sends each line of its standard input as one message. It ends with
exit code 0 after -n messages, when the server closes with 1000, 1001 or 1012,
or at Ctrl-C; with 1 when the connection fails; with 2 for a wrong flag.

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	std := stdio{os.Stdin, os.Stdout, os.Stderr}
	os.Exit(exitCode(run(ctx, os.Args[1:], std), os.Stderr))
}

// run is the whole program; it returns when ctx is done and all is closed.
func run(ctx context.Context, args []string, std stdio) error {
	cfg, err := parseFlags(args, std.out)
	if err != nil {
		return err
	}
	if cfg.connect != "" {
		return connect(ctx, cfg, std)
	}
	log := slog.New(slog.NewTextHandler(std.err, &slog.HandlerOptions{Level: cfg.logLevel}))
	if cfg.storeListen != "" {
		return serveStore(ctx, cfg, log)
	}
	return serve(ctx, cfg, log.With("server", cfg.name))
}

// exitCode prints err, if there is something to say, and turns it into the
// exit code: 0 normal end and help, 1 run-time failure, 2 usage.
func exitCode(err error, stderr io.Writer) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(stderr, "backend: %v\n", err)
	if errors.As(err, new(usageError)) {
		fmt.Fprintln(stderr, "backend -h shows the flags")
		return 2
	}
	return 1
}

// parseFlags reads args. Help goes to stdout, with flag.ErrHelp as the result;
// every other error is a usageError that names the flag and its value.
func parseFlags(args []string, stdout io.Writer) (config, error) {
	var cfg config
	fs := newFlagSet(&cfg)
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, synopsis)
		fs.SetOutput(stdout)
		fs.PrintDefaults()
		return cfg, err
	}
	if err == nil {
		err = cfg.check(fs)
	}
	if err != nil {
		return cfg, usageError{err}
	}
	if cfg.named = cfg.name != ""; !cfg.named {
		cfg.name, err = os.Hostname()
		cfg.named = hasOrdinal(cfg.name)
	}
	return cfg, err
}

// hasOrdinal reports whether the host has the name of a StatefulSet's pod:
// backend-2.
func hasOrdinal(host string) bool {
	_, err := strconv.Atoi(host[strings.LastIndexByte(host, '-')+1:])
	return err == nil && strings.Contains(host, "-")
}

// newFlagSet prints nothing by itself: parseFlags and exitCode do.
func newFlagSet(cfg *config) *flag.FlagSet {
	fs := flag.NewFlagSet("backend", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.StringVar(&cfg.listen, "listen", ":9000", "serve HTTP on `address`")
	fs.StringVar(&cfg.name, "name", "", "`name` of this backend, in messages and to routers (default the host name)")
	fs.DurationVar(&cfg.interval, "interval", time.Second, "send a message every `duration`; 0: only answers")
	fs.StringVar(&cfg.page, "page", "", "serve this HTML `file` at /, read again for each request")
	fs.DurationVar(&cfg.writeTime, "write-time", 10*time.Second, "end a connection that takes nothing for this `duration`")
	fs.DurationVar(&cfg.closeTime, "close-time", 5*time.Second, "wait this `duration` for the peer after a Close")
	fs.TextVar(&cfg.logLevel, "log-level", slog.LevelInfo, "`level`: debug, info, warn or error")
	fs.StringVar(&cfg.store, "store", "", "keep the counts of namespaces in the store at this `URL` (default in memory)")
	fs.DurationVar(&cfg.saveDelay, "save-delay", 2*time.Second, "save a count this `duration` after it has changed")
	fs.StringVar(&cfg.storeListen, "store-listen", "", "be a store: serve it on `address`")
	fs.StringVar(&cfg.storeDir, "store-dir", "", "store: keep the counts in this `directory` (default in memory)")
	fs.StringVar(&cfg.connect, "connect", "", "be a client of this ws:// or wss:// `URL`")
	fs.StringVar(&cfg.ca, "ca", "", "client: trust the certificates in this PEM `file` too")
	fs.StringVar(&cfg.addr, "addr", "", "client: connect to `host:port` (or unix:/path) whatever the URL names")
	fs.IntVar(&cfg.count, "n", 0, "client: end after `count` messages; 0: never")
	return fs
}

// check is what the flag package cannot: values and combinations.
func (cfg *config) check(fs *flag.FlagSet) error {
	switch {
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case cfg.interval < 0:
		return fmt.Errorf("-interval %v: want 0 or more", cfg.interval)
	case cfg.writeTime <= 0:
		return fmt.Errorf("-write-time %v: want more than 0", cfg.writeTime)
	case cfg.closeTime <= 0:
		return fmt.Errorf("-close-time %v: want more than 0", cfg.closeTime)
	case cfg.count < 0:
		return fmt.Errorf("-n %d: want 0 or more", cfg.count)
	case cfg.connect == "" && (cfg.ca != "" || cfg.addr != "" || cfg.count != 0):
		return errors.New("-ca, -addr and -n need -connect")
	case cfg.saveDelay < 0:
		return fmt.Errorf("-save-delay %v: want 0 or more", cfg.saveDelay)
	case cfg.storeDir != "" && cfg.storeListen == "":
		return errors.New("-store-dir needs -store-listen")
	case cfg.storeListen != "" && (cfg.store != "" || cfg.connect != ""):
		return errors.New("-store-listen excludes -store and -connect")
	case cfg.connect == "":
		return cfg.checkStore()
	}
	u, err := url.Parse(cfg.connect)
	if err != nil || u.Host == "" || u.Scheme != "ws" && u.Scheme != "wss" {
		return fmt.Errorf("-connect %q: want ws://host/path or wss://host/path", cfg.connect)
	}
	return nil
}

// checkStore checks -store, and takes a slash from its end.
func (cfg *config) checkStore() error {
	if cfg.store == "" {
		return nil
	}
	u, err := url.Parse(cfg.store)
	if err != nil || u.Host == "" || u.Scheme != "http" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("-store %q: want http://host:port", cfg.store)
	}
	cfg.store = "http://" + u.Host
	return nil
}
