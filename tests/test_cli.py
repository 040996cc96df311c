"""The command line: help, wrong usage, and bad input, which is told in one line and changes nothing."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from harness import REPLFS, Sides, replfs, run, wait_for

from replfs.cli.status import show

MIB = 1 << 20


def tree(folder: Path) -> dict[str, tuple[int, int, float]]:
    """All there is under a folder, so that any change shows."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[str(path)] = (info.st_mode, info.st_size, info.st_mtime)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "good.raw").write_bytes(bytes(MIB))
    return tmp_path


def refused(place: Path, *arguments: str | Path, status: int = 1, side: str = "secondary") -> str:
    """The one line that a refused command prints; nothing is changed, mounted or left running."""
    before = tree(place)
    target: tuple[str | Path, ...] = () if {"--listen", "--target"} & set(arguments) else ("--listen", f"unix:{place}/s")
    done = replfs(side, *arguments, *target, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"replfs: error: [^\n]+\n", done.stderr), done.stderr
    assert tree(place) == before
    assert str(place) not in Path("/proc/self/mounts").read_text()
    return done.stderr


def test_a_disk_that_is_missing(place: Path) -> None:
    assert "nowhere.raw: No such file" in refused(place, place / "nowhere.raw", place / "mnt")


def test_a_disk_that_is_empty(place: Path) -> None:
    (place / "empty.raw").touch()
    assert "empty.raw is empty" in refused(place, place / "empty.raw", place / "mnt")


def test_a_disk_that_is_no_disk(place: Path) -> None:
    (place / "dir").mkdir()
    os.mkfifo(place / "fifo")
    assert "is a directory" in refused(place, place / "dir", place / "mnt")
    assert "neither a file nor a block device" in refused(place, place / "fifo", place / "mnt")
    assert "neither a file nor a block device" in refused(place, "/dev/zero", place / "mnt", "--state-dir", place / "state")


def test_a_disk_that_cannot_be_read(place: Path) -> None:
    (place / "mnt2").symlink_to(place / "mnt2")
    assert "mnt2" in refused(place, place / "mnt2", place / "mnt")


def test_a_disk_that_looks_like_qcow2_and_no_format(place: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", place / "image", "1M")
    assert "looks like a qcow2 image: say --format qcow2" in refused(place, place / "image", place / "mnt")
    assert "is not a qcow2 image" in refused(place, place / "good.raw", place / "mnt", "--format", "qcow2")


def test_a_raw_disk_that_starts_with_the_magic_all_the_same(place: Path, sides: Sides) -> None:
    disk = sides.folder / "magic.raw"
    disk.write_bytes(b"QFI\xfb" + bytes(MIB))
    far = sides.secondary(disk, "--format", "raw")
    assert far.content()[:4] == b"QFI\xfb"


@pytest.mark.parametrize("what", ["missing", "a file", "a mount"])
def test_a_mount_point_that_cannot_be_used(place: Path, what: str) -> None:
    if what == "missing":
        assert "nowhere: No such file" in refused(place, place / "good.raw", place / "nowhere")
    elif what == "a file":
        assert "is not a directory" in refused(place, place / "good.raw", place / "good.raw")
    else:
        done = replfs("secondary", place / "good.raw", "/proc", "--listen", f"unix:{place}/s", check=False)
        assert (done.returncode, "/proc is busy" in done.stderr) == (1, True)
        assert not (place / "good.raw.replfs").exists()


@pytest.mark.parametrize("what", ["disk", "state directory", "socket"])
def test_nothing_that_is_needed_lies_under_the_mount_point(place: Path, what: str) -> None:
    (place / "mnt" / "in.raw").write_bytes(bytes(MIB))
    words: tuple[str | Path, ...] = {
        "disk": (place / "mnt" / "in.raw", place / "mnt", "--state-dir", place / "state"),
        "state directory": (place / "good.raw", place / "mnt", "--state-dir", place / "mnt" / "state"),
        "socket": (place / "good.raw", place / "mnt", "--listen", f"unix:{place}/mnt/s"),
    }[what]
    assert f"the {what} {place}/mnt/" in refused(place, *words)


def test_a_machine_without_fuse(place: Path) -> None:
    before = tree(place)
    nodes = "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    command = f'{nodes} && exec "$@"'
    words = (REPLFS, "secondary", place / "good.raw", place / "mnt", "--listen", f"unix:{place}/s")
    done = run("unshare", "--mount", "sh", "-c", command, "sh", *words, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there is no /dev/fuse" in done.stderr
    assert tree(place) == before


def test_a_name_that_is_not_utf_8(place: Path) -> None:
    assert "is not UTF-8" in refused(place, place / "good.raw", place / "mnt", "--name", os.fsdecode(b"n\xff"), status=2)
    (place / os.fsdecode(b"d\xff")).write_bytes(bytes(MIB))
    (place / "link.raw").symlink_to(os.fsdecode(b"d\xff"))
    assert "is not UTF-8" in refused(place, place / "link.raw", place / "mnt", status=2)


@pytest.mark.parametrize(("foreground", "number"), [(True, signal.SIGINT), (False, signal.SIGINT), (False, signal.SIGTERM)])
def test_a_start_that_is_interrupted(place: Path, foreground: bool, number: signal.Signals) -> None:
    """While it waits for a server that says nothing. What runs in the background then ends too."""
    before = tree(place)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(place / "silent"))
        silent.listen()
        words = [
            REPLFS,
            "primary",
            str(place / "good.raw"),
            str(place / "mnt"),
            "--target",
            f"nbd+unix:///disk?socket={place}/silent",
        ]
        with subprocess.Popen(words + ["-f"] * foreground, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = silent.accept()
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            with connection:
                connection.settimeout(60)
                assert connection.recv(100) == b""  # whoever had connected is gone
    assert process.returncode != 0
    assert "interrupted" in said
    assert "Traceback" not in said
    (place / "silent").unlink()
    assert tree(place) == before


def test_a_listen_address_in_use(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"{address} is in use" in refused(place, place / "good.raw", place / "mnt", "--listen", address)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(place / "live"))
        unix.listen()
        assert "is in use" in refused(place, place / "good.raw", place / "mnt", "--listen", f"unix:{place}/live")
    assert "is not a socket" in refused(place, place / "good.raw", place / "mnt", "--listen", f"unix:{place}/good.raw")


def test_a_target_that_is_not_there_is_told_of_and_waited_for(sides: Sides) -> None:
    near = sides.make("primary", MIB)
    near.expected = ["Connection refused", "No such file"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        targets = f"nbd://127.0.0.1:{unused.getsockname()[1]}/disk", f"nbd+unix:///disk?socket={sides.folder}/nobody"
        for target, why in zip(targets, near.expected, strict=True):
            done = replfs("primary", near.disk, near.point, "--target", target)
            assert (done.stdout, done.stderr.count("\n")) == ("", 1)
            assert why in done.stderr
            assert "going on alone until it is there" in done.stderr
            assert "connecting" in replfs("status", near.point).stdout
            near.umount()


def test_a_target_of_another_size_or_name(place: Path, sides: Sides) -> None:
    sides.secondary(2 * MIB)
    uri = f"nbd+unix:///disk?socket={sides.socket}"
    near = sides.make("primary", MIB)
    done = replfs("primary", near.disk, near.point, "--target", uri, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"has {MIB} bytes" in done.stderr
    assert f"has {2 * MIB}" in done.stderr
    assert not near.state_dir.exists()
    done = replfs("primary", near.disk, near.point, "--target", uri.replace("///disk", "///other"), check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_state_directory_of_another_disk_or_side(sides: Sides) -> None:
    far = sides.secondary(MIB)
    far.umount()
    other = sides.folder / "other.raw"
    other.write_bytes(bytes(MIB))
    before = tree(sides.folder)
    done = replfs("secondary", other, far.point, "--state-dir", far.state_dir, "--listen", f"unix:{sides.socket}", check=False)
    assert (done.returncode, "is the state of another disk" in done.stderr) == (1, True)
    done = replfs("primary", far.disk, far.point, "--target", "nbd://localhost", check=False)
    assert (done.returncode, "is the state of a secondary volume" in done.stderr) == (1, True)
    with far.disk.open("ab") as file:
        file.write(bytes(512))
    before = tree(sides.folder)
    done = replfs("secondary", far.disk, far.point, "--listen", f"unix:{sides.socket}", check=False)
    assert (done.returncode, f"{MIB + 512} bytes" in done.stderr) == (1, True)
    assert tree(sides.folder) == before


def test_a_file_system_without_room_for_the_overlays(place: Path) -> None:
    before = tree(place)
    limits = (100_000, resource.RLIM_INFINITY)
    done = replfs(
        *("secondary", place / "good.raw", place / "mnt", "--listen", f"unix:{place}/s"),
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"replfs: error: cannot start: {place}/good.raw.replfs/hidden.0.qcow2: File too large\n",
    )
    assert tree(place).keys() == before.keys()
    assert str(place) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe", b"null", b"9" * 100])
def test_a_damaged_state_file(sides: Sides, content: bytes) -> None:
    far = sides.secondary(MIB)
    far.umount()
    (far.state_dir / "state.json").write_bytes(content)
    before = tree(sides.folder)
    done = replfs("secondary", far.disk, far.point, "--listen", f"unix:{sides.socket}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert re.search(r"state\.json is (damaged|of version)", done.stderr)
    assert tree(sides.folder) == before


@pytest.mark.parametrize(
    ("key", "value"), [("version", 2), ("generation", -1), ("stage", "walking"), ("generation", "1"), ("more", 1)]
)
def test_a_state_that_makes_no_sense(sides: Sides, key: str, value: object) -> None:
    far = sides.secondary(MIB)
    far.umount()
    state = json.loads((far.state_dir / "state.json").read_bytes())
    (far.state_dir / "state.json").write_text(json.dumps({**state, key: value}))
    done = replfs("secondary", far.disk, far.point, "--listen", f"unix:{sides.socket}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("layer", ["active", "hidden"])
@pytest.mark.parametrize("damage", ["gone", "cut", "garbage", "a directory"])
def test_a_lost_overlay_is_told_and_nothing_is_mounted(sides: Sides, layer: str, damage: str) -> None:
    far = sides.secondary(MIB)
    far.umount()
    overlay = far.state_dir / f"{layer}.0.qcow2"
    if damage in ("gone", "a directory"):
        overlay.unlink()
        if damage == "a directory":
            overlay.mkdir()
    else:
        overlay.write_bytes(overlay.read_bytes()[:100] if damage == "cut" else os.urandom(300000))
    done = replfs("secondary", far.disk, far.point, "--listen", f"unix:{sides.socket}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert str(overlay) in done.stderr
    assert os.listdir(far.point) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("d", "m", "--listen", "nonsense"), "not an address"),
        (("d", "m", "--listen", "192.0.2.1:10809"), "--plaintext"),
        (("d", "m", "--listen", "0.0.0.0:10809"), "--plaintext"),
        (("d", "m", "--listen", "[::]:10809"), "--plaintext"),
        (("d", "m", "--format", "vmdk"), "vmdk"),
        (("d", "m", "--name", "a/b"), "file's name"),
        (("d", "m", "--mode", "9"), "mode"),
        (("d", "m", "--uid", "no-such-user"), "no-such-user"),
        *((("d", "m", "--cache-size", size), "not a size") for size in ("", "M", "-1M", "1.5M", "1X", "9" * 20)),
        (("d", "m", "--cache-size", "1023K"), "less than 1M"),
        (("d", "m", "--allow-backing", "/no/where"), "'/no/where' does not exist"),
        (("d", "m", "-o", "allow_other,fast"), "'fast'"),
        (("d", "m", "--nothing"), "--nothing"),
        (("d", "m", "too many"), "too many"),
        (("/dev/null/x\x1b[31m", "m\nn"), ""),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = replfs("secondary", *arguments, check=False, cwd=tmp_path)
    assert done.returncode == (2 if message else 1)
    assert re.fullmatch(r"replfs: error: [ -~]+\n", done.stderr), done.stderr
    assert message in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("uri", "status", "message"),
    [
        ("nbds://localhost/disk", 2, "TLS"),
        ("http://localhost/", 2, "scheme"),
        ("nbd://192.0.2.1/disk", 2, "--plaintext"),
        ("nbd+unix:///disk", 2, "socket"),
    ],
)
def test_wrong_targets(place: Path, uri: str, status: int, message: str) -> None:
    assert message in refused(place, place / "good.raw", place / "mnt", "--target", uri, side="primary", status=status)


@pytest.mark.parametrize("command", ["status", "start", "checkpoint", "failover", "stop", "umount"])
def test_control_of_what_is_no_mount(tmp_path: Path, command: str) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        done = replfs(command, path, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("replfs: error: ")


def test_no_command_at_all() -> None:
    done = replfs(check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: replfs")


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in ("primary", "secondary", "status", "start", "checkpoint", "failover", "stop"))]
)
def test_help(command: tuple[str, ...]) -> None:
    assert "Usage: replfs" in replfs(*command, "--help").stdout


def test_commands_do_what_the_attributes_do(sides: Sides) -> None:
    far = sides.secondary(MIB, "--no-start")
    far.expected = ["checkpoint failed", "stop failed"]
    done = replfs("checkpoint", far.point, check=False)
    assert (done.returncode, done.stderr) == (1, "replfs: error: Backup job was cancelled unexpectedly\n")
    assert far.get("last-error") == "Backup job was cancelled unexpectedly"
    replfs("start", far.point)
    assert far.get("stage") == "running"
    replfs("checkpoint", far.file)
    assert far.get("generation") == "1"
    replfs("failover", "--wait", far.point)
    assert far.get("stage") == "done"
    replfs("stop", far.point)


def test_status_for_people_and_for_programs(sides: Sides) -> None:
    far = sides.secondary(3 * MIB + 512)
    near = sides.primary(3 * MIB + 512)
    for side in (far, near):
        status = json.loads(replfs("status", "--json", side.point).stdout)
        assert (status["mode"], status["stage"], status["size"]) == (side.mode, "running", 3 * MIB + 512)
        assert (status["durability"], status["io-errors"]) == ("power", {})
        status["io-errors"] = {"/d/disk": {"sync": 1, "write": 3}}
        assert [line.split(maxsplit=2)[2] for line in show(status).splitlines() if "I/O errors:" in line] == [
            "/d/disk: 1 sync, 3 write"
        ]
        lines = replfs("status", side.point).stdout.splitlines()
        assert len({len(re.match(r"[a-z ]+: *", line)[0]) for line in lines}) == 1  # type: ignore[index]
        assert any(line.split(":")[1].strip() == "3 MiB" for line in lines)
    assert "3 connections" in replfs("status", far.point).stdout
    assert "connected" in replfs("status", near.point).stdout


def test_the_foreground_logs_to_standard_error_and_ends_with_the_mount(sides: Sides, place: Path) -> None:
    far = sides.make("secondary", MIB)
    command = [REPLFS, "secondary", str(far.disk), str(far.point), "-f", "--listen", f"unix:{place}/s"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(far.point.is_mount, "the mount")
        replfs("checkpoint", far.point)
        replfs("umount", far.point)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "checkpoint succeeded" in log
    assert not (far.state_dir / "replfs.log").exists()


def test_it_works_with_no_standard_streams_at_all(sides: Sides) -> None:
    far = sides.make("secondary", MIB)
    words = [REPLFS, "secondary", str(far.disk), str(far.point), "--listen", f"unix:{sides.socket}"]
    run("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words)
    far.pid = far.status()["pid"]
    far.set("checkpoint")
    assert far.get("generation") == "1"
    far.umount()


def test_the_port_that_the_kernel_picked_is_told(sides: Sides) -> None:
    far = sides.make("secondary", MIB, "--listen", "127.0.0.1:0")
    far.mount()
    host, _, port = far.status()["listen"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        assert connection.recv(8) == b"NBDMAGIC"
