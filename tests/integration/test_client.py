"""The command-line client against the real service: files in, files out, and what becomes of trouble.

Most commands run in this process, by `main`; those that get signals, a terminal or a pipe have one of their own.
"""

import csv
import gzip
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from gpt_worker.cli import main
from gpt_worker.client import following
from gpt_worker.client.options import Form
from tests.service import ADMIN_EMAIL, PASSWORD, ROOT, Service, free_port
from tests.upstream import Fault, FaultKind, Upstream

REVIEWS = ROOT / "examples" / "reviews.csv"
PATIENCE_S = 20.0
Start = Callable[..., tuple[Service, Upstream]]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str


class Client:
    """Runs `gpt-worker` as somebody with a home of their own."""

    def __init__(
        self, home: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes], service: Service
    ) -> None:
        self.home = home
        self.credentials = home / "gpt-worker" / "credentials.json"
        self._patch = patch
        self._capture = capture
        self._service = service
        self.set_env(XDG_CONFIG_HOME=str(home), GPT_WORKER_URL="", GPT_WORKER_TOKEN="", TERM="xterm")

    def set_env(self, **variables: str) -> None:
        for name, value in variables.items():
            self._patch.setenv(name, value)

    def use(self, url: str | None = None, token: str | None = None) -> None:
        """The environment of somebody who has a token; of the shared service's admin, unless told otherwise."""
        self.set_env(GPT_WORKER_URL=url or self._service.url, GPT_WORKER_TOKEN=token or self._service.admin)

    def run(self, *args: str | Path, stdin: bytes = b"") -> Ended:
        """One command, in this process."""
        given = self.home / "stdin"
        given.write_bytes(stdin)
        self._capture.readouterr()
        with given.open() as file:
            self._patch.setattr(sys, "stdin", file)
            status = main([str(arg) for arg in args])
        said = self._capture.readouterr()
        return Ended(status, said.out.decode(), said.err.decode())

    def start(self, *args: str | Path, **options: Any) -> "subprocess.Popen[str]":
        """One command in a process of its own, with pipes."""
        return subprocess.Popen(
            [sys.executable, "-m", "gpt_worker.cli", *map(str, args)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )


@pytest.fixture
def client(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    service: Service,
) -> Client:
    """Somebody with the admin's token in the environment."""
    made = Client(tmp_path, monkeypatch, capfdbinary, service)
    made.use()
    return made


def read_until(stream: Any, wanted: str) -> str:
    """What comes, up to the line that holds `wanted`."""
    lines = []
    for line in stream:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"no {wanted!r} in {lines}")


def hang_all(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))


def let_go(upstream: Upstream) -> None:
    upstream.clear_faults()
    upstream.release()


def job_ids(service: Service) -> list[str]:
    return [job["id"] for job in service.get("/jobs?limit=100", service.admin).json()["data"]]


def csv_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# Logging in and out


def test_login_keeps_a_token_that_logout_ends(client: Client, service: Service) -> None:
    client.set_env(GPT_WORKER_URL="", GPT_WORKER_TOKEN="")

    logged_in = client.run(
        "login", service.url, "--email", ADMIN_EMAIL, "--password-stdin", stdin=PASSWORD.encode()
    )
    mode = client.credentials.stat().st_mode & 0o777
    token = json.loads(client.credentials.read_text())["token"]
    listed = client.run("jobs")
    logged_out = client.run("logout")

    assert (logged_in.status, listed.status, logged_out.status) == (0, 0, 0)
    assert f"Logged in at {service.url} as {ADMIN_EMAIL}." in logged_in.stderr
    assert PASSWORD not in logged_in.stdout + logged_in.stderr
    assert mode == 0o600
    assert not client.credentials.exists()
    assert service.get("/me", token).status_code == 401
    assert client.run("jobs").status == 5


def test_login_shows_the_earlier_token_so_that_strangers_lock_nobody_out(
    client: Client, service: Service
) -> None:
    email = "returning@example.org"
    service.user(email)
    log_in = ("login", service.url, "--email", email, "--password-stdin")
    assert client.run(*log_in, stdin=PASSWORD.encode()).status == 0
    while service.post("/login", json={"email": email, "password": "wrong password"}).status_code == 401:
        pass

    known = client.run(*log_in, stdin=PASSWORD.encode())

    assert (known.status, known.stderr) == (0, f"Logged in at {service.url} as {email}.\n")


def test_earlier_token_goes_to_no_other_server(client: Client, service: Service) -> None:
    log_in = ("--email", ADMIN_EMAIL, "--password-stdin")
    assert client.run("login", service.url, *log_in, stdin=PASSWORD.encode()).status == 0

    with Front(service) as front:
        assert client.run("login", front.url, *log_in, stdin=PASSWORD.encode()).status == 0

    (login,) = [headers for request, headers in front.seen if request == "POST /login"]
    assert "Authorization" not in login


def test_wrong_password_stores_nothing(client: Client, service: Service) -> None:
    ended = client.run(
        "login", service.url, "--email", "nobody@example.org", "--password-stdin", stdin=b"wrong"
    )

    assert (ended.status, ended.stderr) == (5, "gpt-worker: the address or the password is wrong\n")
    assert not client.credentials.exists()


def test_login_without_a_terminal_says_what_to_give(client: Client, service: Service) -> None:
    ended = client.run("login", service.url, "--email", ADMIN_EMAIL)

    assert ended.status == 2
    assert "--password-stdin" in ended.stderr


def test_login_at_something_else_is_refused(client: Client, upstream: Upstream) -> None:
    ended = client.run(
        "login", upstream.base_url, "--email", "me@example.org", "--password-stdin", stdin=b"secret"
    )

    assert ended.status == 4
    assert "does not answer like a gpt-worker" in ended.stderr


# Submitting


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", list(Form))
def test_file_of_any_form_is_answered(client: Client, tmp_path: Path, form: Form, packed: bool) -> None:
    content = {
        Form.JSON: b'{"data": {"a": "hello", "b": "bye"}}',
        Form.JSONL: b'{"id": "a", "text": "hello"}\n{"id": "b", "text": "bye"}\n',
        Form.CSV: b"id,text\na,hello\nb,bye\n",
    }[form]
    path = tmp_path / (f"tasks.{form}.gz" if packed else f"tasks.{form}")
    path.write_bytes(gzip.compress(content) if packed else content)

    ended = client.run("submit", path)

    assert ended.status == 0, ended.stderr
    assert [json.loads(line) for line in ended.stdout.splitlines()] == [
        {"id": "a", "result": "answer to: hello", "error": None, "finish_reason": "stop"},
        {"id": "b", "result": "answer to: bye", "error": None, "finish_reason": "stop"},
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", list(Form))
def test_settings_and_metadata_go_with_a_file_of_any_form(
    client: Client, service: Service, upstream: Upstream, form: Form, packed: bool
) -> None:
    content = {
        Form.JSON: b'{"data": [{"vars": {"text": "hello"}}], "settings": {"temperature": 1}}',
        Form.JSONL: b'{"vars": {"text": "hello"}}',
        Form.CSV: b"text\nhello\n",
    }[form]

    ended = client.run(
        *("submit", "-", "--format", f"{form}.gz" if packed else form, "--no-wait"),
        *("--template", "Käse: {text}", "--instructions", "Be brief.", "--model", "gpt-x"),
        *("--setting", "temperature=0.5", "--metadata", "batch=42"),
        stdin=gzip.compress(content) if packed else content,
    )

    assert ended.status == 0, ended.stderr
    job = service.wait_finished(ended.stdout.strip())
    assert (job["model"], job["metadata"]) == ("gpt-x", {"batch": "42"})
    (call,) = upstream.calls()
    assert call.user_text == "Käse: hello"


def test_reviews_become_a_file_of_answers(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"

    ended = client.run("submit", REVIEWS, "--template", "Is this kind? {text}", "--out", out)

    assert ended.status == 0, ended.stderr
    assert ended.stdout == ""
    header, *rows = csv_rows(out)
    assert header == ["id", "result", "error_code", "finish_reason"]
    assert [row[0] for row in rows] == [f"r{number:02}" for number in range(1, 21)]
    assert all(row[1].startswith("answer to: Is this kind? ") for row in rows)
    assert ended.stderr.endswith(f" -> {out}\n")
    assert list(tmp_path.glob(".*.part")) == []


def test_partial_job_writes_what_there_is_and_says_so_by_its_status(
    client: Client, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))
    out = tmp_path / "answers.json"

    partial = client.run("submit", "-", "--format", "csv", "--out", out, stdin=b"text\ngood\nbad\n")
    job_id = partial.stderr.split()[1].rstrip(":")
    retried = client.run("retry", job_id, "--code", "bad_request")
    waited = client.run("wait", job_id)
    again = client.run("retry", job_id)

    assert partial.status == 3
    assert f"gpt-worker retry {job_id}" in partial.stderr
    told = json.loads(out.read_text())
    assert list(told["results"].values()) == ["answer to: good", None]
    assert [error["code"] for error in told["errors"].values()] == ["bad_request"]
    assert (retried.status, waited.status, again.status) == (0, 0, 0)
    assert again.stderr == f"Job {job_id} has an answer to every task: nothing to retry.\n"
    assert "has no such task: nothing to retry" in client.run("retry", job_id, "--code", "timeout").stderr


def test_failed_job_has_a_status_of_its_own(client: Client, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))

    assert client.run("submit", "-", "--format", "csv", stdin=b"text\nbad\n").status == 1


def test_job_that_nobody_waits_for_is_found_again(
    client: Client, service: Service, upstream: Upstream, tmp_path: Path
) -> None:
    hang_all(upstream)
    submitted = client.run("submit", REVIEWS, "--no-wait")
    job_id = submitted.stdout.strip()
    upstream.wait_for_in_flight(2)

    running = client.run("status", job_id)
    so_far = client.run("results", job_id)
    conflict = client.run("retry", job_id)
    let_go(upstream)
    waited = client.run("wait", job_id, "--out", tmp_path / "answers.jsonl")
    finished = client.run("status", job_id, "--json")
    as_csv = client.run("results", job_id, "--format", "csv")

    assert (submitted.status, submitted.stdout) == (0, f"{job_id}\n")
    assert (running.status, running.stdout.split()[:2]) == (0, ["job", job_id])
    assert "0/20 answered" in running.stdout
    assert (so_far.status, so_far.stdout) == (0, "")
    assert "results so far" in so_far.stderr
    assert conflict.status == 2
    assert waited.status == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 20
    assert json.loads(finished.stdout) == service.job(job_id, results=False)
    assert as_csv.stdout.startswith("id,result,error_code,finish_reason")


def test_cancelled_job_ends_with_failure(client: Client, upstream: Upstream) -> None:
    hang_all(upstream)
    job_id = client.run("submit", REVIEWS, "--no-wait").stdout.strip()
    upstream.wait_for_in_flight(2)

    cancelled = client.run("cancel", job_id)
    let_go(upstream)
    waited = client.run("wait", job_id)

    assert cancelled.status == 0
    assert f"Job {job_id} is cancelled: 0/20 answered so far, and up to " in cancelled.stderr
    assert waited.status == 1
    assert f"Job {job_id} cancelled: " in waited.stderr
    assert "cancelled: cancelled" not in waited.stderr


def test_jobs_and_keys_are_listed(client: Client, service: Service, upstream: Upstream) -> None:
    job_id = client.run("submit", "-", "--format", "csv", "--no-wait", stdin=b"text\nhello\n").stdout.strip()
    service.wait_finished(job_id)

    jobs = client.run("jobs", "--limit", "1")
    as_json = client.run("jobs", "--limit", "1", "--status", "succeeded", "--json")
    keys = client.run("keys")

    assert jobs.stdout.splitlines()[1].split()[:4] == [job_id, "succeeded", "1/1", "0"]
    assert [job["id"] for job in json.loads(as_json.stdout)] == [job_id]
    assert [line.split()[:4] for line in keys.stdout.splitlines()[1:]] == [
        ["key", str(number), key[-4:], "ready"] for number, key in enumerate(upstream.keys)
    ]


def test_user_who_is_no_admin_may_not_see_the_keys(client: Client, service: Service) -> None:
    client.use(token=service.user("client@example.org"))

    ended = client.run("keys")

    assert ended.status == 5
    assert ended.stderr.startswith("gpt-worker: not allowed: ")
    assert client.run("submit", "-", "--format", "csv", stdin=b"text\nhello\n").status == 0


# Bad input


@pytest.mark.parametrize(
    ("args", "stdin", "sentence"),
    [
        (["--format", "csv", "--setting", "bogus=1"], b"text\nhello\n", "settings.bogus: is not known here"),
        (
            ["--format", "json", "--setting", "bogus=1"],
            b'{"data": ["a"]}',
            "settings.bogus: is not known here",
        ),
        (["--format", "csv", "--setting", "bogus"], b"text\nhello\n", "must have the form key=value"),
        (["--format", "csv"], b"", "standard input is empty"),
        (["--format", "csv"], b'text\nhello\n"open\n', "line 3"),
        (["--format", "csv"], "text\nhéllo\n".encode("cp1252"), "UTF-8"),
        (["--format", "csv"], b"id,text\na,1\nb,2\na,3\n", "'a'"),
        (["--format", "csv", "--template", "{foo}"], b"id,text\na,1\n", "foo"),
        (["--format", "jsonl"], b'{"text": "a"}\n' * 7000 + b"{bad\n", "Line 7001"),
        (["--format", "csv.gz"], gzip.compress(b"text\nhello\n" * 999, mtime=0)[:-12], "ends early"),
        (["--format", "json"], b'["a"]', "must be a JSON object"),
        ([], b"text\nhello\n", "use --format"),
        (["--format", "csv", "--no-wait", "--out", "a.csv"], b"text\nhello\n", "--out needs the answers"),
    ],
)
def test_bad_input_is_one_sentence_and_stores_nothing(
    client: Client, service: Service, args: list[str], stdin: bytes, sentence: str
) -> None:
    before = job_ids(service)

    ended = client.run("submit", "-", *args, stdin=stdin)

    assert ended.status == 2
    assert sentence in ended.stderr
    assert ended.stderr.startswith("gpt-worker: ")
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert job_ids(service) == before


def test_wrong_usage_is_told_by_its_status(client: Client) -> None:
    ended = [client.run(*args) for args in ([], ["submit"], ["bogus"], ["submit", "a.csv", "--bogus"])]

    assert [each.status for each in ended] == [2] * 4
    assert all("Usage: gpt-worker" in each.stderr for each in ended)


def test_help_lists_the_exit_statuses(client: Client) -> None:
    ended = client.run("--help")

    assert ended.status == 0
    assert "130  stopped by Ctrl-C" in ended.stdout


def test_unknown_job_is_not_found(client: Client) -> None:
    ended = [client.run(command, "0" * 32) for command in ("status", "wait", "results", "cancel", "retry")]

    assert [each.status for each in ended] == [2] * 5
    assert all("there is no such job" in each.stderr for each in ended)


def test_bad_token_is_refused(client: Client, service: Service) -> None:
    client.set_env(GPT_WORKER_TOKEN="bad")

    assert [client.run(*args).status for args in (["jobs"], ["submit", str(REVIEWS)])] == [5, 5]
    client.set_env(GPT_WORKER_TOKEN="")
    assert f"wants a token. Log in with: gpt-worker login {service.url}" in client.run("jobs").stderr


def test_server_that_is_down_is_told_at_once(client: Client) -> None:
    client.use(f"http://127.0.0.1:{free_port()}")

    ended = [client.run(*args) for args in (["jobs"], ["submit", str(REVIEWS)], ["status", "1"])]

    assert [each.status for each in ended] == [4] * 3
    assert all(each.stderr.endswith("nothing listens there\n") for each in ended)


@pytest.mark.parametrize("name", ["answers.csv", "answers.csv.gz"])
def test_results_that_can_not_be_written_leave_nothing_behind(
    client: Client, tmp_path: Path, name: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    process = client.start(
        "submit",
        REVIEWS,
        "--out",
        full / name,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )

    _, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 7, stderr
    assert f"{name} can't be written" in stderr
    assert "come back with: gpt-worker wait" in stderr
    assert list(full.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/answers.csv", "missing/answers.csv.gz", "folder.csv"])
def test_place_that_takes_no_file_is_refused_before_anything_is_sent(
    client: Client, service: Service, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    before = job_ids(service)

    ended = client.run("submit", REVIEWS, "--out", tmp_path / name)

    assert ended.status == 7
    assert job_ids(service) == before


# A terminal, a pipe, signals


def test_bar_lives_on_a_terminal(client: Client, service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    main_end, terminal = pty.openpty()
    process = client.start("submit", REVIEWS, "--no-wait", stderr=subprocess.DEVNULL)
    job_id = process.communicate(timeout=PATIENCE_S)[0].strip()

    process = client.start("wait", job_id, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = read_terminal(main_end, "0/20 answered")
    let_go(upstream)
    shown += read_terminal(main_end, None)

    assert process.wait(PATIENCE_S) == 0
    assert "\r\x1b[K[" in shown
    assert f"Job {job_id} succeeded: 20/20 answered, 0 failed" in shown


def read_terminal(main_end: int, wanted: str | None) -> str:
    """What comes, until it holds `wanted`, or to the end."""
    shown = b""
    while wanted is None or wanted.encode() not in shown:
        try:
            piece = os.read(main_end, 4096)
        except OSError:  # Linux: everybody has left the terminal
            piece = b""
        if not piece:
            assert wanted is None, shown
            os.close(main_end)
            break
        shown += piece
    return shown.decode()


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    client: Client, service: Service, upstream: Upstream, tmp_path: Path
) -> None:
    hang_all(upstream)
    out = tmp_path / "my answers.csv"
    process = client.start("submit", REVIEWS, "--out", out)
    begun = read_until(process.stderr, "0/20 answered")
    job_id = begun.split()[1].rstrip(":")
    upstream.wait_for_in_flight(1)

    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, stdout) == (130, "")
    assert "\x1b" not in begun + stderr
    assert stderr == (
        "gpt-worker: stopped watching, the job goes on; "
        f"come back with: gpt-worker wait {job_id} --out '{out}'\n"
    )
    let_go(upstream)
    assert client.run("wait", job_id, "--out", out).status == 0
    assert len(csv_rows(out)) == 21


def test_reader_who_leaves_is_no_error(client: Client, service: Service) -> None:
    tasks = b"text\n" + b"\n".join([b"a" * 2000] * 200)
    job_id = client.run("submit", "-", "--format", "csv", "--no-wait", stdin=tasks).stdout.strip()
    service.wait_finished(job_id)
    process = client.start("results", job_id)
    assert process.stdout is not None
    assert process.stderr is not None

    process.stdout.readline()
    process.stdout.close()

    assert (process.stderr.read(), process.wait(PATIENCE_S)) == ("", 141)
    process.stderr.close()


def test_wait_survives_a_crash_of_the_server(client: Client, start: Start) -> None:
    service, upstream = start()
    hang_all(upstream)
    client.use(service.url, service.admin)
    process = client.start("submit", REVIEWS)
    read_until(process.stderr, "0/20 answered")

    service.kill()
    read_until(process.stderr, "trying again in")
    let_go(upstream)
    service.start()
    stdout, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0, stderr
    assert len(stdout.splitlines()) == 20


@pytest.mark.parametrize("listens", [False, True])
def test_wait_for_a_server_that_never_answers_ends_soon(
    client: Client, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setattr(following, "FIRST_PATIENCE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listens:
            server.close()
        client.use(f"http://127.0.0.1:{port}")

        ended = client.run("wait", "0" * 32)

    assert ended.status == 4
    reason = "no answer in time" if listens else "nothing listens there"
    assert ended.stderr.splitlines()[-1] == (
        f"gpt-worker: no gpt-worker answers at http://127.0.0.1:{port}: {reason}, and none has in 1 s: "
        "is the address right, and does it run?"
    )


# A server behind trouble


class Trouble(Enum):
    """What may happen to a request on its way."""

    BUSY = auto()
    """503, come back at once."""
    UNKNOWN = auto()
    """404, as from an older service."""
    LOST = auto()
    """It arrives; its reply does not."""
    HALF = auto()
    """Half of the reply arrives."""


class Front(ThreadingHTTPServer):
    """Stands before a service and makes trouble: for each pair, the next request "METHOD /path" that ends so."""

    daemon_threads = True

    def __init__(self, service: Service, *troubles: tuple[str, Trouble]) -> None:
        super().__init__(("127.0.0.1", 0), FrontHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.service_url = service.url
        self.troubles = list(troubles)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def take(self, request: str, headers: dict[str, str]) -> Trouble | None:
        self.seen.append((request, headers))
        met = next((pair for pair in self.troubles if request.endswith(pair[0])), None)
        if met is None:
            return None
        self.troubles.remove(met)
        return met[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class FrontHandler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection a request."""

    server: Front

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = dict(self.headers.items())
        trouble = self.server.take(f"{self.command} {self.path.partition('?')[0]}", headers)
        problem = {"Content-Type": "application/problem+json"}
        if trouble is Trouble.BUSY:
            self._answer(503, {**problem, "Retry-After": "0"}, b'{"detail": "Starting."}')
            return
        if trouble is Trouble.UNKNOWN:
            self._answer(404, problem, b'{"detail": "Unknown."}')
            return
        reply = requests.request(
            self.command, self.server.service_url + self.path, headers=headers, data=body, timeout=PATIENCE_S
        )
        if trouble is not Trouble.LOST:
            half = len(reply.content) // 2 if trouble is Trouble.HALF else None
            self._answer(
                reply.status_code, {"Content-Type": reply.headers["Content-Type"]}, reply.content, half
            )

    do_GET = do_POST = _handle  # noqa: N815 — the names that http.server calls

    def _answer(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the name it has above
        """The test asks what came; nothing is printed."""


def test_broken_submit_is_sent_again_and_stays_one_job(client: Client, service: Service) -> None:
    before = job_ids(service)
    with Front(service, ("POST /jobs", Trouble.BUSY), ("POST /jobs", Trouble.LOST)) as front:
        client.use(front.url)

        ended = client.run("submit", REVIEWS, "--instructions", "Be brief.")

    assert ended.status == 0, ended.stderr
    assert "the connection broke; trying again in" in ended.stderr
    assert len(ended.stdout.splitlines()) == 20
    sent = [headers["Idempotency-Key"] for request, headers in front.seen if request == "POST /jobs"]
    assert (len(sent), len({*sent})) == (3, 1)
    assert len(job_ids(service)) == len(before) + 1


def test_service_without_events_is_asked_again_and_again(
    client: Client, service: Service, upstream: Upstream
) -> None:
    hang_all(upstream)
    with Front(service, ("/events", Trouble.UNKNOWN)) as front:
        client.use(front.url)
        process = client.start("submit", REVIEWS)
        read_until(process.stderr, "0/20 answered")
        upstream.wait_for_in_flight(2)

        let_go(upstream)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0, stderr
    assert len(stdout.splitlines()) == 20
    assert len([request for request, _ in front.seen if request.endswith("/events")]) == 1


@pytest.mark.parametrize("name", ["answers.csv", "answers.csv.gz"])
def test_results_that_break_off_are_fetched_again_whole(
    client: Client, service: Service, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    with Front(service, ("/results", Trouble.HALF), ("/results", Trouble.BUSY)) as front:
        client.use(front.url)

        ended = client.run("submit", REVIEWS, "--out", out)

    assert ended.status == 0, ended.stderr
    text = gzip.decompress(out.read_bytes()).decode() if name.endswith(".gz") else out.read_text()
    assert len([*csv.reader(text.splitlines())]) == 21
    assert list(tmp_path.glob(".*.part")) == []


@pytest.mark.parametrize("form", list(Form))
def test_results_are_packed_where_their_name_says_so(client: Client, tmp_path: Path, form: Form) -> None:
    plain, packed = tmp_path / f"answers.{form}", tmp_path / f"answers.{form}.gz"
    job_id = client.run("submit", REVIEWS, "--no-wait").stdout.strip()

    waited = client.run("wait", job_id, "--out", packed)
    from_wait = gzip.decompress(packed.read_bytes())
    fetched = [client.run("results", job_id, "--out", out) for out in (plain, packed)]

    assert (waited.status, [each.status for each in fetched]) == (0, [0, 0])
    assert waited.stderr.endswith(f" -> {packed}\n")
    assert from_wait == gzip.decompress(packed.read_bytes()) == plain.read_bytes()


# How it is installed


def test_make_says_that_it_installs_and_only_then(tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / ".venv")}))
    (packages / "of_these_tests.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    shutil.copy2(ROOT / "Makefile", tmp_path)
    make = ["make", "--silent", ".venv/.installed"]

    first, second = (
        subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True) for _ in range(2)
    )

    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
    assert "gpt-worker: installing into .venv (a minute or so)\n" in first.stderr


def test_make_installs_the_client_for_every_directory(tmp_path: Path) -> None:
    checkout = tmp_path / "a check out"
    venv.create(checkout / ".venv")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(checkout / ".venv")}))
    (packages / "of_these_tests.pth").write_text(sysconfig.get_path("purelib"))
    for name in ("gpt_worker", "config.py"):
        (checkout / name).symlink_to(ROOT / name)
    shutil.copy2(ROOT / "Makefile", checkout)

    made = subprocess.run(
        ["make", "--silent", ".venv/bin/gpt-worker"], cwd=checkout, capture_output=True, check=True
    )
    (tmp_path / "linked").symlink_to(checkout / ".venv/bin/gpt-worker")
    ended = subprocess.run(
        [tmp_path / "linked", "submit", "a b"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert made.stdout + made.stderr == b""
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("gpt-worker: a b does not tell its form by its name")
