"""What the preparation of `fedge up` tells of a failure, over the process in which it happens."""

import errno
import json

import pytest

from fedge.shared.errors import DataError
from fedge.simulations import preparation


def told(error):
    def work():
        raise error

    return json.loads(preparation._in_a_fork(work))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError(304, "no such task"), 304, "no such task"),
        (ValueError("of a plug-in"), 104, "fedge up: unexpected ValueError: of a plug-in"),
        (
            OSError(errno.ENOSPC, "No space left", "share"),
            107,
            "cannot write share (No space left)",
        ),
        (KeyboardInterrupt(), 103, "interrupted"),
    ],
)
def test_a_failure_is_told_by_number_and_in_words(error, code, words):
    found = told(error)
    assert found["code"] == code
    assert words in found["message"]


def test_what_was_done_is_told():
    assert json.loads(preparation._in_a_fork(lambda: True)) == {"finished": True}
