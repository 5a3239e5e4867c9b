"""A job as it came in, checked member by member and turned into a `JobRequest`.

Settings go through their schema; tasks are checked by hand, since there may be hundreds of thousands.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from config import Settings
from gpt_worker.api.job_schemas import MAX_RESPONSE_FORMAT_BYTES, JobSettingsBody, ResponseFormat
from gpt_worker.api.schemas import Body
from gpt_worker.domain import DeliveryMode, JobSettings, NewTask, Prompt, compact_json
from gpt_worker.errors import FieldError, Invalid, TooLarge
from gpt_worker.gpt import template_parts
from gpt_worker.jobs import JobRequest
from gpt_worker.splitting import BYTES_PER_TOKEN, estimate_prompt, estimate_tokens, size_bytes

MAX_ID_LENGTH = 200
MAX_METADATA = 16
MAX_METADATA_LENGTH = 512
MEMBERS = {"data", "settings", "metadata"}
TASK_FORMS = ("text", "messages", "vars")


def read_job(
    body: Mapping[str, Any], service: Settings, delivery: DeliveryMode, model: str | None
) -> JobRequest:
    """The job that a JSON body asks for.

    Args:
        service: its limits, and the model where the job names none.
        delivery: where the job does not choose.
        model: the one that answers whatever the job asks for: the embedded one.

    Raises:
        Invalid, TooLarge, pydantic.ValidationError: naming the members that are wrong.
    """
    unknown = [FieldError((name,), "is not known here") for name in body if name not in MEMBERS]
    if unknown:
        raise Invalid(*unknown)
    if "data" not in body:
        raise Invalid.at("is required", "data")
    settings = read_settings(body.get("settings", {}))
    job = job_without_tasks(settings, service, delivery, model, "settings")
    metadata = read_metadata(body.get("metadata", {}))
    return replace(job, metadata=metadata, tasks=list(_tasks(body["data"], job.settings, service)))


def job_without_tasks(
    settings: JobSettingsBody, service: Settings, delivery: DeliveryMode, model: str | None, *loc: str
) -> JobRequest:
    """What the settings, which stand at `loc`, say of a job; the other arguments are those of `read_job`."""
    return JobRequest(
        settings=job_settings(settings, *loc),
        model=model or settings.model or settings.gpt_type or service.model,
        delivery=settings.delivery or delivery,
        metadata={},
        tasks=(),
    )


def read_settings(values: Any) -> JobSettingsBody:
    """The settings, checked; their errors are at `settings.…`."""
    if not isinstance(values, dict):
        raise Invalid.at("must be an object", "settings")
    return _Envelope.model_validate({"settings": values}).settings


class _Envelope(Body):
    settings: JobSettingsBody


def job_settings(body: JobSettingsBody, *loc: str) -> JobSettings:
    """What the dispatcher needs of the settings, which stand at `loc`; Invalid for a template that is none."""
    if body.template is not None:
        try:
            template_parts(body.template)
        except ValueError as error:
            raise Invalid.at(f"is no template: {error}", *loc, "template") from error
    values: dict[str, Any] = {
        "temperature": body.temperature,
        "max_chunk_tokens": body.max_chunk_tokens or body.maxTokenCount,
        "instructions": body.instructions,
        "template": body.template,
        "max_output_tokens": body.max_output_tokens,
        "response_format": _response_format(body.response_format, loc),
        "pack": body.pack,
        "priority": body.priority,
        "deadline_s": body.deadline_s,
        "max_total_tokens": body.max_total_tokens,
    }
    return JobSettings(**{name: value for name, value in values.items() if value is not None})


def _response_format(form: ResponseFormat | None, loc: tuple[str, ...]) -> str | None:
    if form is None:
        return None
    text = compact_json(form.model_dump())
    if len(text.encode()) > MAX_RESPONSE_FORMAT_BYTES:
        raise Invalid.at(
            f"may have at most {MAX_RESPONSE_FORMAT_BYTES} bytes as JSON", *loc, "response_format"
        )
    return text


def read_metadata(values: Any) -> dict[str, str]:
    """Up to 16 texts by name."""
    if not isinstance(values, dict):
        raise Invalid.at("must be an object", "metadata")
    if len(values) > MAX_METADATA:
        raise Invalid.at(f"may have at most {MAX_METADATA} members", "metadata")
    for name, value in values.items():
        if not isinstance(value, str):
            raise Invalid.at("must be a text", "metadata", name)
        if len(name) > MAX_METADATA_LENGTH or len(value) > MAX_METADATA_LENGTH:
            raise Invalid.at(
                f"name and text may have at most {MAX_METADATA_LENGTH} characters", "metadata", name
            )
    return values


def _tasks(data: Any, settings: JobSettings, service: Settings) -> Iterator[NewTask]:
    if not isinstance(data, dict | list):
        raise Invalid.at("must be an object of tasks by id, or a list of tasks", "data")
    if not data:
        raise Invalid.at("needs at least one task", "data")
    if len(data) > service.max_tasks:
        raise TooLarge(f"a job may have at most {service.max_tasks} tasks (MAX_TASKS)")
    reader = TaskReader(settings, service.max_json_bytes)
    if isinstance(data, dict):
        for id_, value in data.items():
            yield reader.read(value, check_id(id_, ("data", id_)), ("data", id_))
        return
    seen: set[str] = set()
    for index, value in enumerate(data):
        loc = ("data", index)
        own = isinstance(value, dict) and "id" in value
        id_ = check_id(value["id"], (*loc, "id")) if own else str(index)
        if id_ in seen:
            raise Invalid.at(f"the id {id_!r} is given twice", *loc)
        seen.add(id_)
        yield reader.read({k: v for k, v in value.items() if k != "id"} if own else value, id_, loc)


# NewTask of three values; its own way, by keywords, takes three times as long.
_new_task = partial(tuple.__new__, NewTask)


def check_id(value: Any, loc: tuple[str | int, ...]) -> str:
    """A task's id: a text of 1 to 200 characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_LENGTH:
        raise Invalid.at(f"a task's id is a text of 1 to {MAX_ID_LENGTH} characters", *loc)
    return value


class TaskReader:
    """Checks the tasks of one job against its settings, and estimates their prompts.

    A filled template may have as many bytes as JSON may: a short text, put in often enough, would be any size.
    """

    def __init__(self, settings: JobSettings, max_json_bytes: int) -> None:
        self._pack = settings.pack
        self._max_filled_bytes = max_json_bytes
        self._variables: Counter[str] | None = None  # of the template, with how often each is put in
        self._literal_bytes = 0
        if settings.template is not None:
            parts = template_parts(settings.template)
            self._variables = Counter(name for _, name in parts if name is not None)
            self._literal_bytes = sum(size_bytes(literal) for literal, _ in parts)
        self._instructions_tokens = estimate_tokens(settings.instructions) if settings.instructions else 0
        self._no_tokens = estimate_prompt([], instructions_tokens=self._instructions_tokens)

    def read(self, value: Any, id_: str, loc: tuple[str | int, ...]) -> NewTask:
        """The task; Invalid at `loc` for anything that is none."""
        text = value.get("text") if isinstance(value, dict) and len(value) == 1 else value
        if isinstance(text, str) and text and self._variables is None:  # by far the most: the short way
            return NewTask(id_, text, self._no_tokens + estimate_tokens(text))
        prompt = self._prompt(value, loc)
        if isinstance(prompt, list):
            tokens = estimate_prompt(prompt, instructions_tokens=self._instructions_tokens)
        else:
            tokens = self._no_tokens + (self._filled_bytes(prompt, loc) // BYTES_PER_TOKEN or 1)
        return NewTask(id_, prompt, tokens)

    @property
    def takes_texts(self) -> bool:
        """Whether a text is a task as it is."""
        return self._variables is None

    def read_texts(self, texts: Sequence[str], ids: Sequence[str]) -> Iterator[NewTask]:
        """`read` for many, where `takes_texts`; none of the texts is empty."""
        tokens = [self._no_tokens + estimate_tokens(text) for text in texts]
        return map(_new_task, zip(ids, texts, tokens, strict=True))

    def _filled_bytes(self, prompt: str | dict[str, Any], loc: tuple[str | int, ...]) -> int:
        """How large the template is with the task in it, which is not made for that; Invalid if it is too large."""
        assert self._variables is not None  # without a template, a task that is a text goes the short way
        values = {"text": prompt} if isinstance(prompt, str) else prompt
        filled_bytes = self._literal_bytes + sum(
            count * size_bytes(str(values[name])) for name, count in self._variables.items()
        )
        if filled_bytes > self._max_filled_bytes:
            raise Invalid.at(
                f"fills the template to more than {self._max_filled_bytes} bytes (MAX_JSON_BYTES)", *loc
            )
        return filled_bytes

    def _prompt(self, value: Any, loc: tuple[str | int, ...]) -> Prompt:
        if isinstance(value, dict):
            if len(value) != 1 or not value.keys() <= {*TASK_FORMS}:
                unknown = [name for name in value if name not in TASK_FORMS]
                where = (*loc, unknown[0]) if unknown else loc
                raise Invalid.at('a task is a text, or {"messages": […]}, or {"vars": {…}}', *where)
            form, value = next(iter(value.items()))
            if form == "messages":
                if self._pack:
                    raise Invalid.at("messages can't be packed: leave out the setting pack", *loc, form)
                return _messages(value, (*loc, form))
            if form == "vars":
                return self._vars(value, (*loc, form))
            loc = (*loc, form)
        if not isinstance(value, str):
            raise Invalid.at('a task is a text, or {"messages": […]}, or {"vars": {…}}', *loc)
        if not value:
            raise Invalid.at("must not be empty", *loc)
        if self._variables is not None and not self._variables.keys() <= {"text"}:
            missing = min(self._variables.keys() - {"text"})
            raise Invalid.at(f"the template needs the variable {missing!r}: give the task as vars", *loc)
        return value

    def _vars(self, value: Any, loc: tuple[str | int, ...]) -> Prompt:
        if self._variables is None:
            raise Invalid.at("vars need a template in the settings", *loc)
        if not isinstance(value, dict):
            raise Invalid.at("must be an object of variables", *loc)
        for name, variable in value.items():
            if not isinstance(variable, str | int | float):  # a bool is an int
                raise Invalid.at("must be a text or a number", *loc, name)
        for name in sorted(self._variables.keys() - value.keys()):
            raise Invalid.at(f"the template needs the variable {name!r}", *loc)
        return {name: variable for name, variable in value.items() if name in self._variables}


def _messages(value: Any, loc: tuple[str | int, ...]) -> Prompt:
    if not isinstance(value, list) or not value:
        raise Invalid.at("must be a list of at least one message", *loc)
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid.at('a message is an object with a "role"', *loc, index)
    return value
