"""Finished jobs by webhook: who gets what, how it is signed, and what happens when it is not taken."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import openai
import pytest
import requests
from standardwebhooks import Webhook, WebhookVerificationError

from tests.receiver import Answer, Received, Receiver, redirect, verified
from tests.service import Env, Service
from tests.upstream import Fault, FaultKind, Upstream

pytestmark = pytest.mark.every_database

Start = Callable[..., tuple[Service, Upstream]]
PATIENCE_S = 15.0


@pytest.fixture(scope="module")
def shared_hook() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shared_env(shared_hook: Receiver) -> Env:
    return {"REQUEST_API": shared_hook.url}


class Hook:
    """What came to the module's receiver since the test began."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._before = len(receiver.received())

    def wait_for(self, count: int, timeout_s: float = PATIENCE_S) -> list[Received]:
        return self.receiver.wait_for(self._before + count, timeout_s)[self._before :]

    def received(self) -> list[Received]:
        return self.receiver.received()[self._before :]


@pytest.fixture
def hook(service: Service, shared_hook: Receiver) -> Hook:
    return Hook(shared_hook)


def submit(service: Service, data: Any, **settings: Any) -> str:
    """The id of a job with webhook delivery of its own."""
    reply = service.submit(data, {"delivery": "webhook", **settings})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def message(service: Service, request: Received) -> dict[str, Any]:
    """What a webhook says, once its signature holds."""
    told: dict[str, Any] = verified(request, secret(service))
    return told


def secret(service: Service) -> str:
    return str(service.get("/webhooks/secret", service.admin).json()["secret"])


def deliveries_of(service: Service, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.get(f"/deliveries?job_id={job_id}", service.admin).json()["data"]
    return found


def wait_for_delivery(
    service: Service, job_id: str, status: str = "delivered", attempts: int = 0
) -> dict[str, Any]:
    """The job's delivery, once it stands there after so many attempts."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        found = deliveries_of(service, job_id)
        if found and found[0]["status"] == status and len(found[0]["attempts"]) >= attempts:
            (delivery,) = found
            return delivery
        assert time.monotonic() < deadline_s, found
        time.sleep(0.02)


# The message


def test_webhook_mode_answers_at_once_and_posts_the_result(
    service: Service, upstream: Upstream, hook: Hook
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG))
    assert service.patch("/settings", service.admin, json={"delivery": "webhook"}).status_code == 200

    reply = service.submit({"b": "B", "a": "A"}, metadata={"batch": "42"})

    job_id = reply.json()["id"]
    assert (reply.status_code, reply.headers["Location"]) == (202, f"/jobs/{job_id}")
    assert (reply.json()["delivery"], reply.json()["results"]) == ("webhook", None)
    upstream.wait_for_in_flight(1)
    upstream.release()
    (request,) = hook.wait_for(1)
    told = message(service, request)
    assert list(told) == ["type", "timestamp", "data"]
    assert told["type"] == "job.finished"
    assert told["timestamp"].endswith("Z")
    assert told["data"] == service.job(job_id)
    assert list(told["data"]["results"].items()) == [("b", "answer to: B"), ("a", "answer to: A")]
    assert told["data"]["metadata"] == {"batch": "42"}


def test_job_may_choose_its_own_delivery(service: Service, hook: Hook) -> None:
    by_webhook = submit(service, ["hello"])
    service.patch("/settings", service.admin, json={"delivery": "webhook"})
    inline = service.submit(["hello"], {"delivery": "inline"})

    assert inline.status_code == 200
    (request,) = hook.wait_for(1)
    assert message(service, request)["data"]["id"] == by_webhook
    assert deliveries_of(service, inline.json()["id"]) == []


def test_prefer_wait_does_not_hold_a_webhook_job(service: Service, upstream: Upstream, hook: Hook) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG))

    reply = service.submit(["hello"], {"delivery": "webhook"}, prefer="wait=30", timeout_s=5.0)

    assert reply.status_code == 202
    upstream.wait_for_in_flight(1)
    upstream.release()
    hook.wait_for(1)


def test_webhook_is_signed_as_standard_webhooks_says(service: Service, hook: Hook) -> None:
    job_id = submit(service, {"ключ": "grüße"})

    (request,) = hook.wait_for(1)

    assert request.method == "POST"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == wait_for_delivery(service, job_id)["id"]
    assert Webhook(secret(service)).verify(request.body, request.headers)["data"]["id"] == job_id
    client = openai.OpenAI(api_key="-", webhook_secret=secret(service))
    client.webhooks.verify_signature(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret(service)).verify(request.body + b" ", request.headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(request.body + b" ", request.headers)


@pytest.mark.parametrize(("text", "status"), [("bad", "failed"), ("good", "succeeded")])
def test_failed_jobs_are_told_too(
    service: Service, upstream: Upstream, hook: Hook, text: str, status: str
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))

    submit(service, [text])

    (request,) = hook.wait_for(1)
    assert message(service, request)["data"]["status"] == status


def test_cancelled_job_is_told_once_its_last_call_has_landed(
    service: Service, upstream: Upstream, hook: Hook
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    job_id = submit(service, [f"task {number}" for number in range(20)], model="gpt-cancelled")
    upstream.wait_for_in_flight(2)

    assert service.delete(f"/jobs/{job_id}", service.admin).json()["status"] == "cancelled"

    assert hook.received() == []
    upstream.clear_faults()
    upstream.release()
    (request,) = hook.wait_for(1)
    told = message(service, request)["data"]
    assert (told["status"], told["counts"]["answered"], told["counts"]["pending"]) == ("cancelled", 2, 0)


def test_retry_ends_in_a_new_webhook(service: Service, upstream: Upstream, hook: Hook) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))
    job_id = submit(service, {"a": "bad"})
    hook.wait_for(1)

    assert service.post(f"/jobs/{job_id}/retry", service.admin).status_code == 202

    first, second = hook.wait_for(2)
    assert [message(service, request)["data"]["run"] for request in (first, second)] == [1, 2]
    assert message(service, second)["data"]["status"] == "succeeded"
    assert first.headers["webhook-id"] != second.headers["webhook-id"]


def test_large_result_is_linked_and_hashed(service: Service, hook: Hook) -> None:
    data = {f"ж {number}": f"task {number} " + "x" * 1000 for number in range(300)}
    job_id = submit(service, data)

    (request,) = hook.wait_for(1)

    assert len(request.body) < 10_000
    told = message(service, request)["data"]
    assert (told["results"], told["errors"], told["finish_reasons"]) == (None, None, None)
    assert told["results_url"].startswith(f"{service.url}/jobs/{job_id}/results?")
    opened = requests.get(told["results_url"], timeout=10.0)
    assert opened.status_code == 200
    assert hashlib.sha256(opened.content).hexdigest() == told["results_sha256"]
    lines = [json.loads(line) for line in opened.text.splitlines()]
    assert {line["id"]: line["result"] for line in lines} == {
        id_: f"answer to: {text}" for id_, text in data.items()
    }
    by_token = service.get(f"/jobs/{job_id}/results?format=jsonl", service.admin)
    assert by_token.content == opened.content


def test_link_opens_its_own_job_alone_and_nothing_else(service: Service, hook: Hook) -> None:
    submit(service, ["x" * 300_000])
    (request,) = hook.wait_for(1)
    link = message(service, request)["data"]["results_url"]
    other = service.submit(["secret"]).json()["id"]
    job_id = message(service, request)["data"]["id"]
    query = link.partition("?")[2]

    assert service.get(f"/jobs/{other}/results?{query}").status_code == 403
    assert service.get(f"/jobs/{job_id}?{query}").status_code in (401, 422)
    assert requests.get(link[:-1] + ("A" if link[-1] != "A" else "B"), timeout=10.0).status_code == 403
    for changed in (link.replace("expires=", "expires=9"), link.replace("expires=", "expires=0")):
        assert changed != link
        assert requests.get(changed, timeout=10.0).status_code in (403, 422)
    assert requests.delete(link, timeout=10.0).status_code == 405
    service.delete(f"/jobs/{job_id}?purge=true", service.admin)
    assert requests.get(link, timeout=10.0).status_code == 404


# Deliveries


def test_delivery_is_listed_with_its_attempts(service: Service, hook: Hook) -> None:
    job_id = submit(service, ["hello"])
    hook.wait_for(1)

    delivery = wait_for_delivery(service, job_id, "delivered")

    assert (delivery["job_id"], delivery["run"], delivery["type"]) == (job_id, 1, "job.finished")
    assert (delivery["url"], delivery["next_attempt_at"]) == (hook.receiver.url, None)
    (attempt,) = delivery["attempts"]
    assert (attempt["number"], attempt["status_code"], attempt["error"]) == (1, 200, None)
    assert service.get(f"/deliveries/{delivery['id']}", service.admin).json() == delivery
    listed = service.get("/deliveries?status=delivered&limit=100", service.admin).json()["data"]
    assert delivery in listed
    assert delivery not in service.get("/deliveries?status=failed&limit=100", service.admin).json()["data"]


def test_webhook_that_is_not_taken_comes_again_after_5_s(service: Service, hook: Hook) -> None:
    hook.receiver.script(500)

    job_id = submit(service, ["hello"])

    waiting = wait_for_delivery(service, job_id, "pending", attempts=1)
    assert [attempt["status_code"] for attempt in waiting["attempts"]] == [500]
    first, second = hook.wait_for(2)
    assert 3.9 <= second.at - first.at <= 7.0
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert message(service, second)["data"]["id"] == job_id
    delivery = wait_for_delivery(service, job_id, "delivered")
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [500, 200]


def test_redirect_is_not_followed(service: Service, hook: Hook, receiver: Receiver) -> None:
    hook.receiver.script(redirect(receiver.url))
    job_id = submit(service, ["hello"])

    delivery = wait_for_delivery(service, job_id, "pending", attempts=1)

    assert delivery["attempts"][0]["status_code"] == 307
    assert receiver.received() == []
    due = datetime.fromisoformat(delivery["next_attempt_at"]) - datetime.now(UTC)
    assert timedelta(seconds=2) < due < timedelta(seconds=6.5)
    service.delete(f"/jobs/{job_id}?purge=true", service.admin)


def test_retry_after_of_the_receiver_is_heeded(service: Service, hook: Hook) -> None:
    hook.receiver.script(Answer(503, {"Retry-After": "120"}))
    job_id = submit(service, ["hello"])

    delivery = wait_for_delivery(service, job_id, "pending", attempts=1)

    due = datetime.fromisoformat(delivery["next_attempt_at"]) - datetime.now(UTC)
    assert timedelta(seconds=110) < due <= timedelta(seconds=121)
    service.delete(f"/jobs/{job_id}?purge=true", service.admin)


def test_gone_receiver_is_given_up_and_redeliver_sends_the_same_again(service: Service, hook: Hook) -> None:
    hook.receiver.script(410)
    job_id = submit(service, ["hello"])
    hook.wait_for(1)
    delivery = wait_for_delivery(service, job_id, "failed")
    assert delivery["finished_at"] is not None

    reply = service.post(f"/deliveries/{delivery['id']}/redeliver", service.admin)

    assert reply.status_code == 202
    first, second = hook.wait_for(2)
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert message(service, second)["data"]["id"] == job_id
    assert len(wait_for_delivery(service, job_id, "delivered")["attempts"]) == 2


def test_purged_jobs_webhook_is_not_sent(service: Service, upstream: Upstream, hook: Hook) -> None:
    hook.receiver.script(500)
    job_id = submit(service, ["hello"])
    hook.wait_for(1)

    assert service.delete(f"/jobs/{job_id}?purge=true", service.admin).status_code == 204

    delivery = wait_for_delivery(service, job_id, "failed")
    assert service.post(f"/deliveries/{delivery['id']}/redeliver", service.admin).status_code == 409
    assert len(hook.received()) == 1


def test_test_webhook_is_sent_signed(service: Service, hook: Hook) -> None:
    reply = service.post("/webhooks/test", service.admin)

    assert reply.status_code == 202
    (request,) = hook.wait_for(1)
    assert request.headers["webhook-id"] == reply.json()["id"]
    assert message(service, request)["type"] == "webhook.test"


# The secret, and the service as its own receiver


def test_secret_is_derived_for_good_and_well_formed(service: Service) -> None:
    assert secret(service).startswith("whsec_")
    assert secret(service) == secret(service)
    assert service.get("/webhooks/secret").status_code == 401


def test_default_request_api_delivers_to_the_service_itself(start: Start) -> None:
    own = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY="
    service, _ = start(env={"WEBHOOK_SECRET": own})
    assert secret(service) == own

    job_id = submit(service, {"b": "B", "a": "A"})

    delivery = wait_for_delivery(service, job_id, "delivered")
    assert delivery["url"].rstrip("/") == service.url
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [200]

    body = json.dumps({"type": "job.finished", "data": {"z": "ж", "a": 1}}).encode()
    now = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(own).sign("msg_1", now, body.decode()),
        "Content-Type": "application/json",
    }
    echoed = service.post("/", data=body, headers=headers)
    assert (echoed.status_code, echoed.content) == (200, body)
    broken = [
        {},
        headers | {"webhook-id": "msg_2"},
        headers | {"webhook-timestamp": str(int(now.timestamp()) - 3600)},
        headers | {"webhook-timestamp": "soon"},
        headers | {"webhook-signature": "v1,AAAA"},
        headers | {"webhook-signature": "é".encode("latin-1")},
        {name: value for name, value in headers.items() if name != "webhook-signature"},
    ]
    assert [service.post("/", data=body, headers=other).status_code for other in broken] == [401] * len(
        broken
    )
    assert service.post("/", data=body + b" ", headers=headers).status_code == 401
