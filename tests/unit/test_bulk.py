"""Rows go to a server in parts that one statement may have."""

import pytest

from gpt_worker.store.bulk import CHARACTERS, ROWS, in_parts

HALF = "x" * (CHARACTERS // 2)


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        ([], []),
        (["a"], [1]),
        (["a"] * ROWS, [ROWS]),
        (["a"] * (2 * ROWS + 1), [ROWS, ROWS, 1]),
        ([HALF, HALF, "a", HALF], [2, 2]),
        (["a", HALF * 5, "a"], [1, 1, 1]),
        ([HALF * 5, HALF * 5], [1, 1]),
    ],
)
def test_part_has_so_many_rows_and_characters_at_most(texts: list[str], sizes: list[int]) -> None:
    rows = [(position, text, 1, None) for position, text in enumerate(texts)]

    parts = list(in_parts(rows))

    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part] == rows
