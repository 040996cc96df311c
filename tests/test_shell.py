"""What a user does at a shell, done by a shell: the scripts in tests/shell, and the demo.

Each runs in an empty directory, in a session of its own and without input, for a bounded time, and has to leave nothing: no mount,
no process, no warning in a log that it did not announce (``# expects: REGEX``). Whatever it does leave is ended here, so that one
failed script cannot disturb, or hang, what comes after it.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SHELL = Path(__file__).with_name("shell")
_DEMO = Path(__file__).parent.with_name("scripts") / "demo.sh"
_SCRIPTS = sorted(path for path in _SHELL.glob("*.sh") if path.name != "lib.sh")
_SCRIPT_SECONDS = 60
_DEMO_SECONDS = 110
_GONE_SECONDS = 20.0
_TROUBLE = re.compile(r" (WARNING|ERROR|CRITICAL): |Traceback")
_EXPECTS = re.compile(r"^# expects: (.*)$", re.MULTILINE)


@pytest.mark.timeout(_SCRIPT_SECONDS + 60)
@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.stem)
def test_script(script: Path, tmp_path: Path) -> None:
    with running(["sh", "-eu", str(script)], tmp_path, tmp_path) as process:
        assert_success(process, _SCRIPT_SECONDS)
    expected = _EXPECTS.findall(script.read_text())
    assert _trouble(tmp_path, expected) == []


@pytest.mark.timeout(_DEMO_SECONDS + 60)
@pytest.mark.parametrize("options", [[], ["--qcow2"]], ids=["raw", "qcow2"])
def test_demo(options: list[str], tmp_path: Path) -> None:
    with running([str(_DEMO), "--no-setup", *options], _DEMO.parent, tmp_path) as process:
        assert_success(process, _DEMO_SECONDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(_DEMO_SECONDS + 60)
@pytest.mark.parametrize("step", ["3.", "6."])  # both sides are mounted; a failover begins
def test_demo_interrupted(step: str, tmp_path: Path) -> None:
    with running([str(_DEMO), "--no-setup"], _DEMO.parent, tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(step):
                process.send_signal(signal.SIGTERM)
        assert process.wait(_DEMO_SECONDS) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@contextmanager
def running(command: list[str], directory: Path, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A command whose processes are known by their TMPDIR, ``temporary``; afterwards none of them, and no mount, may be left."""
    environment = dict(os.environ, LC_ALL="C", TMPDIR=str(temporary))
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
        assert _mounts(temporary) == []
        assert _processes(temporary) == {}
    finally:
        _end_all(temporary)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GONE_SECONDS)


def assert_success(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as expired:
        output = (expired.output or b"").decode(errors="replace")  # bytes, whatever was asked for
    assert process.returncode is not None, f"not done after {seconds} seconds:\n{output}"
    assert process.returncode == 0, f"exit status {process.returncode}:\n{output}"


def _trouble(directory: Path, expected: list[str]) -> list[str]:
    """The lines in replfs's logs that nobody announced."""
    return [
        line
        for log in sorted(directory.rglob("replfs.log*"))
        for line in log.read_text(errors="replace").splitlines()
        if _TROUBLE.search(line) and not any(re.search(regex, line) for regex in expected)
    ]


def _mounts(directory: Path) -> list[str]:
    fields = (line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    points = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields)
    return [point for point in points if point.startswith(f"{directory}/")]


def _processes(temporary: Path) -> dict[int, str]:
    """Every process with that TMPDIR, and its command line: replfs's daemons too, which have left the script's session."""
    found = {}
    mark = f"TMPDIR={temporary}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def _end_all(temporary: Path) -> None:
    """End what is left. The processes come first: unmounting could wait for one that hangs."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (left := _processes(temporary)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for point in reversed(_mounts(temporary)):
        unmount = ["umount", "-l", point] if os.geteuid() == 0 else ["fusermount3", "-uz", point]
        subprocess.run(unmount, stdin=subprocess.DEVNULL, check=False, timeout=_GONE_SECONDS)
