"""Every key at its limit: five keys of different size, one of them bound by tokens, from a cold start."""

from typing import Any

from bench import contestants
from bench.figures import Spread
from bench.ideal import KeyLimits, limited_s
from bench.ours import NAME
from bench.race import Result, failure_of, figure_text, keys, peers_text, race, spread_of
from bench.report import Row, judged
from bench.work import Work
from tests.upstream import KeyRules

REQUESTS_PER_MINUTE = (300, 300, 600, 900, 1500)
TASKS_PER_MINUTE = (300, 300, 600, 900, 1000)
"""What the keys can do in all: the last one is bound by its tokens."""
TASK_TOKENS = 50
BUCKET_S = 15.0
LATENCY_S = 0.3
WORK_S = 40.0
IN_FLIGHT = 100
PEERS = (
    contestants.OPENAI_THREADS,
    contestants.OPENAI_ASYNC,
    contestants.ROUTER,
    contestants.ROUTER_BY_USAGE,
    contestants.PROXY,
    contestants.BARE,
)
WANTED_SHARE = 0.97
WANTED_REFUSALS = 2.0


def text(number: int) -> str:
    """A task of exactly TASK_TOKENS, as the endpoint counts them."""
    start = f"Summarise in one sentence, number {number}: "
    return start + "x" * (4 * TASK_TOKENS - len(start))


def run(scale: float) -> dict[str, Any]:
    """A smaller scale has shorter buckets and less work, in proportion."""
    bucket_s = BUCKET_S * scale
    count = int(sum(TASKS_PER_MINUTE) / 60 * (bucket_s + WORK_S * scale))
    tokens = [None, None, None, None, TASKS_PER_MINUTE[-1] * TASK_TOKENS]
    limits = [
        KeyLimits(requests, of_tokens, bucket_s)
        for requests, of_tokens in zip(REQUESTS_PER_MINUTE, tokens, strict=True)
    ]
    rules = keys(
        KeyRules(
            rpm=limit.requests_per_minute, tpm=limit.tokens_per_minute, bucket_s=bucket_s, latency_s=LATENCY_S
        )
        for limit in limits
    )
    work = Work(
        tasks={f"task-{number}": text(number) for number in range(count)},
        in_flight=IN_FLIGHT,
        deadline_s=60.0,
        sdk_retries=5,
        requests_per_minute=dict(zip(rules, TASKS_PER_MINUTE, strict=True)),
        bucket_s=bucket_s,
    )
    results = race(work, rules, PEERS)
    return {
        "ideal_s": limited_s(limits, count, TASK_TOKENS, LATENCY_S),
        "results": [result.to_json() for result in results],
    }


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    ideal_s = repetitions[0]["ideal_s"]
    races = [repetition["results"] for repetition in repetitions]
    share = spread_of(races, NAME, lambda result: ideal_s / result["wall_s"])
    refusals = spread_of(races, NAME, refusals_a_thousand)
    lost = spread_of(races, NAME, lost_or_wrong)
    shares = peers_text(races, lambda name: _share_text(races, name, ideal_s))
    what, wanted = "limits: share of the best possible time", f"≥ {100 * WANTED_SHARE:g} %"
    if share is None or refusals is None or lost is None:
        return [Row(what, wanted, failure_of(races, NAME), shares, False)]
    return [
        judged(what, wanted, _percent(share), [share.median >= WANTED_SHARE], shares),
        judged(
            "limits: 429s per 1,000 tasks; tasks lost or wrong",
            f"≤ {WANTED_REFUSALS:g}; 0",
            f"{refusals.text()}; {lost.highest:g}",
            [refusals.median <= WANTED_REFUSALS, lost.highest == 0],
            peers_text(races, lambda name: _refusals_text(races, name)),
        ),
    ]


def refusals_a_thousand(result: Result) -> float:
    return 1000.0 * float(result["rate_limited"]) / float(result["tasks"])


def lost_or_wrong(result: Result) -> float:
    return float(result["lost"] + result["wrong"])


def _percent(share: Spread) -> str:
    return share.text(" %", 100.0)


def _share_text(races: list[list[Result]], name: str, ideal_s: float) -> str | None:
    return figure_text(races, name, lambda result: ideal_s / result["wall_s"], " %", 100.0)


def _refusals_text(races: list[list[Result]], name: str) -> str | None:
    refusals, lost = spread_of(races, name, refusals_a_thousand), spread_of(races, name, lost_or_wrong)
    return f"{refusals.text()}, {lost.text()} lost" if refusals and lost else None
