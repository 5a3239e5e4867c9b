"""The embedded model's supervisor, against small stub children in place of the real one."""

import json
import logging
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt_worker import embedded
from gpt_worker.embedded import (
    CHILD_COMMAND,
    EmbeddedModel,
    EmbeddedModelMissing,
    Retry,
    check_installed,
    explain_exit,
    find_packaged_model,
    model_name,
    next_restart_wait_s,
    read_base_url,
)
from gpt_worker.embedded_child import EXIT_MODEL_NOT_LOADED, EXIT_NOT_IMPORTABLE

LONG_S = 20.0
BASE_URL = "http://127.0.0.1:40123/v1"
READ_SETTINGS = "import json, os, signal, sys\nsettings = json.loads(sys.stdin.readline())\n"
READY = f"print(json.dumps({{'base_url': '{BASE_URL}'}}), flush=True)\n"
SERVE = READ_SETTINGS + READY + "sys.stdin.read()\n"


class HeldWait:
    """A wait between two starts that lasts until the test lets it go on."""

    def __init__(self) -> None:
        self.asked_s: queue.Queue[float] = queue.Queue()
        self._go_on: queue.Queue[None] = queue.Queue()
        self._closed = threading.Event()

    def __call__(self, stopping: threading.Event, wait_s: float) -> bool:
        self.asked_s.put(wait_s)
        if not self._closed.is_set():
            self._go_on.get()
        return stopping.is_set() or self._closed.is_set()

    def let_go(self) -> None:
        self._go_on.put(None)

    def close(self) -> None:
        self._closed.set()
        self.let_go()


class Bench:
    """One EmbeddedModel with what it called back."""

    def __init__(self, folder: Path) -> None:
        self.ready: queue.Queue[str] = queue.Queue()
        self.down: queue.Queue[str] = queue.Queue()
        self.wait = HeldWait()
        self.model_path = folder / "own.gguf"
        self._script = folder / "child.py"
        self._models: list[EmbeddedModel] = []

    def start(
        self,
        script: str,
        *,
        on_ready: Callable[[str], None] | None = None,
        command: tuple[str, ...] | None = None,
        start_timeout_s: float = LONG_S,
        stop_timeout_s: float = LONG_S,
    ) -> EmbeddedModel:
        self._script.write_text(script)
        model = EmbeddedModel(
            model_path=self.model_path,
            keys=("local-one", "local-two"),
            on_ready=on_ready or self.ready.put,
            on_down=self.down.put,
            command=command or (sys.executable, "-S", str(self._script)),
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
            wait=self.wait,
        )
        self._models.append(model)
        model.start()
        return model

    def close(self) -> None:
        self.wait.close()
        for model in self._models:
            model.stop()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


# The decisions


@pytest.mark.parametrize(
    ("returncode", "retry", "says"),
    [
        (-signal.SIGILL, Retry.NEVER, "AVX2"),
        (EXIT_NOT_IMPORTABLE, Retry.NEVER, "make run"),
        (EXIT_MODEL_NOT_LOADED, Retry.SLOWLY, "MODEL_PATH"),
        (-signal.SIGKILL, Retry.SOON, "memory"),
        (-signal.SIGSEGV, Retry.SOON, "SIGSEGV"),
        (-signal.SIGABRT, Retry.SOON, "SIGABRT"),
        (-250, Retry.SOON, "signal 250"),
        (1, Retry.SOON, "exit status 1"),
        (0, Retry.SOON, "exit status 0"),
    ],
)
def test_exit_is_explained_in_one_sentence(returncode: int, retry: Retry, says: str) -> None:
    verdict = explain_exit(returncode)

    assert verdict.retry is retry
    assert says in verdict.sentence
    assert "\n" not in verdict.sentence


@pytest.mark.parametrize(
    ("retry", "previous_wait_s", "lived_s", "wait_s"),
    [
        (Retry.SOON, 0.0, 0.0, 1.0),
        (Retry.SOON, 1.0, 0.0, 2.0),
        (Retry.SOON, 2.0, 59.9, 4.0),
        (Retry.SOON, 32.0, 0.0, 60.0),
        (Retry.SOON, 60.0, 0.0, 60.0),
        (Retry.SOON, 60.0, 60.0, 1.0),
        (Retry.SLOWLY, 0.0, 0.0, 60.0),
        (Retry.NEVER, 0.0, 600.0, None),
    ],
)
def test_wait_doubles_to_a_minute_and_is_forgotten_after_a_good_life(
    retry: Retry, previous_wait_s: float, lived_s: float, wait_s: float | None
) -> None:
    assert next_restart_wait_s(retry, previous_wait_s, lived_s) == wait_s


@pytest.mark.parametrize(
    ("line", "base_url"),
    [
        (b'{"base_url": "http://127.0.0.1:1/v1"}\n', "http://127.0.0.1:1/v1"),
        (b'{"base_url": 7}\n', None),
        (b"{}\n", None),
        (b"[]\n", None),
        (b"loading...\n", None),
        (b"\xff\xfe\n", None),
        (b"\n", None),
    ],
)
def test_only_a_json_line_with_a_base_url_is_the_reply(line: bytes, base_url: str | None) -> None:
    assert read_base_url(line) == base_url


def test_model_is_named_after_its_file() -> None:
    assert model_name(None) == "smollm2-135m-instruct"
    assert model_name(Path("/models/Qwen3-0.6B.Q8_0.gguf")) == "Qwen3-0.6B.Q8_0"


# What is installed


def install(folder: Path, *, weights: bool = True) -> None:
    """A distribution as an installer leaves it, with a model of four bytes."""
    information = folder / "tiny_model-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1\n")
    (information / "RECORD").write_text("tiny_model/__init__.py,,\ntiny_model/tiny.Q4.gguf,,\n")
    (folder / "tiny_model").mkdir()
    (folder / "tiny_model" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    if weights:
        (folder / "tiny_model" / "tiny.Q4.gguf").write_bytes(b"GGUF")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path; the runtime counts as installed, the model is what `install` puts in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(embedded, "RUNTIME_PACKAGE", "json")
    monkeypatch.setattr(embedded, "MODEL_DISTRIBUTION", "tiny-model")
    return folder


def test_packaged_model_is_found_without_importing_its_package(site: Path) -> None:
    install(site)

    check_installed(None)

    assert find_packaged_model() == site / "tiny_model" / "tiny.Q4.gguf"


def test_missing_model_package_says_what_to_run(site: Path) -> None:
    with pytest.raises(EmbeddedModelMissing, match="make run"):
        check_installed(None)


def test_model_package_without_its_weights_is_missing(site: Path) -> None:
    install(site, weights=False)

    with pytest.raises(EmbeddedModelMissing, match="make run"):
        check_installed(None)


def test_missing_runtime_says_what_to_run(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site)
    monkeypatch.setattr(embedded, "RUNTIME_PACKAGE", "no_such_runtime")

    with pytest.raises(EmbeddedModelMissing, match="make run"):
        check_installed(None)


def test_own_model_needs_no_packaged_one(site: Path) -> None:
    own = site / "own.gguf"
    own.write_bytes(b"GGUF\x03\x00\x00\x00")

    check_installed(own)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"hello", "not a GGUF"), (b"GG", "not a GGUF")]
)
def test_own_model_that_is_no_gguf_file_is_refused(site: Path, content: bytes | None, says: str) -> None:
    own = site / "own.gguf"
    if content is not None:
        own.write_bytes(content)

    with pytest.raises(EmbeddedModelMissing, match=f"MODEL_PATH .*{says}"):
        check_installed(own)


def test_own_model_that_is_a_folder_is_refused(site: Path) -> None:
    with pytest.raises(EmbeddedModelMissing, match="MODEL_PATH"):
        check_installed(site)


# The child, without its packages


def run_child(line: bytes) -> subprocess.CompletedProcess[bytes]:
    without_packages = (CHILD_COMMAND[0], "-S", "-E", *CHILD_COMMAND[1:])
    return subprocess.run(without_packages, input=line, capture_output=True, timeout=LONG_S, check=False)


def test_child_without_the_runtime_says_so_by_its_exit_status() -> None:
    child = run_child(b"{}\n")

    assert child.returncode == EXIT_NOT_IMPORTABLE
    assert child.stdout == b""
    assert b"xllamacpp" in child.stderr


def test_child_whose_parent_is_gone_ends_without_a_word() -> None:
    child = run_child(b"")

    assert (child.returncode, child.stdout, child.stderr) == (0, b"", b"")


# The supervisor


def test_child_gets_its_settings_on_standard_input_only(bench: Bench, tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    write_seen = f"open({str(seen)!r}, 'w').write(json.dumps([sys.argv[1:], settings]))\n"

    bench.start(READ_SETTINGS + write_seen + READY + "sys.stdin.read()\n")

    assert bench.ready.get(timeout=LONG_S) == BASE_URL
    arguments, settings = json.loads(seen.read_text())
    assert arguments == []
    assert settings == {
        "model_path": str(bench.model_path),
        "model_name": "own",
        "packaged": False,
        "keys": ["local-one", "local-two"],
    }


def test_stop_ends_the_child_and_calls_nobody_back(bench: Bench) -> None:
    model = bench.start(SERVE)
    bench.ready.get(timeout=LONG_S)

    model.stop()

    assert model.pid is None
    assert bench.down.empty()
    assert bench.wait.asked_s.empty()


def test_stop_kills_a_child_that_stays(bench: Bench) -> None:
    model = bench.start(SERVE + "signal.pause()\n", stop_timeout_s=0.1)
    bench.ready.get(timeout=LONG_S)

    model.stop()

    assert model.pid is None


def test_stop_during_the_start_ends_the_child(bench: Bench) -> None:
    model = bench.start("import sys; sys.stdin.read()\n")

    model.stop()

    assert model.pid is None
    assert bench.down.empty()


def test_stop_before_the_start_is_no_error(bench: Bench) -> None:
    model = EmbeddedModel(
        model_path=None,
        keys=("local",),
        on_ready=bench.ready.put,
        on_down=bench.down.put,
        command=("unused",),
    )

    model.stop()
    model.stop()

    assert model.pid is None


def test_model_without_keys_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="key"):
        EmbeddedModel(model_path=None, keys=(), on_ready=bench.ready.put, on_down=bench.down.put)


def test_dead_child_is_reported_and_replaced_after_growing_waits(bench: Bench) -> None:
    bench.start(READ_SETTINGS + READY + "os.kill(os.getpid(), signal.SIGKILL)\n")

    for wait_s in (1.0, 2.0, 4.0):
        assert bench.ready.get(timeout=LONG_S) == BASE_URL
        assert "memory" in bench.down.get(timeout=LONG_S)
        assert bench.wait.asked_s.get(timeout=LONG_S) == wait_s
        bench.wait.let_go()


def test_illegal_instruction_is_given_up(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    model = bench.start(READ_SETTINGS + "os.kill(os.getpid(), signal.SIGILL)\n")

    assert "AVX2" in bench.down.get(timeout=LONG_S)

    model.stop()
    assert bench.wait.asked_s.empty()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_model_that_cannot_be_loaded_is_tried_once_a_minute(bench: Bench) -> None:
    bench.start(READ_SETTINGS + f"sys.exit({EXIT_MODEL_NOT_LOADED})\n")

    assert "MODEL_PATH" in bench.down.get(timeout=LONG_S)

    assert bench.wait.asked_s.get(timeout=LONG_S) == 60.0


def test_child_that_does_not_get_ready_is_killed(bench: Bench) -> None:
    model = bench.start(READ_SETTINGS + "signal.pause()\n", start_timeout_s=0.1)

    assert "did not get ready within 0.1 s" in bench.down.get(timeout=LONG_S)

    assert bench.wait.asked_s.get(timeout=LONG_S) == 1.0
    assert model.pid is None


def test_garbage_before_the_reply_is_passed_over(bench: Bench) -> None:
    garbage = "os.write(1, b'\\xff garbage\\n{\\n[]\\n' + b'x' * 100_000 + b'\\n')\n"

    bench.start(READ_SETTINGS + garbage + READY + "sys.stdin.read()\n")

    assert bench.ready.get(timeout=LONG_S) == BASE_URL


def test_child_that_prints_only_garbage_and_ends_is_down(bench: Bench) -> None:
    bench.start(READ_SETTINGS + "print('hello')\n")

    assert "exit status 0" in bench.down.get(timeout=LONG_S)
    assert bench.ready.empty()


def test_child_that_never_reads_its_settings_is_down_like_any_other(bench: Bench) -> None:
    bench.start("import sys; sys.exit(7)\n")

    assert "exit status 7" in bench.down.get(timeout=LONG_S)


def test_command_that_does_not_exist_is_reported_and_tried_again(bench: Bench) -> None:
    bench.start("", command=("/no/such/python",))

    assert "cannot be started (No such file or directory)" in bench.down.get(timeout=LONG_S)
    assert bench.wait.asked_s.get(timeout=LONG_S) == 1.0


def test_noise_of_the_child_neither_blocks_it_nor_reaches_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpt_worker.embedded")
    noise = "os.write(2, b'noise\\n' * 200_000)\n"

    bench.start(READ_SETTINGS + noise + READY + noise + "sys.exit(1)\n")

    bench.down.get(timeout=LONG_S)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"The embedded model own answers on {BASE_URL}",
        "The embedded model died (exit status 1). It starts again in 1 s, jobs wait",
    ]


def test_last_words_of_the_child_are_in_the_debug_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gpt_worker.embedded")
    speak = "print(*range(30), sep='\\n', file=sys.stderr)\n"

    bench.start(READ_SETTINGS + speak + "sys.exit(1)\n")

    bench.down.get(timeout=LONG_S)
    [words] = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert words.endswith(" | ".join(str(number) for number in range(10, 30)))


def test_callback_that_fails_does_not_end_the_supervision(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(base_url: str) -> None:
        raise RuntimeError(base_url)

    bench.start(READ_SETTINGS + READY + "sys.exit(1)\n", on_ready=fail)

    assert "exit status 1" in bench.down.get(timeout=LONG_S)
    assert "A callback of the embedded model failed" in caplog.messages
