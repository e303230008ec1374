package helpertest

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Someone is the number of an ordinary user and of its group, both named
// someone, that no other process than those of WithSomeone knows.
const Someone = 54321

// WithSomeone returns args as a command whose /etc tells of someone, and what
// ids are someone's, as lines of /etc/subuid and /etc/subgid.
func WithSomeone(tb testing.TB, ranges string, args ...string) []string {
	tb.Helper()
	NeedRoot(tb)
	NeedProgram(tb, "newuidmap", "uidmap")
	etc := ShortDir(tb)
	if err := os.Chmod(etc, 0o755); err != nil {
		tb.Fatal(err)
	}
	for name, line := range map[string]string{
		"passwd": fmt.Sprintf("someone:x:%d:%[1]d::/:/bin/sh\n", Someone),
		"group":  fmt.Sprintf("someone:x:%d:\n", Someone),
		"subuid": ranges, "subgid": ranges,
	} {
		all, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(etc, name), append(all, line...), 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	return append([]string{"unshare", "--mount", "--propagation", "slave", "sh", "-c",
		`for f in "$0"/*; do mount --bind "$f" "/etc/${f##*/}" || exit 99; done; exec "$@"`, etc}, args...)
}
