"""QEMU on either end: its primary writes into replfs's secondary, replfs's primary into its secondary, with its own commands.

And both secondaries side by side: the same random operations, in the same order, have to give the same bytes, which have to be
those of the contract. At full length that is 20,000 operations of each case.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from disks import qemu_img, same
from harness import LINK_LOST, SECONDS, Side, Sides, run, wait_for
from libnbd import Nbd
from qemu.qmp import ConnectError
from qemu_sides import Monitor, QemuPrimary, Qemus
from storm import make_disk

SECTOR = 512
MIB = 1 << 20
SIZE = 4 * MIB + 5 * SECTOR
PAGE = Path(__file__).parents[1] / "docs/qemu.md"

pytestmark = pytest.mark.timeout(1200)  # at full length; each wait has a bound of its own


@pytest.fixture
def qemus(tmp_path: Path) -> Iterator[Qemus]:
    made = Qemus(tmp_path)
    yield made
    made.clean_up()


def content(seed: int, size: int = SIZE) -> bytes:
    """Random bytes, with room between them that was never written."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
    return bytes(data)


def put(model: bytearray, offset: int, data: bytes) -> None:
    model[offset : offset + len(data)] = data


def put_file(side: Side, offset: int, data: bytes) -> None:
    with side.file.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)


class Machine:
    """What writes to QEMU's quorum, and what its disk holds then."""

    def __init__(self, disk: Nbd, before: bytes) -> None:
        self.disk = disk
        self.model = bytearray(before)

    def write(self, offset: int, data: bytes) -> None:
        self.disk.write(offset, data)
        put(self.model, offset, data)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self.disk.write_zeroes(offset, length, may_unmap=may_unmap)
        put(self.model, offset, bytes(length))

    def write_much(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            length = rng.choice((SECTOR, 3 * SECTOR, 4096, 65536, 100 * SECTOR))
            offset = rng.randrange((SIZE - length) // SECTOR + 1) * SECTOR
            if rng.random() < 0.3:
                self.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            else:
                self.write(offset, rng.randbytes(length))
        self.write(SIZE - SECTOR, rng.randbytes(SECTOR))
        self.disk.flush()


# --- QEMU's primary, replfs's secondary -------------------------------------------------------------------------------------------

ATTACH = {"replication": QemuPrimary.replicate, "nbd": QemuPrimary.copy_writes}


@pytest.mark.parametrize("child", list(ATTACH))
def test_what_a_qemu_primary_writes_shows_at_checkpoints_and_after_a_failover(sides: Sides, qemus: Qemus, child: str) -> None:
    before = content(1)
    far = sides.secondary(before)
    near = qemus.primary(before)
    ATTACH[child](near, sides.socket)
    machine = Machine(near.open("disk"), before)
    view = before
    for turn in range(3):
        machine.write_much(turn)
        assert same(far.content(), view)
        assert same(far.disk.read_bytes(), machine.model)
        speculative = random.Random(turn).randbytes(5000)
        put_file(far, 700_001, speculative)
        assert far.content()[700_001:705_001] == speculative  # until the next checkpoint
        far.set("checkpoint")
        view = bytes(machine.model)
        assert same(far.content(), view)
    machine.write_much(4)
    own = bytearray(view)
    for offset, data in ((0, b"own" * 1000), (2 * MIB + 77, b"machine" * 9999)):
        put_file(far, offset, data)
        put(own, offset, data)

    far.set("failover")
    assert same(far.content(), own)
    put_file(far, 3 * MIB, b"while it commits")
    put(own, 3 * MIB, b"while it commits")
    far.until_stage("done")
    assert same(far.content(), own)
    assert same(far.disk.read_bytes(), own)
    near.quit()
    assert same(near.disk.read_bytes(), machine.model)


@pytest.mark.parametrize("child", list(ATTACH))
def test_a_qemu_primary_that_is_fenced_goes_on_alone(sides: Sides, qemus: Qemus, child: str) -> None:
    """Its machine notices nothing, it shows that its copy is none any more, and the secondary gets nothing of what it writes."""
    before = content(1)
    far = sides.secondary(before)
    near = qemus.primary(before)
    ATTACH[child](near, sides.socket)
    machine = Machine(near.open("disk"), before)
    machine.write(MIB, b"+" * SECTOR)
    assert child == "nbd" or not near.replication_error
    put_file(far, 2 * MIB, b"own")
    own = far.content()
    far.set("failover")
    machine.write_much(1)
    far.until_stage("done")
    machine.write_much(2)
    assert same(far.content(), own)
    assert same(far.disk.read_bytes(), own)
    assert same(machine.disk.content(), machine.model)
    if child == "replication":
        assert near.replication_error
    else:
        assert near.monitor.until_event("QUORUM_REPORT_BAD")["node-name"] == "nbd0"
    near.quit()
    assert same(near.disk.read_bytes(), machine.model)


@contextmanager
def rising_numbers(disk: Nbd, blocks: int) -> Iterator[Callable[[int], None]]:
    """Somebody writes 1 into each of so many sectors, in order, then 2, and so on. Gives what waits for so many more rounds."""
    stop = threading.Event()
    rounds = 0

    def write() -> None:
        nonlocal rounds
        while not stop.is_set():
            for block in range(blocks):
                disk.write(block * SECTOR, (rounds + 1).to_bytes(4, "big") * (SECTOR // 4))
            rounds += 1

    def wait(more: int) -> None:
        wanted = rounds + more
        wait_for(lambda: rounds >= wanted or not writer.is_alive(), "the writer")
        assert writer.is_alive()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield wait
    finally:
        stop.set()
        writer.join(SECONDS)
    assert not writer.is_alive()


@pytest.mark.parametrize("child", list(ATTACH))
def test_a_checkpoint_while_qemu_writes_shows_one_moment(sides: Sides, qemus: Qemus, child: str) -> None:
    blocks = 40
    far = sides.secondary(bytes(SIZE))
    near = qemus.primary(bytes(SIZE))
    ATTACH[child](near, sides.socket)
    disk = near.open("disk")
    last = 0
    with rising_numbers(disk, blocks) as wait:
        for _ in range(10):
            wait(1)
            far.set("checkpoint")
            views = {far.content() for _ in range(3)}
            assert len(views) == 1
            view = views.pop()
            numbers = [int.from_bytes(view[i * SECTOR : i * SECTOR + 4], "big") for i in range(blocks)]
            assert numbers == sorted(numbers, reverse=True)
            assert 0 <= numbers[0] - numbers[-1] <= 1
            assert numbers[-1] > last
            last = numbers[-1]
    assert same(far.disk.read_bytes(), disk.content())
    far.set("checkpoint")
    assert same(far.content(), disk.content())


@pytest.mark.parametrize("command", ["drive-mirror", "blockdev-mirror"])
def test_qemu_sends_a_new_secondary_everything_and_then_replicates(sides: Sides, qemus: Qemus, command: str) -> None:
    """Both ways to do so: of the documentation, and with the same NBD client for the mirror and for the quorum."""
    before, stale = content(1), content(2)
    far = sides.secondary(stale)
    near = qemus.primary(before)
    machine = Machine(near.open("disk"), before)
    if command == "drive-mirror":
        target = f"nbd+unix:///disk?socket={sides.socket}"
        near.qmp(command, device="colo-disk0", job_id="resync", target=target, mode="existing", format="raw", sync="full")
    else:
        near.open_target(sides.socket)
        near.qmp(command, device="colo-disk0", job_id="resync", target="nbd0", sync="full")
    machine.write_much(1)
    near.until_mirrored()
    machine.write_much(2)
    near.end_mirror()
    assert same(far.content(), stale)
    assert same(far.disk.read_bytes(), machine.model)
    if command == "drive-mirror":
        near.replicate(sides.socket)
    else:
        near.qmp("x-blockdev-change", parent="colo-disk0", node="nbd0")
    machine.write_much(3)
    assert same(far.content(), stale)
    far.set("checkpoint")
    assert same(far.content(), machine.model)
    assert far.get("generation") == "1"


# --- replfs's primary, QEMU's secondary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["none", "full"])
def test_a_qemu_secondary_takes_what_a_replfs_primary_writes(sides: Sides, qemus: Qemus, first: str) -> None:
    before = content(1)
    old = before if first == "none" else content(2)
    far = qemus.secondary(old)
    far.expected = ["option negotiation failed: .* end-of-file"]  # a primary first asks whether this is a replfs, and then hangs up
    near = sides.make("primary", before, "--target", far.uri("disk"), "--protocol", "sync", "--initial-sync", first)
    near.expected = LINK_LOST
    near.mount()
    near.until_connected()
    view = far.open("view")
    assert same(view.content(), old)
    model = bytearray(before)
    seen = old
    rng = random.Random(first)
    for _ in range(3):
        for _ in range(20):
            length = rng.choice((1, 511, SECTOR, 4096, 70_001))
            data = rng.randbytes(length)
            offset = rng.randrange(SIZE - length)
            put_file(near, offset, data)
            put(model, offset, data)
        view.write(MIB, b"own" * SECTOR)
        now = bytearray(seen)
        put(now, MIB, b"own" * SECTOR)
        assert same(view.content(), now)
        far.checkpoint()
        seen = bytes(model)
        assert same(view.content(), seen)
    put_file(near, 12_345, b"not in any checkpoint")
    own = bytearray(seen)
    view.write(SECTOR, b"m" * 70 * SECTOR)
    put(own, SECTOR, b"m" * 70 * SECTOR)
    near.umount()
    far.failover()
    view.write(2 * MIB, b"c" * SECTOR)
    put(own, 2 * MIB, b"c" * SECTOR)
    far.until_committed()
    assert same(view.content(), own)
    far.quit()
    assert same(far.disk.read_bytes(), own)


# --- Both secondaries, side by side -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    seed: int
    size: int
    disk_format: str
    durability: str


CASES = [
    Case(1, MIB, "raw", "power"),
    Case(2, 3 * MIB + 5 * SECTOR, "raw", "process"),
    Case(3, 333 * SECTOR, "raw", "power"),
    Case(4, 2 * MIB - SECTOR, "qcow2", "power"),
    Case(5, 7 * 65536 + 3 * SECTOR, "qcow2", "process"),
    Case(6, 4 * MIB + 31 * SECTOR, "qcow2", "power"),
]


class ReplfsTwin:
    """replfs's secondary. Its machine writes to the file, and zeroes through the view over NBD, since a file has no other way."""

    def __init__(self, sides: Sides, disk: Path, case: Case) -> None:
        self._side = sides.make(
            *("secondary", disk, "--listen", f"unix:{sides.socket}", "--view-listen", f"unix:{sides.folder}/view"),
            *("--format", case.disk_format, "--durability", case.durability),
        )
        self._side.mount()
        self.disk = Nbd(f"nbd+unix:///disk?socket={sides.socket}")
        self._view = Nbd(f"nbd+unix:///view?socket={sides.folder}/view")
        self.write_zeroes = self._view.write_zeroes

    def write(self, offset: int, data: bytes) -> None:
        put_file(self._side, offset, data)

    def view(self) -> bytes:
        return self._side.content()

    def checkpoint(self) -> None:
        self._side.set("checkpoint")

    def failover(self) -> None:
        self.disk.close()
        self._side.set("failover")

    def until_committed(self) -> None:
        self._side.until_stage("done")

    def end(self) -> None:
        self._view.close()
        self._side.umount()


class QemuTwin:
    """QEMU's secondary."""

    def __init__(self, qemus: Qemus, disk: Path, case: Case) -> None:
        self._qemu = qemus.secondary(disk, case.disk_format)
        self.disk = self._qemu.open("disk")
        self._view = self._qemu.open("view")
        self.write = self._view.write
        self.write_zeroes = self._view.write_zeroes
        self.view = self._view.content
        self.checkpoint = self._qemu.checkpoint
        self.failover = self._qemu.failover
        self.until_committed = self._qemu.until_committed
        self.end = self._qemu.quit


class Step(NamedTuple):
    what: str
    offset: int = 0
    length: int = 0

    def data(self, number: int) -> bytes:
        return random.Random(number).randbytes(self.length) if self.what.endswith("write") else bytes(self.length)


def steps(case: Case, count: int, every: int) -> Iterator[Step]:
    """``count`` of them, one in ``every`` a checkpoint. Half of the places are in a small part of the disk, so that they meet."""
    rng = random.Random(case.seed)
    sectors = case.size // SECTOR
    kinds = ["disk write"] * 6 + ["disk zeroes", "disk keep"] + ["view write"] * 6 + ["view zeroes", "view keep"]
    for _ in range(count):
        if rng.random() < 1 / every:
            yield Step("checkpoint")
            continue
        length = min(rng.choice((1, 1, 2, 3, 5, 8, 8, 9, 17, 64, 128, 129, rng.randint(1, 500))), sectors)
        room = sectors - length
        start = rng.choice((rng.randint(0, room), rng.randint(0, min(room, 600)), room - rng.randint(0, min(room, 40))))
        yield Step(rng.choice(kinds), start * SECTOR, length * SECTOR)


def carry_out(twin: ReplfsTwin | QemuTwin, step: Step, data: bytes) -> None:
    port = twin.disk if step.what.startswith("disk") else twin
    if step.what.endswith("write"):
        port.write(step.offset, data)
    else:
        port.write_zeroes(step.offset, step.length, may_unmap=step.what.endswith("zeroes"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.seed}-{case.size}-{case.disk_format}-{case.durability}")
def test_the_same_operations_give_the_same_bytes(
    sides: Sides, qemus: Qemus, full: bool, tally: Callable[[str, int], None], case: Case
) -> None:
    count, every = (20_000, 100) if full else (300, 40)
    before = content(case.seed, case.size)
    model = {"disk": bytearray(before), "view": bytearray(before)}
    ours, theirs = (make_disk(sides.folder / f"{name}.{case.disk_format}", before, case.disk_format) for name in ("ours", "theirs"))
    twins: list[ReplfsTwin | QemuTwin] = [ReplfsTwin(sides, ours, case), QemuTwin(qemus, theirs, case)]
    number = 0

    def do(step: Step) -> None:
        nonlocal number
        number += 1
        data = step.data(number)
        for twin in twins:
            carry_out(twin, step, data)
        put(model[step.what[:4]], step.offset, data)

    def compare(*, disk: bool = True) -> None:
        for twin in twins:
            where = f"{type(twin).__name__}, {number} operations"
            assert same(twin.view(), model["view"]), where
            assert not disk or same(twin.disk.content(), model["disk"]), where

    for step in steps(case, count, every):
        if step.what != "checkpoint":
            do(step)
            continue
        compare()
        for twin in twins:
            twin.checkpoint()
        model["view"] = bytearray(model["disk"])
        compare()
    compare()
    for twin in twins:
        twin.failover()
    later = [step for step in steps(case._replace(seed=-case.seed), 60, 1000) if step.what.startswith("view")]
    for step in later[::2]:  # while it commits, as far as it still does
        do(step)
    compare(disk=False)
    for twin in twins:
        twin.until_committed()
    for step in later[1::2]:
        do(step)
    compare(disk=False)
    for twin, image in zip(twins, (ours, theirs), strict=True):
        twin.end()
        qemu_img("convert", "-f", case.disk_format, "-O", "raw", image, image.with_suffix(".out"))
        assert same(image.with_suffix(".out").read_bytes(), model["view"]), type(twin).__name__
    tally("operation beside QEMU", count)


# --- docs/qemu.md -----------------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```(sh|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def messages(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        message, end = decoder.raw_decode(text)
        yield message
        text = text[end:]


def includes(answer: Any, part: Any) -> bool:
    """Whether all of ``part`` is in the answer, whatever else is. The order of lists does not count."""
    if isinstance(part, dict):
        return isinstance(answer, dict) and all(name in answer and includes(answer[name], part[name]) for name in part)
    if isinstance(part, list):
        return all(any(includes(one, wanted) for one in answer) for wanted in part)
    return bool(answer == part)


def talk(monitor: Monitor, text: str) -> None:
    """Send the commands, and wait for what the text has QEMU say."""
    asked: dict[str, Any] = {}
    for message in messages(text):
        if "event" in message:
            monitor.until_event(message["event"], partial(includes, part=message["data"]))
        elif "return" in message:
            wait_for(lambda: includes(execute(monitor, asked), message["return"]), str(message))  # noqa: B023 - called here
        else:
            asked = message
            answer = execute(monitor, asked)
            assert asked["execute"] != "human-monitor-command" or not answer, answer


def execute(monitor: Monitor, command: dict[str, Any]) -> Any:
    return monitor.execute(command["execute"], **command.get("arguments", {}))


def connected(address: Path) -> Monitor:
    """QEMU may only just have been started."""

    def connect() -> Monitor | None:
        try:
            return Monitor(str(address))
        except ConnectError:
            return None

    found = wait_for(connect, "QEMU's QMP")
    assert isinstance(found, Monitor)
    return found


class Shells:
    """Shells in one folder. What they leave running, QEMU, is in their process groups, and ended at last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: list[int] = []
        self.said = folder / "said"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path}

    def run(self, script: str) -> None:
        with self.said.open("ab") as said:
            shell = subprocess.Popen(
                ["sh", "-eux", "-c", script],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._groups.append(shell.pid)
        assert shell.wait(timeout=SECONDS) == 0, self.said.read_text()

    def end(self) -> None:
        for group in self._groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        run("umount", "-l", self._folder / "mnt", check=False)


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """In order, in one directory: those of the shell by a shell that stops at the first failure, the others over QMP."""
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 12
    shells = Shells(tmp_path)
    monitor = None
    try:
        for language, text in blocks:
            if language == "sh":
                shells.run(text)
                continue
            monitor = monitor or connected(tmp_path / "qmp.sock")
            talk(monitor, text)
            if '"quit"' in text:
                monitor.close()
                monitor = None
    finally:
        if monitor:
            monitor.close()
        shells.end()
    disks = [(tmp_path / name).read_bytes() for name in ("a.raw", "b.raw")]
    assert same(*disks)
    assert disks[0].startswith(b"hello")
    assert disks[0][MIB : 3 * MIB] == b"\2" * MIB + b"\3" * MIB
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
