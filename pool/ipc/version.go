package ipc

// Version is the number of what a supervisor and a server have in common: the
// namespaces, descriptors and arguments that a server is started with, the
// messages, the configuration among them, and the layout of the memories in
// pool/inflight and pool/progress. It grows with each change to any of them, as
// SIGHUP starts the program that is on disk under the supervisor that runs.
//
// In every version a server is started with the control socket as descriptor 3,
// and both sides say the number first (Hello); Error means the same in all.
const Version = 2
