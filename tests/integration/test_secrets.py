"""What a service gives away: modes of its files, and where its secrets and its users' texts end up."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from dotenv import dotenv_values

from tests.canaries import Watch
from tests.receiver import Answer, Receiver
from tests.service import ROOT, Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

KEYS = ("sk-canary-Xw81-first", "sk-canary-Pq27-second")
APP_KEY = "canary-of-the-app-key-0123456789-abcdefgh"
WEBHOOK_SECRET = "whsec_Y2FuYXJ5LW9mLXRoZS13ZWJob29rLXNlY3JldA=="
PASSWORD = "canary of the password"
NEW_PASSWORD = "canary of the new password"
WRONG_PASSWORD = "canary of a mistyped password"
PROMPT = "canary of a prompt"
ANSWER = "canary of an answer"
INSTRUCTIONS = "canary of the instructions"
CELL = "canary of a cell"
HOOK_CODE = "canary-of-the-hook"
EMAIL = "canary@example.org"


def modes_under(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder.parent)): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_all_that_a_service_writes_is_its_owners_alone(tmp_path: Path, open_umask: None) -> None:
    with Upstream() as upstream:
        service = Service(tmp_path, {"APP_KEY": None}, upstream)
        service.data_dir.rmdir()
        with service:
            first = modes_under(service.data_dir)
            assert service.submit(["hello"]).status_code == 200
            open_files = modes_of_open_files(service)

    assert first.pop("data") == 0o700
    assert first.pop("data/drive", 0o700) == 0o700
    assert {"data/app-key", "data/lock", "data/gpt-worker.sqlite3", "data/gpt-worker.sqlite3-wal"} <= set(
        first
    )
    assert set(first.values()) | open_files == {0o600}


def test_setup_token_is_its_owners_alone(tmp_path: Path, open_umask: None) -> None:
    with Upstream() as upstream, Service(tmp_path, {"NODE_ENV": "production"}, upstream) as service:
        assert modes_under(service.data_dir)["data/setup-token"] == 0o600


def modes_of_open_files(service: Service) -> set[int]:
    """Of all that its processes have open in its folder, deleted ones too."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) != service.pid:
                continue
            for file in (process / "fd").iterdir():
                if str(file.readlink()).startswith(str(service.data_dir)):
                    found.add(stat.S_IMODE(file.stat().st_mode))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("environment", [pytest.param("development", marks=pytest.mark.slow), "production"])
def test_secrets_and_texts_stay_where_they_belong(tmp_path: Path, watch: Watch, environment: str) -> None:
    with Upstream({key: KeyRules() for key in KEYS}) as upstream, Receiver() as receiver:
        env = {
            "NODE_ENV": environment,
            "APP_KEY": APP_KEY,
            "WEBHOOK_SECRET": WEBHOOK_SECRET,
            "ADMIN_EMAIL": EMAIL,
            "ADMIN_PASSWORD": PASSWORD,
            "REQUEST_API": f"{receiver.url}?code={HOOK_CODE}",
        }
        service = Service(tmp_path, env, upstream)
        for name in dotenv_values(ROOT / ".env"):  # read outside of NODE_ENV=test; an empty setting is none
            service.env.setdefault(name, "")
        known = watch.of(service)
        known.add_secret(WRONG_PASSWORD, "a mistyped password")
        known.texts[HOOK_CODE] = "the code in REQUEST_API"
        known.add_texts([PROMPT, ANSWER, CELL], "a prompt or an answer")
        with service:
            live_through_all(service, upstream, receiver)
            service.restart()
            service.submit(
                {"last": f"{PROMPT}, sent as the service is killed"}, token=service.login(EMAIL, NEW_PASSWORD)
            )

    assert set(known.secrets) >= {*KEYS, APP_KEY, WEBHOOK_SECRET, PASSWORD, NEW_PASSWORD}
    assert watch.logs_written
    assert [str(leak) for leak in watch.find_leaks(service)] == []


def live_through_all(service: Service, upstream: Upstream, receiver: Receiver) -> None:
    """Whatever may go well or wrong with a secret or a text in it."""
    token = use_account(service)
    use_upstream(service, upstream, token)
    send_what_is_refused(service, token)
    send_what_is_no_http(service, token)
    receiver.script(Answer(500), Answer(410))
    for _ in range(3):
        reply = service.submit([PROMPT], {"delivery": "webhook"}, token)
        service.wait_finished(reply.json()["id"], token=token)
    receiver.wait_for(3)
    service.get("/deliveries", token)
    assert service.get("/keys", token).status_code == 200
    assert service.get("/metrics", token).status_code == 200


def use_account(service: Service) -> str:
    token = service.login(EMAIL, PASSWORD)
    service.post("/login", json={"email": EMAIL, "password": WRONG_PASSWORD})
    service.post("/login", json={"email": EMAIL, "password": WRONG_PASSWORD, "more": 1})
    service.post(
        "/register",
        json={"email": "b@example.org", "password": WRONG_PASSWORD, "setup_token": WRONG_PASSWORD},
    )
    service.post("/me/password", token, json={"old": WRONG_PASSWORD, "new": NEW_PASSWORD})
    assert service.post("/me/password", token, json={"old": PASSWORD, "new": NEW_PASSWORD}).status_code == 204
    script = service.post("/tokens", token, json={"name": "script"}).json()["token"]
    assert service.get("/webhooks/secret", script).status_code == 200
    for path in (f"/nowhere/{token}", f"/jobs?token={token}", f"/jobs/{token}"):
        service.get(path, script)
        service.get(path, f"{token}x")
        service.get(path, headers={"Authorization": f"Basic {token}"})
    return token


def use_upstream(service: Service, upstream: Upstream, token: str) -> None:
    repeated = f"Incorrect API key provided: {KEYS[0]}, {KEYS[1]}. Your prompt was: {PROMPT} {ANSWER}"
    faults = [
        Fault(kind=FaultKind.ANSWER, content=ANSWER),
        *(
            Fault(kind=FaultKind.STATUS, status=status, code=code, message=repeated)
            for status, code in [
                (400, "invalid_prompt"),
                (429, "rate_limit_exceeded"),
                (500, None),
                (503, None),
                (404, "model_not_found"),
                (403, None),
            ]
        ),
        Fault(kind=FaultKind.BROKEN_JSON),
        Fault(kind=FaultKind.RESET),
        Fault(kind=FaultKind.HTML),
        Fault(kind=FaultKind.REFUSAL),
        Fault(kind=FaultKind.STATUS, status=401, code="invalid_api_key", message=repeated, key=KEYS[1]),
    ]
    for fault in faults:
        upstream.add_fault(fault)
        reply = service.submit([f"{PROMPT} {fault.kind}"], {"instructions": INSTRUCTIONS}, token)
        assert reply.status_code == 200, reply.text
    service.post("/keys/1/check", token)
    upstream.clear_faults()
    rows = f"text,more\n{CELL},x\n{PROMPT},y\n"
    uploads: list[Callable[[], object]] = [
        lambda: service.post("/jobs", token, data=rows, headers={"Content-Type": "text/csv"}),
        lambda: service.post("/jobs", token, files={"file": ("rows.csv", rows)}),
    ]
    for upload in uploads:
        upload()


def send_what_is_refused(service: Service, token: str) -> None:
    good = {"data": {"a": PROMPT}, "settings": {"instructions": INSTRUCTIONS}}
    bodies: list[object] = [
        {**good, "settings": {"temperature": PROMPT}},
        {**good, "settings": {"model": f"{PROMPT}\n"}},
        {**good, "settings": {"template": f"{PROMPT} {{a"}},
        {**good, "metadata": {"a": [PROMPT]}},
        {"data": {"a": {"messages": [PROMPT]}}},
        {"data": {"a": {"vars": {"a": PROMPT}}}},
        {"data": PROMPT},
        PROMPT,
    ]
    replies = [service.post("/jobs", token, json=body) for body in bodies]
    broken = [
        ("application/json", '{"data": ["' + PROMPT),
        ("application/json", '{"data": ["' + PROMPT + '"], "data": ["' + PROMPT + '"]}'),
        ("application/jsonl", '{"text": "' + PROMPT + '"}\n{"text": "' + CELL),
        ("text/csv", f'text\n"{PROMPT}'),
        ("text/csv", f"{PROMPT},{CELL}\n1,2\n"),
        ("text/plain", PROMPT),
    ]
    for kind, body in broken:
        replies.append(service.post("/jobs", token, data=body, headers={"Content-Type": kind}))
    replies.append(service.post("/jobs", token, files={"settings": (None, PROMPT), "file": ("a.csv", CELL)}))

    assert [number for number, reply in enumerate(replies) if reply.ok] == []


def send_what_is_no_http(service: Service, token: str) -> None:
    """What the server itself refuses, before any of our own code sees it."""
    path = f"/jobs?secret={token}&text={quote(PROMPT)}"
    heads = [
        f"GET {path} HTTP/9.9\r\nHost: x",
        f"GET {path} and more HTTP/1.1\r\nHost: x",
        f"GE({token}) {path} HTTP/1.1\r\nHost: x",
        f"GET {path}{'x' * 9000} HTTP/1.1\r\nHost: x",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {token}",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {token}",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\0",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {token}",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {token}",
        f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{token}\r\n{PROMPT}",
    ]
    for head in heads:
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(head.encode("latin-1") + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                reply = connection.recv(65536)
                assert token not in reply.decode("latin-1")
                assert PROMPT not in reply.decode("latin-1")
