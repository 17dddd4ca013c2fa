package k8s_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// kustomize prints an overlay of k8s/demo with these components.
func kustomize(t *testing.T, components ...string) (string, error) {
	t.Helper()
	program, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("kubectl is not installed")
	}
	here, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := func(name string) string {
		relative, err := filepath.Rel(dir, filepath.Join(here, name))
		if err != nil {
			t.Fatal(err)
		}
		return relative
	}
	text := "resources: [" + path("demo") + "]\ncomponents:\n"
	for _, c := range components {
		text += "  - " + path("components/"+c) + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program, "kustomize", dir).CombinedOutput()
	return string(out), err
}

// object returns an object of what kustomize prints, with two spaces more than it had.
func object(t *testing.T, all, kind, name string) string {
	t.Helper()
	for text := range strings.SplitSeq(all, "\n---\n") {
		if strings.Contains("\n"+text, "\nkind: "+kind+"\n") && strings.Contains(text, "\n  name: "+name+"\n") {
			return text
		}
	}
	t.Fatalf("there is no %s %s in\n%s", kind, name, all)
	return ""
}

// TestTLSInRouter: with the component tls-in-router there is nothing of nginx, and all that
// the pod had for its clients is as before: the ports of the Service and how it ends.
func TestTLSInRouter(t *testing.T) {
	with, err := kustomize(t, "tls-in-router")
	if err != nil {
		t.Fatalf("%v\n%s", err, with)
	}
	without, err := kustomize(t, "ipv6")
	if err != nil {
		t.Fatalf("%v\n%s", err, without)
	}
	pod, before := object(t, with, "Deployment", "router"), object(t, without, "Deployment", "router")
	for _, gone := range []string{"name: nginx\n", "unprivileged", "/run/router", "emptyDir", "name: page\n"} {
		if strings.Contains(pod, gone) || !strings.Contains(before, gone) {
			t.Errorf("%q is in the pod: %t, and without the component: %t; want false and true",
				gone, strings.Contains(pod, gone), strings.Contains(before, gone))
		}
	}
	if strings.Contains(with, "nginx.conf") || strings.Contains(with, "index.html") {
		t.Error("nginx's files or the page are left")
	}
	for _, stays := range []string{
		"terminationGracePeriodSeconds: 60", "maxUnavailable: 0", "- -drain-delay=5s", "- -drain-duration=30s",
		"path: /readyz", "path: /healthz", "runAsNonRoot: true", "readOnlyRootFilesystem: true",
		"allowPrivilegeEscalation: false", "fsGroup: 65532", "secretName: nginx-tls", "defaultMode: 288", // 0440
		"ROUTER_POD_NAME", "ROUTER_POD_UID", "router-handoff: all",
	} {
		if !strings.Contains(pod, stays) || !strings.Contains(before, stays) {
			t.Errorf("%q is in the pod: %t, and without the component: %t; want true",
				stays, strings.Contains(pod, stays), strings.Contains(before, stays))
		}
	}
	for _, kind := range []string{"Service", "NetworkPolicy"} {
		policy := regexp.MustCompile(`(?m)^  ipFamilyPolicy: .*\n`) // of the component ipv6
		got, want := object(t, with, kind, "router"), policy.ReplaceAllString(object(t, without, kind, "router"), "")
		if got != want {
			t.Errorf("the %s is\n%s\nwant\n%s", kind, got, want)
		}
	}
	wantPorts(t, pod)
}

// TestPortNames: each name of a port that the Service and the NetworkPolicy have is that of one
// port, where all versions of Kubernetes and all network plugins look for it: not in
// initContainers, where nginx is.
func TestPortNames(t *testing.T) {
	for _, component := range []string{"ipv6", "proxy-protocol", "no-tls", "tls-in-router"} {
		all, err := kustomize(t, component)
		if err != nil {
			t.Fatalf("%v\n%s", err, all)
		}
		_, containers, _ := strings.Cut(object(t, all, "Deployment", "router"), "\n      containers:\n")
		containers, _, _ = strings.Cut(containers, "\n      initContainers:\n")
		for kind, key := range map[string]string{"Service": "targetPort", "NetworkPolicy": "port"} {
			found := regexp.MustCompile(`(?m)^ +(?:- )?`+key+`: (\S+)$`).FindAllStringSubmatch(object(t, all, kind, "router"), -1)
			if len(found) == 0 {
				t.Errorf("%s: the %s has no port", component, kind)
			}
			for _, port := range found {
				if n := strings.Count(containers, "\n          name: "+port[1]+"\n"); n != 1 {
					t.Errorf("%s: the %s has the port %s, which is that of %d ports of spec.containers, want 1", component, kind, port[1], n)
				}
			}
		}
	}
}

// wantPorts checks that each port at which the router listens has the name that the Service
// has, needs no right, and is reserved.
func wantPorts(t *testing.T, pod string) {
	t.Helper()
	reserved := regexp.MustCompile(`local_reserved_ports\n +value: (\d+)-(\d+)\n`).FindStringSubmatch(pod)
	if reserved == nil {
		t.Fatalf("no ports are reserved:\n%s", pod)
	}
	for flag, name := range map[string]string{"listen": "https", "redirect": "http", "admin": "admin"} {
		m := regexp.MustCompile(`- -` + flag + `=:(\d{4})\n`).FindStringSubmatch(pod)
		if m == nil {
			t.Errorf("no -%s above port 999", flag)
			continue
		}
		if port := m[1]; port < reserved[1] || port > reserved[2] || port < "1024" {
			t.Errorf("-%s is port %s, which is not reserved (%s-%s)", flag, port, reserved[1], reserved[2])
		}
		if !strings.Contains(pod, "- containerPort: "+m[1]+"\n          name: "+name+"\n") {
			t.Errorf("port %s of -%s does not have the name %s:\n%s", m[1], flag, name, pod)
		}
	}
}

// TestComponentsExclude: what needs nginx cannot be with what removes it, in either order.
func TestComponentsExclude(t *testing.T) {
	removes, needs := []string{"no-tls", "tls-in-router"}, []string{"auth", "proxy-protocol"}
	pairs := [][]string{{"no-tls", "tls-in-router"}, {"tls-in-router", "no-tls"}}
	for _, one := range removes {
		for _, other := range needs {
			pairs = append(pairs, []string{one, other}, []string{other, one})
		}
	}
	for _, pair := range pairs {
		if out, err := kustomize(t, pair...); err == nil || !strings.Contains(out, "test") {
			t.Errorf("%s: error %v\n%.2000s", pair, err, out)
		}
	}
}

// TestDeployComponents: deploy.sh adds the components that DEPLOY_WITH names, and refuses others.
func TestDeployComponents(t *testing.T) {
	for components, want := range map[string]string{
		"":                   "components: []\n",
		"tls-in-router":      "components: [../../k8s/components/tls-in-router]\n",
		"ipv6 tls-in-router": "components: [../../k8s/components/ipv6, ../../k8s/components/tls-in-router]\n",
	} {
		dir := copyScripts(t)
		deploy(t, dir, "deploy", "DEPLOY_WITH="+components)
		if got := text(t, filepath.Join(dir, "bin", "deploy", "kustomization.yaml")); !strings.Contains(got, want) {
			t.Errorf("DEPLOY_WITH=%q makes\n%s", components, got)
		}
	}
	out, err := deploy(t, copyScripts(t), "deploy", "DEPLOY_WITH=no-such")
	if err == nil || !strings.Contains(out, "there is no ") || strings.Contains(out, "apply -k") {
		t.Errorf("deploy.sh: %v\n%s", err, out)
	}
}
