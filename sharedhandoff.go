package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// objectRequestTimeout bounds one write of the object.
	objectRequestTimeout = 5 * time.Second
	// When a change has waited for a member for blockedTime since the last version of the object,
	// the router asks for its pod, and then again after each blockedTime: see blocking.
	blockedTime = time.Second
	// relistTime is how long a change may wait without a new version of the object before
	// the object is listed again: an event may have been lost (kubernetes#123072).
	relistTime = 5 * time.Second
)

// sharedHandoff is a hand-off that all routers share (-handoff=all), as this router takes part in
// it. It reads their object, asks member what to do next, and sends what has to be sent. The
// mover's run owns it and closes it.
//
// Each version of the object comes from one watcher, so none comes after a newer one. A
// write changes nothing here: the watcher brings what it made. At most one write or list,
// and one request for pods, are under way at a time.
type sharedHandoff struct {
	// Static after construction.
	watcher  *watcher[handoffConfigMap]
	writer   *kubeClient // of the write under way; it keeps its connection
	client   kubeClient  // to copy: a client is for one goroutine
	podLabel string      // a label selector: the pods of all routers
	wake     func()      // wakes the mover's run; must not block
	// wantedRange returns the range of backends that the object should have; nil if it is
	// not known.
	wantedRange func() *versionedRange
	// onRangeStored is called with the range of backends that the object has, nil if it has
	// none. It must not block.
	onRangeStored func(b *versionedRange)
	log           *slog.Logger

	// Owned by the goroutine that calls decideAndStart: the mover's run.
	member          *member
	ctx             context.Context // of all requests
	leaving         bool            // the router admits nobody any more, and ends
	rangeReported   bool            // onRangeStored was called
	running         sync.WaitGroup  // requests
	failures        int             // writes and lists in a row that failed
	retryAt         time.Time       // when the next one may begin
	listedAt        time.Time       // when the object was listed again because nothing had come
	askedAt         time.Time       // when pods were asked for
	throttle        throttle        // of failures in the log
	otherTableSince time.Time       // when this router has seen that members have another table; zero if none has

	faultThrottle throttle // of what cannot be read in the log; owned by the watcher
	podThrottle   throttle // of failures of askPods in the log

	written, conflicts, failed atomic.Int64 // writes of the object, by result

	mu      sync.Mutex
	inbox   handoffInbox  // guarded by mu
	status  sharedStatus  // guarded by mu
	hasLeft chan struct{} // closed when this router is no member any more and is leaving
}

// handoffInbox is what has come from the API server.
type handoffInbox struct {
	known  bool            // the object was listed
	object *handoffObject  // nil if it does not exist
	seenAt time.Time       // when this version came
	list   *podList        // the last one; nil if there was none
	gone   map[string]bool // UIDs of pods that have ended for ever; immutable
	busy   bool            // a write or a list is under way
	asking bool            // a request for a pod is under way
	ended  bool            // a write or a list has ended since decideAndStart was called last
	err    error           // of that
}

// sharedStatus is what operators may ask.
type sharedStatus struct {
	whyNotServing   string   // why this router admits nobody, or not to all namespaces; or ""
	doing           string   // what it does or waits for; or ""
	members         []string // pods, sorted
	missing         []string // those of them that have not answered the step
	withOtherTable  []string // the others of them that have another table than this router, sorted
	otherTableSince time.Time
	err             error // of the last write or list; nil if it succeeded
	podErr          error // of the last request for a pod that a change waits for; nil if it succeeded
}

// handoffConfigMap is the object as the API server has it.
type handoffConfigMap struct {
	apiObject
	Data map[string]string `json:"data"`
}

// newSharedHandoff returns the shared hand-off for the pod with this name and UID, with the
// object of this name. podLabel is the label selector of all routers' pods. The caller runs the
// watcher, and sets wake, wantedRange and onRangeStored.
func newSharedHandoff(client kubeClient, kubeNamespace, object string, pod, uid, podLabel string,
	log *slog.Logger) *sharedHandoff {
	writer, reader := client, client
	writer.sendsPatches, writer.keepsConn = true, true
	h := &sharedHandoff{
		writer: &writer, client: client, podLabel: podLabel,
		wake: func() {}, wantedRange: func() *versionedRange { return nil },
		onRangeStored: func(*versionedRange) {}, log: log,
		member:  newMember(pod, uid, fmt.Sprintf("%016x", rand.Uint64())),
		inbox:   handoffInbox{gone: map[string]bool{}},
		hasLeft: make(chan struct{}),
	}
	h.watcher = &watcher[handoffConfigMap]{
		kube: &reader, kind: "ConfigMap",
		path:          "/api/v1/namespaces/" + kubeNamespace + "/configmaps",
		kubeNamespace: kubeNamespace, name: object, noPause: true, relistWanted: newWakeup(),
		meta:  func(m *handoffConfigMap) *apiObject { return &m.apiObject },
		apply: h.apply, log: log,
	}
	return h
}

// apply takes a new version of the object from the watcher.
func (h *sharedHandoff) apply(objects map[string]*handoffConfigMap) {
	in := objects[h.watcher.name]
	h.mu.Lock()
	h.inbox.known, h.inbox.object, h.inbox.seenAt = true, nil, time.Now()
	if in != nil {
		h.inbox.object = readHandoffObject(
			in.Metadata.UID, in.Metadata.ResourceVersion, in.Data)
	}
	o := h.inbox.object
	h.mu.Unlock()
	switch {
	case o == nil:
		h.log.Warn("object of the hand-off not found; changes of owners wait",
			"object", h.watcher.String())
	case len(o.faults) > 0:
		if omitted, ok := h.faultThrottle.allow(time.Minute); ok {
			h.log.Warn("object of the hand-off cannot be read",
				"object", h.watcher.String(), "error", errors.Join(o.faults...).Error(),
				"omitted", omitted)
		}
	}
	h.wake()
}

// decideAndStart says what to do next, and begins what has to be written or listed. p is how far
// this router has come, t its own table, nil if it has none yet, and backendStep the highest
// step that a backend has answered. The caller carries out actAdopt and actEndAll, and calls
// decideAndStart again. All else only says when to call it again, if nothing happens before.
func (h *sharedHandoff) decideAndStart(
	ctx context.Context, p stepProgress, t *table, backendStep int64, now time.Time,
) decision {
	h.ctx = ctx
	in := h.takeInbox(now)
	h.member.setNewest(t, now)
	h.member.noteBackendStep(backendStep)
	if in.object != nil {
		h.member.expireOffers(in.object, now)
	}
	h.reportNoRange(&in)
	d := h.member.decide(&decisionInput{
		stepProgress: p, now: now, object: in.object, seenAt: in.seenAt, list: in.list,
		leaving: h.leaving, wantedRange: h.wantedRange(),
		gone: func(uid string) bool { return in.gone[uid] },
	})
	h.publish(&in, d, now)
	switch d.action {
	case actAdopt:
		h.member.commit(d, now)
		h.rangeReported = true
		h.onRangeStored(d.view.plan.backendRange)
	case actWrite, actList:
		if in.busy { // its end wakes the mover's run
			return decision{doing: d.doing}
		}
		if now.Before(h.retryAt) {
			return decision{doing: d.doing, again: h.retryAt}
		}
		h.member.commit(d, now)
		h.startRequest(d)
	case actWait:
		d.again = earliest(d.again, h.askPods(&in, now))
		d.again = earliest(d.again, h.relistObject(&in, t, now))
	}
	return d
}

// lastObject returns the newest version of the object, nil if there is none. It takes
// sharedHandoff.mu.
func (h *sharedHandoff) lastObject() *handoffObject {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.inbox.object
}

// takeInbox returns what has come, and notes how the last write or list has ended.
func (h *sharedHandoff) takeInbox(now time.Time) handoffInbox {
	h.mu.Lock()
	defer h.mu.Unlock()
	in := h.inbox
	if !in.ended {
		return in
	}
	h.inbox.ended = false
	if in.err == nil {
		h.failures, h.retryAt = 0, time.Time{}
		return in
	}
	h.failures++
	h.retryAt = now.Add(retryDelay(h.failures, retryAfter(in.err), rand.Float64()))
	return in
}

// reportNoRange calls onRangeStored once when the object is known and has no plan: no
// range is stored.
func (h *sharedHandoff) reportNoRange(in *handoffInbox) {
	if !h.rangeReported && in.object != nil && in.object.plan == nil &&
		in.object.planVersionErr == nil {
		h.rangeReported = true
		h.onRangeStored(nil)
	}
}

// publish notes what operators may ask, and that this router has left.
func (h *sharedHandoff) publish(in *handoffInbox, d decision, now time.Time) {
	st := sharedStatus{doing: d.doing, whyNotServing: h.whyNotServing(in)}
	if in.object == nil {
		st.doing = st.whyNotServing
	}
	if v := h.member.view; v != nil {
		st.members = slices.Sorted(maps.Keys(v.plan.members))
		if !v.done && in.object != nil && in.object.plan != nil {
			st.missing = in.object.missing()
		}
	}
	blocking := h.blocking(in)
	for _, pod := range slices.Sorted(maps.Keys(blocking)) {
		if !slices.Contains(st.missing, pod) {
			st.withOtherTable = append(st.withOtherTable, pod)
		}
	}
	st.otherTableSince = h.noteOtherTable(len(st.withOtherTable) > 0, now)
	h.mu.Lock()
	defer h.mu.Unlock()
	st.err = h.status.err
	if len(blocking) > 0 {
		st.podErr = h.status.podErr
	}
	h.status = st
	hasLeft := h.leaving && !in.busy && (h.member.view == nil || h.member.view.servesNone)
	if hasLeft && !isClosed(h.hasLeft) {
		close(h.hasLeft)
	}
}

// noteOtherTable notes whether members have another table than this router, and returns since when:
// at most since this router has its newest one.
func (h *sharedHandoff) noteOtherTable(differs bool, now time.Time) time.Time {
	switch {
	case !differs:
		h.otherTableSince = time.Time{}
	case h.otherTableSince.IsZero():
		h.otherTableSince = now
	default:
		h.otherTableSince = latest(h.otherTableSince, h.member.newestAt)
	}
	return h.otherTableSince
}

// whyNotServing says why this router admits nobody, or not to all namespaces yet. It says
// what the member says, or what is wrong with the object if the member has no view for that.
func (h *sharedHandoff) whyNotServing(in *handoffInbox) string {
	why := h.member.whyNotServing()
	switch {
	case why == "" || h.member.view != nil:
		return why
	case !in.known:
		why = h.watcher.String() + " has not been read yet"
		if failure := h.watcher.snapshot().failure; failure != nil {
			why = h.watcher.String() + ": " + failure.Error()
		}
	case in.object == nil:
		why = h.watcher.String() + " does not exist: apply the router's manifests"
	case in.object.planVersionErr != nil:
		why = h.watcher.String() + " is of another version of the router: stop all routers, " +
			"and empty it"
	}
	return why
}

// snapshot returns what operators may ask.
func (h *sharedHandoff) snapshot() sharedStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.status
}

// whyNotReady says why the router should get no new clients yet, or "".
func (h *sharedHandoff) whyNotReady() string {
	st := h.snapshot()
	if st.whyNotServing == "" {
		return ""
	}
	text := "the hand-off: " + st.whyNotServing
	if st.doing != "" && st.doing != st.whyNotServing {
		text += "; " + st.doing
	}
	err := cmp.Or(st.err, st.podErr)
	if errorClass(err) == "forbidden" {
		text += fmt.Sprintf("; %v: the Role needs list, watch and patch of configmaps "+
			"with resourceNames [%s], and get and list of pods", err, h.watcher.name)
	} else if err != nil {
		text += "; " + err.Error()
	}
	return text
}

// startRequest begins to write or to list. It does not block.
func (h *sharedHandoff) startRequest(d decision) {
	h.mu.Lock()
	h.inbox.busy = true
	h.mu.Unlock()
	ctx := h.ctx
	h.running.Go(func() {
		var err error
		if d.action == actWrite {
			err = h.write(ctx, d.write)
		} else {
			err = h.listPods(ctx)
		}
		h.requestDone(ctx, d, err)
	})
}

// requestDone notes how a write or a list has ended. A conflict is no failure: somebody
// else was first, or the object was made anew, and the watcher brings what they did.
func (h *sharedHandoff) requestDone(ctx context.Context, d decision, err error) {
	switch {
	case ctx.Err() != nil:
		return
	case isConflict(err):
		h.conflicts.Add(1)
		err = nil
	case err != nil && d.action == actWrite:
		h.failed.Add(1)
	case d.action == actWrite:
		h.written.Add(1)
	}
	if err != nil {
		if omitted, ok := h.throttle.allow(10 * time.Second); ok {
			h.log.Warn("cannot write or list for the hand-off; will retry",
				"object", h.watcher.String(), "doing", d.doing,
				"class", errorClass(err), "error", err.Error(), "omitted", omitted)
		}
	}
	h.mu.Lock()
	h.inbox.busy, h.inbox.ended, h.inbox.err = false, true, err
	h.status.err = err
	h.mu.Unlock()
	h.wake()
}

// isConflict reports whether the API server has refused a write because the object has another
// resourceVersion (409), or another UID (422, which is also the answer for an immutable object, one
// that is too large, or by an admission policy).
func isConflict(err error) bool {
	return hasStatus(err, http.StatusConflict) ||
		hasStatus(err, http.StatusUnprocessableEntity) && strings.Contains(err.Error(), "metadata.uid")
}

// write writes the object.
func (h *sharedHandoff) write(ctx context.Context, w *handoffWrite) error {
	ctx, cancel := context.WithTimeout(ctx, objectRequestTimeout)
	defer cancel()
	path := h.watcher.path + "/" + h.watcher.name
	body, err := h.writer.do(ctx, path, url.Values{"fieldManager": {"router"}}, w.patch())
	if err != nil {
		return err
	}
	defer body.Close()
	// A connection is kept only if the body was read to its end.
	_, err = io.Copy(io.Discard, io.LimitReader(body, maxObject))
	return err
}

// listPods makes the watcher list the object again, and after that lists the pods of all
// routers. It puts the pods into the inbox.
func (h *sharedHandoff) listPods(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	select {
	case <-h.watcher.relist():
	case <-ctx.Done():
		return cmp.Or(h.watcher.snapshot().failure, ctx.Err())
	}
	o := h.lastObject()
	if o == nil {
		return nil // decideAndStart will say so
	}
	l := &podList{
		uid: o.uid, version: o.version, at: time.Now(), pods: map[string]routerPod{},
	}
	client := h.client
	pods, err := listPods(ctx, &client, h.watcher.kubeNamespace, h.podLabel)
	if err != nil {
		return err
	}
	for _, pod := range pods {
		l.pods[pod.Metadata.Name] = pod.routerPod()
	}
	h.mu.Lock()
	h.inbox.list = l
	h.mu.Unlock()
	return nil
}

// askPods asks the API server about the routers that a change has waited for during
// blockedTime: is the pod still there? It returns when to ask again. It does not block.
func (h *sharedHandoff) askPods(in *handoffInbox, now time.Time) time.Time {
	blocking := h.blocking(in)
	if len(blocking) == 0 || in.asking {
		return time.Time{}
	}
	if at := latest(in.seenAt, h.askedAt).Add(blockedTime); now.Before(at) {
		return at
	}
	h.askedAt = now
	h.mu.Lock()
	h.inbox.asking = true
	h.mu.Unlock()
	ctx := h.ctx
	h.running.Go(func() {
		gone, err := h.findGone(ctx, blocking)
		h.noteGone(gone, err)
	})
	return time.Time{}
}

// noteGone notes the UIDs of pods that have ended for ever, and an error of askPods.
func (h *sharedHandoff) noteGone(gone []string, err error) {
	h.mu.Lock()
	known := maps.Clone(h.inbox.gone) // decideAndStart may read the map
	for _, uid := range gone {
		known[uid] = true
	}
	h.inbox.gone, h.inbox.asking = known, false
	h.status.podErr = err
	h.mu.Unlock()
	if err != nil {
		if omitted, ok := h.podThrottle.allow(10 * time.Second); ok {
			h.log.Warn("cannot ask whether the pod of a router is there; a change of owners may wait",
				"class", errorClass(err), "error", err.Error(), "omitted", omitted)
		}
	}
	h.wake()
}

// blocking returns the members other than this router that a change waits for: they have
// not answered, or have another table than this router.
func (h *sharedHandoff) blocking(in *handoffInbox) map[string]memberID {
	v, o, t := h.member.view, in.object, h.member.newest
	if v == nil || o == nil || o.plan == nil || t == nil || v.servesNone {
		return nil
	}
	all := map[string]memberID{}
	for pod, id := range o.plan.members {
		late := !o.hasAnswered(pod) || o.answers[pod].ownersHash != t.ownersHash
		if pod != h.member.name && late {
			all[pod] = id
		}
	}
	return all
}

// findGone asks for each pod, and returns the UIDs of those members whose processes have
// ended for ever.
func (h *sharedHandoff) findGone(
	ctx context.Context, members map[string]memberID,
) (gone []string, err error) {
	client := h.client
	for pod, id := range members {
		found, askErr := getPod(ctx, &client, h.watcher.kubeNamespace, pod)
		switch {
		case askErr != nil:
			err = askErr
		case found == nil || id.isGone(found.routerPod()):
			gone = append(gone, id.UID)
		}
	}
	return gone, err
}

// relistObject lists the object again if a change waits and nothing has come for
// relistTime. It returns when to look again, zero if no change waits.
func (h *sharedHandoff) relistObject(in *handoffInbox, t *table, now time.Time) time.Time {
	v := h.member.view
	if v == nil || t == nil || v.hasOnlyTable(t.ownersHash) && v.done {
		return time.Time{}
	}
	if at := latest(in.seenAt, h.listedAt).Add(relistTime); now.Before(at) {
		return at
	}
	h.listedAt = now
	h.watcher.relist()
	return now.Add(relistTime)
}

// close waits for the requests under way, whose context has ended.
func (h *sharedHandoff) close() {
	h.running.Wait()
	h.writer.dropKept()
}

// writeMetrics writes the members and the writes.
func (h *sharedHandoff) writeMetrics(w metricsWriter) {
	st := h.snapshot()
	w.single("router_handoff_members", "gauge",
		"Routers that share the hand-off, as this one knows.", float64(len(st.members)))
	w.single("router_handoff_serving", "gauge",
		"1 if this router is a member that has all tables of the plan: it admits clients to all "+
			"namespaces that are not being handed over.",
		boolToFloat(st.whyNotServing == ""))
	sample := w.family("router_handoff_writes_total", "counter",
		"Writes of the object of the hand-off, by result.")
	sample(float64(h.written.Load()), "result", "ok")
	sample(float64(h.conflicts.Load()), "result", "conflict")
	sample(float64(h.failed.Load()), "result", "error")
}
