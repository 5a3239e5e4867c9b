"""The line through what was seen of a service's memory."""

import pytest

from chaos.watching import slope_per_s


@pytest.mark.parametrize(
    ("seen", "slope"),
    [
        ([], 0.0),
        ([(1.0, 5.0)], 0.0),
        ([(1.0, 5.0), (1.0, 7.0)], 0.0),
        ([(10.0, 100.0), (11.0, 102.0), (12.0, 104.0)], 2.0),
        ([(0.0, 9.0), (1.0, 9.0), (2.0, 9.0)], 0.0),
        ([(0.0, 1.0), (1.0, 0.0), (2.0, 0.0), (3.0, 1.0)], 0.0),
    ],
)
def test_slope_is_that_of_the_least_squares(seen: list[tuple[float, float]], slope: float) -> None:
    assert slope_per_s(seen) == pytest.approx(slope)
