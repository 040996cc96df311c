"""Checkpoints that are asked for on the primary's side: by hand, at intervals, between two commands; and by nobody else."""

from pathlib import Path

import pytest
import trio
from disks import same
from harness import Sides, replfs, wait_for
from test_replication import pair
from volumes import content, on_disk

from replfs.block.replication.lineage import Ids
from replfs.errors import ReplfsError
from replfs.protocol import peer
from replfs.volume.peers import PeerClient

SIZE = 1 << 20


def log_line(folder: Path, word: str, status: int = 0) -> str:
    return f"echo {word} $REPLFS_MOUNTPOINT >>{folder}/commands; exit {status}"


def commands(folder: Path) -> list[str]:
    log = folder / "commands"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def test_commands_before_and_after(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    before, after = log_line(sides.folder, "before"), log_line(sides.folder, "after")
    near = sides.primary(SIZE, "--checkpoint-before", before, "--checkpoint-after", after)
    with near.file.open("r+b") as file:
        file.write(b"seen")
    replfs("checkpoint", near.point)
    assert commands(sides.folder) == ["before", "after"]
    assert (sides.folder / "commands").read_text().split()[1] == str(near.point)
    assert far.content()[:4] == b"seen"
    assert (near.get("generation"), far.get("generation")) == ("1", "1")


def test_a_command_that_fails_prevents_the_checkpoint_and_not_the_other_command(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    before = f"echo no freezing today >&2; {log_line(sides.folder, 'before', 3)}"
    near = sides.primary(SIZE, "--checkpoint-before", before, "--checkpoint-after", log_line(sides.folder, "after"))
    near.expected.append("checkpoint failed")
    done = replfs("checkpoint", near.point, check=False)
    assert done.returncode == 1
    assert "status 3: no freezing today" in done.stderr
    assert commands(sides.folder) == ["before", "after"]
    assert far.get("generation") == "0"


def test_checkpoints_at_intervals(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    near = sides.primary(SIZE, "--checkpoint-every", "0.1")
    for number in range(3):
        with near.file.open("r+b") as file:
            file.write(b"%d" % number)
        wait_for(lambda number=number: far.content()[:1] == b"%d" % number, "a checkpoint")
    near.umount()
    assert far.get("stage") == "running"


async def test_only_its_own_primary_may_ask_a_secondary_for_one(tmp_path: Path) -> None:
    async with pair(tmp_path, SIZE) as (near, far):
        await near.link.checkpoint()
        assert far.state.generation == 1
        client = await PeerClient.connect(near.link.target, 10)
        assert client is not None
        with pytest.raises(ReplfsError, match="did not say who it is"):
            await client.ask(peer.Checkpoint(), peer.Done)
        await client.ask(peer.Hello(peer.VERSION, "0123456789abcdef", SIZE, Ids()), peer.Welcome)
        with pytest.raises(ReplfsError, match="belongs to another primary"):
            await client.ask(peer.Checkpoint(), peer.Done)
        assert far.state.generation == 1
        with pytest.raises(ReplfsError, match="speaks version 1, and this side 99"):
            await client.ask(peer.Hello(99, "", SIZE, Ids()), peer.Welcome)
        client.close()


async def test_the_machine_does_not_write_while_the_secondary_takes_one(tmp_path: Path) -> None:
    async with pair(tmp_path, SIZE) as (near, far):
        met = near.link._met
        assert met is not None
        async with near.link._quiet(met):
            with trio.move_on_after(0.05) as waiting:
                await near.view.write(0, b"x" * 512)
            assert waiting.cancelled_caught
            assert (await on_disk(near))[:512] == (await on_disk(far))[:512] == bytes(512)
        await near.view.write(0, b"x" * 512)
        assert (await on_disk(near))[:512] == (await on_disk(far))[:512] == b"x" * 512


async def test_a_secondary_between_two_states_takes_none(tmp_path: Path) -> None:
    async with pair(tmp_path, SIZE) as (near, far):
        await near.view.write(0, b"x" * 4096)
        before = await content(far)
        await far.attached(near.state.node, syncing=True, ids=far.state.ids)
        for refused in (far._checkpoint, far._stop, far.checkpoint_for_primary):
            with pytest.raises(ReplfsError, match="between two states"):
                await refused()
        assert same(await content(far), before)
        await far.agreed(far.state.ids)
        await far.checkpoint_for_primary()
        assert (await content(far))[:1] == b"x"
