"""The words of the service as values: what a job, a task, an outcome and a delivery are, and nothing that acts."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple


class JobStatus(StrEnum):
    """Where a job stands."""

    RECEIVING = "receiving"  # its tasks are still being stored; nobody sees it
    QUEUED = "queued"  # stored whole, nothing sent yet
    RUNNING = "running"  # at least one task was sent
    SUCCEEDED = "succeeded"  # every task was answered
    PARTIAL = "partial"  # some were
    FAILED = "failed"  # none was
    CANCELLED = "cancelled"  # its owner stopped it
    DISCARDED = "discarded"  # refused, purged or too old; its rows are being deleted and nobody sees it


UNFINISHED = (JobStatus.QUEUED, JobStatus.RUNNING)
HIDDEN = (JobStatus.RECEIVING, JobStatus.DISCARDED)
VISIBLE = tuple(status for status in JobStatus if status not in HIDDEN)


class TaskState(IntEnum):
    """Whether a task is decided: a small number, since an empty answer is an answer."""

    PENDING = 0
    ANSWERED = 1
    FAILED = 2


class ErrorCode(StrEnum):
    """Why a task has no answer."""

    RATE_LIMITED = "rate_limited"  # refused by rate limits again and again
    QUOTA_EXHAUSTED = "quota_exhausted"  # every key was out of quota until the job's deadline
    KEY_REFUSED = "key_refused"  # every key was refused until the job's deadline
    MODEL_UNAVAILABLE = "model_unavailable"  # no key may use the model
    TIMEOUT = "timeout"  # the call ran into its deadline
    CONNECTION = "connection"  # the endpoint could not be reached, or hung up
    UPSTREAM_ERROR = "upstream_error"  # the endpoint failed (5xx)
    BAD_RESPONSE = "bad_response"  # the reply made no sense
    CONTENT_FILTER = "content_filter"  # the provider withheld the answer
    CONTEXT_LENGTH = "context_length"  # the prompt is too long for the model or the key's limits
    BAD_REQUEST = "bad_request"  # the provider refused the request as it is
    CANCELLED = "cancelled"  # the job was cancelled before the task was sent
    EXPIRED = "expired"  # the job's deadline passed
    BUDGET = "budget"  # the job had used its max_total_tokens
    INTERRUPTED = "interrupted"  # the service itself failed under the task, again and again


class DeliveryMode(StrEnum):
    """How a finished job reaches its owner."""

    INLINE = "inline"
    WEBHOOK = "webhook"


class DeliveryStatus(StrEnum):
    """Where a webhook message stands."""

    PREPARING = "preparing"  # owed; its body is not rendered yet
    PENDING = "pending"  # waits for its next attempt
    DELIVERED = "delivered"  # answered with a 2xx
    FAILED = "failed"  # given up


class FileState(StrEnum):
    """Where the file of a run's results stands."""

    PENDING = "pending"  # to be written to the drive
    WRITTEN = "written"  # there, whole
    DELETING = "deleting"  # to be deleted; its job may be gone already


class Role(StrEnum):
    ADMIN = "admin"
    USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the caller asked of a whole job; None means not set, and then nothing is sent upstream."""

    temperature: float | None = None
    max_chunk_tokens: int = 4000
    instructions: str | None = None
    template: str | None = None
    max_output_tokens: int | None = None
    response_format: str | None = None  # as JSON text: objects may take thirty times its size
    pack: bool = False
    priority: int = 0
    deadline_s: float = 7 * 86_400
    max_total_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "JobSettings":
        form = values.get("response_format")
        if form is not None and not isinstance(form, str):  # it was stored as an object once
            values = {**values, "response_format": compact_json(form)}
        return cls(**values)


# A task's prompt: text, messages in OpenAI's form, or the variables of the job's template.
Prompt = str | list[Any] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Messages or variables as they are stored: as objects they may take fifty times as much memory."""

    json: str


class NewTask(NamedTuple):
    """One task as it came in; `tokens` is the estimate of its prompt. A job may bring millions: a tuple costs least."""

    id: str
    prompt: Prompt | EncodedPrompt
    tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that one reply told of."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What GPT said; `finish_reason` is "stop" unless something cut or changed the answer."""

    text: str
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer; `message` is for the job's owner and holds no key."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call did for one task: its decision, or None when it will be asked again, and what it cost."""

    job_id: str
    position: int
    decision: Answer | Failure | None
    attempts: int = 0
    calls: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def size_bytes(self) -> int:
        """Roughly what the outcome holds in memory."""
        return 200 + (4 * len(self.decision.text) if isinstance(self.decision, Answer) else 0)


def compact_json(value: Any) -> str:
    """As JSON text that wastes nothing."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def utc_now() -> datetime:
    """Now, aware, cut to milliseconds, as every store keeps it."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def new_id() -> str:
    """32 hex characters that sort by time: milliseconds since 1970, then 80 random bits."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request: a user, or nobody in particular (`user_id` None) where tokens are not asked for."""

    user_id: str | None = None
    email: str | None = None
    role: Role | None = None

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN


ANONYMOUS = Caller()


@dataclass(frozen=True, slots=True)
class Modes:
    """The service's toggles."""

    delivery: DeliveryMode = DeliveryMode.INLINE
    registration: bool = True
    auth: bool = True
