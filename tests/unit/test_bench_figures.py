"""Medians, percentiles, and how figures are written."""

import pytest

from bench.figures import Spread, number, percentile


def test_spread_is_the_median_and_the_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        (Spread(3.104, 2.98, 3.22), "3.1 s (2.98–3.22)"),
        (Spread(3.0, 3.0, 3.0), "3 s"),
        (Spread(0.0, 0.0, 12.0), "0 s (0–12)"),
    ],
)
def test_spread_tells_a_range_only_where_there_is_one(spread: Spread, expected: str) -> None:
    assert spread.text(" s") == expected


def test_spread_is_scaled_when_written() -> None:
    assert Spread(0.974, 0.97, 0.981).text(" %", 100.0) == "97.4 % (97–98.1)"


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 10.0), (0.95, 19.0), (0.951, 20.0), (1.0, 20.0)]
)
def test_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    values = [float(value) for value in range(20, 0, -1)]

    assert percentile(values, share) == expected


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_percentile_of_nonsense_is_an_error(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (100.0, "100"),
        (87.54, "87.5"),
        (10.0, "10"),
        (3.14159, "3.14"),
        (3.0, "3"),
        (0.0421, "0.042"),
        (-17.25, "-17.2"),
    ],
)
def test_numbers_have_about_three_figures(value: float, expected: str) -> None:
    assert number(value) == expected
