//go:build !(amd64 || arm64 || loong64 || mips64 || mips64le || ppc64 || ppc64le || riscv64 || s390x)

package inflight

// The records that the kernel writes to (struct mmsghdr) are laid out for
// 64-bit systems.
var _ = virtfs_proxy_helper_needs_a_64_bit_architecture
