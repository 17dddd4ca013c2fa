//go:build unix

package nginx_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// do sends a plain request, and returns the answer and its body.
func (s *sidecar) do(
	t *testing.T, client *http.Client, method, target string, body io.Reader,
) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+host+target, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(got)
}

// unsized hides the length of a body, which is then sent in chunks.
type unsized struct{ io.Reader }

// TestPlainRequests: the router gets each with its method, path and body, and the client
// its answer unchanged. All of them together need one connection to the router.
func TestPlainRequests(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	tests := map[string]struct {
		method, target string
		body           io.Reader
		status         int
		want           string
	}{
		"GET":           {"GET", "/plain?status=200", nil, 200, "<p>200"},
		"HEAD":          {"HEAD", "/plain?status=200", nil, 200, ""},
		"404":           {"GET", "/plain?status=404", nil, 404, "<p>404"},
		"418":           {"GET", "/plain?status=418", nil, 418, "<p>418"},
		"500":           {"POST", "/plain?status=500", nil, 500, "<p>500"},
		"502":           {"GET", "/plain?status=502", nil, 502, "<p>502"},
		"POST":          {"POST", "/plain?count", strings.NewReader("12345"), 200, "5 <nil> 5 []\n"},
		"PUT in chunks": {"PUT", "/plain?count", unsized{strings.NewReader("12345")}, 200, "5 <nil> "},
		"PATCH":         {"PATCH", "/plain?count", strings.NewReader("1"), 200, "1 <nil> 1 []\n"},
		"DELETE":        {"DELETE", "/plain?count", nil, 200, "0 <nil> 0 []\n"},
		"OPTIONS":       {"OPTIONS", "/plain?count", nil, 200, "0 <nil> 0 []\n"},
	}
	client := s.client(t, s.secure)
	for name, test := range tests {
		res, got := s.do(t, client, test.method, test.target, test.body)
		if res.StatusCode != test.status || !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %d %q, want %d %q", name, res.StatusCode, got, test.status, test.want)
		}
		r := s.router.seen()
		if r.Method != test.method || r.RequestURI != test.target {
			t.Errorf("%s: the router got %s %s", name, r.Method, r.RequestURI)
		}
		if !strings.Contains(test.target, "status") {
			continue
		}
		for field, want := range map[string]string{"Content-Type": "text/html",
			"Server": "backend/1", "Date": "Mon, 02 Jan 2006 15:04:05 GMT"} {
			if got := res.Header.Get(field); got != want {
				t.Errorf("%s: %s is %q, want %q", name, field, got, want)
			}
		}
	}
	before := s.router.connections()
	if before > 2 { // one for each worker
		t.Errorf("%d connections to the router for %d requests", before, len(tests))
	}
	for range 3 { // those of WebSockets are not kept
		s.request(t, "GET /ws/busy HTTP/1.1\r\n"+fields+"\r\n")
	}
	if n := s.router.connections() - before; n != 3 {
		t.Errorf("%d connections to the router for 3 WebSockets", n)
	}
}

// TestPageOrRouter: at / a GET is for the page, and all else for the router.
func TestPageOrRouter(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	if res, _ := s.do(t, client, "HEAD", "/", nil); res.StatusCode != 200 || s.router.count() != 0 {
		t.Errorf("HEAD /: status %d", res.StatusCode)
	}
	if res, _ := s.do(t, client, "POST", "/?a=b", nil); res.StatusCode != 426 {
		t.Errorf("POST /: status %d, want the router's", res.StatusCode)
	}
	echo(t, s.dial(t, "/?a=b", nil), []byte("a namespace in the host"))
	if got := s.router.seen().RequestURI; got != "/?a=b" {
		t.Errorf("the router was asked for %s", got)
	}
	res := s.request(t, "GET / HTTP/1.1\r\nHost: "+host+
		"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n")
	if res.StatusCode != 200 {
		t.Errorf("an offer of h2c: status %d, want the page", res.StatusCode)
	}
}

// TestOtherUpgrade: an offer of another protocol is a plain request (RFC 9110 §7.8), and
// the router does not get the offer.
func TestOtherUpgrade(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	for _, offer := range []string{"h2c", "websocket2", "notwebsocket", "TLS/1.2"} {
		res := s.request(t, "POST /plain?count HTTP/1.1\r\nHost: "+host+"\r\nContent-Length: 2\r\n"+
			"Connection: Upgrade\r\nUpgrade: "+offer+"\r\n\r\n12")
		got := s.router.seen().Header
		if res.StatusCode != 200 || got["Upgrade"] != nil || got["Connection"] != nil {
			t.Errorf("%s: status %d, the router got %v", offer, res.StatusCode, got)
		}
	}
	for _, offer := range []string{"WebSocket", "h2c, websocket", "websocket,h2c"} {
		s.request(t, "GET /ws/a HTTP/1.1\r\nHost: "+host+"\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nUpgrade: "+offer+"\r\n\r\n")
		if got := s.router.seen().Header.Get("Upgrade"); got != "websocket" {
			t.Errorf("%s: the router got %q", offer, got)
		}
	}
}

// TestPathsUnchanged: the router gets the target byte for byte.
func TestPathsUnchanged(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	for _, target := range []string{
		"/ws/caf%C3%A9", "/ws/caf%c3%a9", "/ws/my%20room", "/ws/doc:42", "/ws/user@x",
		"/ws/a%2Fb", "/ws/a//b", "/ws/a/../b", "/ws/a/%2e%2E/b", "/ws/a;b=c", "/ws/%7E~",
		"/ws/a+b", "/ws/a?b=%20&c=//&d=/../", "/ws/\xc3\xa9", "/ws/a?", "/ws/a%3Fb", "/ws/a%23b",
		"/ws/a\\b", "/ws/%5C", "/ws/!$&'()*,=", "/ws/%25", "/socket.io/?EIO=4&transport=polling",
	} {
		for method, head := range map[string]string{"GET": fields, "POST": "Host: " + host + "\r\n"} {
			s.request(t, method+" "+target+" HTTP/1.1\r\n"+head+"\r\n")
			if got := s.router.seen(); got.RequestURI != target || got.Method != method {
				t.Errorf("%s %q: the router got %s %q", method, target, got.Method, got.RequestURI)
			}
		}
	}
}

// TestBodiesStream: each part of a body goes on before the next is sent, both ways.
func TestBodiesStream(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	r, w := io.Pipe()
	req, err := http.NewRequest("POST", "https://"+host+"/plain?echo", r)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	for i := range 3 {
		part := fmt.Sprintf("part %d", i)
		if _, err := io.WriteString(w, part); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(part))
		if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != part {
			t.Fatalf("%q, %v, want %q", got, err, part)
		}
	}
	w.Close()
	if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
		t.Errorf("at the end: %q, %v", rest, err)
	}

	events, err := client.Get("https://" + host + "/plain?events")
	if err != nil {
		t.Fatal(err)
	}
	defer events.Body.Close()
	line, err := bufio.NewReader(events.Body).ReadString('\n')
	if line != "data: 1\n" {
		t.Errorf("an event: %q, %v", line, err)
	}
}

// TestLargeBodies: 100 MB go through in both directions, and nginx writes no file.
func TestLargeBodies(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	const size = 100 << 20
	client := s.client(t, s.secure)
	client.Timeout = 6 * bound
	for name, body := range map[string]io.Reader{
		"with a length": io.NewSectionReader(zerosAt{}, 0, size),
		"in chunks":     unsized{io.LimitReader(zeros{}, size)},
	} {
		req, err := http.NewRequest("PUT", "https://"+host+"/plain?count", body)
		if err != nil {
			t.Fatal(err)
		}
		if name == "with a length" {
			req.ContentLength = size
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		if want := fmt.Sprintf("%d <nil>", size); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("%s: %q, %v, want %s", name, got, err, want)
		}
		res.Body.Close()
	}
	res, err := client.Get(fmt.Sprintf("https://%s/plain?size=%d", host, size))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	n, err := io.CopyBuffer(io.Discard, unsized{res.Body}, make([]byte, 32<<10))
	if err != nil || n != size {
		t.Errorf("%d bytes came, %v", n, err)
	}
	if log := readFile(t, filepath.Join(s.dir, "stderr")); bytes.Contains(log, []byte("buffered to a temporary file")) {
		t.Errorf("the log: %s", log)
	}
	s.wantNoFiles(t)
}

// zerosAt is zeros as an io.ReaderAt.
type zerosAt struct{}

func (zerosAt) ReadAt(b []byte, _ int64) (int, error) { return zeros{}.Read(b) }

// wantNoFiles wants that nginx has written no body to a file. It names them by a counter,
// in files of /tmp/nginx-body and /tmp/nginx-proxy, which it removes at once: the folders
// below, from proxy_temp_path's levels, are not removed.
func (s *sidecar) wantNoFiles(t *testing.T) {
	t.Helper()
	for _, folder := range []string{"nginx-body", "nginx-proxy"} {
		folder = filepath.Join(s.dir, "tmp", folder)
		err := filepath.WalkDir(folder, func(path string, _ fs.DirEntry, err error) error {
			if path != folder {
				t.Errorf("there is %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestExpectContinue: nginx answers 100 by itself, and the router gets no Expect.
func TestExpectContinue(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	conn, err := tls.Dial("tcp", s.secure, s.tlsConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(bound))
	fmt.Fprintf(conn, "PUT /plain?count HTTP/1.1\r\nHost: %s\r\nContent-Length: 2\r\n"+
		"Expect: 100-continue\r\n\r\n", host)
	br := bufio.NewReader(conn)
	if line, err := br.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
	br.ReadString('\n')
	io.WriteString(conn, "12")
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(res.Body); string(body) != "2 <nil> 2 []\n" {
		t.Errorf("%q, %v", body, err)
	}
	if got := s.router.seen().Header["Expect"]; got != nil {
		t.Errorf("the router got Expect %q", got)
	}
}

// TestEarlyAnswer: an answer that comes before the body was sent reaches the client.
func TestEarlyAnswer(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	res, got := s.do(t, client, "POST", "/plain?early", unsized{io.LimitReader(zeros{}, 8<<20)})
	if res.StatusCode != 413 || got != "too large\n" {
		t.Errorf("%d %q", res.StatusCode, got)
	}
}

// TestSentOnce: the router gets no plain request twice, whatever becomes of it.
func TestSentOnce(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	tests := map[string]struct {
		method, target string
		status         int
	}{
		"no answer":           {"GET", "/plain?none", 502},
		"no answer to POST":   {"POST", "/plain?none", 502},
		"a head of 2,000":     {"GET", "/plain?has=2000", 200},
		"a head of 15,000":    {"GET", "/plain?has=15000", 200},
		"a head of 17,000":    {"GET", "/plain?has=17000", 502},
		"a large redirect":    {"GET", "/plain?redirect&has=15000", 302},
		"an answer that ends": {"GET", "/plain?cut", 200},
	}
	client := s.client(t, s.secure)
	for name, test := range tests {
		before := s.router.count()
		req, err := http.NewRequest(test.method, "https://"+host+test.target, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.do(t, client, "GET", "/plain?status=200", nil) // the next may be on a kept connection
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadAll(res.Body)
		res.Body.Close()
		if cut := errors.Is(err, io.ErrUnexpectedEOF); cut != strings.HasSuffix(test.target, "cut") {
			t.Errorf("%s: the body ends with %v", name, err)
		}
		if asked := s.router.count() - before - 1; res.StatusCode != test.status || asked != 1 {
			t.Errorf("%s: status %d, the router was asked %d times, want %d and once",
				name, res.StatusCode, asked, test.status)
		}
	}
}

// TestClosedConnections: a kept connection that the router has closed is not used.
func TestClosedConnections(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	for range 20 {
		s.do(t, client, "GET", "/plain?status=200", nil)
		s.router.closeIdle()
		res, _ := s.do(t, client, "POST", "/plain?status=201", nil)
		if res.StatusCode != 201 {
			t.Errorf("status %d, want 201", res.StatusCode)
		}
	}
}

// TestPlainLog: requests that fail have a line, others have none.
func TestPlainLog(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	client := s.client(t, s.secure)
	for _, target := range []string{"/plain?status=200", "/plain?status=400", "/plain?status=404",
		"/plain?status=413", "/ws/ns-01", "/plain/a?status=500", "/plain/b?none"} {
		s.do(t, client, "GET", target, nil)
	}
	s.logged(t, regexp.MustCompile(`^time=.* uri="/plain/a" status=500 upstream="500" .*
time=.* uri="/plain/b" status=502 upstream="502" .*
$`))
}

// TestSmuggling: what two parsers could read in two ways does not reach the router, and
// nothing of a body is taken for a request.
func TestSmuggling(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	second := "GET /ws/second HTTP/1.1\r\nHost: b\r\n\r\n"
	body := "POST /plain?count HTTP/1.1\r\nHost: a\r\n"
	tests := map[string]struct {
		request string
		status  int
	}{
		"both lengths":          {body + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + second, 400},
		"two lengths":           {body + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + second, 400},
		"equal lengths":         {body + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 400},
		"a list of lengths":     {body + "Content-Length: 0, 0\r\n\r\n" + second, 400},
		"a negative length":     {body + "Content-Length: -1\r\n\r\n" + second, 400},
		"a signed length":       {body + "Content-Length: +1\r\n\r\n" + second, 400},
		"an unknown encoding":   {body + "Transfer-Encoding: xchunked\r\n\r\n" + second, 501},
		"identity":              {body + "Transfer-Encoding: identity\r\n\r\n" + second, 501},
		"chunked twice":         {body + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"a bad chunk":           {body + "Transfer-Encoding: chunked\r\n\r\nx\r\n" + second, 400},
		"chunks in HTTP/1.0":    {strings.Replace(body, "1.1", "1.0", 1) + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"a space before :":      {body + "Content-Length : 5\r\n\r\n" + second, 400},
		"a folded line":         {body + "X: a\r\n Content-Length: 5\r\n\r\n" + second, 400},
		"two hosts":             {body + "Host: b\r\n\r\n", 400},
		"no host":               {"GET /plain HTTP/1.1\r\n\r\n", 400},
		"a control in the path": {"GET /plain\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		"a NUL escape":          {"GET /plain%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		"above the root":        {"GET /../plain HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		"TRACE":                 {"TRACE /plain HTTP/1.1\r\nHost: a\r\n\r\n", 405},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			before := s.router.count()
			res := s.request(t, test.request)
			if res.StatusCode != test.status {
				t.Errorf("status %d, want %d", res.StatusCode, test.status)
			}
			if r := s.router.seen(); s.router.count() != before && name != "a bad chunk" {
				t.Errorf("the router got %s %s %v", r.Method, r.RequestURI, r.Header)
			}
		})
	}
	if r := s.router.seen(); r != nil && r.RequestURI == "/ws/second" {
		t.Error("the router got the second request")
	}
}
