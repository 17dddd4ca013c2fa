package main

import (
	"debug/buildinfo"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed peers/nginx.conf
var nginxConf string

//go:embed peers/haproxy.cfg
var haproxyConf string

const (
	firstProxy     = 8100 // port of the first proxy
	overrideCount  = 1000
	overridePrefix = "ov-"

	ours   = "router"
	before = "router-before" // a build before, with the same arguments
	bare   = "bare"          // peers/bare: what Go's reverse proxy alone takes
)

// overrideBackend is the backend of the i-th override.
func overrideBackend(i int) int { return i / 3 % backendCount }

// proxy is something to measure. In its arguments and configuration @DIR@ is its
// scratch directory, @PORT@ its port, @ADMIN@ one more.
type proxy struct {
	name    string
	program string // "" is none: clients open sessions with the backends
	args    string
	config  string // of the file config
	version string // what the program says about itself
	files   int    // that a session may take of the limit on open files
	port    int
}

// proxies returns all. Each has one worker and logs warnings only. previous is the
// program of a build before, "" for none. bareProgram is that of peers/bare.
func proxies(router, bareProgram, previous string) []*proxy {
	var addrs []string
	for _, port := range backendPorts() {
		addrs = append(addrs, "127.0.0.1:"+strconv.Itoa(port))
	}
	nginx := func(name, buffer, busy string) *proxy {
		return &proxy{name: name, program: "nginx", files: 2, args: "-p @DIR@ -c @DIR@/config",
			config: strings.NewReplacer("@BUFFER@", buffer, "@BUSY@", busy).Replace(nginxConf)}
	}
	haproxy := func(name string, files int, options string) *proxy {
		return &proxy{name: name, program: "haproxy", files: files, args: "-db -f @DIR@/config",
			config: strings.Replace(haproxyConf, "@SPLICE@", options, 1)}
	}
	build := func(name, program string) *proxy {
		return &proxy{name: name, program: program, files: 2, args: "-listen 127.0.0.1:@PORT@ -admin 127.0.0.1:@ADMIN@ -backends " +
			strings.Join(addrs, ",") + " -overrides @DIR@/overrides -kube none -log-level warn"}
	}
	list := []*proxy{
		build(ours, router),
		{name: bare, program: bareProgram, files: 2, args: "-listen 127.0.0.1:@PORT@ -backends " + strings.Join(addrs, ",")},
		nginx("nginx", "4k", "8k"),
		nginx("nginx-64k", "64k", "128k"),
		haproxy("haproxy", 2, ""),
		haproxy("haproxy-splice", 3, "    option splice-request\n    option splice-response"), // 3: it wants room for pipes
		{name: "direct", files: 1},
	}
	if previous != "" {
		list = slices.Insert(list, 1, build(before, previous))
	}
	for i, p := range list {
		p.port = firstProxy + 2*i
	}
	return list
}

// direct is the load without a proxy.
func (p *proxy) direct() bool { return p.program == "" }

// built reports whether p is a program of this repository.
func (p *proxy) built() bool { return p.name == ours || p.name == before || p.name == bare }

// overrides reports whether p has the overrides.
func (p *proxy) overrides() bool { return !p.direct() && p.name != bare }

func (p *proxy) ports() []int {
	if p.direct() {
		return backendPorts()
	}
	return []int{p.port}
}

// find makes program a path and asks for its version; an error if it is not
// there.
func (p *proxy) find() error {
	if p.direct() {
		return nil
	}
	path, err := exec.LookPath(p.program)
	if err != nil && !p.built() {
		path, err = exec.LookPath("/usr/sbin/" + p.program) // not in everybody's PATH
	}
	if err != nil && p.built() {
		return err
	}
	if err != nil {
		return fmt.Errorf("%s is not installed: apt-get install nginx-light haproxy", p.program)
	}
	if p.built() {
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return err
		}
		p.version = info.GoVersion + " " + info.Main.Version
	} else {
		out, _ := exec.Command(path, "-v").CombinedOutput()
		p.version, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	}
	p.program, err = filepath.Abs(path)
	return err
}

// running is a proxy that has been started.
type running struct {
	cmd      *exec.Cmd
	ended    chan struct{} // closed when it has
	log      string
	backends *backends // its own
}

// start starts p on the CPU of its target, in a new directory below tmp, and waits
// until it routes. The caller stops it.
func (p *proxy) start(t *target, tmp string) (*running, error) {
	dir := filepath.Join(tmp, p.name)
	replace := strings.NewReplacer("@DIR@", dir, "@PORT@", strconv.Itoa(p.port), "@ADMIN@", strconv.Itoa(p.port+1)).Replace
	if err := errors.Join(os.RemoveAll(dir), writeOverrides(dir), os.WriteFile(dir+"/config", []byte(replace(p.config)), 0o644)); err != nil {
		return nil, err
	}
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", p.port)); err == nil {
		c.Close()
		return nil, fmt.Errorf("port %d is taken", p.port)
	}
	log, err := os.Create(dir + "/log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := append([]string{"-c", strconv.Itoa(t.cpu), p.program}, strings.Fields(replace(p.args))...)
	r := &running{cmd: exec.Command("taskset", args...), ended: make(chan struct{}), log: log.Name(), backends: t.backends}
	r.cmd.Dir, r.cmd.Stdout, r.cmd.Stderr = dir, log, log
	r.cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go r.wait()
	if err := r.await(t); err != nil {
		r.stop()
		return nil, err
	}
	return r, nil
}

func (r *running) wait() {
	r.cmd.Wait()
	close(r.ended)
}

// await waits until a namespace with an override is opened.
func (r *running) await(t *target) error {
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := checkRouting(t, []string{overridePrefix + "0000"})
		if err == nil {
			return nil
		}
		if !r.over() && time.Now().Before(deadline) {
			continue
		}
		log, _ := os.ReadFile(r.log)
		return fmt.Errorf("does not route: %w; its log: %s", err, strings.Join(strings.Fields(string(log[max(len(log)-500, 0):])), " "))
	}
}

// stop ends the processes of r, while the backends answer what they still say.
func (r *running) stop() {
	group := -r.cmd.Process.Pid
	syscall.Kill(group, syscall.SIGTERM)
	for deadline := time.Now().Add(3 * time.Second); !r.over() && time.Now().Before(deadline); {
		r.backends.step(10 * time.Millisecond)
	}
	syscall.Kill(group, syscall.SIGKILL) // what is left
	<-r.ended
}

// over reports whether it has ended.
func (r *running) over() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// writeOverrides makes dir, and in it the overrides in each proxy's language. The
// router's are a mounted ConfigMap: the kubelet's directory behind ..data.
func writeOverrides(dir string) error {
	mounted := filepath.Join(dir, "overrides", "..1")
	if err := os.MkdirAll(mounted, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("..1", filepath.Join(dir, "overrides", "..data")); err != nil {
		return err
	}
	var nginx, haproxy strings.Builder
	for i, namespace := range names(overridePrefix, overrideCount) {
		backend := overrideBackend(i)
		fmt.Fprintf(&nginx, "%s b%d;\n", namespace, backend)
		fmt.Fprintf(&haproxy, "%s b%d\n", namespace, backend)
		if err := os.WriteFile(filepath.Join(mounted, namespace), fmt.Appendf(nil, "backend-%d\n", backend), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(dir+"/overrides.nginx", []byte(nginx.String()), 0o644),
		os.WriteFile(dir+"/overrides.haproxy", []byte(haproxy.String()), 0o644))
}
