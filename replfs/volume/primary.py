"""The primary's volume: disk, mirror, filter and the link to the secondary.

Its state says ``error`` from the moment replication runs until it is closed well: a primary that was killed cannot know which of
its last writes the secondary has.
"""

import errno
import logging
from typing import Any

import trio

from replfs.block.mirror import Mirror
from replfs.block.nbd import NbdTarget
from replfs.block.replication.primary import PrimaryFilter
from replfs.block.replication.rules import Stage
from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.volume.base import Volume
from replfs.volume.config import Config

logger = logging.getLogger(__name__)


class PrimaryVolume(Volume):
    def __init__(self, config: Config, disk_format: str | None, storage: Storage | None = None) -> None:
        super().__init__(config, disk_format, storage)
        assert config.target is not None
        self.filter = PrimaryFilter(self.disk.size)
        self.view: Mirror = Mirror(self.disk, self.filter)
        self._link: NbdTarget | None = None
        self._background: trio.Nursery | None = None

    async def connect(self, nursery: trio.Nursery) -> None:
        self._background = nursery
        if self.config.start and self.state.stage in (Stage.NONE, Stage.RUNNING):
            try:
                await self._connect()
            except ReplfsError as error:
                raise ReplfsError(f"{error} (with --no-start the disk is mounted without it)", error.errno) from error

    async def _connect(self) -> None:
        """Have a link to the secondary, a new one if there is none that works. Raises ReplfsError."""
        assert self.config.target is not None
        assert self._background is not None
        if self._link is not None and self._link.connected:
            return
        link = await NbdTarget.connect(self.config.target, nursery=self._background)
        if link.size != self.disk.size:
            await link.close()
            raise ReplfsError(
                f"the disk {self.disk.file.path} has {self.disk.size} bytes, and the secondary's at {self.config.target} has"
                f" {link.size}: make them the same size and content first",
                errno.EINVAL,
            )
        self._link = self.filter.target = link

    async def begin(self, nursery: trio.Nursery) -> None:
        self.directory.make()
        await self.begin_disk()
        nursery.start_soon(self.commit_regularly)
        nursery.start_soon(self.remember_failed_syncs)
        if not self.config.start and self.state.stage is not Stage.NONE:
            await self._save(stage=Stage.NONE, error=False)
        if self.state.stage is Stage.RUNNING:
            if self.state.error or self.state.suspect:
                logger.warning("this primary was not closed well, or had lost its link: the secondary's copy may differ")
                self.filter.sticky_error = True
            if (problem := await self._save(error=True)) is not None:
                raise problem
            self.filter.stage = Stage.RUNNING
            logger.info("resumed: forwarding to %s", self.config.target)
        elif self.state.stage is Stage.NONE and self.config.start:
            await self._start()
        elif self._saved is None:
            await self._save()

    async def settle(self) -> None:
        if self._link is not None and self._link.connected and self.filter.forwarding:
            await self.filter.flush()
        await super().settle()

    async def _close(self) -> None:
        await self.disk.flush()  # before the state says that this side was closed well
        if self.state.stage is Stage.RUNNING:
            await self._save(error=self.filter.sticky_error)
        if self._link is not None:
            await self._link.close()

    async def _start(self) -> None:
        await self._connect()
        problem = await self._save(stage=Stage.RUNNING, error=True)
        self.filter.sticky_error = False
        self.filter.stage = Stage.RUNNING
        if problem is not None:
            raise problem

    async def _checkpoint(self) -> None:
        """Nothing, in every stage: :mod:`replfs.block.replication.rules` never has it carried out."""

    async def _failover(self) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """Stop forwarding; what is under way still goes out."""
        problem = await self._save(stage=Stage.DONE, error=False)
        self.filter.stage = Stage.DONE
        self.filter.sticky_error = False
        if problem is not None:
            raise problem

    @property
    def sticky_error(self) -> bool:
        return self.filter.sticky_error

    def _side_status(self) -> dict[str, Any]:
        link = self._link
        return {
            "target": str(self.config.target),
            "connected": link is not None and link.connected,
            "link-error": link.link_error if link is not None else "",
        }
