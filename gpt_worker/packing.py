"""Several short tasks in one request: how they are asked, and which answers in the reply are certain.

Pure: values in, values out. An answer counts only if nothing says that it could be another task's; what is missing
is asked again in halves, then singly. Sending is in gpt.py, the order of tasks in fair_queue.py.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jiter

from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.domain import ErrorCode, JobSettings, compact_json
from gpt_worker.splitting import TOKENS_PER_MESSAGE, estimate_tokens, fits

SMALLEST_SIZE, FIRST_SIZE, LARGEST_SIZE = 2, 10, 50
TOKENS_PER_TASK = 8  # of JSON around each task
OUTPUT_TOKENS_PER_TASK = 16  # of JSON around each answer, some of it spent on escapes
INSTRUCTION = (
    'The user message is JSON that holds several tasks: {"tasks": [{"n": number, "text": task}, …]}. '
    "Do each task on its own, as the instructions above say, as if it were the only message. "
    "Answer every n exactly once, with the answer's text only."
)


def _strict(**of: Any) -> dict[str, Any]:
    return {"type": "object", "properties": of, "required": [*of], "additionalProperties": False}


_ANSWERS = {"type": "array", "items": _strict(n={"type": "integer"}, text={"type": "string"})}
# One for all packs: a provider compiles a schema when it first sees it.
RESPONSE_FORMAT = compact_json(
    {
        "type": "json_schema",
        "json_schema": {"name": "answers", "strict": True, "schema": _strict(answers=_ANSWERS)},
    }
)
TOKEN_LIMIT_NAMES = ("max_completion_tokens", "max_tokens")
SMALLER_MAY_DO = {
    ErrorCode.CONTEXT_LENGTH,  # all tasks together are too long
    ErrorCode.CONTENT_FILTER,  # one of them offends
    ErrorCode.TIMEOUT,  # so many answers take their time
    ErrorCode.BAD_RESPONSE,
}
FORM_TOKENS = estimate_tokens(INSTRUCTION) + estimate_tokens(RESPONSE_FORMAT)


def packed_settings(settings: JobSettings, count: int) -> JobSettings:
    """The settings of one request for so many tasks; their texts have been through the template already."""
    limit = settings.max_output_tokens
    return replace(
        settings,
        instructions=f"{settings.instructions}\n\n{INSTRUCTION}" if settings.instructions else INSTRUCTION,
        template=None,
        response_format=RESPONSE_FORMAT,
        max_output_tokens=None if limit is None else count * (limit + OUTPUT_TOKENS_PER_TASK),
    )


def packed_message(texts: Iterable[str]) -> str:
    """The user message: the tasks, numbered from 1."""
    return json.dumps({"tasks": [{"n": n, "text": t} for n, t in enumerate(texts, 1)]}, ensure_ascii=False)


def read_answers(content: str, count: int, *, cut: bool = False) -> dict[int, str]:
    """Index of the task → its answer, for those that are certain; never raises.

    Args:
        content: the reply; of a cut one the last answer counts for nothing, and neither does what is no JSON.
        cut: it is known to be cut, even if something on its way has closed the brackets.
    """
    said: dict[int, str | None] = {}  # None: said twice, or no text
    for item in _items(content, cut):
        n, text = (item.get("n"), item.get("text")) if isinstance(item, dict) else (None, None)
        if type(n) is int:  # a bool is an int too
            same = isinstance(text, str) and said.get(n, text) == text
            said[n] = text if same else None
    answers = {n - 1: text for n, text in said.items() if text is not None and n <= count}
    # Numbers that stray show a model that counts for itself, from 0 or 2 or 1001: then the ones that look right belong
    # to other tasks. Counting from 1 and saying more than was asked is harmless, if nothing is missing.
    if not said or min(said) != 1 or (max(said) > count and len(answers) < count):
        return {}
    return answers


def _items(content: str, cut: bool) -> list[Any]:
    """What stands under "answers", but for the last where the reply is cut: a text or a number may have gone on."""
    bare = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    raw = bare.encode("utf-8", "replace")
    try:
        parsed = jiter.from_json(raw, catch_duplicate_keys=True)
    except ValueError as error:
        # Only what is good JSON as far as it goes: the partial mode alone would pass over what is broken.
        if not str(error).startswith("EOF "):
            return []
        try:
            parsed, cut = jiter.from_json(raw, partial_mode=True), True
        except ValueError:  # too little to be anything, such as a quote
            return []
    items = parsed.get("answers") if isinstance(parsed, dict) else None
    return (items[:-1] if cut else items) if isinstance(items, list) else []


@dataclass(slots=True)
class PackSize:
    """The most tasks of the next pack: as many as replies have shown to come back whole."""

    tasks: int = FIRST_SIZE

    def came_whole(self, count: int) -> None:
        """A pack of so many tasks came back whole: doubled if it was full, since a step too far loses little."""
        if count >= self.tasks:
            self.tasks = min(LARGEST_SIZE, 2 * self.tasks)

    def fell_short(self, size: int) -> None:
        """A reply failed or was incomplete: half of what `tasks` was when its pack was made, so a round counts once."""
        self.tasks = max(SMALLEST_SIZE, min(self.tasks, size // 2))


def halves(missing: int) -> int:
    """The most tasks of the next packs of those that a reply has missed; 1: ask singly, in the ordinary form."""
    return (missing + 1) // 2


def names_the_form(problem: Problem) -> bool:
    """Whether a refusal may be about the form of packed requests, which holds for every job: it names nothing else."""
    about = f"{problem.param} {problem.message}"
    return problem.param is None or "response_format" in about or "json_schema" in about


def smaller_may_do(problem: Problem) -> bool:
    """Whether a packed request failed of what a smaller one may not; then nobody is charged for it."""
    too_many_answers = problem.code is ErrorCode.BAD_REQUEST and problem.param in TOKEN_LIMIT_NAMES
    return problem.kind is ProblemKind.TOO_LARGE or problem.code in SMALLER_MAY_DO or too_many_answers


def share(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in parts that are in proportion to the weights and have exactly that sum (largest remainder)."""
    weight = sum(weights)
    if weight == 0:
        weights, weight = [1] * len(weights), len(weights)
    parts = [total * one // weight for one in weights]
    by_remainder = sorted(range(len(parts)), key=lambda index: -(total * weights[index] % weight))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


class PackTokens:
    """The estimated prompt tokens of a job's packs: `shared` once, and each of its tasks."""

    def __init__(self, settings: JobSettings) -> None:
        self._instructions = estimate_tokens(settings.instructions) if settings.instructions else 0
        self.shared = 2 * TOKENS_PER_MESSAGE + FORM_TOKENS + self._instructions

    def of_task(self, tokens: int) -> int:
        """A task's part of a pack; `tokens` is its estimate alone, with the job's instructions."""
        return max(1, tokens - self._instructions - TOKENS_PER_MESSAGE) + TOKENS_PER_TASK


def plan(task_tokens: Iterable[int], settings: JobSettings) -> Iterator[int]:
    """The prompt tokens of each request, in order, if every reply comes back whole."""
    estimates, size = PackTokens(settings), PackSize()
    count, tokens, alone = 0, estimates.shared, 0
    for task in task_tokens:
        in_pack = estimates.of_task(task)
        if not fits(tokens, count, in_pack, settings.max_chunk_tokens, size.tasks):
            yield alone if count == 1 else tokens
            size.came_whole(count)
            count, tokens = 0, estimates.shared
        count, tokens, alone = count + 1, tokens + in_pack, task
    if count:
        yield alone if count == 1 else tokens
