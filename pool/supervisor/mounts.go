package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"virtfs-proxy-helper/ops/sandbox"
)

// mountsPause is the time between two looks at the host's mounts: a server is
// started for each that finds a change. One takes some 0.1 ms of CPU.
const mountsPause = 2 * time.Second

// mountsChanged says that the mounts below the export are not those that the
// current server has a copy of.
type mountsChanged struct{}

// resolveExport opens what has the export's name now. A file system on the way may
// not answer: no more than StartTime is spent, so that servers can be started.
func (sv *supervisor) resolveExport() (*os.File, error) {
	type result struct {
		dir    *os.File
		remedy string
		err    error
	}
	done := make(chan result, 1) // if it comes late the garbage collector closes dir
	go func() {
		var remedy string
		dir, err := openExport(sv.Path)
		if err == nil {
			remedy, err = sv.ownerRemedy(dir)
		}
		done <- result{dir, remedy, err}
	}()
	select {
	case r := <-done:
		sv.setExportRemedy(r.remedy)
		return r.dir, r.err
	case <-time.After(StartTime):
		return nil, fmt.Errorf("--path: export %s: its file system does not answer", sv.Path)
	}
}

// absolutePath makes --path independent of the working directory.
func (sv *supervisor) absolutePath() (err error) {
	sv.Path, err = filepath.Abs(sv.Path)
	return err
}

// lookAtMounts returns the mounts for a server that is to be started, and logs, once
// for each, those that it covers. It is called by one goroutine at a time.
func (sv *supervisor) lookAtMounts(export *os.File) (*sandbox.Mounts, error) {
	m, err := sandbox.MountsOf(export)
	if err != nil {
		return nil, fmt.Errorf("look at the export's mounts: %w", err)
	}
	if m.Gone && !sv.gone {
		sv.log.Error("the export is gone from the host: ENOENT until SIGHUP finds it again")
	}
	sv.gone = m.Gone
	covered := map[string]bool{}
	for _, i := range m.Covered() {
		id := fmt.Sprint(i.ID, " ", i.Mountpoint)
		if covered[id] = true; !sv.covered[id] && sv.Sandbox.Sandbox == sandbox.SandboxNamespace {
			sv.log.Warn("covered: VMs would reach the host through such a mount, and find it empty",
				"mount", i.Mountpoint, "filesystem", i.FSType)
		}
	}
	sv.covered = covered
	return m, nil
}

// ownerRemedy returns the command that gives an export to an id of servers, "" if it
// belongs to one. The file system may not answer.
func (sv *supervisor) ownerRemedy(export *os.File) (string, error) {
	uid, gid, outside, err := sv.Sandbox.OutsideOwner(export)
	if err != nil || !outside {
		return "", err
	}
	if Rootless() {
		if u, g, err := sandbox.HostIDs(uid, gid); err == nil {
			uid, gid = u, g
		}
	}
	return fmt.Sprintf("chown %d:%d %s", uid, gid, sv.Path), nil
}

// setExportRemedy logs what ownerRemedy has found, and keeps it for errors.
func (sv *supervisor) setExportRemedy(remedy string) {
	if sv.exportRemedy = remedy; remedy != "" {
		sv.log.Warn("the export belongs to an id that no map: has: guests may do there what the "+
			"host's other users may", "remedy", remedy)
	}
}

// watchMounts tells the loop when what is mounted below the export changes, after
// seen. A server has a copy, into which nothing comes later on.
//
// The list is read now and then, as poll(2) on it tells neither of remounts nor, on
// Linux 6.18, of mounts that come from another namespace.
func (sv *supervisor) watchMounts(seen *sandbox.Mounts) {
	var last []byte // the list, which is looked at in detail if anything in it differs
	for ; ; time.Sleep(mountsPause) {
		list, err := os.ReadFile("/proc/self/mountinfo")
		if err == nil && bytes.Equal(list, last) {
			continue
		}
		now, err := sandbox.MountsOf(sv.export.Load())
		switch {
		case errors.Is(err, os.ErrClosed): // another directory is the export now
			continue
		case err != nil:
			sv.log.Error("look at the export's mounts", "error", err)
		case !now.Equal(seen):
			seen = now
			sv.events <- mountsChanged{}
		}
		last = list
	}
}
