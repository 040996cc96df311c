"""Which control operation does what in which stage: QEMU's rules, as tables, with QEMU's messages.

Where QEMU's own behaviour is a defect (it cannot retry a failed failover, its stop never ends well) the tables say what is right.
"""

import enum
import errno
from dataclasses import dataclass
from typing import Final

from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Address


class Mode(enum.StrEnum):
    PRIMARY = "primary"
    SECONDARY = "secondary"


class Stage(enum.StrEnum):
    NONE = "none"
    RUNNING = "running"
    FAILOVER = "failover"
    FAILOVER_FAILED = "failover-failed"
    DONE = "done"


class Operation(enum.StrEnum):
    START = "start"
    CHECKPOINT = "checkpoint"
    FAILOVER = "failover"
    STOP = "stop"
    RESYNC = "resync"
    VERIFY = "verify"
    LISTEN = "listen"


class Resyncing(enum.StrEnum):
    """What can be asked of a resync: to begin now, rather than when the link is tried again; to pause; to go on.

    And to overwrite what is on the other side, although that is newer, or something else.
    """

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    DISCARD_REMOTE = "discard-remote"


class Verifying(enum.StrEnum):
    """What can be asked of a verification: to begin; to begin, and to send what differs; to end."""

    START = "start"
    REPAIR = "repair"
    STOP = "stop"


@dataclass(frozen=True)
class Verification:
    """``rate``: bytes a second at most, 0 for no limit."""

    what: Verifying
    rate: int = 0


@dataclass(frozen=True)
class Listening:
    """Where a secondary is to listen for its primary; None: nowhere."""

    address: Address | None


Argument = Mode | Resyncing | Verification | Listening
"""What an operation may be told."""


class Verdict(enum.Enum):
    """What an operation means: carry it out, or report success and do nothing."""

    DO = enum.auto()
    NOTHING = enum.auto()


NOT_RUNNING: Final = "Block replication is not running"
RUNNING_OR_DONE: Final = "Block replication is running or done"
CANCELLED: Final = "Backup job was cancelled unexpectedly"
IO_ERROR: Final = "I/O error occurred"
NOT_SECONDARY: Final = "only a secondary listens for a primary"
NOT_PRIMARY: Final = "only a primary sends what the other side lacks"
WRONG_MODE: Final = "The parameter mode's value is invalid, needs %d, but got %d"
_MODE_NUMBERS: Final = {Mode.PRIMARY: 0, Mode.SECONDARY: 1}  # as QEMU counts them, in WRONG_MODE

_DO, _N = Verdict.DO, Verdict.NOTHING
_STAGES: Final = (Stage.NONE, Stage.RUNNING, Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE)

_ROWS: Final[dict[Mode, dict[Operation, tuple[Verdict | str, ...]]]] = {
    #                        none         running           failover  failover-failed   done
    Mode.SECONDARY: {
        Operation.START: (_DO, RUNNING_OR_DONE, _N, RUNNING_OR_DONE, _N),
        Operation.CHECKPOINT: (CANCELLED, _DO, _N, CANCELLED, _N),
        Operation.FAILOVER: (NOT_RUNNING, _DO, _N, _DO, _N),
        Operation.STOP: (NOT_RUNNING, _DO, _N, NOT_RUNNING, _N),
        Operation.RESYNC: (NOT_PRIMARY,) * 5,
        Operation.VERIFY: (NOT_PRIMARY,) * 5,
        Operation.LISTEN: (_DO,) * 5,
    },
    Mode.PRIMARY: {  # which never sees failover or failover-failed
        Operation.START: (_DO, RUNNING_OR_DONE, _N, RUNNING_OR_DONE, _N),
        Operation.CHECKPOINT: (_N, _DO, _N, _N, _N),  # QEMU: nothing; here the secondary is to take one
        Operation.FAILOVER: (NOT_RUNNING, _DO, _N, NOT_RUNNING, _N),
        Operation.STOP: (NOT_RUNNING, _DO, _N, NOT_RUNNING, _N),
        Operation.RESYNC: (NOT_RUNNING, _DO, _N, NOT_RUNNING, NOT_RUNNING),
        Operation.VERIFY: (NOT_RUNNING, _DO, _N, NOT_RUNNING, NOT_RUNNING),
        Operation.LISTEN: (NOT_SECONDARY,) * 5,
    },
}


def verdict(mode: Mode, operation: Operation, stage: Stage) -> Verdict:
    """What the operation means in this stage. Raises ReplfsError (EBUSY) with QEMU's message where it is refused."""
    found = _ROWS[mode][operation][_STAGES.index(stage)]
    if isinstance(found, str):
        raise ReplfsError(found, errno.EBUSY)
    return found


def check_start_mode(mode: Mode, asked: Mode) -> None:
    """Raises ReplfsError (EINVAL) if replication is asked to start in a mode that is not the volume's."""
    if asked is not mode:
        raise ReplfsError(WRONG_MODE % (_MODE_NUMBERS[mode], _MODE_NUMBERS[asked]), errno.EINVAL)


def get_error(stage: Stage, sticky_error: bool) -> str:
    """What QEMU's get_error would say, empty if it would say nothing."""
    if stage is Stage.NONE:
        return NOT_RUNNING
    return IO_ERROR if sticky_error else ""
