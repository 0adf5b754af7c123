import json
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedge.shared.config.error_messages import keys, shown
from fedge.shared.config.federation import Config
from fedge.shared.config.reader import (
    MAX_FILE,
    dump,
    from_tree,
    load,
    load_resolved,
    override,
    schema,
    strategies,
)
from fedge.shared.errors import ConfigError

MINIMAL = '[task]\nname = "digits"\n'


def read(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    return caught.value


def test_minimal_file_gets_the_defaults(tmp_path):
    config = read(tmp_path, MINIMAL)
    assert config.task.name == "digits"
    assert config.run.rounds == 10
    assert config.strategy.name == "FedAvg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "task.name: must be given, got nothing"),
        ("[task]", "task.name: must be given, got nothing"),
        ("task = 3", "task: must be a table, got 3"),
        (MINIMAL + "run = [1]\n", None),
        (MINIMAL + "[round]\ndeadline = -1", "round.deadline: must be greater than 0, got -1"),
        (MINIMAL + "[run]\nrounds = 0", "run.rounds: must be at least 1, got 0"),
        (MINIMAL + "[run]\nrounds = true", "run.rounds: must be a whole number, got true"),
        (MINIMAL + '[run]\nrounds = "3"', 'run.rounds: must be a whole number, got "3"'),
        (MINIMAL + "[run]\nrounds = 3.0", "run.rounds: must be a whole number, got 3.0"),
        (MINIMAL + "[run]\nrounds = 3.5", "run.rounds: must be a whole number, got 3.5"),
        (MINIMAL + "[run]\nrounds = 1979-05-27", "run.rounds: must be a whole number, got the date or time 1979-05-27"),
        (MINIMAL + "[run]\nrounds = {a = 1}", "run.rounds: must be a whole number, got a table"),
        (MINIMAL + "[run]\nseed = 9223372036854775808",
         "run.seed: must be at most 9223372036854775807, got 9223372036854775808"),
        (MINIMAL + f"[run]\nseed = 0x{'f' * 300}",
         "run.seed: must be at most 9223372036854775807, got a number of 1200 bits"),
        (MINIMAL + "[train]\nmomentum = 1", "train.momentum: must be less than 1, got 1"),
        (MINIMAL + "[train]\nmomentum = false", "train.momentum: must be a number, got false"),
        (MINIMAL + "[train]\nlearning-rate = inf", "train.learning-rate: must be finite, got inf"),
        (MINIMAL + "[train]\nlearning-rate = nan", "train.learning-rate: must be finite, got nan"),
        (MINIMAL + "[train]\nlocal-epochs = 1\nlocal-steps = 1",
         "train: must hold local-epochs or local-steps, got both"),
        (MINIMAL + '[data]\npartition = "irid"',
         "data.partition: must be 'dirichlet', 'iid' or 'natural', got \"irid\""),
        (MINIMAL + "[data]\npath = 3", "data.path: must be text, got 3"),
        (MINIMAL + '[data]\npath = ""', "data.path: must be a path, got empty text or a NUL"),
        (MINIMAL + '[data]\npath = "a\\u0000b"', "data.path: must be a path, got empty text or a NUL"),
        (MINIMAL + '[round]\nrequire-sites = "a"', 'round.require-sites: must be a list, got "a"'),
        (MINIMAL + '[round]\nrequire-sites = ["a", "B"]', "round.require-sites[1]: must match"),
        (MINIMAL + "[strategy]\neta = 1", "strategy.name: must be given, got nothing"),
        (MINIMAL + '[strategy]\nname = "FedAdm"', 'got "FedAdm"; the nearest is FedAdam'),
        (MINIMAL + "[strategy]\nname = 3", "strategy.name: must be one of FedAvg, FedProx,"),
        (MINIMAL + '[strategy]\nname = "FedAdam"\neta = 0', "strategy.eta: must be greater than 0, got 0"),
        (MINIMAL + '[strategy]\nname = "FedAdam"\nbias-correction = 1',
         "strategy.bias-correction: must be true or false, got 1"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_by_its_key(tmp_path, text, message):
    if message is None:  # below [task], so another key of that section
        assert refusal(tmp_path, text).code == 202
        return
    error = refusal(tmp_path, text)
    assert error.code == 201
    assert message in error.message
    # What pydantic would say of its own schema.
    for foreign in ("Input should", "FedAdam.eta", "learning_rate", "pydantic", "type="):
        assert foreign not in error.message


@pytest.mark.parametrize(
    ("text", "path", "nearest"),
    [
        ("rounds = 3\n" + MINIMAL, "rounds", "run.rounds"),
        ("learning_rate = 3\n" + MINIMAL, "learning_rate", "train.learning-rate"),
        (MINIMAL + "[run]\nroundz = 3", "run.roundz", "run.rounds"),
        (MINIMAL + "[run]\nevaluate_every = 3", "run.evaluate_every", "run.evaluate-every"),
        (MINIMAL + "[train]\nrounds = 3", "train.rounds", "run.rounds"),
        (MINIMAL + "[runn]\nrounds = 3", "runn", "run"),
        (MINIMAL + '[strategy]\nname = "FedAdam"\nbeta1 = 0.3', "strategy.beta1", "strategy.beta-1"),
        ("[task]\nnme = 'digits'", "task.nme", "task.name"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path, text, path, nearest):
    error = refusal(tmp_path, text)
    assert error.code == 202
    assert error.message.startswith(f"{path}: must be a known key")
    assert f"the nearest is {nearest}" in error.message


def test_an_unknown_key_like_none_gets_no_offer(tmp_path):
    error = refusal(tmp_path, 'qqqqqqqq = "x"\n' + MINIMAL)
    assert error.message == "qqqqqqqq: must be a known key; there is none like it"


def test_a_key_of_another_strategy_says_whose_it_is(tmp_path):
    error = refusal(tmp_path, MINIMAL + '[strategy]\nname = "FedAvg"\neta = 1.0')
    assert (error.code, error.message) == (
        202,
        "strategy.eta: must be a key of FedAvg, got a key of FedAdam, FedYogi, FedAdagrad",
    )


def test_several_failures_are_all_listed_where_that_is_short(tmp_path):
    error = refusal(tmp_path, MINIMAL + "[run]\nrounds = 0\nseed = -1\nroundz = 3")
    assert error.code == 202  # the misspelt key first, as it is often the cause of the others
    assert [part.split(":")[0] for part in error.message.split("; ") if ":" in part] == [
        "run.roundz",
        "run.rounds",
        "run.seed",
    ]


def test_many_failures_are_counted(tmp_path):
    lines = "".join(f"unknown-key-number-{i} = 1\n" for i in range(50))
    error = refusal(tmp_path, MINIMAL + "[run]\n" + lines)
    assert error.message.endswith("(and 49 more)")
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"\xff\xfe", 203, "must be UTF-8, got byte 0xff in line 1"),
        (b"# fine\n[task]\nname = '\xe9'\n", 203, "got byte 0xe9 in line 3"),
        (b"#" * (MAX_FILE + 1), 203, "must be at most 1048576 bytes"),
        (b"[task]\nname = \n", 204, "line 2, column 8"),
        (b"[task", 204, "line 1, column 6"),
        (b"[task]\nname = [", 204, "line 2, column 9"),
        (b"[task]\nname = 'a'\nname = 'b'", 204, "line 3"),
        (b"a = " + b"[" * 100_000, 204, "nested too deeply"),
        (b"a = " + b"9" * 10_000, 204, "too many digits"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, content, code, said):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.code == code
    assert said in caught.value.message
    assert "config.toml" in caught.value.message


def test_the_largest_file_is_read(tmp_path):
    text = MINIMAL + "#" * (MAX_FILE - len(MINIMAL))
    assert read(tmp_path, text).task.name == "digits"


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, said in [
        (tmp_path, "a directory"),
        (pipe, "a device, socket or pipe"),
        (tmp_path / "absent.toml", "nothing of that name"),
        (Path("a\0b"), "null"),
        (tmp_path / ("x" * 300), "long"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.code == 203
        assert said in caught.value.message


def test_overrides_are_toml_and_bare_words_are_text(tmp_path):
    config = read(
        tmp_path,
        MINIMAL,
        "run.rounds=3",
        "strategy.name=FedAdam",
        "strategy.eta = 0.5",
        "data.path=../some/heart",
        'round.require-sites=["site-1", "site-2"]',
        "run.rounds=4",
    )
    assert config.run.rounds == 4
    assert config.strategy.name == "FedAdam" and config.strategy.eta == 0.5
    assert config.data.path == Path("../some/heart")
    assert config.round.require_sites == ("site-1", "site-2")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("run.rounds", 205, 'must be KEY=VALUE, got "run.rounds"'),
        ("run.rounds=", 205, "must be KEY=VALUE"),
        ("=3", 205, "must be KEY=VALUE"),
        (".rounds=3", 205, "must be KEY=VALUE"),
        ("run..rounds=3", 205, "must be KEY=VALUE"),
        ("run.rounds=3\nseed=4", 205, "must be one value"),
        ("round.require-sites=[a]", 205, "must be a TOML value"),
        ("run.rounds=" + "[" * 50_000, 205, "must be a TOML value"),
        ("run.rounds=3x", 201, 'run.rounds: must be a whole number, got "3x"'),
        ("runn.rounds=3", 202, "the nearest is run"),
        ("run.roundz=3", 202, "the nearest is run.rounds"),
        ("task.name.first=3", 201, 'task.name: must be a table, got "digits"'),
    ],
)
def test_a_bad_override_is_refused(tmp_path, text, code, said):
    error = refusal(tmp_path, MINIMAL, text)
    assert error.code == code
    assert said in error.message
    assert len(error.message) < 400


def test_dump_is_kebab_case_without_unset_keys(tmp_path):
    text = dump(read(tmp_path, MINIMAL, "data.path=a/b", "train.local-steps=7"))
    tree = tomllib.loads(text)
    assert tree["train"]["learning-rate"] == 0.05
    assert tree["train"]["local-steps"] == 7 and "local-epochs" not in tree["train"]
    assert tree["data"]["path"] == "a/b"
    assert "_" not in "".join(key for section in tree.values() for key in section)


KINDS = {
    "string": st.text(min_size=1, max_size=20).filter(lambda s: "\0" not in s),
    "boolean": st.booleans(),
    "integer": st.integers(0, 100),
    "number": st.floats(0, 1, exclude_min=True, exclude_max=True),
}


@given(st.data())
def test_what_is_dumped_reads_back_the_same(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(strategies())))
    tree = {
        "task": {"name": data.draw(KINDS["string"])},
        "run": {"seed": data.draw(st.integers(0, 2**63 - 1)), "rounds": data.draw(st.integers(1, 9))},
        "data": {"path": data.draw(KINDS["string"]), "alpha": data.draw(KINDS["number"])},
        "train": {"momentum": data.draw(KINDS["number"])},
        "strategy": {"name": name},
        "round": {"require-sites": ["site-1"] * data.draw(st.integers(0, 3))},
    }  # fmt: skip
    config = from_tree(tree)
    path = tmp_path_factory.mktemp("resolved") / "config.toml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_resolved(path) == config


WORDS = sorted(
    {part for path in keys() for part in path} | set(strategies()) | {"x", "rounds ", ""}
)
LEAVES = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
    st.dates(),
    st.times(),
    st.datetimes(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), TREES, max_size=6))
@example({"strategy": {"name": ["FedAvg"]}})
@example({"strategy": {"name": {}}})
@example({"task": {"name": "digits"}, "train": {"learning-rate": 10**400}})
@example({"task": []})
def test_any_tree_is_a_configuration_or_one_error(tree):
    try:
        config = from_tree(tree)
    except ConfigError as error:
        assert error.code in (201, 202)
        assert 0 < len(error.message) < 600
    else:
        assert isinstance(config, Config)


@given(
    st.text(max_size=40)
    | st.builds(
        "{}={}".format, st.sampled_from([".".join(k) for k in keys()]), st.text(max_size=20)
    )
)
def test_any_override_is_applied_or_one_error(text):
    tree = {"task": {"name": "digits"}}
    try:
        override(tree, text)
        from_tree(tree)
    except ConfigError as error:
        assert error.code in (201, 202, 205)


def test_deep_tables_are_refused_not_a_crash(tmp_path):
    assert refusal(tmp_path, MINIMAL + "[" + ".".join("a" * 5000) + "]").code == 202


def test_schema_names_keys_as_the_file_does():
    found = schema()
    assert json.loads(json.dumps(found)) == found
    rounds = found["$defs"]["RunSection"]["properties"]["rounds"]
    assert rounds["minimum"] == 1 and rounds["description"]
    assert "learning-rate" in found["$defs"]["TrainSection"]["properties"]
    assert found["required"] == ["task"]


def test_keys_list_every_key_once():
    found = [".".join(path) for path in keys()]
    assert len(found) == len(set(found))
    assert {"run.rounds", "data.path", "strategy.name", "strategy.eta"} <= set(found)


def test_strategies_are_the_thirteen():
    found = strategies()
    assert len(found) == 13
    assert all(text.endswith(".") and len(text) < 90 for text in found.values())


def test_a_shown_value_is_short():
    assert shown("x" * 1000).endswith("…") and len(shown("x" * 1000)) == 60
    assert shown(10**5000) == "a number of 16610 bits"
    assert shown([1, 2]) == "a list of 2"
