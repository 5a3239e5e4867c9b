"""The backup of a database on a server is the server's own to make."""

from pathlib import Path

from click.testing import CliRunner

from gpt_worker.backup import FAILED, make_command


def test_database_on_a_server_is_left_to_its_own_tools(tmp_path: Path) -> None:
    result = CliRunner().invoke(make_command(None), [str(tmp_path / "copy")])

    assert result.exit_code == FAILED
    assert "pg_dump or mysqldump" in result.output
    assert len(result.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
