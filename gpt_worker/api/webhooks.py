"""Webhooks over HTTP: what was delivered and how, the secret, a test, and the echo that takes our own."""

from typing import Any

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field
from werkzeug.exceptions import RequestEntityTooLarge

from gpt_worker.api import schemas
from gpt_worker.api.access import caller
from gpt_worker.api.context import service
from gpt_worker.api.job_schemas import JobReply
from gpt_worker.domain import DeliveryStatus
from gpt_worker.errors import TooLarge, Unauthenticated
from gpt_worker.rendering import render_time
from gpt_worker.signing import SignatureInvalid
from gpt_worker.store.deliveries import DeliveryRecord

Json = dict[str, Any]

EXAMPLE_ID = f"msg_{schemas.EXAMPLE_ID}"

api = APIBlueprint(
    "webhooks", __name__, abp_tags=[Tag(name="webhooks", description="Finished jobs, POSTed to REQUEST_API")]
)


class DeliveryPath(schemas.IdPath):
    id: str = Field(description="The delivery's id")


class DeliveryQuery(schemas.Query):
    job_id: str | None = Field(None, pattern="^[0-9a-f]{32}$", description="Only this job's")
    status: DeliveryStatus | None = Field(None, description="Only those that stand there")
    all: bool = Field(False, description="Everyone's (admin)")
    limit: int = Field(20, ge=1, le=100, description="How many at most")
    cursor: str | None = Field(
        None, pattern="^msg_[0-9a-f]{32}$", description="The `next_cursor` of the page before"
    )


class AttemptReply(schemas.Reply):
    """One try to deliver."""

    number: int = Field(description="1 for the first")
    sent_at: schemas.Time
    took_s: float = Field(description="Seconds until the reply, or until there was none", examples=[0.12])
    status_code: int | None = Field(description="What the receiver said", examples=[200])
    error: str | None = Field(description="Why there was no reply", examples=["ConnectTimeout"])


class DeliveryReply(schemas.Reply):
    """A webhook, and what became of it."""

    id: str = Field(description="The `webhook-id`, the same on every attempt", examples=[EXAMPLE_ID])
    job_id: str | None = Field(description="null: a test", examples=[schemas.EXAMPLE_ID])
    run: int | None = Field(description="Which run of the job it tells of")
    type: str = Field(description="What it tells", examples=["job.finished", "webhook.test"])
    url: str = Field(description="Where it goes", examples=["https://example.org/hook"])
    status: DeliveryStatus = Field(
        description="preparing: not rendered yet; pending: waits for its next attempt; delivered; failed: given up"
    )
    attempts: list[AttemptReply] = Field(description="Oldest first")
    next_attempt_at: str | None = Field(description="null: there is no next", examples=[None])
    created_at: schemas.Time
    finished_at: str | None = Field(
        description="When it was delivered or given up", examples=[schemas.EXAMPLE_TIME]
    )


class DeliveriesReply(schemas.Reply):
    """A page of deliveries."""

    data: list[DeliveryReply] = Field(description="Newest first")
    next_cursor: schemas.NextCursor


class SecretReply(schemas.Reply):
    """What webhooks are signed with."""

    secret: str = Field(description="As Standard Webhooks libraries take it", examples=["whsec_…"])


class FinishedJob(JobReply):
    """A job, as its webhook tells of it."""

    results_sha256: str | None = Field(
        None, description="With results_url: of what it gives as jsonl, unpacked, in hexadecimal"
    )


class FinishedWebhook(schemas.Reply):
    """What is POSTed to REQUEST_API when a job is finished."""

    type: str = Field(description="Always job.finished", examples=["job.finished"])
    timestamp: schemas.Time
    data: FinishedJob


SIGNATURE_HEADERS = [
    {
        "name": name,
        "in": "header",
        "required": True,
        "description": description,
        "schema": {"type": "string"},
    }
    for name, description in {
        "webhook-id": "The message's id, the same on every attempt",
        "webhook-timestamp": "When this attempt was sent, in whole seconds since 1970",
        "webhook-signature": "`v1,<base64>`: HMAC-SHA256 over `id.timestamp.body`",
    }.items()
]
SENT: dict[str, Json] = {
    "job.finished": {
        "post": {
            "operationId": "job_finished",
            "tags": ["webhooks"],
            "summary": "A job is finished",
            "description": (
                "POSTed to REQUEST_API, signed by Standard Webhooks 1.0. Over 256 KiB the results are left out, and "
                "`results_url` opens without a token for 7 days."
            ),
            "parameters": SIGNATURE_HEADERS,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": schemas.shape(FinishedWebhook)}},
            },
            "responses": {
                "2XX": {"description": "Taken"},
                "410": {"description": "Not wanted any more: it is given up"},
                "default": {"description": "Tried again, up to 8 times, `Retry-After` heeded"},
            },
        }
    }
}


@api.get(
    "/webhooks/secret",
    summary="The secret that signs webhooks (admin)",
    description="Give it to a Standard Webhooks library, as it is.",
    responses={200: schemas.answer("The secret", SecretReply)},
)
def get_webhook_secret() -> Json:
    return {"secret": service().settings.webhook_secret}


@api.post(
    "/webhooks/test",
    summary="Send a test webhook (admin)",
    description="A `webhook.test` goes to REQUEST_API; `GET /deliveries/<id>` tells what became of it.",
    responses={202: schemas.answer("The delivery, not sent yet", DeliveryReply), **schemas.problems(507)},
)
def send_test_webhook() -> tuple[Json, int]:
    return _render(service().deliveries.send_test(caller())), 202


@api.get(
    "/deliveries",
    summary="Webhook deliveries with their attempts, newest first",
    description="One's own jobs', and for an admin with `?all=true` everyone's.",
    responses={200: schemas.answer("A page of deliveries", DeliveriesReply), **schemas.problems(403)},
)
def list_deliveries(query: DeliveryQuery) -> Json:
    records, next_cursor = service().deliveries.list_deliveries(
        caller(),
        everyone=query.all,
        job_id=query.job_id,
        status=query.status,
        before=query.cursor,
        limit=query.limit,
    )
    return {"data": [_render(record) for record in records], "next_cursor": next_cursor}


@api.get(
    "/deliveries/<id>",
    summary="One delivery with its attempts",
    description="The delivery as it stands now.",
    responses={200: schemas.answer("The delivery", DeliveryReply)},
)
def get_delivery(path: DeliveryPath) -> Json:
    return _render(service().deliveries.get_delivery(path.id, caller()))


@api.post(
    "/deliveries/<id>/redeliver",
    summary="Send a delivery again",
    description="A fresh schedule that begins now, with the same `webhook-id` and the same body.",
    responses={
        202: schemas.answer("The delivery, not sent yet", DeliveryReply),
        **schemas.problems(409, 507),
    },
)
def redeliver(path: DeliveryPath) -> tuple[Json, int]:
    return _render(service().deliveries.redeliver(path.id, caller())), 202


@api.post(
    "/",
    summary="Take a webhook that is signed with our own secret",
    description="Answers with what it got, so that the default REQUEST_API works out of the box.",
    responses={
        200: schemas.content("The body as it came", {"application/json": {"schema": {}}}),
        **schemas.problems(400, 408, 413),
    },
    openapi_extensions={
        "requestBody": {"required": True, "content": {"application/json": {"schema": {}}}},
        schemas.HEADER_PARAMETERS: SIGNATURE_HEADERS,
    },
)
def echo() -> Response:
    message_id, sent_at, signatures = (
        request.headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature")
    )
    if not (message_id and sent_at and signatures):
        raise Unauthenticated("This address takes webhooks that are signed with the service's own secret.")
    body = _read_body(service().settings.max_json_bytes)
    try:
        service().deliveries.verify(message_id, sent_at, signatures, body)
    except SignatureInvalid as error:
        raise Unauthenticated(f"The webhook's signature is not good: {error}.") from error
    return Response(body, mimetype="application/json")


def _read_body(limit_bytes: int) -> bytes:
    request.max_content_length = limit_bytes
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge as error:
        raise TooLarge(f"The body is over MAX_JSON_BYTES, {limit_bytes} bytes.") from error


def _render(record: DeliveryRecord) -> Json:
    delivery = record.delivery
    return {
        "id": delivery.id,
        "job_id": delivery.job_id,
        "run": delivery.run if delivery.job_id else None,
        "type": delivery.type,
        "url": delivery.url.partition("?")[0],  # its query may hold a secret
        "status": delivery.status,
        "attempts": [
            {
                "number": attempt.number,
                "sent_at": render_time(attempt.sent_at),
                "took_s": attempt.took_s,
                "status_code": attempt.status_code,
                "error": attempt.error,
            }
            for attempt in record.attempts
        ],
        "next_attempt_at": render_time(delivery.next_attempt_at),
        "created_at": render_time(delivery.created_at),
        "finished_at": render_time(delivery.finished_at),
    }
