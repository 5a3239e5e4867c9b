"""The parts of the service by name, and the order in which they start and stop."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flask import Flask
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from config import Settings, SettingsError
from gpt_worker.accounts import Accounts
from gpt_worker.db import Database, log_failure, trouble_of
from gpt_worker.deliveries import Deliveries
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.domain import ErrorCode, Failure, JobStatus
from gpt_worker.drives import check_settings
from gpt_worker.embedded import EmbeddedModel, EmbeddedModelMissing, check_installed
from gpt_worker.flights import Flights
from gpt_worker.janitor import Janitor
from gpt_worker.jobs import CANCELLED, Jobs
from gpt_worker.keys import KeyBoard
from gpt_worker.metrics import Snapshot, Stored
from gpt_worker.models import JobRow
from gpt_worker.modes import ModeBoard
from gpt_worker.owner import Owner
from gpt_worker.places import Places
from gpt_worker.progress import ProgressBoard
from gpt_worker.recorder import Recorder
from gpt_worker.result_files import ResultFiles
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import result_files as file_store
from gpt_worker.store import tasks as task_store

log = logging.getLogger(__name__)

CALLS_GRACE_S = 23.0  # of the 30 s in which SIGTERM must be done
COMMIT_GRACE_S = 2.0
MAX_CRASHES = 5  # with a task in flight, until it is asked no more
INTERRUPTED = Failure(
    ErrorCode.INTERRUPTED, f"the service itself failed {MAX_CRASHES} times while this task was asked"
)


@dataclass(slots=True)
class Service:
    """Everything that lives as long as the process; the HTTP face finds it in `app.extensions["gpt_worker"]`."""

    app: Flask
    settings: Settings
    database: Database
    modes: ModeBoard
    accounts: Accounts
    recorder: Recorder
    flights: Flights
    dispatcher: Dispatcher
    deliveries: Deliveries
    result_files: ResultFiles
    jobs: Jobs
    janitor: Janitor
    embedded: EmbeddedModel | None
    model_name: str
    link_key: bytes
    keys: KeyBoard
    version: str
    progress: ProgressBoard
    owner: Owner | None  # of a database that other hosts reach
    places: Places = field(default_factory=Places)
    ready: bool = False
    stopping: bool = False
    _troubled: bool = field(default=False, init=False)  # the numbers can't be read, and it has been told

    def start(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Bring the tables up to date, take up what an earlier process left, and begin to serve.

        In the process that serves, after the fork and with DATA_DIR owned. Raises SettingsError if the embedded model
        is to answer and is not there, or the drive's driver or the database is not; InUse where another service has
        the database; StartGivenUp when it `is_wanted` no more while it waits for that.
        """
        check_settings(self.settings)
        if self.embedded is not None:
            try:
                check_installed(self.settings.model_path)
            except EmbeddedModelMissing as error:
                raise SettingsError(str(error)) from error
        self.database.await_up(is_wanted)
        if self.owner is not None:
            self.owner.acquire(is_wanted)  # before its tables are changed
        self.database.migrate()
        if self.owner is not None:
            self.owner.acquire(is_wanted)
            self.owner.start()
        with self.app.app_context():
            self.accounts.prepare()
        with self.database.write() as session:
            job_store.discard_half_received(session)
            unfinished = job_store.open_jobs(session)
            self._count_crash(session, unfinished)
        self.recorder.start()
        self.dispatcher.start([job for job in unfinished if not self._close(job)])
        self.deliveries.start()
        self.result_files.start()
        self.janitor.start(self.jobs.work_off)
        if self.embedded is not None:
            self.embedded.start()
        self.ready = True
        self._say_started(len(unfinished))

    def _count_crash(self, session: Session, unfinished: Sequence[JobRow]) -> None:
        """Count what was in flight when an earlier process crashed; a task that was so too often is asked no more."""
        in_flight = self.flights.left_behind()
        for job in unfinished:
            positions = in_flight.get((job.id, job.run))
            if not positions:
                continue
            failed = task_store.count_crash(session, job.id, positions, MAX_CRASHES, INTERRUPTED)
            job.failed += failed
            job.results_bytes += failed * len(INTERRUPTED.message)
            log.warning(
                "the service crashed with %d tasks of a job in flight; %d of them fail, as it was so %d times",
                len(positions),
                failed,
                MAX_CRASHES,
                extra={"action": "crash", "job_id": job.id},
            )

    def _close(self, job: JobRow) -> bool:
        """End a job with nothing left to ask; whether it is one."""
        if job.status == JobStatus.CANCELLED:
            self.recorder.close_job(job.id, job.run, CANCELLED, ())
        elif job.answered + job.failed >= job.total:  # by the tasks that a crash has failed
            self.recorder.close_job(job.id, job.run, INTERRUPTED, ())
        else:
            return False
        return True

    def _say_started(self, unfinished: int) -> None:
        no_key = f"the embedded model {self.model_name}, as no GPT key is set,"
        by = no_key if self.embedded else f"{len(self.dispatcher.lanes)} API keys"
        log.info(
            "gpt-worker answers with %s on http://%s:%d; unfinished jobs: %d",
            by,
            self.settings.host,
            self.settings.port,
            unfinished,
            extra={"action": "started"},
        )

    def begin_shutdown(self) -> None:
        """Not ready any more: nothing new is taken, who waits for a job gets their 202, and streams of events end."""
        self.stopping = True
        self.ready = False
        self.jobs.begin_shutdown()
        self.progress.close()
        self.dispatcher.stop_taking()

    def stop(self) -> None:
        """Let calls in flight end, store what they brought, and stop every part."""
        sending = threading.Thread(target=self.deliveries.stop, args=(CALLS_GRACE_S,), name="stop-deliveries")
        sending.start()
        self.dispatcher.stop_taking()
        if not self.dispatcher.wait_idle(CALLS_GRACE_S):
            log.warning("calls in flight were cut; their tasks stay pending", extra={"action": "stop"})
        self.dispatcher.abort()
        sending.join()
        self.janitor.stop()
        self.result_files.stop()
        if not self.recorder.stop(COMMIT_GRACE_S):
            log.error("the last answers could not be stored in time", extra={"action": "stop"})
        if self.embedded is not None:
            self.embedded.stop()
        if self.owner is not None:
            self.owner.stop()
        self.database.close()

    def abort(self) -> None:
        """Cut the calls and deliveries in flight; `stop` then ends at once."""
        self.dispatcher.abort()
        self.deliveries.stop(0)

    def snapshot(self) -> Snapshot:
        """How the service stands now, in numbers."""
        try:
            with self.database.read() as session:
                stored = Stored(
                    job_store.count_by_status(session),
                    delivery_store.count_by_status(session),
                    file_store.count_by_state(session),
                )
            self._troubled = False
        except SQLAlchemyError as error:
            trouble = trouble_of(error)
            if not (trouble and self._troubled):
                message = "the database can't be read for the metrics"
                log_failure(log, message, error, logging.WARNING, action="metrics")
            self._troubled = trouble is not None
            stored = None
        return Snapshot(
            version=self.version,
            model=self.model_name,
            keys=self.keys.reports(),
            stored=stored,
            commits=self.recorder.commits,
            outcomes=self.recorder.stored,
            inbox=self.recorder.waiting,
            recorder_healthy=self.recorder.healthy,
            drive_failures=self.result_files.failures,
            drive_healthy=self.result_files.trouble is None,
            places=self.places.total,
            places_free=self.places.free,
        )
