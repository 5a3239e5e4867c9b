"""What is kept of models that take no packs."""

from collections import deque

import pytest

from gpt_worker.backoff import ProblemKind
from gpt_worker.gpt import AnyReply
from gpt_worker.lanes import Lane
from gpt_worker.marks import MAX_MARKS
from gpt_worker.rate_limit import Reservation
from gpt_worker.settling import UNPACKABLE_S, Grant, Settling
from tests import factories
from tests.clock import FakeClock
from tests.factories import MODEL


class Stand:
    """Lanes of one endpoint, and what settles their calls."""

    def __init__(self, lanes: int = 1) -> None:
        self.clock = FakeClock()
        self.lanes = [factories.lane(number=number) for number in range(lanes)]
        self.settling = Settling(self.lanes, lambda _lanes: None, lambda: 0.0)

    def call(self, lane: Lane, reply: AnyReply, model: str = MODEL) -> None:
        """One call that brings this reply."""
        job = factories.job_run(tasks=1, pack=True)
        job.model = model
        task = job.fresh.popleft()
        limiter = lane.group.limiter(model)
        reservation = limiter.reserve(1, self.clock())
        assert isinstance(reservation, Reservation)
        grant = Grant(job, [task], limiter, reservation, deque(), self.clock())
        lane.sent(self.clock())
        lane.came_back(self.clock())
        self.settling.settle(lane, grant, reply, self.clock())


@pytest.fixture
def stand() -> Stand:
    return Stand(lanes=2)


def test_models_that_take_no_packs_are_remembered_up_to_a_bound(stand: Stand) -> None:
    lane, _ = stand.lanes
    refused = factories.trouble(kind=ProblemKind.PACK_REFUSED)

    for number in range(MAX_MARKS + 100):
        stand.call(lane, refused, model=f"made up {number}")
    stand.call(lane, refused)

    assert len(stand.settling._unpackable) == MAX_MARKS
    job = factories.job_run(pack=True)
    assert not stand.settling.packs(lane, job, stand.clock())
    assert stand.settling.packs(lane, job, stand.clock() + UNPACKABLE_S)
