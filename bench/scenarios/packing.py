"""Short tasks with a long instruction in common, several a request and one a request, on keys with limits."""

from typing import Any

from bench.figures import Spread
from bench.ours import NAME, run_ours
from bench.race import keys, pairs, say
from bench.report import Row, judged
from bench.work import Work
from tests.upstream import KeyRules, Upstream

TASKS = 2_000
REQUESTS_PER_MINUTE = 600
LATENCY_S = 0.3
INSTRUCTIONS = (
    "You classify messages of customers of a shop. Answer with one word: order, return, payment, delivery or other. "
) * 12
PACKED = "packed"
WHAT = "packing: requests; prompt tokens, packed ÷ not"
WANTED = "≤ 1/10; ≤ 1/3"


def run(scale: float) -> dict[str, Any]:
    """With `unsupported` where the service refuses to pack."""
    rules = keys(
        KeyRules(rpm=REQUESTS_PER_MINUTE, bucket_s=15.0 * scale, latency_s=LATENCY_S) for _ in range(5)
    )
    work = Work(
        tasks={f"task-{number}": f"Where is parcel {number}?" for number in range(int(TASKS * scale))},
        in_flight=0,
        deadline_s=60.0,
        instructions=INSTRUCTIONS,
    )
    results = []
    for name in (PACKED, NAME):
        with Upstream(rules, log_calls=False) as upstream:
            result = run_ours(work, upstream, settings={"pack": True} if name == PACKED else None)
        result.contestant = name
        say(result)
        results.append(result)
        if result.failure is not None and result.failure.startswith("422"):
            return {"unsupported": result.failure, "results": []}
    return {"unsupported": None, "results": [result.to_json() for result in results]}


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    races = [repetition["results"] for repetition in repetitions]
    both = list(pairs(races, PACKED, NAME))
    if not both:
        unsupported = any(repetition["unsupported"] for repetition in repetitions)
        return [Row(WHAT, WANTED, "not supported yet" if unsupported else "failed", reached=False)]
    requests = Spread.of(
        sum(packed["calls_by_key"].values()) / sum(single["calls_by_key"].values()) for packed, single in both
    )
    tokens = Spread.of(packed["prompt_tokens"] / single["prompt_tokens"] for packed, single in both)
    times = Spread.of(single["wall_s"] / packed["wall_s"] for packed, single in both)
    lost = max(packed["lost"] + packed["wrong"] for packed, _ in both)
    return [
        judged(
            WHAT,
            WANTED,
            f"{requests.text()}; {tokens.text()}",
            [requests.median <= 1 / 10, tokens.median <= 1 / 3],
        ),
        judged("packing: tasks lost or wrong", "0", str(lost), [lost == 0]),
        Row("packing: time not packed ÷ packed", "–", times.text()),
    ]
