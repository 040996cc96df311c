"""NBD as bytes and values: no socket anywhere, every stream is fed whole, byte by byte and in arbitrary pieces."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replfs.block.node import Extent
from replfs.errors import ReplfsError
from replfs.protocol.nbd import client, server, wire
from replfs.protocol.nbd.uri import Target, TcpAddress, UnixAddress, is_local, parse_address, parse_uri
from replfs.protocol.nbd.wire import ProtocolError, Request

SIZE = 1 << 20
EXPORT = server.Export("disk", SIZE, read_only=False)
READ_ONLY = server.Export("disk", SIZE, read_only=True)
HUGE = server.Export("huge", 1 << 40, read_only=False)


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data, cut at these places."""
    return [data[a:b] for a, b in pairwise([0, *sorted(cuts), len(data)])]


def cut_everywhere(data: bytes) -> list[list[bytes]]:
    """The data whole, byte by byte, and cut in two at each place."""
    return [[data], pieces(data, range(1, len(data))), *(pieces(data, [place]) for place in range(1, len(data)))]


def cuts_of(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, length), max_size=8)


def in_words(value: object) -> str:
    """Parameters that are bytes make no names for tests."""
    return value if isinstance(value, str) else ""


# --- what is said -----------------------------------------------------------------------------------------------------------------


def flags(value: int = wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES) -> bytes:
    return wire.CLIENT_FLAGS.pack(value)


def option(kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION.pack(wire.NBD_IHAVEOPT, kind, len(data)) + data


def string(text: bytes) -> bytes:
    return wire.LENGTH.pack(len(text)) + text


def go(name: bytes = b"disk", kind: int = wire.NBD_OPT_GO, wanted: Sequence[int] = (wire.NBD_INFO_BLOCK_SIZE,)) -> bytes:
    return option(kind, string(name) + b"".join(wire.INFO_TYPE.pack(number) for number in (len(wanted), *wanted)))


def context(kind: int, *queries: bytes, name: bytes = b"disk") -> bytes:
    return option(kind, string(name) + wire.LENGTH.pack(len(queries)) + b"".join(map(string, queries)))


STRUCTURED = option(wire.NBD_OPT_STRUCTURED_REPLY)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """What a server answered in the handshake: option, reply type, data."""
    found = []
    while data:
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == wire.NBD_OPTION_REPLY_MAGIC
        found.append((option, kind, data[wire.OPTION_REPLY.size :][:length]))
        data = data[wire.OPTION_REPLY.size + length :]
    return found


def request(kind: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"", cookie: int = 7) -> bytes:
    return wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, flags, kind, cookie, offset, length) + data


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", flags: int = wire.NBD_REPLY_FLAG_DONE) -> bytes:
    return wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, data: bytes, flags: int = wire.NBD_REPLY_FLAG_DONE) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_OFFSET_DATA, wire.OFFSET.pack(offset) + data, flags)


def hole_chunk(cookie: int, offset: int, length: int, flags: int = wire.NBD_REPLY_FLAG_DONE) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_OFFSET_HOLE, wire.OFFSET_HOLE.pack(offset, length), flags)


def status_chunk(cookie: int, *descriptors: tuple[int, int], context: int = 5) -> bytes:
    payload = wire.LENGTH.pack(context) + b"".join(wire.DESCRIPTOR.pack(*descriptor) for descriptor in descriptors)
    return chunk(cookie, wire.NBD_REPLY_TYPE_BLOCK_STATUS, payload)


def error_chunk(cookie: int, error: int, message: bytes = b"", flags: int = wire.NBD_REPLY_FLAG_DONE) -> bytes:
    return chunk(cookie, wire.NBD_REPLY_TYPE_ERROR, wire.ERROR.pack(error, len(message)) + message, flags)


# --- the server's handshake -------------------------------------------------------------------------------------------------------


def shake(parts: Iterable[bytes], export: server.Export = EXPORT) -> tuple[server.Handshake, bytes]:
    handshake = server.Handshake(export)
    rest = b""
    answer = b""
    for part in parts:
        if handshake.phase is server.Phase.TRANSMISSION:
            rest += part
        else:
            answer += handshake.receive(part)
    handshake.rest += rest
    return handshake, answer


def test_a_modern_client_gets_everything_however_its_bytes_are_cut() -> None:
    said = (
        flags()
        + option(wire.NBD_OPT_LIST)
        + STRUCTURED
        + context(wire.NBD_OPT_LIST_META_CONTEXT)
        + context(wire.NBD_OPT_SET_META_CONTEXT, b"base:allocation", b"qemu:dirty-bitmap:x")
        + go(kind=wire.NBD_OPT_INFO)
        + go()
        + b"rest"
    )
    export_flags = EXPORT.flags(structured=True)
    info = [
        (wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(wire.NBD_INFO_EXPORT, SIZE, export_flags)),
        (wire.NBD_REP_INFO, wire.INFO_BLOCK_SIZE.pack(wire.NBD_INFO_BLOCK_SIZE, 1, 4096, 32 << 20)),
        (wire.NBD_REP_ACK, b""),
    ]
    expected = [
        (wire.NBD_OPT_LIST, wire.NBD_REP_SERVER, string(b"disk")),
        (wire.NBD_OPT_LIST, wire.NBD_REP_ACK, b""),
        (wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ACK, b""),
        (wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"\0\0\0\0base:allocation"),
        (wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_REP_ACK, b""),
        (wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"\0\0\0\1base:allocation"),
        (wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_ACK, b""),
        *((wire.NBD_OPT_INFO, *line) for line in info),
        *((wire.NBD_OPT_GO, *line) for line in info),
    ]
    for parts in cut_everywhere(said):
        handshake, answer = shake(parts)
        assert replies(answer) == expected
        assert handshake.phase is server.Phase.TRANSMISSION
        assert handshake.rest == b"rest"


@pytest.mark.parametrize(("client_flags", "padding"), [(0, 124), (1, 124), (3, 0)])
def test_an_old_client_asks_by_name_only(client_flags: int, padding: int) -> None:
    for name in (b"disk", b""):
        handshake, answer = shake([flags(client_flags) + option(wire.NBD_OPT_EXPORT_NAME, name)])
        assert answer == wire.EXPORT_NAME_REPLY.pack(SIZE, EXPORT.flags(structured=False)) + bytes(padding)
        assert handshake.phase is server.Phase.TRANSMISSION


def test_a_read_only_export_offers_nothing_that_writes() -> None:
    writing = wire.NBD_FLAG_SEND_TRIM | wire.NBD_FLAG_SEND_WRITE_ZEROES
    assert READ_ONLY.flags(structured=False) & (wire.NBD_FLAG_READ_ONLY | writing) == wire.NBD_FLAG_READ_ONLY
    assert EXPORT.flags(structured=False) & (wire.NBD_FLAG_READ_ONLY | writing) == writing


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        (option(wire.NBD_OPT_LIST, b"x"), [wire.NBD_REP_ERR_INVALID]),
        (option(5), [wire.NBD_REP_ERR_UNSUP]),  # STARTTLS
        (option(11), [wire.NBD_REP_ERR_UNSUP]),
        (option(0xFFFFFFFF, b"data"), [wire.NBD_REP_ERR_UNSUP]),
        (go(b"other"), [wire.NBD_REP_ERR_UNKNOWN]),
        (go(b"\xff\n\x1b"), [wire.NBD_REP_ERR_UNKNOWN]),
        (go(wanted=[]) + b"", [wire.NBD_REP_INFO, wire.NBD_REP_ACK]),
        (option(wire.NBD_OPT_GO), [wire.NBD_REP_ERR_INVALID]),
        (option(wire.NBD_OPT_GO, string(b"disk")), [wire.NBD_REP_ERR_INVALID]),
        (option(wire.NBD_OPT_GO, string(b"disk") + b"\0\2\0\3"), [wire.NBD_REP_ERR_INVALID]),
        (option(wire.NBD_OPT_GO, string(b"disk") + b"\0\0\0"), [wire.NBD_REP_ERR_INVALID]),
        (option(wire.NBD_OPT_INFO, b"\xff\xff\xff\xffdisk\0\0"), [wire.NBD_REP_ERR_INVALID]),
        (option(wire.NBD_OPT_STRUCTURED_REPLY, b"x"), [wire.NBD_REP_ERR_INVALID]),
        (context(wire.NBD_OPT_SET_META_CONTEXT, b"base:allocation"), [wire.NBD_REP_ERR_INVALID]),
        (STRUCTURED + context(wire.NBD_OPT_SET_META_CONTEXT, b"base:"), [wire.NBD_REP_ACK, wire.NBD_REP_ACK]),
        (
            STRUCTURED + context(wire.NBD_OPT_LIST_META_CONTEXT, b"base:"),
            [wire.NBD_REP_ACK, wire.NBD_REP_META_CONTEXT, wire.NBD_REP_ACK],
        ),
        (STRUCTURED + context(wire.NBD_OPT_LIST_META_CONTEXT, b"x-y:"), [wire.NBD_REP_ACK, wire.NBD_REP_ACK]),
        (STRUCTURED + context(wire.NBD_OPT_SET_META_CONTEXT, name=b"other"), [wire.NBD_REP_ACK, wire.NBD_REP_ERR_UNKNOWN]),
        (
            STRUCTURED + option(wire.NBD_OPT_SET_META_CONTEXT, string(b"disk") + b"\xff\xff\xff\xff"),
            [wire.NBD_REP_ACK, wire.NBD_REP_ERR_INVALID],
        ),
    ],
    ids=in_words,
)
def test_each_option_has_its_answer(said: bytes, kinds: list[int]) -> None:
    _, answer = shake([flags() + said])
    assert [kind for _, kind, _ in replies(answer)] == kinds
    for _, kind, data in replies(answer):
        if kind & wire.NBD_REP_ERR:
            assert data.decode().isprintable()


def test_a_failed_selection_of_contexts_deselects_what_was_selected() -> None:
    good = context(wire.NBD_OPT_SET_META_CONTEXT, b"base:allocation")
    bad = option(wire.NBD_OPT_SET_META_CONTEXT, b"?")
    status = Request(0, wire.NBD_CMD_BLOCK_STATUS, 1, 0, 512, b"")
    for said, allowed in ((good, True), (good + bad, False), (bad + good, True)):
        handshake, _ = shake([flags() + STRUCTURED + said + go()])
        assert (handshake.transmission().check(status) is None) is allowed


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (flags(1 << 2), "unknown client flags 0x4"),
        (flags() + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "where an option begins"),
        (flags() + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_LIST, 0xFFFFFFFF), "an option of 4294967295 bytes"),
        (flags() + option(wire.NBD_OPT_LIST) * 1001, "more than 1000 options"),
        (flags() + option(wire.NBD_OPT_EXPORT_NAME, b"other\n"), r"the export 'other\n', which is not served here"),
        (flags() + option(wire.NBD_OPT_ABORT, b"bye"), ""),
    ],
    ids=in_words,
)
def test_a_client_that_breaks_the_rules_or_leaves_is_done_with(said: bytes, reason: str) -> None:
    handshake, answer = shake([said + option(wire.NBD_OPT_LIST)])
    assert handshake.phase is server.Phase.CLOSED
    assert reason in handshake.reason
    assert bool(handshake.reason) is bool(reason)
    assert shake([bytes([byte]) for byte in said + option(wire.NBD_OPT_LIST)])[1] == answer


@given(st.data())
def test_no_bytes_make_a_handshake_fail(data: st.DataObject) -> None:
    options = st.builds(option, st.integers(0, 12), st.binary(max_size=64)) | st.binary(max_size=40) | st.just(STRUCTURED)
    said = flags() + b"".join(data.draw(st.lists(options, max_size=6)))
    whole, answer = shake([said])
    cut, cut_answer = shake(pieces(said, data.draw(cuts_of(len(said)))))
    assert (cut.phase, cut.reason, cut.rest, cut_answer) == (whole.phase, whole.reason, whole.rest, answer)


# --- the server's transmission ----------------------------------------------------------------------------------------------------

REQUESTS = st.builds(
    lambda flags, kind, cookie, offset, length, data: Request(
        flags,
        kind,
        cookie,
        offset,
        len(data) if kind == wire.NBD_CMD_WRITE else length,
        data if kind == wire.NBD_CMD_WRITE else b"",
    ),
    st.integers(0, 0xFFFF),
    st.sampled_from([0, 1, 1, 1, 3, 4, 5, 6, 7, 0xFFFF]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=200),
)


def encoded(request: Request) -> bytes:
    return wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, *request[:5]) + bytes(request.data)


def parse(parts: Iterable[bytes]) -> tuple[server.Transmission, list[Request]]:
    transmission = server.Transmission(EXPORT, True, True)
    parsed = []
    for part in parts:
        if not transmission.ended:
            parsed += [request._replace(data=bytes(request.data)) for request in transmission.receive(part)]
    return transmission, parsed


@given(st.lists(REQUESTS, max_size=12), st.data())
def test_requests_are_parsed_the_same_however_they_are_cut(requests: list[Request], data: st.DataObject) -> None:
    said = b"".join(map(encoded, requests))
    assert parse(pieces(said, data.draw(cuts_of(len(said)))))[1] == requests


@pytest.mark.parametrize(
    ("end", "reason", "more"),
    [
        (request(wire.NBD_CMD_DISC), "", 0),
        (bytes(28), "it sent 0x0 where a request begins", 0),
        (request(wire.NBD_CMD_WRITE, 0, (32 << 20) + 1), "it announced a write of 33554433 bytes", 1),
        (request(wire.NBD_CMD_WRITE, 0, 0xFFFFFFFF), "it announced a write of 4294967295 bytes", 1),
    ],
    ids=in_words,
)
def test_nothing_is_taken_from_behind_the_end(end: bytes, reason: str, more: int) -> None:
    write = request(wire.NBD_CMD_WRITE, 5, 3, data=b"abc")
    said = write + request(wire.NBD_CMD_READ, 1, 2) + end + write
    for parts in cut_everywhere(said):
        transmission, parsed = parse(parts)
        assert len(parsed) == 2 + more
        assert (transmission.ended, transmission.reason) == (True, reason)
        assert [transmission.check(request) is None for request in parsed] == [True, True] + [False] * more


def test_an_announced_payload_is_not_allocated_before_it_arrives() -> None:
    transmission = server.Transmission(EXPORT, True, True)
    assert transmission.receive(request(wire.NBD_CMD_WRITE, 0, 32 << 20)) == []
    assert transmission._write is not None
    assert len(transmission._write.data) <= 1 << 20
    arrived = bytearray()
    while not (done := transmission.receive(bytes([len(arrived) >> 20]) * (100 << 10))):
        arrived += bytes([len(arrived) >> 20]) * (100 << 10)
        assert len(transmission._write.data) <= max(2 * len(arrived), 1 << 20)
    assert len(done[0].data) == 32 << 20
    assert done[0].data[: len(arrived)] == arrived


FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "error"),
    [
        (wire.NBD_CMD_READ, 0, SIZE, FUA | DF, None),
        (wire.NBD_CMD_READ, SIZE, 0, 0, None),
        (wire.NBD_CMD_READ, SIZE + 1, 0, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, SIZE - 1, 2, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, (1 << 64) - 1, 1, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, (32 << 20) + 1, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 1, NO_HOLE, wire.NBD_EINVAL),
        (wire.NBD_CMD_WRITE, SIZE - 1, 1, FUA, None),
        (wire.NBD_CMD_WRITE, SIZE - 1, 2, 0, wire.NBD_ENOSPC),
        (wire.NBD_CMD_WRITE, 0, 1, DF, wire.NBD_EINVAL),
        (wire.NBD_CMD_FLUSH, 0, 0, FUA, None),
        (wire.NBD_CMD_FLUSH, 0, 1, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_TRIM, 3, SIZE - 3, FUA, None),
        (wire.NBD_CMD_TRIM, 3, SIZE, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_TRIM, 3, 1, NO_HOLE, wire.NBD_EINVAL),
        (wire.NBD_CMD_WRITE_ZEROES, 3, SIZE - 3, FUA | NO_HOLE, None),
        (wire.NBD_CMD_WRITE_ZEROES, 3, 0xFFFFFFFF, 0, wire.NBD_ENOSPC),
        (wire.NBD_CMD_WRITE_ZEROES, 0, 1, 1 << 4, wire.NBD_EINVAL),  # FAST_ZERO is not offered
        (wire.NBD_CMD_BLOCK_STATUS, 0, SIZE, REQ_ONE, None),
        (wire.NBD_CMD_BLOCK_STATUS, 0, 0, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_BLOCK_STATUS, 1, SIZE, 0, wire.NBD_EINVAL),
        (5, 0, 1, 0, wire.NBD_EINVAL),  # CACHE is not offered
        (0xFFFF, 0, 0, 0, wire.NBD_EINVAL),
    ],
)
def test_a_request_is_checked_before_it_may_reach_the_node(
    kind: int, offset: int, length: int, flags: int, error: int | None
) -> None:
    refusal = server.Transmission(EXPORT, True, True).check(Request(flags, kind, 1, offset, length, b""))
    assert (refusal.error if refusal else None) == error


def test_what_was_not_negotiated_is_refused() -> None:
    plain = server.Transmission(EXPORT, False, False)
    for kind, flags in ((wire.NBD_CMD_BLOCK_STATUS, 0), (wire.NBD_CMD_READ, DF)):
        refusal = plain.check(Request(flags, kind, 1, 0, 512, b""))
        assert refusal is not None
        assert refusal.error == wire.NBD_EINVAL


def test_a_read_only_export_takes_no_writes() -> None:
    transmission = server.Transmission(READ_ONLY, True, True)
    for kind in (wire.NBD_CMD_WRITE, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES):
        refusal = transmission.check(Request(0, kind, 1, 0, 512, b""))
        assert refusal is not None
        assert refusal.error == wire.NBD_EPERM
    for kind, length in ((wire.NBD_CMD_READ, 512), (wire.NBD_CMD_FLUSH, 0), (wire.NBD_CMD_BLOCK_STATUS, 512)):
        assert transmission.check(Request(0, kind, 1, 0, length, b"")) is None


@given(
    st.sampled_from([EXPORT, READ_ONLY, HUGE]),
    st.sampled_from([wire.NBD_CMD_READ, wire.NBD_CMD_WRITE]),
    st.integers(0, SIZE + 2) | st.integers(0, (1 << 64) - 1),
    st.integers(0, SIZE + 2) | st.integers(wire.MAX_PAYLOAD - 2, wire.MAX_PAYLOAD + 2),
)
@example(HUGE, wire.NBD_CMD_WRITE, 0, wire.MAX_PAYLOAD)
@example(HUGE, wire.NBD_CMD_WRITE, 0, wire.MAX_PAYLOAD + 1)
def test_the_short_check_says_what_the_long_one_does(export: server.Export, kind: int, offset: int, length: int) -> None:
    transmission = server.Transmission(export, True, True)
    refusal = transmission.check(Request(0, kind, 1, offset, length, b""))
    assert transmission.allows(kind, offset, length) == (refusal is None)


# --- the client's negotiation -----------------------------------------------------------------------------------------------------

MODERN = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_IHAVEOPT, 3)
ACK = {
    kind: reply(kind, wire.NBD_REP_ACK) for kind in (wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_OPT_GO)
}
NO_STRUCTURED = reply(wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ERR_UNSUP)
ALLOCATION = reply(wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"\0\0\0\5base:allocation")


def info(size: int = SIZE, flags: int = 1) -> bytes:
    return reply(wire.NBD_OPT_GO, wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(wire.NBD_INFO_EXPORT, size, flags))


def block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    sizes = wire.INFO_BLOCK_SIZE.pack(wire.NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum)
    return reply(wire.NBD_OPT_GO, wire.NBD_REP_INFO, sizes)


def negotiate(parts: Iterable[bytes], export: str = "disk") -> tuple[client.Negotiation, bytes]:
    negotiation = client.Negotiation(export)
    said = b"".join([negotiation.receive(part) for part in parts])
    return negotiation, said


@pytest.mark.parametrize("name", ["disk", "", "größer"])
def test_client_and_server_agree_byte_by_byte(name: str) -> None:
    handshake = server.Handshake(server.Export(name or "disk", SIZE, read_only=False))
    negotiation = client.Negotiation(name)
    to_client = server.GREETING
    while to_client:
        to_server = b"".join([negotiation.receive(bytes([byte])) for byte in to_client])
        to_client = b"".join([handshake.receive(bytes([byte])) for byte in to_server])
    assert negotiation.done
    assert handshake.phase is server.Phase.TRANSMISSION
    expected = client.ExportInfo(SIZE, EXPORT.flags(structured=True), 1, 32 << 20, structured=True, allocation=1)
    assert negotiation.info == expected


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        (
            MODERN + NO_STRUCTURED + info() + ACK[wire.NBD_OPT_GO],
            client.ExportInfo(SIZE, 1),
        ),
        (
            MODERN + ACK[8] + ALLOCATION + ACK[10] + reply(7, wire.NBD_REP_INFO, b"\0\1name") + info() + ACK[7],
            client.ExportInfo(SIZE, 1, structured=True, allocation=5),
        ),
        (
            MODERN + ACK[8] + ALLOCATION + reply(10, wire.NBD_REP_ERR_TOO_BIG) + info() + block_size(1, 512, 0xFFFFFFFF) + ACK[7],
            client.ExportInfo(SIZE, 1, structured=True),
        ),
        (
            MODERN + NO_STRUCTURED + block_size(512, 4096, 65536) + info() + ACK[7],
            client.ExportInfo(SIZE, 1, 512, 65536),
        ),
        (
            MODERN + NO_STRUCTURED + reply(7, wire.NBD_REP_ERR_UNSUP) + wire.EXPORT_NAME_REPLY.pack(SIZE, 1),
            client.ExportInfo(SIZE, 1),
        ),
        (
            wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_IHAVEOPT, 0) + wire.EXPORT_NAME_REPLY.pack(SIZE, 1) + bytes(124),
            client.ExportInfo(SIZE, 1),
        ),
    ],
    ids=in_words,
)
def test_the_client_takes_what_servers_of_all_ages_offer(heard: bytes, expected: client.ExportInfo) -> None:
    for parts in cut_everywhere(heard):
        negotiation, _ = negotiate(parts)
        assert negotiation.done
        assert negotiation.info == expected
    with_rest, _ = negotiate([heard + b"rest"])
    assert with_rest.rest == b"rest"


@pytest.mark.parametrize(
    ("heard", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "not an NBD server"),
        (wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OLDSTYLE_MAGIC, 0), "oldstyle"),
        (wire.GREETING.pack(wire.NBD_MAGIC, 1, 0), "greeting"),
        (MODERN + bytes(20), "something else"),
        (MODERN + ACK[7], "something else"),
        (MODERN + reply(8, wire.NBD_REP_SERVER, b"\0\0\0\0"), "no meaning"),
        (MODERN + wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, 8, 1, 1 << 31), "2147483648 bytes"),
        (MODERN + ACK[8] + reply(10, wire.NBD_REP_META_CONTEXT, b"\0"), "shorter"),
        (MODERN + ACK[8] + reply(10, wire.NBD_REP_META_CONTEXT, b"\0\0\0\0x-y:z"), "not asked for"),
        (MODERN + ACK[8] + ALLOCATION * 1001, "more than 1000"),
        (MODERN + NO_STRUCTURED + ACK[7], "size"),
        (MODERN + NO_STRUCTURED + info(1 << 63) + ACK[7], "absurd"),
        (MODERN + NO_STRUCTURED + reply(7, wire.NBD_REP_INFO, b"\0"), "shorter"),
        (MODERN + NO_STRUCTURED + reply(7, wire.NBD_REP_INFO, b"\0\0\0"), "wrong length"),
        (MODERN + NO_STRUCTURED + info() + block_size(3, 4096, 4096) + ACK[7], "constraints"),
        (MODERN + NO_STRUCTURED + info() + block_size(0, 4096, 4096) + ACK[7], "constraints"),
        (MODERN + NO_STRUCTURED + info() + block_size(1, 4096, 0) + ACK[7], "constraints"),
    ],
    ids=in_words,
)
def test_a_server_that_breaks_the_negotiation_is_left(heard: bytes, reason: str) -> None:
    for parts in ([heard], [bytes([byte]) for byte in heard]):
        with pytest.raises(ProtocolError, match=reason):
            negotiate(parts)


@pytest.mark.parametrize(
    ("error", "message", "shown"),
    [
        (wire.NBD_REP_ERR_UNKNOWN, b"", "the server has no export of that name"),
        (wire.NBD_REP_ERR_POLICY, b"go\n\x1b[31maway", r"policy forbids it \(it says: go\\n\\x1b\[31maway\)"),
        (wire.NBD_REP_ERR_TLS_REQD, b"", "TLS"),
        (wire.NBD_REP_ERR_SHUTDOWN, b"", "shutting down"),
        (wire.NBD_REP_ERR + 77, b"", "0x8000004d"),
    ],
    ids=in_words,
)
def test_a_server_that_says_no_is_quoted(error: int, message: bytes, shown: str) -> None:
    with pytest.raises(client.Refused, match=shown):
        negotiate([MODERN, NO_STRUCTURED, reply(7, error, message)])


@given(st.data())
def test_no_bytes_make_a_negotiation_fail_otherwise(data: st.DataObject) -> None:
    part = st.sampled_from([MODERN, NO_STRUCTURED, ALLOCATION, info(), *ACK.values(), reply(7, wire.NBD_REP_ERR_UNSUP)])
    heard = b"".join(data.draw(st.lists(part | st.binary(max_size=30), max_size=8)))

    def outcome(parts: Iterable[bytes]) -> Any:
        try:
            negotiation, said = negotiate(parts)
        except (ProtocolError, client.Refused) as error:
            return str(error)
        return negotiation.done, negotiation.info, said

    assert outcome([heard]) == outcome([heard[:1], heard[1:]])


# --- the client's transmission ----------------------------------------------------------------------------------------------------

PLAIN = client.ExportInfo(SIZE, 1)
RICH = client.ExportInfo(SIZE, 1, structured=True, allocation=5)
Asked = tuple[int, int, int]
READ_10: Asked = (wire.NBD_CMD_READ, 100, 10)
WRITE_10: Asked = (wire.NBD_CMD_WRITE, 100, 10)
STATUS_10: Asked = (wire.NBD_CMD_BLOCK_STATUS, 100, 10)
MORE = 0


class Reply(NamedTuple):
    cookie: int
    error: int = wire.NBD_SUCCESS
    message: str = ""
    data: bytes = b""
    extents: Sequence[Extent] = ()


def hear(info: client.ExportInfo, asked: Iterable[Asked], parts: Iterable[bytes]) -> list[Reply]:
    transmission: client.Transmission[client.Command] = client.Transmission(info)
    for fields in asked:
        transmission.begin(client.Command(*fields))
    replied = (command for part in parts for command in transmission.receive(part))
    return [Reply(c.cookie, c.error, c.message, getattr(c, "data", b""), getattr(c, "extents", ())) for c in replied]


@pytest.mark.parametrize(
    ("info", "asked", "heard", "expected"),
    [
        (PLAIN, READ_10, simple(1, data=b"0123456789"), Reply(1, data=bytearray(b"0123456789"))),
        (PLAIN, READ_10, simple(1, wire.NBD_EIO), Reply(1, wire.NBD_EIO)),
        (PLAIN, WRITE_10, simple(1), Reply(1)),
        (PLAIN, WRITE_10, simple(1, 9999), Reply(1, wire.NBD_EINVAL)),
        (RICH, WRITE_10, simple(1, wire.NBD_ENOSPC), Reply(1, wire.NBD_ENOSPC)),
        (RICH, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_NONE), Reply(1)),
        (RICH, WRITE_10, error_chunk(1, wire.NBD_EPERM, b"no\n"), Reply(1, wire.NBD_EPERM, r"no\n")),
        (RICH, READ_10, data_chunk(1, 100, b"0123456789"), Reply(1, data=bytearray(b"0123456789"))),
        (
            RICH,
            READ_10,
            data_chunk(1, 106, b"6789", MORE) + hole_chunk(1, 101, 5, MORE) + data_chunk(1, 100, b"0"),
            Reply(1, data=bytearray(b"0\0\0\0\0\x006789")),
        ),
        (
            RICH,
            READ_10,
            hole_chunk(1, 100, 10, MORE) + chunk(1, wire.NBD_REPLY_TYPE_NONE),
            Reply(1, data=bytearray(10)),
        ),
        (
            RICH,
            READ_10,
            chunk(1, wire.NBD_REPLY_TYPE_ERR + 2, wire.ERROR.pack(5, 2) + b"ab" + wire.OFFSET.pack(103)),
            Reply(1, wire.NBD_EIO, "ab"),
        ),
        (
            RICH,
            READ_10,
            chunk(1, wire.NBD_REPLY_TYPE_ERR + 99, wire.ERROR.pack(5, 0) + b"unknown"),
            Reply(1, wire.NBD_EIO),
        ),
        (
            RICH,
            STATUS_10,
            status_chunk(1, (3, 3), (2, 3), (100, 4)),
            Reply(1, extents=[Extent(5, True, True), Extent(5, False, False)]),
        ),
        (RICH, STATUS_10, status_chunk(1, (10, 1), (7, 0)), Reply(1, extents=[Extent(10, True, False)])),
        (RICH, STATUS_10, simple(1, wire.NBD_EIO), Reply(1, wire.NBD_EIO)),
    ],
    ids=in_words,
)
def test_each_kind_of_reply_is_understood(info: client.ExportInfo, asked: Asked, heard: bytes, expected: Reply) -> None:
    for parts in cut_everywhere(heard):
        [reply] = hear(info, [asked], parts)
        if expected.error:
            assert (reply.error, reply.message) == (expected.error, expected.message)
        else:
            assert reply == expected


@pytest.mark.parametrize(
    ("info", "asked", "heard", "reason"),
    [
        (PLAIN, WRITE_10, bytes(16), "where a reply begins"),
        (PLAIN, WRITE_10, simple(2), "was not made"),
        (PLAIN, WRITE_10, simple(1) + simple(1), "was not made"),
        (PLAIN, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_NONE), "where a reply begins"),
        (RICH, WRITE_10, chunk(2, wire.NBD_REPLY_TYPE_NONE), "was not made"),
        (RICH, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_NONE, flags=MORE), "not the last"),
        (RICH, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_NONE, b"x"), "payload"),
        (RICH, WRITE_10, chunk(1, 77), "no meaning"),
        (RICH, WRITE_10, data_chunk(1, 100, b"0123456789"), "no meaning"),
        (RICH, WRITE_10, error_chunk(1, 0), "without an error"),
        (RICH, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_ERROR, b"\0\0\0\5\0\7short"), "shorter"),
        (RICH, WRITE_10, chunk(1, wire.NBD_REPLY_TYPE_ERROR, b"\0\0"), "shorter"),
        (RICH, WRITE_10, wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 1 << 15, 1, 0xFFFFFFFF), "4294967295 bytes"),
        (RICH, READ_10, simple(1, wire.NBD_EIO), "only a structured one"),
        (RICH, READ_10, chunk(1, wire.NBD_REPLY_TYPE_NONE), "without all of its data"),
        (RICH, READ_10, data_chunk(1, 100, b"012345678"), "without all of its data"),
        (RICH, READ_10, data_chunk(1, 101, b"0123456789"), "outside"),
        (RICH, READ_10, data_chunk(1, 99, b"0123456789"), "outside"),
        (RICH, READ_10, data_chunk(1, 100, b""), "outside"),
        (RICH, READ_10, chunk(1, wire.NBD_REPLY_TYPE_OFFSET_DATA, b"\0"), "shorter"),
        (RICH, READ_10, data_chunk(1, 100, b"0123456789", MORE) * 2, "18 bytes"),
        (RICH, READ_10, wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, 1, 0xFFFFFFFF), "4294967295 bytes"),
        (RICH, READ_10, hole_chunk(1, 100, 0xFFFFFFFF), "outside"),
        (RICH, READ_10, hole_chunk(1, 100, 0), "outside"),
        (RICH, READ_10, status_chunk(1, (10, 0)), "no meaning"),
        (RICH, STATUS_10, simple(1), "only a structured one"),
        (RICH, STATUS_10, chunk(1, wire.NBD_REPLY_TYPE_NONE), "without one"),
        (RICH, STATUS_10, status_chunk(1), "not asked for"),
        (RICH, STATUS_10, status_chunk(1, (10, 0), context=6), "not asked for"),
        (RICH, STATUS_10, status_chunk(1, (0, 0)), "no bytes"),
        (RICH, STATUS_10, chunk(1, wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes([0, 0, 0, 5, 1, 1])), "not asked for"),
    ],
    ids=in_words,
)
def test_a_server_that_breaks_the_transmission_is_found_out(
    info: client.ExportInfo, asked: Asked, heard: bytes, reason: str
) -> None:
    for parts in ([heard], [bytes([byte]) for byte in heard]):
        with pytest.raises(ProtocolError, match=reason):
            hear(info, [asked], parts)


@given(st.lists(st.tuples(st.integers(0, SIZE - 200), st.binary(min_size=1, max_size=200)), max_size=8), st.booleans(), st.data())
def test_reads_come_through_from_our_own_server(reads: list[tuple[int, bytes]], structured: bool, data: st.DataObject) -> None:
    transmission: client.Transmission[client.Command] = client.Transmission(RICH if structured else PLAIN)
    ours = server.Transmission(EXPORT, structured, structured)
    said = b"".join(transmission.begin(client.Command(wire.NBD_CMD_READ, offset, len(content))) for offset, content in reads)
    requests = ours.receive(said)
    contents = [content for _, content in reads]
    answers = [ours.read_header(request) + content for request, content in zip(requests, contents, strict=True)]
    order = data.draw(st.permutations(range(len(answers))))
    heard = b"".join(answers[number] for number in order)
    replies = [reply for part in pieces(heard, data.draw(cuts_of(len(heard)))) for reply in transmission.receive(part)]
    assert [(reply.cookie - 1, bytes(reply.data)) for reply in replies] == [(number, contents[number]) for number in order]


# --- names ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "export"),
    [
        ("nbd://example.com/disk", TcpAddress("example.com", 10809), "disk"),
        ("nbd://example.com:1234/", TcpAddress("example.com", 1234), ""),
        ("NBD://example.com", TcpAddress("example.com", 10809), ""),
        ("nbd://example.com:", TcpAddress("example.com", 10809), ""),
        ("nbd://example.com//disk", TcpAddress("example.com", 10809), "/disk"),
        ("nbd://10.0.0.1/hello%20world%2F%c3%a4", TcpAddress("10.0.0.1", 10809), "hello world/ä"),
        ("nbd:///disk", TcpAddress("localhost", 10809), "disk"),
        ("nbd://[::1]:99/disk", TcpAddress("::1", 99), "disk"),
        ("nbd://[fe80::1%25eth0]/disk", TcpAddress("fe80::1%eth0", 10809), "disk"),
        ("nbd+unix:///disk?socket=/run/a%20b.sock", UnixAddress("/run/a b.sock"), "disk"),
        ("nbd+unix://?socket=sock", UnixAddress("sock"), ""),
    ],
)
def test_an_nbd_uri_names_a_server_and_an_export(text: str, address: TcpAddress | UnixAddress, export: str) -> None:
    target = parse_uri(text)
    assert target == Target(address, export)
    assert parse_uri(str(target)) == target


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "write nbd://"),
        ("disk", "write nbd://"),
        ("http://example.com/", "scheme"),
        ("nbd+vsock://2/", "scheme"),
        ("nbds://example.com/", "TLS is not supported by this release"),
        ("nbds+unix:///?socket=x", "TLS is not supported by this release"),
        ("nbd://example.com/#part", "write nbd://"),
        ("nbd://user@example.com/", "user name"),
        ("nbd://exa mple.com/", "host or port"),
        ("nbd://example.com:0/", "host or port"),
        ("nbd://example.com:65536/", "host or port"),
        ("nbd://example.com:1e3/", "host or port"),
        ("nbd://::1/", "host or port"),
        ("nbd://[::1/", "host or port"),
        ("nbd://[example.com]/", "host or port"),
        ("nbd://example.com/%zz", "%"),
        ("nbd://example.com/%ff", "UTF-8"),
        ("nbd://example.com/%00", "NUL"),
        ("nbd://example.com/" + "x" * 4097, "longer than 4096 bytes"),
        ("nbd://example.com/?socket=x", "socket is not known here"),
        ("nbd://example.com/?tls-type=anon", "tls-type is not known here"),
        ("nbd+unix:///disk", "names no socket"),
        ("nbd+unix:///disk?socket=", "names no socket"),
        ("nbd+unix:///?socket=%00abstract", "NUL"),
        ("nbd+unix:///?socket=a&socket=b", "twice"),
        ("nbd+unix://host/?socket=a", "no host"),
        ("nbd://exa\nmple.com/", r"nbd://exa\nmple.com/"),
    ],
)
def test_a_uri_that_is_not_understood_is_refused_on_one_line(text: str, why: str) -> None:
    with pytest.raises(ReplfsError) as caught:
        parse_uri(text)
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "address", "local"),
    [
        ("127.0.0.1:10809", TcpAddress("127.0.0.1", 10809), True),
        ("127.8.9.1:0", TcpAddress("127.8.9.1", 0), True),
        ("localhost:1", TcpAddress("localhost", 1), True),
        ("[::1]:10809", TcpAddress("::1", 10809), True),
        ("unix:/run/x:1", UnixAddress("/run/x:1"), True),
        ("0.0.0.0:10809", TcpAddress("0.0.0.0", 10809), False),
        ("[::]:10809", TcpAddress("::", 10809), False),
        ("localhost.example.com:65535", TcpAddress("localhost.example.com", 65535), False),
    ],
)
def test_a_listen_address_reads_back_as_it_was_written(text: str, address: TcpAddress | UnixAddress, local: bool) -> None:
    assert parse_address(text) == address
    assert str(address) == text
    assert is_local(address) is local


@pytest.mark.parametrize(
    "text", ["", "unix:", "10809", ":10809", "host", "host:", "host:x", "host:65536", "::1:10809", "a b:1", "a:1\n"]
)
def test_a_listen_address_that_is_not_understood_is_refused_on_one_line(text: str) -> None:
    with pytest.raises(ReplfsError, match="write HOST:PORT") as caught:
        parse_address(text)
    assert str(caught.value).isprintable()


@given(
    st.text(max_size=40) | st.from_regex(r"nbd(\+unix)?://[a-z\[\]:%0-9]{0,12}/[%a-f0-9]{0,6}(\?socket=.{0,5})?", fullmatch=True)
)
def test_no_text_gives_anything_but_a_target_or_a_refusal(text: str) -> None:
    parsers: tuple[Callable[[str], object], ...] = (parse_uri, parse_address)
    for parser in parsers:
        try:
            value = parser(text)
        except ReplfsError as refusal:
            value = None
            shown = str(refusal)
        else:
            shown = str(value)
            assert parser(shown) == value
        assert value is not None or shown.isprintable()
