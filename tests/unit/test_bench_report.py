"""The table, from results that are made up: what is reached, what is missed, and who failed."""

from typing import Any

import pytest

from bench import contestants
from bench.ours import NAME
from bench.report import Row, document, judged, table
from bench.scenarios import SCENARIOS, fairness, faults, growth, limits, overhead, packing
from bench.work import Measured, count_lost_and_wrong, expected_answer

SDK = contestants.OPENAI_THREADS.name


def result(contestant: str, **fields: Any) -> dict[str, Any]:
    given = {"tasks": 1000, "wall_s": 10.0, "cpu_s": 5.0, "peak_rss_bytes": 100_000_000, **fields}
    return Measured(contestant=contestant, **given).to_json()


def failed(contestant: str) -> dict[str, Any]:
    return Measured(contestant=contestant, failure="crashed: no luck").to_json()


def test_table_marks_what_is_missed() -> None:
    rows = [
        judged("speed", "≥ 3", "3.2", [True]),
        judged("lost", "0", "1", [True, False]),
        Row("memory", "–", "9 MB", "SDK 8 MB"),
    ]

    assert table(rows).splitlines() == [
        "| | wanted | ours | reached | peers |",
        "|---|---|---|---|---|",
        "| speed | ≥ 3 | 3.2 | yes | – |",
        "| lost | 0 | 1 | **no** | – |",
        "| memory | – | 9 MB | – | SDK 8 MB |",
    ]


def test_text_of_a_failure_does_not_break_the_table() -> None:
    row = Row("speed", "≥ 3", "failed: a | b\nc")

    assert table([row]).splitlines()[-1] == "| speed | ≥ 3 | failed: a \\| b c | – | – |"


def test_document_says_what_it_was_measured_on() -> None:
    page = document([], {"CPU": "two cores", "runs": "3"})

    assert "Measured on: CPU two cores; runs 3." in page


def test_overhead_compares_within_a_run_and_takes_the_median() -> None:
    walls = [(2.0, 8.0), (2.0, 6.0), (5.0, 10.0)]
    repetitions = [{"results": [result(NAME, wall_s=ours), result(SDK, wall_s=sdk)]} for ours, sdk in walls]

    speed, lost, *_ = overhead.rows(repetitions)

    assert (speed.ours, speed.reached) == ("3 (2–4)", True)
    assert (lost.ours, lost.reached) == ("0", True)


def test_peer_that_failed_is_told_and_spoils_nothing() -> None:
    router = contestants.ROUTER.name
    repetitions = [{"results": [result(NAME, wall_s=2.0), result(SDK), failed(router)]}]

    speed = overhead.rows(repetitions)[0]

    assert speed.reached
    assert f"{router} failed: crashed: no luck" in speed.peers


@pytest.mark.parametrize(("scenario", "base"), [(overhead, SDK), (limits, SDK), (faults, SDK)])
def test_our_own_failure_is_a_missed_row(scenario: Any, base: str) -> None:
    repetitions = [{"ideal_s": 5.0, "results": [failed(NAME), result(base, extra={"most_in_flight": 9})]}]

    rows = scenario.rows(repetitions)

    assert [(row.ours, row.reached) for row in rows] == [("failed: crashed: no luck", False)]


def test_limits_are_judged_by_share_refusals_and_losses() -> None:
    repetitions = [
        {
            "ideal_s": 40.0,
            "results": [result(NAME, wall_s=wall_s, rate_limited=2), result(SDK, rate_limited=900)],
        }
        for wall_s in (40.4, 40.8, 50.0)
    ]

    share, refusals = limits.rows(repetitions)

    assert (share.ours, share.reached) == ("98 % (80–99)", True)
    assert (refusals.ours, refusals.reached) == ("2; 0", True)
    assert "900, 0 lost" in refusals.peers


def test_one_lost_task_in_one_run_misses_the_row() -> None:
    repetitions = [{"ideal_s": 40.0, "results": [result(NAME, wall_s=40.0, lost=lost)]} for lost in (0, 0, 1)]

    assert [row.reached for row in limits.rows(repetitions)] == [True, False]


def test_tasks_of_limits_have_the_tokens_that_the_ideal_counts_with() -> None:
    assert {len(limits.text(number)) for number in (0, 99, 100_000)} == {4 * limits.TASK_TOKENS}


def test_faults_count_what_the_dead_keys_cost() -> None:
    ours = result(
        NAME,
        wall_s=12.0,
        calls_by_key={faults.REFUSED_KEY: 2, faults.EXHAUSTED_KEY: 230},
        codes_by_key={faults.EXHAUSTED_KEY: {"insufficient_quota": 11}},
        extra={"most_in_flight": 100},
    )

    wall, dead_keys, _ = faults.rows([{"ideal_s": 8.0, "results": [ours]}])

    assert (wall.ours, wall.reached) == ("0; 1.5", True)
    assert (dead_keys.ours, dead_keys.reached) == ("2; 11", False)


def test_packing_that_is_not_supported_yet_is_said_plainly() -> None:
    (row,) = packing.rows([{"unsupported": "422 …", "results": []}])

    assert (row.ours, row.reached) == ("not supported yet", False)


def test_packing_is_judged_by_requests_and_tokens() -> None:
    packed = result(packing.PACKED, wall_s=2.0, calls_by_key={"a": 50}, prompt_tokens=20_000)
    single = result(NAME, wall_s=20.0, calls_by_key={"a": 400, "b": 600}, prompt_tokens=100_000)

    row, *_ = packing.rows([{"unsupported": None, "results": [packed, single]}])

    assert (row.ours, row.reached) == ("0.05; 0.2", True)


def test_fairness_is_the_ratio_of_the_slow_ones() -> None:
    row, medians = fairness.rows([{"alone_s": [0.3] * 20, "beside_s": [0.3] * 18 + [1.2] * 2}])

    assert (row.reached, row.ours) == (False, "4 (of 20 jobs or more)")
    assert medians.ours == "1"


def test_fairness_without_a_sample_is_missed() -> None:
    (row,) = fairness.rows([{"alone_s": [0.3], "beside_s": []}])

    assert row.reached is False


def test_growth_is_what_the_largest_takes_more_than_the_smallest() -> None:
    sizes = [
        {"tasks": tasks, "peak_rss_bytes": peak, "wall_s": wall_s, "database_bytes": 9, "lost_or_wrong": 0}
        for tasks, peak, wall_s in ((1_000, 100_000_000, 1.0), (100_000, 150_000_000, 110.0))
    ]

    memory, lost, time, _ = growth.rows([{"sizes": sizes}])

    assert (memory.ours, memory.reached) == ("50 MB more, 150 MB at most", True)
    assert lost.reached
    assert time.ours == "1.1 times"


def test_answers_are_checked_one_by_one() -> None:
    tasks = {"a": "one", "b": "two", "c": "three", "d": "four"}
    answers = {"a": expected_answer("one"), "b": expected_answer("three"), "c": None}

    assert count_lost_and_wrong(tasks, answers) == (2, 1)


def test_scenarios_have_the_names_that_the_command_takes() -> None:
    names = [scenario.name for scenario in SCENARIOS]

    assert names == [
        "overhead",
        "limits",
        "faults",
        "fairness",
        "packing",
        "growth",
        "edges",
        "million",
        "crowd",
        "databases",
    ]
