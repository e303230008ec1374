package ops_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// identity is all of a thread that a create as somebody changes.
func identity(st map[string]string) (id [8]string) {
	for i, field := range []string{"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		id[i] = st[field]
	}
	return id
}

// owners are all that the ways into an identity and back differ by.
var owners = [][2]uint32{{0, 0}, {1000, 1000}, {1000, 0}, {0, 1000}, {none - 1, none - 1}, {none, 0}, {0, none}}

// Whatever becomes of a create, and whoever it was for, no thread keeps
// anything of it: neither ids nor sets of capabilities.
func TestIdentityIsTakenBack(t *testing.T) {
	t.Parallel()
	dir, c, p := newOurs(t)
	want(t, c, 0, lstat("/")) // so that it is confined by now
	pid := p.Server()
	root := identity(helpertest.Status(t, fmt.Sprint(pid)))
	const mask = "00000000080000db" // confine.Mask
	const nothing = "0000000000000000"
	if want := [8]string{"0\t0\t0\t0", "0\t0\t0\t0", "", nothing, mask, mask, nothing, nothing}; root != want {
		t.Fatalf("the server runs as %q, want %q", root, want)
	}
	n := 0
	for range 2 {
		for _, o := range owners {
			n++
			invalid := o[0] == none || o[1] == none
			expect := func(errno unix.Errno) unix.Errno {
				if invalid {
					return unix.EINVAL
				}
				return errno
			}
			// Free for all, another's, nobody's, anybody's.
			for _, place := range []string{"/", "/dir/", "/dir/sub/", "/empty/"} {
				want(t, c, expect(0), creates(fmt.Sprintf("%s%d", place, n), o[0], o[1])...)
			}
			want(t, c, expect(unix.EEXIST),
				create("/file", unix.O_CREAT|unix.O_EXCL, 0, o[0], o[1]), mkdir("/dir/sub", 0, o[0], o[1]))
			want(t, c, expect(unix.ENOENT), creates("/missing/", o[0], o[1])...)
			want(t, c, expect(unix.ENOTDIR), creates("/secret/", o[0], o[1])...)
			want(t, c, expect(unix.ENXIO), create("/fifo", unix.O_CREAT, 0, o[0], o[1]))
			want(t, c, expect(unix.ENAMETOOLONG), creates("/"+strings.Repeat("n", 300), o[0], o[1])...)
			for tid, st := range helpertest.Threads(t, pid) {
				if now := identity(st); now != root {
					t.Fatalf("after creates as %d:%d thread %s runs as %q, before as %q",
						int32(o[0]), int32(o[1]), tid, now, root)
				}
			}
		}
	}
	// And every capability is there to be used.
	want(t, c, 0,
		chown("/secret", 5, 5), chmod("/secret", 0o6755), mknod("/dir/sub/null", unix.S_IFCHR|0o600, 0x103, 0, 0),
		create("/secret", unix.O_RDWR, 0, 0, 0))
	if st, err := os.Stat(filepath.Join(dir, "secret")); err != nil || st.Mode() != 0o755|os.ModeSetuid|os.ModeSetgid {
		t.Errorf("secret: mode %v, %v", st.Mode(), err)
	}
}

// A guest's user makes files where his ids on the host would not let him, as
// the guest knows his other groups and the host does not. What is made is the
// same in both cases, default ACLs and setgid directories included.
func TestCreateWhereTheHostWouldNotLet(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	for _, d := range []struct {
		path string
		mode uint32
	}{{"/closed", 0o2700}, {"/open", 0o2777}} {
		want(t, c, 0,
			mkdir(d.path, d.mode, 7, 100), lsetxattr(d.path, "system.posix_acl_default", acl, len(acl), 0),
			chmod(d.path, d.mode), chown(d.path, 7, 100))
		want(t, c, 0, creates(d.path+"/", 1000, 1001)...)
		want(t, c, 0,
			create(d.path+"/sgid", unix.O_CREAT, 0o2775, 1000, 1001),
			create(d.path+"/sgid2", unix.O_CREAT, 0o2775, 1000, 100))
	}
	closed, open := look(t, dir+"/closed", epoch), look(t, dir+"/open", epoch)
	delete(closed, "")
	delete(open, "")
	if d := difference(closed, open); d != "" || len(open) != 6 {
		t.Errorf("%d files, and they differ:\n%s", len(open), d)
	}
}
