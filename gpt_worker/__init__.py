"""gpt-worker: a list of prompts in, spread over all of one's OpenAI keys, every answer out.

A job flows through the parts in this order:

    api → jobs → (tables) → dispatcher → lanes → gpt → recorder → (tables) → deliveries

Nothing runs after `create_app` yet: `Service.start` does that, in the process that serves.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from config import Settings

if TYPE_CHECKING:
    from flask import Flask

try:
    __version__ = version("gpt-worker")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.1.0"


def create_app(settings: Settings) -> "Flask":
    """The whole service, assembled and at rest."""
    from gpt_worker.assembly import assemble  # here: the command line client need not load a server

    return assemble(settings)
