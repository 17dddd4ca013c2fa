//go:build unix

// Package k8s_test runs deploy.sh with a kubectl of its own.
package k8s_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kubectl has every object and does what is asked, except for the policy on its stdin.
const kubectl = `#!/bin/sh
case "$*" in
  *jsonpath*) exit ;;
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
	dir := t.TempDir() // deploy.sh writes into bin beside its own directory
	if err := os.CopyFS(filepath.Join(dir, "k8s"), os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kubectl"), []byte(kubectl), 0o755); err != nil {
		t.Fatal(err)
	}
	// A certificate is not what this is about.
	if err := os.WriteFile(filepath.Join(dir, "openssl"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
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
				cmd := exec.Command(filepath.Join(dir, "k8s", "deploy.sh"), command)
				cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "POLICY="+tt.errors, "TAG=test")
				out, err := cmd.CombinedOutput()
				if (err == nil) != tt.ok {
					t.Errorf("deploy.sh: %v, want success: %v\n%s", err, tt.ok, out)
				}
				if _, first, _ := strings.Cut(strings.ReplaceAll(tt.errors, `\n`, "\n"), ": "); !strings.Contains(string(out), first) {
					t.Errorf("deploy.sh did not say %q:\n%s", first, out)
				}
			})
		}
	}
}
