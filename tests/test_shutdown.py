"""The ends that a user asks for: signals and unmounts, however busy a volume is.

A SIGTERM or SIGINT ends it within seconds, whatever is under way, with nothing in the log but that; the next mount resumes the very
same view. An unmount of what is in use is refused. Whatever was acknowledged is there afterwards (see storm.py).
"""

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice

import pytest
from harness import REPLFS, Sides, run, wait_for
from storm import SECTOR, Crowd, Secondary, at_random, in_foreground, is_mounted

SIZE = (16 << 20) + 5 * SECTOR
SOON = 15.0
"""Seconds that an end may take, on a machine that has other things to do as well."""
TOO_LATE = "failed: the volume is being unmounted"
"""What is logged of a control operation that comes after the signal."""
EXPECTED = (1, 108)  # EPERM: a forwarded write after a failover; ESHUTDOWN: a control operation after the signal

pytestmark = pytest.mark.timeout(1200)  # at full length; each wait has a bound of its own


class Daemon:
    """A secondary's daemon, in either form."""

    def __init__(self, secondary: Secondary, how: str) -> None:
        self._side = secondary.side
        self._how = how
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """It is mounted in the background: have it in the form that is wanted."""
        if self._how == "background":
            return
        self._side.umount()
        self._process = in_foreground(self._side)
        wait_for(lambda: is_mounted(self._side.point) or self._process.poll() is not None, "the mount")
        self._side.pid = self._side.status()["pid"]
        assert self._side.pid == self._process.pid

    def end(self, *signals: signal.Signals, rng: random.Random) -> None:
        """Signal it; it ends soon and cleanly, and the mount with it."""
        begun = time.monotonic()
        process = os.pidfd_open(self._side.pid)
        for number in signals[:-1]:
            signal.pidfd_send_signal(process, number)
            at_random(rng, 0.1)
        with contextlib.suppress(ProcessLookupError):
            self._side.signal(signals[-1])
        os.close(process)
        took = time.monotonic() - begun
        assert took < SOON, f"{took:.1f} seconds"
        self._side.pid = 0
        said = self._said()
        assert "Traceback" not in said
        assert "ended: the stage is" in said.splitlines()[-1]
        assert not is_mounted(self._side.point)
        assert os.listdir(self._side.point) == []

    def _said(self) -> str:
        """All of its log. In the foreground also: its exit status is 0."""
        if self._process is None:
            return (self._side.state_dir / "replfs.log").read_text()
        said, _ = self._process.communicate(timeout=SOON)
        assert self._process.returncode == 0, said
        warned = [line for line in said.splitlines() if re.search("WARNING|ERROR|Exception", line)]
        assert all(TOO_LATE in line for line in warned), said
        self._process = None
        return said


class Ends:
    """The rounds of a secondary that is ended by signals under load."""

    def __init__(self, sides: Sides, how: str, disk_format: str) -> None:
        self.rng = random.Random(f"{how} {disk_format}")
        self.secondary = Secondary(sides, disk_format, SIZE)
        self.daemon = Daemon(self.secondary, how)
        self.secondary.side.expected = [TOO_LATE]
        self.secondary.side.mount()
        self.rounds = 0

    def round(self, aim: str, *signals: signal.Signals) -> None:
        self.daemon.start()
        with self.secondary.writers(self.rng) as crowd:
            self.secondary.reach(crowd, aim, self.rng)
            self.daemon.end(*signals, rng=self.rng)
            crowd.ended(expected=EXPECTED)
            self.secondary.look_at_images(leaks=False)
            self.secondary.side.mount()
            self.secondary.settle(crowd)
        self.rounds += 1


@pytest.mark.parametrize(
    ("how", "number", "first"),
    [
        ("foreground", signal.SIGTERM, 0),
        ("foreground", signal.SIGINT, 1),
        ("background", signal.SIGTERM, 3),
        ("background", signal.SIGINT, 0),
    ],
)
def test_a_signal_ends_it_cleanly(
    sides: Sides, full: bool, tally: Callable[[str, int], None], how: str, number: signal.Signals, first: int
) -> None:
    """``first``: the aim to begin with, so that the short form has them all."""
    ends = Ends(sides, how, "raw" if number is signal.SIGTERM else "qcow2")
    for aim in islice(cycle(["failover", "checkpoint", "writes", "done", "checkpoint"]), first, first + (25 if full else 2)):
        ends.round(aim, number)
    tally("signal", ends.rounds)


@pytest.mark.parametrize("how", ["foreground", "background"])
def test_a_second_signal_changes_nothing(sides: Sides, full: bool, tally: Callable[[str, int], None], how: str) -> None:
    """As of somebody who presses Ctrl-C again, because it takes so long."""
    ends = Ends(sides, how, "raw")
    for aim in islice(cycle(["writes", "checkpoint", "failover"]), 15 if full else 3):
        ends.round(aim, *ends.rng.choices([signal.SIGTERM, signal.SIGINT], k=ends.rng.choice((2, 2, 3))))
    tally("signal", ends.rounds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_changes_nothing(
    sides: Sides, full: bool, tally: Callable[[str, int], None], number: signal.Signals
) -> None:
    """From when it listens on its address on: it goes on to its end, or gives its start up."""
    secondary = Secondary(sides, "raw", SIZE)
    side, rng = secondary.side, random.Random(number)
    side.expected = [TOO_LATE]
    side.mount()
    with secondary.writers(rng) as crowd:
        secondary.reach(crowd, "failover", rng)
        side.signal(number)
        crowd.ended(expected=EXPECTED)
        rounds = 40 if full else 3
        for _ in range(rounds):
            process = in_foreground(side)
            wait_for(secondary.socket.exists, "the address")
            at_random(rng, 0.05)
            process.send_signal(number)
            said, _ = process.communicate(timeout=SOON)
            assert (process.returncode == 0 and "ended: the stage is" in said) or (
                process.returncode == 1 and "interrupted before the file could be used" in said
            ), said
            assert not any(word in said for word in ("WARNING", "Exception", "Traceback")), said
            assert not is_mounted(side.point)
        side.mount()
        secondary.settle(crowd)
    tally("signal", rounds)


@pytest.mark.parametrize("command", [[REPLFS, "umount"], ["umount"]])
def test_an_unmount_of_what_is_in_use_is_refused(
    sides: Sides, full: bool, tally: Callable[[str, int], None], command: list[str]
) -> None:
    """Then the writers go on. When they have ended it is not."""
    secondary = Secondary(sides, "raw", SIZE)
    side, rng = secondary.side, random.Random(3)
    side.mount()
    with secondary.writers(rng) as crowd:
        crowd.until_busy()
        crowd.take_checkpoints(side.file, 10)
        rounds = 30 if full else 3
        for _ in range(rounds):
            refused = run(*command, side.point, check=False)
            assert refused.returncode != 0
            assert "busy" in refused.stderr
        crowd.until_busy()
        crowd.kill()
        wait_for(lambda: side.status()["connections"] == 0, "the end of the connections")
        secondary.settle(crowd)
    side.umount()
    assert not is_mounted(side.point)
    side.mount()
    secondary.settle(Crowd(sides.folder, SIZE, rng))  # nobody has written since
    tally("signal", rounds)


@pytest.mark.parametrize("command", [[REPLFS, "umount"], ["umount"]])
def test_an_unmount_under_load_over_the_network_loses_nothing(
    sides: Sides, full: bool, tally: Callable[[str, int], None], command: list[str]
) -> None:
    """Nobody has the file open, so it ends, unless a checkpoint has it busy just then; ``replfs umount`` returns when it has."""
    secondary = Secondary(sides, "qcow2", SIZE)
    side, rng = secondary.side, random.Random(4)
    side.expected = [TOO_LATE]
    side.mount()
    rounds = 15 if full else 2
    for _ in range(rounds):
        with secondary.writers(rng, view=False) as crowd:
            secondary.reach(crowd, rng.choice(("checkpoint", "failover", "writes")), rng, checkpoints=50)
            process = os.pidfd_open(side.pid)
            wait_for(lambda: run(*command, side.point, check=False).returncode == 0, "an unmount")
            ended, _, _ = select.select([process], [], [], 0 if command[0] == REPLFS else SOON)
            assert ended, "the daemon is still there"
            os.close(process)
            crowd.ended(expected=EXPECTED)
            secondary.look_at_images(leaks=False)
            side.mount()
            secondary.settle(crowd)
    tally("signal", rounds)


SIGNALLED_AT_THE_END_OF_THE_START = """
import os, signal, threading, time
from replfs.cli.main import main
from replfs.volume.state import StateDirectory

plain = StateDirectory.remove_leftovers


def signalled(self, *keep):
    plain(self, *keep)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)


StateDirectory.remove_leftovers = signalled
main()
"""


def test_a_signal_in_the_last_moment_of_the_start_is_not_lost(sides: Sides) -> None:
    """While the start waits for a thread, after which it never waits again."""
    side = sides.secondary(SIZE)
    side.umount()
    command = [sys.executable, "-c", SIGNALLED_AT_THE_END_OF_THE_START, side.mode, side.disk, side.point, *side.arguments, "-f"]
    done = run(*command, check=False, timeout=SOON, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, capture_output=False)
    assert "ended: the stage is running" in done.stdout or "interrupted before" in done.stdout, done.stdout
    assert not is_mounted(side.point)
