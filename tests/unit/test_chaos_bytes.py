"""Whether a late reply is held against what was sent, or the machine was busy."""

import pytest

from chaos.scenarios.bytes import Late, Span, late_rows


@pytest.mark.parametrize(
    ("span", "count", "healths", "is_breach"),
    [
        pytest.param((10.0, 12.0), 1, [(10.5, 10.6)], True, id="health was quick"),
        pytest.param((10.0, 12.0), 1, [], True, id="nobody asked"),
        pytest.param((10.0, 12.0), 1, [(10.1, 11.4)], False, id="health was slow"),
        pytest.param((10.0, 12.0), 1, [(9.0, 10.5)], False, id="and began before"),
        pytest.param((10.0, 12.0), 1, [(11.5, 13.0)], False, id="and ended after"),
        pytest.param((10.0, 12.0), 1, [(8.0, 9.9), (12.1, 14.0)], True, id="health was slow at other times"),
        pytest.param((10.0, 12.4), 2, [(10.0, 10.3)], False, id="each of two"),
        pytest.param((10.0, 15.0), 1, [(10.0, 12.0)], True, id="slower than a slow machine"),
    ],
)
def test_late_reply_is_a_breach_unless_health_was_as_slow(
    span: tuple[float, float], count: int, healths: list[tuple[float, float]], is_breach: bool
) -> None:
    late = Late(Span(*span), count, b"GET / HTTP/1.1\r\n\r\n")

    breaches, busy = late_rows([late], [Span(*it) for it in healths], exchanges=5)

    assert (not breaches.ok, busy.got[0]) == (is_breach, "0" if is_breach else "1")
