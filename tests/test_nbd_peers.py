"""NBD against the real peers: libnbd's tools and QEMU as clients of our server, qemu-nbd and nbdkit as servers of our client.

Only unix sockets and loopback. A server process gets a socket that listens already (systemd's socket activation), so that nobody
waits for it to be ready; a test waits for what it has caused, never for time to pass.
"""

import errno
import json
import logging
import os
import random
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from replfs.block.nbd import NbdTarget
from replfs.block.node import Data, Extent, Node, merge
from replfs.errors import InUse, ReplfsError
from replfs.export import nbd
from replfs.export.nbd import NbdServer
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.uri import Address, Target, TcpAddress, UnixAddress

LIMIT = 60.0  # seconds for anything that talks to somebody; only a failure takes that long
SIZE = (4 << 20) + 5  # no multiple of anything
BLOCK = 4096
TOOLS = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"}


class Memory(Node):
    """A disk in memory that can be made to wait and to fail, and tells what it was asked."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.content = bytearray(size)
        self.asked: list[str] = []
        self.finished: list[str] = []
        self.fault: Exception | None = None
        self.gates: dict[str, trio.Event] = {}  # a request of this kind waits until the event is set

    async def _do(self, what: str) -> None:
        self.asked.append(what)
        if what in self.gates:
            await self.gates[what].wait()
        if self.fault is not None:
            raise self.fault
        self.finished.append(what)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._do("read")
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def write(self, offset: int, data: Data) -> None:
        await self._do("write")
        self.content[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await self._do("zeroes" if may_unmap else "zeroes-no-hole")
        self.content[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._do("discard")

    async def flush(self) -> None:
        await self._do("flush")

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        await self._do("extents")
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            size = min(BLOCK - offset % BLOCK, end - offset)
            zero = not any(self.content[offset : offset + size])
            merge(found, Extent(size, zero, zero))
            offset += size
        return found[:limit]

    async def close(self) -> None:
        pass


class Prompt(Memory):
    """One that can do at once whatever can be."""

    def _do_at_once(self, what: str) -> None:
        self.asked.append(what)
        if self.fault is not None:
            raise self.fault

    def read_at_once(self, offset: int, buffer: memoryview) -> bool:
        self._do_at_once("read")
        buffer[:] = self.content[offset : offset + len(buffer)]
        return True

    def write_at_once(self, offset: int, data: Data) -> bool:
        self._do_at_once("write")
        self.content[offset : offset + len(data)] = data
        return True


@pytest.fixture(autouse=True)
def only_expected_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A warning or a traceback in the log that the test does not take away fails the test."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


def taken(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far, which the test expects."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return messages


@asynccontextmanager
async def serving(node: Memory, address: Address, *, read_only: bool = False) -> AsyncIterator[NbdServer]:
    server = NbdServer(node, "disk", read_only=read_only)
    with trio.fail_after(LIMIT):
        await server.listen(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            try:
                yield server
            finally:
                nursery.start_soon(open_gates, node)
                nursery.cancel_scope.cancel()


async def open_gates(node: Memory) -> None:
    """Once the server has nothing left to do but to finish what is under way: or it would never end."""
    with trio.CancelScope(shield=True):
        await wait_all_tasks_blocked()
    for gate in node.gates.values():
        gate.set()


async def run(*command: str, status: int = 0) -> str:
    """Run a tool while our server serves; gives what it printed."""
    done = await trio.run_process(
        command,
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
        env=TOOLS,
    )
    output = done.stdout.decode()
    assert done.returncode == status, f"{command}: {output}"
    return output


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "nbd.sock"))


def uri(address: Address, export: str = "disk") -> str:
    return str(Target(address, export))


# --- libnbd and QEMU as clients of our server -------------------------------------------------------------------------------------


async def test_nbdinfo_sees_what_the_server_offers(address: UnixAddress) -> None:
    node = Memory()
    async with serving(node, address):
        seen = json.loads(await run("nbdinfo", "--no-content", "--json", uri(address)))
        assert seen["protocol"] == "newstyle-fixed"
        assert seen["structured"] is True
        [export] = seen["exports"]
        names = ("export-size", "block_size_minimum", "block_size_preferred", "block_size_maximum")
        assert [export[name] for name in names] == [SIZE, 1, 4096, 32 << 20]
        assert export["contexts"] == ["base:allocation"]
        offered = {name for name, value in export.items() if value is True}
        assert offered == {"can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"}
        listed = json.loads(await run("nbdinfo", "--no-content", "--list", "--json", uri(address, "")))
        assert [export["export-name"] for export in listed["exports"]] == ["disk"]
        assert "No such file or directory for export: other" in await run(
            "nbdinfo", "--no-content", uri(address, "other"), status=1
        )


async def test_nbdinfo_shows_the_map(address: UnixAddress) -> None:
    node = Memory()
    node.content[BLOCK : 3 * BLOCK] = b"x" * (2 * BLOCK)
    async with serving(node, address):
        found = json.loads(await run("nbdinfo", "--map", "--json", uri(address)))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in found] == [
        (0, BLOCK, 3),
        (BLOCK, 2 * BLOCK, 0),
        (3 * BLOCK, SIZE - 3 * BLOCK, 3),
    ]


async def test_nbdcopy_brings_a_disk_there_and_back(address: UnixAddress, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE // 2).ljust(SIZE, b"\0")
    (tmp_path / "in").write_bytes(content)
    node = Memory()
    async with serving(node, address):
        await run("nbdcopy", "--flush", str(tmp_path / "in"), uri(address))
        assert node.content == content
        assert "flush" in node.asked
        await run("nbdcopy", uri(address), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == content


NBDSH = """
import errno
def fails(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError("no error")
"""


async def nbdsh(target: str, script: str, *options: str) -> None:
    await run("nbdsh", "--base-allocation", *options, "-u", target, "-c", NBDSH + script)


@pytest.mark.parametrize("kind", [Memory, Prompt])
async def test_every_request_of_libnbd_does_what_it_says(address: UnixAddress, kind: type[Memory]) -> None:
    node = kind()
    async with serving(node, address):
        await nbdsh(
            uri(address),
            """
h.pwrite(b"abcdefg", 1)
assert h.pread(9, 0) == b"\\0abcdefg\\0"
h.pwrite(b"end", h.get_size() - 3, nbd.CMD_FLAG_FUA)
h.zero(3, 2, nbd.CMD_FLAG_NO_HOLE)
h.zero(1, 7, nbd.CMD_FLAG_FUA)
h.trim(100, 1000)
h.flush()
assert h.pread_structured(9, 0, lambda *_: 0, nbd.CMD_FLAG_DF) == b"\\0a\\0\\0\\0ef\\0\\0"
found = []
h.block_status(8192, 1, lambda name, offset, extents, error: found.append((name, offset, extents)))
h.block_status(8192, 1, lambda name, offset, extents, error: found.append((name, offset, extents)), nbd.CMD_FLAG_REQ_ONE)
assert found == [("base:allocation", 1, [4095, 0, 4097, 3]), ("base:allocation", 1, [4095, 0])], found
""",
        )
    expected = ["write", "read", "write", "flush", "zeroes-no-hole", "zeroes", "flush", "discard", "flush", "read"]
    assert node.asked == [*expected, "extents", "extents"]
    assert node.content[-3:] == b"end"


@pytest.mark.parametrize("kind", [Memory, Prompt])
async def test_what_a_client_must_not_ask_fails_with_the_error_of_the_specification(
    address: UnixAddress, kind: type[Memory]
) -> None:
    node = kind()
    async with serving(node, address):
        await nbdsh(
            uri(address),
            """
h.set_strict_mode(0)
size = h.get_size()
fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.ENOSPC, h.pwrite, b"xx", size - 1)
fails(errno.ENOSPC, h.zero, 2, size - 1)
fails(errno.EINVAL, h.trim, 2, size - 1)
fails(errno.EINVAL, h.cache, 1, 0)
fails(errno.EINVAL, h.zero, 1, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.pread, 1, 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.block_status, 0, 0, lambda *_: 0)
h.pwrite(b"", 0)
h.pread(0, size)
h.zero(0, 0)
h.trim(0, 0)
""",
        )
    assert node.content == bytes(SIZE)


@pytest.mark.parametrize(
    "setup", ["h.set_request_structured_replies(False)", "h.set_handshake_flags(0)", "h.set_handshake_flags(1)"]
)
async def test_clients_with_less_of_the_protocol_are_served(address: UnixAddress, setup: str) -> None:
    node = Memory()
    async with serving(node, address):
        script = f"""
{setup}
h.set_export_name("disk")
h.connect_unix({address.path!r})
h.pwrite(b"abc", h.get_size() - 3)
assert h.pread(4, h.get_size() - 4) == b"\\0abc"
h.shutdown()
"""
        await run("nbdsh", "-c", NBDSH + script)
    assert node.content[-3:] == b"abc"


async def test_qemu_writes_reads_and_zeroes(address: UnixAddress) -> None:
    node = Memory(4 << 20)
    async with serving(node, address):
        commands = [
            "write -P 1 0 64k",
            "write -f -P 2 1M 1M",
            "aio_write -P 3 2M 512k",
            "aio_write -P 4 3M 512k",
            "aio_flush",
            "write -z 1M 4k",
            "write -z -u 1028k 4k",
            "discard 3M 512k",
            "flush",
            "read -P 1 0 64k",
            "read -P 0 1M 8k",
            "read -P 2 1032k 900k",
            "read -P 3 2M 512k",
        ]
        output = await run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri(address))
    assert "failed" not in output
    assert "error" not in output
    assert {"flush", "zeroes", "zeroes-no-hole", "discard"} <= set(node.asked)


async def test_qemu_img_converts_and_compares(address: UnixAddress, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(1 << 20).ljust(4 << 20, b"\0")
    (tmp_path / "in").write_bytes(content)
    node = Memory(4 << 20)
    node.content[:] = b"x" * node.size
    async with serving(node, address):
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "in"), uri(address))
        assert node.content == content
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "in"), uri(address))


async def test_a_read_only_export_is_seen_as_such_and_takes_no_writes(address: UnixAddress) -> None:
    node = Memory()
    async with serving(node, address, read_only=True):
        await nbdsh(
            uri(address),
            """
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
h.set_strict_mode(0)
for call, argument in ((h.pwrite, b"x"), (h.zero, 1), (h.trim, 1)):
    fails(errno.EPERM, call, argument, 0)
h.flush()
assert h.pread(1, 0) == b"\\0"
""",
        )
    assert node.asked == ["flush", "read"]


# --- our server and what may happen to it -----------------------------------------------------------------------------------------


async def raw(address: Address, *, structured: bool = False) -> trio.SocketStream:
    """A connection in its transmission phase, by hand."""
    stream = await connect(address)
    said = wire.CLIENT_FLAGS.pack(3)
    if structured:
        said += wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_STRUCTURED_REPLY, 0)
    await stream.send_all(said + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_EXPORT_NAME, 4) + b"disk")
    await exactly(stream, wire.GREETING.size + (wire.OPTION_REPLY.size if structured else 0) + wire.EXPORT_NAME_REPLY.size)
    return stream


async def connect(address: Address) -> trio.SocketStream:
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    return await trio.open_tcp_stream(address.host, address.port)


async def exactly(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await stream.receive_some(length - len(data))
        assert more, f"the connection ended after {data!r}"
        data += more
    return data


async def until_closed(stream: trio.SocketStream) -> bytes:
    """What still comes. A connection that is closed with unread bytes is reset, which is closed, too."""
    data = b""
    try:
        while more := await stream.receive_some():
            data += more
    except trio.BrokenResourceError:
        pass
    await stream.aclose()
    return data


def request(kind: int, offset: int = 0, length: int = 0, data: bytes = b"", cookie: int = 7) -> bytes:
    return wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, 0, kind, cookie, offset, length) + data


def simple(cookie: int = 7, error: int = 0) -> bytes:
    return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, error, cookie)


READ = request(wire.NBD_CMD_READ, 0, 4)
WRITE = request(wire.NBD_CMD_WRITE, 0, 4, b"data")


@pytest.mark.parametrize("kind", [Memory, Prompt])
async def test_an_error_of_the_node_fails_its_request_only(
    address: UnixAddress, caplog: pytest.LogCaptureFixture, kind: type[Memory]
) -> None:
    node = kind()
    cases: list[tuple[Exception, int]] = [
        (OSError(errno.ENOSPC, "full"), wire.NBD_ENOSPC),
        (OSError(errno.EDQUOT, "full"), wire.NBD_ENOSPC),
        (OSError(errno.ENODEV, "gone"), wire.NBD_EIO),
        (OSError("no number"), wire.NBD_EIO),
    ]
    async with serving(node, address):
        stream = await raw(address)
        for fault, error in cases:
            node.fault = fault
            await stream.send_all(WRITE)
            assert await exactly(stream, 16) == simple(error=error)
        assert not taken(caplog)
        node.fault = ZeroDivisionError("a bug")
        await stream.send_all(WRITE)
        assert await exactly(stream, 16) == simple(error=wire.NBD_EIO)
        assert caplog.records[-1].exc_info is not None
        assert taken(caplog) == ["an NBD request (type 1, 4 bytes at 0) failed"]
        node.fault = None
        await stream.send_all(WRITE)
        assert await exactly(stream, 16) == simple()
        await stream.aclose()


@pytest.mark.parametrize("kind", [Memory, Prompt])
async def test_a_client_with_structured_replies_is_told_in_words(address: UnixAddress, kind: type[Memory]) -> None:
    node = kind()
    node.fault = OSError(errno.EIO, "the disk is on fire")
    async with serving(node, address):
        stream = await raw(address, structured=True)
        await stream.send_all(READ)
        payload = wire.ERROR.pack(wire.NBD_EIO, 19) + b"the disk is on fire"
        header = wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, wire.NBD_REPLY_TYPE_ERROR, 7, len(payload))
        assert await exactly(stream, 20 + len(payload)) == header + payload
        await stream.aclose()


async def test_a_slow_request_holds_up_no_other(address: UnixAddress) -> None:
    node = Memory()
    node.gates["read"] = trio.Event()
    async with serving(node, address):
        stream = await raw(address)
        await stream.send_all(WRITE + READ + WRITE + request(wire.NBD_CMD_FLUSH, cookie=8))
        assert await exactly(stream, 48) == simple() + simple() + simple(8)
        await stream.send_all(request(wire.NBD_CMD_FLUSH, cookie=9))
        assert await exactly(stream, 16) == simple(9)
        node.gates["read"].set()
        assert await exactly(stream, 20) == simple() + b"data"
        await stream.aclose()


async def test_as_many_slow_requests_as_come_are_all_answered(address: UnixAddress) -> None:
    node = Memory()
    node.gates["read"] = trio.Event()
    count = 3 * nbd.MAX_REQUESTS
    async with serving(node, address):
        stream = await raw(address)
        await stream.send_all(WRITE + READ * count + WRITE + request(wire.NBD_CMD_DISC))
        assert await exactly(stream, 16) == simple()  # not kept back by what has to wait
        await wait_all_tasks_blocked()
        assert node.asked.count("read") <= nbd.MAX_REQUESTS
        node.gates["read"].set()
        answers = await until_closed(stream)
        assert (len(answers), answers.count(simple())) == (count * 20 + 16, count + 1)


async def test_a_client_that_does_not_read_its_replies_is_not_served_on(address: UnixAddress) -> None:
    node = Memory(32 << 20)
    count = 64
    async with serving(node, address):
        stream = await raw(address)
        await stream.send_all(request(wire.NBD_CMD_READ, 0, node.size) * count)
        await wait_all_tasks_blocked(0.05)
        assert len(node.asked) == 1  # a second one would be more than 64 MiB and what else a request holds
        other = await raw(address)
        await other.send_all(READ)
        assert await exactly(other, 20) == simple() + bytes(4)
        await other.aclose()
        await stream.aclose()


async def test_a_polite_goodbye_waits_for_what_is_under_way(address: UnixAddress) -> None:
    node = Memory()
    node.gates["flush"] = trio.Event()
    async with serving(node, address):
        stream = await raw(address)
        await stream.send_all(request(wire.NBD_CMD_FLUSH) + request(wire.NBD_CMD_DISC) + WRITE)
        await wait_all_tasks_blocked()
        node.gates["flush"].set()
        assert await until_closed(stream) == simple()
    assert node.asked == ["flush"]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (bytes(1000), b""),
        (request(wire.NBD_CMD_WRITE, 0, (32 << 20) + 1), simple(error=wire.NBD_EINVAL)),
        (request(wire.NBD_CMD_WRITE, 0, 0xFFFFFFFF), simple(error=wire.NBD_EINVAL)),
    ],
    ids=["garbage", "a write too large", "a write much too large"],
)
async def test_a_client_that_breaks_the_protocol_loses_only_its_own_connection(
    address: UnixAddress, said: bytes, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = Memory()
    async with serving(node, address):
        bystander = await raw(address)
        stream = await raw(address)
        await stream.send_all(WRITE + said)
        assert await until_closed(stream) == simple() + answer
        await bystander.send_all(READ)
        assert await exactly(bystander, 20) == simple() + b"data"
        await bystander.aclose()
    assert len(caplog.records) == 1
    assert "the NBD client on the unix socket is disconnected: it " in caplog.text


async def test_a_client_that_vanishes_in_the_middle_leaves_nothing_behind(
    address: UnixAddress, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = Memory()
    node.gates["read"] = trio.Event()
    async with serving(node, address) as server:
        for said in (b"", WRITE[:10], WRITE[:-1], READ * 40, READ * 40 + WRITE[:-1]):
            stream = await raw(address)
            await stream.send_all(said)
            await wait_all_tasks_blocked()
            await stream.aclose()
        greeted = await connect(address)
        await greeted.aclose()
        node.gates["read"].set()
        while server.connections:
            await trio.lowlevel.checkpoint()
    assert not caplog.records
    assert "write" not in node.asked


async def test_a_bug_costs_one_connection_and_is_logged(address: UnixAddress, caplog: pytest.LogCaptureFixture) -> None:
    node = Memory()
    async with serving(node, address):
        node.size = -1  # which has no place in a handshake
        stream = await connect(address)
        await stream.send_all(wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_EXPORT_NAME, 0))
        await until_closed(stream)
        assert taken(caplog) == ["the NBD client on the unix socket is disconnected because of an unexpected error"]
        node.size = SIZE
        await (await raw(address)).aclose()


async def test_a_client_that_always_wants_something_leaves_others_their_turn(address: UnixAddress) -> None:
    """What can be done at once is done without an await, but not for ever."""
    memory = Prompt()
    writes = b"".join(request(wire.NBD_CMD_WRITE, n, 1, b"w") for n in range(2000))
    async with serving(memory, address):
        stream = await raw(address)
        await stream.send_all(WRITE)
        await exactly(stream, len(simple()))
        turns = [len(memory.asked)]
        await stream.send_all(writes)
        while turns[-1] < 2001:
            await trio.lowlevel.checkpoint()
            turns.append(len(memory.asked))
        assert max(later - earlier for earlier, later in pairwise(turns)) <= 2 * nbd._TURNS
        assert await exactly(stream, 2000 * len(simple())) == 2000 * simple()
        await stream.aclose()


async def test_no_more_than_sixteen_clients_are_let_in(address: UnixAddress, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Memory(), address) as server:
        streams = [await raw(address) for _ in range(16)]
        for _ in range(3):
            assert await until_closed(await connect(address)) == b""
        assert server.connections == 16
        assert taken(caplog) == ["there are 16 NBD connections already: more are turned away"]
        await streams.pop().aclose()
        while server.connections == 16:
            await trio.lowlevel.checkpoint()
        streams.append(await raw(address))
        for stream in streams:
            await stream.aclose()


async def test_a_client_that_does_not_come_to_the_point_is_disconnected(
    address: UnixAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "HANDSHAKE_TIMEOUT", 0.01)
    async with serving(Memory(), address):
        stream = await connect(address)
        await until_closed(stream)


async def test_closing_connections_finishes_their_requests_without_replies(address: UnixAddress) -> None:
    node = Memory()
    node.gates["write"] = trio.Event()
    async with serving(node, address) as server:
        stream = await raw(address)
        greeted = await connect(address)
        await stream.send_all(WRITE + request(wire.NBD_CMD_FLUSH, cookie=1))
        assert await exactly(stream, 16) == simple(1)
        server.read_only = True
        closed = trio.Event()

        async def close() -> None:
            await server.close_connections()
            closed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            assert await until_closed(stream) == b""
            await until_closed(greeted)
            await wait_all_tasks_blocked()
            assert not closed.is_set()
            newcomer = await raw(address)
            await newcomer.send_all(WRITE)
            assert await exactly(newcomer, 16) == simple(error=wire.NBD_EPERM)
            node.gates["write"].set()
        assert node.finished == ["flush", "write"]
        assert server.connections == 1
        await newcomer.aclose()


async def test_a_cancelled_server_finishes_what_is_under_way_and_frees_its_address(address: UnixAddress) -> None:
    node = Memory()
    node.gates["write"] = trio.Event()
    async with serving(node, address):
        stream = await raw(address)
        await stream.send_all(WRITE)
        await wait_all_tasks_blocked()
    assert node.finished == ["write"]
    assert not Path(address.path).exists()
    assert await until_closed(stream) == b""


async def test_a_unix_socket_is_private_and_replaces_only_what_is_dead(address: UnixAddress, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address.path)
    async with serving(Memory(), address):
        found = os.stat(address.path)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert os.listdir(tmp_path) == ["nbd.sock"]
        with pytest.raises(InUse, match=r"nbd\.sock is in use by another server: stop it or choose another --listen"):
            await NbdServer(Memory(), "disk").listen(address)
        await (await raw(address)).aclose()
    assert os.listdir(tmp_path) == []
    Path(address.path).write_text("precious")
    with pytest.raises(ReplfsError, match="exists and is not a socket"):
        await NbdServer(Memory(), "disk").listen(address)
    assert Path(address.path).read_text() == "precious"


async def test_a_server_leaves_the_socket_of_its_successor_alone(address: UnixAddress) -> None:
    async with serving(Memory(), address):
        os.unlink(address.path)
        successor = NbdServer(Memory(), "disk")
        await successor.listen(address)
    assert Path(address.path).exists()
    with trio.move_on_after(0):
        await successor.serve()
    assert not Path(address.path).exists()


def has_address(host: str) -> bool:
    """Whether this machine has it: a container may be without IPv6."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return ":" not in host
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tcp_addresses_are_served_and_belong_to_one_server(host: str) -> None:
    node = Memory()
    server = NbdServer(node, "disk")
    with trio.fail_after(LIMIT):
        if not has_address(host):
            with pytest.raises(ReplfsError, match=r"cannot listen on \[::1\]:0"):
                await server.listen(TcpAddress(host, 0))
            return
        bound = await server.listen(TcpAddress(host, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            with pytest.raises(InUse, match="is in use by another server"):
                await NbdServer(Memory(), "disk").listen(bound)
            await nbdsh(uri(bound), 'h.pwrite(b"over TCP", 1)')
            nursery.cancel_scope.cancel()
    assert node.content[1:9] == b"over TCP"


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        (UnixAddress("/nonexistent/socket"), "No such file or directory"),
        (UnixAddress("/tmp/" + "x" * 200), "at most 107 bytes"),
        (TcpAddress("192.0.2.1", 0), "Cannot assign requested address"),
    ],
)
async def test_an_address_that_cannot_be_had_is_named(listen: Address, reason: str) -> None:
    with pytest.raises(ReplfsError, match=reason) as caught:
        await NbdServer(Memory(), "disk").listen(listen)
    assert str(listen) in str(caught.value)


# --- qemu-nbd and nbdkit as servers of our client ---------------------------------------------------------------------------------


class Peer:
    def __init__(self, address: UnixAddress, process: trio.Process) -> None:
        self.address = address
        self.process = process


@asynccontextmanager
async def peer(address: UnixAddress, *command: str) -> AsyncIterator[Peer]:
    """A server process, with a socket that listens from the start."""
    with trio.fail_after(LIMIT), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address.path)
        listening.listen()
        activated = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listening.fileno()}'
        async with trio.open_nursery() as nursery:
            start = partial(
                trio.run_process,
                ["bash", "-c", activated, "bash", *command],
                stdin=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                check=False,
                env=TOOLS,
            )
            process = await nursery.start(start)
            listening.close()
            yield Peer(address, process)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def target(address: Address, export: str = "", timeout: float = LIMIT) -> AsyncIterator[NbdTarget]:
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            node = await NbdTarget.connect(Target(address, export), timeout=timeout, nursery=nursery)
            yield node
            await node.close()


def nbdkit(*arguments: str) -> tuple[str, ...]:
    return ("nbdkit", "-f", "--exit-with-parent", *arguments)


async def refusal(address: Address, export: str = "", timeout: float = LIMIT) -> str:
    """The message with which a connection is refused."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            with pytest.raises(ReplfsError) as caught:
                await NbdTarget.connect(Target(address, export), timeout=timeout, nursery=nursery)
    message = str(caught.value)
    assert message.startswith(f"cannot replicate to {Target(address, export)}: ")
    assert message.isprintable()
    return message


async def fails(call: Callable[[], object], number: int) -> OSError:
    with pytest.raises(OSError) as caught:
        await call()  # type: ignore[misc]
    assert caught.value.errno == number, caught.value
    return caught.value


async def test_qemu_nbd_holds_what_was_written(address: UnixAddress, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * (1 << 20))
    expected = bytearray(disk.read_bytes())
    command = ("qemu-nbd", "-f", "raw", "-t", "-x", "disk", "--discard=unmap", str(disk))
    async with peer(address, *command), target(address, "disk") as node:
        assert (node.size, node.connected, node.link_error) == (1 << 20, True, "")
        chance = random.Random(3)
        for _ in range(100):
            offset = chance.randrange(node.size)
            data = chance.randbytes(chance.randrange(min(70000, node.size - offset)))
            if chance.randrange(3):
                await node.write(offset, data)
            else:
                await node.write_zeroes(offset, len(data), may_unmap=bool(chance.randrange(2)))
                data = bytes(len(data))
            expected[offset : offset + len(data)] = data
        await node.flush()
        assert await node.read(0, node.size) == expected
        await node.write_zeroes(512 << 10, 512 << 10)
        await node.discard(0, 4096)
        extents = await node.extents(0, node.size, 1000)
        assert sum(extent.length for extent in extents) == node.size
        assert extents[-1].zero
        assert len(await node.extents(0, node.size, 1)) == 1
        error = await fails(lambda: node.read(node.size, 1), errno.EINVAL)
        assert error.strerror
        await node.read(0, 1)
    expected[512 << 10 :] = bytes(512 << 10)
    assert disk.read_bytes()[4096:] == expected[4096:]


@pytest.mark.parametrize(
    "options", [("--no-sr",), ("--mask-handshake=0",), ("--mask-handshake=1",), ("--filter=nozero",), ("--filter=noextents",)]
)
async def test_servers_with_less_of_the_protocol_will_do(address: UnixAddress, options: tuple[str, ...]) -> None:
    content = random.Random(4).randbytes(300_000)
    async with peer(address, *nbdkit(*options, "memory", str(SIZE))), target(address) as node:
        assert node.size == SIZE
        await node.write(SIZE - len(content), content)
        await node.write_zeroes(SIZE - 1000, 1000, may_unmap=False)
        await node.discard(0, 1000)
        await node.flush()
        assert await node.read(SIZE - len(content), len(content)) == content[:-1000] + bytes(1000)
        assert sum(extent.length for extent in await node.extents(5, 1000, 9)) == 1000


async def test_large_requests_are_cut_to_what_the_server_takes(address: UnixAddress) -> None:
    content = random.Random(5).randbytes(1 << 20)
    sizes = ("blocksize-minimum=1", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
    async with peer(address, *nbdkit("--filter=blocksize-policy", "memory", "2M", *sizes)), target(address) as node:
        await node.write(1, content)
        assert await node.read(1, len(content)) == content
        await node.write_zeroes(0, 1 << 20)
        assert await node.read(0, (1 << 20) + 2) == bytes(1 << 20) + content[-1:] + b"\0"


async def test_requests_beyond_the_protocols_own_limit_are_cut(address: UnixAddress) -> None:
    memory = Memory((32 << 20) + 100)
    async with serving(memory, address), target(address, "disk") as node:
        content = b"0123456789" * (node.size // 10)
        await node.write(0, content)
        assert await node.read(0, len(content)) == content
    assert memory.asked == ["write", "write", "read", "read"]


async def test_an_error_of_the_server_leaves_the_link_up(address: UnixAddress) -> None:
    failing = nbdkit("--filter=error", "memory", str(SIZE), "error=ENOSPC", "error-pwrite-rate=100%")
    async with peer(address, *failing), target(address) as node:
        await fails(lambda: node.write(0, b"data"), errno.ENOSPC)
        assert await node.read(0, 4) == bytes(4)
        assert (node.connected, node.link_error) == (True, "")


async def test_many_requests_are_under_way_at_once_and_one_may_be_cancelled(address: UnixAddress) -> None:
    memory = Memory()
    memory.gates["write"] = trio.Event()
    async with serving(memory, address), target(address, "disk") as node:
        async with trio.open_nursery() as nursery:
            for number in range(1, 12):
                nursery.start_soon(node.write, number * 1000, bytes([number]) * 1000)
            with trio.move_on_after(0):
                await node.write(0, b"never sent")
            with trio.CancelScope() as scope:
                nursery.start_soon(wait_all_tasks_blocked)

                async def cancel() -> None:
                    await wait_all_tasks_blocked()
                    scope.cancel()

                nursery.start_soon(cancel)
                await node.write(50_000, b"sent")
            assert await node.read(0, 4) == bytes(4)
            assert not memory.finished.count("write")
            memory.gates["write"].set()
        await node.flush()
        assert await node.read(0, 10) == bytes(10)
        for number in range(1, 12):
            assert await node.read(number * 1000, 1000) == bytes([number]) * 1000
        assert await node.read(50_000, 4) == b"sent"


async def test_a_server_that_dies_fails_what_is_under_way_and_all_that_comes(
    address: UnixAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async with peer(address, *nbdkit("--filter=delay", "memory", str(SIZE), "wdelay=3600")) as server, target(address) as node:
        async with trio.open_nursery() as nursery:
            for offset in range(10):
                nursery.start_soon(fails, partial(node.write, offset, b"x"), errno.ECONNRESET)
            assert await node.read(0, 1) == b"\0"  # the writes have been sent before
            server.process.send_signal(signal.SIGKILL)
        await fails(node.flush, errno.ENOTCONN)
        assert not node.connected
        assert node.link_error.startswith(f"{Target(address, '')}: the ")
    assert taken(caplog) == [f"the link to {Target(address, '')} is given up: {node.link_error.split(': ')[-1]}"]


async def test_a_server_that_hangs_is_given_up_after_the_time_limit(address: UnixAddress, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    memory.gates["write"] = trio.Event()
    async with serving(memory, address), target(address, "disk", timeout=1.5) as node:
        async with trio.open_nursery() as nursery:
            for offset in range(3):
                nursery.start_soon(fails, partial(node.write, offset, b"x"), errno.ETIMEDOUT)
        await fails(lambda: node.read(0, 1), errno.ENOTCONN)
        assert "a request was not answered within 1.5" in node.link_error
        memory.gates["write"].set()
    assert len(taken(caplog)) == 1


async def test_a_server_that_answers_others_is_not_silent(address: UnixAddress) -> None:
    """A write may take longer than the time limit, as long as something arrives meanwhile."""
    memory = Memory()
    memory.gates["write"] = trio.Event()
    async with serving(memory, address), target(address, "disk", timeout=1) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write, 0, b"x")
            end = trio.current_time() + 2.5
            while trio.current_time() < end:
                await node.read(BLOCK, 1)
            assert node.connected
            memory.gates["write"].set()
        assert node.link_error == ""


async def test_a_closed_target_is_gone_without_a_complaint(address: UnixAddress) -> None:
    async with serving(Memory(), address) as server:
        async with trio.open_nursery() as nursery:
            node = await NbdTarget.connect(Target(address, "disk"), nursery=nursery)
            await node.write(0, b"")
            await node.write(0, b"x")
            await node.close()
            assert not nursery.child_tasks
            await node.close()
        assert (node.connected, node.link_error) == (False, "")
        await fails(node.flush, errno.ENOTCONN)
        while server.connections:
            await trio.lowlevel.checkpoint()


async def test_a_nursery_that_is_cancelled_takes_the_link_down(address: UnixAddress) -> None:
    async with serving(Memory(), address) as server:
        async with trio.open_nursery() as nursery:
            node = await NbdTarget.connect(Target(address, "disk"), nursery=nursery)
            await node.write(0, b"x")
            nursery.cancel_scope.cancel()
        assert not node.connected
        while server.connections:
            await trio.lowlevel.checkpoint()


async def test_why_a_target_cannot_be_used_is_said_on_one_line(address: UnixAddress, tmp_path: Path) -> None:
    assert "No such file or directory; is the secondary running there?" in await refusal(address)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = TcpAddress("127.0.0.1", unused.getsockname()[1])
        assert "Connection refused; is the secondary running there?" in await refusal(closed)
    async with serving(Memory(), address, read_only=True):
        assert "the export is read-only" in await refusal(address, "disk")
        no_such = await refusal(address, "other")
        assert "the server has no export of that name (it says: the export 'other' is not served here)" in no_such
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    async with peer(address, "qemu-nbd", "-f", "raw", "-t", "-x", "disk", str(disk)):
        assert "the server has no export of that name (it says: " in await refusal(address, "other")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-r", "memory", "1M"), "the export is read-only"),
        (("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512"), "only multiples of 512 bytes"),
        (("--oldstyle", "memory", "1M"), "oldstyle"),
        (("--tls=require", "--tls-psk=/dev/null", "memory", "1M"), "TLS"),
        (("--filter=exportname", "--mask-handshake=0", "memory", "1M", "exportname=x", "exportname-strict=true"), "of that name"),
    ],
)
async def test_servers_that_a_primary_cannot_use_are_refused(address: UnixAddress, options: tuple[str, ...], reason: str) -> None:
    async with peer(address, *nbdkit(*options)):
        assert reason in await refusal(address, "disk")


# --- servers that mean no good ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def hostile(address: UnixAddress, *says: bytes) -> AsyncIterator[None]:
    """Says the first at once, and each of the others after it has heard something; then it goes on listening."""
    with trio.fail_after(LIMIT), trio.socket.socket(socket.AF_UNIX) as listening:
        await listening.bind(address.path)
        listening.listen()

        async def serve() -> None:
            connection, _ = await listening.accept()
            async with trio.SocketStream(connection) as stream:
                for say in says:
                    await stream.send_all(say)
                    if not await stream.receive_some():
                        break
                await until_closed(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()


def in_words(value: object) -> str:
    """Parameters that are bytes make no names for tests."""
    return value if isinstance(value, str) else ""


GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_IHAVEOPT, 3)
NO_STRUCTURED = wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ERR_UNSUP, 0)
GO = (
    wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_GO, wire.NBD_REP_INFO, wire.INFO_EXPORT.size)
    + wire.INFO_EXPORT.pack(wire.NBD_INFO_EXPORT, SIZE, wire.NBD_FLAG_HAS_FLAGS)
    + wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_GO, wire.NBD_REP_ACK, 0)
)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n"], "not an NBD server"),
        ([GREETING, bytes(20)], "something else than the reply to an option"),
        ([GREETING, NO_STRUCTURED, GO.replace(wire.INFO_EXPORT.pack(0, SIZE, 1), b"\xff" * 12)], "did not tell the export's size"),
    ],
    ids=in_words,
)
async def test_a_hostile_server_is_refused_at_once(address: UnixAddress, says: list[bytes], reason: str) -> None:
    async with hostile(address, *says):
        assert reason in await refusal(address)


async def test_a_server_that_says_nothing_is_refused_in_time(address: UnixAddress) -> None:
    async with hostile(address, b"NBDMAGIC"):
        assert "it did not answer within 0.05 seconds" in await refusal(address, timeout=0.05)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (bytes(16), "where a reply begins"),
        (simple(99), "a request that was not made"),
        (simple(1) + simple(1), "a request that was not made"),
        (wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 0, 1, 0), "where a reply begins"),
        (simple(1, wire.NBD_ESHUTDOWN), "shutting down"),
    ],
    ids=in_words,
)
async def test_a_server_that_turns_hostile_is_given_up_with_the_reason(
    address: UnixAddress, reply: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hostile(address, GREETING, NO_STRUCTURED, GO, reply), target(address) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(may_fail, node, reply))
        while node.connected:
            await trio.lowlevel.checkpoint()
        assert reason in node.link_error
        await fails(node.flush if node.size < 0 else lambda: node.read(0, 1), errno.ENOTCONN)
    assert len(taken(caplog)) == 1


async def may_fail(node: NbdTarget, reply: bytes) -> None:
    """A write, which that reply answers or not."""
    if reply.startswith(simple(1)):
        await node.write(0, b"x")
    else:
        with pytest.raises(OSError):
            await node.write(0, b"x")


async def test_an_error_counts_when_the_reply_is_whole(address: UnixAddress, caplog: pytest.LogCaptureFixture) -> None:
    """The server speaks of an error, has more to say, and then says nonsense: what became of the write nobody knows."""
    structured = wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ACK, 0)
    contexts = wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_ERR_UNSUP, 0)
    said = wire.ERROR.pack(wire.NBD_EPERM, 0)
    chunk = wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 0, wire.NBD_REPLY_TYPE_ERROR, 1, len(said)) + said
    async with hostile(address, GREETING, structured, contexts, GO, chunk + bytes(16)), target(address) as node:
        await fails(lambda: node.write(0, b"x"), errno.ECONNRESET)
        assert "where a reply begins" in node.link_error
    assert len(taken(caplog)) == 1


async def test_target_and_server_together_are_a_disk(address: UnixAddress) -> None:
    memory = Memory()
    expected = bytearray(SIZE)
    chance = random.Random(6)
    async with serving(memory, address), target(address, "disk") as node:

        async def writer(begin: int, end: int) -> None:
            for _ in range(60):
                offset = chance.randrange(begin, end)
                data = chance.randbytes(chance.randrange(min(100_000, end - offset) + 1))
                action = chance.randrange(4)
                if action == 0:
                    await node.write_zeroes(offset, len(data))
                    data = bytes(len(data))
                elif action == 1:
                    await node.flush()
                    continue
                else:
                    await node.write(offset, data)
                expected[offset : offset + len(data)] = data
                assert await node.read(offset, len(data)) == data

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(writer, number * SIZE // 16, (number + 1) * SIZE // 16)
    assert memory.content == expected


async def test_a_unix_socket_s_path_may_be_as_long_as_the_kernel_takes(tmp_path: Path) -> None:
    server = NbdServer(Memory(), "disk")
    longest = f"{tmp_path}/".ljust(107, "s")
    await server.listen(UnixAddress(longest))
    assert stat.S_ISSOCK(os.stat(longest).st_mode)
    await server.close()
    with pytest.raises(ReplfsError, match="at most 107 bytes"):
        await NbdServer(Memory(), "disk").listen(UnixAddress(f"{longest}s"))
    assert os.listdir(tmp_path) == []
