package pool_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/progress"
)

// startServer starts a server as its supervisor, which the test is.
// startServer starts a server as the supervisor would that says hello, or nothing,
// and config.
func startServer(t *testing.T, hello []byte, config any) (*exec.Cmd, *ipc.Control) {
	t.Helper()
	control, theirs, err := ipc.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	memory, err := inflight.Create(4)
	if err != nil {
		t.Fatal(err)
	}
	shared, err := progress.Create(4)
	if err != nil {
		t.Fatal(err)
	}
	open := func(path string) *os.File {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), path)
	}
	program, root := open(helpertest.Ours(t)), open(export(t))
	if hello != nil {
		err = control.Send(ipc.Hello, hello, nil, 0)
	}
	if err := errors.Join(err, control.SendConfig(config)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program.Name())
	cmd.Env, cmd.Stderr = []string{"VIRTFS_PROXY_HELPER_ROLE=server"}, os.Stderr
	files := ipc.Files{Control: theirs, Inflight: memory, Progress: shared, Program: program}
	cmd.ExtraFiles = append(files.Extra(), root)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	late := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	t.Cleanup(func() { late.Stop(); cmd.Process.Kill(); cmd.Wait() })
	return cmd, control
}

func recv(t *testing.T, control *ipc.Control, want ipc.Kind) ipc.Message {
	t.Helper()
	m, err := control.Recv(0)
	if err != nil || m.Kind != want {
		t.Fatalf("message %q %q, %v, want %q", byte(m.Kind), m.Body, err, byte(want))
	}
	return m
}

func config() pool.Config {
	return pool.Config{Sandbox: sandbox.Config{Sandbox: sandbox.SandboxNone, Seccomp: sandbox.SeccompNone}, Workers: 4}
}

// The supervisor is told of a connection that the server can't take, and the
// server goes on with others.
func TestRefusedByTheServer(t *testing.T) {
	cmd, control := startServer(t, helloOne, config())
	recv(t, control, ipc.Hello)
	recv(t, control, ipc.Ready)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := control.SendNewConn(ipc.NewConn{ID: 1}, int(r.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	if id, _ := recv(t, control, ipc.Refused).Conn(); id != 1 {
		t.Errorf("connection %d refused, want 1", id)
	}
	ours, theirs := helpertest.SocketPair(t)
	if err := control.SendNewConn(ipc.NewConn{ID: 1}, int(theirs.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	c := helpertest.NewClient(t, ours)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	c.Close()
	if id, _ := recv(t, control, ipc.Ended).Conn(); id != 1 {
		t.Errorf("connection %d ended, want 1", id)
	}
	if err := control.Send(ipc.Stop, nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// helloOne is the hello to server number 1.
var helloOne = binary.NativeEndian.AppendUint32([]byte{ipc.Version}, 1)

// A server of another version, or without its configuration, says so instead of
// serving.
func TestNoServer(t *testing.T) {
	for name, c := range map[string]struct {
		hello  []byte
		config any
	}{
		"older supervisor": {nil, config()},
		"newer supervisor": {[]byte{ipc.Version + 1, 0, 0, 0, 0}, config()},
		"no configuration": {helloOne, "x"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd, control := startServer(t, c.hello, c.config)
			if bytes.Equal(c.hello, helloOne) {
				recv(t, control, ipc.Hello)
			}
			if m := recv(t, control, ipc.Error); len(m.Body) == 0 {
				t.Error("says nothing")
			}
			if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
				t.Error(err)
			}
		})
	}
}
