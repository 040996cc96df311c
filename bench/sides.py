"""What is compared: replfs in each of its roles, and QEMU in the same ones. Each side is a directory with a disk, and processes.

A side's ``file`` shows a disk, its ``uri`` is an NBD export. Work is measured by :mod:`bench.load`, which knows no more than
that. Everything is started with the options that a user would give who wants speed and no more than safety from a killed process.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPLFS = str(Path(sys.executable).with_name("replfs"))
_PATIENCE = 60.0  # seconds


class BenchError(Exception):
    """Something that is to be measured does not work; one line."""


def wait_until(condition: Callable[[], bool], what: str, every: float = 0.005) -> None:
    """Poll. Raises BenchError."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {_PATIENCE:.0f} seconds")
        time.sleep(every)


class Side(ABC):
    """``folder`` is its own, and removed at the end; ``disk`` is there already."""

    file: Path
    uri: str

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder = folder
        self.disk = disk
        folder.mkdir()

    @abstractmethod
    def start(self) -> None:
        """From nothing: whatever overlays there were are gone."""

    @abstractmethod
    def stop(self) -> None:
        """The processes have ended."""

    def checkpoint(self) -> None:
        """Have empty overlays."""
        self.stop()
        self.start()

    def overlay_bytes(self, layer: str) -> int:
        """Bytes of the file system that an overlay takes."""
        return sum(found.stat().st_blocks * 512 for found in self.folder.rglob(f"{layer}*.qcow2"))


def _socket_uri(path: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={path}"


# replfs


class Replfs(Side):
    """One mount."""

    command: tuple[str, ...]

    def __init__(self, folder: Path, disk: Path) -> None:
        super().__init__(folder, disk)
        self._mount = folder / "mnt"
        self._mount.mkdir()
        self._state = folder / "state"
        self.file = self._mount / "disk.img"

    def _start(self, *arguments: str) -> None:
        shutil.rmtree(self._state, ignore_errors=True)
        self.mount(*arguments)

    def mount(self, *arguments: str) -> None:
        command = [REPLFS, arguments[0], str(self.disk), str(self._mount), "--state-dir", str(self._state), *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(done.stderr.strip())

    def stop(self) -> None:
        subprocess.run([REPLFS, "umount", str(self._mount)], check=True, capture_output=True)

    def control(self, name: str) -> None:
        os.setxattr(self._mount, f"user.replfs.{name}", b"1")

    def status(self) -> dict[str, Any]:
        found = json.loads(os.getxattr(self._mount, "user.replfs.status"))
        assert isinstance(found, dict)
        return found

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        resident_pages = Path(f"/proc/{self.status()['pid']}/statm").read_text().split()[1]
        return int(resident_pages) * os.sysconf("SC_PAGESIZE")


class ReplfsSecondary(Replfs):
    durability = "process"

    def start(self) -> None:
        self.uri = _socket_uri(self.folder / "nbd", "disk")
        self._start(*self.arguments())

    def arguments(self) -> tuple[str, ...]:
        return "secondary", "--listen", f"unix:{self.folder / 'nbd'}", "--durability", self.durability

    def resume(self) -> None:
        """With the overlays that there are."""
        self.mount(*self.arguments())

    def checkpoint(self) -> None:
        self.control("checkpoint")

    def failover(self) -> None:
        self.control("failover")

    def fill_view(self) -> str:
        return str(self.file)

    def committed(self) -> bool:
        return os.getxattr(self._mount, "user.replfs.stage") == b"done"


class DurableReplfsSecondary(ReplfsSecondary):
    durability = "power"


class ReplfsPrimary(Replfs):
    """Forwards to ``target``; without one there is nobody to forward to, and what is written is only tracked."""

    def __init__(self, folder: Path, disk: Path, target: str) -> None:
        super().__init__(folder, disk)
        self._target = target

    def start(self) -> None:
        start = () if self._target else ("--no-start",)
        target = self._target or _socket_uri(self.folder / "nobody", "disk")
        self._start("primary", "--target", target, "--durability", "process", "--initial-sync", "none", *start)
        if self._target:
            wait_until(lambda: self.status()["link"]["state"] == "connected", "the primary's link")


# QEMU


class Qemu(Side):
    """One process of QEMU's, controlled over QMP."""

    program = "qemu-system-x86_64"
    options: tuple[str, ...] = ("-M", "none", "-nodefaults", "-display", "none", "-S")

    def _run(self, *arguments: str) -> None:
        address = self.folder / "qmp"
        address.unlink(missing_ok=True)
        qmp = ("-qmp",) if self.options else ("--chardev", f"socket,id=qmp,path={address},server=on,wait=off", "--monitor")
        where = f"unix:{address},server=on,wait=off" if self.options else "qmp"
        self._process = subprocess.Popen([self.program, *self.options, *qmp, where, *arguments], stdout=subprocess.DEVNULL)
        self._stream = socket.socket(socket.AF_UNIX)
        wait_until(lambda: self._stream.connect_ex(str(address)) == 0, f"{self.program}'s QMP")
        self._lines = self._stream.makefile("rw")
        self._lines.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Raises BenchError."""
        try:
            self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._lines.flush()
            while line := self._lines.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise BenchError(f"{self.program}: {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
        except OSError:
            pass
        raise BenchError(f"{self.program} ended by itself at {command}")

    def hmp(self, line: str) -> None:
        said = self.qmp("human-monitor-command", **{"command-line": line})
        if said:
            raise BenchError(f"{self.program}: {line}: {said.strip()}")

    def stop(self) -> None:
        with suppress(BenchError):
            self.qmp("quit")
        if status := self._let_go():
            raise BenchError(f"{self.program} ended with status {status}")

    def _let_go(self) -> int:
        self._stream.close()
        with suppress(OSError):
            self._lines.close()
        return self._process.wait(timeout=_PATIENCE)

    def has_died(self) -> bool:
        """Whether it has ended, or is just about to, with nobody asking for it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        return self._process.returncode is not None

    def revive(self) -> None:
        """Start it anew when it has died."""
        self._let_go()
        self.start()

    def _make_overlays(self) -> tuple[Path, Path]:
        paths = self.folder / "active.qcow2", self.folder / "hidden.qcow2"
        size = str(self.disk.stat().st_size)
        for path in paths:
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
        return paths


class QemuExport(Qemu):
    """qemu-storage-daemon's FUSE export of active over hidden over the disk: what replfs's mount is in QEMU."""

    program = "qemu-storage-daemon"
    options = ()

    def start(self) -> None:
        active, hidden = self._make_overlays()
        self.file = self.folder / "export"
        self.file.touch()
        self._run(
            *("--blockdev", f"raw,node-name=disk,file.driver=file,file.filename={self.disk}"),
            *("--blockdev", f"qcow2,node-name=hidden,file.driver=file,file.filename={hidden},backing=disk"),
            *("--blockdev", f"qcow2,node-name=active,file.driver=file,file.filename={active},backing=hidden"),
            *("--export", f"fuse,id=export,node-name=active,mountpoint={self.file},writable=on"),
        )
        wait_until(lambda: self.file.stat().st_size == self.disk.stat().st_size, "the FUSE export")


class QemuSecondary(Qemu):
    """Driver replication in mode secondary; the view is an NBD export of its own."""

    def start(self) -> None:
        active, hidden = self._make_overlays()
        self.uri = _socket_uri(self.folder / "nbd", "disk")
        self._view = _socket_uri(self.folder / "nbd", "view")
        self._run(
            *("-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={self.disk}"),
            "-drive",
            "if=none,id=top,node-name=view,driver=replication,mode=secondary,top-id=top"
            f",file.driver=qcow2,file.file.filename={active}"
            f",file.backing.driver=qcow2,file.backing.file.filename={hidden},file.backing.backing=disk",
        )
        self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.folder / "nbd")}})
        self.qmp("nbd-server-add", device="disk", writable=True)
        self.qmp("block-export-add", type="nbd", id="view", **{"node-name": "view", "name": "view", "writable": True})
        self.qmp("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        self.qmp("xen-colo-do-checkpoint")

    def failover(self) -> None:
        self.qmp("xen-set-replication", enable=False, primary=False, failover=True)

    def fill_view(self) -> str:
        return self._view

    def committed(self) -> bool:
        nodes = {node["node-name"]: node["image"]["filename"] for node in self.qmp("query-named-block-nodes")}
        return "active.qcow2" not in nodes["view"]


class QemuPrimary(Qemu):
    """Quorum of the disk and, over driver replication, ``target``; the view is a FUSE export."""

    def __init__(self, folder: Path, disk: Path, target: Path) -> None:
        super().__init__(folder, disk)
        self._target = target

    def start(self) -> None:
        self.file = self.folder / "export"
        self.file.touch()
        self._run(
            "-drive",
            "if=none,id=primary,node-name=colo,driver=quorum,read-pattern=fifo,vote-threshold=1"
            f",children.0.driver=raw,children.0.file.filename={self.disk}",
        )
        self.hmp(
            "drive_add -n buddy driver=replication,mode=primary,node-name=target,file.driver=nbd"
            f",file.server.type=unix,file.server.path={self._target},file.export="
        )
        self.qmp("x-blockdev-change", parent="colo", node="target")
        self.qmp("xen-set-replication", enable=True, primary=True)
        self.qmp("block-export-add", type="fuse", id="f", writable=True, **{"node-name": "colo", "mountpoint": str(self.file)})
        wait_until(lambda: self.file.stat().st_size == self.disk.stat().st_size, "the FUSE export")


# What both forward to, and what nothing is faster than


class Target(Side):
    """An NBD server that forgets what it is sent, so that it costs as little as one can."""

    def start(self) -> None:
        self.socket = self.folder / "nbd"
        self.socket.unlink(missing_ok=True)
        self.uri = _socket_uri(self.socket, "")
        size = self.disk.stat().st_size
        self._process = subprocess.Popen(["nbdkit", "-f", "-t", "1", "-U", str(self.socket), "null", str(size)])
        wait_until(self.socket.exists, "nbdkit")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=_PATIENCE)


class PlainFile(Side):
    """The disk itself, in the local file system."""

    def start(self) -> None:
        self.file = self.disk

    def stop(self) -> None:
        """Nothing runs."""
