package main

import (
	"fmt"
	"net"
	"net/http"
	"syscall"
	"testing"
)

// A router with a million overrides from 30 ConfigMaps never has more than
// 96 MiB, neither at its start nor while they change: 70 were seen.
func TestMemoryOfAMillion(t *testing.T) {
	const objects, overrides, events, most = 30, 33_334, 14, 96 << 10 // KiB
	next := make(chan int, events)
	l, host, port := fakeKubeListen(t)
	list := largeList(objects, overrides)
	newFakeKube(t, l, fakeKubeScript{fakeKubeSay(200, string(list))}, fakeKubeScript{func(w http.ResponseWriter, r *http.Request) {
		fakeKubeStream()(w, r)
		for version := range next {
			fmt.Fprintf(w, `{"type":"MODIFIED","object":%s}`, largeMap(version%objects, overrides, version))
			w.(http.Flusher).Flush()
		}
		<-r.Context().Done()
	}})
	p := newRouterProcess(t, append([]string{"-replicas", "16", "-configmap-selector", "a=b", "-kube-namespace", "edge", "-drain-time", "0",
		"-kube", "http://" + net.JoinHostPort(host, port)}, onFreePorts...)...)
	p.build(t)
	p.start(t)
	p.log.wait(t, "table", 1)
	for version := 2; version < 2+events; version++ {
		next <- version
		line := p.log.wait(t, "table", version)
		if line["overrides"] != float64(objects*overrides) || line["changed"] != float64(overrides) {
			t.Fatalf("%v", line)
		}
	}
	close(next)
	peak := p.memory(t)["VmHWM"]
	t.Logf("resident: %d KiB at most", peak)
	if peak > most {
		t.Errorf("%d KiB resident at most, want %d", peak, most)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	if state := p.wait(t); state.ExitCode() != 0 {
		t.Errorf("%v: %s", state, &p.stderr)
	}
}
