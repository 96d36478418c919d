package caddymodule

import (
	"net/http"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
)

// refuse answers a request on whose key nothing was decided.
func refuse(w http.ResponseWriter, r *http.Request, e *apierror.Error) {
	requestID := apierror.NewRequestID()
	logLater(r.Context(), refused{requestID, e.Code})
	e.Write(w, requestID)
}

// onlyReads refuses a request that does not read, and reports whether it was one that does.
func onlyReads(w http.ResponseWriter, r *http.Request) bool {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return true
	}
	w.Header()["Allow"] = []string{"GET, HEAD"}
	refuse(w, r, apierror.Of(apikey.MethodInvalid))
	return false
}
