import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.func import functional_call, vmap

from fedge.shared.models.recurrent import GRU, LSTM, RecurrentClassifier, RecurrentLanguageModel

PAIRS = [(LSTM, nn.LSTM), (GRU, nn.GRU)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_both_ways_to_compute_are_torchs_recurrence(ours, torchs, bidirectional):
    torch.manual_seed(0)
    network = ours(3, 4, layers=2, bidirectional=bidirectional)
    reference = torchs(3, 4, 2, batch_first=True, bidirectional=bidirectional)
    reference.load_state_dict(network.state_dict())
    x = torch.randn(5, 7, 3)
    expected = reference(x)[0]
    torch.testing.assert_close(network(x), expected)
    weights = dict(network.named_parameters())
    stepwise = vmap(lambda x: functional_call(network, weights, (x,)))(x[None])[0]
    torch.testing.assert_close(stepwise, expected)


def test_another_order_of_gates_is_found_out():
    torch.manual_seed(0)
    network, wrong = LSTM(3, 4), LSTM(3, 4)
    swapped = {k: torch.cat(v.chunk(4)[::-1]) for k, v in network.state_dict().items()}
    wrong.load_state_dict(swapped)
    x = torch.randn(5, 7, 3)
    assert (network(x) - wrong(x)).abs().max() > 0.01


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_by_example_are_those_of_each_example_alone(cell):
    torch.manual_seed(0)
    network = RecurrentClassifier(features=3, classes=2, cell=cell, hidden=4, bidirectional=True)
    assert not ModuleValidator.validate(network, strict=False)
    x = torch.randn(3, 6, 3)
    alone = []
    for example in x:
        network.zero_grad()
        network(example[None]).square().sum().backward()
        alone.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    module = GradSampleModule(network, loss_reduction="sum")
    module(x.requires_grad_()).square().sum().backward()
    for index, p in enumerate(network.parameters()):
        torch.testing.assert_close(p.grad_sample, torch.stack([grads[index] for grads in alone]))


def test_the_language_model_does_not_see_what_comes():
    torch.manual_seed(0)
    network = RecurrentLanguageModel(tokens=9, embedding=4, hidden=4)
    x = torch.randint(0, 9, (2, 6))
    changed = x.clone()
    changed[:, 4:] = (x[:, 4:] + 1) % 9
    found, other = network(x), network(changed)
    torch.testing.assert_close(found[:, :4], other[:, :4])
    assert (found[:, 4:] - other[:, 4:]).abs().min() > 0


def test_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match="cell: must be lstm or gru, got 'rnn'"):
        RecurrentClassifier(features=3, classes=2, cell="rnn")
