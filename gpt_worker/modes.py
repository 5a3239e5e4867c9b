"""The service's toggles: how jobs are delivered, whether anybody may register, whether tokens are asked for.

They live in the database and are kept in memory, since one process owns the database and every request asks.
"""

import logging
import threading

from sqlalchemy.orm import Session

from gpt_worker.db import Database
from gpt_worker.domain import DeliveryMode, Modes
from gpt_worker.store import accounts as account_store
from gpt_worker.store import modes as mode_store

logger = logging.getLogger(__name__)

ON, OFF = "true", "false"


class ModeBoard:
    """Where the toggles are read and changed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._known: Modes | None = None

    def current(self) -> Modes:
        """The toggles as they stand."""
        known = self._known
        if known is not None:
            return known
        with self._lock:
            if self._known is None:
                with self._database.read() as session:
                    self._known = read_modes(session)
            return self._known

    def change(
        self, delivery: DeliveryMode | None = None, registration: bool | None = None, auth: bool | None = None
    ) -> Modes:
        """Change those that are given, and return all as they then stand."""
        with self._database.write() as session:
            if delivery is not None:
                mode_store.save_mode(session, "delivery", delivery.value)
            if registration is not None:
                mode_store.save_mode(session, "registration", _word(registration))
            if auth is not None:
                mode_store.save_mode(session, "auth", _word(auth))
        self.forget()
        modes = self.current()
        logger.info(
            "Modes: delivery %s, registration %s, auth %s.",
            modes.delivery,
            _word(modes.registration),
            _word(modes.auth),
            extra={"action": "modes_changed"},
        )
        return modes

    def forget(self) -> None:
        """Read again next time: for whoever has committed a change without `change`."""
        with self._lock:
            self._known = None


def read_modes(session: Session) -> Modes:
    """The toggles inside a transaction; registration is on until the first account, unless somebody chose."""
    saved = mode_store.all_modes(session)
    registration = saved.get("registration")
    return Modes(
        delivery=DeliveryMode(saved.get("delivery", DeliveryMode.INLINE)),
        registration=not account_store.any_user(session) if registration is None else registration == ON,
        auth=saved.get("auth", ON) == ON,
    )


def close_registration(session: Session) -> None:
    """Part of the transaction that adds the first account."""
    mode_store.save_mode(session, "registration", OFF)


def _word(on: bool) -> str:
    return ON if on else OFF
