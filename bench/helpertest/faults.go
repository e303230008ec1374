package helpertest

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Fault is a fault of the helper that is not mended yet, with the test cases
// that fail because of it.
type Fault struct {
	Row   string // number of the fault
	Words string // description of the fault
	Test  string // name of the test, which calls EachWay
	Ways  string // pattern of path.Match for the ways in which the test fails
	Says  string // part of the output of the failing test
}

// KnownFaults are the faults that are not mended yet. A case named here must
// fail with the output in Says: delete the entry when the fault is mended.
var KnownFaults = []Fault{}

// caseEnv is set for a process that runs a marked case, to see it fail.
const caseEnv = "HELPERTEST_KNOWN_FAULT"

func isCase() bool { return os.Getenv(caseEnv) != "" }

func init() {
	if isCase() {
		Patience = 15 * time.Second // the case is expected to time out
	}
}

// knownFault returns the fault that marks a case, "TEST/WAY", if any.
func knownFault(name string) *Fault {
	test, way, _ := strings.Cut(name, "/")
	for i, f := range KnownFaults {
		if ok, _ := path.Match(f.Ways, way); ok && f.Test == test {
			return &KnownFaults[i]
		}
	}
	return nil
}

// expect runs the subtest t again in another process, with program as Ours. It
// returns a description of the problem if t does not fail with f.Says.
func (f *Fault) expect(t *testing.T, program string) (problem string) {
	t.Helper()
	var only []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		only = append(only, "^"+regexp.QuoteMeta(part)+"$")
	}
	cmd := exec.Command("/proc/self/exe",
		"-test.v", "-test.timeout=3m", "-test.run="+strings.Join(only, "/"))
	cmd.Env = append(os.Environ(), caseEnv+"="+f.Row, "HELPER="+program)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	b, err := cmd.CombinedOutput()
	output := string(b)
	switch {
	case cmd.ProcessState == nil:
		return err.Error()
	case cmd.ProcessState.Success():
		return fmt.Sprintf("%s (%s) is mended here: "+
			"delete its line in KnownFaults, or narrow it\n%s", f.Row, f.Words, output)
	case !strings.Contains(output, "--- FAIL: "+t.Name()+" ") || !strings.Contains(output, f.Says):
		return fmt.Sprintf("%s (%s) does not fail with %q: %v\n%s",
			f.Row, f.Words, f.Says, err, output)
	}
	t.Logf("fails as known, %s: %s", f.Row, f.Words)
	return ""
}
