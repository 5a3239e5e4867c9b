"""A job's progress as server-sent events. Source: WHATWG, HTML, "Server-sent events"."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy.exc import SQLAlchemyError

from gpt_worker import rendering
from gpt_worker.api import schemas
from gpt_worker.api.access import caller, holder
from gpt_worker.api.context import client_left, service
from gpt_worker.domain import Caller
from gpt_worker.errors import NotFound, Unavailable
from gpt_worker.progress import Event, follow
from gpt_worker.service import Service

Json = dict[str, Any]

log = logging.getLogger(__name__)

COME_BACK_MS = 2000
RETRY_AFTER_S = 5
SILENCE = b": the job goes on\n\n"
EXAMPLE = """retry: 2000
event: progress
data: {"status":"running","counts":{"total":100,"answered":60,"failed":0,"pending":40},\
"usage":{"requests":60,"prompt_tokens":900,"completion_tokens":300},"tasks_per_s":20.0,"eta_s":2.0}

event: finished
data: {"id":"019ab2f6c3d04e5f60718293a4b5c6d7","status":"succeeded"}

"""

api = APIBlueprint("events", __name__, abp_tags=[Tag(name="jobs")])


@api.get(
    "/jobs/<id>/events",
    summary="A job's progress, live",
    description=(
        "Server-sent events: `progress` with `{status, counts, usage, tasks_per_s, eta_s}` at once and whenever "
        "something changed, at most twice a second; a comment after 15 s of silence; at the end `finished` with the "
        "job, without its results. A stream that ends without it, as at a restart, is to be opened again. "
        "`tasks_per_s` and `eta_s` are null while nobody can say."
    ),
    responses={
        200: schemas.content(
            "The events, until the job is finished", {"text/event-stream": schemas.text(EXAMPLE)}
        )
    },
)
def get_events(path: schemas.IdPath) -> Response:
    """Follow a job."""
    parts, who = service(), caller()
    parts.jobs.find(who, path.id)
    with ExitStack() as stack:
        if not stack.enter_context(parts.places.hold(holder())):
            raise Unavailable("Too many requests are held open.", RETRY_AFTER_S)
        watch = stack.enter_context(parts.progress.watch(path.id))
        held = stack.pop_all()
    events = follow(lambda: _look(parts, who, path.id), watch, client_left=client_left())
    reply = Response(_frames(events, path.id), content_type="text/event-stream")
    reply.headers["Cache-Control"] = "no-store"
    reply.headers["X-Accel-Buffering"] = "no"  # nginx would keep the events back
    reply.call_on_close(held.close)
    return reply


def _look(parts: Service, who: Caller, job_id: str) -> Json | None:
    """The job as this caller sees it now, without its results; None if they don't any more."""
    try:
        job = parts.jobs.find(who, job_id)
    except NotFound:
        return None
    with parts.database.read() as session:
        return rendering.render_job(session, job, with_results=False)


def _frames(events: Iterator[Event | None], job_id: str) -> Iterator[bytes]:
    retry = f"retry: {COME_BACK_MS}\n"
    try:
        for event in events:
            if event is None:
                yield SILENCE
                continue
            data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
            yield f"{retry}event: {event.name}\ndata: {data}\n\n".encode()
            retry = ""
    except SQLAlchemyError:
        log.exception(
            "a stream of events ends, its job can't be read", extra={"action": "events", "job_id": job_id}
        )
