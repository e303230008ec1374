package main

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"

	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/codec"
)

// record stands between QEMU, which connects to listen, and the helper on
// socket: it passes on requests, answers and descriptors and writes them to a
// trace. It ends with QEMU's connection, or with ctx.
func record(ctx context.Context, file, listen, socket string) (err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: listen, Net: "unix"})
	if err != nil {
		return err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	vm, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	defer vm.Close()
	helper, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer helper.Close()
	defer context.AfterFunc(ctx, func() { vm.Close() })()
	trace, err := createTrace(file)
	if err != nil {
		return err
	}
	err = pass(vm, helper, trace)
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		err = nil // that is how recordings end
	}
	return errors.Join(err, trace.close())
}

// pass passes on one request after the other, each with its answer. The error
// is io.EOF if QEMU has left between two requests.
func pass(vm, helper *net.UnixConn, trace *traceWriter) error {
	buf, oob := make([]byte, codec.MaxFrame), make([]byte, 64)
	for {
		if _, err := io.ReadFull(vm, buf[:codec.HeaderSize]); err != nil {
			return err
		}
		t, size, err := codec.ParseHeader(buf)
		if err != nil {
			return err
		}
		n := codec.HeaderSize + size
		if _, err := io.ReadFull(vm, buf[codec.HeaderSize:n]); err != nil {
			return err
		}
		if _, err = helper.Write(buf[:n]); err == nil {
			err = trace.line(">", buf[:n])
		}
		if err != nil {
			return err
		}
		n, rights, kind := 4, 0, "<"
		if t.AnswersFD() {
			var got int
			if got, rights, _, _, err = helper.ReadMsgUnix(buf[:4], oob); err == nil && got != 4 {
				err = io.ErrUnexpectedEOF
			}
			if rights > 0 {
				kind = "<fd"
			}
		} else if _, err = io.ReadFull(helper, buf[:codec.HeaderSize]); err == nil {
			n = codec.HeaderSize + int(binary.NativeEndian.Uint32(buf[4:]))
			if n > len(buf) {
				return codec.ErrSize
			}
			_, err = io.ReadFull(helper, buf[codec.HeaderSize:n])
		}
		if err != nil {
			return err
		}
		if err = trace.line(kind, buf[:n]); err != nil {
			return err
		}
		if _, _, err = vm.WriteMsgUnix(buf[:n], oob[:rights], nil); err != nil {
			return err
		}
		qemu.CloseRights(oob[:rights])
	}
}
