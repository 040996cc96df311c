"""The primary's volume: disk, mirror, tracking, and the link to the secondary.

The mount does not need the other side: what it may lack is tracked from the first write on, and sent when it comes. Only a
secondary that must not be written to (it has taken over, it is another's) keeps a primary from starting, while somebody looks.
"""

import errno
import logging
import os
import subprocess
from contextlib import suppress
from typing import Any

import trio

from replfs.block.mirror import Mirror
from replfs.block.replication.rules import Argument, Mode, Operation, Resyncing, Stage, Verification, Verifying
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, Unreachable, first_of, printable
from replfs.volume.base import Volume
from replfs.volume.config import Config
from replfs.volume.link import Condition, Link

logger = logging.getLogger(__name__)

_COMMAND_SECONDS = 60.0


class PrimaryVolume(Volume):
    view: Mirror

    def __init__(
        self, config: Config, disk_format: str | None, storage: Storage | None = None, *, predecessor: Volume | None = None
    ) -> None:
        super().__init__(config, disk_format, storage, predecessor=predecessor)
        self.view = Mirror(self.disk, wait=config.protocol == "sync")
        self.link = Link(self)
        self._background: trio.Nursery | None = None
        self._linked: trio.CancelScope | None = None
        self._unlinked = trio.Event()

    async def connect(self, nursery: trio.Nursery) -> None:
        self._background = nursery
        if self.config.start and self.state.stage in (Stage.NONE, Stage.RUNNING):
            await self._probe(" (with --no-start the disk is mounted without it)")

    async def _probe(self, way_out: str) -> None:
        """Raises ReplfsError if the other side is there, and must not be replicated to."""
        refusal: ReplfsError | None = None
        try:
            await self.link.probe()
        except* Unreachable as group:
            logger.warning("%s: going on alone until it is there", first_of(group))
        except* ReplfsError as group:
            refusal = first_of(group)
        if refusal is not None:  # not raised above: some versions of Python put what is raised there in a group
            raise ReplfsError(f"{refusal}{way_out}", refusal.errno)

    async def begin(self, nursery: trio.Nursery) -> None:
        self.directory.make()
        await self.begin_disk()
        await self.begin_tracking()
        self._forward()
        self.start_tasks(nursery)
        if self.config.checkpoint_every:
            nursery.start_soon(self._checkpoint_regularly)
        if not self.config.start and self.state.stage is not Stage.NONE:
            await self.save(stage=Stage.NONE, error=False)
        if self.state.stage is Stage.RUNNING:
            self._link_up()
            logger.info("resumed: forwarding to %s", self.config.target)
        elif self.state.stage is Stage.NONE and self.config.start:
            await self._begin_forwarding()
        elif self._saved is None:
            await self.save()

    def _forward(self) -> None:
        assert self.tracking is not None
        self.view.forwarder = self.link.forward_for(self.tracking)
        self.link.alone_from_now_on()

    async def succeed(self, nursery: trio.Nursery) -> None:
        """Go on with what a secondary that has taken over had: forward from now on. Raises ReplfsError."""
        self._background = nursery
        self._forward()
        problem = await self.save(mode=Mode.PRIMARY, stage=Stage.RUNNING, error=False)
        self.start_tasks(nursery)
        self._link_up()
        if problem is not None:
            logger.warning("%s", problem)

    async def check(self) -> None:
        """Raises ReplfsError if the other side is there, and must not be replicated to."""
        await self._probe("")

    def _link_up(self) -> None:
        assert self._background is not None
        self.link.alone_from_now_on()
        self._linked, self._unlinked = trio.CancelScope(), trio.Event()
        self._background.start_soon(self._run_link, self._linked, self._unlinked)

    async def _run_link(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                await self.link.run()
        finally:
            self.link.condition = Condition.OFF
            ended.set()

    async def _unlink(self) -> None:
        """What is on its way arrives, unless the other side is silent for too long; then there is no link any more."""
        if self._linked is not None:
            await self.link.drain()
            self._linked.cancel()
            self._linked = None
            await self._unlinked.wait()

    async def settle(self) -> None:
        await super().settle()
        await self._unlink()

    async def _close(self) -> None:
        """There is nothing but the disk, and the tracking."""

    async def _start(self) -> None:
        await self.check()
        await self._begin_forwarding()

    async def _begin_forwarding(self) -> None:
        problem = await self.save(stage=Stage.RUNNING, error=False)
        self._link_up()
        if problem is not None:
            raise problem

    async def _checkpoint(self) -> None:
        """Have the secondary take one, between the two commands that may have been named for it."""
        try:
            await self._run_command(self.config.checkpoint_before)
            await self.link.checkpoint()
            problem = await self.save(generation=self.state.generation + 1)
        finally:
            with trio.CancelScope(shield=True):
                await self._run_command(self.config.checkpoint_after)
        if problem is not None:
            raise problem

    async def _run_command(self, command: str) -> None:
        """Raises ReplfsError if it fails."""
        if not command:
            return
        shown = printable(command, 100)
        environment = {**os.environ, "REPLFS_MOUNTPOINT": str(self.config.mountpoint or "")}
        with trio.move_on_after(_COMMAND_SECONDS):
            done = await trio.run_process(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment,
            )
            if done.returncode == 0:
                return
            said = printable(" ".join(done.stderr.decode(errors="replace").split()))
            raise ReplfsError(f"the command {shown!r} ended with status {done.returncode}: {said}")
        raise ReplfsError(f"the command {shown!r} did not end within {_COMMAND_SECONDS:.0f} seconds")

    async def _checkpoint_regularly(self) -> None:
        """A background task."""
        while True:
            await trio.sleep(self.config.checkpoint_every)
            if self.link.condition is Condition.CONNECTED and not self.settled:
                with suppress(ReplfsError):  # which is in the log, and in the status
                    await self.control(Operation.CHECKPOINT)

    async def _carry_out(self, operation: Operation, argument: Argument | None) -> None:
        if isinstance(argument, Resyncing):
            self._resync(argument)
        elif isinstance(argument, Verification):
            self._verify(argument)
        else:
            await super()._carry_out(operation, argument)

    def _resync(self, what: Resyncing) -> None:
        if what is Resyncing.PAUSE:
            self.link.resync.pause()
        elif what is not Resyncing.DISCARD_REMOTE:
            self.link.resync.resume()
        if what is Resyncing.DISCARD_REMOTE:
            if self.link.condition is not Condition.REFUSED:
                raise ReplfsError(f"nothing is refused that this could be about: the link is {self.link.condition}", errno.EBUSY)
            self.link.discard_remote = True
        if what in (Resyncing.START, Resyncing.DISCARD_REMOTE):
            self.link.hurry()

    async def _failover(self) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """Stop forwarding; what is under way still goes out."""
        await self._unlink()
        self.link.alone_from_now_on()
        problem = await self.save(stage=Stage.DONE, error=False)
        if problem is not None:
            raise problem

    def _verify(self, what: Verification) -> None:
        if what.what is Verifying.STOP:
            self.link.stop_verifying()
        else:
            self.link.verify(what.rate, repair=what.what is Verifying.REPAIR)

    @property
    def sticky_error(self) -> bool:
        """Until the copies agree again."""
        return (
            self.state.stage is Stage.RUNNING and self.tracking is not None and bool(self.tracking.stale or self.tracking.differing)
        )

    def _side_status(self) -> dict[str, Any]:
        return {
            "target": str(self.config.target),
            "connected": self.link.condition in (Condition.SYNCING, Condition.CONNECTED),
            "link-error": self.link.error,
            "link": self.link.status() if self.tracking is not None else {},
        }
