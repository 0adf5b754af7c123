"""Every family of networks, small, with what it takes: for tests and benchmarks of the networks and of their graphs."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

from fedge.shared.compile.graph_input import GraphInput

TOKENS = 20


class Family(NamedTuple):
    """A small network, and what it takes."""

    build: Callable
    given: GraphInput
    #: Other sizes of the open axes than the example's.
    others: tuple[Mapping[str, int], ...] = ()


def _network(module, name, **arguments):
    # Imported when it is built: most of what imports this module need no torch.
    return lambda: getattr(import_module(f"fedge.shared.models.{module}"), name)(**arguments)


def _detector():
    detector = import_module("fedge.shared.models.detector")
    return detector.PeakDetector(detector.CenterDetector(classes=3, width=4), k=8)


def _recurrent(cell, bidirectional):
    build = _network(
        "recurrent", "RecurrentClassifier",
        features=3, classes=5, cell=cell, hidden=4, layers=2, bidirectional=bidirectional,
    )  # fmt: skip
    return Family(build, GraphInput((20, 3), open={1: "length"}), LENGTHS)


def _image(build, shape, *others):
    sizes = tuple({"height": h, "width": w} for h, w in others)
    return Family(build, GraphInput(shape, open={2: "height", 3: "width"} if others else {}), sizes)


LENGTHS = ({"length": 33}, {"length": 1})
TEXT = GraphInput((9,), TOKENS, {1: "length"})
TEXTS = ({"length": 1}, {"length": 30})
LATENT = GraphInput((10,))

FAMILIES = {
    "logistic": Family(_network("logistic", "LogisticRegression", features=6, logits=3), GraphInput((6,))),
    "fnn": Family(_network("fnn", "FNN", widths=(6, 8, 3)), GraphInput((6,))),
    "cnn": _image(_network("cnn", "CNN", channels=1, side=8, classes=5, width=4, hidden=8), (1, 8, 8)),
    "resnet-8": _image(_network("resnet", "ResNet", classes=5, width=4), (3, 32, 32), (64, 64), (24, 40)),
    "cnn1d": Family(
        _network("cnn1d", "CNN1d", features=3, classes=5, width=8),
        GraphInput((20, 3), open={1: "length"}), LENGTHS,
    ),
    "text-cnn": Family(
        _network("text_cnn", "TextCNN", tokens=TOKENS, classes=3, embedding=8, maps=4), TEXT, TEXTS
    ),
    "lstm": _recurrent("lstm", False),
    "bi-lstm": _recurrent("lstm", True),
    "gru": _recurrent("gru", False),
    "bi-gru": _recurrent("gru", True),
    "lstm-language": Family(
        _network("recurrent", "RecurrentLanguageModel", tokens=TOKENS, embedding=8, hidden=8), TEXT, TEXTS
    ),
    "transformer": Family(
        _network(
            "transformer", "TransformerClassifier", tokens=TOKENS, classes=3, length=30, width=8, layers=1
        ),
        TEXT, TEXTS,
    ),
    "transformer-language": Family(
        _network("transformer", "TransformerLanguageModel", tokens=TOKENS, length=30, width=8, layers=1),
        TEXT, TEXTS,
    ),
    "autoencoder": _image(
        _network("autoencoder", "ConvAutoencoder", channels=1, width=4), (1, 16, 16), (28, 28), (8, 12)
    ),
    "autoencoder-1d": Family(
        _network("autoencoder", "ConvAutoencoder", channels=1, width=4, axes=1),
        GraphInput((1, 16), open={2: "length"}), ({"length": 140}, {"length": 4}),
    ),
    "u-net": _image(
        _network("unet", "UNet", classes=4, width=4, depth=1), (3, 16, 16), (24, 32), (30, 40)
    ),
    "generator": Family(_network("dcgan", "Generator", side=32, latent=10, width=4), LATENT),
    "discriminator": _image(_network("dcgan", "Discriminator", side=28, width=4), (3, 28, 28)),
    "detector": _image(_detector, (3, 32, 32), (64, 40), (16, 16)),
}  # fmt: skip
