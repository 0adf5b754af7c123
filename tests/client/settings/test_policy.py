import json
import os

import pytest
from builders import refused
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedge.client.settings import policy, policy_writer
from fedge.client.settings.policy import PolicyFile, SecurePolicy
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared import protocol
from fedge.shared.errors import ConfigError, DeployError
from fedge.shared.secagg import messages, transcript

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


@pytest.fixture
def allowed(tmp_path):
    return policy_writer.write(tmp_path, **GOOD)


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
    assert (allowed.share_ranges, policy.shares_ranges(allowed)) == (None, True)
    text = (tmp_path / "policy.toml").read_text()
    assert text.count("# ") > 8
    (tmp_path / "policy.toml").write_text(text.replace("# memory-gib", "memory-gib"))
    assert policy.read(tmp_path).memory_gib == 8.0
    (tmp_path / "policy.toml").write_text(text.replace("# share-ranges", "share-ranges"))
    assert policy.read(tmp_path).share_ranges is False
    for share in (True, False):
        own = policy_writer.write(tmp_path / "own", **GOOD, share_ranges=share)
        assert (own.share_ranges, policy.shares_ranges(own)) == (share, share)


def test_names_are_written_as_toml(tmp_path):
    odd = ['a"b', "c\\d", "e\nf"]
    assert policy_writer.write(tmp_path, **GOOD | {"tasks": odd}).tasks == tuple(odd)
    assert policy_writer.write(tmp_path, **GOOD | {"bundles": []}).bundles == ()


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
        policy_writer.write(tmp_path, **GOOD | change)
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
    own = policy_writer.write(tmp_path, **GOOD, share_statistics=False)
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
    policy_writer.write(tmp_path, **GOOD | {"tasks": ["heart"]})
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


SECURE = {
    "protocol": transcript.VERSION,
    "attempt": 1,
    "clipping-bound": 10.0,
    "value-bound": 4.0,
    "state-bound": 100.0,
    "weight-cap": 10_000,
}


@pytest.mark.parametrize(
    ("secure", "message"),
    [
        ({"min-sites": 4, "corrupt-sites": 1}, ""),
        ({"min-sites": 3, "corrupt-sites": 0}, ""),
        ({"min-sites": 3}, ""),
        ({"min-sites": 3, "corrupt-sites": 1}, "above 3 times corrupt-sites, 3, got 3"),
        ({"min-sites": 6, "corrupt-sites": 2}, "above 3 times corrupt-sites, 6, got 6"),
        ({"corrupt-sites": -1}, "corrupt-sites"),
    ],
)
def test_fewer_than_a_third_of_the_fewest_sites_may_be_corrupt(tmp_path, secure, message):
    """The server chooses who takes part, so the assumption is over the smallest sum that the site agrees to."""
    policy_writer.write(tmp_path, **GOOD)
    path = tmp_path / "policy.toml"
    lines = "".join(f"{key} = {value}\n" for key, value in secure.items())
    head, _, tail = path.read_text().partition("[secure-aggregation]\n")
    path.write_text(
        f"{head}[secure-aggregation]\n{lines}[privacy]\n{tail.partition('[privacy]')[2]}"
    )
    if not message:
        assert policy.read(tmp_path).secure_aggregation.min_sites == secure["min-sites"]
    else:
        with pytest.raises(ConfigError, match=message):
            policy.read(tmp_path)


def masked(**changes):
    asked = request()
    values = SECURE | {key.replace("_", "-"): value for key, value in changes.items()}
    asked[messages.SECURE] = ConfigRecord({k: v for k, v in values.items() if v is not None})
    return asked


@pytest.fixture
def masked_only(tmp_path):
    return policy_writer.write(tmp_path, **GOOD, secure=SecurePolicy(required=True))


def test_the_terms_of_secure_aggregation_are_written_and_read_again(tmp_path, allowed):
    assert allowed.secure_aggregation == SecurePolicy()
    assert (allowed.secure_aggregation.required, allowed.secure_aggregation.min_sites) == (False, 5)
    terms = SecurePolicy.model_validate(
        {
            "required": True,
            "min-sites": 12,
            "max-clipping-bound": 1.5,
            "max-weight-cap": 300,
        }
    )
    assert policy_writer.write(tmp_path, **GOOD, secure=terms).secure_aggregation == terms
    # A policy of an older fedge has no such section.
    path = tmp_path / "policy.toml"
    path.write_text(path.read_text().partition("[secure-aggregation]")[0])
    assert policy.read(tmp_path).secure_aggregation == SecurePolicy()


@pytest.mark.parametrize("kind", [protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE])
def test_where_masks_are_required_nothing_leaves_in_clear(masked_only, allowed, kind):
    asked = request(standardise="site")
    message = refused(418, policy.allow, masked_only, kind, asked, BUNDLE)
    assert message == f"{kind}: must be under secure aggregation by policy.toml, got 'in clear'"
    policy.allow(masked_only, kind, masked(), BUNDLE)
    # Without the requirement both ways are open.
    policy.allow(allowed, kind, asked, BUNDLE)
    policy.allow(allowed, kind, masked(), BUNDLE)


@pytest.mark.parametrize(
    ("section", "terms", "refusal"),
    [
        ({"clipping-bound": 100.0}, {}, ""),
        ({"clipping-bound": 100.5}, {}, "privacy.clipping-bound: must be at most 100"),
        ({"corrupt-sites": 2}, {"corrupt-sites": 2}, ""),
        ({"corrupt-sites": 1}, {"corrupt-sites": 2}, "privacy.corrupt-sites: must be at least 2"),
        ({}, {"corrupt-sites": 2}, "privacy.corrupt-sites: must be at least 2"),
    ],
)
def test_terms_of_distributed_noise_hold_where_privacy_is_not_required_too(
    tmp_path, section, terms, refusal
):
    owner = policy_writer.write(tmp_path, **GOOD, privacy=PrivacyPolicy.model_validate(terms))
    asked = masked()
    asked[protocol.CONFIG][protocol.PRIVACY] = json.dumps(
        {"mechanism": "distributed", "noise-multiplier": 1.0, **section}
    )
    if refusal:
        assert refused(418, policy.allow, owner, protocol.TRAIN, asked, BUNDLE).startswith(refusal)
    else:
        policy.allow(owner, protocol.TRAIN, asked, BUNDLE)
    # A probe is about no data.
    policy.allow(owner, protocol.PROBE, asked, BUNDLE)


def test_where_masks_are_required_probes_and_exchanges_are_answered(masked_only):
    policy.allow(masked_only, protocol.PROBE, request(), BUNDLE)
    for kind in (messages.STATISTICS, *messages.STEPS):
        policy.allow(masked_only, kind, masked(), BUNDLE)


def test_a_record_of_another_type_does_not_pass_for_a_mask(masked_only):
    asked = request(standardise="site")
    asked[messages.SECURE] = MetricRecord({"attempt": 1})
    refused(418, policy.allow, masked_only, protocol.TRAIN, asked, BUNDLE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clipping_bound": 100.5}, "clipping-bound: must be at most 100"),
        ({"clipping_bound": float("nan")}, "clipping-bound: must be at most 100"),
        ({"clipping_bound": float("inf")}, "clipping-bound: must be at most 100"),
        ({"clipping_bound": "1"}, "clipping-bound: must be at most 100"),
        ({"clipping_bound": [1.0]}, "clipping-bound: must be at most 100"),
        ({"weight_cap": 2**23 + 1}, "weight-cap: must be at most 8.38861e+06"),
    ],
)
def test_bounds_above_the_policys_are_refused(masked_only, allowed, change, named):
    for own in (masked_only, allowed):
        for kind in (protocol.TRAIN, protocol.EVALUATE, messages.STATISTICS):
            assert named in refused(418, policy.allow, own, kind, masked(**change), BUNDLE)


def test_the_other_limits_hold_under_masks_too(masked_only):
    asked = masked()
    asked[protocol.CONFIG][protocol.COHORT] = 1
    assert "cohort" in refused(418, policy.allow, masked_only, protocol.TRAIN, asked, BUNDLE)
    asked[protocol.CONFIG][protocol.SERVER_ROUND] = 1001
    for kind in messages.STEPS:
        assert "server-round" in refused(418, policy.allow, masked_only, kind, asked, BUNDLE)
    refused(419, policy.allow, masked_only, messages.UNMASK, masked(), OTHER)


def test_masked_statistics_need_no_leave_to_share_them(tmp_path):
    """What share-statistics keeps at the site are its own sums; under a mask they are not its own."""
    own = policy_writer.write(tmp_path, **GOOD, share_statistics=False)
    policy.allow(own, messages.STATISTICS, masked(), BUNDLE)
    policy.allow(own, protocol.REGISTER, masked(), BUNDLE)


@pytest.mark.parametrize(
    ("key", "bad"),
    [("min-sites", 2), ("max-clipping-bound", 0), ("max-weight-cap", 2**23 + 1), ("required", 1)],
)
def test_terms_out_of_range_are_refused(tmp_path, allowed, key, bad):
    path = tmp_path / "policy.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{key} = {bad}" if x.startswith(key) else x for x in lines))
    with pytest.raises(ConfigError) as caught:
        policy.read(tmp_path)
    assert caught.value.code in (201, 202, 203, 204)
    assert f"secure-aggregation.{key}" in caught.value.message
