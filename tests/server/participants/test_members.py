"""Who a registration speaks for."""

from __future__ import annotations

import pytest

from fedge.server.admission.validation_result import Registration, Rejection
from fedge.server.participants.members import admit_node

NORTH = Registration("north", 10, 5, None)


def test_a_site_takes_part_under_the_name_of_its_key() -> None:
    assert admit_node(NORTH, 7, {"north": "7", "south": "8"}) is NORTH


@pytest.mark.parametrize("admitted_nodes", [{"north": "7", "south": "8"}, {"south": "8"}, {}])
def test_another_site_s_name_is_refused(admitted_nodes: dict[str, str]) -> None:
    rejection = admit_node(NORTH, 8, admitted_nodes)
    assert isinstance(rejection, Rejection)
    assert (rejection.code, rejection.site) == (412, "north")
