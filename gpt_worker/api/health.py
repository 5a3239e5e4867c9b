"""Is it alive, and can it work?"""

import shutil
from collections.abc import Sequence
from typing import Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from gpt_worker.api import schemas
from gpt_worker.api.context import service
from gpt_worker.errors import Unavailable
from gpt_worker.jobs import MIN_FREE_BYTES
from gpt_worker.lanes import Lane
from gpt_worker.ownership import is_still_owner

Json = dict[str, Any]

api = APIBlueprint(
    "health", __name__, abp_tags=[Tag(name="health", description="Is it alive, and can it work?")]
)


class HealthReply(schemas.Reply):
    """What is running here."""

    status: str = Field(examples=["ok"])
    upstream: str = Field(description="Where answers come from", examples=["https://api.openai.com/v1"])
    model: str = Field(description="The default model", examples=["gpt-5.4-mini"])
    keys: int = Field(description="How many API keys there are", examples=[2])
    embedded: bool = Field(description="Whether the embedded model answers, since there is no API key")
    version: str = Field(description="Of gpt-worker", examples=["0.1.0"])


class ReadyReply(schemas.Reply):
    """It takes work."""

    status: str = Field(examples=["ready"])
    degraded: list[str] = Field(description="What does not work, though the service does", examples=[[]])


@api.get("/healthz", summary="Alive", responses={200: schemas.answer("It is", HealthReply)})
def healthz() -> Json:
    """Answers as long as the process does."""
    parts = service()
    settings = parts.settings
    endpoints = sorted({key.base_url for key in settings.api_keys})
    return {
        "status": "ok",
        "upstream": "embedded" if settings.embedded else ", ".join(endpoints),
        "model": parts.model_name,
        "keys": len(settings.api_keys),
        "embedded": settings.embedded,
        "version": parts.version,
    }


@api.get(
    "/readyz",
    summary="Ready to work",
    responses={200: schemas.answer("It is", ReadyReply), **schemas.problems(503)},
)
def readyz() -> Json | Response:
    """503 with the reason while work can't be accepted; `degraded` while it can, but not all is well."""
    parts = service()
    reason = _not_ready()
    if reason is not None:
        raise Unavailable(reason, 5)
    degraded: list[str] = []
    if parts.dispatcher.usable_lanes(parts.model_name) == 0:
        degraded.append(parts.dispatcher.inspect(_why_no_key))
    if parts.result_files.trouble is not None:
        degraded.append(f"drive: {parts.result_files.trouble}")
    return {"status": "ready", "degraded": degraded}


def _why_no_key(lanes: Sequence[Lane], _now_s: float) -> str:
    """Why none is usable: the embedded model's own sentence, such as that it is starting, says more."""
    return next((lane.down for lane in lanes if lane.down), "no usable key")


def _not_ready() -> str | None:
    parts = service()
    if parts.stopping:
        return "The service is shutting down."
    if not parts.ready:
        return "The service is starting."
    try:
        with parts.database.read() as session:
            session.execute(text("SELECT name FROM modes"))  # SQLite reads no page for less
    except SQLAlchemyError:
        return parts.database.trouble or "The database can't be used."
    if parts.database.trouble is not None:
        return parts.database.trouble
    if not is_still_owner(parts.settings.data_dir):
        return "DATA_DIR is not this service's own any more: its lock file is gone, or another's."
    if not parts.recorder.healthy:
        return "The database takes no answers."
    if shutil.disk_usage(parts.settings.data_dir).free < MIN_FREE_BYTES:
        return "Less than 200 MiB of disk are free."
    return None
