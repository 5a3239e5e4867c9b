"""The README's five minutes, word by word: `make run` in a clone with no key, then its curl lines."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.service import free_port

ROOT = Path(__file__).parents[2]
READY_S = 60
DELIVERED_S = 60


@dataclass(frozen=True)
class Newcomer:
    """Somebody with a clone of the repository, a running service and the README."""

    clone: Path
    port: int

    def run(self, command: str, **variables: str) -> str:
        """What a line of the README prints; the port is the only thing that differs."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("localhost:3333", f"localhost:{self.port}")],
            cwd=self.clone,
            env={"PATH": os.environ["PATH"], "HOME": str(self.clone), **variables},
            capture_output=True,
            text=True,
            timeout=110,
            check=True,
        )
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    clone = tmp_path_factory.mktemp("clone")
    for name in subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    assert Path(sys.prefix) == ROOT / ".venv", "run the tests with `make test`: they go through its .venv"
    (clone / ".venv").symlink_to(ROOT / ".venv")  # what is installed there is what `make run` would install
    port = free_port()
    log = (clone / "log").open("wb")
    process = subprocess.Popen(
        ["make", "run"],
        cwd=clone,
        env={"PATH": os.environ["PATH"], "HOME": str(clone), "PORT": str(port)},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _await_ready(port, process, clone / "log")
        yield Newcomer(clone, port)
    finally:
        log.close()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(40)


def _await_ready(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5).ok:
                return
        except requests.ConnectionError:
            breathe()
    pytest.fail(f"not ready in time: {log.read_text()}")


def breathe() -> None:
    """A breath between two looks at something that only can be polled."""
    time.sleep(0.05)


def _blocks() -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.split("## Five minutes\n")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def test_readme_lines_give_real_answers_inline_by_webhook_and_into_a_file(newcomer: Newcomer) -> None:
    run, register, login, inline, webhook, deliveries, cli_login, cli_submit = _blocks()
    assert run.strip() == "make run"

    account = json.loads(newcomer.run(register))
    token = newcomer.run(login + 'echo "$TOKEN"').strip()
    job = json.loads(newcomer.run(inline, TOKEN=token))
    accepted = json.loads(newcomer.run(webhook, TOKEN=token))
    delivery = _await_delivered(newcomer, deliveries, token)
    newcomer.run(cli_login)
    newcomer.run(cli_submit)
    answers = list(
        csv.DictReader(io.StringIO((newcomer.clone / "answers.csv").read_text("utf-8"), newline=""))
    )

    assert account["user"]["role"] == "admin"
    assert job["status"] == "succeeded"
    assert job["model"] == "smollm2-135m-instruct"
    assert list(job["results"]) == ["capital", "greeting"]
    assert all(answer.strip() for answer in job["results"].values())
    assert accepted["delivery"] == "webhook"
    assert delivery["job_id"] == accepted["id"]
    assert delivery["attempts"][0]["status_code"] == 200
    assert len(answers) == 20
    assert all(answer["result"].strip() for answer in answers)


def _await_delivered(newcomer: Newcomer, command: str, token: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + DELIVERED_S
    while time.monotonic() < deadline_s:
        found = json.loads(newcomer.run(command, TOKEN=token))["data"]
        if found and found[0]["status"] == "delivered":
            return dict(found[0])
        breathe()
    pytest.fail("the webhook did not arrive")


def test_make_run_wrote_a_private_env_with_a_random_key(newcomer: Newcomer) -> None:
    env = newcomer.clone / ".env"

    assert re.search(r"^APP_KEY=\S{32,}$", env.read_text(), re.MULTILINE)
    assert env.stat().st_mode & 0o777 == 0o600


def test_the_log_says_in_one_plain_line_that_the_embedded_model_answers(newcomer: Newcomer) -> None:
    lines = (newcomer.clone / "log").read_text().splitlines()

    assert any("the embedded model smollm2-135m-instruct" in line and "no GPT key" in line for line in lines)
