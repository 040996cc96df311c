"""What every test runs under: the same property-test settings everywhere, and no process or mount left behind.

``--full`` runs the tests of what happens when things break (power cuts, kills, full and failing disks) at full length, as
scripts/torture.sh does, instead of the short form that is part of every run. What each of them has tried is added up and printed.
"""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from replfs.block import syncs

settings.register_profile("replfs", deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("replfs")

pytest_plugins = ["harness", "proxy"]

_PROPERTY = "tally"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests of failures at full length")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_only: part of the full length only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full_only")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def syncs_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process every sync is a call of os.fdatasync, which tests have fail, count and lie; daemons do as users' do."""
    monkeypatch.setattr(syncs, "asynchronous", False)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the tests of failures are to run at full length."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Call it with a kind of failure (``power cut``, ``kill``, ``full disk``, ``I/O error``) and how many cases of it passed."""

    def add(kind: str, cases: int) -> None:
        request.node.user_properties.append((_PROPERTY, (kind, cases)))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    cases: Counter[str] = Counter()
    failed = 0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = [value for name, value in report.user_properties if name == _PROPERTY]
            failed += bool(found) and outcome == "failed" and report.when == "call"
            if report.when == "call":
                for kind, count in found:
                    cases[kind] += count
    for kind, count in sorted(cases.items()):
        terminalreporter.write_line(f"{kind}: {count} cases passed")
    if failed:
        terminalreporter.write_line(f"{failed} tests of failures failed")
