"""An environment that is up to date is left as it is."""

import hashlib
from pathlib import Path

from bench.environments import make_environment


def test_environment_of_the_same_requirements_is_not_made_again(tmp_path: Path) -> None:
    requirements, folder = tmp_path / "requirements.txt", tmp_path / "made"
    requirements.write_text("flask==1\n")
    folder.mkdir()
    (folder / ".installed").write_text(hashlib.sha256(b"flask==1\n").hexdigest())

    assert make_environment(folder, requirements) == folder / "bin"
    assert [path.name for path in folder.iterdir()] == [".installed"]
