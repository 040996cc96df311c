"""Writers that outlive what they write to, and what a volume may hold after they were cut off.

Three things are owned here:

* **Tagged sectors.** Each write has a tag of its own, and each sector says which sector it is and whose write it holds. So a lost
  write, one that came back, and one in the wrong place are all seen.
* **Writers**: processes of their own, since a test must not hang on a mount that has died. They write until that fails, through a
  mounted file or over NBD, or take checkpoints, and log when each request began and when it was acknowledged. For speed this file
  is their program too, with nothing but the standard library. Logs are files: the page cache outlives whatever is killed.
* **The rules** of what a sector may hold by these logs: what was acknowledged last, or what was under way; and for a secondary's
  view, what its disk held at the last checkpoint, plus what its machine wrote since. Each sector has one writer at each port, so
  the order of its writes is known.
* **A secondary in a storm**: one that goes through rounds, each of which ends it somehow, and is then mounted and looked at.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ != "__main__":  # a writer does without them
    from harness import REPLFS, SECONDS, Side, Sides, replfs, run, wait_for

SECTOR = 512
NEVER = 1 << 62
"""Later than any time."""

_TAG = struct.Struct("<QQ")
_RECORD = struct.Struct("<4sIqQII")
_BEGUN, _ZEROES, _ACKNOWLEDGED, _FAILED = b"begn", b"zero", b"ackn", b"fail"
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ENOENT)
"""How a request ends whose server is gone, at a mount and at a socket."""


def tagged(sector: int, count: int, tag: int) -> bytes:
    """What a write with this tag puts into these sectors."""
    return b"".join(_TAG.pack(number, tag) * (SECTOR // _TAG.size) for number in range(sector, sector + count))


def tell(content: bytes) -> str:
    """A sector's content in words."""
    if content == bytes(SECTOR):
        return "zeroes"
    sector, tag = _TAG.unpack_from(content)
    whole = "" if content == tagged(sector, 1, tag) else " torn:"
    return f"{whole} sector {sector} of write {tag >> 32}.{tag & 0xFFFFFFFF}"


# Writers: from here on to the end of the section, the standard library alone


class Log:
    """Where a writer notes what it does. Each note is one write, and whole or not there."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: bytes, tag: int, sector: int = 0, count: int = 0, error: int = 0) -> None:
        os.write(self._fd, _RECORD.pack(kind, error, time.monotonic_ns(), tag, sector, count))


class NbdError(OSError):
    """An error that the server answered: the connection goes on."""


class Nbd:
    """A client for the NBD export of a secondary, on a unix socket."""

    WRITE, FLUSH, WRITE_ZEROES = 1, 3, 6
    FUA = 1
    _REQUEST = struct.Struct(">IHHQQI")
    _REPLY = struct.Struct(">IIQ")

    def __init__(self, path: str, seconds: float = 60) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(seconds)
            self.socket.connect(path)
            self._take(18)
            self.socket.sendall(struct.pack(">IQII4s", 3, 0x49484156454F5054, 1, 4, b"disk"))  # no zeroes; EXPORT_NAME
            self.size, self.flags = struct.unpack(">QH", self._take(10))
        except BaseException:
            self.socket.close()
            raise

    def _take(self, length: int) -> bytearray:
        data = bytearray()
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "the server has closed the connection")
            data += more
        return data

    def send(self, kind: int, cookie: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> None:
        self.socket.sendall(self._REQUEST.pack(0x25609513, flags, kind, cookie, offset, length) + data)

    def reply(self) -> tuple[int, int]:
        """The cookie and the error of a request that is no read."""
        magic, error, cookie = self._REPLY.unpack(self._take(self._REPLY.size))
        assert magic == 0x67446698
        return cookie, error

    def _finish(self) -> None:
        _, error = self.reply()
        if error:
            raise NbdError(error, os.strerror(error))

    def read(self, offset: int, length: int) -> bytes:
        self.send(0, 0, offset, length)
        self._finish()
        return bytes(self._take(length))

    def content(self) -> bytes:
        return b"".join(self.read(start, min(1 << 20, self.size - start)) for start in range(0, self.size, 1 << 20))

    def write(self, offset: int, data: bytes) -> None:
        self.send(self.WRITE, 0, offset, len(data), data)
        self._finish()

    def write_zeroes(self, offset: int, length: int) -> None:
        self.send(self.WRITE_ZEROES, 0, offset, length)
        self._finish()

    def flush(self) -> None:
        self.send(self.FLUSH, 0)
        self._finish()

    def close(self) -> None:
        self.socket.close()


class Pick(NamedTuple):
    tag: int
    sector: int
    count: int


class Picks:
    """What to write next. The sectors of a disk are shared out among the writers of one port.

    In the lower half each has every so manieth stripe of three sectors, so that all meet in one page and in one subcluster; in the
    upper half a part of its own, for larger writes. Half of the writes go to a few places, so that much is written twice.
    """

    STRIPE = 3

    def __init__(self, rng: random.Random, sectors: int, index: int, of: int, tag: int) -> None:
        self._rng = rng
        self._sectors = sectors
        self._index, self._of = index, of
        self._tag = tag

    def next(self) -> Pick:
        rng = self._rng
        self._tag += 1
        middle = self._sectors // 2
        narrow = 32 if rng.random() < 0.5 else 1
        if rng.random() < 0.5:
            turns = middle // (self.STRIPE * self._of)
            start = (rng.randrange(max(turns // narrow, 1)) * self._of + self._index) * self.STRIPE
            inside = rng.randrange(self.STRIPE)
            return Pick(self._tag, start + inside, rng.randint(1, self.STRIPE - inside))
        part = (self._sectors - middle) // self._of
        first = middle + self._index * part
        stop = self._sectors if self._index == self._of - 1 else first + part
        count = min(rng.choice((1, 2, 8, 8, 13, 64, 300)), stop - first)
        return Pick(self._tag, first + rng.randrange(max((stop - first - count) // narrow, 1)), count)


def _write_file(log: Log, picks: Picks, rng: random.Random, path: str, kind: str) -> None:
    """Until a write fails. ``kind``: direct, sync, or buffered, with an fsync now and then."""
    fd = os.open(path, os.O_RDWR | {"direct": os.O_DIRECT, "sync": os.O_SYNC, "buffered": 0}[kind])
    memory = mmap.mmap(-1, 1 << 20)  # which O_DIRECT takes
    while True:
        pick = picks.next()
        length = pick.count * SECTOR
        memory[:length] = tagged(pick.sector, pick.count, pick.tag)
        log.note(_BEGUN, *pick)
        try:
            written = os.pwritev(fd, [memoryview(memory)[:length]], pick.sector * SECTOR)
            log.note(_ACKNOWLEDGED, pick.tag, count=written // SECTOR)
            if kind == "buffered" and rng.random() < 0.05:
                os.fsync(fd)
        except OSError as error:
            return log.note(_FAILED, pick.tag, error=error.errno or errno.EIO)


def _write_nbd(log: Log, picks: Picks, rng: random.Random, path: str, depth: int) -> None:
    """Until the connection ends or a request fails, with ``depth`` requests under way, none of which meet in a sector."""
    under_way: dict[int, Pick] = {}
    try:
        nbd = Nbd(path)
        pick = picks.next()
        while True:
            while len(under_way) < depth and not any(_meet(pick, other) for other in under_way.values()):
                under_way[pick.tag] = pick
                _send(log, nbd, pick, rng)
                pick = picks.next()
            tag, error = nbd.reply()
            if error:
                return log.note(_FAILED, tag, error=error)
            if tag:
                log.note(_ACKNOWLEDGED, tag, count=under_way.pop(tag).count)
    except OSError as error:
        log.note(_FAILED, 0, error=error.errno or errno.ETIMEDOUT)


def _meet(one: Pick, other: Pick) -> bool:
    return one.sector < other.sector + other.count and other.sector < one.sector + one.count


def _send(log: Log, nbd: Nbd, pick: Pick, rng: random.Random) -> None:
    place = pick.sector * SECTOR, pick.count * SECTOR
    flags = nbd.FUA if rng.random() < 0.03 else 0
    if rng.random() < 0.1:
        log.note(_ZEROES, *pick)
        nbd.send(nbd.WRITE_ZEROES, pick.tag, *place, flags=flags)
    else:
        log.note(_BEGUN, *pick)
        nbd.send(nbd.WRITE, pick.tag, *place, tagged(pick.sector, pick.count, pick.tag), flags)
    if rng.random() < 0.03:
        nbd.send(nbd.FLUSH, 0)


def _control(log: Log, rng: random.Random, path: str, checkpoints: int, pause: float, last: str) -> None:
    """So many checkpoints, ``pause`` seconds apart at most, and then the operation ``last``. The log's tags number them from 1."""
    names = ["checkpoint"] * checkpoints + ([last] if last else [])
    for number, name in enumerate(names, 1):
        log.note(_BEGUN, number)
        try:
            os.setxattr(path, f"user.replfs.{name}", b"1")
        except OSError as error:
            return log.note(_FAILED, number, error=error.errno or errno.EIO)
        log.note(_ACKNOWLEDGED, number)
        select.select([], [], [], rng.random() * pause)


def _main(what: str, log: str, seed: int, picks: list[int], **more: Any) -> None:
    rng = random.Random(seed)
    if what == "control":
        _control(Log(log), rng, **more)
    else:
        (_write_nbd if what == "nbd" else _write_file)(Log(log), Picks(rng, *picks), rng, **more)


# The logs, read by the test


class Change(NamedTuple):
    """A write. ``acknowledged``: when, NEVER if it was not, and how many of its sectors."""

    begun: int
    acknowledged: int
    sector: int
    count: int
    done: int
    content: Callable[[int], bytes]
    """What it makes of a sector."""

    def certain(self, sector: int) -> int:
        """When this sector was acknowledged."""
        return self.acknowledged if sector < self.sector + self.done else NEVER


class Asked(NamedTuple):
    """A control operation."""

    begun: int
    acknowledged: int


class Writer:
    """A process that writes, or takes checkpoints, and its log."""

    def __init__(self, log: Path, what: str, seed: int, picks: Sequence[int], **more: Any) -> None:
        self.what = what
        self._log = log
        arguments = {"what": what, "log": str(log), "seed": seed, "picks": picks, **more}
        command = [sys.executable, "-I", "-S", __file__, json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def _records(self) -> Iterator[tuple[bytes, int, int, int, int, int]]:
        data = self._log.read_bytes() if self._log.exists() else b""
        return _RECORD.iter_unpack(data[: len(data) // _RECORD.size * _RECORD.size])

    def changes(self) -> list[Change]:
        found: dict[int, Change] = {}
        for kind, _, when, tag, sector, count in self._records():
            if kind == _ACKNOWLEDGED:
                found[tag] = found[tag]._replace(acknowledged=when, done=count)
            elif kind == _BEGUN:
                found[tag] = Change(when, NEVER, sector, count, 0, lambda number, tag=tag: tagged(number, 1, tag))  # type: ignore[misc]
            elif kind == _ZEROES:
                found[tag] = Change(when, NEVER, sector, count, 0, lambda number: bytes(SECTOR))
        return list(found.values())

    def asked(self) -> list[Asked]:
        found: dict[int, Asked] = {}
        for kind, _, when, number, _, _ in self._records():
            if kind == _BEGUN:
                found[number] = Asked(when, NEVER)
            elif kind == _ACKNOWLEDGED:
                found[number] = found[number]._replace(acknowledged=when)
        return list(found.values())

    @property
    def acknowledged(self) -> int:
        """How many requests were, up to now."""
        return sum(kind == _ACKNOWLEDGED for kind, *_ in self._records())

    @property
    def errors(self) -> set[int]:
        """Those that it has met (errno)."""
        return {error for kind, error, *_ in self._records() if kind == _FAILED}

    def ended(self) -> None:
        """Wait for its end; it has met no error but ``_DEAD``."""
        _, said = self.process.communicate(timeout=SECONDS)
        assert not said, f"{self.what}: {said}"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Crowd:
    """The writers of one round. ``view`` and ``disk`` are those at the mounted file and at the NBD export."""

    _started = 0  # so that no tag is ever used twice in a process

    def __init__(self, folder: Path, size: int, rng: random.Random) -> None:
        self._folder = folder
        self._sectors = size // SECTOR
        self._rng = rng
        self._checkpoints = 0
        self.view: list[Writer] = []
        self.disk: list[Writer] = []
        self.control: Writer | None = None

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._all():
            if writer.process.returncode is None:
                writer.kill()

    def _all(self) -> list[Writer]:
        return [*self.view, *self.disk, *([self.control] if self.control else [])]

    def _start(self, what: str, index: int, of: int, **more: Any) -> Writer:
        Crowd._started += 1
        log = self._folder / f"writer.{Crowd._started}"
        return Writer(log, what, self._rng.getrandbits(32), [self._sectors, index, of, Crowd._started << 32], **more)

    def write_view(self, file: Path, *kinds: str) -> None:
        """At a secondary's mounted file."""
        self.view += self._write_file(file, *kinds)

    def write_through(self, file: Path, *kinds: str) -> None:
        """At a primary's mounted file."""
        self.disk += self._write_file(file, *kinds)

    def _write_file(self, file: Path, *kinds: str) -> list[Writer]:
        return [self._start("file", index, len(kinds), path=str(file), kind=kind) for index, kind in enumerate(kinds)]

    def write_disk(self, path: Path, *depths: int) -> None:
        """At a secondary's export, with so many requests under way each."""
        self.disk += [self._start("nbd", index, len(depths), path=str(path), depth=depth) for index, depth in enumerate(depths)]

    def take_checkpoints(self, file: Path, checkpoints: int, pause: float = 0.02, last: str = "") -> Writer:
        """Through the file: the mount point is there without its mount too, and takes attributes then."""
        self.control = self._start("control", 0, 1, path=str(file), checkpoints=checkpoints, pause=pause, last=last)
        self._checkpoints = checkpoints
        return self.control

    def operations(self) -> tuple[list[Asked], Asked | None]:
        """The checkpoints that have begun, and the operation that was to follow them."""
        asked = self.control.asked() if self.control else []
        return asked[: self._checkpoints], asked[self._checkpoints] if len(asked) > self._checkpoints else None

    def until_busy(self, requests: int = 3) -> None:
        """Each writer has had so many more requests acknowledged."""
        for writer in (*self.view, *self.disk):
            wanted = writer.acknowledged + requests
            wait_for(lambda: writer.acknowledged >= wanted or writer.process.poll() is not None, writer.what)  # noqa: B023 - called here
            assert writer.acknowledged >= wanted, f"{writer.what}: {writer.process.communicate()}, {writer.errors}"

    def kill(self) -> None:
        """The writers, not what they write to. Afterwards none of their requests is under way at the mount."""
        for writer in self._all():
            writer.kill()

    def ended(self, *, expected: Sequence[int] = ()) -> None:
        """All have ended by themselves, because what they write to is gone or for an expected error (errno)."""
        for writer in self._all():
            writer.ended()
            unexpected = writer.errors - {*_DEAD, *expected}
            assert not unexpected, f"{writer.what}: {[os.strerror(error) for error in unexpected]}"


# What there may be


class Writes:
    """All that some writers have written, by sector, in its order."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.all = sorted((change for writer in writers for change in writer.changes()), key=lambda change: change.begun)
        self.of: dict[int, list[Change]] = defaultdict(list)
        for change in self.all:
            for sector in range(change.sector, change.sector + change.count):
                self.of[sector].append(change)

    def choices(self, sector: int, initial: bytes, since: int = NEVER, until: int = NEVER) -> list[bytes]:
        """What a sector may hold at some time between two others: what was acknowledged before the first is there for certain."""
        found = []
        for change in reversed(self.of.get(sector, ())):
            if change.begun < until:
                found.append(change.content(sector))
                if change.certain(sector) < since:
                    return found
        return [*found, initial]


class Expected:
    """What a side holds, from one round to the next. A primary has a disk only."""

    def __init__(self, content: bytes) -> None:
        self.view = self.disk = content

    def settle_disk(self, got: bytes, writes: Writes, since: int = NEVER) -> None:
        """See that this is what the disk may hold: all that was acknowledged before ``since``. From now on it is what it holds."""
        choices = {sector: writes.choices(sector, _sector(self.disk, sector), since) for sector in writes.of}
        _check("disk", got, self.disk, choices)
        self.disk = got

    def settle_view(self, got: bytes, view: Writes, disk: Writes, checkpoint: Asked | None, since: int = NEVER) -> None:
        """The same for the view. ``checkpoint`` is the last one that was done in this round. To be called before settle_disk."""
        if checkpoint is None:
            _check("view", got, self.view, {sector: view.choices(sector, _sector(self.view, sector)) for sector in view.of})
        else:
            sectors = {*view.of, *disk.of}
            _check("view", got, self.disk, {sector: self._after(sector, view, disk, checkpoint, since) for sector in sectors})
        self.view = got

    def _after(self, sector: int, view: Writes, disk: Writes, checkpoint: Asked, since: int) -> list[bytes]:
        """What the disk may have held at the checkpoint, and what its machine has written, perhaps, since."""
        found = []
        for change in reversed(view.of.get(sector, ())):
            if change.certain(sector) < checkpoint.begun:
                break  # it was dropped, and so was all before it
            found.append(change.content(sector))
            if change.certain(sector) < NEVER:
                if change.begun > checkpoint.acknowledged:
                    return found
                break  # during the checkpoint: if this was dropped, so was all before it
        initial = _sector(self.disk, sector)
        return found + disk.choices(sector, initial, min(since, checkpoint.begun), checkpoint.acknowledged)


def _sector(content: bytes, sector: int) -> bytes:
    return content[sector * SECTOR : (sector + 1) * SECTOR]


def _check(what: str, got: bytes, otherwise: bytes, choices: dict[int, list[bytes]]) -> None:
    """Each sector is one of its choices; those without any are as they are ``otherwise``."""
    assert len(got) == len(otherwise)
    expected = bytearray(otherwise)
    for sector, allowed in choices.items():
        now = _sector(got, sector)
        assert now in allowed, f"{what}, sector {sector}: {tell(now)}, instead of {' or '.join(map(tell, allowed))}"
        expected[sector * SECTOR : (sector + 1) * SECTOR] = now
    if got != expected:
        sector = next(sector for sector in range(len(got) // SECTOR) if _sector(got, sector) != _sector(expected, sector))
        raise AssertionError(
            f"{what}, sector {sector}: {tell(_sector(got, sector))}, instead of {tell(_sector(expected, sector))}: nobody wrote it"
        )


# A secondary that goes through rounds


def make_disk(path: Path, content: bytes, disk_format: str) -> Path:
    """A disk image with this content; where it is zero, it takes no room."""
    source = path.with_suffix(".source")
    source.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", disk_format, source, path)
    source.unlink()
    return path


def soundness(images: Iterable[Path], *, leaks: bool = True) -> dict[Path, str]:
    """What qemu-img has against each of these images: leaked clusters (exit status 3) are no error if ``leaks``."""
    good = (0, 3) if leaks else (0,)
    found = {}
    for image in images:
        checked = run("qemu-img", "check", "-f", "qcow2", image, check=False)
        found[image] = "" if checked.returncode in good else checked.stdout + checked.stderr
    return found


def at_random(rng: random.Random, most: float) -> None:
    """Let the others run for a random time, ``most`` seconds at most: into which of their instants is what a storm is about."""
    select.select([], [], [], rng.random() * most)


def in_foreground(side: Side) -> subprocess.Popen[str]:
    """Its daemon, as a service manager starts it, from its first instant on; what it logs goes into a pipe."""
    command = [REPLFS, side.mode, side.disk, side.point, *side.arguments, "--foreground"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([str(word) for word in command], text=True, **streams)


def is_mounted(point: Path) -> bool:
    """By the table of mounts: the mount itself, which may be dead, is not asked."""
    return f" {point} " in Path("/proc/self/mounts").read_text()


def forget_state(side: Side) -> None:
    """As a user does who starts over. The log goes away with it, so that is read now."""
    problems = side.clean_up()
    assert not problems, "\n".join(problems)
    shutil.rmtree(side.state_dir)


class Secondary:
    """A secondary whose rounds are: :meth:`writers` begin, they and it are ended, :meth:`mount`, :meth:`settle`."""

    def __init__(self, sides: Sides, disk_format: str, size: int, *arguments: str | Path) -> None:
        self._folder = sides.folder
        self._format = disk_format
        content = tagged(0, size // SECTOR, 0)
        disk = make_disk(sides.folder / f"secondary.{disk_format}", content, disk_format)
        listen = f"unix:{sides.socket}"
        self.socket = sides.socket
        self.side = sides.make("secondary", disk, "--listen", listen, "--format", disk_format, *arguments)
        self.expected = Expected(content)
        self.generation = 0
        self._problems: dict[Path, str] = {}

    def writers(self, rng: random.Random, *, view: bool = True) -> Crowd:
        """Two at the mounted file unless ``view`` is False, two at the export, one with several requests under way."""
        crowd = Crowd(self._folder, len(self.expected.view), rng)
        if view:
            crowd.write_view(self.side.file, "direct", rng.choice(("buffered", "sync")))
        crowd.write_disk(self.socket, 1, 6)
        return crowd

    def reach(self, crowd: Crowd, aim: str, rng: random.Random, checkpoints: int = 1000) -> None:
        """Let it come to the instant that this round is to hit, under load.

        Among ``writes``, in a ``checkpoint``, in a ``failover``, or when that is ``done``; any will do before a ``resume``.
        """
        crowd.until_busy()
        match aim:
            case "writes":
                at_random(rng, 0.3)
            case "checkpoint":
                number = rng.randrange(1, 8)
                crowd.take_checkpoints(self.side.file, checkpoints, rng.choice((0, 0.02)))
                wait_for(lambda: len(crowd.operations()[0]) >= number, "a checkpoint")
                at_random(rng, 0.03)
            case "failover" | "resume":
                last = rng.choice(("failover", "failover", "")) if aim == "resume" else "failover"
                control = crowd.take_checkpoints(self.side.file, rng.randrange(4), last=last)
                wait_for(lambda: crowd.operations()[1] or control.process.poll() is not None, "the failover")
                at_random(rng, rng.choice((0, 0.02, 0.1)))
            case "done":
                crowd.take_checkpoints(self.side.file, 1, last="failover")
                self.side.until_stage("done")
                at_random(rng, 0.1)

    def look_at_images(self, *, leaks: bool = True) -> None:
        """After its end: what the images are like then is judged in :meth:`settle`, when it is known which of them count."""
        disk = [self.side.disk] if self._format == "qcow2" else []
        self._problems = soundness([*self.side.state_dir.glob("*.qcow2"), *disk], leaks=leaks)

    def settle(self, crowd: Crowd, cut: int = NEVER) -> str:
        """It is mounted again: see that it holds what it may. Returns the stage that it was found in.

        ``cut``: what a primary acknowledged from then on need not be here.
        """
        status = json.loads(replfs("status", "--json", self.side.point).stdout)
        checkpoints, failover = crowd.operations()
        done = status["generation"] - self.generation
        acknowledged = sum(asked.acknowledged < NEVER for asked in checkpoints)
        assert acknowledged <= done <= len(checkpoints), (
            f"{done} checkpoints of {len(checkpoints)}; {acknowledged} were acknowledged"
        )
        may_be = {"running"} if failover is None or failover.acknowledged == NEVER else set()
        may_be |= {"failover", "done"} if failover is not None else set()
        assert status["stage"] in may_be
        self._judge_images(status)
        self.generation = status["generation"]
        view, disk = Writes(crowd.view), Writes(crowd.disk)
        if failover is not None and failover.acknowledged < NEVER:
            assert not any(failover.acknowledged < change.begun and change.done for change in disk.all), "a write behind the fence"
        self.expected.settle_view(self.side.content(), view, disk, checkpoints[done - 1] if done else None, cut)
        if status["stage"] == "running":
            self.expected.settle_disk(self.disk_content(), disk, cut)
        else:
            self._settle_done()
        return str(status["stage"])

    def _judge_images(self, status: dict[str, Any]) -> None:
        """Those of the generation that counts, and the disk: others are leftovers."""
        counting = {Path(overlay["path"]) for overlay in status["overlays"].values()} | {self.side.disk}
        for image, problem in self._problems.items():
            assert not problem or image not in counting, f"{image}: {problem}"
        self._problems = {}

    def disk_content(self) -> bytes:
        """Over NBD, and if it is raw, as it is in the file."""
        nbd = Nbd(str(self.socket))
        content = nbd.content()
        nbd.close()
        assert self._format != "raw" or content == self.side.disk.read_bytes()
        return content

    def _settle_done(self) -> None:
        """The failover goes on to its end; its disk is what its view was. Then it is started over."""
        self.side.until_stage("done")
        assert self.side.content() == self.disk_content() == self.expected.view
        self.start_over()

    def start_over(self, other: Path | None = None) -> None:
        """With what its disk holds now, which is its view, or with a copy of another disk, which :attr:`expected` is told of."""
        self.side.umount()
        self.look_at_images()
        assert not any(self._problems.values()), self._problems
        if other is not None:
            shutil.copyfile(other, self.side.disk)
        self.expected.disk = self.expected.view
        forget_state(self.side)
        self.generation = 0
        self.side.mount()


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
