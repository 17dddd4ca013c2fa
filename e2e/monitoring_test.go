package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// largeNamespace is how many sessions one namespace has on each router: router_top_sessions
// has only namespaces with 100 or more.
const largeNamespace = 110

// prometheus is a Prometheus that scrapes routers each second, with the rules of
// k8s/components/monitoring.
type prometheus struct {
	t    *testing.T
	base string // of its HTTP API
}

// startPrometheus starts a Prometheus that scrapes the routers, as those of one Kubernetes
// namespace, with the rules as they are. It skips the test if Prometheus is not installed.
func startPrometheus(t *testing.T, routers []*router) *prometheus {
	t.Helper()
	return startPrometheusOf(t, map[string][]*router{"default": routers}, func(rules string) string { return rules })
}

// startPrometheusOf does the same for routers of several Kubernetes namespaces, with the
// rules as change makes them.
func startPrometheusOf(t *testing.T, routers map[string][]*router, change func(rules string) string) *prometheus {
	t.Helper()
	program, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("prometheus is not installed: apt-get install --no-install-recommends prometheus")
	}
	dir := t.TempDir()
	_, spec, _ := strings.Cut(monitoringFile(t, "rules.yaml"), "\nspec:\n")
	config := "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yaml]\n" +
		"scrape_configs:\n- job_name: router\n  static_configs:\n"
	for namespace, of := range routers {
		for _, r := range of {
			config += fmt.Sprintf("  - {targets: [%q], labels: {namespace: %q, pod: %q}}\n", strings.TrimPrefix(r.base, "http://"), namespace, r.pod)
		}
	}
	rules := change(regexp.MustCompile(`(?m)^  `).ReplaceAllString(spec, ""))
	for name, text := range map[string]string{"prometheus.yml": config, "rules.yaml": rules} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := start(t, program, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:0")
	line := p.says(t, `msg="Listening on"`)
	return &prometheus{t: t, base: "http://" + regexp.MustCompile(`address=(\S+)`).FindStringSubmatch(line)[1]}
}

// monitoringFile returns what is in a file of k8s/components/monitoring.
func monitoringFile(t *testing.T, name string) string {
	t.Helper()
	return readFile(t, filepath.Join("../k8s/components/monitoring", name))
}

// get puts the data of an answer of the API into data.
func (p *prometheus) get(ctx context.Context, path string, query url.Values, data any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		return fmt.Errorf("%s %v: %s: %s %w", path, query, resp.Status, answer.Error, err)
	}
	return nil
}

// hasData is nil if the expression has a value that is a number.
func (p *prometheus) hasData(ctx context.Context, expr string) error {
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	if err := p.get(ctx, "/api/v1/query", url.Values{"query": {expr}}, &data); err != nil {
		return err
	}
	for _, r := range data.Result {
		text, _ := r.Value[1].(string)
		if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) && !math.IsInf(v, 0) {
			return nil
		}
	}
	return fmt.Errorf("no data for %s: %d series without a number", expr, len(data.Result))
}

// panel is a panel of the dashboard.
type panel struct {
	Type, Title string
	Targets     []struct{ Expr string }
}

// panels returns the panels of the dashboard, without the titles of its rows.
func panels(t *testing.T) (all []panel) {
	t.Helper()
	var dashboard struct{ Panels []panel }
	if err := json.Unmarshal([]byte(monitoringFile(t, "dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	rows := 0
	for _, p := range dashboard.Panels {
		if p.Type == "row" {
			rows++
		} else {
			all = append(all, p)
		}
	}
	if rows != 7 || len(all) < 30 {
		t.Errorf("the dashboard has %d rows and %d panels", rows, len(all))
	}
	return all
}

// checkPanels waits until each query of each panel has data. shows says of which
// expressions that is wanted.
func (p *prometheus) checkPanels(shows func(expr string) bool) {
	p.t.Helper()
	variables := strings.NewReplacer("$namespace", ".*", "$job", ".*", "$__rate_interval", "30s")
	checked := 0
	for _, panel := range panels(p.t) {
		for _, target := range panel.Targets {
			expr := variables.Replace(target.Expr)
			if strings.Contains(expr, "$") {
				p.t.Errorf("%s: %s has a variable that this test does not know", panel.Title, target.Expr)
			}
			if !shows(expr) {
				continue
			}
			checked++
			eventually(p.t, time.Minute, fmt.Sprintf("data for the panel %q", panel.Title), func() error {
				return p.hasData(p.t.Context(), expr)
			})
		}
	}
	p.t.Logf("%d queries of the dashboard have data", checked)
}

// checkRules checks that Prometheus can evaluate each rule, that what the rules are about
// is there, and that no alert fires.
func (p *prometheus) checkRules(shows func(expr string) bool) {
	p.t.Helper()
	type rule struct{ Name, Query, Type, Health, LastError, State string }
	var rules []rule
	eventually(p.t, 30*time.Second, "the rules to be evaluated", func() error {
		var data struct{ Groups []struct{ Rules []rule } }
		if err := p.get(p.t.Context(), "/api/v1/rules", nil, &data); err != nil || len(data.Groups) != 1 {
			return fmt.Errorf("%d groups: %w", len(data.Groups), err)
		}
		rules = data.Groups[0].Rules
		var errs []error
		for _, r := range rules {
			if r.Health != "ok" || r.LastError != "" {
				errs = append(errs, fmt.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError))
			}
		}
		return errors.Join(errs...)
	})
	if len(rules) < 18 {
		p.t.Errorf("%d rules", len(rules))
	}
	for _, r := range rules {
		if r.State == "firing" {
			p.t.Errorf("%s fires", r.Name)
		}
		for _, name := range regexp.MustCompile(`\b(?:router:[a-z0-9:]+|router_[a-z_]+)`).FindAllString(r.Query, -1) {
			if !shows(name) {
				continue
			}
			eventually(p.t, 30*time.Second, r.Name+" has something to look at", func() error {
				return p.hasData(p.t.Context(), "count("+name+")")
			})
		}
	}
}

// checkScrape waits until Prometheus has read all of /metrics of the router, in the format
// of OpenMetrics.
func (p *prometheus) checkScrape(r *router) {
	p.t.Helper()
	eventually(p.t, 30*time.Second, "Prometheus to scrape "+r.pod, func() error {
		var targets struct {
			ActiveTargets []struct {
				Labels            map[string]string
				Health, LastError string
			}
		}
		if err := p.get(p.t.Context(), "/api/v1/targets", nil, &targets); err != nil {
			return err
		}
		for _, target := range targets.ActiveTargets {
			if target.Labels["pod"] == r.pod && target.Health == "up" {
				return p.knowsFamilies(r)
			}
		}
		return fmt.Errorf("it is not up: %+v", targets.ActiveTargets)
	})
}

// knowsFamilies is nil if Prometheus knows each family with the type and the help that it
// has in the text format, and with its unit, which only OpenMetrics has, and no other one.
func (p *prometheus) knowsFamilies(r *router) error {
	text, err := r.metrics(p.t.Context())
	if err != nil {
		return err
	}
	var families []struct{ Metric, Type, Help, Unit string }
	query := url.Values{"match_target": {fmt.Sprintf("{pod=%q}", r.pod)}}
	if err := p.get(p.t.Context(), "/api/v1/targets/metadata", query, &families); err != nil {
		return err
	}
	got, want := map[string]string{}, map[string]string{}
	for _, f := range families {
		got[f.Metric] = f.Type + " " + f.Unit + " " + f.Help
	}
	for name, family := range text {
		name, unit := strings.TrimSuffix(name, "_total"), ""
		for _, u := range []string{"seconds", "bytes"} {
			if strings.HasSuffix(name, "_"+u) {
				unit = u
			}
		}
		want[name] = strings.ToLower(family.GetType().String()) + " " + unit + " " + family.GetHelp()
	}
	if len(want) < 40 || !maps.Equal(got, want) {
		return fmt.Errorf("it knows\n%v, want\n%v", got, want)
	}
	return nil
}

// checkLint has Prometheus's linter look at /metrics.
func checkLint(t *testing.T, r *router) {
	t.Helper()
	body, err := r.get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Errorf("%s: %v", r.pod, err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s: %s", r.pod, p.Metric, p.Text)
	}
}

// keepBusy opens and closes sessions of the namespaces, and sends plain requests to them,
// until the test ends: with a client for each.
func keepBusy(t *testing.T, d *dialer, namespaces ...string) {
	t.Helper()
	for _, namespace := range namespaces {
		keepDoing(t, 50*time.Millisecond, func(ctx context.Context, _ int) {
			if s, err := d.open(ctx, namespace); err == nil {
				s.read(ctx)
				s.conn.CloseNow()
			}
			if resp, err := d.http.Get(strings.Replace(d.base, "ws", "http", 1) + "/ws/" + namespace); err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
}

// keepDoing calls do with 0, 1 and so on, with a pause after each call, until the test
// ends.
func keepDoing(t *testing.T, pause time.Duration, do func(ctx context.Context, i int)) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			do(ctx, i)
			until(ctx, pause)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
}

// busyNamespaces are those that tests of monitoring keep busy.
func busyNamespaces() (all []string) {
	for i := range 4 {
		all = append(all, fmt.Sprintf("%sbusy-%d", prefix, i))
	}
	return all
}

// pair is a certificate for 127.0.0.1 with its key, in the files of a mounted Secret.
type pair struct {
	directory string
	pool      *x509.CertPool // trusts it
}

// newPair makes a pair that expires then.
func newPair(t *testing.T, notAfter time.Time) *pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{t.TempDir(), x509.NewCertPool()}
	for name, block := range map[string]*pem.Block{
		"tls.crt": {Type: "CERTIFICATE", Bytes: certificate}, "tls.key": {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(p.directory, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.pool.AppendCertsFromPEM([]byte(readFile(t, filepath.Join(p.directory, "tls.crt"))))
	return p
}

// TestMonitoringAlone: a Prometheus that scrapes a router has data for each panel of the
// dashboard, but for those of the API server, and can evaluate each rule. The router ends
// TLS. It needs no cluster.
func TestMonitoringAlone(t *testing.T) {
	addrs := (&system{t: t}).localBackends(build(t, "./backend"), 2)
	overrides := t.TempDir()
	pin := func(namespace string, backend int) {
		file := filepath.Join(overrides, namespace)
		if err := os.WriteFile(file+".new", fmt.Appendf(nil, "backend-%d\n", backend), 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Error(err)
		}
	}
	const large, dead = prefix + "large", prefix + "dead" // the owner of dead is not there
	pin(large, 0)
	pin(dead, 2)
	pair := newPair(t, time.Now().Add(365*24*time.Hour))
	r := runRouter(t, build(t, "."), "-kube=none", "-overrides="+overrides, "-hold=100ms", "-move-settle=10ms",
		"-tls-cert="+pair.directory, "-backends="+strings.Join(append(addrs, freeAddress(t)), ","))
	r.awaitReady(t)
	p := startPrometheus(t, []*router{r.router})
	checkLint(t, r.router)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pair.pool}}
	t.Cleanup(transport.CloseIdleConnections)
	d := &dialer{base: strings.Replace(r.address(t), "ws:", "wss:", 1), http: &http.Client{Transport: transport}}
	for range largeNamespace {
		s, err := d.open(t.Context(), large)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(follow(s).close)
	}
	keepDoing(t, 2*time.Second, func(_ context.Context, i int) {
		for n, namespace := range busyNamespaces() {
			pin(namespace, (n+i)%2)
		}
	})
	keepBusy(t, d, append(busyNamespaces(), dead)...)
	p.checkScrape(r.router)
	needsKube := regexp.MustCompile(`router_(watch_|backend_(ready|without_namespaces)|statefulset_|cordon_)`)
	alone := func(expr string) bool { return !needsKube.MatchString(expr) }
	p.checkPanels(alone)
	p.checkRules(alone)
}

// TestMonitoring: the same in the cluster, with all panels and all rules, but for those of TLS
// where nginx ends that.
func TestMonitoring(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	routers := s.routers(t.Context())
	p := startPrometheus(t, routers)
	for _, r := range routers {
		checkLint(t, r)
	}
	eventually(t, 2*time.Minute, "each router to have a large namespace", func() error {
		for _, r := range routers {
			m, err := r.metrics(t.Context())
			if err != nil {
				return err
			}
			if n := m.sum("router_sessions"); n < largeNamespace {
				for range 10 {
					s.mustFollow(prefix + "large")
				}
				return fmt.Errorf("%s has %v sessions", r.pod, n)
			}
		}
		return nil
	})
	keepDoing(t, 5*time.Second, func(ctx context.Context, i int) {
		data := map[string]any{}
		for n, namespace := range busyNamespaces() {
			data[namespace] = fmt.Sprintf("backend-%d", (n+i)%2)
		}
		s.patch(ctx, data)
	})
	keepBusy(t, s.dialer, append(busyNamespaces(), busyNamespaces()...)...)
	for _, r := range routers {
		p.checkScrape(r)
	}
	withNginx := s.hasNginx()
	all := func(expr string) bool { return !withNginx || !strings.Contains(expr, "router_tls_") }
	p.checkPanels(all)
	p.checkRules(all)
}
