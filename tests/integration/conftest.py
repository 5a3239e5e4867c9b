"""Running services for the integration tests: one that a module shares, and a factory for those of their own.

A test gets the shared ones as it would find them fresh: no faults, no calls, the modes of a new service.
Whatever the services of a run have written is looked through at its end: no secret, and no prompt out of its place.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.canaries import Watch
from tests.link import Link
from tests.receiver import Receiver
from tests.servers import SERVERS, Server
from tests.service import Env, Service
from tests.stand import KEYS, Stand
from tests.upstream import KeyRules, Upstream

Databases = Callable[[], AbstractContextManager[Env]]
"""The settings of a service with a database of its own, which is there for as long as the block lasts."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked `every_database` runs on SQLite as ever, and once more on each server as one of `services`.

    What is slow is not: it would be among the slow tests, which need no server.
    """
    marked = metafunc.definition.get_closest_marker
    if "databases" in metafunc.fixturenames and marked("every_database"):
        names = [] if marked("slow") else SERVERS
        on_servers = [pytest.param(name, marks=pytest.mark.services) for name in names]
        metafunc.parametrize("databases", ["sqlite", *on_servers], indirect=True, scope="module")


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """The database server of that name, which is started when it is first asked for."""
    started: dict[str, Server] = {}
    with ExitStack() as stack:

        def server(name: str) -> Server:
            if name not in started:
                started[name] = stack.enter_context(SERVERS[name]())
            return started[name]

        yield server


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Databases:
    """Where the services of a test keep their jobs."""
    name = getattr(request, "param", "sqlite")
    return servers(name).database if name in SERVERS else lambda: nullcontext({})


@pytest.fixture(scope="session", autouse=True)
def watch() -> Iterator[Watch]:
    """Sees every service; fails the last test of the run, with xdist that of each process, when one has leaked."""
    with Watch() as watch:
        yield watch
    leaks = sorted({str(leak) for leak in watch.find_leaks()})
    assert not leaks, "services have written what they must not:\n" + "\n".join(leaks)


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[Upstream]:
    """The fake OpenAI of a module; a module with keys of its own overrides it."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def shared_env() -> Env:
    """Settings of the module's service, beside the usual ones."""
    return {}


@pytest.fixture(scope="module")
def shared_service(
    tmp_path_factory: pytest.TempPathFactory, databases: Databases, shared_upstream: Upstream, shared_env: Env
) -> Iterator[Service]:
    with databases() as database:
        env = {**database, **shared_env}
        with Service(tmp_path_factory.mktemp("shared"), env, shared_upstream) as service:
            assert service.admin
            yield service


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    """The module's fake OpenAI without a past; what hangs at the end of a test is let go."""
    shared_upstream.reset()
    yield shared_upstream
    shared_upstream.clear_faults()
    shared_upstream.release()


@pytest.fixture
def service(shared_service: Service, upstream: Upstream) -> Iterator[Service]:
    """The module's service; its modes are put back after the test."""
    yield shared_service
    modes = {"delivery": "inline", "registration": False, "auth": True}
    if shared_service.get("/settings", shared_service.admin).json() != modes:
        reply = shared_service.patch("/settings", shared_service.admin, json=modes)
        assert reply.status_code == 200, reply.text


@pytest.fixture
def start(tmp_path: Path, databases: Databases) -> Iterator[Callable[..., tuple[Service, Upstream]]]:
    """`start(keys, env, **server)` → a service and a fake OpenAI of the test's own; both end with it."""
    with ExitStack() as stack:

        def start(
            keys: Mapping[str, KeyRules] | None = None, env: Env | None = None, **server: Any
        ) -> tuple[Service, Upstream]:
            upstream = stack.enter_context(Upstream(keys, **server))
            settings = {**stack.enter_context(databases()), **(env or {})}
            return stack.enter_context(Service(tmp_path, settings, upstream)), upstream

        yield start


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


# Services on database servers that are about to be troubled


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    return servers(request.param)


@pytest.fixture
def database(server: Server) -> Iterator[Env]:
    """The settings of a service that has a fresh database on the server, which runs again after the test."""
    with server.database() as env:
        yield env
        if not server.runs:
            server.start()


@pytest.fixture
def stand_upstream() -> Iterator[Upstream]:
    with Upstream(KEYS) as upstream:
        yield upstream


@pytest.fixture
def stand(tmp_path: Path, database: Env, stand_upstream: Upstream) -> Iterator[Stand]:
    """A service on that database, which is not started yet."""
    stand = Stand(tmp_path, stand_upstream, database)
    yield stand
    stand.kill()


@pytest.fixture
def elsewhere(tmp_path: Path, database: Env, stand_upstream: Upstream) -> Iterator[Stand]:
    """A service with another DATA_DIR, as on another host."""
    elsewhere = Stand(tmp_path / "elsewhere", stand_upstream, database)
    yield elsewhere
    elsewhere.kill()


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    with Link(server.port) as link:
        yield link


@pytest.fixture
def linked(stand: Stand, link: Link) -> Stand:
    """The service, whose way to its server can be cut."""
    stand.change_env({"DB_PORT": str(link.port)})
    return stand
