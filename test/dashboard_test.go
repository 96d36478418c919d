package test

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/process"
)

func TestCookieIsSecureWhereverTheVisitorUsedTLS(t *testing.T) {
	r := newRig(t)
	withTLS := fmt.Sprintf("https://localhost:%d", process.FreePort(t))
	g := r.write(managedSite+strings.Replace(managedSite, "http://:PORT {", withTLS+" {\n\t"+newAuthority(t).tls("localhost"), 1),
		"rekall {\n\t\tdatabase {env.REKALL_DATABASE_URL}\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.1/32\n\t}")
	g.run(r.database)
	g.waitReady()
	manager, _, err := r.admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "Manager", Account: "acme", Environment: "production", Scopes: []string{"memories:read"}, ManageKeys: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"key": {manager.Key.Reveal()}}.Encode()
	for _, one := range []struct {
		site, from, scheme string
		secure             bool
	}{
		{withTLS, "127.0.0.1", "", true},
		{withTLS, "127.0.0.1", "http", true},
		{g.http, "127.0.0.1", "https", true},
		{g.http, "127.0.0.1", "HTTPS, http", true},
		{g.http, "127.0.0.1", "http", false},
		{g.http, "127.0.0.1", "", false},
		{g.http, "127.0.0.2", "https", false}, // no trusted proxy
	} {
		browser := &http.Client{
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Transport: &http.Transport{
				DialContext:     (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(one.from)}}).DialContext,
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
			},
		}
		header := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		if one.scheme != "" {
			header.Set("X-Forwarded-Proto", one.scheme)
		}
		signedIn, err := sendBy(browser, "POST", one.site+dashboard.Root+"/sign-in", header, strings.NewReader(form))
		if err != nil {
			t.Fatal(err)
		}
		cookies := signedIn.Cookies()
		if len(cookies) != 1 || cookies[0].Secure != one.secure || strings.HasPrefix(cookies[0].Name, "__Host-") != one.secure {
			t.Errorf("%s from %s by %q: %d, cookies %v", one.site, one.from, one.scheme, signedIn.StatusCode, cookies)
			continue
		}
		header.Set("Cookie", cookies[0].Name+"="+cookies[0].Value)
		if list, err := sendBy(browser, "GET", one.site+dashboard.Root, header, nil); err != nil || list.StatusCode != http.StatusOK {
			t.Errorf("%s from %s by %q: %d, error %v with the cookie", one.site, one.from, one.scheme, list.StatusCode, err)
		}
		browser.CloseIdleConnections()
	}
}

func TestNoBackendIsSentASessionOfTheDashboard(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	for sent, received := range map[string][]string{
		"__Host-rekall-session=secret":                 nil,
		"a=1; __Host-rekall-session=secret; b=\"x y\"": {"a=1; b=\"x y\""},
		"rekall-session=secret;c=3":                    {"c=3"},
		"not-rekall-session=1;d=4":                     {"not-rekall-session=1; d=4"},
		"e=5;f=6":                                      {"e=5;f=6"},
	} {
		header := bearer(r.key("production", "memories:read"))
		header.Set("Cookie", sent)
		if got := g.do("GET", "/v1/memories", header).echo(t).Headers["Cookie"]; !slices.Equal(got, received) {
			t.Errorf("of %s the backend received %q, want %q", sent, got, received)
		}
	}
}
