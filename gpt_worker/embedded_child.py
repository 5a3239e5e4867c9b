"""The embedded model's own process: llama.cpp's server, OpenAI-compatible, on a free port of 127.0.0.1.

`embedded.py` starts it by file name, so that it loads this file and xllamacpp, and nothing of the service. Its
settings come as one JSON line on standard input (a command line would show the keys to every user). It replies
with one JSON line, `{"base_url": …}`, and lives until its standard input ends, which is as long as its parent.
"""

import http.client
import importlib
import json
import os
import signal
import sys
import time
from typing import Any
from urllib.parse import urlsplit

EXIT_NOT_HEALTHY = 1
EXIT_NOT_IMPORTABLE = 3
EXIT_MODEL_NOT_LOADED = 4

SLOTS = 4
TOKENS_PER_SLOT = 2048
MAX_ANSWER_TOKENS = 512
HTTP_THREADS = SLOTS + 4
HEALTH_TIMEOUT_S = 60.0
HEALTH_POLL_S = 0.05


def main() -> int:
    """Serve until standard input ends; the exit status says what went wrong."""
    # A Ctrl-C, and many service managers, signal every process of the service, but the calls in flight still
    # have their time then. What stops this process is the end of its standard input, or SIGKILL.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    first_line = sys.stdin.buffer.readline()
    if not first_line:
        return 0
    reply_fd = _keep_stdout_for_the_reply()
    try:
        xllamacpp: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_NOT_IMPORTABLE
    try:
        server = xllamacpp.Server(_params(xllamacpp, json.loads(first_line)))
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_MODEL_NOT_LOADED
    address: str = server.listening_address
    if not _becomes_healthy(address):
        return EXIT_NOT_HEALTHY
    try:
        os.write(reply_fd, json.dumps({"base_url": f"{address}/v1"}).encode() + b"\n")
    except BrokenPipeError:
        os._exit(0)
    # No thread watches from the beginning: the Server's constructor holds the GIL while it loads the model,
    # so the parent's death cannot be noticed before now.
    sys.stdin.buffer.read()
    # Not `return`: the Server's destructor waits for calls whose readers are gone.
    os._exit(0)


def _keep_stdout_for_the_reply() -> int:
    """A private copy of standard output; what the library prints there goes to standard error instead."""
    reply_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return reply_fd


def _params(xllamacpp: Any, settings: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings["model_path"]
    params.model_alias = {settings["model_name"]}
    params.api_keys = settings["keys"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.offline = True
    params.fit_params = False

    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * TOKENS_PER_SLOT
    params.n_predict = MAX_ANSWER_TOKENS
    params.cache_ram_mib = 0
    if settings["packaged"]:
        # 90 MB less at the same speed. Not for every model: some have head sizes that its blocks do not fit.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0

    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
    # The default grows with the machine's cores, and this is what it is on a small one.
    params.n_threads_http = HTTP_THREADS

    params.ui = False
    params.endpoint_slots = False
    params.cors_origins = ""
    params.cors_credentials = False
    # Errors only; none of them quotes a prompt.
    params.verbosity = 1
    return params


def _threads() -> int:
    """Half the cores that this process may use: with all of them the speed collapses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


def _becomes_healthy(address: str) -> bool:
    give_up_at_s = time.monotonic() + HEALTH_TIMEOUT_S
    while time.monotonic() < give_up_at_s:
        if _is_healthy(address):
            return True
        time.sleep(HEALTH_POLL_S)
    return False


def _is_healthy(address: str) -> bool:
    # http.client, because urllib would send this through the environment's proxy.
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
