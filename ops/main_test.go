package ops_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/helpertest"
)

func TestMain(m *testing.M) {
	unix.Umask(0) // the trees that helpers serve have the modes that tests say
	helpertest.Main(m)
}
