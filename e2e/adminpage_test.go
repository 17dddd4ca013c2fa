package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/coder/websocket"
)

// hostile is a namespace, and the value of an override, that would run if the page took it
// for HTML.
const hostile = `<img src=x onerror=document.title='run'>`

// adminScene is two routers and three backends on this machine, without a cluster, and a
// browser with the page of the first router's admin port.
type adminScene struct {
	t         *testing.T
	clients   dialer // of the first router
	admin     string // http://127.0.0.1:12345 of the first router
	first     *process
	second    *process
	overrides string // the directory
	tab       context.Context
}

// newAdminScene starts all but the browser. These namespaces have overrides of backend-0.
func newAdminScene(t *testing.T, namespaces []string) *adminScene {
	t.Helper()
	s := &adminScene{t: t, overrides: t.TempDir()}
	backend, program := build(t, "./backend"), build(t, ".")
	var addresses []string
	for i := range 3 {
		b := start(t, backend, "-listen=127.0.0.1:0", fmt.Sprintf("-name=backend-%d", i))
		_, address, _ := strings.Cut(b.says(t, "msg=start "), "listen=")
		address, _, _ = strings.Cut(address, " ")
		addresses = append(addresses, address)
	}
	for _, namespace := range namespaces {
		s.override(namespace, "backend-0")
	}
	s.override("rejected", hostile)
	run := func(pod string, flags ...string) (p *process, listen, admin string) {
		p = start(t, program, append([]string{"-listen=127.0.0.1:0", "-admin=127.0.0.1:0", "-log-format=json",
			"-kube=none", "-overrides=" + s.overrides, "-backends=" + strings.Join(addresses, ","),
			"-pod-name=" + pod, "-move-rate=1"}, flags...)...)
		line := p.says(t, `"msg":"serving"`)
		return p, field(t, line, "listen"), field(t, line, "admin")
	}
	second, _, secondAdmin := run("router-b")
	first, listen, admin := run("router-a", "-peers="+secondAdmin)
	s.first, s.second, s.admin = first, second, "http://"+admin
	s.clients = dialer{base: "ws://" + listen, http: http.DefaultClient}
	eventually(t, time.Minute, "the router to be ready", func() error {
		_, err := (&router{pod: "router-a", base: s.admin}).get(t.Context(), "/readyz")
		return err
	})
	return s
}

func (s *adminScene) override(namespace, value string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.overrides, namespace), []byte(value), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// show opens the page in a new browser, at this width.
func (s *adminScene) show(width int64, options ...chromedp.ExecAllocatorOption) {
	s.t.Helper()
	s.tab = startBrowser(s.t, s.t.TempDir(), options...)
	if err := openPage(s.tab, s.admin+"/", chromedp.EmulateViewport(width, 900)); err != nil {
		s.t.Fatal(err)
	}
	s.do(`window.violations = [];
		new ReportingObserver(all => violations.push(...all.map(r => r.body.effectiveDirective + ' ' + r.body.blockedURL + ' ' + r.body.sample)),
			{ types: ['csp-violation'], buffered: true }).observe()`)
	s.until("the first answer", text("#agree"), "2 of 2 agree")
}

// text is JavaScript for the text that a part of the page shows.
func text(selector string) string {
	return fmt.Sprintf("(document.querySelector(%q)?.innerText ?? 'none')", selector)
}

// do runs JavaScript in the page.
func (s *adminScene) do(script string) {
	s.t.Helper()
	if _, err := chromedp.Run(s.tab, chromedp.Evaluate[chromedp.Void](script+"; undefined")); err != nil {
		s.t.Fatalf("%s: %v", script, err)
	}
}

// read returns the text that JavaScript gives.
func (s *adminScene) read(script string) string {
	s.t.Helper()
	value, err := chromedp.Run(s.tab, chromedp.Evaluate[string]("String("+script+")"))
	if err != nil {
		s.t.Fatalf("%s: %v", script, err)
	}
	return value
}

// until waits until the text that JavaScript gives has want in it.
func (s *adminScene) until(what, script, want string) {
	s.t.Helper()
	eventually(s.t, time.Minute, what, func() error {
		if got := s.read(script); !strings.Contains(got, want) {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
}

// press presses keys, one after the other.
func (s *adminScene) press(keys ...string) {
	s.t.Helper()
	for _, key := range keys {
		if err := chromedp.Do(s.tab, chromedp.KeyEvent(key)); err != nil {
			s.t.Fatal(err)
		}
	}
}

// tabTo presses Tab until the element has the focus.
func (s *adminScene) tabTo(selector string) {
	s.t.Helper()
	for range 60 {
		if s.read(fmt.Sprintf("document.activeElement.matches(%q)", selector)) == "true" {
			return
		}
		s.press(kb.Tab)
	}
	s.t.Fatalf("Tab does not come to %s", selector)
}

// TestAdminPage uses the page of the admin port in Chromium: without a mouse, while
// sessions move, while a router is silent, and with names that are HTML.
func TestAdminPage(t *testing.T) {
	namespaces := []string{"move-1", "move-2", "move-3", "move-4", "move-5", "move-6"}
	s := newAdminScene(t, namespaces)
	for _, namespace := range namespaces {
		session, err := s.clients.open(t.Context(), namespace)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(follow(session).close)
	}
	conn, _, err := websocket.Dial(t.Context(), s.clients.base+"/ws/"+url.PathEscape(hostile), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseNow() })
	s.show(1280)

	s.buildCommands()
	s.useKeyboard()
	s.showHostileNames()
	s.watchMove(namespaces)
	s.showSilentRouter()
	s.compareRequests()
	t.Run("phone", func(t *testing.T) {
		phone := *s
		phone.t = t
		phone.show(390, chromedp.Flag("blink-settings", "preferredColorScheme=0"))
		phone.until("the session", text("#hot"), hostile)
		screenshot(t, phone.tab, "admin-phone-dark.png")
		if got := phone.read("document.documentElement.scrollWidth"); got != "390" {
			t.Errorf("the page is %s pixels wide on a phone, want 390", got)
		}
		if got := phone.read("getComputedStyle(document.body).backgroundColor"); got != "rgb(16, 19, 23)" {
			t.Errorf("in dark mode the page is %s", got)
		}
	})
}

// buildCommands compares the commands of the page, and what it asks /plan. A name that a
// shell reads otherwise than as itself has no command.
func (s *adminScene) buildCommands() {
	const object = `{ kind: 'ConfigMap', kube_namespace: 'edge', name: 'overwriting' }`
	set := func(name, call string) string {
		return fmt.Sprintf("(now.statefulset = { kube_namespace: 'edge', name: %q, cordon: '' }, %s)", name, call)
	}
	const sources = `['one', 'two'].map(name => ({ kind: 'ConfigMap', kube_namespace: 'edge', name }))`
	for script, want := range map[string]string{
		`pinCommand(` + object + `, 'my_x20room', 'backend-2')`:                                   `kubectl -n edge patch configmap overwriting --type=merge -p '{"data":{"my_x20room":"backend-2"}}'`,
		`pinCommand(` + object + `, '-n', null)`:                                                  `kubectl -n edge patch configmap overwriting --type=merge -p '{"data":{"-n":null}}'`,
		`pinCommand(` + object + `, "a'b", 'backend-2')`:                                          ``,
		`pinCommand(` + object + `, 'a', "b'; reboot '")`:                                         ``,
		`pinCommand(` + object + `, 'a', '-b')`:                                                   ``,
		`pinCommand({ kind: 'ConfigMap', kube_namespace: '$(id)', name: 'a' }, 'a', 'backend-2')`: ``,
		`pinCommand({ kind: 'ConfigMap', name: 'a b' }, 'a', 'backend-2')`:                        ``,
		`pinCommand({ kind: 'directory', name: 'dir;id' }, 'a', 'backend-2')`:                     ``,
		`pinCommand({ kind: 'directory', name: '/dir' }, 'a\nb', 'backend-2')`:                    ``,
		`pinCommand(undefined, 'a', 'backend-2')`:                                                 ``,
		set("backend", "cordonCommand([2, 5])"):                                                   `kubectl -n edge annotate statefulset backend router-cordon=2,5 --overwrite`,
		set("backend", "cordonCommand([])"):                                                       `kubectl -n edge annotate statefulset backend router-cordon-`,
		`(now.statefulset = { cordon: '', cordon_unknown: true }, showCordon({ name: 'backend-2', ordinal: 2 }), $('dialog').close(), $('dialog-text').textContent + $('dialog-command').textContent)`:  `No router knows which backends are cordoned.`,
		`(now.statefulset = { cordon: '1', cordons_differ: true }, showCordon({ name: 'backend-2', ordinal: 2 }), $('dialog').close(), $('dialog-text').textContent + $('dialog-command').textContent)`: `The routers have different lists of cordoned backends.`,
		set("backend", "scaleCommand(6)"):                   `kubectl -n edge scale statefulset backend --replicas=6`,
		set("`id`", "scaleCommand(6) + cordonCommand([1])"): ``,
		`sourceOf({ source: 'ConfigMap edge/two', rejected: [{ source: 'ConfigMap edge/one' }] }, ` + sources + `).name`: `two`,
		`sourceOf({ rejected: [{ source: 'ConfigMap edge/two' }] }, ` + sources + `).name`:                               `two`, // which unpinning has to change
		`sourceOf({}, ` + sources + `).name`:    `one`,
		`proposal(' 6 ').body`:                  `{"replicas":6}`,
		`proposal('cordon 5, 2').body`:          `{"cordon":[2,5]}`,
		`proposal('cordon none').body`:          `{"cordon":[]}`,
		`proposal('{"kind":"ConfigMap"}').body`: `{"kind":"ConfigMap"}`,
	} {
		if got := s.read(script); got != want {
			s.t.Errorf("%s is %q, want %q", script, got, want)
		}
	}
}

// useKeyboard finds an owner, copies the command that pins it, and makes a plan.
func (s *adminScene) useKeyboard() {
	t := s.t
	t.Helper()
	s.tabTo("#namespace")
	s.press("move-1", kb.Enter)
	s.until("the owner", text("#found"), "backend-0")
	for _, want := range []string{"an override in directory", "router-a\n1 session", "router-b\n0 sessions", "rm " + s.overrides + "/move-1"} {
		if got := s.read(text("#found")); !strings.Contains(got, want) {
			t.Errorf("%q, want %q in it", got, want)
		}
	}
	s.pinNothing()
	s.tabTo("#pin-choice")
	s.press("backend-2")
	s.until("the command", text("#found code"), "echo backend-2 > "+s.overrides+"/move-1")
	s.tabTo("#found .command button")
	s.press(kb.Enter)
	s.until("the copy", `/Copied|Selected/.test(`+text("#found .command button")+`)`, "true")
	s.tabTo("#proposal")
	s.press("0")
	s.tabTo("#plan button")
	s.press(kb.Enter)
	s.until("the error", text("#plan-error"), "replicas must be 1 to")
	s.do(`document.getElementById('proposal').value = '1'`)
	s.press(kb.Enter)
	s.until("the plan", text("#planned"), "would move")
	if got := s.read(text("#planned")); !strings.Contains(got, "With 1 backend: ") {
		t.Errorf("the plan is %q", got)
	}
	screenshot(t, s.tab, "admin-plan.png")
}

// pinNothing looks for a namespace that cannot have an override, because its key would be
// too long, and that looks like the key of another one; and then for the one before.
func (s *adminScene) pinNothing() {
	s.t.Helper()
	before := s.read(`document.getElementById('namespace').value`)
	s.do(fmt.Sprintf("find(%q, false)", strings.Repeat("a", 249)+"_x41"))
	s.until("its note", text("#found"), "it cannot have an override")
	if got := s.read(`[...document.querySelectorAll('#found code')].filter(code => code.checkVisibility()).length`); got != "0" {
		s.t.Errorf("there are %s commands to pin what cannot have an override", got)
	}
	s.do(fmt.Sprintf("find(%q, false)", before))
	s.until("its command", text("#found code"), "echo ")
}

// showHostileNames looks for a namespace and a rejected override whose text is HTML.
func (s *adminScene) showHostileNames() {
	t := s.t
	t.Helper()
	s.until("the rejected override", text("#rejections"), hostile)
	s.until("the namespace", text("#hot"), hostile)
	s.do(`[...document.querySelectorAll('#hot button')].find(b => b.textContent.startsWith('<img')).click()`)
	s.until("its owner", text("#found"), "its hash")
	if got := s.read(`document.getElementById('namespace').value`); got != hostile {
		t.Errorf("%q was looked up, want %q", got, hostile)
	}
	if got := s.read(`document.querySelectorAll('img').length + document.title`); got != "0router" {
		t.Errorf("the page has %s, want no image and its own title", got)
	}
}

// watchMove changes the owner of these namespaces, and looks until their sessions have
// moved.
func (s *adminScene) watchMove(namespaces []string) {
	t := s.t
	t.Helper()
	s.do(`find('move-6', false)`)
	for _, namespace := range namespaces {
		s.override(namespace, "backend-1")
	}
	s.until("the move", text("#moves-now"), "under way")
	s.until("its progress", text("#moving"), "2 sessions per second")
	screenshot(t, s.tab, "admin-move.png")
	s.until("its receipt", text("#receipts tbody"), "move-1, move-2, move-3 and 3 more")
	s.until("its end", text("#moves-now"), "No change is under way")
	row := s.read(`[...document.querySelectorAll('#receipts tbody tr:first-child td')].slice(2, 4).map(td => td.innerText)`)
	if row != "6,6" {
		t.Errorf("planned and moved are %s, want 6,6", row)
	}
	s.until("the new owner", text("#found dd.big"), "backend-1")
}

// showSilentRouter stops the second router for a while, and then the first one.
func (s *adminScene) showSilentRouter() {
	t := s.t
	t.Helper()
	signal(t, s.second, syscall.SIGSTOP)
	s.until("the silent router", text("#problems"), "does not answer")
	s.until("the count", text("#agree"), "1 of 2 agree")
	screenshot(t, s.tab, "admin-silent.png")
	if got := s.read(`getComputedStyle(document.getElementById('state')).color`); !red(got) {
		t.Errorf("the state is %s, want red", got)
	}
	signal(t, s.second, syscall.SIGCONT)
	s.until("its answer", text("#agree"), "2 of 2 agree")
	s.until("no problem with it", `!`+text("#problems")+`.includes('does not answer')`, "true")

	signal(t, s.first, syscall.SIGSTOP)
	s.until("the page's own router", text("#problems"), "No answer since ")
	s.until("its state", text("#state"), "No answer")
	screenshot(t, s.tab, "admin-no-answer.png")
	signal(t, s.first, syscall.SIGCONT)
	s.until("its answer", `!`+text("#problems")+`.includes('No answer')`, "true")
}

func signal(t *testing.T, p *process, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// red reports whether there is more red than green and blue in a colour like
// "rgb(179, 38, 30)".
func red(color string) bool {
	var r, g, b int
	if _, err := fmt.Sscanf(color, "rgb(%d, %d, %d)", &r, &g, &b); err != nil {
		return false
	}
	return r > g+40 && r > b+40
}

// compareRequests sees that the page has asked its own router only, and that the browser
// had nothing to forbid; and then that it does forbid HTML that is made of text.
func (s *adminScene) compareRequests() {
	t := s.t
	t.Helper()
	others := s.read(`performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith(location.origin + '/')).join()`)
	if asked := s.read(`performance.getEntriesByType('resource').length`); others != "" || asked == "0" {
		t.Errorf("of %s requests these went elsewhere: %q", asked, others)
	}
	if got := s.read(`violations.join()`); got != "" {
		t.Errorf("the browser forbade %s", got)
	}
	got := s.read(`(() => { try { document.body.innerHTML = '<b>'; return 'allowed'; } catch (e) { return e.name; } })()`)
	if got != "TypeError" {
		t.Errorf("HTML of text: %s, want a TypeError", got)
	}
	s.until("the browser's report", `violations.join()`, "require-trusted-types-for")
}
