"""Homes of a local federation: made once, and each site with what it trusts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import builders
import pytest

from fedge.client.data import npy_files
from fedge.client.data.dataset import site_shares
from fedge.client.secagg import trusted_roster
from fedge.client.settings import policy
from fedge.server.deployment import site_registry
from fedge.shared.config.federation import Config
from fedge.shared.flower import app_bundle
from fedge.shared.tasks.registry import get_task
from fedge.simulations import local_homes

TODAY = datetime.now(UTC).date()


def config(count: int = 3, **section: Any) -> Config:
    masks = {"enabled": True, "min-sites": 3, **section}
    return builders.config("breast-cancer", sites={"count": count}, secure_aggregation=masks)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with the shares of four sites; the bundle is not built, which takes seconds."""
    monkeypatch.setattr(app_bundle, "sha256", lambda *_: "ab" * 32)
    task = get_task("breast-cancer")
    for site, data in site_shares(config(4), task).items():
        place = tmp_path / "sites" / site
        place.mkdir(parents=True)
        npy_files.write(place / "share", data)
    (tmp_path / "federation").mkdir()
    return tmp_path


def test_every_site_has_the_roster_of_all_and_trusts_one_consortium(out: Path) -> None:
    local_homes.make_homes(config(4), out)
    homes = sorted((out / "sites").iterdir())
    assert len(homes) == 4
    rosters = {place.name: trusted_roster.read(place) for place in homes}
    assert len({r.digest for r in rosters.values()}) == 1
    for place in homes:
        own = trusted_roster.own_key(place)
        trusted_roster.require_own(rosters[place.name], place.name, own, TODAY)
        assert (place / trusted_roster.KEY).stat().st_mode & 0o777 == 0o600
    assert len({trusted_roster.own_key(place).private_bytes_raw() for place in homes}) == 4
    assert sorted(site_registry.site_keys(out / "server")) == [place.name for place in homes]


def test_the_policy_requires_secure_aggregation_with_the_runs_bounds(out: Path) -> None:
    local_homes.make_homes(config(4, min_sites=4, clipping_bound=500.0), out)
    for place in (out / "sites").iterdir():
        terms = policy.read(place).secure_aggregation
        assert (terms.required, terms.min_sites) == (True, 4)
        # The default would refuse the run of the very owner of these homes.
        assert terms.max_clipping_bound == 500.0


def test_a_second_time_nothing_is_made_again(out: Path) -> None:
    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    local_homes.make_homes(config(4), out)
    before = files()
    local_homes.make_homes(config(4), out)
    assert files() == before


def test_a_run_in_clear_installs_no_roster(out: Path) -> None:
    local_homes.make_homes(config(4, enabled=False), out)
    for place in (out / "sites").iterdir():
        assert not (place / trusted_roster.FILE).exists()
        assert policy.read(place).secure_aggregation == policy.SecurePolicy()
    assert not (out / "federation" / "consortium.key").exists()
