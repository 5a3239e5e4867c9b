"""Every failure is a problem, and no problem tells too much."""

import errno
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from flask import abort
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from gpt_worker import errors
from gpt_worker.api import access, problems
from gpt_worker.api.schemas import Body
from gpt_worker.errors import FieldError
from gpt_worker.write_gate import DatabaseUnusable
from tests.unit.small_app import SmallApp

MEMBERS = ["type", "title", "status", "detail", "request_id"]


class RaisingApp(SmallApp):
    """`GET /raise` raises `error`."""

    error: Exception

    def failing_with(self, error: Exception) -> Any:
        self.error = error
        return self.client.get("/raise")

    def fail(self) -> str:
        raise self.error


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RaisingApp]:
    app = RaisingApp(tmp_path)
    monkeypatch.setitem(access.POLICIES, "raise", access.Access.PUBLIC)
    app.app.add_url_rule("/raise", "raise", app.fail)
    yield app
    app.close()


def full_disk() -> OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return OperationalError("INSERT INTO users", {"email": "secret"}, error)


def damaged_page() -> DatabaseError:
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return DatabaseError("SELECT id FROM users", {"email": "secret"}, error)


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (errors.NotFound("none"), 404, "urn:gpt-worker:problem:not-found"),
        (errors.Forbidden("no"), 403, "urn:gpt-worker:problem:forbidden"),
        (errors.Conflict("no"), 409, "urn:gpt-worker:problem:conflict"),
        (errors.Invalid(FieldError(("a",), "no")), 422, "urn:gpt-worker:problem:invalid"),
        (errors.TooLarge("no"), 413, "urn:gpt-worker:problem:too-large"),
        (errors.Unauthenticated("who"), 401, "urn:gpt-worker:problem:unauthenticated"),
        (errors.TooMany("no", 1.2), 429, "urn:gpt-worker:problem:too-many"),
        (errors.Unavailable("no", 3), 503, "urn:gpt-worker:problem:unavailable"),
        (errors.DiskLow("no"), 507, "urn:gpt-worker:problem:disk-low"),
        (
            OperationalError("SELECT", {}, sqlite3.OperationalError("locked")),
            503,
            "urn:gpt-worker:problem:unavailable",
        ),
        (full_disk(), 507, "urn:gpt-worker:problem:disk-low"),
        (damaged_page(), 503, "urn:gpt-worker:problem:unavailable"),
        (DatabaseUnusable("it is locked"), 503, "urn:gpt-worker:problem:unavailable"),
        (IntegrityError("INSERT", {}, sqlite3.IntegrityError("twice")), 500, "about:blank"),
        (OSError(errno.ENOSPC, "full"), 507, "urn:gpt-worker:problem:disk-low"),
        (OSError(errno.EACCES, "denied"), 500, "about:blank"),
        (errors.GptWorkerError("unknown"), 500, "about:blank"),
        (RuntimeError("bug"), 500, "about:blank"),
        (RecursionError(), 500, "about:blank"),
    ],
)
def test_error_becomes_its_problem(small: RaisingApp, error: Exception, status: int, name: str) -> None:
    reply = small.failing_with(error)

    assert reply.status_code == status
    assert reply.mimetype == "application/problem+json"
    assert [member for member in reply.json if member != "errors"] == MEMBERS
    assert (reply.json["status"], reply.json["type"]) == (status, name)


def test_problem_is_in_utf_8_like_other_replies(small: RaisingApp) -> None:
    reply = small.failing_with(errors.Invalid(FieldError(("ключ", "\ud800"), "Bearer …")))

    assert "ключ".encode() in reply.data
    assert "Bearer …".encode() in reply.data
    assert reply.json["errors"] == [{"loc": ["ключ", "\ud800"], "msg": "Bearer …"}]


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.TooMany("no", 1.2), "2"),
        (errors.TooMany("no", 0.0), "1"),
        (errors.Unavailable("no", 30), "30"),
    ],
)
def test_retry_after_is_in_whole_seconds_rounded_up(
    small: RaisingApp, error: Exception, seconds: str
) -> None:
    assert small.failing_with(error).headers["Retry-After"] == seconds


def test_401_says_how_to_authenticate(small: RaisingApp) -> None:
    assert small.failing_with(errors.Unauthenticated("who")).headers["WWW-Authenticate"] == "Bearer"


def test_bug_tells_the_log_and_not_the_caller(small: RaisingApp, caplog: pytest.LogCaptureFixture) -> None:
    reply = small.failing_with(RuntimeError("SELECT secret FROM users"))

    assert "secret" not in reply.text
    record = next(record for record in caplog.records if record.name == problems.__name__)
    assert record.exc_info is not None
    assert record.request_id == reply.json["request_id"]  # type: ignore[attr-defined]


def test_trouble_with_the_database_is_one_line_in_the_log(
    small: RaisingApp, caplog: pytest.LogCaptureFixture
) -> None:
    small.failing_with(damaged_page())

    (record,) = [record for record in caplog.records if record.name == problems.__name__]
    assert record.exc_info is None
    assert record.getMessage() == "The database failed: database disk image is malformed"


def test_without_data_dir_a_request_is_refused_and_is_no_bug(small: RaisingApp) -> None:
    shutil.rmtree(small.settings.data_dir)

    assert small.failing_with(FileNotFoundError(errno.ENOENT, "gone")).status_code == 503


def test_database_failure_shows_no_sql(small: RaisingApp) -> None:
    reply = small.failing_with(
        OperationalError("SELECT x", {"a": "secret"}, sqlite3.OperationalError("locked"))
    )

    assert "SELECT" not in reply.text
    assert "secret" not in reply.text


def test_unknown_path_is_a_404_problem_without_a_token(small: RaisingApp) -> None:
    reply = small.client.get("/nowhere")

    assert reply.status_code == 404
    assert list(reply.json) == MEMBERS


def test_wrong_method_is_a_405_problem_that_lists_the_right_ones(small: RaisingApp) -> None:
    reply = small.client.put("/settings")

    assert reply.status_code == 405
    assert list(reply.json) == MEMBERS
    assert {method.strip() for method in reply.headers["Allow"].split(",")} == {"GET", "HEAD", "PATCH"}


@pytest.mark.parametrize("status", [400, 404, 408, 413, 415, 418, 431, 500, 501])
def test_flasks_own_refusals_are_problems(small: RaisingApp, status: int) -> None:
    try:
        abort(status)
    except Exception as error:
        reply = small.failing_with(error)

    assert (reply.status_code, reply.json["status"]) == (status, status)
    assert reply.mimetype == "application/problem+json"


# Request ids


def test_sound_request_id_comes_back(small: RaisingApp) -> None:
    reply = small.client.get("/nowhere", headers={"X-Request-Id": "abc-1.2_3"})

    assert reply.headers["X-Request-Id"] == reply.json["request_id"] == "abc-1.2_3"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "ä", "a<script>"])
def test_other_request_id_is_replaced(small: RaisingApp, given: str | None) -> None:
    reply = small.client.get("/nowhere", headers={} if given is None else {"X-Request-Id": given})

    made = reply.headers["X-Request-Id"]
    assert made == reply.json["request_id"]
    assert made != given
    assert problems.REQUEST_ID.fullmatch(made)


def test_good_reply_has_a_request_id_too(small: RaisingApp) -> None:
    token = small.register()

    assert small.request("GET", "/me", token).headers["X-Request-Id"]


# Validation


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Strict(Body):
    count: int = Field(ge=1)
    word: Literal["inline", "webhook"] = "inline"
    text: str = Field("x", max_length=3, pattern="^x")
    pet: Cat | Dog | None = Field(None, discriminator="kind")


def validated(small: SmallApp, values: Any) -> Any:
    with pytest.raises(ValidationError) as caught:
        Strict.model_validate(values)
    with small.app.test_request_context():
        reply = problems.validation_problem(caught.value)
    assert reply.status_code == 422
    return reply.json


@pytest.mark.parametrize(
    ("values", "loc"),
    [
        ({}, ["count"]),
        ({"count": "1"}, ["count"]),
        ({"count": 1.0}, ["count"]),
        ({"count": True}, ["count"]),
        ({"count": None}, ["count"]),
        ({"count": 0}, ["count"]),
        ({"count": 1, "word": "other"}, ["word"]),
        ({"count": 1, "pet": {"kind": "cow"}}, ["pet"]),
        ({"count": 1, "unknown_member": 1}, ["unknown_member"]),
    ],
)
def test_bad_input_is_located(small: RaisingApp, values: Any, loc: list[str]) -> None:
    body = validated(small, values)

    assert [error["loc"] for error in body["errors"]] == [loc]
    assert body["detail"].startswith(".".join(loc))


@pytest.mark.parametrize(
    "values",
    [
        {"count": "sesame"},
        {"count": 1, "word": "sesame"},
        {"count": 1, "text": "sesame"},
        {"count": 1, "pet": {"kind": "sesame"}},
        {"count": 1, "pet": "sesame"},
        {"count": 1, "unknown": {"sesame": "sesame"}},
        "sesame",
    ],
)
def test_validation_never_repeats_a_value(small: RaisingApp, values: Any) -> None:
    assert "sesame" not in json.dumps(validated(small, values))


def test_thousand_mistakes_and_long_names_make_a_short_problem(small: RaisingApp) -> None:
    body = validated(small, {f"{number}{'x' * 10_000}": 1 for number in range(1000)})

    assert len(body["errors"]) == problems.MAX_ERRORS
    assert len(json.dumps(body)) < 50_000


def test_escaped_validation_error_is_a_422(small: RaisingApp) -> None:
    def error_of(make: Callable[[], object]) -> Exception:
        with pytest.raises(ValidationError) as caught:
            make()
        return caught.value

    reply = small.failing_with(error_of(lambda: Strict.model_validate({})))

    assert reply.status_code == 422
