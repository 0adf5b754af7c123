from pathlib import Path

import pytest
from builders import refused

from fedge.shared.config.federation import Config
from fedge.shared.config.reader import from_tree, load, strategies
from fedge.shared.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "heart", "gtsrb", "hmp-adl"])
def test_examples_are_valid_and_say_what_is_commonly_changed(name):
    path = EXAMPLES / f"{name}.toml"
    config = load(path)
    assert config.task.name == name
    text = path.read_text(encoding="utf-8")
    for key in ("rounds", "seed", "learning-rate", "batch-size", "name", "min-sites", "deadline"):
        assert f"\n{key} = " in text


def test_digits_and_breast_cancer_are_eight_unlike_sites():
    for name in ("digits", "breast-cancer"):
        config = load(EXAMPLES / f"{name}.toml")
        assert config.sites.count == 8
        assert (config.data.partition, config.data.alpha) == ("dirichlet", 0.5)


def test_heart_is_set_as_the_published_benchmark():
    config = load(EXAMPLES / "heart.toml", ["data.path=elsewhere"])
    assert config.data.partition == "natural"
    assert config.data.standardise == "site"
    assert config.data.path == Path("elsewhere")
    train = config.train
    assert (train.optimizer, train.learning_rate) == ("sgd", 0.001)
    assert (train.batch_size, train.local_steps, train.local_epochs) == (4, 100, None)
    assert config.run.rounds == 15


def test_a_configuration_never_changes():
    config = load(EXAMPLES / "digits.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.run.rounds = 3


def test_every_number_has_a_lower_bound():
    """A value without bounds would let a typing error through to training."""
    for name, section in Config.model_json_schema(by_alias=True)["$defs"].items():
        for key, value in section["properties"].items():
            for option in value.get("anyOf", [value]):
                if option.get("type") in ("integer", "number"):
                    low = option.keys() & {"minimum", "exclusiveMinimum"}
                    assert low, f"{name}.{key} has no lower bound"


def test_an_override_that_contradicts_the_file_is_refused():
    with pytest.raises(ConfigError, match="got both"):
        load(EXAMPLES / "heart.toml", ["train.local-epochs=2"])


def refusal(**sections):
    return refused(201, from_tree, {"task": {"name": "digits"}, **sections})


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_strategy_is_valid_with_nothing_else_set(name):
    assert from_tree({"task": {"name": "digits"}, "strategy": {"name": name}}).sites.count == 8


def test_a_quorum_needs_as_many_sites():
    assert refusal(sites={"count": 3}, round={"min-sites": 4}) == (
        "round.min-sites: must be at most 3 with 3 sites, got 4"
    )
    assert refusal(sites={"count": 1}) == "round.min-sites: must be at most 1 with 1 site, got 2"
    from_tree({"task": {"name": "digits"}, "sites": {"count": 3}, "round": {"min-sites": 3}})


@pytest.mark.parametrize(
    ("name", "key", "most"),
    [
        ("MultiKrum", "num-nodes-to-select", 8),
        ("Krum", "num-malicious-nodes", 2),
        ("MultiKrum", "num-malicious-nodes", 2),
        ("Bulyan", "num-malicious-nodes", 1),
    ],
)
def test_a_robust_strategy_needs_enough_sites(name, key, most):
    def asked(value):
        return {"strategy": {"name": name, key: value}}

    held = from_tree({"task": {"name": "digits"}, **asked(most)})
    assert getattr(held.strategy, key.replace("-", "_")) == most
    assert refusal(**asked(most + 1)) == (
        f"strategy.{key}: must be at most {most} with 8 sites, got {most + 1}"
    )


def test_two_sites_withstand_no_attacker():
    for name in ("Krum", "MultiKrum", "Bulyan"):
        tree = {"task": {"name": "digits"}, "sites": {"count": 2}}
        from_tree({**tree, "strategy": {"name": name}})
        said = refusal(sites={"count": 2}, strategy={"name": name, "num-malicious-nodes": 1})
        assert said == "strategy.num-malicious-nodes: must be at most 0 with 2 sites, got 1"


def test_natural_sites_are_counted_when_the_data_is_read():
    config = from_tree(
        {
            "task": {"name": "heart"},
            "data": {"partition": "natural"},
            "sites": {"count": 1},
            "round": {"min-sites": 4},
            "strategy": {"name": "Krum", "num-malicious-nodes": 3},
        }
    )
    assert config.round.min_sites == 4


def test_adam_takes_no_momentum():
    said = "train.momentum: must be 0 with adam, got 0.9"
    assert refusal(train={"optimizer": "adam", "momentum": 0.9}) == said
    example = EXAMPLES / "digits.toml"
    assert load(example, ["train.optimizer=adam", "train.momentum=0.0"]).train.momentum == 0
    with pytest.raises(ConfigError, match=said):
        load(example, ["train.optimizer=adam"])


def test_all_keys_that_disagree_are_named():
    said = refusal(sites={"count": 1}, train={"optimizer": "adam", "momentum": 0.5})
    assert said == (
        "train.momentum: must be 0 with adam, got 0.5;"
        " round.min-sites: must be at most 1 with 1 site, got 2"
    )


def masked(**section):
    return {"enabled": True, "min-sites": 3} | {k.replace("_", "-"): v for k, v in section.items()}


def test_masks_are_off_by_default_and_then_say_nothing():
    config = from_tree({"task": {"name": "digits"}})
    assert config.secure_aggregation.enabled is False
    # What would not fit under masks is of no account in clear.
    from_tree(
        {
            "task": {"name": "digits"},
            "strategy": {"name": "Krum"},
            "secure-aggregation": {"min-sites": 100},
        }
    )


@pytest.mark.parametrize(
    "name", ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "Scaffold"]
)
def test_means_can_be_had_under_masks(name):
    from_tree(
        {
            "task": {"name": "digits"},
            "strategy": {"name": name},
            "secure-aggregation": masked(),
        }
    )


def test_what_weighs_by_a_sites_own_loss_cannot():
    said = refusal(**{"strategy": {"name": "QFedAvg"}, "secure-aggregation": masked()})
    assert said == (
        "strategy.name: must be a mean weighted by examples with secure-aggregation,"
        " got QFedAvg, which weighs each site by its own loss"
    )


COMPARING = [
    ({"name": "FedMedian"}, 3),
    ({"name": "FedTrimmedAvg"}, 3),
    ({"name": "Krum"}, 3),
    ({"name": "Krum", "num-malicious-nodes": 1}, 5),
    ({"name": "MultiKrum", "num-malicious-nodes": 1}, 5),
    ({"name": "Bulyan"}, 3),
    ({"name": "Bulyan", "num-malicious-nodes": 1}, 7),
]


@pytest.mark.parametrize(("strategy", "least"), COMPARING)
def test_what_compares_replies_needs_groups(strategy, least):
    def tree(groups):
        return {
            "sites": {"count": 30},
            "strategy": strategy,
            "secure-aggregation": masked(groups=groups),
        }

    from_tree({"task": {"name": "digits"}, **tree(least)})
    said = refusal(**tree(least - 1))
    assert said == (
        f"secure-aggregation.groups: must be at least {least} with {strategy['name']}, which compares"
        f" replies and sees one a group, got {least - 1}"
    )


def test_a_sum_needs_as_many_sites_in_each_group():
    def said(**section):
        strategy = {"strategy": {"name": "FedMedian"}} if "groups" in section else {}
        return refusal(
            **{"sites": {"count": 8}, "secure-aggregation": masked(**section), **strategy}
        )

    assert said(min_sites=9) == (
        "secure-aggregation.min-sites: must be at most 8 with 8 sites, got 9"
    )
    assert said(groups=3) == (
        "secure-aggregation.min-sites: must be at most 2 in each group with 8 sites, got 3"
    )
    median = {"strategy": {"name": "FedMedian"}}
    tree = {"task": {"name": "digits"}, "sites": {"count": 9}, **median}
    from_tree({**tree, "secure-aggregation": masked(groups=3)})
    # Natural sites are counted when the data is read.
    from_tree(
        {
            "task": {"name": "heart"},
            "data": {"partition": "natural"},
            "secure-aggregation": masked(min_sites=20),
        }
    )


def test_a_sum_has_as_many_sites_as_counters_can_add_up():
    tree = {"task": {"name": "digits"}, "secure-aggregation": masked()}
    from_tree({**tree, "sites": {"count": 2048}})
    said = refusal(**{"sites": {"count": 2049}, "secure-aggregation": masked()})
    assert said == "sites.count: must be at most 2048 in a secure sum, got 2049"
    median = {"strategy": {"name": "FedMedian"}, "sites": {"count": 6144}}
    from_tree({**tree, **median, "secure-aggregation": masked(groups=3)})


def test_groups_are_for_strategies_that_compare():
    said = refusal(**{"sites": {"count": 12}, "secure-aggregation": masked(groups=2)})
    assert said.startswith("secure-aggregation.groups: must be 1 with FedAvg, which adds all")


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("min-sites", 2),
        ("groups", 0),
        ("clipping-bound", 0.0),
        ("value-bound", 2e6),
        ("state-bound", -1.0),
        ("weight-cap", 2**23 + 1),
        ("attempts", 0),
        ("deadline", 0.0),
    ],
)
def test_values_of_the_section_have_bounds(key, bad):
    assert f"secure-aggregation.{key}" in refusal(**{"secure-aggregation": masked(**{key: bad})})


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "heart", "gtsrb", "hmp-adl"])
def test_the_examples_run_under_masks_with_one_switch(name):
    config = load(EXAMPLES / f"{name}.toml", ["secure-aggregation.enabled=true"])
    assert config.secure_aggregation.enabled
