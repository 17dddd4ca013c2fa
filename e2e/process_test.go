package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a program that the test started.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when wait has returned

	mu    sync.Mutex
	lines []string // what it printed. Guarded by mu.
	err   error    // how it ended. Guarded by mu.
}

// build compiles a package of the repository's root module and returns the program's path.
func build(t *testing.T, pkg string) string {
	t.Helper()
	return buildIn(t, "..", pkg)
}

// buildIn compiles a package of the module in the directory.
func buildIn(t *testing.T, dir, pkg string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", program, pkg)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return program
}

// start runs a program until the test ends, if it does not end before.
func start(t *testing.T, program string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(program), cmd: exec.Command(program, args...), done: make(chan struct{})}
	r, w := io.Pipe()
	p.cmd.Stdout, p.cmd.Stderr = w, w
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() { p.read(r) })
	go p.wait(w, &reading)
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			said := slices.DeleteFunc(p.output(), func(line string) bool {
				return strings.Contains(line, `"msg":"session `) || strings.Contains(line, `msg="session `)
			})
			t.Logf("%s %s printed, but for sessions:\n%s", program, strings.Join(args, " "), strings.Join(said, "\n"))
		}
	})
	return p
}

func (p *process) read(r io.Reader) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20) // an application's result is one line, the longer the more it did
	for lines.Scan() {
		p.mu.Lock()
		p.lines = append(p.lines, lines.Text())
		p.mu.Unlock()
	}
}

// wait closes done when the program has ended and its output was read.
func (p *process) wait(w io.Closer, reading *sync.WaitGroup) {
	defer close(p.done)
	err := p.cmd.Wait()
	w.Close()
	reading.Wait()
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
}

func (p *process) output() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.lines...)
}

// ended is nil while the program runs.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended: %v\n%s", p.name, p.err, strings.Join(p.output(), "\n"))
	default:
		return nil
	}
}

// says waits for a line with the given text and returns it.
func (p *process) says(t *testing.T, text string) string {
	t.Helper()
	var found string
	eventually(t, 20*time.Second, fmt.Sprintf("%s to print %q", p.name, text), func() error {
		for _, line := range p.output() {
			if strings.Contains(line, text) {
				found = line
				return nil
			}
		}
		if err := p.ended(); err != nil {
			t.Fatal(err)
		}
		return fmt.Errorf("it printed %q", p.output())
	})
	return found
}

// terminate sends SIGTERM and returns how the program ended.
func (p *process) terminate(t *testing.T) error {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s did not end on SIGTERM", p.name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// field returns a field of a line of a JSON log.
func field(t *testing.T, line, name string) string {
	t.Helper()
	fields := map[string]any{}
	if err := json.Unmarshal([]byte(line), &fields); err != nil {
		t.Fatalf("log line %q: %v", line, err)
	}
	value, ok := fields[name].(string)
	if !ok {
		t.Fatalf("log line %q has no text %q", line, name)
	}
	return value
}
