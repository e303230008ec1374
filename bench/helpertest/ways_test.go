package helpertest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"virtfs-proxy-helper/codec"
)

func TestMain(m *testing.M) { Main(m) }

// What a test relies on in each way: who is who, where the log goes, what
// status the helper ends with, and that nothing is left.
func TestEachWay(t *testing.T) {
	EachWay(t, nil, func(t *testing.T, way Way) {
		h := way.Start(t, Setup{Fill: func(t *testing.T, export string) {
			if err := os.WriteFile(filepath.Join(export, "file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}})
		c := h.Dial()
		c.Want(0, codec.Open, codec.Request{Path: Path("/file")}).File.Close()
		server := h.Server()
		for pid, parent := range map[int]int{h.PID: os.Getpid(), server: h.PID} {
			if pid == h.PID && way.Rootless && way.Foreground {
				parent = h.Process.PID
			}
			if children := Children(parent); !slices.Contains(children, pid) {
				t.Errorf("%d is not among %v", pid, children)
			}
		}
		if session, _ := Session(t, h.PID); (session == h.PID) == way.Foreground {
			t.Errorf("the supervisor %d has session %d", h.PID, session)
		}
		if got := Status(t, strconv.Itoa(h.PID))["Uid"] != "0\t0\t0\t0"; got != way.Rootless {
			t.Errorf("rootless: %v", got)
		}
		if !h.Logged("client connected") {
			t.Errorf("not in the log: %q", h.Output())
		}
		if way.FD {
			c.Close()
		} else {
			h.Signal(syscall.SIGTERM)
		}
		if status := h.Wait(); status != 0 {
			t.Errorf("status %d", status)
		}
		if !h.Logged("stopping") || strings.Contains(h.Output(), syncMark) {
			t.Errorf("the last word is not in the log: %q", h.Output())
		}
		if !Ended(h.PID) || !Ended(server) {
			t.Error("the helper has ended, but not all of it")
		}
	})
}

// VIRTFS_TEST_WAYS selects ways, and an unknown one is not left out in silence.
func TestChosenWays(t *testing.T) {
	for list, want := range map[string]int{"": len(someWays), "all": 16, "daemon-chroot,foreground-namespace": 2} {
		if got := len(chosenWays(list)); got != want {
			t.Errorf("%q: %d ways, want %d", list, got, want)
		}
	}
	for _, list := range []string{"daemon", "daemon-chroot,", "daemon-chroot, daemon-namespace"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%q is accepted", list)
				}
			}()
			chosenWays(list)
		}()
	}
}

// A daemon ends with the test process, however that ends.
func TestKilledTest(t *testing.T) {
	if isCase() {
		h := Way{Sandbox: "namespace"}.Start(t, Setup{})
		fmt.Println(h.PIDFile)
		select {}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestKilledTest$")
	cmd.Env = append(os.Environ(), caseEnv+"=1", "HELPER="+Ours(t), "TMPDIR="+ShortDir(t))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	pidfile := strings.TrimSpace(line)
	if err != nil {
		t.Fatalf("%v, %q: no daemon", err, line)
	}
	var servers []int
	Eventually(t, "there are a supervisor and its server", func() bool {
		supervisors := With(pidfile)
		if len(supervisors) == 1 {
			servers = Children(supervisors[0])
		}
		return len(servers) == 1
	})
	cmd.Process.Kill()
	Eventually(t, "the daemon ends", func() bool { return len(With(pidfile)) == 0 && Ended(servers[0]) })
}
