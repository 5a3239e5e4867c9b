"""Ids that came already are known, and no others."""

from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.api.seen_ids import SeenIds


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)))
def test_id_is_new_exactly_once(ids: list[str]) -> None:
    seen = SeenIds()

    assert [id_ for id_ in ids if seen.add(id_)] == [*dict.fromkeys(ids)]


def test_many_ids_are_told_apart() -> None:
    seen = SeenIds()

    assert all(seen.add(str(number)) for number in range(100_000))
    assert not any(seen.add(str(number)) for number in range(0, 100_000, 1000))


def test_ids_that_look_alike_differ() -> None:
    seen = SeenIds()

    assert all(map(seen.add, ["a", "A", "a ", " a", "á", "a\u0301"]))
