"""Who gets a place and who a turn, when there are more who want one."""

import threading
import time
from contextlib import ExitStack

from gpt_worker.places import Places, Turns

PATIENCE_S = 10.0


def test_one_owner_leaves_places_to_others() -> None:
    places = Places(5, most_each=3)
    with ExitStack() as held:
        first = [held.enter_context(places.hold("ada")) for _ in range(4)]
        others = [held.enter_context(places.hold(owner)) for owner in ("bob", "eve", "joe")]

        assert first == [True, True, True, False]
        assert others == [True, True, False]
        assert places.free == 0

    assert places.free == 5


def test_place_that_was_given_back_is_the_owners_again() -> None:
    places = Places(2, most_each=1)
    with places.hold("ada"), places.hold("ada") as second:
        assert not second

    with places.hold("ada") as later:
        assert later


def wait_until_waiting(turns: Turns, count: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while turns.waiting != count:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_owners_take_turns_however_many_of_one_wait() -> None:
    turns, served = Turns(), list[str]()

    def take(owner: str) -> None:
        with turns.hold(owner, PATIENCE_S) as held:
            assert held
            served.append(owner)

    threads = []
    with turns.hold("joe", 0):
        for count, owner in enumerate(["ada", "ada", "ada", "bob"], 1):
            threads.append(threading.Thread(target=take, args=(owner,)))
            threads[-1].start()
            wait_until_waiting(turns, count)
    for thread in threads:
        thread.join(PATIENCE_S)

    assert served == ["ada", "bob", "ada", "ada"]


def test_turn_that_does_not_come_in_time_is_nobodys() -> None:
    turns = Turns()
    with turns.hold("ada", 0), turns.hold("bob", 0.01) as held:
        assert not held

    with turns.hold("bob", 0) as later:
        assert later
