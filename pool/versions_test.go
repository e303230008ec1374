package pool_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/pool/ipc"
)

// landed is the newest ancestor of another version: it has none.
const landed = "bca62564ebd6df1d6a8adecdd5aefe84b1945822"

// build builds a helper and returns its path.
func build(t *testing.T, dir string, args ...string) string {
	t.Helper()
	helper := filepath.Join(t.TempDir(), "helper")
	cmd := exec.Command("go", append(append([]string{"build", "-o", helper}, args...), ".")...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	return helper
}

// otherVersion is this tree with another number.
func otherVersion(t *testing.T) string {
	t.Helper()
	file, err := filepath.Abs("ipc/version.go")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	was := fmt.Sprintf("const Version = %d\n", ipc.Version)
	if strings.Count(string(code), was) != 1 {
		t.Fatalf("no %q in %s", was, file)
	}
	dir := t.TempDir()
	other, overlay := filepath.Join(dir, "version.go"), filepath.Join(dir, "overlay.json")
	is := fmt.Sprintf("const Version = %d\n", ipc.Version+1)
	if err := os.WriteFile(other, []byte(strings.Replace(string(code), was, is, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"Replace": map[string]string{file: other}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return build(t, "..", "-overlay", overlay)
}

// landedVersion is the helper of the commit landed; "" where there is no
// history.
func landedVersion(t *testing.T) string {
	t.Helper()
	if err := exec.Command("git", "cat-file", "-e", landed+"^{commit}").Run(); err != nil {
		t.Logf("no commit %s here: only its layout is tested (TestSupervisorWithoutVersion)", landed)
		return ""
	}
	dir := t.TempDir()
	out, err := exec.Command("sh", "-c", `git -C .. archive "$1" | tar -x -C "$2"`, "sh", landed, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return build(t, dir)
}

// A program on disk that numbers differently what passes between supervisor and
// server says so, and the server that is there stays.
func TestOtherVersion(t *testing.T) {
	helpertest.NeedRoot(t) // whose build cache it is
	const says = "do not fit"
	for _, c := range []struct {
		name      string
		old, next func(t *testing.T) string
		says      string
	}{
		{"newer", thisVersion, otherVersion, says},
		{"older", otherVersion, thisVersion, says},
		{"from landed", landedVersion, thisVersion, says},
		// It takes descriptors for what they were, and fails, or says what no
		// server says first.
		{"to landed", thisVersion, landedVersion, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			old, next := c.old(t), c.next(t)
			if old == "" || next == "" {
				return
			}
			helper := filepath.Join(t.TempDir(), "helper")
			replaceBy(t, helper, old)
			p, name := helpertest.Listen(t, helper, export(t))
			vm := helpertest.Dial(t, name)
			vm.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			server := p.Server()
			replaceBy(t, helper, next)
			unix.Kill(p.PID, unix.SIGHUP)
			helpertest.Eventually(t, "the failure is logged", func() bool { return p.Logged("the old one stays") })
			if !p.Logged(c.says) {
				t.Errorf("the reason is not logged:\n%s", p.Output())
			}
			vm.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			helpertest.Dial(t, name).Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
			if p.Server() != server {
				t.Error("another server")
			}
		})
	}
}

// replaceBy is replace by the program of a file.
func replaceBy(t *testing.T, helper, file string) {
	t.Helper()
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, helper, string(program))
}

// Before there was a version, a supervisor started a server like this. Today's
// says no, without touching what it was given.
func TestSupervisorWithoutVersion(t *testing.T) {
	helpertest.NeedRoot(t)
	const n, slot = 4, 135168 // bytes of a slot at that time
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	journal, err := unix.MemfdCreate("journal", unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(journal, n*slot)
	}
	if err != nil {
		t.Fatal(err)
	}
	memory := os.NewFile(uintptr(journal), "journal")
	kept, err := unix.Dup(journal)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kept)
	dir := export(t)
	opened := func(path string) *os.File {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), path)
	}
	ours := helpertest.Ours(t)
	p := helpertest.Start(t, helpertest.Command{
		Path: "env", // as in the landed program, there is nothing else in the environment
		Args: []string{"-i", "VIRTFS_PROXY_HELPER_ROLE=server", ours, "-n", "-p", dir,
			"-s", filepath.Join(dir, "s"), "-u0", "-g0", "--max-connections", fmt.Sprint(n)},
		Files: []*os.File{os.NewFile(uintptr(fds[1]), "control"), memory, opened(ours), opened(dir)},
	})
	status := p.Wait()
	b := make([]byte, 4096)
	timeout := unix.NsecToTimeval(helpertest.Patience.Nanoseconds())
	unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	size, _, err := unix.Recvfrom(fds[0], b, 0)
	if err != nil && err != unix.ECONNRESET {
		t.Fatal(err)
	}
	said := string(b[:max(size, 0)])
	if status != 1 || !strings.HasPrefix(said, "e") || !strings.Contains(said, "do not fit") {
		t.Errorf("status %d, said %q\n%s", status, said, p.Output())
	}
	var st unix.Stat_t
	if err := unix.Fstat(kept, &st); err != nil || st.Blocks != 0 {
		t.Errorf("%v: the old memory has %d blocks", err, st.Blocks)
	}
}

func thisVersion(t *testing.T) string { return helpertest.Ours(t) }
