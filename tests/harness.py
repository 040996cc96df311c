"""Real daemons and real mounts, started as a user starts them, for tests that are users.

Whatever a test leaves is removed at its end, and what a daemon logged is read: a warning, an error or a traceback that the test did
not expect fails it. Nothing here waits without a bound, and no test maps a mounted file into this process: a page fault that the
daemon does not answer could not be interrupted.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPLFS = str(Path(sys.executable).with_name("replfs"))
SECONDS = 60
LINK_LOST = ["the link (to .* )?is (given up|lost)", "no link"]
"""What a primary logs whose secondary goes away."""


def run(*command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; unless ``check`` is False an exit status other than 0 fails the test."""
    words = [str(word) for word in command]
    settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": SECONDS, **options}
    done = subprocess.run(words, **settings)
    assert not check or done.returncode == 0, f"{' '.join(words)}: exit status {done.returncode}: {done.stdout}{done.stderr}"
    return done


def replfs(*arguments: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    return run(REPLFS, *arguments, check=check, **options)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Ask again and again, for a bounded time, until the answer is true; gives the answer back."""
    end = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        select.select([], [], [], 0.01)
    return answer


class Side:
    """One volume of a test: its disk, its mount point, and the daemon between two of its mounts."""

    def __init__(self, folder: Path, mode: str, disk: bytes | int | Path, *arguments: str | Path) -> None:
        self.mode = mode
        self.arguments = arguments
        self.point = folder / f"{mode}.mnt"
        self.point.mkdir()
        self.disk = disk if isinstance(disk, Path) else folder / f"{mode}.raw"
        if isinstance(disk, bytes):
            self.disk.write_bytes(disk)
        elif isinstance(disk, int):
            with self.disk.open("wb") as file:
                file.truncate(disk)
        self.file = self.point / "disk.img"
        self.state_dir = Path(f"{self.disk}.replfs")
        self.expected: list[str] = []
        """Patterns of log lines that are no defect in this test."""
        self.pid = 0

    def mount(self, *more: str | Path) -> None:
        done = replfs(self.mode, self.disk, self.point, *self.arguments, *more)
        assert (done.stdout, done.stderr) == ("", "")
        self.pid = self.status()["pid"]

    def get(self, name: str) -> str:
        return os.getxattr(self.file, f"user.replfs.{name}").decode()

    def set(self, name: str, value: str = "1") -> None:
        os.setxattr(self.file, f"user.replfs.{name}", value.encode())

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(os.getxattr(self.point, "user.replfs.status"))
        return status

    def until_stage(self, stage: str) -> None:
        wait_for(lambda: self.get("stage") == stage, f"stage {stage}")

    def until_connected(self) -> None:
        """A primary's copies agree."""
        wait_for(lambda: self.status()["link"]["state"] == "connected", "the link")

    def content(self) -> bytes:
        return self.file.read_bytes()

    def umount(self) -> None:
        replfs("umount", self.point)
        self.pid = 0

    def umount_when_free(self) -> None:
        """As a person does whose program has just been killed: the kernel may use its files (io_uring's) for a moment longer."""

        def unmounted() -> bool:
            done = replfs("umount", self.point, check=False)
            assert done.returncode == 0 or "target is busy" in done.stderr, done.stderr
            return done.returncode == 0

        wait_for(unmounted, "the mount to be free")
        self.pid = 0

    def signal(self, number: signal.Signals) -> None:
        """Signal the daemon and wait until it is gone."""
        process = os.pidfd_open(self.pid)
        signal.pidfd_send_signal(process, number)
        ended, _, _ = select.select([process], [], [], SECONDS)
        os.close(process)
        assert ended, f"the daemon did not end after {number.name}"
        self.pid = 0

    def kill(self) -> None:
        """SIGKILL, and remove the dead mount that it leaves."""
        self.signal(signal.SIGKILL)
        run("umount", self.point)

    def clean_up(self) -> list[str]:
        """Remove what there is; returns what the test should not have left or logged."""
        problems = []
        if self.pid:
            try:
                self.umount_when_free()
            except AssertionError as error:
                problems.append(f"could not be unmounted: {error}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
        if self.point.name in Path("/proc/self/mounts").read_text():
            run("umount", "-l", self.point, check=False)
        for log in self.state_dir.glob("replfs.log*"):
            problems += [
                line
                for line in log.read_text().splitlines()
                if re.search(r"WARNING|ERROR|CRITICAL|Traceback|Exception", line)
                and not any(re.search(p, line) for p in self.expected)
            ]
        return [f"{self.mode}: {problem}" for problem in problems]


class Sides:
    """Makes the sides of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Side] = []
        self.socket = folder / "s.sock"

    def make(self, mode: str, disk: bytes | int | Path, *arguments: str | Path) -> Side:
        side = Side(self.folder, mode, disk, *arguments)
        self.all.append(side)
        return side

    def secondary(self, disk: bytes | int | Path, *more: str | Path) -> Side:
        """A mounted secondary that listens on ``socket``."""
        side = self.make("secondary", disk, "--listen", f"unix:{self.socket}")
        side.mount(*more)
        return side

    def primary(self, disk: bytes | int | Path, *more: str | Path) -> Side:
        """A mounted primary that is linked to ``socket``, whose disk is the same already; what it answers is there, too."""
        target = f"nbd+unix:///disk?socket={self.socket}"
        side = self.make("primary", disk, "--target", target, "--protocol", "sync", "--initial-sync", "none")
        side.mount(*more)
        side.until_connected()
        return side


@pytest.fixture
def sides(tmp_path: Path) -> Any:
    made = Sides(tmp_path)
    yield made
    problems = [problem for side in reversed(made.all) for problem in side.clean_up()]
    assert not problems, "\n".join(problems)
