"""What is in flight now, in a file: so that a prompt that kills the process does not do so for ever.

One slot a call holds its job, run and positions. The file is mapped into memory, so that a call costs about a
microsecond and no commit; what stands there outlives the process however it ends, though not a loss of power, which
is nobody's prompt. A start finds in it what a crash has cut off; a stop that was asked for leaves it empty. What a
crash means for a task is the service's to decide. Without the file, whatever is wrong with it, crashes are not counted.
"""

import logging
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

log = logging.getLogger(__name__)

MAGIC = b"flights\x01"  # the last byte is the form's version
SLOT_BYTES = 256  # and so long a head; no slot lies across two pages or sectors
MAX_SLOTS = 16_384  # more threads than a process has
_CHECKSUM = struct.Struct("<I")
_HEAD = struct.Struct("<II32s")  # how many tasks, the job's run, its id; then the positions
SLOT_TASKS = (SLOT_BYTES - _CHECKSUM.size - _HEAD.size) // 4
_FREE = bytes(_CHECKSUM.size + 4)


class Flights:
    """The calls in flight. `take` and `free` do nothing until `open`, and after `close`.

    One thread at a time: the dispatcher's lock is held throughout.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        self._free: list[int] = []

    def left_behind(self) -> dict[tuple[str, int], set[int]]:
        """The positions that were in flight when an earlier process crashed, by job and run.

        Empty for a file that is not there, is not ours or can't be read; a torn slot is left out.
        """
        found: dict[tuple[str, int], set[int]] = {}
        for job_id, run, positions in _read_slots(self._read()):
            found.setdefault((job_id, run), set()).update(positions)
        return found

    def _read(self) -> bytes:
        try:
            status = self._path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= (MAX_SLOTS + 1) * SLOT_BYTES:
                return self._path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning(
                "%s can't be read (%s): a crash before this start is not counted",
                self._path,
                error.strerror,
                extra={"action": "flights"},
            )
        return b""

    def open(self, slots: int) -> None:
        """Begin anew, with an empty file for so many calls at once."""
        content = MAGIC.ljust(SLOT_BYTES, b"\0") + bytes(SLOT_BYTES * min(slots, MAX_SLOTS))
        try:
            self._path.unlink(missing_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w+b") as file:
                # Written whole: the kernel would kill who writes into a mapped hole while the disk is full.
                file.write(content)
                file.flush()
                self._map = mmap.mmap(file.fileno(), len(content))
        except OSError as error:
            log.warning(
                "%s can't be written (%s): a task that crashes the service will be asked again each time",
                self._path,
                error.strerror,
                extra={"action": "flights"},
            )
            return
        self._free = list(range(len(content) - SLOT_BYTES, 0, -SLOT_BYTES))

    def take(self, job_id: str, run: int, positions: Sequence[int]) -> int | None:
        """A call for these tasks goes out; the slot that `free` wants back, or None if none is left."""
        if self._map is None or not self._free:
            return None
        noted = positions[:SLOT_TASKS]
        head = _HEAD.pack(len(noted), run, job_id.encode())
        body = head + struct.pack(f"<{len(noted)}I", *noted)
        slot = self._free.pop()
        self._map[slot : slot + _CHECKSUM.size + len(body)] = _CHECKSUM.pack(crc32(body)) + body
        return slot

    def free(self, slot: int | None) -> None:
        """The call that took this slot came back."""
        if self._map is not None and slot is not None:
            self._map[slot : slot + len(_FREE)] = _FREE
            self._free.append(slot)

    def close(self) -> None:
        """The process was asked to stop: however that ends, what is in flight now has not crashed it."""
        if self._map is not None:
            self._map[SLOT_BYTES:] = bytes(len(self._map) - SLOT_BYTES)
            self._map.close()
            self._map = None


def _read_slots(content: bytes) -> Iterator[tuple[str, int, Sequence[int]]]:
    """Job, run and positions of each slot that is taken and whole."""
    if not content.startswith(MAGIC) or len(content) % SLOT_BYTES:
        return
    for start in range(SLOT_BYTES, len(content), SLOT_BYTES):
        checksum, count = struct.unpack_from("<II", content, start)
        if not 0 < count <= SLOT_TASKS:
            continue
        begin = start + _CHECKSUM.size
        body = content[begin : begin + _HEAD.size + 4 * count]
        if crc32(body) == checksum:
            _, run, job_id = _HEAD.unpack_from(body)
            positions = struct.unpack_from(f"<{count}I", body, _HEAD.size)
            yield job_id.rstrip(b"\0").decode("ascii", "replace"), run, positions
