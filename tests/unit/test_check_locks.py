"""`.ci/check_locks.py` looks at every lock there is."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_locks", ROOT / ".ci" / "check_locks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_requirements_is_looked_at() -> None:
    tracked = subprocess.check_output(["git", "ls-files", "*requirements*.txt"], cwd=ROOT, text=True)

    assert set(load().LOCKS) == {*tracked.split()}


def test_every_lock_is_sound() -> None:
    assert load().find_unlocked() == []
