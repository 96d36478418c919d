package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/test/eventually"
)

// blocks returns the fenced blocks of a language in the README.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	return blocksOf(t, "../README.md", language)
}

func blocksOf(t *testing.T, page, language string) []string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		found = append(found, m[1])
	}
	if len(found) == 0 {
		t.Fatalf("%s has no %s block", page, language)
	}
	return found
}

// TestCommandsInTheReadmeWork runs the lines of its rekall-gateway block beside a gateway, with the id of a real key where one stands.
func TestCommandsInTheReadmeWork(t *testing.T) {
	t.Parallel()
	var lines []string
	for _, block := range blocks(t, "sh") {
		for line := range strings.Lines(block) {
			if strings.HasPrefix(line, "rekall-gateway ") {
				lines = append(lines, strings.TrimSpace(line))
			}
		}
	}
	if len(lines) < 5 {
		t.Fatalf("only %d commands found", len(lines))
	}
	r := newRig(t)
	r.start(standardSite)
	eventually.True(t, "the edge is listed", func() bool { return len(r.edges()) == 1 })
	id := ""
	for _, line := range lines {
		line = strings.ReplaceAll(line, "key_…", id)
		cmd := exec.Command("sh", "-c", line)
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+r.database, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
		output, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", line, err, output)
		}
		if found := regexp.MustCompile(`key_[0-9A-Za-z]{22}`).FindString(string(output)); found != "" {
			id = found
		}
	}
}
