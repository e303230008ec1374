package supervisor_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/pool/ipc"
)

// step is what a hostile server does: it receives Await messages and sends
// Times messages with so many descriptors. %c is its connection.
type step struct {
	Await int
	Send  string
	FDs   int
	Times int
	Give  string // the name of a socket that it passes its own control to
	Exit  bool
}

const (
	scriptName = "script"  // beside the hostile server, which removes it
	reportName = "refused" // how many descriptors the kernel would not pass
	realName   = "real"    // the program that it becomes without a script
)

// oldKernelEnv names a program that a test binary becomes, on a kernel that has
// no descriptors of threads: before Linux 6.9.
const oldKernelEnv = "HOSTILE_TEST_OLD_KERNEL"

func asOnOldKernel(program string) error {
	policy := seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{{
		Action: seccomp.ActionErrno | seccomp.Action(unix.EINVAL),
		NamesWithCondtions: []seccomp.NameWithConditions{{Name: "pidfd_open",
			Conditions: []seccomp.Condition{{Argument: 1, Operation: seccomp.BitsSet, Value: unix.PIDFD_THREAD}}}},
	}}}
	filter := seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: policy}
	if err := seccomp.LoadFilter(filter); err != nil {
		return err
	}
	return syscall.Exec(program, append([]string{program}, os.Args[1:]...), nil)
}

// init makes a test binary that a supervisor has started a hostile server.
func init() {
	if program := os.Getenv(oldKernelEnv); program != "" {
		fmt.Fprintln(os.Stderr, "old kernel:", asOnOldKernel(program))
		os.Exit(1)
	}
	if !strings.HasPrefix(os.Getenv("VIRTFS_PROXY_HELPER_ROLE"), "server") {
		return
	}
	program, err := os.Readlink("/proc/self/exe")
	if err == nil {
		err = beHostile(filepath.Dir(program))
	}
	fmt.Fprintln(os.Stderr, "hostile server:", err)
	os.Exit(1)
}

const controlFD = 3

func beHostile(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, scriptName))
	if err != nil {
		return syscall.Exec(filepath.Join(dir, realName), os.Args, os.Environ())
	}
	var script []step
	if err := errors.Join(os.Remove(filepath.Join(dir, scriptName)), json.Unmarshal(b, &script)); err != nil {
		return err
	}
	// All that it says after that is hostile.
	hello := []byte{byte(ipc.Hello), ipc.Version}
	if err := unix.Sendmsg(controlFD, hello, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return err
	}
	conn, msg := []byte{0xff, 0xff, 0xff, 0xff}, make([]byte, 1<<16)
	for _, s := range script {
		for range s.Await {
			n, _, _, _, err := unix.Recvmsg(controlFD, msg, nil, 0)
			if err != nil || n == 0 {
				return fmt.Errorf("receive %d bytes: %w", n, err)
			}
			if n >= 5 && msg[0] == 'c' {
				copy(conn, msg[1:5])
			}
		}
		if s.Give != "" {
			if err := give(s.Give); err != nil {
				return err
			}
		}
		refused := 0
		for range s.Times {
			var oob []byte
			if s.FDs > 0 {
				fds := make([]int, s.FDs)
				for i := range fds {
					fds[i] = 1
				}
				oob = unix.UnixRights(fds...)
			}
			body := strings.ReplaceAll(s.Send, "%c", string(conn))
			if err := unix.Sendmsg(controlFD, []byte(body), oob, nil, unix.MSG_NOSIGNAL); err == unix.EPERM {
				refused++
			} else if err != nil {
				break
			}
		}
		if s.FDs > 0 {
			os.WriteFile(filepath.Join(dir, reportName), fmt.Append(nil, refused), 0o644)
		}
		if s.Exit {
			os.Exit(0)
		}
	}
	time.Sleep(time.Hour)
	return nil
}

// give passes the control socket to whoever listens on a name.
func give(name string) error {
	c, err := net.Dial("unix", name)
	if err != nil {
		return err
	}
	_, _, err = c.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(controlFD), nil)
	return err
}

// hostile is a helper with a hostile server to come, whose directory anybody
// may enter.
type hostile struct {
	*helpertest.Process
	dir string
	c   *helpertest.Client
}

// startHostile starts a helper that serves as it should until it is renewed.
func startHostile(t *testing.T, options ...string) *hostile {
	return startHostileOn(t, false, options...)
}

func startHostileOn(t *testing.T, oldKernel bool, options ...string) *hostile {
	t.Helper()
	dir := helpertest.ShortDir(t)
	h := &hostile{dir: dir}
	for name, from := range map[string]string{realName: helpertest.Ours(t), "hostile": testBinary(t)} {
		// By another process: this one's children would have the file open for
		// writing until they execute theirs, and nothing executes it then.
		if out, err := exec.Command("cp", from, filepath.Join(dir, name)).CombinedOutput(); err != nil {
			t.Fatalf("cp %s: %v\n%s", from, err, out)
		}
	}
	helper := filepath.Join(dir, "helper")
	if err := os.Link(filepath.Join(dir, realName), helper); err != nil {
		t.Fatal(err)
	}
	path, env := helper, []string(nil)
	if oldKernel {
		path, env = "/proc/self/exe", []string{oldKernelEnv + "=" + helper}
	}
	name := filepath.Join(dir, "s")
	h.Process = helpertest.Start(t, helpertest.Command{
		Path: path, Env: env,
		Args: append([]string{"-n", "-p", t.TempDir(), "-s", name, "-u", "0", "-g", "0"}, options...),
	})
	helpertest.AwaitName(t, h.Process, name)
	h.c = helpertest.Dial(t, name)
	h.serves()
	if err := os.Rename(filepath.Join(dir, "hostile"), helper); err != nil {
		t.Fatal(err)
	}
	return h
}

func testBinary(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func (h *hostile) serves() {
	h.c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
}

// renew makes the next server do what the script says.
func (h *hostile) renew(t *testing.T, script []step) {
	t.Helper()
	b, err := json.Marshal(script)
	if err := errors.Join(err, os.WriteFile(filepath.Join(h.dir, scriptName), b, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(h.PID, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

func (h *hostile) awaitLog(t *testing.T, text string, times int) {
	t.Helper()
	helpertest.Eventually(t, fmt.Sprintf("it logs %q", text), func() bool {
		return strings.Count(h.Output(), text) >= times
	})
}

// settled returns the descriptors of a supervisor with one server that serves.
func (h *hostile) settled(t *testing.T) int {
	t.Helper()
	last, since := 0, time.Now()
	helpertest.Eventually(t, "the supervisor's descriptors stay as they are", func() bool {
		if n := len(helpertest.FDs(t, h.PID)); n != last {
			last, since = n, time.Now()
		}
		// A server under the race detector takes a second to end.
		return time.Since(since) > 3*time.Second
	})
	return last
}

var (
	asReady  = step{Await: 2, Send: "r", Times: 1} // hello and its configuration have come
	withConn = step{Await: 1}
)

// A server that speaks out of turn is killed, its VMs go on with the next one,
// and the supervisor has as many descriptors as before.
func TestHostileServer(t *testing.T) {
	for name, script := range map[string][]step{
		"no such message":         {asReady, withConn, {Send: "z%c", Times: 1}},
		"empty":                   {asReady, withConn, {Times: 1}},
		"ready again":             {asReady, withConn, {Send: "r", Times: 1}},
		"a filter":                {asReady, withConn, {Send: "f", Times: 1}},
		"an error":                {asReady, withConn, {Send: "etext", Times: 1}},
		"another's connection":    {asReady, withConn, {Send: "x\x07\x00\x00\x00", Times: 1}},
		"connection out of range": {asReady, withConn, {Send: "x\xff\xff\xff\xff", Times: 1}},
		"ended twice":             {asReady, withConn, {Send: "n%c", Times: 2}},
		"given back unasked":      {asReady, withConn, {Send: "b%c", Times: 1}},
		"short":                   {asReady, withConn, {Send: "x\x00\x00\x00", Times: 1}},
		"long":                    {asReady, withConn, {Send: "n%c" + strings.Repeat("x", 5000), Times: 1}},
		"descriptors":             {asReady, withConn, {Send: "n%c", FDs: 2, Times: 662}, {Send: "z", Times: 1}},
		"a descriptor":            {asReady, withConn, {Send: "n%c", FDs: 1, Times: 662}, {Send: "z", Times: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := startHostile(t, "--seccomp=none")
			before := h.settled(t)
			h.renew(t, script)
			h.awaitLog(t, "killing the server: it speaks out of turn", 1)
			h.serves()
			if now := h.settled(t); now != before {
				t.Errorf("%d descriptors before, %d after: %v", before, now, helpertest.FDs(t, h.PID))
			}
		})
	}
}

// One that speaks out of turn before it is ready does not start: the old one
// stays, and another may be tried.
func TestHostileStart(t *testing.T) {
	for name, c := range map[string]struct {
		script []step
		says   string
	}{
		"ready without a filter": {[]step{{Send: "r", Times: 1}}, "out of turn"},
		"no filter":              {[]step{{Send: "f", Times: 1}}, "out of turn"},
		"filters":                {[]step{{Send: "f", FDs: 2, Times: 662}}, "out of turn"},
		"ended":                  {[]step{{Send: "x\x00\x00\x00\x00", Times: 1}}, "out of turn"},
		"descriptors":            {[]step{{Send: "etext", FDs: 3, Times: 662}}, "out of turn"},
		"an error, and stays":    {[]step{{Send: "ebecause", Times: 1}}, "because"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := startHostile(t)
			server, before := h.Server(), h.settled(t)
			for i := range 2 {
				h.renew(t, c.script)
				h.awaitLog(t, "the new server does not start", i+1)
				h.serves()
			}
			if !h.Logged(c.says) {
				t.Errorf("does not say %q:\n%s", c.says, h.Output())
			}
			if h.Server() != server {
				t.Error("another server")
			}
			if now := h.settled(t); now != before {
				t.Errorf("%d descriptors before, %d after", before, now)
			}
		})
	}
}

// A connection that a server can't serve is closed, and makes room for another.
func TestRefusedConnection(t *testing.T) {
	t.Parallel()
	h := startHostile(t, "--seccomp=none", "--max-connections=1")
	h.renew(t, []step{asReady, withConn, {Send: "d%c", Times: 1}, {Await: 1, Exit: true}})
	h.c.WantEOF()
	h.c = helpertest.Dial(t, filepath.Join(h.dir, "s"))
	h.serves()
	if !h.Logged("the server can't serve it") {
		t.Errorf("silent:\n%s", h.Output())
	}
}

// A server dies when its process does, and not when its socket ends: another
// process may have that.
func TestDeadServerWithItsSocketElsewhere(t *testing.T) {
	for name, oldKernel := range map[string]bool{"this kernel": false, "before 6.9": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			startHostileOn(t, oldKernel, "--seccomp=none").stolen(t)
		})
	}
}

// stolen has a server die that has passed its socket to this process.
func (h *hostile) stolen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(h.dir, "thief"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.renew(t, []step{asReady, withConn, {Give: filepath.Join(h.dir, "thief"), Exit: true}})
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	if _, n, _, _, err := c.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob); err != nil || n == 0 {
		t.Fatalf("no descriptor: %v", err)
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&cmsgs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	h.serves()
}
