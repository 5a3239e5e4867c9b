"""A reply's body read from bytes, among them such as no honest server sends."""

import gzip
import io
import os
import threading
import time
import tracemalloc
import zlib
from http.client import HTTPException, IncompleteRead

import pytest

from gpt_worker.reply_body import (
    FREE_BYTES,
    BodyTooLarge,
    BodyUnreadable,
    Budget,
    Look,
    read_body,
)
from tests.clock import eventually

MAX_BYTES = 16 << 20


def stay() -> None:
    """The call goes on."""


def read(
    sent: bytes,
    *,
    chunked: bool = False,
    length: int | None = None,
    encoding: str = "",
    look: Look = stay,
) -> bytes:
    file = io.BufferedReader(io.BytesIO(sent))
    body, _ = read_body(
        file,
        length,
        chunked=chunked,
        encoding=encoding,
        max_bytes=MAX_BYTES,
        look=look,
        budget=Budget(MAX_BYTES),
    )
    return body


@pytest.mark.parametrize(
    "sent",
    [
        b"2\r\n{}\r\n0\r\n\r\n",
        b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"0002\r\n{}\r\n000\r\n\r\n",
        b"2 \r\n{}\r\n0\r\n\r\n",
        b'2;a="b";c\r\n{}\r\n0;d\r\n\r\n',
        b"2\r\n{}\r\n0\r\nx: y\r\nz: a\r\n\r\n",
        b"2\r\n{}\r\n0\r\n",
    ],
)
def test_chunks_are_put_together(sent: bytes) -> None:
    assert read(sent, chunked=True) == b"{}"


@pytest.mark.parametrize(
    "line", [b"-1", b"+2", b"0x2", b" 2", b"0_2", b"", b"g", b"-0", b"000000002", b"2;" + b"a" * 2000]
)
def test_chunk_size_is_hexadecimal_digits_and_nothing_else(line: bytes) -> None:
    with pytest.raises(HTTPException):
        read(line + b"\r\n{}\r\n0\r\n\r\n", chunked=True)


@pytest.mark.parametrize("sent", [b"2\r\n{}0\r\n\r\n", b"1\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\n\n0\r\n\r\n"])
def test_chunk_ends_where_it_said(sent: bytes) -> None:
    with pytest.raises(HTTPException):
        read(sent, chunked=True)


@pytest.mark.parametrize("trailers", [b"x: y\r\n" * 1000, b"x: " + b"y" * 100_000])
def test_trailers_have_an_end(trailers: bytes) -> None:
    with pytest.raises(HTTPException):
        read(b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n", chunked=True)


def test_tiny_chunks_cost_neither_memory_nor_time() -> None:
    sent = b"2\r\nxy\r\n" * (MAX_BYTES // 2) + b"0\r\n\r\n"
    began_s = time.monotonic()

    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            read(sent, chunked=True)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 4 << 20
    assert time.monotonic() - began_s < 10


def test_longest_answer_may_come_token_by_token() -> None:
    assert len(read(b"4\r\nword\r\n" * 128_000 + b"0\r\n\r\n", chunked=True)) == 4 * 128_000


@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize("size_bytes", [FREE_BYTES, FREE_BYTES + 1, MAX_BYTES, MAX_BYTES + 1])
def test_body_is_whole_or_too_large(size_bytes: int, encoding: str) -> None:
    body = (os.urandom(1000) * (size_bytes // 1000 + 1))[:size_bytes]
    sent = gzip.compress(body, 1) if encoding else body
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (sent[at : at + 100_000] for at in range(0, len(sent), 100_000))
    )
    ways = [(sent, len(sent), False), (sent, None, False), (chunks + b"0\r\n\r\n", None, True)]

    for wire, length, chunked in ways:
        if size_bytes > MAX_BYTES:
            with pytest.raises(BodyTooLarge):
                read(wire, length=length, chunked=chunked, encoding=encoding)
        else:
            assert read(wire, length=length, chunked=chunked, encoding=encoding) == body


@pytest.mark.parametrize("length", [2, FREE_BYTES + 1])
def test_body_that_ends_early_is_incomplete(length: int) -> None:
    with pytest.raises(IncompleteRead):
        read(b"x" * (length - 1), length=length)


def test_gzip_in_small_pieces_is_unpacked() -> None:
    packed = gzip.compress(b"{}" * 1000, 9)
    sent = b"".join(b"1\r\n%c\r\n" % byte for byte in packed) + b"0\r\n\r\n"

    assert read(sent, chunked=True, encoding="X-GZip") == b"{}" * 1000


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "gzip, br", "zstd", "none"])
def test_only_gzip_is_unpacked(encoding: str) -> None:
    with pytest.raises(BodyUnreadable):
        read(zlib.compress(b"{}"), encoding=encoding)


@pytest.mark.parametrize(
    "sent",
    [b"", b"zzzz", gzip.compress(b"{}")[:-1], gzip.compress(b"{}") + b"z"],
    ids=["nothing", "no gzip", "cut", "more behind it"],  # a header of gzip has the time in it
)
def test_damaged_gzip_is_unreadable(sent: bytes) -> None:
    with pytest.raises(BodyUnreadable):
        read(sent, encoding="gzip")


def test_gzip_of_many_empty_members_takes_no_time() -> None:
    empty = gzip.compress(b"")
    sent, began_s = empty * (MAX_BYTES // len(empty)), time.monotonic()

    with pytest.raises(BodyUnreadable):
        read(sent, length=len(sent), encoding="gzip")

    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_call_that_is_over_is_noticed_between_the_pieces(encoding: str) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise TimeoutError

    body = bytes(2 * FREE_BYTES)
    sent = gzip.compress(body) if encoding else body
    with pytest.raises(TimeoutError):
        read(sent, length=len(sent), encoding=encoding, look=look)

    assert looks == 3


# The budget


def test_budget_goes_to_whoever_asked_first() -> None:
    budget, order = Budget(10), list[int]()
    held = [budget.reserve(10, stay)]

    def take(size_bytes: int) -> None:
        hold = budget.reserve(size_bytes, stay)
        order.append(size_bytes)
        del hold

    threads = []
    for number, size_bytes in enumerate((9, 1, 5)):
        threads.append(threading.Thread(target=take, args=(size_bytes,)))
        threads[-1].start()
        eventually(lambda number=number: budget.waiting == number + 1)  # type: ignore[misc]
    held.clear()
    for thread in threads:
        thread.join(10)

    assert order == [9, 1, 5]
    assert (budget.free_bytes, budget.waiting) == (10, 0)


def test_what_a_hold_does_not_need_is_free_at_once() -> None:
    budget = Budget(10)

    hold = budget.reserve(10, stay)
    hold.shrink(3)

    assert budget.free_bytes == 7
    del hold
    assert budget.free_bytes == 10


def test_who_stops_waiting_lets_the_next_go() -> None:
    budget = Budget(10)
    held = [budget.reserve(5, stay)]

    def leave() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        budget.reserve(6, leave)

    held.append(budget.reserve(5, leave))
    assert budget.free_bytes == 0
