"""From stored tasks to recorded outcomes: a real SQLite file, real threads, endpoints that say what they are told."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from config import ApiKey
from gpt_worker import dispatcher, fair_queue
from gpt_worker.backoff import ProblemKind
from gpt_worker.db import Database
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.domain import Answer, ErrorCode, Failure, JobSettings, JobStatus, Prompt, Usage
from gpt_worker.fair_queue import JobRun
from gpt_worker.flights import SLOT_BYTES, Flights
from gpt_worker.gpt import Answers, Endpoint, Reply
from gpt_worker.keys import KeyBoard
from gpt_worker.lanes import Lane, LaneState
from gpt_worker.models import JobRow
from gpt_worker.owner import EXPIRES_AFTER_S, Owner
from gpt_worker.rate_limit import Bound
from gpt_worker.recorder import Recorder
from gpt_worker.settling import share_out
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import TaskResult
from tests import factories
from tests.clock import PATIENCE_S, FakeClock, eventually
from tests.factories import MODEL

CANCELLED = Failure(ErrorCode.CANCELLED, "the job was cancelled")
HOUR_S = 3600.0
ACME: dict[str, Any] = {"organization": "acme", "project": "one"}

Say = Callable[[str], Reply[Answer]]


class FakeEndpoint(Endpoint):
    """Answers each prompt by `say`; after `hold()` its calls hang until they are let go."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.prompts: list[str] = []
        self.was_cut = False
        self._open = threading.Event()
        self._open.set()
        self._permits = threading.Semaphore(0)

    def ask(self, model: str, settings: JobSettings, prompt: Prompt, deadline_s: float) -> Reply[Answer]:
        assert isinstance(prompt, str)
        self.prompts.append(prompt.removeprefix("task "))
        while not self._open.is_set() and not self._permits.acquire(timeout=0.005):
            pass
        return self.say(prompt.removeprefix("task "))

    def ask_pack(
        self, model: str, settings: JobSettings, prompts: Sequence[Prompt], deadline_s: float
    ) -> Reply[Answers]:
        replies = [self.ask(model, settings, prompt, deadline_s) for prompt in prompts]
        return Reply([reply.result.text for reply in replies if isinstance(reply.result, Answer)])

    def cut(self) -> None:
        self.was_cut = True
        self.release()

    def hold(self) -> None:
        self._open.clear()

    def let_go(self, calls: int = 1) -> None:
        """So many calls come back."""
        self._permits.release(calls)

    def release(self) -> None:
        """Every call comes back, now and from now on."""
        self._open.set()


def answers(prompt: str) -> Reply[Answer]:
    return factories.reply(text=f"answer to {prompt}")


def meets(kind: ProblemKind, **fields: Any) -> Say:
    return lambda _prompt: factories.trouble(kind=kind, **fields)


def in_turn(*replies: Reply[Answer]) -> Say:
    """These replies first, good answers then."""
    left, lock = list(replies), threading.Lock()

    def say(prompt: str) -> Reply[Answer]:
        with lock:
            return left.pop(0) if left else answers(prompt)

    return say


class Stand:
    """A dispatcher with its recorder, one lane for each of `says`."""

    def __init__(
        self,
        database: Database,
        says: Sequence[Say],
        *,
        max_threads: int = 1,
        max_in_flight: int | None = None,
        clock: FakeClock | None = None,
        jitter: float = 0.0,
    ) -> None:
        self.database = database
        self.endpoints = [FakeEndpoint(say) for say in says]
        self.ended: list[tuple[str, int]] = []
        self.flights = database.path.with_name("in-flight")
        self.recorder = Recorder(database, "http://127.0.0.1:9")
        self.recorder.on_ended = self._ended
        self.dispatcher = Dispatcher(
            database,
            self.recorder,
            lambda lock: [self._lane(number, max_threads, lock) for number in range(len(says))],
            flights=Flights(self.flights),
            call_deadline_s=5.0,
            max_in_flight=max_in_flight,
            now_s=clock or time.monotonic,
            jitter=lambda: jitter,
        )
        self.recorder.on_recovered = self.dispatcher.wake

    def _lane(self, number: int, max_threads: int, lock: Any) -> Lane:
        lane = Lane(ApiKey(number, f"sk-{number:04}", "http://127.0.0.1:9/v1"), max_threads, lock)
        lane.endpoint = self.endpoints[number]
        return lane

    def _ended(self, job_id: str, run: int) -> None:
        self.dispatcher.forget(job_id, run)
        self.ended.append((job_id, run))

    @property
    def lanes(self) -> list[Lane]:
        return self.dispatcher.lanes

    @property
    def prompts(self) -> list[str]:
        return [prompt for endpoint in self.endpoints for prompt in endpoint.prompts]

    def start(self, *jobs: JobRow) -> None:
        self.recorder.start()
        self.dispatcher.start(jobs)

    def wait_end(self, *jobs: JobRow) -> None:
        for job in jobs:
            eventually(lambda job=job: (job.id, job.run) in self.ended, "the job's end")  # type: ignore[misc]

    def job(self, job: JobRow) -> JobRow:
        with self.database.read() as session:
            row = job_store.get_job(session, job.id)
        assert row is not None
        return row

    def results(self, job: JobRow) -> list[TaskResult]:
        with self.database.read() as session:
            return task_store.results_page(session, job.id, -1, 100_000).tasks

    def codes(self, job: JobRow) -> list[str | None]:
        return [task.error_code for task in self.results(job)]

    def in_flight(self) -> dict[tuple[str, int], set[int]]:
        """What the next start would find, if this process crashed now."""
        return Flights(self.flights).left_behind()

    def loaded(self, job: JobRow) -> bool:
        """Whether the job's tasks are in memory."""
        run = self.dispatcher._queue.get(job.id)
        return run is not None and run.exhausted

    def stop(self) -> None:
        for endpoint in self.endpoints:
            endpoint.release()
        self.dispatcher.stop_taking()
        assert self.dispatcher.wait_idle(PATIENCE_S)
        self.dispatcher.abort()
        self.recorder.stop(PATIENCE_S)


Build = Callable[..., Stand]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


@pytest.fixture
def build(database: Database) -> Iterator[Build]:
    stands: list[Stand] = []

    def make(*says: Say, **options: Any) -> Stand:
        stands.append(Stand(database, says, **options))
        return stands[-1]

    yield make
    for stand in stands:
        stand.stop()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def store(stand: Stand, **fields: Any) -> JobRow:
    return factories.store_job(database=stand.database, **fields)


# A job goes through


def test_end_of_a_job_is_no_reason_to_look_for_pages(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    jobs = [store(stand, tasks=2) for _ in range(9)]
    stand.start(*jobs)
    queue = stand.dispatcher._queue
    eventually(lambda: not any(job.line.runs_low for job in queue), "all tasks in memory")
    looks: list[int] = []

    def look(jobs: int) -> list[JobRun]:
        looks.append(jobs)
        return []

    monkeypatch.setattr(queue, "wanting_pages", look)

    stand.endpoints[0].release()
    stand.wait_end(*jobs)

    assert looks == []


@pytest.mark.parametrize(("lanes", "max_threads"), [(1, 1), (2, 1), (3, 8)])
def test_every_task_is_answered_once(build: Build, lanes: int, max_threads: int) -> None:
    stand = build(*[answers] * lanes, max_threads=max_threads)
    job = store(stand, tasks=60)

    stand.start(job)
    stand.wait_end(job)

    assert sorted(stand.prompts) == sorted(f"t{number}" for number in range(60))
    assert [task.answer for task in stand.results(job)] == [f"answer to t{number}" for number in range(60)]
    assert (stand.job(job).status, stand.job(job).requests) == (JobStatus.SUCCEEDED, 60)


def test_job_larger_than_a_page_goes_through_in_order(build: Build) -> None:
    stand = build(answers)
    job = store(stand, tasks=3 * fair_queue.PAGE_TASKS // 2)

    stand.start(job)
    stand.wait_end(job)

    assert stand.prompts == [f"t{number}" for number in range(750)]


def test_job_added_later_is_served(build: Build) -> None:
    stand = build(answers)
    stand.start()
    job = store(stand, tasks=3)

    stand.dispatcher.add(job)

    stand.wait_end(job)


def test_only_what_is_pending_is_asked_after_a_restart(build: Build) -> None:
    stand = build(answers)
    job = store(stand, tasks=4, status=JobStatus.RUNNING)
    with stand.database.write() as session:
        task_store.record_answers(session, [factories.outcome(job_id=job.id, position=1)])
        job_store.add_progress(session, {job.id: job_store.JobProgress(answered=1)})

    stand.start(stand.job(job))
    stand.wait_end(job)

    assert stand.prompts == ["t0", "t2", "t3"]


def test_cold_key_has_one_call_in_flight(build: Build) -> None:
    stand = build(answers, answers, max_threads=8)
    for endpoint in stand.endpoints:
        endpoint.hold()
    job = store(stand, tasks=50)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 2 and all(lane.waiting for lane in stand.lanes))

    stand.endpoints[0].let_go()

    eventually(lambda: [len(endpoint.prompts) for endpoint in stand.endpoints] == [5, 1])


def test_key_that_has_told_its_limits_fills_its_threads(build: Build) -> None:
    limits = factories.headers(requests=(60_000, 59_000, 1.0))
    stand = build(lambda _prompt: factories.reply(limits=limits), max_threads=24)
    stand.endpoints[0].hold()
    stand.start(store(stand, tasks=100))
    eventually(lambda: len(stand.prompts) == 1)

    stand.endpoints[0].let_go()

    eventually(lambda: stand.lanes[0].in_flight == 24, "every thread's call")
    assert len(stand.prompts) == 25
    [report] = KeyBoard(stand.dispatcher, MODEL).reports()
    assert (report.threads, report.bound_by) == (24, Bound.THREADS)


def test_no_more_calls_are_in_flight_over_all_keys_than_may_be(build: Build) -> None:
    stand = build(answers, answers, answers, max_threads=8, max_in_flight=5)
    job = store(stand, tasks=200)
    stand.start(warmed := store(stand, tasks=60))
    stand.wait_end(warmed)
    for endpoint in stand.endpoints:
        endpoint.hold()

    stand.dispatcher.add(job)

    eventually(lambda: sum(lane.in_flight for lane in stand.lanes) == 5)
    eventually(lambda: len(stand.prompts) == 65)
    reports = KeyBoard(stand.dispatcher, MODEL).reports()
    assert {report.bound_by for report in reports if report.in_flight} == {Bound.THREADS}
    for endpoint in stand.endpoints:
        endpoint.release()
    stand.wait_end(job)
    assert len(stand.prompts) == 260


def test_next_run_of_a_job_is_shown_to_run(build: Build) -> None:
    stand = build(meets(ProblemKind.FINAL))
    job = store(stand, tasks=1)
    stand.start(job)
    stand.wait_end(job)
    with stand.database.write() as session:
        again = job_store.get_job(session, job.id)
        assert again is not None
        again.failed -= task_store.reopen_slice(session, job.id, None, -1).tasks
        job_store.reopen(again, again.deadline_at)
    stand.endpoints[0].say = answers
    stand.endpoints[0].hold()

    stand.dispatcher.add(again)

    eventually(lambda: stand.job(job).status == JobStatus.RUNNING)
    stand.endpoints[0].release()
    stand.wait_end(again)
    assert stand.job(job).status == JobStatus.SUCCEEDED


# Keys in trouble


def test_refused_key_hands_its_task_to_another_uncharged(build: Build) -> None:
    stand = build(meets(ProblemKind.KEY_REFUSED), answers, max_threads=4)
    job = store(stand, tasks=40)

    stand.start(job)
    stand.wait_end(job)

    assert len(stand.endpoints[0].prompts) <= 1
    assert [task.attempts for task in stand.results(job)] == [1] * 40
    assert stand.job(job).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    "kind", [ProblemKind.QUOTA_EXHAUSTED, ProblemKind.MODEL_UNAVAILABLE, ProblemKind.TOO_LARGE]
)
def test_trouble_of_one_key_is_no_trouble_of_the_job(build: Build, kind: ProblemKind) -> None:
    stand = build(meets(kind), answers)
    job = store(stand, tasks=20)

    stand.start(job)
    stand.wait_end(job)

    assert [task.attempts for task in stand.results(job)] == [1] * 20


def test_dead_key_loses_no_task(build: Build) -> None:
    stand = build(meets(ProblemKind.TRANSIENT), answers, max_threads=4)
    job = store(stand, tasks=40)

    stand.start(job)
    stand.wait_end(job)

    assert stand.job(job).status == JobStatus.SUCCEEDED


def test_job_waits_visibly_while_every_key_is_refused(build: Build, clock: FakeClock) -> None:
    stand = build(meets(ProblemKind.KEY_REFUSED), meets(ProblemKind.KEY_REFUSED), clock=clock)
    job = store(stand, tasks=5)

    stand.start(job)
    eventually(lambda: all(lane.refused and lane.waiting for lane in stand.lanes))

    waiting = stand.dispatcher.waiting(job.id)
    assert waiting is not None
    assert (waiting.reason, waiting.until is not None) == ("no usable key", True)
    assert stand.dispatcher.usable_lanes(MODEL) == 0
    assert (len(stand.prompts), stand.ended) == (2, [])


def test_refused_key_is_probed_after_an_hour_by_one_call(build: Build, clock: FakeClock) -> None:
    stand = build(in_turn(factories.trouble(kind=ProblemKind.KEY_REFUSED)), clock=clock, max_threads=8)
    job = store(stand, tasks=30)
    stand.start(job)
    eventually(lambda: stand.lanes[0].refused and stand.lanes[0].waiting)
    stand.endpoints[0].hold()

    clock.advance(HOUR_S)
    stand.dispatcher.wake()

    eventually(lambda: len(stand.prompts) == 2 and stand.lanes[0].waiting)
    stand.endpoints[0].release()
    stand.wait_end(job)
    assert {task.attempts for task in stand.results(job)} == {1}


def test_key_that_somebody_mended_is_used_at_once(build: Build) -> None:
    stand = build(in_turn(factories.trouble(kind=ProblemKind.KEY_REFUSED)))
    job = store(stand, tasks=3)
    stand.start(job)
    eventually(lambda: stand.lanes[0].refused and stand.lanes[0].waiting)

    stand.dispatcher.key_works(stand.lanes[0])

    stand.wait_end(job)


def test_keys_of_one_organisation_share_their_exhaustion(build: Build, clock: FakeClock) -> None:
    stand = build(*[lambda _prompt: factories.reply(**ACME)] * 2, clock=clock)
    for endpoint in stand.endpoints:
        endpoint.hold()
    first = store(stand, tasks=2)
    stand.start(first)
    eventually(lambda: len(stand.prompts) == 2)
    for endpoint in stand.endpoints:
        endpoint.release()
    stand.wait_end(first)
    assert stand.lanes[0].group is stand.lanes[1].group
    exhausted: Reply[Answer] = Reply(factories.problem(kind=ProblemKind.QUOTA_EXHAUSTED), **ACME)
    for endpoint in stand.endpoints:
        endpoint.say = lambda _prompt: exhausted

    second = store(stand, tasks=5)
    stand.dispatcher.add(second)
    eventually(lambda: stand.dispatcher.usable_lanes(MODEL) == 0)

    states = {lane.state(clock()).state for lane in stand.lanes}
    assert states == {LaneState.OUT_OF_QUOTA}


def test_first_reply_of_a_key_rests_the_group_that_it_joins(build: Build, clock: FakeClock) -> None:
    limited: Reply[Answer] = Reply(
        factories.problem(kind=ProblemKind.RATE_LIMITED, retry_after_s=100.0), **ACME
    )
    stand = build(lambda _prompt: factories.reply(**ACME), lambda _prompt: limited, clock=clock)
    for endpoint in stand.endpoints:
        endpoint.hold()
    job = store(stand, tasks=2)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 2)
    stand.endpoints[0].let_go()
    eventually(lambda: stand.lanes[0].in_flight == 0)

    stand.endpoints[1].let_go()
    eventually(lambda: stand.lanes[1].in_flight == 0)

    holds = [lane.hold(MODEL, clock()) for lane in stand.lanes]
    assert [hold.until_s for hold in holds if hold] == [clock() + 100] * 2


def test_whole_group_goes_on_when_its_probe_was_answered(build: Build, clock: FakeClock) -> None:
    exhausted: Reply[Answer] = Reply(factories.problem(kind=ProblemKind.QUOTA_EXHAUSTED), **ACME)
    stand = build(*[lambda _prompt: exhausted] * 2, clock=clock)
    for endpoint in stand.endpoints:
        endpoint.hold()
    job = store(stand, tasks=8)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 2)
    for endpoint in stand.endpoints:
        endpoint.let_go()
    eventually(lambda: all(lane.in_flight == 0 and lane.waiting for lane in stand.lanes))
    for endpoint in stand.endpoints:
        endpoint.say = lambda _prompt: factories.reply(**ACME)

    clock.advance(10 * 60)
    stand.dispatcher.wake()
    eventually(lambda: len(stand.prompts) == 3 and any(lane.waiting for lane in stand.lanes))
    prober = next(endpoint for endpoint in stand.endpoints if len(endpoint.prompts) == 2)
    (other,) = (endpoint for endpoint in stand.endpoints if endpoint is not prober)
    prober.let_go()

    eventually(lambda: len(other.prompts) == 2, "a call of the other key")


def test_rate_limited_task_goes_first_once_and_behind_its_jobs_others_then(build: Build) -> None:
    limited = factories.trouble(kind=ProblemKind.RATE_LIMITED, retry_after_s=0.01)
    stand = build(in_turn(limited, limited))
    job = store(stand, tasks=4)

    stand.start(job)
    stand.wait_end(job)

    assert stand.prompts == ["t0", "t0", "t1", "t2", "t3", "t0"]
    assert [task.attempts for task in stand.results(job)] == [1] * 4


def test_rate_limited_key_sends_nothing_until_the_time_it_was_given(build: Build, clock: FakeClock) -> None:
    limited = factories.trouble(kind=ProblemKind.RATE_LIMITED, retry_after_s=30.0)
    stand = build(in_turn(limited), clock=clock, max_threads=4)
    job = store(stand, tasks=4)
    stand.start(job)
    eventually(lambda: stand.lanes[0].rate_limited and stand.lanes[0].waiting)
    waiting = stand.dispatcher.waiting(job.id)
    assert waiting is not None
    assert waiting.until is not None

    clock.advance(29.9)
    stand.dispatcher.wake()
    eventually(lambda: stand.lanes[0].waiting)
    assert len(stand.prompts) == 1
    clock.advance(0.2)
    stand.dispatcher.wake()

    stand.wait_end(job)


@pytest.mark.parametrize(
    ("kind", "retry_after_s"), [(ProblemKind.RATE_LIMITED, 1e15), (ProblemKind.TRANSIENT, 1e15)]
)
def test_absurd_wait_can_be_told_and_waited_for(
    build: Build, clock: FakeClock, kind: ProblemKind, retry_after_s: float
) -> None:
    stand = build(meets(kind, retry_after_s=retry_after_s), clock=clock)
    job = store(stand, tasks=1)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 1 and stand.lanes[0].waiting)

    waiting = stand.dispatcher.waiting(job.id)

    assert waiting is not None
    assert waiting.until is not None


def test_key_at_its_limit_says_so(build: Build, clock: FakeClock) -> None:
    limits = factories.headers(requests=(60, 0, 60.0))
    stand = build(lambda _prompt: factories.reply(limits=limits), clock=clock)
    job = store(stand, tasks=2)

    stand.start(job)
    eventually(lambda: len(stand.prompts) == 1 and stand.lanes[0].waiting)

    waiting = stand.dispatcher.waiting(job.id)
    assert waiting is not None
    assert waiting.reason == "every key is at its rate limit"
    assert stand.dispatcher.estimate_s(MODEL, requests=120, tokens=0) == pytest.approx(120.0)


# Tasks in trouble


def test_task_is_given_up_after_five_attempts(build: Build) -> None:
    stand = build(meets(ProblemKind.TRANSIENT))
    job = store(stand, tasks=1)

    stand.start(job)
    stand.wait_end(job)

    (task,) = stand.results(job)
    assert (task.error_code, task.attempts, len(stand.prompts)) == ("upstream_error", 5, 5)
    assert stand.job(job).requests == 5


def test_task_that_fails_goes_to_another_key(build: Build) -> None:
    stand = build(in_turn(factories.trouble()), in_turn(factories.trouble()))
    job = store(stand, tasks=1)

    stand.start(job)
    stand.wait_end(job)

    assert [len(endpoint.prompts) for endpoint in stand.endpoints] in ([1, 2], [2, 1])


@pytest.mark.parametrize("kind", [ProblemKind.STALE, ProblemKind.RESENT])
def test_call_that_was_not_the_tasks_fault_is_free(build: Build, kind: ProblemKind) -> None:
    stand = build(in_turn(factories.trouble(kind=kind)))
    job = store(stand, tasks=1)

    stand.start(job)
    stand.wait_end(job)

    assert [task.attempts for task in stand.results(job)] == [1]
    assert stand.job(job).requests == 2


def test_task_too_large_for_every_key_is_decided(build: Build) -> None:
    def say(prompt: str) -> Reply[Answer]:
        return factories.trouble(kind=ProblemKind.TOO_LARGE) if prompt == "t1" else answers(prompt)

    stand = build(say, say)
    job = store(stand, tasks=3)

    stand.start(job)
    stand.wait_end(job)

    assert stand.codes(job) == [None, "context_length", None]
    assert stand.prompts.count("t1") == 2


def test_large_task_is_passed_over_by_fifty_small_ones_and_goes_next_then(
    build: Build, clock: FakeClock
) -> None:
    limits = factories.headers(tokens=(1000, 0, 60.0))
    stand = build(in_turn(factories.reply(limits=limits)), clock=clock)
    stand.start(warmed := store(stand, tasks=1))
    stand.wait_end(warmed)
    clock.advance(6)  # 100 tokens
    large, small = store(stand, ids=["large"], tokens=500), store(stand, tasks=90, tokens=1)

    stand.dispatcher.add(large)
    stand.dispatcher.add(small)
    eventually(lambda: len(stand.prompts) == 1 + 50 and stand.lanes[0].waiting)
    clock.advance(60)
    stand.dispatcher.wake()

    stand.wait_end(large, small)
    assert stand.prompts[51] == "large"


# A job that ends early


def test_cancelled_job_keeps_its_call_in_flight(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, tasks=3)
    stand.start(job)
    eventually(lambda: stand.prompts == ["t0"] and stand.loaded(job))

    assert stand.dispatcher.close(job.id, job.run, CANCELLED).wait(PATIENCE_S)
    assert (stand.codes(job), stand.ended) == ([None, "cancelled", "cancelled"], [])
    stand.endpoints[0].release()

    stand.wait_end(job)
    assert [task.answer for task in stand.results(job)] == ["answer to t0", None, None]
    assert stand.prompts == ["t0"]


def test_call_in_flight_of_a_cancelled_job_is_not_asked_again(build: Build) -> None:
    stand = build(meets(ProblemKind.TRANSIENT))
    stand.endpoints[0].hold()
    job = store(stand, tasks=2)
    stand.start(job)
    eventually(lambda: stand.prompts == ["t0"])

    stand.dispatcher.close(job.id, job.run, CANCELLED)
    stand.endpoints[0].release()

    stand.wait_end(job)
    assert stand.codes(job) == ["cancelled", "cancelled"]
    assert [task.attempts for task in stand.results(job)] == [1, 0]
    assert stand.prompts == ["t0"]


def test_job_stops_when_its_budget_is_used(build: Build) -> None:
    stand = build(lambda _prompt: factories.reply(tokens=10))
    job = store(stand, tasks=20, max_total_tokens=25)

    stand.start(job)
    stand.wait_end(job)

    assert stand.codes(job) == [None] * 3 + ["budget"] * 17
    assert len(stand.prompts) == 3


def test_useless_replies_use_the_budget_too(build: Build) -> None:
    costly: Reply[Answer] = Reply(factories.problem(kind=ProblemKind.FINAL), Usage(10, 0))
    stand = build(lambda _prompt: costly)
    job = store(stand, tasks=20, max_total_tokens=25)

    stand.start(job)
    stand.wait_end(job)

    assert len(stand.prompts) == 3
    assert stand.job(job).prompt_tokens == 30


def test_budget_used_before_a_restart_is_used(build: Build) -> None:
    stand = build(answers)
    job = store(stand, tasks=2, max_total_tokens=25)
    job.prompt_tokens = 25

    stand.start(job)
    stand.wait_end(job)

    assert stand.prompts == []


def test_ten_times_the_same_refusal_of_the_settings_ends_the_job(build: Build) -> None:
    stand = build(meets(ProblemKind.FINAL, about_settings=True, message="temperature is out of range"))
    job = store(stand, tasks=40)

    stand.start(job)
    stand.wait_end(job)

    assert len(stand.prompts) == 10
    assert set(stand.codes(job)) == {"bad_request"}
    assert {task.error_message for task in stand.results(job)} == {"temperature is out of range"}


def test_refusals_of_single_prompts_do_not_end_the_job(build: Build) -> None:
    stand = build(meets(ProblemKind.FINAL))
    job = store(stand, tasks=40)

    stand.start(job)
    stand.wait_end(job)

    assert len(stand.prompts) == 40


def test_one_answer_shows_that_the_settings_are_good(build: Build) -> None:
    refused = factories.trouble(kind=ProblemKind.FINAL, about_settings=True)
    stand = build(in_turn(*[refused] * 9, factories.reply(), *[refused] * 20))
    job = store(stand, tasks=40)

    stand.start(job)
    stand.wait_end(job)

    assert len(stand.prompts) == 40


def test_model_that_no_key_may_use_ends_its_jobs_without_further_calls(build: Build) -> None:
    stand = build(meets(ProblemKind.MODEL_UNAVAILABLE), meets(ProblemKind.MODEL_UNAVAILABLE))
    for endpoint in stand.endpoints:
        endpoint.hold()
    job, waiting, other = store(stand, tasks=9), store(stand, tasks=9), store(stand, tasks=1, model="another")
    stand.start(job, waiting)
    eventually(lambda: len(stand.prompts) == 2 and stand.loaded(job) and stand.loaded(waiting))

    for endpoint in stand.endpoints:
        endpoint.release()

    stand.wait_end(job, waiting)
    assert set(stand.codes(job) + stand.codes(waiting)) == {"model_unavailable"}
    assert len(stand.prompts) == 2
    stand.endpoints[0].say = stand.endpoints[1].say = answers
    stand.dispatcher.add(other)
    stand.wait_end(other)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ProblemKind.KEY_REFUSED, "key_refused"),
        (ProblemKind.QUOTA_EXHAUSTED, "quota_exhausted"),
        (ProblemKind.RATE_LIMITED, "expired"),
    ],
)
def test_deadline_ends_the_job_with_the_reason_that_held_it(
    build: Build, kind: ProblemKind, code: str
) -> None:
    stand = build(meets(kind, retry_after_s=1000.0), meets(kind, retry_after_s=1000.0))
    job = store(stand, tasks=3, deadline_s=0.5)

    stand.start(job)
    stand.wait_end(job)

    assert stand.codes(job) == [code] * 3


def test_deadline_spares_the_call_in_flight(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, tasks=3, deadline_s=0.2)
    stand.start(job)

    eventually(lambda: stand.codes(job) == [None, "expired", "expired"])
    stand.endpoints[0].release()

    stand.wait_end(job)
    assert stand.job(job).status == JobStatus.PARTIAL


def test_job_that_is_gone_disturbs_nobody(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    gone = store(stand, tasks=3)
    stand.start(gone)
    eventually(lambda: stand.prompts == ["t0"])

    stand.dispatcher.forget(gone.id, gone.run)
    stand.endpoints[0].release()

    job = store(stand, ids=["next"])
    stand.dispatcher.add(job)
    stand.wait_end(job)
    assert stand.prompts == ["t0", "next"]


# Chunks and fairness


def test_rest_of_a_chunk_gives_way_to_another_user_and_goes_on_in_order(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    mine = store(stand, tasks=80)
    other = factories.store_user(database=stand.database)
    theirs = store(stand, ids=["theirs 1", "theirs 2"], owner_id=other)
    stand.start(mine)
    eventually(lambda: stand.prompts == ["t0"])
    stand.dispatcher.add(theirs)
    eventually(lambda: stand.loaded(theirs))

    stand.endpoints[0].release()

    stand.wait_end(mine, theirs)
    assert {"theirs 1", "theirs 2"} <= set(stand.prompts[:6])
    assert [prompt for prompt in stand.prompts if prompt.startswith("t") and " " not in prompt] == [
        f"t{number}" for number in range(80)
    ]


def test_chunk_that_took_too_long_goes_on_in_order(build: Build, clock: FakeClock) -> None:
    def slow(prompt: str) -> Reply[Answer]:
        clock.advance(1.5)
        return answers(prompt)

    stand = build(slow, clock=clock)
    job = store(stand, tasks=80)

    stand.start(job)
    stand.wait_end(job)

    assert stand.prompts == [f"t{number}" for number in range(80)]


def test_chunk_of_a_key_that_must_rest_goes_to_the_others(build: Build) -> None:
    refused = factories.trouble(kind=ProblemKind.KEY_REFUSED)
    stand = build(in_turn(factories.reply(), factories.reply(), *[refused] * 99), answers)
    job = store(stand, tasks=80)

    stand.start(job)
    stand.wait_end(job)

    assert stand.job(job).status == JobStatus.SUCCEEDED
    assert sorted(set(stand.prompts)) == sorted(f"t{number}" for number in range(80))


# Bugs, stops and a database that fails


def test_bug_in_a_call_loses_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "AFTER_BUG_S", 0.01)
    bugs = iter([True, False, True])

    def buggy(prompt: str) -> Reply[Answer]:
        if next(bugs, False):
            raise RuntimeError("a bug")
        return answers(prompt)

    stand = build(buggy)
    job = store(stand, tasks=20)

    stand.start(job)
    stand.wait_end(job)

    assert sum(task.attempts for task in stand.results(job)) == 22
    assert stand.lanes[0].in_flight == 0
    assert stand.lanes[0].group.limiter(MODEL).in_flight == 0


def test_task_that_always_runs_into_a_bug_is_given_up(build: Build) -> None:
    def buggy(prompt: str) -> Reply[Answer]:
        if prompt == "t0":
            raise RuntimeError("a bug")
        return answers(prompt)

    stand = build(buggy)
    job = store(stand, tasks=3)

    stand.start(job)
    stand.wait_end(job)

    first, *others = stand.results(job)
    assert (first.error_code, first.attempts) == ("interrupted", 5)
    assert all(task.error_code is None for task in others)


def test_nothing_is_sent_while_answers_can_not_be_stored(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, tasks=80)
    stand.start(job)
    eventually(lambda: stand.loaded(job) and len(stand.prompts) == 1)
    with stand.database.write() as session:
        session.execute(text("ALTER TABLE tasks RENAME TO away"))
    stand.endpoints[0].let_go()
    eventually(lambda: not stand.recorder.healthy)
    sent = len(stand.prompts)

    stand.endpoints[0].release()
    eventually(lambda: stand.lanes[0].in_flight == 0 and stand.lanes[0].waiting)
    assert len(stand.prompts) == sent < 80
    with stand.database.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO tasks"))

    stand.wait_end(job)
    assert stand.job(job).answered == 80


def test_nothing_is_sent_while_it_is_not_sure_that_the_database_is_ours(build: Build, tmp_path: Path) -> None:
    stand, clock = build(answers, max_threads=4), FakeClock()
    lock_file = tmp_path / "lock"
    lock_file.touch()
    owner = Owner(stand.database, lock_file, now_s=clock)
    owner.on_sure = stand.dispatcher.wake
    owner.acquire(lambda: True)
    stand.endpoints[0].hold()
    job = store(stand, tasks=80)
    stand.start(job)
    eventually(lambda: stand.loaded(job) and len(stand.prompts) == 1)

    clock.advance(EXPIRES_AFTER_S + 1.0)  # a suspended process comes back: nothing has failed yet
    stand.endpoints[0].release()
    eventually(lambda: stand.job(job).answered == 1 and stand.lanes[0].waiting)
    stand.dispatcher.wake()
    eventually(lambda: stand.lanes[0].waiting)
    assert stand.recorder.healthy
    assert len(stand.prompts) == 1
    waiting = stand.dispatcher.waiting(job.id)
    assert waiting is not None
    assert waiting.reason == "the database takes no answers"

    owner.renew()
    stand.wait_end(job)
    assert stand.job(job).answered == 80
    assert len(stand.prompts) == 80


def test_stopping_lets_calls_in_flight_land_and_sends_nothing_new(build: Build) -> None:
    stand = build(answers, answers)
    for endpoint in stand.endpoints:
        endpoint.hold()
    job = store(stand, tasks=20)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 2)

    stand.dispatcher.stop_taking()
    assert not stand.dispatcher.wait_idle(0.01)
    for endpoint in stand.endpoints:
        endpoint.release()

    assert stand.dispatcher.wait_idle(PATIENCE_S)
    assert stand.recorder.stop(PATIENCE_S)
    assert (len(stand.prompts), stand.job(job).answered) == (2, 2)


def test_call_that_was_cut_leaves_its_task_pending(build: Build) -> None:
    stand = build(meets(ProblemKind.TRANSIENT, code=ErrorCode.TIMEOUT))
    stand.endpoints[0].hold()
    job = store(stand, tasks=2)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 1)

    stand.dispatcher.abort()

    assert stand.dispatcher.wait_idle(PATIENCE_S)
    assert stand.endpoints[0].was_cut
    assert stand.recorder.stop(PATIENCE_S)
    assert (stand.codes(job), stand.job(job).requests) == ([None, None], 0)


def test_endpoint_that_is_away_is_waited_for(build: Build) -> None:
    stand = build(answers)
    stand.dispatcher.lane_down(stand.lanes[0], "it is starting")
    job = store(stand, tasks=2)
    stand.start(job)
    eventually(lambda: stand.loaded(job) and stand.lanes[0].waiting)
    waiting = stand.dispatcher.waiting(job.id)
    assert waiting is not None
    assert (waiting.reason, stand.prompts) == ("it is starting", [])

    stand.dispatcher.lane_up(stand.lanes[0], stand.endpoints[0], "http://127.0.0.1:9/v1")

    stand.wait_end(job)


# What a crash would leave


def test_calls_in_flight_are_noted_until_they_come_back(build: Build) -> None:
    stand = build(answers, answers)
    for endpoint in stand.endpoints:
        endpoint.hold()
    job = store(stand, tasks=3)
    stand.start(job)
    eventually(lambda: stand.in_flight() == {(job.id, 1): {0, 1}})

    stand.endpoints[0].let_go()

    eventually(lambda: len(stand.prompts) == 3)
    assert stand.in_flight() in ({(job.id, 1): {0, 2}}, {(job.id, 1): {1, 2}})
    for endpoint in stand.endpoints:
        endpoint.release()
    stand.wait_end(job)
    assert stand.in_flight() == {}


def test_task_that_is_asked_again_is_noted_again(build: Build) -> None:
    stand = build(in_turn(factories.trouble(retry_after_s=0.01)))
    stand.endpoints[0].hold()
    job = store(stand)
    stand.start(job)
    eventually(lambda: len(stand.prompts) == 1)

    stand.endpoints[0].let_go()

    eventually(lambda: len(stand.prompts) == 2)
    assert stand.in_flight() == {(job.id, 1): {0}}


def test_every_task_of_a_pack_in_flight_is_noted(build: Build) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, tasks=5, pack=True)

    stand.start(job)

    eventually(lambda: len(stand.prompts) == 1)
    assert stand.in_flight() == {(job.id, 1): {0, 1, 2, 3, 4}}
    stand.endpoints[0].release()
    stand.wait_end(job)
    assert stand.in_flight() == {}


def test_loop_that_dies_of_a_bug_leaves_no_call_behind(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = build(answers)
    monkeypatch.setattr(dispatcher, "AFTER_BUG_S", 0.0)
    bugs = iter([True])

    def job_started(job_id: str) -> None:
        if next(bugs, False):
            raise RuntimeError("a bug")

    monkeypatch.setattr(stand.recorder, "job_started", job_started)
    job = store(stand, tasks=3)
    stand.start(job)
    stand.wait_end(job)

    assert stand.in_flight() == {}


@pytest.mark.parametrize("stop", [Dispatcher.stop_taking, Dispatcher.abort])
def test_stop_that_was_asked_for_is_no_crash_whatever_is_in_flight(
    build: Build, stop: Callable[[Dispatcher], None]
) -> None:
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, tasks=2)
    stand.start(job)
    eventually(stand.in_flight)

    stop(stand.dispatcher)

    assert stand.in_flight() == {}


def test_calls_beyond_the_bound_of_all_keys_need_no_slot(build: Build) -> None:
    stand = build(answers, answers, max_threads=8, max_in_flight=3)

    stand.start()

    assert stand.flights.stat().st_size == 4 * SLOT_BYTES


# Several keys and models at once


def test_task_that_waits_for_tokens_holds_up_its_own_model_alone(build: Build, clock: FakeClock) -> None:
    full = factories.headers(tokens=(1000, 0, 60.0))
    stand = build(in_turn(factories.reply(limits=full)), clock=clock)
    stand.start(warmed := store(stand, tasks=1))
    stand.wait_end(warmed)
    large = store(stand, ids=["large"], tokens=900)
    other = store(stand, tasks=200, tokens=1, model="another-model")

    stand.dispatcher.add(large)
    stand.dispatcher.add(other)

    stand.wait_end(other)
    assert "large" not in stand.prompts


def test_task_that_failed_on_one_key_does_not_wait_for_another_that_is_spent(
    build: Build, clock: FakeClock
) -> None:
    spent = factories.headers(requests=(200, 0, 86_400.0))
    stand = build(in_turn(factories.trouble()), answers, clock=clock)
    limiter = stand.lanes[1].group.limiter(MODEL)
    limiter.replied(limiter.reserve(1, clock()), spent, clock())  # type: ignore[arg-type]
    job = store(stand, ids=["hello"])

    stand.start(job)
    stand.wait_end(job)

    assert [len(endpoint.prompts) for endpoint in stand.endpoints] == [2, 0]


def test_machine_without_another_thread_loses_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = build(answers, max_threads=8)
    submit, refused = stand.lanes[0].executor.submit, list[object]()

    def refuse(*arguments: Any) -> Any:
        if stand.lanes[0].loops >= 2:
            refused.append(arguments)
            raise RuntimeError("can't start new thread")
        return submit(*arguments)

    monkeypatch.setattr(stand.lanes[0].executor, "submit", refuse)
    stand.start(warmed := store(stand, tasks=30))
    stand.wait_end(warmed)
    stand.endpoints[0].hold()
    job = store(stand, tasks=100)

    stand.dispatcher.add(job)
    eventually(lambda: refused)
    stand.endpoints[0].release()

    stand.wait_end(job)
    assert stand.lanes[0].max_threads == 2
    assert len(stand.prompts) == 130
    assert (stand.lanes[0].in_flight, stand.lanes[0].joining) == (0, False)


def test_bug_under_a_job_that_is_being_cancelled_does_not_keep_it_from_ending(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "AFTER_BUG_S", 0.01)
    stand = build(answers)
    stand.endpoints[0].hold()
    job = store(stand, ids=["hello"])
    stand.start(job)
    eventually(lambda: stand.prompts == ["hello"])
    stand.dispatcher.close(job.id, job.run, CANCELLED).wait(PATIENCE_S)

    def buggy(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(stand.dispatcher._settling, "settle", buggy)
    stand.endpoints[0].release()

    stand.wait_end(job)
    assert stand.codes(job) == ["cancelled"]
    assert stand.lanes[0].group.limiter(MODEL).in_flight == 0


def test_usage_of_a_failed_pack_is_shared_by_the_size_of_its_tasks() -> None:
    tasks = [
        factories.queued_task(position=number, tokens=tokens) for number, tokens in enumerate((10, 1000))
    ]

    shares = share_out(Usage(101, 7), tasks, [None, None])

    assert [usage.prompt_tokens for usage in shares] == [1, 100]
    assert sum(usage.completion_tokens for usage in shares) == 7


def test_second_job_of_a_user_is_fed_while_the_last_call_of_the_first_is_in_flight(build: Build) -> None:
    stand = build(answers, max_threads=4)
    stand.start(warmed := store(stand, tasks=20))
    stand.wait_end(warmed)
    stand.endpoints[0].say = lambda prompt: answers(prompt)
    first, second = store(stand, tasks=400), store(stand, tasks=300)
    stand.endpoints[0].hold()
    stand.dispatcher.add(first)
    stand.dispatcher.add(second)
    eventually(lambda: stand.loaded(first))

    stand.endpoints[0].let_go(20 + 400 + 200)

    eventually(lambda: len(stand.prompts) > 500)
    stand.endpoints[0].release()
    stand.wait_end(first, second)
