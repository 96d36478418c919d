package apierror_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
)

func written(e *apierror.Error) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	e.Write(w, "req_0123456789")
	return w
}

func TestEveryOutcomeButAllowedHasAnErrorThatIsPreparedAsItIsEncoded(t *testing.T) {
	for o := range apikey.OutcomeCount {
		e := apierror.Of(o)
		if o == apikey.Allowed {
			if e != nil {
				t.Errorf("%s is answered %v", o, e)
			}
			continue
		}
		if e == nil {
			t.Errorf("%s has no answer", o)
			continue
		}
		encoded := &apierror.Error{Status: e.Status, Code: e.Code, Message: e.Message, Authenticate: e.Authenticate}
		got, want := written(e), written(encoded)
		if got.Code != want.Code || got.Body.String() != want.Body.String() || !cmp.Equal(got.Header(), want.Header()) {
			t.Errorf("%s: %d %v %s, want %d %v %s", o, got.Code, got.Header(), got.Body, want.Code, want.Header(), want.Body)
		}
	}
}

func TestWhatIsToldOfOneRequestIsNotToldToTheNext(t *testing.T) {
	before := written(apierror.Of(apikey.RateLimited))
	detailed := apierror.Of(apikey.RateLimited).With(map[string]any{"limit": 60}).Later(1500 * time.Millisecond)
	w := written(detailed)
	const body = `{"error":{"code":"RATE_LIMIT_EXCEEDED","message":"This API key has sent too many requests. Try again after the time in Retry-After.",` +
		`"status":429,"details":{"limit":60},"request_id":"req_0123456789"}}` + "\n"
	if w.Body.String() != body || w.Header().Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q, body %s", w.Header().Get("Retry-After"), w.Body)
	}
	_ = apierror.InsufficientScope(apikey.AllScopes)
	if after := written(apierror.Of(apikey.RateLimited)); !cmp.Equal(before.Header(), after.Header()) || before.Body.String() != after.Body.String() {
		t.Errorf("then %v %s", after.Header(), after.Body)
	}
}

// TestTextsAreWrittenAsTheyAre: who reads an answer in a terminal is not to decode it. No browser takes it for a page.
func TestTextsAreWrittenAsTheyAre(t *testing.T) {
	for _, e := range []*apierror.Error{
		apierror.New(http.StatusBadRequest, "INVALID_REQUEST", "There is no field <a> & b."),
		apierror.New(http.StatusBadRequest, "INVALID_REQUEST", "There is no field.").With(map[string]any{"field": "<a> & b"}),
	} {
		w := written(e)
		if !strings.Contains(w.Body.String(), "<a> & b") || w.Header().Get("Content-Type") != "application/json" ||
			w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%v %s", w.Header(), w.Body)
		}
	}
}

func TestAChallengeNamesTheScopeThatIsNeeded(t *testing.T) {
	scope, err := apikey.ParseScope("memories:read")
	if err != nil {
		t.Fatal(err)
	}
	w := written(apierror.InsufficientScope(scope))
	if got := w.Header().Get("WWW-Authenticate"); got != `Bearer realm="rekall", error="insufficient_scope", scope="memories:read"` {
		t.Error(got)
	}
	if got := written(apierror.Of(apikey.Insufficient)).Header().Get("WWW-Authenticate"); got != `Bearer realm="rekall", error="insufficient_scope"` {
		t.Error("then", got)
	}
}

// TestWhoCannotBeAnsweredYetIsToldToComeAgain: "cannot tell" is no refusal.
func TestWhoCannotBeAnsweredYetIsToldToComeAgain(t *testing.T) {
	if w := written(apierror.Of(apikey.Unavailable)); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") != "1" {
		t.Errorf("%d with Retry-After %q", w.Code, w.Header().Get("Retry-After"))
	}
	if w := written(apierror.Of(apikey.Revoked)); w.Header().Get("Retry-After") != "" {
		t.Errorf("Retry-After %q to a revoked key", w.Header().Get("Retry-After"))
	}
}

func TestAllowIsThatOfThePathWhereItIsKnown(t *testing.T) {
	w := httptest.NewRecorder()
	w.Header()["Allow"] = []string{"GET"}
	apierror.Of(apikey.MethodInvalid).Write(w, "")
	if got := w.Header().Get("Allow"); got != "GET" {
		t.Error(got)
	}
	if got := written(apierror.Of(apikey.MethodInvalid)).Header().Get("Allow"); got != "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS" {
		t.Error(got)
	}
}
