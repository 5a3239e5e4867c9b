"""The best possible times, computed from what the fake OpenAI was told. Pure: values in, seconds out.

Nobody can be faster than these, whatever they know of the limits; a share of the best possible time is ideal ÷ actual.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may spend: buckets, full at first, that refill all the time and hold `bucket_s` seconds of refill."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    bucket_s: float = MINUTE_S

    def earliest_start_s(self, number: int, tokens: int) -> float:
        """When the call of this number (from 1) may be sent at the earliest, each spending so many tokens."""
        requests_s = _earliest_s(self.requests_per_minute, self.bucket_s, number, 1)
        return max(requests_s, _earliest_s(self.tokens_per_minute, self.bucket_s, number, tokens))


def _earliest_s(per_minute: int | None, bucket_s: float, number: int, cost: int) -> float:
    """A full bucket lets in a call that is larger than itself, and then owes."""
    if per_minute is None:
        return 0.0
    per_s = per_minute / MINUTE_S
    capacity = max(1.0, per_s * min(bucket_s, MINUTE_S))
    needed = (number - 1) * cost + min(float(cost), capacity)
    return max(0.0, (needed - capacity) / per_s)


def limited_s(keys: Sequence[KeyLimits], tasks: int, tokens: int, latency_s: float) -> float:
    """The least time for so many tasks of so many tokens each: the last one's earliest start, and its answer.

    Raises ValueError where there is no key.
    """
    if not keys:
        raise ValueError("no key, no answer")
    starts = [(key.earliest_start_s(1, tokens), place, 1) for place, key in enumerate(keys)]
    heapq.heapify(starts)
    last_s = 0.0
    for _ in range(tasks):
        last_s, place, number = starts[0]
        heapq.heapreplace(starts, (keys[place].earliest_start_s(number + 1, tokens), place, number + 1))
    return last_s + latency_s if tasks else 0.0


def lognormal_mean_s(median_s: float, sigma: float) -> float:
    """The mean of a lognormal time."""
    return median_s * math.exp(sigma * sigma / 2)


def concurrent_s(tasks: int, mean_latency_s: float, in_flight: int) -> float:
    """The time of so many tasks without any trouble, so many being in flight at every moment."""
    return tasks * mean_latency_s / in_flight
