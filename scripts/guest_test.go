// Package scripts has no Go code of its own: this tests the helper in its place, between QEMU and the
// directory that a guest mounts. `go test -short` leaves the guests out; continuous integration has
// to run without it. Each guest takes a kernel's boot without KVM, some ten seconds.
package scripts

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/scripts/guestsuite"
)

// helper is what is tested: $HELPER, or else built from this clone.
var helper = os.Getenv("HELPER")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	if helper == "" && !testing.Short() && os.Geteuid() == 0 {
		dir, err := os.MkdirTemp("", "helper")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // an ordinary user starts it, too
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		helper = filepath.Join(dir, "virtfs-proxy-helper")
		if out, err := goTool("build", "-o", helper, "..").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "the helper did not build: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// guestTimeout, in seconds, ends a guest that hangs: the longest test takes 210 beside
// another guest and a load of 13.
const guestTimeout = "900"

// goTool runs go for something that stands alone, in a guest as well.
func goTool(args ...string) *exec.Cmd {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return cmd
}

// endWithTest is for the children: a test that panics or is killed must not leave them behind.
var endWithTest = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}

// guest boots one and returns what its command prints. It installs and fetches what is missing; when
// that fails, or the guest does, its words on standard error are the test's.
func guest(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, err := script(t, "./guest", append([]string{"--helper", helper, "--timeout", guestTimeout}, args...)...)
	if err != nil {
		t.Errorf("scripts/guest %q: %v\n%s%s", args, err, out, errs)
	}
	return out
}

// script runs one of this directory and returns what it prints and how it ended.
func script(t *testing.T, name string, args ...string) (out, errs string, err error) {
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.SysProcAttr = endWithTest
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
	var outBuffer, errBuffer bytes.Buffer
	cmd.Stdout, cmd.Stderr = &outBuffer, &errBuffer
	err = cmd.Run()
	return outBuffer.String(), errBuffer.String(), err
}

// A guest may do on the share whatever a program may do on a native file system, and what it then
// believes to be there is there. All requests of the protocol are seen while it does so.
func TestSuiteInGuest(t *testing.T) {
	besideOthers(t)
	dir := t.TempDir()
	suite, share, log := filepath.Join(dir, "guestsuite"), filepath.Join(dir, "share"), filepath.Join(dir, "log")
	if err := os.Mkdir(share, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := goTool("test", "-c", "-ldflags=-s -w", "-o", suite, "./guestsuite").CombinedOutput(); err != nil {
		t.Fatalf("the suite did not build: %v\n%s", err, out)
	}
	out := guest(t, "--share", share, "--put", suite, "--helper-log", log, "--helper-arg", "--log-level=debug",
		"guestsuite", "-dir", "/mnt/suite", "-test.v")
	if t.Failed() {
		return
	}
	t.Logf("%d cases passed", strings.Count(out, "    --- PASS: "))

	inGuest, err := os.ReadFile(filepath.Join(share, "suite.manifest"))
	if err != nil {
		t.Fatal(err)
	}
	onHost, err := guestsuite.Manifest(filepath.Join(share, "suite"))
	if err != nil {
		t.Fatal(err)
	}
	guestLines, hostLines := strings.Split(string(inGuest), "\n"), strings.Split(onHost, "\n")
	if len(guestLines) != len(hostLines) {
		t.Errorf("the guest sees %d files, the host %d", len(guestLines), len(hostLines))
	} else {
		for i := range hostLines {
			if guestLines[i] != hostLines[i] {
				t.Errorf("the guest sees\n%s\nthe host sees\n%s", guestLines[i], hostLines[i])
			}
		}
	}

	requests, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.FieldsSeq(`OPEN CREATE MKNOD MKDIR SYMLINK LINK LSTAT READLINK STATFS CHMOD CHOWN
		TRUNCATE UTIME RENAME REMOVE LGETXATTR LLISTXATTR LSETXATTR LREMOVEXATTR GETVERSION`) {
		if !regexp.MustCompile(`\b` + name + `\b`).Match(requests) {
			t.Errorf("no %s in the helper's debug log", name)
		}
	}
}

// Two guests on one name: the first one's QEMU unlinks that once it has connected.
func TestTwoGuestsOnOneSocket(t *testing.T) {
	besideOthers(t)
	share := t.TempDir()
	socket, _ := startHelper(t, share)
	// Each waits for the other's file, works beside it, and counts both ones' work at the end.
	const work = `
		me=$1 peer=$2
		until_there() { i=0; until [ -e "$1" ]; do i=$((i + 1)); [ $i -lt 600 ] || exit 99; sleep 0.1; done; }
		echo "from $me" >$me.new && mv $me.new $me
		until_there $peer && cat $peer
		mkdir -p work
		for i in $(seq 50); do echo $me >work/$me.$i && chmod 600 work/$me.$i || exit 98; done
		touch $me.done && until_there $peer.done
		ls work | wc -l`
	run := func(me, peer string) {
		out := guest(t, "--socket", socket, "sh", "-c", work, "sh", me, peer)
		if want := "from " + peer + "\n100\n"; out != want {
			t.Errorf("the guest %s printed %q, want %q", me, out, want)
		}
	}
	var both sync.WaitGroup // no subtests: -parallel 1 would have one wait for the other for good
	both.Go(func() { run("left", "right") })
	// A QEMU that comes in the moment between the other's unlink and the helper's new link finds no
	// name, and gives up. So the second one is started when the first one's guest is at work.
	waitFor(t, "the first guest", 5*time.Minute, func() bool {
		_, err := os.Stat(filepath.Join(share, "left"))
		return err == nil || t.Failed()
	})
	both.Go(func() { run("right", "left") })
	both.Wait()
	if files, err := os.ReadDir(filepath.Join(share, "work")); err != nil || len(files) != 100 {
		t.Errorf("the host sees %d files (%v), want 100", len(files), err)
	}
}

// While the server is killed every second, and the helper renewed in between, a guest untars a tree
// and compares what it reads. A change that a server died over answers EIO, and is made again by the
// guest; nothing else may be seen.
func TestSurvivalInGuest(t *testing.T) {
	besideOthers(t)
	share := t.TempDir()
	socket, supervisor := startHelper(t, share)
	const work = `
		mkdir /tree && cd /tree || exit 90
		for d in $(seq 8); do
			mkdir $d || exit 91
			for f in $(seq 12); do seq $d $((d * 100 + f * 37)) >$d/$f || exit 92; done
		done
		tar cf /tree.tar . && find . -type f | sort | xargs md5sum >/sums || exit 93
		touch /mnt/ready
		for round in $(seq 4); do
			rm -rf /mnt/tree || rm -rf /mnt/tree || rm -rf /mnt/tree || exit 94
			mkdir -p /mnt/tree && cd /mnt/tree || exit 95
			tries=0
			until tar xf /tree.tar 2>/errors; do
				grep -v -e 'I/O error' -e 'Input/output error' /errors && exit 96
				tries=$((tries + 1)); [ $tries -lt 10 ] || exit 97
				echo "again: $(head -n 1 /errors)"
			done
			md5sum -c /sums >/checked 2>&1 || { cat /checked; exit 98; }
			find . -type f | sort | xargs md5sum | cmp - /sums || exit 99
		done
		echo compared`
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		kills := 0
		defer func() { stopped <- kills }()
		for second := 1; ; second++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
			if _, err := os.Stat(filepath.Join(share, "ready")); err != nil {
				continue // the guest boots
			}
			if second%5 == 0 {
				syscall.Kill(supervisor, syscall.SIGHUP)
				continue
			}
			for _, pid := range helpertest.Children(supervisor) {
				if syscall.Kill(pid, syscall.SIGKILL) == nil {
					kills++
				}
			}
		}
	}()
	out := guest(t, "--socket", socket, "sh", "-c", work)
	close(stop)
	kills := <-stopped
	t.Logf("%d kills, the guest printed\n%s", kills, out)
	if !strings.HasSuffix(out, "compared\n") {
		t.Error("the guest has not come to its end")
	}
	if kills < 5 {
		t.Errorf("%d kills: not much of a test", kills)
	}
}

// QEMU and the helper on the two ends of a socket pair, with no name at all.
func TestInheritedSocket(t *testing.T) {
	besideOthers(t)
	share := t.TempDir()
	out := guest(t, "--fd", "--share", share, "echo hello >f && cat f && stat -c %u:%a f")
	if want := "hello\n0:644\n"; out != want {
		t.Errorf("the guest printed %q, want %q", out, want)
	}
	if content, err := os.ReadFile(filepath.Join(share, "f")); err != nil || string(content) != "hello\n" {
		t.Errorf("the host reads %q, %v", content, err)
	}
}

// An ordinary user starts both QEMU and the helper. What the guest's users make is of that user's own
// ids on the host, and a range that there isn't gives the guest's root alone.
func TestRootlessInGuest(t *testing.T) {
	besideOthers(t)
	const work = `
		mkdir /tree && cd /tree || exit 90
		for d in 1 2 3; do mkdir $d && for f in $(seq 20); do seq $d $((f * 137)) >$d/$f; done; done
		chown -R 1000:1000 2 && chown -R 65534:65534 3 && tar cf /tree.tar . || exit 91
		find . -type f | sort | xargs md5sum >/sums
		mkdir /mnt/tree && cd /mnt/tree || exit 92
		tar xf /tree.tar || exit 94 # which passes over a chown that is refused
		md5sum -c /sums >/checked 2>&1 || { cat /checked; exit 93; }
		stat -c %u:%g 1/1 2/1 3/1
		chown 1000:1000 1 2>&1
		echo user:x:1000:1000::/:/bin/sh >>/etc/passwd
		chmod 777 . && start-stop-daemon -S -c 1000:1000 -x /bin/sh -- \
			-c 'echo mine >own && chmod 600 own && ln -s own link && cat link' 2>&1
		stat -c %u:%g 1 own 2>/dev/null; true`
	for _, c := range []struct {
		name, ranges, prints string
		owner                uint32 // on the host, of what the guest's 1000 has made
	}{
		{"range", "someone:700000:65536\n", "0:0\n1000:1000\n65534:65534\nmine\n1000:1000\n1000:1000\n", 700999},
		{"alone", "", "0:0\n0:0\n0:0\nchown: 1: Operation not permitted\n" +
			"/bin/sh: can't create own: Operation not permitted\n0:0\n", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			// QEMU's user must reach the share. No directory of t.TempDir lets it.
			share, err := os.MkdirTemp("", "share")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(share) })
			if err := os.Chown(share, helpertest.Someone, helpertest.Someone); err != nil {
				t.Fatal(err)
			}
			command := helpertest.WithSomeone(t, c.ranges, "./guest", "--helper", helper, "--timeout", guestTimeout,
				"--rootless", "--user", "someone", "--share", share, work)
			out, errs, err := script(t, command[0], command[1:]...)
			if err != nil {
				t.Fatalf("%v\n%s%s", err, out, errs)
			}
			if out != c.prints {
				t.Errorf("the guest printed\n%q, not\n%q", out, c.prints)
			}
			var st syscall.Stat_t
			err = syscall.Lstat(filepath.Join(share, "tree/own"), &st)
			if c.owner == 0 {
				if err != syscall.ENOENT {
					t.Errorf("what was refused is there: %v", err)
				}
			} else if err != nil || st.Uid != c.owner || st.Gid != c.owner {
				t.Errorf("own is of %d:%d, want %d (%v)", st.Uid, st.Gid, c.owner, err)
			}
			if err := syscall.Lstat(filepath.Join(share, "tree/1/1"), &st); err != nil || st.Uid != helpertest.Someone {
				t.Errorf("the guest's root is %d on the host (%v)", st.Uid, err)
			}
		})
	}
}

// The comparison boots all three, and its table has a time of each for each workload.
func TestCompare(t *testing.T) {
	besideOthers(t)
	exports, times := t.TempDir(), filepath.Join(t.TempDir(), "times")
	out, errs, err := script(t, "./compare", "--helper", helper, "--rounds", "1", "--passes", "1", "--files", "20",
		"--export", exports, "--times", times, "--", "--timeout", guestTimeout)
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, errs)
	}
	single, err := os.ReadFile(times)
	if err != nil {
		t.Fatal(err)
	}
	for _, workload := range []string{"untar", "find", "ls -lR", "grep -r", "create storm", "rm -rf"} {
		var row strings.Builder // with one pass in all, the medians are the single times
		fmt.Fprintf(&row, `(?m)^%s`, workload)
		for _, who := range []string{"ours", "c", "local"} {
			seconds := regexp.MustCompile(`(?m)^1\t1\t` + who + `\t` + workload + `\t(\d+\.\d\d)$`).FindSubmatch(single)
			if seconds == nil {
				t.Fatalf("no time of %s for %s in\n%s", who, workload, single)
			}
			fmt.Fprintf(&row, ` +%s`, regexp.QuoteMeta(string(seconds[1])))
		}
		row.WriteString(`( +(\d+\.\d\d|-) +\(.+-.+\)){2}$`)
		if !regexp.MustCompile(row.String()).MatchString(out) {
			t.Errorf("no line %s in\n%s", row.String(), out)
		}
	}
	if left, err := os.ReadDir(exports); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Half a tree takes half the time: such times are never shown.
func TestCompareFailure(t *testing.T) {
	besideOthers(t)
	exports := t.TempDir()
	if err := syscall.Mount("exports", exports, "tmpfs", 0, "nr_inodes=16"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(exports, 0); err != nil {
			t.Error(err)
		}
	})
	out, errs, err := script(t, "./compare", "--helper", helper, "--rounds", "1", "--passes", "1", "--files", "20",
		"--only", "ours", "--export", exports, "--", "--timeout", guestTimeout)
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 {
		t.Errorf("ended with %v, want status 1", err)
	}
	if out != "" {
		t.Errorf("printed\n%s", out)
	}
	for _, want := range []string{"untar: status", "No space left on device"} {
		if !strings.Contains(errs, want) {
			t.Errorf("does not say %q, but\n%s", want, errs)
		}
	}
}

// besideOthers is for a test that may boot guests beside another one.
func besideOthers(t *testing.T) {
	needGuest(t)
	t.Parallel()
}

// needGuest skips the test with -short, and where no guest can be booted.
func needGuest(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest")
	}
	helpertest.NeedRoot(t)
	helpertest.NeedProgram(t, "qemu-system-x86_64", "qemu-system-x86")
	helpertest.NeedProgram(t, "busybox", "busybox-static")
	helpertest.NeedProgram(t, "cpio", "cpio")
}

// startHelper serves share, for QEMU run by nobody as scripts/guest does it, until the test ends.
func startHelper(t *testing.T, share string) (socket string, supervisor int) {
	t.Helper()
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	// QEMU's user must reach the socket, and may unlink it. No other temporary directory lets it.
	dir, err := os.MkdirTemp("", "socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "socket")

	var log bytes.Buffer
	cmd := exec.Command(helper, "-n", "-p", share, "-s", socket, "-u", nobody.Uid, "-g", nobody.Gid)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = endWithTest
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("the helper did not end on SIGTERM")
			cmd.Process.Kill()
			<-ended
		}
		if t.Failed() {
			t.Logf("the helper's log:\n%s", log.String())
		}
	})
	waitFor(t, "the helper's socket", 10*time.Second, func() bool {
		info, err := os.Lstat(socket)
		return err == nil && info.Mode().Type() == os.ModeSocket
	})
	return socket, cmd.Process.Pid
}

// waitFor gives what something so long to be there.
func waitFor(t *testing.T, what string, patience time.Duration, there func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !there(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%s: not there after %v", what, patience)
			return
		}
	}
}
