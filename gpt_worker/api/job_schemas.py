"""The shapes of jobs on the wire, for validation and for the documentation."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from config import MAX_MODEL_LENGTH, MODEL_PATTERN
from gpt_worker.api.schemas import (
    EXAMPLE_EMAIL,
    EXAMPLE_TIME,
    Body,
    Id,
    ListQuery,
    NextCursor,
    Query,
    Reply,
    Time,
)
from gpt_worker.domain import DeliveryMode, ErrorCode

MAX_DEADLINE_S = 90 * 86_400
# Each job that is not finished has all three in memory.
MAX_INSTRUCTIONS_LENGTH = MAX_TEMPLATE_LENGTH = 100_000
MAX_RESPONSE_FORMAT_BYTES = 64 << 10
StatusName = Literal["queued", "running", "succeeded", "partial", "failed", "cancelled"]
OLD_NAMES = {"gpt_type": "model", "maxTokenCount": "max_chunk_tokens"}
FOREIGN_NAMES = {  # of the same things elsewhere; by their letters they are near to none, or to another setting
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "system": "instructions",
    "system_prompt": "instructions",
    "prompt": "template",
}
LEAST_LIKENESS = 0.75

Model = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LENGTH, pattern=MODEL_PATTERN)]
ChunkTokens = Annotated[int, Field(ge=1, le=1_000_000_000)]


class ResponseFormat(Body):
    """OpenAI's response_format; what else is in it is the provider's to judge."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field(min_length=1, max_length=50, description="text, json_object or json_schema")


class JobSettingsBody(Body):
    """How a job's tasks are asked. Only what is set here is sent upstream."""

    model: Model | None = Field(None, description="The model; without it, the service's GPT_MODEL")
    gpt_type: Model | None = Field(None, description="The old name of `model`")
    temperature: float | None = Field(None, ge=0, le=2, description="OpenAI's temperature", examples=[1])
    max_chunk_tokens: ChunkTokens | None = Field(
        None, description="Estimated prompt tokens of a chunk (4000)"
    )
    maxTokenCount: ChunkTokens | None = Field(  # noqa: N815 (the old worker's name)
        None, description="The old name of `max_chunk_tokens`"
    )
    instructions: str | None = Field(
        None, max_length=MAX_INSTRUCTIONS_LENGTH, description="The system message of every task"
    )
    template: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEMPLATE_LENGTH,
        description="A prompt with {variables}; {{ and }} are braces. A task that is a text fills {text}; "
        "filled, it may have MAX_JSON_BYTES",
        examples=["Translate to {lang}: {text}"],
    )
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000_000, description="The most of one answer")
    response_format: ResponseFormat | None = Field(
        None, description="OpenAI's form, up to 64 KiB of JSON; the answer stays a text"
    )
    pack: bool | None = Field(
        None,
        description="Several short tasks a request (false): the instructions are sent once for all of them, and the "
        "usage is shared out. Not with messages or response_format",
    )
    priority: int | None = Field(None, ge=-100, le=100, description="Among one's own jobs; higher goes first")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        description="Seconds after which what was not answered is given up (7 days)",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="Stop sending when the job has used so many tokens"
    )
    delivery: DeliveryMode | None = Field(None, strict=False, description="For this job only")

    @model_validator(mode="after")
    def _go_together(self) -> "JobSettingsBody":
        for old, new in OLD_NAMES.items():
            before, now = getattr(self, old), getattr(self, new)
            if before is not None and now is not None and before != now:
                raise PydanticCustomError("twice", f"{old} is the old name of {new}: set one of them")
        if self.pack and self.response_format is not None:
            raise PydanticCustomError(
                "apart", "pack has a response_format of its own: set one of pack and response_format"
            )
        return self


def meant_setting(name: str) -> str | None:
    """The setting that somebody may have meant who wrote this one, which there is not."""
    if name in FOREIGN_NAMES:
        return FOREIGN_NAMES[name]
    near = get_close_matches(name[:MAX_MODEL_LENGTH], JobSettingsBody.model_fields, 1, LEAST_LIKENESS)
    return near[0] if near else None


class ChatMessage(Reply):
    """One message in OpenAI's form; what else is in it is the provider's to judge."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(description="Who says it", examples=["user"])
    content: Any = Field(None, description="What is said", examples=["Say hello."])


class _ObjectTask(Body):
    id: str | None = Field(
        None, min_length=1, max_length=200, description="In a list: the task's id, in place of its number"
    )


class TextTask(_ObjectTask):
    """A text that brings its id."""

    text: str = Field(min_length=1, examples=["Say hello."])


class MessagesTask(_ObjectTask):
    """A conversation so far."""

    messages: list[ChatMessage] = Field(min_length=1)


class VariablesTask(_ObjectTask):
    """The variables of the job's template."""

    vars: dict[str, str | int | float | bool] = Field(
        description="By name", examples=[{"lang": "French", "text": "good night"}]
    )


Task = Annotated[str, Field(min_length=1)] | TextTask | MessagesTask | VariablesTask
MetadataBody = Annotated[
    dict[str, Annotated[str, Field(max_length=512)]] | None,
    Field(description="Up to 16 texts, echoed in the job and its webhook", examples=[{"batch": "42"}]),
]


class JobBody(Body):
    """A job: tasks by id, and how to ask them."""

    data: Annotated[dict[str, Task], Field(min_length=1)] | Annotated[list[Task], Field(min_length=1)] = (
        Field(
            description="id → task, in the order of the answers; or a list of tasks, with the ids 0, 1, … or their own"
        )
    )
    settings: JobSettingsBody | None = None
    metadata: MetadataBody = None


class JobForm(Body):
    """A job as a form: a file of tasks, and how to ask them."""

    settings: JobSettingsBody | None = None
    metadata: MetadataBody = None
    file: bytes = Field(
        description="CSV or JSONL, by the part's content type or the ending of its name; also gzipped (.gz)"
    )


class SubmitQuery(Query):
    dry_run: Literal["true", "false"] = Field("false", description="true: only say what the job would be")


class JobQuery(Query):
    results: Literal["true", "false"] = Field(
        "true", description="false: leave the three result members null"
    )


class PurgeQuery(Query):
    purge: Literal["true", "false"] = Field(
        "false", description="true: delete the job and all that belongs to it"
    )


class JobsQuery(ListQuery):
    status: StatusName | None = Field(None, description="Only these")
    all: Literal["true", "false"] = Field("false", description="true: everyone's (admin)")


class ResultsQuery(Query):
    format: Literal["json", "jsonl", "csv"] = Field("json", description="How they are written")
    expires: str | None = Field(None, max_length=20, description="Of a signed link")
    signature: str | None = Field(None, max_length=200, description="Of a signed link")


class RetryBody(Body):
    """Which tasks to ask again; without it, all that have no answer."""

    codes: list[Annotated[ErrorCode, Field(strict=False)]] | None = Field(
        None,
        min_length=1,
        description="Only the tasks with these errors",
        examples=[["timeout"]],
    )


class Counts(Reply):
    """How far the tasks are."""

    total: int = Field(examples=[2])
    answered: int = Field(examples=[2])
    failed: int = Field(examples=[0])
    pending: int = Field(examples=[0])


class UsageReply(Reply):
    """What the job has used."""

    requests: int = Field(description="Calls sent for the job, failed ones too", examples=[2])
    prompt_tokens: int = Field(description="Of the replies that told their usage", examples=[31])
    completion_tokens: int = Field(description="Of the replies that told their usage", examples=[9])


class TaskError(Reply):
    """Why a task has no answer."""

    code: ErrorCode = Field(description="The kind; the list may grow")
    message: str = Field(description="In a sentence", examples=["The call took longer than 300 s."])
    attempts: int = Field(description="Charged tries", examples=[4])


class WaitingReply(Reply):
    """Why nothing moves."""

    reason: str = Field(examples=["no usable key"])
    until: str | None = Field(description="RFC 3339, if it is known", examples=[EXAMPLE_TIME])


class JobReply(Reply):
    """A job."""

    id: Id
    status: StatusName
    run: int = Field(description="1, and one more with each retry", examples=[1])
    model: str = Field(description="Which model answers", examples=["gpt-5.4-mini"])
    delivery: DeliveryMode = Field(description="How the results are delivered")
    owner: str | None = Field(description="The owner's address; null: nobody's", examples=[EXAMPLE_EMAIL])
    metadata: dict[str, str] = Field(description="As submitted", examples=[{"batch": "42"}])
    waiting: WaitingReply | None = Field(description="Why nothing moves", examples=[None])
    counts: Counts
    usage: UsageReply
    results: dict[str, str | None] | None = Field(
        description="Every id, in the order of `data`; null: no answer. The whole is null where it is left out",
        examples=[{"capital": "Paris", "greeting": "Hello!"}],
    )
    errors: dict[str, TaskError] | None = Field(description="Why a task has no answer", examples=[{}])
    finish_reasons: dict[str, str] | None = Field(
        description='Those that are not "stop"', examples=[{"greeting": "length"}]
    )
    results_url: str | None = Field(
        description="Where the results are when they don't fit here", examples=[None]
    )
    created_at: Time
    started_at: str | None = Field(description="When the first call was sent", examples=[EXAMPLE_TIME])
    finished_at: str | None = Field(description="When the last task was decided", examples=[EXAMPLE_TIME])


class DryRunReply(Reply):
    """What a job would be; nothing is stored."""

    dry_run: bool = Field(description="Always true", examples=[True])
    tasks: int = Field(examples=[2])
    chunks: int = Field(description="Slices that are handed to threads; with `pack`, requests", examples=[1])
    estimated_prompt_tokens: int = Field(examples=[31])
    estimated_seconds: float | None = Field(description="null while no limit is known yet", examples=[1.5])


class JobsReply(Reply):
    """A page of jobs."""

    data: list[JobReply] = Field(description="Newest first, without results")
    next_cursor: NextCursor


class ResultsReply(Reply):
    """Results and errors, without the job."""

    results: dict[str, str | None] = Field(description="Every id, in the order of `data`; null: no answer")
    errors: dict[str, TaskError] = Field(description="Why a task has no answer")
