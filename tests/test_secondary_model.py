"""The secondary's contract, in random orders, against a model of two bytearrays: the disk and the view.

Every read of a file gives all other tasks a turn before and after it, so requests side by side interleave wherever they can.
"""

import tempfile
from pathlib import Path

import pytest
import trio
from disks import assert_sound, put, same
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import content, kill, on_disk, secondary, until_stage

from replfs.block.file import File
from replfs.block.node import Node
from replfs.block.qcow2.overlay import CLUSTER, SUBCLUSTER
from replfs.block.replication.rules import Operation, Stage
from replfs.volume.secondary import SecondaryVolume

SIZE = 3 * CLUSTER + 1111
SLOTS = 24  # requests of one batch take different slots of the disk, which do not keep to subclusters
SLOT = SIZE // SLOTS

Request = tuple[str, int, int, int]  # what, slot, length, seed
request = st.tuples(
    st.sampled_from(["view write", "view write", "view zero", "forward", "forward", "forward zero", "forward trim", "read"]),
    st.integers(0, SLOTS - 1),
    st.one_of(st.integers(1, SLOT), st.sampled_from([1, 512, SUBCLUSTER, SLOT])),
    st.integers(1, 255),
)
batch = st.lists(request, min_size=1, max_size=10)
step = st.one_of(batch, batch, st.sampled_from(["checkpoint", "remount", "kill", "stop", "failover"]))


@pytest.fixture(autouse=True)
def taking_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = File.read_into

    async def read_into(self: File, offset: int, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        got = await plain(self, offset, buffer)
        await trio.lowlevel.checkpoint()
        return got

    monkeypatch.setattr(File, "read_into", read_into)


class Model:
    def __init__(self, before: bytes) -> None:
        self.disk = bytearray(before)
        self.view = bytearray(before)
        self.one = False  # stop and failover make them one

    def write(self, which: bytearray, offset: int, data: bytes) -> None:
        which[offset : offset + len(data)] = data


async def carry_out(node: Node, what: str, offset: int, data: bytes) -> None:
    if what.endswith("zero"):
        await node.write_zeroes(offset, len(data))
    elif what.endswith("trim"):
        await node.discard(offset, len(data))
    else:
        await put(node, offset, data)


async def run_batch(volume: SecondaryVolume, model: Model, requests: list[Request]) -> None:
    taken: set[tuple[str, int]] = set()
    async with trio.open_nursery() as nursery:
        for what, slot, length, seed in requests:
            side = "forward" if what.startswith("forward") else "view"
            if (side, slot) in taken or (side == "forward" and volume.exported.fenced):
                continue
            taken.add((side, slot))
            offset = slot * SLOT
            if what == "read":
                nursery.start_soon(check_read, volume, offset, bytes(model.view[offset : offset + length]))
                continue
            data = bytes(length) if what.endswith(("zero", "trim")) else bytes((seed + i) % 256 for i in range(length))
            nursery.start_soon(carry_out, volume.exported if side == "forward" else volume.view, what, offset, data)
            model.write(model.disk if side == "forward" else model.view, offset, data)
            if model.one and side == "view":
                model.write(model.disk, offset, data)


async def check_read(volume: SecondaryVolume, offset: int, expected: bytes) -> None:
    buffer = bytearray(len(expected))
    if not volume.view.read_at_once(offset, memoryview(buffer)):
        buffer = await volume.view.read(offset, len(expected))
    assert buffer == expected


@settings(max_examples=80)
@given(st.lists(step, max_size=10), st.integers(0, 255), st.sampled_from(["power", "process"]))
async def test_the_view_and_the_disk_are_what_the_contract_says(
    steps: list[list[Request] | str], seed: int, durability: str
) -> None:
    with tempfile.TemporaryDirectory() as directory, trio.fail_after(100):
        folder = Path(directory)
        before = bytes((seed + i * 13 + (i >> 9)) % 256 for i in range(SIZE))
        model = Model(before)
        first: bytes | None = before
        while first is not None or steps:
            killed = False
            async with secondary(folder, first, durability=durability) as volume:
                first = None
                while steps:
                    now = steps.pop(0)
                    if now == "kill":
                        kill(volume)
                        killed = True
                    if now in ("remount", "kill"):
                        break
                    await take(volume, model, now)
                    assert same(await content(volume), bytes(model.view))
                    if volume.state.stage in (Stage.RUNNING, Stage.DONE):
                        assert same(await on_disk(volume), bytes(model.disk))
                if not steps and volume.state.stage is Stage.FAILOVER:
                    await until_stage(volume, Stage.DONE)
                    assert same(await on_disk(volume), bytes(model.disk))
                assert same(await content(volume), bytes(model.view))
                stage = volume.state.stage
            for overlay in (folder / "secondary.raw.replfs").glob("*.qcow2"):
                if not killed:  # or there may be clusters that nobody uses
                    assert_sound(overlay)
            assert stage is not Stage.FAILOVER_FAILED


async def take(volume: SecondaryVolume, model: Model, step: list[Request] | str) -> None:
    if isinstance(step, list):
        return await run_batch(volume, model, step)
    await volume.control(Operation(step)) if model.one is False or step != "checkpoint" else None
    if model.one:
        return None
    if step == "failover":
        model.disk = bytearray(model.view)
        model.one = True
    else:
        model.view = bytearray(model.disk)
        model.one = step == "stop"


async def test_checkpoints_under_load_show_one_moment(tmp_path: Path) -> None:
    """Forwarded writes carry rising numbers: a view never mixes what was before a checkpoint with what came after it."""
    blocks = 48
    async with secondary(tmp_path, bytes(blocks * 512 + 4096)) as volume, trio.open_nursery() as nursery:
        stop = trio.Event()

        async def forward() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for i in range(blocks):  # in order, so that any moment is a run of one number and then of the one before it
                    await volume.exported.write(i * 512, number.to_bytes(4, "big") * 128)
                    await trio.lowlevel.checkpoint()

        async def machine() -> None:
            while not stop.is_set():
                await volume.view.write(blocks * 512 + 100, b"m" * 1000)
                await volume.view.read(0, blocks * 512)
                await trio.lowlevel.checkpoint()  # neither suspends where there are only zeroes

        nursery.start_soon(forward)
        for _ in range(3):
            nursery.start_soon(machine)
        for _ in range(25):
            await volume.control(Operation.CHECKPOINT)
            views = {bytes(await volume.view.read(0, blocks * 512)) for _ in range(5)}
            assert len(views) == 1
            view = views.pop()
            numbers = [int.from_bytes(view[i * 512 : i * 512 + 4], "big") for i in range(blocks)]
            assert numbers == sorted(numbers, reverse=True)
            assert numbers[0] - numbers[-1] <= 1
        stop.set()
