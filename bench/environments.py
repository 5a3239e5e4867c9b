"""Virtual environments for what does not go together with our own packages, made on first use from pinned requirements.

Each peer of the benchmark has one, and so has a tool of chaos.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALL_TIMEOUT_S = 900.0
PIP_INSTALL = (
    *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
    "--require-hashes",
)


class NotInstalled(Exception):
    """An environment that can't be made here; the message is one line."""


def python_of(name: str) -> Path:
    """The Python of the environment for `requirements-<name>.txt`. Raises NotInstalled."""
    requirements = ROOT / "bench" / f"requirements-{name}.txt"
    return make_environment(ROOT / f".venv-bench-{name}", requirements) / "python"


def make_environment(folder: Path, requirements: Path, *options: str) -> Path:
    """The folder of its programs, made or renewed where it is not up to date; `options` are further ones of pip's.

    Raises NotInstalled.
    """
    programs = folder / "bin"
    stamp = folder / ".installed"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {folder.name} …", file=sys.stderr, flush=True)
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(programs / "python"), *PIP_INSTALL, *options, "--requirement", str(requirements))
        stamp.write_text(wanted)
    return programs


def _run(*command: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not installed within {INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        raise NotInstalled(f"not installed: {last[:200]}")
