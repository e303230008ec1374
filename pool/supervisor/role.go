package supervisor

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
)

// Role is what a process of this program does.
type Role string

const (
	RoleCommand    Role = ""         // the command as the user has started it
	RoleRootless   Role = "rootless" // the same, as root of a user namespace
	RoleSupervisor Role = "supervisor"
	RoleServer     Role = "server"
)

const (
	// roleEnv tells a process that this program has started which Role it has.
	// It gives no right: what that process needs beside it are descriptors that
	// only this program makes.
	roleEnv = "VIRTFS_PROXY_HELPER_ROLE"
	// rootlessEnv tells all processes of a helper that an ordinary user has
	// started that they are in a user namespace; its value is the descriptor
	// that the first of them waits at.
	rootlessEnv = "VIRTFS_PROXY_HELPER_ROOTLESS"
)

// kept are the caller's variables that a process in the foreground keeps: they
// are systemd's, and name where it listens.
var kept = []string{"NOTIFY_SOCKET", "JOURNAL_STREAM", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// CurrentRole returns the role of this process. It fails where the role, or
// privileges, come from a caller who should not have them.
func CurrentRole() (Role, error) {
	role := Role(os.Getenv(roleEnv))
	secure, err := isSecure()
	if err != nil {
		return "", err
	}
	setID := os.Getuid() != os.Geteuid() || os.Getgid() != os.Getegid()
	// A transition of a security module is secure as well, and good for a root
	// that comes without a role.
	if setID || secure && (role != RoleCommand || Rootless() || os.Geteuid() != 0) {
		return "", errors.New("it has privileges that its caller has not (set-user-ID, " +
			"set-group-ID or file capabilities) and would serve them any directory: " +
			"remove these from the file and start it as root")
	}
	switch role {
	case RoleCommand:
		return role, nil
	case RoleRootless, RoleSupervisor, RoleServer:
	default:
		return "", fmt.Errorf("%s=%s: this program has no such role: unset it", roleEnv, role)
	}
	if !slices.Equal(os.Environ(), environment(role)) {
		return "", fmt.Errorf("%s=%s: it is set by this program for itself, "+
			"with nothing else in the environment: unset it", roleEnv, role)
	}
	return role, nil
}

// isSecure tells that the kernel has given this process privileges that its
// caller has not: AT_SECURE.
func isSecure() (bool, error) {
	const atSecure = 23
	auxv, err := unix.Auxv()
	if err != nil {
		return false, fmt.Errorf("auxiliary vector: %w", err)
	}
	for _, entry := range auxv {
		if entry[0] == atSecure {
			return entry[1] != 0, nil
		}
	}
	return false, errors.New("auxiliary vector: no AT_SECURE")
}

// environment returns the whole environment of a process in that role, which
// this one starts.
func environment(role Role) (env []string) {
	if role == RoleCommand || role == RoleRootless {
		// An ordinary user's command finds newuidmap by its own PATH.
		searches := role == RoleCommand && os.Geteuid() != 0
		for _, variable := range os.Environ() {
			name, _, _ := strings.Cut(variable, "=")
			if slices.Contains(kept, name) || searches && name == "PATH" {
				env = append(env, variable)
			}
		}
	}
	if role != RoleCommand {
		env = append(env, roleEnv+"="+string(role))
		if Rootless() {
			env = append(env, rootlessEnv+"="+os.Getenv(rootlessEnv))
		}
	}
	return env
}

// cleanEnvironment executes this command once more, as the same process with
// the same descriptors, unless its environment is free of the caller's already:
// the Go runtime and libraries act on variables, in a process with privileges.
func cleanEnvironment() error {
	if Role(os.Getenv(roleEnv)) != RoleCommand {
		return nil // CurrentRole has looked
	}
	env := environment(RoleCommand)
	if slices.Equal(os.Environ(), env) {
		return nil
	}
	err := executableErr
	if err == nil {
		err = syscall.Exec(executable, os.Args, env)
	}
	if err != nil { // its name is gone, or another's
		err = syscall.Exec("/proc/self/exe", os.Args, env)
	}
	return fmt.Errorf("execute this program without the caller's environment: %w", err)
}

// Rootless tells that an ordinary user has started this helper.
func Rootless() bool { return os.Getenv(rootlessEnv) != "" }

func awaitIDs() error {
	fd, err := strconv.ParseUint(os.Getenv(rootlessEnv), 10, 31)
	if err != nil {
		return fmt.Errorf("%s: %w", rootlessEnv, err)
	}
	return sandbox.AwaitIDs(int(fd))
}
