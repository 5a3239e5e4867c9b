"""One API key and what belongs to it: its way out, its quota group with the limiters, its health, its threads.

Nothing here waits or calls. The dispatcher changes a lane only under its own lock; times are `time.monotonic()`.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import count
from typing import TypeVar

from config import ApiKey
from gpt_worker.backoff import Problem, ProblemKind, backoff_s
from gpt_worker.domain import utc_now
from gpt_worker.gpt import Endpoint
from gpt_worker.marks import Marks
from gpt_worker.rate_limit import Bursts, Limiter

T = TypeVar("T")

FIRST_QUOTA_REST_S = 600.0
LONGEST_QUOTA_REST_S = 6 * 3600.0
PROBE_REFUSED_EVERY_S = 3600.0
MODEL_REST_S = 600.0
FAILURES_BEFORE_REST = 5
PROBE_AGAIN_S = 60.0  # after a probe that told nothing
MAX_MODELS = 200


class LaneState(StrEnum):
    """How a key stands, as the operator sees it."""

    READY = "ready"
    RESTING = "resting"
    OUT_OF_QUOTA = "out of quota"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a lane takes no task now; `until_s` None: until something happens, such as the end of a probe."""

    state: LaneState
    until_s: float | None
    model_missing: bool = False


_group_numbers = count(1)


def _make_room(by_model: dict[str, T], may_go: Callable[[T], bool]) -> None:
    if len(by_model) >= MAX_MODELS:
        oldest = next((model for model, of in by_model.items() if may_go(of)), None)
        if oldest is not None:
            del by_model[oldest]


@dataclass(slots=True, eq=False)
class QuotaGroup:
    """Lanes that share limits and quota: OpenAI counts both by organisation and project."""

    bursts: dict[str, Bursts] = field(default_factory=dict)  # by model; shared by an endpoint's groups
    name: str | None = None
    number: int = field(default_factory=lambda: next(_group_numbers))
    limiters: dict[str, Limiter] = field(default_factory=dict)
    exhausted_at_s: float = 0.0
    exhausted_until_s: float = 0.0
    exhausted_in_a_row: int = 0
    probe_sent_at_s: float | None = None  # the one call that tries whether there is quota again
    next_probe_s: float = 0.0
    missing_models: Marks[str, float] = field(default_factory=Marks)  # model → when it is tried again

    def limiter(self, model: str) -> Limiter:
        limiter = self.limiters.get(model)
        if limiter is None:
            _make_room(self.limiters, lambda old: old.in_flight == 0)  # a caller may name any model
            _make_room(self.bursts, lambda _: True)
            limiter = self.limiters[model] = Limiter(self.bursts.setdefault(model, Bursts()))
        return limiter

    def pause_s(self, model: str, now_s: float) -> float:
        """Seconds until the smallest request for a model could go, as far as its limits are known."""
        limiter = self.limiters.get(model)
        return 0.0 if limiter is None else limiter.pause_s(now_s)

    def absorb(self, other: "QuotaGroup") -> None:
        """Take over what another group has learned: the lowest remaining wins."""
        for model, theirs in other.limiters.items():
            ours = self.limiters.setdefault(model, theirs)
            ours.absorb(theirs)
        self.exhausted_at_s = max(self.exhausted_at_s, other.exhausted_at_s)
        self.exhausted_until_s = max(self.exhausted_until_s, other.exhausted_until_s)
        self.exhausted_in_a_row = max(self.exhausted_in_a_row, other.exhausted_in_a_row)
        for model, until_s in other.missing_models.items():
            self.missing_models[model] = max(until_s, self.missing_models.get(model, 0.0))

    def exhausted(self, now_s: float) -> float:
        """The quota is used up: rest 10 minutes, doubling to 6 hours; the time of the next try."""
        if self.exhausted_until_s <= now_s:
            rest_s = min(LONGEST_QUOTA_REST_S, FIRST_QUOTA_REST_S * 2.0 ** min(10, self.exhausted_in_a_row))
            self.exhausted_at_s, self.exhausted_until_s = now_s, now_s + rest_s
            self.exhausted_in_a_row += 1
        return self.exhausted_until_s


@dataclass(frozen=True, slots=True)
class LastError:
    code: str
    message: str
    at: datetime


class Lane:
    """One API key."""

    def __init__(
        self,
        key: ApiKey,
        max_threads: int,
        lock: threading.Lock,
        bursts: dict[str, Bursts] | None = None,
    ) -> None:
        self.number = key.number
        self.name = key.name
        self.tail = key.secret[-4:]
        self.base_url = key.base_url
        self.endpoint: Endpoint | None = None  # none while `down`
        self.max_threads = max_threads
        self.group = QuotaGroup({} if bursts is None else bursts)
        self.executor = ThreadPoolExecutor(max_threads, thread_name_prefix=key.name.replace(" ", "-"))
        self.has_work = threading.Condition(lock)
        self.may_join = threading.Condition(lock)
        self.loops = 0
        self.waiting = False  # whether one of the loops waits for work
        self.joining = False  # whether one more is about to serve
        self.in_flight = 0
        self.requests = 0
        self.tokens = 0
        self.rate_limited = 0
        self.last_error: LastError | None = None
        self.down: str | None = None  # why the endpoint itself is away: the embedded model's sentence
        self._probe_at_s: float | None = None  # set while refused
        self._refused_at_s = 0.0
        self._rest_from_s = 0.0
        self._rest_until_s = 0.0
        self._failures_in_a_row = 0
        self._probe_sent_at_s: float | None = None  # the one call that tries whether the key is well again
        self._next_probe_s = 0.0

    @property
    def refused(self) -> bool:
        return self._probe_at_s is not None

    def hold(self, model: str, now_s: float) -> Hold | None:
        """Why this lane takes no task for this model now, or None if it does."""
        if self.down is not None:
            return Hold(LaneState.RESTING, None)
        probing = self._probe_sent_at_s is not None
        if self._probe_at_s is not None and (probing or now_s < max(self._probe_at_s, self._next_probe_s)):
            return Hold(LaneState.REFUSED, None if probing else max(self._probe_at_s, self._next_probe_s))
        group = self.group
        group_probing = group.probe_sent_at_s is not None
        quota_s = max(group.exhausted_until_s, group.next_probe_s)
        if group.exhausted_in_a_row and (group_probing or now_s < quota_s):
            return Hold(LaneState.OUT_OF_QUOTA, None if group_probing else quota_s)
        if self._rest_until_s > now_s:
            return Hold(LaneState.RESTING, self._rest_until_s)
        if self._failures_in_a_row >= FAILURES_BEFORE_REST and probing:
            return Hold(LaneState.RESTING, None)
        missing_until_s = group.missing_models.get(model)
        if missing_until_s is not None:
            if now_s < missing_until_s:
                return Hold(LaneState.READY, missing_until_s, model_missing=True)
            del group.missing_models[model]
        limiter = group.limiters.get(model)
        if limiter is not None and limiter.rest_until_s > now_s:
            return Hold(LaneState.RESTING, limiter.rest_until_s)
        return None

    def state(self, now_s: float) -> Hold:
        """How the key stands, whatever the model."""
        hold = self.hold("", now_s)
        if hold is not None:
            return hold
        if self._probe_at_s is not None:
            return Hold(LaneState.REFUSED, self._probe_at_s)
        if self.group.exhausted_in_a_row:
            return Hold(LaneState.OUT_OF_QUOTA, None)
        rests = [limiter.rest_until_s for limiter in self.group.limiters.values()]
        if rests and min(rests) > now_s:
            return Hold(LaneState.RESTING, min(rests))
        return Hold(LaneState.READY, None)

    def sent(self, sent_at_s: float) -> None:
        """A call goes out; if the lane's health was in doubt, it is the one probe."""
        self.in_flight += 1
        self.requests += 1
        if self.refused or self._failures_in_a_row >= FAILURES_BEFORE_REST:
            self._probe_sent_at_s = sent_at_s
            self._next_probe_s = sent_at_s + PROBE_AGAIN_S
        if self.group.exhausted_in_a_row:
            self.group.probe_sent_at_s = sent_at_s
            self.group.next_probe_s = sent_at_s + PROBE_AGAIN_S

    def came_back(self, sent_at_s: float) -> None:
        """A call sent then is over; one older than the probe is not the probe."""
        self.in_flight -= 1
        if self._probe_sent_at_s is not None and sent_at_s >= self._probe_sent_at_s:
            self._probe_sent_at_s = None
        if self.group.probe_sent_at_s is not None and sent_at_s >= self.group.probe_sent_at_s:
            self.group.probe_sent_at_s = None

    def works(self, sent_at_s: float) -> bool:
        """A call sent then shows that the key works; whether that is news. Older than the trouble, it shows nothing."""
        news = self._failures_in_a_row >= FAILURES_BEFORE_REST
        self._failures_in_a_row = 0
        if self.refused and sent_at_s > self._refused_at_s:
            self._probe_at_s = None
            news = True
        if self.group.exhausted_in_a_row and sent_at_s > self.group.exhausted_at_s:
            self.group.exhausted_in_a_row = 0
            self.group.exhausted_until_s = 0.0
            news = True
        return news

    def troubled(self, problem: Problem, model: str, sent_at_s: float, now_s: float, jitter: float) -> bool:
        """Note what a problem of a call sent then means for the key; whether the key's state changed by it."""
        self.last_error = LastError(problem.code, problem.message, utc_now())
        match problem.kind:
            case ProblemKind.KEY_REFUSED:
                news = not self.refused
                self._refused_at_s, self._probe_at_s = now_s, now_s + PROBE_REFUSED_EVERY_S
                return news
            case ProblemKind.QUOTA_EXHAUSTED:
                news = self.group.exhausted_in_a_row == 0
                self.group.exhausted(now_s)
                return news
            case ProblemKind.MODEL_UNAVAILABLE:
                news = model not in self.group.missing_models
                self.group.missing_models[model] = now_s + MODEL_REST_S
                return news
            case ProblemKind.TRANSIENT if sent_at_s >= self._rest_from_s:  # older ones belong to that rest
                self._failures_in_a_row += 1
                beyond = self._failures_in_a_row - FAILURES_BEFORE_REST
                if beyond >= 0:
                    self._rest_from_s = now_s
                    self._rest_until_s = now_s + max(0.2, backoff_s(min(10, beyond + 1), jitter))
                return beyond == 0
            case ProblemKind.RATE_LIMITED:
                self.rate_limited += 1
        return False

    def mend(self) -> None:
        """Forget the key's bad marks: somebody has checked it, and it works."""
        self._probe_at_s = None
        self._failures_in_a_row = 0
        self._rest_until_s = 0.0
        self.group.exhausted_in_a_row = 0
        self.group.exhausted_until_s = 0.0
        self.group.missing_models.clear()
        self._next_probe_s = self.group.next_probe_s = 0.0
        for limiter in self.group.limiters.values():
            limiter.rest_until_s = 0.0
