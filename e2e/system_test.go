package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// hostName is the name in the certificate that clients ask for.
const hostName = "www.mydomain.com"

// prefix begins each namespace that the tests use.
const prefix = "e2e-"

// system is the deployed system as one test sees it. What it opens is closed
// by the test's cleanup.
type system struct {
	t         *testing.T
	root      string // of the repository
	client    kubernetes.Interface
	config    *rest.Config
	namespace string      // the Kubernetes namespace
	tls       *tls.Config // trusts certs/ca.crt, asks for hostName
	plain     bool        // clients come without TLS: see servesTLS
	front     *front
	dialer    *dialer            // clients that go through nginx
	known     map[string]*router // by the name of the pod
}

// newSystem finds the cluster and the way to nginx, and waits until both
// StatefulSet and Deployment are whole, so that no test starts in the ruins of
// the one before.
func newSystem(t *testing.T) *system {
	t.Helper()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	s := &system{t: t, root: root, known: map[string]*router{}}
	s.loadConfig()
	s.trust()
	s.showLogsIfFailed()
	s.awaitWhole()
	s.findFront(0)
	return s
}

// showLogsIfFailed writes the end of what the routers have logged since now into the test's
// log, when the test ends and has failed.
func (s *system) showLogsIfFailed() {
	lines := int64(100) // of each router
	since := metav1.Now()
	t := s.t
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		ctx, cancel := cleanupContext()
		defer cancel()
		pods, err := s.client.CoreV1().Pods(s.namespace).List(ctx,
			metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
		if err != nil {
			t.Logf("the routers' logs: %v", err)
			return
		}
		for _, pod := range pods.Items {
			log, err := s.client.CoreV1().Pods(s.namespace).GetLogs(pod.Name, &corev1.PodLogOptions{
				Container: "router", SinceTime: &since, TailLines: &lines,
			}).DoRaw(ctx)
			t.Logf("the end of the log of %s (error %v):\n%s", pod.Name, err, log)
		}
	})
}

// findFront finds the way to nginx, as newFront does, and makes a dialer that goes there.
func (s *system) findFront(tryFor time.Duration) {
	s.t.Helper()
	s.plain = !s.servesTLS()
	s.front = newFront(s, tryFor)
	transport := &http.Transport{
		DialContext:     s.front.dial,
		TLSClientConfig: s.tls,
		ReadBufferSize:  1 << 10,
		WriteBufferSize: 1 << 10,
	}
	s.t.Cleanup(transport.CloseIdleConnections)
	s.dialer = &dialer{base: "wss://" + hostName, http: &http.Client{Transport: transport}}
	if s.plain {
		s.dialer.base = "ws://" + hostName
	}
}

// in returns the system in another Kubernetes namespace, once its pods are ready.
func (s *system) in(namespace string) *system {
	s.t.Helper()
	other := *s
	other.namespace, other.known = namespace, map[string]*router{}
	if os.Getenv("E2E_ADDR") != "forward" {
		s.t.Setenv("E2E_ADDR", "") // which leads to other routers
	}
	other.findFront(30 * time.Second)
	return &other
}

// loadConfig reads the kubeconfig, and sees that the API server answers.
func (s *system) loadConfig() {
	s.t.Helper()
	s.readConfig()
	if _, err := s.client.Discovery().ServerVersion(); err != nil {
		s.t.Fatalf("the API server %s does not answer: %v", s.config.Host, err)
	}
}

// readConfig reads the kubeconfig as kubectl does.
func (s *system) readConfig() {
	s.t.Helper()
	kubeconfig := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		clientcmd.NewDefaultClientConfigLoadingRules(), &clientcmd.ConfigOverrides{})
	var err error
	if s.config, err = kubeconfig.ClientConfig(); err != nil {
		s.t.Fatalf("no cluster in the kubeconfig: %v", err)
	}
	if s.namespace, _, err = kubeconfig.Namespace(); err != nil {
		s.t.Fatal(err)
	}
	s.config.QPS = -1 // no limit: tests change the overrides ten times a second
	if s.client, err = kubernetes.NewForConfig(s.config); err != nil {
		s.t.Fatal(err)
	}
}

// trust reads the CA that signed the certificate in the Secret nginx-tls.
func (s *system) trust() {
	s.t.Helper()
	file := filepath.Join(s.root, "certs", "ca.crt")
	ca, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatalf("%v: \"make certs\" or \"make deploy\" makes it", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		s.t.Fatalf("%s holds no certificate", file)
	}
	s.tls = &tls.Config{RootCAs: pool, ServerName: hostName}
}

// awaitWhole waits until all pods that the manifests ask for are ready.
func (s *system) awaitWhole() {
	s.t.Helper()
	eventually(s.t, 90*time.Second, "all pods ready (was it deployed with \"make deploy\"?)", func() error {
		return s.whole(s.t.Context())
	})
}

// whole is nil if all pods that the manifests ask for are ready.
func (s *system) whole(ctx context.Context) error {
	set, err := s.client.AppsV1().StatefulSets(s.namespace).Get(ctx, "backend", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if got, want := set.Status.ReadyReplicas, *set.Spec.Replicas; got != want {
		return fmt.Errorf("StatefulSet backend has %d of %d pods ready", got, want)
	}
	deployment, err := s.client.AppsV1().Deployments(s.namespace).Get(ctx, "router", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if got, want := deployment.Status.ReadyReplicas, *deployment.Spec.Replicas; got != want {
		return fmt.Errorf("Deployment router has %d of %d pods ready", got, want)
	}
	return nil
}

// pods returns the pods of an application that are not being deleted, by name.
func (s *system) pods(ctx context.Context, app string) []corev1.Pod {
	s.t.Helper()
	list, err := s.client.CoreV1().Pods(s.namespace).List(ctx,
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + app})
	if err != nil {
		s.t.Fatal(err)
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		return p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning
	})
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	if len(pods) == 0 {
		s.t.Fatalf("no pod of %q runs in the Kubernetes namespace %q", app, s.namespace)
	}
	return pods
}

// routers returns the routers that run now.
func (s *system) routers(ctx context.Context) []*router {
	s.t.Helper()
	var all []*router
	for _, pod := range s.pods(ctx, "router") {
		if s.known[pod.Name] == nil {
			s.known[pod.Name] = s.newRouter(pod)
		}
		all = append(all, s.known[pod.Name])
	}
	return all
}

// newRouter finds the way to the admin port of a router.
func (s *system) newRouter(pod corev1.Pod) *router {
	s.t.Helper()
	return &router{pod: pod.Name, base: "http://" + s.podAddress(pod, 8001)}
}

// podAddress finds the way to a port of a pod.
func (s *system) podAddress(pod corev1.Pod, port int) string {
	s.t.Helper()
	addr := net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(port))
	if answers(addr) {
		return addr
	}
	f, err := newForward(s, pod.Name, port)
	if err != nil {
		s.t.Fatalf("port %d of %s: %s does not answer, and port-forward: %v", port, pod.Name, addr, err)
	}
	s.t.Cleanup(f.close)
	return f.addr
}

// hasNginx reports whether nginx ends the clients' TLS. Otherwise the routers do: they were
// deployed with the component tls-in-router.
func (s *system) hasNginx() bool {
	s.t.Helper()
	return nginxIn(&s.pods(s.t.Context(), "router")[0])
}

// servesTLS reports whether clients come with TLS. They do not if the routers were deployed
// with the component no-tls.
func (s *system) servesTLS() bool {
	s.t.Helper()
	service, err := s.client.CoreV1().Services(s.namespace).Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return slices.ContainsFunc(service.Spec.Ports, func(p corev1.ServicePort) bool { return p.Name == "https" })
}

// nginxIn reports whether a pod of the router has nginx.
func nginxIn(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == "nginx" })
}

// kubectl runs kubectl with the given standard input and returns what it
// printed.
func (s *system) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "kubectl", args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return stdout.String(), nil
}

// mustKubectl is kubectl whose failure is the test's.
func (s *system) mustKubectl(stdin string, args ...string) string {
	s.t.Helper()
	out, err := s.kubectl(s.t.Context(), stdin, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// other returns the backend after the given one, which is never the same.
func (s *system) other(backend string) string {
	s.t.Helper()
	ordinal, err := strconv.Atoi(strings.TrimPrefix(backend, "backend-"))
	if err != nil {
		s.t.Fatalf("%q is not the name of a backend", backend)
	}
	return "backend-" + strconv.Itoa((ordinal+1)%len(s.pods(s.t.Context(), "backend")))
}
