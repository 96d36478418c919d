package test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// limits runs the binary's "limits" command.
func (k *keysCLI) limits(args ...string) (output string, ok bool) {
	k.t.Helper()
	cmd := exec.Command(program, append([]string{"limits"}, args...)...)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+k.database)
	out, err := cmd.CombinedOutput()
	if apikey.ContainsKey(string(out)) {
		k.t.Errorf("limits %s shows a key", args[0])
	}
	return string(out), err == nil
}

func TestLimitsAreSetAndShownByCommand(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("n", "--account", "acme")
	sandbox := k.create("n", "--account", "acme", "--environment", "sandbox") // which an account's limits are not for
	for _, tc := range []struct {
		args string
		want string
	}{
		{"show", "pro         1000                 1500          25\n"},
		{"account acme --tier enterprise", "Production keys of account acme, tier enterprise: unlimited requests per minute, unlimited in 15 seconds, unlimited at a time.\n"},
		{"account acme --requests-per-minute 2000", "Production keys of account acme, tier enterprise: 2000 requests per minute, 3000 in 15 seconds, unlimited at a time.\n"},
		{"show --account acme", "Production keys of account acme, tier enterprise: 2000 requests per minute, 3000 in 15 seconds, unlimited at a time.\n"},
		{"key " + key.ID + " --concurrent-requests 3", "Key " + key.ID + " of acme (production), tier enterprise: 2000 requests per minute, 3000 in 15 seconds, 3 at a time.\n"},
		{"show --key-id " + key.ID, "2000 requests per minute, 3000 in 15 seconds, 3 at a time.\n"},
		{"show --key " + sandbox.ID, "Key " + sandbox.ID + " of acme (sandbox), tier sandbox: "},
		{"show --help", "--key-id string"},
		{"account --help", "Sets the tier and the limits of an account's production keys"},
		{"key --help", "0: as keys without limits of their own"},
		{"tier free --burst 175", "Tier free: 100 requests per minute, 175 in 15 seconds, 5 at a time.\n"},
		{"show --key " + key.ID + " --json", `"tier": "enterprise"`},
	} {
		if out, ok := k.limits(strings.Fields(tc.args)...); !ok || !strings.Contains(out, tc.want) {
			t.Errorf("limits %s:\n%s", tc.args, out)
		}
	}
	for args, want := range map[string]string{
		"":                                    "Error: say what to do with limits: show, tier, account or key (see --help)\n",
		"tier free":                           "Error: say what to change: --requests-per-minute, --burst, --concurrent-requests, or --tier of an account (\"rekall-gateway limits show\" tells what they are)\n",
		"tier gold --burst 5":                 "Error: tier must be free, pro, team, enterprise or sandbox\n",
		"account acme --tier sandbox":         "Error: --tier must be free, pro, team or enterprise: sandbox is that of sandbox keys, whatever their account's\n",
		"account acme --tier=":                "Error: --tier must not be empty\n",
		"tier free --burst 5":                 "Error: --burst must be at least a quarter of the requests per minute, and at most 10000000\n",
		"show --key-id " + key.Key.Reveal():   "an argument is a key itself",
		"show --key " + key.Key.Reveal():      "an argument is a key itself",
		"key " + key.Key.Reveal():             "an argument is a key itself",
		"show --account a --key-id " + key.ID: "--account and --key-id exclude each other",
		"account initech --burst 100":         "--burst needs --requests-per-minute beside it",
	} {
		if out, ok := k.limits(strings.Fields(args)...); ok || !strings.Contains(out, want) {
			t.Errorf("limits %s:\n%s", args, out)
		}
	}
}
