"""OpenAI's error replies, word for word where a client may read the words.

A refused call is a value here; `api` decides which, `delivery` sends it.
"""

import json
from dataclasses import dataclass
from typing import Any

from tests.upstream.limits import Counted, Denied, format_duration


@dataclass(frozen=True)
class Refused:
    """An error reply: `{"error": {message, type, param, code}}`."""

    status: int
    message: str
    error_type: str
    code: str | None
    param: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def invalid(message: str, code: str | None = None, param: str | None = None) -> Refused:
    return Refused(400, message, "invalid_request_error", code, param)


def missing(param: str) -> Refused:
    return invalid(f"Missing required parameter: '{param}'.", "missing_required_parameter", param)


def invalid_api_key(key: str) -> Refused:
    shown = f"{key[:3]}***{key[-4:]}" if len(key) > 7 else "***"
    return Refused(401, f"Incorrect API key provided: {shown}.", "invalid_request_error", "invalid_api_key")


def model_not_found(status: int, model: str, project: str) -> Refused:
    if status == 403:
        message = f"Project `{project}` does not have access to model `{model}`"
    else:
        message = f"The model `{model}` does not exist or you do not have access to it."
    return Refused(status, message, "invalid_request_error", "model_not_found")


def insufficient_quota() -> Refused:
    message = "You exceeded your current quota, please check your plan and billing details."
    return Refused(429, message, "insufficient_quota", "insufficient_quota")


def rate_limited(denied: Denied, model: str, organization: str) -> Refused:
    kind = "tokens" if denied.counted is Counted.TOKENS else "requests"
    where = f"for {model} in organization {organization} on {denied.counted}: Limit {denied.limit}"
    if denied.too_large:
        message = (
            f"Request too large {where}, Requested {denied.requested}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
        return Refused(429, message, kind, "rate_limit_exceeded")
    message = (
        f"Rate limit reached {where}, Used {denied.used}, Requested {denied.requested}. "
        f"Please try again in {format_duration(denied.retry_after_s)}."
    )
    return Refused(429, message, kind, "rate_limit_exceeded", retry_after_s=denied.retry_after_s)


def context_length_exceeded(limit_tokens: int, prompt_tokens: int) -> Refused:
    message = (
        f"This model's maximum context length is {limit_tokens} tokens. However, your messages resulted in "
        f"{prompt_tokens} tokens. Please reduce the length of the messages."
    )
    return invalid(message, "context_length_exceeded", "messages")


def unsupported_parameter(param: str, instead: str) -> Refused:
    message = f"Unsupported parameter: '{param}' is not supported with this model. Use '{instead}' instead."
    return invalid(message, "unsupported_parameter", param)


def bad_temperature(value: Any) -> Refused | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"Invalid type for 'temperature': expected a decimal, got {type(value).__name__}."
        return invalid(message, "invalid_type", "temperature")
    if value > 2:
        message = f"Invalid 'temperature': decimal above maximum value. Expected a value <= 2, got {value}."
        return invalid(message, "decimal_above_max_value", "temperature")
    if value < 0:
        message = f"Invalid 'temperature': decimal below minimum value. Expected a value >= 0, got {value}."
        return invalid(message, "decimal_below_min_value", "temperature")
    return None


_SCRIPTED = {
    400: ("invalid_request_error", "Invalid request."),
    401: ("invalid_request_error", "Incorrect API key provided."),
    429: ("requests", "Rate limit reached."),
    503: ("server_error", "The engine is currently overloaded, please try again later."),
}


def scripted(
    status: int, code: str | None, error_type: str | None, message: str | None, retry_after_s: float | None
) -> Refused:
    """An error that a test asked for; what it leaves open is filled in."""
    usual_type, usual_message = _SCRIPTED.get(
        status,
        ("server_error", "The server had an error while processing your request. Sorry about that!")
        if status >= 500
        else ("invalid_request_error", "The request was refused."),
    )
    return Refused(
        status, message or usual_message, error_type or usual_type, code, retry_after_s=retry_after_s
    )
