"""Everything that goes wrong, as RFC 9457 problems: `{type, title, status, detail, request_id, errors?}`.

`type` is `urn:gpt-worker:problem:<name>` for the errors of `errors.py` (`not-found`, `invalid`, `too-many`)
and `about:blank` where the HTTP status says it all. Names of fields may appear in a problem; the values of the
caller, SQL and tracebacks never do. This is also where every reply gets its `X-Request-Id`.
"""

import errno
import json
import logging
import math
import re
from collections.abc import Sequence
from http import HTTPStatus

from flask import Flask, Response, g, request
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from gpt_worker.api.context import service
from gpt_worker.api.job_schemas import meant_setting
from gpt_worker.api.upload_query import UploadQuery
from gpt_worker.db import is_full, trouble_of
from gpt_worker.domain import new_id
from gpt_worker.errors import (
    Conflict,
    DiskLow,
    FieldError,
    Forbidden,
    GptWorkerError,
    Invalid,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from gpt_worker.write_gate import DatabaseUnusable

logger = logging.getLogger(__name__)

MIMETYPE = "application/problem+json"
DATABASE_RETRY_AFTER_S = 5
MAX_ERRORS = 100
MAX_NAME_LENGTH = 200
FOR_BROWSERS = (
    "This is gpt-worker; see /docs for what it does. This address itself takes signed webhooks, by POST."
)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

STATUSES: dict[type[GptWorkerError], tuple[HTTPStatus, str]] = {
    NotFound: (HTTPStatus.NOT_FOUND, "not-found"),
    Forbidden: (HTTPStatus.FORBIDDEN, "forbidden"),
    Conflict: (HTTPStatus.CONFLICT, "conflict"),
    Invalid: (HTTPStatus.UNPROCESSABLE_ENTITY, "invalid"),
    TooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too-large"),
    Unauthenticated: (HTTPStatus.UNAUTHORIZED, "unauthenticated"),
    TooMany: (HTTPStatus.TOO_MANY_REQUESTS, "too-many"),
    Unavailable: (HTTPStatus.SERVICE_UNAVAILABLE, "unavailable"),
    DiskLow: (HTTPStatus.INSUFFICIENT_STORAGE, "disk-low"),
}

# pydantic's messages of these kinds repeat a piece of the input
SILENT_MESSAGES = {
    "union_tag_invalid": "is none of the known kinds",
    "json_invalid": "is not JSON",
    "uuid_parsing": "is not a UUID",
    "extra_forbidden": "is not known here",
    "missing": "is required",
}


def install(app: Flask) -> None:
    """Make every failure of this app a problem, and give every reply its request id."""
    app.register_error_handler(GptWorkerError, _refused)
    app.register_error_handler(HTTPException, _http_problem)
    app.register_error_handler(ValidationError, validation_problem)
    for kind in (DBAPIError, DatabaseUnusable, PoolTimeout):
        app.register_error_handler(kind, _database_problem)
    app.register_error_handler(OSError, _system_problem)
    app.register_error_handler(Exception, _bug)
    app.after_request(_name_request)


def request_id() -> str:
    """The caller's `X-Request-Id` if it is a sound one, else one of ours; the same all through a request."""
    if "request_id" not in g:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if REQUEST_ID.fullmatch(given) else new_id()
    return str(g.request_id)


def problem(
    status: int,
    detail: str,
    *,
    name: str | None = None,
    errors: Sequence[FieldError] = (),
    retry_after_s: float | None = None,
) -> Response:
    """The reply of a failure; `name` is the last part of its `type`, None where the status says it all."""
    body: dict[str, object] = {
        "type": f"urn:gpt-worker:problem:{name}" if name else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id(),
    }
    if errors:
        body["errors"] = [{"loc": [_short(part) for part in error.loc], "msg": error.msg} for error in errors]
    # A lone surrogate, which UTF-8 has not, gets a backslash and so is what JSON writes for it.
    text = json.dumps(body, ensure_ascii=False).encode(errors="backslashreplace")
    reply = Response(text + b"\n", status, mimetype=MIMETYPE)
    if status == HTTPStatus.UNAUTHORIZED:
        reply.headers["WWW-Authenticate"] = "Bearer"
    if retry_after_s is not None:
        reply.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return reply


def validation_problem(error: ValidationError) -> Response:
    """422 for input that does not fit its schema; also flask-openapi3's `validation_error_callback`."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return _refused(
        Invalid(
            *(FieldError(detail["loc"], _message(detail, error.title)) for detail in details[:MAX_ERRORS])
        )
    )


def _message(detail: ErrorDetails, schema: str) -> str:
    message = SILENT_MESSAGES.get(detail["type"], detail["msg"])
    if detail["type"] != "extra_forbidden":
        return message
    match detail["loc"]:
        case ("settings", str(name)):
            meant = meant_setting(name)
        case (str(name),) if schema == UploadQuery.__name__:
            meant = meant_setting(name)
        case _:
            meant = None
    return f"{message}: did you mean {meant}?" if meant else message


def _refused(error: GptWorkerError) -> Response:
    found = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), None)
    if found is None:
        return _bug(error)
    status, name = found
    if isinstance(error, Invalid):
        shown = error.errors[:MAX_ERRORS]
        return problem(status, _summary(shown), name=name, errors=shown)
    retry_after_s = error.retry_after_s if isinstance(error, TooMany | Unavailable) else None
    return problem(status, str(error), name=name, retry_after_s=retry_after_s)


def _summary(errors: Sequence[FieldError]) -> str:
    shown = [f"{'.'.join(str(_short(part)) for part in error.loc)}: {error.msg}" for error in errors[:3]]
    more = len(errors) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _short(part: str | int) -> str | int:
    return part if isinstance(part, int) or len(part) <= MAX_NAME_LENGTH else part[:MAX_NAME_LENGTH] + "…"


def _http_problem(error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    detail = error.description or HTTPStatus(status).phrase
    if isinstance(error, MethodNotAllowed) and (request.method, request.path) == ("GET", "/"):
        detail = FOR_BROWSERS
    reply = problem(status, detail)
    for name, value in error.get_headers(request.environ):
        if name.lower() not in ("content-type", "www-authenticate"):
            reply.headers[name] = value  # Allow of a 405, for one
    return reply


def _database_problem(error: DBAPIError | DatabaseUnusable | PoolTimeout) -> Response:
    if is_full(error):
        return _refused(DiskLow("The disk is full."))
    trouble = trouble_of(error)
    if trouble is None and not isinstance(error, OperationalError):
        return _bug(error)
    logger.error(
        "The database failed%s",
        f": {trouble}" if trouble else ".",
        exc_info=None if trouble else error,  # trouble lasts, and fails every request alike
        extra={"action": "database_failed"},
    )
    return _refused(Unavailable("The database can't be used now.", DATABASE_RETRY_AFTER_S))


def _system_problem(error: OSError) -> Response:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _refused(DiskLow("The disk is full."))
    data_dir = service().settings.data_dir
    if not data_dir.is_dir():
        logger.error("DATA_DIR %s is not there.", data_dir, extra={"action": "data_dir_gone"})
        return _refused(Unavailable("The service's files can't be used now.", DATABASE_RETRY_AFTER_S))
    return _bug(error)


def _bug(error: Exception) -> Response:
    logger.error(
        "A request failed: %s %s.",
        request.method,
        request.endpoint,
        exc_info=error,
        extra={"action": "request_failed", "request_id": request_id()},
    )
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here; the log knows more.")


def _name_request(reply: Response) -> Response:
    reply.headers["X-Request-Id"] = request_id()
    return reply
