package k8s_test

import (
	"bufio"
	"encoding/json"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// goImage has the version of Go with which the Dockerfile compiles.
var goImage = regexp.MustCompile(`(?m)^FROM .*(docker\.io/library/golang:(\S+)) AS programs$`)

func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestDockerfileGo: the Dockerfile and a release compile with the newest patch of the
// version of Go that go.mod requires.
func TestDockerfileGo(t *testing.T) {
	used := goImage.FindStringSubmatch(readFile(t, "../Dockerfile"))
	wanted := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(readFile(t, "../go.mod"))
	if used == nil || wanted == nil || used[2] != wanted[1] {
		t.Fatalf("the Dockerfile's image is %q, go.mod has %q", used, wanted)
	}
	if released := readFile(t, "../.github/workflows/release.yml"); !strings.Contains(released, "go-version: "+wanted[1]+".x,") {
		t.Errorf("release.yml does not have version %s.x of Go", wanted[1])
	}
}

// TestDockerfile builds both images from a clean copy of the repository, where nothing was
// compiled, and runs them. As no registry is asked, the image of Go is one of this
// machine's own.
func TestDockerfile(t *testing.T) {
	if _, err := exec.LookPath("buildah"); err != nil || os.Getuid() != 0 {
		t.Skip("needs buildah (apt-get install buildah) and root")
	}
	b := &builder{t: t, storage: t.TempDir(), source: t.TempDir(), modules: run(t, ".", "go", "env", "GOMODCACHE"), cache: run(t, ".", "go", "env", "GOCACHE")}
	t.Cleanup(func() { b.buildah("rm", "--all") })
	copyTree(t, b.source)
	b.makeGoImage(goImage.FindStringSubmatch(readFile(t, "../Dockerfile"))[1])

	programs := b.mount(b.build("programs"))
	for _, path := range files(t, filepath.Join(programs, "src")) {
		if !regexp.MustCompile(`^((backend/)?\w+\.go|go\.(mod|sum)|page\.html|version\.txt)$`).MatchString(path) || strings.HasSuffix(path, "_test.go") {
			t.Errorf("the build gets %s, which it does not need", path)
		}
	}
	router, backend := b.build(""), b.build("backend")
	b.check(router, "router")
	b.check(backend, "backend")
	if got, want := run(t, b.mount(router), "chroot", ".", "/router", "version"), "router v1.2.3, commit 0123abcd, "+runtime.Version()+", linux/"+runtime.GOARCH; got != want {
		t.Errorf("the router says %q, want %q", got, want)
	}
	echo, clients, admin := freeAddr(t), freeAddr(t), freeAddr(t)
	b.start(backend, "/backend", "-listen", echo)
	b.start(router, "/router", "-kube", "none", "-backends", echo, "-listen", clients, "-admin", admin)
	hear(t, "ws://"+clients+"/ws/ns-01")
}

// builder runs buildah with a storage of its own.
type builder struct {
	t               *testing.T
	storage, source string // source is the copy of the repository
	modules, cache  string // of the go command
}

func (b *builder) buildah(args ...string) string {
	b.t.Helper()
	return run(b.t, b.source, "buildah", append([]string{"--storage-driver", "vfs", "--root", b.storage + "/root", "--runroot", b.storage + "/run"}, args...)...)
}

// makeGoImage makes an image under the name of Go's: a shell, and the places where build
// mounts this machine's Go.
func (b *builder) makeGoImage(name string) {
	b.t.Helper()
	dir := b.t.TempDir()
	for _, line := range strings.Split(run(b.t, ".", "ldd", "/bin/sh"), "\n") {
		if library := regexp.MustCompile(`/\S+`).FindString(line); library != "" {
			run(b.t, ".", "sh", "-ec", `mkdir -p "$1/root${2%/*}" && cp -L "$2" "$1/root$2"`, "sh", dir, library)
		}
	}
	run(b.t, dir, "sh", "-ec", `mkdir -p root/bin root/tmp root/proxy root/gocache root/usr/local/go && cp -L /bin/sh root/bin
		printf 'FROM scratch\nCOPY root /\nENV PATH=/usr/local/go/bin:/bin GOCACHE=/gocache GOPROXY=file:///proxy GOSUMDB=off GOTOOLCHAIN=local\n' >Dockerfile`)
	b.buildah("bud", "-q", "--isolation", "chroot", "-t", name, dir)
}

// build builds a target of the Dockerfile and returns the image.
func (b *builder) build(target string) string {
	b.t.Helper()
	args := []string{"bud", "-q", "--isolation", "chroot", "--layers", "--pull-never", "--build-arg", "VERSION=v1.2.3", "--build-arg", "REVISION=0123abcd",
		"--build-arg", "TARGETOS=linux", "--build-arg", "TARGETARCH=" + runtime.GOARCH,
		"-v", run(b.t, ".", "go", "env", "GOROOT") + ":/usr/local/go:ro", "-v", b.modules + "/cache/download:/proxy:ro", "-v", b.cache + ":/gocache"}
	if target != "" {
		args = append(args, "--target", target)
	}
	out := b.buildah(append(args, b.source)...)
	return out[strings.LastIndex(out, "\n")+1:]
}

// mount returns the directory with what is in the image.
func (b *builder) mount(image string) string {
	b.t.Helper()
	return b.buildah("mount", b.buildah("from", "--pull-never", image))
}

// check checks that the image has nothing but the program, and its configuration.
func (b *builder) check(image, program string) {
	b.t.Helper()
	root := b.mount(image)
	if got := files(b.t, root); !slices.Equal(got, []string{program}) {
		b.t.Errorf("the image has %v, want only %s", got, program)
	}
	if info, err := os.Stat(filepath.Join(root, program)); err != nil || info.Size() >= 10e6 {
		b.t.Errorf("%s: %v, %v, want less than 10 MB", program, info, err)
	}
	var got struct {
		OCIv1 struct {
			Config struct {
				User       string
				Entrypoint []string
				Labels     map[string]string
			} `json:"config"`
		}
	}
	if err := json.Unmarshal([]byte(b.buildah("inspect", "--type", "image", image)), &got); err != nil {
		b.t.Fatal(err)
	}
	c := got.OCIv1.Config
	if c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/" + program}) {
		b.t.Errorf("%s runs %v as %q", program, c.Entrypoint, c.User)
	}
	for key, want := range map[string]string{"title": "^router", "description": "router", "licenses": "^Apache-2.0$", "version": `^v1\.2\.3$`, "revision": "^0123abcd$"} {
		if label := c.Labels["org.opencontainers.image."+key]; !regexp.MustCompile(want).MatchString(label) {
			b.t.Errorf("%s: the label %s is %q, want %s", program, key, label, want)
		}
	}
}

// start runs the image's program in its root alone, as its user, until the test ends.
func (b *builder) start(image string, args ...string) {
	b.t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: b.mount(image), Credential: &syscall.Credential{Uid: 65532, Gid: 65532}, Pdeathsig: syscall.SIGKILL}
	cmd.Dir, cmd.Env = "/", []string{}
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if b.t.Failed() {
			b.t.Logf("%s:\n%s", args[0], log.String())
		}
	})
}

// listFiles prints the repository's files, without those that git ignores, also where it is
// somebody else's, or no clone.
const listFiles = `git -c safe.directory='*' ls-files -z --cached --others --exclude-standard 2>/dev/null ||
		find . -type f ! -path './.git/*' ! -path './bin/*' ! -path './dist/*' ! -path '*/node_modules/*' \
			! -path './e2e/artifacts/*' ! -name '*.crt' ! -name '*.key' -print0`

// copyTree copies the repository's files, without those that git ignores, to dir. It adds
// a key, which no build may get.
func copyTree(t *testing.T, dir string) {
	t.Helper()
	names := run(t, "..", "sh", "-c", listFiles)
	for name := range strings.SplitSeq(strings.Trim(names, "\x00"), "\x00") {
		info, err := os.Stat(filepath.Join("..", name))
		if os.IsNotExist(err) {
			continue // deleted, not committed yet
		}
		var b []byte
		if err == nil {
			b, err = os.ReadFile(filepath.Join("..", name))
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, info.Mode())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "certs", "tls.key"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// files returns the paths of the files below dir.
func files(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			path, err = filepath.Rel(dir, path)
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// freeAddr returns an address of this machine on which nothing listens.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// hear opens a WebSocket, once something listens, and waits for what the demo backend says first.
func hear(t *testing.T, url string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ws, err := websocket.Dial(url, "", "http://origin.example/")
		if err == nil {
			defer ws.Close()
			ws.SetDeadline(deadline)
			line, err := bufio.NewReader(ws).ReadString('}')
			if err != nil || !strings.Contains(line, `"ns":"ns-01"`) {
				t.Errorf("the backend says %q, %v", line, err)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
