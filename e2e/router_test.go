package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// router is the admin port of one router.
type router struct {
	pod  string
	base string // http://10.244.0.7:8001
}

// ownership is what /owner answers.
type ownership struct {
	Owner            string
	Why              string
	PodUID           string `json:"pod_uid"`
	Address          string
	Ready            bool
	OverridesVersion string `json:"overrides_version"`
	HeldByStep       int64  `json:"held_by_step"`
	Rejected         []struct {
		Source, Value, Expected string
		InForce                 string `json:"in_force"`
	}
}

// get reads a page of the admin port. An answer other than 200 is an error
// with its text.
func (r *router) get(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", fmt.Errorf("%s: %w", r.pod, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s", strings.TrimSpace(resp.Status+" "+string(body)))
	}
	if err != nil {
		return "", fmt.Errorf("%s: GET %s: %w", r.pod, path, err)
	}
	return string(body), nil
}

func (r *router) owner(ctx context.Context, namespace string) (ownership, error) {
	body, err := r.get(ctx, "/owner?namespace="+url.QueryEscape(namespace))
	if err != nil {
		return ownership{}, err
	}
	var o ownership
	if err := json.Unmarshal([]byte(body), &o); err != nil {
		return ownership{}, fmt.Errorf("%s: /owner says %q: %w", r.pod, body, err)
	}
	return o, nil
}

// owns is nil if the router says that this backend owns the namespace, for
// this reason.
func (r *router) owns(ctx context.Context, namespace, backend, why string) error {
	o, err := r.owner(ctx, namespace)
	if err != nil {
		return err
	}
	if o.Owner != backend || o.Why != why {
		return fmt.Errorf("%s says %s belongs to %q by %q, want %q by %q", r.pod, namespace, o.Owner, o.Why, backend, why)
	}
	return nil
}

// hasTable is nil if the router's table is that of this version.
func (r *router) hasTable(ctx context.Context, version string) error {
	m, err := r.metrics(ctx)
	if err != nil {
		return err
	}
	if got := m.label("router_table_info", "overrides_version"); got != version {
		return fmt.Errorf("%s has version %q, want %q", r.pod, got, version)
	}
	return nil
}

// metrics is what /metrics answers, by name.
type metrics map[string]*dto.MetricFamily

// metrics reads /metrics with Prometheus's own parser.
func (r *router) metrics(ctx context.Context) (metrics, error) {
	body, err := r.get(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%s: /metrics: %w", r.pod, err)
	}
	return families, nil
}

// sum adds up the samples of a metric that have the given labels, name and
// value by turns.
func (m metrics) sum(name string, labels ...string) float64 {
	var sum float64
	for _, sample := range m[name].GetMetric() {
		if matches(sample, labels) {
			sum += sample.GetCounter().GetValue() + sample.GetGauge().GetValue() + sample.GetUntyped().GetValue()
		}
	}
	return sum
}

// label returns the value of a label of the first sample of a metric.
func (m metrics) label(name, label string) string {
	for _, sample := range m[name].GetMetric() {
		for _, pair := range sample.GetLabel() {
			if pair.GetName() == label {
				return pair.GetValue()
			}
		}
	}
	return ""
}

func matches(sample *dto.Metric, labels []string) bool {
	values := map[string]string{}
	for _, pair := range sample.GetLabel() {
		values[pair.GetName()] = pair.GetValue()
	}
	for i := 0; i < len(labels); i += 2 {
		if values[labels[i]] != labels[i+1] {
			return false
		}
	}
	return true
}

// sumOver adds up a metric over all routers.
func sumOver(ctx context.Context, routers []*router, name string, labels ...string) (float64, error) {
	var sum float64
	for _, r := range routers {
		m, err := r.metrics(ctx)
		if err != nil {
			return 0, err
		}
		sum += m.sum(name, labels...)
	}
	return sum, nil
}

// mustSum is sumOver whose failure is the test's.
func (s *system) mustSum(routers []*router, name string, labels ...string) float64 {
	s.t.Helper()
	sum, err := sumOver(s.t.Context(), routers, name, labels...)
	if err != nil {
		s.t.Fatal(err)
	}
	return sum
}

// mustOwner returns who owns the namespace, on which all routers must agree.
func (s *system) mustOwner(namespace string) ownership {
	s.t.Helper()
	var first ownership
	for i, r := range s.routers(s.t.Context()) {
		o, err := r.owner(s.t.Context(), namespace)
		switch {
		case err != nil:
			s.t.Fatal(err)
		case i == 0:
			first = o
		case o.Owner != first.Owner || o.Why != first.Why:
			s.t.Fatalf("routers do not agree on %s: %+v and %+v", namespace, first, o)
		}
	}
	return first
}
