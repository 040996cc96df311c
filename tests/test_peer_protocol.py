"""What a primary and a secondary say to each other: the bytes, whoever sends them, and whoever else uses the same address.

A hostile peer gets an answer or loses its connection. It never stops the server, nor what others do there.
"""

import json
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nbd_peers import Memory, nbdkit, peer, run
from trio.testing import wait_all_tasks_blocked
from volumes import content, secondary

from replfs.block.nbd import NbdTarget
from replfs.block.replication.lineage import Ids
from replfs.errors import ReplfsError, Unreachable
from replfs.export import nbd
from replfs.export.nbd import NbdServer
from replfs.protocol import peer as protocol
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.client import PeerNegotiation, Refused
from replfs.protocol.nbd.server import GREETING, Export, Handshake, Phase
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.protocol.nbd.wire import ProtocolError
from replfs.protocol.peer import LIMIT, Lines
from replfs.volume.peers import PeerClient
from replfs.volume.secondary import SecondaryVolume

SECONDS = 60.0
IDS = Ids("0123456789abcdef", "", ("fedcba9876543210",))
REQUESTS = [
    protocol.Hello(protocol.VERSION, "a" * 16, 1 << 44, IDS),
    protocol.Attach(True, False),
    protocol.Agreed(IDS, True),
    protocol.Checkpoint(),
    protocol.Blocks(1 << 28),
    protocol.Ping(),
    protocol.Clear(),
]
ANSWERS = [
    protocol.Welcome(1, "b" * 16, "", 5, Ids(), "secondary", "running", False),
    protocol.Done(7),
    protocol.Found([(0, 1), (5, 1 << 28)], -1),
    protocol.Failed("no: \u00e4\u2028\x00"),
]
OPTION = (
    wire.CLIENT_FLAGS.pack(wire.NBD_FLAG_C_FIXED_NEWSTYLE) + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_REPLFS, 4) + b"disk"
)
REPLY = 20  # bytes of the reply to the option


# Bytes and values


def test_messages_come_back_as_they_were() -> None:
    for message in REQUESTS:
        assert protocol.request(protocol.encode(message)) == message
    for message in ANSWERS:
        assert protocol.answer(protocol.encode(message)) == message
    assert all(protocol.encode(message).count(b"\n") == 1 for message in (*REQUESTS, *ANSWERS))


def test_requests_are_no_answers() -> None:
    for message in REQUESTS:
        with pytest.raises(ReplfsError, match="not an answer"):
            protocol.answer(protocol.encode(message))
    for message in ANSWERS:
        with pytest.raises(ReplfsError, match="not a request"):
            protocol.request(protocol.encode(message))


def test_lines_are_the_same_wherever_they_are_cut() -> None:
    stream = b"".join(protocol.encode(message) for message in REQUESTS) + b"\n\nrest"
    whole = Lines().receive(stream)
    assert [protocol.request(line) for line in whole[: len(REQUESTS)]] == REQUESTS
    assert whole[len(REQUESTS) :] == [b"", b""]
    for cut in range(len(stream) + 1):
        lines = Lines()
        assert lines.receive(stream[:cut]) + lines.receive(stream[cut:]) == whole
    lines = Lines()
    assert [line for at in range(len(stream)) for line in lines.receive(stream[at : at + 1])] == whole
    assert lines.receive(b"\n") == [b"rest"]


@pytest.mark.parametrize("step", [1 << 30, LIMIT, 4096, 4097])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(step: int) -> None:
    def received(stream: bytes) -> list[bytes]:
        lines = Lines()
        return [line for at in range(0, len(stream), step) for line in lines.receive(stream[at : at + step])]

    assert received(b"x" * LIMIT + b"\n" + b"y\n") == [b"x" * LIMIT, b"y"]
    for stream in (b"x" * (LIMIT + 1), b"x" * (LIMIT + 1) + b"\n", b"a\n" + b"x" * (LIMIT + 1)):
        with pytest.raises(ReplfsError, match="more than"):
            received(stream)


HOSTILE = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"{",
    b"null",
    b"[]",
    b"1e999",
    b'"Ping"',
    b"{}",
    b'{"type":"Nobody"}',
    b'{"type":null}',
    b'{"type":["Ping"]}',
    b'{"type":"Ping","more":1}',
    b'{"type":"Blocks"}',
    b'{"type":"Blocks","start":null}',
    b'{"type":"Blocks","start":1.5}',
    b'{"type":"Blocks","start":"1"}',
    b'{"type":"Blocks","start":1e400}',
    b'{"type":"Blocks","start":' + b"9" * 5000 + b"}",
    b'{"type":"Attach","syncing":1,"first":0}',
    b'{"type":"Hello","version":1,"node":"\\ud800","size":1,"ids":{}}',
    b'{"type":"Hello","version":1,"node":7,"size":1,"ids":{}}',
    b'{"type":"Hello","version":1,"node":"x","size":1,"ids":[]}',
    b'{"type":"Hello","version":1,"node":"x","size":1,"ids":{"history":[1]}}',
    b'{"type":"Hello","version":1,"node":"x","size":1,"ids":{"other":1}}',
    b'{"type":"Found","runs":[[1]],"more":0}',
    b'{"type":"Found","runs":[[1,2,3]],"more":0}',
    b'{"type":"Done","generation":"x"}',
    b"[" * 200_000,
    b'{"other":' + b"[" * 200_000,
    b'{"type":' + b'{"a":' * 40_000,
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_message_is_said_so_in_one_line(line: bytes) -> None:
    for read in (protocol.request, protocol.answer):
        with pytest.raises(ReplfsError) as caught:
            read(line)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


values: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just({})),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
tags = st.sampled_from([type(message).__name__ for message in (*REQUESTS, *ANSWERS)])
fields = st.sampled_from(sorted({field for message in (*REQUESTS, *ANSWERS) for field in message.__struct_fields__}))
objects = st.builds(lambda tag, rest: {"type": tag, **rest}, tags, st.dictionaries(fields, values, max_size=5))
lines = st.one_of(st.binary(max_size=200), objects.map(lambda value: json.dumps(value).encode()))


@settings(max_examples=150)
@given(lines)
def test_whatever_comes_is_a_message_or_refused(line: bytes) -> None:
    for read in (protocol.request, protocol.answer):
        try:
            message = read(line)
        except ReplfsError:
            continue
        assert read(protocol.encode(message)) == message


# The option


def test_the_option_is_the_same_wherever_it_is_cut() -> None:
    ping = protocol.encode(protocol.Ping())
    stream = OPTION + ping
    for cut in range(len(stream) + 1):
        handshake = Handshake(Export("disk", 5, False), peers=True)
        replies = handshake.receive(stream[:cut])
        more = b""
        if handshake.phase is Phase.PEER:
            more = stream[cut:]
        else:
            replies += handshake.receive(stream[cut:])
        assert handshake.phase is Phase.PEER
        assert handshake.rest + more == ping
        assert len(replies) == REPLY
    stream = GREETING + replies + b"behind"
    for cut in range(len(GREETING) + len(replies) + 1):
        negotiation = PeerNegotiation("disk")
        sent = b""
        for part in (stream[: min(cut, 18)], stream[18:cut] if cut > 18 else stream[cut:18], stream[max(cut, 18) :]):
            sent += negotiation.receive(part)
        assert (negotiation.done, negotiation.agreed, negotiation.rest) == (True, True, b"behind")
        assert sent == OPTION


def test_the_option_is_for_a_server_that_has_peers_and_for_its_export() -> None:
    for peers, name, expected in (
        (True, b"disk", wire.NBD_REP_ACK),
        (True, b"", wire.NBD_REP_ACK),
        (True, b"other", wire.NBD_REP_ERR_UNKNOWN),
        (True, b"\xff\0", wire.NBD_REP_ERR_UNKNOWN),
        (False, b"disk", wire.NBD_REP_ERR_UNSUP),
        (False, b"other", wire.NBD_REP_ERR_UNSUP),
    ):
        handshake = Handshake(Export("disk", 5, False), peers=peers)
        handshake.receive(wire.CLIENT_FLAGS.pack(wire.NBD_FLAG_C_FIXED_NEWSTYLE))
        reply = handshake.receive(wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_REPLFS, len(name)) + name)
        _, option, kind, _ = wire.OPTION_REPLY.unpack_from(reply)
        assert (option, kind) == (wire.NBD_OPT_REPLFS, expected)
        assert handshake.phase is (Phase.PEER if expected == wire.NBD_REP_ACK else Phase.OPTIONS)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.booleans(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_hostile_server_cannot_make_the_option_s_client_raise_what_it_does_not_say(
    tail: bytes, greeted: bool, kind: int, length: int
) -> None:
    negotiation = PeerNegotiation("disk")
    with suppress(ProtocolError, Refused):
        if greeted:
            negotiation.receive(GREETING)
            tail = struct.pack(">QIII", wire.NBD_OPTION_REPLY_MAGIC, wire.NBD_OPT_REPLFS, kind, length) + tail
        for at in range(0, len(tail), 7):
            negotiation.receive(tail[at : at + 7])


# A server


class Echo:
    """Answers requests with what it was asked so far; may be made to wait."""

    def __init__(self) -> None:
        self.asked: list[protocol.Request] = []
        self.left = 0
        self.gate: trio.Event | None = None

    async def answer(self, line: bytes) -> bytes:
        self.asked.append(protocol.request(line))
        if self.gate is not None:
            await self.gate.wait()
        return protocol.encode(protocol.Done(len(self.asked)))

    def leave(self) -> None:
        self.left += 1


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "nbd.sock"))


@asynccontextmanager
async def serving(address: UnixAddress, echo: Echo, node: Memory | None = None) -> AsyncIterator[NbdServer]:
    server = NbdServer(node or Memory(), "disk", peer=lambda: echo)
    with trio.fail_after(SECONDS):
        await server.listen(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            yield server
            nursery.cancel_scope.cancel()


async def conversation(address: UnixAddress) -> trio.SocketStream:
    """A connection on which the option was agreed on."""
    stream = await trio.open_unix_socket(address.path)
    await stream.send_all(OPTION)
    got = b""
    while len(got) < len(GREETING) + REPLY:
        got += await stream.receive_some(len(GREETING) + REPLY - len(got))
    return stream


async def to_end(stream: trio.SocketStream) -> bytes:
    got = b""
    try:
        while data := await stream.receive_some(1 << 16):
            got += data
    except trio.BrokenResourceError:
        pass
    await stream.aclose()
    return got


async def works(address: UnixAddress) -> None:
    """Another client is served."""
    async with trio.open_nursery() as nursery:
        link = await NbdTarget.connect(Target(address, "disk"), timeout=SECONDS, nursery=nursery)
        await link.write(0, b"works")
        assert bytes(await link.read(0, 5)) == b"works"
        await link.close()


async def test_requests_are_answered_one_after_the_other_however_they_are_cut(address: UnixAddress) -> None:
    echo = Echo()
    stream_of_requests = b"".join(protocol.encode(request) for request in REQUESTS)
    async with serving(address, echo):
        for step in (1, 7, 1 << 16):
            echo.asked.clear()
            stream = await conversation(address)
            for at in range(0, len(stream_of_requests), step):
                await stream.send_all(stream_of_requests[at : at + step])
            await stream.send_eof()
            answers = [protocol.answer(line) for line in Lines().receive(await to_end(stream))]
            assert answers == [protocol.Done(number + 1) for number in range(len(REQUESTS))]
            assert echo.asked == REQUESTS
        await wait_all_tasks_blocked()
        assert echo.left == 3


@pytest.mark.parametrize("line", [*HOSTILE, b"x" * (LIMIT + 1), b" " * (LIMIT + 1)], ids=range(len(HOSTILE) + 2))
async def test_a_hostile_line_ends_its_connection_only(address: UnixAddress, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    echo = Echo()
    async with serving(address, echo) as server:
        other = await conversation(address)
        stream = await conversation(address)
        with trio.move_on_after(SECONDS):
            with suppress(trio.BrokenResourceError):
                await stream.send_all(protocol.encode(protocol.Ping()) + line + b"\n" + protocol.encode(protocol.Clear()))
        answered = await to_end(stream)
        assert answered in (b"", protocol.encode(protocol.Done(1)))  # a line that is too long may have hidden the first one
        assert protocol.Clear() not in echo.asked
        await works(address)
        before = len(echo.asked)
        await other.send_all(protocol.encode(protocol.Ping()))
        assert await other.receive_some() == protocol.encode(protocol.Done(before + 1))
        await other.aclose()
        while server.connections:
            await trio.lowlevel.checkpoint()
        assert echo.left == 2
    assert "unexpected" not in caplog.text


async def test_a_peer_that_does_not_read_its_answers_stops_nobody(address: UnixAddress) -> None:
    echo = Echo()
    async with serving(address, echo):
        stream = await conversation(address)
        with trio.move_on_after(0.3):
            while True:
                await stream.send_all(protocol.encode(protocol.Ping()) * 1000)
        await works(address)
        await stream.aclose()


async def test_a_conversation_ends_with_the_server_s_connections(address: UnixAddress) -> None:
    """Also while an answer is waited for: whoever answers finishes what has begun by itself."""
    echo = Echo()
    async with serving(address, echo) as server:
        idle, busy = await conversation(address), await conversation(address)
        echo.gate = trio.Event()
        await busy.send_all(protocol.encode(protocol.Ping()))
        await wait_all_tasks_blocked()
        assert server.connections == 2
        await server.close_connections()
        assert server.connections == 0
        assert echo.left == 2
        assert await to_end(idle) == await to_end(busy) == b""
        await works(address)


async def test_other_clients_see_a_usual_nbd_server(address: UnixAddress, tmp_path: Path) -> None:
    echo = Echo()
    node = Memory(1 << 20)
    async with serving(address, echo, node):
        stream = await conversation(address)
        uri = str(Target(address, "disk"))
        seen = json.loads(await run("nbdinfo", "--no-content", "--json", uri))
        assert seen["exports"][0]["export-size"] == 1 << 20
        (tmp_path / "in").write_bytes(b"x" * (1 << 20))
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "in"), uri)
        assert node.content == b"x" * (1 << 20)
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "in"), uri)
        await stream.send_all(protocol.encode(protocol.Ping()))
        assert await stream.receive_some() == protocol.encode(protocol.Done(1))
        await stream.aclose()


async def test_a_client_may_go_on_after_the_option_was_refused(address: UnixAddress) -> None:
    server = NbdServer(Memory(), "disk")
    with trio.fail_after(SECONDS):
        await server.listen(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            stream = await trio.open_unix_socket(address.path)
            await stream.send_all(OPTION + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_ABORT, 0))
            kinds = []
            replies = (await to_end(stream))[len(GREETING) :]
            for at in range(0, len(replies), REPLY):
                kinds.append(wire.OPTION_REPLY.unpack_from(replies, at)[1:3])
            assert kinds == [(wire.NBD_OPT_REPLFS, wire.NBD_REP_ERR_UNSUP), (wire.NBD_OPT_ABORT, wire.NBD_REP_ACK)]
            nursery.cancel_scope.cancel()


# The primary's end


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "replfs without peers", "nbdkit oldstyle"])
async def test_a_server_of_another_kind_is_known_as_one(address: UnixAddress, tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    target = Target(address, "disk")
    if kind == "replfs without peers":
        server = NbdServer(Memory(), "disk")
        await server.listen(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            assert await PeerClient.connect(target, SECONDS) is None
            nursery.cancel_scope.cancel()
        return
    command = {
        "qemu-nbd": ("qemu-nbd", "-f", "raw", "-t", "-x", "disk", str(tmp_path / "disk")),
        "nbdkit": nbdkit("memory", "1M"),
        "nbdkit oldstyle": nbdkit("-o", "memory", "1M"),
    }[kind]
    async with peer(address, *command):
        assert await PeerClient.connect(target, SECONDS) is None
        if kind == "nbdkit":
            await works(address)


async def test_a_server_that_is_full_is_not_taken_for_one_of_another_kind(
    address: UnixAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be written to without a look at its generations."""
    monkeypatch.setattr(nbd, "MAX_CONNECTIONS", 1)
    async with serving(address, Echo()):
        stream = await conversation(address)
        with pytest.raises(Unreachable):
            await PeerClient.connect(Target(address, "disk"), SECONDS)
        await stream.aclose()


async def test_an_export_that_is_not_there_is_refused(address: UnixAddress) -> None:
    async with serving(address, Echo()):
        with pytest.raises(ReplfsError, match="no export of that name"):
            await PeerClient.connect(Target(address, "other"), SECONDS)


@asynccontextmanager
async def answering(address: UnixAddress, *answers: bytes) -> AsyncIterator[PeerClient]:
    """A client of a secondary that gives these answers, each to one line, whatever that is."""
    with trio.fail_after(SECONDS), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address.path)
        listening.listen()

        async def serve() -> None:
            accepted, _ = await trio.socket.from_stdlib_socket(listening).accept()
            stream = trio.SocketStream(accepted)
            async with stream:
                await talk(stream)

        async def talk(stream: trio.SocketStream) -> None:
            handshake = Handshake(Export("disk", 5, False), peers=True)
            received = Lines()
            await stream.send_all(GREETING)
            left = list(answers)
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some(1 << 16):
                    if handshake.phase is not Phase.PEER:
                        await stream.send_all(handshake.receive(data))
                        data = handshake.rest if handshake.phase is Phase.PEER else b""
                    for _ in received.receive(data):
                        if not left:
                            return
                        await stream.send_all(left.pop(0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            client = await PeerClient.connect(Target(address, "disk"), 5)
            assert client is not None
            try:
                yield client
            finally:
                client.close()
                nursery.cancel_scope.cancel()


DONE = protocol.encode(protocol.Done(3))


async def test_an_answer_that_says_no_leaves_the_connection_as_it_is(address: UnixAddress) -> None:
    async with answering(address, protocol.encode(protocol.Failed("not\nnow")), DONE) as client:
        with pytest.raises(ReplfsError, match=r"not\\nnow"):
            await client.ask(protocol.Ping(), protocol.Done)
        assert await client.ask(protocol.Ping(), protocol.Done) == protocol.Done(3)


@pytest.mark.parametrize(
    "answer",
    [b"nonsense\n", protocol.encode(protocol.Ping()), protocol.encode(protocol.Found([], -1)), b"x" * (LIMIT + 1), *HOSTILE[-2:]],
    ids=range(6),
)
async def test_an_answer_that_is_none_ends_the_connection(address: UnixAddress, answer: bytes) -> None:
    """What comes next could be the answer to anything."""
    async with answering(address, answer + (b"" if answer.endswith(b"\n") else b"\n"), DONE) as client:
        with pytest.raises(ReplfsError):
            await client.ask(protocol.Ping(), protocol.Done)
        with pytest.raises(Unreachable):
            await client.ask(protocol.Ping(), protocol.Done)


async def test_a_question_that_was_given_up_does_not_leave_its_answer_to_the_next_one(address: UnixAddress) -> None:
    async with answering(address, b"", DONE + protocol.encode(protocol.Done(4))) as client:
        with trio.move_on_after(0.1):
            await client.ask(protocol.Checkpoint(), protocol.Done)
        with pytest.raises(Unreachable):
            await client.ask(protocol.Ping(), protocol.Done)


async def test_a_secondary_that_is_silent_or_leaves_is_unreachable(address: UnixAddress) -> None:
    async with answering(address, b"") as client:
        client._timeout = 0.1
        with pytest.raises(Unreachable, match="did not answer within"):
            await client.ask(protocol.Ping(), protocol.Done)
    Path(address.path).unlink()
    async with answering(address) as client:
        with pytest.raises(Unreachable, match="broke"):
            await client.ask(protocol.Ping(), protocol.Done)


# The secondary's end


async def ask(stream: trio.SocketStream, request: protocol.Request | bytes) -> protocol.Answer:
    await stream.send_all(request + b"\n" if isinstance(request, bytes) else protocol.encode(request))
    got = b""
    while not got.endswith(b"\n"):
        data = await stream.receive_some()
        assert data, "it has left"
        got += data
    return protocol.answer(got)


HELLO = protocol.Hello(protocol.VERSION, "a" * 16, 1 << 20, IDS)


@asynccontextmanager
async def talking(tmp_path: Path) -> AsyncIterator[tuple[SecondaryVolume, Callable[[], Awaitable[trio.SocketStream]]]]:
    opened: list[trio.SocketStream] = []

    async def connect() -> trio.SocketStream:
        opened.append(await conversation(UnixAddress(str(tmp_path / "s.sock"))))
        return opened[-1]

    with trio.fail_after(SECONDS):
        async with secondary(tmp_path, b"d" * (1 << 20), export="disk") as volume:
            yield volume, connect
            for stream in opened:
                await stream.aclose()


async def test_nothing_is_done_for_somebody_who_did_not_say_hello(tmp_path: Path) -> None:
    async with talking(tmp_path) as (volume, connect):
        stream = await connect()
        before = volume.state
        for request in REQUESTS[1:]:
            answer = await ask(stream, request)
            if isinstance(request, protocol.Ping):
                assert answer == protocol.Done(before.generation)
            else:
                assert isinstance(answer, protocol.Failed)
        assert volume.state == before
        assert volume.primary is None
        assert await content(volume) == b"d" * (1 << 20)


async def test_who_says_hello_last_is_the_primary(tmp_path: Path) -> None:
    async with talking(tmp_path) as (volume, connect):
        first, last = await connect(), await connect()
        welcome = await ask(first, HELLO)
        assert isinstance(welcome, protocol.Welcome)
        assert (welcome.size, welcome.mode, welcome.stage) == (1 << 20, "secondary", "running")
        assert isinstance(await ask(last, msgspec.structs.replace(HELLO, node="b" * 16)), protocol.Welcome)
        assert isinstance(await ask(first, protocol.Attach(False, True)), protocol.Failed)
        assert isinstance(await ask(last, protocol.Attach(False, True)), protocol.Done)
        assert volume.state.peer == "b" * 16
        await last.aclose()
        while volume.primary is not None:
            await trio.lowlevel.checkpoint()


async def test_another_version_is_refused(tmp_path: Path) -> None:
    async with talking(tmp_path) as (volume, connect):
        for version in (0, 2, 1 << 62, -1):
            stream = await connect()
            assert isinstance(await ask(stream, msgspec.structs.replace(HELLO, version=version)), protocol.Failed)
            assert isinstance(await ask(stream, protocol.Attach(False, True)), protocol.Failed)
        assert volume.primary is None


@pytest.mark.parametrize("start", [-1, 0, 16, 1 << 62, -(1 << 62), 2**63 - 1, 2**64 - 1])
async def test_blocks_from_anywhere_are_answered(tmp_path: Path, start: int) -> None:
    async with talking(tmp_path) as (_, connect):
        stream = await connect()
        await ask(stream, HELLO)
        assert isinstance(await ask(stream, protocol.Attach(True, True)), protocol.Done)
        answer = await ask(stream, b'{"type":"Blocks","start":%d}' % start)
        assert isinstance(answer, protocol.Failed | protocol.Found)
        assert isinstance(await ask(stream, protocol.Ping()), protocol.Done)


async def test_what_a_peer_says_of_itself_cannot_make_the_state_unreadable(tmp_path: Path) -> None:
    """The state file is read up to a limit: what is saved must stay below it."""
    async with talking(tmp_path) as (volume, connect):
        long = protocol.encode(msgspec.structs.replace(HELLO, node="n" * (LIMIT - 1000)))
        many = protocol.encode(protocol.Agreed(Ids("a" * 16, "", ("",) * ((LIMIT - 200) // 3)), False))
        assert max(len(long), len(many)) < LIMIT
        for hello in (protocol.encode(HELLO), long):
            stream = await connect()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(hello + protocol.encode(protocol.Attach(True, True)) + many)
                await stream.send_eof()
            await to_end(stream)
        assert volume.directory.load() == volume.state


@settings(max_examples=40)
@given(st.lists(lines, max_size=8))
def test_a_secondary_outlives_any_conversation(sent: list[bytes]) -> None:
    """Its state can be read, and its disk is as it was."""

    async def main(folder: Path) -> None:
        async with talking(folder) as (volume, connect):
            stream = await connect()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(protocol.encode(HELLO) + b"".join(line + b"\n" for line in sent))
                await stream.send_eof()
            await to_end(stream)
            assert isinstance(await ask(await connect(), HELLO), protocol.Welcome)
            assert volume.directory.load() == volume.state
            assert await content(volume) == b"d" * (1 << 20)

    with tempfile.TemporaryDirectory() as folder:
        trio.run(main, Path(folder))
