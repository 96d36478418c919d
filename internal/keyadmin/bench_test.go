package keyadmin_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const million = 1_000_000

// importFile writes a file of that many keys in CSV.
func importFile(tb testing.TB, keys int) string {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "keys.csv")
	file, err := os.Create(name)
	if err != nil {
		tb.Fatal(err)
	}
	w := bufio.NewWriter(file)
	fmt.Fprintln(w, "hash,account,name,environment,scopes,created_at,expires_at")
	for i := range keys {
		hash := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
		fmt.Fprintf(w, "%x,account-%d,Backend %d,production,memories:read memories:write entities:read,2024-01-01T00:00:00Z,\n", hash, i%10_000, i)
	}
	if err := w.Flush(); err != nil {
		tb.Fatal(err)
	}
	if err := file.Close(); err != nil {
		tb.Fatal(err)
	}
	return name
}

func importFrom(tb testing.TB, admin *keyadmin.Admin, name string) keyadmin.Imported {
	tb.Helper()
	file, err := os.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	done, err := admin.Import(tb.Context(), operator, file, keyadmin.ImportOptions{Format: "csv"})
	if err != nil {
		tb.Fatal(err)
	}
	return done
}

// BenchmarkImportMillion imports a million keys into an empty database, and BenchmarkImportMillionAgain finds them there:
//
//	go test -run '^$' -bench Million -benchtime 1x ./internal/keyadmin
func BenchmarkImportMillion(b *testing.B) {
	name := importFile(b, million)
	for range b.N {
		b.StopTimer()
		admin, _, _ := newAdmin(b)
		b.StartTimer()
		if done := importFrom(b, admin, name); done.Imported != million {
			b.Fatalf("imported %+v", done)
		}
	}
}

func BenchmarkImportMillionAgain(b *testing.B) {
	name := importFile(b, million)
	admin, _, _ := newAdmin(b)
	importFrom(b, admin, name)
	for b.Loop() {
		if done := importFrom(b, admin, name); done.AlreadyThere != million {
			b.Fatalf("imported %+v", done)
		}
	}
}

// BenchmarkRevokeMillion revokes a million keys in one transaction, with a line in the audit for each.
func BenchmarkRevokeMillion(b *testing.B) {
	name := importFile(b, million)
	for range b.N {
		b.StopTimer()
		admin, _, _ := newAdmin(b)
		importFrom(b, admin, name)
		b.StartTimer()
		revocation, err := admin.RevokeMany(b.Context(), operator, keyadmin.Selection{CreatedBy: operator.String()}, false)
		if err != nil || revocation.Count != million {
			b.Fatalf("revoked %+v, %v", revocation, err)
		}
	}
}
