"""The service in numbers over HTTP, and the hook that counts every request."""

import time

from flask import Flask, Response, current_app, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from gpt_worker.api import schemas
from gpt_worker.api.context import service
from gpt_worker.metrics import RequestMetrics, make_registry

EXTENSION = "gpt_worker_metrics"
EXAMPLE = """# HELP gpt_worker_queue_tasks Undecided tasks of unfinished jobs
# TYPE gpt_worker_queue_tasks gauge
gpt_worker_queue_tasks 40.0
"""

api = APIBlueprint("metrics", __name__, abp_tags=[Tag(name="health")])


def install(app: Flask) -> None:
    """Count the requests of this app; to be called first, so that the time for everything else is in it."""
    requests = RequestMetrics()
    app.extensions[EXTENSION] = make_registry(requests, lambda: service().snapshot())

    def begin() -> None:
        g.began_s = time.monotonic()

    def count(reply: Response) -> Response:
        rule = request.url_rule.rule if request.url_rule else None
        requests.count(request.method, rule, reply.status_code, time.monotonic() - g.began_s)
        return reply

    app.before_request(begin)
    app.after_request(count)


@api.get(
    "/metrics",
    summary="The service in numbers, for Prometheus (admin)",
    description=(
        "Prometheus' text format. Without a token for requests from the machine itself that came through no proxy: "
        "from a loopback address, without Forwarded, X-Forwarded-…, X-Real-IP and Via."
    ),
    responses={200: schemas.content("Every metric", {"text/plain": schemas.text(EXAMPLE)})},
)
def get_metrics() -> Response:
    """The service in numbers."""
    registry: CollectorRegistry = current_app.extensions[EXTENSION]
    reply = Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
    reply.headers["Cache-Control"] = "no-store"
    return reply
