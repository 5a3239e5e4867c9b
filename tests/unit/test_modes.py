"""The service's toggles, on a real database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_worker.domain import DeliveryMode, Modes
from gpt_worker.modes import ModeBoard
from tests.unit.small_app import SmallApp


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path)
    yield app
    app.close()


def test_fresh_service_is_inline_open_and_asks_for_tokens(small: SmallApp) -> None:
    assert small.modes.current() == Modes(DeliveryMode.INLINE, registration=True, auth=True)


def test_change_leaves_the_others_as_they_are(small: SmallApp) -> None:
    small.modes.change(delivery=DeliveryMode.WEBHOOK)

    assert small.modes.change(auth=False) == Modes(DeliveryMode.WEBHOOK, registration=True, auth=False)


def test_changes_outlive_a_restart(small: SmallApp) -> None:
    changed = small.modes.change(DeliveryMode.WEBHOOK, registration=False, auth=False)

    assert ModeBoard(small.database).current() == changed


def test_current_modes_are_kept_in_memory(small: SmallApp, monkeypatch: pytest.MonkeyPatch) -> None:
    known = small.modes.current()
    monkeypatch.setattr(small.database, "read", None)

    assert small.modes.current() is known


def test_registration_that_an_admin_turned_on_stays_on(small: SmallApp) -> None:
    small.register()
    assert not small.modes.current().registration

    small.modes.change(registration=True)
    small.register("bob@example.org")

    assert ModeBoard(small.database).current().registration
