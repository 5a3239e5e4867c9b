"""What can go wrong with a reply, and which calls it happens to.

A fault is a value; `Faults` picks the one that a call meets. `answers` and `delivery` carry it out.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class FaultKind(StrEnum):
    """Every way in which a reply can be wrong."""

    STATUS = "status"
    """An error with `status`, `code`, `error_type`, `message`, `headers` and `retry_after_s`."""
    RESET = "reset"
    """Half of the reply, then a TCP reset."""
    CLOSE = "close"
    """The connection is closed before a byte of the reply."""
    HANG = "hang"
    """Silence for `seconds` (None: until `release`), then the ordinary reply."""
    HTML = "html"
    """200 with a page of HTML."""
    BROKEN_JSON = "broken_json"
    """200 with half of a JSON document, its length told truly."""
    EMPTY_OBJECT = "empty_object"
    """200 with `{}`."""
    NULL_CONTENT = "null_content"
    """A good reply whose content is null, without a refusal."""
    CUT_BODY = "cut_body"
    """The connection is closed in the middle of the body that Content-Length promised."""
    DRIP_BODY = "drip_body"
    """The body comes byte by byte, `seconds` apart."""
    DRIP_HEADERS = "drip_headers"
    """The head comes byte by byte, `seconds` apart."""
    HUGE_BODY = "huge_body"
    """A good reply whose content is `size_bytes` long."""
    GZIP_BOMB = "gzip_bomb"
    """A small gzip body that unpacks to a content of `size_bytes`."""
    REDIRECT = "redirect"
    """`status` (307) to `location`."""
    ANSWER = "answer"
    """A good reply with `content`."""
    REFUSAL = "refusal"
    """The model refuses: content null, a text in `refusal`."""
    CONTENT_FILTER = "content_filter"
    """No content, finish_reason "content_filter"."""
    LENGTH = "length"
    """The first half of the content, finish_reason "length"; a packed answer is no JSON then."""
    NO_USAGE = "no_usage"
    """A good reply without `usage`."""
    PACKED_DROP = "packed_drop"
    """A packed reply without its last answer."""
    PACKED_DUPLICATE = "packed_duplicate"
    """A packed reply with its first answer twice."""
    PACKED_CONFLICT = "packed_conflict"
    """A packed reply with two different answers for its first number."""
    PACKED_EXTRA = "packed_extra"
    """A packed reply with an answer that nobody asked for."""
    PACKED_WRONG_NUMBERS = "packed_wrong_numbers"
    """A packed reply whose numbers start at 1001."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong for the next `times` chat calls that match; None = for all of them."""

    kind: FaultKind
    times: int | None = 1
    key: str | None = None
    """Only calls with this API key."""
    contains: str | None = None
    """Only calls whose last user message contains this."""

    status: int | None = None
    """For "status" (500) and "redirect" (307)."""
    code: str | None = None
    error_type: str | None = None
    message: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """Sent beside the ordinary ones, whatever the kind; they win."""
    retry_after_s: float | None = None
    seconds: float | None = None
    size_bytes: int = 64 * 1024 * 1024
    location: str = "/"
    content: str = ""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Fault":
        return cls(**{**fields, "kind": FaultKind(fields["kind"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Faults:
    """The faults that wait for a call, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Fault, int | None]] = []

    def add(self, fault: Fault) -> None:
        self._waiting.append((fault, fault.times))

    def clear(self) -> None:
        self._waiting.clear()

    def take(self, key: str, user_text: str) -> Fault | None:
        """The first fault that this call meets, counted down."""
        for place, (fault, left) in enumerate(self._waiting):
            if fault.key not in (None, key) or (fault.contains or "") not in user_text:
                continue
            if left is not None and left <= 1:
                del self._waiting[place]
            elif left is not None:
                self._waiting[place] = (fault, left - 1)
            return fault
        return None
