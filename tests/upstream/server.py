"""The fake OpenAI's routes: each request to the API, or to the control channel. Runs in the child process."""

import asyncio
from collections.abc import Callable

from tests.upstream.api import FakeOpenAI
from tests.upstream.calls import OpenCall
from tests.upstream.connection import Connection
from tests.upstream.control import PREFIX, Control
from tests.upstream.errors import Refused
from tests.upstream.rules import KeyRules, ServerRules
from tests.upstream.wire import Reply, Request

CHAT = "/v1/chat/completions"
_NOT_FOUND = Refused(404, "Unknown request URL.", "invalid_request_error", "unknown_url").body()


class Server:
    """All connections share one `FakeOpenAI`."""

    def __init__(
        self, rules: ServerRules, keys: dict[str, KeyRules], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._loop = loop
        self._hanging: set[Connection] = set()
        self._openai = FakeOpenAI(rules, keys)
        self._control = Control(self._openai, loop, self._hanging)

    def connect(self) -> Connection:
        return Connection(self.handle, self._loop, self._hanging)

    def handle(self, request: Request, connection: Connection) -> None:
        if request.path == CHAT and request.method == "POST":
            self._chat(request, connection)
        elif request.path.startswith(PREFIX):
            self._control.handle(request, connection)
        elif request.path.startswith("/v1/models") and request.method == "GET":
            connection.send(self._openai.models(request))
        else:
            connection.send(Reply(404, _NOT_FOUND))

    def _chat(self, request: Request, connection: Connection) -> None:
        call = self._openai.log.begin(self._openai.key_in_log(request), request.headers, request.body)
        verdict = self._openai.chat(request, call)
        connection.send(verdict.reply, verdict.fault, verdict.delay_s, self._ended(call))
        self._control.tell_waiters()

    def _ended(self, call: OpenCall) -> Callable[[int | None, bool], None]:
        def ended(status: int | None, left: bool) -> None:
            self._openai.log.end(call, status, left=left)
            self._control.tell_waiters()

        return ended


async def serve(
    rules: ServerRules, keys: dict[str, KeyRules], port: int, on_listening: Callable[[int], None]
) -> None:
    """Listens on 127.0.0.1 for ever; `on_listening` is told the port."""
    loop = asyncio.get_running_loop()
    server = Server(rules, keys, loop)
    listener = await loop.create_server(server.connect, "127.0.0.1", port, backlog=2048)
    on_listening(listener.sockets[0].getsockname()[1])
    await listener.serve_forever()
