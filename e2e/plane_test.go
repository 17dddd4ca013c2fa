//go:build controlplane

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// account is the service account of the routers that the tests run.
const account = "router"

// plane is the control plane, which the tests of faults stop, kill and start,
// and a Kubernetes namespace in it with all that a router needs. What a test
// does to it is undone by the test's cleanup.
type plane struct {
	*system
	script  string // of E2E_CONTROL_PLANE
	state   string // its directory: process ids, keys
	address string // host:port of the API server, as its certificate has it
}

// components are what the script starts.
func components() []string {
	return []string{"etcd", "apiserver", "controller-manager", "scheduler", "containerd", "kubelet", "proxy"}
}

// newPlane sees that the control plane is healthy, makes the Kubernetes
// namespace what a first start finds, and heals everything when the test ends.
func newPlane(t *testing.T) *plane {
	t.Helper()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{system: &system{t: t, root: root}, script: os.Getenv("E2E_CONTROL_PLANE"), state: os.Getenv("CLUSTER_STATE")}
	if p.script == "" {
		t.Fatal("E2E_CONTROL_PLANE is not set, want the program that starts and stops the control plane")
	}
	if p.state == "" {
		p.state = "/var/lib/k8s-test-cluster"
	}
	p.readConfig()
	p.namespace = prefix + "faults"
	t.Cleanup(p.heal)
	p.heal()
	if t.Failed() {
		t.FailNow()
	}
	p.findAddress()
	p.reset()
	return p
}

// component runs the script: pause, resume, kill or start a component, with
// these flags in place of the API server's usual ones.
func (p *plane) component(verb, name string, flags ...string) {
	p.t.Helper()
	if err := p.tryComponent(verb, name, flags...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *plane) tryComponent(verb, name string, flags ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.script, verb, name)
	cmd.Env = append(os.Environ(), "CLUSTER_APISERVER_ARGS="+strings.Join(flags, " "))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s %s: %w\n%s", p.script, verb, name, err, out)
	}
	return nil
}

// kill ends a component at once and waits until it is gone.
func (p *plane) kill(name string) {
	p.t.Helper()
	p.component("kill", name)
	eventually(p.t, 10*time.Second, name+" to be gone", func() error {
		if condition(p.pid(name)) != "" {
			return errors.New("it runs")
		}
		return nil
	})
}

// pid is the process of a component, 0 if it was never started.
func (p *plane) pid(name string) int {
	b, _ := os.ReadFile(filepath.Join(p.state, "run", name+".pid"))
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return pid
}

// condition is what proc(5) calls the state of a process: R, S, T and others;
// "" if it is gone, or a zombie of which no thread is left that keeps its port.
func condition(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(stat), ") ")
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if after == "" || after[0] == 'Z' && len(threads) <= 1 {
		return ""
	}
	return after[:1]
}

// heal resumes what was paused, starts what has ended (the API server without a
// test's flags), and waits until all is well. It runs in cleanups too.
func (p *plane) heal() {
	for _, name := range components() {
		switch pid := p.pid(name); condition(pid) {
		case "":
			p.t.Logf("%s had ended", name)
			if err := p.tryComponent("start", name); err != nil {
				p.t.Error(err)
			}
		case "T":
			syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	began, last := time.Now(), error(nil)
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	defer func() {
		if took := time.Since(began); took > time.Second {
			p.t.Logf("the control plane was healthy after %.1f s: %v", took.Seconds(), last)
		}
	}()
	for err := p.health(ctx); err != nil; err = p.health(ctx) {
		last = err
		if ctx.Err() != nil {
			p.t.Errorf("the control plane is not healthy: %v", err)
			return
		}
		until(ctx, 200*time.Millisecond)
	}
}

// health is nil if the API server is ready and would take a write.
func (p *plane) health(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if _, err := p.client.CoreV1().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
		return fmt.Errorf("/readyz: %.60s", err)
	}
	_, err := p.client.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: account + "-" + prefix + "health"}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	return err
}

// reconnect makes the test's client open new connections, and waits until an API server answers on
// one. Each try opens another: one with an API server that ends goes on for a minute.
func (p *plane) reconnect() {
	p.t.Helper()
	config := rest.CopyConfig(p.config)
	eventually(p.t, 30*time.Second, "the API server to answer", func() (err error) {
		config.Dial = (&net.Dialer{Timeout: 2 * time.Second}).DialContext // with one of its own it shares no connections
		if p.client, err = kubernetes.NewForConfig(config); err != nil {
			return err
		}
		return p.health(p.t.Context())
	})
}

// findAddress asks for the API server's own address.
func (p *plane) findAddress() {
	p.t.Helper()
	slices, err := p.client.DiscoveryV1().EndpointSlices("default").Get(p.t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	p.address = net.JoinHostPort(slices.Endpoints[0].Addresses[0], strconv.Itoa(int(*slices.Ports[0].Port)))
}

// reset makes the Kubernetes namespace, its service account with its rights,
// and the ConfigMap with the overrides that the tests begin with.
func (p *plane) reset() {
	p.t.Helper()
	ctx, core := p.t.Context(), p.client.CoreV1()
	named := metav1.ObjectMeta{Name: p.namespace}
	if _, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: named}, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
	named = metav1.ObjectMeta{Name: account}
	if _, err := core.ServiceAccounts(p.namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: named}, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
	role := &rbacv1.Role{ObjectMeta: named, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{configMap}, Verbs: []string{"list", "watch"}}}}
	if _, err := p.client.RbacV1().Roles(p.namespace).Create(ctx, role, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
	p.bindAgain()
	if err := p.restoreOverrides(ctx, startOverrides()); err != nil {
		p.t.Fatal(err)
	}
}

// startOverrides are those that the tests begin with.
func startOverrides() map[string]string {
	return map[string]string{kept: "backend-3", moved: "backend-0"}
}

// restoreOverrides makes the ConfigMap what it is to be, whether or not it is
// there.
func (p *plane) restoreOverrides(ctx context.Context, data map[string]string) error {
	_, err := p.restore(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: configMap}, Data: data})
	return err
}

// unbind takes its Role from the service account, until the end of the test.
func (p *plane) unbind() {
	p.t.Helper()
	if err := p.client.RbacV1().RoleBindings(p.namespace).Delete(p.t.Context(), account, metav1.DeleteOptions{}); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(p.bindAgain)
}

// bindAgain gives the service account its Role if it does not have it. It runs in
// cleanups too.
func (p *plane) bindAgain() {
	p.t.Helper()
	ctx, stop := cleanupContext()
	defer stop()
	binding := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: account},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: account},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: account, Namespace: p.namespace}}}
	if _, err := p.client.RbacV1().RoleBindings(p.namespace).Create(ctx, binding, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
}

// made reports whether there is the object that was to be created.
func made(err error) bool { return err == nil || apierrors.IsAlreadyExists(err) }
