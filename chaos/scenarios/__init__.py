"""The scenarios: every module here with a NAME is one. `run(options)` returns its rows, and ends what it started.

A module is found by being there, so a scenario is one file and no list knows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from chaos.options import Options
from chaos.report import Row


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    about: str
    run: Callable[[Options], list[Row]]


def found() -> dict[str, Scenario]:
    """The scenarios by name, in the order of their names."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    scenarios = [
        Scenario(module.NAME, (module.__doc__ or "").partition("\n")[0], module.run)
        for module in modules
        if hasattr(module, "NAME")
    ]
    return {scenario.name: scenario for scenario in sorted(scenarios, key=lambda scenario: scenario.name)}
