"""OpenAI's rate limits: buckets that refill continuously, and the headers and words that tell about them.

Pure: the clock is passed in. What a refused call looks like on the wire is decided in `errors`.
Source: OpenAI's guide "Rate limits" (headers, units) and the texts of its 429 replies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, floor

from tests.upstream.rules import KeyRules

MINUTE_S = 60.0
DAY_S = 86_400.0
_ROUNDING = 1e-9


class Counted(StrEnum):
    """What ran out, in the words of OpenAI's message."""

    REQUESTS = "requests per min (RPM)"
    REQUESTS_A_DAY = "requests per day (RPD)"
    TOKENS = "tokens per min (TPM)"


@dataclass(frozen=True)
class Denied:
    """Why a call was not let in. `too_large`: no waiting helps, it exceeds the whole limit."""

    counted: Counted
    limit: int
    used: int
    requested: int
    retry_after_s: float
    too_large: bool = False


class Bucket:
    """An allowance of `limit` a window, refilled continuously; it holds `bucket_s` seconds of refill."""

    def __init__(self, limit: int, window_s: float, bucket_s: float, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._resize(limit, window_s, bucket_s)
        self._level = self.capacity
        self._told_s = now_s()

    def _resize(self, limit: int, window_s: float, bucket_s: float) -> None:
        self.limit = limit
        self.window_s = window_s
        self.per_second = limit / window_s
        self.capacity = max(1.0, self.per_second * min(bucket_s, window_s))

    def change(self, limit: int, window_s: float, bucket_s: float) -> None:
        """Takes another size from now on; what was used stays used."""
        used = self.used()
        self._resize(limit, window_s, bucket_s)
        self._level = self.capacity - used

    def _refill(self) -> float:
        now_s = self._now_s()
        if now_s > self._told_s:
            self._level = min(self.capacity, self._level + (now_s - self._told_s) * self.per_second)
            self._told_s = now_s
        return self._level

    def used(self) -> float:
        return self.capacity - self._refill()

    def wait_s(self, cost: int) -> float:
        """Seconds until `cost` is let in. A full bucket lets in more than it holds, and then owes."""
        missing = min(float(cost), self.capacity) - self._refill()
        return max(0.0, missing / self.per_second) if missing > _ROUNDING else 0.0

    def take(self, cost: int) -> None:
        self._level = self._refill() - cost

    def remaining(self) -> int:
        """What the header says: the limit less what is used, so that the headers tell the window."""
        return max(0, floor(self.limit - self.used() + _ROUNDING))

    def reset_s(self) -> float:
        """Seconds until nothing counts as used any more."""
        return self.used() / self.per_second


class Limits:
    """All the buckets of one organization, project and model."""

    def __init__(self, rules: KeyRules, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._day: Bucket | None = None
        self.change(rules)

    def change(self, rules: KeyRules) -> None:
        self._requests = self._changed(self._requests, rules.rpm, MINUTE_S, rules.bucket_s)
        self._tokens = self._changed(self._tokens, rules.tpm, MINUTE_S, rules.bucket_s)
        self._day = self._changed(self._day, rules.rpd, DAY_S, DAY_S)

    def _changed(
        self, bucket: Bucket | None, limit: int | None, window_s: float, bucket_s: float
    ) -> Bucket | None:
        if limit is None:
            return None
        if bucket is None:
            return Bucket(limit, window_s, bucket_s, self._now_s)
        bucket.change(limit, window_s, bucket_s)
        return bucket

    def admit(self, tokens: int) -> Denied | None:
        """Takes one request of so many tokens from every bucket, or takes nothing and says what ran out."""
        if self._tokens is not None and tokens > self._tokens.limit:
            return Denied(Counted.TOKENS, self._tokens.limit, 0, tokens, 0.0, too_large=True)
        asked = [
            (Counted.REQUESTS_A_DAY, self._day, 1),
            (Counted.REQUESTS, self._requests, 1),
            (Counted.TOKENS, self._tokens, tokens),
        ]
        for counted, bucket, cost in asked:
            if bucket is not None and (wait_s := bucket.wait_s(cost)):
                return Denied(counted, bucket.limit, ceil(bucket.used() - _ROUNDING), cost, wait_s)
        for _, bucket, cost in asked:
            if bucket is not None:
                bucket.take(cost)
        return None

    def headers(self) -> dict[str, str]:
        headers = {}
        for name, bucket in (("requests", self._day or self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining())
                headers[f"x-ratelimit-reset-{name}"] = format_duration(bucket.reset_s())
        return headers


def format_duration(seconds: float) -> str:
    """As OpenAI prints it: "0s", "6ms", "1s", "8.64s", "6m0s", "1h2m3s"."""
    milliseconds = ceil(seconds * 1000 - _ROUNDING * 1000)
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, thousandths = divmod(milliseconds, 1000)
    text = f"{whole}.{thousandths:03}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
