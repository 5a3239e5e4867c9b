"""Replies whose sending may take a while: they hold a place until they are sent, so that slow clients leave threads."""

from contextlib import ExitStack
from typing import Any

from flask import Response, jsonify

from gpt_worker.api.access import holder
from gpt_worker.api.context import service
from gpt_worker.errors import Unavailable

LARGE_REPLY_BYTES = 64 << 10
RETRY_AFTER_S = 5


def hold_place(until_sent: ExitStack) -> None:
    """Raises Unavailable where every place is taken."""
    if not until_sent.enter_context(service().places.hold(holder())):
        raise Unavailable("Too many downloads at once.", RETRY_AFTER_S)


def in_place(body: dict[str, Any]) -> Response:
    """A JSON reply, which holds a place if it is large. Raises Unavailable where there is none."""
    reply = jsonify(body)
    assert reply.content_length is not None  # its body is there as a whole
    if reply.content_length > LARGE_REPLY_BYTES:
        with ExitStack() as until_sent:
            hold_place(until_sent)
            reply.call_on_close(until_sent.pop_all().close)
    return reply
