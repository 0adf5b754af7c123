"""Which rounds were answered: on disk before the answer leaves, and nothing more where that cannot be read."""

import json

import builders
import pytest

from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.shared.errors import SiteError


def refused(answered, run_id, purpose, server_round):
    return builders.refused(423, answered.require_new, run_id, purpose, server_round)


def test_a_new_site_has_answered_nothing(tmp_path):
    ReplayGuard(tmp_path / "secagg").require_new("run-1", "train", 0)
    assert not (tmp_path / "secagg").exists()


@pytest.mark.parametrize("purpose", ["calibrate", "qualify"])
def test_figures_of_the_final_model_are_summed_once_in_a_run(tmp_path, purpose):
    answered = ReplayGuard(tmp_path)
    answered.require_new("run-1", purpose, 3)
    answered.note("run-1", purpose, 3)
    for server_round in (3, 4):
        told = refused(answered, "run-1", purpose, server_round)
        assert told == f"{purpose}: must be asked once in a run, got it again"
    answered.require_new("run-1", "evaluate", 3)
    answered.require_new("run-2", purpose, 3)


def test_an_answered_round_and_those_before_it_are_refused_also_after_a_restart(tmp_path):
    first = ReplayGuard(tmp_path / "secagg")
    first.note("run-1", "train", 3)
    for answered in (first, ReplayGuard(tmp_path / "secagg")):
        for server_round in (0, 2, 3):
            assert refused(answered, "run-1", "train", server_round) == (
                f"train round {server_round}: must be later than 3, which was answered"
            )
        answered.require_new("run-1", "train", 4)


def test_runs_and_purposes_are_apart(tmp_path):
    answered = ReplayGuard(tmp_path)
    answered.note("run-1", "train", 3)
    answered.note("run-1", "evaluate", 2)
    answered.require_new("run-2", "train", 1)
    answered.require_new("run-1", "evaluate", 3)
    answered.require_new("run-1", "statistics", 0)
    refused(answered, "run-1", "train", 3)
    assert json.loads((tmp_path / "run-1.json").read_text()) == {"train": 3, "evaluate": 2}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"train": "3"}', b'{"train": 3.0}', b'{"train": true}', b"\xff"],
)
def test_with_a_damaged_file_the_run_is_refused(tmp_path, content):
    answered = ReplayGuard(tmp_path)
    answered.note("run-1", "train", 3)
    (tmp_path / "run-1.json").write_bytes(content)
    for purpose, server_round in (("train", 4), ("train", 3), ("evaluate", 1), ("statistics", 0)):
        assert "damaged" in refused(answered, "run-1", purpose, server_round)
    with pytest.raises(SiteError):
        answered.note("run-1", "train", 4)
    assert (tmp_path / "run-1.json").read_bytes() == content


def test_a_file_that_cannot_be_read_is_damaged(tmp_path):
    (tmp_path / "run-1.json").mkdir(parents=True)
    refused(ReplayGuard(tmp_path), "run-1", "train", 1)


def test_a_simulation_forgets(tmp_path):
    answered = ReplayGuard(tmp_path)
    answered.note("run-1", "train", 3)
    answered.forget()
    answered.require_new("run-1", "train", 3)


SITES = [f"site-{i}" for i in range(8)]


@pytest.mark.parametrize(
    ("scored", "allowed"),
    [
        (SITES, True),
        (SITES[:5], True),
        # The difference of both sums is one site's, or two sites'.
        (SITES[:7], False),
        (SITES[:6], False),
        # A site that was not in the evaluation shows in the difference as well.
        ([*SITES, "site-9"], False),
        ([*SITES[:4], "site-9"], False),
    ],
)
def test_scores_are_summed_over_the_sites_of_the_evaluation_or_many_fewer(
    tmp_path, scored, allowed
):
    answered = ReplayGuard(tmp_path)
    answered.require_no_single_site("run-1", scored, 3)
    answered.note_evaluated("run-1", SITES)
    answered.require_no_single_site("run-2", scored, 3)
    # After a restart too, and when a simulation forgets which rounds were answered.
    again = ReplayGuard(tmp_path)
    again.forget()
    if allowed:
        again.require_no_single_site("run-1", scored, 3)
    else:
        text = builders.refused(424, again.require_no_single_site, "run-1", scored, 3)
        assert text.startswith("sites: must be those of the last evaluation, or fewer of them by 3")
    # A later evaluation takes the place of the one before.
    again.note_evaluated("run-1", scored)
    again.require_no_single_site("run-1", scored, 3)


@pytest.mark.parametrize("text", ["", "7", "[", "null"])
def test_where_the_evaluation_s_sites_cannot_be_read_nothing_is_scored(tmp_path, text):
    answered = ReplayGuard(tmp_path)
    answered.note_evaluated("run-1", SITES)
    (tmp_path / "run-1.evaluated").write_text(text)
    assert "damaged" in builders.refused(423, answered.require_no_single_site, "run-1", SITES, 3)
