"""A primary's link to its secondary: met, served, lost, and met again, for ever.

Owns the connections and the tasks that they need. What it promises:

* Nothing is written to the other side before both sides' generations were compared (:mod:`replfs.block.replication.lineage`), as
  far as the other side has any: a plain NBD server is known by its address only.
* While the link is there, changes go out in order (:mod:`replfs.block.replication.forwarder`), what is stale is sent again
  (:mod:`replfs.jobs.resync`), and the other side is flushed regularly.
* When it is lost the primary goes on alone: before its next change is answered, its saved state has a new generation.
"""

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import trio

from replfs.block.mirror import Mirror
from replfs.block.nbd import NbdTarget
from replfs.block.replication.forwarder import Forwarder
from replfs.block.replication.lineage import How, Ids, compare, new_id
from replfs.block.replication.rules import Mode, Stage
from replfs.block.tracking import Tracking
from replfs.errors import ReplfsError, Unreachable, first_of, printable
from replfs.jobs.resync import Resync
from replfs.jobs.verify import Verify
from replfs.protocol import peer
from replfs.volume.config import Config
from replfs.volume.events import Events, Kind
from replfs.volume.peers import PeerClient
from replfs.volume.state import State

logger = logging.getLogger(__name__)

_CONNECTIONS: Final = 2
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 15.0
_FLUSH_SECONDS: Final = 1.0
_DRAIN_SECONDS: Final = 5.0
_PLAIN: Final = "plain "


class Condition(StrEnum):
    """How a link is."""

    OFF = "off"
    CONNECTING = "connecting"
    REFUSED = "refused"
    SYNCING = "syncing"
    PAUSED = "paused"
    CONNECTED = "connected"


class _NotInSync(ReplfsError):
    """The copies do not agree."""


class Owner(Protocol):
    """The volume, as far as a link needs it."""

    config: Config
    state: State
    view: Mirror
    events: Events

    async def save(self, **changes: Any) -> object: ...


@dataclass
class _Met:
    """The other side, as it was met. ``client`` is None if it is a plain NBD server."""

    nursery: trio.Nursery
    links: list[NbdTarget]
    client: PeerClient | None
    node: str
    how: How
    new: bool
    """It never had a whole copy."""
    tracked: bool = False
    told: bool = False
    """It knows that its disk is between two states."""
    lost: trio.Event = field(default_factory=trio.Event)
    agreed: bool = False
    """The copies have agreed, and nothing was sent again since."""
    good: bool = False
    """They have agreed at least once."""


class Link:
    """``tracking`` is the volume's. Used while the volume's stage is running."""

    def __init__(self, owner: Owner) -> None:
        config = owner.config
        assert config.target is not None
        self.target: Final = config.target
        self._condition = Condition.OFF
        self.error = ""
        """Why there is no link, one line; empty while there is one."""
        self.resync = Resync(owner.view, config.resync_rate)
        self.discard_remote = config.discard_remote
        """Whether what is on the other side may be overwritten the next time, whatever it is."""
        self._owner = owner
        self._mirror = owner.view
        self._timeout = config.timeout
        self._met: _Met | None = None
        self._hurry = trio.Event()
        self._flushing = trio.Lock()
        self._alone_lock = trio.Lock()
        self._retry_at = 0.0
        self.verification: Verify | None = None
        """The last one."""
        self._verifying = trio.CancelScope()

    def forward_for(self, tracking: Tracking) -> Forwarder:
        """Make the mirror's forwarder."""
        return Forwarder(tracking, self._owner.config.window, self._answered_with)

    @property
    def _forwarder(self) -> Forwarder:
        assert self._mirror.forwarder is not None
        return self._mirror.forwarder

    @property
    def _tracking(self) -> Tracking:
        return self._forwarder.tracking

    # Meeting the other side

    async def meet(self, nursery: trio.Nursery, *, stay: bool = True) -> _Met:
        """Connect to the other side and see who it is; ``nursery`` keeps the connections' tasks.

        With ``stay``, whatever earlier connections have left under way there has ended.

        Raises Unreachable; ReplfsError if it must not, or cannot, be replicated to.
        """
        known_peer = bool(self._owner.state.peer) and not self._owner.state.peer.startswith(_PLAIN)
        client = await PeerClient.connect(self.target, self._timeout, known=known_peer)
        links: list[NbdTarget] = []
        try:
            if client is not None:
                met = await self._greet(client, nursery)
                if stay:
                    await client.ask(peer.Clear(), peer.Done)
            else:
                self._check_plain()
                known = self._owner.state.peer == self._plain_name
                met = _Met(nursery, [], None, self._plain_name, How.CONTINUE if known else How.FULL, not known)
            links = met.links
            while not links or (len(links) < _CONNECTIONS and links[0].many):
                links.append(await NbdTarget.connect(self.target, timeout=self._timeout, nursery=nursery))
                if links[-1].size != self._mirror.size:
                    raise ReplfsError(
                        f"the disk {printable(str(self._owner.config.disk))} has {self._mirror.size} bytes, and the secondary's at"
                        f" {self.target} has {links[-1].size}: make them the same size first",
                        errno.EINVAL,
                    )
        except BaseException:
            if client is not None:
                client.close()
            with trio.CancelScope(shield=True):
                for link in links:
                    await link.close()
            raise
        return met

    def _check_plain(self) -> None:
        known = self._owner.state.peer
        if known and not known.startswith(_PLAIN) and not self.discard_remote:
            raise ReplfsError(
                f"what is at {printable(str(self.target))} does not say who it is, and this side's secondary was a replfs: look at"
                " the target, or, to overwrite what is there, mount this side with --discard-remote",
                errno.EBUSY,
            )

    @property
    def _plain_name(self) -> str:
        return f"{_PLAIN}{self.target}"

    async def _greet(self, client: PeerClient, nursery: trio.Nursery) -> _Met:
        state = self._owner.state
        there = await client.ask(peer.Hello(peer.VERSION, state.node, self._mirror.size, state.ids), peer.Welcome)
        shown = printable(str(self.target))
        if there.mode != Mode.SECONDARY or there.stage not in (Stage.NONE, Stage.RUNNING):
            raise ReplfsError(
                f"the secondary at {shown} has taken over (its stage is {printable(there.stage)}), so its disk is the right one:"
                " mount this one as its secondary, or, to give up what was written there, begin anew with the other side's state"
                " directory removed, and --discard-remote here",
                errno.EBUSY,
            )
        verdict = compare(state.ids, there.ids, paired=there.node == state.peer and there.peer in ("", state.node))
        how = verdict.how
        if how is How.REFUSE:
            if not self.discard_remote:
                raise ReplfsError(
                    f"the disk at {shown} is not overwritten: {verdict.why}. To keep what is there, mount this side as a secondary"
                    " and that one as the primary; to give up what is there and send all of this side's disk, mount this side with"
                    " --discard-remote",
                    errno.EBUSY,
                )
            how = verdict.told
        logger.info("the secondary at %s: %s", shown, verdict.why)
        new = not there.ids.current or verdict.how is not How.CONTINUE
        return _Met(nursery, [], client, there.node, how, new, there.tracked)

    # The life of a link

    async def probe(self) -> None:
        """Raises as :meth:`meet` does."""
        async with trio.open_nursery() as nursery:
            await _leave(await self.meet(nursery, stay=False))

    async def run(self) -> None:
        """Keep a link, for ever, until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            self.alone_from_now_on()
            try:
                async with trio.open_nursery() as nursery:
                    self._tell(Condition.CONNECTING, self.error)
                    met = await self.meet(nursery)
                    try:
                        await self._serve(met, nursery)
                    finally:
                        if met.good:
                            pause = _FIRST_PAUSE
                        with trio.CancelScope(shield=True):
                            await _leave(met)
                        nursery.cancel_scope.cancel()
            except* ReplfsError as group:
                error = first_of(group)
                self._tell(Condition.CONNECTING if isinstance(error, Unreachable) else Condition.REFUSED, str(error))
            except* OSError as group:
                self._tell(Condition.CONNECTING, str(first_of(group)))
            except* Exception:
                logger.exception("the link to %s has failed", self.target)
                self._tell(Condition.CONNECTING, "unexpected error, see the log")
            self._retry_at = trio.current_time() + pause
            self._hurry = trio.Event()
            with trio.move_on_after(pause):
                await self._hurry.wait()
            pause = min(pause * 2, _LONGEST_PAUSE)

    @property
    def condition(self) -> Condition:
        return self._condition

    @condition.setter
    def condition(self, condition: Condition) -> None:
        changed, self._condition = condition is not self._condition, condition
        if changed:
            self._owner.events.publish(Kind.LINK, state=condition)

    def hurry(self) -> None:
        """Try again now."""
        if self.condition is Condition.REFUSED:
            self.condition = Condition.CONNECTING
        self._hurry.set()

    def _tell(self, condition: Condition, error: str) -> None:
        if error and error != self.error and condition in (Condition.CONNECTING, Condition.REFUSED):
            logger.warning("no link: %s", error)
        self.error = error
        self.condition = condition

    async def _serve(self, met: _Met, nursery: trio.Nursery) -> None:
        """Until the link is lost."""
        await self._begin(met)
        self._met = met
        self._forwarder.attach(met.links)
        self._mirror.before_change = None
        self._mirror.flush_other = self.flush if self._owner.config.protocol == "sync" else None
        self.error = ""
        self.discard_remote = False
        logger.info("the link to %s is there", self.target)
        try:
            for link in met.links:
                nursery.start_soon(self._watch, link, met)
            nursery.start_soon(self._guarded, met, self._flush_regularly)
            if met.client is not None:
                nursery.start_soon(self._guarded, met, self._ping, met.client)
            nursery.start_soon(self._guarded, met, self._synchronise, met)
            await met.lost.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._lose(met)

    async def _guarded(self, met: _Met, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await task(*arguments)
        except (OSError, ReplfsError) as error:
            self._lost(met, str(error))

    async def _watch(self, link: NbdTarget, met: _Met) -> None:
        await link.lost.wait()
        self._lost(met, link.link_error or "the connection ended")

    def _answered_with(self, error: OSError) -> None:
        if self._met is not None:
            self._lost(self._met, f"{self.target}: a change could not be written there: {error.strerror or error}")

    def _lost(self, met: _Met, why: str) -> None:
        """The first reason counts. Nothing is on its way any more when this returns."""
        if met.lost.is_set():
            return
        met.lost.set()
        self.error = why

    async def _lose(self, met: _Met) -> None:
        self._met = None
        lost = self._forwarder.detach()
        self._mirror.flush_other = None
        self.alone_from_now_on()
        if met.lost.is_set():
            self.condition = Condition.CONNECTING
            logger.warning(
                "the link is lost: %s; %d bytes are out of sync, and will be sent again", self.error, self._tracking.out_of_sync
            )
        if any(change.waiting is not None for change in lost):
            await self._go_alone()
        for change in lost:
            change.end()

    def alone_from_now_on(self) -> None:
        """There is no link: before the next change is answered, the generation has to be another, if it is not already."""
        state = self._owner.state
        alone = state.ids.current and not state.ids.bitmap and not state.peer.startswith(_PLAIN)
        self._mirror.before_change = self._go_alone if alone else None

    async def _go_alone(self) -> None:
        """Where that cannot be saved, the machine goes on all the same, and it is tried again with the link."""
        async with self._alone_lock:
            if self._mirror.before_change is not None:
                try:
                    await self._owner.save(ids=self._owner.state.ids.alone())
                except ReplfsError as error:
                    logger.error("that this side goes on alone is not saved: %s", error)
                self._mirror.before_change = None

    async def _begin(self, met: _Met) -> None:
        """Agree on what is to be sent, and have both sides remember it."""
        state, tracking = self._owner.state, self._tracking
        if met.how is How.FULL:
            if self._owner.config.initial_sync != "none":
                tracking.mark_all()
            await tracking.save()
            if not state.ids.current or met.node != state.peer:
                ids = Ids(state.ids.current or new_id(), state.ids.bitmap, state.ids.history)
                await self._owner.save(peer=met.node, ids=ids)
        elif met.tracked and met.client is not None:
            await self._ask_for_blocks(met.client)
            await tracking.save()
        if met.client is not None:
            syncing = bool(tracking.stale)
            await met.client.ask(peer.Attach(syncing, met.new), peer.Done)
            met.told = syncing
            if tracking.stale:  # by what was written meanwhile
                await self._tell_it(met)

    async def _tell_it(self, met: _Met) -> None:
        """The other side's disk is about to be between two states."""
        if met.client is not None and not met.told:
            await met.client.ask(peer.Attach(True, False), peer.Done)
            met.told = True

    async def _ask_for_blocks(self, client: PeerClient) -> None:
        start = 0
        while start >= 0:
            found = await client.ask(peer.Blocks(start), peer.Found)
            for first, count in found.runs:
                if not 0 <= first < first + count <= self._tracking.blocks:
                    raise ReplfsError(f"{self.target}: it speaks of blocks that its disk does not have")
                self._tracking.stale.add_range(first, first + count)
            if found.more != -1 and not start < found.more < self._tracking.blocks:
                raise ReplfsError(f"{self.target}: it speaks of blocks that its disk does not have")
            start = found.more

    async def _synchronise(self, met: _Met) -> None:
        """Have the copies agree, now and whenever something has become stale since, as long as the link is there."""
        shown_first = met.new and met.client is not None and self._owner.config.initial_sync != "none"
        compare_first = met.new and self._owner.config.initial_sync == "verify"
        while not met.lost.is_set():
            before, began = self.resync.sent, trio.current_time()
            stale = self._tracking.bytes_of(self._tracking.stale)
            if stale:
                self.condition = Condition.SYNCING
                logger.info("resync: %d bytes are to be sent again", stale)
                if met.agreed:
                    met.agreed = False
                    self.alone_from_now_on()  # what is written now is not there when that is answered
                await self._tell_it(met)
            await self.resync.run(met.links[0], compare=compare_first)
            await self.flush()
            if met.lost.is_set() or self._tracking.stale:
                continue
            if not await self._agree(met, shown_first):
                continue
            shown_first = False
            if stale:
                self._owner.events.publish(Kind.JOB, type="mirror", bytes=stale, error="")
            self.condition = Condition.CONNECTED
            if stale or not met.good:
                took = trio.current_time() - began
                logger.info("the copies agree again: %d bytes were sent in %.1f seconds", self.resync.sent - before, took)
            met.good, compare_first = True, False
            await self._until_stale()

    async def _until_stale(self) -> None:
        event = trio.Event()
        self._tracking.on_stale = event.set
        if not self._tracking.stale:
            await event.wait()

    async def _agree(self, met: _Met, first: bool) -> bool:
        """Have both sides know that they are the same; ``first``: what the other side shows, too, which was never a copy.

        False if they are not any more. This side knows it first: if it goes on alone before the other has heard of it, that has to
        be a new generation.
        """
        ids = self._owner.state.ids.agreed()
        if ids != self._owner.state.ids:
            await self._owner.save(ids=ids)
        if met.client is not None:
            if first:
                try:
                    async with self._quiet(met):
                        await met.client.ask(peer.Agreed(ids, True), peer.Done)
                except _NotInSync:
                    return False
            else:
                await met.client.ask(peer.Agreed(ids, False), peer.Done)
            met.told = False
        met.agreed = True
        with suppress(OSError):  # it is tried again soon: a crash now would have all of it sent again
            await self._tracking.save()
        return True

    # While it is there

    async def flush(self) -> None:
        """What the other side has acknowledged so far is on its stable storage, unless the link is lost meanwhile."""
        met = self._met
        if met is None:
            return
        async with self._flushing:
            if not met.lost.is_set() and self._tracking.begin_flush():
                try:
                    await met.links[0].flush()
                except OSError as error:
                    return self._lost(
                        met, f"{self.target}: what was sent could not be put on stable storage: {error.strerror or error}"
                    )
                if not met.lost.is_set():
                    self._tracking.flushed()
        return None

    async def _flush_regularly(self) -> None:
        while True:
            await trio.sleep(_FLUSH_SECONDS)
            await self.flush()

    async def _ping(self, client: PeerClient) -> None:
        while True:
            await trio.sleep(max(self._timeout / 3, 0.1))
            await client.ask(peer.Ping(), peer.Done)

    @asynccontextmanager
    async def _quiet(self, met: _Met) -> AsyncIterator[None]:
        """Writers wait, and the other side has all that they wrote, on stable storage. Raises _NotInSync, ReplfsError."""
        if met.client is not None:  # so that writers do not have to wait for one that is not there,
            await met.client.ask(peer.Ping(), peer.Done)
        await self.flush()  # and that there is little left to do while they wait
        async with self._mirror.gate.shut():
            await self._forwarder.drained()
            await self.flush()
            if met.lost.is_set() or self._tracking.stale or self._tracking.differing:
                raise self._not_in_sync()
            yield

    def _not_in_sync(self) -> "_NotInSync":
        why = f": {self.error}" if self.error else ""
        return _NotInSync(
            f"the copies do not agree (the link is {self.condition}, {self._tracking.out_of_sync} bytes are out of sync), so this"
            f" would not be a good checkpoint{why}",
            errno.EBUSY,
        )

    async def checkpoint(self) -> None:
        """Have the secondary take a checkpoint of what is on this side's disk now. Raises ReplfsError."""
        met = self._met
        if met is None or not met.agreed:
            raise self._not_in_sync()
        async with self._quiet(met):
            if met.client is not None:
                await met.client.ask(peer.Checkpoint(), peer.Done)

    async def drain(self) -> None:
        """Before an end: what is on its way arrives, and is flushed, as far as that can be in a few seconds."""
        if self._met is not None:
            self.resync.pause()
            with trio.move_on_after(_DRAIN_SECONDS):
                await self._forwarder.drained()
                await self.flush()
            self.resync.resume()

    def verify(self, rate: int, *, repair: bool) -> None:
        """Begin a verification. Raises ReplfsError (EBUSY) if there is no link, or one is under way."""
        met = self._met
        if met is None or not met.agreed:
            raise ReplfsError(f"the copies do not agree yet (the link is {self.condition}): verify them when they do", errno.EBUSY)
        if self.verification is not None and self.verification.running:
            raise ReplfsError("a verification is under way: wait for it, or replfs verify --stop", errno.EBUSY)
        self.verification = Verify(self._mirror, rate, repair=repair)
        self.verification.running = True
        self._verifying = trio.CancelScope()
        met.nursery.start_soon(self._run_verification, met, self.verification, self._verifying)

    async def _run_verification(self, met: _Met, verification: Verify, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._guarded(met, verification.run, met.links[0])
        finally:
            verification.running = False

    def stop_verifying(self) -> None:
        """If one is under way."""
        self._verifying.cancel()

    def status(self) -> dict[str, Any]:
        """For the status."""
        tracking, forwarder = self._tracking, self._forwarder
        condition = Condition.PAUSED if self.condition is Condition.SYNCING and self.resync.paused else self.condition
        found: dict[str, Any] = {
            "state": condition,
            "protocol": self._owner.config.protocol,
            "out-of-sync": tracking.out_of_sync,
            "window": {"size": forwarder.window, "used": forwarder.held},
            "sent": {"data": forwarder.sent, "zeroes": forwarder.zeroed},
            "resync": self.resync.progress(),
            "verify": self.verification.status() if self.verification is not None else None,
        }
        if condition in (Condition.CONNECTING, Condition.REFUSED):
            found["retry-in"] = round(max(self._retry_at - trio.current_time(), 0), 1)
        return found


async def _leave(met: _Met) -> None:
    if met.client is not None:
        met.client.close()
    for link in met.links:
        await link.close()
