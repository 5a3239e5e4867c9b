"""Signatures, pure: of webhooks (Standard Webhooks 1.0), and of links to one job's results.

Every secret comes in as an argument and every time is aware. Nothing here reads a clock or a request.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import urlencode

from config import derive

SECRET_PREFIX = "whsec_"
TOLERANCE_S = 300  # Standard Webhooks 1.0, "Verifying webhook authenticity": a replay must not work for ever


class SignatureInvalid(Exception):
    """The signature does not belong to this message, or its time is too far away."""


def secret_bytes(secret: str) -> bytes:
    """The key inside `whsec_<base64>`. Raises ValueError when it is not of that form."""
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError(f"a webhook secret starts with {SECRET_PREFIX}")
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)


def sign(secret: bytes, message_id: str, sent_at: datetime, body: bytes) -> str:
    """`v1,<base64>`: HMAC-SHA256 over `id.timestamp.body`; `sent_at` is cut to whole seconds since 1970.

    Raises ValueError for a naive time. Source: Standard Webhooks 1.0, "Signature scheme".
    """
    message = b".".join((message_id.encode(), str(timestamp(sent_at)).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret, message, hashlib.sha256)).decode()


def timestamp(moment: datetime) -> int:
    """Whole seconds since 1970, as `webhook-timestamp` tells them. Raises ValueError for a naive time."""
    if moment.tzinfo is None:
        raise ValueError("a time without a zone can't be signed")
    return int(moment.timestamp() // 1)


def verify(
    secret: bytes,
    *,
    message_id: str,
    sent_at: str,
    signatures: str,
    body: bytes,
    now: datetime,
    tolerance_s: float = TOLERANCE_S,
) -> None:
    """Check a message against its three headers.

    Args:
        message_id: `webhook-id`.
        sent_at: `webhook-timestamp`, as it came.
        signatures: `webhook-signature`: one or more, separated by spaces; one good one is enough.

    Raises:
        SignatureInvalid: whatever is wrong; the message says what, and nothing of the good signature.
    """
    if not message_id:
        raise SignatureInvalid("webhook-id is missing")
    if not re.fullmatch(r"\d{1,11}", sent_at, re.ASCII):
        raise SignatureInvalid("webhook-timestamp is not a number of seconds")
    if abs(timestamp(now) - int(sent_at)) > tolerance_s:
        raise SignatureInvalid("webhook-timestamp is too far from now")
    expected = sign(secret, message_id, datetime.fromtimestamp(int(sent_at), UTC), body).encode()
    good = [hmac.compare_digest(expected, candidate.encode()) for candidate in signatures.split(" ")]
    if not any(good):
        raise SignatureInvalid("no signature matches")


def link_key(app_key: str) -> bytes:
    """The key that signs links to results, from APP_KEY."""
    return derive(app_key, "results link")


def sign_link(key: bytes, job_id: str, expires_at: datetime) -> str:
    """`expires=…&signature=…`, the part of a query string that opens this job's results until then.

    Of any run and in any format: a receiver tells a later run by `results_sha256`. It opens nothing else, as
    the signature is bound to the path. Raises ValueError for a naive time.
    """
    expires = timestamp(expires_at)
    return urlencode({"expires": expires, "signature": _link_signature(key, job_id, expires)})


def link_is_valid(key: bytes, job_id: str, query: Mapping[str, str], now: datetime) -> bool:
    """Whether the query of `GET /jobs/<job_id>/results` holds a good signature that has not expired."""
    expires = query.get("expires", "")
    if not re.fullmatch(r"[1-9]\d{0,10}", expires, re.ASCII):
        return False
    expected = _link_signature(key, job_id, int(expires)).encode()
    genuine = hmac.compare_digest(expected, query.get("signature", "").encode())
    return genuine and timestamp(now) < int(expires)


def _link_signature(key: bytes, job_id: str, expires: int) -> str:
    message = f"GET /jobs/{job_id}/results expires={expires}".encode()
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()
