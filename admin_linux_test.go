package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// planBodies are the ConfigMaps that cost most to plan, by what is in them: the
// largest that are planned, and some that are not.
func planBodies() map[string][]byte {
	data := func(entries int, entry func(i int) string) []byte {
		b := []byte(`{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{`)
		for i := range entries {
			b = append(append(b, entry(i)...), ',')
		}
		return append(b[:len(b)-1], "}}"...)
	}
	one := func(text string, size int) func(int) string {
		return func(int) string { return `"a":"` + strings.Repeat(text, size/len(text)) + `"` }
	}
	const most, entries = maxPlan - 100, (maxData - 100) / entryHead
	return map[string][]byte{
		"commas":          data(1, one(",", maxData-100)),
		"escapes":         data(1, one(`\u0001`, most)),
		"tiny":            data(entries*6/11, func(i int) string { return fmt.Sprintf(`"%05x":""`, i) }),
		"distinct":        data(entries*6/16, func(i int) string { return fmt.Sprintf(`"%05x":"%05x"`, i, i) }),
		"distinct, long":  data(entries*6/48, func(i int) string { return fmt.Sprintf(`"%016x":"backend-%018d"`, i, i) }),
		"same name":       data(entries*6/14, func(i int) string { return fmt.Sprintf(`"%x":"%05x"`, i&0xfff, i) }),
		"too many":        data(most/12, func(i int) string { return fmt.Sprintf(`"%05x":""`, i) }),
		"too large":       data(1, one(",", 16<<20)),
		"no end":          bytes.Repeat([]byte(`{"a":`), most/5),
		"an array of all": bytes.Repeat([]byte(`[1,`), most/3),
	}
}

// Whatever is sent to the admin port at once, a probe is answered, and the memory
// that it takes is bounded.
func TestProcessAdminUnderLoad(t *testing.T) {
	const grows = 64 << 20
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 4), "-kube", kubeAnswers(t, 200, oneConfigMap)})...)
	p.build(t)
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	bodies := planBodies()
	before := p.memory(t)["VmHWM"] << 10

	var work, probes sync.WaitGroup
	done := make(chan struct{})
	probes.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				p.probeHealth(t)
			}
		}
	})
	for range 300 { // idle
		conn, err := net.Dial("tcp", p.side)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	planned := make(chan string, 3*len(bodies))
	for name, body := range bodies {
		for range 3 {
			work.Go(func() {
				if p.planStatus(body) == http.StatusOK {
					planned <- name
				}
			})
		}
		work.Go(func() {
			body := "--B\r\nContent-Disposition: form-data; name=f; filename=g\r\n\r\n" + strings.Repeat("x", 16<<20)
			req, err := http.NewRequest("GET", p.admin+"/owner?namespace=a", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Content-Type", "multipart/form-data; boundary=B")
			if resp, err := http.DefaultClient.Do(req); err == nil {
				resp.Body.Close()
			}
		})
		work.Go(func() {
			if resp, err := http.Get(p.admin + "/metrics"); err == nil { // else its connection had to make room
				resp.Body.Close()
			}
		})
	}
	work.Wait()
	close(done)
	probes.Wait()
	if grown := p.memory(t)["VmHWM"]<<10 - before; grown > grows {
		t.Errorf("the memory has grown by %d MiB, want %d at most", grown>>20, grows>>20)
	} else {
		t.Logf("the memory has grown by %d MiB, and %d plans were made", grown>>20, len(planned))
	}
	close(planned)
	kinds := map[string]bool{}
	for name := range planned {
		kinds[name] = true
	}
	if want := []string{"commas", "distinct", "distinct, long", "escapes", "same name", "tiny"}; !slices.Equal(slices.Sorted(maps.Keys(kinds)), want) {
		t.Errorf("there were plans of %v, want %v", kinds, want)
	}
}

// planStatus asks for a plan until it is that plan's turn, and returns what comes of
// it, or 0 after a while.
func (p *routerProcess) planStatus(body []byte) int {
	for end := time.Now().Add(4 * patience); time.Now().Before(end); <-time.After(100 * time.Millisecond) {
		resp, err := http.Post(p.admin+"/plan", "application/json", bytes.NewReader(body))
		if err != nil { // the connection had to make room
			continue
		}
		io.Copy(io.Discard, resp.Body)
		if resp.Body.Close(); resp.StatusCode != http.StatusServiceUnavailable {
			return resp.StatusCode
		}
	}
	return 0
}

// probeHealth asks as a kubelet does: with a connection for each probe, and again
// when one fails, which it may where the machine was busy while others connected.
func (p *routerProcess) probeHealth(t *testing.T) {
	t.Helper()
	var said []byte
	var err error
	for range 3 {
		<-time.After(10 * time.Millisecond)
		var conn net.Conn
		if conn, err = net.Dial("tcp", p.side); err != nil {
			continue
		}
		conn.SetDeadline(time.Now().Add(patience))
		io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
		said, err = io.ReadAll(conn)
		conn.Close()
		if err == nil && strings.HasPrefix(string(said), "HTTP/1.1 200 ") {
			return
		}
	}
	t.Errorf("/healthz is %q, %v at the third time, want 200", said, err)
}
