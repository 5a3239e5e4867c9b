"""Who may use what: the table, and the guard in front of every endpoint."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import g

from gpt_worker import api
from gpt_worker.api import access
from gpt_worker.api.access import Access, missing_policies
from gpt_worker.api.parsing import StrictRequest
from tests.unit.small_app import SmallApp

BAD_TOKENS = {
    "not ours": "Bearer x.y.z",
    "no token": "Bearer",
    "another scheme": "Basic YWRhOnB3",
    "an empty header": "",
    "two tokens": "Bearer a, Bearer b",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path)
    for kind in Access:
        monkeypatch.setitem(access.POLICIES, kind.name, kind)
        app.app.add_url_rule(f"/{kind.name}", kind.name, who, methods=["GET", "POST"])
    app.app.add_url_rule("/forgotten", "forgotten", who)
    yield app
    app.close()


def who() -> dict[str, Any]:
    return {"email": g.caller.email, "by_link": access.by_link()}


def outcome(small: SmallApp, kind: Access, token: str | None, query: str = "") -> Any:
    reply = small.request("GET", f"/{kind.name}{query}", token)
    return reply.json["email"] if reply.status_code == 200 else reply.status_code


@pytest.mark.parametrize(
    ("kind", "auth", "nobody", "user", "admin"),
    [
        (Access.PUBLIC, True, None, None, None),
        (Access.SIGNED, True, None, None, None),
        (Access.TASKS, True, 401, "bob@example.org", "ada@example.org"),
        (Access.TASKS_OR_LINK, True, 401, "bob@example.org", "ada@example.org"),
        (Access.USER, True, 401, "bob@example.org", "ada@example.org"),
        (Access.ADMIN, True, 401, 403, "ada@example.org"),
        (Access.ADMIN_OR_LOCAL, True, None, 403, "ada@example.org"),
        (Access.PUBLIC, False, None, None, None),
        (Access.SIGNED, False, None, None, None),
        (Access.TASKS, False, None, "bob@example.org", "ada@example.org"),
        (Access.TASKS_OR_LINK, False, None, "bob@example.org", "ada@example.org"),
        (Access.USER, False, 401, "bob@example.org", "ada@example.org"),
        (Access.ADMIN, False, 401, 403, "ada@example.org"),
        (Access.ADMIN_OR_LOCAL, False, None, 403, "ada@example.org"),
    ],
)
def test_each_kind_of_access(
    small: SmallApp, kind: Access, auth: bool, nobody: Any, user: Any, admin: Any
) -> None:
    admin_token = small.register("ada@example.org")
    user_token = small.register_user("bob@example.org")
    small.modes.change(auth=auth)

    outcomes = [outcome(small, kind, token) for token in (None, user_token, admin_token)]

    assert outcomes == [nobody, user, admin]


@pytest.mark.parametrize("header", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
@pytest.mark.parametrize("auth", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in Access if kind not in (Access.PUBLIC, Access.SIGNED)])
def test_bad_token_is_a_401_and_never_the_anonymous_user(
    small: SmallApp, kind: Access, auth: bool, header: str
) -> None:
    small.modes.change(auth=auth)

    reply = small.client.get(f"/{kind.name}?signature=x", headers={"Authorization": header})

    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_bad_token_is_ignored_where_everybody_may_come_in(small: SmallApp) -> None:
    reply = small.client.get("/PUBLIC", headers={"Authorization": "Bearer x.y.z"})

    assert reply.status_code == 200


def test_scheme_is_read_in_any_case(small: SmallApp) -> None:
    token = small.register()

    assert small.client.get("/USER", headers={"Authorization": f"bearer {token}"}).status_code == 200


@pytest.mark.parametrize("auth", [True, False])
def test_link_is_left_to_the_view(small: SmallApp, auth: bool) -> None:
    small.modes.change(auth=auth)

    reply = small.client.get("/TASKS_OR_LINK?expires=1&signature=x")

    assert reply.json == {"email": None, "by_link": True}


def test_token_goes_before_a_link(small: SmallApp) -> None:
    token = small.register("ada@example.org")

    reply = small.request("GET", "/TASKS_OR_LINK?signature=x", token)

    assert reply.json == {"email": "ada@example.org", "by_link": False}


def test_link_opens_nothing_else(small: SmallApp) -> None:
    assert outcome(small, Access.TASKS, None, "?signature=x") == 401


def test_endpoint_without_a_policy_is_refused_even_to_an_admin(small: SmallApp) -> None:
    token = small.register()

    reply = small.request("GET", "/forgotten", token)

    assert reply.status_code == 403
    assert reply.mimetype == "application/problem+json"


def test_endpoints_without_a_policy_are_listed(small: SmallApp) -> None:
    assert missing_policies(small.app) == ["forgotten"]


def test_stranger_is_refused_before_the_body_is_looked_at(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the body was looked at")

    monkeypatch.setattr(StrictRequest, "json_pieces", refuse)

    reply = small.client.post("/tokens", data=b"{broken", content_type="application/json")

    assert reply.status_code == 401


@pytest.mark.parametrize("path", ["/settings", "/PUBLIC", "/users/1"])
def test_options_is_not_answered_for_strangers(small: SmallApp, path: str) -> None:
    reply = small.client.options(path)

    assert reply.status_code == 405
    assert "OPTIONS" not in reply.headers["Allow"]


def test_head_needs_what_get_needs(small: SmallApp) -> None:
    assert small.client.head("/USER").status_code == 401


@pytest.mark.parametrize("path", ["/PUBLIC", "/settings", "/USER", "/nowhere"])
def test_every_reply_is_kept_out_of_caches_frames_and_scripts(small: SmallApp, path: str) -> None:
    reply = small.client.get(path)

    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert reply.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_double_slash_is_a_404_and_no_redirect(small: SmallApp) -> None:
    assert small.client.get("//settings").status_code == 404
    assert small.client.get("/users//1").status_code == 404


# The whole service's routes


def whole_app(small: SmallApp) -> Any:
    app = api.make_app("0")
    api.register(app)
    app.extensions["gpt_worker"] = small.app.extensions["gpt_worker"]
    return app


def test_every_endpoint_of_the_service_has_a_policy(small: SmallApp) -> None:
    assert missing_policies(whole_app(small)) == []


def test_every_endpoint_that_is_not_open_refuses_strangers_whatever_they_send(small: SmallApp) -> None:
    app = whole_app(small)
    opened = {
        f"{method} {rule.rule}: {status}"
        for rule in app.url_map.iter_rules()
        if access.POLICIES[rule.endpoint] not in (Access.PUBLIC, Access.SIGNED)
        for method in rule.methods
        if (status := knock(app, method, rule)) != 401
    }

    assert opened == set()


def knock(app: Any, method: str, rule: Any) -> int:
    path = re.sub(r"<[^>]*>", "1", rule.rule)
    stranger = {"REMOTE_ADDR": "203.0.113.7"}
    reply = app.test_client().open(
        path, method=method, data=b"{broken", content_type="text/html", environ_base=stranger
    )
    return int(reply.status_code)
