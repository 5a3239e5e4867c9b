"""What the fake model says: the same text for the same request, in OpenAI's form.

Pure: a request body in, a completion out, bent by a fault of the content kinds. No limits, no sockets.
"""

import json
from dataclasses import dataclass
from typing import Any

from tests.upstream.faults import Fault, FaultKind

REFUSAL = "I'm sorry, I can't help with that."
_SNAPSHOT = "-2026-01-15"


def text_of(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def last_user_text(messages: list[Any]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user":
            return text_of(message.get("content"))
    return ""


def count_tokens(text: str) -> int:
    """UTF-8 bytes ÷ 4, rounded up."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def prompt_tokens(messages: list[Any]) -> int:
    return max(1, sum(count_tokens(text_of(message.get("content"))) for message in messages))


def charged_tokens(messages: list[Any], max_output_tokens: int | None) -> int:
    """What the limit counts before the answer is known: characters ÷ 4, and all the output asked for."""
    characters = sum(len(text_of(message.get("content"))) for message in messages)
    return max(1, -(-characters // 4)) + (max_output_tokens or 0)


@dataclass
class Completion:
    """A chat completion before it is written as JSON."""

    model: str
    content: str | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str = "stop"
    refusal: str | None = None
    with_usage: bool = True

    def body(self, number: int, created: int) -> bytes:
        reply: dict[str, Any] = {
            "id": f"chatcmpl-{number:012x}",
            "object": "chat.completion",
            "created": created,
            "model": self.model if self.model.endswith(_SNAPSHOT) else self.model + _SNAPSHOT,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": self.content,
                        "refusal": self.refusal,
                        "annotations": [],
                    },
                    "logprobs": None,
                    "finish_reason": self.finish_reason,
                }
            ],
            "service_tier": "default",
            "system_fingerprint": "fp_fake",
        }
        if self.with_usage:
            reply["usage"] = {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            }
        return json.dumps(reply).encode()


def complete(
    body: dict[str, Any],
    messages: list[Any],
    user_text: str,
    max_output_tokens: int | None,
    fault: Fault | None,
) -> Completion:
    """The answer to a request that has been checked; cut at its output limit, as a model's would be."""
    response_format = body.get("response_format") or {}
    packed = packed_answers(user_text) if response_format.get("type") == "json_schema" else None
    content: str
    if packed is not None:
        content = json.dumps({"answers": _lied(packed, fault)})
    elif response_format.get("type") == "json_schema":
        content = json.dumps(instance_of(response_format["json_schema"]["schema"], f"answer to: {user_text}"))
    elif response_format.get("type") == "json_object":
        content = json.dumps({"answer": f"answer to: {user_text}"})
    else:
        content = f"answer to: {user_text}"
    if fault is not None and fault.kind is FaultKind.ANSWER:
        content = fault.content

    tokens = count_tokens(content)
    completion = Completion(body["model"], content, prompt_tokens(messages), tokens)
    if max_output_tokens is not None and tokens > max_output_tokens:
        cut = content.encode("utf-8", "surrogatepass")[: max_output_tokens * 4].decode("utf-8", "ignore")
        completion.content, completion.completion_tokens = cut, max_output_tokens
        completion.finish_reason = "length"
    if fault is not None:
        _bend(completion, fault)
    return completion


def _bend(completion: Completion, fault: Fault) -> None:
    match fault.kind:
        case FaultKind.NULL_CONTENT:
            completion.content = None
        case FaultKind.REFUSAL:
            completion.content, completion.refusal = None, REFUSAL
        case FaultKind.CONTENT_FILTER:
            completion.content, completion.finish_reason = None, "content_filter"
        case FaultKind.LENGTH:
            content = completion.content or ""
            completion.content, completion.finish_reason = content[: len(content) // 2], "length"
        case FaultKind.NO_USAGE:
            completion.with_usage = False


def packed_answers(user_text: str) -> list[dict[str, Any]] | None:
    """The answers to many tasks packed in one message; None when the message is not of that form."""
    try:
        tasks = json.loads(user_text)["tasks"]
        return [{"n": int(task["n"]), "text": f"answer to: {task['text']}"} for task in tasks]
    except (ValueError, KeyError, TypeError):
        return None


def _lied(answers: list[dict[str, Any]], fault: Fault | None) -> list[dict[str, Any]]:
    match fault.kind if fault is not None else None:
        case FaultKind.PACKED_DROP:
            return answers[:-1]
        case FaultKind.PACKED_DUPLICATE:
            return answers + answers[:1]
        case FaultKind.PACKED_CONFLICT:
            return answers + [{**answer, "text": "another answer"} for answer in answers[:1]]
        case FaultKind.PACKED_EXTRA:
            highest = max((answer["n"] for answer in answers), default=0)
            return [*answers, {"n": highest + 1, "text": "nobody asked"}]
        case FaultKind.PACKED_WRONG_NUMBERS:
            return [{**answer, "n": 1001 + place} for place, answer in enumerate(answers)]
    return answers


def instance_of(schema: Any, text: str) -> Any:
    """The plainest value that a JSON schema allows; `text` stands where a string is wanted."""
    if not isinstance(schema, dict):
        return text
    if schema.get("enum"):
        return schema["enum"][0]
    wanted = schema.get("type")
    match wanted[0] if isinstance(wanted, list) and wanted else wanted:
        case "object":
            properties = schema.get("properties") or {}
            return {name: instance_of(inner, text) for name, inner in properties.items()}
        case "array":
            return [instance_of(schema.get("items"), text)]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
    return text


def schema_fault(schema: Any, path: str = "()") -> str | None:
    """Why OpenAI refuses a strict schema: an object must forbid other members and require all of its own."""
    if not isinstance(schema, dict):
        return None
    if schema.get("type") == "object":
        properties = schema.get("properties") or {}
        if schema.get("additionalProperties") is not False:
            return f"In context={path}, 'additionalProperties' is required to be supplied and to be false."
        if set(schema.get("required") or ()) != set(properties):
            return f"In context={path}, 'required' is required to be supplied and to list every property."
        for name, inner in properties.items():
            if found := schema_fault(inner, f"('properties', '{name}')"):
                return found
    return schema_fault(schema.get("items"), "('items')")
