// Router sends each WebSocket, and each plain HTTP request, to the backend that owns its
// namespace.
//
// A client opens /ws/<namespace>, or another URL with a namespace. A pod of a
// StatefulSet owns the namespace: the pod that an override in a ConfigMap names, else
// the pod that the namespace's hash chooses. The router opens the same path on that pod
// and from then on carries bytes. Owners change with the overrides, the number of backends
// and the cordon. Then the router closes, at a limited rate, the sessions whose owner
// changed. It also closes the sessions of a replaced pod, and sessions as old as -max-age. All
// others stay. A namespace opens with its new owner when all its sessions and requests with the
// previous one are over, or with -handoff=off at once.
//
//	client
//	  │ TLS
//	nginx; or, with -tls-cert, no nginx: the fast path or net/http terminates TLS
//	  │ Unix socket
//	fast path (Linux); net/http for all else: other requests and answers, what takes long
//	  │
//	proxy ── who owns the namespace? ── mover ───── tables ── ConfigMaps, a directory
//	  │ ──── where is the owner? ────── backends ── EndpointSlices, DNS or a list
//	  │ handshake with the owner
//	relay ── carries the session's bytes
//	  │
//	backend-N
//
// Words:
//
//	namespace      the tenant's key in the URL; a namespace of Kubernetes is always written
//	               "Kubernetes namespace"
//	owner          the backend that gets the requests of a namespace
//	override       an entry of a ConfigMap, or a file, that names the owner of a namespace
//	cordon         the backends to which the hash gives no namespaces; unlike with kubectl's
//	               cordon, the sessions of these namespaces move away
//	scaled in      of a backend: the newest table gives it nothing, as there are fewer backends,
//	               or the first one has another ordinal
//	table          what gives each namespace its owner
//	in force       of overrides, a cordon, a certificate: the router goes by them, and not by
//	               what it has refused; of a view: clients get the owners that it says
//	invalid        of an override: its value names no backend of the table, or no namespace can
//	               have its key
//	rejected       of an override: it is invalid, or in conflict with another source's
//	kept           of a namespace: its override is rejected, and its owner stays
//	unresolved     of a kept namespace: this router does not know its previous owner, or that was
//	               scaled in
//	stamp          a hash of a table: where it is the same, all owners are the same
//	ownersHash     such a hash without the owners of kept namespaces
//	upgrade        a request for a WebSocket
//	session        the WebSocket that comes of it, as the router carries it
//	plain request  no upgrade
//	flight         a request that a backend may have, or a session that this router has ended
//	               and its backend has not
//	lost           of a connection: it has failed, and its peer may not know that and go on; one
//	               that the peer has reset is not lost
//	abandon        to give the connection to a backend that may go on to a flight: it sends a
//	               FIN, and waits for the backend's, at most -handoff-proof-timeout
//	cut            ended by the router before its time: a plain request, or the closing
//	               handshake of a session
//	move           to close a session, so that its client comes back: because its owner changed,
//	               or the owner's pod, or because the router was removed from the members. Also
//	               all moves of sessions to one table (log "move finished")
//	old pod        a pod of a backend that another pod has replaced
//	release        the request to an old owner to store the state of namespaces (-release)
//	change         the time and the work from a new table until clients get its owners
//	tally          the counts of the moves to one table, while they go on
//	receipt        what is kept of a tally for operators, when the moves are over
//	proof          that a backend has ended its side of a connection: the router has seen it
//	hand-off       what gives namespaces to their next owners, and never to two at once
//	step           a part of a change: it hands over some namespaces together. Also its number,
//	               which only rises; backends get it as X-Router-Step, a fencing token
//	preview        what a change of overrides or backends would do ("router plan", /plan); it is
//	               no plan of the hand-off
//	place          of a namespace: where it is in the order in which namespaces move
//	slot           of a limit: one of the requests or sessions that it allows; of a poller:
//	               where an event finds its session
//	held           of a namespace: it is handed over, and its clients wait. A client is also held
//	               (-hold) while its owner cannot be reached
//	away           of a new owner: it takes no connections yet, so its namespaces stay
//	plan           how far a change has come: its last step, and a record for each table
//	record         a table in a plan, with two marks: before the last step, and after it
//	mark           says which namespaces have moved to the table of a record
//	behind         of a new owner: it was away, so others have got more of their namespaces
//	view           a plan with its tables: it says who owns each namespace now
//	member         a router whose pod the plan names: each step waits for its answer
//	               (-handoff=all). Its process gets clients only if the plan names that too
//	object         of the hand-off: the ConfigMap with the plan and the members' answers
//	answer         what a member says: its part of a step is done, and what may be next
//	epoch          all plans since the first one, or since the last reset of the object
//
// What always holds (comments cite these by number, as "invariant 2"):
//
//  1. A table never changes: an update swaps the pointer to it. Once there is a
//     table, the pointer is never nil. A lookup takes no lock and allocates nothing.
//  2. A table gives a namespace one owner: the same overrides, the same backends (the first
//     ordinal and their number) and the same cordon give the same owner on every router, in
//     every version with the same hashVersion. Where an override is invalid, the owner of its
//     namespace depends on earlier tables too; a table's stamp, which backends get as a header,
//     shows where two routers differ in that. While one table replaces another, a namespace never
//     has two owners at once. Sessions count, and also requests that a backend may have
//     received. With -handoff=all this holds for all routers together, with -handoff=single
//     for each router by itself, with -handoff=off not at all.
//  3. An invalid override changes nothing: its namespace keeps its previous owner. If a router
//     does not know that owner, or it was scaled in, the router refuses the namespace. All
//     other overrides apply. An invalid cordon changes nothing either: the last valid one
//     stays in force. A router that does not know the last cordon is not ready. With -handoff=all it
//     becomes ready once no other router has that cordon in force.
//  4. A deleted ConfigMap changes nothing, and a router that starts without one is
//     not ready. "No overrides" is a ConfigMap with empty data, or -kube none without
//     -overrides. With a selector, this holds for the last ConfigMap that it chooses.
//  5. An API server that is down changes nothing for clients. But with -handoff=all no step
//     ends meanwhile: if one is under way, the clients of its namespaces get 503 after -hold.
//  6. No byte of a session is lost or reordered between its 101 and its end. But a side gets
//     nothing after the router's Close frame, and with relay_portable.go (systems other than
//     Linux, and 386) the last bytes before a reset may be lost.
//  7. If an owner cannot be reached, its clients wait up to a bound and then get 503.
//     They never get another backend.
//  8. Once the relay has taken a session over, only it touches the two sockets. At the end, or
//     when the backend does not answer a Close frame, it may give the backend's socket to a
//     flight. A session ends once, with one cause, and is counted and logged once.
//  9. A slow reader stops its own session only. The memory of each session is bounded.
//  10. A move, a drain or -max-age ends a session with Close frames, each at the end of a
//     frame: first to the backend, then to the client. A session that does not end so in
//     time is cut.
//  11. Each goroutine that the router starts has an owner that waits for it, for a bounded
//     time at the stop.
//
// The way of one connection, each step a function; "(as x)" says that it is called by the name
// x, "(in x)" that x calls it. On the fast path, which takes a request whose head comes in one
// piece (with TLS, within a moment):
//
//	fastPath.acceptClients    accepts a client
//	fastPath.startClient      gives it a goroutine
//	fastConn.serve            is that goroutine
//	fastConn.readHead         reads the request: by read, or with -tls-cert by readTLSHead
//	fastConn.readTLSHead      reads it within TLS, by the next seven:
//	fastConn.readHello        reads what comes first: a header, or the beginning of the handshake
//	fastConn.readProxyHeader  (also without TLS) takes the client's address from a header
//	fastConn.setTLSHandshaking  gives the handshake stopGrace more if the router stops meanwhile
//	fastConn.startTLS         does the handshake
//	tlsServer.handshake       counts it
//	tlsServer.compute         calls crypto/tls when it is the handshake's turn (takeTurn)
//	fastConn.readTLS          reads the request within TLS
//	fastConn.admit            parses the request
//	proxy.admit               checks it, finds the owner, and counts it in the limits
//	relay.oldPodSessionsDone  says whether the namespace has sessions with an old pod: then
//	                          park is next
//	dialQueues.tryDial        says whether the owner can be dialled now; else park is next
//	fastConn.dialOwner        dials the owner
//	backends.dialInTurn       finds its address, calls connect, and then lets others dial
//	fastConn.connect          connects to the address
//	fastConn.askOwner         sends the owner the request, and reads its 101
//	fastConn.fallBack         leaves the client to net/http if one of these cannot go on
//	fastConn.close            closes it if it is gone after its admission, or if TLS or a read has
//	                          failed
//
// A client whose owner cannot be dialled now waits in a queue, where it has no goroutine.
// One whose namespace is held, or whose owner this router does not know, waits in the queue
// queueHeld, which is never ready. The client leaves it when the owner is known and gets clients.
//
//	fastConn.park             begins that
//	proxy.recheckOwner        finds the owner again, and waits for sessions with its old pod
//	dialQueues.enqueue        puts the client into the owner's queue
//	fastConn.unpark           starts a goroutine when it may dial, the owner has changed, or it
//	                          cannot wait any longer
//	fastConn.resume           is that goroutine: it goes on with dialOwner, park or fallBack
//
// A client that falls back takes with it what it has sent and what was admitted. A request
// that admit has refused (checkUpgrade refuses each plain request) begins anew at
// ServeHTTP. If the owner has the request, the owner's connection goes to completeUpgrade, with what
// it has answered: mostly nothing within fastPathTimeout, else another answer than a 101, or
// one that is longer than maxFastResponse.
//
//	fastPath.handToHTTP       waits until net/http takes the client
//	fastPath.Accept           gives it to net/http, which reads the request
//	clientConn.serverCtx      is a field: it is set then, and ends when the router stops
//	lazyTransport.handshake   does the TLS handshake before, if the fast path has not
//	proxy.ServeHTTP           answers a health check, forwards a plain request, or goes on
//	proxy.upgrade             takes what admit has returned on the fast path, or calls it
//	proxy.requestContexts     bounds the wait for the owner
//	proxy.askOwners           asks the owner, and again when another one has to be asked
//	proxy.dialOwner           dials it when it may get requests of the namespace
//	backends.dialWhenReady    repeats the next three until the owner is connected
//	proxy.recheckOwner        (as recheck) finds the owner, as above
//	dialQueues.wait           waits in the owner's queue
//	backends.dialInTurn       dials the owner, as above
//	proxy.completeUpgrade     does the handshake with the owner
//	proxy.passResponse        gives the client an answer of the owner that is not a 101
//
// Both ways go on with these steps. startFlight comes just before the request is sent, the
// others after the owner's 101.
//
//	proxy.startFlight         calls mover.startFlight, and keeps the flight and the owner that
//	                          it returns
//	mover.startFlight         begins a flight, and asks once more who the owner is
//	proxy.newSession          asks again (shouldMove): until now the client can go elsewhere
//	fastConn.respond, proxy.hijack  send the client the 101
//	proxy.openSession         begins the session, ends the flight, and asks shouldMove again
//	pendingRequest.uncount    ends the count of the upgrade in its limits
//	poller.promote            (as start) gives the session a fastConn's slot in the event loop
//	relay.startSession        (as start) in place of that: takes over both connections
//	engine.assign             (in startSession) chooses the poller
//	relay.register            counts the session
//	engine.carry              (in startSession) takes the sockets from package net
//	poller.carry              makes the event loop carry the bytes
//	poller.run                is the event loop: it calls poll when there are events
//	poller.poll               takes them
//	poller.handleEvent        finds the session of an event
//	poller.handle             calls the next two, as the event says
//	poller.flushUnsent        sends a side what was kept for it
//	poller.readReady          reads a side until nothing is left, but at most 4 times
//	poller.readOnce           reads once, and sends that to the other side
//	poller.spliceIn, poller.spliceOrKeep  do so for large frames, through a pipe
//	poller.readTLS, poller.sendTLS  do so for a client with TLS
//	poller.sendOrKeep         sends, and keeps what the other side does not take
//	poller.sideEnded          passes the end of a side on to the other one
//	poller.endIfDead          finds out that both have ended
//	poller.endComplete        ends the session, after close_notify to a client with TLS
//	poller.end                closes both sockets, or leaves the backend's to the next one if
//	                          the router waits for its end (relay.waitsForEnd)
//	relay.abandonBackend      makes a flight of a backend that has not ended its side
//	relay.backendFailed       does so for a backend whose connection was lost
//	flight.abandon            waits until the backend has, at most for -handoff-proof-timeout
//	poller.unlockAndReport    calls sessionEnded
//	relay.sessionEnded        counts and logs the end
//
// With relay_portable.go there is no fast path and no event loop. net/http serves all
// clients, and each session has two goroutines. In place of fastPath, engine and poller above:
//
//	clientListener.Accept     gives net/http a client
//	engine.assign             gives the session its connections
//	engine.carry              starts a goroutine for each direction
//	engine.copy               is that: the second one to end ends the session
//	engine.copyFrom           reads a side until it ends, and passes that on to the other one
//	session.scan              finds the ends of frames
//	session.send              sends what was read to the other side
//	session.continueClose     ends the session when its closing handshake is over
//	session.end               closes both connections; as above, a flight may get the backend's
//
// A plain HTTP request, from ServeHTTP on:
//
//	proxy.forward             begins the exchange, and answers what is refused
//	proxy.admitPlain          does what admit does for an upgrade
//	exchange.serve            passes on the answer that trip returns
//	proxy.roundTrip           (as trip) takes an idle connection to the owner, or dials it
//	proxy.startFlight         asks once more who the owner is, just before the request
//	exchange.ask              sends the owner the request, and reads the head of its answer
//	proxy.checkAnswer         (in trip) says whether the owner has refused it by 421 or 409
//	exchange.takeBack         if so, ends the flight, and lets roundTrip ask again
//	answerBody.Read           sees the end of the answer
//	exchange.answerOver       ends the flight and keeps the connection, or abandons both
//	exchange.breakOff         abandons both: the answer does not come to its end
//	exchange.finish           counts the request
//
// From a change of a ConfigMap to the last move:
//
//	watcher.run               repeats listAndWatch
//	watcher.listAndWatch      does a LIST, and then a WATCH until that ends
//	watcher.list              gets all objects
//	watcher.applyEvent        gets one object: decodeEvent decodes the event
//	watcher.setObjects        calls apply if an object has changed
//	configMaps.apply          keeps the newest version of each ConfigMap
//	configMaps.applyAll       gives the overrides of all of them to update
//	tableStore.setContents    (as update) takes the contents of one source
//	tableStore.mergeContents  collects the contents of all sources, once each has given its own
//	tableStore.updateVersions ends the way here if only versions have changed
//	replicaWatcher.run        another entry: the number of backends, or the cordon, changed
//	tableStore.setBackends    (in onBackendsChanged) takes them, and calls swap
//	tableStore.swap           makes a new table the newest
//	newTable                  merges the contents, and decides which overrides are in force
//	relay.setPods             another entry: a pod was replaced
//	mover.tableOrPodChanged   (as onSwap) wakes run. Without -handoff=all it also puts the first
//	                          view in force, and with -handoff=off each view
//	mover.run                 calls prepareNewest for a new table, and advance after each event
//	mover.prepare             begins to move sessions to the table
//	mover.restartSettling     sets when -move-settle is over, if no other change comes
//	mover.requeue             lists the sessions that have to move
//	moveTargets.addMissing    starts to dial their new owners
//	moveTargets.dial          dials a new owner until it takes a connection
//	mover.handleDialResult    notes each result, in run
//	mover.leaveOldPods        moves the sessions whose pod was replaced: they wait for no step
//	mover.advance             repeats work, decide and adopt
//	mover.work                calls workOnStep, if there is a step; when that is over, propose
//	mover.propose             says how far the next step may go
//	mover.mayMove             (in updatePace) says if -move-settle is over, and all were dialled
//	moveQueue.split           chooses as many sessions as the rate allows
//	mover.workWithoutStep     (in work) in place of propose, when no step has to come any more. With
//	                          -handoff=off none ever comes, and closeWithoutStep moves all
//	mover.closeWithoutStep    calls split, and moves the sessions that are left
//	mover.decideAlone         (in decide) ends a step that is over, and begins the next one
//	view.next                 makes the view in which the namespaces of the step are held
//	mover.adopt               puts it in force: from now on their clients wait
//	mover.dequeueForStep      takes the sessions of the step from the queue
//	mover.workOnStep          closes what the step waits for, and reports whether it is over
//	mover.closeStepSessions   closes its sessions, and looks for flights under way
//	mover.moveSession         closes one session
//	moveTally.close           counts it
//	session.closeGracefully   (as closeSession) begins the closing handshake
//	session.startClose        starts its timer, once the session has its sockets
//	poller.continueClose      does what is possible of it now, and after each event
//	poller.scan               finds the ends of frames in what came from a side
//	closingHandshake.insertClose  puts a Close frame where one may stand
//	mover.cutRequests         cuts the plain requests that have lasted too long
//	relay.shouldAbandon       says whether a backend that does not answer is reset, or abandoned
//	relay.setBackendDone      notes that the session is no reason any more to wait for its backend
//	mover.somethingEnded      (as onBackendDone, and onEnd of flights) wakes run
//	stepReleases.releaseAll   asks the old owners to store the state, with -release
//	mover.adopt               opens the namespaces with their new owners
//	dialQueues.recheckOwners  (in onViewChanged) wakes their clients
//	mover.reportFinished      logs the result, after the last step
//
// With -handoff=all the routers agree on each step in one object. These replace decideAlone and
// view.next; all else stays:
//
//	sharedHandoff.decideAndStart    begins the write or the LIST that member.decide asks for
//	sharedHandoff.takeInbox         takes the newest version of the object
//	member.decide                   says to adopt its plan, list, end all, write, or wait:
//	member.bootstrap, member.reset  where there is no plan, or one that is not to be trusted
//	member.leave                    when the router ends; else the first of these five that is due:
//	member.join                     makes this router a member
//	member.sendAnswer               says what is done here, and how far the next step may go
//	  member.answerWithStep         does so in one write with the next step, if that can begin now
//	member.remove                   removes a member that has ended for ever
//	member.storeRange               stores which backends own namespaces
//	member.writeStep                makes the next step, when all have answered: by the next three
//	  member.writeStepWith          checks that they have, and have the same table
//	  handoffObject.agreedLimit     says how far all members let that go
//	  view.nextPlan                 makes its plan
//	member.commit                   notes what is about to be done
//	sharedHandoff.startRequest      does it in a goroutine
//	sharedHandoff.write             patches the object
//	sharedHandoff.listPods          lists the object and then the router pods
//	sharedHandoff.askPods           asks whether members that do not answer are gone
//	sharedHandoff.apply             gets the object that the write has made, from the watcher, and
//	                                wakes run
//	member.viewOf                   makes the view of the plan
//
// Then work closes the sessions of the step, sendAnswer says so, and reportFinished logs the
// result at the end. A step is done when no answer is missing, or when the next step comes, with
// the last answer.
//
// A goroutine that holds a lock takes only locks that are further down:
//
//	configMaps.mu             held while the router swaps its table
//	tableStore.mu             held while a swap wakes waiting requests and logs
//	dialQueues.mu             held while it asks whether a backend is ready
//	replicaWatcher.mu         held while it asks which backends are ready
//	endpointWatcher.mu
//	watcher.mu
//	topNamespaces.mu
//	poller.mu                 sessionIO.mu in relay_portable.go
//	relay.mu
//	flights.mu                held while it asks which flights a step waits for
//	exchange.mu
//	idleConns.mu              held while it counts descriptors
//	sharedHandoff.mu, releaser.mu, releaseMemory.mu
//	pendingLimit.mu, descriptorLimit.mu, addressCache.mu, limitListener.mu, logQueue.mu,
//	waitCount.mu, namespaceSlots.mu, namespaceRate.mu, tlsHandshakeList.mu
//
// Locks of one list with commas are never held together. Nothing waits for the network with
// a lock held.
//
// Read main, command and config (what starts), admin, preview, status, peers and page (what
// operators ask), redirect, fastpath, socket, proxy, forward, namespacematcher, handshake, listen,
// clientconn, descriptorlimit, pending, proxyprotocol and certificates (from client to
// session), configmap, directory, events, drain, move, movetally, movetarget, movequeue,
// maxage, pace, sharedhandoff, member, handoffobject, handoff, flight and release (what a change
// of overrides does), tablestore, route, overrides, namespace and hash (who owns), discovery,
// cordon, backends, dialqueue, pod, watch and kube (where owners are), top, relay (with epoll, its
// event loop), tls and websocket (the life of a session), namespacelimit, result, log, runtime
// and metrics, and wait (a back-off, a sleep, times, deadlines, a wake-up, texts, lists of flags).
// This is the order of dependencies: a file uses only those after it.
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
	signal.Ignore(syscall.SIGPIPE) // a log without a reader must not end all sessions
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // the second signal kills
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "router:", err)
	}
	os.Exit(exitCode(err))
}

// exitCode returns 0 for a normal end and for help, 2 for an error in the flags or
// the environment, and 1 for any other error.
func exitCode(err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return 2
	}
	return 1
}

// run is the program: it runs a subcommand, or serves until ctx ends and then drains.
// Logs go to stdout. Only the end waits for stdout, for logFlushTimeout at most.
func run(ctx context.Context, args []string, getenv func(string) string,
	stdout io.Writer) error {
	if handled, err := runCommand(ctx, args, stdout, os.Stderr); handled {
		return err
	}
	c, err := parseConfig(args, getenv, stdout)
	if err != nil {
		return err
	}
	queue := newLogQueue(stdout)
	log := newLogger(queue, c.logFormat, c.logLevel)
	takeStandardLog(log)
	go queue.run(log)
	defer queue.stop()
	p, err := newProgram(c, getenv, queue, log)
	if err != nil {
		return err
	}
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
	if c.redirect != "" {
		plain, err := listen(c.redirect, c.tcpUserTimeout)
		if err != nil {
			return fmt.Errorf("-redirect: %w", err)
		}
		defer plain.Close()
		if p.redirect, err = newRedirect(p.proxy, plain, p.fdLimit); err != nil {
			return err
		}
	}
	return p.serve(ctx, clientListener, adminListener)
}

// program is the router's components, wired.
type program struct {
	config       *config
	fdLimit      *descriptorLimit
	proxy        *proxy
	certificates *certificates           // nil: clients do not speak TLS
	redirect     *redirect               // nil for none
	tasks        []func(context.Context) // each runs until its context ends
	admin        *admin
	log          *slog.Logger
}

// newProgram makes the components that c asks for. Some of them read files. Before
// serve they connect to nothing, and start no goroutine that lasts.
func newProgram(c *config, getenv func(string) string, queue *logQueue,
	log *slog.Logger) (*program, error) {
	kubeClient, kubeNamespace, err := c.kubeClient(getenv)
	if err != nil {
		return nil, err
	}
	backends, err := c.staticBackends()
	if err != nil {
		return nil, err
	}
	var proxy *proxy // onPods uses it when the endpointWatcher runs
	var endpoints *endpointWatcher
	if backends == nil {
		onPods := func(uids map[int]string) {
			if proxy.relay.setPods(uids) {
				proxy.mover.tableOrPodChanged()
			}
		}
		endpoints = newEndpointWatcher(*kubeClient, kubeNamespace,
			c.statefulSet, c.service, c.backendPort, onPods, log)
		backends = endpoints.backends()
	}
	maxFiles, err := openFileLimit()
	if err != nil {
		return nil, err
	}
	fdLimit, err := newDescriptorLimit(
		maxFiles, backends.fromFlags.count, c.limits.sessions, c.limits.pendingRequests)
	if err != nil {
		return nil, err
	}
	proxy = newProxy(c, backends, fdLimit, log)
	p := &program{config: c, fdLimit: fdLimit, proxy: proxy, log: log}
	p.admin = &admin{proxy: proxy, fdLimit: fdLimit, logQueue: queue, started: time.Now()}
	p.admin.peers = newPeers(fixedPeers(c.peers))
	if c.handoff == "all" {
		p.shareHandoff(kubeClient, kubeNamespace)
	}
	if endpoints != nil {
		p.followStatefulSet(kubeClient, kubeNamespace, endpoints)
	}
	p.addSources(kubeClient, kubeNamespace)
	return p, p.addCertificates(kubeNamespace)
}

// addCertificates reads the certificates, if clients speak TLS.
func (p *program) addCertificates(kubeNamespace string) error {
	c := p.config
	if !c.terminatesTLS() {
		return nil
	}
	certificates, err := newCertificates(c.certificates, p.log)
	if err != nil {
		return err
	}
	p.certificates, p.admin.certificates = certificates, certificates
	p.proxy.tls, p.proxy.relay.clientTLS = newTLSServer(certificates.config), true
	p.proxy.forwardedFrom = &c.forwardedFrom // clients come by themselves
	p.tasks = append(p.tasks, certificates.run)
	if maps := p.admin.configMaps; maps != nil && c.podUID != "" { // else kubectl describe would not find it
		pod := apiObject{Kind: "Pod"}
		pod.Metadata.Namespace, pod.Metadata.Name, pod.Metadata.UID = kubeNamespace, c.podName, c.podUID
		certificates.onRejected = func(message string) { maps.events.reportCertificate(pod, message) }
	}
	return nil
}

// newProxy wires a proxy with tables, a relay and a mover of its own. fdLimit counts
// the descriptors of its clients and sessions. The caller starts the relay and runs the
// mover. It stops forwarder, relay and mover.flights, ends the context of the mover's run,
// and then closes mover.releases and backends.
func newProxy(c *config, backends *backends, fdLimit *descriptorLimit,
	log *slog.Logger) *proxy {
	backends.dialer = newDialer(c.tcpUserTimeout)
	var mover *mover // onSwap uses it when there are sources
	tables := &tableStore{
		statefulSet: c.statefulSet, fromHost: c.namespaceMatcher.fromHost,
		backends: backendSet{ordinalRange: backends.fromFlags, listedCordon: c.cordon}, log: log,
		onSwap: func() { mover.tableOrPodChanged() },
		applyDurations: newHistogram(
			.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5),
	}
	relay := newRelay(backends.name, log)
	relay.freeDescriptors = func(descriptors int) { fdLimit.add(-descriptors) }
	probe := func(ctx context.Context, backend int) error {
		_, err := backends.probe(ctx, backend)
		return err
	}
	onViewChanged := func() { backends.queues.recheckOwners(mover.findQueueOrdinal) }
	mover = newMover(tables, relay, c.moveRate, probe, onViewChanged, log)
	tables.previousOwners = mover.previousOwners
	mover.settleTime, mover.handoffOff = c.moveSettle, c.handoff == "off"
	mover.flights.proofTimeout = c.handoffProofTimeout
	mover.flights.addDescriptors = fdLimit.add
	if !mover.handoffOff {
		relay.onAbandoned = func(s *session, backend net.Conn) {
			f := mover.flights.add(s.namespace, s.backend, s.podUID, nil)
			f.abandon(backend, func() {})
		}
	}
	if c.release != "" {
		followReleases(c, mover, backends)
	}
	p := &proxy{
		tables: tables, backends: backends, relay: relay, mover: mover,
		upgradeDurations: newHistogram(
			.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10),
		ownerWaits: newHistogram(.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30),
		limits:     c.limits, podName: c.podName, namespaceOf: c.namespaceMatcher.namespace,
		releasePath: c.release, log: log,
		namespaceLimiter: newNamespaceLimiter(c.limits.namespace, log),
	}
	if c.proxyProtocol == "on" {
		p.proxyProtocol = &proxyProtocol{trusted: &c.trustedProxies, log: log}
	}
	if c.forwardedFrom.String() != "" {
		p.forwardedFrom = &c.forwardedFrom
	}
	mover.httpMoveTimeout = c.httpMoveTimeout
	mover.ages.limit, mover.ages.draining = c.maxAge, p.draining.Load
	if c.http != "off" {
		p.forwarder = newForwarder(fdLimit.add)
	}
	return p
}

// followReleases makes the mover ask previous owners to release namespaces.
func followReleases(c *config, m *mover, b *backends) {
	memory := newReleaseMemory(c.releaseRetention, m.log)
	m.flights.remember, m.relay.remember = memory.note, memory.note
	m.releases = newStepReleases(newReleaser(c.release, c.podName, b, m.log), memory)
}

// shareHandoff makes the router share each change of owners with all others.
func (p *program) shareHandoff(kubeClient *kubeClient, kubeNamespace string) {
	c := p.config
	h := newSharedHandoff(*kubeClient, kubeNamespace, c.handoffObjectName,
		c.podName, c.podUID, c.routerPods, p.log)
	p.proxy.mover.shareHandoff(h)
	if c.peers == nil {
		pods := newPeerPods(*kubeClient, kubeNamespace, c.routerPods, c.podName, c.admin)
		p.admin.peers = newPeers(pods.find)
	}
	p.tasks = append(p.tasks, h.watcher.run)
}

// followStatefulSet takes the number of backends from the StatefulSet, and their
// addresses and pods from its EndpointSlices.
func (p *program) followStatefulSet(kubeClient *kubeClient, kubeNamespace string,
	endpoints *endpointWatcher) {
	onBackendsChanged := func(s backendSet) {
		p.fdLimit.setBackends(s.count)
		p.proxy.tables.setBackends(s)
	}
	var onWantedRange func()
	shared := p.proxy.mover.shared
	if shared != nil {
		onWantedRange = shared.wake
	}
	replicas := newReplicaWatcher(
		*kubeClient, kubeNamespace, endpoints, onBackendsChanged, onWantedRange, p.log)
	if shared != nil {
		shared.wantedRange, shared.onRangeStored = replicas.wantedRange, replicas.setStoredRange
	}
	replicas.onCordonRejected = func(o apiObject, why string) {
		p.admin.configMaps.events.reportCordon(o, why)
	}
	p.admin.replicaWatcher = replicas
	p.tasks = append(p.tasks,
		endpoints.watcher.run, replicas.watcher.run, replicas.run, replicas.confirmStored)
}

// addSources sets up the sources of overrides, one statement for each. With ConfigMaps, the
// directory counts only until they were read. Without any source there are no overrides.
func (p *program) addSources(kubeClient *kubeClient, kubeNamespace string) {
	c, tables := p.config, p.proxy.tables
	if kubeClient != nil {
		tables.addSource(false, func(update func(...sourceContent)) overrideSource {
			maps := newConfigMaps(*kubeClient, kubeNamespace, c.configMaps, c.selector,
				c.handoffObjectName, c.podName, update, p.log)
			p.admin.configMaps = maps
			tables.reportChange, p.proxy.mover.reportMove = maps.reportChange, maps.reportMove
			return maps
		})
	}
	if c.overridesDir != "" && c.handoff == "all" {
		p.log.Warn("-overrides is not used with -handoff=all: a copy may lag", "directory", c.overridesDir)
	} else if c.overridesDir != "" {
		tables.addSource(kubeClient != nil, newDirectory(c.overridesDir, p.log))
	}
	if len(tables.sources) == 0 {
		tables.addSource(false, func(update func(...sourceContent)) overrideSource {
			return noOverrides(update)
		})
	}
	for _, source := range tables.sources {
		p.tasks = append(p.tasks, source.run)
	}
}

// serve runs everything until ctx ends or the client listener fails. Then it stops in
// this order: new clients, the sessions, everything else. It closes all listeners, unless
// the relay cannot start.
func (p *program) serve(ctx context.Context, clients, admin net.Listener) error {
	if err := p.proxy.relay.start(); err != nil {
		return err
	}
	background, stopBackground := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, task := range append(p.tasks, p.proxy.mover.run) {
		running.Go(func() { task(background) })
	}
	running.Go(func() { freeMemory(background, p.proxy.requestsChecked.Load) })
	if idle := p.config.idleTimeout; idle > 0 {
		running.Go(func() { p.proxy.relay.endIdle(background, idle) })
	}
	requests, stopRequests := context.WithCancelCause(context.Background())
	clientServer := newClientServer(requests, p.proxy, p.log)
	adminServer := p.admin.server(p.log)
	adminConns := newAdminListener(admin, p.log)
	failed := make(chan error, 1)
	maxSessions := p.fdLimit.moreSessions() // none has come yet
	fastPath := newFastPath(p.proxy, clients, p.fdLimit)
	running.Go(fastPath.run)
	running.Go(func() { failed <- clientServer.Serve(fastPath) })
	running.Go(func() { adminServer.Serve(adminConns) }) // until Close
	running.Go(p.redirect.serve)
	p.logServing(clients.Addr(), admin.Addr(), maxSessions)

	var err error
	select {
	case <-ctx.Done():
		p.announceDrain()
	case err = <-failed:
	}
	p.stopClients(fastPath, clientServer, stopRequests)
	stopBackground()
	adminServer.Close()
	p.redirect.close()
	running.Wait()
	p.proxy.mover.releases.close()
	p.proxy.backends.close()
	return err
}

// logServing logs where the router listens, and warns if the process may not open enough
// files for -max-sessions: only maxSessions fit. "fixed_backends" is 0 if the router follows the
// StatefulSet.
func (p *program) logServing(client, admin net.Addr, maxSessions int) {
	p.log.Info("serving",
		"version", version(), "listen", client.String(), "admin", admin.String(),
		"pod", p.config.podName, "fixed_backends", p.proxy.backends.fromFlags.count,
		"kube", p.config.kube)
	if p.redirect != nil {
		p.log.Info("redirecting clients without TLS", "listen", p.redirect.listener.Addr().String())
	}
	if wanted := p.config.limits.sessions; maxSessions < wanted {
		p.log.Warn("open file limit allows fewer sessions than -max-sessions",
			"sessions", maxSessions, "max_sessions", wanted, "max_files", p.fdLimit.maxFiles)
	}
}

// announceDrain makes /readyz, and /healthz for clients, fail while the router still accepts
// clients, for -drain-delay: load balancers need time to notice.
func (p *program) announceDrain() {
	p.proxy.draining.Store(true)
	p.log.Info("draining", "sessions", p.proxy.relay.size(),
		"delay_seconds", p.config.drainDelay.Seconds(), "duration_seconds", p.config.drainDuration.Seconds())
	time.Sleep(p.config.drainDelay)
}

// stopClients stops accepting clients, answers the upgrades under way, and closes the
// sessions over -drain-duration. It returns when all of them have ended.
//
// When Shutdown begins, net/http drops a client whose request it has not given to the
// handler: that client would get no answer. So stopClients first waits, for at most
// stopGrace, for the clients that the fast path has left to net/http.
func (p *program) stopClients(fastPath *fastPath, clientServer *http.Server,
	stopRequests context.CancelCauseFunc) {
	started := time.Now()
	clientServer.SetKeepAlivesEnabled(false) // each answer now says Connection: close
	fastPath.stop()
	stopRequests(errDraining)
	handled, allHandled := context.WithTimeout(context.Background(), stopGrace)
	defer allHandled()
	go func() { p.proxy.handedToHTTP.Wait(); allHandled() }() // Close below ends it at the latest
	<-handled.Done()
	idle, allIdle := context.WithCancel(context.Background())
	defer allIdle() // also ends Shutdown
	shutdown := make(chan struct{})
	go func() {
		clientServer.Shutdown(idle) // not of hijacked connections (golang/go#17721)
		close(shutdown)
	}()
	p.proxy.upgradesInHTTP.wait()
	ended := p.drainAll()
	select {
	case <-shutdown:
	case <-time.After(stopGrace):
	}
	clientServer.Close()
	allIdle()
	<-shutdown
	p.proxy.relay.stop()
	p.leaveHandoff()
	p.proxy.mover.flights.stop()
	if p.proxy.tls != nil {
		p.proxy.tls.closing.Wait()
	}
	p.log.Info("stopped", "closed", ended, "seconds", time.Since(started).Seconds())
}

// drainAll closes the sessions over -drain-duration, and waits as long for the answers to
// plain requests before it cuts them. It returns how many sessions have ended.
func (p *program) drainAll() (ended int64) {
	over := p.config.drainDuration
	ctx, cancel := context.WithTimeout(context.Background(), over)
	defer cancel()
	var forwarding sync.WaitGroup
	forwarding.Go(func() { p.proxy.forwarder.stop(ctx) })
	ended = drain(p.proxy.relay, over)
	forwarding.Wait()
	return ended
}

// leaveTime bounds how long the end of the program waits until this router has left the
// hand-off: the others then go on without it.
const leaveTime = 3 * time.Second

// leaveHandoff leaves the hand-off that this router shares with others, if it does.
func (p *program) leaveHandoff() {
	ctx, cancel := context.WithTimeout(context.Background(), leaveTime)
	defer cancel()
	p.proxy.mover.leave(ctx)
}

// newClientServer returns net/http's server for clients. ctx ends their upgrades, until
// they are hijacked or answered, and all waits for owners.
func newClientServer(ctx context.Context, p *proxy, log *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:           p,
		ReadHeaderTimeout: p.limits.headerTimeout,
		IdleTimeout:       p.limits.headerTimeout,
		MaxHeaderBytes:    p.limits.headerBytes,
		Protocols:         protocols,
		ErrorLog:          httpLog(log),

		DisableGeneralOptionsHandler: true, // OPTIONS * has no namespace either

		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			client := c.(*clientConn)
			client.serverCtx = ctx
			client.countHandover(&p.handedToHTTP)
			// That of a request ends when the client has left, also while the router stops.
			return context.WithValue(context.WithoutCancel(ctx), clientConnKey{}, c)
		},
	}
}
