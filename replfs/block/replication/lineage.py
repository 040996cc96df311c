"""Who is newer: the generations of data that each side of a pair knows, and what follows when the sides meet.

As in DRBD, a generation of data has an identifier. Each side remembers the one that it holds (``current``), the one that both
held when it began to go on alone (``bitmap``: since then its tracking tells what the other lacks), and some from before. A side
that writes without the other begins a new generation, so whoever wrote what the other does not know can be told from them.
"""

import enum
import secrets
from typing import Annotated, Final, NamedTuple

import msgspec

_REMEMBERED: Final = 8


Id = Annotated[str, msgspec.Meta(max_length=64)]


class Ids(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Generation identifiers, 16 hexadecimal digits each. Without a ``current``: never had a whole copy of anything known."""

    current: Id = ""
    bitmap: Id = ""
    history: Annotated[tuple[Id, ...], msgspec.Meta(max_length=64)] = ()

    @property
    def known(self) -> frozenset[str]:
        """All generations that this data has been."""
        return frozenset((self.current, self.bitmap, *self.history)) - {""}

    def alone(self) -> "Ids":
        """From now on there may be writes that the other side has not got. The first of several such steps counts."""
        return self if self.bitmap else Ids(new_id(), self.current, self.history)

    def agreed(self) -> "Ids":
        """The other side has all of it again."""
        history = tuple(dict.fromkeys(known for known in (self.bitmap, *self.history) if known))
        return Ids(self.current or new_id(), "", history[:_REMEMBERED])


def new_id() -> str:
    return secrets.token_hex(8)


class How(enum.Enum):
    """What a primary may do to the disk of the secondary that it has met."""

    CONTINUE = enum.auto()
    """Send what is tracked, here and there."""
    FULL = enum.auto()
    """Send everything."""
    REFUSE = enum.auto()
    """Nothing, before a person has decided."""


class Verdict(NamedTuple):
    how: How
    why: str
    told: How = How.FULL
    """What is done instead of a refusal if a person says that the secondary's content is not needed."""


def compare(primary: Ids, secondary: Ids, *, paired: bool) -> Verdict:
    """What follows from both sides' generations. ``paired``: each knows the other as its own."""
    here, there = primary.current, secondary.current
    if not there:
        if paired and here:
            return Verdict(How.CONTINUE, "it does not have a whole copy yet")
        return Verdict(How.FULL, "it is new" if not secondary.known else "it has never had a whole copy")
    if here and there in (here, primary.bitmap):
        if paired:
            return Verdict(How.CONTINUE, "it holds what this side held when they last agreed")
        return Verdict(How.FULL, "it holds what this side held once, but belongs to another pair")
    if paired and not primary.bitmap and primary.history[:1] == (there,):
        return Verdict(How.CONTINUE, "it has all of it, and was not told so any more")
    if there in primary.history:
        return Verdict(How.FULL, "it holds an old state of this side's disk")
    if here and here in secondary.known:
        return Verdict(How.REFUSE, "it is newer: it holds all that this side has, and was written to since (after a failover)")
    if primary.known & secondary.known:
        both_know = paired and primary.bitmap and primary.bitmap == secondary.bitmap  # what each has written since
        how = How.CONTINUE if both_know else How.FULL
        return Verdict(How.REFUSE, "the sides have diverged: each was written to since they last agreed", how)
    return Verdict(How.REFUSE, "it holds something else: it was never a copy of this side's disk")
