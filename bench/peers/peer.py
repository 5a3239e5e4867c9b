"""What all the peers' scripts share: what they are told, and how they tell what became of it.

It runs in each peer's own environment, so it imports nothing but the standard library.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TRIES = 3
"""How often a task is given to another key when the library has given it up: what a careful user would write."""


@dataclass
class Told:
    """The line of JSON on standard input."""

    base_url: str
    keys: list[dict[str, Any]]
    model: str
    tasks: dict[str, str]
    instructions: str | None
    in_flight: int
    deadline_s: float
    sdk_retries: int
    bucket_s: float
    options: dict[str, Any]

    def messages(self, text: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*system, {"role": "user", "content": text}]

    def key_in_turn(self) -> Callable[[], int]:
        """The next key's place: each in turn, as often as its limit is large ("smooth weighted round robin")."""
        weights = [key["requests_per_minute"] or 1 for key in self.keys]
        credit = [0] * len(weights)
        lock = threading.Lock()

        def following() -> int:
            with lock:
                for place, weight in enumerate(weights):
                    credit[place] += weight
                chosen = max(range(len(credit)), key=credit.__getitem__)
                credit[chosen] -= sum(weights)
                return chosen

        return following


@dataclass
class Done:
    """Answers by id, and for the others the kind of the last error."""

    answers: dict[str, str | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0
    wall_s: float = 0.0

    def begin(self) -> None:
        """To be called when everything is imported and built."""
        self.started_at = time.monotonic()

    def end(self) -> None:
        self.wall_s = time.monotonic() - self.started_at


def main(work: Callable[[Told], Done]) -> None:
    """Read what to do, do it, tell what became of it, and end at once."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not the result
    told = Told(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done = work(told)
    json.dump(vars(done), results)
    results.write("\n")
    results.flush()
    results.close()
    threading.Event().wait(60)  # until it is killed, so that its memory and CPU can be read


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os.killpg(0, signal.SIGKILL)
