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
from gpt_worker.domain import DeliveryStatus
from gpt_worker.errors import TooLarge, Unauthenticated
from gpt_worker.rendering import render_time
from gpt_worker.signing import SignatureInvalid
from gpt_worker.store.deliveries import DeliveryRecord

Json = dict[str, Any]

BEARER: list[dict[str, list[Any]]] = [{"bearer": []}]
EXAMPLE_ID = f"msg_{schemas.EXAMPLE_ID}"

api = APIBlueprint(
    "webhooks", __name__, abp_tags=[Tag(name="webhooks", description="Finished jobs, POSTed to REQUEST_API")]
)


class DeliveryPath(schemas.IdPath):
    id: str = Field(description="The delivery's id", json_schema_extra={"example": EXAMPLE_ID})


class DeliveryQuery(schemas.Query):
    job_id: str | None = Field(None, pattern="^[0-9a-f]{32}$", description="Only this job's")
    status: DeliveryStatus | None = Field(None, description="Only those that stand there")
    all: bool = Field(False, description="Everyone's (admin)")
    limit: int = Field(20, ge=1, le=100, description="How many at most")
    cursor: str | None = Field(
        None, pattern="^msg_[0-9a-f]{32}$", description="The `next_cursor` of the page before"
    )


class AttemptReply(schemas.Reply):
    number: int = Field(description="1 for the first")
    sent_at: str
    took_s: float
    status_code: int | None = Field(description="What the receiver said", examples=[200])
    error: str | None = Field(description="Why there was no reply", examples=["ConnectTimeout"])


class DeliveryReply(schemas.Reply):
    id: str = Field(description="The `webhook-id`, the same on every attempt", examples=[EXAMPLE_ID])
    job_id: str | None = Field(examples=[schemas.EXAMPLE_ID])
    run: int | None = Field(description="Which run of the job it tells of")
    type: str = Field(examples=["job.finished", "webhook.test"])
    url: str
    status: DeliveryStatus
    attempts: list[AttemptReply]
    next_attempt_at: str | None
    created_at: str = Field(examples=[schemas.EXAMPLE_TIME])
    finished_at: str | None


class DeliveriesReply(schemas.Reply):
    data: list[DeliveryReply]
    next_cursor: str | None


class SecretReply(schemas.Reply):
    secret: str = Field(examples=["whsec_…"])


@api.get(
    "/webhooks/secret",
    summary="The secret that signs webhooks (admin)",
    security=BEARER,
    responses={200: SecretReply, **schemas.problems(401, 403)},
)
def secret() -> Json:
    return {"secret": service().settings.webhook_secret}


@api.post(
    "/webhooks/test",
    summary="Send a test webhook (admin)",
    security=BEARER,
    responses={202: DeliveryReply, **schemas.problems(401, 403)},
)
def test() -> tuple[Json, int]:
    return _render(service().deliveries.send_test(caller())), 202


@api.get(
    "/deliveries",
    summary="Webhook deliveries with their attempts, newest first",
    security=BEARER,
    responses={200: DeliveriesReply, **schemas.problems(401, 403, 422)},
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
    security=BEARER,
    responses={200: DeliveryReply, **schemas.problems(401, 404)},
)
def get_delivery(path: DeliveryPath) -> Json:
    return _render(service().deliveries.get_delivery(path.id, caller()))


@api.post(
    "/deliveries/<id>/redeliver",
    summary="Send a delivery again",
    description="A fresh schedule that begins now, with the same `webhook-id` and the same body.",
    security=BEARER,
    responses={202: DeliveryReply, **schemas.problems(401, 404, 409)},
)
def redeliver(path: DeliveryPath) -> tuple[Json, int]:
    return _render(service().deliveries.redeliver(path.id, caller())), 202


@api.post(
    "/",
    summary="Take a webhook that is signed with our own secret",
    description="Answers with what it got, so that the default REQUEST_API works out of the box.",
    responses={200: {"description": "The body as it came"}, **schemas.problems(401, 413)},
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
        "url": delivery.url,
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
