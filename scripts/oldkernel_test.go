package scripts

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"virtfs-proxy-helper/bench/helpertest"
)

// onOldKernel are the tests that run in the guest, by package: those of what the
// kernel does for the helper, rather than of what the helper computes. A test that
// does not exist is a failure. The others, of random sequences, load, races, memory
// and hostile files, would take too long: emulation is 10 to 20 times slower.
// TestBoundedMemory would also fail: with the huge pages that Debian gives to every
// process the server grows by 8 to 17 MiB, without them by 4 to 6, and the bound is 13.
var onOldKernel = []struct{ pkg, tests string }{
	// Threads, descriptors, namespaces, mounts, system calls; the start without root.
	{"ops/sandbox", `TestThreads TestDescriptors TestNoSandbox TestNamespaces TestChroot TestNoNamespaces
		TestMountsComeOneWay TestSharedHost TestViolation TestCVE2018_16359TheFilterFilters TestSeccompLog
		TestArchitectures TestServerDescriptors TestRootlessRange TestRootlessAlone TestRootlessFD`},
	{"pool/ipc", `TestSendWhileClosed`},
	{"pool/inflight", `TestDeathAtEachStep TestPartOfAnAnswer TestFramesThroughTheInbox TestMemory`},
	{"pool/logging", `TestStuckSink TestStuckAtTheEnd TestFailingSink TestSyslog TestSyslogStream`},
	// The life of the daemon, its names and its pidfile.
	{"pool/supervisor", `TestDaemon TestNameComesBack TestClaims TestPIDFileReplaces TestStrangersLock`},
	// Survival of a dead, stuck or renewed server; signals; passed descriptors; logging.
	{"pool", `TestKilledServer TestRenewedServer TestKilledPipeline TestKilledWhileHeld TestRenewedWhileStuck
		TestKilledSupervisor TestTerminate TestOnce TestStuckRequest TestMaxConnections TestPipelined
		TestLogSays TestJournal`},
	// Each request at least once, and the faults of other helpers.
	{"ops", `TestConformance TestCVE2023_2861 TestCVE2022_0358 TestCVE2016_9602 TestCVE2016_8578
		TestProtectedRegular TestIdentityIsTakenBack TestGetVersion TestCreateAsNobody`},
}

// leftOut are those of these tests that have a kernel floor and are skipped in the
// guest, each with the reason. Any other test that is skipped there is a failure,
// and so is an entry that is not skipped: it has passed, or no such test exists.
var leftOut = map[string]string{
	"ops TestConformance/tmpfs": "user attributes on a tmpfs are of Linux 6.6",

	"pool TestKilledWhileHeld": "a pidfd of a thread is of Linux 6.9",
}

// programs are what the tests start, from this machine.
var programs = []string{
	"ln", "mount", "newgidmap", "newuidmap", "setpriv", "sh", "sleep", "stat", "unshare", helpertest.CPath,
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

// In the guest the tests have more time, run in two ways, and are short where they
// are long by choice; TestRootlessRange, TestRootlessAlone and TestRootlessFD are
// about other ways. The kernel's own hard limit of descriptors is less than any
// system's.
const runTests = `
	export PATH=/usr/bin:/bin HOME=/root TMPDIR=/tmp HELPER=/helper VIRTFS_TEST_PATIENCE=5
	export VIRTFS_TEST_WAYS=foreground-namespace,daemon-chroot
	ulimit -Hn 524288
	read -r release </proc/sys/kernel/osrelease && echo "$release"
	cd /tmp || exit 93
	run() {
		/tests/"$1" -test.v=test2json -test.short -test.parallel=1 -test.timeout=10m -test.run "$2" >/mnt/"$1" 2>&1
		echo "exit $?" >>/mnt/"$1"
	}
`

// It has the machine to itself, and the guest runs one test at a time: the helper
// gives a server 10 s to start, however slow the machine is.
func TestOnOldKernel(t *testing.T) {
	needGuest(t)
	share, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	helpertest.NeedProgram(t, "mkfs.ext4", "e2fsprogs")
	helpertest.NeedProgram(t, "newuidmap", "uidmap")
	helpertest.C(t)
	makeDisk(t, image)
	release := guest(t, "--timeout", "1200", "--memory", "2048", "--disk", image, "--share", share, inOldKernel)
	complete := !t.Failed()
	t.Logf("Linux %s", release)

	var skipped []string
	for _, group := range onOldKernel {
		t.Run(group.pkg, func(t *testing.T) {
			for name, action := range results(t, filepath.Join(share, path.Base(group.pkg)+".test")) {
				if action == "skip" {
					skipped = append(skipped, group.pkg+" "+name)
				}
			}
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
	build, script := []string{"test", "-c", "-ldflags=-s -w", "-o", filepath.Join(root, "tests") + "/"}, runTests
	for _, group := range onOldKernel {
		build = append(build, "../"+group.pkg)
		script += fmt.Sprintf("run %s.test '^(%s)$'\n", path.Base(group.pkg),
			strings.Join(strings.Fields(group.tests), "|"))
	}
	for dir := range strings.FieldsSeq("dev proc sys mnt root tests run var tmp etc usr/bin usr/lib usr/lib64") {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Chmod(root, 0o755), os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky),
		os.Symlink("usr/bin", filepath.Join(root, "bin")),
		os.Symlink("usr/lib", filepath.Join(root, "lib")), os.Symlink("usr/lib64", filepath.Join(root, "lib64")),
		os.WriteFile(filepath.Join(root, "run-tests"), []byte(script), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	command("cp", helper, filepath.Join(root, "helper"))
	files := []string{"/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid", "/etc/nsswitch.conf"}
	for _, name := range programs {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, program)
		for field := range strings.FieldsSeq(command("ldd", program)) {
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
	command("go", build...)
	for _, group := range onOldKernel { // before the boot: a renamed test is a failure at once
		listed := command(filepath.Join(root, "tests", path.Base(group.pkg)+".test"), "-test.list=^Test")
		exist := strings.Fields(listed)
		for name := range strings.FieldsSeq(group.tests) {
			if !slices.Contains(exist, name) {
				t.Errorf("no %s in %s: renamed or removed?", name, group.pkg)
			}
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	command("mkfs.ext4", "-q", "-d", root, image, "2G")
}

// results reports each failed test of a package. It returns the action that ended
// each test, by name: pass, fail or skip.
func results(t *testing.T, file string) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("no result: %v", err)
	}
	cmd := exec.Command("go", "tool", "test2json", "-t")
	cmd.Stdin = bytes.NewReader(raw)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	ended, output := map[string]string{}, map[string]string{}
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
		if event.Test == "" {
			continue
		}
		switch event.Action {
		case "output":
			output[event.Test] += event.Output
		case "pass", "skip":
			ended[event.Test] = event.Action
			if event.Elapsed >= 1 || event.Action == "skip" {
				t.Logf("%5.1f s  %s %s", event.Elapsed, event.Action, event.Test)
			}
		case "fail":
			ended[event.Test] = event.Action
			t.Errorf("%s\n%s", event.Test, output[event.Test])
		}
	}
	t.Logf("%d tests have ended", len(ended))
	if !bytes.HasSuffix(raw, []byte("exit 0\n")) { // a test that does not end has no result of its own
		t.Errorf("the package failed; the end of what it printed:\n%s", raw[max(0, len(raw)-8<<10):])
	}
	return ended
}
