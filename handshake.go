package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
)

// headerClientSubject gives the backend the subject of the client's certificate, which
// the router has verified. It is never taken from a client, nor from a proxy before the router:
// without -tls-client-ca no backend gets it, with TLS or without.
const headerClientSubject = "X-Client-Subject"

// checkUpgrade says why r is not a WebSocket upgrade that can be passed on, or
// nil. It judges what a router must be sure of; Sec-WebSocket-* is between the
// client and the backend.
func checkUpgrade(r *http.Request) *refusal {
	switch {
	case !hasToken(r.Header, "Upgrade", "websocket") || !hasToken(r.Header, "Connection", "upgrade"):
		return refuse(resultNotUpgrade, "not a WebSocket upgrade: Connection: Upgrade and Upgrade: websocket are required (RFC 6455 §4.1)")
	case !r.ProtoAtLeast(1, 1):
		return refuse(resultBadRequest, "an upgrade must use HTTP/1.1 (got %s; RFC 6455 §4.1)", r.Proto)
	case r.ContentLength != 0:
		return refuse(resultBadRequest, "an upgrade must not have a body")
	case r.Method != http.MethodGet:
		return refuse(resultBadRequest, "the method of an upgrade must be GET (got %.20q)", r.Method)
	}
	return checkPath(r)
}

// requestTarget is the request's target as the backend gets it: as it was sent, without
// the authority if it had one (RFC 9112 §3.2).
func requestTarget(r *http.Request) string {
	if strings.HasPrefix(r.RequestURI, "/") {
		return r.RequestURI
	}
	return r.URL.RequestURI()
}

// asksForUpgrade reports whether r asks for another protocol, or has a field of a
// WebSocket: only checkUpgrade may let it through.
func asksForUpgrade(r *http.Request) bool {
	for name := range r.Header {
		if name == "Upgrade" || strings.HasPrefix(name, "Sec-Websocket-") {
			return true
		}
	}
	return hasToken(r.Header, "Connection", "upgrade")
}

// checkPlain says why r, which is no upgrade, is not passed on, or nil.
func checkPlain(r *http.Request) *refusal {
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace {
		return refuse(resultBadRequest, "the method %s is not passed on", r.Method)
	}
	return checkPath(r)
}

// checkPath says why a request with r's path is not passed on, or nil.
//
// Without a slash it is part of a URL that has no authority (RFC 3986 §3): x:http://b/c
// would go on as http://b/c, of which a backend takes b for the host (RFC 9112 §3.2.2).
func checkPath(r *http.Request) *refusal {
	path := requestPath(r)
	isAsterisk := r.Method == http.MethodOptions && path == "*" // RFC 9112 §3.2.4
	switch {
	case !strings.HasPrefix(path, "/") && !isAsterisk:
		return refuse(resultBadRequest,
			"the target must be a path that begins with /, or a URL with a host (got %.200q)", r.RequestURI)
	case hasDotSegment(path):
		return refuse(resultBadRequest,
			"the path %.200q has a dot segment, which could name another namespace", path)
	}
	return nil
}

// requestPath is the target's path, with its escapes.
func requestPath(r *http.Request) string {
	path, _, _ := strings.Cut(requestTarget(r), "?")
	return path
}

// hasDotSegment reports whether a segment of the path is "." or ".." (RFC 3986
// §3.3) to anybody.
func hasDotSegment(path string) bool {
	if !strings.ContainsAny(path, `%\.`) {
		return false
	}
	isDots := func(segment string) bool { return segment == "." || segment == ".." }
	return slices.ContainsFunc(plainSegments(path), isDots)
}

// isSamePath reports whether the target's path is the other path to anybody: also to programs
// that ignore the case of letters, or that end a path where one begins, once it is decoded, a
// query, a fragment, or the end of a string in C.
func isSamePath(path, other string) bool {
	path = string(decodeAll(path))
	if end := strings.IndexAny(path, "?#\x00"); end >= 0 {
		path = path[:end]
	}
	return slices.EqualFunc(plainSegments(path), plainSegments(other), strings.EqualFold)
}

// plainSegments returns the segments of the path that are not empty, read as loosely as any
// program does: also where a dot or a slash is escaped, however often, where a backslash is taken
// for a slash, and before a parameter.
func plainSegments(path string) (all []string) {
	plain := strings.ReplaceAll(string(decodeAll(path)), `\`, "/")
	for segment := range strings.SplitSeq(plain, "/") {
		if segment, _, _ = strings.Cut(segment, ";"); segment != "" {
			all = append(all, segment)
		}
	}
	return all
}

// hasToken reports whether one of the comma-separated values of a header is the
// token, in any case (RFC 9110 §5.6.1).
func hasToken(h http.Header, name, token string) bool {
	for _, value := range h[name] {
		for part := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(textproto.TrimString(part), token) {
				return true
			}
		}
	}
	return false
}

// removeHopByHopHeaders removes the fields that end here.
func removeHopByHopHeaders(h http.Header) {
	named := connectionHeaders(h)
	maps.DeleteFunc(h, func(name string, _ []string) bool { return isHopByHop(name, named) })
}

// connectionHeaders returns the fields that Connection names, by canonical name, but
// for those that end here anyway.
func connectionHeaders(h http.Header) (names map[string]bool) {
	for _, value := range h["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			name = textproto.TrimString(name)
			if name == "" || strings.EqualFold(name, "Upgrade") || strings.EqualFold(name, "Keep-Alive") {
				continue
			}
			if names == nil {
				names = map[string]bool{}
			}
			names[http.CanonicalHeaderKey(name)] = true
		}
	}
	return names
}

// isHopByHop reports whether the field, which has its canonical name, is not to go
// on: the fields that Connection names, and the fields of RFC 9110 §7.6.1, are of one
// connection only.
func isHopByHop(name string, named map[string]bool) bool {
	switch name {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Te", "Transfer-Encoding", "Upgrade":
		return true
	}
	return named[name]
}

// countFields returns how many lines the header has. Host is not in it, and is one.
func countFields(h http.Header) int {
	count := 1
	for _, values := range h {
		count += len(values)
	}
	return count
}

// isRouterHeader reports whether the field says what only the router says: who routed the
// request, and where it came from. X-Real-IP and Forwarded (RFC 7239) would say that
// too, to backends that trust them, and nothing is appended to them, so what a client
// has put there ends here. So does Expect, which the router answers (expectsContinue).
func isRouterHeader(name string) bool {
	switch asCGIReads(name) {
	case headerPod, headerTable, headerStep, headerBackend, headerClientSubject, "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Real-Ip", "Forwarded", "Expect":
		return true
	}
	return false
}

// isInvalidFieldName reports whether the name has a space, which no token has (RFC 9110
// §5.6.2): some would read only the part before it. net/http refuses all other names that are
// no token. Its server refuses these too, but only in the head of a request: not in trailers,
// and neither do http.ReadRequest and http.ReadResponse.
func isInvalidFieldName(name string) bool { return strings.Contains(name, " ") }

// forwardedFor returns r's X-Forwarded-For with the peer's address appended. A
// Unix socket has none: there the proxy before us has said it.
func forwardedFor(r *http.Request) string {
	before := r.Header["X-Forwarded-For"]
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return strings.Join(before, ", ")
	}
	return strings.Join(append(slices.Clip(before), host), ", ")
}

// startRequestHead is the part of an upgrade request that does not depend on the backend.
// clientAddrs is what forwardedFor returned for it.
func startRequestHead(r *http.Request, clientAddrs, pod string) []byte {
	head := appendUpgrade(appendRequestLine(make([]byte, 0, 1024), r))
	return appendForwarded(head, r, clientAddrs, pod, isRouterHeader)
}

// startPlainHead is startRequestHead for a request that is no upgrade. Its body has the
// length that net/http has read, or is chunked: no other field says how long it is.
func startPlainHead(r *http.Request, clientAddrs, pod string) []byte {
	head := appendRequestLine(make([]byte, 0, 1024), r)
	switch {
	case r.ContentLength < 0:
		head = appendField(head, "Transfer-Encoding", "chunked")
	case r.ContentLength > 0 || len(r.Header["Content-Length"]) > 0:
		head = appendField(head, "Content-Length", strconv.FormatInt(r.ContentLength, 10))
	}
	for name := range r.Trailer {
		if !isFraming(name) && !isRouterHeader(name) {
			head = appendField(head, "Trailer", name)
		}
	}
	if hasToken(r.Header, "Te", "trailers") {
		head = appendField(head, "Te", "trailers")
	}
	return appendForwarded(head, r, clientAddrs, pod, func(name string) bool {
		return isFraming(name) || isRouterHeader(name)
	})
}

// isFraming reports whether the field says where a message ends or what it is for.
func isFraming(name string) bool {
	switch asCGIReads(name) {
	case "Content-Length", "Transfer-Encoding", "Trailer", "Host":
		return true
	}
	return false
}

// asCGIReads returns the canonical name of the field that CGI programs take this one for:
// they read _ as -.
func asCGIReads(name string) string {
	if strings.Contains(name, "_") {
		return http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
	}
	return name
}

// appendTrailers appends the trailers (RFC 9110 §6.5) that go on, and the end of the body.
func appendTrailers(body []byte, trailers http.Header) []byte {
	body = appendFields(body, trailers, nil, func(name string) bool {
		return isInvalidFieldName(name) || isFraming(name) || isRouterHeader(name)
	})
	return append(body, "\r\n"...)
}

// appendRequestLine appends the first line of r and its Host.
func appendRequestLine(head []byte, r *http.Request) []byte {
	head = append(append(head, r.Method...), ' ')
	head = append(head, requestTarget(r)...)
	head = append(head, " HTTP/1.1\r\n"...)
	return appendField(head, "Host", r.Host)
}

// appendForwarded appends the fields of r that go on and are not left out, and those of
// the router that do not depend on the backend.
func appendForwarded(
	head []byte, r *http.Request, clientAddrs, pod string, omit func(name string) bool,
) []byte {
	if clientAddrs != "" {
		head = appendField(head, "X-Forwarded-For", clientAddrs)
	}
	proto, host := "http", r.Host // unless somebody before us has said it, for all who come after
	if r.TLS != nil {
		proto = "https"
	}
	named := connectionHeaders(r.Header)
	if before := r.Header.Get("X-Forwarded-Proto"); before != "" && !named["X-Forwarded-Proto"] {
		proto = before
	}
	if before := r.Header.Get("X-Forwarded-Host"); before != "" && !named["X-Forwarded-Host"] {
		host = before
	}
	head = appendField(head, "X-Forwarded-Proto", proto)
	head = appendField(head, "X-Forwarded-Host", host)
	head = appendField(head, headerPod, pod)
	if subject := clientSubject(r.TLS); subject != "" {
		head = appendField(head, headerClientSubject, subject)
	}
	return appendFields(head, r.Header, named, omit)
}

// finishRequestHead builds the full head, as the backend with this name gets it, from the part
// that startRequestHead made, in its memory if there is room. The owner's assignment has stamp
// and step. A caller that needs the beginning again passes it without room
// (slices.Clip).
func finishRequestHead(begun []byte, stamp string, step int64, backend string) []byte {
	head := appendField(begun, headerTable, stamp)
	head = append(append(head, headerStep...), ": "...)
	head = append(strconv.AppendInt(head, step, 10), "\r\n"...)
	head = appendField(head, headerBackend, backend)
	return append(head, "\r\n"...)
}

// expectsContinue reports whether a 101 must have a 100 before it (RFC 9110 §7.8). The
// router sends the only 100: it drops each 100 of the backend, as any interim answer.
func expectsContinue(r *http.Request) bool { return hasToken(r.Header, "Expect", "100-continue") }

// switchingProtocolsHead is the 101 as the client gets it. It has no length (RFC 9110
// §8.6), whatever the backend says of one: what follows a 101 is the other protocol (RFC
// 9112 §6.3).
func switchingProtocolsHead(resp *http.Response) []byte {
	head := append(make([]byte, 0, 512), "HTTP/1.1 101 Switching Protocols\r\n"...)
	head = appendUpgrade(head)
	head = appendFields(head, resp.Header, connectionHeaders(resp.Header), func(name string) bool {
		return isInvalidFieldName(name) || name == "Content-Length"
	})
	return append(head, "\r\n"...)
}

func appendUpgrade(head []byte) []byte {
	return append(head, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
}

// wireName is a field's name as it is sent. Sec-WebSocket-* is spelled as RFC 6455
// does: net/http has Sec-Websocket-*, which is the same to HTTP (RFC 9110 §5.1) but
// not to every WebSocket program. Those of the RFC cost no memory.
func wireName(name string) string {
	rest, ok := strings.CutPrefix(name, "Sec-Websocket-")
	if !ok {
		return name
	}
	for _, known := range [...]string{"Sec-WebSocket-Key", "Sec-WebSocket-Version",
		"Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions", "Sec-WebSocket-Accept"} {
		if strings.EqualFold(known, name) {
			return known
		}
	}
	return "Sec-WebSocket-" + rest
}

// appendFields appends the fields of h that go on, as Connection has not named
// them, and are not left out.
func appendFields(head []byte, h http.Header, named map[string]bool, omit func(name string) bool) []byte {
	for name, values := range h {
		if isHopByHop(name, named) || omit(name) {
			continue
		}
		for _, value := range values {
			head = appendField(head, wireName(name), value)
		}
	}
	return head
}

// appendField appends one field, whose value is as net/http has read it: without
// CR and LF.
func appendField(head []byte, name, value string) []byte {
	head = append(append(head, name...), ": "...)
	return append(append(head, value...), "\r\n"...)
}

// handshake sends head to the backend, unless it is empty, and reads the answer.
// maxHead bounds the answer's head in bytes. early is what the backend sent after a
// 101, a part of br's buffer: it is valid until br is used again. The body of any other
// answer is read from conn through br. The caller sets conn's deadline and closes it.
func handshake(conn net.Conn, br *bufio.Reader, head []byte, maxHead int) (resp *http.Response, early []byte, err error) {
	if len(head) > 0 {
		if _, err := conn.Write(head); err != nil {
			return nil, nil, err
		}
	}
	limit := &io.LimitedReader{R: conn, N: int64(maxHead)}
	br.Reset(limit)
	resp, err = readResponse(br)
	if err == nil && resp.StatusCode == http.StatusSwitchingProtocols {
		early, _ = br.Peek(br.Buffered()) // what is buffered: no error
	}
	limit.N = math.MaxInt64
	return resp, early, err
}

// readResponse reads the head of a backend's answer that is not an interim one: a
// 101 to WebSocket, or any other.
func readResponse(br *bufio.Reader) (*http.Response, error) {
	for range maxInterimResponses + 1 {
		resp, err := http.ReadResponse(br, nil) // nil: to a GET
		switch {
		case err != nil:
			return nil, fmt.Errorf("read the answer: %w", err)
		case resp.StatusCode < 100 || resp.StatusCode > 599:
			return nil, fmt.Errorf("the status must be 100 to 599 (got %03d; RFC 9110 §15)", resp.StatusCode)
		case resp.StatusCode/100 > 1:
			return resp, nil
		case resp.StatusCode != http.StatusSwitchingProtocols: // an interim one (RFC 9110 §15.2)
		case !hasToken(resp.Header, "Upgrade", "websocket"):
			return nil, fmt.Errorf("the backend switched to %.40q instead of websocket", resp.Header.Get("Upgrade"))
		default:
			return resp, nil
		}
	}
	return nil, fmt.Errorf("more than %d interim answers", maxInterimResponses)
}

// maxInterimResponses is how many interim (1xx) answers may come before the final one.
const maxInterimResponses = 8
