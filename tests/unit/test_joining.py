"""A key gets more threads while they are of use, and few where the processor is busy."""

import random

import pytest

from gpt_worker.joining import FIRST_PAUSE_S, LATE_S, LONGEST_PAUSE_S, MOST_LATE, Joining

LATE, IN_TIME = 2 * LATE_S, 0.0


def test_thread_that_is_woken_in_time_joins_at_once() -> None:
    assert Joining().may_join(IN_TIME, calls_end=True)


def test_thread_that_is_woken_late_joins_when_no_call_ends() -> None:
    """Then it is not the key's own threads that keep the processor busy."""
    assert Joining().may_join(LATE, calls_end=False)


def test_thread_that_was_late_must_be_in_time_more_often() -> None:
    joining = Joining()

    said = [joining.may_join(late_s, calls_end=True) for late_s in (LATE, IN_TIME, LATE, IN_TIME, IN_TIME)]

    assert said == [False, False, False, False, True]


def test_thread_that_was_late_for_long_joins_soon_once_it_is_not() -> None:
    joining = Joining()
    for _ in range(100):
        joining.may_join(LATE, calls_end=True)

    said = [joining.may_join(IN_TIME, calls_end=True) for _ in range(MOST_LATE + 1)]

    assert said == [False] * MOST_LATE + [True]


def test_pauses_grow_while_it_is_late_and_shrink_again() -> None:
    joining = Joining()
    pauses_s = [joining.pause_s]
    for late_s in [LATE] * 10 + [IN_TIME] * 8:
        joining.may_join(late_s, calls_end=True)
        pauses_s.append(joining.pause_s)

    assert (pauses_s[0], pauses_s[10], pauses_s[18]) == (FIRST_PAUSE_S, LONGEST_PAUSE_S, FIRST_PAUSE_S)


@pytest.mark.parametrize("in_time", [0.05, 0.1, 0.2])
def test_few_threads_join_where_most_are_late(in_time: float) -> None:
    """Some 20,000 looks are half an hour: by chance alone, thousands would have joined."""
    chance = random.Random(7)
    joined, joining = 0, Joining()
    for _ in range(20_000):
        if joining.may_join(IN_TIME if chance.random() < in_time else LATE, calls_end=True):
            joined, joining = joined + 1, Joining()

    assert joined <= 5
