// Router sends each WebSocket to the backend that owns its namespace.
//
// A client opens /ws/<namespace>. The owner of the namespace, a pod of a
// StatefulSet, is the override in a ConfigMap if there is one, else the
// namespace's hash. The router opens the same path there and from then on
// carries bytes. When the table of overrides changes, the sessions whose owner
// changed are closed, at a pace, and only these.
//
//	client ─TLS─ nginx ─unix socket─ net/http ── proxy: check, own, dial, handshake, hijack ── relay ── backend-N
//	                                                │                │
//	                                       route: owner(namespace)  backends: backend-N to address, ready
//	                                                │                │
//	                        watch or dir: overrides, number    watch, DNS or a list
//
// What always holds:
//
//  1. A table is never nil once ready and never changes: an update swaps the
//     pointer. A lookup takes no lock and allocates nothing.
//  2. A namespace never has two owners: the same overrides and the same number
//     of backends give the same owner on every router, in every release. What also
//     depends on the tables before is a table's stamp, which backends get.
//  3. What cannot be read changes nothing: the namespace of a malformed
//     override stays where it was, or is refused if that is not known; all
//     other overrides apply.
//  4. A deleted ConfigMap changes nothing, and a router that starts without
//     one is not ready. "No overrides" is a ConfigMap with empty data. Of those
//     that a selector chooses this holds for the last.
//  5. An API server that is gone changes nothing for clients.
//  6. No byte is lost or reordered from hijack to end.
//  7. An owner that does not answer is waited for up to a bound, then 503.
//     Never another backend.
//  8. After the hand-over only the relay touches the two sockets. A session
//     ends once, with one cause, counted and logged once.
//  9. A slow reader stops its own session only, with bounded memory.
//  10. A move or drain ends a session by Close frames where frames end, first to
//     the backend, then to the client. What cannot be ended so in time is cut.
//  11. Every goroutine has an owner that waits for it.
//
// Read main, command and config (what starts), admin (what operators ask), fastpath,
// proxy, handshake and listen (from client to session), configmap, directory, events
// and move (what a change of overrides does), route, overrides and hash (who owns),
// discovery, backends, watch and kube (where owners are), relay and websocket (the
// life of a session), log and metrics, and wait (a back-off, a sleep, a wake-up). A
// file uses only those after it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // a log whose reader is gone is no reason to end all sessions
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // the second signal kills
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "router:", err)
	}
	os.Exit(exitCode(err))
}

// exitCode is 0 for a normal end and help, 2 for an error in the flags or the
// environment, 1 for any other.
func exitCode(err error) int {
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &usage):
		return 2
	}
	return 1
}

// run is the program: it serves until ctx ends, then drains, or runs a command.
// Logs go to stdout, which is waited for at the end only, for logFlushTimeout at most.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	if handled, err := runCommand(ctx, args, stdout); handled {
		return err
	}
	c, err := parseConfig(args, getenv, stdout)
	if err != nil {
		return err
	}
	queue := newLogQueue(stdout)
	log, err := newLogger(queue, c.logFormat, c.logLevel)
	if err != nil {
		return err
	}
	go queue.run(log)
	defer queue.stop()
	p, err := newProgram(c, getenv, log)
	if err != nil {
		return err
	}
	p.admin.logQueue = queue
	clientListener, err := listen(c.listen, c.tcpUserTimeout)
	if err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	defer clientListener.Close()
	adminListener, err := listen(c.admin, c.tcpUserTimeout)
	if err != nil {
		return fmt.Errorf("-admin: %w", err)
	}
	defer adminListener.Close()
	return p.serve(ctx, clientListener, adminListener)
}

// program is the router's parts, wired.
type program struct {
	config  *config
	fdLimit *descriptorLimit
	proxy   *proxy
	mover   *mover
	tasks   []func(context.Context) // where overrides and backends come from; each runs until its context ends
	admin   *admin
	log     *slog.Logger
}

// newProgram makes the parts that c asks for, which do nothing before serve.
func newProgram(c *config, getenv func(string) string, log *slog.Logger) (*program, error) {
	kubeClient, namespace, err := c.kubeClient(getenv)
	if err != nil {
		return nil, err
	}
	backends, err := c.staticBackends()
	if err != nil {
		return nil, err
	}
	relay := newRelay(func(ordinal int) string { return backendName(c.statefulSet, ordinal) }, log)
	var mover *mover // the endpointWatcher uses it when it runs
	var endpoints *endpointWatcher
	if backends == nil {
		endpoints = newEndpointWatcher(*kubeClient, namespace, c.statefulSet, c.service, c.backendPort,
			func(uids map[int]string) {
				if relay.setPods(uids) {
					mover.ownersChanged()
				}
			}, log)
		backends = endpoints.backends()
	}
	backends.dialer = newDialer(c.tcpUserTimeout)
	maxFiles, err := openFileLimit()
	if err != nil {
		return nil, err
	}
	fdLimit, err := newDescriptorLimit(maxFiles, backends.static.count)
	if err != nil {
		return nil, err
	}
	router := &router{statefulSet: c.statefulSet, fromHost: c.namespaceFrom == "host", backends: backends.static, log: log}
	relay.freeDescriptors = func(descriptors int) { fdLimit.add(-descriptors) }
	probe := func(ctx context.Context, backend int) error {
		_, err := backends.probe(ctx, backend)
		return err
	}
	mover = newMover(router, relay, c.moveRate, probe, log)
	mover.settleTime = c.moveSettle
	router.onSwap = func() { mover.ownersChanged(); backends.queues.recheckOwners() }
	p := &program{config: c, fdLimit: fdLimit, mover: mover, log: log}
	p.proxy = &proxy{
		router: router, backends: backends, relay: relay, mover: mover,
		limits: c.limits, podName: c.podName, namespace: pathNamespace, log: log,
	}
	if router.fromHost {
		p.proxy.namespace = hostNamespace
	}
	p.admin = &admin{proxy: p.proxy, fdLimit: fdLimit, started: time.Now()}
	p.addSources(kubeClient, namespace, endpoints)
	return p, nil
}

// addSources sets up the sources of overrides, and with pods that of their number.
func (p *program) addSources(kubeClient *kubeClient, namespace string, endpoints *endpointWatcher) {
	router := p.proxy.router
	if endpoints != nil {
		p.admin.replicaWatcher = newReplicaWatcher(*kubeClient, namespace, endpoints, func(backends ordinals, revision string) {
			p.fdLimit.setBackends(backends.count)
			router.setBackends(backends, revision)
		}, p.log)
		p.tasks = append(p.tasks, endpoints.watcher.run, p.admin.replicaWatcher.watcher.run, p.admin.replicaWatcher.keepActiveCount)
	}
	if kubeClient != nil {
		router.addSource(false, func(update func(...sourceContent)) overrideSource {
			c := newConfigMaps(*kubeClient, namespace, p.config.configMaps, p.config.selector, p.config.podName, update, p.log)
			p.admin.configMaps, p.mover.onFinished = c, c.reportMove
			return c
		})
	}
	if path := p.config.overrides; path != "" {
		router.addSource(kubeClient != nil, func(update func(...sourceContent)) overrideSource {
			return &directory{path: path, update: update, log: p.log}
		})
	}
	for _, source := range router.sources {
		p.tasks = append(p.tasks, source.run)
	}
}

// serve runs everything until ctx ends or clients cannot be listened to, then stops it in
// order: first no new sessions, then the sessions end, then the rest.
func (p *program) serve(ctx context.Context, clientListener, adminListener net.Listener) error {
	if err := p.proxy.relay.start(); err != nil {
		return err
	}
	background, stopBackground := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, task := range append(p.tasks, p.mover.run, p.proxy.freeMemory) {
		running.Go(func() { task(background) })
	}
	if idle := p.config.idleTimeout; idle > 0 {
		running.Go(func() { p.proxy.relay.endIdle(background, idle) })
	}
	requests, stopRequests := context.WithCancelCause(context.Background())
	clientServer := newClientServer(requests, p.proxy, p.log)
	adminServer := p.admin.server(p.log)
	failed := make(chan error, 1)
	fastPath := newFastPath(p.proxy, clientListener, p.fdLimit)
	running.Go(fastPath.run)
	running.Go(func() { failed <- clientServer.Serve(fastPath) })
	running.Go(func() { adminServer.Serve(newAdminListener(adminListener, p.log)) }) // until Close
	p.log.Info("serving", "version", version(), "listen", clientListener.Addr().String(), "admin", adminListener.Addr().String(),
		"pod", p.config.podName, "backends", p.proxy.backends.static.count, "kube", p.config.kube)
	if maxSessions := p.fdLimit.maxSessions(); maxSessions < p.config.limits.sessions {
		p.log.Warn("the open files allow fewer sessions than -max-sessions",
			"sessions", maxSessions, "max", p.config.limits.sessions, "files", p.fdLimit.maxFiles)
	}

	var err error
	select {
	case <-ctx.Done():
		p.announceDrain()
	case err = <-failed:
	}
	p.stopClients(fastPath, clientServer, stopRequests)
	stopBackground()
	adminServer.Close()
	running.Wait()
	p.proxy.backends.close()
	return err
}

// announceDrain makes the router not ready while it still accepts clients: load
// balancers need time to notice.
func (p *program) announceDrain() {
	p.admin.draining.Store(true)
	p.log.Info("draining", "sessions", p.proxy.relay.size(),
		"delay", p.config.drainDelay.String(), "time", p.config.drainDuration.String())
	time.Sleep(p.config.drainDelay)
}

// stopClients ends what clients have: nothing new is accepted, upgrades under
// way are answered, and sessions are closed at a pace. A client whose request net/http
// has not given to the handler when Shutdown begins would get no answer, so those that
// the event loop has left to it are waited for.
func (p *program) stopClients(fastPath *fastPath, clientServer *http.Server, stopRequests context.CancelCauseFunc) {
	started := time.Now()
	clientServer.SetKeepAlivesEnabled(false) // from here on each answer says that it is the last
	fastPath.stop()
	stopRequests(errDraining)
	timeout, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	handled, allHandled := context.WithCancel(timeout)
	go func() { p.proxy.unhandled.Wait(); allHandled() }() // at the latest when clients are closed
	<-handled.Done()
	clientServer.Shutdown(timeout) // it does not wait for hijacked connections (golang/go#17721)
	clientServer.Close()           // for answers that took longer than the bound
	p.proxy.inFlight.Wait()
	ended := drain(context.Background(), p.proxy.relay, p.config.drainDuration)
	p.proxy.relay.stop()
	p.log.Info("stopped", "sessions", ended, "seconds", time.Since(started).Seconds())
}

// newClientServer returns the server of clients. ctx bounds the requests until they
// are hijacked or answered.
func newClientServer(ctx context.Context, p *proxy, log *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:           p,
		ReadHeaderTimeout: p.limits.headerTimeout,
		IdleTimeout:       p.limits.headerTimeout,
		MaxHeaderBytes:    p.limits.headerBytes,
		Protocols:         protocols,
		ErrorLog:          serverLog(log),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			front := c.(*clientConn)
			front.serverCtx = ctx
			front.count(&p.unhandled)
			return context.WithValue(ctx, clientConnKey{}, c)
		},
	}
}
