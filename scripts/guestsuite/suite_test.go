// The suite's engine: cases are tables of steps, a step is one system call made by somebody and what
// must come of it. The cases themselves are in the files named after what they are about.

package guestsuite

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

var dir = flag.String("dir", "",
	"a directory to make and to test in; what is tested stays there, described in DIR.manifest")

// deviations are the cases in which a guest differs from a native file system for a reason outside of
// the helper, or inside of it by design. On 9p they must fail: an entry that is out of date is a
// failure, too. All were seen with Linux 6.1 in the guest, QEMU 7.2, and QEMU's own helper as well.
var deviations = map[string]string{
	"TestData/mapped_for_writing":           "guest: a mount without a cache has no pages to share, EINVAL",
	"TestRename/without_replacing":          "guest: renameat2's flags have no place in 9p2000.L, EINVAL",
	"TestTimes/before_1970":                 "guest: times of 9p have no sign, so it makes them 1970",
	"TestTimes/nanoseconds":                 "guest: it cuts given times to whole seconds before it sends them",
	"TestTimes/modification_time_alone":     "QEMU: sends the modification time's nanoseconds in both places of UTIME",
	"TestTimes/access_time_alone":           "QEMU: likewise, so UTIME_OMIT reaches the access time, too",
	"TestTimes/now_and_given":               "QEMU: likewise, so UTIME_NOW does",
	"TestUnlink/open_file_can_be_truncated": "QEMU: does by path what it could do by descriptor, ENOENT",
	"TestXattr/empty_value":                 "QEMU: takes an empty value for removing the attribute, as 9p2000.L does",
	"TestXattr/trusted":                     "helper: has no CAP_SYS_ADMIN, EPERM",
	"TestRootOfAnotherGroup/makes_devices":  "helper: only 0:0 has CAP_MKNOD there, EPERM",
}

// on9p tells that a guest runs the suite, with its directory on the share.
var on9p bool

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	keep := *dir != ""
	if !keep {
		tmp, err := os.MkdirTemp("", "guestsuite")
		if err != nil {
			fmt.Fprintln(os.Stderr, "guestsuite:", err)
			return 1
		}
		defer os.RemoveAll(tmp)
		if err := os.Chmod(tmp, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, "guestsuite:", err)
			return 1
		}
		*dir = filepath.Join(tmp, "suite")
	}
	var err error
	if *dir, err = filepath.Abs(*dir); err == nil {
		err = os.Mkdir(*dir, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestsuite:", err)
		return 1
	}
	on9p = isOn9p(*dir)
	status := m.Run()
	if keep {
		manifest, err := Manifest(*dir)
		if err == nil {
			err = os.WriteFile(*dir+".manifest", []byte(manifest), 0o644)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "guestsuite: manifest:", err)
			status = 1
		}
	}
	return status
}

// isOn9p looks whether dir is on a 9p mount. Its statfs will not tell: that is the one of the file
// system behind.
func isOn9p(dir string) bool {
	var point, kind string
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if strings.HasPrefix(dir+"/", strings.TrimSuffix(f[1], "/")+"/") && len(f[1]) >= len(point) {
			point, kind = f[1], f[2]
		}
	}
	return kind == "9p"
}

// A testCase is a sequence of steps in a fresh directory that anybody may write to.
type testCase struct {
	name  string
	steps []step
}

// A step is a system call, who makes it, and what must come of it: ok or an errno.
type step struct {
	who  who
	op   op
	want unix.Errno
}

const ok = unix.Errno(0)

// An op is a system call, or a check of several, with what to call it in a failure.
type op struct {
	name string
	do   func() error
}

// who is the identity of a caller.
type who struct {
	uid, gid int
	groups   []uint32 // supplementary ones
}

var (
	root   = who{0, 0, nil}
	user   = who{1000, 1000, nil}
	other  = who{1001, 1001, nil}
	member = who{1000, 1000, []uint32{2000}}
	newgrp = who{0, 1000, nil} // root with a primary group other than root's, as after newgrp
)

// run does the cases. Each has a thread of its own that ends with it, because working directory,
// umask and identity are changed for that thread alone.
func run(t *testing.T, cases []testCase) {
	t.Helper()
	helpertest.NeedRoot(t) // to make device nodes and to act as several users
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			home := filepath.Join(*dir, t.Name())
			if err := os.MkdirAll(home, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(home, 0o777); err != nil {
				t.Fatal(err)
			}
			failure := make(chan error)
			go func() {
				runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
				failure <- runSteps(home, c.steps)
			}()
			err := <-failure
			switch reason := deviations[t.Name()]; {
			case reason == "" || !on9p:
				if err != nil {
					t.Error(err)
				}
			case err == nil:
				t.Errorf("passed, so it is no longer a deviation: %s", reason)
			default:
				t.Logf("known deviation: %s: %v", reason, err)
			}
		})
	}
}

func runSteps(home string, steps []step) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Chdir(home); err != nil {
		return fmt.Errorf("chdir: %w", err)
	}
	unix.Umask(0)
	for i, s := range steps {
		if err := s.who.become(); err != nil {
			return fmt.Errorf("step %d: become %v: %w", i+1, s.who, err)
		}
		err := s.op.do()
		if err == nil && s.want == ok || errors.Is(err, s.want) && s.want != ok {
			continue
		}
		outcome := "succeeded"
		if err != nil {
			outcome = err.Error()
		}
		want := "success"
		if s.want != ok {
			want = s.want.Error()
		}
		return fmt.Errorf("step %d, as %d:%d: %s: %s, want %s", i+1, s.who.uid, s.who.gid, s.op.name, outcome, want)
	}
	return nil
}

// become gives the calling thread, and only that, another identity. The saved uid stays 0, which is
// the way back; the kernel takes the capabilities away while the effective one is another.
func (w who) become() error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e != 0 {
		return e
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(w.groups)),
		uintptr(unsafe.Pointer(unsafe.SliceData(w.groups))), 0); e != 0 {
		return e
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(w.gid), uintptr(w.gid), uintptr(w.gid)); e != 0 {
		return e
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(w.uid), uintptr(w.uid), 0); e != 0 {
		return e
	}
	return nil
}
