//go:build controlplane

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// handoffFault is what befalls the control plane, or a router, while owners change.
type handoffFault struct {
	name    string
	refused bool                // clients may be refused meanwhile: it lasts longer than -hold, or a router is gone
	begin   func() (end func()) // end undoes it
	lasts   time.Duration
}

// TestFaultHandoff changes the owners of all namespaces, and in the midst of that the control
// plane or a router fails. Only the change waits; it ends by itself, and no namespace has
// two owners.
func TestFaultHandoff(t *testing.T) {
	s, p := newDeployed(t)
	t.Cleanup(func() { // a kubelet that has lost the API server twice connects again late
		p.kill("kubelet")
		p.component("start", "kubelet")
	})
	s.keepOverrides()
	c := s.newTenantsOf(s.writtenByAll, "fault", 150, 600)
	for _, fault := range []handoffFault{
		{"the API server killed", true, func() func() {
			p.kill("apiserver")
			return func() { p.component("start", "apiserver") }
		}, 6 * time.Second},
		{"etcd restored", true, func() func() { return s.restoreEtcd(p) }, time.Second},
		{"a router stopped", true, func() func() { return s.signalRouter(syscall.SIGSTOP, syscall.SIGCONT) }, 15 * time.Second},
		{"a router killed, and the kubelet paused", true, func() func() {
			p.component("pause", "kubelet")
			s.signalRouter(syscall.SIGKILL, 0)
			return func() { p.component("resume", "kubelet") }
		}, 5 * time.Second},
	} {
		s.undergo(p, c, fault)
	}
}

// undergo has one fault while owners change.
func (s *system) undergo(p *plane, c *tenants, fault handoffFault) {
	s.t.Helper()
	steps := func() float64 { return s.mustSum(s.routers(s.t.Context()), "router_handoff_steps_total") }
	owners, marks, before := c.toOthers(), c.marks(), steps()
	change, err := s.patch(s.t.Context(), owners)
	if err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, 30*time.Second, "the change to be under way", func() error {
		if now := steps() - before; now < 6 {
			return fmt.Errorf("%v steps", now)
		}
		return nil
	})
	end := fault.begin()
	until(s.t.Context(), fault.lasts)
	end()
	ended := time.Now()
	p.reconnect()
	s.client = p.client
	version, err := s.overrides(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	s.awaitWhole()
	s.awaitRest(version.ResourceVersion, 90*time.Second)
	whole := time.Since(ended)
	c.awaitOwners(owners, 60*time.Second)
	away, refused := c.since(marks)
	s.t.Logf("handoff, %s for %s: the change ended %.1f s after it was undone, %.1f s after it was made; clients were away for %s; %d attempts failed",
		fault.name, fault.lasts, whole.Seconds(), time.Since(change.at).Seconds(), away, len(refused))
	if err := some(refused); err != nil && !fault.refused {
		s.t.Errorf("%s: clients were refused: %v", fault.name, err)
	}
	c.wantOneOwner("handoff, " + fault.name)
}

// restoreEtcd takes a copy of etcd's data, and brings it back when the change has gone on.
func (s *system) restoreEtcd(p *plane) (end func()) {
	s.t.Helper()
	data, backup := filepath.Join(p.state, "etcd"), filepath.Join(s.t.TempDir(), "etcd")
	p.component("pause", "etcd") // what it wrote is consistent at each moment
	p.copyDir(data, backup)
	p.component("resume", "etcd")
	until(s.t.Context(), time.Second)
	p.kill("apiserver")
	p.kill("etcd")
	p.copyDir(backup, data)
	return func() {
		p.component("start", "etcd")
		p.component("start", "apiserver")
		p.reconnect()
		s.client = p.client
		s.awaitKubelet(time.Now())
		s.outgrow()
	}
}

// awaitKubelet waits until each node's kubelet has renewed its lease after begun. It may connect again
// late, and then its pods become unready in the midst of the next fault.
func (s *system) awaitKubelet(begun time.Time) {
	s.t.Helper()
	eventually(s.t, 90*time.Second, "the kubelets to renew their leases", func() error {
		leases, err := s.client.CoordinationV1().Leases("kube-node-lease").List(s.t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, lease := range leases.Items {
			if renewed := lease.Spec.RenewTime; renewed == nil || renewed.Time.Before(begun) {
				return fmt.Errorf("node %s has renewed at %v", lease.Name, renewed)
			}
		}
		return nil
	})
}

// outgrow writes until versions are above those of before a restore: see rig.outgrow.
func (s *system) outgrow() {
	s.t.Helper()
	const name = prefix + "outgrow"
	s.makeMap(name, nil)
	for i := range 300 {
		if _, err := s.patchMap(s.t.Context(), name, map[string]any{"n": strconv.Itoa(i)}); err != nil {
			s.t.Fatal(err)
		}
	}
}

// signalRouter sends a signal to one of the routers, whose node is this machine. end sends
// another one.
func (s *system) signalRouter(sig, undo syscall.Signal) (end func()) {
	s.t.Helper()
	pod := s.routers(s.t.Context())[0].pod
	pid, err := processOf(pod, "/router")
	if err == nil {
		err = syscall.Kill(pid, sig)
	}
	if err != nil {
		s.t.Fatalf("the process of %s: %v", pod, err)
	}
	once := func() {
		if undo != 0 {
			syscall.Kill(pid, undo)
		}
	}
	s.t.Cleanup(once)
	return once
}

// processOf returns the process of a pod on this machine that runs the program.
func processOf(pod, program string) (pid int, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		command, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		environment, _ := os.ReadFile(filepath.Join(dir, "environ"))
		if bytes.HasPrefix(command, []byte(program+"\x00")) && bytes.Contains(environment, []byte("\x00ROUTER_POD_NAME="+pod+"\x00")) {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, errors.New("there is none")
}

// writtenByAll is what all backends have written down until now, read from their node.
func (s *system) writtenByAll() *diary {
	s.t.Helper()
	dirs, err := filepath.Glob(fmt.Sprintf("/var/log/pods/%s_backend-*_*", s.namespace))
	if err != nil || len(dirs) == 0 {
		s.t.Fatalf("no log of a backend: %v", err)
	}
	all := &diary{s: s}
	for _, dir := range dirs {
		words := strings.Split(filepath.Base(dir), "_")
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: words[0], Name: words[1]}}
		pod.UID = types.UID(words[2])
		d := s.written(pod)
		all.stays, all.wrong = append(all.stays, d.stays...), append(all.wrong, d.wrong...)
	}
	return all
}
