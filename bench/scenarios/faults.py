"""An endpoint that fails: errors, resets, silence, a refused key, and one that runs out of quota."""

from collections.abc import Sequence
from typing import Any

from bench import contestants
from bench.ideal import concurrent_s, lognormal_mean_s
from bench.ours import NAME
from bench.race import Result, failure_of, figure_text, keys, peers_text, race, spread_of
from bench.report import Row, judged
from bench.work import Measured, Work
from tests.upstream import Call, KeyRules, Upstream

TASKS = 2_000
KEYS = 5
LATENCY_S, SIGMA = 0.4, 0.4
P_500, P_RESET, P_HANG = 0.05, 0.02, 0.01
EXHAUSTED_AFTER = 200
IN_FLIGHT = 100
DEADLINE_S = 4.0
REFUSED_KEY, EXHAUSTED_KEY = "sk-bench-key-0", "sk-bench-key-1"
PEERS = (contestants.OPENAI_THREADS, contestants.OPENAI_ASYNC, contestants.ROUTER, contestants.PROXY)
WANTED_RATIO = 1.7
WANTED_REFUSED, WANTED_EXHAUSTED = 5, 10


def run(scale: float) -> dict[str, Any]:
    count = int(TASKS * scale)
    rules = [
        KeyRules(latency_s=LATENCY_S, latency_sigma=SIGMA, p_500=P_500, p_reset=P_RESET, p_hang=P_HANG)
        for _ in range(KEYS - 2)
    ]
    exhausted = KeyRules(**{**rules[0].to_json(), "exhausted_after": max(1, int(EXHAUSTED_AFTER * scale))})
    work = Work(
        tasks={f"task-{number}": f"Say {number} in words" for number in range(count)},
        in_flight=IN_FLIGHT,
        deadline_s=DEADLINE_S,
    )
    results = race(
        work,
        keys([KeyRules(refused=True), exhausted, *rules]),
        PEERS,
        env={"GPT_DEADLINE_S": f"{DEADLINE_S:g}", "GPT_MAX_IN_FLIGHT": str(IN_FLIGHT)},
        look=_look,
        log_calls=True,
        log_size=100_000,
    )
    ideal_s = concurrent_s(count, lognormal_mean_s(LATENCY_S, SIGMA), IN_FLIGHT)
    return {"ideal_s": ideal_s, "results": [result.to_json() for result in results]}


def _look(upstream: Upstream, result: Measured) -> None:
    result.extra["most_in_flight"] = most_in_flight(upstream.calls())


def most_in_flight(calls: Sequence[Call]) -> int:
    """The most calls that ran at one moment."""
    changes = [(call.started_at, 1) for call in calls]
    changes += [(call.ended_at, -1) for call in calls if call.ended_at is not None]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    ideal_s = repetitions[0]["ideal_s"]
    races = [repetition["results"] for repetition in repetitions]
    ratio = spread_of(races, NAME, lambda result: result["wall_s"] / ideal_s)
    lost = spread_of(races, NAME, _lost_or_wrong)
    refused = spread_of(races, NAME, calls_refused)
    exhausted = spread_of(races, NAME, calls_after_exhaustion)
    what, wanted = f"faults: tasks lost; wall ÷ ideal ({ideal_s:.1f} s)", f"0; ≤ {WANTED_RATIO}"
    peers = peers_text(races, lambda name: _peer_text(races, name, ideal_s))
    if ratio is None or lost is None or refused is None or exhausted is None:
        return [Row(what, wanted, failure_of(races, NAME), peers, False)]
    return [
        judged(
            what,
            wanted,
            f"{lost.highest:g}; {ratio.text()}",
            [lost.highest == 0, ratio.median <= WANTED_RATIO],
            peers,
        ),
        judged(
            "faults: calls on the refused key; on the exhausted key after its end",
            f"≤ {WANTED_REFUSED}; ≤ {WANTED_EXHAUSTED}",
            f"{refused.text()}; {exhausted.text()}",
            [refused.median <= WANTED_REFUSED, exhausted.median <= WANTED_EXHAUSTED],
            peers_text(races, lambda name: _dead_keys_text(races, name)),
        ),
        Row(
            "faults: most calls in flight at one moment",
            f"about {IN_FLIGHT}",
            figure_text(races, NAME, _most_in_flight) or "–",
            peers_text(races, lambda name: figure_text(races, name, _most_in_flight)),
        ),
    ]


def calls_refused(result: Result) -> float:
    return float(result["calls_by_key"].get(REFUSED_KEY, 0))


def calls_after_exhaustion(result: Result) -> float:
    return float(result["codes_by_key"].get(EXHAUSTED_KEY, {}).get("insufficient_quota", 0))


def _lost_or_wrong(result: Result) -> float:
    return float(result["lost"] + result["wrong"])


def _most_in_flight(result: Result) -> float:
    return float(result["extra"]["most_in_flight"])


def _peer_text(races: list[list[Result]], name: str, ideal_s: float) -> str | None:
    lost = spread_of(races, name, _lost_or_wrong)
    ratio = spread_of(races, name, lambda result: result["wall_s"] / ideal_s)
    return f"{lost.text()} lost, {ratio.text()}" if lost and ratio else None


def _dead_keys_text(races: list[list[Result]], name: str) -> str | None:
    refused, exhausted = spread_of(races, name, calls_refused), spread_of(races, name, calls_after_exhaustion)
    return f"{refused.text()}, {exhausted.text()}" if refused and exhausted else None
