"""What the fake OpenAI saw: cheap counters of every key, and a bounded log of the calls.

`CallLog` lives in the child process; `Call` and `KeyCounters` are what a test gets to read.
"""

import json
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, TypedDict

from tests.upstream.answers import last_user_text


class KeyCounters(TypedDict):
    """The totals of one key since the start or the last reset."""

    calls: int
    by_status: dict[int, int]
    """Replies by HTTP status; a call without a whole reply is in `broken` or `left`."""
    by_code: dict[str, int]
    """Error replies by `error.code`."""
    broken: int
    """Connections that a fault cut before the end of the reply."""
    left: int
    """Clients that went away before the end of the reply."""
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int
    """What the token limit counted."""
    in_flight: int
    max_in_flight: int
    listed_models: int
    """Calls of `GET /v1/models`, which stand nowhere else."""


@dataclass(frozen=True)
class Call:
    """One chat call. Times are `time.monotonic()`, which all processes of a machine share."""

    number: int
    key: str
    model: str
    user_text: str
    messages: list[dict[str, Any]]
    body: dict[str, Any]
    headers: dict[str, str]
    """All that the client sent, names in lower case, without `authorization`."""
    status: int | None
    """None while it runs, or when the reply never came to its end."""
    code: str | None
    """`error.code` of an error reply."""
    fault: str | None
    started_at: float
    ended_at: float | None


class OpenCall:
    """A call on the server's side; its raw body is read again only when the log is asked for."""

    __slots__ = (
        "body",
        "code",
        "counters",
        "ended_at",
        "fault",
        "headers",
        "key",
        "number",
        "started_at",
        "status",
    )

    def __init__(
        self, number: int, key: str, counters: KeyCounters, headers: dict[str, str], body: bytes
    ) -> None:
        self.number = number
        self.key = key
        self.counters = counters
        self.headers = headers
        self.body = body
        self.status: int | None = None
        self.code: str | None = None
        self.fault: str | None = None
        self.started_at = time.monotonic()
        self.ended_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        try:
            body = json.loads(self.body)
        except ValueError:
            body = {}
        body = body if isinstance(body, dict) else {}
        sent = body.get("messages")
        messages = (
            [message for message in sent if isinstance(message, dict)] if isinstance(sent, list) else []
        )
        return {
            "number": self.number,
            "key": self.key,
            "model": str(body.get("model", "")),
            "user_text": last_user_text(messages),
            "messages": messages,
            "body": body,
            "headers": {name: value for name, value in self.headers.items() if name != "authorization"},
            "status": self.status,
            "code": self.code,
            "fault": self.fault,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
        }


class CallLog:
    """Every call passes through `begin` and exactly one `end`."""

    def __init__(self, keep: bool, size: int) -> None:
        self.keep = keep
        self._calls: deque[OpenCall] = deque(maxlen=size)
        self._counters: dict[str, KeyCounters] = {}
        self._number = 0
        self.in_flight = 0
        self.arrived = 0

    def reset(self) -> None:
        """Forgets the past. Calls in flight stay in flight, and count among the replies when they end."""
        self._calls.clear()
        running = {key: counters["in_flight"] for key, counters in self._counters.items()}
        for counters in self._counters.values():
            counters.update(_no_calls())
        for key, in_flight in running.items():
            self._counters[key]["in_flight"] = self._counters[key]["max_in_flight"] = in_flight
        self.arrived = 0

    def counters_of(self, key: str) -> KeyCounters:
        counters = self._counters.get(key)
        if counters is None:
            counters = self._counters[key] = _no_calls()
        return counters

    def begin(self, key: str, headers: dict[str, str], body: bytes) -> OpenCall:
        self._number += 1
        counters = self.counters_of(key)
        counters["calls"] += 1
        counters["in_flight"] += 1
        if counters["in_flight"] > counters["max_in_flight"]:
            counters["max_in_flight"] = counters["in_flight"]
        self.in_flight += 1
        self.arrived += 1
        call = OpenCall(self._number, key, counters, headers, body)
        if self.keep:
            self._calls.append(call)
        return call

    def end(self, call: OpenCall, status: int | None, *, left: bool = False) -> None:
        """The reply is out (`status`), was cut by a fault (None), or its client has left."""
        call.ended_at = time.monotonic()
        call.status = status
        counters = call.counters
        counters["in_flight"] -= 1
        self.in_flight -= 1
        if status is not None:
            counters["by_status"][status] = counters["by_status"].get(status, 0) + 1
            if call.code is not None:
                counters["by_code"][call.code] = counters["by_code"].get(call.code, 0) + 1
        else:
            counters["left" if left else "broken"] += 1

    def counters(self) -> dict[str, KeyCounters]:
        return self._counters

    def calls(self) -> list[dict[str, Any]]:
        return [call.to_json() for call in self._calls]


def _no_calls() -> KeyCounters:
    return {
        "calls": 0,
        "by_status": {},
        "by_code": {},
        "broken": 0,
        "left": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "charged_tokens": 0,
        "in_flight": 0,
        "max_in_flight": 0,
        "listed_models": 0,
    }
