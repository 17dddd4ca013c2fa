package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
)

// configMap is the part of a ConfigMap that the router reads.
type configMap struct {
	apiObject
	Data   overrideSet `json:"data"`
	Binary present     `json:"binaryData"`
}

// id identifies the ConfigMap among the sources of overrides.
func (m *configMap) id() sourceID {
	return sourceID{"ConfigMap", m.Metadata.Namespace, m.Metadata.Name}
}

// present is whether a field of a JSON object is present and not empty.
type present bool

// UnmarshalJSON is called only if the field is present.
func (p *present) UnmarshalJSON(b []byte) error {
	*p = string(b) != "null" && string(b) != "{}"
	return nil
}

// configMaps is a source of overrides: the ConfigMaps with given names, with a watcher
// for each, or those that one label selector selects.
//
// It gives nothing to update before each named ConfigMap, or one that is selected, was
// found.
//
// If a named ConfigMap is deleted, its last overrides stay in force, and it is reported
// as absent, until it exists again or the router stops (invariant 4): a mistake must not
// move every session twice. To remove its overrides, empty it before deleting it.
//
// If the selector no longer selects a ConfigMap, its overrides are out of force at once:
// a router that starts later cannot know them and would compute other owners. Only if
// the selector selects nothing, all last overrides stay in force: a router that starts
// then is not ready, and serves no namespace. Each router keeps the overrides that it saw
// last. If several ConfigMaps are deleted at once, routers may keep different ones; their
// stamps differ then. To empty each before deleting it avoids that.
//
// The object of the hand-off is never among those that the selector selects: routers write it
// all the time, and none of its keys is an override.
type configMaps struct {
	// Static after construction.
	watchers      []*watcher[configMap]
	handoffObject string                 // the name of the object of the hand-off
	update        func(...sourceContent) // gets the contents of all ConfigMaps
	events        *eventRecorder
	log           *slog.Logger

	leftOut sync.Once // logs that the object of the hand-off is selected

	// Guarded by mu, which is held while update runs.
	mu      sync.Mutex
	current []map[string]configMapState // of each watcher, by name; nil before its LIST
	applied []sourceContent             // that update got last
}

// configMapState is the last version of a ConfigMap whose overrides are in force.
type configMapState struct {
	*configMap
	absent bool // it was deleted, or is no longer selected
}

// newConfigMaps returns the source of overrides in a Kubernetes namespace: the ConfigMaps
// with these names or, if selector is not "", those that the label selector selects, without
// handoffObject. podName is the name of this router in Events.
func newConfigMaps(k kubeClient, kubeNamespace string, names []string, selector, handoffObject,
	podName string, update func(...sourceContent), log *slog.Logger) *configMaps {
	c := &configMaps{handoffObject: handoffObject, update: update, log: log,
		events: newEventRecorder(k, podName, log)}
	for _, name := range names {
		c.addWatcher(k, kubeNamespace, name, "")
	}
	if selector != "" {
		c.addWatcher(k, kubeNamespace, "", selector)
	}
	return c
}

// run watches the ConfigMaps and writes Events until ctx ends.
func (c *configMaps) run(ctx context.Context) {
	var running sync.WaitGroup
	for _, w := range c.watchers {
		running.Go(func() { w.run(ctx) })
	}
	running.Go(func() { c.events.run(ctx) })
	running.Wait()
}

// addWatcher adds a watcher of the ConfigMap with the name, or of those that the selector
// selects. It must not be called after run.
func (c *configMaps) addWatcher(k kubeClient, kubeNamespace, name, selector string) {
	i := len(c.watchers)
	c.current = append(c.current, nil)
	c.watchers = append(c.watchers, &watcher[configMap]{
		kube: &k, kind: "ConfigMap",
		path:          "/api/v1/namespaces/" + kubeNamespace + "/configmaps",
		kubeNamespace: kubeNamespace, name: name, selector: selector,
		meta: func(m *configMap) *apiObject { return &m.apiObject },
		apply: func(set map[string]*configMap) {
			if selector != "" {
				set = c.withoutHandoffObject(set)
			}
			c.apply(i, set)
		},
		log: c.log,
	})
}

// withoutHandoffObject returns set without the object of the hand-off. It does not change set,
// which is the watcher's.
func (c *configMaps) withoutHandoffObject(set map[string]*configMap) map[string]*configMap {
	own := set[c.handoffObject]
	if own == nil {
		return set
	}
	c.leftOut.Do(func() {
		c.log.Warn("selector of overrides selects the object of the hand-off, which is left out",
			"object", own.id().String())
	})
	set = maps.Clone(set)
	delete(set, c.handoffObject)
	return set
}

// apply stores the ConfigMaps that the i-th watcher has found, by name, and calls update
// if their overrides are new and each other watcher has found some too.
func (c *configMaps) apply(i int, set map[string]*configMap) {
	c.mu.Lock()
	defer c.mu.Unlock()
	previous, next := c.current[i], map[string]configMapState{}
	for name, m := range previous {
		switch found := set[name] != nil; {
		case !found && len(set) > 0:
			c.log.Info("ConfigMap no longer selected; its overrides are removed",
				"object", m.id().String(), "resource_version", m.Metadata.ResourceVersion)
			continue
		case !found && !m.absent:
			c.log.Warn("ConfigMap deleted or no longer selected; keeping its last overrides",
				"object", m.id().String(), "resource_version", m.Metadata.ResourceVersion)
		case found && m.absent:
			c.log.Info("ConfigMap found again",
				"object", m.id().String(), "resource_version", set[name].Metadata.ResourceVersion)
		}
		next[name] = configMapState{m.configMap, true}
	}
	for name, m := range set {
		next[name] = configMapState{m, false}
		old := previous[name].configMap
		if bool(m.Binary) && (old == nil || !bool(old.Binary) || !old.Data.equal(&m.Data)) {
			c.log.Warn("ConfigMap has binaryData, which is ignored",
				"object", m.id().String(), "resource_version", m.Metadata.ResourceVersion)
		}
	}
	if c.current[i] = next; len(next) == 0 {
		c.log.Warn("ConfigMap not found", "object", c.watchers[i].String())
	}
	c.applyAll()
}

// applyAll gives the overrides of all ConfigMaps to update, in the order of their names,
// if each watcher has found some and they are new. The caller holds c.mu.
func (c *configMaps) applyAll() {
	all := map[string]configMapState{}
	for _, found := range c.current {
		if len(found) == 0 {
			return
		}
		maps.Copy(all, found)
	}
	var contents []sourceContent
	for _, name := range slices.Sorted(maps.Keys(all)) {
		m := all[name]
		contents = append(contents, sourceContent{
			id: m.id(), object: m.apiObject,
			version: m.Metadata.ResourceVersion, overrides: &m.Data,
		})
	}
	if slices.Equal(contents, c.applied) {
		return
	}
	if len(contents) > maxSources {
		c.log.Error("too many ConfigMaps; none is applied",
			"objects", len(contents), "max", maxSources)
		return
	}
	c.applied = contents
	c.update(contents...)
}

// reportChange queues Events about a change of a ConfigMap's overrides, when the newest table
// has it. That may be later than update: when the number of backends is known, or changes.
func (c *configMaps) reportChange(change sourceChange) {
	if change.object.Kind != "" { // it is of a ConfigMap that is still there
		c.events.reportChange(change.object, change)
	}
}

// reportMove queues an Event about a move that ended, on the first ConfigMap: several may
// have caused the move, or the number of backends.
func (c *configMaps) reportMove(m moveReceipt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, found := range c.current {
		for _, name := range slices.Sorted(maps.Keys(found)) {
			c.events.reportMove(found[name].apiObject, m)
			return
		}
	}
}

// whyNotReady says which ConfigMaps were not found yet, and why; "" if there are none.
func (c *configMaps) whyNotReady() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var why []string
	for i, w := range c.watchers {
		switch {
		case len(c.current[i]) > 0:
		case c.current[i] != nil && w.name != "":
			why = append(why, fmt.Sprintf("%s does not exist: kubectl -n %s create configmap %s",
				w.String(), w.kubeNamespace, w.name))
		case c.current[i] != nil:
			why = append(why, fmt.Sprintf("no ConfigMap has the label: "+
				"kubectl -n %s label configmap NAME %s", w.kubeNamespace, w.selector))
		default:
			why = append(why, w.whyNotListed())
		}
	}
	return strings.Join(why, "; ")
}

// watchedObject is the state of one ConfigMap for the metrics.
type watchedObject struct {
	object string // its display name, or the selector if that has found none yet
	absent bool   // it does not exist, or is not selected
}

// watchedObjects returns the ConfigMaps whose overrides are in force, and one for each
// name or selector that has found none yet.
func (c *configMaps) watchedObjects() (all []watchedObject) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range c.watchers {
		for _, name := range slices.Sorted(maps.Keys(c.current[i])) {
			m := c.current[i][name]
			all = append(all, watchedObject{m.id().String(), m.absent})
		}
		if len(c.current[i]) == 0 {
			all = append(all, watchedObject{object: w.String(), absent: c.current[i] != nil})
		}
	}
	return all
}

// writeMetrics writes which ConfigMaps are absent.
func (c *configMaps) writeMetrics(m metricsWriter) {
	objects := c.watchedObjects()
	if len(objects) == 0 {
		return
	}
	sample := m.family("router_watch_object_absent", "gauge", "1 if the object does not exist, or is not selected.")
	for _, o := range objects {
		sample(boolToFloat(o.absent), "object", o.object)
	}
}
