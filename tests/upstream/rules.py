"""What the fake OpenAI is told to be: the rules of one key, and the rules of the whole server.

Both are plain values that travel to the child process as JSON. They decide nothing themselves.
"""

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any


class Accepts(StrEnum):
    """Which name of the output limit the server takes; the other one is a 400 `unsupported_parameter`."""

    MAX_COMPLETION_TOKENS = "max_completion_tokens"
    MAX_TOKENS = "max_tokens"
    BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class KeyRules:
    """How one API key behaves. Limits of None do not exist, and send no headers of their own."""

    rpm: int | None = None
    """Requests a minute, counted for each model, as OpenAI does."""
    tpm: int | None = None
    """Tokens a minute, counted for each model."""
    rpd: int | None = None
    """Requests a day, as on free tiers; then the request headers tell the day and not the minute."""
    bucket_s: float = 60.0
    """How many seconds of refill the minute's buckets hold: 1.0 enforces 600 a minute as 10 a second."""

    latency_s: float = 0.0
    """Time that an answer takes; its median when `latency_sigma` is set. Errors come at once."""
    latency_sigma: float = 0.0
    """0 = always `latency_s`; else answers take a lognormal time."""

    organization: str | None = None
    """Keys of the same organization and project share their limits and their quota. None = one of its own."""
    project: str | None = None

    refused: bool = False
    """401 `invalid_api_key` for every call."""
    exhausted_after: int | None = None
    """After so many answers to its organization and project: 429 `insufficient_quota`."""
    missing_models: tuple[str, ...] = ()
    """Models that the key may not use: `missing_model_status` with the code `model_not_found`."""
    missing_model_status: int = 404

    send_limit_headers: bool = True
    send_retry_after: bool = True
    send_organization: bool = True

    p_500: float = 0.0
    """Share of calls that fail with a 500. The three kinds are drawn from one seeded source."""
    p_reset: float = 0.0
    p_hang: float = 0.0

    def group(self, key: str) -> tuple[str, str]:
        """The organization and project that count the calls of `key`."""
        return self.organization or _own_organization(key), self.project or "proj_default"

    def limits(self) -> tuple[int | None, int | None, int | None, float]:
        return self.rpm, self.tpm, self.rpd, self.bucket_s

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "KeyRules":
        return cls(**{**fields, "missing_models": tuple(fields.get("missing_models", ()))})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ServerRules:
    """What holds for all keys."""

    accepts: Accepts = Accepts.BOTH
    context_tokens: int = 128_000
    """A longer prompt is a 400 `context_length_exceeded`."""
    models: tuple[str, ...] = ("gpt-4.1-nano", "gpt-4o-mini", "gpt-5-nano")
    """What `GET /v1/models` lists. Every other name is answered too, but for a key's `missing_models`."""
    log_calls: bool = True
    """Off for benchmarks: counters stay, the log of calls stays empty."""
    log_size: int = 20_000
    seed: int = 1

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ServerRules":
        return cls(**{**fields, "accepts": Accepts(fields["accepts"]), "models": tuple(fields["models"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache(maxsize=10_000)
def _own_organization(key: str) -> str:
    return f"org-{sha256(key.encode()).hexdigest()[:16]}"


def check_groups(keys: dict[str, KeyRules]) -> None:
    """Raises ValueError where keys share a bucket and disagree about its size."""
    seen: dict[tuple[str, str], tuple[int | None, int | None, int | None, float]] = {}
    for key, rules in keys.items():
        if seen.setdefault(rules.group(key), rules.limits()) != rules.limits():
            raise ValueError("keys of one organization and project share their limits: give them the same")


def set_rules(keys: dict[str, KeyRules], key: str, rules: KeyRules) -> None:
    """Takes the rules of one key, whose limits become those of every key of its organization and project."""
    keys[key] = rules
    rpm, tpm, rpd, bucket_s = rules.limits()
    for other, held in keys.items():
        if held.group(other) == rules.group(key):
            keys[other] = replace(held, rpm=rpm, tpm=tpm, rpd=rpd, bucket_s=bucket_s)
