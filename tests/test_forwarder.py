"""What a primary sends, over real connections to the NBD server of the project, whose node finishes its writes in any order.

The node fails the test when two changes that overlap are under way in it at the same time: such a node may carry them out in either
order, or both in part. Cuts come at any moment; what they leave unequal has to be stale.
"""

import errno
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nbd_peers import nbdkit, peer
from trio.testing import wait_all_tasks_blocked
from volumes import secondary

from replfs.block.nbd import Call, NbdTarget
from replfs.block.node import Data, Extent, Node
from replfs.block.replication import forwarder as forwarder_module
from replfs.block.replication.forwarder import Change, Forwarder
from replfs.block.replication.lineage import Ids
from replfs.block.storage import Storage
from replfs.block.tracking import BLOCK, Tracking
from replfs.export.nbd import NbdServer
from replfs.protocol import peer as protocol
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.volume.peers import PeerClient

LIMIT = 60.0
SIZE = 5 * BLOCK + 777
PAGE = 4096


class Shuffling(Node):
    """A disk in memory. A change takes some turns, so that changes end in another order than they begin."""

    def __init__(self, size: int = SIZE, seed: int | None = 1) -> None:
        """``seed`` None: every change ends at once."""
        self.size = size
        self.content = bytearray(size)
        self.under_way: list[tuple[int, int]] = []
        self.most = 0
        self.count = 0
        self.fails_at = -1
        self.gate: trio.Event | None = None
        self._choose = random.Random(seed) if seed is not None else None
        self.overlapped = ""
        self.zeroed: list[tuple[int, int, bool]] = []  # offset, length, and whether the room may be given back

    async def _change(self, offset: int, data: bytes) -> None:
        stop = offset + len(data)
        for low, high in self.under_way:
            if low < stop and offset < high:
                self.overlapped = f"{offset}-{stop} while {low}-{high} is under way"
        self.under_way.append((offset, stop))
        self.most = max(self.most, len(self.under_way))
        self.count += 1
        try:
            if self.count == self.fails_at:
                raise OSError(errno.ENOSPC, "no room")
            middle = offset + len(data) // 2
            self.content[offset:middle] = data[: len(data) // 2]
            if self.gate is not None:
                await self.gate.wait()
            for _ in range(self._choose.randrange(12) if self._choose else 0):
                await trio.lowlevel.checkpoint()
            self.content[middle:stop] = data[len(data) // 2 :]
        finally:
            self.under_way.remove((offset, stop))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def write(self, offset: int, data: Data) -> None:
        await self._change(offset, bytes(data))

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        self.zeroed.append((offset, length, may_unmap))
        await self._change(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        pass

    async def flush(self) -> None:
        pass

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        return [Extent(length, False, False)]

    async def close(self) -> None:
        pass


class Counting(Tracking):
    """Counts what is reported of each range."""

    begun: Counter[tuple[int, int]]
    reported: Counter[tuple[int, int]]

    def begin(self, first: int, last: int) -> None:
        self.begun[first, last] += 1
        super().begin(first, last)

    def acknowledged(self, first: int, last: int) -> None:
        self.reported[first, last] += 1
        super().acknowledged(first, last)

    def lost(self, first: int, last: int) -> None:
        self.reported[first, last] += 1
        super().lost(first, last)


class Run:
    """A server, connections to it, and a forwarder; a model of what the primary's disk has."""

    def __init__(self, node: Node, server: NbdServer, target: Target, tracking: Counting, window: int) -> None:
        self.node = node
        self.server = server
        self.target = target
        self.tracking = tracking
        self.forwarder = Forwarder(tracking, window, self._failed)
        self.model = bytearray(node.size)
        self.failures: list[OSError] = []
        self.links: list[NbdTarget] = []
        self.changes: list[Change] = []

    def _failed(self, error: OSError) -> None:
        self.failures.append(error)

    async def connect(self, count: int, nursery: trio.Nursery) -> None:
        self.links = [await NbdTarget.connect(self.target, timeout=LIMIT, nursery=nursery) for _ in range(count)]
        self.failures.clear()
        self.forwarder.attach(self.links)

    async def change(self, offset: int, data: bytes | None, length: int) -> None:
        """As the mirror does it."""
        if not self.tracking.is_hot(offset, length):
            await self.tracking.heat(offset, length)
        first, last = Tracking.span(offset, length)
        self.tracking.begin(first, last)
        self.model[offset : offset + length] = bytes(length) if data is None else data
        if self.forwarder.attached and not self.tracking.is_stale(first, last):
            self.changes.append(self.forwarder.put(offset, length, data))
        else:
            self.tracking.lost(first, last)

    def send_stale(self) -> None:
        """As the resync does it, block by block."""
        for block in list(self.tracking.stale):
            self.tracking.resend(block, block)
            start, stop = block * BLOCK, min((block + 1) * BLOCK, SIZE)
            self.changes.append(self.forwarder.put(start, stop - start, bytes(self.model[start:stop])))

    async def cut(self) -> None:
        """The link ends; when this returns the server has done all that it will do."""
        async with trio.open_nursery() as nursery:
            for link in self.links:
                nursery.start_soon(link.close)
        self.detach()
        while self.server.connections:
            await trio.lowlevel.checkpoint()

    def detach(self) -> None:
        lost = self.forwarder.detach()
        assert len(set(lost)) == len(lost)
        assert not any(change.over for change in lost)
        for change in lost:
            change.end()
        assert self.forwarder.held == 0

    def check(self) -> None:
        """What is not equal, and not under way, is stale, or not acknowledged."""
        dirty = self.tracking.dirty()
        for block in range(self.tracking.blocks):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            assert block in dirty or self.model[part] == self.node.content[part], f"block {block} differs, and is in sync"

    def check_reports(self) -> None:
        """Nothing is under way: everything was reported, and once."""
        assert all(change.over for change in self.changes)
        assert self.tracking.begun == self.tracking.reported


@asynccontextmanager
async def running(node: Node, *, window: int = 1 << 20, connections: int = 2) -> AsyncIterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        address = UnixAddress(f"{folder}/s")
        server = NbdServer(node, "disk")
        with trio.fail_after(LIMIT):
            await server.listen(address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                tracking, _ = await Counting.open(Storage(), f"{folder}/tracking", node.size, durable=False)
                assert isinstance(tracking, Counting)
                tracking.begun, tracking.reported = Counter(), Counter()
                run = Run(node, server, Target(address, "disk"), tracking, window)
                run.nursery = nursery  # type: ignore[attr-defined]
                await run.connect(connections, nursery)
                try:
                    yield run
                finally:
                    tracking.release()
                    for link in run.links:
                        await link.close()
                    nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True, scope="module")
def small_limits() -> object:
    """What is large is so with these small disks, too; connections are full sooner."""
    saved = forwarder_module._LARGE, forwarder_module._DEPTH
    forwarder_module._LARGE, forwarder_module._DEPTH = 100_000, 8  # type: ignore[misc]
    yield
    forwarder_module._LARGE, forwarder_module._DEPTH = saved  # type: ignore[misc]


def bounded(offset: int, length: int) -> tuple[int, int]:
    return offset, min(length, SIZE - offset)


places = st.one_of(
    st.builds(bounded, st.integers(0, 6 * PAGE), st.integers(1, 3 * PAGE)),  # most of them overlap
    st.builds(bounded, st.integers(0, SIZE - 1), st.integers(1, 2 * BLOCK)),
    st.builds(lambda page: (page * PAGE, PAGE), st.integers(0, SIZE // PAGE - 1)),
    st.sampled_from([(0, SIZE), (0, 100_001), (SIZE - 1, 1), (4095, 2), (PAGE, 100_000)]),
)
steps = st.tuples(places, st.booleans(), st.integers(0, 3))
seeds = st.integers(0, 1 << 32)


@settings(max_examples=60)
@given(st.lists(steps, min_size=1, max_size=40), st.integers(1, 3), seeds, st.sampled_from([0, 5000, 1 << 20]))
def test_the_other_side_becomes_equal(changes: list[tuple[tuple[int, int], bool, int]], links: int, seed: int, window: int) -> None:
    async def main() -> None:
        node = Shuffling(seed=seed)
        async with running(node, window=window, connections=links) as run:
            for number, ((offset, length), zeroes, turns) in enumerate(changes):
                data = None if zeroes else random.Random(number).randbytes(length)
                await run.change(offset, data, length)
                if number % 5 == 4:
                    await run.forwarder.room()
                    assert run.forwarder.held <= window
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                run.check()
            await run.forwarder.drained()
            assert not run.failures
            assert run.forwarder.held == 0
            assert node.content == run.model
            assert not node.overlapped, node.overlapped
            run.check_reports()
            assert not run.tracking.stale
            run.tracking.begin_flush()
            run.tracking.flushed()
            assert run.tracking.clean

    trio.run(main)


@settings(max_examples=60)
@given(st.lists(steps, min_size=1, max_size=40), st.integers(1, 3), seeds, st.integers(0, 40), st.integers(0, 30), st.booleans())
def test_after_a_cut_all_that_differs_is_stale_and_is_sent_again(
    changes: list[tuple[tuple[int, int], bool, int]], links: int, seed: int, cut_at: int, later: int, one: bool
) -> None:
    """``one``: only one of the connections ends at first; the server goes on with what it has got on the others."""

    async def main() -> None:
        node = Shuffling(seed=seed)
        async with running(node, connections=links) as run:
            for number, ((offset, length), zeroes, turns) in enumerate(changes):
                if number == min(cut_at, len(changes) - 1):
                    for _ in range(later):
                        await trio.lowlevel.checkpoint()
                    if one:
                        await run.links[-1].close()
                    await run.cut()
                    run.check()
                    run.check_reports()
                await run.change(offset, None if zeroes else random.Random(number).randbytes(length), length)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
            run.check()
            run.check_reports()
            await run.connect(links, run.nursery)  # type: ignore[attr-defined]
            run.send_stale()
            await run.forwarder.drained()
            assert node.content == run.model
            assert not node.overlapped, node.overlapped
            assert not run.tracking.stale
            run.check_reports()

    trio.run(main)


async def test_changes_of_different_pages_are_under_way_side_by_side() -> None:
    """Or the tests above would prove little."""
    node = Shuffling()
    node.gate = trio.Event()
    async with running(node) as run:
        for page in range(20):
            await run.change(page * PAGE, b"x" * PAGE, PAGE)
        await wait_all_tasks_blocked()
        assert node.most == 16, "as many as two connections may have under way"
        node.gate.set()
        await run.forwarder.drained()
        assert node.content == run.model


async def test_a_change_waits_for_the_one_before_it_on_the_same_page_and_those_behind_wait_too() -> None:
    node = Shuffling(seed=None)
    node.gate = trio.Event()
    async with running(node) as run:
        for offset in (0, 100, 8 * PAGE):
            await run.change(offset, b"x" * 50, 50)
        await wait_all_tasks_blocked()
        assert node.under_way == [(0, 50)]
        node.gate.set()
        await run.forwarder.drained()
        assert node.content == run.model


async def test_a_large_change_is_under_way_alone() -> None:
    node = Shuffling(seed=None)
    node.gate = trio.Event()
    async with running(node) as run:
        for offset, length in ((4 * BLOCK, 10), (0, 100_001), (4 * BLOCK, 20)):
            await run.change(offset, b"x" * length, length)
        found = []
        for _ in range(3):
            await wait_all_tasks_blocked()
            found.append(list(node.under_way))
            node.gate.set()
            node.gate = trio.Event()
        assert found == [[(4 * BLOCK, 4 * BLOCK + 10)], [(0, 100_001)], [(4 * BLOCK, 4 * BLOCK + 20)]]
        node.gate = None
        await run.forwarder.drained()
        assert node.content == run.model


async def test_room_waits_for_the_window_and_drained_for_all() -> None:
    node = Shuffling(seed=None)
    node.gate = trio.Event()
    order: list[str] = []

    async def noting(name: str, wait: Callable[[], object]) -> None:
        await wait()  # type: ignore[misc]
        order.append(f"{name} {run.forwarder.held}")

    async with running(node, window=2 * PAGE) as run:
        await run.forwarder.room()
        for page in range(3):
            await run.change(page * PAGE, b"x" * PAGE, PAGE)
        assert run.forwarder.held == 3 * PAGE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(noting, "room", run.forwarder.room)
            nursery.start_soon(noting, "little", lambda: run.forwarder.room(PAGE))
            nursery.start_soon(noting, "drained", run.forwarder.drained)
            nursery.start_soon(noting, "first", run.changes[0].wait)
            await wait_all_tasks_blocked()
            assert order == []
            node.gate.set()
        assert {name.split()[0] for name in order} == {"room", "little", "drained", "first"}
        held = {name: int(number) for name, number in (line.split() for line in order)}
        assert held["room"] <= 2 * PAGE
        assert held["little"] <= PAGE
        assert held["drained"] == 0
        await run.changes[0].wait()  # which is over


async def test_whoever_waits_goes_on_when_the_link_ends() -> None:
    node = Shuffling(seed=None)
    node.gate = trio.Event()
    async with running(node, window=0) as run:
        await run.change(0, b"x" * PAGE, PAGE)
        await run.change(0, b"y" * PAGE, PAGE)
        async with trio.open_nursery() as nursery:
            for wait in (run.forwarder.room, run.forwarder.drained, run.changes[0].wait, run.changes[1].wait):
                nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            run.detach()
        assert set(run.tracking.stale) == {0}
        run.check_reports()
        node.gate.set()


async def test_an_error_of_the_other_side_is_told_and_its_change_is_not_acknowledged() -> None:
    node = Shuffling(seed=3)
    node.fails_at = 5
    async with running(node) as run:
        for page in range(0, 48, 16):  # in three blocks
            for half in (0, 1):
                await run.change(page * PAGE, bytes([page + half + 1]) * PAGE, PAGE)
        await run.change(64 * PAGE, None, 4 * PAGE)
        await wait_all_tasks_blocked()
        assert [error.errno for error in run.failures] == [errno.ENOSPC]
        run.check()
        await run.cut()
        run.check()
        run.check_reports()
        await run.connect(1, run.nursery)  # type: ignore[attr-defined]
        run.send_stale()
        await run.forwarder.drained()
        assert node.content == run.model


async def test_a_link_that_is_gone_when_a_change_is_sent_is_told() -> None:
    node = Shuffling()
    async with running(node) as run:
        for link in run.links:
            await link.close()
        await run.change(0, b"x", 1)
        assert [error.errno for error in run.failures] == [errno.ENOTCONN]
        run.detach()
        assert set(run.tracking.stale) == {0}
        run.check_reports()


async def test_zeroes_reach_a_server_that_knows_no_zeroes_and_takes_no_large_requests(tmp_path: Path) -> None:
    """They are sent as data then, as much as it takes."""
    size = 80 << 20
    address = UnixAddress(str(tmp_path / "nbd.sock"))
    failures: list[OSError] = []
    async with peer(address, *nbdkit("--filter=nozero", "memory", str(size))), trio.open_nursery() as nursery:
        link = await NbdTarget.connect(Target(address, ""), timeout=LIMIT, nursery=nursery)
        tracking, _ = await Tracking.open(Storage(), str(tmp_path / "tracking"), size, durable=False)
        forwarder = Forwarder(tracking, 1 << 20, failures.append)
        forwarder.attach([link])
        changes = []
        for start in range(0, size, forwarder.largest_zeroes):
            length = min(forwarder.largest_zeroes, size - start)
            tracking.begin(*Tracking.span(start, length))
            changes.append(forwarder.put(start, length, None))
        while not (failures or all(change.over for change in changes)):
            await trio.lowlevel.checkpoint()
        assert failures == []
        forwarder.detach()
        tracking.release()
        await link.close()


async def test_what_an_old_link_has_left_at_the_secondary_is_not_carried_out_after_what_a_new_one_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secondary's disk hangs, the primary gives the link up, comes again, and sends its blocks as they are now.

    The server has requests of the old connections still, which it has not begun: they must not undo what comes later.
    """
    async with secondary(tmp_path, bytes(4 << 20)) as volume, trio.open_nursery() as nursery:
        target = Target(UnixAddress(str(tmp_path / "s.sock")), volume.config.export)
        gate = trio.Event()
        plain = volume.disk.write

        async def write(offset: int, data: Data) -> None:
            if bytes(data[:4]) == b"old!":
                await gate.wait()
            await plain(offset, data)

        monkeypatch.setattr(volume.disk, "write", write)

        async def linked() -> tuple[PeerClient, NbdTarget]:
            client = await PeerClient.connect(target, LIMIT)
            assert client is not None
            await client.ask(protocol.Hello(protocol.VERSION, "p" * 16, volume.view.size, Ids("a" * 16)), protocol.Welcome)
            await client.ask(protocol.Clear(), protocol.Done)
            link = await NbdTarget.connect(target, timeout=LIMIT, nursery=nursery)
            await client.ask(protocol.Attach(True, True), protocol.Done)
            return client, link

        async def again() -> None:
            client, link = await linked()
            for number in range(4):
                await link.write(number * PAGE, b"new!" * 1024)
            client.close()
            await link.close()

        client, link = await linked()
        for number in (*range(16, 32), *range(4)):  # sixteen are begun
            link.submit(Call(wire.NBD_CMD_WRITE, number * PAGE, PAGE, payload=b"old!" * 1024))
        await wait_all_tasks_blocked()
        client.close()
        await link.close()
        await wait_all_tasks_blocked()
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as inner:
                inner.start_soon(again)
                with trio.move_on_after(1):  # a secondary may have the new link wait until the old one has ended
                    while bytes(await volume.disk.read(3 * PAGE, 4)) != b"new!":
                        await trio.lowlevel.checkpoint()
                await wait_all_tasks_blocked()
                gate.set()
            while volume.server.connections:
                await trio.lowlevel.checkpoint()
        assert bytes(await volume.disk.read(0, 4 * PAGE)) == b"new!" * 4096


async def test_zeroes_that_are_to_keep_their_room_are_sent_as_such() -> None:
    node = Shuffling()
    async with running(node) as run:
        for number, may_unmap in enumerate((True, False)):
            run.tracking.begin(number, number)
            await run.forwarder.put(number * BLOCK, BLOCK, None, may_unmap).wait()
    assert node.zeroed == [(0, BLOCK, True), (BLOCK, BLOCK, False)]


async def test_the_end_of_a_link_that_was_replaced_is_not_a_failure() -> None:
    """What it had under way is lost, and was told to be: the link that there is now has nothing to do with it."""
    node = Shuffling()
    node.gate = trio.Event()
    async with running(node) as run:
        await run.change(0, b"x" * PAGE, PAGE)
        old = run.links
        run.detach()
        await run.connect(2, run.nursery)  # type: ignore[attr-defined]
        for link in old:
            await link.close()
        assert run.failures == []
        node.gate.set()
        run.send_stale()
        await run.forwarder.drained()
        run.check_reports()
        assert node.content == run.model
