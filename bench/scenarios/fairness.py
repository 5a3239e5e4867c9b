"""A small job beside a large one: how much longer three tasks take while another user's twenty thousand run."""

import time
from typing import Any

from bench.figures import Spread, number, percentile
from bench.neighbour import small_job_s
from bench.ours import serving
from bench.race import keys
from bench.report import Row, judged
from bench.work import MODEL
from tests.upstream import KeyRules, Upstream

TASKS = 20_000
LATENCY_S = 0.3
ALONE = 60
WANTED = 3.0


def run(scale: float) -> dict[str, Any]:
    with (
        Upstream(keys(KeyRules(latency_s=LATENCY_S) for _ in range(5)), log_calls=False) as upstream,
        serving(upstream) as service,
    ):
        neighbour = service.user("b@example.org")
        alone_s = [small_job_s(service, neighbour, n) for n in range(max(5, int(ALONE * min(1.0, scale))))]
        tasks = [f"Translate to French: sentence {n}" for n in range(int(TASKS * scale))]
        begin_s = time.monotonic()
        reply = service.submit(tasks, {"model": MODEL}, timeout_s=300.0, prefer="respond-async")
        assert reply.status_code == 202, reply.text
        job_id = reply.json()["id"]
        beside_s: list[float] = []
        while True:
            took_s = small_job_s(service, neighbour, len(beside_s))
            job = service.job(job_id, results=False)
            if job["finished_at"] is not None:
                break  # the small job may have had the end of it for itself
            beside_s.append(took_s)
        wall_s = time.monotonic() - begin_s
    return {
        "alone_s": alone_s,
        "beside_s": beside_s,
        "large_job": job["status"],
        "large_job_tasks_per_s": len(tasks) / wall_s,
    }


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    what = "fairness: p95 of a 3-task inline job beside 20,000 tasks ÷ alone"
    both = [each for each in repetitions if each["beside_s"]]
    if not both:
        return [Row(what, f"≤ {WANTED:g}", "the large job was over too soon", reached=False)]
    ratio = Spread.of(percentile(each["beside_s"], 0.95) / percentile(each["alone_s"], 0.95) for each in both)
    medians = Spread.of(percentile(each["beside_s"], 0.5) / percentile(each["alone_s"], 0.5) for each in both)
    jobs = number(min(len(each["beside_s"]) for each in both))
    return [
        judged(what, f"≤ {WANTED:g}", f"{ratio.text()} (of {jobs} jobs or more)", [ratio.median <= WANTED]),
        Row("fairness: the same of the medians", "–", medians.text()),
    ]
