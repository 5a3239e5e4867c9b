"""A service at work whose database is about to be troubled: what it must say, refuse and keep meanwhile and after."""

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import requests

from tests.service import Env, Service
from tests.upstream import KeyRules, Upstream

KEYS = {f"sk-trouble-{number}": KeyRules(latency_s=0.02) for number in range(2)}


class Stand(Service):
    """A service with a finished job and one that goes on."""

    data: ClassVar = {f"id {number}": f"task {number}" for number in range(400)}
    answers: ClassVar = {id_: f"answer to: {text}" for id_, text in data.items()}

    def __init__(self, tmp_path: Path, upstream: Upstream, env: Env | None = None) -> None:
        super().__init__(tmp_path, {"GPT_THREADS_PER_KEY": "4", **(env or {})}, upstream)
        self.upstream = upstream

    def begin(self) -> None:
        """Start, finish a job, and be at work on another."""
        self.start()
        self.begin_work()

    def begin_work(self) -> None:
        self.earlier = self.submit({"early": "hello"}).json()
        self.job_id = self.submit(self.data, prefer="respond-async").json()["id"]
        self.upstream.wait_for_calls(40)

    def readiness(self) -> tuple[int, str]:
        reply = self.get("/readyz")
        return reply.status_code, reply.json().get("detail", "")

    def wait_unready(self) -> str:
        """The reason, once it is told that it can't work."""
        self.wait_until(lambda: self.readiness()[0] == 503)
        return self.readiness()[1]

    def wait_ready_again(self) -> None:
        self.wait_until(lambda: self.readiness()[0] == 200, 60)

    def assert_ends_as_if_nothing_had_been(self) -> None:
        """By itself: everything that was accepted is answered, and nothing was asked twice."""
        self.wait_ready_again()
        assert self.wait_finished(self.job_id, 60)["status"] == "succeeded"
        job = self.job(self.job_id)
        assert job["results"] == self.answers
        assert job["counts"] == {
            "total": len(self.data),
            "answered": len(self.data),
            "failed": 0,
            "pending": 0,
        }
        assert job["usage"]["requests"] == len(self.data)
        assert self.job(self.earlier["id"]) == self.earlier
        assert asked_otherwise(self.upstream, self.data.values()) == {}

    def assert_ends_well(self) -> None:
        """It stops as asked, and has said what happened without a traceback."""
        assert self.terminate() == 0
        assert "Traceback" not in self.stderr()

    def wait_until_nothing_is_sent(self) -> None:
        """What was on its way when the trouble came has landed, and no more follows."""
        last = -1

        def is_still() -> bool:
            nonlocal last
            self.upstream.wait_until_idle()
            before, last = last, len(self.upstream.calls())
            return before == last

        self.wait_until(is_still)

    def terminate(self, timeout_s: float = 40.0) -> int:
        self._close_session()  # for an open connection it waits two seconds
        return super().terminate(timeout_s)

    def refusal(self, timeout_s: float = 40.0) -> str:
        """What a start says that must be refused: one plain line and exit status 2."""
        said_before = len(self.stderr())
        self.launch()
        assert self.wait_exit(timeout_s) == 2
        said = self.stderr()[said_before:]
        assert "Traceback" not in said
        (line,) = [line for line in said.splitlines() if line.startswith("gpt-worker: ")]
        return line


def asked_otherwise(upstream: Upstream, texts: Any, times: int = 1) -> dict[str, int]:
    """Those of the prompts that were not asked so many times, and how often each was."""
    asked = Counter(call.user_text for call in upstream.calls())
    return {text: asked[text] for text in texts if asked[text] != times}


def assert_refused(reply: requests.Response) -> None:
    assert reply.status_code in (503, 507), reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.status_code == 507 or int(reply.headers["Retry-After"]) > 0
