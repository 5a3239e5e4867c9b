"""The description and the service agree: its requests work as they stand, and replies are what it says."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.openapi_document import Document
from tests.service import PASSWORD, Env, Service
from tests.upstream import Fault, FaultKind, Upstream

BOB = "bob@example.org"
UNKNOWN = "0" * 32
JSON_TYPE = {"Content-Type": "application/json"}
SIGNED = {"webhook-id": "msg_1", "webhook-timestamp": "1", "webhook-signature": "v1,x"}


@pytest.fixture(scope="module")
def shared_env() -> Env:
    return {"MAX_JSON_BYTES": "65536"}


@pytest.fixture(scope="module")
def document(shared_service: Service) -> Document:
    reply = shared_service.get("/openapi.json")
    assert reply.status_code == 200
    assert reply.headers["Content-Type"] == "application/json"
    return Document(reply.json())


@pytest.fixture(scope="module")
def bob(shared_service: Service) -> str:
    return shared_service.user(BOB)


@pytest.fixture
def hanging_job(service: Service, upstream: Upstream) -> str:
    """A job whose one call has no reply."""
    upstream.add_fault(Fault(kind=FaultKind.HANG))
    job_id = service.submit(["Say hello."], prefer="respond-async").json()["id"]
    upstream.wait_for_in_flight(1)
    return str(job_id)


@pytest.fixture
def job(service: Service) -> str:
    """A finished job."""
    return str(service.submit(["Say hello."]).json()["id"])


# Requests that work


def bodies(operation: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(content type, name, example) of every request body that is shown."""
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        if "example" in media:
            yield kind, "example", media["example"]
        for name, example in media.get("examples", {}).items():
            yield kind, name, example["value"]


def as_sent(kind: str, example: Any) -> dict[str, Any]:
    """An example, as `requests` takes it."""
    if kind == "application/json":
        return {"json": example}
    if kind == "multipart/form-data":
        return {
            "files": {
                name: ("tasks.csv", part, "text/csv")
                if name == "file"
                else (None, json.dumps(part), "application/json")
                for name, part in example.items()
            }
        }
    return {"data": example.encode(), "headers": {"Content-Type": kind}}


class Maker:
    """Fills in what only a running service knows; each request gets somebody and something new, since some end it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._count = 0

    def ask(self, method: str, path: str, sent: dict[str, Any]) -> requests.Response:
        self._service.patch("/settings", self._service.admin, json={"registration": True})
        token: str | None = self._service.admin
        match path:
            case "/register":
                token, sent = None, {"json": {**sent["json"], "email": self._new_email()}}
            case "/login":
                email = self._new_email()
                self._service.register(email)
                token, sent = None, {"json": {**sent["json"], "email": email}}
            case "/me/password" | "/logout":
                token = self._service.register(self._new_email())
        return self._service.request(method, self._fill(path), token, **sent)

    def _fill(self, path: str) -> str:
        makers: dict[str, Callable[[], str]] = {
            "/jobs/{id}": lambda: self._id_of("/jobs", {"data": ["Say hello."]}),
            "/tokens/{id}": lambda: self._id_of("/tokens", {"name": "nightly"}),
            "/deliveries/{id}": lambda: self._id_of("/webhooks/test", None),
            "/users/{id}": self._new_user,
        }
        for start, make in makers.items():
            if path.startswith(start):
                return path.replace("{id}", make())
        return path.replace("{number}", "0").replace("{name}", "start.js")

    def _id_of(self, path: str, body: Any) -> str:
        return str(self._service.post(path, self._service.admin, json=body).json()["id"])

    def _new_user(self) -> str:
        token = self._service.register(self._new_email())
        return str(self._service.get("/me", token).json()["id"])

    def _new_email(self) -> str:
        self._count += 1
        return f"user{self._count}@example.org"


def test_every_request_that_is_shown_works(service: Service, document: Document) -> None:
    maker = Maker(service)
    failed = []
    for method, path, operation in document.operations():
        if path == "/":
            continue  # only the service itself can sign it
        shown = [(f"{kind}, {name}", as_sent(kind, it)) for kind, name, it in bodies(operation)]
        for name, sent in shown or [("no body", {})]:
            reply = maker.ask(method, path, sent)
            if reply.status_code >= 300:
                failed.append(f"{method} {path} ({name}): {reply.status_code} {reply.text}")
            failed += document.undescribed(reply)

    assert failed == []


# Replies that are described


def good_requests(service: Service, job: str) -> list[requests.Response]:
    """Replies that have more than one form."""
    admin = service.admin
    return [
        service.submit(["Say hello."], prefer="respond-async"),
        service.submit(["Say hello."], {"delivery": "webhook"}),
        service.submit(["Say hello."], params={"dry_run": "true"}),
        service.submit({"cut": "Say hello."}, {"max_output_tokens": 1}),
        service.get(f"/jobs/{job}?results=false", admin),
        service.get(f"/jobs/{job}/results?format=json", admin),
        service.get(f"/jobs/{job}/results?format=jsonl", admin),
        service.get(f"/jobs/{job}/results?format=csv", admin),
        service.get("/jobs?limit=1&all=true", admin),
        service.get("/deliveries?all=true", admin),
        service.get("/metrics"),
        service.get("/settings", admin),
        *(service.get(f"/docs/{name}") for name in ("swagger-ui.css", "swagger-ui-bundle.js", "swagger.svg")),
        service.delete(f"/jobs/{job}?purge=true", admin),
    ]


def test_good_replies_are_as_described(service: Service, document: Document, job: str) -> None:
    replies = good_requests(service, job)

    assert {reply.status_code for reply in replies} == {200, 202, 204}
    assert [fault for reply in replies for fault in document.undescribed(reply)] == []


def test_failed_job_is_as_described(service: Service, upstream: Upstream, document: Document) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400))
    reply = service.submit(["Say hello."])
    job = reply.json()

    retried = service.post(f"/jobs/{job['id']}/retry", service.admin, json={"codes": ["bad_request"]})
    results = service.get(f"/jobs/{job['id']}/results", service.admin)

    assert (job["status"], retried.status_code) == ("failed", 202)
    assert [fault for it in (reply, retried, results) for fault in document.undescribed(it)] == []


Ask = Callable[[Service, str], requests.Response]
BAD: dict[str, tuple[int, Ask]] = {
    "broken JSON": (400, lambda s, _: s.post("/jobs", s.admin, data="{", headers=JSON_TYPE)),
    "broken settings": (400, lambda s, _: s.patch("/settings", s.admin, data="{", headers=JSON_TYPE)),
    "no token": (401, lambda s, _: s.get("/jobs")),
    "a bad token": (401, lambda s, _: s.get("/me", "x.y.z")),
    "a wrong password": (401, lambda s, _: login(s, BOB, "wrong wrong wrong")),
    "an unsigned webhook": (401, lambda s, _: s.post("/", json={})),
    "no admin": (403, lambda s, bob: s.get("/users", bob)),
    "no admin's list": (403, lambda s, bob: s.get("/jobs?all=true", bob)),
    "no admin's deliveries": (403, lambda s, bob: s.get("/deliveries?all=true", bob)),
    "no admin's metrics": (403, lambda s, bob: s.get("/metrics", bob)),
    "registration is off": (403, lambda s, _: register(s, "late@example.org")),
    "a link that is not good": (403, lambda s, _: s.get(f"/jobs/{UNKNOWN}/results?expires=1&signature=x")),
    "a wrong old password": (403, lambda s, bob: change_password(s, bob)),
    "no such job": (404, lambda s, _: s.get(f"/jobs/{UNKNOWN}", s.admin)),
    "no such job's events": (404, lambda s, _: s.get(f"/jobs/{UNKNOWN}/events", s.admin)),
    "no such job to cancel": (404, lambda s, _: s.delete(f"/jobs/{UNKNOWN}", s.admin)),
    "no such token": (404, lambda s, _: s.delete(f"/tokens/{UNKNOWN}", s.admin)),
    "no such user": (404, lambda s, _: s.delete(f"/users/{UNKNOWN}", s.admin)),
    "no such delivery": (404, lambda s, _: s.get(f"/deliveries/msg_{UNKNOWN}", s.admin)),
    "no such key": (404, lambda s, _: s.post("/keys/9/check", s.admin)),
    "no such file": (404, lambda s, _: s.get("/docs/index.html")),
    "the last admin": (409, lambda s, _: delete_me(s)),
    "too much JSON": (413, lambda s, _: s.submit(["x" * 70_000])),
    "too large a webhook": (413, lambda s, _: s.post("/", data=b" " * 70_000, headers=SIGNED)),
    "text": (
        415,
        lambda s, _: s.post("/jobs", s.admin, data="hello", headers={"Content-Type": "text/plain"}),
    ),
    "a login as a form": (415, lambda s, _: s.post("/login", data={"email": BOB, "password": PASSWORD})),
    "no data": (422, lambda s, _: s.post("/jobs", s.admin, json={})),
    "a misspelt setting": (422, lambda s, _: s.submit(["Hello"], {"temprature": 1})),
    "a settings' null": (422, lambda s, _: s.submit(["Hello"], {"model": None})),
    "a bad limit": (422, lambda s, _: s.get("/jobs?limit=0", s.admin)),
    "a bad form of results": (422, lambda s, _: s.get(f"/jobs/{UNKNOWN}/results?format=xml", s.admin)),
    "a short password": (422, lambda s, _: register(s, "short@example.org", "short")),
    "a bad code": (422, lambda s, _: s.post(f"/jobs/{UNKNOWN}/retry", s.admin, json={"codes": ["none"]})),
}


def login(service: Service, email: str, password: str) -> requests.Response:
    return service.post("/login", json={"email": email, "password": password})


def register(service: Service, email: str, password: str = PASSWORD) -> requests.Response:
    return service.post("/register", json={"email": email, "password": password})


def change_password(service: Service, token: str) -> requests.Response:
    body = {"old": "wrong wrong wrong", "new": "staple battery horse correct"}
    return service.post("/me/password", token, json=body)


def delete_me(service: Service) -> requests.Response:
    own = service.get("/me", service.admin).json()["id"]
    return service.delete(f"/users/{own}", service.admin)


@pytest.mark.parametrize(("status", "ask"), BAD.values(), ids=BAD)
def test_problems_are_as_described(
    service: Service, document: Document, bob: str, status: int, ask: Ask
) -> None:
    reply = ask(service, bob)

    assert (reply.status_code, document.undescribed(reply)) == (status, [])


def test_conflicts_are_as_described(service: Service, document: Document, hanging_job: str) -> None:
    service.patch("/settings", service.admin, json={"registration": True})
    replies = [service.post(f"/jobs/{hanging_job}/retry", service.admin), register(service, BOB)]

    assert [reply.status_code for reply in replies] == [409, 409]
    assert [fault for reply in replies for fault in document.undescribed(reply)] == []


def test_locked_login_is_as_described(service: Service, document: Document) -> None:
    replies = [login(service, "nobody@example.org", "wrong wrong wrong") for _ in range(6)]

    assert replies[-1].status_code == 429
    assert document.undescribed(replies[-1]) == []


# The page


def test_page_and_its_files_come_from_here_alone(service: Service) -> None:
    page = service.get("/docs")

    assert page.status_code == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "//" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("host", ["gpt.example.org", "localhost:9", "[::1]"])
def test_page_and_document_answer_to_any_host_name(service: Service, host: str) -> None:
    replies = [service.get(path, headers={"Host": host}) for path in ("/docs", "/openapi.json")]

    assert [reply.status_code for reply in replies] == [200, 200]
    assert host not in replies[0].text + replies[1].text


def test_other_pages_of_the_generator_are_not_there(service: Service) -> None:
    paths = ["/openapi", "/openapi/", "/openapi/openapi.json", "/openapi/swagger", "/oauth2-redirect.html"]

    assert [service.get(path).status_code for path in paths] == [404] * len(paths)
