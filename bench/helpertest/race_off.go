//go:build !race

package helpertest

const raceEnabled = false

// MemoryFactor is how much more memory a helper takes than one without the
// race detector, generously.
const MemoryFactor = 1
