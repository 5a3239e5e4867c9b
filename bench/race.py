"""One repetition of a race: every contestant in turn, each on a fresh fake OpenAI; and how races are compared."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.contestants import Peer, run_peer
from bench.figures import Spread
from bench.ours import NAME, run_ours
from bench.work import Measured, Work
from tests.service import Env
from tests.upstream import KeyRules, Upstream

Result = dict[str, Any]
"""A `Measured` as it comes back from JSON."""


def keys(rules: Iterable[KeyRules]) -> dict[str, KeyRules]:
    """API keys of different organisations."""
    return {f"sk-bench-key-{number}": rule for number, rule in enumerate(rules)}


def race(
    work: Work,
    rules: Mapping[str, KeyRules],
    peers: Sequence[Peer],
    *,
    env: Env | None = None,
    look: Callable[[Upstream, Measured], None] = lambda _upstream, _result: None,
    **server: Any,
) -> list[Measured]:
    """Ours and every peer, one after the other. `look` may add to a result while its upstream is still there."""
    results = []
    for peer in (None, *peers):
        with Upstream(rules, **{"log_calls": False, **server}) as upstream:
            load = os.getloadavg()[0]
            result = run_ours(work, upstream, env) if peer is None else run_peer(peer, work, upstream)
            result.extra["load_before"] = load
            if result.failure is None:
                look(upstream, result)
        say(result)
        results.append(result)
    return results


def say(result: Measured) -> None:
    """One line on standard error, so that one sees it move."""
    if result.failure is not None:
        text = result.failure
    else:
        text = f"{result.wall_s:.2f} s, {result.tasks_per_s:.0f}/s, lost {result.lost}, wrong {result.wrong}"
    print(f"  {result.contestant:<30} {text}", file=sys.stderr, flush=True)


# Reading the results of several repetitions


def of(results: Sequence[Result], contestant: str) -> Result | None:
    """A contestant's result of one repetition, unless it failed."""
    found = next((result for result in results if result["contestant"] == contestant), None)
    return found if found is not None and found["failure"] is None else None


def pairs(races: Sequence[Sequence[Result]], one: str, other: str) -> Iterator[tuple[Result, Result]]:
    """Both contestants' results of each repetition in which neither failed."""
    for results in races:
        first, second = of(results, one), of(results, other)
        if first is not None and second is not None:
            yield first, second


def spread_of(
    races: Sequence[Sequence[Result]], contestant: str, figure: Callable[[Result], float]
) -> Spread | None:
    """A figure of a contestant over all repetitions; None where it never got through."""
    values = [figure(result) for results in races if (result := of(results, contestant)) is not None]
    return Spread.of(values) if values else None


def contestants(races: Sequence[Sequence[Result]]) -> list[str]:
    """The peers' names, in their order."""
    names = [result["contestant"] for results in races for result in results]
    return [name for name in dict.fromkeys(names) if name != NAME]


def peers_text(
    races: Sequence[Sequence[Result]], text: Callable[[str], str | None], names: Iterable[str] | None = None
) -> str:
    """`name figure; name figure`, or why a peer has none."""
    parts = []
    for name in contestants(races) if names is None else names:
        told = text(name)
        parts.append(f"{name} {told if told is not None else failure_of(races, name)}")
    return "; ".join(parts) or "–"


def failure_of(races: Sequence[Sequence[Result]], contestant: str) -> str:
    """Why a contestant has no figure."""
    failures = [
        result["failure"] for results in races for result in results if result["contestant"] == contestant
    ]
    return f"failed: {next(filter(None, failures), 'not run')}"


def figure_text(
    races: Sequence[Sequence[Result]],
    contestant: str,
    figure: Callable[[Result], float],
    unit: str = "",
    scale: float = 1.0,
) -> str | None:
    spread = spread_of(races, contestant, figure)
    return spread.text(unit, scale) if spread is not None else None
