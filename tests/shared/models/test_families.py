"""What every network must hold to: an example apart from its batch, clients stacked, and the same numbers as ONNX."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedge.shared.models.autoencoder import ConvAutoencoder
from fedge.shared.models.cnn import CNN
from fedge.shared.models.cnn1d import CNN1d
from fedge.shared.models.dcgan import Discriminator, Generator
from fedge.shared.models.detector import CenterDetector, PeakDetector
from fedge.shared.models.fnn import FNN
from fedge.shared.models.logistic import LogisticRegression
from fedge.shared.models.recurrent import RecurrentClassifier, RecurrentLanguageModel
from fedge.shared.models.resnet import ResNet
from fedge.shared.models.text_cnn import TextCNN
from fedge.shared.models.transformer import TransformerClassifier, TransformerLanguageModel
from fedge.shared.models.unet import UNet

TOKENS = 20
BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
LAYERS = 2


class Family(NamedTuple):
    """A small network, and what it takes."""

    build: object
    shape: tuple
    #: Axes that stay open besides the batch, by index in the batch.
    open: Mapping = MappingProxyType({})
    #: Other shapes than the example's.
    others: tuple = ()
    tokens: bool = False


def recurrent(cell, bidirectional):
    return lambda: RecurrentClassifier(
        features=3, classes=5, cell=cell, hidden=4, layers=LAYERS, bidirectional=bidirectional
    )


LENGTH, TIME, SIZE = {1: "length"}, {2: "length"}, {2: "height", 3: "width"}
SEQUENCES, TEXTS = ((33, 3), (1, 3)), ((1,), (30,))

FAMILIES = {
    "logistic": Family(lambda: LogisticRegression(6, 3), (6,)),
    "fnn": Family(lambda: FNN((6, 8, 3)), (6,)),
    "cnn": Family(lambda: CNN(channels=1, side=8, classes=5, width=4, hidden=8), (1, 8, 8)),
    "resnet-8": Family(
        lambda: ResNet(classes=5, width=4), (3, 32, 32), SIZE, ((3, 64, 64), (3, 24, 40))
    ),
    "cnn1d": Family(lambda: CNN1d(features=3, classes=5, width=8), (20, 3), LENGTH, SEQUENCES),
    "text-cnn": Family(
        lambda: TextCNN(tokens=TOKENS, classes=3, embedding=8, maps=4), (9,), LENGTH, TEXTS, True
    ),
    "lstm": Family(recurrent("lstm", False), (20, 3), LENGTH, SEQUENCES),
    "bi-lstm": Family(recurrent("lstm", True), (20, 3), LENGTH, SEQUENCES),
    "gru": Family(recurrent("gru", False), (20, 3), LENGTH, SEQUENCES),
    "bi-gru": Family(recurrent("gru", True), (20, 3), LENGTH, SEQUENCES),
    "lstm-language": Family(
        lambda: RecurrentLanguageModel(tokens=TOKENS, embedding=8, hidden=8),
        (9,), LENGTH, TEXTS, True,
    ),
    "transformer": Family(
        lambda: TransformerClassifier(tokens=TOKENS, classes=3, length=30, width=8, layers=1),
        (9,), LENGTH, TEXTS, True,
    ),
    "transformer-language": Family(
        lambda: TransformerLanguageModel(tokens=TOKENS, length=30, width=8, layers=1),
        (9,), LENGTH, TEXTS, True,
    ),
    "autoencoder": Family(
        lambda: ConvAutoencoder(channels=1, width=4), (1, 16, 16), SIZE, ((1, 28, 28), (1, 8, 12))
    ),
    "autoencoder-1d": Family(
        lambda: ConvAutoencoder(channels=1, width=4, axes=1), (1, 16), TIME, ((1, 140), (1, 4))
    ),
    "u-net": Family(
        lambda: UNet(classes=4, width=4, depth=1), (3, 16, 16), SIZE, ((3, 24, 32), (3, 30, 40))
    ),
    "generator": Family(lambda: Generator(side=32, latent=10, width=4), (10,)),
    "discriminator": Family(lambda: Discriminator(side=28, width=4), (3, 28, 28)),
    "detector": Family(
        lambda: PeakDetector(CenterDetector(classes=3, width=4), k=8),
        (3, 32, 32), SIZE, ((3, 64, 40), (3, 16, 16)),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]


def inputs(family, *shape):
    return torch.randint(1, TOKENS, shape) if family.tokens else torch.randn(shape)


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
    x = inputs(family, 5, *family.shape)
    for whole, one in zip(parts(network(x)), parts(network(x[:1])), strict=True):
        torch.testing.assert_close(whole[:1], one, atol=1e-4, rtol=1e-4)


# A missing batching rule costs a warning, or runs client by client: warnings are errors here.
def test_stacked_clients_compute_what_each_does_alone(family):
    clients = [family.build() for _ in range(3)]
    x = inputs(family, 3, 4, *family.shape)
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


def exported(network, family):
    """The ONNX model, and a session on it."""
    example = inputs(family, 2, *family.shape)
    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["input"],
            dynamic_shapes=({0: "batch", **family.open},),
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return model, session


def axes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.slow
def test_onnx_is_the_network_at_every_size(family):
    network = family.build().eval()
    model, session = exported(network, family)
    assert axes(model.graph.input[0]) == [
        {0: "batch", **family.open}.get(axis, size) for axis, size in enumerate((2, *family.shape))
    ]
    assert [axes(output)[0] for output in model.graph.output] == ["batch"] * len(model.graph.output)
    recurrences = [n.op_type for n in model.graph.node if n.op_type in ("LSTM", "GRU")]
    if isinstance(network, RecurrentClassifier):
        # Unrolled, the graph would hold one length only.
        assert recurrences == [type(network.recurrence).__name__] * LAYERS
    for shape in (family.shape, *family.others):
        for batch in BATCHES:
            x = inputs(family, batch, *shape)
            with torch.no_grad():
                eager = parts(network(x))
            for found, expected in zip(session.run(None, {"input": x.numpy()}), eager, strict=True):
                assert found.shape == tuple(expected.shape)
                np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0)


class Forgets(nn.Module):
    """A network that takes its length for a constant: what the exporter must not let through."""

    def forward(self, x):
        return x.sum(dim=1) / len(x.unbind(1))


def test_a_fixed_length_is_refused():
    with pytest.raises(torch.onnx.OnnxExporterError, match="inferred a static shape of 4"):
        exported(Forgets().eval(), Family(Forgets, (4, 3), LENGTH))
