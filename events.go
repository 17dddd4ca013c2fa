package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strconv"
	"time"
)

// list asks for the object without a resourceVersion, which is the consistent
// read, applies it, and returns the resourceVersion to watch from. The answer
// must be a whole list: one that means nothing, such as {}, must not read as
// "there is none".
func (w *watcher[T]) list(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	body, err := w.kube.get(ctx, w.path, w.query())
	if err != nil {
		return "", err
	}
	defer body.Close()
	raw, err := io.ReadAll(&cappedReader{r: body, limit: maxObject})
	if err != nil {
		return "", err
	}
	var list struct {
		Kind     string `json:"kind"`
		Metadata meta   `json:"metadata"`
		Items    []T    `json:"items"`
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return "", err
	}
	if list.Kind != w.kind+"List" || list.Metadata.ResourceVersion == "" || list.Metadata.Continue != "" || len(list.Items) > 1 {
		return "", fmt.Errorf("kind %.60q, resourceVersion %.60q, continue %.60q, %d items; want a whole %sList of at most one",
			list.Kind, list.Metadata.ResourceVersion, list.Metadata.Continue, len(list.Items), w.kind)
	}
	if len(list.Items) == 0 {
		w.gone()
		return list.Metadata.ResourceVersion, nil
	}
	item := &list.Items[0]
	w.header(item).Kind = w.kind // items of a list have none
	return list.Metadata.ResourceVersion, w.take(item, false)
}

// query selects the object. Only with this selector does a Role that names the
// object allow list and watch
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#referring-to-resources).
func (w *watcher[T]) query() url.Values {
	return url.Values{"fieldSelector": {"metadata.name=" + w.name}}
}

// watch applies events until the stream ends. A clean end is no error, and does
// not mean that nothing was missed; it makes the cycle healthy if the stream
// brought something, as does a life of healthyWatch. timeoutSeconds is the
// server's; the context is for a server, or a network, that no longer keeps it.
// There is no limit on how long the headers take: some proxies hold them back
// until the first event (kubectl#628).
func (w *watcher[T]) watch(ctx context.Context, version string) error {
	timeout := watchMin + rand.N(watchMax-watchMin)
	ctx, cancel := context.WithTimeout(ctx, timeout+watchGrace)
	defer cancel()
	query := w.query()
	query.Set("watch", "1")
	query.Set("resourceVersion", version)
	query.Set("timeoutSeconds", strconv.Itoa(int(timeout.Seconds())))
	query.Set("allowWatchBookmarks", "true")
	w.enter(stateConnecting)
	body, err := w.kube.get(ctx, w.path, query)
	if err != nil {
		return err
	}
	defer body.Close()
	w.enter(stateWatching)
	defer time.AfterFunc(healthyWatch, w.worthwhile).Stop()
	before := w.applied
	if err := w.follow(body); err != io.EOF {
		return err
	}
	if w.applied != before {
		w.worthwhile()
	}
	return nil
}

// follow applies the events of a stream until its end, which is io.EOF if it is
// clean. One decoder reads all of it: events come in pieces and several at a
// time.
func (w *watcher[T]) follow(body io.Reader) error {
	stream := &cappedReader{r: body, limit: maxObject}
	decoder := json.NewDecoder(stream)
	for {
		if err := w.next(decoder); err != nil {
			return err
		}
		stream.limit = decoder.InputOffset() + maxObject
	}
}

// next reads and applies one event. A stream cut within one is not io.EOF.
func (w *watcher[T]) next(decoder *json.Decoder) error {
	var event struct {
		Type   string          `json:"type"`
		Object json.RawMessage `json:"object"`
	}
	if err := decoder.Decode(&event); err != nil {
		return err
	}
	switch event.Type {
	case "BOOKMARK":
		w.confirm(func(*watchStatus) {})
		return nil
	case "ERROR": // also the 410 of a watch: an event in a 200 (kubernetes#35068)
		no := &status{}
		return cmp.Or(json.Unmarshal(event.Object, no), error(no))
	case "ADDED", "MODIFIED", "DELETED":
		o := new(T)
		if err := json.Unmarshal(event.Object, o); err != nil {
			return err
		}
		return w.take(o, event.Type == "DELETED")
	}
	return fmt.Errorf("event of type %.60q, want ADDED, MODIFIED, DELETED, BOOKMARK or ERROR", event.Type)
}

// verify checks that o is the object that was asked for.
func (w *watcher[T]) verify(o *T) error {
	kind, m := w.header(o).Kind, w.header(o).Metadata
	if kind != w.kind || m.Name != w.name || m.Namespace != w.namespace || m.UID == "" || m.ResourceVersion == "" {
		return fmt.Errorf("%.60q %.260q/%.260q with uid %.60q and resourceVersion %.60q, want %s with both",
			kind, m.Namespace, m.Name, m.UID, m.ResourceVersion, w.what())
	}
	return nil
}

// take applies o unless it was applied already or is deleted. resourceVersions
// are compared for equality only: after a restored etcd a smaller one is newer.
func (w *watcher[T]) take(o *T, deleted bool) error {
	if err := w.verify(o); err != nil {
		return err
	}
	if deleted {
		w.gone()
		return nil
	}
	if m := w.header(o).Metadata; m != w.applied {
		w.apply(o)
		w.applied = m
	}
	w.confirm(func(s *watchStatus) { s.absent, s.version = false, w.applied.ResourceVersion })
	return nil
}

// gone notes that there is no such object, which changes nothing that was
// applied (invariant 4).
func (w *watcher[T]) gone() {
	was := false
	w.confirm(func(s *watchStatus) { was, s.absent = s.absent, true })
	if !was {
		w.log.Warn("there is no such object, what was applied stays in force", "object", w.what(),
			"version", cmp.Or(w.applied.ResourceVersion, "none"))
	}
}

var errTooBig = fmt.Errorf("an object of more than %d bytes", maxObject)

// cappedReader fails once limit bytes were read. Its reader moves the limit on
// with each object, so that it bounds one object and not the stream.
type cappedReader struct {
	r           io.Reader
	read, limit int64
}

func (c *cappedReader) Read(b []byte) (int, error) {
	if c.read >= c.limit {
		return 0, errTooBig
	}
	n, err := c.r.Read(b[:min(int64(len(b)), c.limit-c.read)])
	c.read += int64(n)
	return n, err
}
