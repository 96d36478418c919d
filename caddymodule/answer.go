package caddymodule

import (
	"math/rand/v2"
	"net/http"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
)

// refuse answers a request on whose key nothing was decided.
func refuse(w http.ResponseWriter, r *http.Request, e *apierror.Error) {
	requestID := newRequestID()
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

// newRequestID returns "req_" and 20 characters, some 119 random bits. It identifies and does not authorise, so the runtime's
// generator is enough, and so are characters of which two are likelier than others.
func newRequestID() string {
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + "01" // for six bits
	id := [24]byte{'r', 'e', 'q', '_'}
	for half := range 2 {
		random := rand.Uint64()
		for i := range 10 {
			id[4+10*half+i] = alphabet[random%64]
			random /= 64
		}
	}
	return string(id[:])
}
