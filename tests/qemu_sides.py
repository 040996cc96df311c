"""QEMU's own block replication as one side of a test: real processes of it, driven over QMP.

What QEMU says on standard error is read at the end of each test: what the test did not expect fails it, as does an exit status.
The commands are those of QEMU's documentation (COLO-FT), with unix sockets. Nothing here waits without a bound.

This module cannot be called qemu: the package that speaks QMP is.
"""

import asyncio
import re
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from disks import qemu_img
from harness import SECONDS, wait_for
from libnbd import Nbd
from qemu.qmp import QMPClient, QMPError

QEMU = ("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S")

T = TypeVar("T")


class Monitor:
    """A connection to QEMU's QMP."""

    def __init__(self, address: str | socket.socket) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._client = QMPClient()
        try:
            self._await(self._client.connect(address))
        except BaseException:
            self._runner.close()
            raise

    def _await(self, asked: Awaitable[T]) -> T:
        return self._runner.run(asyncio.wait_for(asked, SECONDS))

    def execute(self, command: str, **arguments: Any) -> Any:
        """Raises qemu.qmp's ExecuteError with QEMU's message. Underscores in the names of arguments stand for hyphens."""
        return self._await(self._client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()}))

    def until_event(self, name: str, condition: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
        """Wait for an event, and give its data. The events before it are gone then."""

        async def find() -> dict[str, Any]:
            async for event in self._client.events:
                data: Any = event["data"]
                if event["event"] == name and condition(data):
                    return dict(data)
            raise AssertionError("the events have ended")

        return self._await(find())

    def close(self) -> None:
        try:
            self._await(self._client.disconnect())
        except (QMPError, EOFError, OSError):
            pass  # QEMU may have been the first
        finally:
            self._runner.close()


class Qemu:
    """One process, with an NBD server of its own on a unix socket. Its standard error goes to a file.

    QMP is a pair of sockets: nobody waits for QEMU to listen.
    """

    def __init__(self, folder: Path, disk: Path, *arguments: str) -> None:
        self.disk = disk
        self.socket = folder / "qemu.sock"
        self.expected: list[str] = []
        """Patterns of what it may say in this test."""
        self._clients: list[Nbd] = []
        self._log = folder / "qemu.log"
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            qmp = ("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control")
            command = [*QEMU, *qmp, *arguments]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()])
        try:
            self.monitor = Monitor(ours)
        except BaseException as error:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"QEMU does not start: {self._log.read_text()}") from error

    def qmp(self, command: str, **arguments: Any) -> Any:
        return self.monitor.execute(command, **arguments)

    def hmp(self, line: str) -> None:
        """A command of the human monitor, which says nothing when it has worked."""
        said = self.qmp("human-monitor-command", command_line=line)
        assert not said, f"{line}: {said}"

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def open(self, export: str) -> Nbd:
        self._clients.append(Nbd(self.uri(export)))
        return self._clients[-1]

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def replication_error(self) -> bool:
        """Whether replication has met an error since it was started: the only way in which QEMU shows one."""
        return bool(self.qmp("query-xen-replication-status")["error"])

    def quit(self) -> None:
        while self._clients:
            self._clients.pop().close()
        if self.is_running:
            self.qmp("quit")
        self.monitor.close()
        assert self._process.wait(timeout=SECONDS) == 0, self._log.read_text()

    def clean_up(self) -> list[str]:
        """End it if it runs; returns what it should not have said or done."""
        problems = []
        if self._process.returncode is None:
            try:
                self.quit()
            except Exception as error:
                problems.append(f"does not quit: {error!r}, exit status {self._process.poll()}")
                self._process.kill()
                self._process.wait()
        said = self._log.read_text().splitlines()
        problems += [line for line in said if not any(re.search(pattern, line) for pattern in self.expected)]
        return [f"QEMU: {problem}" for problem in problems]


class QemuSecondary(Qemu):
    """Driver replication in mode secondary. Its exports: ``disk``, for a primary, and ``view``, for its machine."""

    def __init__(self, folder: Path, disk: Path, disk_format: str = "raw") -> None:
        size = str(virtual_size(disk, disk_format))
        active, hidden = folder / "active.qcow2", folder / "hidden.qcow2"
        for overlay in (active, hidden):
            qemu_img("create", "-q", "-f", "qcow2", overlay, size)
        super().__init__(
            folder,
            disk,
            *("-drive", f"if=none,id=disk,driver={disk_format},file.filename={disk}"),
            "-drive",
            "if=none,id=top,node-name=view,driver=replication,mode=secondary,top-id=top"
            f",file.driver=qcow2,file.file.filename={active}"
            f",file.backing.driver=qcow2,file.backing.file.filename={hidden},file.backing.backing=disk",
        )

    def serve(self) -> None:
        """Start its exports and replication."""
        self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.socket)}})
        self.qmp("nbd-server-add", device="disk", writable=True)
        self.export_view()
        self.qmp("xen-set-replication", enable=True, primary=False)

    def export_view(self) -> None:
        self.qmp("block-export-add", type="nbd", id="view", node_name="view", name="view", writable=True)

    def checkpoint(self) -> None:
        self.qmp("xen-colo-do-checkpoint")

    def failover(self) -> None:
        """The commit has begun. Nothing else keeps a primary from writing on: its export has to be removed."""
        self.qmp("block-export-del", id="disk", mode="hard")
        self.qmp("xen-set-replication", enable=False, primary=False, failover=True)

    def until_committed(self) -> None:
        def is_committed() -> bool:
            nodes = {node["node-name"]: node["image"]["filename"] for node in self.qmp("query-named-block-nodes")}
            return "active.qcow2" not in nodes["view"]

        wait_for(is_committed, "QEMU's commit")


class QemuPrimary(Qemu):
    """A quorum, export ``disk``, that reads from its disk and writes to all its children. At first there is the disk only."""

    def __init__(self, folder: Path, disk: Path) -> None:
        super().__init__(
            folder,
            disk,
            "-drive",
            "if=none,id=colo-disk0,node-name=colo,driver=quorum,read-pattern=fifo,vote-threshold=1"
            f",children.0.driver=raw,children.0.file.filename={disk}",
        )

    def serve(self) -> None:
        """Start its export."""
        self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.socket)}})
        self.qmp("block-export-add", type="nbd", id="disk", node_name="colo", name="disk", writable=True)

    def replicate(self, target: Path) -> None:
        """To the export ``disk`` on a unix socket, through driver replication, which hides errors."""
        self.hmp(
            "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd"
            f",file.path={target},file.export=disk,node-name=replication0"
        )
        self.qmp("x-blockdev-change", parent="colo-disk0", node="replication0")
        self.qmp("xen-set-replication", enable=True, primary=True)

    def open_target(self, target: Path) -> None:
        self.qmp("blockdev-add", driver="nbd", node_name="nbd0", server={"type": "unix", "path": str(target)}, export="disk")

    def copy_writes(self, target: Path) -> None:
        """The same without driver replication: the NBD client itself is the quorum's second child."""
        self.open_target(target)
        self.qmp("x-blockdev-change", parent="colo-disk0", node="nbd0")

    def until_mirrored(self) -> None:
        """The job ``resync`` has sent everything; from now on it sends what is written."""
        self.monitor.until_event("BLOCK_JOB_READY", lambda data: data["device"] == "resync")

    def end_mirror(self) -> None:
        """Cancelled when it is ready, a mirror leaves the copy complete. Nobody may write until the quorum has its second child."""
        self.qmp("stop")
        self.qmp("block-job-cancel", device="resync")
        self.monitor.until_event("BLOCK_JOB_COMPLETED", lambda data: data["device"] == "resync")


def virtual_size(disk: Path, disk_format: str) -> int:
    found = re.search(r'"virtual-size": (\d+)', qemu_img("info", "--output=json", "-f", disk_format, disk))
    assert found
    return int(found[1])


class Qemus:
    """Makes the QEMUs of one test, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[Qemu] = []

    def _disk(self, disk: bytes | Path) -> tuple[Path, Path]:
        folder = self._folder / f"qemu{len(self.all)}"
        folder.mkdir()
        if isinstance(disk, bytes):
            (folder / "disk.raw").write_bytes(disk)
            disk = folder / "disk.raw"
        return folder, disk

    def primary(self, disk: bytes | Path) -> QemuPrimary:
        made = QemuPrimary(*self._disk(disk))
        self.all.append(made)
        made.serve()
        return made

    def secondary(self, disk: bytes | Path, disk_format: str = "raw") -> QemuSecondary:
        made = QemuSecondary(*self._disk(disk), disk_format)
        self.all.append(made)
        made.serve()
        return made

    def clean_up(self) -> None:
        problems = [problem for made in reversed(self.all) for problem in made.clean_up()]
        assert not problems, "\n".join(problems)
