"""What the command line asks of a scenario: how long, how often, and the seed of every random choice."""

from dataclasses import dataclass, field
from random import Random
from time import monotonic

from chaos.report import Row


@dataclass(frozen=True, slots=True)
class Options:
    """`rounds` and `seconds` are None where nobody asked: the scenario's own apply, `short` or long."""

    seed: int
    rounds: int | None = None
    seconds: float | None = None
    short: bool = False
    started_s: float = field(default_factory=monotonic)

    def rounds_or(self, long: int, short: int) -> int:
        return self.rounds if self.rounds is not None else short if self.short else long

    def seconds_or(self, long: float, short: float) -> float:
        return self.seconds if self.seconds is not None else short if self.short else long

    def random(self, *parts: object) -> Random:
        """A source of its own for each part, so that a round is the same whatever came before it."""
        return Random(":".join(map(str, (self.seed, *parts))))

    def enough(self, what: str, wanted: int, got: int) -> Row:
        """Whether as much was done as was to be; a short form does what its time allows."""
        told = f"{wanted}, as time allows" if self.short else str(wanted)
        return Row(what, told, str(got), got >= wanted or (self.short and got > 0))
