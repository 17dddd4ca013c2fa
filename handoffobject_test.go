package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// randomOrdinals returns a sorted set of up to 4 ordinals, nil if it is empty.
func randomOrdinals(r *rand.Rand) (set []int) {
	for range r.IntN(5) {
		set = append(set, []int{r.IntN(10), r.IntN(maxOrdinal + 1), maxOrdinal}[r.IntN(3)])
	}
	slices.Sort(set)
	return slices.Compact(set)
}

// randomPlace returns a place, or allPlaces.
func randomPlace(r *rand.Rand) uint64 { return []uint64{0, allPlaces, r.Uint64() >> 1}[r.IntN(3)] }

// randomPlan returns any plan that the object can hold.
func randomPlan(r *rand.Rand) *sharedPlan {
	p := &sharedPlan{
		handoffPlan: handoffPlan{step: 1 + r.Int64N(maxStep), allHeld: r.IntN(2) == 0},
		writes:      1 + r.Int64N(maxStep),
		epoch:       fmt.Sprintf("%x.%d", r.Uint64(), r.Int64()),
		members:     map[string]memberID{},
	}
	p.oldestSince = planStep{fmt.Sprintf("%x.%d", r.Uint64(), r.Int64()), 1 + r.Int64N(p.step)}
	for i := range r.IntN(4) {
		id := memberID{UID: fmt.Sprintf("%x-%x", r.Uint32(), r.Uint32()), Instance: unknownInstance}
		if r.IntN(2) == 0 {
			id.Instance = fmt.Sprintf("%x", r.Uint64())
		}
		p.members[fmt.Sprintf("router-%d", i)] = id
	}
	randomMark := func() mark {
		m := mark{upto: randomPlace(r)}
		if m.upto == 0 {
			return m
		}
		for _, owner := range randomOrdinals(r) {
			if m.behind == nil {
				m.behind = map[int]uint64{}
			}
			m.behind[owner] = r.Uint64N(m.upto)
		}
		return m
	}
	randomBackends := func() ordinalRange {
		first := []int{0, r.IntN(10), maxOrdinal}[r.IntN(3)]
		return ordinalRange{first, 1 + r.IntN(maxOrdinal-first+1)}
	}
	p.records = []planRecord{{ownersHash: r.Uint64(), backends: randomBackends()}}
	for range r.IntN(maxRecords) {
		before := randomMark()
		p.records = append(p.records, planRecord{r.Uint64(), randomBackends(), before, before})
	}
	if newest := p.newestRecord(); len(p.records) > 1 {
		newest.after = newest.before.advanced(stepLimit{randomPlace(r), randomOrdinals(r)})
	}
	if r.IntN(2) == 0 {
		p.backendRange = &versionedRange{r.IntN(9), 1 + r.IntN(maxOrdinal-9), "a-b", r.Int64()}
	}
	return p
}

// randomAnswer returns any answer that the object can hold.
func randomAnswer(r *rand.Rand) stepAnswer {
	a := stepAnswer{instance: fmt.Sprintf("%x", r.Uint64()), lacksTables: r.IntN(3) == 0, toMove: r.IntN(maxOrdinal + 1)}
	if !a.lacksTables || r.IntN(2) == 0 {
		a.epoch, a.step = fmt.Sprintf("%x.%d", r.Uint64(), r.Int64()), 1+r.Int64N(maxStep)
	}
	if !a.lacksTables || r.IntN(2) == 0 {
		a.ownersHash = 1 + r.Uint64N(1<<64-1)
	}
	if !a.lacksTables {
		a.limit = stepLimit{randomPlace(r), randomOrdinals(r)}
	}
	return a
}

func TestObjectRoundTrip(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 3))
		plan, a := randomPlan(r), randomAnswer(r)
		o := readHandoffObject("u", "7", map[string]string{
			planKey: plan.String(), answerKeyPrefix + "a": a.String(), "other": "ignored",
		})
		if len(o.faults) > 0 || o.uid != "u" || o.version != "7" {
			t.Fatalf("seed %d: %v", seed, o.faults)
		}
		if !reflect.DeepEqual(o.plan, plan) {
			t.Fatalf("seed %d: got %v, want %v", seed, o.plan, plan)
		}
		if got := o.answers["a"]; !reflect.DeepEqual(got, a) || !got.equal(&a) {
			t.Fatalf("seed %d: got %v, want %v", seed, got, a)
		}
	}
}

const goodPlan = `{"version":4,"epoch":"e","writes":9,"step":7,"oldestSince":{"epoch":"d","step":6},"members":{"r":{"uid":"u","instance":"i"}},` +
	`"records":[{"ownersHash":"00000000000000aa","firstBackend":0,"backends":5},{"ownersHash":"00000000000000bb","firstBackend":0,"backends":4,` +
	`"before":{"upto":"0000000000000000"},"after":{"upto":"8000000000000000","behind":[{"upto":"7000000000000000","owners":[2]}]}}],` +
	`"backends":{"count":4,"uid":"s","generation":3}}`

// What cannot be read is an error that names the part, its value, and what is valid.
func TestPlanFaults(t *testing.T) {
	if _, err := parsePlan(goodPlan); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ old, new, want string }{
		{goodPlan, ``, `plan is "", want the JSON of a plan`},
		{goodPlan, `[]`, `plan is "[]", want the JSON of a plan`},
		{goodPlan, `null`, `step is "0", want 1 to`},
		{goodPlan, goodPlan + `{}`, `want one JSON value`},
		{goodPlan, strings.Repeat(" ", maxPlan) + goodPlan, `at most 524288 bytes`},
		{`"version":4`, `"version":1`, `version of the plan is "1", want 4`},
		{`"version":4`, `"version":"3"`, `version of the plan is "\"3\"", want 4`},
		{`"version":4,`, ``, `version of the plan is "", want 4`},
		{goodPlan, `{"version":3,"records":7}`, `version of the plan is "3", want 4`},
		{`"oldestSince"`, `"since"`, `step of oldestSince is "0", want 1 to 7`},
		{`"step":6`, `"step":8`, `step of oldestSince is "8", want 1 to 7`},
		{`"epoch":"d"`, `"epoch":""`, `epoch of oldestSince is "", want 1 to 128 letters`},
		{`"step"`, `"steps"`, `step is "0", want 1 to`},
		{`"epoch":"e"`, `"epoch":""`, `epoch is "", want 1 to 128 letters`},
		{`"epoch":"e"`, `"epoch":"e f"`, `epoch is "e f", want`},
		{`"writes":9`, `"writes":0`, `writes is "0", want 1 to`},
		{`"step":7`, `"step":0`, `step is "0", want 1 to`},
		{`"step":7`, `"step":9007199254740993`, `want 1 to 9007199254740992`},
		{`"step":7`, `"step":1.5`, `cannot unmarshal number 1.5`},
		{`"members":{"r":{"uid":"u","instance":"i"}},`, ``, `members is "map[]", want an object`},
		{`"uid":"u"`, `"uid":""`, `uid of r is ""`},
		{`"instance":"i"`, `"instance":"-"`, `instance of r is "-"`},
		{`{"r":`, `{"":`, `name of a member is ""`},
		{`00000000000000aa`, `aa`, `record 0: ownersHash is "aa", want 16 hexadecimal digits`},
		{`00000000000000aa`, `00000000000000AA`, `ownersHash is "00000000000000AA"`},
		{`{"ownersHash":"00000000000000aa","firstBackend":0,"backends":5},`, ``, `record 0: record is "00000000000000bb", want before and after in all`},
		{`"before":{"upto":"0000000000000000"},`, ``, `record 1: record is "00000000000000bb", want before and after`},
		{`"records":[`, `"records":[],"x":[`, `records is "0", want 1 to 3`},
		{`8000000000000000`, `8000000000000001`, `after.upto is "8000000000000001", want 16 hexadecimal digits, at most 8000000000000000`},
		{`"backends":5`, `"backends":0`, `record 0: backends is "0 from 0 on", want at least 1, with ordinals from 0 to 2147483647`},
		{`"firstBackend":0,"backends":4`, `"firstBackend":2147483647,"backends":2`, `record 1: backends is "2 from 2147483647 on"`},
		{`"firstBackend":0`, `"firstBackend":-1`, `backends is "5 from -1 on"`},
		{`[2]`, `[2,1]`, `after.behind.owners is "[2 1]", want ordinals in ascending order`},
		{`[2]`, `[2147483648]`, `want ordinals in ascending order`},
		{`7000000000000000`, `7`, `after.behind.upto is "7", want 16 hexadecimal digits`},
		{`7000000000000000`, `8000000000000000`, `after.behind.upto is "8000000000000000", want a place below 8000000000000000`},
		{`"before":{"upto":"0000000000000000"}`, `"before":{"upto":"7000000000000001"}`, `record 1: after is "8000000000000000", want no bound below that of before`},
		{`"owners":[2]}]}}]`, `"owners":[2]}]}},{"ownersHash":"00000000000000cc","firstBackend":0,"backends":4,"before":{"upto":"0000000000000000"},"after":{"upto":"0000000000000000"}}]`,
			`record 1: after is "8000000000000000", want no bound below that of before, and in all records but the newest the same ones`},
		{`"count":4`, `"count":0`, `at least 1 backend`},
		{`"uid":"s"`, `"uid":""`, `uid of backends is ""`},
	} {
		bad := strings.Replace(goodPlan, c.old, c.new, 1)
		o := readHandoffObject("u", "1", map[string]string{planKey: bad})
		if o.plan != nil || len(o.faults) != 1 || !strings.Contains(o.faults[0].Error(), c.want) ||
			!strings.HasPrefix(o.faults[0].Error(), "key plan: ") {
			t.Errorf("%s for %s: plan %v, %v, want %s", c.new, c.old, o.plan, o.faults, c.want)
		}
	}
}

// As many owners as a plan may name can be away in both tables that namespaces move to.
func TestPlanOfManyOwnersBehind(t *testing.T) {
	m := mark{upto: 1 << 61, behind: map[int]uint64{}}
	for owner := range maxOwners {
		m.behind[owner] = uint64(owner%100) << 50
	}
	p := randomPlan(rand.New(rand.NewPCG(1, 1)))
	p.records = []planRecord{{1, ordinalRange{0, 5}, mark{}, mark{}}, {2, ordinalRange{0, 5}, m, m}, {3, ordinalRange{0, 5}, m, m}}
	if parsed, err := parsePlan(p.String()); err != nil || !reflect.DeepEqual(parsed, p) {
		t.Errorf("%d bytes: %.100v", len(p.String()), err)
	}
}

func TestAnswerFaults(t *testing.T) {
	const good = "i e 7 00000000000000aa 8000000000000000/away=1,2 12"
	if _, err := parseAnswer(good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ old, new, want string }{
		{good, "", `answer is "", want instance, epoch, step, ownersHash, limit, sessions to move`},
		{good, good + "\n", `sessions to move is "12\n", want a number`},
		{good, strings.Repeat(good, 2000), `want instance, epoch`},
		{"i e", "i  e", `want instance, epoch`},
		{"i ", "* ", `instance is "*"`},
		{" e ", " - ", `step is "7", want 0 with the epoch -`},
		{" 7 ", " 0 ", `step is "0", want 0 with the epoch -`},
		{" 7 ", " 07 ", `step is "07", want a number`},
		{" 7 ", " -7 ", `want a number from 0 to`},
		{"00000000000000aa", "-", `want blank, without a view or a table`},
		{"00000000000000aa", "0000000000000000", `want blank`},
		{"00000000000000aa 8000000000000000/away=1,2", "0000000000000000 blank", `ownersHash is "0000000000000000", want not 0`},
		{"8000", "8001", `limit is "8001000000000000", want 16 hexadecimal`},
		{"/away=1,2", "/away=", `limit.away is "", want a number`},
		{"/away=1,2", "/away=2,1", `want ordinals in ascending order`},
		{"/away=1,2", "/", `limit is "8000000000000000/", want 16 hexadecimal`},
		{"/away=1,2", "/away=1/away=2", `limit.away is "1/away=2", want a number`},
	} {
		bad := strings.Replace(good, c.old, c.new, 1)
		o := readHandoffObject("u", "1", map[string]string{answerKeyPrefix + "a": bad})
		if len(o.answers) != 0 || len(o.faults) != 1 || !strings.Contains(o.faults[0].Error(), c.want) ||
			!strings.HasPrefix(o.faults[0].Error(), "key answer-a: ") {
			t.Errorf("%s for %s: %v, %v, want %s", c.new, c.old, o.answers, o.faults, c.want)
		}
	}
}

// FuzzHandoffObject: whatever the data is, reading it ends, and what was read is the same
// when it is written and read again.
func FuzzHandoffObject(f *testing.F) {
	f.Add(goodPlan, "i e 7 00000000000000aa 8000000000000000/away=1,2 12")
	f.Add(`{"version":4,"epoch":"e","writes":1,"step":1,"oldestSince":{"epoch":"e","step":1},"members":{},"records":[{"ownersHash":"0000000000000000","firstBackend":0,"backends":1}]}`, "i - 0 - blank 0")
	f.Fuzz(func(t *testing.T, plan, line string) {
		data := map[string]string{planKey: plan, answerKeyPrefix + "a": line}
		o := readHandoffObject("u", "1", data)
		if o.plan != nil {
			again, err := parsePlan(o.plan.String())
			if err != nil || again.String() != o.plan.String() {
				t.Errorf("%s is read, and written as %s: %v", plan, o.plan, err)
			}
		}
		if a, ok := o.answers["a"]; ok && a.String() != line {
			t.Errorf("%q is read as %q", line, a)
		}
	})
}

func TestHandoffPatch(t *testing.T) {
	w := handoffWrite{uid: "u", version: "7", data: map[string]string{"a": "1"}, remove: []string{"b"}}
	const want = `{"data":{"a":"1","b":null},"metadata":{"resourceVersion":"7","uid":"u"}}`
	if got := string(w.patch()); got != want {
		t.Errorf("the patch is %s, want %s", got, want)
	}
	w = handoffWrite{uid: "u", data: map[string]string{"a": "1"}}
	if got := w.patch(); !json.Valid(got) || strings.Contains(string(got), "resourceVersion") {
		t.Errorf("the patch is %s, want one without a version", got)
	}
}
