package supervisor_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"virtfs-proxy-helper/bench/helpertest"
)

// The version is that of -ldflags, and without it and without version control
// what the go command says then.
func TestVersion(t *testing.T) {
	helpertest.NeedRoot(t) // whose build cache it is
	for _, test := range []struct{ ldflags, want string }{
		{"-X main.version=1.2.3", "virtfs-proxy-helper 1.2.3\n"},
		{"", "virtfs-proxy-helper (devel)\n"},
	} {
		program := filepath.Join(t.TempDir(), "virtfs-proxy-helper")
		build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", test.ldflags,
			"-o", program, "virtfs-proxy-helper")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		out, err := exec.Command(program, "--version").CombinedOutput()
		if err != nil || string(out) != test.want {
			t.Errorf("-ldflags %q: %q, %v, want %q", test.ldflags, out, err, test.want)
		}
	}
}
