package sandbox

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// RunRootless runs cmd, this program again, as root of a user namespace and of
// a mount namespace, and returns its exit status. The caller's user is root
// there, and 1 on are the ids that /etc/subuid and /etc/subgid give to that
// user. Without those there are no others, which is logged.
//
// To whoever has started this process it looks as if it were the other one:
// signals that end or renew a helper go there, and it ends with this.
//
// cmd calls AwaitIDs, before it does anything else, with the descriptor that
// it gets as the last of cmd.ExtraFiles; Tell tells it which one.
func RunRootless(cmd *exec.Cmd, tell func(fd int), log *slog.Logger) (status int, err error) {
	wait, mapped, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer mapped.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, wait)
	tell(2 + len(cmd.ExtraFiles))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		Setpgid:    true, // a ^C at the terminal comes once, from here
		Pdeathsig:  unix.SIGTERM,
	}
	// It has all capabilities in its namespaces, but is nobody when it is
	// executed, as only its parent can map its ids: so they have to be ambient.
	for v := range cap.MaxBits() {
		cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, uintptr(v))
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	if !signal.Ignored(unix.SIGHUP) { // by nohup(1), for cmd as well
		signal.Notify(signals, unix.SIGHUP)
	}
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, needsUserNamespace(err)
	}
	wait.Close()
	if err = mapIDs(cmd.Process.Pid, log); err == nil {
		_, err = mapped.Write([]byte{1})
	}
	mapped.Close()
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return 0, needsUserNamespace(err)
	}
	go func() {
		for sig := range signals {
			cmd.Process.Signal(sig)
		}
	}()
	if err = cmd.Wait(); cmd.ProcessState.Exited() {
		return cmd.ProcessState.ExitCode(), nil
	}
	return 0, fmt.Errorf("the supervisor died: %w", err)
}

// AwaitIDs waits until this process, started by RunRootless, is root.
func AwaitIDs(fd int) error {
	f := os.NewFile(uintptr(fd), "ids")
	defer f.Close()
	if _, err := io.ReadFull(f, make([]byte, 1)); err != nil {
		return fmt.Errorf("whoever started this is gone: %w", err)
	}
	return nil
}

// InsideIDs returns what a user and a group of the host are in the user namespace
// of this process. -1 is the one that has started it.
func InsideIDs(uid, gid int) (insideUID, insideGID int, err error) {
	ids, err := currentIDs()
	if err != nil {
		return 0, 0, err
	}
	ownUID, ownGID := ids.RootPair()
	if uid < 0 {
		uid = ownUID
	}
	if gid < 0 {
		gid = ownGID
	}
	if insideUID, insideGID, err = ids.ToContainer(uid, gid); err != nil {
		return 0, 0, fmt.Errorf("--uid %d --gid %d: without root these must be your own, "+
			"%d and %d, or from your ranges in /etc/subuid and /etc/subgid: leave them out",
			uid, gid, ownUID, ownGID)
	}
	return insideUID, insideGID, nil
}

// HostIDs returns what a user and a group of this process' user namespace are on the
// host.
func HostIDs(uid, gid int) (hostUID, hostGID int, err error) {
	ids, err := currentIDs()
	if err != nil {
		return 0, 0, err
	}
	return ids.ToHost(uid, gid)
}

func currentIDs() (ids user.IdentityMapping, err error) {
	if ids.UIDMaps, err = user.CurrentProcessUIDMap(); err == nil {
		ids.GIDMaps, err = user.CurrentProcessGIDMap()
	}
	return ids, err
}

// idKind is users or groups.
type idKind struct {
	own       int
	ranges    string // the file that gives them
	newmap    string // the program that may map them
	kernelMap string
}

// mapIDs makes this process' user and group root in the user namespace of
// another process, and maps its ranges.
func mapIDs(pid int, log *slog.Logger) error {
	var reasons []string
	for _, k := range []idKind{
		{os.Geteuid(), "/etc/subuid", "newuidmap", "uid_map"},
		{os.Getegid(), "/etc/subgid", "newgidmap", "gid_map"},
	} {
		err := k.mapRanges(pid)
		if err == nil {
			continue
		}
		reasons = append(reasons, err.Error())
		if err := k.mapOwn(pid); err != nil {
			return err
		}
	}
	if reasons != nil {
		log.Warn("files can be made for the guest's root alone, which is you: for others EPERM",
			"because", strings.Join(reasons, "; "))
	}
	return nil
}

// mapRanges maps 1 on to what the system's administrator has given to the
// user, by a program that may.
func (k idKind) mapRanges(pid int) error {
	own := user.User{Name: strconv.Itoa(os.Geteuid())} // also where it has no name
	if u, err := user.CurrentUser(); err == nil {
		own.Name = u.Name
	}
	ranges, err := user.ParseSubIDFileFilter(k.ranges, func(r user.SubID) bool {
		return r.Name == own.Name || r.Name == strconv.Itoa(os.Geteuid())
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if len(ranges) == 0 {
		return fmt.Errorf("%s has no range for %s: "+
			"add the line %[2]s:100000:65536, with a start that nobody else has",
			k.ranges, own.Name)
	}
	args := []string{strconv.Itoa(pid), "0", strconv.Itoa(k.own), "1"}
	next := int64(1)
	for _, r := range ranges {
		args = append(args, fmt.Sprint(next), fmt.Sprint(r.SubID), fmt.Sprint(r.Count))
		next += r.Count
	}
	out, err := exec.Command(k.newmap, args...).CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%w: install it (Debian: the package uidmap)", err)
	case err != nil:
		return fmt.Errorf("%s: %w: %s", k.newmap, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// mapOwn maps the user alone, which everybody may do; for groups at the price
// that nobody in the namespace can leave one.
func (k idKind) mapOwn(pid int) error {
	if k.kernelMap == "gid_map" {
		setgroups := fmt.Sprintf("/proc/%d/setgroups", pid)
		if err := os.WriteFile(setgroups, []byte("deny"), 0); err != nil {
			return err
		}
	}
	kernelMap := fmt.Sprintf("/proc/%d/%s", pid, k.kernelMap)
	return os.WriteFile(kernelMap, fmt.Appendf(nil, "0 %d 1", k.own), 0)
}

// keepsGroups tells that mapOwn has paid its price.
func keepsGroups() bool {
	b, err := os.ReadFile("/proc/self/setgroups")
	return err == nil && strings.TrimSpace(string(b)) == "deny"
}

func needsUserNamespace(err error) error {
	return fmt.Errorf("runs as uid %d and gets no user namespace to be root in: %w: "+
		"start it with sudo or from a system service, or see what forbids it: "+
		"the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone "+
		"and kernel.apparmor_restrict_unprivileged_userns, a container", os.Geteuid(), err)
}
