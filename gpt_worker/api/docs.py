"""The description of the service at /openapi.json, and a page to try it from, with nothing from another host."""

from functools import cache
from importlib.resources import files

from flask import Response, current_app
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from flask_openapi3.openapi import OpenAPI
from pydantic import BaseModel, Field

from gpt_worker.api import schemas
from gpt_worker.api.context import service
from gpt_worker.api.description import Json, describe
from gpt_worker.errors import NotFound, Unavailable

EXTENSION = "gpt_worker_openapi"
RETRY_AFTER_S = 5

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gpt-worker</title>
<link rel="icon" href="docs/swagger.svg">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<noscript>This page needs JavaScript. The same as a document: <a href="openapi.json">openapi.json</a></noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# validatorUrl: Swagger UI would have the document judged by a service of its maker's
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  validatorUrl: null,
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: 0
});
"""
FILES: dict[str, tuple[str, str | None]] = {
    "start.js": ("text/javascript", None),
    "swagger-ui-bundle.js": ("text/javascript", "js/swagger-ui-bundle.js"),
    "swagger-ui.css": ("text/css", "css/swagger-ui.css"),
    "swagger.svg": ("image/svg+xml", "images/swagger.svg"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

api = APIBlueprint(
    "docs", __name__, abp_tags=[Tag(name="docs", description="This description, and a page to try it from")]
)


class FilePath(BaseModel):
    name: str = Field(description="Which file", json_schema_extra={"example": "start.js"})


def install(app: OpenAPI, webhooks: dict[str, Json]) -> None:
    """Have this app described when somebody first asks: it takes memory that most services never need."""

    @cache
    def document() -> bytes:
        return app.json.dumps(describe(app, webhooks), separators=(",", ":")).encode()

    app.extensions[EXTENSION] = document


@api.get(
    "/openapi.json",
    summary="The description of the service",
    description="OpenAPI 3.1: every route, every answer, and requests that work.",
    responses={
        200: schemas.content("The document", {"application/json": {"schema": {"type": "object"}}}),
    },
)
def get_openapi() -> Response:
    return Response(current_app.extensions[EXTENSION](), content_type="application/json", headers=HEADERS)


@api.get(
    "/docs",
    summary="A page to try the service from",
    description="Swagger UI, all of it from this service.",
    responses={200: schemas.content("The page", {"text/html": {"schema": {"type": "string"}}})},
)
def get_docs() -> Response:
    return Response(PAGE, content_type="text/html; charset=utf-8", headers=HEADERS)


@api.get(
    "/docs/<name>",
    summary="A file of that page",
    description="Its script and its style.",
    responses={
        200: schemas.content(
            "The file",
            {kind: {"schema": {"type": "string"}} for kind in sorted({kind for kind, _ in FILES.values()})},
        ),
        **schemas.problems(503),
    },
)
def get_docs_file(path: FilePath) -> Response:
    if path.name not in FILES:
        raise NotFound("There is no such file.")
    place = service().places.hold()  # a megabyte may take a while
    if not place.__enter__():
        raise Unavailable("Too many downloads at once.", RETRY_AFTER_S)
    reply = Response(_read(path.name), content_type=f"{FILES[path.name][0]}; charset=utf-8", headers=HEADERS)
    reply.headers["Cache-Control"] = "public, max-age=3600"
    reply.call_on_close(lambda: place.__exit__(None, None, None))
    return reply


@cache
def _read(name: str) -> bytes:
    source = FILES[name][1]
    if source is None:
        return START.encode()
    return files("flask_openapi3_swagger").joinpath("templates", "swagger", source).read_bytes()
