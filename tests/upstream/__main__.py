"""The child process of `Upstream`: reads one line of JSON, prints its port, then serves.

It ends when its standard input does, so it never outlives its parent, however that one dies.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading

from tests.upstream.rules import KeyRules, ServerRules
from tests.upstream.server import serve


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


def _tell_port(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keys = {key: KeyRules.from_json(rules) for key, rules in told["keys"].items()}
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    asyncio.run(serve(ServerRules.from_json(told["server"]), keys, told["port"], _tell_port))


if __name__ == "__main__":
    main()
