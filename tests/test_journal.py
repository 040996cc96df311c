"""The journal of an image: which records count after a crash, whose they are, and what happens when it is full."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import assert_same_as, assert_sound, put, qemu_img, raw, same

from replfs.block.cache import Cache
from replfs.block.qcow2 import journal as journal_module
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journal import Change, Full, Journal, Record
from replfs.block.qcow2.journaling import use_journal
from replfs.block.qcow2.overlay import CLUSTER, SUBCLUSTER, create_overlay, is_blank_overlay, open_overlay
from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.volume.disk import open_disk

SIZE = 64 * CLUSTER


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


def fill(made: Journal, numbers: range, *, hashes: int = 2) -> list[Record]:
    for number in numbers:
        made.append(Change.DATA, number, number + 1, 7, hashes=list(range(hashes)))
    return [Record(Change.DATA, number, number + 1, 7, tuple(range(hashes))) for number in numbers]


def records_of(path: str) -> list[Record]:
    journal = Journal.open(Storage(), path)
    try:
        return journal.records()
    finally:
        journal.file.close()


def test_records_come_back_in_order_until_they_are_retired(path: str) -> None:
    made = Journal.create(Storage(), path, 7)
    written = fill(made, range(10))
    assert records_of(path) == written
    made.retire(4)
    assert records_of(path) == written[4:]
    made.retire(10)
    assert records_of(path) == []
    made.file.close()


def test_a_half_is_used_again_when_all_of_it_is_retired(path: str) -> None:
    made = Journal.create(Storage(), path, 7)
    last = 2 * (journal_module.HALF // (48 + 8 * 1000))
    fill(made, range(last), hashes=1000)
    with pytest.raises(Full):
        fill(made, range(1), hashes=1000)
    assert len(records_of(path)) == last
    made.retire(last // 2 + 1)  # one half, and the first of the other
    again = fill(made, range(last, last + last // 2), hashes=1000)
    with pytest.raises(Full):
        fill(made, range(1000), hashes=1000)
    numbers = [record.first for record in records_of(path)]
    assert numbers[: last - last // 2 - 1 + len(again)] == [*range(last // 2 + 1, last), *(record.first for record in again)]
    made.file.close()


@pytest.mark.parametrize("byte", [0, 8, 12, 20, 47, 48, 63])
def test_a_record_that_is_not_whole_ends_what_counts(path: str, byte: int) -> None:
    made = Journal.create(Storage(), path, 7)
    written = fill(made, range(5))
    at = 4096 + 3 * 64 + byte
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 0x10]))
    assert records_of(path) == written[:3]
    made.file.close()


def test_what_is_left_of_lost_records_never_counts_as_a_new_one_s_successor(path: str) -> None:
    made = Journal.create(Storage(), path, 7)
    fill(made, range(5))
    made.file.write(4096, bytes(64))  # the first one's sector never reached the disk
    made.file.close()
    again = Journal.open(Storage(), path)
    assert again.records() == []
    again.retire(again.number)
    new = fill(again, range(100, 101))
    assert records_of(path) == new
    again.file.close()


def test_records_carry_data_and_what_is_staged_until_that_is_applied(path: str) -> None:
    made = Journal.create(Storage(), path, 7)
    made.append(Change.SAVED, 0, 4, 7, content=b"olds")
    made.append(Change.STAGED, 4, 8, 7, content=b"more", offset=5, data=b"new")
    made.append(Change.STAGED, 8, 12, 7, content=b"last", offset=9, data=b"newer")
    saved = Record(Change.SAVED, 0, 4, 7, (), b"olds")
    staged = [Record(Change.STAGED, 4, 8, 7, (), b"more", 5, b"new"), Record(Change.STAGED, 8, 12, 7, (), b"last", 9, b"newer")]
    assert records_of(path) == [saved, *staged]
    made.retire(3)
    assert records_of(path) == staged, "what is staged stays"
    made.apply(2)
    assert records_of(path) == [staged[0]._replace(data=b""), staged[1]]
    made.retire(3)
    assert records_of(path) == staged[1:]
    made.apply(3)
    made.retire(3)
    assert records_of(path) == []
    made.file.close()


def test_a_journal_for_data_has_room_that_was_written_and_is_blank_until_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").touch()
    os.truncate(tmp_path / "disk.raw", 1 << 30)
    made = (Storage(), str(tmp_path / "over.qcow2"), 1 << 30, "./disk.raw", "raw")
    path = tmp_path / "over.journal"
    create_overlay(*made, journal=str(path), append_only=True)
    assert path.stat().st_size == 4096 + (16 << 20) <= path.stat().st_blocks * 512
    assert is_blank_overlay(*made, journal=str(path), append_only=True)
    assert not is_blank_overlay(*made, journal=str(path)), "it is not as large as it would be then"
    journal = Journal.open(Storage(), str(path))
    assert (journal.records(), journal.used) == ([], False)
    journal.append(Change.SAVED, 0, 4, 7, content=b"olds")
    journal.file.close()
    assert not is_blank_overlay(*made, journal=str(path), append_only=True)


def test_a_journal_that_is_damaged_is_refused(path: str) -> None:
    Journal.create(Storage(), path, 7).file.close()
    for content in (b"", b"x" * 4096, Path(path).read_bytes()[:20], bytes(512)):
        Path(path).write_bytes(content)
        with pytest.raises(ReplfsError, match="journal"):
            Journal.open(Storage(), path)


# Images


def made_overlay(folder: Path) -> str:
    disk = folder / "disk.raw"
    disk.write_bytes(b"o" * SIZE)
    create_overlay(Storage(), str(folder / "over.qcow2"), SIZE, "./disk.raw", "raw", journal=str(folder / "over.journal"))
    return str(folder / "over.qcow2")


async def opened(folder: Path, *, keep: bool = True, append_only: bool = False) -> Image:
    disk = raw(folder / "disk.raw", (folder / "disk.raw").read_bytes())
    image = open_overlay(Storage(), str(folder / "over.qcow2"), disk, Cache())
    await use_journal(Storage(), image, str(folder / "over.journal"), keep=keep, required=True, append_only=append_only)
    return image


def dies(image: Image) -> None:
    """Its files are closed, as those of a killed process are."""
    backing = image.backing
    image.release()
    if backing is not None:
        backing.release()


async def test_what_was_not_committed_is_there_after_a_kill(tmp_path: Path) -> None:
    made_overlay(tmp_path)
    model = bytearray(b"o" * SIZE)
    choose = random.Random(1)
    image = await opened(tmp_path)
    for step in range(400):
        offset = choose.randrange(SIZE - 1)
        length = min(choose.choice((1, 512, 2048, 3000, 70_000)), SIZE - offset)
        if step % 2:  # whole subclusters
            offset, length = offset - offset % 2048, choose.choice((2048, 4096))
        if step % 7 == 3:
            await image.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = choose.randbytes(length)
            await put(image, offset, data)
            model[offset : offset + length] = data
        if step % 50 == 20:
            await image.flush()
        if step % 25 == 0:
            dies(image)
            image = await opened(tmp_path)
            assert same(bytes(await image.read(0, SIZE)), model)
    await image.end_journal()
    dies(image)
    assert_same_as(tmp_path / "over.qcow2", bytes(model), tmp_path / "scratch")
    assert_sound_but_for_leaks(tmp_path / "over.qcow2")


async def test_what_is_written_over_in_one_is_there_after_a_kill_also_where_only_its_begin_was_committed(tmp_path: Path) -> None:
    """Clusters that lie one behind the other are written at once; of the later one the journal knows what it was before."""
    made_overlay(tmp_path)
    image = await opened(tmp_path)
    await image.write(0, b"1" * CLUSTER)
    await image.changes.commit()
    await image.write(CLUSTER, b"2" * CLUSTER)
    assert len(image.ranges(0, 2 * CLUSTER)) == 1, "they lie one behind the other"
    await put(image, 0, b"3" * 2 * CLUSTER)
    dies(image)
    image = await opened(tmp_path)
    assert same(bytes(await image.read(0, 3 * CLUSTER)), b"3" * 2 * CLUSTER + b"o" * CLUSTER)
    dies(image)


async def test_what_is_replayed_is_retired_when_the_tables_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has outlived one power cut must outlive the next one, too."""
    made_overlay(tmp_path)
    image = await opened(tmp_path)
    await image.write(0, b"w" * 4096)
    dies(image)
    done: list[str] = []
    fdatasync, retire, write = os.fdatasync, Journal.retire, os.pwrite

    def synced(fd: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fdatasync(fd)

    def written(fd: int, data: bytes, offset: int) -> int:
        done.append(f"write {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        return write(fd, data, offset)

    def retired(self: Journal, number: int) -> None:
        done.append("retire")
        retire(self, number)

    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(Journal, "retire", retired)
    image = await opened(tmp_path)
    entries = max(i for i, what in enumerate(done) if what == "write over.qcow2")
    assert "sync over.qcow2" in done[:entries], "the data, before what leads to it"
    assert done.index("retire") > done.index("sync over.qcow2", entries)
    assert done[-1] == "sync over.journal"
    dies(image)


async def test_a_full_journal_is_committed_and_the_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "HALF", 4096)
    made_overlay(tmp_path)
    image = await opened(tmp_path)
    model = bytearray(b"o" * SIZE)
    for i in range(600):
        at = i * 7919 % (SIZE // 512) * 512
        await image.write(at, bytes([i % 251]) * 512)
        model[at : at + 512] = bytes([i % 251]) * 512
    assert os.stat(tmp_path / "over.journal").st_size <= 4096 * 3
    dies(image)
    image = await opened(tmp_path)
    assert same(bytes(await image.read(0, SIZE)), model)
    dies(image)


async def test_a_hidden_disk_that_is_hardened_is_what_qemu_reads(tmp_path: Path) -> None:
    made_overlay(tmp_path)
    image = await opened(tmp_path, append_only=True)
    await image.populate(0, b"o" * SUBCLUSTER)
    await image.populate(5 * CLUSTER, bytes(CLUSTER))
    await image.harden()
    (tmp_path / "disk.raw").write_bytes(b"n" * SIZE)
    expected = b"o" * SUBCLUSTER + b"n" * (5 * CLUSTER - SUBCLUSTER) + bytes(CLUSTER) + b"n" * (SIZE - 6 * CLUSTER)
    (tmp_path / "expected").write_bytes(expected)
    assert "identical" in qemu_img("compare", "-U", tmp_path / "over.qcow2", tmp_path / "expected")
    dies(image)


async def test_without_durability_the_journal_is_taken_over_and_ended(tmp_path: Path) -> None:
    path = made_overlay(tmp_path)
    image = await opened(tmp_path)
    await image.write(1000, b"w" * 5000)
    dies(image)
    image = await opened(tmp_path, keep=False)
    assert bytes(await image.read(1000, 5000)) == b"w" * 5000
    assert not has_journal(path)
    dies(image)
    assert_sound(tmp_path / "over.qcow2")
    os.unlink(tmp_path / "over.journal")
    image = await opened(tmp_path)  # a new one
    await image.write(0, b"x")
    dies(image)
    assert (tmp_path / "over.journal").exists()


def has_journal(path: str) -> bool:
    """Whether the image says so."""
    with open(path, "rb") as file:
        return bool(file.read(96)[88] & 0x80)


async def test_an_overlay_without_its_journal_is_refused(tmp_path: Path) -> None:
    made_overlay(tmp_path)
    os.unlink(tmp_path / "over.journal")
    with pytest.raises(ReplfsError, match=r"over\.journal is missing"):
        await opened(tmp_path)


async def disk_with(folder: Path, before: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> bytes:
    """A qcow2 disk whose writer was killed, before something else happens to it; what is there afterwards."""
    disk = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    for again in (False, True):
        image = open_disk(disk, "qcow2")
        assert isinstance(image, Image)
        await use_journal(Storage(), image, str(folder / "disk.journal"), keep=True)
        if again:
            found = bytes(await image.read(0, 4096))
            image.release()
            return found
        await image.write(0, b"w" * 4096)
        image.release()
        before(disk)
    raise AssertionError


async def test_a_journal_does_not_outlive_what_others_have_written_to_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def qemu_writes(disk: Path) -> None:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 113 512k 64k", disk], check=True, capture_output=True)

    assert await disk_with(tmp_path, qemu_writes, caplog) == bytes(4096)
    assert "was written to by another program" in caplog.text
    assert_sound_but_for_leaks(tmp_path / "disk.qcow2")


def assert_sound_but_for_leaks(image: Path) -> None:
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stdout


async def test_a_disk_whose_journal_is_gone_is_taken_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await disk_with(tmp_path, lambda disk: os.unlink(tmp_path / "disk.journal"), caplog) == bytes(4096)
    assert "not its journal" in caplog.text


async def test_a_disk_takes_nothing_from_a_journal_that_is_older_than_its_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Used with two state directories by turns, and killed both times: what the first has is overtaken."""
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    for journal, byte in ("one", b"1"), ("two", b"2"), ("one", None):
        image = open_disk(disk, "qcow2")
        assert isinstance(image, Image)
        await use_journal(Storage(), image, str(tmp_path / journal), keep=True)
        if byte:
            await image.write(0, byte * 4096)
            if byte == b"2":
                await image.flush()
        else:
            assert bytes(await image.read(0, 4096)) == b"2" * 4096
            assert "not its journal" in caplog.text
        image.release()
    assert_sound_but_for_leaks(disk)


async def test_qemu_reads_meanwhile_what_was_committed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def qemu_reads(disk: Path) -> None:
        assert_sound_but_for_leaks(disk)
        qemu_img("info", disk)

    assert await disk_with(tmp_path, qemu_reads, caplog) == b"w" * 4096


async def test_an_overlay_is_blank_only_as_it_was_made(tmp_path: Path) -> None:
    path = made_overlay(tmp_path)
    made = (Storage(), path, SIZE, "./disk.raw", "raw")
    journal = str(tmp_path / "over.journal")
    assert is_blank_overlay(*made, journal=journal)
    assert not is_blank_overlay(Storage(), path, SIZE, "./other.raw", "raw", journal=journal)
    assert not is_blank_overlay(*made)
    image = await opened(tmp_path)
    await image.write(0, b"x")
    dies(image)
    assert not is_blank_overlay(*made, journal=journal)
    assert not is_blank_overlay(Storage(), str(tmp_path / "none"), SIZE, "./disk.raw", "raw")


async def test_room_that_was_given_up_is_used_before_a_write_fails(tmp_path: Path) -> None:
    """A cluster is given back by a commit, so a write that finds no room has one made first."""
    made_overlay(tmp_path)
    image = await opened(tmp_path)
    await image.write(0, b"a" * (SIZE // 2))
    image._refcounts._limit = image._refcounts.end  # as on a device that ends here
    with pytest.raises(OSError, match="full"):
        await image.write(SIZE // 2, b"b" * CLUSTER)
    await image.write_zeroes(0, 2 * CLUSTER)
    await image.write(SIZE // 2, b"b" * CLUSTER)
    assert bytes(await image.read(0, CLUSTER)) == bytes(CLUSTER)
    assert bytes(await image.read(SIZE // 2, CLUSTER)) == b"b" * CLUSTER
    dies(image)
