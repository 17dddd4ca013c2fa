//go:build unix

// Package k8s_test runs deploy.sh with a kubectl of its own.
package k8s_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// kubectl has every object and does what is asked, except for the policy on its stdin.
const kubectl = `#!/bin/sh
case "$*" in
  *'get configmap -A'*) printf "$OTHERS"; exit ;;
  *jsonpath*) exit ;;
  api-resources*) printf 'podmonitors.monitoring.coreos.com\nprobes.monitoring.coreos.com\nprometheusrules.monitoring.coreos.com\n'; exit ;;
  'get configmap -l app.kubernetes.io/part-of=router -o name') printf "$CONFIGMAPS"; exit ;;
  *' -f -') cat >/dev/null; printf "$POLICY" >&2; exit 1 ;;
esac
echo "$*"
`

// TestDeployPolicy lets kubectl fail with the admission policy: deploy.sh goes on without it
// only if the user lacks the right, or the cluster the kind.
func TestDeployPolicy(t *testing.T) {
	const (
		forbidden = `Error from server (Forbidden): error when retrieving current configuration of:\n` +
			`Name: "overwriting.default"\nfrom server for: "STDIN": policies is forbidden\n`
		noKind = `error: resource mapping not found for name: "overwriting.default" namespace: "" ` +
			`from "STDIN": no matches for kind "ValidatingAdmissionPolicy"\nensure CRDs are installed first\n`
		timeout = `Error from server (Timeout): error when creating "STDIN": Timeout\n`
	)
	dir := copyScripts(t)
	for name, tt := range map[string]struct {
		errors string
		ok     bool
	}{
		"forbidden":             {forbidden, true},
		"no such kind":          {noKind, true},
		"timeout":               {timeout, false},
		"forbidden and timeout": {forbidden + timeout, false},
		"invalid":               {`The ValidatingAdmissionPolicy "overwriting.default" is invalid\n`, false},
		"no connection":         {`The connection to the server 127.0.0.1:1 was refused\n`, false},
		"no words":              {"", false},
	} {
		for _, command := range []string{"deploy", "undeploy"} {
			t.Run(name+"/"+command, func(t *testing.T) {
				out, err := deploy(t, dir, command, "POLICY="+tt.errors)
				if (err == nil) != tt.ok {
					t.Errorf("deploy.sh: %v, want success: %v\n%s", err, tt.ok, out)
				}
				if _, first, _ := strings.Cut(strings.ReplaceAll(tt.errors, `\n`, "\n"), ": "); !strings.Contains(out, first) {
					t.Errorf("deploy.sh did not say %q:\n%s", first, out)
				}
			})
		}
	}
}

// copyScripts copies the scripts into a directory, since deploy.sh writes into bin beside its
// own, with a kubectl and an openssl that do nothing.
func copyScripts(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "k8s"), os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"kubectl": kubectl, "openssl": "#!/bin/sh\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// deploy runs the copy of deploy.sh.
func deploy(t *testing.T, dir, command string, env ...string) (out string, err error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(dir, "k8s", "deploy.sh"), command)
	cmd.Env = append(append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "TAG=test"), env...)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// TestDeployTag: a tag is text, also one that YAML would take for a number.
func TestDeployTag(t *testing.T) {
	for _, tag := range []string{"123456789012", "12345678e012", "1.10", "true", "v1"} {
		dir := copyScripts(t)
		deploy(t, dir, "deploy", "TAG="+tag)
		text, err := os.ReadFile(filepath.Join(dir, "bin", "deploy", "kustomization.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(string(text), `newTag: "`+tag+`"`); got != 2 {
			t.Errorf("%s is there %d times, want twice, in quotes:\n%s", tag, got, text)
		}
	}
}

// TestUndeployPolicy: the policy of the cluster stays while another Kubernetes namespace has
// an installation.
func TestUndeployPolicy(t *testing.T) {
	for others, stays := range map[string]bool{"": false, "another-uid": true} {
		out, err := deploy(t, copyScripts(t), "undeploy", "OTHERS="+others,
			`POLICY=Error from server (Forbidden): no\n`)
		if err != nil {
			t.Errorf("deploy.sh undeploy: %v\n%s", err, out)
		}
		if got := strings.Contains(out, "the admission policy stays"); got != stays {
			t.Errorf("with others %q it stays: %t, want %t\n%s", others, got, stays, out)
		}
	}
}

// TestUndeployComponents: what a component has added to the demo goes at undeploy, without
// DEPLOY_WITH too.
func TestUndeployComponents(t *testing.T) {
	demo, err := kustomize(t, "ipv6") // it adds nothing
	if err != nil {
		t.Fatalf("%v\n%s", err, demo)
	}
	components, err := os.ReadDir("components")
	if err != nil {
		t.Fatal(err)
	}
	id := regexp.MustCompile(`(?s)\nkind: (\w+)\n.*\n  name: (\S+)\n`)
	for _, component := range components {
		all, err := kustomize(t, component.Name())
		if err != nil {
			t.Fatalf("%s: %v\n%s", component.Name(), err, all)
		}
		labelled := `configmap/mine-5bt8b6cf9k\n`
		var deleted []string
		for object := range strings.SplitSeq(all, "\n---\n") {
			m := id.FindStringSubmatch("\n" + object + "\n")
			if m == nil || strings.Contains(demo, m[0]) {
				continue
			}
			if m[1] == "ConfigMap" && strings.Contains(object, "app.kubernetes.io/part-of: router\n") {
				labelled += "configmap/" + m[2] + `\n`
			}
			deleted = append(deleted, `(?m)^delete `+strings.ToLower(m[1])+`[^ /]*[ /]`+m[2]+`( |$)`)
		}
		out, err := deploy(t, copyScripts(t), "undeploy", `POLICY=Error from server (Forbidden): no\n`, "CONFIGMAPS="+labelled)
		if err != nil || strings.Contains(out, "mine-") {
			t.Errorf("deploy.sh undeploy: %v\n%s", err, out)
		}
		for _, pattern := range deleted {
			if !regexp.MustCompile(pattern).MatchString(out) {
				t.Errorf("%s: nothing like %q in\n%s", component.Name(), pattern, out)
			}
		}
	}
}
