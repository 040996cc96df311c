"""How people name an NBD server and an export: NBD URIs and listen addresses, as text and as values.

URIs follow the NBD URI specification (``doc/uri.md`` of NBD) and, where that leaves a choice, libnbd. Whatever is not understood
is refused with a :class:`~replfs.errors.ReplfsError` of one line; nothing is guessed or left out in silence.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from replfs.errors import ReplfsError, printable
from replfs.protocol.nbd.wire import MAX_STRING

DEFAULT_PORT: Final = 10809


@dataclass(frozen=True)
class TcpAddress:
    """A host, by name or as a literal without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """The path of a unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


@dataclass(frozen=True)
class Target:
    """An export of a server somewhere. Its text is the NBD URI."""

    address: Address
    export: str

    def __str__(self) -> str:
        export = quote(self.export, safe="/")
        if isinstance(self.address, UnixAddress):
            return f"nbd+unix:///{export}?socket={quote(self.address.path)}"
        authority = str(self.address).replace("%", "%25")  # the zone of an IPv6 literal
        return f"nbd://{authority}/{export}"


# RFC 3986, appendix B, with the scheme and "//" required
_URI: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?")
_HOST_AND_PORT: Final = re.compile(r"(?:\[(?P<literal>[^\[\]]*)\]|(?P<host>[\w.-]*))(?::(?P<port>[0-9]*))?")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_uri(text: str) -> Target:
    """The export that an ``nbd://`` or ``nbd+unix://`` URI names."""

    def wrong(why: str) -> ReplfsError:
        return ReplfsError(f"{printable(text)} is not a usable NBD URI: {why}")

    def decoded(part: str) -> str:
        if _BAD_ESCAPE.search(part):
            raise wrong("a % must be followed by two hexadecimal digits")
        try:
            plain = unquote(part, errors="strict")
        except UnicodeDecodeError:
            raise wrong("its text is not UTF-8") from None
        if "\0" in plain:
            raise wrong("it holds a NUL character")
        return plain

    split = _URI.fullmatch(text)
    if split is None:
        raise wrong("write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    scheme = split["scheme"].lower()
    if scheme in ("nbds", "nbds+unix"):
        raise ReplfsError(
            f"TLS is not supported by this release, so {printable(text)} cannot be used: use nbd:// or nbd+unix://, "
            "across a network through a tunnel that encrypts"
        )
    if scheme not in ("nbd", "nbd+unix"):
        raise wrong("its scheme must be nbd or nbd+unix")
    export = decoded(split["path"][1:])
    if len(export.encode()) > MAX_STRING:
        raise wrong(f"the export's name is longer than {MAX_STRING} bytes")

    query: dict[str, str] = {}
    for parameter in filter(None, (split["query"] or "").split("&")):
        key, _, value = parameter.partition("=")
        if key != "socket" or scheme != "nbd+unix":
            raise wrong(f"the parameter {printable(key)} is not known here")
        if key in query:
            raise wrong(f"it has the parameter {key} twice")
        query[key] = decoded(value)

    if scheme == "nbd+unix":
        if split["authority"]:
            raise wrong("a unix socket has no host: write nbd+unix:///EXPORT?socket=PATH")
        if not query.get("socket"):
            raise wrong("it names no socket: add ?socket=PATH")
        return Target(UnixAddress(query["socket"]), export)
    if "@" in split["authority"]:
        raise wrong("a user name is of no use without TLS")
    address = _host_and_port(split["authority"].replace("%25", "%"))
    if address is None or address.port == 0:
        raise wrong("its host or port is not valid")
    # libnbd takes nbd:/// as this machine
    return Target(TcpAddress(address.host or "localhost", address.port), export)


def parse_address(text: str) -> Address:
    """The address to listen on that ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH`` names. Port 0 is one that the kernel picks."""
    if text.startswith("unix:") and text != "unix:" and "\0" not in text:
        return UnixAddress(text.removeprefix("unix:"))
    address = _host_and_port(text) if not text.startswith("unix:") and re.search(r":[0-9]+\Z", text) else None
    if address is None or not address.host:
        raise ReplfsError(f"{printable(text)} is not an address to listen on: write HOST:PORT, [IPV6]:PORT or unix:PATH")
    return address


def is_local(address: Address) -> bool:
    """Whether only this machine can be at the other end."""
    if isinstance(address, UnixAddress) or address.host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False


def _host_and_port(text: str) -> TcpAddress | None:
    split = _HOST_AND_PORT.fullmatch(text)
    if split is None:
        return None
    port = int(split["port"] or DEFAULT_PORT) if len(split["port"] or "") <= 5 else -1
    if not 0 <= port <= 65535:
        return None
    if split["literal"] is None:
        return TcpAddress(split["host"], port)
    try:
        ipaddress.IPv6Address(split["literal"])
    except ValueError:
        return None
    return TcpAddress(split["literal"], port)
