package supervisor_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// environ returns the environment of a process.
func environ(t *testing.T, pid int) (env []string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	for v := range bytes.SplitSeq(b, []byte{0}) {
		if len(v) > 0 {
			env = append(env, string(v))
		}
	}
	return env
}

const (
	role     = "VIRTFS_PROXY_HELPER_ROLE="
	rootless = "VIRTFS_PROXY_HELPER_ROOTLESS="
)

// callers are variables that a caller may set; of these the processes keep the
// last ones at most, which are systemd's.
var callers = []string{"SECRET=of the caller", "GODEBUG=gctrace=1,schedtrace=1", "GOGC=off",
	"GOTRACEBACK=crash", "TZ=Asia/Tokyo",
	"GNET_LOGGING_LEVEL=3", "LD_PRELOAD=/nowhere", "=", "nonsense", rootless + "0",
	"NOTIFY_SOCKET=/nowhere", "JOURNAL_STREAM=1:2"}

// In the foreground supervisor and server have an environment of this program's
// making, the former in the process that the caller has started, with its
// descriptors.
func TestForegroundEnvironment(t *testing.T) {
	t.Parallel()
	ours, theirs := helpertest.SocketPair(t)
	p := helpertest.Start(t, helpertest.Command{
		Path: helpertest.Ours(t), Files: []*os.File{theirs}, Env: callers,
		Args: []string{"-n", "-p", t.TempDir(), "-f", "3"},
	})
	c := helpertest.NewClient(t, ours)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	if env := environ(t, p.PID); !slices.Equal(env, []string{"NOTIFY_SOCKET=/nowhere", "JOURNAL_STREAM=1:2"}) {
		t.Errorf("the supervisor's environment is %q", env)
	}
	if env := environ(t, p.Server()); len(env) != 1 || !strings.HasPrefix(env[0], role) {
		t.Errorf("the server's environment is %q", env)
	}
	c.Close()
	if status := p.Wait(); status != 0 {
		t.Errorf("status %d\n%s", status, p.Output())
	}
}

// As a daemon, likewise.
func TestDaemonEnvironment(t *testing.T) {
	t.Parallel()
	dir := helpertest.ShortDir(t)
	status, out := helpertest.Run(t, helpertest.Command{Path: helpertest.Ours(t), Dir: dir, Env: callers,
		Args: []string{"-p", t.TempDir(), "-s", "s", "-u", "0", "-g", "0", "--pidfile", "pid"}})
	if status != 0 {
		t.Fatalf("status %d, %q", status, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		syscall.Kill(pid, syscall.SIGTERM)
		helpertest.Eventually(t, "the daemon ends", func() bool {
			_, err := os.Stat(filepath.Join(dir, "pid"))
			return errors.Is(err, os.ErrNotExist)
		})
	}()
	helpertest.Dial(t, filepath.Join(dir, "s")).Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	pids := append(helpertest.Children(pid), pid)
	if len(pids) != 2 {
		t.Fatalf("processes %v", pids)
	}
	for _, pid := range pids {
		if env := environ(t, pid); len(env) != 1 || !strings.HasPrefix(env[0], role) {
			t.Errorf("the environment of %d is %q", pid, env)
		}
	}
}

// An ordinary user's, too: the command in its user namespace and the server.
func TestRootlessEnvironment(t *testing.T) {
	helpertest.NeedRoot(t)
	t.Parallel()
	dir, export := helpertest.ShortDir(t), helpertest.ShortDir(t)
	for _, d := range []string{dir, export} {
		if err := os.Chown(d, helpertest.Someone, helpertest.Someone); err != nil {
			t.Fatal(err)
		}
	}
	id := strconv.Itoa(helpertest.Someone)
	args := helpertest.WithSomeone(t, "someone:700000:65536\n", "setpriv", "--pdeathsig", "TERM",
		"--reuid", id, "--regid", id, "--clear-groups", "--",
		helpertest.Ours(t), "-n", "-p", export, "-s", filepath.Join(dir, "s"), "--pidfile", filepath.Join(dir, "pid"))
	env := slices.Concat(callers[:5], callers[10:]) // without those that setpriv itself ends by
	p := helpertest.Start(t, helpertest.Command{Path: "/usr/bin/" + args[0], Args: args[1:], Env: env})
	helpertest.AwaitName(t, p, filepath.Join(dir, "s"))
	if p.Logged("for others EPERM") {
		t.Errorf("has not found newuidmap:\n%s", p.Output())
	}
	b, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	supervisor, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	pids := append(helpertest.Children(supervisor), supervisor)
	if len(pids) != 2 {
		t.Fatalf("processes %v", pids)
	}
	for _, pid := range pids {
		for _, v := range environ(t, pid) {
			if !strings.HasPrefix(v, role) && !strings.HasPrefix(v, rootless) &&
				(pid != supervisor || v != "NOTIFY_SOCKET=/nowhere" && v != "JOURNAL_STREAM=1:2") {
				t.Errorf("process %d has %q", pid, v)
			}
		}
	}
	for _, v := range environ(t, p.PID) {
		if !strings.HasPrefix(v, "PATH=") && v != "NOTIFY_SOCKET=/nowhere" && v != "JOURNAL_STREAM=1:2" {
			t.Errorf("the command has %q", v)
		}
	}
}

// A role in the environment, with arguments and descriptors of the caller's
// choice, serves nothing.
func TestRoleAlone(t *testing.T) {
	dir := t.TempDir()
	args := []string{"-n", "-p", dir, "-f", "3"}
	pair := func(kind int) []*os.File {
		fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[0]) })
		if kind == unix.SOCK_SEQPACKET { // what a supervisor would say
			config := fmt.Appendf(nil, `C{"Path":%q,"Sandbox":{"Sandbox":"none","Seccomp":"none"},"Workers":1}`, dir)
			if err := unix.Sendmsg(fds[0], config, nil, nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		return []*os.File{os.NewFile(uintptr(fds[1]), "theirs")}
	}
	for name, c := range map[string]struct {
		env   []string
		files []*os.File
		user  uint32 // that the helper runs as
		says  string
	}{
		"server":            {[]string{role + "server"}, nil, 0, "supervisor"},
		"server, stream":    {[]string{role + "server"}, pair(unix.SOCK_STREAM), 0, "supervisor"},
		"server, another's": {[]string{role + "server"}, pair(unix.SOCK_SEQPACKET), helpertest.Someone, "supervisor"},
		"unknown":           {[]string{role + "root"}, nil, 0, "no such role"},
		"supervisor":        {[]string{role + "supervisor"}, pair(unix.SOCK_STREAM), 0, "daemon"},
		"rootless":          {[]string{role + "rootless", rootless + "4294967299"}, nil, 0, "ROOTLESS"},
		"with more":         {[]string{role + "supervisor", "SECRET=x"}, nil, 0, "environment"},
	} {
		t.Run(name, func(t *testing.T) {
			// Of the caller's environment nothing is left here.
			env := append([]string{"-i"}, c.env...)
			helper := helpertest.Ours(t)
			p := helpertest.Command{Path: "/usr/bin/env", Args: append(append(env, helper), args...), Files: c.files}
			if c.user != 0 {
				p.Cred = &syscall.Credential{Uid: c.user, Gid: c.user}
			}
			status, out := helpertest.Run(t, p)
			if status != 1 || !strings.Contains(out, c.says) || strings.Count(out, "\n") != 1 {
				t.Errorf("status %d, %q, want one line with %q", status, out, c.says)
			}
		})
	}
}

// A copy with a set-user-ID or set-group-ID bit, or with capabilities, serves
// nothing in any role.
func TestPrivilegedCopy(t *testing.T) {
	dir := helpertest.ShortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(helpertest.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	// VFS_CAP_REVISION_2 with the effective bit: CAP_DAC_OVERRIDE
	capability := []byte{1, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	for name, prepare := range map[string]func(path string) error{
		"setuid":       func(path string) error { return unix.Chmod(path, 0o4755) },
		"setgid":       func(path string) error { return unix.Chmod(path, 0o2755) },
		"capabilities": func(path string) error { return unix.Setxattr(path, "security.capability", capability, 0) },
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, program, 0o755), prepare(path)); err != nil {
			t.Fatal(err)
		}
		for _, env := range [][]string{
			nil, {role + "server"}, {role + "supervisor"}, {role + "rootless", rootless + "0"},
		} {
			args := append(append([]string{"-i"}, env...), path)
			status, out := helpertest.Run(t, helpertest.Command{
				Path: "/usr/bin/env",
				Args: append(args, "-n", "-p", "/root", "-s", "/tmp/never", "-u", "1", "-g", "1"),
				Cred: &syscall.Credential{Uid: helpertest.Someone, Gid: helpertest.Someone},
			})
			if status != 1 || !strings.Contains(out, "privileges") {
				t.Errorf("%s, %q: status %d, %q", name, env, status, out)
			}
		}
	}
}
