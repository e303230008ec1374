package sandbox_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// startInUserNamespace starts our helper of dir as root of a new user namespace,
// in the test's mount namespace, as LXD and Incus do: the same words on its
// command line, the connection as descriptor 3.
func startInUserNamespace(t *testing.T, dir, setgroups string) (*helpertest.Process, *helpertest.Client) {
	t.Helper()
	helpertest.NeedProgram(t, "setpriv", "util-linux")
	ours, theirs := helpertest.SocketPair(t)
	groups := map[string]string{"allow": "--clear-groups", "deny": "--keep-groups"}[setgroups]
	// Capabilities come with the namespace; root is there once the test has mapped it.
	const awaitRoot = `until grep -q . /proc/self/uid_map; do sleep 0.05; done; exec "$@"`
	p := helpertest.Start(t, helpertest.Command{
		Path: "/usr/bin/unshare",
		Args: []string{"--user", "--keep-caps", "sh", "-c", awaitRoot, "sh",
			"setpriv", "--reuid", "0", "--regid", "0", groups, "--inh-caps=-all", "--ambient-caps=-all",
			helpertest.Ours(t), "--nodaemon", "--fd", "3", "--path", dir},
		Files: []*os.File{theirs},
	})
	mine, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	helpertest.Eventually(t, "a user namespace", func() bool {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", p.PID))
		return err == nil && its != mine
	})
	for _, write := range [][2]string{
		{"setgroups", setgroups},
		{"gid_map", fmt.Sprintf("0 %d 65536", someRange)},
		{"uid_map", fmt.Sprintf("0 %d 65536", someRange)},
	} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", p.PID, write[0]), []byte(write[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	return p, helpertest.NewClient(t, ours)
}

// Root of a user namespace that does not own its mount namespace.
func TestLauncherInUserNamespace(t *testing.T) {
	t.Parallel()
	for _, setgroups := range []string{"allow", "deny"} {
		t.Run("setgroups "+setgroups, func(t *testing.T) {
			t.Parallel()
			dir := export(t)
			if err := os.Chown(dir, someRange, someRange); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
				t.Fatal(err)
			}
			p, c := startInUserNamespace(t, dir, setgroups)
			for _, id := range []uint32{0, 1000} {
				for _, name := range makeAll(t, c, id, 0) {
					want := [2]uint32{someRange + id, someRange + id}
					if got := owner(t, filepath.Join(dir, name)); got != want {
						t.Errorf("%s is of %v on the host, not %v", name, got, want)
					}
				}
			}
			server := p.Server()
			if got := own(t, server, p.PID); !slices.Equal(got, namespaces) {
				t.Errorf("the server has only %v of its own", got)
			}
			if points, _ := mountpoints(t, server); !slices.Equal(points, []string{"/"}) {
				t.Errorf("the server has mounts at %v", points)
			}
			for pid, want := range map[int]capSets{
				p.PID:  {CapPrm: namespace, CapEff: names, CapBnd: namespace},
				server: {CapPrm: seven, CapEff: seven},
			} {
				for _, st := range helpertest.Threads(t, pid) {
					if got := threadCaps(t, st); got != want || st["NoNewPrivs"] != "1" || st["Seccomp"] != "2" {
						t.Errorf("%s: %x, want %x; NoNewPrivs %s, Seccomp %s", st["Name"], got, want, st["NoNewPrivs"], st["Seccomp"])
					}
				}
			}
			if err := unix.Kill(server, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			c.Want(0, codec.Lstat, request("/", 0)) // by another server
			c.Close()
			if status := p.Wait(); status != 0 {
				t.Errorf("status %d\n%s", status, p.Output())
			}
		})
	}
}
