import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.client.data.partition import MIN_ROWS, dirichlet, iid, natural, site_names
from fedge.shared.errors import DataError

LABELS = np.random.default_rng(0).integers(0, 10, size=1797)


def rows_of(parts):
    return sorted(np.concatenate(list(parts.values())).tolist())


@given(
    sites=st.integers(1, 20), alpha=st.sampled_from([0.3, 1.0, 100.0]), seed=st.integers(0, 2**63)
)
def test_dirichlet_gives_every_row_to_one_site(sites, alpha, seed):
    parts = dirichlet(LABELS, sites, alpha, seed)
    assert rows_of(parts) == list(range(len(LABELS)))
    assert list(parts) == site_names(sites)
    assert min(len(rows) for rows in parts.values()) >= MIN_ROWS


@given(rows=st.integers(MIN_ROWS, 300), sites=st.integers(1, 20), seed=st.integers(0, 2**63))
def test_iid_gives_equal_parts_or_refuses(rows, sites, seed):
    if rows < sites * MIN_ROWS:
        with pytest.raises(DataError, match="sites.count: must be at most"):
            iid(rows, sites, seed)
        return
    parts = iid(rows, sites, seed)
    assert rows_of(parts) == list(range(rows))
    sizes = [len(p) for p in parts.values()]
    assert max(sizes) - min(sizes) <= 1


def unlikeness(alpha):
    parts = dirichlet(LABELS, 8, alpha, 42)
    shares = [np.bincount(LABELS[p], minlength=10) / len(p) for p in parts.values()]
    return float(np.std(shares, axis=0).mean())


def test_smaller_alpha_is_less_alike():
    assert unlikeness(0.1) > 2 * unlikeness(2.0) > 4 * unlikeness(1000.0)


def test_same_seed_same_shares_other_seed_others():
    one, same, other = (dirichlet(LABELS, 8, 0.5, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[s], same[s]) for s in one)
    assert any(not np.array_equal(one[s], other[s]) for s in one)


def test_too_many_sites_are_refused():
    with pytest.raises(DataError, match=r"at most 5 for 20 rows \(4 a site\), got 6") as caught:
        dirichlet(np.arange(20) % 2, 6, 0.5, 1)
    assert caught.value.code == 303


def test_draws_are_bounded():
    # Two labels cannot reach ten sites when nearly all of a label goes to one site.
    with pytest.raises(DataError, match="1000 draws failed") as caught:
        dirichlet(np.arange(100) % 2, 10, 1e-3, 1)
    assert caught.value.code == 303


def test_names_have_one_width():
    assert site_names(8)[0] == "site-1"
    assert site_names(10)[0] == "site-01"
    assert site_names(120) == sorted(site_names(120))


def test_natural_follows_the_data():
    parts = natural(np.array(["b", "a", "b"]))
    assert {site: rows.tolist() for site, rows in parts.items()} == {"a": [1], "b": [0, 2]}


def test_natural_needs_sites():
    with pytest.raises(DataError, match="must be dirichlet or iid") as caught:
        natural(None)
    assert caught.value.code == 303
