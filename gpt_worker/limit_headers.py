"""What a reply's headers tell of the key's limits. Pure: names and texts in, numbers out.

Source: OpenAI, "Rate limits", the headers x-ratelimit-{limit,remaining,reset}-{requests,tokens}, retry-after(-ms).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_GROUP_NAME = 200
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True, slots=True)
class Limit:
    """What one reply tells of one limit: how much in all, how much is left, and when it will be full again."""

    limit: int
    remaining: int
    reset_s: float | None

    @property
    def used_share(self) -> float:
        return (self.limit - self.remaining) / self.limit


@dataclass(frozen=True, slots=True)
class LimitHeaders:
    """What one reply tells of the limits; None where it is silent."""

    requests: Limit | None = None
    tokens: Limit | None = None
    retry_after_s: float | None = None


def parse_duration_s(text: str) -> float | None:
    """Seconds of "1s", "120ms", "6m0s", "1h2m3.5s" or a bare number of seconds; None for anything else."""
    text = text.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(ms|s|m|h|d))+", text, re.ASCII):
        return None
    return sum(float(number) * UNIT_S[unit] for number, unit in re.findall(r"([\d.]+)(ms|s|m|h|d)", text))


def read_headers(headers: Mapping[str, str]) -> LimitHeaders:
    """The limits that a reply's headers (names in lower case) tell of; nonsense counts as silence."""
    retry_after_ms = parse_duration_s(headers.get("retry-after-ms", ""))
    retry_after_s = parse_duration_s(headers.get("retry-after", ""))
    return LimitHeaders(
        requests=_read_limit(headers, "requests"),
        tokens=_read_limit(headers, "tokens"),
        retry_after_s=retry_after_ms / 1000 if retry_after_ms is not None else retry_after_s,
    )


def read_group_name(headers: Mapping[str, str], header: str) -> str | None:
    """An organisation or project as a reply's header names it; one that can be no name counts as silence."""
    name = headers.get(header)
    return name if name is not None and len(name) <= MAX_GROUP_NAME and name.isprintable() else None


def _read_limit(headers: Mapping[str, str], name: str) -> Limit | None:
    limit = headers.get(f"x-ratelimit-limit-{name}", "")
    remaining = headers.get(f"x-ratelimit-remaining-{name}", "")
    if not (re.fullmatch(r"\d{1,12}", limit, re.ASCII) and re.fullmatch(r"-?\d{1,12}", remaining, re.ASCII)):
        return None
    if int(limit) <= 0:
        return None
    return Limit(
        int(limit),
        min(int(limit), max(0, int(remaining))),
        parse_duration_s(headers.get(f"x-ratelimit-reset-{name}", "")),
    )
