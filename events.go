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
	maxQueuedEvents = 64                     // Events that wait to be written, at most
	eventInterval   = 500 * time.Millisecond // between two Events
	eventTimeout    = 10 * time.Second       // for one request
	maxEventMessage = 1024                   // bytes; the API's own limit
)

// eventRecorder writes Events about the ConfigMaps with overrides, the StatefulSet, and this
// router's pod. `kubectl describe` shows them. They are a convenience: at most
// maxQueuedEvents wait, the recorder tries to write each at most twice, and nothing waits
// for them.
type eventRecorder struct {
	// Static after construction.
	kube    *kubeClient
	podName string // of this router
	queue   chan kubeEvent
	log     *slog.Logger

	// Owned by run.
	forbidden       bool     // the API server forbade the last Event
	failureThrottle throttle // limits the log lines about failures

	dropThrottle throttle // limits the log lines about Events that were dropped
}

// kubeEvent is a core/v1 Event. kubectl describe selects Events by involvedObject
// (https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/).
type kubeEvent struct {
	objectReference                    // apiVersion and kind only
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

// objectReference names an object in the API.
type objectReference struct {
	APIVersion      string `json:"apiVersion,omitempty"`
	Kind            string `json:"kind,omitempty"`
	Namespace       string `json:"namespace,omitempty"`
	Name            string `json:"name,omitempty"`
	UID             string `json:"uid,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

func newEventRecorder(k kubeClient, podName string, log *slog.Logger) *eventRecorder {
	queue := make(chan kubeEvent, maxQueuedEvents)
	return &eventRecorder{kube: &k, podName: podName, queue: queue, log: log}
}

// reportChange queues Events about a change of the object's overrides: one for its
// rejected overrides, if any, and one for its counts. The router has a table of this version
// then: namespaces keep their owners until it is their turn to move. It does not block.
func (r *eventRecorder) reportChange(o apiObject, c sourceChange) {
	identity := fmt.Sprintf("%s %x", c.eventSpecID, c.ownersHash)
	if c.rejected > 0 {
		r.enqueue(o, "Warning", "OverridesRejected", identity, rejectedMessage(c))
	}
	message := "accepted resourceVersion " + c.version
	if c.initial {
		message += fmt.Sprintf(" in a router that started: %d overrides", c.added)
	} else {
		message += fmt.Sprintf(": %d overrides added, %d changed, %d removed",
			c.added, c.changed, c.removed)
	}
	r.enqueue(o, "Normal", "OverridesAccepted", identity, message)
}

// reportMove queues an Event about a move that ended. Each router writes its own. It
// does not block.
func (r *eventRecorder) reportMove(o apiObject, m moveReceipt) {
	message := fmt.Sprintf("%s moved %d namespaces, %d sessions in %.1f s, "+
		"each namespace held for %.1f s at most, %d cut, %d cancelled, for overrides %s",
		r.podName, m.Namespaces, m.Moved, m.Seconds, m.HeldSeconds,
		m.Cut, m.Cancelled, m.OverridesVersion)
	r.enqueue(o, "Normal", "SessionsMoved", r.podName+time.Now().String(), message)
}

// reportCordon queues an Event about the StatefulSet o, whose annotation is not in force:
// why says so in words. It does not block. The version of the object does not count: it
// changes with each status of a pod.
func (r *eventRecorder) reportCordon(o apiObject, why string) {
	o.Metadata.ResourceVersion = ""
	r.enqueue(o, "Warning", "CordonRejected", why, why)
}

// reportCertificate queues an Event about the pod o, this router's own, whose certificate on
// disk is refused: message says why. It does not block.
func (r *eventRecorder) reportCertificate(o apiObject, message string) {
	if len(message) > maxEventMessage {
		message = message[:maxEventMessage]
	}
	r.enqueue(o, "Warning", "CertificateRejected", message+time.Now().String(), strings.ToValidUTF8(message, ""))
}

// rejectedMessage names the rejected overrides of c, as many as fit in maxEventMessage
// bytes.
func rejectedMessage(c sourceChange) string {
	var b strings.Builder
	fmt.Fprintf(&b, "rejected overrides: %d", c.rejected)
	for i, bad := range c.examples {
		text := fmt.Sprintf("; %s, in force: %s", bad, bad.InForce)
		more := fmt.Sprintf("; and %d more", c.rejected-i)
		if b.Len()+len(text)+len(more) > maxEventMessage {
			return b.String() + more
		}
		b.WriteString(text)
	}
	if more := c.rejected - len(c.examples); more > 0 {
		fmt.Fprintf(&b, "; and %d more", more)
	}
	return b.String()
}

// enqueue queues an Event about the object, of type kind: "Normal" or "Warning". It drops
// the Event if the queue is full. All routers give the same Event the same name, so that
// the API server accepts it only once. identity distinguishes Events of one reason about
// one version of the object: the table's ownersHash and the StatefulSet's specID for
// overrides, the text for a cordon, the router and the time for a move, the text and the time
// for a certificate.
func (r *eventRecorder) enqueue(o apiObject, kind, reason, identity, message string) {
	m, now := o.Metadata, time.Now().UTC().Truncate(time.Second)
	// An Event's name is a DNS subdomain, so nothing before a dot may end with "." or "-".
	prefix := strings.TrimRight(fmt.Sprintf("%.200s", m.Name), ".-")
	hash := hash64(m.UID + " " + m.ResourceVersion + " " + reason + " " + identity)
	name := fmt.Sprintf("%s.%016x", prefix, hash)
	apiVersion := "v1"
	if o.Kind == "StatefulSet" {
		apiVersion = "apps/v1"
	}
	e := kubeEvent{
		objectReference: objectReference{APIVersion: "v1", Kind: "Event"},
		Metadata:        objectReference{Namespace: m.Namespace, Name: name},
		InvolvedObject: objectReference{
			apiVersion, o.Kind, m.Namespace, m.Name, m.UID, m.ResourceVersion,
		},
		Type: kind, Reason: reason, Message: message,
		Count: 1, FirstTimestamp: now, LastTimestamp: now,
		ReportingComponent: "router", ReportingInstance: r.podName,
	}
	select {
	case r.queue <- e:
	default:
		if omitted, ok := r.dropThrottle.allow(time.Minute); ok {
			r.log.Warn("event queue full; events dropped", "dropped", omitted+1)
		}
	}
}

// run writes the queued Events until ctx ends.
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

// write writes e. If that fails, it tries once more, unless the API server forbids it. It
// logs a failure, within failureThrottle but for the first one that forbids it.
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
	omitted, ok := int64(0), r.forbidden
	if !ok {
		omitted, ok = r.failureThrottle.allow(time.Minute)
	}
	if ok {
		r.log.Warn("cannot write Event; nothing else depends on it",
			"error", err.Error(), "omitted", omitted)
	}
}

// post sends e to the API server. It returns nil too if another router has already
// written e.
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
