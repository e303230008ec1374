package pool_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

var pathA = codec.Request{Path: helpertest.Path("/a")}

// processFiles are what a process opens for needs of its own, if it finds them
// below its root directory: time zone, resolver, users, cgroup, locale.
var processFiles = []string{
	"etc/localtime", "usr/share/zoneinfo/UTC", "usr/share/lib/zoneinfo/UTC", "usr/lib/locale/TZ/UTC",
	"etc/zoneinfo/UTC",
	"usr/lib/go/lib/time/zoneinfo.zip", "usr/local/go/lib/time/zoneinfo.zip", "etc/resolv.conf", "etc/hosts",
	"etc/nsswitch.conf", "etc/passwd", "etc/group", "etc/mime.types", "etc/protocols", "etc/services",
	"proc/self/cgroup", "proc/self/mountinfo", "proc/self/maps", "proc/stat", "proc/sys/net/core/somaxconn",
	"sys/fs/cgroup/cpu.max", "sys/devices/system/cpu/online", "sys/kernel/mm/transparent_hugepage/hpage_pmd_size",
	"dev/log", "dev/null", "dev/urandom", "etc/ld.so.cache", "lib/x86_64-linux-gnu/libgcc_s.so.1",
}

// fillProcessFiles is a fill with all of these: a FIFO hangs whoever opens it.
func fillProcessFiles(t *testing.T, export string) {
	t.Helper()
	fill(t, export)
	for _, name := range processFiles {
		path := filepath.Join(export, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(path, 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// leaveHalfway connects and leaves in the middle of a request.
func leaveHalfway(c *helpertest.Client) {
	c.Send([]byte("half"))
	c.Close()
}

// What the export holds is never read for the process' own needs: what the
// guests put where a program expects its files hangs nobody.
func TestExportIsNotRead(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		dir := helpertest.Tmpfs(t) // a file system of its own, to watch
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		h := way.Start(t, helpertest.Setup{Dir: dir, Fill: fillProcessFiles, Args: []string{"--log-level=debug"}})
		c := h.Dial()
		c.Want(0, codec.Lstat, pathA)
		told := func() bool { return h.Logged("client left in the middle of a request") }
		if way.FD {
			leaveHalfway(c)
			if status := h.Wait(); status != 0 || !told() {
				t.Errorf("status %d\n%s", status, h.Output())
			}
			return
		}
		servers := h.Servers()
		opened := watchOpens(t, h.Export)
		leaveHalfway(h.Dial())
		garbage := h.Dial()
		garbage.Send(bytes.Repeat([]byte("garbage!"), 2))
		garbage.WantEOF()
		helpertest.Eventually(t, "it is logged", told)
		c.Want(0, codec.Lstat, pathA)
		h.Send(syscall.SIGHUP)
		helpertest.Eventually(t, "another server", func() bool { return h.Logged("serving again") })
		c.Want(0, codec.Lstat, pathA)
		leaveHalfway(h.Dial())
		const halves = "client left in the middle of a request"
		helpertest.Eventually(t, "that is logged, too", func() bool { return h.Logged(halves + " connection=4") })
		if n := strings.Count(h.Output(), halves); n != 2 { // and none for garbage
			t.Errorf("%d lines of two clients", n)
		}
		for _, path := range opened(append(servers, h.Server())) {
			t.Errorf("a server has opened %s", path)
		}
	})
}

// watchOpens has the kernel tell which files of a directory's file system are
// opened from now on. It returns what returns the paths that processes opened.
func watchOpens(t *testing.T, dir string) func(pids []int) []string {
	t.Helper()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE,
		unix.O_RDONLY|unix.O_NONBLOCK|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		t.Logf("fanotify: %v: FIFOs alone tell that a file is opened", err)
		return func([]int) []string { return nil }
	}
	t.Cleanup(func() { unix.Close(fd) })
	err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, dir)
	if err != nil {
		t.Fatalf("fanotify: mark %s: %v", dir, err)
	}
	return func(pids []int) (paths []string) {
		b := make([]byte, 1<<16)
		for {
			n, err := unix.Read(fd, b)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return paths
			}
			for e := b[:n]; len(e) >= 24; e = e[binary.NativeEndian.Uint32(e):] {
				// struct fanotify_event_metadata: fd at 16, pid at 20.
				file, pid := int(int32(binary.NativeEndian.Uint32(e[16:]))), int(binary.NativeEndian.Uint32(e[20:]))
				path, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file))
				unix.Close(file)
				if slices.Contains(pids, pid) {
					paths = append(paths, path)
				}
			}
		}
	}
}

// stderrPipe is a pipe that a helper in the foreground has as its stderr.
type stderrPipe struct {
	t    *testing.T
	path string
	r    *os.File
}

func newStderrPipe(t *testing.T) *stderrPipe {
	t.Helper()
	p := &stderrPipe{t: t, path: filepath.Join(helpertest.ShortDir(t), "stderr")}
	err := unix.Mkfifo(p.path, 0o666)
	for _, path := range []string{p.path, filepath.Dir(p.path)} {
		if err == nil {
			err = os.Chmod(path, 0o777)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(p.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p.r = os.NewFile(uintptr(fd), "stderr")
	t.Cleanup(func() { p.r.Close() })
	return p
}

// wrap is for Setup.Wrap.
func (p *stderrPipe) wrap() []string { return []string{"sh", "-c", `exec "$@" 2>"$0"`, p.path} }

// read reads until what it has read satisfies ok.
func (p *stderrPipe) read(what string, ok func(all string) bool) string {
	p.t.Helper()
	var all []byte
	b := make([]byte, 1<<16)
	for end := time.Now().Add(helpertest.Patience); !ok(string(all)); {
		p.r.SetReadDeadline(end)
		n, err := p.r.Read(b)
		if err != nil {
			p.t.Fatalf("waited in vain: %s: %v\n%.4000s", what, err, all)
		}
		all = append(all, b[:n]...)
	}
	return string(all)
}

func inForeground(w helpertest.Way) string {
	if !w.Foreground {
		return "a daemon does not log to stderr"
	}
	return ""
}

// Whatever becomes of stderr, the VMs are served, new ones, too, a server that
// dies is replaced, and the helper ends when it is to.
func TestStderr(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, p *stderrPipe)
	}{
		{"closed", func(t *testing.T, p *stderrPipe) { p.r.Close() }},
		{"full", func(t *testing.T, p *stderrPipe) {
			fd, err := unix.Open(p.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			for err == nil || err == unix.EINTR {
				_, err = unix.Write(fd, make([]byte, 4096))
			}
			if err != unix.EAGAIN {
				t.Fatal(err)
			}
			unix.Close(fd)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			helpertest.EachWay(t, inForeground, func(t *testing.T, way helpertest.Way) {
				p := newStderrPipe(t)
				h := way.Start(t, helpertest.Setup{Fill: fill, Wrap: p.wrap(), Args: []string{"--log-level=debug"}})
				vm := h.Dial()
				vm.Want(0, codec.Lstat, pathA)
				c.do(t, p)
				for range 6000 {
					vm.Want(0, codec.Lstat, pathA)
				}
				if !way.FD {
					for range 300 {
						c := h.Dial()
						c.Want(0, codec.Lstat, pathA)
						c.Close()
					}
					leaveHalfway(h.Dial())
				}
				server := h.Server()
				unix.Kill(server, unix.SIGKILL)
				vm.Want(0, codec.Lstat, pathA)
				if h.Server() == server {
					t.Error("the server is still there")
				}
				if c.name == "full" { // and is read again
					counted := func(all string) bool { return strings.Contains(all, " lines dropped") }
					p.read("the lines that were dropped are counted", counted)
				}
				h.Signal(syscall.SIGTERM)
				if status := h.Wait(); status != 0 {
					t.Errorf("status %d", status)
				}
			})
		})
	}
}

// The journal adds the time, and gets each line's level; the start is told.
func TestJournal(t *testing.T) {
	helpertest.EachWay(t, inForeground, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Wrap: []string{"sh", "-c",
			`export JOURNAL_STREAM="$(stat -Lc %d:%i "/proc/$$/fd/2")"; exec "$@"`, "sh"}})
		h.Dial().Want(0, codec.Lstat, pathA)
		unix.Kill(h.Server(), unix.SIGKILL)
		helpertest.Eventually(t, "the death is logged", func() bool { return h.Logged("serving again") })
		form := regexp.MustCompile(`^<(6>level=INFO|4>level=WARN|3>level=ERROR) msg=`)
		for line := range strings.Lines(h.Output()) {
			if !form.MatchString(line) || strings.Contains(line, "time=") {
				t.Errorf("%q", line)
			}
		}
		if !h.Logged("<3>level=ERROR msg=\"the server died") {
			t.Errorf("no error: %s", h.Output())
		}
	})
}

// JOURNAL_STREAM is inherited by what the journal does not read.
func TestNotTheJournal(t *testing.T) {
	i := slices.IndexFunc(helpertest.Ways, func(w helpertest.Way) bool { return w.Foreground && !w.FD })
	h := helpertest.Ways[i].Start(t, helpertest.Setup{Fill: fill, Env: []string{"JOURNAL_STREAM=1:2"}})
	helpertest.Eventually(t, "there is a line", func() bool { return h.Logged("msg=started") })
	if !strings.HasPrefix(h.Output(), "time=") {
		t.Error(h.Output())
	}
}

// The log says what has been started, and of each connection, under a number of
// its own, which process it comes from. ps tells the processes apart.
func TestLogSays(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: []string{"--workers=7", "--max-connections=9"}})
		uid := 0
		if way.Rootless { // root is not in its user namespace
			uid = 65534
		}
		var want []string
		line := func(number int) string {
			return fmt.Sprintf(`level=INFO msg="client connected" export=%s connection=%d pid=%d uid=%d`,
				h.Export, number, os.Getpid(), uid)
		}
		for i := range 3 {
			c := h.Dial()
			c.Want(0, codec.Lstat, pathA)
			want = append(want, line(i+1))
			if i == 2 || way.FD {
				break
			}
			leaveHalfway(c)
			helpertest.Eventually(t, "its leaving is logged", func() bool {
				return h.Logged(fmt.Sprintf(`request connection=%d bytes=4"`, i+1)) &&
					h.Logged(fmt.Sprintf(`msg="client left" export=%s connection=%d`, h.Export, i+1))
			})
		}
		where := "socket=" + regexp.QuoteMeta(h.Name) + " max_connections=9"
		if way.FD {
			where = "fd=3"
		}
		start := regexp.MustCompile(fmt.Sprintf(
			`msg=started export=%s version=\S+ workers=7 sandbox=%s seccomp=kill readonly=false rootless=%v %s\n`,
			regexp.QuoteMeta(h.Export), way.Sandbox, way.Rootless, where))
		helpertest.Eventually(t, "the start is logged", func() bool { return start.MatchString(h.Output()) })
		for _, line := range want {
			if !h.Logged(line + "\n") {
				t.Errorf("no %s in\n%s", line, h.Output())
			}
		}
		for pid, name := range map[int]string{h.PID: "virtfs-proxy-he", h.Server(): "virtfs-server"} {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) != name+"\n" {
				t.Errorf("process %d is called %q, not %s", pid, comm, name)
			}
		}
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", h.Server()))
		if !strings.HasPrefix(string(args), "virtfs-server\x00") {
			t.Errorf("the server is %q", args)
		}
	})
}

// A stopped supervisor keeps no VM from being served, whatever the others do.
func TestStoppedSupervisor(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: []string{"--log-level=debug"}})
		vm, server := h.Dial(), h.Server()
		vm.Want(0, codec.Lstat, pathA)
		had := len(helpertest.FDs(t, h.PID))
		const clients = 600 // more than a socket holds messages
		leave := make([]*helpertest.Client, clients)
		for i := range leave {
			leave[i] = h.Dial()
			leave[i].Want(0, codec.Lstat, pathA)
		}
		h.Send(syscall.SIGSTOP)
		defer h.Send(syscall.SIGCONT)
		for _, c := range leave {
			leaveHalfway(c)
		}
		helpertest.Eventually(t, "the server has noticed", func() bool {
			vm.Want(0, codec.Lstat, pathA)
			return connections(t, server) == 1
		})
		long := codec.Request{Path: helpertest.Path("/" + strings.Repeat("./", 1000) + "a")}
		for range 2000 { // more than a pipe holds
			vm.Want(0, codec.Lstat, long)
		}
		h.Send(syscall.SIGCONT)
		helpertest.Eventually(t, "the supervisor has heard", func() bool {
			return len(helpertest.FDs(t, h.PID)) <= had
		})
		helpertest.Eventually(t, "the lines that were dropped are counted", func() bool {
			vm.Want(0, codec.Lstat, pathA)
			return h.Logged(" lines dropped")
		})
	})
}

// connections returns how many sockets a server has, but that to its supervisor.
func connections(t *testing.T, server int) (n int) {
	t.Helper()
	for _, to := range helpertest.FDs(t, server) {
		if strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n - 1
}

// A server has pipes of its own and nothing of its supervisor's stderr. Whatever
// it writes there is bounded, quoted, marked, and a warning at most.
func TestServersLog(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		c.Want(0, codec.Lstat, pathA)
		server := h.Server()
		stderr := helpertest.FDs(t, h.PID)[2]
		for fd, to := range helpertest.FDs(t, server) {
			pipe := strings.HasPrefix(to, "pipe:")
			if to == stderr && to != os.DevNull || pipe != (fd == 1 || fd == 2) {
				t.Errorf("descriptor %d of the server is %s", fd, to)
			}
		}
		before := helpertest.RSS(t, h.PID)
		for fd := 1; fd <= 2; fd++ {
			pipe, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", server, fd), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(pipe, "Eforged %d\n\x1b[2Jtime=2020-01-01T00:00:00Z level=ERROR msg=evil\n", fd)
			for range 64 { // no end of the line
				if _, err := pipe.Write(bytes.Repeat([]byte("x"), 1<<20)); err != nil {
					t.Fatal(err)
				}
			}
			fmt.Fprint(pipe, "\n")
			for range 3000 {
				fmt.Fprint(pipe, "Eflood\n")
			}
			pipe.Close()
		}
		mark := fmt.Sprintf("server=%d\n", server)
		helpertest.Eventually(t, "all is read", func() bool { return strings.Count(h.Output(), "too many lines") > 0 })
		for line := range strings.Lines(h.Output()) {
			if strings.Contains(line, "level=ERROR ") && !strings.Contains(line, `level=ERROR msg=evil"`) {
				t.Errorf("an error: %.200q", line)
			}
			said := regexp.MustCompile("forged|evil|xxx|flood").MatchString(line)
			if said && (!strings.Contains(line, "level=WARN msg=") || !strings.HasSuffix(line, mark)) {
				t.Errorf("not marked, or no warning: %.200q", line)
			}
			if len(line) > 9000 || strings.Contains(line, "\x1b") {
				t.Errorf("%d bytes: %.200q", len(line), line)
			}
		}
		if n := strings.Count(h.Output(), "flood"); n > 1000 {
			t.Errorf("%d lines of a flood", n)
		}
		if grown := helpertest.RSS(t, h.PID) - before; grown > helpertest.MemoryFactor*(32<<20) {
			t.Errorf("the supervisor grew by %d KiB", grown>>10)
		}
		c.Want(0, codec.Lstat, pathA)
	})
}

// Clients that come with garbage again and again fill no disk.
func TestGarbageLog(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		const clients = 3000
		for range clients {
			c := h.Dial()
			c.Send([]byte("garbage!"))
			c.WantEOF()
			c.Close()
		}
		h.Dial().Want(0, codec.Lstat, pathA)
		helpertest.Eventually(t, "what was left out is counted", func() bool {
			for _, message := range []string{
				`of="client connected" count=`,
				`of=\"connection closed: not the proxy protocol\" count=`,
			} {
				if !h.Logged(message) {
					return false
				}
			}
			return true
		})
		if n := len(h.Output()); n > 500*clients/3 {
			t.Errorf("%d bytes", n)
		}
	})
}

// A debug line has the request's path and connection, not those of others.
func TestDebugLines(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		dir := helpertest.Tmpfs(t) // which has no versions of inodes
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		h := way.Start(t, helpertest.Setup{Dir: dir, Fill: fill, Args: []string{"--log-level=debug"}})
		one, two := h.Dial(), h.Dial()
		one.Want(0, codec.Lstat, pathA)
		two.Want(unix.ENOENT, codec.Lstat, codec.Request{Path: helpertest.Path("/secret")})
		one.Do(codec.GetVersion, codec.Request{Path: helpertest.Path("/././b")})
		short := frame(codec.Lstat, "/cut off")
		binary.NativeEndian.PutUint32(short[4:], 4) // bytes of the payload
		one.Send(short[:codec.HeaderSize+4])
		if a := one.Read(codec.Lstat); a.Errno != unix.ENOBUFS {
			t.Error(a.Errno)
		}
		one.Want(0, codec.Symlink, codec.Request{Path: helpertest.Path("/d"), Target: helpertest.Path("target")})
		one.Want(0, codec.Rename, codec.Request{Path: helpertest.Path("/d"), NewPath: helpertest.Path("/e")})
		helpertest.Eventually(t, "the last is logged", func() bool { return h.Logged("RENAME") })
		number := regexp.MustCompile(`msg="LSTAT connection=(\d+) path=/a"`).FindStringSubmatch(h.Output())
		if number == nil {
			t.Fatal(h.Output())
		}
		own, _ := strconv.Atoi(number[1])
		for _, want := range []string{
			fmt.Sprintf(`msg="LSTAT connection=%d errno=ENOENT path=/secret"`, 3-own),
			fmt.Sprintf(`msg="GETVERSION connection=%d path=/././b"`, own),
			fmt.Sprintf(`msg="LSTAT connection=%d errno=ENOBUFS"`, own),
			fmt.Sprintf(`msg="SYMLINK connection=%d path=/d target=target"`, own),
			fmt.Sprintf(`msg="RENAME connection=%d path=/d newpath=/e"`, own),
		} {
			if !h.Logged(want) {
				t.Errorf("no %s in\n%s", want, h.Output())
			}
		}
		if h.Logged(`\x00`) {
			t.Errorf("a NUL: %s", h.Output())
		}
	})
}
