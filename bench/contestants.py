"""The peers, each a script in `peers/` run in its own environment, and one run of each of them.

A script reads one line of JSON (what to do) from standard input, and prints one (what became of it).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.environments import NotInstalled, python_of
from bench.watch import Watch
from bench.work import MODEL, Measured, Work, measured
from tests.upstream import Upstream

PEERS = Path(__file__).with_name("peers")
RUN_TIMEOUT_S = 420.0


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to do the work without us. `environment` None: this Python."""

    name: str
    script: str
    environment: str | None
    options: dict[str, Any] = field(default_factory=dict)
    is_server: bool = False
    """Whether the script is only the client of a child process; then the child alone is measured."""


OPENAI_THREADS = Peer("openai-python, threads", "openai_threads.py", "openai")
OPENAI_ASYNC = Peer("openai-python, asyncio", "openai_async.py", "openai")
ROUTER = Peer("LiteLLM Router", "litellm_router.py", "litellm-router")
ROUTER_BY_USAGE = Peer(
    "LiteLLM Router, usage-based",
    "litellm_router.py",
    "litellm-router",
    {"routing_strategy": "usage-based-routing-v2"},
)
PROXY = Peer("LiteLLM proxy", "litellm_proxy.py", "litellm-proxy", is_server=True)
BARE = Peer("bare urllib3", "bare_urllib3.py", None)


def run_peer(peer: Peer, work: Work, upstream: Upstream) -> Measured:
    """One run; a peer that can't be installed, crashes or takes too long is a `failure`, not an error."""
    try:
        python = sys.executable if peer.environment is None else str(python_of(peer.environment))
        return _run(peer, python, work, upstream)
    except (NotInstalled, _Crashed) as error:
        return Measured(contestant=peer.name, failure=str(error))


class _Crashed(Exception):
    pass


def _run(peer: Peer, python: str, work: Work, upstream: Upstream) -> Measured:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [python, str(PEERS / peer.script)],
            cwd=PEERS,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            with Watch(process.pid, upstream, without=process.pid if peer.is_server else None) as watch:
                result = _talk(process, _told(peer, work, upstream), errors)
            span_s = (result["started_at"], result["started_at"] + result["wall_s"])
            return measured(peer.name, work, result["answers"], result["errors"], span_s, watch, upstream)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _talk(process: subprocess.Popen[bytes], told: dict[str, Any], errors: IO[bytes]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    took_too_long = False

    def give_up() -> None:
        nonlocal took_too_long
        took_too_long = True
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(RUN_TIMEOUT_S, give_up)
    timer.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()  # it stays open: its end tells the script that we are gone
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if line.endswith(b"\n"):
        result: dict[str, Any] = json.loads(line)
        return result
    if took_too_long:
        raise _Crashed(f"not done within {RUN_TIMEOUT_S:g} s")
    errors.seek(0)
    last = (errors.read().decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
    raise _Crashed(f"crashed: {last[:200]}")


def _told(peer: Peer, work: Work, upstream: Upstream) -> dict[str, Any]:
    keys = [
        {"api_key": key, "requests_per_minute": work.requests_per_minute.get(key)} for key in upstream.keys
    ]
    return {
        "base_url": upstream.base_url,
        "keys": keys,
        "model": MODEL,
        "tasks": dict(work.tasks),
        "instructions": work.instructions,
        "in_flight": work.in_flight,
        "deadline_s": work.deadline_s,
        "sdk_retries": work.sdk_retries,
        "bucket_s": work.bucket_s,
        "options": peer.options,
    }


def _environment() -> dict[str, str]:
    """Clean: nobody's proxies, keys or `.env`; LiteLLM asks nobody outside for its prices."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "LANG": "C.UTF-8",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
