package main

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestWatchFault34ListMustBeWhole(t *testing.T) {
	good := fakeKubeV(9)
	list := func(meta, items string) http.HandlerFunc {
		return fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+meta+`},"items":[`+items+`]}`)
	}
	const rv = `"resourceVersion":"109"`
	for name, bad := range map[string]http.HandlerFunc{
		"HTML":                 fakeKubeSay(200, "<html>log in</html>", "Content-Type", "text/html; charset=utf-8"),
		"HTML said to be JSON": fakeKubeSay(200, "<html>log in</html>"),
		"text/plain":           fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]}`, "Content-Type", "text/plain"),
		"nothing":              fakeKubeSay(200, ""),
		"204":                  fakeKubeSay(204, ""),
		"null":                 fakeKubeSay(200, "null"),
		"{}":                   fakeKubeSay(200, "{}"),
		"[]":                   fakeKubeSay(200, "[]"),
		"a Status":             fakeKubeSay(200, `{"kind":"Status","metadata":{},"status":"Success"}`),
		"a ConfigMap":          fakeKubeSay(200, good),
		"another kind":         fakeKubeSay(200, `{"kind":"SecretList","metadata":{`+rv+`},"items":[]}`),
		"no resourceVersion":   list("", good),
		"continue":             list(rv+`,"continue":"more"`, good),
		"two items":            list(rv, good+","+good),
		"another name":         list(rv, strings.Replace(good, "routes", "other", 1)),
		"another namespace":    list(rv, strings.Replace(good, "edge", "core", 1)),
		"no uid":               list(rv, strings.Replace(good, `"u1"`, `""`, 1)),
		"no version in item":   list(rv, strings.Replace(good, `"9"`, `""`, 1)),
		"data of numbers":      list(rv, strings.Replace(good, `"backend-9"`, `9`, 1)),
		"followed by junk":     fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[]} x`),
		"cut":                  fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good+`]}`, "Content-Length", "1000"),
		"half":                 fakeKubeSay(200, `{"kind":"ConfigMapList","metadata":{`+rv+`},"items":[`+good),
		"over the cap":         list(rv, strings.Replace(good, "backend-9", strings.Repeat("x", maxObject), 1)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeScript{fakeKubeLists(1)[0], bad, fakeKubeLists(2)[1]},
					fakeKubeScript{fakeKubeStream(), fakeKubeOpen()})
				c := fakeKubeFollow(t, network.kube(t))
				c.want(t, fakeKube1, fakeKube2)
				time.Sleep(time.Minute)
				if verbs := server.verbs(); verbs != "LIST WATCH LIST LIST WATCH" {
					t.Errorf("asked %s; want no WATCH after the bad LIST", verbs)
				}
				if n := c.logged.count("watch failed"); n != 1 || c.logged.count("works again") != 1 {
					t.Errorf("log, want a failure and a recovery:\n%s", c.logged)
				}
				if s := c.now(); s.failure != nil || len(c.logged.String()) > 2000 {
					t.Errorf("%+v, log:\n%.2000s", s, c.logged)
				}
			})
		})
	}
}

// Whatever ends a stream, nothing but whole events about the object counts, and
// the next thing asked is a LIST.
func TestStreamEnds(t *testing.T) {
	good, next := fakeKubeEvent("MODIFIED", fakeKubeV(2)), fakeKubeEvent("MODIFIED", fakeKubeV(3))
	change := func(old, new string) string { return strings.Replace(next, old, new, 1) }
	status := func(s string) string { return fakeKubeEvent("ERROR", `{"kind":"Status","metadata":{},`+s+`}`) }
	for name, bad := range map[string]string{
		"garbage":             "garbage",
		"HTML":                "<html>",
		"NUL":                 "\x00",
		"an array":            "[]",
		"a number":            "1",
		"null":                "null",
		"no type":             "{}",
		"an unknown type":     change("MODIFIED", "CHANGED"),
		"type in lower case":  change("MODIFIED", "modified"),
		"type is a number":    change(`"MODIFIED"`, "1"),
		"no object":           `{"type":"MODIFIED"}`,
		"object is null":      `{"type":"MODIFIED","object":null}`,
		"object is a string":  `{"type":"MODIFIED","object":"routes"}`,
		"another name":        change("routes", "other"),
		"another namespace":   change("edge", "core"),
		"another kind":        change("ConfigMap", "Secret"),
		"no kind":             change(`"kind":"ConfigMap",`, ""),
		"no uid":              change(`"u1"`, `""`),
		"no version":          change(`"3"`, `""`),
		"data of numbers":     change(`"backend-3"`, "3"),
		"another one deleted": strings.Replace(change("routes", "other"), "MODIFIED", "DELETED", 1),
		"unknown deleted":     `{"type":"DELETED","object":{}}`,
		"410":                 status(`"message":"too old resource version: 226 (349)","reason":"Expired","code":410`),
		"410 without reason":  status(`"message":"too old","code":410`),
		"429":                 status(`"code":429,"details":{"retryAfterSeconds":3}`),
		"500":                 status(`"message":"RequestWatchProgress is disabled","reason":"InternalError","code":500`),
		"504":                 status(`"code":504,"reason":"Timeout"`),
		"an odd code":         status(`"code":777`),
		"no code":             status(`"message":""`),
		"code is a string":    status(`"code":"410"`),
		"ERROR of a string":   `{"type":"ERROR","object":"no"}`,
		"ERROR of nothing":    `{"type":"ERROR"}`,
		"ERROR of ConfigMap":  fakeKubeEvent("ERROR", fakeKubeV(3)),
		"half an event":       next[:len(next)/2],
		"all but a brace":     strings.TrimSuffix(next, "}\n"),
		"over the cap":        change("backend-3", strings.Repeat("x", maxObject)),
	} {
		for how, stream := range map[string]http.HandlerFunc{
			"then open": fakeKubeOpen(good, bad), "then end": fakeKubeStream(good, bad), "then cut": fakeKubeCut(good, bad),
		} {
			if len(bad) > maxObject && how != "then end" {
				continue // one of them takes long enough
			}
			if how == "then open" && strings.HasPrefix(next, strings.TrimSpace(bad)) && bad != "" {
				continue // nothing is wrong yet
			}
			t.Run(name+" "+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					lists := fakeKubeScript{fakeKubeLists(1)[0], fakeKubeList("104", fakeKubeV(4))}
					server := newFakeKube(t, network, lists, fakeKubeScript{stream, fakeKubeOpen()})
					c := fakeKubeFollow(t, network.kube(t))
					c.want(t, fakeKube1, fakeKube2, "4 map[ns-01:backend-4]")
					time.Sleep(time.Minute)
					if verbs := server.verbs(); verbs != "LIST WATCH LIST WATCH" {
						t.Errorf("asked %s", verbs)
					}
					if s := c.now(); s.fails != 0 {
						t.Errorf("%+v", s)
					}
					if n := c.logged.count("watch failed"); n != 1 {
						t.Errorf("%d failures logged, want 1:\n%.2000s", n, c.logged)
					}
				})
			})
		}
	}
}

// An event is what its bytes are, however they come.
func TestWatchFault29Pieces(t *testing.T) {
	two, three := fakeKubeEvent("ADDED", fakeKubeV(2)), fakeKubeEvent("MODIFIED", fakeKubeV(3))
	wide := strings.Replace(two, "backend-2", "größer-𝄞", 1)
	middle := strings.Index(wide, "𝄞") + 2
	for name, c := range map[string]struct {
		parts []string
		want  []string
	}{
		"byte by byte":            {strings.Split(two+three, ""), []string{fakeKube2, fakeKube3}},
		"both in one write":       {[]string{two + three}, []string{fakeKube2, fakeKube3}},
		"one and a half":          {[]string{two + three[:40], three[40:]}, []string{fakeKube2, fakeKube3}},
		"cut in a UTF-8 sequence": {[]string{wide[:middle], wide[middle:]}, []string{"2 map[ns-01:größer-𝄞]"}},
		"no line ends":            {[]string{strings.TrimSpace(two), strings.TrimSpace(three)}, []string{fakeKube2, fakeKube3}},
		"blank lines":             {[]string{"\n\n" + two + "\r\n\n", three}, []string{fakeKube2, fakeKube3}},
		"repeated":                {[]string{two, two, three, three}, []string{fakeKube2, fakeKube3}},
		"after a bookmark":        {[]string{fakeKubeEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"2"}}`), two}, []string{fakeKube2}},
		"after an odd bookmark":   {[]string{fakeKubeEvent("BOOKMARK", `[1]`), two}, []string{fakeKube2}},
		"many bookmarks":          {[]string{strings.Repeat(fakeKubeEvent("BOOKMARK", `{}`), 1000), two}, []string{fakeKube2}},
		"a smaller version":       {[]string{three, two}, []string{fakeKube3, fakeKube2}},
		"another uid":             {[]string{two, strings.Replace(two, `"u1"`, `"u2"`, 1)}, []string{fakeKube2, fakeKube2}},
		"no data":                 {[]string{strings.Replace(two, `,"data":{"ns-01":"backend-2"}`, "", 1)}, []string{"2 map[]"}},
		"three of 6 MB": {
			[]string{strings.Repeat(strings.Replace(two, "backend-2", strings.Repeat(`\u003c`, 1<<20), 1), 3), three},
			[]string{"2 map[ns-01:" + strings.Repeat("<", 1<<20) + "]", fakeKube3}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeLists(1), fakeKubeScript{fakeKubeOpen(c.parts...)})
				client := fakeKubeFollow(t, network.kube(t))
				client.want(t, fakeKube1)
				client.want(t, c.want...)
				time.Sleep(time.Minute)
				client.wantNothing(t)
				if verbs := server.verbs(); verbs != "LIST WATCH" || client.logged.String() != "" {
					t.Errorf("asked %s, log:\n%s", verbs, client.logged)
				}
			})
		})
	}
}

func TestBookmarkIsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		newFakeKube(t, network, fakeKubeLists(1), fakeKubeScript{func(w http.ResponseWriter, r *http.Request) {
			fakeKubeStream()(w, r)
			time.Sleep(time.Minute)
			fakeKubeOpen(fakeKubeEvent("BOOKMARK", `{"kind":"ConfigMap","metadata":{"resourceVersion":"500"}}`))(w, r)
		}})
		c := fakeKubeFollow(t, network.kube(t))
		c.want(t, fakeKube1)
		time.Sleep(59 * time.Second)
		before := time.Since(c.now().confirmed)
		time.Sleep(2 * time.Second)
		if after := time.Since(c.now().confirmed); before < 58*time.Second || after > time.Second+time.Millisecond {
			t.Errorf("last heard %s ago before the bookmark, %s ago after", before, after)
		}
		c.wantNothing(t)
	})
}

// The set is what the server says is there: what comes is in it whatever its
// version, and what goes is not.
func TestWatchFault25DeletedAndRecreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		recreated := fakeKubeObject("u2", "1", "backend-7")
		newFakeKube(t, network, fakeKubeScript{fakeKubeList("99"), fakeKubeList("102", fakeKubeV(3)), fakeKubeList("103"), fakeKubeList("2", recreated)},
			fakeKubeScript{
				fakeKubeLast(20*time.Second, false),
				fakeKubeLast(20*time.Second, false, fakeKubeEvent("DELETED", fakeKubeV(4))),
				fakeKubeLast(20*time.Second, false, fakeKubeEvent("ADDED", fakeKubeObject("u3", "1", "backend-5"))),
				fakeKubeOpen(fakeKubeEvent("DELETED", recreated), fakeKubeEvent("DELETED", recreated), fakeKubeEvent("ADDED", fakeKubeObject("u4", "0", "backend-8"))),
			})
		c := fakeKubeFollow(t, network.kube(t))
		c.want(t, "none", fakeKube3, "none", "1 map[ns-01:backend-5]", "1 map[ns-01:backend-7]", "none", "0 map[ns-01:backend-8]")
		time.Sleep(time.Minute)
		c.wantNothing(t)
	})
}

// A selection is replaced by each LIST, and changed by events one by one.
func TestWatchFault28LeavesTheSelection(t *testing.T) {
	named := func(name, version, backend string) string {
		return strings.Replace(fakeKubeObject("u-"+name, version, backend), "routes", name, 1)
	}
	synctest.Test(t, func(t *testing.T) {
		network := newFakeKubeNet()
		server := newFakeKube(t, network, fakeKubeScript{
			fakeKubeList("10", named("b", "2", "backend-2"), named("a", "1", "backend-1")),
			fakeKubeList("20", named("a", "1", "backend-1"), named("c", "3", "backend-3")),
			fakeKubeList("5", named("c", "3", "backend-3"), named("a", "1", "backend-1")),
		}, fakeKubeScript{
			fakeKubeLast(time.Minute, false, fakeKubeEvent("ADDED", named("c", "11", "backend-9")),
				fakeKubeEvent("DELETED", named("a", "12", "backend-1")), fakeKubeEvent("DELETED", named("z", "13", "backend-1"))),
			fakeKubeLast(time.Minute, false),
			fakeKubeOpen(),
		})
		c := fakeKubeSelect(t, network.kube(t), "app=router-overrides")
		const a1, b2, c3, c11 = "1 map[ns-01:backend-1]", "2 map[ns-01:backend-2]", "3 map[ns-01:backend-3]", "11 map[ns-01:backend-9]"
		c.want(t, a1+", "+b2, a1+", "+b2+", "+c11, b2+", "+c11, a1+", "+c3)
		time.Sleep(5 * time.Minute)
		c.wantNothing(t) // the third LIST is of the same
		for _, verb := range []string{"LIST", "WATCH"} {
			r := server.request(t)
			if query := r.URL.Query(); r.verb() != verb || query.Get("labelSelector") != "app=router-overrides" || query.Has("fieldSelector") {
				t.Errorf("%s %s, want a %s by label", r.verb(), r.RequestURI, verb)
			}
		}
	})
}

// The reader of a stream takes no more than the cap of one object, even from a
// server that never stops.
func TestStreamMemory(t *testing.T) {
	for name, start := range map[string]string{
		"an object": `{"type":"MODIFIED","object":{"data":{"a":"`, "spaces after an event": fakeKubeEvent("BOOKMARK", `{}`),
	} {
		t.Run(name, func(t *testing.T) {
			endless := &fakeKubeEndless{}
			w := fakeKubeWatcher(&kube{}, "", slog.New(slog.DiscardHandler), func(map[string]*fakeConfigMap) { t.Error("applied") })
			err := w.follow(io.MultiReader(strings.NewReader(start), endless))
			if !errors.Is(err, errTooBig) || endless.n > maxObject {
				t.Errorf("%d bytes read, error %v, want at most %d and %v", endless.n, err, maxObject, errTooBig)
			}
		})
	}
}

// A LIST without end is given up too.
func TestListMemory(t *testing.T) {
	const most = 1 << 20
	item := fakeKubeV(1) + ","
	list := strings.NewReader(`{"items":[` + strings.Repeat(item, 2*most/len(item)))
	_, items, err := decodeList[fakeConfigMap](list, most)
	if want := most / len(item); !errors.Is(err, errTooBig) || len(items) < want-1 || len(items) > want+1 {
		t.Errorf("%d items, error %v, want %d and %v", len(items), err, want, errTooBig)
	}
}

// fakeKubeEndless is spaces without end, or what a test can bear of them.
type fakeKubeEndless struct{ n int }

func (e *fakeKubeEndless) Read(b []byte) (int, error) {
	if e.n > 2*maxObject {
		return 0, io.ErrNoProgress
	}
	for i := range b {
		b[i] = ' '
	}
	e.n += len(b)
	return len(b), nil
}
