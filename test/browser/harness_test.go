// Package browser drives the dashboard in Chromium, as people use it, before two gateways and a real Postgres.
package browser

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	cdpbrowser "github.com/chromedp/cdproto/browser"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/page"
	cdpruntime "github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// world is what all walks share: each has an account and a tab of its own.
var world struct {
	chromium context.Context
	database string
	admin    *keyadmin.Admin
	gateway  string      // base URL of the gateway that is visited
	log      process.Log // of both gateways
}

func TestMain(m *testing.M) { pgtest.Main(m) }

const site = `{
	admin 127.0.0.1:%[2]d
	persist_config off
	auto_https disable_redirects
	skip_install_trust
	storage file_system %[3]q
	log {
		level DEBUG
	}
	grace_period 2s
	rekall {
		database {env.REKALL_DATABASE_URL}
		usage_flush 200ms
		edge %[4]s eu
	}
}

http://:%[1]d {
	bind 127.0.0.1
	log
	rekall_keys
	rekall_gateway {
		production {
			reverse_proxy %[5]s
		}
		sandbox {
			reverse_proxy %[6]s
		}
	}
}
`

// start makes the world, which lives as long as the test.
func start(t testing.TB) {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("there is no chromium, which drives these tests: install Debian's package chromium, or run test/all")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "rekall-gateway")
	if err := process.Build(program, "../../cmd/rekall-gateway"); err != nil {
		t.Fatal(err)
	}
	world.database = pgtest.Migrated(t)
	world.admin = keyadmin.New(pgtest.Store(t, world.database))
	backends := []any{backendtest.Start(t, "production").Address(), backendtest.Start(t, "sandbox").Address()}
	startGateway(t, program, dir, "south", backends)
	world.gateway = startGateway(t, program, dir, "north", backends)
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(chromium), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.WSURLReadTimeout(time.Minute))
	allocator, stopChromium := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(stopChromium)
	tab, closeTab := chromedp.NewContext(allocator)
	t.Cleanup(closeTab)
	if err := chromedp.Run(tab); err != nil {
		t.Fatal(err)
	}
	world.chromium = tab
}

// startGateway runs a gateway, waits until it is ready and returns its base URL.
func startGateway(t testing.TB, program, dir, name string, backends []any) string {
	t.Helper()
	port, adminPort := process.FreePort(t), process.FreePort(t)
	file := filepath.Join(dir, name+".caddyfile")
	text := fmt.Sprintf(site, append([]any{port, adminPort, filepath.Join(dir, name), name}, backends...)...)
	process.Write(t, file, text)
	gateway := process.Start(t, process.Options{Env: []string{"REKALL_DATABASE_URL=" + world.database, "HOME=" + dir}, Log: &world.log},
		program, "run", "--config", file, "--adapter", "caddyfile")
	eventually.True(t, "the gateway "+name+" is ready", func() bool {
		gateway.MustRun(t)
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/rekall/ready", adminPort))
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return fmt.Sprintf("http://127.0.0.1:%d", port)
}

// key makes a key.
func key(t testing.TB, account, name string, manage bool) keyadmin.Key {
	t.Helper()
	key, _, err := world.admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: name, Account: account, Environment: "production", Scopes: apikey.ScopeNames(), ManageKeys: manage, ExpiresIn: "90d",
	})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// call sends a request with a key to the first gateway, again while nobody can tell whether the key is good, and returns the status.
func call(t testing.TB, method, path, key string) (status int) {
	t.Helper()
	eventually.True(t, "the gateway can tell", func() bool {
		status = callOnce(t, method, path, key)
		return status != http.StatusServiceUnavailable
	})
	return status
}

func callOnce(t testing.TB, method, path, key string) int {
	t.Helper()
	req, err := http.NewRequest(method, world.gateway+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// tab is a browser window of its own: it shares no cookies.
type tab struct {
	t       testing.TB
	ctx     context.Context
	context cdp.BrowserContextID

	mu       sync.Mutex
	problems []string // that the browser's console shows
	expected bool     // whether there are to be some
}

const patience = time.Minute

func newTab(t testing.TB) *tab {
	t.Helper()
	browserContext, window := openWindow(t)
	ctx, cancel := chromedp.NewContext(world.chromium, chromedp.WithTargetID(window))
	t.Cleanup(cancel)
	b := &tab{t: t, ctx: ctx, context: browserContext}
	chromedp.ListenTarget(ctx, func(event any) {
		switch event := event.(type) {
		case *cdpruntime.EventExceptionThrown:
			b.problem(event.ExceptionDetails.Error())
		case *log.EventEntryAdded:
			if event.Entry.Source == log.SourceSecurity || event.Entry.Source == log.SourceViolation {
				b.problem(event.Entry.Text)
			}
		}
	})
	b.run(log.Enable(), emulation.SetFocusEmulationEnabled(true), chromedp.EmulateViewport(1280, 860))
	t.Cleanup(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !b.expected && len(b.problems) > 0 {
			t.Errorf("the browser's console shows %q", b.problems)
		}
	})
	return b
}

// openWindow makes a browser context with a window: Chromium opens no tab in a context that has none.
func openWindow(t testing.TB) (cdp.BrowserContextID, target.ID) {
	t.Helper()
	ctx := cdp.WithExecutor(world.chromium, chromedp.FromContext(world.chromium).Browser)
	browserContext, err := target.CreateBrowserContext().Do(ctx)
	if err != nil {
		t.Fatal(err)
	}
	id, err := target.CreateTarget("about:blank").WithBrowserContextID(browserContext).WithNewWindow(true).Do(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return browserContext, id
}

func (b *tab) problem(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.problems = append(b.problems, text)
}

// run does something in the tab, and shows the page where it fails.
func (b *tab) run(actions ...chromedp.Action) {
	b.t.Helper()
	// The first run makes the tab, which lives as long as that run's context.
	if chromedp.FromContext(b.ctx).Target == nil {
		if err := chromedp.Run(b.ctx); err != nil {
			b.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if err := chromedp.Run(ctx, actions...); err != nil {
		text, address := "", ""
		ctx, cancel := context.WithTimeout(b.ctx, patience)
		defer cancel()
		_ = chromedp.Run(ctx, chromedp.Location(&address), chromedp.Text("body", &text, chromedp.ByQuery))
		b.t.Fatalf("%v\nat %s:\n%s", err, address, apikey.Redact(text))
	}
}

// open opens a path below the dashboard's root.
func (b *tab) open(path string) {
	b.t.Helper()
	b.run(chromedp.Navigate(world.gateway + dashboard.Root + path))
}

// see waits for an element that has a text.
func (b *tab) see(selector, text string) {
	b.t.Helper()
	xpath := fmt.Sprintf(`//%s[contains(normalize-space(.), %q)]`, selector, text)
	b.run(chromedp.WaitVisible(xpath, chromedp.BySearch))
}

// holds waits until an expression is true in the page.
func (b *tab) holds(what, expression string) {
	b.t.Helper()
	eventually.True(b.t, what, func() (is bool) {
		b.run(chromedp.Evaluate(expression, &is))
		return is
	})
}

func (b *tab) click(selector, text string) {
	b.t.Helper()
	xpath := fmt.Sprintf(`//%s[contains(normalize-space(.), %q)]`, selector, text)
	b.run(chromedp.Click(xpath, chromedp.BySearch, chromedp.NodeVisible))
}

func (b *tab) fill(selector, text string) {
	b.t.Helper()
	b.run(chromedp.Focus(selector, chromedp.ByQuery, chromedp.NodeVisible),
		input.DispatchKeyEvent(input.KeyDown).WithCommands([]string{"selectAll"}), chromedp.KeyEvent(kb.Backspace), chromedp.KeyEvent(text))
}

// awaitFocus waits until the page has put the cursor into a field, which it does a moment after it can be seen.
func (b *tab) awaitFocus() {
	b.t.Helper()
	b.holds("a field has the focus", `document.activeElement.matches("input")`)
}

func (b *tab) check(selector string) {
	b.t.Helper()
	b.run(chromedp.Click(selector, chromedp.ByQuery, chromedp.NodeVisible))
}

// html is the source of the page as it stands.
func (b *tab) html() (html string) {
	b.t.Helper()
	b.run(chromedp.OuterHTML("html", &html, chromedp.ByQuery))
	return html
}

func (b *tab) location() (address string) {
	b.t.Helper()
	b.run(chromedp.Location(&address))
	return address
}

// signIn opens the dashboard as the holder of a key.
func (b *tab) signIn(key keyadmin.Key) {
	b.t.Helper()
	call(b.t, "GET", "/v1/api-keys", key.Key.Reveal()) // on a busy machine, the gateway may not be able to tell at first
	b.open("")
	b.fill("#key", key.Key.Reveal())
	b.click("button", "Sign in")
	b.see("h1", "API Keys")
}

// secret reads the key that is shown.
func (b *tab) secret() string {
	b.t.Helper()
	var secret string
	b.run(chromedp.WaitVisible("#secret", chromedp.ByQuery), chromedp.Value("#secret", &secret, chromedp.ByQuery))
	if !apikey.ContainsKey(secret) {
		b.t.Fatal("no key is shown")
	}
	return secret
}

// back goes back in the tab's history, as its button does.
func (b *tab) back() {
	b.t.Helper()
	b.run(chromedp.ActionFunc(func(ctx context.Context) error {
		current, entries, err := page.GetNavigationHistory().Do(ctx)
		if err != nil || current == 0 {
			return errors.Join(err, fmt.Errorf("entry %d of the history", current))
		}
		return page.NavigateToHistoryEntry(entries[current-1].ID).Do(ctx)
	}), chromedp.WaitReady("body", chromedp.ByQuery))
}

// allowClipboard lets pages of this tab write to and read from its clipboard.
func (b *tab) allowClipboard() {
	b.t.Helper()
	b.run(chromedp.ActionFunc(func(ctx context.Context) error {
		for _, name := range []string{"clipboard-read", "clipboard-write"} {
			permission := &cdpbrowser.PermissionDescriptor{Name: name, AllowWithoutSanitization: true}
			err := cdpbrowser.SetPermission(permission, cdpbrowser.PermissionSettingGranted).
				WithBrowserContextID(b.context).Do(cdp.WithExecutor(ctx, chromedp.FromContext(ctx).Browser))
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

func awaitPromise(p *cdpruntime.EvaluateParams) *cdpruntime.EvaluateParams {
	return p.WithAwaitPromise(true)
}
