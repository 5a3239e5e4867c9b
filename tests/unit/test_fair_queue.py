"""Whose task goes next, and that none is lost on its way through the queue."""

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.backoff import Place
from gpt_worker.domain import ErrorCode, Failure, utc_now
from gpt_worker.fair_queue import (
    LOOK_AHEAD,
    LOW_TASKS,
    LOW_TOKENS,
    MAX_RETURNED,
    MOST_ENDED,
    PAGE_TASKS,
    FairQueue,
    JobRun,
    QueuedTask,
)
from tests import factories
from tests.clock import unhurried

NOW_S = 1000.0


def queue_of(*jobs: JobRun) -> FairQueue:
    queue = FairQueue()
    for job in jobs:
        queue.add(job)
    return queue


def serve(queue: FairQueue) -> tuple[JobRun, QueuedTask] | None:
    """Send the task whose turn it is."""
    for job in queue.in_turn():
        task = job.next_for(lambda _task: True, NOW_S)
        if task is not None:
            job.pop(task)
            queue.charge(job, task.tokens)
            return job, task
    return None


def owners(queue: FairQueue, count: int) -> list[str]:
    served = [serve(queue) for _ in range(count)]
    return [found[0].owner for found in served if found]


def drain(job: JobRun) -> list[int]:
    """The positions of a job's tasks in the order in which they would go."""
    positions = []
    while (task := job.next_for(lambda _task: True, 1e12)) is not None:
        job.pop(task)
        positions.append(task.position)
    return positions


def unread(*, tasks: int = 1, **fields: Any) -> JobRun:
    """A job whose tasks are all in the database still."""
    job = factories.job_run(**fields)
    job.pending, job.exhausted = tasks, False
    return job


def read(queue: FairQueue, jobs: int) -> list[JobRun]:
    """Read the pages that are wanted, as the feeder does; whose they were."""
    were: list[JobRun] = []
    while wanting := queue.wanting_pages(jobs):
        for job in wanting:
            job.add_page(
                [factories.queued_task(position=place) for place in range(job.pending)], job.pending - 1, True
            )
        were += wanting
    return were


def take(job: JobRun) -> QueuedTask:
    task = job.next_for(lambda _task: True, NOW_S)
    assert task is not None
    job.pop(task)
    return task


# Users in turn


def test_three_tasks_do_not_wait_behind_a_hundred_thousand() -> None:
    queue = queue_of(factories.job_run(owner="big", tasks=100_000))
    owners(queue, 50)

    queue.add(factories.job_run(owner="small", tasks=3))

    assert owners(queue, 6).count("small") == 3


def test_users_go_in_turn() -> None:
    queue = queue_of(*(factories.job_run(owner=owner, tasks=9) for owner in "abc"))

    turns = owners(queue, 9)

    assert all(set(turns[start : start + 3]) == set("abc") for start in (0, 3, 6))


def test_turns_are_weighted_by_tokens() -> None:
    queue = queue_of(
        factories.job_run(owner="long", tasks=100, tokens=300),
        factories.job_run(owner="short", tasks=100, tokens=100),
    )

    turns = owners(queue, 40)

    assert turns.count("short") == pytest.approx(3 * turns.count("long"), abs=3)


def test_two_jobs_of_a_user_get_no_second_share() -> None:
    queue = queue_of(*(factories.job_run(owner=owner, tasks=50) for owner in ("a", "a", "a", "b")))

    assert owners(queue, 20).count("b") == 10


def test_user_who_was_away_has_saved_up_no_claim() -> None:
    queue = queue_of(factories.job_run(owner="late", tasks=1), factories.job_run(owner="busy", tasks=500))
    owners(queue, 200)

    queue.add(factories.job_run(owner="late", tasks=100))

    assert 9 <= owners(queue, 20).count("late") <= 11


def test_user_whose_jobs_could_not_go_has_saved_up_no_claim() -> None:
    held = factories.job_run(owner="held", tasks=100)
    queue = queue_of(held, factories.job_run(owner="busy", tasks=500))
    tasks = held.cut_chunk(0, max_tasks=101)
    owners(queue, 200)

    held.give_back(tasks)

    assert 9 <= owners(queue, 20).count("held") <= 11


def test_user_who_submits_anew_does_not_jump_the_queue() -> None:
    queue = queue_of(factories.job_run(owner="patient", tasks=100, tokens=10))
    turns = []

    for _ in range(10):
        job = factories.job_run(owner="pushy", tasks=1, tokens=1_000)
        queue.add(job)
        turns += owners(queue, 5)
        queue.remove(job.id)

    assert turns.count("pushy") <= 2


def test_better_claim_of_another_user_is_seen() -> None:
    mine, theirs = factories.job_run(owner="a", tasks=5), factories.job_run(owner="b", tasks=5)
    queue = queue_of(mine, theirs)

    queue.charge(mine, 10)

    assert queue.others_wait(mine)
    assert not queue.others_wait(theirs)


def test_user_without_a_task_does_not_count_as_waiting() -> None:
    mine, theirs = factories.job_run(owner="a", tasks=5), factories.job_run(owner="b", tasks=0)
    queue = queue_of(mine, theirs)

    queue.charge(mine, 10)

    assert not queue.others_wait(mine)


def test_user_is_never_in_their_own_way() -> None:
    first, second = factories.job_run(owner="a", tasks=5), factories.job_run(owner="a", tasks=5)
    queue = queue_of(first, second, factories.job_run(owner="b", tasks=0))

    queue.charge(first, 10)

    assert not queue.others_wait(first)


# Jobs of one user


def test_priority_goes_before_age() -> None:
    jobs = [
        factories.job_run(id="1", tasks=1, priority=-5),
        factories.job_run(id="2", tasks=1),
        factories.job_run(id="3", tasks=1),
        factories.job_run(id="4", tasks=1, priority=5),
    ]

    queue = queue_of(*jobs)

    assert [job.id for job in queue.in_turn()] == ["4", "2", "3", "1"]


def test_priority_is_no_claim_against_other_users() -> None:
    queue = queue_of(
        factories.job_run(owner="a", tasks=50, priority=100),
        factories.job_run(owner="b", tasks=50, priority=-100),
    )

    assert owners(queue, 20).count("b") == 10


def test_job_whose_page_is_on_the_way_is_not_overtaken() -> None:
    waiting = factories.job_run(id="1")
    waiting.exhausted = False
    queue = queue_of(waiting, factories.job_run(id="2", tasks=3))

    assert [job.id for job in queue.in_turn()] == ["1"]
    waiting.loading = True
    assert [job.id for job in queue.in_turn()] == ["1"]


def test_job_that_only_waits_for_replies_lets_the_next_go() -> None:
    queue = queue_of(factories.job_run(id="1", tasks=1), factories.job_run(id="2", tasks=1))
    serve(queue)

    found = serve(queue)

    assert found is not None
    assert found[0].id == "2"


def test_closing_job_has_no_turn() -> None:
    job = factories.job_run(tasks=3)
    queue = queue_of(job)

    job.closing = Failure(ErrorCode.CANCELLED, "")

    assert list(queue.in_turn()) == []


def test_next_run_takes_the_place_of_the_last() -> None:
    first, second = (factories.job_run(id="1", run=run, tasks=1) for run in (1, 2))
    queue = queue_of(first)

    queue.add(second)

    assert list(queue) == [second]
    assert list(queue.in_turn()) == [second]


def test_removed_job_is_gone_and_may_be_removed_again() -> None:
    queue = queue_of(factories.job_run(id="1", tasks=1))

    queue.remove("1")
    queue.remove("1")

    assert (len(queue), queue.get("1"), serve(queue)) == (0, None, None)


# One job's tasks


def test_tasks_that_came_back_go_first_and_those_behind_last() -> None:
    job = factories.job_run(tasks=4)
    first, second = take(job), take(job)

    job.ask_again(first, Place.BEHIND, NOW_S)
    job.ask_again(second, Place.FRONT, NOW_S)

    assert drain(job) == [1, 2, 3, 0]


def test_delayed_task_waits_for_its_time() -> None:
    job = factories.job_run(tasks=2)
    task = take(job)
    task.due_s = NOW_S + 5

    job.ask_again(task, Place.FRONT, NOW_S)

    assert job.next_due_s() == NOW_S + 5
    assert take(job).position == 1
    assert job.next_for(lambda _task: True, NOW_S + 4.9) is None
    assert job.next_for(lambda _task: True, NOW_S + 5) is task


def test_tasks_of_one_time_are_due_in_their_order() -> None:
    job = factories.job_run(tasks=3)
    for task in [take(job), take(job), take(job)][::-1]:
        task.due_s = NOW_S + 5
        job.ask_again(task, Place.FRONT, NOW_S)

    assert drain(job) == [0, 1, 2]


def test_chunk_is_cut_at_the_token_limit() -> None:
    job = factories.job_run(tasks=5, tokens=40, max_chunk_tokens=100)

    first = take(job)
    rest = job.cut_chunk(first.tokens, max_tasks=10)

    assert [task.position for task in rest] == [1]


def test_chunk_is_cut_at_the_task_limit() -> None:
    job = factories.job_run(tasks=9)

    rest = job.cut_chunk(take(job).tokens, max_tasks=4)

    assert [task.position for task in rest] == [1, 2, 3]


def test_rest_of_a_chunk_goes_back_in_order() -> None:
    job = factories.job_run(tasks=6)
    rest = job.cut_chunk(take(job).tokens, max_tasks=4)

    job.give_back(rest)

    assert drain(job) == [1, 2, 3, 4, 5]


def test_task_that_a_lane_may_not_take_is_passed_over() -> None:
    job = factories.job_run(tasks=3)
    job.fresh[0].avoid = frozenset({0})

    found = job.next_for(lambda task: 0 not in task.avoid, NOW_S)

    assert found is not None
    job.pop(found)
    assert found.position == 1
    assert drain(job) == [0, 2]


def test_lane_looks_beyond_returned_tasks_that_it_may_not_take() -> None:
    job = factories.job_run(tasks=3 * LOOK_AHEAD)
    for task in [take(job) for _ in range(2 * LOOK_AHEAD)]:
        task.avoid = frozenset({0})
        job.ask_again(task, Place.FRONT, NOW_S)

    found = job.next_for(lambda task: 0 not in task.avoid, NOW_S)

    assert found is not None
    assert found.position == 2 * LOOK_AHEAD


def test_no_page_is_wanted_while_too_many_tasks_came_back() -> None:
    job = factories.job_run(tasks=MAX_RETURNED)
    job.exhausted = False
    for task in [take(job) for _ in range(MAX_RETURNED)]:
        job.ask_again(task, Place.BEHIND, NOW_S)

    assert not job.wants_page
    take(job)
    assert job.wants_page


def test_no_page_is_wanted_while_few_tasks_are_much() -> None:
    job = factories.job_run(tasks=0)
    heavy = [QueuedTask(position, "{}", 5, weight=LOW_TOKENS // 2) for position in range(2)]
    job.add_page(heavy, cursor=1, exhausted=False)

    assert not job.wants_page
    take(job)
    assert job.wants_page


def test_no_page_of_a_job_behind_is_wanted_while_few_tasks_are_much() -> None:
    first, second = (factories.job_run(id=str(place), tasks=0) for place in range(2))
    second.exhausted = False
    queue = queue_of(first, second)
    first.add_page([QueuedTask(0, "{}", 5, weight=LOW_TOKENS)], cursor=0, exhausted=True)

    assert queue.wanting_pages(9) == []
    take(first)
    assert queue.wanting_pages(9) == [second]


def test_pages_of_small_jobs_are_wanted_together_until_there_is_enough() -> None:
    jobs = [unread(id=str(place), tasks=PAGE_TASKS // 5) for place in range(9)]

    queue = queue_of(*jobs)

    assert queue.wanting_pages(9) == jobs[:5]
    assert queue.wanting_pages(1) == jobs[:1]


def test_small_jobs_want_no_page_until_little_of_the_last_is_left() -> None:
    jobs = [unread(id=f"{place:02}", tasks=10) for place in range(99)]
    queue = queue_of(*jobs)
    in_memory = read(queue, 99)
    assert (in_memory, queue.wanting_pages(99)) == (jobs[:50], [])

    owners(queue, PAGE_TASKS - LOW_TASKS)
    assert queue.wanting_pages(99) == []
    serve(queue)

    assert queue.wanting_pages(99) == jobs[50:76]


def test_next_page_of_a_large_job_is_wanted_when_little_is_left_of_it() -> None:
    job = unread(tasks=9 * PAGE_TASKS)
    queue = queue_of(job)
    job.add_page(
        [factories.queued_task(position=place) for place in range(PAGE_TASKS)], PAGE_TASKS - 1, False
    )
    assert queue.wanting_pages(9) == []

    owners(queue, 50)
    job.cut_chunk(0, max_tasks=PAGE_TASKS - LOW_TASKS - 50 + 1)
    assert queue.wanting_pages(9) == []
    serve(queue)

    assert queue.wanting_pages(9) == [job]


def test_urgent_job_wants_its_page_though_much_is_in_memory() -> None:
    queue = queue_of(factories.job_run(id="1", tasks=PAGE_TASKS), unread(id="2"))
    assert queue.wanting_pages(9) == []
    urgent = unread(id="3", priority=1)

    queue.add(urgent)

    assert queue.is_near(urgent)
    assert queue.wanting_pages(9) == [urgent]


def test_page_is_wanted_when_what_held_it_back_is_gone() -> None:
    large, small = factories.job_run(id="1", tasks=PAGE_TASKS), unread(id="2")
    queue = queue_of(large, small)
    assert queue.wanting_pages(9) == []

    large.clear()

    assert queue.wanting_pages(9) == [small]


def test_page_is_wanted_of_a_job_that_comes_when_all_others_are_read() -> None:
    queue = queue_of(factories.job_run(id="1", tasks=1))
    assert queue.wanting_pages(9) == []
    job = unread(id="2")

    queue.add(job)

    assert queue.is_near(job)
    assert queue.wanting_pages(9) == [job]


def test_job_behind_enough_others_is_not_near() -> None:
    queue = queue_of(factories.job_run(id="1", tasks=LOW_TASKS), unread(id="2"))
    assert queue.wanting_pages(9) == []
    later = unread(id="3", deadline_at=utc_now() + timedelta(days=9))
    soon = unread(id="4", deadline_at=utc_now())

    queue.add(later)
    assert not queue.is_near(later)

    queue.add(soon)
    assert queue.is_near(soon)


def test_jobs_in_memory_are_not_walked_for_pages_until_their_user_runs_low(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [unread(id=f"{owner}{place:04}", owner=owner) for owner in "abcde" for place in range(1000)]
    queue = queue_of(*jobs)
    read(queue, len(jobs))
    assert queue.wanting_pages(9) == []
    owners(queue, PAGE_TASKS - LOW_TASKS)
    looked_at: list[JobRun] = []
    monkeypatch.setattr(JobRun, "wants_page", property(looked_at.append))

    found = queue.wanting_pages(9)

    assert (found, looked_at) == ([], [])


def test_jobs_that_are_all_sent_are_not_walked() -> None:
    jobs = [factories.job_run(id=f"{place:03}", tasks=1) for place in range(101)]
    queue = queue_of(*jobs)

    owners(queue, 100)

    assert list(queue.in_turn()) == jobs[100:]


def test_job_that_gets_a_task_back_has_its_turn_again() -> None:
    jobs = [factories.job_run(id=str(place), tasks=2) for place in range(5)]
    queue = queue_of(*jobs)
    tasks = [served[1] for _ in range(8) if (served := serve(queue)) is not None]
    assert list(queue.in_turn()) == jobs[4:]

    jobs[2].ask_again(tasks[4], Place.BEHIND, NOW_S)
    jobs[1].take_back(tasks[2:4])
    jobs[0].give_back(deque(tasks[:2]))

    assert list(queue.in_turn()) == [jobs[0], jobs[1], jobs[2], jobs[4]]


@pytest.mark.parametrize("closes", [True, False])
def test_task_that_comes_back_to_a_job_that_ends_has_no_turn(closes: bool) -> None:
    job, other = factories.job_run(id="1", tasks=1), factories.job_run(id="2", tasks=1)
    queue = queue_of(job, other)
    served = serve(queue)
    assert served is not None
    assert list(queue.in_turn()) == [other]

    if closes:
        job.closing = Failure(ErrorCode.CANCELLED, "")
    else:
        queue.remove(job.id)
    job.ask_again(served[1], Place.FRONT, NOW_S)

    assert list(queue.in_turn()) == [other]


def test_thousands_of_queued_jobs_are_not_walked_for_a_look() -> None:
    jobs = [factories.job_run(id=f"{owner}{place}", owner=owner) for owner in "ab" for place in range(5)]
    for job in jobs:
        job.pending, job.exhausted = 100, False

    queue = queue_of(*jobs)

    assert [job.id for job in queue.in_turn()] == ["a0", "b0"]


def test_jobs_of_several_models_go_by_their_turn() -> None:
    jobs = [factories.job_run(id=str(place), tasks=1, priority=place % 2) for place in range(4)]
    for job, model in zip(jobs, ("a", "b", "b", "a"), strict=True):
        job.model = model

    queue = queue_of(*jobs)

    assert [job.id for job in queue.in_turn()] == ["1", "3", "0", "2"]


# Deadlines


def test_job_is_overdue_until_it_is_closed() -> None:
    now = utc_now()
    late = factories.job_run(tasks=1, deadline_at=now)
    later = factories.job_run(tasks=1, deadline_at=now + timedelta(seconds=1))
    queue = queue_of(later, late)

    assert [queue.overdue(now), queue.overdue(now)] == [[late], [late]]
    assert queue.next_deadline() == now

    late.closing = Failure(ErrorCode.EXPIRED, "it is late")

    assert queue.overdue(now) == []
    assert queue.next_deadline() == later.deadline_at


def test_deadlines_of_ended_jobs_do_not_pile_up() -> None:
    queue = FairQueue()

    for _ in range(10 * MOST_ENDED):
        job = factories.job_run(tasks=1)
        queue.add(job)
        queue.remove(job.id)

    assert len(queue._deadlines) <= MOST_ENDED + 2
    assert queue.next_deadline() is None


def test_job_that_loads_wants_no_second_page() -> None:
    job = factories.job_run()
    job.exhausted = False
    queue = queue_of(job)
    assert queue.wanting_pages(9) == [job]

    job.loading = True

    assert queue.wanting_pages(9) == []


def test_cleared_job_holds_nothing() -> None:
    job = factories.job_run(tasks=5)
    delayed, behind = take(job), take(job)
    delayed.due_s = NOW_S + 5
    job.ask_again(delayed, Place.FRONT, NOW_S)
    job.ask_again(behind, Place.BEHIND, NOW_S)

    job.clear()

    assert (job.in_memory, drain(job)) == (0, [])


# The same refusal from the start


@pytest.mark.parametrize(
    ("decisions", "refusals"),
    [
        (["bad"] * 10, 10),
        ([None] + ["bad"] * 10, 0),
        (["bad"] * 4 + [None] + ["bad"] * 10, 4),
        (["bad"] * 4 + ["other"] + ["bad"] * 10, 4),
        ([None] * 3, 0),
    ],
)
def test_refusals_count_while_they_are_all_there_is(decisions: list[str | None], refusals: int) -> None:
    job = factories.job_run()

    for said in decisions:
        job.note_decision(said)

    assert (job.refusals, job.decided) == (refusals, len(decisions))


# Whatever happens


@unhurried
@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=2, max_size=5),
    jobs_per_user=st.integers(1, 3),
)
def test_no_backlogged_user_waits_for_more_than_the_shares_of_the_others(
    sizes: list[list[int]], jobs_per_user: int
) -> None:
    queue, largest, left = FairQueue(), max(map(max, sizes)), dict[str, int]()
    for number, tokens in enumerate(sizes):
        for job_number in range(jobs_per_user):
            job = factories.job_run(owner=str(number), tasks=len(tokens), id=f"{number}-{job_number}")
            for task, of_task in zip(job.fresh, tokens, strict=True):
                task.tokens = of_task
            queue.add(job)
        left[str(number)] = len(tokens) * jobs_per_user
    waited = dict.fromkeys(left, 0)
    # Others' work between two services: theirs to catch up, then one each.
    allowed = 2 * (len(sizes) - 1) * largest

    while (served := serve(queue)) is not None:
        job, task = served
        waited[job.owner] = 0
        left[job.owner] -= 1
        for owner in waited:
            if owner != job.owner and left[owner]:
                waited[owner] += task.tokens
                assert waited[owner] <= allowed
    assert not any(left.values())


@unhurried
@given(
    users=st.integers(2, 6),
    tokens=st.integers(1, 100),
    tasks=st.integers(1, 20),
)
def test_users_with_tasks_alike_wait_for_one_of_each_other(users: int, tokens: int, tasks: int) -> None:
    queue = queue_of(
        *(factories.job_run(owner=str(user), tasks=tasks, tokens=tokens) for user in range(users))
    )

    turns = owners(queue, users * tasks)

    for start in range(0, users * tasks, users):
        assert len(set(turns[start : start + users])) == users


@unhurried
@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(["add", "read", "serve", "chunk", "again", "end"]),
            st.integers(0, 700),
            st.integers(-1, 1),
        ),
        max_size=60,
    )
)
def test_no_page_that_is_wanted_is_forgotten(acts: list[tuple[str, int, int]]) -> None:
    queue, jobs, sent = FairQueue(), list[JobRun](), list[tuple[JobRun, QueuedTask]]()
    for step, (act, number, priority) in enumerate(acts):
        if act == "add":
            jobs.append(unread(id=f"{step:02}", tasks=1 + number, priority=priority))
            queue.add(jobs[-1])
        elif act == "read":
            for job in queue.wanting_pages(1 + number % 4):
                size = min(PAGE_TASKS, job.pending - 1 - job.cursor)
                cursor = job.cursor + size
                page = [factories.queued_task(position=cursor - place) for place in reversed(range(size))]
                job.add_page(page, cursor, exhausted=cursor == job.pending - 1)
        elif act == "serve":
            sent += [served for _ in range(number) if (served := serve(queue)) is not None]
        elif act == "chunk" and jobs:
            rest = (job := jobs[number % len(jobs)]).cut_chunk(0, max_tasks=number)
            job.give_back(deque(list(rest)[number // 2 :]))
        elif act == "again" and sent:
            job, task = sent.pop(number % len(sent))
            job.ask_again(task, Place.BEHIND, NOW_S)
        elif act == "end" and jobs:
            job = jobs.pop(number % len(jobs))
            job.clear()
            job.closing = Failure(ErrorCode.CANCELLED, "")
            queue.remove(job.id)

        in_front = 0
        for job in sorted(jobs, key=lambda job: job.turn):
            assert not (job.wants_page and in_front < LOW_TASKS) or job.line.runs_low
            in_front += len(job.fresh)


@dataclass
class Held:
    """What a thread holds: a task in flight, and the rest of its chunk."""

    task: QueuedTask
    rest: deque[QueuedTask] = field(default_factory=deque)


@unhurried
@given(
    pages=st.lists(st.integers(0, 20), max_size=5),
    acts=st.lists(
        st.tuples(st.sampled_from(["take", "answer", "again", "give"]), st.integers(0, 50)), max_size=80
    ),
)
def test_nothing_is_lost_or_doubled_on_its_way(pages: list[int], acts: list[tuple[str, int]]) -> None:
    job, now_s, held, answered, total = factories.job_run(), NOW_S, list[Held](), list[int](), 0
    job.exhausted = False
    for act, number in acts:
        now_s += number / 10
        if job.wants_page and pages:
            size = pages.pop()
            page = [factories.queued_task(position=total + offset) for offset in range(size)]
            total += size
            job.add_page(page, total - 1, exhausted=False)
        if act == "take" and (task := job.next_for(lambda _task: True, now_s)) is not None:
            was_fresh = bool(job.fresh) and job.fresh[0] is task
            job.pop(task)
            held.append(Held(task, job.cut_chunk(task.tokens, 1 + number % 5) if was_fresh else deque()))
        elif act in ("answer", "again") and held:
            of = held.pop(number % len(held))
            if act == "answer":
                answered.append(of.task.position)
            else:
                of.task.due_s = now_s + number if number % 2 else 0.0
                job.ask_again(of.task, Place.FRONT if number % 3 else Place.BEHIND, now_s)
            job.give_back(of.rest)
        elif act == "give" and held:
            of = held[number % len(held)]
            rest, of.rest = of.rest, deque()
            job.give_back(rest)

    in_hand = [task.position for of in held for task in (of.task, *of.rest)]
    assert sorted(answered + in_hand + drain(job)) == list(range(total))


def test_all_of_a_job_is_sent_when_none_of_it_waits_in_a_chunk() -> None:
    job = factories.job_run(tasks=3)
    first, *_ = job.fresh
    job.pop(first)
    job.sent[first.position] = first
    chunk = job.cut_chunk(first.tokens, max_tasks=3)
    in_chunk = job.in_memory, job.all_sent

    for task in chunk:
        job.sent[task.position] = task
    in_flight = job.all_sent
    for position in [*job.sent]:
        job.note_decision(None)
        job.sent.pop(position)

    assert (in_chunk, in_flight, job.all_sent) == ((0, False), True, True)
