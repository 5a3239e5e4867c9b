"""The LiteLLM proxy as a child process, asked by openai-python in a thread pool."""

import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import litellm_settings
import openai
import peer

START_TIMEOUT_S = 120.0
CLIENT_TIMEOUT_S = 120.0
CLIENT_RETRIES = 2
MASTER_KEY = "sk-bench-" + secrets.token_hex(32)


def start_proxy(told: peer.Told) -> str:
    """Its base URL, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "model_list": litellm_settings.deployments(told),
        "router_settings": litellm_settings.router_settings(told),
        "general_settings": {"master_key": MASTER_KEY},
        "litellm_settings": {"telemetry": False, "request_timeout": told.deadline_s},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(config, file)  # JSON is YAML
    command = [str(Path(sys.executable).with_name("litellm")), "--config", file.name]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=2,
    )
    url = f"http://127.0.0.1:{port}"
    wait_ready(process, url)
    Path(file.name).unlink()
    return url


def wait_ready(process: subprocess.Popen, url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/health/readiness", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"the proxy did not get ready (exit status {process.poll()})")


def work(told: peer.Told) -> peer.Done:
    url = start_proxy(told)
    client = openai.OpenAI(
        api_key=MASTER_KEY, base_url=url, max_retries=CLIENT_RETRIES, timeout=CLIENT_TIMEOUT_S
    )
    completions = client.chat.completions
    done = peer.Done()

    def ask(task_id: str, text: str) -> None:
        for _ in range(peer.TRIES):
            try:
                reply = completions.create(model=told.model, messages=told.messages(text))
                done.answers[task_id] = reply.choices[0].message.content
                return
            except openai.OpenAIError as error:
                done.errors[task_id] = type(error).__name__

    # What it imports on the first call is not its pace; this call goes nowhere.
    completions.create(
        model=told.model, messages=told.messages("warm up"), extra_body={"mock_response": "ready"}
    )
    with ThreadPoolExecutor(told.in_flight) as pool:
        done.begin()
        list(pool.map(ask, told.tasks.keys(), told.tasks.values()))
        done.end()
    return done


peer.main(work)
