package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	admission "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestPolicy gives the API server overrides that no router could read: it
// refuses them, and names the entry. It takes all others.
func TestPolicy(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	s.awaitPolicy(true)
	const taken = ""
	for name, tt := range map[string]struct {
		data map[string]string
		want string // in kubectl's message
	}{
		"good":               {map[string]string{"a": "backend-0", "b.C_d-1": "backend-10"}, taken},
		"none":               {nil, taken},
		"newlines, a space":  {map[string]string{"a": "backend-0\n", "b": "backend-1\r\n", "c": "backend-2 "}, taken},
		"another name":       {map[string]string{"a": "backend-0", "b": "bakend-2", "c": "backend-1"}, `data has "b":"bakend-2", want`},
		"the first of two":   {map[string]string{"z": "x", "b.C_d-1": "backend-2x", "a": "backend-1"}, `data has "b.C_d-1":"backend-2x", want`},
		"no number":          {map[string]string{"a": "backend-"}, `data has "a":"backend-", want`},
		"negative":           {map[string]string{"a": "backend--1"}, `data has "a":"backend--1", want`},
		"another spelling":   {map[string]string{"a": "backend-02"}, `data has "a":"backend-02", want`},
		"two backends":       {map[string]string{"a": "backend-1 backend-2"}, `data has "a":"backend-1 backend-2", want`},
		"empty":              {map[string]string{"a": ""}, `data has "a":"", want`},
		"looks like entries": {map[string]string{"a": `x":"backend-1`, "b": "backend-1"}, `data has "a":"x`},
		"very long":          {map[string]string{"a": strings.Repeat("x", 100_000)}, `data has "a":"xxx`},
		"a control":          {map[string]string{"a": "\x01" + "2"}, `data has "a":"`},
		"a key with a space": {map[string]string{"a b": "backend-1"}, "a valid config key must consist of"},
		"a key of two dots":  {map[string]string{"..": "backend-1"}, "must not be '..'"},
	} {
		t.Run(name, func(t *testing.T) {
			manifest := manifestOf(t, configMap, nil, tt.data)
			_, err := s.kubectl(t.Context(), manifest, "apply", "--dry-run=server", "-f", "-")
			if message := fmt.Sprint(err); (err == nil) != (tt.want == taken) || !strings.Contains(message, tt.want) {
				t.Errorf("%.500s, want %q", message, tt.want)
			}
		})
	}
}

// TestPolicyScope: which ConfigMaps and requests the policy is about.
func TestPolicyScope(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	s.awaitPolicy(true)
	before, err := s.overrides(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string]string{"a": "bakend-2"}
	if out, err := s.kubectl(t.Context(), manifestOf(t, configMap, nil, bad), "apply", "-f", "-"); err == nil {
		t.Errorf("kubectl apply: %s", out)
	}
	if _, err := s.patch(t.Context(), map[string]any{"a": "bakend-2"}); !apierrors.IsInvalid(err) {
		t.Errorf("PATCH: %v, want an error with the reason Invalid", err)
	}
	if after, err := s.overrides(t.Context()); err != nil || after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the ConfigMap has changed (error %v): %v", err, after)
	}
	for name, tt := range map[string]struct {
		object  corev1.ConfigMap
		refused bool
	}{
		"labelled":       {corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, GenerateName: prefix, Labels: map[string]string{"app": "router-overrides"}}, Data: bad}, true},
		"other label":    {corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, GenerateName: prefix, Labels: map[string]string{"app": "x"}}, Data: bad}, false},
		"other name":     {corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, GenerateName: prefix}, Data: bad}, false},
		"another team's": {corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-public", Name: configMap}, Data: bad}, false},
		"binary": {corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, GenerateName: prefix, Labels: map[string]string{"app": "router-overrides"}},
			BinaryData: map[string][]byte{"a": []byte("backend-2")}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.client.CoreV1().ConfigMaps(tt.object.Namespace).Create(t.Context(), &tt.object, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if apierrors.IsInvalid(err) != tt.refused || (err != nil) != tt.refused {
				t.Errorf("%v, want refused %t", err, tt.refused)
			}
		})
	}
}

// TestPolicyOldEntry: an entry that was bad before the policy locks nothing but the
// data: not the annotations, and not the end of the object.
func TestPolicyOldEntry(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	s.awaitPolicy(true)
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	object, err := configMaps.Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{GenerateName: prefix, Finalizers: []string{"router/e2e"}}, Data: map[string]string{"a": "bakend-2"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	update := func(what, patch string) {
		if _, err := configMaps.Patch(t.Context(), object.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	update("label", `{"metadata":{"labels":{"app":"router-overrides"}}}`)
	update("annotate", `{"metadata":{"annotations":{"a":"b"}}}`)
	if err := configMaps.Delete(t.Context(), object.Name, metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	update("change what is being deleted", `{"data":{"a":"bakend-3"}}`)
	update("remove the finalizer", `{"metadata":{"finalizers":null}}`)
	if _, err := configMaps.Get(t.Context(), object.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// TestPolicyLarge: the policy judges as many entries as a ConfigMap can hold.
func TestPolicyLarge(t *testing.T) {
	const overrides = 39_900
	s := newSystem(t)
	s.keepOverrides()
	s.awaitPolicy(true)
	bytes := s.fill(overrides)
	patched := func() time.Duration {
		c, err := s.patch(t.Context(), map[string]any{prefix + "large": "backend-1"})
		if err != nil {
			t.Fatal(err)
		}
		s.awaitTable(t.Context(), c.version)
		return c.at.Sub(c.sent)
	}
	with := patched()
	odd := fmt.Sprintf("%sbig-%09d", prefix, overrides/2)
	_, err := s.patch(t.Context(), map[string]any{odd: "bakend-3"})
	if want := `data has "` + odd + `":"bakend-3", want`; !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	s.withoutPolicy()
	t.Logf("policy: a PATCH of a ConfigMap with %d overrides (%d bytes of data) took %s, without the policy %s", overrides, bytes, with, patched())
}

// manifestOf is a ConfigMap for kubectl. JSON is YAML, and its strings need no
// second thought about quotes.
func manifestOf(t *testing.T, name string, labels, data map[string]string) string {
	t.Helper()
	manifest, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": name, "labels": labels}, "data": data,
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(manifest)
}

// withoutPolicy lets the API server take every override until the test ends.
func (s *system) withoutPolicy() {
	s.t.Helper()
	policies := s.client.AdmissionregistrationV1().ValidatingAdmissionPolicies()
	name := configMap + "." + s.namespace
	policy, err := policies.Get(s.t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) { // Kubernetes before 1.30, or nobody may write policies
		return
	}
	if err == nil {
		err = policies.Delete(s.t.Context(), name, metav1.DeleteOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		again := &admission.ValidatingAdmissionPolicy{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: policy.Labels, Annotations: policy.Annotations}, Spec: policy.Spec,
		}
		if _, err := policies.Create(context.Background(), again, metav1.CreateOptions{}); err != nil {
			s.t.Errorf("the policy could not be put back: %v", err)
			return
		}
		s.awaitPolicy(true)
	})
	s.awaitPolicy(false)
}

// awaitPolicy waits until the API server refuses bad overrides, or takes them:
// it follows its policies with a delay.
func (s *system) awaitPolicy(refuses bool) {
	s.t.Helper()
	manifest := manifestOf(s.t, configMap, nil, map[string]string{prefix + "policy": "bakend-0"})
	eventually(s.t, 30*time.Second, "the policy (\"make deploy\" applies it)", func() error {
		_, err := s.kubectl(context.Background(), manifest, "apply", "--dry-run=server", "-f", "-")
		if refused := err != nil && strings.Contains(err.Error(), "bakend-0"); refused != refuses {
			return fmt.Errorf("a bad override is refused: %t (%w), want %t", refused, err, refuses)
		}
		return nil
	})
}
