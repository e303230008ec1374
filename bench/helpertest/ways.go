package helpertest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Way is one way of starting our helper. The zero value is the default: a
// daemon of root that listens on a name, in namespaces.
type Way struct {
	Name       string // of the subtest
	Foreground bool   // --nodaemon
	FD         bool   // --fd, an inherited connected socket, instead of a name
	Rootless   bool   // started by someone
	Sandbox    string // --sandbox
}

// Ways are the ways in which tests run, with names such as "daemon-chroot" and
// "foreground-fd-rootless-namespace". They are six of the sixteen, which cover
// each pair of values of start, name or descriptor, user, and sandbox. With
// VIRTFS_TEST_WAYS=all they are all sixteen; a list of names separated by commas
// selects others.
var Ways = chosenWays(os.Getenv("VIRTFS_TEST_WAYS"))

var someWays = []string{
	"daemon-namespace", "foreground-namespace", "foreground-fd-chroot",
	"daemon-fd-rootless-namespace", "daemon-rootless-chroot", "foreground-rootless-namespace",
}

// chosenWays panics if the list has a name that does not exist: tests without
// the intended ways would pass.
func chosenWays(list string) []Way {
	all, names := ways(), someWays
	switch list {
	case "":
	case "all":
		return all
	default:
		names = strings.Split(list, ",")
	}
	for _, name := range names {
		if !slices.ContainsFunc(all, func(w Way) bool { return w.Name == name }) {
			panic(fmt.Sprintf("VIRTFS_TEST_WAYS: no way %q", name))
		}
	}
	return slices.DeleteFunc(all, func(w Way) bool { return !slices.Contains(names, w.Name) })
}

func ways() (all []Way) {
	for _, sandbox := range []string{"namespace", "chroot"} {
		for _, rootless := range []bool{false, true} {
			for _, fd := range []bool{false, true} {
				for _, foreground := range []bool{false, true} {
					w := Way{Foreground: foreground, FD: fd, Rootless: rootless, Sandbox: sandbox}
					w.Name = "daemon"
					if foreground {
						w.Name = "foreground"
					}
					if fd {
						w.Name += "-fd"
					}
					if rootless {
						w.Name += "-rootless"
					}
					w.Name += "-" + sandbox
					all = append(all, w)
				}
			}
		}
	}
	return all
}

// UID is the number of the user that starts the helper, and of its group.
func (w Way) UID() int {
	if w.Rootless {
		return Someone
	}
	return 0
}

// ManyVMs returns the reason why a test with more than one VM does not apply in
// a way, or "".
func ManyVMs(w Way) (reason string) {
	if w.FD {
		return "--fd serves a single VM"
	}
	return ""
}

// slots bounds the number of ways that are tested at a time.
var slots = make(chan struct{}, 2)

// EachWay runs a test in each way as parallel subtests. It leaves out the ways
// for which unless, if not nil, returns a reason. The subtests begin when the
// test function has returned, so call EachWay last. A case that KnownFaults names
// must fail.
func EachWay(t *testing.T, unless func(Way) (reason string), test func(t *testing.T, way Way)) {
	t.Helper()
	program := Ours(t)
	for _, w := range Ways {
		if unless != nil {
			if reason := unless(w); reason != "" {
				t.Logf("not as %s: %s", w.Name, reason)
				continue
			}
		}
		t.Run(w.Name, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			if f := knownFault(t.Name()); f != nil && !isCase() {
				if problem := f.expect(t, program); problem != "" {
					t.Error(problem)
				}
				return
			}
			test(t, w)
		})
	}
}

// Setup holds the options of a helper that do not depend on the way.
type Setup struct {
	// Dir is the directory for the export and the names, for example that of an
	// earlier helper. If it is empty, a new one is made.
	Dir string
	// Fill makes the content of the export. The user that starts the helper
	// becomes the owner of the export and its content.
	Fill func(t *testing.T, export string)
	// Program is the path of the helper, Ours if it is empty.
	Program string
	// Wrap is a command that executes its arguments, which start the helper.
	Wrap []string
	// Args are further options. The helper starts in Dir.
	Args []string
	Env  []string
}

// Helper is our helper, started in one of the ways. It is stopped when the test
// ends, which fails if a process of it is left then.
type Helper struct {
	// Process is the supervisor. Started by someone in the foreground, it is that
	// command instead, which ends with the supervisor's status.
	*Process
	// PID is the supervisor's process id.
	PID int

	Way     Way
	Export  string // the exported directory
	Dir     string // holds Export and the names, and nothing else
	Name    string // name of the socket, "" with FD
	PIDFile string

	only *Client // the inherited connection, until Dial has returned it
}

// Start starts a helper in this way and returns when it accepts connections.
func (w Way) Start(t *testing.T, s Setup) *Helper {
	t.Helper()
	h, c, log := w.prepare(t, s)
	// Cleanups run in the reverse order: this one finds all processes ended.
	t.Cleanup(func() {
		// A server without a supervisor ends after its last client.
		pids := With(h.PIDFile)
		for end := time.Now().Add(Patience); len(pids) > 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
			pids = With(h.PIDFile)
		}
		for _, pid := range pids {
			t.Errorf("process %d of the helper is left", pid)
			unix.Kill(pid, unix.SIGKILL)
		}
	})
	if w.Foreground {
		h.Process = Start(t, c)
		h.awaitSupervisor(t)
	} else {
		h.startDaemon(t, c, log)
	}
	return h
}

// Refused starts a helper in this way, which must fail, and returns its exit
// status and output.
func (w Way) Refused(t *testing.T, s Setup) (status int, output string) {
	t.Helper()
	_, c, _ := w.prepare(t, s)
	return Run(t, c)
}

// prepare makes the files that a helper needs, and the command that starts it.
// log is the log of a daemon, nil in the foreground.
func (w Way) prepare(t *testing.T, s Setup) (h *Helper, c Command, log *syslogFile) {
	t.Helper()
	if s.Dir == "" {
		s.Dir = ShortDir(t)
	}
	if s.Program == "" {
		s.Program = Ours(t)
	}
	h = &Helper{
		Way:     w,
		Dir:     s.Dir,
		Export:  filepath.Join(s.Dir, "export"),
		PIDFile: filepath.Join(s.Dir, "pid"),
	}
	if err := os.Mkdir(h.Export, 0o755); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	if s.Fill != nil {
		s.Fill(t, h.Export)
	}
	args := append(slices.Clone(s.Wrap), s.Program,
		"--path", h.Export, "--pidfile", h.PIDFile, "--sandbox", w.Sandbox)
	if w.Foreground {
		args = append(args, "--nodaemon")
	}
	if w.FD {
		ours, theirs := SocketPair(t)
		h.only = NewClient(t, ours)
		c.Files = []*os.File{theirs}
		args = append(args, "--fd", "3")
	} else {
		h.Name = filepath.Join(h.Dir, "socket")
		args = append(args, "--socket", h.Name)
		if !w.Rootless {
			args = append(args, "--uid", "0", "--gid", "0")
		}
	}
	args = append(args, s.Args...)
	if w.Rootless {
		giveToSomeone(t, h.Dir)
		giveTreeToSomeone(t, h.Export)
		args = AsSomeone(t, fmt.Sprintf("someone:%d:65536\n", SomeRange), args...)
	}
	if !w.Foreground {
		log = newSyslogFile(t)
		args = log.wrap(args)
	}
	c.Path, c.Args, c.Env, c.Dir = args[0], args[1:], s.Env, h.Dir
	c.Cred = &syscall.Credential{Groups: []uint32{4, 24}} // supplementary groups, as of a shell
	return h, c, log
}

// awaitSupervisor waits until the helper in the foreground accepts connections.
func (h *Helper) awaitSupervisor(t *testing.T) {
	t.Helper()
	h.leaves = h.Way.FD
	if h.Name != "" {
		AwaitName(t, h.Process, h.Name)
	}
	Eventually(t, "the helper is there", func() bool {
		if !h.Alive() {
			t.Fatalf("the helper has ended\n%s", h.Output())
		}
		h.PID = h.readPID()
		return h.PID != 0 && len(h.Servers()) == 1
	})
	if h.only == nil {
		return
	}
	// Without a name, only an answer shows that the server is ready.
	if _, err := h.only.TryDo(codec.Lstat, codec.Request{Path: Path("/")}); err != nil {
		t.Fatalf("the helper does not serve: %v\n%s", err, h.Output())
	}
}

// startDaemon runs the command, which must succeed without output, and adopts
// the supervisor that it leaves.
func (h *Helper) startDaemon(t *testing.T, c Command, log *syslogFile) {
	t.Helper()
	// The daemon becomes a child of this process. So its process id is not reused,
	// and its status can be waited for.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if status, output := Run(t, c); status != 0 || output != "" {
		t.Fatalf("the start as a daemon: status %d, %q", status, output)
	}
	h.PID = h.readPID()
	if st := statFields(h.PID); st == nil || st[3] != strconv.Itoa(os.Getpid()) {
		t.Fatalf("%s: %d is no child of this process", h.PIDFile, h.PID)
	}
	proc, err := os.FindProcess(h.PID)
	if err != nil {
		t.Fatal(err)
	}
	guard := guard(t, h.PID)
	h.Process = own(t, proc, log.file.Name())
	h.sync = log.sync
	h.leaves = h.Way.FD
	t.Cleanup(guard)
}

// guard starts a process that terminates pid if this process ends before it has
// called release.
func guard(t *testing.T, pid int) (release func()) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `read x || kill "$0"`, strconv.Itoa(pid))
	alive, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		alive.Write([]byte("\n"))
		cmd.Wait()
	}
}

// readPID returns the process id in the pidfile, 0 if it holds none yet.
func (h *Helper) readPID() int {
	b, _ := os.ReadFile(h.PIDFile)
	line, _, whole := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(line)
	if !whole || err != nil {
		return 0
	}
	return pid
}

// Dial returns a new VM. With FD there is only one, and a second call fails.
func (h *Helper) Dial() *Client {
	h.tb.Helper()
	if !h.Way.FD {
		return Dial(h.tb, h.Name)
	}
	c := h.only
	if h.only = nil; c == nil {
		h.tb.Fatal("a second VM on an inherited socket: the test needs ManyVMs")
	}
	return c
}

// Servers returns the process ids of the servers that the supervisor has now.
func (h *Helper) Servers() []int { return Children(h.PID) }

// Server returns the process id of the only server, when there is one.
func (h *Helper) Server() (pid int) {
	h.tb.Helper()
	Eventually(h.tb, "the supervisor has one server", func() bool {
		pids := h.Servers()
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

// Signal sends the supervisor a signal that may end it.
func (h *Helper) Signal(sig syscall.Signal) {
	h.tb.Helper()
	h.allowed = true
	h.Send(sig)
}

// Send sends the supervisor a signal that does not end it.
func (h *Helper) Send(sig syscall.Signal) {
	h.tb.Helper()
	if err := unix.Kill(h.PID, sig); err != nil {
		h.tb.Fatalf("signal %v: %v\n%s", sig, err, h.Output())
	}
}

// Ended reports whether a process has ended, a zombie included.
func Ended(pid int) bool {
	f := statFields(pid)
	return f == nil || f[2] == "Z" || f[2] == "X"
}
