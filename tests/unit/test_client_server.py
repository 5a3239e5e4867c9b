"""What the client makes of a server's refusals, when it tries again, and how it ends."""

import json
from typing import Any

import pytest
import requests

from gpt_worker.client.errors import (
    Broken,
    Busy,
    ClientError,
    ExitStatus,
    Passing,
    status_of_job,
)
from gpt_worker.client.patience import next_wait_s
from gpt_worker.client.server import job_path, refusal

URL = "http://a.example"


def reply(status: int, detail: str | None = "Because.", **headers: str) -> requests.Response:
    """A problem, or without `detail` a page of HTML."""
    made = requests.Response()
    made.status_code = status
    made.headers["Content-Type"] = "text/html" if detail is None else "application/problem+json"
    made.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    made._content = b"<html>" if detail is None else json.dumps({"detail": detail}).encode()
    return made


def refused(made: requests.Response, *, has_token: bool = True) -> ClientError:
    return refusal(URL, made, has_token=has_token)


@pytest.mark.parametrize(
    ("status", "exit_status", "sentence"),
    [
        (400, 2, "refuses this (400): Because."),
        (401, 5, "the token is refused: Because. Log in with: gpt-worker login http://a.example"),
        (403, 5, "not allowed: Because."),
        (404, 2, "not found: Because."),
        (409, 2, "Because."),
        (413, 2, "refuses this (413): Because."),
        (415, 2, "refuses this (415): Because."),
        (422, 2, "refuses this (422): Because."),
        (429, 6, "refused for now: Because."),
        (500, 6, "the server failed (500): Because."),
        (503, 6, "the server is busy: Because."),
        (507, 6, "the server failed (507): Because."),
    ],
)
def test_refusal_ends_in_a_sentence_and_a_status(status: int, exit_status: int, sentence: str) -> None:
    error = refused(reply(status))

    assert error.status == exit_status
    assert sentence in str(error)


def test_server_that_wants_a_token_tells_how_to_get_one() -> None:
    assert str(refused(reply(401), has_token=False)) == (
        "http://a.example wants a token. Log in with: gpt-worker login http://a.example"
    )


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_page_that_is_no_problem_comes_from_a_stranger(status: int) -> None:
    error = refused(reply(status, None))

    assert error.status == ExitStatus.UNREACHABLE
    assert "does not answer like a gpt-worker" in str(error)


def test_redirect_names_the_place_to_log_in() -> None:
    error = refused(reply(308, None, Location="https://a.example/"))

    assert error.status == ExitStatus.UNREACHABLE
    assert "redirects to https://a.example/" in str(error)


@pytest.mark.parametrize(("status", "kind"), [(429, Busy), (502, Broken), (503, Busy), (504, Broken)])
def test_what_a_proxy_or_a_busy_server_says_may_pass(status: int, kind: type[Passing]) -> None:
    assert isinstance(refused(reply(status, None)), kind)


@pytest.mark.parametrize(
    ("header", "retry_after_s"),
    [({}, None), ({"Retry_After": "7"}, 7), ({"Retry_After": "Sun, 06 Nov"}, None)],
)
def test_retry_after_is_heeded_in_seconds(header: Any, retry_after_s: float | None) -> None:
    error = refused(reply(503, **header))

    assert isinstance(error, Busy)
    assert error.retry_after_s == retry_after_s


def test_limit_of_a_user_is_told_with_the_wait() -> None:
    error = refused(reply(429, "there are 1000 unfinished jobs of yours", Retry_After="30"))

    assert isinstance(error, Busy)
    assert str(error) == "refused for the next 30 s: there are 1000 unfinished jobs of yours"
    assert error.retry_after_s == 30


def test_sentence_of_a_server_moves_no_cursor() -> None:
    assert "\x1b" not in str(refused(reply(422, "evil \x1b[2J\nline")))


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "a?b", "ä", "a b", "x" * 101])
def test_what_can_not_be_an_id_never_reaches_the_server(job_id: str) -> None:
    with pytest.raises(ClientError, match="not the id of a job"):
        job_path(job_id)


@pytest.mark.parametrize(
    ("attempt", "retry_after_s", "jitter", "wait_s"),
    [
        (1, None, 0.0, 0.25),
        (2, None, 0.0, 0.5),
        (4, None, 0.0, 2.0),
        (9999, None, 0.0, 2.0),
        (9999, None, 0.999, 3.998),
        (1, 3.0, 0.5, 3.0),
        (1, 0.0, 0.5, 0.1),
        (1, 9999.0, 0.5, 60.0),
    ],
)
def test_backoff_doubles_unless_the_server_says_when(
    attempt: int, retry_after_s: float | None, jitter: float, wait_s: float
) -> None:
    assert next_wait_s(Passing("x", retry_after_s), attempt, 0.0, 100.0, jitter) == pytest.approx(wait_s)


def test_patience_ends() -> None:
    error = Passing("x", 5.0)

    assert next_wait_s(error, 1, 95.0, 100.0, 0.0) == 5.0
    assert next_wait_s(error, 1, 95.1, 100.0, 0.0) is None


@pytest.mark.parametrize(
    ("status", "code"), [("succeeded", 0), ("partial", 3), ("failed", 1), ("cancelled", 1)]
)
def test_status_of_a_job_is_the_exit_status(status: str, code: int) -> None:
    assert status_of_job(status) == code
