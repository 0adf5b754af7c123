from pathlib import Path

import pytest

from fedge.shared.config import Config
from fedge.shared.config_file import load
from fedge.shared.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "heart"])
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
