"""The embedded model for real: child process, llama.cpp, packaged weights. What it answers is never asserted."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gpt_worker.embedded import MODEL_NAME, EmbeddedModel, EmbeddedModelMissing, check_installed

READY_WITHIN_S = 120.0
KEYS = ("local-one", "local-two")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

PARENT = """
import sys
from gpt_worker.embedded import EmbeddedModel
say = lambda word: print(word, flush=True)
EmbeddedModel(model_path=None, keys=("local",), on_ready=say, on_down=say).start()
sys.stdin.read()
"""


def chat(base_url: str, key: str, **body: Any) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "Answer in English."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        data=json.dumps({"model": MODEL_NAME, "temperature": 0, "messages": messages, **body}).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with OPENER.open(request, timeout=READY_WITHIN_S) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


class Running:
    """A started model and what it called back."""

    def __init__(self) -> None:
        self.ready: queue.Queue[str] = queue.Queue()
        self.down: queue.Queue[str] = queue.Queue()
        self.model = EmbeddedModel(model_path=None, keys=KEYS, on_ready=self.ready.put, on_down=self.down.put)
        self.model.start()
        self.base_url = self.ready.get(timeout=READY_WITHIN_S)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        check_installed(None)
    except EmbeddedModelMissing as missing:
        pytest.fail(f"{missing}. For the tests, `make test` installs requirements-embedded.txt")


@pytest.fixture(scope="module")
def running(installed: None) -> Iterator[Running]:
    running = Running()
    yield running
    running.model.stop()


def test_both_keys_get_an_answer_with_its_usage(running: Running) -> None:
    for key in KEYS:
        answer = chat(running.base_url, key, max_tokens=8)

        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["usage"]["prompt_tokens"] > 0
        assert 0 < answer["usage"]["completion_tokens"] <= 8
        assert answer["model"] == MODEL_NAME


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit_are_heeded(running: Running, limit: str) -> None:
    answer = chat(running.base_url, KEYS[0], **{limit: 2})

    assert answer["usage"]["completion_tokens"] <= 2


def test_json_schema_forces_the_form_of_the_answer(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"known": {"type": "boolean"}},
        "required": ["known"],
        "additionalProperties": False,
    }
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "known", "strict": True, "schema": schema},
    }

    answer = chat(running.base_url, KEYS[0], max_tokens=64, response_format=response_format)

    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["known"], bool)


def test_caller_without_a_key_of_ours_is_refused(running: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(running.base_url, "another-key")

    with refused.value as reply:
        assert reply.code == 401


def test_prompt_that_is_too_long_is_a_400_with_its_reason(running: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(running.base_url, KEYS[0], messages=[{"role": "user", "content": "word " * 5000}])

    with refused.value as reply:
        assert reply.code == 400
        assert json.load(reply)["error"]["type"] == "exceed_context_size_error"


def test_model_listens_on_loopback_only(running: Running) -> None:
    address = urlsplit(running.base_url)

    assert address.hostname == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", address.port), timeout=5.0)


def test_signals_meant_for_the_service_do_not_end_the_child(running: Running) -> None:
    pid = running.model.pid
    assert pid is not None

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)

    assert chat(running.base_url, KEYS[0], max_tokens=1)["usage"]["completion_tokens"] == 1
    assert running.down.empty()


def test_killed_child_is_reported_and_replaced(running: Running) -> None:
    pid = running.model.pid
    assert pid is not None

    os.kill(pid, signal.SIGKILL)

    assert "killed" in running.down.get(timeout=READY_WITHIN_S)
    running.base_url = running.ready.get(timeout=READY_WITHIN_S)
    assert running.model.pid != pid
    assert chat(running.base_url, KEYS[1], max_tokens=4)["choices"][0]["message"]["content"].strip()


def test_damaged_model_is_reported_with_what_to_do(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(range(256)))
    down: queue.Queue[str] = queue.Queue()
    model = EmbeddedModel(model_path=damaged, keys=KEYS, on_ready=down.put, on_down=down.put)

    model.start()

    assert "MODEL_PATH" in down.get(timeout=READY_WITHIN_S)
    model.stop()


def test_child_dies_with_a_parent_that_was_killed() -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as parent:
        assert parent.stdout is not None
        address = urlsplit(parent.stdout.readline().decode().strip())
        assert address.port is not None

        parent.kill()

        assert stops_listening(address.port, within_s=10.0)


def stops_listening(port: int, *, within_s: float) -> bool:
    give_up_at_s = time.monotonic() + within_s
    while time.monotonic() < give_up_at_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            return True
        time.sleep(0.02)
    return False
