"""Everybody asks for everything: each route and method, by each kind of caller, with ids that are somebody's own.

Who may do what stands in a table here, written from README and /openapi.json and not from the service's own, and a
route that the table does not have is a breach. Strangers ask first; at the end all is as it was.
"""

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import requests

from chaos import log
from chaos.options import Options
from chaos.report import Row, none_of
from chaos.tokens import claims_of, headers_that_do_not_count
from config import derive
from gpt_worker import api
from gpt_worker.api.description import openapi_path
from gpt_worker.domain import utc_now
from gpt_worker.signing import link_key, sign_link
from tests.receiver import Receiver
from tests.service import APP_KEY, PASSWORD, Service
from tests.upstream import Upstream

NAME = "authorisation"

Json = dict[str, Any]
Status = frozenset[int]

MARK = "what Ada alone may read"
ADA, BOB = "ada@lovelace.example", "bob@example.org"  # /openapi.json shows an ada@example.org
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
ENV = {"PUBLIC_URL": "http://public.example", "MAX_USER_JOBS": "0", "MAX_USER_REQUESTS_PER_MINUTE": "0"}
# From elsewhere: what the machine itself may do is asked separately.
PROXIED = {"X-Forwarded-For": "203.0.113.7"}

OK: Status = frozenset(range(200, 300))
UNAUTHENTICATED, FORBIDDEN, MISSING, NO_METHOD = (frozenset({status}) for status in (401, 403, 404, 405))


class Who(StrEnum):
    """Who may use a route."""

    EVERYBODY = "everybody"
    TASKS = "users; without auth also the anonymous one"
    USERS = "users"
    ADMINS = "admins"
    SIGNERS = "whoever signs"
    MACHINE = "admins, and the machine itself"


class Whose(StrEnum):
    """Whose the thing behind an id is to be."""

    NOBODYS = "no thing of a user's"
    OWN = "one's own, else it is not there"
    OWN_OR_ADMIN = "one's own, or an admin asks"


@dataclass(frozen=True, slots=True)
class Route:
    """What the documentation says of one. `done`: the statuses by which we see that somebody was let in."""

    who: Who
    whose: Whose = Whose.NOBODYS
    done: Status = OK


JOBS = Route(Who.TASKS, Whose.OWN_OR_ADMIN)
# From README ("Jobs", "Accounts") and its tables. A wrong old password is a 403, registration that is off too.
ROUTES: dict[tuple[str, str], Route] = {
    ("POST", "/register"): Route(Who.EVERYBODY, done=FORBIDDEN),
    ("POST", "/login"): Route(Who.EVERYBODY),
    ("POST", "/logout"): Route(Who.USERS),
    ("GET", "/me"): Route(Who.USERS),
    ("POST", "/me/password"): Route(Who.USERS, done=FORBIDDEN | {429}),
    ("POST", "/tokens"): Route(Who.USERS),
    ("GET", "/tokens"): Route(Who.USERS),
    ("DELETE", "/tokens/{id}"): Route(Who.USERS, Whose.OWN),
    ("GET", "/settings"): Route(Who.TASKS),
    ("PATCH", "/settings"): Route(Who.ADMINS),
    ("GET", "/users"): Route(Who.ADMINS),
    ("PATCH", "/users/{id}"): Route(Who.ADMINS),
    ("DELETE", "/users/{id}"): Route(Who.ADMINS),
    ("POST", "/jobs"): Route(Who.TASKS),
    ("POST", "/task"): Route(Who.TASKS),
    ("GET", "/jobs"): Route(Who.TASKS),
    ("GET", "/jobs/{id}"): JOBS,
    ("GET", "/jobs/{id}/results"): JOBS,
    ("GET", "/jobs/{id}/events"): JOBS,
    ("DELETE", "/jobs/{id}"): JOBS,
    ("POST", "/jobs/{id}/retry"): JOBS,
    ("GET", "/deliveries"): Route(Who.USERS),
    ("GET", "/deliveries/{id}"): Route(Who.USERS, Whose.OWN_OR_ADMIN),
    ("POST", "/deliveries/{id}/redeliver"): Route(Who.USERS, Whose.OWN_OR_ADMIN),
    ("GET", "/webhooks/secret"): Route(Who.ADMINS),
    ("POST", "/webhooks/test"): Route(Who.ADMINS),
    ("POST", "/"): Route(Who.SIGNERS),
    ("GET", "/keys"): Route(Who.ADMINS),
    ("POST", "/keys/{number}/check"): Route(Who.ADMINS),
    ("GET", "/healthz"): Route(Who.EVERYBODY),
    ("GET", "/readyz"): Route(Who.EVERYBODY),
    ("GET", "/metrics"): Route(Who.MACHINE),
    ("GET", "/docs"): Route(Who.EVERYBODY),
    ("GET", "/docs/{name}"): Route(Who.EVERYBODY),
    ("GET", "/openapi.json"): Route(Who.EVERYBODY),
}
# More ways to ask: an admin's lists, forms of results, the end of a job, ids that are none.
ALSO: dict[tuple[str, str], tuple[str, ...]] = {
    ("GET", "/jobs/{id}"): ("?results=false",),
    ("GET", "/jobs/{id}/results"): ("?format=jsonl", "?format=csv"),
    ("DELETE", "/jobs/{id}"): ("?purge=true",),
    ("GET", "/jobs"): ("?limit=100",),
    ("GET", "/deliveries"): ("?limit=100",),
}
BRIEFLY = (("GET", "/me"), ("GET", "/jobs/{id}"), ("POST", "/jobs"), ("PATCH", "/settings"))
ALL_OF_EVERYBODY = ("/jobs?all=true", "/deliveries?all=true")


class Kind(StrEnum):
    """What a caller is to the service."""

    NOBODY = "nobody"
    BAD = "a token that does not count"
    OWNER = "A"
    OTHER = "B"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    name: str
    kind: Kind
    header: str | None

    @property
    def headers(self) -> dict[str, str]:
        return PROXIED if self.header is None else {**PROXIED, "Authorization": self.header}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, what it should have been answered with, and what it was."""

    caller: Caller
    method: str
    path: str
    wanted: Status
    status: int
    leaks: bool

    @property
    def ok(self) -> bool:
        return self.status in self.wanted

    def __str__(self) -> str:
        return f"{self.caller.name}: {self.method} {self.path}: {self.status}"


def expected(route: Route, kind: Kind, *, auth: bool) -> Status:
    """What the documentation lets a caller expect, who asks with an id of A's where the route has one."""
    if route.who is Who.EVERYBODY:
        return route.done
    if route.who is Who.SIGNERS or kind is Kind.BAD:
        return UNAUTHENTICATED
    if kind is Kind.NOBODY:
        if auth or route.who is not Who.TASKS:
            return UNAUTHENTICATED
        return route.done if route.whose is Whose.NOBODYS else MISSING
    if route.who in (Who.ADMINS, Who.MACHINE):
        return route.done if kind is Kind.ADMIN else FORBIDDEN
    if kind is Kind.OWNER or route.whose is Whose.NOBODYS:
        return route.done
    return route.done if kind is Kind.ADMIN and route.whose is Whose.OWN_OR_ADMIN else MISSING


def run(options: Options) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Receiver() as hook,
        Upstream() as upstream,
        Service(Path(folder), {**ENV, "REQUEST_API": hook.url}, upstream) as service,
    ):
        things = Things(service, hook)
        callers = list(everybody(things))
        before = things.state()
        rows = undocumented_routes()
        for auth in (True, False):
            things.set_auth(auth)
            asked = list(ask_everything(things, callers, auth=auth, is_short=options.short))
            rows += _rows("auth on" if auth else "auth off", asked)
        things.set_auth(True)
        rows.append(none_of("links", list(link_breaches(things))))
        rows.append(none_of("what has changed", changes(before, things.state())))
        rows.append(none_of("errors in the log", log.faults(service.stderr())))
    return rows


def _rows(title: str, asked: Sequence[Asked]) -> list[Row]:
    refused = [it for it in asked if not it.wanted & OK]
    allowed = [it for it in asked if it.wanted & OK]
    of_others = [it for it in asked if it.wanted == MISSING]
    return [
        none_of(
            f"{title}: let in who must not be", [str(it) for it in refused if it.status in OK], len(refused)
        ),
        none_of(
            f"{title}: B, or nobody, sees A's ids", [str(it) for it in of_others if not it.ok], len(of_others)
        ),
        none_of(
            f"{title}: refused otherwise than documented",
            [str(it) for it in refused if not it.ok],
            len(refused),
        ),
        none_of(f"{title}: not let in who may be", [str(it) for it in allowed if not it.ok], len(allowed)),
        none_of(f"{title}: tells others what is A's", [str(it) for it in asked if it.leaks], len(asked)),
    ]


# The routes


def url_map() -> set[tuple[str, str]]:
    """Every method and path that the service has."""
    app = api.make_app("0")
    api.register(app)
    rules = ((rule, openapi_path(rule.rule)) for rule in app.url_map.iter_rules())
    return {
        (method, path)
        for rule, path in rules
        for method in rule.methods or ()
        if method not in ("HEAD", "OPTIONS")
    }


def undocumented_routes() -> list[Row]:
    there = url_map()
    return [
        none_of(
            "routes that the documentation does not have",
            sorted(map(" ".join, there - ROUTES.keys())),
            len(there),
        ),
        none_of("documented routes that are not there", sorted(map(" ".join, ROUTES.keys() - there))),
    ]


# The callers


def everybody(things: "Things") -> Iterator[Caller]:
    yield Caller("nobody", Kind.NOBODY, None)
    ours = derive(APP_KEY, "tokens")
    for name, header in headers_that_do_not_count(things.admin, things.ada, ours).items():
        yield Caller(name, Kind.BAD, header)
    for name, token in things.ended_tokens().items():
        yield Caller(name, Kind.BAD, f"Bearer {token}")
    yield Caller("B", Kind.OTHER, f"Bearer {things.bob}")
    yield Caller("A", Kind.OWNER, f"Bearer {things.ada}")
    yield Caller("admin", Kind.ADMIN, f"Bearer {things.admin}")


class Things:
    """What belongs to A, and what is made for those who may end it."""

    def __init__(self, service: Service, hook: Receiver) -> None:
        self.service, self._hook = service, hook
        self.admin, self.ada, self.bob = service.admin, service.user(ADA), service.user(BOB)
        self._made = 0
        self.job = self.new_job(self.ada)
        hook.wait_for(1)
        service.wait_until(lambda: self._delivery()["status"] == "delivered")
        self.delivery = str(self._delivery()["id"])
        self.token = self.new_token(self.ada)[0]
        self.user = self._id_of(self.ada)

    def new_job(self, token: str) -> str:
        """A finished job with a text that nobody else may see."""
        reply = self.service.submit({"secret": MARK}, {"delivery": "webhook"}, token)
        job_id = str(reply.json()["id"])
        self.service.wait_finished(job_id)
        return job_id

    def new_token(self, token: str) -> tuple[str, str]:
        """(id, text)"""
        made = self.service.post("/tokens", token, json={"name": "script"}).json()
        return str(made["id"]), str(made["token"])

    def new_user(self) -> tuple[str, str]:
        """(id, token)"""
        self._made += 1
        token = self.service.user(f"user{self._made}@example.org")
        return self._id_of(token), token

    def _id_of(self, token: str) -> str:
        return str(self.service.get("/me", token).json()["id"])

    def _delivery(self) -> Json:
        (delivery,) = self.service.get(f"/deliveries?job_id={self.job}", self.ada).json()["data"]
        return dict(delivery)

    def set_auth(self, auth: bool) -> None:
        reply = self.service.patch("/settings", self.admin, json={"auth": auth, "registration": False})
        reply.raise_for_status()

    def ended_tokens(self) -> dict[str, str]:
        """Tokens that were good once."""
        service = self.service
        expired, revoked, logged_out = (self.new_token(self.ada)[1] for _ in range(3))
        (disabled_id, disabled), (deleted_id, deleted), (_, before_change) = (
            self.new_user() for _ in range(3)
        )
        after_change = service.login(f"user{self._made}@example.org")
        replies = [
            service.delete(f"/tokens/{claims_of(revoked)['jti']}", self.ada),
            service.post("/logout", logged_out),
            service.patch(f"/users/{disabled_id}", self.admin, json={"disabled": True}),
            service.delete(f"/users/{deleted_id}", self.admin),
            service.post("/me/password", after_change, json={"old": PASSWORD, "new": PASSWORD + "!"}),
        ]
        assert all(reply.ok for reply in replies), [reply.text for reply in replies]
        self._expire(claims_of(expired)["jti"])
        return {
            "an expired token": expired,
            "a revoked token": revoked,
            "a token after its logout": logged_out,
            "a disabled user's token": disabled,
            "a deleted user's token": deleted,
            "a token from before the password": before_change,
        }

    def _expire(self, token_id: str) -> None:
        (path,) = self.service.data_dir.glob("*.sqlite3")
        with closing(sqlite3.connect(path, timeout=10.0)) as database, database:
            past = "2020-01-01 00:00:00.000000"
            changed = database.execute("UPDATE tokens SET expires_at = ? WHERE id = ?", (past, token_id))
            assert changed.rowcount == 1

    def path(self, method: str, path: str, *, may_end_it: bool) -> str:
        """The path with ids of A's; with one made for it where the thing may be gone afterwards."""
        if path.startswith("/jobs/"):
            fresh = may_end_it and method == "DELETE"
            return path.replace("{id}", self.new_job(self.ada) if fresh else self.job)
        if path.startswith("/tokens/"):
            return path.replace("{id}", self.new_token(self.ada)[0] if may_end_it else self.token)
        if path.startswith("/users/"):
            fresh = may_end_it and method == "DELETE"
            return path.replace("{id}", self.new_user()[0] if fresh else self.user)
        return path.replace("{id}", self.delivery).replace("{number}", "0").replace("{name}", "start.js")

    def state(self) -> Json:
        """What nobody may change: all that is A's, the modes, and who is an admin."""
        get, ada = self.service.get, self.ada
        delivery = get(f"/deliveries/{self.delivery}", ada).json()
        return {
            "job": get(f"/jobs/{self.job}", ada).json(),
            "delivery": {name: delivery[name] for name in ("id", "job_id", "url")},
            "token": self.token in [it["id"] for it in get("/tokens?limit=100", ada).json()["data"]],
            "me": get("/me", ada).json(),
            "modes": get("/settings", ada).json(),
            "admins": [it["email"] for it in self._users() if it["role"] == "admin" and not it["disabled"]],
        }

    def _users(self) -> Iterable[Json]:
        cursor = ""
        while True:
            page = self.service.get(f"/users?limit=100{cursor}", self.admin).json()
            yield from page["data"]
            if page["next_cursor"] is None:
                return
            cursor = f"&cursor={page['next_cursor']}"


def changes(before: Json, after: Json) -> list[str]:
    return [f"{name}: {before[name]} → {after[name]}" for name in before if before[name] != after[name]]


# The questions

BODIES: dict[tuple[str, str], Json] = {
    ("POST", "/register"): {"email": "eve@example.org", "password": PASSWORD},
    ("POST", "/login"): {"email": BOB, "password": PASSWORD},
    ("POST", "/me/password"): {"old": "not the password", "new": "staple battery horse correct"},
    ("POST", "/tokens"): {"name": "script"},
    ("POST", "/jobs"): {"data": ["Say hello."], "settings": {"delivery": "inline"}},
    ("POST", "/task"): {"data": ["Say hello."], "settings": {"delivery": "inline"}},
}
ADMINS_BODIES: dict[tuple[str, str], tuple[Json, Json]] = {  # for whom it is forbidden, and for an admin
    ("PATCH", "/settings"): ({"auth": False, "registration": True}, {"delivery": "inline"}),
    ("PATCH", "/users/{id}"): ({"role": "admin"}, {"role": "user"}),
}


def ask_everything(
    things: Things, callers: Sequence[Caller], *, auth: bool, is_short: bool
) -> Iterator[Asked]:
    """`is_short`: most tokens that don't count are tried on a few routes only."""
    for number, caller in enumerate(callers):
        is_brief = is_short and caller.kind is Kind.BAD and number % 12 != 0
        yield from _ask_routes(things, caller, BRIEFLY if is_brief else ROUTES, auth=auth)
    for caller in callers:
        if (
            caller.kind is Kind.NOBODY
            or (caller.kind is not Kind.BAD and not is_short)
            or caller.name == "garbage"
        ):
            yield from _ask_methods(things, caller)


def _ask_routes(
    things: Things, caller: Caller, routes: Iterable[tuple[str, str]], *, auth: bool
) -> Iterator[Asked]:
    for method, path in routes:
        wanted = expected(ROUTES[method, path], caller.kind, auth=auth)
        for query in ("", *ALSO.get((method, path), ())):
            yield _ask(things, caller, method, path, query, wanted)
        if method == "GET":
            yield _ask(things, caller, "HEAD", path, "", wanted)
    if caller.kind is not Kind.ADMIN:
        for path in ALL_OF_EVERYBODY:
            yield _ask_all(things, caller, path, auth=auth)


def _ask_methods(things: Things, caller: Caller) -> Iterator[Asked]:
    """Every method that a path does not have."""
    for path in sorted({path for _, path in ROUTES}):
        for method in METHODS:
            if ("GET" if method == "HEAD" else method, path) not in ROUTES:
                yield _ask(things, caller, method, path, "", NO_METHOD)


def _ask(things: Things, caller: Caller, method: str, path: str, query: str, wanted: Status) -> Asked:
    may_end_it = bool(wanted & OK)
    headers = dict(caller.headers)
    if (method, path) == ("POST", "/logout") and may_end_it:
        assert caller.header is not None
        headers["Authorization"] = f"Bearer {things.new_token(caller.header.partition(' ')[2])[1]}"
    forbidden, admins = ADMINS_BODIES.get((method, path), (None, None))
    body = BODIES.get((method, path), admins if may_end_it else forbidden)
    address = things.path(method, path, may_end_it=may_end_it) + query
    reply = things.service.request(method, address, json=body, headers=headers)
    return _judged(caller, method, path + query, wanted, reply)


def _ask_all(things: Things, caller: Caller, path: str, *, auth: bool) -> Asked:
    """Lists of everybody's things are an admin's."""
    wanted = UNAUTHENTICATED if caller.kind is Kind.BAD else FORBIDDEN
    if caller.kind is Kind.NOBODY and (auth or path.startswith("/deliveries")):
        wanted = UNAUTHENTICATED
    reply = things.service.get(path, headers=caller.headers)
    return _judged(caller, "GET", path, wanted, reply)


def _judged(caller: Caller, method: str, path: str, wanted: Status, reply: requests.Response) -> Asked:
    leaks = caller.kind not in (Kind.OWNER, Kind.ADMIN) and (MARK in reply.text or ADA in reply.text)
    return Asked(caller, method, path, wanted, reply.status_code, leaks)


# Links, and what the machine itself may do


def link_breaches(things: Things) -> Iterator[str]:
    """Signed links open one job's results until their end, to anybody, and nothing else."""
    get, job = things.service.get, things.job
    other = things.new_job(things.bob)
    key, soon = link_key(APP_KEY), utc_now() + timedelta(hours=1)
    good, past = sign_link(key, job, soon), sign_link(key, job, utc_now() - timedelta(seconds=2))
    forged, others = sign_link(b"k" * 32, job, soon), sign_link(key, other, soon)
    expires, signature = good.split("&")
    later = f"expires={int(expires.partition('=')[2]) + 3600}&{signature}"
    questions: list[tuple[str, str, str | None, Status]] = [
        ("a good link", f"/jobs/{job}/results?format=jsonl&{good}", None, OK),
        ("a good link with a bad token", f"/jobs/{job}/results?{good}", "x.y.z", UNAUTHENTICATED),
        ("a good link with another's token", f"/jobs/{job}/results?{good}", things.bob, MISSING),
        ("a link to another job", f"/jobs/{job}/results?{others}", None, FORBIDDEN),
        ("a link that has ended", f"/jobs/{job}/results?{past}", None, FORBIDDEN),
        ("a link with a later end", f"/jobs/{job}/results?{later}", None, FORBIDDEN),
        ("a link without an end", f"/jobs/{job}/results?{signature}", None, FORBIDDEN),
        ("a link of another key", f"/jobs/{job}/results?{forged}", None, FORBIDDEN),
        ("an empty signature", f"/jobs/{job}/results?{expires}&signature=", None, FORBIDDEN),
        ("a link to the job itself", f"/jobs/{job}?{good}", None, UNAUTHENTICATED | {422}),
        ("a link to its events", f"/jobs/{job}/events?{good}", None, UNAUTHENTICATED | {422}),
        ("a link to the list", f"/jobs?{good}", None, UNAUTHENTICATED | {422}),
        ("the machine's own metrics", "/metrics", None, OK),
        ("the machine's own keys", "/keys", None, UNAUTHENTICATED),
        ("the machine's own metrics for a user", "/metrics", things.bob, FORBIDDEN),
        ("the machine's own metrics for a bad token", "/metrics", "x.y.z", UNAUTHENTICATED),
        *(_proxied_metrics()),
    ]
    for what, path, token, wanted in questions:
        name, _, value = what.partition(": ")
        headers = {name: value} if value else {}
        status = get(path, token, headers=headers).status_code
        if status not in wanted:
            yield f"{what}: {status}"
    for method in ("DELETE", "POST", "HEAD"):
        path = f"/jobs/{job}{'/results' if method == 'HEAD' else ''}?{good}"
        status = things.service.request(method, path).status_code
        if status not in (OK if method == "HEAD" else UNAUTHENTICATED | NO_METHOD):
            yield f"{method} by a good link: {status}"


def _proxied_metrics() -> Iterator[tuple[str, str, str | None, Status]]:
    """Whatever a proxy says of itself, it does not speak for the machine."""
    for header in (
        "Forwarded: for=127.0.0.1",
        "Via: 1.1 proxy",
        "X-Real-IP: 127.0.0.1",
        "X-Forwarded-Host: localhost",
    ):
        yield header, "/metrics", None, UNAUTHENTICATED
