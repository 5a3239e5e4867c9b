"""One task (or a pack), one call, one reply: builds the request, and turns every answer and trouble into ours.

The only place that knows OpenAI's wire format. It decides nothing about retries or keys.
Source: OpenAI API reference, "Chat completions" and "Error codes".
"""

import re
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import jiter

from config import OPENAI_BASE_URL
from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.domain import Answer, ErrorCode, JobSettings, Prompt, Usage, compact_json
from gpt_worker.limit_headers import UNIT_S, LimitHeaders, parse_duration_s, read_group_name, read_headers
from gpt_worker.marks import Marks
from gpt_worker.packing import (
    TOKEN_LIMIT_NAMES,
    names_the_form,
    packed_message,
    packed_settings,
    read_answers,
)
from gpt_worker.rate_limit import Bound, NamedLimit, RateRefusal
from gpt_worker.reply_body import Hold
from gpt_worker.transport import (
    ConnectionStale,
    DeadlinePassed,
    RawReply,
    ReplyTooLarge,
    Transport,
    TransportError,
)

MAX_MESSAGE_LENGTH = 500
CHECK_TIMEOUT_S = 20.0
PARSED_TEMPLATES = 16  # a few, since one may be a hundred times as large when it is parsed
OPENAI_HOST = urlsplit(OPENAI_BASE_URL).hostname
EXHAUSTED = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"}
TOO_LONG = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
FILTERED = {"content_filter", "content_policy_violation"}
NO_TEXT = Problem(ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE, "the reply holds no text")
WITHHELD = Problem(ProblemKind.FINAL, ErrorCode.CONTENT_FILTER, "the provider withheld the answer")

Answers = Sequence[str | None]  # of a pack's tasks in order, None for one that is missing
Result = TypeVar("Result", bound=Answer | Answers, covariant=True)


@dataclass(frozen=True, slots=True)
class Reply(Generic[Result]):
    """What came of one call, for one task or for a pack."""

    result: Result | Problem
    usage: Usage = field(default_factory=Usage)
    limits: LimitHeaders = field(default_factory=LimitHeaders)
    organization: str | None = None
    project: str | None = None
    # For as long as its texts are in nobody's store.
    hold: Hold | None = field(default=None, compare=False, repr=False)


AnyReply = Reply[Answer] | Reply[Answers]


class KeyCheck(StrEnum):
    """What trying a key by hand showed."""

    WORKS = "the key works"
    REFUSED = "the key was refused"
    UNREACHABLE = "the endpoint could not be asked"


class Endpoint:
    """One key's way to its endpoint."""

    def __init__(
        self, transport: Transport, secret: str, token_limit_names: Marks[tuple[str, str], str]
    ) -> None:
        self._transport = transport
        self._secret = secret
        self._token_limit_names = token_limit_names  # (base URL, model) → the name it takes; of all keys
        self._headers = {
            "authorization": f"Bearer {secret}",
            "content-type": "application/json",
            "accept": "application/json",
            "user-agent": "gpt-worker",
        }

    def ask(self, model: str, settings: JobSettings, prompt: Prompt, deadline_s: float) -> Reply[Answer]:
        """Ask for one task; never raises for anything that the endpoint does."""
        name = self._token_limit_name(model)
        body = request_body(model, settings, prompt, name)
        try:
            raw = self._transport.post("/chat/completions", self._headers, body, deadline_s)
        except DeadlinePassed as error:
            return Reply(Problem(ProblemKind.TRANSIENT, ErrorCode.TIMEOUT, str(error)))
        except ReplyTooLarge as error:
            return Reply(Problem(ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE, str(error)))
        except ConnectionStale as error:
            return Reply(Problem(ProblemKind.STALE, ErrorCode.CONNECTION, str(error)))
        except TransportError as error:
            return Reply(Problem(ProblemKind.TRANSIENT, ErrorCode.CONNECTION, str(error)))
        reply = read_reply(raw, self._secret)
        if settings.max_output_tokens is not None and self._swaps_name(raw, name, model):
            return Reply(
                Problem(ProblemKind.RESENT, ErrorCode.BAD_REQUEST, "asked in the other form"),
                limits=reply.limits,
            )
        return reply

    def ask_pack(
        self, model: str, settings: JobSettings, prompts: Sequence[Prompt], deadline_s: float
    ) -> Reply[Answers]:
        """Ask for several tasks in one request; never raises for anything that the endpoint does.

        PACK_REFUSED: the endpoint takes no such request. FINAL with CONTEXT_LENGTH or CONTENT_FILTER: a smaller pack,
        or another, may do.
        """
        message = packed_message(prompt_text(settings, prompt) for prompt in prompts)
        reply = self.ask(model, packed_settings(settings, len(prompts)), message, deadline_s)
        return unpack(reply, len(prompts))

    def check(self) -> KeyCheck:
        """Whether the endpoint takes the key, by asking for its models, which spends nothing."""
        headers = {name: value for name, value in self._headers.items() if name != "content-type"}
        until_s = time.monotonic() + CHECK_TIMEOUT_S
        try:
            try:
                raw = self._transport.get("/models", headers, CHECK_TIMEOUT_S)
            except ConnectionStale:
                raw = self._transport.get("/models", headers, max(0.0, until_s - time.monotonic()))
        except TransportError:
            return KeyCheck.UNREACHABLE
        return read_check(raw)

    def cut(self) -> None:
        """End every call in flight now."""
        self._transport.cut()

    def _token_limit_name(self, model: str) -> str:
        default = "max_completion_tokens" if self._transport.host == OPENAI_HOST else "max_tokens"
        return self._token_limit_names.get((self._transport.base_url, model), default)

    def _swaps_name(self, raw: RawReply, name: str, model: str) -> bool:
        known = self._token_limit_names.get((self._transport.base_url, model))
        if raw.status != 400 or known == name:
            return False
        error = _error_of(_parsed(raw.body))
        about = f"{error.get('param')} {error.get('message')}"
        if error.get("code") not in ("unsupported_parameter", None) or name not in about:
            return False
        other = TOKEN_LIMIT_NAMES[1 - TOKEN_LIMIT_NAMES.index(name)]
        self._token_limit_names[self._transport.base_url, model] = other
        return True


def request_body(model: str, settings: JobSettings, prompt: Prompt, token_limit_name: str) -> bytes:
    """The request for one task, as JSON; only what the caller set goes along."""
    body: dict[str, Any] = {"model": model, "messages": messages(settings, prompt)}
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        body[token_limit_name] = settings.max_output_tokens
    raw = compact_json(body)
    if settings.response_format is not None:
        raw = f'{raw[:-1]},"response_format":{settings.response_format}}}'
    return raw.encode()


def messages(settings: JobSettings, prompt: Prompt) -> list[Any]:
    """The messages of one task: the job's instructions first, then the prompt in its own form."""
    system = [{"role": "system", "content": settings.instructions}] if settings.instructions else []
    if isinstance(prompt, list):
        return [*system, *prompt]
    return [*system, {"role": "user", "content": prompt_text(settings, prompt)}]


def prompt_text(settings: JobSettings, prompt: Prompt) -> str:
    """What a task that is a text, or variables, says in the end."""
    if settings.template is not None and not isinstance(prompt, list):
        prompt = fill_template(settings.template, {"text": prompt} if isinstance(prompt, str) else prompt)
    assert isinstance(prompt, str)  # variables come with a template, and messages never in a pack
    return prompt


def fill_template(template: str, variables: Mapping[str, Any]) -> str:
    """The template with its `{name}`s replaced; `{{` and `}}` are braces. Values are put in as they are.

    Raises ValueError for a broken template, KeyError for a variable that is missing.
    """
    return "".join(
        literal + ("" if name is None else str(variables[name])) for literal, name in template_parts(template)
    )


@lru_cache(maxsize=PARSED_TEMPLATES)
def template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of literal text and the variable behind it; ValueError names what is wrong with a template."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        if name is not None and (form or conversion or not re.fullmatch(r"\w[\w .-]*", name)):
            raise ValueError("a variable is a plain {name}; write {{ and }} for braces")
        parts.append((literal, name))
    return tuple(parts)


def read_reply(raw: RawReply, secret: str) -> Reply[Answer]:
    """Turn a reply into an answer or a problem."""
    limits = read_headers(raw.headers)
    organization = read_group_name(raw.headers, "openai-organization")
    project = read_group_name(raw.headers, "openai-project")
    parsed = _parsed(raw.body)
    if raw.status != 200:
        problem = _problem(raw.status, _error_of(parsed), limits.retry_after_s, secret)
        return Reply(problem, Usage(), limits, organization, project)
    return Reply(_answer(parsed), _usage(parsed), limits, organization, project, raw.hold)


def read_check(raw: RawReply) -> KeyCheck:
    """What the reply to a request for the models says of the key."""
    if raw.status == 401:
        return KeyCheck.REFUSED
    if raw.status in (403, 404, 429):
        return KeyCheck.WORKS  # it was known, at least
    parsed = _parsed(raw.body)
    is_list = isinstance(parsed, list) or (isinstance(parsed, dict) and "data" in parsed)
    return KeyCheck.WORKS if raw.status == 200 and is_list else KeyCheck.UNREACHABLE


def unpack(reply: Reply[Answer], count: int) -> Reply[Answers]:
    """The reply to a pack of so many tasks, of which those without a certain answer are None."""
    result: list[str | None] | Problem = [None] * count
    match reply.result:
        case Answer(text, finish_reason):
            if finish_reason not in ("refusal", "content_filter"):
                certain = read_answers(text, count, cut=finish_reason == "length")
                result = [_storable(certain[index]) if index in certain else None for index in range(count)]
        case Problem(ProblemKind.FINAL, ErrorCode.BAD_REQUEST) as problem if names_the_form(problem):
            result = replace(problem, kind=ProblemKind.PACK_REFUSED)
        case problem if problem not in (NO_TEXT, WITHHELD):
            result = problem
    return Reply(result, reply.usage, reply.limits, reply.organization, reply.project, reply.hold)


def _parsed(body: bytes) -> Any:
    try:
        return jiter.from_json(body)
    except ValueError:
        return None


def _usage(parsed: Any) -> Usage:
    usage = parsed.get("usage") if isinstance(parsed, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return Usage()
    if min(prompt, completion) < 0 or max(prompt, completion) >= 1 << 40:
        return Usage()
    return Usage(prompt, completion)


def _answer(parsed: Any) -> Answer | Problem:
    try:
        choice = parsed["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        return _bad_response("the reply is not a chat completion")
    told = isinstance(finish_reason, str) and finish_reason != ""
    finish_reason = _storable(finish_reason)[:50] if told else "stop"
    if isinstance(refusal, str) and refusal and not content:
        return Answer(_storable(refusal), "refusal")
    if isinstance(content, str) and (content or finish_reason != "content_filter"):
        return Answer(_storable(content), finish_reason)
    if finish_reason == "content_filter":
        return WITHHELD
    if content is None and finish_reason == "length":
        return Answer("", finish_reason)
    return NO_TEXT


def _storable(text: str) -> str:
    """Without the characters that no database takes."""
    text = text.replace("\x00", "\ufffd")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _bad_response(message: str) -> Problem:
    return Problem(ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE, message)


def _error_of(parsed: Any) -> dict[str, Any]:
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if not isinstance(error, dict):
        return {}
    return {name: value for name, value in error.items() if not isinstance(value, dict | list)}


def _problem(status: int, error: Mapping[str, Any], retry_after_s: float | None, secret: str) -> Problem:
    code, kind = error.get("code"), error.get("type")
    said = _said(error, secret)
    if status == 401:
        return Problem(ProblemKind.KEY_REFUSED, ErrorCode.KEY_REFUSED, "the key was refused")
    if status == 402 or (status in (403, 429) and EXHAUSTED & {code, kind}):
        return Problem(ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED, "the key's quota is used up")
    if status == 429:
        return _problem_429(kind, said, retry_after_s)
    if status in (403, 404):
        return Problem(
            ProblemKind.MODEL_UNAVAILABLE,
            ErrorCode.MODEL_UNAVAILABLE,
            said or f"HTTP {status} for this model",
        )
    if status in (408, 409) or status >= 500:
        message = f"the endpoint answered HTTP {status}"
        return Problem(ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR, message, retry_after_s)
    if status < 400:
        return _bad_response(f"the endpoint answered HTTP {status} where an answer was due")
    if TOO_LONG & {code, kind} or status == 413:
        return Problem(
            ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH, said or "the prompt is too long for the model"
        )
    if FILTERED & {code, kind}:
        return Problem(
            ProblemKind.FINAL,
            ErrorCode.CONTENT_FILTER,
            said or "the provider's content filter refused the prompt",
        )
    param = error.get("param")
    param = param[:100] if isinstance(param, str) else None
    about_settings = param is not None and not param.startswith("messages")
    return Problem(
        ProblemKind.FINAL,
        ErrorCode.BAD_REQUEST,
        said or f"the endpoint answered HTTP {status}",
        about_settings=about_settings,
        param=param,
    )


def _problem_429(kind: object, said: str, retry_after_s: float | None) -> Problem:
    numbers = re.search(r"Limit:? (\d+).*?Requested:? (\d+)", said, re.DOTALL)
    if "too large" in said.lower() or (numbers and int(numbers[2]) > int(numbers[1])):
        message = "the prompt is larger than the key's limit of tokens per minute"
        return Problem(ProblemKind.TOO_LARGE, ErrorCode.CONTEXT_LENGTH, message)
    if retry_after_s is None and (match := re.search(r"try again in ([\d.a-z]+?)\.?(?:\s|$)", said)):
        retry_after_s = parse_duration_s(match[1].rstrip("."))
    return Problem(
        ProblemKind.RATE_LIMITED,
        ErrorCode.RATE_LIMITED,
        "the key was rate limited again and again",
        retry_after_s,
        rate_limit=RateRefusal(
            bound=Bound(kind) if kind in ("requests", "tokens") else None,
            named=_named_limit(said),
            requested_tokens=int(numbers[2]) if numbers and kind == "tokens" else None,
        ),
    )


def _named_limit(said: str) -> NamedLimit | None:
    """The limit that OpenAI's message names: "… on requests per min (RPM): Limit 3, Used 3, …"."""
    limit = re.search(r"Limit:? (\d{1,12})\b", said)
    window = re.search(r"\bper (sec|min|hour|day)|\b[RT]P([SMHD])\b", said)
    if limit is None or window is None or int(limit[1]) == 0:
        return None
    return NamedLimit(int(limit[1]), UNIT_S[(window[1] or window[2].lower())[0]])


def _said(error: Mapping[str, Any], secret: str) -> str:
    """What the provider said, without anything that looks like a key."""
    message = error.get("message")
    if not isinstance(message, str):
        return ""
    text = _storable(message).replace(secret, "***")
    return re.sub(r"\bsk-[\w*.-]+", "***", text)[:MAX_MESSAGE_LENGTH]
