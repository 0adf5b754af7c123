"""Who a registration speaks for."""

from __future__ import annotations

import pytest

from fedge.server.admission.validation_result import Registration, Rejection
from fedge.server.participants.members import admit_node

NORTH = Registration("north", 10, 5, None)


def test_a_site_takes_part_under_the_name_of_its_key() -> None:
    assert admit_node(NORTH, 7, {"north": "7", "south": "8"}) is NORTH


@pytest.mark.parametrize("seats", [{"north": "7", "south": "8"}, {"south": "8"}, {}])
def test_another_site_s_name_is_refused(seats: dict[str, str]) -> None:
    found = admit_node(NORTH, 8, seats)
    assert isinstance(found, Rejection)
    assert (found.code, found.site) == (412, "north")
