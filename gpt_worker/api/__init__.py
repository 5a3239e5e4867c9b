"""The HTTP face: parses, authorises, calls one function, renders. No SQL and no threads here."""

from flask import Flask
from flask.json.provider import DefaultJSONProvider
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from gpt_worker.api import (
    access,
    accounts,
    docs,
    events,
    health,
    jobs,
    keys,
    metrics,
    modes,
    problems,
    schemas,
    webhooks,
)
from gpt_worker.api.parsing import StrictRequest

BLUEPRINTS = (jobs, events, webhooks, keys, accounts, modes, health, metrics, docs)


class OrderedJson(DefaultJSONProvider):
    """JSON in the caller's own order and letters."""

    sort_keys = False
    ensure_ascii = False


class App(OpenAPI):
    """Flask with our strict requests."""

    request_class = StrictRequest


def make_app(version: str) -> Flask:
    """The bare app: strict parsing, problems for errors, access denied by default."""
    app = App(
        "gpt_worker",
        info=Info(title="gpt-worker", version=version),
        validation_error_status=422,
        validation_error_model=schemas.Problem,
        validation_error_callback=problems.validation_problem,
        doc_ui=False,  # its own pages; ours are in docs.py
        static_folder=None,
    )
    app.json = OrderedJson(app)
    metrics.install(app)
    access.install(app)
    problems.install(app)
    return app


def register(app: Flask) -> None:
    """Add every route, and describe them."""
    assert isinstance(app, OpenAPI)
    for blueprint in BLUEPRINTS:
        app.register_api(blueprint.api)
    docs.install(app, webhooks.SENT)
