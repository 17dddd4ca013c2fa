package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
)

// commandOutput runs the program with args and returns its output, or its error, and its
// exit code.
func commandOutput(t *testing.T, args ...string) (string, int) {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), args, noEnvironment, &out); err != nil {
		fmt.Fprintln(&out, err)
		return out.String(), exitCode(err)
	}
	return out.String(), 0
}

func TestCommands(t *testing.T) {
	a := previewAdmin(t)
	s := httptest.NewServer(a.handler())
	defer s.Close()
	admin := "-admin=" + s.URL
	folder := overridesDir(t, map[string]string{"a": "backend-2\n", "bad": "bakend-2"})
	hosts := overridesDir(t, map[string]string{"NS": "backend-2"})
	file := filepath.Join(t.TempDir(), "map.json")
	object := `{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{"a":"backend-2","late":"backend-1","x":"no"}}`
	must(t, os.WriteFile(file, []byte(object), 0o600))
	hashed := backendName("backend", bucket("free", 4))
	tests := map[string]struct {
		args []string
		code int
		want string // parts, in order
	}{
		"plan a file": {[]string{"plan", admin, file}, 0, "a     backend-0  to backend-2  3 sessions\nlate  backend-0  to backend-1  1 sessions\n" +
			"rejected: x: \"no\", expected backend-0 to backend-3, in force: hash\n4 sessions of 2 namespaces would move, in 2.0 s; 4 backends, 1 overrides rejected\n1 of 1 routers answered\n"},
		"plan a number":    {[]string{"plan", admin, "4"}, 0, "late  backend-0  to backend-1  1 sessions\n1 sessions of 1 namespaces would move, in 0.5 s; 4 backends, 0 overrides rejected\n1 of 1 routers answered\n"},
		"plan no number":   {[]string{"plan", admin, "0"}, 1, s.URL + "/plan: 400 Bad Request: replicas must be 1 to 10000 (got 0)\n"},
		"plan no file":     {[]string{"plan", admin, "/nowhere"}, 1, "open /nowhere: no such file or directory\n"},
		"plan nothing":     {[]string{"plan", admin}, 2, "one argument is required: a file, -, or a number of backends; or cordon and a list (got 0)\n"},
		"plan, bad flag":   {[]string{"plan", "-replicas", "3"}, 2, "flag provided but not defined: -replicas\n"},
		"owner":            {[]string{"owner", admin, "late"}, 0, "late  backend-1  override  2 sessions  127.0.0.1:1  dial tcp 127.0.0.1:1: connect: connection refused\n"},
		"owner of nothing": {[]string{"owner", admin}, 2, "at least one namespace is required\n"},
		"owner, bad name":  {[]string{"owner", admin, "a/b"}, 1, s.URL + "/owner?namespace=a%2Fb: 400 Bad Request: /owner?namespace= must be " + expectedPathNamespace("a/b") + " (got \"a/b\")\n"},
		"owner offline": {[]string{"owner", "-replicas", "4", "-overrides", folder, "a", "free", "bad"}, 0, "a     backend-2  override\nfree  " + hashed + "  hash\nbad              unresolved\n" +
			"      rejected: \"bakend-2\" in directory " + folder + ", expected backend-0 to backend-3\n"},
		"owner offline, bad name": {[]string{"owner", "-replicas", "4", ""}, 2, "the argument must be " + expectedPathNamespace("") + " (got \"\")\n"},
		"owner offline, of hosts": {[]string{"owner", "-replicas", "4", "-overrides", hosts, "-namespace-from", "host", "Ns", "free"}, 0,
			"Ns    " + backendName("backend", bucket("ns", 4)) + "  hash\n      rejected: \"backend-2\" in directory " + hosts + " NS, expected " + expectedHostNamespace("") +
				"\nfree  " + hashed + "  hash\n"},
		"owner offline, no host":    {[]string{"owner", "-replicas", "4", "-namespace-from", "host", "a.b"}, 2, "the argument must be " + expectedHostNamespace("a.b") + " (got \"a.b\")\n"},
		"owner offline, from where": {[]string{"owner", "-replicas", "4", "-namespace-from", "header", "a"}, 2, "-namespace-from must be path, host or query:NAME (got \"header\")\n"},
		"owner of two dots": {[]string{"owner", "-replicas", "1", "..foo"}, 0,
			"..foo  backend-0  hash\n       its key in a ConfigMap is _x2E.foo\n"},
		"owner of long names": {[]string{"owner", "-replicas", "1", "my room", strings.Repeat(":", 64)}, 0,
			"\"my room\"                                                         backend-0  hash\n" +
				"                                                                  its key in a ConfigMap is my_x20room\n" +
				strings.Repeat(":", 64) + "  backend-0  hash\n" +
				"                                                                  it cannot have an override: its key would have 256 characters, and at most 253 are allowed\n"},
		"owner, cordon of none": {[]string{"owner", admin, "-cordon", "1", "a"}, 2, "-replicas must be 1 to 10000 (got 0)\n"},
		"owner of no backends":  {[]string{"owner", "-overrides", folder, "a"}, 2, "-replicas must be 1 to 10000 (got 0)\n"},
		"owner, no folder":      {[]string{"owner", "-replicas", "1", "-overrides", "/nowhere", "a"}, 1, "-overrides: open /nowhere: no such file or directory\n"},
		"no URL":                {[]string{"owner", "-admin", ":", "a"}, 2, "-admin: parse \":/owner?namespace=a&all=1\": missing protocol scheme\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got, code := commandOutput(t, tt.args...); got != tt.want || code != tt.code {
				t.Errorf("exit code %d:\n%s\nwant %d:\n%s", code, got, tt.code, tt.want)
			}
		})
	}
	for _, name := range []string{"plan", "owner"} {
		if got, code := commandOutput(t, name, "-h"); code != 0 || !strings.HasPrefix(got, "Usage: router "+name+" [flags] ") || !strings.Contains(got, "-admin URL") {
			t.Errorf("%s -h is %d:\n%s", name, code, got)
		}
	}
}

// TestCommandVersion: version is one line, also where other programs have a flag for it.
func TestCommandVersion(t *testing.T) {
	for _, arg := range []string{"version", "-version", "--version"} {
		got, code := commandOutput(t, arg)
		want := "router " + version() + ", commit " + readBuild(embeddedVersion).commit + ", " + runtime.Version() + ", " + runtime.GOOS + "/" + runtime.GOARCH + "\n"
		if got != want || code != 0 {
			t.Errorf("%s is %d %q, want 0 %q", arg, code, got, want)
		}
	}
}

// A proxy before the router, or something else at its port, answers with no JSON.
func TestCommandAnswersOfOthers(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		io.WriteString(w, "<html>")
	}))
	defer s.Close()
	want := s.URL + "/plan: 502 Bad Gateway: <html>\n"
	if got, code := commandOutput(t, "plan", "-admin", s.URL, "3"); got != want || code != 1 {
		t.Errorf("%d %s, want 1 %s", code, got, want)
	}
}

// noted runs a subcommand, and returns its output, what is not part of that, and its exit
// code. An error is part of the notes.
func noted(t *testing.T, args ...string) (out, notes string, code int) {
	t.Helper()
	var output, other bytes.Buffer
	handled, err := runCommand(t.Context(), args, &output, &other)
	if !handled {
		t.Fatalf("%v is no subcommand", args)
	}
	if err != nil {
		fmt.Fprintln(&other, err)
	}
	return output.String(), other.String(), exitCode(err)
}

// The subcommands answer for all routers, and fail with the name of one that is silent,
// after they have shown what the others say.
func TestCommandsOfAll(t *testing.T) {
	a, b := servedAdmin(t, "router-a", "vip@4", "vip@4"), servedAdmin(t, "router-b", "vip@4", "a@0")
	gone := refusingAddr(t)
	for _, broken := range []bool{false, true} {
		a.asks(b.addr)
		names, code := "2 of 2 routers answered; they agree\n", 0
		if broken {
			a.asks(b.addr, gone)
			names, code = "2 of 3 routers answered; they agree\n", 1
		}
		for _, tt := range []struct{ args, want string }{
			{"plan 4", "idle  backend-4  to no owner  0 sessions\nvip   backend-4  to no owner  3 sessions\n" +
				"rejected: idle: \"backend-4\", expected backend-0 to backend-3, in force: unresolved\nrejected: vip: \"backend-4\", expected backend-0 to backend-3, in force: unresolved\n" +
				"0 sessions of 0 namespaces would move, in 0.0 s; 4 backends, 2 overrides rejected\n" +
				"2 namespaces would have no owner: new clients get 503, and 3 sessions end with their backends\n" + names},
			{"status", names},
			{"backends", "backend-4  no     3         2"},
			{"owner vip", "vip  backend-4  override  3 sessions"},
			{"top", "NAMESPACE  OWNER      SESSIONS  BYTES/S\nvip        backend-4  3         0\na          backend-0  1         0\n"},
		} {
			words := strings.Fields(tt.args)
			args := append([]string{words[0], "-admin=http://" + a.addr}, words[1:]...)
			out, notes, got := noted(t, args...)
			if !strings.Contains(out, tt.want) || got != code || broken != strings.Contains(notes, gone+" did not answer: ") {
				t.Errorf("%s: exit code %d, want %d\n%s\n%s\nwant\n%s", tt.args, got, code, out, notes, tt.want)
			}
			args = append([]string{words[0], "-o=json", "-all=false", "-admin=http://" + a.addr}, words[1:]...)
			out, notes, got = noted(t, args...)
			if !json.Valid([]byte(out)) || got != 0 || strings.Contains(out, "router-b") {
				t.Errorf("%v: exit code %d\n%s\n%s", args, got, out, notes)
			}
		}
	}
	b.update(sourceContent{id: sourceID{"ConfigMap", "edge", "overwriting"}, version: "8", overrides: newOverrideSet(map[string]string{"vip": "backend-1"})})
	out, _, _ := noted(t, "owner", "-admin=http://"+a.addr, "vip")
	if !strings.Contains(out, "router-a: backend-4 (override), 2 sessions\n") || !strings.Contains(out, "router-b: backend-1 (override), 1 sessions\n") {
		t.Errorf("%s, want the owner of each router", out)
	}
	if out, _, _ := noted(t, "status", "-admin=http://"+a.addr); !strings.Contains(out, "they do not agree") {
		t.Errorf("%s, want that they do not agree", out)
	}
}

// move prints a patch, after it has looked whether it makes sense.
func TestCommandMove(t *testing.T) {
	a := servedAdmin(t, "router-a", "vip@4", "vip@4")
	two, update := servedAdmin(t, "router-b"), sourceContent{id: sourceID{"ConfigMap", "edge", "one"}, version: "1", overrides: newOverrideSet(map[string]string{"here": "backend-0"})}
	two.update(update, sourceContent{id: sourceID{"ConfigMap", "edge", "two"}, version: "1", overrides: newOverrideSet(map[string]string{"there": "backend-0"})})
	differ := servedAdmin(t, "router-e") // one override is invalid, two disagree, two are the same
	differ.update(sourceContent{id: sourceID{"ConfigMap", "edge", "one"}, version: "1", overrides: newOverrideSet(map[string]string{"valid": "backend-1", "differs": "backend-1", "same": "backend-1"})},
		sourceContent{id: sourceID{"ConfigMap", "edge", "two"}, version: "1", overrides: newOverrideSet(map[string]string{
			"vip": "bakend-1", "valid": "bakend-1", "differs": "backend-2", "same": "backend-1", "new_x62": "backend-1"})}) // not the key of newb
	files := servedAdmin(t, "router-c")
	files.update(sourceContent{id: sourceID{kind: "directory", name: "/overrides"}, version: "1"})
	other := servedAdmin(t, "router-d")
	other.update(sourceContent{id: sourceID{kind: "database", name: "overrides"}, version: "1"})
	tests := map[string]struct {
		admin      *namedAdmin
		args       string
		code       int
		out, notes string
	}{
		"pin":           {a, "vip backend-2", 0, `{"data":{"vip":"backend-2"}}`, " vip backend-2 | kubectl -n edge patch configmap overwriting --type merge --patch-file /dev/stdin\n"},
		"what is":       {a, "vip backend-2", 0, `{"data":{"vip":"backend-2"}}`, "vip: owner backend-4 (override), 2 sessions\n"},
		"unpin":         {a, "vip -", 0, `{"data":{"vip":null}}`, " vip - |"},
		"key":           {a, "café:it's backend-0", 0, `{"data":{"caf_xC3_xA9_x3Ait_x27s":"backend-0"}}`, ` 'café:it'\''s' backend-0 |`},
		"no backend":    {a, "vip backend-5", 1, "", `there is no backend "backend-5"; the backends are backend-0 to backend-4`},
		"no namespace":  {a, "a/b backend-0", 1, "", "/owner?namespace=a%2Fb: 400 Bad Request"},
		"long":          {a, strings.Repeat(":", 64) + " backend-0", 1, "", "it cannot have an override"},
		"one of two":    {two, "there backend-2", 0, `{"data":{"there":"backend-2"}}`, "patch configmap two "},
		"new of two":    {two, "new backend-2", 1, "", "choose one with -configmap (one, two)"},
		"chosen of two": {two, "-configmap=one new backend-2", 0, `{"data":{"new":"backend-2"}}`, " -configmap=one new backend-2 | kubectl -n edge patch configmap one "},
		"like a flag":   {a, "-- -new backend-2", 0, `{"data":{"-new":"backend-2"}}`, " -- -new backend-2 | kubectl "},
		"the other":     {two, "-configmap=one there backend-2", 1, "", "there has an override in ConfigMap edge/two: two would disagree"},
		"invalid":       {differ, "vip backend-2", 0, `{"data":{"vip":"backend-2"}}`, "patch configmap two "},
		"invalid there": {differ, "-configmap=one vip backend-2", 1, "", "vip has an override in ConfigMap edge/two: two would disagree"},
		"invalid here":  {differ, "-configmap=two vip backend-2", 0, `{"data":{"vip":"backend-2"}}`, "patch configmap two "},
		"kept, valid":   {differ, "-configmap=two valid backend-2", 1, "", "valid has an override in ConfigMap edge/one: two would disagree"},
		"conflict":      {differ, "-configmap=one differs backend-2", 1, "", "differs has an override in ConfigMap edge/two: two would disagree"},
		"which of both": {differ, "differs backend-2", 1, "", "choose one with -configmap (one, two)"},
		"ends it":       {differ, "-configmap=one differs -", 0, `{"data":{"differs":null}}`, "patch configmap one "},
		"the same":      {differ, "-configmap=one same backend-2", 1, "", "same has an override in ConfigMap edge/two: two would disagree"},
		"not its key":   {differ, "-configmap=one newb backend-2", 0, `{"data":{"newb":"backend-2"}}`, "patch configmap one "},
		"no source":     {two, "-configmap=three new backend-2", 1, "", "ConfigMap three is not a source of overrides"},
		"files":         {files, "new backend-2", 1, "", "the overrides are in directory /overrides, and not in a ConfigMap: change its file new"},
		"another kind":  {other, "new backend-2", 1, "", "the overrides are in database overrides, and not in a ConfigMap: change its entry new"},
		"one argument":  {a, "vip", 2, "", "a namespace and a backend or - are required (got 1 arguments)"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out, notes, code := noted(t, append([]string{"move", "-admin=http://" + tt.admin.addr}, strings.Fields(tt.args)...)...)
			if strings.TrimSpace(out) != tt.out || code != tt.code || !strings.Contains(notes, tt.notes) {
				t.Errorf("exit code %d, %s\n%s\nwant %d, %s\n%s", code, out, notes, tt.code, tt.out, tt.notes)
			}
		})
	}
}

// statusServer answers /status with what answer returns, by the number of the request.
func statusServer(t *testing.T, answer func(n int64) *status) string {
	t.Helper()
	var asked atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, answer(asked.Add(1)))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// cordon and uncordon print the whole list of the StatefulSet's annotation.
func TestCommandCordon(t *testing.T) {
	s := &status{StatefulSet: &statefulSetState{KubeNamespace: "edge", Name: "backend", Cordon: "1,7"}}
	for i := range 3 {
		s.Backends = append(s.Backends, backendStatus{Name: backendName("backend", i), Ordinal: i, InTable: true, Cordoned: i == 1, Sessions: 5, Overrides: 2})
	}
	admin := "-admin=" + statusServer(t, func(int64) *status { return s })
	const apply = " | kubectl -n edge patch statefulset backend --type merge --patch-file /dev/stdin\n"
	annotation := func(value string) string { return `{"metadata":{"annotations":{"router-cordon":` + value + `}}}` }
	for args, want := range map[string]struct {
		code       int
		out, notes string
	}{
		"cordon backend-2":   {0, annotation(`"1,2,7"`), "backend-2 has 5 sessions, and 2 overrides, which a cordon does not change\n"},
		"cordon backend-1":   {0, annotation(`"1,7"`), " backend-1" + apply},
		"uncordon backend-1": {0, annotation(`"7"`), " backend-1" + apply},
		"uncordon backend-7": {0, annotation(`"1"`), " backend-7" + apply},
		"cordon backend-3":   {1, "", "there is no backend \"backend-3\""},
		"cordon 2":           {1, "", "there is no backend \"2\""},
		"cordon":             {2, "", "one backend is required (got 0 arguments)"},
	} {
		words := strings.Fields(args)
		out, notes, code := noted(t, append([]string{words[0], admin}, words[1:]...)...)
		if strings.TrimSpace(out) != want.out || code != want.code || !strings.Contains(notes, want.notes) {
			t.Errorf("%s: exit code %d, %s\n%s\nwant %+v", args, code, out, notes, want)
		}
	}
	s.StatefulSet.Cordon = "0,2"
	if out, notes, code := noted(t, "cordon", admin, "backend-1"); code != 1 || out != "" || !strings.Contains(notes, "a backend must be left") {
		t.Errorf("the last one: %d %s %s", code, out, notes)
	}
	s.StatefulSet.Cordon = "2"
	if out, _, code := noted(t, "uncordon", admin, "backend-2"); code != 0 || strings.TrimSpace(out) != annotation("null") {
		t.Errorf("no more: %d %s", code, out)
	}
	// A router that has seen no valid list says nothing of it, and no other router's list is lost.
	known, unknown := &statefulSetState{Name: "backend", Cordon: "1"}, &statefulSetState{Name: "backend", CordonUnknown: true, CordonRejected: "the annotation"}
	for _, sets := range [][2]*statefulSetState{{known, unknown}, {unknown, known}} {
		s.StatefulSet = sets[0].merged(sets[1])
		wantEqual(t, "why it is not in force", s.StatefulSet.CordonRejected, "the annotation")
		if out, _, code := noted(t, "cordon", admin, "backend-2"); code != 0 || strings.TrimSpace(out) != annotation(`"1,2"`) {
			t.Errorf("one router knows the list: %d %s", code, out)
		}
	}
	for want, set := range map[string]*statefulSetState{
		"no router knows which backends are cordoned": unknown.merged(unknown),
		"the routers have different lists":            known.merged(&statefulSetState{Cordon: "2"}).merged(unknown).merged(nil),
	} {
		s.StatefulSet = set
		if out, notes, code := noted(t, "cordon", admin, "backend-2"); code != 1 || out != "" || !strings.Contains(notes, want) {
			t.Errorf("exit code %d, %q, %q; want 1 and %q", code, out, notes, want)
		}
	}
	s.StatefulSet = nil
	if _, notes, code := noted(t, "cordon", admin, "backend-1"); code != 1 || !strings.Contains(notes, "flags give the backends") {
		t.Errorf("no StatefulSet: %d %s", code, notes)
	}
}

// wait ends when two looks in a row find nothing to do, and fails at its timeout, and when
// a router stays silent.
func TestCommandWait(t *testing.T) {
	quiet := func() *status { return &status{Agree: true} }
	busy := func(change func(s *status)) *status { s := quiet(); change(s); return s }
	waits := map[string]*status{
		"a change of owners is under way, 50 % done, with 3 sessions to move": busy(func(s *status) { s.Handoff.InProgress, s.Handoff.Progress, s.Handoff.ToMove = true, 0.5, 3 }),
		"the last sessions of a change are closing":                           busy(func(s *status) { s.Handoff.Moving = &moveReceipt{} }),
		"the routers do not agree":                                            busy(func(s *status) { s.Agree = false }),
		"the table has 0 of 2 backends; the next one is not ready":            busy(func(s *status) { s.StatefulSet = &statefulSetState{Replicas: 2} }),
		"the table has 1 of 2 backends; the next one is not ready": busy(func(s *status) { // a cordoned one has no namespaces
			s.Backends, s.StatefulSet = []backendStatus{{InTable: true, Cordoned: true}}, &statefulSetState{Replicas: 2}
		}),
	}
	for want, s := range waits {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			_, notes, code := noted(t, "wait", "-timeout=2s", "-admin="+statusServer(t, func(int64) *status { return s }))
			if code != 1 || notes != "not done after 2s: "+want+"\n" {
				t.Errorf("exit code %d, %q; want 1 and %q", code, notes, want)
			}
		})
	}
	t.Run("done", func(t *testing.T) {
		t.Parallel()
		var looks int64
		out, notes, code := noted(t, "wait", "-admin="+statusServer(t, func(n int64) *status {
			looks = n
			if n == 2 { // the change is known only now
				return waits["the routers do not agree"]
			}
			return quiet()
		}))
		if code != 0 || out != "no change of owners is under way\n" || looks != 4 {
			t.Errorf("exit code %d after %d looks: %q %q", code, looks, out, notes)
		}
	})
	t.Run("silent", func(t *testing.T) {
		t.Parallel()
		_, notes, code := noted(t, "wait", "-admin="+statusServer(t, func(n int64) *status {
			s := quiet()
			if n != 2 {
				s.Silent = []silentRouter{{"router-b", "gone"}}
			}
			return s
		}))
		if code != 1 || notes != "router-b did not answer: gone\n" {
			t.Errorf("exit code %d, %q; want 1 and its name", code, notes)
		}
	})
	if _, notes, code := noted(t, "wait", "-admin=http://"+refusingAddr(t)); code != 1 || !strings.Contains(notes, "connection refused") {
		t.Errorf("exit code %d, %q; want 1", code, notes)
	}
}
