"""Shows how a job fares: one live line on a terminal, plain lines in a pipe. The sentences are pure functions."""

import shutil
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

from gpt_worker.client.errors import ClientError, NotLoggedIn
from gpt_worker.client.following import Progress
from gpt_worker.client.server import Server

BAR_CELLS = 24
MIN_BAR_CELLS = 5
PLAIN_EVERY_S = 5.0
KEYS_EVERY_S = 5.0
KEYS_TIMEOUT_S = 3.0
CLEAR_LINE = "\r\x1b[K"

Resting = Mapping[str, int]
"""Keys that don't work now, counted by their state."""


def render_duration(seconds: float) -> str:
    """`0:05`, `12:30`, `1:02:03`, `2 days`."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86_400} days"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def render_plain(progress: Progress, resting: Resting | None = None) -> str:
    """`queued, 12/20 answered, 1 failed, 1 key resting`: the figures, and what else one should know of the job."""
    parts = [progress.status] if progress.status in ("queued", "cancelled") else []
    parts.append(render_figures(progress))
    parts += [
        f"{count} {'key' if count == 1 else 'keys'} {state}" for state, count in (resting or {}).items()
    ]
    return ", ".join(parts)


def render_figures(progress: Progress) -> str:
    """`12/20 answered, 1 failed, 3.4 tasks/s, ETA 0:02`; what is not known is left out."""
    parts = [f"{progress.answered}/{progress.total} answered", f"{progress.failed} failed"]
    if progress.tasks_per_s is not None:
        parts.append(f"{progress.tasks_per_s:.1f} tasks/s")
    if progress.eta_s is not None and progress.pending:
        parts.append(f"ETA {render_duration(progress.eta_s)}")
    return ", ".join(parts)


def render_bar(progress: Progress, resting: Resting, columns: int) -> str:
    """The live line, never longer than `columns` - 1, so that it does not wrap."""
    text = render_plain(progress, resting)
    cells = min(BAR_CELLS, columns - len(text) - 4)
    if cells < MIN_BAR_CELLS:
        return text[: columns - 1]
    share = (progress.answered + progress.failed) / progress.total if progress.total else 1.0
    full = int(share * cells)
    head = ">" if full < cells else ""
    return f"[{('=' * full + head).ljust(cells)}] {text}"


class Display(Protocol):
    """Where progress and notes go."""

    def show(self, progress: Progress) -> None:
        """The job is so far now."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the terminal clean."""


class LiveBar:
    """One line that is drawn over and over."""

    def __init__(self, stream: TextIO, resting: Callable[[], Resting]) -> None:
        self._stream = stream
        self._resting = resting

    def show(self, progress: Progress) -> None:
        columns = shutil.get_terminal_size().columns
        self._write(CLEAR_LINE + render_bar(progress, self._resting(), columns))

    def note(self, text: str) -> None:
        self._write(f"{CLEAR_LINE}{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(CLEAR_LINE)


class PlainLines:
    """A line now and then, for a file or a pipe."""

    def __init__(self, stream: TextIO, now_s: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now_s = now_s
        self._shown: Progress | None = None
        self._shown_at_s = 0.0

    def show(self, progress: Progress) -> None:
        if self._shown is not None and not self._is_due(self._shown, progress):
            return
        self._shown, self._shown_at_s = progress, self._now_s()
        self.note(render_plain(progress))

    def _is_due(self, shown: Progress, progress: Progress) -> bool:
        if counts(progress) == counts(shown):
            return False
        return not progress.pending or self._now_s() - self._shown_at_s >= PLAIN_EVERY_S

    def note(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def counts(progress: Progress) -> tuple[str, int, int]:
    return progress.status, progress.answered, progress.failed


class KeyWatch:
    """Which keys rest, asked for now and then; nothing where the user may not see that."""

    def __init__(self, server: Server, now_s: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._now_s = now_s
        self._next_look_s = 0.0
        self._resting: dict[str, int] = {}

    def resting(self) -> Resting:
        """Keys that are not ready, by state, as of at most KEYS_EVERY_S ago."""
        if self._now_s() >= self._next_look_s:
            self._next_look_s = self._now_s() + KEYS_EVERY_S
            try:
                self._resting = count_resting(self._server.listed("/keys", timeout_s=KEYS_TIMEOUT_S))
            except NotLoggedIn:
                self._next_look_s = float("inf")
            except ClientError:
                self._resting = {}
        return self._resting


def count_resting(keys: list[dict[str, object]]) -> dict[str, int]:
    """How many keys are in each state but "ready"."""
    states = [str(key.get("state")) for key in keys]
    return {state: states.count(state) for state in sorted({*states} - {"ready"})}
