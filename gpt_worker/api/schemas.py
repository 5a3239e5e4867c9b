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


PROBLEM_CONTENT = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEM_DESCRIPTIONS = {
    400: "The body is malformed",
    401: "No token, or not a good one",
    403: "Not allowed",
    404: "No such thing, or not yours",
    409: "Not in a state in which this can be done",
    413: "Over a limit, which the detail names",
    415: "Not a content type that is taken; the detail says which header to send",
    422: "The input breaks a rule; see `errors`",
    429: "Too often; come back after `Retry-After` seconds",
    503: "Not now; come back after `Retry-After` seconds",
    507: "The disk is low",
}


def problems(*statuses: int) -> dict[str | int | Any, Any]:
    """The documentation of the problems that an operation may answer with."""
    return {
        str(status): {"description": PROBLEM_DESCRIPTIONS[status], "content": PROBLEM_CONTENT}
        for status in statuses
    }


BODY_PROBLEMS = (400, 413, 415, 422)


class IdPath(BaseModel):
    """The id in a path."""

    id: str = Field(description="The id", json_schema_extra={"example": EXAMPLE_ID})


class ListQuery(Query):
    """Which page of a list."""

    limit: int = Field(20, ge=1, le=100, description="How many at most")
    cursor: str | None = Field(
        None,
        pattern="^[0-9a-f]{32}$",
        description="The `next_cursor` of the page before",
        json_schema_extra={"example": EXAMPLE_ID},
    )


Email = Annotated[
    str, Field(description="An e-mail address; upper and lower case are the same", examples=[EXAMPLE_EMAIL])
]
NewPassword = Annotated[
    str, Field(min_length=12, max_length=256, description="12 to 256 characters", examples=[EXAMPLE_PASSWORD])
]
Password = Annotated[str, Field(description="The password", examples=[EXAMPLE_PASSWORD])]


class RegisterBody(Body):
    email: Email
    password: NewPassword
    setup_token: str | None = Field(
        None, description="In production, for the first account: the content of the file that the log names"
    )


class LoginBody(Body):
    email: Email
    password: Password


class TokenBody(Body):
    name: str = Field(min_length=1, max_length=200, description="What it is for", examples=["nightly import"])
    expires_in_days: int | None = Field(None, ge=1, le=3650, description="Without it, no end", examples=[90])


class PasswordBody(Body):
    old: Password
    new: NewPassword


class UserPatchBody(Body):
    role: Role | None = Field(None, strict=False, description="A new role")
    disabled: bool | None = Field(None, description="true ends the user's tokens at once, and no login works")


class SettingsPatchBody(Body):
    delivery: DeliveryMode | None = Field(
        None, strict=False, description="How jobs are delivered from now on"
    )
    registration: bool | None = Field(None, description="Whether anybody may register")
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
    user: UserReply
    token: BearerReply


class LoginReply(Reply):
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
    data: list[TokenReply] = Field(description="Newest first")
    next_cursor: NextCursor


class UsersReply(Reply):
    data: list[ManagedUserReply] = Field(description="Newest first")
    next_cursor: NextCursor


class SettingsReply(Reply):
    """The service's modes."""

    delivery: DeliveryMode = Field(description="How jobs are delivered")
    registration: bool = Field(description="Whether anybody may register")
    auth: bool = Field(description="Whether a token is asked for")
