package sandbox

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"slices"
	"syscall"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// mapsIDs reports whether servers run in a user namespace of their own.
func (c Config) mapsIDs() bool { return c.UIDs != nil || c.GIDs != nil }

// intoUserNamespace has cmd run in a user namespace that has the ids of UIDs and
// GIDs alone, as the first of them, with all capabilities over what these own. That
// its user is not this process' is no gain of privileges, which it finds by
// no_new_privs.
func (c Config) intoUserNamespace(cmd *exec.Cmd) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	ids, err := currentIDs()
	if err != nil {
		return err
	}
	uids, err := namespaceIDs(c.UIDs, ids.UIDMaps, "uid")
	if err != nil {
		return err
	}
	gids, err := namespaceIDs(c.GIDs, ids.GIDMaps, "gid")
	if err != nil {
		return err
	}
	attr := cmd.SysProcAttr
	attr.Cloneflags |= unix.CLONE_NEWUSER
	attr.UidMappings, attr.GidMappings = uids, gids
	attr.GidMappingsEnableSetgroups = !keepsGroups()
	attr.Credential = &syscall.Credential{
		Uid: uint32(first(uids).ContainerID), Gid: uint32(first(gids).ContainerID),
		NoSetGroups: keepsGroups(),
	}
	if attr.Credential.Uid != 0 { // root's come by execve
		for v := range cap.MaxBits() {
			attr.AmbientCaps = append(attr.AmbientCaps, uintptr(v))
		}
	}
	return nil
}

// checkGroups returns an error if servers would keep groups that are not among their
// ids: where nobody can leave one.
func (c Config) checkGroups() error {
	if c.GIDs == nil || !keepsGroups() {
		return nil
	}
	groups, err := unix.Getgroups()
	if err != nil {
		return fmt.Errorf("getgroups: %w", err)
	}
	for _, g := range groups {
		if inside(c.GIDs, g) != g {
			return errors.New("--translate-gid: servers can't leave supplementary groups of " +
				"this process, which no map: names: give its user a range in /etc/subgid, or " +
				"start it without these groups")
		}
	}
	return nil
}

// namespaceIDs returns the ids of a kind that a server's user namespace has, in ranges
// as this process' own namespace has them: the kernel takes none across two of those.
// Nil is all of them, under the same numbers.
func namespaceIDs(ids []syscall.SysProcIDMap, own []user.IDMap, kind string) (
	parts []syscall.SysProcIDMap, err error) {
	all := ids == nil
	if all {
		ids = []syscall.SysProcIDMap{{Size: math.MaxUint32}}
	}
	for _, r := range ids {
		missing := r.Size
		for _, o := range own {
			from := max(r.HostID, int(o.ID))
			n := min(r.HostID+r.Size, int(o.ID+o.Count)) - from
			if n > 0 {
				parts = append(parts, syscall.SysProcIDMap{
					ContainerID: r.ContainerID + (from - r.HostID), HostID: from, Size: n,
				})
				missing -= n
			}
		}
		if missing > 0 && !all {
			return nil, fmt.Errorf("--translate-%s map:%d:%d:%d: this process has not all "+
				"these ids of the host to give: see /proc/self/%[1]s_map",
				kind, r.ContainerID, r.HostID, r.Size)
		}
	}
	return parts, nil
}

// first returns the range with the first id inside.
func first(ids []syscall.SysProcIDMap) syscall.SysProcIDMap {
	return slices.MinFunc(ids, func(a, b syscall.SysProcIDMap) int {
		return a.ContainerID - b.ContainerID
	})
}

// mapsRoot reports whether servers have this process' root, which takes
// CAP_SETFCAP.
func (c Config) mapsRoot() bool { return c.mapsIDs() && inside(c.UIDs, 0) == 0 }

// needsMaps says what to do where the server gets no user namespace with its ids.
func needsMaps(err error) error {
	switch {
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: with map: in --translate-uid or --translate-gid "+
			"this program must be readable and executable for all (chmod a+rx)", err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return fmt.Errorf("map: in --translate-uid or --translate-gid takes a user namespace "+
			"that has these ids: %w: leave map: out where none can be made "+
			"(the sysctl user.max_user_namespaces, a container; Docker makes one itself by "+
			"userns-remap and allows them with --cap-add=SYS_ADMIN)", err)
	}
	return err
}

// OutsideOwner reports whether an export belongs to a user or a group that servers
// have not, and returns whom it should belong to.
func (c Config) OutsideOwner(export *os.File) (uid, gid int, outside bool, err error) {
	if !c.mapsIDs() {
		return 0, 0, false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(export.Fd()), &st); err != nil {
		return 0, 0, false, &os.PathError{Op: "stat", Path: export.Name(), Err: err}
	}
	uid, gid = inside(c.UIDs, int(st.Uid)), inside(c.GIDs, int(st.Gid))
	return uid, gid, uid != int(st.Uid) || gid != int(st.Gid), nil
}

// inside returns an id of this process if servers have it, else the one that is
// their first.
func inside(ids []syscall.SysProcIDMap, id int) int {
	for _, r := range ids {
		if id >= r.HostID && id-r.HostID < r.Size {
			return id
		}
	}
	if ids == nil {
		return id
	}
	return first(ids).HostID
}
