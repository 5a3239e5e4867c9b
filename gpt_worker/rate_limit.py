"""Pacing, learned from what the server says: one `Limiter` a quota group and model. Pure: the clock is passed in.

Requests and tokens are reserved before a call and settled after it, against the buckets of the group's limits; where
the server tells no limits, the number of calls in flight grows with every answer and is halved by a refusal.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from gpt_worker.bucket import BELIEVE_AGAIN_S, LONGEST_WINDOW_S, Bucket, Burst, Mark
from gpt_worker.limit_headers import LimitHeaders

FIRST_REST_S = 1.0
LONGEST_REST_S = 60.0
HIDDEN_FOR_S = 3600.0
STILL_BOUND_S = 1.0
FAST_GROWTH = 3  # more in flight for each answer: four times as many a round
FAST_WINDOW = 16  # as long as fewer are in flight


class Bound(StrEnum):
    """What holds a call back."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    THREADS = "threads"


@dataclass(frozen=True, slots=True)
class Bursts:
    """What is known of one endpoint's bursts for one model."""

    requests: Burst = field(default_factory=Burst)
    tokens: Burst = field(default_factory=Burst)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one call was allowed to spend, and where it stands among all that were sent; no mark: of no limit yet."""

    tokens: int
    sent_at_s: float
    requests_mark: Mark | None
    tokens_mark: Mark | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: after `seconds` (infinite: when a reply comes in), because of `bound`."""

    seconds: float
    bound: Bound | None


@dataclass(frozen=True, slots=True)
class Hidden:
    """A limit that no header tells, kept until it may have changed."""

    bucket: Bucket
    until_s: float


@dataclass(frozen=True, slots=True)
class NamedLimit:
    """The limit that a refusal names: so much in so long."""

    limit: int
    window_s: float


@dataclass(frozen=True, slots=True)
class RateRefusal:
    """What a refusal for its rate tells of the limit: its kind, which one, and what the call would have taken."""

    bound: Bound | None = None
    named: NamedLimit | None = None
    requested_tokens: int | None = None


UNTOLD = RateRefusal()


class Limiter:
    """One quota group's pace for one model."""

    def __init__(self, bursts: Bursts | None = None) -> None:
        self._bursts = bursts or Bursts()
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.in_flight = 0
        self.window: float = 1  # calls in flight at once: 1 until the first reply
        self.window_limit = math.inf  # halved where the server refuses and does not say for what limit
        self._halved_s = -math.inf
        self._hidden: dict[tuple[Bound, float], Hidden] = {}  # limits that only refusals tell of, by window
        self.rest_until_s = 0.0
        self.rests_in_a_row = 0
        self._bound: tuple[Bound | None, float] = (None, 0.0)  # what held the last call back, and until when
        self.blocked = False  # whether somebody waits for a reply to make room
        self._ratio = 1.0  # true prompt tokens ÷ estimated ones

    def cost(self, prompt_tokens: int, max_output_tokens: int | None, tasks: int = 1) -> int:
        """Tokens to reserve: the corrected estimate, and each task's answer as far as the request bounds it.

        Whether the endpoint counts answers, only its headers tell: see `Bucket.charge`.
        """
        return max(1, round(prompt_tokens * self._ratio + tasks * (max_output_tokens or 0)))

    def reserve(self, tokens: int, now_s: float) -> Reservation | Wait:
        """Reserve one request of so many tokens, or say how long to wait for it."""
        wait = self._wait(tokens, now_s)
        self._bound = wait.bound, now_s + wait.seconds
        if wait.seconds > 0:
            self.blocked = self.blocked or math.isinf(wait.seconds)
            return wait
        if self.tokens:
            tokens = min(tokens, int(self.tokens.capacity))
        self.in_flight += 1
        for (bound, _), hidden in self._hidden.items():
            hidden.bucket.take(1 if bound is Bound.REQUESTS else tokens, now_s)
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
        if self._hidden:
            requests_s = max(requests_s, self._hidden_wait_s(Bound.REQUESTS, 1, now_s))
            tokens_s = max(tokens_s, self._hidden_wait_s(Bound.TOKENS, tokens, now_s))
        if requests_s >= tokens_s:
            return Wait(requests_s, Bound.REQUESTS if requests_s else None)
        return Wait(tokens_s, Bound.TOKENS)

    def _hidden_wait_s(self, bound: Bound, amount: int, now_s: float) -> float:
        for key in [key for key, hidden in self._hidden.items() if now_s > hidden.until_s]:
            del self._hidden[key]
        return max(
            (hidden.bucket.wait_s(amount, now_s) for key, hidden in self._hidden.items() if key[0] is bound),
            default=0.0,
        )

    def replied(
        self,
        reservation: Reservation,
        headers: LimitHeaders,
        now_s: float,
        *,
        estimate: int = 0,
        prompt_tokens: int = 0,
    ) -> None:
        """Settle a call that was answered; `prompt_tokens` of 0: the reply did not tell."""
        self.in_flight -= 1
        self.rests_in_a_row = 0
        self._learn(reservation, headers, now_s, went_well=True)
        if self._told:  # that bounds what goes out; without it nobody knows what is too much
            self.window = math.inf
        else:
            self.window += FAST_GROWTH if self.window < FAST_WINDOW else 1
        if self._told and now_s - self._halved_s > BELIEVE_AGAIN_S:
            self.window_limit = math.inf
        else:
            self.window_limit += 1 / self.window_limit
        if prompt_tokens and estimate:
            self._ratio += 0.1 * (min(8.0, max(0.125, prompt_tokens / estimate)) - self._ratio)

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
        refusal: RateRefusal,
    ) -> None:
        """Settle a call that was refused for its rate: nothing is sent for `rest_s`, or for as long as we think fit."""
        self.in_flight -= 1
        self._learn(reservation, headers, now_s, taken=False)
        if refusal.requested_tokens and self.tokens:
            self.tokens.told_charge(refusal.requested_tokens, reservation.tokens)
        if refusal.bound is None or not self._told:
            self.window_limit = max(1.0, min(self.window_limit, self.in_flight + 1, self.window) / 2)
            self._halved_s = now_s
        else:
            self._refused(refusal.bound, refusal.named, headers, reservation.tokens, now_s)
        if reservation.sent_at_s >= self.rest_until_s:
            self.rests_in_a_row += 1
        if not rest_s:  # "retry after 0 s" says as little as nothing
            rest_s = (0.5 + jitter / 2) * min(
                LONGEST_REST_S, FIRST_REST_S * 2.0 ** max(0, self.rests_in_a_row - 1)
            )
        self.rest_until_s = max(self.rest_until_s, now_s + min(LONGEST_WINDOW_S, rest_s))

    def bound_by(self, now_s: float) -> Bound | None:
        """What holds calls back now."""
        bound, until_s = self._bound
        return bound if now_s < until_s + STILL_BOUND_S and (self.in_flight or until_s < math.inf) else None

    @property
    def _told(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def _refused(
        self, bound: Bound, named: NamedLimit | None, headers: LimitHeaders, amount: int, now_s: float
    ) -> None:
        """The limit that the headers tell holds more strictly than they say, or it was one that they don't tell."""
        counts_requests = bound is Bound.REQUESTS
        bucket = self.requests if counts_requests else self.tokens
        told = headers.requests if counts_requests else headers.tokens
        if named is not None and (told is None or told.limit != named.limit):
            per_s = named.limit / named.window_s
            of_its_own = Burst(proven=1.0)
            hidden = Bucket(
                named.limit, 0.0, per_s, now_s, of_its_own, charge=self.tokens.charge if self.tokens else 1.0
            )
            self._hidden[bound, named.window_s] = Hidden(hidden, now_s + HIDDEN_FOR_S)
        elif bucket and told and (counts_requests or told.remaining > amount):
            bucket.refused(told, now_s)

    def pause_s(self, now_s: float) -> float:
        """Seconds until the smallest request could go; 0 if it can, or waits for a reply only."""
        if self.rest_until_s > now_s:
            return self.rest_until_s - now_s
        told = [bucket for bucket in (self.requests, self.tokens) if bucket]
        buckets = told + [hidden.bucket for hidden in self._hidden.values()]
        return max((bucket.wait_s(1, now_s) for bucket in buckets), default=0.0)

    def absorb(self, other: "Limiter") -> None:
        """Take over what another limiter of the same limit has learned: the lowest remaining and the longest rest."""
        if other is self:
            return
        self.rest_until_s = max(self.rest_until_s, other.rest_until_s)
        self.window_limit = min(self.window_limit, other.window_limit)
        self._halved_s = max(self._halved_s, other._halved_s)
        self._hidden = other._hidden | self._hidden
        self.requests = _lower(self.requests, other.requests)
        self.tokens = _lower(self.tokens, other.tokens)

    def released(self) -> None:
        """Give back a reservation whose call was never sent."""
        self.in_flight -= 1

    def _learn(
        self,
        reservation: Reservation,
        headers: LimitHeaders,
        now_s: float,
        *,
        went_well: bool = False,
        taken: bool = True,
    ) -> None:
        if (headers.requests or headers.tokens) and not self._told:
            self.window_limit = math.inf  # halved while nothing was told
        if told := headers.requests:
            if self.requests is None:
                self.requests = Bucket.first(told, now_s, self._bursts.requests)
            else:
                self.requests.learn(told, reservation.requests_mark, now_s, taken=taken)
            if went_well:
                self._bursts.requests.went_well(told.used_share)
        if told := headers.tokens:
            if self.tokens is None:
                self.tokens = Bucket.first(told, now_s, self._bursts.tokens, learns_charge=True)
            else:
                self.tokens.learn(told, reservation.tokens_mark, now_s, taken=taken)
            if went_well:
                self._bursts.tokens.went_well(told.used_share)


def _lower(ours: Bucket | None, theirs: Bucket | None) -> Bucket | None:
    """Our bucket with the lower level of both; a copy of theirs if we have none, since its history is another's."""
    if ours is None or theirs is None:
        return ours or (theirs and theirs.copy())
    ours.absorb(theirs, max(ours.updated_s, theirs.updated_s))
    return ours
