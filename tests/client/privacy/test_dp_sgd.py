"""DP-SGD: a step is the published one, draws and noise come from the given stream, and nothing else is told."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import builders
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedge.client.privacy.dp_sgd import train_privately
from fedge.client.privacy.noise_calibration import Noise, release_of
from fedge.client.training.local_steps import Examples
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.gaussian import normal
from fedge.shared.tasks.registry import get_task

KEY = bytes(range(32))


@pytest.fixture
def examples(data):
    return Examples(torch.from_numpy(data.train_features), torch.from_numpy(data.train_labels))


def network(task):
    torch.manual_seed(3)
    return task.network()


section = partial(builders.section, TrainSection, learning_rate=0.5, batch_size=10, local_steps=1)


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).double()


def drawn(entropy, rows, rate):
    return np.flatnonzero((entropy.uint64(rows) >> np.uint64(11)) < round(rate * 2**53))


def gradient(task, net, examples, row):
    loss = task.loss(net(examples.x[[row]]), examples.y[[row]])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, net.parameters())])


@pytest.mark.parametrize("bound", [0.05, 5.0])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_each_step_is_that_of_the_paper(task, examples, bound, mu):
    noise, settings = Noise(0.7, bound), section(**{"local-steps": 3})
    made = network(task)
    train_privately(task, made, examples, settings, noise, Entropy(key=KEY), proximal_mu=mu)
    net, entropy = network(task), Entropy(key=KEY)
    received = flat(net)
    for _ in range(3):
        rows = drawn(entropy, len(examples.y), 10 / len(examples.y))
        total = torch.zeros(received.numel(), dtype=torch.float64)
        for row in rows:
            g = gradient(task, net, examples, int(row)).double()
            total += g * min(1.0, bound / (float(g.norm()) + 1e-6))
        sizes = [p.numel() for p in net.parameters()]
        total += (
            0.7
            * bound
            * torch.from_numpy(np.concatenate([normal(size, entropy) for size in sizes]))
        )
        step = total / 10 + mu * (flat(net) - received)
        with torch.no_grad():
            for p, s in zip(net.parameters(), step.split(sizes), strict=True):
                p -= 0.5 * s.view(p.shape).float()
    torch.testing.assert_close(flat(made), flat(net), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_noise_has_the_deviation_that_is_charged_and_so_has_a_step_without_examples(
    task, examples
):
    # One example in ten thousand steps: nearly all are noise alone.
    few = Examples(examples.x[:1].repeat(37, 1), examples.y[:1].repeat(37))
    steps, noise = 400, Noise(2.0, 0.1)
    settings = TrainSection.model_validate(
        {"learning-rate": 1.0, "batch-size": 1, "local-steps": steps}
    )
    net = network(task)
    before = flat(net)
    train_privately(task, net, few, settings, noise, Entropy(key=KEY))
    # Each step divides by the batch size that is expected, 1; clipped gradients add 0.1 at most a step.
    moved = (flat(net) - before).numpy()
    deviation = 2.0 * 0.1 * math.sqrt(steps)
    assert np.abs(moved.mean()) < 4 * deviation / math.sqrt(moved.size) + 0.1 * steps / moved.size
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], moved.size)
    drift = (0.1 * steps) ** 2
    assert low * deviation**2 - drift < float((moved**2).sum()) < high * deviation**2 + 3 * drift


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_one_example_that_breaks_its_gradient_tells_nobody_that_it_was_there(task, examples, value):
    """With weights that a server chose. Its gradient counts as zeros: the step is that of the others."""

    def chosen():
        net = network(task)
        with torch.no_grad():
            next(net.parameters()).fill_(1e3)
        return net

    def trained(x, rows):
        net = chosen()
        part = Examples(x[rows], examples.y[rows])
        # Every example is in every step.
        settings = section(**{"batch-size": len(rows), "local-steps": 1})
        train_privately(task, net, part, settings, Noise(1e-9, 1.0), Entropy(key=KEY))
        return flat(net)

    hostile = examples.x.clone()
    hostile[0] = value
    everybody, others = list(range(10)), list(range(1, 10))
    broken = gradient(task, chosen(), Examples(hostile, examples.y), 0)
    assert not broken.isfinite().all(), "the attack"
    after, before = trained(hostile, everybody), flat(chosen())
    assert after.isfinite().all()
    torch.testing.assert_close(
        (after - before) * 10, (trained(hostile, others) - before) * 9, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("power", [20, 62, 63, 64, 100, 126, 127])
def test_one_example_more_takes_no_other_out_of_the_sum(power):
    """Weights of the server's choice bring every gradient to an end of float32, so that rounding by n could decide."""
    task = replace(
        get_task("digits"),
        network=lambda: nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)),
    )
    moved = {}
    for count in (*range(94, 100), 197):
        net = task.network()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
            net[0].bias.fill_(1e-10)
            net[2].weight.copy_(torch.tensor([[2.0**power], [-(2.0**power)]]))
        part = Examples(torch.zeros(count, 2), torch.ones(count, dtype=torch.int64))
        settings = section(**{"batch-size": count, "local-steps": 1, "learning-rate": 1.0})
        train_privately(task, net, part, settings, Noise(1e-9, 1.0), Entropy(key=KEY))
        # Every gradient is longer than C, and along the bias alone, or counts as nothing.
        moved[count] = round(count * float(1e-10 - net[0].bias.detach()), 3)
    assert set(moved.values()) == {0.0} or moved == {count: float(count) for count in moved}


class Peak(nn.Module):
    """Keeps what is larger than anything that a trial before the run would show it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("peak", torch.ones(1))

    def forward(self, x):
        if self.training:
            self.peak.copy_(torch.maximum(self.peak, x.detach().amax()))
        return x.flatten(1) + 0 * self.peak


def test_what_a_forward_pass_writes_stays_at_the_site(task, examples):
    def built():
        return nn.Sequential(Peak(), task.network())

    net = network(replace(task, network=built))
    before = flat(net)
    assert float(examples.x.max()) > 1
    train_privately(task, net, examples, section(), Noise(1.0, 1.0), Entropy(key=KEY))
    assert float(net[0].peak) == 1.0
    assert not torch.equal(flat(net), before)


def test_a_loss_that_cannot_be_batched_is_computed_row_by_row(task, examples):
    def loss(logits, labels):
        # A number of the batch, which vmap has none of.
        return sum(-logits[i].log_softmax(0)[int(y)] for i, y in enumerate(labels)) / len(labels)

    made = []
    for own in (task, replace(task, loss=loss)):
        net = network(own)
        train_privately(own, net, examples, section(), Noise(0.5, 1.0), Entropy(key=KEY))
        made.append(flat(net))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-6)


def test_no_two_rounds_have_the_same_noise(task, examples):
    both = []
    for _ in range(2):
        net = network(task)
        train_privately(task, net, examples, section(), Noise(1.0, 1.0), Entropy())
        both.append(flat(net))
    assert not torch.equal(*both)


def test_the_network_is_left_as_any_other(task, examples):
    net = network(task)
    train_privately(task, net, examples, section(), Noise(1.0, 1.0), Entropy())
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())
    # A second round in the same network, and plain training after it.
    train_privately(task, net, examples, section(), Noise(1.0, 1.0), Entropy())
    loss = task.loss(net(examples.x), examples.y)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("given", "rows", "expected"),
    [
        ({"local-steps": 7}, 40, Release(1.5, 0.25, 7)),
        ({"local-steps": None, "local-epochs": 3}, 40, Release(1.5, 0.25, 12)),
        ({"local-steps": None}, 35, Release(1.5, 10 / 35, 4)),
        ({"local-steps": 2}, 5, Release(1.5, 1.0, 2)),
    ],
)
def test_what_is_given_out(given, rows, expected):
    settings = section(
        **{k: v for k, v in given.items() if v is not None}
        | ({"local-steps": None} if given.get("local-steps", 1) is None else {})
    )
    assert release_of(Noise(1.5, 2.0), settings, rows) == expected


def test_a_private_model_still_learns(task, examples):
    net = network(task)
    before = task.loss(net(examples.x), examples.y).item()
    settings = section(**{"local-steps": 100, "batch-size": 20})
    train_privately(task, net, examples, settings, Noise(0.5, 1.0), Entropy(key=KEY))
    assert task.loss(net(examples.x), examples.y).item() < before


class Places(torch.nn.Module):
    """Positions without the axis of the examples, whose gradients Opacus cannot tell apart."""

    def __init__(self):
        super().__init__()
        self.place, self.fc = torch.nn.Embedding(2, 4), torch.nn.Linear(5, 2)

    def forward(self, x):
        place = self.place(torch.arange(2)).expand(len(x), 2, 4)
        return self.fc(torch.cat([x[:, :, None], place], dim=2).tanh().mean(dim=1))


def test_gradients_that_are_no_examples_are_not_clipped(task, examples):
    net = Places()
    before = flat(net)
    with pytest.raises(SiteError, match=r"place\.weight: must have a gradient for each") as caught:
        train_privately(
            task, net, examples, section(**{"batch-size": 37}), Noise(1.0, 1.0), Entropy()
        )
    assert caught.value.code == 413
    assert torch.equal(flat(net), before)
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())
