"""An update has a finite norm, or becomes zero and has."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.shared.privacy.mechanisms.update_norm import finite_norm


def test_an_update_with_a_norm_stays_as_it_is():
    update = np.array([3.0, -4.0])
    assert finite_norm(update) == 5.0
    assert update.tolist() == [3.0, -4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_one_without_is_set_to_zero_and_the_site_s_log_says_so(bad, caplog):
    update = np.array([1.0, bad])
    assert finite_norm(update) == 0.0
    assert update.tolist() == [0.0, 0.0]
    assert "counts as zero" in caplog.text
