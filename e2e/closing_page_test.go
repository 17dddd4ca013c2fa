package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/coder/websocket"
)

// tabStreams is JavaScript that listens to streams, and talks, as stream does.
// follow opens one; all is what became of them.
const tabStreams = `(() => {
	const period = %d, step = %d, words = new Int32Array(%d / 4 + period);
	for (let i = 0, x = %d; i < words.length; i++) {
		x ^= x << 13;
		x ^= x >>> 17;
		x ^= x << 5;
		words[i] = 0x61616161 + (x & 0x0f0f0f0f);
	}
	const message = (number, i, size) => {
		const start = (step * number + i) %% period;
		return words.subarray(start, start + size / 4);
	};
	const differs = (data, want) => {
		if (!(data instanceof ArrayBuffer) || data.byteLength !== want.byteLength) {
			return 'it is of ' + (data.byteLength ?? data.length) + ' bytes, want ' + want.byteLength;
		}
		const got = new Int32Array(data);
		for (let i = 0; i < want.length; i++) {
			if (got[i] !== want[i]) return 'word ' + i + ' is ' + got[i] + ', want ' + want[i];
		}
		return '';
	};
	window.all = [];
	window.follow = (url, number, size, back) => {
		const s = { Number: number, Heard: 0, Wrong: '', Extensions: '', Closed: false, Left: 0, Code: 0, Reason: '', Clean: false };
		all.push(s);
		const ws = new WebSocket(url);
		ws.binaryType = 'arraybuffer';
		let said = 0;
		const talk = () => { // no more than is taken, or onclose may be late
			if (ws.readyState === WebSocket.OPEN && ws.bufferedAmount === 0) ws.send(message(back, said++, size));
		};
		ws.onopen = () => {
			s.Extensions = ws.extensions;
			if (back) talk();
		};
		ws.onmessage = ({ data }) => {
			const wrong = differs(data, message(number, s.Heard, size));
			if (wrong) s.Wrong ||= 'message ' + s.Heard + ': ' + wrong;
			s.Heard++;
			if (back) talk();
		};
		ws.onclose = (e) => Object.assign(s, { Closed: true, Left: ws.bufferedAmount, Code: e.code, Reason: e.reason, Clean: e.wasClean });
	};
})()`

// tabStream is what became of a stream in the browser.
type tabStream struct {
	Number, Heard int64
	Wrong         string // the first message that is not what was sent
	Extensions    string
	Closed        bool
	Left          int64 // bytes of its own that it could not send: then no Close is clean, to Chromium
	Code          websocket.StatusCode
	Reason        string
	Clean         bool
}

// closedBy is nil if the stream is closed by this Close, and was whole until then.
func (s tabStream) closedBy(want websocket.CloseError) error {
	switch {
	case !s.Closed:
		return fmt.Errorf("stream %d is not closed: %+v", s.Number, s)
	case s.Wrong != "" || s.Heard < flowing || s.Clean != (s.Left == 0) || s.Code != want.Code || s.Reason != want.Reason:
		return fmt.Errorf("stream %d became %+v, want whole messages, at least %d, and Close %v, clean if nothing was left to send", s.Number, s, flowing, want)
	}
	return nil
}

// newClosingTab starts Chromium with a page that can follow streams.
func newClosingTab(t *testing.T) *tab {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<!doctype html><title>streams</title>")
	}))
	t.Cleanup(server.Close)
	p := &tab{Context: startBrowser(t, t.TempDir())}
	if err := openPage(p, server.URL); err != nil {
		t.Fatalf("open %s: %v", server.URL, err)
	}
	p.mustRun(t, fmt.Sprintf(tabStreams, noisePeriod, noiseStep, largest, noiseSeed))
	return p
}

// mustRun runs JavaScript.
func (p *tab) mustRun(t *testing.T, script string) {
	t.Helper()
	if _, err := chromedp.Run(p, chromedp.Evaluate[chromedp.Void](script+"; undefined")); err != nil {
		t.Fatalf("JavaScript %.200s: %v", script, err)
	}
}

// tabAhead is how many bytes may be on the way to a stream in Chromium, which is
// asked every 20 ms how far it is.
const tabAhead = 256 << 10

// tab is a page in Chromium that can follow streams.
type tab struct {
	context.Context
	hearings map[int64]*hearing // of its streams, by number
}

// await waits until check is nil for each stream of the tab.
func (p *tab) await(t *testing.T, what string, check func(tabStream) error) []tabStream {
	t.Helper()
	var all []tabStream
	eventually(t, closeMost, what, func() error {
		var err error
		if all, err = chromedp.Run(p, chromedp.Evaluate[[]tabStream]("all")); err != nil {
			t.Fatal(err)
		}
		p.note(all)
		for _, s := range all {
			if err := check(s); err != nil {
				return err
			}
		}
		return nil
	})
	return all
}

// note tells the backends how far the streams are.
func (p *tab) note(all []tabStream) {
	for _, s := range all {
		h := p.hearings[s.Number]
		h.whole.Store(s.Heard)
		select {
		case <-h.done:
		default:
			if s.Closed {
				close(h.done)
			}
		}
	}
}

// follow opens so many sessions of each shape in the tab, and waits until their
// streams flow. It returns how many there are.
func (c *closing) follow(t *testing.T, p *tab, of []shape, each int, f flow) int {
	t.Helper()
	p.mustRun(t, "all = []")
	p.hearings = map[int64]*hearing{}
	for _, s := range of {
		for range each {
			c.streams++
			h, back := newHearing(stream{s, c.streams}), 0
			h.ahead = tabAhead
			p.hearings[int64(h.number)] = h
			c.backends[c.owner].expect(h)
			if f.both {
				back = h.back().number
			}
			p.mustRun(t, fmt.Sprintf("follow(%q, %d, %d, %d)", c.address(t)+"/ws/"+s.name+f.query(h.number)+"&sliced", h.number, s.size, back))
		}
	}
	p.await(t, "the streams to flow in Chromium", func(s tabStream) error {
		if s.Closed || s.Heard < flowing {
			return fmt.Errorf("stream %d: %+v, want %d messages", s.Number, s, flowing)
		}
		if got, want := strings.HasPrefix(s.Extensions, "permessage-deflate"), p.hearings[s.Number].deflate; got != want {
			t.Fatalf("stream %d: its extensions are %q, want permessage-deflate: %v", s.Number, s.Extensions, want)
		}
		return nil
	})
	c.awaitFlow(t, nil, len(p.hearings), f)
	return len(p.hearings)
}

// closedInTab waits until all streams of the tab are closed, and judges how.
func closedInTab(t *testing.T, p *tab, want websocket.CloseError) {
	t.Helper()
	all := p.await(t, "the Close frames in Chromium", func(s tabStream) error {
		if !s.Closed {
			return s.closedBy(want)
		}
		return nil
	})
	for _, s := range all {
		if err := s.closedBy(want); err != nil {
			t.Error(err)
		}
	}
}

// TestClosingPageMoved is TestClosingMoved with Chromium in place of the library,
// which bears a Close in any place.
func TestClosingPageMoved(t *testing.T) {
	p := newClosingTab(t)
	c, sessions := newClosing(t, build(t, ".")), 0
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			for _, f := range directions {
				if f.both && (s.deflate && s.size > 64 || s.size > tabSays) {
					continue // Chromium sends it as it likes: compressed fragments the backend does not bear (see forLibrary)
				}
				old := c.owner
				n := c.follow(t, p, []shape{s}, tabSessions, f)
				sessions += n
				c.move(t)
				closedInTab(t, p, restarts)
				c.backendClosed(t, old, n, f)
			}
		})
	}
	c.logged(t, sessions, "moved", false)
}

// tabSays is the largest message that Chromium sends here: it takes its time.
const tabSays = 64 << 10

// tabSessions is how many sessions of a shape Chromium has at once: one thread
// reads them all.
const tabSessions = 3

// forTab are the shapes that Chromium can have all at once: of the largest, other
// streams would wait for longer than the router does.
func forTab(most int) []shape {
	return slices.DeleteFunc(slices.Clone(shapes), func(s shape) bool { return s.size > most })
}

// TestClosingPageDrained is TestClosingDrained with Chromium, and many shapes at once.
func TestClosingPageDrained(t *testing.T) {
	p := newClosingTab(t)
	c, f := newClosing(t, build(t, ".")), flow{}
	n := c.follow(t, p, forTab(largest-1), 1, f)
	c.stop(t)
	closedInTab(t, p, goesAway)
	c.backendClosed(t, c.owner, n, f)
	c.logged(t, n, "drain", false)
}

// TestClosingPageDeaf is TestClosingDeaf with Chromium.
func TestClosingPageDeaf(t *testing.T) {
	p := newClosingTab(t)
	c, sessions := newClosing(t, build(t, ".")), 0
	for _, f := range []flow{{deaf: true}, {deaf: true, both: true}} {
		most := largest - 1
		if f.both {
			most = tabSays
		}
		sessions += c.follow(t, p, forTab(most), 1, f)
		c.move(t)
		closedInTab(t, p, restarts)
	}
	c.logged(t, sessions, "moved", true)
}
