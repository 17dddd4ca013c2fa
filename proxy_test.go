package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

func TestProxyRefuses(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	good := upgradeRequest("/ws/ns-01")
	with := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	tests := map[string]struct {
		request string
		status  int
		result  result
		says    string
	}{
		"unknown path":               {with("/ws/ns-01", "/other"), 404, resultNotFound, `"/other"`},
		"root":                       {with("/ws/ns-01", "/"), 404, resultNotFound, `"/"`},
		"no namespace":               {with("/ws/ns-01", "/ws/"), 404, resultNotFound, `"/ws/"`},
		"empty namespace":            {with("/ws/ns-01", "/ws//x"), 404, resultNotFound, `"/ws//x"`},
		"control character":          {with("/ws/ns-01", "/ws/ns%0A01"), 400, resultBadRequest, `"ns\n01"`},
		"not UTF-8":                  {with("/ws/ns-01", "/ws/ns%FF01"), 400, resultBadRequest, `"ns\xff01"`},
		"slash escaped twice":        {with("/ws/ns-01", "/ws/ns-01%252F..%252Fns-02"), 400, resultBadRequest, "decoded again"},
		"not escaped":                {with("/ws/ns-01", "/ws/é"), 400, resultBadRequest, "not ASCII"},
		"escaped slash":              {with("/ws/ns-01", "/ws/ns-01%2F..%2Fns-02"), 400, resultBadRequest, "namespace"},
		"254 characters":             {with("ns-01", strings.Repeat("a", 254)), 400, resultBadRequest, "1 to 253"},
		"dots":                       {with("ns-01", ".."), 400, resultBadRequest, `".."`},
		"dot segment":                {with("/ws/ns-01", "/ws/ns-01/../ns-02"), 400, resultBadRequest, "dot segment"},
		"escaped dot segment":        {with("/ws/ns-01", "/ws/ns-01/%2e%2E/ns-02"), 400, resultBadRequest, "dot segment"},
		"dot segment, escaped twice": {with("/ws/ns-01", "/ws/ns-01/%252e%252E/ns-02"), 400, resultBadRequest, "dot segment"},
		"escaped slash after dots":   {with("/ws/ns-01", "/ws/ns-01/..%2Fns-02"), 400, resultBadRequest, "dot segment"},
		"escaped backslash":          {with("/ws/ns-01", "/ws/ns-01/..%5Cns-02"), 400, resultBadRequest, "dot segment"},
		"backslash":                  {with("/ws/ns-01", `/ws/ns-01/..\ns-02`), 400, resultBadRequest, "dot segment"},
		"dots with a parameter":      {with("/ws/ns-01", "/ws/ns-01/..;x/ns-02"), 400, resultBadRequest, "dot segment"},
		"a name with a backslash":    {with("/ws/ns-01", `/ws/%6Es-01%5C/"`), 400, resultBadRequest, `"ns-01\\"`},
		"upgrade without connection": {with("Connection: keep-alive, Upgrade\r\n", ""), 426, resultNotUpgrade, "Connection: Upgrade"},
		"other protocol":             {with("Upgrade: websocket", "Upgrade: h2c"), 426, resultNotUpgrade, "Upgrade: websocket"},
		"post":                       {with("GET", "POST"), 400, resultBadRequest, `"POST"`},
		"body":                       {with("\r\n\r\n", "\r\nContent-Length: 2\r\n\r\nhi"), 400, resultBadRequest, "body"},
		"chunked body":               {with("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 400, resultBadRequest, "body"},
		"HTTP/1.0":                   {with("HTTP/1.1", "HTTP/1.0"), 400, resultBadRequest, "HTTP/1.0"},
		"two Host":                   {with("Host: www.mydomain.com\r\n", "Host: a\r\nHost: b\r\n"), 400, resultBadHead, "Bad Request"},
		"no Host":                    {with("Host: www.mydomain.com\r\n", ""), 400, resultBadHead, "Host"},
		"head too long":              {with("\r\n\r\n", "\r\nX-Long: "+strings.Repeat("x", 20<<10)+"\r\n\r\n"), 431, resultBadHead, ""},
		"namespace refused":          {with("ns-01", "bad"), 503, resultUnresolved, "is invalid or conflicts"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := startProxy(t, []string{backend.addr}, map[string]string{"bad": "bakend-0"}, nil)
			_, _, resp := p.ask(t, tt.request)
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status {
				t.Errorf("status %d %q, want %d", resp.StatusCode, body, tt.status)
			}
			p.mustRefuse(t, tt.status, string(body), tt.says)
			if got := resp.Header.Get("Upgrade") == "websocket"; got != (tt.status == 426) {
				t.Errorf("Upgrade: %q", resp.Header.Get("Upgrade"))
			}
			if got := resp.Header.Get("Retry-After") == "1"; got != (tt.status == 503) {
				t.Errorf("Retry-After: %q", resp.Header.Get("Retry-After"))
			}
			p.waitResult(t, tt.result)
		})
	}
	if heads := backend.heads(); len(heads) > 0 {
		t.Errorf("the backend was asked: %q", heads)
	}
}

func TestProxyNoTable(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, nil, nil)
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d, Retry-After %q; want 503 and 1", resp.StatusCode, resp.Header.Get("Retry-After"))
	}
	p.waitResult(t, resultNoTable)
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t), logQueue: newLogQueue(io.Discard)}
	body, err := io.ReadAll(answered(a, "/readyz").Body)
	must(t, err)
	wantEqual(t, "/readyz, where no source says what is missing", string(body), "there is no routing table yet\n")
}

// sortedHead is head with its fields in the order of the alphabet: theirs means
// nothing (RFC 9110 §5.3).
func sortedHead(head string) string {
	lines := strings.SplitAfter(head, "\r\n")
	slices.Sort(lines[1 : len(lines)-2])
	return strings.Join(lines, "")
}

func TestProxyForwardsTheRequest(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	_, _, resp := p.ask(t, "GET /ws/ns-01/deep//er/%41?q=%2e%2e&x HTTP/1.1\r\nhost: www.mydomain.com:8443\r\n"+
		"Connection: keep-alive, Upgrade, X-Secret\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nUpgrade: WebSocket\r\n"+
		"sec-websocket-version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: chat, superchat\r\n"+
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nOrigin: https://other.example\r\nCookie: a=b\r\n"+
		"X-Secret: hop\r\nX-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\n"+
		"X-Real-IP: 203.0.113.66\r\nx_real_ip: 203.0.113.66\r\nForwarded: for=203.0.113.66\r\nForwarded: for=203.0.113.67;host=h\r\n"+
		"X-Router-Pod: forged\r\nX-Router-Table: forged\r\nX-Router-Step: 7\r\nx_router_pod: forged\r\nX-Router-Backend: backend-7\r\nX_Router_Backend: backend-7\r\n\r\n")
	if resp.StatusCode != 101 {
		t.Fatalf("status %s, want 101", resp.Status)
	}
	want := "GET /ws/ns-01/deep//er/%41?q=%2e%2e&x HTTP/1.1\r\nHost: www.mydomain.com:8443\r\n" +
		"Connection: Upgrade\r\nCookie: a=b\r\nOrigin: https://other.example\r\n" +
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Version: 13\r\n" +
		"Upgrade: websocket\r\nX-Forwarded-For: 203.0.113.9, 127.0.0.1\r\nX-Forwarded-Host: www.mydomain.com:8443\r\n" +
		"X-Forwarded-Proto: https\r\nX-Router-Backend: backend-0\r\nX-Router-Pod: router-x\r\nX-Router-Table: " + p.tables.table().stamp + "\r\n" +
		fmt.Sprintf("X-Router-Step: %d\r\n\r\n", p.mover.assignmentOf("ns-01").step)
	if got := backend.heads()[0]; sortedHead(got) != sortedHead(want) {
		t.Errorf("the backend got\n%s\nwant\n%s", got, want)
	}
	if got := resp.Header.Get("Sec-WebSocket-Accept"); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		t.Errorf("Sec-WebSocket-Accept: %q", got)
	}
}

// outside puts a view in force as a router has it that is not a member of the hand-off.
func outside(p *proxy) {
	p.mover.shareHandoff(newSharedHandoff(kubeClient{}, "edge", "hand-off", "router-x", "uid", "a=b", p.log))
	p.mover.current.Store(&view{handoffPlan: &handoffPlan{records: []planRecord{{}}}, tables: []*table{nil}, servesNone: true})
}

// anyRequests are an upgrade in both ways, and a plain request.
func anyRequests(path string) map[string]string {
	requests := bothWays(path)
	requests["no upgrade"] = plainRequest(path)
	return requests
}

// waitReason waits for the log line of a request of anyRequests that failed.
func (p *testProxy) waitReason(t *testing.T, way, reason string) {
	t.Helper()
	message := "upgrade failed"
	if way == "no upgrade" {
		message = "request failed"
	}
	if got := fmt.Sprint(p.tail.wait(t, message, 1)["error"]); !strings.Contains(got, reason) {
		t.Errorf("the reason is %q, want %q in it", got, reason)
	}
}

// A router may see the plan of the others before it has a table of its own.
func TestPlanBeforeTable(t *testing.T) {
	for way, request := range anyRequests("/ws/ns-01") {
		t.Run(way, func(t *testing.T) {
			p := startProxy(t, []string{"127.0.0.1:1"}, nil, outside)
			_, _, resp := p.ask(t, request)
			wantEqual(t, "status", resp.StatusCode, 503)
			p.waitReason(t, way, "the router has no routing table yet")
			wantEqual(t, "requests that are pending", p.underWay(), 0)
		})
	}
}

// A router that is not a member of the hand-off does not know the owner. Clients wait for
// that, and the log names no backend.
func TestOwnerNotKnownHere(t *testing.T) {
	for way, request := range anyRequests("/ws/ns-01") {
		t.Run(way, func(t *testing.T) {
			p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
				outside(p)
				p.limits.holdTimeout = 50 * time.Millisecond
			})
			_, _, resp := p.ask(t, request)
			wantEqual(t, "status", resp.StatusCode, 503)
			p.waitReason(t, way, "the owner was not known within 50ms: the hand-off: ConfigMap edge/hand-off has not been read yet")
			wantEqual(t, "result", p.results[resultHoldTimeout].Load()+p.forwarder.results[resultHoldTimeout].Load(), 1)
		})
	}
}

// TestForwardedFrom: only a proxy of -forwarded-from can say who the client is, on both ways
// of a handshake and in a plain request.
func TestForwardedFrom(t *testing.T) {
	fields := "X-Forwarded-For: 203.0.113.9\r\nx-forwarded-proto: https\r\nX-Forwarded-Host: invented\r\n\r\n"
	requests := bothWays("/ws/ns-01")
	requests["no upgrade"] = "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n"
	for from, believed := range map[string]bool{"": true, "127.0.0.0/8": true, "10.0.0.0/8,unix": false} {
		for way, request := range requests {
			t.Run(from+" "+way, func(t *testing.T) {
				backend := startStub(t, "127.0.0.1:0", answer(fine))
				p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
					if from != "" {
						p.forwardedFrom = &trustedProxies{}
						must(t, p.forwardedFrom.Set(from))
					}
				})
				p.ask(t, strings.Replace(request, "\r\n\r\n", "\r\n"+fields, 1))
				eventually(t, "requests", 1, func() int { return len(backend.heads()) })
				head := backend.heads()[0]
				want := []string{"X-Forwarded-For: 127.0.0.1\r\n", "X-Forwarded-Proto: http\r\n"}
				if believed {
					want = []string{"X-Forwarded-For: 203.0.113.9, 127.0.0.1\r\n",
						"X-Forwarded-Proto: https\r\n", "X-Forwarded-Host: invented\r\n"}
				}
				for _, field := range want {
					if !strings.Contains(head, field) {
						t.Errorf("no %q in\n%s", field, head)
					}
				}
				if !believed && strings.Contains(head, "invented") {
					t.Errorf("what the client invented is in\n%s", head)
				}
			})
		}
	}
}

// The target of a request in absolute form loses its authority, which becomes
// Host (RFC 9112 §3.2.2).
func TestProxyAbsoluteForm(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	p.ask(t, strings.Replace(upgradeRequest("/ws/ns-01?q"), "/ws/", "http://other.example/ws/", 1))
	if got := backend.heads()[0]; !strings.HasPrefix(got, "GET /ws/ns-01?q HTTP/1.1\r\nHost: other.example\r\n") {
		t.Errorf("the backend got %q", got)
	}
}

// Bytes in the same segment as the request's head, or as the 101, are not lost
// (golang/go#80875 and its like).
func TestProxyEarlyBytes(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching+"FIRST")
		io.Copy(conn, br)
	})
	for _, early := range []string{"", "x", strings.Repeat("early ", 500), strings.Repeat("0123456789", 10_000)} {
		p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
		conn, br, _ := p.ask(t, upgradeRequest("/ws/ns-01")+early)
		mustWrite(t, conn, "late")
		want := "FIRST" + early + "late"
		got := make([]byte, len(want))
		if n, err := io.ReadFull(br, got); err != nil || string(got) != want {
			t.Errorf("%d early bytes: got %d bytes back, %v", len(early), n, err)
		}
	}
}

func TestProxyPassesOtherAnswers(t *testing.T) {
	long := strings.Repeat("no ", 10_000)
	tests := map[string]struct {
		answer, body string
		status       int
		header       http.Header
	}{
		"refusal":    {"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\nX-Why: quota\r\nKeep-Alive: 5\r\n\r\nnope", "nope", 403, http.Header{"X-Why": {"quota"}, "Keep-Alive": nil, "Content-Type": nil}},
		"chunked":    {"HTTP/1.1 429 Too Many Requests\r\nTransfer-Encoding: chunked\r\nRetry-After: 7\r\n\r\n4\r\nslow\r\n0\r\n\r\n", "slow", 429, http.Header{"Retry-After": {"7"}}},
		"until EOF":  {"HTTP/1.1 500 Oh\r\nContent-Type: text/x\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\n" + long, long, 500, http.Header{"Set-Cookie": {"a=1", "b=2"}}},
		"redirect":   {"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", "", 302, http.Header{"Location": {"/elsewhere"}}},
		"upgrade":    {"HTTP/1.1 426 Upgrade Required\r\nUpgrade: h9\r\nConnection: Upgrade, X\r\nX: y\r\nContent-Length: 0\r\n\r\n", "", 426, http.Header{"Upgrade": {"h9"}, "Connection": {"Upgrade"}, "X": nil}},
		"no content": {"HTTP/1.1 204 No Content\r\n\r\n", "", 204, nil},
		"interim":    {"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", 200, http.Header{"Link": nil}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", answer(tt.answer))
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status || string(body) != tt.body || err != nil {
				t.Errorf("status %d, %d bytes of body, %v; want %d and %d bytes", resp.StatusCode, len(body), err, tt.status, len(tt.body))
			}
			for name, want := range tt.header {
				if got := resp.Header[name]; strings.Join(got, "|") != strings.Join(want, "|") {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			p.waitResult(t, resultBackendRefused)
		})
	}
}

// Half a body must not look like a whole one, and has its status.
func TestProxyPassesTruncation(t *testing.T) {
	for _, body := range []string{
		"Transfer-Encoding: chunked\r\n\r\n4000\r\n" + strings.Repeat("half", 0x1000) + "\r\n",
		"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "Transfer-Encoding: chunked\r\n\r\n",
		"Content-Length: 100\r\n\r\nhalf", "Content-Length: 100\r\n\r\n",
	} {
		for way, request := range bothWays("/ws/ns-01") {
			backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 401 Unauthorized\r\nX-Why: quota\r\n"+body))
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			_, _, resp := p.ask(t, request)
			got, err := io.ReadAll(resp.Body)
			if resp.StatusCode != 401 || resp.Header.Get("X-Why") != "quota" || err == nil {
				t.Errorf("%s, %.60q: status %s, %v, body %.10q, error %v; want 401 and an error", way, body, resp.Status, resp.Header, got, err)
			}
			if logged := p.tail.all("upgrade failed"); len(logged) > 0 {
				t.Errorf("%s, %.60q: logged %v, but the backend's answer was passed on", way, body, logged)
			}
			if want := strings.Contains(body, "half"); want != strings.HasPrefix(string(got), "half") {
				t.Errorf("%s, %.60q: body %.10q, want what came", way, body, got)
			}
		}
	}
}

// Upgrades that look odd and are right have a 101 on both ways, and the backend gets a
// plain one.
func TestProxyTakesOddUpgrades(t *testing.T) {
	const continues = "HTTP/1.1 100 Continue\r\n\r\n"
	tests := map[string]struct{ old, new, before, answer string }{
		"two Upgrade":       {"Upgrade: websocket", "Upgrade: h2c\r\nUpgrade: websocket", "", switching},
		"the same Upgrade":  {"Upgrade: websocket", "Upgrade: websocket\r\nUpgrade: WebSocket", "", switching},
		"a list of Upgrade": {"Upgrade: websocket", "Upgrade: h2c, websocket", "", switching},
		"two Connection":    {"Connection: keep-alive, Upgrade", "Connection: keep-alive\r\nConnection: Upgrade", "", switching},
		"empty line":        {"GET", "\r\nGET", "", switching},
		"two empty lines":   {"GET", "\r\n\r\nGET", "", switching},
		"expectation":       {"Origin", "Expect: 100-continue\r\nOrigin", continues, switching},
		"a 100 of both":     {"Origin", "Expect: 100-Continue\r\nOrigin", continues, continues + switching},
		"a 100 of one":      {"GET", "GET", "", continues + switching},
	}
	for name, tt := range tests {
		for way, request := range bothWays("/ws/ns-01") {
			t.Run(name+", "+way, func(t *testing.T) {
				backend := startStub(t, "127.0.0.1:0", answer(tt.answer))
				p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
				all := p.rawAnswer(t, strings.Replace(request, tt.old, tt.new, 1))
				head, ok := strings.CutPrefix(all, tt.before)
				if !ok || !strings.HasPrefix(head, "HTTP/1.1 101 ") {
					t.Errorf("%q came, want %q and a 101", all, tt.before)
				}
				if heads := backend.heads(); len(heads) != 1 || strings.Count(heads[0], "Upgrade: websocket\r\n") != 1 || strings.Contains(heads[0], "Expect") {
					t.Errorf("the backend got %q, want one plain upgrade", heads)
				}
			})
		}
	}
}

// A first byte at a time is as good, and empty lines alone are no bad head.
func TestProxyEmptyLinesInParts(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for _, request := range []string{upgradeRequest("/ws/ns-01"), ""} {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, part := range []string{"\r", "\n", "\r\n", request} {
			mustWrite(t, conn, part)
			<-time.After(10 * time.Millisecond) // that they are apart is likely, and not needed
		}
		if request != "" {
			mustAnswer(t, conn, 101)
			continue
		}
		conn.(*net.TCPConn).CloseWrite()
		mustBreak(t, conn)
	}
	if n := p.results[resultBadHead].Load(); n != 0 {
		t.Errorf("%d bad heads are counted, want 0", n)
	}
}

// A 101 has no length (RFC 9110 §8.6), and what follows it is all the other protocol's.
func TestProxySwitchesWithoutALength(t *testing.T) {
	for _, field := range []string{"Content-Length: 0", "content-length: 5", "Transfer-Encoding: chunked"} {
		for way, request := range bothWays("/ws/ns-01") {
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
				io.WriteString(conn, strings.Replace(switching, "\r\n\r\n", "\r\n"+field+"\r\n\r\nfirst ", 1))
				io.Copy(conn, br)
			})
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			conn, br, resp := p.ask(t, request)
			mustWrite(t, conn, "late")
			got := make([]byte, len("first late"))
			if _, err := io.ReadFull(br, got); err != nil || string(got) != "first late" {
				t.Errorf("%s, %s: %q came after the 101, %v; want all", way, field, got, err)
			}
			if resp.StatusCode != 101 || resp.Header.Get("Content-Length") != "" || resp.TransferEncoding != nil {
				t.Errorf("%s, %s: %s with %v, want a 101 without it", way, field, resp.Status, resp.Header)
			}
		}
	}
}

// Fields are spelled to the client as to WebSocket programs, whatever the status is.
func TestProxySpells(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n"))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for way, request := range bothWays("/ws/ns-01") {
		head := p.rawAnswer(t, request)
		for _, want := range []string{"\r\nConnection: Upgrade\r\n", "\r\nUpgrade: websocket\r\n", "\r\nSec-WebSocket-Version: 13\r\n"} {
			if strings.Count(head, want) != 1 {
				t.Errorf("%s: %q, want %q in it", way, head, want)
			}
		}
	}
}

func TestProxyBadAnswers(t *testing.T) {
	tests := map[string]struct {
		serve  func(net.Conn, *bufio.Reader)
		status int
		result result
		says   string
	}{
		"silence":        {silent, 504, resultGatewayTimeout, "backend-0 gave no answer within 300ms"},
		"close":          {func(net.Conn, *bufio.Reader) {}, 502, resultBadGateway, "backend-0: "},
		"not HTTP":       {answer("SSH-2.0-OpenSSH\r\n\r\n"), 502, resultBadGateway, "malformed"},
		"other protocol": {answer(strings.Replace(switching, "websocket", "h2c", 1)), 502, resultBadGateway, `"h2c" instead of websocket`},
		"long head":      {answer("HTTP/1.1 101 S\r\nX: " + strings.Repeat("x", 20<<10)), 502, resultBadGateway, "backend-0: "},
		"status 099":     {answer("HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n"), 502, resultBadGateway, "(got 099; "},
		"status 600":     {answer("HTTP/1.1 600 Odd\r\nContent-Length: 0\r\n\r\n"), 502, resultBadGateway, "(got 600; "},
		"interim only":   {answer(strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 20)), 502, resultBadGateway, "interim"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", tt.serve)
			p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
				if tt.status == 504 {
					p.limits.upgradeTimeout = 300 * time.Millisecond
				}
			})
			_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status {
				t.Errorf("status %d %q, want %d", resp.StatusCode, body, tt.status)
			}
			p.mustRefuse(t, tt.status, string(body), tt.says)
			p.waitResult(t, tt.result)
			p.waitPending(t, 0)
		})
	}
}

// Who sends a body that does not come has an answer all the same, in time.
func TestProxySlowBody(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) { p.limits.headerTimeout = 2 * time.Second })
	conn, _, resp := p.ask(t, "POST /nowhere HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
	if resp.StatusCode != 404 {
		t.Errorf("status %d, want 404", resp.StatusCode)
	}
	mustBreak(t, conn)
}

// A client whose namespace gets another owner during the handshake comes to that
// one, and has no session with the old one.
func TestProxyMovedInHandshake(t *testing.T) {
	asked, swapped := make(chan struct{}), make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		close(asked)
		<-swapped
		echo(conn, br)
	})
	other := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr, other.addr}, map[string]string{"ns-01": "backend-0"}, nil)
	conn := p.send(t, "ns-01")
	<-asked
	p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "42", overrides: newOverrideSet(map[string]string{"ns-01": "backend-1"})})
	eventually(t, "owner of ns-01", 1, func() int { return p.mover.assignmentOf("ns-01").backend })
	close(swapped)
	mustAnswer(t, conn, 101)
	stamp := p.tables.table().stamp
	if heads := other.heads(); len(heads) != 1 || !strings.Contains(heads[0], "X-Router-Table: "+stamp+"\r\n") {
		t.Errorf("the new owner got %q, want one request with table %s", heads, stamp)
	}
}

// A backend that knows a later step of the namespace refuses the upgrade. It is
// asked again, and the router's step rises above that one, at rest too. An application's own 409
// is for the client.
func TestProxyAsksAgainAfterARelease(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		later := time.Now().AddDate(1, 0, 0).UnixMilli() // the clock of a router was wrong
		var backend *stubBackend
		backend = startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
			heads := backend.heads()
			_, text, _ := strings.Cut(heads[len(heads)-1], "X-Router-Step: ")
			text, _, _ = strings.Cut(text, "\r\n")
			if step, err := strconv.ParseInt(text, 10, 64); err != nil || step < later {
				fmt.Fprintf(conn, "HTTP/1.1 409 Conflict\r\nX-Router-Step: %d\r\nContent-Length: 0\r\n\r\n", later)
				return
			}
			echo(conn, br)
		})
		p := startProxy(t, []string{backend.addr, backend.addr}, map[string]string{"ns-01": "backend-0"}, nil)
		_, _, resp := p.ask(t, request)
		if resp.StatusCode != 101 || len(backend.heads()) < 2 {
			t.Errorf("%s after %d requests, want 101 after some", resp.Status, len(backend.heads()))
		}
		before := p.mover.assignmentOf("ns-02").step
		p.override("42", map[string]string{"ns-02": "backend-1"})
		eventually(t, "the next step is later", true, func() bool { return p.mover.assignmentOf("ns-02").step > before })
	})
	for _, header := range []string{"", "X-Router-Step: x\r\n", "X-Router-Step: 9000000000000000000\r\n"} {
		both(t, func(t *testing.T, request string) {
			backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 409 Conflict\r\n"+header+"Content-Length: 5\r\n\r\nmine!"))
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			if _, _, resp := p.ask(t, request); resp.StatusCode != 409 {
				t.Errorf("%s with %q, want the application's 409", resp.Status, header)
			}
		})
	}
}

// A request is not sent if the owner has changed since it was dialled, and is in flight
// before that is asked.
func TestStartFlightAsksOnceMore(t *testing.T) {
	r := lookupTable(t, 4, 1000)
	m := restingMover(r)
	const namespace = "ns-00000007"
	owner := m.assignmentOf(namespace).backend
	f, _, ok := m.startFlight(namespace, owner, "", nil)
	if !ok || !m.flights.any(func(other *flight) bool { return other == f }) {
		t.Fatalf("started: %t, want a flight", ok)
	}
	f.end()
	other := newTable("backend", false, ordinalRange{first: owner + 1, count: 2}, nil, nil, r.table())
	step := m.current.Load().next(other, stepLimit{upto: allPlaces}, time.Now())
	m.current.Store(step) // it begins after the dial
	if _, now, ok := m.startFlight(namespace, owner, "", nil); ok || now.state != stateHeld {
		t.Errorf("the request is sent to the old owner in a step (%+v)", now)
	}
	done := *step
	done.done = true
	m.current.Store(&done)
	if _, now, ok := m.startFlight(namespace, owner, "", nil); ok || now.backend == owner {
		t.Errorf("the request is sent to the old owner after the step (%+v)", now)
	}
	if m.flights.any(func(*flight) bool { return true }) {
		t.Error("a request that was not sent is in flight")
	}
}

const notMeant = "HTTP/1.1 421 Misdirected Request\r\nContent-Length: 9\r\n\r\nbackend-7"

// A backend that answers 421 is another one. The client waits until the one that is
// meant answers, and learns nothing of that.
func TestProxyMisdirected(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		var asked atomic.Int64
		backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
			if asked.Add(1) <= 3 {
				io.WriteString(conn, notMeant)
				return
			}
			echo(conn, br)
		})
		p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
		_, _, resp := p.ask(t, request)
		if resp.StatusCode != 101 {
			t.Errorf("status %s, want 101", resp.Status)
		}
		p.waitResult(t, resultOK)
		if heads := backend.heads(); len(heads) != 4 || !strings.Contains(heads[3], "X-Router-Backend: backend-0\r\n") {
			t.Errorf("the backend was asked by %q, want four times", heads)
		}
		p.open(t, "ns-02")
		if p.backends.queues.misdirectedQueues.Load() != 0 {
			t.Error("a backend that has answered is still looked for")
		}
	})
}

// A backend that answers 421 for ever costs its clients the time of a hold, and
// nobody a loop.
func TestProxyMisdirectedForEver(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		const clients = 20
		backend := startStub(t, "127.0.0.1:0", answer(notMeant))
		logged := &textLog{}
		p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
			p.limits.holdTimeout = 2 * time.Second // time for one to be asked, also on a busy machine
			p.log = slog.New(slog.NewTextHandler(logged, nil))
		})
		var all sync.WaitGroup
		for range clients {
			all.Go(func() {
				_, br, resp := p.ask(t, request)
				body, _ := io.ReadAll(io.LimitReader(br, 10))
				if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" || strings.Contains(string(body), "backend-7") {
					t.Errorf("%s with %v, want 503 with Retry-After", resp.Status, resp.Header)
				}
			})
		}
		all.Wait()
		if n := p.results[resultMisdirected].Load(); n != clients {
			t.Errorf("%d upgrades were misdirected, want %d", n, clients)
		}
		if n := len(backend.heads()); n > 3*clients {
			t.Errorf("the backend was asked %d times by %d clients in two seconds", n, clients)
		}
		if text := "backend-0 at " + backend.addr + ": another backend answers at its address (421)"; logged.count(text) == 0 {
			t.Errorf("the log has no %q:\n%s", text, logged)
		}
	})
}

// One result is one log line at most a second, whatever the flood.
func TestProxyLogsLittle(t *testing.T) {
	var log bytes.Buffer
	p := startProxy(t, []string{"127.0.0.1:1"}, nil, func(p *proxy) { p.log = slog.New(slog.NewTextHandler(&log, nil)) })
	begun := time.Now()
	for range 50 {
		conn, _, _ := p.ask(t, upgradeRequest("/ws/ns-01"))
		conn.Close()
	}
	if lines, limit := strings.Count(log.String(), "\n"), 2+int(time.Since(begun).Seconds()); lines == 0 || lines > limit {
		t.Errorf("%d lines, want 1 to %d:\n%s", lines, limit, log.String())
	}
}

// A name in the backend's 101 that is no token (RFC 9110 §5.1) does not reach the
// client: a space before the colon makes one field look like another to who is
// lenient (RFC 9112 §5.1: a proxy must remove it).
func TestProxyAnswerNames(t *testing.T) {
	for _, field := range []string{"Upgrade : h2c", "Transfer-Encoding : chunked", "Content-Length : 5", "A B: c", "Set-Cookie : a=b"} {
		backend := startStub(t, "127.0.0.1:0", answer(strings.Replace(switching, "\r\n\r\n", "\r\n"+field+"\r\n\r\n", 1)))
		p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
		conn := p.send(t, "ns-01")
		head := make([]byte, 4096)
		conn.SetReadDeadline(time.Now().Add(patience))
		n, _ := conn.Read(head)
		if strings.Contains(string(head[:n]), field) {
			t.Errorf("the client got %q", head[:n])
		}
	}
}

// What a client's Connection names ends here, and what the router says of the
// request in its place is said all the same.
func TestProxyNominatedForwarded(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	p.ask(t, strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n\r\n",
		"\r\nConnection: X-Forwarded-Proto, X-Forwarded-Host\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: h\r\n\r\n", 1))
	for _, want := range []string{"X-Forwarded-Proto: http\r\n", "X-Forwarded-Host: www.mydomain.com\r\n"} {
		if head := backend.heads()[0]; !strings.Contains(head, want) {
			t.Errorf("the backend got %q, want %q in it", head, want)
		}
	}
}

// A log line is short, whatever a client or a backend has sent.
func TestProxyLogsShortLines(t *testing.T) {
	for name, answer := range map[string]string{"silence": "", "an odd answer": "HTTP/1.1 200 OK\r\n" + strings.Repeat("\xff", 3000) + "\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, _ *bufio.Reader) { io.WriteString(conn, answer) })
			var log bytes.Buffer
			p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { p.log = slog.New(slog.NewTextHandler(&log, nil)) })
			_, _, resp := p.ask(t, strings.Replace(upgradeRequest("/ws/ns-01/"+strings.Repeat("%01%C3%A9", 300)), "\r\n",
				"\r\nX-Forwarded-For: "+strings.Repeat("\xff", 4000)+"\r\n", 1))
			if resp.StatusCode != 502 || log.Len() == 0 || log.Len() > 3000 {
				t.Errorf("status %d and a line of %d bytes, want 502 and 1 to 3000", resp.StatusCode, log.Len())
			}
		})
	}
}

// A head has at most so many fields, however it comes and whatever they are.
func TestProxyBoundsFields(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	limit := 20
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { p.limits.headerFields = limit })
	plain := upgradeRequest("/ws/ns-01")
	room := limit - (strings.Count(plain, "\n") - 2)
	for name, field := range map[string]string{"one name": "X-A: a\r\n", "names": "X-%d: a\r\n", "no values": "X-%d:\r\n", "hosts": "X-Host-%d: h\r\n"} {
		for _, more := range []int{0, 1} {
			var fields strings.Builder
			for i := range room + more {
				if strings.Contains(field, "%d") {
					fmt.Fprintf(&fields, field, i)
				} else {
					fields.WriteString(field)
				}
			}
			request := strings.Replace(plain, "Origin", fields.String()+"Origin", 1)
			for _, at := range []int{0, 40} {
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				had := p.http.Load()
				mustWrite(t, conn, request[:at])
				for end := time.Now().Add(100 * time.Millisecond); at > 0 && p.http.Load() == had && time.Now().Before(end); {
					<-time.After(time.Millisecond)
				}
				mustWrite(t, conn, request[at:])
				mustAnswer(t, conn, []int{http.StatusSwitchingProtocols, http.StatusRequestHeaderFieldsTooLarge}[more])
				if more > 0 {
					_, err = io.Copy(io.Discard, conn) // to its end: who sends such heads keeps no connection
				}
				if t.Failed() || err != nil {
					t.Fatalf("%v; %s: %d fields from byte %d on", err, name, limit+more, at)
				}
			}
		}
	}
	if asked, bad := len(backend.heads()), p.results[resultBadHead].Load(); asked != 8 || bad != 8 {
		t.Errorf("the backend was asked %d times and %d heads were bad, want 8, 8", asked, bad)
	}
}

// rawAnswer sends the request in one part and returns what comes back, up to the first
// empty line that ends other than a 100.
func (p *testProxy) rawAnswer(t testing.TB, request string) (all string) {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	mustWrite(t, conn, request)
	conn.SetReadDeadline(time.Now().Add(patience))
	for br := bufio.NewReader(conn); ; {
		head, err := readHead(br)
		if all += head; err != nil {
			t.Fatalf("%q came, and %v", all, err)
		}
		if !strings.HasPrefix(head, "HTTP/1.1 100 ") {
			return all
		}
	}
}

func TestHoldUntilTheOwnerIsThere(t *testing.T) {
	addr := freeAddr(t)
	p := startProxy(t, []string{addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitPending(t, 1)
	startStub(t, addr, echo)
	mustAnswer(t, conn, 101)
}

func TestHoldEnds(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) { p.limits.holdTimeout = 2 * time.Second })
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d, Retry-After %q, %q", resp.StatusCode, resp.Header.Get("Retry-After"), body)
	}
	p.mustRefuse(t, 503, string(body), "backend-0 could not be reached within 2s: ")
	p.mustRefuse(t, 503, string(body), "refused")
	p.waitResult(t, resultHoldTimeout)
}

// A dial that the end of -hold cuts short says nothing about the backend: the log has
// why the dial before it failed, though that was another upgrade's.
func TestHoldEndsWithinADial(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p := startProxy(t, []string{fullListener(t).Addr().String()}, map[string]string{},
			func(p *proxy) { p.limits.holdTimeout = 200 * time.Millisecond })
		if !p.backends.queues.tryDial(0) {
			t.Fatal("nobody may dial")
		}
		p.backends.queues.dialDone(0, errors.New("why the last dial failed"), false)
		_, _, resp := p.ask(t, request)
		body, _ := io.ReadAll(resp.Body)
		p.mustRefuse(t, resp.StatusCode, string(body), "within 200ms: why the last dial failed")
	})
}

// lateContext is a context whose deadline passes before it ends.
type lateContext struct {
	context.Context
	late bool
}

func (c *lateContext) Deadline() (time.Time, bool) {
	if c.late {
		return time.Now().Add(-time.Second), true
	}
	return time.Now().Add(time.Hour), true
}

// A dial is cut short too where it sees that the deadline has passed before the context
// ends: package net has a timer of its own for that.
func TestHoldEndsBeforeItsContext(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	ctx := &lateContext{Context: ended}
	b := newStaticBackends("backend", []string{"127.0.0.1:1"})
	locate, nowhere := b.resolve, errors.New("nowhere")
	b.resolve = func(lookup context.Context, ordinal int) (string, error) {
		switch {
		case !ctx.late:
			ctx.late = true
			return "", nowhere
		default:
			return locate(lookup, ordinal)
		}
	}
	b.invalidate = func(int) { time.AfterFunc(time.Second, end) } // a dial has failed: if it is not the end, this is
	defer end()
	if _, _, err := b.dialWhenReady(ctx, "ns-01", func() (int, error) { return 0, nil }, always0); !errors.Is(err, nowhere) {
		t.Errorf("it ended with %v, want %v", err, nowhere)
	}
}

// A client that is held when its namespace gets another owner goes there.
func TestHoldFollowsTheTable(t *testing.T) {
	other := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{refusingAddr(t), other.addr}, map[string]string{"ns-01": "backend-0"}, nil)
	conn := p.send(t, "ns-01")
	p.waitPending(t, 1)
	p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "42", overrides: newOverrideSet(map[string]string{"ns-01": "backend-1"})})
	mustAnswer(t, conn, 101)
	stamp := p.tables.table().stamp
	if head := other.heads()[0]; !strings.Contains(head, "X-Router-Table: "+stamp+"\r\n") {
		t.Errorf("the backend got %q, want table %s", head, stamp)
	}
}

func TestHoldEndsWithItsClient(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitPending(t, 1)
	conn.Close()
	p.waitResult(t, resultClientGone)
	p.waitPending(t, 0)
}

// A client that leaves while the backend thinks leaves nothing behind.
func TestHandshakeEndsWithItsClient(t *testing.T) {
	gone := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.Copy(io.Discard, br)
		close(gone)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	for len(backend.heads()) == 0 {
		<-time.After(time.Millisecond)
	}
	reset(conn.(*net.TCPConn))
	p.waitResult(t, resultClientGone)
	<-gone
}

// A client that half-closes its connection gets the answer of the owner that was asked,
// whoever waits for that, and is there after it.
func TestHalfClosedClientIsAnswered(t *testing.T) {
	forbidden := "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
	for _, tt := range []struct {
		answer string
		status int
		early  bool // it half-closes before its owner is asked
		slow   bool // the owner answers when the client has fallen back to net/http
	}{{switching, 101, false, false}, {switching, 101, true, false}, {switching, 101, false, true}, {forbidden, 403, false, false}, {forbidden, 403, true, true}} {
		for way, request := range bothWays("/ws/ns-01") {
			t.Run(fmt.Sprintf("%d, early %v, slow %v, %s", tt.status, tt.early, tt.slow, way), func(t *testing.T) {
				t.Parallel()
				var p *testProxy
				asked, ended := make(chan struct{}), make(chan struct{})
				backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
					close(asked)
					<-ended
					for end := time.Now().Add(patience); tt.slow && p.http.Load() == 0 && time.Now().Before(end); {
						<-time.After(time.Millisecond)
					}
					io.WriteString(conn, tt.answer)
					io.Copy(io.Discard, br) // the FIN comes here too
					io.WriteString(conn, "last words")
				})
				p = startProxy(t, []string{backend.addr}, map[string]string{}, nil)
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				mustWrite(t, conn, request)
				if !tt.early {
					<-asked
				}
				conn.(*net.TCPConn).CloseWrite()
				close(ended)
				conn.SetReadDeadline(time.Now().Add(patience))
				br := bufio.NewReader(conn)
				resp, err := http.ReadResponse(br, nil)
				if err != nil || resp.StatusCode != tt.status {
					t.Fatalf("answer %+v, %v; want %d", resp, err, tt.status)
				}
				if rest, err := io.ReadAll(br); tt.status == 101 && string(rest) != "last words" {
					t.Errorf("%q came after the 101, and %v; want the backend's last words", rest, err)
				}
			})
		}
	}
}

// One that is held gets its answer soon, as most who half-close have left: their
// slots are for others.
func TestHalfClosedClientIsNotHeld(t *testing.T) {
	for way, request := range bothWays("/ws/ns-01") {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) { p.limits.holdTimeout = time.Hour })
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, request)
			p.waitPending(t, 1)
			conn.(*net.TCPConn).CloseWrite()
			mustAnswer(t, conn, 503)
			p.waitResult(t, resultClientGone)
			p.waitPending(t, 0)
		})
	}
}

// On a Unix socket, where a proxy is, a client that closes is gone at once.
func TestHandshakeEndsWithItsProxy(t *testing.T) {
	for way, request := range bothWays("/ws/ns-01") {
		asked, gone := make(chan struct{}), make(chan struct{})
		backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
			close(asked)
			io.Copy(io.Discard, br)
			close(gone)
		})
		socket := filepath.Join(t.TempDir(), "s")
		r := startRouter(t, "-listen", "unix:"+socket, "-backends", backend.addr, "-overrides", t.TempDir(), "-upgrade-timeout", "1h")
		r.log.wait(t, "routing table updated", 1)
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, conn, request)
		<-asked
		conn.Close()
		select {
		case <-gone:
		case <-time.After(patience):
			t.Errorf("%s: the backend still has the upgrade of a client that is gone", way)
		}
	}
}

// A request whose handler begins when the router stops already has no time to become a session: the
// list of the sessions to drain may have been made.
func TestHandlerBeginsWhileTheRouterStops(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, nil)
	stopped, stop := context.WithCancelCause(t.Context())
	stop(errDraining)
	ctx := context.WithValue(t.Context(), clientConnKey{}, &clientConn{serverCtx: stopped})
	client, hold, cancel := p.requestContexts(httptest.NewRequest("GET", "/ws/ns-01", nil).WithContext(ctx), time.Time{})
	defer cancel()
	for name, ctx := range map[string]context.Context{"client": client, "hold": hold} {
		if ctx.Err() == nil || context.Cause(ctx) != errDraining {
			t.Errorf("the context of %s: %v, cause %v; want it over, by %v", name, ctx.Err(), context.Cause(ctx), errDraining)
		}
	}
}

func TestLimits(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	addrs := []string{backend.addr, refusingAddr(t)}
	data := map[string]string{"here": "backend-0", "away": "backend-1"}

	t.Run("sessions", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.sessions = 2 })
		first := p.open(t, "here")
		p.open(t, "here")
		p.waitSessions(t, 2) // the relay has a session a little later than its client
		_, _, resp := p.ask(t, upgradeRequest("/ws/here"))
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.waitResult(t, resultMaxSessions)
		first.Close()
		p.waitSessions(t, 1)
		p.open(t, "here")
	})
	t.Run("waiting", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.pendingRequests = 4 }) // 1 of its own for each, 1 of the 2 others
		p.send(t, "away")
		p.send(t, "away")
		p.waitPending(t, 2)
		_, _, resp := p.ask(t, upgradeRequest("/ws/away"))
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.mustRefuse(t, 503, string(body), "2 requests to backend-1 are pending, and it may have no more of the limit of 4; 2 in all")
		p.waitResult(t, resultMaxPending)
		p.open(t, "here")
	})
}

// Backends that are dead, in whatever way, take no slots of those that work, even
// if these are one of many and a crowd comes to them.
func TestLimitsOfABackend(t *testing.T) {
	dead := map[string]func(t *testing.T) string{
		"refuses": func(t *testing.T) string { return refusingAddr(t) },
		"silent":  func(t *testing.T) string { return startStub(t, "127.0.0.1:0", silent).addr },
	}
	for kind, addr := range dead {
		for way, request := range bothWays("/ws/") {
			t.Run(kind+", "+way, func(t *testing.T) {
				t.Parallel()
				addrs := []string{addr(t), addr(t), addr(t), startStub(t, "127.0.0.1:0", echo).addr}
				data := map[string]string{"ns-0": "backend-0", "ns-1": "backend-1", "ns-2": "backend-2", "ns-3": "backend-3"}
				p := startProxy(t, addrs, data, func(p *proxy) { p.limits.pendingRequests = 40 })
				to := func(backend int) string {
					return strings.Replace(request, "/ws/", fmt.Sprintf("/ws/ns-%d", backend), 1)
				}
				for backend := range 3 {
					for range 60 {
						conn, err := net.Dial("tcp", p.addr)
						if err != nil {
							t.Fatal(err)
						}
						t.Cleanup(func() { conn.Close() })
						mustWrite(t, conn, to(backend))
					}
				}
				for p.results[resultMaxPending].Load() < 100 {
					<-time.After(time.Millisecond)
				}
				var crowd sync.WaitGroup
				for range 5 {
					crowd.Go(func() {
						for range 5 {
							if _, _, resp := p.ask(t, to(3)); resp.StatusCode != 101 {
								t.Errorf("status %d for the client of a backend that works, want 101", resp.StatusCode)
							}
						}
					})
				}
				crowd.Wait()
				if n := p.underWay(); n > 40 {
					t.Errorf("%d upgrades are under way, want at most 40", n)
				}
			})
		}
	}
}

// BenchmarkHandshake is one session: dial, upgrade, first message, close. The
// client and the backend are in the figure too.
func BenchmarkHandshake(b *testing.B) {
	greeting := switching + "hello"
	backend := startStub(b, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, greeting)
		br.ReadByte()
	})
	p := startProxy(b, []string{backend.addr}, map[string]string{}, nil)
	request := []byte(upgradeRequest("/ws/ns-01"))
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := conn.Write(request); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < len(greeting); {
			n, err := conn.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			got += n
		}
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
}

// Clients that wait when the router stops get their 503: those that are held, and those
// whose owner was asked and has not answered; of both ways of a handshake.
func TestStopAnswersWhoWaits(t *testing.T) {
	const clients = 64
	for where, serve := range map[string]func(net.Conn, *bufio.Reader){"held": nil, "asked": silent} {
		for way, request := range bothWays("/ws/ns-01") {
			t.Run(where+", "+way, func(t *testing.T) {
				addr := refusingAddr(t)
				if serve != nil {
					addr = startStub(t, "127.0.0.1:0", serve).addr
				}
				r := &runningRouter{log: newLogTail()}
				ctx, stop := context.WithCancel(t.Context())
				done := make(chan error, 1)
				args := append(slices.Clone(onFreePorts), "-drain-duration", "0", "-backends", addr, "-overrides", t.TempDir(), "-hold", "1h", "-upgrade-timeout", "1h")
				go func() { done <- run(ctx, args, noEnvironment, r.log) }()
				r.await(t)
				r.log.wait(t, "routing table updated", 1)
				var conns []net.Conn
				for range clients {
					conn, err := net.Dial("tcp", r.clientAddr)
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					mustWrite(t, conn, request)
					conns = append(conns, conn)
				}
				waitMetrics(t, r, map[string]float64{"router_pending_upgrades": clients})
				stop()
				for _, conn := range conns {
					mustAnswer(t, conn, 503)
				}
				if err := <-done; err != nil {
					t.Errorf("run: %v", err)
				}
			})
		}
	}
}

// A router that stops does not wait for a client that takes nothing of an answer.
func TestStopSlowAnswer(t *testing.T) {
	full := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\n\r\n")
		for err, b := error(nil), make([]byte, 64<<10); err == nil; _, err = conn.Write(b) {
			conn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		}
		close(full) // the router cannot write to the client
		io.Copy(io.Discard, br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.limits.upgradeTimeout = time.Hour
	})
	conn := dial(t, p.addr)
	mustWrite(t, conn, upgradeRequest("/ws/ns-01"))
	<-full
	stopped := make(chan struct{})
	go func() { p.stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(patience):
		t.Error("the router does not stop")
		conn.Close()
		<-stopped
	}
}

// No client reaches the path of -release, however it spells that: a backend would take its
// request for one of this router.
func TestProxyKeepsReleasesToItself(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	matchers := map[string]*namespaceMatcher{
		"query": mustMatcher(t, "query:ns"), "host": mustMatcher(t, "host"), "path": mustMatcher(t, "path", "/{namespace}"),
	}
	for name, matcher := range matchers {
		t.Run(name, func(t *testing.T) {
			p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
				p.namespaceOf, p.releasePath = matcher.namespace, "/release"
			})
			for _, path := range []string{
				"/release", "/release/", "//release", "/%72elease", "/%2572elease", "/Release", `/\release`,
				"/release;a=1", "/release%2F", "http://ns-01.example/release", "/release#a", "/release%3Fa", "/release%23/a", "/release%00",
			} {
				body := `{"namespaces":["ns-02"]}`
				_, _, resp := p.ask(t, fmt.Sprintf("POST %s?ns=ns-01 HTTP/1.1\r\nHost: ns-01.example\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body))
				if resp.StatusCode != 404 && resp.StatusCode != 400 {
					t.Errorf("%q: %s, want 404 or 400", path, resp.Status)
				}
			}
			for way, request := range bothWays("/release?ns=ns-01") {
				if _, _, resp := p.ask(t, request); resp.StatusCode != 404 {
					t.Errorf("upgrade, %s: %s, want 404", way, resp.Status)
				}
			}
			wantEqual(t, "requests of the backend", len(backend.heads()), 0)
		})
	}
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { p.releasePath = "/release" })
	for _, path := range []string{"/ws/release", "/ws/ns-01/release", "/ws/ns-01"} {
		if _, _, resp := p.ask(t, plainRequest(path)); resp.StatusCode != 200 {
			t.Errorf("%q: %s, want 200", path, resp.Status)
		}
	}
}

// passResponse says which side has failed: of an owner that was lost (isLost) the router knows less.
func TestPassResponseFailure(t *testing.T) {
	for name, tt := range map[string]struct {
		body          io.Reader
		client        http.ResponseWriter
		failure, fail error
	}{
		"whole":         {strings.NewReader("nope"), httptest.NewRecorder(), nil, nil},
		"the backend":   {iotest.ErrReader(syscall.ETIMEDOUT), httptest.NewRecorder(), syscall.ETIMEDOUT, syscall.ETIMEDOUT},
		"the client":    {strings.NewReader("nope"), lostClient{httptest.NewRecorder()}, nil, syscall.ETIMEDOUT},
		"it is cut off": {iotest.ErrReader(io.ErrUnexpectedEOF), httptest.NewRecorder(), io.ErrUnexpectedEOF, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			conn, _ := net.Pipe()
			resp := &http.Response{StatusCode: 403, Header: http.Header{}, Body: io.NopCloser(tt.body)}
			failure, err := (&proxy{limits: limits{upgradeTimeout: patience}}).passResponse(t.Context(), tt.client, resp, conn)
			if failure != tt.failure || err != tt.fail {
				t.Errorf("the backend has failed with %v, and the answer with %v; want %v and %v", failure, err, tt.failure, tt.fail)
			}
		})
	}
}

// lostClient is a client whose connection the kernel gave up.
type lostClient struct{ *httptest.ResponseRecorder }

func (lostClient) Write([]byte) (int, error) { return 0, syscall.ETIMEDOUT }

// The router stops just when the head of a refusal has come: its slow body is cut off.
func TestPassResponseStops(t *testing.T) {
	backendConn, _ := net.Pipe() // it sends nothing
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	resp := &http.Response{StatusCode: 403, Header: http.Header{}, Body: backendConn}
	_, err := (&proxy{limits: limits{upgradeTimeout: time.Hour}}).passResponse(ctx, httptest.NewRecorder(), resp, backendConn)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("passResponse returns %v, want that the deadline is over", err)
	}
}
