"""One task, one call, one reply: builds the request, and turns every kind of answer and trouble into ours.

The only place that knows OpenAI's wire format. It decides nothing about retries or keys.
Source: OpenAI API reference, "Chat completions" and "Error codes".
"""

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import jiter

from config import OPENAI_BASE_URL
from gpt_worker.addresses import is_loopback
from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.domain import Answer, ErrorCode, JobSettings, Prompt, Usage
from gpt_worker.rate_limit import Bound, LimitHeaders, parse_duration_s, read_headers
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
OPENAI_HOST = urlsplit(OPENAI_BASE_URL).hostname
EXHAUSTED = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"}
TOO_LONG = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
FILTERED = {"content_filter", "content_policy_violation"}
TOKEN_LIMIT_NAMES = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one call."""

    result: Answer | Problem
    usage: Usage = field(default_factory=Usage)
    limits: LimitHeaders = field(default_factory=LimitHeaders)
    organization: str | None = None
    project: str | None = None
    told_usage: bool = False


class KeyCheck(StrEnum):
    """What trying a key by hand showed."""

    WORKS = "the key works"
    REFUSED = "the key was refused"
    UNREACHABLE = "the endpoint could not be asked"


def check_key(base_url: str, secret: str, *, offline: bool) -> KeyCheck:
    """Ask for the models that a key may use."""
    import openai  # here, since it takes a second and 40 MB that a service at rest need not spend

    if offline:
        return KeyCheck.UNREACHABLE
    local = is_loopback(base_url)
    with openai.DefaultHttpxClient(
        follow_redirects=False, trust_env=not local, timeout=CHECK_TIMEOUT_S
    ) as client:
        try:
            openai.OpenAI(api_key=secret, base_url=base_url, max_retries=0, http_client=client).models.list()
        except openai.AuthenticationError:
            return KeyCheck.REFUSED
        except (openai.PermissionDeniedError, openai.RateLimitError, openai.NotFoundError):
            return KeyCheck.WORKS  # it was known, at least
        except openai.OpenAIError:
            return KeyCheck.UNREACHABLE
    return KeyCheck.WORKS


class Endpoint:
    """One key's way to its endpoint."""

    def __init__(
        self, transport: Transport, secret: str, token_limit_names: dict[tuple[str, str], str]
    ) -> None:
        self._transport = transport
        self._secret = secret
        self._token_limit_names = (
            token_limit_names  # (base URL, model) → the name it takes; shared by all keys
        )
        self._headers = {
            "authorization": f"Bearer {secret}",
            "content-type": "application/json",
            "accept": "application/json",
            "user-agent": "gpt-worker",
        }

    def ask(self, model: str, settings: JobSettings, prompt: Prompt, deadline_s: float) -> Reply:
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

    def check(self) -> KeyCheck:
        """Whether the endpoint takes the key, by asking for its models: the SDK's own client, which spends nothing."""
        return check_key(self._transport.base_url, self._secret, offline=self._transport.forbidden)

    def cut(self) -> None:
        """End every call in flight now."""
        self._transport.cut()

    def _token_limit_name(self, model: str) -> str:
        default = TOKEN_LIMIT_NAMES[0] if self._transport.host == OPENAI_HOST else TOKEN_LIMIT_NAMES[1]
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
    if settings.response_format is not None:
        body["response_format"] = settings.response_format
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def messages(settings: JobSettings, prompt: Prompt) -> list[Any]:
    """The messages of one task: the job's instructions first, then the prompt in its own form."""
    system = [{"role": "system", "content": settings.instructions}] if settings.instructions else []
    if isinstance(prompt, list):
        return [*system, *prompt]
    if settings.template is not None:
        prompt = fill_template(settings.template, {"text": prompt} if isinstance(prompt, str) else prompt)
    return [*system, {"role": "user", "content": prompt}]


def fill_template(template: str, variables: Mapping[str, Any]) -> str:
    """The template with its `{name}`s replaced; `{{` and `}}` are braces. Values are put in as they are.

    Raises ValueError for a broken template, KeyError for a variable that is missing.
    """
    return "".join(
        literal + ("" if name is None else str(variables[name])) for literal, name in template_parts(template)
    )


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the variable behind it; ValueError names what is wrong with a template."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        if name is not None and (form or conversion or not re.fullmatch(r"\w[\w .-]*", name)):
            raise ValueError("a variable is a plain {name}; write {{ and }} for braces")
        parts.append((literal, name))
    return parts


def read_reply(raw: RawReply, secret: str) -> Reply:
    """Turn a reply into an answer or a problem."""
    limits = read_headers(raw.headers)
    organization, project = raw.headers.get("openai-organization"), raw.headers.get("openai-project")
    parsed = _parsed(raw.body)
    if raw.status != 200:
        problem = _problem(raw.status, _error_of(parsed), limits.retry_after_s, secret)
        return Reply(problem, Usage(), limits, organization, project)
    usage, told = _usage(parsed)
    return Reply(_answer(parsed), usage, limits, organization, project, told)


def _parsed(body: bytes) -> Any:
    try:
        return jiter.from_json(body)
    except ValueError:
        return None


def _usage(parsed: Any) -> tuple[Usage, bool]:
    usage = parsed.get("usage") if isinstance(parsed, dict) else None
    if not isinstance(usage, dict):
        return Usage(), False
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return Usage(), False
    if min(prompt, completion) < 0 or max(prompt, completion) >= 1 << 40:
        return Usage(), False
    return Usage(prompt, completion), True


def _answer(parsed: Any) -> Answer | Problem:
    try:
        choice = parsed["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        return _bad_response("the reply is not a chat completion")
    finish_reason = finish_reason[:50] if isinstance(finish_reason, str) and finish_reason else "stop"
    if isinstance(refusal, str) and refusal and not content:
        return Answer(_storable(refusal), "refusal")
    if isinstance(content, str) and (content or finish_reason != "content_filter"):
        return Answer(_storable(content), finish_reason)
    if finish_reason == "content_filter":
        return Problem(ProblemKind.FINAL, ErrorCode.CONTENT_FILTER, "the provider withheld the answer")
    if content is None and finish_reason == "length":
        return Answer("", finish_reason)
    return _bad_response("the reply holds no text")


def _storable(text: str) -> str:
    """Without the characters that no database takes."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


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
    about_settings = isinstance(param, str) and not param.startswith("messages")
    return Problem(
        ProblemKind.FINAL,
        ErrorCode.BAD_REQUEST,
        said or f"the endpoint answered HTTP {status}",
        about_settings=about_settings,
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
        bound=Bound(kind) if kind in ("requests", "tokens") else None,
    )


def _said(error: Mapping[str, Any], secret: str) -> str:
    """What the provider said, without anything that looks like a key."""
    message = error.get("message")
    if not isinstance(message, str):
        return ""
    text = _storable(message).replace(secret, "***")
    return re.sub(r"\bsk-[\w*.-]+", "***", text)[:MAX_MESSAGE_LENGTH]
