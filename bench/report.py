"""What came out: medians, ratios, and whether they are what is aimed at."""

import datetime
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from bench.workloads import Workload
from replfs import __version__


class Results:
    def __init__(self) -> None:
        self._found: dict[str, tuple[Workload, dict[str, list[float]]]] = {}
        self.deaths: Counter[str] = Counter()
        """How often QEMU has ended by itself, by what was measured."""

    def add(self, workload: Workload, side: str, value: float) -> None:
        self._found.setdefault(workload.name, (workload, {}))[1].setdefault(side, []).append(value)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(What, what is aimed at, what came out, whether that is so); ratios are of medians, with those of the single rounds."""
        found = []
        for workload, values in self._found.values():
            for goal in workload.goals:
                ours, theirs = values.get(goal.ours), values.get(goal.theirs)
                if not ours or not theirs:  # something does not work, so that is all there is
                    continue
                ratio = median(ours) / median(theirs)
                each = sorted(a / b for a, b in zip(ours, theirs, strict=False))
                against = "" if (goal.ours, goal.theirs) == ("replfs", "qemu") else f" ({goal.ours} : {goal.theirs})"
                found.append(
                    (
                        workload.name + against,
                        f"{'at most' if goal.at_most else 'at least'} {goal.bound:.3g}",
                        f"{ratio:.3g} ({each[0]:.3g} to {each[-1]:.3g})",
                        "" if goal.met(ratio) else "below the goal",
                    )
                )
            for side, limit in workload.limits:
                if side not in values:
                    continue
                value = median(values[side])
                found.append(
                    (
                        f"{workload.name}, {side} by itself",
                        "" if limit is None else f"at most {limit:.3g} {workload.unit}",
                        f"{value:.4g} {workload.unit}",
                        "" if limit is None or value <= limit else "below the goal",
                    )
                )
        return found

    def as_json(self) -> list[dict[str, Any]]:
        return [{"name": workload.name, "unit": workload.unit, "values": values} for workload, values in self._found.values()]


def environment(rounds: int, seconds: float) -> dict[str, Any]:
    """What the numbers are about."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs ({model or platform.machine()}), Linux {platform.release()}",
        "versions": {
            "replfs": __version__,
            "python": platform.python_version(),
            "qemu": _first_line("qemu-system-x86_64", "--version"),
            "fio": _first_line("fio", "--version"),
        },
        "rounds": rounds,
        "seconds": round(seconds),
    }


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def table(results: Results, about: dict[str, Any]) -> str:
    """Markdown, with what it is about below."""
    lines = ["| what | aimed at | replfs : QEMU | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in results.rows()]
    if results.deaths:
        deaths = "; ".join(f"{name} ({count})" for name, count in results.deaths.items())
        lines += ["", f"QEMU ended by itself, and was started anew, while this was measured: {deaths}."]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += ["", f"{about['date']}; {about['machine']}; {versions}; medians of {about['rounds']} rounds in {about['seconds']} s."]
    return "\n".join(lines)
