"""The command line of the benchmark."""

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click

from bench.report import Results, environment, table
from bench.sides import BenchError, Qemu, Side
from bench.workloads import SCENARIOS, Scenario, Workload, make_disk, remove

_LIVES = 10
"""How often QEMU may end by itself at one measurement."""


def _run(scenario: Scenario, rounds: int, folder: Path, disk: Path, only: str, results: Results) -> None:
    """Raises BenchError."""
    folder.mkdir()
    found = scenario.make(folder, disk)
    with ExitStack() as stack:
        stack.callback(remove, folder)
        for side in found.values():
            side.start()
            stack.callback(side.stop)
        for number in range(rounds):
            for workload in scenario.workloads:
                if not isinstance(workload, Workload):
                    workload(found)
                elif only in workload.name:
                    _measure(workload, number, found, results)


def _measure(workload: Workload, number: int, found: dict[str, Side], results: Results) -> None:
    names = workload.sides if number % 2 == 0 else workload.sides[::-1]
    for name in names:
        value = _value(workload, found[name], results)
        results.add(workload, name, value)
        click.echo(f"  {workload.name}: {name} {value:.4g} {workload.unit}", err=True)


def _value(workload: Workload, side: Side, results: Results) -> float:
    """A QEMU that ends by itself is started anew. Raises BenchError."""
    for _ in range(_LIVES):
        try:
            return workload.measure(side)
        except BenchError as error:
            if not isinstance(side, Qemu) or not side.has_died():
                raise
            click.echo(f"  {workload.name}: {error}", err=True)
            results.deaths[workload.name] += 1
            side.revive()
    raise BenchError(f"{workload.name}: QEMU ended by itself {_LIVES} times")


@click.command()
@click.option("--quick", is_flag=True, help="One round, and without the largest disk: within 5 minutes.")
@click.option("--rounds", type=click.IntRange(1), help="How often everything is measured (5, and once with --quick).")
@click.option(
    "--scenario", "scenarios", multiple=True, type=click.Choice([s.name for s in SCENARIOS]), help="Only this; repeatable."
)
@click.option("--only", default="", help="Only what has this in its name.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers to this file.")
@click.option(
    "--dir", "where", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Work in this directory's file system."
)
def main(quick: bool, rounds: int | None, scenarios: tuple[str, ...], only: str, path: Path | None, where: Path | None) -> None:
    """Measure replfs beside QEMU's block layer on this machine, and print the ratios of medians."""
    rounds = rounds or (1 if quick else 5)
    chosen = [s for s in SCENARIOS if (s.name in scenarios if scenarios else not (quick and s.slow))]
    results = Results()
    failed = ""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="replfs-bench-", dir=where))
    try:
        disk = make_disk(folder)
        for scenario in chosen:
            _run(scenario, rounds, folder / scenario.name, disk, only, results)
    except BenchError as error:
        failed = str(error)
    finally:
        remove(folder)
    about = environment(rounds, time.monotonic() - began)
    click.echo(table(results, about))
    if path is not None:
        path.write_text(json.dumps({**about, "workloads": results.as_json()}, indent=1) + "\n")
    if failed:
        click.echo(f"bench: error: {failed}", err=True)
        sys.exit(1)


main()
