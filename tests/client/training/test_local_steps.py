from functools import partial

import builders
import numpy as np
import pytest
import torch

from fedge.client.training.batches import batches
from fedge.client.training.learner import CHUNK, counters, mean_loss
from fedge.client.training.local_steps import Examples, train
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import SiteError


@pytest.fixture
def examples(data):
    return Examples(torch.from_numpy(data.train_features), torch.from_numpy(data.train_labels))


def network(task):
    torch.manual_seed(3)
    return task.network()


section = partial(builders.section, TrainSection, learning_rate=0.05, batch_size=8)


def order(examples, steps):
    return list(batches(seed=1, site="a", rows=len(examples.y), batch_size=8, first=0, steps=steps))


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_loss_is_the_mean_over_the_steps(task, examples):
    steps = order(examples, 3)
    seen, by_hand = network(task), []
    optimiser = torch.optim.SGD(seen.parameters(), lr=0.05)
    for rows in steps:
        loss = task.loss(seen(examples.x[rows]), examples.y[rows])
        by_hand.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net = network(task)
    outcome = train(task, net, examples, steps, section())
    assert outcome.loss == np.mean(by_hand)
    assert outcome.mean_gradient == {}
    for name, p in weights(seen).items():
        assert torch.equal(p, weights(net)[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_lowers_the_loss(task, examples, optimizer):
    net = network(task)
    before = mean_loss(task, net, examples.x, examples.y)
    train(task, net, examples, order(examples, 60), section(optimizer=optimizer))
    assert mean_loss(task, net, examples.x, examples.y) < before / 2


def test_proximal_step_equals_the_gradient_of_the_squared_distance(task, examples):
    mu, lr, steps = 0.7, 0.05, order(examples, 4)
    by_hand = network(task)
    start = weights(by_hand)
    for rows in steps:
        loss = task.loss(by_hand(examples.x[rows]), examples.y[rows])
        distance = sum(((p - start[n]) ** 2).sum() for n, p in by_hand.named_parameters())
        grads = torch.autograd.grad(loss + mu / 2 * distance, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), grads, strict=True):
                p -= lr * g
    net = network(task)
    train(task, net, examples, steps, section(), proximal_mu=mu)
    for name, p in weights(net).items():
        torch.testing.assert_close(p, weights(by_hand)[name], rtol=1e-5, atol=1e-6)


def test_a_large_mu_holds_the_weights_back(task, examples):
    moved = []
    for mu in (0.0, 10.0):
        net = network(task)
        start = weights(net)
        train(task, net, examples, order(examples, 30), section(), proximal_mu=mu)
        moved.append(sum(float((p - start[n]).norm()) for n, p in weights(net).items()))
    assert moved[1] < moved[0] / 3


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_mean_gradient_is_option_two_for_plain_sgd(task, examples, decay):
    draw = torch.Generator().manual_seed(5)
    net = network(task)
    x = weights(net)
    c, c_i = (
        {n: torch.randn(p.shape, generator=draw) * 0.1 for n, p in x.items()} for _ in range(2)
    )
    steps, lr = 7, 0.05
    outcome = train(
        task,
        net,
        examples,
        order(examples, steps),
        section(**{"weight-decay": decay}),
        correction={n: c[n] - c_i[n] for n in x},
    )
    for name, y in weights(net).items():
        option_two = c_i[name] - c[name] + (x[name] - y) / (steps * lr)
        torch.testing.assert_close(outcome.mean_gradient[name], option_two, rtol=1e-4, atol=1e-5)


def test_correction_moves_every_plain_step_by_itself(task, examples):
    # One step, so that the gradient is the same with and without.
    plain, corrected = network(task), network(task)
    push = {n: torch.full_like(p, 0.25) for n, p in weights(plain).items()}
    train(task, plain, examples, order(examples, 1), section())
    train(task, corrected, examples, order(examples, 1), section(), correction=push)
    for name, p in weights(plain).items():
        torch.testing.assert_close(p - weights(corrected)[name], 0.05 * push[name])


def test_counters_do_not_depend_on_chunks(task):
    net = network(task)
    x = torch.randn(2 * CHUNK + 5, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    found = counters(task, net, x, y)
    assert found["examples"] == len(y)
    with torch.no_grad():
        assert found["correct"] == float((net(x).argmax(1) == y).sum())
        assert found["loss-sum"] == pytest.approx(float(task.loss(net(x), y)) * len(y), rel=1e-5)
    assert not net.training


# Mixed precision


class Seen(torch.nn.Module):
    """A linear layer that notes the type of its output."""

    def __init__(self):
        super().__init__()
        self.layer, self.types = torch.nn.Linear(2, 2), set()

    def forward(self, x):
        found = self.layer(x)
        self.types.add(found.dtype)
        return found


def test_bfloat16_computes_so_and_keeps_full_weights(task, examples):
    found = {}
    for kind in ("off", "bfloat16"):
        torch.manual_seed(3)
        net = Seen()
        before = mean_loss(task, net, examples.x, examples.y)
        net.types.clear()
        outcome = train(
            task, net, examples, order(examples, 60), section(**{"mixed-precision": kind})
        )
        assert net.types == {torch.bfloat16 if kind == "bfloat16" else torch.float32}
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert mean_loss(task, net, examples.x, examples.y) < before / 2
        found[kind] = (outcome.loss, weights(net))
    assert found["off"][0] == pytest.approx(found["bfloat16"][0], rel=0.05)
    for name, p in found["off"][1].items():
        assert not torch.equal(p, found["bfloat16"][1][name])
        torch.testing.assert_close(p, found["bfloat16"][1][name], rtol=0.1, atol=0.05)


def test_bfloat16_goes_with_a_correction_and_a_proximal_term(task, examples):
    net = network(task)
    push = {n: torch.zeros_like(p) for n, p in weights(net).items()}
    outcome = train(
        task,
        net,
        examples,
        order(examples, 5),
        section(**{"mixed-precision": "bfloat16"}),
        proximal_mu=0.1,
        correction=push,
    )
    assert {g.dtype for g in outcome.mean_gradient.values()} == {torch.float32}


def test_float16_is_refused_on_the_cpu(task, examples):
    with pytest.raises(SiteError) as caught:
        train(
            task,
            network(task),
            examples,
            order(examples, 1),
            section(**{"mixed-precision": "float16"}),
        )
    assert caught.value.code == 414
