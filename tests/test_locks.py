"""Range locks and the gate."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from replfs.block.locks import Gate, RangeLocks


async def test_ranges_that_overlap_take_turns_in_the_order_of_their_coming() -> None:
    locks, order = RangeLocks(), []

    async def take(name: str, start: int, stop: int) -> None:
        async with locks.hold(start, stop):
            order.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:  # noqa: SIM117 - its tasks outlive the lock
        async with locks.hold(10, 20):
            for name, start, stop in (("a", 15, 30), ("b", 29, 40), ("c", 0, 11), ("free", 40, 50), ("beside", 20, 25)):
                nursery.start_soon(take, name, start, stop)
                await wait_all_tasks_blocked()
            assert order == ["free"]
    assert order.index("a") < order.index("b")
    assert set(order) == {"a", "b", "c", "free", "beside"}
    assert order.index("a") < order.index("beside")


async def test_an_uncontended_range_does_not_suspend() -> None:
    locks = RangeLocks()
    with trio.CancelScope() as scope:
        scope.cancel()  # any await that suspends would end here
        async with locks.hold(0, 10), locks.hold(10, 20):
            pass
    assert not scope.cancelled_caught


async def test_a_cancelled_waiter_leaves_the_others_in_order() -> None:
    locks, order = RangeLocks(), []

    async def take(name: str, start: int, stop: int, scope: trio.CancelScope) -> None:
        with scope:
            async with locks.hold(start, stop):
                order.append(name)

    async with trio.open_nursery() as nursery:
        cancelled = trio.CancelScope()
        async with locks.hold(0, 10):
            nursery.start_soon(take, "cancelled", 5, 15, cancelled)
            await wait_all_tasks_blocked()
            nursery.start_soon(take, "last", 12, 20, trio.CancelScope())
            await wait_all_tasks_blocked()
            cancelled.cancel()
            await wait_all_tasks_blocked()
            assert order == ["last"]


async def test_a_shut_gate_lets_those_inside_leave_and_keeps_others_out() -> None:
    gate, log = Gate(), []

    async def request(name: str, leave: trio.Event) -> None:
        async with gate:
            log.append(f"{name} in")
            await leave.wait()
            log.append(f"{name} out")

    async def shut(opened: trio.Event) -> None:
        async with gate.shut():
            log.append("shut")
            await opened.wait()
        log.append("open")

    leave, opened = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(request, "first", leave)
        await wait_all_tasks_blocked()
        nursery.start_soon(shut, opened)
        await wait_all_tasks_blocked()
        nursery.start_soon(request, "second", leave)
        await wait_all_tasks_blocked()
        assert log == ["first in"]
        leave.set()
        await wait_all_tasks_blocked()
        assert log == ["first in", "first out", "shut"]
        opened.set()
    assert log[3:] == ["open", "second in", "second out"]


async def test_a_gate_opens_again_when_shutting_it_is_cancelled_or_fails() -> None:
    gate = Gate()
    async with gate:
        with trio.move_on_after(0):
            async with gate.shut():
                raise AssertionError("somebody is inside")
    with pytest.raises(ValueError, match="fault"):
        async with gate.shut():
            raise ValueError("fault")
    with trio.fail_after(10):
        async with gate:
            pass
