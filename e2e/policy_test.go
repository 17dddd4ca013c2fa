package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// policyNames is the ConfigMap without which the policy checks nothing in a Kubernetes
// namespace.
const policyNames = "router-policy"

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
		"white space":        {map[string]string{"a": " \tbackend-0\n\n", "b": "\u3000backend-1\v\f\u0085"}, taken},
		"a narrow space":     {map[string]string{"a": "backend-0", "b": "backend-1\u200b"}, `data has "b":"backend-1`},
		"the highest":        {map[string]string{"a": "backend-999999999"}, taken},
		"beyond the highest": {map[string]string{"a": "backend-1000000000"}, `data has "a":"backend-1000000000": the value must be`},
		"quotes":             {map[string]string{"ns-01": `"backend-2"`}, `data has "ns-01":'"backend-2"': the value must be the name of a backend, such as "backend-2", without quotes in the value`},
		"a backslash":        {map[string]string{"a": `backend-1\`, "b": "backend-1"}, `data has "a":"backend-1\\": the value must be`},
		"another name":       {map[string]string{"a": "backend-0", "b": "bakend-2", "c": "backend-1"}, `data has "b":"bakend-2": the value must be`},
		"the first of two":   {map[string]string{"z": "x", "b.C_d-1": "backend-2x", "a": "backend-1"}, `data has "b.C_d-1":"backend-2x": the value must be`},
		"no number":          {map[string]string{"a": "backend-"}, `data has "a":"backend-": the value must be`},
		"negative":           {map[string]string{"a": "backend--1"}, `data has "a":"backend--1": the value must be`},
		"another spelling":   {map[string]string{"a": "backend-02"}, `data has "a":"backend-02": the value must be`},
		"two backends":       {map[string]string{"a": "backend-1 backend-2"}, `data has "a":"backend-1 backend-2": the value must be`},
		"empty":              {map[string]string{"a": ""}, `data has "a":"": the value must be`},
		"looks like entries": {map[string]string{"a": `x":"backend-1`, "b": "backend-1"}, `data has "a":'x":"backend-1': the value must be`},
		"very long":          {map[string]string{"a": strings.Repeat("x", 100_000)}, `data has "a":"xxx`},
		"a control":          {map[string]string{"a": "\x01" + "2"}, `data has "a":"`},
		"controls":           {map[string]string{"a": "\x01" + "2\x03", "b": "\x02"}, `data has "a":"`},
		"escaped keys":       {map[string]string{"my_x20room": "backend-0", "caf_xC3_xA9": "backend-1", "_x2E.data": "backend-2 ", "_x5Fx20": "backend-3", "_xc3": "backend-4"}, taken},
		"an escaped letter":  {map[string]string{"a": "backend-0", "b_x41": "backend-1"}, `data has the key "b_x41": an escape must be`},
		"an escaped digit":   {map[string]string{"b_x30_x20": "backend-1\n"}, `data has the key "b_x30_x20": an escape must be`},
		"an escaped slash":   {map[string]string{"a_x2Fb": "backend-1"}, `data has the key "a_x2Fb": an escape must be`},
		"an escaped control": {map[string]string{"a_x00": "backend-1"}, `data has the key "a_x00": an escape must be`},
		"an escaped dash":    {map[string]string{"a_x5Fb": "backend-1"}, `data has the key "a_x5Fb": an escape must be`},
		"an escaped dot":     {map[string]string{"a_x2E.": "backend-1"}, `data has the key "a_x2E.": an escape must be`},
		"two dots, escaped":  {map[string]string{"_x2E.": "backend-1"}, `data has the key "_x2E.": an escape must be`},
		"escapes in a value": {map[string]string{"a": "backend_x41", "b": "backend-1"}, `data has "a":"backend_x41": the value must be`},
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

// Overrides that no router has read yet are judged when they get the label.
func TestPolicyJudgesWhatIsLabelled(t *testing.T) {
	s := newSystem(t)
	s.awaitPolicy(true)
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	for value, refused := range map[string]bool{"bakend-2": true, "backend-2": false} {
		object, err := configMaps.Create(t.Context(), &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{GenerateName: prefix}, Data: map[string]string{"a": value}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { configMaps.Delete(context.Background(), object.Name, metav1.DeleteOptions{}) })
		_, err = configMaps.Patch(t.Context(), object.Name, types.MergePatchType,
			[]byte(`{"metadata":{"labels":{"app":"router-overrides"}}}`), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		if refused != (err != nil) || refused && !strings.Contains(err.Error(), `data has "a":"bakend-2": the value must be`) {
			t.Errorf("labelled with %q: %v, want refused %t", value, err, refused)
		}
	}
}

// TestPolicyAsRouter gives random values to the API server and to the router's
// program: both take the same, and the API server names the entry.
func TestPolicyAsRouter(t *testing.T) {
	const values = 1000
	s := newSystem(t)
	s.keepOverrides()
	s.awaitPolicy(true)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	data := map[string]string{}
	var keys []string
	for i := range values {
		key := fmt.Sprintf("backend-%d", i)
		keys, data[key] = append(keys, key), randomValue(random)
	}
	routers := routerTakes(t, data)
	var taken atomic.Int64
	err := forEach(values, 8, func(i int) error {
		key, value := keys[i], data[keys[i]]
		object := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{GenerateName: prefix, Labels: map[string]string{"app": "router-overrides"}},
			Data:       map[string]string{"a": "backend-0", key: value, "z": " backend-1"},
		}
		_, err := s.client.CoreV1().ConfigMaps(s.namespace).Create(t.Context(), object, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		switch {
		case err == nil && routers[key]:
			taken.Add(1)
			return nil
		case err != nil && !routers[key] && apierrors.IsInvalid(err) && strings.Contains(err.Error(), `data has "`+key+`":`):
			return nil
		}
		return fmt.Errorf("%.400q: %.400v; the router takes it: %t", value, err, routers[key])
	})
	if err != nil {
		t.Error(err)
	}
	if n := taken.Load(); n < values/5 || n > values*4/5 {
		t.Errorf("%d of %d values are taken, want some of both kinds", n, values)
	}
}

// randomValue is the name of a backend or something like it, perhaps with white
// space or what looks like it. Numbers stay below 1,000 or have ten digits, so that
// how many backends there are is not asked; 1,024 bytes are what the router reads
// of a file.
func randomValue(random *rand.Rand) string {
	spaces := []string{
		" ", "\t", "\n", "\r\n", "\v", "\f", "\u0085", "\u00a0", "\u1680", "\u2000", "\u2007", "\u200a", "\u2028", "\u2029",
		"\u202f", "\u205f", "\u3000", strings.Repeat(" \n", 100),
	}
	odd := []string{
		"\u200b", "\ufeff", "\u180e", "\x00", "\x01", "\x02", "\x03", "\x1f", "Backend-", "backend", "x", `"`, `\`, "'", `","b":"`, `", "`, `"}`,
		"é", "\u0663", "\U0001f600", `\n`, `\u2003`, "1234567890", "-", "+", " ", "\t", strings.Repeat("9", 300), strings.Repeat("x", 600),
	}
	some := func(of []string, most int) (text string) {
		for range random.IntN(most + 1) {
			text += of[random.IntN(len(of))]
		}
		return text
	}
	value := "backend-" + some([]string{"0", "1", "7"}, 3)
	if random.IntN(3) == 0 {
		at := random.IntN(len(value) + 1)
		value = value[:at] + some(odd, 2) + value[at:]
	}
	return some(spaces, 2) + value + some(spaces, 2)
}

// routerTakes asks the router's program which overrides it can read.
func routerTakes(t *testing.T, data map[string]string) map[string]bool {
	t.Helper()
	folder := t.TempDir()
	args := []string{"owner", "-overrides", folder, "-replicas", "1000"}
	for key, value := range data {
		if err := os.WriteFile(filepath.Join(folder, key), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, key)
	}
	out, err := exec.CommandContext(t.Context(), build(t, "."), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("router owner: %v\n%s", err, out)
	}
	takes := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		switch fields := strings.Fields(line); {
		case len(fields) == 3 && fields[2] == "override":
			takes[fields[0]] = true
		case len(fields) == 2 && fields[1] == "unresolved":
			takes[fields[0]] = false
		}
	}
	if len(takes) != len(data) {
		t.Fatalf("router owner tells of %d of %d namespaces:\n%.2000s", len(takes), len(data), out)
	}
	return takes
}

// TestPolicyOldEntry: entries that were bad before the policy lock nothing but
// themselves: not the other entries, not the annotations and finalizers, and not the
// end of the object.
func TestPolicyOldEntry(t *testing.T) {
	for name, others := range map[string]int{"few entries": 0, "many entries": 39_900} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.keepOverrides()
			s.awaitPolicy(true)
			testOldEntry(t, s, s.oldEntries(others))
		})
	}
}

// oldEntries makes a ConfigMap until the test ends that the policy would refuse: two
// bad entries, a binary one, a good one and others.
func (s *system) oldEntries(others int) (name string) {
	s.t.Helper()
	restore := s.withoutPolicy()
	defer restore()
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	object, err := configMaps.Create(s.t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{GenerateName: prefix, Finalizers: []string{"router/e2e", "router/e2e-2"},
			Labels: map[string]string{"app": "router-overrides"}},
		BinaryData: map[string][]byte{"binary": []byte("backend-1")},
	}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { // of a test that failed
		configMaps.Delete(context.Background(), object.Name, metav1.DeleteOptions{})
		configMaps.Patch(context.Background(), object.Name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	})
	if err := s.untrack(object.Name); err != nil {
		s.t.Fatal(err)
	}
	data := map[string]string{"a": "bakend-2", "good": "backend-1", "quoted": `"backend-1"`}
	for i := range others {
		data[fmt.Sprintf("%sbig-%09d", prefix, i)] = fmt.Sprintf("backend-%d", i%4)
	}
	patch, err := json.Marshal(map[string]any{"data": data})
	if err == nil {
		_, err = configMaps.Patch(s.t.Context(), object.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return object.Name
}

// testOldEntry changes what oldEntries made, and deletes it.
func testOldEntry(t *testing.T, s *system, name string) {
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	const taken = ""
	update := func(patch, want string) {
		t.Helper()
		_, err := configMaps.Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		if (err == nil) != (want == taken) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", patch, err, want)
		}
	}
	update(`{"metadata":{"annotations":{"a":"b"}}}`, taken)
	update(`{"metadata":{"finalizers":["router/e2e"]}}`, taken)
	update(`{"data":{"good":"backend-2","zz":"backend-0"}}`, taken)
	update(`{"data":{"zz":null}}`, taken)
	update(`{"data":{"good":"backend-"}}`, `data has "good":"backend-": the value must be`)
	update(`{"data":{"zz":"bakend-2"}}`, `data has "zz":"bakend-2": the value must be`)
	update(`{"data":{"a":"bakend-3"}}`, `data has "a":"bakend-3": the value must be`)
	update(`{"data":{"quoted":"backend-1"}}`, taken)
	update(`{"binaryData":{"binary":"eA=="}}`, "binaryData cannot hold overrides")
	update(`{"binaryData":{"more":"eA=="}}`, "binaryData cannot hold overrides")
	foreground := metav1.DeletePropagationForeground
	if err := configMaps.Delete(t.Context(), name, metav1.DeleteOptions{PropagationPolicy: &foreground}); err != nil {
		t.Error(err)
	}
	eventually(t, 30*time.Second, "the garbage collector to be done", func() error {
		object, err := configMaps.Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && len(object.Finalizers) != 1 {
			err = fmt.Errorf("finalizers %q", object.Finalizers)
		}
		return err
	})
	update(`{"data":{"a":"bakend-3"}}`, taken)
	update(`{"metadata":{"finalizers":null}}`, taken)
	if _, err := configMaps.Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
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
	if want := `data has "` + odd + `":"bakend-3": the value must be`; !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), want) {
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

// withoutPolicy lets the API server take every override until restore is called, or the
// test ends.
func (s *system) withoutPolicy() (restore func()) {
	s.t.Helper()
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	names, err := configMaps.Get(s.t.Context(), policyNames, metav1.GetOptions{})
	if err == nil {
		err = configMaps.Delete(s.t.Context(), policyNames, metav1.DeleteOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	restore = sync.OnceFunc(func() {
		again := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: policyNames, Labels: names.Labels, Annotations: names.Annotations}, Data: names.Data,
		}
		if _, err := configMaps.Create(context.Background(), again, metav1.CreateOptions{}); err != nil {
			s.t.Errorf("the policy's names could not be put back: %v", err)
			return
		}
		s.awaitPolicy(true)
	})
	s.t.Cleanup(restore)
	s.awaitPolicy(false)
	return restore
}

// awaitPolicy waits until the API server refuses bad overrides, or takes them:
// it follows its policies with a delay.
func (s *system) awaitPolicy(refuses bool) {
	s.t.Helper()
	manifest := manifestOf(s.t, configMap, nil, map[string]string{prefix + "policy": "bakend-0"})
	eventually(s.t, 30*time.Second, "the policy (\"make deploy\" applies it)", func() error {
		_, err := s.kubectl(context.Background(), manifest, "--namespace="+s.namespace, "apply", "--dry-run=server", "-f", "-")
		if refused := err != nil && strings.Contains(err.Error(), "bakend-0"); refused != refuses {
			return fmt.Errorf("a bad override is refused: %t (%w), want %t", refused, err, refuses)
		}
		return nil
	})
}
