package keysapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// maxBody is the size in bytes of a request that manages one key: ten times the longest sensible one.
const maxBody = 64 << 10

var (
	errMediaType = apierror.New(http.StatusUnsupportedMediaType, "UNSUPPORTED_MEDIA_TYPE",
		"The body must be JSON in UTF-8 and not compressed: send it with 'Content-Type: application/json'.")
	errTooLarge = apierror.New(http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE",
		"The body is too large.")
	errIncomplete = apierror.New(http.StatusBadRequest, "BODY_INVALID",
		"The body could not be read to its end.")
	errNotUTF8 = invalid("", "The body is not UTF-8.")
	errSyntax  = invalid("", "The body must be one JSON object, and nothing after it.")
	errQuery   = invalid("", "The query could not be read: percent-encode special characters.")
)

// readBody reads a JSON body of at most limit bytes. No body at all is as good as an empty one.
func readBody(r *http.Request, limit int64) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	var limited *http.MaxBytesError // set by Caddy's request_body, before the API
	switch {
	case int64(len(body)) > limit || errors.As(err, &limited):
		return nil, errTooLarge
	case err != nil:
		return nil, errIncomplete
	case len(body) == 0:
		return nil, nil
	}
	if !isJSON(r.Header) {
		return nil, errMediaType
	}
	if !utf8.Valid(body) {
		return nil, errNotUTF8
	}
	return body, nil
}

// isJSON looks at what the sender says. Insisting on it keeps out forms, which a browser sends from any site.
func isJSON(h http.Header) bool {
	media, parameters, err := mime.ParseMediaType(h.Get("Content-Type"))
	charset := strings.ToLower(parameters["charset"])
	return err == nil && media == "application/json" && (charset == "" || charset == "utf-8") &&
		len(h["Content-Type"]) == 1 && h.Get("Content-Encoding") == ""
}

// fields are the members of a JSON object, by the names that the API gives them.
type fields map[string]json.RawMessage

// spellings are other names of fields: those of the JavaScript SDK.
var spellings = map[string]string{"expiresIn": "expires_in", "expiresAt": "expires_at", "manageKeys": "manage_keys"}

// readFields reads a body that is an object with no other fields than the known ones. A name that stands twice is refused:
// two readers may each believe another of the values.
func readFields(r *http.Request, limit int64, known ...string) (fields, error) {
	if _, err := readQuery(r); err != nil { // what changes something takes no parameters: it would do so in spite of a ?dry_run=true
		return nil, err
	}
	body, err := readBody(r, limit)
	if err != nil || body == nil {
		return nil, err
	}
	members, err := keyadmin.Members(body)
	if err != nil {
		return nil, errSyntax
	}
	found, written := fields{}, map[string]bool{}
	for _, m := range members {
		spelling, value := m.Name, m.Value
		name := spelling
		if s, ok := spellings[spelling]; ok {
			name = s
		}
		if !slices.Contains(known, name) {
			return nil, invalid(keyadmin.Shown(spelling), "There is no field "+keyadmin.Shown(spelling)+".")
		}
		before, twice := found[name]
		switch {
		case written[spelling]:
			return nil, invalid(name, keyadmin.Shown(spelling)+" is given twice.")
		case twice && !bytes.Equal(before, value):
			return nil, invalid(name, name+" is given in two spellings with different values.")
		}
		found[name], written[spelling] = value, true
	}
	return found, nil
}

// text reads a field that is a text. Like the next three, it leaves what is not given, or null, as it was.
func (f fields) text(name string, to *string) error {
	if !f.read(name, to) || !whole(*to) {
		return invalid(name, name+" must be a text of valid Unicode characters.")
	}
	return nil
}

// option is text for a field that has a default. An empty text, most likely a variable that nobody set, does not mean it: a
// key without an expiry would never end.
func (f fields) option(name string, to *string) error {
	if err := f.text(name, to); err != nil {
		return err
	}
	if value, given := f[name]; given && *to == "" && string(value) != "null" {
		return &keyadmin.InvalidError{Field: name, Reason: "must not be empty: leave it out for its default"}
	}
	return nil
}

func (f fields) texts(name string, to *[]string) error {
	var list []*string // a null among them is not an empty text
	if !f.read(name, &list) || slices.ContainsFunc(list, func(s *string) bool { return s == nil || !whole(*s) }) {
		return invalid(name, name+" must be a list of texts.")
	}
	for _, s := range list {
		*to = append(*to, *s)
	}
	return nil
}

func (f fields) flag(name string, to *bool) error {
	if !f.read(name, to) {
		return invalid(name, name+" must be true or false.")
	}
	return nil
}

func (f fields) read(name string, to any) bool {
	value, given := f[name]
	return !given || json.Unmarshal(value, to) == nil
}

// whole reports whether a text came through as it was sent: half a surrogate pair becomes a replacement character.
func whole(s string) bool { return !strings.ContainsRune(s, utf8.RuneError) }

// readQuery reads the query parameters, of which there may be no others than the known ones, and none that is empty.
func readQuery(r *http.Request, known ...string) (url.Values, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, errQuery
	}
	for name, values := range query {
		if !slices.Contains(known, name) {
			return nil, invalid(keyadmin.Shown(name), "There is no query parameter "+keyadmin.Shown(name)+".")
		}
		if len(values) > 1 {
			return nil, invalid(name, name+" is given twice.")
		}
		if values[0] == "" { // most likely a variable that nobody set: a filter would become all keys
			return nil, &keyadmin.InvalidError{Field: name, Reason: "must not be empty: leave it out for its default"}
		}
	}
	return query, nil
}
