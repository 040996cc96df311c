"""Every `sh` block of the README and of the pages in docs/ runs as it is written there by a shell that stops at a failure."""

import os
import re
import sys
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("view.md", ["can_trim: true", "by the mount", "AA the mount"]),
        ("qmp.md", ['{"return": {"error": false}}', "export-size: 67108864", '{"return": []}']),
    ],
)
def test_the_commands_of_a_page(tmp_path: Path, page: str, expected: list[str]) -> None:
    text = (ROOT / "docs" / page).read_text()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        blocks = "".join(BLOCK.findall(text))
        done = run("sh", "-eux", "-c", blocks, cwd=tmp_path, env={**os.environ, "PATH": path}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for words in expected:
            assert words in done.stdout, done.stdout
    finally:
        run("umount", "-l", tmp_path / "mnt", check=False)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_every_option_and_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    commands = "".join(path.read_text() for path in (ROOT / "replfs/cli").glob("*.py"))
    ours = "no-start|stop-on-unmount|plaintext|listen|target|state-dir|uid|gid|mode|wait|json|durability|foreground|protocol|window"
    ours += (
        "|timeout|resync-rate|initial-sync|discard-remote|checkpoint-every|checkpoint-before|checkpoint-after|repair|pause|resume"
    )
    ours += "|view-listen|qmp"
    for option in set(re.findall(rf"`[^`\n]*(--(?:{ours}))\b", text)):
        assert f'"{option}"' in commands
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"#[a-z-]+\)", ")", page.read_text())):
            assert (page.parent / link).exists(), (page, link)
