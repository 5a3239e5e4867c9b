"""Whose task goes next: users in turn, weighted by tokens, then priority and age. No threads, no clock of its own.

Start-time fair queueing: each user has a virtual time that grows by the tokens sent for them; the user who is furthest
behind goes next, and whoever was away starts where the others are, so that nobody saves up a claim.
Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", 1996.
"""

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, count, dropwhile, islice
from math import inf

from gpt_worker.backoff import Place, Tries
from gpt_worker.domain import Failure, JobSettings, Prompt
from gpt_worker.packing import PackSize, PackTokens
from gpt_worker.splitting import fits

LOW_TOKENS = 500_000
LOW_TASKS = 250  # a user with fewer tasks in memory wants another page
PAGE_TASKS = 500  # of one job, or of many small ones together
MAX_RETURNED = 1000  # no new page while so many tasks of a job wait to be asked again
MOST_ENDED = 100  # deadlines of ended jobs that are kept, beside as many as there are jobs
LOOK_AHEAD = 20  # tasks looked at for one that a lane may take


@dataclass(slots=True, eq=False)
class QueuedTask:
    """A task in memory, on its way to a call."""

    position: int
    prompt: Prompt
    tokens: int
    weight: int  # in tokens: what it counts for in memory
    tries: Tries = field(default_factory=Tries)
    due_s: float = 0.0
    avoid: frozenset[int] = frozenset()  # lanes on which it failed; another goes first if there is one
    too_large_for: frozenset[int] = frozenset()  # quota groups that can never take it
    passed_over: int = 0
    pack_limit: int | None = None  # the most tasks of its next pack; 1: singly, in the ordinary form

    @property
    def unbound(self) -> bool:
        """Whether any lane may take it."""
        return not (self.avoid or self.too_large_for)


@dataclass(slots=True, eq=False)
class Line:
    """A user's jobs for one model.

    Those of which everything is sent wait for replies and commits, by the hundred where calls take no time: a walk that
    meets one leaves it out of `jobs` until a task of it comes back.
    """

    size: int = 0
    # In their turn, those that may have a task to send.
    jobs: list["JobRun"] = field(default_factory=list)
    # So many tasks may be taken before a page can be wanted; below 0, one may be wanted now.
    spare: float = -1

    @property
    def runs_low(self) -> bool:
        """Whether a page may be wanted."""
        return self.spare < 0

    def enter(self, job: "JobRun") -> None:
        """Take in a job that is to be read."""
        self.size += 1
        self.put(job)
        enough_is_in_front = self.jobs[-1] is job and self.spare < inf
        if not enough_is_in_front:
            self.spare = -1

    def leave(self, job: "JobRun") -> None:
        self.size -= 1
        if job.in_line:
            self._drop(job)

    def put(self, job: "JobRun") -> None:
        """Have a job among those that may have a task."""
        insort(self.jobs, job, key=_turn)
        job.in_line = True

    def _drop(self, job: "JobRun") -> None:
        del self.jobs[bisect_left(self.jobs, job.turn, key=_turn)]
        job.in_line = False

    def open_jobs(self) -> Iterator["JobRun"]:
        """Those that may have a task, in their turn."""
        place = 0
        while place < len(self.jobs):
            job = self.jobs[place]
            if job.is_spent:
                self._drop(job)
            else:
                yield job
                place += 1

    def front(self) -> Iterator["JobRun"]:
        """The line up to the first job whose tasks are still to be read: later ones do not overtake it."""
        for job in self.open_jobs():
            yield job
            if not (job.in_memory or job.exhausted):
                return

    def wanting(self) -> Iterator["JobRun"]:
        """The jobs that want a page: once little of the line is in memory, as many as have a page of tasks together.

        A walk that finds none goes on for as far, to tell when the next may find one.
        """
        tasks = weight = 0
        spare, found = inf, False
        for job in self.open_jobs():
            wants = job.wants_page
            if weight >= LOW_TOKENS:
                spare = 0
                break
            if tasks >= (LOW_TASKS if wants and not found else PAGE_TASKS):
                spare = min(spare, tasks - LOW_TASKS)
                break
            if wants:
                found = True
                tasks += job.pending
                yield job
            else:
                if not job.exhausted:
                    spare = min(spare, len(job.fresh) - LOW_TASKS)
                tasks += LOW_TASKS if job.loading else len(job.fresh)
                weight += job.weight
        if not found:
            self.spare = spare


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
    # Where it waits for its turn, and whether it is there among those that may have a task.
    line: Line = field(default_factory=Line, repr=False)
    in_line: bool = False
    packs: bool = field(init=False)
    pack_size: PackSize = field(default_factory=PackSize)
    pack_tokens: PackTokens = field(init=False)

    def __post_init__(self) -> None:
        self.packs = self.settings.pack
        self.pack_tokens = PackTokens(self.settings)

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
            len(self.fresh) < LOW_TASKS and returned < MAX_RETURNED and self.weight < LOW_TOKENS
        )

    @property
    def weight(self) -> int:
        """Of the tasks that were read and not taken yet, in tokens."""
        return sum(task.weight for task in self.fresh)

    @property
    def is_spent(self) -> bool:
        """Whether nothing of it is left to send, unless a task comes back."""
        return self.closing is not None or (self.exhausted and not self.in_memory)

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

    def pack_with(self, first: QueuedTask, may_take: Callable[[QueuedTask], bool]) -> list[QueuedTask]:
        """The tasks of one packed request, still in their places: this one, and those behind it that fit."""
        pack, most = [first], first.pack_limit or self.pack_size.tasks
        tokens = self.pack_tokens.shared + self.pack_tokens.of_task(first.tokens)
        behind = dropwhile(lambda task: task is not first, chain(self.front, self.fresh, self.behind))
        for task in islice(behind, 1, most):
            in_pack = self.pack_tokens.of_task(task.tokens)
            most = min(most, task.pack_limit or most)
            alike = (task.pack_limit is None) is (first.pack_limit is None)
            fitting = fits(tokens, len(pack), in_pack, self.settings.max_chunk_tokens, most)
            if not (alike and fitting and (task.unbound or may_take(task))):
                break
            pack.append(task)
            tokens += in_pack
        return pack

    def tokens_of(self, tasks: Sequence[QueuedTask]) -> int:
        """The estimated prompt tokens of one request for these tasks."""
        if len(tasks) == 1:
            return tasks[0].tokens
        return self.pack_tokens.shared + sum(self.pack_tokens.of_task(task.tokens) for task in tasks)

    def next_tasks(self) -> Iterator[QueuedTask]:
        """Some of the tasks that could go next."""
        return islice(chain(self.front, self.fresh, self.behind), LOOK_AHEAD)

    def next_due_s(self) -> float:
        """When a delayed task is due; infinite without one."""
        return self.delayed[0][0] if self.delayed else float("inf")

    def pop(self, task: QueuedTask) -> None:
        """Take a task out of its place."""
        self.line.spare -= 1
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
        self.line.spare -= len(rest)
        return rest

    def give_back(self, tasks: deque[QueuedTask]) -> None:
        """Put the rest of a chunk back where it came from, in order."""
        self.fresh.extendleft(reversed(tasks))
        self._has_again()

    def ask_again(self, task: QueuedTask, place: Place, now_s: float) -> None:
        """A task whose call gave no answer is back."""
        self.sent.pop(task.position, None)
        if task.due_s > now_s:
            heapq.heappush(self.delayed, (task.due_s, task.position, task))
        elif place is Place.FRONT:
            self.front.appendleft(task)
        else:
            self.behind.append(task)
        self._has_again()

    def take_back(self, tasks: Sequence[QueuedTask]) -> None:
        """Tasks that were not asked after all go first, in order."""
        self.front.extendleft(reversed(tasks))
        self._has_again()

    def _has_again(self) -> None:
        if not self.in_line:
            self.line.put(self)

    def clear(self) -> None:
        """Drop what is not in flight: somebody else decides those tasks."""
        if self.in_memory or not self.exhausted:
            self.line.spare = -1  # it has held back the pages of later jobs
        for tasks in (self.front, self.fresh, self.behind, self.delayed):
            tasks.clear()

    @property
    def all_sent(self) -> bool:
        """Whether every task that is not decided yet is in flight, and none waits in a thread's chunk."""
        return self.pending - self.decided <= len(self.sent)

    @property
    def in_memory(self) -> int:
        return len(self.front) + len(self.fresh) + len(self.behind) + len(self.delayed)


@dataclass(slots=True, eq=False)
class _User:
    virtual_time: float = 0.0
    # By model: what one of them waits for holds up no other.
    lines: dict[str, Line] = field(default_factory=dict)


class FairQueue:
    """All unfinished jobs, by user.

    Thousands may be queued, and a look is taken for every call: so none walks beyond the first job that waits for its
    tasks to be read, and the jobs of which everything is sent are out of the way.
    """

    def __init__(self) -> None:
        self._users: dict[str, _User] = {}
        self._jobs: dict[str, JobRun] = {}
        self._deadlines: list[
            tuple[datetime, int, JobRun]
        ] = []  # a heap; ended jobs are left in it for a while
        self._added = count()
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
        user = self._users.setdefault(job.owner, _User(self._virtual_time))
        job.line = user.lines.setdefault(job.model, Line())
        job.line.enter(job)
        heapq.heappush(self._deadlines, (job.deadline_at, next(self._added), job))
        if len(self._deadlines) > MOST_ENDED + 2 * len(self._jobs):
            self._deadlines = [entry for entry in self._deadlines if self._is_open(entry[2])]
            heapq.heapify(self._deadlines)

    def remove(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        user = self._users[job.owner]
        line, job.line = job.line, Line()
        line.leave(job)
        if not line.size:
            del user.lines[job.model]
        if not user.lines and user.virtual_time <= self._virtual_time:
            del self._users[job.owner]

    def in_turn(self) -> Iterator[JobRun]:
        """Every job that could have a task, the one whose turn it is first."""
        users = self._users.values()
        if len(users) > 1:
            users = sorted(users, key=lambda user: user.virtual_time)  # type: ignore[assignment]
        for user in users:
            fronts = [line.front() for line in user.lines.values()]
            yield from fronts[0] if len(fronts) == 1 else heapq.merge(*fronts, key=_turn)

    def charge(self, job: JobRun, tokens: int) -> None:
        """Count a task as sent for its user."""
        user = self._users[job.owner]
        start = max(user.virtual_time, self._virtual_time)
        self._virtual_time = start
        user.virtual_time = start + tokens

    def others_wait(self, job: JobRun) -> bool:
        """Whether a user with a better claim than this job's has a task for its model ready."""
        if len(self._users) < 2:
            return False
        mine = self._users[job.owner]
        return any(
            user.virtual_time < mine.virtual_time
            and (line := user.lines.get(job.model)) is not None
            and any(other.front or other.fresh for other in line.front())
            for user in self._users.values()
            if user is not mine
        )

    def wanting_pages(self, jobs: int) -> list[JobRun]:
        """Up to so many jobs whose next page is wanted, those whose turn is near first.

        Tasks in memory count for each model apart: those of a model that no key may use now hold back no other's.
        """
        users = sorted(self._users.values(), key=lambda user: user.virtual_time)
        low = ([line.wanting() for line in user.lines.values() if line.runs_low] for user in users)
        wanting = (heapq.merge(*lines, key=_turn) for lines in low)
        return list(islice(chain.from_iterable(wanting), jobs))

    def is_near(self, job: JobRun) -> bool:
        """Whether a job's page may be wanted already, or no deadline is before its own."""
        return job.line.runs_low or self.next_deadline() == job.deadline_at

    def overdue(self, now: datetime) -> list[JobRun]:
        """The jobs whose deadline has passed, and which are not being closed yet."""
        late: list[JobRun] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            if self._is_open(job):
                late.append(job)
        for job in late:  # each until it is closed
            heapq.heappush(self._deadlines, (job.deadline_at, next(self._added), job))
        return late

    def next_deadline(self) -> datetime | None:
        """The next deadline of a job that is not being closed."""
        while self._deadlines and not self._is_open(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _is_open(self, job: JobRun) -> bool:
        return job.closing is None and self._jobs.get(job.id) is job


def _turn(job: JobRun) -> tuple[int, str]:
    return job.turn
