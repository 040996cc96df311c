"""Putting a side to work, and measuring: fio for all that is bytes, the clock for the rest."""

import json
import mmap
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.sides import BenchError, Qemu, QemuSecondary, ReplfsSecondary, Side, wait_until

MIB = 1 << 20


def fio(*, uri: str = "", file: Path | None = None, rw: str, bs: str, depth: int = 1, **options: Any) -> dict[str, Any]:
    """Run fio against an NBD export, or a file (asynchronous and direct unless the options say else); what it measured.

    Raises BenchError.
    """
    job = _job(uri=uri, file=file, rw=rw, bs=bs, depth=depth, **options)
    if job["error"]:
        raise BenchError(f"fio, {rw} of {bs} at {uri or file}: error {job['error']}")
    found = job["read" if "read" in rw else "write"]
    assert isinstance(found, dict)
    return found


def _job(*, uri: str = "", file: Path | None, rw: str, bs: str, depth: int, **options: Any) -> dict[str, Any]:
    """All that fio says of what it did. Raises BenchError."""
    settings: dict[str, Any] = {"name": "bench", "rw": rw, "bs": bs, "iodepth": depth, "output-format": "json", "randrepeat": 1}
    settings |= {"ioengine": "nbd", "uri": uri} if uri else {"ioengine": "libaio", "filename": file, "direct": 1}
    settings |= {"allow_file_create": 0, "fallocate": "none"} | options
    if uri:
        del settings["allow_file_create"]
    command = ["fio", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert isinstance(job, dict)
    return job


def wrong_blocks(side: Side, *, bs: str, depth: int, number: int) -> float:
    """Write so many random blocks, and read them: how many are not what was written. Raises BenchError if replfs has one."""
    options: dict[str, Any] = {"size": "512M", "number_ios": number, "verify": "crc32c", "verify_state_save": 0}
    wrong = int(_job(file=side.file, rw="randwrite", bs=bs, depth=depth, continue_on_error="verify", **options)["total_err"])
    if wrong and not isinstance(side, Qemu):
        raise BenchError(f"{wrong} of {number} blocks of {bs} are wrong on {type(side).__name__}")
    return wrong


def mib_per_second(side: Side, **arguments: Any) -> float:
    """As :func:`fio`, with what is read and copied in the page cache, and nothing of earlier work to be written back."""
    os.sync()
    warm(side.disk)
    have_memory()
    return float(fio(**arguments)["bw_bytes"]) / MIB


def warm(disk: Path, *, anew: bool = False) -> None:
    """Have a file in the page cache, in single pages, as a machine's own requests leave it.

    In the large folios that come of copying it, the kernel takes longer for a small write than either side does. ``anew``: what is
    cached already goes first.
    """
    if disk.stat().st_size > 64 << 30:
        return  # it is nothing but a hole
    buffer = bytearray(MIB)
    with disk.open("rb", buffering=0) as file:
        if anew:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.readinto(buffer):
            pass


def have_memory() -> None:
    """Have free memory that the machine has touched before: under a hypervisor, what new memory costs is not what is measured."""
    mmap.mmap(-1, 768 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def fill(side: ReplfsSecondary | QemuSecondary, megabytes: int) -> None:
    """Have so much in each overlay."""
    view = side.fill_view()
    where: dict[str, Any] = {"uri": view} if "://" in view else {"file": Path(view)}
    what: dict[str, Any] = {"rw": "write", "bs": "1M", "depth": 4, "size": f"{megabytes}M"}
    fio(**what, **where)
    fio(**what, uri=side.uri)


def seconds_of(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def longest_stall(side: ReplfsSecondary | QemuSecondary, seconds: float) -> float:
    """Seconds that the slowest of many NBD writes took, while a checkpoint was taken."""
    options: dict[str, Any] = {"rw": "randwrite", "bs": "4k", "size": "256M", "time_based": 1, "runtime": seconds, "norandommap": 1}
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(fio, uri=side.uri, **options)
        time.sleep(seconds / 2 + 0.3)  # fio needs some time to start, and the checkpoint is to come amid the writes
        side.checkpoint()
        return float(writing.result()["lat_ns"]["max"]) / 1e9


def failover(side: ReplfsSecondary | QemuSecondary, megabytes: int) -> tuple[float, float]:
    """Seconds from the command to the first write served, and MiB per second of the commit; the side is started anew first."""
    side.stop()
    side.start()
    fill(side, megabytes)
    os.sync()
    if isinstance(side, ReplfsSecondary):
        with side.file.open("r+b", buffering=0) as mounted:
            began = time.perf_counter()
            side.failover()
            mounted.write(bytes(4096))
            served = time.perf_counter() - began
    else:
        began = time.perf_counter()
        side.failover()
        side.hmp('qemu-io top "write 0 4k"')
        served = time.perf_counter() - began
    wait_until(side.committed, "the commit")
    return served, megabytes / (time.perf_counter() - began)
