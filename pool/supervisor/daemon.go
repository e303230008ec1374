package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/ipc"
)

// Descriptors that a detached supervisor finds open.
const (
	reportFD = 3 // the pipe to whoever started it
	connFD   = 4 // the connection, if it is given one
)

// detach starts cmd as a daemon: in a session of its own, with nothing of the
// caller's but conn, if that is not nil. It returns when the daemon has called
// report.ready, or with the error that it died of.
func detach(cmd *exec.Cmd, conn *os.File) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{w}
	if conn != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, conn)
	}
	null, err := openNull()
	if err != nil {
		return err
	}
	defer null.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	report, err := io.ReadAll(r)
	switch {
	case err != nil:
		return err
	case bytes.HasPrefix(report, []byte{byte(ipc.Ready)}):
		return nil
	case bytes.HasPrefix(report, []byte{byte(ipc.Error)}):
		return errors.New(string(report[1:]))
	}
	return fmt.Errorf("the daemon died at its start: %v", cmd.Wait())
}

// report is a detached supervisor's word to whoever started it, given once.
type report struct{ pipe *os.File }

// newReport returns the report of a process that detach has started.
func newReport() (*report, error) {
	var st unix.Stat_t
	if err := unix.Fstat(reportFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, fmt.Errorf("descriptor %d is no pipe to the command: "+
			"a daemon is started by the command, and by nothing else", reportFD)
	}
	unix.CloseOnExec(reportFD)
	return &report{os.NewFile(reportFD, "report")}, nil
}

// ready says that all is well.
func (r *report) ready() error { return r.send([]byte{byte(ipc.Ready)}) }

// error says why the start failed.
func (r *report) error(err error) error {
	return r.send(append([]byte{byte(ipc.Error)}, err.Error()...))
}

func (r *report) send(msg []byte) error {
	_, err := r.pipe.Write(msg)
	return errors.Join(err, r.pipe.Close())
}
