"""What must not be found in what services write: secrets anywhere, prompts and answers outside of their tables.

`Watch` sees every service of the integration tests and the requests of their client, and so learns which secrets and
texts there are; `find_leaks` looks for those of one service in its files. A text as short as "hello" stands anywhere
by chance and is not looked for.
"""

import base64
import gzip
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
import requests

from config import derive
from tests.service import Env, Service

MIN_SECRET_LENGTH = 10
MIN_TEXT_LENGTH = 16
MAX_TEXT_LENGTH = 1000  # by its beginning one of several MiB is known as well, and sooner
MAX_TEXTS = 300  # of one service: a test may send a hundred thousand
MAX_REPLY_BYTES = 1 << 20
SECRETS_IN_FILES = {"app-key": "APP_KEY", "setup-token": "the set-up token"}
"""Files of DATA_DIR that are there to hold a secret, and which."""
SECRET_SETTINGS = frozenset(
    {
        *("APP_KEY", "ADMIN_PASSWORD", "WEBHOOK_SECRET"),
        *("S3_KEY", "S3_SECRET", "AZURE_CONNECTION_STRING"),
        "DB_PASSWORD",
    }
)
HOMES_OF_TEXTS = {"tasks": None, "deliveries": None, "jobs": {"settings"}}
"""Tables, and of these the columns (None: all), in which prompts and answers belong."""
DRIVE = "drive"
"""The directory of result files in DATA_DIR, in which answers belong."""
GZIP_HEADER = b"\x1f\x8b"
SQLITE_HEADER = b"SQLite format 3\0"
SQLITE_COMPANIONS = ("-wal", "-shm", "-journal")


# Unwatched: a watch within a watch, as in the watch's own tests, keeps what it sees to itself.
LAUNCH, RUN_ONCE, REQUEST = Service.launch, Service.run_once, Service.request


@dataclass(frozen=True)
class Leak:
    """Something that was found where it must not be."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} in {self.where}"


@dataclass
class Canaries:
    """What to look for: each with what it is."""

    secrets: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    leaks: list[Leak] = field(default_factory=list)
    """Found already while the service ran, in a reply."""

    def add_secret(self, secret: object, what: str) -> None:
        if isinstance(secret, str) and len(secret) >= MIN_SECRET_LENGTH:
            self.secrets.setdefault(secret, what)

    def add_texts(self, value: object, what: str) -> None:
        """Every string within a value, if it is long enough to be known again."""
        for text in strings_in(value):
            if len(text.strip()) >= MIN_TEXT_LENGTH and len(self.texts) < MAX_TEXTS:
                self.texts.setdefault(text[:MAX_TEXT_LENGTH], what)

    def find_in(self, content: bytes, *, with_texts: bool = True) -> Iterator[str]:
        """What of it this content holds, in any of the spellings that logs and files use."""
        known = {**self.secrets, **(self.texts if with_texts else {})}
        for canary, what in known.items():
            if any(spelling in content for spelling in spellings(canary)):
                yield what


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != "id":  # which may appear, in an error for one
                yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def spellings(text: str) -> set[bytes]:
    """As it is, in JSON, in an address, and in base64 wherever it begins there."""
    plain = text.encode("utf-8", "surrogatepass")
    found = {
        plain,
        json.dumps(text)[1:-1].encode(),
        json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass"),
    }
    found.add(quote(plain, safe="").encode())
    for offset in range(3):
        # the first and the last letters also depend on what stands beside the text
        encoded = base64.b64encode(bytes(offset) + plain)[4 if offset else 0 : -4]
        if len(encoded) >= MIN_SECRET_LENGTH:
            found |= {encoded, encoded.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def find_leaks(canaries: Canaries, data_dir: Path, logs: Iterable[Path]) -> list[Leak]:
    """What the files of one service hold and must not. It has to have ended: its database is opened."""
    leaks = list(canaries.leaks)
    own = Canaries(dict(canaries.secrets), canaries.texts)
    for name, what in SECRETS_IN_FILES.items():
        if (data_dir / name).is_file():
            own.add_secret((data_dir / name).read_text("utf-8", "replace").strip(), what)
    for log in logs:
        leaks += [Leak(what, log.name) for what in own.find_in(log.read_bytes())]
    databases: list[Path] = []
    for path in sorted(data_dir.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        is_result = path.relative_to(data_dir).parts[0] == DRIVE
        if is_result and content.startswith(GZIP_HEADER):
            with suppress(EOFError):  # one that was being made
                content = gzip.decompress(content)
        is_database = content.startswith(SQLITE_HEADER)
        is_part = is_database or path.name.endswith(SQLITE_COMPANIONS)
        leaks += [
            Leak(what, path.name)
            for what in own.find_in(content, with_texts=not is_part and not is_result)
            if what != SECRETS_IN_FILES.get(path.name)
        ]
        if is_database:
            databases.append(path)
    # Only now: SQLite takes what stands beside a database into it, and drops that file.
    return leaks + [leak for path in databases for leak in find_in_tables(own, path)]


def find_in_tables(canaries: Canaries, path: Path) -> list[Leak]:
    """Prompts and answers in tables that are not theirs; a database that a test has damaged has none to read."""
    try:
        with closing(sqlite3.connect(path, timeout=1)) as database:
            tables = [
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            return [leak for table in tables for leak in _find_in_table(canaries, database, table)]
    except sqlite3.DatabaseError:
        return []


def _find_in_table(canaries: Canaries, database: sqlite3.Connection, table: str) -> Iterator[Leak]:
    homes = HOMES_OF_TEXTS.get(table, set())
    if homes is None:
        return
    columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
    for column in columns:
        if column in homes:
            continue
        for (value,) in database.execute(f'SELECT DISTINCT "{column}" FROM "{table}"'):
            content = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            yield from (Leak(what, f"{table}.{column}") for what in canaries.find_in(content))


class Watch:
    """Knows every service that was started under it, and what their files must not hold."""

    def __init__(self) -> None:
        self._services: dict[Service, Canaries] = {}
        self._patches = pytest.MonkeyPatch()

    def of(self, service: Service) -> Canaries:
        """What is looked for in the files of this service, for a test to add its own to."""
        return self._services.setdefault(service, Canaries())

    def find_leaks(self, *services: Service) -> list[Leak]:
        """Those of these services, or of all; they have to have ended."""
        return [
            leak
            for service in services or self._services
            for leak in find_leaks(self.of(service), service.data_dir, _logs_of(service))
        ]

    @property
    def logs_written(self) -> int:
        return sum(len(_logs_of(service)) for service in self._services)

    def __enter__(self) -> Self:
        watch = self

        def watched_launch(service: Service) -> None:
            watch._note_settings(service, service.env)
            LAUNCH(service)

        def watched_run_once(service: Service, env: Env | None = None, timeout_s: float = 30.0) -> Any:
            watch._note_settings(service, {**service.env, **(env or {})})
            status, stderr = RUN_ONCE(service, env, timeout_s)
            watch._note_said(service, "its last words", stderr.encode())
            return status, stderr

        def watched_request(
            service: Service, method: str, path: str, token: str | None = None, **options: Any
        ) -> requests.Response:
            watch._note_request(service, path, options)
            reply = REQUEST(service, method, path, token, **options)
            if not options.get("stream"):
                watch._note_reply(service, f"{method} {path}", options, reply)
            return reply

        self._patches.setattr(Service, "launch", watched_launch)
        self._patches.setattr(Service, "run_once", watched_run_once)
        self._patches.setattr(Service, "request", watched_request)
        return self

    def __exit__(self, *_error: object) -> None:
        self._patches.undo()

    def _note_settings(self, service: Service, env: Env) -> None:
        canaries = self.of(service)
        for name, value in env.items():
            if name in SECRET_SETTINGS or name.startswith("GPT_KEY_"):
                canaries.add_secret(value, name)
        app_key = env.get("APP_KEY")
        if app_key and not env.get("WEBHOOK_SECRET"):
            canaries.add_secret(base64.b64encode(derive(app_key, "webhook")).decode(), "WEBHOOK_SECRET")
            canaries.add_secret(base64.b64encode(derive(app_key, "tokens")).decode(), "the key of tokens")

    def _note_request(self, service: Service, path: str, options: dict[str, Any]) -> None:
        body = options.get("json")
        if isinstance(body, dict) and path.startswith(("/jobs", "/task")):
            canaries = self.of(service)
            canaries.add_texts(body.get("data"), "a prompt")
            settings = body.get("settings")
            if isinstance(settings, dict):
                canaries.add_texts([settings.get("instructions"), settings.get("template")], "a prompt")

    def _note_reply(
        self, service: Service, called: str, options: dict[str, Any], reply: requests.Response
    ) -> None:
        canaries, path = self.of(service), called.partition(" ")[2]
        if reply.status_code >= 400 or path == "/metrics":
            self._note_said(
                service, f"the reply to {called.partition('?')[0]}: {reply.status_code}", reply.content
            )
            return
        asked, answer = options.get("json"), _json_of(reply)
        if isinstance(asked, dict):
            # only those that were right: a wrong one may be two plain words
            for name in ("password", "new", "setup_token"):
                canaries.add_secret(asked.get(name), f"a {name}")
        if not isinstance(answer, dict):
            return
        if path == "/webhooks/secret":
            canaries.add_secret(answer.get("secret"), "WEBHOOK_SECRET")
        if path in ("/register", "/login", "/tokens"):
            token = answer.get("token")
            text = token.get("token") if isinstance(token, dict) else token
            if isinstance(text, str):
                canaries.add_secret(text.rpartition(".")[2], "a token")  # the part that nobody can guess
        if path.startswith(("/jobs", "/task")):
            canaries.add_texts(answer.get("results"), "an answer")

    def _note_said(self, service: Service, where: str, content: bytes) -> None:
        canaries = self.of(service)
        canaries.leaks += [Leak(what, where) for what in canaries.find_in(content)]


def _logs_of(service: Service) -> list[Path]:
    """Standard error and output of all its starts."""
    return [path for path in [service.data_dir.parent / "service.log"] if path.is_file()]


def _json_of(reply: requests.Response) -> Any:
    if reply.headers.get("Content-Type") != "application/json" or len(reply.content) > MAX_REPLY_BYTES:
        return None
    try:
        return reply.json()
    except ValueError:
        return None
