"""Servers that stand for the clouds: S3 (moto), Google Cloud Storage and Azure, each a process on a loopback port.

`make test-services` installs them beside the environment that runs the tests. One that is missing skips its tests; it
fails them where MUST_HAVE names it, or where CI=true.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest
import requests

from tests.service import ROOT, free_port

PATIENCE_S = 30.0
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # public
)


def find(name: str, path: Path) -> str:
    """The emulator's program."""
    found = shutil.which(path)
    if found is None:
        do_without(name, f"{name} is not installed: run make test-services")
    return found


def do_without(name: str, reason: str) -> NoReturn:
    """Skips the test, or fails it where this must be there."""
    if os.environ.get("CI") == "true" or name in os.environ.get("MUST_HAVE", "").split():
        pytest.fail(reason)
    pytest.skip(reason)


def _of_python(name: str) -> Path:
    """In the environment beside the one that runs this."""
    return Path(f"{sys.prefix}-services", "bin", name)


@contextmanager
def run(command: Sequence[str], url: str) -> Iterator[None]:
    """The server, once it answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise TimeoutError(f"{command[0]} does not answer\n{log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield
        finally:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        requests.get(url, timeout=2)
    except requests.RequestException:
        return False
    return True


@contextmanager
def s3() -> Iterator[str]:
    """Its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with run([find("moto", _of_python("moto_server")), "-H", "127.0.0.1", "-p", str(port)], url):
        yield url


@contextmanager
def google_cloud() -> Iterator[str]:
    """Its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = find("gcp-storage-emulator", _of_python("gcp-storage-emulator"))
    with run([program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"], url):
        yield url


@contextmanager
def azure() -> Iterator[str]:
    """Its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = find("azurite", ROOT / ".ci" / "azurite" / "node_modules" / ".bin" / "azurite-blob")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", folder]
        with run([program, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)], url):
            yield url


class _Refusal(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # S3's clients wait for a 100 before they send
    timeout = 5.0

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _refuse  # noqa: N815 — the names that http.server calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 — the name it has above
        """Nothing is printed."""


@contextmanager
def refusing() -> Iterator[str]:
    """A server that refuses everything with 403; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def azure_connection(url: str) -> str:
    """The connection string of an Azure at this address."""
    name = "devstoreaccount1"
    return (
        f"DefaultEndpointsProtocol=http;AccountName={name};AccountKey={AZURITE_KEY};BlobEndpoint={url}/{name}"
    )
