//go:build unix

package nginx_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

const (
	podUser = 65532            // the user id of the pod, for tests run by root
	bound   = 10 * time.Second // for everything that is waited for
	host    = "www.mydomain.com"
)

// sidecar is one running nginx with this repository's nginx.conf and page, a
// certificate from certs/make.sh, and a stub in the router's place. Ports and
// paths are the only things replaced in the configuration.
type sidecar struct {
	// What the options of start set.
	loopback string            // the address that tests connect to
	ipv6     string            // the file in the place of /proc/net/if_inet6
	env      []string          // NAME=value, beside the environment of the tests
	add      map[string]string // text of files, by name, in the place of /etc/nginx/add

	// Static after start.
	dir    string // everything nginx reads and writes
	plain  string // address in the place of port 80
	secure string // address in the place of port 443
	probe  string // address in the place of port 8002
	roots  *x509.CertPool

	router *stub
	master int // the process id of the nginx that answers
}

// start returns a sidecar that answers, or nil, after a word in the log, on a
// machine without nginx or openssl. Cleanup stops nginx and the stub.
func start(t *testing.T, options ...func(*sidecar)) *sidecar {
	t.Helper()
	for _, name := range []string{program(), "openssl"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Logf("nothing tested: %s is not installed", name)
			return nil
		}
	}
	s := &sidecar{
		loopback: "127.0.0.1", ipv6: "/proc/net/if_inet6", dir: socketDir(t),
	}
	for _, set := range options {
		set(s)
	}
	for _, sub := range []string{"tls", "html", "tmp", "add"} {
		if err := os.Mkdir(filepath.Join(s.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range s.add {
		if err := os.WriteFile(filepath.Join(s.dir, "add", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, "page/index.html", filepath.Join(s.dir, "html", "index.html"))
	s.makeCertificate(t)
	s.roots = x509.NewCertPool()
	if !s.roots.AppendCertsFromPEM(readFile(t, filepath.Join(s.dir, "tls", "ca.crt"))) {
		t.Fatal("ca.crt holds no certificate")
	}
	s.router = startStub(t, filepath.Join(s.dir, "router.sock"))
	// The ports were free a moment ago; somebody else may have been faster.
	for range 5 {
		s.configure(t)
		err := s.run(t)
		if err == nil {
			return s
		}
		if !strings.Contains(err.Error(), "Address already in use") {
			t.Fatal(err)
		}
	}
	t.Fatal("no free ports for nginx")
	return nil
}

// program is the nginx that is tested: another than the one in the PATH with
// the environment variable NGINX.
func program() string { return cmp.Or(os.Getenv("NGINX"), "nginx") }

// socketDir is a short path (a unix socket's has 107 bytes at most) that the
// pod's user may enter.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nginx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// makeCertificate runs certs/make.sh, which signs a new certificate by the
// same CA each time it is asked to renew.
func (s *sidecar) makeCertificate(t *testing.T) {
	t.Helper()
	out, err := exec.Command("sh", "../certs/make.sh", "-d", filepath.Join(s.dir, "tls"), "renew").CombinedOutput()
	if err != nil {
		t.Fatalf("certs/make.sh: %v\n%s", err, out)
	}
	s.own(t)
}

// own gives every file to the pod's user, as the kubelet does with fsGroup.
func (s *sidecar) own(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	err := filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, podUser, podUser)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// configure writes nginx.conf with ports and paths of this test. A text to
// replace that is not there is an error: the test would run something else.
func (s *sidecar) configure(t *testing.T) {
	t.Helper()
	addresses := freeAddresses(t, s.loopback, 4)
	s.plain, s.secure, s.probe = addresses[0], addresses[1], addresses[2]
	s.write(t, "nginx.conf", []string{
		"/etc/nginx/tls/", filepath.Join(s.dir, "tls") + "/",
		"/run/router/router.sock", filepath.Join(s.dir, "router.sock"),
		"/etc/nginx/page", filepath.Join(s.dir, "html"),
		"/etc/nginx/add/", filepath.Join(s.dir, "add") + "/",
		" /tmp/", " " + filepath.Join(s.dir, "tmp") + "/",
	})
	s.write(t, "start.sh", []string{
		"listen 80 ", "listen " + port(s.plain) + " ",
		"listen 443 ", "listen " + port(s.secure) + " ",
		"listen 8002 ", "listen " + port(s.probe) + " ",
		"$loopback:8003", "$loopback:" + port(addresses[3]),
		">/tmp/", ">" + filepath.Join(s.dir, "tmp") + "/",
		"=/tmp/", "=" + filepath.Join(s.dir, "tmp") + "/",
		"/proc/net/if_inet6", s.ipv6,
	})
	for _, log := range []string{"stdout", "stderr"} {
		if err := os.WriteFile(filepath.Join(s.dir, log), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.own(t)
}

// port is that of an address.
func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// write copies a file with texts replaced, each of which has to be there.
func (s *sidecar) write(t *testing.T, name string, pairs []string) {
	t.Helper()
	text := string(readFile(t, name))
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("%s does not contain %q", name, pairs[i])
		}
	}
	text = strings.NewReplacer(pairs...).Replace(text)
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// command is nginx as the pod runs it: not root, logging to its own output.
// Its output goes to files because nginx opens /dev/stdout again by name, and
// a pipe made by root is root's.
func (s *sidecar) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", append([]string{filepath.Join(s.dir, "start.sh"), program(), "-p", s.dir, "-e", "stderr", "-c", filepath.Join(s.dir, "nginx.conf")}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: podUser, Gid: podUser}
	}
	cmd.Env = slices.DeleteFunc(append(os.Environ(), s.env...), func(set string) bool {
		return strings.HasPrefix(set, "NGINX=") // nginx has a use of its own for it
	})
	cmd.Stdout, cmd.Stderr = s.logFile(t, "stdout"), s.logFile(t, "stderr")
	return cmd
}

// run starts nginx and returns when it accepts, or the reason why it ended.
// Cleanup ends the whole process group.
func (s *sidecar) run(t *testing.T) error {
	t.Helper()
	cmd := s.command(t, "-g", "daemon off;")
	if err := cmd.Start(); err != nil {
		return err
	}
	s.master = cmd.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(bound):
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			t.Error("nginx did not stop")
		}
		if t.Failed() {
			t.Logf("nginx:\n%s", readFile(t, filepath.Join(s.dir, "stderr")))
		}
	})
	client := s.client(t, s.probe)
	err := until(func() error {
		select {
		case err := <-ended:
			return errors.Join(errEnded, err)
		default:
		}
		// The socket is there for -t already, which answers nobody.
		res, err := client.Get("http://" + host + "/healthz")
		if err == nil {
			res.Body.Close()
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, readFile(t, filepath.Join(s.dir, "stderr")))
	}
	return err
}

// logFile opens a file for the child; the parent's descriptor is closed at the
// end of the test.
func (s *sidecar) logFile(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

var errEnded = errors.New("nginx ended")

// until asks again until there is no error, nginx ended, or the bound is over.
func until(check func() error) error {
	deadline, tick := time.After(bound), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil || errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-deadline:
			return err
		case <-tick.C:
		}
	}
}

// tlsConfig is a client that trusts only the CA of certs/make.sh.
func (s *sidecar) tlsConfig() *tls.Config {
	return &tls.Config{RootCAs: s.roots, ServerName: host}
}

// client speaks to the address it is given, whatever the URL's host is, and
// follows no redirect.
func (s *sidecar) client(t *testing.T, address string) *http.Client {
	t.Helper()
	transport := &http.Transport{
		TLSClientConfig: s.tlsConfig(),
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{
		Transport:     transport,
		Timeout:       bound,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// request sends text to 443 and returns the answer, whose body is read later
// from the same connection; Cleanup closes it.
func (s *sidecar) request(t *testing.T, text string) *http.Response {
	t.Helper()
	conn, err := tls.Dial("tcp", s.secure, s.tlsConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(bound))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// logged waits until what nginx wrote to its standard output matches.
func (s *sidecar) logged(t *testing.T, want *regexp.Regexp) {
	t.Helper()
	var got []byte
	err := until(func() error {
		if got = readFile(t, filepath.Join(s.dir, "stdout")); !want.Match(got) {
			return fmt.Errorf("the log has other lines than %s", want)
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v:\n%.2000s", err, got)
	}
}

// dial opens wss://www.mydomain.com<path>; Cleanup closes it.
func (s *sidecar) dial(t *testing.T, path string, header http.Header) *websocket.Conn {
	t.Helper()
	config, err := websocket.NewConfig("wss://"+host+":8443"+path, "https://"+host)
	if err != nil {
		t.Fatal(err)
	}
	config.Header = header
	conn, err := tls.Dial("tcp", s.secure, s.tlsConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(bound))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		t.Fatal(err)
	}
	return ws
}

// echo sends a message and wants its bytes back, in however many frames.
func echo(t *testing.T, ws *websocket.Conn, message []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() { sent <- websocket.Message.Send(ws, message) }()
	got := make([]byte, len(message))
	_, err := io.ReadFull(ws, got)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, message) {
		t.Fatalf("echo of %d bytes: other bytes came back", len(message))
	}
}
