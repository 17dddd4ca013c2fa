package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

// answers reports whether something accepts TCP connections there.
func answers(addr string) bool {
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// front is the way to nginx: an address, or a port-forward that is made again
// when the pod it leads to is gone.
type front struct {
	s *system

	// Guarded by mu.
	mu      sync.Mutex
	addr    string
	forward *forward // nil if addr was there already
}

// newFront takes the first address that answers with a certificate of the CA, or if clients
// come without TLS the first that answers. It tries them once, or for as long as pods need
// that are ready and new: the way to them may not be there on each node yet.
func newFront(s *system, tryFor time.Duration) *front {
	s.t.Helper()
	f := &front{s: s}
	s.t.Cleanup(f.close)
	var tried []error
	for deadline := time.Now().Add(tryFor); ; time.Sleep(time.Second) {
		tried = nil
		for _, addr := range s.frontAddresses() {
			err := s.shakeHands(addr)
			if err == nil {
				f.addr = addr
				s.t.Logf("nginx at %s", addr)
				return f
			}
			tried = append(tried, fmt.Errorf("%s: %w", addr, err))
		}
		if time.Now().After(deadline) {
			break
		}
	}
	if own := os.Getenv("E2E_ADDR"); own != "" && own != "forward" {
		s.t.Fatalf("E2E_ADDR does not answer: %v", errors.Join(tried...))
	}
	addr, err := f.address(s.t.Context())
	if err == nil {
		err = s.shakeHands(addr)
	}
	if err != nil {
		s.t.Fatalf("no way to nginx:\n%v\nport-forward: %v", errors.Join(tried...), err)
	}
	s.t.Logf("nginx by port-forward at %s", addr)
	return f
}

// frontAddresses returns where nginx may answer, best first.
func (s *system) frontAddresses() []string {
	s.t.Helper()
	port, name := "443", "https"
	if s.plain {
		port, name = "80", "http"
	}
	switch own := os.Getenv("E2E_ADDR"); {
	case own == "forward":
		return nil
	case own != "" && !strings.Contains(own, ":"):
		return []string{net.JoinHostPort(own, port)}
	case own != "":
		return []string{own}
	}
	service, err := s.client.CoreV1().Services(s.namespace).Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	var addrs []string
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		addrs = append(addrs, net.JoinHostPort(ingress.IP+ingress.Hostname, port)) // one of them is set
	}
	addrs = append(addrs, net.JoinHostPort(service.Spec.ClusterIP, port))
	return append(addrs, s.nodePorts(service, name)...)
}

// nodePorts returns where the nodes offer the port of this name: the way into minikube and
// kind from the machine that they run on.
func (s *system) nodePorts(service *corev1.Service, name string) []string {
	s.t.Helper()
	nodes, err := s.client.CoreV1().Nodes().List(s.t.Context(), metav1.ListOptions{})
	if err != nil {
		return nil // nobody has to be allowed to list nodes
	}
	var addrs []string
	for _, port := range service.Spec.Ports {
		if port.Name != name || port.NodePort == 0 || len(nodes.Items) == 0 {
			continue
		}
		for _, a := range nodes.Items[0].Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				addrs = append(addrs, net.JoinHostPort(a.Address, strconv.Itoa(int(port.NodePort))))
			}
		}
	}
	return addrs
}

// needDirect fails a test that a port-forward cannot carry: it is one TCP
// connection for all, and ends when a client resets one of its own.
func (s *system) needDirect() {
	s.t.Helper()
	if s.front.forward != nil {
		s.t.Fatal("nginx can only be reached by a port-forward, which does not bear this test: " +
			"give the Service router an address (minikube tunnel) or set E2E_ADDR, or leave the test out with -skip")
	}
}

// shakeHands opens a TLS connection and verifies the certificate, or without TLS only opens a
// connection.
func (s *system) shakeHands(addr string) error {
	if s.plain {
		if !answers(addr) {
			return errors.New("it does not answer")
		}
		return nil
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 3 * time.Second}, "tcp", addr, s.tls)
	if err != nil {
		return err
	}
	return conn.Close()
}

// dial connects to nginx, whatever address is asked for.
func (f *front) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	addr, err := f.address(ctx)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

// address returns where nginx is now.
func (f *front) address(ctx context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.addr != "" && f.forward == nil {
		return f.addr, nil
	}
	if f.forward != nil && !f.forward.ended() {
		return f.forward.addr, nil
	}
	pods, err := f.s.client.CoreV1().Pods(f.s.namespace).List(ctx,
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
	if err != nil {
		return "", err
	}
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp != nil || pod.Status.PodIP == "" {
			continue
		}
		port := 443
		if !nginxIn(&pod) {
			port = 8000
		}
		f.forward, err = newForward(f.s, pod.Name, port)
		if err == nil {
			return f.forward.addr, nil
		}
	}
	f.forward = nil
	return "", fmt.Errorf("no router pod to forward to: %w", err)
}

func (f *front) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.forward != nil {
		f.forward.close()
	}
}

// forward is a port-forward to one pod: connections to addr arrive there.
type forward struct {
	addr string
	stop func()        // idempotent
	done chan struct{} // closed when run has returned
}

// newForward starts a port-forward. The caller closes it.
func newForward(s *system, pod string, port int) (*forward, error) {
	roundTripper, upgrader, err := spdy.RoundTripperFor(s.config)
	if err != nil {
		return nil, err
	}
	url := s.client.CoreV1().RESTClient().Post().Namespace(s.namespace).
		Resource("pods").Name(pod).SubResource("portforward").URL()
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(
		spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, url),
		[]string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return nil, err
	}
	f := &forward{stop: sync.OnceFunc(func() { close(stop) }), done: make(chan struct{})}
	failed := make(chan error, 1)
	go f.run(forwarder, failed)
	select {
	case err := <-failed:
		return nil, err
	case <-ready:
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		f.close()
		return nil, err
	}
	f.addr = fmt.Sprintf("127.0.0.1:%d", ports[0].Local)
	return f, nil
}

func (f *forward) run(forwarder *portforward.PortForwarder, failed chan<- error) {
	defer close(f.done)
	failed <- forwarder.ForwardPorts()
}

func (f *forward) ended() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

func (f *forward) close() {
	f.stop()
	<-f.done
}
