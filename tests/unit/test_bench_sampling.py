"""When something is looked at, and what is kept of it."""

import threading
from itertools import count

from bench.sampling import Sampling


def test_it_looks_when_it_begins_and_when_it_ends_and_keeps_what_there_was() -> None:
    looks = iter((1, None, 2, 3))

    with Sampling(lambda: next(looks), every_s=3600) as first:
        pass
    with Sampling(lambda: next(looks), every_s=3600) as second:
        seen_within = list(second.samples)

    assert (first.samples, seen_within, second.samples) == ([1], [2], [2, 3])


def test_it_looks_again_and_again_meanwhile() -> None:
    numbers, fifth = count(1), threading.Event()

    def look() -> int:
        number = next(numbers)
        if number == 5:
            fifth.set()
        return number

    with Sampling(look, every_s=0.001) as sampling:
        assert fifth.wait(30.0)

    assert sampling.samples[:5] == [1, 2, 3, 4, 5]
