"""OpenAI's side of a call: who asks, what is asked, is it within the limits, and which reply that makes.

A request goes in, a `Verdict` comes out; `connection` delivers it. No sockets.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, exp
from typing import Any

from tests.upstream import errors
from tests.upstream.answers import (
    Completion,
    charged_tokens,
    complete,
    last_user_text,
    prompt_tokens,
    schema_fault,
)
from tests.upstream.calls import CallLog, OpenCall
from tests.upstream.errors import Refused
from tests.upstream.faults import Fault, FaultKind, Faults
from tests.upstream.limits import Limits
from tests.upstream.rules import Accepts, KeyRules, ServerRules, set_rules
from tests.upstream.wire import Reply, Request

UNKNOWN_KEY = "(unknown)"
"""Under this name the counters and the log keep the calls of keys that nobody set."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_HTML = b"<!doctype html><html><head><title>Welcome</title></head><body><h1>It works!</h1></body></html>"


@dataclass
class Verdict:
    """A reply, when it goes out, and what goes wrong with it on the way."""

    reply: Reply
    fault: Fault | None = None
    delay_s: float = 0.0


@dataclass
class Chat:
    """A chat request that is well formed."""

    body: dict[str, Any]
    model: str
    messages: list[Any]
    max_output_tokens: int | None


class FakeOpenAI:
    """The rules, buckets, faults and calls of all keys."""

    def __init__(
        self, rules: ServerRules, keys: dict[str, KeyRules], now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.rules = rules
        self.keys = keys
        self.faults = Faults()
        self.log = CallLog(rules.log_calls, rules.log_size)
        for key in keys:
            self.log.counters_of(key)
        self._now_s = now_s
        self._limits: dict[tuple[str, str, str], Limits] = {}
        self._answered: dict[tuple[str, str], int] = {}
        self._random = random.Random(rules.seed)
        self._request_number = 0

    def set_key(self, key: str, rules: KeyRules) -> None:
        """Takes the rules of one key, whose limits hold for all keys of its organization and project."""
        set_rules(self.keys, key, rules)
        self.log.counters_of(key)
        for (organization, project, _), limits in self._limits.items():
            if (organization, project) == rules.group(key):
                limits.change(rules)

    def reset(self) -> None:
        """Full buckets, unspent quotas, no faults, no past."""
        self.faults.clear()
        self.log.reset()
        self._limits.clear()
        self._answered.clear()
        self._random.seed(self.rules.seed)

    def models(self, request: Request) -> Reply:
        """`GET /v1/models` and `GET /v1/models/<id>`; these count against no limit."""
        key = _bearer(request)
        rules = self.keys.get(key)
        self.log.counters_of(self.key_in_log(request))["listed_models"] += 1
        if rules is None or rules.refused:
            return self._error(errors.invalid_api_key(key), {})
        shown = [model for model in self.rules.models if model not in rules.missing_models]
        entries = [
            {"id": model, "object": "model", "created": 1_760_000_000, "owned_by": "system"}
            for model in shown
        ]
        headers = self._headers(key, rules)
        wanted = request.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            return Reply(200, json.dumps({"object": "list", "data": entries}).encode(), headers)
        for entry in entries:
            if entry["id"] == wanted:
                return Reply(200, json.dumps(entry).encode(), headers)
        return self._error(errors.model_not_found(404, wanted, rules.group(key)[1]), headers)

    def key_in_log(self, request: Request) -> str:
        key = _bearer(request)
        return key if key in self.keys else UNKNOWN_KEY

    def chat(self, request: Request, call: OpenCall) -> Verdict:
        """`POST /v1/chat/completions`: the checks, then a fault if one waits, then the answer."""
        key = _bearer(request)
        rules = self.keys.get(key)
        if rules is None or rules.refused:
            return Verdict(self._error(errors.invalid_api_key(key), {}, call))
        headers = self._headers(key, rules)
        chat = self._read_chat(request.body)
        if isinstance(chat, Refused):
            return Verdict(self._error(chat, headers, call))
        refused = self._check(key, rules, chat, call, headers)
        if refused is not None:
            if not rules.send_retry_after:
                refused = replace(refused, retry_after_s=None)
            return Verdict(self._error(refused, headers, call))
        delay_s = self._latency_s(rules)
        headers["openai-processing-ms"] = str(int(delay_s * 1000))
        user_text = last_user_text(chat.messages)
        fault = self.faults.take(key, user_text) or self._random_fault(rules)
        if fault is not None:
            call.fault = fault.kind.value
            headers.update(fault.headers)
        return Verdict(self._reply(chat, user_text, call, headers, rules.group(key), fault), fault, delay_s)

    def _read_chat(self, raw: bytes) -> Chat | Refused:
        try:
            body = json.loads(raw)
        except ValueError:
            return errors.invalid("We could not parse the JSON body of your request.")
        if not isinstance(body, dict):
            return errors.invalid("We could not parse the JSON body of your request.")
        model, messages = body.get("model"), body.get("messages")
        if not isinstance(model, str) or not model:
            return errors.missing("model")
        if not isinstance(messages, list) or not messages:
            return errors.missing("messages")
        if not all(isinstance(message, dict) and message.get("role") in _ROLES for message in messages):
            return errors.invalid("Invalid value for 'messages[].role'.", "invalid_value", "messages")
        if body.get("stream"):
            return errors.invalid("Streaming is not served here.", "unsupported_value", "stream")
        if "temperature" in body and body["temperature"] is not None:
            bad = errors.bad_temperature(body["temperature"])
            if bad is not None:
                return bad
        max_output_tokens = self._max_output_tokens(body)
        if isinstance(max_output_tokens, Refused):
            return max_output_tokens
        bad = _check_response_format(body.get("response_format"))
        return bad or Chat(body, model, messages, max_output_tokens)

    def _max_output_tokens(self, body: dict[str, Any]) -> int | Refused | None:
        names = (Accepts.MAX_COMPLETION_TOKENS, Accepts.MAX_TOKENS)
        for name, other in zip(names, reversed(names), strict=True):
            value = body.get(name)
            if value is None:
                continue
            if self.rules.accepts not in (name, Accepts.BOTH):
                return errors.unsupported_parameter(name, other)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                message = f"Invalid '{name}': expected an integer >= 1."
                return errors.invalid(message, "integer_below_min_value", name)
            return value
        return None

    def _check(
        self, key: str, rules: KeyRules, chat: Chat, call: OpenCall, headers: dict[str, str]
    ) -> Refused | None:
        """Why this key may not make this call now, or None; takes it from the buckets, adds limit headers."""
        organization, project = group = rules.group(key)
        if chat.model in rules.missing_models:
            return errors.model_not_found(rules.missing_model_status, chat.model, project)
        if rules.exhausted_after is not None and self._answered.get(group, 0) >= rules.exhausted_after:
            return errors.insufficient_quota()
        limits = self._limits.get((organization, project, chat.model))
        if limits is None:
            limits = self._limits[organization, project, chat.model] = Limits(rules, self._now_s)
        tokens = charged_tokens(chat.messages, chat.max_output_tokens)
        denied = limits.admit(tokens)
        if rules.send_limit_headers:
            headers.update(limits.headers())
        if denied is not None:
            return errors.rate_limited(denied, chat.model, organization)
        call.counters["charged_tokens"] += tokens
        prompt = prompt_tokens(chat.messages)
        if prompt > self.rules.context_tokens:
            return errors.context_length_exceeded(self.rules.context_tokens, prompt)
        return None

    def _reply(
        self,
        chat: Chat,
        user_text: str,
        call: OpenCall,
        headers: dict[str, str],
        group: tuple[str, str],
        fault: Fault | None,
    ) -> Reply:
        match fault.kind if fault is not None else None:
            case FaultKind.STATUS:
                assert fault is not None
                refused = errors.scripted(
                    fault.status or 500, fault.code, fault.error_type, fault.message, fault.retry_after_s
                )
                return self._error(refused, headers, call)
            case FaultKind.REDIRECT:
                assert fault is not None
                return Reply(fault.status or 307, b"", {**headers, "location": fault.location})
            case FaultKind.HTML:
                return Reply(200, _HTML, headers, "text/html; charset=utf-8")
            case FaultKind.EMPTY_OBJECT:
                return Reply(200, b"{}", headers)
        completion = complete(chat.body, chat.messages, user_text, chat.max_output_tokens, fault)
        self._answered[group] = self._answered.get(group, 0) + 1
        call.counters["prompt_tokens"] += completion.prompt_tokens
        call.counters["completion_tokens"] += completion.completion_tokens
        return Reply(200, self._written(completion, call, fault), headers)

    def _written(self, completion: Completion, call: OpenCall, fault: Fault | None) -> bytes:
        if fault is not None and fault.kind in (FaultKind.HUGE_BODY, FaultKind.GZIP_BOMB):
            completion.content = ""
        body = completion.body(call.number, int(time.time()))
        if fault is not None and fault.kind is FaultKind.BROKEN_JSON:
            return body[: len(body) // 2]
        return body

    def _headers(self, key: str, rules: KeyRules) -> dict[str, str]:
        self._request_number += 1
        headers = {"x-request-id": f"req_{self._request_number:032x}", "openai-processing-ms": "1"}
        if rules.send_organization:
            headers["openai-organization"], headers["openai-project"] = rules.group(key)
        return headers

    def _error(self, refused: Refused, headers: dict[str, str], call: OpenCall | None = None) -> Reply:
        if not headers:
            self._request_number += 1
            headers = {"x-request-id": f"req_{self._request_number:032x}"}
        if call is not None:
            call.code = refused.code
        if refused.retry_after_s is not None:
            headers = {
                "retry-after": str(ceil(refused.retry_after_s)),
                "retry-after-ms": str(ceil(refused.retry_after_s * 1000)),
                **headers,
            }
        return Reply(refused.status, refused.body(), headers)

    def _latency_s(self, rules: KeyRules) -> float:
        if rules.latency_sigma:
            return rules.latency_s * exp(self._random.gauss(0.0, rules.latency_sigma))
        return rules.latency_s

    def _random_fault(self, rules: KeyRules) -> Fault | None:
        if not (rules.p_500 or rules.p_reset or rules.p_hang):
            return None
        drawn = self._random.random()
        if drawn < rules.p_500:
            return Fault(kind=FaultKind.STATUS, status=500)
        if drawn < rules.p_500 + rules.p_reset:
            return Fault(kind=FaultKind.RESET)
        if drawn < rules.p_500 + rules.p_reset + rules.p_hang:
            return Fault(kind=FaultKind.HANG)
        return None


def _bearer(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ").strip()


def _check_response_format(response_format: Any) -> Refused | None:
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        param = "response_format.type"
        return errors.invalid(f"Invalid value for '{param}'.", "invalid_value", param)
    if kind != "json_schema":
        return None
    wanted = response_format.get("json_schema")
    if not isinstance(wanted, dict) or not wanted.get("name"):
        return errors.missing("response_format.json_schema.name")
    if not isinstance(wanted.get("schema"), dict):
        return errors.missing("response_format.json_schema.schema")
    if wanted.get("strict") and (found := schema_fault(wanted["schema"])):
        message = f"Invalid schema for response_format '{wanted['name']}': {found}"
        return errors.invalid(message, None, "response_format")
    return None
