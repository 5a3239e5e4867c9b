"""One job on each database: SQLite, and those whose addresses BENCH_DATABASE_URLS names, separated by blanks."""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from bench.figures import Spread
from bench.ours import serving
from bench.race import keys
from bench.report import Row, judged
from bench.scenarios.million import check_results, submit_file, write_file
from tests.service import ServiceExited
from tests.upstream import KeyRules, Upstream

TASKS, LEAST_TASKS = 100_000, 200
SQLITE = "sqlite"
URLS = "BENCH_DATABASE_URLS"
RUN_TIMEOUT_S = 1_800.0
WANTED = 0.7


def run(scale: float) -> dict[str, Any]:
    """With the figures by the name of the database; one that does not serve has the reason in place of them."""
    urls = {make_url(url).get_backend_name(): url for url in os.environ.get(URLS, "").split()}
    if not urls:
        print(f"  skipped: {URLS} names no database", file=sys.stderr, flush=True)
        return {"databases": {}}
    tasks = max(LEAST_TASKS, int(TASKS * scale))
    env: dict[str, Mapping[str, str]] = {SQLITE: {}}
    env |= {name: {"DATABASE_URL": url} for name, url in urls.items()}
    found = {name: _one(tasks, database) for name, database in env.items()}
    for name, figures in found.items():
        print(f"  {name}: {figures}", file=sys.stderr, flush=True)
    return {"databases": found}


def _one(tasks: int, env: Mapping[str, str]) -> dict[str, Any]:
    rules = keys(KeyRules() for _ in range(5))
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-bench-") as folder,
        Upstream(rules, log_calls=False) as upstream,
    ):
        file = write_file(Path(folder), tasks)
        try:
            with serving(upstream, env) as service:
                begin_s = time.monotonic()
                job_id = submit_file(service, file)
                submitted_s = time.monotonic()
                service.wait_finished(job_id, RUN_TIMEOUT_S)
                end_s = time.monotonic()
                right = check_results(service, job_id)
                service.terminate()  # a killed one would own the database for a while
        except (ServiceExited, TimeoutError) as error:
            return {"failure": str(error).strip().splitlines()[-1][:200]}
    return {
        "tasks_per_s": tasks / (end_s - begin_s),
        "submit_per_s": tasks / (submitted_s - begin_s),
        "lost_or_wrong": tasks - right,
    }


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    names = [name for name in repetitions[0]["databases"] if name != SQLITE]
    if not names:
        return [Row("databases: tasks/s ÷ SQLite's", f"≥ {WANTED:g}", f"skipped: {URLS} names no database")]
    return [_row(name, repetitions) for name in names]


def _row(name: str, repetitions: list[dict[str, Any]]) -> Row:
    what = f"databases: tasks/s of {name} ÷ SQLite's; tasks lost or wrong"
    wanted = f"≥ {WANTED:g}; 0"
    both = [(each["databases"][name], each["databases"][SQLITE]) for each in repetitions]
    failure = next((each["failure"] for pair in both for each in pair if "failure" in each), None)
    if failure is not None:
        return Row(what, wanted, f"failed: {failure}", reached=False)
    ratio = Spread.of(theirs["tasks_per_s"] / sqlite["tasks_per_s"] for theirs, sqlite in both)
    per_s = Spread.of(theirs["tasks_per_s"] for theirs, _ in both)
    lost = max(each["lost_or_wrong"] for pair in both for each in pair)
    told = f"{ratio.text()} ({per_s.text('/s')}); {lost}"
    return judged(what, wanted, told, [ratio.median >= WANTED, lost == 0])
