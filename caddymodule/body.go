package caddymodule

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync/atomic"

	"go.uber.org/zap"
)

// clientBody is the body of a forwarded request. The proxy takes an error of it for the backend's failure: with passive
// health checks one client that sends a malformed chunk would take the backend away from all others. So the error looks
// like a request that was cancelled, which is nobody's failure, and the exchange answers it.
type clientBody struct {
	io.ReadCloser
	failed atomic.Pointer[bodyError]
}

func (b *clientBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	failed := &bodyError{err}
	b.failed.Store(failed)
	return n, failed
}

// bodyError says that the client's body could not be read to its end.
type bodyError struct{ err error }

func (e *bodyError) Error() string        { return "read the request's body: " + e.err.Error() }
func (e *bodyError) Unwrap() error        { return e.err }
func (e *bodyError) Is(target error) bool { return target == context.Canceled }

var (
	bodyInvalid  = newAnswer(http.StatusBadRequest, "BODY_INVALID", "The request body could not be read to its end.", "")
	bodyTooLarge = newAnswer(http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE", "The request body is larger than this address takes.", "")
)

// refuseBody answers a request whose body could not be read.
func (x *exchange) refuseBody(unread *bodyError) {
	x.wroteHeader = true
	x.gateway.logger.Debug("request not passed on whole", zap.String("request_id", x.requestID), zap.Error(unread))
	a := bodyInvalid
	var limit *http.MaxBytesError // set by Caddy's request_body, before the gateway
	if errors.As(unread, &limit) {
		a = bodyTooLarge
	}
	x.answer(x.ResponseWriter, a, nil)
}
