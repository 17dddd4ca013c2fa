package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// mustMatcher returns the matcher of -namespace-from and -route.
func mustMatcher(t testing.TB, from string, routes ...string) *namespaceMatcher {
	t.Helper()
	l, err := newNamespaceMatcher(from, routes)
	must(t, err)
	return l
}

// defaultMatcher returns the matcher without flags.
func defaultMatcher(t testing.TB) *namespaceMatcher { return mustMatcher(t, "path") }

// requestOf returns a request with the target and the host.
func requestOf(target, host string) *http.Request {
	return &http.Request{RequestURI: target, URL: &url.URL{Path: target}, Host: host}
}

// wantNamespace checks which namespace the request has, or with which status and text it
// is refused.
func wantNamespace(t *testing.T, l *namespaceMatcher, r *http.Request, want string, status int, text string) {
	t.Helper()
	got, refused := l.namespace(r)
	if got != want || (refused == nil) != (status == 0) {
		t.Errorf("%s of %q: namespace %q, %v; want %q", r.RequestURI, r.Host, got, refused, want)
	}
	if refused != nil && (refused.result.refusalStatus() != status || !strings.Contains(refused.reason, text)) {
		t.Errorf("%s: %d %q, want %d with %q", r.RequestURI, refused.result.refusalStatus(), refused.reason, status, text)
	}
}

func TestNamespaceFromHost(t *testing.T) {
	tests := map[string]struct{ host, want string }{
		"name":        {"ns-01.mydomain.com", "ns-01"},
		"port":        {"ns-01.mydomain.com:8443", "ns-01"},
		"upper case":  {"NS-01.MyDomain.com", "ns-01"},
		"one label":   {"localhost", ""},
		"IPv4":        {"127.0.0.1:8000", ""},
		"IPv6":        {"[::1]:8000", ""},
		"empty label": {".mydomain.com", ""},
		"no domain":   {"ns-01.", ""},
		"bad label":   {"ns%2f.mydomain.com", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			status := 0
			if tt.want == "" {
				status = 400
			}
			wantNamespace(t, mustMatcher(t, "host"), requestOf("/any/path", tt.host), tt.want, status, "the host must ")
		})
	}
}

func TestNamespaceFromPath(t *testing.T) {
	tests := map[string]struct {
		routes string // separated by spaces
		path   string
		want   string
		status int
		text   string
	}{
		"as ever":               {"", "/ws/ns-01", "ns-01", 0, ""},
		"as ever, more":         {"", "/ws/ns-01/deep//er", "ns-01", 0, ""},
		"as ever, a query":      {"", "/ws/ns-01?a=/ws/b", "ns-01", 0, ""},
		"as ever, not":          {"", "/wss/ns-01", "", 404, `the path must be /ws/{namespace} (got "/wss/ns-01")`},
		"as ever, no namespace": {"", "/ws", "", 404, "must be /ws/{namespace}"},
		"empty namespace":       {"", "/ws/", "", 404, "must be /ws/{namespace}"},
		"empty, and more":       {"", "/ws//ns-01", "", 404, "must be /ws/{namespace}"},
		"slashes before":        {"", "//ws/ns-01", "", 404, "must be /ws/{namespace}"},
		"an escaped literal":    {"", "/%77s/ns-01", "", 404, "must be /ws/{namespace}"},
		"another case":          {"", "/WS/ns-01", "", 404, "must be /ws/{namespace}"},
		"escaped":               {"", "/ws/my%20room", "my room", 0, ""},
		"escaped, not ASCII":    {"", "/ws/caf%C3%A9/a", "café", 0, ""},
		"escaped needlessly":    {"", "/ws/%6es%2D01", "ns-01", 0, ""},
		"characters of a name":  {"", "/ws/-._~!$&'()*+,;=:@|a", "-._~!$&'()*+,;=:@|a", 0, ""},
		"plus is a plus":        {"", "/ws/a+b", "a+b", 0, ""},
		"percent sign":          {"", "/ws/100%25", "100%", 0, ""},
		"percent sign, digits":  {"", "/ws/a%2541", "a%41", 0, ""},
		"escaped slash":         {"", "/ws/ns%2F01", "", 400, `(got "ns/01")`},
		"slash, twice":          {"", "/ws/ns%252f01", "", 400, `(got "ns%2f01")`},
		"slash, three times":    {"", "/ws/ns%25252f01", "", 400, `(got "ns%252f01")`},
		"backslash":             {"", "/ws/a%5Cb", "", 400, `(got "a\\b")`},
		"raw backslash":         {"", `/ws/a\b`, "", 400, `(got "a`},
		"dots":                  {"", "/ws/%2e%2E", "", 400, `(got "..")`},
		"dots, twice":           {"", "/ws/%252e%252e", "", 400, `(got "%2e%2e")`},
		"dots and a parameter":  {"", "/ws/..;a", "", 400, `(got "..;a")`},
		"control":               {"", "/ws/a%00", "", 400, `(got "a\x00")`},
		"C1 control":            {"", "/ws/a%C2%85", "", 400, `(got "a\u0085")`},
		"DEL":                   {"", "/ws/a%7F", "", 400, `(got "a\x7f")`},
		"not UTF-8":             {"", "/ws/a%FF", "", 400, `(got "a\xff")`},
		"a surrogate":           {"", "/ws/%ED%A0%80", "", 400, `the path must have a namespace`},
		"253 bytes":             {"", "/ws/" + strings.Repeat("%C3%A9", 126) + "a", strings.Repeat("é", 126) + "a", 0, ""},
		"254 bytes":             {"", "/ws/" + strings.Repeat("%C3%A9", 127), "", 400, "1 to 253 bytes"},
		"slash at the end":      {"/d/{namespace}/", "/d/a", "a", 0, ""},
		"slash at both ends":    {"/d/{namespace}/", "/d/a/", "a", 0, ""},
		"any more":              {"/d/{namespace}/", "/d/a/ws/b", "a", 0, ""},
		"in the middle":         {"/api/{namespace}/events", "/api/a/events", "a", 0, ""},
		"in the middle, more":   {"/api/{namespace}/events", "/api/a/events/b", "a", 0, ""},
		"in the middle, less":   {"/api/{namespace}/events", "/api/a", "", 404, "/api/{namespace}/events"},
		"in the middle, slash":  {"/api/{namespace}/events", "/api/a/", "", 404, "/api/{namespace}/events"},
		"a longer segment":      {"/api/{namespace}/events", "/api/a/events2", "", 404, "/api/{namespace}/events"},
		"first":                 {"/{namespace}", "/a/b", "a", 0, ""},
		"first, none":           {"/{namespace}", "/", "", 404, "must be /{namespace}"},
		"the second":            {"/a/{namespace} /b/{namespace}/c", "/b/x/c", "x", 0, ""},
		"none of two":           {"/a/{namespace} /b/{namespace}/c", "/b/x", "", 404, "the path must be /a/{namespace} or /b/{namespace}/c (got"},
		"the default is not":    {"/a/{namespace}", "/ws/ns-01", "", 404, "must be /a/{namespace}"},
		"no path":               {"", "*", "", 404, `(got "*")`},
		"the placeholder":       {"", "/ws/%7Bnamespace%7D", "{namespace}", 0, ""},
		"characters of a path":  {"/!$&'()*+,;=:@/-._~/{namespace}", "/!$&'()*+,;=:@/-._~/a", "a", 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l := mustMatcher(t, "path", strings.Fields(tt.routes)...)
			for _, request := range []*http.Request{requestOf(tt.path, "h"), absoluteRequest(t, tt.path)} {
				if request.RequestURI != tt.path && strings.Contains(tt.path, `\`) {
					continue // a URL has it escaped
				}
				wantNamespace(t, l, request, tt.want, tt.status, tt.text)
			}
		})
	}
}

// absoluteRequest returns a request whose target has an authority (RFC 9112 §3.2.2).
func absoluteRequest(t *testing.T, path string) *http.Request {
	t.Helper()
	if !strings.HasPrefix(path, "/") {
		return requestOf(path, "h") // has none
	}
	r, err := http.NewRequest("GET", "http://other.example"+path, nil)
	must(t, err)
	r.RequestURI = r.URL.String()
	return r
}

func TestNamespaceFromQuery(t *testing.T) {
	tests := map[string]struct {
		target, want string
		status       int
		text         string
	}{
		"any path":             {"/?doc=a", "a", 0, ""},
		"a deep path":          {"/b/c//d?x=1&doc=a&y", "a", 0, ""},
		"escaped":              {"/?d%6Fc=a%2Db", "a-b", 0, ""},
		"question marks":       {"/?x=?&doc=a", "a", 0, ""},
		"none":                 {"/doc/a", "", 404, "the query must have the namespace as doc="},
		"another":              {"/?docs=a", "", 404, "as doc="},
		"empty":                {"/?doc=&x", "", 404, "as doc="},
		"no value":             {"/?doc", "", 404, "as doc="},
		"another case":         {"/?Doc=a", "", 404, "as doc="},
		"in the path":          {"/doc=a", "", 404, "as doc="},
		"two":                  {"/?doc=a&doc=b", "", 400, "one parameter doc (got 2)"},
		"the same twice":       {"/?doc=a&doc=a", "", 400, "one parameter doc (got 2)"},
		"two, one empty":       {"/?doc=a&doc", "", 400, "one parameter doc (got 2)"},
		"two, one escaped":     {"/?doc=a&%64oc=b", "", 400, "one parameter doc (got 2)"},
		"two cases":            {"/?doc=a&DOC=b", "", 400, "one parameter doc (got 2)"},
		"semicolons":           {"/?x=;doc=b&doc=a", "", 400, "no # and no ;"},
		"a fragment":           {"/?doc=a#b", "", 400, "no # and no ;"},
		"a fragment, earlier":  {"/#?doc=a", "", 400, "no # and no ;"},
		"an escaped separator": {"/?x=%26doc=b&doc=a", "a", 0, ""},
		"bad escape":           {"/?doc=a%2", "", 400, `the query has an invalid URL escape "%2"`},
		"bad escape of a name": {"/?doc=a&d%zz=b", "", 400, `the query has an invalid URL escape "%zz"`},
		"bad escape elsewhere": {"/?doc=a&x=%zz", "a", 0, ""},
		"bad namespace":        {"/?doc=a%2Fb", "", 400, `(got "a/b")`},
		"plus is a space":      {"/?doc=a+b%20c", "a b c", 0, ""},
		"an escaped plus":      {"/?doc=a%2Bb", "a+b", 0, ""},
		"not ASCII":            {"/?doc=caf%C3%A9", "café", 0, ""},
		"dots, twice":          {"/?doc=%252e%252e", "", 400, `(got "%2e%2e")`},
		"not ASCII elsewhere":  {"/?x=é&doc=a", "a", 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l := mustMatcher(t, "query:doc")
			for _, request := range []*http.Request{requestOf(tt.target, "h"), absoluteRequest(t, tt.target)} {
				if request.RequestURI != tt.target && strings.Contains(tt.target, "#") {
					continue // a URL parser takes it away
				}
				wantNamespace(t, l, request, tt.want, tt.status, tt.text)
			}
		})
	}
}

// TestBadMatchers: what no request could have, or what several programs read differently,
// is refused at the start.
func TestBadMatchers(t *testing.T) {
	tests := map[string]struct{ from, routes, want string }{
		"nowhere":             {"", "", `-namespace-from must be path, host or query:NAME (got "")`},
		"query alone":         {"query", "", `must be path, host or query:NAME (got "query")`},
		"query, odd name":     {"query:a=b", "", "must have a name of characters of [-._~a-zA-Z0-9]"},
		"query and routes":    {"query:doc", "/ws/{namespace}", "-route requires -namespace-from path (got query:doc)"},
		"host and routes":     {"host", "/ws/{namespace}", "-route requires -namespace-from path (got host)"},
		"no slash":            {"path", "{namespace}", `-route "{namespace}": it must begin with /`},
		"a URL":               {"path", "ws://h/{namespace}", "it must begin with /"},
		"no placeholder":      {"path", "/ws", "it must have one segment {namespace} (got 0)"},
		"root":                {"path", "/", "it must have no empty segment"},
		"two placeholders":    {"path", "/{namespace}/{namespace}", "it must have one segment {namespace} (got 2)"},
		"a part of a segment": {"path", "/ws-{namespace}", `the placeholder must be {namespace}, and a whole segment (got "ws-{namespace}")`},
		"another name":        {"path", "/ws/{room}", `the placeholder must be {namespace}, and a whole segment (got "{room}")`},
		"a rest":              {"path", "/ws/{namespace...}", "and a whole segment"},
		"one brace":           {"path", "/ws/{namespace}/}", "and a whole segment"},
		"slashes":             {"path", "/ws//{namespace}", "it must have no empty segment"},
		"slashes at the end":  {"path", "/ws/{namespace}//", "it must have no empty segment"},
		"slashes first":       {"path", "//{namespace}", "it must have no empty segment"},
		"dots":                {"path", "/ws/../{namespace}", `it must have no dot segment (got "..")`},
		"dot":                 {"path", "/{namespace}/.", `it must have no dot segment (got ".")`},
		"dots and parameters": {"path", "/..;a/{namespace}", "it must have no dot segment"},
		"escape":              {"path", "/%77s/{namespace}", "a segment must have characters of [-._~a-zA-Z0-9!$&'()*+,;=:@] only (got \"%77s\")"},
		"escaped dots":        {"path", "/%2e%2e/{namespace}", "it must have no dot segment"},
		"query":               {"path", "/{namespace}?a", "and a whole segment"},
		"query of a literal":  {"path", "/{namespace}/a?b", "a segment must have"},
		"fragment":            {"path", "/{namespace}/a#b", "a segment must have"},
		"backslash":           {"path", `/{namespace}/a\b`, "a segment must have"},
		"control":             {"path", "/{namespace}/a\x01", "a segment must have"},
		"not ASCII":           {"path", "/{namespace}/é", "a segment must have"},
		"expression":          {"path", "/{namespace}/(a|b)", "a segment must have"},
		"the same":            {"path", "/ws/{namespace} /ws/{namespace}/", "-route /ws/{namespace} and -route /ws/{namespace} overlap"},
		"one is longer":       {"path", "/ws/{namespace} /ws/{namespace}/a", "-route /ws/{namespace} and -route /ws/{namespace}/a overlap: a path can match both"},
		"two ways":            {"path", "/a/{namespace} /{namespace}/b", "-route /a/{namespace} and -route /{namespace}/b overlap"},
		"the third":           {"path", "/a/{namespace} /b/{namespace} /{namespace}/b/c", "-route /a/{namespace} and -route /{namespace}/b/c overlap"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := newNamespaceMatcher(tt.from, strings.Fields(tt.routes))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %s", err, tt.want)
			}
		})
	}
}

// TestPatternsOverlap holds overlaps against all short paths: two patterns overlap if one
// of these paths matches both.
func TestPatternsOverlap(t *testing.T) {
	segments := []string{"a", "b", placeholder}
	var patterns []pattern
	for _, path := range shortPaths(segments, 3) {
		if p, err := newPattern(path); err == nil {
			patterns = append(patterns, p)
		}
	}
	if len(patterns) != 1+2*2+3*2*2 {
		t.Fatalf("%d patterns: %v", len(patterns), patterns)
	}
	paths := shortPaths([]string{"a", "b", "c"}, 3)
	for _, p := range patterns {
		for _, q := range patterns {
			both := slices.ContainsFunc(paths, func(path string) bool {
				_, first := p.match(path)
				_, second := q.match(path)
				return first && second
			})
			if p.overlaps(q) != both {
				t.Errorf("%s and %s overlap: %t, want %t", p, q, p.overlaps(q), both)
			}
		}
	}
}

// shortPaths returns all paths of 1 to most segments.
func shortPaths(segments []string, most int) (all []string) {
	last := []string{""}
	for range most {
		var next []string
		for _, path := range last {
			for _, segment := range segments {
				next = append(next, path+"/"+segment)
			}
		}
		all, last = append(all, next...), next
	}
	return all
}

// FuzzPattern: a path matches a pattern if it has the pattern's segments with the
// namespace in the place of the placeholder, and perhaps more after them.
func FuzzPattern(f *testing.F) {
	f.Add("/ws/{namespace}", "/ws/ns-01/deep")
	f.Add("/d/{namespace}/", "/d//a")
	f.Add("/api/{namespace}/events", "/api/%2F/events")
	f.Add("/{namespace}", "/{namespace}")
	f.Add("//{namespace}", "ws")
	f.Fuzz(func(t *testing.T, route, path string) {
		p, err := newPattern(route)
		if err != nil {
			return
		}
		if again, err := newPattern(p.String()); err != nil || !slices.Equal(again, p) {
			t.Fatalf("%q is %q, and that is %q, error %v", route, p, again, err)
		}
		namespace, ok := p.match(path)
		whole := strings.Replace(p.String(), placeholder, namespace, 1)
		fits := namespace != "" && !strings.Contains(namespace, "/") &&
			(path == whole || strings.HasPrefix(path, whole+"/"))
		if ok != fits {
			t.Fatalf("%q matches %q: %t, with namespace %q", path, route, ok, namespace)
		}
		if segments := strings.Split(path, "/"); !ok && len(segments) > len(p) {
			at := slices.Index(p, placeholder)
			whole := strings.Replace(p.String(), placeholder, segments[1+at], 1)
			if segments[1+at] != "" && strings.HasPrefix(path+"/", whole+"/") {
				t.Fatalf("%q does not match %q", path, route)
			}
		}
	})
}

// TestNamespaceThatNoURLHas has segments as only a request can have them, and no URL.
func TestNamespaceThatNoURLHas(t *testing.T) {
	for _, segment := range []string{"café", "a#b", "#", "\xff", "a\x80", "%", "%2", "%zz", "a%C3%A"} {
		wantNamespace(t, defaultMatcher(t), requestOf("/ws/"+segment, "h"), "", 400, "the path must be percent-encoded")
	}
	for _, value := range []string{"café", "caf\xe9", "a\x80"} {
		wantNamespace(t, mustMatcher(t, "query:doc"), requestOf("/?doc="+value, "h"), "", 400,
			"the parameter doc must be percent-encoded")
	}
}

// TestSpellingsOfANamespace: however a name is escaped in a path, it is one namespace, with
// one owner. So it is in a query.
func TestSpellingsOfANamespace(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	paths, queries := defaultMatcher(t), mustMatcher(t, "query:doc")
	table := tableOf(7, map[string]string{"doc_x3A42": "backend-3"}, nil)
	for range 2000 {
		name := randomName(random)
		owner, _ := table.ownerOf(name)
		for range 3 {
			escaped := randomEscape(random, name)
			wantNamespace(t, paths, requestOf("/ws/"+escaped+"/%41", "h"), name, 0, "")
			wantNamespace(t, queries, requestOf("/?doc="+escaped, "h"), name, 0, "")
			got, _ := paths.namespace(requestOf("/ws/"+escaped, "h"))
			if again, _ := table.ownerOf(got); again != owner {
				t.Fatalf("%q has owner %d, and as %s %d", name, owner, escaped, again)
			}
		}
	}
}

// randomEscape returns a path's segment for the name, with random escapes that need not be.
func randomEscape(random *rand.Rand, name string) string {
	var escaped strings.Builder
	for _, c := range []byte(name) {
		switch random.IntN(3) {
		case 0:
			fmt.Fprintf(&escaped, "%%%02X", c)
		case 1:
			fmt.Fprintf(&escaped, "%%%02x", c)
		case 2:
			if isNotUnreserved(rune(c)) {
				fmt.Fprintf(&escaped, "%%%02X", c)
				continue
			}
			escaped.WriteByte(c)
		}
	}
	return escaped.String()
}
