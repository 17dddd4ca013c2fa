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
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// commands are what the program does instead of routing when its first argument
// says so: they ask a router that runs, or tables, and change nothing.
type commands struct {
	admin                     string // URL of the router's admin port
	replicas                  int    // of owner without a router
	statefulSet, overridesDir string // the same
	namespaceFrom             string // the same
	out                       io.Writer
}

// adminTimeout bounds one question to a router.
const adminTimeout = 30 * time.Second

// runCommand runs the command that args begin with, if they do.
func runCommand(ctx context.Context, args []string, out io.Writer) (handled bool, err error) {
	c := &commands{out: out}
	if len(args) == 0 || args[0] != "plan" && args[0] != "owner" {
		return false, nil
	}
	f := flag.NewFlagSet("router "+args[0], flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.admin, "admin", "http://127.0.0.1:8001", "`URL` of a router's admin port")
	usage, run := "Usage: router plan [flags] FILE|-|NUMBER\n\nSays which sessions would move with a ConfigMap (JSON) or a number of backends.\n\n", c.plan
	if args[0] == "owner" {
		f.IntVar(&c.replicas, "replicas", 0, "`number` of backends, to ask no router")
		f.StringVar(&c.overridesDir, "overrides", "", "`directory` with the overrides, with -replicas")
		f.StringVar(&c.statefulSet, "statefulset", "backend", "`name` of the StatefulSet, with -replicas")
		f.StringVar(&c.namespaceFrom, "namespace-from", "path", "where requests have their namespace, path or host, with -replicas")
		usage, run = "Usage: router owner [flags] NAMESPACE...\n\nSays who owns namespaces, and why.\n\n", c.owners
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

// do sends a question to the router, and reads its answer into v.
func (c *commands) do(ctx context.Context, method, path string, body []byte, v any) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.admin, "/")+path, bytes.NewReader(body))
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

// plan prints what a ConfigMap, in a file or - for the standard input, or a number
// of backends would move.
func (c *commands) plan(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("%d arguments, want one: a file, -, or a number of backends", len(args))}
	}
	var body []byte
	var err error
	if n, nerr := strconv.Atoi(args[0]); nerr == nil {
		body = fmt.Appendf(nil, `{"replicas":%d}`, n)
	} else if args[0] == "-" {
		body, err = io.ReadAll(io.LimitReader(os.Stdin, maxPlanBody+1))
	} else {
		body, err = os.ReadFile(args[0])
	}
	if err != nil {
		return err
	}
	var p plan
	if err := c.do(ctx, http.MethodPost, "/plan", body, &p); err != nil {
		return err
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, m := range p.Moves {
		fmt.Fprintf(t, "%s\t%s\tto %s\t%d sessions\n", m.Namespace, m.From, m.To, m.Sessions)
	}
	t.Flush()
	for _, bad := range p.Rejections {
		fmt.Fprintln(c.out, "rejected:", bad)
	}
	_, err = fmt.Fprintf(c.out, "%d sessions of %d namespaces would move, in %.1f s; %d backends, %d entries rejected\n",
		p.Sessions, p.Namespaces, p.Seconds, p.Backends, p.Rejected)
	return err
}

// owners prints who owns the namespaces: as a router says it, or as one that has
// just started would with these replicas.
func (c *commands) owners(ctx context.Context, namespaces []string) error {
	if len(namespaces) == 0 {
		return usageError{errors.New("no arguments, want namespaces")}
	}
	lookUp := func(namespace string) (o ownership, err error) {
		err = c.do(ctx, http.MethodGet, "/owner?"+url.Values{"namespace": {namespace}}.Encode(), nil, &o)
		return o, err
	}
	if c.replicas != 0 || c.overridesDir != "" {
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
		line := strings.Join([]string{namespace, o.Owner, o.Why, o.Address, o.Error}, "\t")
		fmt.Fprintln(t, strings.TrimRight(line, "\t"))
		if o.Note != "" {
			fmt.Fprintf(t, "\t%s\n", o.Note)
		}
		for _, bad := range o.Rejected {
			fmt.Fprintf(t, "\trejected %q of %s, want %s\n", bad.Value, strings.TrimSpace(bad.Source+" "+bad.Key), bad.Expected)
		}
	}
	return nil
}

// table is that of -replicas and -overrides.
func (c *commands) table() (*table, error) {
	if c.replicas < 1 || c.replicas > maxReplicas {
		return nil, usageError{fmt.Errorf("-replicas %d, want 1 to %d", c.replicas, maxReplicas)}
	}
	if c.namespaceFrom != "path" && c.namespaceFrom != "host" {
		return nil, usageError{fmt.Errorf("-namespace-from %q, want path or host", c.namespaceFrom)}
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
	t := &table{statefulSet: c.statefulSet, fromHost: c.namespaceFrom == "host", backends: ordinals{count: c.replicas}}
	t.build(sources, nil)
	return t, nil
}

// owner is what a router with the table would say.
func (c *commands) owner(t *table, namespace string) (ownership, error) {
	if t.fromHost {
		namespace = strings.ToLower(namespace)
	}
	if want := namespaceFault(namespace, t.fromHost); want != "" {
		return ownership{}, usageError{fmt.Errorf("%.260q, want %s", namespace, want)}
	}
	o := ownership{Why: t.explain(namespace), Note: overrideKeyFault(namespace), Rejected: t.rejectionsOf(namespace)}
	if ordinal, ok := t.owner(namespace); ok {
		o.Owner = t.name(ordinal)
	}
	return o, nil
}
