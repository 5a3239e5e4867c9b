"""How large a prompt is, and how a job's tasks become chunks. Pure: values in, values out."""

from collections.abc import Iterable, Iterator

from gpt_worker.domain import Prompt
from gpt_worker.prompts import encode

BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # what OpenAI's chat format adds to each message
CHUNKS_PER_THREAD = 4


def estimate_tokens(text: str) -> int:
    """Prompt tokens of a text, at least 1: UTF-8 bytes ÷ 4, so that no tokenizer is needed."""
    return size_bytes(text) // BYTES_PER_TOKEN or 1


def size_bytes(text: str) -> int:
    """In UTF-8, as it is sent."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def estimate_prompt(prompt: Prompt, instructions_tokens: int = 0) -> int:
    """Prompt tokens of a whole task, with what the job's instructions add.

    Messages and variables count with all that their JSON has, so that nothing is for free.
    """
    tokens = TOKENS_PER_MESSAGE + instructions_tokens
    if isinstance(prompt, str):
        return tokens + estimate_tokens(prompt)
    return tokens + estimate_tokens(encode(prompt)) if prompt else tokens


def chunk_limit(tasks: int, threads: int) -> int:
    """The most tasks of one chunk: about tasks ÷ (4 × threads), so that no thread is left with a long tail."""
    return max(1, tasks // (CHUNKS_PER_THREAD * max(1, threads)))


def fits(
    chunk_tokens: int, chunk_tasks: int, next_tokens: int, max_chunk_tokens: int, max_tasks: int
) -> bool:
    """Whether one more task goes into a chunk; a single larger task is its own chunk."""
    return chunk_tasks == 0 or (chunk_tasks < max_tasks and chunk_tokens + next_tokens <= max_chunk_tokens)


def split(task_tokens: Iterable[int], max_chunk_tokens: int, max_tasks: int) -> Iterator[int]:
    """How many tasks each chunk holds, in order."""
    count = tokens = 0
    for next_tokens in task_tokens:
        if not fits(tokens, count, next_tokens, max_chunk_tokens, max_tasks):
            yield count
            count = tokens = 0
        count += 1
        tokens += next_tokens
    if count:
        yield count
