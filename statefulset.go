package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// statefulSet is what is read of a StatefulSet.
type statefulSet struct {
	object
	Spec struct {
		Replicas *int `json:"replicas"` // nil is 1
		Ordinals struct {
			Start int `json:"start"`
		} `json:"ordinals"`
	} `json:"spec"`
	Status struct {
		ReadyReplicas int `json:"readyReplicas"`
	} `json:"status"`
	annotation string // noteKey's
}

// noteKey is the annotation of the StatefulSet in which routers note how many
// backends have namespaces.
const noteKey = "router/backends"

// UnmarshalJSON reads one annotation of all.
func (s *statefulSet) UnmarshalJSON(b []byte) error {
	type plain statefulSet
	var notes struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	err := cmp.Or(json.Unmarshal(b, (*plain)(s)), json.Unmarshal(b, &notes))
	s.annotation = notes.Metadata.Annotations[noteKey]
	return err
}

// noted is the number in the annotation, 0 if there is none.
func (s *statefulSet) noted() int {
	n, err := strconv.Atoi(s.annotation)
	if err != nil || n < 1 {
		return 0
	}
	return n
}

func (s *statefulSet) replicas() int {
	if s.Spec.Replicas == nil {
		return 1
	}
	return *s.Spec.Replicas
}

// backends are those that have namespaces. It depends on nothing but the object
// as it is now, so that routers that have seen the same version agree, also one
// that has just started and one whose watch missed a state in between
// (invariant 2). How many are ready does not say how many there are: with 5 of 6
// ready a set grows from 4 and waits for backend-5, or has 6 of which one
// restarts. What tells these apart is the note, which grows when backends are
// ready for the first time, and which spec.replicas bounds at once:
//
//   - scaled in: the namespaces move before the pods are gone;
//   - scaled out: a backend gets namespaces when it can serve them;
//   - a pod that restarts, or fails for ever, changes nothing;
//   - scaled to zero: as before. With no note either, there are none;
//   - no note, since no router may write it: all of spec.replicas, at once.
func (s *statefulSet) backends() ordinals {
	count := s.replicas()
	if noted := s.noted(); noted > 0 && (count == 0 || noted < count) {
		count = noted
	}
	return ordinals{s.Spec.Ordinals.Start, count}
}

// revision names the spec. The API server counts a StatefulSet's specs, not what
// changes in its annotations or status
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/).
func (s *statefulSet) revision() string {
	return fmt.Sprintf("%s/%d", s.Metadata.UID, s.Metadata.Generation)
}

// note is what the note should be: the backends that there are, and those after
// them that are ready without a gap.
func (s *statefulSet) note(ready func(ordinal int) bool) int {
	b := s.backends()
	for b.count < s.replicas() && ready(b.first+b.count) {
		b.count++
	}
	return b.count
}

// scale follows the StatefulSet, which says how many backends there are.
type scale struct {
	// Static after construction.
	watcher *watcher[statefulSet]
	kube    *kube // writes the note
	pods    *pods
	resize  func(backends ordinals, revision string) // called in order, with one backend at least
	log     *slog.Logger

	changed chan struct{} // capacity 1; wakes keepNote, never closed

	// Guarded by mu.
	mu     sync.Mutex
	latest *statefulSet // nil before the first; one that was deleted stays
	absent bool
}

// followScale follows the StatefulSet of the pods while its watcher and keepNote
// run, and calls resize with what it says.
func followScale(client kube, namespace string, pods *pods, resize func(ordinals, string), log *slog.Logger) *scale {
	writer := client
	writer.patch = true
	c := &scale{kube: &writer, pods: pods, resize: resize, log: log, changed: make(chan struct{}, 1)}
	c.watcher = &watcher[statefulSet]{
		kube: &client, path: "/apis/apps/v1/namespaces/" + namespace + "/statefulsets", kind: "StatefulSet",
		namespace: namespace, name: pods.statefulSet,
		header: func(s *statefulSet) *object { return &s.object }, apply: c.apply, log: log,
	}
	pods.changed = c.change
	return c
}

// apply takes the StatefulSet. One that is deleted changes nothing, nor does one
// that has no backends.
func (c *scale) apply(set map[string]*statefulSet) {
	s := set[c.watcher.name]
	c.mu.Lock()
	c.absent = s == nil
	if s != nil {
		c.latest = s
	}
	c.mu.Unlock()
	if s == nil {
		c.log.Warn("there is no such object, the number of backends stays as it was", "object", c.watcher.what())
		return
	}
	if b := s.backends(); b.count > 0 {
		c.resize(b, s.revision())
	}
	c.change()
}

// change wakes keepNote.
func (c *scale) change() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// keepNote keeps the note of the StatefulSet up to date, with all other routers,
// until ctx ends.
func (c *scale) keepNote(ctx context.Context) {
	var limit throttle
	for fails := 0; ; {
		var again <-chan time.Time
		changed := c.changed
		err := c.writeNote(ctx)
		if fails++; err == nil {
			fails = 0
		} else if ctx.Err() == nil {
			again, changed = time.After(pause(fails, retryAfter(err), rand.Float64())), nil
			if omitted, ok := limit.allow(time.Minute); ok {
				c.log.Warn("cannot note the number of backends: the Role needs patch of statefulsets/status",
					"object", c.watcher.what(), "error", err.Error(), "omitted", omitted)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
	}
}

// writeNote writes the note if it should be another. The patch is for the very
// version that was judged: if there is a later one, the API server refuses it,
// and the watch brings that. So a router with an old picture of the StatefulSet
// writes nothing. It goes to the status, whose patch may not change the spec.
func (c *scale) writeNote(ctx context.Context) error {
	c.mu.Lock()
	s := c.latest
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	count := s.note(c.grown(s))
	if count == s.noted() || count == 0 {
		return nil
	}
	note, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": s.Metadata.UID, "resourceVersion": s.Metadata.ResourceVersion,
		"annotations": map[string]string{noteKey: strconv.Itoa(count)}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	body, err := c.kube.ask(ctx, c.watcher.path+"/"+c.watcher.name+"/status", nil, note)
	if no := (&status{}); errors.As(err, &no) && no.Code == http.StatusConflict {
		return nil
	}
	if err != nil {
		return err
	}
	body.Close()
	c.log.Info("number of backends noted", "object", c.watcher.what(), "backends", count, "before", s.noted())
	return nil
}

// grown says whether a backend that has no namespaces yet can serve them. Where
// only the StatefulSet may be read, as many are ready as it says.
func (c *scale) grown(s *statefulSet) func(ordinal int) bool {
	return func(ordinal int) bool {
		ready, known := c.pods.ready(ordinal)
		if !known {
			return ordinal-s.Spec.Ordinals.Start < s.Status.ReadyReplicas
		}
		return ready
	}
}

// replicas returns how many backends the StatefulSet is to have, if it is known.
func (c *scale) replicas() (count int, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.latest == nil {
		return 0, false
	}
	return c.latest.replicas(), true
}

// missing says, in words, why the number of backends is not known, or "".
func (c *scale) missing() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch failure := c.watcher.now().failure; {
	case c.latest != nil && c.latest.backends().count > 0:
		return ""
	case c.latest != nil:
		return c.watcher.what() + " has no replicas"
	case c.absent:
		return c.watcher.what() + " does not exist"
	case errorClass(failure) == "forbidden":
		return fmt.Sprintf("%s: %v; the Role needs list and watch of statefulsets with resourceNames [%s]",
			c.watcher.what(), failure, c.watcher.name)
	case failure != nil:
		return c.watcher.what() + ": " + failure.Error()
	}
	return c.watcher.what() + " was asked for"
}
