package main

import (
	"bytes"
	"cmp"
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
// its own, and changes nothing: what changes something prints a patch for kubectl.
type command struct {
	admin   string // URL of the router's admin port
	all     bool   // it asks for the answer of all routers
	format  string // "text" or "json"
	out     io.Writer
	notes   io.Writer     // what is not part of the output
	line    string        // its command line, as words of a shell
	timeout time.Duration // of wait

	by        string // of top: "sessions" or "bytes"
	configMap string // of move: the name of the ConfigMap to patch; "" if it is clear

	// Of owner, to build a table; without replicas, cordon and overridesDir it asks a router.
	replicas                  int
	cordon                    cordon
	statefulSet, overridesDir string
	namespaceFrom             string // as newNamespaceMatcher takes it
}

// adminTimeout bounds one request to a router.
const adminTimeout = 30 * time.Second

// subcommand is what runs for a first argument, and its help.
type subcommand struct {
	args  string // "" if it takes none
	help  string
	flags func(c *command, f *flag.FlagSet) // adds its flags; nil for none
	run   func(c *command, ctx context.Context, args []string) error
}

// subcommands returns the subcommands by their names.
func subcommands() map[string]subcommand {
	return map[string]subcommand{
		"status": {"", "" +
			"Shows routers, backends, how far a change of owners has come and what it waits for,\n" +
			"and the last changes.", (*command).showFlags, (*command).status},
		"owner": {"NAMESPACE...", "Shows who owns namespaces, and why.",
			(*command).ownerFlags, (*command).owners},
		"plan": {"FILE|-|NUMBER|cordon ORDINALS", "" +
			"Shows which sessions would move, and which namespaces would lose their owner, with a\n" +
			"ConfigMap (JSON), a number of backends, or a list of cordoned ones, like 2,5 or none.",
			(*command).showFlags, (*command).plan},
		"backends": {"", "Shows the backends: address, readiness, overrides, sessions.",
			(*command).showFlags, (*command).backends},
		"top": {"", "Shows the namespaces with the most sessions or bytes.",
			(*command).topFlags, (*command).top},
		"move": {"NAMESPACE BACKEND|-", "" +
			"Prints the patch of a ConfigMap that pins a namespace to a backend, or with - removes\n" +
			"its override.", (*command).moveFlags, (*command).move},
		"cordon": {"BACKEND",
			"Prints the patch of the StatefulSet after which the hash gives no namespace to a backend.\n" +
				"Unlike with kubectl cordon, the sessions of its hashed namespaces move away.",
			nil, (*command).cordonBackend},
		"uncordon": {"BACKEND", "Prints the patch of the StatefulSet that ends a cordon.",
			nil, (*command).uncordonBackend},
		"wait": {"", "" +
			"Waits until no change of owners is under way, no session has to move, the routers agree,\n" +
			"and the table has each replica of the StatefulSet. It fails at the timeout, when the\n" +
			"router that it asks does not answer, and when others are silent three times in a row.",
			(*command).waitFlags, (*command).wait},
	}
}

// runCommand runs the subcommand that is args[0]. handled is false if it is none. What is
// not part of its output goes to notes.
func runCommand(ctx context.Context, args []string, out, notes io.Writer) (
	handled bool, err error) {
	if len(args) == 0 {
		return false, nil
	}
	if slices.Contains([]string{"version", "-version", "--version"}, args[0]) {
		_, err := fmt.Fprintln(out, readBuild(embeddedVersion))
		return true, err
	}
	sub, ok := subcommands()[args[0]]
	if !ok {
		return false, nil
	}
	c := &command{out: out, notes: notes, all: true, format: "text", line: "router"}
	for _, arg := range args {
		c.line += " " + quoteForShell(arg)
	}
	f := flag.NewFlagSet("router "+args[0], flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.admin, "admin", "http://127.0.0.1:8001",
		"`URL` of a router's admin port; in a pod the default is the router in that pod")
	if sub.flags != nil {
		sub.flags(c, f)
	}
	switch err := f.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		usage := strings.TrimRight("Usage: router "+args[0]+" [flags] "+sub.args, " ")
		fmt.Fprintf(out, "%s\n\n%s\n\n", usage, sub.help)
		f.SetOutput(out)
		f.PrintDefaults()
		return true, err
	case err != nil:
		return true, usageError{err}
	case c.format != "text" && c.format != "json":
		return true, usageError{fmt.Errorf("-o must be text or json (got %q)", c.format)}
	case sub.args == "" && f.NArg() > 0:
		return true, usageError{fmt.Errorf("no argument is allowed (got %q)", f.Arg(0))}
	}
	return true, sub.run(c, ctx, f.Args())
}

// showFlags adds the flags of the subcommands that show something.
func (c *command) showFlags(f *flag.FlagSet) {
	f.BoolVar(&c.all, "all", true, "ask for the answer of all routers, not of one alone")
	f.StringVar(&c.format, "o", "text",
		"`format` of the output: text, or json as the admin port has it")
}

// ownerFlags adds the flags of owner.
func (c *command) ownerFlags(f *flag.FlagSet) {
	c.showFlags(f)
	f.IntVar(&c.replicas, "replicas", 0, "`number` of backends, to answer without a router")
	f.Var(&c.cordon, "cordon",
		"`ordinals` of cordoned backends, like 2,5, with -replicas")
	f.StringVar(&c.overridesDir, "overrides", "",
		"`directory` with the overrides, with -replicas")
	f.StringVar(&c.statefulSet, "statefulset", "backend",
		"`name` of the StatefulSet, with -replicas")
	f.StringVar(&c.namespaceFrom, "namespace-from", "path",
		"`where` requests have their namespace, path, query:NAME or host, with -replicas")
}

func (c *command) topFlags(f *flag.FlagSet) {
	c.showFlags(f)
	f.StringVar(&c.by, "by", "sessions", "`what` to sort by: sessions or bytes")
}

func (c *command) moveFlags(f *flag.FlagSet) {
	f.StringVar(&c.configMap, "configmap", "",
		"`name` of the ConfigMap to patch (default the one with the namespace's override, or\n"+
			"the only one)")
}

func (c *command) waitFlags(f *flag.FlagSet) {
	f.DurationVar(&c.timeout, "timeout", 5*time.Minute, "how long to wait")
}

// get asks the router's admin port with GET: see do.
func (c *command) get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, nil, v)
}

// do sends a request to the router's admin port, for all routers if c.all is set, and
// decodes the JSON of its answer into v. An answer other than 200 is an error, with the
// text that the router gave.
func (c *command) do(ctx context.Context, method, path string, body []byte, v any) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	target := strings.TrimSuffix(c.admin, "/") + path
	switch {
	case c.all && strings.Contains(path, "?"):
		target += "&all=1"
	case c.all:
		target += "?all=1"
	}
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
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
	if err := answerError(resp.StatusCode, answer); err != nil {
		return fmt.Errorf("%s%s: %w", c.admin, path, err)
	}
	return json.Unmarshal(answer, v)
}

// silentError returns an error that names the routers that did not answer, nil for none.
func silentError(silent []silentRouter) error {
	var all []error
	for _, s := range silent {
		all = append(all, fmt.Errorf("%s did not answer: %s", s.Name, s.Error))
	}
	return errors.Join(all...)
}

// show prints v as JSON if that is the format, or calls print, which prints it as text.
// Both print what there is, also if routers were silent; show returns an error then.
func (c *command) show(v any, silent []silentRouter, print func()) error {
	if c.format == "json" {
		e := json.NewEncoder(c.out)
		e.SetIndent("", "  ")
		if err := e.Encode(v); err != nil {
			return err
		}
	} else {
		print()
	}
	return silentError(silent)
}

// columns returns a writer of columns, which are separated by tabs. The caller flushes it.
func (c *command) columns() *tabwriter.Writer {
	return tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
}

// printRouters prints how many routers have answered; nothing with -all=false.
func (c *command) printRouters(answered int, silent []silentRouter, agree *bool) {
	if agree == nil {
		return
	}
	asked, text := answered+len(silent), "; they agree"
	switch {
	case asked == 1:
		text = ""
	case !*agree:
		text = "; they do not agree"
	}
	fmt.Fprintf(c.out, "%d of %d routers answered%s\n", answered, asked, text)
}

// previewBody returns the body of POST /plan for the arguments.
func previewBody(args []string) (body []byte, err error) {
	switch {
	case len(args) == 2 && args[0] == "cordon":
		text := args[1]
		if text == "none" {
			text = ""
		}
		list, err := parseCordon(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("the list is %w", err)}
		}
		return fmt.Appendf(nil, `{"cordon":[%s]}`, list), nil
	case len(args) != 1:
		return nil, usageError{fmt.Errorf(
			"one argument is required: a file, -, or a number of backends; or cordon and a list (got %d)",
			len(args))}
	case args[0] == "-":
		return io.ReadAll(io.LimitReader(os.Stdin, maxPreviewBody+1))
	}
	if n, notNumber := strconv.Atoi(args[0]); notNumber == nil {
		return fmt.Appendf(nil, `{"replicas":%d}`, n), nil
	}
	return os.ReadFile(args[0])
}

// plan prints which sessions a change would move, and which namespaces it would leave
// without an owner. The change is a ConfigMap as JSON, in a file or on the standard input
// for -, a number of backends, or a list of cordoned backends.
func (c *command) plan(ctx context.Context, args []string) error {
	body, err := previewBody(args)
	if err != nil {
		return err
	}
	var p preview
	if err := c.do(ctx, http.MethodPost, "/plan", body, &p); err != nil {
		return err
	}
	return c.show(&p, p.Silent, func() { c.printPreview(&p) })
}

// printPreview prints a preview as text.
func (c *command) printPreview(p *preview) {
	t := c.columns()
	for _, m := range p.Moves {
		to := "to " + m.To
		if m.To == "" {
			to = "to no owner"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d sessions\n",
			showNamespace(m.Namespace), m.From, to, m.Sessions)
	}
	t.Flush()
	for _, bad := range p.Rejections {
		fmt.Fprintln(c.out, "rejected:", bad)
	}
	fmt.Fprintf(c.out, "%d sessions of %d namespaces would move, in %.1f s; "+
		"%d backends, %d overrides rejected\n",
		p.Sessions, p.Namespaces, p.Seconds, p.Backends, p.Rejected)
	if p.Unresolved > 0 {
		fmt.Fprintf(c.out, "%d namespaces would have no owner: new clients get 503, "+
			"and %d sessions end with their backends\n", p.Unresolved, p.UnresolvedSessions)
	}
	c.printRouters(len(p.Routers), p.Silent, p.Agree)
}

// status prints routers, backends, and how far a change of owners has come.
func (c *command) status(ctx context.Context, _ []string) error {
	var s status
	if err := c.get(ctx, "/status", &s); err != nil {
		return err
	}
	return c.show(&s, s.Silent, func() { c.printStatus(&s) })
}

// printStatus prints a status as text.
func (c *command) printStatus(s *status) {
	t := c.columns()
	fmt.Fprintln(t, "ROUTER\tREADY\tSESSIONS\tOVERRIDES-VERSION\tSTAMP")
	for _, r := range s.Routers {
		ready := strings.Join(append([]string{yesOrNo(r.Ready)}, r.WhyNot...), ": ")
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", r.Name, ready, r.Sessions, r.OverridesVersion, r.Stamp)
	}
	t.Flush()
	var agree *bool
	if c.all {
		agree = &s.Agree
	}
	c.printRouters(len(s.Routers), s.Silent, agree)
	fmt.Fprintln(c.out)
	fmt.Fprintln(t, "BACKEND\tREADY\tSESSIONS\tOVERRIDES\tIN\tOUT\tNOTE")
	for _, b := range s.Backends {
		row := fmt.Sprintf("%s\t%s\t%d\t%d\t%d\t%d\t%s", b.Name, yesOrNo(b.Ready), b.Sessions,
			b.Overrides, b.MovingIn, b.MovingOut,
			backendNote(b.InTable, b.Cordoned, b.SafeToRemove))
		fmt.Fprintln(t, strings.TrimRight(row, "\t"))
	}
	t.Flush()
	fmt.Fprintln(c.out)
	c.printHandoff(&s.Handoff)
	c.printReceipts(s.Receipts)
	for _, bad := range s.Rejections {
		fmt.Fprintf(c.out, "rejected: %s: %q in %s, expected %s\n",
			showNamespace(bad.Namespace), bad.Value, bad.Source, bad.Expected)
	}
	if s.Rejected > 0 || s.Conflicts > 0 {
		fmt.Fprintf(c.out, "%d overrides rejected, %d conflicts\n", s.Rejected, s.Conflicts)
	}
	if s.StatefulSet != nil && s.StatefulSet.CordonRejected != "" {
		fmt.Fprintf(c.out, "cordon rejected: %s\n", s.StatefulSet.CordonRejected)
	}
	for _, w := range s.Watches {
		if w.Error != "" {
			fmt.Fprintf(c.out, "%s: %s: %s\n", w.Router, w.Object, w.Error)
		}
	}
}

func yesOrNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// backendNote returns what is special about a backend, in words.
func backendNote(inTable, cordoned, safe bool) string {
	var all []string
	if !inTable {
		all = append(all, "not in the table")
	}
	if cordoned {
		all = append(all, "cordoned")
	}
	if safe {
		all = append(all, "safe to remove")
	}
	return strings.Join(all, ", ")
}

// printHandoff prints how far a change of owners has come.
func (c *command) printHandoff(h *handoffStatus) {
	fmt.Fprintf(c.out, "step %d (-handoff %s)\n", h.Step, h.Mode)
	if len(h.Members) > 0 {
		fmt.Fprintf(c.out, "shared by %s\n", strings.Join(h.Members, ", "))
	}
	if h.InProgress {
		fmt.Fprintf(c.out, "a change of owners is under way: %.0f %% done, %d sessions to move, "+
			"%.1f s at least\n", 100*h.Progress, h.ToMove, h.SecondsLeft)
	} else if h.ToMove > 0 { // with -handoff=off, or from a pod that was replaced
		fmt.Fprintf(c.out, "no step is under way, %d sessions to move, %.1f s at least\n", h.ToMove, h.SecondsLeft)
	} else {
		fmt.Fprintln(c.out, "no change of owners is under way")
	}
	if h.Doing != "" {
		fmt.Fprintln(c.out, h.Doing)
	}
	for _, w := range h.WaitingFor {
		if w.Router != "" {
			fmt.Fprintf(c.out, "the hand-off has waited for %s for %.1f s: %s\n",
				w.Router, w.Seconds, cmp.Or(w.Error, "it has not answered"))
			continue
		}
		fmt.Fprintf(c.out, "the hand-off has waited for %s for %.1f s: %d sessions, %d upgrades, %d requests, "+
			"%d releases\n", w.Backend, w.Seconds, w.Sessions, w.Upgrades, w.Requests, w.Releases)
		if w.Error != "" {
			fmt.Fprintf(c.out, "  %s\n", w.Error)
		}
	}
}

// printReceipts prints the receipts of moves that are over.
func (c *command) printReceipts(all []moveReceipt) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintln(c.out)
	t := c.columns()
	fmt.Fprintln(t, "OVERRIDES-VERSION\tBEGAN\tSECONDS\tPLANNED\tMOVED\tCUT\tCANCELLED")
	for _, r := range all {
		fmt.Fprintf(t, "%s\t%s\t%.1f\t%d\t%d\t%d\t%d\n", r.OverridesVersion,
			r.Began.UTC().Format(time.RFC3339), r.Seconds, r.Planned, r.Moved, r.Cut, r.Cancelled)
	}
	t.Flush()
}

// backends prints the backends.
func (c *command) backends(ctx context.Context, _ []string) error {
	var answer backendsAnswer
	if err := c.get(ctx, "/backends", &answer); err != nil {
		return err
	}
	return c.show(&answer, answer.Silent, func() {
		t := c.columns()
		fmt.Fprintln(t, "BACKEND\tREADY\tSESSIONS\tOVERRIDES\tADDRESS\tNOTE")
		for _, b := range answer.Backends {
			note := backendNote(b.InTable, b.Cordoned, b.SafeToRemove)
			if b.Error != "" {
				note = strings.TrimPrefix(note+"; "+b.Error, "; ")
			}
			row := fmt.Sprintf("%s\t%s\t%d\t%d\t%s\t%s", b.Name, yesOrNo(b.Ready), b.Sessions,
				b.Overrides, b.Address, note)
			fmt.Fprintln(t, strings.TrimRight(row, "\t"))
		}
		t.Flush()
		c.printRouters(len(answer.Routers), answer.Silent, answer.Agree)
	})
}

// top prints the namespaces with the most sessions or bytes.
func (c *command) top(ctx context.Context, _ []string) error {
	if c.by != "sessions" && c.by != "bytes" {
		return usageError{fmt.Errorf("-by must be sessions or bytes (got %q)", c.by)}
	}
	var s status
	if err := c.get(ctx, "/status", &s); err != nil {
		return err
	}
	list := s.Top.BySessions
	if c.by == "bytes" {
		list = s.Top.ByBytes
	}
	return c.show(list, s.Silent, func() {
		t := c.columns()
		fmt.Fprintln(t, "NAMESPACE\tOWNER\tSESSIONS\tBYTES/S")
		for _, n := range list {
			fmt.Fprintf(t, "%s\t%s\t%d\t%.0f\n",
				showNamespace(n.Namespace), n.Owner, n.Sessions, n.BytesPerSecond)
		}
		t.Flush()
	})
}

// printPatch prints a merge patch (RFC 7396) for kubectl on the output, and in the notes
// how to apply it. object is what it patches.
func (c *command) printPatch(patch any, object, kubeNamespace string) error {
	b, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	option := ""
	if kubeNamespace != "" {
		option = "-n " + kubeNamespace + " "
	}
	fmt.Fprintf(c.notes, "nothing is changed yet; to change it:\n"+
		"  %s | kubectl %spatch %s --type merge --patch-file /dev/stdin\n", c.line, option, object)
	_, err = fmt.Fprintf(c.out, "%s\n", b)
	return err
}

// noteSilent notes which routers did not answer: what the others say is enough here.
func (c *command) noteSilent(silent []silentRouter) {
	if err := silentError(silent); err != nil {
		fmt.Fprintln(c.notes, err)
	}
}

// move prints the patch of a ConfigMap that pins a namespace to a backend, or removes its
// override.
func (c *command) move(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return usageError{fmt.Errorf(
			"a namespace and a backend or - are required (got %d arguments)", len(args))}
	}
	namespace, backend := args[0], args[1]
	var s status
	var o ownership
	query := url.Values{"namespace": {namespace}}
	if err := c.get(ctx, "/status", &s); err != nil {
		return err
	}
	if err := c.get(ctx, "/owner?"+query.Encode(), &o); err != nil {
		return err
	}
	c.noteSilent(o.Silent)
	var value any
	if backend != "-" {
		if err := s.checkBackend(backend); err != nil {
			return err
		}
		value = backend
	}
	key := namespaceKey(o.Namespace)
	if len(key) > maxNameBytes {
		return errors.New(o.Note)
	}
	src, err := c.sourceToPatch(&s, &o, value != nil)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.notes, "%s: owner %s (%s), %d sessions\n",
		showNamespace(namespace), cmp.Or(o.Owner, "none"), o.Why, o.Sessions)
	patch := map[string]any{"data": map[string]any{key: value}}
	return c.printPatch(patch, "configmap "+src.Name, src.KubeNamespace)
}

// quoteForShell returns the text as a word of a POSIX shell.
func quoteForShell(text string) string {
	plain := "-._:/=0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	if text != "" && strings.Trim(text, plain) == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// checkBackend returns an error if no router's table has a backend of this name.
func (s *status) checkBackend(name string) error {
	var names []string
	for _, b := range s.Backends {
		if b.InTable {
			names = append(names, b.Name)
		}
	}
	if slices.Contains(names, name) {
		return nil
	}
	if len(names) == 0 {
		return errors.New("no router knows the backends yet")
	}
	return fmt.Errorf("there is no backend %q; the backends are %s to %s",
		name, names[0], names[len(names)-1])
}

// sourceToPatch returns the ConfigMap that has, or shall have, the override of the
// namespace. Two with an override of it would disagree: pin says that it gets one.
func (c *command) sourceToPatch(s *status, o *ownership, pin bool) (*sourceState, error) {
	var maps []*sourceState
	var names []string
	for i := range s.Sources {
		if src := &s.Sources[i]; src.Kind == "ConfigMap" {
			maps, names = append(maps, src), append(names, src.Name)
		}
	}
	show := func(src *sourceState) string { return sourceID{src.Kind, src.KubeNamespace, src.Name}.String() }
	chosen := slices.Index(names, c.configMap)
	if c.configMap == "" && len(maps) == 1 {
		chosen = 0
	} else if c.configMap == "" && len(o.OverridesIn) == 1 {
		chosen = slices.IndexFunc(maps, func(src *sourceState) bool { return show(src) == o.OverridesIn[0] })
	}
	switch {
	case len(maps) == 0 && len(s.Sources) > 0:
		src, part := &s.Sources[0], "entry"
		if src.Kind == "directory" {
			part = "file"
		}
		return nil, fmt.Errorf("the overrides are in %s %s, and not in a ConfigMap: "+
			"change its %s %s", src.Kind, src.Name, part, namespaceKey(o.Namespace))
	case len(maps) == 0:
		return nil, errors.New("no router has overrides yet")
	case c.configMap != "" && chosen < 0:
		return nil, fmt.Errorf("ConfigMap %s is not a source of overrides; the sources are: %s",
			c.configMap, strings.Join(names, ", "))
	case chosen < 0:
		return nil, fmt.Errorf("several ConfigMaps have overrides: choose one with -configmap (%s)",
			strings.Join(names, ", "))
	}
	for _, other := range o.OverridesIn {
		if pin && other != show(maps[chosen]) {
			return nil, fmt.Errorf("%s has an override in %s: two would disagree",
				showNamespace(o.Namespace), other)
		}
	}
	return maps[chosen], nil
}

// cordonBackend prints the patch of the StatefulSet that cordons a backend.
func (c *command) cordonBackend(ctx context.Context, args []string) error {
	return c.changeCordon(ctx, args, func(list cordon, ordinal int) cordon {
		return newCordon(append(slices.Clone(list), ordinal))
	})
}

// uncordonBackend prints the patch of the StatefulSet that ends the cordon of a backend.
func (c *command) uncordonBackend(ctx context.Context, args []string) error {
	return c.changeCordon(ctx, args, func(list cordon, ordinal int) cordon {
		return slices.DeleteFunc(slices.Clone(list), func(other int) bool { return other == ordinal })
	})
}

// changeCordon prints the patch of the StatefulSet with the list of cordoned backends that
// change returns. The list of an annotation that is not valid is replaced by the last valid one
// with the change, if routers have that, and all have the same.
func (c *command) changeCordon(ctx context.Context, args []string,
	change func(list cordon, ordinal int) cordon) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("one backend is required (got %d arguments)", len(args))}
	}
	var s status
	if err := c.get(ctx, "/status", &s); err != nil {
		return err
	}
	c.noteSilent(s.Silent)
	switch set := s.StatefulSet; {
	case set == nil:
		return errors.New("flags give the backends: change -cordon of the routers")
	case set.CordonUnknown:
		return fmt.Errorf("no router knows which backends are cordoned: set the annotation %s to "+
			"the whole list", cordonAnnotation)
	case set.CordonsDiffer:
		return fmt.Errorf("the routers have different lists of cordoned backends: try again, or "+
			"set the annotation %s to the whole list", cordonAnnotation)
	}
	list, err := parseCordon(s.StatefulSet.Cordon)
	if err != nil {
		return err
	}
	ordinal, ok := backendOrdinal(s.StatefulSet.Name, args[0])
	if !ok || !slices.Contains(list, ordinal) { // who is on the list need not exist
		if err := s.checkBackend(args[0]); err != nil {
			return err
		}
	}
	list = change(list, ordinal)
	left := 0
	for _, b := range s.Backends {
		if b.Ordinal == ordinal {
			fmt.Fprintf(c.notes, "%s has %d sessions, and %d overrides, which a cordon does "+
				"not change\n", b.Name, b.Sessions, b.Overrides)
		}
		if b.InTable && !slices.Contains(list, b.Ordinal) {
			left++
		}
	}
	if left == 0 {
		return errors.New("a backend must be left that is not cordoned")
	}
	var value any
	if len(list) > 0 {
		value = list.String()
	}
	patch := map[string]any{"metadata": map[string]any{
		"annotations": map[string]any{cordonAnnotation: value}}}
	return c.printPatch(patch, "statefulset "+s.StatefulSet.Name, s.StatefulSet.KubeNamespace)
}

const (
	waitInterval   = time.Second
	maxSilentLooks = 3 // in a row: a router that stops may be silent for a moment
)

// wait returns when two looks in a row have found nothing left to move on any router: a
// change that was just made is not known everywhere at once.
func (c *command) wait(ctx context.Context, _ []string) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	silent, quiet, last := 0, 0, ""
	for {
		var s status
		if err := c.get(ctx, "/status", &s); err != nil && ctx.Err() == nil {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("not done after %s: %s", c.timeout, cmp.Or(last, "no answer"))
		}
		quiet, silent = quiet+1, silent+1
		if len(s.Silent) == 0 {
			silent = 0
		}
		if last = s.unfinished(); last != "" || silent > 0 {
			quiet = 0
		}
		switch {
		case silent == maxSilentLooks:
			return silentError(s.Silent)
		case quiet == 2:
			_, err := fmt.Fprintln(c.out, "no change of owners is under way")
			return err
		}
		sleep(ctx, waitInterval) // an error shows in ctx
	}
}

// unfinished says what of a change of owners is not over; "" if nothing is.
func (s *status) unfinished() string {
	inTable := slices.DeleteFunc(slices.Clone(s.Backends), func(b backendStatus) bool { return !b.InTable })
	switch {
	case s.Handoff.InProgress || s.Handoff.ToMove > 0:
		return fmt.Sprintf("a change of owners is under way, %.0f %% done, with %d sessions to move",
			100*s.Handoff.Progress, s.Handoff.ToMove)
	case s.Handoff.NoOwners:
		return "a router has no routing table yet, or no plan of the hand-off"
	case s.Handoff.Moving != nil:
		return "the last sessions of a change are closing"
	case !s.Agree:
		return "the routers do not agree"
	case s.StatefulSet == nil || s.StatefulSet.Replicas == 0: // not known, or the table stays
		return ""
	case s.StatefulSet.ReplicasDiffer:
		return "the routers see different versions of the StatefulSet"
	case len(inTable) > 0 && s.StatefulSet.FirstOrdinal != inTable[0].Ordinal:
		return fmt.Sprintf("the first backend is %s, and spec.ordinals.start is %d; the new ones are not ready",
			inTable[0].Name, s.StatefulSet.FirstOrdinal)
	case s.StatefulSet.Replicas > len(inTable):
		return fmt.Sprintf("the table has %d of %d backends; the next one is not ready",
			len(inTable), s.StatefulSet.Replicas)
	case s.StatefulSet.Replicas < len(inTable):
		return fmt.Sprintf("the table has %d backends, and the StatefulSet %d replicas",
			len(inTable), s.StatefulSet.Replicas)
	}
	return ""
}

// owners prints who owns the namespaces. It asks a router. With -replicas, -overrides or
// -cordon it answers as a router would that has just started with these.
func (c *command) owners(ctx context.Context, namespaces []string) error {
	if len(namespaces) == 0 {
		return usageError{errors.New("at least one namespace is required")}
	}
	lookUp := func(namespace string) (o ownership, err error) {
		query := url.Values{"namespace": {namespace}}
		err = c.get(ctx, "/owner?"+query.Encode(), &o)
		return o, err
	}
	if c.replicas != 0 || c.overridesDir != "" || len(c.cordon) > 0 { // a router has a cordon of its own
		t, err := c.table()
		if err != nil {
			return err
		}
		lookUp = func(namespace string) (ownership, error) { return ownerIn(t, namespace) }
	}
	t := c.columns()
	defer t.Flush()
	var silent []silentRouter
	for _, namespace := range namespaces {
		o, err := lookUp(namespace)
		if err != nil {
			return err
		}
		for _, s := range o.Silent {
			if !slices.Contains(silent, s) {
				silent = append(silent, s)
			}
		}
		if err := c.show(&o, nil, func() { printOwner(t, namespace, o) }); err != nil {
			return err
		}
	}
	return silentError(silent)
}

// printOwner writes one namespace: a row of cells for a tabwriter, and below it what is
// wrong with its overrides.
func printOwner(w io.Writer, namespace string, o ownership) {
	cells := []string{showNamespace(namespace), o.Owner, o.Why}
	if o.Router != "" {
		cells = append(cells, fmt.Sprintf("%d sessions", o.Sessions))
	}
	row := strings.Join(append(cells, o.Address, o.Error), "\t")
	fmt.Fprintln(w, strings.TrimRight(row, "\t"))
	switch {
	case o.HeldByStep != 0:
		fmt.Fprintf(w, "\theld by step %d until its sessions and requests with %s are over\n",
			o.HeldByStep, cmp.Or(o.Previous, "its previous owner"))
	case o.Next != "" && o.Owner == "":
		fmt.Fprintf(w, "\t%s in the table of this router, which does not know the owner\n", o.Next)
	case o.Next != "":
		fmt.Fprintf(w, "\tmoves to %s later in this change\n", o.Next)
	}
	if o.Agree != nil && !*o.Agree {
		for _, r := range o.Routers {
			fmt.Fprintf(w, "\t%s: %s (%s), %d sessions\n",
				r.Name, cmp.Or(r.Owner, "no owner"), r.Why, r.Sessions)
		}
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
	matcher, err := newNamespaceMatcher(c.namespaceFrom, nil)
	if err != nil {
		return nil, usageError{err}
	}
	var sources []sourceContent
	if c.overridesDir != "" {
		d := &directory{path: c.overridesDir}
		data, version, _, err := d.read()
		if err != nil {
			return nil, fmt.Errorf("-overrides: %w", err)
		}
		sources = []sourceContent{{id: d.id(), version: version, overrides: newOverrideSet(data)}}
	}
	return newTable(c.statefulSet, matcher.fromHost, backends, c.cordon, sources, nil), nil
}

// ownerIn answers as a router with the table would. The backends are not dialled.
func ownerIn(t *table, namespace string) (ownership, error) {
	namespace, want := clientNamespace(namespace, t.fromHost)
	if want != "" {
		return ownership{}, usageError{fmt.Errorf("the argument must be %s (got %.260q)", want, namespace)}
	}
	o, _ := newOwnership(t, namespace)
	return o, nil
}
