package nginx_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
)

// TestMemory measures what a WebSocket costs nginx, TLS with it: its share of
// physical memory (PSS, proc_pid_smaps(5)) over all its processes. The bounds are
// a tenth above what nginx 1.22 with OpenSSL 3.0 takes.
func TestMemory(t *testing.T) {
	const sessions, warm = 500, 50
	tests := map[string]struct {
		cookie int // bytes
		echoed int // bytes, once on each WebSocket
		most   int // KiB
	}{
		"at rest":           {0, 0, 50},
		"with a large head": {1500, 0, 69},
		"after 16 KiB":      {0, 16 << 10, 50},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			if s == nil {
				return
			}
			open := func(n int) {
				for range n {
					ws := s.dial(t, "/ws/ns-01", http.Header{"Cookie": {strings.Repeat("x", test.cookie)}})
					echo(t, ws, bytes.Repeat([]byte("x"), test.echoed))
				}
			}
			open(warm)
			before := s.memory(t)
			open(sessions)
			each := (s.memory(t) - before) / sessions
			t.Logf("%s: %.1f KiB for each of %d WebSockets", name, float64(each)/1024, sessions)
			if each > test.most<<10 {
				t.Errorf("want at most %d KiB", test.most)
			}
		})
	}
}

// memory is the PSS of nginx's processes, in bytes.
func (s *sidecar) memory(t *testing.T) (bytes int) {
	t.Helper()
	for _, pid := range append(s.workers(t), s.master) {
		bytes += pss(t, pid)
	}
	return bytes
}

// workers returns the process ids of the master's children.
func (s *sidecar) workers(t *testing.T) (pids []int) {
	t.Helper()
	children := readFile(t, fmt.Sprintf("/proc/%d/task/%d/children", s.master, s.master))
	for _, field := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// pss returns the proportional set size of a process, in bytes.
func pss(t *testing.T, pid int) int {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int
		if n, _ := fmt.Sscanf(lines.Text(), "Pss: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	t.Fatalf("smaps_rollup of %d has no Pss", pid)
	return 0
}
