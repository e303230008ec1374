package helpertest

import (
	"path"
	"slices"
	"strings"
	"testing"
)

// expect reports a marked case that fails otherwise than marked, or not at all,
// and accepts one that fails as marked.
func TestKnownFault(t *testing.T) {
	const notAsMarked = `does not fail with "the VM is lost"`
	for name, c := range map[string]struct {
		body    func(t *testing.T)
		problem string
	}{
		"fails as marked":    {func(t *testing.T) { t.Error("the VM is lost") }, ""},
		"ends as marked":     {func(t *testing.T) { t.Fatal("the VM is lost") }, ""},
		"fails below":        {func(t *testing.T) { t.Run("", func(t *testing.T) { t.Error("the VM is lost") }) }, ""},
		"passes":             {func(*testing.T) {}, "is mended"},
		"passes and says so": {func(t *testing.T) { t.Log("the VM is lost") }, "is mended"},
		"is skipped":         {func(t *testing.T) { t.Skip("the VM is lost") }, "is mended"},
		"fails otherwise":    {func(t *testing.T) { t.Error("the name is lost") }, notAsMarked},
		"panics":             {func(*testing.T) { panic("a nil pointer") }, notAsMarked},
	} {
		t.Run(name, func(t *testing.T) {
			if isCase() {
				c.body(t)
				return
			}
			f := Fault{Row: "X1", Words: "VMs are lost", Says: "the VM is lost"}
			problem := f.expect(t, "")
			if (problem == "") != (c.problem == "") || !strings.Contains(problem, c.problem) {
				t.Errorf("said %q, want %q", problem, c.problem)
			}
		})
	}
}

// EachWay expects a marked case to fail, and runs one that is not marked.
func TestEachWayKnownFault(t *testing.T) {
	old := KnownFaults
	t.Cleanup(func() { KnownFaults = old })
	KnownFaults = []Fault{{"X1", "the VM is lost", t.Name(), "daemon-c*", "the VM is lost"}}
	two := func(w Way) (reason string) {
		if w.FD || w.Rootless || w.Sandbox != "chroot" {
			return "two are enough"
		}
		return ""
	}
	EachWay(t, two, func(t *testing.T, way Way) {
		if !way.Foreground {
			t.Error("the VM is lost")
		}
	})
}

// Each entry of KnownFaults names existing ways, and no two name the same case.
func TestMarks(t *testing.T) {
	seen := map[string]string{}
	for _, f := range KnownFaults {
		if f.Row == "" || f.Words == "" || f.Says == "" {
			t.Errorf("%+v: without row, words or output", f)
		}
		if !slices.ContainsFunc(Ways, func(w Way) bool { ok, _ := path.Match(f.Ways, w.Name); return ok }) {
			t.Errorf("%s %s: no way is %q", f.Row, f.Test, f.Ways)
		}
		for _, w := range Ways {
			if ok, _ := path.Match(f.Ways, w.Name); ok {
				if row := seen[f.Test+"/"+w.Name]; row != "" {
					t.Errorf("%s/%s: marked by %s and by %s", f.Test, w.Name, row, f.Row)
				}
				seen[f.Test+"/"+w.Name] = f.Row
			}
		}
	}
}
