package ops_test

import (
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// credential is root, or somebody, with supplementary groups.
func credential(uid, gid uint32, groups ...uint32) *syscall.Credential {
	return &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}
}

func TestMain(m *testing.M) {
	unix.Umask(0) // the trees that helpers serve have the modes that tests say
	helpertest.Main(m)
}
