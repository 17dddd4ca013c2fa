package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// pageRows is how many namespaces the page shows in this test.
const pageRows = 16

// cell is the green cell of a row of the page.
type cell struct {
	Backend string
	Counter int
	Text    string // of the whole cell
	Color   string // as the browser paints it
}

// readCells is JavaScript that collects the green cells by namespace. A row
// with none or several is reported by their number.
const readCells = `(() => {
	const rows = {};
	for (const tr of document.querySelectorAll('tr[data-namespace]')) {
		const live = tr.querySelectorAll('td.live');
		const cell = live.length === 1 ? live[0] : null;
		rows[tr.dataset.namespace] = cell ? {
			Backend: cell.dataset.backend,
			Counter: parseInt(cell.innerText, 10) || 0,
			Text: cell.innerText,
			Color: getComputedStyle(cell.firstElementChild || cell).backgroundColor,
		} : { Backend: live.length + ' green cells' };
	}
	return rows;
})()`

// TestPage opens the demo page in Chromium: all rows are green where /owner
// says, and an override moves the green cell of its row and no other.
func TestPage(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	tab := s.newBrowser()
	var namespaces []string
	for i := range pageRows {
		namespaces = append(namespaces, fmt.Sprintf("%spage-%02d", prefix, i))
	}
	s.openPage(tab, "?namespaces="+strings.Join(namespaces, ","))
	owners := map[string]string{}
	for _, namespace := range namespaces {
		owners[namespace] = s.mustOwner(namespace).Owner
	}
	before := awaitCells(t, tab, owners)
	screenshot(t, tab, "page-before.png")

	moved := namespaces[5]
	owners[moved] = s.other(owners[moved])
	s.apply(map[string]string{moved: owners[moved]})
	began := time.Now()
	after := awaitCells(t, tab, owners)
	t.Logf("page: the green cell of %s was on %s %s after kubectl apply (it was on %s)",
		moved, owners[moved], time.Since(began).Round(10*time.Millisecond), before[moved].Backend)
	screenshot(t, tab, "page-after.png")
	for _, namespace := range namespaces {
		was, is := before[namespace], after[namespace]
		// A connection made anew begins at 1 again.
		if namespace != moved && (is.Backend != was.Backend || is.Counter < was.Counter) {
			t.Errorf("row %s: %+v became %+v", namespace, was, is)
		}
	}
	goOnCounting(t, tab, after)
}

// openPage opens the demo page with this query. Where no nginx serves it, it is written into
// another answer of the same origin.
func (s *system) openPage(tab context.Context, query string) {
	s.t.Helper()
	url, write := "https://"+hostName+"/"+query, ""
	if !s.hasNginx() {
		url = "https://" + hostName + "/ws/" + prefix + "page" + query
		page, err := json.Marshal(readFile(s.t, "../nginx/page/index.html"))
		if err != nil {
			s.t.Fatal(err)
		}
		write = "document.open(); document.write(" + string(page) + "); document.close();"
	}
	if err := openPage(tab, url, chromedp.EmulateViewport(1280, 960)); err != nil {
		s.t.Fatalf("open %s: %v", url, err)
	}
	if write != "" {
		if _, err := chromedp.Run(tab, chromedp.Evaluate[any](write)); err != nil {
			s.t.Fatalf("write the page: %v", err)
		}
	}
}

// awaitCells waits until each row has one green cell, in the column of its
// owner, with the router's pod and a counter.
func awaitCells(t *testing.T, tab context.Context, owners map[string]string) map[string]cell {
	t.Helper()
	var cells map[string]cell
	eventually(t, 30*time.Second, "the green cells", func() error {
		var err error
		if cells, err = chromedp.Run(tab, chromedp.Evaluate[map[string]cell](readCells)); err != nil {
			t.Fatal(err)
		}
		if len(cells) != len(owners) {
			return fmt.Errorf("%d rows, want %d", len(cells), len(owners))
		}
		for namespace, owner := range owners {
			if c := cells[namespace]; c.Backend != owner || c.Counter < 1 || !strings.Contains(c.Text, "router-") || !green(c.Color) {
				return fmt.Errorf("row %s is %+v, want it green on %s with a counter and the router's pod", namespace, c, owner)
			}
		}
		return nil
	})
	return cells
}

// green reports whether there is more green than red and blue in a colour like
// "rgb(26, 127, 69)".
func green(color string) bool {
	var r, g, b int
	if _, err := fmt.Sscanf(color, "rgb(%d, %d, %d)", &r, &g, &b); err != nil {
		return false
	}
	return g > r+20 && g > b+20
}

// goOnCounting sees every counter rise.
func goOnCounting(t *testing.T, tab context.Context, before map[string]cell) {
	t.Helper()
	eventually(t, 10*time.Second, "the counters to rise", func() error {
		now, err := chromedp.Run(tab, chromedp.Evaluate[map[string]cell](readCells))
		if err != nil {
			t.Fatal(err)
		}
		for namespace, was := range before {
			if now[namespace].Backend != was.Backend || now[namespace].Counter < was.Counter+2 {
				return fmt.Errorf("row %s: %+v, was %+v", namespace, now[namespace], was)
			}
		}
		return nil
	})
}
