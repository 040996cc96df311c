"""Were a rule of the order of writes broken, the power cuts would find it: each is broken in turn.

Most by a storage that lies: its sync returns at once, reports success, and makes nothing durable, which is what leaving it out
would do. Where that says too little, the code is changed. Each rule has the scenario that needs it. Nothing is found while the
storage is honest and the code as it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash import Violation, explore
from faults import FaultyStorage, Lie
from test_power_cut import (
    Scenario,
    case_on,
    checkpoints,
    failover,
    primary_alone,
    primary_killed,
    primary_that_forwards,
    resume,
    root,
    staged,
    start,
    stop,
    writes,
)

from replfs.block.copy_before_write import CopyBeforeWrite
from replfs.block.file import File
from replfs.block.qcow2.changes import Changes
from replfs.block.qcow2.changes import sync as plain_sync
from replfs.block.replication.rules import Mode
from replfs.block.staging import Staging

__all__ = ["root"]  # a fixture

plain_release = Staging._release
plain_file_sync = File.sync


class Rule(NamedTuple):
    scenario: Scenario
    lies: tuple[Lie, ...] = ()
    disk: str = "raw"
    mode: Mode = Mode.SECONDARY
    broken: dict[str, Any] = {}  # noqa: RUF012 - attributes of the code's, by their full names, and what is put in their place
    check: int = 0
    """Of so many states, the images of one are given to qemu-img check."""


async def sync_only_before(*files: File) -> None:
    if not any(file.path.endswith(".journal") for file in files):
        await plain_sync(*files)


async def sync_only_after(*files: File) -> None:
    if any(file.path.endswith(".journal") for file in files):
        await plain_sync(*files)


async def sync_own(self: File) -> None:
    """As if all that an earlier process wrote were on stable storage."""
    self._inherited = False
    await plain_file_sync(self)


def free_at_once(self: Changes, cluster: int, count: int) -> None:
    self._refcounts.free(cluster, count)


async def give_back_at_once(self: Changes) -> None:
    released, self._released = self._released, []
    await self._give_back(released)


async def flush_only(self: CopyBeforeWrite) -> None:
    """In place of draining."""


def release_all(self: Staging, marked: int) -> None:
    plain_release(self, 1 << 62)


CHANGES = "replfs.block.qcow2.changes"
REPLAY = "replfs.block.qcow2.replay.Replay"


DISK = r"/disk\.(raw|qcow2)$"
STATE_DIRECTORY = r"\.replfs$"
RULES = {
    "a pre-image is durable before the disk is overwritten": Rule(
        writes, (Lie("sync", r"/hidden\.\d+\.qcow2$"), Lie("durable", r"/hidden\.\d+\.qcow2$"))
    ),
    "a flush of the view makes active durable": Rule(
        writes, (Lie("sync", r"/active\.\d+\.qcow2$"), Lie("durable", r"/active\.\d+\.qcow2$"))
    ),
    "a flush over NBD makes the disk durable": Rule(writes, (Lie("sync", DISK), Lie("durable", DISK))),
    "the disk is durable before a checkpoint": Rule(checkpoints, (Lie("sync", DISK), Lie("durable", DISK))),
    "the disk is durable before replication starts": Rule(start, (Lie("sync", DISK), Lie("durable", DISK))),
    "the disk is durable before a failover is done": Rule(failover, (Lie("sync", DISK), Lie("durable", DISK))),
    "the state is durable before it replaces the old one": Rule(checkpoints, (Lie("sync", r"/state\.json\.new$"),)),
    "the state is named durably": Rule(checkpoints, (Lie("directory", STATE_DIRECTORY),)),
    "new overlays are durable before the state names them": Rule(
        checkpoints, (Lie("sync", r"/(active|hidden)\.\d+\.qcow2$", which=0),)
    ),
    "a stop is durable": Rule(stop, (Lie("directory", STATE_DIRECTORY),)),
    "the state directory is named durably": Rule(writes, (Lie("directory", r"/replfs-[^/]*$"),)),
    "an end makes everything durable": Rule(resume, (Lie("sync", r"/(active|hidden)\.\d+\.qcow2$|" + DISK),)),
    "a primary's flush": Rule(primary_alone, (Lie("sync", DISK), Lie("durable", DISK)), mode=Mode.PRIMARY),
    "a primary's flush of an image": Rule(
        primary_alone, (Lie("sync", DISK), Lie("durable", DISK)), "qcow2 over a backing file", Mode.PRIMARY
    ),
    "what finds the pre-images is durable, too": Rule(writes, (Lie("sync", r"/hidden\.\d+\.journal$"),)),
    "entries are written when their data is durable": Rule(
        primary_alone, (), "qcow2 over a backing file", Mode.PRIMARY, {f"{CHANGES}.sync": sync_only_after}
    ),
    "entries are durable before a flush is answered": Rule(
        primary_alone, (), "qcow2 4k", Mode.PRIMARY, {f"{CHANGES}.sync": sync_only_before}
    ),
    "a record counts only if its data is there": Rule(
        writes, broken={f"{REPLAY}._is_sound": lambda self, record: record.change.name != "CONTENT"}
    ),
    "clusters are given back after a commit": Rule(
        primary_alone,
        (),
        "qcow2 4k",
        Mode.PRIMARY,
        {f"{CHANGES}.Changes.free": free_at_once, f"{CHANGES}.Changes.settle": give_back_at_once},
    ),
    "new refcount blocks are durable before anything leads to them": Rule(
        primary_alone, (Lie("durable", DISK),), "qcow2 512", Mode.PRIMARY, check=2
    ),
}
RULES |= {
    "a staged write's pre-image is durable before the disk has it": Rule(staged, (Lie("sync", r"/hidden\.\d+\.journal$"),)),
    "a flush covers what is staged": Rule(staged, broken={"replfs.block.copy_before_write.CopyBeforeWrite.drain": flush_only}),
    "what was staged is not written over before it is known to be applied": Rule(
        staged, broken={"replfs.block.staging.Staging._release": release_all}
    ),
}
RULES["a flush covers what a process wrote that was killed"] = Rule(
    primary_killed, mode=Mode.PRIMARY, broken={"replfs.block.file.File.sync": sync_own}
)
RULES["what may differ is known before it does"] = Rule(
    primary_that_forwards, (Lie("sync", r"/tracking$"), Lie("durable", r"/tracking$")), mode=Mode.PRIMARY
)
HONEST = {(rule.scenario, rule.disk): name for name, rule in RULES.items()}
"""One rule for each scenario."""


async def cut(root: Path, name: str, rule: Rule, cuts: int, *, lying: bool) -> None:
    def prepare(storage: FaultyStorage) -> None:
        storage.lies = [Lie(lie.kind, lie.path, lie.which) for lie in rule.lies] if lying else []

    starts = rule.scenario is primary_that_forwards or (rule.scenario is not start and rule.mode is Mode.SECONDARY)
    case = case_on(root, name, rule.disk, rule.mode, start=starts)
    case.prepare = prepare
    await case.record(rule.scenario)
    case.check_images = rule.check
    await explore(case, cuts)


@pytest.mark.parametrize("name", RULES)
async def test_what_breaks_a_rule_is_found(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, instead in RULES[name].broken.items():
        monkeypatch.setattr(what, instead)
    with pytest.raises(Violation):
        await cut(root, name, RULES[name], 400, lying=True)


@pytest.mark.parametrize("name", HONEST.values())
async def test_nothing_is_found_while_no_rule_is_broken(root: Path, name: str, full: bool) -> None:
    await cut(root, name, RULES[name], 400 if full else 60, lying=False)
