"""What frees a mount whose process was killed at the wrong moment.

When a process ends, its /dev/fuse is closed, and the kernel fails every request on the mount with ENOTCONN. But during a checkpoint
a thread of it may be inside the kernel, waiting for a page that only the process itself could have written back. Killed there,
it keeps /dev/fuse open for ever, and whoever touches the mount hangs with it. So a small process without that file watches, and
aborts the connection when the main thread of the daemon dies.

It does so through the FUSE control file system, where that is mounted. Else, as root, through a forced unmount, which aborts the
connection before anything else: in a mount namespace of the watchdog's own, which has a copy of the mount. So the mount stays where
it is, dead, and nothing keeps it busy: whoever unmounts it next succeeds at once.
"""

import ctypes
import os
import re
import signal
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_MNT_FORCE: Final = 1  # umount(2)
_CLONE_NEWNS: Final = 0x00020000  # unshare(2)
_MS_REC: Final = 1 << 14  # mount(2)
_MS_PRIVATE: Final = 1 << 18
_DEATH: Final = signal.SIGUSR1

_libc = ctypes.CDLL(None, use_errno=True)


class Watchdog:
    """Made before anything that it must not keep open: it is a fork of the process that it watches, which has one thread yet."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _watch(reader, parent)
            finally:
                os._exit(0)
        os.close(reader)

    def guard(self, mountpoint: Path) -> None:
        """The mount is there now; this is the one to abort."""
        devices = [device for device, path in _mounts() if path == os.fsencode(mountpoint)]
        if devices:
            os.write(self._writer, devices[-1])

    def dismiss(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._writer)


def _watch(reader: int, parent: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _libc.prctl(_PR_SET_PDEATHSIG, _DEATH)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, reader)
    os.closerange(reader + 1, os.sysconf("SC_OPEN_MAX"))
    device = os.read(reader, 64)
    if device and os.getppid() == parent:
        signal.sigwait({_DEATH})
    if device:
        abort(device)


def abort(device: bytes) -> None:
    """Have the kernel fail every request on the mount of a device (major:minor), which stays; this process is to end then."""
    try:
        Path(f"/sys/fs/fuse/connections/{device.split(b':')[1].decode()}/abort").write_text("1")
    except OSError:
        if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
            return  # not root
        for mounted, path in _mounts():
            if mounted == device:
                _libc.umount2(path, _MNT_FORCE)


def _mounts() -> list[tuple[bytes, bytes]]:
    """The device number (major:minor) and the path of every mount, as in proc(5), mountinfo."""
    fields = (line.split(b" ") for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n") if line)
    return [(field[2], re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), field[4])) for field in fields]
