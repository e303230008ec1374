package scripts

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"virtfs-proxy-helper/bench/helpertest"
)

// onOldKernel are the packages whose tests run in the guest.
var onOldKernel = []string{"ops/sandbox", "pool/inflight", "pool/ipc", "pool/supervisor", "pool", "ops"}

// leftOut are the tests that are skipped in the guest, each with the reason.
// Any other test that is skipped there is a failure, and so is an entry that is
// not skipped: it has passed, or no such test exists.
var leftOut = map[string]string{
	"ops TestConformance/tmpfs":       "user attributes on a tmpfs are of Linux 6.6",
	"ops TestMountsBelow/tmpfs":       "user attributes on a tmpfs are of Linux 6.6",
	"ops TestRandom/tmpfs":            "user attributes on a tmpfs are of Linux 6.6",
	"ops TestReadOnly/tmpfs":          "user attributes on a tmpfs are of Linux 6.6",
	"ops TestReadOnlyAccessMode3":     "user attributes on a tmpfs are of Linux 6.6",
	"ops TestRequestsAllocateNothing": "user attributes on a tmpfs are of Linux 6.6",

	"pool TestKilledWhileHeld": "a pidfd of a thread is of Linux 6.9",
}

// programs are what the tests start, from this machine.
var programs = []string{
	"cat", "false", "id", "mount", "newgidmap", "newuidmap", "setpriv", "sh", "sleep", "taskset",
	"umount", "unshare", helpertest.CPath,
}

// The guest's Linux is Debian 12's, 6.1: the oldest kernel that is claimed. It
// has no Go, so the helper and the tests come built, on a disk with the programs
// that they start. The guest's root is that disk.
const inOldKernel = `
	for m in crc16 mbcache jbd2 crc32c_generic libcrc32c ext4 virtio_blk fuse; do
		insmod /modules/$m.ko 2>&1
	done
	mkdir /disk && mount -t ext4 /dev/vda /disk || exit 90
	for d in dev proc sys mnt; do mount -o move /$d /disk/$d || exit 91; done
	cd /disk && mount -o move . / || exit 92
	exec chroot . /bin/sh /run-tests`

// In the guest the tests have more time, and those that are long by choice are
// short. The kernel's own hard limit of descriptors is less than any system's,
// and Debian's kernel gives every process huge pages that it has not asked for,
// which is not what the bounds of memory are about.
const runTests = `
	export PATH=/usr/bin:/bin HOME=/root TMPDIR=/tmp HELPER=/helper VIRTFS_TEST_PATIENCE=5
	ulimit -Hn 524288
	echo madvise >/sys/kernel/mm/transparent_hugepage/enabled
	cat /proc/sys/kernel/osrelease
	for package in %s; do
		cd /tests/$package || exit 93
		./test -test.v=test2json -test.short -test.timeout=15m >/mnt/$package/out 2>&1
		echo "exit $?" >>/mnt/$package/out
	done`

func TestOnOldKernel(t *testing.T) {
	alone(t)
	share, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	helpertest.NeedProgram(t, "mkfs.ext4", "e2fsprogs")
	makeDisk(t, image)
	for _, pkg := range onOldKernel {
		if err := os.MkdirAll(filepath.Join(share, pkg), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	release := guest(t, "--timeout", "1200", "--memory", "2048", "--disk", image, "--share", share, inOldKernel)
	complete := !t.Failed()
	t.Logf("Linux %s", release)

	var skipped []string
	for _, pkg := range onOldKernel {
		t.Run(pkg, func(t *testing.T) {
			skipped = append(skipped, results(t, pkg, filepath.Join(share, pkg, "out"))...)
		})
	}
	if !complete {
		return
	}
	for _, name := range skipped {
		if leftOut[name] == "" {
			t.Errorf("%s is skipped in the guest", name)
		}
	}
	for name, reason := range leftOut {
		if !slices.Contains(skipped, name) {
			t.Errorf("%s is not skipped in the guest: it passes there, or does not exist. The list says: %s",
				name, reason)
		}
	}
}

// makeDisk makes an ext4 image with the tests, the helper, and what both start.
func makeDisk(t *testing.T, image string) {
	t.Helper()
	root := t.TempDir()
	command := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	for dir := range strings.FieldsSeq("dev proc sys mnt root run var tmp etc usr/bin usr/lib usr/lib64") {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Chmod(root, 0o755), os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky),
		os.Symlink("usr/bin", filepath.Join(root, "bin")),
		os.Symlink("usr/lib", filepath.Join(root, "lib")), os.Symlink("usr/lib64", filepath.Join(root, "lib64")),
		os.WriteFile(filepath.Join(root, "run-tests"),
			fmt.Appendf(nil, runTests, strings.Join(onOldKernel, " ")), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	command("cp", helper, filepath.Join(root, "helper"))
	files := []string{"/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid", "/etc/nsswitch.conf"}
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, path)
		for field := range strings.FieldsSeq(command("ldd", path)) {
			if strings.HasPrefix(field, "/") {
				files = append(files, field)
			}
		}
	}
	slices.Sort(files)
	for _, file := range slices.Compact(files) {
		dir, err := filepath.EvalSymlinks(filepath.Dir(file)) // /lib is /usr/lib
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		command("cp", "--dereference", "--preserve=all", file, filepath.Join(root, dir))
	}
	for _, pkg := range onOldKernel {
		dir := filepath.Join(root, "tests", pkg)
		command("go", "test", "-c", "-ldflags=-s -w", "-o", filepath.Join(dir, "test"), "../"+pkg)
	}
	command("mkfs.ext4", "-q", "-d", root, image, "2G")
}

// results reports each failed test of a package, and returns which were skipped.
func results(t *testing.T, pkg, file string) (skipped []string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("no result: %v", err)
	}
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(raw)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	passed, output := 0, map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var event struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := d.Decode(&event); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		switch event.Action {
		case "output":
			output[event.Test] += event.Output
		case "pass":
			if event.Test != "" {
				passed++
				t.Logf("%5.1f s  %s", event.Elapsed, event.Test)
			}
		case "skip":
			skipped = append(skipped, pkg+" "+event.Test)
		case "fail":
			if event.Test != "" {
				t.Errorf("%s\n%s", event.Test, output[event.Test])
			}
		}
	}
	t.Logf("%d tests passed, %d skipped", passed, len(skipped))
	if !bytes.HasSuffix(raw, []byte("exit 0\n")) { // a test that does not end has no result of its own
		t.Errorf("the package failed; the end of what it printed:\n%s", raw[max(0, len(raw)-8<<10):])
	}
	return skipped
}
