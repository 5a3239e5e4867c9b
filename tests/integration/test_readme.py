"""The README, word by word: every code block in it is run, or compared with what it is about.

The five minutes run on the real embedded model, as `make run` starts it; what stands after them on a service with the
fake OpenAI. README.uk.md has the same blocks, which `test_documents` sees to. What needs a tool that a machine may lack
is skipped there, unless MUST_HAVE names it: `MUST_HAVE="node npm nginx systemd-analyze" make test`.
"""

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

from config import Settings
from gpt_worker.web_worker import GRACEFUL_TIMEOUT_S
from tests.documents import ROOT, Block, read, read_blocks
from tests.service import Service, free_port
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

READY_S = 60
ARRIVED_S = 60
PARTIAL = 3
BLOCKS = read_blocks("README.md")
READ: set[str] = set()


def section(title: str) -> list[Block]:
    """The blocks of a section, which from then on counts as read. A test unpacks them, so none is overlooked."""
    READ.add(title)
    return [block for block in BLOCKS if block.section == title]


FIVE_MINUTES = section("Five minutes")
FILES = section("Files instead of JSON")
WATCHING = section("Watching a job")
TRANSLATE = section("Translate a CSV")
CLASSIFY = section("Classify with a JSON schema")
PYTHON_RECEIVER = section("Receive webhooks in Python")
NODE_RECEIVER = section("Receive webhooks in Node")
BACK_END = section("Submit from a back end")
NGINX = section("nginx in front")
SYSTEMD = section("A systemd unit")
SEVERAL_KEYS = section("Several keys of one project")
UPGRADING = section("Upgrading and backing up")
ARCHITECTURE = section("Architecture")  # a picture, looked at in test_documents


def test_every_code_block_of_the_readme_belongs_to_a_test() -> None:
    assert {block.section for block in BLOCKS} == READ


@dataclass
class Reader:
    """Somebody with a clone of the repository, a shell in it, and the README. Only ports differ from what it says."""

    clone: Path
    ports: Mapping[int, int]
    """Ours by the README's."""
    variables: dict[str, str] = field(default_factory=dict)
    """What the blocks so far have set."""
    said: str = ""
    """Standard error of the last block."""

    def run(self, block: Block, status: int = 0) -> str:
        """What the block prints."""
        assert block.language == "sh"
        dump = self.clone / "variables"
        dump.unlink(missing_ok=True)
        # Not `set -e`: a shell that somebody types into goes on.
        script = f"set -a\n{self.adapted(block)}\nstatus=$?\nenv -0 >{dump}\nexit $status"
        done = subprocess.run(
            ["bash", "-uo", "pipefail", "-c", script],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == status, f"{script}\n{done.returncode}\n{done.stdout}\n{done.stderr}"
        known = {*self.own_environment, "PWD", "OLDPWD", "SHLVL", "_", "status"}
        told = dict(line.split("=", 1) for line in dump.read_text("utf-8").split("\0") if line)
        self.variables = {name: value for name, value in told.items() if name not in known}
        self.said = done.stderr
        return done.stdout

    @contextmanager
    def running(self, block: Block, port: int) -> Iterator[None]:
        """The block in a terminal of its own, from when it serves the README's `port` until Ctrl-C."""
        assert block.language == "sh"
        log = self.clone / "terminal"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", f"{self.adapted(block)}\nwait"],
                cwd=self.clone,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            await_http(f"http://127.0.0.1:{self.ports[port]}/", process, log)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(40)

    @property
    def own_environment(self) -> dict[str, str]:
        path = f"{self.clone / '.venv' / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.clone), "LANG": "C.UTF-8", "PORT": str(self.ports[3333])}

    @property
    def environment(self) -> dict[str, str]:
        return {**self.own_environment, **self.variables}

    def adapted(self, block: Block) -> str:
        text = block.text
        for theirs, ours in self.ports.items():
            text = re.sub(rf"(?<!\d){theirs}(?!\d)", str(ours), text)
        return text


def make_clone(directory: Path) -> Path:
    for name in subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, directory / name)
    assert Path(sys.prefix) == ROOT / ".venv", "run the tests with `make test`: they go through its .venv"
    # What is installed there is what `make run` would install.
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


def await_http(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when something answers there."""

    def look() -> bool | None:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(url, timeout=5).status_code != 503 or None
        except requests.ConnectionError:
            return None

    eventually(look, url, READY_S)


def eventually(look: Callable[[], Any], what: str, within_s: float = ARRIVED_S) -> Any:
    """What `look` finds, once that is not None."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if (found := look()) is not None:
            return found
        time.sleep(0.05)  # it can only be polled
    pytest.fail(f"{what}: not there within {within_s} s")


def need(tool: str) -> str:
    """The tool's path; where it is missing the test is skipped, or fails if MUST_HAVE names it."""
    path = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        lack(tool, f"{tool} is not installed")
    return str(path)


def lack(tool: str, reason: str) -> None:
    if tool in os.environ.get("MUST_HAVE", "").split():
        pytest.fail(f"{reason}, and MUST_HAVE names {tool}")
    pytest.skip(reason)


def assert_has_shape(real: Any, example: Any, where: str = "reply") -> None:
    """Every member of the example is there, and of its type."""
    assert type(real) is type(example), f"{where}: {real!r} is not like {example!r}"
    if isinstance(example, dict):
        assert example.keys() <= real.keys(), f"{where}: {sorted(real)} lacks some of {sorted(example)}"
        for name, inner in example.items():
            assert_has_shape(real[name], inner, f"{where}.{name}")


def settings_in(block: Block, tmp_path: Path, **others: str) -> Settings:
    """The settings of an `ini` block, checked as the service checks them; "…" stands for letters."""
    lines = [line.partition("=") for line in block.text.splitlines()]
    values = {name: value.replace("…", f"letters-{at}") for at, (name, _, value) in enumerate(lines)}
    return Settings.from_env({"DATA_DIR": str(tmp_path), **others, **values}, tmp_path / "none")


# The five minutes, on the embedded model


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    make_run = FIVE_MINUTES[0]
    assert make_run.text == "make run\n"
    reader = Reader(make_clone(tmp_path_factory.mktemp("newcomer")), {3333: free_port()})
    with reader.running(make_run, 3333):
        url = f"http://127.0.0.1:{reader.ports[3333]}/readyz"
        eventually(lambda: requests.get(url, timeout=5).ok or None, "readiness", READY_S)
        yield reader


def test_the_five_minutes_give_real_answers_inline_by_webhook_and_into_a_file(newcomer: Reader) -> None:
    _, register, login, inline, example, webhook, deliveries, cli_login, cli_submit, _ = FIVE_MINUTES

    account = json.loads(newcomer.run(register))
    newcomer.run(login)
    job = json.loads(newcomer.run(inline))
    accepted = json.loads(newcomer.run(webhook))
    delivery = eventually(lambda: delivered(newcomer, deliveries), "the webhook")
    newcomer.run(cli_login)
    newcomer.run(cli_submit)
    answers = read_csv(newcomer.clone / "answers.csv")

    assert account["user"]["role"] == "admin"
    assert_has_shape(job, json.loads(example.text))
    assert job["status"] == "succeeded"
    assert job["model"] == "smollm2-135m-instruct"
    assert list(job["results"]) == ["capital", "greeting"]
    assert all(answer.strip() for answer in job["results"].values())
    assert accepted["delivery"] == "webhook"
    assert delivery["job_id"] == accepted["id"]
    assert delivery["attempts"][0]["status_code"] == 200
    assert len(answers) == 20
    assert all(answer["result"].strip() for answer in answers)


def delivered(reader: Reader, deliveries: Block) -> Any:
    found = json.loads(reader.run(deliveries))["data"]
    return found[0] if found and found[0]["status"] == "delivered" else None


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"), newline="")))


def test_reviews_are_classified_by_the_embedded_model_too(newcomer: Reader) -> None:
    _, classify, _ = CLASSIFY
    newcomer.run(FIVE_MINUTES[7])

    newcomer.run(classify)
    lines = (newcomer.clone / "sentiments.jsonl").read_text("utf-8").splitlines()

    judgements = {json.loads(json.loads(line)["result"])["sentiment"] for line in lines}
    assert judgements <= {"positive", "negative", "mixed"}


def test_make_run_wrote_a_private_env_with_a_random_key(newcomer: Reader) -> None:
    env = newcomer.clone / ".env"

    assert re.search(r"^APP_KEY=\S{32,}$", env.read_text(), re.MULTILINE)
    assert env.stat().st_mode & 0o777 == 0o600


def test_the_log_says_in_one_plain_line_that_the_embedded_model_answers(newcomer: Reader) -> None:
    lines = (newcomer.clone / "terminal").read_text().splitlines()

    assert any("the embedded model smollm2-135m-instruct" in line and "no GPT key" in line for line in lines)


def test_two_keys_in_env_put_gpt_in_the_place_of_the_embedded_model(tmp_path: Path) -> None:
    settings = settings_in(FIVE_MINUTES[-1], tmp_path)

    assert [key.number for key in settings.api_keys] == [0, 1]
    assert not settings.embedded


# What comes after them, on the fake OpenAI


@dataclass
class Desk:
    """A reader who is logged in as the README says, and the service that they use."""

    reader: Reader
    service: Service
    upstream: Upstream

    @property
    def token(self) -> str:
        return self.reader.variables["TOKEN"]

    def received(self, kind: str) -> dict[str, Any]:
        """The first message of this type in the inbox of an example receiver."""
        inbox = self.reader.clone / "examples" / "inbox"

        def look() -> Any:
            messages = [json.loads(path.read_text("utf-8")) for path in whole_files(inbox)]
            return next((message for message in messages if message["type"] == kind), None)

        message: dict[str, Any] = eventually(look, kind)
        return message


def whole_files(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.json") if path.read_bytes().endswith(b"}")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    _, register, login, _, _, _, _, cli_login, _, _ = FIVE_MINUTES
    keys = {f"sk-fake-{n}": KeyRules(organization="org-one", project="proj_one") for n in range(2)}
    path = tmp_path_factory.mktemp("desk")
    with Upstream(keys) as upstream, Service(path, upstream=upstream) as service:
        reader = Reader(make_clone(path / "clone"), {3333: service.port, 8000: free_port()})
        (reader.clone / "data").symlink_to(service.data_dir)
        for block in (register, login, cli_login):
            reader.run(block)
        yield Desk(reader, service, upstream)


@pytest.fixture(scope="module")
def receiving_desk(desk: Desk) -> Desk:
    """Its webhooks go to port 8000, as the recipe says, and the reader knows the secret."""
    secret, _, _, setting, _ = PYTHON_RECEIVER
    desk.reader.run(secret)
    name, _, value = desk.reader.adapted(setting).strip().partition("=")
    desk.service.restart({name: value})
    return desk


def test_a_csv_is_taken_with_settings_in_the_query_or_as_a_form(desk: Desk) -> None:
    query, form = FILES

    jobs = [json.loads(desk.reader.run(block)) for block in (query, form)]

    for job in jobs:
        assert job["status"] == "succeeded"
        assert next(iter(job["results"])) == "r01"
        assert job["results"]["r07"].endswith(
            "Translate to French: My daughter loves it and takes it everywhere."
        )


def test_a_job_is_watched_to_its_end(desk: Desk) -> None:
    (watch,) = WATCHING
    desk.reader.variables["ID"] = desk.service.submit(["Hello"], token=desk.token).json()["id"]

    events = re.findall(r"^event: (\w+)$", desk.reader.run(watch), re.MULTILINE)

    assert events == ["progress", "finished"]


def test_a_csv_is_translated_and_what_has_no_answer_is_asked_again(desk: Desk) -> None:
    translate, again = TRANSLATE
    desk.upstream.add_fault(Fault(kind=FaultKind.CONTENT_FILTER, contains="five calls"))

    desk.reader.run(translate, status=PARTIAL)
    first = read_csv(desk.reader.clone / "french.csv")
    found = re.search(r"Job ([0-9a-f]{32})", desk.reader.said)
    assert found, desk.reader.said
    desk.reader.variables["ID"] = found[1]
    desk.reader.run(again)
    second = read_csv(desk.reader.clone / "french.csv")

    assert list(first[0]) == ["id", "result", "error_code", "finish_reason"]
    assert [row["id"] for row in first if row["error_code"]] == ["r18"]
    assert [row["id"] for row in second] == [f"r{n:02}" for n in range(1, 21)]
    assert all("Translate to French: " in row["result"] for row in second)


def test_reviews_are_classified_by_a_json_schema(desk: Desk) -> None:
    schema, classify, example = CLASSIFY
    judgements = json.loads(schema.text)["json_schema"]["schema"]["properties"]["sentiment"]["enum"]

    desk.reader.run(classify)
    lines = (desk.reader.clone / "sentiments.jsonl").read_text("utf-8").splitlines()
    answers = [json.loads(line) for line in lines]

    assert len(answers) == 20
    assert_has_shape(answers[0], json.loads(example.text))
    assert_has_shape(json.loads(answers[0]["result"]), json.loads(json.loads(example.text)["result"]))
    assert all(json.loads(answer["result"])["sentiment"] in judgements for answer in answers)


def assert_keeps_signed_messages_alone(desk: Desk, test_message: Block) -> None:
    """The receiver on port 8000 keeps what the service sends, and answers 401 to anybody else."""
    sent = json.loads(desk.reader.run(test_message))
    job = desk.service.submit(["Ґанок"], {"delivery": "webhook"}, desk.token).json()
    finished = desk.received("job.finished")
    address = f"http://127.0.0.1:{desk.reader.ports[8000]}/hook"
    stranger = {"webhook-id": "msg_1", "webhook-timestamp": str(int(time.time()))}
    forged = [{**stranger, "webhook-signature": signature} for signature in ("v1,AAAA", "v1,?", "nonsense")]

    assert desk.received("webhook.test")["data"]
    assert (desk.reader.clone / "examples" / "inbox" / f"{sent['id']}.json").is_file()
    assert finished["data"]["id"] == job["id"]
    assert finished["data"]["results"] == {"0": "answer to: Ґанок"}
    for headers in ({}, *forged):
        assert requests.post(address, data=b"{}", headers=headers, timeout=10).status_code == 401, headers
    assert not (desk.reader.clone / "examples" / "inbox" / "msg_1.json").exists()


def empty_inbox(desk: Desk) -> None:
    shutil.rmtree(desk.reader.clone / "examples" / "inbox", ignore_errors=True)


def test_the_python_receiver_keeps_signed_messages_alone(receiving_desk: Desk) -> None:
    _, _, receive, _, test_message = PYTHON_RECEIVER
    empty_inbox(receiving_desk)

    with receiving_desk.reader.running(receive, 8000):
        assert_keeps_signed_messages_alone(receiving_desk, test_message)


def test_the_node_receiver_keeps_signed_messages_alone(receiving_desk: Desk) -> None:
    _, receive = NODE_RECEIVER
    need("node")
    install_node_packages(receiving_desk.reader.clone / "examples")
    empty_inbox(receiving_desk)

    with receiving_desk.reader.running(receive, 8000):
        assert_keeps_signed_messages_alone(receiving_desk, PYTHON_RECEIVER[-1])


def install_node_packages(directory: Path) -> None:
    """The packages of `package-lock.json`, from npm's registry."""
    command = [need("npm"), "ci", "--no-audit", "--no-fund", "--fetch-retries=0"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        lack("npm", f"npm can't install the receiver's packages: {done.stderr[-500:]}")


def test_a_back_end_may_submit_an_order_again_and_gets_one_webhook(
    receiving_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = BACK_END
    empty_inbox(receiving_desk)
    monkeypatch.setenv("GPT_WORKER_URL", receiving_desk.service.url)
    monkeypatch.setenv("GPT_WORKER_TOKEN", json.loads(receiving_desk.reader.run(tokens))["token"])
    back_end = load(receiving_desk.reader.clone / "examples" / "backend.py")

    with receiving_desk.reader.running(PYTHON_RECEIVER[2], 8000):
        ids = [back_end.submit("1001", {"title": "A lamp"}) for _ in range(2)]
        message = receiving_desk.received("job.finished")

    assert ids == [message["data"]["id"]] * 2
    assert message["data"]["metadata"] == {"order": "1001"}
    assert message["data"]["results"] == {"title": "answer to: Translate to French: A lamp"}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_behind_nginx_are_good(tmp_path: Path) -> None:
    settings = settings_in(NGINX[0], tmp_path)

    assert settings.host == "127.0.0.1"
    assert settings.public_url.startswith("https://")


def test_behind_nginx_metrics_are_closed_and_long_replies_and_files_get_through(
    desk: Desk, tmp_path: Path
) -> None:
    _, configuration = NGINX
    port = free_port()
    text = desk.reader.adapted(configuration)

    with nginx(text.replace("listen 443", f"listen 127.0.0.1:{port}"), tmp_path) as client:
        url = f"https://127.0.0.1:{port}"
        eventually(lambda: reachable(client, f"{url}/healthz"), "nginx")
        headers = {"Authorization": f"Bearer {desk.token}", "Content-Type": "application/jsonl"}
        large = b"".join(b'{"text": "%s"}\n' % (b"word " * 400) for _ in range(1000))
        job = client.post(f"{url}/jobs", data=large, headers=headers, timeout=60).json()
        with client.get(f"{url}/jobs/{job['id']}/events", headers=headers, stream=True, timeout=30) as stream:
            events = [line for line in stream.iter_lines() if line.startswith(b"event:")]

        assert desk.service.get("/metrics").status_code == 200
        assert client.get(f"{url}/metrics", timeout=10).status_code == 401
        assert len(large) > 1 << 20  # what nginx takes unless it is told otherwise
        assert job["status"] == "succeeded"
        assert events[-1] == b"event: finished"


def test_nginx_waits_longer_than_an_inline_reply_may_take(tmp_path: Path) -> None:
    found = re.search(r"proxy_read_timeout (\d+)s;", NGINX[1].text)

    assert found
    assert int(found[1]) > Settings.from_env({"DATA_DIR": str(tmp_path)}, tmp_path / "none").inline_wait_s


@contextmanager
def nginx(server: str, directory: Path) -> Iterator[requests.Session]:
    """nginx with this configuration and a certificate of its own; a client that goes on with it."""
    program = need("nginx")
    make_certificate = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 "
        "-keyout gpt.example.org.key -out gpt.example.org.pem"
    )
    command = [need("openssl"), *make_certificate.split()]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    (directory / "server.conf").write_text(server.replace("/etc/ssl/", f"{directory}/"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""  # the files here are ours alone
    main = f"{user} daemon off; pid {directory}/pid; error_log stderr; events {{}}"
    conf = directory / "nginx.conf"
    conf.write_text(f"{main} http {{ access_log off; {temporary} include {directory}/server.conf; }}\n")
    command = [program, "-p", str(directory), "-c", str(conf), "-e", "stderr"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr, checked.stderr
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with requests.Session() as client:
            client.trust_env = False
            client.verify = str(directory / "gpt.example.org.pem")
            yield client
    finally:
        process.terminate()
        process.wait(10)


def reachable(client: requests.Session, url: str) -> bool | None:
    try:
        return client.get(url, timeout=5).ok or None
    except requests.ConnectionError:
        return None


def test_the_systemd_unit_gives_the_service_its_time_to_stop() -> None:
    (unit,) = SYSTEMD
    values = values_of(unit)

    assert int(values["TimeoutStopSec"]) > GRACEFUL_TIMEOUT_S + 2  # and what the worker may take after it
    assert values["KillMode"] == "mixed"
    assert values["Restart"] == "always"
    assert values["ExecStart"].endswith(".venv/bin/gunicorn wsgi:app")


def test_the_systemd_unit_gives_good_settings_with_the_keys_of_its_file(tmp_path: Path) -> None:
    (unit,) = SYSTEMD
    values = dict(pair.split("=", 1) for pair in values_of(unit)["Environment"].split())
    secrets = {"APP_KEY": "x" * 32, "GPT_KEY_0": "sk-0", "GPT_KEY_1": "sk-1"}

    settings = Settings.from_env({**values, **secrets}, tmp_path / "none")

    assert settings.production
    assert settings.data_dir == Path("/var/lib") / values_of(unit)["StateDirectory"]


def values_of(unit: Block) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.text.splitlines() if "=" in line and line[0] != "#")


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    (unit,) = SYSTEMD
    path = tmp_path / "gpt-worker.service"
    path.write_text(unit.text.replace("/opt/gpt-worker", str(ROOT)))

    done = subprocess.run(
        [need("systemd-analyze"), "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr, done.stderr


def test_keys_of_one_project_are_one_group(desk: Desk) -> None:
    (show,) = SEVERAL_KEYS
    desk.service.submit([f"text {n}" for n in range(40)], token=desk.token)

    keys = json.loads(desk.reader.run(show))["data"]

    assert [key["group"] for key in keys] == ["org-one/proj_one"] * 2
    assert all("bound_by" in key for key in keys)


def test_a_copy_made_while_the_service_runs_is_whole_and_is_restored(desk: Desk) -> None:
    _, back_up, restore = UPGRADING
    job = desk.service.submit(["kept"], token=desk.token).json()

    assert "checked" in desk.reader.run(back_up)
    assert (desk.reader.clone / "backup.sqlite3").stat().st_mode & 0o777 == 0o600
    copy = sqlite3.connect(desk.reader.clone / "backup.sqlite3")
    try:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM jobs WHERE id = ?", [job["id"]]).fetchone() == (1,)
    finally:
        copy.close()
    later = desk.service.submit(["later"], token=desk.token).json()
    desk.service.kill()
    desk.reader.run(restore)
    desk.service.start()

    assert desk.service.job(job["id"], desk.token) == job
    assert desk.service.get(f"/jobs/{later['id']}", desk.token).status_code == 404


def test_what_a_version_pins_is_installed_by_pip(desk: Desk) -> None:
    install, _, _ = UPGRADING

    desk.reader.run(install)


def test_every_metric_that_is_named_is_there(desk: Desk) -> None:
    paragraph = re.search(r"`gpt_worker_`: (.+?)\. ", read("README.md").replace("\n", " "))
    assert paragraph
    metrics = desk.service.get("/metrics", desk.token).text

    for name in re.findall(r"`(\w+)`", paragraph[1]):
        assert f"# TYPE gpt_worker_{name} " in metrics, name


def test_the_docs_page_and_the_description_are_there(desk: Desk) -> None:
    for path in ("/docs", "/openapi.json"):
        reply = desk.service.get(path, allow_redirects=True)

        assert reply.status_code == 200, path
