"""The API keys, as an operator sees them."""

from dataclasses import asdict
from typing import Any

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from gpt_worker.api import schemas
from gpt_worker.api.access import holder
from gpt_worker.api.context import client_left, service
from gpt_worker.errors import Unavailable
from gpt_worker.keys import KeyReport
from gpt_worker.rendering import render_time
from gpt_worker.transport import CallLeft, leaving_when

Json = dict[str, Any]

RETRY_AFTER_S = 5

api = APIBlueprint(
    "keys", __name__, abp_tags=[Tag(name="keys", description="The API keys and how they fare")]
)


class KeyPath(BaseModel):
    number: int = Field(ge=0, description="The number of GPT_KEY_<n>", json_schema_extra={"example": 0})


class LastErrorReply(schemas.Reply):
    """What went wrong with a key at last."""

    code: str = Field(examples=["rate_limited"])
    message: str
    at: schemas.Time


class LimitsReply(schemas.Reply):
    """A model's limits on a key."""

    requests: int | None = Field(description="Of the window, as the endpoint told")
    requests_remaining: int | None
    tokens: int | None
    tokens_remaining: int | None


class KeyReply(schemas.Reply):
    """An API key; never the key itself."""

    name: str = Field(examples=["key 0"])
    tail: str = Field(description="Its last 4 characters", examples=["x7Qd"])
    base_url: str = Field(examples=["https://api.openai.com/v1"])
    group: str | None = Field(description="organisation/project: keys of one group share limits and quota")
    state: str = Field(description="ready, resting, out of quota or refused", examples=["ready"])
    until: str | None = Field(description="When it is tried again, if that is known")
    in_flight: int = Field(description="Calls that have no reply yet", examples=[3])
    threads: int = Field(description="The most calls at once, now", examples=[8])
    bound_by: str | None = Field(description="requests, tokens, threads, or null: what holds it back")
    requests: int = Field(description="Calls since the start", examples=[1200])
    tokens: int = Field(description="Tokens since the start", examples=[340000])
    rate_limited: int = Field(description="429s since the start", examples=[0])
    limits: dict[str, LimitsReply] = Field(description="By model, as learned from the endpoint")
    last_error: LastErrorReply | None


class KeysReply(schemas.Reply):
    """All keys, on one page."""

    data: list[KeyReply]
    next_cursor: schemas.NextCursor


@api.get(
    "/keys",
    summary="The API keys (admin)",
    responses={200: schemas.answer("Every key", KeysReply)},
)
def list_keys() -> Json:
    """Every key and how it fares."""
    return {"data": [_render(report) for report in service().keys.reports()], "next_cursor": None}


@api.post(
    "/keys/<int:number>/check",
    summary="Try a key now (admin)",
    description="Asks the endpoint for its models with this key; a key that works is used again.",
    responses={200: schemas.answer("The key after the try", KeyReply)},
)
def check_key(path: KeyPath) -> Json:
    """Try a key."""
    parts, left = service(), client_left()
    with parts.places.hold(holder()) as held:
        if not held:
            raise Unavailable("Too many requests are held open.", RETRY_AFTER_S)
        try:
            with leaving_when(lambda: parts.stopping or left()):
                return _render(parts.keys.check(path.number))
        except CallLeft as error:
            why = "The service is stopping." if parts.stopping else "The client did not wait for the check."
            raise Unavailable(why, RETRY_AFTER_S) from error


def _render(report: KeyReport) -> Json:
    error = report.last_error
    return {
        "name": report.name,
        "tail": report.tail,
        "base_url": report.base_url,
        "group": report.group,
        "state": report.state,
        "until": render_time(report.until),
        "in_flight": report.in_flight,
        "threads": report.threads,
        "bound_by": report.bound_by,
        "requests": report.requests,
        "tokens": report.tokens,
        "rate_limited": report.rate_limited,
        "limits": {model: asdict(limits) for model, limits in report.limits.items()},
        "last_error": {"code": error.code, "message": error.message, "at": render_time(error.at)}
        if error
        else None,
    }
