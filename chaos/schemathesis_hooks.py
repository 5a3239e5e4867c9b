"""What schemathesis is told by us; it runs in schemathesis' own environment, and writes a line of JSON a case.

Requests that would spoil the run are led aside: what ends a token or changes a password gets a token to spare, what
changes or deletes the run's own accounts goes to another, and the modes are put back after each change. All of them
are sent and judged all the same.
"""
# mypy: ignore-errors
# ruff: noqa: ARG001 (the names of arguments are schemathesis')

import json
import os
import threading
from pathlib import Path

import requests
import schemathesis

TOLD = json.loads(os.environ["CHAOS_SCHEMA"])
MODES = {"delivery": "inline", "registration": True, "auth": TOLD["auth"]}
_lock = threading.Lock()
_log = Path(TOLD["log"]).open("a", encoding="utf-8")  # noqa: SIM115
_session = requests.Session()
_session.trust_env = False


@schemathesis.serializer("application/jsonl", "application/x-ndjson", "text/csv")
def as_it_is(context, value):
    """A text, or whatever stands where one should."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.auth(refresh_interval=None)
class Tokens:
    """The run's token, or one to spare."""

    def get(self, case, context):
        if TOLD["token"] is None:
            return None
        match case.operation.path:
            case "/logout":
                return _token_to_spare()
            case "/me/password":
                return TOLD["password_token"]
            case _:
                return TOLD["token"]

    def set(self, case, data, context):
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}


def _token_to_spare():
    with _lock:
        reply = _session.post(
            f"{TOLD['url']}/tokens",
            json={"name": "spare"},
            headers={"Authorization": f"Bearer {TOLD['spare_token']}"},
            timeout=30,
        )
    reply.raise_for_status()
    return reply.json()["token"]


@schemathesis.hook
def before_call(context, case, kwargs):
    """Leads changes of the run's own accounts to another."""
    if case.operation.path == "/users/{id}" and (case.path_parameters or {}).get("id") in TOLD["kept_users"]:
        case.path_parameters["id"] = TOLD["other_user"]


@schemathesis.hook
def after_call(context, case, response):
    """Writes the case down, and puts the modes back."""
    method, reached = response.request.method, case.operation.path
    content_type = (response.headers.get("content-type") or [""])[0]
    facts = {"status": response.status_code, "content_type": content_type, "took_s": response.elapsed}
    _write(case, method, **facts, body=_problem(content_type, response.content))
    if (method, reached, response.status_code) == ("PATCH", "/settings", 200):
        with _lock:
            reply = _session.patch(
                f"{TOLD['url']}/settings",
                json=MODES,
                headers={"Authorization": f"Bearer {TOLD['admin_token']}"},
                timeout=30,
            )
        reply.raise_for_status()


@schemathesis.hook
def after_network_error(context, case, request):
    _write(case, request.method, status=0, content_type="", took_s=0.0, body="")


def _problem(content_type, content):
    """The body of a problem; other bodies are for schemathesis to judge."""
    return (content or b"").decode("utf-8", "replace") if "problem" in content_type else ""


def _write(case, method, **facts):
    line = {"path": case.operation.path, "method": method, **facts}
    with _lock:
        _log.write(json.dumps(line) + "\n")
        _log.flush()
