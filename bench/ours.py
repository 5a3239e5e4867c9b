"""The whole service as a contestant: HTTP in, SQLite database, HTTP out, one gunicorn, settings at their default."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from bench.watch import Watch
from bench.work import MODEL, Measured, Work, measured
from tests.service import Env, Service, ServiceExited
from tests.upstream import Upstream

NAME = "gpt-worker"
RUN_TIMEOUT_S = 420.0


class Refused(Exception):
    """The service did not take a job; the message says what it said."""

    def __init__(self, reply: requests.Response) -> None:
        super().__init__(f"{reply.status_code} {reply.text[:300]}")
        self.status = reply.status_code


@contextmanager
def serving(upstream: Upstream, env: Env | None = None) -> Iterator[Service]:
    """A fresh service with its first account, on an empty data directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-bench-") as folder,
        Service(Path(folder), {"INLINE_WAIT_S": "3600", **(env or {})}, upstream) as service,
    ):
        _ = service.admin
        yield service


def run_ours(
    work: Work, upstream: Upstream, env: Env | None = None, settings: Mapping[str, Any] | None = None
) -> Measured:
    """One inline job with all the tasks: from the first byte of the request to the last of the reply."""
    try:
        with serving(upstream, env) as service, Watch(service.pid, upstream) as watch:
            begin_s = time.monotonic()
            job, answers, errors = ask(service, work, settings or {})
            end_s = time.monotonic()
        result = measured(NAME, work, answers, errors, (begin_s, end_s), watch, upstream)
        result.extra = {"status": job["status"], "usage": job["usage"]}
        return result
    except (Refused, ServiceExited, TimeoutError, requests.RequestException) as error:
        return Measured(contestant=NAME, failure=str(error)[:300])


def ask(
    service: Service, work: Work, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The finished job, its answers by id, and the codes of what failed. Raises Refused."""
    chosen = {"model": MODEL, "delivery": "inline", **settings}
    if work.instructions is not None:
        chosen["instructions"] = work.instructions
    reply = service.submit(dict(work.tasks), chosen, timeout_s=RUN_TIMEOUT_S)
    if reply.status_code != 200:
        raise Refused(reply)
    job = reply.json()
    if job["results"] is None:
        return job, *_fetched(service, job["id"])
    return job, job["results"], {task_id: error["code"] for task_id, error in job["errors"].items()}


def _fetched(service: Service, job_id: str) -> tuple[dict[str, Any], dict[str, str]]:
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    path = f"/jobs/{job_id}/results?format=jsonl"
    with service.get(path, service.admin, stream=True, timeout=RUN_TIMEOUT_S) as reply:
        for line in reply.iter_lines():
            result = json.loads(line)
            answers[result["id"]] = result["result"]
            if result["error"]:
                errors[result["id"]] = result["error"]["code"]
    return answers, errors
