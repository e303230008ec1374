package main

// mutations are changes that tests must notice. The claims are SECURITY.md's.
var mutations = []mutation{
	{
		name:  "descriptor-of-host",
		claim: "the server has no descriptor outside the export",
		edits: []edit{{
			"ops/sandbox/sandbox.go",
			"	unix.Umask(0) // modes are the guest's, whole\n",
			"	unix.Umask(0)\n	unix.Open(\"/\", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)\n",
		}},
		tests: []string{"-run ^TestServerDescriptors$ ./ops/sandbox"},
	},
	{
		name:  "supervisor-calls",
		claim: "the supervisor makes no call that changes the kernel or other processes",
		edits: []edit{{
			"ops/sandbox/syscalls.go",
			"	\"arch_prctl\", \"access\",",
			"	\"ptrace\", \"bpf\", \"init_module\", \"kexec_load\", \"arch_prctl\", \"access\",",
		}},
		tests: []string{"-run ^TestLists$ ./ops/sandbox"},
	},
	{
		name:  "server-calls",
		claim: "the server makes the system calls on its list and no other",
		edits: []edit{{
			"ops/sandbox/syscalls.go",
			"\"recvmmsg\", \"recvmsg\",",
			"\"socket\", \"recvmmsg\", \"recvmsg\",",
		}},
		tests: []string{"-run ^TestLists$ ./ops/sandbox"},
	},
	{
		name:  "memory-becomes-code",
		claim: "no memory of the server becomes code",
		edits: []edit{{
			"ops/sandbox/syscalls.go",
			"only(\"mprotect\", condition(2, seccomp.BitsNotSet, unix.PROT_EXEC)",
			"only(\"mprotect\", condition(2, seccomp.BitsNotSet, unix.PROT_GROWSUP)",
		}},
		tests: []string{"-run ^TestCVE2018_16359 ./ops/sandbox"},
	},
	{
		name:  "no-kill",
		claim: "the supervisor kills a server that says what it must not",
		edits: []edit{{
			"pool/supervisor/supervisor.go",
			"		s.state = condemned\n		s.cmd.Process.Kill()\n",
			"		s.state = condemned\n",
		}},
		tests: []string{"-run ^TestHostileServer$/^a_filter$ ./pool/supervisor"},
	},
	{
		name:  "no-violation-kill",
		claim: "a server that makes a call which is not on its list is killed",
		edits: []edit{{
			"pool/supervisor/child.go",
			"	server.Kill()\n",
			"",
		}},
		tests: []string{"-run ^TestViolation$ ./ops/sandbox"},
	},
	{
		name:  "returned-unasked",
		claim: "a server gives connections back only when it was told to",
		edits: []edit{{
			"pool/supervisor/messages.go",
			"	ipc.Returned: {in: []state{handingOver}, body: 4, conn: true},\n",
			"	ipc.Returned: {in: afterReady, body: 4, conn: true},\n",
		}},
		tests: []string{"-run ^TestTable$ ./pool/supervisor"},
	},
	{
		name:  "anothers-connection",
		claim: "a server's word counts for its own connections",
		edits: []edit{{
			"pool/supervisor/supervisor.go",
			"sv.conns[id] != nil && sv.conns[id].server == s",
			"sv.conns[id] != nil",
		}},
		tests: []string{"-run ^TestTable$ ./pool/supervisor"},
	},
	{
		name:  "room-for-two",
		claim: "no descriptor that a server attaches stays open in the supervisor",
		edits: []edit{{
			"pool/ipc/ipc.go",
			"oob = make([]byte, unix.CmsgLen(4*descriptors))",
			"oob = make([]byte, unix.CmsgSpace(4*descriptors))",
		}, {
			"pool/ipc/ipc.go",
			"		unix.Close(fd)\n		m.Cut = true\n",
			"		m.Cut = true\n",
		}},
		tests: []string{"-run ^TestTable$ ./pool/supervisor"},
	},
	{
		name:  "cut-is-whole",
		claim: "a message with more descriptors than belong to it kills the server",
		edits: []edit{{
			"pool/ipc/ipc.go",
			"Cut: flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0",
			"Cut: flags&unix.MSG_TRUNC != 0",
		}},
		tests: []string{"-run ^TestTable$ ./pool/supervisor"},
	},
	{
		name:  "end-by-socket-alone",
		claim: "a dead server is noticed, even if another process has its socket",
		edits: []edit{{
			"pool/supervisor/child.go",
			"		case status = <-reaped:\n			gone = true\n		case <-dying:\n",
			"		case <-dying:\n",
		}},
		tests: []string{"-run ^TestDeadServer/^before_6.9$ ./pool/supervisor"},
	},
	{
		name:  "role-alone",
		claim: "a role in the environment gives nothing",
		edits: []edit{{
			"pool/ipc/ipc.go",
			"int(peer.Pid) != os.Getppid() || int(peer.Uid) != os.Geteuid()",
			"int(peer.Uid) < 0",
		}},
		tests: []string{"-run ^TestRoleAlone$ ./pool/supervisor"},
	},
	{
		name:  "set-user-id",
		claim: "a copy with set-user-ID, set-group-ID or file capabilities serves nothing",
		edits: []edit{{
			"pool/supervisor/role.go",
			"	if setID || secure &&",
			"	if false && setID && secure &&",
		}},
		tests: []string{"-run ^TestPrivilegedCopy$ ./pool/supervisor"},
	},
	{
		name:  "file-capabilities",
		claim: "a copy with file capabilities serves nothing",
		edits: []edit{{
			"pool/supervisor/role.go",
			"	if setID || secure &&",
			"	if setID || false && secure &&",
		}},
		tests: []string{"-run ^TestPrivilegedCopy$ ./pool/supervisor"},
	},
	{
		name:  "callers-environment",
		claim: "supervisor and server run with an environment that this program has set",
		edits: []edit{{
			"pool/supervisor/command.go",
			"	if err := cleanEnvironment(); err != nil {\n		return err\n	}\n",
			"",
		}},
		tests: []string{"-run ^TestForegroundEnvironment$ ./pool/supervisor"},
	},
	{
		name:  "servers-environment",
		claim: "a server's environment has nothing but its role",
		edits: []edit{{
			"pool/supervisor/role.go",
			"	if role == RoleCommand || role == RoleRootless {\n",
			"	if role != RoleSupervisor {\n",
		}},
		tests: []string{"-run ^TestForegroundEnvironment$ ./pool/supervisor"},
	},
	{
		name:  "refused-silently",
		claim: "a connection that a server can't take makes room for another",
		edits: []edit{{
			"pool/ipc/ipc.go",
			"				err = c.SendConn(Refused, id, -1, 0)\n",
			"				err = nil\n",
		}},
		tests: []string{"-run ^TestRefusedByTheServer$ ./pool"},
	},
	{
		name:  "refused-for-good",
		claim: "the supervisor frees what a server has refused",
		edits: []edit{{
			"pool/supervisor/supervisor.go",
			"		sv.forget(id, c)\n		sv.log.Error(\"connection closed",
			"		sv.log.Error(\"connection closed",
		}},
		tests: []string{"-run ^TestRefusedConnection$ ./pool/supervisor"},
	},
	{
		name:  "lack-is-leaving",
		claim: "only the end of its stream is a client's leaving",
		edits: []edit{{
			"pool/wait.go",
			"	case errno == unix.EAGAIN, errno == unix.EINTR, errno == unix.ENOMEM, errn" +
				"o == unix.ENOBUFS:\n",
			"	case errno == unix.EAGAIN:\n",
		}},
		tests: []string{"-run ^TestReceived$ ./pool"},
	},
	{
		name:  "log-into-connection",
		claim: "no line of the log goes to a client",
		edits: []edit{{
			"pool/supervisor/command.go",
			"st.Dev == log.Dev && st.Ino == log.Ino",
			"false",
		}},
		tests: []string{"-run ^TestConnectionIsLog$ ./pool/supervisor"},
	},
	{
		name:  "hang-up-renews",
		claim: "a supervisor ends with the terminal that it was started at",
		edits: []edit{{
			"pool/supervisor/terminal.go",
			"	if !terminal {\n",
			"	if true {\n",
		}},
		tests: []string{"-run ^TestTerminalHangsUp$ ./pool/supervisor"},
	},
	{
		name:  "devices",
		claim: "the server's mounts have no devices",
		edits: []edit{{
			"ops/sandbox/mounts.go",
			"unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV |",
			"unix.MOUNT_ATTR_NOSUID |",
		}},
		tests: []string{"-run ^TestNamespaces$ ./ops/sandbox"},
	},
	{
		name:  "old-root",
		claim: "the server sees no other mount",
		edits: []edit{{
			"ops/sandbox/mounts.go",
			"		{\"unmount all but the export\", func() error { return unix.Unmount(\".\", " +
				"unix.MNT_DETACH) }},\n",
			"",
		}},
		tests: []string{"-run ^TestNamespaces$ ./ops/sandbox"},
	},
	{
		name:  "capability",
		claim: "the server has seven capabilities",
		edits: []edit{{
			"ops/sandbox/caps.go",
			"cap.SETUID, cap.MKNOD,\n",
			"cap.SETUID, cap.MKNOD, cap.SYS_ADMIN,\n",
		}},
		tests: []string{"-run ^TestThreads$ ./ops/sandbox"},
	},
	{
		name:  "supplementary-groups",
		claim: "no process keeps a group that its starter had",
		edits: []edit{{
			"ops/sandbox/caps.go",
			"	if !keepsGroups() {\n",
			"	if false {\n",
		}},
		tests: []string{"-run ^TestThreads$ ./ops/sandbox"},
	},
	{
		name:  "ids-outside",
		claim: "with map: the server has these ids alone",
		edits: []edit{{
			"ops/sandbox/idmaps.go",
			"{ return c.UIDs != nil || c.GIDs != nil }",
			"{ return false }",
		}},
		tests: []string{"-run ^TestMapWalls$ ./ops"},
	},
	{
		name:  "one-kind",
		claim: "map: for groups alone is a wall for groups",
		edits: []edit{{
			"ops/sandbox/idmaps.go",
			"{ return c.UIDs != nil || c.GIDs != nil }",
			"{ return c.UIDs != nil }",
		}},
		tests: []string{"-run ^TestTranslateOneKind$ ./ops"},
	},
	{
		name:  "users-without-root",
		claim: "where the guest has no root, its users have no capabilities either",
		edits: []edit{{
			"ops/credentials.go",
			"		errno = capset(&noCaps)\n",
			"",
		}},
		tests: []string{"-run ^TestTranslateWithoutRoot$ ./ops"},
	},
	{
		name:  "groups-into-namespace",
		claim: "with map: the server has no group of its starter, without a sandbox either",
		edits: []edit{{
			"ops/sandbox/idmaps.go",
			"		NoSetGroups: keepsGroups(),\n",
			"		NoSetGroups: true,\n",
		}},
		tests: []string{"-run ^TestMappedWithoutSandbox$ ./ops/sandbox"},
	},
	{
		name:  "network",
		claim: "the server has no network",
		edits: []edit{{
			"ops/sandbox/mounts.go",
			"unix.CLONE_NEWNS | unix.CLONE_NEWNET |",
			"unix.CLONE_NEWNS |",
		}},
		tests: []string{"-run ^TestNamespaces$ ./ops/sandbox"},
	},
	{
		name:  "bounded-start",
		claim: "a server that hangs at its start is given up",
		edits: []edit{{
			"pool/supervisor/child.go",
			"	late := time.AfterFunc(StartTime,",
			"	late := time.AfterFunc(1000*StartTime,",
		}},
		tests: []string{"-run ^TestRenewedBySilence$ ./pool"},
	},
}
