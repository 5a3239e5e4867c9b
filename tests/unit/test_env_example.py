"""`.env.example` lists every setting that the program reads, and no other."""

import re
from pathlib import Path

from config import DRIVE_SETTINGS, Settings

ROOT = Path(__file__).parents[2]


def test_every_setting_that_is_read_stands_in_the_example() -> None:
    source = (ROOT / "config.py").read_text("utf-8")
    read = set(re.findall(r"(?:text|integer|seconds|size_bytes|url)\(\s*['\"]([A-Z][A-Z_]+)['\"]", source))
    read |= {name for needed, optional in DRIVE_SETTINGS.values() for name in (*needed, *optional)}
    listed = set(re.findall(r"^([A-Z][A-Z_0-9]*)=", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE))

    assert len(read) > 20
    assert read - {"APP_ENV"} == {name for name in listed if not re.search(r"_\d$", name)}
    assert {"GPT_KEY_0", "GPT_KEY_1", "GPT_BASE_URL_0"} <= listed


def test_the_example_itself_is_good_settings(tmp_path: Path) -> None:
    settings = Settings.from_env({"DATA_DIR": str(tmp_path)}, ROOT / ".env.example")

    assert settings.embedded
    assert settings.port == 3333
