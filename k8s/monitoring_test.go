package k8s_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// alert is an alert of monitoring/rules.yaml.
type alert struct{ name, rule, runbook string }

// alerts returns the alerts, each with its whole rule.
func alerts(t *testing.T) (all []alert) {
	t.Helper()
	for _, rule := range regexp.MustCompile(`(?m)^ +- (?:alert|record): `).Split(text(t, "components/monitoring/rules.yaml"), -1)[1:] {
		name, rule, _ := strings.Cut(rule, "\n")
		if strings.Contains(name, ":") { // of a record
			continue
		}
		a := alert{name: name, rule: rule}
		if m := regexp.MustCompile(`runbook_url: docs/operations\.md#(\S+)`).FindStringSubmatch(rule); m != nil {
			a.runbook = m[1]
		}
		all = append(all, a)
	}
	if len(all) < 17 {
		t.Fatalf("%d alerts in rules.yaml", len(all))
	}
	return all
}

// TestMonitoringAlerts: each alert has a severity and a summary, a test in which it fires
// and one in which it does not, and an entry in the runbook that names it.
func TestMonitoringAlerts(t *testing.T) {
	entries := map[string]string{} // by anchor
	for _, entry := range strings.Split(text(t, "../docs/operations.md"), "\n### ")[1:] {
		title, body, _ := strings.Cut(entry, "\n")
		anchor := regexp.MustCompile(`[^a-z0-9_ -]`).ReplaceAllString(strings.ToLower(title), "")
		entries[strings.ReplaceAll(anchor, " ", "-")] = body
	}
	well, fires, _ := strings.Cut(text(t, "components/monitoring/rules_test.yaml"), "\n\n")
	var names []string
	for _, a := range alerts(t) {
		names = append(names, a.name)
		for _, line := range []string{"severity: ", "summary: "} {
			if !strings.Contains(a.rule, line) {
				t.Errorf("%s has no %s", a.name, line)
			}
		}
		if !strings.Contains(entries[a.runbook], "`"+a.name+"`") {
			t.Errorf("docs/operations.md has no section #%s that names `%s`", a.runbook, a.name)
		}
		if !strings.Contains(well, "alertname: "+a.name+"}") {
			t.Errorf("rules_test.yaml does not say that %s is silent while all is well", a.name)
		}
		if !strings.Contains(fires, "        alertname: "+a.name+"\n        exp_alerts:\n          - ") {
			t.Errorf("in rules_test.yaml %s does not fire", a.name)
		}
	}
	for _, path := range []string{"../docs/operations.md", "../docs/metrics.md", "components/monitoring/rules_test.yaml"} {
		for _, name := range regexp.MustCompile("(?:`|alertname: )(Routers?[A-Z]\\w+)").FindAllStringSubmatch(text(t, path), -1) {
			if !slices.Contains(names, name[1]) {
				t.Errorf("%s names the alert %s, which rules.yaml does not have", path, name[1])
			}
		}
	}
}

// TestMonitoringMetrics: docs/metrics.md, which the root's TestDocs compares with
// /metrics, has each metric of the rules and of the dashboard.
func TestMonitoringMetrics(t *testing.T) {
	documented := text(t, "../docs/metrics.md")
	for _, path := range []string{"components/monitoring/rules.yaml", "components/monitoring/rules_test.yaml", "components/monitoring/dashboard.json"} {
		names := regexp.MustCompile(`\b(?:router|process|go)_[a-z_]+`).FindAllString(text(t, path), -1)
		slices.Sort(names)
		if names = slices.Compact(names); len(names) < 20 {
			t.Errorf("%d metrics in %s", len(names), path)
		}
		for _, name := range names {
			family := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			if !strings.Contains(documented, "| `"+name+"` |") && !strings.Contains(documented, "| `"+family+"` | histogram |") &&
				!strings.Contains(documented, "| `"+family+"` | summary |") {
				t.Errorf("%s has %s, which docs/metrics.md does not have", path, name)
			}
		}
	}
}

// TestMonitoringRules has promtool check the rules, and fire the alerts, with what docs/
// operations.md makes a rule file of.
func TestMonitoringRules(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed: apt-get install --no-install-recommends prometheus")
	}
	const extract = `sed '1,/^spec:/d; s/^  //' k8s/components/monitoring/rules.yaml > rules.yaml`
	if !strings.Contains(text(t, "../docs/operations.md"), extract) {
		t.Errorf("docs/operations.md lacks %s", extract)
	}
	dir := t.TempDir()
	script := strings.Replace(extract, "k8s/components/monitoring/", "$PWD/components/monitoring/", 1)
	script = strings.Replace(script, "> rules.yaml", `> "$DIR"/rules.yaml`, 1)
	cmd := exec.Command("sh", "-ec", script+`; cp components/monitoring/rules_test.yaml "$DIR"; cd "$DIR"; `+promtool+` check rules rules.yaml; `+promtool+` test rules rules_test.yaml`)
	cmd.Env = append(os.Environ(), "DIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "SUCCESS") != 2 {
		t.Errorf("%v\n%s", err, out)
	}
}

// text returns what is in the file.
func text(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.FromSlash(path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestMonitoringPanels: panels of the dashboard say what is so where a Prometheus has two
// installations, and where plain requests take slots of sessions.
func TestMonitoringPanels(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed: apt-get install --no-install-recommends prometheus")
	}
	const series = `
      - {series: 'router_table_info{namespace="a", job="router", pod="a-1", stamp="1.0"}', values: '1x9'}
      - {series: 'router_table_info{namespace="a", job="router", pod="a-2", stamp="1.0"}', values: '1x9'}
      - {series: 'router_table_info{namespace="b", job="router", pod="b-1", stamp="2.0"}', values: '1x9'}
      - {series: 'router_sessions{namespace="a", job="router", pod="a-1", backend="backend-0"}', values: '10x9'}
      - {series: 'router_sessions{namespace="b", job="router", pod="b-1", backend="backend-0"}', values: '20x9'}
      - {series: 'router_http_requests_in_progress{namespace="a", job="router", pod="a-1"}', values: '80x9'}
      - {series: 'router_max_sessions{namespace="a", job="router", pod="a-1"}', values: '100x9'}
      - {series: 'router_max_sessions{namespace="b", job="router", pod="b-1"}', values: '100x9'}`
	test := "tests:\n  - input_series:" + series + "\n    promql_expr_test:\n"
	for _, panel := range []struct{ title, value string }{
		{"Different tables", "1"},
		{"Used of the limits", "0.9"},
	} {
		_, rest, _ := strings.Cut(text(t, "components/monitoring/dashboard.json"), `"title": "`+panel.title+`"`)
		expr := regexp.MustCompile(`"expr": (".*")`).FindStringSubmatch(rest)[1]
		expr = strings.NewReplacer("$namespace", ".*", "$job", ".*").Replace(expr)
		test += "      - {eval_time: 5m, expr: " + expr + ", exp_samples: [{labels: '{}', value: " + panel.value + "}]}\n"
	}
	path := filepath.Join(t.TempDir(), "panels.yaml")
	if err := os.WriteFile(path, []byte(test), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "test", "rules", path).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
