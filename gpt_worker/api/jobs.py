"""Jobs over HTTP: submit and wait, look, results, cancel, retry."""

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

from flask import Response, jsonify, request, stream_with_context
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from gpt_worker import rendering
from gpt_worker.api import examples, schemas
from gpt_worker.api import job_schemas as shapes
from gpt_worker.api.access import by_link, caller, holder, token_id
from gpt_worker.api.context import client_left, service
from gpt_worker.api.sending import hold_place, in_place
from gpt_worker.api.upload_query import UploadQuery
from gpt_worker.api.uploads import Received, receive
from gpt_worker.domain import DeliveryMode, JobStatus, utc_now
from gpt_worker.errors import Forbidden, Invalid, Unavailable
from gpt_worker.gzip_members import pack
from gpt_worker.jobs import Idempotency, JobRequest, StillAdmitted
from gpt_worker.models import JobRow
from gpt_worker.packing import plan
from gpt_worker.signing import link_is_valid
from gpt_worker.splitting import chunk_limit, split

Json = dict[str, Any]
Answer = tuple[Json, int, dict[str, str]]

MAX_KEY_LENGTH = 255
RESULT_FORMS: dict[str, tuple[str, Callable[..., Iterator[bytes]]]] = {
    "json": ("application/json", rendering.results_json),
    "jsonl": ("application/jsonl", rendering.results_jsonl),
    "csv": ("text/csv; charset=utf-8", rendering.results_csv),
}
SUBMIT: Json = {
    "summary": "Submit a job",
    "description": (
        "Inline: the reply is the finished job (200), or 202 with `Location` when it takes longer than INLINE_WAIT_S "
        "or `Prefer: wait=N`, or at once with `Prefer: respond-async`. Webhook: 202 at once, the result by POST later. "
        "With `Idempotency-Key` the same request gives the same job again.\n\n"
        "With a file as the body the settings go into the query; with JSON and in a form they don't. "
        "Every body may come with `Content-Encoding: gzip`."
    ),
    "responses": {
        200: schemas.content(
            "The finished job; with `dry_run=true` what it would be",
            {
                "application/json": {
                    "schema": {"anyOf": [schemas.shape(shapes.JobReply), schemas.shape(shapes.DryRunReply)]}
                }
            },
            "Idempotency-Replayed",
        ),
        202: schemas.answer(
            "The job, not finished yet, without results", shapes.JobReply, "Location", "Idempotency-Replayed"
        ),
        **schemas.problems(409, 429, 507, *schemas.BODY_PROBLEMS),
    },
    "openapi_extensions": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schemas.shape(shapes.JobBody), "examples": examples.JOBS},
                "multipart/form-data": {
                    "schema": schemas.shape(shapes.JobForm),
                    "example": examples.FORM,
                    "encoding": {
                        "settings": {"contentType": "application/json"},
                        "metadata": {"contentType": "application/json"},
                        "file": {"contentType": "text/csv, application/jsonl, application/x-ndjson"},
                    },
                },
                "text/csv": schemas.text(examples.CSV),
                "application/jsonl": schemas.text(examples.JSONL),
                "application/x-ndjson": schemas.text(examples.JSONL),
            },
        },
        schemas.HEADER_PARAMETERS: [
            {
                "name": "Prefer",
                "in": "header",
                "description": "`respond-async`: 202 at once; `wait=N`: after N seconds at the latest (RFC 7240)",
                "schema": {"type": "string"},
            },
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "For 24 hours, this key and request give this job",
                "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
            },
        ],
    },
}

api = APIBlueprint(
    "jobs", __name__, abp_tags=[Tag(name="jobs", description="What GPT is asked, and what it said")]
)


@api.post("/jobs", **SUBMIT)
def submit(query: UploadQuery) -> Json | Answer | Response:
    """Submit a job."""
    return _submit(query)


@api.post("/task", **{**SUBMIT, "summary": "Submit a job, under its old name"})
def submit_task(query: UploadQuery) -> Json | Answer | Response:
    """The same as POST /jobs."""
    return _submit(query)


def _submit(query: UploadQuery) -> Json | Answer | Response:
    dry_run = query.dry_run == "true"
    key = None if dry_run else _idempotency_key()
    if not dry_run:
        service().jobs.check_limits(caller(), None if key is None else _sha256(key))
    with receive(query, hashed=key is not None) as received:
        if dry_run:
            return _dry_run(received.job)
        prefer = _prefer()
        submitted = service().jobs.submit(
            caller(), received.job, _idempotency(key, received), _still_admitted()
        )
    return _wait_for(submitted.job_id, prefer, submitted.replayed)


@api.get(
    "/jobs",
    summary="One's own jobs",
    responses={200: schemas.answer("A page of jobs", shapes.JobsReply), **schemas.problems(403)},
)
def list_jobs(query: shapes.JobsQuery) -> Response:
    """Newest first, without results."""
    everyone = query.all == "true"
    if everyone and not caller().is_admin:
        raise Forbidden("Only an admin may list everyone's jobs.")
    status = JobStatus(query.status) if query.status else None
    jobs = service().jobs.list(
        caller(), everyone=everyone, status=status, before=query.cursor, limit=query.limit + 1
    )
    page = jobs[: query.limit]
    return in_place(
        {
            "data": _render_list(page),
            "next_cursor": page[-1].id if len(jobs) > query.limit else None,
        }
    )


@api.get(
    "/jobs/<id>",
    summary="A job",
    description="As it stands now. Over 64 KiB it takes a place, as downloads do: 503 while there is none.",
    responses={200: schemas.answer("The job", shapes.JobReply)},
)
def get_job(path: schemas.IdPath, query: shapes.JobQuery) -> Json | Response:
    """The job as it stands now."""
    job = service().jobs.find(caller(), path.id)
    if query.results == "false":
        return _render(job, with_results=False)
    return in_place(_render(job, with_results=True))


@api.get(
    "/jobs/<id>/results",
    summary="A job's results",
    description=(
        "Streamed in the order of `data`, also while the job runs; jsonl and csv give what is decided so far. "
        "Packed to a client that accepts gzip."
    ),
    responses={
        200: schemas.content(
            "The results in the form that was asked for",
            {
                "application/json": {
                    "schema": schemas.shape(shapes.ResultsReply),
                    "example": examples.RESULTS_JSON,
                },
                "application/jsonl": schemas.text(examples.RESULTS_JSONL),
                "text/csv": schemas.text(examples.RESULTS_CSV),
            },
            "Content-Disposition",
        ),
        **schemas.problems(403),
    },
)
def get_results(path: schemas.IdPath, query: shapes.ResultsQuery) -> Response:
    """The results as a file."""
    parts = service()
    if by_link():
        values = {"expires": query.expires or "", "signature": query.signature or ""}
        if not link_is_valid(parts.link_key, path.id, values, utc_now()):
            raise Forbidden("The link is not valid, or no longer.")
        job = parts.jobs.find_by_link(path.id)
    else:
        job = parts.jobs.find(caller(), path.id)
    mimetype, render = RESULT_FORMS[query.format]
    takes_gzip = request.accept_encodings.quality("gzip") > 0
    with ExitStack() as until_sent:
        hold_place(until_sent)
        stored = None
        if query.format == "jsonl":
            stored = parts.result_files.find(job, unpacked=not takes_gzip)
        if stored is None:
            rendered = render(parts.database, job.id)
            first = next(rendered, b"")  # here: what is wrong from the first can still be told
            pieces = stream_with_context(chain([first], rendered))
            reply = Response(pack(pieces) if takes_gzip else pieces, content_type=mimetype)
        else:
            reply = Response(stored.pieces, content_type=mimetype)
            if stored.size_bytes is not None:
                reply.content_length = stored.size_bytes
        reply.call_on_close(until_sent.pop_all().close)
    if takes_gzip:
        reply.headers["Content-Encoding"] = "gzip"
    reply.vary.add("Accept-Encoding")
    if query.format == "csv":
        reply.headers["Content-Disposition"] = f'attachment; filename="{job.id}.csv"'
    return reply


@api.delete(
    "/jobs/<id>",
    summary="Cancel or delete a job",
    description="Cancelled: nothing new is sent; calls in flight still land and are kept. `?purge=true`: gone.",
    responses={
        200: schemas.answer(
            "The cancelled job, or the finished one as it was; without large results where every place is taken",
            shapes.JobReply,
        ),
        204: None,
        **schemas.problems(507),
    },
)
def cancel_job(path: schemas.IdPath, query: shapes.PurgeQuery) -> Json | Response:
    """Cancel a job, or delete it."""
    jobs = service().jobs
    if query.purge == "true":
        jobs.purge(caller(), path.id)
        return Response(status=204)
    jobs.cancel(caller(), path.id)
    return _done(jobs.find(caller(), path.id))


@api.post(
    "/jobs/<id>/retry",
    summary="Ask the tasks without an answer again",
    description="Ends in a new webhook. 200, unchanged, if there is nothing to retry.",
    responses={
        200: schemas.answer(
            "The job, unchanged, as there is nothing to retry; without large results where every place is taken",
            shapes.JobReply,
        ),
        202: schemas.answer("The job in its next run, without results", shapes.JobReply, "Location"),
        **schemas.problems(409, 429, 507, *schemas.BODY_PROBLEMS),
    },
    openapi_extensions={
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": schemas.shape(shapes.RetryBody)}},
        }
    },
)
def retry_job(path: schemas.IdPath) -> Json | Answer | Response:
    """Retry a job."""
    has_body = bool(request.content_length or request.headers.get("Transfer-Encoding"))
    body = shapes.RetryBody.model_validate(request.get_json() if has_body else {})
    jobs = service().jobs
    if not jobs.retry(caller(), path.id, body.codes, _still_admitted()):
        return _done(jobs.find(caller(), path.id))
    return _accepted(jobs.find(caller(), path.id))


def _done(job: JobRow) -> Json | Response:
    """The job to which something was done; where its results are large and every place is taken, without them."""
    try:
        return in_place(_render(job, with_results=True))
    except Unavailable:
        return _render(job, with_results=False)


def _render(job: JobRow, *, with_results: bool) -> Json:
    waiting = _waiting(job)
    with service().database.read() as session:
        return rendering.render_job(session, job, with_results=with_results, waiting=waiting)


def _render_list(jobs: Sequence[JobRow]) -> list[Json]:
    waiting = {job.id: _waiting(job) for job in jobs}
    with service().database.read() as session:
        return rendering.render_list(session, jobs, waiting)


def _waiting(job: JobRow) -> Json | None:
    """Why nothing of an unfinished job moves."""
    waiting = service().dispatcher.waiting(job.id) if job.finished_at is None else None
    return {"reason": waiting.reason, "until": rendering.render_time(waiting.until)} if waiting else None


def _accepted(job: JobRow) -> Answer:
    return _render(job, with_results=False), 202, {"Location": f"/jobs/{job.id}"}


def _wait_for(job_id: str, wait_s: float | None, replayed: bool) -> Answer | Response:
    """The finished job if it ends in time, else 202. The place of the wait is held until the finished job is sent."""
    parts = service()
    extra = {"Idempotency-Replayed": "true"} if replayed else {}
    job = _own(job_id)
    if job.delivery == DeliveryMode.INLINE and wait_s is not None:
        with ExitStack() as until_sent:
            held = until_sent.enter_context(parts.places.hold(holder()))
            if held and parts.jobs.wait(job_id, wait_s, client_left()):
                finished = jsonify(_render(_own(job_id), with_results=True))
                finished.headers.update(extra)
                finished.call_on_close(until_sent.pop_all().close)
                return finished
        job = _own(job_id)
    reply, status, headers = _accepted(job)
    return reply, status, {**headers, **extra}


def _still_admitted() -> StillAdmitted:
    """Whether this request would still be let in: who sends a body may have lost their token since it began."""
    return partial(service().accounts.admit_again, None if caller().user_id is None else token_id())


def _own(job_id: str) -> JobRow:
    return service().jobs.find(caller(), job_id)


def _prefer() -> float | None:
    """How long to wait for the job, by INLINE_WAIT_S and `Prefer`; None: not at all. RFC 7240."""
    wait_s = service().settings.inline_wait_s
    for preference in ",".join(request.headers.getlist("Prefer")).split(","):
        name, _, value = preference.split(";")[0].partition("=")
        match name.strip().lower():
            case "respond-async":
                return None
            case "wait" if re.fullmatch(r'"?\d{1,9}"?', value.strip(), re.ASCII):
                wait_s = min(wait_s, int(value.strip().strip('"')))
    return wait_s


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
        raise Invalid.at(f"must have 1 to {MAX_KEY_LENGTH} characters", "header", "Idempotency-Key")
    return key


def _idempotency(key: str | None, received: Received) -> Idempotency | None:
    if key is None:
        return None
    assert received.said is not None
    return Idempotency(_sha256(key), _sha256(received.said))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _dry_run(asked: JobRequest) -> Json:
    dispatcher = service().dispatcher
    tokens = array("Q", (task.tokens for task in asked.tasks))
    requests, prompt_tokens = len(tokens), sum(tokens)
    if asked.settings.pack:
        packs = array("Q", plan(tokens, asked.settings))
        requests = chunks = len(packs)
        prompt_tokens = sum(packs)
    else:
        limit = chunk_limit(len(tokens), dispatcher.threads)
        chunks = sum(1 for _ in split(tokens, asked.settings.max_chunk_tokens, limit))
    seconds = dispatcher.estimate_s(asked.model, requests, prompt_tokens)
    return {
        "dry_run": True,
        "tasks": len(tokens),
        "chunks": chunks,
        "estimated_prompt_tokens": prompt_tokens,
        "estimated_seconds": None if seconds is None or math.isinf(seconds) else round(seconds, 1),
    }
