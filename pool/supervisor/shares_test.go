package supervisor_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// dialEnv has this program be a client of the socket that it names: TestMain.
const dialEnv = "VIRTFS_TEST_DIAL"

// dialer asks once, says that it was answered, and stays until its input ends.
func dialer(name string) {
	conn, err := net.Dial("unix", name)
	if err == nil {
		q := codec.Request{Path: helpertest.Path("/")}
		_, err = conn.Write(q.Append(nil, codec.Lstat))
	}
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, codec.HeaderSize+codec.StatSize))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("answered")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// dialFromElsewhere connects from a process of its own, and waits for an answer.
func dialFromElsewhere(t *testing.T, name string) (leave func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), dialEnv+"="+name)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(helpertest.Patience, func() { cmd.Process.Kill() })
	leave = func() { in.Close(); cmd.Wait(); late.Stop() }
	t.Cleanup(leave)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "answered\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return leave
}

// One client takes as many places as it can: others find one all the same, and its
// own connections are served once there is room again.
func TestLastPlaces(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Args: []string{"--max-connections=8"}})
		var greedy []*helpertest.Client
		for range 6 {
			c := h.Dial()
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
			greedy = append(greedy, c)
		}
		q := codec.Request{Path: helpertest.Path("/")}
		late := [2]*helpertest.Client{h.Dial(), h.Dial()}
		for _, c := range late {
			c.Send(q.Append(nil, codec.Lstat))
		}
		refused := h.Dial()
		refused.WantEOF()
		leave := dialFromElsewhere(t, h.Name)
		dialFromElsewhere(t, h.Name)
		for _, c := range late {
			if err := c.Silent(50 * time.Millisecond); err != nil {
				t.Errorf("one that has six is served a seventh: %v", err)
			}
		}
		leave()
		greedy[0].Close()
		for i, c := range late { // each time a third place is free
			greedy[1+i].Close()
			if a := c.Read(codec.Lstat); a.Errno != 0 {
				t.Error(a.Errno)
			}
			greedy[5].Want(0, codec.Lstat, q)
		}
		if !h.Logged("the last places are for VMs that have none") || !h.Logged("connection refused") {
			t.Errorf("the log does not tell:\n%s", h.Output())
		}
	})
}
