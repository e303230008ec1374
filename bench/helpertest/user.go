package helpertest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// Someone is the number of an ordinary user and of its group, both named
// someone. They exist only for the commands of WithSomeone.
const Someone = 54321

// WithSomeone returns a command that runs args with an /etc in which someone
// exists. ranges are the lines of someone in /etc/subuid and /etc/subgid.
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
	const script = `for f in "$0"/*; do mount --bind "$f" "/etc/${f##*/}" || exit 99; done; ` +
		`exec "$@"`
	return append([]string{
		"unshare", "--mount", "--propagation", "slave",
		"sh", "-c", script, etc,
	}, args...)
}

// SomeRange is the first of the ids that someone has besides its own.
const SomeRange = 700000

// AsSomeone returns the command that runs args as someone, with these ranges of
// ids and two supplementary groups.
func AsSomeone(tb testing.TB, ranges string, args ...string) []string {
	tb.Helper()
	id := strconv.Itoa(Someone)
	return WithSomeone(tb, ranges, append([]string{
		"setpriv", "--pdeathsig", "TERM",
		"--reuid", id, "--regid", id, "--groups", "4,24", "--",
	}, args...)...)
}

// giveToSomeone makes someone the owner of directories and of files in them.
func giveToSomeone(tb testing.TB, dirs ...string) {
	tb.Helper()
	for _, dir := range dirs {
		paths := []string{dir}
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			if e.Type().IsRegular() { // a directory may be a file system that does not answer
				paths = append(paths, filepath.Join(dir, e.Name()))
			}
		}
		for _, path := range paths {
			err = errors.Join(err, os.Lchown(path, Someone, Someone))
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
}

// giveTreeToSomeone makes someone the owner of a directory and of all its content.
func giveTreeToSomeone(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, Someone, Someone))
	})
	if err != nil {
		t.Fatal(err)
	}
}
