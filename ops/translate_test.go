package ops_test

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// newTranslating starts our helper on a new tree, which the guest sees by
// these options.
func newTranslating(t *testing.T, options string) (dir string, c *helpertest.Client) {
	t.Helper()
	dir = t.TempDir()
	makeTree(t, dir)
	_, c = helpertest.Pair(t, helpertest.Ours(t), dir, strings.Fields(options)...)
	return dir, c
}

// wantOwner fails unless a file belongs to these ids, on the host and as the
// guest is told.
func wantOwner(t *testing.T, dir string, c *helpertest.Client, path string, host, guest [2]uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, path), &st); err != nil || st.Uid != host[0] || st.Gid != host[1] {
		t.Errorf("%s: the host's %d:%d, want %v, %v", path, st.Uid, st.Gid, host, err)
	}
	a := ask(t, c, lstat(path))
	if a.Errno != 0 || u32(a.Payload[28:]) != guest[0] || u32(a.Payload[32:]) != guest[1] {
		t.Errorf("%s: the guest is told %x, %v, want %v", path, a.Payload[28:36], a.Errno, guest)
	}
}

func TestTranslate(t *testing.T) {
	t.Parallel()
	dir, c := newTranslating(t, "--translate-uid map:0:100000:65536 --translate-gid map:0:200000:1000 "+
		"--translate-gid squash-guest:1000:42:1000 --translate-gid squash-host:42:1999:1")
	for i, owner := range []struct{ asked, host, told [2]uint32 }{
		{[2]uint32{0, 0}, [2]uint32{100000, 200000}, [2]uint32{0, 0}},
		{[2]uint32{1000, 999}, [2]uint32{101000, 200999}, [2]uint32{1000, 999}},
		{[2]uint32{1000, 1000}, [2]uint32{101000, 42}, [2]uint32{1000, 1999}},
		{[2]uint32{70000, 2000}, [2]uint32{70000, 2000}, [2]uint32{70000, 2000}},
	} {
		for _, s := range creates("/"+string(rune('a'+i)), owner.asked[0], owner.asked[1]) {
			want(t, c, 0, s)
			wantOwner(t, dir, c, string(s.q.Path), owner.host, owner.told)
		}
		want(t, c, 0, chown("/file", owner.asked[0], owner.asked[1]))
		wantOwner(t, dir, c, "/file", owner.host, owner.told)
		want(t, c, 0, chown("/file", none, none))
		wantOwner(t, dir, c, "/file", owner.host, owner.told)
	}
	// The guest's root is somebody on the host. So he makes no devices.
	want(t, c, unix.EPERM, mknod("/device", unix.S_IFCHR|0o600, 0x103, 0, 0))
	want(t, c, unix.EINVAL, creates("/x", none, 0)...)
	// What the host's root has, stays his in the guest's eyes, too.
	wantOwner(t, dir, c, "/secret", [2]uint32{0, 0}, [2]uint32{0, 0})
}

// The ids that the guest may not use are told by the request that has them.
func TestTranslateForbidden(t *testing.T) {
	t.Parallel()
	dir, c := newTranslating(t, "--translate-uid forbid-guest:0:1000 --translate-gid forbid-guest:0:1000")
	for _, owner := range [][2]uint32{{0, 0}, {0, 1000}, {1000, 0}, {999, 999}} {
		want(t, c, unix.EPERM, creates("/x", owner[0], owner[1])...)
		want(t, c, unix.EPERM, chown("/file", owner[0], owner[1]))
	}
	want(t, c, unix.EPERM, chown("/file", 0, none), chown("/file", none, 999), create("/file", unix.O_RDONLY, 0, 0, 0))
	want(t, c, 0, chown("/file", none, 1001), open("/file", unix.O_RDWR), chmod("/file", 0o600))
	want(t, c, 0, creates("/x", 1000, 1000)...)
	wantOwner(t, dir, c, "/file", [2]uint32{1000, 1001}, [2]uint32{1000, 1001})
	wantOwner(t, dir, c, "/xcreate", [2]uint32{1000, 1000}, [2]uint32{1000, 1000})
}

// An identity that is the host's root is so by translation only.
func TestTranslateToRoot(t *testing.T) {
	t.Parallel()
	dir, c := newTranslating(t, "--translate-uid map:1000:0:1 --translate-gid map:1000:0:1 "+
		"--translate-uid guest:0:1000:1 --translate-gid guest:0:1000:1")
	want(t, c, 0,
		mknod("/device", unix.S_IFCHR|0o600, 0x103, 1000, 1000), create("/made", unix.O_CREAT, 0o600, 1000, 1000))
	want(t, c, unix.EPERM, mknod("/device2", unix.S_IFCHR|0o600, 0x103, 0, 0))
	wantOwner(t, dir, c, "/made", [2]uint32{0, 0}, [2]uint32{1000, 1000})
}

// POSIX ACLs have ids in them.
func TestTranslateACL(t *testing.T) {
	t.Parallel()
	dir, c := newTranslating(t, "--translate-uid map:1001:101001:1 --translate-gid map:7:200007:1 "+
		"--translate-uid forbid-guest:5:1")
	withUser := func(id string) string { return strings.Replace(acl, "\xe9\x03\x00\x00", id, 1) }
	if withUser("") == acl {
		t.Fatal("acl names no user 1001")
	}
	onHost := withUser("\x89\x8a\x01\x00") // 101001
	withGroup := func(id string) string { return acl[:28] + "\x08\x00\x04\x00" + id + acl[28:] }
	for _, a := range []struct{ path, name, guest, host string }{
		{"/file", "system.posix_acl_access", acl, onHost},
		{"/dir", "system.posix_acl_default", acl, onHost},
		{"/big", "system.posix_acl_access", withGroup("\x07\x00\x00\x00"),
			onHost[:28] + "\x08\x00\x04\x00\x47\x0d\x03\x00" + onHost[28:]},
		{"/file", "user.acl", acl, acl},
	} {
		want(t, c, 0, lsetxattr(a.path, a.name, a.guest, len(a.guest), 0))
		if got := string(getXattr(t, filepath.Join(dir, a.path), a.name)); got != a.host {
			t.Errorf("%s %s: the host has %x, want %x", a.path, a.name, got, a.host)
		}
		for _, size := range []int{len(a.guest), 65536} {
			if got := ask(t, c, lgetxattr(a.path, a.name, size)); got.Errno != 0 || string(got.Payload[2:]) != a.guest {
				t.Errorf("%s %s: the guest is told %x, %v, want %x", a.path, a.name, got.Payload, got.Errno, a.guest)
			}
		}
		if got := ask(t, c, lgetxattr(a.path, a.name, 0)); got.Errno != 0 || u32(got.Payload) != uint32(len(a.guest)) {
			t.Errorf("%s %s: %x, %v", a.path, a.name, got.Payload, got.Errno)
		}
	}
	forbidden := withUser("\x05\x00\x00\x00")
	want(t, c, unix.EPERM, lsetxattr("/file", "system.posix_acl_access", forbidden, len(forbidden), 0))
	want(t, c, 0, lsetxattr("/file", "user.acl", forbidden, len(forbidden), 0))
	want(t, c, unix.EINVAL,
		lsetxattr("/file", "system.posix_acl_access", "bad", 3, 0),
		lsetxattr("/file", "system.posix_acl_access", acl[:10], 10, 0),
		lsetxattr("/file", "system.posix_acl_access", acl, 5, 0))
}
