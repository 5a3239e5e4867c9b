"""How walks are planned, and how one that breaches is made shorter."""

from collections.abc import Sequence
from random import Random

import pytest

from chaos.scenarios import model
from chaos.scenarios.model import STEP_NUMBERS, WEIGHTS, Step, Walked, plan, shrink
from chaos.world import World


def test_every_step_is_one_of_the_world_that_takes_its_numbers() -> None:
    for name in WEIGHTS:
        arguments = getattr(World, name).__code__.co_argcount - 1
        assert arguments == STEP_NUMBERS.get(name, 1), name


def test_same_seed_gives_the_same_walk() -> None:
    assert plan(Random(7)) == plan(Random(7)) != plan(Random(8))


def test_shrinking_keeps_only_what_the_breach_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(steps: Sequence[Step]) -> Walked:
        numbers = [number for step in steps for number in step.numbers]
        return Walked(
            steps, "Breach: both: 1" if {3, 17} <= {*numbers} else "Breach: other" if 5 in numbers else None
        )

    monkeypatch.setattr(model, "walk", walk)
    steps = [Step("look", (number,)) for number in range(20)]

    shortest = shrink(walk(steps), patience_s=10.0)

    assert [step.numbers for step in shortest.steps] == [(3,), (17,)]
