//go:build controlplane

package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Namespaces of the clients: one with an override that stays, one that the hash
// decides, and one whose override the tests change.
const (
	kept   = prefix + "kept"
	hashed = prefix + "hashed"
	moved  = prefix + "moved"
)

// backendCount is how many backends the routers have.
const backendCount = 4

// subject is a router process that a fault is tried on.
type subject struct {
	*process
	*router
	dialer *dialer
}

// rig is what the routers of one test have in common.
type rig struct {
	*plane
	backends []string // addresses, in the order of the ordinals
	program  string   // the router
}

// newRig starts the backends. The programs are those of "make build".
func newRig(t *testing.T) *rig {
	t.Helper()
	p := newPlane(t)
	bin := filepath.Join(p.root, "bin")
	if _, err := os.Stat(filepath.Join(bin, "router")); err != nil {
		t.Fatalf("%v: \"make build\" makes it", err)
	}
	return &rig{plane: p, backends: p.localBackends(filepath.Join(bin, "backend"), backendCount), program: filepath.Join(bin, "router")}
}

// within is the rig as a subtest has it.
func (r *rig) within(t *testing.T) *rig {
	s, p := *r.system, *r.plane
	s.t, p.system = t, &s
	return &rig{&p, r.backends, r.program}
}

// run starts a router by a command to which its program and flags are added.
func (r *rig) run(name, kube string, command ...string) *subject {
	r.t.Helper()
	command = append(command, r.program, "-listen=127.0.0.1:0", "-admin=127.0.0.1:0", "-log-format=json", "-pod-name="+name,
		"-kube="+kube, "-kube-namespace="+r.namespace, "-backends="+strings.Join(r.backends, ","))
	p := start(r.t, command[0], command[1:]...)
	line := p.says(r.t, `"msg":"serving"`)
	return &subject{process: p, router: &router{pod: name, base: "http://" + field(r.t, line, "admin")},
		dialer: &dialer{base: "ws://" + field(r.t, line, "listen"), http: http.DefaultClient}}
}

// accountFiles are the files of a service account, as they are in a pod.
type accountFiles struct {
	t   *testing.T
	dir string
}

// newFiles asks for a token and writes the files.
func (p *plane) newFiles() accountFiles {
	p.t.Helper()
	f := accountFiles{p.t, p.t.TempDir()}
	f.put("token", p.token(nil))
	f.put("ca.crt", p.ca())
	f.put("namespace", p.namespace)
	return f
}

// put replaces a file at once, as the kubelet does.
func (f accountFiles) put(name, content string) {
	f.t.Helper()
	next := filepath.Join(f.dir, ".next")
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(f.dir, name)); err != nil {
		f.t.Fatal(err)
	}
}

// token returns a token of the service account, which lives as long as the
// object it is bound to.
func (p *plane) token(bound *authenticationv1.BoundObjectReference) string {
	p.t.Helper()
	answer, err := p.client.CoreV1().ServiceAccounts(p.namespace).CreateToken(p.t.Context(), account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: bound}}, metav1.CreateOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	return answer.Status.Token
}

// ca returns the certificate of the cluster's CA.
func (p *plane) ca() string { return p.read("pki/ca.crt") }

// read reads a file of the control plane.
func (p *plane) read(name string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.state, name))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// asPod puts the files where a pod has them, in a mount namespace of the
// command's own.
const asPod = `mount -t tmpfs tmpfs /var/run && mkdir -p "$0" && mount --bind "$1" "$0" && shift && exec "$@"`

// inPod starts a router as in a pod, with these files, which finds the API
// server at the address. More of its environment may be given. It may not yet be
// ready.
func (r *rig) inPod(files accountFiles, address string, env ...string) *subject {
	r.t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		r.t.Fatal(err)
	}
	command := append([]string{"env", "KUBERNETES_SERVICE_HOST=" + host, "KUBERNETES_SERVICE_PORT=" + port}, env...)
	return r.run("pod", "in-cluster", append(command, "unshare", "--mount", "sh", "-c", asPod,
		"/var/run/secrets/kubernetes.io/serviceaccount", files.dir)...)
}

// pod starts a router as in a pod, and waits until it is ready.
func (r *rig) pod() *subject {
	r.t.Helper()
	s := r.inPod(r.newFiles(), r.address)
	s.awaitReady(r.t)
	return s
}

// laptop starts a router outside of the cluster, behind the kubectl proxy at
// the address, and waits until it is ready.
func (r *rig) laptop(proxy string) *subject {
	r.t.Helper()
	s := r.run("laptop", "http://"+proxy)
	s.awaitReady(r.t)
	return s
}

// kubectlProxy starts a kubectl proxy at the address.
func (p *plane) kubectlProxy(address string) *process {
	p.t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		p.t.Fatal(err)
	}
	proxy := start(p.t, "kubectl", "proxy", "--port="+port)
	proxy.says(p.t, "Starting to serve")
	return proxy
}

// both starts a router of each kind.
func (r *rig) both() []*subject {
	r.t.Helper()
	proxy := freeAddress(r.t)
	r.kubectlProxy(proxy)
	return []*subject{r.pod(), r.laptop(proxy)}
}

// logs waits for a line with the given text, and returns how long that took.
func (s *subject) logs(t *testing.T, within time.Duration, text string) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, within, fmt.Sprintf("%s to log %s", s.pod, text), func() error {
		if s.count(text) > 0 {
			return nil
		}
		return cmp.Or(s.ended(), errors.New("it has not"))
	})
	return time.Since(began)
}

// awaitState waits until the watch is in this state.
func (s *subject) awaitState(t *testing.T, state string, within time.Duration) {
	t.Helper()
	eventually(t, within, s.pod+" to be "+state, func() error {
		m, err := s.metrics(t.Context())
		if err == nil && m.sum("router_watch_state", "state", state) != 1 {
			err = errors.New("it is not")
		}
		return err
	})
}

// count returns how many lines have the text.
func (s *subject) count(text string) (n int) {
	for _, line := range s.output() {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// failedWith is what is in the log line of a failure of this class.
func failedWith(class string) string { return `"class":"` + class + `"` }

// figures are what must not grow with faults.
type figures struct {
	goroutines int
	memory     int // bytes: anonymous, resident
	lines      int // in the log, but those of sessions and tables
}

// figures reads them.
func (s *subject) figures(t *testing.T) figures {
	t.Helper()
	m, err := s.metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := figures{goroutines: int(m.sum("go_goroutines")), memory: memory(s.cmd.Process.Pid)}
	for _, line := range s.output() {
		if !strings.Contains(line, `"msg":"session ended"`) && !strings.Contains(line, `"msg":"routing table updated"`) {
			f.lines++
		}
	}
	return f
}

// memory returns what a process has of anonymous memory now (proc_pid_status(5)).
func memory(pid int) int {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, after, _ := strings.Cut(string(status), "RssAnon:")
	kib, _ := strconv.Atoi(strings.Fields(after + " 0")[0])
	return kib << 10
}
