"""What the scenarios of many tasks and many jobs make of what they saw, and the yardstick that one is held against."""

from pathlib import Path
from typing import Any

import pytest

from bench.bare import bare_insert_s
from bench.scenarios import crowd, databases, million
from bench.watch import Sample, Usage

PACE = {"tasks_per_s": 900.0, "cpu_ms": 1.0}


def sample(at_s: float, answered: int, cpu_s: float = 0.0) -> Sample:
    return Sample(at_s, Usage(1, cpu_s, 1), answered)


def run_of_a_million(**fields: Any) -> dict[str, Any]:
    given = {
        "tasks": 1_000_000,
        "peak_rss_bytes": 200_000_000,
        "bare_s": 4.0,
        "submit_s": 8.0,
        "alone_s": [0.1] * 20,
        "beside_submit_s": [0.2] * 20,
        "beside_run_s": [0.2] * 20,
        "first_tenth": {"tasks_per_s": 2000.0, "cpu_ms": 0.3},
        "last_tenth": {"tasks_per_s": 1900.0, "cpu_ms": 0.3},
        "restart_s": 3.0,
        "ready_to_call_s": 0.5,
        "lost_or_wrong": 0,
        "results_s": 10.0,
        "results_more_bytes": 5_000_000,
        "database_bytes": 300_000_000,
    }
    return given | fields


def missed(**fields: Any) -> list[str]:
    return [row.what for row in million.rows([run_of_a_million(**fields)]) if row.reached is False]


def test_good_run_of_a_million_misses_nothing() -> None:
    assert missed() == []


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"peak_rss_bytes": 251_000_000}, "memory at most"),
        ({"submit_s": 10.1}, "submit ÷ of a bare"),
        ({"beside_submit_s": [0.2] * 18 + [0.31] * 2}, "beside the submit"),
        ({"last_tenth": {"tasks_per_s": 1799.0, "cpu_ms": 0.3}}, "at the end ÷ at the start"),
        ({"last_tenth": None}, "at the end ÷ at the start"),
        ({"restart_s": 5.1}, "from the start to the first call"),
        ({"restart_s": None}, "from the start to the first call"),
        ({"results_more_bytes": 21_000_000}, "while its results are read"),
        ({"lost_or_wrong": 1}, "lost or wrong"),
    ],
)
def test_what_a_million_tasks_miss_is_said(fields: dict[str, Any], what: str) -> None:
    [row] = missed(**fields)

    assert what in row


def test_pace_is_that_between_two_shares_of_the_work() -> None:
    samples = [sample(0.0, 0), sample(1.0, 100, 1.0), sample(3.0, 500, 2.0), sample(9.0, 1000, 9.0)]

    assert million.pace(samples, 1000, 0.1, 0.5) == {"tasks_per_s": 200.0, "cpu_ms": 2.5}
    assert million.pace(samples, 1000, 0.2, 0.4) == {"tasks_per_s": 200.0, "cpu_ms": 2.5}
    assert million.pace(samples[:3], 1000, 0.2, 0.9) is None


def submits(per_s: float) -> dict[str, float]:
    return {"jobs_per_s": per_s, "cpu_ms": 2.0}


def run_of_a_crowd(**fields: Any) -> dict[str, Any]:
    given = {
        "jobs": 10_000,
        "lists_s": {"own": [0.01] * 20, "everyone's": [0.03] * 20},
        "queued_list_s": [0.02] * 20,
        "submits": [submits(200.0), submits(190.0)],
        "paces": [PACE, PACE],
        "peak_rss_bytes": 150_000_000,
    }
    return given | fields


@pytest.mark.parametrize(
    ("fields", "reached"),
    [
        ({}, [True, True, True]),
        ({"lists_s": {"own": [0.01] * 20, "everyone's": [0.06] * 20}}, [False, True, True]),
        ({"submits": [submits(200.0), submits(170.0)]}, [True, False, True]),
        ({"paces": [{"tasks_per_s": 800.0, "cpu_ms": 1.0}, PACE]}, [True, True, False]),
        ({"paces": [None, None]}, [True, True, False]),
    ],
)
def test_crowd_is_judged_by_its_lists_and_by_how_it_grows(
    fields: dict[str, Any], reached: list[bool]
) -> None:
    rows = crowd.rows([run_of_a_crowd(**fields)])

    assert [row.reached for row in rows if row.reached is not None] == reached


def test_databases_are_skipped_in_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(databases.URLS, raising=False)

    [row] = databases.rows([databases.run(1.0)])

    assert (row.reached, row.ours) == (None, "skipped: BENCH_DATABASE_URLS names no database")


@pytest.mark.parametrize(("theirs", "reached"), [(700.0, True), (690.0, False)])
def test_databases_are_held_against_sqlite(theirs: float, reached: bool) -> None:
    def figures(per_s: float) -> dict[str, Any]:
        return {"tasks_per_s": per_s, "submit_per_s": 9_000.0, "lost_or_wrong": 0}

    [row] = databases.rows([{"databases": {"sqlite": figures(1000.0), "postgresql": figures(theirs)}}])

    assert row.reached is reached


def test_database_that_does_not_serve_is_a_missed_row() -> None:
    found = {"sqlite": {"tasks_per_s": 1.0, "lost_or_wrong": 0}, "mysql": {"failure": "no route"}}

    [row] = databases.rows([{"databases": found}])

    assert (row.ours, row.reached) == ("failed: no route", False)


def test_bare_insert_is_measured_on_the_tables_as_they_are(tmp_path: Path) -> None:
    tasks = [(f"task-{place}", '"text"') for place in range(100)]

    assert bare_insert_s(tasks, tmp_path) > 0.0
    assert list(tmp_path.iterdir()) == []
