"""What QMP commands mean: each is a control operation (:mod:`replfs.control`) or a part of the status, in QEMU's words.

Names, arguments and results follow QEMU's ``qapi`` (``replication.json`` and ``migration.json``, ``block-core.json``,
``block-export.json``, ``run-state.json``). A volume has one device, named as its NBD export is.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from replfs import control
from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.errors import printable
from replfs.protocol import qmp
from replfs.protocol.nbd.uri import UnixAddress
from replfs.protocol.qmp import BOOLEAN, OBJECT, STRING, Command, Parameter, QmpError
from replfs.volume.base import Volume
from replfs.volume.events import Event, Kind

Arguments = dict[str, Any]


async def carry_out(volume: Volume, command: Command) -> Any:
    """What the command returns. Raises QmpError, ReplfsError, OSError."""
    known = _COMMANDS.get(command.name)
    if known is None:
        raise qmp.not_found(command.name)
    qmp.check_arguments(command.arguments, known.parameters)
    return await known.handler(volume, command.arguments)


async def _put(volume: Volume, operation: Operation, value: str = "1") -> Arguments:
    await control.put(volume, control.PREFIX + operation, value.encode())
    return {}


# Replication


async def _set_replication(volume: Volume, arguments: Arguments) -> Arguments:
    if arguments["enable"]:
        if "failover" in arguments:
            raise QmpError("Parameter 'failover' is only for stopping replication")
        return await _put(volume, Operation.START, Mode.PRIMARY if arguments["primary"] else Mode.SECONDARY)
    return await _put(volume, Operation.FAILOVER if arguments.get("failover") else Operation.STOP)


async def _checkpoint(volume: Volume, _: Arguments) -> Arguments:
    return await _put(volume, Operation.CHECKPOINT)


async def _replication_status(volume: Volume, _: Arguments) -> Arguments:
    return {"error": True, "desc": volume.error} if volume.error else {"error": False}


# The NBD server that a primary connects to


async def _start_server(volume: Volume, arguments: Arguments) -> Arguments:
    if "tls-creds" in arguments:
        raise QmpError("TLS is not supported: use a tunnel that encrypts")
    listening, asked = volume.status().get("listen"), _address(arguments["addr"])
    if listening is not None and listening != asked:
        raise QmpError(f"NBD server already running, on {printable(listening)}")
    return await _put(volume, Operation.LISTEN, asked)


def _address(address: Arguments) -> str:
    """A ``SocketAddressLegacy`` as an address to listen on. Raises QmpError."""
    kind, data = address.get("type"), address.get("data")
    if kind not in ("inet", "unix") or not isinstance(data, dict):
        raise QmpError("Parameter 'addr' is an inet or a unix address, with its data")
    wanted = ("host", "port") if kind == "inet" else ("path",)
    for name in wanted:
        if not isinstance(data.get(name), str):
            raise QmpError(f"Invalid parameter type for 'addr.data.{name}', expected: string")
    for name in data:
        if name not in wanted:
            raise QmpError(f"Parameter 'addr.data.{name[:60]}' is unexpected")
    if kind == "unix":
        return str(UnixAddress(data["path"]))
    return f"[{data['host']}]:{data['port']}" if ":" in data["host"] else f"{data['host']}:{data['port']}"


async def _stop_server(volume: Volume, _: Arguments) -> Arguments:
    if volume.status().get("listen") is None:
        raise QmpError("NBD server not running")
    return await _put(volume, Operation.LISTEN, control.NOWHERE)


async def _add_export(volume: Volume, arguments: Arguments) -> Arguments:
    """There is one export, which is served as soon as the server runs: this sees to it that it is the one that is meant."""
    export = volume.config.export
    if volume.status().get("listen") is None:
        raise QmpError("NBD server not running")
    if arguments["device"] != export:
        shown = printable(arguments["device"], 60)
        raise QmpError(f"Cannot find device='{shown}' nor node-name='{shown}': the device is '{export}', which --export names")
    if arguments.get("name", export) != export:
        raise QmpError(f"the export's name is '{export}', which --export says, not '{printable(arguments['name'], 60)}'")
    if not arguments.get("writable"):
        raise QmpError("the export is there for what a primary writes: it has to be writable")
    return {}


# What there is


async def _query_block(volume: Volume, _: Arguments) -> list[Arguments]:
    disk, export = volume.disk, volume.config.export
    path = str(volume.config.disk)
    image = {
        "filename": path,
        "format": disk.format,
        "virtual-size": disk.size,
        "actual-size": disk.file.allocated_bytes(),
        "dirty-flag": False,
    }
    unlimited = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    inserted = {
        "file": path,
        "node-name": export,
        "ro": False,
        "drv": disk.format,
        "backing_file_depth": 0,
        "encrypted": False,
        "detect_zeroes": "off",
        **unlimited,
        "image": image,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "write_threshold": 0,
    }
    return [{"device": export, "qdev": "", "type": "unknown", "removable": False, "locked": False, "inserted": inserted}]


async def _query_block_jobs(volume: Volume, _: Arguments) -> list[Arguments]:
    status = volume.status()
    if "commit" in status:
        failed = status["stage"] == Stage.FAILOVER_FAILED
        return [_job(volume, "commit", status["commit"]["total"], status["commit"]["done"], failed=failed)]
    resync = status.get("link", {}).get("resync", {})
    if resync.get("running"):
        total, left = resync["total"], resync["left"]
        return [_job(volume, "mirror", total, total - left, paused=resync["paused"], speed=volume.config.resync_rate)]
    return []


def _job(
    volume: Volume, kind: str, length: int, offset: int, *, paused: bool = False, failed: bool = False, speed: int = 0
) -> Arguments:
    return {
        "type": kind,
        "device": volume.config.export,
        "len": length,
        "offset": offset,
        "busy": not paused and not failed,
        "paused": paused,
        "speed": speed,
        "io-status": "failed" if failed else "ok",
        "ready": False,
        "status": "concluded" if failed else "paused" if paused else "running",
        "auto-finalize": True,
        "auto-dismiss": True,
    } | ({"error": volume.error} if failed else {})


async def _query_status(_: Volume, __: Arguments) -> Arguments:
    return {"status": "running", "singlestep": False, "running": True}


async def _query_version(_: Volume, __: Arguments) -> Arguments:
    return qmp.version()


async def _query_commands(_: Volume, __: Arguments) -> list[Arguments]:
    return [{"name": name} for name in ("qmp_capabilities", *_COMMANDS)]


async def _quit(_: Volume, __: Arguments) -> Arguments:
    return {}  # the server sees to it, when this has been answered


@dataclass(frozen=True)
class _Known:
    handler: Callable[[Volume, Arguments], Awaitable[Any]]
    parameters: dict[str, Parameter]


def _known(handler: Callable[[Volume, Arguments], Awaitable[Any]], **parameters: Parameter) -> _Known:
    return _Known(handler, {name.replace("_", "-"): parameter for name, parameter in parameters.items()})


_COMMANDS: Final[dict[str, _Known]] = {
    "xen-set-replication": _known(
        _set_replication, enable=Parameter(BOOLEAN), primary=Parameter(BOOLEAN), failover=Parameter(BOOLEAN, optional=True)
    ),
    "xen-colo-do-checkpoint": _known(_checkpoint),
    "query-xen-replication-status": _known(_replication_status),
    "nbd-server-start": _known(_start_server, addr=Parameter(OBJECT), tls_creds=Parameter(STRING, optional=True)),
    "nbd-server-add": _known(
        _add_export,
        device=Parameter(STRING),
        name=Parameter(STRING, optional=True),
        writable=Parameter(BOOLEAN, optional=True),
    ),
    "nbd-server-stop": _known(_stop_server),
    "query-block": _known(_query_block),
    "query-block-jobs": _known(_query_block_jobs),
    "query-status": _known(_query_status),
    "query-version": _known(_query_version),
    "query-commands": _known(_query_commands),
    "quit": _known(_quit),
}


# Events


def events(volume: Volume, event: Event) -> Iterator[tuple[str, Arguments]]:
    """What a client is told: names and data. What QEMU has no event for has a name of ours."""
    data = event.data
    if event.kind is Kind.JOB:
        length = data["bytes"]
        told = {"type": data["type"], "device": volume.config.export, "len": length, "offset": length, "speed": 0}
        yield "BLOCK_JOB_COMPLETED", told | ({"error": data["error"], "offset": 0} if data["error"] else {})
    else:
        yield f"REPLFS_{event.kind.name}", data
