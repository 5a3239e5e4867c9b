"""Sound HTTP requests, and every way to spoil one: its bytes, its JSON, its head, its framing. Pure.

What a mutation needs by chance comes from the `Random` it is given, so that a seed makes the same requests again.
"""
# ruff: noqa: ARG001 (every mutation is called with the same arguments)

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `framed`: how the body's length is told, if not by its true Content-Length."""

    method: bytes
    target: bytes
    headers: Headers = ()
    body: bytes = b""
    version: bytes = b"HTTP/1.1"
    framed: Headers | None = None
    sent_body: bytes | None = None
    """What goes over the wire in place of the body, such as its chunks."""

    def render(self) -> bytes:
        framed = self.framed
        if framed is None:
            framed = ((b"Content-Length", b"%d" % len(self.body)),) if self.body else ()
        lines = [b" ".join((self.method, self.target, self.version))]
        lines += [name + b": " + value for name, value in (*self.headers, *framed)]
        sent = self.body if self.sent_body is None else self.sent_body
        return b"\r\n".join(lines) + b"\r\n\r\n" + sent

    def header(self, name: bytes) -> bytes | None:
        return next((value for known, value in self.headers if known.lower() == name), None)

    def with_header(self, name: bytes, value: bytes) -> "Request":
        kept = tuple((known, was) for known, was in self.headers if known.lower() != name.lower())
        return replace(self, headers=(*kept, (name, value)))


Mutation = Callable[[Request, Random, Sequence[Request]], Request]

NASTY: tuple[bytes, ...] = (
    *(b"\0", b"\r\n", b"\n", b"\r", b"\r\n\r\n"),
    *(b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xae", b"\xef\xbb\xbf"),
    *(rb"\u0000", rb"\ud800", rb"\udc00\ud800"),
    *(b'"', b"\\", b"{", b"[", b"}", b"]", b",", b":", b"\t", b";", b"'", b"--", b"%00", b"%ff", b"../"),
    *(b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"0x10"),
    *(b"[" * 300, b"[" * 20_000, b'{"a":' * 300, b"A" * 9000, b"{{}{", b"{text!r:>{text}}"),
)
NASTY_TARGETS: tuple[bytes, ...] = (
    b"%00",
    b"%ff",
    b"%ED%A0%80",
    b"%2e%2e%2f",
    b"%2F",
    b"%",
    b"%zz",
    b"//",
    b"/..",
    b"\\",
    b"?",
    b"#",
    b"?limit=99999999999999999999",
    b"?limit=-1&limit=2",
    b"?limit=1e5",
    b"?cursor=%00",
    b"?all=true",
    b"?results=maybe",
    b"?format=%ff",
    b"?expires=99999999999&signature=%C3%A9",
    b"?template=%7B%7D&temperature=1e999",
    b"?template=%7Ba%5B0%5D%7D",
    b"?response_format=%5B%5B%5B%5B",
    b"?metadata=%7B%22a%22%3A%22%00%22%7D",
    b"?status=;DROP",
    b"&" * 2000,
    b"?a=" + b"b" * 7000,
    b"?a=" + b"b" * 9000,
    b"/" * 3000,
    b"\x80\xff",
    b"\xc3\xa9",
    b"\t",
    b" ",
)
METHODS: tuple[bytes, ...] = (
    *(b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"QUERY"),
    *(b"get", b"", b"G\0T", b"GET GET", b"X" * 40, b"\xff", b"PRI"),
)
VERSIONS: tuple[bytes, ...] = (
    *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b"", b"HTTP/1.1 "),
)
_NASTY_VALUES_BY_HEADER: dict[bytes, tuple[bytes, ...]] = {
    b"Host": (b"", b"a b", b"\xff", b"[::1"),
    b"Content-Type": (
        b"",
        b"application/json; charset=utf-16",
        b"application/json; charset=\xff",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"b" * 100,
        b'multipart/form-data; boundary="\xe9\x00"',
        b"text/csv; charset=latin-1",
        b"text/csv; header=absent; header*=utf-8''%ff",
    ),
    b"Content-Encoding": (b"gzip", b"gzip, gzip", b"br"),
    b"Authorization": (b"Bearer", b"Bearer \xff.\xfe.\xfd", b"Bearer " + b"e30." * 100),
    b"Prefer": (b"wait=99999999999999999999", b"wait=-1, respond-async;;;=,", b"wait=\xb2"),
    b"Idempotency-Key": (b"", b"\xff" * 255, b"k" * 256),
    b"X-Request-Id": (b"\xff\r", b"i" * 5000),
    b"Expect": (b"100-continue", b"the-unexpected"),
    b"Connection": (b"close", b"keep-alive, upgrade"),
    b"Upgrade": (b"h2c",),
    b"X-Forwarded-For": (b"127.0.0.1, \xff",),
    b"X-Forwarded-Proto": (b"https",),
    b"Forwarded": (b"for=_x;;",),
    b"Range": (b"bytes=0-0,1-1",),
    b"If-Modified-Since": (b"never",),
    b"Cookie": (b"a=b; " * 500,),
    b"Accept": (b"\0",),
    b"Bad Name": (b"x",),
    b"Bad\0Name": (b"x",),
    b"": (b"x",),
    b"Script_Name": (b"/x",),
    b"SCRIPT-NAME": (b"/x",),
    b"X": (b"y\r\n folded", b"y\nZ: z"),
    b"webhook-id": (b"\xff",),
    b"webhook-timestamp": (b"9" * 30, b"\xb2"),
    b"webhook-signature": (b"v1,\xff v1, ,",),
    b"Long": (b"x" * 9000,),
}
NASTY_HEADERS: Headers = tuple(
    (name, value) for name, values in _NASTY_VALUES_BY_HEADER.items() for value in values
)
LYING_LENGTHS: tuple[bytes, ...] = (
    *(b"0", b"1", b"-1", b"+5", b"0x5", b"5, 5", b"5,6", b"", b" ", b"five", b"1e3", b"\xb2", b"00000005"),
    *(b"65535", b"65537", b"1048577", b"99999999999", b"9" * 30, b"9" * 5000),
)
CODINGS: tuple[bytes, ...] = (
    *(b"chunked", b"Chunked", b" chunked", b"chunked ", b"xchunked", b"chunked, identity", b"gzip, chunked"),
    *(b"chunked, chunked", b"identity", b"", b"deflate", b"chunked;q=1", b"chunked\0"),
)
CHUNK_SIZES: tuple[bytes, ...] = (
    *(b"0", b"-1", b"+1", b"0x1", b"1 ", b" 1", b"g", b"", b"1;x=y", b"1;" + b"x" * 5000),
    *(b"7fffffff", b"ffffffffffffffff", b"f" * 5000, b"1\n", b"\xff", b"1_0"),
)
NASTY_VALUES: tuple[Any, ...] = (
    *(None, True, False),
    *(0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.1, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "\ud800", "\udfff\ud800", "\u202e", "😀" * 300, "x" * 20_000),
    *("{", "{}", "{0}", "{a.b[c]}", "{text"),
    *([], {}, [[]], [None], {"": ""}, {"\0": "\0"}, {"\ud800": 1}),
    *(["x"] * 1500, {str(number): "x" for number in range(1200)}),
)
DEEP = "deep-thing-goes-here"
DEPTHS = (10, 150, 201, 1000, 50_000)


# Bytes


def mangle_bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """One change somewhere: flip, cut, insert, repeat, take out, or splice with another."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 64)))
    match random.randrange(7):
        case 0 if data:
            place = random.randrange(len(data))
            return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + random.choice(NASTY) + data[at:]
        case 3:
            return data[:end] + data[at:end] * random.choice((1, 2, 50, 500)) + data[end:]
        case 4:
            return data[:at] + data[end:]
        case 5 if others:
            other = random.choice(others)
            return data[:at] + other[random.randrange(len(other) + 1) :]
        case _:
            return data[:at] + random.randbytes(end - at) + data[end:]


def mangle_body(request: Request, random: Random, others: Sequence[Request]) -> Request:
    body = request.body
    for _ in range(random.choice((1, 1, 2, 5))):
        body = mangle_bytes(body, random, [other.body for other in others])
    return replace(request, body=body)


# JSON


def mangle_json(request: Request, random: Random, others: Sequence[Request]) -> Request:
    """A value somewhere in the JSON is another one; bodies that are no JSON are mangled as bytes."""
    try:
        value = json.loads(request.body)
    except (ValueError, RecursionError):
        return mangle_body(request, random, others)
    value = _replaced(value, random, 0)
    text = json.dumps(value)
    if DEEP in text:
        depth = random.choice(DEPTHS)
        opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(
            f'"{DEEP}"', opening * depth + "1" + closing * random.choice((depth, depth, 0)), 1
        )
    if random.random() < 0.1:
        text = re.sub(r'"(\w+)":', r'"\1": 1, "\1":', text, count=1)  # a name given twice
    return replace(request, body=text.encode())


def _replaced(value: Any, random: Random, depth: int) -> Any:
    if depth and (not isinstance(value, dict | list) or not value or random.random() < 0.3):
        return DEEP if random.random() < 0.1 else random.choice(NASTY_VALUES)
    if isinstance(value, list) and value:
        place = random.randrange(len(value))
        return [
            _replaced(item, random, depth + 1) if number == place else item
            for number, item in enumerate(value)
        ]
    if isinstance(value, dict) and value:
        chosen = random.choice(list(value))
        if random.random() < 0.15:
            name = random.choice(("", "\0", "\ud800", "x" * 300, "constructor", "data", "id", "settings"))
            return {name if known == chosen else known: item for known, item in value.items()}
        return {
            name: _replaced(item, random, depth + 1) if name == chosen else item
            for name, item in value.items()
        }
    return random.choice(NASTY_VALUES)


# Heads


def mangle_target(request: Request, random: Random, others: Sequence[Request]) -> Request:
    target = request.target
    nasty = random.choice(NASTY_TARGETS)
    match random.randrange(6):
        case 0:
            target += nasty
        case 1:
            parts = target.split(b"/")
            parts[random.randrange(len(parts))] = nasty
            target = b"/".join(parts)
        case 2:
            target = mangle_bytes(target, random, [other.target for other in others])
        case 3:
            target = random.choice((b"http://x", b"http://", b"*", b"", b"x:80", b"//x")) + target
        case 4:
            target += (b"&" if b"?" in target else b"?") + nasty.lstrip(b"?")
        case _:  # of a route that ends no token
            target = random.choice(
                [other.target for other in others if other.target.count(b"/") > 1] or [target]
            )
    return replace(request, target=target)


def mangle_method(request: Request, random: Random, others: Sequence[Request]) -> Request:
    if random.random() < 0.3:
        return replace(request, version=random.choice(VERSIONS))
    return replace(request, method=random.choice(METHODS))


def mangle_headers(request: Request, random: Random, others: Sequence[Request]) -> Request:
    headers = list(request.headers)
    name, value = random.choice(NASTY_HEADERS)
    match random.randrange(5):
        case 0:
            headers.append((name, value))
        case 1:
            request = request.with_header(name, value)
            headers = list(request.headers)
        case 2 if headers:
            del headers[random.randrange(len(headers))]
        case 3 if headers:
            place = random.randrange(len(headers))
            known, was = headers[place]
            headers[place] = (known, mangle_bytes(was, random, []))
        case _:
            headers += [(b"X-%d" % number, b"y") for number in range(random.choice((1, 90, 120)))]
    random.shuffle(headers)
    return replace(request, headers=tuple(headers))


# Framing


def lie_about_length(request: Request, random: Random, others: Sequence[Request]) -> Request:
    lie = random.choice(LYING_LENGTHS)
    if random.random() < 0.4:
        lie = b"%d" % max(0, len(request.body) + random.choice((-1, 1, -2, 100)))
    framed: Headers = ((b"Content-Length", lie),)
    if random.random() < 0.2:
        framed += (
            (
                random.choice((b"Content-Length", b"content-length ", b"Content-Length\t")),
                b"%d" % len(request.body),
            ),
        )
    return replace(request, framed=framed)


def send_chunks(request: Request, random: Random, others: Sequence[Request]) -> Request:
    """The body in chunks, which is sound."""
    size = random.choice((1, 7, 100, 4096))
    pieces = [request.body[at : at + size] for at in range(0, len(request.body), size)][:2000]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    end = random.choice((b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"000\r\n\r\n"))
    return replace(request, framed=((b"Transfer-Encoding", b"chunked"),), sent_body=chunks + end)


def lie_in_chunks(request: Request, random: Random, others: Sequence[Request]) -> Request:
    chunked = send_chunks(request, random, others)
    sent = chunked.sent_body or b""
    framed: Headers = ((b"Transfer-Encoding", b"chunked"),)
    match random.randrange(4):
        case 0:
            sent = (
                random.choice(CHUNK_SIZES)
                + b"\r\n"
                + request.body[:50]
                + b"\r\n"
                + random.choice((sent, b"", b"0\r\n\r\n"))
            )
        case 1:
            sent = mangle_bytes(sent, random, [])
        case 2:
            framed = ((b"Transfer-Encoding", random.choice(CODINGS)),)
        case _:
            framed = (*framed, (b"Content-Length", random.choice((*LYING_LENGTHS, b"%d" % len(sent)))))
    if random.random() < 0.2:
        framed += ((b"Transfer-Encoding", random.choice(CODINGS)),)
    return replace(chunked, framed=framed, sent_body=sent)


def send_gzip(request: Request, random: Random, others: Sequence[Request]) -> Request:
    """Packed, and often damaged; now and then a bomb."""
    body = b"0" * random.choice((1 << 16, 1 << 22)) if random.random() < 0.05 else request.body
    packed = gzip.compress(body, mtime=0)
    match random.randrange(5):
        case 0:
            packed = mangle_bytes(packed, random, [])
        case 1:
            packed += random.choice((packed, b"\0" * 100, b"garbage", b"\x1f\x8b"))
        case 2:
            packed = random.choice((b"", b"\x1f\x8b", request.body, packed[:10], packed[:-1]))
        case _:
            pass
    return replace(request.with_header(b"Content-Encoding", b"gzip"), body=packed)


def mangle_boundary(request: Request, random: Random, others: Sequence[Request]) -> Request:
    """The form's boundary, in its header or in its body, is not the same any more."""
    kind = request.header(b"content-type") or b""
    found = re.search(rb"boundary=([^;]+)", kind)
    if found is None:
        return mangle_headers(request, random, others)
    boundary = found[1]
    other = random.choice(
        (b"", b"-", boundary[:-1], boundary + b"x", b'"' + boundary + b'"', b"\xff", b"--" + boundary)
    )
    if random.random() < 0.5:
        return request.with_header(b"Content-Type", kind.replace(boundary, other))
    if random.random() < 0.5:
        return replace(
            request, body=request.body.replace(b"--" + boundary, b"--" + other, random.choice((1, -1)))
        )
    lines = request.body.split(b"\r\n")
    lines[random.randrange(len(lines))] = random.choice(
        (*NASTY, b"Content-Disposition: form-data", b"Content-Type: x", b"--" + boundary)
    )
    return replace(request, body=b"\r\n".join(lines))


MUTATIONS: Sequence[Mutation] = (
    *(mangle_body, mangle_body, mangle_json, mangle_json, mangle_json),
    *(mangle_target, mangle_method, mangle_headers),
    *(lie_about_length, send_chunks, lie_in_chunks, send_gzip, mangle_boundary),
)


def mangle(request: Request, random: Random, others: Sequence[Request]) -> bytes:
    """The request as it goes over the wire, spoilt in one way or in several."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        request = random.choice(MUTATIONS)(request, random, others)
    raw = request.render()
    if random.random() < 0.1:
        raw = mangle_bytes(raw, random, [random.choice(others).render()])
    return raw
