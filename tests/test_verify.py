"""replfs verify: what differs between the two sides is told, counted, and sent if that is asked for; nobody else notices."""

import os
import random
import re
import threading

import pytest
from disks import same
from harness import Sides, replfs, wait_for

MIB = 1 << 20
SIZE = 8 * MIB + 1000
BLOCK = 64 << 10


def spoiled(sides: Sides, *places: tuple[int, bytes]) -> None:
    """Bytes of the secondary's disk change behind everybody's back."""
    with sides.all[0].disk.open("r+b") as file:
        for offset, data in places:
            file.seek(offset)
            file.write(data)


def test_what_differs_is_told_counted_and_repaired(sides: Sides) -> None:
    content = random.Random(1).randbytes(SIZE)
    far, near = sides.secondary(content), sides.primary(content)
    done = replfs("verify", near.point)
    assert (done.stdout, done.stderr) == ("", "")
    spoiled(sides, (BLOCK + 5, b"x"), (2 * BLOCK, b"y"), (5 * MIB, bytes(BLOCK)), (SIZE - 1, b"z"))
    told = f"{BLOCK} {2 * BLOCK}\n{5 * MIB} {BLOCK}\n{SIZE // BLOCK * BLOCK} {SIZE % BLOCK}\n"
    differing = 3 * BLOCK + SIZE % BLOCK
    done = replfs("verify", near.point, check=False)
    assert (done.returncode, done.stdout) == (1, told)
    assert f"{differing} bytes differ" in done.stderr
    assert near.status()["link"]["out-of-sync"] == differing
    assert re.search(r"^verify: +done, .* differ$", replfs("status", near.point).stdout, re.MULTILINE)
    assert near.get("error") == "I/O error occurred"
    assert far.disk.read_bytes() != content
    assert replfs("checkpoint", near.point, check=False).returncode == 1
    near.expected.append("checkpoint failed")
    done = replfs("verify", "--repair", "--rate", "100M", near.point)
    assert done.stdout == told
    near.until_connected()
    wait_for(lambda: near.status()["link"]["out-of-sync"] == 0, "the end of the repair")
    assert same(far.disk.read_bytes(), content)
    assert near.get("error") == ""
    assert near.status()["link"]["sent"]["data"] <= differing


def test_under_load_nothing_is_found_that_does_not_differ(sides: Sides) -> None:
    content = random.Random(1).randbytes(SIZE)
    far, near = sides.secondary(content), sides.primary(content)
    ended, failed = threading.Event(), []

    def write(seed: int) -> None:
        chance = random.Random(seed)
        try:
            with near.file.open("r+b", buffering=0) as file:
                while not ended.is_set():
                    os.pwrite(file.fileno(), chance.randbytes(chance.randrange(1, 9000)), chance.randrange(SIZE - 9000))
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert replfs("verify", near.point).stdout == ""
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed
    wait_for(lambda: near.status()["link"]["out-of-sync"] == 0, "a quiet link")
    assert same(far.disk.read_bytes(), near.disk.read_bytes())


def test_a_verification_can_be_stopped_and_has_a_rate(sides: Sides) -> None:
    content = random.Random(1).randbytes(SIZE)
    sides.secondary(content)
    near = sides.primary(content)
    near.set("verify", f"start {MIB}")
    assert near.status()["link"]["verify"]["running"]
    refused = replfs("verify", near.point, check=False)
    assert "a verification is under way" in refused.stderr
    near.expected.append("verify failed")
    replfs("verify", "--stop", near.point)
    wait_for(lambda: not near.status()["link"]["verify"]["running"], "the end")
    assert near.status()["link"]["verify"]["error"]
    for value in ("", "all", "start fast", "start 1 2", "start -1"):
        with pytest.raises(OSError, match="Invalid argument"):
            near.set("verify", value)
