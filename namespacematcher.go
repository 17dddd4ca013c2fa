package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"unicode/utf8"
)

// placeholder is the segment of a pattern that stands for the namespace.
const placeholder = "{namespace}"

// defaultRoute is the pattern without -route.
const defaultRoute = "/ws/" + placeholder

// namespaceMatcher says where a request names its namespace: in its path, in its query or in its
// host. It is immutable.
type namespaceMatcher struct {
	fromHost bool      // in the first label of the host
	query    string    // in the query parameter of that name, unless it is ""
	patterns []pattern // else in the path; no path matches two of them
}

// newNamespaceMatcher returns the matcher that -namespace-from and -route ask for: from is "path",
// "host" or "query:NAME". Without routes a path has defaultRoute.
func newNamespaceMatcher(from string, routes []string) (*namespaceMatcher, error) {
	name, isQuery := strings.CutPrefix(from, "query:")
	switch {
	case from != "path" && from != "host" && !isQuery:
		return nil, fmt.Errorf("-namespace-from must be path, host or query:NAME (got %q)",
			from)
	case isQuery && (name == "" || strings.ContainsFunc(name, isNotUnreserved)):
		return nil, fmt.Errorf("-namespace-from query:NAME must have a name of "+
			"characters of [-._~a-zA-Z0-9] (got %q)", from)
	case from != "path" && len(routes) > 0:
		return nil, fmt.Errorf("-route requires -namespace-from path (got %s)", from)
	case from != "path":
		return &namespaceMatcher{fromHost: from == "host", query: name}, nil
	case len(routes) == 0:
		routes = []string{defaultRoute}
	}
	m := &namespaceMatcher{}
	for _, route := range routes {
		p, err := newPattern(route)
		if err != nil {
			return nil, fmt.Errorf("-route %q: %w", route, err)
		}
		for _, other := range m.patterns {
			if p.overlaps(other) {
				return nil, fmt.Errorf("-route %s and -route %s overlap: "+
					"a path can match both", other, p)
			}
		}
		m.patterns = append(m.patterns, p)
	}
	return m, nil
}

// namespace returns the namespace that the request names.
func (m *namespaceMatcher) namespace(r *http.Request) (string, *refusal) {
	switch {
	case m.fromHost:
		return hostNamespace(r)
	case m.query != "":
		return queryNamespace(r, m.query)
	}
	return m.pathNamespace(r)
}

// pathNamespace returns the namespace of a path that matches a pattern. The path is taken
// as it was sent: the backend gets it so, and must not read another namespace in it.
func (m *namespaceMatcher) pathNamespace(r *http.Request) (string, *refusal) {
	path := requestPath(r)
	for i := range m.patterns {
		if segment, ok := m.patterns[i].match(path); ok {
			return segmentNamespace(segment)
		}
	}
	return "", refuse(resultNotFound, "the path must be %s (got %.200q)",
		m.routes(), path)
}

// segmentNamespace returns the namespace of a segment of a path: the bytes after decoding
// its escapes once. The backend gets the segment as it was sent, and must read the same in
// it. So what no path has unescaped (RFC 3986 §3.3) is refused, where some programs would
// read another name: a fragment after #, and other bytes than ASCII, which some take for
// Latin-1.
func segmentNamespace(segment string) (string, *refusal) {
	namespace, err := url.PathUnescape(segment)
	if err != nil || strings.Contains(segment, "#") || strings.ContainsFunc(segment, isNotASCII) {
		return "", refuse(resultBadRequest,
			"the path must be percent-encoded, also # and what is not ASCII (got %.260q)",
			segment)
	}
	if want := expectedPathNamespace(namespace); want != "" {
		return "", refuse(resultBadRequest, "the path must have %s (got %.260q)",
			want, namespace)
	}
	return namespace, nil
}

// routes lists the patterns for people.
func (m *namespaceMatcher) routes() string { return joined(m.patterns, " or ", pattern.String) }

// hostNamespace returns the first label of the Host header, in lower case since
// host names have no case (RFC 4343).
func hostNamespace(r *http.Request) (string, *refusal) {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	label, domain, ok := strings.Cut(strings.ToLower(host), ".")
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if !ok || domain == "" || err == nil {
		return "", refuse(resultBadRequest,
			"the host must be <namespace>.<domain> (got %.260q)", r.Host)
	}
	if want := expectedHostNamespace(label); want != "" {
		return "", refuse(resultBadRequest,
			"the host must begin with %s (got %.260q)", want, label)
	}
	return label, nil
}

// queryNamespace returns the value of the query parameter with the name, of any path. The
// query is an application/x-www-form-urlencoded one: + is a space
// (https://url.spec.whatwg.org/#urlencoded-parsing).
//
// The backend gets the query as it was sent, and must read the same value in it. Some
// programs take the first of several values, some the last, and some ignore the case of a
// name; some take ; for &, some end a query at #, and some take other bytes than ASCII for
// Latin-1. So a request is refused in which these could find another value.
func queryNamespace(r *http.Request, name string) (string, *refusal) {
	_, query, _ := strings.Cut(requestTarget(r), "?")
	if strings.ContainsAny(requestTarget(r), "#") || strings.Contains(query, ";") {
		return "", refuse(resultBadRequest,
			"the query must have no # and no ; that is not escaped (got %.200q)", query)
	}
	value, found := "", 0
	for pair := range strings.SplitSeq(query, "&") {
		key, escaped, _ := strings.Cut(pair, "=")
		key, keyErr := url.QueryUnescape(key)
		if keyErr == nil && !strings.EqualFold(key, name) {
			continue
		}
		text, err := url.QueryUnescape(escaped)
		if err = cmp.Or(keyErr, err); err != nil {
			return "", refuse(resultBadRequest, "the query has an %v", err)
		}
		if strings.ContainsFunc(escaped, isNotASCII) {
			return "", refuse(resultBadRequest,
				"the parameter %s must be percent-encoded (got %.260q)", name, escaped)
		}
		if found++; key == name {
			value = text
		}
	}
	switch {
	case found > 1:
		return "", refuse(resultBadRequest,
			"the query must have one parameter %s (got %d)", name, found)
	case value == "":
		return "", refuse(resultNotFound, "the query must have the namespace as %s=", name)
	}
	if want := expectedPathNamespace(value); want != "" {
		return "", refuse(resultBadRequest, "the query must have %s (got %.260q)", want, value)
	}
	return value, nil
}

// pattern is one -route: a path with a namespace, by its segments. One segment is the
// placeholder, the others are literals. It is a prefix: a path that matches may have
// more segments.
type pattern []string

// newPattern returns the pattern of a -route. A / at its end changes nothing.
func newPattern(route string) (pattern, error) {
	rest, ok := strings.CutPrefix(route, "/")
	if !ok {
		return nil, errors.New("it must begin with /")
	}
	p := pattern(strings.Split(strings.TrimSuffix(rest, "/"), "/"))
	placeholders := 0
	for _, segment := range p {
		if segment == placeholder {
			placeholders++
			continue
		}
		if err := checkLiteral(segment); err != nil {
			return nil, err
		}
	}
	if placeholders != 1 {
		return nil, fmt.Errorf("it must have one segment %s (got %d)",
			placeholder, placeholders)
	}
	return p, nil
}

// checkLiteral returns an error for a literal segment that no path has, or that is not
// read by all programs alike: one that is empty, a dot segment, or one with a character
// that has to be escaped (RFC 3986 §3.3). The path of a request is not decoded, so an
// escape would match only itself.
func checkLiteral(segment string) error {
	switch {
	case segment == "":
		return errors.New("it must have no empty segment")
	case strings.ContainsAny(segment, "{}"):
		return fmt.Errorf("the placeholder must be %s, and a whole segment (got %q)",
			placeholder, segment)
	case hasDotSegment(segment):
		return fmt.Errorf("it must have no dot segment (got %q)", segment)
	}
	if i := strings.IndexFunc(segment, isNotPathCharacter); i >= 0 {
		return fmt.Errorf("a segment must have characters of "+
			"[-._~a-zA-Z0-9!$&'()*+,;=:@] only (got %q)", segment)
	}
	return nil
}

// isNotPathCharacter reports whether c is a percent sign, or no pchar of RFC 3986 §3.3.
func isNotPathCharacter(c rune) bool {
	return isNotUnreserved(c) && !strings.ContainsRune("!$&'()*+,;=:@", c)
}

// isNotASCII reports whether c, or a byte that is not of UTF-8, is not of ASCII.
func isNotASCII(c rune) bool { return c >= utf8.RuneSelf }

// isNotUnreserved reports whether c is not unreserved (RFC 3986 §2.3).
func isNotUnreserved(c rune) bool {
	isLetter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	return !isLetter && (c < '0' || c > '9') && !strings.ContainsRune("-._~", c)
}

// String returns the pattern as a -route has it.
func (p pattern) String() string { return "/" + strings.Join(p, "/") }

// match returns the segment of the path at the placeholder, with its escapes. The
// other segments of the path must equal the segments of the pattern, byte for byte. The
// segment at the placeholder must not be empty. Any others may follow.
func (p pattern) match(path string) (segment string, ok bool) {
	rest, more := strings.CutPrefix(path, "/")
	for _, want := range p {
		if !more {
			return "", false
		}
		var next string
		next, rest, more = strings.Cut(rest, "/")
		switch {
		case want == placeholder && next != "":
			segment = next
		case next != want || want == placeholder:
			return "", false
		}
	}
	return segment, true
}

// overlaps reports whether some path matches both patterns. That is so if their first
// segments agree, as many as both have: what more one of them has, a path can have too.
// A placeholder agrees with any segment.
func (p pattern) overlaps(other pattern) bool {
	for i := range min(len(p), len(other)) {
		if p[i] != other[i] && p[i] != placeholder && other[i] != placeholder {
			return false
		}
	}
	return true
}
