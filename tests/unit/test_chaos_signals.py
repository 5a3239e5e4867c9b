"""How long a reload may be silent: as long as its own worker needs to start, and a little."""

import pytest

from chaos.scenarios.signals import Reload, silence_row, start_of

NOON_AT = 1_700_049_600.0  # 2023-11-15, 12:00 UTC


@pytest.mark.parametrize(
    ("owned_at", "line"),
    [
        (NOON_AT - 0.5, "12:00:01.250 INFO    gpt_worker.service: gpt-worker answers action=started"),
        (NOON_AT + 43_199.0, "00:00:00.750 INFO    gpt_worker.service: gpt-worker answers action=started"),
    ],
)
def test_start_lasts_from_the_lock_to_the_last_line_that_tells_of_it(owned_at: float, line: str) -> None:
    earlier = "11:00:00.000 INFO    gpt_worker.service: gpt-worker answers action=started\n"
    later = "\n12:00:09.000 INFO    gpt_worker.jobs: job accepted action=submit\n"

    assert start_of(earlier + line + later, owned_at) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("silences_s", "ok"),
    [
        pytest.param([(10.0, 15.9), (20.0, 23.4)], True, id="as long as they may be"),
        pytest.param([(10.0, 16.1), (20.0, 23.4)], False, id="too long for the first"),
        pytest.param([(10.0, 15.9), (20.0, 23.6)], False, id="too long for the second, not for the first"),
        pytest.param([(1.0, 9.0), (10.0, 15.9)], True, id="before any HUP"),
    ],
)
def test_each_silence_is_held_to_the_start_of_its_own_worker(
    silences_s: list[tuple[float, float]], ok: bool
) -> None:
    all_s = [tenth / 10 for tenth in range(300)]
    answered_s = [at_s for at_s in all_s if not any(start < at_s < end for start, end in silences_s)]

    row = silence_row(answered_s, [Reload(10.0, start_s=3.0), Reload(20.0, start_s=0.5)])

    assert row.ok is ok


def test_nothing_was_silent_without_a_reload() -> None:
    assert silence_row([1.0, 9.0], []).ok
