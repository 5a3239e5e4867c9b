"""The fair queue and the threads that serve it: hands chunks of tasks to threads that each own one key.

One lock guards the queue and the lanes; it is never held across a call, a query or a commit. A thread takes a chunk,
asks for its tasks one by one, and gives the rest back when something else should go first. Outcomes go to the recorder.
"""

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from gpt_worker.backoff import Again, GivenUp, Problem, ProblemKind, Tries, decide
from gpt_worker.db import Database
from gpt_worker.domain import Answer, ErrorCode, Failure, JobSettings, JobStatus, Outcome, Usage, utc_now
from gpt_worker.fair_queue import FairQueue, JobRun, QueuedTask
from gpt_worker.gpt import Endpoint, Reply
from gpt_worker.lanes import Lane, LaneState, QuotaGroup
from gpt_worker.models import JobRow
from gpt_worker.rate_limit import Bound, Limiter, Reservation, Wait
from gpt_worker.recorder import Recorder
from gpt_worker.splitting import chunk_limit
from gpt_worker.store import tasks as task_store

T = TypeVar("T")
log = logging.getLogger(__name__)

PAGE_TASKS = 500
PAGE_TOKENS = 1_000_000
CHUNK_S = 2.0
MAX_PASSED_OVER = 50
SAME_REFUSALS = 10
RETRY_READ_S = 1.0
LANDING_S = 5.0  # what a call in flight at its job's deadline gets to land: it is paid for


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing of a job moves, and until when, if that is known."""

    reason: str
    until: datetime | None


@dataclass(slots=True)
class Grant:
    """A thread's leave to send one task, and the rest of its chunk."""

    job: JobRun
    task: QueuedTask
    limiter: Limiter
    reservation: Reservation
    rest: deque[QueuedTask]
    until_s: float
    announce: bool = False  # the job's first task: the recorder is told that it runs
    settled: bool = field(default=False)


class Dispatcher:
    """Sends every pending task of every unfinished job, once, as fast as the keys allow."""

    def __init__(
        self,
        database: Database,
        recorder: Recorder,
        make_lanes: Callable[[threading.Lock], Sequence[Lane]],
        *,
        call_deadline_s: float,
        now_s: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._recorder = recorder
        self._call_deadline_s = call_deadline_s
        self._now_s = now_s
        self._jitter = jitter
        self._lock = threading.Lock()
        self._feed_wanted = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self.lanes = list(make_lanes(self._lock))
        self._queue = FairQueue()
        self._groups: dict[tuple[str, str, str], QuotaGroup] = {}
        self._taking = True
        self._aborted = False
        self._feeder = threading.Thread(target=self._feed, name="feeder", daemon=True)

    # The life of the dispatcher

    def start(self, jobs: Iterable[JobRow]) -> None:
        """Begin to serve, first of all the jobs that an earlier process left unfinished."""
        for job in jobs:
            self.add(job)
        self._feeder.start()

    def stop_taking(self) -> None:
        """Nothing new is sent; calls in flight go on."""
        with self._lock:
            self._taking = False
            self._feed_wanted.notify_all()
            self._wake()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether every call in flight came back in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not any(lane.loops for lane in self.lanes), timeout_s)

    def abort(self) -> None:
        """Cut the calls in flight: their tasks stay pending, so a next start asks them again."""
        with self._lock:
            self._aborted = True
            self._taking = False
            self._wake()
        for lane in self.lanes:
            if lane.endpoint is not None:
                lane.endpoint.cut()
            lane.executor.shutdown(wait=False, cancel_futures=True)

    # Jobs

    def add(self, job: JobRow) -> None:
        """Queue a stored job's pending tasks."""
        run = JobRun(
            id=job.id,
            run=job.run,
            owner=job.owner_id or "",
            model=job.model,
            settings=JobSettings.from_json(job.settings),
            deadline_at=job.deadline_at,
            pending=job.total - job.answered - job.failed,
            tokens_used=job.prompt_tokens + job.completion_tokens,
            started=job.status == JobStatus.RUNNING,  # the next run of a job has a start of its own
        )
        with self._lock:
            self._queue.add(run)
            self._feed_wanted.notify()

    def close(self, job_id: str, failure: Failure) -> threading.Event:
        """Send nothing more of a job: what was not sent fails with `failure`, calls in flight still land.

        The event is set when those failures are stored.
        """
        with self._lock:
            job = self._queue.get(job_id)
            spare = self._start_closing(job, failure) if job else frozenset()
        return self._recorder.close_job(job_id, failure, spare)

    def forget(self, job_id: str, run: int) -> None:
        """This run of the job has ended, or the job is gone."""
        with self._lock:
            job = self._queue.get(job_id)
            if job is not None and job.run <= run:
                job.clear()
                job.closing = job.closing or Failure(ErrorCode.CANCELLED, "the job is gone")
                self._queue.remove(job_id)

    def _start_closing(self, job: JobRun, failure: Failure) -> frozenset[int]:
        job.closing = job.closing or failure
        job.clear()
        return frozenset(job.sent)

    def waiting(self, job_id: str) -> Waiting | None:
        """Why nothing of a job moves now; None if something does, or the job is not unfinished."""
        with self._lock:
            job = self._queue.get(job_id)
            if job is None or job.sent or job.closing is not None:
                return None
            if not self._recorder.healthy:
                return Waiting("the database takes no answers", None)
            return self._why_idle(job)

    def _why_idle(self, job: JobRun) -> Waiting | None:
        now_s = self._now_s()
        holds = [lane.hold(job.model, now_s) for lane in self.lanes]
        downs = [lane.down for lane in self.lanes if lane.down]
        if downs and len(downs) == len(self.lanes):
            return Waiting(downs[0], None)
        if None in holds:
            due_s = job.next_due_s()
            if math.isfinite(due_s) and job.in_memory == len(job.delayed):
                return Waiting("waiting to try again", _at(due_s, now_s))
            pause_s = min(
                (
                    lane.group.limiter(job.model).pause_s(now_s)
                    for lane, hold in zip(self.lanes, holds, strict=True)
                    if not hold
                ),
                default=0.0,
            )
            return (
                Waiting("every key is at its rate limit", _at(now_s + pause_s, now_s))
                if pause_s > 0
                else None
            )
        untils = [hold.until_s for hold in holds if hold and hold.until_s is not None]
        until = _at(min(untils), now_s) if untils else None
        resting = any(hold and hold.state is LaneState.RESTING for hold in holds)
        return Waiting("every key is resting" if resting else "no usable key", until)

    def usable_lanes(self, model: str) -> int:
        """How many keys take tasks for this model now."""
        with self._lock:
            now_s = self._now_s()
            return sum(lane.hold(model, now_s) is None for lane in self.lanes)

    @property
    def threads(self) -> int:
        return sum(lane.max_threads for lane in self.lanes)

    # Lanes

    def inspect(self, look: Callable[[Sequence[Lane], float], T]) -> T:
        """What `look(lanes, now_s)` makes of the lanes while nothing changes them."""
        with self._lock:
            return look(self.lanes, self._now_s())

    def key_works(self, lane: Lane) -> None:
        """Somebody has tried the key by hand, and it works."""
        with self._lock:
            lane.mend()
            self._wake([lane])

    def key_fails(self, lane: Lane, problem: Problem) -> None:
        """Somebody has tried the key by hand, and it does not work."""
        with self._lock:
            now_s = self._now_s()
            lane.troubled(problem, "", now_s, now_s, 0.0)

    def estimate_s(self, model: str, requests: int, tokens: int) -> float | None:
        """About how long so much takes at the limits learned so far; None while none is known."""
        with self._lock:
            groups = {lane.group for lane in self.lanes}
            limiters = [group.limiters[model] for group in groups if model in group.limiters]
            requests_per_s = sum(limiter.requests.per_s for limiter in limiters if limiter.requests)
            tokens_per_s = sum(limiter.tokens.per_s for limiter in limiters if limiter.tokens)
        if not requests_per_s and not tokens_per_s:
            return None
        return max(
            requests / requests_per_s if requests_per_s else 0.0,
            tokens / tokens_per_s if tokens_per_s else 0.0,
        )

    def wake(self) -> None:
        """Something has changed that may let tasks go."""
        with self._lock:
            self._wake()

    def _wake(self, lanes: Iterable[Lane] | None = None) -> None:
        for lane in self.lanes if lanes is None else lanes:
            if lane.waiting:
                lane.has_work.notify()
            elif self._taking:
                self._grow(lane)

    def _grow(self, lane: Lane) -> None:
        """One more loop serves the lane, unless one waits for work already or every thread is taken."""
        if not lane.waiting and lane.loops < lane.max_threads and self._taking:
            lane.loops += 1
            lane.executor.submit(self._serve, lane)

    def lane_up(self, lane: Lane, endpoint: Endpoint, base_url: str) -> None:
        with self._lock:
            lane.endpoint, lane.base_url, lane.down = endpoint, base_url, None
            lane.mend()
            self._wake([lane])

    def lane_down(self, lane: Lane, reason: str) -> None:
        with self._lock:
            lane.down = reason

    # A thread's loop: take, ask, settle

    def _serve(self, lane: Lane) -> None:
        grant: Grant | None = None
        try:
            while (grant := self._take(lane)) is not None:
                while grant is not None:
                    grant = self._ask(lane, grant)
        except Exception:
            log.exception(
                "%s: a loop died of a bug and is replaced", lane.name, extra={"action": "loop_died"}
            )
            with self._lock:
                if grant is not None:
                    self._drop(lane, grant)
                lane.loops -= 1
                self._idle.notify_all()
            threading.Event().wait(RETRY_READ_S)  # a bug that comes back must not spin
            with self._lock:
                self._grow(lane)

    def _take(self, lane: Lane) -> Grant | None:
        """The next task for this lane, waiting for it if no other loop of the lane does; None: the loop ends."""
        with self._lock:
            while self._taking:
                found = self._find(lane, self._now_s())
                if isinstance(found, Grant):
                    self._grow(lane)
                    return found
                if lane.waiting:
                    break
                lane.waiting = True
                try:
                    lane.has_work.wait(None if math.isinf(found) else max(0.001, found))
                finally:
                    lane.waiting = False
            lane.loops -= 1
            self._idle.notify_all()
            return None

    def _find(self, lane: Lane, now_s: float) -> Grant | float:
        """A task and its reservation in one step, or the seconds after which to look again."""
        if not self._recorder.healthy:
            return math.inf
        soonest_s = math.inf
        passed: QueuedTask | None = None
        for job in self._queue.in_turn():
            hold = lane.hold(job.model, now_s)
            if hold is not None:
                if hold.until_s is not None:
                    soonest_s = min(soonest_s, hold.until_s - now_s)
                continue
            task = job.next_for(lambda task, job=job: self._may_take(lane, job, task, now_s), now_s)  # type: ignore[misc]
            if task is None:
                soonest_s = min(soonest_s, job.next_due_s() - now_s)
                continue
            limiter = lane.group.limiter(job.model)
            reserved = limiter.reserve(limiter.cost(task.tokens, job.settings.max_output_tokens), now_s)
            if isinstance(reserved, Wait):
                soonest_s = min(soonest_s, reserved.seconds)
                if reserved.bound is Bound.TOKENS:
                    if task.passed_over >= MAX_PASSED_OVER:
                        break
                    passed = passed or task
                continue
            if passed is not None:
                passed.passed_over += 1
            return self._grant(lane, job, task, limiter, reserved, now_s, alone=passed is not None)
        return soonest_s

    def _may_take(self, lane: Lane, job: JobRun, task: QueuedTask, now_s: float) -> bool:
        if lane.group.number in task.too_large_for:
            return False
        if lane.number not in task.avoid:
            return True
        return not any(
            other.number not in task.avoid
            and other.group.number not in task.too_large_for
            and other.hold(job.model, now_s) is None
            for other in self.lanes
        )

    def _grant(
        self,
        lane: Lane,
        job: JobRun,
        task: QueuedTask,
        limiter: Limiter,
        reservation: Reservation,
        now_s: float,
        *,
        alone: bool,
    ) -> Grant:
        """`alone`: one task and no chunk, since a larger one is passed over by it, and each of those counts."""
        was_fresh = bool(job.fresh) and job.fresh[0] is task
        job.pop(task)
        rest: deque[QueuedTask] = deque()
        if was_fresh and not alone:
            rest = job.cut_chunk(task.tokens, chunk_limit(job.pending, self.threads))
        grant = Grant(job, task, limiter, reservation, rest, now_s + CHUNK_S, announce=not job.started)
        self._send(lane, grant)
        if job.wants_page:
            self._feed_wanted.notify()
        return grant

    def _send(self, lane: Lane, grant: Grant) -> None:
        job = grant.job
        job.started = True
        job.sent[grant.task.position] = grant.task
        grant.task.passed_over = 0
        self._queue.charge(job, grant.task.tokens)
        lane.sent(grant.reservation.sent_at_s)

    def _ask(self, lane: Lane, grant: Grant) -> Grant | None:
        """Make one call and settle it; the leave for the chunk's next task, or None."""
        job = grant.job
        if grant.announce:
            self._recorder.job_started(job.id)
        assert lane.endpoint is not None  # a lane without one is down, and gets no task
        try:
            left_s = (job.deadline_at - utc_now()).total_seconds()
            deadline_s = min(self._call_deadline_s, max(0.0, left_s) + LANDING_S)
            reply = lane.endpoint.ask(job.model, job.settings, grant.task.prompt, deadline_s)
        except Exception:  # a task that can't be asked must not come back for ever
            log.exception("a call ran into a bug", extra={"action": "ask", "job_id": job.id})
            reply = Reply(
                Problem(ProblemKind.TRANSIENT, ErrorCode.INTERRUPTED, "the service failed under this task")
            )
        with self._lock:
            outcome = self._settle(lane, grant, reply)
        if outcome is not None:
            # May block while commits lag; so nothing is held meanwhile.
            self._recorder.put(outcome, hurry=job.exhausted and not job.in_memory)
        self._end_early(job)
        with self._lock:
            if outcome is None or outcome.decision is not None:
                job.sent.pop(grant.task.position, None)
            return self._go_on(lane, grant)

    def _settle(self, lane: Lane, grant: Grant, reply: Reply) -> Outcome | None:
        """Note what a reply means for the limiter, the lane, the job and the task; what the recorder is told."""
        now_s, job, task = self._now_s(), grant.job, grant.task
        grant.settled = True
        lane.came_back(grant.reservation.sent_at_s)
        lane.tokens += reply.usage.total_tokens
        job.tokens_used += reply.usage.total_tokens
        if isinstance(reply.result, Answer):
            grant.limiter.replied(
                grant.reservation,
                reply.limits,
                now_s,
                estimate=task.tokens,
                prompt_tokens=reply.usage.prompt_tokens,
                completion_tokens=reply.usage.completion_tokens,
            )
            self._join_group(lane, reply)
            self._note_works(lane, grant)
            job.note_decision(None)
            self._wake_blocked(lane, grant.limiter)
            return Outcome(job.id, task.position, reply.result, task.tries.attempts + 1, 1, reply.usage)
        return self._settle_problem(lane, grant, reply.result, reply, now_s)

    def _settle_problem(
        self, lane: Lane, grant: Grant, problem: Problem, reply: Reply, now_s: float
    ) -> Outcome | None:
        job, task = grant.job, grant.task
        job.last_problem = f"{problem.code}, {problem.message}"
        if self._aborted and problem.kind in (ProblemKind.TRANSIENT, ProblemKind.STALE):
            grant.limiter.failed(grant.reservation, reply.limits, now_s)
            return None
        if problem.kind is ProblemKind.RATE_LIMITED:
            grant.limiter.rate_limited(
                grant.reservation, reply.limits, now_s, problem.retry_after_s, self._jitter(), problem.bound
            )
            log.info("%s is rate limited", lane.name, extra={"action": "rate_limited", "job_id": job.id})
        else:
            grant.limiter.failed(grant.reservation, reply.limits, now_s)
        self._join_group(lane, reply)
        sent_at_s = grant.reservation.sent_at_s
        if problem.kind.shows_good_key:
            self._note_works(lane, grant)
        if lane.troubled(problem, job.model, sent_at_s, now_s, self._jitter()):
            log.warning(
                "%s: %s", lane.name, problem.message, extra={"action": problem.kind, "job_id": job.id}
            )
        self._wake_blocked(lane, grant.limiter)
        decision = self._decide(lane, grant, problem)
        attempts = decision.attempts if isinstance(decision, GivenUp) else decision.tries.attempts
        failure = decision.failure if isinstance(decision, GivenUp) else None
        if failure is None and job.closing is not None:
            failure = job.closing
        if failure is None and isinstance(decision, Again):
            task.tries = decision.tries
            task.due_s = now_s + decision.wait_s if decision.wait_s else 0.0
            job.sent.pop(task.position, None)
            job.ask_again(task, decision.place, now_s)
            self._wake()
        else:
            job.note_decision(problem.message if problem.about_settings else None)
        usage = Usage() if not reply.told_usage else reply.usage
        return Outcome(job.id, task.position, failure, attempts, 1, usage)

    def _note_works(self, lane: Lane, grant: Grant) -> None:
        if lane.works(grant.reservation.sent_at_s):
            log.info("%s answers again", lane.name, extra={"action": "key_back"})
            self._wake()  # others of its group may have waited for this one call to tell

    def _decide(self, lane: Lane, grant: Grant, problem: Problem) -> Again | GivenUp:
        task = grant.task
        decision = decide(problem, task.tries, self._jitter())
        if isinstance(decision, Again) and decision.elsewhere:
            task.avoid = task.avoid | {lane.number}
        if problem.kind is ProblemKind.TOO_LARGE:
            task.too_large_for = task.too_large_for | {lane.group.number}
            if all(other.refused or other.group.number in task.too_large_for for other in self.lanes):
                return GivenUp(Failure(problem.code, problem.message), task.tries.attempts + 1)
        return decision

    def _end_early(self, job: JobRun) -> None:
        """Close a job that can't, or mustn't, go on."""
        failure = None
        budget = job.settings.max_total_tokens
        if job.closing is not None:
            return
        if budget is not None and job.tokens_used >= budget:
            failure = Failure(ErrorCode.BUDGET, "the job had used its max_total_tokens")
        elif job.refusal is not None and job.refusals >= SAME_REFUSALS:
            failure = Failure(ErrorCode.BAD_REQUEST, job.refusal)
        elif self._hopeless(job):
            failure = Failure(ErrorCode.MODEL_UNAVAILABLE, "no key may use this model")
        if failure is not None:
            log.warning("a job ends early: %s", failure.code, extra={"action": "close_job", "job_id": job.id})
            self.close(job.id, failure)
        if failure is not None and failure.code is ErrorCode.MODEL_UNAVAILABLE:
            with self._lock:
                alike = [run for run in self._queue if run.model == job.model and run.closing is None]
            for other in alike:  # those that wait would learn nothing by a call
                self.close(other.id, failure)

    def _hopeless(self, job: JobRun) -> bool:
        """Whether every key that works may not use the job's model."""
        if not any(lane.group.missing_models for lane in self.lanes):
            return False
        with self._lock:
            now_s = self._now_s()
            working = [lane for lane in self.lanes if not lane.refused]
            return bool(working) and all(
                lane.group.missing_models.get(job.model, 0.0) > now_s for lane in working
            )

    def _go_on(self, lane: Lane, grant: Grant) -> Grant | None:
        """The leave for a chunk's next task; or the rest goes back, since something else should go first."""
        job, rest = grant.job, grant.rest
        if not rest or job.closing is not None:
            return None
        now_s = self._now_s()
        if (
            self._taking
            and self._recorder.healthy
            and now_s < grant.until_s
            and not job.front
            and lane.hold(job.model, now_s) is None
            and not self._queue.others_wait(job)
        ):
            limiter = lane.group.limiter(job.model)
            reserved = limiter.reserve(limiter.cost(rest[0].tokens, job.settings.max_output_tokens), now_s)
            if isinstance(reserved, Reservation):
                following = Grant(job, rest.popleft(), limiter, reserved, rest, grant.until_s)
                self._send(lane, following)
                return following
        job.give_back(rest)
        self._wake(other for other in self.lanes if other is not lane)
        return None

    def _drop(self, lane: Lane, grant: Grant) -> None:
        """After a bug: what the loop held goes back, and its call counts as over."""
        job = grant.job
        if not grant.settled:
            lane.came_back(grant.reservation.sent_at_s)
            grant.limiter.released()
        task = job.sent.pop(grant.task.position, None)
        if job.closing is None:
            job.give_back(grant.rest)
            if task is not None:
                job.front.appendleft(task)

    def _wake_blocked(self, lane: Lane, limiter: Limiter) -> None:
        """A reply has made room: wake the lanes that waited for one."""
        if limiter.blocked:
            limiter.blocked = False
            self._wake(other for other in self.lanes if other.group is lane.group)

    def _join_group(self, lane: Lane, reply: Reply) -> None:
        """Lanes whose replies name the same organisation and project share one quota group."""
        if reply.organization is None or reply.project is None:
            return
        key = (lane.base_url, reply.organization, reply.project)
        group = self._groups.setdefault(key, lane.group)
        group.name = group.name or f"{reply.organization}/{reply.project}"
        if lane.group is not group:
            group.absorb(lane.group)
            lane.group = group

    # The feeder: pages of tasks from the database, and deadlines

    def _feed(self) -> None:
        while self._taking:
            try:
                self._feed_once()
            except Exception:
                log.exception("the feeder ran into a bug and goes on", extra={"action": "feed"})
                threading.Event().wait(RETRY_READ_S)

    def _feed_once(self) -> None:
        with self._lock:
            job = self._queue.wanting_page()
            if job is None and self._taking:
                self._feed_wanted.wait(self._until_next_deadline_s())
                job = self._queue.wanting_page()
            if not self._taking:
                return
            late = [run for run in self._queue if run.closing is None and run.deadline_at <= utc_now()]
            if job is not None:
                job.loading = True
        for run in late:
            self.close(run.id, self._expired(run))
        if job is not None:
            self._end_early(job)
            self._load_page(job)

    def _load_page(self, job: JobRun) -> None:
        try:
            with self._database.read() as session:
                page = task_store.pending_page(session, job.id, job.cursor, PAGE_TASKS, PAGE_TOKENS)
        except SQLAlchemyError:
            log.exception(
                "a page of tasks can't be read; trying again", extra={"action": "feed", "job_id": job.id}
            )
            threading.Event().wait(RETRY_READ_S)
            with self._lock:
                job.loading = False
            return
        with self._lock:
            cursor = page[-1].position if page else job.cursor
            tasks = [
                QueuedTask(task.position, task.prompt, task.tokens, Tries(task.attempts)) for task in page
            ]
            job.add_page(tasks if job.closing is None else [], cursor, exhausted=not page)
            if tasks:
                self._wake()

    def _until_next_deadline_s(self) -> float | None:
        deadlines = [job.deadline_at for job in self._queue if job.closing is None]
        return max(0.01, (min(deadlines) - utc_now()).total_seconds()) if deadlines else None

    def _expired(self, job: JobRun) -> Failure:
        """Why a job is ended at its deadline: what held it, if something did."""
        with self._lock:
            now_s = self._now_s()
            holds = [lane.hold(job.model, now_s) for lane in self.lanes]
        states = {hold.state for hold in holds if hold is not None and not hold.model_missing}
        if None not in holds and states == {LaneState.REFUSED}:
            return Failure(ErrorCode.KEY_REFUSED, "the job's deadline passed: every key is refused")
        if None not in holds and states and states <= {LaneState.REFUSED, LaneState.OUT_OF_QUOTA}:
            return Failure(ErrorCode.QUOTA_EXHAUSTED, "the job's deadline passed: no key has quota left")
        last = f"; the last trouble was: {job.last_problem}" if job.last_problem else ""
        return Failure(ErrorCode.EXPIRED, f"the job's deadline passed{last}")


def _at(moment_s: float, now_s: float) -> datetime:
    return utc_now() + timedelta(seconds=max(0.0, moment_s - now_s))
