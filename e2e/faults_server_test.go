//go:build controlplane

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestFaultAPIServerKilled kills the API server and starts it again.
// kubectl proxy answers 500 in plain text meanwhile.
func TestFaultAPIServerKilled(t *testing.T) {
	r := newRig(t)
	subjects := r.both()
	trial := r.try(subjects...)
	r.kill("apiserver")
	for _, s := range subjects {
		s.logs(t, 5*time.Second, failedWith("connection_lost"))
	}
	subjects[0].logs(t, 5*time.Second, failedWith("dial"))
	subjects[1].logs(t, 5*time.Second, failedWith("internal_server_error"))
	trial.stands()
	r.component("start", "apiserver")
	trial.recovered(15 * time.Second)
}

// TestFaultForbiddenAtStart has an API server that answers 403 to accounts
// that may: each does so for some milliseconds when it starts, until it has read
// the Roles, and this one, which knows none, until it is killed.
func TestFaultForbiddenAtStart(t *testing.T) {
	r := newRig(t)
	pod := r.pod()
	trial := r.try(pod)
	r.kill("apiserver")
	r.component("start", "apiserver", "--runtime-config=rbac.authorization.k8s.io/v1=false")
	withoutRoles := r.pid("apiserver")
	t.Cleanup(func() {
		if r.pid("apiserver") == withoutRoles && condition(withoutRoles) != "" {
			r.kill("apiserver")
		}
	})
	pod.logs(t, 20*time.Second, failedWith("forbidden"))
	trial.stands()
	r.kill("apiserver")
	r.component("start", "apiserver")
	trial.recovered(22500 * time.Millisecond)
}

// TestFaultAPIServerTerminated ends the API server as a rollout does, and starts
// another: the old one keeps the streams that it has for a minute, and events
// still come through them. Then it is killed.
func TestFaultAPIServerTerminated(t *testing.T) {
	r := newRig(t)
	pod := r.pod()
	trial := r.try(pod)
	old := r.pid("apiserver")
	syscall.Kill(old, syscall.SIGTERM)
	t.Cleanup(func() { syscall.Kill(old, syscall.SIGKILL) })
	r.component("start", "apiserver")
	r.reconnect()
	took := trial.followed(trial.write(), 5*time.Second)
	if ports := r.ports(pod, r.address); condition(old) == "" || len(ports) != 1 {
		t.Errorf("the old API server is %q, connections from %q", condition(old), ports)
	}
	if errs := pod.count(`"msg":"watch failed`); errs != 0 {
		t.Errorf("%d failures, want the stream to go on", errs)
	}
	t.Logf("a write to the next API server came through the stream of the one that ends in %.2f s", took[0].Seconds())
	syscall.Kill(old, syscall.SIGKILL)
	pod.logs(t, 5*time.Second, failedWith("connection_lost"))
	trial.recovered(5 * time.Second)
}

// TestFaultAPIServerPaused stops the clock of the API server, whose
// kernel goes on to accept connections. In a pod HTTP/2's pings notice, and the
// next TLS handshakes time out; through kubectl proxy it is the proxy's pings.
func TestFaultAPIServerPaused(t *testing.T) {
	r := newRig(t)
	subjects := r.both()
	trial := r.try(subjects...)
	r.component("pause", "apiserver")
	noticed := subjects[0].logs(t, 21*time.Second, failedWith("connection_lost"))
	handshake := subjects[0].logs(t, 8*time.Second, failedWith("timeout"))
	proxied := subjects[1].logs(t, 30*time.Second, failedWith("connection_lost"))
	t.Logf("noticed in %.1f s; the next failure %.1f s later; through kubectl proxy noticed in %.1f s",
		noticed.Seconds(), handshake.Seconds(), (noticed + handshake + proxied).Seconds())
	trial.stands()
	r.component("resume", "apiserver")
	trial.recovered(22500 * time.Millisecond)
}

// TestFaultGOAWAYAndShutdown has an API server that now and then asks a client, by
// GOAWAY, to connect anew, and that when it ends refuses what is new for three
// seconds with 429 or 503 and Retry-After, and ends its streams within five.
func TestFaultGOAWAYAndShutdown(t *testing.T) {
	r := newRig(t)
	r.kill("apiserver")
	r.component("start", "apiserver", "--goaway-chance=0.02", "--shutdown-delay-duration=3s",
		"--shutdown-send-retry-after", "--shutdown-watch-termination-grace-period=5s")
	old := r.pid("apiserver")
	t.Cleanup(func() { // not the next one, which is as it should be
		if r.pid("apiserver") == old && condition(old) != "" {
			r.kill("apiserver")
		}
	})
	r.heal()
	asked, started := r.awaitGOAWAY()
	trial := r.try(asked)
	trial.recovered(5 * time.Second)
	t.Logf("%d routers were started until one got a GOAWAY", started)

	pod, g := r.behind(r.newFiles())
	trial = r.try(append(r.both(), pod)...)
	asker := r.newAsker(r.token(nil))
	asker.run(1, 20*time.Millisecond)
	finish := r.linger()
	syscall.Kill(old, syscall.SIGTERM)
	eventually(t, 10*time.Second, "the API server to refuse what is new", func() error {
		if asker.times(string(metav1.StatusReasonTooManyRequests)) == 0 {
			return fmt.Errorf("it answered %v", asker.answers())
		}
		return nil
	})
	g.cut(false)
	pod.logs(t, 4*time.Second, failedWith("too_many_requests"))
	t.Logf("the API server that ends answered %s", asker.answers())
	finish()
	asker.stop()
	trial.stands()
	eventually(t, 30*time.Second, "the API server to end", func() error {
		if condition(old) != "" {
			return errors.New("it runs")
		}
		return nil
	})
	r.component("start", "apiserver")
	trial.recovered(15 * time.Second)
}

// linger sends half a request, which an API server that ends waits for, refusing
// all others, until the returned function is called.
func (p *plane) linger() (finish func()) {
	ctx, cancel := context.WithCancel(context.Background())
	body, rest := io.Pipe()
	var asking sync.WaitGroup
	asking.Go(func() {
		p.client.CoreV1().RESTClient().Post().Namespace(p.namespace).Resource("configmaps").Body(body).Do(ctx)
	})
	io.WriteString(rest, "{") // it is on its way when this is read
	finish = func() {
		cancel()
		rest.Close()
		asking.Wait()
	}
	p.t.Cleanup(finish)
	return finish
}

// awaitGOAWAY starts routers, one after the other, until one has got a GOAWAY,
// which it returns, and says how many it started.
func (r *rig) awaitGOAWAY() (asked *subject, started int) {
	r.t.Helper()
	files := r.newFiles()
	for started = 1; started <= 500; started++ {
		s := r.inPod(files, r.address, "GODEBUG=http2debug=1")
		s.awaitReady(r.t)
		s.awaitState(r.t, "watching", 5*time.Second)
		if s.count("received GOAWAY") > 0 {
			return s, started
		}
		s.cmd.Process.Kill()
	}
	r.t.Fatalf("none of %d routers got a GOAWAY", started)
	return nil, 0
}
