"""Replies off the wire: whole ones are told from those that are cut or garbled."""

import pytest

from chaos.wire import Garbled, parse_replies

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
TO_HEAD = b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
ENDLESS = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall that comes"


def test_replies_in_a_row_are_told_apart() -> None:
    replies, left = parse_replies(OK + INTERIM + TO_HEAD + EMPTY + CHUNKED + ENDLESS, ended=True)

    assert [(reply.status, reply.body) for reply in replies] == [
        (200, b"hi"),
        (404, b""),
        (204, b""),
        (200, b"abc"),
        (200, b"all that comes"),
    ]
    assert left == b""


@pytest.mark.parametrize("whole", [OK, CHUNKED])
def test_beginning_of_a_reply_is_no_reply_yet(whole: bytes) -> None:
    for end in range(1, len(whole)):
        assert parse_replies(whole[:end], ended=False) == ([], whole[:end])


@pytest.mark.parametrize(
    "received",
    [
        pytest.param(OK[:-1], id="cut body"),
        pytest.param(CHUNKED[:-4], id="cut chunks"),
        pytest.param(b"HTTP/1.1 200", id="cut head"),
        pytest.param(OK + b"more", id="more than was told"),
        pytest.param(b"<html>", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", id="a header without a colon"),
        pytest.param(CHUNKED.replace(b"\r\n3\r\n", b"\r\n-3\r\n"), id="a chunk of no size"),
    ],
)
def test_anything_else_is_garbled(received: bytes) -> None:
    with pytest.raises(Garbled):
        parse_replies(received, ended=True)
