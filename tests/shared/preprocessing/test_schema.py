"""Schemas: what goes to JSON comes back, and nothing else is taken for a schema."""

import json

import pytest

from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema

TABLE = InputSchema(
    shape=(2,),
    features=(
        Feature("age", 0.0, 120.0, unit="years"),
        Feature("sex", 0.0, 1.0, categories=(0.0, 1.0)),
    ),
)
IMAGE = InputSchema(shape=(8, 8), dtype="float64")
OUTPUTS = (
    OutputSchema(labels=("no", "yes"), activation="sigmoid", threshold=0.3),
    OutputSchema(labels=tuple("0123456789"), activation="softmax"),
)


@pytest.mark.parametrize("schema", [TABLE, IMAGE])
def test_input_round_trip_through_text(schema: InputSchema):
    assert InputSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


@pytest.mark.parametrize("schema", OUTPUTS)
def test_output_round_trip_through_text(schema: OutputSchema):
    assert OutputSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "text",
        {},
        {"shape": 3, "dtype": "float32", "features": []},
        {"shape": ["x"], "dtype": "float32", "features": []},
        {"shape": [float("inf")], "dtype": "float32", "features": []},
        {"shape": [2], "dtype": "float32"},
        {"shape": [2], "dtype": "float32", "features": [{"name": "age"}]},
        TABLE.to_json() | {"features": [{**TABLE.to_json()["features"][0], "low": "cold"}]},
        TABLE.to_json() | {"features": [{**TABLE.to_json()["features"][0], "high": 10**400}]},
    ],
)
def test_what_is_no_input_schema_is_refused(value):
    with pytest.raises(BundleError) as refused:
        InputSchema.from_json(value)
    assert refused.value.code == 706


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {},
        {"labels": ["a"], "activation": "softmax"},
        {"labels": ["a"], "activation": "relu", "threshold": 0.5},
        {"labels": ["a"], "activation": ["softmax"], "threshold": 0.5},
        {"labels": None, "activation": "softmax", "threshold": 0.5},
        {"labels": ["a"], "activation": "softmax", "threshold": "half"},
    ],
)
def test_what_is_no_output_schema_is_refused(value):
    with pytest.raises(BundleError) as refused:
        OutputSchema.from_json(value)
    assert refused.value.code == 706
