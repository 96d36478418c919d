package keyadmin

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
)

// Member is one of a JSON object's.
type Member struct {
	Name  string
	Value json.RawMessage
}

var errNoObject = errors.New("not one JSON object, with nothing after it")

// Members returns the members of a JSON object in their order, duplicates too: a decoder would match names in any case and take the
// last of two values, and who checked the text before may have believed the first.
func Members(object []byte) ([]Member, error) {
	decoder := json.NewDecoder(bytes.NewReader(object))
	if t, err := decoder.Token(); err != nil || t != json.Delim('{') {
		return nil, errNoObject
	}
	var members []Member
	for decoder.More() {
		t, err := decoder.Token()
		name, ok := t.(string)
		var value json.RawMessage
		if err != nil || !ok || decoder.Decode(&value) != nil {
			return nil, errNoObject
		}
		members = append(members, Member{name, value})
	}
	if _, err := decoder.Token(); err != nil {
		return nil, errNoObject
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errNoObject
	}
	return members, nil
}
