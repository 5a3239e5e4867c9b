"""Who may use which endpoint: one table, and everything that is not in it is refused.

The caller is known before anything of the body is looked at, so that a stranger learns nothing from how their
input is judged. A token that is no good is a 401 also where none is needed: nobody is taken for the anonymous
user in silence. Whatever comes of a request, it counts among those that its user, or its address, may make a minute.
And a table of the routes that take more than a small body: a stranger's hold no thread that others need.
"""

from collections.abc import Iterable
from enum import StrEnum
from ipaddress import IPv6Address, ip_address

from flask import Flask, Response, current_app, g, request
from werkzeug.exceptions import MethodNotAllowed

from gpt_worker.api.context import service
from gpt_worker.domain import ANONYMOUS, Caller
from gpt_worker.errors import Forbidden, Unauthenticated
from gpt_worker.user_limits import RequestLimit, network

LINK_PARAMETER = "signature"
FORWARDED = ("forwarded", "via", "x-real-ip")
EXTENSION = "gpt_worker_request_limit"
SIGNED_BODY_BYTES = 1 << 20  # our own webhooks have 256 KiB, and with much metadata little more
BODY_LIMITS: dict[tuple[str, str], int | None] = {
    ("POST", "/jobs"): None,  # that of the settings; it is read once its sender is known
    ("POST", "/task"): None,
    ("POST", "/"): SIGNED_BODY_BYTES,  # it is read before its sender is known, as it is what is signed
}
"""Who may send more than SMALL_BODY_BYTES, by method and path: for the server, which asks nobody who they are."""
PROTECTION = {  # OWASP, REST Security Cheat Sheet, "Security headers"
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
UNCOUNTED = {"health.healthz", "health.readyz", "metrics.get_metrics", "webhooks.echo"}  # asked by machines


class Access(StrEnum):
    """Who may come in."""

    PUBLIC = "public"  # everybody; a token opens nothing more, and none is refused
    SIGNED = "signed"  # whoever signs the request, which the view checks
    TASKS = "tasks"  # a user, and while the mode `auth` is off also the anonymous one
    TASKS_OR_LINK = "tasks or link"  # the same, and whoever brings a signed link, which the view checks
    USER = "user"  # a user, always
    ADMIN = "admin"  # an admin, always
    ADMIN_OR_LOCAL = "admin or local"  # the same, and the machine itself without a token or a proxy


POLICIES: dict[str, Access] = {
    "accounts.register": Access.PUBLIC,
    "accounts.login": Access.PUBLIC,
    "accounts.logout": Access.USER,
    "accounts.create_token": Access.USER,
    "accounts.list_tokens": Access.USER,
    "accounts.delete_token": Access.USER,
    "accounts.get_me": Access.USER,
    "accounts.change_password": Access.USER,
    "accounts.list_users": Access.ADMIN,
    "accounts.change_user": Access.ADMIN,
    "accounts.delete_user": Access.ADMIN,
    "modes.get_settings": Access.TASKS,
    "modes.change_settings": Access.ADMIN,
    "jobs.submit": Access.TASKS,
    "jobs.submit_task": Access.TASKS,
    "jobs.list_jobs": Access.TASKS,
    "jobs.get_job": Access.TASKS,
    "jobs.get_results": Access.TASKS_OR_LINK,
    "jobs.cancel_job": Access.TASKS,
    "jobs.retry_job": Access.TASKS,
    "events.get_events": Access.TASKS,
    "webhooks.list_deliveries": Access.USER,
    "webhooks.get_delivery": Access.USER,
    "webhooks.redeliver": Access.USER,
    "webhooks.get_webhook_secret": Access.ADMIN,
    "webhooks.send_test_webhook": Access.ADMIN,
    "webhooks.echo": Access.SIGNED,
    "keys.list_keys": Access.ADMIN,
    "keys.check_key": Access.ADMIN,
    "health.healthz": Access.PUBLIC,
    "health.readyz": Access.PUBLIC,
    "metrics.get_metrics": Access.ADMIN_OR_LOCAL,
    "docs.get_openapi": Access.PUBLIC,
    "docs.get_docs": Access.PUBLIC,
    "docs.get_docs_file": Access.PUBLIC,
}


def install(app: Flask) -> None:
    """Guard every endpoint of this app; to be called before any is registered."""
    app.extensions[EXTENSION] = RequestLimit()
    app.extensions["gpt_worker_body_limits"] = BODY_LIMITS
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False  # no redirect before anybody was asked who they are
    app.before_request(_count_and_admit)
    app.after_request(_protect)


def missing_policies(app: Flask) -> list[str]:
    """The endpoints that nobody can use, since the table does not have them."""
    return sorted({rule.endpoint for rule in app.url_map.iter_rules()} - POLICIES.keys())


def caller() -> Caller:
    """Who makes this request."""
    known: Caller = g.caller
    return known


def holder() -> str:
    """Who holds a place with this request: its user, or where there is none the network that it comes from."""
    return caller().user_id or f"network {network(request.remote_addr)}"


def user_id() -> str:
    """The user who makes this request, on an endpoint that always wants one."""
    known = caller().user_id
    if known is None:
        raise Unauthenticated("This needs a token: Authorization: Bearer …")
    return known


def token_id() -> str:
    """The token with which this request is made, on an endpoint that always wants one."""
    known: str | None = g.token_id
    if known is None:
        raise Unauthenticated("This needs a token: Authorization: Bearer …")
    return known


def bearer_token() -> str:
    """The token in this request's header, whatever it is worth; empty where there is none."""
    scheme, _, token = request.headers.get("Authorization", "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def by_link() -> bool:
    """Whether only the link's signature speaks for this request: the view must check it."""
    return bool(g.by_link)


def is_local(address: str | None, header_names: Iterable[str]) -> bool:
    """Whether a request comes from this machine, and not through a proxy, which would come from it for everybody."""
    names = [name.lower() for name in header_names]
    if any(name in FORWARDED or name.startswith("x-forwarded-") for name in names):
        return False
    try:
        known = ip_address(address or "")
    except ValueError:
        return False
    mapped = known.ipv4_mapped if isinstance(known, IPv6Address) else None
    return (mapped or known).is_loopback


def _count_and_admit() -> None:
    g.caller, g.token_id, g.by_link = ANONYMOUS, None, False
    try:
        _admit()
    finally:
        if request.endpoint not in UNCOUNTED:
            limit: RequestLimit = current_app.extensions[EXTENSION]
            per_minute = service().settings.max_user_requests_per_minute
            limit.count(caller().user_id, request.remote_addr, per_minute)


def _admit() -> None:
    if request.url_rule is None:
        return  # Flask answers with 404 or 405
    if request.method == "OPTIONS":
        raise MethodNotAllowed(sorted((request.url_rule.methods or set()) - {"OPTIONS"}))
    access = POLICIES.get(request.endpoint or "")
    match access:
        case None:
            raise Forbidden("Nobody may use this.")
        case Access.PUBLIC | Access.SIGNED:
            return
    if "Authorization" in request.headers:
        _authenticate()
    elif access is Access.TASKS_OR_LINK and LINK_PARAMETER in request.args:
        g.by_link = True
    elif access is Access.ADMIN_OR_LOCAL and is_local(request.remote_addr, request.headers.keys()):
        return
    elif access not in (Access.TASKS, Access.TASKS_OR_LINK) or service().modes.current().auth:
        raise Unauthenticated("This needs a token: Authorization: Bearer …")
    if access in (Access.ADMIN, Access.ADMIN_OR_LOCAL) and not caller().is_admin:
        raise Forbidden("Only an admin may do this.")


def _authenticate() -> None:
    token = bearer_token()
    if not token:
        raise Unauthenticated("The header is Authorization: Bearer and a token.")
    known = service().accounts.authenticate(token)
    g.caller, g.token_id = known.caller, known.token_id


def _protect(reply: Response) -> Response:
    """Tokens, prompts and results stay out of caches, frames and scripts; a view may say otherwise."""
    for name, value in PROTECTION.items():
        reply.headers.setdefault(name, value)
    return reply
