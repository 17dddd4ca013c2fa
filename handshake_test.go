package main

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// Fields of WebSocket are spelled as RFC 6455 does, also those that it does not have.
func TestWireName(t *testing.T) {
	for name, want := range map[string]string{"Sec-Websocket-Key": "Sec-WebSocket-Key", "Sec-Websocket-Accept": "Sec-WebSocket-Accept",
		"Sec-Websocket-Other": "Sec-WebSocket-Other", "X-Websocket": "X-Websocket"} {
		wantEqual(t, name, wireName(name), want)
	}
}

// A target that would go on without a slash at its beginning is refused: a backend could
// find another host in it than the router.
func TestTargetBeginsWithASlash(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	hosts := mustMatcher(t, "host").namespace
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { p.namespaceOf = hosts })
	from := strings.NewReplacer("www.mydomain.com", "ns-01.example")
	asked := 0
	for target, status := range map[string]int{
		"x:http://ns-02.example/secret": 400, "http:http://ns-02.example/": 400, "x:secret": 400, "*": 400,
		"x:/secret": 200, "http:///secret": 200, "http://ns-01.example?a": 200, "/secret": 200,
	} {
		for _, request := range []string{plainRequest(target), upgradeRequest(target)} {
			if _, _, resp := p.ask(t, from.Replace(request)); resp.StatusCode != status {
				t.Errorf("%q: %s, want %d", target, resp.Status, status)
			}
			if status == 200 {
				asked++
			}
		}
	}
	p.ask(t, strings.Replace(from.Replace(plainRequest("*")), "GET", "OPTIONS", 1))
	heads := backend.heads()
	wantEqual(t, "requests of the backend", len(heads), asked+1)
	for _, head := range heads {
		if !strings.HasPrefix(head, "GET /") && !strings.HasPrefix(head, "OPTIONS * ") {
			t.Errorf("the backend got %q", head)
		}
	}
}

// What the check lets through reaches the backend as one request for the same
// namespace, without a body and without forged headers.
func FuzzUpgrade(f *testing.F) {
	f.Add(upgradeRequest("/ws/ns-01"))
	f.Add(upgradeRequest("/ws/ns-01/deep?q=1#f"))
	f.Add(upgradeRequest("http://other.example/ws/ns-01"))
	f.Add(upgradeRequest("/ws/ns-01/%2e%2e/ns-02"))
	f.Add("GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, X-Router-Pod, Host\r\nUpgrade: websocket\r\nX_Router_Pod: x\r\nX-Router-Table: x\r\nX-ROUTER_Backend: x\r\nx_router-step: 9\r\n\r\n")
	f.Add("GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\nExpect: 100-continue\r\nForwarded: for=x\r\n\r\n")
	f.Add("POST /ws/a HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n")
	paths := defaultMatcher(f)
	f.Fuzz(func(t *testing.T, request string) {
		in, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
		if err != nil {
			return
		}
		in.RemoteAddr = "192.0.2.1:4711"
		namespace, refused := paths.namespace(in)
		if refused == nil {
			refused = checkUpgrade(in)
		}
		if refused != nil {
			if refused.result.refusalStatus()/100 != 4 || refused.reason == "" {
				t.Fatalf("refused with %v %q", refused.result, refused.reason)
			}
			return
		}
		head := finishRequestHead(startRequestHead(in, forwardedFor(in), "router-x"), "41", 7, "backend-2")
		rest := bufio.NewReader(bytes.NewReader(head))
		out, err := http.ReadRequest(rest)
		if err != nil {
			t.Fatalf("the backend cannot read %q: %v", head, err)
		}
		again, refused := paths.namespace(out)
		switch {
		case rest.Buffered() > 0 || out.ContentLength != 0:
			t.Fatalf("more than one request without a body: %q", head)
		case refused != nil || again != namespace || expectedPathNamespace(namespace) != "":
			t.Fatalf("namespace %q became %q", namespace, again)
		case strings.Join(out.Header.Values(headerPod), "|") != "router-x" || strings.Join(out.Header.Values(headerTable), "|") != "41" ||
			strings.Join(out.Header.Values(headerStep), "|") != "7" || strings.Join(out.Header.Values(headerBackend), "|") != "backend-2":
			t.Fatalf("forged: %q", head)
		case out.Host != in.Host || checkUpgrade(out) != nil:
			t.Fatalf("host %q, want %q; %v", out.Host, in.Host, checkUpgrade(out))
		}
	})
}
