package pool

import "testing"

func (a action) String() string {
	return [...]string{"busy-poll", "block", "poll briefly", "poll", "park"}[a]
}

var (
	quiet   = load{alone: true, mayPoll: true}
	crowded = load{mayPoll: true} // no CPU for each
	waiting = load{waiting: true, mayPoll: true}
	hogged  = load{alone: true} // enough poll already
)

// A worker waits in one place after the other, from the fastest to the cheapest.
func TestPolicyWaits(t *testing.T) {
	type step struct {
		event event
		now   int64
		load  load
		want  action
	}
	const ms = 1_000_000
	for name, c := range map[string]struct {
		policy policy
		steps  []step
	}{
		"a new connection tries to busy-poll": {policy{}, []step{
			{answered, 0, quiet, busyPoll}, {empty, 0, quiet, block},
			{empty, 0, quiet, poll}, {empty, 0, quiet, park}}},
		"without a CPU for each it does not": {policy{}, []step{
			{answered, 0, crowded, block}, {empty, 0, crowded, poll}}},
		"nor if the user forbids it": {policy{noBusyPoll: true}, []step{{answered, 0, quiet, block}}},
		"not where it did not pay":   {policy{request: 2 * probe}, []step{{answered, 0, quiet, block}}},
		"but where it did": {policy{request: 2 * probe, polling: true}, []step{
			{answered, 0, quiet, busyPoll}}},
		"not after three in vain": {policy{request: 2 * probe, polling: true}, []step{
			{answered, 0, quiet, busyPoll}, {empty, 0, quiet, block},
			{answered, 0, quiet, busyPoll}, {empty, 0, quiet, block},
			{answered, 0, quiet, busyPoll}, {empty, 0, quiet, block},
			{answered, 0, quiet, block}}},
		"a client that asks now and then is polled at once": {policy{sparse: true}, []step{
			{answered, 0, quiet, poll}, {empty, 0, quiet, park}}},
		"the runtime wants the thread": {policy{noBusyPoll: true}, []step{
			{answered, 0, quiet, block}, {interrupted, 0, quiet, poll}}},
		"the runtime does, and others wait": {policy{noBusyPoll: true}, []step{
			{answered, 0, quiet, block}, {interrupted, 0, waiting, park}}},
		"others wait: not before the quantum": {policy{noBusyPoll: true, began: ms}, []step{
			{answered, 5 * ms, waiting, pollBriefly}, {empty, 5 * ms, waiting, park}}},
		"others wait: after it":    {policy{began: ms}, []step{{answered, 6 * ms, waiting, park}}},
		"nobody waits: it goes on": {policy{began: ms, noBusyPoll: true}, []step{{answered, 6 * ms, quiet, block}}},
		"enough others poll already": {policy{noBusyPoll: true}, []step{
			{answered, 0, hogged, block}, {empty, 0, hogged, park}}},
		"sparse, and others wait": {policy{sparse: true}, []step{{answered, 0, waiting, park}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := c.policy
			for i, s := range c.steps {
				if got := p.next(s.event, s.now, s.load); got != s.want {
					t.Fatalf("step %d: %v, want %v", i, got, s.want)
				}
			}
		})
	}
}

// simulate answers n requests of a client that asks gap ns after an answer, when
// the worker busy-polls, and asleep ns after it else. It returns how many of the
// last half of them were busy-polled for.
func simulate(p *policy, n int, busy, asleep int64) (polled int) {
	now := int64(1)
	for i := range n {
		p.sends(now)
		gap := asleep
		if p.next(answered, now, quiet) == busyPoll {
			gap = busy
			if i >= n/2 {
				polled++
			}
			if busy > busyPollFor.Nanoseconds() {
				p.next(empty, now, quiet)
			}
		}
		now += gap
		p.came(now)
	}
	return polled
}

// Busy-polling is measured, and done where it is faster by a good part.
func TestPolicyLearns(t *testing.T) {
	const n = 8 * window
	for _, c := range []struct {
		name         string
		busy, asleep int64 // ns
		want         bool
	}{
		{"a core for each", 8_000, 30_000, true},
		{"a little faster", 28_000, 30_000, false},
		{"slower", 40_000, 10_000, false},
		{"never in time", 90_000, 60_000, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &policy{}
			polled := simulate(p, n, c.busy, c.asleep)
			if c.want && polled < n/2*9/10 || !c.want && polled > n/2*3*probe/window {
				t.Errorf("busy-polled for %d of %d", polled, n/2)
			}
			// What was right is not for ever.
			if polled = simulate(p, n, c.asleep, c.busy); c.want && polled > n/2*3*probe/window {
				t.Errorf("the client has changed: busy-polled for %d of %d", polled, n/2)
			}
		})
	}
}

// A poll tells a client that asks now and then from a busy one.
func TestPolicySparse(t *testing.T) {
	p := &policy{noBusyPoll: true}
	p.next(answered, 0, quiet)
	if a := p.next(empty, 0, quiet); a != poll || !p.sparse {
		t.Fatalf("%v, sparse %v", a, p.sparse)
	}
	p.polled(blockFor.Nanoseconds())
	if a := p.next(answered, 0, quiet); a != poll {
		t.Errorf("%v after a long pause", a)
	}
	p.polled(blockFor.Nanoseconds() - 1)
	if a := p.next(answered, 0, quiet); a != block {
		t.Errorf("%v after a short pause", a)
	}
}

func TestPolicyAllocatesNothing(t *testing.T) {
	p := &policy{}
	if n := testing.AllocsPerRun(4*window, func() {
		p.sends(1)
		p.next(answered, 1, quiet)
		p.came(9000)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
