"""The operator's view of the API keys: how each fares, and trying one by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.domain import ErrorCode, JobSettings, utc_now
from gpt_worker.errors import NotFound
from gpt_worker.gpt import CHECK_TIMEOUT_S, Endpoint, KeyCheck
from gpt_worker.lanes import Lane, LaneState, LastError
from gpt_worker.rate_limit import Bound, Limiter


@dataclass(frozen=True, slots=True)
class LearnedLimits:
    """What the endpoint told of one model's limits, and what is left by our own count; None: it told nothing."""

    requests: int | None
    requests_remaining: int | None
    tokens: int | None
    tokens_remaining: int | None


@dataclass(frozen=True, slots=True)
class KeyReport:
    """How one key fares; never the key itself."""

    name: str
    tail: str
    base_url: str
    group: str | None
    state: LaneState
    until: datetime | None
    in_flight: int
    threads: int
    bound_by: Bound | None
    requests: int
    tokens: int
    rate_limited: int
    limits: dict[str, LearnedLimits]
    last_error: LastError | None


class KeyBoard:
    """All keys of the service."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self._dispatcher = dispatcher
        self._model = model

    def reports(self) -> list[KeyReport]:
        """Every key, in the order of their numbers."""
        full = self._dispatcher.full
        return self._dispatcher.inspect(lambda lanes, now_s: [_report(lane, now_s, full) for lane in lanes])

    def check(self, number: int) -> KeyReport:
        """Ask the endpoint with this key now; one that works is used again at once.

        Spends nothing, unless the key was out of quota: whether it has some again, only a call can show.
        """
        lanes: Sequence[Lane] = self._dispatcher.lanes
        if not 0 <= number < len(lanes):
            raise NotFound("there is no such key")
        lane = lanes[number]
        if lane.endpoint is not None:
            problem = self._try(lane, lane.endpoint)
            if problem is None:
                self._dispatcher.key_works(lane)
            else:
                self._dispatcher.key_fails(lane, problem)
        return self.reports()[number]

    def _try(self, lane: Lane, endpoint: Endpoint) -> Problem | None:
        found = endpoint.check()
        if found is KeyCheck.REFUSED:
            return Problem(ProblemKind.KEY_REFUSED, ErrorCode.KEY_REFUSED, found.value)
        if found is KeyCheck.UNREACHABLE:
            return Problem(ProblemKind.FINAL, ErrorCode.CONNECTION, found.value)
        if self._dispatcher.inspect(lambda _lanes, now_s: lane.state(now_s)).state is LaneState.OUT_OF_QUOTA:
            result = endpoint.ask(self._model, JobSettings(), "Say hi.", CHECK_TIMEOUT_S).result
            if isinstance(result, Problem) and not result.kind.shows_good_key:
                return result
        return None


def _report(lane: Lane, now_s: float, full: bool) -> KeyReport:
    state = lane.state(now_s)
    return KeyReport(
        name=lane.name,
        tail=lane.tail,
        base_url=lane.base_url,
        group=lane.group.name,
        state=state.state,
        until=None if state.until_s is None else utc_now() + timedelta(seconds=state.until_s - now_s),
        in_flight=lane.in_flight,
        threads=lane.loops,
        bound_by=_bound(lane, full, now_s),
        requests=lane.requests,
        tokens=lane.tokens,
        rate_limited=lane.rate_limited,
        limits={model: _limits(limiter, now_s) for model, limiter in lane.group.limiters.items()},
        last_error=lane.last_error,
    )


def _bound(lane: Lane, full: bool, now_s: float) -> Bound | None:
    held_back = lane.joining and lane.in_flight >= lane.loops - 1  # one more would only be in their way
    if lane.in_flight and (full or held_back or lane.in_flight >= lane.max_threads):
        return Bound.THREADS
    bounds = (limiter.bound_by(now_s) for limiter in lane.group.limiters.values())
    return next((bound for bound in bounds if bound is not None), None)


def _limits(limiter: Limiter, now_s: float) -> LearnedLimits:
    requests, tokens = limiter.requests, limiter.tokens
    for bucket in (requests, tokens):
        if bucket:
            bucket.refill(now_s)
    return LearnedLimits(
        requests=requests.limit if requests else None,
        requests_remaining=max(0, int(requests.level)) if requests else None,
        tokens=tokens.limit if tokens else None,
        tokens_remaining=max(0, int(tokens.level)) if tokens else None,
    )
