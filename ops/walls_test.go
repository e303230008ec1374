package ops_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// The MAP of these tests gives the guest's ids 0 to mapCount-1 to the host's from
// mapFirst on. "Host's" is the view of the helper's starter: someone's first id is
// its own, the others are from its range.
const mapFirst, mapCount = 1000, 5000

// mappedID returns the number that the guest's id has for the test.
func mappedID(way helpertest.Way, id uint32) uint32 {
	if way.Rootless {
		return helpertest.SomeRange + mapFirst - 1 + id
	}
	return mapFirst + id
}

// startMapped starts a helper with that MAP. In the export of the starter are
//
//	in/              of the guest's root, mode 0755
//	in/FILE, FILE    of the starter, with the modes of outsideFiles
//	sgid/, sticky/   of the starter, modes 02777 and 01777; with a FILE
func startMapped(t *testing.T, way helpertest.Way) *helpertest.Helper {
	t.Helper()
	h := way.Start(t, helpertest.Setup{
		Fill: func(t *testing.T, export string) {
			for dir, mode := range map[string]uint32{"in": 0o755, "sgid": 0o2777, "sticky": 0o1777, "": 0o755} {
				dir = filepath.Join(export, dir)
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				for _, name := range outsideFiles {
					path := filepath.Join(dir, name)
					if err := os.WriteFile(path, []byte("outside"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if err := unix.Chmod(dir, mode); err != nil {
					t.Fatal(err)
				}
			}
		},
		Args: []string{
			"--translate-uid", fmt.Sprintf("map:0:%d:%d", mapFirst, mapCount),
			"--translate-gid", fmt.Sprintf("map:0:%d:%d", mapFirst, mapCount),
		},
	})
	root := int(mappedID(way, 0))
	if err := os.Chown(filepath.Join(h.Export, "in"), root, root); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(h.Export, func(path string, e fs.DirEntry, err error) error {
		mode := uint32(0o644)
		if e.Name() == "open" {
			mode = 0o666
		}
		if err == nil && e.Type().IsRegular() {
			err = unix.Chmod(path, mode)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var outsideFiles = []string{"readable", "open"} // modes 0644 and 0666

// wantWalls fails if a file of an id outside the MAP has got another mode or
// owner, or is one that the guest has made.
func wantWalls(t *testing.T, h *helpertest.Helper) {
	t.Helper()
	first, owner := mappedID(h.Way, 0), uint32(h.Way.UID())
	err := filepath.WalkDir(h.Export, func(path string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil {
			return err
		}
		in := func(id uint32) bool { return id >= first && id < first+mapCount }
		known := e.Name() == "readable" || e.Name() == "open" || e.IsDir()
		switch {
		case in(st.Uid) && in(st.Gid):
		case in(st.Uid) && strings.Contains(path, "/sgid/") && st.Mode&unix.S_ISGID == 0:
			// As for any user of the host: the group is the directory's.
		case st.Uid != owner || st.Gid != owner || !known:
			t.Errorf("%s: of %d:%d, outside the MAP", path, st.Uid, st.Gid)
		case !e.IsDir() && st.Mode&0o7777 != 0o644 && st.Mode&0o7777 != 0o666:
			t.Errorf("%s: of %d:%d, outside the MAP, mode %o", path, st.Uid, st.Gid, st.Mode)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// With map: nothing that a request does is done as an id that no MAP names.
func TestMapWalls(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := startMapped(t, way)
		c := h.Dial()
		const rdwr = unix.O_RDWR | unix.O_CREAT
		// What is made without a name for its owner is of the guest's root.
		want(t, c, 0, open("/in/made", rdwr))
		if a := ask(t, c, open("/in", unix.O_TMPFILE|unix.O_RDWR)); a.File == nil {
			t.Errorf("O_TMPFILE: %v", a.Errno)
		} else {
			var st unix.Stat_t
			if err := unix.Fstat(int(a.File.Fd()), &st); err != nil || st.Uid != mappedID(way, 0) {
				t.Errorf("O_TMPFILE: a file of %d, %v", st.Uid, err)
			}
			a.File.Close()
		}
		// Files of others are as the kernel says, and stay what they are.
		for _, dir := range []string{"/", "/in/", "/sgid/", "/sticky/"} {
			want(t, c, 0, open(dir+"open", unix.O_WRONLY|unix.O_TRUNC), open(dir+"readable", unix.O_RDONLY))
			want(t, c, unix.EACCES, open(dir+"readable", unix.O_WRONLY|unix.O_TRUNC), truncate(dir+"readable", 0),
				lsetxattr(dir+"readable", "user.x", "x", 1, 0))
			for _, name := range outsideFiles {
				want(t, c, unix.EPERM,
					chmod(dir+name, 0o6755), chown(dir+name, 0, 0), chown(dir+name, 0, none),
					chown(dir+name, none, 0), utime(dir+name, 1, 0, 1, 0),
					lsetxattr(dir+name, "system.posix_acl_access", acl, len(acl), 0),
					lsetxattr(dir+name, "security.capability", fileCaps, len(fileCaps), 0),
					lsetxattr(dir+name, "trusted.x", "x", 1, 0),
					open(dir+name, unix.O_NOATIME))
				if a := ask(t, c, lstat(dir+name)); a.Errno != 0 || u32(a.Payload[28:]) != overflow ||
					u32(a.Payload[32:]) != overflow {
					t.Errorf("%s%s: the guest is told %x, %v", dir, name, a.Payload[28:36], a.Errno)
				}
			}
		}
		want(t, c, unix.EACCES,
			open("/made", rdwr), open("/", unix.O_TMPFILE|unix.O_RDWR), link("/in/made", "/made"),
			rename("/open", "/in/x"), rename("/in/made", "/made"), remove("/open"))
		want(t, c, unix.EACCES, creates("/", 0, 0)...)
		want(t, c, unix.EPERM, rename("/sticky/open", "/in/x"), remove("/sticky/open"),
			chmod("/sticky", 0o777), chmod("/", 0o777), chown("/", 0, 0))
		// A link to a file of another is none to it, where the kernel lets one be made.
		linked := unix.EPERM
		if b, err := os.ReadFile("/proc/sys/fs/protected_hardlinks"); err == nil && b[0] == '0' {
			linked = 0
		}
		want(t, c, linked, link("/readable", "/in/link"))
		want(t, c, 0, link("/open", "/in/link2"))
		want(t, c, unix.EPERM, chmod("/in/link2", 0o6755), chown("/in/link2", 0, 0))
		if linked == 0 {
			want(t, c, unix.EPERM, chmod("/in/link", 0o6755), chown("/in/link", 0, 0))
			want(t, c, 0, remove("/in/link"))
		}
		want(t, c, 0, remove("/in/link2"))
		// Its own are for its users alone.
		for _, id := range []uint32{0, 1000, mapCount - 1} {
			for _, s := range creates(fmt.Sprintf("/in/%d", id), id, id) {
				want(t, c, 0, s)
				host := mappedID(way, id)
				wantOwner(t, h.Export, c, string(s.q.Path), [2]uint32{host, host}, [2]uint32{id, id})
			}
			want(t, c, 0, chown("/in/made", id, id), chown("/in/made", none, none), chmod("/in/made", 0o6755))
		}
		for _, ids := range [][2]uint32{{mapCount, mapCount}, {0, mapCount}, {mapCount, 0}, {overflow, overflow}} {
			want(t, c, unix.EPERM, creates("/in/outside", ids[0], ids[1])...)
			want(t, c, unix.EPERM, chown("/in/made", ids[0], ids[1]))
		}
		want(t, c, unix.EPERM, chown("/in/made", mapCount, none), chown("/in/made", none, mapCount))
		want(t, c, unix.EINVAL, creates("/in/nobody", none, 0)...)
		for _, kind := range []uint32{unix.S_IFCHR, unix.S_IFBLK} {
			want(t, c, unix.EPERM, mknod("/in/device", kind|0o600, 0x103, 0, 0))
		}
		outside := strings.Replace(acl, "\xe9\x03\x00\x00", "\x88\x13\x00\x00", 1) // 5000
		want(t, c, 0, lsetxattr("/in/made", "system.posix_acl_access", acl, len(acl), 0))
		want(t, c, unix.EPERM, lsetxattr("/in/made", "system.posix_acl_access", outside, len(outside), 0),
			lsetxattr("/in/made", "trusted.x", "x", 1, 0))
		// Directories of others: what is made there is not set-group-ID.
		want(t, c, 0, create("/sgid/made", rdwr, 0o2755, 0, 0), chmod("/sgid/made", 0o2755))
		want(t, c, 0, open("/sticky/made", rdwr), remove("/sticky/made"))
		wantWalls(t, h)
		// Whoever may write to a directory may remove what others have there.
		want(t, c, 0, rename("/in/open", "/in/moved"), remove("/in/moved"), remove("/in/readable"))
	})
}

// fileCaps is a vfs_cap_data of version 2: CAP_CHOWN, permitted and effective.
const fileCaps = "\x01\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// overflow is what ids are told as that the server has not: kernel.overflowuid.
const overflow = 65534
