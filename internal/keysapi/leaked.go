package keysapi

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const (
	// maxReport is the size in bytes of a report: keyadmin.MaxLeaked keys of 48 characters, with room for spaces.
	maxReport = 128 << 10

	// maxGitHubReport is that of one of GitHub's, which has no documented limit and an address for each key.
	maxGitHubReport = 4 << 20

	// longReports is how many of GitHub's that are longer than others' are read at once: anyone can send what looks like one.
	longReports = 4
)

// leaksOfOne is how often one address may report, at once and per minute: a finder has one key, or all in one report.
const leaksOfOne = 10

// leaksOfSite is how often the addresses of an IPv6 site, a /48 (RFC 6177), may report together. Whoever has one has 65,536 of what counts
// as an address, and could use up what all may report.
const leaksOfSite = 30

// leaksOfAll bounds what all addresses together can write into the audit: so many reports at once, and per minute.
const leaksOfAll = 300

// received is all that anybody is told of a report, whatever was in it.
type received struct {
	Received int `json:"received"`
}

// leaked revokes the keys that somebody has found.
func (a *API) leaked(r *http.Request) (answer, error) {
	client := a.Client(r)
	if err := a.admit(client); err != nil {
		return answer{}, err
	}
	f, err := readFields(r, maxReport, "keys")
	if err != nil {
		return answer{}, err
	}
	var keys []string
	if err := f.texts("keys", &keys); err != nil {
		return answer{}, err
	}
	reporter := "unknown"
	if client.IsValid() {
		reporter = client.String()
	}
	return a.report(r.Context(), reporter, keys)
}

// report revokes keys, and says how many it looked at.
func (a *API) report(ctx context.Context, reporter string, keys []string) (answer, error) {
	revocation, err := a.Admin.Leaked(ctx, reporter, keys)
	if err != nil {
		return answer{}, err
	}
	a.Logger.Warn("keys were reported as leaked",
		zap.String("reporter", reporter), zap.Int("keys", len(keys)), zap.Int64("revoked", revocation.Count))
	return answer{status: http.StatusAccepted, body: resourceBody{received{len(keys)}}}, nil
}

// admit refuses an address that reports too often.
func (a *API) admit(client netip.Addr) error {
	if verdict := a.finders.Take(client); !verdict.Allowed {
		return errTooOften.Later(verdict.RetryAfter)
	}
	if client.Is6() && !client.Is4In6() {
		site, _ := client.Prefix(48) // of 128 bits
		if verdict := a.sites.Take(site.Addr()); !verdict.Allowed {
			return errTooOften.Later(verdict.RetryAfter)
		}
	}
	if !a.reports.Allow() {
		return errTooOften.Later(time.Minute / leaksOfAll)
	}
	return nil
}

var errTooOften = apierror.New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
	"Too many reports. Send many keys in one report, or try again later.")

// errBusy is no errUnavailable, which is logged: strangers could fill the log.
var errBusy = apierror.New(http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE",
	"Too many long reports come in at once. Try again shortly.")

var errGitHubBody = invalid("", "The body must be a list of objects that each have a token.")

// leakedOnGitHub revokes the keys that GitHub's secret scanning has found. Nothing of the body is believed, and not even
// parsed, before its signature is; without one by a key that GitHub has published it is not even read.
func (a *API) leakedOnGitHub(r *http.Request) (answer, error) {
	signature, err := readSignature(r.Header)
	if err != nil {
		return answer{}, err
	}
	key, err := a.GitHub.key(r.Context(), signature.identifier)
	if err != nil {
		return answer{}, err
	}
	if r.ContentLength < 0 || r.ContentLength > maxReport {
		select {
		case a.longReports <- struct{}{}:
			defer func() { <-a.longReports }()
		case <-r.Context().Done():
			if err := r.Context().Err(); !errors.Is(err, context.DeadlineExceeded) {
				return answer{}, err // the client went away
			}
			return answer{}, errBusy
		}
	}
	body, err := readBody(r, maxGitHubReport)
	if err != nil {
		return answer{}, err
	}
	if err := signature.verify(key, body); err != nil {
		return answer{}, err
	}
	var matches []struct {
		Token *string `json:"token"` // GitHub adds a type, a URL and a source, and may add more
	}
	if json.Unmarshal(body, &matches) != nil {
		return answer{}, errGitHubBody
	}
	tokens := make([]string, 0, len(matches))
	for _, match := range matches {
		if match.Token == nil {
			return answer{}, errGitHubBody
		}
		tokens = append(tokens, *match.Token)
	}
	for batch := range slices.Chunk(tokens, keyadmin.MaxLeaked) {
		if _, err := a.report(r.Context(), "github", batch); err != nil {
			return answer{}, err
		}
	}
	return answer{status: http.StatusAccepted, body: resourceBody{received{len(tokens)}}}, nil
}
