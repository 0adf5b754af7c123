"""What every network must hold to: an example apart from its batch, and clients stacked."""

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(family, *batch):
    shape, tokens = (*batch, *family.given.shape), family.given.tokens
    return torch.randint(1, tokens, shape) if tokens else torch.randn(shape)


def parts(output):
    return output if isinstance(output, tuple) else (output,)


def flat(output):
    """All numbers of an output that have a gradient."""
    return torch.cat([t.flatten(1) for t in parts(output) if t.is_floating_point()], dim=1)


def test_all_state_is_weights(family):
    # Running statistics would differ from site to site, and no noise of differential privacy covers them.
    assert not list(family.build().buffers())


@pytest.mark.parametrize("train", [True, False])
def test_an_example_does_not_see_its_batch(family, train):
    network = family.build().train(train)
    x = inputs(family, 5)
    for whole, one in zip(parts(network(x)), parts(network(x[:1])), strict=True):
        torch.testing.assert_close(whole[:1], one, atol=1e-4, rtol=1e-4)


# A missing batching rule costs a warning, or runs client by client: warnings are errors here.
def test_stacked_clients_compute_what_each_does_alone(family):
    clients = [family.build() for _ in range(3)]
    x = inputs(family, 3, 4)
    weights, buffers = stack_module_state(clients)
    base = family.build().to("meta")

    def forward(weights, buffers, x):
        return flat(functional_call(base, (weights, buffers), (x,)))

    def loss(*arguments):
        return forward(*arguments).square().mean()

    alone = torch.stack([flat(client(own)) for client, own in zip(clients, x, strict=True)])
    together = vmap(forward)(weights, buffers, x)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    found = vmap(grad(loss))(weights, buffers, x)
    alone.square().mean(dim=(1, 2)).sum().backward()
    for name, gradient in found.items():
        own = torch.stack([client.get_parameter(name).grad for client in clients])
        assert own.abs().max() > 0, f"{name} is out of reach of the loss"
        torch.testing.assert_close(gradient, own, atol=1e-4, rtol=1e-4, msg=name)
