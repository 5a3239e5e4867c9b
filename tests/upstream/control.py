"""The control channel of the fake OpenAI: `POST /_control/<verb>` with JSON, for the `Upstream` handle only.

It changes rules and faults, reads counters and calls, and holds a `wait` until what it waits for is there.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.upstream.api import FakeOpenAI
from tests.upstream.connection import Connection
from tests.upstream.faults import Fault
from tests.upstream.rules import KeyRules
from tests.upstream.wire import Reply, Request

PREFIX = "/_control/"


class Control:
    """Verbs by name; each takes the JSON of its request and gives the JSON of its reply."""

    def __init__(self, openai: FakeOpenAI, loop: asyncio.AbstractEventLoop, hanging: set[Connection]) -> None:
        self._openai = openai
        self._loop = loop
        self._hanging = hanging
        self._waiters: list[tuple[Callable[[], bool], asyncio.TimerHandle, Connection]] = []
        self._verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "set_key": self._set_key,
            "add_fault": self._add_fault,
            "clear_faults": lambda _: openai.faults.clear(),
            "counters": lambda _: openai.log.counters(),
            "calls": lambda _: openai.log.calls(),
            "release": self._release,
            "reset": lambda _: openai.reset(),
        }

    def handle(self, request: Request, connection: Connection) -> None:
        verb = request.path.removeprefix(PREFIX)
        fields = json.loads(request.body or b"{}")
        if verb == "wait":
            self._wait(fields, connection)
        elif verb in self._verbs:
            connection.send(_json(self._verbs[verb](fields)))
        else:
            connection.send(Reply(404, b"{}"))

    def tell_waiters(self) -> None:
        """To be called whenever a call begins or ends."""
        if not self._waiters:
            return
        waiting = []
        for waiter in self._waiters:
            is_there, timer, connection = waiter
            if is_there():
                timer.cancel()
                connection.send(_json(True))
            else:
                waiting.append(waiter)
        self._waiters = waiting

    def _wait(self, fields: dict[str, Any], connection: Connection) -> None:
        log = self._openai.log
        awaited: dict[str, Callable[[], bool]] = {
            "calls": lambda: log.arrived >= fields["count"],
            "in_flight": lambda: log.in_flight >= fields["count"],
            "idle": lambda: log.in_flight == 0,
        }
        is_there = awaited[fields["awaited"]]
        timer = self._loop.call_later(fields["timeout_s"], self._give_up, connection)
        self._waiters.append((is_there, timer, connection))
        self.tell_waiters()

    def _give_up(self, connection: Connection) -> None:
        self._waiters = [waiter for waiter in self._waiters if waiter[2] is not connection]
        connection.send(_json(False))

    def _set_key(self, fields: dict[str, Any]) -> None:
        self._openai.set_key(fields["key"], KeyRules.from_json(fields["rules"]))

    def _add_fault(self, fields: dict[str, Any]) -> None:
        self._openai.faults.add(Fault.from_json(fields))

    def _release(self, _: dict[str, Any]) -> int:
        released = list(self._hanging)
        for connection in released:
            connection.release()
        return len(released)


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode())
