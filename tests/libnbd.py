"""libnbd as a client, to read and write with."""

import os
import select
import struct
import subprocess

from harness import SECONDS

SYSTEM = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""Where nbdsh finds its own Python, which has the module nbd."""


class Nbd:
    """A client of an NBD export: libnbd in a process of its own, since it is a module of the system's Python.

    A request that fails raises OSError with libnbd's errno.
    """

    _REQUEST = struct.Struct("<5sQQ")
    _PROGRAM = """
import struct, sys
take, put = sys.stdin.buffer.read, sys.stdout.buffer
while request := take(21):
    name, offset, length = struct.unpack("<5sQQ", request)
    data, error = b"", 0
    try:
        if name == b"write":
            h.pwrite(take(length), offset)
        elif name == b"fuawr":
            h.pwrite(take(length), offset, nbd.CMD_FLAG_FUA)
        elif name == b"trims":
            h.trim(length, offset)
        elif name == b"zeros":
            h.zero(length, offset)
        elif name == b"keeps":
            h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE)
        elif name == b"flush":
            h.flush()
        elif name == b"reads":
            data = b"".join(h.pread(min(1 << 20, offset + length - at), at) for at in range(offset, offset + length, 1 << 20))
        elif name == b"bytes":
            data = struct.pack("<Q", h.get_size())
        elif name == b"fixed":
            data = bytes([h.is_read_only()])
    except nbd.Error as failed:
        error = failed.errnum or 5
    put.write(struct.pack("<IQ", error, len(data)) + data)
    put.flush()
"""

    def __init__(self, uri: str) -> None:
        command = ["nbdsh", "-u", uri, "-c", self._PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=SYSTEM)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            (self.size,) = struct.unpack("<Q", self._ask(b"bytes"))
        except BaseException:
            self.close()
            raise

    def _take(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            readable, _, _ = select.select([self._replies], [], [], SECONDS)
            assert readable, "the NBD server does not answer"
            more = self._replies.read(min(length - len(data), 1 << 20))
            assert more, "nbdsh has ended"
            data += more
        return bytes(data)

    def _ask(self, name: bytes, offset: int = 0, length: int = 0, data: bytes = b"") -> bytes:
        message = memoryview(self._REQUEST.pack(name, offset, length) + data)
        while message:
            message = message[self._requests.write(message) :]
        error, size = struct.unpack("<IQ", self._take(12))
        if error:
            raise OSError(error, os.strerror(error))
        return self._take(size)

    @property
    def is_read_only(self) -> bool:
        return self._ask(b"fixed") == b"\1"

    def read(self, offset: int, length: int) -> bytes:
        return self._ask(b"reads", offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._ask(b"fuawr" if fua else b"write", offset, len(data), data)

    def trim(self, offset: int, length: int) -> None:
        self._ask(b"trims", offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._ask(b"zeros" if may_unmap else b"keeps", offset, length)

    def flush(self) -> None:
        self._ask(b"flush")

    def content(self) -> bytes:
        return self._ask(b"reads", 0, self.size)

    def close(self) -> None:
        for stream in (self._requests, self._replies):
            stream.close()
        try:
            self._process.wait(timeout=SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
