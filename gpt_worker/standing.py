"""How jobs stand with the keys: why one does not move, whether one is hopeless, how it ends at its deadline.

Reads lanes and jobs while nothing changes them (the dispatcher's lock is held), and changes neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from gpt_worker.domain import ErrorCode, Failure, utc_now
from gpt_worker.fair_queue import JobRun, QueuedTask
from gpt_worker.lanes import Lane, LaneState

SAME_REFUSALS = 10
WORTH_WAITING_S = 5.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing of a job moves, and until when, if that is known."""

    reason: str
    until: datetime | None


def why_idle(job: JobRun, lanes: Sequence[Lane], now_s: float) -> Waiting | None:
    """What keeps every task of a job from going; None if something could go now."""
    downs = [lane.down for lane in lanes if lane.down]
    if downs and len(downs) == len(lanes):
        return Waiting(downs[0], None)
    holds = [lane.hold(job.model, now_s) for lane in lanes]
    free = [lane for lane, hold in zip(lanes, holds, strict=True) if hold is None]
    if not free:
        untils = [hold.until_s for hold in holds if hold and hold.until_s is not None]
        resting = any(hold and hold.state is LaneState.RESTING for hold in holds)
        reason = "every key is resting" if resting else "no usable key"
        return Waiting(reason, _at(min(untils), now_s) if untils else None)
    due_s = job.next_due_s()
    if math.isfinite(due_s) and job.in_memory == len(job.delayed):
        return Waiting("waiting to try again", _at(due_s, now_s))
    if not any(may_take(lane, lanes, job, task, now_s) for lane in free for task in job.next_tasks()):
        return Waiting("no key that works may take these tasks", None) if job.in_memory else None
    pause_s = min(lane.group.pause_s(job.model, now_s) for lane in free)
    return Waiting("every key is at its rate limit", _at(now_s + pause_s, now_s)) if pause_s > 0 else None


def may_take(lane: Lane, lanes: Sequence[Lane], job: JobRun, task: QueuedTask, now_s: float) -> bool:
    """Whether a task may go on this lane; on one where it failed, only if no other would take it."""
    if lane.group.number in task.too_large_for:
        return False
    if lane.number not in task.avoid:
        return True
    return not any(
        other.number not in task.avoid
        and other.group.number not in task.too_large_for
        and other.hold(job.model, now_s) is None
        and other.group.pause_s(job.model, now_s) <= WORTH_WAITING_S
        for other in lanes
    )


def early_end(job: JobRun, lanes: Sequence[Lane], now_s: float) -> Failure | None:
    """How a job ends that can't, or mustn't, go on."""
    budget = job.settings.max_total_tokens
    if budget is not None and job.tokens_used >= budget:
        return Failure(ErrorCode.BUDGET, "the job had used its max_total_tokens")
    if job.refusal is not None and job.refusals >= SAME_REFUSALS:
        return Failure(ErrorCode.BAD_REQUEST, job.refusal)
    if _hopeless(job, lanes, now_s):
        return Failure(ErrorCode.MODEL_UNAVAILABLE, "no key may use this model")
    return None


def _hopeless(job: JobRun, lanes: Sequence[Lane], now_s: float) -> bool:
    """Whether every key that works may not use the job's model."""
    if not any(lane.group.missing_models for lane in lanes):
        return False
    working = [lane for lane in lanes if not lane.refused]
    return bool(working) and all(lane.group.missing_models.get(job.model, 0.0) > now_s for lane in working)


def expired(job: JobRun, lanes: Sequence[Lane], now_s: float) -> Failure:
    """How a job ends at its deadline: by what held it, if something did."""
    holds = [lane.hold(job.model, now_s) for lane in lanes]
    states = {hold.state for hold in holds if hold is not None and not hold.model_missing}
    if None not in holds and states == {LaneState.REFUSED}:
        return Failure(ErrorCode.KEY_REFUSED, "the job's deadline passed: every key is refused")
    if None not in holds and states and states <= {LaneState.REFUSED, LaneState.OUT_OF_QUOTA}:
        return Failure(ErrorCode.QUOTA_EXHAUSTED, "the job's deadline passed: no key has quota left")
    last = f"; the last trouble was: {job.last_problem}" if job.last_problem else ""
    return Failure(ErrorCode.EXPIRED, f"the job's deadline passed{last}")


def estimate_s(lanes: Sequence[Lane], model: str, requests: int, tokens: int) -> float | None:
    """About how long so much takes at the limits learned so far; None while none is known."""
    groups = {lane.group for lane in lanes}
    limiters = [group.limiters[model] for group in groups if model in group.limiters]
    requests_per_s = sum(limiter.requests.per_s for limiter in limiters if limiter.requests)
    tokens_per_s = sum(limiter.tokens.per_s for limiter in limiters if limiter.tokens)
    if not requests_per_s and not tokens_per_s:
        return None
    return max(
        requests / requests_per_s if requests_per_s else 0.0,
        tokens / tokens_per_s if tokens_per_s else 0.0,
    )


def _at(moment_s: float, now_s: float) -> datetime:
    return utc_now() + timedelta(seconds=max(0.0, moment_s - now_s))
