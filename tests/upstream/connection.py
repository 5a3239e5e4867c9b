"""One client's connection: reads requests, sends replies, and carries out the faults of a reply's delivery.

It decides nothing: `server` answers each request by calling `send` once, then the next request is read.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator

from tests.upstream.faults import Fault, FaultKind
from tests.upstream.wire import MalformedRequest, Reply, Request, gzip_bomb, huge, read_head

Handler = Callable[[Request, "Connection"], None]
Ended = Callable[[int | None, bool], None]
"""Called once a reply: the status that went out whole or None, and whether the client has left."""


def _ignore(status: int | None, left: bool) -> None:
    pass


class Connection(asyncio.Protocol):
    """Serves one request after the other; a pipelined one waits for the reply before it."""

    def __init__(self, handle: Handler, loop: asyncio.AbstractEventLoop, hanging: set["Connection"]) -> None:
        self._handle = handle
        self._loop = loop
        self._hanging = hanging
        self._buffer = bytearray()
        self._request: Request | None = None
        self._busy = False
        self._reading = False
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._ended: Ended | None = None
        self._reply: Reply
        self._fault: Fault | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._piece_every_s = 0.0
        self._paused = False
        self._pumping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._busy = True
        self._end(None, left=True)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._read()

    def _read(self) -> None:
        if self._reading:
            return
        self._reading = True
        try:
            while not self._busy and (self._buffer or self._request is not None):
                if self._request is None:
                    self._request = read_head(self._buffer)
                request = self._request
                if request is None or len(self._buffer) < request.length:
                    return
                request.body = bytes(self._buffer[: request.length])
                del self._buffer[: request.length]
                self._busy = True
                self._handle(request, self)
        except MalformedRequest:
            self._busy = True
            self._transport.write(Reply(400, b"{}", {"connection": "close"}).head(2) + b"{}")
            self._transport.close()
        finally:
            self._reading = False

    def send(
        self, reply: Reply, fault: Fault | None = None, delay_s: float = 0.0, ended: Ended = _ignore
    ) -> None:
        """Answers the request that is being handled, after `delay_s`, in the way that `fault` says."""
        self._reply, self._fault, self._ended = reply, fault, ended
        if fault is not None and fault.kind is FaultKind.HANG:
            delay_s = 0.0  # it hangs from now on: a release that came within the delay would pass it by
        if delay_s > 0:
            self._timer = self._loop.call_later(delay_s, self._deliver)
        else:
            self._deliver()

    def release(self) -> None:
        """Ends a hang: the ordinary reply goes out."""
        self._stop_waiting()
        self._send_whole()

    def _deliver(self) -> None:
        reply, fault = self._reply, self._fault
        match fault.kind if fault is not None else None:
            case FaultKind.CLOSE:
                self._end(None)
                self._transport.close()
            case FaultKind.RESET:
                whole = reply.head(len(reply.body)) + reply.body
                self._transport.write(whole[: len(whole) // 2])
                self._reset()
            case FaultKind.CUT_BODY:
                self._transport.write(reply.head(len(reply.body)) + reply.body[: len(reply.body) // 2])
                self._end(None)
                self._transport.close()
            case FaultKind.HANG:
                assert fault is not None
                self._hanging.add(self)
                if fault.seconds is not None:
                    self._timer = self._loop.call_later(fault.seconds, self.release)
            case FaultKind.DRIP_HEADERS:
                head = reply.head(len(reply.body))
                self._send_pieces(b"", iter([*_bytes_of(head), reply.body]))
            case FaultKind.DRIP_BODY:
                self._send_pieces(reply.head(len(reply.body)), _bytes_of(reply.body))
            case FaultKind.HUGE_BODY:
                assert fault is not None
                length, pieces = huge(reply.body, fault.size_bytes)
                self._send_pieces(reply.head(length), pieces)
            case FaultKind.GZIP_BOMB:
                assert fault is not None
                reply.body = gzip_bomb(reply.body, fault.size_bytes)
                reply.headers["content-encoding"] = "gzip"
                self._send_whole()
            case _:
                self._send_whole()

    def _send_whole(self) -> None:
        reply = self._reply
        self._transport.write(reply.head(len(reply.body)) + reply.body)
        self._finish()

    def _send_pieces(self, head: bytes, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        drips = self._fault is not None and self._fault.kind in (FaultKind.DRIP_BODY, FaultKind.DRIP_HEADERS)
        self._piece_every_s = (self._fault.seconds or 0.0) if drips and self._fault is not None else 0.0
        self._pumping = True
        self._transport.write(head)
        self._pump()

    def _pump(self) -> None:
        while not self._paused:
            piece = next(self._pieces, None)
            if piece is None:
                self._pumping = False
                self._finish()
                return
            self._transport.write(piece)
            if self._piece_every_s > 0:
                self._timer = self._loop.call_later(self._piece_every_s, self._pump)
                return

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._pumping and not self._piece_every_s:
            self._pump()

    def _reset(self) -> None:
        self._end(None)
        client: socket.socket = self._transport.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _finish(self) -> None:
        self._end(self._reply.status)
        if self._request is not None and not self._request.keep_alive:
            self._transport.close()
            return
        self._request = None
        self._busy = False
        self._timer = None
        if self._buffer:
            self._read()

    def _stop_waiting(self) -> None:
        self._pumping = False
        self._hanging.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, status: int | None, *, left: bool = False) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(status, left)


def _bytes_of(text: bytes) -> Iterator[bytes]:
    return (text[place : place + 1] for place in range(len(text)))
