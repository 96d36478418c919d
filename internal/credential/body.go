package credential

import (
	"errors"
	"io"
	"net/http"
	"net/textproto"
)

// errTrailer replaces errors that quote a malformed trailer.
var errTrailer = errors.New("malformed trailer")

// body is a request's body whose errors quote nothing of the request. A trailer is read with the last of the body: whoever
// logs why it could not be read would log the trailer, and what a client took for a place of its key.
type body struct{ io.ReadCloser }

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if _, quotes := errors.AsType[textproto.ProtocolError](err); quotes {
		err = errTrailer
	}
	return n, err
}

// guardBody returns r, or a copy if it has a body. The server must find the body it made in the request it made: whether it was
// read to its end decides whether what follows on the connection is a request. But Caddy wraps the body of the request it is given.
func guardBody(r *http.Request) *http.Request {
	if r.ContentLength == 0 { // it is -1 if it is not known
		return r
	}
	guarded := *r
	if len(r.TransferEncoding) > 0 { // only then it can have trailers
		guarded.Body = body{r.Body}
	}
	return &guarded
}
