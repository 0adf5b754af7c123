import os

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedge.client import policy
from fedge.client.policy import PolicyFile
from fedge.shared import protocol
from fedge.shared.errors import ConfigError, DeployError, SiteError

BUNDLE, OTHER = "ab" * 32, "cd" * 32
GOOD = {"tasks": ["digits"], "bundles": [BUNDLE], "versions": ["0.1.0"]}
ASKED = {
    protocol.TASK: "digits",
    protocol.VERSION: "0.1.0",
    protocol.SERVER_ROUND: 3,
    protocol.COHORT: 4,
}


def request(**changes):
    values = ASKED | {key.replace("_", "-"): value for key, value in changes.items()}
    return RecordDict(
        {protocol.CONFIG: ConfigRecord({k: v for k, v in values.items() if v is not None})}
    )


def refused(code, call, *args):
    with pytest.raises(SiteError) as caught:
        call(*args)
    assert caught.value.code == code
    return caught.value.message


@pytest.fixture
def allowed(tmp_path):
    return policy.write(tmp_path, **GOOD)


def test_the_written_file_is_commented_and_read_again(tmp_path, allowed):
    assert policy.read(tmp_path) == allowed
    assert (allowed.tasks, allowed.bundles, allowed.versions) == (
        ("digits",),
        (BUNDLE,),
        ("0.1.0",),
    )
    assert (allowed.max_rounds, allowed.min_cohort, allowed.device) == (1000, 2, "auto")
    assert (allowed.gpu_memory_fraction, allowed.max_request_mib) == (0.9, 1024)
    assert allowed.memory_gib is None
    assert allowed.share_statistics is True
    text = (tmp_path / "policy.toml").read_text()
    assert text.count("# ") > 8
    (tmp_path / "policy.toml").write_text(text.replace("# memory-gib", "memory-gib"))
    assert policy.read(tmp_path).memory_gib == 8.0


def test_names_are_written_as_toml(tmp_path):
    odd = ['a"b', "c\\d", "e\nf"]
    assert policy.write(tmp_path, **GOOD | {"tasks": odd}).tasks == tuple(odd)
    assert policy.write(tmp_path, **GOOD | {"bundles": []}).bundles == ()


@pytest.mark.parametrize(
    "change",
    [
        {"bundles": ["AB" * 32]},
        {"bundles": ["ab"]},
        {"max_rounds": 0},
        {"min_cohort": -1},
        {"device": "tpu"},
        {"device": "cuda:x"},
        {"tasks": [""]},
    ],
)
def test_bad_values_are_refused_and_nothing_is_written(tmp_path, change):
    with pytest.raises(ConfigError) as caught:
        policy.write(tmp_path, **GOOD | change)
    assert caught.value.code == 201
    assert not (tmp_path / "policy.toml").exists()


def test_there_is_no_default(tmp_path):
    with pytest.raises(DeployError) as caught:
        PolicyFile(tmp_path)
    assert caught.value.code == 901
    assert "policy.toml" in caught.value.message
    (tmp_path / "policy.toml").write_text("")
    with pytest.raises(ConfigError):
        PolicyFile(tmp_path)


@pytest.mark.parametrize(
    "kind", [protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE, protocol.PROBE]
)
def test_what_is_named_is_allowed(allowed, kind):
    policy.allow(allowed, kind, request(), BUNDLE)


@pytest.mark.parametrize(
    "kind", [protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE, protocol.PROBE]
)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "heart"}, "task: must be one of digits"),
        ({"task": None}, "task:"),
        ({"fedge_version": "0.2.0"}, "fedge-version: must be one of 0.1.0"),
        ({"fedge_version": None}, "fedge-version:"),
        ({"server_round": 1001}, "server-round: must be at most 1000"),
        ({"server_round": True}, "server-round:"),
        ({"server_round": None}, "server-round:"),
    ],
)
def test_what_is_not_named_is_refused(allowed, kind, change, named):
    assert named in refused(418, policy.allow, allowed, kind, request(**change), BUNDLE)


@pytest.mark.parametrize("cohort", [1, None, True, "4", 4.0])
def test_a_small_cohort_is_refused_where_weights_or_counts_go_out(allowed, cohort):
    for kind in (protocol.TRAIN, protocol.EVALUATE):
        message = refused(418, policy.allow, allowed, kind, request(cohort=cohort), BUNDLE)
        assert "cohort: must be at least 2" in message
    policy.allow(allowed, protocol.REGISTER, request(cohort=cohort), BUNDLE)


@pytest.mark.parametrize("standardise", ["federated", None, 3])
def test_sums_over_features_stay_where_they_are_not_to_be_shared(tmp_path, standardise):
    own = policy.write(tmp_path, **GOOD, share_statistics=False)
    assert own.share_statistics is False
    asked = request(standardise=standardise)
    message = refused(418, policy.allow, own, protocol.REGISTER, asked, BUNDLE)
    assert "standardise: must be site while share-statistics is false by policy.toml" in message
    # Nothing of the kind leaves with another request, or where the site standardises alone.
    policy.allow(own, protocol.TRAIN, asked, BUNDLE)
    policy.allow(own, protocol.REGISTER, request(standardise="site"), BUNDLE)


def test_they_are_shared_by_default_and_where_the_file_is_older_than_the_key(tmp_path, allowed):
    path = tmp_path / "policy.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("share-stat")))
    assert policy.read(tmp_path) == allowed
    policy.allow(allowed, protocol.REGISTER, request(standardise="federated"), BUNDLE)


def test_a_bundle_that_is_not_approved_is_refused_first(allowed):
    for bundle in (OTHER, ""):
        refused(419, policy.allow, allowed, protocol.TRAIN, RecordDict(), bundle)
        refused(419, policy.approve, allowed, bundle)
    policy.approve(allowed, BUNDLE)


def test_a_request_without_configuration_is_refused(allowed):
    refused(418, policy.allow, allowed, protocol.TRAIN, RecordDict(), BUNDLE)


def test_a_change_holds_from_the_next_look(tmp_path, allowed):
    file = PolicyFile(tmp_path)
    assert file.current() is file.current()
    policy.write(tmp_path, **GOOD | {"tasks": ["heart"]})
    assert file.current().tasks == ("heart",)


def test_a_broken_file_refuses_everything_until_it_is_mended(tmp_path, allowed):
    file, path = PolicyFile(tmp_path), tmp_path / "policy.toml"
    good = path.read_text()
    path.write_text("devise = 'cpu'\n" + good)
    assert "the nearest is device" in refused(418, file.current)
    refused(418, file.current)
    path.unlink()
    refused(418, file.current)
    path.write_text(good)
    assert file.current() == allowed


def test_a_change_of_the_same_size_and_time_is_seen(tmp_path, allowed):
    file, path = PolicyFile(tmp_path), tmp_path / "policy.toml"
    before = path.stat()
    new = tmp_path / "new"
    new.write_text(path.read_text().replace("digits", "digitz"))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    assert file.current().tasks == ("digitz",)
