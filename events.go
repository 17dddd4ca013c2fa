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
	maxQueuedEvents = 64                     // Events that may wait to be written
	eventInterval   = 500 * time.Millisecond // from one to the next
	eventTimeout    = 10 * time.Second       // bounds one request
	maxEventMessage = 1024                   // bytes, the API's own limit
)

// eventRecorder writes Events about the objects that hold overrides, which `kubectl
// describe` shows. They are a convenience: at most maxQueuedEvents wait, each is
// tried twice, and nothing waits for them.
type eventRecorder struct {
	// Static after construction.
	kube    *kubeClient
	podName string // name of this router
	queue   chan kubeEvent
	log     *slog.Logger

	// Owned by run.
	forbidden       bool     // the last try was
	failureThrottle throttle // of failures in the log

	dropThrottle throttle // of Events that were dropped, in the log
}

// kubeEvent is a core/v1 Event: kubectl describe asks for its involvedObject
// (https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/).
type kubeEvent struct {
	objectReference                    // without name and version
	Metadata           objectReference `json:"metadata"`
	InvolvedObject     objectReference `json:"involvedObject"`
	Type               string          `json:"type"`
	Reason             string          `json:"reason"`
	Message            string          `json:"message"`
	Count              int             `json:"count"`
	FirstTimestamp     time.Time       `json:"firstTimestamp"`
	LastTimestamp      time.Time       `json:"lastTimestamp"`
	ReportingComponent string          `json:"reportingComponent"`
	ReportingInstance  string          `json:"reportingInstance"`
}

// objectReference names an object of the API.
type objectReference struct {
	APIVersion      string `json:"apiVersion,omitempty"`
	Kind            string `json:"kind,omitempty"`
	Namespace       string `json:"namespace,omitempty"`
	Name            string `json:"name,omitempty"`
	UID             string `json:"uid,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

func newEventRecorder(k kubeClient, podName string, log *slog.Logger) *eventRecorder {
	return &eventRecorder{kube: &k, podName: podName, queue: make(chan kubeEvent, maxQueuedEvents), log: log}
}

// reportChange has Events written about what a version of an object did. It does not
// block.
func (r *eventRecorder) reportChange(o apiObject, c sourceChange) {
	identity := fmt.Sprintf("%s %x", c.scaled, c.contentHash)
	if c.rejected > 0 {
		r.enqueue(o, "Warning", "OverridesRejected", identity, rejectedMessage(c))
	}
	message := fmt.Sprintf("resourceVersion %s is in force: %d overrides added, %d changed, %d removed", c.version, c.added, c.changed, c.removed)
	if c.initial {
		message = fmt.Sprintf("resourceVersion %s is in force in a router that starts: %d overrides", c.version, c.added)
	}
	r.enqueue(o, "Normal", "OverridesInForce", identity, message)
}

// reportMove has the receipt of a move written as an Event. Each router has its
// own.
func (r *eventRecorder) reportMove(o apiObject, m moveResult) {
	message := fmt.Sprintf("%s moved %d namespaces, %d sessions in %.1f s, %d cut, %d cancelled, for table %s",
		r.podName, m.namespaces, m.sessions, m.time.Seconds(), m.cut, m.cancelled, m.version)
	r.enqueue(o, "Normal", "SessionsMoved", r.podName+time.Now().String(), message)
}

// rejectedMessage names the rejected entries, as many as there is room for.
func rejectedMessage(c sourceChange) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d entries are not in force as written", c.rejected)
	for i, bad := range c.examples {
		one := fmt.Sprintf("; %s, stays: %s", bad, bad.Previous)
		more := fmt.Sprintf("; and %d more", c.rejected-i)
		if b.Len()+len(one)+len(more) > maxEventMessage {
			return b.String() + more
		}
		b.WriteString(one)
	}
	if more := c.rejected - len(c.examples); more > 0 {
		fmt.Fprintf(&b, "; and %d more", more)
	}
	return b.String()
}

// enqueue queues an Event. Its name is the same on every router that has the same
// to say, so that the API server takes it from the first only; what sets it apart
// from others about this version of the object: another number of backends, the same
// number after another change of the StatefulSet, or another router.
func (r *eventRecorder) enqueue(o apiObject, kind, reason, identity, message string) {
	m, now := o.Metadata, time.Now().UTC().Truncate(time.Second)
	start := strings.TrimRight(fmt.Sprintf("%.200s", m.Name), ".-") // a DNS subdomain as the whole is
	name := fmt.Sprintf("%s.%016x", start, hash64(m.UID+" "+m.ResourceVersion+" "+reason+" "+identity))
	e := kubeEvent{
		objectReference: objectReference{APIVersion: "v1", Kind: "Event"},
		Metadata:        objectReference{Namespace: m.Namespace, Name: name},
		InvolvedObject:  objectReference{"v1", o.Kind, m.Namespace, m.Name, m.UID, m.ResourceVersion},
		Type:            kind, Reason: reason, Message: message, Count: 1, FirstTimestamp: now, LastTimestamp: now,
		ReportingComponent: "router", ReportingInstance: r.podName,
	}
	select {
	case r.queue <- e:
	default:
		if omitted, ok := r.dropThrottle.allow(time.Minute); ok {
			r.log.Warn("Events come too fast to write them all", "dropped", omitted+1)
		}
	}
}

// run writes Events until ctx ends.
func (r *eventRecorder) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-r.queue:
			r.write(ctx, e)
		}
		sleep(ctx, eventInterval)
	}
}

// write tries to write e, and once more if that fails for anything but a lack of
// permission.
func (r *eventRecorder) write(ctx context.Context, e kubeEvent) {
	err := r.post(ctx, e)
	if err != nil && !hasStatus(err, http.StatusForbidden) {
		sleep(ctx, retryDelay(1, retryAfter(err), rand.Float64()))
		err = r.post(ctx, e)
	}
	was := r.forbidden
	r.forbidden = hasStatus(err, http.StatusForbidden)
	if err == nil || ctx.Err() != nil || was && r.forbidden {
		return
	}
	if omitted, ok := r.failureThrottle.allow(time.Minute); ok || r.forbidden {
		r.log.Warn("no Event was written, the overrides are in force all the same", "error", err.Error(), "omitted", omitted)
	}
}

// post is nil too if another router was the first to write e.
func (r *eventRecorder) post(ctx context.Context, e kubeEvent) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	body, err := r.kube.do(ctx, "/api/v1/namespaces/"+e.Metadata.Namespace+"/events", nil, b)
	if err == nil {
		return body.Close()
	}
	if hasStatus(err, http.StatusConflict) {
		return nil
	}
	return err
}
