"""Who writes next: the recorder, but not twice in a row; and of the others, who came first."""

import threading
import time

from gpt_worker.write_gate import WriteGate

MANY = 300
PATIENCE_S = 30.0


def test_who_writes_slice_after_slice_keeps_nobody_out() -> None:
    gate = WriteGate(lambda _error: False)
    slices = 0
    begun = threading.Event()

    def write_slices() -> None:
        nonlocal slices
        while slices < MANY:
            with gate.hold(urgent=False):
                slices += 1
                begun.set()
                time.sleep(0.002)  # a commit

    writer = threading.Thread(target=write_slices)
    writer.start()
    assert begun.wait(PATIENCE_S)

    with gate.hold(urgent=False):
        before_us = slices

    writer.join(PATIENCE_S)
    assert before_us < MANY


def test_recorder_and_another_take_turns() -> None:
    gate = WriteGate(lambda _error: False)
    turns: list[bool] = []

    def write(*, urgent: bool) -> None:
        for _ in range(MANY):
            with gate.hold(urgent):
                turns.append(urgent)
                time.sleep(0.0005)

    writers = [threading.Thread(target=write, kwargs={"urgent": urgent}) for urgent in (True, False, False)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(PATIENCE_S)

    # While all three write, which the first half of the recorder's turns surely are, none waits for long.
    shared = turns[: turns.index(True) + MANY]
    assert sum(shared) > MANY / 4
    assert sum(not turn for turn in shared) > MANY / 4
