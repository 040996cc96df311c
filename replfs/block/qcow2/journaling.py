"""Which image works with a journal: what that depends on, and what happens when it changes."""

import errno
import logging
import os
import secrets

from replfs.block.qcow2.header import AUTOCLEAR_JOURNAL
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journal import Journal, half_for
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

logger = logging.getLogger(__name__)


async def use_journal(
    storage: Storage, image: Image, path: str, *, keep: bool, required: bool = False, append_only: bool = False
) -> None:
    """Finish what an earlier process has left in the image's journal; with ``keep``, work with one from now on.

    An image that may need a journal says so itself, and which (:attr:`Image.journal_name`). If that is not the one that is there,
    that is an error if it is ``required``, else the image is taken as it is. Raises ReplfsError, OSError.
    """
    shown, whose = printable(path), printable(image.file.path)
    journal = Journal.open(storage, path) if image.journal_name and os.path.exists(path) else None
    if journal is not None and journal.name != image.journal_name:
        journal.file.close()
        journal = None
    if journal is None and image.journal_name and required:
        raise ReplfsError(f"{shown} is missing: it is the journal of {whose}, which may lack changes without it", errno.ENOENT)
    if journal is None and keep and image.version >= 3:  # version 2 has no place to say that there is one
        if image.journal_name:
            logger.warning("%s was not closed well, and %s is not its journal: it is taken as it is", whose, shown)
        elif _has_records(storage, path):
            logger.warning("%s was written to by another program since replfs was killed: it is taken as it is", whose)
        name = AUTOCLEAR_JOURNAL if required else AUTOCLEAR_JOURNAL | secrets.randbits(31) << 32
        journal = Journal.create(storage, path, name, half_for(image.size, append_only=append_only))
        storage.sync_directory(os.path.dirname(path))
    if keep or journal is not None:
        await image.defer(journal, append_only=append_only)
    if not keep and journal is not None:
        await image.end_journal()


def _has_records(storage: Storage, path: str) -> bool:
    """Whether there is a journal whose changes were not all put into the tables."""
    try:
        journal = Journal.open(storage, path) if os.path.exists(path) else None
    except (OSError, ReplfsError):
        return False
    try:
        return journal is not None and bool(journal.records())
    finally:
        if journal is not None:
            journal.file.close()
