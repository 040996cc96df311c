"""NBD on the wire: every number and layout that replfs uses, under the name that the specification gives it.

Both sides share this module. It owns no state and promises nothing but the numbers; the section of the specification
(NBD's ``doc/proto.md``) stands above each group. All integers are big-endian.
"""

import errno
from struct import Struct
from typing import Any, Final, NamedTuple

from replfs.block.node import Data


class ProtocolError(Exception):
    """The peer broke the protocol: what it sends from here on means nothing, so the connection ends."""


# --- Newstyle negotiation; Fixed newstyle negotiation ---------------------------------------------------------------------------
NBD_MAGIC: Final = 0x4E42444D41474943
NBD_IHAVEOPT: Final = 0x49484156454F5054
NBD_OLDSTYLE_MAGIC: Final = 0x00420281861253
NBD_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

GREETING: Final = Struct(">QQH")  # NBD_MAGIC, NBD_IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = Struct(">L")
OPTION: Final = Struct(">QLL")  # NBD_IHAVEOPT, option, length of the data that follows
OPTION_REPLY: Final = Struct(">QLLL")  # NBD_OPTION_REPLY_MAGIC, option, reply type, length of the data that follows
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags
EXPORT_NAME_PADDING: Final = 124  # zeroes behind EXPORT_NAME_REPLY unless NBD_FLAG_C_NO_ZEROES was sent

# --- Values: Handshake flags, Client flags --------------------------------------------------------------------------------------
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# --- Values: Transmission flags -------------------------------------------------------------------------------------------------
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8

# --- Values: Option types -------------------------------------------------------------------------------------------------------
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_REPLFS: Final = 0x7265_706C
"""replfs's own: the connection goes on as :mod:`replfs.protocol.peer` has it."""

# --- Values: Option reply types -------------------------------------------------------------------------------------------------
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_ERR: Final = 1 << 31  # every error has this bit
NBD_REP_ERR_UNSUP: Final = NBD_REP_ERR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_ERR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_ERR + 3
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_ERR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_ERR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_ERR + 7
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_ERR + 9

NBD_INFO_EXPORT: Final = 0
NBD_INFO_BLOCK_SIZE: Final = 3

LENGTH: Final = Struct(">L")  # of a string that follows; also a count of queries, and a metadata context ID
INFO_TYPE: Final = Struct(">H")  # an information request, their count, and the start of every NBD_REP_INFO
INFO_EXPORT: Final = Struct(">HQH")  # NBD_INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HLLL")  # NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum payload

# --- Metadata querying: the base:allocation metadata context --------------------------------------------------------------------
BASE_ALLOCATION: Final = b"base:allocation"
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

# --- Transmission: Request message, Simple reply message, Structured reply chunk message ----------------------------------------
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

REQUEST: Final = Struct(">LHHQQL")  # NBD_REQUEST_MAGIC, command flags, type, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">LLQ")  # NBD_SIMPLE_REPLY_MAGIC, error, cookie
CHUNK: Final = Struct(">LHHQL")  # NBD_STRUCTURED_REPLY_MAGIC, reply flags, type, cookie, length of the payload that follows

# --- Values: Request types, Command flags ---------------------------------------------------------------------------------------
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3

# --- Values: Structured reply flags, Structured reply types ---------------------------------------------------------------------
NBD_REPLY_FLAG_DONE: Final = 1 << 0

NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_ERR: Final = 1 << 15  # every error chunk has this bit
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_ERR + 1

OFFSET: Final = Struct(">Q")  # the start of NBD_REPLY_TYPE_OFFSET_DATA
OFFSET_HOLE: Final = Struct(">QL")  # offset, hole size
DESCRIPTOR: Final = Struct(">LL")  # length, status flags: what follows the context ID in NBD_REPLY_TYPE_BLOCK_STATUS
ERROR: Final = Struct(">LH")  # error, length of the message that follows: the start of every error chunk
DATA_CHUNK: Final = Struct(">LHHQLQ")  # CHUNK and OFFSET in one

# --- Values: Error values -------------------------------------------------------------------------------------------------------
NBD_SUCCESS: Final = 0
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

ERRNO_OF_ERROR: Final = {
    NBD_EPERM: errno.EPERM,
    NBD_EIO: errno.EIO,
    NBD_ENOMEM: errno.ENOMEM,
    NBD_EINVAL: errno.EINVAL,
    NBD_ENOSPC: errno.ENOSPC,
    NBD_EOVERFLOW: errno.EOVERFLOW,
    NBD_ENOTSUP: errno.ENOTSUP,
    NBD_ESHUTDOWN: errno.ESHUTDOWN,
}
ERROR_OF_ERRNO: Final = {number: error for error, number in ERRNO_OF_ERROR.items()} | {
    errno.EACCES: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
}
"""What an errno becomes on the wire; every other one becomes NBD_EIO."""

# --- Size constraints; Conventions ----------------------------------------------------------------------------------------------
DEFAULT_BLOCK_SIZE: Final = 4096
"""The preferred block size, in bytes, of a server that names none, and of ours."""

MAX_PAYLOAD: Final = 32 << 20
"""The most bytes of a READ or WRITE of a server that names no limit, and of ours."""

MAX_STRING: Final = 4096
"""The most bytes of a name or message."""


class Request(NamedTuple):
    """One request of the transmission phase. ``data`` is the payload of a WRITE, else empty."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    data: Data


class Fields:
    """The fields of one message, taken one after the other; :class:`ProtocolError` where it ends too early."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._position = 0

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._message):
            raise ProtocolError("a message is shorter than what it says it holds")
        field = self._message[self._position : end]
        self._position = end
        return field

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def string(self) -> bytes:
        """A string that has its length in front of it."""
        (length,) = self.unpack(LENGTH)
        return self.take(length)

    def rest(self) -> bytes:
        return self.take(len(self._message) - self._position)
