package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// TestDeployWithoutClusterRights deploys as somebody who may do everything in
// the Kubernetes namespace, and nothing outside: that goes on without the policy,
// and says so.
func TestDeployWithoutClusterRights(t *testing.T) {
	const user = prefix + "developer"
	s := newSystem(t)
	s.allowAll(user)
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.root, "k8s", "deploy.sh"))
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.kubeconfigOf(user))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("deploy.sh: %v\n%s", err, out)
	}
	for _, want := range []string{"validatingadmissionpolicies.admissionregistration.k8s.io", `User "` + user + `" cannot`, "going on without the admission policy"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("deploy.sh did not say %q:\n%s", want, out)
		}
	}
}

// TestDeployWrongPair: a certificate and a key that do not fit are no success, but
// the name of what is wrong.
func TestDeployWrongPair(t *testing.T) {
	s := newSystem(t)
	cert, _ := s.newCertificate()
	_, key := s.newCertificate()
	for name, tt := range map[string]struct {
		data map[string][]byte
		want string
	}{
		"another key":    {map[string][]byte{"tls.crt": cert, "tls.key": key}, "tls.key in secret/nginx-tls is not the key of the certificate in tls.crt"},
		"no certificate": {map[string][]byte{"tls.crt": key, "tls.key": key}, "tls.crt in secret/nginx-tls is no certificate"},
		"no key":         {map[string][]byte{"tls.crt": cert, "tls.key": cert}, "tls.key in secret/nginx-tls is no key"},
	} {
		t.Run(name, func(t *testing.T) {
			namespace := s.newNamespace(t)
			secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: tlsSecret}, Type: corev1.SecretTypeTLS, Data: tt.data}
			if _, err := s.client.CoreV1().Secrets(namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			out, err := s.deploySh(t, namespace)
			if err == nil || !strings.Contains(out, tt.want) {
				t.Errorf("deploy.sh: %v, want %q:\n%s", err, tt.want, out)
			}
			deployments, err := s.client.AppsV1().Deployments(namespace).List(t.Context(), metav1.ListOptions{})
			if err != nil || len(deployments.Items) > 0 {
				t.Errorf("%d deployments (error %v), want none", len(deployments.Items), err)
			}
		})
	}
}

// TestUndeploy removes what the repository has, of every version, and keeps what is
// the user's, whatever its labels say.
func TestUndeploy(t *testing.T) {
	s := newSystem(t)
	namespace := s.newNamespace(t)
	labels := map[string]string{"app.kubernetes.io/part-of": "router", "app.kubernetes.io/name": "router"}
	configMaps := s.client.CoreV1().ConfigMaps(namespace)
	for _, name := range []string{configMap, "more-overrides", "nginx-mine", "nginx-production", "nginx-5bt8b6cf9k", handoffObject} {
		if _, err := configMaps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: tlsSecret, Labels: labels}}
	if _, err := s.client.CoreV1().Secrets(namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again, with nothing left
		if out, err := s.deploySh(t, namespace, "undeploy"); err != nil {
			t.Fatalf("deploy.sh undeploy: %v\n%s", err, out)
		}
		for name, kept := range map[string]bool{configMap: true, "more-overrides": true, "nginx-mine": true, "nginx-production": true, "nginx-5bt8b6cf9k": false, handoffObject: false} {
			_, err := configMaps.Get(t.Context(), name, metav1.GetOptions{})
			if (err == nil) != kept || err != nil && !apierrors.IsNotFound(err) {
				t.Errorf("configmap/%s: %v, want it kept: %t", name, err, kept)
			}
		}
		if _, err := s.client.CoreV1().Secrets(namespace).Get(t.Context(), tlsSecret, metav1.GetOptions{}); err != nil {
			t.Errorf("secret/%s: %v", tlsSecret, err)
		}
	}
}

// TestDeployKeepsHandoff: what routers have written into their object stays as it is when
// the manifests are applied again, as the client's apply and as the server's.
func TestDeployKeepsHandoff(t *testing.T) {
	s := newSystem(t)
	namespace := s.newNamespace(t)
	manifest := filepath.Join(s.root, "k8s", "base", "handoff.yaml")
	apply := func(args ...string) {
		t.Helper()
		s.mustKubectl("", append([]string{"--namespace=" + namespace, "apply", "-f", manifest}, args...)...)
	}
	configMaps := s.client.CoreV1().ConfigMaps(namespace)
	apply()
	const data = `{"data":{"plan":"p","router-a":"a"}}`
	if _, err := configMaps.Patch(t.Context(), handoffObject, types.MergePatchType, []byte(data), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{nil, {"--server-side", "--force-conflicts"}, nil} {
		apply(args...)
		got, err := configMaps.Get(t.Context(), handoffObject, metav1.GetOptions{})
		if err != nil || got.Data["plan"] != "p" || got.Data["router-a"] != "a" || len(got.Data) != 2 {
			t.Errorf("after kubectl apply %v: %q (error %v), want what the routers wrote", args, got.Data, err)
		}
	}
}

// newNamespace makes a Kubernetes namespace until the test ends.
func (s *system) newNamespace(t *testing.T) string {
	t.Helper()
	namespaces := s.client.CoreV1().Namespaces()
	made, err := namespaces.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: prefix}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := namespaces.Delete(context.Background(), made.Name, metav1.DeleteOptions{}); err != nil {
			t.Errorf("the Kubernetes namespace %s could not be removed: %v", made.Name, err)
		}
	})
	return made.Name
}

// overlay makes a kustomization of this text in a directory below bin, until the test ends.
// ../deploy is what "make deploy" has applied: the demo, with the images' tags.
func (s *system) overlay(name, text string) (dir string) {
	s.t.Helper()
	dir, err := os.MkdirTemp(filepath.Join(s.root, "bin"), "e2e-"+name)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return dir
}

// deploySh runs k8s/deploy.sh about a Kubernetes namespace, and returns what it said.
func (s *system) deploySh(t *testing.T, namespace string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.root, "k8s", "deploy.sh"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.kubeconfig(func(c *api.Config) { c.Contexts[c.CurrentContext].Namespace = namespace }))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// allowAll lets a user do everything in the Kubernetes namespace until the test
// ends.
func (s *system) allowAll(user string) {
	s.t.Helper()
	bindings := s.client.RbacV1().RoleBindings(s.namespace)
	remove := func(ctx context.Context) {
		if err := bindings.Delete(ctx, user, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			s.t.Errorf("RoleBinding %s could not be removed: %v", user, err)
		}
	}
	remove(s.t.Context())
	_, err := bindings.Create(s.t.Context(), &rbac.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:    rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbac.Subject{{APIGroup: rbac.GroupName, Kind: rbac.UserKind, Name: user}},
	}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { remove(context.Background()) })
}

// kubeconfigOf makes a copy of the kubeconfig, with which one is another user.
func (s *system) kubeconfigOf(user string) (file string) {
	s.t.Helper()
	return s.kubeconfig(func(c *api.Config) {
		for _, info := range c.AuthInfos { // one
			info.Impersonate = user
		}
	})
}

// kubeconfig makes a copy of the current context's kubeconfig, with a change.
func (s *system) kubeconfig(change func(*api.Config)) (file string) {
	s.t.Helper()
	kubeconfig, err := clientcmd.NewDefaultClientConfigLoadingRules().Load()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := api.MinifyConfig(kubeconfig); err != nil {
		s.t.Fatal(err)
	}
	change(kubeconfig)
	file = filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*kubeconfig, file); err != nil {
		s.t.Fatal(err)
	}
	return file
}
