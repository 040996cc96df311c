"""Waiting and sending past trio's scheduler: nothing is lost, nobody is kept from its turn for long, and an end is noticed."""

import os
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from replfs.arrivals import Arrivals, do_not_spin, send_all


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    for end in (one, other):
        end.setblocking(False)
    with one, other:
        yield one, other


async def test_all_that_is_sent_arrives_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    """In parts of all sizes, more than the socket holds at a time."""
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    small = [os.urandom(i % 7) for i in range(3000)]  # more than one system call takes
    parts = [
        *small,
        bytes(0),
        os.urandom(1),
        bytearray(os.urandom(1 << 20)),
        memoryview(os.urandom(70_000)),
        os.urandom(3),
        bytes(0),
    ] * 2
    arrived = bytearray()
    progress: list[None] = []

    async def receive() -> None:
        arrivals = Arrivals(far)
        while data := await arrivals.take(lambda: far.recv(1 << 16)):
            arrived.extend(data)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await send_all(near, parts, lambda: progress.append(None))
            near.shutdown(socket.SHUT_WR)
    assert arrived == b"".join(parts)
    assert len(progress) > 1


async def test_what_is_there_is_taken_without_a_turn_of_another_task(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.send(b"there")
    with trio.testing.assert_no_checkpoints():
        assert await Arrivals(far).take(lambda: far.recv(10)) == b"there"


async def test_who_waits_leaves_other_tasks_their_turn(pair: tuple[socket.socket, socket.socket]) -> None:
    """Also while things come one upon the other, so that it asks again before it sleeps."""
    near, far = pair
    arrivals = Arrivals(far)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while turns < 200:
            turns += 1
            do_not_spin()
            near.send(b"x")
            await trio.lowlevel.checkpoint()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            got = 0
            while got < 200:
                got += len(await arrivals.take(lambda: far.recv(10)))
    assert turns == 200


async def test_the_end_of_a_descriptor_wakes_who_waits_for_it(pair: tuple[socket.socket, socket.socket]) -> None:
    _, far = pair

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await Arrivals(far).take(lambda: far.recv(1))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(far)


async def test_a_peer_that_is_gone_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.close()
    with pytest.raises(BrokenPipeError):
        await send_all(near, [b"x"])
