package keeper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// server is a server process.
type server struct {
	cmd     *exec.Cmd
	control *Control
	began   time.Time
	stopped bool // told to leave
}

func (s *server) pid() int { return s.cmd.Process.Pid }

// end asks the server to leave, and does not wait until it hears.
func (s *server) end(how kind) {
	s.stopped = true
	go s.control.send(how, nil, nil, 0)
}

// startServer starts a server and waits until it can serve.
func (k *keeper) startServer(program *os.File) (*server, error) {
	cmd := k.Server(fmt.Sprintf("/proc/self/fd/%d", programFD))
	control, theirs, err := newControl()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd.ExtraFiles = []*os.File{theirs, k.journal, program} // ControlFD and so on
	cmd.Stdout = k.Output()
	cmd.Stderr = cmd.Stdout
	// A ^C at the terminal is the keeper's alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := k.Confine.Start(cmd, k.Export); err != nil {
		control.Close()
		return nil, fmt.Errorf("start the server: %w", err)
	}
	theirs.Close()
	// One that hangs would keep all others from being started.
	late := time.AfterFunc(StartTime, func() { cmd.Process.Kill() })
	err = control.awaitReady()
	if !late.Stop() {
		err = fmt.Errorf("the server was not ready within %v", StartTime)
	}
	if err != nil {
		control.Close()
		status := cmd.Wait()
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the server died at its start: %v", status)
		}
		return nil, err
	}
	return &server{cmd: cmd, control: control, began: time.Now()}, nil
}

// watch passes on what a server says and, after its last word, that it has
// ended. No thread of it runs any more then.
func (k *keeper) watch(s *server) {
	go func() {
		for {
			m, err := s.control.recv()
			if err != nil {
				break
			}
			k.events <- told{s, m}
		}
		k.events <- ended{s, s.cmd.Wait()}
	}()
}
