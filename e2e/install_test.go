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
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd/api"
)

// installation is an overlay that is applied in a Kubernetes namespace of its own, which
// admits pods of the standard "restricted" only.
type installation struct {
	*system
	t          *testing.T
	namespace  string
	overlay    string // the directory
	kubeconfig string // with namespace as the default
}

// newInstallation makes the Kubernetes namespace, with the two objects that are the user's.
func (s *system) newInstallation(t *testing.T) *installation {
	t.Helper()
	in := &installation{system: s, t: t, namespace: s.newNamespace(t)}
	in.kubeconfig = s.kubeconfig(func(c *api.Config) { c.Contexts[c.CurrentContext].Namespace = in.namespace })
	in.kubectl("label", "namespace", in.namespace, "pod-security.kubernetes.io/enforce=restricted")
	in.kubectl("create", "configmap", configMap)
	secret, err := s.client.CoreV1().Secrets(s.namespace).Get(t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.ObjectMeta = metav1.ObjectMeta{Name: tlsSecret}
	if _, err := s.client.CoreV1().Secrets(in.namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return in
}

// tryKubectl runs kubectl in the installation's Kubernetes namespace.
func (in *installation) tryKubectl(args ...string) (string, error) {
	return in.system.kubectl(in.t.Context(), "", append([]string{"--namespace=" + in.namespace}, args...)...)
}

// kubectl is tryKubectl for what must succeed.
func (in *installation) kubectl(args ...string) string {
	in.t.Helper()
	out, err := in.tryKubectl(args...)
	if err != nil {
		in.t.Fatal(err)
	}
	return out
}

// create makes an object of a manifest.
func (in *installation) create(manifest string) {
	in.t.Helper()
	if _, err := in.system.kubectl(in.t.Context(), manifest, "--namespace="+in.namespace, "create", "-f", "-"); err != nil {
		in.t.Fatal(err)
	}
}

// install applies an overlay of this text, and waits until its pods are ready.
func (in *installation) install(text string) {
	in.t.Helper()
	in.apply(text)
	for _, object := range strings.Fields(in.kubectl("get", "statefulsets,deployments", "-o", "name")) {
		in.kubectl("rollout", "status", "--timeout=90s", object)
	}
}

// apply applies an overlay of this text, with the images of "make deploy".
func (in *installation) apply(text string) {
	in.t.Helper()
	in.t.Cleanup(in.removePolicy)
	in.overlay = in.system.overlay("install", text+"\nnamespace: "+in.namespace+"\nimages:\n"+in.images())
	in.kubectl("apply", "-k", in.overlay)
}

// removePolicy removes what is in no Kubernetes namespace, of overlays with the prefix acme-.
func (in *installation) removePolicy() {
	in.system.kubectl(context.Background(), "", "delete", "--ignore-not-found",
		"validatingadmissionpolicy/acme-router-overrides", "validatingadmissionpolicybinding/acme-router-overrides")
}

// images returns the images of bin/deploy, which "make deploy" has loaded.
func (in *installation) images() string {
	in.t.Helper()
	deployed, err := os.ReadFile(filepath.Join(in.root, "bin", "deploy", "kustomization.yaml"))
	if err != nil {
		in.t.Fatalf("%v: \"make deploy\" writes it", err)
	}
	_, images, _ := strings.Cut(string(deployed), "\nimages:\n")
	return images
}

// router returns the address of a pod of the router that is ready.
func (in *installation) router() string {
	in.t.Helper()
	pods, err := in.client.CoreV1().Pods(in.namespace).List(in.t.Context(),
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
	if err != nil {
		in.t.Fatal(err)
	}
	for _, pod := range pods.Items {
		for _, condition := range pod.Status.Conditions {
			if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue && pod.DeletionTimestamp == nil {
				return pod.Status.PodIP
			}
		}
	}
	in.t.Fatal("no pod of the router is ready")
	return ""
}

// awaitRouters waits until there are so many pods of the router, also of those that end.
func (in *installation) awaitRouters(n int) {
	in.t.Helper()
	eventually(in.t, 90*time.Second, "the routers before to end", func() error {
		pods, err := in.client.CoreV1().Pods(in.namespace).List(in.t.Context(),
			metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
		if err == nil && len(pods.Items) != n {
			err = fmt.Errorf("there are %d pods, want %d", len(pods.Items), n)
		}
		return err
	})
}

// owner returns the owner of a namespace.
func (in *installation) owner(deployment, namespace string) string {
	in.t.Helper()
	out := in.kubectl("exec", "deployment/"+deployment, "-c", "router", "--", "/router", "owner", namespace)
	return strings.Fields(out)[1]
}

// open opens a WebSocket, and returns the backend that answers, or the status of another
// answer than 101.
func (in *installation) open(url string, dial func(context.Context) (net.Conn, error), header http.Header) (backend string, status int) {
	in.t.Helper()
	ctx, cancel := context.WithTimeout(in.t.Context(), 30*time.Second)
	defer cancel()
	transport := &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		TLSClientConfig: in.tls.Clone(),
	}
	defer transport.CloseIdleConnections()
	conn, resp, err := websocket.Dial(ctx, url, &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: transport}, HTTPHeader: header,
	})
	if err != nil {
		if resp == nil {
			in.t.Fatalf("%s: %v", url, err)
		}
		return "", resp.StatusCode
	}
	defer conn.CloseNow()
	_, first, err := conn.Read(ctx)
	if err != nil {
		in.t.Fatalf("%s: %v", url, err)
	}
	server := regexp.MustCompile(`"server":"([^"]*)"`).FindSubmatch(first)
	if server == nil {
		in.t.Fatalf("%s: the first message is %s", url, first)
	}
	return string(server[1]), http.StatusSwitchingProtocols
}

// to returns a function that dials the address.
func to(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}
}

// wantOpen opens a WebSocket over TLS, and wants the owner of its namespace.
func (in *installation) wantOpen(deployment, namespace string) {
	in.t.Helper()
	want := in.owner(deployment, namespace)
	got, status := in.open("wss://"+hostName+"/ws/"+namespace, to(net.JoinHostPort(in.router(), "443")), nil)
	if got != want {
		in.t.Errorf("%s: %q answers (status %d), want %s", namespace, got, status, want)
	}
}

// clientOf returns what the backend has logged of the client of a namespace's last session.
func (in *installation) clientOf(namespace string) (client string) {
	in.t.Helper()
	client, _ = in.forwarded(namespace)
	return client
}

// forwarded returns X-Forwarded-For and X-Forwarded-Proto of a namespace's last session, as the
// backend has logged them.
func (in *installation) forwarded(namespace string) (client, proto string) {
	in.t.Helper()
	backend := in.owner("router", namespace)
	eventually(in.t, 10*time.Second, "the session in the log of "+backend, func() error {
		log, err := in.tryKubectl("logs", backend)
		if err != nil {
			return err
		}
		lines := regexp.MustCompile(`msg="session open".* namespace=`+namespace+` .* proto=(\S*) for="?([^"\n]*)"?`).FindAllStringSubmatch(log, -1)
		if lines == nil {
			return fmt.Errorf("no session of %s in\n%s", namespace, log)
		}
		last := lines[len(lines)-1]
		client, proto = last[2], last[1]
		return nil
	})
	return client, proto
}

// generations returns what changes in workloads if an apply changes anything of them.
func (in *installation) generations() string {
	in.t.Helper()
	return in.kubectl("get", "statefulsets,deployments", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.metadata.generation} {.spec.replicas}{"\n"}{end}`) +
		in.kubectl("get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}`)
}

// wantNothingLeft deletes the overlay, and wants no object but what is the user's or the
// cluster's.
func (in *installation) wantNothingLeft() {
	in.t.Helper()
	in.kubectl("delete", "-k", in.overlay)
	const kinds = "statefulsets,deployments,services,configmaps,secrets,serviceaccounts,roles,rolebindings," +
		"poddisruptionbudgets,networkpolicies"
	left := in.kubectl("get", kinds, "-o", "name")
	for _, name := range strings.Fields(left) {
		switch name {
		case "configmap/" + configMap, "secret/" + tlsSecret, "configmap/kube-root-ca.crt", "serviceaccount/default":
		default:
			in.t.Errorf("%s is left", name)
		}
	}
	if policies := in.kubectl("get", "validatingadmissionpolicies,validatingadmissionpolicybindings", "-o", "name"); strings.Contains(policies, "/acme-") {
		in.t.Errorf("a policy is left:\n%s", policies)
	}
}

// TestInstallOwnStatefulSet installs the example with a StatefulSet of another name and a
// prefix: the router finds all by these names, the policy knows them, an apply after
// kubectl scale changes nothing, and nothing is left in the end.
func TestInstallOwnStatefulSet(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.install("resources: [../../k8s/examples/own-statefulset]")
	in.kubectl("scale", "statefulset/acme-documents", "--replicas=3")
	in.kubectl("scale", "deployment/acme-router", "--replicas=2")
	in.kubectl("rollout", "status", "--timeout=2m", "statefulset/acme-documents")
	in.kubectl("rollout", "status", "--timeout=2m", "deployment/acme-router")
	in.wantOpen("acme-router", "ns-01")
	other := "acme-documents-2"
	if in.owner("acme-router", "ns-01") == other {
		other = "acme-documents-1"
	}
	in.kubectl("patch", "configmap", configMap, "-p", `{"data":{"ns-01":"`+other+`"}}`)
	eventually(t, 30*time.Second, "the override", func() error {
		if got := in.owner("acme-router", "ns-01"); got != other {
			return fmt.Errorf("the owner is %s, want %s", got, other)
		}
		return nil
	})
	in.wantOpen("acme-router", "ns-01")
	eventually(t, 30*time.Second, "the policy", func() error {
		_, err := in.tryKubectl("patch", "configmap", configMap, "-p", `{"data":{"ns-02":"backend-2"}}`)
		if err == nil || !strings.Contains(err.Error(), `must be the name of a backend, such as "acme-documents-2"`) {
			return fmt.Errorf("an override to backend-2: %v, want a refusal", err)
		}
		return nil
	})
	before := in.generations()
	if diff, err := in.tryKubectl("diff", "-k", in.overlay); err != nil {
		t.Errorf("kubectl diff after scale and a move: %v\n%s", err, diff)
	}
	in.kubectl("apply", "-k", in.overlay)
	if after := in.generations(); after != before {
		t.Errorf("an apply has changed\n%s to\n%s", before, after)
	}
	in.wantNothingLeft()
}

// TestInstallGitOps applies the example as GitOps tools do, on the server and with pruning:
// after kubectl scale nothing changes, what is removed from the overlay is removed.
func TestInstallGitOps(t *testing.T) {
	t.Setenv("KUBECTL_APPLYSET", "true")
	in := newSystem(t).newInstallation(t)
	in.t.Cleanup(in.removePolicy)
	apply := func(more string) {
		in.overlay = in.system.overlay("gitops", "resources: [../../k8s/examples/own-statefulset]\n"+more+
			"\nnamespace: "+in.namespace+"\nimages:\n"+in.images())
		in.kubectl("apply", "--server-side", "--prune", "--applyset=configmaps/acme", "-k", in.overlay)
	}
	apply("")
	in.kubectl("scale", "statefulset/acme-documents", "--replicas=2")
	in.kubectl("scale", "deployment/acme-router", "--replicas=2")
	in.kubectl("rollout", "status", "--timeout=2m", "deployment/acme-router")
	in.kubectl("rollout", "status", "--timeout=2m", "statefulset/acme-documents")
	before := in.generations()
	apply(`
patches:
  - target: {kind: PodDisruptionBudget}
    patch: |
      $patch: delete
      apiVersion: policy/v1
      kind: PodDisruptionBudget
      metadata:
        name: router
`)
	if after := in.generations(); after != before {
		t.Errorf("an apply has changed\n%s to\n%s", before, after)
	}
	if left := in.kubectl("get", "poddisruptionbudgets", "-o", "name"); left != "" {
		t.Errorf("%s was not pruned", left)
	}
	for _, kept := range []string{"configmap/" + configMap, "secret/" + tlsSecret} {
		in.kubectl("get", kept)
	}
	in.wantOpen("acme-router", "ns-01")
}

// TestDeployKeepsReplicas: the manifests of earlier versions had numbers of replicas. An
// upgrade leaves those that there are, by kubectl apply as on the server.
func TestDeployKeepsReplicas(t *testing.T) {
	s := newSystem(t)
	in := s.newInstallation(t)
	in.apply("resources: [../deploy]\nreplicas:\n  - {name: backend, count: 3}\n  - {name: router, count: 2}\n")
	in.kubectl("rollout", "status", "--timeout=2m", "statefulset/backend")
	in.kubectl("rollout", "status", "--timeout=2m", "deployment/router")
	const want = "backend 3\nrouter 2\n"
	check := func(after string) {
		got := in.kubectl("get", "statefulsets,deployments", "--sort-by=.metadata.name", "-o",
			`jsonpath={range .items[*]}{.metadata.name} {.spec.replicas}{"\n"}{end}`)
		if got != want {
			t.Errorf("after %s there are\n%swant\n%s", after, got, want)
		}
	}
	check("the first apply")
	for range 2 {
		if out, err := s.deploySh(t, in.namespace); err != nil {
			t.Fatalf("deploy.sh: %v\n%s", err, out)
		}
		check("deploy.sh")
	}
	in.kubectl("apply", "--server-side", "--force-conflicts", "-k", filepath.Join(in.root, "bin", "deploy"))
	check("an apply on the server")
}

// TestInstallBase: the base alone opens nothing to the world, and says what it lacks.
func TestInstallBase(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.apply("resources: [../../k8s/base]\nnamePrefix: acme-")
	services := in.kubectl("get", "services", "-o", `jsonpath={range .items[*]}{.metadata.name} {.spec.type}{"\n"}{end}`)
	if services != "acme-router ClusterIP\n" {
		t.Errorf("the Services are\n%s", services)
	}
	eventually(t, time.Minute, "the router to miss its StatefulSet", func() error {
		out, err := in.tryKubectl("exec", "deployment/acme-router", "-c", "router", "--", "/router", "status", "-o", "json")
		if !strings.Contains(out, "/backend does not exist") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	in.wantNothingLeft()
}

// demoWith is an overlay of the demo, as small as it goes, with a component.
func demoWith(component, more string) string {
	return "resources: [../../k8s/demo]\ncomponents: [../../k8s/components/" + component + "]\n" +
		"replicas:\n  - {name: backend, count: 2}\n  - {name: router, count: 1}\n" + more
}

// TestInstallNoTLS: without nginx, behind a second nginx in the place of a Gateway. The
// backend learns from it who the client is, and from nobody else.
func TestInstallNoTLS(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	install := func(from string) {
		in.install(demoWith("no-tls", `
patches:
  - target: {kind: Deployment, name: router}
    patch: |
      - {op: test, path: /spec/template/spec/containers/0/env/0/name, value: ROUTER_FORWARDED_FROM}
      - {op: replace, path: /spec/template/spec/containers/0/env/0/value, value: "`+from+`"}
`))
	}
	in.apply(demoWith("no-tls", "")) // nginx looks the Service up when it starts
	in.startNginx("gateway", `
		map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
		server {
			listen 8080;
			location / {
				proxy_pass http://router;
				proxy_http_version 1.1;
				proxy_set_header Upgrade $http_upgrade;
				proxy_set_header Connection $connection_upgrade;
				proxy_set_header Host $http_host;
				proxy_set_header X-Forwarded-For 203.0.113.9;
				proxy_set_header X-Forwarded-Proto https;
			}
		}`)
	gateway := in.podIP("gateway")
	for namespace, believed := range map[string]bool{"ns-01": false, "ns-02": true} {
		if believed {
			install(gateway)
		} else {
			install("192.0.2.1")
		}
		in.awaitRouters(1) // the one before still serves while it drains
		want := in.owner("router", namespace)
		if got, status := in.open("ws://"+hostName+"/ws/"+namespace, to(net.JoinHostPort(gateway, "8080")), nil); got != want {
			t.Errorf("%q answers (status %d), want %s", got, status, want)
		}
		client := gateway
		if believed {
			client = "203.0.113.9, " + gateway
		}
		if got := in.clientOf(namespace); got != client {
			t.Errorf("believed %t: the client is %q, want %q", believed, got, client)
		}
	}
	if service := in.kubectl("get", "service", "router", "-o", "jsonpath={.spec.ports[*].appProtocol} {.spec.ports[*].port}"); service != "kubernetes.io/ws 80" {
		t.Errorf("the Service has %q", service)
	}
}

// TestInstallExclusive: components that need nginx cannot be with one that removes it, and
// there is only one of these.
func TestInstallExclusive(t *testing.T) {
	s := newSystem(t)
	for _, pair := range [][2]string{
		{"auth", "no-tls"}, {"proxy-protocol", "no-tls"}, {"auth", "tls-in-router"}, {"proxy-protocol", "tls-in-router"},
		{"no-tls", "tls-in-router"},
	} {
		for _, components := range []string{pair[0] + ", ../../k8s/components/" + pair[1], pair[1] + ", ../../k8s/components/" + pair[0]} {
			dir := s.overlay("exclusive", "resources: [../../k8s/base]\ncomponents: [../../k8s/components/"+components+"]\n")
			if out, err := s.kubectl(t.Context(), "", "kustomize", dir); err == nil {
				t.Errorf("%s makes\n%s", components, out)
			}
		}
	}
}

// TestInstallOpenShift: with a user and a group that nobody chose, as OpenShift gives them.
func TestInstallOpenShift(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.install(demoWith("openshift", `
patches:
  - target: {kind: Deployment|StatefulSet}
    patch: |
      - {op: add, path: /spec/template/spec/securityContext/runAsUser, value: 1000650000}
      - {op: add, path: /spec/template/spec/securityContext/fsGroup, value: 1000650000}
`))
	in.wantOpen("router", "ns-01")
	pods := in.kubectl("get", "pods", "-o", "jsonpath={.items[*].spec.securityContext}")
	if strings.Contains(pods, "65532") {
		t.Errorf("a pod has a user of the manifests: %s", pods)
	}
}

// TestInstallIPv6: the Service asks for all families that the cluster has.
func TestInstallIPv6(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.install(demoWith("ipv6", ""))
	in.wantOpen("router", "ns-01")
	if policy := in.kubectl("get", "service", "router", "-o", "jsonpath={.spec.ipFamilyPolicy}"); policy != "PreferDualStack" {
		t.Errorf("ipFamilyPolicy is %q", policy)
	}
}

// TestInstallMonitoring: the API server takes what the component monitoring has, when it has
// the two kinds of the Prometheus operator. In the test they have no schema.
func TestInstallMonitoring(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	for _, kind := range [][2]string{{"PodMonitor", "podmonitors"}, {"PrometheusRule", "prometheusrules"}} {
		name := kind[1] + ".monitoring.coreos.com"
		if _, err := in.tryKubectl("get", "customresourcedefinition", name); err == nil {
			continue // the operator's own
		}
		in.create(`
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ` + name + `}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: ` + kind[0] + `, plural: ` + kind[1] + `, singular: ` + strings.ToLower(kind[0]) + `}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
`)
		t.Cleanup(func() { in.system.kubectl(context.Background(), "", "delete", "customresourcedefinition", name) })
		in.kubectl("wait", "--for=condition=Established", "--timeout=1m", "customresourcedefinition/"+name)
	}
	in.apply("resources: [../../k8s/base]\ncomponents: [../../k8s/components/monitoring]\nnamePrefix: acme-")
	for object, want := range map[string]string{
		"podmonitor/acme-router":          "app.kubernetes.io/name",
		"prometheusrule/acme-router":      "RouterWatchStale",
		"configmap/acme-router-dashboard": "router_sessions",
	} {
		if got := in.kubectl("get", object, "-o", "yaml"); !strings.Contains(got, want) {
			t.Errorf("%s has no %q:\n%s", object, want, got)
		}
	}
}

// TestInstallProxyProtocol: the load balancer says who the client is.
func TestInstallProxyProtocol(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.install(demoWith("proxy-protocol", ""))
	address := net.JoinHostPort(in.router(), "443")
	want := in.owner("router", "ns-01")
	got, status := in.open("wss://"+hostName+"/ws/ns-01", func(ctx context.Context) (net.Conn, error) {
		conn, err := to(address)(ctx)
		if err == nil {
			_, err = io.WriteString(conn, "PROXY TCP4 203.0.113.7 192.0.2.1 40000 443\r\n")
		}
		return conn, err
	}, nil)
	if got != want {
		t.Errorf("%q answers (status %d), want %s", got, status, want)
	}
	if client := in.clientOf("ns-01"); client != "203.0.113.7" {
		t.Errorf("the client is %q", client)
	}
	conn, err := tls.Dial("tcp", address, in.tls.Clone())
	if err == nil {
		conn.Close()
		t.Error("nginx takes a connection without a header of the PROXY protocol")
	}
}

// TestInstallAuth: nginx asks another service who may connect, refuses pages of others, and
// bounds the rate.
func TestInstallAuth(t *testing.T) {
	in := newSystem(t).newInstallation(t)
	in.startNginx("auth", `
		server {
			listen 8080;
			location / {
				if ($http_cookie != "token=good") { return 401; }
				add_header X-User alice;
				return 204;
			}
		}`)
	in.install(demoWith("auth", ""))
	address := net.JoinHostPort(in.router(), "443")
	for name, tt := range map[string]struct {
		header http.Header
		status int
	}{
		"a program":        {http.Header{"Cookie": {"token=good"}}, http.StatusSwitchingProtocols},
		"our page":         {http.Header{"Cookie": {"token=good"}, "Origin": {"https://app.example.com"}}, http.StatusSwitchingProtocols},
		"a page of others": {http.Header{"Cookie": {"token=good"}, "Origin": {"https://evil.example"}}, http.StatusForbidden},
		"a wrong token":    {http.Header{"Cookie": {"token=bad"}}, http.StatusUnauthorized},
		"no token":         {nil, http.StatusUnauthorized},
	} {
		if _, status := in.open("wss://"+hostName+"/ws/ns-01", to(address), tt.header); status != tt.status {
			t.Errorf("%s: status %d, want %d", name, status, tt.status)
		}
	}
	if got := in.flood(address); got == 0 {
		t.Error("of 200 requests at once none was refused with 429")
	}
}

// flood sends 200 requests on one connection, and returns how many had the answer 429.
func (in *installation) flood(address string) (refused int) {
	in.t.Helper()
	conn, err := tls.Dial("tcp", address, in.tls.Clone())
	if err != nil {
		in.t.Fatal(err)
	}
	defer conn.Close()
	go io.WriteString(conn, strings.Repeat("GET /ws/ns-01 HTTP/1.1\r\nHost: "+hostName+"\r\n\r\n", 200))
	br := bufio.NewReader(conn)
	for range 200 {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			in.t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		if resp.StatusCode == http.StatusTooManyRequests {
			refused++
		}
	}
	return refused
}

// startNginx starts a pod of nginx and a Service, both of this name. It listens on port 8080.
func (in *installation) startNginx(name, conf string) {
	in.t.Helper()
	indented := strings.ReplaceAll("pid /tmp/pid; error_log stderr; events {}\nhttp {\n"+
		"client_body_temp_path /tmp/1; proxy_temp_path /tmp/2; fastcgi_temp_path /tmp/3; uwsgi_temp_path /tmp/4; scgi_temp_path /tmp/5;\n"+
		"access_log off;\n"+strings.ReplaceAll(conf, "\t", " ")+"\n}", "\n", "\n    ")
	image := regexp.MustCompile(`image: (\S*nginx\S*)`).FindStringSubmatch(readFile(in.t, "../k8s/base/router.yaml"))[1]
	in.create(`
apiVersion: v1
kind: ConfigMap
metadata: {name: ` + name + `-nginx}
data:
  nginx.conf: |
    ` + indented + `
---
apiVersion: v1
kind: Pod
metadata: {name: ` + name + `, labels: {pod: ` + name + `}}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  volumes:
    - {name: conf, configMap: {name: ` + name + `-nginx}}
    - {name: tmp, emptyDir: {}}
  containers:
    - name: nginx
      image: ` + image + `
      command: [/usr/sbin/nginx, -c, /conf/nginx.conf, -e, stderr, -g, "daemon off;"]
      volumeMounts: [{name: conf, mountPath: /conf}, {name: tmp, mountPath: /tmp}]
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: ` + name + `}
spec:
  selector: {pod: ` + name + `}
  ports: [{port: 80, targetPort: 8080}]
`)
}

// podIP returns the address of a pod, when it is ready.
func (in *installation) podIP(name string) string {
	in.t.Helper()
	in.kubectl("wait", "--for=condition=Ready", "--timeout=1m", "pod/"+name)
	return in.kubectl("get", "pod", name, "-o", "jsonpath={.status.podIP}")
}
