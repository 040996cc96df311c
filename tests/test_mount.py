"""The mounted file, used as programs use a disk image, and both sides through it."""

import errno
import json
import mmap
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from disks import assert_sound, qemu_img, same
from harness import LINK_LOST, SECONDS, Sides, replfs, run, wait_for

MIB = 1 << 20
SIZE = 8 * MIB

MAPPER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
for line in sys.stdin:
    what, offset, length, byte = line.split()
    offset, length = int(offset), int(length)
    if what == "write":
        mapping[offset:offset + length] = bytes([int(byte)]) * length
    elif what == "sync":
        mapping.flush()
    print(mapping[offset:offset + length].hex(), flush=True)
"""


DIRTIER = """
import mmap, random, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
mapping[0] = 1
print("ready", flush=True)
while True:
    mapping[random.randrange(len(mapping))] = random.randrange(256)
"""

CHECKPOINTS = """
import os, sys
for i in range(1000000):
    if i == 3:
        print("ready", flush=True)
    os.setxattr(sys.argv[1], "user.replfs.checkpoint", b"1")
"""


class Mapper:
    """Another process that has the file mapped."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", MAPPER, str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, offset: int, length: int, byte: int = 0) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {offset} {length} {byte}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate(timeout=SECONDS)


@contextmanager
def mapped(file: Path) -> Iterator[Mapper]:
    mapper = Mapper(file)
    try:
        yield mapper
        mapper.end()
    finally:
        mapper.process.kill()
        mapper.process.communicate()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def aligned(content: bytes) -> mmap.mmap:
    """Memory that O_DIRECT takes."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memory


def read_direct(path: Path, offset: int, length: int) -> bytes:
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        memory = aligned(bytes(length))
        assert os.preadv(fd, [memory], offset) == length
        return memory[:]


def error_of(call: Any, *arguments: Any) -> int | None:
    """The errno that a call fails with; a failing assertion if it does not."""
    with pytest.raises(OSError) as failed:
        call(*arguments)
    return failed.value.errno


def test_the_view_moves_at_a_checkpoint_for_every_reader(sides: Sides) -> None:
    """An old descriptor, a new one, a direct one and a mapping, each of which had the old content."""
    far = sides.secondary(SIZE)
    near = sides.primary(SIZE)
    with opened(far.file, os.O_RDONLY) as old, mapped(far.file) as mapping:
        assert os.pread(old, 8, MIB) == mapping.ask("read", MIB, 8) == bytes(8)
        with near.file.open("r+b") as file:
            file.seek(MIB)
            file.write(b"forward!")
        assert far.disk.read_bytes()[MIB : MIB + 8] == b"forward!"
        for _ in range(2):
            assert os.pread(old, 8, MIB) == mapping.ask("read", MIB, 8) == far.content()[MIB : MIB + 8] == bytes(8)
        assert read_direct(far.file, MIB, 4096) == bytes(4096)
        far.set("checkpoint")
        assert os.pread(old, 8, MIB) == b"forward!"
        assert mapping.ask("read", MIB, 8) == b"forward!"
        assert far.content()[MIB : MIB + 8] == b"forward!"
        assert read_direct(far.file, MIB, 4096)[:8] == b"forward!"
    assert far.get("generation") == "1"


def test_what_a_mapping_changed_before_a_checkpoint_is_dropped_with_it(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    with mapped(far.file) as mapping:
        assert mapping.ask("write", 0, 4096, 7) == b"\7" * 4096  # not synced: the page is dirty
        far.set("checkpoint")
        assert mapping.ask("read", 0, 4096) == bytes(4096)
        assert mapping.ask("write", 0, 4096, 9) == b"\t" * 4096
        mapping.ask("sync", 0, 1)
        assert read_direct(far.file, 0, 4096) == b"\t" * 4096
    assert far.disk.read_bytes()[:4096] == bytes(4096)


def test_random_reads_and_writes_of_any_size_are_a_file(sides: Sides) -> None:
    rng = random.Random(5)
    model = bytearray(rng.randbytes(MIB + 777))
    far = sides.secondary(bytes(model))
    with (
        opened(far.file, os.O_RDWR) as buffered,
        opened(far.file, os.O_RDWR | os.O_DIRECT) as direct,
        opened(far.file, os.O_RDWR | os.O_SYNC) as synced,
    ):
        for _ in range(300):
            kind = rng.choice(["buffered", "direct", "synced", "read"])
            if kind == "direct":
                offset, length = rng.randrange(256) * 4096, rng.randrange(1, 17) * 4096
                length = min(length, MIB - offset)
                data = rng.randbytes(length)
                assert os.pwritev(direct, [aligned(data)], offset) == length
            else:
                offset = rng.randrange(len(model))
                length = min(rng.choice([1, 511, 512, 3000, 70000]), len(model) - offset)
                if kind == "read":
                    assert os.pread(buffered, length, offset) == model[offset : offset + length]
                    continue
                data = rng.randbytes(length)
                assert os.pwrite(synced if kind == "synced" else buffered, data, offset) == length
            model[offset : offset + length] = data
    assert same(far.content(), bytes(model))
    assert far.disk.read_bytes() != bytes(model)
    padded = sides.folder / "model"
    padded.write_bytes(bytes(model).ljust(len(model) + -len(model) % 512, b"\0"))
    active = far.status()["overlays"]["active"]["path"]
    assert "identical" in qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", active, padded)
    assert "No errors were found" in qemu_img("check", "-U", active)
    assert active in qemu_img("map", "-U", active)
    chain = json.loads(qemu_img("info", "-U", "--backing-chain", "--output=json", active))
    assert [Path(link["filename"]).name for link in chain] == ["active.0.qcow2", "hidden.0.qcow2", "secondary.raw"]
    far.umount()
    assert_sound(Path(active))
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", active, padded)


@pytest.mark.parametrize("block", ["1", "513", "4096", "100000", "1M"])
def test_dd_with_any_block_size(sides: Sides, block: str) -> None:
    length = 3001 if block == "1" else 700001
    far = sides.secondary(MIB)
    (sides.folder / "in").write_bytes(os.urandom(length))
    run("dd", f"if={sides.folder}/in", f"of={far.file}", f"bs={block}", "conv=notrunc,fsync", "status=none")
    run("dd", f"if={far.file}", f"of={sides.folder}/out", f"bs={block}", f"count={length}", "iflag=count_bytes", "status=none")
    run("cmp", sides.folder / "in", sides.folder / "out")


def test_cp_keeps_a_sparse_copy_sparse_and_right(sides: Sides) -> None:
    far = sides.secondary(64 * MIB)
    with far.file.open("r+b") as file:
        file.seek(20 * MIB)
        file.write(b"island" * 1000)
    run("cp", "--sparse=always", far.file, sides.folder / "copy")
    run("cmp", far.file, sides.folder / "copy")
    assert (sides.folder / "copy").stat().st_blocks * 512 < MIB


def test_what_the_mount_looks_like(sides: Sides) -> None:
    far = sides.secondary(MIB + 100, "--name", "vm.img", "--uid", "1234", "--gid", "2345", "--mode", "0640")
    assert os.listdir(far.point) == ["vm.img"]
    info = (far.point / "vm.img").stat()
    assert (info.st_size, info.st_uid, info.st_gid, oct(info.st_mode)) == (MIB + 100, 1234, 2345, "0o100640")
    assert os.statvfs(far.point).f_blocks * os.statvfs(far.point).f_frsize >= MIB
    assert os.statvfs(far.point).f_bavail == 0
    assert "vm.img" in run("ls", "-la", far.point).stdout
    mounts = Path("/proc/self/mounts").read_text()
    assert f"{far.disk} {far.point} fuse.replfs" in mounts
    os.utime(far.point / "vm.img", (1, 2))
    os.chmod(far.point / "vm.img", 0o600)
    info = (far.point / "vm.img").stat()
    assert (info.st_mtime, oct(info.st_mode)) == (2, "0o100600")


def test_the_size_is_fixed(sides: Sides) -> None:
    far = sides.secondary(bytes(range(256)) * 16)
    with opened(far.file, os.O_RDWR) as fd:
        assert os.pwrite(fd, b"x" * 100, 4090) == 6
        assert error_of(os.pwrite, fd, b"x", 4096) == errno.ENOSPC
        assert os.pread(fd, 100, 4096) == b""
        assert error_of(os.ftruncate, fd, 10) == errno.EPERM
    assert error_of(os.open, far.file, os.O_RDWR | os.O_TRUNC) == errno.EPERM
    assert error_of(os.truncate, far.file, 1 << 20) == errno.EPERM
    assert error_of(os.unlink, far.file) == errno.EPERM
    assert error_of(os.mkdir, far.point / "d") == errno.EPERM
    assert error_of(os.open, far.point / "new", os.O_CREAT | os.O_WRONLY) == errno.EPERM
    assert error_of(os.stat, far.point / "other") == errno.ENOENT
    assert same(far.content(), (bytes(range(256)) * 16)[:4090] + b"x" * 6)


def test_controls_on_the_file_and_on_the_root(sides: Sides) -> None:
    far = sides.secondary(MIB)
    names = {f"user.replfs.{name}" for name in ("mode", "stage", "error", "last-error", "generation", "status")}
    for path in (far.file, far.point):
        assert set(os.listxattr(path)) == names
        assert os.getxattr(path, "user.replfs.mode") == b"secondary"
        for name in ("user.replfs.start", "user.replfs.nothing", "user.other", "security.capability"):
            assert error_of(os.getxattr, path, name) == errno.ENODATA
        for name in ("user.replfs.mode", "user.replfs.nothing", "user.other"):
            assert error_of(os.setxattr, path, name, b"1") == errno.EOPNOTSUPP
            assert os.getxattr(path, "user.replfs.last-error").decode() == f"there is no control {name}"
        assert error_of(os.removexattr, path, "user.replfs.mode") == errno.EOPNOTSUPP
        for value in (b"", b"tertiary", b"\xff\xfe", b"primary\n", b"p" * 60000):
            assert error_of(os.setxattr, path, "user.replfs.start", value) == errno.EINVAL
        assert error_of(os.setxattr, path, "user.replfs.start", b"secondary") == errno.EBUSY
        assert os.getxattr(path, "user.replfs.last-error") == b"Block replication is running or done"
        os.setxattr(path, "user.replfs.checkpoint", b"")
        assert os.getxattr(path, "user.replfs.last-error") == b""
    assert far.get("generation") == "2"
    far.expected = ["start failed", "there is no control"]


def test_only_the_owner_and_root_control(sides: Sides) -> None:
    far = sides.secondary(MIB, "-o", "allow_other", "--mode", "0666")
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for folder in (sides.folder, *sides.folder.parents[:3]):
        os.chmod(folder, 0o755)
    run(*as_nobody, "dd", f"of={far.file}", "if=/dev/zero", "bs=4096", "count=1", "conv=notrunc", "status=none")
    refused = run(*as_nobody, "setfattr", "-n", "user.replfs.checkpoint", "-v", "1", far.file, check=False)
    assert "Permission denied" in refused.stderr
    assert far.get("generation") == "0"


def test_an_ordinary_user_mounts_his_own_disk() -> None:
    """With the imports made before root is given up, since the interpreter need not be readable for everybody."""
    folder = Path(run("mktemp", "-d", "/tmp/replfs-user.XXXXXX").stdout.strip())
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)  # as udev leaves it; a container's may be root's only
    try:
        (folder / "mnt").mkdir()
        (folder / "d.raw").write_bytes(bytes(MIB))
        for path in (folder, folder / "mnt", folder / "d.raw"):
            os.chown(path, 65534, 65534)
        program = (
            "import os, sys, replfs.daemon, replfs.cli.main\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "sys.argv = ['replfs'] + sys.argv[1:]\n"
            "replfs.cli.main.main()\n"
        )

        def as_user(*arguments: str) -> subprocess.CompletedProcess[str]:
            return run(sys.executable, "-c", program, *arguments, cwd="/")

        words = ("secondary", f"{folder}/d.raw", f"{folder}/mnt", "--listen", f"unix:{folder}/s")
        without = run(sys.executable, "-c", program, *words, cwd="/", env={**os.environ, "PATH": "/nonexistent"}, check=False)
        assert (without.returncode, without.stderr.count("\n")) == (1, 1)
        assert "there is no fusermount3" in without.stderr
        assert sorted(os.listdir(folder)) == ["d.raw", "mnt"]
        as_user(*words)
        as_user("checkpoint", f"{folder}/mnt")
        assert "generation: 1" in as_user("status", f"{folder}/mnt").stdout
        as_user("umount", f"{folder}/mnt")
        assert os.listdir(folder / "mnt") == []
    finally:
        os.chmod("/dev/fuse", mode)
        run("umount", "-l", folder / "mnt", check=False)
        shutil.rmtree(folder)


def test_a_read_only_mount_is_controlled_all_the_same(sides: Sides) -> None:
    far = sides.secondary(MIB, "-o", "ro")
    assert error_of(os.open, far.file, os.O_RDWR) == errno.EROFS
    far.set("checkpoint")
    assert same(far.content(), bytes(MIB))


def test_names_beyond_ascii(sides: Sides) -> None:
    disk = sides.folder / "Müller, größer.raw"
    disk.write_bytes(bytes(MIB))
    far = sides.secondary(disk, "--name", "Überblick.img")
    assert os.listdir(far.point) == ["Überblick.img"]
    assert far.status()["disk"]["path"] == str(disk)
    assert "Überblick.img" in replfs("status", far.point).stdout


def test_a_pair_through_checkpoints_and_a_failover_under_load(sides: Sides) -> None:
    far, near = sides.secondary(SIZE), sides.primary(SIZE)
    near.expected = LINK_LOST
    rng = random.Random(1)
    with near.file.open("r+b", buffering=0) as file:
        for round_number in range(3):
            for _ in range(100):
                file.seek(rng.randrange(SIZE - 10000))
                file.write(rng.randbytes(rng.randrange(1, 10000)))
            before = near.content()
            far.set("checkpoint")
            assert same(far.content(), before)
            assert far.get("generation") == str(round_number + 1)
    model = bytearray(before)
    far_rng = random.Random(2)
    ended, failures = threading.Event(), []

    def machine() -> None:
        """The secondary's machine: it writes and reads back all the time, in the upper half."""
        with far.file.open("r+b", buffering=0) as file:
            while not ended.is_set():
                offset, data = SIZE // 2 + far_rng.randrange(SIZE // 2 - 5000), far_rng.randbytes(far_rng.randrange(1, 5000))
                file.seek(offset)
                file.write(data)
                model[offset : offset + len(data)] = data
                file.seek(offset)
                if file.read(len(data)) != data:
                    failures.append(offset)

    thread = threading.Thread(target=machine)
    thread.start()
    try:
        with near.file.open("r+b") as file:
            file.write(b"not any more" * 1000)
        far.set("failover")
        assert far.get("stage") in ("failover", "done")
        far.until_stage("done")
    finally:
        ended.set()
        thread.join(SECONDS)
    assert not thread.is_alive()
    assert not failures
    assert same(far.content(), bytes(model))
    far.umount()
    assert same(far.disk.read_bytes(), bytes(model))


def test_failover_tells_its_progress(sides: Sides) -> None:
    far = sides.secondary(256 * MIB)
    run("dd", "if=/dev/urandom", f"of={far.file}", "bs=1M", "count=200", "conv=notrunc", "status=none")
    far.set("failover")
    seen = []
    while (status := far.status())["stage"] == "failover":
        seen.append(status["commit"]["done"])
        assert status["commit"]["total"] == 256 * MIB
    assert seen == sorted(seen)
    run("cmp", far.file, far.disk)


def test_a_killed_secondary_shows_the_same_view_again(sides: Sides) -> None:
    far = sides.secondary(os.urandom(SIZE))
    near = sides.primary(far.disk.read_bytes())
    near.expected = LINK_LOST
    run("dd", "if=/dev/urandom", f"of={near.file}", "bs=1000", "count=900", "conv=notrunc", "status=none")
    run("dd", "if=/dev/urandom", f"of={far.file}", "bs=1000", "seek=2000", "count=900", "conv=notrunc", "status=none")
    view = far.content()
    far.kill()
    for overlay in ("active.0", "hidden.0"):
        assert_no_error(far.state_dir / f"{overlay}.qcow2")
    far.mount()
    assert same(far.content(), view)
    near.until_connected()
    far.set("checkpoint")
    assert same(far.content(), far.disk.read_bytes())


def assert_no_error(image: Path) -> None:
    """Clusters may be leaked, which is exit status 3, but nothing is wrong."""
    checked = run("qemu-img", "check", image, check=False)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr


def test_overlays_that_have_taken_all_the_room_can_still_be_dropped_or_committed(sides: Sides) -> None:
    room = sides.folder / "room"
    room.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", room)
    try:
        far = sides.secondary(SIZE, "--state-dir", room / "state")
        wait_for(lambda: len([*room.glob("state/*.journal")]) == 4, "the next checkpoint's overlays")
        for operation in ("checkpoint", "failover"):
            filled = run(
                "dd", "if=/dev/urandom", f"of={far.file}", "bs=64k", "count=64", "conv=notrunc", "status=none", check=False
            )
            assert "No space left on device" in filled.stderr
            run("dd", "if=/dev/zero", f"of={room}/other", "bs=1k", check=False)
            view = far.content()
            far.set(operation)
            (room / "other").unlink()
            if operation == "checkpoint":
                assert same(far.content(), bytes(SIZE))
        far.until_stage("done")
        assert same(far.content(), view)
        far.umount()
        assert same(far.disk.read_bytes(), view)
    finally:
        run("umount", "-l", room)


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 20, 40])
def test_a_daemon_killed_in_a_checkpoint_under_a_changing_mapping_leaves_nobody_hanging(sides: Sides, milliseconds: int) -> None:
    """The kernel would wait for the dead process's own pages: the watchdog ends that."""
    far = sides.secondary(SIZE)
    writer = subprocess.Popen([sys.executable, "-c", DIRTIER, str(far.file)], stdout=subprocess.PIPE)
    checkpoints = subprocess.Popen([sys.executable, "-c", CHECKPOINTS, str(far.point)], stdout=subprocess.PIPE)
    try:
        for process in (writer, checkpoints):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        select.select([], [], [], milliseconds / 1000)  # into the checkpoint: which point of it is left to chance
        far.signal(signal.SIGKILL)
        with pytest.raises(OSError, match=r"Transport endpoint|connection abort"):
            wait_for(lambda: os.statvfs(far.point) is None, "the death of the mount")
    finally:
        for process in (writer, checkpoints):
            process.kill()
            process.communicate(timeout=SECONDS)
    run("umount", far.point)
    far.mount()
    far.set("checkpoint")
    assert same(far.content(), far.disk.read_bytes())


def test_the_watchdog_leaves_a_mount_dead_where_it_is_and_keeps_it_free(sides: Sides) -> None:
    far = sides.secondary(MIB)
    far.expected = ["the mount was aborted"]
    device = os.stat(far.point).st_dev
    aborted = (
        "import sys; from replfs.export.watchdog import abort; abort(sys.argv[1].encode()); print('done', flush=True); input()"
    )
    number = f"{os.major(device)}:{os.minor(device)}"
    with subprocess.Popen(
        [sys.executable, "-c", aborted, number], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watchdog:
        assert watchdog.stdout is not None
        assert watchdog.stdout.readline() == "done\n"
        assert error_of(os.statvfs, far.point) in (errno.ENOTCONN, errno.ECONNABORTED)
        run("umount", far.point)
        assert not os.path.ismount(far.point)
        watchdog.communicate("\n")
    wait_for(lambda: "ended" in (far.state_dir / "replfs.log").read_text(), "the daemon's end")
    far.pid = 0


def test_what_mappings_have_changed_outlives_a_sigterm(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    with mapped(far.file) as mapping:
        mapping.ask("write", 5000, 3000, 7)
        far.signal(signal.SIGTERM)
    far.mount()
    assert far.content()[5000:8000] == b"\7" * 3000


def test_a_killed_daemon_leaves_a_dead_mount_that_umount_removes(sides: Sides) -> None:
    far = sides.secondary(MIB)
    far.signal(signal.SIGKILL)
    assert error_of(os.listdir, far.point) == errno.ENOTCONN
    assert "has died" in replfs("status", far.point, check=False).stderr
    assert "is dead" in replfs("secondary", far.disk, far.point, check=False).stderr
    replfs("umount", far.point)
    assert os.listdir(far.point) == []


def test_a_forced_unmount_ends_the_service_in_good_order(sides: Sides) -> None:
    far = sides.secondary(SIZE)
    far.expected = ["the mount was aborted", "fuse_reply_", "checkpoint failed"]
    with far.file.open("r+b") as file:
        file.write(b"kept" * 1000)
    process = os.pidfd_open(far.pid)
    with suppress(OSError), opened(far.file, os.O_RDONLY):
        run("umount", "-f", far.point, check=False)  # busy, but the connection is aborted
    run("umount", "-l", far.point, check=False)
    ended, _, _ = select.select([process], [], [], SECONDS)
    os.close(process)
    far.pid = 0
    assert ended
    assert "ended: the stage is running" in (far.state_dir / "replfs.log").read_text()
    far.mount()
    assert far.content()[:4000] == b"kept" * 1000


def test_a_busy_mount_is_not_unmounted(sides: Sides) -> None:
    far = sides.secondary(MIB)
    with opened(far.file, os.O_RDONLY):
        refused = replfs("umount", far.point, check=False)
        assert refused.returncode == 1
        assert "busy" in refused.stderr
        assert far.get("stage") == "running"
    far.umount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_under_load(sides: Sides, number: signal.Signals) -> None:
    far = sides.secondary(SIZE)
    model = bytearray(SIZE)
    unsure = [0]  # the offset of the write that is under way
    started = threading.Event()

    def machine() -> None:
        rng = random.Random(4)
        with suppress(OSError), opened(far.file, os.O_RDWR) as fd:
            while True:
                unsure[0], data = rng.randrange(SIZE - 4096), rng.randbytes(4096)
                if os.pwrite(fd, data, unsure[0]) != 4096:
                    break  # the kernel may split it, and the end came between the parts
                model[unsure[0] : unsure[0] + 4096] = data
                started.set()

    thread = threading.Thread(target=machine)
    thread.start()
    started.wait(SECONDS)
    far.signal(number)
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert os.listdir(far.point) == []
    for overlay in ("active.0", "hidden.0"):
        assert_sound(far.state_dir / f"{overlay}.qcow2")
    far.mount()
    content = bytearray(far.content())
    content[unsure[0] : unsure[0] + 4096] = model[unsure[0] : unsure[0] + 4096]
    assert same(content, model)


def test_checkpoints_while_readers_cache_and_writers_write(sides: Sides) -> None:
    """No reader keeps anything of an older view once a checkpoint has returned, whatever it was caching meanwhile."""
    far, near = sides.secondary(MIB), sides.primary(MIB)
    ended = threading.Event()

    def read() -> None:
        with opened(far.file, os.O_RDONLY) as fd:
            while not ended.is_set():
                os.pread(fd, MIB, 0)

    def write() -> None:
        with opened(far.file, os.O_WRONLY) as fd:
            while not ended.is_set():
                os.pwrite(fd, b"w" * 4096, MIB - 4096)

    threads = [threading.Thread(target=read), threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        for i in range(1, 31):
            with near.file.open("r+b") as file:
                file.write(bytes([i]) * (MIB // 2))
            far.set("checkpoint")
            assert same(far.content()[: MIB // 2], bytes([i]) * (MIB // 2))
    finally:
        ended.set()
        for thread in threads:
            thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_the_primarys_file_is_its_own_disk(sides: Sides) -> None:
    sides.secondary(SIZE)
    near = sides.primary(SIZE)
    run("dd", "if=/dev/urandom", f"of={near.file}", "bs=64k", "count=20", "seek=3", "conv=notrunc,fsync", "status=none")
    run("cmp", near.file, near.disk)
    run("cmp", near.disk, sides.all[0].disk)
    assert near.status()["connected"]
    assert near.get("error") == ""


def test_a_primary_goes_on_alone_when_its_secondary_dies(sides: Sides) -> None:
    far, near = sides.secondary(SIZE), sides.primary(SIZE)
    near.expected = LINK_LOST
    far.kill()
    with near.file.open("r+b") as file:
        file.write(b"alone")
    wait_for(lambda: near.get("error") == "I/O error occurred", "the sticky error")
    assert near.content()[:5] == b"alone"
    assert not near.status()["connected"]


def test_two_volumes_do_not_share_a_disk_or_a_state_directory(sides: Sides) -> None:
    far = sides.secondary(MIB)
    other = sides.folder / "other"
    other.mkdir()
    same_disk = replfs("secondary", far.disk, other, "--state-dir", sides.folder / "elsewhere", check=False)
    assert f"{far.disk} is in use by another process" in same_disk.stderr
    (sides.folder / "other.raw").write_bytes(bytes(MIB))
    same_state = replfs("secondary", sides.folder / "other.raw", other, "--state-dir", far.state_dir, check=False)
    assert f"the state directory {far.state_dir} is in use" in same_state.stderr
    assert not (sides.folder / "elsewhere").exists()
