"""What a task costs beside the waiting: an endpoint that answers at once and limits nothing."""

from typing import Any

from bench import contestants
from bench.figures import Spread
from bench.ours import NAME
from bench.race import Result, failure_of, figure_text, keys, pairs, peers_text, race
from bench.report import Row, judged
from bench.work import Work
from tests.upstream import KeyRules

TASKS = 5_000
IN_FLIGHT = 40
PEERS = (
    contestants.OPENAI_THREADS,
    contestants.OPENAI_ASYNC,
    contestants.ROUTER,
    contestants.PROXY,
    contestants.BARE,
)
BASE = contestants.OPENAI_THREADS.name
WANTED = 3.0


def run(scale: float) -> dict[str, Any]:
    tasks = {f"task-{n}": f"Translate to French: good morning, number {n}" for n in range(int(TASKS * scale))}
    work = Work(tasks=tasks, in_flight=IN_FLIGHT, deadline_s=60.0)
    results = race(work, keys(KeyRules() for _ in range(5)), PEERS)
    return {"results": [result.to_json() for result in results]}


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    races = [repetition["results"] for repetition in repetitions]
    speed = "overhead: tasks/s ÷ openai-python threads"
    peers = peers_text(races, lambda name: _text(_relative(races, name)))
    ours = _relative(races, NAME)
    if ours is None:
        return [Row(speed, f"≥ {WANTED}", failure_of(races, NAME), peers, False)]
    lost = [result["lost"] + result["wrong"] for result, _ in pairs(races, NAME, BASE)]
    return [
        judged(speed, f"≥ {WANTED}", ours.text(), [ours.median >= WANTED], peers),
        judged("overhead: tasks lost or wrong", "0", str(max(lost)), [max(lost) == 0]),
        Row(
            "overhead: CPU a task",
            "–",
            figure_text(races, NAME, _cpu_ms, " ms") or "–",
            peers_text(races, lambda name: figure_text(races, name, _cpu_ms, " ms")),
        ),
        Row(
            "overhead: memory at most",
            "–",
            figure_text(races, NAME, _memory_mb, " MB") or "–",
            peers_text(races, lambda name: figure_text(races, name, _memory_mb, " MB")),
        ),
    ]


def _relative(races: list[list[Result]], name: str) -> Spread | None:
    values = [base["wall_s"] / result["wall_s"] for result, base in pairs(races, name, BASE)]
    return Spread.of(values) if values else None


def _text(spread: Spread | None) -> str | None:
    return spread.text() if spread is not None else None


def _cpu_ms(result: Result) -> float:
    return 1000.0 * float(result["cpu_s"]) / float(result["tasks"])


def _memory_mb(result: Result) -> float:
    return float(result["peak_rss_bytes"]) / 1e6
