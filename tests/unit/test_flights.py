"""The file of calls in flight: what the next start finds in it, whatever became of the process or of the file."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_worker.flights import MAX_SLOTS, SLOT_BYTES, SLOT_TASKS, Flights
from gpt_worker.packing import LARGEST_SIZE
from tests.documents import ROOT

JOB = "0199c5a8f1e2" + "ab" * 10
OTHER = "0199c5a8f1e3" + "cd" * 10
BAD_MAGIC, BAD_VERSION, BAD_CHECKSUM, BAD_COUNT, BAD_POSITION = (
    0,
    7,
    SLOT_BYTES,
    SLOT_BYTES + 4,
    SLOT_BYTES + 44,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in-flight"


def opened(path: Path, slots: int = 4) -> Flights:
    flights = Flights(path)
    flights.open(slots)
    return flights


def left_behind(path: Path) -> dict[tuple[str, int], set[int]]:
    return Flights(path).left_behind()


def test_calls_in_flight_are_found_by_job_and_run(path: Path) -> None:
    flights = opened(path)

    flights.take(JOB, 1, [0])
    flights.take(JOB, 1, [5, 6])
    flights.take(OTHER, 3, [1_000_000_000])

    assert left_behind(path) == {(JOB, 1): {0, 5, 6}, (OTHER, 3): {1_000_000_000}}


def test_call_that_came_back_is_not_in_flight(path: Path) -> None:
    flights = opened(path)
    slot = flights.take(JOB, 1, [0])
    flights.take(JOB, 1, [1])

    flights.free(slot)

    assert left_behind(path) == {(JOB, 1): {1}}


def test_slot_is_used_again_and_shows_nothing_of_the_call_before(path: Path) -> None:
    flights = opened(path, slots=1)
    flights.free(flights.take(JOB, 1, list(range(40))))

    flights.take(OTHER, 2, [7])

    assert left_behind(path) == {(OTHER, 2): {7}}


def test_more_calls_than_slots_are_not_noted_and_do_no_harm(path: Path) -> None:
    flights = opened(path, slots=2)
    slots = [flights.take(JOB, 1, [position]) for position in range(3)]

    assert slots[2] is None
    assert left_behind(path) == {(JOB, 1): {0, 1}}
    for slot in slots:
        flights.free(slot)
    assert left_behind(path) == {}


def test_largest_pack_fits_in_a_slot(path: Path) -> None:
    flights = opened(path)
    pack = range(10**9 - LARGEST_SIZE, 10**9)

    flights.take(JOB, 1, pack)

    assert SLOT_TASKS >= LARGEST_SIZE
    assert left_behind(path) == {(JOB, 1): set(pack)}


def test_pack_larger_than_a_slot_is_noted_as_far_as_it_fits(path: Path) -> None:
    flights = opened(path, slots=2)

    flights.take(JOB, 1, range(SLOT_TASKS + 1))

    assert left_behind(path) == {(JOB, 1): set(range(SLOT_TASKS))}


def test_calls_of_a_killed_process_are_found(path: Path) -> None:
    code = (
        "import os, pathlib, sys; from gpt_worker.flights import Flights;"
        "flights = Flights(pathlib.Path(sys.argv[1])); flights.open(4); flights.take(sys.argv[2], 1, [3, 4]);"
        f"os.kill(os.getpid(), {signal.SIGKILL:d})"
    )

    killed = subprocess.run([sys.executable, "-c", code, path, JOB], cwd=ROOT, check=False)

    assert killed.returncode == -signal.SIGKILL
    assert left_behind(path) == {(JOB, 1): {3, 4}}


def test_stop_that_was_asked_for_leaves_nothing(path: Path) -> None:
    flights = opened(path)
    slot = flights.take(JOB, 1, [0])

    flights.close()
    flights.free(slot)
    flights.close()

    assert flights.take(JOB, 1, [1]) is None
    assert left_behind(path) == {}
    assert not any(path.read_bytes()[SLOT_BYTES:])


def test_next_start_begins_with_an_empty_private_file_of_its_own_size(path: Path) -> None:
    opened(path, slots=4).take(JOB, 1, [0])
    path.chmod(0o666)

    opened(path, slots=9)

    assert left_behind(path) == {}
    assert path.stat().st_size == 10 * SLOT_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_is_there_whole_so_that_a_full_disk_kills_nobody(path: Path) -> None:
    opened(path, slots=100)

    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_file_has_no_more_slots_than_a_process_has_threads(path: Path) -> None:
    opened(path, slots=MAX_SLOTS + 1).take(JOB, 1, [0])

    assert path.stat().st_size == (MAX_SLOTS + 1) * SLOT_BYTES
    assert left_behind(path) == {(JOB, 1): {0}}


# What else may stand there


@pytest.mark.parametrize(
    "at", [BAD_CHECKSUM, BAD_COUNT, BAD_COUNT + 3, BAD_POSITION, SLOT_BYTES + 8, SLOT_BYTES + 20]
)
def test_torn_slot_is_left_out_and_the_others_count(path: Path, at: int) -> None:
    flights = opened(path)
    flights.take(JOB, 1, [0, 1])
    flights.take(OTHER, 1, [2])
    content = bytearray(path.read_bytes())

    content[at] ^= 0xFF
    path.write_bytes(content)

    assert left_behind(path) == {(OTHER, 1): {2}}


@pytest.mark.parametrize("at", [BAD_MAGIC, BAD_VERSION])
def test_foreign_or_other_version_s_file_counts_nothing(path: Path, at: int) -> None:
    opened(path).take(JOB, 1, [0])
    content = bytearray(path.read_bytes())

    content[at] ^= 0xFF
    path.write_bytes(content)

    assert left_behind(path) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: b"",
        lambda whole: whole[:7],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: os.urandom(len(whole)),
        lambda whole: whole[:8] + os.urandom(len(whole) - 8),
        lambda whole: whole.ljust((MAX_SLOTS + 2) * SLOT_BYTES, b"\0"),
    ],
    ids=["empty", "shorter than its mark", "cut", "longer", "noise", "noise behind the mark", "huge"],
)
def test_file_of_another_size_or_content_counts_nothing_and_is_replaced(path: Path, change: object) -> None:
    opened(path).take(JOB, 1, [0])
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))

    assert left_behind(path) == {}
    opened(path).take(OTHER, 1, [1])
    assert left_behind(path) == {(OTHER, 1): {1}}


def test_link_is_not_followed_but_replaced(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    opened(elsewhere).take(JOB, 1, [0])
    path.symlink_to(elsewhere)

    assert left_behind(path) == {}
    opened(path)

    assert not path.is_symlink()
    assert left_behind(elsewhere) == {(JOB, 1): {0}}


def test_pipe_in_its_place_does_not_hold_the_start(path: Path) -> None:
    os.mkfifo(path)

    assert left_behind(path) == {}
    opened(path).take(JOB, 1, [0])

    assert left_behind(path) == {(JOB, 1): {0}}


@pytest.mark.parametrize("name", ["in-flight", "missing/in-flight"])
def test_without_the_file_nothing_is_counted_and_all_goes_on(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in-flight").mkdir()  # a directory where the file should be

    flights = opened(tmp_path / name)

    slot = flights.take(JOB, 1, [0])
    flights.free(slot)
    assert slot is None
    assert left_behind(tmp_path / name) == {}
    flights.close()
    [record] = caplog.records
    assert "can't be written" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_full_disk_is_no_reason_not_to_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(os, "open", lambda *_args: full)

    flights = opened(path)

    assert flights.take(JOB, 1, [0]) is None
