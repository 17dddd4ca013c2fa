package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// newBrowser starts a headless Chromium that finds hostName at nginx and
// trusts the CA, and returns the context of its first tab. It ends with the
// test.
func (s *system) newBrowser() context.Context {
	s.t.Helper()
	addr, err := s.front.address(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	home := s.t.TempDir()
	return startBrowser(s.t, home, append(s.trustInBrowser(home, addr),
		chromedp.Flag("host-resolver-rules", "MAP "+hostName+" "+addr))...)
}

// startBrowser starts a headless Chromium with a home directory of its own, and
// returns the context of its first tab. It ends with the test.
func startBrowser(t *testing.T, home string, more ...chromedp.ExecAllocatorOption) context.Context {
	t.Helper()
	options := []chromedp.ExecAllocatorOption{
		chromedp.ExecPath(findChromium(t)),
		chromedp.Env("HOME=" + home),
		chromedp.UserDataDir(filepath.Join(home, "profile")),
		chromedp.NoFirstRun,
		chromedp.Headless,
		chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true),
		chromedp.WSURLReadTimeout(time.Minute),
	}
	if os.Getuid() == 0 {
		options = append(options, chromedp.NoSandbox)
	}
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), append(options, more...)...)
	t.Cleanup(cancel)
	tab, cancel := chromedp.NewContext(allocator, chromedp.WithErrorf(t.Logf))
	t.Cleanup(func() {
		chromedp.Cancel(tab) // waits for the process, so that its files can be removed
		cancel()
	})
	return tab
}

func findChromium(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatal(`Chromium is not installed: apt-get install chromium, or run make e2e E2E_FLAGS="-skip Page"`)
	return ""
}

// openPage does the steps in the tab, and then opens the page. Chromium gives up a page that it
// loads while an interface of the machine comes or goes, as those of pods do: then openPage
// opens it again.
func openPage(tab context.Context, url string, steps ...chromedp.Action[chromedp.Void]) error {
	err := chromedp.Do(tab, append(steps, chromedp.Navigate(url))...)
	for tries := 1; err != nil && strings.Contains(err.Error(), "ERR_NETWORK_CHANGED") && tries < 10; tries++ {
		err = chromedp.Do(tab, chromedp.Navigate(url))
	}
	return err
}

// trustInBrowser makes the browser trust the CA by the certificate store that
// it reads, as a user would, where certutil is there to write it; else it
// returns a flag that accepts the one key that nginx has.
func (s *system) trustInBrowser(home, addr string) []chromedp.ExecAllocatorOption {
	s.t.Helper()
	if certutil, err := exec.LookPath("certutil"); err == nil {
		store := filepath.Join(home, ".pki", "nssdb")
		if err := os.MkdirAll(store, 0o700); err != nil {
			s.t.Fatal(err)
		}
		for _, args := range [][]string{
			{"-N", "--empty-password"},
			{"-A", "-t", "C,,", "-n", "router demo", "-i", filepath.Join(s.root, "certs", "ca.crt")},
		} {
			if out, err := exec.Command(certutil, append(args, "-d", "sql:"+store)...).CombinedOutput(); err != nil {
				s.t.Fatalf("certutil %q: %v\n%s", args, err, out)
			}
		}
		s.t.Log("Chromium trusts certs/ca.crt by its certificate store")
		return nil
	}
	s.t.Log("no certutil (apt-get install libnss3-tools): Chromium is told to accept nginx's key, and the CA is not tested")
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 3 * time.Second}, "tcp", addr, s.tls)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	key := sha256.Sum256(conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo)
	return []chromedp.ExecAllocatorOption{
		chromedp.Flag("ignore-certificate-errors-spki-list", base64.StdEncoding.EncodeToString(key[:])),
	}
}

// screenshot saves what the tab shows, and says where.
func screenshot(t *testing.T, tab context.Context, name string) {
	t.Helper()
	dir := os.Getenv("E2E_ARTIFACTS")
	if dir == "" {
		dir = "artifacts"
	}
	png, err := chromedp.Run(tab, chromedp.FullScreenshot(100)) // 100: a PNG
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, png, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("screenshot %s", file)
}
