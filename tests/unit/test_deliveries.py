"""When a webhook goes again, and when it is given up."""

from datetime import UTC, datetime

import pytest

from gpt_worker.addresses import is_loopback
from gpt_worker.deliveries import (
    WAITS_S,
    Verdict,
    judge,
    next_wait_s,
    origin_of,
    read_retry_after_s,
)
from gpt_worker.domain import DeliveryStatus
from gpt_worker.store.deliveries import TRIES

MIDDLE = 0.5
DAY_S = 86_400.0
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("attempt", "wait_s"),
    [(1, 5), (2, 300), (3, 1800), (4, 7200), (5, 18_000), (6, 36_000), (7, 36_000), (8, None), (9, None)],
)
def test_waits_are_those_of_the_contract(attempt: int, wait_s: float | None) -> None:
    assert next_wait_s(attempt, None, MIDDLE) == wait_s


def test_schedule_has_as_many_tries_as_the_store_gives() -> None:
    assert len(WAITS_S) + 1 == TRIES


@pytest.mark.parametrize(("jitter", "wait_s"), [(0.0, 240.0), (0.5, 300.0), (1.0, 360.0)])
def test_wait_is_spread_by_a_fifth(jitter: float, wait_s: float) -> None:
    assert next_wait_s(2, None, jitter) == pytest.approx(wait_s)


@pytest.mark.parametrize(
    ("retry_after_s", "wait_s"), [(0.0, 5.0), (4.0, 5.0), (60.0, 60.0), (DAY_S, DAY_S), (9 * DAY_S, DAY_S)]
)
def test_receiver_may_ask_for_a_longer_wait_up_to_a_day(retry_after_s: float, wait_s: float) -> None:
    assert next_wait_s(1, retry_after_s, MIDDLE) == wait_s


def test_receiver_can_not_ask_for_more_tries() -> None:
    assert next_wait_s(8, 60.0, MIDDLE) is None


@pytest.mark.parametrize("status_code", [200, 201, 202, 204, 299])
def test_success_ends_the_delivery(status_code: int) -> None:
    assert judge(status_code, 1, 60.0, MIDDLE) == Verdict(DeliveryStatus.DELIVERED)


@pytest.mark.parametrize("status_code", [None, 300, 301, 307, 308, 400, 401, 404, 429, 500, 503])
def test_anything_else_goes_again(status_code: int | None) -> None:
    assert judge(status_code, 2, None, MIDDLE) == Verdict(None, 300.0)


def test_gone_gives_up_at_once() -> None:
    assert judge(410, 1, 60.0, MIDDLE) == Verdict(DeliveryStatus.FAILED)


def test_last_attempt_gives_up() -> None:
    assert judge(500, 8, None, MIDDLE) == Verdict(DeliveryStatus.FAILED)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("Sat, 31 Jan 2026 12:01:30 GMT", 90.0),
        ("Sat, 31 Jan 2026 13:01:30 +0100", 90.0),
        ("Sat, 31 Jan 2026 12:01:30 -0000", 90.0),
        ("Sat, 31 Jan 2026 11:00:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("-5", None),
        ("soon", None),
        ("٣", None),
        ("9" * 5000, None),
        ("Sat, 31 Jan 99999 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert read_retry_after_s(header, NOW) == seconds


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://receiver:8000/hook?a=b", "http://receiver:8000"),
        ("https://user:p@ss@Receiver.example.org/other", "https://receiver.example.org"),
        ("http://[::1]:8443", "http://[::1]:8443"),
    ],
)
def test_origin_is_scheme_host_and_port_alone(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:3333", True),
        ("http://127.8.9.10/hook", True),
        ("http://localhost/hook", True),
        ("https://[::1]:8443/hook", True),
        ("http://user:password@127.0.0.1/", True),
        ("http://127.0.0.1.example.org/", False),
        ("http://127.0.0.1@example.org/", False),
        ("http://example.org/?127.0.0.1", False),
        ("http://10.0.0.1/", False),
        ("http://0.0.0.0/", False),
    ],
)
def test_loopback_address_is_told_by_its_host_alone(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback
