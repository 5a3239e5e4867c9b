"""The threads that serve the fair queue: hands chunks of tasks to threads that each own one key.

One lock guards the queue and the lanes; it is never held across a call, a query or a commit. A thread takes a chunk,
asks for its tasks one by one (or, packed, all at once), and gives the rest back when something else should go first.
Outcomes go to the recorder.
"""

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from gpt_worker import standing
from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.db import Database
from gpt_worker.domain import ErrorCode, Failure, JobSettings, JobStatus, utc_now
from gpt_worker.fair_queue import FairQueue, JobRun, QueuedTask
from gpt_worker.feeder import Feeder
from gpt_worker.flights import Flights
from gpt_worker.gpt import AnyReply, Endpoint, Reply
from gpt_worker.joining import Joining
from gpt_worker.lanes import Lane
from gpt_worker.models import JobRow
from gpt_worker.rate_limit import Bound, Reservation, Wait
from gpt_worker.recorder import Recorder
from gpt_worker.settling import Grant, Settling
from gpt_worker.splitting import chunk_limit
from gpt_worker.standing import Waiting

T = TypeVar("T")
log = logging.getLogger(__name__)

CHUNK_S = 2.0
MAX_PASSED_OVER = 50
AFTER_BUG_S = 1.0
LANDING_S = 5.0  # what a call in flight at its job's deadline gets to land: it is paid for
LOOK_AGAIN_S = 1.0  # whether tasks that other keys should take are still not taken
FREE_LOOPS = 4  # so many threads of a key begin at once


class Dispatcher:
    """Sends every pending task of every unfinished job, once, as fast as the keys allow."""

    def __init__(
        self,
        database: Database,
        recorder: Recorder,
        make_lanes: Callable[[threading.Lock], Sequence[Lane]],
        *,
        flights: Flights,
        call_deadline_s: float,
        max_in_flight: int | None = None,
        now_s: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._recorder = recorder
        self._flights = flights
        self._call_deadline_s = call_deadline_s
        self._max_in_flight = math.inf if max_in_flight is None else max_in_flight
        self._in_flight = 0
        self._awaited = False  # whether a lane waits for any call to end
        self._now_s = now_s
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self.lanes = list(make_lanes(self._lock))
        self._queue = FairQueue()
        self._feeder = Feeder(database, self._queue, self._lock, self)
        self._settling = Settling(self.lanes, self._wake, jitter)
        self._taking = True

    # The life of the dispatcher

    def start(self, jobs: Iterable[JobRow]) -> None:
        """Begin to serve, first of all the jobs that an earlier process left unfinished."""
        self._flights.open(int(min(self.threads, self._max_in_flight)))
        for job in jobs:
            self.add(job)
        self._feeder.start()

    def stop_taking(self) -> None:
        """Nothing new is sent; calls in flight go on."""
        with self._lock:
            self._taking = False
            self._flights.close()
            self._feeder.end()
            self._wake()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether every call in flight came back in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not any(lane.loops for lane in self.lanes), timeout_s)

    def abort(self) -> None:
        """Cut the calls in flight: their tasks stay pending, so a next start asks them again."""
        with self._lock:
            self._settling.aborted = True
            self._taking = False
            self._flights.close()
            self._feeder.end()
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
            if self._queue.is_near(run):  # else the feeder, which looks at every user, would look in vain
                self._feeder.notify()

    def close(self, job_id: str, run: int, failure: Failure) -> threading.Event:
        """Send nothing more of a job's run: what was not sent fails with `failure`, calls in flight still land.

        The event is set when those failures are stored.
        """
        with self._lock:
            job = self._queue.get(job_id)
            spare = self._start_closing(job, failure) if job and job.run == run else frozenset()
        return self._recorder.close_job(job_id, run, failure, spare)

    def forget(self, job_id: str, run: int) -> None:
        """This run of the job has ended, or the job is gone."""
        with self._lock:
            job = self._queue.get(job_id)
            if job is not None and job.run <= run:
                job.clear()
                job.closing = job.closing or Failure(ErrorCode.CANCELLED, "the job is gone")
                if job.line.runs_low:
                    self._feeder.notify()
                self._queue.remove(job_id)

    def _start_closing(self, job: JobRun, failure: Failure) -> frozenset[int]:
        job.closing = job.closing or failure
        job.clear()
        self._feeder.notify()
        return frozenset(job.sent)

    def waiting(self, job_id: str) -> Waiting | None:
        """Why nothing of a job moves now; None if something does, or the job is not unfinished."""
        with self._lock:
            job = self._queue.get(job_id)
            if job is None or job.sent or job.closing is not None:
                return None
            if not self._may_send:
                return Waiting("the database takes no answers", None)
            return standing.why_idle(job, self.lanes, self._now_s())

    def usable_lanes(self, model: str) -> int:
        """How many keys take tasks for this model now."""
        with self._lock:
            now_s = self._now_s()
            return sum(lane.hold(model, now_s) is None for lane in self.lanes)

    @property
    def threads(self) -> int:
        return sum(lane.max_threads for lane in self.lanes)

    # Lanes

    @property
    def full(self) -> bool:
        """Whether as many calls are in flight as may be, over all keys."""
        return self._in_flight >= self._max_in_flight

    @property
    def _may_send(self) -> bool:
        """Whether answers are stored, and the tasks are surely ours to ask.

        The clock tells the latter at once, also to a process that has just come back from a suspension, in which
        another service may have taken them over; no commit needs to fail first.
        """
        return self._recorder.healthy and self._database.why_not_ours() is None

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
            self._wake()  # others may take now what was left for it

    def estimate_s(self, model: str, requests: int, tokens: int) -> float | None:
        """About how long so much takes at the limits learned so far; None while none is known."""
        with self._lock:
            return standing.estimate_s(self.lanes, model, requests, tokens)

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
        comes = lane.waiting or lane.joining
        if not comes and lane.loops < lane.max_threads and self._taking:
            wanted = threading.Event()
            wanted.set()
            try:
                lane.executor.submit(self._serve, lane, wanted)
            except RuntimeError:  # the machine has no more threads; the executor may still run it on another
                wanted.clear()
                if lane.loops:
                    lane.max_threads = lane.loops
                log.exception("%s gets no more threads", lane.name, extra={"action": "no_thread"})
                return
            lane.loops += 1
            lane.joining = True

    def lane_up(self, lane: Lane, endpoint: Endpoint, base_url: str) -> None:
        with self._lock:
            lane.endpoint, lane.base_url, lane.down = endpoint, base_url, None
            lane.mend()
            self._wake([lane])

    def lane_down(self, lane: Lane, reason: str) -> None:
        with self._lock:
            lane.down = reason
            self._wake()

    # A thread's loop: take, ask, settle

    def _serve(self, lane: Lane, wanted: threading.Event) -> None:
        grant: Grant | None = None
        if not wanted.is_set():
            return
        try:
            self._join(lane)
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
            threading.Event().wait(AFTER_BUG_S)  # a bug that comes back must not spin
            with self._lock:
                self._grow(lane)

    def _join(self, lane: Lane) -> None:
        """Wait until one more thread is of use."""
        joining = Joining()
        with self._lock:
            waits = lane.loops > FREE_LOOPS
            while waits and self._taking:
                due_s, returned = self._now_s() + joining.pause_s, lane.requests - lane.in_flight
                lane.may_join.wait(joining.pause_s)
                calls_end = lane.requests - lane.in_flight > returned
                waits = not joining.may_join(self._now_s() - due_s, calls_end=calls_end)
            lane.joining = False

    def _take(self, lane: Lane) -> Grant | None:
        """The next request for this lane, waiting for it if no other loop of the lane does; None: the loop ends."""
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
        if not self._may_send:
            return math.inf
        soonest_s = math.inf
        shut: set[str] = set()  # models of which nothing can go now
        passed: dict[str, QueuedTask] = {}  # by model, the first task for which there are too few tokens yet
        for job in self._queue.in_turn():
            if job.model in shut:
                continue
            hold = lane.hold(job.model, now_s)
            if hold is not None:
                shut.add(job.model)
                soonest_s = min(soonest_s, math.inf if hold.until_s is None else hold.until_s - now_s)
                continue
            tasks = self._next_tasks(lane, job, now_s)
            if not tasks:
                others_are_to_take_them = LOOK_AGAIN_S if job.in_memory > len(job.delayed) else math.inf
                soonest_s = min(soonest_s, job.next_due_s() - now_s, others_are_to_take_them)
                continue
            reserved = self._reserve(lane, job, tasks, now_s)
            if isinstance(reserved, Reservation):
                return self._grant(lane, job, tasks, reserved, passed.get(job.model), now_s)
            soonest_s = min(soonest_s, reserved.seconds)
            if reserved.bound is not Bound.TOKENS or tasks[0].passed_over >= MAX_PASSED_OVER:
                shut.add(job.model)
            else:
                passed.setdefault(job.model, tasks[0])
        return soonest_s

    def _next_tasks(self, lane: Lane, job: JobRun, now_s: float) -> list[QueuedTask]:
        """The tasks of the job's next request, still in their places."""

        def may_take(task: QueuedTask) -> bool:
            return standing.may_take(lane, self.lanes, job, task, now_s)

        first = job.next_for(may_take, now_s)
        if first is None:
            return []
        return job.pack_with(first, may_take) if self._settling.packs(lane, job, now_s) else [first]

    def _grant(
        self,
        lane: Lane,
        job: JobRun,
        tasks: list[QueuedTask],
        reserved: Reservation,
        passed: QueuedTask | None,
        now_s: float,
    ) -> Grant:
        """Leave for these tasks, and the rest of their chunk.

        A packed request is a chunk; and a larger task that was passed over is so by one task, since each counts.
        """
        was_fresh = bool(job.fresh) and job.fresh[0] is tasks[0]
        for task in tasks:
            job.pop(task)
        rest: deque[QueuedTask] = deque()
        if passed is not None:
            passed.passed_over += 1
        elif was_fresh and not job.packs:
            rest = job.cut_chunk(tasks[0].tokens, chunk_limit(job.pending, self.threads))
        grant = self._send(lane, job, tasks, reserved, rest, now_s + CHUNK_S, now_s)
        if job.line.runs_low:
            self._feeder.notify()
        return grant

    def _reserve(
        self, lane: Lane, job: JobRun, tasks: Sequence[QueuedTask], now_s: float
    ) -> Reservation | Wait:
        if self.full:
            self._awaited = True
            return Wait(math.inf, Bound.THREADS)
        limiter = lane.group.limiter(job.model)
        cost = limiter.cost(job.tokens_of(tasks), job.settings.max_output_tokens, len(tasks))
        return limiter.reserve(cost, now_s)

    def _send(
        self,
        lane: Lane,
        job: JobRun,
        tasks: Sequence[QueuedTask],
        reservation: Reservation,
        rest: deque[QueuedTask],
        until_s: float,
        now_s: float,
    ) -> Grant:
        limiter = lane.group.limiter(job.model)
        grant = Grant(job, tasks, limiter, reservation, rest, until_s, announce=not job.started)
        job.started = True
        for task in tasks:
            job.sent[task.position] = task
            task.passed_over = 0
        self._queue.charge(job, job.tokens_of(tasks))
        self._in_flight += 1
        lane.sent(now_s)
        grant.flight = self._flights.take(job.id, job.run, [task.position for task in tasks])
        return grant

    def _ask(self, lane: Lane, grant: Grant) -> Grant | None:
        """Make one call and settle it; the leave for the chunk's next task, or None."""
        job = grant.job
        if grant.announce:
            self._recorder.job_started(job.id)
        try:
            reply = self._call(lane, job, grant.tasks)
        except Exception:  # a task that can't be asked must not come back for ever
            log.exception("a call ran into a bug", extra={"action": "ask", "job_id": job.id})
            reply = Reply(
                Problem(ProblemKind.TRANSIENT, ErrorCode.INTERRUPTED, "the service failed under this task")
            )
        with self._lock:
            self._came_back(lane, grant)
            outcomes = self._settling.settle(lane, grant, reply, self._now_s())
        for outcome in outcomes:
            # May block while commits lag; so nothing is held meanwhile.
            self._recorder.put(outcome, hurry=job.all_sent)
        self.end_early(job)
        with self._lock:
            again = {outcome.position for outcome in outcomes if outcome.decision is None}
            for task in grant.tasks:
                if task.position not in again:
                    job.sent.pop(task.position, None)
            return self._go_on(lane, grant)

    def _call(self, lane: Lane, job: JobRun, tasks: Sequence[QueuedTask]) -> AnyReply:
        assert lane.endpoint is not None  # a lane without one is down, and gets no task
        left_s = (job.deadline_at - utc_now()).total_seconds()
        deadline_s = min(self._call_deadline_s, max(0.0, left_s) + LANDING_S)
        if len(tasks) == 1:
            return lane.endpoint.ask(job.model, job.settings, tasks[0].prompt, deadline_s)
        return lane.endpoint.ask_pack(job.model, job.settings, [task.prompt for task in tasks], deadline_s)

    def end_early(self, job: JobRun) -> None:
        """Close a job that can't, or mustn't, go on."""
        if job.closing is not None:
            return
        with self._lock:  # of several threads that see it, one does it
            failure = standing.early_end(job, self.lanes, self._now_s()) if job.closing is None else None
            if failure is None:
                return
            spare = self._start_closing(job, failure)
        log.warning("a job ends early: %s", failure.code, extra={"action": "close_job", "job_id": job.id})
        self._recorder.close_job(job.id, job.run, failure, spare)
        if failure.code is ErrorCode.MODEL_UNAVAILABLE:
            with self._lock:
                alike = [run for run in self._queue if run.model == job.model and run.closing is None]
            for other in alike:  # those that wait would learn nothing by a call
                self.close(other.id, other.run, failure)

    def expire(self, job: JobRun) -> None:
        """Close a job whose deadline has passed."""
        with self._lock:
            failure = standing.expired(job, self.lanes, self._now_s())
        self.close(job.id, job.run, failure)

    def page_came(self) -> None:
        """New tasks are in the queue; the lock is held."""
        self._wake()

    def _go_on(self, lane: Lane, grant: Grant) -> Grant | None:
        """The leave for a chunk's next task; or the rest goes back, since something else should go first."""
        job, rest = grant.job, grant.rest
        if not rest or job.closing is not None:
            return None
        now_s = self._now_s()
        if (
            self._taking
            and self._may_send
            and now_s < grant.until_s
            and not job.front
            and lane.hold(job.model, now_s) is None
            and not self._queue.others_wait(job)
        ):
            reserved = self._reserve(lane, job, [rest[0]], now_s)
            if isinstance(reserved, Reservation):
                return self._send(lane, job, [rest.popleft()], reserved, rest, grant.until_s, now_s)
        job.give_back(rest)
        self._wake(other for other in self.lanes if other is not lane)
        return None

    def _drop(self, lane: Lane, grant: Grant) -> None:
        """After a bug: what the loop held goes back, and its call counts as over."""
        job = grant.job
        if not grant.returned:
            self._came_back(lane, grant)
        if not grant.settled:
            grant.limiter.released()
        sent = [task for task in grant.tasks if job.sent.pop(task.position, None) is not None]
        if job.closing is None:
            job.give_back(grant.rest)
            job.take_back(sent)
        else:  # its end has spared what was in flight
            self._recorder.close_job(job.id, job.run, job.closing, frozenset(job.sent))

    def _came_back(self, lane: Lane, grant: Grant) -> None:
        grant.returned = True
        self._flights.free(grant.flight)
        self._in_flight -= 1
        lane.came_back(grant.reservation.sent_at_s)
        if self._awaited:
            self._awaited = False
            self._wake()
