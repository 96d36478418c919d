package keyadmin_test

import (
	"context"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestAdminRoleSufficesForTheWholeLifeOfAKey(t *testing.T) {
	databaseURL := pgtest.URL(t)
	role := pgtest.Role(t, databaseURL)
	if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Admin: role}); err != nil {
		t.Fatal(err)
	}
	store := pgtest.Store(t, pgtest.Login(t, databaseURL, role))
	admin, ctx := keyadmin.New(store), t.Context()
	r := request()
	r.IdempotencyKey = "once"
	key := create(t, admin, r)
	hash := strings.Repeat("ab", 32)
	for what, do := range map[string]func(context.Context) error{
		"replay": func(ctx context.Context) error { _, _, err := admin.Create(ctx, operator, r); return err },
		"get":    func(ctx context.Context) error { _, err := admin.Get(ctx, operator, key.ID); return err },
		"list": func(ctx context.Context) error {
			_, err := admin.List(ctx, operator, keyadmin.ListRequest{})
			return err
		},
		"rename": func(ctx context.Context) error { _, err := admin.Rename(ctx, operator, key.ID, "new"); return err },
		"check":  func(ctx context.Context) error { _, err := admin.Check(ctx, operator, key.Key.Reveal()); return err },
		"edges":  func(ctx context.Context) error { _, err := admin.Edges(ctx); return err },
		"audit": func(ctx context.Context) error {
			_, err := admin.Audit(ctx, operator, keyadmin.AuditRequest{})
			return err
		},
		"rotation": func(ctx context.Context) error { return rotateAndUndo(ctx, admin) },
		"rotation of all": func(ctx context.Context) error {
			_, err := admin.RotateDue(ctx, operator, keyadmin.RotateDueRequest{OlderThan: "1d"}, false, func(keyadmin.Key) error { return nil })
			return err
		},
		"import": func(ctx context.Context) error {
			file := strings.NewReader("hash,name,account,environment,scopes\n" + hash + ",n,other,production,memories:read\n")
			_, err := admin.Import(ctx, operator, file, keyadmin.ImportOptions{Format: "csv"})
			return err
		},
		"incident": func(ctx context.Context) error {
			_, err := admin.RevokeMany(ctx, operator, keyadmin.Selection{Account: "nobody"}, false)
			return err
		},
		"leak": func(ctx context.Context) error {
			_, err := admin.Leaked(ctx, "test", []string{apikey.Generate(apikey.Production)})
			return err
		},
	} {
		if err := do(ctx); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	revoked, err := admin.Revoke(ctx, operator, key.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.WaitRevoked(ctx, revoked.ID, func(keyadmin.Confirmation) {}); err != nil {
		t.Error(err)
	}
	if err := pgtest.TryExec(databaseURL, `update rekall.api_keys set revoked_at = null`); err == nil {
		t.Error("a revocation was undone")
	}
}

func rotateAndUndo(ctx context.Context, admin *keyadmin.Admin) error {
	key, _, err := admin.Create(ctx, operator, request())
	if err != nil {
		return err
	}
	rotation := keyadmin.RotateRequest{Overlap: keyadmin.Overlap{OnFirstUse: true}}
	if _, _, err := admin.Rotate(ctx, operator, key.ID, rotation); err != nil {
		return err
	}
	_, _, err = admin.UndoRotation(ctx, operator, key.ID)
	return err
}
