// Package apierror is how Rekall's API says an error: in one envelope (REKALL.md, "Answers") with the same headers, and of an API
// key in the same words, whether the gateway refuses a request or the API that manages keys does.
package apierror

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

// Error is what a client is told that does not get what it asked for.
type Error struct {
	Status       int
	Code         string         // in upper snake case
	Message      string         // a sentence for people; nothing of the request but names of fields
	Details      map[string]any // texts, numbers and truths; may be nil
	Authenticate string         // WWW-Authenticate challenge (RFC 6750, section 3); empty: none
	RetryAfter   time.Duration  // rounded up to seconds: who obeys it is not refused again; 0: a second with a 503, otherwise none

	body []byte // without details, up to where the request id goes: a flood of refusals is not encoded one by one
}

// New returns an error, which must not be changed: its body is encoded here, once.
func New(status int, code, message string) *Error {
	return prepared(Error{Status: status, Code: code, Message: message})
}

func challenge(status int, code, message, authenticate string) *Error {
	return prepared(Error{Status: status, Code: code, Message: message, Authenticate: authenticate})
}

func prepared(e Error) *Error {
	e.body = bytes.TrimSuffix(e.encode(""), []byte(afterRequestID))
	return &e
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// With returns a copy, which may be changed, with the details of one request.
func (e *Error) With(details map[string]any) *Error {
	detailed := *e
	detailed.Details, detailed.body = details, nil
	return &detailed
}

// Later returns the error for a client that may come again after a time.
func (e *Error) Later(retryAfter time.Duration) *Error {
	later := *e
	later.RetryAfter = retryAfter
	return &later
}

// SetRetryAfter sets the header of that name as Write does, for answers with a body of their own.
func (e *Error) SetRetryAfter(h http.Header) {
	if seconds := e.retryAfter(); seconds != "" {
		h.Set("Retry-After", seconds)
	}
}

// envelope is the body of every error.
type envelope struct {
	Error body `json:"error"`
}

type body struct {
	Code      string         `json:"code"`
	Message   string         `json:"message"`
	Status    int            `json:"status"`
	Details   map[string]any `json:"details"`
	RequestID string         `json:"request_id"`
}

// afterRequestID ends every body: the request id is the last field of both objects.
const afterRequestID = `"}}` + "\n"

func (e *Error) encode(requestID string) []byte {
	details := e.Details
	if details == nil {
		details = map[string]any{}
	}
	return Encode(envelope{body{e.Code, e.Message, e.Status, details, requestID}})
}

// Encode returns an answer's body, of what always encodes. Texts stand in it as they are, "<" too: as application/json with nosniff, no
// browser takes it for a page.
func Encode(answer any) []byte {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answer); err != nil {
		panic(err)
	}
	return text.Bytes()
}

// Write sends the error. Nothing of the request is repeated in it but the request id.
func (e *Error) Write(w http.ResponseWriter, requestID string) {
	var body []byte
	if e.body != nil {
		body = append(make([]byte, 0, len(e.body)+len(requestID)+len(afterRequestID)), e.body...)
		body = append(append(body, requestID...), afterRequestID...)
	} else {
		body = e.encode(requestID)
	}
	h := w.Header()
	values := []string{"application/json", strconv.Itoa(len(body)), "no-store", "nosniff", requestID, e.Authenticate, e.retryAfter()}
	h["Content-Type"] = values[0:1:1]
	h["Content-Length"] = values[1:2:2]
	h["Cache-Control"] = values[2:3:3]
	h["X-Content-Type-Options"] = values[3:4:4]
	h["X-Request-Id"] = values[4:5:5]
	if e.Authenticate != "" {
		h["Www-Authenticate"] = values[5:6:6]
	}
	if values[6] != "" {
		h["Retry-After"] = values[6:7:7]
	}
	if e.Status == http.StatusMethodNotAllowed && h["Allow"] == nil {
		h["Allow"] = []string{"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
	}
	w.WriteHeader(e.Status)
	_, _ = w.Write(body) // the client may be gone
}

// NewRequestID returns "req_" and 20 characters, some 119 random bits. It identifies and does not authorise, so the runtime's
// generator is enough, and so are characters of which two are likelier than others.
func NewRequestID() string {
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

func (e *Error) retryAfter() string {
	switch {
	case e.RetryAfter > 0:
		return strconv.FormatInt(int64((e.RetryAfter+time.Second-1)/time.Second), 10)
	case e.Status == http.StatusServiceUnavailable:
		return "1"
	}
	return ""
}
