"""Settings: what they default to, which are refused, and that a refusal names the key and shows no secret."""

import stat
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from config import DEFAULT_MODEL, OPENAI_BASE_URL, Settings, SettingsError, deprecated_models, derive

SECRET = "sk-very-secret-0123456789-abcdefghij-klmnop"
OTHER = "sk-other-secret-9876543210"
APP_KEY = "a-secret-of-more-than-thirty-two-characters"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A good one, of which a test breaks one thing."""
    return {
        "DATA_DIR": str(tmp_path / "data"),
        "APP_KEY": APP_KEY,
        "GPT_KEY_0": SECRET,
        "GPT_KEY_1": OTHER,
    }


def read(env: dict[str, str], tmp_path: Path, dotenv: str | None = None) -> Settings:
    path = tmp_path / ".env"
    if dotenv is not None:
        path.write_text(dotenv, "utf-8")
    return Settings.from_env(env, path)


def refusal(env: dict[str, str], tmp_path: Path, dotenv: str | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        read(env, tmp_path, dotenv)
    return str(caught.value)


def test_defaults_are_those_of_the_contract(env: dict[str, str], tmp_path: Path) -> None:
    settings = read(env, tmp_path)

    assert (settings.environment, settings.host, settings.port) == ("development", "0.0.0.0", 3333)
    assert (settings.threads_per_key, settings.call_deadline_s, settings.inline_wait_s) == (64, 300, 300)
    assert (settings.max_json_bytes, settings.max_upload_bytes) == (16 << 20, 1 << 30)
    assert (settings.max_tasks, settings.retain_days, settings.model) == (2_000_000, 30, DEFAULT_MODEL)
    assert (settings.max_user_jobs, settings.max_user_tasks) == (1000, 10_000_000)
    assert settings.max_user_requests_per_minute == 6000
    assert settings.request_api == settings.public_url == "http://127.0.0.1:3333"
    assert settings.database.url == f"sqlite:///{tmp_path}/data/gpt-worker.sqlite3"
    assert [key.base_url for key in settings.api_keys] == [OPENAI_BASE_URL] * 2
    assert not settings.embedded


def test_default_addresses_follow_the_port(env: dict[str, str], tmp_path: Path) -> None:
    settings = read({**env, "PORT": "8080"}, tmp_path)

    assert settings.request_api == settings.public_url == "http://127.0.0.1:8080"


def test_default_model_is_not_deprecated() -> None:
    assert "gpt-4o" in deprecated_models()
    assert DEFAULT_MODEL not in deprecated_models()


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("PORT", "0", "PORT"),
        ("PORT", "65536", "PORT"),
        ("PORT", "80a", "PORT"),
        ("PORT", "٣٣٣٣", "PORT"),
        ("PORT", "9" * 5000, "PORT"),
        ("NODE_ENV", "prod", "NODE_ENV"),
        ("APP_ENV", "prod", "APP_ENV"),
        ("APP_KEY", "short", "APP_KEY"),
        ("APP_KEY", "x" * 31, "APP_KEY"),
        ("APP_KEY", "x" * 40 + "\udcff", "APP_KEY"),
        ("GPT_KEY_1", "", "GPT_KEY_1"),
        ("GPT_KEY_1", SECRET, "GPT_KEY_1"),
        ("GPT_KEY_1", "sk-with space", "GPT_KEY_1"),
        ("GPT_KEY_1", "sk-…", "GPT_KEY_1"),
        ("GPT_KEY_3", "sk-three", "GPT_KEY_2"),
        ("GPT_KEY_X", "sk-x", "GPT_KEY_X"),
        ("GPT_KEY_02", "sk-two", "GPT_KEY_02"),
        ("GPT_KEY_²", "sk-two", "GPT_KEY_²"),
        ("GPT_KEY_9999999", "sk-many", "GPT_KEY_9999999"),
        ("GPT_BASE_URL", "ftp://example.org", "GPT_BASE_URL"),
        ("GPT_BASE_URL", "example.org/v1", "GPT_BASE_URL"),
        ("GPT_BASE_URL_0", "http://", "GPT_BASE_URL_0"),
        ("GPT_BASE_URL_2", "http://example.org", "GPT_BASE_URL_2"),
        ("GPT_BASE_URL_00", "http://example.org", "GPT_BASE_URL_00"),
        ("GPT_BASE_URL_X", "http://example.org", "GPT_BASE_URL_X"),
        ("GPT_MODEL", "gpt-4o", "GPT_MODEL"),
        ("GPT_THREADS_PER_KEY", "0", "GPT_THREADS_PER_KEY"),
        ("GPT_DEADLINE_S", "0", "GPT_DEADLINE_S"),
        ("GPT_DEADLINE_S", "nan", "GPT_DEADLINE_S"),
        ("GPT_DEADLINE_S", "inf", "GPT_DEADLINE_S"),
        ("INLINE_WAIT_S", "-1", "INLINE_WAIT_S"),
        ("MAX_JSON_BYTES", "0", "MAX_JSON_BYTES"),
        ("MAX_JSON_BYTES", "16MB", "MAX_JSON_BYTES"),
        ("MAX_UPLOAD_BYTES", "2000GiB", "MAX_UPLOAD_BYTES"),
        ("MAX_TASKS", "0", "MAX_TASKS"),
        ("MAX_USER_JOBS", "-1", "MAX_USER_JOBS"),
        ("MAX_USER_JOBS", "many", "MAX_USER_JOBS"),
        ("MAX_USER_TASKS", "1000000001", "MAX_USER_TASKS"),
        ("MAX_USER_REQUESTS_PER_MINUTE", "0.5", "MAX_USER_REQUESTS_PER_MINUTE"),
        ("RETAIN_DAYS", "-1", "RETAIN_DAYS"),
        ("REQUEST_API", "http://example.org:99999", "REQUEST_API"),
        ("REQUEST_API", "http://[::1", "REQUEST_API"),
        ("REQUEST_API", "http://exa mple.org", "REQUEST_API"),
        ("REQUEST_API", "https://example.org/hook?a=b c", "REQUEST_API"),
        ("REQUEST_API", "https://example.org/hook#part", "REQUEST_API"),
        ("REQUEST_API", "https://example.org/hook#", "REQUEST_API"),
        ("REQUEST_API", "https://me:hunter2@example.org/hook", "REQUEST_API"),
        ("REQUEST_API", "http://example.org:0/hook", "REQUEST_API"),
        ("GPT_BASE_URL", "https://example.org/v1?a=b", "GPT_BASE_URL"),
        ("PUBLIC_URL", "https://example.org/?a=b", "PUBLIC_URL"),
        ("PUBLIC_URL", "https://example.org/?", "PUBLIC_URL"),
        ("PUBLIC_URL", "https://example.org/#", "PUBLIC_URL"),
        ("GPT_BASE_URL", "https://me:secret@example.org/v1", "GPT_BASE_URL"),
        ("DATA_DIR", "/tmp/what?", "DATA_DIR"),
        ("WEBHOOK_SECRET", "hunter2", "WEBHOOK_SECRET"),
        ("WEBHOOK_SECRET", "whsec_tooshort", "WEBHOOK_SECRET"),
        ("WEBHOOK_SECRET", "whsec_" + "?" * 40, "WEBHOOK_SECRET"),
        ("DB_CONNECTION", "mysql", "DB_HOST"),
        ("DB_CONNECTION", "db2", "DB_CONNECTION"),
        ("DATABASE_URL", f"postgresql://me:{SECRET}@/jobs", "DATABASE_URL"),
        ("DATABASE_URL", f"postgresql://:{SECRET}@db/jobs", "DATABASE_URL"),
        ("DATABASE_URL", f"postgresql://me:{SECRET}@db", "DATABASE_URL"),
        ("DATABASE_URL", f"postgresql://me:{SECRET}@db:99999/jobs", "DATABASE_URL"),
        ("DATABASE_URL", f"postgresql://me:{SECRET}@db:port/jobs", "DATABASE_URL"),
        ("DATABASE_URL", f"db2://me:{SECRET}@db/jobs", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:///:memory:", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite://", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:////:memory:", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:///relative.sqlite3", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:////tmp/jobs.sqlite3?mode=ro", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:////tmp/jobs%3Fmode=ro", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:////tmp/jobs%00.sqlite3", "DATABASE_URL"),
        ("DATABASE_URL", "sqlite:///file:/tmp/jobs.sqlite3?uri=true", "DATABASE_URL"),
        ("DB_DATABASE", "jobs.sqlite3?mode=ro", "DB_DATABASE"),
        ("DB_DATABASE", ":memory:", "DB_DATABASE"),
        ("DB_DATABASE", "file:jobs.sqlite3", "DB_DATABASE"),
        ("DRIVE_DISK", "s3", "S3_BUCKET"),
        ("DRIVE_DISK", "azure", "AZURE_CONTAINER"),
        ("DRIVE_DISK", "custom", "DRIVE_URL"),
        ("DRIVE_DISK", "gcs", "DRIVE_DISK"),
        ("S3_BUCKET", "hunter2-bucket", "S3_BUCKET"),
        ("GCS_KEY_FILENAME", "/etc/hunter2", "GCS_KEY_FILENAME"),
        ("AZURE_CONNECTION_STRING", "hunter2;secret", "AZURE_CONNECTION_STRING"),
        ("DRIVE_URL", "memory://hunter2", "DRIVE_URL"),
        ("HOST", "not a host", "HOST"),
        ("HOST", "unix:/run/gpt-worker.sock", "HOST"),
        ("HOST", "[::1]", "HOST"),
        ("HOST", "a..b", "HOST"),
        ("HOST", "x" * 64, "HOST"),
        ("GPT_MODEL", "gpt of mine", "GPT_MODEL"),
        ("GPT_MODEL", "x" * 201, "GPT_MODEL"),
        ("DATA_DIR", "~no-such-user/data", "DATA_DIR"),
        ("MODEL_PATH", "~no-such-user/model.gguf", "MODEL_PATH"),
        ("ADMIN_EMAIL", "ada@example.org", "ADMIN_EMAIL"),
        ("ADMIN_PASSWORD", "long enough for this", "ADMIN_PASSWORD"),
    ],
)
def test_bad_setting_is_named_in_one_line_without_a_secret(
    env: dict[str, str], tmp_path: Path, name: str, value: str, key: str
) -> None:
    message = refusal({**env, name: value}, tmp_path)

    assert key in message
    assert "\n" not in message
    assert not any(secret in message for secret in (SECRET, OTHER, APP_KEY, "hunter2"))
    assert len(value) < 10 or value not in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"GPT_KEY_0": ""}, "GPT_KEY_0"),
        ({"GPT_KEY_0": "", "GPT_KEY_1": "", "GPT_KEY_00": "sk-a", "GPT_KEY_01": "sk-b"}, "GPT_KEY_00"),
        ({"NODE_ENV": "test", "APP_ENV": "production"}, "APP_ENV"),
        ({"NODE_ENV": "production", "APP_KEY": ""}, "APP_KEY"),
        ({"NODE_ENV": "production", "GPT_KEY_0": "", "GPT_KEY_1": ""}, "GPT_KEY_0"),
        ({"ADMIN_EMAIL": "ada", "ADMIN_PASSWORD": "long enough for this"}, "ADMIN_EMAIL"),
        ({"ADMIN_EMAIL": "ada@example.org", "ADMIN_PASSWORD": "too short"}, "ADMIN_PASSWORD"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    env: dict[str, str], tmp_path: Path, changes: dict[str, str], key: str
) -> None:
    assert key in refusal({**env, **changes}, tmp_path)


S3 = {"DRIVE_DISK": "s3", "S3_BUCKET": "jobs", "S3_KEY": "a-key", "S3_SECRET": "hunter2-secret"}
GCS = {"DRIVE_DISK": "google-cloud", "GCS_BUCKET": "jobs", "GCS_KEY_FILENAME": "/etc/gcs.json"}
ACCOUNT = "AccountName=me;AccountKey=hunter2==;EndpointSuffix=core.windows.net"
AZURE = {"DRIVE_DISK": "azure", "AZURE_CONTAINER": "jobs", "AZURE_CONNECTION_STRING": ACCOUNT}
CUSTOM = {"DRIVE_DISK": "custom", "DRIVE_URL": "sftp://me:hunter2@host/jobs"}


@pytest.mark.parametrize("drive", [{}, {"DRIVE_DISK": "local"}, S3, GCS, AZURE, CUSTOM])
def test_each_drive_takes_its_own_settings(
    env: dict[str, str], tmp_path: Path, drive: dict[str, str]
) -> None:
    settings = read({**env, **drive}, tmp_path)

    own = {name: value for name, value in drive.items() if name != "DRIVE_DISK"}
    assert (settings.drive.disk, settings.drive.values) == (drive.get("DRIVE_DISK", "local"), own)
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("drive", "changes", "key"),
    [
        (S3, {"S3_BUCKET": ""}, "S3_BUCKET"),
        (S3, {"S3_KEY": ""}, "S3_KEY"),
        (S3, {"S3_SECRET": ""}, "S3_SECRET"),
        (S3, {"S3_BUCKET": "s3://hunter2/jobs"}, "S3_BUCKET"),
        (S3, {"S3_BUCKET": "hunter2/jobs"}, "S3_BUCKET"),
        (S3, {"S3_BUCKET": "hunter2" * 40}, "S3_BUCKET"),
        (S3, {"S3_SECRET": "hunter2 secret"}, "S3_SECRET"),
        (S3, {"S3_ENDPOINT": "hunter2.example.org"}, "S3_ENDPOINT"),
        (S3, {"S3_ENDPOINT": "https://me:hunter2@example.org"}, "S3_ENDPOINT"),
        (S3, {"GCS_BUCKET": "hunter2"}, "GCS_BUCKET"),
        (S3, {"DRIVE_DISK": "local"}, "S3_BUCKET"),
        (S3, {"DRIVE_DISK": ""}, "S3_BUCKET"),
        (GCS, {"GCS_BUCKET": ""}, "GCS_BUCKET"),
        (GCS, {"GCS_BUCKET": "Hunter2"}, "GCS_BUCKET"),
        (GCS, {"GCS_BUCKET": "hunter2-"}, "GCS_BUCKET"),
        (GCS, {"GCS_KEY_FILENAME": ""}, "GCS_KEY_FILENAME"),
        (GCS, {"GCS_KEY_FILENAME": "~no-such-user/hunter2"}, "GCS_KEY_FILENAME"),
        (GCS, {"GCS_ENDPOINT": "hunter2"}, "GCS_ENDPOINT"),
        (AZURE, {"AZURE_CONTAINER": ""}, "AZURE_CONTAINER"),
        (AZURE, {"AZURE_CONTAINER": "hunter2_jobs"}, "AZURE_CONTAINER"),
        (AZURE, {"AZURE_CONTAINER": "hunter2--jobs"}, "AZURE_CONTAINER"),
        (AZURE, {"AZURE_CONTAINER": "hunter2" * 10}, "AZURE_CONTAINER"),
        (AZURE, {"AZURE_CONNECTION_STRING": ""}, "AZURE_CONNECTION_STRING"),
        (AZURE, {"AZURE_CONNECTION_STRING": "hunter2"}, "AZURE_CONNECTION_STRING"),
        (AZURE, {"AZURE_CONNECTION_STRING": "AccountKey=hunter2"}, "AZURE_CONNECTION_STRING"),
        (AZURE, {"S3_KEY": "hunter2"}, "S3_KEY"),
        (CUSTOM, {"DRIVE_URL": ""}, "DRIVE_URL"),
        (CUSTOM, {"DRIVE_URL": "/srv/hunter2"}, "DRIVE_URL"),
        (CUSTOM, {"DRIVE_URL": "sftp://me:hunter2 @host"}, "DRIVE_URL"),
        (CUSTOM, {"AZURE_CONTAINER": "hunter2"}, "AZURE_CONTAINER"),
    ],
)
def test_drive_settings_that_do_not_go_together_are_named(
    env: dict[str, str], tmp_path: Path, drive: dict[str, str], changes: dict[str, str], key: str
) -> None:
    message = refusal({**env, **drive, **changes}, tmp_path)

    assert message.startswith(key)
    assert "\n" not in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("drive", "name", "words"),
    [
        (S3, "S3_BUCKET", "3 to 255 letters, digits and . _ -, a letter or a digit first"),
        (GCS, "GCS_BUCKET", "3 to 222 small letters, digits and . _ -, a letter or a digit first and last"),
        (AZURE, "AZURE_CONTAINER", "3 to 63 small letters, digits and single hyphens between them"),
    ],
)
def test_a_name_that_is_too_short_is_refused_with_the_rule(
    env: dict[str, str], tmp_path: Path, drive: dict[str, str], name: str, words: str
) -> None:
    assert words in refusal({**env, **drive, name: "b"}, tmp_path)
    assert words in refusal({**env, **drive, name: "bb"}, tmp_path)
    assert read({**env, **drive, name: "b-1"}, tmp_path).drive.values[name] == "b-1"


@pytest.mark.parametrize(
    ("drive", "name", "value"),
    [
        (S3, "S3_BUCKET", "Old_Bucket.of-Ours"),
        (GCS, "GCS_BUCKET", "results_1.example.org"),
        (AZURE, "AZURE_CONTAINER", "$web"),
        (AZURE, "AZURE_CONTAINER", "a" * 63),
    ],
)
def test_a_name_that_its_store_takes_is_taken(
    env: dict[str, str], tmp_path: Path, drive: dict[str, str], name: str, value: str
) -> None:
    assert read({**env, **drive, name: value}, tmp_path).drive.values[name] == value


def test_a_path_in_the_place_of_a_url_is_refused_with_the_form_of_one(
    env: dict[str, str], tmp_path: Path
) -> None:
    assert "file:///srv/results for a directory" in refusal(
        {**env, **CUSTOM, "DRIVE_URL": "/tmp/x"}, tmp_path
    )


@pytest.mark.parametrize(
    ("drive", "extra"),
    [
        ({}, None),
        (S3, "s3"),
        (GCS, "google-cloud"),
        (AZURE, "azure"),
        (CUSTOM, None),
        ({**CUSTOM, "DRIVE_URL": "s3://jobs"}, "s3"),
        ({**CUSTOM, "DRIVE_URL": "gs://jobs/results"}, "google-cloud"),
        ({**CUSTOM, "DRIVE_URL": "abfs://jobs@me.dfs.core.windows.net"}, "azure"),
    ],
)
def test_a_drive_tells_the_extra_that_has_its_driver(
    env: dict[str, str], tmp_path: Path, drive: dict[str, str], extra: str | None
) -> None:
    assert read({**env, **drive}, tmp_path).drive.extra == extra


def test_a_google_emulator_needs_no_key(env: dict[str, str], tmp_path: Path) -> None:
    drive = {**GCS, "GCS_KEY_FILENAME": "", "GCS_ENDPOINT": "http://127.0.0.1:4443/"}

    assert read({**env, **drive}, tmp_path).drive.values["GCS_ENDPOINT"] == "http://127.0.0.1:4443"


def test_zero_is_no_limit_of_a_user(env: dict[str, str], tmp_path: Path) -> None:
    env |= dict.fromkeys(("MAX_USER_JOBS", "MAX_USER_TASKS", "MAX_USER_REQUESTS_PER_MINUTE"), "0")

    settings = read(env, tmp_path)

    assert (settings.max_user_jobs, settings.max_user_tasks) == (None, None)
    assert settings.max_user_requests_per_minute is None


def test_every_key_may_have_an_endpoint_of_its_own(env: dict[str, str], tmp_path: Path) -> None:
    env |= {"GPT_BASE_URL": "http://one.example/v1/", "GPT_BASE_URL_1": "http://two.example/v1"}

    keys = read(env, tmp_path).api_keys

    assert [key.base_url for key in keys] == ["http://one.example/v1", "http://two.example/v1"]


def test_ten_keys_are_in_the_order_of_their_numbers(env: dict[str, str], tmp_path: Path) -> None:
    keys = {f"GPT_KEY_{number}": f"sk-{number}" for number in reversed(range(11))}

    settings = read({**env, **keys}, tmp_path)

    assert [key.secret for key in settings.api_keys] == [f"sk-{number}" for number in range(11)]


def test_no_key_means_the_embedded_model(env: dict[str, str], tmp_path: Path) -> None:
    assert read({**env, "GPT_KEY_0": "", "GPT_KEY_1": ""}, tmp_path).embedded


def test_environment_wins_over_the_file(env: dict[str, str], tmp_path: Path) -> None:
    settings = read({**env, "PORT": "4000"}, tmp_path, "PORT=5000\nHOST=127.0.0.1\n")

    assert (settings.port, settings.host) == (4000, "127.0.0.1")


@pytest.mark.parametrize("name", ["NODE_ENV", "APP_ENV"])
def test_environment_wins_over_the_file_by_either_name(
    env: dict[str, str], tmp_path: Path, name: str
) -> None:
    settings = read({**env, name: "production"}, tmp_path, "NODE_ENV=development\n")

    assert settings.production


def test_two_names_that_differ_in_the_file_are_refused(env: dict[str, str], tmp_path: Path) -> None:
    assert "NODE_ENV" in refusal(env, tmp_path, "NODE_ENV=development\nAPP_ENV=production\n")


@pytest.mark.parametrize("name", ["NODE_ENV", "APP_ENV"])
def test_file_is_not_read_in_test(env: dict[str, str], tmp_path: Path, name: str) -> None:
    settings = read({**env, name: "test"}, tmp_path, "PORT=nonsense\n")

    assert settings.port == 3333
    assert settings.offline


def test_file_takes_dollars_and_hashes_as_they_are(env: dict[str, str], tmp_path: Path) -> None:
    del env["APP_KEY"]

    settings = read(env, tmp_path, f"APP_KEY='{'x' * 32}${{HOME}}#'\n")

    assert settings.app_key == "x" * 32 + "${HOME}#"


def test_file_that_is_not_text_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=\xff\xfe\n")

    assert ".env" in refusal(env, tmp_path)


def test_app_key_is_made_once_and_is_the_owners_alone(env: dict[str, str], tmp_path: Path) -> None:
    del env["APP_KEY"]

    first, second = read(env, tmp_path), read(env, tmp_path)

    path = tmp_path / "data" / "app-key"
    assert first.app_key == second.app_key == path.read_text("ascii").strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_made_app_key_that_was_cut_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    del env["APP_KEY"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "app-key").write_text("cut")

    assert "APP_KEY" in refusal(env, tmp_path)


def test_data_dir_that_is_a_file_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    del env["APP_KEY"]
    (tmp_path / "data").write_text("")

    assert "DATA_DIR" in refusal(env, tmp_path)


def test_webhook_secret_is_derived_from_the_app_key(env: dict[str, str], tmp_path: Path) -> None:
    secrets = {
        read({**env, "APP_KEY": key}, tmp_path).webhook_secret for key in (APP_KEY, APP_KEY, APP_KEY[::-1])
    }

    assert len(secrets) == 2
    assert all(secret.startswith("whsec_") for secret in secrets)


def test_purposes_have_keys_of_their_own() -> None:
    assert len({derive(APP_KEY, "webhook"), derive(APP_KEY, "link"), derive(APP_KEY[::-1], "link")}) == 3


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("2KiB", 2048), ("3 MiB", 3 << 20), ("1GiB", 1 << 30)])
def test_sizes_take_units(env: dict[str, str], tmp_path: Path, text: str, size: int) -> None:
    assert read({**env, "MAX_JSON_BYTES": text}, tmp_path).max_json_bytes == size


def test_settings_print_without_a_secret(env: dict[str, str], tmp_path: Path) -> None:
    env |= {"ADMIN_EMAIL": "ada@example.org", "ADMIN_PASSWORD": "correct horse battery"}

    settings = read(env, tmp_path)

    printed = repr(settings) + repr(settings.api_keys)
    secrets = (SECRET, OTHER, APP_KEY, settings.webhook_secret, "correct horse")
    assert not any(secret in printed for secret in secrets)


def test_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_ENV", "test")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PORT", "4321")

    assert Settings.from_env().port == 4321


@pytest.mark.parametrize(
    "address",
    [
        "https://hooks.example.org/in/",
        "https://hooks.example.org/",
        "https://hooks.example.org/in?code=abc",
        "https://hooks.example.org/in/?code=a%20b&to=me@example.org",
    ],
)
def test_request_api_is_kept_exactly(env: dict[str, str], tmp_path: Path, address: str) -> None:
    assert read({**env, "REQUEST_API": address}, tmp_path).request_api == address


def test_public_url_loses_the_slash_at_its_end(env: dict[str, str], tmp_path: Path) -> None:
    settings = read({**env, "PUBLIC_URL": "https://example.org/gpt/"}, tmp_path)

    assert settings.public_url == "https://example.org/gpt"


@pytest.mark.parametrize(
    ("changes", "name", "path"),
    [
        ({}, "DATA_DIR", "{data}/gpt-worker.sqlite3"),
        ({"DB_DATABASE": "jobs.db"}, "DB_DATABASE", "{data}/jobs.db"),
        ({"DB_DATABASE": "/var/lib/jobs.db"}, "DB_DATABASE", "/var/lib/jobs.db"),
        ({"DATABASE_URL": "sqlite:////var/lib/jobs.db"}, "DATABASE_URL", "/var/lib/jobs.db"),
        ({"DATABASE_URL": "sqlite:////var/my%20jobs.db"}, "DATABASE_URL", "/var/my jobs.db"),
        ({"DATABASE_URL": "sqlite:////a.db", "DB_DATABASE": "b.db"}, "DATABASE_URL", "/a.db"),
    ],
)
def test_database_is_one_absolute_path(
    env: dict[str, str], tmp_path: Path, changes: dict[str, str], name: str, path: str
) -> None:
    settings = read({**env, **changes}, tmp_path)

    assert settings.database.path == Path(path.format(data=tmp_path / "data"))
    assert settings.database.setting == name


@pytest.mark.parametrize("name", ["jobs.db", "100%25.db", "a b#c@d:e+f.db"])
def test_sqlalchemy_opens_the_very_path(env: dict[str, str], tmp_path: Path, name: str) -> None:
    settings = read({**env, "DB_DATABASE": name}, tmp_path)

    assert make_url(settings.database.url).database == str(settings.database.path)


def test_settings_of_a_database_server_mean_nothing_to_sqlite(env: dict[str, str], tmp_path: Path) -> None:
    old = {"DB_HOST": "127.0.0.1", "DB_PORT": "3306", "DB_USER": "lucid", "DB_PASSWORD": "secret"}

    assert read({**env, **old}, tmp_path) == read(env, tmp_path)


SERVER = {"DB_HOST": "db.example.org", "DB_USER": "me", "DB_PASSWORD": f" {SECRET}@/", "DB_DATABASE": "jobs"}


@pytest.mark.parametrize(
    ("connection", "extra", "driver", "port"),
    [
        ("pgsql", "pgsql", "postgresql+psycopg", 5432),
        ("postgres", "pgsql", "postgresql+psycopg", 5432),
        ("mysql", "mysql", "mysql+pymysql", 3306),
        ("mssql", "mssql", "mssql+mssqlpython", 1433),
    ],
)
def test_database_server_is_known_by_its_settings(
    env: dict[str, str], tmp_path: Path, connection: str, extra: str, driver: str, port: int
) -> None:
    settings = read({**env, "DB_CONNECTION": connection, **SERVER}, tmp_path)

    url = make_url(settings.database.url)
    assert (url.drivername, url.host, url.port) == (driver, "db.example.org", port)
    assert (url.username, url.password, url.database) == ("me", SERVER["DB_PASSWORD"], "jobs")
    assert settings.database.where == f"jobs on db.example.org:{port}"
    assert settings.extras == (extra,)
    assert SECRET not in repr(settings)


def test_oracle_s_database_is_a_service(env: dict[str, str], tmp_path: Path) -> None:
    settings = read({**env, "DB_CONNECTION": "oracle", **SERVER, "DB_PORT": "1599"}, tmp_path)

    url = make_url(settings.database.url)
    assert (url.database, url.query["service_name"], url.port) == (None, "jobs", 1599)


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("postgres://me@db/jobs?sslmode=require", "postgresql+psycopg://me@db/jobs?sslmode=require"),
        ("postgresql+psycopg2://me:pw@db:5433/jobs", "postgresql+psycopg://me:pw@db:5433/jobs"),
        ("pgsql://me@/jobs?host=/run/postgresql", "postgresql+psycopg://me@/jobs?host=%2Frun%2Fpostgresql"),
        ("mariadb://me@db/jobs?ssl_ca=/ca.pem", "mysql+pymysql://me@db/jobs?ssl_ca=%2Fca.pem"),
        ("mysql+mysqldb://me:p%40w@[::1]/jobs", "mysql+pymysql://me:p%40w@[::1]/jobs"),
        ("mssql://me@db/jobs", "mssql+mssqlpython://me@db/jobs"),
        ("oracle://me@db/?service_name=jobs", "oracle+oracledb://me@db/?service_name=jobs"),
    ],
)
def test_address_of_a_database_server_is_read_for_our_driver(
    env: dict[str, str], tmp_path: Path, given: str, known: str
) -> None:
    settings = read({**env, "DATABASE_URL": given, "DB_CONNECTION": "sqlite"}, tmp_path)

    assert make_url(settings.database.url) == make_url(known)
    assert settings.database.setting == "DATABASE_URL"


@pytest.mark.parametrize("name", ["DB_HOST", "DB_USER", "DB_DATABASE"])
def test_database_server_needs_all_of_its_settings(env: dict[str, str], tmp_path: Path, name: str) -> None:
    message = refusal({**env, "DB_CONNECTION": "pgsql", **SERVER, name: ""}, tmp_path)

    assert message.startswith(f"{name} is missing")
    assert SECRET not in message


@pytest.mark.parametrize(("name", "value"), [("DB_PORT", "0"), ("DB_PORT", "x"), ("DB_HOST", "db:5432/jobs")])
def test_place_of_a_database_server_must_be_one(
    env: dict[str, str], tmp_path: Path, name: str, value: str
) -> None:
    message = refusal({**env, "DB_CONNECTION": "pgsql", **SERVER, name: value}, tmp_path)

    assert message.startswith(name)
    assert SECRET not in message


@pytest.mark.parametrize(
    ("host", "is_refused"), [("127.0.0.1", False), ("[::1]", False), ("db.example.org", True)]
)
def test_tests_reach_no_database_outside(
    env: dict[str, str], tmp_path: Path, host: str, *, is_refused: bool
) -> None:
    env |= {"NODE_ENV": "test", "DATABASE_URL": f"postgresql://me:{SECRET}@{host}/jobs"}

    if is_refused:
        message = refusal(env, tmp_path)
        assert message.startswith("DATABASE_URL: NODE_ENV=test reaches nothing outside")
        assert SECRET not in message
    else:
        assert read(env, tmp_path).database.connection == "pgsql"


def test_other_settings_of_a_cloud_are_not_ours(env: dict[str, str], tmp_path: Path) -> None:
    assert read({**env, "AZURE_CONFIG_DIR": "/home/me/.azure"}, tmp_path) == read(env, tmp_path)


def test_spaces_belong_to_a_password(env: dict[str, str], tmp_path: Path) -> None:
    env |= {"ADMIN_EMAIL": " ada@example.org ", "ADMIN_PASSWORD": " spaces at both ends "}

    settings = read(env, tmp_path)

    assert (settings.admin_email, settings.admin_password) == ("ada@example.org", " spaces at both ends ")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "localhost", "My-Host_1.example.org"])
def test_host_may_be_an_address_or_a_name(env: dict[str, str], tmp_path: Path, host: str) -> None:
    assert read({**env, "HOST": host}, tmp_path).host == host
