"""The shapes of accounts, tokens and modes on the wire, and what all shapes share.

Bodies are strict: no member that is not named here, no text where a number belongs, no null for "not given".
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from gpt_worker.domain import DeliveryMode, Role

EXAMPLE_ID = "019ab2f6c3d04e5f60718293a4b5c6d7"
EXAMPLE_TIME = "2026-01-31T12:00:00.000Z"
EXAMPLE_EMAIL = "ada@example.org"
EXAMPLE_PASSWORD = "correct horse battery staple"
EXAMPLE_NEW_PASSWORD = "staple battery horse correct"

Responses = dict[str | int | Any, Any]


class Body(BaseModel):
    """What a client sends as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_null(cls, value: Any) -> Any:
        if value is None:
            raise PydanticCustomError("null", "must not be null: leave it out instead")
        return value


class Query(BaseModel):
    """What a client sends in the query string, where everything is text."""

    model_config = ConfigDict(extra="forbid")


class Reply(BaseModel):
    """What the service answers; for the documentation."""


class Problem(Reply):
    """What went wrong (RFC 9457)."""

    type: str = Field(
        description="What kind of problem, as a URI", examples=["urn:gpt-worker:problem:invalid"]
    )
    title: str = Field(description="The name of the HTTP status", examples=["Unprocessable Entity"])
    status: int = Field(description="The HTTP status", examples=[422])
    detail: str = Field(description="What went wrong, in a sentence", examples=["data: is required"])
    request_id: str = Field(
        description="The X-Request-Id of the reply; the log knows it too", examples=[EXAMPLE_ID]
    )
    errors: list["ProblemError"] | None = Field(
        None, description="For bad input: each thing that is wrong with it"
    )


class ProblemError(Reply):
    """One thing that is wrong with the input."""

    loc: list[str | int] = Field(
        description="Where, from the outside in", examples=[["settings", "temperature"]]
    )
    msg: str = Field(description="What is wrong", examples=["is required"])


PROBLEM_DESCRIPTIONS = {
    400: "The body is malformed",
    401: "No token, or not a good one",
    403: "Not allowed",
    404: "No such thing, or not yours",
    408: "The body did not come in time",
    409: "Not in a state in which this can be done",
    413: "Over a limit, which the detail names",
    415: "Not a content type that is taken; the detail says which header to send",
    422: "The input breaks a rule; see `errors`",
    429: "Too often, or too much at once: the detail names the limit; come back after `Retry-After` seconds",
    500: "A bug; the log knows more under the request's id",
    503: "Not now; come back after `Retry-After` seconds",
    507: "The disk is low",
}
BODY_PROBLEMS = (400, 408, 413, 415, 422)
HEADER_PARAMETERS = "x-header-parameters"


def problems(*statuses: int) -> Responses:
    """The documentation of problems that an operation may answer with, beside those that follow from who may use it."""
    return {str(status): {"description": PROBLEM_DESCRIPTIONS[status]} for status in statuses}


def answer(description: str, model: type["Reply"], *headers: str) -> dict[str, Any]:
    """The documentation of a good JSON answer."""
    return content(description, {"application/json": {"schema": shape(model)}}, *headers)


def content(description: str, forms: dict[str, Any], *headers: str) -> dict[str, Any]:
    """The documentation of a good answer in these forms, by content type."""
    return {"description": description, "headers": header(*headers), "content": forms}


def text(example: str) -> dict[str, Any]:
    """The documentation of a text in one of the forms of an answer or a body."""
    return {"schema": {"type": "string"}, "example": example}


def shape(model: type[BaseModel]) -> dict[str, str]:
    """The reference to a shape."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def header(*names: str) -> dict[str, Any]:
    """The references to headers of an answer."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


class IdPath(BaseModel):
    """The id in a path."""

    id: str = Field(description="The id")


class ListQuery(Query):
    """Which page of a list."""

    limit: int = Field(20, ge=1, le=100, description="How many at most")
    cursor: str | None = Field(
        None,
        pattern="^[0-9a-f]{32}$",
        description="The `next_cursor` of the page before",
    )


Email = Annotated[
    str, Field(description="An e-mail address; upper and lower case are the same", examples=[EXAMPLE_EMAIL])
]
NewPassword = Annotated[
    str, Field(min_length=12, max_length=256, description="12 to 256 characters", examples=[EXAMPLE_PASSWORD])
]
Password = Annotated[str, Field(description="The password", examples=[EXAMPLE_PASSWORD])]


class RegisterBody(Body):
    """A new account."""

    email: Email
    password: NewPassword
    setup_token: str | None = Field(
        None, description="In production, for the first account: the content of the file that the log names"
    )


class LoginBody(Body):
    """Who logs in."""

    email: Email
    password: Password


class TokenBody(Body):
    """A token to be made."""

    name: str = Field(min_length=1, max_length=200, description="What it is for", examples=["nightly import"])
    expires_in_days: int | None = Field(None, ge=1, le=3650, description="Without it, no end", examples=[90])


class PasswordBody(Body):
    """The old password and the new one."""

    old: Password
    new: NewPassword = Field(examples=[EXAMPLE_NEW_PASSWORD])


class UserPatchBody(Body):
    """What to change of an account; the rest stays."""

    role: Role | None = Field(None, strict=False, description="A new role")
    disabled: bool | None = Field(
        None, description="true ends the user's tokens at once, and no login works", examples=[False]
    )


class SettingsPatchBody(Body):
    """Which modes to change; the rest stay."""

    delivery: DeliveryMode | None = Field(
        None, strict=False, description="How jobs are delivered from now on"
    )
    registration: bool | None = Field(None, description="Whether anybody may register", examples=[True])
    auth: bool | None = Field(None, description="Whether a token is asked for; false is for a closed network")


Id = Annotated[str, Field(description="The id", examples=[EXAMPLE_ID])]
Time = Annotated[str, Field(description="RFC 3339, UTC", examples=[EXAMPLE_TIME])]


class UserReply(Reply):
    """An account."""

    id: Id
    email: Email
    role: Role = Field(description="What the user may do")
    created_at: Time


class ManagedUserReply(UserReply):
    """An account, as an admin sees it."""

    disabled: bool = Field(description="Whether it is shut out")


class BearerReply(Reply):
    """A token to send as `Authorization: Bearer …`."""

    type: str = Field(description="Always bearer", examples=["bearer"])
    token: str = Field(description="The token", examples=["eyJhbGciOi…"])
    expires_at: Time


class RegisteredReply(Reply):
    """A new account, logged in."""

    user: UserReply
    token: BearerReply


class LoginReply(Reply):
    """A token for 24 hours."""

    token: BearerReply


class NewTokenReply(Reply):
    """A token for scripts, shown this once."""

    id: Id
    name: str = Field(description="What it is for", examples=["nightly import"])
    token: str = Field(description="The token", examples=["eyJhbGciOi…"])
    expires_at: str | None = Field(description="RFC 3339, UTC; null: no end", examples=[EXAMPLE_TIME])


class TokenReply(Reply):
    """A token for scripts, without its text."""

    id: Id
    name: str = Field(description="What it is for", examples=["nightly import"])
    created_at: Time
    expires_at: str | None = Field(description="RFC 3339, UTC; null: no end", examples=[EXAMPLE_TIME])


NextCursor = Annotated[
    str | None,
    Field(description="Send it as `cursor` for the next page; null: this is the last", examples=[None]),
]


class TokensReply(Reply):
    """A page of tokens."""

    data: list[TokenReply] = Field(description="Newest first")
    next_cursor: NextCursor


class UsersReply(Reply):
    """A page of accounts."""

    data: list[ManagedUserReply] = Field(description="Newest first")
    next_cursor: NextCursor


class SettingsReply(Reply):
    """The service's modes."""

    delivery: DeliveryMode = Field(description="How jobs are delivered")
    registration: bool = Field(description="Whether anybody may register")
    auth: bool = Field(description="Whether a token is asked for")
