package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// configMap is what is read of a ConfigMap.
type configMap struct {
	apiObject
	Data   overrideSet `json:"data"`
	Binary present     `json:"binaryData"`
}

// id identifies the ConfigMap among the sources of overrides.
func (m *configMap) id() sourceID {
	return sourceID{kind: "ConfigMap", namespace: m.Metadata.Namespace, name: m.Metadata.Name}
}

// present is whether a field of an object is there, whatever it holds.
type present bool

// UnmarshalJSON is called if the field is there.
func (p *present) UnmarshalJSON(b []byte) error {
	*p = string(b) != "null" && string(b) != "{}"
	return nil
}

// configMaps makes tables of the ConfigMaps with overrides: those of some names,
// with a watcher for each, or those that one label selector chooses.
//
// A ConfigMap that is followed by name and is deleted stays in force as it was,
// and is reported as absent, until one of its name is there again or the router
// ends (invariant 4): a slip must not move every session twice. To take its
// overrides out of force, empty it before it is deleted. One that a selector no
// longer chooses is out of force at once, or a router that starts, which cannot know
// it, would have other owners. Only when the selector chooses nothing any more does
// all stay as it was: a router that starts then is not ready, and has no owners. What
// stays is what each router saw last, so where several are deleted at once routers may
// differ, and their stamps say so: to empty each before it is deleted avoids that.
// Nothing is in force before each name, or something selected, was there.
type configMaps struct {
	// Static after construction.
	watchers []*watcher[configMap]
	update   func(...sourceContent)
	events   *eventRecorder
	log      *slog.Logger

	mu      sync.Mutex
	current []map[string]configMapState // of each watcher by name, nil before its LIST. Guarded by mu.
	applied []sourceContent             // the last. Guarded by mu.

	objects atomic.Pointer[map[sourceID]apiObject] // whose overrides were applied last
}

// configMapState is a ConfigMap whose overrides are in force.
type configMapState struct {
	*configMap
	absent bool
}

// newConfigMaps follows the ConfigMaps with these names in a Kubernetes namespace or,
// if selector is not "", those that the label selector chooses. update gets their
// overrides. podName is this router's, for Events.
func newConfigMaps(k kubeClient, namespace string, names []string, selector, podName string,
	update func(...sourceContent), log *slog.Logger) *configMaps {
	c := &configMaps{update: update, events: newEventRecorder(k, podName, log), log: log}
	for _, name := range names {
		c.addWatcher(k, namespace, name, "")
	}
	if selector != "" {
		c.addWatcher(k, namespace, "", selector)
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

// addWatcher adds a watcher: of the ConfigMap with the name, or of those that the
// selector chooses. It must not be called once one of them runs.
func (c *configMaps) addWatcher(k kubeClient, namespace, name, selector string) {
	i := len(c.watchers)
	c.current = append(c.current, nil)
	c.watchers = append(c.watchers, &watcher[configMap]{
		kube: &k, path: "/api/v1/namespaces/" + namespace + "/configmaps", kind: "ConfigMap",
		namespace: namespace, name: name, selector: selector,
		meta:  func(m *configMap) *apiObject { return &m.apiObject },
		apply: func(set map[string]*configMap) { c.apply(i, set) },
		log:   c.log,
	})
}

// apply takes the set of the i-th watcher, and puts a table in force if it has
// anything new and all others were heard.
func (c *configMaps) apply(i int, set map[string]*configMap) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, now := c.current[i], map[string]configMapState{}
	for name, m := range before {
		switch there := set[name] != nil; {
		case !there && len(set) > 0:
			c.log.Info("the object is no longer selected, its overrides are out of force", "object", m.id().String(),
				"version", m.Metadata.ResourceVersion)
			continue
		case !there && !m.absent:
			c.log.Warn("there is no such object any more, its overrides stay in force", "object", m.id().String(),
				"version", m.Metadata.ResourceVersion)
		case there && m.absent:
			c.log.Info("the object is there again", "object", m.id().String(), "version", set[name].Metadata.ResourceVersion)
		}
		now[name] = configMapState{m.configMap, true}
	}
	for name, m := range set {
		now[name] = configMapState{m, false}
		if was := before[name].configMap; bool(m.Binary) && (was == nil || !bool(was.Binary) || !was.Data.equal(&m.Data)) {
			c.log.Warn("binaryData is ignored", "object", m.id().String(), "version", m.Metadata.ResourceVersion)
		}
	}
	if c.current[i] = now; len(now) == 0 {
		c.log.Warn("there is no such object", "object", c.watchers[i].String())
	}
	c.updateTable()
}

// updateTable puts a table in force that is made of what is held, in the order of
// (Kubernetes namespace, name), if that is complete and new.
func (c *configMaps) updateTable() {
	var all []*configMap
	for _, held := range c.current {
		if len(held) == 0 {
			return
		}
		for m := range maps.Values(held) {
			all = append(all, m.configMap)
		}
	}
	slices.SortFunc(all, func(a, b *configMap) int {
		return cmp.Or(cmp.Compare(a.Metadata.Namespace, b.Metadata.Namespace), cmp.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	var sources []sourceContent
	objects := map[sourceID]apiObject{}
	for _, m := range all {
		objects[m.id()] = m.apiObject
		sources = append(sources, sourceContent{id: m.id(), version: m.Metadata.ResourceVersion, overrides: &m.Data})
	}
	if slices.Equal(sources, c.applied) {
		return
	}
	if len(sources) > maxSources {
		c.log.Error("too many objects, none of them is applied", "objects", len(sources), "most", maxSources)
		return
	}
	c.applied = sources
	c.objects.Store(&objects)
	c.update(sources...)
}

// reportChange has Events written about what a ConfigMap did in a swap of the table,
// which may come later than its update: with the number of backends.
func (c *configMaps) reportChange(change sourceChange) {
	objects := c.objects.Load()
	if objects == nil {
		return // it is of the mounted copy, before the API server was heard
	}
	if o, ok := (*objects)[change.id]; ok {
		c.events.reportChange(o, change)
	}
}

// reportMove has the receipt of a move written, as an Event on the first ConfigMap
// that there is: a move may be due to several, or to the number of backends.
func (c *configMaps) reportMove(m moveResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, held := range c.current {
		for _, name := range slices.Sorted(maps.Keys(held)) {
			c.events.reportMove(held[name].apiObject, m)
			return
		}
	}
}

// whyNotReady says, in words, why there is no table yet.
func (c *configMaps) whyNotReady() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var why []string
	for i, w := range c.watchers {
		switch failure := w.snapshot().failure; {
		case len(c.current[i]) > 0:
		case c.current[i] != nil && w.name != "":
			why = append(why, fmt.Sprintf("%s does not exist: kubectl -n %s create configmap %s", w.String(), w.namespace, w.name))
		case c.current[i] != nil:
			why = append(why, fmt.Sprintf("no ConfigMap has the label: kubectl -n %s label configmap NAME %s", w.namespace, w.selector))
		case failure != nil:
			why = append(why, w.String()+": "+failure.Error())
		default:
			why = append(why, w.String()+" was asked for")
		}
	}
	return strings.Join(why, "; ")
}

// watchedObject is what is known of one ConfigMap.
type watchedObject struct {
	object, uid, version string // uid and version "" if it was never there; the object may be a selector then
	absent               bool
}

// watchedObjects are those that are in force, and the names and selectors of which nothing
// was ever there.
func (c *configMaps) watchedObjects() (all []watchedObject) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range c.watchers {
		for _, name := range slices.Sorted(maps.Keys(c.current[i])) {
			m := c.current[i][name]
			all = append(all, watchedObject{m.id().String(), m.Metadata.UID, m.Metadata.ResourceVersion, m.absent})
		}
		if len(c.current[i]) == 0 {
			all = append(all, watchedObject{object: w.String(), absent: c.current[i] != nil})
		}
	}
	return all
}

// writeMetrics writes which version of each ConfigMap is in force, and which are absent.
func (c *configMaps) writeMetrics(m metricsWriter) {
	objects := c.watchedObjects()
	if len(objects) == 0 {
		return
	}
	m.family("router_watch_object_info", "gauge", "Always 1; the labels say which version of an object is in force.")
	for _, o := range objects {
		m.sample("router_watch_object_info", 1, "object", o.object, "uid", o.uid, "version", o.version)
	}
	m.family("router_watch_object_absent", "gauge", "1 if there is no such object.")
	for _, o := range objects {
		m.sample("router_watch_object_absent", boolToFloat(o.absent), "object", o.object)
	}
}
