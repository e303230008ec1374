package supervisor

import (
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/logging"
)

// mine is the connection of the server under test, other is another server's.
const mine, other, none = 3, 4, 5

// message is one that a server sends: its bytes and how many descriptors.
type message struct {
	bytes string
	fds   int
}

var hello = message{string([]byte{byte(ipc.Hello), ipc.Version}), 0}

func about(k ipc.Kind, id uint32) string {
	return string(binary.NativeEndian.AppendUint32([]byte{byte(k)}, id))
}

// allowed are all messages that a server may send, by its state.
var allowed = map[state][]message{
	starting: {hello, {"e", 0}, {"etext", 0}},
	greeted:  {{"f", 1}, {"e", 0}, {"etext", 0}},
	confined: {{"r", 0}, {"e", 0}, {"etext", 0}},
	serving:  {{about('x', mine), 0}, {about('n', mine), 0}, {about('d', mine), 0}},
	handingOver: {{about('x', mine), 0}, {about('n', mine), 0}, {about('d', mine), 0},
		{about('b', mine), 0}},
	stopping: {{about('x', mine), 0}, {about('n', mine), 0}, {about('d', mine), 0}},
}

// tried are messages of every kind, known or not, in every shape.
func tried() (list []message) {
	shapes := []string{"", strings.Repeat("x", 5000), hello.bytes}
	for k := range 256 {
		shapes = append(shapes, string([]byte{byte(k)}))
	}
	for _, k := range "vpCcshferxbndzX" {
		kind := string(k)
		shapes = append(shapes, kind+"abc", kind+"abcde",
			kind+strings.Repeat("x", 4095), kind+strings.Repeat("x", 4096),
			about(ipc.Kind(k), mine), about(ipc.Kind(k), other), about(ipc.Kind(k), none),
			about(ipc.Kind(k), ^uint32(0)))
	}
	for _, shape := range shapes {
		list = append(list, message{shape, 0}, message{shape, 1}, message{shape, 2}, message{shape, 253})
	}
	return list
}

func (m message) send(t *testing.T, fd int) {
	t.Helper()
	var oob []byte
	if m.fds > 0 {
		null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(null)
		fds := make([]int, m.fds)
		for i := range fds {
			fds[i] = null
		}
		oob = unix.UnixRights(fds...)
	}
	// An empty one with descriptors goes as a byte.
	if err := unix.Sendmsg(fd, []byte(m.bytes), oob, nil, 0); err != nil {
		t.Fatal(err)
	}
}

func isAllowed(s state, m message) bool {
	for _, a := range allowed[s] {
		if a == m || m.fds == 0 && s <= confined && strings.HasPrefix(m.bytes, "e") && len(m.bytes) <= 4096 {
			return true
		}
	}
	return false
}

// Each message in each state of a server: what is not allowed kills the server,
// and no descriptor that has come with it stays open.
func TestTable(t *testing.T) {
	for s, name := range map[state]string{
		starting: "starting", greeted: "greeted", confined: "confined", serving: "serving",
		handingOver: "handing over", stopping: "stopping",
	} {
		t.Run(name, func(t *testing.T) {
			count := openFDs(t)
			for _, m := range tried() {
				killed, open := deliver(t, s, m)
				if want := !isAllowed(s, m); killed != want {
					t.Errorf("%.10q (%d bytes) with %d descriptors: killed %v, want %v",
						m.bytes, len(m.bytes), m.fds, killed, want)
				}
				if open != 0 {
					t.Errorf("%.10q (%d bytes): leaves %d descriptors open", m.bytes, len(m.bytes), open)
				}
			}
			if now := openFDs(t); now != count {
				t.Errorf("%d descriptors open before, %d after", count, now)
			}
		})
	}
}

// deliver has a server in state s send m to its supervisor.
func deliver(t *testing.T, s state, m message) (killed bool, open int) {
	t.Helper()
	control, theirs, err := ipc.New()
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	defer theirs.Close()
	srv := &server{cmd: &exec.Cmd{}, control: control, state: s}
	// Nothing has this number: it can't be killed, only found dead.
	if srv.cmd.Process, err = os.FindProcess(1 << 29); err != nil {
		t.Fatal(err)
	}
	sv := &supervisor{conns: map[uint32]*conn{}, room: make(chan struct{}, 8)}
	sv.log = &logging.Log{Logger: slog.New(slog.DiscardHandler)}
	sv.room <- struct{}{}
	sv.conns[mine], sv.conns[other] = &conn{fd: -1, server: srv, sharer: new(sharer)}, &conn{fd: -1, server: &server{}}
	m.send(t, int(theirs.Fd()))
	before := openFDs(t)
	if s > confined {
		got, err := control.Recv(0)
		if err != nil {
			t.Fatalf("%.10q: %v", m.bytes, err)
		}
		sv.onChildMessage(srv, got)
		return srv.state == condemned, openFDs(t) - before
	}
	theirs.Close()
	before--
	sv.Sandbox.Seccomp = sandbox.SeccompKill
	err = sv.awaitReady(srv)
	if s == greeted && srv.state == confined {
		for end := time.Now().Add(time.Minute); openFDs(t) > before && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // Supervise closes what is no filter
		}
	}
	// Nothing tells an empty message from the end, once that has come.
	killed = err == io.EOF && m.bytes == "" || err != nil && strings.Contains(err.Error(), "out of turn")
	return killed, openFDs(t) - before
}

func openFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A second filter, and readiness without one, are out of turn as well; a server
// of another version, or without one, is none.
func TestOrderOfStart(t *testing.T) {
	for _, c := range []struct {
		seccomp sandbox.Seccomp
		says    []message
		ready   bool
	}{
		{sandbox.SeccompKill, []message{hello, {"f", 1}, {"r", 0}}, true},
		{sandbox.SeccompKill, []message{hello, {"r", 0}}, false},
		{sandbox.SeccompKill, []message{hello, {"f", 1}, {"f", 1}}, false},
		{sandbox.SeccompKill, []message{hello, hello, {"f", 1}, {"r", 0}}, false},
		{sandbox.SeccompKill, []message{{"f", 1}, {"r", 0}}, false},
		{sandbox.SeccompKill, []message{{"v\xff", 0}, {"f", 1}, {"r", 0}}, false},
		{sandbox.SeccompNone, []message{hello, {"r", 0}}, true},
		{sandbox.SeccompNone, []message{hello, {"f", 1}, {"r", 0}}, false},
		{sandbox.SeccompNone, []message{{"r", 0}}, false},
	} {
		t.Run(fmt.Sprint(c.seccomp, c.says), func(t *testing.T) {
			control, theirs, err := ipc.New()
			if err != nil {
				t.Fatal(err)
			}
			defer control.Close()
			defer theirs.Close()
			for _, m := range c.says {
				m.send(t, int(theirs.Fd()))
			}
			srv := &server{cmd: &exec.Cmd{}, control: control}
			sv := &supervisor{Config: Config{Sandbox: sandbox.Config{Seccomp: c.seccomp}}}
			err = sv.awaitReady(srv)
			if (err == nil) != c.ready {
				t.Errorf("%v, want ready %v", err, c.ready)
			}
		})
	}
}
