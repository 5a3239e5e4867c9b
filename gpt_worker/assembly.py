"""Puts the service together: builds each part and hands it to the next, in the order in which a job flows."""

import secrets
import threading
from collections.abc import Sequence

from flask import Flask

from config import ApiKey, Settings, SettingsError
from gpt_worker import __version__, api, embedded
from gpt_worker.accounts import Accounts, install_tokens
from gpt_worker.db import Database
from gpt_worker.deliveries import Deliveries
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.drives import hint, make_drive
from gpt_worker.flights import Flights
from gpt_worker.gpt import Endpoint
from gpt_worker.janitor import Janitor
from gpt_worker.jobs import Jobs
from gpt_worker.keys import KeyBoard
from gpt_worker.lanes import Lane
from gpt_worker.marks import Marks
from gpt_worker.modes import ModeBoard
from gpt_worker.owner import Owner
from gpt_worker.ownership import LOCK_NAME, check_driver
from gpt_worker.progress import ProgressBoard
from gpt_worker.rate_limit import Bursts
from gpt_worker.recorder import Recorder
from gpt_worker.result_files import ResultFiles
from gpt_worker.service import Service
from gpt_worker.signing import link_key
from gpt_worker.transport import ProxyUnusable, Transport

EMBEDDED_LANES = 2
EMBEDDED_THREADS = 2  # each: the model has four slots
EMBEDDED_STARTING = "the embedded model is starting"


def assemble(settings: Settings) -> Flask:
    """The whole service, assembled and at rest."""
    app = api.make_app(__version__)
    install_tokens(app, settings)
    if settings.database.extra is not None:
        check_driver(settings.database)
    database = Database(app, settings.database.url)
    owner = None if settings.database.extra is None else Owner(database, settings.data_dir / LOCK_NAME)
    modes = ModeBoard(database)
    accounts = Accounts(database, settings, modes)
    recorder = Recorder(database, settings.request_api)
    keys = settings.api_keys or local_keys()
    flights = Flights(settings.data_dir / "in-flight")
    dispatcher = Dispatcher(
        database,
        recorder,
        lambda lock: make_lanes(settings, keys, lock),
        flights=flights,
        call_deadline_s=settings.call_deadline_s,
        max_in_flight=settings.max_in_flight,
    )
    deliveries = Deliveries(database, settings, version=__version__)
    result_files = ResultFiles(database, make_drive(settings), hint=hint(settings.drive))
    janitor = Janitor(database, settings.retain_days, accounts.sweep, on_files=result_files.wake)

    def on_discarded() -> None:
        result_files.wake()
        janitor.wake()

    jobs = Jobs(database, dispatcher, settings, freeze_owed=deliveries.freeze_owed, on_discarded=on_discarded)
    progress = ProgressBoard()
    recorder.on_committed = progress.changed
    recorder.on_ended = jobs.ended
    recorder.on_delivery = deliveries.wake
    recorder.on_file = result_files.wake
    recorder.on_recovered = dispatcher.wake
    if owner is not None:
        owner.on_doubt = recorder.suspend
        owner.on_sure = recorder.resume
    app.extensions["gpt_worker"] = Service(
        app=app,
        settings=settings,
        database=database,
        modes=modes,
        accounts=accounts,
        recorder=recorder,
        flights=flights,
        dispatcher=dispatcher,
        deliveries=deliveries,
        result_files=result_files,
        jobs=jobs,
        janitor=janitor,
        embedded=make_embedded(settings, keys, dispatcher) if settings.embedded else None,
        model_name=embedded.model_name(settings.model_path) if settings.embedded else settings.model,
        link_key=link_key(settings.app_key),
        keys=KeyBoard(dispatcher, settings.model),
        version=__version__,
        progress=progress,
        owner=owner,
    )
    api.register(app)
    return app


def make_lanes(settings: Settings, keys: Sequence[ApiKey], lock: threading.Lock) -> list[Lane]:
    """A lane for each key; those of the embedded model get their endpoint when it has started."""
    token_limit_names: Marks[tuple[str, str], str] = Marks()
    bursts: dict[str, dict[str, Bursts]] = {}  # what the keys of one endpoint teach each other
    lanes: list[Lane] = []
    for key in keys:
        threads = EMBEDDED_THREADS if settings.embedded else settings.threads_per_key
        lane = Lane(key, threads, lock, bursts.setdefault(key.base_url, {}))
        if settings.embedded:
            lane.down = EMBEDDED_STARTING
        else:
            try:
                transport = Transport(key.base_url, threads, loopback_only=settings.offline)
            except ProxyUnusable as error:
                raise SettingsError(str(error)) from error
            lane.endpoint = Endpoint(transport, key.secret, token_limit_names)
        lanes.append(lane)
    return lanes


def local_keys() -> tuple[ApiKey, ...]:
    """Keys for the embedded model, known to this process and its child alone."""
    return tuple(ApiKey(number, f"local-{secrets.token_urlsafe(24)}", "") for number in range(EMBEDDED_LANES))


def make_embedded(
    settings: Settings, keys: Sequence[ApiKey], dispatcher: Dispatcher
) -> embedded.EmbeddedModel:
    """The embedded model, which opens and closes the lanes as it comes and goes."""

    def on_ready(base_url: str) -> None:
        for lane, key in zip(dispatcher.lanes, keys, strict=True):
            transport = Transport(base_url, EMBEDDED_THREADS, loopback_only=True)
            dispatcher.lane_up(lane, Endpoint(transport, key.secret, Marks()), base_url)

    def on_down(reason: str) -> None:
        for lane in dispatcher.lanes:
            dispatcher.lane_down(lane, reason)

    return embedded.EmbeddedModel(
        model_path=settings.model_path,
        keys=tuple(key.secret for key in keys),
        on_ready=on_ready,
        on_down=on_down,
    )
