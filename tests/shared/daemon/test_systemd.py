from pathlib import Path

import pytest
from builders import refused

from fedge.shared.daemon import systemd
from fedge.shared.errors import ConfigError, UsageError

PACKAGE, UNIT = "fedge.server.deployment", "fedge-server.service"


def test_paths_and_words_are_filled_in():
    text = systemd.filled(PACKAGE, UNIT, bin=Path("/opt/fedge/bin"), words={"NOWHERE": "x"})
    assert "ExecStart=/opt/fedge/bin/fedge" in text and "@BIN@" not in text


@pytest.mark.parametrize("path", ["relative", "/with space", "/../up", "/a%b", "/a\nb", ""])
def test_a_path_that_systemd_would_take_apart_is_refused(path):
    refusal = refused(201, systemd.filled, PACKAGE, UNIT, bin=Path(path), kind=ConfigError)
    assert refusal.startswith("bin: must be an absolute path")


def test_files_are_written_for_all_to_read_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        (path,) = systemd.write(tmp_path / "etc" / "units", {UNIT: content})
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o644
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(
        107, systemd.write, tmp_path / "file", {UNIT: ""}, kind=UsageError
    )
