"""Bodies as pieces: whole or broken off, packed or not, and never more than is allowed."""

import gzip
import io
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import BadRequest, ClientDisconnected

from gpt_worker.api.unpacking import PIECE_BYTES, bounded, gunzip, not_packed, sent_pieces
from gpt_worker.errors import TooLarge

TEXT = b"good morning\n" * 20_000


def in_pieces(raw: bytes, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    for start in range(0, len(raw), size_bytes):
        yield raw[start : start + size_bytes]


def test_body_that_is_shorter_than_it_said_is_a_lost_client() -> None:
    pieces = sent_pieces(io.BytesIO(b"abc"), 4)

    assert next(pieces) == b"abc"
    with pytest.raises(ClientDisconnected):
        next(pieces)


@pytest.mark.parametrize("length", [3, None])
def test_body_that_is_whole_just_ends(length: int | None) -> None:
    assert [*sent_pieces(io.BytesIO(b"abc"), length)] == [b"abc"]


@pytest.mark.parametrize("size_bytes", [1, 7, 1000, PIECE_BYTES])
@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(TEXT, mtime=0),
        gzip.compress(TEXT[:100], mtime=0) + gzip.compress(TEXT[100:], mtime=0),
        gzip.compress(b"", mtime=0) + gzip.compress(TEXT, mtime=0) + gzip.compress(b"", mtime=0),
        gzip.compress(TEXT, mtime=0) + b"\0" * 512,
        gzip.compress(TEXT, 0, mtime=0),
    ],
    ids=["one member", "two members", "empty members", "padded", "stored"],
)
def test_gzip_is_unpacked_however_it_is_cut(packed: bytes, size_bytes: int) -> None:
    assert b"".join(gunzip(in_pieces(packed, size_bytes))) == TEXT


@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=4), st.integers(1, 3000))
def test_whatever_was_packed_comes_out(members: list[bytes], size_bytes: int) -> None:
    packed = b"".join(map(gzip.compress, members))

    assert b"".join(gunzip(in_pieces(packed, size_bytes))) == b"".join(members)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x1f",
        gzip.compress(TEXT, mtime=0)[:-1],
        gzip.compress(TEXT, mtime=0)[:50],
        gzip.compress(TEXT, mtime=0) + b"\x1f\x8b",
        gzip.compress(TEXT, mtime=0) + b"tail",
        b'{"text": "not packed"}',
        zlib.compress(TEXT),
        gzip.compress(TEXT, mtime=0)[:-8] + b"\0" * 8,
    ],
    ids=["empty", "one byte", "no end", "cut", "cut member", "tail", "plain", "zlib", "wrong checksum"],
)
def test_what_is_no_whole_gzip_is_refused(packed: bytes) -> None:
    with pytest.raises(BadRequest, match="gzip"):
        b"".join(gunzip(in_pieces(packed)))


@pytest.mark.parametrize("text", [TEXT, b"", b"\x1f", b"text\n\x1f\x8b"])
def test_what_is_not_packed_passes(text: bytes) -> None:
    assert b"".join(not_packed(in_pieces(text), "gzip!")) == text


def test_gzip_that_was_not_said_is_refused_in_the_words_given() -> None:
    with pytest.raises(BadRequest, match="gzip!"):
        b"".join(not_packed(in_pieces(gzip.compress(TEXT)), "gzip!"))


def test_bomb_comes_in_small_pieces() -> None:
    bomb = gzip.compress(b"\0" * (64 << 20), 9)

    pieces = gunzip([bomb])

    assert all(len(next(pieces)) <= PIECE_BYTES for _ in range(100))


@pytest.mark.parametrize(("max_bytes", "fits"), [(9, True), (10, True), (8, False), (1, False)])
def test_pieces_are_bounded_together(max_bytes: int, fits: bool) -> None:
    pieces = bounded([b"abc"] * 3, max_bytes, "MAX_UPLOAD_BYTES")

    if fits:
        assert b"".join(pieces) == b"abcabcabc"
    else:
        with pytest.raises(TooLarge, match=r"MAX_UPLOAD_BYTES"):
            b"".join(pieces)


def test_stream_is_checked_at_its_first_piece_and_once_a_mib() -> None:
    checks: list[None] = []

    for _ in bounded([b"x" * PIECE_BYTES] * 40, 1 << 30, "MAX_UPLOAD_BYTES", lambda: checks.append(None)):
        pass

    assert len(checks) == 3
