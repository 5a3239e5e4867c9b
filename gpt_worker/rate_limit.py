"""Pacing, learned from what the server says: one `Limiter` a quota group and model. Pure: the clock is passed in.

Requests and tokens are reserved before a call and settled after it. A reply's headers may only lower a bucket, less
what was sent since that call; it rises by refill alone, since replies overtake each other.
Source: OpenAI, "Rate limits", the headers x-ratelimit-{limit,remaining,reset}-{requests,tokens}.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

DEFAULT_WINDOW_S = 60.0
LONGEST_WINDOW_S = 86_400.0
FIRST_REST_S = 1.0
LONGEST_REST_S = 60.0
SAME_MOMENT_S = 0.25
SHORTEST_BURST_S = 1.0
BELIEVE_AGAIN_S = 600.0
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Bound(StrEnum):
    """What holds a call back."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    THREADS = "threads"


@dataclass(frozen=True, slots=True)
class Limit:
    """What one reply tells of one limit: how much in all, how much is left, and when it will be full again."""

    limit: int
    remaining: int
    reset_s: float | None


@dataclass(frozen=True, slots=True)
class LimitHeaders:
    """What one reply tells of the limits; None where it is silent."""

    requests: Limit | None = None
    tokens: Limit | None = None
    retry_after_s: float | None = None


def parse_duration_s(text: str) -> float | None:
    """Seconds of "1s", "120ms", "6m0s", "1h2m3.5s" or a bare number of seconds; None for anything else."""
    text = text.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(ms|s|m|h|d))+", text, re.ASCII):
        return None
    return sum(float(number) * UNIT_S[unit] for number, unit in re.findall(r"([\d.]+)(ms|s|m|h|d)", text))


def read_headers(headers: Mapping[str, str]) -> LimitHeaders:
    """The limits that a reply's headers (names in lower case) tell of; nonsense counts as silence."""
    retry_after_ms = parse_duration_s(headers.get("retry-after-ms", ""))
    retry_after_s = parse_duration_s(headers.get("retry-after", ""))
    return LimitHeaders(
        requests=_read_limit(headers, "requests"),
        tokens=_read_limit(headers, "tokens"),
        retry_after_s=retry_after_ms / 1000 if retry_after_ms is not None else retry_after_s,
    )


def _read_limit(headers: Mapping[str, str], name: str) -> Limit | None:
    limit, remaining = (
        headers.get(f"x-ratelimit-limit-{name}", ""),
        headers.get(f"x-ratelimit-remaining-{name}", ""),
    )
    if not (re.fullmatch(r"\d{1,12}", limit, re.ASCII) and re.fullmatch(r"-?\d{1,12}", remaining, re.ASCII)):
        return None
    if int(limit) <= 0:
        return None
    return Limit(
        int(limit), max(0, int(remaining)), parse_duration_s(headers.get(f"x-ratelimit-reset-{name}", ""))
    )


@dataclass(slots=True)
class Sent:
    """What a bucket had given in all when a short while ended; the calls of that while share it.

    In which order calls of one moment reach the server, nobody can tell: counting one of them as sent after another
    would count it twice where the other's reply has counted it already.
    """

    since_s: float
    total: float


@dataclass(slots=True)
class Bucket:
    """A limit as we keep it: `level` of `capacity` left, refilled at `per_s`.

    `floor` is what the server says is left when nothing is: it may tell a minute's limit and hold to a second's.
    """

    capacity: float
    level: float
    per_s: float
    updated_s: float
    limit: int = 0  # as the server tells it
    floor: int = 0
    refused_s: float = 0.0
    sent: float = 0.0  # all that was ever reserved, to know what was sent since a call
    mark: Sent = field(default_factory=lambda: Sent(-math.inf, 0.0))
    window_seen: float = 0.0  # the share of the bucket on which `per_s` rests; a larger share tells more

    def refill(self, now_s: float) -> None:
        if self.floor and now_s - self.refused_s > BELIEVE_AGAIN_S:
            self.floor, self.capacity = 0, self.limit
        self.level = min(self.capacity, self.level + (now_s - self.updated_s) * self.per_s)
        self.updated_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is there; 0 if it is. Never asks for more than the bucket holds."""
        self.refill(now_s)
        missing = min(amount, self.capacity) - self.level
        return 0.0 if missing <= 1e-9 else missing / self.per_s

    def take(self, amount: float, now_s: float) -> Sent:
        """Take what a call may spend; the mark tells later what was sent after it."""
        self.level -= min(amount, self.capacity)
        self.sent += amount
        if now_s - self.mark.since_s >= SAME_MOMENT_S:
            self.mark = Sent(now_s, self.sent)
        self.mark.total = self.sent
        return self.mark

    def learn(self, told: Limit, sent_since: float, took_s: float, now_s: float) -> None:
        """Heed a reply that left the server `took_s` after its call was sent, `sent_since` having been sent since."""
        if told.limit != self.limit:
            self.per_s *= told.limit / self.limit
            self.limit, self.capacity, self.floor = told.limit, told.limit, 0
            self.level = min(self.level, self.capacity)
            self.window_seen = 0.0
        used = told.limit - told.remaining
        share = used / told.limit
        if told.reset_s and used > 0 and share >= self.window_seen:
            window_s = min(LONGEST_WINDOW_S, max(1.0, told.reset_s * told.limit / used))
            self.per_s, self.window_seen = told.limit / window_s, share
        self.refill(now_s)
        self.level = min(self.level, told.remaining - self.floor + took_s * self.per_s - sent_since)

    def refused(self, told: Limit, now_s: float) -> None:
        """A call was refused for this limit, of which the server says that so much is left: it is in fact empty.

        No server is taken to hold to less than a second's share, and after a while it is believed again.
        """
        second = max(1, round(self.per_s * SHORTEST_BURST_S))
        self.floor = max(self.floor, min(told.remaining, told.limit - second))
        self.refused_s = now_s
        self.capacity = self.limit - self.floor
        self.level = min(self.level, 0.0)

    @classmethod
    def first(cls, told: Limit, now_s: float) -> "Bucket":
        bucket = cls(told.limit, told.remaining, told.limit / DEFAULT_WINDOW_S, now_s, told.limit)
        bucket.learn(told, 0.0, 0.0, now_s)
        return bucket


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one call was allowed to spend, and how much had been sent in all when it went; no mark: of no limit yet."""

    tokens: int
    sent_at_s: float
    requests_mark: Sent | None
    tokens_mark: Sent | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: after `seconds` (infinite: when a reply comes in), because of `bound`."""

    seconds: float
    bound: Bound | None


class Limiter:
    """One quota group's pace for one model."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.in_flight = 0
        self.window = (
            1  # calls in flight at once: 1 until the first reply, then it doubles with each round of replies
        )
        self.window_limit = math.inf  # learned by halving where the server tells no limits
        self.rest_until_s = 0.0
        self.rests_in_a_row = 0
        self.bound_by: Bound | None = None
        self.blocked = False  # whether somebody waits for a reply to make room
        self._ratio = 1.0  # true prompt tokens ÷ estimated ones
        self._completion_tokens = 0.0

    def cost(self, prompt_tokens: int, max_output_tokens: int | None) -> int:
        """Tokens to reserve: the corrected estimate, and the answer as long as answers have been."""
        output = max_output_tokens if max_output_tokens is not None else self._completion_tokens
        return max(1, round(prompt_tokens * self._ratio + output))

    def reserve(self, tokens: int, now_s: float) -> Reservation | Wait:
        """Reserve one request of so many tokens, or say how long to wait for it."""
        wait = self._wait(tokens, now_s)
        self.bound_by = wait.bound
        if wait.seconds > 0:
            self.blocked = self.blocked or math.isinf(wait.seconds)
            return wait
        if self.tokens:
            tokens = min(tokens, int(self.tokens.capacity))
        self.in_flight += 1
        return Reservation(
            tokens,
            now_s,
            self.requests.take(1, now_s) if self.requests else None,
            self.tokens.take(tokens, now_s) if self.tokens else None,
        )

    def _wait(self, tokens: int, now_s: float) -> Wait:
        if self.rest_until_s > now_s:
            return Wait(self.rest_until_s - now_s, Bound.REQUESTS)
        if self.in_flight >= min(self.window, self.window_limit):
            return Wait(math.inf, None if self.window_limit == math.inf else Bound.REQUESTS)
        requests_s = self.requests.wait_s(1, now_s) if self.requests else 0.0
        tokens_s = self.tokens.wait_s(tokens, now_s) if self.tokens else 0.0
        if requests_s >= tokens_s:
            return Wait(requests_s, Bound.REQUESTS if requests_s else None)
        return Wait(tokens_s, Bound.TOKENS)

    def replied(
        self,
        reservation: Reservation,
        headers: LimitHeaders,
        now_s: float,
        *,
        estimate: int = 0,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Settle a call that was answered; token counts of 0 mean that the reply did not tell."""
        self.in_flight -= 1
        self.rests_in_a_row = 0
        self.window += 1
        if self.window_limit != math.inf:
            self.window_limit += 1 / self.window_limit
        if prompt_tokens:
            self._learn_cost(reservation, estimate, prompt_tokens, completion_tokens)
        self._learn(reservation, headers, now_s)

    def failed(self, reservation: Reservation, headers: LimitHeaders, now_s: float) -> None:
        """Settle a call that gave no answer; what it reserved stays spent, since the server may have counted it."""
        self.in_flight -= 1
        self._learn(reservation, headers, now_s)

    def rate_limited(
        self,
        reservation: Reservation,
        headers: LimitHeaders,
        now_s: float,
        rest_s: float | None,
        jitter: float,
        bound: Bound | None = None,
    ) -> None:
        """Settle a call that was refused for its rate: nothing is sent for `rest_s`, or for as long as we think fit.

        `bound` is the limit that the server names.
        """
        self.in_flight -= 1
        self._learn(reservation, headers, now_s)
        if bound is Bound.REQUESTS and self.requests and headers.requests:
            self.requests.refused(headers.requests, now_s)
        if (
            bound is Bound.TOKENS
            and self.tokens
            and headers.tokens
            and headers.tokens.remaining > reservation.tokens
        ):
            self.tokens.refused(headers.tokens, now_s)
        told = self.requests is not None or self.tokens is not None
        if not told:
            self.window_limit = max(1.0, min(self.window_limit, self.in_flight + 1, self.window) / 2)
        if reservation.sent_at_s >= self.rest_until_s:
            self.rests_in_a_row += 1
        if not rest_s:  # "retry after 0 s" says as little as nothing
            rest_s = (0.5 + jitter / 2) * min(
                LONGEST_REST_S, FIRST_REST_S * 2.0 ** max(0, self.rests_in_a_row - 1)
            )
        self.rest_until_s = max(self.rest_until_s, now_s + min(LONGEST_WINDOW_S, rest_s))

    def pause_s(self, now_s: float) -> float:
        """Seconds until the smallest request could go; 0 if it can, or waits for a reply only."""
        if self.rest_until_s > now_s:
            return self.rest_until_s - now_s
        return (
            max(bucket.wait_s(1, now_s) for bucket in (self.requests, self.tokens) if bucket)
            if self.requests or self.tokens
            else 0.0
        )

    def absorb(self, other: "Limiter") -> None:
        """Take over what another limiter of the same limit has learned: the lowest remaining and the longest rest."""
        if other is self:
            return
        self.rest_until_s = max(self.rest_until_s, other.rest_until_s)
        self.window_limit = min(self.window_limit, other.window_limit)
        self.requests = _lower(self.requests, other.requests)
        self.tokens = _lower(self.tokens, other.tokens)

    def released(self) -> None:
        """Give back a reservation whose call was never sent."""
        self.in_flight -= 1

    def _learn_cost(self, reservation: Reservation, estimate: int, prompt: int, completion: int) -> None:
        if estimate:
            self._ratio += 0.1 * (min(8.0, max(0.125, prompt / estimate)) - self._ratio)
        self._completion_tokens += 0.1 * (completion - self._completion_tokens)
        if self.tokens:
            self.tokens.level -= max(0, prompt + completion - reservation.tokens)

    def _learn(self, reservation: Reservation, headers: LimitHeaders, now_s: float) -> None:
        took_s = now_s - reservation.sent_at_s
        if headers.requests:
            if self.requests is None:
                self.requests = Bucket.first(headers.requests, now_s)
            else:
                since = _since(self.requests, reservation.requests_mark)
                self.requests.learn(headers.requests, since, took_s, now_s)
        if headers.tokens:
            if self.tokens is None:
                self.tokens = Bucket.first(headers.tokens, now_s)
            else:
                self.tokens.learn(headers.tokens, _since(self.tokens, reservation.tokens_mark), took_s, now_s)


def _since(bucket: Bucket, mark: Sent | None) -> float:
    return max(0.0, bucket.sent - (mark.total if mark else 0.0))


def _lower(ours: Bucket | None, theirs: Bucket | None) -> Bucket | None:
    """Our bucket with the lower level of both; a copy of theirs if we have none, since its history is another's."""
    if ours is None or theirs is None:
        return ours or (theirs and replace(theirs, sent=0.0, mark=Sent(-math.inf, 0.0)))
    ours.level = min(ours.level, theirs.level)
    return ours
