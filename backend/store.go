package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

// stepHeader has the step of a routing change. A router sends it with each request: the
// step of the view by which this backend owns the namespace. It only rises, so the
// requests of an earlier owner have a lower one than those of the owner after it.
const stepHeader = "X-Router-Step"

const (
	maxState  = 1 << 20         // bytes of the state of a namespace
	storeTime = 5 * time.Second // one request to the store
)

// store keeps the state of each namespace for the backends, and the highest step that an
// owner of the namespace came with. A store on top of a database does the same with one
// conditional write: UPDATE ... SET state = $state, step = $step WHERE step <= $step.
type store interface {
	// load makes step the namespace's step, and then returns its state, nil if there is
	// none. From then on no owner with a lower step can save. It returns a staleError
	// if the namespace's step is higher.
	load(ctx context.Context, namespace string, step int64) (state []byte, err error)

	// save replaces the state. It returns a staleError, and keeps the state, if the
	// namespace's step is higher.
	save(ctx context.Context, namespace string, step int64, state []byte) error
}

// staleError says that a namespace has had an owner with a higher step.
type staleError struct{ seen int64 }

func (e staleError) Error() string {
	return fmt.Sprintf("the namespace has a newer owner, of step %d", e.seen)
}

// parseStep reads the step of a request: 0 without one, as of a client without a router.
func parseStep(h http.Header) (int64, error) {
	text := h.Get(stepHeader)
	if text == "" {
		return 0, nil
	}
	step, err := strconv.ParseInt(text, 10, 64)
	if err != nil || step < 0 {
		return 0, fmt.Errorf("%s: %q is not a step", stepHeader, text)
	}
	return step, nil
}

// answerStale refuses a request: 409, with the step that was seen.
func answerStale(w http.ResponseWriter, stale staleError) {
	w.Header().Set(stepHeader, strconv.FormatInt(stale.seen, 10))
	http.Error(w, stale.Error(), http.StatusConflict)
}

// entry is what a localStore keeps of a namespace, also as the JSON of its file.
type entry struct {
	Step  int64  `json:"step"`
	State []byte `json:"state"` // nil: none was saved yet
}

// localStore is a store in this process. With a directory, it also keeps each entry in a
// file there, and so survives a restart. No other process may write the directory.
type localStore struct {
	dir string // "": in memory alone

	mu      sync.Mutex
	entries map[string]entry // guarded by mu
}

func newLocalStore(dir string) *localStore {
	return &localStore{dir: dir, entries: map[string]entry{}}
}

func (s *localStore) load(_ context.Context, namespace string, step int64) ([]byte, error) {
	var state []byte
	err := s.update(namespace, step, func(e *entry) { state = e.State })
	return state, err
}

func (s *localStore) save(_ context.Context, namespace string, step int64, state []byte) error {
	return s.update(namespace, step, func(e *entry) { e.State = bytes.Clone(state) })
}

// update compares the step and changes the entry, with nothing in between. It keeps the
// file before the entry in memory: what it does not return as an error is safe.
func (s *localStore) update(namespace string, step int64, change func(*entry)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.get(namespace)
	if err != nil {
		return err
	}
	if step < e.Step {
		return staleError{e.Step}
	}
	e.Step = step
	change(&e)
	if err := s.write(namespace, e); err != nil {
		return err
	}
	s.entries[namespace] = e
	return nil
}

// get returns the entry, from its file if it is not in memory. The caller holds mu.
func (s *localStore) get(namespace string) (entry, error) {
	e, ok := s.entries[namespace]
	if ok || s.dir == "" {
		return e, nil
	}
	text, err := os.ReadFile(s.file(namespace))
	if errors.Is(err, fs.ErrNotExist) {
		return e, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	return e, err
}

// write replaces the file of the entry as a whole: a crash leaves the old one or the new
// one. The caller holds mu.
func (s *localStore) write(namespace string, e entry) error {
	if s.dir == "" {
		return nil
	}
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, "new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails if it was renamed
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.file(namespace))
}

// file is not that of another namespace, nor outside of the directory, whatever the name.
// Linux has names of 255 bytes at most: a longer one has a hash in its place, after a %
// that begins no escape.
func (s *localStore) file(namespace string) string {
	name := url.PathEscape(namespace)
	if len(name) > 200 {
		name = fmt.Sprintf("%%-%x", sha256.Sum256([]byte(namespace)))
	}
	return filepath.Join(s.dir, name+".state")
}

// storeServer serves a store to other processes:
//
//	POST /state?namespace=ns-01   load; the answer's body is the state, empty for none
//	PUT  /state?namespace=ns-01   save the body
//
// both with X-Router-Step. 409 is a staleError, with the namespace's step in the same
// field.
type storeServer struct{ store store }

func (s storeServer) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /state", s.serveLoad)
	mux.HandleFunc("PUT /state", s.serveSave)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	return mux
}

func (s storeServer) serveLoad(w http.ResponseWriter, r *http.Request) {
	step, err := parseStep(r.Header)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	state, err := s.store.load(r.Context(), r.URL.Query().Get("namespace"), step)
	if err != nil {
		answerStoreError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(state)
}

func (s storeServer) serveSave(w http.ResponseWriter, r *http.Request) {
	step, err := parseStep(r.Header)
	var state []byte
	if err == nil {
		state, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxState))
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	err = s.store.save(r.Context(), r.URL.Query().Get("namespace"), step, state)
	if err != nil {
		answerStoreError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func answerStoreError(w http.ResponseWriter, err error) {
	if stale, ok := errors.AsType[staleError](err); ok {
		answerStale(w, stale)
		return
	}
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

// serveStore is the program with -store-listen: it serves a localStore until ctx is done.
func serveStore(ctx context.Context, cfg config, log *slog.Logger) error {
	if cfg.storeDir != "" {
		if err := os.MkdirAll(cfg.storeDir, 0o700); err != nil {
			return fmt.Errorf("-store-dir: %w", err)
		}
	}
	ln, err := net.Listen("tcp", cfg.storeListen)
	if err != nil {
		return err
	}
	hs := &http.Server{
		Handler:           storeServer{newLocalStore(cfg.storeDir)}.handler(),
		ReadHeaderTimeout: headerTime,
		MaxHeaderBytes:    headerBytes,
	}
	log.Info("start", "listen", ln.Addr().String(), "directory", cfg.storeDir)
	return serveUntil(ctx, hs, ln, func() {
		bound, cancel := context.WithTimeout(context.Background(), storeTime)
		defer cancel()
		if hs.Shutdown(bound) != nil {
			hs.Close()
		}
	})
}

// httpStore is a store that a storeServer has. It is safe for concurrent use.
type httpStore struct {
	base   string // http://host:port
	client *http.Client
}

// newHTTPStore returns a store. The caller closes its idle connections.
func newHTTPStore(base string) *httpStore {
	return &httpStore{base, &http.Client{Timeout: storeTime, Transport: &http.Transport{
		MaxIdleConnsPerHost: maxSaves,
		IdleConnTimeout:     time.Minute,
	}}}
}

func (s *httpStore) load(ctx context.Context, namespace string, step int64) ([]byte, error) {
	return s.do(ctx, http.MethodPost, namespace, step, nil)
}

func (s *httpStore) save(ctx context.Context, namespace string, step int64, state []byte) error {
	_, err := s.do(ctx, http.MethodPut, namespace, step, state)
	return err
}

// do sends one request and returns the body of its answer, nil if that is empty.
func (s *httpStore) do(ctx context.Context, method, namespace string, step int64,
	state []byte) ([]byte, error) {
	target := s.base + "/state?namespace=" + url.QueryEscape(namespace)
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(state))
	if err != nil {
		return nil, err
	}
	req.Header.Set(stepHeader, strconv.FormatInt(step, 10))
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxState))
	switch {
	case resp.StatusCode == http.StatusConflict:
		seen, err := parseStep(resp.Header)
		return nil, errors.Join(staleError{seen}, err)
	case resp.StatusCode/100 != 2:
		return nil, fmt.Errorf("store: %s: %.200s", resp.Status, bytes.TrimSpace(body))
	case err != nil || len(body) == 0:
		return nil, err
	}
	return body, nil
}
