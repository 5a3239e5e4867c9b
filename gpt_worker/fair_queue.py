"""Whose task goes next: users in turn, weighted by tokens, then priority and age. No threads, no clock of its own.

Start-time fair queueing: each user has a virtual time that grows by the tokens sent for them; the user who is furthest
behind goes next, and whoever was away starts where the others are, so that nobody saves up a claim.
Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", 1996.
"""

import heapq
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from gpt_worker.backoff import Place, Tries
from gpt_worker.domain import Failure, JobSettings, Prompt
from gpt_worker.splitting import fits

LOW_TASKS = 250  # a user with fewer tasks in memory wants another page
MAX_RETURNED = 1000  # no new page while so many tasks of a job wait to be asked again
LOOK_AHEAD = 20  # tasks looked at for one that a lane may take


@dataclass(slots=True, eq=False)
class QueuedTask:
    """A task in memory, on its way to a call."""

    position: int
    prompt: Prompt
    tokens: int
    tries: Tries = field(default_factory=Tries)
    due_s: float = 0.0
    avoid: frozenset[int] = frozenset()  # lanes on which it failed; another goes first if there is one
    too_large_for: frozenset[int] = frozenset()  # quota groups that can never take it
    passed_over: int = 0

    @property
    def unbound(self) -> bool:
        """Whether any lane may take it."""
        return not (self.avoid or self.too_large_for)


@dataclass(slots=True, eq=False)
class JobRun:
    """One run of a job: the tasks of it that are in memory, and where to read on."""

    id: str
    run: int
    owner: str
    model: str
    settings: JobSettings
    deadline_at: datetime
    pending: int  # tasks not decided when the run began
    tokens_used: int = 0
    started: bool = False
    cursor: int = -1  # everything up to this position has been read
    exhausted: bool = False  # there is nothing behind the cursor
    loading: bool = False
    closing: Failure | None = None
    front: deque[QueuedTask] = field(default_factory=deque)  # given back, in order
    fresh: deque[QueuedTask] = field(default_factory=deque)  # read from the database
    behind: deque[QueuedTask] = field(default_factory=deque)  # after all others
    delayed: list[tuple[float, int, QueuedTask]] = field(default_factory=list)  # a heap by due time
    sent: dict[int, QueuedTask] = field(default_factory=dict)  # calls in flight, by position
    last_problem: str | None = None
    decided: int = 0
    refusals: int = 0  # the first so many outcomes were all the same refusal of the settings, `refusal`
    refusal: str | None = None

    def note_decision(self, refusal: str | None) -> None:
        """Count a task as decided; `refusal`: by a refusal of the job's settings that says this."""
        if refusal is not None and self.refusals == self.decided and self.refusal in (None, refusal):
            self.refusals += 1
            self.refusal = refusal
        self.decided += 1

    @property
    def turn(self) -> tuple[int, str]:
        return -self.settings.priority, self.id

    @property
    def wants_page(self) -> bool:
        returned = len(self.front) + len(self.behind) + len(self.delayed)
        return not (self.exhausted or self.loading or self.closing) and (
            len(self.fresh) < LOW_TASKS and returned < MAX_RETURNED
        )

    def add_page(self, page: Iterable[QueuedTask], cursor: int, exhausted: bool) -> None:
        self.fresh.extend(page)
        self.cursor, self.exhausted, self.loading = cursor, exhausted, False

    def next_for(self, may_take: Callable[[QueuedTask], bool], now_s: float) -> QueuedTask | None:
        """The first task that a lane may take, still in its place."""
        while self.delayed and self.delayed[0][0] <= now_s:
            self.front.append(heapq.heappop(self.delayed)[2])
        for tasks in (self.front, self.fresh, self.behind):
            for _, task in zip(range(LOOK_AHEAD), tasks, strict=False):
                if task.unbound or may_take(task):
                    return task
        return None

    def next_due_s(self) -> float:
        """When a delayed task is due; infinite without one."""
        return self.delayed[0][0] if self.delayed else float("inf")

    def pop(self, task: QueuedTask) -> None:
        """Take a task out of its place."""
        for tasks in (self.front, self.fresh, self.behind):
            if tasks and tasks[0] is task:
                tasks.popleft()
                return
        for tasks in (self.front, self.fresh, self.behind):
            if task in tasks:
                tasks.remove(task)
                return

    def cut_chunk(self, tokens: int, max_tasks: int) -> deque[QueuedTask]:
        """The tasks that go along with one just taken, of `tokens` tokens: the rest of its chunk."""
        rest: deque[QueuedTask] = deque()
        while self.fresh and fits(
            tokens, 1 + len(rest), self.fresh[0].tokens, self.settings.max_chunk_tokens, max_tasks
        ):
            tokens += self.fresh[0].tokens
            rest.append(self.fresh.popleft())
        return rest

    def give_back(self, tasks: deque[QueuedTask]) -> None:
        """Put the rest of a chunk back where it came from, in order."""
        self.fresh.extendleft(reversed(tasks))

    def ask_again(self, task: QueuedTask, place: Place, now_s: float) -> None:
        if task.due_s > now_s:
            heapq.heappush(self.delayed, (task.due_s, task.position, task))
        elif place is Place.FRONT:
            self.front.appendleft(task)
        else:
            self.behind.append(task)

    def clear(self) -> None:
        """Drop what is not in flight: somebody else decides those tasks."""
        for tasks in (self.front, self.fresh, self.behind, self.delayed):
            tasks.clear()

    @property
    def in_memory(self) -> int:
        return len(self.front) + len(self.fresh) + len(self.behind) + len(self.delayed)


@dataclass(slots=True, eq=False)
class _User:
    virtual_time: float = 0.0
    jobs: list[JobRun] = field(default_factory=list)


class FairQueue:
    """All unfinished jobs, by user."""

    def __init__(self) -> None:
        self._users: dict[str, _User] = {}
        self._jobs: dict[str, JobRun] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[JobRun]:
        return iter(list(self._jobs.values()))

    def get(self, job_id: str) -> JobRun | None:
        return self._jobs.get(job_id)

    def add(self, job: JobRun) -> None:
        self.remove(job.id)  # an earlier run whose end is being told to us just now
        self._jobs[job.id] = job
        insort(
            self._users.setdefault(job.owner, _User(self._virtual_time)).jobs,
            job,
            key=lambda other: other.turn,
        )

    def remove(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        user = self._users[job.owner]
        user.jobs.remove(job)
        if not user.jobs and user.virtual_time <= self._virtual_time:
            del self._users[job.owner]

    def in_turn(self) -> Iterator[JobRun]:
        """Every job that could have a task, the one whose turn it is first."""
        users = self._users.values()
        if len(users) > 1:
            users = sorted(users, key=lambda user: user.virtual_time)  # type: ignore[assignment]
        for user in users:
            awaited: set[str] = set()
            for job in user.jobs:
                if job.closing is None and job.model not in awaited:
                    yield job
                    if job.wants_page and not job.in_memory:
                        awaited.add(job.model)  # its page is on the way: later jobs do not overtake it

    def charge(self, job: JobRun, tokens: int) -> None:
        """Count a task as sent for its user."""
        user = self._users[job.owner]
        start = max(user.virtual_time, self._virtual_time)
        self._virtual_time = start
        user.virtual_time = start + tokens

    def others_wait(self, job: JobRun) -> bool:
        """Whether a user with a better claim than this job's has a task ready."""
        if len(self._users) < 2:
            return False
        mine = self._users[job.owner]
        return any(
            user.virtual_time < mine.virtual_time and any(other.front or other.fresh for other in user.jobs)
            for user in self._users.values()
            if user is not mine
        )

    def wanting_page(self) -> JobRun | None:
        """A job whose next page is wanted, those whose turn is near first.

        Tasks in memory count for each model apart: those of a model that no key may use now hold back no other's.
        """
        for user in self._users.values():
            in_memory: Counter[str] = Counter()
            for job in user.jobs:
                if in_memory[job.model] >= LOW_TASKS:
                    continue
                if job.wants_page:
                    return job
                in_memory[job.model] += LOW_TASKS if job.loading else len(job.fresh)
        return None
