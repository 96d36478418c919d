package keyadmin

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// importLine is a line of a file as it was written.
type importLine struct {
	number int64

	Hash        string       `json:"hash"`
	Key         string       `json:"key"`
	Account     string       `json:"account"`
	Name        string       `json:"name"`
	Environment string       `json:"environment"`
	Scopes      importScopes `json:"scopes"`
	ManageKeys  bool         `json:"manage_keys"`
	CreatedAt   string       `json:"created_at"`
	ExpiresAt   string       `json:"expires_at"`
	Hint        string       `json:"hint"`
}

var importFields = []string{"hash", "key", "account", "name", "environment", "scopes", "manage_keys", "created_at", "expires_at", "hint"}

// importScopes are a list, or a text with spaces or commas in between.
type importScopes []string

// UnmarshalJSON reads both.
func (s *importScopes) UnmarshalJSON(text []byte) error {
	if bytes.HasPrefix(text, []byte(`"`)) {
		var joined string
		if err := json.Unmarshal(text, &joined); err != nil {
			return err
		}
		*s = splitScopes(joined)
		return nil
	}
	var list []string
	err := json.Unmarshal(text, &list)
	*s = list
	return err
}

func splitScopes(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == ',' })
}

// importReader reads a file line by line. next returns io.EOF at the end, and a *BadLine, which is an error here, for one that
// cannot be read: the lines after it can.
type importReader interface {
	next() (importLine, error)
}

// Error makes a BadLine an error within this package.
func (l *BadLine) Error() string { return l.String() }

func newImportReader(file io.Reader, options ImportOptions) (importReader, error) {
	buffered := bufio.NewReaderSize(file, maxLine)
	if start, _ := buffered.Peek(len(byteOrderMark)); string(start) == byteOrderMark {
		_, _ = buffered.Discard(len(byteOrderMark))
	}
	switch options.Format {
	case "csv":
		return newCSVReader(buffered, options.PlainKeys)
	case "jsonl":
		return &jsonReader{lines: buffered, plainKeys: options.PlainKeys}, nil
	}
	return nil, &InvalidError{"format", "must be csv or jsonl"}
}

const (
	byteOrderMark = "\ufeff" // with which spreadsheets begin a file

	maxLine = 64 << 10 // bytes of a JSON line: 14 scopes and two names of 200 characters take a few thousand
)

const plainKeysRefused = "must not be there: give hash, or allow plain keys with --plain-keys"

type csvReader struct {
	csv     *csv.Reader
	columns []string
}

func newCSVReader(file io.Reader, plainKeys bool) (*csvReader, error) {
	r := csv.NewReader(file)
	header, err := r.Read()
	if _, malformed := errors.AsType[*csv.ParseError](err); err != nil && !malformed && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the file: %w", err)
	}
	if err != nil {
		return nil, &ImportError{[]BadLine{{1, "", "must name the columns, with commas in between"}}, 1}
	}
	for i, column := range header {
		switch {
		case !slices.Contains(importFields, column):
			return nil, &ImportError{[]BadLine{{1, "", fmt.Sprintf("has an unknown column, number %d: use %s", i+1, strings.Join(importFields, ", "))}}, 1}
		case slices.Contains(header[:i], column):
			return nil, &ImportError{[]BadLine{{1, column, "is there twice"}}, 1}
		case column == "key" && !plainKeys:
			return nil, &ImportError{[]BadLine{{1, column, plainKeysRefused}}, 1}
		}
	}
	r.ReuseRecord = true
	return &csvReader{r, slices.Clone(header)}, nil
}

func (r *csvReader) next() (importLine, error) {
	record, err := r.csv.Read()
	var syntax *csv.ParseError
	switch {
	case errors.As(err, &syntax) && errors.Is(err, csv.ErrFieldCount):
		return importLine{}, &BadLine{int64(syntax.Line), "", fmt.Sprintf("must have %d fields, as the first line", len(r.columns))}
	case errors.As(err, &syntax):
		return importLine{}, &BadLine{int64(syntax.Line), "", "is not CSV: check its quotes"}
	case err != nil:
		return importLine{}, err
	}
	number, _ := r.csv.FieldPos(0)
	line := importLine{number: int64(number)}
	for i, column := range r.columns {
		if !line.set(column, record[i]) {
			return line, &BadLine{line.number, "manage_keys", "must be true or false"}
		}
	}
	return line, nil
}

// set sets a field from text, and returns false if that cannot be its value.
func (l *importLine) set(field, text string) bool {
	switch field {
	case "hash":
		l.Hash = text
	case "key":
		l.Key = text
	case "account":
		l.Account = text
	case "name":
		l.Name = text
	case "environment":
		l.Environment = text
	case "scopes":
		l.Scopes = splitScopes(text)
	case "manage_keys":
		var err error
		l.ManageKeys, err = strconv.ParseBool(text)
		return err == nil || text == ""
	case "created_at":
		l.CreatedAt = text
	case "expires_at":
		l.ExpiresAt = text
	case "hint":
		l.Hint = text
	}
	return true
}

type jsonReader struct {
	lines     *bufio.Reader
	plainKeys bool
	number    int64
	found     bool // a line
}

func (r *jsonReader) next() (importLine, error) {
	for {
		text, err := r.lines.ReadSlice('\n')
		r.number++
		if errors.Is(err, bufio.ErrBufferFull) {
			r.found = true
			return importLine{}, r.skip()
		}
		if errors.Is(err, io.EOF) && len(text) == 0 && !r.found { // what should have written the keys has most likely failed
			r.found = true
			return importLine{}, &BadLine{r.number, "", "is the end: there is no key"}
		}
		if err != nil && (!errors.Is(err, io.EOF) || len(text) == 0) {
			return importLine{}, err
		}
		if text = bytes.TrimSpace(text); len(text) == 0 {
			continue
		}
		r.found = true
		return r.parse(text)
	}
}

// skip passes over a line that is too long.
func (r *jsonReader) skip() error {
	for {
		_, err := r.lines.ReadSlice('\n')
		if err == nil || errors.Is(err, io.EOF) {
			return &BadLine{r.number, "", "is longer than 64 KiB"}
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

func (r *jsonReader) parse(text []byte) (importLine, error) {
	line := importLine{number: r.number}
	// The decoder's own words may quote the line, and a key in it.
	if !fieldsOnce(text) || json.Unmarshal(text, &line) != nil {
		return line, &BadLine{r.number, "", "must be one JSON object, with nothing after it, with the fields " +
			strings.Join(importFields, ", ") + ", each once at most"}
	}
	if line.Key != "" && !r.plainKeys {
		return line, &BadLine{r.number, "key", plainKeysRefused}
	}
	// JSON has a character for what is not text: two accounts could become one.
	const notText = "must be a text of valid Unicode characters"
	if strings.ContainsRune(line.Account, utf8.RuneError) {
		return line, &BadLine{r.number, "account", notText}
	}
	if strings.ContainsRune(line.Name, utf8.RuneError) {
		return line, &BadLine{r.number, "name", notText}
	}
	return line, nil
}

// fieldsOnce reports whether text is an object that has fields of an import only, none of them twice.
func fieldsOnce(text []byte) bool {
	members, err := Members(text)
	for i, m := range members {
		if !slices.Contains(importFields, m.Name) || slices.ContainsFunc(members[:i], func(before Member) bool { return before.Name == m.Name }) {
			return false
		}
	}
	return err == nil
}

var hintPattern = regexp.MustCompile(`^[0-9A-Za-z]{4}$`)

func parseHash(s string) (apikey.Digest, error) {
	var digest apikey.Digest
	if len(s) != hex.EncodedLen(len(digest)) {
		return digest, errHash
	}
	if _, err := hex.Decode(digest[:], []byte(s)); err != nil {
		return digest, errHash
	}
	return digest, nil
}

var errHash = &InvalidError{"hash", "must be 64 hexadecimal digits: the SHA-256 of the whole key"}

// WithoutByteOrderMark leaves out what some editors and shells begin a file with.
func WithoutByteOrderMark(text string) string { return strings.TrimPrefix(text, byteOrderMark) }

// ParseHashes reads SHA-256 hashes of keys, one a line, in hexadecimal. What is none is an *InvalidError.
func ParseHashes(file io.Reader) ([]apikey.Digest, error) {
	hashes := []apikey.Digest{}
	scanner := bufio.NewScanner(file)
	for number := int64(1); scanner.Scan(); number++ {
		text := strings.TrimSpace(WithoutByteOrderMark(scanner.Text()))
		if text == "" {
			continue
		}
		digest, err := parseHash(text)
		if err != nil {
			return nil, &InvalidError{"hashes", fmt.Sprintf("line %d must be 64 hexadecimal digits: the SHA-256 of a whole key", number)}
		}
		hashes = append(hashes, digest)
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("read hashes: %w", err)
	}
	return hashes, nil
}
