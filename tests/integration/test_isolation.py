"""Who sees what: users apart from each other, admins, and the anonymous user of a closed network."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from tests.receiver import Receiver
from tests.service import ADMIN_EMAIL, PASSWORD, Env, Service
from tests.upstream import Fault, FaultKind, Upstream

ADA = "ada@example.org"
BOB = "bob@example.org"


@pytest.fixture(scope="module")
def hook() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shared_env(hook: Receiver) -> Env:
    return {"REQUEST_API": hook.url}


@pytest.fixture(scope="module")
def ada(shared_service: Service) -> str:
    return shared_service.user(ADA)


@pytest.fixture(scope="module")
def bob(shared_service: Service) -> str:
    return shared_service.user(BOB)


@pytest.fixture(scope="module")
def adas_job(shared_service: Service, ada: str, hook: Receiver) -> dict[str, Any]:
    """A finished job of Ada's that was delivered by webhook."""
    job_id = shared_service.submit({"secret": "Ada's own"}, {"delivery": "webhook"}, ada).json()["id"]
    shared_service.wait_finished(job_id)
    hook.wait_for(1)
    return shared_service.job(job_id, ada)


def delivery_of(service: Service, token: str, job_id: str) -> str:
    (delivery,) = service.get(f"/deliveries?job_id={job_id}", token).json()["data"]
    return str(delivery["id"])


def ids(reply: requests.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [item["id"] for item in reply.json()["data"]]


def without_auth(service: Service) -> None:
    assert service.patch("/settings", service.admin, json={"auth": False}).status_code == 200


# Users


def test_another_users_job_is_a_404_on_every_route(
    service: Service, bob: str, adas_job: dict[str, Any]
) -> None:
    path = f"/jobs/{adas_job['id']}"
    replies = [
        service.get(path, bob),
        service.get(f"{path}?results=false", bob),
        service.get(f"{path}/results", bob),
        service.get(f"{path}/results?format=csv", bob),
        service.delete(path, bob),
        service.delete(f"{path}?purge=true", bob),
        service.post(f"{path}/retry", bob),
    ]

    assert [reply.status_code for reply in replies] == [404] * len(replies)
    assert not any("Ada" in reply.text or ADA in reply.text for reply in replies)


def test_another_users_job_answers_as_one_that_is_not_there(
    service: Service, bob: str, adas_job: dict[str, Any]
) -> None:
    there, nowhere = (
        service.get(f"/jobs/{job_id}", bob).json() | {"request_id": ""}
        for job_id in (adas_job["id"], "0" * 32)
    )

    assert there == nowhere


def test_another_user_changes_nothing(service: Service, ada: str, bob: str, adas_job: dict[str, Any]) -> None:
    service.delete(f"/jobs/{adas_job['id']}", bob)
    service.delete(f"/jobs/{adas_job['id']}?purge=true", bob)

    assert service.job(adas_job["id"], ada) == adas_job


def test_another_user_cannot_cancel_a_running_job(
    service: Service, upstream: Upstream, ada: str, bob: str
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG))
    job_id = service.submit(["slow"], token=ada, prefer="respond-async").json()["id"]
    upstream.wait_for_in_flight(1)

    assert service.delete(f"/jobs/{job_id}", bob).status_code == 404

    upstream.release()
    assert service.wait_finished(job_id, token=ada)["status"] == "succeeded"


def test_lists_hold_ones_own_alone(service: Service, ada: str, bob: str, adas_job: dict[str, Any]) -> None:
    bobs = service.submit(["Bob's own"], token=bob).json()["id"]

    assert adas_job["id"] in ids(service.get("/jobs?limit=100", ada))
    assert bobs not in ids(service.get("/jobs?limit=100", ada))
    assert bobs in ids(service.get("/jobs?limit=100", bob))
    assert adas_job["id"] not in ids(service.get("/jobs?limit=100", bob))


def test_anothers_cursor_tells_nothing(service: Service, bob: str, adas_job: dict[str, Any]) -> None:
    own = set(ids(service.get("/jobs?limit=100", bob)))

    page = ids(service.get(f"/jobs?limit=100&cursor={adas_job['id']}", bob))

    assert set(page) <= own


def test_deliveries_are_their_owners(service: Service, ada: str, bob: str, adas_job: dict[str, Any]) -> None:
    delivery_id = delivery_of(service, ada, adas_job["id"])

    assert service.get(f"/deliveries/{delivery_id}", ada).status_code == 200
    assert service.get(f"/deliveries/{delivery_id}", bob).status_code == 404
    assert service.post(f"/deliveries/{delivery_id}/redeliver", bob).status_code == 404
    assert ids(service.get("/deliveries", bob)) == []
    assert ids(service.get(f"/deliveries?job_id={adas_job['id']}", bob)) == []


def test_tokens_are_their_owners(service: Service, ada: str, bob: str) -> None:
    made = service.post("/tokens", ada, json={"name": "script"}).json()

    assert service.get("/jobs", made["token"]).status_code == 200
    assert ids(service.get("/tokens", bob)) == []
    assert service.delete(f"/tokens/{made['id']}", bob).status_code == 404
    assert service.get("/jobs", made["token"]).status_code == 200
    assert service.delete(f"/tokens/{made['id']}", ada).status_code == 204
    assert service.get("/jobs", made["token"]).status_code == 401


# Admins


def test_admin_reads_any_job_by_its_id(service: Service, adas_job: dict[str, Any]) -> None:
    job = service.job(adas_job["id"], service.admin)

    assert job == adas_job
    assert job["owner"] == ADA
    assert service.get(f"/jobs/{job['id']}/results", service.admin).status_code == 200


def test_admins_list_is_their_own_unless_all_are_asked_for(
    service: Service, adas_job: dict[str, Any]
) -> None:
    own = ids(service.get("/jobs?limit=100", service.admin))
    everyones = ids(service.get("/jobs?limit=100&all=true", service.admin))

    assert adas_job["id"] not in own
    assert adas_job["id"] in everyones


def test_admins_deliveries_are_their_own_unless_all_are_asked_for(
    service: Service, ada: str, adas_job: dict[str, Any]
) -> None:
    delivery_id = delivery_of(service, ada, adas_job["id"])

    assert delivery_id not in ids(service.get("/deliveries", service.admin))
    assert delivery_id in ids(service.get("/deliveries?all=true", service.admin))


@pytest.mark.parametrize("path", ["/jobs?all=true", "/deliveries?all=true"])
def test_user_may_not_list_everyones(service: Service, bob: str, path: str) -> None:
    assert service.get(path, bob).status_code == 403


ADMINS_ALONE = [
    ("GET", "/users", None),
    ("PATCH", f"/users/{'0' * 32}", {"role": "admin"}),
    ("DELETE", f"/users/{'0' * 32}", None),
    ("PATCH", "/settings", {"auth": False}),
    ("GET", "/webhooks/secret", None),
    ("GET", "/keys", None),
    ("POST", "/keys/0/check", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ADMINS_ALONE)
def test_admin_actions_are_refused_to_users_and_strangers(
    service: Service, bob: str, method: str, path: str, body: Any
) -> None:
    by_user = service.request(method, path, bob, json=body)
    by_stranger = service.request(method, path, json=body)

    assert (by_user.status_code, by_stranger.status_code) == (403, 401)


# Tokens that end while a body comes

NEW_PASSWORD = "another horse battery staple"


def log_out(service: Service, token: str) -> None:
    assert service.post("/logout", token).status_code == 204


def change_password(service: Service, token: str) -> None:
    other = service.login(service.get("/me", token).json()["email"])
    reply = service.post("/me/password", other, json={"old": PASSWORD, "new": NEW_PASSWORD})
    assert reply.status_code == 204


def disable(service: Service, token: str) -> None:
    user_id = service.get("/me", token).json()["id"]
    assert service.patch(f"/users/{user_id}", service.admin, json={"disabled": True}).status_code == 200


def delete(service: Service, token: str) -> None:
    user_id = service.get("/me", token).json()["id"]
    assert service.delete(f"/users/{user_id}", service.admin).status_code == 204


ENDINGS = [log_out, change_password, disable, delete]


@contextmanager
def half_sent(
    service: Service, body: bytes, *head: str, is_upload: bool = True
) -> Iterator[Callable[[], tuple[int, bytes]]]:
    """A request of which half is sent, and that is let in; the call sends the rest, and gives status and body."""
    places = service.free_places()
    lines = [*head, "Host: x", f"Content-Length: {len(body)}", "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall("\r\n".join(lines).encode() + body[: len(body) // 2])
        if is_upload:
            service.wait_until(lambda: service.free_places() < places)
        else:
            service.login(ADMIN_EMAIL)  # which takes far longer than to be let in

        def finish() -> tuple[int, bytes]:
            client.sendall(body[len(body) // 2 :])
            reply = client.makefile("rb").read()
            return int(reply.split(b" ", 2)[1]), reply.partition(b"\r\n\r\n")[2]

        yield finish


SMALL = b'{"text": "paid for by whom?"}\n'
LARGE = b'{"text": "paid for by whom?%s"}\n' % (b" " * 50_000)


def uploading(service: Service, token: str | None, body: bytes = LARGE * 4) -> Any:
    head = ["POST /jobs HTTP/1.1", "Content-Type: application/jsonl", "Prefer: respond-async"]
    if token is not None:
        head.append(f"Authorization: Bearer {token}")
    return half_sent(service, body, *head)


@pytest.mark.parametrize("body", [LARGE * 4, SMALL * 12_000], ids=["stored at once", "stored in slices"])
@pytest.mark.parametrize("end", ENDINGS)
def test_upload_whose_token_ends_meanwhile_is_refused_and_costs_nothing(
    service: Service, upstream: Upstream, end: Callable[[Service, str], None], body: bytes
) -> None:
    token = service.user(f"{end.__name__}-{len(body)}@example.org")
    before = ids(service.get("/jobs?all=true&limit=100", service.admin))

    with uploading(service, token, body) as finish:
        end(service, token)
        status, reply = finish()

    assert (status, json.loads(reply)["type"]) == (401, "urn:gpt-worker:problem:unauthenticated")
    assert ids(service.get("/jobs?all=true&limit=100", service.admin)) == before
    assert upstream.calls() == []
    assert "Traceback" not in service.stderr()


def test_key_of_an_upload_whose_token_ends_meanwhile_tells_of_no_job(
    service: Service, upstream: Upstream
) -> None:
    token = service.user("replay@example.org")
    headers = {
        "Content-Type": "application/jsonl",
        "Idempotency-Key": "once",
        "Authorization": f"Bearer {token}",
    }
    assert service.post("/jobs", headers=headers, data=LARGE * 4).status_code == 200
    head = ["POST /jobs HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]

    with half_sent(service, LARGE * 4, *head) as finish:
        log_out(service, token)
        status, _ = finish()

    assert status == 401


def test_anonymous_upload_is_refused_once_auth_is_on_again(service: Service, upstream: Upstream) -> None:
    without_auth(service)
    with uploading(service, None) as finish:
        assert service.patch("/settings", service.admin, json={"auth": True}).status_code == 200
        status, _ = finish()

    assert status == 401
    assert upstream.calls() == []


def test_upload_of_a_token_that_goes_on_is_taken(service: Service, ada: str) -> None:
    with uploading(service, ada) as finish:
        log_out(service, service.login(ADA))
        status, reply = finish()

    assert (status, json.loads(reply)["owner"]) == (202, ADA)
    service.wait_finished(json.loads(reply)["id"])


def test_retry_whose_token_ends_meanwhile_is_refused(service: Service, upstream: Upstream) -> None:
    token = service.user("retrier@example.org")
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400))
    job_id = service.submit(["no"], token=token).json()["id"]
    calls = len(upstream.calls())
    head = [
        f"POST /jobs/{job_id}/retry HTTP/1.1",
        "Content-Type: application/json",
        f"Authorization: Bearer {token}",
    ]

    with half_sent(service, b"{" + b" " * 50_000 + b"}", *head, is_upload=False) as finish:
        log_out(service, token)
        status, _ = finish()

    assert (status, service.job(job_id)["run"], len(upstream.calls())) == (401, 1, calls)


# Strangers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs"),
        ("POST", "/jobs"),
        ("POST", "/task"),
        ("GET", f"/jobs/{'0' * 32}"),
        ("GET", f"/jobs/{'0' * 32}/results"),
        ("DELETE", f"/jobs/{'0' * 32}"),
        ("POST", f"/jobs/{'0' * 32}/retry"),
        ("GET", "/settings"),
        ("GET", "/deliveries"),
        ("GET", "/me"),
        ("GET", "/tokens"),
        ("POST", "/logout"),
        ("POST", "/webhooks/test"),
        ("POST", "/"),
    ],
)
def test_stranger_gets_a_401(service: Service, method: str, path: str) -> None:
    reply = service.request(method, path, json={"data": ["a"]} if method == "POST" else None)

    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_for_everybody(service: Service, path: str) -> None:
    assert service.get(path).status_code == 200


@pytest.mark.parametrize(
    "query", ["signature=x", "signature=", "expires=9999999999&signature=abc", "expires=x&signature=%00"]
)
def test_made_up_link_opens_nothing(service: Service, adas_job: dict[str, Any], query: str) -> None:
    reply = service.get(f"/jobs/{adas_job['id']}/results?format=jsonl&{query}")

    assert reply.status_code in (401, 403)
    assert "Ada" not in reply.text


# Without tokens


def test_anonymous_user_works_with_ownerless_jobs(
    service: Service, ada: str, adas_job: dict[str, Any]
) -> None:
    without_auth(service)

    job = service.submit({"a": "hello"}, token=None).json()

    assert (job["owner"], job["results"]) == (None, {"a": "answer to: hello"})
    assert service.job(job["id"], None) == job
    assert service.get(f"/jobs/{job['id']}/results").status_code == 200
    assert service.post("/task", json={"data": ["x"]}).status_code == 200
    listed = ids(service.get("/jobs?limit=100"))
    assert job["id"] in listed
    assert adas_job["id"] not in listed
    assert service.get(f"/jobs/{adas_job['id']}").status_code == 404
    assert service.get(f"/jobs/{job['id']}", ada).status_code == 404
    assert service.delete(f"/jobs/{job['id']}?purge=true").status_code == 204


def test_anonymous_user_reads_the_modes_and_changes_none(service: Service) -> None:
    without_auth(service)

    assert service.get("/settings").json()["auth"] is False
    assert service.patch("/settings", json={"auth": True}).status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/users"),
        ("GET", "/keys"),
        ("GET", "/webhooks/secret"),
        ("POST", "/webhooks/test"),
        ("GET", "/me"),
        ("GET", "/tokens"),
        ("POST", "/tokens"),
        ("GET", "/deliveries"),
        ("GET", f"/deliveries/{'0' * 32}"),
        ("POST", f"/deliveries/{'0' * 32}/redeliver"),
        ("POST", "/"),
    ],
)
def test_anonymous_user_may_use_jobs_alone(service: Service, method: str, path: str) -> None:
    without_auth(service)

    assert service.request(method, path).status_code == 401


def test_anonymous_user_may_not_list_everyones_jobs(service: Service) -> None:
    without_auth(service)

    assert service.get("/jobs?all=true").status_code in (401, 403)


def test_good_token_counts_and_a_bad_one_is_refused_also_without_auth(service: Service, ada: str) -> None:
    without_auth(service)

    mine = service.submit(["hello"], token=ada).json()

    assert mine["owner"] == ADA
    assert service.get(f"/jobs/{mine['id']}").status_code == 404
    for bad in ("nonsense", "a.b.c", ada[:-4] + "AAAA"):
        assert service.get("/jobs", bad).status_code == 401
        assert service.submit(["hello"], token=bad).status_code == 401
        assert service.get("/settings", bad).status_code == 401


def test_ownerless_jobs_are_the_admins_once_auth_is_back(service: Service, ada: str) -> None:
    without_auth(service)
    job_id = service.submit(["hello"], token=None).json()["id"]

    service.patch("/settings", service.admin, json={"auth": True})

    assert service.get(f"/jobs/{job_id}").status_code == 401
    assert service.get(f"/jobs/{job_id}", ada).status_code == 404
    assert service.job(job_id, service.admin)["owner"] is None
    assert job_id in ids(service.get("/jobs?limit=100&all=true", service.admin))


# Registration


def test_registration_is_off_until_an_admin_turns_it_on(service: Service) -> None:
    body = {"email": "eve@example.org", "password": PASSWORD}

    closed = service.post("/register", json=body)
    service.patch("/settings", service.admin, json={"registration": True})
    opened = service.post("/register", json=body)

    assert (closed.status_code, opened.status_code) == (403, 201)
    assert opened.json()["user"]["role"] == "user"
