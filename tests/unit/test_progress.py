"""A job followed: the rate, the time left, when an onlooker is told what, and the board that wakes them."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpt_worker.progress import Event, ProgressBoard, Rate, Watch, eta_s, follow
from tests.clock import FakeClock, eventually

Job = dict[str, Any]


class FakeWatch(Watch):
    """Time passes only while somebody waits; `changes` are the moments at which something is stored."""

    def __init__(self, clock: FakeClock, changes: list[float]) -> None:
        self.closing = threading.Event()
        super().__init__(self.closing)
        self.clock = clock
        self.changes = [clock.now_s + change for change in changes]

    def rest(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def wait(self, timeout_s: float) -> bool:
        until_s = self.clock.now_s + timeout_s
        due = [change for change in self.changes if change <= until_s]
        self.clock.now_s = max(self.clock.now_s, min(due)) if due else until_s
        self.changes = [change for change in self.changes if change > self.clock.now_s]
        return bool(due)


def job(*, answered: int = 0, failed: int = 0, total: int = 100, status: str = "running") -> Job:
    finished = status in ("succeeded", "cancelled")
    return {
        "id": "1",
        "status": status,
        "counts": {
            "total": total,
            "answered": answered,
            "failed": failed,
            "pending": total - answered - failed,
        },
        "usage": {"requests": answered, "prompt_tokens": 0, "completion_tokens": 0},
        "results": None,
        "finished_at": "2026-01-31T12:00:00.000Z" if finished else None,
    }


class Followed:
    """A job that is followed on a fake clock; `states` are (from when, the job or None)."""

    def __init__(self, states: list[tuple[float, Job | None]]) -> None:
        self.clock = FakeClock(0.0)
        self.states = states
        self.watch = FakeWatch(self.clock, [moment for moment, _ in states])
        self.looks: list[float] = []

    def look(self) -> Job | None:
        self.looks.append(self.clock.now_s)
        return [state for moment, state in self.states if moment <= self.clock.now_s][-1]

    def events(self, client_left: Callable[[], bool] = lambda: False) -> Iterator[tuple[float, Event | None]]:
        """Each event with its moment."""
        for event in follow(self.look, self.watch, client_left=client_left, now_s=self.clock):
            yield self.clock.now_s, event


def named(events: list[tuple[float, Event | None]]) -> list[tuple[float, str | None]]:
    return [(moment, event.name if event else None) for moment, event in events]


# The rate


@pytest.mark.parametrize(
    ("seen", "per_s"),
    [
        pytest.param([], None, id="nothing"),
        pytest.param([(0, 50)], None, id="one look"),
        pytest.param([(0, 0), (0.1, 5)], None, id="too short a time"),
        pytest.param([(0, 50), (0.5, 60)], 20.0, id="what was decided before does not count"),
        pytest.param([(0, 0), (5, 0)], 0.0, id="nothing moves"),
        pytest.param([(0, 0), (5, 1000), (10, 1000), (20, 1020)], 2.0, id="only the last 10 s count"),
        pytest.param([(0, 0), (100, 5), (200, 10)], 0.05, id="slow tasks make the window longer"),
        pytest.param([(0, 0), (5000, 1), (5600, 2)], 1 / 600, id="but not for ever"),
        pytest.param([(0, 90), (10, 100), (11, 40), (12, 50)], 10.0, id="a retry starts anew"),
    ],
)
def test_rate_is_taken_over_a_sliding_window(seen: list[tuple[float, int]], per_s: float | None) -> None:
    rate = Rate()
    for moment, decided in seen:
        rate.add(decided, moment)

    assert rate.per_s() == per_s


def test_rate_keeps_little_however_long_it_looks() -> None:
    rate = Rate()
    for number in range(100_000):
        rate.add(number // 7, number * 0.5)

    assert rate.per_s() == pytest.approx(2 / 7, rel=0.1)
    assert len(rate._seen) < 200


@pytest.mark.parametrize(
    ("pending", "tasks_per_s", "expected"),
    [(40, 20.0, 2.0), (40, None, None), (40, 0.0, None), (0, None, 0.0), (0, 20.0, 0.0)],
)
def test_eta_is_what_is_pending_at_this_rate(
    pending: int, tasks_per_s: float | None, expected: float | None
) -> None:
    assert eta_s(pending, tasks_per_s) == expected


# Following


def test_finished_job_is_told_at_once() -> None:
    done = job(answered=100, status="succeeded")
    followed = Followed([(0, done)])

    events = list(followed.events())

    assert named(events) == [(0, "progress"), (0, "finished")]
    assert events[1][1] == Event("finished", done)
    assert followed.looks == [0]


def test_progress_has_what_the_contract_names() -> None:
    followed = Followed([(0, job(answered=20)), (1.0, job(answered=40, failed=10)), (2.0, None)])

    (_, first), (_, second) = followed.events()

    assert first is not None
    assert second is not None
    assert first.data["tasks_per_s"] is None
    assert first.data["eta_s"] is None
    assert second.data == {
        "status": "running",
        "counts": {"total": 100, "answered": 40, "failed": 10, "pending": 50},
        "usage": {"requests": 40, "prompt_tokens": 0, "completion_tokens": 0},
        "tasks_per_s": 30.0,
        "eta_s": 1.7,
    }


def test_two_looks_a_second_are_the_most_however_much_is_stored() -> None:
    states: list[tuple[float, Job | None]] = [(n / 100, job(answered=n, total=1000)) for n in range(1000)]
    followed = Followed([*states, (10, job(answered=1000, total=1000, status="succeeded"))])

    events = list(followed.events())

    assert followed.looks == [n / 2 for n in range(21)]
    assert named(events) == [(n / 2, "progress") for n in range(21)] + [(10, "finished")]


def test_change_is_told_when_it_is_stored() -> None:
    followed = Followed([(0, job()), (3.3, job(answered=1)), (4, None)])

    assert named(list(followed.events())) == [(0, "progress"), (3.3, "progress")]


def test_nothing_is_told_twice() -> None:
    same = job(answered=1)
    followed = Followed([(0, same), (1, same), (2, same), (3, None)])

    assert named(list(followed.events())) == [(0, "progress")]


def test_silence_is_marked_every_15_s() -> None:
    followed = Followed([(0, job()), (40, job(answered=1)), (60, None)])

    moments = named(list(followed.events()))

    assert [moment for moment, name in moments if name is None] == pytest.approx([15, 30, 55], abs=1.0)
    assert (40, "progress") in moments


def test_job_that_is_gone_ends_the_stream_even_if_nobody_tells() -> None:
    followed = Followed([(0, job()), (7, None)])
    followed.watch.changes.clear()

    assert named(list(followed.events())) == [(0, "progress")]
    assert followed.clock.now_s <= 12


def test_client_that_left_is_noticed_within_a_second() -> None:
    followed = Followed([(0, job())])

    list(followed.events(lambda: followed.clock.now_s >= 3.0))

    assert followed.clock.now_s <= 4.0


def test_shutdown_ends_the_stream_without_finished() -> None:
    followed = Followed([(0, job()), (1, job(answered=100, status="succeeded"))])
    events = followed.events()
    next(events)
    followed.watch.closing.set()

    assert list(events) == []


# The board


def test_board_wakes_those_who_follow_the_job_and_no_others() -> None:
    board = ProgressBoard()

    with board.watch("a") as mine, board.watch("a") as too, board.watch("b") as other:
        board.changed(["a", "c"])

        assert [watch.wait(0) for watch in (mine, too, other)] == [True, True, False]
        assert not mine.wait(0)


def test_board_forgets_who_went_away() -> None:
    board = ProgressBoard()
    with board.watch("a"), board.watch("a"):
        pass

    board.changed(["a"])

    assert board._watches == {}


def test_closed_board_wakes_all_and_cuts_their_rests() -> None:
    board = ProgressBoard()
    with board.watch("a") as watch:
        resting = threading.Thread(target=watch.rest, args=(60.0,), daemon=True)
        resting.start()

        board.close()

        eventually(lambda: not resting.is_alive())
        assert watch.wait(0)
        assert watch.closed


def test_who_comes_after_the_close_does_not_wait() -> None:
    board = ProgressBoard()
    board.close()

    with board.watch("a") as watch:
        assert watch.wait(0)
        assert watch.closed
