"""What a reply means: for its key and the key's limits, for the job, and for each task that was asked.

Decides and notes; it neither waits nor calls. The dispatcher's lock is held throughout.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpt_worker.backoff import Again, GivenUp, Place, Problem, ProblemKind, decide
from gpt_worker.domain import Answer, Failure, Outcome, Usage
from gpt_worker.fair_queue import JobRun, QueuedTask
from gpt_worker.gpt import AnyReply
from gpt_worker.lanes import Lane, QuotaGroup
from gpt_worker.marks import Marks
from gpt_worker.packing import halves, share, smaller_may_do
from gpt_worker.rate_limit import Limiter, Reservation

log = logging.getLogger(__name__)

UNPACKABLE_S = 3600.0
PAST_GROUPS = 16


@dataclass(slots=True)
class Grant:
    """A thread's leave to send one request, of one task or of a pack, and the rest of its chunk."""

    job: JobRun
    tasks: Sequence[QueuedTask]
    limiter: Limiter
    reservation: Reservation
    rest: deque[QueuedTask]
    until_s: float
    announce: bool = False  # the job's first request: the recorder is told that it runs
    returned: bool = field(default=False)
    settled: bool = field(default=False)  # with the limiter
    flight: int | None = None  # its slot among the calls in flight


class Settling:
    """Settles the calls of all lanes; `wake(lanes)`, or all of them, says that tasks may go."""

    def __init__(
        self, lanes: Sequence[Lane], wake: Callable[[Iterable[Lane]], None], jitter: Callable[[], float]
    ) -> None:
        self._lanes = lanes
        self._wake = wake
        self._jitter = jitter
        self._groups: dict[tuple[str, str, str], QuotaGroup] = {}
        # (base URL, model) → when packs are tried again.
        self._unpackable: Marks[tuple[str, str], float] = Marks()
        self.aborted = False  # calls that fail now were cut by us

    def packs(self, lane: Lane, job: JobRun, now_s: float) -> bool:
        """Whether a job's tasks go several at once on this lane."""
        return job.packs and self._unpackable.get((lane.base_url, job.model), 0.0) <= now_s

    def settle(self, lane: Lane, grant: Grant, reply: AnyReply, now_s: float) -> list[Outcome]:
        """Note what a reply means; what the recorder is told. Tasks that are asked again are back in the queue."""
        lane.tokens += reply.usage.total_tokens
        grant.job.tokens_used += reply.usage.total_tokens
        if not isinstance(reply.result, Problem):
            self._note_answer(lane, grant, reply, now_s)
            if not isinstance(reply.result, Answer):
                return self._settle_pack(grant, reply.result, reply.usage)
            [task] = grant.tasks
            grant.job.note_decision(None)
            attempts = task.tries.attempts + 1
            return [Outcome(grant.job.id, task.position, reply.result, attempts, 1, reply.usage)]
        grant.job.last_problem = f"{reply.result.code}, {reply.result.message}"
        if self.aborted and reply.result.kind in (ProblemKind.TRANSIENT, ProblemKind.STALE):
            grant.settled = True
            grant.limiter.failed(grant.reservation, reply.limits, now_s)
            return []
        self._note_problem(lane, grant, reply.result, reply, now_s)
        return self._settle_problem(lane, grant, reply.result, reply.usage, now_s)

    # The key

    def _note_answer(self, lane: Lane, grant: Grant, reply: AnyReply, now_s: float) -> None:
        grant.settled = True
        grant.limiter.replied(
            grant.reservation,
            reply.limits,
            now_s,
            estimate=grant.job.tokens_of(grant.tasks),
            prompt_tokens=reply.usage.prompt_tokens,
        )
        self._join_group(lane, reply)
        self._note_works(lane, grant)
        self._wake_blocked(lane, grant.limiter)

    def _note_problem(
        self, lane: Lane, grant: Grant, problem: Problem, reply: AnyReply, now_s: float
    ) -> None:
        extra = {"action": problem.kind, "job_id": grant.job.id}
        grant.settled = True
        if problem.kind is ProblemKind.RATE_LIMITED:
            grant.limiter.rate_limited(
                grant.reservation,
                reply.limits,
                now_s,
                problem.retry_after_s,
                self._jitter(),
                problem.rate_limit,
            )
            log.info("%s is rate limited", lane.name, extra=extra)
        else:
            grant.limiter.failed(grant.reservation, reply.limits, now_s)
        self._join_group(lane, reply)
        if problem.kind.shows_good_key:
            self._note_works(lane, grant)
        if lane.troubled(problem, grant.job.model, grant.reservation.sent_at_s, now_s, self._jitter()):
            log.warning("%s: %s", lane.name, problem.code, extra=extra)  # its own words may hold a prompt
        if problem.kind is ProblemKind.PACK_REFUSED:
            self._unpackable[lane.base_url, grant.job.model] = now_s + UNPACKABLE_S
        self._wake_blocked(lane, grant.limiter)

    def _note_works(self, lane: Lane, grant: Grant) -> None:
        if lane.works(grant.reservation.sent_at_s):
            log.info("%s answers again", lane.name, extra={"action": "key_back"})
            self._wake(self._lanes)  # others of its group may have waited for this one call to tell

    def _wake_blocked(self, lane: Lane, limiter: Limiter) -> None:
        """A reply has made room: wake the lanes that waited for one."""
        if limiter.blocked:
            limiter.blocked = False
            self._wake(other for other in self._lanes if other.group is lane.group)

    def _join_group(self, lane: Lane, reply: AnyReply) -> None:
        """Lanes whose replies name the same organisation and project share one quota group."""
        if reply.organization is None or reply.project is None:
            return
        key = (lane.base_url, reply.organization, reply.project)
        name = f"{reply.organization}/{reply.project}"
        group = self._groups.get(key)
        if group is None:
            self._make_room_for_group()
            group = lane.group if lane.group.name is None else QuotaGroup(lane.group.bursts)
            self._groups[key] = group
        group.name = name
        if lane.group is not group:
            if lane.group.name is None:
                group.absorb(lane.group)
            lane.group = group

    def _make_room_for_group(self) -> None:
        """A reply may name any group: of those that no lane belongs to any more, keep a few."""
        if len(self._groups) >= len(self._lanes) + PAST_GROUPS:
            present = {lane.group for lane in self._lanes}
            del self._groups[next(key for key, group in self._groups.items() if group not in present)]

    def _could_take(self, lane: Lane, job: JobRun, task: QueuedTask, now_s: float) -> bool:
        """Whether it is not known that this key can never answer the task."""
        missing = lane.group.missing_models.get(job.model, 0.0) > now_s
        return not (lane.refused or missing or lane.group.number in task.too_large_for)

    # The tasks

    def _settle_pack(self, grant: Grant, texts: Sequence[str | None], usage: Usage) -> list[Outcome]:
        """The answers of a packed reply; what it has missed goes again, in halves, uncharged: that ends by itself."""
        job = grant.job
        missing = [task for task, text in zip(grant.tasks, texts, strict=True) if text is None]
        if missing:
            job.pack_size.fell_short(len(grant.tasks))
        else:
            job.pack_size.came_whole(len(grant.tasks))
        outcomes = []
        usages = share_out(usage, grant.tasks, texts)
        for number, (task, text, part) in enumerate(zip(grant.tasks, texts, usages, strict=True)):
            decision = job.closing if text is None else Answer(text)
            if decision is not None:
                job.note_decision(None)
            attempts = task.tries.attempts + (text is not None)
            outcomes.append(Outcome(job.id, task.position, decision, attempts, int(number == 0), part))
        if job.closing is None:
            for task in reversed(missing):
                task.pack_limit = halves(len(missing))
                job.ask_again(task, Place.FRONT, 0.0)
            self._wake(self._lanes)
        return outcomes

    def _settle_problem(
        self, lane: Lane, grant: Grant, problem: Problem, usage: Usage, now_s: float
    ) -> list[Outcome]:
        if len(grant.tasks) > 1:
            grant.job.pack_size.fell_short(len(grant.tasks))
        usages = share_out(usage, grant.tasks, [None] * len(grant.tasks))
        last_first = zip(reversed(grant.tasks), reversed(usages), strict=True)  # each goes to the very front
        outcomes = [self._after_problem(lane, grant, task, problem, part, now_s) for task, part in last_first]
        outcomes[0] = replace(outcomes[0], calls=1)
        self._wake(self._lanes)
        return outcomes

    def _after_problem(
        self, lane: Lane, grant: Grant, task: QueuedTask, problem: Problem, usage: Usage, now_s: float
    ) -> Outcome:
        """What becomes of one task of a request that has failed."""
        job = grant.job
        decision = self._decide(lane, grant, task, problem, now_s)
        attempts = decision.attempts if isinstance(decision, GivenUp) else decision.tries.attempts
        failure = decision.failure if isinstance(decision, GivenUp) else job.closing
        if failure is None and isinstance(decision, Again):
            task.tries = decision.tries
            task.due_s = now_s + decision.wait_s if decision.wait_s else 0.0
            job.ask_again(task, decision.place, now_s)
        else:
            job.note_decision(problem.message if problem.about_settings else None)
        return Outcome(job.id, task.position, failure, attempts, usage=usage)

    def _decide(
        self, lane: Lane, grant: Grant, task: QueuedTask, problem: Problem, now_s: float
    ) -> Again | GivenUp:
        if len(grant.tasks) > 1 and smaller_may_do(problem):
            task.pack_limit = halves(len(grant.tasks))
            return Again(0.0, Place.FRONT, task.tries, elsewhere=False)
        if len(grant.tasks) > 1 and problem.kind is ProblemKind.FINAL:
            grant.job.packs = False  # what is wrong, the tasks alone will show
            return Again(0.0, Place.FRONT, task.tries, elsewhere=False)
        took_s = now_s - grant.reservation.sent_at_s
        decision = decide(problem, task.tries, self._jitter(), took_s)
        if isinstance(decision, Again) and decision.elsewhere:
            task.avoid = task.avoid | {lane.number}
        if problem.kind is ProblemKind.TOO_LARGE:
            task.too_large_for = task.too_large_for | {lane.group.number}
            if not any(self._could_take(other, grant.job, task, now_s) for other in self._lanes):
                return GivenUp(Failure(problem.code, problem.message), task.tries.attempts + 1)
        return decision


def share_out(usage: Usage, tasks: Sequence[QueuedTask], texts: Sequence[str | None]) -> list[Usage]:
    """One call's usage as its tasks' shares: prompts by their estimates, answers by their lengths."""
    prompts = share(usage.prompt_tokens, [task.tokens for task in tasks])
    completions = share(usage.completion_tokens, [len(text or "") for text in texts])
    return [Usage(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
