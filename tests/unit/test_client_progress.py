"""How a job's progress is read, measured and shown."""

import io
from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from gpt_worker.client import job_commands
from gpt_worker.client.credentials import Credentials
from gpt_worker.client.errors import Broken, ClientError, NotLoggedIn
from gpt_worker.client.following import Progress, RateMeter, is_over, read_events, read_progress
from gpt_worker.client.progress import (
    CLEAR_LINE,
    KeyWatch,
    LiveBar,
    PlainLines,
    count_resting,
    render_bar,
    render_duration,
    render_plain,
)
from gpt_worker.client.server import Server
from gpt_worker.client.tables import render_cancelled, render_job, render_jobs, render_keys, render_table
from tests.clock import FakeClock

HALF = Progress("running", 20, 9, 1, 3.42, 2.9)
JOB: dict[str, Any] = {
    "id": "01a2",
    "status": "running",
    "run": 1,
    "model": "gpt\x1b[2J",
    "metadata": {"batch": "42"},
    "waiting": {"reason": "no usable key", "until": "2026-01-31T12:00:00.000Z"},
    "counts": {"total": 3, "answered": 1, "failed": 0, "pending": 2},
    "usage": {"requests": 1, "prompt_tokens": 5, "completion_tokens": 7},
    "created_at": "2026-01-31T11:59:00.000Z",
    "finished_at": None,
}
KEY: dict[str, Any] = {"name": "key 0", "tail": "abcd", "state": "resting", "in_flight": 3, "threads": 8}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (4.6, "0:05"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (172_799, "47:59:59"),
        (400_000, "4 days"),
    ],
)
def test_duration_is_short(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (HALF, "9/20 answered, 1 failed, 3.4 tasks/s, ETA 0:03"),
        (Progress("queued", 20, 0, 0), "queued, 0/20 answered, 0 failed"),
        (Progress("succeeded", 20, 20, 0, 4.0, 0.0), "20/20 answered, 0 failed, 4.0 tasks/s"),
        (Progress("cancelled", 20, 5, 15), "cancelled, 5/20 answered, 15 failed"),
    ],
)
def test_line_tells_what_is_known(progress: Progress, text: str) -> None:
    assert render_plain(progress) == text


def test_keys_that_rest_are_counted_by_state() -> None:
    states = ["ready", "resting", "refused", "resting"]

    resting = count_resting([{"state": state} for state in states])

    assert resting == {"refused": 1, "resting": 2}
    assert render_plain(HALF, resting).endswith(", 1 key refused, 2 keys resting")


class FakeServer(Server):
    """Has one key that rests, or an error to raise; counts the looks."""

    def __init__(self, error: ClientError | None = None) -> None:
        super().__init__(Credentials("http://a.example"))
        self.looks = 0
        self._error = error

    def listed(
        self, path: str, params: Mapping[str, str] | None = None, timeout_s: float = 0.0
    ) -> list[dict[str, Any]]:
        self.looks += 1
        if self._error:
            raise self._error
        return [KEY]


@pytest.mark.parametrize(
    ("error", "seen", "looks"),
    [(None, {"resting": 1}, 2), (Broken("down"), {}, 2), (NotLoggedIn("not allowed"), {}, 1)],
)
def test_keys_are_looked_at_now_and_then_and_never_again_where_that_is_not_allowed(
    error: ClientError | None, seen: dict[str, int], looks: int
) -> None:
    server, clock = FakeServer(error), FakeClock()
    keys = KeyWatch(server, clock)

    found = [keys.resting(), keys.resting()]
    clock.advance(5.0)
    found.append(keys.resting())

    assert found == [seen] * 3
    assert server.looks == looks


def test_bar_never_wraps() -> None:
    assert all(len(render_bar(HALF, {"resting": 1}, columns)) < columns for columns in range(1, 200))


def test_bar_grows() -> None:
    def bar(answered: int) -> str:
        return render_bar(Progress("running", 4, answered, 0), {}, 60).split("] ")[0]

    assert [bar(answered).count("=") for answered in range(5)] == [0, 6, 12, 18, 24]
    assert ">" not in bar(4)


def test_live_bar_draws_one_line_and_notes_stay() -> None:
    stream = io.StringIO()

    with LiveBar(stream, dict) as bar:
        bar.show(HALF)
        bar.note("kept")

    drawn, noted, end = stream.getvalue().split(CLEAR_LINE)[1:]
    assert "9/20 answered" in drawn
    assert "\n" not in drawn
    assert (noted, end) == ("kept\n", "")


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    stream, clock = io.StringIO(), FakeClock()
    lines = PlainLines(stream, clock)

    for answered in range(11):
        lines.show(Progress("running", 10, answered, 0))
        lines.show(Progress("running", 10, answered, 0))
        clock.advance(1.0)

    assert stream.getvalue().splitlines() == [f"{n}/10 answered, 0 failed" for n in (0, 5, 10)]


@pytest.mark.parametrize("value", [{}, {"counts": None}, {"counts": []}])
def test_what_has_no_counts_is_no_progress(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no counts"):
        read_progress(value)


def test_progress_is_read_from_a_job_and_from_an_event() -> None:
    assert read_progress(JOB) == Progress("running", 3, 1, 0)
    assert read_progress({**JOB, "tasks_per_s": 2, "eta_s": None}) == Progress("running", 3, 1, 0, 2.0, None)


def test_cancelled_job_is_over_when_its_last_call_has_landed() -> None:
    assert not is_over({"status": "running", "finished_at": None})
    assert not is_over({"status": "cancelled", "finished_at": None})
    assert is_over({"status": "cancelled", "finished_at": "2026-01-31T12:00:00.000Z"})


def test_rate_is_measured_between_looks() -> None:
    meter = RateMeter()

    first = meter.measure(Progress("running", 100, 10, 0), 50.0)
    second = meter.measure(Progress("running", 100, 18, 2), 55.0)

    assert (first.tasks_per_s, first.eta_s) == (None, None)
    assert (second.tasks_per_s, second.eta_s) == (2.0, 40.0)


def test_rate_starts_anew_with_another_run() -> None:
    meter = RateMeter()
    meter.measure(Progress("partial", 100, 90, 10), 0.0)

    meter.measure(Progress("running", 100, 90, 0), 10.0)
    seen = meter.measure(Progress("running", 100, 91, 0), 11.0)

    assert seen.tasks_per_s == 1.0


def test_events_are_read_as_the_standard_says() -> None:
    lines = [
        ": a heartbeat",
        "",
        "retry: 2000",
        "event: progress",
        'data: {"a": 1}',
        "",
        "data:no name",
        "data",
        "data:  two spaces",
        "id: 7",
        "",
        "event: empty",
        "",
        "event: finished",
        "data: {}",
        "",
        "event: cut off",
        "data: {}",
    ]

    assert list(read_events(iter(lines))) == [
        ("progress", '{"a": 1}'),
        ("message", "no name\n\n two spaces"),
        ("finished", "{}"),
    ]


def test_tables_have_columns() -> None:
    assert render_table(("A", "LONG"), [("aaa", "1"), ("b", "")]) == "A    LONG\naaa  1\nb"


def test_jobs_and_keys_take_a_line_each() -> None:
    jobs, keys = render_jobs([JOB]).splitlines(), render_keys([KEY]).splitlines()

    assert jobs[1].split("  ")[:2] == ["01a2", "running"]
    assert "1/3" in jobs[1]
    assert "2026-01-31 11:59:00" in jobs[1]
    assert ("3/8" in keys[1], "resting" in keys[1]) == (True, True)
    assert [len(render_jobs([]).splitlines()), len(render_keys([]).splitlines())] == [1, 1]


@pytest.mark.parametrize(
    ("args", "embedded", "tail"),
    [([], False, "key 0  abcd "), ([], True, "key 0  embedded "), (["--json"], True, '"tail": "abcd"')],
)
def test_keys_of_the_embedded_model_are_called_so_in_the_table(
    monkeypatch: pytest.MonkeyPatch, args: list[str], embedded: bool, tail: str
) -> None:
    class Asked(Server):
        def listed(self, *_: object, **__: object) -> list[dict[str, Any]]:
            return [KEY]

        def ask(self, method: str, path: str, **_: object) -> dict[str, Any]:
            return {("GET", "/healthz"): {"embedded": embedded}}[method, path]

    monkeypatch.setattr(job_commands, "server_in_use", lambda: Asked(Credentials("http://a.example")))

    assert tail in CliRunner().invoke(job_commands.keys, args).output


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (
            {"counts": {"total": 20, "answered": 2, "failed": 14}},
            "2/20 answered so far, and up to 4 more are in flight",
        ),
        ({"counts": {"total": 20, "answered": 2, "failed": 18}}, "2/20 answered so far"),
        (
            {"counts": {"total": 20, "answered": 2, "failed": 18}, "finished_at": "2026-01-31T12:00:00.000Z"},
            "2/20 answered, 18 failed",
        ),
    ],
)
def test_cancelled_job_tells_what_may_still_land(job: dict[str, Any], text: str) -> None:
    assert render_cancelled({**JOB, **job, "status": "cancelled"}) == f"Job 01a2 is cancelled: {text}."


def test_job_is_told_in_lines_that_move_no_cursor() -> None:
    told = render_job(JOB)

    assert "\x1b" not in told
    assert "waiting   no usable key, until 2026-01-31 12:00:00" in told.splitlines()
    assert "usage     1 requests, 5 prompt tokens, 7 completion tokens" in told.splitlines()
    assert not any(line.startswith("finished") for line in told.splitlines())
