package e2e

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// appImage is the image of e2e/apps/server.js.
const appImage = "localhost:5000/router-apps:latest"

// TestApps plays applications as they come through nginx and two routers, in a Kubernetes
// namespace of their own. With E2E_APPS=alone there is one router and no
// cluster.
func TestApps(t *testing.T) {
	needNode(t)
	if os.Getenv("E2E_APPS") == "alone" {
		startApps(t, appFlags(t)...).playAll(t)
		return
	}
	if _, err := exec.LookPath("buildah"); err != nil {
		t.Skip("nothing tested: buildah is not installed")
	}
	newSystem(t).deployApps().appStage().playAll(t)
}

// deployApps deploys e2e/apps to a new Kubernetes namespace, and returns the system there.
func (s *system) deployApps() *system {
	s.t.Helper()
	s.run(filepath.Join(s.root, "e2e/apps/image.sh"), appImage)
	s.run(filepath.Join(s.root, "k8s/image.sh"), "load", appImage)
	namespace := s.newNamespace(s.t)
	secret, err := s.client.CoreV1().Secrets(s.namespace).Get(s.t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	secret.ObjectMeta = metav1.ObjectMeta{Name: tlsSecret}
	if _, err := s.client.CoreV1().Secrets(namespace).Create(s.t.Context(), secret, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	in := "--namespace=" + namespace
	s.mustKubectl("", in, "create", "--save-config", "-f", filepath.Join(s.root, "k8s/overwriting.yaml"))
	s.mustKubectl("", in, "apply", "-k", filepath.Join(s.root, "e2e/apps"))
	for _, object := range []string{"statefulset/backend", "deployment/router"} {
		s.mustKubectl("", in, "rollout", "status", "--timeout=4m", object)
	}
	apps := s.in(namespace)
	apps.explainHandoff()
	apps.awaitBackends(4) // the first table has those that were ready
	return apps
}

// run runs a program that must succeed.
func (s *system) run(program string, args ...string) {
	s.t.Helper()
	if out, err := exec.CommandContext(s.t.Context(), program, args...).CombinedOutput(); err != nil {
		s.t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
}

// appStage returns the stage of what deployApps has deployed.
func (s *system) appStage() *appStage {
	s.t.Helper()
	address, err := s.front.address(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(address)
	base := "https://" + hostName
	if port != "443" {
		base += ":" + port
	}
	overrides := map[string]string{}
	return &appStage{
		base:  base,
		env:   []string{"CLIENT_ADDRESS=" + host, "NODE_EXTRA_CA_CERTS=" + filepath.Join(s.root, "certs/ca.crt")},
		owner: func(namespace string) string { return s.mustOwner(namespace).Owner },
		move: func(owners map[string]string) {
			maps.Copy(overrides, owners)
			s.mustKubectl(manifestOf(s.t, configMap, nil, overrides), "--namespace="+s.namespace, "apply", "-f", "-")
		},
		handled: func() (all []appMessage) {
			for i := range 4 {
				log := s.mustKubectl("", "--namespace="+s.namespace, "logs", fmt.Sprintf("backend-%d", i))
				all = append(all, messagesIn(strings.Split(log, "\n"))...)
			}
			return all
		},
		browser: func() context.Context { return s.newBrowser() },
	}
}
