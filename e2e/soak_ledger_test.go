//go:build controlplane

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ledger is what the overrides are, by the API server's answers alone, and which
// backends a router may send a namespace to. Each write names the version that it
// replaces: one that got no answer can take effect until the next is accepted, and
// no longer.
type ledger struct {
	// Static after construction.
	plane    *plane
	subjects []*subject
	roaming  map[string]string // namespaces that move, and their owners by hash

	// Guarded by pen, which is held during requests of the API server.
	pen              sync.Mutex
	version          string // "" if it is to be read
	data             map[string]string
	owners           map[string]string // by data
	sure             bool              // no write without an answer can still take effect
	accepted         time.Time         // when the last write was
	writes, failures int

	// Guarded by mu.
	mu      sync.Mutex
	tenures map[*subject]map[string][]tenure // of each namespace
}

// tenure is a time in which a router may send a namespace to a backend.
type tenure struct {
	owner    string
	from, to time.Time // to is zero as long as it may
}

const writeTime = 3 * time.Second // bounds a write

// newLedger begins with the owners that the routers name, who have to have the
// overrides that the API server has, and none for what is to roam.
func (r *rig) newLedger(subjects []*subject, roaming, steady []string) *ledger {
	r.t.Helper()
	l := &ledger{plane: r.plane, subjects: subjects, sure: true, roaming: map[string]string{}, owners: map[string]string{},
		tenures: map[*subject]map[string][]tenure{}}
	if err := l.read(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	for _, s := range subjects {
		l.tenures[s] = map[string][]tenure{}
		for _, namespace := range slices.Concat(roaming, steady) {
			o, err := s.owner(r.t.Context(), namespace)
			if before := l.owners[namespace]; err != nil || o.OverridesVersion != l.version || before != "" && before != o.Owner {
				r.t.Fatalf("%s: %s: %+v, want %q with version %s (error %v)", s.pod, namespace, o, before, l.version, err)
			}
			l.owners[namespace] = o.Owner
			l.tenures[s][namespace] = []tenure{{owner: o.Owner, from: time.Now()}}
		}
	}
	for _, namespace := range roaming {
		l.roaming[namespace] = l.owners[namespace]
	}
	return l
}

// read asks the API server for the overrides. pen is held.
func (l *ledger) read(ctx context.Context) error {
	now, err := l.plane.overrides(ctx)
	if err != nil {
		return err
	}
	l.version, l.data = now.ResourceVersion, now.Data
	for namespace, owner := range l.roaming {
		if value, ok := now.Data[namespace]; ok {
			owner = value
		}
		l.owners[namespace] = owner
	}
	return nil
}

// request does a write while pen is held, after a read if that is needed.
func (l *ledger) request(ctx context.Context, write func(context.Context) (version string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	var err error
	if l.version == "" {
		err = l.read(ctx)
	}
	if err == nil {
		l.sure = false
		l.version, err = write(ctx)
	}
	if err != nil {
		l.version = ""
		l.failures++
		return err
	}
	l.sure, l.accepted = true, time.Now()
	l.writes++
	return nil
}

// move gives one of the roaming namespaces to the backend that is so many after
// its owner: by an override, or by none where that is its owner by hash.
func (l *ledger) move(ctx context.Context, namespace string, by int) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	return l.request(ctx, func(ctx context.Context) (string, error) {
		owner := after(l.owners[namespace], by)
		value := any(owner)
		if owner == l.roaming[namespace] {
			value = nil
		}
		l.begin(namespace, owner)
		version, err := l.patch(ctx, namespace, value)
		if err == nil {
			l.owners[namespace] = owner
		}
		return version, err
	})
}

// spoil sets the override of a namespace to a value that changes no owner.
func (l *ledger) spoil(ctx context.Context, namespace string, value any) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	return l.request(ctx, func(ctx context.Context) (string, error) { return l.patch(ctx, namespace, value) })
}

// patch sets one override, if the version is still that of the ledger.
func (l *ledger) patch(ctx context.Context, namespace string, value any) (version string, err error) {
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": l.version}, "data": map[string]any{namespace: value}})
	if err != nil {
		return "", err
	}
	now, err := l.plane.client.CoreV1().ConfigMaps(l.plane.namespace).Patch(ctx, configMap, types.MergePatchType, body, metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	l.data = now.Data
	return now.ResourceVersion, nil
}

// remove deletes the overrides.
func (l *ledger) remove(ctx context.Context) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	err := l.request(ctx, func(ctx context.Context) (string, error) {
		return "", l.plane.client.CoreV1().ConfigMaps(l.plane.namespace).Delete(ctx, configMap,
			metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &l.version}})
	})
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return err
}

// create makes the overrides again, as they were when they were removed.
func (l *ledger) create(ctx context.Context) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	l.version = "none" // nothing is there to be read
	err := l.request(ctx, func(ctx context.Context) (string, error) {
		now, err := l.plane.client.CoreV1().ConfigMaps(l.plane.namespace).Create(ctx,
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: configMap}, Data: l.data}, metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		return now.ResourceVersion, nil
	})
	if apierrors.IsAlreadyExists(err) {
		err = nil
	}
	return err
}

// begin notes that the routers may send a namespace to a backend from now on.
func (l *ledger) begin(namespace, owner string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.subjects {
		all := l.tenures[s][namespace]
		if !slices.ContainsFunc(all, func(t tenure) bool { return t.owner == owner && t.to.IsZero() }) {
			l.tenures[s][namespace] = append(all, tenure{owner: owner, from: time.Now()})
		}
	}
}

// settled is nil if the router has the table of the last write, which was
// accepted after since, and no change of owners is under way: until then the
// owners of before may get clients. From then on only what it says may be true.
func (l *ledger) settled(ctx context.Context, s *subject, since time.Time) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	return l.settledLocked(ctx, s, since)
}

func (l *ledger) settledLocked(ctx context.Context, s *subject, since time.Time) error {
	switch {
	case l.version == "" || !l.sure:
		return errors.New("it is open whether the last write took effect")
	case !l.accepted.After(since):
		return errors.New("no write was accepted")
	}
	o, err := s.owner(ctx, configMap)
	if err != nil {
		return err
	}
	if o.OverridesVersion != l.version {
		return fmt.Errorf("%s has version %q, want %q", s.pod, o.OverridesVersion, l.version)
	}
	if m, err := s.metrics(ctx); err != nil || m.sum("router_handoff_in_progress") != 0 {
		return fmt.Errorf("%s has a change under way (error %v)", s.pod, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for namespace, all := range l.tenures[s] {
		for i := range all {
			if all[i].to.IsZero() && all[i].owner != l.owners[namespace] {
				all[i].to = time.Now()
			}
		}
	}
	return nil
}

// holds is nil if the router's table is, entry by entry, what was last written.
// Nothing is written meanwhile.
func (l *ledger) holds(ctx context.Context, s *subject) error {
	l.pen.Lock()
	defer l.pen.Unlock()
	if err := l.settledLocked(ctx, s, time.Time{}); err != nil {
		return err
	}
	var errs []error
	for namespace, owner := range l.owners {
		if o, err := s.owner(ctx, namespace); err != nil || o.Owner != owner {
			errs = append(errs, fmt.Errorf("%s: %s belongs to %q, want %q (error %v)", s.pod, namespace, o.Owner, owner, err))
		}
	}
	return some(errs)
}

// mayOwn returns the backends to which the router might send the namespace at
// some time between the two.
func (l *ledger) mayOwn(s *subject, namespace string, from, to time.Time) (owners []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.tenures[s][namespace] {
		if !t.from.After(to) && (t.to.IsZero() || !t.to.Before(from)) {
			owners = append(owners, t.owner)
		}
	}
	return owners
}

// owner is who owns the namespace by the last write.
func (l *ledger) owner(namespace string) string {
	l.pen.Lock()
	defer l.pen.Unlock()
	return l.owners[namespace]
}

// written returns how many writes were accepted, and how many failed.
func (l *ledger) written() (accepted, failed int) {
	l.pen.Lock()
	defer l.pen.Unlock()
	return l.writes, l.failures
}
