"""kill -9 of the whole service at random moments, under load; then it starts again, and again."""

import threading
import time
from random import Random

from chaos.ledger import Ledger
from chaos.options import Options
from chaos.report import Row, fact
from chaos.stand import STANDS, Stand, side_by_side

NAME = "kills"
ROUNDS, SHORT_ROUNDS = 200, 25
SECONDS, SHORT_SECONDS = 600.0, 60.0
P_AT_START = 0.15  # of the kills hit a service that is only starting
P_AT_REST = 0.1  # come when all is done, and show that a life without a kill leaves nothing behind
LONGEST_LIFE_S = 1.2
LONGEST_START_S = 0.8


def run(options: Options) -> list[Row]:
    rounds = options.rounds_or(ROUNDS, SHORT_ROUNDS)
    ends_s = options.started_s + options.seconds_or(SECONDS, SHORT_SECONDS)
    whole = Ledger()
    done = 0

    def kill(number: int, stopping: threading.Event) -> tuple[Ledger, int]:
        with Stand(options.random(NAME, "stand", number)) as stand:
            stand.start()
            stand.register()
            stand.kill()
            for round_ in range(number, rounds, STANDS):
                if stopping.is_set() or time.monotonic() > ends_s:
                    break
                _round(stand, options.random(NAME, round_))
            stand.finish()
            return stand.ledger, stand.lives - 2  # the first and the last were not killed at random

    for ledger, lives in side_by_side(kill):
        whole.absorb(ledger)
        done += lives
    return [
        options.enough("rounds", rounds, done),
        *whole.rows(),
        whole.again(),
        *(fact(what, count) for what, count in sorted(whole.counts.items())),
    ]


def _round(stand: Stand, random: Random) -> None:
    draw = random.random()
    stand.launch()
    if draw < P_AT_START:
        time.sleep(random.uniform(0.0, LONGEST_START_S))
        stand.kill()
        return
    stand.service.wait_ready()
    traffic = stand.traffic()
    traffic.start()
    time.sleep(random.uniform(0.0, LONGEST_LIFE_S))
    if draw > 1 - P_AT_REST:
        traffic.stop()
        stand.rest()
    stand.service.kill()
    traffic.stop()
    stand.end()
