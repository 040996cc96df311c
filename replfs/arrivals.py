"""Waiting for what comes on a descriptor, and sending, with as little as possible between the kernel and who asks.

A task that sleeps until something can be read is woken by way of the kernel's scheduler, of epoll and of trio's, which takes longer
than most requests do. So while things come one upon the other, whoever waits asks again and again for a moment before it sleeps;
where they do not, or where there is only one CPU, it sleeps at once.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import trio

_SPIN_SECONDS: Final = 60e-6
_BRISK_SECONDS: Final = 200e-6
"""Who slept for less than this asks for a moment the next time."""

_MOST_PARTS: Final = 512  # of one sendmsg(2), which takes IOV_MAX

T = TypeVar("T")
_may_spin = len(os.sched_getaffinity(0)) > 1


def do_not_spin() -> None:
    """A task has been woken that is to have its turn at once: whoever waits next goes to sleep."""
    global _last
    _last = None


_last: "Arrivals | None" = None
"""What something came on last: as things come on another one meanwhile, there is no time to wait for just one."""


class Arrivals:
    """Of one non-blocking descriptor, which one task at a time waits for."""

    def __init__(self, source: int | socket.socket) -> None:
        self._source = source
        self._brisk = False

    async def take(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives, as soon as it does not raise BlockingIOError. Suspends only then.

        Raises what ``attempt`` does, and trio.ClosedResourceError after a :func:`trio.lowlevel.notify_closing`.
        """
        global _last
        until = 0.0
        while True:
            try:
                found = attempt()
                _last = self
                return found
            except BlockingIOError:
                now = time.perf_counter()
            if not until and self._brisk and _last is self:
                until = now + _SPIN_SECONDS
            if now >= until:
                await trio.lowlevel.wait_readable(self._source)
                self._brisk = _may_spin and time.perf_counter() - now < _BRISK_SECONDS
                until = 0.0


def _nobody() -> None:
    """Where nobody needs to know."""


async def send_all(
    sock: socket.socket, parts: Sequence[bytes | bytearray | memoryview], progress: Callable[[], None] = _nobody
) -> None:
    """Send all parts, one after the other, through a non-blocking socket. Suspends only when it takes no more.

    ``progress`` is called whenever some of it was taken.

    Raises OSError, and trio.ClosedResourceError after a :func:`trio.lowlevel.notify_closing`.
    """
    while parts:
        try:
            sent = sock.sendmsg(parts[:_MOST_PARTS])
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
            continue
        progress()
        whole = 0
        for part in parts[:_MOST_PARTS]:
            if sent < len(part):
                break
            sent -= len(part)
            whole += 1
        parts = parts[whole:]
        if sent:
            parts = (memoryview(parts[0])[sent:], *parts[1:])
