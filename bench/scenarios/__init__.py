"""The scenarios: each has `run`, one repetition as plain values, and `rows`, the table's lines from all repetitions.

`rows` is pure: it gets what `run` gave, as it comes back from JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report import Row
from bench.scenarios import edges, fairness, faults, growth, limits, overhead, packing

Repetition = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run(scale)`: one repetition, with so large a part of the work."""

    name: str
    run: Callable[[float], Repetition]
    rows: Callable[[list[Repetition]], list[Row]]


SCENARIOS = (
    Scenario("overhead", overhead.run, overhead.rows),
    Scenario("limits", limits.run, limits.rows),
    Scenario("faults", faults.run, faults.rows),
    Scenario("fairness", fairness.run, fairness.rows),
    Scenario("packing", packing.run, packing.rows),
    Scenario("growth", growth.run, growth.rows),
    Scenario("edges", edges.run, edges.rows),
)
