package helpertest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// noSkip names the variable of the environment that makes a failure of each
// test that would be skipped for what the machine lacks: continuous integration
// sets it, so that no test is left out there unnoticed.
const noSkip = "VIRTFS_TEST_NO_SKIP"

// lacks skips the test, or fails it where noSkip is set.
func lacks(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv(noSkip) != "" {
		tb.Fatalf(format, args...)
	}
	tb.Skipf(format, args...)
}

// NeedRoot skips the test unless root runs it.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		lacks(tb, "needs root: sudo scripts/test --root")
	}
}

// NeedProgram skips the test unless the program is installed: a name in the
// PATH, or a whole path. The message names the Debian package that has it.
func NeedProgram(tb testing.TB, program, pkg string) {
	tb.Helper()
	if _, err := exec.LookPath(program); err != nil {
		lacks(tb, "needs %s: apt-get install %s", program, pkg)
	}
}

// NeedFUSE skips the test unless root runs it on a kernel that has FUSE.
func NeedFUSE(tb testing.TB) {
	tb.Helper()
	NeedRoot(tb)
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		lacks(tb, "needs FUSE: modprobe fuse: %v", err)
	}
	f.Close()
}

// NeedLinux skips the test on a kernel older than the version, which has what.
func NeedLinux(tb testing.TB, major, minor int, what string) {
	tb.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		tb.Fatal(err)
	}
	var runs [2]int
	release := unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &runs[0], &runs[1]); err != nil {
		tb.Fatalf("release %q: %v", release, err)
	}
	if runs[0] < major || runs[0] == major && runs[1] < minor {
		lacks(tb, "needs Linux %d.%d: %s", major, minor, what)
	}
}
