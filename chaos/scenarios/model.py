"""Random walks over all that can be done to the service and befall it, each held to a small model of the contract.

A walk is a list of steps from a seed, taken by one service of its own (`chaos.world`). One that breaches the contract
is walked again with fewer and fewer steps, and the shortest that still does is told.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.world import World

NAME = "model"

SECONDS, SECONDS_SHORT = 600.0, 20.0
STEPS = 60
AT_ONCE = 3  # walks: most of one is waiting
SHRINK_S, SHRINK_SHORT_S = 120.0, 30.0
STARTS_FEWEST = 8  # submits at the beginning of a walk, so that there is something to do things to
NUMBERS = 1 << 16
TOLD_LENGTH = 2_000
WEIGHTS = {  # of each step of `World`; how many numbers it takes stands in STEP_NUMBERS
    "submit": 22,
    "submit_at_once": 3,
    "submit_and_kill": 2,
    "refused_submit": 2,
    "replay": 4,
    "clash": 2,
    "look": 8,
    "cancel": 8,
    "retry": 10,
    "purge": 3,
    "race": 5,
    "list_jobs": 4,
    "toggle": 3,
    "kill": 2,
    "restart": 1,
    "hold": 3,
    "let_go": 4,
    "storm": 5,
    "refuse": 5,
    "pause": 5,
    "wait": 5,
}
STEP_NUMBERS = {
    "submit": 4,
    "submit_at_once": 2,
    "submit_and_kill": 2,
    "retry": 2,
    "race": 2,
    "storm": 2,
    "refuse": 2,
    "kill": 0,
    "restart": 0,
    "hold": 0,
    "let_go": 0,
}


@dataclass(frozen=True, slots=True)
class Step:
    """A method of `World`, and its numbers."""

    name: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.numbers))})"


@dataclass(frozen=True, slots=True)
class Walked:
    """How a walk went: the steps that were taken, and what was wrong after the last of them, if anything was."""

    steps: Sequence[Step]
    breach: str | None


def run(options: Options) -> list[Row]:
    ends_s = time.monotonic() + options.seconds_or(SECONDS, SECONDS_SHORT)
    walks = _Walks(options, ends_s)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda _: walks.run(), range(AT_ONCE)))
    breaches = []
    for number, walked in walks.breached:
        shortest = shrink(walked, SHRINK_SHORT_S if options.short else SHRINK_S)
        steps = "; ".join(map(str, shortest.steps))
        print(
            f"model: walk {number}, made shorter: {shortest.breach}\n  {steps}",
            flush=True,
        )
        breaches.append(f"walk {number}: {shortest.breach} after {steps}")
    print(
        f"model: walks 0 to {walks.taken - 1} of seed {options.seed}, {walks.steps.total()} steps", flush=True
    )
    return [
        none_of("walks that breach the contract", breaches, walks.taken),
        fact("steps", f"{walks.steps.total()}: {dict(walks.steps.most_common())}"),
        Row("kinds of steps that were taken", f"{len(WEIGHTS)}", str(len(walks.steps)), walks.taken > 0),
    ]


class _Walks:
    """Walk after walk until the time is over, from several threads; `rounds` asks for so many."""

    def __init__(self, options: Options, ends_s: float) -> None:
        self._options = options
        self._ends_s = ends_s
        self._lock = threading.Lock()
        self.taken = 0
        self.steps: Counter[str] = Counter()
        self.breached: list[tuple[int, Walked]] = []

    def run(self) -> None:
        while (number := self._next()) is not None:
            walked = walk(plan(self._options.random(NAME, number)))
            with self._lock:
                self.steps.update(step.name for step in walked.steps)
                if walked.breach is not None:
                    print(f"model: walk {number} breaches: {walked.breach}", flush=True)
                    self.breached.append((number, walked))

    def _next(self) -> int | None:
        with self._lock:
            asked = self._options.rounds
            over = time.monotonic() >= self._ends_s if asked is None else self.taken >= asked
            if over or len(self.breached) >= AT_ONCE:
                return None
            self.taken += 1
            return self.taken - 1


def plan(random: Random) -> list[Step]:
    names = random.choices([*WEIGHTS], [*WEIGHTS.values()], k=STEPS)
    return [_step("submit", random) for _ in range(random.randrange(STARTS_FEWEST))] + [
        _step(name, random) for name in names
    ]


def _step(name: str, random: Random) -> Step:
    return Step(name, tuple(random.randrange(NUMBERS) for _ in range(STEP_NUMBERS.get(name, 1))))


def walk(steps: Sequence[Step]) -> Walked:
    """Take the steps, then settle."""
    taken: list[Step] = []
    try:
        with tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder, World(Path(folder)) as world:
            for step in steps:
                taken.append(step)
                getattr(world, step.name)(*step.numbers)
            world.settle()
    except Exception as error:  # whatever it is, it must not happen
        return Walked(taken, f"{type(error).__name__}: {str(error)[-TOLD_LENGTH:]}")
    return Walked(taken, None)


def shrink(walked: Walked, patience_s: float) -> Walked:
    """The shortest walk found that still breaches in the same way, by leaving out ever smaller parts of it."""
    ends_s = time.monotonic() + patience_s
    size = len(walked.steps) // 2
    while size and time.monotonic() < ends_s:
        at = 0
        while at < len(walked.steps) and time.monotonic() < ends_s:
            shorter = walk([*walked.steps[:at], *walked.steps[at + size :]])
            if _kind(shorter) == _kind(walked):
                walked = shorter
            else:
                at += size
        size = min(size // 2, len(walked.steps) // 2)
    return walked


def _kind(walked: Walked) -> Sequence[str]:
    return (walked.breach or "").split(":")[:2]
