"""Volumes without a mount, for tests of what replication does: the nodes are called as the exports would call them."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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


_killed: list[SecondaryVolume | PrimaryVolume] = []


async def _die(volume: SecondaryVolume | PrimaryVolume) -> None:
    """Its files are closed by nobody but the kernel."""
    if isinstance(volume, SecondaryVolume):
        await volume.server.close()
    places = (str(volume.config.disk), str(volume.config.state_dir))
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith(places):
                os.close(int(entry))


def kill(volume: SecondaryVolume | PrimaryVolume) -> None:
    """Have its end be that of a killed process: nothing is put anywhere any more."""
    _killed.append(volume)


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
            if volume not in _killed:
                await volume.settle()
        nursery.cancel_scope.cancel()
    if volume in _killed:
        _killed.remove(volume)
        await _die(volume)
        return
    if refused is not None:
        await volume.abandon()
        raise refused
    await volume.close()


async def content(volume: SecondaryVolume | PrimaryVolume) -> bytes:
    """What the mounted file would show."""
    return bytes(await volume.view.read(0, volume.view.size))


async def on_disk(volume: SecondaryVolume | PrimaryVolume) -> bytes:
    """What the disk holds, with all that was acknowledged."""
    if isinstance(volume, SecondaryVolume):
        await volume.exported.drain()
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
