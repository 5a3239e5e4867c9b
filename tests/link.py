"""The network between a service and its database server: a relay that a test cuts, blocks, or silences.

It can wait for the one commit that a test means and cut there, before the server has it or before the service is told:
the two ways in which the result of a commit stays unknown.
"""

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

READ_BYTES = 1 << 16
COMMIT = b"COMMIT"
PATIENCE_S = 30.0


@dataclass
class Cut:
    """A cut that is to come, at the end of the transaction in which all these bytes are said."""

    marks: tuple[bytes, ...]
    is_delivered: bool
    """Whether the server gets the commit; the service never hears of it."""
    _done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Returns once it has happened."""
        if not self._done.wait(PATIENCE_S):
            raise TimeoutError(f"no transaction says {self.marks}")

    def done(self) -> None:
        self._done.set()


class Link:
    """Relays connections from its own port to that of a server, a context manager that ends them all."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._withheld: dict[
            tuple[socket.socket, socket.socket], threading.Event
        ] = {}  # replies to a cut commit
        self._cut: Cut | None = None
        self._flows = threading.Event()
        self._flows.set()
        self._over = False

    def cut_at_commit(self, *marks: bytes, is_delivered: bool) -> Cut:
        """The next transaction that says all of it loses its connection instead of being told of its commit."""
        cut = Cut(marks, is_delivered)
        with self._lock:
            self._cut = cut
        return cut

    def cut_all(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _close(pair)

    def silence(self) -> None:
        """From now on nothing comes through, and nobody is told: a cable that was pulled."""
        self._flows.clear()

    def restore(self) -> None:
        """New connections work again; those that were silenced are lost, as most are after so long."""
        self.cut_all()
        self._flows.set()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._flows.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                pair = (client, server)
                with self._lock:
                    self._pairs.add(pair)
                threading.Thread(target=self._tell_server, args=pair, daemon=True).start()
                threading.Thread(target=self._tell_client, args=pair, daemon=True).start()

    def _tell_server(self, client: socket.socket, server: socket.socket) -> None:
        said: list[bytes] = []  # in this transaction
        with contextlib.suppress(OSError):
            while data := client.recv(READ_BYTES):
                self._flows.wait()
                said.append(data)
                # Which is sent alone, after the reply to what went before.
                if COMMIT in data[-len(COMMIT) - 8 :]:
                    cut = self._cut_for(b"".join(said))
                    said.clear()
                    if cut is not None:
                        self._carry_out(cut, client, server, data)
                        break
                server.sendall(data)
        self._flows.wait()
        self._forget((client, server))

    def _tell_client(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(READ_BYTES):
                self._flows.wait()
                if (client, server) in self._withheld:
                    break
                client.sendall(data)
        if withheld := self._withheld.pop((client, server), None):
            withheld.set()
        self._flows.wait()
        self._forget((client, server))

    def _cut_for(self, said: bytes) -> Cut | None:
        with self._lock:
            cut = self._cut
            if cut is None or not all(mark in said for mark in cut.marks):
                return None
            self._cut = None
            return cut

    def _carry_out(self, cut: Cut, client: socket.socket, server: socket.socket, commit: bytes) -> None:
        if cut.is_delivered:
            withheld = self._withheld[client, server] = threading.Event()
            server.sendall(commit)
            withheld.wait(PATIENCE_S)
        _close((client, server))
        cut.done()

    def _forget(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        _close(pair)


def _close(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
