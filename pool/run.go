package pool

import (
	"fmt"
	"log/slog"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/logging"
	"virtfs-proxy-helper/pool/progress"
)

// Config is what a server process is to do. The supervisor sends it.
type Config struct {
	LogLevel slog.Level
	FS       ops.Options
	Sandbox  sandbox.Config
	Workers  int // connections that are served at once
	// NoBusyPoll has no worker ask again and again for the next request.
	NoBusyPoll bool
}

// Run is the server process. It gets from the supervisor what it is to do, and
// its connections, and ends when told to; or, should the supervisor be gone,
// with its last client.
func Run() error {
	// They are the supervisor's; systemd sends them to all processes of a service.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	control, err := ipc.InheritedControl()
	if err != nil {
		return err
	}
	number, err := control.AwaitHello()
	if err != nil {
		control.SendError(err)
		return err
	}
	cfg := &Config{}
	if err := control.RecvConfig(cfg); err != nil {
		control.SendError(err)
		return err
	}
	log := logging.ForServer(cfg.LogLevel)
	defer logging.FlushServer(log)
	ipc.NameProcess(ipc.ServerName)
	gone := newOutbox(func(n goneConn) error { return control.SendGone(n.id, n.ended) })
	server, err := cfg.enter(control, number, gone, log)
	if err != nil {
		control.SendError(err)
		return logging.Told{Err: err}
	}
	if err := control.SendReady(); err != nil {
		return err
	}
	handOver, err := control.Serve(func(fd int, n ipc.NewConn) error {
		err := server.Add(fd, n)
		if err != nil {
			log.Error("connection refused", "connection", n.Number, "error", err)
		}
		return err
	}, server.Ping)
	switch {
	case err != nil:
		log.Error("the supervisor died: serving on until the last client has left", "error", err)
		<-server.Empty()
	case handOver:
		<-server.HandOver()
	default:
		select {
		case <-server.Drain():
		case <-time.After(ipc.StopTime):
			log.Warn("stopped with connections that were not answered",
				"connections", server.Serving())
		}
	}
	gone.flush()
	return nil
}

// enter sandboxes this process and returns what serves its connections.
func (cfg *Config) enter(
	control *ipc.Control, number uint32, gone *outbox[goneConn], log *slog.Logger,
) (*Server, error) {
	memory, shared := ipc.Inherited()
	defer memory.Close()
	defer shared.Close()
	j, err := inflight.Map(memory)
	if err != nil {
		return nil, err
	}
	p, err := progress.Map(shared)
	if err != nil {
		return nil, err
	}
	if cfg.FS.Sysctls, err = ops.ReadSysctls(); err != nil {
		return nil, err
	}
	inside, err := cfg.Sandbox.Enter(ipc.ExportFD, log)
	if err != nil {
		return nil, err
	}
	if inside.Violations != nil {
		if err := control.SendFilter(inside.Violations); err != nil {
			return nil, fmt.Errorf("send the filter: %w", err)
		}
		inside.Violations.Close()
	}
	cfg.FS.NoDevices = cfg.Sandbox.Sandbox == sandbox.SandboxNamespace
	fs, err := ops.New(inside.FDs, cfg.FS, log)
	if err != nil {
		return nil, err
	}
	closed := func(id uint32, ended bool) { gone.put(goneConn{id, ended}) }
	return NewServer(fs, Memories{j, p, number}, cfg, closed, log)
}
