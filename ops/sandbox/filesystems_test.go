package sandbox

import (
	"os"
	"strings"
	"testing"
)

// A file system that this kernel has, and that nobody has decided about, is
// decided about in filesystems.go: are its files its own, or the kernel's?
func TestFilesystemsAreDecided(t *testing.T) {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		name := strings.TrimSpace(strings.TrimPrefix(line, "nodev"))
		if _, decided := filesystems[name]; !decided {
			t.Errorf("%s: add it to filesystems, covered or allowed", name)
		}
	}
	for name, want := range map[string]bool{
		"proc": true, "sysfs": true, "devtmpfs": true, "nsfs": true, "cgroup2": true, "fusectl": true,
		"tmpfs": false, "ext4": false, "fuse": false, "fuse.sshfs": false, "fuse.proc": false, "nfs4": false,
		"no-such-filesystem": true, // it may have been unloaded
	} {
		if covers(name) != want {
			t.Errorf("covers(%s) = %v", name, !want)
		}
	}
	for name, fs := range filesystems {
		if got, ok := coveredMagic(fs.magic); ok && !fs.covered {
			t.Errorf("%s is allowed, and would be taken for %s", name, got)
		}
	}
}
