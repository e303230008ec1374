package supervisor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// startLimited starts our helper under a limit, in the notation of prlimit(1),
// which it can't raise.
func startLimited(t *testing.T, limit string, options ...string) (*helpertest.Process, string) {
	t.Helper()
	helpertest.NeedRoot(t)
	helpertest.NeedProgram(t, "setpriv", "util-linux")
	dir := helpertest.ShortDir(t)
	if err := os.WriteFile(filepath.Join(dir, "a"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(helpertest.ShortDir(t), "s")
	p := helpertest.Start(t, helpertest.Command{Path: "/usr/bin/prlimit", Args: append([]string{
		limit, "setpriv", "--bounding-set", "-sys_resource",
		helpertest.Ours(t), "-n", "-p", dir, "-s", name, "-u", "0", "-g", "0",
	}, options...)})
	helpertest.AwaitName(t, p, name)
	return p, name
}

// Clients may not take the descriptors that it takes to start a server, nor
// those of requests in work.
func TestFewDescriptors(t *testing.T) {
	for _, hard := range []int{256, 1024} {
		t.Run(strconv.Itoa(hard), func(t *testing.T) {
			p, name := startLimited(t, fmt.Sprintf("--nofile=%d", hard))
			said := regexp.MustCompile(`connections=(\d+) asked=1024`).FindAllStringSubmatch(p.Output(), -1)
			if len(said) != 1 {
				t.Fatalf("does not say once how many clients are allowed:\n%s", p.Output())
			}
			n, err := strconv.Atoi(said[0][1])
			if err != nil || n < hard/8 || n >= hard {
				t.Fatalf("of %d descriptors: %d clients, %v", hard, n, err)
			}
			lstat := codec.Request{Path: helpertest.Path("/a")}
			var clients []*helpertest.Client
			for range n - n/4 {
				c := helpertest.Dial(t, name)
				c.Want(0, codec.Lstat, lstat)
				clients = append(clients, c)
			}
			var others []func() // who have the last quarter
			for range n / 4 {
				if len(others) < 16 { // each is a process
					others = append(others, dialFromElsewhere(t, name))
				}
			}
			late := helpertest.Dial(t, name)
			late.Send(lstat.Append(nil, codec.Lstat))
			if err := late.Silent(100 * time.Millisecond); err != nil {
				t.Errorf("a further client is served: %v", err)
			}
			for range 3 {
				old := p.Server()
				if err := unix.Kill(old, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				for _, c := range clients {
					c.Want(0, codec.Lstat, lstat)
				}
			}
			// Requests in work at once have room, whatever their clients do.
			for _, c := range clients {
				c.Send(lstat.Append(nil, codec.Open))
			}
			for _, c := range clients {
				a := c.Read(codec.Open)
				if a.Errno != 0 {
					t.Fatalf("OPEN: %v", a.Errno)
				}
				a.File.Close()
			}
			for _, leave := range others {
				leave()
			}
			clients[0].Close()
			if a := late.Read(codec.Lstat); a.Errno != 0 {
				t.Error(a.Errno)
			}
		})
	}
}

// With too few descriptors for a single client it does not start.
func TestNoDescriptors(t *testing.T) {
	helpertest.NeedRoot(t)
	dir, names := helpertest.ShortDir(t), helpertest.ShortDir(t)
	status, out := helpertest.Run(t, helpertest.Command{Path: "/usr/bin/prlimit", Args: []string{
		"--nofile=64", "setpriv", "--bounding-set", "-sys_resource",
		helpertest.Ours(t), "-n", "-p", dir, "-s", filepath.Join(names, "s"), "-u", "0", "-g", "0",
	}})
	if status != 1 || !strings.Contains(out, "LimitNOFILE") {
		t.Errorf("status %d, %q", status, out)
	}
}

// A limit of processes is looked at where the kernel holds to it: not for root.
func TestFewThreads(t *testing.T) {
	helpertest.NeedRoot(t)
	const limit = "--nproc=900"
	dir, names := helpertest.ShortDir(t), helpertest.ShortDir(t)
	for _, d := range []string{dir, names} {
		if err := os.Chown(d, helpertest.Someone, helpertest.Someone); err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Join(names, "s")
	for options, warns := range map[string]bool{"--workers=1024": true, "--workers=256": false} {
		args := helpertest.AsSomeone(t, "", "prlimit", limit,
			helpertest.Ours(t), "-n", "-p", dir, "-s", name, options)
		p := helpertest.Start(t, helpertest.Command{Path: args[0], Args: args[1:]})
		helpertest.AwaitName(t, p, name)
		if p.Logged("900 threads are allowed") != warns || p.Logged("ulimit -u") != warns {
			t.Errorf("%s:\n%s", options, p.Output())
		}
		p.Signal(unix.SIGTERM)
		p.Wait()
	}
	if p, _ := startLimited(t, limit); p.Logged("ulimit -u") {
		t.Errorf("root:\n%s", p.Output())
	}
	// With map: the server is not root.
	p := helpertest.Start(t, helpertest.Command{Path: "/usr/bin/prlimit", Args: []string{
		limit, helpertest.Ours(t), "-n", "-p", dir, "-s", name, "-u", "0", "-g", "0",
		"--workers=1024", fmt.Sprintf("--translate-uid=map:0:%d:1", helpertest.Someone),
	}})
	helpertest.AwaitName(t, p, name)
	helpertest.Eventually(t, "the warning", func() bool { return p.Logged("ulimit -u") })
}
