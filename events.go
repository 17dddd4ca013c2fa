package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"
)

const (
	eventQueue   = 64                     // Events that may wait to be written
	eventPause   = 500 * time.Millisecond // from one to the next
	eventTime    = 10 * time.Second       // bounds one request
	eventMessage = 1024                   // bytes, the API's own limit
)

// recorder writes Events about the objects that hold overrides, which `kubectl
// describe` shows. They are a convenience: at most eventQueue wait, each is
// tried twice, and nothing waits for them.
type recorder struct {
	// Static after construction.
	kube  *kube
	pod   string // name of this router
	queue chan event
	log   *slog.Logger

	// Owned by run.
	forbidden bool     // the last try was
	limit     throttle // of failures in the log

	full throttle // of Events that were dropped, in the log
}

// event is a core/v1 Event: kubectl describe asks for its involvedObject
// (https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/).
type event struct {
	reference                    // without name and version
	Metadata           reference `json:"metadata"`
	InvolvedObject     reference `json:"involvedObject"`
	Type               string    `json:"type"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	Count              int       `json:"count"`
	FirstTimestamp     time.Time `json:"firstTimestamp"`
	LastTimestamp      time.Time `json:"lastTimestamp"`
	ReportingComponent string    `json:"reportingComponent"`
	ReportingInstance  string    `json:"reportingInstance"`
}

// reference names an object of the API.
type reference struct {
	APIVersion      string `json:"apiVersion,omitempty"`
	Kind            string `json:"kind,omitempty"`
	Namespace       string `json:"namespace,omitempty"`
	Name            string `json:"name,omitempty"`
	UID             string `json:"uid,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

func newRecorder(k kube, pod string, log *slog.Logger) *recorder {
	return &recorder{kube: &k, pod: pod, queue: make(chan event, eventQueue), log: log}
}

// tell has Events written about what a version of an object did. It does not
// block.
func (r *recorder) tell(o object, c change) {
	what := fmt.Sprintf("%s %x", c.scaled, c.content)
	if c.rejected > 0 {
		r.send(o, "Warning", "OverridesRejected", what, rejectedMessage(c))
	}
	message := fmt.Sprintf("resourceVersion %s is in force: %d overrides added, %d changed, %d removed", c.version, c.added, c.changed, c.removed)
	if c.first {
		message = fmt.Sprintf("resourceVersion %s is in force in a router that starts: %d overrides", c.version, c.added)
	}
	r.send(o, "Normal", "OverridesInForce", what, message)
}

// tellMoved has the receipt of a move written as an Event. Each router has its
// own.
func (r *recorder) tellMoved(o object, m moved) {
	message := fmt.Sprintf("%s moved %d namespaces, %d sessions in %.1f s, %d cut, %d cancelled, for table %s",
		r.pod, m.namespaces, m.sessions, m.time.Seconds(), m.cut, m.cancelled, m.version)
	r.send(o, "Normal", "SessionsMoved", r.pod+time.Now().String(), message)
}

// rejectedMessage names the rejected entries, as many as there is room for.
func rejectedMessage(c change) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d entries are not in force as written", c.rejected)
	for i, bad := range c.shown {
		one := fmt.Sprintf("; %s: %q, want %s, stays: %s", bad.namespace, bad.Value, bad.Want, bad.Kept)
		more := fmt.Sprintf("; and %d more", c.rejected-i)
		if b.Len()+len(one)+len(more) > eventMessage {
			return b.String() + more
		}
		b.WriteString(one)
	}
	if more := c.rejected - len(c.shown); more > 0 {
		fmt.Fprintf(&b, "; and %d more", more)
	}
	return b.String()
}

// send queues an Event. Its name is the same on every router that has the same
// to say, so that the API server takes it from the first only; what sets it apart
// from others about this version of the object: another number of backends, the same
// number after another change of the StatefulSet, or another router.
func (r *recorder) send(o object, kind, reason, what, message string) {
	m, now := o.Metadata, time.Now().UTC().Truncate(time.Second)
	start := strings.TrimRight(fmt.Sprintf("%.200s", m.Name), ".-") // a DNS subdomain as the whole is
	name := fmt.Sprintf("%s.%016x", start, spread(m.UID+" "+m.ResourceVersion+" "+reason+" "+what))
	e := event{
		reference:      reference{APIVersion: "v1", Kind: "Event"},
		Metadata:       reference{Namespace: m.Namespace, Name: name},
		InvolvedObject: reference{"v1", o.Kind, m.Namespace, m.Name, m.UID, m.ResourceVersion},
		Type:           kind, Reason: reason, Message: message, Count: 1, FirstTimestamp: now, LastTimestamp: now,
		ReportingComponent: "router", ReportingInstance: r.pod,
	}
	select {
	case r.queue <- e:
	default:
		if omitted, ok := r.full.allow(time.Minute); ok {
			r.log.Warn("Events come too fast to write them all", "dropped", omitted+1)
		}
	}
}

// run writes Events until ctx ends.
func (r *recorder) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-r.queue:
			r.write(ctx, e)
		}
		r.sleep(ctx, eventPause)
	}
}

// write tries to write e, and once more if that fails for anything but a lack of
// permission.
func (r *recorder) write(ctx context.Context, e event) {
	err := r.post(ctx, e)
	if err != nil && !refusedWith(err, http.StatusForbidden) {
		r.sleep(ctx, pause(1, retryAfter(err), rand.Float64()))
		err = r.post(ctx, e)
	}
	was := r.forbidden
	r.forbidden = refusedWith(err, http.StatusForbidden)
	if err == nil || ctx.Err() != nil || was && r.forbidden {
		return
	}
	if omitted, ok := r.limit.allow(time.Minute); ok || r.forbidden {
		r.log.Warn("no Event was written, the overrides are in force all the same", "error", err.Error(), "omitted", omitted)
	}
}

// post is nil too if another router was the first to write e.
func (r *recorder) post(ctx context.Context, e event) error {
	ctx, cancel := context.WithTimeout(ctx, eventTime)
	defer cancel()
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	body, err := r.kube.ask(ctx, "/api/v1/namespaces/"+e.Metadata.Namespace+"/events", nil, b)
	if err == nil {
		return body.Close()
	}
	if refusedWith(err, http.StatusConflict) {
		return nil
	}
	return err
}

// sleep waits for d, or until ctx ends.
func (r *recorder) sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
