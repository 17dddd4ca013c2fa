//go:build controlplane

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// TestFaultEtcd stops the clock of etcd, and kills it. Streams are
// silent, and a LIST gets no answer: routers that lose their stream meanwhile
// wait for it 15 s at a time.
func TestFaultEtcd(t *testing.T) {
	r := newRig(t)
	for _, fault := range []struct {
		begin, end string
		lasts      time.Duration
	}{
		{"pause", "resume", 17 * time.Second},
		{"kill", "start", 10 * time.Second},
	} {
		t.Run(fault.begin, func(t *testing.T) {
			r := r.within(t)
			g := newGate(t, r.address)
			cut, whole := r.inPod(r.newFiles(), g.addr), r.pod()
			cut.awaitReady(t)
			trial := r.try(cut, whole)
			r.component(fault.begin, "etcd")
			g.cut(false)
			until(t.Context(), fault.lasts)
			trial.stands()
			if fault.begin == "pause" {
				cut.logs(t, time.Second, failedWith("timeout"))
			}
			if fails := whole.count(`"msg":"watch failed`); fails != 0 {
				t.Errorf("the router with a stream logged %d failures", fails)
			}
			r.component(fault.end, "etcd")
			trial.recovered(22500 * time.Millisecond)
		})
	}
}

// TestFaultEtcdRestored brings back etcd's data of a moment ago: versions
// start again below those that the routers have seen.
func TestFaultEtcdRestored(t *testing.T) {
	r := newRig(t)
	subjects := r.both()
	data, backup := filepath.Join(r.state, "etcd"), filepath.Join(t.TempDir(), "etcd")
	r.component("pause", "etcd") // what it wrote is consistent at each moment
	r.copyDir(data, backup)
	r.component("resume", "etcd")
	trial := r.try(subjects...)
	for range 30 {
		trial.write()
	}
	trial.followed(trial.write(), 5*time.Second)
	before := version(trial.version)
	r.kill("apiserver")
	r.kill("etcd")
	trial.stands()
	r.copyDir(backup, data)
	r.component("start", "etcd")
	r.component("start", "apiserver")
	defer r.outgrow()
	trial.recovered(15 * time.Second)
	if after := version(trial.version); after >= before {
		t.Errorf("the version is %d, want one below the %d of before", after, before)
	}
}

// version is a resourceVersion as etcd counts it.
func version(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// outgrow writes until versions are above those of before a restore: clients
// that resume their watches, as Kubernetes' own do, hear nothing until then.
func (r *rig) outgrow() {
	for i := range 200 {
		if _, err := r.patch(r.t.Context(), map[string]any{moved: fmt.Sprintf("backend-%d", i%2)}); err != nil {
			r.t.Error(err)
			return
		}
	}
}

// copyDir replaces a directory by a copy of another.
func (p *plane) copyDir(from, to string) {
	p.t.Helper()
	if out, err := exec.Command("sh", "-c", `rm -rf "$1" && cp -a "$0" "$1"`, from, to).CombinedOutput(); err != nil {
		p.t.Fatalf("copy of %s: %v\n%s", from, err, out)
	}
}

// etcd asks etcd for something, by its gateway for JSON.
func (p *plane) etcd(method string, arguments any) {
	p.t.Helper()
	body, err := json.Marshal(arguments)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := http.Post("http://127.0.0.1:2379/v3/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		p.t.Fatalf("etcd: %s: %s: %s", method, resp.Status, answer)
	}
}
