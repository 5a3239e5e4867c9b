"""The words as values: statuses, settings that survive the database, ids that sort by time."""

import time
from dataclasses import fields
from datetime import UTC
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.domain import (
    ANONYMOUS,
    HIDDEN,
    UNFINISHED,
    VISIBLE,
    Answer,
    Caller,
    ErrorCode,
    Failure,
    JobSettings,
    JobStatus,
    Outcome,
    Role,
    Usage,
    new_id,
    utc_now,
)
from tests.clock import unhurried

CODES = {
    "rate_limited",
    "quota_exhausted",
    "key_refused",
    "model_unavailable",
    "timeout",
    "connection",
    "upstream_error",
    "bad_response",
    "content_filter",
    "context_length",
    "bad_request",
    "cancelled",
    "expired",
    "budget",
    "interrupted",
}


def test_error_codes_are_those_of_the_contract() -> None:
    assert set(ErrorCode) == CODES


def test_every_status_is_visible_or_hidden() -> None:
    assert set(VISIBLE) | set(HIDDEN) == set(JobStatus)
    assert not set(VISIBLE) & set(HIDDEN)
    assert set(UNFINISHED) <= set(VISIBLE)


def test_settings_store_only_what_was_set() -> None:
    assert JobSettings().to_json() == {}
    assert JobSettings(temperature=0.0, priority=3).to_json() == {"temperature": 0.0, "priority": 3}


@unhurried
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2),
            "max_chunk_tokens": st.integers(1, 10**9),
            "instructions": st.text(),
            "template": st.text(),
            "max_output_tokens": st.integers(1, 10**9),
            "response_format": st.text(),
            "pack": st.booleans(),
            "priority": st.integers(-100, 100),
            "deadline_s": st.floats(1, 1e6),
            "max_total_tokens": st.integers(1, 10**12),
        },
    )
)
def test_settings_come_back_as_they_were(values: dict[str, Any]) -> None:
    settings = JobSettings(**values)

    assert JobSettings.from_json(settings.to_json()) == settings


def test_response_format_that_is_stored_as_an_object_is_read() -> None:
    stored = {"response_format": {"type": "json_schema", "json_schema": {"name": "ї"}}}

    form = JobSettings.from_json(stored).response_format

    assert form == '{"type":"json_schema","json_schema":{"name":"ї"}}'


def test_settings_have_defaults_throughout() -> None:
    assert all(field.default is not None or field.type for field in fields(JobSettings))
    assert (JobSettings().max_chunk_tokens, JobSettings().deadline_s) == (4000, 7 * 86_400)


def test_ids_sort_by_time_and_differ() -> None:
    first = [new_id() for _ in range(1000)]
    start_ms = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 <= start_ms:
        pass

    later = new_id()

    assert len(set(first)) == 1000
    assert all(len(id_) == 32 and id_ < later for id_ in first)


def test_now_is_aware_and_cut_to_milliseconds() -> None:
    now = utc_now()

    assert now.tzinfo is UTC
    assert now.microsecond % 1000 == 0


@pytest.mark.parametrize(
    ("decision", "least_bytes"),
    [(None, 1), (Failure(ErrorCode.TIMEOUT, "late"), 1), (Answer("👋" * 1000), 4000)],
)
def test_outcome_knows_its_size(decision: Answer | Failure | None, least_bytes: int) -> None:
    assert Outcome("job", 0, decision).size_bytes >= least_bytes


def test_usage_adds_up() -> None:
    assert Usage(3, 4).total_tokens == 7


def test_only_admins_are_admins() -> None:
    assert Caller("1", "ada@example.org", Role.ADMIN).is_admin
    assert not Caller("2", "bob@example.org", Role.USER).is_admin
    assert not ANONYMOUS.is_admin
