//go:build controlplane

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestFaultOverridesDeleted deletes the overrides and makes them again, in two
// steps and in one. A router that starts meanwhile is not ready and says what
// is missing.
func TestFaultOverridesDeleted(t *testing.T) {
	r := newRig(t)
	subjects := r.both()
	trial := r.try(subjects...)
	r.mustKubectl("", "--namespace="+r.namespace, "delete", "configmap", configMap)
	for _, s := range subjects {
		s.logs(t, 5*time.Second, "ConfigMap deleted or no longer selected; keeping its last overrides")
	}
	trial.stands()
	late := r.inPod(r.newFiles(), r.address)
	late.logs(t, 5*time.Second, "ConfigMap not found")
	if _, err := late.get(t.Context(), "/readyz"); err == nil || !strings.Contains(err.Error(), "create configmap "+configMap) {
		t.Errorf("/readyz of a router that started without the object: %v, want how to make it", err)
	}
	data := map[string]string{kept: "backend-3", moved: trial.owner}
	if err := r.restoreOverrides(t.Context(), data); err != nil {
		t.Fatal(err)
	}
	trial.recovered(2 * time.Second)
	late.awaitReady(t)

	trial = r.try(subjects...)
	manifest := r.mustKubectl("", "--namespace="+r.namespace, "get", "configmap", configMap, "--output=yaml")
	r.mustKubectl(manifest, "--namespace="+r.namespace, "replace", "--force", "--filename=-")
	trial.recovered(2 * time.Second)
}

// put replaces the overrides by these, as they are: kubectl and client-go would
// write "<" as six bytes, and Kubernetes note the owner of each key in
// managedFields. It returns the version.
func (p *plane) put(data map[string]string) (version string) {
	p.t.Helper()
	var body bytes.Buffer
	e := json.NewEncoder(&body)
	e.SetEscapeHTML(false)
	if err := e.Encode(map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "data": data,
		"metadata": map[string]any{"name": configMap, "managedFields": []any{map[string]any{}}}}); err != nil {
		p.t.Fatal(err)
	}
	answer, err := p.client.CoreV1().RESTClient().Put().Namespace(p.namespace).Resource("configmaps").Name(configMap).
		SetHeader("Content-Type", "application/json").Body(body.Bytes()).DoRaw(p.t.Context())
	if err != nil {
		p.t.Fatalf("PUT of %d bytes: %v", body.Len(), err)
	}
	var o metav1.PartialObjectMetadata
	if err := json.Unmarshal(answer, &o); err != nil {
		p.t.Fatal(err)
	}
	return o.ResourceVersion
}

// TestFaultLargeOverrides has an entry of 1 MiB of "<", which comes as an event of
// 6 MB and is no backend, then 60,000 overrides.
func TestFaultLargeOverrides(t *testing.T) {
	r := newRig(t)
	many := map[string]string{}
	for i := range 60_000 {
		many[fmt.Sprintf("n%05d", i)] = fmt.Sprintf("backend-%d", i%4)
	}
	for _, entries := range []map[string]string{
		{prefix + "long": strings.Repeat("<", 1<<20-100)},
		many,
	} {
		t.Run(fmt.Sprintf("%d entries", len(entries)), func(t *testing.T) {
			r := r.within(t)
			subjects := r.both()
			trial := r.try(subjects...)
			trial.memory = 96 << 20 // what parsing it takes is given back in minutes
			entries[kept], entries[moved] = "backend-3", trial.next()
			sent := time.Now()
			version := r.put(entries)
			took := trial.followed(change{version: version, at: time.Now()}, 5*time.Second)
			t.Logf("the PUT took %.2f s, new sessions followed after %s", time.Since(sent).Seconds()-slices.Max(took).Seconds(), took)
			r.put(map[string]string{kept: "backend-3", moved: trial.owner})
			trial.recovered(5 * time.Second)
		})
	}
}

// TestFaultEventTooLarge has an event above the router's limit, which is 64 KiB
// in this router. Nothing of it is applied, and the router does not ask for it
// again and again.
func TestFaultEventTooLarge(t *testing.T) {
	r := newRig(t)
	r.program = r.buildWith("kube.go", "maxObject = 16 << 20", "maxObject = 64 << 10")
	pod := r.pod()
	trial := r.try(pod)
	before := trial.owner
	large := map[string]string{moved: trial.next()}
	for i := range 5000 {
		large[fmt.Sprintf("n%05d", i)] = "backend-1"
	}
	r.put(large)
	pod.logs(t, 5*time.Second, failedWith("too_big"))
	until(t.Context(), 5*time.Second)
	trial.owner = before
	trial.stands()
	m, err := pod.metrics(t.Context())
	if fails := m.sum("router_watch_consecutive_failures"); err != nil || fails < 2 || fails > 6 {
		t.Errorf("%v failures in five seconds, want 2 to 6 (%v)", fails, err)
	}
	r.put(map[string]string{kept: "backend-3", moved: before})
	trial.recovered(22500 * time.Millisecond)
}

// buildWith builds the router with a text of a source file replaced.
func (r *rig) buildWith(file, text, by string) (program string) {
	r.t.Helper()
	source, err := os.ReadFile(filepath.Join(r.root, file))
	if err != nil {
		r.t.Fatal(err)
	}
	if n := strings.Count(string(source), text); n != 1 {
		r.t.Fatalf("%s has %q %d times, want once", file, text, n)
	}
	dir := r.t.TempDir()
	changed, overlay := filepath.Join(dir, file), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(r.root, file): changed}})
	err = errors.Join(err, os.WriteFile(overlay, list, 0o600),
		os.WriteFile(changed, []byte(strings.Replace(string(source), text, by, 1)), 0o600))
	if err != nil {
		r.t.Fatal(err)
	}
	program = filepath.Join(dir, "router")
	cmd := exec.CommandContext(r.t.Context(), "go", "build", "-overlay", overlay, "-o", program, ".")
	cmd.Dir = r.root
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

// TestFaultMalformedOverrides has entries that name no backend: their namespaces stay
// where they were, or are refused by a router that never knew where that is.
// All others are as written.
func TestFaultMalformedOverrides(t *testing.T) {
	r := newRig(t)
	subjects := r.both()
	trial := r.try(subjects...)
	owners := trial.visitors[0].owners
	if _, err := r.patch(t.Context(), map[string]any{kept: "not a backend", hashed: "backend-99"}); err != nil {
		t.Fatal(err)
	}
	trial.followed(trial.write(), 2*time.Second)
	late := r.pod()
	for namespace, owner := range owners {
		for _, s := range subjects {
			if err := s.owns(t.Context(), namespace, owner, "previous"); err != nil {
				t.Error(err)
			}
		}
		var no refusal
		if _, err := late.dialer.open(t.Context(), namespace); !errors.As(err, &no) || no.status != 503 {
			t.Errorf("%s at a router that never knew its backend: %v, want 503", namespace, err)
		}
	}
	if err := late.dialer.lands(t.Context(), moved, trial.owner); err != nil {
		t.Error(err)
	}
	if _, err := r.patch(t.Context(), map[string]any{kept: "backend-3", hashed: nil}); err != nil {
		t.Fatal(err)
	}
	trial.recovered(2 * time.Second)
}

// TestFaultRouterPaused stops the clock of the router while more is written
// than the API server keeps for a watcher that does not read: it ends the stream
// cleanly, with events missing.
func TestFaultRouterPaused(t *testing.T) {
	r := newRig(t)
	pod := r.pod()
	trial := r.try(pod)
	if err := trial.visitors[0].finish(); err != nil {
		t.Error(err)
	}
	defer pod.cmd.Process.Signal(syscall.SIGCONT)
	for writes := 75; ; writes *= 2 { // how much the API server and the kernel keep differs
		swaps := r.mustSum([]*router{pod.router}, "router_table_updates_total")
		pod.cmd.Process.Signal(syscall.SIGSTOP)
		for range writes {
			trial.version = r.annotate(trial.next())
		}
		pod.cmd.Process.Signal(syscall.SIGCONT)
		took := trial.followed(change{version: trial.version, at: time.Now()}, 22500*time.Millisecond)
		swaps = r.mustSum([]*router{pod.router}, "router_table_updates_total") - swaps
		t.Logf("after %d events of 1.4 MB the router was current %.2f s after it could read again, with %v tables",
			writes, took[0].Seconds(), swaps)
		if swaps < float64(writes) {
			break
		}
		if writes > 200 {
			t.Fatalf("%v tables for %d writes, want fewer: the API server waited for the router", swaps, writes)
		}
	}
	trial.recovered(5 * time.Second)
}

// annotate moves the override of moved to the backend, with an event of 1.4 MB:
// an annotation of "<" is six times as long in JSON.
func (p *plane) annotate(owner string) (version string) {
	p.t.Helper()
	body := fmt.Sprintf(`{"data":{%q:%q},"metadata":{"annotations":{"ballast":%q}}}`, moved, owner, strings.Repeat("<", 240_000))
	after, err := p.client.CoreV1().ConfigMaps(p.namespace).Patch(p.t.Context(), configMap, types.MergePatchType, []byte(body), metav1.PatchOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	return after.ResourceVersion
}

// TestFaultKubectlProxyRestarted kills kubectl proxy and starts it again.
func TestFaultKubectlProxyRestarted(t *testing.T) {
	r := newRig(t)
	address := freeAddress(t)
	proxy := r.kubectlProxy(address)
	laptop := r.laptop(address)
	trial := r.try(laptop)
	proxy.cmd.Process.Kill()
	laptop.logs(t, 5*time.Second, failedWith("connection_lost"))
	laptop.logs(t, 5*time.Second, failedWith("dial"))
	trial.stands()
	r.kubectlProxy(address)
	trial.recovered(10 * time.Second)
}
