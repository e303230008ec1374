package slowfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// TestMain makes one system call, if a test has started this binary so: the
// process that has mounted the file system must not use it.
func TestMain(m *testing.M) {
	call, path := os.Getenv("SLOWFS_TEST_CALL"), os.Getenv("SLOWFS_TEST_PATH")
	var err error
	switch call {
	case "":
		os.Exit(m.Run())
	case "lstat":
		err = unix.Lstat(path, new(unix.Stat_t))
	case "read":
		var text []byte
		if text, err = os.ReadFile(path); err == nil {
			fmt.Println(string(text))
			return
		}
	case "write":
		err = os.WriteFile(path, []byte("written"), 0o600)
	case "list":
		var entries []fs.DirEntry
		if entries, err = os.ReadDir(path); err == nil {
			fmt.Println(entries)
			return
		}
	}
	if e := unix.Errno(0); errors.As(err, &e) {
		err = e
	}
	fmt.Println(err)
}

// patience bounds every wait: only what hangs takes so long.
const patience = time.Minute

// start starts a process that makes the call, and returns what it prints.
func start(t *testing.T, call, path string) (result func() string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	// Under the race detector a process ends a second late by default.
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "SLOWFS_TEST_CALL="+call, "SLOWFS_TEST_PATH="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	printed := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(out)
		cmd.Wait()
		printed <- strings.TrimSpace(string(text))
	}()
	return func() string {
		t.Helper()
		select {
		case text := <-printed:
			return text
		case <-time.After(patience): // the end of the test closes the file system
			t.Fatalf("%s %s hangs", call, path)
			return ""
		}
	}
}

func mount(t *testing.T, backing string, options Options) (f *FS, dir string) {
	t.Helper()
	helpertest.NeedFUSE(t)
	dir = t.TempDir()
	f, err := Mount(dir, backing, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, dir
}

// await waits until n requests hang.
func await(t *testing.T, f *FS, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); f.Waiting() < n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d hang", f.Waiting(), n)
		}
	}
}

func TestHang(t *testing.T) {
	// The delay shows that Close waits for the answers.
	f, dir := mount(t, t.TempDir(), Options{Delay: 20 * time.Millisecond})
	f.Hold(Lookups)
	var looking []func() string
	for i := range 5 {
		looking = append(looking, start(t, "lstat", filepath.Join(dir, fmt.Sprint(i))))
	}
	await(t, f, 5)
	f.Release()
	for _, result := range looking {
		if s := result(); s != unix.ENOENT.Error() {
			t.Error(s)
		}
	}
	if s := start(t, "lstat", filepath.Join(dir, "released"))(); s != unix.ENOENT.Error() {
		t.Error(s)
	}
	f.Hold(Lookups)
	last := start(t, "lstat", filepath.Join(dir, "again"))
	await(t, f, 1)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if s := last(); s != unix.ENOENT.Error() {
		t.Error(s)
	}
	if err := unix.Unmount(dir, 0); err != unix.EINVAL {
		t.Errorf("still mounted: %v", err)
	}
}

// The files are those of the other directory, changed there, too.
func TestFiles(t *testing.T) {
	backing := t.TempDir()
	_, dir := mount(t, backing, Options{Delay: time.Millisecond})
	if err := os.WriteFile(filepath.Join(backing, "file"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ call, name, want string }{
		{"read", "file", "text"},
		{"write", "new", "<nil>"},
		{"read", "new", "written"},
		{"list", ".", "[- file - new]"},
	} {
		if s := start(t, step.call, filepath.Join(dir, step.name))(); s != step.want {
			t.Errorf("%s %s: %s, want %s", step.call, step.name, s, step.want)
		}
	}
	if text, err := os.ReadFile(filepath.Join(backing, "new")); err != nil || string(text) != "written" {
		t.Errorf("%q, %v", text, err)
	}
}

// Only requests of the selected kind on the selected names hang.
func TestSelected(t *testing.T) {
	backing := t.TempDir()
	for _, name := range []string{"slow-1", "fast"} {
		if err := os.WriteFile(filepath.Join(backing, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, dir := mount(t, backing, Options{})
	f.Hold(func(op Op, name string) bool { return op == Open && strings.HasPrefix(name, "slow-") })
	hung := start(t, "read", filepath.Join(dir, "slow-1"))
	await(t, f, 1)
	if s := start(t, "read", filepath.Join(dir, "fast"))(); s != "fast" {
		t.Errorf("another name: %s", s)
	}
	if s := start(t, "lstat", filepath.Join(dir, "slow-1"))(); s != "<nil>" {
		t.Errorf("another request: %s", s)
	}
	if n := f.Waiting(); n != 1 {
		t.Errorf("%d hang", n)
	}
	f.Release()
	if s := hung(); s != "slow-1" {
		t.Errorf("released: %s", s)
	}
}

// Delay applies to each request that Late selects, and to no other.
func TestDelay(t *testing.T) {
	const delay = 50 * time.Millisecond
	var looked []string // under f.mu
	f, dir := mount(t, t.TempDir(), Options{Delay: delay, Late: func(op Op, name string) bool {
		if op == Lookup {
			looked = append(looked, name)
		}
		return op == Lookup && name == "late"
	}})
	began := time.Now()
	if s := start(t, "lstat", filepath.Join(dir, "late"))(); s != unix.ENOENT.Error() {
		t.Error(s)
	}
	if took := time.Since(began); took < delay {
		t.Errorf("answered after %v", took)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if fmt.Sprint(looked) != "[late]" {
		t.Errorf("looked up: %q", looked)
	}
}

// A child process does not inherit the file system's end.
func TestNotInherited(t *testing.T) {
	f, _ := mount(t, t.TempDir(), Options{})
	conn, err := f.dev.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("flags %#x, %v", flags, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
}
