"""Every `sh` block of the README runs as it is written there, in order, by a shell that stops at the first failure."""

import os
import re
import sys
from pathlib import Path

from harness import run

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("scripts/",)  # what sets a checkout up or is a test of its own


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    blocks = [block for block in BLOCK.findall((ROOT / "README.md").read_text()) if not block.startswith(ELSEWHERE)]
    assert len(blocks) >= 4
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = run("sh", "-eux", "-c", "".join(blocks), cwd=tmp_path, env={**os.environ, "PATH": path}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for expected in ("hello", "Backup job was cancelled unexpectedly", "stage:      done", "still here", '"stage":"done"'):
            assert expected in done.stdout
    finally:
        for name in ("mnt-a", "mnt-b", "mnt"):
            run("umount", "-l", tmp_path / name, check=False)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_every_option_and_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    commands = "".join(path.read_text() for path in (ROOT / "replfs/cli").glob("*.py"))
    ours = "no-start|stop-on-unmount|plaintext|listen|target|state-dir|uid|gid|mode|wait|json|durability|foreground|protocol|window"
    ours += (
        "|timeout|resync-rate|initial-sync|discard-remote|checkpoint-every|checkpoint-before|checkpoint-after|repair|pause|resume"
    )
    for option in set(re.findall(rf"`[^`\n]*(--(?:{ours}))\b", text)):
        assert f'"{option}"' in commands
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
