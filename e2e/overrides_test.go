package e2e

import (
	"context"
	"encoding/json"
	"maps"
	"net/http/httptrace"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// configMap is the name of the ConfigMap with the overrides.
const configMap = "overwriting"

// keepOverrides makes the cleanup of the test put the overrides back as they
// are now, and wait until every router has taken them. What a killed run left
// behind is removed.
func (s *system) keepOverrides() {
	s.t.Helper()
	before, err := s.overrides(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	maps.DeleteFunc(before.Data, func(namespace, _ string) bool { return strings.HasPrefix(namespace, prefix) })
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		version, err := s.restore(ctx, before)
		if err != nil {
			s.t.Errorf("the overrides could not be put back: %v", err)
			return
		}
		s.awaitTable(ctx, version)
	})
}

// overrides reads the ConfigMap.
func (s *system) overrides(ctx context.Context) (*corev1.ConfigMap, error) {
	return s.client.CoreV1().ConfigMaps(s.namespace).Get(ctx, configMap, metav1.GetOptions{})
}

// restore makes the ConfigMap what it was, whether or not it is there, and
// returns its version.
func (s *system) restore(ctx context.Context, before *corev1.ConfigMap) (string, error) {
	before = before.DeepCopy()
	maps := s.client.CoreV1().ConfigMaps(s.namespace)
	before.ResourceVersion, before.UID = "", ""
	after, err := maps.Update(ctx, before, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		before.ManagedFields = nil
		after, err = maps.Create(ctx, before, metav1.CreateOptions{})
	}
	if err != nil {
		return "", err
	}
	return after.ResourceVersion, nil
}

// change is one PATCH of the overrides, as the API server answered it.
type change struct {
	version string    // of the ConfigMap after it
	sent    time.Time // when the request was made
	at      time.Time // when the first byte of the answer came
}

// patch sets overrides by a merge patch, and removes those whose value is nil.
func (s *system) patch(ctx context.Context, data map[string]any) (change, error) {
	return s.patchMap(ctx, configMap, data)
}

// patchMap does so in the ConfigMap of this name. The answer is without the data,
// which at 1 MiB would take this machine longer than the change.
func (s *system) patchMap(ctx context.Context, name string, data map[string]any) (change, error) {
	body, err := json.Marshal(map[string]any{"data": data})
	if err != nil {
		return change{}, err
	}
	c := change{sent: time.Now()}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotFirstResponseByte: func() { c.at = time.Now() }})
	result := s.client.CoreV1().RESTClient().Patch(types.MergePatchType).Namespace(s.namespace).Resource("configmaps").Name(name).
		SetHeader("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1").Body(body).Do(ctx)
	if err := result.Error(); err != nil { // Raw does not read it
		return change{}, err
	}
	answer, err := result.Raw()
	if err != nil {
		return change{}, err
	}
	var after metav1.PartialObjectMetadata
	if err := json.Unmarshal(answer, &after); err != nil {
		return change{}, err
	}
	c.version = after.ResourceVersion
	return c, nil
}

// apply gives kubectl apply a ConfigMap with these overrides, as a user would.
// It returns the version of the ConfigMap after it and does not wait for the
// routers.
func (s *system) apply(data map[string]string) string {
	s.t.Helper()
	return strings.TrimSpace(s.mustKubectl(manifestOf(s.t, configMap, nil, data),
		"apply", "-f", "-", "-o", "jsonpath={.metadata.resourceVersion}"))
}

// awaitTable waits until the table of every router is that of this version of the
// ConfigMap, and all namespaces have their owners from it.
func (s *system) awaitTable(ctx context.Context, version string) {
	s.t.Helper()
	eventually(s.t, 30*time.Second, "the routers' tables", func() error { return s.atRest(ctx, version) })
}
