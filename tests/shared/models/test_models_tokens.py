"""What networks over tokens do with padding and with what comes later."""

import warnings

import pytest
import torch
from opacus import GradSampleModule

from fedge.shared.models.text_cnn import TextCNN
from fedge.shared.models.transformer import (
    Attention,
    TransformerClassifier,
    TransformerLanguageModel,
)

TOKENS = 12


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["text-cnn", "transformer"])
def classifier(request):
    if request.param == "text-cnn":
        return TextCNN(tokens=TOKENS, classes=3, embedding=8, maps=4)
    return TransformerClassifier(tokens=TOKENS, classes=3, length=20, width=8)


def test_padding_changes_nothing(classifier):
    x = torch.randint(1, TOKENS, (4, 7))
    longer = torch.cat([x, torch.zeros(4, 9, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(classifier(longer), classifier(x))
    other = torch.cat([x, torch.ones(4, 9, dtype=torch.int64)], dim=1)
    assert (classifier(other) - classifier(x)).abs().max() > 1e-3


def test_padding_alone_is_finite(classifier):
    assert classifier(torch.zeros(2, 7, dtype=torch.int64)).isfinite().all()


def test_the_order_of_tokens_matters(classifier):
    x = torch.arange(1, 9)[None]
    assert (classifier(x) - classifier(x.flip(1))).abs().max() > 1e-3


def test_the_language_model_does_not_see_what_comes():
    network = TransformerLanguageModel(tokens=TOKENS, length=20, width=8, layers=2)
    x = torch.randint(0, TOKENS, (2, 7))
    changed = x.clone()
    changed[:, 5:] = (x[:, 5:] + 1) % TOKENS
    found, other = network(x), network(changed)
    torch.testing.assert_close(found[:, :5], other[:, :5])
    assert (found[:, 5:] - other[:, 5:]).abs().max() > 1e-3


def test_attention_is_torchs():
    attention = Attention(8, 2)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": attention.project.weight,
            "in_proj_bias": attention.project.bias,
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    x, hidden = torch.randn(3, 5, 8), torch.ones(5, 5).triu(1).bool()
    expected, _ = reference(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(attention(x, ~hidden[None, None]), expected)


def test_too_long_a_sequence_is_refused():
    network = TransformerLanguageModel(tokens=TOKENS, length=5, width=8, layers=1)
    with pytest.raises(IndexError):
        network(torch.zeros(1, 6, dtype=torch.int64))


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width: must be a multiple of 3 heads, got 8"):
        TransformerLanguageModel(tokens=TOKENS, length=5, width=8, heads=3)


# As many examples as positions, and not: the first would hide that positions have no axis of the examples.
@pytest.mark.parametrize("examples", [5, 3])
@pytest.mark.parametrize("language", [False, True])
def test_positions_have_a_gradient_for_each_example(examples, language):
    if language:
        network = TransformerLanguageModel(tokens=TOKENS, length=5, width=8, layers=1)
        positions = network.decoder.position.weight
    else:
        network = TransformerClassifier(tokens=TOKENS, classes=3, length=5, width=8)
        positions = network.encoder.position.weight
    x = torch.randint(1, TOKENS, (examples, 5))
    single = [
        torch.autograd.grad(network(x[[row]]).square().mean(), positions)[0]
        for row in range(examples)
    ]
    module = GradSampleModule(network)
    # Torch says of every network's first layer that its input has no gradient.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
        module(x).square().mean().backward()
    torch.testing.assert_close(positions.grad_sample, torch.stack(single), atol=1e-6, rtol=1e-4)
