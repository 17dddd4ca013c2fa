package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

// config has the values of the flags, from the command line or the environment. Nothing
// changes it after parseConfig.
type config struct {
	// Listeners and sockets.
	listen, admin               string        // addresses, as listen takes them
	tcpUserTimeout, idleTimeout time.Duration // 0: none
	maxAge                      time.Duration // of a session; 0: none
	proxyProtocol               string        // "on" or "off"
	trustedProxies              trustedProxies
	forwardedFrom               trustedProxies

	// TLS that the router terminates itself.
	certificates certificateFlags
	redirect     string // address of the plain listener; "" for none

	// Where the backends are.
	backends, statefulSet, service string
	replicas, backendPort          int
	cordon                         cordon

	// Where the overrides are.
	kube, kubeNamespace, overridesDir string
	configMaps                        []string
	selector                          string // a label selector for ConfigMaps

	// Requests, and moves of sessions.
	namespaceFrom, podName string            // namespaceFrom is as newNamespaceMatcher takes it
	routes                 []string          // of -route; nil for defaultRoute
	namespaceMatcher       *namespaceMatcher // of both
	limits                 limits
	http                   string // "on" or "off"
	httpMoveTimeout        time.Duration
	moveRate               int // sessions per second, 0: no limit
	moveSettle             time.Duration
	peers                  []string      // admin ports of the other routers; nil for none
	handoff                string        // "all", "single" or "off"
	handoffObjectName      string        // for "all"
	podUID                 string        // of this router's pod: for "all", and for Events about certificates
	routerPods             string        // for "all": a label selector
	handoffProofTimeout    time.Duration // 0: for ever
	release                string        // the path; "" for none
	releaseRetention       time.Duration

	// The end.
	drainDelay, drainDuration time.Duration

	logFormat string
	logLevel  slog.Level
}

// addNames adds the names in list, which are separated by commas, to all: the flag may be
// repeated. It returns an error for an empty name and for one that is in all already.
func addNames(all *[]string, list string) error {
	for _, name := range splitList(list) {
		if name == "" || slices.Contains(*all, name) {
			return fmt.Errorf("%q is empty or repeated", name)
		}
		*all = append(*all, name)
	}
	return nil
}

// addKeys adds the files in list, which are separated by commas, to those of -tls-key, which
// may have a file twice.
func (c *config) addKeys(list string) error {
	files := splitList(list)
	if slices.Contains(files, "") {
		return errors.New(`"" is empty`)
	}
	c.certificates.keys = append(c.certificates.keys, files...)
	return nil
}

// addRoutes adds the patterns in list, which are separated by spaces, to -route.
// newNamespaceMatcher checks them.
func (c *config) addRoutes(list string) error {
	routes := strings.Fields(list)
	if len(routes) == 0 {
		return errors.New("it must have a path")
	}
	c.routes = append(c.routes, routes...)
	return nil
}

// usageError is an error in the command line or the environment: the exit code is 2.
type usageError struct{ error }

// flags returns a flag set that writes into c, and writes the defaults into c.
func (c *config) flags() *flag.FlagSet {
	f := flag.NewFlagSet("router", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.listen, "listen", ":8000",
		"`address` for clients: host:port, or unix:/path of a socket")
	f.StringVar(&c.admin, "admin", ":8001",
		"`address` for operators: / is a page for people, and there are /healthz, /readyz, /metrics,\n"+
			"/owner, /status, /backends and /plan")
	f.Func("peers",
		"`list` of the admin ports of the other routers, like host:port,host:port: answers for all\n"+
			"routers include theirs (default with -handoff all: the admin ports of the pods that\n"+
			"-router-pods selects; else none)",
		func(list string) (err error) { c.peers, err = parsePeers(list); return err })
	f.DurationVar(&c.tcpUserTimeout, "tcp-user-timeout", time.Minute,
		"a session ends when its client or backend has not answered TCP for this long, in\n"+
			"whole seconds; 0 is the limit of the system")
	f.DurationVar(&c.idleTimeout, "idle-timeout", 0,
		"how long a session may carry no byte in either direction before it ends; 0 is no limit")

	f.StringVar(&c.proxyProtocol, "proxy-protocol", "off",
		"`on` or off: whether connections from -trusted-proxies begin with a header of the PROXY\n"+
			"protocol, version 1 or 2, that has the client's address")
	f.Var(&c.trustedProxies, "trusted-proxies",
		"`addresses` of load balancers for -proxy-protocol, like 10.0.0.0/8,fd00::1, and unix for\n"+
			"peers of a Unix socket; it has no other effect (default none)")
	f.Var(&c.forwardedFrom, "forwarded-from",
		"`addresses` of proxies, as for -trusted-proxies: the router passes on X-Forwarded-For,\n"+
			"X-Forwarded-Proto and X-Forwarded-Host of these proxies only, and removes the three\n"+
			"fields of all other peers. With -proxy-protocol, the peer is the address in the header\n"+
			"(default: it passes on the fields of every peer, with -tls-cert of no peer)")
	c.tlsFlags(f)
	f.StringVar(&c.backends, "backends", "",
		"fixed `list` of backends, host:port,host:port,... in the order of their ordinals")
	f.IntVar(&c.replicas, "replicas", 0,
		"`number` of backends, whose addresses are looked up in DNS (default with neither this\n"+
			"nor -backends: the API server gives the number and the addresses)")
	f.Var(&c.cordon, "cordon",
		"`ordinals` of backends to which the hash gives no namespaces, like 2,5, with -replicas or\n"+
			"-backends; unlike with kubectl cordon, the sessions of these namespaces move away.\n"+
			"Without these flags, the annotation router-cordon of the StatefulSet has the ordinals\n"+
			"(default none)")
	f.StringVar(&c.statefulSet, "statefulset", "backend",
		"`name` of the StatefulSet: backends are <name>-0, <name>-1, ...")
	f.StringVar(&c.service, "service", "headless",
		"`name` of the StatefulSet's headless Service: backends are at <backend>.<name>")
	f.IntVar(&c.backendPort, "backend-port", 9000,
		"`port` of the backends, without -backends")

	c.overrideFlags(f)
	c.trafficFlags(f)
	f.StringVar(&c.logFormat, "log-format", "text", "`format` of the log: text or json")
	f.TextVar(&c.logLevel, "log-level", slog.LevelInfo,
		"lowest `level` of the log: debug, info, warn or error")
	return f
}

// overrideFlags adds the flags for where the overrides are to f.
func (c *config) overrideFlags(f *flag.FlagSet) {
	f.StringVar(&c.kube, "kube", "",
		"API `server` with the overrides, the backends and the object of the hand-off: in-cluster,\n"+
			"none, or the http://host:port of a kubectl proxy; with none and without -overrides\n"+
			"there are no overrides (default in-cluster in a pod, else none with -overrides, else\n"+
			"http://127.0.0.1:8080)")
	f.StringVar(&c.kubeNamespace, "kube-namespace", "",
		"Kubernetes `namespace` of the ConfigMaps, the StatefulSet and its EndpointSlices\n"+
			"(default the pod's own, else \"default\")")
	f.Func("configmap",
		"`name` of a ConfigMap with overrides; may be repeated, or have several with commas in\n"+
			"between (default overwriting)",
		func(list string) error { return addNames(&c.configMaps, list) })
	f.StringVar(&c.selector, "configmap-selector", "",
		"`labels` of the ConfigMaps with overrides, like app=router-overrides, in place of names")
	f.StringVar(&c.overridesDir, "overrides", "",
		"`directory` with the overrides, one file for each namespace; with an API server, a\n"+
			"copy that is used until the server has answered; not with -handoff all")
}

// tlsFlags adds the flags for TLS that the router terminates itself to f.
func (c *config) tlsFlags(f *flag.FlagSet) {
	f.Func("tls-cert",
		"`file` with a certificate and its chain, PEM: clients of -listen speak TLS; or the\n"+
			"directory of a mounted Secret, with tls.crt and tls.key; may be repeated, or have\n"+
			"several with commas in between (default none: clients do not speak TLS)",
		func(list string) error { return addNames(&c.certificates.certs, list) })
	f.Func("tls-key",
		"`file` with a key, PEM: one for each -tls-cert that is a file, in the same order; may be\n"+
			"repeated, or have several with commas in between",
		c.addKeys)
	f.StringVar(&c.certificates.minVersion, "tls-min-version", "1.2",
		"lowest `version` of TLS: 1.2 or 1.3")
	f.StringVar(&c.certificates.clientCA, "tls-client-ca", "",
		"`file` with the CAs of clients, PEM: each client needs a certificate of one of them, and\n"+
			"backends get its subject as X-Client-Subject (default none)")
	f.StringVar(&c.certificates.ticketSecret, "tls-ticket-secret", "",
		"`file` with at least 32 random bytes, the same for all routers: clients resume their TLS\n"+
			"sessions at each of them; or a directory that may have them in the file secret, as\n"+
			"that of an optional Secret (default: a secret of this process alone)")
	f.StringVar(&c.redirect, "redirect", "",
		"`address` of a listener without TLS, like :80, which sends clients to https with 308, and\n"+
			"answers /healthz as -listen does (default none)")
}

// trafficFlags adds the flags for requests, moves and the drain to f.
func (c *config) trafficFlags(f *flag.FlagSet) {
	f.StringVar(&c.namespaceFrom, "namespace-from", "path",
		"`where` a request has its namespace: path (as -route says), query:NAME (the parameter\n"+
			"NAME, of any path) or host (its first label, with any path)")
	f.Func("route",
		"`pattern` of the paths with a namespace, like /d/{namespace}/events: {namespace} is one\n"+
			"whole segment, and any more may follow; may be repeated, or have several with spaces\n"+
			"in between (default "+defaultRoute+")",
		c.addRoutes)
	f.StringVar(&c.podName, "pod-name", "",
		"`name` of this router for X-Router-Pod; with -handoff all its pod's metadata.name\n"+
			"(default the host's name)")
	f.DurationVar(&c.limits.holdTimeout, "hold", 10*time.Second,
		"how long an upgrade or a plain request waits for its owner")
	f.DurationVar(&c.limits.upgradeTimeout, "upgrade-timeout", 10*time.Second,
		"how long a backend may take to answer an upgrade")
	f.DurationVar(&c.limits.headerTimeout, "header-timeout", 10*time.Second,
		"how long a client may take for its TLS handshake, then to send its request's head, and\n"+
			"then a body of up to 8 KiB; systems other than Linux, and 386, give handshake and\n"+
			"head one such time together")
	f.IntVar(&c.limits.headerFields, "max-header-fields", 100,
		"maximum `number` of fields in a request's head")
	f.IntVar(&c.limits.headerBytes, "max-header-bytes", 16<<10,
		"maximum `bytes` of a request's or a response's head")
	f.IntVar(&c.limits.sessions, "max-sessions", 100_000,
		"maximum `number` of open sessions, pending upgrades and plain requests, all three counted\n"+
			"together")
	f.IntVar(&c.limits.pendingRequests, "max-pending-upgrades", 10_000,
		"maximum `number` of upgrades under way, and of plain requests that their owner has not got,\n"+
			"both counted together. Half of it is divided evenly among the backends. Of the other\n"+
			"half, one backend may use at most as much as it leaves free")
	f.IntVar(&c.moveRate, "move-rate", 200,
		"`sessions` that are closed per second after their owner changed; 0 is no limit. With\n"+
			"-handoff all, this is the rate of all routers together; else of each router")
	f.DurationVar(&c.moveSettle, "move-settle", 500*time.Millisecond,
		"the router waits until the routing table has not changed for this time, ten times this\n"+
			"time at most, and until it has dialled each new owner once. Then sessions move, at\n"+
			"-move-rate. Sessions of backends that are scaled in do not wait")
	f.StringVar(&c.http, "http", "on",
		"`on` or off: whether plain requests (no upgrades) go to the owners of their namespaces\n"+
			"too, or are refused with 426")
	f.DurationVar(&c.httpMoveTimeout, "http-move-timeout", 30*time.Second,
		"after the owner of its namespace has changed, a plain request (a download, a long poll, an\n"+
			"event stream) that is older than this is cut, and a younger one when it gets this old;\n"+
			"0 cuts all at once")
	c.namespaceFlags(f)
	c.handoffFlags(f)

	f.DurationVar(&c.drainDelay, "drain-delay", 0,
		"how long clients are still accepted after SIGTERM, so that load balancers can notice")
	f.DurationVar(&c.drainDuration, "drain-duration", 30*time.Second,
		"the time over which sessions are closed after -drain-delay")
}

// namespaceFlags adds the flags for what one namespace, or one session, may take to f.
func (c *config) namespaceFlags(f *flag.FlagSet) {
	f.IntVar(&c.limits.namespace.sessions, "max-sessions-per-namespace", 0,
		"for each namespace, the maximum `number` of sessions and pending upgrades in this router;\n"+
			"each router counts by itself; 0 is no limit")
	f.IntVar(&c.limits.namespace.upgradesPerSecond, "max-upgrades-per-second", 0,
		"for each namespace, the maximum `number` of upgrades per second, which may come at once;\n"+
			"each router counts by itself; 0 is no limit")
	f.DurationVar(&c.maxAge, "max-age", 0,
		"age at which the router closes a session, as in a move. Each session has its own age,\n"+
			"between 90 % and 100 % of this. Each router closes at most -move-rate of them per\n"+
			"second, so some can get older; 0 is no limit")
}

// handoffFlags adds the flags for what makes a change of owners strict to f.
func (c *config) handoffFlags(f *flag.FlagSet) {
	f.StringVar(&c.handoff, "handoff", "",
		"`mode` of a change of owners: when a namespace opens at its new owner. all: after every\n"+
			"router has closed it at the old owner. single: after this router has. off: at once\n"+
			"(default all in a pod whose backends the API server gives, else single)")
	f.StringVar(&c.handoffObjectName, "handoff-configmap", "",
		"`name` of the ConfigMap that routers share with -handoff all\n"+
			"(default router-handoff-<statefulset>)")
	f.StringVar(&c.podUID, "pod-uid", "",
		"`uid` of this router's pod: for -handoff all, and for Events about certificates")
	f.StringVar(&c.routerPods, "router-pods", "app.kubernetes.io/name=router,router-handoff=all",
		"`labels` of the pods of all routers with -handoff all; others must not have them")
	f.DurationVar(&c.handoffProofTimeout, "handoff-proof-timeout", time.Minute,
		"how long a hand-off waits for the proof that a backend has ended a request or a session\n"+
			"whose client has left, or a plain request that was cut. The proof is that the backend\n"+
			"ends its connection. After this time the hand-off goes on, although it is not proven\n"+
			"that the backend has ended; 0 is no limit")
	f.StringVar(&c.release, "release", "",
		"`path` of a URL, like /release. The router sends POST to it at the old owner of the\n"+
			"namespaces of a step, so that the old owner stores their state. Their new owner gets\n"+
			"clients after the answer 2xx (default none)")
	f.DurationVar(&c.releaseRetention, "release-retention", time.Minute,
		"the least time for which the router remembers a namespace after its last session or request.\n"+
			"If the namespace moves in this time, its old owner gets the POST of -release")
}

// parseConfig reads the flags in args, and those that are not in args from the
// environment. If args ask for help, it writes the help to w and returns flag.ErrHelp.
// Any other error is a usageError.
func parseConfig(args []string, getenv func(string) string,
	w io.Writer) (*config, error) {
	c := &config{}
	f := c.flags()
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		writeHelp(f, w)
		return nil, flag.ErrHelp
	}
	if err == nil && f.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q: the router takes flags only", f.Arg(0))
	}
	if err == nil {
		err = setFromEnvironment(f, getenv)
	}
	if err == nil {
		c.setDefaults(getenv)
		err = c.validate()
	}
	if err == nil {
		c.namespaceMatcher, err = newNamespaceMatcher(c.namespaceFrom, c.routes)
	}
	if err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

// environmentName returns the environment variable of a flag.
func environmentName(name string) string {
	return "ROUTER_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// setFromEnvironment takes the flags that are not in args from the environment.
func setFromEnvironment(f *flag.FlagSet, getenv func(string) string) (err error) {
	inArgs := map[string]bool{}
	f.Visit(func(fl *flag.Flag) { inArgs[fl.Name] = true })
	f.VisitAll(func(fl *flag.Flag) {
		value := getenv(environmentName(fl.Name))
		if value == "" || inArgs[fl.Name] || err != nil {
			return
		}
		if invalid := fl.Value.Set(value); invalid != nil {
			err = fmt.Errorf("%s=%q: %w", environmentName(fl.Name), value, invalid)
		}
	})
	return err
}

func writeHelp(f *flag.FlagSet, w io.Writer) {
	fmt.Fprint(w, "router sends each WebSocket, and each plain HTTP request, to the backend that owns its\n"+
		"namespace.\n\n"+
		"Usage: router [flags]\n"+
		"       router version\n"+
		"       router COMMAND -h, with one of these commands: status, owner, plan, backends, top,\n"+
		"       move, cordon, uncordon, wait\n\n"+
		"Each flag can be given in the environment too: -drain-duration as ROUTER_DRAIN_DURATION.\n"+
		"Times are like 500ms, 10s, 5m.\n\n")
	f.SetOutput(w)
	f.PrintDefaults()
}

// validate returns an error for the first value that the router cannot use.
func (c *config) validate() error {
	return cmp.Or(c.validateWords(), c.validateAddresses(), c.validateNames(), c.validateBackends(), c.validateCordon(), c.validateHandoff(),
		c.validateRelease(), c.validateTLS(), c.validateLimits())
}

// validateWords checks the flags that have one of two values.
func (c *config) validateWords() error {
	for _, word := range []struct{ flag, value, first, second string }{
		{"http", c.http, "on", "off"},
		{"proxy-protocol", c.proxyProtocol, "on", "off"},
		{"tls-min-version", c.certificates.minVersion, "1.2", "1.3"},
		{"log-format", c.logFormat, "text", "json"},
	} {
		if word.value != word.first && word.value != word.second {
			return fmt.Errorf("-%s must be %s or %s (got %q)",
				word.flag, word.first, word.second, word.value)
		}
	}
	return nil
}

// validateAddresses checks that each listener has an address: an empty one would be any port,
// or a socket that nobody finds. listen finds out all else that is wrong with one.
func (c *config) validateAddresses() error {
	for _, addr := range []struct{ flag, value string }{
		{"listen", c.listen}, {"admin", c.admin}, {"redirect", cmp.Or(c.redirect, "none")},
	} {
		if addr.value == "" || addr.value == "unix:" {
			return fmt.Errorf("-%s must be host:port or unix:/path (got %q)", addr.flag, addr.value)
		}
	}
	return nil
}

// nameChars are those of names of objects, and of backends that are in no cluster.
const nameChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"

// validateNames checks the names of objects and of this router, and the labels that select some: empty ones
// would select all.
func (c *config) validateNames() error {
	type word struct{ flag, value string }
	names := []word{
		{"statefulset", c.statefulSet}, {"service", c.service},
		{"kube-namespace", cmp.Or(c.kubeNamespace, "default")}, {"handoff-configmap", c.handoffObjectName},
	}
	for _, name := range c.configMaps {
		names = append(names, word{"configmap", name})
	}
	for _, name := range names {
		if name.value == "" || strings.ContainsAny(name.value[:1], "-._") || strings.Trim(name.value, nameChars) != "" {
			return fmt.Errorf("-%s must be a name of letters, digits, dashes, dots and underscores that "+
				"begins with a letter or digit (got %q)", name.flag, name.value)
		}
	}
	for _, labels := range []word{{"router-pods", c.routerPods}, {"configmap-selector", cmp.Or(c.selector, "none")}} {
		if strings.TrimSpace(labels.value) == "" {
			return fmt.Errorf("-%s must have a label, like app.kubernetes.io/name=router (got %q)", labels.flag, labels.value)
		}
	}
	return checkToken("-pod-name", c.podName) // backends get it in a field of the head
}

// validateBackends checks the flags about backends, overrides and proxies.
func (c *config) validateBackends() error {
	switch {
	case c.replicas < 0 || c.replicas > maxReplicas:
		return fmt.Errorf("-replicas must be 1 to %d (got %d)", maxReplicas, c.replicas)
	case c.backends == "" && c.replicas == 0 && c.kube == "none":
		return errors.New("-replicas or -backends is required without an API server")
	case c.backends != "" && c.replicas != 0:
		return errors.New("-replicas and -backends exclude each other: the list has the number of backends")
	case c.backendPort < 1 || c.backendPort > 65535:
		return fmt.Errorf("-backend-port must be 1 to 65535 (got %d)", c.backendPort)
	case c.selector != "" && c.configMaps != nil:
		return fmt.Errorf("-configmap and -configmap-selector exclude each other (got %s and %s)",
			strings.Join(c.configMaps, ","), c.selector)
	case c.proxyProtocol == "on" && c.trustedProxies.String() == "":
		return errors.New("-proxy-protocol on requires -trusted-proxies")
	}
	return nil
}

// validateCordon checks -cordon.
func (c *config) validateCordon() error {
	if c.cordon != nil && c.backends == "" && c.replicas == 0 {
		return fmt.Errorf("-cordon requires -replicas or -backends (got %s alone); without these, "+
			"the StatefulSet's annotation %s has the ordinals", c.cordon, cordonAnnotation)
	}
	count := c.replicas
	if c.backends != "" {
		count = len(splitList(c.backends))
	}
	if _, all := c.cordon.among(ordinalRange{count: count}); all {
		return fmt.Errorf("-cordon must leave a backend that is not cordoned (got %s of %d)",
			c.cordon, count)
	}
	return nil
}

// validateHandoff checks -handoff.
func (c *config) validateHandoff() error {
	switch c.handoff {
	case "single", "off":
		return nil
	case "all":
	default:
		return fmt.Errorf("-handoff must be all, single or off (got %q)", c.handoff)
	}
	if c.kube == "none" || c.backends != "" || c.replicas != 0 {
		return errors.New("-handoff all requires an API server that gives the backends: " +
			"not -kube none, -backends or -replicas")
	}
	if slices.Contains(c.configMaps, c.handoffObjectName) {
		return fmt.Errorf("-configmap must not have the routers' own object (got %s, which is -handoff-configmap)",
			c.handoffObjectName)
	}
	if err := checkToken("-pod-uid", c.podUID); err != nil {
		return fmt.Errorf("-handoff all requires metadata.uid: %w", err)
	}
	return nil
}

// validateRelease checks -release.
func (c *config) validateRelease() error {
	if c.release == "" {
		return nil
	}
	u, err := url.ParseRequestURI(c.release)
	switch {
	case err != nil || u.Host != "" || u.RawQuery != "" || !strings.HasPrefix(c.release, "/"):
		return fmt.Errorf("-release must be a path such as /release (got %q)", c.release)
	case c.handoff == "off":
		return errors.New("-release requires a hand-off: not -handoff off")
	}
	return nil
}

// terminatesTLS reports whether the clients of -listen speak TLS.
func (c *config) terminatesTLS() bool { return len(c.certificates.certs) > 0 }

// validateTLS checks the flags for TLS. What the files have is for newCertificates.
func (c *config) validateTLS() error {
	t := &c.certificates
	if c.terminatesTLS() {
		return nil
	}
	minVersion := t.minVersion
	if minVersion == "1.2" { // the default
		minVersion = ""
	}
	for _, other := range []struct{ flag, value string }{
		{"tls-key", strings.Join(t.keys, ",")},
		{"tls-min-version", minVersion},
		{"tls-client-ca", t.clientCA},
		{"tls-ticket-secret", t.ticketSecret},
		{"redirect", c.redirect},
	} {
		if other.value != "" {
			return fmt.Errorf("-%s requires -tls-cert (got %s alone)", other.flag, other.value)
		}
	}
	return nil
}

// maxHeaderBytes bounds -max-header-bytes: net/http adds to it, and must not overflow.
const maxHeaderBytes = 1 << 30

// validateLimits checks the flags with times and numbers.
func (c *config) validateLimits() error {
	switch {
	case !validTCPUserTimeout(c.tcpUserTimeout):
		return fmt.Errorf("-tcp-user-timeout must be 0, or 2s to 18h in whole seconds (got %s)",
			c.tcpUserTimeout)
	case c.idleTimeout != 0 && c.idleTimeout < time.Second:
		return fmt.Errorf("-idle-timeout must be 0 or at least 1s (got %s)", c.idleTimeout)
	case c.maxAge != 0 && c.maxAge < time.Second:
		return fmt.Errorf("-max-age must be 0 or at least 1s (got %s)", c.maxAge)
	case c.limits.headerBytes < 1024 || c.limits.headerBytes > maxHeaderBytes:
		return fmt.Errorf("-max-header-bytes must be 1024 to %d (got %d)", maxHeaderBytes, c.limits.headerBytes)
	}
	for _, number := range []struct {
		flag       string
		value, min int
	}{
		{"max-header-fields", c.limits.headerFields, 16},
		{"max-sessions", c.limits.sessions, 1},
		{"max-pending-upgrades", c.limits.pendingRequests, 1},
		{"max-sessions-per-namespace", c.limits.namespace.sessions, 0},
		{"max-upgrades-per-second", c.limits.namespace.upgradesPerSecond, 0},
		{"move-rate", c.moveRate, 0},
	} {
		if number.value < number.min {
			return fmt.Errorf("-%s must be at least %d (got %d)",
				number.flag, number.min, number.value)
		}
	}
	for _, timeout := range []struct {
		flag       string
		value, min time.Duration
	}{
		{"hold", c.limits.holdTimeout, 1},
		{"upgrade-timeout", c.limits.upgradeTimeout, 1},
		{"header-timeout", c.limits.headerTimeout, 1},
		{"move-settle", c.moveSettle, 0},
		{"http-move-timeout", c.httpMoveTimeout, 0},
		{"handoff-proof-timeout", c.handoffProofTimeout, 0},
		{"release-retention", c.releaseRetention, 1},
		{"drain-delay", c.drainDelay, 0},
		{"drain-duration", c.drainDuration, 0},
	} {
		if timeout.value < 0 {
			return fmt.Errorf("-%s must not be negative (got %s)", timeout.flag, timeout.value)
		}
		if timeout.value < timeout.min {
			return fmt.Errorf("-%s must not be 0", timeout.flag)
		}
	}
	return nil
}

// validTCPUserTimeout reports whether keepalive can be set for the timeout: TCP_KEEPIDLE
// takes 1 to 32,767 whole seconds (tcp(7)).
func validTCPUserTimeout(timeout time.Duration) bool {
	return timeout == 0 ||
		timeout >= 2*time.Second && timeout <= 18*time.Hour && timeout%time.Second == 0
}

// setDefaults sets the defaults that depend on where the router runs.
func (c *config) setDefaults(getenv func(string) string) {
	if c.kube == "" {
		switch {
		case getenv("KUBERNETES_SERVICE_HOST") != "":
			c.kube = "in-cluster"
		case c.overridesDir != "":
			c.kube = "none"
		default:
			c.kube = "http://127.0.0.1:8080"
		}
	}
	if c.configMaps == nil && c.selector == "" {
		c.configMaps = []string{"overwriting"}
	}
	if c.podName == "" {
		name, _ := os.Hostname()
		c.podName = podNameOf(name)
	}
	if c.handoff == "" {
		c.handoff = "single"
		if c.kube == "in-cluster" && c.backends == "" && c.replicas == 0 {
			c.handoff = "all"
		}
	}
	c.handoffObjectName = cmp.Or(c.handoffObjectName, "router-handoff-"+c.statefulSet)
}

// podNameOf returns the name of a host as -pod-name may be: with dashes for what that may not have.
func podNameOf(host string) string {
	name := strings.Map(func(c rune) rune {
		if c == '_' || !strings.ContainsRune(nameChars, c) {
			return '-'
		}
		return c
	}, host)
	return cmp.Or(strings.TrimLeft(name, "-."), "router")
}

// staticBackends returns the backends that the flags name, or nil if the API server names
// them.
func (c *config) staticBackends() (*backends, error) {
	switch {
	case c.replicas > 0:
		return newDNSBackends(c.replicas, c.statefulSet, c.service, c.backendPort), nil
	case c.backends == "":
		return nil, nil
	}
	addrs, err := parseBackends(c.backends)
	if err != nil {
		return nil, usageError{fmt.Errorf("-backends: %w", err)}
	}
	return newStaticBackends(c.statefulSet, addrs), nil
}

// kubeClient returns a client of the API server, or nil if there is none, and the
// Kubernetes namespace of the ConfigMaps.
func (c *config) kubeClient(getenv func(string) string) (*kubeClient, string, error) {
	switch c.kube {
	case "none":
		return nil, "", nil
	case "in-cluster":
		k, err := newInClusterClient(getenv, serviceAccountDir)
		if err != nil || c.kubeNamespace != "" {
			return k, c.kubeNamespace, err
		}
		namespace, err := podKubeNamespace(serviceAccountDir)
		return k, namespace, err
	}
	k, err := newKubectlProxyClient(c.kube)
	if err != nil {
		return nil, "", usageError{err}
	}
	return k, cmp.Or(c.kubeNamespace, "default"), nil
}
