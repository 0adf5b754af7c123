"""How the preparation of `fedge up` reports a failure across processes."""

import errno
import json

import pytest

from fedge.shared.errors import DataError
from fedge.simulations import federation_startup


def reported(error):
    def work():
        raise error

    return json.loads(federation_startup._in_a_fork(work))


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
def test_a_failure_is_reported_by_number_and_in_words(error, code, words):
    found = reported(error)
    assert found["code"] == code
    assert words in found["message"]


def test_the_outcome_is_reported():
    assert json.loads(federation_startup._in_a_fork(lambda: True)) == {"finished": True}
