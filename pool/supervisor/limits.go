package supervisor

import (
	"fmt"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/logging"
)

// descriptors is how many a process may need with n connections: one for each and
// one that goes with an answer, a few for each request in the file system, three for
// each epoll loop, and what it has anyway or takes to start a server.
func (c *Config) descriptors(n int) uint64 {
	const perConn, perRequest, ownAndStart = 2, 2, 64
	return uint64(perConn*n + perRequest*min(c.Workers, n) + 3*pool.Loops + ownAndStart)
}

// threads is how many threads both processes may need.
func (c *Config) threads() uint64 {
	const own = 32 // of the runtime, and those that wait for events
	return uint64(min(c.Workers, c.MaxConnections) + own)
}

// fitLimits raises the limit of descriptors or, where the hard limit is too low,
// lowers MaxConnections until all have room, and logs that. A limit of threads
// is only looked at: rarely are all workers busy.
func (c *Config) fitLimits(log *logging.Log) error {
	if c.Socket == "" {
		c.MaxConnections = 1
	}
	asked, needed := c.MaxConnections, c.descriptors(c.MaxConnections)
	allowed, err := sandbox.Descriptors(needed)
	if err != nil {
		return err
	}
	const remedy = "raise the hard limit (ulimit -Hn; systemd: LimitNOFILE=)"
	for c.descriptors(c.MaxConnections) > allowed {
		if c.MaxConnections--; c.MaxConnections == 0 {
			return fmt.Errorf("%d descriptors are allowed, %d are needed to serve a single VM: %s",
				allowed, c.descriptors(1), remedy)
		}
	}
	if c.MaxConnections < asked {
		log.Warn("fewer VMs at once than --max-connections: more wait until one leaves",
			"connections", c.MaxConnections, "asked", asked,
			"error", fmt.Errorf("%d descriptors are allowed, %d may be needed: %s",
				allowed, needed, remedy))
	}
	if err := c.Sandbox.Threads(c.threads()); err != nil {
		log.Warn("the server may die if many VMs are busy: lower --workers", "error", err)
	}
	return nil
}
