"""The work that is compared, with the ratios that are aimed at.

Each :class:`Scenario` starts its sides, and runs its workloads on them in the order that they are listed in, so that one may build
on what an earlier one has written: what comes after "first touch" is about the same blocks.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import load, sides
from bench.sides import Side


@dataclass(frozen=True)
class Goal:
    """What ``ours`` is to be in relation to ``theirs``: at least so many times, or ``at_most``."""

    bound: float
    ours: str = "replfs"
    theirs: str = "qemu"
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


@dataclass(frozen=True)
class Workload:
    """``measure`` gives a number in ``unit`` for one side. It is run on each of ``sides``, in turn."""

    name: str
    unit: str
    measure: Callable[[Any], float]
    goals: tuple[Goal, ...]
    limits: tuple[tuple[str, float | None], ...] = ()
    """(side, what its number may be at most, if there is a limit): where what matters is not how it compares."""

    @property
    def sides(self) -> list[str]:
        return list(
            dict.fromkeys([*(side for goal in self.goals for side in (goal.ours, goal.theirs)), *(s for s, _ in self.limits)])
        )


@dataclass(frozen=True)
class Scenario:
    name: str
    make: Callable[[Path, Path], dict[str, Side]]
    """Sides, not started, by name; from a folder to work in and a disk to copy."""
    workloads: tuple[Workload | Callable[[dict[str, Side]], None], ...]
    """A function between them is run for all sides, and not measured."""
    slow: bool = field(default=False)
    """Left out with --quick."""


def at_least(bound: float, **names: Any) -> tuple[Goal, ...]:
    return (Goal(bound, **names),)


def at_most(bound: float, **names: Any) -> tuple[Goal, ...]:
    return (Goal(bound, at_most=True, **names),)


def _copy(disk: Path, path: Path) -> Path:
    subprocess.run(["cp", "--reflink=auto", str(disk), str(path)], check=True)
    load.warm(path, anew=True)
    return path


def _checkpoint(found: dict[str, Side]) -> None:
    """Empty overlays."""
    for side in found.values():
        if not isinstance(side, sides.PlainFile):
            side.checkpoint()


def _fuse(name: str, goal: float, rw: str, bs: str, depth: int, **options: Any) -> Workload:
    return Workload(
        f"FUSE {name}",
        "MiB/s",
        lambda side: load.mib_per_second(side, file=side.file, rw=rw, bs=bs, depth=depth, **options),
        at_least(goal),
    )


def _nbd(name: str, goals: tuple[Goal, ...], rw: str, bs: str, depth: int, **options: Any) -> Workload:
    return Workload(
        f"NBD {name}", "MiB/s", lambda side: load.mib_per_second(side, uri=side.uri, rw=rw, bs=bs, depth=depth, **options), goals
    )


def _wrong(name: str, size: str, bs: str, depth: int, number: int) -> Workload:
    """Whether both do the same work."""
    return Workload(
        f"{name} wrong blocks of {number:,} written, {size} at depth {depth}",
        "blocks",
        lambda side: load.wrong_blocks(side, bs=bs, depth=depth, number=number),
        (),
        limits=(("replfs", 0), ("qemu", None)),
    )


FIRST: dict[str, Any] = {"offset": "0", "size": "512M", "number_ios": 16384}
"""Random blocks, each once; twice the same ones."""
SECOND: dict[str, Any] = {"offset": "512M", "size": "512M", "number_ios": 4096}
SEQUENCE: dict[str, Any] = {"offset": "0", "size": "256M"}
WHILE: dict[str, Any] = {"size": "1G", "norandommap": 1, "time_based": 1, "runtime": "1500ms"}


# The mount


def _views(folder: Path, disk: Path) -> dict[str, Side]:
    return {
        "replfs": sides.ReplfsSecondary(folder / "replfs", _copy(disk, folder / "replfs.raw")),
        "qemu": sides.QemuExport(folder / "qemu", _copy(disk, folder / "qemu.raw")),
        "file": sides.PlainFile(folder / "file", _copy(disk, folder / "plain.raw")),
    }


def _buffered_again(side: Side) -> float:
    options: dict[str, Any] = {"direct": 0, "ioengine": "psync", "invalidate": 0, "size": "256M"}
    load.fio(file=side.file, rw="read", bs="1M", **options)
    return load.mib_per_second(side, file=side.file, rw="read", bs="1M", loops=4, **options)


VIEW = Scenario(
    "view",
    _views,
    (
        _checkpoint,
        _fuse("4 KiB random write, depth 32, first touch", 4, "randwrite", "4k", 32, **FIRST),
        _fuse("4 KiB random write, depth 32", 2, "randwrite", "4k", 32, **FIRST),
        _fuse("4 KiB random write, depth 1, first touch", 5, "randwrite", "4k", 1, **SECOND),
        _fuse("4 KiB random write, depth 1", 2, "randwrite", "4k", 1, **SECOND),
        _fuse("4 KiB random read, depth 32", 2, "randread", "4k", 32, **WHILE),
        _fuse("4 KiB random read, depth 1", 2, "randread", "4k", 1, **WHILE),
        _fuse("4 KiB random write, an fsync every 8", 1.2, "randwrite", "4k", 1, **SECOND | {"number_ios": 3200, "fsync": 8}),
        _checkpoint,
        _fuse("1 MiB sequential write, depth 4, first touch", 1.2, "write", "1M", 4, **SEQUENCE),
        _fuse("1 MiB sequential write, depth 4", 1.3, "write", "1M", 4, **SEQUENCE),
        _fuse("1 MiB sequential read, depth 4", 3, "read", "1M", 4, size="1G"),
        _fuse("64 KiB random write, depth 8", 1.5, "randwrite", "64k", 8, **SEQUENCE),
        _fuse("64 KiB random read, depth 8", 1.5, "randread", "64k", 8, **WHILE),
        _wrong("FUSE", "4 KiB", "4k", 1, 4096),
        _wrong("FUSE", "4 KiB", "4k", 32, 4096),
        _wrong("FUSE", "1 MiB", "1M", 4, 256),
        Workload("FUSE buffered read of a warm range", "MiB/s", _buffered_again, at_least(0.8, theirs="file")),
    ),
)


# What arrives


def _secondaries(folder: Path, disk: Path) -> dict[str, Side]:
    return {
        "replfs": sides.ReplfsSecondary(folder / "replfs", _copy(disk, folder / "replfs.raw")),
        "qemu": sides.QemuSecondary(folder / "qemu", _copy(disk, folder / "qemu.raw")),
        "replfs, power": sides.DurableReplfsSecondary(folder / "power", _copy(disk, folder / "power.raw")),
    }


def _both(goal: float) -> tuple[Goal, ...]:
    return (Goal(goal), Goal(1, ours="replfs, power"))


INGEST = Scenario(
    "ingest",
    _secondaries,
    (
        _checkpoint,
        _nbd("4 KiB random write, depth 32, first touch", _both(5), "randwrite", "4k", 32, **FIRST),
        Workload(
            "NBD room in the hidden disk for each byte written",
            "bytes",
            lambda side: side.overlay_bytes("hidden") / (FIRST["number_ios"] * 4096),
            at_most(0.1),
            limits=(("replfs", 1.1),),
        ),
        _nbd("4 KiB random write, depth 32", _both(3), "randwrite", "4k", 32, **FIRST),
        _nbd("4 KiB random write, depth 1, first touch", _both(3), "randwrite", "4k", 1, **SECOND | {"number_ios": 2048}),
        _nbd("4 KiB random write, depth 1", _both(3), "randwrite", "4k", 1, **SECOND | {"number_ios": 2048}),
        _nbd("4 KiB random read, depth 32", at_least(3), "randread", "4k", 32, **WHILE),
        _checkpoint,
        _nbd("1 MiB sequential write, first touch", _both(1.3), "write", "1M", 4, **SEQUENCE),
        _nbd("1 MiB sequential write", _both(1.5), "write", "1M", 4, **SEQUENCE),
        _nbd("1 MiB sequential read", at_least(2), "read", "1M", 4, size="1G"),
    ),
)


# Checkpoints


def _pair(folder: Path, disk: Path) -> dict[str, Side]:
    found = _secondaries(folder, disk)
    del found["replfs, power"]
    return found


def _checkpoint_of(megabytes: int, side: Any) -> float:
    load.fill(side, megabytes)
    os.sync()
    return load.seconds_of(side.checkpoint) * 1000


def _stall(side: Any) -> float:
    load.fill(side, 256)
    os.sync()
    return load.longest_stall(side, 2) * 1000


CHECKPOINT = Scenario(
    "checkpoint",
    _pair,
    (
        Workload("checkpoint, 1 MiB in each overlay", "ms", partial(_checkpoint_of, 1), at_most(0.2)),
        Workload("checkpoint, 64 MiB in each overlay", "ms", partial(_checkpoint_of, 64), at_most(0.1)),
        Workload("checkpoint, 1 GiB in each overlay", "ms", partial(_checkpoint_of, 1024), at_most(0.02)),
        Workload("longest write stall of a checkpoint, 256 MiB", "ms", _stall, at_most(0.15)),
    ),
)

_failovers: dict[int, tuple[float, float]] = {}


def _first_write(side: Any) -> float:
    _failovers[id(side)] = load.failover(side, 256)
    return _failovers[id(side)][0] * 1000


FAILOVER = Scenario(
    "failover",
    _pair,
    (
        Workload("failover, until the first write is served", "ms", _first_write, at_most(0.25)),
        Workload("failover, the commit of 256 MiB", "MiB/s", lambda side: _failovers[id(side)][1], at_least(2)),
    ),
)


# A primary


def _primaries(folder: Path, disk: Path) -> dict[str, Side]:
    targets = [sides.Target(folder / f"target{i}", disk) for i in (1, 2)]
    return {
        "target": targets[0],
        "target2": targets[1],
        "replfs": sides.ReplfsPrimary(
            folder / "replfs", _copy(disk, folder / "replfs.raw"), f"nbd+unix:///?socket={folder}/target1/nbd"
        ),
        "qemu": sides.QemuPrimary(folder / "qemu", _copy(disk, folder / "qemu.raw"), folder / "target2/nbd"),
        "replfs alone": sides.ReplfsPrimary(folder / "alone", _copy(disk, folder / "alone.raw"), ""),
    }


def _primary(name: str, rw: str, bs: str, depth: int, **options: Any) -> Workload:
    return Workload(
        f"primary, {name}",
        "MiB/s",
        lambda side: load.mib_per_second(side, file=side.file, rw=rw, bs=bs, depth=depth, **options),
        (Goal(2), Goal(0.7, theirs="replfs alone")),
    )


PRIMARY = Scenario(
    "primary",
    _primaries,
    (
        _primary("4 KiB random write, depth 1", "randwrite", "4k", 1, **WHILE),
        _primary("4 KiB random write, depth 32", "randwrite", "4k", 32, **WHILE),
        _primary("1 MiB sequential write, depth 4", "write", "1M", 4, **SEQUENCE),
        _wrong("primary", "4 KiB", "4k", 32, 4096),
    ),
)


# A huge disk


_HUGE_WRITES = 100_000
HUGE_SIZE = (16 << 40) - (1 << 20)
"""Bytes: as large as ext4 lets a file be, or nearly."""


def _huge(folder: Path, disk: Path) -> dict[str, Side]:
    found: dict[str, Side] = {}
    for name, side in (("replfs", sides.ReplfsSecondary), ("qemu", sides.QemuExport)):
        path = folder / f"{name}.raw"
        with path.open("wb") as file:
            file.truncate(HUGE_SIZE)
        found[name] = side(folder / name, path)
    return found


def _huge_writes(side: Side) -> float:
    options: dict[str, Any] = {"size": HUGE_SIZE, "norandommap": 1, "number_ios": _HUGE_WRITES, "random_generator": "tausworthe64"}
    return load.mib_per_second(side, file=side.file, rw="randwrite", bs="4k", depth=32, **options)


def _mounting_again(side: Any) -> float:
    """Seconds; the unmount before it, which puts all that was written on stable storage, is not in them."""
    side.stop()
    return load.seconds_of(side.resume)


def _growth(side: Any) -> float:
    """MiB that the process is larger by, after a million writes over what it holds already."""
    before = side.resident()
    options: dict[str, Any] = {"size": "1G", "norandommap": 1, "number_ios": 1_000_000}
    load.fio(file=side.file, rw="randwrite", bs="4k", depth=32, **options)
    return float(max(side.resident() - before, 0) / load.MIB)


HUGE = Scenario(
    "huge",
    _huge,
    (
        _checkpoint,
        Workload("16 TiB, 100,000 random writes of 4 KiB", "MiB/s", _huge_writes, at_least(10)),
        Workload(
            "16 TiB, room for each of them",
            "KiB",
            lambda side: side.overlay_bytes("active") / _HUGE_WRITES / 1024,
            at_most(4.5 / 86),
            limits=(("replfs", 4.5),),
        ),
        Workload("16 TiB, memory resident", "MiB", lambda side: side.resident() / load.MIB, (), limits=(("replfs", 150),)),
        Workload("16 TiB, mounting it again", "s", _mounting_again, (), limits=(("replfs", 1),)),
        Workload("16 TiB, memory more after a million overwrites", "MiB", _growth, (), limits=(("replfs", 8),)),
    ),
    slow=True,
)

SCENARIOS = (VIEW, INGEST, CHECKPOINT, FAILOVER, PRIMARY, HUGE)


def make_disk(folder: Path) -> Path:
    """1 GiB of random data."""
    path = folder / "random.raw"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(16 << 20))
    return path


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
