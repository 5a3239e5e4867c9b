"""What /openapi.json says: the routes as flask-openapi3 collects them, and what it can't know of them.

Who may use a route, and with that its security, its 401 and its 403, is read from the table in `access`; the
shapes are asked of pydantic itself, since flask-openapi3 loses their examples. Nothing here changes what a route does.
"""

import copy
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from flask_openapi3.openapi import OpenAPI
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from gpt_worker.api.access import LINK_PARAMETER, POLICIES, UNCOUNTED, Access
from gpt_worker.api.problems import MIMETYPE, STATUSES
from gpt_worker.api.schemas import (
    EXAMPLE_ID,
    HEADER_PARAMETERS,
    PROBLEM_DESCRIPTIONS,
    Body,
    Problem,
    Query,
    Reply,
    header,
)

Json = dict[str, Any]

SCHEMAS = "#/components/schemas/"
METHODS_WITHOUT_MEANING = {"HEAD", "OPTIONS"}
NULL = {"type": "null"}

INFO = """Send a list of prompts, get every answer: spread over all API keys, stored before it is accepted.

**To try it here**: `POST /login` (the first time, `POST /register`), press *Authorize*, paste the token, then
`POST /jobs`.

**Errors** are RFC 9457 problems, `application/problem+json`. Beside those that
are listed with a route, an unknown address is a 404, and a method that is not taken there a 405 with `Allow`; a request
that is no sound HTTP, or whose headers are too slow or too long, is a 400, 408, 414, 417, 431 or 501.

**`X-Request-Id`** stands in every reply; send one of 1 to 128 letters, digits, `.`, `_`, `-` to choose it.

**Lists** are `{"data": […], "next_cursor": …}`, newest first. **Times** are RFC 3339 in UTC.
"""

SECURITY_SCHEMES: dict[str, Json] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "The token of `POST /login`, `POST /register` or `POST /tokens`",
    },
    "link": {
        "type": "apiKey",
        "in": "query",
        "name": LINK_PARAMETER,
        "description": "A signed link out of a webhook, with its `expires`",
    },
    "webhook": {
        "type": "apiKey",
        "in": "header",
        "name": "webhook-signature",
        "description": "Standard Webhooks 1.0, with `webhook-id` and `webhook-timestamp`",
    },
}
BEARER: dict[str, list[str]] = {"bearer": []}
NOTHING: dict[str, list[str]] = {}
SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    Access.PUBLIC: [],
    Access.SIGNED: [{"webhook": []}],
    Access.TASKS: [BEARER, NOTHING],
    Access.TASKS_OR_LINK: [BEARER, {"link": []}, NOTHING],
    Access.USER: [BEARER],
    Access.ADMIN: [BEARER],
    Access.ADMIN_OR_LOCAL: [BEARER, NOTHING],
}
WHO: dict[Access, str] = {
    Access.PUBLIC: "For everybody.",
    Access.SIGNED: "For whoever signs the request.",
    Access.TASKS: "For users; while the mode `auth` is off, also without a token.",
    Access.TASKS_OR_LINK: "For users, and by a signed link; while the mode `auth` is off, also without either.",
    Access.USER: "For users.",
    Access.ADMIN: "For admins.",
    Access.ADMIN_OR_LOCAL: "For admins, and for the machine itself.",
}

HEADERS: dict[str, Json] = {
    "X-Request-Id": {
        "description": "The request's own id, or the one that was sent",
        "schema": {"type": "string"},
        "example": EXAMPLE_ID,
    },
    "Location": {
        "description": "Where the job is",
        "schema": {"type": "string"},
        "example": f"/jobs/{EXAMPLE_ID}",
    },
    "Idempotency-Replayed": {
        "description": "There, if an earlier submit with this Idempotency-Key made the job",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Retry-After": {
        "description": "Seconds to wait before the next try",
        "schema": {"type": "integer", "minimum": 1},
        "example": 5,
    },
    "WWW-Authenticate": {
        "description": "What kind of token is wanted",
        "schema": {"type": "string"},
        "example": "Bearer",
    },
    "Content-Disposition": {
        "description": "With format=csv: the name of the file",
        "schema": {"type": "string"},
        "example": f'attachment; filename="{EXAMPLE_ID}.csv"',
    },
}
PROBLEM_HEADERS = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}


class Shapes(GenerateJsonSchema):
    """Without a title for each member, which only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def describe(app: OpenAPI, webhooks: dict[str, Json]) -> Json:
    """The OpenAPI document of everything that is registered; `webhooks` are what the service sends."""
    document = copy.deepcopy(app.api_doc)
    document["info"]["description"] = INFO
    document["servers"] = [{"url": "/", "description": "This service"}]
    document["webhooks"] = webhooks
    for rule in app.url_map.iter_rules():
        path = openapi_path(rule.rule)
        for method in (rule.methods or set()) - METHODS_WITHOUT_MEANING:
            operation = document["paths"].get(path, {}).get(method.lower())
            if operation is not None:
                _complete(operation, path, rule.endpoint)
    document["components"] = {
        "schemas": {},
        "responses": {f"Problem{status}": _problem(status) for status in PROBLEM_DESCRIPTIONS},
        "headers": HEADERS,
        "securitySchemes": SECURITY_SCHEMES,
    }
    document["components"]["schemas"] = _shapes(set(_references(document)))
    return document


def openapi_path(rule: str) -> str:
    """`/keys/<int:number>/check` → `/keys/{number}/check`."""
    return re.sub(r"<(?:[^<>:]+:)?([^<>]+)>", r"{\1}", rule)


# An operation


def _complete(operation: Json, path: str, endpoint: str) -> None:
    access = POLICIES[endpoint]
    operation["operationId"] = endpoint.rpartition(".")[2]
    operation["description"] = " ".join(filter(None, (operation.get("description"), WHO[access])))
    operation["security"] = SECURITY[access]
    parameters = [_parameter(parameter) for parameter in operation.get("parameters", ())]
    parameters = [*operation.pop(HEADER_PARAMETERS, ()), *parameters]
    if parameters:
        operation["parameters"] = parameters
    _show_body(operation.get("requestBody", {}).get("content", {}))
    operation["responses"] = _responses(operation, path, endpoint)


def _parameter(parameter: Json) -> Json:
    """flask-openapi3 gives a parameter that may be left out as one that may be null."""
    return {**parameter, "schema": _never_null(parameter["schema"])}


def _responses(operation: Json, path: str, endpoint: str) -> Json:
    good: dict[int, Json] = {}
    bad = _problems_of(operation, path, endpoint)
    for text, response in operation["responses"].items():
        status = int(text)
        if status < HTTPStatus.BAD_REQUEST:
            good[status] = {**response, "headers": {**header("X-Request-Id"), **response.get("headers", {})}}
        elif "application/json" not in response.get("content", {}):  # or flask-openapi3 has added it, to all
            bad.add(status)
    problems = {status: {"$ref": f"#/components/responses/Problem{status}"} for status in bad}
    return {str(status): response for status, response in sorted({**good, **problems}.items())}


def _problems_of(operation: Json, path: str, endpoint: str) -> set[int]:
    """What follows from who may come in, and how often, and from what is sent.

    503: without the database nobody is known.
    """
    access = POLICIES[endpoint]
    statuses = {500} if endpoint in UNCOUNTED else {429, 500}
    if access is not Access.PUBLIC:
        statuses.add(401)
    if access not in (Access.PUBLIC, Access.SIGNED):
        statuses.add(503)
    if access in (Access.ADMIN, Access.ADMIN_OR_LOCAL):
        statuses.add(403)
    if "{" in path:
        statuses.add(404)
    if any(parameter["in"] == "query" for parameter in operation.get("parameters", ())):
        statuses.add(422)
    return statuses


def _problem(status: int) -> Json:
    name = next((name for known, name in STATUSES.values() if known == status), None)
    example = {
        "type": f"urn:gpt-worker:problem:{name}" if name else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": f"{PROBLEM_DESCRIPTIONS[status]}.",
        "request_id": EXAMPLE_ID,
    }
    return {
        "description": PROBLEM_DESCRIPTIONS[status],
        "headers": header("X-Request-Id", *PROBLEM_HEADERS.get(status, ())),
        "content": {MIMETYPE: {"schema": {"$ref": SCHEMAS + Problem.__name__}, "example": example}},
    }


def _show_body(content: Json) -> None:
    """An example for a JSON body that has none, out of those of its members."""
    media = content.get("application/json", {})
    reference = media.get("schema", {}).get("$ref", "")
    if reference and "examples" not in media and "example" not in media:
        members = _named(Body)[reference.removeprefix(SCHEMAS)].model_fields
        media["example"] = {name: field.examples[0] for name, field in members.items() if field.examples}


# Shapes


def _named(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Our own shapes by name."""
    found: dict[str, type[BaseModel]] = {}
    left = [root]
    while left:
        model = left.pop()
        left += model.__subclasses__()
        if model.__module__.startswith("gpt_worker.api.") and not issubclass(model, Query):
            found[model.__name__] = model
    return found


def _shapes(names: set[str]) -> Json:
    """The schemas of these shapes, and of all that they are made of."""
    bodies = _named(Body)
    models = {**_named(Reply), **bodies}
    _, definitions = models_json_schema(
        [(models[name], "validation") for name in sorted(names & models.keys())],
        ref_template=SCHEMAS + "{model}",
        schema_generator=Shapes,
    )
    shapes: Json = definitions["$defs"]
    for name in shapes.keys() & bodies.keys():
        members = shapes[name].get("properties", {})
        shapes[name]["properties"] = {member: _never_null(value) for member, value in members.items()}
    return dict(sorted(shapes.items()))


def _never_null(schema: Json) -> Json:
    """The schema of something that may be left out, and is not null: pydantic has only one word for both."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != NULL]
    rest = {
        name: value
        for name, value in schema.items()
        if name not in ("anyOf", "title") and (name, value) != ("default", None)
    }
    if len(kinds) == 1:
        return {**kinds[0], **rest}
    return {**rest, "anyOf": kinds} if kinds else rest


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if str(part.get("$ref", "")).startswith(SCHEMAS):
            yield part["$ref"].removeprefix(SCHEMAS)
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)
