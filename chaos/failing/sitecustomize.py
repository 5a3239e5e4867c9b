"""Loaded by the service's Python with this folder on its PYTHONPATH: kills it at a named point, and notes all points.

A point is a moment before or after a commit, named by the function that opened the write, or before, in the middle of
and after a send. CHAOS_POINT and CHAOS_HIT name the point and which of its passages is deadly; CHAOS_LOG is where every
passage is noted, a line each. The product knows nothing of it: modules are wrapped as they are imported.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType
from typing import Any

POINT = os.environ.get("CHAOS_POINT", "")
HIT = int(os.environ.get("CHAOS_HIT", "1"))
LOG = os.environ.get("CHAOS_LOG", "")

_lock = threading.Lock()
_hits = 0


def passes(point: str) -> None:
    """This moment has come."""
    global _hits
    if LOG:
        with open(LOG, "ab", buffering=0) as log:  # noqa: PTH123
            log.write(point.encode() + b"\n")
    if point == POINT:
        with _lock:
            _hits += 1
            if _hits == HIT:
                os.killpg(os.getpgid(0), signal.SIGKILL)
                signal.pause()  # other threads go on until the signal is here, this one must not


def _around(function: Callable[..., Any], name: Callable[[], str | None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        where = name()
        if where is None:
            return function(*args, **kwargs)
        passes(f"before {where}")
        result = function(*args, **kwargs)
        passes(f"after {where}")
        return result

    return wrapped


def _before(function: Callable[..., Any], point: str, called_from: str = "") -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not called_from or _is_below(called_from):
            passes(point)
        return function(*args, **kwargs)

    return wrapped


def _commit_name() -> str | None:
    """`commit jobs.Jobs._claim`: the nearest function of the product, but for the one that all writes go through."""
    for frame in _stack():
        module = frame.f_globals.get("__name__", "")
        if module.startswith("gpt_worker.") and (module, frame.f_code.co_name) != ("gpt_worker.db", "write"):
            return f"commit {module.removeprefix('gpt_worker.')}.{frame.f_code.co_qualname}"
    return None


def _is_below(module: str) -> bool:
    return any(frame.f_globals.get("__name__") == module for frame in _stack())


def _stack() -> Any:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _hook_commits(module: Any) -> None:
    dialect = module.DefaultDialect
    dialect.do_commit = _around(dialect.do_commit, _commit_name)


def _hook_calls(module: Any) -> None:
    module.Transport.post = _around(module.Transport.post, lambda: "the call")
    module._Response.begin = _before(module._Response.begin, "the call is sent")


def _hook_webhooks(module: Any) -> None:
    import urllib3.connection

    module.post = _around(module.post, lambda: "the webhook")
    connection = urllib3.connection.HTTPConnection
    connection.getresponse = _before(  # type: ignore[method-assign]
        connection.getresponse, "the webhook is sent", called_from="gpt_worker.posting"
    )


HOOKS: dict[str, Callable[[Any], None]] = {
    "sqlalchemy.engine.default": _hook_commits,
    "gpt_worker.transport": _hook_calls,
    "gpt_worker.posting": _hook_webhooks,
}


class _Hooking(Loader):
    def __init__(self, loader: Loader, hook: Callable[[Any], None]) -> None:
        self._loader = loader
        self._hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._hook(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = HOOKS.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if hook else None
        if hook is not None and spec is not None and spec.loader is not None:
            spec.loader = _Hooking(spec.loader, hook)
        return spec


if POINT or LOG:
    sys.meta_path.insert(0, _Finder())
