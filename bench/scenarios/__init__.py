"""The scenarios: each has `run`, one repetition as plain values, and `rows`, the table's lines from all repetitions.

`rows` is pure: it gets what `run` gave, as it comes back from JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report import Row
from bench.scenarios import (
    crowd,
    databases,
    edges,
    fairness,
    faults,
    growth,
    limits,
    million,
    overhead,
    packing,
)

Repetition = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run(scale)`: one repetition, with so large a part of the work."""

    name: str
    run: Callable[[float], Repetition]
    rows: Callable[[list[Repetition]], list[Row]]
    on_demand: bool = False
    """Whether it takes so long that it only runs where it is named."""


SCENARIOS = (
    Scenario("overhead", overhead.run, overhead.rows),
    Scenario("limits", limits.run, limits.rows),
    Scenario("faults", faults.run, faults.rows),
    Scenario("fairness", fairness.run, fairness.rows),
    Scenario("packing", packing.run, packing.rows),
    Scenario("growth", growth.run, growth.rows),
    Scenario("edges", edges.run, edges.rows),
    Scenario("million", million.run, million.rows, on_demand=True),
    Scenario("crowd", crowd.run, crowd.rows, on_demand=True),
    Scenario("databases", databases.run, databases.rows, on_demand=True),
)
