// Package keeper is the process outside the export. It owns the socket's name
// and accepts connections; each goes to the server, the confined process that
// serves requests. The keeper reads nothing that a guest sends.
//
//	keeper.go    the keeper's life: start the server, accept, stop
//	name.go      the socket's name: claimed, put back, given up
//	control.go   the socket pair between keeper and server
//	daemon.go    detached from the caller, who is told how the start went
package keeper

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"virtfs-proxy-helper/ops/confine"
)

// StopTime is how long requests in work may take after SIGTERM.
const StopTime = 10 * time.Second

// Config is what a keeper is to do.
type Config struct {
	Socket   string   // name to accept connections on, owned by
	UID, GID int      // or
	Conn     *os.File // the only connection
	PIDFile  string   // "" for none

	Server *exec.Cmd // starts a server, which calls Serve
	Log    *slog.Logger
	Ready  func() error // called when connections are taken
}

// Run keeps a server until it leaves by itself or a signal ends it. An error
// before Ready is one of starting.
func (c *Config) Run() error {
	stop := make(chan os.Signal, 2)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)

	var name *Name
	if c.Socket != "" {
		var err error
		if name, err = Claim(c.Socket, c.UID, c.GID); err != nil {
			return err
		}
		defer name.Release()
	}
	if c.PIDFile != "" {
		if err := writePIDFile(c.PIDFile); err != nil {
			return err
		}
		defer os.Remove(c.PIDFile)
	}
	control, exited, err := c.startServer()
	if err != nil {
		return err
	}
	// The control stays open: accept may be sending, and the process ends.
	defer control.SendStop() // whatever the reason, unless the server is gone
	accepted := make(chan error, 1)
	if name != nil {
		if err := name.Publish(c.Log); err != nil {
			return err
		}
		go func() { accepted <- accept(name.Listener, control, c.Log) }()
	} else {
		if err := control.SendConn(int(c.Conn.Fd())); err != nil {
			return fmt.Errorf("pass the connection to the server: %w", err)
		}
		c.Conn.Close()
	}
	// What is left to do is making and removing names.
	if err := confine.Drop(cap.DAC_OVERRIDE, cap.FOWNER); err != nil {
		return err
	}
	if err := c.Ready(); err != nil {
		return fmt.Errorf("whoever started this is gone: %w", err)
	}

	select {
	case err := <-exited:
		if err != nil {
			return fmt.Errorf("the server died: %w", err)
		}
		return nil
	case err := <-accepted:
		return fmt.Errorf("%s: accept: %w", c.Socket, err)
	case sig := <-stop:
		c.Log.Info("stopping: requests in work are answered", "signal", sig.String())
		if name != nil {
			name.Release()
		}
		return c.stopServer(control, exited, stop)
	}
}

// startServer starts the server and waits until it can serve.
func (c *Config) startServer() (*Control, <-chan error, error) {
	control, theirs, err := newControl()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	c.Server.ExtraFiles = []*os.File{theirs}
	// A ^C at the terminal is the keeper's alone.
	c.Server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := startPatient(c.Server); err != nil {
		control.Close()
		return nil, nil, fmt.Errorf("start the server: %w", err)
	}
	theirs.Close()
	exited := make(chan error, 1)
	go func() { exited <- c.Server.Wait() }()
	if err := control.awaitReady(); err != nil {
		control.Close()
		status := <-exited
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the server died at its start: %v", status)
		}
		return nil, nil, err
	}
	return control, exited, nil
}

// startPatient starts a process whose timers may be late by timerSlack. A Go
// process that does a little work now and then otherwise spends most of its
// time in the runtime's monitor thread, which looks around every 20 µs for a
// millisecond each time: 30 times the CPU of a request. What the monitor is
// for, threads that are stuck in a system call, the server has spare
// processors for. The slack is a thread's, and its children inherit it.
func startPatient(cmd *exec.Cmd) error {
	const timerSlack = 50 * time.Millisecond
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack.Nanoseconds()), 0, 0, 0); err != nil {
		return err
	}
	defer unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) // as it was
	return cmd.Start()
}

// stopServer lets the server answer what is in work. A second signal, or time,
// ends the patience.
func (c *Config) stopServer(control *Control, exited <-chan error, stop <-chan os.Signal) error {
	control.SendStop()
	select {
	case err := <-exited:
		return err
	case <-stop:
	case <-time.After(StopTime + time.Second):
	}
	c.Server.Process.Kill()
	<-exited
	return errors.New("stopped with requests in work")
}

// accept passes connections on until the listener is shut down.
func accept(listener int, control *Control, log *slog.Logger) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			err = control.SendConn(fd)
			unix.Close(fd)
			if err != nil {
				log.Error("connection lost on its way to the server", "error", err)
			}
		case unix.EINTR, unix.ECONNABORTED:
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			// The client waits in the backlog until there is room again.
			log.Warn("can't accept a connection yet", "error", err)
			time.Sleep(100 * time.Millisecond)
		case unix.EINVAL: // Release has shut the listener down
			return nil
		default:
			return err
		}
	}
}

func writePIDFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	return nil
}
