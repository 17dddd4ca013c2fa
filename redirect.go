package main

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// maxRedirectConns is how many connections to the listener of -redirect may be open.
const maxRedirectConns = 96

// redirect is the listener without TLS beside one with TLS. It sends clients to https, and
// answers load balancers.
type redirect struct {
	listener net.Listener
	server   *http.Server
}

// newRedirect returns a redirect for the clients of l. Its close also closes l. As on the client
// listener, connections may begin with a header of the PROXY protocol. fdLimit counts all that
// may be open; newRedirect returns an error if fdLimit has no room for them and a client.
func newRedirect(p *proxy, l net.Listener, fdLimit *descriptorLimit) (*redirect, error) {
	fdLimit.add(maxRedirectConns)
	if used, limit, full := fdLimit.usage(); full {
		return nil, fmt.Errorf("-redirect: the limit of open files must be at least %d (got %d; ulimit -n)",
			fdLimit.maxFiles+used+descriptorsPerClient-limit, fdLimit.maxFiles)
	}
	// Its limit is never reached: limitListener has closed a connection before.
	own := &descriptorLimit{limit: (maxRedirectConns + 2) * descriptorsPerClient}
	own.changed.L = &own.mu
	clients := clientListener{
		Listener: retryListener{l, newAcceptRetry("-redirect", p.log)}, fdLimit: own,
		badHeads: new(atomic.Int64), proxyProtocol: p.proxyProtocol,
	}
	return &redirect{
		listener: &limitListener{Listener: clients, maxConns: maxRedirectConns},
		server: &http.Server{
			Handler:           redirectHandler(p),
			ReadHeaderTimeout: p.limits.headerTimeout,
			ReadTimeout:       p.limits.headerTimeout, // no body is read
			WriteTimeout:      10 * time.Second,
			IdleTimeout:       p.limits.headerTimeout,
			MaxHeaderBytes:    p.limits.headerBytes,
			ErrorLog:          httpLog(p.log),
			ConnState:         noteConnState,

			DisableGeneralOptionsHandler: true, // OPTIONS * has no place at https either
		},
	}, nil
}

// serve answers clients until close. A nil redirect has none.
func (r *redirect) serve() {
	if r != nil {
		r.server.Serve(r.listener) // its error says that it was closed
	}
}

// close closes the listener and all connections.
func (r *redirect) close() {
	if r != nil {
		r.server.Close()
	}
}

// redirectHandler answers a request for /healthz as the client listener does, and sends
// each other one to port 443 of its host (RFC 9110 §15.4.9), or answers 400 if its host or
// its target is none that can be there.
func redirectHandler(p *proxy) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 || p.draining.Load() {
			w.Header().Set("Connection", "close") // so that net/http does not read the body
		}
		if p.answerHealth(w, r) {
			return
		}
		host, ok := redirectHost(r.Host)
		target := r.URL.RequestURI()
		if !ok || !strings.HasPrefix(target, "/") || r.Method == http.MethodConnect {
			w.Header().Set("Connection", "close")
			http.Error(w, "the request must have a host and a path", http.StatusBadRequest)
			return
		}
		w.Header().Set("Location", "https://"+host+escapeTarget(target))
		w.WriteHeader(http.StatusPermanentRedirect)
	}
}

// redirectHost returns the host of a Host field without its port (RFC 9110 §7.2). ok is
// false unless it is a DNS name or an IP address, so that what a browser follows is the
// host that it has asked, and nothing else.
func redirectHost(field string) (host string, ok bool) {
	host, port := field, ""
	if end := strings.LastIndexByte(field, ':'); end > strings.LastIndexByte(field, ']') {
		host, port = field[:end], field[end+1:]
		if _, err := strconv.ParseUint(port, 10, 16); err != nil && port != "" {
			return "", false
		}
	}
	if inner, bracket := strings.CutPrefix(host, "["); bracket {
		addr, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		return host, err == nil && addr.Is6() && addr.Zone() == "" && strings.HasSuffix(inner, "]")
	}
	return host, isHostName(host)
}

// isHostName reports whether the name is labels of letters, digits, "-" and "_" with dots
// in between, and perhaps one at the end (RFC 1123 §2.1, RFC 1034 §3.1).
func isHostName(name string) bool {
	if len(name) > 253 || strings.ContainsFunc(name, isNotASCII) {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(strings.ToLower(name), "."), ".") {
		if strings.HasPrefix(label, "-") || !isHostNamespace(label) {
			return false
		}
	}
	return true
}

// escapeTarget returns the target with each byte escaped that may not be in a URL (RFC 3986
// §2), but not "%", which is taken to escape already.
func escapeTarget(target string) string {
	var b strings.Builder
	for _, char := range []byte(target) {
		if char <= ' ' || char > '~' || strings.IndexByte("\"<>\\^`{|}#", char) >= 0 {
			fmt.Fprintf(&b, "%%%02X", char)
			continue
		}
		b.WriteByte(char)
	}
	return b.String()
}
