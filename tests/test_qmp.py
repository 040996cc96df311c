"""QMP: the protocol without I/O, and real volumes that QEMU's own client library controls."""

import asyncio
import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import LINK_LOST, REPLFS, Side, Sides, replfs, wait_for
from hypothesis import given
from hypothesis import strategies as st
from qemu.qmp import ExecuteError, QMPClient

from replfs.protocol import qmp
from replfs.protocol.qmp import MAX_DEPTH, MAX_MESSAGE, Command, Messages, QmpError, TooLong, parse

SIZE = 1 << 20
SECONDS = 60.0

# The protocol, as bytes

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=4), st.sampled_from(["", " ", "\r\n"]), st.data())
def test_however_it_is_cut_the_same_values_arrive(sent: list[dict[str, Any]], between: str, data: st.DataObject) -> None:
    stream = between.join(json.dumps(value, ensure_ascii=data.draw(st.booleans())) for value in sent).encode()
    messages, found = Messages(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += [json.loads(message) for message in messages.receive(stream[:size])]
        stream = stream[size:]
    assert found == sent


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_strings_may_be_in_single_quotes(text: str) -> None:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    (message,) = Messages().receive(f"{{'execute': '{quoted}'}}".encode())
    assert parse(message) == Command(text, {}, [])


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"hello\n", "JSON parse error, invalid JSON syntax"),
        (b"{]", "JSON parse error, invalid JSON syntax"),
        (b"{'execute': quit}", "JSON parse error, invalid JSON syntax"),
        (b"[]", "QMP input must be a JSON object"),
        (b"7\n", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b"{'execute': 7}", "QMP input member 'execute' must be a string"),
        (b"{'execute': 'quit', 'arguments': 7}", "QMP input member 'arguments' must be an object"),
        (b"{'execute': 'quit', 'extra': 7}", "QMP input member 'extra' is unexpected"),
        (
            b"{'execute': 'quit', 'arguments': " + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
            "JSON parse error, invalid JSON syntax",
        ),
        (b"[" * 20_000 + b"]" * 20_000, "JSON parse error, invalid JSON syntax"),
        (b"{'execute': 'quit', 'id': " + b"1" * 10_000 + b"}", "JSON parse error, invalid JSON syntax"),
        (b'{"execute": "\xff"}', "JSON parse error, invalid JSON syntax"),
    ],
)
def test_what_is_no_command_is_refused_as_qemu_does(sent: bytes, why: str) -> None:
    (message,) = Messages().receive(sent)
    with pytest.raises(QmpError, match="^" + why) as refused:
        parse(message)
    assert refused.value.kind == "GenericError"


def test_after_what_is_no_json_the_next_line_is_read() -> None:
    first, second = Messages().receive(b"GET / HTTP/1.1\r\n{'execute': 'quit'}")
    assert first.strip() == b"GET / HTTP/1.1"
    assert parse(second).name == "quit"


@pytest.mark.parametrize("byte", [b"{", b"x", b"'", b"[1,"])
def test_a_message_without_an_end_is_not_kept(byte: bytes) -> None:
    with pytest.raises(TooLong):
        list(Messages().receive(byte * (MAX_MESSAGE + 2)))


def test_an_error_has_the_id_of_what_it_is_about() -> None:
    (message,) = Messages().receive(b"{'id': [1, null], 'arguments': {}}")
    with pytest.raises(QmpError) as refused:
        parse(message)
    assert refused.value.identity == [[1, None]]
    assert json.loads(qmp.refused(refused.value, [[1, None]]))["id"] == [1, None]


# Real volumes


def controlled(sides: Sides, *more: str | Path) -> Side:
    return sides.secondary(b"d" * SIZE, "--qmp", f"unix:{sides.folder}/qmp", *more)


@asynccontextmanager
async def client(address: str | tuple[str, int], *, ends: bool = False) -> AsyncIterator[QMPClient]:
    """``ends``: the other side ends the connection."""
    found = QMPClient("test")
    await asyncio.wait_for(found.connect(address), SECONDS)
    try:
        yield found
    finally:
        with suppress(*([EOFError] if ends else [])):
            await asyncio.wait_for(found.disconnect(), SECONDS)


async def event(listener: Any, name: str) -> dict[str, Any]:
    """The next event of that name."""
    while True:
        found = dict(await asyncio.wait_for(listener.get(), SECONDS))
        if found["event"] == name:
            assert found["timestamp"]["seconds"] > 0
            return dict(found["data"])


async def refusal(qemu: QMPClient, name: str, arguments: dict[str, Any] | None = None) -> tuple[str, str]:
    """The class and the text of the error that a command ends with."""
    with pytest.raises(ExecuteError) as refused:
        await qemu.execute(name, arguments)
    return refused.value.error_class, str(refused.value)


def test_a_colo_manager_takes_a_secondary_through_its_life(sides: Sides) -> None:
    """With the commands of QEMU's documentation, in their order."""
    side = controlled(sides, "--listen", "none", "--no-start")
    side.expected.append("checkpoint failed: Backup job was cancelled unexpectedly")
    address = {"type": "unix", "data": {"path": f"{sides.folder}/s.sock"}}

    async def manage() -> None:
        async with client(f"{sides.folder}/qmp") as qemu:
            assert qemu.greeting is not None
            assert "replfs" in qemu.greeting.QMP.version["package"]
            with qemu.listener() as events:
                assert await refusal(qemu, "nbd-server-add", {"device": "disk", "writable": True}) == (
                    "GenericError",
                    "NBD server not running",
                )
                assert await qemu.execute("nbd-server-start", {"addr": address}) == {}
                assert await qemu.execute("nbd-server-start", {"addr": address}) == {}
                assert await qemu.execute("nbd-server-add", {"device": "disk", "writable": True}) == {}
                assert await qemu.execute("query-xen-replication-status") == {
                    "error": True,
                    "desc": "Block replication is not running",
                }
                assert await refusal(qemu, "xen-colo-do-checkpoint") == (
                    "GenericError",
                    "Backup job was cancelled unexpectedly",
                )
                assert await qemu.execute("xen-set-replication", {"enable": True, "primary": False}) == {}
                stage = {"mode": "secondary", "stage": "running", "generation": 0}
                assert await event(events, "REPLFS_STAGE") == stage
                assert await qemu.execute("query-xen-replication-status") == {"error": False}
                near = await asyncio.to_thread(sides.primary, b"d" * SIZE)
                near.expected += LINK_LOST
                assert await event(events, "REPLFS_LINK") == {"state": "connected"}
                with near.file.open("r+b") as file:
                    file.write(b"n" * 4096)
                assert await asyncio.to_thread(side.content) == b"d" * SIZE
                assert await qemu.execute("xen-colo-do-checkpoint") == {}
                assert (await event(events, "REPLFS_CHECKPOINT"))["generation"] >= 1
                assert await asyncio.to_thread(side.content) == b"n" * 4096 + b"d" * (SIZE - 4096)
                failover = {"enable": False, "primary": False, "failover": True}
                assert await qemu.execute("xen-set-replication", failover) == {}
                assert (await event(events, "REPLFS_STAGE"))["stage"] == "failover"
                job = {"type": "commit", "device": "disk", "len": SIZE, "offset": SIZE, "speed": 0}
                assert await event(events, "BLOCK_JOB_COMPLETED") == job
                assert await qemu.execute("query-block-jobs") == []
                assert await qemu.execute("nbd-server-stop") == {}
                assert await refusal(qemu, "nbd-server-stop") == ("GenericError", "NBD server not running")
        assert side.get("stage") == "done"

    asyncio.run(manage())
    assert not sides.socket.exists()


def test_a_primary_tells_of_its_link_and_its_resync(sides: Sides) -> None:
    far = sides.secondary(bytes(SIZE))
    near = sides.make(
        "primary", b"p" * SIZE, "--target", f"nbd+unix:///disk?socket={sides.socket}", "--qmp", f"unix:{sides.folder}/q"
    )
    near.expected += [*LINK_LOST, "start failed: The parameter mode", "listen failed: only a secondary"]
    near.mount("--no-start")

    async def manage() -> None:
        async with client(f"{sides.folder}/q") as qemu:
            with qemu.listener() as events:
                assert await refusal(qemu, "xen-set-replication", {"enable": True, "primary": False}) == (
                    "GenericError",
                    "The parameter mode's value is invalid, needs 0, but got 1",
                )
                await qemu.execute("xen-set-replication", {"enable": True, "primary": True})
                mirrored = await event(events, "BLOCK_JOB_COMPLETED")
                assert (mirrored["type"], mirrored["len"]) == ("mirror", SIZE)
                while (await event(events, "REPLFS_LINK"))["state"] != "connected":
                    pass
                await qemu.execute("xen-colo-do-checkpoint")
                assert await asyncio.to_thread(far.content) == b"p" * SIZE
                await asyncio.to_thread(far.umount)
                assert (await event(events, "REPLFS_LINK"))["state"] != "connected"
                assert await refusal(qemu, "nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/x"}}}) == (
                    "GenericError",
                    "only a secondary listens for a primary",
                )
                await qemu.execute("xen-set-replication", {"enable": False, "primary": True})
                assert (await event(events, "REPLFS_STAGE"))["stage"] == "done"

    asyncio.run(manage())


def test_what_there_is(sides: Sides) -> None:
    side = controlled(sides, "--export", "colo-disk0")

    async def manage() -> None:
        async with client(f"{sides.folder}/qmp") as qemu:
            (device,) = await qemu.execute("query-block")
            assert (device["device"], device["inserted"]["file"]) == ("colo-disk0", str(side.disk))
            assert device["inserted"]["image"]["virtual-size"] == SIZE
            assert await qemu.execute("query-status") == {"status": "running", "singlestep": False, "running": True}
            assert (await qemu.execute("query-version"))["qemu"]["major"] == 7
            commands = {command["name"] for command in await qemu.execute("query-commands")}
            assert {"xen-set-replication", "quit", "qmp_capabilities", "query-block-jobs"} <= commands
            assert await qemu.execute("query-block-jobs") == []
            for command in commands - {"qmp_capabilities", "quit"}:
                assert await refusal(qemu, command, {"nonsense": 1})
            wrong = {
                ("human-monitor-command", None): ("CommandNotFound", "The command human-monitor-command has not been found"),
                ("qmp_capabilities", None): (
                    "CommandNotFound",
                    "Capabilities negotiation is already complete, command ignored",
                ),
                ("xen-set-replication", '{"enable": true}'): ("GenericError", "Parameter 'primary' is missing"),
                ("xen-set-replication", '{"enable": 1, "primary": true}'): (
                    "GenericError",
                    "Invalid parameter type for 'enable', expected: boolean",
                ),
                ("xen-set-replication", '{"enable": true, "primary": false, "failover": true}'): (
                    "GenericError",
                    "Parameter 'failover' is only for stopping replication",
                ),
                ("nbd-server-add", '{"device": "disk", "writable": true}'): (
                    "GenericError",
                    "Cannot find device='disk' nor node-name='disk': the device is 'colo-disk0', which --export names",
                ),
                ("nbd-server-add", '{"device": "colo-disk0"}'): (
                    "GenericError",
                    "the export is there for what a primary writes: it has to be writable",
                ),
                ("nbd-server-start", '{"addr": {"type": "inet", "data": {"host": "192.0.2.1", "port": "9999"}}}'): (
                    "GenericError",
                    f"NBD server already running, on unix:{sides.socket}",
                ),
            }
            for (name, arguments), expected in wrong.items():
                assert await refusal(qemu, name, json.loads(arguments) if arguments else None) == expected

    asyncio.run(manage())
    assert side.status()["qmp"] == {"listen": f"unix:{sides.folder}/qmp", "connections": 0}
    assert side.get("stage") == "running"


def test_over_tcp_too(sides: Sides) -> None:
    side = sides.secondary(b"d" * SIZE, "--qmp", "127.0.0.1:0")
    host, _, port = side.status()["qmp"]["listen"].rpartition(":")

    async def manage() -> None:
        async with client((host, int(port))) as one, client((host, int(port))) as two:
            with two.listener() as events:
                await one.execute("xen-colo-do-checkpoint")
                assert await event(events, "REPLFS_CHECKPOINT") == {"generation": 1}

    asyncio.run(manage())


@pytest.mark.parametrize("mounted", [True, False])
def test_quit_ends_it_in_good_order(tmp_path: Path, mounted: bool) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    point = tmp_path / "mnt"
    point.mkdir()
    command = [
        *(REPLFS, "secondary", "-f", str(tmp_path / "disk"), str(point) if mounted else "none", "--listen", f"unix:{tmp_path}/s"),
        *("--qmp", f"unix:{tmp_path}/qmp", "--view-listen", f"unix:{tmp_path}/view"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (tmp_path / "disk.replfs/state.json").exists() and (tmp_path / "qmp").exists(), "the start")

        async def manage() -> None:
            async with client(f"{tmp_path}/qmp", ends=True) as qemu:
                with qemu.listener() as events:
                    assert await qemu.execute("quit") == {}
                    assert await event(events, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}

        asyncio.run(manage())
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert "ended: the stage is running" in said
    assert not point.is_mount()
    assert not (tmp_path / "qmp").exists()


def test_a_promoted_side_is_controlled_on_by_the_same_connection(sides: Sides) -> None:
    side = controlled(sides)

    async def manage() -> None:
        async with client(f"{sides.folder}/qmp") as qemu:
            with qemu.listener() as events:
                await qemu.execute("xen-set-replication", {"enable": False, "primary": False, "failover": True})
                while (await event(events, "REPLFS_STAGE"))["stage"] != "done":
                    pass
                side.set("target", f"nbd+unix:///disk?socket={sides.folder}/nobody")
                await qemu.execute("xen-set-replication", {"enable": True, "primary": True})
                found = await event(events, "REPLFS_STAGE")
                assert (found["mode"], found["stage"]) == ("primary", "running")

    side.expected += ["going on alone until it is there", "no link"]
    asyncio.run(manage())
    assert side.get("mode") == "primary"


# Hostile clients


def connect(path: str) -> tuple[socket.socket, Any]:
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(SECONDS)
    found.connect(path)
    stream = found.makefile("rwb")
    assert b"QMP" in stream.readline()
    return found, stream


def send_for_ever(connection: socket.socket, what: bytes) -> None:
    while True:
        connection.sendall(what)


def test_before_the_capabilities_nothing_is_carried_out(sides: Sides) -> None:
    side = controlled(sides)
    connection, stream = connect(f"{sides.folder}/qmp")
    with connection, stream:
        for sent, expected in (
            (b"{'execute': 'xen-colo-do-checkpoint', 'id': 7}", "Expecting capabilities negotiation with 'qmp_capabilities'"),
            (b"nonsense\n", "JSON parse error, invalid JSON syntax"),
            (b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}", "Capability 'oob' is not available"),
        ):
            stream.write(sent)
            stream.flush()
            assert json.loads(stream.readline())["error"]["desc"] == expected
        side.set("checkpoint")
        stream.write(b"{'execute': 'qmp_capabilities'}{'execute': 'query-status', 'id': null}")
        stream.flush()
        assert json.loads(stream.readline()) == {"return": {}}, "and no event of before that"
        assert json.loads(stream.readline())["id"] is None
    assert side.get("generation") == "1"


def test_who_does_not_read_or_never_ends_is_disconnected_and_harms_nobody(sides: Sides) -> None:
    side = controlled(sides)
    side.expected += ["does not read is disconnected", "sent more than .* as one command", "16 QMP connections"]
    greedy, _ = connect(f"{sides.folder}/qmp")
    endless, _ = connect(f"{sides.folder}/qmp")
    with greedy, endless:
        endless.setblocking(True)
        greedy.sendall(b"{'execute': 'qmp_capabilities'}")
        for connection, what in ((endless, b"[" * 65536), (greedy, b"{'execute': 'query-commands'}" * 1000)):
            with pytest.raises(OSError):
                send_for_ever(connection, what)
    crowd = [connect(f"{sides.folder}/qmp") for _ in range(16)]
    extra = socket.socket(socket.AF_UNIX)
    extra.connect(f"{sides.folder}/qmp")
    assert extra.recv(100) == b""
    extra.close()
    for connection, stream in crowd:
        stream.close()
        connection.close()
    wait_for(lambda: side.status()["qmp"]["connections"] == 0, "the clients to be gone")
    assert side.content() == b"d" * SIZE


def test_an_address_beyond_this_machine_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    (tmp_path / "mnt").mkdir()
    done = replfs("secondary", tmp_path / "disk", tmp_path / "mnt", "--qmp", "0.0.0.0:4444", check=False)
    assert done.returncode == 2
    assert "0.0.0.0:4444 is beyond this machine" in done.stderr


def test_the_attribute_does_the_same(sides: Sides) -> None:
    side = controlled(sides)
    assert side.status()["listen"] == f"unix:{sides.socket}"
    side.set("listen", f"unix:{sides.socket}")
    side.expected.append("listen failed")
    with pytest.raises(OSError, match="busy"):
        side.set("listen", f"unix:{sides.folder}/elsewhere")
    assert "set listen to none first" in side.get("last-error")
    for wrong in ("", "nowhere", "unix:relative", "192.0.2.1:1"):
        with pytest.raises(OSError, match="Invalid argument"):
            side.set("listen", wrong)
    side.set("listen", "none")
    side.set("listen", "none")
    assert side.status()["listen"] is None
    shown = replfs("status", side.point).stdout
    assert re.search("^listen: +nowhere$", shown, re.MULTILINE)
    assert re.search(f"^QMP: +unix:{sides.folder}/qmp, 0 connections$", shown, re.MULTILINE)
    side.set("listen", f"unix:{sides.folder}/elsewhere")
    near = sides.make("primary", b"d" * SIZE, "--target", f"nbd+unix:///disk?socket={sides.folder}/elsewhere")
    near.expected += LINK_LOST
    near.mount("--initial-sync", "none")
    near.until_connected()
    side.set("listen", "none")
    wait_for(lambda: near.status()["link"]["state"] != "connected", "the link to be lost")
    side.signal(signal.SIGTERM)
