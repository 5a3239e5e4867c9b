"""One job of a million tasks, from its upload to its results: memory, speed, a neighbour, a crash in the middle.

The phases follow each other on one service and one database, as they would.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.bare import bare_insert_s
from bench.figures import Spread, number, percentile
from bench.neighbour import Neighbour
from bench.ours import Refused, serving
from bench.race import keys
from bench.report import Row, judged
from bench.watch import Sample, Watch, usage_of
from bench.work import MODEL, expected_answer
from tests.service import Service
from tests.upstream import KeyRules, Upstream

TASKS, LEAST_TASKS = 1_000_000, 2_000
LATENCY_S = 0.02  # until the job runs: the neighbour's, alone and beside
EVERY_S, ALONE = 0.2, 60
FIRST_TENTH, LAST_TENTH = (0.02, 0.12), (0.89, 0.99)  # without the warm-up and the last few
BESIDE_RUN = (0.15, 0.25)
RESTART_AT, NEARLY = 0.5, 0.985
SUBMIT_TIMEOUT_S, RUN_TIMEOUT_S, FIRST_CALL_TIMEOUT_S = 600.0, 3_600.0, 120.0
WANTED_MB, WANTED_RESULTS_MB = 250.0, 20.0
WANTED_SUBMIT, WANTED_BESIDE, WANTED_STEADY, WANTED_RESTART_S = 0.4, 3.0, 0.9, 5.0


def run(scale: float) -> dict[str, Any]:
    tasks = max(LEAST_TASKS, int(TASKS * scale))
    rules = keys(KeyRules(latency_s=LATENCY_S) for _ in range(5))
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-bench-") as folder,
        Upstream(rules, log_calls=False) as upstream,
        serving(upstream) as service,
    ):
        found: dict[str, Any] = {"tasks": tasks, "load_before": os.getloadavg()[0]}
        file = write_file(Path(folder), tasks)
        neighbour = Neighbour(service, EVERY_S)
        found["alone_s"] = neighbour.alone_s(max(5, int(ALONE * min(1.0, scale))))
        named = [(f"task-{place}", json.dumps(_text(place))) for place in range(tasks)]
        found["bare_s"] = bare_insert_s(named, Path(folder))
        del named
        with Watch(service.pid, upstream) as watch:
            answered = _Answered(upstream)  # before the first call, though the neighbour's count too
            begin_s = time.monotonic()
            with neighbour.at_work() as taken_s:
                job_id = submit_file(service, file)
                found["submit_s"] = time.monotonic() - begin_s
            found["beside_submit_s"] = taken_s
            found["submit_cpu_s"] = watch.cpu_s(begin_s, time.monotonic())
            for key in rules:
                upstream.set_key(key, latency_s=0.0)
            answered.wait_for(tasks * BESIDE_RUN[0])
            with neighbour.at_work() as taken_s:
                answered.wait_for(tasks * BESIDE_RUN[1])
            found["beside_run_s"] = taken_s
            answered.wait_for(tasks * RESTART_AT)
        _say(f"{tasks} tasks: submitted in {found['submit_s']:.1f} s (bare: {found['bare_s']:.1f} s)")
        first = pace(watch.samples, tasks, *FIRST_TENTH)
        found |= _restart(service, upstream, job_id)
        with Watch(service.pid, upstream) as second_watch:
            # The service itself is not asked meanwhile: that took a third of it.
            answered.wait_for(tasks * NEARLY)
            job = service.wait_finished(job_id, RUN_TIMEOUT_S)
        last = pace(second_watch.samples, tasks, *LAST_TENTH)
        found |= {"status": job["status"], "first_tenth": first, "last_tenth": last}
        found["peak_rss_bytes"] = max(watch.peak_rss_bytes(), second_watch.peak_rss_bytes())
        found |= _results(service, job_id, tasks)
        found["database_bytes"] = sum(path.stat().st_size for path in service.data_dir.glob("*.sqlite3*"))
    _say(
        f"{found['status']}, {found['peak_rss_bytes'] / 1e6:.0f} MB; at the start {first}, at the end {last}"
    )
    return found


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _text(place: int) -> str:
    return f"Translate to French: sentence {place}"


def write_file(folder: Path, tasks: int) -> Path:
    """So many tasks as gzipped JSONL."""
    path = folder / "tasks.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=6) as file:
        for place in range(tasks):
            file.write(json.dumps({"id": f"task-{place}", "text": _text(place)}) + "\n")
    return path


def submit_file(service: Service, path: Path) -> str:
    """The job's id; Refused where it is not taken."""
    headers = {"Content-Type": "application/jsonl", "Content-Encoding": "gzip", "Prefer": "respond-async"}
    with path.open("rb") as file:
        reply = service.post(
            "/jobs",
            service.admin,
            data=file,
            headers=headers,
            params={"model": MODEL},
            timeout=SUBMIT_TIMEOUT_S,
        )
    if reply.status_code != 202:
        raise Refused(reply)
    return str(reply.json()["id"])


class _Answered:
    """What the upstream has answered since now."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._before = self._count()

    def _count(self) -> int:
        return sum(key["by_status"].get(200, 0) for key in self._upstream.counters().values())

    def wait_for(self, count: float) -> None:
        deadline_s = time.monotonic() + RUN_TIMEOUT_S
        while self._count() - self._before < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not {count:g} answers within {RUN_TIMEOUT_S:g} s")
            time.sleep(0.02)


def pace(samples: Sequence[Sample], tasks: int, begin: float, end: float) -> dict[str, float] | None:
    """Tasks a second and CPU a task between two shares of all tasks; None if that was not seen.

    Between the looks around them, since a fast end may leave time for no other.
    """
    before = [sample for sample in samples if sample.answered <= begin * tasks]
    after = [sample for sample in samples if sample.answered >= end * tasks]
    if not before or not after:
        return None
    first, last = before[-1], after[0]
    answered = last.answered - first.answered
    return {
        "tasks_per_s": answered / (last.at_s - first.at_s),
        "cpu_ms": 1000.0 * (last.usage.cpu_s - first.usage.cpu_s) / answered,
    }


def _restart(service: Service, upstream: Upstream, job_id: str) -> dict[str, float | None]:
    """Kill it, start it again, and wait for its first call; None if no task was left for one."""
    service.kill()
    upstream.wait_until_idle()
    before, begin_s = _calls(upstream), time.monotonic()
    service.launch()
    ready_s = called_s = None
    while ready_s is None or called_s is None:
        if called_s is None and _calls(upstream) > before:
            called_s = time.monotonic()
        if ready_s is None and service.is_ready():
            ready_s = time.monotonic()
            if service.job(job_id, results=False)["finished_at"] is not None:
                break
        if time.monotonic() > begin_s + FIRST_CALL_TIMEOUT_S:
            raise TimeoutError(f"no call within {FIRST_CALL_TIMEOUT_S:g} s after a restart")
        time.sleep(0.01)
    if ready_s is None or called_s is None:
        return {"restart_s": None, "ready_to_call_s": None}
    return {"restart_s": called_s - begin_s, "ready_to_call_s": max(0.0, called_s - ready_s)}


def _calls(upstream: Upstream) -> int:
    return sum(key["calls"] for key in upstream.counters().values())


def _results(service: Service, job_id: str, tasks: int) -> dict[str, Any]:
    """The results as JSONL: what streaming them took."""
    before = usage_of(service.pid).rss_bytes
    begin_s = time.monotonic()
    with Watch(service.pid) as watch:
        right = check_results(service, job_id)
    return {
        "lost_or_wrong": tasks - right,
        "results_s": time.monotonic() - begin_s,
        "results_more_bytes": watch.peak_rss_bytes() - before,
    }


def check_results(service: Service, job_id: str) -> int:
    """Read the results of a job from `write_file`, and check each; how many are right, in their places."""
    right = 0
    path = f"/jobs/{job_id}/results?format=jsonl"
    with service.get(path, service.admin, stream=True, timeout=SUBMIT_TIMEOUT_S) as reply:
        for place, line in enumerate(reply.iter_lines(chunk_size=1 << 16)):
            result = json.loads(line)
            right += result["id"] == f"task-{place}" and result["result"] == expected_answer(_text(place))
    return right


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    def spread(figure: Callable[[dict[str, Any]], float]) -> Spread:
        return Spread.of(map(figure, repetitions))

    count = number(min(each["tasks"] for each in repetitions))
    peak = spread(lambda each: each["peak_rss_bytes"] / 1e6)
    submit = spread(lambda each: each["bare_s"] / each["submit_s"])
    results = spread(lambda each: each["results_more_bytes"] / 1e6)
    lost = max(each["lost_or_wrong"] for each in repetitions)
    return [
        judged(
            f"million: memory at most, {count} tasks",
            f"≤ {WANTED_MB:g} MB",
            peak.text(" MB"),
            [peak.median <= WANTED_MB],
        ),
        judged("million: tasks lost or wrong", "0", str(lost), [lost == 0]),
        judged(
            "million: tasks/s of the submit ÷ of a bare executemany",
            f"≥ {WANTED_SUBMIT:g}",
            f"{submit.text()} ({spread(lambda each: each['tasks'] / each['submit_s']).text('/s')})",
            [submit.median >= WANTED_SUBMIT],
        ),
        _beside(repetitions, "beside_submit_s", "the submit", is_judged=True),
        _beside(repetitions, "beside_run_s", "the run without latency", is_judged=False),
        *_steady(repetitions),
        _restarted(repetitions),
        judged(
            "million: memory while its results are read",
            f"+ ≤ {WANTED_RESULTS_MB:g} MB",
            f"+ {results.text(' MB')}",
            [results.median <= WANTED_RESULTS_MB],
        ),
        Row(
            "million: results a second; database a task",
            "–",
            f"{spread(lambda each: each['tasks'] / each['results_s']).text('/s')}; "
            f"{spread(lambda each: each['database_bytes'] / each['tasks']).text(' bytes')}",
        ),
    ]


def _beside(repetitions: list[dict[str, Any]], name: str, beside: str, *, is_judged: bool) -> Row:
    what = f"million: p95 of a 3-task inline job beside {beside} ÷ alone"
    ratio = Spread.of(
        percentile(each[name], 0.95) / percentile(each["alone_s"], 0.95) for each in repetitions
    )
    jobs = min(len(each[name]) for each in repetitions)
    told = f"{ratio.text()} (of {jobs} jobs or more)"
    if not is_judged:
        return Row(what, "–", told)
    return judged(what, f"≤ {WANTED_BESIDE:g}", told, [ratio.median <= WANTED_BESIDE])


def _steady(repetitions: list[dict[str, Any]]) -> list[Row]:
    what = "million: tasks/s at the end ÷ at the start"
    seen = [each for each in repetitions if each["first_tenth"] and each["last_tenth"]]
    if not seen:
        return [Row(what, f"≥ {WANTED_STEADY:g}", "over too soon", reached=False)]
    ratio = Spread.of(each["last_tenth"]["tasks_per_s"] / each["first_tenth"]["tasks_per_s"] for each in seen)
    per_s = Spread.of(each["last_tenth"]["tasks_per_s"] for each in seen)
    cpu = Spread.of(each["last_tenth"]["cpu_ms"] / each["first_tenth"]["cpu_ms"] for each in seen)
    return [
        judged(
            what,
            f"≥ {WANTED_STEADY:g}",
            f"{ratio.text()} ({per_s.text('/s')} at the end)",
            [ratio.median >= WANTED_STEADY],
        ),
        Row("million: CPU a task at the end ÷ at the start", "–", cpu.text()),
    ]


def _restarted(repetitions: list[dict[str, Any]]) -> Row:
    what = "million: from the start to the first call, killed in the middle (from ready)"
    seen = [each for each in repetitions if each["restart_s"] is not None]
    if not seen:
        return Row(what, f"≤ {WANTED_RESTART_S:g} s", "nothing was left to call", reached=False)
    whole = Spread.of(each["restart_s"] for each in seen)
    wait = Spread.of(each["ready_to_call_s"] for each in seen)
    return judged(
        what,
        f"≤ {WANTED_RESTART_S:g} s",
        f"{whole.text(' s')} ({wait.text(' s')})",
        [whole.median <= WANTED_RESTART_S],
    )
