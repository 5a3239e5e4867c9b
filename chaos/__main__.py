"""`python -m chaos [name…]`: runs the scenarios one after the other; exit status 1 on any breach."""

import argparse
import secrets
import signal
import sys
import time
import traceback
from types import FrameType

from chaos.options import Options
from chaos.report import Row, table
from chaos.scenarios import Scenario, found


def main() -> None:
    scenarios = found()
    arguments = _arguments(scenarios)
    signal.signal(signal.SIGTERM, _end)
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    rows = []
    for name in arguments.names or scenarios:
        print(f"{name}: {scenarios[name].about} (--seed {seed})", flush=True)
        options = Options(seed, arguments.rounds, arguments.seconds, arguments.short)
        began_s = time.monotonic()
        of_scenario = _run(scenarios[name], options)
        print(f"{name}: {_verdict(of_scenario)} in {time.monotonic() - began_s:.0f} s", flush=True)
        rows += [Row(f"{name}: {row.what}", row.wanted, row.got, row.ok) for row in of_scenario]
    print(f"\n{table(rows)}\n\nseed {seed}: {_verdict(rows)}")
    sys.exit(not all(row.ok for row in rows))


def _run(scenario: Scenario, options: Options) -> list[Row]:
    try:
        return scenario.run(options)
    except Exception as error:
        traceback.print_exc()
        return [Row("ran to its end", "yes", f"{type(error).__name__}: {str(error)[:200]}", False)]


def _verdict(rows: list[Row]) -> str:
    breaches = sum(not row.ok for row in rows)
    return f"{breaches} of {len(rows)} breached" if breaches else f"all {len(rows)} kept"


def _arguments(scenarios: dict[str, Scenario]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(scenarios)} (all)")
    parser.add_argument("--rounds", type=int, help="how often (the scenario's own)")
    parser.add_argument("--seconds", type=float, help="how long (the scenario's own)")
    parser.add_argument("--seed", type=int, help="of every random choice (a new one)")
    parser.add_argument("--short", action="store_true", help="the short forms, for every change")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in scenarios:
            parser.error(f"no scenario {name!r}: there are {', '.join(scenarios)}")
    return arguments


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)  # every `with` ends its processes


if __name__ == "__main__":
    main()
