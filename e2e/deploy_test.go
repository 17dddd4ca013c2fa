package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
	for _, want := range []string{"validatingadmissionpolicies.admissionregistration.k8s.io", `User "` + user + `" cannot`, "going on without k8s/policy.yaml"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("deploy.sh did not say %q:\n%s", want, out)
		}
	}
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
	kubeconfig, err := clientcmd.NewDefaultClientConfigLoadingRules().Load()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := api.MinifyConfig(kubeconfig); err != nil {
		s.t.Fatal(err)
	}
	for _, info := range kubeconfig.AuthInfos { // one
		info.Impersonate = user
	}
	file = filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*kubeconfig, file); err != nil {
		s.t.Fatal(err)
	}
	return file
}
