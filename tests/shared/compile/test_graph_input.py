import numpy as np
import pytest

from fedge.shared.compile.graph_input import GraphInput


def test_a_shape_is_float32_with_the_batch_alone_open():
    float_input = GraphInput.from_shape((3, 8, 8))
    assert float_input == GraphInput((3, 8, 8))
    assert GraphInput.from_shape(float_input) is float_input
    assert float_input.names == {0: "batch"}
    x = float_input.sample(np.random.default_rng(0), 5)
    assert (x.shape, x.dtype) == ((5, 3, 8, 8), np.float32)


def test_open_axes_take_any_size():
    float_input = GraphInput((3, 8, 16), open={3: "width", 2: "height"})
    assert float_input.names == {0: "batch", 2: "height", 3: "width"}
    assert float_input.sizes == {"height": 8, "width": 16}
    assert float_input.resized({"width": 40}) == (3, 8, 40)
    assert float_input.sample(np.random.default_rng(0), 2, {"height": 4}).shape == (2, 3, 4, 16)
    with pytest.raises(
        ValueError, match=r"sizes: must be of \['height', 'width'\], got \['length'\]"
    ):
        float_input.resized({"length": 4})


def test_tokens_are_all_below_their_number():
    x = GraphInput((9,), tokens=4).sample(np.random.default_rng(0), 50)
    assert x.dtype == np.int64
    assert set(x.flat) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (0,)},
        {"shape": (2.0,)},
        {"shape": (2,), "tokens": -1},
        {"shape": (2,), "open": {0: "length"}},
        {"shape": (2,), "open": {2: "length"}},
        {"shape": (2,), "open": {1: "batch"}},
        {"shape": (2,), "open": {1: "4*length"}},
        {"shape": (2, 2), "open": {1: "side", 2: "side"}},
    ],
)
def test_what_no_graph_has_is_refused(fields):
    with pytest.raises(ValueError, match=f"^{[*fields][-1]}: must be"):
        GraphInput(**fields)
