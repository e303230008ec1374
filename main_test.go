package main

import (
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"virtfs-proxy-helper/ops/sandbox"
)

func TestOptions(t *testing.T) {
	const socket = "-p /srv -s /run/s -u 1000 -g 1001"
	for args, says := range map[string]string{
		"":                                    "no directory to export",
		"-p /srv":                             "nowhere to serve",
		"-p /srv -f 3 -s x":                   "contradict each other",
		"-p /srv -f -2":                       "not a descriptor",
		"-p /srv -f x":                        "invalid argument",
		"-p /srv --socket= -u 0 -g 0":         "the name is empty",
		"-p /srv -s x -u -1 -g 0":             "not a user id",
		"-p /srv -s x -u 0 -g 4294967295":     "not a group id",
		socket + " more":                      `unexpected argument "more"`,
		socket + " --more":                    "unknown flag: --more",
		socket + " --workers 0":               "not within 1 to 1024",
		socket + " --workers 1025":            "not within 1 to 1024",
		socket + " --max-connections 0":       "not within 1 to 65536",
		socket + " --max-connections 65537":   "not within 1 to 65536",
		socket + " --sandbox jail":            "not one of namespace, chroot, none",
		socket + " --seccomp trap":            "not one of kill, log, none",
		socket + " --log-level loud":          "not one of debug, info, warn, error",
		socket + " --translate-uid map:1:2":   "--translate-uid",
		socket + " --translate-gid guest:a:b": "--translate-gid",
		socket + " --translate-uid map:0:9:1 --translate-uid guest:1:0:1":       "--translate-uid: the host's id 0",
		socket + " --translate-gid squash-host:0:9:1 --translate-gid map:0:9:1": "--translate-gid: the host's id 0",
	} {
		if _, err := parseOptions(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v, want %q", args, err, says)
		}
	}

	o, err := parseOptions(strings.Fields(socket))
	if err != nil {
		t.Fatal(err)
	}
	if o.Path != "/srv" || o.Socket != "/run/s" || o.UID != 1000 || o.GID != 1001 || o.FD != -1 || o.nodaemon {
		t.Errorf("%q: %+v", socket, o)
	}
	if o.Sandbox.Sandbox != sandbox.SandboxNamespace || o.Sandbox.Seccomp != sandbox.SeccompKill || o.Sandbox.ReadOnly {
		t.Errorf("%q: confined by %+v", socket, o.Sandbox)
	}
	const more = "-n -p /srv -f 3 --readonly --pidfile pid --log-level warn --workers 1024"
	if o, err = parseOptions(strings.Fields(more)); err != nil {
		t.Fatal(err)
	}
	if !o.nodaemon || o.FD != 3 || o.Workers != 1024 || o.LogLevel != slog.LevelWarn {
		t.Errorf("%q: %+v", more, o)
	}
	if !o.Server.FS.ReadOnly || !o.Server.Sandbox.ReadOnly || o.Server.Workers != 1024 {
		t.Errorf("%q: %+v", more, o)
	}
	if !filepath.IsAbs(o.PIDFile) {
		t.Errorf("%q: the pidfile is %q, which a change of directory moves", more, o.PIDFile)
	}
}

// Options that print something end the command with success.
func TestOptionsThatPrint(t *testing.T) {
	for _, arg := range []string{"--help", "-h", "--version"} {
		if _, err := parseOptions([]string{arg}); !errors.Is(err, errDone) {
			t.Errorf("%s: %v, want %v", arg, err, errDone)
		}
	}
}
