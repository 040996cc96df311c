"""The commit of a failover: what the overlays hold goes into the secondary disk, while the view is in use."""

from collections.abc import Callable

import trio

from replfs.block.node import Piece
from replfs.block.qcow2.entries import Kind
from replfs.block.replication.secondary import SecondaryFilter

_WINDOW = 4 << 20  # a few of the largest clusters of a qcow2 disk, so that whole ones can give their room back
_HEAD_START = 0.01  # seconds: whoever takes over has requests that have waited, and they come first


async def commit(view: SecondaryFilter, moved: Callable[[int, int], None]) -> None:
    """Make the secondary disk equal to the view, and durable, from its start on; ``view.committed`` tells how far it is (bytes).

    The filter is in stage failover and stays there: what comes next is the volume's to do, and first of all to see whether
    ``view.commit_error`` is set by then. ``moved`` is called with each range that the overlays held (offset, length).

    Raises OSError; the view is right then, and the commit may be tried again. Can be cancelled at any time.
    """
    view.committed = 0
    view.commit_error = None
    await trio.sleep(_HEAD_START)
    layers = view.layers
    assert layers is not None
    while view.committed < view.size:
        await trio.lowlevel.checkpoint()
        in_active, until_active = layers.active.may_hold(view.committed)
        in_hidden, until_hidden = layers.hidden.may_hold(view.committed)
        until = min(until_active, until_hidden)
        if in_active or in_hidden:
            until = min(until, view.committed + _WINDOW - view.committed % _WINDOW)
            async with view.locks.hold(view.committed, until):
                await _copy(view, view.committed, until, moved)
                view.committed = until
        else:
            view.committed = until
    await view.disk.flush()


async def _copy(view: SecondaryFilter, start: int, stop: int, moved: Callable[[int, int], None]) -> None:
    """Copy what the overlays hold of a range; the caller holds its lock, so nothing changes it meanwhile."""
    assert view.layers is not None
    pieces: list[Piece] = []
    zeroes: list[tuple[int, int]] = []
    for image, part in view.layers.held(start, stop):
        moved(part.start, part.stop - part.start)
        if part.kind is Kind.DATA:
            pieces.append(Piece(image.data, part.host, part.start, part.stop - part.start))
        elif part.kind is Kind.ZERO:
            first = zeroes.pop()[0] if zeroes and zeroes[-1][1] == part.start else part.start
            zeroes.append((first, part.stop))
        else:
            await view.disk.write(part.start, await image.read(part.start, part.stop - part.start))
    for first, last in zeroes:
        await view.disk.write_zeroes(first, last - first)
    if pieces:
        await view.disk.copy(pieces)
