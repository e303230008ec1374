package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Limits of threads that lie in files of the host.
func TestThreadLimits(t *testing.T) {
	const (
		own        = "proc/self/cgroup"
		v2         = "sys/fs/cgroup"
		threadsMax = "proc/sys/kernel/threads-max"
	)
	for name, c := range map[string]struct {
		files map[string]string
		says  string // "" where n threads are allowed
	}{
		"no files": {map[string]string{}, ""},
		"none":     {map[string]string{own: "0::/a\n", v2 + "/a/pids.max": "max\n"}, ""},
		"kernel": {map[string]string{threadsMax: "99\n"},
			"99 threads are allowed, 100 may be needed: raise the limit (sysctl kernel.threads-max)"},
		"enough": {map[string]string{threadsMax: "100\n"}, ""},
		"own": {map[string]string{own: "0::/a/b\n", v2 + "/a/b/pids.max": "40\n", v2 + "/a/pids.max": "50\n"},
			"40 threads are allowed"},
		"above": {map[string]string{own: "0::/a/b\n", v2 + "/a/b/pids.max": "max\n", v2 + "/a/pids.max": "50\n"},
			"50 threads are allowed"},
		"container": {map[string]string{own: "0::/\n", v2 + "/pids.max": "40\n"},
			"40 threads are allowed, 100 may be needed: raise the limit (the cgroup's pids.max; systemd: TasksMax="},
		"outside its namespace": {map[string]string{own: "0::/../../b\n", v2 + "/pids.max": "40\n"}, "40 threads"},
		"version 1": {map[string]string{own: "7:cpu:/c\n4:pids:/a:b\n", v2 + "/pids/a:b/pids.max": "40\n"},
			"40 threads"},
		"nonsense": {map[string]string{own: "x\n::\n0::\n", threadsMax: "-1\n"}, ""},
	} {
		root := t.TempDir()
		for file, content := range c.files {
			file = filepath.Join(root, file)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		err := threads(root, 100, false)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}
