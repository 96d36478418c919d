package apikey_test

import (
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
)

const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

var environments = []apikey.Environment{apikey.Production, apikey.Sandbox}

func prefixOf(env apikey.Environment) string {
	if env == apikey.Sandbox {
		return apikey.SandboxPrefix
	}
	return apikey.ProductionPrefix
}

func TestParseAcceptsExactlyTheDocumentedFormat(t *testing.T) {
	const none = apikey.Environment(0)
	text := func(n int) string { return apikey.RandomText(n) }
	for _, tt := range []struct {
		name, key string
		want      apikey.Environment
	}{
		{"production", "rk_" + text(45), apikey.Production},
		{"sandbox", "rk_test_" + text(40), apikey.Sandbox},
		{"production, digits only", "rk_" + strings.Repeat("0", 45), apikey.Production},
		{"production, first and last letters", "rk_" + strings.Repeat("AZaz9", 9), apikey.Production},
		{"production that begins with test", "rk_test" + text(41), apikey.Production},
		{"generated for production", apikey.Generate(apikey.Production), apikey.Production},
		{"generated for the sandbox", apikey.Generate(apikey.Sandbox), apikey.Sandbox},
		{"empty", "", none},
		{"prefix only", "rk_", none},
		{"sandbox prefix only", "rk_test_", none},
		{"47 characters", "rk_" + text(44), none},
		{"49 characters", "rk_" + text(46), none},
		{"sandbox, 47 characters", "rk_test_" + text(39), none},
		{"sandbox, 49 characters", "rk_test_" + text(41), none},
		{"sandbox prefix and 45 characters", "rk_test_" + text(45), none},
		{"rk_live_ is no prefix", "rk_live_" + text(40), none},
		{"underscore in the middle", "rk_" + text(20) + "_" + text(24), none},
		{"underscore at the end", "rk_" + text(44) + "_", none},
		{"second underscore in the sandbox", "rk_test_" + text(20) + "_" + text(19), none},
		{"other prefix", "sk_" + text(45), none},
		{"no prefix", text(48), none},
		{"prefix in capitals", "RK_" + text(45), none},
		{"sandbox prefix in capitals", "rk_TEST_" + text(40), none},
		{"access token", "rat_" + text(44), none},
		{"hyphen", "rk_" + text(44) + "-", none},
		{"space before", " rk_" + text(44), none},
		{"space after", "rk_" + text(44) + " ", none},
		{"line feed after a key", "rk_" + text(45) + "\n", none},
		{"line feed inside", "rk_" + text(44) + "\n", none},
		{"NUL", "rk_" + text(20) + "\x00" + text(24), none},
		{"48 bytes, not ASCII", "rk_" + text(43) + "é", none},
		{"48 characters, not ASCII", "rk_" + text(44) + "é", none},
		{"full-width digits", "rk_" + strings.Repeat("０", 15), none},
		{"invalid UTF-8", "rk_" + text(44) + "\xff", none},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env, err := apikey.Parse(tt.key)
			if env != tt.want {
				t.Errorf("environment %v, want %v", env, tt.want)
			}
			if tt.want == none && !errors.Is(err, apikey.ErrMalformed) || tt.want != none && err != nil {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestParseRefusesEveryByteThatIsNotAlphanumericAfterThePrefix(t *testing.T) {
	for _, env := range environments {
		key := apikey.Generate(env)
		for i := len(prefixOf(env)); i < len(key); i++ {
			for b := range 256 {
				s := key[:i] + string([]byte{byte(b)}) + key[i+1:]
				_, err := apikey.Parse(s)
				if good := strings.IndexByte(alphabet, byte(b)) >= 0; good != (err == nil) {
					t.Fatalf("byte %#x at %d of a %v key: error %v", b, i, env, err)
				}
			}
		}
	}
}

func TestGenerateMakesUniqueWellFormedKeysOfItsEnvironmentWithUniformCharacters(t *testing.T) {
	const perEnvironment = 10_000
	const checksumLength = 6
	seen := make(map[string]bool, 2*perEnvironment)
	var count [256]int
	total := 0
	for _, env := range environments {
		for range perEnvironment {
			key := apikey.Generate(env)
			if len(key) != apikey.Length || !strings.HasPrefix(key, prefixOf(env)) {
				t.Fatalf("%v key has %d characters or the wrong prefix", env, len(key))
			}
			if got, err := apikey.Parse(key); got != env || err != nil {
				t.Fatalf("Parse of a %v key: %v, %v", env, got, err)
			}
			if !apikey.ChecksumValid(key) {
				t.Fatalf("a generated %v key has a wrong checksum", env)
			}
			if seen[key] {
				t.Fatalf("the same %v key twice", env)
			}
			seen[key] = true
			random := key[len(prefixOf(env)) : apikey.Length-checksumLength]
			for i := range len(random) {
				count[random[i]]++
				total++
			}
		}
	}
	// 61 degrees of freedom: mean 61, standard deviation 11. A bare b%62 would come out near 0.0066*total = 4800.
	expected := float64(total) / float64(len(alphabet))
	chiSquare := 0.0
	for i := range len(alphabet) {
		d := float64(count[alphabet[i]]) - expected
		chiSquare += d * d / expected
	}
	if chiSquare > 400 {
		t.Errorf("chi-square %.0f over %d characters: not uniform", chiSquare, total)
	}
}

func TestRandomTextHasTheLengthAskedForAndOnlyLettersAndDigits(t *testing.T) {
	for _, n := range []int{0, 1, 2, 47, 48, 63, 64, 65, 128, 1000} {
		s := apikey.RandomText(n)
		if len(s) != n || strings.Trim(s, alphabet) != "" {
			t.Errorf("RandomText(%d) = %q", n, s)
		}
	}
}

func TestChecksumValidDetectsEverySingleCharacterSubstitution(t *testing.T) {
	for _, env := range environments {
		key := apikey.Generate(env)
		for i := range len(key) {
			for j := range len(alphabet) {
				if alphabet[j] == key[i] {
					continue
				}
				if apikey.ChecksumValid(key[:i] + alphabet[j:j+1] + key[i+1:]) {
					t.Fatalf("%q instead of %q at %d of a %v key is not detected", alphabet[j], key[i], i, env)
				}
			}
		}
	}
}

func TestChecksumValidDetectsSwappedNeighbours(t *testing.T) {
	for _, env := range environments {
		key := apikey.Generate(env)
		for i := len(prefixOf(env)); i+1 < len(key); i++ {
			if key[i] != key[i+1] && apikey.ChecksumValid(key[:i]+key[i+1:i+2]+key[i:i+1]+key[i+2:]) {
				t.Fatalf("characters %d and %d of a %v key swapped: not detected", i, i+1, env)
			}
		}
	}
}

func TestChecksumValidIsFalseForWhatIsNoKey(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, s := range []string{"", "rk_", key[:47], key + "0", " " + key, "rk_live_" + apikey.RandomText(40)} {
		if apikey.ChecksumValid(s) {
			t.Errorf("valid: %d characters", len(s))
		}
	}
}

func TestEndsInSecretTellsAKeyByItsChecksumWhateverStandsInFrontOfIt(t *testing.T) {
	for _, env := range environments {
		secret := apikey.Generate(env)[len(prefixOf(env)):]
		for _, before := range []string{"", "_", "k_", "pk_", prefixOf(env), "Bearer x"} {
			if !apikey.EndsInSecret(before + secret) {
				t.Errorf("not of a %v key behind %q", env, before)
			}
		}
		for _, other := range []string{"", secret[1:], secret + "0", secret[1:] + secret[:1], apikey.RandomText(len(secret)), apikey.RandomText(400)} {
			if apikey.EndsInSecret(other) {
				t.Errorf("of a %v key: %d characters", env, len(other))
			}
		}
	}
}

func TestAKeyWithoutChecksumStillParses(t *testing.T) {
	for _, env := range environments {
		key := apikey.Generate(env)
		last := "0"
		if strings.HasSuffix(key, last) {
			last = "1"
		}
		old := key[:apikey.Length-1] + last
		if apikey.ChecksumValid(old) {
			t.Fatal("the changed key has a valid checksum")
		}
		if got, err := apikey.Parse(old); got != env || err != nil {
			t.Errorf("Parse: %v, %v, want %v", got, err, env)
		}
	}
}

func TestHashIsTheSHA256OfTheWholeString(t *testing.T) {
	for _, s := range []string{
		apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox), "", "rk_", apikey.RandomText(47), apikey.RandomText(49),
	} {
		if apikey.Hash(s) != apikey.Digest(sha256.Sum256([]byte(s))) {
			t.Errorf("wrong digest of %d characters", len(s))
		}
	}
}

func TestHashAllocatesNothing(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	var d apikey.Digest
	if n := testing.AllocsPerRun(1000, func() { d = apikey.Hash(key) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if d == (apikey.Digest{}) {
		t.Error("no digest")
	}
}

func TestEnvironmentNames(t *testing.T) {
	for env, want := range map[apikey.Environment]string{0: "none", apikey.Production: "production", apikey.Sandbox: "sandbox", 3: "none"} {
		if got := env.String(); got != want {
			t.Errorf("Environment(%d) = %q, want %q", env, got, want)
		}
	}
	for _, env := range environments {
		if got, err := apikey.ParseEnvironment(env.String()); got != env || err != nil {
			t.Errorf("ParseEnvironment(%q) = %v, %v", env, got, err)
		}
	}
	for _, s := range []string{"", "none", "Production", "test", "live"} {
		if got, err := apikey.ParseEnvironment(s); err == nil || got != 0 {
			t.Errorf("ParseEnvironment(%q) = %v, %v", s, got, err)
		}
	}
}

func TestMaskAndHintShowPrefixAndLastFourCharactersOnly(t *testing.T) {
	for _, env := range environments {
		key := apikey.Generate(env)
		if got, want := apikey.Mask(env, apikey.Hint(key)), prefixOf(env)+"…"+key[44:]; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestRedactReplacesEveryKeyAndNothingElse(t *testing.T) {
	p, s := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	for _, tt := range []struct{ name, in, want string }{
		{"production key", p, "rk_…"},
		{"sandbox key", s, "rk_…"},
		{"in a sentence", "key " + p + ", please", "key rk_…, please"},
		{"in a URL", "https://h/?api_key=" + s + "&a=1", "https://h/?api_key=rk_…&a=1"},
		{"in JSON", `{"key":"` + p + `"}`, `{"key":"rk_…"}`},
		{"after letters", "work" + p, "workrk_…"},
		{"after an underscore", "_" + p, "_rk_…"},
		{"before what is not ASCII", p + "é", "rk_…é"},
		{"after invalid UTF-8", "\xff" + p, "\xffrk_…"},
		{"over-long run", p + apikey.RandomText(30), "rk_…"},
		{"over-long sandbox run", s + "0", "rk_…"},
		{"two keys", p + " " + s, "rk_… rk_…"},
		{"three keys", p + "," + s + "," + p, "rk_…,rk_…,rk_…"},
		{"rk_ between words before a key", "rk_ and " + p, "rk_ and rk_…"},
		{"a short run before a key", p[:47] + " " + s, p[:47] + " rk_…"},
		{"a key in lines", "a\n" + p + "\nb", "a\nrk_…\nb"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !apikey.ContainsKey(tt.in) {
				t.Error("ContainsKey is false")
			}
			if got := apikey.Redact(tt.in); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if apikey.ContainsKey(apikey.Redact(tt.in)) {
				t.Error("the redacted text has a key")
			}
		})
	}
}

func TestRedactLeavesTextWithoutAKeyAlone(t *testing.T) {
	p, s := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	for _, text := range []string{
		"", "rk_", "rk_test_", "r", "rk", "hello", "work_", strings.Repeat("rk_", 40), p[:47], s[:47], p[1:], "RK" + p[2:],
		"rk_live_" + apikey.RandomText(39), "rk-" + p[3:], p[:20] + " " + p[20:], "rat_" + apikey.RandomText(60), apikey.RandomText(200),
		"rk_test_" + apikey.RandomText(39) + "_",
	} {
		if apikey.ContainsKey(text) {
			t.Errorf("ContainsKey(%q)", text)
		}
		if got := apikey.Redact(text); got != text {
			t.Errorf("Redact(%q) = %q", text, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, env := range environments {
		key := apikey.Generate(env)
		f.Add(key, "", "")
		f.Add(key, "?api_key=", "&a=1")
		f.Add(key[:47], "", "x")
	}
	f.Add("rk_live_"+strings.Repeat("a", 40), "\x00", "\xff")
	f.Add("", "", "")
	f.Fuzz(func(t *testing.T, key, before, after string) {
		env, err := apikey.Parse(key)
		if err != nil {
			if !errors.Is(err, apikey.ErrMalformed) || env != 0 || apikey.ChecksumValid(key) {
				t.Fatalf("refused with %v, %v", env, err)
			}
			return
		}
		if env != apikey.Production && env != apikey.Sandbox {
			t.Fatalf("environment %v", env)
		}
		if !apikey.ContainsKey(key) || apikey.Redact(key) != "rk_…" {
			t.Fatalf("Redact(%q) = %q", key, apikey.Redact(key))
		}
		text := before + key + after
		secret := key[len(prefixOf(env)):]
		if strings.Contains(before+" "+after, secret) {
			return // without its prefix nobody can know it for one
		}
		if redacted := apikey.Redact(text); strings.Contains(redacted, secret) || apikey.ContainsKey(redacted) || !apikey.ContainsKey(text) {
			t.Fatalf("Redact(%q) = %q", text, redacted)
		}
	})
}

func TestRedactLeavesNothingOfAKeyThatAdjoinsOtherText(t *testing.T) {
	p, s := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	for _, text := range []string{"rk_" + p, "mark_" + p, "rk_test_" + s, "rk_abc" + p, p + p, p + s, p + "_x", p + "_" + p} {
		if !apikey.ContainsKey(text) {
			t.Errorf("no key found in a text of %d characters with one", len(text))
		}
		if left := apikey.Redact(text); strings.Contains(left, p[3:]) || strings.Contains(left, s[8:]) {
			t.Errorf("a key is left in %d characters", len(left))
		}
	}
}
