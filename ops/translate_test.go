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

// newTranslating starts our helper on a new tree, which the guest sees by these
// options. The root directory and three entries of it get the owner.
func newTranslating(t *testing.T, owner [2]int, options string) (
	dir string, c *helpertest.Client, p *helpertest.Process,
) {
	t.Helper()
	dir = t.TempDir()
	makeTree(t, dir)
	for _, name := range []string{"", "file", "dir", "big"} {
		if err := os.Chown(filepath.Join(dir, name), owner[0], owner[1]); err != nil {
			t.Fatal(err)
		}
	}
	p, c = helpertest.Pair(t, helpertest.Ours(t), dir, strings.Fields(options)...)
	return dir, c, p
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
	dir, c, _ := newTranslating(t, [2]int{100000, 200000},
		"--translate-uid map:0:100000:65536 --translate-gid map:0:200000:1000 "+
			"--translate-gid squash-guest:1000:200042:1000 --translate-gid squash-host:200042:1999:1")
	for i, owner := range []struct{ asked, host, told [2]uint32 }{
		{[2]uint32{0, 0}, [2]uint32{100000, 200000}, [2]uint32{0, 0}},
		{[2]uint32{1000, 999}, [2]uint32{101000, 200999}, [2]uint32{1000, 999}},
		{[2]uint32{1000, 1000}, [2]uint32{101000, 200042}, [2]uint32{1000, 1999}},
		{[2]uint32{0, 42}, [2]uint32{100000, 200042}, [2]uint32{0, 1999}},
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
	// The guest's root is somebody on the host, and makes no devices.
	want(t, c, unix.EPERM, mknod("/device", unix.S_IFCHR|0o600, 0x103, 0, 0))
	want(t, c, unix.EINVAL, creates("/x", none, 0)...)
	for _, outside := range [][2]uint32{{70000, 0}, {0, 2000}} {
		want(t, c, unix.EPERM, creates("/x", outside[0], outside[1])...)
		want(t, c, unix.EPERM, chown("/file", outside[0], outside[1]))
	}
	wantOwner(t, dir, c, "/secret", [2]uint32{0, 0}, [2]uint32{overflow, overflow})
}

// Without map: the host's ids are the guest's, and its root can do all.
func TestTranslateWithoutMap(t *testing.T) {
	t.Parallel()
	dir, c, _ := newTranslating(t, [2]int{0, 0},
		"--translate-uid squash-guest:1000:7:10 --translate-gid guest:1000:8:10")
	want(t, c, 0, creates("/x", 1009, 1009)...)
	wantOwner(t, dir, c, "/xmkdir", [2]uint32{7, 17}, [2]uint32{7, 17})
	want(t, c, 0, mknod("/device", unix.S_IFCHR|0o600, 0x103, 0, 0), chmod("/secret", 0o6755))
}

// With map: for users alone the host's groups are the guest's, and the other way round.
func TestTranslateOneKind(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		option string
		host   [2]uint32
	}{
		{"--translate-uid map:0:100000:100", [2]uint32{100005, 5}},
		{"--translate-gid map:0:100000:100", [2]uint32{5, 100005}},
	} {
		dir, c, _ := newTranslating(t, [2]int{int(one.host[0]), int(one.host[1])}, one.option)
		want(t, c, 0, creates("/dir/x", 5, 5)...)
		wantOwner(t, dir, c, "/dir/xmkdir", one.host, [2]uint32{5, 5})
		want(t, c, unix.EPERM, creates("/dir/y", 100, 100)...)
		want(t, c, unix.EPERM, mknod("/dir/device", unix.S_IFCHR|0o600, 0x103, 5, 5))
	}
}

// The ids that the guest may not use are told by the request that has them.
func TestTranslateForbidden(t *testing.T) {
	t.Parallel()
	dir, c, _ := newTranslating(t, [2]int{1000, 1000},
		"--translate-uid forbid-guest:0:1000 --translate-gid forbid-guest:0:1000")
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

// Where no MAP has the guest's root there is none, and the server is somebody else,
// also on threads that have made files.
func TestTranslateWithoutRoot(t *testing.T) {
	t.Parallel()
	dir, c, p := newTranslating(t, [2]int{1000, 1001},
		"--translate-uid map:1000:1000:3 --translate-gid map:1001:1001:3")
	of := [2]uint32{1000, 1001}
	want(t, c, 0, open("/opened", unix.O_CREAT|unix.O_RDWR))
	wantOwner(t, dir, c, "/opened", of, of)
	server := p.Server()
	before := identity(helpertest.Status(t, fmt.Sprint(server)))
	const mask = "00000000080000db" // sandbox.Mask
	if before[0] != "1000\t1000\t1000\t1000" || before[1] != "1001\t1001\t1001\t1001" || before[2] != "" ||
		before[4] != mask || before[5] != mask {
		t.Fatalf("the server runs as %q", before)
	}
	for i, o := range [][2]uint32{of, {1000, 1002}, {1001, 1001}, {1002, 1003}} {
		for _, s := range creates(fmt.Sprintf("/dir/%d", i), o[0], o[1]) {
			want(t, c, 0, s)
			wantOwner(t, dir, c, string(s.q.Path), o, o)
		}
		// A user of the guest has not what its root has.
		name := fmt.Sprintf("/dir/sgid%d", i)
		want(t, c, 0, mkdir(name, 0o777, of[0], 1003), chmod(name, 0o2777),
			create(name+"/file", unix.O_CREAT, 0o2775, o[0], o[1]))
		st, err := os.Stat(filepath.Join(dir, name, "file"))
		if want := o[1] == 1003; err != nil || (st.Mode()&os.ModeSetgid != 0) != want {
			t.Errorf("made as %v in a directory of group 1003: mode %v, %v", o, st.Mode(), err)
		}
		want(t, c, 0, chown("/opened", o[0], o[1]), chmod("/opened", 0o600), chown("/opened", of[0], of[1]))
	}
	// Where the owner's rights on the host do not let it.
	want(t, c, 0, mkdir("/dir/closed", 0o700, 1002, 1002))
	want(t, c, 0, creates("/dir/closed/", of[0], of[1])...)
	for _, outside := range [][2]uint32{{0, 0}, {0, 1001}, {1000, 0}, {1003, 1001}, {1000, 1004}} {
		want(t, c, unix.EPERM, creates("/dir/x", outside[0], outside[1])...)
		want(t, c, unix.EPERM, chown("/opened", outside[0], outside[1]))
	}
	for tid, st := range helpertest.Threads(t, server) {
		if now := identity(st); now != before {
			t.Errorf("thread %s runs as %q, before as %q", tid, now, before)
		}
	}
}

// The host's root may be a user of the guest, which makes no devices all the same.
func TestTranslateToRoot(t *testing.T) {
	t.Parallel()
	dir, c, _ := newTranslating(t, [2]int{0, 0}, "--translate-uid map:5:7:1 --translate-gid map:5:7:1 "+
		"--translate-uid map:1000:0:1 --translate-gid map:1000:0:1 "+
		"--translate-uid guest:0:0:1 --translate-gid guest:0:0:1")
	for name, id := range map[string]uint32{"/user": 1000, "/root": 0} {
		want(t, c, 0, create(name, unix.O_CREAT, 0o600, id, id))
		wantOwner(t, dir, c, name, [2]uint32{0, 0}, [2]uint32{1000, 1000})
		want(t, c, unix.EPERM, mknod("/device", unix.S_IFCHR|0o600, 0x103, id, id))
	}
	want(t, c, 0, chown("/user", 5, 5), chmod("/secret", 0o600))
	wantOwner(t, dir, c, "/user", [2]uint32{7, 7}, [2]uint32{5, 5})
}

// POSIX ACLs have ids in them.
func TestTranslateACL(t *testing.T) {
	t.Parallel()
	dir, c, _ := newTranslating(t, [2]int{100000, 200000}, "--translate-uid map:0:100000:1500 "+
		"--translate-gid map:0:200000:100 --translate-uid guest:2000:100007:1 --translate-uid forbid-guest:5:1")
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
	translated := withUser("\xd0\x07\x00\x00") // 2000
	want(t, c, 0, lsetxattr("/dir", "system.posix_acl_access", translated, len(translated), 0))
	if got := string(getXattr(t, dir+"/dir", "system.posix_acl_access")); got != withUser("\xa7\x86\x01\x00") {
		t.Errorf("the host has %x, not user 100007", got)
	}
	forbidden, outside := withUser("\x05\x00\x00\x00"), withUser("\xdc\x05\x00\x00") // 5, 1500
	for _, value := range []string{forbidden, outside} {
		want(t, c, unix.EPERM, lsetxattr("/file", "system.posix_acl_access", value, len(value), 0))
	}
	want(t, c, 0, lsetxattr("/file", "user.acl", forbidden, len(forbidden), 0))
	want(t, c, unix.EINVAL,
		lsetxattr("/file", "system.posix_acl_access", "bad", 3, 0),
		lsetxattr("/file", "system.posix_acl_access", acl[:10], 10, 0),
		lsetxattr("/file", "system.posix_acl_access", acl, 5, 0))
}
