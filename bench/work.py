"""What every contestant is given, what it gives back, and how the fake OpenAI's word on it is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.watch import Watch
from tests.upstream import Upstream

MODEL = "gpt-4.1-nano"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tasks by id, and what the peers are told beside them: they can't learn limits, so they are told those too."""

    tasks: Mapping[str, str]
    in_flight: int
    deadline_s: float
    sdk_retries: int = 2
    """openai-python's own retries on one key; 2 is its default."""
    requests_per_minute: Mapping[str, int] = field(default_factory=dict)
    """By API key; what it can do in all, whichever of its limits binds it."""
    bucket_s: float = 60.0
    instructions: str | None = None


@dataclass(slots=True, kw_only=True)
class Measured:
    """One contestant's run. `failure` says why there is none."""

    contestant: str
    failure: str | None = None
    tasks: int = 0
    wall_s: float = 0.0
    lost: int = 0
    wrong: int = 0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    rate_limited: int = 0
    calls_by_key: dict[str, int] = field(default_factory=dict)
    statuses_by_key: dict[str, dict[int, int]] = field(default_factory=dict)
    codes_by_key: dict[str, dict[str, int]] = field(default_factory=dict)
    prompt_tokens: int = 0
    answered: list[tuple[float, int]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks_per_s(self) -> float:
        return self.tasks / self.wall_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def expected_answer(text: str) -> str:
    """What the fake OpenAI says to a text."""
    return f"answer to: {text}"


def count_lost_and_wrong(tasks: Mapping[str, str], answers: Mapping[str, Any]) -> tuple[int, int]:
    """Tasks without an answer, and tasks with another one than theirs."""
    given = {task_id: answer for task_id, answer in answers.items() if answer is not None}
    lost = sum(task_id not in given for task_id in tasks)
    wrong = sum(
        task_id in given and given[task_id] != expected_answer(text) for task_id, text in tasks.items()
    )
    return lost, wrong


def measured(
    contestant: str,
    work: Work,
    answers: Mapping[str, Any],
    errors: Mapping[str, str],
    span_s: tuple[float, float],
    watch: Watch,
    upstream: Upstream,
) -> Measured:
    """Everything that is told alike of everybody. `span_s`: begin and end of the work, `time.monotonic()`."""
    begin_s, end_s = span_s
    counters = upstream.counters()
    lost, wrong = count_lost_and_wrong(work.tasks, answers)
    kinds: dict[str, int] = {}
    for kind in errors.values():
        kinds[kind] = kinds.get(kind, 0) + 1
    return Measured(
        contestant=contestant,
        tasks=len(work.tasks),
        wall_s=end_s - begin_s,
        lost=lost,
        wrong=wrong,
        cpu_s=watch.cpu_s(begin_s, end_s),
        peak_rss_bytes=watch.peak_rss_bytes(),
        rate_limited=sum(key["by_code"].get("rate_limit_exceeded", 0) for key in counters.values()),
        calls_by_key={key: seen["calls"] for key, seen in counters.items()},
        statuses_by_key={key: dict(seen["by_status"]) for key, seen in counters.items()},
        codes_by_key={key: dict(seen["by_code"]) for key, seen in counters.items()},
        prompt_tokens=sum(key["prompt_tokens"] for key in counters.values()),
        answered=watch.answered(begin_s),
        errors=kinds,
    )
