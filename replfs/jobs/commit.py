"""The commit of a failover: what the overlays hold goes into the secondary disk, while the view is in use."""

import trio

from replfs.block.replication.secondary import SecondaryFilter

_WINDOW = 2 << 20
_PIECE = 2 << 20  # the largest cluster of a qcow2 disk, so that whole ones can give their room back


async def commit(view: SecondaryFilter) -> None:
    """Make the secondary disk equal to the view, and durable, from its start on; ``view.committed`` tells how far it is (bytes).

    The filter is in stage failover and stays there: what comes next is the volume's to do, and first of all to see whether
    ``view.commit_error`` is set by then. Raises OSError; the view is right then, and the commit may be tried again. Can be
    cancelled at any time.
    """
    layers = view.layers
    assert layers is not None
    view.committed = 0
    view.commit_error = None
    while view.committed < view.size:
        await trio.lowlevel.checkpoint()
        in_active, until_active = layers.active.may_hold(view.committed)
        in_hidden, until_hidden = layers.hidden.may_hold(view.committed)
        until = min(until_active, until_hidden)
        if in_active or in_hidden:
            until = min(until, view.committed + _WINDOW)
            async with view.locks.hold(view.committed, until):
                await _copy(view, view.committed, until)
                view.committed = until
        else:
            view.committed = until
    await view.disk.flush()


async def _copy(view: SecondaryFilter, start: int, stop: int) -> None:
    """Copy what the overlays hold of a range; the caller holds its lock, so nothing changes it meanwhile."""
    assert view.layers is not None
    for first, last, held in view.split(view.layers, start, stop):
        while held and first < last:
            extent = (await view.layers.active.extents(first, min(last - first, _PIECE - first % _PIECE), 1))[0]
            if extent.zero:
                await view.disk.write_zeroes(first, extent.length)
            else:
                await view.disk.write(first, await view.layers.active.read(first, extent.length))
            first += extent.length
