package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// The object of the hand-off is a ConfigMap that all routers of a StatefulSet read and
// write. Its data has
//
//	plan                the plan, as JSON: see planJSON
//	answer-<pod name>   what this router has answered, one line: see stepAnswer.String
//
// Other keys have no meaning. A value that cannot be read is reported, and counts as absent:
// routers write it anew. But a plan of another version stays as it is: see planVersion.
const (
	planKey         = "plan"
	answerKeyPrefix = "answer-"
)

// The bounds of what is read from the object. An object has at most 1 MiB.
const (
	maxPlan          = 512 << 10 // bytes
	maxAnswer        = 64 << 10  // bytes
	maxOwners        = 10_000    // in one set
	maxMembers       = 1000
	maxStep    int64 = 1 << 53 // JSON's numbers are exact up to here
	maxToken         = 128     // bytes of an epoch, an instance or a UID
)

// planVersion is the version of what plans and answers mean. A router changes nothing
// while the plan has another one: routers with that version may run, and have sessions.
const planVersion = 4

// unknownInstance is the instance of a member of which only the pod is known. Any container
// of the pod may answer for it, and none is admitted as it.
const unknownInstance = "*"

// noTableHash stands for the ownersHash of a table in an answer of a router without one. It is
// the ownersHash of one table in 2^64, which would be taken for none.
const noTableHash = 0

// memberID identifies a member: its pod and the process in the pod's container.
type memberID struct {
	UID      string `json:"uid"`      // of the pod
	Instance string `json:"instance"` // of the process, or unknownInstance
}

// sharedPlan is a plan with what routers have to know to go by it together. It is
// immutable.
type sharedPlan struct {
	handoffPlan
	epoch  string // of all plans since the first one, or since a reset
	writes int64  // how often a plan of this epoch was written
	// oldestSince is the step that made the table of records[0] the first one. Only routers that
	// were members then know the owners of its kept namespaces: see member.oldestTable.
	oldestSince  planStep
	members      map[string]memberID // by pod name
	backendRange *versionedRange     // nil if not stored
}

// planStep names a step for ever: after a reset a number may come again.
type planStep struct {
	Epoch string `json:"epoch"`
	Step  int64  `json:"step"`
}

// stepAnswer is what a router says of one step of a plan, in its own key.
type stepAnswer struct {
	instance    string
	epoch       string    // of the plan; "" in an answer without a view
	step        int64     // the step that is done in this router; 0 without a view
	ownersHash  uint64    // ownersHash of its own table, or noTableHash
	lacksTables bool      // it lacks a table of the plan, or has no table or no plan: limit is empty
	limit       stepLimit // of the next step, towards its table; empty if lacksTables
	toMove      int       // how many sessions it has to move that the rate counts, also those within limit
}

// handoffObject is one version of the object. It is immutable.
type handoffObject struct {
	uid, version   string                // metadata.uid and metadata.resourceVersion
	plan           *sharedPlan           // nil if there is none that can be read
	pods           []string              // those that have a key
	answers        map[string]stepAnswer // those that can be read, by pod name
	faults         []error               // what could not be read, in the order of the keys
	planVersionErr error                 // says that the plan has another version; or nil
}

// readHandoffObject reads the data of the object.
func readHandoffObject(uid, version string, data map[string]string) *handoffObject {
	o := &handoffObject{uid: uid, version: version, answers: map[string]stepAnswer{}}
	for _, key := range slices.Sorted(maps.Keys(data)) {
		pod, isAnswer := strings.CutPrefix(key, answerKeyPrefix)
		var err error
		switch {
		case key == planKey:
			if o.plan, err = parsePlan(data[key]); errors.As(err, &otherPlanVersionError{}) {
				o.planVersionErr = err
			}
		case isAnswer:
			o.pods = append(o.pods, pod)
			var a stepAnswer
			if a, err = parseAnswer(data[key]); err == nil {
				o.answers[pod] = a
			}
		}
		if err != nil {
			o.faults = append(o.faults, fmt.Errorf("key %s: %w", key, err))
		}
	}
	return o
}

// hasAnswered reports whether the member has answered the step of the plan. There must be
// a plan.
func (o *handoffObject) hasAnswered(pod string) bool {
	a, ok := o.answers[pod]
	id := o.plan.members[pod]
	return ok && a.epoch == o.plan.epoch && a.step == o.plan.step &&
		(a.instance == id.Instance || id.Instance == unknownInstance)
}

// missing returns the names, sorted, of the members that have not answered the step of
// the plan. There must be a plan.
func (o *handoffObject) missing() (pods []string) {
	for _, pod := range slices.Sorted(maps.Keys(o.plan.members)) {
		if !o.hasAnswered(pod) {
			pods = append(pods, pod)
		}
	}
	return pods
}

// withMember returns a copy of p with another entry for the pod. A nil id removes it.
func (p *sharedPlan) withMember(pod string, id *memberID) *sharedPlan {
	next := *p
	next.members = maps.Clone(p.members)
	delete(next.members, pod)
	if id != nil {
		next.members[pod] = *id
	}
	return &next
}

// knownMembers returns the names, in any order, of the members of which the process is known.
func (p *sharedPlan) knownMembers() (pods []string) {
	for pod, id := range p.members {
		if id.Instance != unknownInstance {
			pods = append(pods, pod)
		}
	}
	return pods
}

// isWithoutView reports whether a router says that it has no view, and so no session.
func (a *stepAnswer) isWithoutView() bool { return a.epoch == "" }

// badValue returns the error of a value that cannot be read. It says what would be valid.
func badValue(name, value, want string) error {
	if len(value) > maxQuotedValue {
		value = strings.ToValidUTF8(value[:maxQuotedValue], "") + "…"
	}
	return fmt.Errorf("%s is %q, want %s", name, value, want)
}

// hex64 is a number as 16 lower-case hexadecimal digits: JSON's numbers are not exact.
type hex64 uint64

// String returns the 16 digits.
func (h hex64) String() string { return fmt.Sprintf("%016x", uint64(h)) }

// parseHex64 reads 16 hexadecimal digits, no more and no less, at most max.
func parseHex64(name, s string, max uint64) (uint64, error) {
	n, err := strconv.ParseUint(s, 16, 64)
	if err != nil || hex64(n).String() != s || n > max {
		return 0, badValue(name, s, "16 hexadecimal digits, at most "+hex64(max).String())
	}
	return n, nil
}

// parseNumber reads a decimal number from 0 to max, without a sign or leading zeros.
func parseNumber(name, s string, max int64) (int64, error) {
	n, ok := parseDecimal(s, 63)
	if !ok || int64(n) > max {
		return 0, badValue(name, s, fmt.Sprintf("a number from 0 to %d", max))
	}
	return int64(n), nil
}

// checkToken returns an error if s is not an epoch, an instance, a UID or a pod's name.
func checkToken(name, s string) error {
	const want = "1 to 128 letters, digits, dots and dashes that begin with a letter " +
		"or digit"
	if s == "" || len(s) > maxToken || s[0] == '-' || s[0] == '.' {
		return badValue(name, s, want)
	}
	for _, c := range []byte(s) {
		isLetter, isDigit := 'a' <= c|0x20 && c|0x20 <= 'z', '0' <= c && c <= '9'
		if !isLetter && !isDigit && c != '-' && c != '.' {
			return badValue(name, s, want)
		}
	}
	return nil
}

// checkOrdinals returns an error if set is not a sorted set of ordinals.
func checkOrdinals(name string, set []int) error {
	if len(set) > maxOwners {
		return badValue(name, fmt.Sprint(set),
			fmt.Sprintf("at most %d ordinals", maxOwners))
	}
	last := -1
	for _, ordinal := range set {
		if ordinal <= last || ordinal > maxOrdinal {
			return badValue(name, fmt.Sprint(set), "ordinals in ascending order")
		}
		last = ordinal
	}
	return nil
}

// maxOrdinal is the largest ordinal of a pod: replicas are 32-bit numbers.
const maxOrdinal = 1<<31 - 1

// planJSON is the JSON of a plan:
//
//	{"version":4, "epoch":"7c1e.1795871234567.3", "writes":12, "step":1795871239876,
//	 "oldestSince":{"epoch":"7c1e.1795871234567.3", "step":1795871237001},
//	 "allHeld":false, "members":{"router-a":{"uid":"…", "instance":"7c1e"}},
//	 "records":[{"ownersHash":"9c1f…", "firstBackend":0, "backends":5},
//	            {"ownersHash":"77ab…", "firstBackend":0, "backends":4,
//	             "before":{"upto":"5f3a…"},
//	             "after":{"upto":"61b2…", "behind":[{"upto":"5f3a…", "owners":[2]}]}}],
//	 "backends":{"first":0, "count":4, "uid":"…", "generation":7}}
//
// An ownersHash and a place have 16 hexadecimal digits. The first record has no marks.
// allHeld and backends may be absent.
type planJSON struct {
	Version     int                 `json:"version"`
	Epoch       string              `json:"epoch"`
	Writes      int64               `json:"writes"`
	Step        int64               `json:"step"`
	OldestSince planStep            `json:"oldestSince"`
	AllHeld     bool                `json:"allHeld,omitempty"`
	Members     map[string]memberID `json:"members"`
	Records     []recordJSON        `json:"records"`
	Backends    *versionedRange     `json:"backends,omitempty"`
}

// recordJSON is the JSON of a record of a plan.
type recordJSON struct {
	OwnersHash   string    `json:"ownersHash"`
	FirstBackend int       `json:"firstBackend"` // its ordinal
	Backends     int       `json:"backends"`     // how many the table has
	Before       *markJSON `json:"before,omitempty"`
	After        *markJSON `json:"after,omitempty"`
}

// markJSON is the JSON of a mark.
type markJSON struct {
	Upto   string      `json:"upto"`
	Behind []boundJSON `json:"behind,omitempty"`
}

// boundJSON is the JSON of the owners that have one bound in mark.behind. Mostly many owners
// have few bounds.
type boundJSON struct {
	Upto   string `json:"upto"`
	Owners []int  `json:"owners"`
}

// String returns the JSON of the plan, the same for equal plans.
func (p *sharedPlan) String() string {
	out := planJSON{
		Version: planVersion, Epoch: p.epoch, Writes: p.writes, Step: p.step,
		OldestSince: p.oldestSince, AllHeld: p.allHeld, Members: p.members, Backends: p.backendRange,
	}
	for i := range p.records {
		r := &p.records[i]
		record := recordJSON{
			OwnersHash: hex64(r.ownersHash).String(), FirstBackend: r.backends.first, Backends: r.backends.count,
		}
		if i > 0 {
			record.Before, record.After = newMarkJSON(&r.before), newMarkJSON(&r.after)
		}
		out.Records = append(out.Records, record)
	}
	b, err := json.Marshal(&out)
	if err != nil {
		panic(err) // it has only strings, numbers, maps and slices
	}
	return string(b)
}

func newMarkJSON(m *mark) *markJSON {
	owners := map[uint64][]int{}
	for _, owner := range slices.Sorted(maps.Keys(m.behind)) {
		owners[m.behind[owner]] = append(owners[m.behind[owner]], owner)
	}
	out := &markJSON{Upto: hex64(m.upto).String()}
	for _, bound := range slices.Sorted(maps.Keys(owners)) {
		out.Behind = append(out.Behind, boundJSON{hex64(bound).String(), owners[bound]})
	}
	return out
}

// otherPlanVersionError says that a plan has another version than planVersion.
type otherPlanVersionError struct{ version string }

func (e otherPlanVersionError) Error() string {
	return badValue("version of the plan", e.version, strconv.Itoa(planVersion)).Error()
}

// parsePlan reads the JSON of a plan. It returns an otherPlanVersionError for an object of
// JSON with another version, or with none, whatever else is in it.
func parsePlan(s string) (*sharedPlan, error) {
	if len(s) > maxPlan {
		return nil, badValue("plan", s, fmt.Sprintf("at most %d bytes", maxPlan))
	}
	var head map[string]json.RawMessage
	version := strconv.Itoa(planVersion)
	if json.Unmarshal([]byte(s), &head) == nil && head != nil && string(head["version"]) != version {
		return nil, otherPlanVersionError{string(head["version"])}
	}
	var in planJSON
	decoder := json.NewDecoder(bytes.NewReader([]byte(s)))
	if err := decoder.Decode(&in); err != nil {
		return nil, fmt.Errorf("%w: %w", badValue("plan", s, "the JSON of a plan"), err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, badValue("plan", s, "one JSON value")
	}
	p := &sharedPlan{
		handoffPlan: handoffPlan{step: in.Step, allHeld: in.AllHeld},
		epoch:       in.Epoch, writes: in.Writes, oldestSince: in.OldestSince,
		members: in.Members, backendRange: in.Backends,
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	for i := range in.Records {
		r, err := in.Records[i].parse(i == 0)
		if err == nil && !r.isValidStep(i == len(in.Records)-1) {
			err = badValue("after", in.Records[i].After.Upto,
				"no bound below that of before, and in all records but the newest the same ones")
		}
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", i, err)
		}
		p.records = append(p.records, r)
	}
	return p, nil
}

// check returns an error if something but the records is not valid.
func (p *planJSON) check() error {
	switch {
	case p.Step < 1 || p.Step > maxStep:
		return badValue("step", fmt.Sprint(p.Step), fmt.Sprintf("1 to %d", maxStep))
	case p.OldestSince.Step < 1 || p.OldestSince.Step > p.Step:
		return badValue("step of oldestSince", fmt.Sprint(p.OldestSince.Step),
			fmt.Sprintf("1 to %d, the plan's step", p.Step))
	case p.Writes < 1 || p.Writes > maxStep:
		return badValue("writes", fmt.Sprint(p.Writes), fmt.Sprintf("1 to %d", maxStep))
	case len(p.Records) < 1 || len(p.Records) > maxRecords:
		return badValue("records", fmt.Sprint(len(p.Records)),
			fmt.Sprintf("1 to %d", maxRecords))
	case p.Members == nil || len(p.Members) > maxMembers:
		return badValue("members", fmt.Sprint(p.Members),
			fmt.Sprintf("an object with at most %d", maxMembers))
	}
	if b := p.Backends; b != nil {
		if b.First < anyFirst || b.Count < 1 || b.Count-1 > maxOrdinal-max(0, b.First) || b.Generation < 0 {
			return badValue("backends", fmt.Sprintf("%+v", *b),
				fmt.Sprintf("at least 1 backend, of 0 to %d, of a generation", maxOrdinal))
		}
		if err := checkToken("uid of backends", b.UID); err != nil {
			return err
		}
	}
	for _, pod := range slices.Sorted(maps.Keys(p.Members)) {
		if err := p.Members[pod].check(pod); err != nil {
			return err
		}
	}
	if err := checkToken("epoch of oldestSince", p.OldestSince.Epoch); err != nil {
		return err
	}
	return checkToken("epoch", p.Epoch)
}

// check returns an error if the member of this name is not valid.
func (id memberID) check(pod string) error {
	if err := checkToken("name of a member", pod); err != nil {
		return err
	}
	if err := checkToken("uid of "+pod, id.UID); err != nil {
		return err
	}
	if id.Instance == unknownInstance {
		return nil
	}
	return checkToken("instance of "+pod, id.Instance)
}

// parse reads a record. The oldest one has no marks, since all is covered that newer ones
// do not cover.
func (r *recordJSON) parse(oldest bool) (record planRecord, err error) {
	if record.ownersHash, err = parseHex64("ownersHash", r.OwnersHash, 1<<64-1); err != nil {
		return record, err
	}
	if oldest != (r.Before == nil) || oldest != (r.After == nil) {
		return record, badValue("record", r.OwnersHash,
			"before and after in all records but the first")
	}
	if r.FirstBackend < 0 || r.Backends < 1 || r.Backends-1 > maxOrdinal-r.FirstBackend {
		return record, badValue("backends", fmt.Sprintf("%d from %d on", r.Backends, r.FirstBackend),
			fmt.Sprintf("at least 1, with ordinals from 0 to %d", maxOrdinal))
	}
	record.backends = ordinalRange{r.FirstBackend, r.Backends}
	if oldest {
		return record, nil
	}
	if record.before, err = r.Before.parse("before"); err != nil {
		return record, err
	}
	record.after, err = r.After.parse("after")
	return record, err
}

// parse reads the mark with this name.
func (m *markJSON) parse(name string) (parsed mark, err error) {
	if parsed.upto, err = parseHex64(name+".upto", m.Upto, allPlaces); err != nil {
		return mark{}, err
	}
	for _, b := range m.Behind {
		bound, err := parseHex64(name+".behind.upto", b.Upto, allPlaces)
		if err == nil && bound >= parsed.upto {
			err = badValue(name+".behind.upto", b.Upto, "a place below "+m.Upto)
		}
		if err == nil {
			err = checkOrdinals(name+".behind.owners", b.Owners)
		}
		if err != nil {
			return mark{}, err
		}
		for _, owner := range b.Owners {
			if parsed.behind == nil {
				parsed.behind = map[int]uint64{}
			}
			parsed.behind[owner] = bound
		}
	}
	return parsed, nil
}

// String returns the line of the answer in the object, six words:
//
//	<instance> <epoch> <step> <ownersHash> <limit> <to move>
//	7c1e 7c1e.1795871234567.3 1795871239876 77ab… 61b2…/away=2,3 120
//
// limit is the place up to which the next step may go, with the new owners that are away,
// left out if there are none. It is "blank" in an answer of a router that does not know all
// tables of the plan. ownersHash is "-" if the router has no table, and epoch is "-" and step 0 if it
// has no view; the limit is blank then, too.
func (a stepAnswer) String() string {
	epoch, ownersHash, limit := cmp.Or(a.epoch, "-"), "-", "blank"
	if a.ownersHash != noTableHash {
		ownersHash = hex64(a.ownersHash).String()
	}
	if !a.lacksTables {
		limit = a.limit.String()
	}
	return fmt.Sprintf("%s %s %d %s %s %d", a.instance, epoch, a.step, ownersHash, limit, a.toMove)
}

// awayPrefix stands before the owners that are away in a limit.
const awayPrefix = "/away="

// String returns the limit as an answer has it.
func (l stepLimit) String() string {
	upto := hex64(l.upto).String()
	if len(l.away) == 0 {
		return upto
	}
	return upto + awayPrefix + joined(l.away, ",", strconv.Itoa)
}

// parseAnswer reads the line of an answer. It accepts only what stepAnswer.String
// returns.
func parseAnswer(line string) (a stepAnswer, err error) {
	const want = "instance, epoch, step, ownersHash, limit, sessions to move"
	words := strings.Split(line[:min(len(line), maxAnswer+1)], " ")
	if len(line) > maxAnswer || len(words) != 6 {
		return a, badValue("answer", line, want)
	}
	if a.instance = words[0]; checkToken("instance", a.instance) != nil {
		return a, checkToken("instance", a.instance)
	}
	if words[1] != "-" {
		if a.epoch = words[1]; checkToken("epoch", a.epoch) != nil {
			return a, checkToken("epoch", a.epoch)
		}
	}
	if a.step, err = parseNumber("step", words[2], maxStep); err != nil {
		return a, err
	}
	if words[3] != "-" {
		if a.ownersHash, err = parseHex64("ownersHash", words[3], 1<<64-1); err != nil {
			return a, err
		}
	}
	if a.lacksTables = words[4] == "blank"; !a.lacksTables {
		if a.limit, err = parseLimit(words[4]); err != nil {
			return a, err
		}
	}
	toMove, err := parseNumber("sessions to move", words[5], maxOrdinal)
	a.toMove = int(toMove)
	switch {
	case err != nil:
		return a, err
	case (a.epoch == "") != (a.step == 0):
		return a, badValue("step", words[2], "0 with the epoch -, and only then")
	case !a.lacksTables && (a.epoch == "" || a.ownersHash == noTableHash):
		return a, badValue("limit", words[4], "blank, without a view or a table")
	case words[3] != "-" && a.ownersHash == noTableHash:
		return a, badValue("ownersHash", words[3], "not 0")
	}
	return a, nil
}

// parseLimit reads a limit as an answer has it.
func parseLimit(s string) (l stepLimit, err error) {
	upto, list, hasAway := strings.Cut(s, awayPrefix)
	if l.upto, err = parseHex64("limit", upto, allPlaces); err != nil || !hasAway {
		return l, err
	}
	for word := range strings.SplitSeq(list, ",") {
		ordinal, err := parseNumber("limit.away", word, maxOrdinal)
		if err != nil {
			return l, err
		}
		l.away = append(l.away, int(ordinal))
	}
	return l, checkOrdinals("limit.away", l.away)
}

// equal reports whether both answers say the same. How many sessions have to move does
// not count: it changes all the time, and is read only once for each step.
func (a *stepAnswer) equal(b *stepAnswer) bool {
	return a.instance == b.instance && a.epoch == b.epoch && a.step == b.step &&
		a.ownersHash == b.ownersHash && a.lacksTables == b.lacksTables &&
		a.limit.upto == b.limit.upto && slices.Equal(a.limit.away, b.limit.away)
}

// handoffWrite is a change of the object, as a JSON merge patch (RFC 7396). The API
// server refuses it with 409 if the object has another version than one given, and with
// 422 if it has another UID.
type handoffWrite struct {
	uid     string
	version string            // "" if it may be applied to any version
	data    map[string]string // new values, by key
	remove  []string          // keys
}

// patch returns the merge patch.
func (w *handoffWrite) patch() []byte {
	metadata, data := map[string]string{"uid": w.uid}, map[string]any{}
	if w.version != "" {
		metadata["resourceVersion"] = w.version
	}
	for key, value := range w.data {
		data[key] = value
	}
	for _, key := range w.remove {
		data[key] = nil
	}
	b, err := json.Marshal(map[string]any{"metadata": metadata, "data": data})
	if err != nil {
		panic(err) // it has only strings and maps
	}
	return b
}
