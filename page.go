package main

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// pageHTML is the page of the admin port: one file, with one script and one style. It asks
// /status, /owner and /plan, and changes nothing.
//
//go:embed page.html
var pageHTML string

// newPage returns the handler of GET / of the admin port.
//
// The page may run its own script and style, and ask its own origin. What it shows comes
// from clients and from ConfigMaps, so the browser also refuses any HTML that is made of
// text (https://www.w3.org/TR/trusted-types/). No other page may have it in a frame.
func newPage() http.HandlerFunc {
	policy := strings.Join([]string{
		"default-src 'none'",
		"script-src " + elementHash(pageHTML, "script"),
		"style-src " + elementHash(pageHTML, "style"),
		"img-src data:", // the icon
		"connect-src 'self'",
		"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
		"require-trusted-types-for 'script'", "trusted-types 'none'",
	}, "; ")
	return func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", policy)
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-cache")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		w.Write([]byte(pageHTML)) // it fails only if the client is gone
	}
}

// elementHash returns the source expression that allows the text of the first element with
// this name and no attributes (https://www.w3.org/TR/CSP3/#grammardef-hash-source).
func elementHash(html, name string) string {
	_, text, _ := strings.Cut(html, "<"+name+">")
	text, _, _ = strings.Cut(text, "</"+name+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// isRebound reports whether a page of another site may have sent the request. A browser lets
// a page read what has its own host, and another site's name can lead to a loopback address
// (DNS rebinding). So a request that came to one, as with kubectl port-forward, must not
// have such a name. Elsewhere any name may be right, as that of a reverse proxy.
func isRebound(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok || !local.IP.IsLoopback() {
		return false
	}
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil { // it has no port
		host = strings.Trim(r.Host, "[]")
	}
	if host == "" || strings.EqualFold(host, "localhost") { // a browser always has a host
		return false
	}
	_, err = netip.ParseAddr(host)
	return err != nil
}
