package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// command is a subcommand, with its flags. It asks a running router, or builds a table of
// its own, and changes nothing.
type command struct {
	admin string // URL of the router's admin port
	out   io.Writer

	// Of owner, to build a table without a router; replicas is 0 to ask a router.
	replicas                  int
	cordon                    cordon
	statefulSet, overridesDir string
	namespaceFrom             string // as newLayout takes it
}

// adminTimeout bounds one request to a router.
const adminTimeout = 30 * time.Second

// runCommand runs the subcommand that is args[0]. handled is false if it is none.
func runCommand(ctx context.Context, args []string, out io.Writer) (
	handled bool, err error) {
	c := &command{out: out}
	if len(args) == 0 || !slices.Contains([]string{"plan", "owner", "status"}, args[0]) {
		return false, nil
	}
	f := flag.NewFlagSet("router "+args[0], flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.admin, "admin", "http://127.0.0.1:8001",
		"`URL` of a router's admin port")
	run, usage := c.plan, "Usage: router plan [flags] FILE|-|NUMBER\n\n"+
		"Shows which sessions would move with a ConfigMap (JSON) or a number of backends.\n\n"
	switch args[0] {
	case "status":
		run, usage = c.status, "Usage: router status [flags]\n\n"+
			"Shows how far a change of owners has come, and for which backends it waits.\n\n"
	case "owner":
		f.IntVar(&c.replicas, "replicas", 0, "`number` of backends, to answer without a router")
		f.Var(&c.cordon, "cordon",
			"`ordinals` of cordoned backends, like 2,5, with -replicas")
		f.StringVar(&c.overridesDir, "overrides", "",
			"`directory` with the overrides, with -replicas")
		f.StringVar(&c.statefulSet, "statefulset", "backend",
			"`name` of the StatefulSet, with -replicas")
		f.StringVar(&c.namespaceFrom, "namespace-from", "path",
			"`where` requests have their namespace, path, query:NAME or host, with -replicas")
		run, usage = c.owners, "Usage: router owner [flags] NAMESPACE...\n\n"+
			"Shows who owns namespaces, and why.\n\n"
	}
	switch err := f.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(out, usage)
		f.SetOutput(out)
		f.PrintDefaults()
		return true, err
	case err != nil:
		return true, usageError{err}
	}
	return true, run(ctx, f.Args())
}

// do sends a request to the router's admin port, and decodes the JSON of its answer into
// v. An answer other than 200 is an error, with the text that the router gave.
func (c *command) do(ctx context.Context, method, path string, body []byte, v any) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	url := strings.TrimSuffix(c.admin, "/") + path
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return usageError{fmt.Errorf("-admin: %w", err)}
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxList))
	if err != nil {
		return err
	}
	var failure struct{ Error string }
	if resp.StatusCode != http.StatusOK {
		if json.Unmarshal(answer, &failure) != nil || failure.Error == "" {
			failure.Error = fmt.Sprintf("%.200s", answer)
		}
		return fmt.Errorf("%s%s: %s: %s", c.admin, path, resp.Status, failure.Error)
	}
	return json.Unmarshal(answer, v)
}

// plan prints which sessions a change would move. The change is a ConfigMap as JSON, in a
// file or on the standard input for -, or a number of backends.
func (c *command) plan(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf(
			"one argument is required: a file, -, or a number of backends (got %d)", len(args))}
	}
	var body []byte
	var err error
	if n, notNumber := strconv.Atoi(args[0]); notNumber == nil {
		body = fmt.Appendf(nil, `{"replicas":%d}`, n)
	} else if args[0] == "-" {
		body, err = io.ReadAll(io.LimitReader(os.Stdin, maxPlanBody+1))
	} else {
		body, err = os.ReadFile(args[0])
	}
	if err != nil {
		return err
	}
	var p preview
	if err := c.do(ctx, http.MethodPost, "/plan", body, &p); err != nil {
		return err
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, m := range p.Moves {
		fmt.Fprintf(t, "%s\t%s\tto %s\t%d sessions\n",
			showNamespace(m.Namespace), m.From, m.To, m.Sessions)
	}
	t.Flush()
	for _, bad := range p.Rejections {
		fmt.Fprintln(c.out, "rejected:", bad)
	}
	_, err = fmt.Fprintf(c.out, "%d sessions of %d namespaces would move, in %.1f s; "+
		"%d backends, %d overrides rejected\n",
		p.Sessions, p.Namespaces, p.Seconds, p.Backends, p.Rejected)
	return err
}

// status prints how far a change of owners has come.
func (c *command) status(ctx context.Context, args []string) error {
	if len(args) != 0 {
		return usageError{fmt.Errorf("no argument is allowed (got %q)", args[0])}
	}
	var s status
	if err := c.do(ctx, http.MethodGet, "/status", nil, &s); err != nil {
		return err
	}
	router := s.Routers[0]
	fmt.Fprintf(c.out, "table %s, step %d (-handoff %s), %d sessions\n",
		router.Table, s.Handoff.Step, s.Handoff.Mode, router.Sessions)
	if len(s.Handoff.Members) > 0 {
		fmt.Fprintf(c.out, "shared by %s\n", strings.Join(s.Handoff.Members, ", "))
	}
	if s.Handoff.InProgress {
		fmt.Fprintf(c.out, "a change of owners is under way: %.0f %% done, %d sessions to move\n",
			100*s.Handoff.Done, s.Handoff.ToMove)
	} else {
		fmt.Fprintln(c.out, "no change of owners is under way")
	}
	if s.Handoff.Why != "" {
		fmt.Fprintln(c.out, s.Handoff.Why)
	}
	for _, w := range s.Handoff.WaitingFor {
		if w.Router != "" {
			fmt.Fprintf(c.out, "waits for %s since %.1f s: it has not answered\n", w.Router, w.Seconds)
			continue
		}
		fmt.Fprintf(c.out, "waits for %s since %.1f s: %d sessions, %d upgrades, %d releases\n",
			w.Backend, w.Seconds, w.Sessions, w.Upgrades, w.Releases)
		if w.Error != "" {
			fmt.Fprintf(c.out, "  %s\n", w.Error)
		}
	}
	return nil
}

// owners prints who owns the namespaces. It asks a router. With -replicas or -overrides
// it answers as a router would that has just started with these.
func (c *command) owners(ctx context.Context, namespaces []string) error {
	if len(namespaces) == 0 {
		return usageError{errors.New("at least one namespace is required")}
	}
	lookUp := func(namespace string) (o ownership, err error) {
		query := url.Values{"namespace": {namespace}}
		err = c.do(ctx, http.MethodGet, "/owner?"+query.Encode(), nil, &o)
		return o, err
	}
	if c.replicas != 0 || c.overridesDir != "" || c.cordon != nil {
		t, err := c.table()
		if err != nil {
			return err
		}
		lookUp = func(namespace string) (ownership, error) { return c.owner(t, namespace) }
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	defer t.Flush()
	for _, namespace := range namespaces {
		o, err := lookUp(namespace)
		if err != nil {
			return err
		}
		printOwner(t, namespace, o)
	}
	return nil
}

// printOwner writes one namespace: a row of cells for a tabwriter, and below it what is
// wrong with its overrides.
func printOwner(w io.Writer, namespace string, o ownership) {
	row := strings.Join([]string{showNamespace(namespace), o.Owner, o.Why, o.Address, o.Error}, "\t")
	fmt.Fprintln(w, strings.TrimRight(row, "\t"))
	switch {
	case o.HeldBy != 0:
		fmt.Fprintf(w, "\theld by step %d until its sessions with %s are over\n", o.HeldBy, o.Previous)
	case o.Next != "":
		fmt.Fprintf(w, "\tmoves to %s in its turn\n", o.Next)
	}
	if o.Key != "" {
		fmt.Fprintf(w, "\tits key in a ConfigMap is %s\n", o.Key)
	}
	if o.HashOwner != "" {
		fmt.Fprintf(w, "\tits hash gives %s, which is cordoned\n", o.HashOwner)
	}
	if o.Note != "" {
		fmt.Fprintf(w, "\t%s\n", o.Note)
	}
	for _, bad := range o.Rejected {
		entry := strings.TrimSpace(bad.Source + " " + bad.Key)
		fmt.Fprintf(w, "\trejected: %q in %s, expected %s\n", bad.Value, entry, bad.Expected)
	}
}

// table returns the table that a router would start with, for the flags.
func (c *command) table() (*table, error) {
	if c.replicas < 1 || c.replicas > maxReplicas {
		return nil, usageError{
			fmt.Errorf("-replicas must be 1 to %d (got %d)", maxReplicas, c.replicas)}
	}
	backends := ordinalRange{count: c.replicas}
	if _, all := c.cordon.among(backends); all {
		return nil, usageError{fmt.Errorf(
			"-cordon must leave a backend that is not cordoned (got %s of %d)", c.cordon, c.replicas)}
	}
	l, err := newLayout(c.namespaceFrom, nil)
	if err != nil {
		return nil, usageError{err}
	}
	var sources []sourceContent
	if c.overridesDir != "" {
		d := &directory{path: c.overridesDir}
		data, version, err := d.read()
		if err != nil {
			return nil, fmt.Errorf("-overrides: %w", err)
		}
		sources = []sourceContent{{id: d.id(), version: version, overrides: newOverrideSet(data)}}
	}
	return newTable(c.statefulSet, l.fromHost, backends, c.cordon, sources, nil), nil
}

// owner answers as a router with the table would. The backends are not dialled.
func (c *command) owner(t *table, namespace string) (ownership, error) {
	namespace, want := clientNamespace(namespace, t.fromHost)
	if want != "" {
		return ownership{}, usageError{fmt.Errorf("the argument must be %s (got %.260q)", want, namespace)}
	}
	o, _ := newOwnership(t, namespace)
	return o, nil
}
