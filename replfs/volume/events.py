"""What happens to a volume, for whoever wants to be told: the QMP server, so far."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    STAGE = auto()
    """``mode``, ``stage``, ``generation``: the stage or the mode has changed."""
    CHECKPOINT = auto()
    """``generation``: there was a checkpoint."""
    LINK = auto()
    """``state``: what a primary's link has come to be; or a secondary's: connected or not."""
    JOB = auto()
    """``type`` (commit, mirror), ``bytes`` that it was about, ``error`` (empty: none): a job has ended."""


@dataclass(frozen=True)
class Event:
    kind: Kind
    data: dict[str, Any]


class Events:
    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    @contextmanager
    def told_to(self, listener: Callable[[Event], None]) -> Iterator[None]:
        """``listener`` is called with each event; it must not raise, nor take long."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def publish(self, kind: Kind, **data: Any) -> None:
        for listener in list(self._listeners):
            listener(Event(kind, data))
