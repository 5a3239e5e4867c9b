"""How large prompts are, and how tasks become chunks."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.domain import Prompt
from gpt_worker.splitting import chunk_limit, estimate_prompt, estimate_tokens, split
from tests.clock import unhurried


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 1), ("a", 1), ("a" * 8, 2), ("a" * 4000, 1000), ("ü" * 4, 2), ("👋" * 3, 3)]
)
def test_text_is_estimated_by_its_bytes(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a" * 400, 104),
        ([{"role": "user", "content": "a" * 400}], 111),
        ([{"role": "user", "content": [{"type": "text", "text": "a" * 400}]}], 117),
        ({"text": "a" * 400, "n": 7}, 108),
        ({"ü" * 200: 7}, 105),
        ([{"role": "user", "content": [[]] * 1000}], 761),
        ({}, 4),
        ([], 4),
    ],
)
def test_prompt_is_estimated_with_all_that_it_has(prompt: Prompt, tokens: int) -> None:
    assert estimate_prompt(prompt) == tokens


def test_instructions_count_for_every_task() -> None:
    assert estimate_prompt("a" * 40, instructions_tokens=300) == 314


@pytest.mark.parametrize(
    ("tasks", "threads", "limit"),
    [(0, 64, 1), (1, 64, 1), (511, 128, 1), (1024, 128, 2), (100_000, 128, 195), (8, 0, 2)],
)
def test_chunk_is_a_quarter_of_a_threads_share(tasks: int, threads: int, limit: int) -> None:
    assert chunk_limit(tasks, threads) == limit


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "max_tasks", "chunks"),
    [
        ([], 10, 10, []),
        ([5], 10, 10, [1]),
        ([5, 5, 1], 10, 10, [2, 1]),
        ([1] * 7, 100, 3, [3, 3, 1]),
        ([99, 1, 99], 10, 10, [1, 1, 1]),
        ([1, 99, 1], 10, 10, [1, 1, 1]),
    ],
)
def test_tasks_are_split_at_both_limits(
    tokens: list[int], max_tokens: int, max_tasks: int, chunks: list[int]
) -> None:
    assert list(split(tokens, max_tokens, max_tasks)) == chunks


@unhurried
@given(
    tokens=st.lists(st.integers(1, 50), max_size=60),
    max_tokens=st.integers(1, 80),
    max_tasks=st.integers(1, 10),
)
def test_chunks_hold_every_task_in_order_and_keep_the_limits(
    tokens: list[int], max_tokens: int, max_tasks: int
) -> None:
    counts = list(split(tokens, max_tokens, max_tasks))

    ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
    chunks = [tokens[start:end] for start, end in pairwise(ends)]
    assert [task for chunk in chunks for task in chunk] == tokens
    assert all(1 <= len(chunk) <= max_tasks for chunk in chunks)
    assert all(sum(chunk) <= max_tokens or len(chunk) == 1 for chunk in chunks)
    for chunk, following in pairwise(chunks):  # none is smaller than it must be
        assert len(chunk) == max_tasks or sum(chunk) + following[0] > max_tokens


@unhurried
@given(
    st.recursive(
        st.text() | st.integers() | st.none(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_prompt_has_an_estimate(prompt: Any) -> None:
    assert estimate_prompt(prompt) >= 4
