"""`python -m bench`: runs the scenarios, writes the results, the table and the plots. Missed figures are no error."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from bench.environments import ROOT, NotInstalled, python_of
from bench.report import Row, document
from bench.scenarios import SCENARIOS, Scenario

RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "bench"
Results = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGTERM, _end)
    asked = _arguments()
    if asked.render:
        results = json.loads(asked.render.read_text())
    else:
        results = measure(_chosen(asked.only), asked.runs, asked.scale)
    RESULTS.mkdir(exist_ok=True)
    page = document(table_rows(results), results["machine"])
    print(page)
    if not asked.render:
        dated = RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}.json"
        dated.write_text(json.dumps(results) + "\n")
        print(f"written: {dated.relative_to(ROOT)}", file=sys.stderr)
    if asked.render or (asked.only is None and asked.scale == 1.0):
        keep(results, page)


def keep(results: Results, page: str) -> None:
    """What README shows: only a whole run takes its place."""
    latest = RESULTS / "latest.json"
    latest.write_text(json.dumps(results) + "\n")
    (RESULTS / "latest.md").write_text(page)
    try:
        command = [str(python_of("plots")), str(ROOT / "bench" / "plots.py"), str(latest), str(PLOTS)]
        subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    except (NotInstalled, subprocess.SubprocessError) as error:
        print(f"no plots: {error}", file=sys.stderr)


def measure(scenarios: Iterable[Scenario], runs: int, scale: float) -> Results:
    """Every scenario once, then all of them again: what disturbs the machine for a while spoils no scenario whole."""
    chosen = list(scenarios)
    measured: dict[str, list[Any]] = {scenario.name: [] for scenario in chosen}
    failures: dict[str, str] = {}
    for number in range(1, runs + 1):
        for scenario in chosen:
            print(f"{scenario.name}, run {number} of {runs}", file=sys.stderr, flush=True)
            try:
                measured[scenario.name].append(scenario.run(scale))
            except Exception as error:  # one scenario's trouble must not cost the others' figures
                failures[scenario.name] = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"  failed: {failures[scenario.name]}", file=sys.stderr, flush=True)
    results = {"machine": machine(scale, runs), "scenarios": measured, "failures": failures}
    through_json: Results = json.loads(json.dumps(results))
    return through_json


def table_rows(results: Results) -> list[Row]:
    rows = []
    for scenario in SCENARIOS:
        repetitions = results["scenarios"].get(scenario.name)
        if repetitions:
            rows += scenario.rows(repetitions)
        if failure := results["failures"].get(scenario.name):
            rows.append(Row(f"{scenario.name}: a run failed", "–", failure, reached=False))
    return rows


def machine(scale: float, runs: int) -> dict[str, str]:
    """What it is measured on, as the page tells it."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "CPU": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{memory_kib / 1024 / 1024:.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "openai-python": version("openai"),
        "LiteLLM": _pinned("litellm-router", "litellm"),
        "runs": str(runs),
        "scale": f"{scale:g}",
    }


def _pinned(requirements: str, package: str) -> str:
    text = (ROOT / "bench" / f"requirements-{requirements}.txt").read_text()
    return next(
        line.split()[0].partition("==")[2] for line in text.splitlines() if line.startswith(package + "==")
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", action="append", choices=names, help="this scenario (may be given again)")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of everything (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="so large a part of the work (1)")
    parser.add_argument("--render", type=Path, help="measure nothing: table and plots of these results")
    return parser.parse_args()


def _chosen(only: list[str] | None) -> list[Scenario]:
    if only is None:
        return [scenario for scenario in SCENARIOS if not scenario.on_demand]
    return [scenario for scenario in SCENARIOS if scenario.name in only]


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)  # every `with` ends its processes


if __name__ == "__main__":
    main()
