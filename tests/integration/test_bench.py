"""The scenarios that only run where they are named, as small as they can be."""

from bench.scenarios import crowd, million


def test_a_million_tasks_in_small_go_through_every_phase() -> None:
    found = million.run(0.0)

    rows = {row.what: row for row in million.rows([found])}
    assert rows["million: tasks lost or wrong"].reached
    assert rows["million: memory at most, 2,000 tasks"].reached
    assert found["status"] == "succeeded"


def test_a_crowd_in_small_comes_in_and_goes_out() -> None:
    found = crowd.run(0.0)

    assert found["jobs"] == 50
    assert all(submits["jobs_per_s"] > 0.0 for submits in found["submits"])
    assert crowd.rows([found])
