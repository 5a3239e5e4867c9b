"""The settings of the service: one frozen object, read once from the environment and `.env`, checked whole.

This is the only reader of the environment. A bad value raises `SettingsError`, whose message is the one line that
the operator sees: it names the setting and says what to do, and never shows a secret.
"""

import ast
import base64
import binascii
import hashlib
import hmac
import importlib.util
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

OPENAI_BASE_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-5.4-mini"
ENVIRONMENTS = ("development", "production", "test")
MIN_APP_KEY_LENGTH = 32
PASSWORD_LENGTHS = range(12, 257)
MODEL_PATTERN = r"^[\x21-\x7e]+$"  # of a model's name, in GPT_MODEL and in a job
MAX_MODEL_LENGTH = 200
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
AS_TYPED = frozenset({"ADMIN_PASSWORD", "DB_PASSWORD"})  # a space at the end of a password belongs to it
# What each DRIVE_DISK needs, and what it may have beside that. By whole names: a machine's environment has other
# AZURE_… of its own.
DRIVE_SETTINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "local": ((), ()),
    "s3": (("S3_BUCKET", "S3_KEY", "S3_SECRET"), ("S3_REGION", "S3_ENDPOINT")),
    "google-cloud": (("GCS_BUCKET",), ("GCS_KEY_FILENAME", "GCS_ENDPOINT")),
    "azure": (("AZURE_CONTAINER", "AZURE_CONNECTION_STRING"), ()),
    "custom": (("DRIVE_URL",), ()),
}
ONE_WORD = (r"[\x21-\x7e]{1,1000}", "has a character that does not belong there: copy it again")
DRIVE_FORMS: Mapping[str, tuple[str, str]] = {
    # Amazon's old buckets have longer names than its new ones, with capitals and underscores.
    "S3_BUCKET": (
        r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}",
        "must be a bucket's name: 3 to 255 letters, digits and . _ -, a letter or a digit first",
    ),
    "GCS_BUCKET": (
        r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]",
        "must be a bucket's name: 3 to 222 small letters, digits and . _ -, a letter or a digit first and last",
    ),
    "AZURE_CONTAINER": (
        r"\$web|(?=.{3,63}\Z)[a-z0-9]+(-[a-z0-9]+)*",
        "must be a container's name: 3 to 63 small letters, digits and single hyphens between them",
    ),
    **dict.fromkeys(("S3_KEY", "S3_SECRET", "S3_REGION"), ONE_WORD),
    "AZURE_CONNECTION_STRING": (
        r"UseDevelopmentStorage=true|(?=.*(AccountName|BlobEndpoint)=)(\w+=[^;\s]+;)*\w+=[^;\s]+;?",
        "must be of the form Name=value;Name=value, with AccountName and AccountKey",
    ),
    "DRIVE_URL": (
        r"[a-z][a-z0-9+.-]*://\S*",
        "must be an address that fsspec knows: sftp://user@host/folder, or file:///srv/results for a directory",
    ),
}
# The extra of pyproject.toml that has the driver, by disk or by the scheme of DRIVE_URL.
DRIVE_EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("google-cloud", "gs", "gcs"), "google-cloud"),
    **dict.fromkeys(("azure", "az", "abfs", "abfss"), "azure"),
}


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A kind of database that runs on a server: what addresses call it, SQLAlchemy's name of our driver, its port."""

    schemes: frozenset[str]
    driver: str
    package: str  # the driver, as it is imported
    port: int


# By DB_CONNECTION, which is also the extra of pyproject.toml that has the driver.
DATABASE_SERVERS: Mapping[str, ServerKind] = {
    "mysql": ServerKind(frozenset({"mysql", "mariadb"}), "mysql+pymysql", "pymysql", 3306),
    "pgsql": ServerKind(
        frozenset({"pgsql", "postgres", "postgresql"}), "postgresql+psycopg", "psycopg", 5432
    ),
    "mssql": ServerKind(frozenset({"mssql"}), "mssql+mssqlpython", "mssql_python", 1433),
    "oracle": ServerKind(frozenset({"oracle"}), "oracle+oracledb", "oracledb", 1521),
}


class SettingsError(Exception):
    """A setting that the service can't start with; the message is one line and shows no secret."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One GPT_KEY_<n> and the endpoint it belongs to."""

    number: int
    secret: str = field(repr=False)
    base_url: str

    @property
    def name(self) -> str:
        return f"key {self.number}"


@dataclass(frozen=True, slots=True)
class DriveSettings:
    """DRIVE_DISK, and by their names the settings that belong to it."""

    disk: str = "local"
    values: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def scheme(self) -> str:
        """Of DRIVE_URL; empty for the other disks."""
        return self.values.get("DRIVE_URL", "").partition("://")[0]

    @property
    def extra(self) -> str | None:
        """The extra of pyproject.toml, and the requirements-….txt, that the driver is installed by."""
        return DRIVE_EXTRAS.get(self.scheme or self.disk)


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """Where jobs are kept: an SQLite file, or a database on a server."""

    connection: str  # sqlite, or one of DATABASE_SERVERS
    setting: str  # the one that names it, for messages about it
    where: str  # for people, with no secret
    url: str = field(repr=False)  # as SQLAlchemy takes it, with the password
    path: Path | None = None  # of SQLite's file

    @property
    def extra(self) -> str | None:
        """The extra of pyproject.toml, and the requirements-….txt, that the driver is installed by."""
        return self.connection if self.connection in DATABASE_SERVERS else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, checked. `api_keys` is empty when the embedded model answers."""

    environment: str
    host: str
    port: int
    data_dir: Path
    app_key: str = field(repr=False)
    api_keys: tuple[ApiKey, ...] = field(repr=False)
    model: str
    model_path: Path | None
    threads_per_key: int
    max_in_flight: int | None  # over all keys
    call_deadline_s: float
    request_api: str
    public_url: str
    webhook_secret: str = field(repr=False)
    database: DatabaseSettings
    drive: DriveSettings
    inline_wait_s: float
    max_json_bytes: int
    max_upload_bytes: int
    max_tasks: int
    max_user_jobs: int | None  # None: no limit, here and below
    max_user_tasks: int | None
    max_user_requests_per_minute: int | None
    retain_days: int
    admin_email: str | None
    admin_password: str | None = field(repr=False)

    @property
    def embedded(self) -> bool:
        """Whether the embedded model answers, because there is no API key."""
        return not self.api_keys

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def offline(self) -> bool:
        """NODE_ENV=test: nothing but loopback addresses may be called."""
        return self.environment == "test"

    @property
    def extras(self) -> tuple[str, ...]:
        """The extras of pyproject.toml that these settings need."""
        return tuple(extra for extra in (self.drive.extra, self.database.extra) if extra is not None)

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, dotenv: Path | None = None, *, for_command: bool = False
    ) -> "Settings":
        """Read and check everything.

        Args:
            env: the process environment; it wins over the file. Default: `os.environ`.
            dotenv: the file with the rest; not read when NODE_ENV is test. Default: `.env` beside this module.
            for_command: for one that signs nothing. No APP_KEY is made for it: without one it has a passing one.

        Raises:
            SettingsError: naming the first setting that is wrong.
        """
        process_env = dict(os.environ if env is None else env)
        path = Path(__file__).with_name(".env") if dotenv is None else dotenv
        return _read(_Source.merge(process_env, path), makes_key=not for_command)


class _Source:
    """Settings by name; empty means absent."""

    def __init__(self, values: Mapping[str, str | None]) -> None:
        self.values = {
            name: value if name in AS_TYPED else value.strip()
            for name, value in values.items()
            if value and value.strip()
        }

    @classmethod
    def merge(cls, env: Mapping[str, str], dotenv: Path) -> "_Source":
        if _environment(cls(env)) == "test" or not dotenv.is_file():
            return cls(env)
        try:
            in_file = dotenv_values(dotenv, interpolate=False, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f".env can't be read ({type(error).__name__}): save it as UTF-8 text"
            ) from error
        if env.get("NODE_ENV") or env.get("APP_ENV"):
            # Two names of one setting: neither comes from the file then.
            in_file = {name: value for name, value in in_file.items() if name not in ("NODE_ENV", "APP_ENV")}
        return cls({**in_file, **env})

    def text(self, name: str, default: str = "") -> str:
        text = self.values.get(name, default)
        if not text.isprintable():  # control characters, and bytes that are no UTF-8
            raise SettingsError(f"{name} has a character that can't be printed: type it again")
        return text

    def integer(self, name: str, default: int, lowest: int, highest: int) -> int:
        text = self.values.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) or not lowest <= int(text) <= highest:
            raise SettingsError(f"{name} must be a whole number from {lowest} to {highest}")
        return int(text)

    def seconds(self, name: str, default: float, lowest: float, highest: float) -> float:
        text = self.values.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text, re.ASCII) or not lowest <= float(text) <= highest:
            raise SettingsError(f"{name} must be a number of seconds from {lowest:g} to {highest:g}")
        return float(text)

    def size_bytes(self, name: str, default: int, highest: int) -> int:
        text = self.values.get(name)
        if text is None:
            return default
        match = re.fullmatch(r"(\d{1,15}) ?(|B|KiB|MiB|GiB)", text, re.ASCII)
        size = int(match[1]) * UNITS[match[2]] if match else 0
        if not 1 <= size <= highest:
            raise SettingsError(
                f"{name} must be a number of bytes from 1 to {highest}, such as 16777216 or 16MiB"
            )
        return size

    def base_url(self, name: str, default: str) -> str:
        """An address that paths are appended to: without a slash at its end, and without a query."""
        text = self.text(name, default).rstrip("/")
        if not _is_http_address(text) or "?" in text:
            raise SettingsError(f"{name} must be an address such as https://example.org/path")
        return text

    def exact_url(self, name: str, default: str) -> str:
        """An address that is called exactly as it is given."""
        text = self.text(name, default)
        if not _is_http_address(text):
            raise SettingsError(f"{name} must be an address such as https://example.org/path?code=abc")
        return text


def _is_http_address(text: str) -> bool:
    """Whether it is a whole http(s) address with no user, no fragment and no space in it."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(valid) and "@" not in parts.netloc and not re.search(r"[\s\x00-\x1f#]", text)


def _read(source: _Source, *, makes_key: bool) -> Settings:
    environment = _environment(source)
    port = source.integer("PORT", 3333, 1, 65535)
    data_dir = _absolute("DATA_DIR", source.text("DATA_DIR", "./data"))
    if "?" in str(data_dir):
        raise SettingsError("DATA_DIR must have no question mark: a database's address would end there")
    api_keys = _api_keys(source)
    if not api_keys and environment == "production":
        raise SettingsError("GPT_KEY_0 and GPT_KEY_1 are needed in production: set at least two API keys")
    model = source.text("GPT_MODEL", DEFAULT_MODEL)
    if len(model) > MAX_MODEL_LENGTH or not re.fullmatch(MODEL_PATTERN, model):
        raise SettingsError(
            f"GPT_MODEL must be a model's name: up to {MAX_MODEL_LENGTH} characters, no spaces"
        )
    if model in deprecated_models():
        raise SettingsError("GPT_MODEL names a model that OpenAI has deprecated: choose a current one")
    admin_email, admin_password = _admin(source)
    database = _database(source, data_dir, offline=environment == "test")
    host = _host(source)
    app_key = _app_key(source, environment, data_dir if makes_key else None)
    return Settings(
        environment=environment,
        host=host,
        port=port,
        data_dir=data_dir,
        app_key=app_key,
        api_keys=api_keys,
        model=model,
        model_path=_model_path(source),
        threads_per_key=source.integer("GPT_THREADS_PER_KEY", 64, 1, 1024),
        max_in_flight=source.integer("GPT_MAX_IN_FLIGHT", 0, 0, 100_000) or None,
        call_deadline_s=source.seconds("GPT_DEADLINE_S", 300, 0.1, 3600),
        request_api=source.exact_url("REQUEST_API", f"http://127.0.0.1:{port}"),
        public_url=source.base_url("PUBLIC_URL", f"http://127.0.0.1:{port}"),
        webhook_secret=_webhook_secret(source, app_key),
        database=database,
        drive=_drive(source),
        inline_wait_s=source.seconds("INLINE_WAIT_S", 300, 0, 86_400),
        max_json_bytes=source.size_bytes("MAX_JSON_BYTES", 16 << 20, 1 << 30),
        max_upload_bytes=source.size_bytes("MAX_UPLOAD_BYTES", 1 << 30, 1 << 40),
        max_tasks=source.integer("MAX_TASKS", 2_000_000, 1, 1_000_000_000),
        max_user_jobs=source.integer("MAX_USER_JOBS", 1000, 0, 1_000_000) or None,
        max_user_tasks=source.integer("MAX_USER_TASKS", 10_000_000, 0, 1_000_000_000) or None,
        max_user_requests_per_minute=(
            source.integer("MAX_USER_REQUESTS_PER_MINUTE", 6000, 0, 1_000_000_000) or None
        ),
        retain_days=source.integer("RETAIN_DAYS", 30, 0, 36_500),
        admin_email=admin_email,
        admin_password=admin_password,
    )


def _environment(source: _Source) -> str:
    node_env, app_env = source.text("NODE_ENV"), source.text("APP_ENV")
    if node_env and app_env and node_env != app_env:
        raise SettingsError("NODE_ENV and APP_ENV are both set and differ: keep one of them")
    name, environment = ("NODE_ENV", node_env) if node_env else ("APP_ENV", app_env or "development")
    if environment not in ENVIRONMENTS:
        raise SettingsError(f"{name} must be one of {', '.join(ENVIRONMENTS)}")
    return environment


def _api_keys(source: _Source) -> tuple[ApiKey, ...]:
    base_url = source.base_url("GPT_BASE_URL", OPENAI_BASE_URL)
    numbers = sorted(
        int(name[8:]) for name in source.values if re.fullmatch(r"GPT_KEY_(0|[1-9]\d{0,5})", name, re.ASCII)
    )
    odd = [
        name
        for name in source.values
        if name.startswith("GPT_KEY_") and not re.fullmatch(r"GPT_KEY_(0|[1-9]\d{0,5})", name, re.ASCII)
    ]
    if odd:
        raise SettingsError(f"{min(odd)} is not a key's name: keys are numbered GPT_KEY_0, GPT_KEY_1, …")
    for expected, number in enumerate(numbers):
        if number != expected:
            raise SettingsError(
                f"GPT_KEY_{expected} is missing, but GPT_KEY_{number} is set: number them without a gap"
            )
    if len(numbers) == 1:
        raise SettingsError(
            "GPT_KEY_1 is missing: the service needs at least two API keys, or none to try it out"
        )
    keys: list[ApiKey] = []
    for number in numbers:
        secret = source.text(f"GPT_KEY_{number}")
        if not re.fullmatch(r"[\x21-\x7e]{1,1000}", secret):
            raise SettingsError(f"GPT_KEY_{number} has a character that no API key has: copy it again")
        twin = next((key.number for key in keys if key.secret == secret), None)
        if twin is not None:
            raise SettingsError(f"GPT_KEY_{number} is the same key as GPT_KEY_{twin}: each must differ")
        keys.append(ApiKey(number, secret, source.base_url(f"GPT_BASE_URL_{number}", base_url)))
    for name in source.values:
        suffix = name.removeprefix("GPT_BASE_URL_")
        if suffix != name and suffix not in {str(key.number) for key in keys}:
            raise SettingsError(f"{name} belongs to no key: GPT_KEY_{suffix} is not set")
    return tuple(keys)


def _app_key(source: _Source, environment: str, data_dir: Path | None) -> str:
    """The one that is set, else the one kept in `data_dir`, made there if need be; None: one that nothing keeps."""
    app_key = source.text("APP_KEY")
    if app_key:
        if len(app_key) < MIN_APP_KEY_LENGTH:
            raise SettingsError(f"APP_KEY must have at least {MIN_APP_KEY_LENGTH} characters")
        return app_key
    if environment == "production":
        raise SettingsError(
            f"APP_KEY is needed in production: set a secret of {MIN_APP_KEY_LENGTH} characters or more"
        )
    return secrets.token_urlsafe(48) if data_dir is None else _made_once(data_dir)


def _made_once(data_dir: Path) -> str:
    path = data_dir / "app-key"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            app_key = path.read_text("ascii").strip()
        else:
            app_key = secrets.token_urlsafe(48)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(app_key + "\n")
                file.flush()
                os.fsync(file.fileno())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"DATA_DIR can't be used ({type(error).__name__}): {data_dir} must be writable"
        ) from error
    if len(app_key) < MIN_APP_KEY_LENGTH:
        raise SettingsError(f"APP_KEY in {path} is too short: delete that file, or set APP_KEY")
    return app_key


def derive(app_key: str, purpose: str) -> bytes:
    """32 secret bytes for one purpose, from APP_KEY (HMAC-SHA256, so that no purpose tells of another)."""
    return hmac.digest(app_key.encode(), f"gpt-worker {purpose}".encode(), hashlib.sha256)


def _webhook_secret(source: _Source, app_key: str) -> str:
    secret = source.text("WEBHOOK_SECRET")
    if not secret:
        return "whsec_" + base64.b64encode(derive(app_key, "webhook")).decode()
    try:
        if not secret.startswith("whsec_"):
            raise ValueError
        length = len(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
    except (ValueError, binascii.Error):
        length = 0
    if not 24 <= length <= 64:
        raise SettingsError("WEBHOOK_SECRET must be whsec_ and the base64 of 24 to 64 random bytes")
    return secret


def _host(source: _Source) -> str:
    """An IP address, or a name; whether it is this machine's is found out when it is bound."""
    host = source.text("HOST", "0.0.0.0")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
        if len(host) > 253 or not re.fullmatch(rf"{label}(\.{label})*", host):
            raise SettingsError(
                "HOST must be an address of this machine, such as 0.0.0.0, :: or localhost"
            ) from None
    return host


def _database(source: _Source, data_dir: Path, *, offline: bool) -> DatabaseSettings:
    """The database of DATABASE_URL, else of DB_CONNECTION and the settings beside it."""
    url = source.text("DATABASE_URL")
    if url and not url.startswith("sqlite:"):
        return _server_of_url(url, offline=offline)
    connection = source.text("DB_CONNECTION", "sqlite")
    if connection == "sqlite" or url:
        setting, path = _database_file(source, data_dir)
        address = "sqlite:///" + str(path).replace("%", "%25")
        return DatabaseSettings("sqlite", setting, str(path), address, path)
    kind = _database_kind(connection)
    if kind is None:
        raise SettingsError(f"DB_CONNECTION must be one of {', '.join(('sqlite', *DATABASE_SERVERS))}")
    host, user, database = source.text("DB_HOST"), source.text("DB_USER"), source.text("DB_DATABASE")
    for name, value in (("DB_HOST", host), ("DB_USER", user), ("DB_DATABASE", database)):
        if not value:
            raise SettingsError(f"{name} is missing: DB_CONNECTION={connection} needs it")
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]{1,253}", host):
        raise SettingsError("DB_HOST must be a name or an address, without a port")
    by_service = kind == "oracle"  # a path would be the older SID
    return _server(
        kind,
        "DB_HOST",
        offline=offline,
        username=user,
        password=source.text("DB_PASSWORD") or None,
        host=host,
        port=source.integer("DB_PORT", DATABASE_SERVERS[kind].port, 1, 65535),
        database=None if by_service else database,
        query={"service_name": database} if by_service else {},
    )


def _database_kind(name: str) -> str | None:
    return next((kind for kind, server in DATABASE_SERVERS.items() if name in server.schemes), None)


def _server_of_url(text: str, *, offline: bool) -> DatabaseSettings:
    """The server of DATABASE_URL, whose query the driver gets as it is."""
    from sqlalchemy.engine import make_url  # here: only a server wants it, and the client has no server
    from sqlalchemy.exc import ArgumentError

    kind = _database_kind(re.split(r"[+:]", text, maxsplit=1)[0])
    example = "such as postgresql://user:password@host/database"
    if kind is None:
        names = sorted(set().union(*(server.schemes for server in DATABASE_SERVERS.values())))
        raise SettingsError(f"DATABASE_URL must begin with sqlite, {', '.join(names)} and ://, {example}")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # the error may quote the password
        raise SettingsError(f"DATABASE_URL is not an address, {example}") from None
    host = url.host or url.query.get("host") or url.query.get("unix_socket")
    database = url.database or url.query.get("service_name")
    for part, value in (("host", host), ("user", url.username), ("database", database)):
        if not value:
            raise SettingsError(f"DATABASE_URL names no {part}: write one, {example}")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise SettingsError("DATABASE_URL has a port that is no number from 1 to 65535")
    parts = url._asdict()
    del parts["drivername"]
    return _server(kind, "DATABASE_URL", offline=offline, **parts)


def _server(kind: str, setting: str, *, offline: bool, **parts: Any) -> DatabaseSettings:
    from sqlalchemy.engine import URL

    url = URL.create(DATABASE_SERVERS[kind].driver, **parts)
    query = url.query
    host = url.host or query.get("host") or query.get("unix_socket")
    if offline and not _is_here(str(host)):
        raise SettingsError(
            f"{setting}: NODE_ENV=test reaches nothing outside: name a server of this machine"
        )
    place = f"{host}:{url.port or DATABASE_SERVERS[kind].port}" if url.host else str(host)
    where = f"{url.database or query.get('service_name')} on {place}"
    return DatabaseSettings(kind, setting, where, url.render_as_string(hide_password=False))


def _is_here(host: str) -> bool:
    """Whether it is a loopback address or a socket's path."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("/")


def _database_file(source: _Source, data_dir: Path) -> tuple[str, Path]:
    """The setting that names the SQLite file, and its absolute path."""
    url = source.text("DATABASE_URL")
    if url:
        match = re.fullmatch(r"sqlite:///(/[^?]+)", url)
        path = unquote(match[1]) if match else ""
        if not path or not path.isprintable() or "?" in path or ":memory:" in path:
            raise SettingsError(
                "DATABASE_URL: a SQLite file is named by its absolute path, "
                "such as sqlite:////var/lib/jobs.sqlite3"
            )
        return "DATABASE_URL", Path(path)
    name = source.text("DB_DATABASE")
    if "?" in name or name == ":memory:" or name.startswith("file:"):
        raise SettingsError("DB_DATABASE must be the plain name of a file in DATA_DIR, or an absolute path")
    return "DB_DATABASE" if name else "DATA_DIR", data_dir / (name or "gpt-worker.sqlite3")


def _drive(source: _Source) -> DriveSettings:
    """The drive's settings: those of the chosen disk are there, and none of another."""
    disk = source.text("DRIVE_DISK", "local")
    if disk not in DRIVE_SETTINGS:
        raise SettingsError(f"DRIVE_DISK must be one of {', '.join(DRIVE_SETTINGS)}")
    of_others = [
        (owner, name) for owner, names in DRIVE_SETTINGS.items() if owner != disk for name in sum(names, ())
    ]
    for owner, name in of_others:
        if name in source.values:
            raise SettingsError(
                f"{name} belongs to DRIVE_DISK={owner}, but DRIVE_DISK is {disk}: leave one of them out"
            )
    needed, optional = DRIVE_SETTINGS[disk]
    for name in needed:
        if name not in source.values:
            raise SettingsError(f"{name} is missing: DRIVE_DISK={disk} needs it")
    values = {name: source.text(name) for name in (*needed, *optional) if name in source.values}
    for name in values.keys() & {"S3_ENDPOINT", "GCS_ENDPOINT"}:
        values[name] = source.base_url(name, "")
    for name, (pattern, what) in DRIVE_FORMS.items():
        if name in values and not re.fullmatch(pattern, values[name], re.ASCII):
            raise SettingsError(f"{name} {what}")
    if disk == "google-cloud":
        _check_google_cloud(values)
    return DriveSettings(disk, values)


def _check_google_cloud(values: dict[str, str]) -> None:
    path = values.get("GCS_KEY_FILENAME")
    if path is not None:
        values["GCS_KEY_FILENAME"] = str(_absolute("GCS_KEY_FILENAME", path))
    elif "GCS_ENDPOINT" not in values:  # an emulator wants no key
        raise SettingsError("GCS_KEY_FILENAME is missing: DRIVE_DISK=google-cloud needs it")


def _model_path(source: _Source) -> Path | None:
    text = source.text("MODEL_PATH")
    return _absolute("MODEL_PATH", text) if text else None


def _absolute(name: str, text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise SettingsError(f"{name} begins with the home of a user who is not known here") from error


def _admin(source: _Source) -> tuple[str | None, str | None]:
    email, password = source.text("ADMIN_EMAIL"), source.text("ADMIN_PASSWORD")
    if bool(email) != bool(password):
        raise SettingsError("ADMIN_EMAIL and ADMIN_PASSWORD go together: set both, or neither")
    if not email:
        return None, None
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", email) or len(email) > 254:
        raise SettingsError("ADMIN_EMAIL must be an e-mail address")
    if len(password) not in PASSWORD_LENGTHS:
        raise SettingsError("ADMIN_PASSWORD must have 12 to 256 characters")
    return email, password


def deprecated_models() -> frozenset[str]:
    """The models on the OpenAI SDK's own list of deprecated ones.

    The list is the string that follows `ChatModel` in the SDK's source; reading the file spares importing the SDK.
    """
    spec = importlib.util.find_spec("openai")
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "types" / "shared" / "chat_model.py"
    try:
        body = ast.parse(source.read_text("utf-8")).body
    except (OSError, SyntaxError):
        return frozenset()
    notes = [
        node.value.value
        for node in body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return frozenset(
        name for note in notes if "Deprecated" in note for name in re.findall(r'"([^"\s]+)"', note)
    )
