"""The secondary's volume: disk, overlays, filter and NBD export, and what each control operation does to them.

A generation is a pair of empty overlays that has been filled since; the pair of the next one is made ready in the background. A
checkpoint, a stop and the end of a failover are one replacement of the state file each, made while the gate is shut, with the nodes
changed right after it. What the state file does not name is a leftover, whenever the process may have died.
"""

import dataclasses
import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from replfs.block.copy_before_write import CopyBeforeWrite
from replfs.block.locks import Gate
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journaling import use_journal
from replfs.block.qcow2.overlay import create_overlay, is_blank_overlay, open_overlay
from replfs.block.raw import Raw
from replfs.block.replication.lineage import Ids
from replfs.block.replication.rules import Argument, Listening, Mode, Operation, Stage, Verdict, verdict
from replfs.block.replication.secondary import Layers, SecondaryFilter
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable
from replfs.export.nbd import NbdServer
from replfs.jobs.commit import commit
from replfs.protocol.nbd.uri import Address
from replfs.volume.base import Volume
from replfs.volume.config import Config
from replfs.volume.disk import describe
from replfs.volume.events import Kind
from replfs.volume.peers import PeerSession
from replfs.volume.primary import PrimaryVolume
from replfs.volume.state import NotDurable

logger = logging.getLogger(__name__)

_FENCED = frozenset({Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE})


class SecondaryVolume(Volume):
    view: SecondaryFilter

    def __init__(self, config: Config, disk_format: str | None, storage: Storage | None = None) -> None:
        super().__init__(config, disk_format, storage)
        self.gate = Gate()
        self.view = SecondaryFilter(self.disk, self.gate, durable=self.durable)
        self.exported = CopyBeforeWrite(self.disk, self.gate, durable=self.durable)
        self.server = NbdServer(self.exported, config.export, peer=lambda: PeerSession(self))
        self._primary: PeerSession | None = None
        self.address = config.listen
        """Where the server listens, if it does: what was asked for, with the port that the kernel picked if that was to be 0."""
        self._spare: Layers | None = None
        self._unsettled: list[Layers] = []  # pairs that a power cut may bring back
        self._saves = 0  # how often a state was to be durable at once
        self._background: trio.Nursery | None = None
        self._serving, self._served = trio.CancelScope(), trio.Event()

    @property
    def primary(self) -> PeerSession | None:
        """The primary that is connected, as far as it has said so."""
        return self._primary

    @primary.setter
    def primary(self, session: PeerSession | None) -> None:
        if (session is None) != (self._primary is None):
            self.events.publish(Kind.LINK, state="connecting" if session is None else "connected")
        self._primary = session

    async def connect(self, nursery: trio.Nursery) -> None:
        if self.config.listen is not None:
            self.address = await self.server.listen(self.config.listen)

    async def begin(self, nursery: trio.Nursery) -> None:
        stage = self.state.stage
        if not self.config.start and stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            raise ReplfsError(
                "an unfinished failover cannot be left: mount without --no-start, and it goes on (its overlays hold the only copy"
                " of what this side's machine wrote)",
                errno.EBUSY,
            )
        self._background = nursery
        self.directory.make()
        await self.begin_disk()
        await self.begin_tracking()
        if not self.config.start and stage is not Stage.NONE:
            if stage is Stage.RUNNING:
                await self._finish_staged()
                logger.warning("--no-start: the overlays are dropped; the disk keeps what it holds")
            await self.save(stage=Stage.NONE, error=False)
        in_use = self.state.stage not in (Stage.NONE, Stage.DONE)
        generation = self.state.generation
        # In use, or the next checkpoint's, or the next start's: these are taken again, if they are as they were made.
        kept = (generation, generation + 1) if in_use else (generation,) if stage is Stage.NONE else ()
        try:
            await trio.to_thread.run_sync(self.directory.sync)  # the state that is known must not give way to an older one
            await trio.to_thread.run_sync(self.directory.remove_leftovers, *kept)
        except OSError as error:
            raise ReplfsError(f"cannot clean {self.config.state_dir} up: {error.strerror}", error.errno or errno.EIO) from error
        if in_use:
            self._use(await self._open_pair(self.state.generation))
            if self.state.stage in _FENCED:
                self.view.tracking = self.tracking
            if self.state.stage is Stage.FAILOVER:
                nursery.start_soon(self._commit)
            elif self.state.stage is Stage.RUNNING:
                nursery.start_soon(self._prepare)
            logger.info("resumed: the stage is %s, the generation %d", self.state.stage, self.state.generation)
        elif self.state.stage is Stage.NONE and self.config.start:
            await self._start()
        elif self._saved is None:
            await self.save()
        self.view.stage = self.state.stage
        if self.state.stage is Stage.DONE:
            self.view.tracking = self.tracking
        await self._fence()
        self.start_tasks(nursery)
        if self.address is not None:
            self._begin_serving()

    async def _finish_staged(self) -> None:
        """Have the disk hold all that was acknowledged, before the overlays go: what a killed process has left in a journal."""
        try:
            layers = await self._open_pair(self.state.generation)
            await layers.active.close()
            await layers.hidden.close()
        except (OSError, ReplfsError) as error:
            logger.warning("what was forwarded last, before replfs was killed, may be missing on the disk: %s", error)

    def _tasks(self) -> list[Callable[[], Awaitable[None]]]:
        staging = self.exported.staging
        return super()._tasks() + ([staging.run] if staging is not None else [])

    def _begin_serving(self) -> None:
        self._serving, self._served = trio.CancelScope(), trio.Event()
        self._in_background(self._serve, self._serving, self._served)

    async def _serve(self, scope: trio.CancelScope, served: trio.Event) -> None:
        try:
            with scope:
                await self.server.serve()
        finally:
            self.address = None
            served.set()

    async def _carry_out(self, operation: Operation, argument: Argument | None) -> None:
        if isinstance(argument, Listening):
            await self._listen(argument.address)
        else:
            await super()._carry_out(operation, argument)

    async def _listen(self, address: Address | None) -> None:
        """Raises ReplfsError: it listens somewhere else, or cannot."""
        if address is None:
            await self._stop_serving()
        elif self.address is None:
            self.address = await self.server.listen(address)
            self._begin_serving()
        elif address != self.address:
            raise ReplfsError(f"it listens on {printable(str(self.address))} already: set listen to none first", errno.EBUSY)

    async def _stop_serving(self) -> None:
        """The address is free then, and no request is under way."""
        if self.address is not None:
            self._serving.cancel()
            await self._served.wait()

    async def _close(self) -> None:
        if self._spare is not None:  # which the next mount takes again
            spare, self._spare = self._spare, None
            await spare.active.close()
            await spare.hidden.close()
        for layers in self._unsettled:
            await layers.active.close()
            await layers.hidden.close()
        if self.view.layers is not None:
            layers = self.view.layers
            try:
                await layers.active.flush()
                await layers.hidden.flush()  # with what is staged on the disk
            finally:
                self.view.layers, self.exported.hidden = None, None
                await layers.active.close()
                await layers.hidden.close()

    async def abandon(self) -> None:
        await self.server.close()
        for layers in (self.view.layers, self._spare):
            if layers is not None:
                await layers.active.close()
                await layers.hidden.close()
        await super().abandon()

    # Pairs of overlays

    async def _make_pair(self, generation: int) -> Layers:
        """Make a generation's overlays, empty and on stable storage, and open them. Raises OSError, ReplfsError."""
        await trio.to_thread.run_sync(self._create_pair, generation)
        return await self._open_pair(generation)

    def _create_pair(self, generation: int) -> None:
        """What an earlier process has made for it and not used is as good as new, and may have the last room there is."""
        disk = self.state.disk
        below = self.directory.overlay("hidden", generation).name
        for layer, backing_file, backing_format in (("hidden", disk.path, disk.format), ("active", f"./{below}", "qcow2")):
            path, journal = self.directory.overlay(layer, generation), self.directory.journal(layer, generation)
            made = (self.storage, str(path), self.view.size, backing_file, backing_format)
            kept = str(journal) if self.durable else None
            if not is_blank_overlay(*made, journal=kept, append_only=layer == "hidden"):
                self.directory.remove(path, journal)
                if self.durable and layer == "hidden":
                    self.directory.take_spare(journal)
                create_overlay(*made, journal=kept, append_only=layer == "hidden")
        self.directory.sync()

    async def _open_pair(self, generation: int) -> Layers:
        """Raises ReplfsError, OSError."""
        hidden = await self._open_overlay("hidden", generation, self.disk)
        try:
            return Layers(await self._open_overlay("active", generation, hidden), hidden)
        except BaseException:
            hidden.release()
            raise

    async def _open_overlay(self, layer: str, generation: int, backing: Raw | Image) -> Image:
        image = open_overlay(self.storage, str(self.directory.overlay(layer, generation)), backing, self.cache)
        try:
            journal = str(self.directory.journal(layer, generation))
            await use_journal(self.storage, image, journal, keep=self.durable, required=True, append_only=layer == "hidden")
        except BaseException:
            image.release()
            raise
        return image

    async def _prepare(self) -> None:
        """Have the next generation's pair ready, so that a checkpoint need not wait for it."""
        async with self.control_lock:
            if self.state.stage is Stage.RUNNING and self._spare is None:
                try:
                    self._spare = await self._make_pair(self.state.generation + 1)
                except (OSError, ReplfsError) as error:
                    logger.warning("the next checkpoint's overlays could not be made yet: %s", error)

    def _use(self, layers: Layers | None) -> None:
        self.view.layers = layers
        self.exported.hidden = layers.hidden if layers else None

    async def _drop(self, layers: Layers | None) -> None:
        """Close and delete a pair that nothing uses any more."""
        if layers is not None:
            try:
                with trio.CancelScope(shield=True):
                    await self._remove(layers)
            except OSError as error:
                logger.warning("an old overlay could not be deleted, the next mount will try again: %s", error)

    def _give_up(self, layers: Layers | None, *, settled: bool) -> None:
        """Drop a pair that the state does not name any more; not ``settled``, a power cut may bring it back: when that is over."""
        if settled:
            self._in_background(self._drop, layers)
        elif layers is not None:
            self._unsettled.append(layers)

    def _saved_durably(self, durable: bool) -> None:
        self._saves += 1
        self.view.unsettled = self.exported.unsettled = None if durable else self._settle
        while durable and self._unsettled:
            self._in_background(self._drop, self._unsettled.pop())

    async def _settle(self) -> None:
        """Have the state be durable after all. Raises OSError."""
        saves, ended = self._saves, list(self._unsettled)
        await trio.to_thread.run_sync(self.directory.settle)
        for layers in ended:
            if layers in self._unsettled:
                self._unsettled.remove(layers)
                self._in_background(self._drop, layers)
        if saves == self._saves:
            self.view.unsettled = self.exported.unsettled = None

    async def _settle_soon(self) -> None:
        """What a checkpoint and a failover wait for with --durability power only, but which is to be so all the same."""
        if not self.durable:
            try:
                with trio.CancelScope(shield=True):
                    await self._settle()
            except OSError as error:
                logger.warning("the state is saved, but may not outlive a power cut: %s", error)

    async def _remove(self, layers: Layers) -> None:
        """Close two overlays, and delete their files, which may take long. Raises OSError."""
        for image in (layers.active, layers.hidden):
            await image.close()
        await trio.to_thread.run_sync(self._remove_files, layers)

    def _remove_files(self, layers: Layers) -> None:
        active, hidden = Path(layers.active.file.path), Path(layers.hidden.file.path)
        self.directory.remove(active, active.with_suffix(".journal"), hidden)
        journal = hidden.with_suffix(".journal")
        if self.durable and self.state.stage is Stage.RUNNING and journal.exists():
            self.directory.set_aside(journal)
        else:
            self.directory.remove(journal)
            self.directory.remove_spare()

    # Control

    def _refuse_between_states(self) -> None:
        if self.state.inconsistent:
            raise ReplfsError(
                "the primary is sending what this side's disk lacks, which is between two states until that is done: wait for it"
                " (replfs status, on the primary), or fail over to the last checkpoint",
                errno.EBUSY,
            )

    async def attached(self, node: str, *, syncing: bool, ids: Ids) -> None:
        """The primary ``node`` writes to the disk from now on. Raises ReplfsError."""
        if (node, syncing, ids) != (self.state.peer, self.state.inconsistent, self.state.ids):
            _raise(await self.save(peer=node, inconsistent=syncing, ids=ids))

    async def agreed(self, ids: Ids, *, checkpoint: bool = False) -> None:
        """The disk has all that the primary's has; with ``checkpoint`` the view is that, too. Raises OSError, ReplfsError."""
        if checkpoint and self.state.stage is Stage.RUNNING:
            await self._take_checkpoint(inconsistent=False, ids=ids)
            logger.info("the first copy is whole, and this side shows it: the generation is %d", self.state.generation)
        elif ids != self.state.ids or self.state.inconsistent:
            _raise(await self.save(inconsistent=False, ids=ids))
        assert self.tracking is not None
        if self.tracking.stale:  # from when this side was a primary
            self.tracking.forget()
            await self.tracking.save()

    async def checkpoint_for_primary(self) -> None:
        """Raises OSError, ReplfsError."""
        if verdict(self.config.mode, Operation.CHECKPOINT, self.state.stage) is Verdict.DO:
            await self._checkpoint()
            logger.info("checkpoint, asked for by the primary: the generation is %d", self.state.generation)

    async def _start(self) -> None:
        self._refuse_between_states()
        layers = await self._make_pair(self.state.generation)
        try:
            async with self.gate.shut():
                flushed = await self.flush_disk()  # the view is to be what the disk holds now
                problem = await self.save(stage=Stage.RUNNING, error=False, **flushed)
                self._use(layers)
                self.view.stage = Stage.RUNNING
        except (OSError, ReplfsError):
            await self._drop(layers)
            raise
        await self.drop_cache()
        self._in_background(self._prepare)
        _raise(problem)

    async def _checkpoint(self) -> None:
        self._refuse_between_states()
        await self._take_checkpoint()

    async def _take_checkpoint(self, **changes: Any) -> None:
        """In one step with other ``changes`` of the state."""
        await self.drop_cache()  # pages that a mapping has changed belong to what is dropped now
        if self.durable:
            await self.exported.flush()  # most of it, while requests still pass
        if self._spare is None:
            self._spare = await self._make_pair(self.state.generation + 1)
        old = self.view.layers
        async with self.gate.shut():
            await self.exported.drain()
            flushed = await self.flush_disk(durably=self.durable)
            problem = await self.save(durably=self.durable, generation=self.state.generation + 1, **flushed, **changes)
            self._use(self._spare)
            self._spare = None
        await self.drop_cache()  # what readers have cached of the old view
        self._give_up(old, settled=problem is None and self.durable)
        self._in_background(self._settle_soon)
        self._in_background(self._prepare)
        _raise(problem)

    async def _stop(self) -> None:
        self._refuse_between_states()
        await self.drop_cache()
        await self.disk.flush()
        problem = await self._finish()
        await self.drop_cache()
        _raise(problem)

    async def _failover(self) -> None:
        if self.state.peer and not self.state.ids.current:
            raise ReplfsError(
                "this side never had a whole copy of its primary's disk: the first sync has not ended, so there is nothing to fail"
                " over to",
                errno.EBUSY,
            )
        ids = self.state.ids.alone() if self.state.stage is Stage.RUNNING else self.state.ids
        async with self.gate.shut():
            problem = await self.save(durably=self.durable, stage=Stage.FAILOVER, error=False, ids=ids)
            self.view.tracking = self.tracking  # what the old primary will lack
            self.view.committed = 0
            self.view.stage = Stage.FAILOVER
            self.exported.fenced = True
            if self.exported.staging is not None:
                self.exported.staging.forget()  # the commit puts there what was there before
        await self._fence()
        self._in_background(self._settle_soon)
        self._in_background(self._commit)
        _raise(problem)

    async def _commit(self) -> None:
        try:
            assert self.tracking is not None
            await commit(self.view, self._track)
            await self.tracking.save()
            async with self.control_lock:
                _raise(await self._finish())
            logger.info("failover: done, the disk holds the whole view")
            self._commit_ended("")
        except (OSError, ReplfsError) as error:
            async with self.control_lock:
                if self.state.stage is Stage.FAILOVER:
                    logger.error("failover: the commit failed and can be asked for again: %s", error)
                    await self._commit_failed()
                else:
                    logger.warning("failover: done, but %s", error)
            self._commit_ended(str(error.strerror if isinstance(error, OSError) else error))

    def _commit_ended(self, error: str) -> None:
        self.events.publish(Kind.JOB, type="commit", bytes=self.view.size, error=error)

    def _track(self, start: int, length: int) -> None:
        """The old primary's disk is what this side's was, but for what the overlays hold: this."""
        assert self.tracking is not None
        first, last = self.tracking.span(start, length)
        self.tracking.stale.add_range(first, last + 1)

    async def _promoted(self) -> bool:
        """Become the primary of a new secondary, while this side's machine runs on."""
        if self.successor_target is None or self.state.stage is Stage.NONE:
            return False
        if self.state.stage is not Stage.DONE:
            raise ReplfsError(
                f"the stage is {self.state.stage}, and only what has taken over can become a primary: fail over first, and let the"
                " commit end",
                errno.EBUSY,
            )
        assert self._background is not None
        target, discard = self.successor_target
        config = dataclasses.replace(self.config, mode=Mode.PRIMARY, target=target, discard_remote=discard, listen=None, start=True)
        successor = PrimaryVolume(config, None, predecessor=self)
        await successor.check()
        if self._unsettled:
            await self._settle()
        await self._stop_serving()
        self._own_tasks.cancel()
        async with self.gate.shut():
            await successor.succeed(self._background)
            self.on_succession(successor)
        logger.info("promoted: this side is a primary now, and replicates to %s", target)
        return True

    async def _commit_failed(self) -> None:
        """The stage is told even if it cannot be saved: the saved one, failover, has the next mount try again."""
        async with self.gate.shut():
            try:
                await self.save(stage=Stage.FAILOVER_FAILED, error=True)
            except ReplfsError as error:
                logger.warning("%s", error)
                self.replace_state(msgspec.structs.replace(self.state, stage=Stage.FAILOVER_FAILED, error=True))
            self.view.stage = Stage.FAILOVER_FAILED

    async def _finish(self) -> NotDurable | None:
        """Stage done: the view is what the disk holds, and the old primary is kept out. Raises OSError, ReplfsError: it is not."""
        old = self.view.layers
        async with self.gate.shut():
            if self.view.commit_error is not None:
                raise self.view.commit_error
            await self.exported.drain()
            await self.disk.flush()
            ids = self.state.ids.alone() if self.state.stage is Stage.RUNNING else self.state.ids
            problem = await self.save(stage=Stage.DONE, error=False, ids=ids)
            self.view.tracking = self.tracking
            self._use(None)
            self.view.stage = Stage.DONE
            self.exported.fenced = True
        await self._fence()
        self._give_up(old, settled=problem is None)
        spare, self._spare = self._spare, None
        self._in_background(self._drop, spare)
        return problem

    async def _fence(self) -> None:
        """From failover on, and after a stop: nobody writes to the disk behind this side's machine.

        Each write is refused, but the export is not announced as read-only: a QEMU 7.2 that connects again, and finds that it has
        become so, aborts at its next write, and its machine with it.
        """
        if self.state.stage in _FENCED:
            self.exported.fenced = True
            await self.server.close_connections()

    def images(self) -> list[Image]:
        layers = self.view.layers
        return [*super().images(), *((layers.active, layers.hidden) if layers is not None else ())]

    def _in_background(self, task: Any, *arguments: Any) -> None:
        assert self._background is not None
        self._background.start_soon(task, *arguments)

    def _side_status(self) -> dict[str, Any]:
        layers = self.view.layers
        status: dict[str, Any] = {
            "listen": str(self.address) if self.address is not None else None,
            "export": self.config.export,
            "connections": self.server.connections,
            "primary-connected": self.primary is not None,
            "inconsistent": self.state.inconsistent,
            "overlays": {
                name: describe(image) for name, image in ((("active", layers.active), ("hidden", layers.hidden)) if layers else ())
            },
        }
        if self.state.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            status["commit"] = {"done": self.view.committed, "total": self.view.size}
        return status


def _raise(problem: ReplfsError | None) -> None:
    if problem is not None:
        raise problem
