"""Accounts and tokens over HTTP: register, log in and out, one's password and tokens, an admin's users."""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from gpt_worker.accounts import IssuedToken, Page, Token, User
from gpt_worker.api import schemas
from gpt_worker.api.access import bearer_token, token_id, user_id
from gpt_worker.api.context import service
from gpt_worker.rendering import render_time
from gpt_worker.user_limits import network

T = TypeVar("T")
Json = dict[str, Any]

api = APIBlueprint(
    "accounts", __name__, abp_tags=[Tag(name="accounts", description="Users and their tokens")]
)


@api.post(
    "/register",
    summary="Open an account",
    description="The first account is the admin's; then registration is off until an admin turns it on.",
    responses={
        201: schemas.answer("The account, and a token for 24 hours", schemas.RegisteredReply),
        **schemas.problems(403, 409, 503, 507, *schemas.BODY_PROBLEMS),
    },
)
def register(body: schemas.RegisterBody) -> tuple[Json, int]:
    accounts, origin = service().accounts, network(request.remote_addr)
    user, token = accounts.register(body.email, body.password, body.setup_token, origin)
    return {"user": _render_user(user), "token": _render_bearer(token)}, 201


@api.post(
    "/login",
    summary="Log in for 24 hours",
    description=(
        "After 5 wrong passwords in 15 minutes the address is locked, for 1 s to 15 min, for the network that they "
        "came from; after 50 from anywhere, for all. After 240 failed logins in a minute, for whatever addresses, a "
        "network gets a 429. Who sends an earlier token of the account in `Authorization`, even one that has ended, is "
        "not kept out by strangers."
    ),
    responses={
        200: schemas.answer("The token", schemas.LoginReply),
        **schemas.problems(401, 429, 503, 507, *schemas.BODY_PROBLEMS),
    },
)
def login(body: schemas.LoginBody) -> Json:
    accounts, origin = service().accounts, network(request.remote_addr)
    return {"token": _render_bearer(accounts.login(body.email, body.password, bearer_token(), origin))}


@api.post(
    "/logout",
    summary="Revoke this token",
    description="The token of this request ends at once.",
    responses={204: None, **schemas.problems(507)},
)
def logout() -> Response:
    service().accounts.logout(token_id(), user_id())
    return Response(status=204)


@api.post(
    "/tokens",
    summary="Make a token for scripts",
    description="Its text is shown this once.",
    responses={
        201: schemas.answer("The token", schemas.NewTokenReply),
        **schemas.problems(507, *schemas.BODY_PROBLEMS),
    },
)
def create_token(body: schemas.TokenBody) -> tuple[Json, int]:
    token = service().accounts.create_api_token(token_id(), body.name, body.expires_in_days)
    return {
        "id": token.id,
        "name": token.name,
        "token": token.text,
        "expires_at": render_time(token.expires_at),
    }, 201


@api.get(
    "/tokens",
    summary="One's own tokens for scripts",
    description="Newest first, without their texts.",
    responses={200: schemas.answer("A page of tokens", schemas.TokensReply)},
)
def list_tokens(query: schemas.ListQuery) -> Json:
    page = service().accounts.list_api_tokens(user_id(), before=query.cursor, limit=query.limit)
    return _render_page(page, _render_token)


@api.delete(
    "/tokens/<id>",
    summary="Revoke a token of one's own",
    description="It ends at once.",
    responses={204: None, **schemas.problems(507)},
)
def delete_token(path: schemas.IdPath) -> Response:
    service().accounts.delete_token(user_id(), path.id)
    return Response(status=204)


@api.get(
    "/me",
    summary="One's own account",
    description="Whose token this is.",
    responses={200: schemas.answer("The account", schemas.UserReply)},
)
def get_me() -> Json:
    return _render_user(service().accounts.me(user_id()))


@api.post(
    "/me/password",
    summary="Change one's password",
    description="Ends every other token of the account. A wrong old password is a 403.",
    responses={204: None, **schemas.problems(403, 429, 503, 507, *schemas.BODY_PROBLEMS)},
)
def change_password(body: schemas.PasswordBody) -> Response:
    service().accounts.change_password(user_id(), token_id(), body.old, body.new)
    return Response(status=204)


@api.get(
    "/users",
    summary="All accounts (admin)",
    description="Newest first.",
    responses={200: schemas.answer("A page of accounts", schemas.UsersReply)},
)
def list_users(query: schemas.ListQuery) -> Json:
    page = service().accounts.list_users(before=query.cursor, limit=query.limit)
    return _render_page(page, _render_managed_user)


@api.patch(
    "/users/<id>",
    summary="Give a role, disable or enable (admin)",
    description="The last enabled admin stays one: 409.",
    responses={
        200: schemas.answer("The account as it is now", schemas.ManagedUserReply),
        **schemas.problems(409, 507, *schemas.BODY_PROBLEMS),
    },
)
def change_user(path: schemas.IdPath, body: schemas.UserPatchBody) -> Json:
    return _render_managed_user(
        service().accounts.change_user(path.id, role=body.role, disabled=body.disabled)
    )


@api.delete(
    "/users/<id>",
    summary="Delete an account (admin)",
    description="Its tokens end at once; its jobs become yours. Nobody can delete their own account.",
    responses={204: None, **schemas.problems(409, 507)},
)
def delete_user(path: schemas.IdPath) -> Response:
    service().accounts.delete_user(path.id, user_id())
    return Response(status=204)


def _render_user(user: User) -> Json:
    return {
        "id": user.id,
        "email": user.email,
        "role": user.role.value,
        "created_at": render_time(user.created_at),
    }


def _render_managed_user(user: User) -> Json:
    return {**_render_user(user), "disabled": user.disabled}


def _render_token(token: Token) -> Json:
    return {
        "id": token.id,
        "name": token.name,
        "created_at": render_time(token.created_at),
        "expires_at": render_time(token.expires_at),
    }


def _render_bearer(token: IssuedToken) -> Json:
    return {"type": "bearer", "token": token.text, "expires_at": render_time(token.expires_at)}


def _render_page(page: Page[T], render: Callable[[T], Json]) -> Json:
    return {"data": [render(item) for item in page.items], "next_cursor": page.next_cursor}
