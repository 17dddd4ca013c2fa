package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestTLSInRouter installs the component tls-in-router, in a Kubernetes namespace that admits
// pods of the standard "restricted" only. Clients of all kinds get in over TLS, and resume
// their TLS session at each router. A certificate that is replaced is served, and a bad pair
// is not, without the end of a session. A rollout closes all of them with Close frames, and
// they come back.
func TestTLSInRouter(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.kubectl("create", "secret", "generic", "router-tickets", "--from-literal=secret="+strings.Repeat("e2e-", 12))
	in.install("resources: [../../k8s/demo]\ncomponents: [../../k8s/components/tls-in-router]\n" +
		"replicas:\n  - {name: backend, count: 2}\n  - {name: router, count: 2}\n")
	s := in.in(in.namespace)
	s.awaitBackends(2)
	var held []*follower
	for i := range 10 {
		held = append(held, s.mustFollow(fmt.Sprintf("%stls-%d", prefix, i)))
	}
	if _, proto := in.forwarded(prefix + "tls-0"); proto != "https" {
		t.Errorf("the backend gets X-Forwarded-Proto %q, want https", proto)
	}
	s.wantNode(prefix + "tls-node")
	s.wantChromium(prefix + "tls-chromium")
	s.wantRedirect()
	s.wantResumed()

	cert, key := s.newCertificate()
	before := held[0].session.serial
	putBack := s.replaceSecret(map[string][]byte{"tls.crt": cert, "tls.key": key})
	s.bringSecret("certificate")
	s.awaitCertificate(serialOf(t, cert), held)
	putBack()
	s.bringSecret("certificate-before")
	s.awaitCertificate(before, held)

	since := metav1.Now()
	putBack = s.replaceSecret(map[string][]byte{"tls.crt": cert, "tls.key": []byte(in.secretKey())})
	s.bringSecret("wrong-pair")
	s.awaitRefused(1)
	s.wantRejection(&since)
	if _, serial, err := s.servedSerial(); err != nil || serial != before {
		t.Errorf("with a bad pair in the Secret the certificate %s is served (error %v), want %s", serial, err, before)
	}
	putBack()
	s.bringSecret("right-pair")
	s.awaitRefused(0)
	s.goOn(held, 2)
	s.replaceRouters()
}

// secretKey returns the key in the Secret.
func (in *installation) secretKey() string {
	in.t.Helper()
	secret, err := in.client.CoreV1().Secrets(in.namespace).Get(in.t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		in.t.Fatal(err)
	}
	return string(secret.Data["tls.key"])
}

// bringSecret has the kubelets look at the routers' pods, which they do when a pod has
// changed, and bring what is in the Secret now. It would take them a minute otherwise.
func (s *system) bringSecret(why string) {
	s.t.Helper()
	s.mustKubectl("", "--namespace="+s.namespace, "annotate", "pods", "-l", "app.kubernetes.io/name=router",
		"--overwrite", "router/e2e="+why)
}

// wantNode has a client of Node.js open a session, and wants its first message.
func (s *system) wantNode(namespace string) {
	s.t.Helper()
	if _, err := os.Stat("apps/node_modules/ws"); err != nil {
		s.t.Log("no Node.js client: \"make modules\" installs it")
		return
	}
	address, err := s.front.address(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(address)
	const script = `
		const [host, address, port, namespace] = process.argv.slice(1)
		const lookup = (_, options, done) => options.all ? done(null, [{ address, family: address.includes(':') ? 6 : 4 }]) : done(null, address, 4)
		const ws = new (require('ws'))('wss://' + host + ':' + port + '/ws/' + namespace, { lookup })
		ws.on('message', data => { console.log(ws._socket.getProtocol() + ' ' + data); ws.close(1000) })
		ws.on('close', code => console.log('close ' + code))
		ws.on('error', error => console.log(error.message))`
	ctx, stop := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer stop()
	cmd := exec.CommandContext(ctx, "node", "-e", script, hostName, host, port, namespace)
	cmd.Dir = "apps"
	cmd.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(s.root, "certs", "ca.crt"))
	out, err := cmd.CombinedOutput()
	if text := string(out); err != nil || !strings.HasPrefix(text, "TLSv1.3 {") || !strings.HasSuffix(text, "close 1000\n") {
		s.t.Errorf("Node.js: %v\n%s", err, out)
	}
}

// wantChromium has Chromium open a session, and wants its first message.
func (s *system) wantChromium(namespace string) {
	s.t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		s.t.Log("no browser: chromium is not installed")
		return
	}
	tab := s.newBrowser()
	page := "https://" + hostName + "/ws/" + namespace // any answer of this origin
	if err := openPage(tab, page); err != nil {
		s.t.Fatalf("Chromium: open %s: %v", page, err)
	}
	script := fmt.Sprintf(`window.said = ""; window.socket = new WebSocket("wss://%s/ws/%s");
		socket.onmessage = event => { window.said += event.data; }; undefined`, hostName, namespace)
	if _, err := chromedp.Run(tab, chromedp.Evaluate[chromedp.Void](script)); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, 20*time.Second, "a message in Chromium", func() error {
		said, err := chromedp.Run(tab, chromedp.Evaluate[string]("window.said"))
		if err == nil && !strings.Contains(said, `"ns":"`+namespace+`"`) {
			err = fmt.Errorf("it has got %q", said)
		}
		return err
	})
}

// wantRedirect asks at port 80.
func (s *system) wantRedirect() {
	s.t.Helper()
	service, err := s.client.CoreV1().Services(s.namespace).Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	address := net.JoinHostPort(service.Spec.ClusterIP, "80")
	if !answers(address) {
		address = s.podAddress(s.pods(s.t.Context(), "router")[0], 8002)
	}
	for path, want := range map[string]string{
		"/ws/ns-01?a=b": "308 https://" + hostName + "/ws/ns-01?a=b ",
		"/healthz":      "200  ok\n",
	} {
		conn, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			s.t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, hostName)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			s.t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		conn.Close()
		if got := fmt.Sprintf("%d %s %s", resp.StatusCode, resp.Header.Get("Location"), body); got != want {
			s.t.Errorf("port 80 answers %q to %s, want %q", got, path, want)
		}
	}
}

// wantResumed does a handshake with each router's pod, and wants each but the first to go on
// with the session of the first.
func (s *system) wantResumed() {
	s.t.Helper()
	config := s.tls.Clone()
	config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	for i, pod := range s.pods(s.t.Context(), "router") {
		conn, err := tls.Dial("tcp", s.podAddress(pod, 8000), config)
		if err != nil {
			s.t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", hostName)
		answer, err := io.ReadAll(conn) // the ticket comes before the answer
		conn.Close()
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
			s.t.Errorf("%s: %v\n%s", pod.Name, err, answer)
		}
		if got := conn.ConnectionState().DidResume; got != (i > 0) {
			s.t.Errorf("%s, the router with index %d: resumed %t", pod.Name, i, got)
		}
	}
}

// replaceRouters replaces all routers while clients have sessions.
func (s *system) replaceRouters() {
	s.t.Helper()
	all := s.returners(40)
	var old []*departure
	for _, pod := range s.pods(s.t.Context(), "router") {
		old = append(old, s.observe(pod.Name))
	}
	began := time.Now()
	s.mustKubectl("", "--namespace="+s.namespace, "rollout", "restart", "deployment", "router")
	for _, d := range old {
		eventually(s.t, 2*time.Minute, d.pod+" to be gone", d.gone)
		d.check(s.t)
	}
	for _, d := range old {
		s.awaitOpen(all, d.pod)
	}
	codes := s.checkEnds(all)
	var failed []error
	for _, r := range all {
		_, refusals := r.history()
		failed = append(failed, refusals...)
	}
	s.t.Logf("rollout: both routers were replaced and all clients back after %.1f s; sessions ended by Close %s; %d attempts failed: %v",
		time.Since(began).Seconds(), codes, len(failed), some(failed))
}
