package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Descriptors sees to it that this process and those that it starts may have n
// descriptors each. More than the hard limit is CAP_SYS_RESOURCE's to give, so
// it is to be called before Keep.
func Descriptors(n uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("getrlimit: %w", err)
	}
	had := limit
	limit.Cur = max(limit.Cur, n)
	limit.Max = max(limit.Max, n)
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err == nil || had.Max >= n {
		return err
	}
	had.Cur = had.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		return err
	}
	return fmt.Errorf("%d descriptors are allowed, %d may be needed: raise the hard limit "+
		"(ulimit -Hn; systemd: LimitNOFILE=) or lower --max-connections", had.Max, n)
}
