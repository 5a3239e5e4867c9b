"""The endpoints of accounts and modes: shapes, statuses, and what they refuse."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.small_app import EMAIL, PASSWORD, SmallApp

OTHER = "bob@example.org"
NEW = "another horse battery staple"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path)
    yield app
    app.close()


def id_of(small: SmallApp, token: str) -> str:
    return str(small.request("GET", "/me", token).json["id"])


def test_registering_answers_with_the_user_and_a_token(small: SmallApp) -> None:
    reply = small.client.post("/register", json={"email": EMAIL, "password": PASSWORD})

    assert reply.status_code == 201
    assert list(reply.json) == ["user", "token"]
    assert list(reply.json["user"]) == ["id", "email", "role", "created_at"]
    assert list(reply.json["token"]) == ["type", "token", "expires_at"]
    assert reply.json["token"]["type"] == "bearer"
    assert TIME.fullmatch(reply.json["token"]["expires_at"])
    assert TIME.fullmatch(reply.json["user"]["created_at"])


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"password": PASSWORD}, ["email"]),
        ({"email": EMAIL}, ["password"]),
        ({"email": "nobody", "password": PASSWORD}, ["email"]),
        ({"email": EMAIL, "password": "short"}, ["password"]),
        ({"email": 1, "password": PASSWORD}, ["email"]),
        ({"email": EMAIL, "password": PASSWORD, "role": "admin"}, ["role"]),
        ({"email": EMAIL, "password": PASSWORD, "setup_token": None}, ["setup_token"]),
    ],
)
def test_bad_registration_is_a_422_that_names_the_member(
    small: SmallApp, body: dict[str, Any], loc: list[str]
) -> None:
    reply = small.client.post("/register", json=body)

    assert reply.status_code == 422
    assert [error["loc"] for error in reply.json["errors"]] == [loc]
    assert PASSWORD not in reply.text


def test_registration_that_is_off_is_a_403(small: SmallApp) -> None:
    small.register()

    assert small.client.post("/register", json={"email": OTHER, "password": PASSWORD}).status_code == 403


def test_taken_address_is_a_409(small: SmallApp) -> None:
    small.register()
    small.modes.change(registration=True)

    assert small.client.post("/register", json={"email": EMAIL, "password": PASSWORD}).status_code == 409


def test_wrong_login_is_the_same_401_for_known_and_unknown(small: SmallApp) -> None:
    small.register()

    replies = [
        small.client.post("/login", json={"email": email, "password": "wrong"}) for email in (EMAIL, OTHER)
    ]

    assert [reply.status_code for reply in replies] == [401, 401]
    assert replies[0].json["detail"] == replies[1].json["detail"]
    assert replies[0].headers["WWW-Authenticate"] == "Bearer"


def test_locked_address_is_a_429_with_retry_after(small: SmallApp) -> None:
    small.register()
    for _ in range(5):
        assert small.client.post("/login", json={"email": EMAIL, "password": "wrong"}).status_code == 401

    reply = small.client.post("/login", json={"email": EMAIL, "password": PASSWORD})

    assert reply.status_code == 429
    assert reply.headers["Retry-After"] == "1"


def test_earlier_token_lets_the_owner_in_while_strangers_guess(small: SmallApp) -> None:
    earlier = small.register()
    small.request("POST", "/logout", earlier)
    for _ in range(5):
        small.client.post("/login", json={"email": EMAIL, "password": "wrong"})

    replies = [
        small.request("POST", "/login", token, json={"email": EMAIL, "password": PASSWORD})
        for token in (None, "no-token", earlier)
    ]

    assert [reply.status_code for reply in replies] == [429, 429, 200]


def test_logout_revokes_the_token(small: SmallApp) -> None:
    token = small.register()

    reply = small.request("POST", "/logout", token)

    assert (reply.status_code, reply.data) == (204, b"")
    assert small.request("GET", "/me", token).status_code == 401


def test_script_token_is_shown_once(small: SmallApp) -> None:
    token = small.register()

    made = small.request("POST", "/tokens", token, json={"name": "script", "expires_in_days": 1})
    listed = small.request("GET", "/tokens", made.json["token"])

    assert made.status_code == 201
    assert list(made.json) == ["id", "name", "token", "expires_at"]
    assert listed.json["next_cursor"] is None
    assert [set(entry) for entry in listed.json["data"]] == [{"id", "name", "created_at", "expires_at"}]
    assert made.json["token"] not in listed.text


def test_script_token_without_an_end_says_null(small: SmallApp) -> None:
    token = small.register()

    assert small.request("POST", "/tokens", token, json={"name": "script"}).json["expires_at"] is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x" * 201},
        {"name": "x", "expires_in_days": 0},
        {"name": "x", "expires_in_days": 10**400},
        {"name": "x", "expires_in_days": 3651},
        {"name": "x", "expires_in_days": "1"},
        {"name": "x", "expires_in_days": 1.0},
        {"name": "x", "expires_in_days": None},
    ],
)
def test_bad_script_token_is_refused(small: SmallApp, body: dict[str, Any]) -> None:
    reply = small.request("POST", "/tokens", small.register(), json=body)

    assert reply.status_code in (400, 422)


def test_deleting_a_token(small: SmallApp) -> None:
    token = small.register()
    made = small.request("POST", "/tokens", token, json={"name": "script"}).json

    assert small.request("DELETE", f"/tokens/{made['id']}", token).status_code == 204
    assert small.request("DELETE", f"/tokens/{made['id']}", token).status_code == 404
    assert small.request("GET", "/me", made["token"]).status_code == 401


def test_pages_follow_each_other_by_cursor(small: SmallApp) -> None:
    token = small.register()
    ids = [
        small.request("POST", "/tokens", token, json={"name": str(number)}).json["id"] for number in range(3)
    ]

    first = small.request("GET", "/tokens?limit=2", token).json
    second = small.request("GET", f"/tokens?limit=2&cursor={first['next_cursor']}", token).json

    assert [entry["id"] for entry in first["data"] + second["data"]] == sorted(ids, reverse=True)
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "limit=", "cursor=x", "cursor=", "page=2"]
)
def test_bad_list_query_is_a_422(small: SmallApp, query: str) -> None:
    assert small.request("GET", f"/tokens?{query}", small.register()).status_code == 422


def test_me_is_the_user_of_the_token(small: SmallApp) -> None:
    me = small.request("GET", "/me", small.register())

    assert list(me.json) == ["id", "email", "role", "created_at"]
    assert (me.json["email"], me.json["role"]) == (EMAIL, "admin")


def test_changing_the_password(small: SmallApp) -> None:
    token = small.register()

    wrong = small.request("POST", "/me/password", token, json={"old": NEW, "new": NEW})
    right = small.request("POST", "/me/password", token, json={"old": PASSWORD, "new": NEW})

    assert (wrong.status_code, right.status_code) == (403, 204)
    assert small.client.post("/login", json={"email": EMAIL, "password": NEW}).status_code == 200


def test_admin_lists_and_changes_users(small: SmallApp) -> None:
    admin = small.register()
    user = small.register_user(OTHER)

    listed = small.request("GET", "/users", admin).json
    changed = small.request("PATCH", f"/users/{id_of(small, user)}", admin, json={"disabled": True})

    assert [entry["email"] for entry in listed["data"]] == [OTHER, EMAIL]
    assert list(changed.json) == ["id", "email", "role", "created_at", "disabled"]
    assert changed.json["disabled"] is True
    assert small.request("GET", "/me", user).status_code == 401


def test_new_role_is_taken_by_its_name(small: SmallApp) -> None:
    admin = small.register()
    user = small.register_user(OTHER)

    reply = small.request("PATCH", f"/users/{id_of(small, user)}", admin, json={"role": "admin"})

    assert reply.json["role"] == "admin"
    assert small.request("GET", "/users", user).status_code == 200


@pytest.mark.parametrize(
    "body", [{"role": "root"}, {"role": None}, {"disabled": "true"}, {"disabled": 1}, {"email": OTHER}]
)
def test_bad_change_of_a_user_is_a_422(small: SmallApp, body: dict[str, Any]) -> None:
    admin = small.register()

    assert small.request("PATCH", f"/users/{id_of(small, admin)}", admin, json=body).status_code == 422


def test_last_admin_is_a_409(small: SmallApp) -> None:
    admin = small.register()
    path = f"/users/{id_of(small, admin)}"

    assert small.request("PATCH", path, admin, json={"role": "user"}).status_code == 409
    assert small.request("DELETE", path, admin).status_code == 409


@pytest.mark.parametrize("user_id", ["0" * 32, "1", "x" * 1000, "%00", "%FF", "..%2f"])
def test_unknown_user_is_a_404(small: SmallApp, user_id: str) -> None:
    assert small.request("DELETE", f"/users/{user_id}", small.register()).status_code == 404


def test_deleted_user_is_out(small: SmallApp) -> None:
    admin = small.register()
    user = small.register_user(OTHER)

    assert small.request("DELETE", f"/users/{id_of(small, user)}", admin).status_code == 204
    assert small.request("GET", "/me", user).status_code == 401


# Modes


def test_settings_show_the_modes(small: SmallApp) -> None:
    token = small.register()

    reply = small.request("GET", "/settings", token)

    assert list(reply.json.items()) == [("delivery", "inline"), ("registration", False), ("auth", True)]


def test_settings_change_whole_or_in_part(small: SmallApp) -> None:
    token = small.register()

    small.request("PATCH", "/settings", token, json={"delivery": "webhook"})
    reply = small.request("PATCH", "/settings", token, json={"auth": False})

    assert (reply.status_code, reply.json) == (
        200,
        {"delivery": "webhook", "registration": False, "auth": False},
    )
    assert small.client.get("/settings").json == reply.json


@pytest.mark.parametrize(
    "body", [{"delivery": "email"}, {"delivery": None}, {"auth": "false"}, {"auth": 0}, {"auths": False}]
)
def test_bad_settings_change_nothing(small: SmallApp, body: dict[str, Any]) -> None:
    token = small.register()
    before = small.modes.current()

    assert small.request("PATCH", "/settings", token, json=body).status_code == 422
    assert small.modes.current() == before


def test_settings_are_an_admins_to_change_even_without_auth(small: SmallApp) -> None:
    small.register()
    user = small.register_user(OTHER)
    small.modes.change(auth=False)

    assert small.request("PATCH", "/settings", user, json={"auth": True}).status_code == 403
    assert small.client.patch("/settings", json={"auth": True}).status_code == 401
