package slowfs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is somebody who looks, if a test has started this binary so.
func TestMain(m *testing.M) {
	path := os.Getenv("HANG_TEST_LOOK")
	if path == "" {
		os.Exit(m.Run())
	}
	var st unix.Stat_t
	fmt.Println(unix.Lstat(path, &st))
}

// look starts a process that looks for a name, and returns what it finds.
func look(t *testing.T, path string) (found func() string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HANG_TEST_LOOK="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() string {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil && err != io.EOF {
			t.Error(err)
		}
		cmd.Wait()
		return strings.TrimSpace(line)
	}
}

func TestHang(t *testing.T) {
	dir := t.TempDir()
	fs, err := Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	await := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); fs.Waiting() < n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d hang", fs.Waiting(), n)
			}
		}
	}
	var looking []func() string
	for i := range 5 {
		looking = append(looking, look(t, filepath.Join(dir, fmt.Sprint(i))))
	}
	await(5)
	fs.Release()
	for _, found := range looking {
		if s := found(); s != unix.ENOENT.Error() {
			t.Error(s)
		}
	}
	if s := look(t, filepath.Join(dir, "released"))(); s != unix.ENOENT.Error() {
		t.Error(s)
	}
	fs.Hold()
	last := look(t, filepath.Join(dir, "again"))
	await(1)
	if err := fs.Close(); err != nil {
		t.Error(err)
	}
	if s := last(); s != unix.ENOENT.Error() {
		t.Error(s)
	}
	if err := unix.Unmount(dir, 0); err != unix.EINVAL {
		t.Errorf("still mounted: %v", err)
	}
}
