from pathlib import Path

import pytest

from fedge.client.deployment.supernode_log import LOG_PIECE, SupernodeLog

DEAF = "INFO: Giving up reconnection after 7 tries\n"
FINE = "SuperNode ID: 17\n"


def test_what_a_log_says_after_weeks_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "supernode.log"
    path.write_text(DEAF)
    log = SupernodeLog(path)
    deaf = ["Giving up reconnection"]
    with path.open("a") as file:
        for _ in range(3):
            file.write("x" * 79 + "\n" * LOG_PIECE)
            file.flush()
            assert not log.has_logged(deaf)
        # Words that lie across two looks.
        file.write(DEAF[:12])
        file.flush()
        assert not log.has_logged(deaf)
        file.write(DEAF[12:])
        file.flush()
    assert log.has_logged(deaf)
    assert log.has_logged(deaf), "what was heard once stays heard"
    assert not log.has_logged(["SuperNode ID:"])


def test_of_much_that_is_new_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "supernode.log"
    log = SupernodeLog(path)
    assert not log.has_logged(["[code: 2004]"])
    path.write_text("\n" * (3 * LOG_PIECE) + "[code: 2004]\n")
    assert log.has_logged(["[code: 2004]"])


@pytest.mark.parametrize("moved", [True, False])
def test_a_log_that_was_moved_or_truncated_is_read_from_its_beginning(
    tmp_path: Path, moved: bool
) -> None:
    path = tmp_path / "supernode.log"
    path.write_text(DEAF * 3)
    log = SupernodeLog(path)
    if moved:
        path.rename(tmp_path / "supernode.log.1")
        path.write_text(FINE + "\n" * 1000)
    else:
        path.write_text(FINE)
    assert log.has_logged(["SuperNode ID:"])
    assert not log.has_logged(["Giving up reconnection"])
