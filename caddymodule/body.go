package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
)

// Read reads the body of the client's request.
func (p *pass) Read(b []byte) (int, error) {
	p.begun.Store(true)
	n, err := p.body.Read(b)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	failed := &clientError{bodyInvalid, fmt.Errorf("read the request's body: %w", err)}
	if tooLarge(err) { // a limit before the gateway
		failed.answer = bodyTooLarge
	}
	return n, p.fail(failed)
}

// Close closes it.
func (p *pass) Close() error { return p.body.Close() }

// tooLarge reports whether a body was beyond the limit of Caddy's request_body.
func tooLarge(err error) bool {
	_, ok := errors.AsType[*http.MaxBytesError](err)
	return ok
}

// clientError is an error that a client's request made. The proxy would take it for the backend's failure: with passive health
// checks one client that sends a malformed chunk would take the backend away from all others. So it looks like a request that
// was cancelled, which is nobody's failure and is not tried again, and the exchange answers it.
type clientError struct {
	answer *apierror.Error
	error
}

func (e *clientError) Unwrap() error        { return e.error }
func (e *clientError) Is(target error) bool { return target == context.Canceled }

var (
	bodyInvalid  = apierror.New(http.StatusBadRequest, "BODY_INVALID", "The request body could not be read to its end.")
	bodyTooLarge = apierror.New(http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE", "The request body is larger than this address takes.")

	headersInvalid = apierror.New(http.StatusBadRequest, "HEADERS_INVALID",
		"Something in the request cannot be passed on in a header. Send it without line breaks and other control characters.")
	headersTooLarge = apierror.New(http.StatusRequestHeaderFieldsTooLarge, "HEADERS_TOO_LARGE",
		"The request's headers are larger than this address takes.")
)

// refuseFailed answers a request that failed by its client's doing.
func (x *exchange) refuseFailed(failed *clientError) {
	x.wroteHeader = true
	if failed.answer.Status >= http.StatusInternalServerError {
		x.refuseUpstream(failed.answer, failed.error, x.chosen())
		return
	}
	x.gateway.logger.Debug("request not passed on whole", zap.String("request_id", x.requestID), zap.Error(failed))
	x.answer(failed.answer)
}
