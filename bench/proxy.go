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

//go:embed peers/pod.sh
var podScript string

// TLS in the configurations. nginx has what the pod's has, but for a certificate that is
// read in each handshake. HAProxy by default prefers the cipher suites in its own order:
// AES with 256 bits where the others have 128.
const (
	nginxTLS = `        ssl_certificate @DIR@/tls/tls.crt;
        ssl_certificate_key @DIR@/tls/tls.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_prefer_server_ciphers off;
        ssl_session_cache shared:tls:10m;
        ssl_session_timeout 1h;
        ssl_buffer_size 4k;`
	haproxyTLS    = " ssl crt @DIR@/tls/tls.pem"
	haproxyGlobal = `    ssl-default-bind-options ssl-min-ver TLSv1.2 prefer-client-ciphers
    ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20`
)

const (
	firstProxy     = 8100 // port of the first proxy
	portsOfProxy   = 8    // that each proxy may have
	overrideCount  = 1000
	overridePrefix = "ov-"

	ours   = "router"
	before = "router-before" // a build before, with the same arguments
	bare   = "bare"          // peers/bare: what Go's reverse proxy alone takes

	// With TLS:
	oursTLS    = "router-tls"
	pod        = "pod" // nginx and the router as they are deployed
	haproxyEnd = "haproxy-tls"
	nginxEnd   = "nginx-tls"
	tlsFlag    = "-tls-cert" // of a router that can end TLS
)

// overrideBackend is the backend of the i-th override.
func overrideBackend(i int) int { return i / 3 % backendCount }

// proxy is something to measure. In its arguments and configuration @DIR@ is its
// scratch directory, @PORT@ its port, @ADMIN@ one more.
type proxy struct {
	name    string
	program string // "" is none: clients open sessions with the backends
	args    string
	config  string                           // of the file config
	prepare func(dir string, port int) error // writes further files; or nil
	parts   []string                         // programs that program runs; nil: it is the only one
	flag    string                           // that program must know; "": none
	version string                           // what the program says about itself
	files   int                              // that a session may take of the limit on open files
	tls     bool                             // it ends TLS
	port    int
}

// proxies returns all. Each has one worker and logs warnings only, but for the pod, which
// is as it is deployed. previous is the program of a build before, "" for none. bareProgram
// is that of peers/bare.
func proxies(router, bareProgram, previous string) []*proxy {
	list := append(plainProxies(router, bareProgram, previous), tlsProxies(router)...)
	for i, p := range list {
		p.port = firstProxy + portsOfProxy*i
	}
	return list
}

// plainProxies returns those without TLS.
func plainProxies(router, bareProgram, previous string) []*proxy {
	nginx := func(name, buffer, busy string) *proxy {
		return &proxy{name: name, program: "nginx", files: 2, args: "-p @DIR@ -c @DIR@/config", config: nginxConfig(buffer, busy, "", "")}
	}
	haproxy := func(name string, files int, options string) *proxy {
		return &proxy{name: name, program: "haproxy", files: files, args: "-db -f @DIR@/config", config: haproxyConfig(options, "", "")}
	}
	list := []*proxy{
		build(ours, router),
		{name: bare, program: bareProgram, files: 2, args: "-listen 127.0.0.1:@PORT@ -backends " + backendList()},
		nginx("nginx", "4k", "8k"),
		nginx("nginx-64k", "64k", "128k"),
		haproxy("haproxy", 2, ""),
		haproxy("haproxy-splice", 3, "    option splice-request\n    option splice-response"), // 3: it wants room for pipes
		{name: "direct", files: 1},
	}
	if previous != "" {
		list = slices.Insert(list, 1, build(before, previous))
	}
	return list
}

// tlsProxies returns those that end TLS. The files with the certificate are in the
// directory tls.
func tlsProxies(router string) []*proxy {
	list := []*proxy{
		build(oursTLS, router),
		{name: pod, program: "sh", parts: []string{"nginx", router}, args: "@DIR@/config", files: 2, prepare: copyDeployed,
			config: strings.ReplaceAll(podScript, "@BACKENDS@", backendList())},
		{name: nginxEnd, program: "nginx", files: 2, args: "-p @DIR@ -c @DIR@/config", config: nginxConfig("4k", "8k", " ssl", nginxTLS)},
		{name: haproxyEnd, program: "haproxy", files: 2, args: "-db -f @DIR@/config", config: haproxyConfig("", haproxyGlobal, haproxyTLS)},
	}
	list[0].flag = tlsFlag
	list[0].args += " " + tlsFlag + " @DIR@/tls/tls.crt -tls-key @DIR@/tls/tls.key"
	for _, p := range list {
		p.tls = true
	}
	return list
}

// build is a build of the router.
func build(name, program string) *proxy {
	return &proxy{name: name, program: program, files: 2, args: "-listen 127.0.0.1:@PORT@ -admin 127.0.0.1:@ADMIN@ -backends " +
		backendList() + " -overrides @DIR@/overrides -kube none -log-level warn"}
}

func nginxConfig(buffer, busy, listen, tls string) string {
	return strings.NewReplacer("@BUFFER@", buffer, "@BUSY@", busy, "@LISTEN@", listen, "@TLS@", tls).Replace(nginxConf)
}

func haproxyConfig(splice, global, tls string) string {
	return strings.NewReplacer("@SPLICE@", splice, "@GLOBAL@", global, "@TLS@", tls).Replace(haproxyConf)
}

// backendList is the addresses of the backends, as the router takes them.
func backendList() string {
	var addresses []string
	for _, port := range backendPorts() {
		addresses = append(addresses, "127.0.0.1:"+strconv.Itoa(port))
	}
	return strings.Join(addresses, ",")
}

// deployed is the directory of the pod's nginx, from the root of the repository.
const deployed = "nginx"

// copyDeployed writes the pod's nginx.conf and start.sh to dir, for bench's directory and
// ports.
func copyDeployed(dir string, port int) error { return copyPod(deployed, dir, port) }

// copyPod is copyDeployed from a directory. A text to replace that is not there is an error:
// something else would be measured.
func copyPod(from, dir string, port int) error {
	number := strconv.Itoa
	for name, pairs := range map[string][]string{
		"nginx.conf": {"/etc/nginx/", dir + "/", "/run/router/", dir + "/", " /tmp/", " " + dir + "/tmp/"},
		"start.sh": {"listen 443 ", "listen " + number(port) + " ", "listen 80 ", "listen " + number(port+2) + " ",
			"listen 8002 ", "listen " + number(port+3) + " ", "$loopback:8003", "$loopback:" + number(port+4),
			">/tmp/", ">" + dir + "/tmp/", "=/tmp/", "=" + dir + "/tmp/"},
	} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return err
		}
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(string(b), pairs[i]) {
				return fmt.Errorf("%s/%s does not contain %q", from, name, pairs[i])
			}
		}
		text := strings.NewReplacer(pairs...).Replace(string(b))
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(dir, "tmp"), 0o755)
}

// direct is the load without a proxy.
func (p *proxy) direct() bool { return p.program == "" }

// overrides reports whether p has the overrides.
func (p *proxy) overrides() bool { return !p.direct() && p.name != bare }

func (p *proxy) ports() []int {
	if p.direct() {
		return backendPorts()
	}
	return []int{p.port}
}

// find makes program and parts paths and asks for their versions; an error if one is not
// there, or is too old.
func (p *proxy) find() (err error) {
	if p.direct() {
		return nil
	}
	var version string
	var versions []string
	if p.program, version, err = lookUp(p.program); err != nil {
		return err
	}
	for i := range p.parts {
		if p.parts[i], version, err = lookUp(p.parts[i]); err != nil {
			return err
		}
		versions = append(versions, version)
	}
	if p.version = version; len(versions) > 0 {
		p.version = strings.Join(versions, ", ")
	}
	if p.flag == "" {
		return nil
	}
	help, _ := exec.Command(p.program, "-h").CombinedOutput() // the status of -h says nothing
	for line := range strings.Lines(string(help)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == p.flag {
			return nil
		}
	}
	return fmt.Errorf("%s does not know the flag %s", p.program, p.flag)
}

// lookUp returns the path of a program and what it says about itself. A program with a path
// is one of this repository.
func lookUp(program string) (path, version string, err error) {
	path, err = exec.LookPath(program)
	if strings.Contains(program, "/") {
		if err != nil {
			return "", "", err
		}
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return "", "", err
		}
		path, err = filepath.Abs(path)
		return path, info.GoVersion + " " + info.Main.Version, err
	}
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + program) // not in everybody's PATH
	}
	if err != nil {
		return "", "", fmt.Errorf("%s is not installed: apt-get install nginx-light haproxy", program)
	}
	if program != "sh" { // which would take -v for its own
		out, _ := exec.Command(path, "-v").CombinedOutput()
		version, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	}
	path, err = filepath.Abs(path)
	return path, version, err
}

// running is a proxy that has been started.
type running struct {
	cmd      *exec.Cmd
	ended    chan struct{} // closed when it has
	log      string
	backends *backends // its own
}

// write writes what p needs to dir, anew, and returns its arguments.
func (p *proxy) write(dir string) (args []string, err error) {
	pairs := []string{"@DIR@", dir, "@PORT@", strconv.Itoa(p.port), "@ADMIN@", strconv.Itoa(p.port + 1)}
	if len(p.parts) == 2 {
		pairs = append(pairs, "@NGINX@", p.parts[0], "@ROUTER@", p.parts[1])
	}
	replace := strings.NewReplacer(pairs...).Replace
	err = errors.Join(os.RemoveAll(dir), writeOverrides(dir), os.WriteFile(dir+"/config", []byte(replace(p.config)), 0o644))
	if err == nil && p.prepare != nil {
		err = p.prepare(dir, p.port)
	}
	return strings.Fields(replace(p.args)), err
}

// start starts p on the CPU of its target, in a new directory below tmp, and waits
// until it routes. c is its certificate, nil if it needs none. The caller stops it.
func (p *proxy) start(t *target, tmp string, c *certificate) (*running, error) {
	dir := filepath.Join(tmp, p.name)
	own, err := p.write(dir)
	if err == nil && c != nil {
		err = c.write(filepath.Join(dir, "tls"))
	}
	if err != nil {
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
	args := append([]string{"-c", strconv.Itoa(t.cpu), p.program}, own...)
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
