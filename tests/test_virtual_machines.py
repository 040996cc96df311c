"""Virtual machines on the mounted file: QEMU runs a real Linux guest with its disk there, with each way it has to use a file.

The guest (scripts/vm-guest.sh) is emulated, since not every machine that runs tests has KVM: it boots in three seconds.
"""

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import same
from harness import SECONDS, Sides, replfs, run, wait_for
from test_shell import assert_success, running

MIB = 1 << 20
SIZE = 64 * MIB
SCRIPTS = Path(__file__).parents[1] / "scripts"
GUEST = SCRIPTS.parent / ".venv/vm"
MAKE_GUEST_SECONDS = 240
DEMO_SECONDS = 110
MORE = 20
"""Files that the guest writes before something is done, and after it, so that it is done while the guest writes."""
UNHEARD = 3
"""Files that the guest may have written, and synced, and not said so yet."""

pytestmark = pytest.mark.timeout(MAKE_GUEST_SECONDS + DEMO_SECONDS)


class Machine:
    """A virtual machine with one disk."""

    def __init__(self, console: Path, disk: Path, task: str, cache: str, aio: str) -> None:
        self._console = console
        command = [
            "qemu-system-x86_64",
            "-machine",
            "pc,accel=tcg",
            "-cpu",
            "max",
            "-m",
            "256",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ]
        command += ["-serial", "stdio", "-kernel", f"{GUEST}/vmlinuz", "-initrd", f"{GUEST}/initrd"]
        command += ["-append", f"console=ttyS0 quiet panic=-1 replfs.do={task}"]
        command += ["-drive", f"file={disk},format=raw,if=virtio,cache={cache},aio={aio}"]
        with console.open("wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def said(self, word: str) -> str | None:
        """What it said last with this word."""
        ended = self.process.poll() is not None  # before its words are read: what it said before it ended counts
        console = self._console.read_text(errors="replace")
        console = console[: console.rfind("\n") + 1]  # what it is about to say may be there in part
        said = [line.partition(f"GUEST: {word} ")[2] for line in console.splitlines() if line.startswith(f"GUEST: {word} ")]
        assert said or ("GUEST: FAILED" not in console and not ended), f"the guest has not said {word}: {console}"
        return said[-1] if said else None

    def until(self, word: str) -> str:
        answer: str = wait_for(lambda: self.said(word), f"the guest's {word}")
        return answer

    def until_written(self, number: int) -> int:
        """Until it has written and synced as many numbered files; returns how many it has."""
        wait_for(lambda: int(self.said("LATER") or 0) >= number, f"file {number}")
        return int(self.until("LATER"))

    def end(self) -> None:
        """Wait until it has ended."""
        self.process.wait(SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.end()


Boot = Callable[[Path, str, str, str], Machine]


@pytest.fixture
def boot(sides: Sides, tmp_path: Path) -> Iterator[Boot]:
    """Boot a machine with this disk, task of the guest, cache and aio. It is gone before the sides are unmounted."""
    run(SCRIPTS / "vm-guest.sh", GUEST, timeout=MAKE_GUEST_SECONDS)
    machines: list[Machine] = []

    def start(disk: Path, task: str, cache: str, aio: str) -> Machine:
        machines.append(Machine(tmp_path / f"console.{len(machines)}", disk, task, cache, aio))
        return machines[-1]

    yield start
    for machine in machines:
        machine.kill()


def e2fs(*command: str | Path, good: tuple[int, ...] = (0,)) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # an ordinary user's lacks them
    done = run(*command, check=False, env={**os.environ, "PATH": path})
    assert done.returncode in good, done.stdout + done.stderr


def digest(folder: Path) -> str:
    """As the guest's: of the names and contents of all files."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  ./{name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_under_way(sides: Sides, machine: Machine) -> tuple[int, int]:
    """Make a checkpoint while the guest writes numbered files; returns the last one at its begin, and at its end."""
    secondary, primary = sides.all
    before = machine.until_written(MORE)
    assert secondary.content() == bytes(SIZE)
    replfs("checkpoint", primary.point)
    after = int(machine.until("LATER"))
    machine.until_written(after + MORE)
    return before, after


@pytest.mark.parametrize(("cache", "aio"), [("none", "native"), ("writeback", "threads"), ("directsync", "io_uring")])
def test_another_machine_goes_on_from_the_checkpoint(sides: Sides, boot: Boot, cache: str, aio: str) -> None:
    """The first machine dies together with the replfs below it, in the middle of its writes."""
    secondary, primary = sides.secondary(SIZE), sides.primary(SIZE)
    first = boot(primary.file, "make", cache, aio)
    files = first.until("WRITTEN")
    before, after = checkpoint_under_way(sides, first)
    first.process.kill()
    primary.signal(signal.SIGKILL)
    first.end()
    primary.umount_when_free()

    replfs("failover", "--wait", secondary.point)
    second = boot(secondary.file, "check", cache, aio)
    assert second.until("CLEAN") == files
    assert before <= int(second.until("LATER")) <= after + UNHEARD
    second.end()
    view = secondary.content()
    secondary.umount()
    assert same(view, secondary.disk.read_bytes())
    e2fs("e2fsck", "-fn", secondary.disk)


@pytest.mark.parametrize(
    ("cache", "aio"),
    [("none", "io_uring"), ("none", "threads"), ("writeback", "io_uring"), ("directsync", "native"), ("directsync", "threads")],
)
def test_a_checkpoint_of_a_machine_that_writes_is_sound(sides: Sides, boot: Boot, tmp_path: Path, cache: str, aio: str) -> None:
    secondary, primary = sides.secondary(SIZE), sides.primary(SIZE)
    machine = boot(primary.file, "make", cache, aio)
    files = machine.until("WRITTEN")
    before, after = checkpoint_under_way(sides, machine)
    image, content = tmp_path / "image", tmp_path / "content"
    shutil.copyfile(secondary.file, image)
    e2fs("e2fsck", "-fp", image, good=(0, 1))  # the journal is replayed; what that cannot mend is 4
    e2fs("e2fsck", "-fn", image)
    content.mkdir()
    e2fs("debugfs", "-R", f"rdump /data /later {content}", image)
    assert digest(content / "data") == files
    later = sorted((int(path.name), path.read_text()) for path in (content / "later").iterdir())
    assert before <= len(later) <= after + UNHEARD
    assert [number for number, _ in later] == list(range(1, len(later) + 1))
    assert all(text == f"{number}\n" for number, text in later[:before])

    machine.kill()
    replfs("checkpoint", primary.point)
    assert same(primary.content(), secondary.content())
    assert same(primary.disk.read_bytes(), secondary.disk.read_bytes())


def test_qemu_locks_the_disk_that_it_uses(sides: Sides, boot: Boot) -> None:
    """Its locks work on the mounted file; and replfs holds those of the disk below."""

    def refused(disk: Path) -> bool:
        return "Failed to get" in run("qemu-io", "-f", "raw", "-c", "quit", disk, check=False).stderr

    side = sides.secondary(SIZE)
    assert not refused(side.file)
    machine = boot(side.file, "make", "none", "native")
    wait_for(lambda: refused(side.file), "QEMU's lock")
    machine.kill()
    assert not refused(side.file)
    assert refused(side.disk)


def test_the_demo(tmp_path: Path) -> None:
    with running(
        [str(SCRIPTS / "vm-demo.sh"), "--no-setup", "--cache", "writeback", "--aio", "threads"], SCRIPTS, tmp_path
    ) as demo:
        assert_success(demo, MAKE_GUEST_SECONDS + DEMO_SECONDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["3.", "6."])  # the first machine runs; the second one boots
def test_the_demo_interrupted(step: str, tmp_path: Path) -> None:
    with running([str(SCRIPTS / "vm-demo.sh"), "--no-setup"], SCRIPTS, tmp_path) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith(step):
                demo.send_signal(signal.SIGTERM)
        assert demo.wait(DEMO_SECONDS) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_the_demo_interrupted_just_as_a_machine_begins(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / ".venv").symlink_to(SCRIPTS.parent / ".venv")
    script = shutil.copytree(SCRIPTS, checkout / "scripts") / "vm-demo.sh"
    before, noted, after = script.read_text().partition("    machine=$!\n")
    script.write_text(f"{before}    kill -TERM $$\n{noted}{after}")
    with running([str(script), "--no-setup"], checkout, tmp_path) as demo:
        assert demo.wait(MAKE_GUEST_SECONDS + DEMO_SECONDS) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
