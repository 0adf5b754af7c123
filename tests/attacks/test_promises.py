"""Each attack on what the documents promise is refused, and what no document promises is told as it is."""

from __future__ import annotations

import pytest

from .promises import PROMISES, another_vector_of_the_same_checksum


@pytest.mark.slow
@pytest.mark.parametrize("attack", PROMISES, ids=lambda a: a.__name__.replace("_", "-"))
def test_as_the_page_says(attack, tmp_path):
    outcome = attack(tmp_path)
    assert outcome.name == attack.__name__.replace("_", "-")
    # The checksum is against damage alone, as its page and its code say.
    expected = "succeeds" if attack is another_vector_of_the_same_checksum else "refused"
    assert outcome.verdict == expected, outcome
