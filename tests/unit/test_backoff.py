"""What becomes of a task after each kind of trouble, as tables."""

from dataclasses import replace

import pytest

from gpt_worker.backoff import Again, GivenUp, Place, Problem, ProblemKind, Tries, backoff_s, decide
from gpt_worker.domain import ErrorCode
from tests import factories

JUST_UNDER_1 = 1 - 2**-53
KEYS_TROUBLE = [
    ProblemKind.KEY_REFUSED,
    ProblemKind.QUOTA_EXHAUSTED,
    ProblemKind.MODEL_UNAVAILABLE,
    ProblemKind.TOO_LARGE,
]
TIMEOUT = factories.problem(code=ErrorCode.TIMEOUT)


def again(problem: Problem, tries: Tries, jitter: float = 0.5) -> Again:
    decision = decide(problem, tries, jitter)
    assert isinstance(decision, Again)
    return decision


def decisions(problem: Problem, count: int) -> list[Again | GivenUp]:
    """What is decided when the same problem comes again and again."""
    tries, made = Tries(), list[Again | GivenUp]()
    for _ in range(count):
        made.append(decide(problem, tries, 0.5))
        if isinstance(made[-1], GivenUp):
            break
        tries = made[-1].tries
    return made


@pytest.mark.parametrize(
    ("attempt", "longest_s"),
    [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60), (1000, 60)],
)
def test_backoff_doubles_up_to_a_minute(attempt: int, longest_s: float) -> None:
    assert backoff_s(attempt, 0.0) == 0.0
    assert backoff_s(attempt, 0.5) == longest_s / 2
    assert backoff_s(attempt, JUST_UNDER_1) == pytest.approx(longest_s)


def test_trouble_of_nobody_is_given_up_at_the_fifth_attempt() -> None:
    made = decisions(factories.problem(), 10)

    assert [type(decision) for decision in made] == [Again] * 4 + [GivenUp]
    assert [decision.wait_s for decision in made if isinstance(decision, Again)] == [0.5, 1, 2, 4]
    assert isinstance(made[-1], GivenUp)
    assert (made[-1].attempts, made[-1].failure.code) == (5, ErrorCode.UPSTREAM_ERROR)


def test_trouble_of_nobody_is_tried_elsewhere_and_at_the_front() -> None:
    decision = again(factories.problem(), Tries())

    assert (decision.elsewhere, decision.place, decision.tries) == (True, Place.FRONT, Tries(attempts=1))


def test_third_call_that_ran_into_the_deadline_is_the_last() -> None:
    first, second, third = decisions(TIMEOUT, 10)

    assert isinstance(first, Again)
    assert isinstance(second, Again)
    assert isinstance(third, GivenUp)
    assert (third.attempts, third.failure.code) == (3, ErrorCode.TIMEOUT)


@pytest.mark.parametrize(("took_s", "wait_s"), [(0.0, 0.5), (0.2, 0.3), (4.0, 0.0)])
def test_backoff_counts_from_the_start_of_the_call(took_s: float, wait_s: float) -> None:
    decision = decide(factories.problem(), Tries(), 0.5, took_s)

    assert isinstance(decision, Again)
    assert decision.wait_s == pytest.approx(wait_s)


def test_wait_that_the_endpoint_asks_for_counts_from_its_reply() -> None:
    decision = decide(factories.problem(retry_after_s=5.0), Tries(), 0.5, 4.0)

    assert isinstance(decision, Again)
    assert decision.wait_s == 5.0


def test_timeouts_count_apart_from_other_trouble() -> None:
    decision = decide(TIMEOUT, Tries(attempts=2, timeouts=0), 0.5)

    assert isinstance(decision, Again)
    assert decision.tries == Tries(attempts=3, timeouts=1)


@pytest.mark.parametrize(
    ("told_s", "wait_s"), [(None, 0.5), (0.1, 0.5), (30.0, 30.0), (100.0, 60.0), (1e12, 60.0)]
)
def test_server_may_ask_for_a_longer_wait_up_to_a_minute(told_s: float | None, wait_s: float) -> None:
    assert again(factories.problem(retry_after_s=told_s), Tries()).wait_s == wait_s


@pytest.mark.parametrize("kind", KEYS_TROUBLE)
def test_trouble_of_the_key_costs_the_task_nothing(kind: ProblemKind) -> None:
    tries = Tries(attempts=4, timeouts=1, rate_limits=19)

    decision = again(factories.problem(kind=kind), tries)

    assert decision == Again(0.0, Place.FRONT, tries, elsewhere=True)


@pytest.mark.parametrize("kind", [ProblemKind.RESENT, ProblemKind.PACK_REFUSED])
def test_request_in_another_form_costs_the_task_nothing(kind: ProblemKind) -> None:
    tries = Tries(attempts=4)

    decision = again(factories.problem(kind=kind), tries)

    assert decision == Again(0.0, Place.FRONT, tries, elsewhere=False)


def test_stale_connection_is_free_once() -> None:
    made = decisions(factories.problem(kind=ProblemKind.STALE), 10)

    attempts = [decision.tries.attempts for decision in made if isinstance(decision, Again)]
    assert attempts == [0, 1, 2, 3, 4]
    assert isinstance(made[-1], GivenUp)


def test_rate_limited_task_goes_behind_its_jobs_others_from_the_second_time() -> None:
    made = decisions(factories.problem(kind=ProblemKind.RATE_LIMITED), 3)

    places = [decision.place for decision in made if isinstance(decision, Again)]
    assert places == [Place.FRONT, Place.BEHIND, Place.BEHIND]


def test_rate_limits_are_free_twenty_times_and_charged_then() -> None:
    made = decisions(factories.problem(kind=ProblemKind.RATE_LIMITED), 100)

    attempts = [decision.tries.attempts for decision in made if isinstance(decision, Again)]
    assert attempts == [0] * 20 + [1, 2, 3, 4]
    assert isinstance(made[-1], GivenUp)
    assert (made[-1].attempts, made[-1].failure.code) == (5, ErrorCode.RATE_LIMITED)


def test_rate_limit_leaves_the_wait_to_the_limiter() -> None:
    decision = again(factories.problem(kind=ProblemKind.RATE_LIMITED, retry_after_s=30.0), Tries())

    assert (decision.wait_s, decision.elsewhere) == (0.0, False)


def test_final_trouble_is_given_up_at_once() -> None:
    decision = decide(factories.problem(kind=ProblemKind.FINAL), Tries(attempts=2), 0.5)

    assert isinstance(decision, GivenUp)
    assert (decision.attempts, decision.failure.code) == (3, ErrorCode.BAD_REQUEST)


@pytest.mark.parametrize("kind", ProblemKind)
def test_every_kind_is_decided(kind: ProblemKind) -> None:
    assert isinstance(decide(factories.problem(kind=kind), Tries(), 0.5), Again | GivenUp)


def test_tries_are_never_forgotten() -> None:
    before = Tries(attempts=1, timeouts=1, rate_limits=3, stale=1)

    after = again(factories.problem(), before).tries

    assert after == replace(before, attempts=2)


@pytest.mark.parametrize(
    ("kind", "shows"),
    [
        (ProblemKind.KEY_REFUSED, False),
        (ProblemKind.QUOTA_EXHAUSTED, False),
        (ProblemKind.TRANSIENT, False),
        (ProblemKind.STALE, False),
        (ProblemKind.RATE_LIMITED, True),
        (ProblemKind.FINAL, True),
        (ProblemKind.PACK_REFUSED, True),
    ],
)
def test_some_trouble_shows_that_the_key_is_good(kind: ProblemKind, shows: bool) -> None:
    assert kind.shows_good_key is shows
