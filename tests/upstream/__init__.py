"""A fake OpenAI on a real loopback socket, in a process of its own, so benchmarks measure the service alone.

`Upstream` starts, steers and reads it. What it can be told stands in `rules` and `faults`.
"""

import http.client
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.upstream.calls import Call, KeyCounters
from tests.upstream.faults import Fault, FaultKind
from tests.upstream.rules import Accepts, KeyRules, ServerRules, check_groups, set_rules

__all__ = ["Accepts", "Call", "Fault", "FaultKind", "KeyCounters", "KeyRules", "ServerRules", "Upstream"]

_ROOT = Path(__file__).parents[2]
_KEYS = ("sk-fake-key-0", "sk-fake-key-1")


class Upstream:
    """The handle of one fake OpenAI. `server` are the fields of `ServerRules`.

    Usable as a context manager, or by `start` and `stop`; started again it has the same address and no past.
    Calls to it may come from several threads.
    """

    def __init__(self, keys: Mapping[str, KeyRules] | None = None, *, port: int = 0, **server: Any) -> None:
        self._keys = dict(keys) if keys is not None else {key: KeyRules() for key in _KEYS}
        check_groups(self._keys)
        self._server = ServerRules(**server)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def keys(self) -> list[str]:
        """The API keys it knows, in the order they were given."""
        return list(self._keys)

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Returns when it listens."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.upstream"], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._process = process
        told = {
            "keys": {key: rules.to_json() for key, rules in self._keys.items()},
            "server": self._server.to_json(),
            "port": self._port,
        }
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        port = process.stdout.readline()
        if not port:
            self.stop()
            raise RuntimeError("the fake OpenAI did not start; its standard error says why")
        self._port = int(port)

    def stop(self) -> None:
        """Ends it at once, with every connection to it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def set_key(self, key: str, **changes: Any) -> None:
        """Changes the rules of a key, or adds one; `changes` are fields of `KeyRules`.

        What was used of a limit stays used. Shared limits change for every key that shares them.
        """
        rules = replace(self._keys.get(key, KeyRules()), **changes)
        set_rules(self._keys, key, rules)
        self._ask("set_key", {"key": key, "rules": rules.to_json()})

    def add_fault(self, fault: Fault) -> None:
        """Queues a fault; of those that match a call, the oldest comes first."""
        self._ask("add_fault", fault.to_json())

    def clear_faults(self) -> None:
        self._ask("clear_faults")

    def release(self) -> int:
        """Lets every hanging call have its reply now; says how many there were."""
        return int(self._ask("release"))

    def reset(self) -> None:
        """Forgets calls, counters and faults, fills every bucket. The rules stay."""
        self._ask("reset")

    def counters(self) -> dict[str, KeyCounters]:
        """The totals of every key that was used or set."""
        counters: dict[str, KeyCounters] = self._ask("counters")
        for of_key in counters.values():
            of_key["by_status"] = {int(status): count for status, count in of_key["by_status"].items()}
        return counters

    def calls(self) -> list[Call]:
        """The log of chat calls, oldest first."""
        return [Call(**call) for call in self._ask("calls")]

    def wait_for_calls(self, count: int, timeout_s: float = 10.0) -> list[Call]:
        """The log, once so many chat calls have arrived. Raises TimeoutError."""
        self._wait("calls", count, timeout_s)
        return self.calls()

    def wait_for_in_flight(self, count: int, timeout_s: float = 10.0) -> None:
        """Returns once so many calls are without their reply at one time. Raises TimeoutError."""
        self._wait("in_flight", count, timeout_s)

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Returns once no call is in flight. Raises TimeoutError."""
        self._wait("idle", 0, timeout_s)

    def _wait(self, awaited: str, count: int, timeout_s: float) -> None:
        if not self._ask("wait", {"awaited": awaited, "count": count, "timeout_s": timeout_s}, timeout_s):
            raise TimeoutError(f"no {awaited} {count} within {timeout_s} s: {self.counters()}")

    def _ask(self, verb: str, fields: dict[str, Any] | None = None, extra_s: float = 0.0) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30.0 + extra_s)
        try:
            connection.request("POST", f"/_control/{verb}", json.dumps(fields or {}).encode())
            reply = connection.getresponse()
            text = reply.read()
            if reply.status != 200:
                raise RuntimeError(f"{verb}: {reply.status}")
            return json.loads(text)
        finally:
            connection.close()
