"""From a thousand tasks to a hundred thousand: time a task, memory, the size of the database."""

import json
import sys
import time
from typing import Any

import requests

from bench.figures import Spread, number
from bench.ours import serving
from bench.race import keys
from bench.report import Row, judged
from bench.watch import Watch
from bench.work import MODEL, expected_answer
from tests.service import Service
from tests.upstream import KeyRules, Upstream

SIZES = (1_000, 10_000, 100_000)
WANTED_MB = 60.0
JOB_TIMEOUT_S = 1_200.0


def run(scale: float) -> dict[str, Any]:
    sizes = []
    for size in SIZES:
        measured = _one_size(max(10, int(size * scale)))
        print(
            f"  {measured['tasks']} tasks: {measured['wall_s']:.1f} s, "
            f"{measured['peak_rss_bytes'] / 1e6:.0f} MB, database {measured['database_bytes'] / 1e6:.1f} MB",
            file=sys.stderr,
            flush=True,
        )
        sizes.append(measured)
    return {"sizes": sizes}


def _one_size(size: int) -> dict[str, Any]:
    texts = [f"Translate to French: sentence {n}" for n in range(size)]
    with (
        Upstream(keys(KeyRules() for _ in range(5)), log_calls=False) as upstream,
        serving(upstream) as service,
    ):
        with Watch(service.pid) as watch:
            begin_s = time.monotonic()
            form, job_id = _submit(service, texts)
            submitted_s = time.monotonic()
            job = service.wait_finished(job_id, JOB_TIMEOUT_S)
            end_s = time.monotonic()
            right = _right_answers(service, job_id, texts)
        stored = [path.stat().st_size for path in service.data_dir.glob("*.sqlite3*")]
    return {
        "tasks": size,
        "form": form,
        "status": job["status"],
        "lost_or_wrong": size - right,
        "submit_s": submitted_s - begin_s,
        "wall_s": end_s - begin_s,
        "peak_rss_bytes": watch.peak_rss_bytes(),
        "cpu_s": watch.cpu_s(begin_s, end_s),
        "database_bytes": sum(stored),
    }


def _submit(service: Service, texts: list[str]) -> tuple[str, str]:
    """The form that was taken, and the job's id: a line a task where the service takes that, else one JSON."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    headers = {"Content-Type": "application/jsonl", "Prefer": "respond-async"}
    reply = service.post(
        "/jobs", service.admin, data=lines, headers=headers, params={"model": MODEL}, timeout=300.0
    )
    if reply.status_code == 202:
        return "jsonl", _id_of(reply)
    reply = service.submit(texts, {"model": MODEL}, timeout_s=300.0, prefer="respond-async")
    return "json", _id_of(reply)


def _id_of(reply: requests.Response) -> str:
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def _right_answers(service: Service, job_id: str, texts: list[str]) -> int:
    path = f"/jobs/{job_id}/results?format=jsonl"
    with service.get(path, service.admin, stream=True, timeout=300.0) as reply:
        results = (json.loads(line) for line in reply.iter_lines())
        return sum(
            result["result"] == expected_answer(text) for result, text in zip(results, texts, strict=False)
        )


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    sizes = [repetition["sizes"] for repetition in repetitions]
    smallest, largest = sizes[0][0]["tasks"], sizes[0][-1]["tasks"]
    grown = Spread.of((each[-1]["peak_rss_bytes"] - each[0]["peak_rss_bytes"]) / 1e6 for each in sizes)
    peak = Spread.of(each[-1]["peak_rss_bytes"] / 1e6 for each in sizes)
    slower = Spread.of(
        (each[-1]["wall_s"] / each[-1]["tasks"]) / (each[0]["wall_s"] / each[0]["tasks"]) for each in sizes
    )
    stored = Spread.of(each[-1]["database_bytes"] / each[-1]["tasks"] for each in sizes)
    lost = max(size["lost_or_wrong"] for each in sizes for size in each)
    span = f"from {number(smallest)} to {number(largest)} tasks"
    return [
        judged(
            f"growth: memory, {span}",
            f"≤ {WANTED_MB:g} MB more",
            f"{grown.text(' MB')} more, {peak.text(' MB')} at most",
            [grown.median <= WANTED_MB],
        ),
        judged("growth: tasks lost or wrong", "0", str(lost), [lost == 0]),
        Row(f"growth: time a task, {span}", "–", f"{slower.text()} times"),
        Row(f"growth: database a task, at {number(largest)}", "–", stored.text(" bytes")),
    ]
