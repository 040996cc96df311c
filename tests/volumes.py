"""Volumes without a mount, for tests of what replication does: the nodes are called as the exports would call them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.volume.config import Config
from replfs.volume.link import Condition
from replfs.volume.primary import PrimaryVolume
from replfs.volume.secondary import SecondaryVolume


def config(folder: Path, mode: Mode, **changes: Any) -> Config:
    side = {"listen": UnixAddress(str(folder / "s.sock"))} if mode is Mode.SECONDARY else {}
    settings = {
        "mode": mode,
        "disk": folder / f"{mode}.raw",
        "mountpoint": folder / "mnt",
        "state_dir": folder / f"{mode}.raw.replfs",
        "name": "disk.img",
        "start": True,
        "stop_on_unmount": False,
        "durability": "power",
        "cache_size": 32 << 20,
        **side,
        **changes,
    }
    return Config(**settings)


@asynccontextmanager
async def secondary(folder: Path, content: bytes | None = None, **changes: Any) -> AsyncIterator[SecondaryVolume]:
    """A secondary's volume, from its begin to its close. ``content`` makes the disk, None takes the one that is there."""
    if content is not None:
        (folder / "secondary.raw").write_bytes(content)
    volume = SecondaryVolume(config(folder, Mode.SECONDARY, **changes), None)
    async with _running(volume):
        yield volume


@asynccontextmanager
async def primary(folder: Path, target: Target, content: bytes | None = None, **changes: Any) -> AsyncIterator[PrimaryVolume]:
    if content is not None:
        (folder / "primary.raw").write_bytes(content)
    volume = PrimaryVolume(config(folder, Mode.PRIMARY, target=target, **changes), None)
    async with _running(volume):
        yield volume


@asynccontextmanager
async def _running(volume: SecondaryVolume | PrimaryVolume) -> AsyncIterator[None]:
    refused = None
    async with trio.open_nursery() as nursery:
        try:
            await volume.connect(nursery)
            await volume.begin(nursery)
        except ReplfsError as error:
            refused = error
        else:
            yield
            await volume.settle()
        nursery.cancel_scope.cancel()
    if refused is not None:
        await volume.abandon()
        raise refused
    await volume.close()


async def content(volume: SecondaryVolume | PrimaryVolume) -> bytes:
    """What the mounted file would show."""
    return bytes(await volume.view.read(0, volume.view.size))


def on_disk(volume: SecondaryVolume | PrimaryVolume) -> bytes:
    return Path(volume.disk.file.path).read_bytes()


async def until_stage(volume: SecondaryVolume, stage: Stage) -> None:
    """Let the others run until the stage is this one."""
    with trio.fail_after(60):
        while volume.state.stage is not stage:
            await trio.lowlevel.checkpoint()


async def until_connected(volume: PrimaryVolume) -> None:
    """Let the others run until the copies agree."""
    with trio.fail_after(60):
        while volume.link.condition is not Condition.CONNECTED:
            await trio.lowlevel.checkpoint()


async def checkpoint(volume: SecondaryVolume) -> None:
    await volume.control(Operation.CHECKPOINT)
