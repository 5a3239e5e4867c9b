"""Tokens that must not count: made up, altered, signed by somebody else, or ours and lacking what a token of ours has.

`jwt` packages refuse to make most of these, so they are put together here. Pure.
"""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

Json = dict[str, Any]

DAY_S = 86_400
HASHES = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}


def token(claims: Any, key: bytes, header: Any = None) -> str:
    """A JWT of these claims and header, whatever they are; one with `alg` none has an empty signature."""
    head = {"alg": "HS256", "typ": "JWT"} if header is None else header
    algorithm = head.get("alg") if isinstance(head, dict) else "HS256"
    signed = f"{_part(head)}.{_part(claims)}"
    if str(algorithm).lower() == "none":
        return signed + "."
    hashed = hmac.digest(key, signed.encode(), HASHES.get(str(algorithm), hashlib.sha256))
    return f"{signed}.{_base64(hashed)}"


def claims_of(text: str) -> Json:
    """What a token says, unverified."""
    part = text.split(".")[1]
    claims: Json = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims


def headers_that_do_not_count(good: str, other: str, key: bytes) -> dict[str, str]:
    """`Authorization` headers by what is wrong with them; `good` and `other` are two users' tokens, `key` is ours."""
    claims, others = claims_of(good), claims_of(other)
    head, body, signature = good.split(".")
    made = {
        "another key": token(claims, b"k" * 32),
        "the empty key": token(claims, b""),
        "alg none": token(claims, key, {"alg": "none", "typ": "JWT"}),
        "alg None": token(claims, key, {"alg": "None"}),
        "alg nOnE and our signature": f"{_part({'alg': 'nOnE'})}.{body}.{signature}",
        "alg none and our signature": f"{_part({'alg': 'none'})}.{body}.{signature}",
        "HS512 with our key": token(claims, key, {"alg": "HS512", "typ": "JWT"}),
        "alg RS256": token(claims, key, {"alg": "RS256", "typ": "JWT"}),
        "alg is a number": token(claims, key, {"alg": 256}),
        "no alg": token(claims, key, {"typ": "JWT"}),
        "a header that is a list": token(claims, key, ["HS256"]),
        "a header that is null": f"{_base64(b'null')}.{body}.{signature}",
        "a header that is a text": token(claims, key, "HS256"),
        "a kid that is no text": token(claims, key, {"alg": "HS256", "kid": {"a": 1}}),
        "a header that wants more": token(claims, key, {"alg": "HS256", "crit": ["x"], "b64": False}),
        "claims of another, our signature": f"{head}.{_part(others)}.{signature}",
        "no claim": token({}, key),
        "claims that are a list": token([claims], key),
        "claims that are null": token(None, key),
        "claims that are no JSON": _signed(head, _base64(b"{"), key),
        "claims that are no UTF-8": _signed(head, _base64(b'{"sub": "\xff"}'), key),
        **{f"no {name}": token(_without(claims, name), key) for name in ("exp", "jti", "sub", "aud")},
        "another audience": token({**claims, "aud": "somebody-else"}, key),
        "another's subject": token({**claims, "sub": others["sub"]}, key),
        "a subject that is a number": token({**claims, "sub": 1}, key),
        "a subject that is a list": token({**claims, "sub": [claims["sub"]]}, key),
        "an unknown id": token({**claims, "jti": "0" * 32}, key),
        "an id that is a list": token({**claims, "jti": [claims["jti"]]}, key),
        "an id that is null": token({**claims, "jti": None}, key),
        "an end that is past": token({**claims, "exp": int(time.time()) - 1}, key),
        "an end that is a word": token({**claims, "exp": "soon"}, key),
        "an end that is false": token({**claims, "exp": False}, key),
        "an end beyond every number": token({**claims, "exp": float("inf")}, key),
        "a beginning to come": token({**claims, "nbf": int(time.time()) + DAY_S}, key),
        "cut": good[:-5],
        "one character changed": good[:-6] + ("A" if good[-6] != "A" else "B") + good[-5:],
        "no signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "four parts": f"{good}.{signature}",
        "a long one": f"{good}{'A' * 4000}",
        "garbage": "x.y.z",
        "dots": "..",
        "null": "null",
        "letters of all kinds": "é.\xff.\x80",
    }
    return {
        **{name: f"Bearer {text}" for name, text in made.items()},
        "an empty header": "",
        "no token": "Bearer",
        "no scheme": good,
        "another scheme": f"Basic {base64.b64encode(good.encode()).decode()}",
        "another word": f"Token {good}",
        "two tokens": f"Bearer {other[:-5]}, Bearer {good}",
        "a token and more": f"Bearer {good} {good}",
    }


def _signed(head: str, body: str, key: bytes) -> str:
    return f"{head}.{body}.{_base64(hmac.digest(key, f'{head}.{body}'.encode(), hashlib.sha256))}"


def _without(claims: Json, name: str) -> Json:
    return {other: value for other, value in claims.items() if other != name}


def _part(value: Any) -> str:
    return _base64(json.dumps(value).encode())


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
