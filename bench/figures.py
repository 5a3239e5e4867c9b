"""Figures from repeated runs: medians with their range, percentiles, and how they are written. Pure."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some runs, and the lowest and highest of them."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises ValueError for no values."""
        known = sorted(values)
        if not known:
            raise ValueError("nothing was measured")
        return cls(statistics.median(known), known[0], known[-1])

    def text(self, unit: str = "", scale: float = 1.0) -> str:
        """`3.1 s (2.9–3.4)`; without a range where it would say nothing. Values are multiplied by `scale`."""
        median, lowest, highest = (
            number(value * scale) for value in (self.median, self.lowest, self.highest)
        )
        spread = f" ({lowest}–{highest})" if lowest != highest else ""
        return f"{median}{unit}{spread}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed (nearest rank).

    Raises ValueError for no values, or a share outside 0…1.
    """
    if not values or not 0.0 <= share <= 1.0:
        raise ValueError("a percentile needs values, and a share from 0 to 1")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def number(value: float) -> str:
    """About three figures: 1,234 · 87.5 · 3.14 · 0.042."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}".removesuffix(".0")
    decimals = 2 if abs(value) >= 0.1 else 3
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")
