package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeKube is an API server. It has objects, which the test changes, and which clients
// list, watch, patch and create as those of a real one. Where it has a script, the
// script answers instead.
type fakeKube struct {
	arrived chan fakeRequest // what was requested; without what came when it was full

	// Guarded by mu.
	mu      sync.Mutex
	scripts map[string]script            // by verb, "LIST", or verb and kind, "LIST configmaps"
	objects map[string]map[string]string // JSON by kind, "configmaps", and name
	history []watchedChange              // its length is the server's resourceVersion
	changed chan struct{}                // closed at each change
	set     fakeStatefulSet              // the StatefulSet edge/backend
	events  map[string]string            // JSON of the Events that were created, by name
	faults  func(fakeRequest) kubeFault  // what happens to each request; nil: nothing
	counts  map[string]int               // of answers, by verb, kind and status: "PATCH pods 403"
	watched map[string]int               // bytes that were sent to WATCHes, by kind
	watches map[string]chan struct{}     // by kind; closed to end them

	closed  chan struct{}  // when the server is closed
	running sync.WaitGroup // requests
}

// script has one answer for each request, in order. The last one stays.
type script = []http.HandlerFunc

// watchedChange is a change of an object, as a WATCH of its kind sends it.
type watchedChange struct{ kind, name, event string }

// fakeRequest is a request as the server saw it.
type fakeRequest struct {
	*http.Request
	at    time.Time
	body  []byte
	fault kubeFault
}

// verb returns LIST, WATCH, or the method of what is neither.
func (r fakeRequest) verb() string {
	_, name := r.target()
	switch {
	case r.Method != http.MethodGet || name != "":
		return r.Method
	case r.URL.Query().Get("watch") == "1":
		return "WATCH"
	}
	return "LIST"
}

// target returns the kind, "pods", and the name of what is asked for; "" if that is a
// collection.
func (r fakeRequest) target() (kind, name string) {
	_, path, _ := strings.Cut(r.URL.Path, "/namespaces/")
	parts := append(strings.Split(path, "/"), "", "") // namespace, kind, name
	return parts[1], parts[2]
}

// selects reports whether the request is for the object, by its fieldSelector.
func (r fakeRequest) selects(name string) bool {
	field := r.FormValue("fieldSelector")
	return field == "" || field == "metadata.name="+name
}

func newFakeKube() *fakeKube {
	return &fakeKube{arrived: make(chan fakeRequest, 1000), scripts: map[string]script{}, objects: map[string]map[string]string{},
		changed: make(chan struct{}), events: map[string]string{}, counts: map[string]int{}, watched: map[string]int{},
		watches: map[string]chan struct{}{}, closed: make(chan struct{})}
}

// scriptedKube answers each LIST and each WATCH by a script.
func scriptedKube(lists, watches script) *fakeKube {
	f := newFakeKube()
	f.scripts["LIST"], f.scripts["WATCH"] = lists, watches
	return f
}

// kubeAnswers is an API server that answers every LIST alike, and no WATCH.
func kubeAnswers(t *testing.T, list http.HandlerFunc) (url string) {
	return scriptedKube(script{list}, script{hang}).url(t)
}

// kindAnswers is an API server that answers LIST by kind, and WATCH where there is an
// answer for "WATCH <kind>". It forbids to list the other kinds.
func kindAnswers(t *testing.T, lists map[string]http.HandlerFunc) (url string) {
	f := newFakeKube()
	f.scripts["LIST"] = script{statusAnswer(403, "Forbidden", "not this")}
	for kind, answer := range lists {
		if strings.HasPrefix(kind, "WATCH ") {
			f.scripts[kind] = script{answer}
		} else if answer != nil {
			f.scripts["LIST "+kind] = script{answer}
		}
	}
	return f.url(t)
}

// url serves on a real socket until the test ends.
func (f *fakeKube) url(t *testing.T) string {
	l, host, port := listenHostPort(t)
	f.serve(t, l)
	return "http://" + net.JoinHostPort(host, port)
}

// serve serves on l, with TLS if there is a certificate, until the test ends.
func (f *fakeKube) serve(t *testing.T, l net.Listener, certificates ...tls.Certificate) *fakeKube {
	return f.serveBy(t, f, l, certificates...)
}

// serveBy is serve through a handler before f.
func (f *fakeKube) serveBy(t *testing.T, h http.Handler, l net.Listener, certificates ...tls.Certificate) *fakeKube {
	s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
		TLSConfig: &tls.Config{Certificates: certificates}}
	var serving sync.WaitGroup
	serving.Go(func() {
		if certificates == nil {
			s.Serve(l)
		} else {
			s.ServeTLS(l, "", "")
		}
	})
	t.Cleanup(func() {
		f.close()
		s.Close()
		serving.Wait()
		f.running.Wait()
	})
	return f
}

// close ends all waits of requests. It may be called again.
func (f *fakeKube) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.closed:
	default:
		close(f.closed)
	}
}

// begin notes that a request has begun, unless the server is closed.
func (f *fakeKube) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.closed:
		panic(http.ErrAbortHandler)
	default:
		f.running.Add(1)
	}
}

func (f *fakeKube) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.begin()
	defer f.running.Done()
	seen := fakeRequest{Request: r.Clone(context.Background()), at: time.Now()}
	seen.body, _ = io.ReadAll(r.Body)
	seen.fault = f.faultOf(seen)
	select {
	case f.arrived <- seen:
	default:
	}
	w.Header().Set("Content-Type", "application/json")
	f.carryOut(&countedAnswer{ResponseWriter: w, server: f, request: seen}, r)
}

// carryOut answers the request, or does what its fault says.
func (f *fakeKube) carryOut(w *countedAnswer, r *http.Request) {
	defer w.count()
	fault := w.request.fault
	f.pause(fault.before)
	answer := fault.answer
	if !fault.skip {
		answer = f.answer(w.request, r.Context())
	}
	f.pause(fault.after)
	if fault.answer != nil {
		answer = fault.answer
	}
	answer(w, r)
}

// answer returns the next answer of the script, or that of the objects.
func (f *fakeKube) answer(r fakeRequest, ctx context.Context) http.HandlerFunc {
	f.mu.Lock()
	defer f.mu.Unlock()
	kind, name := r.target()
	for _, key := range []string{r.verb() + " " + kind, r.verb()} {
		if answers := f.scripts[key]; len(answers) > 0 {
			f.scripts[key] = answers[min(1, len(answers)-1):]
			return answers[0]
		}
	}
	switch verb := r.verb(); {
	case verb == "PATCH" && kind == "configmaps":
		return f.merge(r, kind, name)
	case verb == "POST":
		return f.create(r)
	case verb == "WATCH":
		return f.watch(kind, r)
	case verb == "GET":
		return f.get(kind, name)
	}
	items := []string{}
	for _, name := range slices.Sorted(maps.Keys(f.objects[kind])) {
		if r.selects(name) && r.selectsLabels(kind, f.objects[kind][name]) {
			items = append(items, f.objects[kind][name])
		}
	}
	kinds := map[string]string{"configmaps": "ConfigMap", "statefulsets": "StatefulSet", "endpointslices": "EndpointSlice", "pods": "Pod"}
	return listAnswer(kinds[kind], strconv.Itoa(len(f.history)), items...)
}

// watch sends the changes since the request's resourceVersion until the client is gone,
// or until it is ended.
func (f *fakeKube) watch(kind string, asked fakeRequest) http.HandlerFunc {
	sent, err := strconv.Atoi(asked.FormValue("resourceVersion"))
	if err != nil || sent > len(f.history) {
		sent = len(f.history)
	}
	if f.watches[kind] == nil {
		f.watches[kind] = make(chan struct{})
	}
	ended, fault := f.watches[kind], asked.fault
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), cmp.Or(fault.life, 24*time.Hour))
		defer cancel()
		w.(http.Flusher).Flush()
		for ctx.Err() == nil {
			f.mu.Lock()
			news, changed := f.history[sent:], f.changed
			f.mu.Unlock()
			sent += len(news)
			for _, change := range news {
				if change.kind == kind && asked.selects(change.name) && sleep(ctx, fault.lag) == nil {
					io.WriteString(w, change.event)
				}
			}
			w.(http.Flusher).Flush()
			select {
			case <-changed:
			case <-ctx.Done():
			case <-ended:
				return
			}
		}
	}
}

// endWatches ends the WATCHes of a kind, cleanly.
func (f *fakeKube) endWatches(kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watches[kind] != nil {
		close(f.watches[kind])
		delete(f.watches, kind)
	}
}

// get answers with one object.
func (f *fakeKube) get(kind, name string) http.HandlerFunc {
	if object, ok := f.objects[kind][name]; ok {
		return respond(200, object)
	}
	return notFound(kind, name)
}

// selectsLabels reports whether the request's labelSelector, of equalities, selects the
// object. Only pods have labels here.
func (r fakeRequest) selectsLabels(kind, object string) bool {
	var o struct {
		Metadata struct{ Labels map[string]string }
	}
	json.Unmarshal([]byte(object), &o) // the server has made it
	for want := range strings.SplitSeq(r.FormValue("labelSelector"), ",") {
		key, value, found := strings.Cut(want, "=")
		if found && kind == "pods" && o.Metadata.Labels[key] != value {
			return false
		}
	}
	return true
}

// merge changes an object by a JSON merge patch (RFC 7396). What the patch has of
// metadata.resourceVersion and metadata.uid has to be that of the object: a real server
// checks them in this order, and answers 409 and 422 ("field is immutable"). A patch that
// changes nothing makes no new version.
func (f *fakeKube) merge(r fakeRequest, kind, name string) http.HandlerFunc {
	var patch, before, after map[string]any
	object, found := f.objects[kind][name]
	switch err := json.Unmarshal(r.body, &patch); {
	case r.Header.Get("Content-Type") != "application/merge-patch+json":
		return statusAnswer(415, "UnsupportedMediaType", "not a merge patch")
	case err != nil:
		return statusAnswer(400, "BadRequest", err.Error())
	case !found:
		return notFound(kind, name)
	}
	for _, into := range []*map[string]any{&before, &after} {
		json.Unmarshal([]byte(object), into) // the server has made it
	}
	mergePatch(after, patch)
	old, meta := before["metadata"].(map[string]any), after["metadata"].(map[string]any)
	data, _ := after["data"].(map[string]any)
	for key, value := range data {
		if _, ok := value.(string); !ok {
			return statusAnswer(400, "BadRequest", fmt.Sprintf("data.%s is no string", key))
		}
	}
	if len(data) == 0 {
		delete(after, "data")
	}
	switch {
	case meta["resourceVersion"] != old["resourceVersion"]:
		return statusAnswer(409, "Conflict", "the object has been modified; please apply "+
			"your changes to the latest version and try again")
	case meta["uid"] != old["uid"]:
		return statusAnswer(422, "Invalid", "metadata.uid: Invalid value: field is immutable")
	case !reflect.DeepEqual(before, after):
		meta["resourceVersion"] = f.nextVersion()
		b, _ := json.Marshal(after) // it was JSON
		object = string(b)
		f.putJSON(kind, "MODIFIED", name, object)
	}
	return respond(200, object)
}

// mergePatch applies the patch to the object.
func mergePatch(object, patch map[string]any) {
	for key, value := range patch {
		inner, isObject := value.(map[string]any)
		switch target, found := object[key].(map[string]any); {
		case value == nil:
			delete(object, key)
		case isObject && found:
			mergePatch(target, inner)
		case isObject:
			target = map[string]any{}
			mergePatch(target, inner)
			object[key] = target
		default:
			object[key] = value
		}
	}
}

// create takes an Event, unless there is one of its name.
func (f *fakeKube) create(r fakeRequest) http.HandlerFunc {
	var e kubeEvent
	switch err := json.Unmarshal(r.body, &e); {
	case err != nil || r.URL.Path != "/api/v1/namespaces/edge/events":
		return statusAnswer(400, "BadRequest", "what?")
	case f.events[e.Metadata.Name] != "":
		return statusAnswer(409, "AlreadyExists", "there is one")
	}
	f.events[e.Metadata.Name] = string(r.body)
	return respond(201, "{}")
}

// put makes o an object of its kind, or deletes the one of its name. The caller holds mu.
func (f *fakeKube) put(kind, event string, o fakeObject) {
	f.putJSON(kind, event, o.name, o.json())
}

// putJSON is put of an object that is JSON already. The caller holds mu.
func (f *fakeKube) putJSON(kind, event, name, object string) {
	if f.objects[kind] == nil {
		f.objects[kind] = map[string]string{}
	}
	if f.objects[kind][name] = object; event == "DELETED" {
		delete(f.objects[kind], name)
	}
	f.history = append(f.history, watchedChange{kind, name, watchEvent(event, object)})
	close(f.changed)
	f.changed = make(chan struct{})
}

// nextVersion is the resourceVersion of the next change. The caller holds mu.
func (f *fakeKube) nextVersion() string { return strconv.Itoa(len(f.history) + 1) }

// applyMap makes the ConfigMap edge/name with this data, unless it is there, as kubectl
// apply of a manifest without data does.
func (f *fakeKube) applyMap(name string, data map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, found := f.objects["configmaps"][name]; !found {
		f.writeMap(name, "u-"+name+"-"+f.nextVersion(), f.nextVersion(), data)
	}
}

// replaceMap gives the ConfigMap edge/name exactly this data, as kubectl replace does: its
// UID stays.
func (f *fakeKube) replaceMap(name string, data map[string]string) {
	f.restoreMap(name, "", data)
}

// restoreMap is replaceMap with this resourceVersion, as a backup of etcd has it; "" for
// the next one.
func (f *fakeKube) restoreMap(name, version string, data map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var o fakeConfigMap
	json.Unmarshal([]byte(f.objects["configmaps"][name]), &o) // the server has made it
	f.writeMap(name, o.Metadata.UID, cmp.Or(version, f.nextVersion()), data)
}

// writeMap makes a version of the ConfigMap edge/name. The caller holds mu.
func (f *fakeKube) writeMap(name, uid, version string, data map[string]string) {
	o := fakeObject{name: name, uid: uid, version: version, rest: `"data":null`}
	if len(data) > 0 {
		entries, _ := json.Marshal(data) // strings
		o.rest = `"data":` + string(entries)
	}
	f.put("configmaps", "MODIFIED", o)
}

// deleteObject deletes an object, if it is there.
func (f *fakeKube) deleteObject(kind, name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if object, found := f.objects[kind][name]; found {
		f.putJSON(kind, "DELETED", name, object)
	}
}

// readMap returns the data of the ConfigMap edge/name, its UID and its resourceVersion.
func (f *fakeKube) readMap(name string) (data map[string]string, uid, version string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var o fakeConfigMap
	json.Unmarshal([]byte(cmp.Or(f.objects["configmaps"][name], "{}")), &o)
	return o.Data, o.Metadata.UID, o.Metadata.ResourceVersion
}

// changesOf returns how often the object was changed.
func (f *fakeKube) changesOf(kind, name string) (count int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, change := range f.history {
		if change.kind == kind && change.name == name {
			count++
		}
	}
	return count
}

// fakePod is a pod of a router.
type fakePod struct {
	name, uid string
	unplaced  bool   // no node was chosen for it
	phase     string // "Running" if ""
	ended     bool   // its container has terminated
	ip        string // "" if it has none yet
	deleting  bool
}

// setPod makes or changes the pod.
func (f *fakeKube) setPod(p fakePod) {
	state, node := `{"running":{}}`, "node-0"
	if p.ended {
		state = `{"terminated":{"exitCode":0}}`
	}
	if p.unplaced {
		state, node = `{"waiting":{}}`, ""
	}
	meta := `,"labels":{"app.kubernetes.io/name":"router","router-handoff":"all"}`
	if p.deleting {
		meta += `,"deletionTimestamp":"2026-11-28T20:00:00Z"`
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put("pods", "MODIFIED", fakeObject{kind: "Pod", name: p.name, uid: p.uid, version: f.nextVersion(), meta: meta,
		rest: fmt.Sprintf(`"spec":{"nodeName":%q},"status":{"phase":%q,"podIP":%q,"containerStatuses":[{"name":"router","state":%s}]}`,
			node, cmp.Or(p.phase, "Running"), p.ip, state)})
}

// kubeFault is what happens to a request. The zero fault is none.
type kubeFault struct {
	before time.Duration    // until it is carried out, also if its client has left meanwhile
	after  time.Duration    // from then until it is answered
	skip   bool             // it is not carried out; needs answer
	answer http.HandlerFunc // in place of the server's
	lag    time.Duration    // of each event of a WATCH
	life   time.Duration    // until a WATCH ends; 0: as long as the server likes
}

// cutOff cuts the connection, without an answer.
func cutOff(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// setFaults has faults decide what happens to each request; nil: nothing. The server calls
// it with mu held.
func (f *fakeKube) setFaults(faults func(fakeRequest) kubeFault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = faults
}

func (f *fakeKube) faultOf(r fakeRequest) kubeFault {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.faults == nil {
		return kubeFault{}
	}
	return f.faults(r)
}

// randomFaults has so many of 100 requests go wrong: they are slow, or late, refused, or
// lost before or after they were carried out; WATCHes lag, stand still, or end. unit is
// how long what is slow takes, about; what is late takes ten times that.
func randomFaults(rng *mathrand.Rand, percent int, unit time.Duration) func(fakeRequest) kubeFault {
	upTo := func(units float64) time.Duration { return time.Duration(rng.Float64() * units * float64(unit)) }
	return func(r fakeRequest) kubeFault {
		if rng.IntN(100) >= percent {
			return kubeFault{before: upTo(.005), after: upTo(.005)}
		}
		if r.verb() == "WATCH" {
			return []kubeFault{
				{lag: upTo(2)},
				{life: upTo(10)},
				{lag: time.Hour, life: upTo(20)},
			}[rng.IntN(3)]
		}
		return []kubeFault{
			{before: upTo(3)},
			{after: upTo(3)},
			{before: upTo(30)},
			{skip: true, answer: cutOff},
			{answer: cutOff},
			{before: upTo(1), answer: cutOff},
			{answer: statusAnswer(500, "InternalError", "etcdserver: request timed out")},
			{skip: true, answer: statusAnswer(500, "InternalError", "no leader")},
			{skip: true, answer: statusAnswer(409, "Conflict", "the object has been modified")},
			{skip: true, answer: statusAnswer(403, "Forbidden", "not yet")},
		}[rng.IntN(10)]
	}
}

// pause waits, unless the server is closed.
func (f *fakeKube) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-f.closed:
	}
}

// countedAnswer counts an answer of the server.
type countedAnswer struct {
	http.ResponseWriter
	server  *fakeKube
	request fakeRequest
	status  int // 0: none was sent
}

func (a *countedAnswer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

func (a *countedAnswer) Write(b []byte) (int, error) {
	a.status = cmp.Or(a.status, http.StatusOK)
	if a.request.verb() == "WATCH" {
		kind, _ := a.request.target()
		a.server.mu.Lock()
		a.server.watched[kind] += len(b)
		a.server.mu.Unlock()
	}
	return a.ResponseWriter.Write(b)
}

func (a *countedAnswer) Flush() { a.ResponseWriter.(http.Flusher).Flush() }

// count counts the answer at its end.
func (a *countedAnswer) count() {
	kind, _ := a.request.target()
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	a.server.counts[fmt.Sprintf("%s %s %d", a.request.verb(), kind, a.status)]++
}

// counted returns how many answers of these verbs, kinds and statuses there were:
// "PATCH configmaps 200".
func (f *fakeKube) counted(what ...string) (count int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, key := range what {
		count += f.counts[key]
	}
	return count
}

// watchedBytes returns how many bytes of events WATCHes of the kind have got.
func (f *fakeKube) watchedBytes(kind string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.watched[kind]
}

// kubeLink is one router's way to the API server, which a test may stop.
type kubeLink struct {
	server *fakeKube
	url    string

	// Guarded by mu.
	mu      sync.Mutex
	frozen  bool            // what is sent arrives when the link goes on: neither end finds out
	up      context.Context // ends when the link is cut
	cutUp   func()
	changed chan struct{} // closed at each change
}

// link returns a link to the server, on a socket of its own, until the test ends.
func (f *fakeKube) link(t *testing.T) *kubeLink {
	t.Helper()
	listener, host, port := listenHostPort(t)
	l := f.linkOn(t, listener)
	l.url = "http://" + net.JoinHostPort(host, port)
	return l
}

// linkOn is link on a listener, such as a pipeNetwork.
func (f *fakeKube) linkOn(t *testing.T, listener net.Listener) *kubeLink {
	l := &kubeLink{server: f, changed: make(chan struct{})}
	l.heal()
	f.serveBy(t, l, listener)
	return l
}

// freeze has nothing go over the link, until heal. What was sent arrives then, also if its
// sender has given up.
func (l *kubeLink) freeze() { l.change(func() { l.frozen = true }) }

// cut ends all connections, and each new one, until heal.
func (l *kubeLink) cut() { l.change(func() { l.frozen = false; l.cutUp() }) }

// heal ends freeze and cut.
func (l *kubeLink) heal() {
	l.change(func() {
		if l.frozen = false; l.up == nil || l.up.Err() != nil {
			l.up, l.cutUp = context.WithCancel(context.Background())
		}
	})
}

func (l *kubeLink) change(by func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	by()
	close(l.changed)
	l.changed = make(chan struct{})
}

// pass waits while the link is frozen. It cuts the connection if up has ended.
func (l *kubeLink) pass(up context.Context) {
	for {
		l.mu.Lock()
		frozen, changed := l.frozen, l.changed
		l.mu.Unlock()
		if up.Err() != nil {
			panic(http.ErrAbortHandler)
		}
		if !frozen {
			return
		}
		select {
		case <-changed:
		case <-l.server.closed:
			return
		}
	}
}

func (l *kubeLink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.server.begin()
	defer l.server.running.Done()
	l.mu.Lock()
	up := l.up
	l.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(up, cancel)()
	l.pass(up)
	l.server.ServeHTTP(&linkWriter{w, l, up}, r.WithContext(ctx))
	l.pass(up)
}

// linkWriter is an answer over a link.
type linkWriter struct {
	http.ResponseWriter
	link *kubeLink
	up   context.Context
}

func (w *linkWriter) Write(b []byte) (int, error) {
	w.link.pass(w.up)
	return w.ResponseWriter.Write(b)
}

func (w *linkWriter) Flush() {
	w.link.pass(w.up)
	w.ResponseWriter.(http.Flusher).Flush()
}

// fakeStatefulSet is the StatefulSet edge/backend.
type fakeStatefulSet struct {
	replicas, start, ready int
	generation             int
	uid                    string // "u-backend" if it is not set
	cordon                 string // the annotation, "" for none
}

// setStatefulSet changes the StatefulSet.
func (f *fakeKube) setStatefulSet(change func(*fakeStatefulSet)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.set)
	f.putStatefulSet()
}

// putStatefulSet makes set the StatefulSet's next version. The caller holds mu.
func (f *fakeKube) putStatefulSet() {
	f.put("statefulsets", "MODIFIED", f.statefulSet(fmt.Sprintf(`"spec":{"replicas":%d,"ordinals":{"start":%d}},"status":{"readyReplicas":%d}`,
		f.set.replicas, f.set.start, f.set.ready)))
}

// statefulSet returns the StatefulSet's next version. The caller holds mu.
func (f *fakeKube) statefulSet(rest string) fakeObject {
	annotations := ""
	if f.set.cordon != "" {
		annotations = fmt.Sprintf(`,"annotations":{"a":"b","router-cordon":%q}`, f.set.cordon)
	}
	return fakeObject{kind: "StatefulSet", name: "backend", uid: cmp.Or(f.set.uid, "u-backend"), version: f.nextVersion(),
		meta: fmt.Sprintf(`,"generation":%d%s`, f.set.generation, annotations), rest: rest}
}

// scale changes the spec of the StatefulSet.
func (f *fakeKube) scale(replicas int) {
	f.setStatefulSet(func(s *fakeStatefulSet) { s.replicas = replicas; s.generation++ })
}

// annotate changes the annotation router-cordon of the StatefulSet; "" removes it.
func (f *fakeKube) annotate(cordon string) {
	f.setStatefulSet(func(s *fakeStatefulSet) { s.cordon = cordon })
}

// deleteStatefulSet deletes the StatefulSet.
func (f *fakeKube) deleteStatefulSet() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put("statefulsets", "DELETED", f.statefulSet(`"spec":{}`))
}

// setMap makes the ConfigMap edge/name another version.
func (f *fakeKube) setMap(name, version string, data map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	entries, _ := json.Marshal(data)
	f.put("configmaps", "MODIFIED", fakeObject{kind: "ConfigMap", name: name, uid: "u-" + name, version: version, rest: `"data":` + string(entries)})
}

// setEndpoints makes these the endpoints of the one EndpointSlice.
func (f *fakeKube) setEndpoints(endpoints string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put("endpointslices", "MODIFIED", fakeObject{kind: "EndpointSlice", name: "one", uid: "u-one", version: strconv.Itoa(len(f.history) + 1),
		rest: `"addressType":"IPv4","endpoints":` + endpoints})
}

// setReady makes exactly these backends ready.
func (f *fakeKube) setReady(ordinals ...int) {
	f.setEndpoints(readyEndpoints(ordinals...))
	f.setStatefulSet(func(s *fakeStatefulSet) { s.ready = len(ordinals) })
}

// readyEndpoints are the endpoints of pods that are ready, at 10.0.0.<ordinal>.
func readyEndpoints(ordinals ...int) string {
	all := []string{}
	for _, i := range ordinals {
		all = append(all, fmt.Sprintf(`{"addresses":["10.0.0.%d"],"hostname":"backend-%d","conditions":{"ready":true}}`, i, i))
	}
	return "[" + strings.Join(all, ",") + "]"
}

// forbid answers requests of this verb and kind with 403.
func (f *fakeKube) forbid(verb, kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.scripts[verb+" "+kind] = script{statusAnswer(403, "Forbidden", "cannot "+strings.ToLower(verb)+" resource "+kind)}
}

// allow takes forbid back.
func (f *fakeKube) allow(verb, kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.scripts, verb+" "+kind)
}

// verbs returns what was requested since the last call, such as "LIST WATCH LIST".
func (f *fakeKube) verbs() string {
	var verbs []string
	for len(f.arrived) > 0 {
		verbs = append(verbs, (<-f.arrived).verb())
	}
	return strings.Join(verbs, " ")
}

// request returns the next request.
func (f *fakeKube) request(t *testing.T) fakeRequest {
	t.Helper()
	select {
	case r := <-f.arrived:
		return r
	case <-time.After(kubePatience()):
		t.Fatal("no request came")
		panic("unreachable")
	}
}

// kubePatience is how long a test waits for what must come. In synctest, where the year
// is 2000, waiting costs nothing.
func kubePatience() time.Duration {
	if time.Now().Year() == 2000 {
		return 4 * time.Minute
	}
	return 15 * time.Second
}

// fakeObject is an API object. Its zero fields are those of a ConfigMap in edge.
type fakeObject struct {
	kind, namespace, name string
	uid, version          string
	meta                  string // more of its metadata, such as `,"generation":1`
	rest                  string // what it has beside its metadata, such as `"data":{}`
}

func (o fakeObject) json() string {
	return fmt.Sprintf(`{"kind":%q,"apiVersion":"v1","metadata":{"name":%q,"namespace":%q,"uid":%q,"resourceVersion":%q,"managedFields":[{"manager":"kubectl"}]%s},%s}`,
		cmp.Or(o.kind, "ConfigMap"), o.name, cmp.Or(o.namespace, "edge"), o.uid, o.version, o.meta, o.rest)
}

// handoffName is the name of the ConfigMap that routers share.
const handoffName = "router-handoff-backend"

// routesMap is the ConfigMap edge/routes with ns-01 on the backend.
func routesMap(uid, version, backend string) string {
	return fakeObject{name: "routes", uid: uid, version: version, rest: fmt.Sprintf(`"data":{"ns-01":%q}`, backend)}.json()
}

// routesV is version n of edge/routes.
func routesV(n int) string { return routesMap("u1", strconv.Itoa(n), "backend-"+strconv.Itoa(n)) }

// What a watcher applies of these versions.
const (
	applied1 = "1 map[ns-01:backend-1]"
	applied2 = "2 map[ns-01:backend-2]"
	applied3 = "3 map[ns-01:backend-3]"
)

// listsTo answers with version 1 of edge/routes, then with each up to n.
func listsTo(n int) (lists script) {
	for i := 1; i <= n; i++ {
		lists = append(lists, listAnswer("ConfigMap", strconv.Itoa(100+i), routesV(i)))
	}
	return lists
}

// listAnswer answers a LIST, whose resourceVersion is not that of an item. The items of
// a real one have no kind.
func listAnswer(kind, version string, items ...string) http.HandlerFunc {
	itemKind := fmt.Sprintf(`"kind":%q,"apiVersion":"v1",`, kind)
	return respond(200, fmt.Sprintf(`{"kind":"%sList","apiVersion":"v1","metadata":{"resourceVersion":%q},"items":[%s]}`,
		kind, version, strings.ReplaceAll(strings.Join(items, ","), itemKind, "")))
}

// mapList answers a LIST of ConfigMaps.
func mapList(version string, items ...string) http.HandlerFunc {
	return listAnswer("ConfigMap", version, items...)
}

// listOf answers with objects of the kind in the Kubernetes namespace "default", by name,
// each with what it has beside its metadata.
func listOf(kind string, objects map[string]string) http.HandlerFunc {
	items := []string{}
	for name, rest := range objects {
		items = append(items, fakeObject{kind: kind, namespace: "default", name: name, uid: "u", version: "5", rest: rest}.json())
	}
	return listAnswer(kind, "7", items...)
}

// oneMap answers with the one override of ns-01 that a router without flags looks for.
func oneMap() http.HandlerFunc {
	return listOf("ConfigMap", map[string]string{"overwriting": `"data":{"ns-01":"backend-0"}`})
}

// forbidden answers that the client may not list ConfigMaps, and is to wait a minute.
func forbidden() http.HandlerFunc {
	return respond(403, `{"kind":"Status","message":"configmaps is forbidden","reason":"Forbidden","code":403,"details":{"retryAfterSeconds":60}}`)
}

// statusAnswer answers with a Status.
func statusAnswer(code int, reason, message string) http.HandlerFunc {
	return respond(code, fmt.Sprintf(`{"kind":"Status","message":%q,"reason":%q,"code":%d}`, message, reason, code))
}

// notFound answers that there is no object of this kind, in plural, and name.
func notFound(kind, name string) http.HandlerFunc {
	return respond(404, fmt.Sprintf(`{"kind":"Status","message":%q,"reason":"NotFound","code":404,"details":{"name":%q,"kind":%q}}`,
		fmt.Sprintf("%s %q not found", kind, name), name, kind))
}

// respond answers with a body and headers given as name, value, name...
func respond(code int, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, body)
	}
}

// hang sends nothing, not even a head.
func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// watchEvent is an event as a WATCH sends it.
func watchEvent(kind, object string) string {
	return `{"type":"` + kind + `","object":` + object + "}\n"
}

// stream sends each part with a write of its own and ends cleanly.
func stream(parts ...string) http.HandlerFunc { return streamFor(0, false, parts...) }

// cutStream is a stream whose connection is cut after its parts.
func cutStream(parts ...string) http.HandlerFunc { return streamFor(0, true, parts...) }

// openStream stays open after its parts, for the timeoutSeconds of the request.
func openStream(parts ...string) http.HandlerFunc { return streamFor(-1, false, parts...) }

// streamFor sends the parts, waits for d, or for timeoutSeconds if d is negative, and
// ends, by a cut or cleanly.
func streamFor(d time.Duration, cut bool, parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for _, part := range append([]string{""}, parts...) {
			io.WriteString(w, part)
			w.(http.Flusher).Flush()
		}
		life := d
		if d < 0 {
			life, _ = time.ParseDuration(r.URL.Query().Get("timeoutSeconds") + "s")
			life = cmp.Or(life, time.Hour) // of a LIST
		}
		select {
		case <-time.After(life):
		case <-r.Context().Done():
		}
		if cut {
			panic(http.ErrAbortHandler)
		}
	}
}

// watchTest is a watcher of edge/routes that runs, its API server and their network.
type watchTest struct {
	*watcher[fakeConfigMap]
	server  *fakeKube
	network *pipeNetwork
	applied chan string // "<resourceVersion> <data>" each time, of several in order; "none"
	logged  *textLog
	stop    func() // ends run and waits for it
}

// fakeConfigMap is a ConfigMap as it comes.
type fakeConfigMap struct {
	apiObject
	Data map[string]string `json:"data"`
}

// routesWatcher follows edge/routes, or what the selector chooses in edge.
func routesWatcher(k *kubeClient, selector string, log *slog.Logger, apply func(map[string]*fakeConfigMap)) *watcher[fakeConfigMap] {
	w := &watcher[fakeConfigMap]{kube: k, path: "/api/v1/namespaces/edge/configmaps", kind: "ConfigMap", kubeNamespace: "edge",
		selector: selector, meta: func(m *fakeConfigMap) *apiObject { return &m.apiObject }, apply: apply, relistWanted: newWakeup(), log: log}
	if selector == "" {
		w.name = "routes"
	}
	return w
}

// startWatch runs a watcher of a server that answers by these scripts, over HTTP/1.1, in
// a synctest bubble.
func startWatch(t *testing.T, lists, watches script) *watchTest {
	return startWatchOver(t, "HTTP/1.1", newPipeNetwork(), lists, watches)
}

// startWatchOver is startWatch over "HTTP/1.1" or "HTTP/2.0".
func startWatchOver(t *testing.T, proto string, network *pipeNetwork, lists, watches script) *watchTest {
	k, server := network.kube(t), scriptedKube(lists, watches)
	if proto == "HTTP/1.1" {
		server.serve(t, network)
	} else {
		ca, certificate := makeCA(t)
		k = podClient(t, "127.0.0.1", "6443", ca)
		k.dial = network.dial
		server.serve(t, network, certificate)
	}
	c := watchWith(t, k, "")
	c.server, c.network = server, network
	return c
}

// watchWith runs a watcher with this client, of edge/routes or of what the selector
// chooses.
func watchWith(t *testing.T, k *kubeClient, selector string) *watchTest {
	c := &watchTest{applied: make(chan string, 1000), logged: &textLog{}}
	c.watcher = routesWatcher(k, selector, slog.New(slog.NewTextHandler(c.logged, nil)), func(set map[string]*fakeConfigMap) {
		all := []string{}
		for _, name := range slices.Sorted(maps.Keys(set)) {
			all = append(all, fmt.Sprint(set[name].Metadata.ResourceVersion, " ", set[name].Data))
		}
		c.applied <- cmp.Or(strings.Join(all, ", "), "none")
	})
	c.stop = inBackground(t, c.run)
	return c
}

// inBackground starts the functions. stop ends their context and waits for them; the end
// of the test does too.
func inBackground(t *testing.T, functions ...func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range functions {
		running.Go(func() { run(ctx) })
	}
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

// bubble runs a test in a synctest bubble, one goroutine at a time: under the race
// detector two goroutines of a bubble that take from expired timers at once crash the
// process (Go 1.26: both run the timer with the one race context of the bubble). The test
// must not be parallel, for the number of threads is the process's.
func bubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, test)
}

// inBubble is a subtest in a bubble.
func inBubble(t *testing.T, name string, test func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { bubble(t, test) })
}

// want checks what is applied next, in order.
func (c *watchTest) want(t *testing.T, contents ...string) {
	t.Helper()
	for _, want := range contents {
		select {
		case got := <-c.applied:
			if got != want {
				t.Fatalf("applied %.200s, want %.200s", got, want)
			}
		case <-time.After(kubePatience()):
			t.Fatalf("nothing was applied, want %.200s; log:\n%s", want, c.logged)
		}
	}
}

// wantNothing checks that nothing more was applied.
func (c *watchTest) wantNothing(t *testing.T) {
	t.Helper()
	if len(c.applied) > 0 {
		t.Errorf("applied %.200s, want nothing", <-c.applied)
	}
}

// wantVerbs checks what was requested since the last call.
func (c *watchTest) wantVerbs(t *testing.T, want string) {
	t.Helper()
	wantEqual(t, "requests", c.server.verbs(), want)
}

// textLog holds a log.
type textLog struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *textLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *textLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *textLog) count(text string) int { return strings.Count(l.String(), text) }

// pipeNetwork is a network of pipes with one server: for synctest, where real sockets
// would hold time up.
type pipeNetwork struct {
	conns  chan net.Conn
	closed chan struct{}
	dials  atomic.Int32
	open   atomic.Int32
	down   atomic.Bool  // connections are refused
	hole   atomic.Bool  // and not even that
	frozen atomic.Int32 // connections up to this dial take bytes and bring none, as those to a stopped host do
}

func newPipeNetwork() *pipeNetwork {
	return &pipeNetwork{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (n *pipeNetwork) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *pipeNetwork) Close() error   { close(n.closed); return nil }
func (n *pipeNetwork) Addr() net.Addr { return &net.TCPAddr{} }

func (n *pipeNetwork) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	born := n.dials.Add(1)
	if n.down.Load() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	}
	if n.hole.Load() {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second): // as long as dialAPIServer
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	client, server := net.Pipe()
	select {
	case n.conns <- server:
		n.open.Add(1)
		return &pipeConn{Conn: client, net: n, born: born}, nil
	case <-n.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// freeze stops what goes over the connections that are open.
func (n *pipeNetwork) freeze() { n.frozen.Store(n.dials.Load()) }

// kube returns a client over HTTP/1.1.
func (n *pipeNetwork) kube(t *testing.T) *kubeClient {
	k := proxyClient(t, "http://127.0.0.1:8080")
	k.dial = n.dial
	return k
}

// pipeConn is the client's end of a connection.
type pipeConn struct {
	net.Conn
	net  *pipeNetwork
	born int32
	once sync.Once // for Close
}

func (c *pipeConn) Close() error {
	c.once.Do(func() { c.net.open.Add(-1) })
	return c.Conn.Close()
}

func (c *pipeConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || c.born > c.net.frozen.Load() {
			return n, err
		}
	}
}

func (c *pipeConn) Write(b []byte) (int, error) {
	if c.born <= c.net.frozen.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// makeCA makes a CA and a server certificate for the hosts, which are valid in
// synctest's year 2000 too.
func makeCA(t *testing.T, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	return makeCASince(t, 1990, hosts...)
}

// makeCASince is makeCA, not valid before the year.
func makeCASince(t *testing.T, year int, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: t.Name()},
		NotBefore: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true,
	}
	for _, host := range append(hosts, "127.0.0.1") {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// writeAccountFile writes a file of a service account as the kubelet does: it is there
// as a whole or not at all.
func writeAccountFile(t *testing.T, dir, name, content string) {
	t.Helper()
	next := filepath.Join(dir, "."+name)
	must(t, errors.Join(os.WriteFile(next, []byte(content), 0o600), os.Rename(next, filepath.Join(dir, name))))
}

// podClient returns a client as in a pod, with the token "first".
func podClient(t *testing.T, host, port string, ca []byte) *kubeClient {
	t.Helper()
	dir := t.TempDir()
	writeAccountFile(t, dir, "ca.crt", string(ca))
	writeAccountFile(t, dir, "token", " first\n")
	k, err := newInClusterClient(environment(map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}), dir)
	must(t, err)
	return k
}

// proxyClient returns a client of a kubectl proxy.
func proxyClient(t *testing.T, base string) *kubeClient {
	t.Helper()
	k, err := newKubectlProxyClient(base)
	must(t, err)
	return k
}

// listenHostPort returns a listener on a real socket and its host and port.
func listenHostPort(t *testing.T) (l net.Listener, host, port string) {
	t.Helper()
	l = listenLocal(t)
	host, port, _ = net.SplitHostPort(l.Addr().String())
	return l, host, port
}

// ask sends a request over HTTP and returns its status and body; 0 if there was no answer.
func ask(t *testing.T, method, url, body string) (status int, answer string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	must(t, err)
	r.Header.Set("Content-Type", "application/merge-patch+json")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(b)
}

// The fake API server patches a ConfigMap as the real one does.
func TestFakeKubePatches(t *testing.T) {
	tests := map[string]struct {
		name, patch string
		status      int
		data        map[string]string // after it
	}{
		"a key":             {"one", `{"metadata":{"uid":"u-one-1"},"data":{"b":"2"}}`, 200, map[string]string{"a": "1", "b": "2"}},
		"a key goes":        {"one", `{"data":{"a":null,"c":null}}`, 200, nil},
		"its version":       {"one", `{"metadata":{"uid":"u-one-1","resourceVersion":"1"},"data":{"a":"2"}}`, 200, map[string]string{"a": "2"}},
		"another version":   {"one", `{"metadata":{"uid":"u-one-1","resourceVersion":"7"},"data":{"a":"2"}}`, 409, map[string]string{"a": "1"}},
		"another UID":       {"one", `{"metadata":{"uid":"u-two"},"data":{"a":"2"}}`, 422, map[string]string{"a": "1"}},
		"nothing new":       {"one", `{"metadata":{"uid":"u-one-1","resourceVersion":"1"},"data":{"a":"1","b":null}}`, 200, map[string]string{"a": "1"}},
		"an absent object":  {"two", `{"data":{"a":"2"}}`, 404, map[string]string{"a": "1"}},
		"a value, a number": {"one", `{"data":{"a":2}}`, 400, map[string]string{"a": "1"}},
		"no JSON":           {"one", `{`, 400, map[string]string{"a": "1"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFakeKube()
			f.applyMap("one", map[string]string{"a": "1"})
			status, answer := ask(t, "PATCH", f.url(t)+"/api/v1/namespaces/edge/configmaps/"+tt.name, tt.patch)
			data, uid, version := f.readMap("one")
			wantEqual(t, "status", status, tt.status)
			wantEqual(t, "data", fmt.Sprint(data), fmt.Sprint(tt.data))
			wantEqual(t, "UID", uid, "u-one-1")
			changed := !maps.Equal(data, map[string]string{"a": "1"})
			wantEqual(t, "resourceVersion", version, map[bool]string{false: "1", true: "2"}[changed])
			var o fakeConfigMap
			if json.Unmarshal([]byte(answer), &o); status == 200 {
				wantEqual(t, "answered resourceVersion", o.Metadata.ResourceVersion, version)
				wantEqual(t, "answered data", fmt.Sprint(o.Data), fmt.Sprint(data))
			}
			wantEqual(t, "answers", f.counted(fmt.Sprint("PATCH configmaps ", tt.status)), 1)
		})
	}
}

// What a test does to the object of the hand-off, and to pods.
func TestFakeKubeObjects(t *testing.T) {
	f := newFakeKube()
	url := f.url(t) + "/api/v1/namespaces/edge/"
	state := func() string {
		data, uid, version := f.readMap("one")
		return fmt.Sprint(uid, " ", version, " ", data)
	}
	old := map[string]string{"a": "1"}
	steps := []struct {
		what string
		do   func()
		want string
	}{
		{"apply", func() { f.applyMap("one", nil) }, "u-one-1 1 map[]"},
		{"replace", func() { f.replaceMap("one", old) }, "u-one-1 2 map[a:1]"},
		{"apply again", func() { f.applyMap("one", nil) }, "u-one-1 2 map[a:1]"},
		{"empty", func() { f.replaceMap("one", nil) }, "u-one-1 3 map[]"},
		{"restore", func() { f.restoreMap("one", "2", old) }, "u-one-1 2 map[a:1]"},
		{"delete", func() { f.deleteObject("configmaps", "one") }, "  map[]"},
		{"make anew", func() { f.applyMap("one", old) }, "u-one-6 6 map[a:1]"},
	}
	for _, s := range steps {
		s.do()
		wantEqual(t, s.what, state(), s.want)
	}
	wantEqual(t, "changes", f.changesOf("configmaps", "one"), 6)
	f.setPod(fakePod{name: "router-0", uid: "p0"})
	f.setPod(fakePod{name: "router-1", uid: "p1", phase: "Failed", ended: true})
	f.setPod(fakePod{name: "router-2", uid: "p2", unplaced: true, phase: "Pending"})
	_, list := ask(t, "GET", url+"pods?labelSelector=app.kubernetes.io%2Fname%3Drouter", "")
	wantEqual(t, "pods", strings.Count(list, `"uid":"p`), 3)
	_, list = ask(t, "GET", url+"pods?labelSelector=app.kubernetes.io%2Fname%3Dother", "")
	wantEqual(t, "other pods", strings.Count(list, `"uid":"p`), 0)
	status, pod := ask(t, "GET", url+"pods/router-1", "")
	if status != 200 || !strings.Contains(pod, `"phase":"Failed"`) || !strings.Contains(pod, `"terminated":{`) {
		t.Errorf("GET of a pod is %d %s", status, pod)
	}
	status, pod = ask(t, "GET", url+"pods/router-9", "")
	if status != 404 || !strings.Contains(pod, `"kind":"Status"`) {
		t.Errorf("GET of no pod is %d %s", status, pod)
	}
}

// A fault happens before or after the request is carried out, also when its client has left.
func TestFakeKubeFaults(t *testing.T) {
	tests := map[string]struct {
		fault   kubeFault
		status  int
		applied bool
	}{
		"none":       {kubeFault{}, 200, true},
		"lost":       {kubeFault{skip: true, answer: cutOff}, 0, false},
		"cut":        {kubeFault{answer: cutOff}, 0, true},
		"refused":    {kubeFault{skip: true, answer: statusAnswer(409, "Conflict", "no")}, 409, false},
		"unknown":    {kubeFault{answer: statusAnswer(500, "InternalError", "timed out")}, 500, true},
		"slow":       {kubeFault{before: time.Millisecond, after: time.Millisecond}, 200, true},
		"late":       {kubeFault{before: 100 * time.Millisecond, answer: cutOff}, 0, true},
		"also lost":  {kubeFault{before: time.Millisecond, skip: true, answer: cutOff}, 0, false},
		"too slowly": {kubeFault{after: time.Millisecond, answer: cutOff}, 0, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFakeKube()
			f.applyMap("one", nil)
			f.setFaults(func(r fakeRequest) kubeFault { return tt.fault })
			status, _ := ask(t, "PATCH", f.url(t)+"/api/v1/namespaces/edge/configmaps/one", `{"data":{"a":"1"}}`)
			data, _, _ := f.readMap("one")
			wantEqual(t, "status", status, tt.status)
			wantEqual(t, "applied", data["a"] == "1", tt.applied)
		})
	}
}

// A WATCH lags, or ends, as its fault says.
func TestFakeKubeWatchFaults(t *testing.T) {
	for name, tt := range map[string]struct {
		fault kubeFault
		want  string // what comes before the end
	}{
		"ends":  {kubeFault{life: 50 * time.Millisecond}, "12"},
		"lags":  {kubeFault{lag: 30 * time.Millisecond, life: 50 * time.Millisecond}, "1"},
		"stays": {kubeFault{lag: time.Hour, life: 50 * time.Millisecond}, ""},
	} {
		inBubble(t, name, func(t *testing.T) {
			f, network := newFakeKube(), newPipeNetwork()
			f.serve(t, network)
			f.setFaults(func(fakeRequest) kubeFault { return tt.fault })
			k := network.kube(t)
			body, err := k.do(t.Context(), "/api/v1/namespaces/edge/configmaps", url.Values{"watch": {"1"}}, nil)
			must(t, err)
			defer body.Close()
			for _, value := range []string{"1", "2"} {
				f.setMap("one", value, map[string]string{"a": value})
			}
			stream, err := io.ReadAll(body)
			must(t, err)
			got := ""
			for _, m := range regexp.MustCompile(`"a":"(.)"`).FindAllStringSubmatch(string(stream), -1) {
				got += m[1]
			}
			wantEqual(t, "events", got, tt.want)
		})
	}
}

// A link that is cut ends what is under way; one that is frozen brings it later, to whoever
// is still there.
func TestFakeKubeLink(t *testing.T) {
	f := newFakeKube()
	f.applyMap("one", nil)
	l := f.link(t)
	path := l.url + "/api/v1/namespaces/edge/configmaps"
	resp, err := http.Get(path + "?watch=1&fieldSelector=metadata.name%3Done")
	must(t, err)
	defer resp.Body.Close()
	events := bufio.NewScanner(resp.Body)
	f.replaceMap("one", map[string]string{"a": "1"})
	if !events.Scan() || !strings.Contains(events.Text(), `"a":"1"`) {
		t.Fatalf("the WATCH brought %q", events.Text())
	}
	wantEqual(t, "bytes of WATCHes", f.watchedBytes("configmaps"), len(events.Text())+1)

	l.freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	late, err := http.NewRequestWithContext(ctx, "PATCH", path+"/one", strings.NewReader(`{"data":{"a":"2"}}`))
	must(t, err)
	late.Header.Set("Content-Type", "application/merge-patch+json")
	if _, err = http.DefaultClient.Do(late); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a PATCH over a frozen link: %v", err)
	}
	data, _, _ := f.readMap("one")
	wantEqual(t, "data while it is frozen", fmt.Sprint(data), "map[a:1]")
	l.heal()
	if !events.Scan() || !strings.Contains(events.Text(), `"a":"2"`) {
		t.Fatalf("the WATCH brought %q", events.Text())
	}

	l.cut()
	if events.Scan() {
		t.Errorf("the WATCH brought %q over a link that is cut", events.Text())
	}
	if status, _ := ask(t, "GET", path, ""); status != 0 {
		t.Errorf("a LIST over a link that is cut got %d", status)
	}
	l.heal()
	if status, _ := ask(t, "GET", path, ""); status != 200 {
		t.Errorf("a LIST over a link that goes on got %d", status)
	}
}
