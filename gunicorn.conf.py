"""gunicorn's settings: `gunicorn wsgi:app`, with no flags, is the whole server."""

import os

from gunicorn.arbiter import Arbiter

from config import Settings, SettingsError
from gpt_worker import logs, web_worker

try:
    settings = Settings.from_env()
except SettingsError as error:
    web_worker.refuse(str(error))

logs.configure(settings.environment)

wsgi_app = "wsgi:app"
bind = f"[{settings.host}]:{settings.port}"  # so gunicorn takes any host for what it is: ::, and "unix" too

# `workers` stays unset, so that WEB_CONCURRENCY reaches the check instead of being overruled in silence.
worker_class = web_worker.WebWorker
logger_class = web_worker.ServerLogger
threads = web_worker.THREADS
worker_connections = 4096  # a silent one costs a file descriptor, not a thread; at so many the idlest go
keepalive = 75  # longer than the minute after which common proxies let go of an idle connection
limit_request_line = 8190  # signed links are long
graceful_timeout = web_worker.GRACEFUL_TIMEOUT_S
timeout = 120  # of the main loop, which never waits for a request; it bounds no request
max_requests = 0
preload_app = False
http_parser = "python"
# Else any local client, or proxy that passes its headers on, may move us to another path by SCRIPT_NAME.
forwarder_headers = ""
sendfile = False  # it would wait for ever for a client that takes nothing
control_socket_disable = True
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # gunicorn makes its file there safely
if os.access(SHARED_MEMORY, os.W_OK):
    worker_tmp_dir = SHARED_MEMORY  # the heartbeat must not wait for a busy disk


def nworkers_changed(server: Arbiter, _new_value: int, old_value: int | None) -> None:
    """The first hook of all, called before anything is logged, forked or bound."""
    if old_value is None:
        web_worker.take_charge(server, settings)
