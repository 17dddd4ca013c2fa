package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

// Limits of a request, before it is a session.
const (
	headerTime  = 10 * time.Second
	headerBytes = 16 << 10

	maxReleaseBytes = 1 << 20 // of the body of a release
)

// server is the HTTP handler, and owns the sessions.
type server struct {
	// Static after construction.
	cfg   config
	log   *slog.Logger
	rooms *rooms

	running sync.WaitGroup // one for each session in the set

	// Guarded by mu.
	mu       sync.Mutex
	stopping bool // no session is added any more
	sessions map[*session]struct{}
	lastID   uint64
}

// serve listens and serves until ctx is done, then closes all sessions.
func serve(ctx context.Context, cfg config, log *slog.Logger) error {
	if err := checkPage(cfg.page); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return err
	}
	s := newServer(cfg, log)
	if cfg.store != "" {
		remote := newHTTPStore(cfg.store)
		defer remote.client.CloseIdleConnections()
		s.rooms.store = remote
	}
	return s.serve(ctx, ln)
}

// checkPage finds a mistyped -page at the start rather than in the browser.
func checkPage(file string) error {
	if file == "" {
		return nil
	}
	info, err := os.Stat(file)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a file")
	}
	if err != nil {
		return fmt.Errorf("-page %q: %w", file, err)
	}
	return nil
}

// newServer returns a server that keeps the state of namespaces in memory.
func newServer(cfg config, log *slog.Logger) *server {
	return &server{
		cfg:      cfg,
		log:      log,
		rooms:    newRooms(newLocalStore(""), cfg.saveDelay, log),
		sessions: make(map[*session]struct{}),
	}
}

// serve owns ln.
func (s *server) serve(ctx context.Context, ln net.Listener) error {
	hs := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTime,
		MaxHeaderBytes:    headerBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.log.Info("start", "listen", ln.Addr().String(), "interval", s.cfg.interval)
	return serveUntil(ctx, hs, ln, func() { s.stop(hs) })
}

// serveUntil serves ln until ctx is done, in a goroutine that it waits for. It then calls stop, which has to stop hs.
func serveUntil(ctx context.Context, hs *http.Server, ln net.Listener, stop func()) error {
	failed := make(chan error, 1)
	go func() { failed <- hs.Serve(ln) }()
	select {
	case err := <-failed: // not reached in normal life
		stop()
		return err
	case <-ctx.Done():
	}
	stop()
	<-failed
	return nil
}

// stop closes the listener, sends Close 1001 to every session at the same
// time, waits the close time for the peers, then cuts what is left. Then it saves
// the state of all namespaces. Nothing of the server runs when it returns.
func (s *server) stop(hs *http.Server) {
	open := s.refuse()
	s.log.Info("stop", "sessions", len(open))
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.closeTime)
	defer cancel()

	var byes sync.WaitGroup
	byes.Go(func() {
		if hs.Shutdown(ctx) != nil {
			hs.Close()
		}
	})
	for _, ses := range open {
		byes.Go(func() { ses.goodbye(closeGoingAway, "stop") })
	}
	cut := context.AfterFunc(ctx, func() {
		for _, ses := range open {
			ses.conn.Close() // its run does the rest
		}
	})
	s.running.Wait()
	cut()
	byes.Wait()
	s.save()
	s.log.Info("stopped")
}

// save saves the state of all namespaces, once all sessions have ended.
func (s *server) save() {
	ctx, cancel := context.WithTimeout(context.Background(), storeTime)
	defer cancel()
	if err := s.rooms.close(ctx); err != nil {
		s.log.Error("state lost", "error", err.Error())
	}
}

// refuse makes the set of sessions final and returns it.
func (s *server) refuse() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	return slices.Collect(maps.Keys(s.sessions))
}

func (s *server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// ServeHTTP is not a ServeMux, which would redirect /ws//x.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	namespace := pathNamespace(r.URL)
	switch {
	case namespace != "":
		s.serveWS(w, r, namespace, time.Now())
	case r.URL.Path == "/release":
		s.serveRelease(w, r)
	case r.URL.Path == "/healthz":
		s.serveHealth(w)
	case r.URL.Path == "/" && s.cfg.page != "":
		w.Header().Set("Cache-Control", "no-cache")
		http.ServeFile(w, r, s.cfg.page)
	default:
		http.Error(w, "not found; want /ws/<namespace>", http.StatusNotFound)
	}
}

// pathNamespace returns the namespace of /ws/<namespace>[/...], or "": the segment, decoded
// once, as the router does. A slash that is escaped is a part of it.
func pathNamespace(u *url.URL) string {
	rest, ok := strings.CutPrefix(u.EscapedPath(), "/ws/")
	if !ok {
		return ""
	}
	segment, _, _ := strings.Cut(rest, "/")
	namespace, _ := url.PathUnescape(segment) // net/http has decoded it before
	return namespace
}

func (s *server) serveHealth(w http.ResponseWriter) {
	if s.isStopping() {
		http.Error(w, "stopping", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, "ok")
}

// serveWS makes a session of an upgrade that was read at this time. After the hijack inside
// ServeHTTP the connection belongs to this function, and from start on to the session.
func (s *server) serveWS(w http.ResponseWriter, r *http.Request, namespace string, read time.Time) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
		http.Error(w, "want a WebSocket upgrade", http.StatusUpgradeRequired)
		return
	}
	if meant := r.Header.Get("X-Router-Backend"); s.isOther(meant) {
		s.answerOther(w, meant)
		return
	}
	if s.isStopping() {
		http.Error(w, "stopping", http.StatusServiceUnavailable)
		return
	}
	m, ok := s.enter(w, r, namespace)
	if !ok {
		return
	}
	t := &takeover{ResponseWriter: w, writeTime: s.cfg.writeTime}
	var ws *websocket.Conn
	handshake := websocket.Server{
		Handshake: acceptAnyone,
		Handler:   func(c *websocket.Conn) { ws = c },
	}
	handshake.ServeHTTP(t, r)
	if ws == nil { // x/net has answered 400
		t.conn.Close()
		m.leave()
		return
	}
	s.start(ws, t.conn, r, m, read)
}

// enter counts the session in the namespace's room before the handshake. If it reports
// false it has answered the request: 409 if the router's step is too low, so that it
// looks for the owner again, and 503 if there is no state.
func (s *server) enter(w http.ResponseWriter, r *http.Request, namespace string) (*member, bool) {
	step, err := parseStep(r.Header)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, false
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTime)
	defer cancel()
	m, err := s.rooms.enter(ctx, namespace, step)
	if err == nil {
		return m, true
	}
	log := s.log.With("namespace", namespace, "step", step, "error", err.Error())
	if stale, ok := errors.AsType[staleError](err); ok {
		log.Info("upgrade refused")
		answerStale(w, stale)
		return nil, false
	}
	log.Warn("cannot load")
	w.Header().Set("Retry-After", "1")
	http.Error(w, "the state of the namespace cannot be loaded", http.StatusServiceUnavailable)
	return nil, false
}

// serveRelease answers a router that gives namespaces to other owners, as of the step in
// its header. 204 says that they are released: see rooms.release.
func (s *server) serveRelease(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "want POST", http.StatusMethodNotAllowed)
		return
	}
	if meant := r.Header.Get("X-Router-Backend"); s.isOther(meant) {
		s.answerOther(w, meant)
		return
	}
	var body struct {
		Namespaces []string `json:"namespaces"`
	}
	step, err := parseStep(r.Header)
	if err == nil {
		err = json.NewDecoder(http.MaxBytesReader(w, r.Body, maxReleaseBytes)).Decode(&body)
	}
	if err == nil && step == 0 {
		err = errors.New("no " + stepHeader)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	log := s.log.With("step", step, "namespaces", len(body.Namespaces),
		"router", r.Header.Get("X-Router-Pod"))
	if err := s.rooms.release(r.Context(), body.Namespaces, step); err != nil {
		log.Warn("release failed", "error", err.Error())
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	log.Info("released")
	w.WriteHeader(http.StatusNoContent)
}

// isOther reports whether a router means another backend (RFC 9110 §15.5.20): it
// has an address that is ours by now. A server that has no name of a backend, as
// on a laptop, and a client without a router, are not judged.
func (s *server) isOther(meant string) bool {
	return meant != "" && meant != s.cfg.name && s.cfg.named
}

func (s *server) answerOther(w http.ResponseWriter, meant string) {
	http.Error(w, "this is "+s.cfg.name+", not "+strconv.Quote(meant), http.StatusMisdirectedRequest)
}

// acceptAnyone takes clients with any Origin or none, and the first of the
// subprotocols they offer: x/net refuses when several are left.
func acceptAnyone(cfg *websocket.Config, _ *http.Request) error {
	cfg.Protocol = cfg.Protocol[:min(1, len(cfg.Protocol))]
	return nil
}

// start puts a session into the set, writes the line that says who serves
// which namespace, and lets it run. With a stop in between it closes conn, with a
// release in between it sends Close 1012.
func (s *server) start(ws *websocket.Conn, conn net.Conn, r *http.Request, m *member, read time.Time) {
	router, namespace := r.Header.Get("X-Router-Pod"), m.room.namespace
	ses := &session{
		ws: ws, conn: conn, member: m, opened: read,
		interval: s.cfg.interval, closeTime: s.cfg.closeTime,
		next: message{Server: s.cfg.name, NS: namespace, Router: router},
	}
	id, ok := s.add(ses)
	if !ok {
		conn.Close()
		m.leave()
		return
	}
	ses.log = s.log.With("session", id, "namespace", namespace)
	ses.log.Info("session open", "router", router, "table", r.Header.Get("X-Router-Table"), "step", m.step,
		"opened", read.Format(time.RFC3339Nano), "remote", conn.RemoteAddr().String(),
		"proto", r.Header.Get("X-Forwarded-Proto"), "for", r.Header.Get("X-Forwarded-For"))
	release := func() { ses.goodbye(closeRestart, "released") }
	if !m.begin(release) {
		release()
	}
	go s.runSession(ses)
}

func (s *server) runSession(ses *session) {
	defer s.running.Done()
	ses.run()
	ses.member.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ses)
}

// add counts the session as running: runSession must follow.
func (s *server) add(ses *session) (id uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return 0, false
	}
	s.running.Add(1)
	s.sessions[ses] = struct{}{}
	s.lastID++
	return s.lastID, true
}
