"""The scanner of what services write: it finds what is planted, and only where that must not be."""

import base64
import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.canaries import Canaries, Leak, Watch, find_leaks
from tests.service import APP_KEY, Service

SECRET = 'sk-canary/+9f3 ä"7Kq2Wb'
PROMPT = "a canary that must not sing\nanywhere, not even in ö"
LOG = "service.log"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What a service leaves behind: its log, its data and in that its database."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (tmp_path / LOG).write_text("12:00:00.000 INFO gpt_worker.service: The service is ready.\n")
    with closing(sqlite3.connect(data_dir / "gpt-worker.sqlite3")) as database:
        database.executescript(
            """
            PRAGMA journal_mode=WAL;
            CREATE TABLE tasks (id, prompt, answer);
            CREATE TABLE deliveries (id, body);
            CREATE TABLE jobs (id, settings, meta);
            CREATE TABLE idempotency_keys (key_hash);
            """
        )
    return tmp_path


def scan(place: Path) -> list[Leak]:
    canaries = Canaries()
    canaries.add_secret(SECRET, "GPT_KEY_0")
    canaries.add_texts({"a": PROMPT, "b": {"messages": [{"role": "user", "content": "short"}]}}, "a prompt")
    return find_leaks(canaries, place / "data", [place / LOG])


def write(place: Path, statement: str, value: object) -> None:
    with closing(sqlite3.connect(place / "data" / "gpt-worker.sqlite3")) as database:
        database.execute(statement, (value,))
        database.commit()


def test_an_answer_belongs_in_a_result_file_and_a_secret_does_not(place: Path) -> None:
    folder = place / "data" / "drive" / "jobs"
    folder.mkdir(parents=True)
    (folder / "results-1.jsonl.gz").write_bytes(gzip.compress(f"{PROMPT}".encode()))
    assert scan(place) == []

    (folder / "results-2.jsonl.gz").write_bytes(gzip.compress(f"{PROMPT} {SECRET}".encode()))

    assert scan(place) == [Leak("GPT_KEY_0", "results-2.jsonl.gz")]


def test_nothing_is_found_where_nothing_is(place: Path) -> None:
    assert scan(place) == []


@pytest.mark.parametrize(
    "spelled",
    [
        SECRET,
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        quote(SECRET, safe=""),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(b"user:" + SECRET.encode()).decode(),
        base64.b64encode(b"1" + SECRET.encode() + b"2").decode(),
    ],
)
def test_secret_is_found_in_a_log_however_it_is_spelled(place: Path, spelled: str) -> None:
    with (place / LOG).open("a") as log:
        log.write(f"12:00:01.000 ERROR urllib3: Invalid header value {spelled}\n")

    assert scan(place) == [Leak("GPT_KEY_0", LOG)]


def test_prompt_is_found_in_a_log(place: Path) -> None:
    (place / LOG).write_text(json.dumps({"message": "A task failed.", "prompt": PROMPT}))

    assert scan(place) == [Leak("a prompt", LOG)]


def test_secret_is_found_in_any_file(place: Path) -> None:
    (place / "data" / "drive").mkdir()
    (place / "data" / "drive" / "part").write_bytes(b"\0\1" + SECRET.encode() + b"\2")

    assert scan(place) == [Leak("GPT_KEY_0", "part")]


def test_secret_is_found_in_the_database_wherever_it_stands(place: Path) -> None:
    write(place, "INSERT INTO tasks (answer) VALUES (?)", SECRET)

    assert Leak("GPT_KEY_0", "gpt-worker.sqlite3") in scan(place)


def test_secret_is_found_in_the_log_of_a_database_that_was_killed(place: Path) -> None:
    (place / "data" / "gpt-worker.sqlite3-wal").write_bytes(b"\0" * 100 + SECRET.encode())

    assert Leak("GPT_KEY_0", "gpt-worker.sqlite3-wal") in scan(place)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO tasks (prompt) VALUES (?)",
        "INSERT INTO tasks (answer) VALUES (?)",
        "INSERT INTO deliveries (body) VALUES (?)",
        "INSERT INTO jobs (settings) VALUES (?)",
    ],
)
def test_prompt_may_stand_in_its_tables(place: Path, statement: str) -> None:
    write(place, statement, PROMPT)

    assert scan(place) == []


@pytest.mark.parametrize(("table", "column"), [("jobs", "meta"), ("idempotency_keys", "key_hash")])
def test_prompt_is_found_in_tables_that_are_not_its_own(place: Path, table: str, column: str) -> None:
    write(place, f'INSERT INTO "{table}" ("{column}") VALUES (?)', PROMPT)

    assert scan(place) == [Leak("a prompt", f"{table}.{column}")]


def test_prompt_is_found_in_a_file_that_was_to_be_gone(place: Path) -> None:
    (place / "data" / "tmp4x7").write_text(PROMPT)

    assert scan(place) == [Leak("a prompt", "tmp4x7")]


@pytest.mark.parametrize("name", ["app-key", "setup-token"])
def test_secret_that_a_file_is_for_may_stand_there_alone(place: Path, name: str) -> None:
    (place / "data" / name).write_text("a-secret-that-the-service-made\n")
    assert scan(place) == []

    (place / LOG).write_text("the file says a-secret-that-the-service-made")

    assert [leak.where for leak in scan(place)] == [LOG]


def test_damaged_database_is_looked_through_as_a_file(place: Path) -> None:
    (place / "data" / "gpt-worker.sqlite3").write_bytes(b"SQLite format 3\0" + SECRET.encode())

    assert scan(place) == [Leak("GPT_KEY_0", "gpt-worker.sqlite3")]


# What is learned of services as they run


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


def answer_with(monkeypatch: pytest.MonkeyPatch, status: int, body: Any) -> None:
    reply = requests.Response()
    reply.status_code = status
    reply.headers["Content-Type"] = "application/json"
    reply._content = json.dumps(body).encode()
    monkeypatch.setattr(requests.Session, "request", lambda *_arguments, **_options: reply)


def test_watch_learns_passwords_tokens_prompts_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, 200, {"token": {"token": "head.body.signature-1"}, "results": {"a": "w" * 20}})

    with Watch() as watch:
        service = Service(tmp_path)
        service.post("/login", json={"email": "a@b.de", "password": "a-good-password"})
        service.submit({"a": PROMPT}, {"instructions": "i" * 20}, token=None)

    assert watch.of(service).secrets == {"a-good-password": "a password", "signature-1": "a token"}
    assert watch.of(service).texts == {PROMPT: "a prompt", "i" * 20: "a prompt", "w" * 20: "an answer"}


@pytest.mark.parametrize(("status", "found"), [(422, ["a prompt"]), (200, [])])
def test_watch_finds_a_prompt_that_an_error_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch, status: int, found: list[str]
) -> None:
    answer_with(monkeypatch, status, {"detail": PROMPT})
    service = Service(tmp_path)

    service.submit({"a": PROMPT}, token=None)

    assert [leak.what for leak in watch.find_leaks()] == found


def test_watch_looks_for_the_settings_of_every_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    service = Service(tmp_path, {"GPT_KEY_0": "sk-the-first-key"})
    monkeypatch.setattr("tests.service._COMMAND", ["sh", "-c", "echo $APP_KEY $GPT_KEY_0"])

    service.launch()
    service.wait_exit()

    assert {leak.what for leak in watch.find_leaks()} == {"APP_KEY", "GPT_KEY_0"}
    assert APP_KEY in watch.of(service).secrets
    assert watch.logs_written == 1
