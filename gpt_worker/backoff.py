"""What to do after a call that gave no answer: pure decisions, carried out by the dispatcher.

A key's trouble never costs the task an attempt; the task's own trouble does, and ends after a few.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from gpt_worker.domain import ErrorCode, Failure
from gpt_worker.rate_limit import UNTOLD, RateRefusal

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_DRIVE_WAIT_S = 600.0
MAX_ATTEMPTS = 5
MAX_TIMEOUTS = 3  # where one call in a hundred hangs, two would lose one task of ten thousand
FREE_RATE_LIMITS = 20
RATE_LIMITS_AT_FRONT = 2


class ProblemKind(StrEnum):
    """Whose trouble it is."""

    RATE_LIMITED = "rate_limited"  # the key's, for a while
    QUOTA_EXHAUSTED = "quota_exhausted"  # the quota group's
    KEY_REFUSED = "key_refused"  # the key's, until somebody mends it
    MODEL_UNAVAILABLE = "model_unavailable"  # the quota group's, for this model
    TOO_LARGE = "too_large"  # the task's, on this quota group
    TRANSIENT = "transient"  # nobody's: another try may go well
    FINAL = "final"  # the task's own
    STALE = "stale"  # the connection's: the task's first one costs it nothing
    RESENT = "resent"  # the request's form; it goes again in another, uncharged
    PACK_REFUSED = "pack_refused"  # the endpoint's, which takes no packs: singles from now on, uncharged

    @property
    def shows_good_key(self) -> bool:
        """Whether an endpoint that says this has taken the key."""
        return self not in (
            ProblemKind.KEY_REFUSED,
            ProblemKind.QUOTA_EXHAUSTED,
            ProblemKind.TRANSIENT,
            ProblemKind.STALE,
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a call gave no answer. `message` is for the job's owner; `about_settings` if every task would fail alike."""

    kind: ProblemKind
    code: ErrorCode
    message: str
    retry_after_s: float | None = None
    about_settings: bool = False
    rate_limit: RateRefusal = UNTOLD
    param: str | None = None  # what of the request the endpoint did not like


@dataclass(frozen=True, slots=True)
class Tries:
    """What a task has been through in this run."""

    attempts: int = 0
    timeouts: int = 0
    rate_limits: int = 0
    stale: int = 0


class Place(StrEnum):
    """Where a task goes that is asked again."""

    FRONT = "front"
    BEHIND = "behind"  # behind its job's others


@dataclass(frozen=True, slots=True)
class Again:
    """The task is asked again, after `wait_s`, on another key if `elsewhere` and there is one."""

    wait_s: float
    place: Place
    tries: Tries
    elsewhere: bool


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The task is decided."""

    failure: Failure
    attempts: int


def backoff_s(attempt: int, jitter: float) -> float:
    """The wait after attempt 1, 2, …: 1 s × 2ⁿ with full jitter, at most 60 s; `jitter` in [0, 1)."""
    return jitter * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1))


def drive_wait_s(attempt: int) -> float:
    """The wait after a file's attempt 1, 2, … failed: 1 s, doubling to 10 min; there is no last attempt."""
    return min(LONGEST_DRIVE_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 30))


def decide(problem: Problem, tries: Tries, jitter: float, took_s: float = 0.0) -> Again | GivenUp:
    """What becomes of a task after this problem; `tries` is what it had been through before.

    `took_s`: what the call took. The backoff counts from its start: an endpoint that has let us wait for the call's
    whole deadline has had its time.
    """
    attempts = tries.attempts + 1
    match problem.kind:
        case ProblemKind.RESENT | ProblemKind.PACK_REFUSED:
            return Again(0.0, Place.FRONT, tries, elsewhere=False)
        case (
            ProblemKind.KEY_REFUSED
            | ProblemKind.QUOTA_EXHAUSTED
            | ProblemKind.MODEL_UNAVAILABLE
            | ProblemKind.TOO_LARGE
        ):
            return Again(0.0, Place.FRONT, tries, elsewhere=True)
        case ProblemKind.RATE_LIMITED:
            return _after_rate_limit(problem, tries)
        case ProblemKind.STALE if tries.stale == 0:
            return Again(0.0, Place.FRONT, replace(tries, stale=1), elsewhere=False)
        case ProblemKind.TRANSIENT | ProblemKind.STALE:
            timeouts = tries.timeouts + (problem.code is ErrorCode.TIMEOUT)
            if attempts >= MAX_ATTEMPTS or timeouts >= MAX_TIMEOUTS:
                return GivenUp(Failure(problem.code, problem.message), attempts)
            told_s = min(LONGEST_WAIT_S, problem.retry_after_s or 0.0)  # another key may do better by then
            wait_s = max(backoff_s(attempts, jitter) - took_s, told_s)
            tried = replace(tries, attempts=attempts, timeouts=timeouts)
            return Again(wait_s, Place.FRONT, tried, elsewhere=True)
        case ProblemKind.FINAL:
            return GivenUp(Failure(problem.code, problem.message), attempts)


def _after_rate_limit(problem: Problem, tries: Tries) -> Again | GivenUp:
    rate_limits = tries.rate_limits + 1
    attempts = tries.attempts + (rate_limits > FREE_RATE_LIMITS)
    if attempts >= MAX_ATTEMPTS:
        return GivenUp(Failure(problem.code, problem.message), attempts)
    place = Place.FRONT if rate_limits < RATE_LIMITS_AT_FRONT else Place.BEHIND
    return Again(0.0, place, replace(tries, attempts=attempts, rate_limits=rate_limits), elsewhere=False)
