"""Limits in a reply's headers: what is read, and what counts as silence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.limit_headers import Limit, LimitHeaders, parse_duration_s, read_group_name, read_headers
from tests.clock import unhurried

DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6ms", 0.006),
        ("120ms", 0.12),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("8.64s", 8.64),
        ("1d", DAY_S),
        ("20", 20.0),
        (" 0 ", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1s ", 1.0),
        ("1s 2s", None),
        ("1x", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("٣s", None),
        ("1" * 400, None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_durations_are_read_in_openais_form(text: str, seconds: float | None) -> None:
    assert parse_duration_s(text) == seconds


def test_headers_tell_both_limits() -> None:
    told = read_headers(
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "150000",
            "x-ratelimit-remaining-tokens": "149984",
            "x-ratelimit-reset-tokens": "6m0s",
        }
    )

    assert told == LimitHeaders(Limit(60, 59, 1.0), Limit(150_000, 149_984, 360.0), None)


def test_one_limit_may_be_told_without_the_other() -> None:
    told = read_headers({"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "400"})

    assert told == LimitHeaders(None, Limit(1_000, 400, None), None)


@pytest.mark.parametrize(
    ("limit", "remaining", "read"),
    [
        ("60", "59", Limit(60, 59, None)),
        ("60", "-5", Limit(60, 0, None)),
        ("60", "61", Limit(60, 60, None)),  # never more than there is in all
        ("60", "", None),
        ("", "59", None),
        ("0", "0", None),
        ("-1", "0", None),
        ("60.5", "59", None),
        ("many", "59", None),
        ("60, 60", "59, 59", None),
        ("9" * 13, "1", None),
    ],
)
def test_nonsense_in_headers_counts_as_silence(limit: str, remaining: str, read: Limit | None) -> None:
    told = read_headers({"x-ratelimit-limit-requests": limit, "x-ratelimit-remaining-requests": remaining})

    assert told.requests == read


@pytest.mark.parametrize(("remaining", "share"), [(60, 0.0), (45, 0.25), (0, 1.0)])
def test_used_share_is_what_is_not_left(remaining: int, share: float) -> None:
    assert Limit(60, remaining, None).used_share == share


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_milliseconds_win_over_seconds(headers: dict[str, str], seconds: float | None) -> None:
    assert read_headers(headers).retry_after_s == seconds


values = st.text(max_size=20) | st.text("0123456789.-smhd ", max_size=20) | st.integers().map(str)


@unhurried
@given(values, values, values, values)
def test_whatever_headers_say_a_limit_makes_sense(
    limit: str, remaining: str, reset: str, retry_after: str
) -> None:
    told = read_headers(
        {
            "x-ratelimit-limit-requests": limit,
            "x-ratelimit-remaining-requests": remaining,
            "x-ratelimit-reset-requests": reset,
            "retry-after": retry_after,
        }
    )

    assert told.tokens is None
    durations_s = [told.retry_after_s]
    if told.requests:
        durations_s.append(told.requests.reset_s)
        assert 0 <= told.requests.remaining <= told.requests.limit
    assert all(seconds is None or 0 <= seconds < math.inf for seconds in durations_s)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ({"openai-project": "proj_1"}, "proj_1"),
        ({"openai-project": "p" * 200}, "p" * 200),
        ({"openai-project": "p" * 201}, None),
        ({"openai-project": "proj\x01"}, None),
        ({"openai-project": "proj\x85"}, None),
        ({}, None),
    ],
)
def test_name_of_a_group_is_short_and_can_be_shown(header: dict[str, str], name: str | None) -> None:
    assert read_group_name(header, "openai-project") == name
