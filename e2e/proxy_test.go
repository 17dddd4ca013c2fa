package e2e

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestKubectlProxy runs the router outside the cluster, as a developer does:
// overrides through `kubectl proxy --port=8080`, backends by -backends. The
// ConfigMap is changed, deleted and made again, under the eyes of the routers
// in the cluster too.
func TestKubectlProxy(t *testing.T) {
	const namespace = prefix + "proxy"
	s := newSystem(t)
	s.keepOverrides()
	s.startKubectlProxy()
	laptop, d := s.startRouter()
	everyone := append(s.routers(t.Context()), laptop.router)
	owns := func(backend, why string) {
		t.Helper()
		for _, r := range everyone {
			eventually(t, 10*time.Second, "the routers", func() error { return r.owns(t.Context(), namespace, backend, why) })
		}
		if err := d.lands(t.Context(), namespace, backend); err != nil {
			t.Fatalf("through the router outside: %v", err)
		}
		s.mustLand(namespace, backend)
	}

	hash := s.mustOwner(namespace).Owner
	owns(hash, "hash")
	first := s.other(hash)
	s.apply(map[string]string{namespace: first})
	owns(first, "override")

	s.mustKubectl("", "delete", "configmap", configMap)
	for _, r := range everyone {
		eventually(t, 10*time.Second, "the deletion to be seen", func() error {
			m, err := r.metrics(t.Context())
			if err == nil && m.sum("router_watch_object_absent") != 1 {
				err = fmt.Errorf("%s: router_watch_object_absent is not 1", r.pod)
			}
			return err
		})
		if _, err := r.get(t.Context(), "/readyz"); err != nil {
			t.Errorf("without the ConfigMap a router that has a table must stay ready: %v", err)
		}
	}
	owns(first, "override")

	second := s.other(first)
	s.apply(map[string]string{namespace: second})
	owns(second, "override")
	if err := laptop.terminate(t); err != nil {
		t.Errorf("on SIGTERM the router ended with %v, want exit code 0", err)
	}
	laptop.says(t, `"msg":"stopped"`)
}

// startKubectlProxy runs the program that users run, on the port they use.
func (s *system) startKubectlProxy() *process {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		s.t.Fatalf("port 8080 is needed for kubectl proxy: %v", err)
	}
	l.Close()
	p := start(s.t, "kubectl", "proxy", "--port=8080")
	p.says(s.t, "Starting to serve")
	return p
}

// outside is a router that the test runs.
type outside struct {
	*process
	*router
	serving string // what it printed of that
}

// runRouter runs the router's program with these flags, at free addresses.
func runRouter(t *testing.T, program string, flags ...string) outside {
	t.Helper()
	p := start(t, program, append(flags, "-listen=127.0.0.1:0", "-admin=127.0.0.1:0", "-log-format=json", "-pod-name=outside")...)
	line := p.says(t, `"msg":"serving"`)
	return outside{p, &router{pod: "outside", base: "http://" + field(t, line, "admin")}, line}
}

// address is where clients connect.
func (o outside) address(t *testing.T) string {
	t.Helper()
	return "ws://" + field(t, o.serving, "listen")
}

// startRouter builds the router and runs it with these flags and no more than a
// developer has to give, and waits until it is ready.
func (s *system) startRouter(flags ...string) (outside, *dialer) {
	s.t.Helper()
	o := runRouter(s.t, build(s.t, "."), append(flags, "-kube-namespace="+s.namespace,
		"-backends="+strings.Join(s.backendAddresses(), ","))...)
	if kube := field(s.t, o.serving, "kube"); kube != "http://127.0.0.1:8080" {
		s.t.Errorf("the router follows %q by itself, want http://127.0.0.1:8080", kube)
	}
	o.awaitReady(s.t)
	return o, &dialer{base: o.address(s.t), http: http.DefaultClient}
}

// awaitReady waits until /readyz says so.
func (r *router) awaitReady(t *testing.T) {
	t.Helper()
	eventually(t, 10*time.Second, r.pod+" to be ready", func() error {
		body, err := r.get(t.Context(), "/readyz")
		if err == nil && body != "ready\n" {
			err = fmt.Errorf("/readyz says %q", body)
		}
		return err
	})
}

// backendAddresses returns where the backends are, in the order of their
// ordinals: the pods, or where those cannot be reached from here processes
// with their names.
func (s *system) backendAddresses() []string {
	s.t.Helper()
	var addrs []string
	for _, pod := range s.pods(s.t.Context(), "backend") {
		addr := net.JoinHostPort(pod.Status.PodIP, "9000")
		if !answers(addr) {
			s.t.Logf("pod %s does not answer at %s: local backends instead", pod.Name, addr)
			return s.localBackends(build(s.t, "./backend"), len(s.pods(s.t.Context(), "backend")))
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// localBackends starts backends on this machine, with the names of the pods.
func (s *system) localBackends(program string, n int) []string {
	s.t.Helper()
	var addrs []string
	for i := range n {
		addr := freeAddress(s.t)
		p := start(s.t, program, "-listen="+addr, fmt.Sprintf("-name=backend-%d", i))
		eventually(s.t, 10*time.Second, "a local backend", func() error {
			if answers(addr) {
				return nil
			}
			if err := p.ended(); err != nil {
				s.t.Fatal(err)
			}
			return fmt.Errorf("%s does not answer", addr)
		})
		addrs = append(addrs, addr)
	}
	return addrs
}

// freeAddress returns an address of this machine at which nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
