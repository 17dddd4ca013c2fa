// Bench measures the router beside other proxies: it is the load, the backends
// and the suite.
//
// The job measured: a proxy takes the upgrades of /ws/<namespace> and opens each
// with one of four backends, by a hash of the namespace, with a table of 1,000
// overrides on top, and sends plain requests of that path there. README.md says what is
// measured and what makes it steady.
//
// Read main, suite and turns (rounds), proxy (what is measured), target, process
// and the scenarios check, idle, echo, stream, connect, http and flood (what is run and
// measured), client, tls, backend, frame, loop and raw (the load), report and must (the
// tables).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"
)

func main() {
	runtime.GOMAXPROCS(1)
	runtime.LockOSThread() // children die with the thread that started them
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // the second signal kills
	err := start(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// start is the program. Progress goes to stderr, the table to stdout.
func start(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.rounds, "rounds", 3, "`number` of rounds, each of all scenarios against all proxies")
	f.DurationVar(&o.length, "d", 4*time.Second, "length of a measurement, in turns with the other proxies")
	f.IntVar(&o.sessions, "n", 20_000, "idle `sessions`; fewer if the limit on open files says so")
	f.StringVar(&o.scenarios, "scenarios", groupDefault, "`list` of scenarios and of groups of them: plain ("+scenarioGroups()[groupPlain]+
		"), tls, tls12 (the same through TLS 1.3 and 1.2, such as tls-echo64; with -ecdsa at the end with that certificate), checks")
	f.StringVar(&o.before, "before", "", "`path` of the router of a build before, to measure beside today's")
	f.StringVar(&o.proxies, "proxies", "", "`list` of router,router-before,bare,nginx,nginx-64k,haproxy,haproxy-splice,direct,router-tls,pod,nginx-tls,haproxy-tls (default all)")
	f.StringVar(&o.out, "out", "bench/results/"+time.Now().Format("20060102-150405"), "`path` of the report, without .md and .json")
	f.IntVar(&o.cpu, "proxy-cpu", 0, "`number` of the proxy's CPU")
	f.DurationVar(&o.calm, "calm", 2*time.Minute, "how long to wait for a calm machine before a measurement")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("argument %q, want flags only", f.Arg(0))
	}
	if o.rounds < 1 || o.length <= 0 || o.sessions < 1 {
		return fmt.Errorf("-rounds %d -d %s -n %d, want more than 0", o.rounds, o.length, o.sessions)
	}
	r, err := measureAll(ctx, o, stderr)
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "report: %s.md and .json\n\n", o.out)
	fmt.Fprint(stdout, r.summary())
	return r.failed() // or ours and its peers would not be comparable
}
