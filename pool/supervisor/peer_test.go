package supervisor

import (
	"strings"
	"testing"
)

func TestMachineScope(t *testing.T) {
	for cgroups, want := range map[string]string{
		"0::/machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt/emulator\n": `machine-qemu\x2d1\x2dvm.scope`,
		"2:cpu:/\n1:name=systemd:/machine.slice/machine-a.scope\n0::/\n":       "machine-a.scope",
		"0::/user.slice/user-1000.slice/session-2.scope\n":                     "",
		"0::/machine.slice/machine-a.scope/machine-b.scope\n":                  "machine-a.scope",
		"":            "",
		"no cgroup\n": "",
		"0::/" + strings.Repeat("x", 100<<10) + "/machine-a.scope\n": "",
	} {
		if got := machineScope(strings.NewReader(cgroups)); got != want {
			t.Errorf("%.80q: %q, want %q", cgroups, got, want)
		}
	}
}
