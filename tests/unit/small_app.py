"""A small app on a real SQLite file: accounts, modes, access and problems, and none of the rest of the service."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flask_openapi3.openapi import OpenAPI

from config import Settings
from gpt_worker.accounts import Accounts, install_tokens
from gpt_worker.api import access, problems, schemas
from gpt_worker.api import accounts as accounts_api
from gpt_worker.api import modes as modes_api
from gpt_worker.api.parsing import StrictRequest
from gpt_worker.db import Database, db
from gpt_worker.domain import utc_now
from gpt_worker.modes import ModeBoard

APP_KEY = "unit-tests-only-0123456789-abcdefghij"
EMAIL = "ada@example.org"
PASSWORD = "correct horse battery staple"


class FakeClock:
    """Starts now, since the library that checks a token's end has a clock of its own."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> datetime:
        return self.now

    def now_s(self) -> float:
        return self.now.timestamp()

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def settings_for(tmp_path: Path, **changes: Any) -> Settings:
    env = {"NODE_ENV": "test", "DATA_DIR": str(tmp_path / "data"), "APP_KEY": APP_KEY}
    settings = Settings.from_env(env, tmp_path / "none")
    return replace(settings, **changes)


class SmallApp:
    """The parts, wired as the service wires them."""

    def __init__(self, tmp_path: Path, **changes: Any) -> None:
        self.settings = settings_for(tmp_path, **changes)
        self.app = OpenAPI(
            "small_app",
            static_folder=None,
            doc_ui=False,
            validation_error_callback=problems.validation_problem,
            validation_error_model=schemas.Problem,
        )
        self.app.request_class = StrictRequest
        self.app.json.sort_keys = False  # type: ignore[attr-defined]
        problems.install(self.app)
        access.install(self.app)
        install_tokens(self.app, self.settings)
        self.database = Database(self.app, self.settings.database.url)
        with self.app.app_context():
            db.create_all()
        self.clock = FakeClock()
        self.modes = ModeBoard(self.database)
        self.accounts = Accounts(self.database, self.settings, self.modes, self.clock, self.clock.now_s)
        self.app.extensions["gpt_worker"] = SimpleNamespace(
            settings=self.settings, database=self.database, modes=self.modes, accounts=self.accounts
        )
        self.app.register_api(accounts_api.api)
        self.app.register_api(modes_api.api)
        self.client: Any = self.app.test_client()

    def register(self, email: str = EMAIL, password: str = PASSWORD) -> str:
        """The token of a new account; the first is the admin's."""
        reply = self.client.post("/register", json={"email": email, "password": password})
        assert reply.status_code == 201, reply.text
        return str(reply.json["token"]["token"])

    def register_user(self, email: str) -> str:
        """The token of an account that is not the first."""
        self.modes.change(registration=True)
        token = self.register(email)
        self.modes.change(registration=False)
        return token

    def request(self, method: str, path: str, token: str | None = None, **options: Any) -> Any:
        headers = dict(options.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return self.client.open(path, method=method, headers=headers, **options)

    def close(self) -> None:
        self.database.close()
